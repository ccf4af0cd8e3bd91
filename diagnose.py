"""What the metrics of runs say: python diagnose.py runs/NAME [runs/OTHER ...]

It prints in sentences where the entropy of each run went: how much of it and when, which
tokens took it, which methods act on these tokens, whether truncated answers, groups of equal
rewards or a mismatch of engine and trainer may explain it, and what the law R = -a exp(H) + b
foretells. It compares several runs, and draws diagnosis.png beside the metrics of the first.
If a metric is missing, it says so. It never trains.

python diagnose.py --legend explains every metric that train.py logs.

Nothing here imports torch, so that the first sentence comes within two seconds. For the same
reason the law is here and not in entropy.py: it is fitted to metrics.
"""

import argparse
import gzip
import json
import math
import re
import sys
import textwrap
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

# ---- reading metrics -----------------------------------------------------------------------------

# Metrics of earlier runs have these old names.
RENAMED = {
    "rollout/gap_mean": "rollout/mismatch_mean",
    "rollout/gap_max": "rollout/mismatch_max",
}


def read_metrics(run):
    """The metrics of one run: a list of rows, each a dict {metric: number} with a "step".

    run: the run's folder, a metrics file (read_runs), or FILE:NAME, one run of a file that
    holds several.
    Raises OSError if there is no such file, ValueError if it is not a metrics file or which
    run is unclear.
    """
    file, name = split_name(run)
    runs = read_runs(file)
    if name and name not in runs:
        raise ValueError(f"{file}: holds no run {name}. It holds {', '.join(runs)}")
    if name:
        return runs[name]
    if len(runs) > 1:
        raise ValueError(
            f"{file}: holds several runs. Name one, as in {file}:NAME, of {', '.join(runs)}"
        )
    return next(iter(runs.values()), [])


def read_runs(path):
    """The metrics of all runs in a file: {name: rows}.

    path: a metrics file, which has a JSON object per line and may be compressed (.jsonl.gz),
    or a folder with a metrics.jsonl. A row belongs to the run that its "run" names; without
    one to the run of the file. An unfinished last line, of a run that was killed or still
    goes on, is left out. Old names of metrics are replaced (RENAMED).
    """
    runs = {}
    for line in read_text(path).splitlines(keepends=True):
        if not line.endswith("\n"):
            continue
        row = parse_row(path, line)
        name = row.pop("run", name_of(path))
        row = {RENAMED.get(key, key): value for key, value in row.items()}
        runs.setdefault(name, []).append(row)
    return runs


def split_name(run):
    """(path, name) of FILE:NAME, one run of a file that holds several; else (path, "")."""
    file, colon, name = str(run).rpartition(":")
    if not colon or Path(run).exists():
        return Path(run), ""
    return Path(file), name


def name_of(path):
    """The name of the run whose folder or metrics file this is."""
    path = Path(path)
    if path.is_dir():
        return path.resolve().name
    if path.name == "metrics.jsonl":
        return path.parent.resolve().name
    return Path(path.name.removesuffix(".gz")).stem


def read_text(path):
    """The text of a metrics file, compressed or not, or of a folder's metrics.jsonl."""
    file = Path(path)
    if file.is_dir():
        file = file / "metrics.jsonl"
    if file.suffix != ".gz":
        return file.read_text()
    try:
        return gzip.decompress(file.read_bytes()).decode()
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise ValueError(f"{path}: not a gzip file, or not all of one") from None


def parse_row(path, line):
    """The row in a line of the metrics file; ValueError if the line is not one."""
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not is_row(row):
        raise ValueError(
            f"{path}: not a metrics file, which has a JSON object per line, "
            "with a step and only numbers"
        )
    return row


def is_row(row):
    """Whether it is a dict with a step and, but for the name of its run, only numbers."""
    if not isinstance(row, dict) or "step" not in row:
        return False
    return all(type(value) in (int, float) for key, value in row.items() if key != "run")


# ---- the legend of all metrics -------------------------------------------------------------------

# Which way a quadrant moves the entropy: sign dH = -sign(A) sign(log p + H), STEER, arXiv
# 2510.10150, theorem 1.
QUADRANT_TOKENS = {
    "pos_likely": "likely tokens of right answers (A > 0, p > e^-H)",
    "pos_rare": "rare tokens of right answers (A > 0, p < e^-H)",
    "neg_likely": "likely tokens of wrong answers (A < 0, p > e^-H)",
    "neg_rare": "rare tokens of wrong answers (A < 0, p < e^-H)",
}
QUADRANTS = tuple(QUADRANT_TOKENS)

