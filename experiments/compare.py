"""Every method on the default task, from the same base and seed: a table, and a figure of at most eight of them.

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
from record import plot_curves, read_metrics, usual_panels, write_whole

RUNS, RESULTS = Path("runs/compare"), Path("experiments/results")
KEPT = ("step", "reward/mean", "reward/zero_std_frac", "entropy/response_mean", "entropy/change_measured",
        "policy/group_cov_mean", "policy/group_cov_hard", "policy/group_cov_mid", "policy/group_cov_easy",
        "response/ngram_diversity", "policy/clip_frac", "policy/selected_frac", "policy/weight_mean",
        "controller/positive_weight", "quadrant/pos_likely_dH_share", "quadrant/pos_rare_dH_share",
        "quadrant/neg_likely_dH_share", "quadrant/neg_rare_dH_share", "train/skipped",
        "train/grad_norm", "time/step_s")  # and all of an evaluation, and of step 1 the token covariances


def finished(folder):
    rows = read_metrics(folder) if (folder / "metrics.jsonl").exists() else []
    return bool(rows) and rows[-1]["step"] == json.loads((folder / "config.json").read_text())["steps"]


def run(name, flags, runs, results):
    """train.py with these flags beside the default ones, in one thread, in the folder runs; resumed if it was
    interrupted. Keeps its metrics, compact, as results/NAME.jsonl, and where that exists does not run. Returns them."""
    folder, file = runs / name, results / f"{name}.jsonl"
    if not file.exists():
        if not finished(folder):
            command = [sys.executable, "train.py", *flags, "--out", str(runs), "--name", name]
            command += ["--resume"] if list(folder.glob("checkpoint-*")) else ["--overwrite"]
            with open(runs / f"{name}.log", "a") as log:
                subprocess.run(command, check=True, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
            if not finished(folder):  # SIGTERM: exit code 0, with a checkpoint
                raise SystemExit(f"{name} was stopped; the same command goes on with it")
        rows = [{key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()
                 if key in KEPT or key.startswith("eval/") or row["step"] == 1 and key.startswith("policy/cov_")}
                for row in read_metrics(folder)]
        write_whole(file, "".join(json.dumps(row) + "\n" for row in rows))
    return read_metrics(file)


def run_all(settings, seeds, runs, results, workers):
    """{name: [rows of each seed]} of settings {name: flags}; the first seed of all, then the second, with a bar.

    results/settings.json remembers the flags: ValueError if runs of other flags are there under a name."""
    for folder in (runs, results):
        folder.mkdir(parents=True, exist_ok=True)
    noted, known = results / "settings.json", {}
    if noted.exists():
        known = json.loads(noted.read_text())
    for name, words in settings.items():
        if known.get(name, words) != words:
            raise ValueError(f"{results} has runs {name} with {' '.join(known[name])}, not {' '.join(words)}: delete "
                             f"{name}-seed*.jsonl there and its line in settings.json, and {runs / name}-seed*")
    write_whole(noted, json.dumps(known | settings, indent=1))
    to_run = [words for name, words in settings.items()
              if not all((results / f"{name}-seed{seed}.jsonl").exists() for seed in seeds)]
    models = {words[words.index("--model") + 1] if "--model" in words else "tiny" for words in to_run}
    for size in models & set(tiny.SIZES):
        tiny.base_model(size=size)  # once, before two runs look for it
    one = lambda name, seed: run(f"{name}-seed{seed}", [*settings[name], "--seed", str(seed)], runs, results)
    wanted = [(name, seed) for seed in seeds for name in settings]
    with ThreadPoolExecutor(workers) as pool:
        rows = dict(zip(wanted, tqdm(pool.map(one, *zip(*wanted)), "runs", len(wanted))))
    return {name: [rows[name, seed] for seed in seeds] for name in settings}


def table(runs, seeds):
    """Markdown: the last evaluation, the entropy of the last ten steps, seconds per step; best pass@1 first."""
    lines = ["| method | seed | pass@1 | pass@8 | entropy, last 10 steps | reward, last 10 steps | s/step (median) |",
             "|---|---|---|---|---|---|---|"]
    tail = lambda rows, key: np.mean([row[key] for row in rows[-10:]])
    ends = [(rows[-1]["eval/pass@1"], method, seed, rows) for method in runs for seed, rows in zip(seeds, runs[method])]
    for right, method, seed, rows in sorted(ends, key=lambda end: -end[0]):
        lines.append(f"| `{method}` | {seed} | {right:.3f} | {rows[-1]['eval/pass@8']:.3f} | "
                     f"{tail(rows, 'entropy/response_mean'):.3f} | {tail(rows, 'reward/mean'):.3f} | "
                     f"{np.median([row['time/step_s'] for row in rows[1:]]):.2f} |")
    first = ends[0][3][0]
    lines.append(f"| the base | | {first['eval/pass@1']:.3f} | {first['eval/pass@8']:.3f} | | | |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    everything = [method for method in METHODS if method != "quadrant"]  # GRPO at its defaults
    parser.add_argument("--methods", nargs="+", default=everything)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    args = parser.parse_args()
    settings = {method: ["--method", method] for method in args.methods}
    runs = run_all(settings, args.seeds, RUNS, RESULTS / "compare", args.workers)
    name = "-".join(args.methods) if args.methods != everything else "methods"
    text = table(runs, args.seeds)
    (RESULTS / f"{name}.md").write_text(f"`python -m experiments.compare {' '.join(sys.argv[1:])}`\n\n{text}\n")
    if len(args.methods) <= 8:  # more lines than that nobody can read
        plot_curves(runs, RESULTS / f"{name}.png", usual_panels(runs))
    print(text)


if __name__ == "__main__":
    main()
