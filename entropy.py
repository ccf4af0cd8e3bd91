"""The theory of policy entropy: tensors in, numbers out; no process group, no files.

H_t = -sum_v p_v log p_v is the entropy of the policy at a response token, over the whole
vocabulary, in nats, at the sampling temperature. What does a training step do to it? Take the
softmax of one position, p = softmax(z), and differentiate:

    dH/dz_v = -p_v (log p_v + H)

A step delta of the logits therefore changes H, to first order, by

    dH = -sum_v p_v (log p_v + H) delta_v = -Cov_{v~p}(log p_v, delta_v)    since E log p_v = -H

To lift likely tokens sharpens the distribution. Each estimate is this line with another delta
(eta: step size; A_v: advantage of token v; mean A = sum_v p_v A_v; y: the sampled token, p = p_y):

    natural gradient: delta_v = eta A_v
        dH = -eta Cov(log p_v, A_v)
        arXiv 2505.22617, theorem 2; losses.token_covariance stands in for it, token by token
    plain policy gradient: delta_v = eta p_v (A_v - mean A)
        dH = -eta Cov(log p_v, p_v (A_v - mean A))
        arXiv 2505.22617, theorem 1; the mean over y of the next
    the same from one sampled token: delta_v = eta A ([v = y] - p_v)
        dH = -eta A [p (log p + H) - sum_v p_v^2 (log p_v + H)]
        entropy_change
    only the sampled token's logit moves: delta_y = eta A (1 - p)
        dH = -eta A p (1 - p) (log p + H)
        STEER, arXiv 2510.10150, theorem 1; "steer theorem" in change_estimates

In the last line the sign is that of -A (log p + H): hence the four quadrants below.
All lines leave out that the tokens of a batch share weights: a step on one token moves the others.
What training then makes of the entropy, the law R = -a exp(H) + b, is fitted in diagnose.py.

Logits (B, T, V) in float32 are what runs out of memory first: 8 x 1,024 tokens of a 152k vocabulary
are 5 GB, several times over in backward. So they exist for `chunk_tokens` tokens at a time only.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from losses import token_covariance

# ---- logits in float32 ---------------------------------------------------------------------------
# A bfloat16 number has 8 bits: a logit of 20 is rounded by up to 0.06. A few updates change the
# log-prob of a token by less, so from rounded logits KL-Cov's sign(log r), GSPO's clip of 3e-4 and
# every clip fraction would be read off rounding errors. Weights and hidden states may stay in
# bfloat16, if the head's product is accumulated and returned in float32. The sampling engine has to
# do the same: float32 on one side alone makes the mismatch between the two larger.


class Float32Product(torch.autograd.Function):
    """hidden (n, D) @ weight (V, D).T in float32 (n, V), of bfloat16 factors. Gradients come in the
    factors' dtype, as those of an ordinary product do."""

    @staticmethod
    def forward(ctx, hidden, weight):
        ctx.save_for_backward(hidden, weight)
        if hidden.is_cuda:  # no float32 copy of the weight
            return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
        return hidden.float() @ weight.float().t()

    @staticmethod
    def backward(ctx, grad):
        hidden, weight = ctx.saved_tensors
        grad = grad.to(weight.dtype)
        return grad @ weight, grad.t() @ hidden


