"""Tests of the experiments: formulas, numbers over seeds, verdicts, runs; the committed findings.

pytest -q experiments/test_experiments.py
"""

import dataclasses
import json
import math
import re
import shlex
import shutil
import sys
import types
from pathlib import Path

from rollout import prepare_environment

prepare_environment()

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

import diagnose
import losses
import memory
import rollout
import tiny
import train
from data import load_problems
from diagnose import read_metrics, read_runs, share_made
from entropy import NEEDED_STATISTICS, STATISTICS, Distribution
from experiments import findings, gpu_check, methods, runs, scaling, stats
from losses import METHODS
from policy import batch_statistics, build_policy, micro_batches, split_batch

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = HERE / "results"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(monkeypatch, tmp_path):
    """No test finds or leaves files in the repository; a process group that it made ends."""
    monkeypatch.chdir(tmp_path)
    for module in (findings, methods, runs):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    (tmp_path / "results" / "findings").mkdir(parents=True)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def committed(monkeypatch):
    """The committed runs, {setting: [rows of each seed]}."""
    for module in (findings, methods, runs):
        monkeypatch.setattr(module, "RESULTS", RESULTS)
    return runs.read_available(findings.SETTINGS, findings.SEEDS)


# ---- what a step costs: the formulas against what is really held and sent ------------------------

SMALL = scaling.Shape(
    hidden=64,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
    intermediate=96,
    vocab=128,
    tied=True,
)
UNTIED = dataclasses.replace(SMALL, tied=False, layers=3)


@pytest.mark.parametrize("shape", [SMALL, UNTIED])
def test_the_size_is_that_of_a_real_model(shape):
    model = AutoModelForCausalLM.from_config(scaling.qwen2_config(shape))
    layer = model.model.layers[0]
    size = shape.size
    assert size.parameters == sum(p.numel() for p in model.parameters())
    assert size.layer == sum(p.numel() for p in layer.parameters())
    assert size.root == size.parameters - size.layer * shape.layers
    assert (size.tied, size.layers, size.vocab) == (shape.tied, shape.layers, shape.vocab)
    assert (size.query, size.key_value, size.mlp) == (64, 32, 96)


def test_the_sizes_are_the_published_ones():
    named = {
        scaling.HALF: 0.49,
        scaling.ONE_AND_A_HALF: 1.54,
        scaling.THREE: 3.09,
        scaling.SEVEN: 7.62,
        scaling.THIRTY_TWO: 32.76,
    }
    for shape, billions in named.items():
        assert round(shape.size.parameters / 1e9, 2) == billions


def test_memory_formula_equals_the_bytes_held(tmp_path):
    scaling.write_model(tmp_path, SMALL)
    dist.init_process_group("gloo")
    cfg = types.SimpleNamespace(
        temperature=1.0,
        steps=1,
        parallel="fsdp",
        activation_checkpointing=False,
        trust_remote_code=False,
        lora_rank=0,
    )
    policy = build_policy(tmp_path, cfg, torch.device("cpu"), torch.float32)
    optimizer = torch.optim.AdamW(policy.parameters())
    ids = torch.ones(2, 5, dtype=torch.long)
    mask = torch.ones(2, 3, dtype=torch.bool)
    policy(ids, torch.tensor([2, 2]), mask)["log_probs"].sum().backward()
    optimizer.step()

    parameters = list(policy.parameters())
    states = [tensor for state in optimizer.state.values() for tensor in state.values()]
    groups = {
        "weights": parameters,
        "gradients": [parameter.grad for parameter in parameters],
        "AdamW": [tensor for tensor in states if tensor.ndim],  # its step counts are 0-d
    }
    parts = scaling.memory_per_gpu(SMALL, ranks=1).parts
    for name, tensors in groups.items():
        assert parts[name] == sum(tensor.to_local().nbytes for tensor in tensors), name


