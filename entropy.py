"""Entropy: exact log-probs and entropies of given tokens, and the measures that are logged at every step.

The policy entropy of a response token is H_t = -sum_v pi(v) log pi(v) over the whole vocabulary, in nats, at the
sampling temperature. Logits of shape (B, T, V) in float32 are what runs out of memory first (8 x 1,024 tokens of a 152k
vocabulary are 5 GB, several times over in backward), so they exist for `chunk_tokens` tokens at a time only.
"""
import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from safetensors import SafetensorError
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from losses import token_covariance
from record import SUSPICIOUS, method_of, plot_curves, read_metrics, usual_panels
from rollout import micro_batches, total


# ---- log-probs and entropy from hidden states ------------------------------------------------------------------------

# Statistics of a token: (logp (n, V) float32, the token's id (n,)) -> (n,). Methods and measures ask for them by name.
STATISTICS = {
    "log_probs": lambda logp, token: logp.gather(1, token[:, None]).squeeze(1),
    "token_entropy": lambda logp, token: -(logp.exp() * logp).sum(1),
    "sum_p2": lambda logp, token: (2.0 * logp).exp().sum(1),  # sum over v of pi(v)^2
    "sum_p2_log_p": lambda logp, token: ((2.0 * logp).exp() * logp).sum(1),  # sum over v of pi(v)^2 log pi(v)
    "nucleus_entropy": lambda logp, token: nucleus_entropy(logp),
    # The same token at 1.2 and 0.8 times the temperature: a new softmax, not a division of its log-prob.
    "hot_log_probs": lambda logp, token: torch.log_softmax(logp / 1.2, 1).gather(1, token[:, None]).squeeze(1),
    "cold_log_probs": lambda logp, token: torch.log_softmax(logp / 0.8, 1).gather(1, token[:, None]).squeeze(1),
}


def nucleus_entropy(logp, mass=0.8):
    """Entropy (n,) in nats of the smallest set of tokens with at least `mass` of the probability, renormalised. logp
    (n, V)."""
    ordered = logp.sort(dim=1, descending=True).values
    before = ordered.exp().cumsum(1) - ordered.exp()  # of the tokens that are likelier
    kept = torch.log_softmax(ordered.masked_fill(before.detach() >= mass, -1e9), 1)  # finite: -inf would make 0 * inf
    return -(kept.exp() * kept).sum(1)


def token_statistics(hidden, head, tokens, temperature, wanted, chunk_tokens=512):
    """The wanted STATISTICS of N tokens, without ever holding (N, V).

    hidden (N, D): the state that predicts each token; head: D -> V; tokens (N,) ids; returns {name: (N,) float32}.
    The temperature divides the logits, once, before the softmax: dividing log-probs by it is another distribution.
    With gradient, each chunk's logits are computed again in backward instead of kept.
    """
    def one_chunk(hidden, tokens):
        logp = torch.log_softmax(head(hidden).float() / temperature, dim=-1)
        return tuple(STATISTICS[name](logp, tokens) for name in wanted)

    chunks = []
    for h, t in zip(hidden.split(chunk_tokens), tokens.split(chunk_tokens)):
        chunks.append(checkpoint(one_chunk, h, t, use_reentrant=False) if torch.is_grad_enabled() else one_chunk(h, t))
    return {name: torch.cat(parts) for name, parts in zip(wanted, zip(*chunks))}


