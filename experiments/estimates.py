"""Estimates of each token's entropy change against the change by one real step.

    python -m experiments.estimates                       the tiny base, a minute
    python -m experiments.estimates CHECKPOINT ...        and checkpoints of runs, a minute each

A rollout batch of the default task (64 prompts x 8 answers), a step, a forward again on the same
tokens, for 3 batches. Unlike in the theorems, all tokens share the weights. The steps:

    token    plain gradient descent on one token alone, measured there (300 random tokens)
    sgd      the same on the whole batch
    adamw    the default's optimizer, fresh, on the whole batch

Writes results/estimates.md, .json and .png.
"""

import copy
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import train  # first: it sets what torch reads when it is imported
import torch
import torch.distributed as dist
from transformers import AutoTokenizer

import tiny
from data import render_all
from entropy import NEEDED_STATISTICS, change_estimates
from experiments.runs import table, write_page
from experiments.stats import spearman
from losses import group_advantages
from policy import batch_statistics, build_policy, full_tensors
from rollout import collate, make_engine, sample_batch

RESULTS = Path("experiments/results")
SEEDS = (0, 1, 2)
TOKENS = 300  # that are stepped alone
STEPS = ("token", "sgd", "adamw")
COLUMNS = ("Pearson", "Spearman", "MSE", "right signs")


# ---- measuring -----------------------------------------------------------------------------------


def batch_and_policy(folder, seed):
    """A rollout batch as train.py samples it, the policy that did, the settings."""
    flags = f"--seed {seed} --engine torch --name estimates"
    cfg = train.parse(flags.split())
    device = torch.device("cpu")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sets = train.load_sets(cfg.data, "train")
    problems, prompts = render_all(sets, tokenizer, cfg.max_prompt_len)
    policy = build_policy(folder, cfg, device, torch.float32)
    engine = make_engine(
        "torch",
        folder,
        dtype=torch.float32,
        device=device,
        stop_ids={tokenizer.eos_token_id},
        max_model_len=cfg.max_prompt_len + cfg.max_response_len,
        trust_remote_code=False,
    )
    engine.push_weights(full_tensors(policy.model))
    answers = sample_batch(engine, tokenizer, problems, prompts, 0, cfg)[0]
    rewards = torch.tensor([answer["reward"] for answer in answers])
    advantages = group_advantages(rewards, cfg.group_size, cfg.adv_norm)
    batch = collate(answers, advantages, device)
    batch["loss_mask"] = batch["response_mask"]
    batch["to_run"] = torch.ones(len(answers), dtype=torch.bool)
    return batch, policy, cfg


def changes_alone(policy, batch, old, cfg, lr):
    """(B, T): H after a step of plain gradient descent on that token alone, minus H before.

    It is nan where no token was drawn.
    """
    changes = torch.full_like(old["token_entropy"], float("nan"))
    candidates = (batch["advantages"] != 0).nonzero()
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(0))
    for i, t in candidates[order[:TOKENS]].tolist():
        row = {name: tensor[i : i + 1] for name, tensor in batch.items()}
        row_before = {name: tensor[i : i + 1] for name, tensor in old.items()}
        row["loss_mask"] = torch.arange(changes.shape[1])[None] == t
        changes[i, t] = changes_together(policy, row, row_before, "sgd", cfg, lr)[0, t]
    return changes


def changes_together(policy, batch, old, step, cfg, lr):
    """(B, T): H after one step on the batch, of a copy of the policy, minus H before."""
    policy = copy.deepcopy(policy)
    cfg = copy.copy(cfg)
    if step == "sgd":
        optimizer = torch.optim.SGD(policy.parameters(), lr)
        cfg.grad_clip = float("inf")
    else:
        optimizer = torch.optim.AdamW(
            policy.parameters(), lr, betas=(0.9, 0.95), weight_decay=cfg.weight_decay
        )
    tensors = {"advantages": batch["advantages"], "old_log_probs": old["log_probs"]}
    rows = list(range(len(batch["ids"])))
    train.update(policy, optimizer, batch, tensors, rows, [rows], {}, cfg)
    after = batch_statistics(policy, batch, ["token_entropy"], [rows])
    return after["token_entropy"] - old["token_entropy"]


def compare(estimate, measured):
    """COLUMNS for an estimate and the measured changes of n tokens.

    Equal contexts change alike: ties share a rank.
    """
    scale = (estimate @ measured) / (estimate @ estimate)
    error = np.mean((measured - estimate * scale) ** 2) / np.mean(measured**2)
    pearson = np.corrcoef(estimate, measured)[0, 1]
    right_signs = np.mean(estimate * measured > 0)
    return pearson, spearman(estimate, measured), error, right_signs


