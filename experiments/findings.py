"""The papers' 14 findings on the default task: the runs, three seeds each, what is measured, the verdict, a figure.

    python -m experiments.findings                 all; a run that exists is not run again, an interrupted one goes on
    python -m experiments.findings --only 6        the runs of finding 6, its verdicts and its figure

Writes experiments/results/findings.md and, in findings/ beside it, the metrics of every run and the figures. Numbers
are means over the seeds, in brackets their range. H: entropy/response_mean, nats; start and end of a run: ten steps.
"""
import argparse
import json
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np

from entropy import fit_law, law_forecast, law_points
from experiments import difficulty
from experiments.compare import run_all
from experiments.over_seeds import (H, REWARD, RIGHT, TOP_SHARES, above, at, column, curves, each, kept, law_figure,
                                    rising, spearman, tail_figure, together_figure, told)

RESULTS, SEEDS = Path("experiments/results/findings"), (0, 1, 2)
COVARIANCE = [f"{method}-{share}" for method in ("clip_cov", "kl_cov") for share in (0.005, 0.02, 0.08)]
WEAKENED = {"pos_likely": 1, "pos_rare": -1, "neg_likely": -1, "neg_rare": 1}  # the sign of what half of it does to H
SETTINGS = {  # METHOD-SETTING: flags of train.py beside the default ones
    "grpo": "--eval_samples 64",
    **{f"grpo-updates-{n}": f"--updates_per_rollout {n} --eval_samples 64 --eval_every 50" for n in (1, 2, 8)},
    **{name: f"--method {name.split('-')[0]} --knobs cov_frac={name.split('-')[1]}" for name in COVARIANCE},
    "quadrant-positive": "--method quadrant --knobs neg_likely=0 neg_rare=0",
    **{f"par-{x}": f"--method par --knobs schedule=constant positive_weight={x}" for x in (0, 0.5)},
    "grpo-unclipped": "--knobs clip_low=0.99 clip_high=5",
    "steer-unclipped": "--method steer --knobs clip_low=0.99 clip_high=5",
    **{f"entropy_bonus-{x}": f"--method entropy_bonus --knobs entropy_coef={x}" for x in (0.001, 0.01, 0.1)},
    **{f"kl_loss-{x}": f"--method kl_loss --knobs kl_coef={x}" for x in (0.1, 1)},
    **{f"quadrant-{q}": f"--method quadrant --knobs {q}=0.5" for q in WEAKENED}, "clip_higher": "--method clip_higher",
    "grpo-tight": "--knobs clip_low=0.05", "grpo-wide": "--knobs clip_low=0.6",
    "grpo-no-std": "--adv_norm none", "w_reinforce-1": "--method w_reinforce --knobs positive_weight=1",
    **{f"grpo-{half}": f"--data {path}" for half, path in difficulty.FILES.items()},
    **{f"grpo-prompts-{n}": f"--num_prompts {n}" for n in (16, 64, 256)},
    **{f"grpo-{size}": f"--model tiny-{size}" for size in ("mini", "small")}, "grpo-300": "--steps 300 --eval_every 30"}


# ---- findings that take more than a line: (claim, whether it holds, {name: [a number per seed]}) ---------------------

def early(runs, *_):
    """Shares of a run's whole change, of curves smoothed over nine steps."""
    def share(rows, key, part):
        curve = column(rows, key, smooth=9)
        return (curve[round(len(curve) * part)] - curve[0]) / (curve[-1] - curve[0])
    for name, seeds in runs.items():
        found = {f"{what}, first 1/{n}": [share(rows, key, 1 / n) for rows in seeds]
                 for what, key in (("H spent", H), ("reward gained", REWARD)) for n in (12, 3)}
        least = min(np.mean(values) for what, values in found.items() if what.endswith("1/3"))
        yield f"{name}: the first third makes more than 2/3 of both", least > 2 / 3, found