class Policy(nn.Module):
    """A Hugging Face causal language model that scores given responses; what DDP and FSDP2 wrap."""

    def __init__(self, model, temperature, autocast=torch.float32, chunk_tokens=512):
        """autocast: torch.bfloat16 computes in it on float32 weights (DDP); FSDP2 casts by itself and wants float32."""
        super().__init__()
        self.model, self.temperature, self.autocast, self.chunk_tokens = model, temperature, autocast, chunk_tokens
        for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
            if getattr(model.config, name, None) not in (None, 1, 1.0):
                raise ValueError(f"{model.config.model_type} changes its logits after the head ({name}), which "
                                 "Policy.forward does not do: add it to token_statistics or choose another model")

    def forward(self, ids, prompt_lens, response_mask, wanted=("log_probs",)):
        """ids (B, L): prompt + response, padded on the right; prompt_lens (B,); response_mask (B, T) bool.

        Returns {name: (B, T) float32}, 0 on padding. Padding on the right needs no attention mask and no position ids:
        under causal attention no response token ever sees it.
        """
        row, column = response_mask.nonzero(as_tuple=True)
        position = prompt_lens[row] + column
        with torch.autocast(ids.device.type, self.autocast, enabled=self.autocast != torch.float32):
            hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            found = token_statistics(hidden[row, position - 1], self.model.get_output_embeddings(), ids[row, position],
                                     self.temperature, wanted, self.chunk_tokens)
        padding = torch.zeros(response_mask.shape, device=ids.device)
        return {name: padding.index_put((row, column), values) for name, values in found.items()}


def build_policy(path, cfg, device, dtype):
    """The policy, or a frozen reference, with float32 master weights; --parallel fsdp shards it by decoder layer
    (FSDP2)."""
    transformers_logging.disable_progress_bar()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(  # in host memory, one copy per rank
            path, dtype=torch.float32, trust_remote_code=cfg.trust_remote_code, output_loading_info=True,
            ignore_mismatched_sizes=True)  # they are refused below
    except SafetensorError as error:
        raise ValueError(f"the weights in {path} are truncated or not in safetensors format ({error})") from None
    if info["missing_keys"] or info["mismatched_keys"]:  # transformers would draw them at random
        names = sorted(map(str, info["missing_keys"] or info["mismatched_keys"]))
        raise ValueError(f"{path} does not hold {names[0]} ...: its weights are of another model than its config.json")
    policy = Policy(model, cfg.temperature, dtype if cfg.parallel == "ddp" else torch.float32)
    policy.eval()  # no dropout: the ratio would start away from 1
    layers = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
    if cfg.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in layers:
            layer.training = True  # layers are checkpointed in training mode only; their dropouts stay in eval mode
    if cfg.parallel == "ddp":
        return policy.to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in layers + [policy]:  # moves each shard to the device, never the whole model
        fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32))
    return policy


def score(policy, batch, rows, wanted):
    """The wanted STATISTICS of some rows of a batch (rollout.collate): {name: (b, t)}, t the longest response of the
    rows."""
    mask = batch["response_mask"][rows]
    mask = mask[:, :mask.sum(1).max()]
    return policy(batch["ids"][rows, :batch["lengths"][rows].max()], batch["prompt_lens"][rows], mask, wanted)


@torch.no_grad()
def score_all(policy, batch, wanted, budget, updates):
    """The same of the whole batch, {name: (B, T)}, without gradient, in micro-batches of `budget` padded tokens.

    Split as the `updates` of the batch will be: the same rows in one forward give the same rounding, so that the first
    update sees a ratio of exactly 1. With another split KL-Cov's sign(log r) would act on rounding errors."""
    found = {name: torch.zeros(batch["response_mask"].shape, device=batch["ids"].device) for name in wanted}
    lengths = batch["lengths"].tolist()
    for part in np.array_split(np.arange(len(lengths)), updates):
        for rows in micro_batches(lengths, part.tolist(), budget):
            for name, values in score(policy, batch, rows, wanted).items():
                found[name][rows, :values.shape[1]] = values
    return found


# ---- the measures of one rollout batch -------------------------------------------------------------------------------

MICROSCOPE = ("log_probs", "token_entropy", "sum_p2", "sum_p2_log_p")  # the STATISTICS that measure() reads
QUADRANTS = ("pos_likely", "pos_rare", "neg_likely", "neg_rare")
TOP_FRACTIONS = (0.0002, 0.002, 0.02, 0.2, 1.0)


