"""The papers' 14 findings on the default task: the runs, three seeds each, what is measured, the verdict, a figure.

`python -m experiments.findings`, or some: `--only 6`. Runs whose metrics are in results/findings/ are not run again.
Numbers: mean over the seeds (range). H: entropy/response_mean, nats per token; at the end: mean of the last ten steps.
"Above": every seed of the one above every seed of the other. "Rises": each above the one before. "Apart": one is above
another. Limits such as 0.9 are ours; so are claims marked so, which no verdict counts."""
import argparse
import itertools
from pathlib import Path

import numpy as np

from experiments import difficulty
from experiments.compare import run_all
from experiments.over_seeds import (
    H, REWARD, RIGHT, Finding, above, after_updates, apart, at, below, covariance_and_fall, covariance_by_difficulty,
    covariance_figure, covariance_tops, curves, each, eval_law, flat, forecast_error, gain, kept, law_figure,
    made_by, microscope, positive_covariance, report, rising, spearman, table_rows, tail_figure, together_figure)
from record import read_metrics

RESULTS, SEEDS = Path("experiments/results/findings"), (0, 1, 2)
CLIP_COV, KL_COV = ([f"{method}-{share}" for share in (0.005, 0.02, 0.08)] for method in ("clip_cov", "kl_cov"))
WEAKENED = {"pos_likely": above, "pos_rare": below, "neg_likely": below, "neg_rare": above}  # where H should then be
EIGHT = "--updates_per_rollout 8"  # for clips to act: with the default 4 they reach 0.2 % of the tokens
POSITIVE, PAR = "--method quadrant --knobs neg_likely=0 neg_rare=0", ["par-0", "par-0.5", "par"]  # A > 0 only, weakened
SETTINGS = {  # METHOD-SETTING: flags of train.py beside the default ones
    "grpo": "--eval_samples 64",
    **{f"grpo-updates-{n}": f"--updates_per_rollout {n} --eval_samples 64 --eval_every 50" for n in (1, 2, 8)},
    **{name: f"--method {name.split('-')[0]} --knobs cov_frac={name.split('-')[1]}" for name in CLIP_COV + KL_COV},
    "quadrant-positive": POSITIVE, "par": "--method par --knobs target_entropy=0.35",
    **{f"par-{x}": f"--method par --knobs schedule=constant positive_weight={x}" for x in (0, 0.5)},
    **{f"entropy_bonus-{x}": f"--method entropy_bonus --knobs entropy_coef={x}" for x in (0.001, 0.01, 0.1)},
    "entropy_bonus-0.1-updates-1": "--method entropy_bonus --knobs entropy_coef=0.1 --updates_per_rollout 1",
    "adaptive_entropy": "--method adaptive_entropy --knobs target_entropy=0.35 delta=0.002 max_coef=0.05",
    **{f"kl_loss-{x}": f"--method kl_loss --knobs kl_coef={x}" for x in (0.1, 1)},
    **{f"quadrant-{q}": f"--method quadrant --knobs {q}=0.5" for q in WEAKENED},
    "clip_higher": f"--method clip_higher {EIGHT}", "grpo-tight": f"--knobs clip_low=0.05 {EIGHT}",
    "grpo-wide": f"--knobs clip_low=0.6 {EIGHT}", "grpo-unclipped": f"--knobs clip_low=0.99 clip_high=5 {EIGHT}",
    **{name: f"--method steer --knobs clip_low=0.99 clip_high=5{weight} {EIGHT}"
       for name, weight in (("steer-unclipped", ""), ("steer-unclipped-0.1", " min_weight=0.1"))},
    "grpo-no-std": "--adv_norm none", "w_reinforce-1": "--method w_reinforce --knobs positive_weight=1",
    **{f"grpo-{half}": f"--data {path}" for half, path in difficulty.FILES.items()},
    "quadrant-positive-easy": f"{POSITIVE} --data {difficulty.FILES['easy']}",
    **{f"grpo-prompts-{n}": f"--num_prompts {n}" for n in (16, 64, 256)},
    **{f"grpo-{size}": f"--model tiny-{size}" for size in ("mini", "small")}, "grpo-300": "--steps 300 --eval_every 30"}
UPDATES = {"grpo-updates-1": 1, "grpo-updates-2": 2, "grpo": 4, "grpo-updates-8": 8}


# ---- findings with many claims: each is (what is claimed, whether it holds, {name: [a number per seed]}) -------------

