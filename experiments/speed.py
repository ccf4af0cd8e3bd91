"""How fast the parts are, on CPU with one thread: each against a rival, in turn, in one process.

    python -m experiments.speed                    or some of: log_probs statistics few_shot padding
                                                   entropy_metrics verifier first_step sampling
    pip install --target .trl --no-deps trl==1.16.0     beside requirements-cpu.txt and datasets
    PYTHONPATH=.trl python -m experiments.speed step    a whole step against TRL

A row has the medians of both, and the median and range of rival / ours, pair by pair; above 1 ours
is faster. Seconds are processor seconds unless the unit says wall: other work on the machine then
matters little. All rows ever measured are in results/speed.jsonl, the last of each in speed.md.
"""

import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

from rollout import prepare_environment  # first: rollout.py sets what torch reads at import

import numpy as np
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainerCallback,
)

import entropy
import record
import tiny
import train
import verify
from data import Problem
from experiments.runs import table, write_page
from policy import Policy, even_micro_batches, full_tensors, micro_batches
from rollout import collate, make_engine

RESULTS = Path("experiments/results")
COLUMNS = ("row", "ours", "rival", "unit", "ratio", "low", "high", "rounds", "date")

PROMPTS = 64
ANSWERS = 8  # to each prompt
LONGEST = 32  # answer, in tokens
# The chance of EOS at every token: mean length 8 with a long tail, or all of length LONGEST.
CHANCE_OF_EOS = {"ragged": 0.12, "full": 1e-9}
STEP_BUDGET = 1024  # --micro_batch_tokens of the rows "step"


# ---- rows ----------------------------------------------------------------------------------------


def report(row, ours, rival, unit, **more):
    """Adds a row to speed.jsonl and writes the table of speed.md again.

    ours, rival: the numbers of each round.
    """
    ratios = sorted(b / a for a, b in zip(ours, rival))
    line = {
        "row": row,
        "ours": statistics.median(ours),
        "rival": statistics.median(rival),
        "unit": unit,
        **more,
        "low": ratios[0],
        "ratio": statistics.median(ratios),
        "high": ratios[-1],
        "rounds": len(ratios),
        "date": time.strftime("%Y-%m-%d"),
    }
    for key, value in line.items():
        if isinstance(value, float):
            line[key] = float(f"{value:.3g}")
    print(json.dumps(line), flush=True)
    with (RESULTS / "speed.jsonl").open("a") as file:
        print(json.dumps(line), file=file)
    write_table()


def write_table():
    latest = {}
    for text in (RESULTS / "speed.jsonl").read_text().splitlines():
        line = json.loads(text)
        latest[line["row"], line["unit"]] = line
    rows = []
    for line in latest.values():
        rows.append([line[column] for column in COLUMNS])
    command = "`python -m experiments.speed FIRST_WORD_OF_THE_ROW`"
    write_page(RESULTS / "speed.md", command, table(COLUMNS, rows))


def alternate(ours, rival, rounds=5):
    """Calls both in turn. Returns processor seconds per unit of work, ([ours ...], [rival ...]).

    The work is what a call returns, or 1. The first round does not count.
    """
    seconds_of_ours = []
    seconds_of_rival = []
    for _ in range(rounds + 1):
        seconds_of_ours.append(seconds_per_work(ours))
        seconds_of_rival.append(seconds_per_work(rival))
    return seconds_of_ours[1:], seconds_of_rival[1:]


def seconds_per_work(function):
    start = time.process_time()
    work = function() or 1
    return (time.process_time() - start) / work


# ---- log-probs, statistics, prompts, padding, verifier, first step -------------------------------


def log_probs(folder):
    """Forward and backward, in chunks against all logits at once.

    Time at 1,024 tokens; at 4,096 peak memory above weights and hidden states.
    """
    for dtype in (torch.float32, torch.bfloat16):
        for tokens, chunk in ((1024, 256), (1024, 512), (1024, 1024), (4096, 512)):
            chunked, naive = two_ways(tokens, chunk, dtype)
            row = f"log_probs, {dtype}, {tokens} tokens, chunks of {chunk}"
            if tokens == 1024:
                report(row, *alternate(chunked, naive, rounds=2), "cpu s")
            else:
                report(row, [peak_memory(chunked)], [peak_memory(naive)], "GiB")


