"""How fast the parts are, on CPU with one thread. Each row alternates with its rival (A B A B ...) in one process and
prints the median and range of rival / ours (above 1: ours is faster); all lines: experiments/results/benchmark.jsonl.

    python -m experiments.benchmark                or some of: log_probs padding microscope verifier first_step sampling
    python -m venv .venv-trl && .venv-trl/bin/pip install -r requirements-cpu.txt trl==1.16.0
    .venv-trl/bin/python -m experiments.benchmark step                  a whole step against TRL, in its own environment

Processor seconds unless the unit says wall: other work on the machine then matters little. See also scaling.py.
"""
import json
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from rollout import prepare_environment

import numpy as np
import torch
import torch.distributed as dist
from transformers import Qwen2ForCausalLM

import entropy
import tiny
import verify
from experiments.whole_step import CHANCE, G, P, T, model_of, our_steps, steps_less_metrics, trl_steps
from rollout import full_tensors, make_engine, micro_batches

RESULTS = Path("experiments/results/benchmark.jsonl")


def report(row, ours, rival, unit, **more):
    """Medians of both, median and range of the ratio, pair by pair."""
    ratio = sorted(b / a for a, b in zip(ours, rival))
    line = dict(row=row, ours=statistics.median(ours), rival=statistics.median(rival), unit=unit, **more, low=ratio[0],
                ratio=statistics.median(ratio), high=ratio[-1], rounds=len(ratio), date=time.strftime("%Y-%m-%d"))
    line = {key: float(f"{value:.3g}") if isinstance(value, float) else value for key, value in line.items()}
    print(json.dumps(line), flush=True)
    with RESULTS.open("a") as file:
        print(json.dumps(line), file=file)
    lines = {(line["row"], line["unit"]): line for line in map(json.loads, RESULTS.open())}  # the last of each
    head = ("row", "ours", "rival", "unit", "ratio", "low", "high", "rounds", "date")
    table = [head, ["---"] * 9] + [[str(line[key]) for key in head] for line in lines.values()]
    lines = ["`python -m experiments.benchmark FIRST_WORD_OF_THE_ROW`\n"] + [f"| {' | '.join(row)} |" for row in table]
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")


def alternate(ours, rival, rounds=5):
    """Processor seconds per unit of work (what a call returns, or 1), a call each first: ([ours ...], [rival ...])."""
    found = ([], [])
    for _ in range(rounds + 1):
        for function, seconds in zip((ours, rival), found):
            start = time.process_time()
            work = function() or 1
            seconds.append((time.process_time() - start) / work)
    return found[0][1:], found[1][1:]


# ---- the rows --------------------------------------------------------------------------------------------------------

def step(folder, rounds=5, steps=4):
    """Against TRL's GRPOTrainer, which must be installed: the same model, prompts, lengths and reward."""
    import trl
    problems, data = tiny.problems("train", P), folder / "problems.jsonl"
    rows = [{"prompt": p.prompt, "reward_model": {"ground_truth": json.loads(p.answer)}} for p in problems]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for kind in CHANCE:
        model = model_of(kind, folder)
        for updates in (1, 4):
            arguments = (f"--model {model} --data {data} --max_prompt_len 24 --max_response_len {T} --group_size {G} "
                         f"--prompts_per_step {P} --updates_per_rollout {updates} --micro_batch_tokens 1024")
            pairs = np.array([(our_steps(arguments, folder, steps), trl_steps(model, problems, updates, steps))
                              for _ in range(rounds)])
            for i, unit in enumerate(("cpu s", "wall s")):
                report(f"step, {kind} answers, updates per rollout: {updates}", *pairs[:, :, i].T.tolist(),
                       f"{unit} per step", rival_is=f"TRL {trl.__version__}")


def sampling(folder):
    """Against transformers' generate and, where it is installed, vLLM."""
    dist.init_process_group("gloo")  # vLLM joins it, and ends it
    pad, texts = tiny.VOCAB[tiny.PAD], [p.prompt for p in tiny.problems("train", P)]
    prompts = tiny.make_tokenizer()(texts)["input_ids"]
    padded = tiny.make_tokenizer()(texts, padding=True, padding_side="left", return_tensors="pt")
    for kind in CHANCE:
        model = Qwen2ForCausalLM.from_pretrained(model_of(kind, folder), dtype=torch.float32)

        def sample(engine):
            answers = engine.generate(prompts, n=G, max_tokens=T, temperature=1.0, seeds=range(0, P * G, G))[0]
            return sum(map(len, answers))

        def generate():
            out = model.generate(**padded, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=T, num_return_sequences=G)
            return int((out[:, padded["input_ids"].shape[1]:] != pad).sum())

        def engine(name):
            made = make_engine(name, str(folder / kind), dtype=torch.float32, device="cpu", max_model_len=64,
                               stop_ids={tiny.VOCAB[tiny.EOS]})
            made.push_weights(full_tensors(model))
            return made
        own = engine("torch")
        unit, found = "cpu s per token", alternate(lambda: sample(own), generate)
        report(f"sampling, {kind} answers, against generate", *found, unit)
        if find_spec("vllm"):
            rival = engine("vllm")
            found = alternate(lambda: sample(own), lambda: sample(rival))
            report(f"sampling, {kind} answers, against vLLM", *found, unit)