def measure(folder, lr):
    """(numbers, notes, clouds) of a policy.

    numbers: {(step, estimate): (batches, COLUMNS)}; notes: a line per batch; clouds: of the last
    batch {step: (exact estimate, measured)}.
    """
    rows = {}
    notes = []
    clouds = {}
    for seed in SEEDS:
        batch, policy, cfg = batch_and_policy(folder, seed)
        all_rows = [list(range(len(batch["ids"])))]
        old = batch_statistics(policy, batch, NEEDED_STATISTICS, all_rows)
        estimates = change_estimates(
            *[old[name] for name in NEEDED_STATISTICS],
            batch["advantages"],
            batch["response_mask"],
        )
        changes = {
            "token": changes_alone(policy, batch, old, cfg, lr / 10),
            "sgd": changes_together(policy, batch, old, "sgd", cfg, lr),
            "adamw": changes_together(policy, batch, old, "adamw", cfg, cfg.lr),
        }
        half_a_step = changes_together(policy, batch, old, "sgd", cfg, lr / 2)
        linear = np.corrcoef(half_a_step.flatten(), changes["sgd"].flatten())[0, 1]
        note = (
            f"- Batch {seed}: Pearson of sgd's change with half a step's {linear:.4f}; "
            "root mean squares, nats:"
        )
        for step, change in changes.items():
            chosen = (batch["advantages"] != 0) & ~change.isnan()
            measured = change[chosen].double().numpy()
            size = np.sqrt(np.mean(measured**2))
            note += f" {step} {size:.1e} ({len(measured):,} tokens)"
            clouds[step] = (estimates["exact"][chosen].double().numpy(), measured)
            for name, estimate in estimates.items():
                found = compare(estimate[chosen].double().numpy(), measured)
                rows.setdefault((step, name), []).append(found)
        notes.append(note)
    numbers = {key: np.array(values) for key, values in rows.items()}
    return numbers, notes, clouds


# ---- the figure ----------------------------------------------------------------------------------


def draw(numbers, clouds):
    """Above, Pearson and Spearman of every estimate and step: mean and range over the batches.
    Below, the tokens of one batch, on axes that are linear near 0 and logarithmic beyond, as a few
    tokens are far out."""
    above = ["Pearson"] * 3 + ["Spearman"] * 3
    below = [step for step in STEPS for _ in range(2)]
    figure, axes = plt.subplot_mosaic([above, below], figsize=(10, 7), constrained_layout=True)
    for column in range(2):
        draw_bars(axes[COLUMNS[column]], numbers, column)
    axes["Spearman"].legend(fontsize=9)
    for step, (estimate, measured) in clouds.items():
        draw_cloud(axes[step], step, estimate, measured)
    axes["token"].set_ylabel("measured dH / root mean square")
    figure.savefig(RESULTS / "estimates.png", dpi=120)


def draw_bars(axis, numbers, column):
    """One of COLUMNS: a group of bars per step, a bar per estimate."""
    estimates = dict.fromkeys(name for _, name in numbers)
    for i, name in enumerate(estimates):
        r = np.array([numbers[step, name][:, column] for step in STEPS])
        spread = (r.mean(1) - r.min(1), r.max(1) - r.mean(1))
        places = np.arange(len(STEPS)) + 0.2 * (i - 1.5)
        axis.bar(places, r.mean(1), 0.19, yerr=spread, capsize=3, label=name)
    title = f"{COLUMNS[column]}, estimated and measured"
    axis.set(xticks=range(3), xticklabels=STEPS, ylim=(0, 1), title=title)
    axis.grid(axis="y", alpha=0.3)


def draw_cloud(axis, step, estimate, measured):
    """A point per token, both in units of their root mean square."""
    estimate = estimate / np.sqrt(np.mean(estimate**2))
    measured = measured / np.sqrt(np.mean(measured**2))
    ticks = (-10, -0.1, 0, 0.1, 10)
    axis.plot(estimate, measured, ".", markersize=3, alpha=0.4)
    axis.set_xscale("symlog", linthresh=0.01)
    axis.set_yscale("symlog", linthresh=0.01)
    axis.set(xticks=ticks, yticks=ticks)
    axis.set(title=f"step: {step}", xlabel="exact estimate / root mean square")
    axis.grid(alpha=0.3)


# ---- the page ------------------------------------------------------------------------------------


def section(title, numbers, notes):
    """A policy's section of the page."""
    rows = []
    for (step, name), values in numbers.items():
        cells = [f"{x.mean():.3f} ({x.min():.3f} to {x.max():.3f})" for x in values.T]
        rows.append([step, name, *cells])
    lines = "\n".join(notes)
    return f"## {title}\n\n{lines}\n\n{table(['step', 'estimate', *COLUMNS], rows)}\n\n"


def as_json(numbers):
    """{step: {estimate: [{column: number} of each batch]}}."""
    nested = {}
    for (step, name), values in numbers.items():
        batches = [dict(zip(COLUMNS, np.round(batch, 4).tolist())) for batch in values]
        nested.setdefault(step, {})[name] = batches
    return nested


def main(checkpoints):
    dist.init_process_group("gloo")
    numbers, notes, clouds = measure(tiny.base_model(), lr=1e-3)
    draw(numbers, clouds)
    text = section("the tiny base", numbers, notes)
    found = {"the tiny base": as_json(numbers)}
    for checkpoint in checkpoints:
        # A trained policy is more sensitive: a smaller step.
        numbers, notes, clouds = measure(checkpoint, lr=1e-4)
        text += section(checkpoint, numbers, notes)
        found[checkpoint] = as_json(numbers)
    command = " ".join(["python -m experiments.estimates", *checkpoints])
    write_page(RESULTS / "estimates.md", f"`{command}`", text)
    (RESULTS / "estimates.json").write_text(json.dumps(found, indent=1))
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
