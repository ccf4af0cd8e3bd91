"""Every flag of train.py changes what it says and nothing else; the files of a run say what it
did.

What the tests touch of the program's inside: Policy, RunLog, TorchEngine, losses.METHODS,
verify.RULES, tiny.TRAINING, train.make_engine, train.evaluate, train.resolve_engine and
record.find_spec.
"""

import functools
import json
import math
import re
import shutil
import sys
import time
import types
from collections import Counter
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen2Config

import losses
import record
import tiny
import train
import verify
from diagnose import read_metrics
from policy import Policy
from record import RunLog
from rollout import TorchEngine
from test_all import (  # noqa: F401
    no_figures,
    no_process_group_left,
    recorded,
    toy,
    toy_args,
    toy_run,
    weights,
    without_times,
)
from train import parse

# ---- the flags, one by one: what a flag may touch in the metrics, and must -----------------------

# A run of two steps. Its answers are of different lengths, so that a mean over tokens is not one
# over answers.
PLAIN = (
    "--temperature 1.5 --max_response_len 6 --eval_every 1 --save_every 1 --keep_checkpoints 9"
    " --record_step 1 --dtype float32"
)

UPDATES = ["train/loss", "train/grad_norm", "policy/kl_to_rollout", "entropy/change_measured"]
IN_UPDATE_2 = ["train/loss", "train/grad_norm", "policy/clip_frac", "entropy/change_measured"]
BY_ADVANTAGE = [
    "entropy/change_predicted",
    "policy/cov_",
    "policy/group_cov_",
    "quadrant/pos_likely_dH_share",
    "quadrant/pos_rare_dH_share",
    "quadrant/neg_likely_dH_share",
    "quadrant/neg_rare_dH_share",
]
BY_REWARD = [*UPDATES, *BY_ADVANTAGE, "quadrant/", "reward/", "verify/"]
SAMPLED = [
    "reward/",
    "response/",
    "entropy/",
    "policy/",
    "quadrant/",
    "verify/",
    "rollout/",
    "train/loss",
    "train/grad_norm",
]

# flag: (its words; the metrics that differ at step 0, the evaluation of the base; those that differ
# at step 1). A name stands for all that begin so. The evaluation after step 1 is looked at only
# where "eval/" is named.
TOUCHES = {
    "data": ("--data BACKWARDS", [], SAMPLED),
    "rule": ("--rule even", ["eval/pass@", "eval/conf_", "eval/auroc", "eval/ece"], BY_REWARD),
    "num_prompts": ("--num_prompts 3", [], SAMPLED),
    "max_prompt_len": ("--max_prompt_len 5", [], []),
    "max_response_len": ("--max_response_len 1", ["eval/"], SAMPLED),
    "method": ("--method w_reinforce", [], UPDATES),
    "knobs": ("--knobs clip_low=1e-5 clip_high=1e-5", [], IN_UPDATE_2),
    "prompts_per_step": ("--prompts_per_step 16", [], SAMPLED),
    "group_size": ("--group_size 8", [], SAMPLED),
    "updates_per_rollout": ("--updates_per_rollout 4", [], [*UPDATES, "train/lr"]),
    "temperature": ("--temperature 1.2", [], SAMPLED),
    "adv_norm": ("--adv_norm none", [], [*UPDATES, *BY_ADVANTAGE]),
    "dynamic_sampling": ("--dynamic_sampling", [], SAMPLED),
    "max_resample": ("--max_resample 1", [], []),
    "tis_cap": ("--tis_cap 0.01", [], UPDATES),
    "steps": ("--steps 3", [], []),
    "lr": ("--lr 2e-3", [], [*UPDATES, "train/lr"]),
    "warmup_updates": ("--warmup_updates 20", [], [*UPDATES, "train/lr"]),
    "weight_decay": ("--weight_decay 50", [], UPDATES),
    "grad_clip": ("--grad_clip 1e-7", [], UPDATES),
    "lora_rank": ("--lora_rank 4", [], UPDATES),
    "parallel": ("--parallel fsdp", [], []),
    "activation_checkpointing": ("--activation_checkpointing", [], []),
    "engine": ("--engine auto", [], []),
    "rollout_gpu_memory": ("--rollout_gpu_memory 0.1", [], []),
    "eval_data": ("--eval_data BACKWARDS", ["eval/"], []),
    "eval_every": ("--eval_every 2", [], ["eval/"]),
    "eval_prompts": ("--eval_prompts 3", ["eval/"], []),
    "eval_samples": ("--eval_samples 2", ["eval/"], []),
    "eval_temperature": ("--eval_temperature 0.5", ["eval/"], []),
    "seed": ("--seed 1", [], SAMPLED),
    "save_every": ("--save_every 2", [], []),
    "keep_checkpoints": ("--keep_checkpoints 1", [], []),
    "record_step": ("--record_step 2", [], []),
    "trust_remote_code": ("--trust_remote_code", [], []),
    "dtype": ("--dtype bfloat16", ["eval/"], SAMPLED),
}
# Those that have a test of their own, here or where they were tested before.
ELSEWHERE = {
    "model",
    "micro_batch_tokens",
    "lora_alpha",
    "rollout_tp",
    "name",
    "out",
    "resume",
    "overwrite",
    "dry_run",
    "log_to",
}


def flag_run(toy, out, name, *more):
    """The rows of a run with PLAIN's flags, then these words."""
    return toy_run(toy, out, name, PLAIN, *more)


def state_of(folder, step):
    return torch.load(folder / f"checkpoint-{step}" / "trainer_state.pt", weights_only=True)


def optimizer_steps(folder, step):
    """The number of AdamW's steps on each parameter, as a set."""
    slots = state_of(folder, step)["optimizer"]["state"].values()
    return {int(slot["step"]) for slot in slots}


def saved(folder):
    names = [path.name for path in folder.glob("checkpoint-*")]
    return sorted(int(name.removeprefix("checkpoint-")) for name in names)


@pytest.fixture(scope="session")
def plain(toy, tmp_path_factory):
    """The folder of the run without further flags, and its rows; beside it BACKWARDS, the toy's
    problems in reverse, without the first."""
    out = tmp_path_factory.mktemp("plain")
    lines = (toy / "digits.jsonl").read_text().splitlines(keepends=True)
    (out / "backwards.jsonl").write_text("".join(lines[:0:-1]))
    rows = flag_run(toy, out, "run")
    return types.SimpleNamespace(rows=rows, folder=out / "run", other=str(out / "backwards.jsonl"))


def differing(a, b):
    """Names of the metrics that two rows do not share or that differ, without times."""
    names = {name for name in a.keys() | b.keys() if not name.startswith("time/")}
    return {name for name in names if a.get(name) != b.get(name)}


def differing_by_more_than_rounding(a, b):
    """The same for two methods: where one leaves out answers that the other runs, the log-probs are
    of other micro-batches."""
    names = differing(a, b)
    return {
        name
        for name in names
        if not (
            name in a and name in b and math.isclose(a[name], b[name], rel_tol=1e-5, abs_tol=1e-6)
        )
    }


def add_a_rule(monkeypatch):
    """A rule `even`, which rewards answers that are an even digit."""

    def judge_even(response, gold):
        return "right" if response in ("2", "4", "6", "8") else "wrong"

    monkeypatch.setitem(verify.RULES, "even", judge_even)


def test_every_flag_is_tested(plain):
    flags = json.loads((plain.folder / "config.json").read_text()).keys()
    assert flags == TOUCHES.keys() | ELSEWHERE


@pytest.mark.parametrize("flag", TOUCHES)
def test_a_flag_changes_what_it_says_and_nothing_else(
    flag, plain, toy, tmp_path, no_figures, monkeypatch
):
    add_a_rule(monkeypatch)
    words, at_0, at_1 = TOUCHES[flag]
    rows = flag_run(toy, tmp_path, "run", words.replace("BACKWARDS", plain.other))
    compare = differing_by_more_than_rounding if flag == "method" else differing
    found_0 = compare(rows[0], plain.rows[0])
    found_1 = compare(rows[1], plain.rows[1])
    if "eval/" not in at_1:  # the evaluation after step 1 may differ, as the weights do
        found_1 = {name for name in found_1 if not name.startswith("eval/")}
    for found, names in ((found_0, at_0), (found_1, at_1)):
        assert not [name for name in found if not name.startswith(tuple(names))]
        must = ["entropy/"] if names is SAMPLED else names
        assert all(any(name.startswith(start) for name in found) for start in must), found
    if not at_0 and not at_1 and flag != "steps":
        assert not differing(rows[2], plain.rows[2])
        pairs = zip(weights(tmp_path / "run").values(), weights(plain.folder).values())
        assert all(torch.equal(a, b) for a, b in pairs)
    if not any(name in at_1 for name in ("reward/", "eval/")) and flag != "record_step":
        assert recorded(tmp_path / "run") == recorded(plain.folder)


