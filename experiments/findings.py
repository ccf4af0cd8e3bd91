"""The three papers' 14 findings, tried on the default task: three seeds each, verdicts, figures.

    python -m experiments.findings                      all
    python -m experiments.findings --only 6             some

Each finding below is a function of its runs that returns claims: what is claimed, whether it holds
here, the numbers. Committed runs (runs.py) are read, others trained first. Verdicts and numbers go
to results/findings.md, the figures to results/findings/.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Callable, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from diagnose import fit_law, line_styles, plot_curves, usual_panels
from experiments.runs import HALVES, TRAINED, read_available, train_missing, write_page
from experiments.stats import (
    PASS_AT_1,
    REWARD,
    H,
    above,
    after_updates,
    apart,
    at_end,
    at_step_1,
    below,
    column,
    covariance_and_fall,
    covariance_by_difficulty,
    each,
    eval_law,
    flat,
    forecast_error,
    gain,
    in_words,
    kept,
    last,
    made_by,
    positive_covariance,
    rising,
    spearman,
)

RESULTS = Path("experiments/results")
SEEDS = (0, 1, 2)


class Claim(NamedTuple):
    """ours: it is not the papers' claim, and no verdict counts it."""

    text: str
    holds: bool
    found: dict = {}  # {name: [a number per seed]}; empty: the numbers of the claim before
    ours: bool = False


# ---- settings: METHOD or METHOD-SETTING, and its flags of train.py beside the default ones -------

# With the default 4 updates the clips reach 0.2 % of the tokens: for them to act, there are 8.
EIGHT = "--updates_per_rollout 8"
POSITIVE_ONLY = "--method quadrant --knobs neg_likely=0 neg_rare=0"  # only answers with A > 0
UNCLIPPED = "--knobs clip_low=0.99 clip_high=5"

SETTINGS = {
    "grpo": "--eval_samples 64",
    "grpo-updates-1": "--updates_per_rollout 1 --eval_samples 64 --eval_every 50",
    "grpo-updates-2": "--updates_per_rollout 2 --eval_samples 64 --eval_every 50",
    "grpo-updates-8": "--updates_per_rollout 8 --eval_samples 64 --eval_every 50",
    "clip_cov-0.005": "--method clip_cov --knobs cov_frac=0.005",
    "clip_cov-0.02": "--method clip_cov --knobs cov_frac=0.02",
    "clip_cov-0.08": "--method clip_cov --knobs cov_frac=0.08",
    "kl_cov-0.005": "--method kl_cov --knobs cov_frac=0.005",
    "kl_cov-0.02": "--method kl_cov --knobs cov_frac=0.02",
    "kl_cov-0.08": "--method kl_cov --knobs cov_frac=0.08",
    "quadrant-positive": POSITIVE_ONLY,
    "par": "--method par --knobs target_entropy=0.35",
    "par-0": "--method par --knobs schedule=constant positive_weight=0",
    "par-0.5": "--method par --knobs schedule=constant positive_weight=0.5",
    "entropy_bonus-0.001": "--method entropy_bonus --knobs entropy_coef=0.001",
    "entropy_bonus-0.01": "--method entropy_bonus --knobs entropy_coef=0.01",
    "entropy_bonus-0.1": "--method entropy_bonus --knobs entropy_coef=0.1",
    "entropy_bonus-0.1-updates-1": (
        "--method entropy_bonus --knobs entropy_coef=0.1 --updates_per_rollout 1"
    ),
    "adaptive_entropy": (
        "--method adaptive_entropy --knobs target_entropy=0.35 delta=0.002 max_coef=0.05"
    ),
    "kl_loss-0.1": "--method kl_loss --knobs kl_coef=0.1",
    "kl_loss-1": "--method kl_loss --knobs kl_coef=1",
    "quadrant-pos_likely": "--method quadrant --knobs pos_likely=0.5",
    "quadrant-pos_rare": "--method quadrant --knobs pos_rare=0.5",
    "quadrant-neg_likely": "--method quadrant --knobs neg_likely=0.5",
    "quadrant-neg_rare": "--method quadrant --knobs neg_rare=0.5",
    "clip_higher": f"--method clip_higher {EIGHT}",
    "grpo-tight": f"--knobs clip_low=0.05 {EIGHT}",
    "grpo-wide": f"--knobs clip_low=0.6 {EIGHT}",
    "grpo-unclipped": f"{UNCLIPPED} {EIGHT}",
    "steer-unclipped": f"--method steer {UNCLIPPED} {EIGHT}",
    "steer-unclipped-0.1": f"--method steer {UNCLIPPED} min_weight=0.1 {EIGHT}",
    "grpo-no-std": "--adv_norm none",
    "w_reinforce-1": "--method w_reinforce --knobs positive_weight=1",
    "grpo-easy": f"--data {HALVES['easy']}",
    "grpo-hard": f"--data {HALVES['hard']}",
    "quadrant-positive-easy": f"{POSITIVE_ONLY} --data {HALVES['easy']}",
    "grpo-prompts-16": "--num_prompts 16",
    "grpo-prompts-64": "--num_prompts 64",
    "grpo-prompts-256": "--num_prompts 256",
    "grpo-mini": "--model tiny-mini",
    "grpo-small": "--model tiny-small",
    "grpo-300": "--steps 300 --eval_every 30",
}