# {metric: (unit, meaning)}. Means are over the whole step and all ranks. A word of
# PLACEHOLDERS in a metric's name stands for a number or a name.
METRICS = {
    "step": ("count", "The rollout batches done so far; step 0 is the base, before training."),
    "reward/mean": (
        "reward",
        "The mean reward of the answers; with --dynamic_sampling, of those in the groups that "
        "were kept.",
    ),
    "reward/zero_std_frac": (
        "fraction",
        "The share of the answers that are in groups whose rewards are all equal, which teach "
        "GRPO nothing; with --dynamic_sampling, of those in the groups that were kept.",
    ),
    "entropy/response_mean": (
        "nats per token",
        "The exact policy entropy, as the papers report it: the mean over each response, then "
        "over responses.",
    ),
    "entropy/token_mean": ("nats per token", "The exact policy entropy: the mean over all tokens."),
    "entropy/change_measured": (
        "nats per token",
        "The entropy after the step's updates minus that before: the mean over the tokens of "
        "each group's first answer, by a further forward on these, so of contexts of the batch "
        "that was learned from, not of new ones.",
    ),
    "entropy/change_predicted": (
        "nats per token, up to the step size",
        "The mean over all tokens of the exact first-order change by one policy-gradient step: "
        "its sign and course compare with the measured one, its size does not. Where "
        "entropy.log_entropy wrote it, for another trainer: by theorem 1 of STEER, in which the "
        "sampled token's logit moves alone.",
    ),
    "entropy/peak_mean": ("nats", "The mean nucleus entropy of the peak tokens of siren."),
    "policy/log_prob_mean": ("nats per token", "The mean log-prob of the sampled tokens."),
    "policy/cov_mean": (
        "nats",
        "The mean over the tokens of their covariance (log p - mean)(A - mean), per rank, then "
        "averaged.",
    ),
    "policy/cov_top_F": (
        "nats",
        "The mean over the share F of the tokens whose covariance (log p - mean)(A - mean) is "
        "largest, per rank, then averaged.",
    ),
    "policy/group_cov_mean": (
        "nats",
        "The covariance, over the answers to a prompt, of mean log-prob per token and "
        "advantage: the mean over prompts.",
    ),
    "policy/group_cov_hard": (
        "nats",
        "The same as policy/group_cov_mean, over prompts of group accuracy in (0, 1/3]; left "
        "out at steps without such a prompt.",
    ),
    "policy/group_cov_mid": (
        "nats",
        "The same as policy/group_cov_mean, over prompts of group accuracy in (1/3, 2/3); left "
        "out at steps without such a prompt.",
    ),
    "policy/group_cov_easy": (
        "nats",
        "The same as policy/group_cov_mean, over prompts of group accuracy in [2/3, 1); left "
        "out at steps without such a prompt.",
    ),
    "policy/clip_frac": (
        "fraction",
        "The share of the tokens whose gradient the ratio clip removed; with ce_gppo and "
        "cispo, of those whose ratio was bounded. A token of advantage 0 has none to remove.",
    ),
    "policy/selected_frac": ("fraction", "The share of the tokens that the method chose."),
    "policy/weight_mean": ("weight", "The mean weight that the method gives to a token."),
    "policy/kl_to_rollout": (
        "nats per token",
        "KL(pi_old || pi) by the k3 estimate, pi_old being the policy that sampled: the mean "
        "over the updates and, in each, over the tokens that it learns from. These leave out "
        "answers of advantage 0 where the method takes nothing from them.",
    ),
    "policy/kl_to_ref": (
        "nats per token",
        "KL(pi || reference) by the k3 estimate: the mean over the updates.",
    ),
    "quadrant/Q_frac": (
        "fraction",
        "The share of the tokens that are in quadrant Q, which is the sign of A and whether "
        "the token is likely or rare (p against e^-H).",
    ),
    "quadrant/Q_dH_share": (
        "fraction, with a sign",
        "The part of the predicted first-order entropy change that the tokens of quadrant Q make "
        "(pos or neg: the sign of A; likely or rare: p against e^-H), over the sum of |dH|. Below "
        "0 they take entropy, above 0 they add some; the four do not add up to 1. Where "
        "entropy.log_entropy wrote it: by theorem 1 of STEER.",
    ),
    "rollout/mismatch_mean": (
        "nats per token",
        "The mean of |old_log_probs - rollout_log_probs|, trainer against engine: stale "
        "weights or a wrong temperature show here.",
    ),
    "rollout/mismatch_max": ("nats", "The largest |old_log_probs - rollout_log_probs| of a token."),
    "response/len_mean": ("tokens", "The mean length of the answers, EOS included."),
    "response/truncated_frac": (
        "fraction",
        "The share of the answers that were cut at --max_response_len.",
    ),
    "response/ngram_diversity": (
        "fraction",
        "The distinct n-grams of token ids, as a share of all n-grams among the answers to a "
        "prompt: the mean over n = 1 to 4 and over prompts.",
    ),
    "verify/right": ("count", "The sampled answers that the verifier found right."),
    "verify/wrong": ("count", "The sampled answers that the verifier found wrong."),
    "verify/no_answer": ("count", "The sampled responses in which the verifier found no answer."),
    "verify/timeout": (
        "count",
        "The sampled answers that ran out of the verifier's time; they count as wrong.",
    ),
    "eval/pass@K": (
        "fraction",
        "The unbiased pass@K on the test problems, with the same seeds at every evaluation; "
        "pass@1 is avg@n.",
    ),
    "eval/len_mean": ("tokens", "The mean length of the test answers, EOS included."),
    "eval/truncated_frac": (
        "fraction",
        "The share of the test answers that were cut at --max_response_len.",
    ),
    "eval/entropy": (
        "nats per token",
        "The mean over the test answers of -log p per sampled token, at --eval_temperature: a "
        "Monte-Carlo estimate, unbiased for the expectation of just that. "
        "entropy/response_mean, of exact entropies, has another expectation where the length "
        "depends on the tokens drawn.",
    ),
    "eval/conf_right": (
        "probability",
        "The mean confidence of the right test answers (the geometric mean of an answer's "
        "token probabilities); left out where no answer is right.",
    ),
    "eval/conf_wrong": (
        "probability",
        "The mean confidence of the wrong test answers; left out where no answer is wrong.",
    ),
    "eval/conf_gap": (
        "probability",
        "The difference eval/conf_right - eval/conf_wrong; left out where one of them is.",
    ),
    "eval/auroc": (
        "probability",
        "The probability that a right answer is more confident than a wrong one, where a tie "
        "counts half; left out where all answers are right, or all wrong.",
    ),
    "eval/ece": (
        "probability",
        "The calibration error of the confidence, over 10 bins of equal width.",
    ),
    "eval/problems": ("count", "The distinct test problems."),
    "eval/timeout": (
        "count",
        "The test answers that ran out of the verifier's time; they count as wrong.",
    ),
    "eval/SET/METRIC": (
        "that of eval/METRIC",
        "With several test sets: eval/METRIC of the set SET alone; eval/METRIC is then the mean "
        "over the sets, or of counts the sum, and is left out where a set lacks it.",
    ),
    "train/loss": ("loss", "The mean loss over the updates."),
    "train/grad_norm": (
        "norm",
        "The norm of the gradient before clipping: the mean over the updates.",
    ),
    "train/lr": ("learning rate", "The learning rate of the step's last update."),
    "train/skipped": (
        "count",
        "The updates that were not taken, as loss or gradient were not finite.",
    ),
    "controller/NAME": ("the method's own", "What the method's controller has set, or remembers."),
    "time/rollout_s": ("seconds", "The time of sampling and verifying, and of what lies between."),
    "time/sample_s": ("seconds", "The engine's part of time/rollout_s, on rank 0."),
    "time/verify_s": ("seconds", "The verifier's part of time/rollout_s, on rank 0."),
    "time/score_s": ("seconds", "The time of the old log-probs, and of the reference's."),
    "time/update_s": ("seconds", "The time of the updates, and of the entropy after them."),
    "time/push_s": ("seconds", "The time of pushing the weights to the engine."),
    "time/step_s": (
        "seconds",
        "The time of the step: the sum of the rollout's, score's, update's and push's.",
    ),
    "time/STAGE_tokens_per_s": (
        "tokens per second",
        "The response tokens of the step, of all ranks, by the seconds of the stage STAGE.",
    ),
    "time/padding_frac": (
        "fraction",
        "The share of padding in the updates' micro-batches, whose rows are padded to the longest; "
        "counted as if no prompt were packed with several answers.",
    ),
    "time/left_out_frac": (
        "fraction",
        "The share of the answers that no update runs: they have advantage 0, and the method takes "
        "nothing from these. They still count in the loss's denominator.",
    ),
    "time/imbalance": (
        "ratio",
        "The padded tokens of the rank that has most, summed over the updates' micro-batches, by "
        "the mean over ranks: what an update takes longer than if all ranks had as many in each. 1 "
        "with one rank.",
    ),
    "memory/STAGE_gib": (
        "GiB",
        "The most that the trainer's tensors took at once during the stage STAGE, on the rank "
        "with most; on GPUs only.",
    ),
    "memory/reserved_gib": (
        "GiB",
        "What PyTorch held of the GPU at the end of the step, its tensors and its cache, on the "
        "rank with most; on GPUs only.",
    ),
}
PLACEHOLDERS = {
    "F": r"[\d.e-]+",
    "K": r"\d+",
    "Q": "|".join(QUADRANTS),
    "SET": "[^/]+",
    "STAGE": "rollout|score|update|push",
    "METRIC": "[^/]+",
    "NAME": "[^/]+",
}