def float32_logits(head, hidden):
    """The logits (..., V) float32 of hidden states (..., D) by a head, an nn.Linear.

    Under autocast it rounds both factors to its dtype, as any product there does, but not the
    logits."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    else:
        dtype = head.weight.dtype
    if dtype == torch.float32:
        return F.linear(hidden, head.weight, head.bias)
    with torch.autocast(device, enabled=False):
        rows = hidden.to(dtype).flatten(0, -2)
        logits = Float32Product.apply(rows, head.weight.to(dtype)).unflatten(0, hidden.shape[:-1])
        return logits if head.bias is None else logits + head.bias.float()


def use_float32_logits(model):
    """Makes the head of a Hugging Face model compute float32_logits, whoever calls it."""
    head = model.get_output_embeddings()
    head.forward = functools.partial(float32_logits, head)


# ---- statistics of a token, from hidden states ---------------------------------------------------


class Distribution:
    """The softmax of logits (n, V): its logarithm, and what several statistics need of it, which is
    computed when the first of them asks."""

    def __init__(self, logits):
        self.log_p = torch.log_softmax(logits, dim=1)

    @functools.cached_property
    def p(self):
        return self.log_p.exp()

    @functools.cached_property
    def p_log_p(self):
        return self.p * self.log_p


# Each statistic is a function of the Distribution over the whole vocabulary and of token (n,), the
# ids of the sampled tokens. It returns (n,).


def chosen_log_prob(distribution, token):
    return distribution.log_p.gather(1, token[:, None]).squeeze(1)


def full_entropy(distribution, token):
    return -distribution.p_log_p.sum(1)


def sum_of_p2(distribution, token):
    """sum_v p_v^2"""
    return torch.linalg.vector_norm(distribution.p, dim=1).square()  # never stores p^2


def sum_of_p2_log_p(distribution, token):
    """sum_v p_v^2 log p_v"""
    return (distribution.p * distribution.p_log_p).sum(1)


def nucleus_entropy(distribution, token, mass=0.8):
    """Entropy in nats of the smallest set of tokens with at least `mass` of the probability,
    renormalised."""
    ordered = distribution.log_p.sort(dim=1, descending=True).values
    mass_before = ordered.exp().cumsum(1) - ordered.exp()  # of the tokens that are likelier
    outside = mass_before.detach() >= mass
    kept = Distribution(ordered.masked_fill(outside, -1e9))  # -inf would make 0 * inf
    return full_entropy(kept, token)


def tempered_log_prob(distribution, token, temperature):
    """Log-prob of the token at another temperature, a multiple of the sampling temperature.

    That is a new softmax, not a division of the token's log-prob."""
    return chosen_log_prob(Distribution(distribution.log_p / temperature), token)


def hot_log_prob(distribution, token):
    return tempered_log_prob(distribution, token, 1.2)


def cold_log_prob(distribution, token):
    return tempered_log_prob(distribution, token, 0.8)


# Methods and metrics ask for statistics by these names.
STATISTICS = {
    "log_probs": chosen_log_prob,
    "token_entropy": full_entropy,
    "sum_p2": sum_of_p2,
    "sum_p2_log_p": sum_of_p2_log_p,
    "nucleus_entropy": nucleus_entropy,
    "hot_log_probs": hot_log_prob,
    "cold_log_probs": cold_log_prob,
}