def law(runs, *_):
    of = lambda key, what: each(runs, lambda rows: fit_law(*law_points(rows, key))[what])
    r2, slope, data_slope = of(RIGHT, "r2"), of(RIGHT, "a"), of(REWARD, "a")
    ahead = each(runs, lambda rows: law_forecast(*law_points(rows, REWARD))["rmse_rest"])
    algorithms = [slope[name] for name in ("grpo", "grpo-no-std", "w_reinforce-1")]
    apart = above(data_slope, "grpo-easy", "grpo-hard") or above(data_slope, "grpo-hard", "grpo-easy")
    return [("pass@1 = -a exp(H) + b fits GRPO: R^2 of 0.9 or more", min(r2["grpo"]) >= 0.9, r2),
            ("the first 15 % predict the rest of GRPO's rewards: RMSE up to 0.02", max(ahead["grpo"]) <= 0.02, ahead),
            ("a of pass@1 does not depend on the algorithm: the ranges of GRPO, no-std and REINFORCE meet",
             max(map(min, algorithms)) <= min(map(max, algorithms)), slope),
            ("a of the training reward depends on the data: the ranges of easy and hard are apart", apart, data_slope)]


def group_covariance(runs, *_):
    seeds, key = runs["grpo-updates-1"], "policy/group_cov_"
    positive = [(column(rows, key + "mean") > 0).mean() for rows in seeds]
    parts = {part: [column(rows, key + part).mean() for rows in seeds] for part in ("hard", "mid", "easy")}
    smooth = lambda rows, key: column(rows, key, 9)
    alike = [np.corrcoef(smooth(rows, key + "mean"), -smooth(rows, "entropy/change_measured"))[0, 1] for rows in seeds]
    return [("positive in more than 0.9 of the steps", min(positive) > 0.9, {"share": positive}),
            ("larger for easier prompts", rising(parts, *parts), parts),
            ("its curve has the shape of -dH: Pearson above 0.5", min(alike) > 0.5, {"Pearson": alike})]


def heavy_tail(runs, *_):
    tops = {f"top {share}": each(runs, lambda rows: rows[1][f"policy/cov_top_{share}"])["grpo"] for share in TOP_SHARES}
    tops["all"] = each(runs, lambda rows: rows[1]["policy/cov_mean"])["grpo"]
    small, large, whole = (np.mean(tops[name]) for name in ("top 0.002", "top 0.2", "all"))
    yield "step 1: top 0.002 above 5 times the top 0.2, that above 10 times all", small > 5 * large > 50 * whole, tops


def estimates(*_):
    """Of experiments/microscope.py: its batches stand for the seeds."""
    file = RESULTS.parent / "microscope.json"
    if not file.exists():
        subprocess.run([sys.executable, "-m", "experiments.microscope"], check=True)
    for step, found in json.loads(file.read_text())["the tiny base"].items():
        pearson = {name: [batch["Pearson"] for batch in batches] for name, batches in found.items()}
        first = all(rising(pearson, name, "exact") for name in pearson if name != "exact")
        yield f"step {step}: the exact form has the largest Pearson of all", first, pearson
        yield f"step {step}: STEER's theorem above the covariance", rising(pearson, "covariance", "steer theorem"), {}


def together(runs, held, right):
    diversity = each(runs, at("end", "response/ngram_diversity"))
    diverse, accurate = (spearman(np.ravel([*held.values()]), np.ravel([*x.values()])) for x in (diversity, right))
    yield "H and n-gram diversity, over all these runs: Spearman above 0.8", diverse > 0.8, {"Spearman": [diverse]}
    yield "H and pass@1: Spearman below 0.5 either way", abs(accurate) < 0.5, {"Spearman": [accurate]}
    for what, less, more in (("conf_wrong", "base", "last"), ("conf_gap", "last", "base"), ("ece", "base", "last")):
        found = {part: each(runs, at(part, f"eval/{what}"))["grpo"] for part in ("base", "last")}
        yield f"GRPO's {what} {'rises' if more == 'last' else 'narrows'}", above(found, more, less), found


