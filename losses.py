"""The losses: GRPO and every entropy intervention, one short pure function each.

Shapes: B sequences, T response tokens. Every method is called as

    loss, metrics = METHODS[name](log_probs, old_log_probs, advantages, response_mask, *, <tensors>, <knobs>, num_tokens=None)

    log_probs       (B, T) float, with gradient: log pi(y_t) under the weights being trained, at the sampling temperature
    old_log_probs   (B, T) float: the same tokens by the trainer's own forward before the first update of this rollout batch
    advantages      (B, T) float: A_t, constant along T for an outcome reward
    response_mask   (B, T) bool: True on the tokens that the policy produced, EOS included
    num_tokens      response tokens of the whole optimizer step, over all micro-batches and ranks; None: those of this call

Keyword arguments without a default are further (B, T) tensors that the method wants (train.py reads their names off the
signature and provides them); those with a default are its knobs (`--knobs name=value`). The loss and every metric are
sums over this call's tokens divided by num_tokens, so that they add up over micro-batches and ranks.
What a method does to a token is decided without gradient; what it adds to the loss carries one.
"""
import inspect
import math

import torch


# ---- shared lines -----------------------------------------------------------------------------------------------------

def group_advantages(rewards, group_size, adv_norm="std"):
    """GRPO's advantage of each answer: its reward, centred and scaled within the answers to the same prompt.

    rewards (P*G,) float, prompt-major; returns (P*G,).   A_i = (R_i - mean R) / (std R + 1e-6), std unbiased
    adv_norm="none" leaves the division out (Dr. GRPO, arXiv 2503.20783). A group without variance gets exactly 0;
    a group of one has mean 0 and std 1, so that A = R. DeepSeekMath, arXiv 2402.03300, section 4.1.
    """
    if group_size == 1:
        return rewards.clone()
    groups = rewards.view(-1, group_size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    if adv_norm == "std":
        centred = centred / (groups.std(dim=1, keepdim=True) + 1e-6)
    return centred.flatten()


def log_ratio(log_probs, old_log_probs, response_mask):
    """log pi / pi_old, (B, T), clamped to +-20 and exactly 0 on padding.

    Masked before any exp: one inf or nan on padding, times a mask of 0, is nan and reaches every weight.
    """
    return torch.where(response_mask, log_probs - old_log_probs, 0.0).clamp(-20.0, 20.0)


def importance_ratio(log_probs, old_log_probs, response_mask):
    """r = pi / pi_old, (B, T); exactly 1 on padding and before the first update of a rollout batch."""
    return log_ratio(log_probs, old_log_probs, response_mask).exp()


def ppo_surrogate(ratio, advantages, clip_low, clip_high, dual_clip=None):
    """PPO's clipped loss per token, and where the clip has removed the gradient. All (B, T).

        loss_t = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high));  dual_clip=c:  loss_t = min(loss_t, -A c) where A < 0

    The maximum of losses is the minimum of surrogates: the clip only ever takes gain away, so it bites at
    (A > 0, r > 1 + clip_high) and (A < 0, r < 1 - clip_low). Arxiv 1707.06347, eq. 7; dual clip 1912.09729, eq. 5.
    """
    free = -advantages * ratio
    bounded = -advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    token_loss, clipped = torch.maximum(free, bounded), bounded > free
    if dual_clip is not None:
        ceiling = -advantages * dual_clip
        beyond = (advantages < 0) & (token_loss > ceiling)
        token_loss, clipped = torch.where(beyond, ceiling, token_loss), clipped | beyond
    return token_loss, clipped


def token_mean(values, response_mask, num_tokens=None):
    """Sum of values (B, T) over response tokens / num_tokens: one denominator for the step, not one per micro-batch."""
    count = response_mask.sum() if num_tokens is None else num_tokens
    return torch.where(response_mask, values, 0.0).sum() / count


def token_covariance(log_probs, advantages, response_mask):
    """cov_t = (log pi(y_t) - mean log pi)(A_t - mean A), (B, T), no gradient; means over the response tokens given.

    Its mean is minus the entropy change that a natural-gradient step would make. arXiv 2505.22617, eq. 10, theorem 2.
    """
    log_probs, count = log_probs.detach(), response_mask.sum()
    centred_log_probs = log_probs - torch.where(response_mask, log_probs, 0.0).sum() / count
    centred_advantages = advantages - torch.where(response_mask, advantages, 0.0).sum() / count
    return torch.where(response_mask, centred_log_probs * centred_advantages, 0.0)


def k3(log_probs, other_log_probs, response_mask):
    """KL estimate per token, (B, T): e^d - 1 - d with d = other - log_probs, never negative.

    The direction is the trap: with tokens drawn from pi, E[k3] = KL(pi || other). http://joschu.net/blog/kl-approx.html
    """
    d = log_ratio(other_log_probs, log_probs, response_mask)
    return d.exp() - 1.0 - d


def scale_gradient(log_probs, weight):
    """The same values, with the gradient of each token times weight (B, T): applies a truncated importance weight
    min(exp(old_log_probs - rollout_log_probs), C) to any method without a line in it (TIS, `--tis_cap`)."""
    weight = weight.detach()
    return weight * log_probs + (1.0 - weight) * log_probs.detach()


class Controller:
    """The state of a method that evolves over training, a dict of floats: one update per rollout batch, checkpointed.

    `rule(state, entropy, progress, **knobs)` is a pure function that returns the next state, from {} at first; None for
    a method without state. The entries of the state are handed to the loss in place of its knobs of the same name.
    """

    def __init__(self, rule, knobs):
        self.rule, self.knobs, self.state = rule, knobs, {}

    def update(self, entropy, progress):
        """entropy: mean of H_t over the rollout batch on all ranks, nats; progress: share of training done, in [0, 1)."""
        if self.rule:
            self.state = self.rule(self.state, entropy, progress, **self.knobs)

    def state_dict(self):
        return dict(self.state)

    def load_state_dict(self, state):
        self.state = dict(state)


# ---- base -------------------------------------------------------------------------------------------------------------

def grpo(log_probs, old_log_probs, advantages, response_mask, *, clip_low=0.2, clip_high=0.2, dual_clip=None, num_tokens=None):
    """The baseline: PPO's clipped loss on group advantages, averaged over tokens; no KL, no entropy term.

    All tensors (B, T), see the head of this file.

        L = 1/N sum_t max(-A_t r_t, -A_t clip(r_t, 1 - clip_low, 1 + clip_high))

    DeepSeekMath, arXiv 2402.03300, eq. 3, without its KL term and with DAPO's token mean (2503.14476, eq. 8).
    With one update per rollout r = 1 and no clip can act. dual_clip: 3 in verl, off here.
    """
    ratio = importance_ratio(log_probs, old_log_probs, response_mask)
    token_loss, clipped = ppo_surrogate(ratio, advantages, clip_low, clip_high, dual_clip)
    metrics = {"policy/clip_frac": token_mean(clipped.float(), response_mask, num_tokens)}
    return token_mean(token_loss, response_mask, num_tokens), metrics


def clip_higher(log_probs, old_log_probs, advantages, response_mask, *, clip_low=0.2, clip_high=0.28, num_tokens=None):
    """GRPO, but the upper clip bound is wider, so that rare tokens of right answers may grow further.

        L = 1/N sum_t max(-A_t r_t, -A_t clip(r_t, 1 - 0.2, 1 + 0.28))

    DAPO, arXiv 2503.14476, eq. 10. Does nothing with one update per rollout, and nothing to tokens with A < 0.
    """
    return grpo(log_probs, old_log_probs, advantages, response_mask,
                clip_low=clip_low, clip_high=clip_high, num_tokens=num_tokens)


def entropy_bonus(log_probs, old_log_probs, advantages, response_mask, *, token_entropy,
                  entropy_coef=0.001, clip_low=0.2, clip_high=0.2, num_tokens=None):
    """GRPO, with the mean token entropy as a bonus.

    token_entropy (B, T): exact full-vocabulary H_t in nats, with gradient (under no_grad the bonus would be a constant).

        L = L_GRPO - entropy_coef * 1/N sum_t H_t

    Compared in arXiv 2505.22617, section 4.1: 1e-4 and 1e-3 do little, 5e-3 holds entropy without a gain, 1e-2 explodes.
    """
    loss, metrics = grpo(log_probs, old_log_probs, advantages, response_mask,
                         clip_low=clip_low, clip_high=clip_high, num_tokens=num_tokens)
    return loss - entropy_coef * token_mean(token_entropy, response_mask, num_tokens), metrics


def kl_loss(log_probs, old_log_probs, advantages, response_mask, *, ref_log_probs,
            kl_coef=0.001, estimator="k3", clip_low=0.2, clip_high=0.2, num_tokens=None):
    """GRPO, with a penalty on the KL divergence from the frozen reference model.

    ref_log_probs (B, T): the same tokens under the reference.  With d = ref_log_probs - log_probs:

        L = L_GRPO + kl_coef * 1/N sum_t k_t,   k_t = e^d - 1 - d  (estimator="k3")  or  d^2 / 2  ("k2")

    DeepSeekMath, arXiv 2402.03300, eq. 4. k3 estimates the value of KL(pi || ref) without bias, but its gradient is not
    that KL's gradient; k2's is, on-policy. The first step from the reference itself feels nothing: d = 0.
    arXiv 2505.22617, section 4.1: coefficients of 0.001 to 0.1 steady the entropy and cost accuracy.
    """
    if estimator not in ("k2", "k3"):
        raise ValueError(f"estimator={estimator}: use k2 or k3")
    loss, metrics = grpo(log_probs, old_log_probs, advantages, response_mask,
                         clip_low=clip_low, clip_high=clip_high, num_tokens=num_tokens)
    token_k3 = k3(log_probs, ref_log_probs, response_mask)
    penalty = token_k3 if estimator == "k3" else log_ratio(ref_log_probs, log_probs, response_mask).square() / 2
    metrics["policy/kl_to_ref"] = token_mean(token_k3.detach(), response_mask, num_tokens)
    return loss + kl_coef * token_mean(penalty, response_mask, num_tokens), metrics


# ---- The Entropy Mechanism (arXiv 2505.22617) -------------------------------------------------------------------------

def clip_cov(log_probs, old_log_probs, advantages, response_mask, *,
             cov_frac=2e-4, cov_low=1.0, cov_high=5.0, clip_low=1.0, clip_high=1.0, num_tokens=None):
    """GRPO, but a few random tokens of large covariance give no gradient.

    All tensors (B, T). cov_frac is a fraction of this call's tokens (2e-4 = 0.02 %), cov_t as in token_covariance.

        I = n tokens drawn uniformly, without replacement, from {t : cov_low < cov_t < cov_high, ratio not clipped},
            n = max(int(cov_frac * tokens), 1)
        L = 1/N sum_{t not in I} max(-A_t r_t, -A_t clip(r_t, 0, 2)),   N counts the dropped tokens too

    Cui et al. 2025, arXiv 2505.22617, eqs. 10-12. Acts on the first on-policy update too; KL-Cov does not.
    n is at least 1 per call, so with few tokens or many micro-batches the share is larger than cov_frac: see
    policy/selected_frac. The released code keeps a ratio clip of [0, 2], against extreme tokens only.
    """
    ratio = importance_ratio(log_probs, old_log_probs, response_mask)
    token_loss, clipped = ppo_surrogate(ratio, advantages, clip_low, clip_high)
    cov = token_covariance(log_probs, advantages, response_mask)
    candidates = (response_mask & ~clipped & (cov > cov_low) & (cov < cov_high)).flatten().nonzero().squeeze(1)
    count = max(int(cov_frac * int(response_mask.sum())), 1)
    dropped = torch.zeros_like(response_mask)
    if len(candidates):
        dropped.view(-1)[candidates[torch.randperm(len(candidates), device=cov.device)[:count]]] = True
    metrics = {"policy/clip_frac": token_mean(clipped.float(), response_mask, num_tokens),
               "policy/selected_frac": token_mean(dropped.float(), response_mask, num_tokens)}
    return token_mean(torch.where(dropped, 0.0, token_loss), response_mask, num_tokens), metrics


def kl_cov(log_probs, old_log_probs, advantages, response_mask, *, cov_frac=2e-3, kl_coef=1.0, num_tokens=None):
    """Policy gradient without any clip, with a KL penalty on the tokens of largest covariance.

    All tensors (B, T). cov_frac is a fraction of this call's tokens (2e-3 = 0.2 %; the paper's 32B runs: 2e-4).

        I = the n = max(1, int(cov_frac * tokens)) tokens of largest cov_t
        L = 1/N [ sum_t -A_t r_t + kl_coef sum_{t in I} |log pi(y_t) - log pi_old(y_t)| ]

    Cui et al. 2025, arXiv 2505.22617, eqs. 13-14. The KL is to the rollout policy, not to a reference. Its gradient is
    sign(log r), exactly 0 at r = 1: with one update per rollout this is plain policy gradient. The official
    configuration's k_percent=0.2 is per cent, that is 2e-3 here.
    """
    log_r = log_ratio(log_probs, old_log_probs, response_mask)
    cov = token_covariance(log_probs, advantages, response_mask).masked_fill(~response_mask, -math.inf)
    count = max(1, int(cov_frac * int(response_mask.sum())))
    penalised = torch.zeros_like(response_mask)
    penalised.view(-1)[cov.flatten().topk(count).indices] = True
    token_loss = -advantages * log_r.exp() + torch.where(penalised, kl_coef * log_r.abs(), 0.0)
    metrics = {"policy/selected_frac": token_mean(penalised.float(), response_mask, num_tokens)}
    return token_mean(token_loss, response_mask, num_tokens), metrics


# ---- STEER (arXiv 2510.10150) -----------------------------------------------------------------------------------------

def steer(log_probs, old_log_probs, advantages, response_mask, *, old_token_entropy,
          min_weight=0.8, max_weight=1.2, mapping="exp", form="released",
          clip_low=0.2, clip_high=0.28, dual_clip=10.0, num_tokens=None):
    """GRPO, with each token's loss weighted down by how much the step is expected to change its entropy.

    All (B, T); old_token_entropy: H_t of the old policy, nats. With p = pi(y_t) now and everything here detached:

        form="released":  Omega = (A / p_old) p (1 - p)(log p + H_old)
        form="theorem":   Omega = r A p (1 - p)(log p + H_old), 0 where the clip has removed the gradient
        mapping="exp":    w = clip(exp(-k |Omega|), min_weight, 1),   k = -ln(min_weight) / max(max |Omega|, 0.02)
        mapping="linear": w falls linearly from max_weight at the smallest |Omega| to min_weight at the largest
        L = 1/N sum_t w_t loss_t      (PPO-clip with dual clip; the weights are not renormalised)

    Hao et al. 2025, arXiv 2510.10150, theorem 1 and its released code (the paper says min_weight = 0.7). The maximum is
    over this call's tokens, so one outlier sets k; "theorem" has one more p and is not driven by rare tokens.
    Does nothing at min_weight = 1 with mapping="exp".
    """
    if mapping not in ("exp", "linear") or form not in ("released", "theorem"):
        raise ValueError(f"mapping={mapping}, form={form}: use mapping=exp|linear, form=released|theorem")
    ratio = importance_ratio(log_probs, old_log_probs, response_mask)
    token_loss, clipped = ppo_surrogate(ratio, advantages, clip_low, clip_high, dual_clip)
    with torch.no_grad():
        p = log_probs.exp()
        omega = ratio * advantages * (1.0 - p) * (log_probs + old_token_entropy)  # A / p_old * p is A r
        if form == "theorem":
            omega = torch.where(clipped, 0.0, omega * p)
        size = torch.where(response_mask, omega.abs(), 0.0)
        low, high = size[response_mask].min(), size.max()
        if mapping == "exp":
            weight = torch.exp(math.log(min_weight) * size / high.clamp(min=0.02)).clamp(min_weight, 1.0)
        else:
            rank = torch.where(high > low, (size - low) / (high - low), 0.5)
            weight = max_weight - (max_weight - min_weight) * rank
    metrics = {"policy/clip_frac": token_mean(clipped.float(), response_mask, num_tokens),
               "policy/weight_mean": token_mean(weight, response_mask, num_tokens)}
    return token_mean(weight * token_loss, response_mask, num_tokens), metrics


# ---- Revisiting Entropy (arXiv 2511.05993) ----------------------------------------------------------------------------

def par(log_probs, old_log_probs, advantages, response_mask, *,
        positive_weight=0.0, clip_low=0.2, clip_high=0.2, num_tokens=None):
    """GRPO, with the advantages of right answers multiplied by a weight that follows the entropy or a schedule.

    All tensors (B, T). positive_weight is lambda in [0, 1], set before each rollout batch by par_weight below.

        A'_t = lambda A_t where A_t > 0, else A_t;   L = L_GRPO(A'),  N unchanged

    Jin et al. 2025, arXiv 2511.05993 (positive / progressive advantage reweighting; formulas after third-party notes).
    Does nothing at lambda = 1; at lambda = 0 only wrong answers are learned from.
    """
    advantages = torch.where(advantages > 0, positive_weight * advantages, advantages)
    return grpo(log_probs, old_log_probs, advantages, response_mask,
                clip_low=clip_low, clip_high=clip_high, num_tokens=num_tokens)


def par_weight(state, entropy, progress, *, schedule="entropy", target_entropy=0.2, delta=0.05,
               positive_weight=0.0, epochs=8):
    """Controller of par: the next lambda. entropy in nats, progress in [0, 1).

        "entropy":   lambda <- clip(lambda - delta, 0, 1) if H < target_entropy else clip(lambda + delta, 0, 1),
                     from lambda_0 = positive_weight
        "stage":     0 in the first half of training, then linearly 0 -> 1
        "epoch":     (e - 1) / (E - 1) in epoch e of E = epochs, epochs being equal parts of training
        "constant":  positive_weight
    """
    if schedule == "entropy":
        step = -delta if entropy < target_entropy else delta
        weight = min(max(state.get("positive_weight", positive_weight) + step, 0.0), 1.0)
    elif schedule == "stage":
        weight = max(0.0, 2.0 * progress - 1.0)
    elif schedule == "epoch":
        weight = int(progress * epochs) / max(epochs - 1, 1)
    elif schedule == "constant":
        weight = positive_weight
    else:
        raise ValueError(f"schedule={schedule}: use entropy, stage, epoch or constant")
    return {"positive_weight": weight}


# ---- the registry -----------------------------------------------------------------------------------------------------

METHODS = {f.__name__: f for f in (grpo, clip_higher, entropy_bonus, kl_loss, clip_cov, kl_cov, steer, par)}
CONTROLLERS = {"par": par_weight}
IDLE_WITH_ONE_UPDATE = {  # r = 1 throughout, so their clip or penalty never acts: train.py warns
    "clip_higher": "the ratio is 1 throughout and no clip can act: this is GRPO; use more updates per rollout",
    "kl_cov": "its penalty has no gradient at ratio 1: this is plain policy gradient; use more updates per rollout",
}


def wanted_tensors(method):
    """Names of the further tensors that a method takes: its keyword arguments without a default."""
    return [p.name for p in inspect.signature(METHODS[method]).parameters.values()
            if p.kind is p.KEYWORD_ONLY and p.default is p.empty]


def default_knobs(function):
    """Knobs of a loss or of a controller's rule with their defaults: its keyword arguments that have one."""
    return {p.name: p.default for p in inspect.signature(function).parameters.values()
            if p.kind is p.KEYWORD_ONLY and p.default is not p.empty and p.name != "num_tokens"}


def parse_knobs(method, settings):
    """["cov_frac=2e-2", ...] -> (knobs of the loss, knobs of its controller's rule or {}), the defaults filled in.

    Raises ValueError on an unknown method, an unknown knob (listing those that the method has) or a value that the
    method refuses: it is called once here, on two tokens, so that a typing error costs no model to be loaded.
    """
    if method not in METHODS:
        raise ValueError(f"--method {method} is unknown. Methods: {', '.join(sorted(METHODS))}")
    loss_knobs = default_knobs(METHODS[method])
    rule_knobs = default_knobs(CONTROLLERS[method]) if method in CONTROLLERS else {}
    known = loss_knobs | rule_knobs
    for setting in settings:
        name, _, text = setting.partition("=")
        if name not in known:
            listed = ", ".join(f"{k}={v}" for k, v in known.items())
            raise ValueError(f"--knobs {setting}: {method} has no knob '{name}'. It has: {listed}")
        value = read_knob(setting, text, known[name])
        loss_knobs.update({name: value} if name in loss_knobs else {})
        rule_knobs.update({name: value} if name in rule_knobs else {})
    state = CONTROLLERS[method]({}, 1.0, 0.0, **rule_knobs) if method in CONTROLLERS else {}
    two = torch.full((1, 2), -1.0)
    METHODS[method](two, two, -two, two < 0, **{name: two for name in wanted_tensors(method)}, **(loss_knobs | state))
    return loss_knobs, rule_knobs


def read_knob(setting, text, default):
    """The value in `name=text`, of the default's type; dual_clip takes none too. Fractions must lie in (0, 1]."""
    if isinstance(default, str):
        return text
    if text == "none" and setting.startswith("dual_clip"):
        return None
    try:
        value = int(text) if type(default) is int else float(text)
    except ValueError:
        raise ValueError(f"--knobs {setting}: a number is expected after '='") from None
    if setting.partition("=")[0].endswith("_frac") and not 0 < value <= 1:
        raise ValueError(f"--knobs {setting}: a fraction in (0, 1] is expected, not per cent")
    return value