def entropy_change(log_probs, token_entropy, sum_p2, sum_p2_log_p, advantages):
    """First-order entropy change per token of one policy-gradient step at r = 1, up to the step size. All (B, T).

        dH_t = -A [p (log p + H) - sum_v pi(v)^2 (log pi(v) + H)],   p = pi(y_t)

    Exact to first order for a softmax whose logits all move freely. Dropping the sum gives the sign rule of STEER
    (arXiv 2510.10150, theorem 1), which only moves the sampled token's logit.
    """
    p = log_probs.exp()
    return -advantages * (p * (log_probs + token_entropy) - (sum_p2_log_p + token_entropy * sum_p2))


def estimates(log_probs, token_entropy, sum_p2, sum_p2_log_p, advantages, response_mask):
    """Four first-order estimates of each token's entropy change by one policy-gradient step at r = 1, up to the step
    size: {name: (B, T)}. All arguments (B, T), the first four are the STATISTICS of that name. With p = pi(y_t):

        "exact"           entropy_change, all logits of the position move
        "steer theorem"   -A p (1 - p)(log p + H): the sampled token's logit moves alone. arXiv 2510.10150, theorem 1
        "steer released"  -A (1 - p)(log p + H): the same without the factor p, as released
        "covariance"      -(log p - mean log p)(A - mean A), means over response tokens. arXiv 2505.22617, eq. 10

    More is more entropy. All leave out that the tokens of a batch share weights: a step on one moves the others.
    """
    released = -advantages * (1.0 - log_probs.exp()) * (log_probs + token_entropy)
    return {"exact": entropy_change(log_probs, token_entropy, sum_p2, sum_p2_log_p, advantages),
            "steer theorem": log_probs.exp() * released, "steer released": released,
            "covariance": -token_covariance(log_probs, advantages, response_mask)}


def quadrants(log_probs, token_entropy, advantages, response_mask):
    """{name: (B, T) bool}: sign of A, and whether the token is likely, pi(y_t) > e^-H, or rare. A = 0 is in none."""
    likely = log_probs + token_entropy > 0
    positive, negative = response_mask & (advantages > 0), response_mask & (advantages < 0)
    return dict(zip(QUADRANTS, (positive & likely, positive & ~likely, negative & likely, negative & ~likely)))


def measure(old, advantages, response_mask, total, group_accuracy, group_size):
    """The microscope: what the tokens of a rollout batch say about the entropy, under the policy that sampled them.

    old: {name: (B, T)} with those in MICROSCOPE, of this rank's answers; group_accuracy (B, T); total(x) sums a tensor
    over ranks. Returns {metric: float} over all ranks; only the token covariance is taken per rank and then averaged.
    """
    mask, entropy = response_mask, torch.where(response_mask, old["token_entropy"], 0.0)
    change = entropy_change(*(old[name] for name in MICROSCOPE), advantages)
    parts = quadrants(old["log_probs"], entropy, advantages, mask)
    cov = token_covariance(old["log_probs"], advantages, mask)[mask].sort(descending=True).values
    lengths = mask.sum(1)
    sums = [mask.sum(), lengths.gt(0).sum(), entropy[mask].sum(), (entropy.sum(1) / lengths.clamp(min=1)).sum(),
            old["log_probs"][mask].sum(), change[mask].sum(), change[mask].abs().sum()]
    sums += [cov[:max(1, math.ceil(f * len(cov)))].mean() * len(cov) for f in TOP_FRACTIONS]
    for name in QUADRANTS:
        sums += [parts[name].sum(), change[parts[name]].sum()]
    sums = total(torch.stack([s.double() for s in sums])).tolist()
    tokens, answers, entropy_sum, entropy_means, logp_sum, change_sum, moved, *rest = sums
    metrics = {"entropy/token_mean": entropy_sum / tokens, "entropy/response_mean": entropy_means / answers,
               "entropy/change_predicted": change_sum / tokens, "policy/log_prob_mean": logp_sum / tokens}
    for fraction, value in zip(TOP_FRACTIONS, rest):
        metrics["policy/cov_mean" if fraction == 1 else f"policy/cov_top_{fraction:g}"] = value / tokens
    for name, count, part in zip(QUADRANTS, rest[len(TOP_FRACTIONS)::2], rest[len(TOP_FRACTIONS) + 1::2]):
        metrics[f"quadrant/{name}_frac"] = count / tokens
        metrics[f"quadrant/{name}_dH_share"] = part / moved if moved else 0.0
    return metrics | group_covariance(old["log_probs"], advantages, mask, total, group_accuracy, group_size)


