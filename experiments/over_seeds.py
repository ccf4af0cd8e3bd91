"""Numbers and figures of runs over their seeds, for experiments/findings.py.

rows: the metrics of a run, one dict per step; runs: {name: [rows of each seed]}; found: {name: [a number per seed]}.
"""
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Callable, NamedTuple

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from entropy import fit_law, law_forecast, share_made
from record import line_styles, plot_curves, usual_panels

H, REWARD, RIGHT, NATS = "entropy/response_mean", "reward/mean", "eval/pass@1", "policy entropy (nats per token)"
TOP_SHARES = ("0.0002", "0.002", "0.02", "0.2")
LAW_PANELS = {"algorithms": ("grpo", "grpo-no-std", "w_reinforce-1"), "data": ("grpo", "grpo-easy", "grpo-hard"),
              "sizes": ("grpo-mini", "grpo", "grpo-small")}


# ---- numbers of a run ------------------------------------------------------------------------------------------------

def column(rows, key, smooth=1):
    """The metric of the rows that have it, as running means over `smooth` of them."""
    values = [row[key] for row in rows if key in row]
    if len(values) < smooth:
        raise ValueError(f"{len(values)} rows have the metric {key}, not {smooth}: is this the run the finding names?")
    return np.convolve(values, np.ones(smooth) / smooth, "valid")


def at(part, key=H):
    """A function of rows: the metric's mean over the rows that have it, over ten of them at the end, or its first or
    last value. The first H is the base's."""
    chosen = {"all": slice(None), "end": slice(-10, None), "first": slice(1), "last": slice(-1, None)}[part]
    return lambda rows: float(column(rows, key)[chosen].mean())


def after_updates(count, updates_per_rollout):
    """A function of rows: H after so many optimizer steps, the mean over five rollout batches around that. H of a step
    is of the policy before its updates."""
    step = count // updates_per_rollout + 1
    return lambda rows: float(np.mean([row[H] for row in rows if H in row and abs(row["step"] - step) <= 2]))


def kept(rows):
    """The share of its entropy that a run ends with."""
    return at("end")(rows) / at("first")(rows)


def gain(rows):
    """In pass@1, from the base to the end."""
    return at("last", RIGHT)(rows) - at("first", RIGHT)(rows)


def made_by(part, key):
    """A function of rows: entropy.share_made of the metric by that part of the steps."""
    return lambda rows: share_made(*zip(*((row["step"], row[key]) for row in rows if key in row)), part)


def eval_law(what):
    """A function of rows: a, b or r2 of the law through all evaluations, pass@1 against the entropy on the same test
    problems. Beside it "r2 of a line" in the entropy and "r2 of the step", a line in the step, which need no law."""
    def number(rows):
        entropy, right = column(rows, "eval/entropy"), column(rows, RIGHT)
        steps = [row["step"] for row in rows if RIGHT in row]
        square = lambda x: np.corrcoef(x, right)[0, 1]**2
        return {**fit_law(entropy, right), "r2 of a line": square(entropy), "r2 of the step": square(steps)}[what]
    return number


def forecast_error(rows, what="rmse_rest"):
    """RMSE of the training reward after the first 15 % of the steps, forecast by the law from these, or by their mean
    ("rmse_mean"). Of nine-step means, as the reward of 64 problems scatters by 0.03."""
    return law_forecast(column(rows, H), column(rows, REWARD), smooth=9)[what]


def positive_covariance(rows):
    """In which share of the steps the group covariance is positive."""
    return float(np.mean(column(rows, "policy/group_cov_mean") > 0))


def covariance_and_fall(smooth):
    """A function of rows: Pearson of group covariance and -dH, as running means, after the ten steps of the learning
    rate's warm-up (of runs with one update per rollout batch)."""
    def number(rows):
        both = [row for row in rows[11:] if {"policy/group_cov_mean", "entropy/change_measured"} <= set(row)]
        return float(np.corrcoef(column(both, "policy/group_cov_mean", smooth),
                                 -column(both, "entropy/change_measured", smooth))[0, 1])
    return number


def covariance_by_difficulty(part):
    """A function of rows: the group covariance of such prompts, over the steps that have hard, mid and easy ones."""
    keys = {name: f"policy/group_cov_{name}" for name in ("hard", "mid", "easy")}
    return lambda rows: float(np.mean([row[keys[part]] for row in rows if set(keys.values()) <= set(row)]))


