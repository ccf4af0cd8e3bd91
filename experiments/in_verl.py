"""The losses of losses.py as policy losses of verl; tried with verl 0.9.1.

verl has a registry of policy losses. Importing this file adds every method of losses.py under the
name `entropy_control/METHOD`. It needs losses.py and nothing else of this project, so that the two
files can be copied into a folder of their own. Three environment variables and one flag choose a
method:

    PYTHONPATH=FOLDER VERL_USE_EXTERNAL_MODULES=in_verl ENTROPY_CONTROL_KNOBS="cov_frac=2e-3" \\
        python -m verl.trainer.main_ppo algorithm.adv_estimator=grpo \\
        actor_rollout_ref.actor.policy_loss.loss_mode=entropy_control/clip_cov ...

    PYTHONPATH                  the full path of the folder with both files; from a checkout,
                                without copying, the checkout's, with
                                VERL_USE_EXTERNAL_MODULES=experiments.in_verl
    VERL_USE_EXTERNAL_MODULES   verl imports these modules in every process that imports verl
    ENTROPY_CONTROL_KNOBS       the method's knobs, separated by spaces; may be left out

Where verl starts Ray itself, its workers inherit these variables. On a cluster that runs already,
set them for `ray start` on every node.

- verl's own settings actor.clip_ratio*, policy_loss.clip_cov_* and so on are not read here, and
  ENTROPY_CONTROL_KNOBS is. To set the former is an error. There is no dual clip unless you ask for
  verl's: `loss_mode=entropy_control/grpo` with `dual_clip=3` is verl's default loss.
- actor.loss_agg_mode must be token-mean, verl's default; for gspo seq-mean-token-mean.
- Weights for the engine mismatch (algorithm.rollout_correction.rollout_is) multiply each token's
  gradient, as in verl. The logged actor/pg_loss is the one without weights.
- clip_cov and kl_cov choose among the tokens of a micro-batch, as verl's own do.
- Metrics are actor/pg_clipfrac and actor/ppo_kl, verl's names, and actor/selected_frac where the
  method chooses tokens. (verl's own clip_cov calls that share pg_clipfrac.) Each is a mean over the
  micro-batch's response tokens, because verl averages them over micro-batches and ranks.

verl passes log-probs, advantages and a mask to a policy loss. The methods that need more raise one
line with the reason when they are chosen: at once where the command line chooses them, else at the
first update. They need

    entropy_bonus, adaptive_entropy, aer, siren     entropies with gradient
    steer, quadrant, entropy_advantage, fork_tokens entropies of the policy that sampled
    kl_loss                                         log-probs of the reference
    w_reinforce, dcpo, aer                          rewards
    par, entropic, flex_clip; also dcpo,            the rollout batch's entropy and the run's
    adaptive_entropy, aer, siren                    progress, once per rollout batch
    clip_b, clip_v                                  the response mask before the updates
    aepo                                            a second sample

verl's own settings do what entropy_bonus and kl_loss do: see ADVICE.
"""

import inspect
import math
import os
import sys

from verl.trainer.ppo.core_algos import register_policy_loss
from verl.workers.config import ActorConfig, PolicyLossConfig

from losses import CONTROLLERS, MASKS, METHODS, log_ratio, scale_gradient, token_mean

PREFIX = "entropy_control/"

# verl's settings of its own losses, which the losses here do not read.
NOT_READ = {
    "clip_ratio": ActorConfig,
    "clip_ratio_low": ActorConfig,
    "clip_ratio_high": ActorConfig,
    "clip_ratio_c": ActorConfig,
    "clip_cov_ratio": PolicyLossConfig,
    "clip_cov_lb": PolicyLossConfig,
    "clip_cov_ub": PolicyLossConfig,
    "kl_cov_ratio": PolicyLossConfig,
    "ppo_kl_coef": PolicyLossConfig,
}

ADVICE = {
    "entropy_bonus": "use entropy_control/grpo with actor_rollout_ref.actor.entropy_coeff",
    "kl_loss": "use entropy_control/grpo with actor_rollout_ref.actor.use_kl_loss=True",
}

