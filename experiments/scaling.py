"""What a step costs as it grows: on paper, as no GPU was at hand, and measured on two CPU cores.

    python -m experiments.scaling             on paper: memory, seconds, bytes sent; a second
    python -m experiments.scaling imbalance   simulated: what ranks wait for one another; a minute
    python -m experiments.scaling measure     measured and counted with two gloo ranks; a quarter of
                                              an hour, spoiled by what else runs on the machine

They write results/scaling.md, scaling_imbalance.md and scaling_measured.md. N parameters, R ranks,
P prompts, G answers each, T response tokens.
"""

import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import train  # first: it sets what torch reads when it is imported
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen2Config, Qwen2ForCausalLM

import tiny
from diagnose import read_metrics
from experiments.runs import table
from memory import (
    ASSUMED_CARD,
    MOST_ROWS,
    OVERHEAD,
    VLLM_OVERHEAD,
    cache_per_token,
    model_size,
    plan_memory,
)
from policy import even_micro_batches, micro_batches

RESULTS = Path("experiments/results")
STAGES = ("rollout", "score", "update", "push")


# ---- on paper: the model -------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A Qwen2 model: what its parameters, memory and FLOPs follow from."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool

    @cached_property
    def size(self):
        return model_size(qwen2_config(self))


HALF = Shape(
    hidden=896,
    layers=24,
    heads=14,
    kv_heads=2,
    head_dim=64,
    intermediate=4864,
    vocab=151936,
    tied=True,
)
ONE_AND_A_HALF = Shape(
    hidden=1536,
    layers=28,
    heads=12,
    kv_heads=2,
    head_dim=128,
    intermediate=8960,
    vocab=151936,
    tied=True,
)
THREE = Shape(
    hidden=2048,
    layers=36,
    heads=16,
    kv_heads=2,
    head_dim=128,
    intermediate=11008,
    vocab=151936,
    tied=True,
)
SEVEN = Shape(
    hidden=3584,
    layers=28,
    heads=28,
    kv_heads=4,
    head_dim=128,
    intermediate=18944,
    vocab=152064,
    tied=False,
)
THIRTY_TWO = Shape(
    hidden=5120,
    layers=64,
    heads=40,
    kv_heads=8,
    head_dim=128,
    intermediate=27648,
    vocab=152064,
    tied=False,
)


# ---- on paper: memory, bytes, seconds ------------------------------------------------------------

# Of an H100, per second.
FLOPS = 989e12
HBM = 3.35e12
NVLINK = 450e9
NETWORK = 50e9

GPUS_PER_NODE = 8
# Shares of the peaks that are reached: assumptions.
ASSUMED = {"flops": 0.35, "hbm": 0.5, "links": 0.7}


def setting(
    updates=8,
    micro_batch_tokens=16384,
    rollout_tp=1,
    prompts=256,
    group=8,
    longest=8192,
    prompt=2048,
):
    """What memory.plan_memory reads of train.py's settings."""
    return SimpleNamespace(
        steps=1,
        engine="vllm",
        parallel="fsdp",
        lora_rank=0,
        activation_checkpointing=True,
        rollout_gpu_memory=0.0,
        rollout_tp=rollout_tp,
        prompts_per_step=prompts,
        group_size=group,
        updates_per_rollout=updates,
        micro_batch_tokens=micro_batch_tokens,
        max_prompt_len=prompt,
        max_response_len=longest,
    )


def memory_per_gpu(s, ranks, memory=ASSUMED_CARD, **of_setting):
    """The memory.Plan of a GPU: FSDP2, bfloat16, activation checkpointing, vLLM."""
    return plan_memory(s.size, setting(**of_setting), ranks, torch.bfloat16, False, memory)


def communication_per_step(s, parallel, updates, micro_batches, after=1, bytes_per_weight=2):
    """Bytes of the whole tensors in one step's collectives, {"STAGE KIND": bytes}.

    micro_batches: of all updates together; after: of the entropy measured after them. Over the
    wire, each rank sends and receives (R - 1) / R of it, an all-reduce twice that.

    The root's weights stay gathered after a forward until a backward frees them, so the score pass
    gathers them once and leaves them to the first update.
    """
    n = s.size.parameters
    layers = s.layers * s.size.layer
    root = s.size.root
    if parallel == "ddp":
        return {"update all_reduce": 4 * n * updates}
    gathered_in_update = 2 * micro_batches * layers + (micro_batches - 1) * root
    pushed_twice = s.tied * s.vocab * s.hidden  # a tied head
    return {
        "score all_gather": bytes_per_weight * (micro_batches * layers + root),
        "update all_gather": bytes_per_weight * gathered_in_update,
        "update reduce_scatter": 4 * micro_batches * n,
        "measure all_gather": bytes_per_weight * (after * layers + root),
        "push all_gather": 4 * (n + pushed_twice),
    }


