"""in_verl.py against verl's own losses, and what it refuses.

The tests need verl 0.9.1 and are skipped without it. .ci/run installs what they need of it.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed; .ci/run says how to install it")

from verl.trainer.ppo.core_algos import get_policy_loss_fn  # noqa: E402
from verl.workers.config import ActorConfig, PolicyLossConfig  # noqa: E402

import train  # noqa: E402
from experiments import in_verl  # noqa: E402
from losses import METHODS, scale_gradient  # noqa: E402

HERE = Path(__file__).resolve().parents[1]

# What verl says of the optimizer step: ranks, tokens, answers. None: it does not say.
STEPS = [
    {"dp_size": 1, "batch_num_tokens": None, "global_batch_size": None},
    {"dp_size": 1, "batch_num_tokens": 77, "global_batch_size": 6},
    {"dp_size": 2, "batch_num_tokens": 100, "global_batch_size": 12},
    {"dp_size": 8, "batch_num_tokens": 1001, "global_batch_size": 96},
]


def random_batch(seed):
    """Six answers of up to 30 tokens, one of them without a token.

    The ratios go beyond all clips. No two covariances are equal: of equal ones kl_cov and verl's
    may choose different tokens."""
    generator = torch.Generator().manual_seed(seed)
    shape = (6, 30)
    old_log_prob = -3 * torch.rand(shape, generator=generator, dtype=torch.float64)
    factor = torch.randn(shape, generator=generator, dtype=torch.float64).exp()
    lengths = torch.tensor([[30], [21], [9], [1], [0], [14]])
    advantages = torch.randn((6, 1), generator=generator, dtype=torch.float64)
    return {
        "old_log_prob": old_log_prob,
        "log_prob": old_log_prob * factor,
        "advantages": advantages.expand(shape).clone(),
        "response_mask": torch.arange(30) < lengths,
    }


def actor_config(step=None, policy_loss=None, **settings):
    """verl's own configuration of the actor, with what it says of the optimizer step."""
    config = ActorConfig(
        strategy="fsdp",
        rollout_n=8,
        use_dynamic_bsz=True,
        policy_loss=PolicyLossConfig(**(policy_loss or {})),
        **settings,
    )
    config.global_batch_info.update(STEPS[0] if step is None else step, loss_scale_factor=None)
    return config


def call(name, batch, config, mode="token-mean", **more):
    """Loss, gradient and metrics of a policy loss, called as verl's workers call it."""
    log_prob = batch["log_prob"].clone().requires_grad_()
    arguments = batch | {"log_prob": log_prob} | more
    torch.manual_seed(0)
    loss, metrics = get_policy_loss_fn(name)(**arguments, loss_agg_mode=mode, config=config)
    loss.backward()
    return loss.detach(), log_prob.grad, metrics


def assert_same(ours, theirs):
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=1e-6)


# ---- parity with verl's own losses ---------------------------------------------------------------

