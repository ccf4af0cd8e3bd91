"""The metrics of a step, the controllers' trajectories, the methods' own metrics, the knobs, the
diagnosis and the figures, all seen from outside: from the files that a run writes, computed again
in plain Python.
"""

import json
import math
import random
import re
import shutil
import sys
from fractions import Fraction
from statistics import fmean, pstdev, stdev

import matplotlib.figure
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import diagnose
import losses
import train
from diagnose import law_forecast, law_points, line_styles, method_of, plot_curves
from diagnose import read_metrics, share_made, usual_panels
from entropy import change_estimates
from test_all import (  # noqa: F401
    dealt,
    HERE,
    no_process_group_left,
    recorded,
    toy,
    toy_args,
    toy_run,
    torchrun,
    weights,
)
from train import parse_knobs, wanted_tensors

QUADRANTS = ("pos_likely", "pos_rare", "neg_likely", "neg_rare")
ENTROPY = "entropy/response_mean"


# ---- a step, computed again from the answers that it recorded ------------------------------------


@pytest.fixture
def drawn_figures(monkeypatch):
    """(figure, path) of every figure that would have been written; to draw them takes longer than a
    run."""
    seen = []

    def savefig(figure, png, **_):
        seen.append((figure, png))

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    return seen


@pytest.fixture(scope="session")
def half_trained(toy, tmp_path_factory):
    """A checkpoint of the toy model that is right about a third of the time, so that every kind of
    group occurs."""
    return trained(toy, tmp_path_factory.mktemp("half"), steps=30, lr=3e-3)


def trained(toy, out, steps, lr):
    """The last checkpoint of a GRPO run of the toy model."""
    sizes = f"--prompts_per_step 32 --group_size 8 --steps {steps} --lr {lr}"
    toy_run(toy, out, "trained", sizes, f"--eval_data none --save_every {steps}")
    return out / "trained" / f"checkpoint-{steps}"


def small_run(toy, out, name, model, *more):
    """16 prompts of 6 answers at a temperature of 1.3, in many micro-batches; no evaluation."""
    return toy_run(
        toy,
        out,
        name,
        f"--model {model} --temperature 1.3 --prompts_per_step 16 --group_size 6",
        "--micro_batch_tokens 200 --eval_data none --save_every 1 --keep_checkpoints 9 --seed 5",
        *more,
    )


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def log_softmax(logits):
    top = max(logits)
    log_sum = top + math.log(sum(math.exp(x - top) for x in logits))
    return [x - log_sum for x in logits]


def distributions(model, answer, temperature=1.3):
    """log pi(v) of every v of the vocabulary at every place of one answer: a forward of one row,
    without padding."""
    ids = torch.tensor([answer["prompt"] + answer["response"]])
    with torch.no_grad():
        logits = model(ids).logits[0].double().tolist()
    places = logits[len(answer["prompt"]) - 1 : -1]
    return [log_softmax([x / temperature for x in place]) for place in places]


def entropy_of(logp):
    return -sum(math.exp(x) * x for x in logp)


def nucleus_entropy_of(logp):
    """Of the fewest tokens that hold 0.8 of the probability, renormalised."""
    kept = []
    held = 0.0
    for x in sorted(logp, reverse=True):
        if held < 0.8:
            kept.append(x)
        held += math.exp(x)
    return entropy_of(log_softmax(kept))


def group_advantages_of(rewards):
    deviation = stdev(rewards)
    if deviation == 0:
        return [0.0] * len(rewards)
    return [(reward - fmean(rewards)) / (deviation + 1e-6) for reward in rewards]


def tokens_of(answers, model, group_size=6, temperature=1.3):
    """A dict per token of the answers of one rank: what the policy thought of it before the
    updates."""
    rewards = [answer["reward"] for answer in answers]
    found = []
    for i, answer in enumerate(answers):
        start = i - i % group_size
        group = rewards[start : start + group_size]
        advantage = group_advantages_of(group)[i - start]
        assert answer["group_accuracy"] == pytest.approx(fmean(group), abs=1e-6)
        for place, logp in enumerate(distributions(model, answer, temperature)):
            y = answer["response"][place]
            H = entropy_of(logp)
            # one step of the policy gradient moves the logit of v by A (1[v = y] - p_v),
            # and dH/dz_v = -p_v (log p_v + H)
            dH = 0.0
            for v, x in enumerate(logp):
                dH -= math.exp(x) * (x + H) * advantage * ((v == y) - math.exp(x))
            found.append(
                dict(
                    answer=i,
                    place=place,
                    token=y,
                    logp=logp,
                    log_prob=logp[y],
                    p=math.exp(logp[y]),
                    H=H,
                    A=advantage,
                    dH=dH,
                    reward=rewards[i],
                    accuracy=fmean(group),
                    sum_p2=sum(math.exp(2 * x) for x in logp),
                    sum_p2_log_p=sum(math.exp(2 * x) * x for x in logp),
                )
            )
    return found


def per_answer(tokens, key):
    """{answer: the values of its tokens}"""
    found = {}
    for token in tokens:
        found.setdefault(token["answer"], []).append(token[key])
    return found


def covariances(tokens):
    mean_log_prob = fmean(t["log_prob"] for t in tokens)
    mean_A = fmean(t["A"] for t in tokens)
    return [(t["log_prob"] - mean_log_prob) * (t["A"] - mean_A) for t in tokens]


def quadrant_of(token):
    if token["A"] == 0:
        return None
    likely = token["p"] > math.exp(-token["H"])
    return ("pos_" if token["A"] > 0 else "neg_") + ("likely" if likely else "rare")


def bucket_of(accuracy):
    """hard in (0, 1/3], easy in [2/3, 1), mid between."""
    if accuracy <= Fraction(1, 3):
        return "hard"
    return "mid" if accuracy < Fraction(2, 3) else "easy"


def measures_by_hand(ranks, before, after, group_size=6, updates=1):
    """Every measure of one step. ranks: the recorded answers of each rank; before, after: the model
    around its updates."""
    of_rank = [tokens_of(answers, before, group_size) for answers in ranks]
    tokens = [token for part in of_rank for token in part]
    n = len(tokens)
    found = {"entropy/token_mean": fmean(t["H"] for t in tokens)}
    means = [fmean(values) for part in of_rank for values in per_answer(part, "H").values()]
    found["entropy/response_mean"] = fmean(means)
    found["entropy/change_predicted"] = fmean(t["dH"] for t in tokens)
    found["policy/log_prob_mean"] = fmean(t["log_prob"] for t in tokens)

    changes = []
    for answers in ranks:
        for answer in answers[::group_size]:
            for old, new in zip(distributions(before, answer), distributions(after, answer)):
                changes.append(entropy_of(new) - entropy_of(old))
    found["entropy/change_measured"] = fmean(changes)

    learns_from = []  # the tokens of each rank when the step learns from them
    for hand in dealt(ranks, updates, is_run=lambda r, i: per_answer(of_rank[r], "A")[i][0] != 0):
        answers_of = [[t for t in of_rank[r] if t["answer"] == i] for r, i in hand]
        learns_from.append([t for answer in answers_of for t in answer])
    for share in ("0.0002", "0.002", "0.02", "0.2", "1"):
        value = 0.0  # the shares are of each rank's own tokens, weighted by their number
        for part in learns_from:
            ordered = sorted(covariances(part), reverse=True)
            top = ordered[: max(1, math.ceil(Fraction(share) * len(part)))]
            value += fmean(top) * len(part) / n
        found["policy/cov_mean" if share == "1" else f"policy/cov_top_{share}"] = value

    moved = sum(abs(t["dH"]) for t in tokens)
    for name in QUADRANTS:
        chosen = [t for t in tokens if quadrant_of(t) == name]
        found[f"quadrant/{name}_frac"] = len(chosen) / n
        found[f"quadrant/{name}_dH_share"] = sum(t["dH"] for t in chosen) / moved

    buckets = {"mean": []}
    for answers, part in zip(ranks, of_rank):
        confidence = {i: fmean(values) for i, values in per_answer(part, "log_prob").items()}
        for start in range(0, len(answers), group_size):
            rows = range(start, start + group_size)
            right = sum(answers[i]["reward"] for i in rows)
            A = group_advantages_of([answers[i]["reward"] for i in rows])
            middle = fmean(confidence[i] for i in rows)
            cov = fmean((confidence[i] - middle) * (A[i - start] - fmean(A)) for i in rows)
            buckets["mean"].append(cov)
            if 0 < right < group_size:
                name = bucket_of(Fraction(int(right), group_size))
                buckets.setdefault(name, []).append(cov)
    for name, values in buckets.items():
        found[f"policy/group_cov_{name}"] = fmean(values)
    return found, tokens


def is_measure(name):
    return name.startswith(
        ("entropy/", "quadrant/", "policy/cov", "policy/group_cov", "policy/log_prob")
    )


def check_measures(row, expected):
    assert {name for name in row if is_measure(name)} == expected.keys()
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, rel=3e-4, abs=5e-6), name