def seconds_per_step(
    s,
    ranks,
    prompts,
    group=8,
    response=4096,
    longest=8192,
    prompt=256,
    updates=8,
    micro_batch_tokens=16384,
    rollout_tp=1,
):
    """{stage: seconds} from FLOPs, bytes read and bytes sent, at the ASSUMED shares of the peaks.

    Sampling: every decode step reads the engine's weights, every token its context. There are no
    fewer steps than the longest answer has tokens, and no more answers at once than max_rows and
    the KV cache allow. Communication hides behind compute. Score and update wait as simulated in
    imbalance().
    """
    n = s.size.parameters
    answers = prompts * group
    context = prompt + response / 2
    flops_reached = ASSUMED["flops"] * FLOPS
    plan = memory_per_gpu(
        s,
        ranks,
        updates=updates,
        micro_batch_tokens=micro_batch_tokens,
        rollout_tp=rollout_tp,
        prompts=prompts,
        group=group,
        longest=longest,
    )
    parts = plan.parts
    # bytes per token and GPU
    kv = cache_per_token(s.layers, s.size.key_value, torch.bfloat16) / rollout_tp
    share = answers * rollout_tp / ranks  # answers per engine
    at_once = min(MOST_ROWS, share, parts["KV cache"] // (kv * context))
    steps = max(longest, share * response / at_once)
    read = steps * parts["engine weights"] + share * response * context * kv
    sampling_flops = 2 * n * share * response / rollout_tp  # per GPU

    tokens = answers * (prompt + response) / ranks
    embedding = 0 if s.tied else s.vocab * s.hidden  # looked up, not multiplied with
    flops_per_token = 2 * (n - embedding) + 2 * s.layers * s.size.query * (prompt + response)
    waiting = imbalance(s, ranks, prompts, group, response, longest, prompt, updates)
    compute = waiting * flops_per_token * tokens / flops_reached

    micro_batches = updates * math.ceil(tokens / (updates * micro_batch_tokens))
    after = math.ceil(tokens / (group * micro_batch_tokens))  # of each group's first answer
    sent = seconds_of_communication(s, ranks, updates, micro_batches, after)
    return {
        "rollout": max(read / (ASSUMED["hbm"] * HBM), sampling_flops / flops_reached),
        "score": max(compute, sent["score"]),
        "update": max((4 + 1 / group) * compute, sent["update"]),
        "push": sent["push"],
        "communication": sum(sent.values()),
        "at once": at_once,
        "imbalance": waiting,
    }


# Spread of the logarithm of an answer's length: around its prompt's, and of the prompts'.
SPREAD = {"answer": 0.5, "prompt": 0.35}


# What train.py does against waiting, one after another.
MEASURES = ("left out", "even", "dealt")


def imbalance(
    s,
    ranks,
    prompts,
    group,
    response,
    longest,
    prompt,
    updates,
    budget=16384,
    draws=4,
    flat=0.0,
    measures=MEASURES,
):
    """Cost of the passes over a step's answers when all ranks wait for one another in every
    micro-batch, by that of a perfect split without padding.

    Simulated: lengths are lognormal, their mean is `response`, those above `longest` are cut; FLOPs
    of causal attention. flat: the share of prompts whose answers all have advantage 0. measures:
    what stands in MEASURES; all of it is train.py.
    """
    rng = np.random.default_rng(0)
    waited = 0.0
    perfect = 0.0
    for _ in range(draws):
        lengths = prompt + draw_lengths(rng, prompts, group, response, longest)
        teaches = np.repeat(rng.random((prompts, 1)) >= flat, group, axis=1)
        perfect += flops_of_rows(s, lengths).sum() / ranks
        if "left out" not in measures:
            teaches[:] = True
        # {rank: (prompts, group)}: the prompts are dealt to the ranks in turn
        cells = [(lengths[rank::ranks], teaches[rank::ranks]) for rank in range(ranks)]
        for update in range(updates):
            of_ranks = []
            for rank_lengths, rank_teaches in cells:
                part = np.array_split(np.arange(len(rank_lengths)), updates)[update]
                run = zip(rank_lengths[part].ravel(), rank_teaches[part].ravel())
                of_ranks.append([(bool(learns), int(n)) for n, learns in run])
            if "dealt" in measures:
                of_ranks = in_a_snake(of_ranks)
            waited += lock_step(s, of_ranks, budget, even="even" in measures)
    return waited / perfect


def in_a_snake(of_ranks):
    """rollout.deal_over_ranks, of (is run, tokens) in the place of answers."""
    everything = sorted((row for rows in of_ranks for row in rows), reverse=True)
    cycle = 2 * len(of_ranks)
    hands = []
    for rank in range(len(of_ranks)):
        turns = (rank, cycle - 1 - rank)
        hands.append([row for i, row in enumerate(everything) if i % cycle in turns])
    return hands


def draw_lengths(rng, prompts, group, response, longest):
    """(prompts, group) lengths with the wanted mean, which is found by bisection."""
    noise = SPREAD["answer"] * rng.standard_normal((prompts, group))
    noise += SPREAD["prompt"] * rng.standard_normal((prompts, 1))
    low = 0.0
    high = 100.0 * response
    for _ in range(60):
        middle = (low + high) / 2
        lengths = np.minimum(middle * np.exp(noise), longest)
        low, high = (middle, high) if lengths.mean() < response else (low, middle)
    return np.maximum(lengths, 1).astype(int)


def flops_of_rows(s, lengths):
    """Of a forward over rows of so many tokens each, without the embedding's lookup."""
    size = s.size
    matrices = 2 * (size.layers * size.layer + size.vocab * size.hidden)
    return matrices * lengths + 2 * size.layers * size.query * lengths**2


def lock_step(s, of_ranks, budget, even=True):
    """Cost of one update: the most expensive rank's in each micro-batch.

    of_ranks: of each rank's rows, (is run, tokens). even: as policy.split_batch does it; else as it
    did before, where a rank only halved its lists until there were as many as on the others.
    """
    lengths = [[tokens for _, tokens in rows] for rows in of_ranks]
    run = [[i for i, (is_run, _) in enumerate(rows) if is_run] for rows in of_ranks]
    most = max(1, *(len(micro_batches(n, rows, budget)) for n, rows in zip(lengths, run)))
    costs = []
    for tokens, rows in zip(lengths, run):
        spare = sorted(set(range(len(tokens))) - set(rows), key=lambda i: tokens[i])
        rows = rows + spare[: max(0, most - len(rows))]
        split = even_micro_batches if even else micro_batches
        lists = split(tokens, rows, budget, most)
        longest = np.array([max(tokens[row] for row in some) for some in lists])
        costs.append([len(some) for some in lists] * flops_of_rows(s, longest))
    return np.max(costs, axis=0).sum()


def seconds_of_communication(s, ranks, updates, micro_batches, after):
    """{stage: seconds} under FSDP2; the entropy measured after the updates counts as update."""
    link = NVLINK
    if ranks > GPUS_PER_NODE:  # rings leave a node by all cards
        link = min(NVLINK, GPUS_PER_NODE * NETWORK)
    seconds = Counter()
    collectives = communication_per_step(s, "fsdp", updates, micro_batches, after)
    for name, size in collectives.items():
        stage = name.split()[0].replace("measure", "update")
        seconds[stage] += size * (ranks - 1) / ranks / (ASSUMED["links"] * link)
    return seconds


# ---- on paper: the page --------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    model: str
    shape: Shape
    rollout_tp: int  # ranks per vLLM engine
    nodes: int
    gpus: int = GPUS_PER_NODE  # of each node

    @property
    def prompts(self):
        """Prompts per step: a multiple of ranks x 8 updates."""
        return 512 if self.nodes == 8 else 256

    @property
    def ranks(self):
        return self.nodes * self.gpus

    @property
    def label(self):
        return f"{self.model.split('-')[1]}, {self.ranks}"


CASES = [
    Case("Qwen/Qwen2.5-0.5B", HALF, 1, 1, gpus=1),
    Case("Qwen/Qwen2.5-1.5B", ONE_AND_A_HALF, 1, 1, gpus=1),
    Case("Qwen/Qwen2.5-3B", THREE, 1, 1, gpus=1),
]
CASES += [Case("Qwen/Qwen2.5-7B", SEVEN, 1, nodes) for nodes in (1, 2, 4, 8)]
CASES += [Case("Qwen/Qwen2.5-32B", THIRTY_TWO, 4, nodes) for nodes in (1, 2, 4, 8)]


def command(case):
    rendezvous = ""
    if case.nodes > 1:
        rendezvous = f"--nnodes {case.nodes} --rdzv-backend c10d --rdzv-endpoint HOST:29500 "
    return (
        f"torchrun {rendezvous}--nproc-per-node {case.gpus} train.py --method clip_cov "
        f"--model {case.model} "
        "--data BytedTsinghua-SIA/DAPO-Math-17k "
        f"--rollout_tp {case.rollout_tp} --prompts_per_step {case.prompts} --group_size 8 "
        "--updates_per_rollout 8 --max_response_len 8192"
    )


def plan_of(case):
    return memory_per_gpu(case.shape, case.ranks, rollout_tp=case.rollout_tp, prompts=case.prompts)


def fits(case):
    plan = plan_of(case)
    return not (plan.misfit or plan.tight)


def memory_table():
    plan = plan_of(CASES[0])
    parts = [part for part in plan.parts if part not in ("reference", "frozen base")]
    titles = ["model, GPUs", *parts]
    titles += [f"**peak: {peak}**" for peak in plan.peaks]
    titles += [
        "vllm's share",
        "fits",
        "host, page cache of a node at the start",
        "host, rank 0 at a checkpoint",
    ]
    rows = []
    for case in CASES:
        n = case.shape.size.parameters
        plan = plan_of(case)
        cells = [case.label]
        cells += [f"{plan.parts[part] / 1e9:.1f}" for part in parts]
        cells += [f"{peak / 1e9:.1f}" for peak in plan.peaks.values()]
        cells.append(f"{plan.share:.2f}")
        cells.append("yes" if fits(case) else "**no**")
        cells.append(f"{2 * n / 1e9:.0f}")
        cells.append(f"{12 * n / 1e9:.0f}")
        rows.append(cells)
    return table(titles, rows)


def seconds_table():
    titles = [
        "model, GPUs",
        "P",
        "answers at once per engine",
        "imbalance",
        *STAGES,
        "**step**",
        "communication alone",
        "GB that a rank gathers at a push",
        "response tokens per s",
    ]
    rows = []
    for case in CASES:
        cells = [case.label, case.prompts]
        cells += seconds_cells(case) if fits(case) else ["does not fit"] + [""] * 9
        rows.append(cells)
    return table(titles, rows)


def seconds_cells(case):
    took = seconds_per_step(case.shape, case.ranks, case.prompts, rollout_tp=case.rollout_tp)
    step = sum(took[stage] for stage in STAGES)
    return [
        f"{took['at once']:.0f}",
        f"{took['imbalance']:.2f}",
        f"{took['rollout']:.0f}",
        f"{took['score']:.0f}",
        f"{took['update']:.0f}",
        f"{took['push']:.1f}",
        f"**{step:.0f}**",
        f"{took['communication']:.0f}",
        f"{4 * case.shape.size.parameters / 1e9:.0f}",
        f"{case.prompts * 8 * 4096 / step:,.0f}",
    ]


# The README's recipe for one GPU: GSM8K, whose answers are taken to have 250 tokens on average.
RECIPE_STEPS = 200
RECIPE = {
    "--prompts_per_step": 128,
    "--updates_per_rollout": 4,
    "--max_prompt_len": 512,
    "--max_response_len": 1024,
    "--steps": RECIPE_STEPS,
}


def recipe_command(model):
    flags = " ".join(f"{flag} {value}" for flag, value in RECIPE.items())
    return (
        f"torchrun train.py --method clip_cov --model {model} --data openai/gsm8k:main:train "
        f"--eval_data openai/gsm8k:main:test --eval_prompts 256 {flags}"
    )


def recipe_table():
    titles = ["model", "peak of the GPU's memory, GB", "vllm's share", *STAGES]
    titles += ["**step**", f"**hours for {RECIPE_STEPS} steps**"]
    prompts = RECIPE["--prompts_per_step"]
    updates = RECIPE["--updates_per_rollout"]
    longest = RECIPE["--max_response_len"]
    rows = []
    for case in CASES[:2]:
        plan = memory_per_gpu(
            case.shape,
            1,
            prompts=prompts,
            updates=updates,
            longest=longest,
            prompt=RECIPE["--max_prompt_len"],
        )
        took = seconds_per_step(
            case.shape, 1, prompts, response=250, longest=longest, prompt=150, updates=updates
        )
        step = sum(took[stage] for stage in STAGES)
        cells = [case.model, f"{max(plan.peaks.values()) / 1e9:.0f}", f"{plan.share:.2f}"]
        cells += [f"{took[stage]:.1f}" for stage in STAGES]
        cells += [f"**{step:.0f}**", f"**{RECIPE_STEPS * step / 3600:.1f}**"]
        rows.append(cells)
    return table(titles, rows)


ON_PAPER = """# What a step costs on GPUs, on paper

`python -m experiments.scaling`. P prompts, G answers each, T response tokens; GB = 10^9 bytes. What
two CPU cores can show is in [scaling_measured.md](scaling_measured.md).

## Memory per GPU, GB

[memory.py](../../memory.py) by FSDP2: float32 weights, gradients and AdamW's averages, bfloat16
compute, activation checkpointing, 16,384 tokens per micro-batch, prompts and answers of up to 2,048
and 8,192 tokens, cards of {card:.0f} GB. vLLM has the share that train.py gives it, and sleeps
(level 2) in the update. Weights, gradients, AdamW and engine weights are exact, activations are
those that PyTorch keeps on a CPU, the log-prob chunk and one layer's gradients are estimates,
{overhead:.0f} GB of overhead an assumption. The update's peak is the sum of parts that are not all
largest at once. Nothing here was run on a GPU. Host: the ranks of a node map the same bfloat16
files; a checkpoint gathers the weights and both averages on rank 0.

{memory}

## Seconds per step

G = 8, 8 updates, responses of 4,096 tokens on average and 8,192 at most, prompts of 256. Peaks of
an H100: 989 TFLOP/s in bfloat16, 3.35 TB/s of memory, 450 GB/s of NVLink, 50 GB/s of network per
GPU. **Assumed, not measured: {flops:.0%} of the FLOPs, {hbm:.0%} of the memory's and {links:.0%} of
the links' bandwidth are reached, and communication hides behind compute.** Verification and
start-up are left out. Imbalance: what score and update take longer than a perfect split without
padding, as ranks wait for one another in every micro-batch; simulated with train.py's split and
dealing, no prompt flat ([scaling_imbalance.md](scaling_imbalance.md)), on lognormal lengths (spread
{answer} around a prompt's, which spread by {prompt}). From 32 to 64 GPUs P doubles: tokens per
second do nearly, seconds do not fall. 7B on 32 GPUs would sample no faster with more engines: the
longest answer bounds it.

{seconds}

```
{commands}
```

## One card: GSM8K

The same arithmetic for answers of 250 tokens on average, on one H100. At this size a GPU waits for
Python and for kernel launches, which is not counted, so expect a few times these hours. Evaluations
are not counted either. Not run yet.

{recipe}

```
{recipe_commands}
```
"""


def write_on_paper():
    text = ON_PAPER.format(
        memory=memory_table(),
        seconds=seconds_table(),
        commands="\n".join(command(case) for case in CASES),
        recipe=recipe_table(),
        recipe_commands="\n".join(recipe_command(case.model) for case in CASES[:2]),
        overhead=(OVERHEAD + VLLM_OVERHEAD) / 1e9,
        card=ASSUMED_CARD / 1e9,
        **ASSUMED,
        **SPREAD,
    )
    (RESULTS / "scaling.md").write_text(text)


IMBALANCE = """# What ranks wait for one another, simulated

`python -m experiments.scaling imbalance`. The cost of a step's updates under FSDP2, where all ranks
wait for the slowest in every micro-batch, by that of a perfect split without padding that runs
every answer. 7B, 256 prompts of 8 answers, 8 updates, 16,384 tokens per micro-batch; responses of
8,192 tokens at most, prompts of 256; lognormal lengths (spread {answer} around a prompt's, which
spread by {prompt}). A prompt is flat if its answers all have advantage 0.

- *before*: a rank halves its lists until there are as many as on the others;
- *left out*: answers of advantage 0 are not run (methods of `losses.NOTHING_AT_ZERO_ADVANTAGE`);
- *even*: `policy.agree_on_micro_batches`, the smallest budget that needs as many lists, sorted;
- *dealt*: `rollout.deal_over_ranks`, the answers of an update dealt in a snake.

Each column has what stands left of it, too. The last one is the program.

{rows}
"""


def write_imbalance():
    titles = ["ranks", "mean tokens", "flat prompts", "before", *MEASURES]
    rows = []
    for flat in (0.0, 0.5):
        for ranks in (1, 8, 32):
            for response in (4096, 1500):
                cells = [ranks, response, f"{flat:.0%}"]
                for count in range(len(MEASURES) + 1):
                    cost = imbalance(
                        SEVEN,
                        ranks,
                        prompts=256,
                        group=8,
                        response=response,
                        longest=8192,
                        prompt=256,
                        updates=8,
                        draws=2,
                        flat=flat,
                        measures=MEASURES[:count],
                    )
                    cells.append(f"{cost:.2f}")
                rows.append(cells)
    text = IMBALANCE.format(rows=table(titles, rows), **SPREAD)
    (RESULTS / "scaling_imbalance.md").write_text(text)


# ---- measured: one rank --------------------------------------------------------------------------


class Collectives(TorchDispatchMode):
    """Counts the bytes of all collectives, of the whole tensor: bytes["STAGE KIND"].

    Sums of a few numbers are counted apart, as "scalars".
    """

    KINDS = {
        "allreduce_": "all_reduce",
        "all_reduce": "all_reduce",
        "_allgather_base_": "all_gather",
        "all_gather_into_tensor": "all_gather",
        "_reduce_scatter_base_": "reduce_scatter",
    }

    def __init__(self):
        super().__init__()
        self.stage = "other"
        self.bytes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it turns into plain tensors and collectives, which come here
        result = func(*args, **(kwargs or {}))
        kind = self.KINDS.get(func.overloadpacket.__name__)
        if func.namespace in ("c10d", "_c10d_functional") and kind:
            # Of a gather the result is whole, of a scatter the argument.
            size = max(bytes_in(value) for value in (*args, result))
            is_scalar = kind == "all_reduce" and size < 1000
            self.bytes["scalars" if is_scalar else f"{self.stage} {kind}"] += size
        return result

    def watch(self, name, stage):
        """train.NAME, when called, begins a stage; its calls are counted, too."""
        original = getattr(train, name)

        def watched(*args):
            self.stage = stage
            self.bytes[name] += 1
            return original(*args)

        setattr(train, name, watched)


def bytes_in(value):
    """Of all tensors in a nested value."""
    tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return sum(tensor.nbytes for tensor in tensors)


def worker(mode, arguments):
    """train.main on this rank, with a line of RUN/rankR.jsonl per step.

    It has the CPU seconds so far and, with the mode "count", the bytes of the step.
    """
    collectives = Collectives()
    write = train.RunLog.write

    def noted(log, row):
        line = {"step": row["step"], "cpu_s": time.process_time(), **collectives.bytes}
        with open(log.folder / f"rank{dist.get_rank()}.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        collectives.bytes.clear()
        write(log, row)

    train.RunLog.write = noted
    collectives.watch("batch_statistics", "score")
    collectives.watch("update", "update")
    collectives.watch("response_statistics", "update")
    collectives.watch("entropy_after", "measure")
    collectives.watch("full_tensors", "push")
    with collectives if mode == "count" else nullcontext():
        train.main(arguments)


# ---- measured: runs of one and two ranks ---------------------------------------------------------


def busy_seconds():
    """CPU seconds of this machine (Linux), of our finished children; the time."""
    user, nice, system = map(int, Path("/proc/stat").read_text().split()[1:4])
    own = resource.getrusage(resource.RUSAGE_CHILDREN)
    machine = (user + nice + system) / os.sysconf("SC_CLK_TCK")
    return np.array([machine, own.ru_utime + own.ru_stime, time.perf_counter()])


def wait_until_idle(limit=40, pause=4):
    """Until other programs leave the machine alone, for `limit` seconds at most.

    The column of others tells whether they did.
    """
    for _ in range(limit // pause):
        before = busy_seconds()
        time.sleep(pause)
        machine_seconds = (busy_seconds() - before)[0]
        if machine_seconds < 0.1 * pause:
            return


def run(folder, ranks, *flags, steps=4, mode="time"):
    """train.py under torchrun, a thread per rank: medians over all steps but the first.

    "others": the cores that other programs took. "bytes": of the last step, counted on rank 0.
    """
    before = busy_seconds()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), "-m", "experiments.scaling", mode]
    command += ["--out", str(folder), "--name", "run", "--overwrite", "--steps", str(steps)]
    command += ["--eval_data", "none", "--save_every", "1000", "--engine", "torch"]
    command += map(str, flags)
    environment = dict(os.environ)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):
        environment.pop(name, None)
    environment["OMP_NUM_THREADS"] = "1"
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {result.returncode}:\n{result.stderr}")
    machine, own, seconds = busy_seconds() - before

    cfg = json.loads((folder / "run" / "config.json").read_text())
    rows = read_metrics(folder / "run")
    by_rank = [read_metrics(folder / "run" / f"rank{rank}.jsonl") for rank in range(ranks)]
    cpu_so_far = [[row["cpu_s"] for row in rank_rows] for rank_rows in by_rank]
    cpu = np.diff(cpu_so_far, axis=1).max(0)  # of the rank that worked most
    answers = cfg["prompts_per_step"] * cfg["group_size"]
    tokens = [row["response/len_mean"] * answers for row in rows]

    found = {}
    for stage in STAGES:
        found[stage] = np.median([row[f"time/{stage}_s"] for row in rows[1:]])
    for name in ("step", "update"):
        rates = [n / row[f"time/{name}_s"] for n, row in zip(tokens[1:], rows[1:])]
        found[f"{name} tok/s"] = np.median(rates)
    found["tokens"] = np.median(tokens)
    found["tok/cpu_s"] = np.median(tokens[1:] / cpu)
    found["cpu_s"] = np.median(cpu)
    found["bytes"] = by_rank[0][-1]
    found["others"] = (machine - own) / seconds
    return found


