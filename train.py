"""Train a language model with verifiable rewards and any of the METHODS of losses.py, and watch its
entropy.

A step: 1 sample answers from the current policy and verify them - 2 centre and scale the rewards
within each group, and deal the answers evenly over the ranks - 3 old_log_probs, the mismatch to
the engine's - 4 updates_per_rollout optimizer steps, without the answers that give no gradient -
5 push the weights - 6 log, evaluate, checkpoint.

Differs from GRPO as published: no KL to a reference (see kl_loss), and the mean is over all tokens
instead of over each answer first.

Shapes: P prompts a step over all ranks, G answers each, B answers on this rank, T response tokens
of the longest.

main(), at the end, is the story; what stands before it are the flags and the parts that it uses.
"""

# rollout.py comes first: it sets variables that are read when torch is imported.
from rollout import prepare_environment

prepare_environment()  # RANK ... for plain python, vLLM's variables

import argparse
import atexit
import difflib
import inspect
import math
import os
import re
import signal
import sys
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, HfArgumentParser

import tiny
from data import first_prompt, load_problems, render_all, turn_ends
from entropy import NEEDED_STATISTICS, STATISTICS, entropy_metrics, sums_by_name
from losses import (
    CONTROLLERS,
    IDLE_WITH_ONE_UPDATE,
    MASKS,
    METHODS,
    NOTHING_AT_ZERO_ADVANTAGE,
    group_advantages,
    k3,
    log_ratio,
    scale_gradient,
    token_mean,
)
from memory import card_memory, model_size, plan_memory
from policy import (
    adapters_off,
    batch_statistics,
    build_policy,
    check_gradients,
    entropy_after,
    full_tensors,
    load_adapters,
    max_over_ranks,
    padding_metrics,
    response_statistics,
    split_batch,
    sum_over_ranks,
    whole_tensor,
)
from record import (
    GIB,
    RunLog,
    check_folder,
    checkpoints,
    dry_run,
    load_checkpoint,
    record_answers,
    save_checkpoint,
)
from rollout import (
    BATCH_EDITS,
    answer_metrics,
    check_mismatch,
    collate,
    deal_over_ranks,
    evaluate,
    make_engine,
    mismatch_metrics,
    resolve_engine,
    sample_batch,
    verdict_metrics,
)
from verify import RULES

# ---- configuration: every field is a flag --------------------------------------------------------


class AddUp(argparse.Action):
    """A list flag that is given twice adds up: `--data a --data b` is `--data a b`. The word none
    takes back what stood before it, so that a script's sets can be turned off."""

    def __call__(self, parser, namespace, values, option_string=None):
        before = getattr(namespace, self.dest)
        if before is self.default or values == ["none"]:
            before = []
        setattr(namespace, self.dest, before + values)


def flag(default, help):
    metadata = {"help": help}
    if isinstance(default, list):
        metadata["action"] = AddUp
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Data:
    _argument_group_name = "policy and data"
    model: str = flag(
        "tiny",
        "Hugging Face folder or hub name; tiny, tiny-mini, tiny-small: of tiny.py, with its "
        "settings",
    )
    data: list[str] = flag(
        ["countdown"],
        "training problems: .jsonl, .json, .parquet, hub names; countdown: those of tiny.py",
    )
    rule: str = flag(
        "", "rule of verify.RULES that rewards answers; if empty: by the data's columns"
    )
    num_prompts: int = flag(
        0, "train on so many of the problems, nested subsets by --seed (0: all)"
    )
    max_prompt_len: int = flag(2048, "longest prompt in tokens; a longer one is an error")
    max_response_len: int = flag(8192, "longest response in tokens; a longer one is cut: truncated")


@dataclass
class Method:
    _argument_group_name = "method"
    method: str = flag("grpo", ", ".join(METHODS))
    knobs: list[str] = flag([], "settings of the method, as in --knobs cov_frac=2e-2 cov_low=0.5")
    prompts_per_step: int = flag(256, "P, prompts of a rollout batch, over all ranks")
    group_size: int = flag(8, "G, answers per prompt")
    updates_per_rollout: int = flag(8, "optimizer steps per rollout batch")
    temperature: float = flag(1.0, "of sampling and of every log-prob")
    adv_norm: str = flag("std", "std: advantages divided by their group's std; none: Dr. GRPO")
    dynamic_sampling: bool = flag(False, "drop groups without variance, sample others instead")
    max_resample: int = flag(4, "with --dynamic_sampling: further rounds at most")
    tis_cap: float = flag(
        0.0, "cap of the truncated importance weight for the engine mismatch (0: off)"
    )


@dataclass
class Training:
    _argument_group_name = "training and hardware"
    steps: int = flag(300, "rollout batches; 0: evaluate only")
    lr: float = flag(1e-6, "AdamW's learning rate, constant after the warm-up")
    warmup_updates: int = flag(10, "optimizer steps of linear warm-up")
    weight_decay: float = flag(0.0, "AdamW's weight decay")
    grad_clip: float = flag(1.0, "largest gradient norm")
    lora_rank: int = flag(
        0, "train LoRA adapters of this rank; the base is frozen in --dtype (0: train all weights)"
    )
    lora_alpha: float = flag(
        32.0, "adapters count alpha / rank times; they want about ten times the --lr of all weights"
    )
    parallel: str = flag(
        "ddp",
        "ddp, or fsdp: weights, gradients and optimizer sharded (FSDP2); on GPUs fsdp by default",
    )
    dtype: str = flag(
        "auto",
        "compute in bfloat16 or float32; auto: bfloat16 on GPUs, where float32 has no fast "
        "attention. Master weights are float32",
    )
    micro_batch_tokens: int = flag(
        16384, "padded tokens per forward: memory and speed; same gradient (but see README)"
    )
    activation_checkpointing: bool = flag(
        False,
        "recompute layers in backward: less memory, more time; on GPUs by default, false turns it "
        "off",
    )
    engine: str = flag("auto", "vllm, torch; auto: vllm where a GPU and vllm are present")
    rollout_tp: int = flag(1, "ranks per vllm engine (tensor parallel)")
    rollout_gpu_memory: float = flag(
        0.0, "vllm's share of each GPU's memory (0: what the trainer leaves, see --dry_run)"
    )


