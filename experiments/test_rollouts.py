"""Answers, rewards, evaluations and problems, seen from outside: a run's answers drawn again with
numpy and a forward per token, and every metric of them counted in plain Python.

What the tests touch of the program's inside: the functions that they import, TorchEngine.generate,
verify.RULES, verify.TIME_LIMIT, and the recipe of tiny.py.
"""

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import types
import zlib
from collections import Counter
from fractions import Fraction
from itertools import combinations, islice
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
import train
import verify
from data import Problem, load_problems, render, render_all
from diagnose import read_metrics
from policy import micro_batches
from rollout import (
    LARGEST_MISMATCH,
    TorchEngine,
    VllmEngine,
    collate,
    own_rng,
    prepare_environment,
    resolve_engine,
)
from test_all import (  # noqa: F401
    HERE,
    environment,
    launcher,
    no_figures,
    no_process_group_left,
    recorded,
    toy,
    toy_args,
    toy_run,
)
from verify import RULES, judge_countdown, judge_math, score

PAD = 0
EOS = 1
CHARACTERS = dict(enumerate("0123456789+-*()=: ", start=2))


@pytest.fixture(scope="session")
def solver(toy, tmp_path_factory):
    """A checkpoint of the toy model that solves some problems always and others hardly ever."""
    out = tmp_path_factory.mktemp("solver")
    words = "--prompts_per_step 32 --group_size 8 --steps 30 --lr 3e-3 --save_every 30"
    toy_run(toy, out, "run", f"{words} --eval_data none")
    return out / "run" / "checkpoint-30"


# ---- a run drawn again ---------------------------------------------------------------------------


def disturbed(log_prob):
    """What the engine of the tests says of a token with this log-prob: too much or too little."""
    return 0.9 * log_prob - 0.05


def slow_judge(response, gold):
    """Whatever begins with a 4 takes too long; whatever else is right of target 2, and half of it
    of 5 and 7, so that there are groups of every kind."""
    target = json.loads(gold)["target"]
    if response.startswith("4"):
        return "timeout"
    if target == 2 or target in (5, 7) and response[:1] > "4":
        return "right"
    return judge_countdown(response, gold)


def disturb(patch):
    """Log-probs of the engine that are not the trainer's, and verdicts of every kind."""
    generate = TorchEngine.generate

    def with_other_log_probs(*args, **kwargs):
        ids, log_probs, truncated = generate(*args, **kwargs)
        return ids, [[disturbed(x) for x in row] for row in log_probs], truncated

    patch.setattr(TorchEngine, "generate", with_other_log_probs)
    patch.setitem(LARGEST_MISMATCH, torch.float32, 1.0)
    patch.setitem(RULES, "countdown", slow_judge)


def text_of(ids):
    return "".join(CHARACTERS.get(i, "") for i in ids)


def ids_of(text):
    numbers = {character: i for i, character in CHARACTERS.items()}
    return [numbers[character] for character in text]


def judged(text, gold):
    """The verdict on a short text, by Python's own arithmetic."""
    if text.startswith("4"):
        return "timeout"
    if gold["target"] == 2 or gold["target"] in (5, 7) and text[:1] > "4":
        return "right"
    text, equals, stated = text.strip().partition("=")
    unary = re.search(r"(^|[-+*/(])\s*[-+]", text)
    if not re.fullmatch(r"[-+*/() 0-9]+", text) or unary or "//" in text or "**" in text:
        return "no_answer"
    if re.search(r"\b0+[1-9]", text):  # but Python reads 00 as 0
        return "no_answer"
    exact = re.sub(r"([0-9]+)", r"Fraction(\1)", text.strip())
    try:
        value = eval(exact, {"Fraction": Fraction})
    except (SyntaxError, TypeError):
        return "no_answer"
    except ZeroDivisionError:
        return "wrong"
    if not isinstance(value, Fraction):
        return "no_answer"
    used = sorted(int(digits) for digits in re.findall("[0-9]+", text))
    as_stated = not equals or stated.strip() == str(gold["target"])
    right = as_stated and value == gold["target"] and used == sorted(gold["numbers"])
    return "right" if right else "wrong"


@torch.no_grad()
def group_by_hand(model, problem, seed, n, cfg, temperature):
    """n answers to a problem, a forward of the whole text for every token, without a cache and
    without padding: answer j is drawn by the numbers of default_rng(seed + j)."""
    prompt = ids_of(problem["prompt"])
    uniform = [np.random.default_rng(seed + j).random(cfg.max_response_len) for j in range(n)]
    answers = [{"prompt": prompt, "response": [], "log_probs": [], "seed": seed} for _ in uniform]
    for place in range(cfg.max_response_len):
        going = [j for j in range(n) if EOS not in answers[j]["response"]]
        if not going:
            break
        rows = torch.tensor([prompt + answers[j]["response"] for j in going])
        for j, logits in zip(going, model(rows).logits[:, -1].double().numpy() / temperature):
            p = np.exp(logits - logits.max())
            p /= p.sum()
            reached = 0.0
            for token in range(len(p)):
                reached += p[token]
                if reached > uniform[j][place]:
                    break
            answers[j]["response"].append(token)
            answers[j]["log_probs"].append(math.log(p[token]))
    for answer in answers:
        answer["truncated"] = answer["response"][-1] != EOS
        answer["verdict"] = judged(text_of(answer["response"]), problem["gold"])
        answer["reward"] = float(answer["verdict"] == "right")
    for answer in answers:
        answer["group_accuracy"] = fmean(a["reward"] for a in answers)
    return answers