def write_model(folder, shape):
    """An untrained model with tiny's tokenizer and a larger vocabulary.

    It almost never says EOS, so every answer has --max_response_len tokens.
    """
    torch.manual_seed(0)
    Qwen2ForCausalLM(qwen2_config(shape)).save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)


def qwen2_config(s):
    return Qwen2Config(
        vocab_size=s.vocab,
        hidden_size=s.hidden,
        intermediate_size=s.intermediate,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        num_key_value_heads=s.kv_heads,
        max_position_embeddings=512,
        tie_word_embeddings=s.tied,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )


def flags_of(model, prompts, group, response, updates, micro_batch_tokens=16384):
    return (
        *("--model", model),
        *("--prompts_per_step", prompts),
        *("--group_size", group),
        *("--max_prompt_len", 24),
        *("--max_response_len", response),
        *("--updates_per_rollout", updates),
        *("--micro_batch_tokens", micro_batch_tokens),
    )


# 13 M parameters: compute outweighs gloo.
MODEL = Shape(
    hidden=384,
    layers=6,
    heads=6,
    kv_heads=6,
    head_dim=64,
    intermediate=1152,
    vocab=4096,
    tied=True,
)
ROUNDS = 2


def speedup_table(folder):
    """Two ranks against one on the same batch (strong scaling): a row per model and --parallel."""
    titles = [
        "model",
        "`--parallel`",
        "1 rank, tok/s",
        "2 ranks, tok/s",
        "whole step",
        "update alone",
        "per CPU second",
        "the quietest round: whole step",
        "update alone",
        "others' cores then",
        "in all",
    ]
    write_model(folder / "larger", MODEL)
    settings = {
        "tiny, 0.86 M": ("--model", "tiny"),
        "larger, 13 M": flags_of(folder / "larger", 32, 4, 32, 2),
    }
    rows = []
    for name, flags in settings.items():
        for parallel in ("ddp", "fsdp"):
            one_rank = []
            two_ranks = []
            for _ in range(ROUNDS):  # in turn: a busy minute hits both
                wait_until_idle()
                one_rank.append(run(folder, 1, *flags, "--parallel", parallel))
                wait_until_idle()
                two_ranks.append(run(folder, 2, *flags, "--parallel", parallel))
            rows.append([name, parallel, *speedup_cells(one_rank, two_ranks)])
            print(rows[-1], flush=True)
    return table(titles, rows)