def two_ways(count, chunk, dtype, width=896, vocab=151_936):
    """Two functions without arguments that do the same: ours in chunks, and the naive one."""
    head = torch.nn.Linear(width, vocab, bias=False, dtype=dtype)
    hidden = torch.randn(count, width, dtype=dtype, requires_grad=True)
    tokens = torch.randint(vocab, (count,))
    wanted = ("log_probs", "token_entropy")

    def chunked():
        found = entropy.token_statistics(hidden, head, tokens, 1.0, wanted, chunk)
        (found["log_probs"].sum() + found["token_entropy"].sum()).backward()
        hidden.grad = None
        head.weight.grad = None

    def naive():
        log_p = torch.log_softmax(head(hidden).float(), -1)
        chosen = log_p.gather(1, tokens[:, None])
        (chosen.sum() - (log_p.exp() * log_p).sum()).backward()
        hidden.grad = None
        head.weight.grad = None

    return chunked, naive


def peak_memory(function):
    """GiB that a call needs at most, above what is there before."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the kernel's high-water mark
    before = memory_of_process("VmRSS")
    function()
    return memory_of_process("VmHWM") - before


def memory_of_process(key):
    """GiB, of Linux."""
    status = Path("/proc/self/status").read_text()
    kilobytes = status.split(key + ":")[1].split()[0]
    return int(kilobytes) / 2**20


def statistics_of_tokens(folder, tokens=512, width=896, vocab=151_936, rounds=5):
    """The score pass's four statistics against the arithmetic of four separate passes.

    Of given logits, and with the head's product, which is the same for both. Bytes are those of all
    operations on given logits: what a GPU spends its time on."""
    logits = 3 * torch.randn(tokens, vocab)
    hidden = torch.randn(tokens, width)
    head = torch.nn.Linear(width, vocab, bias=False)
    token = torch.randint(vocab, (tokens,))

    def ours(hidden, head):
        wanted = entropy.NEEDED_STATISTICS
        entropy.token_statistics(hidden, head, token, 1.0, wanted)

    def rival(hidden, head):
        separate_passes(head(hidden), token, 1.0)

    given = torch.nn.Identity()
    with torch.no_grad():
        for name, x, f in (("given logits", logits, given), ("and the head", hidden, head)):
            pair = functools.partial(ours, x, f), functools.partial(rival, x, f)
            row = f"statistics, {tokens} tokens, {name}"
            report(row, *alternate(*pair, rounds=rounds), "cpu s")
        on_logits = [functools.partial(f, logits, given) for f in (ours, rival)]
        row = f"statistics, {tokens} tokens, given logits"
        report(row, *[[peak_memory(f)] for f in on_logits], "GiB")
        per_logit = [[bytes_moved(f) / logits.numel()] for f in on_logits]
        report("statistics, read and written, given logits", *per_logit, "bytes per logit")


def separate_passes(logits, token, temperature):
    """entropy.NEEDED_STATISTICS, each from the log-probs by itself."""
    log_p = torch.log_softmax(logits / temperature, dim=-1)
    return (
        log_p.gather(1, token[:, None]).squeeze(1),
        -(log_p.exp() * log_p).sum(1),
        (2.0 * log_p).exp().sum(1),
        ((2.0 * log_p).exp() * log_p).sum(1),
    )


class BytesMoved(TorchDispatchMode):
    """Counts what operations read and write: each argument and result once. Views move nothing, and
    a gather reads few."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view and function is not torch.ops.aten.gather.default:
            for leaf in tree_leaves((args, kwargs, result)):
                if isinstance(leaf, torch.Tensor):
                    self.total += leaf.nbytes
        return result


def bytes_moved(function):
    with BytesMoved() as counter:
        function()
    return counter.total


def few_shot(folder, rounds=3):
    """Score and update where each prompt runs once for its 8 answers, against once for each.

    Prompts of 58 tokens, answers of 7 on average. The second model has the layers of SmolLM2-135M,
    but only 4 of its 30: the head, which prompts do not pass, weighs more than there."""
    small = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=4,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    tiny_config = Qwen2Config(
        vocab_size=len(tiny.VOCAB), **tiny.SIZES["tiny"], num_key_value_heads=4
    )
    models = {
        "the default's model": (Qwen2ForCausalLM(tiny_config), 32),
        "4 layers of SmolLM2-135M": (LlamaForCausalLM(small), 8),
    }
    for name, (model, prompts) in models.items():
        ours = Policy(model.eval(), 1.0)
        rival = Policy(model, 1.0)
        rival.can_pack = False
        batch = few_shot_batch(prompts, model.config.vocab_size)
        pair = (
            functools.partial(score_and_update, ours, batch),
            functools.partial(score_and_update, rival, batch),
        )
        report(f"few_shot, {name}", *alternate(*pair, rounds=rounds), "cpu s")