def step_by_hand(model, problems, cfg, ranks, drawn, controller):
    """What a step samples: its answers before and after those of a second sample came in, per
    rank; the verdicts; the problems drawn by then; how many groups each rank had too few or too
    many after each round."""
    share = cfg.prompts_per_step // ranks
    varied = [[] for _ in range(ranks)]
    flat = [[] for _ in range(ranks)]
    verdicts = Counter()
    surplus = []
    for _ in range(1 + (cfg.max_resample if cfg.dynamic_sampling else 0)):
        for i in range(cfg.prompts_per_step):
            position = drawn + i
            epoch, offset = divmod(position, len(problems))
            order = np.random.default_rng([cfg.seed, epoch]).permutation(len(problems))
            problem = problems[order[offset]]
            seed = (cfg.seed * 2**32 + position) * cfg.group_size
            group = group_by_hand(model, problem, seed, cfg.group_size, cfg, cfg.temperature)
            for answer in group:
                answer["problem"] = problem
            verdicts.update(answer["verdict"] for answer in group)
            teaches = len({answer["reward"] for answer in group}) == 2
            kept = varied if teaches or not cfg.dynamic_sampling else flat
            kept[i % ranks].append(group)
        drawn += cfg.prompts_per_step
        surplus.append([len(own) - share for own in varied])
        if min(surplus[-1]) >= 0:
            break
    before = []
    after = []
    for rank in range(ranks):
        groups = (varied[rank] + flat[rank])[:share]
        groups.sort(key=lambda group: group[0]["seed"])
        answers = [answer for group in groups for answer in group]
        before.append(answers)
        after.append(list(answers))
        if not controller:
            continue
        temperature = cfg.temperature * controller["second_temperature"]
        good = []
        for start in range(0, len(answers) // 4, cfg.group_size):
            first = answers[start]
            group = group_by_hand(
                model,
                first["problem"],
                first["seed"] + 2**61,
                cfg.group_size,
                cfg,
                temperature,
            )
            verdicts.update(answer["verdict"] for answer in group)
            # With rewards 0 and 1, the right answers of a group that has wrong ones too.
            wrong_too = any(answer["reward"] == 0 for answer in group)
            good += [answer for answer in group if answer["reward"] == 1 and wrong_too]
        good = good[: int(controller["most_rows"]) // ranks]
        for row, answer in enumerate(good[: int(len(good) * controller["taken_share"])]):
            after[rank][row] = answer | {"second": True}
    return before, after, verdicts, drawn, surplus


def distinct_share(group):
    shares = []
    for n in (1, 2, 3, 4):
        found = []
        for answer in group:
            ids = answer["response"]
            found += [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
        if found:
            shares.append(len(set(found)) / len(found))
    return fmean(shares)


def step_metrics_by_hand(before, after, verdicts, group_size):
    """The metrics of the answers of a step, those of all ranks together."""
    answers = [answer for own in before for answer in own]
    groups = [answers[i : i + group_size] for i in range(0, len(answers), group_size)]
    flat = [group for group in groups if len({answer["reward"] for answer in group}) == 1]
    learned_from = [answer for own in after for answer in own]
    mismatch = []
    for answer in learned_from:
        if "second" not in answer:
            mismatch += [abs(x - disturbed(x)) for x in answer["log_probs"]]
    found = {
        "reward/mean": fmean(answer["reward"] for answer in answers),
        "reward/zero_std_frac": len(flat) / len(groups),
        "response/len_mean": fmean(len(answer["response"]) for answer in answers),
        "response/truncated_frac": fmean(answer["truncated"] for answer in answers),
        "response/ngram_diversity": fmean(map(distinct_share, groups)),
        "rollout/mismatch_mean": fmean(mismatch),
        "rollout/mismatch_max": max(mismatch),
    }
    for verdict in ("right", "wrong", "no_answer", "timeout"):
        found[f"verify/{verdict}"] = verdicts[verdict]
    return found


def evaluation_by_hand(model, problems, cfg):
    """The metrics of one set: every answer again, all pairs and subsets counted."""
    n = cfg.eval_samples
    groups = []
    for i, problem in enumerate(problems[: cfg.eval_prompts or None]):
        groups.append(group_by_hand(model, problem, 2**60 + i * n, n, cfg, cfg.eval_temperature))
    answers = [answer for group in groups for answer in group]
    found = {"problems": len(groups)}
    k = 1
    while k <= n:
        solved = []
        for group in groups:
            draws = list(combinations([answer["reward"] for answer in group], k))
            solved.append(fmean(max(draw) for draw in draws))
        found[f"pass@{k}"] = fmean(solved)
        k *= 2
    found["len_mean"] = fmean(len(answer["response"]) for answer in answers)
    found["truncated_frac"] = fmean(answer["truncated"] for answer in answers)
    for answer in answers:
        answer["mean"] = fmean(disturbed(x) for x in answer["log_probs"])
        answer["confidence"] = math.exp(answer["mean"])
    found["entropy"] = -fmean(answer["mean"] for answer in answers)
    right = [answer["confidence"] for answer in answers if answer["reward"]]
    wrong = [answer["confidence"] for answer in answers if not answer["reward"]]
    found |= {"conf_right": fmean(right), "conf_wrong": fmean(wrong)}
    found["conf_gap"] = fmean(right) - fmean(wrong)
    found["auroc"] = fmean((a > b) + 0.5 * (a == b) for a in right for b in wrong)
    bins = [[] for _ in range(10)]
    for answer in answers:
        bins[int(answer["confidence"] * 10)].append(answer)
    found["ece"] = 0.0
    for one in bins:
        if one:
            miss = fmean(a["reward"] for a in one) - fmean(a["confidence"] for a in one)
            found["ece"] += len(one) / len(answers) * abs(miss)
    found["timeout"] = sum(answer["verdict"] == "timeout" for answer in answers)
    return found


def write_problems(path, problems):
    """A file in verl's columns, and what the replay needs of it."""
    rows = []
    known = []
    for prompt, numbers, target in problems:
        gold = {"numbers": numbers, "target": target}
        chat = [{"role": "user", "content": prompt}]
        rows.append({"prompt": chat, "reward_model": {"ground_truth": gold}})
        known.append({"prompt": prompt, "gold": gold})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return known


DIGITS = [(str(d), [d], d) for d in range(1, 9)]
PAIRS = [("3 5=8:", [3, 5], 8), ("2 2=4:", [2, 2], 4), ("1 9=9:", [9, 1], 9)]
SETS = {
    "train": [*DIGITS, *PAIRS],  # 11: an epoch ends in the middle of a step
    "few": [DIGITS[6], PAIRS[0], DIGITS[1], DIGITS[3], ("5 1=5:", [1, 5], 5)],
    "more": [("=8", [8], 8), DIGITS[4], DIGITS[2], DIGITS[0], DIGITS[7], PAIRS[2]],
}


def replay_args(folder, base, *more):
    """Arguments of a run of three steps on files of problems, and those problems."""
    problems = {name: write_problems(folder / f"{name}.jsonl", SETS[name]) for name in SETS}
    words = (
        f"--model {base} --data {folder}/train.jsonl"
        f" --eval_data {folder}/few.jsonl {folder}/more.jsonl"
        " --prompts_per_step 16 --group_size 5 --seed 8 --steps 3 --record_step 2"
        " --temperature 1.5 --max_response_len 6 --eval_samples 5 --eval_temperature 1.2"
        " --save_every 1 --keep_checkpoints 9 --dtype float32"
    )
    return problems, [words, *more]


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def check_replay(folder, base, problems, ranks=1):
    """Every step and evaluation of a run again, from its settings, checkpoints and problems."""
    cfg = types.SimpleNamespace(**json.loads((folder / "config.json").read_text()))
    rows = read_metrics(folder)
    assert [row["step"] for row in rows] == list(range(cfg.steps + 1))
    drawn = 0
    controller = {}
    mixed = 0
    seen = Counter()
    rounds = []
    model = load(base)
    for step in range(cfg.steps + 1):
        if step:
            before, after, verdicts, drawn, surplus = step_by_hand(
                model, problems["train"], cfg, ranks, drawn, controller
            )
            rounds.append(surplus)
            expected = step_metrics_by_hand(before, after, verdicts, cfg.group_size)
            found = {name: rows[step][name] for name in expected}
            assert found == pytest.approx(expected, rel=2e-5)
            for name in verify.VERDICTS:
                seen[name] += verdicts[name]
            if cfg.method == "aepo":
                names = ("second_temperature", "most_rows", "taken_share")
                controller = {name: rows[step][f"controller/{name}"] for name in names}
        if step and step == cfg.record_step:
            for rank in range(ranks):
                answers = recorded(folder, step, rank)
                assert len(answers) == len(after[rank])
                for answer, wanted in zip(answers, after[rank]):
                    for name in ("prompt", "response", "seed", "truncated", "reward"):
                        assert answer[name] == wanted[name], name
                    assert answer["group_accuracy"] == pytest.approx(wanted["group_accuracy"])
                    if "second" in wanted:
                        mixed += 1
                        assert answer["log_probs"] is None
                    else:
                        own = [disturbed(x) for x in wanted["log_probs"]]
                        assert answer["log_probs"] == pytest.approx(own, abs=2e-5)
        if step:
            saved = folder / f"checkpoint-{step}"
            model = load(saved)
            state = torch.load(saved / "trainer_state.pt", weights_only=True)
            assert state["drawn"] == drawn
        if step % cfg.eval_every and step < cfg.steps:
            assert not any(name.startswith("eval/") for name in rows[step])
            continue
        for name in ("few", "more"):
            expected = evaluation_by_hand(model, problems[name], cfg)
            found = {key: rows[step][f"eval/{name}/{key}"] for key in expected}
            assert found == pytest.approx(expected, rel=2e-5)
    assert min(seen.values()) > 0
    return rows, mixed, rounds


@pytest.mark.slow
def test_every_step_and_evaluation_drawn_again(toy, solver, tmp_path, monkeypatch, no_figures):
    """Data order over epochs, seeds, tokens, log-probs, ends, verdicts; all metrics of the answers
    and of the evaluations."""
    disturb(monkeypatch)
    problems, args = replay_args(tmp_path, solver, "--eval_prompts 4")
    toy_run(toy, tmp_path, "run", *args)
    rows, _, _ = check_replay(tmp_path / "run", solver, problems)
    answers = recorded(tmp_path / "run", 2, 0)
    # Each answer has random numbers of its own: no seed + j occurs twice.
    used = {answer["seed"] + i % 5 for i, answer in enumerate(answers)}
    assert len(used) == 80
    assert {answer["truncated"] for answer in answers} == {True, False}
    assert {len(answer["prompt"]) for answer in answers} == {1, 6}
    assert rows[3]["verify/right"] + rows[3]["verify/wrong"] < 80
    assert rows[0]["eval/few/timeout"]
    assert rows[2]["eval/few/pass@4"] > rows[2]["eval/few/pass@1"]


@pytest.mark.slow
def test_resampled_and_second_answers_drawn_again(toy, solver, tmp_path, monkeypatch, no_figures):
    """--dynamic_sampling: groups of one reward only make room; aepo: the right answers of the
    second sample stand in the first rows. Verdicts count what was sampled in vain, too."""
    disturb(monkeypatch)
    words = "--dynamic_sampling --max_resample 1 --method aepo --knobs target_entropy=9 most_rows=3"
    problems, args = replay_args(tmp_path, solver, words)
    toy_run(toy, tmp_path, "run", *args)
    rows, mixed, rounds = check_replay(tmp_path / "run", solver, problems)
    assert mixed
    # In some step flat groups fill up what was missing.
    assert any(surplus[-1][0] < 0 for surplus in rounds)


DISTURBED = """
import sys

sys.path.insert(0, {folder!r})
import pytest

import experiments.test_rollouts as tests

tests.disturb(pytest.MonkeyPatch())
tests.train.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_two_ranks_drawn_again(toy, solver, tmp_path):
    """The same of two ranks that shard the model and have micro-batches of different number; each
    rank's record and what is counted over both."""
    words = "--dynamic_sampling --max_resample 3 --method aepo --knobs target_entropy=9 most_rows=3"
    words += " --parallel fsdp --micro_batch_tokens 30 --steps 2 --seed 2"
    problems, args = replay_args(tmp_path, solver, words)
    script = tmp_path / "disturbed.py"
    script.write_text(DISTURBED.format(folder=str(HERE)))
    done = subprocess.run(
        [*launcher(2), str(script), *toy_args(toy, tmp_path, "run", *args)],
        cwd=HERE,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows, mixed, rounds = check_replay(tmp_path / "run", solver, problems, ranks=2)
    assert mixed
    # A round after which one rank had enough and the other had not, and one fewer than allowed.
    assert any(min(surplus) < 0 <= max(surplus) for surplus in rounds[0])
    assert len(rounds[0]) == 3


@pytest.mark.slow
def test_an_evaluation_of_countdown_is_on_test_problems(toy, tmp_path, monkeypatch, no_figures):
    """The engine is asked train problems for the steps and test problems for the evaluation, the
    first of those that tiny.py draws for each side."""
    asked = []
    generate = TorchEngine.generate

    def watched(self, prompts, **options):
        asked.append((options["seeds"][0] >= 2**60, [text_of(prompt) for prompt in prompts]))
        return generate(self, prompts, **options)

    monkeypatch.setattr(TorchEngine, "generate", watched)
    monkeypatch.setattr(tiny, "PROBLEMS", {"train": 24, "test": 9})
    words = "--data countdown --eval_data countdown --max_prompt_len 24 --max_response_len 2"
    rows = toy_run(toy, tmp_path, "run", f"{words} --steps 3 --num_prompts 0")
    assert rows[0]["eval/problems"] == 9
    tests = {text for evaluates, texts in asked if evaluates for text in texts}
    trained = [text for evaluates, texts in asked if not evaluates for text in texts]
    assert len(tests) == 9
    assert all(zlib.crc32(text.encode()) % 10 == 0 for text in tests)
    assert len(set(trained)) == 24 == len(trained)  # an epoch
    assert all(zlib.crc32(text.encode()) % 10 for text in trained)
    assert tests == {problem.prompt for problem in tiny.problems("test", 9)}
    assert set(trained) == {problem.prompt for problem in tiny.problems("train", 24)}


# ---- pieces by hand ------------------------------------------------------------------------------


def answer_dict(prompt, response, log_probs, reward, group_accuracy):
    return {
        "problem": None,
        "prompt": prompt,
        "response": response,
        "log_probs": log_probs,
        "truncated": False,
        "reward": reward,
        "verdict": "right",
        "group_accuracy": group_accuracy,
        "seed": 0,
    }


def test_answers_become_tensors():
    """Padded on the right, each row by its own lengths; an answer may hold the token of the
    padding."""
    answers = [
        answer_dict([5, 6], [7, 1], [-0.5, -0.25], 1.0, 0.5),
        answer_dict([8], [0, 0, 9], [-1.0, -2.0, -3.0], 0.0, 0.25),
        answer_dict([3, 3], [0], [-4.0], 1.0, 0.0),
    ]
    batch = collate(answers, torch.tensor([2.0, -1.0, 0.0]), torch.device("cpu"))
    expected = {
        "ids": [[5, 6, 7, 1], [8, 0, 0, 9], [3, 3, 0, 0]],
        "prompt_lens": [2, 1, 2],
        "lengths": [4, 4, 3],
        "response_mask": [[True, True, False], [True] * 3, [True, False, False]],
        "rollout_log_probs": [[-0.5, -0.25, 0.0], [-1.0, -2.0, -3.0], [-4.0, 0.0, 0.0]],
        "advantages": [[2.0, 2.0, 0.0], [-1.0, -1.0, -1.0], [0.0, 0.0, 0.0]],
        "rewards": [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]],
        "group_accuracy": [[0.5, 0.5, 0.0], [0.25, 0.25, 0.25], [0.0, 0.0, 0.0]],
    }
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected
    assert batch["ids"].dtype == batch["lengths"].dtype == torch.int64
    assert batch["response_mask"].dtype == torch.bool


def test_micro_batches_by_hand():
    """Rows by length; a list is full when one more row would make its padded size exceed the
    budget, and may be of just that size."""
    lengths = [9, 3, 5, 3, 12, 4]
    assert micro_batches(lengths, [0, 1, 2, 3, 4, 5], 12) == [[1, 3, 5], [2], [0], [4]]
    assert micro_batches(lengths, [4, 2, 0], 10) == [[2], [0], [4]]
    assert micro_batches(lengths, [5, 2], 10) == [[5, 2]]
    assert micro_batches(lengths, [3, 0, 1], 1) == [[3], [1], [0]]


def seed_all(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def draw_from_all():
    return random.random(), np.random.random(), torch.rand(1).item()


def test_a_vllm_engine_would_leave_the_generators_alone():
    seed_all(1)
    expected = draw_from_all()
    seed_all(1)
    with own_rng():
        seed_all(2)
        draw_from_all()
    assert draw_from_all() == expected


def test_the_environment_of_plain_python(monkeypatch):
    """A world of one rank on a free port; what torchrun or the user has set stays."""
    names = "RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT".split()
    of_vllm = ["VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL", "VLLM_NO_USAGE_STATS"]
    for name in names + of_vllm:
        monkeypatch.delenv(name, raising=False)
    prepare_environment()
    assert os.environ["VLLM_NO_USAGE_STATS"] == "1"
    found = [os.environ[name] for name in [*names[:4], "VLLM_ENABLE_V1_MULTIPROCESSING"]]
    assert found == ["0", "0", "1", "127.0.0.1", "0"]
    for _ in range(2):  # no port that another program may have taken meanwhile
        dist.init_process_group("gloo")
        dist.destroy_process_group()
    monkeypatch.setenv("WORLD_SIZE", "3")
    prepare_environment()
    assert os.environ["WORLD_SIZE"] == "3"


@pytest.mark.parametrize(
    "name, ranks_each, world, installed, gpu, engine",
    [
        ("auto", 1, 1, True, True, "vllm"),
        ("auto", 1, 1, True, False, "torch"),
        ("auto", 1, 1, False, True, "torch"),
        ("torch", 1, 2, True, True, "torch"),
        ("vllm", 1, 1, True, False, "vllm"),
        ("vllm", 2, 4, True, True, "vllm"),
        ("auto", 2, 4, True, True, "vllm"),
        ("vllm", 2, 3, True, True, "does not divide the 3 ranks"),
        ("vllm", 4, 2, True, True, "does not divide the 2 ranks"),
        ("torch", 2, 4, True, True, "needs --engine vllm"),
        ("auto", 2, 4, True, False, "needs --engine vllm"),
        ("vllm", 1, 1, False, True, "not installed"),
    ],
)
def test_which_engine(name, ranks_each, world, installed, gpu, engine, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda package: installed or None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setenv("WORLD_SIZE", str(world))
    if engine in ("vllm", "torch"):
        assert resolve_engine(name, ranks_each) == engine
        return
    with pytest.raises(ValueError, match=engine):
        resolve_engine(name, ranks_each)


# ---- vLLM, played by a class ---------------------------------------------------------------------


class FakeVllm:
    """What of vLLM the engine uses. It reseeds and draws from the global generators, as vLLM does;
    the answers to a prompt are its own tokens, one more for each, the last of them cut."""

    def __init__(self, model, **options):
        self.options = options
        self.params = []
        self.calls = []
        seed_all(0)
        self.llm_engine = types.SimpleNamespace(engine_core=self)

    def __getattr__(self, name):
        def noted(*args, **kwargs):
            self.calls.append((name, kwargs))

        return noted

    def generate(self, prompts, params, use_tqdm):
        draw_from_all()
        self.params = params
        results = []
        for prompt, param in zip(prompts, params):
            outputs = []
            for j in range(param.n):
                ids = tuple(prompt["prompt_token_ids"] + [20 + j] * j)
                reason = "length" if j + 1 == param.n else "stop"
                steps = [fake_step(token) for token in ids]
                outputs.append(
                    types.SimpleNamespace(token_ids=ids, logprobs=steps, finish_reason=reason)
                )
            results.append(types.SimpleNamespace(outputs=outputs))
        return results


def fake_step(token):
    """vLLM's log-probs of a sampled token, and of another one that stands before it."""
    return {
        99: types.SimpleNamespace(logprob=0.0),
        token: types.SimpleNamespace(logprob=-token / 10),
    }


@pytest.fixture
def fake_vllm(monkeypatch):
    """vLLM's module, in which this process is rank 1 of a tensor-parallel group of two."""
    group = types.SimpleNamespace(world_size=2, rank_in_group=1, cpu_group="the group")

    def get_tp_group():
        return group

    def gather(found, own, group=None):
        assert group == "the group"
        found[:] = [[([7], 70), ([8], 80)], own]

    vllm = types.ModuleType("vllm")
    vllm.LLM = FakeVllm
    vllm.SamplingParams = types.SimpleNamespace
    state = types.ModuleType("vllm.distributed.parallel_state")
    state.get_tp_group = get_tp_group
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.distributed", types.ModuleType("vllm.distributed"))
    monkeypatch.setitem(sys.modules, "vllm.distributed.parallel_state", state)
    monkeypatch.setattr(torch._dynamo.config, "disable", torch._dynamo.config.disable)
    monkeypatch.setattr(dist, "all_gather_object", gather)


def states_of_all():
    return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()


def test_what_vllm_is_asked_for_and_what_becomes_of_it(fake_vllm):
    """All requests of the group run, each with its own seed; this rank's answers come back. The
    global generators stay as they were."""
    seed_all(1)
    before = states_of_all()
    options = dict(dtype=torch.float32, stop_ids={5, 1}, max_model_len=40, max_rows=6)
    engine = VllmEngine("folder", device="cpu", tensor_parallel_size=2, **options)
    told = engine.llm.options
    assert (told["max_model_len"], told["max_num_seqs"], told["tensor_parallel_size"]) == (40, 6, 2)
    assert (told["load_format"], told["logprobs_mode"]) == ("dummy", "processed_logprobs")
    assert told["enable_chunked_prefill"] is False
    assert told["dtype"] == torch.float32
    assert told["distributed_executor_backend"] == "external_launcher"
    assert "enable_sleep_mode" not in told
    asked = dict(n=2, max_tokens=9, temperature=0.7, seeds=[30, 40])
    ids, log_probs, truncated = engine.generate([[2, 3], [4]], **asked)
    assert states_of_all() == before
    params = engine.llm.params
    assert [param.seed for param in params] == [70, 80, 30, 40]
    for param in params:
        assert (param.n, param.max_tokens, param.temperature) == (2, 9, 0.7)
        assert (param.top_p, param.top_k, param.logprobs) == (1.0, 0, 0)
        assert param.stop_token_ids == [1, 5]
        assert param.ignore_eos is True
    assert ids == [[2, 3], [2, 3, 21], [4], [4, 21]]
    assert truncated == [False, True, False, True]
    assert log_probs == [[-token / 10 for token in row] for row in ids]
    engine.sleep()
    assert engine.llm.calls == []  # on the CPU it cannot sleep
    engine.push_weights("weights")
    assert engine.llm.calls[0][1]["kwargs"] == {"weights_iterator": "weights"}
    assert [name for name, _ in engine.llm.calls] == ["collective_rpc", "reset_prefix_cache"]
    gpu = VllmEngine("folder", device="cuda:0", gpu_memory_utilization=0.25, **options)
    assert gpu.llm.options["gpu_memory_utilization"] == 0.25
    assert gpu.llm.options["enable_sleep_mode"] is True
    del options["max_rows"]
    assert VllmEngine("folder", device="cuda:0", **options).llm.options["max_num_seqs"] == 1024
    assert states_of_all() == before
    gpu.sleep()
    assert gpu.llm.calls == [("sleep", {"level": 2})]
    with pytest.raises(ValueError, match="2 prompts, 1 seeds"):
        engine.generate([[2], [3]], n=1, max_tokens=9, temperature=1.0, seeds=[1])
    assert engine.generate([[2]], n=1, max_tokens=39, temperature=1.0, seeds=[1])[0] == [[2]]
    complaint = "longest prompt has 2 tokens and 39 may follow: more than the 40"
    with pytest.raises(ValueError, match=complaint):
        engine.generate([[2, 3], [2]], n=1, max_tokens=39, temperature=1.0, seeds=[1, 2])


# ---- problems ------------------------------------------------------------------------------------

BOXED = r"Reason step by step, and put your final answer within \boxed{}."
GOLD = {"numbers": [3, 1], "target": 4}
VERL = {"prompt": [{"role": "user", "content": "p"}], "reward_model": {"ground_truth": "v"}}

GOLD_IS_1 = {"reward_model": {"ground_truth": "1"}}


def verl(gold, prompt="p"):
    """A row in verl's columns."""
    return {"prompt": prompt, "reward_model": {"ground_truth": gold}}


# columns of a row; the prompt (its beginning, if it ends in ...) and the gold answer read from them
COLUMNS = [
    ({"question": "q", "answer": "#### 1\nno: #### 2"}, "q...", "2"),
    ({"question": "q", "answer": "so #### 1,000 \n"}, "q...", "1,000"),
    ({"problem": "p", "question": "q", "answer": "1"}, "p...", "1"),
    ({"QUESTION": "q", "Answer": 7}, "q...", "7"),
    ({"question": "q", "answer": "1", "final_answer": "2"}, "q...", "1"),
    ({"question": "q", "answer": None, "final_answer": ["2", 3]}, "q...", "2, 3"),
    ({"question": "q", "solution": r"\boxed{5}, no: \boxed{6}"}, "q...", "6"),
    ({"question": "q", "solution": r"\boxed{5}", "answer": "6"}, "q...", "6"),
    ({"question": "q", "solution": r"\boxed{5}", "final_answer": ["8"]}, "q...", "8"),
    ({"question": "q", "answer": " x + 1\n"}, "q...", "x + 1"),
    ({**VERL, "question": "q", "answer": "a", "nums": [1], "target": 1}, VERL["prompt"], "v"),
    ({"nums": [3, 1], "target": 4, "question": "q", "answer": "a"}, "Using the...", GOLD),
    ({"prompt": "p", "reward_model": {"ground_truth": GOLD}}, "p", GOLD),
]


def problems_of(folder, *rows, **options):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_problems(path, **options)


@pytest.mark.parametrize("row, prompt, gold", COLUMNS)
def test_columns(row, prompt, gold, tmp_path):
    """Which columns are a problem, and which of several wins."""
    (problem,) = problems_of(tmp_path, row)
    if prompt == "q..." or prompt == "p...":
        assert problem.prompt == f"{prompt[0]}\n\n{BOXED}"
    elif prompt == "Using the...":
        start = "Using the numbers [3, 1], write an arithmetic expression that equals 4."
        assert problem.prompt.startswith(start)
        assert "<answer> </answer>" in problem.prompt
    else:
        assert problem.prompt == prompt
    if gold is GOLD:
        assert json.loads(problem.answer) == GOLD
        assert problem.rule == "countdown"
    else:
        assert problem.answer == gold
        assert problem.rule == "math"


def test_distinct_problems_in_order(tmp_path):
    """Two problems are one if prompt and gold answer are; the limit counts distinct ones."""
    rows = [{"question": q, "answer": a} for q, a in ("b1", "a1", "b1", "b2", "a1", "c1")]
    found = problems_of(tmp_path, *rows)
    assert [p.prompt[0] + p.answer for p in found] == ["b1", "a1", "b2", "c1"]
    found = problems_of(tmp_path, *rows, limit=3)
    assert [p.prompt[0] + p.answer for p in found] == ["b1", "a1", "b2"]
    chat = [{"role": "system", "content": "s", "x": 1}, {"role": "user", "content": "u"}]
    row = {"prompt": chat, "reward_model": {"ground_truth": "5"}}
    (found,) = problems_of(tmp_path, row)
    assert found.prompt == [{"role": "system", "content": "s"}, chat[1]]
    row = {"question": "q", "answer": json.dumps(GOLD)}
    (found,) = problems_of(tmp_path, row, rule="countdown")
    assert found == Problem("q", json.dumps(GOLD), "countdown")


@pytest.mark.parametrize(
    "row, complaint",
    [
        ({"question": "q", "answer": ""}, "row 2: the rule math cannot judge the answer ''"),
        ({"question": "q", "answer": "1" * 1001}, "row 2: the rule math cannot judge"),
        ({"nums": ["a", 3], "target": 1}, "row 2: Countdown is about whole numbers, not 'a'"),
        (verl({"numbers": [1]}), "row 2: the rule countdown cannot judge the answer: numbers and"),
        (
            {"prompt": [{"content": "p"}], **GOLD_IS_1},
            "row 2: a message needs a role and a content",
        ),
        ({"prompt": "p", "reward_model": {}}, "row 2: no answer found: reward_model has nothing"),
        ({"nums": [1, 2]}, "row 2: has the columns nums; understood are"),
        ([1], "row 2: a JSON object {...} is expected, not [1]"),
    ],
)
def test_rows_that_are_no_problem(row, complaint, tmp_path):
    with pytest.raises(ValueError, match=re.escape(complaint)):
        problems_of(tmp_path, {"question": "q", "answer": "1" * 1000}, row)


@pytest.mark.parametrize(
    "name, splits, read",
    [
        ("a/b", ("test", "train", "dev"), "train"),
        ("a/b", ("dev", "test"), "test"),
        ("a/b", ("dev",), "dev"),
        ("a/b", ("dev", "val"), "has the splits dev, val; choose one: a/b::dev"),
        ("a/b:c:val", ("train", "val"), "val"),
    ],
)
def test_splits_of_the_hub(name, splits, read, monkeypatch):
    """The hub is played by a function with its signature."""
    import datasets  # here, as the two ranks above start faster without it

    sets = {}
    for split in splits:
        sets[split] = datasets.Dataset.from_list([{"question": "q", "answer": split}])

    def load_dataset(repo, config, split):
        assert (repo, config) == ("a/b", "c" if ":" in name else None)
        return sets[split] if split else datasets.DatasetDict(sets)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    if read not in splits:
        with pytest.raises(ValueError, match=read):
            load_problems(name)
        return
    (problem,) = load_problems(name)
    assert problem.answer == read


def characters(chat_template=None, eos=None, bos=None):
    """A tokenizer of one token a character, which ends a text as told."""

    def encode(text, add_special_tokens):
        start = [0] if add_special_tokens and bos else []
        return {"input_ids": start + [ord(c) for c in text] + ([eos] if eos else [])}

    class Tokenizer:
        __call__ = staticmethod(encode)

    tokenizer = Tokenizer()
    tokenizer.chat_template = chat_template
    tokenizer.bos_token = bos
    tokenizer.eos_token_id = eos
    return tokenizer


def test_prompts_as_token_ids():
    problem = Problem([{"content": "ab"}, {"content": "c"}], "1", "math")
    text = [ord(c) for c in "ab\n\nc"]
    assert render(problem, characters()) == text
    assert render(problem, characters(eos=7)) == text  # or the answer would be over
    assert render(problem, characters(bos="<s>")) == [0, *text]
    assert render(Problem("<s>a", "1", "math"), characters(bos="<s>")) == [ord(c) for c in "<s>a"]
    assert render(Problem("ab", "1", "math"), characters()) == text[:2]


def test_subsets_and_prompts_that_are_too_long():
    sets = {s: [Problem(s * (i + 1), "1", "math") for i in range(6)] for s in "xy"}
    problems, prompts = render_all(sets, characters(), 6)
    assert problems == [*sets["x"], *sets["y"]]  # all: in order
    assert prompts == [[ord(c) for c in problem.prompt] for problem in problems]
    assert render_all(sets, characters(), 6, seed=4) == (problems, prompts)
    shuffled = list(problems)
    random.Random(4).shuffle(shuffled)
    for count in (1, 5, 11, 12, 40):
        found, prompts = render_all(sets, characters(), 6, count, 4)
        assert found == shuffled[:count]
        assert prompts == [[ord(c) for c in problem.prompt] for problem in found]
    complaint = "4 of 12 prompts are longer than --max_prompt_len 4: raise it to 6"
    with pytest.raises(ValueError, match=complaint):
        render_all(sets, characters(), 4)
    assert render_all({}, characters(), 4) == ([], [])


def test_a_dry_run_judges_the_golds(toy, tmp_path, capsys):
    """Of the first three problems: a box, a formula, a sum. What has no solution is refused."""

    def golds_of(rows):
        lines = [json.dumps(row) + "\n" for row in rows]
        path = tmp_path / "shown.jsonl"
        path.write_text("".join(lines))
        words = f"--data {path} --eval_data none --dry_run"
        train.main(toy_args(toy, tmp_path, "run", words))
        out = capsys.readouterr().out
        return out, re.findall("gold answer (.*)", out)

    rows = []
    golds = ["2", "2k+2", {"numbers": [2], "target": 2}, "3"]
    for prompt, gold in zip(["1", "2 + 2", "3", "4"], golds):
        rows.append({"prompt": prompt, "reward_model": {"ground_truth": gold}})
    out, told = golds_of(rows)
    assert told == [r"\boxed{2}: right", r"\boxed{2k+2}: right", "2: right"]
    assert "prompt of 5 tokens\n2 + 2\n" in out

    rows = []
    for numbers, target in (([13, 1], 7), ([2, 3, 5, 7], 54)):
        gold = {"numbers": numbers, "target": target}
        rows.append({"prompt": "1", "reward_model": {"ground_truth": gold}})
    _, (none, some) = golds_of(rows)
    assert none == "(no solution looked for or found): refused: see verify.py"
    assert some.endswith(": right")
    assert eval(some.removesuffix(": right")) == 54


# ---- verdicts ------------------------------------------------------------------------------------


def test_rewards_are_those_of_each_problems_rule_and_counted(monkeypatch):
    """In the order of the answers; every answer has a verdict."""
    countdown = Problem("", json.dumps(GOLD), "countdown")
    pairs = [
        (Problem("", "4", "math"), r"\boxed{4}", 1.0),
        (countdown, "1+3", 1.0),
        (countdown, r"\boxed{4}", 0.0),
        (countdown, "3-1", 0.0),
        (Problem("", "4", "math"), "1+3", 0.0),
        (Problem("", "3", "math"), "Answer: 4", 0.0),
        (Problem("", "3", "math"), "Answer: 3", 1.0),
    ]
    problems, texts, rewards = zip(*pairs * 3)
    scores = score(problems, texts)
    assert [one.reward for one in scores] == list(rewards)
    assert Counter(one.verdict for one in scores) == {"right": 9, "wrong": 6, "no_answer": 6}

    def never_in_time(response, gold):
        return "timeout"

    monkeypatch.setitem(RULES, "math", never_in_time)
    scores = score(problems[:2], texts[:2])
    assert [one.reward for one in scores] == [0.0, 1.0]
    assert [one.verdict for one in scores] == ["timeout", "right"]


ONES = "+".join("1" * 100)  # 199 characters
COUNTDOWN = [
    ("right", "1+3"),
    ("right", "(3+1)"),
    ("right", "1+3 = 4"),
    ("wrong", "1+3 = 4 = 4"),
    ("wrong", "1+3 = 4.0"),
    ("wrong", "1+3 ="),
    ("wrong", "3-1"),
    ("wrong", "1+3+0"),
    ("wrong", "2+2"),
    ("wrong", "4"),
    ("wrong", "3+1+3-3"),
    ("wrong", "3/(1-1)"),
    ("no_answer", "= 4"),
    ("no_answer", "+1+3"),
    ("no_answer", "1+-3"),
    ("no_answer", "1**3"),
    ("no_answer", "the answer is 1+3"),
    ("right", "<answer>2</answer> or <answer> 1+3 </answer>, surely"),
    ("wrong", "<answer>1+3</answer> or <answer>3-1</answer>"),
    ("no_answer", "<answer>1+3</answer> or <answer>3-1"),
    ("no_answer", "1+3 </answer>"),
    ("wrong", ONES),
    ("wrong", ONES + "1"),
    ("no_answer", ONES + "11"),
    ("wrong", ONES + " "),
    ("wrong", f"({ONES[:-2]}) "),
    ("no_answer", ONES + "+1"),
]


@pytest.mark.parametrize("verdict, text", COUNTDOWN)
def test_countdown_verdicts(verdict, text):
    assert judge_countdown(text, json.dumps(GOLD)) == verdict


def test_countdown_operations_and_numbers():
    for text, numbers, target in (
        ("7-2", [2, 7], 5),
        ("7*2", [2, 7], 14),
        ("8/2", [2, 8], 4),
        ("(1+2)/2*4", [4, 2, 2, 1], 6),
        ("2-7+9", [9, 7, 2], 4),
    ):
        gold = json.dumps({"numbers": numbers, "target": target})
        assert judge_countdown(text, gold) == "right"
        other = json.dumps({"numbers": numbers, "target": target + 1})
        assert judge_countdown(text, other) == "wrong"
        more = json.dumps({"numbers": [*numbers, 1], "target": target})
        assert judge_countdown(text, more) == "wrong"


MATH = [  # the gold answer, answers that are the same, answers that are not
    (
        "1000",
        ["1,000", "1{,}000", r"1\,000", "1000.0", "1e3", r"10^{3}", "+1000"],
        ["1.000", "1,00"],
    ),
    (r"\frac{5}{8}", ["0.625", "62.5\\%", r"\dfrac58", "5/8", "10/16"], ["62.5", "0.63", "-5/8"]),
    (r"62.5\%", ["62.5", "0.625", r"62.5\%", "62.5 percent"], [r"0.625\%", "6250"]),
    (r"3\frac{1}{2}", ["3.5", "7/2"], ["1.5", "3/2"]),
    (r"-\frac{1}{2}", ["-0.5", r"\frac{-1}{2}", "-1/2"], ["0.5", "1/-2"]),
    (
        "1, 2, 3",
        ["3, 2, 1", "1 and 2 and 3", "1, 3, 2.0"],
        ["1, 2", "1, 2, 2", "1, 2, 3, 3", "1, 1, 2"],
    ),
    (r"\{1, 2\}", ["2, 1", r"\{2, 1\}"], ["(1, 2)", r"\{1\}"]),
    (
        "(1, 2)",
        ["(1.0, 2)", r"\left(1,2\right)"],
        ["(2, 1)", "[1, 2)", "(1, 2]", "(1, 2, 3)", "1, 2"],
    ),
    ("(1, 2) \\cup [3, 4]", ["[3,4] \\cup (1,2)"], ["(1,2)", "(1,2) \\cup (3,4]", "(1,2), [3,4]"]),
    (r"1 \pm 2", [r"1 \pm 2", "1+2, 1-2"], ["1+2", "1-2"]),
    (
        "x = 5",
        ["5", "x=5", r"x = \frac{10}{2} = 5", "x = 10/2"],
        ["y = 5", "x = 4 = 5", "x = 5 = 4"],
    ),
    (
        "5",
        ["x = 5", "5.", "$5$", r"5\text{ cm}", r"5^\circ", "5 apples"],
        ["x = 6", "5x", "5 million"],
    ),
    ("east", ["East", r"\text{east}", "EAST"], ["seat", "west", "eastern"]),
    ("C", ["(C)", r"\text{(C)}", r"\textbf{C}"], ["c", "D", "C, D", "D = C"]),
    ("4e33", [r"4\times10^{33}", r"4 \cdot 10^{33}"], ["4e32", "40e33"]),
]


@pytest.mark.parametrize("gold, right, wrong", MATH)
def test_answers_of_mathematics_that_are_the_same(gold, right, wrong):
    """None of these needs the worker: it is asked only where spelling and numbers do not decide."""
    for answer in right:
        assert judge_math(rf"\boxed{{{answer}}}", gold) == "right", answer
    for answer in wrong:
        assert judge_math(rf"\boxed{{{answer}}}", gold) == "wrong", answer


def test_another_number_of_members_is_wrong_whatever_sympy_says():
    """Sympy is not asked about them: here it would say yes to everything."""

    def yes(answer, gold):
        return True

    for answer, gold in (("k, k+1", "k+1"), ("k+1", "k, k+1"), ("k, k+1, k+2", "k, k+1")):
        assert verify.same_answer(answer, gold, yes) is False, (answer, gold)
    assert verify.same_answer("k+2", "k+1", yes) is True


@pytest.mark.slow
def test_a_worker_ends_itself_when_it_computes_for_too_long_and_not_while_it_waits():
    """As the parent would start it, but with one second of processor time."""
    code = "import verify; verify.worker_main(1)"
    worker = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=HERE,
        text=True,
    )

    def told(*pair):
        worker.stdin.write(json.dumps(pair) + "\n")
        worker.stdin.flush()
        return worker.stdout.readline()

    try:
        assert json.loads(worker.stdout.readline()) == "ready"
        for verdict, answer, gold in (
            ("right", "2(k+1)", "2k+2"),
            ("wrong", "2(k+2)", "2k+2"),
            ("wrong", "k", r"k + 10^{-9}"),
            ("no_answer", r"\frac{k}{", "2k+2"),
        ):
            assert json.loads(told(answer, gold)) == verdict, answer
        with pytest.raises(subprocess.TimeoutExpired):
            worker.wait(1.2)  # it waits, and uses no processor time
        assert told("(99999999!)k", "2k+2") == ""
        assert worker.wait(60) == -signal.SIGPROF
    finally:
        worker.kill()
        worker.communicate()


# ---- the tiny task -------------------------------------------------------------------------------

BASES = {"tiny-mini": "7b104245", "tiny": "ae87b13e", "tiny-small": "10bfb888"}


def test_a_base_is_named_after_all_that_shapes_it(tmp_path, monkeypatch):
    """Another recipe makes another base; the names of the three that the results are of."""

    class Stub:
        def save_pretrained(self, folder):
            Path(folder).mkdir()

    def make_stub(*args, **kwargs):
        return Stub()

    monkeypatch.setattr(tiny, "train_base", make_stub)

    def path_of_base(size="tiny"):
        return tiny.base_model(f"{tmp_path}/base", progress=False, size=size)

    def one_solution(rng):
        numbers, target, _ = random_solution(rng)
        return numbers, target, "1+1"

    def target_first(numbers, target):
        return f"{target}={numbers}"

    for size, digest in BASES.items():
        assert path_of_base(size) == f"{tmp_path}/base-{size}-{digest}"
    random_solution = tiny.random_solution
    changes = [
        ("VOCAB", tiny.VOCAB | {"/": 99}),
        ("SIZES", {"tiny": tiny.SIZES["tiny-mini"]}),
        ("INIT", 0.02),
        ("ROPE_THETA", 10_000.0),
        ("random_solution", one_solution),
        ("prompt_of", target_first),
    ]
    for name, value in tiny.TRAINING.items():
        changes.append(("TRAINING", tiny.TRAINING | {name: value + 1}))
    names = {path_of_base()}
    for name, value in changes:
        with monkeypatch.context() as patch:
            patch.setattr(tiny, name, value)
            names.add(path_of_base())
    assert len(names) == 1 + len(changes)


def test_the_base_is_trained_as_its_recipe_says(monkeypatch):
    """The rate of every step, the clipped gradient, the batches and the model's settings; the same
    weights whatever the caller has drawn before."""
    recipe = dict(steps=6, batch=4, lr=2e-3, warmup=3, weight_decay=0.5, seed=7)
    monkeypatch.setattr(tiny, "TRAINING", recipe)
    seen = []
    zeroed_after = []  # so many steps

    class Watched(torch.optim.AdamW):
        def step(self):
            (group,) = self.param_groups
            squares = sum(float(p.grad.square().sum()) for p in group["params"])
            seen.append((group["lr"], group["betas"], group["weight_decay"], math.sqrt(squares)))
            super().step()

        def zero_grad(self):
            zeroed_after.append(len(seen))
            super().zero_grad()

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    batches = []
    supervised = tiny.supervised_batches

    def watched(rng, batch):
        for ids, labels in supervised(rng, batch):
            batches.append(ids.tolist())
            yield ids, labels

    monkeypatch.setattr(tiny, "supervised_batches", watched)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    model = tiny.train_base("tiny", progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    rates = [2e-3 * min((i + 1) / 3, 0.5 + 0.5 * math.cos(math.pi * i / 6)) for i in range(6)]
    assert [rate for rate, *_ in seen] == pytest.approx(rates)
    assert zeroed_after == [1, 2, 3, 4, 5, 6]
    assert {step[1:3] for step in seen} == {((0.9, 0.98), 0.5)}
    assert max(norm for *_, norm in seen) == pytest.approx(1.0, rel=1e-4)
    own = [ids.tolist() for ids, _ in islice(supervised(random.Random(7), 4), 6)]
    assert batches[:6] == own
    assert sum(p.numel() for p in model.parameters()) == 857_216
    assert not model.training
    config = model.config
    assert (config.pad_token_id, config.eos_token_id, config.bos_token_id) == (PAD, EOS, None)
    assert config.tie_word_embeddings and config.num_key_value_heads == config.num_attention_heads
    assert config.vocab_size == 20 and config.max_position_embeddings == 64
    torch.manual_seed(2)
    again = tiny.train_base("tiny", progress=False).state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())


def test_a_token_is_a_character(tmp_path):
    """Also for the tokenizer that a run reads from the folder."""
    tiny.make_tokenizer().save_pretrained(tmp_path)
    for tokenizer in (tiny.make_tokenizer(), AutoTokenizer.from_pretrained(tmp_path)):
        text = "0123456789+-*()=: "
        assert tokenizer(text)["input_ids"] == list(range(2, 20))
        assert len(tokenizer) == 20
        assert tokenizer("1 x2/3\n")["input_ids"] == ids_of("1 23")
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (PAD, EOS)
        assert tokenizer.decode([3, PAD, 19, 4, EOS]) == "1<pad> 2<eos>"
        assert tokenizer.decode([3, PAD, 19, 4, EOS], skip_special_tokens=True) == "1 2"
        assert tokenizer.unk_token is None
        assert not tokenizer.chat_template


def test_solutions_are_drawn_from_the_whole_task():
    """Every number, operator and target; nothing is negative on the way; two of three joins differ
    in their place."""
    rng = random.Random(5)
    drawn = [tiny.random_solution(rng) for _ in range(6000)]
    assert {number for numbers, _, _ in drawn for number in numbers} == set(range(1, 14))
    assert {target for _, target, _ in drawn} == set(range(1, 100))
    text = " ".join(text for _, _, text in drawn)
    assert all(text.count(operator) > 3000 for operator in "+-*")
    assert set(text) == set("0123456789+-*() ")
    for _, _, text in drawn[:500]:
        for part in re.findall(r"\([^()]*\)", text):
            assert eval(part) >= 0
        assert not text.startswith("-")
    first = [re.match(r"\(*([0-9]+)", text)[1] for _, _, text in drawn]
    numbers = [sorted(numbers) for numbers, _, _ in drawn]
    assert all(own == row for own, (row, _, _) in zip(numbers, drawn))
    assert {int(digits) for digits in first} == set(range(1, 14))


def test_supervised_batches_are_of_like_lengths_in_random_order():
    """Sixteen batches hold what was drawn for them, sorted by length; padding is PAD and has no
    label; the prompt has none either."""
    batches = list(islice(tiny.supervised_batches(random.Random(3), 8), 16))
    ranges = []
    for ids, labels in batches:
        assert ids.shape == labels.shape
        assert len(ids) == 8
        lengths = (ids != PAD).sum(1).tolist()
        assert ids.shape[1] == max(lengths)
        ranges.append((min(lengths), max(lengths)))
        for row, label, length in zip(ids.tolist(), labels.tolist(), lengths):
            prompt = row.index(ids_of(":")[0]) + 1
            assert label == [-100] * prompt + row[prompt:length] + [-100] * (len(row) - length)
            assert row[length - 1] == EOS
            assert row[length:] == [PAD] * (len(row) - length)
    ordered = sorted(ranges)
    assert all(a[1] <= b[0] for a, b in zip(ordered, ordered[1:]))
    assert ranges not in (ordered, ordered[::-1])
    rng = random.Random(3)
    drawn = Counter()
    while drawn.total() < 128:
        numbers, target, text = tiny.random_solution(rng)
        prompt = " ".join(map(str, numbers)) + f"={target}:"
        if zlib.crc32(prompt.encode()) % 10:
            drawn[prompt + text] += 1
    found = Counter(text_of(row) for ids, _ in batches for row in ids.tolist())
    assert found == drawn


def test_problems_are_the_first_solutions_of_their_side():
    """One generator per side and seed; the answer holds the sorted numbers and the target."""
    for split, seed in (("train", 0), ("test", 3)):
        rng = random.Random(f"{split} {seed}")
        expected = {}
        while len(expected) < 40:
            numbers, target, _ = tiny.random_solution(rng)
            prompt = " ".join(map(str, numbers)) + f"={target}:"
            if (zlib.crc32(prompt.encode()) % 10 == 0) == (split == "test"):
                expected[prompt] = {"numbers": numbers, "target": target}
        found = tiny.problems(split, 40, seed)
        assert [(p.prompt, json.loads(p.answer)) for p in found] == list(expected.items())
        assert {p.rule for p in found} == {"countdown"}
    assert tiny.problems("test", 0) == []
    assert tiny.PROBLEMS == {"train": 4000, "test": 128}