CLIP_COV = ["clip_cov-0.005", "clip_cov-0.02", "clip_cov-0.08"]
KL_COV = ["kl_cov-0.005", "kl_cov-0.02", "kl_cov-0.08"]
PAR = ["par-0", "par-0.5", "par"]
# Updates per rollout batch of these runs.
UPDATES = {"grpo-updates-1": 1, "grpo-updates-2": 2, "grpo": 4, "grpo-updates-8": 8}


def flags_of(name):
    """All flags of a setting; of a flag that is given twice the last counts."""
    return f"--eval_every 10 --save_every 50 {SETTINGS[name]}"


# ---- figures -------------------------------------------------------------------------------------


def draw_curves(runs, png, k=8):
    """Against the step: the usual panels, with pass@k in the place of pass@8."""
    panels = usual_panels(runs)
    panels.pop("eval/pass@8", None)
    panels[f"eval/pass@{k}"] = f"test pass@{k}"
    plot_curves(runs, png, panels)


def draw_curves_pass_at_16(runs, png):
    draw_curves(runs, png, k=16)


def draw_curves_pass_at_64(runs, png):
    draw_curves(runs, png, k=64)


def empty_panels(titles, xlabel):
    """A figure and its axes, one panel per title, side by side."""
    figure, axes = plt.subplots(
        1,
        len(titles),
        figsize=(4.6 * len(titles), 3.8),
        constrained_layout=True,
        squeeze=False,
    )
    for axis, title in zip(axes[0], titles):
        axis.set(title=title, xlabel=xlabel)
        axis.grid(alpha=0.3)
    return figure, axes[0]


def draw_points(axis, groups, with_law=False):
    """Draws points, {name: (x, y)}; with_law: and the law, fitted to all points of the group."""
    markers = {"-": "o", "--": "s", ":": "^", "-.": "x"}
    styles = line_styles(groups)
    for name, (x, y) in groups.items():
        colour, style = styles[name]
        axis.plot(x, y, markers[style], markersize=4, color=colour, alpha=0.6, label=name)
        if with_law:
            fit = fit_law(x, y)
            line = np.linspace(min(x), max(x))
            axis.plot(line, fit["b"] - fit["a"] * np.exp(line), style, color=colour)


def save(figure, png):
    figure.savefig(png, dpi=130)
    plt.close(figure)


# ---- arXiv 2505.22617: findings 1 to 6 -----------------------------------------------------------


def entropy_goes_early(runs):
    claims = []
    for name in runs:
        steps = len(runs[name][0]) - 1
        for n, most in ((12, 0.5), (3, 0.8)):
            for key in (H, PASS_AT_1):
                found = each(runs, made_by, [name], part=1 / n, key=key)
                text = f"the first 1/{n} of {steps} steps makes over {most} of the change of {key}"
                holds = np.mean(found[name]) > most
                claims.append(Claim(text, holds, found, ours=name == "grpo"))
    return claims