def group_covariance(log_probs, advantages, response_mask, total, group_accuracy, group_size):
    """Covariance of confidence and advantage among the answers to one prompt: {metric: float} over all ranks. All
    tensors (P*G, T), prompt-major; log_probs of the policy that sampled.

        cov_q = 1/G sum_i (l_i - mean l)(A_i - mean A),   l_i = mean over the answer's tokens of log pi(y_t), in nats

    Mean over all prompts q (0 where all rewards are equal), and over those of accuracy in (0, 1/3], (1/3, 2/3) and
    [2/3, 1); a bucket without a prompt at this step has no metric. arXiv 2505.22617 finds it positive, and larger for
    easier prompts. aepo's second answers stand in groups that are not theirs.
    """
    mean_log_prob = torch.where(response_mask, log_probs, 0.0).double().sum(1) / response_mask.sum(1).clamp(min=1)
    l, A = (x.double().view(-1, group_size) for x in (mean_log_prob, advantages[:, 0]))
    cov = ((l - l.mean(1, keepdim=True)) * (A - A.mean(1, keepdim=True))).mean(1)
    accuracy, least, third = group_accuracy[::group_size, 0], 1e-6, 1 / 3 + 1e-6  # in float32, 1/3 is above 1/3
    buckets = {"mean": accuracy >= 0, "hard": (accuracy > least) & (accuracy <= third),
               "mid": (accuracy > third) & (accuracy < 1 - third),
               "easy": (accuracy >= 1 - third) & (accuracy < 1 - least)}
    sums = total(torch.stack([x for part in buckets.values() for x in (cov[part].sum(), part.sum().double())])).tolist()
    return {f"policy/group_cov_{name}": covs / count
            for name, covs, count in zip(buckets, sums[::2], sums[1::2]) if count}


@torch.no_grad()
def entropy_after(policy, batch, old, cfg):
    """What the updates did to the entropy on the contexts they learned from, nats per token over all ranks: the mean of
    H after - H before, old["token_entropy"] (B, T). On each group's first answer only: a forward of 1/G of the batch."""
    entropy_before = old["token_entropy"]
    changes = torch.zeros(2, dtype=torch.float64, device=entropy_before.device)
    for rows in micro_batches(batch["lengths"].tolist(), range(0, len(entropy_before), cfg.group_size),
                              cfg.micro_batch_tokens):
        after = score(policy, batch, rows, ["token_entropy"])["token_entropy"]
        mask = batch["response_mask"][rows, :after.shape[1]]
        change = (after - entropy_before[rows, :after.shape[1]])[mask].double()
        changes += torch.stack([change.sum(), mask.sum().double()])
    change, tokens = total(changes).tolist()
    return change / tokens


# ---- the diagnosis of a run: python entropy.py runs/NAME [runs/OTHER ...] --------------------------------------------

# Which way a quadrant moves the entropy: sign dH = -sign(A) sign(log p + H), STEER, arXiv 2510.10150, theorem 1.
QUADRANT_TOKENS = {"pos_likely": "likely tokens of right answers (A > 0, p > e^-H)",
                   "pos_rare": "rare tokens of right answers (A > 0, p < e^-H)",
                   "neg_likely": "likely tokens of wrong answers (A < 0, p > e^-H)",
                   "neg_rare": "rare tokens of wrong answers (A < 0, p < e^-H)"}