# ---- numbers of the seeds of several runs ----------------------------------------------------------------------------

def each(runs, number, *names):
    """{name: [the number of each seed]} of these runs, or of all."""
    return {name: [number(rows) for rows in runs[name]] for name in names or runs}


def rising(found, *names):
    """Whether each of these is above the one before, every seed above every seed."""
    return all(above(found, more, less) for less, more in itertools.pairwise(names))


def above(found, more, *less):
    """Whether every seed of the one is above every seed of those, or of all others; by chance, with three seeds each
    and two names, 1 time in 20."""
    return min(found[more]) > max(max(found[name]) for name in less or found if name != more)


def below(found, less, *more):
    return max(found[less]) < min(min(found[name]) for name in more or found if name != less)


def apart(found, *names):
    """Whether one of these is above another."""
    return any(above(found, more, less) for more, less in itertools.permutations(names, 2))


def spearman(x, y):
    """Rank correlation of two lists of numbers; equal values share a rank."""
    def ranks(values):
        _, place, count = np.unique(values, return_inverse=True, return_counts=True)
        return (count.cumsum() - count / 2)[place]
    return float(np.corrcoef(ranks(x), ranks(y))[0, 1])


def covariance_tops(runs, name="grpo"):
    """Token covariance at step 1: {top share: [mean of the largest, per seed]}, and of all tokens."""
    tops = {f"top {share}": each(runs, lambda rows: rows[1][f"policy/cov_top_{share}"])[name] for share in TOP_SHARES}
    return tops | {"all": each(runs, lambda rows: rows[1]["policy/cov_mean"])[name]}


def microscope(file):
    """{policy: {step: {estimate: [correlations of each batch]}}} of experiments/microscope.py, which runs if they are
    not there: on the base and, where GRPO's first run was trained in this folder, on its last checkpoint."""
    if not file.exists():
        trained = [folder for folder in [Path("runs/findings/grpo-seed0/checkpoint-100")] if folder.exists()]
        subprocess.run([sys.executable, "-m", "experiments.microscope", *trained], check=True)
    return json.loads(file.read_text())


def flat(found):
    """The numbers of all names and seeds in one list."""
    return [number for seeds in found.values() for number in seeds]


def told(found):
    """The numbers in words: mean (range) of each."""
    return "; ".join(f"{name} {np.mean(v):.3f}" + (f" ({min(v):.3f} to {max(v):.3f})" if len(v) > 1 else "")
                     for name, v in found.items())


# ---- figures: functions of runs and of the file to write -------------------------------------------------------------

def curves(k=8):
    """Against the step: the usual panels, with pass@k for pass@8."""
    def draw(runs, png):
        panels = {key: title for key, title in usual_panels(runs).items() if key != "eval/pass@8"}
        plot_curves(runs, png, panels | {f"eval/pass@{k}": f"test pass@{k}"})
    return draw


def panels(titles, xlabel):
    size = (4.6 * len(titles), 3.8)
    figure, axes = plt.subplots(1, len(titles), figsize=size, constrained_layout=True, squeeze=False)
    for axis, title in zip(axes[0], titles):
        axis.set(title=title, xlabel=xlabel)
        axis.grid(alpha=0.3)
    return figure, axes[0]


def points(axis, groups, law=False):
    """groups: {name: (x, y)}; law: with the curve y = b - a exp(x), fitted to all points of the group."""
    for (name, (x, y)), (colour, style) in zip(groups.items(), line_styles(groups).values()):
        marker = {"-": "o", "--": "s", ":": "^", "-.": "x"}[style]
        axis.plot(x, y, marker, markersize=4, color=colour, alpha=0.6, label=name)
        if law:
            fit, line = fit_law(x, y), np.linspace(min(x), max(x))
            axis.plot(line, fit["b"] - fit["a"] * np.exp(line), style, color=colour)


def save(figure, png):
    figure.savefig(png, dpi=130)
    plt.close(figure)


def law_figure(runs, png):
    figure, axes = panels([f"test pass@1: {title}" for title in LAW_PANELS], "entropy on the test problems (nats)")
    for axis, names in zip(axes, LAW_PANELS.values()):
        points(axis, {name: np.hstack([(column(rows, "eval/entropy"), column(rows, RIGHT)) for rows in runs[name]])
                      for name in names}, law=True)
        axis.legend(fontsize=8)
    save(figure, png)