def explain(key):
    """The entry of METRICS that a logged metric has, its unit and its meaning.

    Raises ValueError if there is none.
    """
    key = RENAMED.get(key, key)
    for entry, (unit, meaning) in METRICS.items():
        if key == entry or re.fullmatch(as_pattern(entry), key):
            return entry, unit, meaning
    raise ValueError(f"{key}: no metric of train.py; python diagnose.py --legend lists them all")


def as_pattern(entry):
    """A regular expression for the metrics that an entry of METRICS stands for."""
    words = re.split("([/@_])", entry)
    parts = []
    for word in words:
        if word in PLACEHOLDERS:
            parts.append(f"({PLACEHOLDERS[word]})")
        else:
            parts.append(re.escape(word))
    return "".join(parts)


# ---- limits --------------------------------------------------------------------------------------


class Limit(NamedTuple):
    """train.py warns once when the metric is above the limit: silence would be an error."""

    metric: str
    above: float
    cause: str
    advice: str


SUSPICIOUS = (
    Limit(
        "response/truncated_frac",
        0.9,
        "over 90 % of the answers are truncated",
        "raise --max_response_len",
    ),
    Limit(
        "reward/zero_std_frac",
        0.9,
        "over 90 % of the groups have equal rewards",
        "other --data, or --dynamic_sampling",
    ),
    Limit(
        "rollout/mismatch_mean",
        0.05,
        "engine and trainer differ by 0.05 nats per token",
        "--tis_cap 2; with bfloat16 --parallel fsdp differs less than ddp",
    ),
    Limit(
        "train/skipped",
        0,
        "updates were skipped: loss or gradient not finite",
        "lower --lr, or fewer --updates_per_rollout",
    ),
    Limit(
        "verify/timeout",
        0,
        "answers that ran out of the verifier's time count as wrong",
        "raise verify.TIME_LIMIT",
    ),
    Limit(
        "eval/truncated_frac",
        0.9,
        "over 90 % of the test answers are truncated",
        "raise --max_response_len",
    ),
    Limit(
        "eval/timeout",
        0,
        "test answers that ran out of the verifier's time count as wrong",
        "raise verify.TIME_LIMIT",
    ),
)