# Where the methods of losses.py act; their docstrings name the papers. Clip-Cov and KL-Cov choose a large
# (log p - mean)(A - mean), arXiv 2505.22617, eq. 10: both factors positive, or both negative. An upper clip bound only
# touches A > 0, a lower one A < 0, and they bind on rare tokens first: a likely one has no room to grow, and dlog p of
# a logit is 1 - p.
ACTS = {"pos_likely": ("clip_cov", "kl_cov", "steer", "par", "w_reinforce", "rand_pos_clip", "entropic", "dcpo",
                       "aepo", "quadrant"),
        "pos_rare": ("clip_higher", "flex_clip", "ce_gppo", "cispo", "steer", "par", "w_reinforce", "rand_pos_clip",
                     "dcpo", "aepo", "quadrant"),
        "neg_likely": ("entropic", "steer", "w_reinforce", "quadrant"),
        "neg_rare": ("clip_cov", "kl_cov", "steer", "clip_b", "clip_v", "flex_clip", "ce_gppo", "cispo",
                     "w_reinforce", "quadrant")}
ACT_EVERYWHERE = ("entropy_bonus", "adaptive_entropy", "aer", "siren", "entropy_advantage", "fork_tokens", "gspo",
                  "kl_loss")
SIDE_EFFECTS = {"response/truncated_frac": "of the answers are truncated", "rollout/gap_mean": "nats per token",
                "reward/zero_std_frac": "of the answers are in groups of equal rewards"}


def fit_law(entropy, reward):
    """Fits R = -a exp(H) + b by least squares; Cui et al. 2025, arXiv 2505.22617, abstract.

    entropy (n,) in nats and reward (n,) of the same policies. Returns {"a", "b", "ceiling", "r2", "rmse"}: the ceiling
    b - a is the reward at H = 0, r2 the share of the reward's variance that the fit explains, rmse in units of R."""
    entropy, reward = np.asarray(entropy, float), np.asarray(reward, float)
    if len(entropy) < 3:
        raise ValueError(f"the law has two coefficients and needs at least 3 points, not {len(entropy)}")
    if np.ptp(entropy) == 0 or np.ptp(reward) == 0:
        raise ValueError(f"the law has nothing to fit: all {len(entropy)} entropies, or all rewards, are equal")
    terms = np.stack([-np.exp(entropy), np.ones_like(entropy)], axis=1)
    a, b = np.linalg.lstsq(terms, reward, rcond=None)[0]
    error = reward - terms @ (a, b)
    r2, rmse = 1 - error.var() / reward.var(), math.sqrt((error**2).mean())
    return {"a": a, "b": b, "ceiling": b - a, "r2": r2, "rmse": rmse}


def law_forecast(entropy, reward, first=0.15, smooth=1):
    """The law fitted on the first 15 % of the points (rounded up), tried on the rest: fit_law's results, with
    "points", those fitted; "rmse_rest"; "error_last", reward minus prediction at the last point; and, to compare,
    "rmse_mean", of the rest predicted by the mean reward of the first. In units of R.

    Arguments as fit_law's, in the order of training. smooth: of running means over so many points, none of which spans
    both parts. ArXiv 2505.22617 reports 0.9 % and 0.5 % (math)."""
    points = math.ceil(first * len(entropy))
    means = lambda values: np.convolve(values, np.ones(smooth) / smooth, "valid")
    (h, h_rest), (r, r_rest) = ((means(values[:points]), means(values[points:])) for values in (entropy, reward))
    law = fit_law(h, r)
    error = r_rest - (law["b"] - law["a"] * np.exp(h_rest))
    return law | {"points": points, "rmse_rest": math.sqrt((error**2).mean()), "error_last": error[-1],
                  "rmse_mean": math.sqrt(((r_rest - r.mean())**2).mean())}


