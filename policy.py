"""The model that is trained: log-probs of given responses, DDP and FSDP2, micro-batches, sums over
ranks.

Shapes: B answers of this rank, L tokens of the longest prompt with response, T of the longest
response, V tokens in the vocabulary. A batch is what rollout.collate returns.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from entropy import token_statistics, use_float32_logits

# ---- the model -----------------------------------------------------------------------------------


def decoder_of(model):
    """The part of a model that turns text into the states before its head. ValueError if it is not
    known."""
    decoder = model.get_decoder()
    if decoder is model:
        decoder = model.model  # Llama 4: transformers finds no part of it
    if not isinstance(decoder, PreTrainedModel):
        raise ValueError(
            f"{model.config.model_type} has more between its decoder and its logits than one "
            "matrix, which Policy.forward does not compute: choose another model"
        )
    return decoder


def logit_changes(config):
    """(scale, cap): the logits are cap * tanh(scale * z / cap) for the head's z; cap None: scale *
    z."""
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    scale *= getattr(config, "lm_head_multiplier", None) or 1.0  # Falcon H1
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite, MiniCPM
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2 and 4
    return scale, cap


# Decoders in which a token sees only what the mask lets it see. A state (Mamba) or a window over
# the row would mix the responses of pack_by_prompt.
PACKED_ARCHITECTURES = ("llama", "qwen2", "qwen3")
WIDEST_PACKED = 2048  # tokens of a packed row: attention under a mask is quadratic in them
LEAST_SAVED = 1 / 3  # of the padded tokens; else the mask costs more than it saves


def can_pack(config):
    """Whether a decoder of this config computes the same from pack_by_prompt."""
    has_window = getattr(config, "sliding_window", None)
    takes_mask = config._attn_implementation == "sdpa"
    return config.model_type in PACKED_ARCHITECTURES and takes_mask and not has_window


def pack_by_prompt(ids, prompt_lens, response_lens):
    """Packs each distinct prompt and all responses to it into one row, so that it runs once. A
    response sees the prompt and itself, and its positions are those that it would have alone.

    ids (B, L); prompt_lens, response_lens (B,). Returns the arguments of the decoder, for P rows of
    W tokens; and where the state before each response token is, in the order of the given rows: two
    index tensors. None where that does not save enough."""
    number = {}  # {prompt: its packed row}
    packed = []  # a list per row, of (token, position, response that it belongs to; -1: the prompt)
    before = []
    lens = zip(prompt_lens.tolist(), response_lens.tolist())
    for i, (tokens, (prompt_len, response_len)) in enumerate(zip(ids.tolist(), lens)):
        prompt = tuple(tokens[:prompt_len])
        k = number.setdefault(prompt, len(packed))
        if k == len(packed):
            packed.append([(token, t, -1) for t, token in enumerate(prompt)])
        start = len(packed[k])
        places = [prompt_len - 1, *range(start, start + response_len - 1)]
        before += [(k, place) for place in places[:response_len]]
        end = prompt_len + response_len
        packed[k] += [(tokens[t], t, i) for t in range(prompt_len, end)]

    width = max(map(len, packed))
    if width > WIDEST_PACKED or len(packed) * width > (1 - LEAST_SAVED) * ids.numel():
        return None
    padding = (0, 0, len(ids))
    padded = [row + [padding] * (width - len(row)) for row in packed]
    token, position, owner = torch.tensor(padded, device=ids.device).unbind(2)  # (P, W)
    seen = (owner[:, None] == owner[:, :, None]) | (owner[:, None] == -1)  # (P, query, key)
    inputs = dict(input_ids=token, position_ids=position, attention_mask=seen.tril()[:, None])
    return inputs, torch.tensor(before, device=ids.device).unbind(1)


class Policy(nn.Module):
    """A Hugging Face causal language model that scores given responses; DDP and FSDP2 wrap it."""

    def __init__(self, model, temperature, autocast=torch.float32, chunk_tokens=512):
        """autocast: torch.bfloat16 computes in it on float32 weights (DDP). FSDP2 casts by itself
        and wants float32 here."""
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.autocast = autocast
        self.chunk_tokens = chunk_tokens
        self.can_pack = can_pack(decoder_of(model).config)
        use_float32_logits(model)
        self.logit_scale, self.logit_cap = logit_changes(model.config.get_text_config())
        # What reads images or sound gets no gradient from text, and DDP would wait for one.
        text_parts = (decoder_of(model), model.get_output_embeddings())
        trained = {parameter for part in text_parts for parameter in part.parameters()}
        for parameter in set(model.parameters()) - trained:
            parameter.requires_grad = False

    def forward(self, ids, prompt_lens, response_mask, wanted=("log_probs",)):
        """The wanted entropy.STATISTICS of the response tokens, {name: (B, T) float32}, 0 on
        padding.

        ids (B, L): prompt + response, padded on the right; prompt_lens (B,); response_mask (B, T)
        bool. Padding on the right needs no attention mask and no position ids: under causal
        attention no response token ever sees it. A prompt with several responses runs once where
        the model allows it and it saves enough: see pack_by_prompt.
        """
        row, column = response_mask.nonzero(as_tuple=True)
        position = prompt_lens[row] + column
        packed = pack_by_prompt(ids, prompt_lens, response_mask.sum(1)) if self.can_pack else None
        # the state before a token predicts it
        inputs, before = packed or ({"input_ids": ids}, (row, position - 1))
        use_autocast = self.autocast != torch.float32
        with torch.autocast(ids.device.type, self.autocast, enabled=use_autocast):
            output = decoder_of(self.model)(**inputs, use_cache=False)
            hidden = output.last_hidden_state  # (B, L, D), or packed (P, W, D)
            found = token_statistics(
                hidden[before],
                self.model.get_output_embeddings(),
                ids[row, position],
                self.temperature,
                wanted,
                self.chunk_tokens,
                self.logit_scale,
                self.logit_cap,
            )
        padding = torch.zeros(response_mask.shape, device=ids.device)
        return {name: padding.index_put((row, column), values) for name, values in found.items()}


def build_policy(path, cfg, device, dtype):
    """The policy, or a reference, with float32 master weights that compute in `dtype`.

    With cfg.lora_rank only adapters are trained, see add_lora.
    cfg.parallel "fsdp" shards it by decoder layer (FSDP2); "ddp" leaves it whole, and train.py
    wraps it. With --steps 0 it stays in the file, from which the engine copies its weights.
    ValueError if the folder's weights are broken or of another model."""
    model = load_model(path, cfg.trust_remote_code)
    if cfg.lora_rank:
        add_lora(model, cfg.lora_rank, cfg.lora_alpha, cfg.seed, dtype)
    policy = Policy(model, cfg.temperature, dtype if cfg.parallel == "ddp" else torch.float32)
    policy.eval()  # no dropout: the ratio would start away from 1
    if not cfg.steps:
        return policy
    layers = decoder_layers(model)
    if cfg.activation_checkpointing:
        checkpoint_activations(model, layers)
    if cfg.parallel == "ddp":
        policy.to(device)
    else:
        shard(policy, layers, device, dtype)
    if not cfg.lora_rank:  # the frozen base of LoRA stays as it is computed with
        policy.float()  # only now: a float32 copy on the host would be one per rank
    return policy