# ---- the 14: runs, the paper's numbers, the claims; held: H at the end of each run, right: its last pass@1 -----------

Finding = namedtuple("Finding", "names paper claims draw", defaults=[curves(H, REWARD, RIGHT)])
UPDATES = ["grpo-updates-1", "grpo-updates-2", "grpo", "grpo-updates-8"]  # grpo: 4
PROMPTS = ["grpo-prompts-16", "grpo-prompts-64", "grpo-prompts-256", "grpo"]  # grpo: 4,000
FINDINGS = {
    1: Finding(["grpo", "grpo-300"], "first 1/12: 73 % of H spent, 76 % of the gain; first 1/3: 94 %, 93 %", early),
    2: Finding(["grpo", "grpo-no-std", "w_reinforce-1", "grpo-easy", "grpo-hard", "grpo-mini", "grpo-small"],
               "fitted on 15 %: RMSE 0.009; a, b depend on the data, not on the algorithm", law, law_figure),
    3: Finding(["grpo-updates-1"], "positive throughout, larger for easier prompts, like -dH", group_covariance,
               curves(*(f"policy/group_cov_{part}" for part in ("mean", "hard", "easy")), "entropy/change_measured")),
    4: Finding(["grpo"], "top 0.0002 5.65, 0.002 3.11, 0.02 1.39, 0.2 0.35, all 0.003", heavy_tail, tail_figure),
    5: Finding(["grpo", "entropy_bonus-0.001", "entropy_bonus-0.01", "entropy_bonus-0.1", "kl_loss-0.1", "kl_loss-1"],
               "0.001 does little, 0.01 explodes; reference KL steadies H, costs accuracy", lambda runs, held, right: [
        ("a bonus of 0.001 does nothing: the means differ by less than GRPO's seeds do",
         abs(np.mean(held["entropy_bonus-0.001"]) - np.mean(held["grpo"])) < np.ptp(held["grpo"]), held),
        ("one of 0.1 explodes: H ends above its start", min(each(runs, kept)["entropy_bonus-0.1"]) > 1, {}),
        ("reference KL steadies H", above(held, "kl_loss-1", "grpo"), {}),
        ("and costs accuracy", above(right, "grpo", "kl_loss-1"), right)]),
    6: Finding(["grpo", *COVARIANCE], "KL-Cov's H over 10 times GRPO's; averages 38.6, Clip-Cov 40.4, KL-Cov 40.6",
               lambda runs, held, right: [
        ("Clip-Cov's knob sets H, from GRPO's level up", rising(held, "grpo", *COVARIANCE[:3]), held),
        ("KL-Cov's knob does", rising(held, "grpo", *COVARIANCE[3:]), {}),
        ("pass@1 of both at 0.02 is above GRPO's",
         rising(right, "grpo", "clip_cov-0.02") and rising(right, "grpo", "kl_cov-0.02"), right)]),
    7: Finding([], "Pearson: STEER 0.4 (re-measured 0.26, theorem 0.39), covariance clearly worse", estimates, None),
    8: Finding(["grpo", *(f"quadrant-{q}" for q in WEAKENED)], "each moves H as predicted", lambda runs, held, right: [
        (f"half of {q} {'raises' if sign > 0 else 'lowers'} H in every seed", min(sign * moved) > 0, {"change": moved})
        for q, sign in WEAKENED.items() for moved in [np.subtract(held[f"quadrant-{q}"], held["grpo"])]]),
    9: Finding(["grpo-unclipped", "steer-unclipped"], "H held at clips of 0.99 / 5; averages GRPO 44.2, STEER 48.6",
               lambda runs, held, right: [
        ("STEER ends with more H", above(held, "steer-unclipped", "grpo-unclipped"), held),
        ("and with a better pass@1", rising(right, "grpo-unclipped", "steer-unclipped"), right)]),
    10: Finding(UPDATES, "more updates amplify; training reward up, pass@64 down", lambda runs, held, right: [
        ("more updates per rollout, less H", rising(held, *UPDATES[::-1]), held),
        ("more training reward", rising(reward := each(runs, at("end", REWARD)), *UPDATES), reward),
        ("less pass@64", rising(most := each(runs, at("last", "eval/pass@64")), *UPDATES[::-1]), most)],
        curves(H, REWARD, RIGHT, "eval/pass@64")),
    11: Finding(PROMPTS, "less diverse prompts, less H; a few hundred near the full set", lambda runs, held, right: [
        ("fewer training prompts, less H", rising(held, *PROMPTS), held),
        ("256 come within 0.02 of the pass@1 of all 4,000",
         np.mean(right["grpo-prompts-256"]) > np.mean(right["grpo"]) - 0.02, right)]),
    12: Finding(["grpo", "clip_higher", "grpo-unclipped", "grpo-wide", "grpo-tight"],
                "clip-higher 0.539, above clip-free; a larger lower bound the least", lambda runs, held, right: [
        ("clip-higher ends with more H than clip-free", above(held, "clip_higher", "grpo-unclipped"), held),
        ("a larger lower bound, 0.6, with less than 0.2", above(held, "grpo", "grpo-wide"), {}),
        ("a tighter one, 0.05, with more", above(held, "grpo-tight", "grpo"), {})]),
    13: Finding(["grpo", "quadrant-positive", "par-0", "par-0.5"], "A >= 0 only 0.015, A <= 0 only 0.884",
                lambda runs, held, right: [
        ("A > 0 only ends with the least H", above(held, "grpo", "quadrant-positive"), held),
        ("A < 0 only keeps nine tenths of it", min(each(runs, kept)["par-0"]) > 0.9, {}),
        ("the weight of A > 0 (0, 0.5, 1: GRPO) sets H", rising(held, "grpo", "par-0.5", "par-0"), {})]),
    14: Finding([*UPDATES, *COVARIANCE, "quadrant-positive", "par-0", "par-0.5"],
                "Spearman 0.88; confidence in wrong answers rises, the gap narrows", together, together_figure)}


