"""The losses: GRPO and every entropy intervention, one short pure function each.

Every method is called in the same way, for B sequences of T response tokens:

    loss, metrics = METHODS[name](
        log_probs, old_log_probs, advantages, response_mask, <tensors>, <knobs>, num_tokens=N
    )

    log_probs       (B, T) float, with gradient: log pi(y_t) of the weights being trained, at the
                    sampling temperature
    old_log_probs   (B, T) float: the same tokens, by the trainer's own forward before the first
                    update on this rollout batch
    advantages      (B, T) float: A_t. An outcome reward makes it constant along T; (B, 1) will do
    response_mask   (B, T) bool, or integers 0 and 1: True on the tokens that the policy produced,
                    EOS included
    num_tokens      response tokens of the optimizer step, over all micro-batches and ranks;
                    None: those of this call

Keyword arguments without a default are further tensors that the method needs. They are (B, T)
unless the docstring says otherwise. Keyword arguments with a default are the method's knobs
(`--knobs name=value`). train.py reads the names of both off the signature.

The loss and every metric are sums over this call's tokens, divided by num_tokens, so that they add
up over micro-batches and ranks. Selections and weights are computed without gradient; terms that
are added to the loss have one.

This file imports torch and nothing of this project. To copy a method, take along what it calls:

    grpo        importance_ratio (log_ratio), ppo_surrogate, token_mean
    clip_cov    importance_ratio (log_ratio), ppo_surrogate, token_covariance, token_mean
    kl_cov      log_ratio, token_covariance, mask_of_largest, token_mean
    steer       importance_ratio (log_ratio), ppo_surrogate, token_mean
    par         importance_ratio (log_ratio), ppo_surrogate, token_mean, grpo, par_weight

To add a method, write one function and give it a name in METHODS, at the end of this file.
"""

import math

import torch


# ---- shared lines --------------------------------------------------------------------------------