LAW_PANELS = {
    "algorithms": ("grpo", "grpo-no-std", "w_reinforce-1"),
    "data": ("grpo", "grpo-easy", "grpo-hard"),
    "sizes": ("grpo-mini", "grpo", "grpo-small"),
}


def law(runs):
    fits = {}
    for what in ("r2", "r2 of a line", "r2 of the step"):
        fits[what] = each(runs, eval_law, what=what)["grpo"]
    misses = each(runs, forecast_error)
    by_mean = each(runs, forecast_error, ["grpo"], what="rmse_mean")
    misses["grpo, by the mean of its first 15 %"] = by_mean["grpo"]
    claims = [
        Claim(
            "pass@1 = -a exp(H) + b, on the test problems, fits GRPO: R^2 of 0.9 or more",
            min(fits["r2"]) >= 0.9,
            fits,
        ),
        Claim(
            "GRPO's first 15 % forecast its rewards: RMSE up to 0.02",
            max(misses["grpo"]) <= 0.02,
            misses,
        ),
    ]
    for coefficient in ("a", "b"):
        found = each(runs, eval_law, what=coefficient)
        claims += [
            Claim(
                f"{coefficient} does not depend on the algorithm (no-std: RLOO's baseline): "
                "their seeds are not apart",
                not apart(found, *LAW_PANELS["algorithms"]),
                found,
            ),
            Claim("but on the data: their seeds are apart", apart(found, *LAW_PANELS["data"])),
        ]
    r2 = each(runs, eval_law, what="r2")
    claims.append(
        Claim(
            "the law fits every algorithm, half of the data and size: R^2 of 0.9",
            min(flat(r2)) >= 0.9,
            r2,
        )
    )
    return claims


def draw_law(runs, png):
    titles = [f"test pass@1: {title}" for title in LAW_PANELS]
    figure, axes = empty_panels(titles, "entropy on the test problems (nats)")
    for axis, names in zip(axes, LAW_PANELS.values()):
        groups = {}
        for name in names:
            entropy = [column(rows, "eval/entropy") for rows in runs[name]]
            pass_at_1 = [column(rows, PASS_AT_1) for rows in runs[name]]
            groups[name] = (np.hstack(entropy), np.hstack(pass_at_1))
        draw_points(axis, groups, with_law=True)
        axis.legend(fontsize=8)
    save(figure, png)


def group_covariance(runs):
    name = "grpo-updates-1"
    share = each(runs, positive_covariance)[name]
    parts = {}
    for part in ("hard", "mid", "easy"):
        parts[part] = each(runs, covariance_by_difficulty, part=part)[name]
    shape = {
        "steps": each(runs, covariance_and_fall, smooth=1)[name],
        "nine-step means": each(runs, covariance_and_fall, smooth=9)[name],
    }
    return [
        Claim("positive in more than 0.9 of the steps", min(share) > 0.9, {"share": share}),
        Claim("larger for easier prompts", rising(parts, "hard", "mid", "easy"), parts),
        Claim(
            "its curve has the shape of -dH: Pearson of means above 0.5",
            min(shape["nine-step means"]) > 0.5,
            shape,
        ),
    ]


def draw_group_covariance(runs, png):
    """Nine-step means over all seeds; on the right each curve is divided by its own mean, as only
    the shape is asked."""
    seeds = runs["grpo-updates-1"]
    titles = ["group covariance by group accuracy", "shapes: mean 1, after the warm-up"]
    figure, axes = empty_panels(titles, "step")
    for part in ("hard", "mid", "easy"):
        key = f"policy/group_cov_{part}"
        rows_with = [row for rows in seeds for row in rows if key in row]
        steps = [row["step"] for row in rows_with]
        values = [row[key] for row in rows_with]
        axes[0].plot(steps, values, ".", markersize=3, alpha=0.5, label=part)
    curves = {
        "group covariance": nine_step_means(seeds, "policy/group_cov_mean"),
        "-dH": -nine_step_means(seeds, "entropy/change_measured"),
    }
    for label, curve in curves.items():
        axes[1].plot(range(15, 15 + len(curve)), curve / curve.mean(), label=label)
    for axis in axes:
        axis.legend(fontsize=8)
    save(figure, png)