def answers_alone(answers):
    return [(a["prompt"], a["response"], a["seed"], a["reward"]) for a in answers]


def test_what_is_sampled(plain, toy, tmp_path, no_figures):
    """The flags of the data and of sampling, seen in the recorded answers."""
    base = recorded(plain.folder)

    names = iter("abcdefghijklmnop")

    def answers(*more):
        name = next(names)
        flag_run(toy, tmp_path, name, "--eval_data none --steps 1", *more)
        return recorded(tmp_path / name)

    assert [a["seed"] for a in base] == [i // 4 * 4 for i in range(32)]  # place in the stream x G
    assert len(base) == 8 * 4 and len({a["response"][0] for a in base}) > 2
    assert len({tuple(a["prompt"]) for a in base}) == 8  # an epoch has every problem once
    more = answers("--prompts_per_step", "16")
    assert answers_alone(more[:32]) == answers_alone(base) and len(more) == 64
    assert len(answers("--group_size", "3")) == 24
    short = answers("--max_response_len", "1")
    assert [a["response"] for a in short] == [a["response"][:1] for a in base]
    assert all(a["truncated"] == (a["response"] != [tiny.VOCAB[tiny.EOS]]) for a in short)
    assert all(a["truncated"] for a in short) and not all(a["truncated"] for a in base)
    for a in base:
        target = json.loads(a["gold"])["target"]
        assert a["prompt"] == [tiny.VOCAB[str(target)]]
        assert a["response"] != [*a["prompt"], tiny.VOCAB[tiny.EOS]] or a["reward"] == 1
    twice = answers("--data", f"{toy}/digits.jsonl", plain.other, "--prompts_per_step", "16")
    prompts = [tuple(a["prompt"]) for a in twice[::4]]
    assert sorted(Counter(prompts[:15]).values()) == [1] + [2] * 7  # an epoch of both sets
    one = [tuple(a["prompt"]) for a in answers("--seed", "1")[::4]]
    two = [tuple(a["prompt"]) for a in answers("--seed", "2")[::4]]
    assert one != two and set(one) == set(two)
    few = {tuple(a["prompt"]) for a in answers("--num_prompts", "5")}
    fewer = {tuple(a["prompt"]) for a in answers("--num_prompts", "3")}
    assert len(few) == 5 and len(fewer) == 3 and fewer < few
    other = {tuple(a["prompt"]) for a in answers("--num_prompts", "3", "--seed", "1")}
    assert len(other) == 3 and other != fewer
    model = AutoModelForCausalLM.from_pretrained(f"{toy}/model", dtype=torch.float32).eval()
    for temperature in ("0.5", "1.5"):
        for a in answers("--temperature", temperature):
            with torch.no_grad():
                logits = model(torch.tensor([a["prompt"] + a["response"]])).logits[0]
            rows = (logits[len(a["prompt"]) - 1 : -1] / float(temperature)).log_softmax(-1)
            expected = [float(row[token]) for row, token in zip(rows, a["response"])]
            assert a["log_probs"] == pytest.approx(expected, abs=1e-4)


def test_sampled_and_trained_at_one_temperature_with_the_newest_weights(plain):
    for row in plain.rows[1:]:
        assert 0 <= row["rollout/mismatch_max"] < 1e-4


@pytest.mark.parametrize("norm", ["std", "none"])
def test_adv_norm_seen_in_the_loss_at_ratio_one(norm, toy, tmp_path, no_figures):
    """With one update the loss is minus the mean advantage over the tokens: by hand from the
    recorded rewards."""
    words = f"--updates_per_rollout 1 --adv_norm {norm} --steps 1 --group_size 6"
    row = flag_run(toy, tmp_path, "run", words)[1]
    answers = recorded(tmp_path / "run")
    summed = tokens = 0
    for start in range(0, len(answers), 6):
        rewards = [a["reward"] for a in answers[start : start + 6]]
        scale = stdev(rewards) + 1e-6 if norm == "std" else 1.0
        for a in answers[start : start + 6]:
            summed += len(a["response"]) * (a["reward"] - fmean(rewards)) / scale
            tokens += len(a["response"])
    assert abs(summed) > 0.1
    assert row["train/loss"] == pytest.approx(-summed / tokens, rel=1e-4)


def test_dynamic_sampling_draws_again_at_most_max_resample_times(toy, tmp_path, no_figures):
    """From a problem whose answers are all too long, every round is drawn in vain; the counter of
    the checkpoint says how many."""
    problem = {"prompt": [{"role": "user", "content": "7"}]}
    problem["reward_model"] = {"ground_truth": {"numbers": [13, 13, 13], "target": 39}}
    (tmp_path / "no_way.jsonl").write_text(json.dumps(problem) + "\n")
    for name, words, rounds in (
        ("plain", "", 1),
        ("idle", "--max_resample 2", 1),
        ("usual", "--dynamic_sampling", 5),
        ("twice", "--dynamic_sampling --max_resample 2", 3),
        ("never", "--dynamic_sampling --max_resample 0", 1),
    ):
        words = f"--data {tmp_path}/no_way.jsonl --steps 1 --eval_data none {words}"
        flag_run(toy, tmp_path, name, words)
        assert state_of(tmp_path / name, 1)["drawn"] == 8 * rounds, name


# ---- the optimizer -------------------------------------------------------------------------------


def test_lr_weight_decay_and_grad_clip_seen_in_the_checkpoint(toy, tmp_path, no_figures):
    """The first step of AdamW from its two averages, of which the first holds a tenth of the
    clipped gradient."""
    before = load_file(toy / "model" / "model.safetensors")
    for name, lr, decay, clip in (
        ("a", 1e-3, 0.0, 1.0),
        ("b", 2e-3, 5.0, 0.01),
        ("c", 1e-3, 0.5, 99.0),
    ):
        words = f"--lr {lr} --weight_decay {decay} --grad_clip {clip} --warmup_updates 0"
        row = flag_run(toy, tmp_path, name, f"{words} --updates_per_rollout 1 --steps 1")[1]
        after = load_file(tmp_path / name / "checkpoint-1" / "model.safetensors")
        slots = state_of(tmp_path / name, 1)["optimizer"]["state"]
        squared = 0.0
        for key, slot in slots.items():
            gradient = slot["exp_avg"].double() / 0.1
            second = slot["exp_avg_sq"].double()
            assert torch.allclose(second, 0.05 * gradient.square(), rtol=1e-4, atol=1e-12)
            squared += float(gradient.square().sum())
            old = before[key.removeprefix("model.")].double()
            new = after[key.removeprefix("model.")].double()
            expected = old * (1 - lr * decay) - lr * gradient / (gradient.abs() + 1e-8)
            assert (new - expected).abs().max() < 1e-6
        assert row["train/lr"] == lr
        assert math.sqrt(squared) == pytest.approx(min(row["train/grad_norm"], clip), rel=1e-4)
        assert row["train/grad_norm"] > 0.1  # of the gradient before it was clipped


def test_the_rate_warms_up_over_updates_and_stays(toy, tmp_path, no_figures):
    """Two updates a step; the row holds the rate of the second. It goes on after a resume where it
    was."""
    words = "--lr 1e-3 --warmup_updates 5 --eval_data none --save_every 2"
    rows = toy_run(toy, tmp_path, "run", words, "--steps 2")
    assert [row["train/lr"] for row in rows] == pytest.approx([4e-4, 8e-4])
    rows = toy_run(toy, tmp_path, "run", words, "--steps 4 --resume")
    assert [row["train/lr"] for row in rows] == pytest.approx([4e-4, 8e-4, 1e-3, 1e-3])
    assert state_of(tmp_path / "run", 4)["updates"] == 8
    assert optimizer_steps(tmp_path / "run", 4) == {8}
    rows = toy_run(toy, tmp_path, "at_once", words, "--steps 1 --warmup_updates 0")
    assert rows[0]["train/lr"] == 1e-3


def test_tis_cap_weighs_every_gradient(toy, tmp_path, no_figures):
    """Engine and trainer agree, so that each weight is min(1, cap): the gradient is a quarter, or
    as it was."""
    words = "--updates_per_rollout 1 --steps 1 --tis_cap"
    whole = flag_run(toy, tmp_path, "whole", f"{words} 0")[1]
    quarter = flag_run(toy, tmp_path, "quarter", f"{words} 0.25")[1]
    idle = flag_run(toy, tmp_path, "idle", f"{words} 3")[1]
    assert quarter["train/grad_norm"] == pytest.approx(whole["train/grad_norm"] / 4, rel=1e-4)
    assert idle["train/grad_norm"] == pytest.approx(whole["train/grad_norm"], rel=1e-4)
    assert quarter["train/loss"] == pytest.approx(whole["train/loss"], abs=1e-7)


def test_a_skipped_update_is_left_out_of_the_means(toy, tmp_path, no_figures, monkeypatch):
    """The second of two updates is not finite: the row tells of the first, the only step that AdamW
    took."""
    clip = torch.nn.utils.clip_grad_norm_
    norms = []

    def spoiled(parameters, largest):
        parameters = list(parameters)
        norms.append(float(clip(parameters, largest)))
        if len(norms) == 2:
            parameters[0].grad.fill_(math.nan)
            return torch.tensor(math.nan)
        return torch.tensor(norms[-1])

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spoiled)
    rows = flag_run(toy, tmp_path, "run")
    assert [row["train/skipped"] for row in rows[1:]] == [1, 0]
    assert rows[1]["train/grad_norm"] == pytest.approx(norms[0])
    assert rows[2]["train/grad_norm"] == pytest.approx((norms[2] + norms[3]) / 2)
    assert state_of(tmp_path / "run", 2)["updates"] == 4
    assert optimizer_steps(tmp_path / "run", 2) == {3}


