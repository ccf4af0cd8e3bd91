"""Estimates of each token's entropy change against the change by one real step, where all tokens share weights.

    python -m experiments.microscope [CHECKPOINT ...]       the tiny base, then checkpoints of runs; a minute each

A rollout batch of the default (64 prompts × 8 answers), a step, a forward again on the same tokens; 3 batches. Steps:
"token", plain gradient descent on one token alone, measured there (300 random tokens); "sgd", the same on the batch;
"adamw", the default's optimizer, fresh, on the batch. Tokens with A ≠ 0. MSE: after the best scale, as a share of the
measured mean square, so that an estimate of 0 has 1. Mean and range over the batches.
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

import tiny, verify
from entropy import MICROSCOPE, build_policy, estimates, score_all
from experiments.over_seeds import spearman
from rollout import collate, full_tensors, make_engine, rollout_batch

SEEDS, RESULTS, TOKENS = (0, 1, 2), Path("experiments/results"), 300
STEPS, COLUMNS = ("token", "sgd", "adamw"), ("Pearson", "Spearman", "MSE", "right signs")


def batch_and_policy(folder, seed):
    """A rollout batch as train.py samples it, the policy that did, the settings."""
    cfg = train.parse(f"--seed {seed} --engine torch --name microscope --micro_batch_tokens 1000000".split())
    device, tokenizer = torch.device("cpu"), AutoTokenizer.from_pretrained(folder)
    problems, prompts = verify.render_all(verify.load_sets(cfg.data, "train"), tokenizer, cfg.max_prompt_len)
    policy = build_policy(folder, cfg, device, torch.float32)
    engine = make_engine("torch", folder, dtype=torch.float32, device=device, stop_ids={tokenizer.eos_token_id},
                         max_model_len=cfg.max_prompt_len + cfg.max_response_len, trust_remote_code=False)
    engine.push_weights(full_tensors(policy.model))
    batch = collate(rollout_batch(engine, tokenizer, problems, prompts, 0, cfg)[0], device)
    return batch | {"loss_mask": batch["response_mask"]}, policy, cfg


def entropy_changes(policy, batch, old, step, cfg, lr):
    """(B, T): H after one step minus H before; "token": nan where no token was drawn."""
    if step == "token":
        drawn, changes = (batch["advantages"] != 0).nonzero(), torch.full_like(old["token_entropy"], float("nan"))
        for i, t in drawn[torch.randperm(len(drawn), generator=torch.Generator().manual_seed(0))[:TOKENS]].tolist():
            row, before = ({name: x[i:i + 1] for name, x in tensors.items()} for tensors in (batch, old))
            row["loss_mask"] = torch.arange(changes.shape[1])[None] == t
            changes[i, t] = entropy_changes(policy, row, before, "sgd", cfg, lr)[0, t]
        return changes
    policy, cfg = copy.deepcopy(policy), copy.copy(cfg)
    optimizer = torch.optim.AdamW(policy.parameters(), lr, betas=(0.9, 0.95), weight_decay=cfg.weight_decay)
    if step == "sgd":
        optimizer, cfg.grad_clip = torch.optim.SGD(policy.parameters(), lr), float("inf")
    tensors = {"advantages": batch["advantages"], "old_log_probs": old["log_probs"]}
    train.update(policy, optimizer, batch, tensors, list(range(len(batch["ids"]))), {}, cfg)
    return score_all(policy, batch, ["token_entropy"], 10**6, 1)["token_entropy"] - old["token_entropy"]


def compare(e, m):
    """COLUMNS for an estimate and the measured changes of n tokens. Equal contexts change alike: ties share a rank."""
    error = np.mean((m - e * (e @ m) / (e @ e)) ** 2) / np.mean(m**2)
    return np.corrcoef(e, m)[0, 1], spearman(e, m), error, np.mean(e * m > 0)


def measure(folder, lr):
    """{(step, estimate): (seeds, COLUMNS)}, a line per batch, and of the last batch {step: (exact, measured)}."""
    rows, notes, clouds = {}, "", {}
    for seed in SEEDS:
        batch, policy, cfg = batch_and_policy(folder, seed)
        old = score_all(policy, batch, MICROSCOPE, 10**6, 1)
        found = estimates(*(old[name] for name in MICROSCOPE), batch["advantages"], batch["response_mask"])
        of = lambda step, lr: entropy_changes(policy, batch, old, step, cfg, lr)
        changes = {"token": of("token", lr / 10), "sgd": of("sgd", lr), "adamw": of("adamw", cfg.lr)}
        linear = np.corrcoef(of("sgd", lr / 2).flatten(), changes["sgd"].flatten())[0, 1]
        notes += f"\n- Batch {seed}: Pearson of sgd's change with half a step's {linear:.4f}; root mean squares, nats:"
        for step, change in changes.items():
            kept = (batch["advantages"] != 0) & ~change.isnan()
            m = change[kept].double().numpy()
            notes += f" {step} {np.sqrt(np.mean(m**2)):.1e} ({len(m):,} tokens)"
            clouds[step] = found["exact"][kept].double().numpy(), m
            for name, x in found.items():
                rows.setdefault((step, name), []).append(compare(x[kept].double().numpy(), m))
    return {key: np.array(values) for key, values in rows.items()}, notes, clouds


def figure(rows, clouds):
    """On the base: Pearson and Spearman of every estimate and step, mean and range over the batches; below, a batch's
    tokens. Those axes are linear near 0 and logarithmic beyond, as a few tokens are far out."""
    canvas, axes = plt.subplot_mosaic([["Pearson"] * 3 + ["Spearman"] * 3, [s for s in STEPS for _ in range(2)]],
                                      figsize=(10, 7), constrained_layout=True)
    for column in range(2):
        axis = axes[COLUMNS[column]]
        for i, name in enumerate(dict.fromkeys(name for _, name in rows)):
            r = np.array([rows[step, name][:, column] for step in STEPS])
            spread, places = (r.mean(1) - r.min(1), r.max(1) - r.mean(1)), np.arange(len(STEPS)) + 0.2 * (i - 1.5)
            axis.bar(places, r.mean(1), 0.19, yerr=spread, capsize=3, label=name)
        axis.set(xticks=range(3), xticklabels=STEPS, ylim=(0, 1), title=f"{COLUMNS[column]}, estimated and measured")
        axis.grid(axis="y", alpha=0.3)
    axes["Spearman"].legend(fontsize=9)
    for step, (estimate, measured) in clouds.items():
        estimate, measured = (x / np.sqrt(np.mean(x**2)) for x in (estimate, measured))
        axes[step].plot(estimate, measured, ".", markersize=3, alpha=0.4)
        axes[step].set_xscale("symlog", linthresh=0.01)
        axes[step].set_yscale("symlog", linthresh=0.01)
        axes[step].set(xticks=(-10, -0.1, 0, 0.1, 10), yticks=(-10, -0.1, 0, 0.1, 10))
        axes[step].set(title=f"step: {step}", xlabel="exact estimate / root mean square")
        axes[step].grid(alpha=0.3)
    axes["token"].set_ylabel("measured dH / root mean square")
    canvas.savefig(RESULTS / "microscope.png", dpi=120)


def main():
    dist.init_process_group("gloo")
    text = f"`python -m experiments.microscope {' '.join(sys.argv[1:])}`\n\n{__doc__.split(chr(10) * 2)[2]}"
    numbers = {}
    for folder in (tiny.base_model(), *sys.argv[1:]):  # a trained policy is more sensitive: a smaller step
        rows, notes, clouds = measure(folder, 1e-4 if folder in sys.argv else 1e-3)
        folder in sys.argv or figure(rows, clouds)
        where = folder if folder in sys.argv else "the tiny base"
        text += f"\n## {where}\n{notes}\n\n| step | estimate | {' | '.join(COLUMNS)} |\n{'|---' * 6}|\n"
        for (step, name), v in rows.items():
            cells = [f"{x.mean():.3f} ({x.min():.3f} to {x.max():.3f})" for x in v.T]
            text += f"| {' | '.join([step, name, *cells])} |\n"
            batches = [dict(zip(COLUMNS, np.round(batch, 4).tolist())) for batch in v]
            numbers.setdefault(where, {}).setdefault(step, {})[name] = batches
    (RESULTS / "microscope.md").write_text(text)
    (RESULTS / "microscope.json").write_text(json.dumps(numbers, indent=1))
    print(text)


if __name__ == "__main__":
    main()