def covariance_figure(runs, png):
    """Nine-step means, over all seeds; on the right each curve in parts of its own mean, as only the shape is asked."""
    figure, axes = panels(["group covariance by group accuracy", "shapes: mean 1, after the warm-up"], "step")
    mean = lambda key: np.mean([column(rows[11:], key, 9) for rows in runs["grpo-updates-1"]], 0)
    covariance, fall = mean("policy/group_cov_mean"), -mean("entropy/change_measured")
    for part in ("hard", "mid", "easy"):
        found = [(row["step"], row[f"policy/group_cov_{part}"]) for rows in runs["grpo-updates-1"] for row in rows
                 if f"policy/group_cov_{part}" in row]
        axes[0].plot(*zip(*found), ".", markersize=3, alpha=0.5, label=part)
    for label, curve in {"group covariance": covariance, "-dH": fall}.items():
        axes[1].plot(range(15, 15 + len(curve)), curve / curve.mean(), label=label)
    for axis in axes:
        axis.legend(fontsize=8)
    save(figure, png)


def tail_figure(runs, png):
    figure, (axis,) = panels(["token covariance, step 1: mean of the top share"], "share of the tokens")
    shares, tops = [float(share) for share in TOP_SHARES], covariance_tops(runs)
    values = np.array([tops[f"top {share}"] for share in TOP_SHARES])  # a row per share, a column per seed
    points(axis, {"grpo": (np.repeat(shares, values.shape[1]), values.ravel())})
    axis.plot(shares, (5.65, 3.11, 1.39, 0.35), "x", color="tab:gray", label="Qwen2.5-7B, arXiv 2505.22617")
    axis.set(xscale="log", ylim=0)
    axis.legend(fontsize=8)
    save(figure, png)


def together_figure(runs, png):
    keys = {"response/ngram_diversity": "end", RIGHT: "last", "eval/conf_wrong": "last", "eval/conf_gap": "last"}
    figure, axes = panels([f"{key}, at the end" for key in keys], NATS)
    h_end = each(runs, at("end"))
    for axis, (key, part) in zip(axes, keys.items()):
        points(axis, {name: (h_end[name], values) for name, values in each(runs, at(part, key)).items()})
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    save(figure, png)


# ---- the table -------------------------------------------------------------------------------------------------------

class Finding(NamedTuple):
    title: str
    names: list       # of the runs
    paper: str        # the papers' numbers
    claims: Callable  # runs, h_end (H at the end), pass1 (the last pass@1) -> (claim, whether it holds, found) of each
    draw: Callable = curves()  # runs, png -> None


def table_rows(number, finding, runs):
    """The rows of a finding in the table: each claim with the papers' numbers, those found here, the verdict."""
    rows = ""
    for claim, holds, found in finding.claims(runs, each(runs, at("end")), each(runs, at("last", RIGHT))):
        verdict = "holds" if holds else "**does not hold here**"
        first = (f"{number}. {finding.title}", finding.paper, f"`--only {number}`") if not rows else ("", "", "")
        rows += f"| {first[0]} | {claim} | {first[1]} | {told(found) or 'as above'} | {verdict} | {first[2]} |\n"
    return rows


def verdict(rows):
    """From the rows of its claims, less ours: "holds (3 of 3)", "in part (1 of 3)", "does not hold here (0 of 3)"."""
    papers = [row for row in rows.splitlines() if "| ours: " not in row]
    held, claims = sum("| holds |" in row for row in papers), len(papers)
    return f"{'holds' if held == claims else 'in part' if held else 'does not hold here'} ({held} of {claims})"


def report(about, rows, findings, flags):
    """results/findings.md. rows: {number: table_rows} of some of the findings; flags: {name: those of its runs}."""
    short = "".join(f"- {text.split(' | ')[0][2:]}: {verdict(text)}\n" for text in rows.values())
    head = f"| finding | claim | papers | here | verdict | `python -m experiments.findings` |\n{6 * '|---'}|\n"
    names = [name for name in flags if any(name in findings[number].names for number in rows)]
    runs = "".join(f"- `{name}`: `train.py {' '.join(flags[name])}`\n" for name in names)
    return f"{about}\n\nClaims that hold:\n\n{short}\n{head}{''.join(rows.values())}\nThe runs:\n\n{runs}"