@pytest.mark.slow
def test_formula_equals_the_bytes_that_two_ranks_send(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    scaling.write_model(tmp_path / "model", SMALL)
    flags = scaling.flags_of(
        tmp_path / "model",
        prompts=8,
        group=4,
        response=8,
        updates=2,
        micro_batch_tokens=100,
    )
    flags += ("--method", "kl_cov")  # it leaves no answer out
    found = scaling.run(tmp_path, 2, *flags, "--parallel", "fsdp", steps=2, mode="count")
    counted = found["bytes"]
    micro_batches = counted["response_statistics"]
    # More micro-batches than updates, or a factor between them would not show.
    assert micro_batches > 2
    # How many lists the first answers make depends on the rank that most of them were dealt to.
    gathered = counted["measure all_gather"] // 4 - SMALL.size.root
    after, rest = divmod(gathered, SMALL.layers * SMALL.size.layer)
    assert 1 <= after <= 2 and rest == 0
    formula = scaling.communication_per_step(
        SMALL, "fsdp", 2, micro_batches, after=after, bytes_per_weight=4
    )
    assert formula == {name: size for name, size in counted.items() if " " in name}
    assert counted["scalars"] < 2000


def test_the_commands_on_paper_parse_and_32b_needs_two_nodes(monkeypatch):
    monkeypatch.setattr(train, "resolve_engine", lambda name, tp: name)
    for case in scaling.CASES:
        monkeypatch.setenv("WORLD_SIZE", str(case.ranks))
        train.parse(shlex.split(scaling.command(case).split("train.py ")[1]))
    largest = {}
    for ranks in (8, 16):
        peaks = scaling.memory_per_gpu(scaling.THIRTY_TWO, ranks, rollout_tp=4).peaks
        largest[ranks] = max(peaks.values())
    assert largest[16] < memory.ASSUMED_CARD < largest[8]


def test_ranks_in_lock_step_wait_for_the_slowest():
    """By hand: rows of 10 and 20 tokens, at most 20 in a micro-batch, on two ranks."""

    def cost(count, length):
        return count * scaling.flops_of_rows(SMALL, np.array(length))

    def rows(*lengths, is_run=True):
        return [(is_run, n) for n in lengths]

    # One rank needs a list for each row of 20; the other halves its list of two rows of 10.
    of_ranks = [rows(20, 20), rows(10, 10)]
    assert scaling.lock_step(SMALL, of_ranks, 20) == 2 * cost(1, 20)
    # Two rows in one list are padded to the longer.
    assert scaling.lock_step(SMALL, [rows(10, 20), rows(5, 5)], 40) == cost(2, 20)
    # Lists of four rows of 5 and of one row of 5 are even ones of two and of three.
    of_ranks = [rows(5, 5, 5, 5, 5)] * 2
    assert scaling.lock_step(SMALL, of_ranks, 20, even=False) == cost(4, 5) + cost(1, 5)
    assert scaling.lock_step(SMALL, of_ranks, 20) == cost(3, 5) + cost(2, 5)
    # A rank without rows that are run fills up with its shortest.
    of_ranks = [rows(9, 9), rows(30, 20, is_run=False)]
    assert scaling.lock_step(SMALL, of_ranks, 20) == cost(1, 20)
    assert scaling.in_a_snake([rows(1, 4), rows(3, 2)]) == [rows(4, 1), rows(3, 2)]
    one = scaling.imbalance(SMALL, 1, 64, 8, 1000, 2048, 50, 4)
    eight = scaling.imbalance(SMALL, 8, 64, 8, 1000, 2048, 50, 4)
    assert 1 < one < 1.2 < eight
    half = scaling.imbalance(SMALL, 1, 64, 8, 1000, 2048, 50, 4, flat=0.5)
    assert 0.4 < half < 0.65
    without = scaling.imbalance(SMALL, 8, 64, 8, 1000, 2048, 50, 4, measures=("left out", "even"))
    assert eight < without - 0.1


def test_the_simulation_splits_as_the_program_does(monkeypatch):
    """Rows of two ranks: the cost is that of policy.split_batch's lists."""
    g = np.random.default_rng(0)
    for _ in range(30):
        lengths = g.integers(1, 60, (2, 12))
        learned = g.random((2, 12)) < 0.5
        needed = [
            len(micro_batches(n.tolist(), np.flatnonzero(run).tolist(), 100))
            for n, run in zip(lengths, learned)
        ]
        monkeypatch.setattr("policy.max_over_ranks", lambda value: max(value, *needed))
        costs = []
        for n, run in zip(lengths, learned):
            batch = {"lengths": torch.tensor(n), "to_run": torch.tensor(run)}
            (lists,) = split_batch(batch, 100, 1).micro_batches
            longest = np.array([max(n[row] for row in some) for some in lists])
            costs.append([len(some) for some in lists] * scaling.flops_of_rows(SMALL, longest))
        of_ranks = [list(zip(run.tolist(), n.tolist())) for run, n in zip(learned, lengths)]
        assert scaling.lock_step(SMALL, of_ranks, 100) == np.max(costs, axis=0).sum()


def test_drawn_lengths_have_the_wanted_mean():
    lengths = scaling.draw_lengths(np.random.default_rng(0), 100, 8, response=500, longest=1000)
    assert lengths.shape == (100, 8) and abs(lengths.mean() - 500) < 1
    assert lengths.max() == 1000 and lengths.min() > 0


def test_the_page_on_paper_is_what_the_formulas_give(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "RESULTS", tmp_path)
    scaling.write_on_paper()
    assert (tmp_path / "scaling.md").read_text() == (RESULTS / "scaling.md").read_text()


# ---- numbers over seeds, by hand -----------------------------------------------------------------


def test_columns_by_hand():
    rows = [{"a": 1}, {"b": 5}, {"a": 2}, {"a": 6}]
    assert stats.column(rows, "a", smooth=2).tolist() == [1.5, 4]
    with pytest.raises(ValueError, match="0 rows have the metric b, not 1"):
        stats.column([{"a": 1}], "b")
    with pytest.raises(ValueError, match="3 rows have the metric a, not 9"):
        stats.column(rows, "a", smooth=9)


def test_start_end_and_gain_by_hand():
    # H falls by 1 every ten steps, from 10 to 7; pass@1 rises from 0.5 to 0.75.
    rows = [{"step": 0, stats.PASS_AT_1: 0.5}]
    rows += [{"step": i, stats.H: 10.0 - i // 10} for i in range(1, 40)]
    rows += [{stats.PASS_AT_1: 0.75}]
    assert stats.at_start(rows) == 10
    assert stats.at_end(rows) == 7
    assert stats.kept(rows) == 0.7
    assert stats.at_start(rows, stats.PASS_AT_1) == 0.5
    assert stats.last(rows) == 0.75
    assert stats.gain(rows) == 0.25
    # 76 updates, 4 a step, are 19 steps: H of step 20 is after them, and the five around it are
    # those of steps 18 to 22.
    after_76 = stats.after_updates(rows, count=76, updates_per_rollout=4)
    assert after_76 == (9 + 9 + 8 + 8 + 8) / 5


def test_share_made_by_the_first_steps_by_hand():
    # x rises from 1 to 4 in the first half, to 5 in the second: 3/4, and a half of that.
    rows = [{"step": 0, "x": 1.0}, {"step": 50, "x": 4.0}, {"step": 100, "x": 5.0}]
    assert stats.made_by(rows, 1 / 2, "x") == 0.75
    assert stats.made_by(rows, 1 / 4, "x") == 0.375
    # A fall of a nat in each of the first six of twelve steps.
    fall = [12.0 - min(t, 6) for t in range(12)]
    assert share_made(range(1, 13), fall, 1 / 12) == 1 / 6
    assert share_made(range(1, 13), fall, 1 / 3) == 4 / 6
    assert share_made(range(0, 24, 2), fall, 1 / 11) == 1 / 6
    assert share_made(range(51, 63), fall, 1 / 12) == 1 / 6


def test_forecast_error_by_hand():
    # The law fits the steps up to 15 and those after, which are higher by 1.
    course = [{"step": 0}]
    for t in range(1, 101):
        h = 1 - t / 100
        course.append({"step": t, stats.H: h, stats.REWARD: 2 - 0.5 * math.exp(h) + (t > 15)})
    assert math.isclose(stats.forecast_error(course), 1, abs_tol=1e-4)
    # Level at 3 after step 15: by the mean of the nine-step means of steps 1 to 15.
    level = []
    for row in course:
        level.append(row | {stats.REWARD: 3.0} if row["step"] > 15 else row)
    rewards = [row[stats.REWARD] for row in course[1:16]]
    means = [np.mean(rewards[t : t + 9]) for t in range(7)]
    assert math.isclose(stats.forecast_error(level, "rmse_mean"), 3 - np.mean(means))


def test_comparisons_of_seeds_by_hand():
    found = {"low": [1, 2, 3], "mid": [2, 3, 4], "high": [5, 6, 7]}
    assert stats.rising(found, "low", "high")
    assert not stats.rising(found, "low", "mid", "high")
    assert not stats.rising(found, "high", "low")
    assert stats.above(found, "high")
    assert stats.above(found, "high", "mid")
    assert not stats.above(found, "mid", "low")
    assert stats.below(found, "mid", "high")
    assert not stats.below(found, "low")
    assert not stats.below(found, "high", "low")
    assert stats.apart(found, "low", "high", "mid")
    assert stats.apart(found, "high", "low")
    assert not stats.apart(found, "low", "mid")
    assert stats.flat(found)[2:4] == [3, 2]


def test_numbers_in_words():
    in_words = stats.in_words({"a": [1, 2, 6], "b": [0.5]})
    assert in_words == "a 3.000 (1.000 to 6.000); b 0.500"


def test_covariance_and_fall_by_hand():
    # Up to step 10 the fall is another one. Later both follow t % 3, the fall with noise of +-2,
    # which means over two steps remove. Rows without one of the two are left out.
    rows = []
    for t in range(50):
        fall = 5 + t % 3 + 9 * (t < 11) - 2 * (-1) ** t
        covariance = 2 + t % 3
        rows.append(
            {"step": t, "policy/group_cov_mean": covariance, "entropy/change_measured": -fall}
        )
    del rows[20]["policy/group_cov_mean"]
    del rows[21]["entropy/change_measured"]
    assert stats.covariance_and_fall(rows, smooth=1) < 0.5
    assert stats.covariance_and_fall(rows, smooth=2) > 0.95


def test_spearman_by_hand():
    assert math.isclose(stats.spearman([1, 2, 3, 4], [1, 8, 9, 100]), 1)
    assert math.isclose(stats.spearman([1, 2, 3], [1, 3, 2]), 0.5)
    # The tie's ranks are 1.5 and 1.5.
    assert math.isclose(stats.spearman([1, 1, 2], [5, 7, 9]), math.sqrt(3) / 2)


def test_verdict_counts_the_papers_claims_only():
    held = findings.Claim("a", True)
    ours = findings.Claim("b", False, ours=True)
    failed = findings.Claim("c", False)
    assert findings.verdict([held, ours]) == "holds (1 of 1)"
    assert findings.verdict([held, ours, failed]) == "in part (1 of 2)"
    assert findings.verdict([ours, failed]) == "does not hold here (0 of 1)"


# ---- made-up runs: each claim holds in some, and fails in others ---------------------------------


def falling(t):
    return 1 - t / 200


def learning(t):
    return 0.1 + t / 500


def made_up(h=falling, pass1=learning, **more):
    """Three seeds of a run of 100 steps, which differ by 1e-4.

    h and pass1: functions of the step. more: further metrics {name: a number, or a function of the
    step}.
    """
    seeds = []
    for seed in range(3):
        rows = []
        for t in range(101):
            metrics = {stats.H: h(t), stats.REWARD: pass1(t)}
            if t % 10 == 0:
                metrics |= {"eval/pass@1": pass1(t), "eval/pass@8": 0.5, "eval/entropy": h(t)}
            for name, value in more.items():
                metrics[name] = value(t) if callable(value) else value
            row = {"step": t}
            for name, value in metrics.items():
                if t or name.startswith("eval/"):  # step 0 is an evaluation
                    row[name] = value + 1e-4 * seed
            rows.append(row)
        seeds.append(rows)
    return seeds


def line_to(start, end, last):
    """A function of the step: from start to end at step `last`, and level from there."""
    return lambda t: start + (end - start) * min(t, last) / last


def ending(h, pass1=None, **more):
    """{name: made-up seeds}: H goes from 1 to h[name] at step 90, pass@1 from 0.1 to pass1[name].

    more: further metrics, {name: number}; where a name is missing, so is the metric.
    """
    made = {}
    for name, end in h.items():
        last_pass1 = (pass1 or {}).get(name, 0.3)
        metrics = {key: values[name] for key, values in more.items() if name in values}
        made[name] = made_up(line_to(1, end, 90), line_to(0.1, last_pass1, 100), **metrics)
    return made


def runs_of_1():
    """The change comes in the first steps; it is spread over all."""

    def made(slowness):
        def h(t):
            return math.exp(-t / slowness)

        def pass1(t):
            return 0.5 - h(t) / 4

        return {name: made_up(h, pass1) for name in findings.FINDINGS[1].settings}

    return made(slowness=2), made(slowness=1e6)


def runs_of_2():
    """The law's slope depends on the data; it depends on the algorithm, and there is noise."""

    def made(steeper, noise):
        made_runs = {}
        for name in findings.FINDINGS[2].settings:
            a = 0.3 if name == steeper else 0.2

            def pass1(t, a=a):
                return 2 * a - a * math.exp(falling(t)) + noise(t)

            made_runs[name] = made_up(falling, pass1)
        return made_runs

    def no_noise(t):
        return 0

    def noise(t):
        return t // 10 % 2 + 3 * (t > 20)

    return made("grpo-easy", no_noise), made("grpo-no-std", noise)


def runs_of_3():
    """The covariance follows the fall of H and is larger for easier prompts; the opposite."""

    def wave(t):
        return 1 + math.sin(t / 8)

    def minus_wave(t):
        return -wave(t)

    def made(covariance, hard, mid, easy):
        metrics = {
            "entropy/change_measured": minus_wave,
            "policy/group_cov_mean": covariance,
            "policy/group_cov_hard": hard,
            "policy/group_cov_mid": mid,
            "policy/group_cov_easy": easy,
        }
        return {"grpo-updates-1": made_up(**metrics)}

    return made(wave, 1, 2, 3), made(minus_wave, 3, 2, 1)


def runs_of_4():
    """The top 0.002 is six times the top 0.2; it is four times."""

    def made(top):
        metrics = {
            "policy/cov_top_0.0002": 9,
            "policy/cov_top_0.002": top,
            "policy/cov_top_0.02": 1,
            "policy/cov_top_0.2": 0.5,
            "policy/cov_mean": 0,
        }
        return {"grpo": made_up(**metrics)}

    return made(3), made(2)


def runs_of_5():
    names = findings.FINDINGS[5].settings
    h = {
        "grpo": 0.3,
        "entropy_bonus-0.001": 0.3001,
        "entropy_bonus-0.01": 0.4,
        "entropy_bonus-0.1": 3,
        "kl_loss-0.1": 0.4,
        "kl_loss-1": 0.5,
    }
    good = ending(h, {"grpo": 0.4, "kl_loss-0.1": 0.3, "kl_loss-1": 0.2})
    bad = ending(dict.fromkeys(names, 0.3) | {"grpo": 0.4})
    return good, bad


def runs_of_6():
    shares = {"0.005": 0.22, "0.02": 0.42, "0.08": 0.62}
    good_h = {"grpo": 0.02}
    bad_h = {"grpo": 0.3}
    good_pass16 = {"grpo": 0}
    bad_pass16 = {"grpo": 0}
    for name in findings.CLIP_COV + findings.KL_COV:
        good_h[name] = shares[name.split("-")[1]]
        bad_h[name] = 0.2
        good_pass16[name] = 1
        bad_pass16[name] = -1
    good = ending(good_h, {"grpo": 0.2}, **{"eval/pass@16": good_pass16})
    bad = ending(bad_h, {"grpo": 0.9}, **{"eval/pass@16": bad_pass16})
    return good, bad


def runs_of_8():
    up = ("quadrant-pos_likely", "quadrant-neg_rare")
    down = ("quadrant-pos_rare", "quadrant-neg_likely")
    good = {"grpo": 0.5} | dict.fromkeys(up, 0.6) | dict.fromkeys(down, 0.4)
    bad = {"grpo": 0.5} | dict.fromkeys(up, 0.4) | dict.fromkeys(down, 0.6)
    return ending(good), ending(bad)


def runs_of_9():
    good = {"grpo-unclipped": 0.3, "steer-unclipped": 0.95, "steer-unclipped-0.1": 0.95}
    bad = {"grpo-unclipped": 0.3, "steer-unclipped": 0.3, "steer-unclipped-0.1": 0.3}
    return ending(good, {"steer-unclipped": 0.5}), ending(bad)


def runs_of_10():
    """More updates: less H at the end, and after as many optimizer steps; the opposite."""
    good_h = {
        "grpo-updates-1": 0.5,
        "grpo-updates-2": 0.49,
        "grpo": 0.48,
        "grpo-updates-8": 0.47,
        "entropy_bonus-0.1": 3,
        "entropy_bonus-0.1-updates-1": 2,
    }
    bad_h = {
        "grpo-updates-1": 0.5,
        "grpo-updates-2": 0.51,
        "grpo": 0.52,
        "grpo-updates-8": 0.53,
        "entropy_bonus-0.1": 0.54,
        "entropy_bonus-0.1-updates-1": 0.55,
    }
    pass64 = {
        "grpo-updates-1": 0.8,
        "grpo-updates-2": 0.75,
        "grpo": 0.7,
        "grpo-updates-8": 0.65,
        "entropy_bonus-0.1": 0,
        "entropy_bonus-0.1-updates-1": 0,
    }
    less_pass64 = {name: -value for name, value in pass64.items()}
    good = ending(good_h, {"grpo": 0.4}, **{"eval/pass@64": pass64})
    bad = ending(bad_h, **{"eval/pass@64": less_pass64})
    # A run of 8 updates falls (or rises) in 12 rollout batches further than one of 1 does in 96.
    for made, sign in ((good, 1), (bad, -1)):
        for name, updates in findings.UPDATES.items():
            for rows in made[name]:
                for row in rows[1:60]:
                    row[stats.H] = 1 - sign * 0.01 * updates * row["step"] * updates
    return good, bad


def runs_of_11():
    good = {"grpo-prompts-16": 0.2, "grpo-prompts-64": 0.3, "grpo-prompts-256": 0.4, "grpo": 0.5}
    bad = {"grpo-prompts-16": 0.5, "grpo-prompts-64": 0.4, "grpo-prompts-256": 0.3, "grpo": 0.2}
    return ending(good), ending(bad, {"grpo-prompts-256": 0.2})


def runs_of_12():
    names = findings.FINDINGS[12].settings
    good = dict.fromkeys(names, 0.3) | {"grpo-wide": 0.1, "clip_higher": 0.4, "grpo-tight": 0.4}
    bad = dict.fromkeys(names, 0.3) | {"grpo-wide": 0.4, "clip_higher": 0.2, "grpo-tight": 0.2}
    return ending(good), ending(bad)


def runs_of_13():
    good = {
        "grpo": 0.3,
        "quadrant-positive": 0.1,
        "par-0": 0.95,
        "par-0.5": 0.5,
        "par": 0.37,
        "grpo-easy": 0.2,
        "quadrant-positive-easy": 0.1,
    }
    bad = {
        "grpo": 0.3,
        "quadrant-positive": 0.6,
        "par-0": 0.2,
        "par-0.5": 0.25,
        "par": 0.1,
        "grpo-easy": 0.2,
        "quadrant-positive-easy": 0.3,
    }
    return ending(good), ending(bad)


def runs_of_14():
    """The metrics rise or fall with H as the papers say, and pass@1 does not; the opposite."""
    names = findings.FINDINGS[14].settings
    h = {name: 0.2 + 0.05 * i for i, name in enumerate(names)}
    minus_h = {name: -value for name, value in h.items()}
    mixed_pass1 = {name: 0.3 + 0.01 * (5 * i % 7) for i, name in enumerate(names)}
    rising_pass1 = {name: 0.3 + h[name] / 4 for name in names}

    def made(pass1, up, down):
        metrics = {
            "response/ngram_diversity": up,
            "eval/conf_wrong": down,
            "eval/conf_gap": up,
            "eval/ece": down,
        }
        return ending(h, pass1, **metrics)

    good = made(mixed_pass1 | {"grpo": 0.2}, up=h, down=minus_h)
    bad = made(rising_pass1 | {"grpo": 0.9}, up=minus_h, down=h)
    return good, bad


def write_estimates(sign):
    """estimates.json, for finding 7: correlations in the order of the claims, or the opposite."""
    names = ("covariance", "steer released", "steer theorem", "exact")
    batches = {}
    for i, name in enumerate(names):
        batches[name] = 3 * [{"Pearson": sign * i, "Spearman": sign * i}]
    found = {"base": {"sgd": batches, "adamw": batches}}
    (findings.RESULTS / "estimates.json").write_text(json.dumps(found))


MADE_UP = {
    1: runs_of_1,
    2: runs_of_2,
    3: runs_of_3,
    4: runs_of_4,
    5: runs_of_5,
    6: runs_of_6,
    8: runs_of_8,
    9: runs_of_9,
    10: runs_of_10,
    11: runs_of_11,
    12: runs_of_12,
    13: runs_of_13,
    14: runs_of_14,
}


@pytest.mark.parametrize("number", MADE_UP)
def test_each_claim_holds_in_runs_made_to_show_it_and_fails_in_runs_made_against_it(
    number, tmp_path
):
    good, bad = MADE_UP[number]()
    check_claims(number, good, True)
    check_claims(number, bad, False)
    finding = findings.FINDINGS[number]
    finding.draw({name: good[name] for name in finding.settings}, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_each_claim_of_7_holds_or_fails_with_the_estimates():
    write_estimates(sign=1)
    check_claims(7, {}, True)
    write_estimates(sign=-1)
    check_claims(7, {}, False)


def check_claims(number, made, expected):
    """All claims of the finding hold in these runs, or none does."""
    claims = findings.claims_of(number, made)
    assert claims
    for claim in claims:
        assert bool(claim.holds) == expected, claim
    count = sum(not claim.ours for claim in claims)
    verdict = f"holds ({count} of {count})" if expected else f"does not hold here (0 of {count})"
    assert findings.verdict(claims) == verdict
    cell = "| holds |" if expected else "| **does not hold here** |"
    assert findings.table_rows(number, claims).count(cell) == len(claims)


# ---- the findings: settings, committed metrics, page ---------------------------------------------


def test_settings_of_the_findings_are_all_used_and_train_takes_them():
    used = {name for finding in findings.FINDINGS.values() for name in finding.settings}
    assert used == set(findings.SETTINGS)
    assert list(findings.FINDINGS) == list(range(1, 15))
    assert len(findings.SEEDS) >= 3
    trained = set()
    for name, flags in findings.SETTINGS.items():
        config = vars(train.parse(flags.split()))
        assert config["method"] == name.split("-")[0]
        assert config["prompts_per_step"] == 64
        for key in [key for key in config if "eval" in key or key == "name"]:
            del config[key]
        trained.add(json.dumps(config))
    assert len(trained) == len(findings.SETTINGS)  # no two train alike


def test_committed_findings_say_what_the_committed_metrics_say(committed):
    """Row by row for all 14, three seeds each. The summary at the head of findings.md has the
    verdicts, and no number that is not, rounded, in the finding's rows."""
    page = (RESULTS / "findings.md").read_text()
    head = page.split("<!-- From here on")[0]
    summary = {}
    for line in head.splitlines():
        if re.match(r"\| \[\d", line):
            summary[int(line.split("]")[0][3:])] = line
    assert set(summary) == set(findings.FINDINGS)

    count = 0
    for number in findings.FINDINGS:
        claims = findings.claims_of(number, committed)
        count += len(claims)
        rows = findings.table_rows(number, claims)
        assert rows in page, number
        _, link, papers, here, verdict, _ = summary[number].split("|")
        assert verdict.strip() == findings.verdict(claims), number
        assert (RESULTS / re.search(r"\((.*)\)", link)[1]).exists()
        rounded = set(re.findall(r"\d+\.\d+", rows))
        for value in re.findall(r"\d+\.\d{3}", rows):
            rounded |= {f"{float(value):.2f}", f"{float(value):.3f}"}
        told = re.findall(r"\d+\.\d{2,}", here)
        assert told, number
        assert not [value for value in told if value not in rounded], number

    cells = ("| holds |", "| **does not hold here** |")
    assert sum(page.split("<!-- From here on")[1].count(cell) for cell in cells) == count
    assert f"All {count} claims" in head
    assert f"{len(findings.SETTINGS)} settings × {len(findings.SEEDS)} seeds" in head


def test_methods_page_says_what_the_committed_metrics_say(committed):
    page = (RESULTS / "methods.md").read_text()
    names = [name for name in methods.NOTES if name != "quadrant"]
    settings = [methods.setting_of(name) for name in names]
    available = runs.read_available(settings, [0])
    made = {name: available[methods.setting_of(name)][0] for name in names}
    assert methods.methods_table(made) in page


def test_the_readme_says_what_the_committed_metrics_say(committed):
    """Its sentence of results, its count of claims, and its table of methods."""
    readme = (ROOT / "README.md").read_text()
    settings = ["grpo-16-samples", "kl_cov-0.02", "clip_cov-0.02"]  # in the order of the sentence
    available = runs.read_available(settings, findings.SEEDS)

    def mean(number, key):
        found = []
        for setting in settings:
            values = [number(rows, key) for rows in available[setting]]
            found.append(f"{np.mean(values):.2f}")
        return found

    entropy = mean(stats.at_end, stats.H)
    pass_at_1 = mean(stats.last, stats.PASS_AT_1)
    pass_at_16 = mean(stats.last, "eval/pass@16")
    base = available["grpo-16-samples"][0]
    told = " ".join(readme.split("**Result.**")[1].split("## Run it")[0].split())
    assert re.findall(r"\d\.\d\d", told) == [
        f"{stats.at_start(base, stats.H):.2f}",
        *entropy,
        *pass_at_1,
        *pass_at_16,
        f"{base[0]['eval/pass@16']:.2f}",
    ]
    theirs = []
    for number in findings.FINDINGS:
        theirs += [claim for claim in findings.claims_of(number, committed) if not claim.ours]
    holding = sum(claim.holds for claim in theirs)
    assert f"{holding} of their {len(theirs)} claims" in " ".join(readme.split())
    assert methods.readme_table() in readme
    assert set(methods.NOTES) <= set(METHODS)


def test_committed_runs_are_complete_each_once_and_in_the_new_names():
    file = RESULTS / "runs.jsonl.gz"
    made = read_runs(file)
    settings = json.loads((RESULTS / "settings.json").read_text())
    assert {name.rpartition("-seed")[0] for name in made} == set(settings)
    for name, flags in settings.items():
        if name in findings.SETTINGS:
            assert flags == findings.flags_of(name)
    for name, rows in made.items():
        assert [row["step"] for row in rows] == list(range(len(rows))), name
        assert len(rows) == (301 if name.startswith("grpo-300") else 101), name
        assert not [key for row in rows for key in row if "gap_m" in key], name
    assert file.read_bytes()[4:8] == bytes(4)  # no clock in it, so equal runs are equal bytes
    assert read_metrics(f"{file}:grpo-seed0") == made["grpo-seed0"]


def test_findings_trains_what_it_needs_and_tables_what_it_has(monkeypatch, capsys):
    """--only 12 asks for its runs alone; findings.md has every finding whose runs are all there."""
    made = {}
    asked = []

    def train_missing(settings, seeds, workers):
        asked.append(settings)
        made.update(ending(dict.fromkeys(settings, 0.5)))

    monkeypatch.setattr(findings, "train_missing", train_missing)
    monkeypatch.setattr(findings, "read_available", lambda settings, seeds: made)
    page = findings.RESULTS / "findings.md"
    page.write_text("# A head by hand\n\n")
    for number in (12, 9):
        monkeypatch.setattr(sys, "argv", ["findings.py", "--only", str(number)])
        findings.main()
        assert set(asked[-1]) == set(findings.FINDINGS[number].settings)
        assert (findings.RESULTS / "findings" / f"{number}.png").exists()
        said = capsys.readouterr().out
        assert set(re.findall(r"^\| (\d+)\. ", said, re.MULTILINE)) == {str(number)}
    assert "9. STEER: does not hold here (0 of 3)" in said
    text = page.read_text()
    assert text.startswith("# A head by hand\n\n<!-- From here on")
    assert set(re.findall(r"^\| (\d+)\. ", text, re.MULTILINE)) == {"9", "12"}
    flags = "--eval_every 10 --save_every 50 --knobs clip_low=0.05 --updates_per_rollout 8"
    assert asked[0]["grpo-tight"] == flags
    assert f"- `grpo-tight`: `train.py {flags}`" in text
    assert "`par-0`" not in text


def test_diagnosis_page_shows_what_the_diagnosis_says_of_committed_runs(
    monkeypatch, capsys, tmp_path
):
    """Sentence by sentence, in order, as the page shortens it."""
    page = (RESULTS / "diagnosis.md").read_text()
    _, command, _, example, _ = page.split("```")
    shutil.copy(RESULTS / "runs.jsonl.gz", tmp_path)
    words = command.replace("experiments/results", str(tmp_path)).split()
    monkeypatch.setattr(sys, "argv", words[1:])
    diagnose.main()
    said = " ".join(capsys.readouterr().out.split())
    shown = re.split(r"(?<=[.,;]) (?=[A-Z])|(?<=\.) ", " ".join(example.split()))
    assert len(shown) > 15
    assert (tmp_path / "diagnosis.png").exists()
    place = 0
    for sentence in shown:
        place = said.index(sentence.strip(), place) + 1


# ---- runs: train, resume, commit -----------------------------------------------------------------


def test_a_run_is_resumed_kept_committed_and_not_trained_again(monkeypatch, tmp_path):
    """train.py stands in as a function that does two steps at a time, as if stopped by SIGTERM, and
    leaves a checkpoint."""
    folder = tmp_path / "runs" / "findings" / "a-seed1"
    monkeypatch.setattr(runs, "TRAINED", folder.parent)
    folder.mkdir(parents=True)
    commands = []
    bases = []

    def two_steps(command, **_):
        commands.append(command)
        done = 2 * len(commands)
        (folder / f"checkpoint-{done}").mkdir()
        (folder / "config.json").write_text('{"steps": 4}')
        rows = []
        for step in range(done + 1):
            rows.append(
                {
                    "step": step,
                    "reward/mean": step / 3,
                    "eval/auroc": 1 / 7,
                    "policy/cov_mean": 0.5,
                    "train/lr": 0.1,
                }
            )
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "metrics.jsonl").write_text(text)

    monkeypatch.setattr(runs.subprocess, "run", two_steps)
    monkeypatch.setattr(tiny, "base_model", lambda size: bases.append(size))
    settings = {"a": "--model tiny-mini"}
    with pytest.raises(SystemExit, match="a-seed1 was stopped"):
        runs.train_missing(settings, [1], 1)
    assert runs.read_available(settings, [1]) == {}
    runs.train_missing(settings, [1], 1)
    first, second = commands
    assert "--overwrite" in first and "--resume" not in first
    assert "--resume" in second and "--overwrite" not in second
    for command in commands:
        assert {"tiny-mini", "a-seed1", str(folder.parent)} <= set(command)
        assert command[command.index("--seed") + 1] == "1"

    rows = runs.read_available(settings, [1])["a"][0]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows[4] == {"step": 4, "reward/mean": 1.333, "eval/auroc": 0.1429}
    assert [row.get("policy/cov_mean") for row in rows] == [None, 0.5, None, None, None]
    assert type(rows[1]["step"]) is int

    # It is trained: not again. Committed, it is read without its folder.
    runs.train_missing(settings, [1], 1)
    assert runs.commit() == ["a-seed1"]
    assert runs.commit() == []
    monkeypatch.setattr(runs, "TRAINED", tmp_path / "elsewhere")
    runs.train_missing(settings, [1], 1)
    assert runs.read_available(settings, [1])["a"][0] == rows
    assert len(commands) == 2 and len(bases) == 2
    with pytest.raises(ValueError, match="has runs a with --model tiny-mini, not --lr 1"):
        runs.train_missing({"a": "--lr 1"}, [1], 1)


def test_the_first_seed_of_all_settings_is_trained_first(monkeypatch, tmp_path):
    trained = []
    monkeypatch.setattr(runs, "train", lambda name, flags: trained.append(name))
    monkeypatch.setattr(runs, "prepare", lambda all_flags: None)
    monkeypatch.setattr(runs, "TRAINED", tmp_path / "trained")
    runs.train_missing({"b": "", "c": ""}, [0, 1], 1)
    assert trained == ["b-seed0", "c-seed0", "b-seed1", "c-seed1"]


def test_committed_runs_are_the_same_bytes_in_any_order():
    one = [{"step": 0, "reward/mean": 0.5}]
    two = [{"step": 0, "reward/mean": 0.25}]
    file = runs.RESULTS / "runs.jsonl.gz"
    runs.write_committed({"b-seed0": one, "a-seed0": two})
    packed = file.read_bytes()
    runs.write_committed({"a-seed0": two, "b-seed0": one})
    assert file.read_bytes() == packed
    assert runs.read_committed() == {"a-seed0": two, "b-seed0": one}


def test_a_page_keeps_what_stands_above_its_mark(tmp_path):
    page = tmp_path / "page.md"
    runs.write_page(page, "`one`", "first")
    page.write_text("By hand.\n\n" + page.read_text())
    runs.write_page(page, "`one more`", "second")
    text = page.read_text()
    assert text.startswith(
        "By hand.\n\n<!-- From here on the page is written by `one more`. -->\n\n"
    )
    assert text.endswith("\nsecond\n") and "first" not in text


def test_halves_are_split_by_what_the_base_solves(monkeypatch):
    training = {"steps": 3, "batch": 4}
    monkeypatch.setattr(tiny, "TRAINING", tiny.TRAINING | training)
    monkeypatch.setattr(tiny, "PROBLEMS", {"train": 20, "test": 5})
    problems = tiny.problems("train", 20)
    drawn = []

    def solves_every_third(engine, tokenizer, problems, prompts, seeds, *, n, **_):
        drawn.append((n, [after - before for before, after in zip(seeds, seeds[1:])]))
        groups = []
        for i in range(len(problems)):
            groups.append(n * [{"group_accuracy": 0.5 if i % 3 == 0 else 0.0}])
        return groups

    monkeypatch.setattr(runs, "sample_and_verify", solves_every_third)
    runs.write_halves()
    assert drawn == [(16, 19 * [16])]
    easy = load_problems(runs.HALVES["easy"])
    hard = load_problems(runs.HALVES["hard"])
    assert easy == [problems[i] for i in (0, 1, 2, 3, 4, 6, 9, 12, 15, 18)]
    assert sorted(easy + hard, key=problems.index) == problems
    runs.write_halves()  # both are there: nothing is sampled
    assert len(drawn) == 1


# ---- gpu_check -----------------------------------------------------------------------------------


def gpu_check_rows(folder, *words):
    """(exit code, {check: its rows}) of gpu_check --cpu."""
    code = gpu_check.main(["--cpu", "--out", str(folder), *words])
    found = json.loads((folder / "gpu_cpu.json").read_text())
    return code, {check["name"]: check["rows"] for check in found["checks"]}


@pytest.mark.slow
def test_gpu_check_runs_without_a_gpu_and_writes_what_it_finds(tmp_path, capsys):
    words = ("--only", "ddp_is_fsdp", "process_group", "losses")
    code, checks = gpu_check_rows(tmp_path, *words)
    assert code == 0
    assert list(checks) == ["process_group", "losses", "ddp_is_fsdp"]
    page = (tmp_path / "gpu_cpu.md").read_text()
    printed = capsys.readouterr().out
    for rows in checks.values():
        assert rows
        for row in rows:
            assert row["ok"] is not False
            verdict = "yes" if row["ok"] else ""
            assert f"{row['what']} | {row['value']} | {row['expected']} | {verdict} |" in page
            assert f"{row['what']}: {row['value']}" in printed


def test_a_check_that_fails_is_a_row_and_hides_no_other(monkeypatch, tmp_path, capsys):
    def broken(lab):
        yield gpu_check.at_most("seven", 7, 5)
        raise TypeError("first line\nlast line")

    def lacking(lab):
        raise gpu_check.NotRun("something is not installed")
        yield

    def fine(lab):
        yield gpu_check.holds("six", True)

    monkeypatch.setattr(gpu_check, "CHECKS", (broken, lacking, fine))
    code, checks = gpu_check_rows(tmp_path)
    assert code == 1
    seven, failed = checks["broken"]
    assert seven == {"what": "seven", "value": "7", "expected": "at most 5", "ok": False}
    assert (failed["value"], failed["ok"]) == ("TypeError: last line", False)
    [row] = checks["lacking"]
    assert row["what"] == "not run: something is not installed" and row["ok"] is None
    assert checks["fine"][0]["ok"] is True
    assert (
        "| failed | TypeError: last line | no error | NO |" in (tmp_path / "gpu_cpu.md").read_text()
    )

    monkeypatch.setattr(gpu_check, "CHECKS", (lacking,))
    code, _ = gpu_check_rows(tmp_path)
    assert code == 0  # what is not installed is no failure
    code, checks = gpu_check_rows(tmp_path, "--minutes", "1")  # none begins in the last minute
    assert checks["lacking"][0]["what"] == "not run: the 1 minutes are over"


def test_the_statistics_that_gpu_check_compiles_are_those_of_the_program():
    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(8)
    options = dict(dynamic=False, fullgraph=True, backend="eager")  # traced, but not compiled
    traced = torch.compile(gpu_check.four_statistics, **options)
    distribution = Distribution(logits)
    for name, values in zip(NEEDED_STATISTICS, traced(logits, tokens)):
        assert torch.equal(values, STATISTICS[name](distribution, tokens)), name


def test_the_gpu_check_page_says_what_the_committed_numbers_say():
    data = json.loads((RESULTS / "gpu_cpu.json").read_text())
    assert (RESULTS / "gpu_cpu.md").read_text() == gpu_check.page(data)
    assert [check["name"] for check in data["checks"]] == [
        check.__name__ for check in gpu_check.CHECKS
    ]
    assert not any(row["ok"] is False for check in data["checks"] for row in check["rows"])


def test_gpu_check_without_a_gpu_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", bool)
    with pytest.raises(SystemExit):
        gpu_check.main([])
    assert "--cpu runs the same checks at small size" in capsys.readouterr().err


def wrong_in_float32(log_probs, *args, **kwargs):
    loss, metrics = losses.grpo(log_probs, *args, **kwargs)
    return loss * (1.0001 if log_probs.dtype == torch.float32 else 1.0), metrics


def scored_in_one_piece(policy, batch, wanted, micro_batches):
    return batch_statistics(policy, batch, wanted, [list(range(len(batch["ids"])))])


def rounded_product(head, hidden):
    return torch.nn.functional.linear(hidden, head.weight)


def no_push(self, named_tensors):
    list(named_tensors)  # as a push that is lost


# {check: what of which module, class or dict is replaced by what}
FAULTS = {
    "losses": (METHODS, "grpo", wrong_in_float32),
    "first_ratio": (gpu_check, "batch_statistics", scored_in_one_piece),
    "float32_logits_matter": (gpu_check, "float32_logits", rounded_product),
    "mismatch": (rollout.TorchEngine, "push_weights", no_push),
    "push_speed": (rollout.TorchEngine, "push_weights", no_push),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_gpu_check_finds_a_fault(name, monkeypatch, tmp_path):
    target, attribute, fault = FAULTS[name]
    if isinstance(target, dict):
        monkeypatch.setitem(target, attribute, fault)
    else:
        monkeypatch.setattr(target, attribute, fault)
    code, checks = gpu_check_rows(tmp_path, "--only", name)
    assert code == 1
    assert any(row["ok"] is False for row in checks[name])