def few_shot_batch(prompts, vocab, prompt_len=58, response_len=7):
    """What rollout.collate returns, of random tokens; responses of 3 to 2 * response_len - 3."""
    generator = np.random.default_rng(0)
    answers = []
    for _ in range(prompts):
        prompt = generator.integers(2, vocab, prompt_len).tolist()
        for _ in range(ANSWERS):
            count = generator.integers(3, 2 * response_len - 2)
            response = generator.integers(2, vocab, count).tolist()
            answer = dict(prompt=prompt, response=response, log_probs=[0.0] * count)
            answers.append(answer | dict(reward=0.0, group_accuracy=0.0))
    return collate(answers, torch.ones(len(answers)), "cpu")


def score_and_update(policy, batch):
    """The two passes of a step with one update, without the optimizer."""
    given = batch["ids"], batch["prompt_lens"], batch["response_mask"]
    with torch.no_grad():
        policy(*given, entropy.NEEDED_STATISTICS)
    policy(*given)["log_probs"].sum().backward()
    policy.zero_grad()


def padding(folder):
    """The share of padding in micro-batches of 16,384 tokens, sorted against random order.

    Lengths are log-normal: mean 600, at most 4,096.
    """
    budget = 16384
    generator = np.random.default_rng(0)
    for count in (256, 512):
        ours = []
        rival = []
        for _ in range(20):
            drawn = generator.lognormal(np.log(600) - 0.5, 1.0, count)
            lengths = np.clip(drawn, 1, 4096).astype(int).tolist()
            number = len(micro_batches(lengths, range(count), budget))
            split = even_micro_batches(lengths, range(count), budget, number)
            ours.append(padded_share(lengths, split))
            rival.append(padded_share(lengths, in_turn(lengths, budget)))
        report(f"padding, {count} answers an update", ours, rival, "share of tokens")


def in_turn(lengths, budget):
    """Micro-batches in the order of the rows."""
    batches = [[0]]
    for i in range(1, len(lengths)):
        longest = max(lengths[j] for j in (*batches[-1], i))
        if (len(batches[-1]) + 1) * longest > budget:
            batches.append([])
        batches[-1].append(i)
    return batches


def padded_share(lengths, batches):
    padded = sum(len(rows) * max(lengths[i] for i in rows) for rows in batches)
    return 1 - sum(lengths) / padded


def verifier(folder):
    """4,096 integer answers, one in eight right."""
    problems = [Problem("", str(i), "math") for i in range(4096)]
    responses = []
    for i in range(4096):
        responses.append(f"It follows that the answer is \\boxed{{{i + i % 8}}}.")
    start = time.perf_counter()
    verify.score(problems, responses)
    milliseconds = (time.perf_counter() - start) / 4.096
    report("verifier, integers, against 1 ms", [milliseconds], [1.0], "wall ms per answer")


def first_step(folder, rounds=3):
    """From typing the default command to the end of its first step.

    The base is cached; its evaluation is included.
    """
    tiny.base_model()
    seconds = []
    for name in map(str, range(rounds)):
        command = [sys.executable, "-m", "torch.distributed.run", "train.py", "--overwrite"]
        command += ["--out", str(folder), "--name", name]
        metrics = folder / name / "metrics.jsonl"
        start = time.perf_counter()
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(command, **quiet) as run:
            while not (metrics.exists() and '"step": 1' in metrics.read_text()):
                time.sleep(0.05)
            seconds.append(time.perf_counter() - start)
            run.terminate()  # torchrun ends its rank; killed, it would leave it running
    row = "first_step of the default command, against 15 s"
    report(row, seconds, [15.0] * rounds, "wall s")


# ---- whole steps ---------------------------------------------------------------------------------


def model_of(kind, folder):
    """The folder of a random model of the default's size, with one of CHANCE_OF_EOS."""
    vocab = len(tiny.VOCAB)
    end = tiny.VOCAB[tiny.EOS]
    pad = tiny.VOCAB[tiny.PAD]
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocab,
            **tiny.SIZES["tiny"],
            num_key_value_heads=4,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=end,
            pad_token_id=pad,
            tie_word_embeddings=False,
        )
    )
    chance = CHANCE_OF_EOS[kind]
    with torch.no_grad():
        # Coordinate 0 is the same for every token, so the head can read a constant from it.
        model.model.embed_tokens.weight[:, 0] = 1.0
        tokens = torch.randint(2, vocab, (64, 16))
        constant = model.model(tokens).last_hidden_state[..., 0].mean()
        model.lm_head.weight.zero_()
        model.lm_head.weight[end, 0] = np.log(chance * (vocab - 1) / (1 - chance)) / constant
        # PAD is never sampled: it marks the end of an answer.
        model.lm_head.weight[pad, 0] = -20 / constant
    model.save_pretrained(folder / kind)
    tiny.make_tokenizer().save_pretrained(folder / kind)
    return str(folder / kind)