# ---- runs, verdicts, figures -----------------------------------------------------------------------------------------

def report(number, runs):
    """The rows of a finding in the table: each claim with the paper's numbers, those found here, the verdict."""
    rows, paper, claims = "", FINDINGS[number].paper, FINDINGS[number].claims
    for claim, holds, numbers in claims(runs, each(runs, at("end")), each(runs, at("last", RIGHT))):
        verdict = "holds" if holds else "**does not hold here**"
        rows += f"| {number} | {claim} | {'' if rows else paper} | {told(numbers) or 'as above'} | {verdict} |\n"
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", type=int, default=list(FINDINGS), choices=FINDINGS, metavar="N")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    args = parser.parse_args()
    names = [name for name in SETTINGS if any(name in FINDINGS[number].names for number in args.only)]
    flags = {name: f"--eval_every 10 --save_every 50 {SETTINGS[name]}".split() for name in names}
    if "grpo-hard" in names and not (RESULTS / f"grpo-hard-seed{SEEDS[-1]}.jsonl").exists():
        difficulty.main()
    runs = run_all(flags, SEEDS, Path("runs/findings"), RESULTS, args.workers)
    for number in args.only:
        chosen, draw = {name: runs[name] for name in FINDINGS[number].names}, FINDINGS[number].draw
        (RESULTS / f"{number}.md").write_text(report(number, chosen))
        if draw:
            draw(chosen, RESULTS / f"{number}.png")
    rows = [path.read_text() for path in (RESULTS / f"{number}.md" for number in FINDINGS) if path.exists()]
    head = "| finding | claim | papers | here | verdict |\n|---|---|---|---|---|\n"
    (RESULTS.parent / "findings.md").write_text(f"{__doc__}\n{head}{''.join(rows)}")


if __name__ == "__main__":
    main()