# What a knob of this name must be above.
ABOVE = {"clip_low": 0.0, "clip_high": 0.0, "dual_clip": 1.0}


# ---- which methods, which knobs ------------------------------------------------------------------


def wanted_tensors(method):
    """Names of the further tensors that a method takes: keyword arguments without a default."""
    arguments = inspect.signature(METHODS[method]).parameters.values()
    keywords = [argument for argument in arguments if argument.kind is argument.KEYWORD_ONLY]
    return [argument.name for argument in keywords if argument.default is argument.empty]


def default_knobs(method):
    """{name: default} of a method's knobs: keyword arguments with a default."""
    arguments = inspect.signature(METHODS[method]).parameters.values()
    return {
        argument.name: argument.default
        for argument in arguments
        if argument.default is not argument.empty and argument.name != "num_tokens"
    }


def why_not(method):
    """Why a method cannot be a policy loss of verl, in words; "" if it can.

    num_sequences can be had: it is verl's global_batch_size."""
    reasons = []
    missing = [name for name in wanted_tensors(method) if name != "num_sequences"]
    if missing:
        reasons.append(f"verl passes no {', '.join(missing)} to a policy loss")
    if method in MASKS:
        reasons.append(
            "it takes tokens out of the response mask before the updates, which is not for a "
            "policy loss to do"
        )
    if method == "aepo":
        reasons.append(
            "it puts answers of a second sample into the rollout batch, which is not for a "
            "policy loss to do"
        )
    elif method in CONTROLLERS:
        reasons.append(
            "its controller needs the rollout batch's entropy and the run's progress, which verl "
            "does not pass to a policy loss"
        )
    return ", and ".join(reasons)


WORKING = [method for method in METHODS if not why_not(method)]


def check_method(method):
    """Raises ValueError, in one line, unless the method is known and can work in verl."""
    working = ", ".join(WORKING)
    if method not in METHODS:
        raise ValueError(f"{PREFIX}{method} is unknown. These work in verl: {working}")
    reason = why_not(method)
    if reason:
        advice = f"; {ADVICE[method]}" if method in ADVICE else ""
        raise ValueError(
            f"{PREFIX}{method} cannot work in verl: {reason}{advice}. These work: {working}"
        )


def check_knobs(method, knobs):
    """Raises ValueError, in one line, if the method does not have one of the knobs."""
    own = default_knobs(method)
    for name in knobs:
        if name not in own:
            listed = ", ".join(f"{knob}={default}" for knob, default in own.items())
            raise ValueError(
                f"ENTROPY_CONTROL_KNOBS: {method} has no knob '{name}'. It has: {listed}"
            )


def read_knobs(text):
    """The knobs in a text such as "cov_frac=2e-2 cov_low=0.5", {name: value}.

    Raises ValueError, in one line, on a value that is refused or on a knob that no working method
    has."""
    known = set()
    for method in WORKING:
        known |= set(default_knobs(method))
    knobs = {}
    for setting in text.split():
        name, _, value = setting.partition("=")
        error = f"ENTROPY_CONTROL_KNOBS: {setting}:"
        if name not in known:
            raise ValueError(f"{error} no such knob. There are: {', '.join(sorted(known))}")
        if setting == "dual_clip=none":
            knobs[name] = None
            continue
        try:
            knobs[name] = float(value)
        except ValueError:
            raise ValueError(f"{error} a number is expected; spaces separate knobs") from None
        if not math.isfinite(knobs[name]):
            raise ValueError(f"{error} a finite number is expected")
        if name.endswith("_frac") and not 0 < knobs[name] <= 1:
            raise ValueError(f"{error} a fraction in (0, 1] is expected, not per cent")
        if knobs[name] <= ABOVE.get(name, -math.inf):
            raise ValueError(f"{error} it must be above {ABOVE[name]:g}")
    clip_cov_knobs = default_knobs("clip_cov") | knobs
    if clip_cov_knobs["cov_low"] > clip_cov_knobs["cov_high"]:
        raise ValueError("ENTROPY_CONTROL_KNOBS: cov_low is larger than cov_high")
    return knobs