def our_steps(arguments, folder, steps):
    """Processor and wall seconds per step of train.py; the first step does not count."""
    clock = []
    write = record.RunLog.write

    def timed_write(self, row):
        clock.append((time.process_time(), time.perf_counter()))
        write(self, row)

    prepare_environment()
    record.RunLog.write = timed_write
    more = f"--steps {steps} --out {folder} --overwrite --eval_data none"
    train.main(f"{arguments} {more}".split())
    record.RunLog.write = write
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]  # a later run sets them anew, and TRL would take them for its own
    return (np.array(clock[-1]) - clock[0]) / (steps - 1)


class Timed:
    """A function that notes the processor seconds of each call."""

    def __init__(self, function):
        self.function = function
        self.seconds = []

    def __call__(self, *args):
        start = time.process_time()
        result = self.function(*args)
        self.seconds.append(time.process_time() - start)
        return result

    def mean(self):
        """Without the first step, as in our_steps."""
        return np.mean(self.seconds[1:])


def steps_with_and_without_metrics(folder, steps):
    """Processor seconds per step of the default run, and less what the entropy metrics take in it.

    Old log-probs are needed without them too, so these are computed a second time, alone: only what
    the other statistics add counts, and that second time counts nowhere.
    """
    names = ("batch_statistics", "entropy_metrics", "entropy_after")
    real = {name: getattr(train, name) for name in names}
    timed = {name: Timed(real[name]) for name in names}
    alone = Timed(real["batch_statistics"])

    def batch_statistics(policy, batch, wanted, micro_batches):
        alone(policy, batch, ["log_probs"], micro_batches)
        return timed["batch_statistics"](policy, batch, wanted, micro_batches)

    train.batch_statistics = batch_statistics
    train.entropy_metrics = timed["entropy_metrics"]
    train.entropy_after = timed["entropy_after"]
    step = our_steps("--method grpo", folder, steps)[0]
    for name in names:
        setattr(train, name, real[name])
    in_all = sum(function.mean() for function in timed.values())
    return step - alone.mean(), step - alone.mean() - (in_all - alone.mean())


def entropy_metrics(folder, rounds=5):
    """The default run's step (ours), and less what the entropy metrics take in it.

    rival / ours = 1 - their share.
    """
    pairs = [steps_with_and_without_metrics(folder, 4) for _ in range(rounds)]
    report("entropy_metrics", *zip(*pairs), "cpu s per step")


def judge_half_flat(response, gold):
    """A reward with which about half of the groups are flat: 0 on every other prompt, and a coin,
    drawn from the answer, on the others."""
    return float(gold == "coin" and sum(response.encode()) % 2)


# The set of methods in train.py whose updates leave out answers without a gradient; GRPO is in it.
LEAVES_OUT = "NOTHING_AT_ZERO_ADVANTAGE"


def step(folder, rounds=5, steps=4):
    """Against TRL's GRPOTrainer, which must be installed: same model, prompts, lengths, rewards.

    About half of the groups are flat. Ours with and without leaving these out of the updates."""
    import trl

    verify.RULES["half_flat"] = judge_half_flat
    problems = []
    rows = []
    for i, problem in enumerate(tiny.problems("train", PROMPTS)):
        gold = ("flat", "coin")[i % 2]
        problems.append(Problem(problem.prompt, gold, "half_flat"))
        rows.append({"prompt": problem.prompt, "reward_model": {"ground_truth": gold}})
    data = folder / "problems.jsonl"
    data.write_text(record.json_lines(rows))
    for kind in CHANCE_OF_EOS:
        model = model_of(kind, folder)
        for updates in (1, 4):
            arguments = (
                f"--model {model} --data {data} --rule half_flat "
                f"--max_prompt_len 24 --max_response_len {LONGEST} "
                f"--group_size {ANSWERS} --prompts_per_step {PROMPTS} "
                f"--updates_per_rollout {updates} --micro_batch_tokens {STEP_BUDGET}"
            )
            some = []
            every = []
            rival = []
            for _ in range(rounds):
                some.append(our_steps(arguments, folder, steps))
                with patch.object(train, LEAVES_OUT, frozenset()):
                    every.append(our_steps(arguments, folder, steps))
                rival.append(trl_steps(model, problems, updates, steps))
            for ours, which in ((some, "flat groups left out"), (every, "all answers run")):
                row = f"step, {kind} answers, updates per rollout: {updates}, {which}"
                for i, unit in enumerate(("cpu s per step", "wall s per step")):
                    pair = [seconds[i] for seconds in ours], [seconds[i] for seconds in rival]
                    report(row, *pair, unit, rival_is=f"TRL {trl.__version__}")