def early(runs, *_):
    for name, (n, most), key in itertools.product(runs, ((12, 1 / 2), (3, 4 / 5)), (H, RIGHT)):
        found, ours = each(runs, made_by(1 / n, key), name), "ours: " * (name == "grpo")
        yield (f"{ours}the first 1/{n} of {len(runs[name][0]) - 1} steps makes over {most} of the change of {key}",
               np.mean(found[name]) > most, found)


def law(runs, *_):
    fits = {what: each(runs, eval_law(what))["grpo"] for what in ("r2", "r2 of a line", "r2 of the step")}
    yield "pass@1 = -a exp(H) + b, on the test problems, fits GRPO: R^2 of 0.9 or more", min(fits["r2"]) >= 0.9, fits
    error, mean = each(runs, forecast_error), each(runs, lambda rows: forecast_error(rows, "rmse_mean"), "grpo")["grpo"]
    error["grpo, by the mean of its first 15 %"] = mean
    yield "GRPO's first 15 % forecast its rewards: RMSE up to 0.02", max(error["grpo"]) <= 0.02, error
    for what in "ab":
        found = each(runs, eval_law(what))
        yield (f"{what} does not depend on the algorithm (no-std: RLOO's baseline): their seeds are not apart",
               not apart(found, "grpo", "grpo-no-std", "w_reinforce-1"), found)
        yield "but on the data: their seeds are apart", apart(found, "grpo", "grpo-easy", "grpo-hard"), {}
    every = min(flat(r2 := each(runs, eval_law("r2")))) >= 0.9
    yield "the law fits every algorithm, half of the data and size: R^2 of 0.9", every, r2


def by_group(runs, *_):
    of = lambda number: each(runs, number)["grpo-updates-1"]
    yield "positive in more than 0.9 of the steps", min(share := of(positive_covariance)) > 0.9, {"share": share}
    parts = {part: of(covariance_by_difficulty(part)) for part in ("hard", "mid", "easy")}
    yield "larger for easier prompts", above(parts, "easy", "mid") and above(parts, "mid", "hard"), parts
    shape = {"steps": of(covariance_and_fall(1)), "nine-step means": of(covariance_and_fall(9))}
    yield "its curve has the shape of -dH: Pearson of means above 0.5", min(shape["nine-step means"]) > 0.5, shape


def estimates(*_):  # of experiments/microscope.py, which draws microscope.png; its batches stand for the seeds
    correlations = microscope(RESULTS.parent / "microscope.json")
    for (where, steps), what in itertools.product(correlations.items(), ("Pearson", "Spearman")):
        found = {f"{step}: {name}": [batch[what] for batch in batches]
                 for step, names in steps.items() for name, batches in names.items()}
        ahead = lambda one, *others: all(np.all(np.greater(found[f"{step}: {one}"], found[f"{step}: {other}"]))
                                         for step in steps for other in others)
        claim = f"{what}, {where}, each kind of step, every batch: STEER's theorem is ahead of the covariance"
        yield claim, ahead("steer theorem", "covariance"), found
        yield "and so is STEER as released", ahead("steer released", "covariance"), {}
        yield "ours: exact is ahead of all", ahead("exact", "steer theorem", "steer released", "covariance"), {}


def together(runs, h_end, pass1):
    for key, part, sign, least in (("response/ngram_diversity", "end", 1, 0.8), ("eval/conf_wrong", "last", -1, 0.5),
                                   ("eval/conf_gap", "last", 1, 0.5), ("eval/ece", "last", -1, 0.5)):
        rank = spearman(flat(h_end), flat(each(runs, at(part, key))))
        claim = f"H and {key} over all these runs: Spearman {'above' if sign > 0 else 'below'} {sign * least}"
        yield claim, sign * rank > least, {"Spearman": [rank]}
    rank = spearman(flat(h_end), flat(pass1))
    yield "H and pass@1 only weakly: within 0.5 of 0", abs(rank) < 0.5, {"Spearman": [rank]}
    yield "pass@1 of par and adaptive_entropy is above GRPO's", below(pass1, "grpo", "par", "adaptive_entropy"), pass1


# ---- the 14: runs, the papers' numbers, claims (see Finding) ---------------------------------------------------------