@dataclass
class Run:
    _argument_group_name = "evaluation and run"
    eval_data: list[str] = flag([], "test problems, as --data; none: no evaluation")
    eval_every: int = flag(
        20, "steps between evaluations; also before the first step and after the last"
    )
    eval_prompts: int = flag(0, "the first so many problems of each set (0: all)")
    eval_samples: int = flag(8, "answers per problem, for pass@1, 2, 4 ...")
    eval_temperature: float = flag(1.0, "their temperature")
    name: str = flag("", "folder of the run; if empty: METHOD-MODEL-seedSEED")
    out: str = flag("runs", "folder of all runs")
    seed: int = flag(0, "of data order, sampling, random selections")
    save_every: int = flag(50, "steps between checkpoints; the last step always")
    keep_checkpoints: int = flag(2, "the newest so many are kept, and the best of the evaluated")
    record_step: int = flag(
        0, "write the answers that this step learns from to step-N-rank-R.jsonl (0: none)"
    )
    resume: bool = flag(False, "go on from the run's last complete checkpoint")
    overwrite: bool = flag(False, "delete an earlier run of that name")
    dry_run: bool = flag(
        False, "print the plan, three prompts and verdicts on their gold answers, then exit"
    )
    log_to: str = flag("", "tensorboard or wandb, beside metrics.jsonl")
    trust_remote_code: bool = flag(False, "run Python code that comes with the model")


# Defaults where there are GPUs, a single one too: DDP holds the gradients all the time, and its
# autocast differs more from the engine's bfloat16 than FSDP2's does.
ON_GPUS = {"parallel": "fsdp", "activation_checkpointing": True}

CHOICES = {
    "parallel": ("ddp", "fsdp"),
    "dtype": ("auto", "float32", "bfloat16"),
    "adv_norm": ("std", "none"),
    "log_to": ("", "tensorboard", "wandb"),
}
MAY_BE_ZERO = {
    "num_prompts",
    "max_resample",
    "tis_cap",
    "steps",
    "warmup_updates",
    "weight_decay",
    "lora_rank",
    "eval_prompts",
    "seed",
    "record_step",
    "rollout_gpu_memory",
}
AT_MOST_ONE = {"rollout_gpu_memory"}
MAY_BE_EMPTY = {"rule", "name", "log_to"}
INCOMPATIBLE = {  # (method, flag): why they do not go together
    ("w_reinforce", "dynamic_sampling"): (
        "it has no baseline, so equal rewards do teach; leave the flag out"
    ),
    ("w_reinforce", "adv_norm"): (
        "it uses no group advantages, so there is nothing to normalise; leave the flag out"
    ),
    ("aepo", "tis_cap"): (
        "some of its answers come from another temperature on purpose, which the weight would "
        "undo; leave the flag out"
    ),
    ("gspo", "tis_cap"): (
        "its ratio is the sequence's, and weights per token would change it; leave the flag out"
    ),
}


class OneLine(argparse.ArgumentDefaultsHelpFormatter):
    """--help, a line for each flag."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=28, width=150)

    def _format_action_invocation(self, action):
        return action.option_strings[0]


def parse(argv):
    """The command line as one checked namespace; ValueError with one clear line on bad input."""
    parser = HfArgumentParser(
        [Data, Method, Training, Run],
        usage="train.py --method METHOD [options]",
        description=" ".join(__doc__.partition("\n\n")[0].split())
        + " Defaults are shown for this machine and the --model given.",
        formatter_class=OneLine,
        allow_abbrev=False,
    )
    parser.error = refuse
    without_help = [word for word in argv if word not in ("-h", "--help")]
    given = parser.parse_known_args(without_help)[0]
    model = given.model
    if model in tiny.SIZES:
        parser.set_defaults(**tiny.DEFAULTS)
    if torch.cuda.is_available() and given.steps:  # an evaluation keeps the policy on the CPU
        parser.set_defaults(**ON_GPUS)
    cfg, unknown = parser.parse_known_args(argv)
    if unknown:
        word = unknown[0].partition("=")[0]
        near = difflib.get_close_matches(word.lstrip("-"), vars(cfg), 1)  # -- makes all alike
        hint = f"did you mean --{near[0]}? " if near and word.startswith("-") else ""
        raise ValueError(f"{unknown[0]}: there is no such flag; {hint}--help lists all")
    expand_home(cfg)
    if model in tiny.SIZES:
        cfg.knobs = tiny.KNOBS.get(cfg.method, []) + cfg.knobs
    parse_knobs(cfg.method, cfg.knobs)
    for (method, name), why in INCOMPATIBLE.items():
        if method == cfg.method and getattr(cfg, name) != parser.get_default(name):
            raise ValueError(f"--method {method} with --{name}: {why}")
    check_values(cfg)
    cfg.engine = resolve_engine(cfg.engine, cfg.rollout_tp)
    cfg.name = cfg.name.strip() or default_name(cfg)
    is_one_folder = Path(cfg.name).name == cfg.name and cfg.name.isprintable()
    if not is_one_folder or cfg.name.startswith((".", "~")):
        raise ValueError(
            f"--name {cfg.name}: one folder's name is expected; --out says where it goes"
        )
    check_folder(cfg)
    return cfg


def refuse(message):
    """In place of argparse's, which prints its usage on every rank."""
    raise ValueError(message)