def load_model(path, trust_remote_code):
    """The model in the dtype of its checkpoint's first weight: so the file is mapped, not read, and
    all ranks of a node share one copy of it in the page cache. Weights of the file in another dtype
    are cast to that one."""
    transformers_logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    config.dtype = None  # what config.json says may be less exact than what the file holds
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype="auto",
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,  # they are refused below, in one line
            output_loading_info=True,
        )
    except SafetensorError as error:
        raise ValueError(
            f"the weights in {path} are truncated or not in safetensors format ({error})"
        ) from None
    wrong = [str(name) for name in info["missing_keys"]]
    for name, _, shape in info["mismatched_keys"]:
        wrong.append(f"{name} of the shape {tuple(shape)}")
    if wrong:  # transformers would draw them at random
        first = min(wrong)
        raise ValueError(
            f"{path} does not hold {first} ...: its weights are of another model than its "
            "config.json"
        )
    head = model.get_output_embeddings()
    says_tied = getattr(model.config, "tie_word_embeddings", False)
    can_tie = bool(model._tied_weights_keys)  # a few architectures never do
    if says_tied and can_tie and head.weight is not model.get_input_embeddings().weight:
        raise ValueError(
            f"{path} holds a head that is not its embeddings, but its config.json says that they "
            'are one: write "tie_word_embeddings": false there, or the engine would tie them'
        )
    make_savable(model)
    return model


