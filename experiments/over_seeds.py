"""Numbers and figures of runs over their seeds, for experiments/findings.py.

runs: {name: [rows of metrics of each seed]}; found: {name: [one number per seed]}.
"""
import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from entropy import fit_law, law_points
from record import line_styles, plot_curves

H, REWARD, RIGHT = "entropy/response_mean", "reward/mean", "eval/pass@1"
NATS, TOP_SHARES = "policy entropy (nats per token)", ("0.0002", "0.002", "0.02", "0.2")
LAW_PANELS = (("grpo", "grpo-no-std", "w_reinforce-1"), ("grpo", "grpo-easy", "grpo-hard"),
              ("grpo-mini", "grpo", "grpo-small"))


# ---- numbers ---------------------------------------------------------------------------------------------------------

def column(rows, key, smooth=1):
    """The metric in the rows that have it, as running means over `smooth` of them."""
    return np.convolve([row[key] for row in rows if key in row], np.ones(smooth) / smooth, "valid")


def at(part, key=H):
    """A function of a run's rows: the metric's mean over its first or last ten ("start", "end"), or its first or last
    value ("base", "last")."""
    chosen = {"start": slice(10), "end": slice(-10, None), "base": slice(1), "last": slice(-1, None)}[part]
    return lambda rows: float(column(rows, key)[chosen].mean())


def kept(rows):
    """The share of its entropy that a run ends with."""
    return at("end")(rows) / at("start")(rows)


def each(runs, number):
    return {name: [number(rows) for rows in seeds] for name, seeds in runs.items()}


def rising(found, *names):
    """Whether the means over seeds rise in the order of the names."""
    return bool(np.all(np.diff([np.mean(found[name]) for name in names]) > 0))


def above(found, more, less):
    """Whether every seed of the one is above every seed of the other."""
    return min(found[more]) > max(found[less])


def spearman(x, y):
    return np.corrcoef(*(np.argsort(np.argsort(values)) for values in (x, y)))[0, 1]


def told(found):
    return "; ".join(f"{name} {np.mean(v):.3f}" + (f" ({min(v):.3f} to {max(v):.3f})" if len(v) > 1 else "")
                     for name, v in found.items())


# ---- figures: functions of runs and of the file to write -------------------------------------------------------------

def curves(*keys):
    """Against the step, for any metrics."""
    return lambda runs, png: plot_curves(runs, png, {key: NATS if key == H else key for key in keys})


def panels(titles, xlabel=NATS):
    figure, axes = plt.subplots(1, len(titles), figsize=(4.6 * len(titles), 3.8), constrained_layout=True)
    for axis, title in zip(np.atleast_1d(axes), titles):
        axis.set(title=title, xlabel=xlabel)
        axis.grid(alpha=0.3)
    return figure, np.atleast_1d(axes)


def points(axis, groups, law=False):
    """groups: {name: (x, y)}; law: with the fitted curve y = b - a exp(x)."""
    for (name, (x, y)), (colour, style) in zip(groups.items(), line_styles(groups).values()):
        marker = {"-": "o", "--": "s", ":": "^", "-.": "x"}[style]
        axis.plot(x, y, marker, markersize=4, color=colour, alpha=0.6, label=name)
        if law:
            fit, line = fit_law(x, y), np.linspace(min(x), max(x))
            axis.plot(line, fit["b"] - fit["a"] * np.exp(line), style, color=colour)
    axis.legend(fontsize=8)


def save(figure, png):
    figure.savefig(png, dpi=130)
    plt.close(figure)


def law_figure(runs, png):
    """The curve is the law, fitted to all seeds together."""
    figure, axes = panels(["pass@1: algorithms", "training reward: data", "pass@1: sizes"])
    for axis, names, key in zip(axes, LAW_PANELS, (RIGHT, REWARD, RIGHT)):
        points(axis, {name: np.hstack([law_points(rows, key) for rows in runs[name]]) for name in names}, law=True)
    save(figure, png)


def tail_figure(runs, png):
    """Top shares of the token covariance at the first step, one marker per seed."""
    figure, (axis,) = panels(["token covariance, step 1: mean of the top share"], "share of the tokens")
    top = {name: [rows[1][f"policy/cov_top_{share}"] for rows in seeds for share in TOP_SHARES]
           for name, seeds in runs.items()}
    points(axis, {name: ([float(share) for share in TOP_SHARES] * len(runs[name]), y) for name, y in top.items()})
    axis.set_xscale("log")
    save(figure, png)


def together_figure(runs, png):
    """The ends of all runs, and the course of GRPO's confidence."""
    figure, axes = panels(["n-gram diversity, end of each run", "pass@1, end of each run"])
    for axis, where in zip(axes, (("end", "response/ngram_diversity"), ("last", RIGHT))):
        points(axis, {name: (each(runs, at("end"))[name], each(runs, at(*where))[name]) for name in runs})
    save(figure, png)