def law_points(rows, reward):
    """Entropies and rewards, two lists, of the same policies, for fit_law.

    reward="reward/mean": of every training step, with that step's entropy/response_mean: both are of the step's rollout
    batch. reward="eval/pass@1": an evaluation follows its step's updates, so it goes with the entropy of the next step;
    the evaluation after the last step has none and is left out."""
    later = 0 if reward == "reward/mean" else 1
    entropy = {row["step"]: row["entropy/response_mean"] for row in rows if "entropy/response_mean" in row}
    pairs = [(entropy[row["step"] + later], row[reward]) for row in rows
             if reward in row and row["step"] + later in entropy]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def mean_of(rows, key):
    """Mean over the rows that have the metric."""
    return float(np.mean([row[key] for row in rows if key in row]))


def percent(share, digits=0):
    return f"{100 * share:.{digits}f} %"


def diagnose(rows, name):
    """A list of sentences: what a run's metrics (record.read_metrics) say about where its entropy went.

    Entropies are entropy/response_mean in nats per token. A quadrant's share is the mean over steps of
    quadrant/Q_dH_share, its signed part of the step's sum of |dH|: the first order of a plain policy gradient step on
    logits that move freely, before the method changes it; a prediction, not a measurement. What needs a metric that no
    row has is left out, and the last sentence names the metric; single values that are not finite are left out too."""
    broken = sorted({key for row in rows for key, value in row.items() if not np.isfinite(value)})
    rows = [{key: value for key, value in row.items() if np.isfinite(value)} for row in rows]
    steps = [row for row in rows if row["step"] > 0]
    keys = {key for row in rows for key in row if row["step"] > 0 or key.startswith("eval/")}
    wanted = ["entropy/response_mean", "reward/mean", "eval/pass@1", *SIDE_EFFECTS,
              *(f"quadrant/{q}_{part}" for q in QUADRANTS for part in ("frac", "dH_share"))]
    missing = [key for key in wanted if key not in keys]
    sentences, direction = [f"{name}: {len(steps)} steps."], 0
    if "entropy/response_mean" not in missing:
        text, direction = spent(steps)
        sentences = [f"{name}: {text}"]
    if not any(key.startswith("quadrant/") for key in missing):
        sentences += takers(steps, direction)
    if "policy/selected_frac" in keys:
        sentences.append(f"The method itself chose {percent(mean_of(steps, 'policy/selected_frac'), 1)} of the tokens.")
    sentences += [side_effect(steps, key) for key in SIDE_EFFECTS if key not in missing]
    if "entropy/response_mean" not in missing:
        sentences += [law_sentence(rows, key) for key in ("reward/mean", "eval/pass@1") if key not in missing]
    if broken:
        sentences.append(f"Not finite in some steps, which were left out: {', '.join(broken)}.")
    if missing:
        sentences.append(f"Not in these metrics, so nothing is said of it: {', '.join(missing)}.")
    return sentences


def share_made(steps, values, part):
    """How much of the change of a metric, from its first value to the mean of its last tenth, the first `part` of the
    steps makes; between the steps that have a value on the line through them.

    steps (n,): rising, those of the values (n,). An entropy is of the policy before the updates of its step, so both
    series, entropies from step 1 and evaluations from step 0, begin with the base and count from there."""
    end = np.mean(values[-math.ceil(len(values) / 10):])
    length = steps[-1] - max(steps[0] - 1, 0)
    at_part = np.interp(part * length, np.subtract(steps, steps[0]), values)
    return float((at_part - values[0]) / (end - values[0]))