def make_savable(model):
    """Keeps only the token ids of generation settings that contradict each other, as a temperature
    without do_sample: transformers reads them, but refuses to save them with a checkpoint."""
    settings = model.generation_config
    try:
        settings.validate(strict=True)
    except ValueError:
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        ids = {name: getattr(settings, name) for name in names}
        model.generation_config = GenerationConfig(**ids)


def decoder_layers(model):
    """The layers of the decoder: its list of modules with the most parameters. ValueError if it has
    no list."""
    lists = [part for part in decoder_of(model).modules() if isinstance(part, nn.ModuleList)]
    if not lists:
        raise ValueError(
            f"{model.config.model_type} keeps no list of layers to shard or to checkpoint: "
            "choose another model"
        )
    return max(lists, key=number_of_parameters)


def number_of_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def checkpoint_activations(model, layers):
    """Layers are checkpointed in training mode only; their dropouts stay in eval mode."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in layers:
        layer.training = True


def check_gradients(ddp_policy):
    """ValueError if a weight has no gradient after the backward: DDP has then exchanged none of
    those that share a bucket with it."""
    for name, parameter in ddp_policy.named_parameters():
        if parameter.requires_grad and parameter.grad is None:
            raise ValueError(
                f"the answers gave {name.removeprefix('module.model.')} no gradient, and DDP needs "
                "one for every weight: use --parallel fsdp"
            )


def shard(policy, layers, device, dtype):
    """FSDP2: one layer at a time goes to the device, which keeps its shard of it. The whole model
    is never there."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in [*layers, policy]:
        fully_shard(module, mesh=mesh, mp_policy=precision)


def full_tensors(model):
    """Yields (name, tensor) of model.state_dict(), sharded tensors gathered one at a time, so that
    a rank holds its shards and one whole tensor. A collective under FSDP2: every rank must exhaust
    it. With LoRA they have the base's names, and the adapters are merged into copies.

    state_dict(), not named_parameters(): it repeats a tied lm_head.weight. vLLM on CPU keeps a
    packed copy of the head, and without that entry it would go on sampling from the old one,
    silently."""
    for name, tensor in model.state_dict().items():
        if is_adapter(name):
            continue
        if name.endswith(".base_layer.weight"):
            tensor = merged_weight(model.get_submodule(name.removesuffix(".base_layer.weight")))
        yield name.replace(".base_layer.", "."), whole_tensor(tensor)


def whole_tensor(tensor):
    """A sharded tensor gathered, which is a collective; another one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# ---- LoRA ----------------------------------------------------------------------------------------
# Hu et al. 2021, arXiv 2106.09685: a frozen weight W computes with W + alpha / rank B A, and only A
# (rank, inputs) and B (outputs, rank) are trained. peft puts a layer that holds W as base_layer, A
# and B in the place of each linear one, so all else here sees the same model.


def add_lora(model, rank, alpha, seed, dtype):
    """Gives every linear layer but the head an adapter and freezes all other weights, in `dtype`.

    The adapters are float32. B is 0 at first, so the model still computes what it did. A is drawn
    with the seed, the same on every rank, and the caller's random state is left as it was.
    ValueError if the rank is above that of every layer's weight."""
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds, so only where it is used

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        inject_adapter_in_model(config, model)
    full_rank = max(min(layer.base_layer.weight.shape) for layer in lora_layers(model))
    if rank > full_rank:
        raise ValueError(
            f"--lora_rank {rank}: no weight of this model has a rank above {full_rank}; "
            "--lora_rank 0 trains all weights"
        )
    for parameter in model.parameters():
        # peft makes adapters in the base's dtype, in which small steps would round to nothing.
        wanted = torch.float32 if parameter.requires_grad else dtype
        parameter.data = parameter.data.to(wanted)


def lora_layers(model):
    return [module for module in model.modules() if hasattr(module, "lora_A")]


def is_adapter(name):
    return ".lora_A." in name or ".lora_B." in name


@torch.no_grad()
def merged_weight(layer):
    """W + alpha / rank B A of a layer with an adapter, float32; sharded if they are."""
    return layer.base_layer.weight + layer.get_delta_weight("default")