def limit_of(key):
    """The Limit of a metric."""
    for limit in SUSPICIOUS:
        if limit.metric == key:
            return limit
    raise KeyError(key)


# ---- the law -------------------------------------------------------------------------------------


def fit_law(entropy, reward):
    """Fits R = -a exp(H) + b by least squares; Cui et al. 2025, arXiv 2505.22617, abstract.

    entropy (n,) in nats and reward (n,) are of the same policies.
    Returns {"a", "b", "ceiling", "r2", "rmse"}: the ceiling b - a is the reward at H = 0, r2
    the share of the reward's variance that the fit explains, rmse is in units of R.
    Raises ValueError if there are fewer than 3 points, or if all entropies or all rewards are
    equal.
    """
    entropy = np.asarray(entropy, float)
    reward = np.asarray(reward, float)
    n = len(entropy)
    if n < 3:
        raise ValueError(f"the law has two coefficients and needs at least 3 points, not {n}")
    if np.ptp(entropy) == 0 or np.ptp(reward) == 0:
        raise ValueError(
            f"the law has nothing to fit: all {n} entropies, or all rewards, are equal"
        )
    terms = np.stack([-np.exp(entropy), np.ones_like(entropy)], axis=1)
    a, b = np.linalg.lstsq(terms, reward, rcond=None)[0]
    error = reward - terms @ (a, b)
    return {
        "a": a,
        "b": b,
        "ceiling": b - a,
        "r2": 1 - error.var() / reward.var(),
        "rmse": math.sqrt((error**2).mean()),
    }


def law_forecast(entropy, reward, first=0.15, smooth=1):
    """The law, fitted on the first 15 % of the points (rounded up) and tried on the rest.

    Arguments as fit_law's, in the order of training. smooth: fits running means over so many
    points, none of which spans both parts.
    Returns fit_law's results and, in units of R:
        points      how many points were fitted
        rmse_rest   RMSE of the prediction on the rest
        error_last  reward minus prediction at the last point
        rmse_mean   to compare: RMSE on the rest of the mean reward of the first points
    ArXiv 2505.22617 reports errors of 0.9 % and 0.5 % (math).
    """
    points = math.ceil(first * len(entropy))
    h = running_means(entropy[:points], smooth)
    r = running_means(reward[:points], smooth)
    h_rest = running_means(entropy[points:], smooth)
    r_rest = running_means(reward[points:], smooth)
    law = fit_law(h, r)
    error = r_rest - (law["b"] - law["a"] * np.exp(h_rest))
    return law | {
        "points": points,
        "rmse_rest": math.sqrt((error**2).mean()),
        "error_last": error[-1],
        "rmse_mean": math.sqrt(((r_rest - r.mean()) ** 2).mean()),
    }


def running_means(values, count):
    """Means of each `count` neighbouring values."""
    return np.convolve(values, np.ones(count) / count, "valid")


def law_points(rows, reward):
    """Entropies and rewards, two lists, of the same policies, for fit_law.

    reward="reward/mean": of every training step, with that step's entropy/response_mean, as
    both are of the step's rollout batch.
    reward="eval/pass@1": an evaluation follows its step's updates, so it goes with the
    entropy of the next step. The evaluation after the last step has none and is left out.
    """
    later = 0 if reward == "reward/mean" else 1
    entropy_at = {}
    for row in rows:
        if "entropy/response_mean" in row:
            entropy_at[row["step"]] = row["entropy/response_mean"]
    entropies = []
    rewards = []
    for row in rows:
        step = row["step"] + later
        if reward in row and step in entropy_at:
            entropies.append(entropy_at[step])
            rewards.append(row[reward])
    return entropies, rewards


# ---- the diagnosis in sentences ------------------------------------------------------------------