def spent(steps):
    """A sentence on the entropy's course and its direction: -1 fell, 1 rose, 0 held (by less than 5 %).

    From the first step to the mean of the last tenth of the steps, as one step's entropy is noisy."""
    pairs = [(row["step"], row["entropy/response_mean"]) for row in steps if "entropy/response_mean" in row]
    at, entropy = zip(*pairs)
    n, start = len(entropy), entropy[0]
    end = float(np.mean(entropy[-math.ceil(n / 10):]))
    change = end - start
    if abs(change) <= 0.05 * start:
        return f"{n} steps; entropy held: {start:.3f} nats per token at first, {end:.3f} at the end.", 0
    text = (f"{n} steps; entropy {'fell' if change < 0 else 'rose'} from {start:.3f} to {end:.3f} nats per token, by "
            f"{percent(abs(change) / start)}.")
    if n > 12:
        early, third = (percent(share_made(at, entropy, 1 / part)) for part in (12, 3))
        text += f" The first twelfth of the steps made {early} of that, the first third {third}"
        text += " (73 % and 94 % over 11 models in arXiv 2505.22617)." if change < 0 else "."
    return text, -1 if change < 0 else 1


def takers(steps, direction):
    """Sentences on the quadrants: which one took the entropy (or raised it), with how many tokens, what acts there."""
    share = {q: mean_of(steps, f"quadrant/{q}_dH_share") for q in QUADRANTS}
    frac = {q: percent(mean_of(steps, f"quadrant/{q}_frac"), 1) for q in QUADRANTS}
    main, verb = (max(share, key=share.get), "raised") if direction > 0 else (min(share, key=share.get), "took")
    others = ", ".join(f"{q} {share[q]:+.2f} by {frac[q]}" for q in QUADRANTS if q != main)
    net = sum(share.values())
    agree = "" if not direction else ", the direction measured" if net * direction > 0 else \
        ", against the direction measured: the first order does not explain this run"
    return [f"Predicted: {main}, the {QUADRANT_TOKENS[main]}, {verb} the most: {share[main]:+.2f} of the sum of |dH| a "
            f"step, by {frac[main]} of the tokens. The others: {others}. Net {net:+.2f}{agree}.",
            f"Methods that act on {main}: {', '.join(ACTS[main])}; on all tokens: {', '.join(ACT_EVERYWHERE)}."]


def side_effect(steps, key):
    """A sentence: whether truncation, groups without variance or the engine gap passed the limit of record.SUSPICIOUS,
    beyond which train.py warns."""
    limit, cause, advice = next(rest for metric, *rest in SUSPICIOUS if metric == key)
    values = [row[key] for row in steps if key in row]
    show = lambda value: f"{value:.1e}" if key == "rollout/gap_mean" else percent(value, 1)
    over = sum(value > limit for value in values)
    found = f"{key}: {show(np.mean(values))} {SIDE_EFFECTS[key]}, at most {show(max(values))}"
    if not over:
        return f"{found}; never over train.py's limit of {show(limit)}, so no explanation."
    return f"{found}; in {over} of {len(values)} steps {cause}, which may explain it: {advice}."


def law_sentence(rows, key):
    """The law on the training reward or on pass@1: fit, ceiling and forecast; or why there is none."""
    entropy, reward = law_points(rows, key)
    try:
        law = fit_law(entropy, reward)
    except ValueError as error:
        return f"No law of {key}: {error}."
    text = (f"The law, {key} = {-law['a']:+.3f} exp(H) {law['b']:+.3f} ({len(entropy)} points): R^2 {law['r2']:.2f}, "
            f"RMSE {law['rmse']:.3f}; ceiling at H = 0: {law['ceiling']:.3f}")
    text += ", which means nothing: the reward fell with the entropy." if law["a"] < 0 else "."
    try:
        ahead = law_forecast(entropy, reward)
    except ValueError as error:
        return text + f" No forecast from the first 15 %: {error}."
    return text + (f" Fitted on the first {ahead['points']} points only, it misses the rest by RMSE "
                   f"{ahead['rmse_rest']:.3f}, the last by {ahead['error_last']:+.3f}, with a ceiling of "
                   f"{ahead['ceiling']:.3f}.")