def nine_step_means(seeds, key):
    """The mean curve over the seeds, without the ten steps of warm-up."""
    return np.mean([column(rows[11:], key, 9) for rows in seeds], 0)


TOP_SHARES = ("0.0002", "0.002", "0.02", "0.2")
TOPS_OF_QWEN_7B = (5.65, 3.11, 1.39, 0.35)  # Qwen2.5-7B, arXiv 2505.22617


def covariance_tops(runs):
    """Token covariance at step 1: {top share: [mean of the largest, per seed]}, and of all."""
    tops = {}
    for share in TOP_SHARES:
        tops[f"top {share}"] = each(runs, at_step_1, key=f"policy/cov_top_{share}")["grpo"]
    tops["all"] = each(runs, at_step_1, key="policy/cov_mean")["grpo"]
    return tops


def covariance_tail(runs):
    tops = covariance_tops(runs)
    ratios = np.divide(tops["top 0.002"], tops["top 0.2"])
    text = (
        "step 1: the top 0.002 is over 5 times the top 0.2 (papers: 9; a Gaussian: 2.3; "
        "a product of two: 4.1)"
    )
    return [Claim(text, min(ratios) > 5, tops)]


def draw_covariance_tail(runs, png):
    titles = ["token covariance, step 1: mean of the top share"]
    figure, (axis,) = empty_panels(titles, "share of the tokens")
    shares = [float(share) for share in TOP_SHARES]
    tops = covariance_tops(runs)
    values = np.array([tops[f"top {share}"] for share in TOP_SHARES])  # (shares, seeds)
    draw_points(axis, {"grpo": (np.repeat(shares, values.shape[1]), values.ravel())})
    label = "Qwen2.5-7B, arXiv 2505.22617"
    axis.plot(shares, TOPS_OF_QWEN_7B, "x", color="tab:gray", label=label)
    axis.set(xscale="log", ylim=0)
    axis.legend(fontsize=8)
    save(figure, png)


def bonus_and_kl(runs):
    h_end = each(runs, at_end)
    pass1 = each(runs, last)
    difference = abs(np.mean(h_end["entropy_bonus-0.001"]) - np.mean(h_end["grpo"]))
    return [
        Claim(
            "a bonus of 0.001 does little: the mean differs from GRPO's by less than 0.02",
            difference < 0.02,
            h_end,
        ),
        Claim(
            "one of 0.1 explodes: H ends above twice its start",
            min(each(runs, kept)["entropy_bonus-0.1"]) > 2,
        ),
        Claim(
            "KL to the reference steadies H, at 0.1 and at 1",
            below(h_end, "grpo", "kl_loss-0.1", "kl_loss-1"),
        ),
        Claim(
            "and costs accuracy, at 0.1 and at 1",
            above(pass1, "grpo", "kl_loss-0.1", "kl_loss-1"),
            pass1,
        ),
    ]


def clip_cov_and_kl_cov(runs):
    h_end = each(runs, at_end)
    pass1 = each(runs, last)
    pass16 = each(runs, last, key="eval/pass@16")
    highest = max(np.mean(seeds) for seeds in h_end.values())
    return [
        Claim(
            "Clip-Cov's knob sets H: it rises from GRPO's with cov_frac",
            rising(h_end, "grpo", *CLIP_COV),
            h_end,
        ),
        Claim("KL-Cov's knob too", rising(h_end, "grpo", *KL_COV)),
        Claim(
            "both, at 0.02, end above GRPO",
            below(h_end, "grpo", "clip_cov-0.02", "kl_cov-0.02"),
        ),
        Claim("one ends at 10 times GRPO's H", highest > 10 * np.mean(h_end["grpo"])),
        Claim(
            "pass@1 of both, at 0.02, is above GRPO's",
            below(pass1, "grpo", "clip_cov-0.02", "kl_cov-0.02"),
            pass1,
        ),
        Claim(
            "pass@16 of both, at 0.02, is above GRPO's",
            below(pass16, "grpo", "clip_cov-0.02", "kl_cov-0.02"),
            pass16,
            ours=True,
        ),
    ]


