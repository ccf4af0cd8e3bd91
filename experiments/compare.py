"""Every method on the default task, from the same base and seed: the table and the figure of the README.

    python -m experiments.compare                      all methods, seed 0, two runs at a time; finished runs are kept
    python -m experiments.compare --methods grpo clip_cov kl_cov           the figure too (for at most eight methods)
"""
import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

import tiny
from losses import METHODS
from record import plot_curves, read_metrics, write_whole

RUNS, RESULTS = Path("runs/compare"), Path("experiments/results")
KEPT = ("step", "reward/mean", "reward/zero_std_frac", "entropy/response_mean", "entropy/change_measured",
        "policy/group_cov_mean", "policy/group_cov_hard", "policy/group_cov_mid", "policy/group_cov_easy",
        "response/ngram_diversity", "policy/clip_frac", "policy/selected_frac", "quadrant/pos_likely_dH_share",
        "quadrant/pos_rare_dH_share", "quadrant/neg_likely_dH_share", "quadrant/neg_rare_dH_share", "train/skipped",
        "time/step_s")  # of step 1, and of evaluations, everything
PANELS = {"entropy/response_mean": "policy entropy (nats per token)", "eval/pass@1": "test pass@1",
          "eval/pass@8": "test pass@8"}


def run(name, flags, runs, results):
    """train.py with these flags beside the default ones, in one thread, in the folder runs; resumed if it was
    interrupted. Its metrics, compact, are kept as results/NAME.jsonl, and with that file it is not run. Returns them."""
    folder, file = runs / name, results / f"{name}.jsonl"
    if not file.exists():
        if not (folder / "curves.png").exists():  # the last thing that a run writes
            command = [sys.executable, "train.py", *flags, "--out", str(runs), "--name", name]
            command += ["--resume"] if list(folder.glob("checkpoint-*")) else ["--overwrite"]
            with open(runs / f"{name}.log", "a") as log:
                subprocess.run(command, check=True, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
        rows = [{key: float(f"{value:.4g}") for key, value in row.items()
                 if key in KEPT or key.startswith("eval/") or row["step"] == 1} for row in read_metrics(folder)]
        write_whole(file, "".join(json.dumps(row) + "\n" for row in rows))
    return read_metrics(file)


def table(runs):
    """Markdown: the last evaluation, the entropy of the last ten steps, seconds per step; best pass@1 first."""
    lines = ["| method | seed | pass@1 | pass@8 | entropy, last 10 steps | reward, last 10 steps | s/step (median) |",
             "|---|---|---|---|---|---|---|"]
    tail = lambda rows, key: np.mean([row[key] for row in rows[-10:]])
    for (method, seed), rows in sorted(runs.items(), key=lambda item: -item[1][-1]["eval/pass@1"]):
        lines.append(f"| `{method}` | {seed} | {rows[-1]['eval/pass@1']:.3f} | {rows[-1]['eval/pass@8']:.3f} | "
                     f"{tail(rows, 'entropy/response_mean'):.3f} | {tail(rows, 'reward/mean'):.3f} | "
                     f"{np.median([row['time/step_s'] for row in rows[1:]]):.2f} |")
    first = next(iter(runs.values()))[0]
    lines.append(f"| the base | | {first['eval/pass@1']:.3f} | {first['eval/pass@8']:.3f} | | | |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    args = parser.parse_args()
    RUNS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "compare").mkdir(parents=True, exist_ok=True)
    tiny.base_model()  # once, before the runs look for it
    wanted = [(method, seed) for seed in args.seeds for method in args.methods]
    with ThreadPoolExecutor(args.workers) as pool:
        one = lambda method, seed: run(f"{method}-seed{seed}", ["--method", method, "--seed", str(seed)], RUNS,
                                       RESULTS / "compare")
        rows = list(tqdm(pool.map(one, *zip(*wanted)), "runs", len(wanted)))
    runs = dict(zip(wanted, rows))
    name = "-".join(args.methods) if args.methods != list(METHODS) else "methods"
    text = table(runs)
    (RESULTS / f"{name}.md").write_text(f"`python -m experiments.compare {' '.join(sys.argv[1:])}`\n\n{text}\n")
    if len(args.methods) <= 8:  # more lines than that nobody can read
        seeds = {method: [runs[method, seed] for seed in args.seeds] for method in args.methods}
        plot_curves(seeds, RESULTS / f"{name}.png", PANELS)
    print(text)


if __name__ == "__main__":
    main()
