"""Which architectures of transformers train here: a tiny random model of each goes through two
steps of train.py.

    python -m experiments.architectures                  writes experiments/results/architectures.md
    python -m experiments.architectures llama mamba2     prints what happens to these

A step samples with the torch engine, with the cache that the architecture has, and scores the same
tokens with the trainer in one forward without a cache. Prompts have different lengths, so they are
padded on the left. Step 2 does it with the weights of the first update. Whatever the architecture
does that only one of the two sides does, shows in rollout/mismatch_mean: for instance logits that
are changed after the head, or recurrent states that padding runs through.
"""

import json
import re
import sys
import tempfile
import textwrap
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

import tiny
import train
from diagnose import read_metrics

PAGE = Path(__file__).parent / "results" / "architectures.md"
RIGHT = 1e-4  # nats per token: the largest mean mismatch that counts as rounding in float32

# ---- tiny models ---------------------------------------------------------------------------------

SMALL = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.2,
    tie_word_embeddings=False,
)
TWO_KINDS = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=8, head_dim=8)
EXPERTS = dict(
    num_experts=4,
    n_routed_experts=4,
    num_local_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
    n_group=1,
    topk_group=1,
    head_dim=8,
)
LATENT = EXPERTS | dict(
    num_key_value_heads=4,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
    first_k_dense_replace=1,
)
DELTA = dict(  # gated delta net
    layer_types=["linear_attention", "full_attention"],
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    head_dim=8,
)
MAMBA_2 = dict(
    mamba_n_heads=8,
    mamba_d_head=8,
    mamba_d_state=8,
    mamba_n_groups=1,
    mamba_d_ssm=64,
    mamba_chunk_size=8,
)
GEMMA_4 = TWO_KINDS | dict(
    vocab_size_per_layer_input=32,
    hidden_size_per_layer_input=8,
    global_head_dim=16,
    num_kv_shared_layers=0,
    final_logit_softcapping=3.0,
)
EYES = dict(
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=8,
    image_size=16,
    patch_size=8,
)
# Ids of images and sounds lie beyond the tiny vocabulary.
MEDIA = dict(image_token_id=90, boi_token_id=91, eoi_token_id=92, audio_token_id=93)


def sees(text, eyes=EYES, **more):
    """A composite configuration: settings of the text model stand in text_config."""
    text_config = SMALL | text | dict(vocab_size=32)
    return dict(text_config=text_config, vision_config=eyes, **more)