def rows_of_block(logits):
    """How many rows of a chunk's logits (n, V) the statistics take at a time: the head's product is
    fast with many rows, but passes over all of them would read and write memory, not the cache."""
    size = 2**20 if logits.device.type == "cpu" else 2**24  # to start a GPU's kernel takes time
    return max(1, size // logits.shape[1])


def token_statistics(
    hidden, head, tokens, temperature, wanted, chunk_tokens=512, logit_scale=1.0, logit_cap=None
):
    """The wanted STATISTICS of N tokens, without ever holding (N, V).

    hidden (N, D): the state that predicts each token; head: a function (n, D) -> (n, V), with
    float32_logits; tokens (N,): ids. logit_scale, logit_cap: of a model that changes its logits z
    after the head, to scale * z (Cohere, Granite) or cap * tanh(z / cap) (Gemma 2). Returns {name:
    (N,) float32}.

    The temperature divides the logits, once, before the softmax: dividing log-probs by it gives
    another distribution. With gradient, each chunk's logits are computed again in backward
    instead of kept. log_probs come out of the same operations with and without, bit for bit.
    """

    def one_block(logits, tokens):
        if logit_scale != 1:
            logits = logit_scale * logits
        if logit_cap:
            logits = logit_cap * torch.tanh(logits / logit_cap)
        if temperature != 1:
            logits = logits / temperature
        distribution = Distribution(logits)
        return [STATISTICS[name](distribution, tokens) for name in wanted]

    def one_chunk(hidden, tokens):
        logits = head(hidden).float()
        rows = rows_of_block(logits)
        blocks = [one_block(*block) for block in zip(logits.split(rows), tokens.split(rows))]
        return tuple(torch.cat(parts) for parts in zip(*blocks))

    chunks = []
    for chunk in zip(hidden.split(chunk_tokens), tokens.split(chunk_tokens)):
        if torch.is_grad_enabled():
            chunks.append(checkpoint(one_chunk, *chunk, use_reentrant=False))
        else:
            chunks.append(one_chunk(*chunk))
    columns = zip(*chunks)
    return {name: torch.cat(parts) for name, parts in zip(wanted, columns)}


# ---- first-order change of the entropy -----------------------------------------------------------


def entropy_change(log_probs, token_entropy, sum_p2, sum_p2_log_p, advantages):
    """First-order change of each token's entropy by one policy-gradient step at r = 1, up to the
    step size. All (B, T); the first four are the STATISTICS of that name.

        dH_t = -A [p (log p + H) - sum_v p_v^2 (log p_v + H)],   p = pi(y_t)

    Exact to first order for a softmax whose logits all move freely; derived at the head of this
    file. Without the sum it is the sign rule of STEER (arXiv 2510.10150, theorem 1), which moves
    the sampled token's logit only.
    """
    p = log_probs.exp()
    sampled = p * (log_probs + token_entropy)
    expected = sum_p2_log_p + token_entropy * sum_p2
    return -advantages * (sampled - expected)


def change_estimates(log_probs, token_entropy, sum_p2, sum_p2_log_p, advantages, response_mask):
    """Four first-order estimates of each token's entropy change by one policy-gradient step at
    r = 1, up to the step size. Returns {name: (B, T)}; more is more entropy.

    All arguments (B, T); the first four are the STATISTICS of that name. With p = pi(y_t):

        "exact"           entropy_change: all logits of the position move
        "steer theorem"   -A p (1 - p)(log p + H): the sampled token's logit moves alone,
                          arXiv 2510.10150, theorem 1
        "steer released"  -A (1 - p)(log p + H): the same without the factor p, as released
        "covariance"      -(log p - mean log p)(A - mean A), means over response tokens,
                          arXiv 2505.22617, eq. 10

    All leave out that the tokens of a batch share weights: a step on one moves the others.
    """
    p = log_probs.exp()
    exact = entropy_change(log_probs, token_entropy, sum_p2, sum_p2_log_p, advantages)
    released = -advantages * (1.0 - p) * (log_probs + token_entropy)
    covariance = token_covariance(log_probs, advantages, response_mask)
    return {
        "exact": exact,
        "steer theorem": p * released,
        "steer released": released,
        "covariance": -covariance,
    }


QUADRANTS = ("pos_likely", "pos_rare", "neg_likely", "neg_rare")


def quadrants(log_probs, token_entropy, advantages, response_mask):
    """The four kinds of response tokens, {name: (B, T) bool}: by the sign of A, and by whether the
    token is likely, pi(y_t) > e^-H, or rare. A token of A = 0 is in none.

    By STEER's rule, in which the sampled token's logit moves alone, reinforcing likely tokens and
    suppressing rare ones lowers the entropy, and the other two raise it. The exact change of a
    token (entropy_change) may have the other sign."""
    likely = log_probs + token_entropy > 0
    positive = response_mask & (advantages > 0)
    negative = response_mask & (advantages < 0)
    return {
        "pos_likely": positive & likely,
        "pos_rare": positive & ~likely,
        "neg_likely": negative & likely,
        "neg_rare": negative & ~likely,
    }


# ---- metrics of a rollout batch ------------------------------------------------------------------

NEEDED_STATISTICS = ("log_probs", "token_entropy", "sum_p2", "sum_p2_log_p")  # by entropy_metrics
TOP_FRACTIONS = (0.0002, 0.002, 0.02, 0.2, 1.0)  # of the tokens, by covariance; 1.0 is all


def covariance_name(fraction):
    """The metric of the mean of this share of the token covariances, the largest."""
    return "policy/cov_mean" if fraction == 1 else f"policy/cov_top_{fraction:g}"


def this_rank_only(values):
    """Sum over ranks where there is one: the tensor itself."""
    return values


def sums_by_name(sums, sum_over_ranks=this_rank_only):
    """{name: number or scalar tensor} of this rank -> {name: float} over all ranks, in one
    all-reduce."""
    values = [torch.as_tensor(value, dtype=torch.float64) for value in sums.values()]
    stacked = torch.stack(values)
    return dict(zip(sums, sum_over_ranks(stacked).tolist()))


def entropy_metrics(
    old,
    advantages,
    response_mask,
    group_accuracy,
    group_size,
    sum_over_ranks=this_rank_only,
    place=None,
):
    """What the tokens of a rollout batch say about the entropy, {metric: float} over all ranks.

    old: {name: (B, T)} with NEEDED_STATISTICS, of the policy that sampled and of this rank's
    answers; advantages, response_mask, group_accuracy (B, T). sum_over_ranks(x) sums a tensor over
    ranks. place: see group_covariance. Only the token covariance is taken per rank and then
    averaged.
    """
    mask = response_mask
    log_probs = old["log_probs"]
    entropy = torch.where(mask, old["token_entropy"], 0.0)
    change = entropy_change(
        log_probs, old["token_entropy"], old["sum_p2"], old["sum_p2_log_p"], advantages
    )
    parts = quadrants(log_probs, entropy, advantages, mask)
    covariance = token_covariance(log_probs, advantages, mask)
    largest_first = covariance[mask].sort(descending=True).values
    lengths = mask.sum(1)

    sums = {
        "tokens": mask.sum(),
        "answers": lengths.gt(0).sum(),
        "entropy": entropy[mask].sum(),
        "entropy_of_answers": (entropy.sum(1) / lengths.clamp(min=1)).sum(),
        "log_prob": log_probs[mask].sum(),
        "change": change[mask].sum(),
        "abs_change": change[mask].abs().sum(),
    }
    for fraction in TOP_FRACTIONS:
        count = max(1, math.ceil(fraction * len(largest_first)))
        # Weighted by this rank's tokens, and divided by those of all ranks below.
        sums[f"cov_top_{fraction}"] = largest_first[:count].mean() * len(largest_first)
    for name in QUADRANTS:
        sums[f"{name}_tokens"] = parts[name].sum()
        sums[f"{name}_change"] = change[parts[name]].sum()
    sums = sums_by_name(sums, sum_over_ranks)

    tokens = sums["tokens"]
    metrics = {
        "entropy/token_mean": sums["entropy"] / tokens,
        "entropy/response_mean": sums["entropy_of_answers"] / sums["answers"],
        "entropy/change_predicted": sums["change"] / tokens,
        "policy/log_prob_mean": sums["log_prob"] / tokens,
    }
    for fraction in TOP_FRACTIONS:
        metrics[covariance_name(fraction)] = sums[f"cov_top_{fraction}"] / tokens
    for name in QUADRANTS:
        metrics[f"quadrant/{name}_frac"] = sums[f"{name}_tokens"] / tokens
        share = sums[f"{name}_change"] / sums["abs_change"] if sums["abs_change"] else 0.0
        metrics[f"quadrant/{name}_dH_share"] = share
    return metrics | group_covariance(
        log_probs, advantages, mask, group_accuracy, group_size, sum_over_ranks, place
    )


def group_covariance(
    log_probs,
    advantages,
    response_mask,
    group_accuracy,
    group_size,
    sum_over_ranks=this_rank_only,
    place=None,
):
    """Covariance of confidence and advantage among the answers to one prompt, {metric: float} over
    all ranks. All tensors (B, T); log_probs of the policy that sampled.

    place (B,): of each answer of this rank among the P*G of the step, in which the G answers to a
    prompt stand side by side; None: these are all, in that order.

        cov_q = 1/G sum_i (l_i - mean l)(A_i - mean A)
        l_i   = mean over the answer's tokens of log pi(y_t), in nats

    Mean over all prompts q (cov_q is 0 where all rewards are equal), and over those of accuracy in
    (0, 1/3], (1/3, 2/3) and [2/3, 1). A bucket without a prompt at this step has no metric.
    arXiv 2505.22617 finds it positive, and larger for easier prompts. Where aepo has mixed in
    answers, they stand in groups that are not theirs.
    """
    log_prob_sums = torch.where(response_mask, log_probs, 0.0).double().sum(1)
    lengths = response_mask.sum(1).clamp(min=1)
    of_answers = [log_prob_sums / lengths, advantages[:, 0], group_accuracy[:, 0]]
    facts = torch.stack([values.double() for values in of_answers])  # (3, B)
    if place is not None:  # a group may be spread over ranks, so each gets the facts of all
        total = int(sum_over_ranks(torch.tensor(len(place), device=place.device)))
        mine = torch.zeros(3, total, dtype=torch.float64, device=place.device)
        mine[:, place] = facts
        facts = sum_over_ranks(mine)
    confidence, advantage, accuracy = facts.view(3, -1, group_size)
    centred_confidence = confidence - confidence.mean(1, keepdim=True)
    centred_advantage = advantage - advantage.mean(1, keepdim=True)
    cov = (centred_confidence * centred_advantage).mean(1)

    accuracy = accuracy[:, 0]
    least = 1e-6
    third = 1 / 3 + 1e-6  # in float32, 1/3 is above 1/3
    buckets = {
        "mean": accuracy >= 0,
        "hard": (accuracy > least) & (accuracy <= third),
        "mid": (accuracy > third) & (accuracy < 1 - third),
        "easy": (accuracy >= 1 - third) & (accuracy < 1 - least),
    }
    metrics = {}
    for name, prompts in buckets.items():
        if prompts.any():
            metrics[f"policy/group_cov_{name}"] = float(cov[prompts].mean())
    return metrics


# ---- metrics for another trainer -----------------------------------------------------------------


def log_entropy(log_probs, token_entropy, advantages, response_mask):
    """What the tokens of a batch say about the entropy, for any trainer: {metric: float}, named as
    in `python diagnose.py --legend`; {} if the mask is empty.

    log_probs, token_entropy (B, T), nats: of the policy that sampled, so before the updates, at the
    sampling temperature; advantages (B, T), (B, 1) or (B,); response_mask (B, T), bool or 0 and 1.

    As entropy_metrics, but from what every trainer has. Without sum_v p_v^2 log p_v the exact
    change cannot be had. So each token's change is that of "steer theorem" (see change_estimates),
    in which the sampled token's logit moves alone; the "released" form lacks the factor p, and the
    rarest tokens decide its sums. All means are over the tokens given: with several ranks gather
    the tensors first. Tokens in no quadrant have A = 0, as in groups that are all right or all
    wrong.
    """
    mask = response_mask.bool()
    if not mask.any():
        return {}
    if advantages.dim() == 1:
        advantages = advantages[:, None]
    advantages = advantages.expand_as(log_probs)
    log_probs = log_probs.detach().float()
    entropy = torch.where(mask, token_entropy.detach().float(), 0.0)
    p = log_probs.exp()
    change = -advantages * p * (1.0 - p) * (log_probs + entropy)
    abs_change = change.abs()[mask].sum().clamp(min=1e-30)
    largest_first = token_covariance(log_probs, advantages, mask)[mask].sort(descending=True).values
    means_of_answers = entropy.sum(1) / mask.sum(1)
    tokens = int(mask.sum())

    metrics = {
        "entropy/token_mean": entropy[mask].mean(),
        "entropy/response_mean": means_of_answers[mask.any(1)].mean(),
        "entropy/change_predicted": change[mask].mean(),
        "policy/log_prob_mean": log_probs[mask].mean(),
    }
    for fraction in TOP_FRACTIONS:
        count = max(1, math.ceil(fraction * tokens))
        metrics[covariance_name(fraction)] = largest_first[:count].mean()
    for name, part in quadrants(log_probs, entropy, advantages, mask).items():
        metrics[f"quadrant/{name}_frac"] = part.sum() / tokens
        metrics[f"quadrant/{name}_dH_share"] = change[part].sum() / abs_change
    return {name: float(value) for name, value in metrics.items()}