# ---- arXiv 2510.10150: findings 7 to 9 -----------------------------------------------------------


def estimated_correlations():
    """{policy: {step: {estimate: [correlations of each batch]}}} of experiments/estimates.py.

    If they are not there it runs: on the base and, where GRPO's first run was trained in this
    folder, on its last checkpoint.
    """
    file = RESULTS / "estimates.json"
    if not file.exists():
        command = [sys.executable, "-m", "experiments.estimates"]
        trained = TRAINED / "grpo-seed0" / "checkpoint-100"
        if trained.exists():
            command.append(str(trained))
        subprocess.run(command, check=True)
    return json.loads(file.read_text())


def estimates_of_dh(runs):
    """runs is not read: the batches of estimates.py, whose figure it draws, stand for the seeds."""
    claims = []
    for policy, steps in estimated_correlations().items():
        for what in ("Pearson", "Spearman"):
            found = {}
            for step, estimates in steps.items():
                for name, batches in estimates.items():
                    found[f"{step}: {name}"] = [batch[what] for batch in batches]
            others = ("steer theorem", "steer released", "covariance")
            claims += [
                Claim(
                    f"{what}, {policy}, each kind of step, every batch: STEER's theorem is ahead "
                    "of the covariance",
                    is_ahead(found, steps, "steer theorem", "covariance"),
                    found,
                ),
                Claim(
                    "and so is STEER as released",
                    is_ahead(found, steps, "steer released", "covariance"),
                ),
                Claim("exact is ahead of all", is_ahead(found, steps, "exact", *others), ours=True),
            ]
    return claims


def is_ahead(found, steps, name, *others):
    """Whether an estimate correlates better than those, for each kind of step and every batch."""
    for step in steps:
        for other in others:
            if not np.all(np.greater(found[f"{step}: {name}"], found[f"{step}: {other}"])):
                return False
    return True


# Half the weight on one quadrant of the tokens: where H should then be, seen from GRPO's.
WEAKENED = {"pos_likely": above, "pos_rare": below, "neg_likely": below, "neg_rare": above}


def quadrants(runs):
    h_end = each(runs, at_end)
    claims = []
    for quadrant, order in WEAKENED.items():
        name = f"quadrant-{quadrant}"
        found = {"half": h_end[name], "grpo": h_end["grpo"]}
        text = f"half of {quadrant}: H ends {order.__name__} GRPO's"
        claims.append(Claim(text, order(h_end, name, "grpo"), found))
    return claims


def steer(runs):
    h_end = each(runs, at_end)
    pass1 = each(runs, last)
    kept_by_steer = each(runs, kept)["steer-unclipped"]
    return [
        Claim(
            "at clips of 0.99 and 5 STEER ends above GRPO",
            above(h_end, "steer-unclipped", "grpo-unclipped"),
            h_end,
        ),
        Claim(
            "and does with min_weight=0.1, not 0.8",
            above(h_end, "steer-unclipped-0.1", "grpo-unclipped"),
            ours=True,
        ),
        Claim(
            "and holds H: it keeps 0.9 of it",
            min(kept_by_steer) > 0.9,
            {"kept": kept_by_steer},
        ),
        Claim(
            "its pass@1 is above GRPO's",
            above(pass1, "steer-unclipped", "grpo-unclipped"),
            pass1,
        ),
    ]


# ---- arXiv 2511.05993: findings 10 to 14 ---------------------------------------------------------