# Where the methods of losses.py act; their docstrings name the papers. Clip-Cov and KL-Cov
# choose a large (log p - mean)(A - mean), arXiv 2505.22617, eq. 10: both factors are
# positive, or both negative. An upper clip bound only touches A > 0, a lower one A < 0, and they
# bind on rare tokens first: a likely one has no room to grow, and dlog p of a logit is 1 - p.
# A new method need not stand here: then it is not named.
ACTS = {
    "pos_likely": (
        "clip_cov",
        "kl_cov",
        "steer",
        "par",
        "w_reinforce",
        "rand_pos_clip",
        "entropic",
        "dcpo",
        "aepo",
        "quadrant",
    ),
    "pos_rare": (
        "clip_higher",
        "flex_clip",
        "ce_gppo",
        "cispo",
        "steer",
        "par",
        "w_reinforce",
        "rand_pos_clip",
        "dcpo",
        "aepo",
        "quadrant",
    ),
    "neg_likely": (
        "entropic",
        "steer",
        "w_reinforce",
        "quadrant",
    ),
    "neg_rare": (
        "clip_cov",
        "kl_cov",
        "steer",
        "clip_b",
        "clip_v",
        "flex_clip",
        "ce_gppo",
        "cispo",
        "w_reinforce",
        "quadrant",
    ),
}
ACT_EVERYWHERE = (
    "entropy_bonus",
    "adaptive_entropy",
    "aer",
    "siren",
    "entropy_advantage",
    "fork_tokens",
    "gspo",
    "kl_loss",
)
SIDE_EFFECTS = {
    "response/truncated_frac": "of the answers are truncated",
    "rollout/mismatch_mean": "nats per token",
    "reward/zero_std_frac": "of the answers are in groups of equal rewards",
}
LAW_REWARDS = ("reward/mean", "eval/pass@1")
FELL, HELD, ROSE = -1, 0, 1


def diagnose(rows, name):
    """What a run's metrics (read_metrics) say about where its entropy went: a list of sentences.

    Entropies are entropy/response_mean in nats per token. A quadrant's share is the mean over
    steps of quadrant/Q_dH_share, its signed part of the step's sum of |dH|: the first order
    of a plain policy-gradient step on logits that move freely, before the method changes it.
    It is a prediction, not a measurement. What needs a metric that no row has is left out,
    and the last sentence names the metric. Single values that are not finite are left out
    too.
    """
    broken = not_finite(rows)
    rows = only_finite(rows)
    steps = [row for row in rows if row["step"] > 0]
    present = metrics_in(steps) | {key for key in metrics_in(rows) if key.startswith("eval/")}
    missing = [key for key in wanted_metrics() if key not in present]
    has_entropy = "entropy/response_mean" not in missing
    has_quadrants = not any(key.startswith("quadrant/") for key in missing)

    direction = HELD
    course = f"{len(steps)} steps."
    if has_entropy:
        course, direction = entropy_course(steps)
    sentences = [f"{name}: {course}"]
    if has_quadrants:
        shares = quadrant_means(steps, "dH_share")
        fractions = quadrant_means(steps, "frac")
        leading = leading_quadrant(shares, direction)
        sentences.append(quadrant_sentence(shares, fractions, leading, direction))
        sentences.append(methods_sentence(leading))
    if "policy/selected_frac" in present:
        selected = percent(mean_of(steps, "policy/selected_frac"), 1)
        sentences.append(f"The method itself chose {selected} of the tokens.")
    for key in SIDE_EFFECTS:
        if key not in missing:
            sentences.append(side_effect_sentence(steps, key))
    for key in LAW_REWARDS:
        if has_entropy and key not in missing:
            sentences.append(law_sentence(rows, key))
    if broken:
        names = ", ".join(broken)
        sentences.append(f"Not finite in some steps, which were left out: {names}.")
    if missing:
        names = ", ".join(missing)
        sentences.append(f"Not in these metrics, so nothing is said of it: {names}.")
    return sentences


def wanted_metrics():
    """The metrics that a complete diagnosis reads, in the order in which missing ones are named."""
    wanted = ["entropy/response_mean", *LAW_REWARDS, *SIDE_EFFECTS]
    for quadrant in QUADRANTS:
        wanted.append(f"quadrant/{quadrant}_frac")
        wanted.append(f"quadrant/{quadrant}_dH_share")
    return wanted


def metrics_in(rows):
    """The names of all metrics that some row has."""
    return {key for row in rows for key in row}


def not_finite(rows):
    """The names of the metrics that are not finite in some row, sorted."""
    names = {key for row in rows for key, value in row.items() if not math.isfinite(value)}
    return sorted(names)


def only_finite(rows):
    """The rows without the values that are not finite."""
    kept = []
    for row in rows:
        kept.append({key: value for key, value in row.items() if math.isfinite(value)})
    return kept


def values_of(rows, key):
    """The values of a metric in the rows that have it."""
    return [row[key] for row in rows if key in row]


def mean_of(rows, key):
    """The mean of a metric over the rows that have it."""
    return float(np.mean(values_of(rows, key)))


def last_tenth(values):
    """The last tenth of a list, rounded up."""
    return values[-math.ceil(len(values) / 10) :]


def percent(share, digits=0):
    """A share in words: 0.25 is "25 %"."""
    return f"{100 * share:.{digits}f} %"