def expand_home(cfg):
    """~ is the home folder in flags that name files; a shell leaves it in `--out=~/x`."""
    cfg.model = os.path.expanduser(cfg.model)
    cfg.out = os.path.expanduser(cfg.out)
    cfg.data = [os.path.expanduser(name) for name in cfg.data]
    cfg.eval_data = [os.path.expanduser(name) for name in cfg.eval_data]


def check_values(cfg):
    """ValueError for a value that no run can have."""
    for name, value in vars(cfg).items():
        if type(value) in (int, float):
            check_number(name, value)
        elif isinstance(value, list):
            check_words(name, value)
        elif isinstance(value, str) and not value.strip() and name not in MAY_BE_EMPTY:
            raise ValueError(f"--{name} is empty; give a value, or leave the flag out")
    for name, choices in (CHOICES | {"rule": ("", *RULES)}).items():
        value = getattr(cfg, name)
        if value not in choices:
            listed = ", ".join(filter(None, choices))
            raise ValueError(f"--{name} {value}: choose from {listed}")
    ranks = int(os.environ["WORLD_SIZE"])
    if cfg.steps and cfg.prompts_per_step % (ranks * cfg.updates_per_rollout):
        raise ValueError(
            f"--prompts_per_step {cfg.prompts_per_step} must be a multiple of {ranks} (ranks) x "
            f"{cfg.updates_per_rollout} (--updates_per_rollout)"
        )
    if cfg.steps and "none" in cfg.data:
        raise ValueError("--data none: training needs problems; --steps 0 only evaluates")
    if 0 < cfg.steps < cfg.record_step:
        raise ValueError(
            f"--record_step {cfg.record_step} is after the last of --steps {cfg.steps}"
        )
    if cfg.resume and cfg.overwrite:
        raise ValueError("--resume goes on with a run and --overwrite deletes it: choose one")
    if cfg.seed * cfg.group_size >= 2**28:
        raise ValueError("--seed x --group_size must stay below 2^28")
    if cfg.dynamic_sampling and cfg.group_size == 1:
        raise ValueError("--dynamic_sampling needs groups of 2 or more")
    if cfg.lora_rank and not find_spec("peft"):
        raise ValueError("--lora_rank needs the package peft: run `pip install peft`")


def check_number(name, value):
    if isinstance(value, float) and not abs(value) <= torch.finfo(torch.float32).max:
        raise ValueError(f"--{name} {value}: a finite number is expected")
    if value < 0 and name in MAY_BE_ZERO:
        raise ValueError(f"--{name} {value}: it must be 0 or more")
    if value <= 0 and name not in MAY_BE_ZERO:
        raise ValueError(f"--{name} {value}: it must be positive")
    if value > 1 and name in AT_MOST_ONE:
        raise ValueError(f"--{name} {value}: a fraction in (0, 1] is expected")


def check_words(name, words):
    for word in words:
        if not word.strip():
            raise ValueError(f"--{name} holds an empty word; give a value, or leave the flag out")
        if "," in word and not os.path.exists(word):
            raise ValueError(f"--{name} {word}: several are separated by spaces, not by commas")


def default_name(cfg):
    """METHOD-MODEL-seedSEED; of a checkpoint the run's name, too."""
    parts = Path(cfg.model).parts
    is_checkpoint = parts[-1:] and parts[-1].startswith("checkpoint-")
    model = "-".join(parts[-2:] if is_checkpoint else parts[-1:])
    what = cfg.method if cfg.steps else "eval"
    return f"{what}-{model}-seed{cfg.seed}"


@contextmanager
def clear_errors():
    """Bad input: one line per node, exit code 2 on every rank, before anything slow."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        if os.environ["LOCAL_RANK"] == "0":
            one_line = " ".join(str(error).split())
            tqdm.write(f"train.py: error: {one_line}", file=sys.stderr)  # not beside a bar
        raise SystemExit(2) from None


# ---- knobs: the settings of a method -------------------------------------------------------------
# A method's function in losses.py says all: keyword arguments without a default are tensors that it
# wants, those with one are its knobs. Its controller and its mask, if it has them, have knobs of
# their own.


def keyword_arguments(function):
    parameters = inspect.signature(function).parameters.values()
    return [parameter for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]


def wanted_tensors(method):
    """Names of the further tensors that a method takes."""
    arguments = keyword_arguments(METHODS[method])
    return [argument.name for argument in arguments if argument.default is argument.empty]


def needed_statistics(method):
    """Names of the entropy.STATISTICS that a step needs of the policy that sampled, and of a frozen
    reference: two lists. A method that wants old_token_entropy needs the former's token_entropy."""
    old_names = set(NEEDED_STATISTICS)
    ref_names = []
    for name in wanted_tensors(method):
        if name.startswith("old_"):
            old_names.add(name.removeprefix("old_"))
        elif name.startswith("ref_"):
            ref_names.append(name.removeprefix("ref_"))
    return sorted(old_names), ref_names


def default_knobs(function):
    """{name: default} of the knobs of a loss, of a controller's rule or of a mask; None has
    none."""
    if function is None:
        return {}
    knobs = {}
    for argument in keyword_arguments(function):
        if argument.default is not argument.empty and argument.name != "num_tokens":
            knobs[argument.name] = argument.default
    return knobs