def updates_per_rollout(runs):
    most_updates_first = list(UPDATES)[::-1]
    h_end = each(runs, at_end)
    h_after_96 = {}
    for name, updates in UPDATES.items():
        h_after_96 |= each(runs, after_updates, [name], count=96, updates_per_rollout=updates)
    reward = each(runs, at_end, UPDATES, key=REWARD)
    pass64 = each(runs, last, UPDATES, key="eval/pass@64")
    return [
        Claim(
            "H falls: the more updates per rollout batch, the lower it ends",
            rising(h_end, *most_updates_first),
            h_end,
        ),
        Claim(
            "H rises (bonus 0.1): 4 end above 1",
            above(h_end, "entropy_bonus-0.1", "entropy_bonus-0.1-updates-1"),
        ),
        Claim(
            "and not as they are more steps: after 96 optimizer steps, too, more updates have "
            "less H",
            rising(h_after_96, *most_updates_first),
            h_after_96,
            ours=True,
        ),
        Claim(
            "training reward up, 4 against 1, in each seed, as these share their problems",
            np.all(np.greater(reward["grpo"], reward["grpo-updates-1"])),
            reward,
        ),
        Claim(
            "pass@64 down, 4 against 1",
            below(pass64, "grpo", "grpo-updates-1"),
            pass64,
        ),
    ]


def fewer_prompts(runs):
    fewest_first = list(runs)
    h_end = each(runs, at_end)
    h_test = each(runs, last, key="eval/entropy")
    gains = each(runs, gain)
    return [
        Claim("fewer prompts, less H on these", rising(h_end, *fewest_first), h_end),
        Claim("and less on the test problems", rising(h_test, *fewest_first), h_test, ours=True),
        Claim(
            "256 make over 0.9 of the gain in pass@1",
            np.mean(gains["grpo-prompts-256"]) > 0.9 * np.mean(gains["grpo"]),
            gains,
        ),
    ]


def clip_thresholds(runs):
    h_end = each(runs, at_end)
    return [
        Claim(
            "clip-higher ends above clip-free",
            above(h_end, "clip_higher", "grpo-unclipped"),
            h_end,
        ),
        Claim("a larger lower bound, 0.6, ends below all", below(h_end, "grpo-wide")),
        Claim(
            "a tighter one, 0.05, ends above 0.2",
            above(h_end, "grpo-tight", "grpo-updates-8"),
        ),
    ]


def sign_of_a(runs):
    h_end = each(runs, at_end)
    kept_by_negative = each(runs, kept)["par-0"]
    farthest = max(abs(np.subtract(h_end["par"], 0.35)))
    return [
        Claim(
            "A > 0 only ends below GRPO and A < 0 only",
            below(h_end, "quadrant-positive", "grpo", "par-0"),
            h_end,
        ),
        Claim(
            "on easy problems below GRPO",
            below(h_end, "quadrant-positive-easy", "grpo-easy"),
            ours=True,
        ),
        Claim("A < 0 only ends above GRPO", above(h_end, "par-0", "grpo")),
        Claim(
            "and H stays high: it keeps 0.9 of it",
            min(kept_by_negative) > 0.9,
            {"kept": kept_by_negative},
        ),
        Claim(
            "the weight of A > 0 sets H: it rises from 1 to 0.5 to 0",
            rising(h_end, "grpo", "par-0.5", "par-0"),
        ),
        Claim("led by H it keeps the target of 0.35 to 0.05", farthest < 0.05),
    ]


def what_goes_with_entropy(runs):
    h_end = each(runs, at_end)
    pass1 = each(runs, last)
    diversity = each(runs, at_end, key="response/ngram_diversity")
    return [
        goes_with(h_end, "response/ngram_diversity", diversity, least=0.8),
        goes_with(h_end, "eval/conf_wrong", each(runs, last, key="eval/conf_wrong"), most=-0.5),
        goes_with(h_end, "eval/conf_gap", each(runs, last, key="eval/conf_gap"), least=0.5),
        goes_with(h_end, "eval/ece", each(runs, last, key="eval/ece"), most=-0.5),
        goes_weakly_with(h_end, pass1),
        Claim(
            "pass@1 of par and adaptive_entropy is above GRPO's",
            below(pass1, "grpo", "par", "adaptive_entropy"),
            pass1,
        ),
    ]


def goes_with(h_end, key, found, least=None, most=None):
    """The claim that the rank correlation of H and the metric, over all runs, is beyond a limit."""
    rank = spearman(flat(h_end), flat(found))
    if least is not None:
        text = f"H and {key} over all these runs: Spearman above {least}"
        return Claim(text, rank > least, {"Spearman": [rank]})
    text = f"H and {key} over all these runs: Spearman below {most}"
    return Claim(text, rank < most, {"Spearman": [rank]})