FAMILIES = {  # model_type: its settings beside SMALL
    "afmoe": EXPERTS,
    "apertus": {},
    "bamba": MAMBA_2 | dict(attn_layer_indices=[1]),
    "bert": {},
    "biogpt": {},
    "bloom": {},
    "codegen": dict(rotary_dim=8),
    "cohere": dict(logit_scale=0.25),
    "cohere2": TWO_KINDS | dict(logit_scale=0.25),
    "ctrl": dict(dff=32),
    "deepseek_v2": LATENT | dict(topk_method="greedy"),
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT | dict(index_n_heads=2, index_head_dim=16, index_topk=8),
    "ernie4_5": dict(head_dim=8),
    "exaone4": dict(head_dim=8),
    "falcon": {},
    "falcon_h1": MAMBA_2 | dict(lm_head_multiplier=0.5),
    "falcon_mamba": dict(state_size=8),
    "gemma": dict(head_dim=8),
    "gemma2": TWO_KINDS | dict(final_logit_softcapping=3.0),
    "gemma3_text": TWO_KINDS,
    "gemma3": sees(TWO_KINDS, mm_tokens_per_image=4),
    "gemma4_text": GEMMA_4,
    "gemma4": sees(GEMMA_4, audio_config=None, **MEDIA),
    "glm": dict(head_dim=8),
    "glm4": dict(head_dim=8),
    "glm4_moe": EXPERTS,
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": dict(num_layers=2, attention_types=[[["global", "local"], 1]]),
    "gpt_neox": {},
    "gpt_oss": EXPERTS | TWO_KINDS,
    "gptj": dict(rotary_dim=8),
    "granite": dict(logits_scaling=4.0),
    "granitemoe": dict(logits_scaling=4.0),
    "granitemoehybrid": MAMBA_2
    | dict(layer_types=["mamba", "attention"], shared_intermediate_size=32),
    "hunyuan_v1_dense": dict(head_dim=8),
    "jamba": dict(num_experts=2, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False),
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "llama": {},
    "llama4_text": EXPERTS | dict(intermediate_size_mlp=32, num_experts_per_tok=1),
    "llama4": sees(EXPERTS | dict(intermediate_size_mlp=32, num_experts_per_tok=1)),
    "longcat_flash": LATENT
    | dict(
        num_layers=2,
        ffn_hidden_size=32,
        expert_ffn_hidden_size=16,
        zero_expert_num=2,
        moe_topk=2,
    ),
    "mamba": dict(state_size=8),
    "mamba2": dict(num_heads=4, head_dim=16, state_size=8, n_groups=1, chunk_size=8),
    "minimax": {},
    "ministral": TWO_KINDS,
    "mistral": dict(sliding_window=8),
    "mixtral": {},
    "modernbert-decoder": {},
    "mpt": {},
    "nanochat": dict(final_logit_softcapping=3.0),
    "nemotron": {},
    "nemotron_h": dict(
        layer_types=["mamba", "attention", "mlp", "mamba"],
        num_hidden_layers=4,
        mamba_num_heads=8,
        mamba_head_dim=8,
        ssm_state_size=8,
        n_groups=1,
        chunk_size=8,
        head_dim=8,
    ),
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "olmoe": dict(num_experts=4, num_experts_per_tok=2),
    "openai-gpt": {},
    "opt": dict(ffn_dim=32),
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phimoe": {},
    "qwen2": {},
    "qwen2_moe": EXPERTS,
    "qwen3": dict(head_dim=8),
    "qwen3_moe": EXPERTS,
    "qwen3_next": EXPERTS | DELTA,
    "qwen3_5_text": DELTA,
    "qwen3_5": sees(DELTA, dict(depth=1, hidden_size=16, num_heads=2, out_hidden_size=32)),
    "recurrent_gemma": dict(num_hidden_layers=3, lru_width=32),
    "rwkv": {},
    "seed_oss": dict(head_dim=8),
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
    "xglm": dict(ffn_dim=32),
    "xlstm": dict(num_heads=4),
    "zamba2": dict(
        num_hidden_layers=4,
        layer_types=["linear_attention", "hybrid"] * 2,
        hybrid_layer_ids=[1, 3],
        mamba_ngroups=1,
        n_mamba_heads=8,
        mamba_d_state=8,
        mamba_headdim=8,
        chunk_size=8,
    ),
}