# Our method and its knobs, verl's loss and its settings. Where the two do not have the same
# defaults, the settings say in what they differ.
PAIRS = {
    # verl has a dual clip of 3 by default.
    "vanilla": ("grpo", "dual_clip=3", "vanilla", {}, {}),
    "vanilla without dual clip": ("grpo", "", "vanilla", {}, {"clip_ratio_c": 1e9}),
    "clip-higher": (
        "clip_higher",
        "",
        "vanilla",
        {},
        {"clip_ratio_c": 1e9, "clip_ratio_high": 0.28},
    ),
    # verl keeps PPO's ratio clip of 0.2 by default; the authors' recipe sets it to 1, as here.
    "clip_cov": (
        "clip_cov",
        "cov_frac=0.2 cov_low=0.1 cov_high=2",
        "clip_cov",
        {"clip_cov_ratio": 0.2, "clip_cov_lb": 0.1, "clip_cov_ub": 2.0},
        {"clip_ratio_low": 1.0, "clip_ratio_high": 1.0},
    ),
    "clip_cov by verl's defaults": (
        "clip_cov",
        "cov_frac=2e-4 cov_low=1 cov_high=5 clip_low=0.2 clip_high=0.2",
        "clip_cov",
        {},
        {},
    ),
    "kl_cov": (
        "kl_cov",
        "cov_frac=0.1 kl_coef=0.5",
        "kl_cov",
        {"kl_cov_ratio": 0.1, "ppo_kl_coef": 0.5},
        {},
    ),
    # verl's coefficient is a tenth of the paper's, and its share that of the paper's 32B runs.
    "kl_cov by verl's defaults": ("kl_cov", "cov_frac=2e-4 kl_coef=0.1", "kl_cov", {}, {}),
    # verl has a lower bound, 1 - 0.2.
    "cispo": ("cispo", "clip_low=0.2", "cispo", {}, {}),
    # verl's bounds are PPO's by default, the paper's a thousandth of them.
    "gspo": ("gspo", "clip_low=0.2 clip_high=0.2", "gspo", {}, {}),
    "gspo, narrow": ("gspo", "", "gspo", {}, {"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4}),
}


@pytest.mark.parametrize("with_weights", [False, True])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("pair", PAIRS)
def test_equals_verls_own(pair, step, with_weights, monkeypatch):
    """Loss and gradient; with weights for the engine mismatch the gradient alone, since ours leaves
    the loss as it is. clip_cov draws the same tokens from the same seed on a CPU."""
    method, knobs, theirs, policy_loss, settings = PAIRS[pair]
    monkeypatch.setattr(in_verl, "KNOBS", in_verl.read_knobs(knobs))
    mode = "seq-mean-token-mean" if method == "gspo" else "token-mean"
    verl_config = actor_config(step, policy_loss, **settings)
    for seed in range(5):
        batch = random_batch(seed)
        weights = {}
        if with_weights:
            weights["rollout_is_weights"] = 2 * torch.rand(6, 30, dtype=torch.float64)
        ours = call(f"entropy_control/{method}", batch, actor_config(step), mode, **weights)
        expected = call(theirs, batch, verl_config, mode, **weights)
        assert expected[1].abs().max() > 1e-4
        if with_weights:
            plain = call(f"entropy_control/{method}", batch, actor_config(step), mode)
            assert ours[0] == plain[0]
            expected = (plain[0], expected[1])
        assert_same(ours, expected)


def test_grpo_has_no_dual_clip_unless_asked():
    batch = random_batch(0)
    ours = call("entropy_control/grpo", batch, actor_config())
    theirs = call("vanilla", batch, actor_config())
    assert abs(ours[0] - theirs[0]) > 0.01


def test_metrics_have_verls_names_and_values(monkeypatch):
    """Each is a mean over the micro-batch's tokens, whatever the step's number of tokens is.
    verl's pg_clipfrac of clip_cov is the share of dropped tokens, here selected_frac."""
    batch = random_batch(0)
    for step in STEPS:
        ours = call("entropy_control/grpo", batch, actor_config(step))[2]
        theirs = call("vanilla", batch, actor_config(step, clip_ratio_c=1e9))[2]
        assert ours == pytest.approx({name: theirs[name] for name in ours}, abs=1e-6)
        assert set(ours) == {"actor/pg_clipfrac", "actor/ppo_kl"}

        monkeypatch.setattr(in_verl, "KNOBS", {"cov_frac": 0.2, "cov_low": 0.1})
        ours = call("entropy_control/clip_cov", batch, actor_config(step))[2]
        policy_loss = {"clip_cov_ratio": 0.2, "clip_cov_lb": 0.1}
        wide = {"clip_ratio_low": 1.0, "clip_ratio_high": 1.0}
        theirs = call("clip_cov", batch, actor_config(step, policy_loss, **wide))[2]
        assert ours["actor/selected_frac"] == pytest.approx(theirs["actor/pg_clipfrac"], abs=1e-6)
        assert ours["actor/selected_frac"] > 0
        monkeypatch.setattr(in_verl, "KNOBS", {})


@pytest.mark.parametrize("method", in_verl.WORKING)
def test_is_the_function_of_losses(method):
    """The loss, called directly with the step's counts, has the wrapper's value and gradient."""
    batch = random_batch(1)
    step = STEPS[2]
    mode = "seq-mean-token-mean" if method == "gspo" else "token-mean"
    weights = torch.rand(6, 30, dtype=torch.float64)
    ours = call(
        f"entropy_control/{method}", batch, actor_config(step), mode, rollout_is_weights=weights
    )
    log_prob = batch["log_prob"].clone().requires_grad_()
    torch.manual_seed(0)
    loss, _ = METHODS[method](
        scale_gradient(log_prob, weights),
        batch["old_log_prob"],
        batch["advantages"],
        batch["response_mask"],
        num_tokens=50,
        **({"num_sequences": 6} if method == "gspo" else {}),
    )
    loss.backward()
    assert_same(ours, (loss.detach(), log_prob.grad))


@pytest.mark.parametrize("method", ["grpo", "clip_higher", "ce_gppo", "cispo", "gspo"])
def test_micro_batches_and_ranks_add_up(method):
    """Two ranks with two micro-batches each: the mean over ranks of the sums over micro-batches is
    the loss of all rows at once."""
    batch = random_batch(2)
    mode = "seq-mean-token-mean" if method == "gspo" else "token-mean"
    answers = int(batch["response_mask"].any(1).sum())
    counts = {"batch_num_tokens": int(batch["response_mask"].sum()), "global_batch_size": answers}
    whole = call(f"entropy_control/{method}", batch, actor_config(), mode)
    parts = []
    for rows in ([0], [1, 2], [3, 5], [4]):  # row 4 has no token
        part = {name: tensor[rows] for name, tensor in batch.items()}
        config = actor_config({"dp_size": 2, **counts})
        parts.append(call(f"entropy_control/{method}", part, config, mode)[0])
    torch.testing.assert_close(sum(parts) / 2, whole[0], rtol=0, atol=1e-6)


def test_a_call_without_a_token_gives_zero():
    batch = random_batch(3)
    batch["response_mask"] = torch.zeros_like(batch["response_mask"])
    for method in in_verl.WORKING:
        mode = "seq-mean-token-mean" if method == "gspo" else "token-mean"
        for step in STEPS:
            loss, gradient, metrics = call(
                f"entropy_control/{method}", batch, actor_config(step), mode
            )
            assert loss == 0 and gradient.abs().sum() == 0
            assert all(math.isfinite(value) for value in metrics.values())


# ---- refusals ------------------------------------------------------------------------------------

REFUSED = {
    "entropy_bonus": "no token_entropy to a policy loss; use entropy_control/grpo with .*coeff",
    "kl_loss": "no ref_log_probs to a policy loss; use entropy_control/grpo with .*use_kl_loss",
    "steer": "no old_token_entropy",
    "par": "controller needs the rollout batch's entropy",
    "quadrant": "no old_token_entropy",
    "w_reinforce": "no rewards",
    "entropy_advantage": "no old_token_entropy",
    "entropic": "controller needs the rollout batch's entropy",
    "dcpo": "no rewards, old_hot_log_probs, old_cold_log_probs .*controller",
    "aepo": "answers of a second sample",
    "flex_clip": "controller needs the rollout batch's entropy",
    "fork_tokens": "no old_token_entropy",
    "adaptive_entropy": "no token_entropy .*controller",
    "aer": "no token_entropy, group_accuracy .*controller",
    "siren": "no nucleus_entropy .*controller",
    "clip_b": "response mask before the updates",
    "clip_v": "response mask before the updates",
}


def test_every_method_works_or_is_refused():
    working = "grpo clip_higher clip_cov kl_cov rand_pos_clip ce_gppo cispo gspo".split()
    assert in_verl.WORKING == working
    assert set(working) | set(REFUSED) == set(METHODS)
    assert not set(working) & set(REFUSED)


@pytest.mark.parametrize("method", REFUSED)
def test_a_method_that_cannot_work_says_why(method):
    message = f"entropy_control/{method} cannot work in verl: .*{REFUSED[method]}"
    with pytest.raises(ValueError, match=message) as error:
        call(f"entropy_control/{method}", random_batch(0), actor_config())
    assert "\n" not in str(error.value)


def test_settings_that_are_not_read_are_refused():
    batch = random_batch(0)
    others = {"clip_ratio": 0.1, "clip_ratio_low": 0.1, "clip_ratio_high": 0.28, "clip_ratio_c": 10}
    for name, value in others.items():
        with pytest.raises(ValueError, match=f"does not read {name}={value}: .*dual_clip"):
            call("entropy_control/grpo", batch, actor_config(**{name: value}))
    for name in ("clip_cov_ratio", "clip_cov_lb", "clip_cov_ub", "kl_cov_ratio", "ppo_kl_coef"):
        with pytest.raises(ValueError, match=f"does not read {name}=0.5: .*cov_frac"):
            call("entropy_control/clip_cov", batch, actor_config(policy_loss={name: 0.5}))


def test_aggregations_are_refused():
    batch = random_batch(0)
    for mode in ("token-sum", "seq-mean-token-sum", "seq-mean-token-mean"):
        with pytest.raises(ValueError, match=f"loss_agg_mode=token-mean, not {mode}"):
            call("entropy_control/kl_cov", batch, actor_config(), mode)
    with pytest.raises(ValueError, match="loss_agg_mode=seq-mean-token-mean, not token-mean"):
        call("entropy_control/gspo", batch, actor_config())


def test_several_ranks_need_the_count_of_the_step():
    step = {"dp_size": 2, "batch_num_tokens": None, "global_batch_size": 12}
    with pytest.raises(ValueError, match="no batch_num_tokens, which 2 ranks need"):
        call("entropy_control/grpo", random_batch(0), actor_config(step))


def test_a_knob_of_another_method_is_refused(monkeypatch):
    monkeypatch.setattr(in_verl, "KNOBS", {"cov_frac": 0.1})
    with pytest.raises(ValueError, match="grpo has no knob 'cov_frac'. It has: clip_low=0.2"):
        call("entropy_control/grpo", random_batch(0), actor_config())


def test_the_method_on_the_command_line_is_found():
    flag = "actor_rollout_ref.actor.policy_loss.loss_mode"
    assert in_verl.method_on_command_line(["-m", f"{flag}=entropy_control/kl_cov"]) == "kl_cov"
    assert in_verl.method_on_command_line(["-m", f"{flag}=kl_cov", "a=b"]) is None
    with pytest.raises(ValueError, match="entropy_control/clip_covv is unknown. .*clip_cov, "):
        in_verl.check_method("clip_covv")


@pytest.mark.parametrize(
    "setting, message",
    [
        ("cov_frc=0.1", "no such knob. There are: .*cov_frac"),
        ("cov_frac", "a number is expected"),
        ("cov_frac=0.1,cov_low=2", "a number is expected; spaces separate knobs"),
        ("cov_frac=2", "not per cent"),
        ("cov_frac=0", "a fraction in"),
        ("kl_coef=nan", "a finite number"),
        ("clip_high=0", "above 0"),
        ("dual_clip=1", "above 1"),
        ("cov_low=6", "cov_low is larger than cov_high"),
        ("num_tokens=3", "no such knob"),
        ("positive_weight=0.5", "no such knob"),
    ],
)
def test_bad_knobs_are_refused(setting, message):
    with pytest.raises(ValueError, match=f"ENTROPY_CONTROL_KNOBS: .*{message}") as error:
        in_verl.read_knobs(setting)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", in_verl.WORKING)
def test_knobs_are_read_as_train_reads_them(method):
    for name in in_verl.default_knobs(method):
        for value in ("0.25", "1", "0", "-1", "1.5", "none", "x", "inf"):
            setting = f"{name}={value}"
            if name == "clip_low" and value == "1.5":
                continue  # train.py refuses it; it is no bound at all
            try:
                expected = train.parse_knobs(method, [setting])[0][name]
            except ValueError:
                with pytest.raises(ValueError):
                    in_verl.read_knobs(setting)
            else:
                assert in_verl.read_knobs(setting) == {name: expected}


# ---- verl loads it -------------------------------------------------------------------------------


def python(arguments, folder, module, knobs=""):
    variables = {"VERL_USE_EXTERNAL_MODULES": module, "ENTROPY_CONTROL_KNOBS": knobs}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder.parent,
        env=os.environ | variables | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("copied", [False, True])
def test_verl_loads_it_by_the_environment(copied, tmp_path):
    """Importing any part of verl registers the losses, from a checkout or two copied files."""
    folder = HERE
    module = "experiments.in_verl"
    if copied:
        folder = tmp_path / "mine"
        module = "in_verl"
        folder.mkdir()
        for file in (HERE / "losses.py", HERE / "experiments/in_verl.py"):
            (folder / file.name).write_text(file.read_text())
    program = (
        "from verl.trainer.ppo.core_algos import get_policy_loss_fn as get; import sys; "
        f"get('entropy_control/clip_cov'); print(sys.modules['{module}'].KNOBS)"
    )
    run = python(["-c", program], folder, module, "cov_frac=2e-2 cov_low=0.5")
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "{'cov_frac': 0.02, 'cov_low': 0.5}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, knobs, message",
    [
        ("par", "", "entropy_control/par cannot work in verl"),
        ("kl_cov", "cov_low=0.5", "kl_cov has no knob 'cov_low'"),
    ],
)
def test_the_command_line_is_checked_at_once(method, knobs, message):
    chosen = f"actor_rollout_ref.actor.policy_loss.loss_mode=entropy_control/{method}"
    run = python(["-m", "verl.trainer.main_ppo", chosen], HERE, "experiments.in_verl", knobs)
    assert run.returncode == 1
    assert message in run.stderr.splitlines()[-1]