def goes_weakly_with(h_end, pass1):
    rank = spearman(flat(h_end), flat(pass1))
    return Claim("H and pass@1 only weakly: within 0.5 of 0", abs(rank) < 0.5, {"Spearman": [rank]})


def draw_what_goes_with_entropy(runs, png):
    h_end = each(runs, at_end)
    panels = {
        "response/ngram_diversity": at_end,
        PASS_AT_1: last,
        "eval/conf_wrong": last,
        "eval/conf_gap": last,
    }
    titles = [f"{key}, at the end" for key in panels]
    figure, axes = empty_panels(titles, "policy entropy (nats per token)")
    for axis, (key, number) in zip(axes, panels.items()):
        groups = {}
        for name, values in each(runs, number, key=key).items():
            groups[name] = (h_end[name], values)
        draw_points(axis, groups)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8)
    save(figure, png)


# ---- the list ------------------------------------------------------------------------------------


class Finding(NamedTuple):
    title: str
    settings: list  # of its runs
    papers: str  # what the papers found
    claims: Callable  # runs -> [Claim]
    draw: Callable = draw_curves  # (runs, png) -> None


FINDINGS = {
    1: Finding(
        "Entropy goes early",
        ["grpo-300", "grpo"],
        "first 1/12: 73 % of H, 76 % of gain; 1/3: 94, 93 %",
        entropy_goes_early,
    ),
    2: Finding(
        "The law",
        [
            "grpo",
            "grpo-no-std",
            "w_reinforce-1",
            "grpo-easy",
            "grpo-hard",
            "grpo-mini",
            "grpo-small",
        ],
        "forecast from 15 %: RMSE 0.009; a, b depend on the data, not on the algorithm",
        law,
        draw_law,
    ),
    3: Finding(
        "Group covariance",
        ["grpo-updates-1"],
        "positive, more if easy, like -dH",
        group_covariance,
        draw_group_covariance,
    ),
    4: Finding(
        "Covariance tail",
        ["grpo"],
        "top 0.0002 5.65, 0.002 3.11, 0.02 1.39, 0.2 0.35",
        covariance_tail,
        draw_covariance_tail,
    ),
    5: Finding(
        "Bonus, KL",
        [
            "grpo",
            "entropy_bonus-0.001",
            "entropy_bonus-0.01",
            "entropy_bonus-0.1",
            "kl_loss-0.1",
            "kl_loss-1",
        ],
        "0.001 does little, 0.01 explodes; reference KL steadies H, costs accuracy",
        bonus_and_kl,
    ),
    6: Finding(
        "Clip-Cov, KL-Cov",
        ["grpo", *CLIP_COV, *KL_COV],
        "KL-Cov's H 10 times GRPO's; averages 38.6, Clip-Cov 40.4, KL-Cov 40.6",
        clip_cov_and_kl_cov,
        draw_curves_pass_at_16,
    ),
    7: Finding(
        "Estimates of dH",
        [],
        "STEER: Pearson 0.4 (others: 0.26)",
        estimates_of_dh,
        None,
    ),
    8: Finding(
        "Quadrants",
        [
            "grpo",
            "quadrant-pos_likely",
            "quadrant-pos_rare",
            "quadrant-neg_likely",
            "quadrant-neg_rare",
        ],
        "as predicted",
        quadrants,
    ),
    9: Finding(
        "STEER",
        ["grpo-unclipped", "steer-unclipped", "steer-unclipped-0.1"],
        "holds H at these clips; GRPO 44.2, Clip-Cov 45.7, STEER 48.6",
        steer,
    ),
    10: Finding(
        "Updates per rollout batch",
        [*UPDATES, "entropy_bonus-0.1", "entropy_bonus-0.1-updates-1"],
        "more updates amplify either direction; training reward up, pass@64 down",
        updates_per_rollout,
        draw_curves_pass_at_64,
    ),
    11: Finding(
        "Fewer prompts than 4,000",
        ["grpo-prompts-16", "grpo-prompts-64", "grpo-prompts-256", "grpo"],
        "less diverse prompts, less H; a few hundred near the full set",
        fewer_prompts,
    ),
    12: Finding(
        "Clip thresholds",
        ["grpo-updates-8", "clip_higher", "grpo-unclipped", "grpo-wide", "grpo-tight"],
        "clip-higher 0.539, above clip-free; a larger lower bound the least",
        clip_thresholds,
    ),
    13: Finding(
        "The sign of A",
        ["grpo", "quadrant-positive", *PAR, "grpo-easy", "quadrant-positive-easy"],
        "A >= 0 only 0.015, A <= 0 only 0.884",
        sign_of_a,
    ),
    14: Finding(
        "What goes with entropy",
        [*UPDATES, *CLIP_COV, *KL_COV, "quadrant-positive", *PAR, "adaptive_entropy"],
        "Spearman 0.88; overconfident at low H; GRPO 44.12, PAR 45.66",
        what_goes_with_entropy,
        draw_what_goes_with_entropy,
    ),
}


