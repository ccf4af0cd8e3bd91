"""Every method once on the default task, from the same base and seed: results/methods.md.

    python -m experiments.methods               the table, of all methods
    python -m experiments.methods --figure      results/three_methods.png: GRPO, Clip-Cov and KL-Cov
    python -m experiments.methods --readme      the README's table of what each method does

Committed runs (runs.py) are read, others are trained first, two at a time.
"""

import argparse
from pathlib import Path

import numpy as np

from diagnose import plot_curves, usual_panels
from experiments import findings
from experiments.runs import read_available, table, train_missing, write_page
from experiments.stats import H, PASS_AT_1, REWARD, at_end, last
from losses import CONTROLLERS, IDLE_WITH_ONE_UPDATE, MASKS, METHODS
from rollout import BATCH_EDITS
from train import wanted_tensors

RESULTS = Path("experiments/results")

# The runs of findings.py that have their method's default knobs: these are not trained twice.
SHARED = {
    "clip_cov": "clip_cov-0.02",
    "kl_cov": "kl_cov-0.02",
}
# findings.py evaluates GRPO with 64 answers per problem. A comparison wants as many for all.
GRPO = "grpo-16-samples"
TITLES = (
    "method",
    "pass@1",
    "pass@8",
    "entropy, last 10 steps",
    "reward, last 10 steps",
    "s/step (median)",
)


def setting_of(method):
    """The name that the method's runs have, at its default settings."""
    if method == "grpo":
        return GRPO
    return SHARED.get(method, f"{method}-default")


def flags_of(method):
    """The flags of train.py with which these were trained."""
    if method in SHARED:
        return findings.flags_of(SHARED[method])
    return f"--method {method}"


def methods_table(runs):
    """runs: {method: rows}. A line per method, the best pass@1 first; then the base."""
    lines = []
    best_first = sorted(runs, key=lambda method: (-last(runs[method], PASS_AT_1), method))
    for method in best_first:
        rows = runs[method]
        seconds = np.median([row["time/step_s"] for row in rows[1:]])
        lines.append(
            [
                f"`{method}`",
                f"{last(rows, PASS_AT_1):.3f}",
                f"{last(rows, 'eval/pass@8'):.3f}",
                f"{at_end(rows, H):.3f}",
                f"{at_end(rows, REWARD):.3f}",
                f"{seconds:.2f}",
            ]
        )
    base = runs[best_first[-1]][0]
    pass_at_1 = f"{base[PASS_AT_1]:.3f}"
    pass_at_8 = f"{base['eval/pass@8']:.3f}"
    lines.append(["the base", pass_at_1, pass_at_8, "", "", ""])
    return table(TITLES, lines)


def write_table(workers):
    """Trains what is missing, and writes the table of all methods."""
    methods = [name for name in METHODS if name != "quadrant"]  # which at its defaults is GRPO
    settings = {setting_of(method): flags_of(method) for method in methods}
    train_missing(settings, [0], workers)
    available = read_available(settings, [0])
    runs = {method: available[setting_of(method)][0] for method in methods}
    text = methods_table(runs)
    write_page(RESULTS / "methods.md", "`python -m experiments.methods`", text)
    print(text)


def draw_figure(workers):
    """Entropy, reward, pass@1 and pass@8 of the three shared settings, over the findings' seeds."""
    methods = ["grpo", *SHARED]
    settings = {setting_of(method): flags_of(method) for method in methods}
    train_missing(settings, findings.SEEDS, workers)
    available = read_available(settings, findings.SEEDS)
    runs = {method: available[setting_of(method)] for method in methods}
    plot_curves(runs, RESULTS / "three_methods.png", usual_panels(runs))


# ---- the README's table --------------------------------------------------------------------------

# method: (what it does to which tokens, paper, what it was checked against). Likely or rare and
# right or wrong are the four kinds of token of the README's example.
NOTES = {
    "grpo": ("the baseline: clips all alike", "2402.03300", "**numbers**"),
    "clip_higher": ("lets rare right tokens grow further", "2503.14476", "**numbers**"),
    "entropy_bonus": ("rewards the entropy of all", "2505.22617", "paper"),
    "kl_loss": ("ties all to a reference", "2402.03300", "paper"),
    "clip_cov": ("drops some likely right, rare wrong", "2505.22617", "**numbers**"),
    "kl_cov": ("ties likely right, rare wrong to the sampler", "2505.22617", "**numbers**"),
    "steer": ("weighs all by predicted entropy change", "2510.10150", "**numbers**"),
    "par": ("weighs right tokens", "2511.05993", "notes"),
    "rand_pos_clip": ("drops right tokens at random, a control", "2511.05993", "notes"),
    "quadrant": ("weighs any of the four kinds, a control", "2510.10150", "ours"),
    "w_reinforce": ("fixed advantages, no baseline", "2506.01347", "code"),
    "entropy_advantage": ("adds entropy to advantages", "2506.14758", "paper"),
    "entropic": ("weighs confident right against wrong", "2511.15248", "code"),
    "dcpo": ("REINFORCE on right, at another temperature", "2510.08141", "code"),
    "aepo": ("mixes in right answers of another temperature", "2510.08141", "code"),
    "flex_clip": ("clips by the token's probability", "2602.09782", "paper, notes"),
    "ce_gppo": ("keeps a bounded gradient where clipped", "2509.20712", "code"),
    "cispo": ("clips weights, keeps all gradients", "2506.13585", "code"),
    "gspo": ("one ratio and clip per answer", "2507.18071", "code"),
    "fork_tokens": ("learns from the most uncertain only", "2506.01939", "notes"),
    "adaptive_entropy": ("bonus below a target", "2505.22312", "code"),
    "aer": ("bonus, larger for hard prompts", "2510.10959", "ours"),
    "siren": ("holds the entropy of the most uncertain", "2509.25133", "code"),
    "clip_b": ("drops rare wrong outliers", "2602.03392", "code"),
    "clip_v": ("the same, by the exact change", "2602.03392", "code"),
}
README = Path("README.md")
BEGIN = "<!-- methods: python -m experiments.methods --readme -->"
END = "<!-- end of methods -->"


def state_of(method):
    """What a method has beside its loss."""
    if method in BATCH_EDITS:
        return "second sample"
    if method in CONTROLLERS:
        return "controller"
    return "mask" if method in MASKS else ""


def readme_table():
    """A line per method of NOTES; without spaces at the bars, as lines are long."""
    lines = ["|`--method`|does what to which tokens|needs|1 update|state|paper|checked|"]
    lines.append("|---|---|---|---|---|---|---|")
    for method, (does, paper, checked) in NOTES.items():
        needs = ", ".join(f"`{name}`" for name in wanted_tensors(method))
        same = method in IDLE_WITH_ONE_UPDATE or method in ("grpo", "cispo")
        one_update = "no" if same else "yes"
        link = f"[{paper}](https://arxiv.org/abs/{paper})"
        cells = [f"`{method}`", does, needs, one_update, state_of(method), link, checked]
        lines.append(f"|{'|'.join(cells)}|")
    return "\n".join(lines)


def write_readme():
    before, _, rest = README.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}\n{readme_table()}\n{END}{after}")


# ---- command line --------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figure", action="store_true", help="draw the figure, not the table")
    parser.add_argument("--readme", action="store_true", help="write the README's table")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    args = parser.parse_args()
    if args.figure:
        draw_figure(args.workers)
    elif args.readme:
        write_readme()
    else:
        write_table(args.workers)


if __name__ == "__main__":
    main()