def trl_steps(model, problems, updates, steps):
    """As our_steps: float32, no gradient checkpointing (TRL's fastest on CPU), no KL."""
    import trl
    from datasets import Dataset

    class Clock(TrainerCallback):
        def __init__(self):
            self.seconds = []

        def on_step_end(self, args, state, control, **_):
            self.seconds.append((time.process_time(), time.perf_counter()))

    def reward(completions, gold, **_):
        return [judge_half_flat(*pair) for pair in zip(completions, gold)]

    config = trl.GRPOConfig(
        output_dir=model + "-trl",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        beta=0.0,
        temperature=1.0,
        per_device_train_batch_size=PROMPTS * ANSWERS // updates,
        steps_per_generation=updates,
        gradient_accumulation_steps=1,
        num_generations=ANSWERS,
        max_completion_length=LONGEST,
        max_steps=steps * updates,
        learning_rate=1e-6,
        top_p=1.0,
        top_k=0,
        report_to="none",
        save_strategy="no",
        logging_steps=10**6,
        disable_tqdm=True,
    )
    data = Dataset.from_list([{"prompt": p.prompt, "gold": p.answer} for p in problems])
    clock = Clock()
    trainer = trl.GRPOTrainer(
        Qwen2ForCausalLM.from_pretrained(model, dtype=torch.float32),
        reward,
        config,
        data,
        processing_class=AutoTokenizer.from_pretrained(model),
        callbacks=[clock],
    )
    trainer.train()
    ends = np.array(clock.seconds[updates - 1 :: updates])
    return (ends[-1] - ends[0]) / (steps - 1)


# ---- sampling ------------------------------------------------------------------------------------


def sampling(folder):
    """Against transformers' generate and, where it is installed, vLLM."""
    dist.init_process_group("gloo")  # vLLM joins it, and ends it
    for kind in CHANCE_OF_EOS:
        path = model_of(kind, folder)
        model = Qwen2ForCausalLM.from_pretrained(path, dtype=torch.float32)
        own = Sampler("torch", path, model)
        unit = "cpu s per token"
        found = alternate(own, Generate(model))
        report(f"sampling, {kind} answers, against generate", *found, unit)
        if find_spec("vllm"):
            found = alternate(own, Sampler("vllm", path, model))
            report(f"sampling, {kind} answers, against vLLM", *found, unit)


def sampling_prompts():
    return [problem.prompt for problem in tiny.problems("train", PROMPTS)]


class Sampler:
    """One of our engines: a call samples the answers and returns their tokens."""

    def __init__(self, name, path, model):
        self.prompts = tiny.make_tokenizer()(sampling_prompts())["input_ids"]
        self.engine = make_engine(
            name,
            path,
            dtype=torch.float32,
            device="cpu",
            max_model_len=64,
            stop_ids={tiny.VOCAB[tiny.EOS]},
        )
        self.engine.push_weights(full_tensors(model))

    def __call__(self):
        answers, _, _ = self.engine.generate(
            self.prompts,
            n=ANSWERS,
            max_tokens=LONGEST,
            temperature=1.0,
            seeds=range(0, PROMPTS * ANSWERS, ANSWERS),
        )
        return sum(map(len, answers))


class Generate:
    """The same by transformers' generate."""

    def __init__(self, model):
        self.model = model
        self.padded = tiny.make_tokenizer()(
            sampling_prompts(), padding=True, padding_side="left", return_tensors="pt"
        )

    def __call__(self):
        out = self.model.generate(
            **self.padded,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            max_new_tokens=LONGEST,
            num_return_sequences=ANSWERS,
        )
        responses = out[:, self.padded["input_ids"].shape[1] :]
        return int((responses != tiny.VOCAB[tiny.PAD]).sum())


# ---- command line --------------------------------------------------------------------------------

ROWS = {
    "log_probs": log_probs,
    "statistics": statistics_of_tokens,
    "few_shot": few_shot,
    "padding": padding,
    "entropy_metrics": entropy_metrics,
    "verifier": verifier,
    "first_step": first_step,
    "sampling": sampling,
    "step": step,  # only where it is named: it needs TRL
}


def main():
    torch.set_num_threads(1)
    names = sys.argv[1:] or [name for name in ROWS if name != "step"]
    for name in names:
        with tempfile.TemporaryDirectory() as temporary:
            prepare_environment()
            ROWS[name](Path(temporary))


if __name__ == "__main__":
    main()