def tiny_model(model_type):
    """A random model of that architecture."""
    tokenizer = tiny.make_tokenizer()
    settings = FAMILIES[model_type]
    if "text_config" not in settings:
        settings = SMALL | settings | dict(vocab_size=32)
    ids = dict(bos_token_id=0, eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    config = AutoConfig.for_model(model_type, **settings, **ids)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # some draw a twentieth of that, and their logits say nothing
                parameter.normal_(0.0, 0.2)
    return model


# ---- two steps of training -----------------------------------------------------------------------


def write_problems(path):
    """Eight problems, whose prompts have 6 to 20 tokens."""
    rows = []
    for i in range(1, 9):
        numbers = [i] * (1 + i % 4 * 3)
        prompt = " ".join(map(str, numbers)) + f"={sum(numbers)}:"
        gold = {"numbers": numbers, "target": sum(numbers)}
        message = {"role": "user", "content": prompt}
        row = {"prompt": [message], "reward_model": {"ground_truth": gold}}
        rows.append(json.dumps(row) + "\n")
    path.write_text("".join(rows))


def words_for(model_type, folder, *more):
    """Writes a tiny model of that architecture and problems into the folder. Returns the words of
    the command line for two steps of training."""
    model = tiny_model(model_type)
    path = Path(folder, f"{model_type}-model")
    model.save_pretrained(path)
    tiny.make_tokenizer().save_pretrained(path)
    write_problems(Path(folder, "problems.jsonl"))
    words = (
        f"--model {path} --data {folder}/problems.jsonl --out {folder} --name {model_type}"
        " --method w_reinforce --engine torch --dtype float32 --steps 2 --lr 1e-3"
        " --prompts_per_step 8 --group_size 4 --updates_per_rollout 1 --warmup_updates 0"
        " --max_prompt_len 32 --max_response_len 12 --save_every 2"
    )
    return [*words.split(), *more]


def train_two_steps(model_type, folder, *more):
    """Two steps of train.py on a tiny model of that architecture, in this process.

    Returns the larger of both steps' rollout/mismatch_mean and "", or None and the line with which
    train.py refuses."""
    words = words_for(model_type, folder, *more)
    stderr = StringIO()
    try:
        with redirect_stderr(stderr), redirect_stdout(StringIO()):
            train.main(words)
    except SystemExit as end:
        refusals = re.findall(r"train\.py: error: (.*)", stderr.getvalue())
        if end.code != 2 or len(refusals) != 1:
            raise
        return None, refusals[0].strip()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    rows = read_metrics(Path(folder, model_type))
    assert all(row["train/skipped"] == 0 and row["train/grad_norm"] > 0 for row in rows)
    return max(row["rollout/mismatch_mean"] for row in rows), ""


# ---- the page ------------------------------------------------------------------------------------


def outcome(mismatch, refusal):
    """What the page says of an architecture: "runs", or why not."""
    if refusal:
        # How many nats it is, is a matter of these random weights.
        return re.sub(r"differ by \S+ nats per token", "differ", refusal)
    if mismatch < RIGHT:
        return "runs"
    return f"differs by more than {RIGHT:g} nats per token"


def outcomes_of(names):
    """{model_type: outcome} of each in turn; prints a line for each, with the number."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            mismatch, refusal = train_two_steps(name, folder)
            found[name] = outcome(mismatch, refusal)
            print(f"{name:20} {refusal or f'{mismatch:.1e} nats per token'}", flush=True)
    return found


def page(outcomes):
    """The text of architectures.md. outcomes: {model_type: outcome}."""
    runs = [name for name, said in outcomes.items() if said == "runs"]
    lines = [
        "# Which architectures train",
        "",
        "Written by `python -m experiments.architectures`, with transformers "
        f"{transformers.__version__}. A tiny random model of each architecture goes",
        "through two steps of `train.py --engine torch` in float32, and the trainer's log-probs of "
        "the sampled tokens are compared with",
        "the engine's: the same tokens, sampled with a cache and left padding, scored in one "
        "forward without. `model_type` is the",
        "word in a model's config.json.",
        "",
        f"{len(runs)} of {len(outcomes)} agree to {RIGHT:g} nats per token, before and after an "
        "update:",
        "",
        textwrap.fill(", ".join(f"`{name}`" for name in runs) + ".", 120),
        "",
        "The others end with one line before the first update:",
        "",
        "|`model_type`|`train.py: error:`|",
        "|---|---|",
    ]
    for name, said in outcomes.items():
        if said != "runs":
            lines.append(f"|`{name}`|{said}|")
    lines += [
        "",
        "`--parallel fsdp` trains those that lack a gradient. Of what is not listed here, the "
        "first step says whether it is scored right.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    found = outcomes_of(sys.argv[1:] or FAMILIES)
    if not sys.argv[1:]:
        PAGE.write_text(page(found))
        print(PAGE)