def speedup_cells(one_rank, two_ranks):
    """Both: [what run returned, per round]."""
    others = [max(one["others"], two["others"]) for one, two in zip(one_rank, two_ranks)]
    quietest = np.argmin(others)
    cells = []
    for found in (one_rank, two_ranks):
        rate = np.median([of_round["step tok/s"] for of_round in found])
        cells.append(f"{rate:.0f}")
    in_quietest = []
    for key in ("step tok/s", "update tok/s", "tok/cpu_s"):
        one = [of_round[key] for of_round in one_rank]
        two = [of_round[key] for of_round in two_ranks]
        ratios = [b / a for a, b in zip(one, two)]
        ratio = np.median(two) / np.median(one)
        cells.append(f"{ratio:.2f} ({min(ratios):.2f}-{max(ratios):.2f})")
        in_quietest.append(f"{ratios[quietest]:.2f}")
    cells += in_quietest[:2]
    cells.append(f"{min(others):.2f}")
    cells.append(f"{min(others):.2f}-{max(others):.2f}")
    return cells


def growth_table(folder):
    """Seconds of each stage when one number is doubled, one rank, one thread."""
    titles = [
        "",
        "parameters",
        "response tokens",
        *STAGES,
        "CPU s per step",
        "others' cores",
    ]
    base = {"prompts": 16, "group": 4, "response": 32, "updates": 2}
    cases = {
        "base: P 16, G 4, T 32, 6 layers": (MODEL, base),
        "P 32": (MODEL, base | {"prompts": 32}),
        "G 8": (MODEL, base | {"group": 8}),
        "T 64": (MODEL, base | {"response": 64}),
        "12 layers": (replace(MODEL, layers=12), base),
        "4 updates": (MODEL, base | {"updates": 4}),
    }
    rows = []
    for name, (shape, setting) in cases.items():
        write_model(folder / "model", shape)
        found = run(folder, 1, *flags_of(folder / "model", **setting))
        rows.append(
            [
                name,
                f"{shape.size.parameters / 1e6:.1f} M",
                f"{found['tokens']:.0f}",
                f"{found['rollout']:.2f}",
                f"{found['score']:.2f}",
                f"{found['update']:.2f}",
                f"{found['push']:.3f}",
                f"{found['cpu_s']:.2f}",
                f"{found['others']:.2f}",
            ]
        )
        print(rows[-1], flush=True)
    return table(titles, rows)


