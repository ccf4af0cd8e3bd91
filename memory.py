"""What a run takes of each GPU's memory, by arithmetic: --dry_run shows it, train.py gives vLLM
what is left of it, and experiments/scaling.py tabulates it.

Bytes everywhere. The bytes that a layer keeps for backward are those that PyTorch was seen to keep
on a CPU (test_all.py measures them again); nothing here was compared with a GPU.

Under FSDP2 a rank holds a shard of weights, gradients and AdamW's averages, and gathers one decoder
layer after another in the compute dtype. What no layer holds (embedding, head, last norm) is the
root, which stays gathered. DDP holds everything whole, and computes in bfloat16 by autocast.
"""

import copy
import math
from dataclasses import dataclass, replace

import torch
from transformers import AutoModelForCausalLM

from policy import add_lora, decoder_layers, number_of_parameters

# Of a card that is only planned for.
ASSUMED_CARD = 80e9
# Assumptions: contexts of CUDA and NCCL; and, within vLLM's share, its activations and CUDA graphs.
OVERHEAD = 2e9
VLLM_OVERHEAD = 2e9
# The share of a card that stays free while vLLM is awake, for fragments and the tensors of a push.
SPARE = 0.05
LARGEST_SHARE = 0.8
# Answers that are decoded together: by the torch engine on a CPU, and at most on a GPU.
ROWS_ON_CPU = 256
MOST_ROWS = 1024
# Policy's chunk of tokens whose logits exist at a time.
CHUNK_TOKENS = 512


# ---- the model -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelSize:
    """What memory follows from."""

    parameters: int
    trained: int  # all of them, or those of LoRA's adapters
    layer: int  # parameters of the largest decoder layer
    root: int  # parameters that no decoder layer holds
    layers: int
    vocab: int
    hidden: int
    query: int  # query heads x head_dim
    key_value: int  # key-value heads x head_dim
    mlp: int  # hidden units of the MLP that a token passes, of all its experts together
    experts: int  # experts that a token passes; 0: no mixture of experts
    tied: bool  # the head's weights are the embedding's
    qk_norm: bool  # queries and keys have norms of their own, as in Qwen3


def model_size(config, trust_remote_code=False, lora_rank=0):
    """The ModelSize of a Hugging Face config; parameters are counted, no weights are loaded."""
    with torch.device("meta"):  # shapes without memory
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        parameters = number_of_parameters(model)
        layers = [number_of_parameters(layer) for layer in decoder_layers(model)]
        if lora_rank:
            add_lora(model, lora_rank, alpha=1.0, seed=0, dtype=torch.float32)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    shape = shape_of(config)
    experts = getattr(shape, "num_experts_per_tok", None) or 0
    mlp = getattr(shape, "intermediate_size", None) or 4 * shape.hidden_size
    if experts:
        mlp = experts * (getattr(shape, "moe_intermediate_size", None) or mlp)
        mlp += getattr(shape, "shared_expert_intermediate_size", None) or 0
    return ModelSize(
        parameters=parameters,
        trained=trained,
        layer=max(layers, default=0),
        root=parameters - sum(layers),
        layers=shape.num_hidden_layers,
        vocab=shape.vocab_size,
        hidden=shape.hidden_size,
        query=shape.num_attention_heads * head_dim(shape),
        key_value=key_value_units(shape),
        mlp=mlp,
        experts=experts,
        tied=model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        qk_norm=any(name.endswith("q_norm") for name, _ in model.named_modules()),
    )


def shape_of(config):
    """The text part of a config, in which sizes that differ between layers (Gemma 4) can be read:
    one size stands for all."""
    shape = copy.copy(config.get_text_config())
    shape.allow_global_per_layer_attribute_access = True
    return shape


def head_dim(shape):
    return getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads


def key_value_units(shape):
    """Key-value heads x head_dim of a text config."""
    heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    return heads * head_dim(shape)


# ---- activations ---------------------------------------------------------------------------------


def kept_per_token(size, dtype, autocast):
    """Bytes that one decoder layer keeps of a token for backward: gated MLP, norms in float32,
    attention without its matrix.

    h hidden units, q query, k key-value, i MLP units of b bytes each:

        norms        2 (4 + 2b) h    input in float32, normalised, output
        attention    2b (q + k)      queries, keys, values, output
        MLP          4b i            gate, SiLU of it, up, their product

    so 16h + 4q + 4k + 8i in bfloat16. Under autocast the residual stream is float32 and each of
    q, k, v, gate and up keeps a cast input of its own: 26h. A mixture of experts also gathers and
    returns each token once per expert; autocast does not reach experts, which stay float32."""
    b = dtype.itemsize
    norms = (16 + 5 * b if autocast else 2 * (4 + 2 * b)) * size.hidden
    attention = 2 * b * (size.query + size.key_value)
    if size.qk_norm:
        attention += (4 + b) * (size.query + size.key_value)
    in_experts = 4 if autocast and size.experts else b
    mlp = 4 * in_experts * size.mlp + 2 * in_experts * size.experts * size.hidden
    return norms + attention + mlp


