"""The runs behind findings.py and methods.py: trains what is missing, reads what is there.

    python -m experiments.runs           lists the runs: committed, trained but not committed
    python -m experiments.runs commit    adds the latter to the committed ones

experiments/results/runs.jsonl.gz holds the committed metrics of all runs, a line of JSON for each
step of each run: {"run": "grpo-seed0", "step": 0, ...}. Beside it, settings.json holds the flags
of train.py that each setting has; a setting has one run per seed, NAME-seedN. Whatever is not
committed is trained in runs/findings/, which git ignores, and read from there. Committed runs are
never trained again: to do that, move runs.jsonl.gz away.

    python diagnose.py experiments/results/runs.jsonl.gz:grpo-seed0      reads one of them
"""

import argparse
import gzip
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rollout import make_engine, sample_and_verify  # first: it sets what torch reads at import
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from data import render_all
from diagnose import read_metrics, read_runs
from policy import full_tensors
from record import json_lines, write_whole
from train import load_sets

RESULTS = Path("experiments/results")
TRAINED = Path("runs/findings")

# The metrics that are committed, beside all of an evaluation and the token covariances of step 1.
KEPT = (
    "step",
    "reward/mean",
    "reward/zero_std_frac",
    "entropy/response_mean",
    "entropy/change_measured",
    "policy/group_cov_mean",
    "policy/group_cov_hard",
    "policy/group_cov_mid",
    "policy/group_cov_easy",
    "response/ngram_diversity",
    "policy/clip_frac",
    "policy/selected_frac",
    "policy/weight_mean",
    "controller/positive_weight",
    "quadrant/pos_likely_dH_share",
    "quadrant/pos_rare_dH_share",
    "quadrant/neg_likely_dH_share",
    "quadrant/neg_rare_dH_share",
    "train/skipped",
    "train/grad_norm",
    "time/step_s",
)


# ---- committed runs ------------------------------------------------------------------------------


def read_committed():
    """{run: rows} of all committed runs; {} if there is no file."""
    file = RESULTS / "runs.jsonl.gz"
    return read_runs(file) if file.exists() else {}


def write_committed(runs):
    """Replaces the committed runs by these, {run: rows}; the same runs give the same bytes."""
    rows = []
    for name in sorted(runs):
        for row in runs[name]:
            rows.append({"run": name} | row)
    file = RESULTS / "runs.jsonl.gz"
    new = file.with_suffix(".new")
    new.write_bytes(gzip.compress(json_lines(rows).encode(), mtime=0))
    new.rename(file)


def compact(rows):
    """The rows with only the metrics to commit, in four significant digits."""
    compacted = []
    for row in rows:
        kept = {}
        for key, value in row.items():
            if is_kept(key, row["step"]):
                kept[key] = float(f"{value:.4g}") if isinstance(value, float) else value
        compacted.append(kept)
    return compacted


def is_kept(key, step):
    """Whether a metric of this step is committed."""
    if step == 1 and key.startswith("policy/cov_"):
        return True
    return key in KEPT or key.startswith("eval/")


def read_flags(folder):
    """{setting: its flags} of the folder's settings.json; {} without one."""
    file = folder / "settings.json"
    return json.loads(file.read_text()) if file.exists() else {}


def write_flags(folder, flags):
    write_whole(folder / "settings.json", json.dumps(flags, indent=1) + "\n")


def check_flags(settings):
    """ValueError if there are runs of other flags under a name of these settings."""
    for folder in (RESULTS, TRAINED):
        known = read_flags(folder)
        for name, flags in settings.items():
            if known.get(name, flags) != flags:
                raise ValueError(
                    f"{folder} has runs {name} with {known[name]}, not {flags}: give the setting "
                    f"another name, or delete {name}-seed* and the line of {name} in "
                    f"{folder / 'settings.json'}"
                )


def commit():
    """Adds what was trained to the committed runs, with its flags. Returns the names."""
    committed = read_committed()
    added = {}
    for name in trained_names():
        if name not in committed:
            added[name] = compact(read_metrics(TRAINED / name))
    if added:
        trained_flags = read_flags(TRAINED)
        settings = {name.rpartition("-seed")[0] for name in added}
        new_flags = {name: trained_flags[name] for name in trained_flags if name in settings}
        write_committed(committed | added)
        write_flags(RESULTS, read_flags(RESULTS) | new_flags)
    return list(added)


# ---- training ------------------------------------------------------------------------------------


def finished(folder):
    """Whether train.py did all steps of the run in this folder."""
    if not (folder / "metrics.jsonl").exists():
        return False
    rows = read_metrics(folder)
    steps = json.loads((folder / "config.json").read_text())["steps"]
    return bool(rows) and rows[-1]["step"] == steps


def trained_names():
    """The finished runs in TRAINED."""
    return [folder.name for folder in sorted(TRAINED.glob("*-seed*")) if finished(folder)]