def log_probs(folder, D=896, V=151_936):
    """Forward and backward, in chunks against all logits at once: time; peak memory above weights and hidden states."""
    memory = lambda key: int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0]) / 2**20  # GiB

    def peak(function):
        Path("/proc/self/clear_refs").write_text("5")  # resets the kernel's high-water mark
        before = memory("VmRSS")
        function()
        return memory("VmHWM") - before
    for dtype in (torch.float32, torch.bfloat16):
        head = torch.nn.Linear(D, V, bias=False, dtype=dtype)
        for N, chunk in ((1024, 256), (1024, 512), (1024, 1024), (4096, 512)):
            hidden, tokens = torch.randn(N, D, dtype=dtype, requires_grad=True), torch.randint(V, (N,))

            def chunked():
                found = entropy.token_statistics(hidden, head, tokens, 1.0, ("log_probs", "token_entropy"), chunk)
                (found["log_probs"].sum() + found["token_entropy"].sum()).backward()
                hidden.grad = head.weight.grad = None

            def naive():
                logp = torch.log_softmax(head(hidden).float(), -1)
                (logp.gather(1, tokens[:, None]).sum() - (logp.exp() * logp).sum()).backward()
                hidden.grad = head.weight.grad = None
            found = alternate(chunked, naive, rounds=2) if N == 1024 else ([peak(chunked)], [peak(naive)])
            report(f"log_probs, {dtype}, {N} tokens, chunks of {chunk}", *found, "cpu s" if N == 1024 else "GiB")


def padding(folder):
    """Micro-batches of 16,384 tokens of log-normal lengths (mean 600, at most 4,096): sorted against random order."""
    dist.init_process_group("gloo")  # micro_batches are as many on every rank
    generator = np.random.default_rng(0)
    for count in (256, 512):
        found = ([], [])
        for _ in range(20):
            lengths = np.clip(generator.lognormal(np.log(600) - 0.5, 1.0, count), 1, 4096).astype(int).tolist()
            in_turn = [[0]]
            for i in range(1, count):
                if (len(in_turn[-1]) + 1) * max(lengths[j] for j in (*in_turn[-1], i)) > 16384:
                    in_turn.append([])
                in_turn[-1].append(i)
            for batches, waste in zip((micro_batches(lengths, range(count), 16384), in_turn), found):
                waste.append(1 - sum(lengths) / sum(len(rows) * max(lengths[i] for i in rows) for rows in batches))
        report(f"padding, {count} answers an update", *found, "share of tokens")
    dist.destroy_process_group()


def microscope(folder, rounds=5):
    """The default run's step (ours), and less what the entropy metrics take in it: rival / ours = 1 - their share."""
    report("microscope", *zip(*(steps_less_metrics(folder, 4) for _ in range(rounds))), "cpu s per step")


def verifier(folder):
    """4,096 integer answers, one in eight right."""
    problems = [verify.Problem("", str(i), "math") for i in range(4096)]
    start = time.perf_counter()
    verify.score(problems, [f"It follows that the answer is \\boxed{{{i + i % 8}}}." for i in range(4096)])
    report("verifier, integers, against 1 ms", [(time.perf_counter() - start) / 4.096], [1.0], "wall ms per answer")


def first_step(folder, rounds=3):
    """From typing the default command to the end of its first step, base cached; evaluation of the base included."""
    tiny.base_model()
    command, seconds = [sys.executable, "-m", "torch.distributed.run", "train.py", "--overwrite", "--out", folder], []
    for name in map(str, range(rounds)):
        metrics, start = folder / name / "metrics.jsonl", time.perf_counter()
        with subprocess.Popen([*command, "--name", name], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
            while not (metrics.exists() and '"step": 1' in metrics.read_text()):
                time.sleep(0.05)
            seconds.append(time.perf_counter() - start)
            run.terminate()  # torchrun ends its rank; killed, it would leave it running
    report("first_step of the default command, against 15 s", seconds, [15.0] * rounds, "wall s")


if __name__ == "__main__":
    torch.set_num_threads(1)
    rows = {row.__name__: row for row in (log_probs, padding, microscope, verifier, first_step, sampling, step)}
    for name in sys.argv[1:] or list(rows)[:-1]:
        with tempfile.TemporaryDirectory() as temporary:
            prepare_environment()
            rows[name](Path(temporary))