def entropy_course(steps):
    """A sentence on the course of the entropy, and its direction.

    FELL, ROSE, or HELD: changed by at most 5 %. The change is from the first step to the mean
    of the last tenth of the steps, as one step's entropy is noisy.
    """
    steps = [row for row in steps if "entropy/response_mean" in row]
    entropy = values_of(steps, "entropy/response_mean")
    n = len(entropy)
    start = entropy[0]
    end = float(np.mean(last_tenth(entropy)))
    change = end - start
    if abs(change) <= 0.05 * start:
        text = (
            f"{n} steps; entropy held: {start:.3f} nats per token at first, {end:.3f} at the end."
        )
        return text, HELD
    direction = FELL if change < 0 else ROSE
    verb = "fell" if direction == FELL else "rose"
    text = (
        f"{n} steps; entropy {verb} from {start:.3f} to {end:.3f} nats per token, "
        f"by {percent(abs(change) / start)}."
    )
    if n > 12:
        at = values_of(steps, "step")
        early = percent(share_made(at, entropy, 1 / 12))
        third = percent(share_made(at, entropy, 1 / 3))
        text += f" The first twelfth of the steps made {early} of that, the first third {third}"
        if direction == FELL:
            text += " (73 % and 94 % over 11 models in arXiv 2505.22617)"
        text += "."
    return text, direction


def share_made(steps, values, part):
    """How much of a metric's change the first `part` of the steps makes.

    The change is from the first value to the mean of the last tenth; between the steps that
    have a value, the metric is taken from the line through them.

    steps (n,): rising, those of the values (n,). An entropy is of the policy before the
    updates of its step, so both series, entropies from step 1 and evaluations from step 0,
    begin with the base and count from there.
    """
    end = np.mean(last_tenth(values))
    length = steps[-1] - max(steps[0] - 1, 0)
    at_part = np.interp(part * length, np.subtract(steps, steps[0]), values)
    return float((at_part - values[0]) / (end - values[0]))


def quadrant_means(steps, what):
    """{quadrant: mean over the steps} of quadrant/Q_frac or quadrant/Q_dH_share.

    what: "frac" or "dH_share".
    """
    means = {}
    for quadrant in QUADRANTS:
        means[quadrant] = mean_of(steps, f"quadrant/{quadrant}_{what}")
    return means


def leading_quadrant(shares, direction):
    """The quadrant that added the most entropy, if it rose, else the one that took the most."""
    if direction == ROSE:
        return max(shares, key=shares.get)
    return min(shares, key=shares.get)


def quadrant_sentence(shares, fractions, leading, direction):
    """Which quadrant took the entropy, or raised it, and with how many tokens."""
    verb = "raised" if direction == ROSE else "took"
    others = []
    for quadrant in QUADRANTS:
        if quadrant != leading:
            tokens = percent(fractions[quadrant], 1)
            others.append(f"{quadrant} {shares[quadrant]:+.2f} by {tokens}")
    net = sum(shares.values())
    return (
        f"Predicted: {leading}, the {QUADRANT_TOKENS[leading]}, {verb} the most: "
        f"{shares[leading]:+.2f} of the sum of |dH| a step, "
        f"by {percent(fractions[leading], 1)} of the tokens. "
        f"The others: {', '.join(others)}. "
        f"Net {net:+.2f}{agreement(net, direction)}."
    )


def agreement(net, direction):
    """Whether the predicted net change has the direction measured: the end of that sentence."""
    if direction == HELD:
        return ""
    if net * direction > 0:
        return ", the direction measured"
    return ", against the direction measured: the first order does not explain this run"


def methods_sentence(leading):
    """Which methods act on the tokens of a quadrant."""
    there = ", ".join(ACTS[leading])
    everywhere = ", ".join(ACT_EVERYWHERE)
    return f"Methods that act on {leading}: {there}; on all tokens: {everywhere}."


def side_effect_sentence(steps, key):
    """Whether one of SIDE_EFFECTS passed the limit beyond which train.py warns (SUSPICIOUS)."""
    limit = limit_of(key)
    values = values_of(steps, key)
    over = sum(value > limit.above for value in values)
    mean = show(key, np.mean(values))
    largest = show(key, max(values))
    found = f"{key}: {mean} {SIDE_EFFECTS[key]}, at most {largest}"
    if over == 0:
        shown_limit = show(key, limit.above)
        return f"{found}; never over train.py's limit of {shown_limit}, so no explanation."
    return (
        f"{found}; in {over} of {len(values)} steps {limit.cause}, which may explain it: "
        f"{limit.advice}."
    )


def show(key, value):
    """The value of a side effect in words: per cent, but for the mismatch, which is in nats."""
    if key == "rollout/mismatch_mean":
        return f"{value:.1e}"
    return percent(value, 1)


def law_sentence(rows, key):
    """The law of the training reward or of pass@1, with its forecast, or why there is none."""
    entropy, reward = law_points(rows, key)
    try:
        law = fit_law(entropy, reward)
    except ValueError as error:
        return f"No law of {key}: {error}."
    text = (
        f"The law, {key} = {-law['a']:+.3f} exp(H) {law['b']:+.3f} ({len(entropy)} points): "
        f"R^2 {law['r2']:.2f}, RMSE {law['rmse']:.3f}; ceiling at H = 0: {law['ceiling']:.3f}"
    )
    if law["a"] < 0:
        text += ", which means nothing: the reward fell with the entropy"
    text += "."
    try:
        ahead = law_forecast(entropy, reward)
    except ValueError as error:
        return f"{text} No forecast from the first 15 %: {error}."
    return (
        f"{text} Fitted on the first {ahead['points']} points only, it misses the rest by RMSE "
        f"{ahead['rmse_rest']:.3f}, the last by {ahead['error_last']:+.3f}, with a ceiling of "
        f"{ahead['ceiling']:.3f}."
    )