def activations(size, dtype, autocast, checkpointing, tokens):
    """(kept, one layer): bytes that all layers keep for the backward of a micro-batch of `tokens`,
    and what comes on top of it while one layer is in its backward.

    With checkpointing each layer keeps its input only, and one layer at a time is computed again.
    In a layer's backward the gradients of gate, up and product live, and two of the residual
    stream: an estimate."""
    b = dtype.itemsize
    whole = kept_per_token(size, dtype, autocast)
    layer_input = (4 if autocast else b) * size.hidden
    gradients = b * (3 * size.mlp + 2 * size.hidden)
    if checkpointing:
        return size.layers * layer_input * tokens, (whole + gradients) * tokens
    return size.layers * whole * tokens, gradients * tokens


# ---- sampling ------------------------------------------------------------------------------------


def cache_per_token(layers, key_value, dtype):
    """Bytes of the keys and values of a token; key_value: units of the keys of one layer."""
    return 2 * layers * key_value * dtype.itemsize


def bytes_per_row(shape, dtype, length):
    """row_bytes of a text config."""
    cache = cache_per_token(shape.num_hidden_layers, key_value_units(shape), dtype)
    return row_bytes(cache, shape.vocab_size, length)


def row_bytes(cache, vocab, length):
    """What the torch engine needs for an answer whose prompt and response have `length` tokens.

    cache: of cache_per_token. Beside keys and values these are 24 bytes per token of the vocabulary
    in rollout.sample: logits, log-probs, probabilities, a float64 cdf, the next step's logits."""
    return length * cache + 24 * vocab