def compare_runs(runs):
    """Sentences on several runs, {name: rows}, up to the last step that all of them have: who keeps more entropy, and
    the quadrant in which they differ most. Runs that lack a metric are named and left out of its sentence."""
    last = min(max(row["step"] for row in rows) for rows in runs.values())
    steps = {name: [row for row in rows if 0 < row["step"] <= last] for name, rows in runs.items()}
    with_key = lambda key: {name: [row for row in rows if key in row] for name, rows in steps.items()
                            if any(key in row for row in rows)}
    tail = {name: mean_of(rows[-math.ceil(len(rows) / 10):], "entropy/response_mean")
            for name, rows in with_key("entropy/response_mean").items()}
    share = {q: {name: mean_of(rows, f"quadrant/{q}_dH_share")
                 for name, rows in with_key(f"quadrant/{q}_dH_share").items()} for q in QUADRANTS}
    widest = max(QUADRANTS, key=lambda q: np.ptp(list(share[q].values()) or [0]))
    order = sorted(tail, key=tail.get, reverse=True)
    sentences = [f"Entropy at step {last} (mean of the last tenth of the steps, nats), most first: "
                 + ", ".join(f"{name} {tail[name]:.3f}" for name in order) + ".",
                 f"The predicted shares differ most in {widest}, the {QUADRANT_TOKENS[widest]}: "
                 + ", ".join(f"{name} {value:+.2f}" for name, value in share[widest].items()) + "."]
    lacking = [f"{name} has no {what}" for what, found in (("entropy", tail), ("quadrants", share[widest]))
               for name in runs if name not in found]
    told = [text for text, found in zip(sentences, (tail, share[widest])) if len(found) > 1]
    return told + ([f"Not compared: {'; '.join(lacking)}."] if lacking else [])


def load_run(run):
    """(name, method or "", rows) of a run's folder or metrics file; ValueError, in one line, if it is none."""
    run = Path(run)
    folder = run if run.is_dir() else run.parent
    try:
        rows = read_metrics(run)
    except OSError as error:
        raise ValueError(f"{run}: no metrics to read ({error.strerror}: {error.filename})") from None
    except ValueError:
        raise ValueError(f"{run}: not a metrics file, which has a JSON object per line") from None
    if not rows:
        raise ValueError(f"{run}: the metrics are empty, not even one line is complete")
    is_row = lambda row: isinstance(row, dict) and "step" in row and {type(v) for v in row.values()} <= {int, float}
    if not all(map(is_row, rows)):
        raise ValueError(f"{run}: not a metrics file, which has a step and only numbers in every line")
    config = folder / "config.json"
    method = json.loads(config.read_text())["method"] if config.exists() else ""
    return folder.resolve().name if run.is_dir() or run.name == "metrics.jsonl" else run.stem, method, rows


def main():
    """Prints a diagnosis of each run, a comparison of several, and draws diagnosis.png into the first one's folder."""
    parser = argparse.ArgumentParser(description="Where did the entropy of these runs go? Reads metrics, never trains.")
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, finished or not, or metrics files")
    paths, runs, drawn = list(dict.fromkeys(parser.parse_args().runs)), {}, {}
    try:
        for path in paths:
            name, method, rows = load_run(path)
            name = name if name not in runs else str(path)
            runs[name] = rows
            drawn[name if method in ("", method_of(name)) else f"{method}: {name}"] = [rows]
    except ValueError as error:
        parser.exit(2, f"{error}\n")
    for name, rows in runs.items():
        print("\n".join(diagnose(rows, name)), end="\n\n")
    if len(runs) > 1:
        print("\n".join(compare_runs(runs)), end="\n\n")
    panels = usual_panels(drawn) | {f"quadrant/{q}_dH_share": f"predicted share of dH: {q}" for q in QUADRANTS}
    keys = {key for rows in runs.values() for row in rows for key in row}
    panels = {key: title for key, title in panels.items() if key in keys}
    if panels:
        png = (paths[0] if paths[0].is_dir() else paths[0].parent) / "diagnosis.png"
        plot_curves(drawn, png, panels)
        print(png)


if __name__ == "__main__":
    main()