@pytest.mark.slow
def test_every_measure_of_a_step_token_by_token(toy, tmp_path, drawn_figures):
    """entropy/*, policy/cov*, policy/group_cov*, policy/log_prob_mean, quadrant/* of the second
    step of a run, from its recorded answers and the checkpoints around it. Turns red when a measure
    counts other tokens, another mean, another temperature or other weights; when a token of A = 0
    counts as one of a wrong answer; when a bucket's limit moves."""
    model = trained(toy, tmp_path, steps=20, lr=5e-3)  # rare tokens are right at times
    for seed in range(5, 15):  # the first whose answers hold every case
        args = f"--record_step 2 --steps 2 --lr 1e-3 --warmup_updates 1 --seed {seed}"
        row = small_run(toy, tmp_path, f"seed{seed}", model, args)[-1]
        folder = tmp_path / f"seed{seed}"
        before = load(folder / "checkpoint-1")
        after = load(folder / "checkpoint-2")
        answers = recorded(folder, 2)
        expected, tokens = measures_by_hand([answers], before, after)
        # Right answers of six: on both limits of the buckets, and between them.
        right = {round(t["accuracy"] * 6) for t in tokens}
        if right >= {0, 2, 3, 4} and {quadrant_of(t) for t in tokens} == {None, *QUADRANTS}:
            break
    else:
        raise AssertionError("no seed with every case")
    assert len({len(answer["response"]) for answer in answers}) > 1
    assert abs(expected["entropy/change_measured"]) > 1e-3
    check_measures(row, expected)


def S_of(token):
    """S of clip_b."""
    return token["p"] * (token["log_prob"] + token["H"])


def without_unlikely(tokens, everyone, mu):
    """The tokens that clip_b keeps, with mean and standard deviation over the tokens of
    `everyone`."""
    mean = fmean(map(S_of, everyone))
    deviation = pstdev(map(S_of, everyone))
    return [t for t in tokens if not (t["A"] < 0 and S_of(t) - mean < -mu * deviation)]


def telling_mu(ranks):
    """A mu at which the tokens that clip_b leaves out are others if each rank takes its own mean
    and deviation, and which is not so near to a token that rounding would decide."""
    tokens = [t for part in ranks for t in part]
    mean = fmean(map(S_of, tokens))
    deviation = pstdev(map(S_of, tokens))
    places = [(mean - S_of(t)) / deviation for t in tokens if t["A"] < 0]
    for mu in np.arange(0.3, 2.0, 0.02).tolist():
        kept = grpo_loss(without_unlikely(tokens, tokens, mu))
        own = grpo_loss([t for part in ranks for t in without_unlikely(part, part, mu)])
        if abs(kept - own) > 1e-3 and min(abs(place - mu) for place in places) > 2e-3:
            return round(mu, 2)
    raise AssertionError("every mu gives the same on each rank")


@pytest.mark.slow
def test_the_measures_and_the_mask_of_two_ranks(toy, half_trained, tmp_path, drawn_figures):
    """The same over both ranks' answers; only the token covariance is of each rank's own tokens.
    clip_b's mean and deviation are over all ranks: with each rank's own, other tokens would be left
    out of the loss."""
    small_run(toy, tmp_path, "one", half_trained, "--steps 1 --record_step 1")
    answers = recorded(tmp_path / "one", 1)
    groups = [answers[i : i + 6] for i in range(0, 96, 6)]  # dealt to the ranks in turn
    before = load(half_trained)
    own = [tokens_of(sum(groups[rank::2], []), before) for rank in (0, 1)]
    mu = telling_mu(own)
    args = (
        f"--model {half_trained} --temperature 1.3 --prompts_per_step 16 --group_size 6",
        "--updates_per_rollout 1 --steps 1 --lr 3e-3 --warmup_updates 1 --eval_data none",
        f"--method clip_b --knobs mu={mu} --record_step 1 --micro_batch_tokens 200 --seed 5",
    )
    result = torchrun(2, toy_args(toy, tmp_path, "two", *args))
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "two"
    (row,) = read_metrics(folder)
    ranks = [recorded(folder, 1, rank) for rank in (0, 1)]
    expected, tokens = measures_by_hand(ranks, before, load(folder / "checkpoint-1"))
    check_measures(row, expected)
    loss = grpo_loss(without_unlikely(tokens, tokens, mu))
    assert row["train/loss"] == pytest.approx(loss, rel=1e-4, abs=1e-6)


# ---- every controller's trajectory, from the metrics of a run alone ------------------------------

STEPS = 6