def group_advantages(rewards, group_size, adv_norm="std"):
    """GRPO's advantage of each answer: its reward, centred and scaled within its prompt's answers.

    rewards (P*G,) float, the G answers to a prompt side by side; returns (P*G,).

        A_i = (R_i - mean R) / (std R + 1e-6),   mean and unbiased std over the group

    adv_norm="none" leaves the division out (Dr. GRPO, arXiv 2503.20783). A group without variance
    gets exactly 0. A group of one has mean 0 and std 1, so that A = R.
    DeepSeekMath, arXiv 2402.03300, section 4.1.
    """
    if group_size == 1:
        return rewards.clone()
    groups = rewards.view(-1, group_size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    # The mean of equal numbers may be off by a rounding error, which the std would blow up.
    flat = (groups == groups[:, :1]).all(dim=1, keepdim=True)
    centred = torch.where(flat, 0.0, centred)
    if adv_norm == "std":
        centred = centred / (groups.std(dim=1, keepdim=True) + 1e-6)
    return centred.flatten()


def log_ratio(log_probs, old_log_probs, response_mask):
    """log pi / pi_old, (B, T), clamped to +-20 and exactly 0 on padding.

    The mask comes before any exp: one inf or nan on padding, times a mask of 0, is nan and reaches
    every weight.
    """
    difference = log_probs - old_log_probs
    return torch.where(response_mask.bool(), difference, 0.0).clamp(-20.0, 20.0)


def importance_ratio(log_probs, old_log_probs, response_mask):
    """r = pi / pi_old, (B, T): exactly 1 on padding and before a rollout batch's first update."""
    return log_ratio(log_probs, old_log_probs, response_mask).exp()


def ppo_surrogate(ratio, advantages, clip_low, clip_high, dual_clip=None):
    """PPO's clipped loss per token, and where the clip has removed the gradient: two (B, T).

        loss_t = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))
        with dual_clip = c: min(loss_t, -A c) where A < 0

    The maximum of losses is the minimum of surrogates. The clip only ever takes gain away, so it
    bites at (A > 0, r > 1 + clip_high) and at (A < 0, r < 1 - clip_low).
    PPO: arXiv 1707.06347, eq. 7. Dual clip: arXiv 1912.09729, eq. 5.
    """
    free = -advantages * ratio
    bounded = -advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    token_loss = torch.maximum(free, bounded)
    clipped = bounded > free
    if dual_clip is not None:
        ceiling = -advantages * dual_clip
        beyond = (advantages < 0) & (token_loss > ceiling)
        token_loss = torch.where(beyond, ceiling, token_loss)
        clipped = clipped | beyond
    return token_loss, clipped


def token_mean(values, response_mask, num_tokens=None):
    """Sum of values (B, T) over the response tokens / num_tokens.

    There is one denominator for the whole optimizer step, not one for each micro-batch.
    """
    response_mask = response_mask.bool()
    if num_tokens is None:
        num_tokens = response_mask.sum()
    return torch.where(response_mask, values, 0.0).sum() / num_tokens


def token_covariance(log_probs, advantages, response_mask):
    """Each token's term of the covariance between log pi and A, (B, T), without gradient.

        cov_t = (log pi(y_t) - mean log pi) (A_t - mean A),   means over the response tokens given

    The mean of cov_t stands in for the covariance of theorem 2, which is minus the entropy change
    of a natural-gradient step. There the means are over the vocabulary at one position, here over
    all tokens given. arXiv 2505.22617, eq. 10 and theorem 2.
    """
    log_probs = log_probs.detach()
    response_mask = response_mask.bool()
    count = response_mask.sum()
    mean_log_prob = torch.where(response_mask, log_probs, 0.0).sum() / count
    mean_advantage = torch.where(response_mask, advantages, 0.0).sum() / count
    cov = (log_probs - mean_log_prob) * (advantages - mean_advantage)
    return torch.where(response_mask, cov, 0.0)


def mask_of_largest(values, candidates, count):
    """True at the `count` largest values (B, T) among the candidates (B, T) bool.

    Where there are fewer candidates, all of them are chosen.
    """
    only_candidates = values.masked_fill(~candidates, -math.inf)
    places = only_candidates.flatten().topk(count).indices
    chosen = torch.zeros_like(candidates)
    chosen.view(-1)[places] = True
    return chosen & candidates


def k3(log_probs, other_log_probs, response_mask):
    """An estimate of the KL divergence per token, (B, T), never negative.

        k3 = e^d - 1 - d   with   d = other_log_probs - log_probs

    Mind the order of the arguments: with tokens drawn from pi, E[k3] = KL(pi || other).
    http://joschu.net/blog/kl-approx.html
    """
    d = log_ratio(other_log_probs, log_probs, response_mask)
    return d.exp() - 1.0 - d


def scale_gradient(log_probs, weight):
    """The same values (B, T), with each token's gradient multiplied by weight (B, T).

    With weight = min(exp(old_log_probs - rollout_log_probs), C) this puts a truncated importance
    weight (TIS, `--tis_cap`) on any method, without a line in the method.
    """
    values = log_probs.detach()
    return values + weight.detach() * (log_probs - values)


# ---- GRPO ----------------------------------------------------------------------------------------


def grpo(
    log_probs,
    old_log_probs,
    advantages,
    response_mask,
    *,
    clip_low=0.2,
    clip_high=0.2,
    dual_clip=None,
    num_tokens=None,
):
    """The baseline: PPO's clipped loss on group advantages, averaged over tokens.

    There is no KL term and no entropy term. All tensors are (B, T), see the head of this file.

        L = 1/N sum_t max(-A_t r_t, -A_t clip(r_t, 1 - clip_low, 1 + clip_high))

    DeepSeekMath, arXiv 2402.03300, eq. 3, without its KL term and with DAPO's token mean
    (arXiv 2503.14476, eq. 8). With one update per rollout r = 1 and no clip can act.
    dual_clip is 3 in verl and off here.
    """
    ratio = importance_ratio(log_probs, old_log_probs, response_mask)
    token_loss, clipped = ppo_surrogate(ratio, advantages, clip_low, clip_high, dual_clip)
    loss = token_mean(token_loss, response_mask, num_tokens)
    metrics = {
        "policy/clip_frac": token_mean(clipped.float(), response_mask, num_tokens),
    }
    return loss, metrics


# ---- what the three papers compare with ----------------------------------------------------------


def clip_higher(
    log_probs,
    old_log_probs,
    advantages,
    response_mask,
    *,
    clip_low=0.2,
    clip_high=0.28,
    num_tokens=None,
):
    """GRPO, but the upper clip bound is wider: rare tokens of right answers may grow further.

        L = 1/N sum_t max(-A_t r_t, -A_t clip(r_t, 1 - 0.2, 1 + 0.28))

    DAPO, arXiv 2503.14476, eq. 10.
    It does nothing with one update per rollout, and never anything to tokens with A < 0.
    """
    return grpo(
        log_probs,
        old_log_probs,
        advantages,
        response_mask,
        clip_low=clip_low,
        clip_high=clip_high,
        num_tokens=num_tokens,
    )


def entropy_bonus(
    log_probs,
    old_log_probs,
    advantages,
    response_mask,
    *,
    token_entropy,
    entropy_coef=0.001,
    clip_low=0.2,
    clip_high=0.2,
    num_tokens=None,
):
    """GRPO, with the mean token entropy as a bonus.

    token_entropy (B, T): exact full-vocabulary H_t in nats, with gradient. Computed under no_grad
    it would make the bonus a constant.

        L = L_GRPO - entropy_coef * 1/N sum_t H_t

    Compared in arXiv 2505.22617, section 4.1: 1e-4 and 1e-3 do little, 5e-3 holds the entropy
    without a gain, 1e-2 explodes.
    """
    loss, metrics = grpo(
        log_probs,
        old_log_probs,
        advantages,
        response_mask,
        clip_low=clip_low,
        clip_high=clip_high,
        num_tokens=num_tokens,
    )
    mean_entropy = token_mean(token_entropy, response_mask, num_tokens)
    return loss - entropy_coef * mean_entropy, metrics


def kl_loss(
    log_probs,
    old_log_probs,
    advantages,
    response_mask,
    *,
    ref_log_probs,
    kl_coef=0.001,
    estimator="k3",
    clip_low=0.2,
    clip_high=0.2,
    num_tokens=None,
):
    """GRPO, with a penalty on the KL divergence from the frozen reference model.

    ref_log_probs (B, T): the same tokens under the reference.

        d = ref_log_probs - log_probs
        L = L_GRPO + kl_coef * 1/N sum_t k_t
        k_t = e^d - 1 - d  for estimator="k3",   d^2 / 2  for estimator="k2"

    DeepSeekMath, arXiv 2402.03300, eq. 4. k3 estimates the value of KL(pi || ref) without bias, but
    its gradient is not that KL's gradient; k2's is, on-policy. The first step that starts from the
    reference itself feels nothing, because d = 0.
    In arXiv 2505.22617, section 4.1, coefficients of 0.001 to 0.1 steady the entropy and cost
    accuracy.
    """
    if estimator not in ("k2", "k3"):
        raise ValueError(f"estimator={estimator}: use k2 or k3")
    loss, metrics = grpo(
        log_probs,
        old_log_probs,
        advantages,
        response_mask,
        clip_low=clip_low,
        clip_high=clip_high,
        num_tokens=num_tokens,
    )
    token_k3 = k3(log_probs, ref_log_probs, response_mask)
    if estimator == "k3":
        penalty = token_k3
    else:
        penalty = log_ratio(ref_log_probs, log_probs, response_mask).square() / 2
    metrics["policy/kl_to_ref"] = token_mean(token_k3.detach(), response_mask, num_tokens)
    return loss + kl_coef * token_mean(penalty, response_mask, num_tokens), metrics


# ---- The Entropy Mechanism (arXiv 2505.22617) ----------------------------------------------------


def clip_cov(
    log_probs,
    old_log_probs,
    advantages,
    response_mask,
    *,
    cov_frac=2e-4,
    cov_low=1.0,
    cov_high=5.0,
    clip_low=1.0,
    clip_high=1.0,
    num_tokens=None,
):
    """GRPO, but a few random tokens of large covariance give no gradient.

    All tensors are (B, T). cov_t is that of token_covariance; cov_frac is a fraction of this call's
    tokens (2e-4 = 0.02 %).

        I = n tokens, drawn uniformly and without replacement from the candidates
            {t : cov_low < cov_t < cov_high, and the ratio clip has not removed the gradient}
        n = max(int(cov_frac * tokens), 1)
        L = 1/N sum_{t not in I} max(-A_t r_t, -A_t clip(r_t, 0, 2)),   N counts the dropped too

    Cui et al. 2025, arXiv 2505.22617, eqs. 10-12. It acts on the first on-policy update too; KL-Cov
    does not. n is at least 1 per call, so with few tokens or many micro-batches the share is larger
    than cov_frac: policy/selected_frac tells it. The released code keeps a ratio clip of [0, 2],
    against extreme tokens only.
    """
    response_mask = response_mask.bool()
    ratio = importance_ratio(log_probs, old_log_probs, response_mask)
    token_loss, clipped = ppo_surrogate(ratio, advantages, clip_low, clip_high)

    cov = token_covariance(log_probs, advantages, response_mask)
    is_candidate = response_mask & ~clipped & (cov > cov_low) & (cov < cov_high)
    candidates = is_candidate.flatten().nonzero().squeeze(1)
    count = max(int(cov_frac * int(response_mask.sum())), 1)
    dropped = torch.zeros_like(response_mask)
    if len(candidates) > 0:
        order = torch.randperm(len(candidates), device=cov.device)
        dropped.view(-1)[candidates[order[:count]]] = True

    loss = token_mean(torch.where(dropped, 0.0, token_loss), response_mask, num_tokens)
    metrics = {
        "policy/clip_frac": token_mean(clipped.float(), response_mask, num_tokens),
        "policy/selected_frac": token_mean(dropped.float(), response_mask, num_tokens),
    }
    return loss, metrics


def kl_cov(
    log_probs,
    old_log_probs,
    advantages,
    response_mask,
    *,
    cov_frac=2e-3,
    kl_coef=1.0,
    num_tokens=None,
):
    """Policy gradient without any clip, with a KL penalty on the tokens of largest covariance.

    All tensors are (B, T). cov_t is that of token_covariance; cov_frac is a fraction of this call's
    tokens (2e-3 = 0.2 %; 2e-4 in the paper's 32B runs).

        I = the n = max(1, int(cov_frac * tokens)) tokens of largest cov_t
        L = 1/N [ sum_t -A_t r_t + kl_coef sum_{t in I} |log pi(y_t) - log pi_old(y_t)| ]

    Cui et al. 2025, arXiv 2505.22617, eqs. 13-14. The KL is to the rollout policy, not to a
    reference. Its gradient is sign(log r), exactly 0 at r = 1: with one update per rollout this is
    plain policy gradient. The official configuration's k_percent=0.2 is per cent: 2e-3 here.
    """
    response_mask = response_mask.bool()
    log_r = log_ratio(log_probs, old_log_probs, response_mask)

    cov = token_covariance(log_probs, advantages, response_mask)
    count = max(1, int(cov_frac * int(response_mask.sum())))
    penalised = mask_of_largest(cov, response_mask, count)

    penalty = torch.where(penalised, kl_coef * log_r.abs(), 0.0)
    token_loss = -advantages * log_r.exp() + penalty
    loss = token_mean(token_loss, response_mask, num_tokens)
    metrics = {
        "policy/selected_frac": token_mean(penalised.float(), response_mask, num_tokens),
    }
    return loss, metrics


# ---- STEER (arXiv 2510.10150) --------------------------------------------------------------------


def steer(
    log_probs,
    old_log_probs,
    advantages,
    response_mask,
    *,
    old_token_entropy,
    min_weight=0.8,
    max_weight=1.2,
    mapping="exp",
    form="released",
    clip_low=0.2,
    clip_high=0.28,
    dual_clip=10.0,
    num_tokens=None,
):
    """GRPO, with less weight on a token the more the step is expected to change its entropy.

    All tensors are (B, T). old_token_entropy: H_t of the old policy, nats. With p = pi(y_t) now;
    Omega and w carry no gradient:

        form="released":   Omega = (A / p_old) p (1 - p) (log p + H_old)
        form="theorem":    Omega = r A p (1 - p) (log p + H_old), 0 where the clip took the gradient
        mapping="exp":     w = clip(exp(-k |Omega|), min_weight, 1)
                           k = -ln(min_weight) / max(max |Omega|, 0.02)
        mapping="linear":  w falls linearly from max_weight at the smallest |Omega| to min_weight at
                           the largest; where all are equal, w is halfway
        L = 1/N sum_t w_t loss_t,   loss_t that of PPO's clip with dual clip

    The weights are not renormalised.
    Hao et al. 2025, arXiv 2510.10150, theorem 1, and its released code (the paper says
    min_weight = 0.7). The maximum is over this call's tokens, so that one outlier sets k;
    "theorem" has one more factor p and is not driven by rare tokens.
    At min_weight = 1 with mapping="exp" all weights are 1.
    """
    if mapping not in ("exp", "linear"):
        raise ValueError(f"mapping={mapping}: use exp or linear")
    if form not in ("released", "theorem"):
        raise ValueError(f"form={form}: use released or theorem")
    if not 0 < min_weight <= 1:
        raise ValueError(f"min_weight={min_weight}: a weight above 0 and at most 1 is expected")
    response_mask = response_mask.bool()
    ratio = importance_ratio(log_probs, old_log_probs, response_mask)
    token_loss, clipped = ppo_surrogate(ratio, advantages, clip_low, clip_high, dual_clip)

    with torch.no_grad():
        p = log_probs.exp()
        # A / p_old * p is A r.
        omega = ratio * advantages * (1.0 - p) * (log_probs + old_token_entropy)
        if form == "theorem":
            omega = torch.where(clipped, 0.0, omega * p)
        size = torch.where(response_mask, omega.abs(), 0.0)
        smallest = torch.where(response_mask, size, math.inf).min()  # a call may have no tokens
        largest = size.max()
        if mapping == "exp":
            exponent = math.log(min_weight) * size / largest.clamp(min=0.02)
            weight = torch.exp(exponent).clamp(min_weight, 1.0)
        else:
            rank = (size - smallest) / (largest - smallest)
            rank = torch.where(largest > smallest, rank, 0.5)
            weight = max_weight - (max_weight - min_weight) * rank

    loss = token_mean(weight * token_loss, response_mask, num_tokens)
    metrics = {
        "policy/clip_frac": token_mean(clipped.float(), response_mask, num_tokens),
        "policy/weight_mean": token_mean(weight, response_mask, num_tokens),
    }
    return loss, metrics


# ---- Revisiting Entropy (arXiv 2511.05993), and two controls -------------------------------------


def par(
    log_probs,
    old_log_probs,
    advantages,
    response_mask,
    *,
    positive_weight=0.0,
    clip_low=0.2,
    clip_high=0.2,
    num_tokens=None,
):
    """GRPO, with the advantages of right answers times a weight: positive advantage reweighting.

    All tensors are (B, T). positive_weight is lambda in [0, 1]. It follows the entropy or a
    schedule: the controller's rule par_weight, below, sets it before each rollout batch's updates.

        A'_t = lambda A_t where A_t > 0, else A_t
        L = L_GRPO(A'),   N unchanged

    Jin et al. 2025, arXiv 2511.05993 (positive / progressive advantage reweighting; the formulas
    are after third-party notes).
    It does nothing at lambda = 1; at lambda = 0 only wrong answers are learned from.
    """
    weighted = torch.where(advantages > 0, positive_weight * advantages, advantages)
    return grpo(
        log_probs,
        old_log_probs,
        weighted,
        response_mask,
        clip_low=clip_low,
        clip_high=clip_high,
        num_tokens=num_tokens,
    )


def par_weight(
    state,
    entropy,
    progress,
    metrics,
    *,
    schedule="entropy",
    target_entropy=0.2,
    delta=0.05,
    positive_weight=0.0,
    epochs=8,
):
    """Controller's rule of par: the next lambda.

        schedule="entropy":   lambda <- clip(lambda - delta, 0, 1) where H < target_entropy
                              lambda <- clip(lambda + delta, 0, 1) elsewhere
                              from lambda_0 = positive_weight, moved once for the first batch
        schedule="stage":     0 in the first half of training, then linearly from 0 to 1
        schedule="epoch":     (e - 1) / (E - 1) in epoch e of E = epochs, which are equal parts of
                              the training
        schedule="constant":  positive_weight

    What every rule is given is told at CONTROLLERS, at the end of this file.
    """
    if schedule == "entropy":
        step = -delta if entropy < target_entropy else delta
        weight = state.get("positive_weight", positive_weight) + step
        weight = min(max(weight, 0.0), 1.0)
    elif schedule == "stage":
        weight = max(0.0, 2.0 * progress - 1.0)
    elif schedule == "epoch":
        weight = int(progress * epochs) / max(epochs - 1, 1)
    elif schedule == "constant":
        weight = positive_weight
    else:
        raise ValueError(f"schedule={schedule}: use entropy, stage, epoch or constant")
    return {"positive_weight": weight}


def rand_pos_clip(
    log_probs,
    old_log_probs,
    advantages,
    response_mask,
    *,
    drop_frac=0.02,
    clip_low=0.2,
    clip_high=0.2,
    num_tokens=None,
):
    """GRPO, but random tokens of right answers give no gradient: the control of Clip-Cov.

        loss_t = 0 where A_t > 0 and u_t < drop_frac,   u_t uniform in [0, 1)
        N counts these tokens too

    Jin et al. 2025, arXiv 2511.05993. The share is our choice; a few hundredths are enough to see
    an effect.
    """
    u = torch.rand(response_mask.shape, device=response_mask.device)
    dropped = (advantages > 0) & (u < drop_frac)
    loss, metrics = grpo(
        log_probs,
        old_log_probs,
        torch.where(dropped, 0.0, advantages),
        response_mask,
        clip_low=clip_low,
        clip_high=clip_high,
        num_tokens=num_tokens,
    )
    metrics["policy/selected_frac"] = token_mean(dropped.float(), response_mask, num_tokens)
    return loss, metrics


def quadrant(
    log_probs,
    old_log_probs,
    advantages,
    response_mask,
    *,
    old_token_entropy,
    pos_likely=1.0,
    pos_rare=1.0,
    neg_likely=1.0,
    neg_rare=1.0,
    clip_low=0.2,
    clip_high=0.2,
    num_tokens=None,
):
    """GRPO, with a factor on the advantages of each quadrant: sign of A, likely or rare token.

    This is a control: weaken one quadrant and see which way the entropy goes.
    old_token_entropy (B, T): H_t of the policy that sampled, nats. A token is likely where
    pi_old(y_t) > e^-H_t.

        A'_t = w_t A_t,   w_t the knob of the token's quadrant
        L = L_GRPO(A'),   N unchanged

    By theorem 1 of arXiv 2510.10150 pos_likely and neg_rare lower the entropy and the other two
    raise it, so that weakening one moves it the other way. arXiv 2511.05993 weighs by the sign of A
    alone. It does nothing with all four at 1.
    """
    likely = old_log_probs + old_token_entropy > 0
    of_right = torch.where(likely, pos_likely, pos_rare)
    of_wrong = torch.where(likely, neg_likely, neg_rare)
    weight = torch.where(advantages > 0, of_right, of_wrong)
    return grpo(
        log_probs,
        old_log_probs,
        advantages * weight,
        response_mask,
        clip_low=clip_low,
        clip_high=clip_high,
        num_tokens=num_tokens,
    )


# ==================================================================================================
# You may stop here: what follows are further published methods, and the lists at the end.
# ==================================================================================================


# ---- other advantages ----------------------------------------------------------------------------


def w_reinforce(
    log_probs,
    old_log_probs,
    advantages,
    response_mask,
    *,
    rewards,
    positive_weight=0.1,
    negative_weight=1.0,
    clip_low=0.2,
    clip_high=0.2,
    num_tokens=None,
):
    """GRPO without a baseline: one fixed advantage for right answers, another for wrong ones.

    rewards (B, T): 1 or 0, constant along T. The given advantages are not used.

        A_t = positive_weight where R = 1, else -negative_weight
        L = L_GRPO(A)

    Zhu et al. 2025, arXiv 2506.01347: W-REINFORCE. positive_weight=1 negative_weight=0 is their
    PSR, positive_weight=0 their NSR. Groups without variance do teach here.
    """
    fixed = torch.where(rewards > 0, positive_weight, -negative_weight).to(log_probs)
    return grpo(
        log_probs,
        old_log_probs,
        fixed,
        response_mask,
        clip_low=clip_low,
        clip_high=clip_high,
        num_tokens=num_tokens,
    )


def entropy_advantage(
    log_probs,
    old_log_probs,
    advantages,
    response_mask,
    *,
    old_token_entropy,
    alpha=0.4,
    kappa=2.0,
    clip_low=0.2,
    clip_high=0.2,
    num_tokens=None,
):
    """GRPO, with a part of each token's entropy added to its advantage.

    old_token_entropy (B, T): H_t of the policy that sampled, nats. It is a constant here, so this
    is no entropy bonus: the gradient is that of the policy.

        A'_t = A_t + min(alpha H_t, |A_t| / kappa)
        L = L_GRPO(A')

    Cheng et al. 2025, arXiv 2506.14758. kappa > 1 keeps the sign of A.
    It does nothing at alpha = 0, nor where A = 0.
    """
    added = torch.minimum(alpha * old_token_entropy.detach(), advantages.abs() / kappa)
    return grpo(
        log_probs,
        old_log_probs,
        advantages + added,
        response_mask,
        clip_low=clip_low,
        clip_high=clip_high,
        num_tokens=num_tokens,
    )


def entropic(
    log_probs,
    old_log_probs,
    advantages,
    response_mask,
    *,
    alpha=0.0,
    confident=0.95,
    clip_low=0.2,
    clip_high=0.2,
    num_tokens=None,
):
    """GRPO, with confident tokens of right and of wrong answers weighted against each other.

    alpha in [-1, 1] comes from a PI controller, entropic_alpha below, once per rollout batch. On
    tokens with pi_old(y_t) > confident:

        A'_t = (1 + alpha) A_t where A_t > 0,   (1 - alpha) A_t where A_t < 0
        L = L_GRPO(A')

    EntroPIC, arXiv 2511.15248. Confident tokens of right answers lower the entropy, those of wrong
    answers raise it. So alpha > 0, which it is above the target, lowers the entropy.
    It does nothing at alpha = 0.
    """
    sure = old_log_probs.exp() > confident
    weight = torch.where(sure, 1.0 + alpha * advantages.sign(), 1.0)
    return grpo(
        log_probs,
        old_log_probs,
        advantages * weight,
        response_mask,
        clip_low=clip_low,
        clip_high=clip_high,
        num_tokens=num_tokens,
    )


def entropic_alpha(state, entropy, progress, metrics, *, target_entropy=0.1, kp=1.0, ki=0.01):
    """Controller's rule of entropic: a proportional and an integral term.

        alpha = clip(kp (H - H*) + ki sum over the batches so far (H - H*), -1, 1)

    H* is target_entropy.
    """
    error = entropy - target_entropy
    integral = state.get("integral", 0.0) + error
    alpha = min(max(kp * error + ki * integral, -1.0), 1.0)
    return {"alpha": alpha, "integral": integral}


def dcpo(
    log_probs,
    old_log_probs,
    advantages,
    response_mask,
    *,
    rewards,
    old_hot_log_probs,
    old_cold_log_probs,
    mix=0.0,
    hot=1.0,
    clip_low=0.2,
    clip_high=0.2,
    num_tokens=None,
):
    """GRPO, with a share of REINFORCE on right answers as another temperature would sample them.

    rewards (B, T): 1 or 0. old_hot_log_probs, old_cold_log_probs (B, T): the sampled tokens under
    the old policy at 1.2 and at 0.8 of the sampling temperature; an importance weight turns the
    samples into those. mix = a and hot, which chooses T, come from dcpo_mix below.

        rho_t = pi_T,old(y_t) / pi_old(y_t)
        A'_t = (1 - a) A_t + a 1[right] rho_t
        L = L_GRPO(A')

    Released with AEPO (arXiv 2510.08141), without its second sampler. Learning from what a hotter
    policy would sample raises the entropy more than the same term at the sampling temperature, and
    a colder one raises it less; together with GRPO's own step the sign depends on the prompt.
    It does nothing at a = 0.
    """
    tempered = old_hot_log_probs if hot else old_cold_log_probs
    rho = importance_ratio(tempered, old_log_probs, response_mask)
    mixed = (1.0 - mix) * advantages + mix * (rewards > 0) * rho
    return grpo(
        log_probs,
        old_log_probs,
        mixed,
        response_mask,
        clip_low=clip_low,
        clip_high=clip_high,
        num_tokens=num_tokens,
    )


def dcpo_mix(state, entropy, progress, metrics, *, target_entropy=0.5):
    """Controller's rule of dcpo: the share a, and the temperature that the term is for.

        a = a0 / (1 + a0),   a0 = min(|H* - H|, 0.1) / share of right answers in the batch

    H* is target_entropy. The hot temperature is chosen at or below it, the cold one above.
    """
    share_right = max(metrics["reward/mean"], 1e-6)
    a0 = min(abs(target_entropy - entropy), 0.1) / share_right
    return {
        "mix": a0 / (1.0 + a0),
        "hot": float(entropy <= target_entropy),
    }


def aepo_temperature(
    state,
    entropy,
    progress,
    metrics,
    *,
    target_entropy=0.5,
    hot=1.2,
    cold=0.8,
    most_rows=60,
):
    """Controller's rule of aepo: the temperature of its second sample, and how much of it is taken.

    The method aepo is GRPO's loss on a batch into which good answers, sampled at another
    temperature, have been mixed. rollout.mix_second_sample does that: it samples a quarter of the
    prompts once more at second_temperature, a multiple of the sampling temperature. Answers of
    advantage > 0.05 get A = 1 and take the place of the first rows of the batch. At most most_rows
    of them count: at or below the target entropy all of these take a row, above it half of them.

        grad J = grad J_GRPO + E_{o ~ pi^T} [grad log pi(o) R]

    Wang et al. 2025, arXiv 2510.08141, released code. old_log_probs are recomputed at the sampling
    temperature. A first batch has no second sample here, as its entropy is not known yet. The
    logged entropy includes the mixed-in answers.
    """
    low = entropy <= target_entropy
    return {
        "second_temperature": hot if low else cold,
        "most_rows": most_rows,
        "taken_share": 1.0 if low else 0.5,
    }


# ---- other clips ---------------------------------------------------------------------------------


def flex_clip(
    log_probs,
    old_log_probs,
    advantages,
    response_mask,
    *,
    upper_share=0.0,
    lower_share=0.0,
    upper_slope=-0.25,
    upper_offset=0.5,
    lower_slope=-0.13,
    lower_offset=0.3,
    narrowest=0.05,
    widest=0.6,
    clip=0.2,
    num_tokens=None,
):
    """GRPO, with clip bounds that depend on the token's probability, to raise or lower the entropy.

    upper_share and lower_share in [0, 1] come from flex_clip_shares below, which switches between
    raising and lowering. With p = pi(y_t) now, without gradient:

        eps+(p) = clip(upper_slope p + upper_offset, narrowest, widest),   eps-(p) alike
        upper bound: 1 + upper_share eps+(p) + (1 - upper_share) clip
        lower bound: 1 - lower_share eps-(p) - (1 - lower_share) clip

    FlexEC, arXiv 2602.09782 (the constants are third-party). A wider upper bound lets rare tokens
    of right answers grow, a wider lower one lets tokens of wrong answers fall.
    It does nothing with one update per rollout, or with both shares 0.
    """
    p = log_probs.detach().exp()
    flexible_upper = (upper_slope * p + upper_offset).clamp(narrowest, widest)
    flexible_lower = (lower_slope * p + lower_offset).clamp(narrowest, widest)
    upper = clip + upper_share * (flexible_upper - clip)
    lower = clip + lower_share * (flexible_lower - clip)
    ratio = importance_ratio(log_probs, old_log_probs, response_mask)
    token_loss, clipped = ppo_surrogate(ratio, advantages, lower, upper)
    loss = token_mean(token_loss, response_mask, num_tokens)
    metrics = {
        "policy/clip_frac": token_mean(clipped.float(), response_mask, num_tokens),
    }
    return loss, metrics


def flex_clip_shares(state, entropy, progress, metrics, *, schedule="id"):
    """Controller's rule of flex_clip: which of its bounds are flexible, as (upper, lower).

    With lambda = 1 - 2 k/T in step k of T, hi and lo the flexible bounds and eps the fixed one:

        schedule="id"   raises, then lowers the entropy: (lambda hi + (1 - lambda) eps, eps) in the
                        first half, then (eps, (1 + lambda) lo - lambda eps)
        schedule="did"  lowers, raises, lowers: (lambda eps + (1 - lambda) hi, eps) in the first
                        half, then (hi, (1 + lambda) lo - lambda eps)
        schedule="od"   follows the entropy: (hi, eps) at H <= 0.2 H_0; (eps, lo) above the line
                        that falls from H_0 to 0.2 H_0 over the training; in between as in the step
                        before, and (eps, lo) at first

    H_0 is the entropy of the first batch.
    """
    lam = 1.0 - 2.0 * progress
    first_half = progress <= 0.5
    if schedule == "id":
        return {
            "upper_share": lam if first_half else 0.0,
            "lower_share": 0.0 if first_half else 1.0 + lam,
        }
    if schedule == "did":
        return {
            "upper_share": 1.0 - lam if first_half else 1.0,
            "lower_share": 0.0 if first_half else 1.0 + lam,
        }
    if schedule != "od":
        raise ValueError(f"schedule={schedule}: use id, did or od")
    first = state.get("first_entropy", entropy)
    low = 0.2 * first
    high = low + (first - low) * (1.0 - progress)
    if entropy <= low:
        raising = 1.0
    elif entropy > high:
        raising = 0.0
    else:
        raising = state.get("upper_share", 0.0)
    return {
        "upper_share": raising,
        "lower_share": 1.0 - raising,
        "first_entropy": first,
    }


def ce_gppo(
    log_probs,
    old_log_probs,
    advantages,
    response_mask,
    *,
    beta_low=0.75,
    beta_high=1.0,
    clip_low=0.2,
    clip_high=0.2,
    num_tokens=None,
):
    """GRPO, but clipped tokens keep a bounded gradient instead of none.

    With sg for the stopped gradient:

        r < 1 - clip_low,  A < 0:   loss_t = -beta_low  (1 - clip_low)  r / sg(r) A
        r > 1 + clip_high, A > 0:   loss_t = -beta_high (1 + clip_high) r / sg(r) A
        elsewhere:                  loss_t = -A r

    CE-GPPO, arXiv 2509.20712. A smaller beta_low pulls the entropy down less hard, beta_high lets
    rare tokens of right answers grow. With one update per rollout, or with both betas 0, it has
    GRPO's gradient.
    """
    ratio = importance_ratio(log_probs, old_log_probs, response_mask)
    low = (ratio < 1.0 - clip_low) & (advantages < 0)
    high = (ratio > 1.0 + clip_high) & (advantages > 0)
    outside = low | high
    held = ratio / ratio.detach()  # 1, with the gradient of log pi
    low_bound = beta_low * (1.0 - clip_low) * held
    high_bound = beta_high * (1.0 + clip_high) * held
    bounded = torch.where(low, low_bound, high_bound)
    token_loss = -advantages * torch.where(outside, bounded, ratio)
    loss = token_mean(token_loss, response_mask, num_tokens)
    metrics = {
        "policy/clip_frac": token_mean(outside.float(), response_mask, num_tokens),
    }
    return loss, metrics


def cispo(
    log_probs,
    old_log_probs,
    advantages,
    response_mask,
    *,
    clip_low=10.0,
    clip_high=0.2,
    num_tokens=None,
):
    """REINFORCE with a clipped importance weight: every token keeps a gradient.

        loss_t = -sg(clip(r, 1 - clip_low, 1 + clip_high)) A log pi(y_t),   sg: stopped gradient

    MiniMax-M1, arXiv 2506.13585, eq. 4; clip_low = 10 means no lower bound. With one update per
    rollout this is GRPO's gradient. Its loss value is not comparable with GRPO's.
    """
    weight = importance_ratio(log_probs, old_log_probs, response_mask).detach()
    bounded = weight.clamp(1.0 - clip_low, 1.0 + clip_high)
    log_probs = torch.where(response_mask.bool(), log_probs, 0.0)
    loss = token_mean(-bounded * advantages * log_probs, response_mask, num_tokens)
    clipped = (bounded != weight) & (advantages != 0)
    metrics = {
        "policy/clip_frac": token_mean(clipped.float(), response_mask, num_tokens),
    }
    return loss, metrics


def gspo(
    log_probs,
    old_log_probs,
    advantages,
    response_mask,
    *,
    num_sequences,
    clip_low=3e-4,
    clip_high=4e-4,
    num_tokens=None,
):
    """GRPO with one ratio per sequence, clipped as a whole, and a mean of the sequences' means.

    num_sequences, a scalar: answers of the whole optimizer step, over all micro-batches and ranks.
    With sg for the stopped gradient:

        s_i = exp(mean_t log r_t)
        s_i,t = sg(s_i) pi(y_t) / sg(pi(y_t))
        L = 1/num_sequences sum_i 1/|y_i| sum_t
                max(-A s_i,t, -A clip(s_i,t, 1 - clip_low, 1 + clip_high))

    Zheng et al. 2025, arXiv 2507.18071, GSPO-token. No clip acts with one update per rollout.
    """
    log_r = log_ratio(log_probs, old_log_probs, response_mask)
    lengths = response_mask.sum(1, keepdim=True).clamp(min=1)
    log_s = log_r.sum(1, keepdim=True) / lengths
    ratio = (log_r - log_r.detach() + log_s.detach()).exp()
    token_loss, clipped = ppo_surrogate(ratio, advantages, clip_low, clip_high)
    loss = token_mean(token_loss / lengths, response_mask, num_sequences)
    metrics = {
        "policy/clip_frac": token_mean(clipped.float(), response_mask, num_tokens),
    }
    return loss, metrics


# ---- a part of the tokens ------------------------------------------------------------------------


def fork_tokens(
    log_probs,
    old_log_probs,
    advantages,
    response_mask,
    *,
    old_token_entropy,
    top_frac=0.2,
    clip_low=0.2,
    clip_high=0.2,
    num_tokens=None,
):
    """GRPO on the tokens of highest entropy only, divided by their number.

    old_token_entropy (B, T): H_t of the policy that sampled, nats.

        F = the max(1, int(top_frac * tokens)) of this call's tokens with the highest H_t
        L = 1/(top_frac N) sum_{t in F} loss_t

    Wang et al. 2025, arXiv 2506.01939 (80/20: forking tokens). It does nothing at top_frac = 1.
    """
    response_mask = response_mask.bool()
    if num_tokens is None:
        num_tokens = response_mask.sum()
    count = max(1, int(top_frac * int(response_mask.sum())))
    forks = mask_of_largest(old_token_entropy, response_mask, count)
    return grpo(
        log_probs,
        old_log_probs,
        advantages,
        forks,
        clip_low=clip_low,
        clip_high=clip_high,
        num_tokens=top_frac * num_tokens,
    )


# ---- entropy terms -------------------------------------------------------------------------------


def adaptive_entropy(
    log_probs,
    old_log_probs,
    advantages,
    response_mask,
    *,
    token_entropy,
    entropy_coef=0.0,
    clip_low=0.2,
    clip_high=0.2,
    num_tokens=None,
):
    """entropy_bonus, with a coefficient that grows while the entropy is below a target.

    token_entropy (B, T): exact H_t in nats, with gradient. entropy_coef = 1[H < target] c comes
    from adaptive_entropy_coef below.

        L = L_GRPO - 1[H < target] c 1/N sum_t H_t

    Skywork-OR1, arXiv 2505.22312, released code. It does nothing above the target.
    """
    return entropy_bonus(
        log_probs,
        old_log_probs,
        advantages,
        response_mask,
        token_entropy=token_entropy,
        entropy_coef=entropy_coef,
        clip_low=clip_low,
        clip_high=clip_high,
        num_tokens=num_tokens,
    )


def adaptive_entropy_coef(
    state,
    entropy,
    progress,
    metrics,
    *,
    target_entropy=0.2,
    delta=1e-4,
    max_coef=5e-3,
):
    """Controller's rule of adaptive_entropy, starting from c = 0.

        c <- clip(c + delta, 0, max_coef) where H < target_entropy
        c <- clip(c - delta, 0, max_coef) elsewhere

    The bonus has the coefficient c where H < target_entropy, and none elsewhere.
    """
    low = entropy < target_entropy
    step = delta if low else -delta
    c = min(max(state.get("c", 0.0) + step, 0.0), max_coef)
    return {"c": c, "entropy_coef": c if low else 0.0}


def aer(
    log_probs,
    old_log_probs,
    advantages,
    response_mask,
    *,
    token_entropy,
    group_accuracy,
    alpha=0.0,
    hard_below=0.5,
    clip_low=0.2,
    clip_high=0.2,
    num_tokens=None,
):
    """GRPO, with an entropy bonus that is larger for harder prompts.

    token_entropy (B, T): exact H_t in nats, with gradient. group_accuracy (B, T): the share of
    right answers in the group. alpha, from aer_alpha below, is a global coefficient that holds a
    target entropy.

        L = L_GRPO - alpha 1/N sum_t w_q H_t
        w_q = max(0, hard_below - accuracy_q) / hard_below

    Our reading of arXiv 2510.10959: only its abstract was available, so every constant is ours.
    It does nothing at alpha = 0.
    """
    if hard_below <= 0:
        raise ValueError(
            f"hard_below={hard_below}: an accuracy above 0, below which a prompt counts as hard"
        )
    loss, metrics = grpo(
        log_probs,
        old_log_probs,
        advantages,
        response_mask,
        clip_low=clip_low,
        clip_high=clip_high,
        num_tokens=num_tokens,
    )
    weight = (hard_below - group_accuracy).clamp(min=0.0) / hard_below
    weighted_entropy = token_mean(weight * token_entropy, response_mask, num_tokens)
    return loss - alpha * weighted_entropy, metrics


def aer_alpha(state, entropy, progress, metrics, *, target_ratio=0.8, rate=0.005):
    """Controller's rule of aer, starting from alpha = 0.

        alpha <- max(0, alpha + rate (H* - H))

    The target H* is target_ratio times the entropy of the first batch.
    """
    first = state.get("first_entropy", entropy)
    alpha = state.get("alpha", 0.0) + rate * (target_ratio * first - entropy)
    return {"alpha": max(0.0, alpha), "first_entropy": first}


def siren(
    log_probs,
    old_log_probs,
    advantages,
    response_mask,
    *,
    nucleus_entropy,
    anchor=None,
    coef=0.005,
    peak_frac=0.2,
    clip_low=0.2,
    clip_high=0.2,
    num_tokens=None,
):
    """GRPO, with a penalty that keeps the entropy of the most uncertain tokens where it began.

    nucleus_entropy (B, T): with gradient, in nats, the entropy of the smallest set of tokens whose
    probability reaches 0.8, renormalised. anchor is its mean over the peak tokens of the first
    rollout batch and comes from siren_anchor below.

        peak = the peak_frac of each response's tokens with the highest nucleus entropy
        L = L_GRPO + coef (mean over peak of H^0.8 - anchor)^2

    Jiang et al. 2025, arXiv 2509.25133, released code; that the set is renormalised is our reading.
    The mean is over this call's peak tokens, and a call counts by its share of the step's tokens.
    In the first step, which measures the anchor, there is no penalty.
    """
    response_mask = response_mask.bool()
    loss, metrics = grpo(
        log_probs,
        old_log_probs,
        advantages,
        response_mask,
        clip_low=clip_low,
        clip_high=clip_high,
        num_tokens=num_tokens,
    )
    # Every response has its own number of peak tokens: ranks within the row, 0 for the highest.
    scores = nucleus_entropy.detach().masked_fill(~response_mask, -math.inf)
    rank = scores.argsort(1, descending=True).argsort(1)
    peaks_per_response = torch.ceil(peak_frac * response_mask.sum(1, keepdim=True))
    peak = response_mask & (rank < peaks_per_response)

    mean = token_mean(nucleus_entropy, peak)
    share = token_mean(torch.ones_like(log_probs), response_mask, num_tokens)
    penalty = 0.0
    if anchor is not None:
        penalty = coef * share * (mean - anchor).square()
    metrics["entropy/peak_mean"] = share * mean.detach()
    return loss + penalty, metrics


def siren_anchor(state, entropy, progress, metrics):
    """Controller's rule of siren: the anchor is what the first step measured."""
    anchor = state.get("anchor", metrics.get("entropy/peak_mean"))
    return {} if anchor is None else {"anchor": anchor}


# ---- masks ---------------------------------------------------------------------------------------


def clip_b_mask(old, advantages, response_mask, sum_over_ranks, *, mu=2.5):
    """Which tokens of a rollout batch clip_b learns from, (B, T) bool.

    The method clip_b is GRPO's loss without the tokens of wrong answers whose suppression would
    cost the most entropy. They leave the response mask before the updates, and so the denominator.
    old: {"log_probs", "token_entropy"}, each (B, T), of the policy that sampled. sum_over_ranks
    sums a tensor over all ranks.

        S = p (log p + H)
        dropped: A < 0 and S - mean S < -mu std S,   over the batch's tokens, population std

    arXiv 2602.03392, released code.
    """
    response_mask = response_mask.bool()
    log_p = old["log_probs"]
    S = log_p.exp() * (log_p + old["token_entropy"])
    mean, std = batch_mean_std(S, response_mask, sum_over_ranks)
    dropped = (advantages < 0) & (S - mean < -mu * std)
    return response_mask & ~dropped


def clip_v_mask(old, advantages, response_mask, sum_over_ranks, *, mu=8.5, most_frac=1e-4):
    """Which tokens of a rollout batch clip_v learns from, (B, T) bool.

    The method clip_v is clip_b by the exact first-order change of the entropy, in which all logits
    move. old: {"log_probs", "token_entropy", "sum_p2", "sum_p2_log_p"}, each (B, T), of the policy
    that sampled. sum_over_ranks sums a tensor over all ranks.

        x = [H sum_v p_v^2 + sum_v p_v^2 log p_v] - p (log p + H)
        dropped: A < 0 and x > mu std(x),   of these the largest x,
                 at most int(most_frac * this rank's tokens)

    With fewer than 1 / most_frac tokens none is dropped. arXiv 2602.03392, released code.
    """
    response_mask = response_mask.bool()
    log_p = old["log_probs"]
    H = old["token_entropy"]
    x = H * old["sum_p2"] + old["sum_p2_log_p"] - log_p.exp() * (log_p + H)
    _, std = batch_mean_std(x, response_mask, sum_over_ranks)
    candidates = response_mask & (advantages < 0) & (x > mu * std)
    most = int(most_frac * int(response_mask.sum()))
    return response_mask & ~mask_of_largest(x, candidates, most)


def batch_mean_std(values, response_mask, sum_over_ranks):
    """Mean and population standard deviation of values (B, T) over all ranks' response tokens."""
    kept = values[response_mask].double()
    sums = [torch.ones_like(kept).sum(), kept.sum(), kept.square().sum()]
    count, first, second = sum_over_ranks(torch.stack(sums))
    mean = first / count
    variance = (second / count - mean.square()).clamp(min=0.0)
    return mean, variance.sqrt()


# ---- the lists -----------------------------------------------------------------------------------

# What --method can be, and its loss. A new method is one more line here.
METHODS = {
    "grpo": grpo,
    "clip_higher": clip_higher,
    "entropy_bonus": entropy_bonus,
    "kl_loss": kl_loss,
    "clip_cov": clip_cov,
    "kl_cov": kl_cov,
    "steer": steer,
    "par": par,
    "rand_pos_clip": rand_pos_clip,
    "quadrant": quadrant,
    "w_reinforce": w_reinforce,
    "entropy_advantage": entropy_advantage,
    "entropic": entropic,
    "dcpo": dcpo,
    "aepo": grpo,  # it acts on the batch of answers: see aepo_temperature
    "flex_clip": flex_clip,
    "ce_gppo": ce_gppo,
    "cispo": cispo,
    "gspo": gspo,
    "fork_tokens": fork_tokens,
    "adaptive_entropy": adaptive_entropy,
    "aer": aer,
    "siren": siren,
    "clip_b": grpo,  # it acts on the response mask: see clip_b_mask
    "clip_v": grpo,  # it acts on the response mask: see clip_v_mask
}

# The methods that change over training have a state, a plain dict of floats that checkpoints hold.
# Once per rollout batch, before its updates, the method's rule makes the next state from the last
# one, which is {} at first:
#
#     state = rule(state, entropy, progress, metrics, **knobs)
#
#     entropy    the policy's mean entropy on the rollout batch, over all ranks, in nats
#     progress   share of the training that is done, in [0, 1)
#     metrics    {name: float}, of this rollout batch and of the updates on the one before
#
# Rules are pure functions. What a state holds reaches the loss as the knob of the same name.
CONTROLLERS = {
    "par": par_weight,
    "entropic": entropic_alpha,
    "dcpo": dcpo_mix,
    "aepo": aepo_temperature,
    "flex_clip": flex_clip_shares,
    "adaptive_entropy": adaptive_entropy_coef,
    "aer": aer_alpha,
    "siren": siren_anchor,
}

# Once per rollout batch, before its updates, these say which response tokens the loss sees.
MASKS = {
    "clip_b": clip_b_mask,
    "clip_v": clip_v_mask,
}

# Methods whose loss and gradient are exactly 0 on an answer whose advantages are all 0, and which
# learn the same from the others whether or not it is there: train.py leaves such answers out of the
# updates. They still count in num_tokens and num_sequences. The other methods have a term of their
# own on every token, or they choose among, or draw for, all tokens of a call; a method in no list
# runs them all.
NOTHING_AT_ZERO_ADVANTAGE = {
    "grpo",
    "clip_higher",
    "par",
    "quadrant",
    "entropy_advantage",
    "entropic",
    "aepo",
    "flex_clip",
    "ce_gppo",
    "cispo",
    "gspo",
    "clip_b",
    "clip_v",
}

# Methods that are not themselves with one update per rollout: train.py warns.
NO_CLIP_ACTS = (
    "the ratio is 1 throughout and no clip can act: this is GRPO; use more updates per rollout"
)
NO_PENALTY_ACTS = (
    "its penalty has no gradient at ratio 1: this is plain policy gradient; "
    "use more updates per rollout"
)
IDLE_WITH_ONE_UPDATE = {
    "clip_higher": NO_CLIP_ACTS,
    "flex_clip": NO_CLIP_ACTS,
    "ce_gppo": NO_CLIP_ACTS,
    "kl_cov": NO_PENALTY_ACTS,
}