def test_a_loss_of_infinity_is_skipped_though_its_gradient_is_finite(
    toy, tmp_path, no_figures, monkeypatch
):
    grpo = losses.METHODS["grpo"]

    @functools.wraps(grpo)
    def infinite(*args, **kwargs):
        loss, metrics = grpo(*args, **kwargs)
        return loss + math.inf, metrics

    monkeypatch.setitem(losses.METHODS, "grpo", infinite)
    (row,) = flag_run(toy, tmp_path, "run", "--steps 1 --eval_data none")
    assert row["train/skipped"] == 2 and row["train/lr"] == pytest.approx(2e-4)
    before = load_file(toy / "model" / "model.safetensors")
    after = load_file(tmp_path / "run" / "checkpoint-1" / "model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_ten_updates_in_a_row_end_the_run_and_nine_do_not(toy, tmp_path, no_figures, monkeypatch):
    clip = torch.nn.utils.clip_grad_norm_
    count = 0

    def spoiled(parameters, largest):
        nonlocal count
        norm = clip(parameters, largest)
        count += 1
        return norm if count in (10, 20) else norm * math.nan

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spoiled)
    words = "--eval_data none --save_every 99 --updates_per_rollout 4 --steps 5"
    rows = toy_run(toy, tmp_path, "nine", words)
    assert [row["train/skipped"] for row in rows] == [4, 4, 3, 4, 3]
    assert "train/loss" not in rows[0]
    count = 20
    with pytest.raises(SystemExit, match="ten updates in a row"):
        toy_run(toy, tmp_path, "ten", words)
    assert len(read_metrics(tmp_path / "ten")) == 2 and count == 30


# ---- methods act: controllers, masks, knobs ------------------------------------------------------


def test_a_controller_gets_progress_entropy_and_the_last_metrics(toy, tmp_path, no_figures):
    """Progress is (step - 1) / steps; the entropy is response_mean; siren's anchor is what the
    first step measured."""
    words = "--eval_data none --steps 4 --method"
    rows = flag_run(toy, tmp_path, "par", f"{words} par --knobs schedule=epoch epochs=4")
    found = [row["controller/positive_weight"] for row in rows]
    assert found == pytest.approx([0, 1 / 3, 2 / 3, 1])
    rows = flag_run(toy, tmp_path, "aer", f"{words} aer --knobs target_ratio=2 rate=0.5")
    first = rows[0]["entropy/response_mean"]
    alpha = 0.0
    assert first != rows[0]["entropy/token_mean"]
    for row in rows:
        verdicts = ("right", "wrong", "no_answer", "timeout")
        assert sum(row[f"verify/{verdict}"] for verdict in verdicts) == 32  # of this step alone
        assert row["verify/right"] == 32 * row["reward/mean"]
        alpha = max(0.0, alpha + 0.5 * (2 * first - row["entropy/response_mean"]))
        assert row["controller/first_entropy"] == first
        assert row["controller/alpha"] == pytest.approx(alpha, rel=1e-9)
    rows = flag_run(toy, tmp_path, "siren", f"{words} siren --knobs coef=50")
    assert "controller/anchor" not in rows[0]
    assert {row["controller/anchor"] for row in rows[1:]} == {rows[0]["entropy/peak_mean"]}
    assert state_of(tmp_path / "siren", 3)["controller"] == {"anchor": rows[0]["entropy/peak_mean"]}
    for step in (2, 3, 4):  # resumed from step 1, whose metrics make the anchor
        shutil.rmtree(tmp_path / "siren" / f"checkpoint-{step}")
    again = flag_run(toy, tmp_path, "siren", f"{words} siren --knobs coef=50", "--resume")
    assert without_times(again) == without_times(rows)
    idle = flag_run(toy, tmp_path, "idle", f"{words} siren --knobs coef=1e-12")
    assert idle[0]["train/grad_norm"] == rows[0]["train/grad_norm"]  # no anchor yet, no penalty
    assert abs(idle[2]["train/grad_norm"] / rows[2]["train/grad_norm"] - 1) > 1e-3


@pytest.mark.parametrize(
    "method, idle, acts",
    [
        ("clip_b", "mu=1e9", "mu=0.1"),
        ("clip_v", "mu=1e9", "mu=0.1 most_frac=0.5"),
        ("clip_v", "mu=0.1 most_frac=1e-4", "mu=0.1 most_frac=0.5"),
        ("adaptive_entropy", "target_entropy=9 delta=0", "target_entropy=9 delta=0.1 max_coef=1"),
        ("quadrant", "neg_rare=1", "neg_rare=0.1"),
        ("par", "schedule=constant positive_weight=1", "schedule=constant positive_weight=0.2"),
        ("dcpo", "target_entropy=9", "target_entropy=0.001"),
    ],
)
def test_masks_and_controllers_reach_the_loss(method, idle, acts, plain, toy, tmp_path, no_figures):
    """With knobs that switch it off the method is GRPO, with others it changes the updates and
    nothing before them."""
    words = f"--steps 1 --method {method} --knobs"
    off = flag_run(toy, tmp_path, "off", f"{words} {idle}")[1]
    on = flag_run(toy, tmp_path, "on", f"{words} {acts}")[1]

    def touched(row):
        names = differing_by_more_than_rounding(row, plain.rows[1])
        return {name for name in names if not name.startswith(("eval/", "controller/"))}

    found = touched(on)
    assert {"train/loss", "train/grad_norm", "entropy/change_measured"} <= found
    assert found <= {*UPDATES, "policy/clip_frac"}
    # dcpo has no switch; its two targets differ. The KL's mean is over the tokens that are run.
    assert method == "dcpo" or touched(off) <= {"policy/kl_to_rollout"}
    assert on["train/grad_norm"] != off["train/grad_norm"]


def test_aepo_mixes_from_the_second_step_on(toy, tmp_path, no_figures):
    """Its controller knows a temperature after the first step, whether or not a checkpoint was
    saved since."""
    words = "--method aepo --knobs target_entropy=9 --save_every 9 --eval_data none --temperature 1"
    words += " --prompts_per_step 32 --group_size 8"
    for step in (1, 2):
        flag_run(toy, tmp_path, f"{step}", f"{words} --steps 3 --record_step {step}")
        mixed = [a for a in recorded(tmp_path / f"{step}", step) if a["log_probs"] is None]
        assert bool(mixed) == (step == 2)