def compare_runs(runs):
    """Sentences on several runs, {name: rows}, up to the last step that all of them have.

    They say who keeps more entropy, and in which quadrant the runs differ most. Runs that
    lack a metric are named, and left out of its sentence.
    """
    last = min(last_step(rows) for rows in runs.values())
    steps = {}
    for name, rows in runs.items():
        steps[name] = [row for row in rows if 0 < row["step"] <= last]
    entropies = final_entropies(steps)
    quadrant, shares = widest_quadrant(steps)

    sentences = []
    if len(entropies) > 1:
        order = sorted(entropies, key=entropies.get, reverse=True)
        ends = ", ".join(f"{name} {entropies[name]:.3f}" for name in order)
        sentences.append(
            f"Entropy at step {last} (mean of the last tenth of the steps, nats), "
            f"most first: {ends}."
        )
    if len(shares) > 1:
        each = ", ".join(f"{name} {share:+.2f}" for name, share in shares.items())
        sentences.append(
            f"The predicted shares differ most in {quadrant}, "
            f"the {QUADRANT_TOKENS[quadrant]}: {each}."
        )
    lacking = [f"{name} has no entropy" for name in runs if name not in entropies]
    lacking += [f"{name} has no quadrants" for name in runs if name not in shares]
    if lacking:
        sentences.append(f"Not compared: {'; '.join(lacking)}.")
    return sentences


def last_step(rows):
    """The last step of a run."""
    return max(row["step"] for row in rows)


def final_entropies(runs):
    """{name: mean entropy over the last tenth of its steps}, of the runs that have entropies."""
    means = {}
    for name, rows in runs.items():
        entropy = values_of(rows, "entropy/response_mean")
        if entropy:
            means[name] = float(np.mean(last_tenth(entropy)))
    return means


def widest_quadrant(runs):
    """The quadrant in which the shares of the runs differ most, and these shares, {name: share}."""
    shares = {}
    widths = {}
    for quadrant in QUADRANTS:
        key = f"quadrant/{quadrant}_dH_share"
        shares[quadrant] = {}
        for name, rows in runs.items():
            if values_of(rows, key):
                shares[quadrant][name] = mean_of(rows, key)
        widths[quadrant] = np.ptp(list(shares[quadrant].values()) or [0])
    widest = max(QUADRANTS, key=widths.get)
    return widest, shares[widest]


# ---- figures -------------------------------------------------------------------------------------

# One colour per method in every figure of the project. A method without one is grey.
COLOURS = {
    "grpo": "tab:blue",
    "clip_cov": "tab:orange",
    "kl_cov": "tab:green",
    "clip_higher": "tab:red",
    "entropy_bonus": "tab:purple",
    "kl_loss": "tab:brown",
    "steer": "tab:pink",
    "par": "tab:olive",
    "w_reinforce": "tab:cyan",
    "entropy_advantage": "navy",
    "entropic": "gold",
    "dcpo": "darkgreen",
    "aepo": "lightgreen",
    "flex_clip": "salmon",
    "ce_gppo": "darkred",
    "cispo": "deeppink",
    "gspo": "darkkhaki",
    "rand_pos_clip": "tan",
    "fork_tokens": "teal",
    "clip_b": "slateblue",
    "clip_v": "violet",
    "adaptive_entropy": "crimson",
    "aer": "yellowgreen",
    "siren": "chocolate",
    "quadrant": "black",
}
LINE_STYLES = ("-", "--", ":", "-.")


def method_of(label):
    """The method that a label starts with: clip_cov of "clip_cov-tiny-seed0"."""
    return re.match("[a-z_]*", label)[0]


def line_styles(labels):
    """{label: (colour, line style)}: the colour is that of the method which the label names.

    It is grey if the method has none. A further label of the same colour has another line
    style.
    """
    styles = {}
    for label in labels:
        colour = COLOURS.get(method_of(label), "tab:gray")
        earlier = [style for style in styles.values() if style[0] == colour]
        styles[label] = (colour, LINE_STYLES[len(earlier) % len(LINE_STYLES)])
    return styles


def usual_panels(runs):
    """{metric: title} of the entropy, the reward, pass@1 and pass@8 (or the largest pass@k).

    runs: {label: [rows of metrics, a list per seed]}.
    """
    panels = {
        "entropy/response_mean": "policy entropy (nats per token)",
        "reward/mean": "training reward (mean)",
    }
    ks = []
    for key in metrics_of(runs):
        if key.startswith("eval/pass@"):
            ks.append(int(key.removeprefix("eval/pass@")))
    if ks:
        usual = 8 if 8 in ks else max(ks)
        for k in (min(ks), usual):
            panels[f"eval/pass@{k}"] = f"test pass@{k}"
    return panels


def diagnosis_panels(runs):
    """{metric: title} of the usual panels and of the quadrants, as far as some run has them."""
    panels = usual_panels(runs)
    for quadrant in QUADRANTS:
        panels[f"quadrant/{quadrant}_dH_share"] = f"predicted share of dH: {quadrant}"
    present = metrics_of(runs)
    return {key: title for key, title in panels.items() if key in present}