def method_on_command_line(arguments):
    """The METHOD of ...policy_loss.loss_mode=entropy_control/METHOD; None if it is not there."""
    for argument in arguments:
        _, found, method = argument.partition(f"policy_loss.loss_mode={PREFIX}")
        if found:
            return method
    return None


# ---- the loss ------------------------------------------------------------------------------------


def check_config(method, loss_agg_mode, config):
    """Raises ValueError, in one line, on settings of verl that this loss would not follow."""
    expected = "seq-mean-token-mean" if method == "gspo" else "token-mean"
    if loss_agg_mode != expected:
        raise ValueError(
            f"{PREFIX}{method} needs actor_rollout_ref.actor.loss_agg_mode={expected}, "
            f"not {loss_agg_mode}"
        )
    for name, owner in NOT_READ.items():
        settings = config if owner is ActorConfig else config.policy_loss
        value = getattr(settings, name)
        if value != getattr(owner, name):
            raise ValueError(
                f"{PREFIX}{method} does not read {name}={value}: leave it out, and use "
                f"ENTROPY_CONTROL_KNOBS for {', '.join(default_knobs(method))}"
            )


def share_of_rank(config, name, of_this_call):
    """A count of the optimizer step, divided by the number of ranks; without it, of_this_call.

    verl averages gradients over the ranks. A sum over one rank's tokens, divided by the rank's
    share, so becomes the sum over all tokens, divided by their number."""
    info = config.global_batch_info
    ranks = info.get("dp_size", 1)
    if info.get(name) is not None:
        return info[name] / ranks
    if ranks > 1:
        raise ValueError(f"verl gave no {name}, which {ranks} ranks need to normalise the loss")
    return of_this_call.clamp(min=1)


def make_policy_loss(method):
    """The method as verl calls it. All tensors are (B, T); returns a loss and {name: float}."""

    def policy_loss(
        old_log_prob,
        log_prob,
        advantages,
        response_mask,
        loss_agg_mode="token-mean",
        config=None,
        rollout_is_weights=None,
    ):
        check_method(method)
        check_knobs(method, KNOBS)
        check_config(method, loss_agg_mode, config)
        response_mask = response_mask.bool()
        if rollout_is_weights is not None:
            log_prob = scale_gradient(log_prob, rollout_is_weights)
        tokens = response_mask.sum()
        num_tokens = share_of_rank(config, "batch_num_tokens", tokens)
        tensors = {}
        if "num_sequences" in wanted_tensors(method):
            sequences = response_mask.any(1).sum()
            tensors["num_sequences"] = share_of_rank(config, "global_batch_size", sequences)
        loss, metrics = METHODS[method](
            log_prob,
            old_log_prob,
            advantages,
            response_mask,
            **tensors,
            **KNOBS,
            num_tokens=num_tokens,
        )

        verl_metrics = {}
        for name, value in metrics.items():
            name = name.replace("policy/clip_frac", "policy/pg_clipfrac")
            mean = value * num_tokens / tokens.clamp(min=1)
            verl_metrics[name.replace("policy/", "actor/")] = float(mean)
        log_r = log_ratio(log_prob.detach(), old_log_prob, response_mask)
        verl_metrics["actor/ppo_kl"] = float(token_mean(-log_r, response_mask, tokens.clamp(min=1)))
        return loss, verl_metrics

    return policy_loss


# ---- at import -----------------------------------------------------------------------------------

KNOBS = read_knobs(os.environ.get("ENTROPY_CONTROL_KNOBS", ""))
CHOSEN = method_on_command_line(sys.argv)
if CHOSEN is not None:
    check_method(CHOSEN)
    check_knobs(CHOSEN, KNOBS)
for name in METHODS:
    register_policy_loss(PREFIX + name)(make_policy_loss(name))