def train(name, flags):
    """Runs train.py with these flags beside the default ones, in one thread.

    An interrupted run goes on, and a finished one is left alone.
    """
    folder = TRAINED / name
    if finished(folder):
        return
    command = [sys.executable, "train.py", *flags.split()]
    command += ["--out", str(TRAINED), "--name", name]
    has_checkpoint = bool(list(folder.glob("checkpoint-*")))
    command.append("--resume" if has_checkpoint else "--overwrite")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(TRAINED / f"{name}.log", "a") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log, env=environment)
    if not finished(folder):  # SIGTERM: exit code 0, with a checkpoint
        raise SystemExit(f"{name} was stopped; the same command goes on with it")


def train_missing(settings, seeds, workers):
    """Trains the runs of these settings, {name: flags}, that are neither committed nor trained.

    First the first seed of all settings, then the second, `workers` runs at a time, with a bar.
    """
    check_flags(settings)
    committed = read_committed()
    missing = {}
    for seed in seeds:
        for setting, flags in settings.items():
            name = f"{setting}-seed{seed}"
            if name not in committed and not finished(TRAINED / name):
                missing[name] = f"{flags} --seed {seed}"
    if not missing:
        return
    TRAINED.mkdir(parents=True, exist_ok=True)
    write_flags(TRAINED, read_flags(TRAINED) | settings)
    prepare(missing.values())
    with ThreadPoolExecutor(workers) as pool:
        done = pool.map(train, missing.keys(), missing.values())
        for _ in tqdm(done, "runs", len(missing)):
            pass


def prepare(all_flags):
    """Makes the bases and problems that runs of these flags want, before two of them do."""
    words = set()
    sizes = set()
    for flags in all_flags:
        listed = flags.split()
        words |= set(listed)
        sizes.add(listed[listed.index("--model") + 1] if "--model" in listed else "tiny")
    for size in sizes & set(tiny.SIZES):
        tiny.base_model(size=size)
    if words & {str(path) for path in HALVES.values()}:
        write_halves()


def read_available(settings, seeds):
    """{setting: [rows of each seed]} of those settings whose runs are all committed or trained."""
    committed = read_committed()
    available = {}
    for setting in settings:
        names = [f"{setting}-seed{seed}" for seed in seeds]
        found = []
        for name in names:
            if name in committed:
                found.append(committed[name])
            elif finished(TRAINED / name):
                found.append(compact(read_metrics(TRAINED / name)))
        if len(found) == len(names):
            available[setting] = found
    return available


# ---- the default training problems in two halves -------------------------------------------------

HALVES = {
    "easy": Path("runs/difficulty-easy.jsonl"),
    "hard": Path("runs/difficulty-hard.jsonl"),
}


def write_halves(n=16):
    """Splits the default training problems by how many of n answers of the base are right.

    It takes a minute, and nothing if both files are there.
    """
    if all(path.exists() for path in HALVES.values()):
        return
    folder = tiny.base_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    longest_prompt = tiny.DEFAULTS["max_prompt_len"]
    longest_response = tiny.DEFAULTS["max_response_len"]
    sets = load_sets(["countdown"], "train")
    problems, prompts = render_all(sets, tokenizer, longest_prompt)
    engine = make_engine(
        "torch",
        folder,
        dtype=torch.float32,
        device=torch.device("cpu"),
        trust_remote_code=False,
        stop_ids={tokenizer.eos_token_id},
        max_model_len=longest_prompt + longest_response,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    engine.push_weights(full_tensors(model))
    groups = sample_and_verify(
        engine,
        tokenizer,
        problems,
        prompts,
        range(0, n * len(problems), n),
        n=n,
        max_tokens=longest_response,
        temperature=1.0,
    )
    solved = [group[0]["group_accuracy"] for group in groups]
    easiest_first = sorted(range(len(problems)), key=lambda i: -solved[i])
    middle = len(problems) // 2
    write_half("easy", easiest_first[:middle], problems, solved)
    write_half("hard", easiest_first[middle:], problems, solved)


def write_half(half, chosen, problems, solved):
    """Writes the chosen problems in their old order, in verl's schema."""
    rows = []
    for i in sorted(chosen):
        gold = json.loads(problems[i].answer)
        rows.append({"prompt": problems[i].prompt, "reward_model": {"ground_truth": gold}})
    write_whole(HALVES[half], json_lines(rows))
    share = sum(solved[i] for i in chosen) / len(rows)
    print(f"{HALVES[half]}: {len(rows)} problems, the base solves {share:.3f}")


# ---- pages of results ----------------------------------------------------------------------------

MARK = "<!-- From here on the page is written by"


def write_page(file, command, text):
    """Replaces what the command wrote on a page of results; what stands above the mark stays."""
    old = file.read_text() if file.exists() else ""
    head, _, _ = old.partition(MARK)
    file.write_text(f"{head}{MARK} {command}. -->\n\n{text.strip()}\n")


def table(titles, rows):
    """A Markdown table of rows of cells."""
    lines = []
    for cells in (titles, ["---"] * len(titles), *rows):
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


# ---- command line --------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", nargs="?", choices=["list", "commit"], default="list")
    args = parser.parse_args()
    if args.action == "commit":
        added = commit()
        print(f"{len(added)} runs added: {' '.join(added)}")
        return
    committed = read_committed()
    for name, rows in committed.items():
        print(f"{name}: {rows[-1]['step']} steps, committed")
    for name in trained_names():
        if name not in committed:
            print(f"{name}: trained, not committed")


if __name__ == "__main__":
    main()