def rows_that_fit(free, per_row):
    """Rows that the torch engine decodes together in so many free bytes: a power of two, so that
    a few bytes more or less change nothing.

    It uses half of them. The cache is copied when it grows, a layer at a time, and attention
    repeats a layer's keys and values for its query heads."""
    rows = max(1, int(free / 2 // per_row))
    return min(MOST_ROWS, 2 ** int(math.log2(rows)))


# ---- the whole -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Bytes per rank: of each thing that is held at some time, and at the worst moment of each
    phase of a step."""

    parts: dict
    peaks: dict
    share: float  # of the card, for vLLM
    total: float  # the card
    misfit: str = ""  # why it cannot run, and what to change
    tight: str = ""  # why it may not run, as far as estimates tell


def plan_memory(size, cfg, ranks, dtype, with_reference, total):
    """The Plan of a run on cards of `total` bytes.

    cfg: train.py's settings; with_reference: the method wants a frozen reference, which with LoRA
    is the base without its adapters.

    Weights, gradients, AdamW and engine weights are exact, activations as close as kept_per_token;
    the rest is estimated. The parts of the update do not all reach their largest at the same
    moment, so its peak is an upper bound."""
    n = size.parameters
    b = dtype.itemsize
    lora = cfg.lora_rank > 0
    head = size.vocab * size.hidden
    trains = cfg.steps > 0  # an evaluation keeps the policy on the CPU
    sharded = cfg.parallel == "fsdp"
    autocast = not sharded and dtype != torch.float32
    shards = ranks if sharded else 1
    tokens = largest_micro_batch(cfg, ranks)
    kept, one_layer = activations(size, dtype, autocast, cfg.activation_checkpointing, tokens)
    if sharded:
        # The next layer is fetched while one computes. A gradient lives in the compute dtype and,
        # for the reduce-scatter, in float32; one chunk's gradient of the head joins them.
        in_use = b * (2 * size.layer + size.root)
        unreduced = (b + 4) * (size.layer + size.root) + b * head
    else:
        in_use = b * n if autocast and not lora else 0
        unreduced = (b + 4) * head if autocast else 4 * head
    parts = {
        "weights": 4 * size.trained / shards,
        "frozen base": b * n / shards if lora else 0,
        "gradients": 4 * size.trained / shards,
        "AdamW": 8 * size.trained / shards,
        "reference": 4 * n / shards if with_reference and not lora else 0,
        "gathered or cast": in_use,
        "unreduced gradients": 0 if lora else unreduced,
        "activations": kept,
        "one layer": one_layer,
        # logits, log-probs, probabilities and two gradients, float32
        "log-prob chunk": 5 * 4 * CHUNK_TOKENS * size.vocab,
    }
    if not trains:
        parts = dict.fromkeys(parts, 0)
    parts["engine weights"] = b * n / cfg.rollout_tp

    awake = parts["weights"] + parts["frozen base"] + parts["AdamW"] + parts["reference"]
    if not sharded:
        awake += parts["gradients"]  # DDP makes its buckets at the start, and they stay
    share = cfg.rollout_gpu_memory or share_for_vllm(total, awake)
    if cfg.engine == "vllm":
        cache = share * total - parts["engine weights"] - VLLM_OVERHEAD
        parts["KV cache"] = max(0.0, cache)
        overhead = OVERHEAD + VLLM_OVERHEAD
        resident = awake + overhead  # vLLM sleeps during the update
    else:
        overhead = OVERHEAD
        resident = awake + overhead + parts["engine weights"]
        parts["KV cache"] = cache_of_torch_engine(size, cfg, ranks, dtype, total - resident)
    parts["overhead"] = overhead

    after_update = resident + (parts["gradients"] if sharded else 0)
    forward = parts["gathered or cast"] + parts["log-prob chunk"]
    backward = parts["unreduced gradients"] + parts["activations"] + parts["one layer"]
    sampling = awake + overhead + parts["engine weights"]
    peaks = {
        "rollout": sampling + parts["KV cache"],
        "score": resident + forward + kept_per_token(size, dtype, autocast) * tokens,
        "update": after_update + forward + backward,
        "optimizer step": after_update,  # the fused AdamW has no temporaries
        "push": sampling + 2 * 4 * head,  # the largest tensor is gathered, and copied
    }
    plan = Plan(parts, peaks, share, total)
    return replace(plan, misfit=misfit(plan, size, cfg, dtype, awake), tight=tight(plan))


def largest_micro_batch(cfg, ranks):
    """Padded tokens: one answer at least, an update's answers at most; 0 without training."""
    if not cfg.steps:
        return 0
    longest = cfg.max_prompt_len + cfg.max_response_len
    of_step = cfg.prompts_per_step * cfg.group_size * longest
    of_update = of_step // (cfg.updates_per_rollout * ranks)
    return min(max(cfg.micro_batch_tokens, longest), of_update)


def share_for_vllm(total, awake):
    """vLLM's share of a card of which the trainer holds `awake` bytes while vLLM samples.

    Rounded down to a hundredth; never above LARGEST_SHARE, since estimates are wrong at times."""
    share = (total - awake - OVERHEAD) / total - SPARE
    return min(LARGEST_SHARE, max(0.01, math.floor(100 * share) / 100))


def cache_of_torch_engine(size, cfg, ranks, dtype, free):
    """Bytes of the rows that the torch engine decodes together, if all answers are as long as they
    may be."""
    longest = cfg.max_prompt_len + cfg.max_response_len
    cache = cache_per_token(size.layers, size.key_value, dtype)
    per_row = row_bytes(cache, size.vocab, longest)
    most = rows_that_fit(free, per_row) if torch.cuda.is_available() else ROWS_ON_CPU
    return min(most, cfg.prompts_per_step * cfg.group_size // ranks) * per_row


def misfit(plan, size, cfg, dtype, awake):
    """Why the run cannot fit on its cards, and what to change, in one line; "" if it can. It looks
    only at what is known well."""
    longest = cfg.max_prompt_len + cfg.max_response_len
    answer = longest * cache_per_token(size.layers, size.key_value, dtype) / cfg.rollout_tp
    is_computed = cfg.engine == "vllm" and not cfg.rollout_gpu_memory
    needed = plan.peaks["optimizer step"]
    if needed > plan.total:
        return (
            f"weights, gradients and AdamW take {gb(needed)} of each GPU's {gb(plan.total)}: use "
            "--parallel fsdp, more GPUs or a smaller model"
        )
    if is_computed and plan.parts["KV cache"] < answer:
        return (
            f"vllm does not fit: of each GPU's {gb(plan.total)} the trainer holds {gb(awake)} "
            f"while vllm samples, whose weights take {gb(plan.parts['engine weights'])} and one "
            f"answer {gb(answer)}: use --parallel fsdp, more GPUs, a larger --rollout_tp or a "
            "smaller model"
        )
    return ""


def tight(plan):
    """What may run out of memory by estimates, and what to change, in one line; "" if nothing."""
    phase = max(plan.peaks, key=plan.peaks.get)
    if plan.peaks[phase] <= plan.total:
        return ""
    advice = {
        "rollout": "lower --rollout_gpu_memory",
        "push": "use more GPUs, or a larger --rollout_tp",
    }
    by_default = (
        "lower --micro_batch_tokens, use --activation_checkpointing, --parallel fsdp or more GPUs"
    )
    return (
        f"the {phase} may take {gb(plan.peaks[phase])} of each GPU's {gb(plan.total)}: "
        + advice.get(phase, by_default)
    )


def gb(size):
    return f"{size / 1e9:.1f} GB"


def card_memory(device):
    """Bytes of this GPU; on a machine without one those of the card that is planned for."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return ASSUMED_CARD