# ---- the page ------------------------------------------------------------------------------------


def claims_of(number, runs):
    """The claims of a finding, from runs of at least its settings."""
    finding = FINDINGS[number]
    return finding.claims({name: runs[name] for name in finding.settings})


def table_rows(number, claims):
    """A finding's rows of the table: each claim, the papers' numbers, those found here, verdict."""
    finding = FINDINGS[number]
    rows = ""
    for claim in claims:
        text = f"ours: {claim.text}" if claim.ours else claim.text
        here = in_words(claim.found) or "as above"
        holds = "holds" if claim.holds else "**does not hold here**"
        if rows:
            cells = ["", text, "", here, holds, ""]
        else:
            name = f"{number}. {finding.title}"
            cells = [name, text, finding.papers, here, holds, f"`--only {number}`"]
        rows += f"| {' | '.join(cells)} |\n"
    return rows


def verdict(claims):
    """The papers' claims together: "holds (3 of 3)", "in part (1 of 3)" and so on."""
    papers = [claim for claim in claims if not claim.ours]
    held = sum(bool(claim.holds) for claim in papers)
    count = f"({held} of {len(papers)})"
    if held == len(papers):
        return f"holds {count}"
    return f"in part {count}" if held else f"does not hold here {count}"


def write_findings(claims):
    """The part of findings.md below its mark; claims: {number: claims} of some of the findings."""
    text = "## All claims\n\n"
    text += "| finding | claim | papers | here | verdict | `python -m experiments.findings` |\n"
    text += f"{6 * '|---'}|\n"
    for number, found in claims.items():
        text += table_rows(number, found)
    text += "\n## The runs\n\n"
    for name in SETTINGS:
        if any(name in FINDINGS[number].settings for number in claims):
            text += f"- `{name}`: `train.py {flags_of(name)}`\n"
    write_page(RESULTS / "findings.md", "`python -m experiments.findings`", text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", type=int, default=list(FINDINGS), choices=FINDINGS, metavar="N"
    )
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    args = parser.parse_args()

    wanted = [name for number in args.only for name in FINDINGS[number].settings]
    to_train = {name: flags_of(name) for name in SETTINGS if name in wanted}
    train_missing(to_train, SEEDS, args.workers)
    runs = read_available(SETTINGS, SEEDS)

    claims = {}
    for number, finding in FINDINGS.items():
        # A finding that is not asked for keeps its rows of the table if its runs are all there.
        complete = all(name in runs for name in finding.settings)
        if number == 7:
            complete = (RESULTS / "estimates.json").exists()
        if number in args.only or complete:
            claims[number] = claims_of(number, runs)
        if number in args.only:
            print(table_rows(number, claims[number]))
            print(f"{number}. {finding.title}: {verdict(claims[number])}\n")
            if finding.draw:
                own = {name: runs[name] for name in finding.settings}
                finding.draw(own, RESULTS / "findings" / f"{number}.png")
    write_findings(claims)


if __name__ == "__main__":
    main()
