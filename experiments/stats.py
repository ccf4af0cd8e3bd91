"""Numbers of runs over their seeds, for findings.py.

rows: the metrics of a run, one dict per step. runs: {name: [rows of each seed]}. found: {name: [a
number per seed]}. H is the policy entropy (entropy/response_mean), in nats per token.
"""

import itertools

import numpy as np

from diagnose import fit_law, law_forecast, share_made

H = "entropy/response_mean"
REWARD = "reward/mean"
PASS_AT_1 = "eval/pass@1"


# ---- numbers of a run: functions of its rows -----------------------------------------------------


def column(rows, key, smooth=1):
    """The metric in the rows that have it, as running means over `smooth` of them."""
    values = [row[key] for row in rows if key in row]
    if len(values) < smooth:
        raise ValueError(
            f"{len(values)} rows have the metric {key}, not {smooth}: is this the run that the "
            "finding names?"
        )
    return np.convolve(values, np.ones(smooth) / smooth, "valid")


def at_start(rows, key=H):
    """The first value of the metric; that of H is the base's."""
    return float(column(rows, key)[0])


def at_end(rows, key=H):
    """The mean of the last ten values of the metric."""
    return float(column(rows, key)[-10:].mean())


def last(rows, key=PASS_AT_1):
    """The last value of the metric."""
    return float(column(rows, key)[-1])


def kept(rows):
    """The share of its entropy that a run ends with."""
    return at_end(rows) / at_start(rows)


def gain(rows):
    """The rise of pass@1, from the base to the end."""
    return last(rows, PASS_AT_1) - at_start(rows, PASS_AT_1)


def after_updates(rows, count, updates_per_rollout):
    """H after so many optimizer steps: the mean over five rollout batches around that.

    H of a step is that of the policy before its updates.
    """
    step = count // updates_per_rollout + 1
    near = [row[H] for row in rows if H in row and abs(row["step"] - step) <= 2]
    return float(np.mean(near))


def made_by(rows, part, key):
    """Which share of the metric's change the first part of the steps made (diagnose.share_made)."""
    steps = [row["step"] for row in rows if key in row]
    values = [row[key] for row in rows if key in row]
    return share_made(steps, values, part)


def eval_law(rows, what):
    """A number of the law through all evaluations, pass@1 against entropy on the same problems.

    what: "a", "b" or "r2"; or what needs no law, "r2 of a line" in the entropy and "r2 of the
    step", of a line in the step.
    """
    entropy = column(rows, "eval/entropy")
    pass_at_1 = column(rows, PASS_AT_1)
    if what == "r2 of a line":
        return np.corrcoef(entropy, pass_at_1)[0, 1] ** 2
    if what == "r2 of the step":
        steps = [row["step"] for row in rows if PASS_AT_1 in row]
        return np.corrcoef(steps, pass_at_1)[0, 1] ** 2
    return fit_law(entropy, pass_at_1)[what]


def forecast_error(rows, what="rmse_rest"):
    """The RMSE of a forecast of the reward after the first 15 % of the steps.

    what: "rmse_rest", the law forecasts it from these steps; "rmse_mean", their mean reward does.
    Both are of nine-step means, as the reward of 64 problems scatters by 0.03.
    """
    return law_forecast(column(rows, H), column(rows, REWARD), smooth=9)[what]


def positive_covariance(rows):
    """In which share of the steps the group covariance is positive."""
    return float(np.mean(column(rows, "policy/group_cov_mean") > 0))


def covariance_and_fall(rows, smooth):
    """Pearson of the group covariance and -dH, as running means over `smooth` steps.

    The ten steps of the learning rate's warm-up are left out (of runs with one update per rollout
    batch).
    """
    both = []
    for row in rows[11:]:
        if "policy/group_cov_mean" in row and "entropy/change_measured" in row:
            both.append(row)
    covariance = column(both, "policy/group_cov_mean", smooth)
    fall = -column(both, "entropy/change_measured", smooth)
    return float(np.corrcoef(covariance, fall)[0, 1])


def covariance_by_difficulty(rows, part):
    """The group covariance of hard, mid or easy prompts, over the steps that have all three."""
    keys = {f"policy/group_cov_{name}" for name in ("hard", "mid", "easy")}
    complete = [row for row in rows if keys <= set(row)]
    return float(np.mean([row[f"policy/group_cov_{part}"] for row in complete]))


def at_step_1(rows, key):
    """The metric of the first step."""
    return rows[1][key]


# ---- numbers of the seeds of several runs --------------------------------------------------------


def each(runs, number, names=None, **arguments):
    """{name: [number(rows, **arguments) of each seed]} of these runs, or of all."""
    found = {}
    for name in names or runs:
        found[name] = [number(rows, **arguments) for rows in runs[name]]
    return found


def above(found, more, *less):
    """Whether every seed of `more` is above every seed of those, or else of all others.

    By chance, with three seeds each and two names, this happens 1 time in 20.
    """
    others = less or [name for name in found if name != more]
    return min(found[more]) > max(max(found[name]) for name in others)


def below(found, less, *more):
    """Whether every seed of `less` is below every seed of those, or else of all others."""
    others = more or [name for name in found if name != less]
    return max(found[less]) < min(min(found[name]) for name in others)


def rising(found, *names):
    """Whether each of these is above the one before, every seed above every seed."""
    return all(above(found, more, less) for less, more in itertools.pairwise(names))


def apart(found, *names):
    """Whether one of these is above another."""
    return any(above(found, more, less) for more, less in itertools.permutations(names, 2))


def flat(found):
    """The numbers of all names and seeds in one list."""
    return [number for seeds in found.values() for number in seeds]


def spearman(x, y):
    """Rank correlation of two lists of numbers; equal values share a rank."""
    return float(np.corrcoef(ranks(x), ranks(y))[0, 1])


def ranks(values):
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (count.cumsum() - count / 2)[place]


def in_words(found):
    """The mean of each name and, of several seeds, their range in brackets."""
    texts = []
    for name, seeds in found.items():
        text = f"{name} {np.mean(seeds):.3f}"
        if len(seeds) > 1:
            text += f" ({min(seeds):.3f} to {max(seeds):.3f})"
        texts.append(text)
    return "; ".join(texts)