def par_by_hand(
    rows, schedule="entropy", target_entropy=0.2, delta=0.05, positive_weight=0.0, epochs=8
):
    weight = positive_weight
    for i, row in enumerate(rows):
        if schedule == "entropy":
            weight = weight - delta if row[ENTROPY] < target_entropy else weight + delta
            weight = sorted((0.0, weight, 1.0))[1]
        if schedule == "stage":  # i steps of 6 are done; from the third on, a third more each
            weight = [0, 0, 0, 0, 1 / 3, 2 / 3][i]
        if schedule == "epoch":
            weight = (i * epochs // STEPS) / (epochs - 1)
        yield {"positive_weight": weight}


def entropic_by_hand(rows, target_entropy=0.1, kp=1.0, ki=0.01):
    for i, row in enumerate(rows):
        over = [earlier[ENTROPY] - target_entropy for earlier in rows[: i + 1]]
        yield {
            "alpha": sorted((-1.0, kp * over[-1] + ki * sum(over), 1.0))[1],
            "integral": sum(over),
        }


def dcpo_by_hand(rows, target_entropy=0.5):
    for row in rows:
        distance = abs(row[ENTROPY] - target_entropy)
        a0 = (0.1 if distance > 0.1 else distance) / max(row["reward/mean"], 1e-6)
        yield {"mix": a0 / (1 + a0), "hot": 0.0 if row[ENTROPY] > target_entropy else 1.0}


def aepo_by_hand(rows, target_entropy=0.5, hot=1.2, cold=0.8, most_rows=60):
    for row in rows:
        above = row[ENTROPY] > target_entropy
        yield {
            "second_temperature": cold if above else hot,
            "most_rows": most_rows,
            "taken_share": 0.5 if above else 1.0,
        }


def flex_clip_by_hand(rows, schedule="id"):
    upper = 0.0
    first = rows[0][ENTROPY]
    for i, row in enumerate(rows):
        at = i / STEPS
        lower = 2 - 2 * at if i > 3 else 0.0
        if schedule == "id":
            yield {"upper_share": 1 - 2 * at if i <= 3 else 0.0, "lower_share": lower}
        if schedule == "did":
            yield {"upper_share": 2 * at if i <= 3 else 1.0, "lower_share": lower}
        if schedule == "od":
            line = first * (0.2 + 0.8 * (1 - at))
            if row[ENTROPY] <= 0.2 * first:
                upper = 1.0
            elif row[ENTROPY] > line:
                upper = 0.0
            yield {"upper_share": upper, "lower_share": 1 - upper, "first_entropy": first}


def adaptive_entropy_by_hand(rows, target_entropy=0.2, delta=1e-4, max_coef=5e-3):
    c = 0.0
    for row in rows:
        below = row[ENTROPY] < target_entropy
        c = sorted((0.0, c + delta if below else c - delta, max_coef))[1]
        yield {"c": c, "entropy_coef": c if below else 0.0}


def aer_by_hand(rows, target_ratio=0.8, rate=0.005):
    alpha = 0.0
    for row in rows:
        alpha = max(0.0, alpha + rate * (target_ratio * rows[0][ENTROPY] - row[ENTROPY]))
        yield {"alpha": alpha, "first_entropy": rows[0][ENTROPY]}


def siren_by_hand(rows):
    yield {}
    for _ in rows[1:]:
        yield {"anchor": rows[0]["entropy/peak_mean"]}


# method, its rule, knobs, what must move in the run (names of the state)
TRAJECTORIES = [
    (
        "par",
        par_by_hand,
        dict(target_entropy=0.3, delta=0.3, positive_weight=0.4),
        ["positive_weight"],
    ),
    ("par", par_by_hand, dict(target_entropy=1e-9), ["positive_weight"]),
    ("par", par_by_hand, dict(schedule="stage"), ["positive_weight"]),
    ("par", par_by_hand, dict(schedule="epoch", epochs=4), ["positive_weight"]),
    ("par", par_by_hand, dict(schedule="constant", positive_weight=0.7), []),
    ("entropic", entropic_by_hand, {}, ["alpha", "integral"]),
    ("entropic", entropic_by_hand, dict(target_entropy=0.3, kp=4.0, ki=0.5), ["alpha"]),
    ("dcpo", dcpo_by_hand, {}, ["mix", "hot"]),
    ("dcpo", dcpo_by_hand, dict(target_entropy=0.3), ["mix", "hot"]),
    ("aepo", aepo_by_hand, {}, ["second_temperature", "taken_share"]),
    (
        "aepo",
        aepo_by_hand,
        dict(target_entropy=0.3, hot=1.5, cold=0.7, most_rows=3),
        ["second_temperature"],
    ),
    ("flex_clip", flex_clip_by_hand, {}, ["upper_share", "lower_share"]),
    ("flex_clip", flex_clip_by_hand, dict(schedule="did"), ["upper_share", "lower_share"]),
    ("flex_clip", flex_clip_by_hand, dict(schedule="od"), ["upper_share", "lower_share"]),
    ("adaptive_entropy", adaptive_entropy_by_hand, {}, ["c", "entropy_coef"]),
    (
        "adaptive_entropy",
        adaptive_entropy_by_hand,
        dict(target_entropy=0.3, delta=0.02, max_coef=0.03),
        ["c", "entropy_coef"],
    ),
    ("aer", aer_by_hand, {}, ["alpha"]),
    ("aer", aer_by_hand, dict(target_ratio=0.5, rate=0.1), ["alpha"]),
    ("siren", siren_by_hand, {}, []),
]


def test_every_controller_has_a_trajectory():
    assert {method for method, *_ in TRAJECTORIES} == set(losses.CONTROLLERS)


def knob_words(settings):
    """["mu=1"] -> ["--knobs mu=1"], for toy_args; [] -> []"""
    return [" ".join(["--knobs", *settings])] if settings else []


@pytest.mark.parametrize("number", range(len(TRAJECTORIES)))
@pytest.mark.slow
def test_a_controllers_trajectory_follows_from_the_metrics(
    number, toy, half_trained, tmp_path, drawn_figures
):
    """Six steps of one prompt each, some of which the model knows and some not, so that the entropy
    jumps; the state of each step from the entropies, rewards and peaks of metrics.jsonl, by the
    rule as its paper says it. Turns red when a rule is given another entropy, another progress,
    another step's metrics, not its knobs, or starts anew every step."""
    method, by_hand, knobs, moving = TRAJECTORIES[number]
    args = (
        f"--model {half_trained} --method {method} --steps {STEPS} --lr 1e-4",
        "--prompts_per_step 1 --updates_per_rollout 1 --temperature 0.3 --eval_data none --seed 1",
        "--save_every 9",
    )
    settings = [f"{name}={value}" for name, value in knobs.items()]
    rows = toy_run(toy, tmp_path, "run", *args, *knob_words(settings))
    states = []
    for row in rows:
        states.append(
            {name[11:]: value for name, value in row.items() if name.startswith("controller/")}
        )
    expected = list(by_hand(rows, **knobs))
    assert len(states) == len(expected) == STEPS
    for i, (state, by_the_rule) in enumerate(zip(states, expected)):
        assert state == pytest.approx(by_the_rule, rel=1e-9, abs=1e-12), f"step {i + 1}"
    for name in moving:
        values = {state[name] for state in states}
        assert len(values) > 1, f"{name} never moved: this run shows nothing"
    if method == "siren":
        assert len({row["entropy/peak_mean"] for row in rows}) > 1
    # And of one group, equal rewards are no bucket of group_cov; aepo's rows are not one group.
    for row in rows if method != "aepo" else ():
        bucket = {0.25: {"hard"}, 0.5: {"mid"}, 0.75: {"easy"}}.get(row["reward/mean"], set())
        assert {key[17:] for key in row if key.startswith("policy/group_cov_")} == bucket | {"mean"}


# ---- what the methods report of themselves -------------------------------------------------------


def mean_over(tokens, value):
    return sum(map(value, tokens)) / len(tokens)


def grpo_loss(tokens):
    return mean_over(tokens, lambda t: -t["A"])


def steer_by_hand(tokens, least):
    """Before the first update r = 1: Omega = A (1 - p)(log p + H); the exponential maps the largest
    to `least`."""
    size = [abs(t["A"] * (1 - t["p"]) * (t["log_prob"] + t["H"])) for t in tokens]
    weight = [least ** (x / max(size)) for x in size]
    loss = sum(-t["A"] * w for t, w in zip(tokens, weight)) / len(tokens)
    return loss, {"policy/weight_mean": fmean(weight), "policy/clip_frac": 0.0}


def siren_peaks(tokens, share):
    values = []
    for distributions_of_answer in per_answer(tokens, "logp").values():
        ordered = sorted(map(nucleus_entropy_of, distributions_of_answer), reverse=True)
        values += ordered[: math.ceil(share * len(ordered))]
    return fmean(values)


def clip_v_loss(tokens, mu):
    def x(t):
        return t["H"] * t["sum_p2"] + t["sum_p2_log_p"] - S_of(t)

    deviation = pstdev(map(x, tokens))
    kept = [t for t in tokens if not (t["A"] < 0 and x(t) > mu * deviation)]
    assert len(kept) < len(tokens)
    return grpo_loss(kept)


def dcpo_loss(tokens, target, entropy):
    a0 = min(abs(target - entropy), 0.1) / fmean(per_reward(tokens))
    a = a0 / (1 + a0)
    temperature = 1.2 if entropy <= target else 0.8

    def shaped(t):
        tempered = log_softmax([x / temperature for x in t["logp"]])
        rho = math.exp(tempered[t["token"]] - t["log_prob"])
        return (1 - a) * t["A"] + a * t["reward"] * rho

    return mean_over(tokens, lambda t: -shaped(t))


def per_reward(tokens):
    return [values[0] for values in per_answer(tokens, "reward").values()]


def first_updates(tokens):
    """(method, knobs, loss, the method's own metrics), before the first update, where every ratio
    is 1."""
    n = len(tokens)
    entropy = fmean(fmean(values) for values in per_answer(tokens, "H").values())
    right = sum(t["A"] > 0 for t in tokens) / n
    wrong = sum(t["A"] < 0 for t in tokens) / n
    plain = grpo_loss(tokens)
    none_clipped = {"policy/clip_frac": 0.0}
    yield "grpo", [], plain, none_clipped
    # Bounds that exclude a ratio of 1 clip one side from the start.
    yield (
        "grpo",
        ["clip_high=-0.5"],
        mean_over(tokens, lambda t: -t["A"] * (0.5 if t["A"] > 0 else 1.0)),
        {"policy/clip_frac": right},
    )
    yield (
        "grpo",
        ["clip_low=-0.5", "clip_high=1"],
        mean_over(tokens, lambda t: -t["A"] * (1.5 if t["A"] < 0 else 1)),
        {"policy/clip_frac": wrong},
    )
    yield "cispo", [], mean_over(tokens, lambda t: -t["A"] * t["log_prob"]), none_clipped
    yield (
        "cispo",
        ["clip_high=-0.5"],
        mean_over(tokens, lambda t: -0.5 * t["A"] * t["log_prob"]),
        {"policy/clip_frac": mean_over(tokens, lambda t: t["A"] != 0)},
    )
    yield (
        "ce_gppo",
        ["clip_high=-0.5", "beta_high=0.6"],
        mean_over(tokens, lambda t: -t["A"] * (0.3 if t["A"] > 0 else 1)),
        {"policy/clip_frac": right},
    )
    sequences = [values[0] for values in per_answer(tokens, "A").values()]
    yield "gspo", [], -fmean(sequences), none_clipped
    cov = covariances(tokens)
    candidates = [-0.5 < c < 0.5 for c in cov]
    left = sum(-t["A"] for t, gone in zip(tokens, candidates) if not gone) / n
    yield (
        "clip_cov",
        ["cov_low=-0.5", "cov_high=0.5", "cov_frac=1"],
        left,
        none_clipped | {"policy/selected_frac": sum(candidates) / n},
    )
    yield (
        "clip_cov",
        ["cov_low=-0.5", "cov_high=0.5", "cov_frac=0.1"],
        None,
        {"policy/selected_frac": int(0.1 * n) / n},
    )
    yield "kl_cov", ["cov_frac=0.1"], plain, {"policy/selected_frac": int(0.1 * n) / n}
    yield "steer", ["min_weight=0.5"], *steer_by_hand(tokens, 0.5)
    yield (
        "rand_pos_clip",
        ["drop_frac=1"],
        mean_over(tokens, lambda t: max(0.0, -t["A"])),
        {"policy/selected_frac": right},
    )
    yield "siren", ["peak_frac=0.5"], plain, {"entropy/peak_mean": siren_peaks(tokens, 0.5)}
    # The masks' knobs; below 1 / most_frac tokens clip_v leaves none out.
    kept = without_unlikely(tokens, tokens, 0.6)
    assert len(kept) < n
    yield "clip_b", ["mu=0.6"], grpo_loss(kept), none_clipped
    yield "clip_v", ["mu=0.5", "most_frac=1"], clip_v_loss(tokens, 0.5), {}
    yield "clip_v", ["mu=0.5"], plain, {}
    # What a controller sets reaches the loss.
    yield (
        "par",
        ["schedule=constant", "positive_weight=0.25"],
        mean_over(tokens, lambda t: -t["A"] * (0.25 if t["A"] > 0 else 1)),
        {},
    )
    alpha = 0.3 * (entropy - 0.5) + 0.2 * (entropy - 0.5)

    def sure(t):
        return 1 + alpha * math.copysign(1, t["A"]) if t["p"] > 0.5 else 1.0

    yield (
        "entropic",
        ["target_entropy=0.5", "kp=0.3", "ki=0.2", "confident=0.5"],
        mean_over(tokens, lambda t: -t["A"] * sure(t)),
        {"controller/alpha": alpha},
    )
    bonus = 0.01 * mean_over(tokens, lambda t: t["H"])
    yield (
        "adaptive_entropy",
        ["target_entropy=9", "delta=0.01", "max_coef=0.1"],
        plain - bonus,
        {"controller/entropy_coef": 0.01},
    )

    def hard(t):
        return max(0.0, 0.6 - t["accuracy"]) / 0.6

    yield (
        "aer",
        ["target_ratio=2", "rate=1", "hard_below=0.6"],
        plain - entropy * mean_over(tokens, lambda t: hard(t) * t["H"]),
        {"controller/alpha": entropy},
    )
    for target in (0.5, 9.0):
        yield "dcpo", [f"target_entropy={target}"], dcpo_loss(tokens, target, entropy), {}
    # The reward decides here, not the sign of A.
    yield (
        "w_reinforce",
        ["positive_weight=0.3", "negative_weight=0.7"],
        mean_over(tokens, lambda t: -0.3 if t["reward"] else 0.7),
        {},
    )
    weight = {"pos_likely": 0.5, "pos_rare": 2.0, "neg_likely": 3.0, "neg_rare": 0.25, None: 1.0}
    yield (
        "quadrant",
        [f"{name}={weight[name]}" for name in QUADRANTS],
        mean_over(tokens, lambda t: -t["A"] * weight[quadrant_of(t)]),
        {},
    )


@pytest.mark.slow
def test_what_the_methods_report_before_the_first_update(
    toy, half_trained, tmp_path, drawn_figures, monkeypatch
):
    """Loss, policy/clip_frac, selected_frac, weight_mean, entropy/peak_mean and the state, of one
    step with one update, of every method whose knob, mask, metric or state makes a difference
    there, token by token. Turns red when a knob, a mask or a controller's state never reaches the
    loss, or a metric says something else."""
    for bound in ("clip_low", "clip_high"):  # below 0 they act at a ratio of 1
        monkeypatch.delitem(train.KNOB_RANGES, bound)
    args = "--steps 1 --updates_per_rollout 1 --micro_batch_tokens 10000"
    small_run(toy, tmp_path, "first", half_trained, args, "--record_step 1")
    tokens = tokens_of(recorded(tmp_path / "first", 1), load(half_trained))
    for i, (method, knobs, loss, metrics) in enumerate(first_updates(tokens)):
        more = f"--method {method} --save_every 9"
        words = (args, more, *knob_words(knobs))
        (row,) = small_run(toy, tmp_path, f"run{i}", half_trained, *words)
        about = f"{method} {' '.join(knobs)}"
        assert row["train/grad_norm"] > 0, about
        if loss is not None:
            assert row["train/loss"] == pytest.approx(loss, rel=3e-4, abs=3e-6), about
        found = {name: row[name] for name in metrics}
        assert found == pytest.approx(metrics, rel=3e-4, abs=1e-6), about


@pytest.mark.slow
def test_w_reinforce_goes_by_the_reward_where_a_group_has_no_variance(
    toy, half_trained, tmp_path, drawn_figures
):
    """One group a step: if all its answers are right, or none, A is 0 and the loss is one number.
    Turns red when the sign of A, or an advantage under the name of a reward, decides."""
    args = (
        f"--model {half_trained} --method w_reinforce --steps 12 --lr 1e-4",
        "--knobs positive_weight=0.3 negative_weight=0.7",
        "--prompts_per_step 1 --updates_per_rollout 1 --temperature 0.3 --eval_data none",
    )
    rows = toy_run(toy, tmp_path, "run", *args)
    flat = [row for row in rows if row["reward/zero_std_frac"] == 1]
    assert {row["reward/mean"] for row in flat} == {0, 1}
    for row in flat:
        assert row["train/loss"] == pytest.approx(-0.3 if row["reward/mean"] else 0.7, rel=1e-5)
        assert row["train/grad_norm"] > 0


@pytest.mark.slow
def test_the_penalty_and_the_metric_of_kl_loss_are_towards_the_base(
    toy, half_trained, tmp_path, drawn_figures
):
    """In the second step, when the policy has left the base: the metric is k3's mean, whatever the
    penalty."""
    for estimator in ("k3", "k2"):
        args = (
            f"--method kl_loss --knobs kl_coef=0.5 estimator={estimator}",
            "--updates_per_rollout 1 --lr 1e-2 --warmup_updates 1 --steps 2 --record_step 2",
        )
        row = small_run(toy, tmp_path, estimator, half_trained, *args)[-1]
        answers = recorded(tmp_path / estimator, 2)
        tokens = tokens_of(answers, load(tmp_path / estimator / "checkpoint-1"))
        base = load(half_trained)
        reference = []
        for answer in answers:
            for logp, y in zip(distributions(base, answer), answer["response"]):
                reference.append(logp[y])
        d = [ref - t["log_prob"] for ref, t in zip(reference, tokens)]
        kl = fmean(math.exp(x) - 1 - x for x in d)
        penalty = kl if estimator == "k3" else fmean(x * x / 2 for x in d)
        assert kl > 1e-3 and row["policy/kl_to_ref"] == pytest.approx(kl, rel=1e-3)
        loss = grpo_loss(tokens) + 0.5 * penalty
        assert row["train/loss"] == pytest.approx(loss, rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_the_split_of_the_batch_is_that_of_its_updates(toy, half_trained, tmp_path, drawn_figures):
    """At a learning rate that moves no weight, every update of a step sees a ratio of exactly 1:
    old_log_probs are of the same rows in one forward. Split otherwise they would differ by
    rounding."""
    for budget in ("40", "120", "1000"):
        args = f"--updates_per_rollout 4 --steps 1 --lr 1e-30 --micro_batch_tokens {budget}"
        (row,) = small_run(toy, tmp_path, budget, half_trained, args)
        assert row["policy/kl_to_rollout"] == 0.0


@pytest.mark.slow
def test_bfloat16_is_computed_in(toy, half_trained, tmp_path, drawn_figures):
    """--dtype bfloat16 moves the measures by its rounding, and by no more; the weights stay
    float32."""
    rows = {}
    for dtype in ("float32", "bfloat16"):
        args = f"--dtype {dtype} --steps 1 --lr 1e-30 --record_step 1 --updates_per_rollout 1"
        (rows[dtype],) = small_run(toy, tmp_path, dtype, half_trained, args)
    tokens = tokens_of(recorded(tmp_path / "bfloat16", 1), load(half_trained))
    exact = fmean(t["log_prob"] for t in tokens)
    assert 1e-5 < abs(rows["bfloat16"]["policy/log_prob_mean"] - exact) < 0.03
    saved = {dtype: load(tmp_path / dtype / "checkpoint-1").state_dict() for dtype in rows}
    for name, tensor in load(half_trained).state_dict().items():
        assert torch.equal(tensor, saved["bfloat16"][name])
        assert torch.equal(tensor, saved["float32"][name])


def broken_model(toy, folder, name, value=None):
    """The toy model with a tensor less (None) or another in its place."""
    shutil.copytree(toy / "model", folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    if value is not None:
        tensors[name] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def check_refused(toy, tmp_path, folder, complaint, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(toy_args(toy, tmp_path, "run", f"--model {folder}"))
    assert stop.value.code == 2 and complaint in capsys.readouterr().err.splitlines()[-1]


def test_weights_of_another_model_are_refused(toy, tmp_path, capsys):
    """Else transformers would draw what is missing at random."""
    broken_model(toy, tmp_path / "missing", "transformer.h.1.mlp.c_fc.weight")
    complaint = "does not hold transformer.h.1.mlp.c_fc.weight"
    check_refused(toy, tmp_path, tmp_path / "missing", complaint, capsys)


def test_half_a_file_of_weights_is_refused(toy, tmp_path, capsys):
    shutil.copytree(toy / "model", tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    check_refused(toy, tmp_path, tmp_path / "cut", "truncated or not in safetensors format", capsys)


def test_weights_of_another_shape_are_refused(toy, tmp_path, capsys):
    broken_model(toy, tmp_path / "shape", "transformer.h.1.ln_1.weight", torch.ones(5))
    complaint = "does not hold transformer.h.1.ln_1.weight of the shape (32,)"
    check_refused(toy, tmp_path, tmp_path / "shape", complaint, capsys)


def hand(rows, width=4):
    """(2, 4) float64 of ragged rows, nan on padding."""
    padded = [[*row, *[math.nan] * (width - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.float64)


# Ratios of 1, 1.5, 0.5, 3 and of 1, 1.5, 0.5.
NOW = [[0.4, 0.6, 0.4, 0.6], [0.9, 0.75, 0.2]]
OLD = [[0.4, 0.4, 0.8, 0.2], [0.9, 0.5, 0.4]]
OTHER = [[0.5, 1.0, 0.25, 4.0], [0.75, 0.1, 1.5]]
CLIPPED = [  # method, knobs, how many of the seven tokens the clip took, of A = 2 and of A = -1
    ("grpo", {}, 3),
    ("grpo", dict(clip_high=0.6), 2),
    ("grpo", dict(clip_low=0.6), 2),
    ("grpo", dict(dual_clip=1.2), 4),
    ("clip_higher", {}, 3),
    ("clip_higher", dict(clip_high=0.6), 2),
    ("entropy_bonus", {}, 3),
    ("kl_loss", {}, 3),
    ("kl_loss", dict(clip_low=0.6), 2),
    ("clip_cov", {}, 1),
    ("steer", dict(dual_clip=None), 3),
    ("steer", dict(clip_high=9.0), 1),
    ("par", {}, 1),
    ("quadrant", {}, 3),
    ("w_reinforce", {}, 2),  # by the reward: the first answer is wrong there, the second right
    ("entropy_advantage", {}, 3),
    ("entropic", {}, 3),
    ("dcpo", {}, 3),
    ("aepo", {}, 3),
    ("flex_clip", {}, 3),
    ("flex_clip", dict(clip=0.55), 1),
    ("ce_gppo", {}, 3),
    ("ce_gppo", dict(clip_low=0.6), 2),
    ("cispo", {}, 3),
    ("cispo", dict(clip_low=0.2), 5),
    ("gspo", {}, 7),
    ("gspo", dict(clip_high=0.3), 3),
    ("rand_pos_clip", dict(drop_frac=1e-9), 3),
    ("clip_b", {}, 3),
    ("clip_v", {}, 3),
    ("adaptive_entropy", {}, 3),
    ("aer", {}, 3),
    ("siren", {}, 3),
    ("fork_tokens", dict(top_frac=1.0), 3),
]


@pytest.mark.parametrize("method, knobs, count", CLIPPED)
def test_clip_frac_counts_the_clipped_tokens(method, knobs, count):
    """A share of the step's tokens, here of seven, and of fourteen if as many are elsewhere. Turns
    red when it counts what is not clipped, or the padding, or divides by this call's tokens only;
    so do all metrics of the method."""
    tensors = {}
    for name in ("token_entropy", "old_token_entropy", "nucleus_entropy", "group_accuracy"):
        tensors[name] = hand(OTHER)
    for name in ("ref_log_probs", "old_hot_log_probs", "old_cold_log_probs"):
        tensors[name] = hand(OLD).log()
    tensors["rewards"] = hand([[1] * 4, [0] * 3])
    if method == "w_reinforce":
        tensors["rewards"] = hand([[0] * 4, [1] * 3])
    tensors["num_sequences"] = torch.tensor(2)
    wanted = {name: tensors[name] for name in wanted_tensors(method)}
    mask = ~hand(NOW).isnan()
    case = (hand(NOW).log(), hand(OLD).log(), hand([[2] * 4, [-1] * 3]), mask)
    found = []
    for num_tokens in (None, torch.tensor(14)):
        torch.manual_seed(0)
        _, metrics = losses.METHODS[method](*case, **wanted, **knobs, num_tokens=num_tokens)
        found.append({name: float(value) for name, value in metrics.items()})
    assert found[0]["policy/clip_frac"] == pytest.approx(count / 7, rel=1e-6)
    halves = {name: value / 2 for name, value in found[0].items()}
    assert found[1] == pytest.approx(halves, rel=1e-6)


def test_the_four_estimates_of_the_entropy_change_are_their_formulas():
    g = random.Random(1)
    logits = [[g.gauss(0, 2) for _ in range(9)] for _ in range(6)]
    logp = [log_softmax(row) for row in logits]
    A = [1.5, -0.5, 0.7, -2.0, 1.0, 0.3]
    y = [g.randrange(9) for _ in A]
    log_probs = [row[token] for row, token in zip(logp, y)]
    entropies = [entropy_of(row) for row in logp]
    p2 = [sum(math.exp(2 * x) for x in row) for row in logp]
    p2_log_p = [sum(math.exp(2 * x) * x for x in row) for row in logp]
    rows = []
    for values in (log_probs, entropies, p2, p2_log_p, A):
        rows.append(torch.tensor(values, dtype=torch.float64).view(2, 3))
    mask = torch.tensor([[True] * 3, [True, True, False]])
    found = change_estimates(*rows, mask)
    expected = {"exact": [], "steer theorem": [], "steer released": [], "covariance": []}
    for row, token, a, H_t in zip(logp, y, A, entropies):
        p = math.exp(row[token])
        exact = 0.0
        for v, x in enumerate(row):
            exact -= math.exp(x) * (x + H_t) * a * ((v == token) - math.exp(x))
        expected["exact"].append(exact)
        expected["steer theorem"].append(-a * p * (1 - p) * (row[token] + H_t))
        expected["steer released"].append(-a * (1 - p) * (row[token] + H_t))
        centred = row[token] - fmean(log_probs[:5])
        expected["covariance"].append(-centred * (a - fmean(A[:5])))
    for name, values in expected.items():
        assert found[name].flatten().tolist()[:5] == pytest.approx(values[:5], rel=1e-9), name


# ---- the registry and the knobs ------------------------------------------------------------------


def test_knobs_are_read_by_their_type_and_refused_by_their_range():
    epochs = parse_knobs("par", ["epochs=3"])[1]["epochs"]
    assert epochs == 3 and type(epochs) is int
    assert parse_knobs("siren", ["peak_frac=1"])[0]["peak_frac"] == 1.0
    settings = ["positive_weight=0.3", "schedule=constant"]
    loss_knobs, rule_knobs, mask_knobs = parse_knobs("par", settings)
    assert loss_knobs["positive_weight"] == rule_knobs["positive_weight"] == 0.3
    assert mask_knobs == {}
    assert parse_knobs("clip_v", ["mu=3", "most_frac=0.5", "clip_low=0.1"]) == (
        {"clip_low": 0.1, "clip_high": 0.2, "dual_clip": None},
        {},
        {"mu": 3.0, "most_frac": 0.5},
    )
    loss_knobs = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None}
    assert parse_knobs("clip_b", []) == (loss_knobs, {}, {"mu": 2.5})
    assert parse_knobs("grpo", ["dual_clip=none"])[0]["dual_clip"] is None
    assert parse_knobs("grpo", ["dual_clip=3"])[0]["dual_clip"] == 3.0
    twice = ["clip_low=0.1", "clip_low=0.4"]
    assert parse_knobs("grpo", twice)[0]["clip_low"] == 0.4  # the last one counts
    for method, setting, complaint in [
        ("par", "epochs=2.5", "a whole number is expected"),
        ("par", "schedule=weekly", "use entropy, stage"),
        ("flex_clip", "schedule=up", "use id, did or od"),
        ("flex_clip", "upper_share=1", "no knob"),  # its controller sets it
        ("aer", "alpha=1", "no knob"),
        ("aer", "hard_below=0", "hard_below=0.0"),
        ("siren", "anchor=1", "no knob"),
        ("entropic", "integral=1", "no knob"),
        ("grpo", "num_tokens=3", "no knob"),
        ("kl_loss", "kl_coef=inf", "finite"),
        ("kl_loss", "kl_coef=none", "a number is expected"),
        ("kl_loss", "estimator=k1", "use k2 or k3"),
        ("fork_tokens", "top_frac=0", "a fraction in"),
        ("fork_tokens", "top_frac=1.01", "a fraction in"),
        ("clip_v", "most_frac=2", "a fraction in"),
        ("clip_b", "most_frac=0.1", "It has: .*mu=2.5"),
        ("steer", "min_weight=0", "min_weight"),
    ]:
        with pytest.raises(ValueError, match=complaint):
            parse_knobs(method, [setting])


def test_the_first_step_of_the_idle_methods_is_that_of_what_they_are_said_to_be(
    toy, tmp_path, drawn_figures, capsys
):
    """With one update per rollout those in IDLE_WITH_ONE_UPDATE take GRPO's step, kl_cov the
    unclipped one, which is the same there, and each says so; clip_cov does take another and says
    nothing."""
    assert set(losses.IDLE_WITH_ONE_UPDATE) == {"clip_higher", "flex_clip", "ce_gppo", "kl_cov"}
    args = "--updates_per_rollout 1 --steps 1 --save_every 1 --eval_data none --lr 1e-2"
    moved = {}
    for method in ("grpo", *losses.IDLE_WITH_ONE_UPDATE, "clip_cov"):
        knobs = ["cov_low=-9", "cov_frac=0.5"] if method == "clip_cov" else []
        more = f"--warmup_updates 1 --method {method}"
        toy_run(toy, tmp_path, method, args, more, *knob_words(knobs))
        told = capsys.readouterr().err
        reason = losses.IDLE_WITH_ONE_UPDATE.get(method)
        assert ("warning: " + method in told) == (reason is not None)
        assert reason is None or reason in told and "use more updates per rollout" in reason
        moved[method] = weights(tmp_path / method)["transformer.h.0.mlp.c_fc.weight"]
    apart = {method: (tensor - moved["grpo"]).abs().mean() for method, tensor in moved.items()}
    assert all(apart[method] < 1e-4 for method in losses.IDLE_WITH_ONE_UPDATE), apart
    assert apart["clip_cov"] > 1e-3


@pytest.mark.parametrize(
    "method, flag, reason",
    [
        ("w_reinforce", ["--dynamic_sampling"], "no baseline"),
        ("w_reinforce", ["--adv_norm", "none"], "nothing to normalise"),
        ("aepo", ["--tis_cap", "2"], "another temperature"),
        ("gspo", ["--tis_cap", "2"], "sequence"),
    ],
)
def test_flags_that_do_not_go_with_a_method(method, flag, reason, toy, tmp_path, capsys):
    for name, stops in ((method, True), ("grpo", False)):
        args = toy_args(toy, tmp_path, "run", "--method", name, *flag)
        if not stops:
            assert train.parse(args).method == name
            continue
        with pytest.raises(SystemExit):
            train.main(args)
        told = capsys.readouterr().err
        assert f"--method {method} with {flag[0]}" in told and reason in told


def test_a_method_is_found_under_its_own_name():
    """The names of the command line and of the functions are one."""
    for name, function in losses.METHODS.items():
        assert function.__name__ == name or function is losses.METHODS["grpo"]
    assert set(losses.MASKS) == {"clip_b", "clip_v"}


# ---- the diagnosis -------------------------------------------------------------------------------


@pytest.fixture
def told(tmp_path, monkeypatch, capsys, drawn_figures):
    """A function of {name: rows of metrics} (and {name: method}), which writes such runs and
    returns what the diagnosis prints: a list of paragraphs."""

    def tell(runs, methods=(), arguments=None):
        for name, rows in runs.items():
            folder = tmp_path / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            if name in methods:
                (folder / "config.json").write_text(json.dumps({"method": methods[name]}))
        paths = [tmp_path / name for name in runs] if arguments is None else arguments
        monkeypatch.setattr(sys, "argv", ["diagnosis", *map(str, paths)])
        diagnose.main()
        return capsys.readouterr().out.strip().split("\n\n")

    return tell


SHARES = {"pos_likely": -0.5, "pos_rare": 0.2, "neg_likely": 0.1, "neg_rare": -0.15}
FRACS = {"pos_likely": 0.2, "pos_rare": 0.05, "neg_likely": 0.3, "neg_rare": 0.12}


def usual_reward(H_t):
    return 0.6 - 0.2 * math.exp(H_t)


def noisy_run(n=44, slope=-0.014, seed=0, rewarded=usual_reward):
    """Metrics of n steps: noisy entropies and rewards, an evaluation before the first and after
    every tenth step."""
    g = random.Random(seed)
    rows = [{"step": 0, "eval/pass@1": 0.11, "eval/truncated_frac": 0.0}]
    for step in range(1, n + 1):
        H_t = 0.9 + slope * step + g.gauss(0, 0.03)
        row = {"step": step, ENTROPY: H_t, "reward/mean": rewarded(H_t) + g.gauss(0, 0.01)}
        row["response/truncated_frac"] = g.random() * 0.2
        row["reward/zero_std_frac"] = g.random() * 0.5
        row["rollout/gap_mean"] = g.random() * 1e-3  # the old name of rollout/mismatch_mean
        for q in QUADRANTS:
            row[f"quadrant/{q}_dH_share"] = SHARES[q] + g.gauss(0, 0.04)
            row[f"quadrant/{q}_frac"] = FRACS[q] + g.gauss(0, 0.01)
        if step % 10 == 0:
            row["eval/pass@1"] = 0.3 - 0.15 * math.exp(H_t) + g.gauss(0, 0.01)
        rows.append(row)
    return rows


def regression(x, y):
    """Slope, intercept, share of the variance explained and root mean square error of the line
    through (x, y)."""
    covariance = sum((a - fmean(x)) * (b - fmean(y)) for a, b in zip(x, y))
    slope = covariance / sum((a - fmean(x)) ** 2 for a in x)
    intercept = fmean(y) - slope * fmean(x)
    errors = [b - intercept - slope * a for a, b in zip(x, y)]
    r2 = 1 - sum(e * e for e in errors) / sum((b - fmean(y)) ** 2 for b in y)
    return slope, intercept, r2, math.sqrt(fmean(e * e for e in errors))


def law_by_hand(entropies, rewards):
    """The numbers of the law's sentence, in their order: the fit, then the one on the first 15 %
    and what it misses."""
    x = [math.exp(H_t) for H_t in entropies]
    slope, intercept, r2, rmse = regression(x, rewards)
    numbers = [slope, intercept, len(x), r2, rmse, intercept + slope]
    points = math.ceil(Fraction(15, 100) * len(x))
    if points >= 3:
        slope, intercept, *_ = regression(x[:points], rewards[:points])
        errors = [b - intercept - slope * a for a, b in zip(x[points:], rewards[points:])]
        numbers += [points, math.sqrt(fmean(e * e for e in errors)), errors[-1], intercept + slope]
    return numbers


def numbers_in(text):
    return [float(x) for x in re.findall(r"(?<![\w.@^])[-+]?\d+(?:\.\d+)?(?:e-?\d+)?", text)]


def the_sentence(paragraph, start):
    (found,) = [line for line in paragraph.splitlines() if line.startswith(start)]
    return found


def check_law(paragraph, key, entropies, rewards):
    sentence = the_sentence(paragraph, f"The law, {key} = ")
    text = sentence.split(" = ", 1)[1].replace("at H = 0", "").replace("first 15 %", "")
    if "No forecast" in text:
        text = text[: text.index("No forecast")]
    expected = law_by_hand(entropies, rewards)
    assert numbers_in(text) == pytest.approx(expected, abs=6e-3, rel=1e-3)
    assert len(expected) in (6, 10)
    pieces = re.findall(r"[-+]?\d+\.\d{3}", text)  # those with three digits to their last digit
    exact = [expected[i] for i in (0, 1, 4, 5, 7, 8, 9) if i < len(expected)]
    assert [float(x) for x in pieces] == pytest.approx(exact, abs=5.1e-4)
    return sentence


def course_by_hand(rows):
    """Start, end, share of the change after a twelfth and a third of the steps, of a run with an
    entropy at every step."""
    values = [row[ENTROPY] for row in rows if ENTROPY in row]
    start = values[0]
    end = fmean(values[-math.ceil(Fraction(len(values), 10)) :])
    made = []
    for part in (12, 3):
        place = Fraction(len(values), part)  # steps after the base, whose entropy is the first's
        below = int(place)
        value = values[below] + float(place - below) * (values[below + 1] - values[below])
        made.append((value - start) / (end - start))
    return start, end, *made


def test_the_diagnosis_of_a_fall_says_the_numbers_of_the_metrics(told):
    """44 noisy steps, every number of every sentence computed by hand. A metric that some steps
    lack is a mean over those that have it; a value that is not finite is left out, and named."""
    rows = noisy_run()
    for i, row in enumerate(rows[1:]):
        if i % 3 == 0:
            row["policy/selected_frac"] = 0.01 * (i % 5)
        if i % 7 == 3:
            del row["quadrant/neg_rare_frac"]
    rows[20]["quadrant/pos_rare_dH_share"] = math.nan
    rows[30]["response/truncated_frac"] = 0.97
    rows[31]["response/truncated_frac"] = 0.9  # the limit itself is not over it
    steps = rows[1:]
    (paragraph, _) = told({"mine": rows})
    start, end, twelfth, third = course_by_hand(rows)
    first = paragraph.splitlines()[0]
    assert (
        f"mine: 44 steps; entropy fell from {start:.3f} to {end:.3f} nats per token, "
        f"by {100 * (start - end) / start:.0f} %" in first
    )
    assert (
        f"twelfth of the steps made {100 * twelfth:.0f} % of that, "
        f"the first third {100 * third:.0f} % (73 %" in first
    )

    def mean(key):
        return fmean(row[key] for row in steps if key in row and math.isfinite(row[key]))

    share = {q: mean(f"quadrant/{q}_dH_share") for q in QUADRANTS}
    frac = {q: 100 * mean(f"quadrant/{q}_frac") for q in QUADRANTS}
    taken = the_sentence(paragraph, "Predicted: ")
    assert "pos_likely, the likely tokens of right answers" in taken and "took the most: " in taken
    head, others = taken.split("The others: ")
    assert (
        f"{share['pos_likely']:+.2f} of the sum of |dH| a step, "
        f"by {frac['pos_likely']:.1f} % of the tokens" in head
    )
    assert others.count(" by ") == 3
    for q in QUADRANTS[1:]:
        assert f"{q} {share[q]:+.2f} by {frac[q]:.1f} %" in others
    assert f"Net {sum(share.values()):+.2f}, the direction measured." in others
    methods = the_sentence(paragraph, "Methods that act on pos_likely: ")
    assert methods.endswith(", ".join(diagnose.ACT_EVERYWHERE) + ".")
    selected = 100 * mean("policy/selected_frac")
    assert f"The method itself chose {selected:.1f} % of the tokens." in paragraph

    truncated = the_sentence(paragraph, "response/truncated_frac: ")
    assert (
        f": {100 * mean('response/truncated_frac'):.1f} % of the answers are truncated, "
        "at most 97.0 %" in truncated
    )
    assert (
        "in 1 of 44 steps over 90 % of the answers are truncated, which may explain it: "
        "raise --max_response_len" in truncated
    )
    flat = the_sentence(paragraph, "reward/zero_std_frac: ")
    most = max(row["reward/zero_std_frac"] for row in steps)
    assert (
        f": {100 * mean('reward/zero_std_frac'):.1f} % of the answers "
        f"are in groups of equal rewards, at most {100 * most:.1f} %" in flat
    )
    assert "never over train.py's limit of 90.0 %, so no explanation" in flat
    mismatch = the_sentence(paragraph, "rollout/mismatch_mean: ")
    most = max(row["rollout/gap_mean"] for row in steps)
    assert (
        f": {mean('rollout/gap_mean'):.1e} nats per token, at most {most:.1e}; "
        "never over train.py's limit of 5.0e-02" in mismatch
    )

    entropies = [row[ENTROPY] for row in steps]
    told_law = check_law(paragraph, "reward/mean", entropies, [row["reward/mean"] for row in steps])
    assert "means nothing" not in told_law
    pairs = [
        (rows[row["step"] + 1][ENTROPY], row["eval/pass@1"]) for row in rows if "eval/pass@1" in row
    ]
    assert len(pairs) == 5
    sentence = check_law(paragraph, "eval/pass@1", *zip(*pairs))
    assert "No forecast from the first 15 %: " in sentence and "not 1." in sentence
    assert "Not finite in some steps, which were left out: quadrant/pos_rare_dH_share." in paragraph
    assert "Not in these metrics" not in paragraph


def test_the_diagnosis_of_a_rise_and_of_a_hold(told):
    """A rise is raised by the largest share, and reaches no comparison with the paper; within 5 %
    it held, whatever the shares add up to; a reward that falls with the entropy has no ceiling."""
    up = noisy_run(slope=0.02, n=30)
    fallen = noisy_run(slope=-0.014, rewarded=lambda H_t: 0.1 + 0.1 * math.exp(H_t))
    flat = noisy_run(slope=0.0, n=30)
    for row in flat[1:]:
        row[ENTROPY] = 0.5 + 0.02 * (row["step"] > 3)  # 4 % more
    edge = noisy_run(slope=0.0, n=30)
    for row in edge[1:]:
        row[ENTROPY] = 0.5 - 0.03 * (row["step"] > 3)  # 6 % less
    rises, falls, holds, edges, *_ = told({"up": up, "fallen": fallen, "flat": flat, "edge": edge})
    start, end, twelfth, third = course_by_hand(up)
    first = rises.splitlines()[0]
    assert (
        f"30 steps; entropy rose from {start:.3f} to {end:.3f} nats per token, "
        f"by {100 * (end - start) / start:.0f} %" in first
    )
    assert first.endswith(
        f"made {100 * twelfth:.0f} % of that, the first third {100 * third:.0f} %."
    )
    share = {q: fmean(row[f"quadrant/{q}_dH_share"] for row in up[1:]) for q in QUADRANTS}
    assert (
        "Predicted: pos_rare" in rises and f"raised the most: {share['pos_rare']:+.2f} of" in rises
    )
    assert f"The others: pos_likely {share['pos_likely']:+.2f} by " in rises
    assert f"Net {sum(share.values()):+.2f}, against the direction measured" in rises
    assert ", the direction measured" in falls
    entropies = [row[ENTROPY] for row in fallen[1:]]
    rewards = [row["reward/mean"] for row in fallen[1:]]
    told_law = check_law(falls, "reward/mean", entropies, rewards)
    assert "which means nothing: the reward fell with the entropy." in told_law
    assert "30 steps; entropy held: 0.500 nats per token at first, 0.520 at the end." in holds
    assert "Predicted: pos_likely" in holds and "took the most" in holds
    assert "measured" not in holds and "twelfth" not in holds
    assert "entropy fell from 0.500 to 0.470 nats per token, by 6 %" in edges


def test_short_and_partial_metrics(told):
    """12 steps are too few for a twelfth; a run without entropy is counted; what is missing is
    named in order."""
    twelve, thirteen, *_ = told({"twelve": noisy_run(12, -0.05), "thirteen": noisy_run(13, -0.05)})
    assert "twelve: 12 steps; entropy fell" in twelve and "twelfth" not in twelve
    assert "twelfth of" in thirteen
    # Of 13 steps, the first 15 % are 2.
    assert (
        "No forecast from the first 15 %: the law has two coefficients "
        "and needs at least 3 points, not 2" in thirteen
    )
    bare = [
        {"step": 0, "eval/pass@1": 0.1, "reward/mean": 0.3},
        {"step": 1, "train/lr": 1.0},
        {"step": 2, "train/lr": 1.0},
    ]
    (paragraph, *_) = told({"bare": bare})
    lines = paragraph.splitlines()
    assert lines[0] == "bare: 2 steps." and len(lines) == 2
    assert lines[1].startswith(
        "Not in these metrics, so nothing is said of it: entropy/response_mean, reward/mean, "
    )
    assert "eval/pass@1" not in lines[1] and lines[1].count("quadrant/") == 8
    lean = noisy_run(5)
    for row in lean:
        row.pop("eval/pass@1", None)
        row.pop("quadrant/neg_rare_frac", None)
        if "reward/mean" in row:
            row["reward/mean"] = 0.25
    (paragraph, *_) = told({"lean": lean})
    assert "Predicted" not in paragraph and "Methods that act" not in paragraph
    assert (
        "No law of reward/mean: the law has nothing to fit: "
        "all 5 entropies, or all rewards, are equal." in paragraph
    )
    assert paragraph.endswith("so nothing is said of it: eval/pass@1, quadrant/neg_rare_frac.")


def test_the_law_the_forecast_and_their_points():
    """Against a line through (exp H, R) by hand; smoothed, no mean spans what was fitted and the
    rest."""
    g = random.Random(3)
    entropies = [1.5 - 0.03 * i + g.gauss(0, 0.02) for i in range(41)]
    rewards = [0.8 - 0.11 * math.exp(H_t) + g.gauss(0, 0.01) for H_t in entropies]
    law = diagnose.fit_law(entropies, rewards)
    slope, intercept, r2, rmse = regression([math.exp(H_t) for H_t in entropies], rewards)
    expected = {"a": -slope, "b": intercept, "ceiling": intercept + slope, "r2": r2, "rmse": rmse}
    assert law == pytest.approx(expected, rel=1e-9)

    def running(values):
        return [fmean(values[i : i + 3]) for i in range(len(values) - 2)]

    for first, points in ((0.15, 7), (0.3, 13)):
        ahead = law_forecast(entropies, rewards, first=first, smooth=3)
        h = running(entropies[:points])
        r = running(rewards[:points])
        slope, intercept, r2, rmse = regression([math.exp(x) for x in h], r)
        rest = list(zip(running(entropies[points:]), running(rewards[points:])))
        errors = [y - intercept - slope * math.exp(x) for x, y in rest]
        expected = {
            "points": points,
            "a": -slope,
            "b": intercept,
            "ceiling": intercept + slope,
            "r2": r2,
            "rmse": rmse,
            "rmse_rest": math.sqrt(fmean(e * e for e in errors)),
            "error_last": errors[-1],
            "rmse_mean": math.sqrt(fmean((y - fmean(r)) ** 2 for _, y in rest)),
        }
        assert ahead == pytest.approx(expected, rel=1e-8)

    rows = [
        {"step": 0, "eval/pass@1": 0.1},
        {"step": 1, ENTROPY: 1.0, "reward/mean": 0.2},
        {"step": 2, ENTROPY: 0.9, "eval/pass@1": 0.3},
        {"step": 3, "reward/mean": 0.4},
        {"step": 4, ENTROPY: 0.7, "reward/mean": 0.5, "eval/pass@1": 0.6},
        {"step": 5, ENTROPY: 0.6},
        {"step": 6, ENTROPY: 0.5, "eval/pass@1": 0.9},
    ]
    assert law_points(rows, "reward/mean") == ([1.0, 0.7], [0.2, 0.5])
    # Step 3 has no entropy.
    assert law_points(rows, "eval/pass@1") == ([1.0, 0.6], [0.1, 0.6])


def test_how_much_of_a_change_the_first_part_makes():
    """Entropies count from step 1, which is the base; evaluations from step 0; between them lies a
    line."""
    values = [10, 8, 6, 5, *[4] * 7, 2]  # the last tenth of 12 is two values, 3 on average
    assert share_made(range(1, 13), values, 1 / 12) == pytest.approx(2 / 7)
    assert share_made(range(1, 13), values, 1 / 8) == pytest.approx(3 / 7)
    assert share_made([0, 20, 40], [0.1, 0.3, 0.5], 1 / 4) == pytest.approx(0.1 / 0.4)
    assert share_made([0, 20, 60], [0.1, 0.5, 0.3], 1 / 2) == pytest.approx((0.45 - 0.1) / 0.2)
    # Ten steps from the 10th.
    assert share_made([11, 16, 20], [1.0, 3.0, 5.0], 1 / 2) == pytest.approx(2 / 4)


def test_the_comparison_of_runs(told):
    """Up to the last step that all have, by the mean of the last tenth of those steps; the quadrant
    that differs most."""
    long = noisy_run(44)
    short = noisy_run(27, slope=-0.002, seed=1)
    for row in short[1:]:
        row["quadrant/neg_likely_dH_share"] -= 0.9  # the widest, not the largest
        if row["step"] % 4 == 0:
            del row[ENTROPY]
    third = noisy_run(31, seed=2)
    no_entropy = noisy_run(40)
    for row in no_entropy:
        row.pop(ENTROPY, None)
    no_quadrants = []
    for row in noisy_run(40, seed=5):
        no_quadrants.append({key: value for key, value in row.items() if "quadrant" not in key})
    runs = {"long": long, "short": short, "third": third, "mute": no_entropy, "blind": no_quadrants}
    *_, compared, _ = told(runs)
    entropy, shares, lacking = compared.splitlines()
    tail = {}
    for name in ("long", "short", "third", "blind"):
        values = [row[ENTROPY] for row in runs[name] if 0 < row["step"] <= 27 and ENTROPY in row]
        tail[name] = fmean(values[-math.ceil(Fraction(len(values), 10)) :])
    order = sorted(tail, key=lambda name: -tail[name])
    assert entropy.startswith("Entropy at step 27 ")
    assert entropy.endswith(": " + ", ".join(f"{name} {tail[name]:.3f}" for name in order) + ".")
    expected = []
    for name in ("long", "short", "third", "mute"):
        steps = [row for row in runs[name] if 0 < row["step"] <= 27]
        value = fmean(row["quadrant/neg_likely_dH_share"] for row in steps)
        expected.append(f"{name} {value:+.2f}")
    assert "differ most in neg_likely, the likely tokens of wrong answers" in shares
    assert shares.endswith(": " + ", ".join(expected) + ".")
    assert lacking == "Not compared: mute has no entropy; blind has no quadrants."
    *_, compared, _ = told({"long": long, "mute": no_entropy})
    assert "Entropy at step" not in compared
    assert "predicted shares" in compared and "mute has no entropy" in compared


def test_runs_are_named_by_their_folder_or_file_and_drawn_beside_the_first(
    told, tmp_path, drawn_figures
):
    """A folder, its metrics.jsonl, or another file; twice the same path is one run; equal names are
    told apart by paths."""
    rows = noisy_run(20)
    methods = {"x/one": "kl_cov", "y/one": "grpo", "steer-a": "steer"}
    del rows[-1]["eval/pass@1"]
    for row in rows:
        if "eval/pass@1" in row:
            row |= {"eval/pass@4": 0.2, "eval/pass@16": 0.4, "eval/some/pass@2": 0.3}
    told({"x/one": rows, "y/one": rows, "steer-a": rows}, methods)
    other = tmp_path / "loose.jsonl"
    shutil.copy(tmp_path / "steer-a" / "metrics.jsonl", other)
    drawn_figures.clear()
    steer = tmp_path / "steer-a"
    paths = [tmp_path / "x/one/metrics.jsonl", tmp_path / "y/one", steer, steer, other]
    paragraphs = told({}, arguments=paths)
    assert [p.split(": 20 steps")[0] for p in paragraphs[:4]] == [
        "one",
        str(tmp_path / "y/one"),
        "steer-a",
        "loose",
    ]
    assert len(paragraphs) == 6 and paragraphs[-1] == str(tmp_path / "x/one/diagnosis.png")
    ((figure, png),) = drawn_figures
    assert png == tmp_path / "x/one/diagnosis.png"
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == [
        "policy entropy (nats per token)",
        "training reward (mean)",
        "test pass@1",
        "test pass@16",
        *(f"predicted share of dH: {q}" for q in QUADRANTS),
    ]
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["kl_cov: one", f"grpo: {tmp_path / 'y/one'}", "steer-a", "loose"]
    told({"plain": [{"step": 1, ENTROPY: 0.5}]})  # what no run has gets no panel
    assert [axis.get_title() for axis in drawn_figures[1][0].axes] == titles[:1]


# ---- figures -------------------------------------------------------------------------------------


def test_the_lines_of_a_figure(tmp_path, drawn_figures):
    """Five panels in rows of four: what is drawn where, from where the axis counts, and which line
    is whose."""
    seeds = []
    for i in range(3):
        rows = []
        for step in range(4):
            row = {"step": step, "up": step + i, "down": -1.0 - i, "mixed": (-1) ** step}
            rows.append(row | {"eval/pass@1": 0.1 * i})
        seeds.append(rows)
    seeds[1].pop(2)  # a step that one seed lacks is not drawn
    runs = {"kl_cov-a": seeds, "kl_cov: b": seeds[:1], "unknown": seeds[:1]}
    panels = {
        "up": "Up",
        "down": "Down",
        "mixed": "Mixed",
        "eval/pass@1": "Pass",
        "absent": "Absent",
    }
    plot_curves(runs, tmp_path / "x.png", panels)
    ((figure, png),) = drawn_figures
    assert png == tmp_path / "x.png" and len(figure.axes) == 8
    up, down, mixed, passed, absent, *rest = figure.axes
    assert [axis.get_title() for axis in figure.axes] == [
        "Up",
        "Down",
        "Mixed",
        "Pass",
        "Absent",
        "",
        "",
        "",
    ]
    assert up.get_xlabel() == "step" and not any(axis.axison for axis in rest) and absent.axison
    line = up.get_lines()[0]
    assert list(line.get_xdata()) == [0, 1, 3] and list(line.get_ydata()) == [1, 2, 4]
    band = up.collections[0].get_datalim(up.transData)
    assert (band.intervaly[0], band.intervaly[1]) == pytest.approx((0, 5))
    assert up.get_ylim()[0] == 0 and up.get_ylim()[1] > 5
    assert down.get_ylim()[1] == 0 and down.get_ylim()[0] < -3
    assert mixed.get_ylim()[0] < -1 and mixed.get_ylim()[1] > 1
    assert passed.get_lines()[0].get_marker() == "o"
    assert up.get_lines()[0].get_marker() in ("None", None, "")
    assert [text.get_text() for text in up.get_legend().get_texts()] == list(runs)
    plot_curves({"grpo": seeds}, tmp_path / "y.png", {"up": "Up", "down": "Down"})
    assert len(drawn_figures[1][0].axes) == 2


def test_styles_tell_lines_of_one_colour_apart():
    labels = ["kl_cov-a", "x", "kl_cov: b", "y", "kl_cov", "kl_cov-d", "kl_cov-e", "grpo"]
    found = line_styles(labels)
    assert list(found) == labels
    assert method_of("clip_cov-tiny-seed0") == "clip_cov"
    assert method_of("kl_cov: b") == "kl_cov" and method_of("2nd") == ""
    colours = {label: found[label][0] for label in labels}
    assert {colours["x"], colours["y"]} == {"tab:gray"}
    assert colours["grpo"] == "tab:blue" and colours["kl_cov"] == "tab:green"
    assert [found[label][1] for label in labels] == ["-", "-", "--", "--", ":", "-.", "-", "-"]


def test_the_usual_panels():
    row = {
        "step": 1,
        "eval/pass@1": 0.1,
        "eval/pass@2": 0.2,
        "eval/pass@16": 0.3,
        "eval/set/pass@4": 0.2,
    }
    titles = {ENTROPY: "policy entropy (nats per token)", "reward/mean": "training reward (mean)"}
    one = {"eval/pass@1": "test pass@1"}
    last = {"step": 2, "eval/pass@8": 0.1}
    assert usual_panels({"a": [[{"step": 1}]]}) == titles
    assert usual_panels({"a": [[row]]}) == titles | one | {"eval/pass@16": "test pass@16"}
    found = usual_panels({"a": [[row]], "b": [[row], [row, last]]})
    assert list(found.items()) == list((titles | one | {"eval/pass@8": "test pass@8"}).items())
    assert usual_panels({"a": [[{"step": 0, "eval/pass@1": 0.1}]]}) == titles | one


def test_metrics_are_read_from_a_folder_or_a_file_to_the_last_whole_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n{"step": 2}')
    (tmp_path / "other.jsonl").write_text('{"step": 5}\n')
    rows = [{"step": 0}, {"step": 1}]
    assert read_metrics(tmp_path) == read_metrics(str(tmp_path)) == rows
    assert read_metrics(tmp_path / "other.jsonl") == [{"step": 5}]