@pytest.mark.slow
def test_the_users_knobs_come_after_those_of_the_tiny_model(tmp_path, monkeypatch, no_figures):
    """A base of three updates; kl_cov chooses 2 % of its tokens by the default for the tiny models,
    0.02 % for others."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tiny, "TRAINING", tiny.TRAINING | dict(steps=3, batch=4))
    words = "--model tiny-mini --steps 1 --prompts_per_step 8 --group_size 4 --engine torch"
    words += " --updates_per_rollout 1 --eval_samples 1 --eval_prompts 2 --eval_every 1"
    words += " --method kl_cov --record_step 1 --name"
    asked = set()
    generate = TorchEngine.generate

    def seen(engine, prompts, **options):
        asked.update(tuple(prompt) for prompt in prompts if options["n"] == 1)
        return generate(engine, prompts, **options)

    monkeypatch.setattr(TorchEngine, "generate", seen)
    for name, knobs, share in (("usual", "", 0.02), ("mine", "--knobs cov_frac=0.3", 0.3)):
        train.main(f"{words} {name} {knobs}".split())
        row = read_metrics(f"runs/{name}")[-1]
        tokens = round(row["response/len_mean"] * 32)
        assert row["policy/selected_frac"] == pytest.approx(int(share * tokens) / tokens)
        assert row["eval/problems"] == 2  # of --eval_data countdown, the default of the tiny models
    ids = {}
    for split in ("train", "test"):
        prompts = [problem.prompt for problem in tiny.problems(split, 4000)]
        ids[split] = {tuple(tiny.VOCAB[c] for c in prompt) for prompt in prompts}
    assert len(asked) == 2 and asked < ids["test"]
    assert {tuple(a["prompt"]) for a in recorded(Path("runs/mine"))} < ids["train"]
    for method, setting, mine in (
        ("clip_cov", "cov_frac=2e-2", "clip_low=0.3"),
        ("kl_cov", "cov_frac=2e-2", "kl_coef=2"),
        ("clip_v", "most_frac=2e-2", "mu=3"),
    ):
        assert parse(["--method", method]).knobs == [setting]
        assert parse(["--method", method, "--knobs", mine]).knobs == [setting, mine]
        assert parse(["--method", method, "--model", "somewhere"]).knobs == []
    assert parse(["--method", "grpo"]).knobs == []


# ---- defaults, choices, refusals -----------------------------------------------------------------

# What the committed findings were made with, and what the README's commands for GPUs mean.
FOR_ALL = dict(
    rule="",
    num_prompts=0,
    method="grpo",
    group_size=8,
    temperature=1.0,
    adv_norm="std",
    dynamic_sampling=False,
    max_resample=4,
    tis_cap=0.0,
    warmup_updates=10,
    weight_decay=0.0,
    grad_clip=1.0,
    lora_rank=0,
    lora_alpha=32.0,
    parallel="ddp",
    dtype="auto",
    micro_batch_tokens=16384,
    activation_checkpointing=False,
    rollout_tp=1,
    rollout_gpu_memory=0.0,
    eval_prompts=0,
    eval_temperature=1.0,
    out="runs",
    seed=0,
    keep_checkpoints=2,
    resume=False,
    overwrite=False,
    dry_run=False,
    log_to="",
    record_step=0,
    trust_remote_code=False,
    data=["countdown"],
    knobs=[],
    eval_every=20,
)
FOR_MODELS = dict(
    prompts_per_step=256,
    updates_per_rollout=8,
    steps=300,
    lr=1e-6,
    max_prompt_len=2048,
    max_response_len=8192,
    eval_data=[],
    eval_samples=8,
    save_every=50,
)
FOR_TINY = dict(
    prompts_per_step=64,
    updates_per_rollout=4,
    steps=100,
    lr=1e-4,
    max_prompt_len=24,
    max_response_len=24,
    eval_data=["countdown"],
    eval_samples=16,
    save_every=20,
)


def test_defaults_of_the_tiny_models_and_of_others(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    for model, other in (
        ("tiny", FOR_TINY),
        ("tiny-mini", FOR_TINY),
        ("tiny-small", FOR_TINY),
        ("a/b", FOR_MODELS),
    ):
        found = vars(parse(["--model", model, "--engine", "torch"]))
        name = f"grpo-{model.split('/')[-1]}-seed0"
        assert found == FOR_ALL | other | dict(model=model, engine="torch", name=name)
    assert parse([]).model == "tiny"
    mine = parse("--lr 3e-3 --steps 7 --eval_data none --prompts_per_step 12".split())
    assert (mine.lr, mine.steps, mine.eval_data, mine.prompts_per_step) == (3e-3, 7, ["none"], 12)
    assert parse(["--lr", "3e-3", "--model", "tiny-mini"]).save_every == 20


def test_defaults_on_gpus(monkeypatch):
    """Sharded and recomputed, on a single GPU too; what is given is used, and an evaluation, whose
    policy stays on the CPU, is not sharded."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for words, parallel, recomputed in (
        ("", "fsdp", True),
        ("--model a/b", "fsdp", True),
        ("--parallel ddp", "ddp", True),
        ("--activation_checkpointing false", "fsdp", False),
        ("--activation_checkpointing", "fsdp", True),
        ("--steps 0", "ddp", False),
    ):
        cfg = parse([*words.split(), "--engine", "torch"])
        assert (cfg.parallel, cfg.activation_checkpointing) == (parallel, recomputed), words