@contextmanager
def adapters_off(policy):
    """Within it the policy computes as its base, the reference; without LoRA it stays as it is."""
    layers = lora_layers(policy)
    for layer in layers:
        layer.enable_adapters(False)
    yield
    for layer in layers:
        layer.enable_adapters(True)


def adapter_tensors(model):
    """{name: tensor} of the adapters, whole and in host memory; {} without LoRA. A collective under
    FSDP2."""
    state = model.state_dict()
    return {name: whole_tensor(state[name]).cpu() for name in state if is_adapter(name)}


def load_adapters(model, tensors):
    """tensors: of adapter_tensors, on every rank."""
    options = StateDictOptions(full_state_dict=True, strict=False)  # not strict: W is not there
    set_model_state_dict(model, tensors, options=options)


# ---- ranks ---------------------------------------------------------------------------------------


def sum_over_ranks(values):
    """Sum of a tensor over ranks, float64. A collective."""
    values = values.detach().double()
    dist.all_reduce(values)
    return values


def max_over_ranks(value):
    """Largest of a number (or of a tensor of one element) over ranks. A collective."""
    largest = torch.as_tensor(value).clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.item()


# ---- micro-batches -------------------------------------------------------------------------------


def micro_batches(lengths, rows, budget, at_least=0):
    """Lists of rows of similar lengths, each of at most `budget` padded tokens or of one row.

    lengths: tokens of each row of the batch; rows: indices into it; at_least: so many lists come
    out, by halving the longest (there must be as many rows)."""
    batches = []
    for row in sorted(rows, key=lambda row: lengths[row]):
        # rows come shortest first
        if not batches or (len(batches[-1]) + 1) * lengths[row] > budget:
            batches.append([])
        batches[-1].append(row)
    while len(batches) < at_least:
        batches.sort(key=len)
        longest = batches.pop()
        middle = len(longest) // 2
        batches += [longest[:middle], longest[middle:]]
    return batches


def agree_on_micro_batches(lengths, rows, budget, spare=(), fewest=0):
    """micro_batches, as many on every rank, `fewest` at least, as even as they get and the shortest
    rows first. A collective.

    FSDP2 gathers the weights from all ranks in every forward, and a rank with one forward less
    would leave the others waiting. So a rank with fewer rows than lists takes the shortest `spare`
    rows in addition; rows and spare together are enough where all ranks have as many. Ranks also
    wait for the slowest in each micro-batch: like should run beside like."""
    most = max_over_ranks(max(fewest, len(micro_batches(lengths, rows, budget))))
    missing = max(0, most - len(rows))
    rows = [*rows, *sorted(spare, key=lambda row: lengths[row])[:missing]]
    return even_micro_batches(lengths, rows, budget, most)


def even_micro_batches(lengths, rows, budget, number):
    """So many micro_batches, as even as they get, the shortest rows first; by the budget there may
    be fewer, but not more."""
    budget = smallest_budget(lengths, rows, budget, number)
    batches = micro_batches(lengths, rows, budget, at_least=number)
    return sorted(batches, key=lambda batch: max(lengths[row] for row in batch))


def smallest_budget(lengths, rows, budget, most):
    """The smallest with which micro_batches needs `most` lists or fewer, as `budget` does."""
    low = 0
    while low < budget:
        middle = (low + budget) // 2
        if len(micro_batches(lengths, rows, middle)) <= most:
            budget = middle
        else:
            low = middle + 1
    return budget


@dataclass
class Split:
    """How the rows of this rank's batch run: one entry per update in the first two."""

    rows: list  # all rows of each update: they count in its denominators
    micro_batches: list  # the lists of rows that each update runs, as many on every rank
    left_out: list  # lists of rows that no update runs

    def all_micro_batches(self):
        """Every row. Those that fill up a list of left_out stand in their update's, too, after it:
        so what batch_statistics keeps of them is of the list that the update runs."""
        return self.left_out + [rows for update in self.micro_batches for rows in update]