def with_state(loss_knobs, controller_state):
    """The knobs of a loss, those that its controller sets taken from the controller's state."""
    return {name: controller_state.get(name, value) for name, value in loss_knobs.items()}


def parse_knobs(method, settings):
    """["cov_frac=2e-2", ...] -> three dicts: the knobs of the loss, of its controller's rule and of
    its mask, with the defaults.

    Raises ValueError on an unknown method, an unknown knob (listing those that the method has) or a
    value that the method refuses: it is tried here, so that a typing error costs no model to be
    loaded."""
    if method not in METHODS:
        raise ValueError(f"--method {method} is unknown. Methods: {', '.join(sorted(METHODS))}")
    loss_knobs = default_knobs(METHODS[method])
    rule_knobs = default_knobs(CONTROLLERS.get(method))
    mask_knobs = default_knobs(MASKS.get(method))
    set_by_controller = example_state(method, rule_knobs)
    known = {name: value for name, value in loss_knobs.items() if name not in set_by_controller}
    known |= rule_knobs | mask_knobs
    for setting in settings:
        name, _, text = setting.partition("=")
        if "," in setting:
            raise ValueError(f"--knobs {setting}: several are separated by spaces, not by commas")
        if name not in known:
            listed = ", ".join(f"{knob}={default}" for knob, default in known.items())
            raise ValueError(
                f"--knobs {setting}: {method} has no knob '{name}'. It has: {listed or 'none'}"
            )
        value = read_knob(name, text, known[name])
        for knobs in (loss_knobs, rule_knobs, mask_knobs):
            if name in knobs:
                knobs[name] = value
    check_order(loss_knobs)
    try_on_two_tokens(method, loss_knobs, rule_knobs)
    return loss_knobs, rule_knobs, mask_knobs


# What a knob of this name may be in every method: above the first number, at most the second.
KNOB_RANGES = {
    "clip_low": (0, 1),  # more, as cispo's 10, is no bound at all
    "clip_high": (0, math.inf),
    "clip": (0, 1),
    "narrowest": (0, math.inf),
    "widest": (0, math.inf),
    "dual_clip": (1, math.inf),
    "kappa": (0, math.inf),
    "confident": (0, 1),
    "hot": (0, math.inf),
    "cold": (0, math.inf),
    "epochs": (0, math.inf),
}
NOT_NEGATIVE = {
    "target_entropy",
    "target_ratio",
    "delta",
    "max_coef",
    "rate",
    "most_rows",
    "mu",
    "alpha",
}
# The first of two knobs may not be larger than the second.
ORDERED = (("cov_low", "cov_high"), ("narrowest", "widest"), ("min_weight", "max_weight"))


def read_knob(name, text, default):
    """The value in `name=text`, of the default's type; dual_clip takes none too. It must lie in the
    knob's range; fractions lie in (0, 1]."""
    if isinstance(default, str):
        return text
    if text == "none" and name == "dual_clip":
        return None
    setting = f"{name}={text}"
    is_integer = type(default) is int
    try:
        value = int(text) if is_integer else float(text)
    except ValueError:
        kind = "whole number" if is_integer else "number"
        raise ValueError(f"--knobs {setting}: a {kind} is expected after '='") from None
    if not math.isfinite(value):
        raise ValueError(f"--knobs {setting}: a finite number is expected")
    if name.endswith("_frac") and not 0 < value <= 1:
        raise ValueError(f"--knobs {setting}: a fraction in (0, 1] is expected, not per cent")
    if name in NOT_NEGATIVE and value < 0:
        raise ValueError(f"--knobs {setting}: it must be 0 or more")
    low, high = KNOB_RANGES.get(name, (-math.inf, math.inf))
    high = max(high, default or 0)
    if not low < value <= high:
        at_most = f" and at most {high:g}" if high < math.inf else ""
        raise ValueError(f"--knobs {setting}: it must be above {low}{at_most}")
    return value


def check_order(knobs):
    for small, large in ORDERED:
        if small in knobs and knobs[small] > knobs[large]:
            raise ValueError(
                f"--knobs {small}={knobs[small]} {large}={knobs[large]}: the first is larger than "
                "the second"
            )


def example_state(method, rule_knobs):
    """A state of the method's controller, for its names; {} without one."""
    if method not in CONTROLLERS:
        return {}
    metrics = {"reward/mean": 0.5, "entropy/peak_mean": 1.0}
    return CONTROLLERS[method]({}, 1.0, 0.0, metrics, **rule_knobs)


def try_on_two_tokens(method, loss_knobs, rule_knobs):
    """Calls controller and loss once: they raise ValueError on a value that they refuse."""
    state = example_state(method, rule_knobs)
    two = torch.full((1, 2), -1.0)
    tensors = {name: two for name in wanted_tensors(method)}
    knobs = with_state(loss_knobs, state)
    METHODS[method](two, two, -two, two < 0, **tensors, **knobs)


# ---- set-up --------------------------------------------------------------------------------------


def load_sets(names, split, rule=""):
    """{name: problems} of several sets, by data.load_problems; the word countdown stands for
    tiny.py's problems of that split. rule: a key of verify.RULES, "" for the one that fits the
    data.

    A set's name is its file's, in letters, digits, _ . and - only, since files and metrics are
    named after it; a/train.jsonl and b/train.jsonl are train and train-2."""
    sets = {}
    for name in names:
        stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(name).stem)[:100]
        key = stem
        number = 2
        while key in sets:
            key = f"{stem}-{number}"
            number += 1
        if name == "countdown":
            sets[key] = countdown_problems(split, rule)
        else:
            sets[key] = load_problems(name, rule or None)
    return sets