def test_help_says_each_flag_and_its_default(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    out = capsys.readouterr().out
    words = " ".join(out[out.index("policy and data:") :].split())
    parts = dict(re.findall(r" --([a-z_]+) (?=[a-zA-Z ])(.*?\(default: [^)]*\))", words))
    assert parts.keys() == {*FOR_ALL, *FOR_TINY, "model", "name", "engine"}
    for name, value in (FOR_ALL | FOR_TINY).items():
        assert parts[name].endswith(f"(default: {value})"), name


ZERO = {
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
NUMBERS = [name for name, value in (FOR_ALL | FOR_TINY).items() if type(value) in (int, float)]


def refused(words):
    """The complaint about a command line; "" if there is none."""
    try:
        parse(words)
    except ValueError as error:
        return str(error)
    return ""


def test_numbers_must_be_positive_and_some_may_be_zero(tmp_path):
    for name in NUMBERS:
        complaint = f"--{name} {0 * (FOR_ALL | FOR_TINY)[name]}: it must be positive"
        found = refused([f"--{name}", "0", "--out", str(tmp_path)])
        assert found == ("" if name in ZERO else complaint)
        below = refused([f"--{name}", "-1"])
        assert f"--{name} -1" in below
        assert below.endswith("it must be 0 or more" if name in ZERO else "it must be positive")
        if type((FOR_ALL | FOR_TINY)[name]) is float:
            for text in ("nan", "inf", "-inf"):
                told = f"--{name} {text}: a finite number is expected"
                assert refused([f"--{name}={text}"]) == told


def test_a_list_flag_given_twice_adds_up():
    words = "--data a --knobs clip_low=0.1 clip_high=0.3 --data b c --knobs clip_high=0.4"
    cfg = parse(words.split())
    assert cfg.data == ["a", "b", "c"]  # without the default
    assert cfg.knobs == ["clip_low=0.1", "clip_high=0.3", "clip_high=0.4"]
    assert cfg.eval_data == ["countdown"]
    assert parse("--eval_data a b --eval_data none".split()).eval_data == ["none"]
    assert parse([]).data == ["countdown"]  # the default is as it was


def test_the_home_folder_is_found_in_every_flag_that_names_files(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    cfg = parse("--out=~/o --model ~/m --data ~/a countdown --eval_data=~/b".split())
    here = str(tmp_path)
    assert (cfg.out, cfg.model) == (f"{here}/o", f"{here}/m")
    assert (cfg.data, cfg.eval_data) == ([f"{here}/a", "countdown"], [f"{here}/b"])
    assert cfg.name == "grpo-m-seed0"


def test_a_file_may_have_a_comma_in_its_name(tmp_path):
    path = tmp_path / "a,b.jsonl"
    assert "separated by spaces" in refused(["--data", str(path)])
    path.write_text("")
    assert refused(["--data", str(path), "--out", str(tmp_path)]) == ""


def test_rollout_tp_of_zero_is_refused():
    assert refused(["--rollout_tp", "0"]) == "--rollout_tp 0: it must be positive"


@pytest.mark.parametrize(
    "words, complaint",
    [
        ("--parallel fsdp", ""),
        ("--parallel FSDP", "choose from ddp, fsdp"),
        ("--rule math", ""),
        ("--rule even", "choose from countdown, math"),
        ("--dtype bfloat16", ""),
        ("--dtype float16", "choose from auto, float32, bfloat16"),
        ("--adv_norm none", ""),
        ("--adv_norm mean", "choose from std, none"),
        ("--log_to mlflow", "choose from tensorboard, wandb"),
        ("--engine sglang", "unknown engine"),
        ("--rollout_tp 2 --engine torch", "needs --engine vllm"),
        ("--method w_reinforce", ""),
        ("--method w_reinforce --adv_norm std", ""),
        ("--method w_reinforce --adv_norm none", "with --adv_norm: it uses no group advantages"),
        ("--method w_reinforce --dynamic_sampling", "it has no baseline"),
        ("--method w_reinforce --tis_cap 2", ""),
        ("--method aepo --tis_cap 2", "--method aepo with --tis_cap: some of its answers"),
        ("--method aepo --dynamic_sampling", ""),
        ("--method gspo --tis_cap 2", "--method gspo with --tis_cap: its ratio is the sequence's"),
        ("--method gspo --tis_cap 0", ""),
        ("--method cispo --tis_cap 2", ""),
        ("--seed 33554431 --group_size 8", ""),
        ("--seed 33554432 --group_size 8", "must stay below 2^28"),
        ("--group_size 1", ""),
        ("--group_size 1 --dynamic_sampling", "needs groups of 2 or more"),
        ("--group_size 2 --dynamic_sampling", ""),
        ("--prompts_per_step 16 --updates_per_rollout 8", ""),
        ("--prompts_per_step 24 --updates_per_rollout 8", "must be a multiple of 2 (ranks) x 8"),
        ("--prompts_per_step 24 --updates_per_rollout 8 --steps 0", ""),
        ("--name .hidden", "one folder's name"),
        ("--name a/b", "one folder's name"),
        ("--name ..", "one folder's name"),
        ("--steps 0 --eval_data none", "there is nothing to do"),
        ("--steps 0", ""),
        ("--steps 0 --resume", "into a trained run's folder"),
        ("--method kl_cov --knobs cov_frac=2", "a fraction in (0, 1]"),
        ("--method no_such", "--method no_such is unknown"),
        ("--method grpo --knobs mu=3", "grpo has no knob 'mu'. It has: clip_low=0.2"),
        ("--resume", "no complete checkpoint; start it without --resume"),
        ("--resume --dry_run", ""),
        ("--resume --overwrite", "choose one"),
        ("--record_step 100", ""),
        ("--record_step 101 --steps 0", ""),
        ("--record_step 101", "--record_step 101 is after the last of --steps 100"),
        ("--rollout_gpu_memory 1", ""),
        ("--rollout_gpu_memory 1.5", "--rollout_gpu_memory 1.5: a fraction in (0, 1]"),
        ("--data a.jsonl,b.jsonl", "--data a.jsonl,b.jsonl: several are separated by spaces"),
        ("--eval_data a,b", "--eval_data a,b: several are separated by spaces"),
        ("--knobs clip_low=0.1,clip_high=0.3", "several are separated by spaces, not by commas"),
        ("--data=", "--data holds an empty word"),
        ("--model=", "--model is empty"),
        ("--dtype=", "--dtype is empty"),
        ("--log_to=", ""),
        ("--method=", "--method  is unknown"),
        ("--name ~", "one folder's name"),
        ("--steps 1.5", "argument --steps: invalid int value: '1.5'"),
        ("--lr fast", "argument --lr: invalid float value: 'fast'"),
        ("--resume runs/a", "argument --resume: Truthy value expected"),
        ("--data", "argument --data: expected at least one argument"),
        ("--lr 1e-3 1e-4", "1e-4: there is no such flag; --help lists all"),
        ("--eval-every 0", "--eval_every 0: it must be positive"),
        ("--eval_evry 3", "--eval_evry: there is no such flag; did you mean --eval_every?"),
        ("--max_promt_len=9", "did you mean --max_prompt_len?"),
        ("--foo", "--foo: there is no such flag; --help lists all"),
        ("--temperature 1e300", "--temperature 1e+300: a finite number is expected"),
        ("--data none", "--data none: training needs problems"),
    ],
)
def test_what_is_refused_on_two_ranks(words, complaint, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = refused([*words.split(), "--out", str(tmp_path)])
    assert complaint in found and bool(complaint) == bool(found)
    assert not list(tmp_path.iterdir())


def test_flags_are_not_abbreviated():
    told = "--step: there is no such flag; did you mean --steps? --help lists all"
    assert refused(["--step", "3"]) == told


def test_help_describes_the_program_in_whole_sentences(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    assert "and watch its entropy. Defaults" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("kind", ["file", "link to nothing"])
def test_a_folder_that_cannot_be_made_is_refused_at_once(kind, tmp_path):
    path = tmp_path / "run"
    path.write_text("") if kind == "file" else path.symlink_to("nothing")
    told = f"{path} cannot be written, since {path} is no folder"
    assert told in refused(["--name", "run", "--out", str(tmp_path)])
    assert refused(["--name", "run", "--out", str(tmp_path / "new" / "er")]) == ""
    assert not (tmp_path / "new").exists()


def told_of_model(folder):
    """The complaint of check_model_name; "" if there is none."""
    try:
        train.check_model_name(parse(["--model", str(folder)]))
    except ValueError as error:
        return str(error)
    return ""


def test_models_that_cannot_be_trained_are_refused_by_their_config(tmp_path):
    assert told_of_model("./nowhere") == "--model ./nowhere: no such folder"
    config = {"model_type": "qwen2"}
    for change, complaint in (
        ({}, ""),
        ({"model_type": "nosuch"}, f"--model {tmp_path}: The checkpoint you are trying to load"),
        ({"auto_map": {"AutoConfig": "x.C"}, "model_type": "own"}, "argument --trust_remote_code"),
        ({"quantization_config": {"quant_method": "fp8"}}, "its weights are quantized (fp8)"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        found = told_of_model(tmp_path)
        assert complaint in found and bool(complaint) == bool(found)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused():
    config = Qwen2Config(vocab_size=10)
    sets = [([], []), (["a", "b"], [[1, 9], [3]])]
    train.check_token_ids(sets, config)
    with pytest.raises(ValueError, match="writes token 10, but the model has only 10"):
        train.check_token_ids([*sets, (["c"], [[2, 10, 4]])], config)


def test_a_run_may_have_spaces_in_its_name(tmp_path):
    assert refused(["--name", "my run", "--out", str(tmp_path)]) == ""
    assert "one folder's name" in refused(["--name", "my\nrun", "--out", str(tmp_path)])


def test_a_run_is_named_after_method_model_and_seed(tmp_path):
    for words, name in (
        ("", "grpo-tiny-seed0"),
        ("--method par --seed 3 --model a/b", "par-b-seed3"),
        ("--steps 0 --method par", "eval-tiny-seed0"),
        ("--model runs/x/checkpoint-7", "grpo-x-checkpoint-7-seed0"),
        ("--name mine --seed 3", "mine"),
    ):
        assert parse([*words.split(), "--out", str(tmp_path)]).name == name


# ---- the folder of a run -------------------------------------------------------------------------

# Another value for every flag; what may change on --resume.
OTHERS = dict(
    rule="math",
    num_prompts=9,
    method="par",
    group_size=4,
    temperature=0.9,
    adv_norm="none",
    dynamic_sampling=True,
    max_resample=3,
    tis_cap=2.0,
    warmup_updates=9,
    weight_decay=0.1,
    grad_clip=2.0,
    lora_rank=4,
    lora_alpha=16.0,
    parallel="fsdp",
    dtype="float32",
    micro_batch_tokens=99,
    activation_checkpointing=True,
    rollout_gpu_memory=0.5,
    eval_prompts=7,
    eval_temperature=0.9,
    seed=1,
    keep_checkpoints=3,
    log_to="tensorboard",
    record_step=2,
    trust_remote_code=True,
    data=["x"],
    prompts_per_step=128,
    updates_per_rollout=2,
    steps=101,
    lr=2e-4,
    max_prompt_len=25,
    max_response_len=25,
    eval_data=["none"],
    eval_samples=8,
    eval_every=10,
    save_every=10,
    knobs=["positive_weight=0.5"],
    model="tiny-mini",
    overwrite=True,
)
MAY_CHANGE = {"save_every", "keep_checkpoints", "log_to", "record_step", "rollout_gpu_memory"}


def words_of(name, value):
    if value is True:
        return [f"--{name}"]
    return [f"--{name}", *map(str, value if isinstance(value, list) else [value])]


@pytest.mark.parametrize("method", ["quadrant", "par"])
def test_what_may_change_on_resume(method, tmp_path, monkeypatch):
    """Every flag but a few is refused with its name and both values; --steps may grow, unless a
    schedule depends on it."""
    monkeypatch.setattr(record, "find_spec", lambda name: True)
    folder = tmp_path / "run"
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-11x"):
        (folder / name).mkdir(parents=True)
    start = ["--method", method, "--out", str(tmp_path), "--name", "run", "--engine", "torch"]
    config = vars(parse(start))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("")
    assert {*OTHERS, "engine", "name", "out", "resume", "dry_run", "rollout_tp"} == config.keys()
    assert refused([*start, "--resume"]) == ""
    assert "holds an earlier run: --resume goes on" in refused(start)
    assert refused([*start, "--overwrite"]) == refused([*start, "--dry_run"]) == ""
    for name, value in OTHERS.items():
        if name == "knobs":
            value = ["pos_rare=0.5"] if method == "quadrant" else value
        if name == "overwrite":
            continue  # with --resume it is refused, see above
        if name == "method":
            value = "par" if method == "quadrant" else "grpo"
        complaint = refused([*start, "--resume", *words_of(name, value)])
        if name in MAY_CHANGE or (name == "steps" and method == "quadrant"):
            assert complaint == "", name
        else:
            assert f"was trained with --{name} {config[name]}, not " in complaint, name
    found = refused([*start, "--resume", "--steps", "9"])
    assert "--steps 9: " in found and "at step 10 already" in found
    assert "is at step" not in refused([*start, "--resume", "--steps", "10"])
    elsewhere = config | {"engine": "vllm", "out": "/elsewhere"}
    (folder / "config.json").write_text(json.dumps(elsewhere))
    assert refused([*start, "--resume"]) == ""
    (folder / "config.json").write_text(json.dumps(config))
    both = refused([*start, "--resume", "--lr", "2e-4", "--seed", "1"])
    assert "--lr 0.0001, not 0.0002; --seed 0, not 1" in both


def test_a_run_of_other_settings_is_not_overwritten_by_accident(tmp_path):
    (tmp_path / "mine").mkdir()
    words = ["--out", str(tmp_path), "--name", "mine"]
    assert refused(words) == refused(["--out", str(tmp_path), "--name", "new", "--overwrite"]) == ""
    assert "no run's folder" in refused([*words, "--overwrite"])
    (tmp_path / "mine" / "config.json").write_text("{}")
    assert refused(words) == refused([*words, "--overwrite"]) == ""
    (tmp_path / "mine" / "metrics.jsonl").write_text("")
    assert "holds an earlier run" in refused(words)
    (tmp_path / "mine" / "checkpoint-3").mkdir()
    for more in (["--steps", "0"], ["--steps", "0", "--dry_run"], ["--steps", "0", "--overwrite"]):
        assert "into a trained run's folder" in refused([*words, *more])


def test_overwrite_leaves_nothing_of_the_earlier_run(plain, toy, tmp_path, no_figures):
    shutil.copytree(plain.folder, tmp_path / "run")
    rows = flag_run(toy, tmp_path, "run", "--overwrite --steps 1 --record_step 0 --lr 2e-3")
    assert [row["step"] for row in rows] == [0, 1] and saved(tmp_path / "run") == [1]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["lr"] == 2e-3
    assert not list((tmp_path / "run").glob("step-*"))


def test_when_a_run_evaluates_saves_and_records(toy, tmp_path, no_figures):
    words = "--eval_every 3 --save_every 2 --record_step 4 --eval_prompts 2 --eval_samples 3"
    words = f"{words} --eval_temperature 0.9"
    rows = toy_run(toy, tmp_path, "run", words, "--steps 5 --keep_checkpoints 9")
    assert [row["step"] for row in rows] == list(range(6))
    assert [row["step"] for row in rows if "eval/pass@1" in row] == [0, 3, 5]
    assert saved(tmp_path / "run") == [2, 4, 5]
    assert [path.name for path in (tmp_path / "run").glob("step-*")] == ["step-4-rank-0.jsonl"]
    assert all(state_of(tmp_path / "run", n)["step"] == n for n in (2, 4, 5))
    assert [state_of(tmp_path / "run", n)["drawn"] for n in (2, 4, 5)] == [16, 32, 40]
    file = json.loads((tmp_path / "run" / "eval-digits.json").read_text())
    settings = {
        "set": "digits",
        "model": f"{toy}/model",
        "step": 5,
        "eval_data": [f"{toy}/digits.jsonl"],
        "eval_prompts": 2,
        "samples": 3,
        "temperature": 0.9,
        "max_response_len": 4,
    }
    names = [name for name in rows[5] if name.startswith("eval/")]
    metrics = {name.removeprefix("eval/"): rows[5][name] for name in names}
    assert file == settings | metrics
    toy_run(toy, tmp_path, "one", words, "--steps 4 --keep_checkpoints 1 --eval_data none")
    assert saved(tmp_path / "one") == [4]


def test_config_holds_what_was_given(plain, toy):
    config = json.loads((plain.folder / "config.json").read_text())
    given = dict(model=f"{toy}/model", temperature=1.5, record_step=1, lr=1e-3, name="run")
    assert given.items() <= config.items() and config["engine"] == "torch"


@pytest.mark.parametrize("method", ["kl_loss", "clip_cov"])
def test_resume_of_references_and_random_draws(method, toy, tmp_path, no_figures):
    """The reference stays the base; what is drawn at random depends on seed and step, not on what
    was drawn before."""
    knobs = {"kl_loss": "kl_coef=0.5", "clip_cov": "cov_low=-9 cov_high=9 cov_frac=0.3"}[method]
    words = "--lr 1e-2 --dynamic_sampling --steps 3 --eval_every 9 --method"
    words = f"{words} {method} --knobs {knobs}"
    whole = flag_run(toy, tmp_path, "run", words)
    before = weights(tmp_path / "run")
    drawn = state_of(tmp_path / "run", 3)["drawn"]
    for step in (2, 3):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{step}")
    again = flag_run(toy, tmp_path, "run", words, "--resume")
    assert without_times(again) == without_times(whole) and saved(tmp_path / "run") == [1, 2, 3]
    after = weights(tmp_path / "run")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert state_of(tmp_path / "run", 3)["drawn"] == drawn > 24
    if method == "kl_loss":
        assert whole[1]["policy/kl_to_ref"] < whole[3]["policy/kl_to_ref"]


def test_a_checkpoint_of_another_step_is_refused(plain, toy, tmp_path, capsys):
    shutil.copytree(plain.folder, tmp_path / "run")
    (tmp_path / "run" / "checkpoint-2").rename(tmp_path / "run" / "checkpoint-1x")
    (tmp_path / "run" / "checkpoint-1").rename(tmp_path / "run" / "checkpoint-2")
    with pytest.raises(SystemExit):
        flag_run(toy, tmp_path, "run", "--steps 3 --resume")
    error = capsys.readouterr().err
    assert "is a checkpoint of the run run at step 1: put it back, or delete it" in error


@pytest.mark.parametrize(
    "scores, kept",
    [
        ({0: 0.9, 1: 0.1, 2: 0.4, 3: 0.3, 4: 0.2, 5: 0.1}, [2, 4, 5]),
        ({0: 0.1, 1: 0.1, 3: 0.3, 5: 0.4}, [4, 5]),
        ({0: 0.0, 1: 0.0, 5: 0.0}, [1, 4, 5]),
        ({}, [4, 5]),
    ],
)
def test_the_best_evaluated_checkpoint_stays(scores, kept, toy, tmp_path, monkeypatch, no_figures):
    """By eval/pass@1, whatever the training reward; a checkpoint without an evaluation is never the
    best."""
    write = RunLog.write

    def with_scores(log, row):
        row = {name: value for name, value in row.items() if not name.startswith("eval/")}
        pass_at_1 = {"eval/pass@1": scores[row["step"]]} if row["step"] in scores else {}
        best_otherwise = {"reward/mean": 1 - row["step"] / 9, "entropy/response_mean": row["step"]}
        write(log, row | pass_at_1 | (best_otherwise if row["step"] else {}))

    monkeypatch.setattr(RunLog, "write", with_scores)
    flag_run(toy, tmp_path, "run", "--steps 5 --keep_checkpoints 2 --eval_data none")
    assert saved(tmp_path / "run") == kept


# ---- what a run says: tables, warnings, times ----------------------------------------------------


def test_the_table_and_the_bar_show_the_row(toy, tmp_path, capsys, no_figures):
    words = "--eval_every 2 --eval_samples 8 --temperature 1.5"
    rows = toy_run(toy, tmp_path, "run", words, "--steps 3")
    out, err = capsys.readouterr()
    lines = [line.split()[-6:] for line in out.splitlines()]
    start = lines.index(["step", "reward", "pass@1", "pass@8", "entropy", "s/step"])
    names = ["reward/mean", "eval/pass@1", "eval/pass@8", "entropy/response_mean", "time/step_s"]
    for line, row in zip(lines[start + 1 :], [rows[0], rows[2], rows[3]]):
        cells = [f"{row[name]:.3f}" if name in row else "-" for name in names]
        assert out.count("\n" + " ".join(f"{cell:>8}" for cell in [row["step"], *cells])) == 1
        assert line == [str(row["step"]), *cells]
    assert f"{tmp_path}/run: checkpoint-2, checkpoint-3, config.json" in out
    assert "stopped by" not in out
    for row in rows[1:]:
        shown = f"entropy={row['entropy/response_mean']:.3f}, reward={row['reward/mean']:.3f}"
        shown += f", s={row['time/step_s']:.1f}"
        assert shown in err
    assert "3/3" in err and "4/3" not in err and "warning" not in err
    toy_run(toy, tmp_path, "run", words, "--steps 4 --resume")
    err = capsys.readouterr().err
    assert "3/4" in err and "4/4" in err and "0/4" not in err


LATE = "raise verify.TIME_LIMIT"
WARNINGS = {  # metric: (largest value without a warning, cause, advice)
    "response/truncated_frac": (0.9, "of the answers are truncated", "raise --max_response_len"),
    "reward/zero_std_frac": (0.9, "of the groups have equal rewards", "--dynamic_sampling"),
    "rollout/mismatch_mean": (0.05, "engine and trainer differ by 0.05 nats", "--tis_cap 2"),
    "train/skipped": (0, "updates were skipped: loss or gradient not finite", "lower --lr"),
    "verify/timeout": (0, ": answers that ran out of the verifier's time", LATE),
    "eval/truncated_frac": (0.9, "test answers are truncated", "raise --max_response_len"),
    "eval/timeout": (0, "test answers that ran out of the verifier's time", LATE),
}


def test_warnings_come_once_above_their_limit_and_not_at_it(
    toy, tmp_path, monkeypatch, capsys, no_figures
):
    write = RunLog.write
    changed = {}
    monkeypatch.setattr(RunLog, "write", lambda log, row: write(log, row | changed))
    for name, (limit, _, _) in WARNINGS.items():
        changed[name] = limit
    toy_run(toy, tmp_path, "at_the_limit")
    assert "warning" not in capsys.readouterr().err
    for name, (limit, _, _) in WARNINGS.items():
        changed[name] = limit + 0.01
    toy_run(toy, tmp_path, "above")
    err = capsys.readouterr().err
    lines = ["warning: " + rest.splitlines()[0] for rest in err.split("warning: ")[1:]]
    assert len(lines) == len(WARNINGS)
    for _, cause, advice in WARNINGS.values():
        assert sum(cause in line and advice in line for line in lines) == 1, cause


def test_methods_that_idle_with_one_update_are_warned_of(toy, tmp_path, capsys, no_figures):
    for method, updates, warned in (
        ("clip_higher", "1", True),
        ("clip_higher", "2", False),
        ("grpo", "1", False),
    ):
        words = f"--method {method} --updates_per_rollout {updates} --eval_data none"
        flag_run(toy, tmp_path, f"{method}-{updates}", words)
        warning = f"warning: {method} with --updates_per_rollout 1: "
        assert (warning in capsys.readouterr().err) == warned


def test_times_are_those_of_the_stages(toy, tmp_path, monkeypatch, no_figures):
    """A clock that only work moves: 1 for sampling, 50 for verifying, 100 for a forward, 10,000 for
    an optimizer's step, 10^6 for a push."""
    clock = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: clock)

    def count(owner, name, seconds):
        before = getattr(owner, name)

        def counted(*args, **kwargs):
            nonlocal clock
            clock += seconds
            return before(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    count(TorchEngine, "generate", 1)
    count(verify, "score", 50)
    count(Policy, "forward", 100)
    count(torch.optim.AdamW, "step", 10_000)
    count(TorchEngine, "push_weights", 1_000_000)
    row = toy_run(toy, tmp_path, "run", "--steps 1 --eval_every 1")[1]
    times = {name: value for name, value in row.items() if re.fullmatch("time/[a-z]+_s", name)}
    # a micro-batch for each of two updates, and one of what they leave out
    expected = dict(rollout=51, score=300, update=20_300, push=1_000_000, step=1_020_651)
    expected |= dict(sample=1, verify=50)
    assert times == {f"time/{name}_s": seconds for name, seconds in expected.items()}
    tokens = row["response/len_mean"] * 32
    for stage in ("rollout", "score", "update"):
        assert row[f"time/{stage}_tokens_per_s"] == tokens / expected[stage]
    assert row["time/imbalance"] == 1  # of one rank
    assert 0 <= row["time/padding_frac"] < 0.5
    assert not any(name.startswith("memory/") for name in row)


def test_an_evaluation_of_several_sets_is_their_mean_and_of_counts_the_sum(
    toy, tmp_path, monkeypatch, capsys
):
    """A metric that a set lacks is left out of the row, and stays in those of the sets."""
    one = {
        "problems": 3,
        "pass@1": 0.2,
        "pass@2": 0.3,
        "len_mean": 4.0,
        "truncated_frac": 0.0,
        "entropy": 1.0,
        "timeout": 1,
    }
    two = one | {
        "problems": 9,
        "pass@1": 0.6,
        "len_mean": 7.0,
        "auroc": 0.75,
        "ece": 0.5,
        "timeout": 2,
    }
    monkeypatch.setattr(train, "evaluate", lambda *args: iter([("one", one), ("two", two)]))
    (row,) = toy_run(toy, tmp_path, "run", "--steps 0 --eval_samples 2")
    expected = {
        "step": 0,
        "eval/problems": 12,
        "eval/pass@1": 0.4,
        "eval/pass@2": 0.3,
        "eval/len_mean": 5.5,
        "eval/truncated_frac": 0.0,
        "eval/entropy": 1.0,
        "eval/timeout": 3,
    }
    for name, metrics in (("one", one), ("two", two)):
        expected |= {f"eval/{name}/{key}": value for key, value in metrics.items()}
        file = json.loads((tmp_path / "run" / f"eval-{name}.json").read_text())
        assert metrics.items() <= file.items() and file["set"] == name and file["step"] == 0
    assert row == pytest.approx(expected)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["one", "3", "0.200", "0.300", "4.000", "0.000", "1.000", "-", "-"] in lines
    assert ["two", "9", "0.600", "0.300", "7.000", "0.000", "1.000", "0.750", "0.500"] in lines


def test_where_metrics_are_sent(toy, tmp_path, monkeypatch, no_figures):
    """wandb gets the run's name, folder and settings, tensorboard a folder within the run's;
    without --log_to neither."""
    monkeypatch.setattr(record, "find_spec", lambda name: True)
    starts = []
    logged = []
    folders = []
    scalars = []

    def init(**options):
        starts.append(options)
        return types.SimpleNamespace(log=lambda row, step: logged.append((step, row)))

    def summary_writer(folder):
        folders.append(folder)
        return types.SimpleNamespace(add_scalar=lambda *scalar: scalars.append(scalar))

    wandb = types.SimpleNamespace(init=init)
    board = types.SimpleNamespace(SummaryWriter=summary_writer)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    rows = toy_run(toy, tmp_path, "w", "--log_to wandb --steps 1")
    config = json.loads((tmp_path / "w" / "config.json").read_text())
    assert starts == [dict(project="entropy-rlvr", name="w", dir=tmp_path / "w", config=config)]
    assert logged == [(row["step"], row) for row in rows] and not folders
    rows = toy_run(toy, tmp_path, "t", "--log_to tensorboard --steps 1")
    assert folders == [tmp_path / "t" / "tensorboard"] and len(starts) == 1
    assert scalars == [(name, value, row["step"]) for row in rows for name, value in row.items()]
    toy_run(toy, tmp_path, "none", "--steps 1 --eval_data none")
    assert len(starts) == len(folders) == 1


def test_the_plan_reckons_what_it_says(toy, tmp_path, capsys, monkeypatch):
    """Of a model of 0.2 billion parameters, by hand; neither weights nor a folder are needed."""
    config = Qwen2Config(
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=3,
        vocab_size=100_000,
        num_attention_heads=8,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    config.save_pretrained(tmp_path / "model")
    for path in (toy / "model").glob("*token*"):
        shutil.copy(path, tmp_path / "model")
    layer = 1024 * 1024 * 2 + 1024 + 2 * (1024 * 256 + 256) + 3 * 1024 * 2048 + 2 * 1024
    head = 100_000 * 1024
    count = head + 3 * layer + 1024
    root = head + 1024

    def plan(more=""):
        """The text, and the bytes of each part and each peak in it."""
        words = "--dry_run --max_prompt_len 100 --max_response_len 900 --micro_batch_tokens 5000"
        words = f"--model {tmp_path}/model {words} {more}"
        train.main(toy_args(toy, tmp_path, "run", words))
        out = capsys.readouterr().out
        assert not (tmp_path / "run").exists() and out.count("---- prompt of 1 tokens") == 3
        lines = re.findall(r"^ +([\d.]+)  (.*)$", out, re.MULTILINE)
        return out, {name: float(number) * 2**30 for number, name in lines}

    def check(found, **expected):
        names = memory_names(found)
        for name, number in expected.items():
            assert found[names[name]] == pytest.approx(number, abs=6e5), name  # 0.0005 GiB

    def memory_names(found):
        short = {name.replace(" ", "_"): text for name, text in record.EXPLAINED.items()}
        return short | {name.replace(" ", "_"): name for name in found}

    chunk = 20 * 512 * 100_000
    row = 1000 * 2 * 3 * 256  # keys and values of an answer of 1,000 tokens, a byte each
    out, found = plan()
    head_line = f"{count / 1e6:,.2f} M parameters, 1 ranks, --parallel ddp, torch.float32, layers "
    assert head_line + "kept for backward" in out and "in 2 updates; 2 steps" in out
    kept = 24 * 1024 + 8 * 1024 + 8 * 256 + 16 * 2048  # norms, attention, MLP of a token and layer
    more = 4 * (3 * 2048 + 2 * 1024)
    parts = dict(
        weights=4 * count,
        gradients=4 * count,
        AdamW=8 * count,
        reference=0,
        gathered_or_cast=0,
        unreduced_gradients=4 * head,
        activations=3 * kept * 5000,
        one_layer=more * 5000,
        engine_weights=4 * count,
        overhead=2e9,
        KV_cache=32 * (4 * row + 24 * 100_000),  # 8 prompts of 4 answers
    )
    parts["log-prob_chunk"] = chunk
    check(found, **parts)
    resident = 16 * count + 2e9 + 4 * count
    update = resident + chunk + 4 * head + (3 * kept + more) * 5000
    check(
        found,
        rollout=resident + parts["KV_cache"],
        score=resident + chunk + kept * 5000,
        update=update,
        optimizer_step=resident,
        push=resident + 8 * head,
    )
    assert "8 prompts x 4 answers, at most 32,000 tokens" in out
    assert f"a checkpoint: {12 * count / 2**30:.3f} GiB; room for 4 is needed" in out
    assert "each GPU has 74.5 GiB (assumed: there is no GPU here)" in out
    assert "vllm's share" not in out

    words = "--method kl_loss --dtype bfloat16 --activation_checkpointing --keep_checkpoints 5"
    out, found = plan(f"{words} --updates_per_rollout 8")  # of four answers each
    kept = 26 * 1024 + 4 * 1024 + 4 * 256 + 8 * 2048  # under autocast
    more = 2 * (3 * 2048 + 2 * 1024)
    check(found, activations=3 * 4 * 1024 * 4000, one_layer=(kept + more) * 4000)
    check(found, reference=4 * count, gathered_or_cast=2 * count, engine_weights=2 * count)
    check(found, unreduced_gradients=6 * head, KV_cache=32 * (2 * row + 24 * 100_000))
    assert "room for 7 is needed" in out and "layers recomputed in backward" in out
    plan("--steps 0")  # the three prompts are those of the evaluation
    _, found = plan("--micro_batch_tokens 7")  # one answer at least
    check(found, one_layer=4 * (3 * 2048 + 2 * 1024) * 1000)

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 4)
    out, found = plan("--method kl_loss --parallel fsdp --dtype bfloat16")
    kept = 16 * 1024 + 4 * 1024 + 4 * 256 + 8 * 2048
    check(found, weights=count, gradients=count, AdamW=2 * count, reference=count)
    check(found, activations=3 * kept * 4000)
    gathered = 2 * (2 * layer + root)
    unreduced = 6 * (layer + root) + 2 * head
    check(found, gathered_or_cast=gathered, unreduced_gradients=unreduced)
    resident = 4 * count + 2e9 + 2 * count  # the gradients come in the update
    check(found, optimizer_step=resident + count, score=resident + gathered + chunk + kept * 4000)
    assert "4 ranks, --parallel fsdp" in out

    monkeypatch.setattr(train, "resolve_engine", lambda name, tp: "vllm")
    out, found = plan("--rollout_tp 2 --parallel fsdp")
    assert "vllm's share of it: 0.80, what the trainer leaves" in out
    check(found, engine_weights=2 * count, KV_cache=0.8 * 80e9 - 2 * count - 2e9)
    check(found, rollout=3 * count + 4e9 - 2e9 + 0.8 * 80e9)
    out, found = plan("--parallel fsdp --rollout_gpu_memory 0.25")  # vllm sleeps in the update
    assert "vllm's share of it: 0.25, as given" in out
    check(found, optimizer_step=4 * count + 4e9)


def test_a_run_that_cannot_fit_is_refused_before_its_model_is_built(
    toy, tmp_path, monkeypatch, capsys
):
    """Where there are GPUs. Elsewhere the plan of --dry_run says it."""
    built = []
    monkeypatch.setattr(train, "build_policy", lambda *_: built.append(1))
    monkeypatch.setattr(train, "card_memory", lambda device: 2e9)  # less than the contexts take
    plan_run = train.plan_run

    def on_a_gpu(cfg, config, device, *more, **options):
        return plan_run(cfg, config, torch.device("cuda"), *more, **options)

    monkeypatch.setattr(train, "plan_run", on_a_gpu)
    with pytest.raises(SystemExit):
        toy_run(toy, tmp_path, "run")
    assert (
        "weights, gradients and AdamW take 2.0 GB of each GPU's 2.0 GB" in capsys.readouterr().err
    )
    assert not built and not (tmp_path / "run").exists()


# ---- the model and the engine --------------------------------------------------------------------


def test_what_the_engine_and_the_policy_are_told(plain, toy, tmp_path, monkeypatch, no_figures):
    """Flags that only speed or memory see: temperatures, lengths, precision, micro-batches,
    checkpointed layers."""
    told = []
    forwards = []
    calls = []
    make_engine = train.make_engine
    forward = Policy.forward

    def seen(policy, ids, *args):
        layers = policy.model.transformer.h
        checkpointed = all(layer.gradient_checkpointing and layer.training for layer in layers)
        forwards.append((ids.numel(), len(ids), checkpointed))
        return forward(policy, ids, *args)

    def engine(*args, **options):
        told.append(args + (options,))
        return make_engine(*args, **options)

    def noted(name):
        method = getattr(TorchEngine, name)

        def call(*args, **options):
            calls.append(name)
            return method(*args, **options)

        monkeypatch.setattr(TorchEngine, name, call)

    for name in ("generate", "sleep", "wake", "push_weights", "close"):
        noted(name)
    monkeypatch.setattr(train, "make_engine", engine)
    monkeypatch.setattr(Policy, "forward", seen)
    words = "--steps 1 --eval_data none"
    flag_run(toy, tmp_path, "usual", f"{words} --dtype auto")
    assert calls == ["push_weights", "generate", "sleep", "wake", "push_weights", "close"]
    assert max(size for size, _, _ in forwards) > 40
    assert not any(checkpointed for _, _, checkpointed in forwards)
    usual = len(forwards)
    forwards.clear()
    words += " --micro_batch_tokens 12 --activation_checkpointing --dtype bfloat16"
    words += " --rollout_gpu_memory 0.7 --trust_remote_code"
    (row,) = flag_run(toy, tmp_path, "other", words)
    assert all(size <= 12 or rows == 1 for size, rows, _ in forwards) and len(forwards) > 2 * usual
    assert all(checkpointed for _, _, checkpointed in forwards)
    near = plain.rows[1]["entropy/token_mean"]
    assert near != row["entropy/token_mean"] == pytest.approx(near, rel=0.05)
    for folder in ("usual", "other"):
        kept = load_file(tmp_path / folder / "checkpoint-1" / "model.safetensors")
        assert {tensor.dtype for tensor in kept.values()} == {torch.float32}
    (name, model, a), (_, _, b) = told
    assert (name, model) == ("torch", f"{toy}/model") and a["max_model_len"] == 8 + 6
    assert a["stop_ids"] == {tiny.VOCAB[tiny.EOS]} and b["dtype"] == torch.bfloat16
    assert a["dtype"] == (torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    assert (a["gpu_memory_utilization"], b["gpu_memory_utilization"]) == (0.8, 0.7)
    assert a["tensor_parallel_size"] == 1
    assert (a["trust_remote_code"], b["trust_remote_code"]) == (False, True)


def test_the_longest_answer_may_fill_the_positions_of_the_model(toy, tmp_path, capsys):
    words = "--dry_run --max_prompt_len 4 --max_response_len"
    train.main(toy_args(toy, tmp_path, "run", f"{words} 60"))  # of 64
    assert capsys.readouterr().out.count("---- prompt of 1 tokens") == 3
    with pytest.raises(SystemExit):
        train.main(toy_args(toy, tmp_path, "run", f"{words} 61"))
    assert "65, is more than the 64 positions of" in capsys.readouterr().err


def test_answers_end_at_every_end_that_the_model_names(toy, tmp_path, no_figures):
    """A chat model's generation_config lists several ends; one of them may not be the
    tokenizer's."""
    shutil.copytree(toy / "model", tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    settings = json.loads(path.read_text())
    eos = tiny.VOCAB[tiny.EOS]
    three = tiny.VOCAB["3"]
    five = tiny.VOCAB["5"]
    for name, named, ends in (
        ("several", [three, five], {eos, three, five}),
        ("one", five, {eos, five}),
    ):
        path.write_text(json.dumps(settings | {"eos_token_id": named}))
        words = f"--model {tmp_path}/model --steps 1 --eval_data none --prompts_per_step 16"
        flag_run(toy, tmp_path, name, words)
        answers = recorded(tmp_path / name)
        assert {a["response"][-1] for a in answers if not a["truncated"]} == ends
        assert not any(set(a["response"][:-1]) & ends for a in answers)


def test_answers_end_where_the_chat_template_ends_a_turn(toy, tmp_path, monkeypatch, no_figures):
    """A base model's end of text may be another token than the one that its template writes."""
    shutil.copytree(toy / "model", tmp_path / "model")
    template = "{% for m in messages %}{{ m.content }}"
    template += "{% if m.role == 'assistant' %}<pad>{% endif %}{% endfor %}"
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    told = []
    make_engine = train.make_engine

    def engine(*args, **options):
        told.append(options["stop_ids"])
        return make_engine(*args, **options)

    monkeypatch.setattr(train, "make_engine", engine)
    flag_run(toy, tmp_path, "run", f"--model {tmp_path}/model --steps 0")
    assert told == [{tiny.VOCAB[tiny.EOS], tiny.VOCAB[tiny.PAD]}]