def volume_table(folder):
    """Bytes of every collective in one step of two ranks, beside communication_per_step."""
    titles = ["`--parallel`", "micro-batches", "stage, collective", "formula", "bytes counted"]
    write_model(folder / "model", MODEL)
    rows = []
    for parallel, budget in (("ddp", 16384), ("fsdp", 16384), ("fsdp", 400)):
        flags = (*flags_of(folder / "model", 16, 4, 32, 2, budget), "--parallel", parallel)
        counted = run(folder, 2, *flags, steps=2, mode="count")["bytes"]
        micro_batches = counted["response_statistics"]
        formula = communication_per_step(MODEL, parallel, 2, micro_batches, bytes_per_weight=4)
        for name in [name for name in counted if " " in name] + ["scalars"]:
            rows.append([parallel, micro_batches, name, formula.get(name, ""), counted[name]])
            print(rows[-1], flush=True)
    return table(titles, rows)


MEASURED = """# What a step costs, measured on two CPU cores

`python -m experiments.scaling measure`. P prompts, G answers each, T response tokens.

## Measured: two CPU cores, gloo, one thread per rank

Strong scaling: the same batch on 1 rank and on 2, in turn, {rounds} times each, the median of 3
steps after a first; in brackets the range of the rounds. Tokens are response tokens per second.
*Per CPU second*: tokens per CPU second of the rank that worked most, 2 ranks over 1: the speed-up
if each rank had a core to itself and waiting took no time. *Others' cores*: what other programs
took of the two, the larger of a round's two runs; with one core gone, two ranks cannot be faster
than one by the clock, so only a quiet round says something about the code.

{speedup}

## Measured: how the seconds grow

One rank, one thread, an untrained model that almost never ends an answer; one number doubled at a
time.

{growth}

## Counted: bytes of the collectives in one step

Two ranks, float32 on CPU (4 bytes per weight), the model of 13 M parameters, 2 updates; bytes of
the whole tensors. Over the wire each rank sends half of that with two ranks, for an all-reduce all
of it. FSDP2 exchanges weights and gradients in every micro-batch: larger `--micro_batch_tokens`
save traffic. Scalars are sums of metrics and counts.

{volume}
"""


def write_measured():
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        text = MEASURED.format(
            rounds=ROUNDS,
            speedup=speedup_table(folder),
            growth=growth_table(folder),
            volume=volume_table(folder),
        )
    (RESULTS / "scaling_measured.md").write_text(text)


def main(action="paper", *arguments):
    if action == "paper":
        write_on_paper()
    elif action == "imbalance":
        write_imbalance()
    elif action == "measure":
        write_measured()
    elif action in ("time", "count"):  # this is a rank of run()
        worker(action, list(arguments))
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(*sys.argv[1:])