def split_batch(batch, budget, updates):
    """The Split of a batch into micro-batches of at most `budget` padded tokens. A collective.

    Where the method takes nothing from a row (batch["to_run"]), an update leaves it out, but for
    fillers where ranks have unlike numbers of others, and for one if no rank has any other."""
    lengths = batch["lengths"].tolist()
    to_run = batch["to_run"].tolist()
    share = len(lengths) // updates
    rows = [list(range(start, start + share)) for start in range(0, len(lengths), share)]
    split = Split(rows, [], [])
    for of_update in rows:
        wanted = [row for row in of_update if to_run[row]]
        spare = [row for row in of_update if not to_run[row]]
        lists = agree_on_micro_batches(lengths, wanted, budget, spare, fewest=1)
        split.micro_batches.append(lists)
    run = {row for lists in split.micro_batches for rows in lists for row in rows}
    others = [row for row in range(len(lengths)) if row not in run]
    split.left_out = agree_on_micro_batches(lengths, others, budget, spare=run)
    return split


def padding_metrics(lengths, split):
    """What padding and waiting cost in the updates, and how many answers they leave out: {metric:
    float} over all ranks. A collective.

    lengths: tokens of each row. The imbalance is that of ranks in lock-step, as under FSDP2: in
    every micro-batch all wait for the rank of most padded tokens. DDP waits once per update."""
    lists = [rows for update in split.micro_batches for rows in update]
    padded = [len(rows) * max(lengths[row] for row in rows) for rows in lists]
    padded = torch.tensor(padded, dtype=torch.float64)  # as many on every rank
    slowest = padded.clone()
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    in_all = sum_over_ranks(padded).sum()
    run = [lengths[row] for rows in lists for row in rows]
    tokens, answers_run, answers = sum_over_ranks(torch.tensor([sum(run), len(run), len(lengths)]))
    return {
        "time/left_out_frac": float(1 - answers_run / answers),
        "time/padding_frac": float(1 - tokens / in_all),
        "time/imbalance": float(slowest.sum() * dist.get_world_size() / in_all),
    }


# ---- statistics of a batch -----------------------------------------------------------------------


def response_statistics(policy, batch, rows, wanted):
    """The wanted entropy.STATISTICS of some rows of a batch, {name: (b, t)}, with gradient; t: the
    longest response of these rows."""
    mask = batch["response_mask"][rows]
    longest_response = mask.sum(1).max()
    longest = batch["lengths"][rows].max()
    ids = batch["ids"][rows, :longest]
    return policy(ids, batch["prompt_lens"][rows], mask[:, :longest_response], wanted)


@torch.no_grad()
def batch_statistics(policy, batch, wanted, micro_batches):
    """The wanted entropy.STATISTICS of the whole batch, {name: (B, T)}, without gradient.

    micro_batches: of Split. They are those of the updates: the same rows in one forward give the
    same rounding, so that the first update sees a ratio of exactly 1. With another split KL-Cov's
    sign(log r) would act on rounding errors."""
    shape = batch["response_mask"].shape
    found = {name: torch.zeros(shape, device=batch["ids"].device) for name in wanted}
    for rows in micro_batches:
        for name, values in response_statistics(policy, batch, rows, wanted).items():
            found[name][rows, : values.shape[1]] = values
    return found


@torch.no_grad()
def entropy_after(policy, batch, old, cfg):
    """What the updates did to the entropy on the batch's own contexts: the mean of H after - H
    before, in nats per token over all ranks, before being old["token_entropy"] (B, T).

    It reads each group's first answer only: a forward of 1/G of the batch. These are other
    micro-batches than before the updates, so in bfloat16 the difference holds rounding, too."""
    entropy_before = old["token_entropy"]
    lengths = batch["lengths"].tolist()
    is_first = batch["place"] % cfg.group_size == 0
    first = is_first.nonzero().flatten().tolist()
    others = (~is_first).nonzero().flatten().tolist()
    sums = torch.zeros(2, dtype=torch.float64, device=entropy_before.device)
    for rows in agree_on_micro_batches(lengths, first, cfg.micro_batch_tokens, spare=others):
        after = response_statistics(policy, batch, rows, ["token_entropy"])["token_entropy"]
        width = after.shape[1]
        mask = batch["response_mask"][rows, :width] & is_first[rows, None]
        change = (after - entropy_before[rows, :width])[mask].double()
        sums += torch.stack([change.sum(), mask.sum().double()])
    change, tokens = sum_over_ranks(sums).tolist()
    return change / tokens