def countdown_problems(split, rule):
    """tiny.py's problems of that split; rule: another one than theirs."""
    if rule == "math":
        raise ValueError("--rule math cannot judge countdown: its gold answers are no mathematics")
    problems = tiny.problems(split, tiny.PROBLEMS[split])
    if rule:
        problems = [replace(problem, rule=rule) for problem in problems]
    return problems


def load_data(cfg):
    """{name: problems} to train on, and to evaluate on."""
    train_names = cfg.data if cfg.steps else []
    eval_names = [name for name in cfg.eval_data if name != "none"]
    train_sets = load_sets(train_names, "train", cfg.rule)
    eval_sets = load_sets(eval_names, "test", cfg.rule)
    return train_sets, eval_sets


def check_model_name(cfg):
    """ValueError if there is no such model, or none that can be trained, before anything slow."""
    if cfg.model in tiny.SIZES:
        return
    if cfg.model.startswith((".", "/")) and not os.path.isdir(cfg.model):
        raise ValueError(f"--model {cfg.model}: no such folder")
    try:
        config = AutoConfig.from_pretrained(cfg.model, trust_remote_code=cfg.trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        why = str(error).replace("`trust_remote_code=True`", "--trust_remote_code")
        raise ValueError(f"--model {cfg.model}: {why}") from None
    quantized = getattr(config, "quantization_config", None)
    if quantized:
        how = dict(quantized).get("quant_method", "") if isinstance(quantized, dict) else ""
        raise ValueError(
            f"--model {cfg.model}: its weights are quantized ({how}), which cannot be trained; "
            "give the model that it was made from"
        )


def start_process_group(cfg):
    """This rank's device, and the dtype that it computes in."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cpu")
    if on_gpu:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    # A thread of gloo that still lets go of a tensor while Python ends would abort the process.
    atexit.register(time.sleep, 0.3)
    if cfg.dtype == "auto":
        dtype = torch.bfloat16 if on_gpu else torch.float32
    else:
        dtype = getattr(torch, cfg.dtype)
    return device, dtype


def base_model(cfg):
    """Folder or hub name of the model that training starts from."""
    if cfg.model not in tiny.SIZES:
        return cfg.model
    if dist.get_rank() == 0:
        tiny.base_model(size=cfg.model)  # made once; the other ranks wait, then find it
    dist.barrier()
    return tiny.base_model(size=cfg.model)


def load_tokenizer(base, cfg):
    """The tokenizer and the model's config; ValueError if answers may outgrow the model's
    positions."""
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=cfg.trust_remote_code)
    model_config = AutoConfig.from_pretrained(base, trust_remote_code=cfg.trust_remote_code)
    longest = cfg.max_prompt_len + cfg.max_response_len
    text_config = model_config.get_text_config()  # of a model that reads images, too
    positions = getattr(text_config, "max_position_embeddings", longest)
    if longest > positions:
        raise ValueError(
            f"--max_prompt_len + --max_response_len, {longest}, is more than the {positions} "
            f"positions of {base}"
        )
    return tokenizer, model_config


def render_sets(train_sets, eval_sets, tokenizer, cfg):
    """(problems, prompts) to train on, and {name: (problems, prompts)} to evaluate on; prompts are
    token ids."""
    to_train = render_all(train_sets, tokenizer, cfg.max_prompt_len, cfg.num_prompts, cfg.seed)
    to_evaluate = {}
    for name, problems in eval_sets.items():
        first = problems[: cfg.eval_prompts or None]
        to_evaluate[name] = render_all({name: first}, tokenizer, cfg.max_prompt_len)
    return to_train, to_evaluate


def check_token_ids(sets, model_config):
    """ValueError if a prompt of the sets [(problems, prompts), ...] holds a token that the model
    has no embedding for: on a GPU that ends in an assertion that names no cause."""
    rows = getattr(model_config.get_text_config(), "vocab_size", math.inf)
    largest = max((max(prompt) for _, prompts in sets for prompt in prompts), default=0)
    if largest >= rows:
        raise ValueError(
            f"the tokenizer writes token {largest}, but the model has only {rows}: is it the "
            "tokenizer of another model?"
        )


def first_state():
    """The counters of a run that begins. A checkpoint holds the same, and the optimizer's state."""
    return {
        "step": 0,  # the last one that is done
        "drawn": 0,  # problems, over all ranks
        "updates": 0,
        "controller": {},  # the state of the method's controller
        "last_update_metrics": {},  # means over the updates of the last step
    }


def make_optimizer(policy, cfg):
    on_gpu = next(policy.parameters()).is_cuda
    return torch.optim.AdamW(
        [parameter for parameter in policy.parameters() if parameter.requires_grad],
        lr=cfg.lr,
        weight_decay=cfg.weight_decay,
        betas=(0.9, 0.95),
        # Without it a step on a GPU needs one more copy of the weights.
        fused=True if on_gpu else None,
    )


def load_optimizer(policy, optimizer, state):
    """state: of a checkpoint, whole on every rank."""
    options = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(policy, optimizer, state, options=options)


def wrap_ddp(policy, cfg):
    """The policy as it is called in training; FSDP2 has wrapped its own, and an evaluation needs
    none."""
    if cfg.parallel == "fsdp" or not cfg.steps:
        return policy
    ddp_policy = DistributedDataParallel(policy, gradient_as_bucket_view=True)
    # Buffers never change. The argument that says so has one name in torch 2.11 and another in
    # 2.13, the attribute the same in both.
    ddp_policy.broadcast_buffers = False
    return ddp_policy


def plan_run(cfg, model_config, device, dtype, with_reference):
    """The model's size, and what the run takes of each GPU's memory: a ModelSize and a Plan.

    ValueError if GPUs are here and it cannot fit."""
    size = model_size(model_config, cfg.trust_remote_code, cfg.lora_rank)
    total = card_memory(device)
    plan = plan_memory(size, cfg, dist.get_world_size(), dtype, with_reference, total)
    if device.type == "cuda" and plan.misfit and not cfg.dry_run:
        raise ValueError(plan.misfit)
    return size, plan


def start_engine(base, policy, tokenizer, cfg, device, dtype, gpu_memory):
    """The engine, with the policy's weights. gpu_memory: vLLM's share of the GPU's."""
    ends = policy.model.generation_config.eos_token_id or []  # one id, or several for chat models
    if not isinstance(ends, list):
        ends = [ends]
    stop_ids = {tokenizer.eos_token_id, *ends, *turn_ends(tokenizer)} - {None}
    engine = make_engine(
        cfg.engine,
        base,
        dtype=dtype,
        device=device,
        stop_ids=stop_ids,
        max_model_len=cfg.max_prompt_len + cfg.max_response_len,
        tensor_parallel_size=cfg.rollout_tp,
        gpu_memory_utilization=gpu_memory,
        trust_remote_code=cfg.trust_remote_code,
    )
    engine.push_weights(full_tensors(policy.model))
    return engine


def warn_if_idle(run_log, cfg):
    if cfg.method in IDLE_WITH_ONE_UPDATE and cfg.updates_per_rollout == 1:
        cause = f"{cfg.method} with --updates_per_rollout 1"
        run_log.warn(cause, IDLE_WITH_ONE_UPDATE[cfg.method])


def note_sigterms():
    """A list to which every SIGTERM from now on adds an entry, instead of ending the program."""
    received = []

    def handler(number, frame):
        received.append(number)

    signal.signal(signal.SIGTERM, handler)
    return received


class Stopwatch:
    """What the stages of a step took, as metrics: "time/STAGE_s" and, on GPUs, "memory/STAGE_gib",
    the most that this rank's tensors took at once."""

    def __init__(self, device):
        self.on_gpu = device.type == "cuda"
        self.start = time.perf_counter()
        self.last = self.start
        self.metrics = Counter()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()

    def lap(self, stage):
        if self.on_gpu:
            torch.cuda.synchronize()  # or a stage would end while its kernels run
            self.metrics[f"memory/{stage}_gib"] = torch.cuda.max_memory_allocated() / GIB
            torch.cuda.reset_peak_memory_stats()
        now = time.perf_counter()
        self.metrics[f"time/{stage}_s"] = now - self.last
        self.metrics["time/step_s"] = now - self.start
        self.last = now

    def all_metrics(self, tokens):
        """These, and response tokens per second of the first three stages, of all ranks together;
        tokens: of the step."""
        found = dict(self.metrics)
        for stage in ("rollout", "score", "update"):
            found[f"time/{stage}_tokens_per_s"] = tokens / found[f"time/{stage}_s"]
        if self.on_gpu:
            found["memory/reserved_gib"] = torch.cuda.memory_reserved() / GIB
        for name in found:
            if name.startswith("memory/"):
                found[name] = max_over_ranks(found[name])
        return found


# ---- parts of a step -----------------------------------------------------------------------------


def make_batch(answers, advantages, device, cfg):
    """Stage 2: the answers as tensors, dealt over the ranks so that all have as much to do. Beside
    what rollout.collate makes, place (B,): see rollout.deal_over_ranks, and to_run (B,) bool: the
    answers from which the method learns."""
    to_run = answers_to_run(advantages, cfg)
    answers, advantages, place = deal_over_ranks(
        answers, advantages, to_run, cfg.updates_per_rollout
    )
    batch = collate(answers, advantages, device)
    batch["place"] = place.to(device)
    batch["to_run"] = answers_to_run(advantages, cfg).to(device)
    return batch


def answers_to_run(advantages, cfg):
    """The answers that the updates have to run, (B,) bool; advantages (B,)."""
    if cfg.method in NOTHING_AT_ZERO_ADVANTAGE:
        return advantages != 0
    return torch.ones_like(advantages, dtype=torch.bool)


def batch_entropy_metrics(batch, old, cfg):
    """Stage 3: what the sampled tokens say about the entropy."""
    return entropy_metrics(
        old,
        batch["advantages"],
        batch["response_mask"],
        batch["group_accuracy"],
        cfg.group_size,
        sum_over_ranks,
        batch["place"],
    )


def tokens_to_learn_from(batch, old, mask_knobs, cfg):
    """Stage 3: the response mask, (B, T) bool, without the tokens that the method leaves out."""
    response_mask = batch["response_mask"]
    if cfg.method not in MASKS:
        return response_mask
    leave_out = MASKS[cfg.method]
    return leave_out(old, batch["advantages"], response_mask, sum_over_ranks, **mask_knobs)


def fixed_tensors(batch, old, ref):
    """Stage 4: what a loss may ask for and what stays fixed during the updates, {name: (B, T)}."""
    names = ("advantages", "rewards", "group_accuracy", "rollout_log_probs")
    tensors = {name: batch[name] for name in names}
    tensors |= {f"old_{name}": values for name, values in old.items()}
    tensors |= {f"ref_{name}": values for name, values in ref.items()}
    return tensors


def update(ddp_policy, optimizer, batch, tensors, rows, micro_batches, knobs, cfg):
    """Stage 4: one optimizer step on some rows of the batch, of which the micro_batches run those
    that the method learns from: see policy.split_batch.

    tensors: {name: (B, T)}, all that stays fixed during the updates. Returns {metric: float} over
    all ranks, or None if loss or gradient were not finite and the step was not taken.

    The loss is a sum / num_tokens with the tokens of all micro-batches and ranks. So the gradient
    does not depend on how they are split, unless the method chooses among the tokens of a call."""
    loss_mask = batch["loss_mask"]
    run_mask = loss_mask & batch["to_run"][:, None]
    wanted = wanted_tensors(cfg.method)
    wanted_now = ["log_probs"] + [name for name in wanted if name in STATISTICS]
    of_update = [loss_mask[rows].sum(), loss_mask[rows].any(1).sum(), run_mask[rows].sum()]
    num_tokens, num_sequences, num_run = sum_over_ranks(torch.stack(of_update)).float()

    sums = {}
    for i, micro_rows in enumerate(micro_batches):
        # DDP exchanges gradients in the last backward only.
        postpone = cfg.parallel == "ddp" and i + 1 < len(micro_batches)
        with ddp_policy.no_sync() if postpone else nullcontext():
            now = response_statistics(ddp_policy, batch, micro_rows, wanted_now)
            log_probs = now["log_probs"]  # (b, t), with gradient
            width = log_probs.shape[1]
            mask = loss_mask[micro_rows, :width]
            fixed = {name: tensor[micro_rows, :width] for name, tensor in tensors.items()}
            old_log_probs = fixed["old_log_probs"]
            if cfg.tis_cap:
                mismatch = log_ratio(old_log_probs, fixed["rollout_log_probs"], mask)
                weight = mismatch.exp().clamp(max=cfg.tis_cap)
                log_probs = scale_gradient(log_probs, weight)
            available = now | fixed | {"num_sequences": num_sequences}
            loss, metrics = METHODS[cfg.method](
                log_probs,
                old_log_probs,
                fixed["advantages"],
                mask,
                **{name: available[name] for name in wanted},
                **knobs,
                num_tokens=num_tokens,
            )
            # DDP and FSDP2 average over ranks; the loss is a sum over them.
            (loss * dist.get_world_size()).backward()
        run = run_mask[micro_rows, :width]  # without fillers
        token_kl = k3(old_log_probs, log_probs.detach(), run)
        kl = token_mean(token_kl, run, num_run.clamp(min=1))
        metrics = {"train/loss": loss.detach(), "policy/kl_to_rollout": kl, **metrics}
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + value
    if cfg.parallel == "ddp":
        with clear_errors():
            check_gradients(ddp_policy)

    grad_norm = torch.nn.utils.clip_grad_norm_(ddp_policy.parameters(), cfg.grad_clip)
    metrics = sums_by_name(sums, sum_over_ranks)
    metrics["train/grad_norm"] = float(whole_tensor(grad_norm))
    finite = math.isfinite(metrics["train/grad_norm"]) and math.isfinite(metrics["train/loss"])
    if finite:
        optimizer.step()
    optimizer.zero_grad()
    return metrics if finite else None


def mean_metrics(updates):
    """Mean of each metric over the updates that were taken; {} if none was."""
    taken = [metrics for metrics in updates if metrics is not None]
    names = taken[0] if taken else ()
    return {name: sum(metrics[name] for metrics in taken) / len(taken) for name in names}


# ---- the program ---------------------------------------------------------------------------------


def main(argv=None):
    with clear_errors():  # bad input ends the program here, before anything slow
        cfg = parse(sys.argv[1:] if argv is None else argv)
        train_sets, eval_sets = load_data(cfg)
        check_model_name(cfg)
    loss_knobs, rule_knobs, mask_knobs = parse_knobs(cfg.method, cfg.knobs)
    old_names, ref_names = needed_statistics(cfg.method)
    device, dtype = start_process_group(cfg)
    rank = dist.get_rank()
    folder = Path(cfg.out, cfg.name)
    base = base_model(cfg)
    with clear_errors():
        tokenizer, model_config = load_tokenizer(base, cfg)
        (problems, prompts), eval_sets = render_sets(train_sets, eval_sets, tokenizer, cfg)
        check_token_ids([(problems, prompts), *eval_sets.values()], model_config)
        size, plan = plan_run(cfg, model_config, device, dtype, with_reference=bool(ref_names))
    if cfg.dry_run:
        shown = [(problems, prompts)] if cfg.steps else eval_sets.values()
        dry_run(cfg, size, tokenizer, shown, dtype, plan)
        return dist.destroy_process_group()

    # The weights, the optimizer and `state` are all that --resume needs.
    start = checkpoints(folder)[-1] if cfg.resume else None
    with clear_errors():
        state = load_checkpoint(start) if start else first_state()
        # A checkpoint's weights are merged; LoRA goes on from the base's and the adapters.
        weights = base if cfg.lora_rank else start or base
        policy = build_policy(weights, cfg, device, dtype)
    if start and cfg.lora_rank:
        load_adapters(policy.model, state.pop("adapters"))
    optimizer = make_optimizer(policy, cfg)
    if start:
        load_optimizer(policy, optimizer, state.pop("optimizer"))
    ddp_policy = wrap_ddp(policy, cfg)
    reference = None
    if ref_names and cfg.steps:
        reference = policy if cfg.lora_rank else build_policy(base, cfg, device, dtype)
    with clear_errors():
        engine = start_engine(base, policy, tokenizer, cfg, device, dtype, plan.share)

    with clear_errors():
        prompt = first_prompt(tokenizer, prompts, eval_sets)
        run_log = RunLog(folder, cfg, state["step"], rank, prompt)
    warn_if_idle(run_log, cfg)
    if plan.tight and device.type == "cuda":
        run_log.warn(plan.tight, "by arithmetic, which may be wrong; see --dry_run")
    if eval_sets and not start:
        metrics = run_log.evaluation(0, evaluate(engine, tokenizer, eval_sets, cfg))
        run_log.write({"step": 0} | metrics)
    sigterms = note_sigterms()  # before this line a SIGTERM just ends the program
    failures = 0
    interrupted = False

    first_step = state["step"] + 1
    for step in range(first_step, cfg.steps + 1):
        # What a method draws depends on seed, step and rank only: the same after --resume.
        torch.manual_seed(hash((cfg.seed, step, rank)) % 2**63)
        watch = Stopwatch(device)

        # ---- 1 sample answers and verify them
        answers, verdicts, state["drawn"] = sample_batch(
            engine, tokenizer, problems, prompts, state["drawn"], cfg, watch.metrics
        )
        metrics = answer_metrics(answers, cfg.group_size)

        # ---- 2 centre and scale the rewards within each group
        rewards = torch.tensor([answer["reward"] for answer in answers])  # (B,)
        advantages = group_advantages(rewards, cfg.group_size, cfg.adv_norm)  # (B,)
        if cfg.method in BATCH_EDITS:
            answers, advantages, more_verdicts = BATCH_EDITS[cfg.method](
                engine, tokenizer, answers, advantages, state["controller"], cfg
            )
            verdicts.update(more_verdicts)
        metrics |= verdict_metrics(verdicts)
        if step == cfg.record_step:
            record_answers(folder / f"step-{step}-rank-{rank}.jsonl", answers)
        batch = make_batch(answers, advantages, device, cfg)
        engine.sleep()
        watch.lap("rollout")

        # ---- 3 the same tokens under the trainer's weights
        split = split_batch(batch, cfg.micro_batch_tokens, cfg.updates_per_rollout)
        old = batch_statistics(ddp_policy, batch, old_names, split.all_micro_batches())
        ref = {}
        if reference:
            with adapters_off(reference):
                ref = batch_statistics(reference, batch, ref_names, split.all_micro_batches())
        metrics |= padding_metrics(batch["lengths"].tolist(), split)
        metrics |= mismatch_metrics(batch, old["log_probs"])
        if step == first_step:
            with clear_errors():
                check_mismatch(metrics, model_config.model_type, dtype)
        metrics |= batch_entropy_metrics(batch, old, cfg)
        if cfg.method in CONTROLLERS:
            rule = CONTROLLERS[cfg.method]
            entropy = metrics["entropy/response_mean"]
            progress = (step - 1) / cfg.steps
            seen = state["last_update_metrics"] | metrics
            state["controller"] = rule(state["controller"], entropy, progress, seen, **rule_knobs)
        batch["loss_mask"] = tokens_to_learn_from(batch, old, mask_knobs, cfg)
        watch.lap("score")

        # ---- 4 updates
        tensors = fixed_tensors(batch, old, ref)
        knobs = with_state(loss_knobs, state["controller"])
        updates = []
        for rows, micro_batches in zip(split.rows, split.micro_batches):
            warmup = min(1.0, (state["updates"] + 1) / max(1, cfg.warmup_updates))
            optimizer.param_groups[0]["lr"] = cfg.lr * warmup
            updated = update(ddp_policy, optimizer, batch, tensors, rows, micro_batches, knobs, cfg)
            updates.append(updated)
            state["updates"] += 1
            failures = failures + 1 if updated is None else 0
            if failures == 10:
                saved = [path.name for path in checkpoints(folder)]
                raise SystemExit(
                    "ten updates in a row without finite loss or gradient; "
                    f"checkpoints in {folder}: {', '.join(saved) or 'none yet'}"
                )
        metrics["entropy/change_measured"] = entropy_after(ddp_policy, batch, old, cfg)
        watch.lap("update")

        # ---- 5 push the weights
        engine.wake()
        engine.push_weights(full_tensors(policy.model))
        watch.lap("push")

        # ---- 6 log, evaluate, checkpoint
        state["step"] = step
        state["last_update_metrics"] = mean_metrics(updates)
        metrics = {"step": step} | metrics | state["last_update_metrics"]
        metrics |= {f"controller/{name}": value for name, value in state["controller"].items()}
        metrics["train/skipped"] = updates.count(None)
        metrics["train/lr"] = optimizer.param_groups[0]["lr"]
        tokens = metrics["response/len_mean"] * cfg.prompts_per_step * cfg.group_size
        metrics |= watch.all_metrics(tokens)
        if eval_sets and (step % cfg.eval_every == 0 or step == cfg.steps):
            metrics |= run_log.evaluation(step, evaluate(engine, tokenizer, eval_sets, cfg))
        run_log.write(metrics)
        stopped = max_over_ranks(len(sigterms)) > 0  # a SIGTERM to any rank: all must save
        if stopped or step % cfg.save_every == 0 or step == cfg.steps:
            save_checkpoint(folder, policy, optimizer, tokenizer, state, cfg.keep_checkpoints)
        if stopped and step < cfg.steps:
            interrupted = True
            break

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    run_log.close(interrupted)
    engine.close()
    del ddp_policy  # or DDP ends the process group with the GIL held: gloo's thread may wait for it
    if dist.is_initialized():  # vLLM's shutdown takes the process group with it
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