FINDINGS = {
    1: Finding("Entropy goes early", ["grpo-300", "grpo"], "first 1/12: 73 % of H, 76 % of gain; 1/3: 94, 93 %", early),
    2: Finding("The law", ["grpo", "grpo-no-std", "w_reinforce-1", "grpo-easy", "grpo-hard", "grpo-mini", "grpo-small"],
               "forecast from 15 %: RMSE 0.009; a, b depend on the data, not on the algorithm", law, law_figure),
    3: Finding("Group covariance", ["grpo-updates-1"], "positive, more if easy, like -dH", by_group, covariance_figure),
    4: Finding("Covariance tail", ["grpo"], "top 0.0002 5.65, 0.002 3.11, 0.02 1.39, 0.2 0.35", lambda runs, *_: [
        ("step 1: the top 0.002 is over 5 times the top 0.2 (papers: 9; a Gaussian: 2.3; a product of two: 4.1)",
         min(np.divide((top := covariance_tops(runs))["top 0.002"], top["top 0.2"])) > 5, top)], tail_figure),
    5: Finding("Bonus, KL", ["grpo", *(f"entropy_bonus-{x}" for x in (0.001, 0.01, 0.1)), "kl_loss-0.1", "kl_loss-1"],
               "0.001 does little, 0.01 explodes; reference KL steadies H, costs accuracy", lambda runs, h_end, pass1: [
        ("a bonus of 0.001 does little: the mean differs from GRPO's by less than 0.02",
         abs(np.mean(h_end["entropy_bonus-0.001"]) - np.mean(h_end["grpo"])) < 0.02, h_end),
        ("one of 0.1 explodes: H ends above twice its start", min(each(runs, kept)["entropy_bonus-0.1"]) > 2, {}),
        ("KL to the reference steadies H, at 0.1 and at 1", below(h_end, "grpo", "kl_loss-0.1", "kl_loss-1"), {}),
        ("and costs accuracy, at 0.1 and at 1", above(pass1, "grpo", "kl_loss-0.1", "kl_loss-1"), pass1)]),
    6: Finding("Clip-Cov, KL-Cov", ["grpo", *CLIP_COV, *KL_COV],
               "KL-Cov's H 10 times GRPO's; averages 38.6, Clip-Cov 40.4, KL-Cov 40.6", lambda runs, h_end, pass1: [
        ("Clip-Cov's knob sets H: it rises from GRPO's with cov_frac", rising(h_end, "grpo", *CLIP_COV), h_end),
        ("KL-Cov's knob too", rising(h_end, "grpo", *KL_COV), {}),
        ("both, at 0.02, end above GRPO", below(h_end, "grpo", "clip_cov-0.02", "kl_cov-0.02"), {}),
        ("one ends at 10 times GRPO's H", max(map(np.mean, h_end.values())) > 10 * np.mean(h_end["grpo"]), {}),
        ("pass@1 of both, at 0.02, is above GRPO's", below(pass1, "grpo", "clip_cov-0.02", "kl_cov-0.02"), pass1),
        ("ours: pass@16 of both, at 0.02, is above GRPO's",
         below(best := each(runs, at("last", "eval/pass@16")), "grpo", CLIP_COV[1], KL_COV[1]), best)], curves(16)),
    7: Finding("Estimates of dH", ["microscope"], "STEER: Pearson 0.4 (others: 0.26)", estimates, lambda *_: 0),
    8: Finding("Quadrants", ["grpo", *(f"quadrant-{q}" for q in WEAKENED)], "as predicted", lambda runs, h_end, pass1: [
        (f"half of {q}: H ends {order.__name__} GRPO's", order(h_end, f"quadrant-{q}", "grpo"),
         {"half": h_end[f"quadrant-{q}"], "grpo": h_end["grpo"]}) for q, order in WEAKENED.items()]),
    9: Finding("STEER", ["grpo-unclipped", "steer-unclipped", "steer-unclipped-0.1"],
               "holds H at these clips; GRPO 44.2, Clip-Cov 45.7, STEER 48.6", lambda runs, h_end, pass1: [
        ("at clips of 0.99 and 5 STEER ends above GRPO", above(h_end, "steer-unclipped", "grpo-unclipped"), h_end),
        ("ours: and does with min_weight=0.1, not 0.8", above(h_end, "steer-unclipped-0.1", "grpo-unclipped"), {}),
        ("and holds H: it keeps 0.9 of it", min(keep := each(runs, kept)["steer-unclipped"]) > 0.9, {"kept": keep}),
        ("its pass@1 is above GRPO's", above(pass1, "steer-unclipped", "grpo-unclipped"), pass1)]),
    10: Finding("Updates per rollout batch", [*UPDATES, "entropy_bonus-0.1", "entropy_bonus-0.1-updates-1"],
                "more updates amplify either direction; training reward up, pass@64 down", lambda runs, h_end, pass1: [
        ("H falls: the more updates per rollout batch, the lower it ends", rising(h_end, *[*UPDATES][::-1]), h_end),
        ("H rises (bonus 0.1): 4 end above 1", above(h_end, "entropy_bonus-0.1", "entropy_bonus-0.1-updates-1"), {}),
        ("ours: and not as they are more steps: after 96 optimizer steps, too, more updates have less H", rising(
            h := {name: each(runs, after_updates(96, n), name)[name] for name, n in UPDATES.items()}, *[*h][::-1]), h),
        ("training reward up, 4 against 1, in each seed, as these share their problems",
         np.all(np.greater((r := each(runs, at("end", REWARD), *UPDATES))["grpo"], r["grpo-updates-1"])), r),
        ("pass@64 down, 4 against 1", below(best := each(runs, at("last", "eval/pass@64"), *UPDATES), "grpo",
                                            "grpo-updates-1"), best)], curves(64)),
    11: Finding("Fewer prompts than 4,000", [*(f"grpo-prompts-{n}" for n in (16, 64, 256)), "grpo"],
                "less diverse prompts, less H; a few hundred near the full set", lambda runs, h_end, pass1: [
        ("fewer prompts, less H on these", rising(h_end, *runs), h_end),
        ("ours: and less on the test problems", rising(h := each(runs, at("last", "eval/entropy")), *runs), h),
        ("256 make over 0.9 of the gain in pass@1",
         np.mean((made := each(runs, gain))["grpo-prompts-256"]) > 0.9 * np.mean(made["grpo"]), made)]),
    12: Finding("Clip thresholds", ["grpo-updates-8", "clip_higher", "grpo-unclipped", "grpo-wide", "grpo-tight"],
                "clip-higher 0.539, above clip-free; a larger lower bound the least", lambda runs, h_end, pass1: [
        ("clip-higher ends above clip-free", above(h_end, "clip_higher", "grpo-unclipped"), h_end),
        ("a larger lower bound, 0.6, ends below all", below(h_end, "grpo-wide"), {}),
        ("a tighter one, 0.05, ends above 0.2", above(h_end, "grpo-tight", "grpo-updates-8"), {})]),
    13: Finding("The sign of A", ["grpo", "quadrant-positive", *PAR, "grpo-easy", "quadrant-positive-easy"],
                "A >= 0 only 0.015, A <= 0 only 0.884", lambda runs, h_end, pass1: [
        ("A > 0 only ends below GRPO and A < 0 only", below(h_end, "quadrant-positive", "grpo", "par-0"), h_end),
        ("ours: on easy problems below GRPO", below(h_end, "quadrant-positive-easy", "grpo-easy"), {}),
        ("A < 0 only ends above GRPO", above(h_end, "par-0", "grpo"), {}),
        ("and H stays high: it keeps 0.9 of it", min(keep := each(runs, kept)["par-0"]) > 0.9, {"kept": keep}),
        ("the weight of A > 0 sets H: it rises from 1 to 0.5 to 0", rising(h_end, "grpo", "par-0.5", "par-0"), {}),
        ("led by H it keeps the target of 0.35 to 0.05", max(abs(np.subtract(h_end["par"], 0.35))) < 0.05, {})]),
    14: Finding("What goes with entropy", [*UPDATES, *CLIP_COV, *KL_COV, "quadrant-positive", *PAR, "adaptive_entropy"],
                "Spearman 0.88; overconfident at low H; GRPO 44.12, PAR 45.66", together, together_figure)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", type=int, default=list(FINDINGS), choices=FINDINGS, metavar="N")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    args = parser.parse_args()
    flags = {name: f"--eval_every 10 --save_every 50 {words}".split() for name, words in SETTINGS.items()}
    files = {name: [RESULTS / f"{name}-seed{seed}.jsonl" for seed in SEEDS] for name in SETTINGS}
    files["microscope"] = [RESULTS.parent / "microscope.json"]
    exist = lambda *names: all(file.exists() for name in names for file in files[name])
    wanted = [name for name in SETTINGS if any(name in FINDINGS[number].names for number in args.only)]
    if any("difficulty" in SETTINGS[name] and not exist(name) for name in wanted):
        difficulty.main()
    run_all({name: flags[name] for name in wanted}, SEEDS, Path("runs/findings"), RESULTS, args.workers)
    rows = {}
    for number, finding in FINDINGS.items():
        if number in args.only or exist(*finding.names):
            runs = {name: [read_metrics(file) for file in files[name]] for name in finding.names if name in SETTINGS}
            rows[number] = table_rows(number, finding, runs)
            if number in args.only:
                print(rows[number])
                finding.draw(runs, RESULTS / f"{number}.png")
    (RESULTS.parent / "findings.md").write_text(report(__doc__, rows, FINDINGS, flags))


if __name__ == "__main__":
    main()