def metrics_of(runs):
    """The names of all metrics of such runs."""
    names = set()
    for seeds in runs.values():
        for rows in seeds:
            names |= metrics_in(rows)
    return names


def plot_curves(runs, png, panels):
    """Draws metrics against the step, four panels a row, into the file `png`.

    runs: {label: [rows of metrics, a list per seed]}. A label is a line, the mean over its
    seeds, and a band from the least to the most, at the steps that all its seeds have.
    panels: {metric: title}.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(4, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(4.2 * columns, 3.4 * lines),
        constrained_layout=True,
        squeeze=False,
    )
    styles = line_styles(runs)
    for axis, (key, title) in zip(axes.flat, panels.items()):
        for label, seeds in runs.items():
            draw_curve(axis, seeds, key, label, styles[label])
        axis.set(title=title, xlabel="step")
        if axis.dataLim.y0 >= 0:
            axis.set_ylim(bottom=0)
        elif axis.dataLim.y1 <= 0:  # a quadrant that spends entropy
            axis.set_ylim(top=0)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(png, dpi=130)
    plt.close(figure)


def draw_curve(axis, seeds, key, label, style):
    """Draws a metric of one label: the mean over its seeds, and the band."""
    curves = []
    for rows in seeds:
        curves.append({row["step"]: row[key] for row in rows if key in row})
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    values = np.array([[curve[step] for step in steps] for curve in curves])
    colour, line = style
    marker = "o" if key.startswith("eval") else None
    axis.plot(
        steps,
        values.mean(0),
        line,
        color=colour,
        label=label,
        marker=marker,
        markersize=3,
    )
    axis.fill_between(
        steps,
        values.min(0),
        values.max(0),
        alpha=0.2,
        color=colour,
        linewidth=0,
    )


# ---- command line --------------------------------------------------------------------------------


def main():
    """Prints a diagnosis of each run and a comparison, and draws them; or prints the legend."""
    parser = argparse.ArgumentParser(
        description="Where did the entropy of these runs go? Reads metrics, never trains."
    )
    parser.add_argument(
        "runs",
        nargs="*",
        type=Path,
        help="folders of runs, finished or not, or metrics files (FILE:NAME for a run of several)",
    )
    parser.add_argument(
        "--legend",
        nargs="*",
        metavar="METRIC",
        help="explain these metrics, or all that train.py logs",
    )
    args = parser.parse_args()
    if args.legend is None and not args.runs:
        parser.error("the following arguments are required: runs")
    try:
        if args.legend is not None:
            return print_legend(args.legend)
        loaded = load_runs(args.runs)
    except ValueError as error:
        parser.exit(2, f"{error}\n")
    print_diagnosis(loaded)
    draw_diagnosis(loaded, folder_of(args.runs[0]) / "diagnosis.png")


def print_legend(keys):
    """Explains these metrics, or all of METRICS."""
    for key in keys or METRICS:
        _, unit, meaning = explain(key)
        print(f"{key} [{unit}]")
        print(textwrap.fill(meaning, 96, initial_indent="    ", subsequent_indent="    "))


def print_diagnosis(loaded):
    """Prints the sentences on each run, and on all together. loaded: of load_runs."""
    runs = {name: rows for name, (_, rows) in loaded.items()}
    for name, rows in runs.items():
        print("\n".join(diagnose(rows, name)), end="\n\n")
    if len(runs) > 1:
        print("\n".join(compare_runs(runs)), end="\n\n")
    sys.stdout.flush()  # into a pipe too, before the figure, which takes a second


def draw_diagnosis(loaded, png):
    """Draws the runs, and prints where. loaded: of load_runs."""
    runs = {}
    for name, (method, rows) in loaded.items():
        runs[label_of(name, method)] = [rows]
    panels = diagnosis_panels(runs)
    if panels:
        plot_curves(runs, png, panels)
        print(png)


def load_runs(paths):
    """{name: (method, rows)} of these runs, each once; a name that is taken becomes the path."""
    loaded = {}
    for path in dict.fromkeys(paths):
        name, method, rows = load_run(path)
        if name in loaded:
            name = str(path)
        loaded[name] = (method, rows)
    return loaded


def load_run(run):
    """(name, method, rows) of a run; the method is "" where no config.json tells it.

    run: as read_metrics takes it. Raises ValueError, in one line, if there is nothing to read.
    """
    try:
        rows = read_metrics(run)
    except OSError as error:
        what = f"{error.strerror}: {error.filename}"
        raise ValueError(f"{run}: no metrics to read ({what})") from None
    if not rows:
        raise ValueError(f"{run}: the metrics are empty, not even one line is complete")
    path, name = split_name(run)
    if name:
        return name, "", rows
    config = folder_of(path) / "config.json"
    if not config.exists():
        return name_of(path), "", rows
    return name_of(path), json.loads(config.read_text())["method"], rows


def folder_of(run):
    """The folder in which a run's metrics are."""
    path, _ = split_name(run)
    return path if path.is_dir() else path.parent


def label_of(name, method):
    """The label of a run's lines, which starts with its method, for line_styles."""
    if method in ("", method_of(name)):
        return name
    return f"{method}: {name}"


if __name__ == "__main__":
    main()
