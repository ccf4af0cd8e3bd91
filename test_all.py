"""Every test here turns red when the behaviour that it names is taken away.

    pytest -q                                    all tests, those of experiments/ too
    pytest -q test_all.py -m "not slow"          the mathematics and short runs, in half a minute

Order: losses, task and verifier, entropy, sampling, diagnosis, whole runs, README, exercises.
"""

import ast
import copy
import functools
import gzip
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple
from unittest.mock import Mock

from rollout import prepare_environment

prepare_environment()

import matplotlib.figure
import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Config, Qwen2Config

import data
import diagnose
import entropy
import losses
import memory
import policy
import record
import rollout
import tiny
import train
import verify
from data import Problem, first_prompt, load_problems, preview, render, render_all
from diagnose import read_metrics
from experiments.answers import (
    OTHERS,
    PAIRS,
    RIGHT_ANSWERS,
    WRONG_ANSWERS,
    hedges_of,
    pairs_of,
)
from experiments.make_model import make_model
from losses import (
    CONTROLLERS,
    MASKS,
    METHODS,
    group_advantages,
    importance_ratio,
    k3,
    ppo_surrogate,
    scale_gradient,
    token_covariance,
    token_mean,
)
from record import checkpoints
from train import default_knobs, parse_knobs, wanted_tensors
from verify import RULES, Score, judge_countdown, judge_math, pass_at_k, score

HERE = Path(losses.__file__).parent
torch.set_num_threads(1)  # faster at these sizes; the same sums whatever OMP_NUM_THREADS


# ---- losses: cases and helpers -------------------------------------------------------------------


class Case(NamedTuple):
    """The four arguments of every loss, (B, T) each."""

    log_probs: torch.Tensor
    old_log_probs: torch.Tensor
    advantages: torch.Tensor
    response_mask: torch.Tensor


def random_case(B=6, dtype=torch.float64, spread=0.3):
    """B answers of up to 10 tokens, as from groups of 3. B is a multiple of 6."""
    T = 10
    g = torch.Generator().manual_seed(0)
    old = -torch.rand(B, T, generator=g, dtype=dtype) * 3 - 0.02
    noise = torch.randn(B, T, generator=g, dtype=dtype)
    log_probs = (old + spread * noise).clamp(max=-1e-3)
    rewards = torch.tensor([1, 0, 0, 1, 1, 0] * (B // 6), dtype=dtype)
    advantages = group_advantages(rewards, 3)[:, None].expand(B, T).clone()
    lengths = torch.tensor([10, 7, 3, 9, 10, 1] * (B // 6))
    mask = torch.arange(T) < lengths[:, None]
    return Case(log_probs.requires_grad_(), old, advantages, mask)


def extras(method, case):
    """The further tensors that a method wants, plausible and with the case's shape."""
    g = torch.Generator().manual_seed(1)
    shape = case.log_probs.shape
    tensors = {}
    for name in wanted_tensors(method):
        noise = torch.rand(shape, generator=g, dtype=case.log_probs.dtype)
        if name == "num_sequences":
            tensors[name] = torch.tensor(len(case.log_probs))
        elif name.endswith("log_probs"):
            tensors[name] = case.log_probs.detach() + 0.2 * noise
        else:
            tensors[name] = 0.1 + 2 * noise
    return tensors


def rows_of(tensors, rows):
    """Some rows of each tensor; a scalar stays."""
    return {name: x[rows] if x.dim() else x for name, x in tensors.items()}


def leaf(x):
    """A copy that collects its own gradient."""
    return x.detach().clone().requires_grad_()


def run(method, case, tensors=None, **knobs):
    """(loss, gradient with respect to log_probs, metrics) of a method."""
    if tensors is None:
        tensors = extras(method, case)
    log_probs = leaf(case.log_probs)
    torch.manual_seed(0)
    loss, metrics = METHODS[method](log_probs, *case[1:], **tensors, **knobs)
    loss.backward()
    return loss.detach(), log_probs.grad, metrics


# ---- losses: shared lines by hand ----------------------------------------------------------------


def test_group_advantages_by_hand():
    # The mean of 1, 0, 0, 0 is 0.25 and their unbiased standard deviation 0.5.
    rewards = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 1])
    centred = torch.tensor([0.75, -0.25, -0.25, -0.25])
    advantages = group_advantages(rewards, 4)
    assert torch.allclose(advantages[:4], centred / (0.5 + 1e-6))
    assert (advantages[4:] == 0).all()  # no variance: exactly zero
    assert torch.equal(group_advantages(rewards, 4, "none")[:4], centred)
    assert torch.equal(group_advantages(rewards, 1), rewards)


@pytest.mark.parametrize("reward", [0.1, 0.7, -2.3, 1e6 + 0.1])
@pytest.mark.parametrize("group_size", [3, 8, 12])
def test_a_group_of_equal_rewards_has_no_advantage_whatever_the_reward(reward, group_size):
    """The mean of equal fractions is off by rounding, and the standard deviation is as small."""
    rewards = torch.cat([torch.full((group_size,), reward), torch.arange(float(group_size))])
    for adv_norm in ("std", "none"):
        flat, varied = group_advantages(rewards, group_size, adv_norm).view(2, -1)
        assert (flat == 0).all() and varied.abs().sum() > 1


def test_ppo_surrogate_by_hand():
    ratio = torch.tensor([[1.5, 0.5, 1.5, 0.5, 20.0]])
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0, -1.0]])
    loss, clipped = ppo_surrogate(ratio, advantages, 0.2, 0.28)
    assert torch.allclose(loss, torch.tensor([[-1.28, -0.5, 1.5, 0.8, 20.0]]))
    assert clipped.tolist() == [[True, False, False, True, False]]
    loss, clipped = ppo_surrogate(ratio, advantages, 0.2, 0.28, dual_clip=3.0)
    assert loss[0, 4] == 3.0
    assert clipped.tolist() == [[True, False, False, True, True]]


def test_token_mean_counts_tokens_of_the_step():
    values = torch.tensor([[1.0, 2.0], [3.0, math.nan]])
    mask = torch.tensor([[True, True], [True, False]])
    assert token_mean(values, mask) == 2.0  # 6 / 3
    assert token_mean(values, mask, num_tokens=12) == 0.5  # 6 / 12


def test_token_covariance_by_hand():
    # Means over the first two tokens: -2 and 0.5. Then 1 * 0.5 and -1 * -0.5.
    log_probs = torch.tensor([[-1.0, -3.0, -9.0]])
    advantages = torch.tensor([[1.0, 0.0, 5.0]])
    mask = torch.tensor([[True, True, False]])
    assert token_covariance(log_probs, advantages, mask).tolist() == [[0.5, 0.5, 0.0]]


def test_mask_of_largest_by_hand():
    values = torch.tensor([[3.0, 9.0, 1.0], [math.nan, 2.0, 5.0]])
    candidates = torch.tensor([[True, False, True], [False, True, True]])
    chosen = losses.mask_of_largest(values, candidates, 2)
    assert chosen.tolist() == [[True, False, False], [False, False, True]]
    assert torch.equal(losses.mask_of_largest(values, candidates, 6), candidates)
    assert not losses.mask_of_largest(values, candidates, 0).any()


def test_k3_is_kl_from_the_sampling_side():
    """E over pi of k3(pi, other) is KL(pi || other), exactly; the other direction is not."""
    pi = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    other = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    mask = torch.ones(3, dtype=torch.bool)
    expectation = (pi * k3(pi.log(), other.log(), mask)).sum()
    kl = (pi * (pi / other).log()).sum()
    reverse_kl = (other * (other / pi).log()).sum()
    assert torch.isclose(expectation, kl, rtol=1e-12)
    assert not torch.isclose(expectation, reverse_kl, rtol=1e-2)


def test_scale_gradient_multiplies_the_loss_gradient_only():
    case = random_case()
    loss, gradient, _ = run("grpo", case)
    log_probs = leaf(case.log_probs)
    weight = torch.rand(log_probs.shape, dtype=log_probs.dtype)
    scaled_loss, _ = losses.grpo(scale_gradient(log_probs, weight), *case[1:])
    scaled_loss.backward()
    assert torch.allclose(log_probs.grad, gradient * weight, rtol=1e-12)
    assert torch.isclose(scaled_loss, loss, rtol=1e-12)


def test_the_functions_to_copy_with_a_method_are_named():
    """The head of losses.py lists what a method calls: with just that it runs, and is the same."""
    tree = ast.parse(Path(losses.__file__).read_text())
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    listed = losses.__doc__.split("take along what it calls:")[1].split("\n\n")[1]
    for line in listed.splitlines():
        method, *others = re.findall(r"\w+", line)
        copied = ["import math", "import torch"]
        copied += [ast.unparse(functions[name]) for name in [method, *others]]
        namespace = {}
        exec("\n\n".join(copied), namespace)
        case = random_case()
        tensors = extras(method, case)
        loss, _ = namespace[method](*case, **tensors)
        assert torch.equal(loss.detach(), run(method, case)[0])


# ---- losses: single methods ----------------------------------------------------------------------


def test_kl_loss_points_at_the_reference_and_k2_gives_the_gradient_of_kl():
    logits = torch.tensor([0.5, -0.2, 0.1], dtype=torch.float64, requires_grad=True)
    ref_logits = torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64)
    log_probs = torch.log_softmax(logits, 0)
    reference = torch.log_softmax(ref_logits, 0)
    kl = (log_probs.exp() * (log_probs - reference)).sum()
    (true_gradient,) = torch.autograd.grad(kl, logits, retain_graph=True)
    p = log_probs.detach().exp()
    for estimator, exact in (("k2", True), ("k3", False)):
        expectation = torch.zeros(3, dtype=torch.float64)
        for token in range(3):  # drawn from pi, on-policy
            log_prob = log_probs[token].view(1, 1)
            loss, _ = losses.kl_loss(
                log_prob,
                log_prob.detach(),
                torch.zeros_like(log_prob),
                log_prob > -99,
                ref_log_probs=reference[token].view(1, 1),
                kl_coef=1.0,
                estimator=estimator,
            )
            (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
            expectation += p[token] * gradient
        assert torch.allclose(expectation, true_gradient, rtol=1e-10) == exact


def test_par_gradient_law_on_logits():
    """Sampled token: r (1 - pi) A; every other: -r pi A; times lambda where A > 0."""
    for advantage, weight in ((2.0, 0.25), (-2.0, 1.0)):
        g = torch.Generator().manual_seed(0)
        logits = torch.randn(5, dtype=torch.float64, generator=g).requires_grad_()
        log_prob = torch.log_softmax(logits, 0)[2].view(1, 1)
        old = log_prob.detach() + 0.1
        A = torch.full_like(log_prob, advantage)
        loss, _ = losses.par(log_prob, old, A, log_prob < 0, positive_weight=0.25)
        loss.backward()
        pi = torch.softmax(logits.detach(), 0)
        r = math.exp(-0.1)
        law = -r * pi * advantage * weight
        law[2] = r * (1 - pi[2]) * advantage * weight
        assert torch.allclose(-logits.grad, law, rtol=1e-12)


def test_par_has_no_gradient_where_clipped():
    log_prob = torch.full((1, 1), -1.0, dtype=torch.float64, requires_grad=True)
    old = log_prob.detach() - 0.5
    loss, _ = losses.par(log_prob, old, torch.ones(1, 1), log_prob < 0, positive_weight=1.0)
    loss.backward()
    assert log_prob.grad == 0


def test_par_schedules():
    state = {}
    weights = []
    for H in (0.5, 0.5, 0.5, 0.1, 0.1, 0.1, 0.1):
        state = losses.par_weight(state, H, 0.0, {}, delta=0.4)
        weights.append(round(state["positive_weight"], 6))
    assert weights == [0.4, 0.8, 1.0, 0.6, 0.2, 0.0, 0.0]

    def weight_at(progress, **knobs):
        return losses.par_weight({}, 0.5, progress, {}, **knobs)["positive_weight"]

    assert weight_at(0.0, schedule="stage") == 0.0
    assert weight_at(0.5, schedule="stage") == 0.0
    assert weight_at(0.75, schedule="stage") == 0.5
    assert weight_at(0.0, schedule="epoch", epochs=3) == 0.0
    assert weight_at(0.34, schedule="epoch", epochs=3) == 0.5
    assert weight_at(0.99, schedule="epoch", epochs=3) == 1.0
    assert weight_at(0.3, schedule="constant", positive_weight=0.7) == 0.7


def test_steer_weights_by_hand():
    """The larger |Omega| of two tokens gets min_weight, the smaller a power of it."""
    p = torch.tensor([[0.5, 0.9]])
    p_old = torch.tensor([[0.4, 0.9]])
    H = torch.tensor([[1.0, 0.5]])
    A = torch.tensor([[1.0, 1.0]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    token_loss = -A * (p / p_old)
    omega = A / p_old * p * (1 - p) * (p.log() + H)
    sizes = {"released": omega.abs(), "theorem": (omega * p).abs()}

    def steer(log_probs, old_log_probs, entropies, **knobs):
        loss, _ = losses.steer(
            log_probs, old_log_probs, A, mask, old_token_entropy=entropies, **knobs
        )
        return loss

    for form, size in sizes.items():
        k = -math.log(0.8) / max(size.max().item(), 0.02)
        loss = steer(p.log(), p_old.log(), H, form=form, clip_low=0.9, clip_high=9.0)
        assert torch.isclose(loss, ((-k * size).exp() * token_loss).mean(), rtol=1e-6)

    loss = steer(p.log(), p_old.log(), H, mapping="linear", clip_low=0.9, clip_high=9.0)
    weights = torch.tensor([[1.2, 0.8]])
    if omega[0, 0].abs() > omega[0, 1].abs():
        weights = torch.tensor([[0.8, 1.2]])
    assert torch.isclose(loss, (weights * token_loss).mean(), rtol=1e-6)

    same = torch.full((1, 2), 0.5)
    loss = steer(same.log(), same.log(), same, mapping="linear")
    assert torch.isclose(loss, torch.tensor(-1.0))  # all equal: the midpoint of 0.8 and 1.2


# ---- losses: exact identities over a tiny vocabulary ---------------------------------------------


def entropy_of(logits):
    return -(torch.softmax(logits, 0) * torch.log_softmax(logits, 0)).sum()


def test_policy_gradient_changes_entropy_as_the_theorem_says():
    """Theorem 1 of 2505.22617 on a tabular softmax: dH = -eta Cov(log pi, pi A).

    entropy.entropy_change says the same of single tokens."""
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(7, generator=g, dtype=torch.float64)
    A = torch.randn(7, generator=g, dtype=torch.float64)
    eta = 1e-6
    log_p = torch.log_softmax(logits, 0)
    p = log_p.exp()
    H = entropy_of(logits)

    # An advantage is centred under the policy. The gradient of E_pi[A] with respect to the logits
    # does not change by that, but the theorem needs it.
    A = A - (p * A).sum()
    gradient = p * A
    change = (entropy_of(logits + eta * gradient) - H) / eta

    def centred(x):
        return x - (p * x).sum()

    theorem = -(p * centred(log_p) * centred(p * A)).sum()
    assert torch.isclose(change, theorem, rtol=1e-4)

    per_token = entropy.entropy_change(
        log_p,
        H.expand(7),
        (p * p).sum().expand(7),
        (p * p * log_p).sum().expand(7),
        A,
    )
    assert torch.isclose((p * per_token).sum(), theorem, rtol=1e-9)

    # The step of one sampled token moves the logits by A (one-hot - p).
    one_hot = torch.eye(7, dtype=torch.float64)[4]
    _, slope = torch.autograd.functional.jvp(entropy_of, logits, one_hot - p)
    assert torch.isclose(per_token[4], A[4] * slope, rtol=1e-9)


# ---- losses: switched off, a method is GRPO, bit for bit -----------------------------------------

NEUTRAL = {
    "grpo": {},
    "clip_higher": dict(clip_high=0.2),
    "entropy_bonus": dict(entropy_coef=0.0),
    "kl_loss": dict(kl_coef=0.0),
    "clip_cov": dict(cov_low=1e9, cov_high=2e9, clip_low=0.2, clip_high=0.2),
    "steer": dict(min_weight=1.0, clip_high=0.2, dual_clip=None),
    "par": dict(positive_weight=1.0),
    "rand_pos_clip": dict(drop_frac=0.0),
    "quadrant": dict(pos_likely=1.0, pos_rare=1.0, neg_likely=1.0, neg_rare=1.0),
    "w_reinforce": dict(positive_weight=2.0),  # where A = 2 on right answers and -1 on wrong ones
    "entropy_advantage": dict(alpha=0.0),
    "entropic": dict(alpha=0.0),
    "dcpo": dict(mix=0.0),
    "aepo": {},  # acts on the batch
    "flex_clip": dict(upper_share=0.0, lower_share=0.0),
    "fork_tokens": dict(top_frac=1.0),
    "adaptive_entropy": dict(entropy_coef=0.0),
    "aer": dict(alpha=0.0),
    "siren": dict(coef=0.0, anchor=1.0),
    "clip_b": {},  # acts on the mask
    "clip_v": {},  # acts on the mask
}

# Methods whose defaults do nothing here, most of them because a controller sets the knob.
SWITCHED_ON = {
    "clip_cov": dict(cov_frac=0.1, cov_low=0.1),
    "rand_pos_clip": dict(drop_frac=0.5),
    "quadrant": dict(neg_rare=0.5),
    "entropic": dict(alpha=0.5, confident=0.5),
    "dcpo": dict(mix=0.3),
    "flex_clip": dict(upper_share=1.0, lower_share=1.0),
    "adaptive_entropy": dict(entropy_coef=0.1),
    "aer": dict(alpha=0.1),
    "siren": dict(anchor=0.5),
}


@pytest.mark.parametrize("method", NEUTRAL)
def test_switched_off_equals_grpo(method):
    case = random_case(dtype=torch.float32)
    if method == "w_reinforce":  # extras() makes all its rewards positive
        case = case._replace(advantages=torch.full_like(case.advantages, 2.0))
    loss, gradient, _ = run("grpo", case)
    off_loss, off_gradient, _ = run(method, case, **NEUTRAL[method])
    assert torch.equal(loss, off_loss)
    assert torch.equal(gradient, off_gradient)
    if METHODS[method] is not losses.grpo:  # and switched on it does something
        on_loss, on_gradient, _ = run(method, case, **SWITCHED_ON.get(method, {}))
        assert not torch.equal(loss, on_loss) or not torch.equal(gradient, on_gradient)


def test_kl_cov_is_policy_gradient_on_policy_and_not_after():
    case = random_case()
    mask = case.response_mask
    on_policy = case._replace(log_probs=case.old_log_probs)
    _, gradient, _ = run("kl_cov", on_policy, cov_frac=0.5)
    policy_gradient = torch.where(mask, -case.advantages, 0) / mask.sum()
    assert torch.allclose(gradient, policy_gradient, rtol=1e-12)

    _, gradient, _ = run("kl_cov", case, cov_frac=0.5)
    ratio = importance_ratio(case.log_probs.detach(), case.old_log_probs, mask)
    policy_gradient = torch.where(mask, -case.advantages * ratio, 0) / mask.sum()
    assert (gradient - policy_gradient).abs().max() > 1e-3


def test_gradient_of_grpo_but_not_its_value():
    """CE-GPPO without its betas; on-policy CISPO, and GSPO where all answers are as long."""
    case = random_case(dtype=torch.float32)
    loss, gradient, _ = run("grpo", case)
    off_loss, off_gradient, _ = run("ce_gppo", case, beta_low=0.0, beta_high=0.0)
    assert torch.equal(gradient, off_gradient)
    assert not torch.equal(loss, off_loss)

    all_tokens = torch.ones_like(case.response_mask)
    on_policy = case._replace(log_probs=case.old_log_probs, response_mask=all_tokens)
    _, gradient, _ = run("grpo", on_policy)
    _, gradient_of_cispo, _ = run("cispo", on_policy)
    _, gradient_of_gspo, _ = run("gspo", on_policy)
    assert torch.equal(gradient, gradient_of_cispo)
    assert torch.allclose(gradient, gradient_of_gspo, rtol=1e-5)


# ---- losses: gradients on exactly the chosen tokens ----------------------------------------------


def clipped_tokens(case):
    """Where a clip at 0.8 and 1.2 takes the gradient, and the ratio; (B, T) each."""
    ratio = importance_ratio(case.log_probs.detach(), case.old_log_probs, case.response_mask)
    above = (case.advantages > 0) & (ratio > 1.2)
    below = (case.advantages < 0) & (ratio < 0.8)
    return above | below


def test_grpo_gradient_is_zero_exactly_where_clipped_or_padded():
    case = random_case(B=60)
    mask = case.response_mask
    clipped = clipped_tokens(case)
    assert 0 < (clipped & mask).sum() < mask.sum()
    _, gradient, metrics = run("grpo", case)
    assert torch.equal(gradient == 0, clipped | ~mask)
    share = (clipped & mask).sum() / mask.sum()
    assert torch.isclose(metrics["policy/clip_frac"].float(), share, rtol=1e-6)


def test_clip_cov_drops_only_candidates_and_as_many_as_it_says():
    case = random_case(B=60)
    mask = case.response_mask
    cov = token_covariance(case.log_probs, case.advantages, mask)
    candidates = (cov > 0.3) & (cov < 1.0) & ~clipped_tokens(case) & mask
    knobs = dict(cov_frac=0.05, cov_low=0.3, cov_high=1.0, clip_low=0.2, clip_high=0.2)
    _, gradient_of_grpo, _ = run("grpo", case)
    _, gradient, metrics = run("clip_cov", case, **knobs)
    dropped = (gradient == 0) & (gradient_of_grpo != 0)
    assert dropped.sum() == int(0.05 * mask.sum()) < candidates.sum()
    assert not (dropped & ~candidates).any()
    assert torch.equal(gradient[~dropped], gradient_of_grpo[~dropped])  # N counts the dropped too
    share = dropped.sum() / mask.sum()
    assert torch.isclose(metrics["policy/selected_frac"].float(), share, rtol=1e-6)

    draws = {losses.clip_cov(*case, **knobs)[0].item() for _ in range(5)}
    assert len(draws) > 1  # drawn at random
    before = torch.get_rng_state()
    losses.clip_cov(*case, cov_low=1e9, cov_high=2e9)
    assert torch.equal(before, torch.get_rng_state())  # no candidate, no draw


def test_kl_cov_penalises_the_largest_covariances():
    case = random_case(B=60)
    mask = case.response_mask
    cov = token_covariance(case.log_probs, case.advantages, mask)
    smallest_chosen = cov[mask].sort(descending=True).values[int(0.1 * mask.sum()) - 1]
    chosen = mask & (cov >= smallest_chosen)
    log_r = (case.log_probs - case.old_log_probs).detach()
    policy_gradient = torch.where(mask, -case.advantages * log_r.exp(), 0) / mask.sum()
    penalty_gradient = torch.where(chosen, 0.7 * log_r.sign(), 0) / mask.sum()
    _, gradient, _ = run("kl_cov", case, cov_frac=0.1, kl_coef=0.7)
    assert torch.allclose(gradient, policy_gradient + penalty_gradient, rtol=1e-10)

    _, gradient, _ = run("kl_cov", case, cov_frac=1e-9)
    differs = ~torch.isclose(gradient, policy_gradient, rtol=1e-10)
    assert differs.sum() == 1  # at least one token, always


def test_par_at_zero_trains_on_wrong_answers_only():
    case = random_case()
    _, gradient, _ = run("par", case, positive_weight=0.0)
    only_wrong = case._replace(advantages=case.advantages.clamp(max=0))
    _, gradient_of_grpo, _ = run("grpo", only_wrong)
    assert torch.equal(gradient, gradient_of_grpo)


# ---- losses: invariances -------------------------------------------------------------------------

# These take a choice, a maximum or a mean over the tokens of one call.
SELECTS_PER_CALL = {"clip_cov", "kl_cov", "steer", "fork_tokens", "siren"}
DRAWS = {"clip_cov", "rand_pos_clip"}
ADDS_UP = [method for method in METHODS if method not in SELECTS_PER_CALL | DRAWS]
DRAWS_NOTHING = [method for method in METHODS if method not in DRAWS]


def four_more_columns(x, mask):
    """x (B, T) as (B, T + 4), with nan on its own padding and inf on the new: False in a mask."""
    if x.dim() == 0:
        return x
    if not x.is_floating_point():
        return torch.nn.functional.pad(x, (0, 4), value=False)
    poisoned = torch.where(mask, x.detach(), math.nan)
    return torch.nn.functional.pad(poisoned, (0, 4), value=math.inf)


@pytest.mark.parametrize("method", METHODS)
def test_padding_changes_nothing(method):
    """Neither more padding nor what stands on it, whatever a model makes of a pad token."""
    case = random_case()
    tensors = extras(method, case)
    mask = case.response_mask
    padded = Case(*[four_more_columns(x, mask) for x in case])
    padded_tensors = {name: four_more_columns(x, mask) for name, x in tensors.items()}
    loss, gradient, _ = run(method, case, tensors)
    padded_loss, padded_gradient, _ = run(method, padded, padded_tensors)
    assert torch.allclose(loss, padded_loss, rtol=1e-12)
    assert torch.allclose(gradient, padded_gradient[:, :10], rtol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_integer_masks_and_one_advantage_per_answer(method):
    """A mask of 0 and 1, and advantages (B, 1), are the same to the last bit."""
    case = random_case(B=12, dtype=torch.float32)
    tensors = extras(method, case)
    knobs = SWITCHED_ON.get(method, {})
    loss, gradient, metrics = run(method, case, tensors, **knobs)
    integers = case.response_mask.long()
    one_column = case.advantages[:, :1]
    others = [
        case._replace(response_mask=integers),
        case._replace(advantages=one_column),
        case._replace(response_mask=integers.int(), advantages=one_column),
    ]
    for other in others:
        other_loss, other_gradient, other_metrics = run(method, other, tensors, **knobs)
        assert torch.equal(loss, other_loss)
        assert torch.equal(gradient, other_gradient)
        assert metrics == other_metrics


@pytest.mark.parametrize("method", MASKS)
def test_integer_masks_and_one_advantage_per_answer_in_masks(method):
    case = random_case(B=12)
    g = torch.Generator().manual_seed(0)
    old = {"log_probs": case.old_log_probs}
    for name in ("token_entropy", "sum_p2", "sum_p2_log_p"):
        old[name] = torch.rand(case.old_log_probs.shape, generator=g, dtype=torch.float64)
    integers = case.response_mask.long()
    one_column = case.advantages[:, :1]
    knobs = dict(mu=0.1)
    if method == "clip_v":
        knobs["most_frac"] = 0.1

    def kept(advantages, response_mask):
        return MASKS[method](old, advantages, response_mask, torch.clone, **knobs)

    expected = kept(case.advantages, case.response_mask)
    assert 0 < expected.sum() < case.response_mask.sum()
    assert torch.equal(kept(case.advantages, integers), expected)
    assert torch.equal(kept(one_column, integers), expected)


@pytest.mark.parametrize("method", ADDS_UP)
def test_micro_batches_add_up(method):
    case = random_case()
    tensors = extras(method, case)
    loss, gradient, metrics = run(method, case, tensors)
    num_tokens = case.response_mask.sum()
    loss_sum = 0
    gradients = []
    metric_sums = dict.fromkeys(metrics, 0)
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        some = Case(*[x[rows] for x in case])
        some_tensors = rows_of(tensors, rows)
        some_loss, some_gradient, some_metrics = run(
            method, some, some_tensors, num_tokens=num_tokens
        )
        loss_sum = loss_sum + some_loss
        gradients.append(some_gradient)
        for name, value in some_metrics.items():
            metric_sums[name] = metric_sums[name] + value
    assert torch.allclose(loss_sum, loss, rtol=1e-6)
    assert torch.allclose(torch.cat(gradients), gradient, rtol=1e-6)
    for name, value in metrics.items():
        assert torch.allclose(metric_sums[name], value, rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_which_methods_take_nothing_from_an_answer_of_advantage_0(method):
    """Loss, gradient and metrics with and without the four such answers of twelve, of steps that
    count all."""
    case = random_case(B=12)
    some = torch.tensor([0, 1, 2, 5, 6, 8, 9, 11])
    case.advantages[[3, 4, 7, 10]] = 0.0
    tensors = extras(method, case)
    knobs = dict(SWITCHED_ON.get(method, {}))
    if method == "steer":
        knobs["mapping"] = "linear"  # of the least |Omega|; "exp" would see the largest only
    if method in ("kl_cov", "fork_tokens"):
        knobs |= {"cov_frac": 0.3} if method == "kl_cov" else {"top_frac": 0.4}
    num_tokens = case.response_mask.sum()
    loss, gradient, metrics = run(method, case, tensors, **knobs, num_tokens=num_tokens)
    fewer = Case(*[x[some] for x in case])
    fewer_tensors = rows_of(tensors, some)
    found = run(method, fewer, fewer_tensors, **knobs, num_tokens=num_tokens)
    others = [3, 4, 7, 10]
    same = (
        (gradient[others] == 0).all()
        and torch.allclose(found[0], loss, rtol=1e-12, atol=0)
        and torch.allclose(found[1], gradient[some], rtol=1e-12, atol=0)
    )
    assert same == (method in losses.NOTHING_AT_ZERO_ADVANTAGE)
    if same:
        assert gradient[some].abs().max() > 1e-3
        for name, value in metrics.items():
            assert torch.allclose(found[2][name].double(), value.double(), rtol=1e-6), name


@pytest.mark.parametrize("method", DRAWS_NOTHING)
def test_row_order_does_not_matter(method):
    case = random_case()
    tensors = extras(method, case)
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    loss, gradient, _ = run(method, case, tensors)
    shuffled = Case(*[x[order] for x in case])
    shuffled_loss, shuffled_gradient, _ = run(method, shuffled, rows_of(tensors, order))
    assert torch.allclose(shuffled_loss, loss, rtol=1e-10)
    assert torch.allclose(shuffled_gradient, gradient[order], rtol=1e-10)


# ---- losses: parity with the released code's numbers ---------------------------------------------


def golden():
    """One test for each loss that the released code computed of the same inputs."""
    path = HERE / "experiments" / "golden_losses.json"
    for i, case in enumerate(json.loads(path.read_text())):
        for j, expected in enumerate(case["expected"]):
            yield pytest.param(case, expected, id=f"{expected['method']}-{i}-{j}")


@pytest.mark.parametrize("case, expected", list(golden()))
def test_parity_with_released_code(case, expected):
    group_size = case["inputs"]["group_size"]
    inputs = {}
    for name, value in case["inputs"].items():
        inputs[name] = torch.tensor(value)
    mask = inputs["response_mask"]
    advantages = group_advantages(inputs["rewards"].float(), group_size)[:, None] * mask
    assert torch.allclose(advantages, torch.tensor(case["group_advantages"]), rtol=1e-5)

    tensors = {}
    if expected["method"] == "steer":
        tensors["old_token_entropy"] = inputs["token_entropy"]
    log_probs = inputs["log_probs"].float().requires_grad_()
    loss, _ = METHODS[expected["method"]](
        log_probs,
        inputs["old_log_probs"],
        inputs["advantages"],
        mask,
        **tensors,
        **expected["knobs"],
    )
    loss.backward()
    assert torch.isclose(loss, torch.tensor(expected["loss"]), rtol=1e-5)
    gradient = torch.tensor(expected["grad"])
    tolerance = 1e-5 * gradient.abs().max().item()
    assert torch.allclose(log_probs.grad, gradient, rtol=1e-5, atol=tolerance)


# ---- losses: every method by hand ----------------------------------------------------------------
#
# A right answer of four tokens, A = 2, and a wrong one of three, A = -1. Loss and gradient of each
# token are calculated by hand, before the division by the number of tokens.


def seven(*values):
    """A value for each token: four of the right answer, three of the wrong one."""
    assert len(values) == 7
    return torch.tensor(values, dtype=torch.float64)


def in_answers(values):
    """Seven values as two answers, (2, 4), with nan on the padding."""
    nan = torch.tensor([math.nan], dtype=torch.float64)
    return torch.cat([values, nan]).view(2, 4)


# fmt: off
# token               1     2     3     4      5     6     7
A       = seven(    2.0,  2.0,  2.0,  2.0,  -1.0, -1.0, -1.0)
P_OLD   = seven(    0.4,  0.4,  0.8,  0.2,   0.9,  0.5,  0.4)
P       = seven(    0.4,  0.6,  0.4,  0.6,   0.9, 0.75,  0.2)
RATIO   = seven(    1.0,  1.5,  0.5,  3.0,   1.0,  1.5,  0.5)  # P / P_OLD
ENTROPY = seven(    0.5,  1.0, 0.25,  4.0,  0.75,  0.1,  1.5)
FREE    = seven(   -2.0, -3.0, -1.0, -6.0,   1.0,  1.5,  0.5)  # -A r, and its own gradient
LOSS    = seven(   -2.0, -2.4, -1.0, -2.4,   1.0,  1.5,  0.8)  # GRPO: r = 1.2 at 2 and 4, 0.8 at 7
GRAD    = seven(   -2.0,  0.0, -1.0,  0.0,   1.0,  1.5,  0.0)  # GRPO: none at 2, 4 and 7
LOSS_28 = seven(   -2.0,-2.56, -1.0,-2.56,   1.0,  1.5,  0.8)  # with the upper bound at 1.28

REF     = seven(    0.4,  0.3,  0.4,  0.6,   0.9, 0.75,  0.4)  # P / 2 at 2, P * 2 at 7
RHO     = seven(    2.0,  2.0,  0.5,  1.0,   9.0,  9.0,  9.0)  # P_hot / P_OLD
ONE     = seven(    1.0,  1.0,  1.0,  1.0,   1.0,  1.0,  1.0)
RIGHT   = seven(    1.0,  1.0,  1.0,  1.0,   0.0,  0.0,  0.0)
WRONG   = seven(    0.0,  0.0,  0.0,  0.0,   1.0,  1.0,  1.0)
# fmt: on

MASK = ~in_answers(P).isnan()

TENSORS = {
    "token_entropy": ENTROPY,
    "old_token_entropy": ENTROPY,
    "nucleus_entropy": ENTROPY,
    "rewards": RIGHT,
    "group_accuracy": seven(0.25, 0.25, 0.25, 0.25, 0.75, 0.75, 0.75),
    "ref_log_probs": REF.log(),
    "old_hot_log_probs": (P_OLD * RHO).log(),
    "old_cold_log_probs": (P_OLD * 4).log(),
}


class Row(NamedTuple):
    """One calculation by hand: seven losses, their seven gradients, and the settings."""

    method: str
    loss: torch.Tensor
    grad: torch.Tensor
    knobs: dict = {}
    tensors: dict = {}  # instead of those of TENSORS
    other_grads: dict = {}  # {tensor: the seven gradients that it must get}
    divisor: float = 7  # of the loss, where the call has all tokens of the step


def assert_row(L, row):
    """Loss and gradients of the method of a losses.py L are those of the row.

    Twice: with the whole step in this call, and with half of its tokens and answers elsewhere.
    Returns the metrics of the second time."""
    for times in (1, 2):
        inputs = {}
        for name in wanted_tensors(row.method):
            if name == "num_sequences":
                inputs[name] = torch.tensor(2 * times)
            else:
                values = row.tensors.get(name, TENSORS.get(name))
                inputs[name] = leaf(in_answers(values))
        inputs["log_probs"] = leaf(in_answers(P.log()))
        loss, metrics = L.METHODS[row.method](
            old_log_probs=in_answers(P_OLD.log()),
            advantages=in_answers(A),
            response_mask=MASK,
            num_tokens=None if times == 1 else 14,
            **inputs,
            **row.knobs,
        )
        loss.backward()
        divisor = row.divisor * times
        assert math.isclose(loss.item(), row.loss.sum().item() / divisor, rel_tol=1e-9)
        for name, expected in (row.other_grads | {"log_probs": row.grad}).items():
            found = inputs[name].grad[MASK]
            assert torch.allclose(found, expected / divisor, rtol=1e-9, atol=1e-12), name
    return metrics


# With bounds 0.6 and 1.7 only tokens 4 and 7 are clipped.
WIDE_LOSS = seven(-2, -3, -1, -3.4, 1, 1.5, 0.6)
WIDE_GRAD = seven(-2, -3, -1, 0, 1, 1.5, 0)


def neutral_rows():
    """Switched off a method is GRPO, and both clip bounds reach it."""
    rows = []
    for method, neutral in NEUTRAL.items():
        if "clip_low" in default_knobs(METHODS[method]):
            usual = neutral | dict(clip_low=0.2, clip_high=0.2)
            wide = neutral | dict(clip_low=0.4, clip_high=0.7)
            rows.append(Row(method, LOSS, GRAD, usual))
            rows.append(Row(method, WIDE_LOSS, WIDE_GRAD, wide))
    return rows


# The dual clip holds the loss of a wrong token at 1.2: token 6, which then has no gradient.
DUAL_LOSS = seven(-2, -2.4, -1, -2.4, 1, 1.2, 0.8)
DUAL_GRAD = seven(-2, 0, -1, 0, 1, 0, 0)
DUAL_CLIP_ROWS = [
    Row("grpo", DUAL_LOSS, DUAL_GRAD, NEUTRAL["grpo"] | dict(dual_clip=1.2)),
    Row("steer", DUAL_LOSS, DUAL_GRAD, NEUTRAL["steer"] | dict(dual_clip=1.2)),
]


def kl_loss_row(estimator, penalty, slope):
    """kl_coef = 2: twice the penalties of the tokens, and twice their slopes."""
    knobs = dict(kl_coef=2.0, estimator=estimator)
    return Row("kl_loss", LOSS + 2 * penalty, GRAD + 2 * slope, knobs)


ln2 = math.log(2)
BASELINE_ROWS = [
    Row("clip_higher", LOSS_28, GRAD),
    Row(
        "entropy_bonus",
        LOSS - 0.1 * ENTROPY,
        GRAD,
        dict(entropy_coef=0.1),
        other_grads={"token_entropy": -0.1 * ONE},
    ),
    # d is -ln 2 at token 2 and ln 2 at token 7, 0 elsewhere. k3 = e^d - 1 - d, its slope 1 - e^d:
    # 0.5 - 1 + ln 2 and 0.5 at token 2, 2 - 1 - ln 2 and -1 at token 7.
    kl_loss_row(
        "k3",
        penalty=seven(0, ln2 - 0.5, 0, 0, 0, 0, 1 - ln2),
        slope=seven(0, 0.5, 0, 0, 0, 0, -1),
    ),
    # k2 = d^2 / 2, its slope -d.
    kl_loss_row(
        "k2",
        penalty=seven(0, ln2**2 / 2, 0, 0, 0, 0, ln2**2 / 2),
        slope=seven(0, ln2, 0, 0, 0, 0, -ln2),
    ),
]

# The covariance is 0.235 at tokens 2 and 4, 1.569 at token 7 and negative elsewhere.
# clip_cov's own ratio clip of [0, 2] holds token 4 at 2.
CLIP_COV_ROWS = [
    # Between 1 and 5 there is token 7 alone: it is dropped.
    Row(
        "clip_cov",
        seven(-2, -3, -1, -4, 1, 1.5, 0),
        seven(-2, -3, -1, 0, 1, 1.5, 0),
    ),
    # Between 1 and 1.5 there is none.
    Row(
        "clip_cov",
        seven(-2, -3, -1, -4, 1, 1.5, 0.5),
        seven(-2, -3, -1, 0, 1, 1.5, 0.5),
        dict(cov_high=1.5),
    ),
    # Nor between 1.6 and 5.
    Row(
        "clip_cov",
        seven(-2, -3, -1, -4, 1, 1.5, 0.5),
        seven(-2, -3, -1, 0, 1, 1.5, 0.5),
        dict(cov_low=1.6),
    ),
    # Above 0.2 there are three, but GRPO's clip has taken their gradient already: they stay.
    Row("clip_cov", LOSS, GRAD, dict(cov_low=0.2, cov_frac=1.0, clip_low=0.2, clip_high=0.2)),
]


def kl_cov_row(cov_frac, chosen):
    """kl_coef = 2: chosen tokens get 2 |ln r|, whose gradient is 2 sign(ln r)."""
    log_r = RATIO.log()
    loss = FREE + 2 * chosen * log_r.abs()
    grad = FREE + 2 * chosen * log_r.sign()
    return Row("kl_cov", loss, grad, dict(cov_frac=cov_frac, kl_coef=2.0))


KL_COV_ROWS = [
    kl_cov_row(0.25, chosen=seven(0, 0, 0, 0, 0, 0, 1)),  # int(1.75) = 1
    kl_cov_row(0.43, chosen=seven(0, 1, 0, 1, 0, 0, 1)),  # int(3.01) = 3
    kl_cov_row(1e-9, chosen=seven(0, 0, 0, 0, 0, 0, 1)),  # never fewer than 1
]


def steer_row(weight, scale=1.0, **knobs):
    """With H_old = scale c - log p, Omega is scale A r (1 - p) c: scale times the sizes below."""
    c = seven(1, 1, 0, 0, 1, 1, -1)
    return Row(
        "steer",
        weight * LOSS_28,
        weight * GRAD,
        dict(min_weight=0.25, **knobs),
        tensors={"old_token_entropy": scale * c - P.log()},
    )


# |A r (1 - p) c|: 2 * 1 * 0.6, 2 * 1.5 * 0.4, 0, 0, 1 * 1 * 0.1, 1 * 1.5 * 0.25, 1 * 0.5 * 0.8
STEER_SIZE = seven(1.2, 1.2, 0, 0, 0.1, 0.375, 0.4)
# Times p, and 0 where clipped: 1.2 * 0.4, clipped, 0, 0, 0.1 * 0.9, 0.375 * 0.75, clipped
STEER_SIZE_OF_THEOREM = seven(0.48, 0, 0, 0, 0.09, 0.28125, 0)
STEER_ROWS = [
    # The weight is 1 at size 0 and 1/4 at the largest.
    steer_row(weight=0.25 ** (STEER_SIZE / 1.2)),
    # The largest, 0.0012, is below 0.02, which takes its place: 0.001 / 0.02 = 1 / 20.
    steer_row(weight=0.25 ** (STEER_SIZE / 20), scale=1e-3),
    steer_row(weight=0.25 ** (STEER_SIZE_OF_THEOREM / 0.48), form="theorem"),
    # From 1.2 at size 0 to 0.25 at the largest.
    steer_row(weight=1.2 - 0.95 * STEER_SIZE / 1.2, mapping="linear"),
]


def advantage_row(method, *advantages, **knobs):
    """A method that replaces the advantages: GRPO's numbers in proportion to A."""
    proportion = seven(*advantages) / A
    return Row(method, LOSS * proportion, GRAD * proportion, knobs)


# fmt: off
ADVANTAGE_ROWS = [
    # A quarter of 2.
    advantage_row("par", 0.5, 0.5, 0.5, 0.5, -1, -1, -1, positive_weight=0.25),
    # All right tokens are dropped, and N still counts them.
    advantage_row("rand_pos_clip", 0, 0, 0, 0, -1, -1, -1, drop_frac=1.0),
    # Rare by P_OLD and ENTROPY are tokens 1 and 6; by P tokens 3 and 7 would be too.
    advantage_row("quadrant", 2, 1, 1, 1, -1, -1, -1, pos_likely=0.5),
    advantage_row("quadrant", 1, 2, 2, 2, -1, -1, -1, pos_rare=0.5),
    advantage_row("quadrant", 2, 2, 2, 2, -0.5, -1, -0.5, neg_likely=0.5),
    advantage_row("quadrant", 2, 2, 2, 2, -1, -0.5, -1, neg_rare=0.5),
    # The second is PSR, the third NSR.
    advantage_row("w_reinforce", 0.5, 0.5, 0.5, 0.5, -0.25, -0.25, -0.25,
                  positive_weight=0.5, negative_weight=0.25),
    advantage_row("w_reinforce", 1, 1, 1, 1, 0, 0, 0, positive_weight=1.0, negative_weight=0.0),
    advantage_row("w_reinforce", 0, 0, 0, 0, -1, -1, -1, positive_weight=0.0, negative_weight=1.0),
    # 0.4 H is 0.2, 0.4, 0.1, 1.6 and 0.3, 0.04, 0.6: at most |A| / 2 = 1 and 0.5.
    advantage_row("entropy_advantage", 2.2, 2.4, 2.1, 3.0, -0.7, -0.96, -0.5),
    # H is at most |A| / 4 = 0.5 and 0.25.
    advantage_row("entropy_advantage", 2.5, 2.5, 2.25, 2.5, -0.75, -0.9, -0.75,
                  alpha=1.0, kappa=4.0),
    # P_OLD > 0.6 at tokens 3 and 5: times 1.5, times 0.5.
    advantage_row("entropic", 2, 2, 3, 2, -0.5, -1, -1, alpha=0.5, confident=0.6),
    # 0.75 A, and 0.25 rho on right tokens: rho is RHO when hot, 4 when cold.
    advantage_row("dcpo", 2, 2, 1.625, 1.75, -0.75, -0.75, -0.75, mix=0.25, hot=1.0),
    advantage_row("dcpo", 2.5, 2.5, 2.5, 2.5, -0.75, -0.75, -0.75, mix=0.25, hot=0.0),
]
# fmt: on


def flex_clip_row(upper, lower, **knobs):
    """Tokens 2 and 4 stand at 1 + upper, token 7 at 1 - lower."""
    held = -2 * (1 + upper)
    loss = seven(-2, held, -1, held, 1, 1.5, 1 - lower)
    return Row("flex_clip", loss, GRAD, knobs)


BOTH = dict(upper_share=1.0, lower_share=1.0)
HALF = dict(upper_share=0.5, lower_share=0.5)
OTHER_SLOPES = dict(upper_slope=-0.5, upper_offset=0.7, lower_slope=0.3, lower_offset=0.1)

# The bounds are at p = 0.6 above and p = 0.2 below.
FLEX_CLIP_ROWS = [
    flex_clip_row(0.35, 0.274, **BOTH),  # 0.5 - 0.25 * 0.6 and 0.3 - 0.13 * 0.2
    flex_clip_row(0.275, 0.237, **HALF),  # halfway from 0.2
    flex_clip_row(0.35, 0.2, upper_share=1.0),
    flex_clip_row(0.4, 0.16, **BOTH, **OTHER_SLOPES),  # 0.7 - 0.5 * 0.6 and 0.1 + 0.3 * 0.2
    flex_clip_row(0.36, 0.36, **BOTH, narrowest=0.36),
    flex_clip_row(0.25, 0.25, **BOTH, widest=0.25),
    flex_clip_row(0.2, 0.2),
    flex_clip_row(0.1, 0.1, clip=0.1),
]


def ce_gppo_row(values, **knobs):
    """Where it is clipped, loss and gradient are both the bound times beta."""
    return Row("ce_gppo", values, values, knobs)


def cispo_row(weighted, **knobs):
    """The gradient is -A times the clipped ratio, the loss is that times log p."""
    return Row("cispo", weighted * P.log(), weighted, knobs)


def gspo_row(right, wrong, right_grad, wrong_grad, **knobs):
    """Each token has -A s / |y| with its answer's ratio s: -2 s / 4 and s / 3. Two answers."""
    loss = -right / 2 * RIGHT + wrong / 3 * WRONG
    grad = -right_grad / 2 * RIGHT + wrong_grad / 3 * WRONG
    return Row("gspo", loss, grad, knobs, divisor=2)


def fork_tokens_row(forks, top_frac):
    """GRPO's numbers on the forks. The highest entropies are those of tokens 1, 6 and 7."""
    return Row(
        "fork_tokens",
        LOSS * forks,
        GRAD * forks,
        dict(top_frac=top_frac),
        tensors={"old_token_entropy": seven(3, 0.1, 0.2, 0.3, 0.4, 2, 1)},
        divisor=top_frac * 7,
    )


CLIP_ROWS = [
    # 0.5 * 1.2 * 2 at tokens 2 and 4, 0.75 * 0.8 at token 7
    ce_gppo_row(seven(-2, -1.2, -1, -1.2, 1, 1.5, 0.6), beta_high=0.5),
    # 2 * 1.4 * 2 at tokens 2 and 4, 0.5 * 0.7 at token 7
    ce_gppo_row(
        seven(-2, -5.6, -1, -5.6, 1, 1.5, 0.35),
        beta_low=0.5,
        beta_high=2.0,
        clip_low=0.3,
        clip_high=0.4,
    ),
    # r is at most 1.2
    cispo_row(seven(-2, -2.4, -1, -2.4, 1, 1.2, 0.5)),
    # r is between 0.7 and 1.4
    cispo_row(seven(-2, -2.8, -1.4, -2.8, 1, 1.4, 0.7), clip_low=0.3, clip_high=0.4),
    # int(7/16 * 7) = 3
    fork_tokens_row(forks=seven(1, 0, 0, 0, 0, 1, 1), top_frac=7 / 16),
    # never fewer than 1
    fork_tokens_row(forks=seven(1, 0, 0, 0, 0, 0, 0), top_frac=1 / 64),
]

# gspo's ratios of whole answers: 1.2247 and 0.9086
S_RIGHT = (1.0 * 1.5 * 0.5 * 3.0) ** (1 / 4)
S_WRONG = (1.0 * 1.5 * 0.5) ** (1 / 3)
GSPO_ROWS = [
    # neither is clipped, then the right one, the wrong one, and both
    gspo_row(S_RIGHT, S_WRONG, S_RIGHT, S_WRONG, clip_low=0.1, clip_high=0.3),
    gspo_row(1.2, S_WRONG, 0, S_WRONG, clip_low=0.1, clip_high=0.2),
    gspo_row(S_RIGHT, 0.95, S_RIGHT, 0, clip_low=0.05, clip_high=0.3),
    gspo_row(1.0004, 0.9997, 0, 0),
]


def siren_row(peak, peak_frac, mean):
    """coef = 0.5, anchor = 2: 0.5 (mean - 2)^2 in all, so 7 times that before the division by 7."""
    slope = 7 * 2 * 0.5 * (mean - 2) / peak.sum()
    return Row(
        "siren",
        LOSS + 0.5 * (mean - 2) ** 2,
        GRAD,
        dict(anchor=2.0, coef=0.5, peak_frac=peak_frac),
        other_grads={"nucleus_entropy": peak * slope},
    )


ENTROPY_TERM_ROWS = [
    Row(
        "adaptive_entropy",
        LOSS - 0.1 * ENTROPY,
        GRAD,
        dict(entropy_coef=0.1),
        other_grads={"token_entropy": -0.1 * ONE},
    ),
    # The right answer's prompt, at 0.25, is hard and has half the bonus; the other is easy.
    Row(
        "aer",
        LOSS - 0.05 * ENTROPY * RIGHT,
        GRAD,
        dict(alpha=0.1),
        other_grads={"token_entropy": -0.05 * RIGHT},
    ),
    # No prompt is hard.
    Row("aer", LOSS, GRAD, dict(alpha=0.1, hard_below=0.25)),
    # Without an anchor there is no penalty.
    Row("siren", LOSS, GRAD),
    # ceil(0.8) = 1 of four and ceil(0.6) = 1 of three: (4 + 1.5) / 2
    siren_row(seven(0, 0, 0, 1, 0, 0, 1), peak_frac=0.2, mean=2.75),
    # ceil(2) = 2 of four and ceil(1.5) = 2 of three: (1 + 4 + 0.75 + 1.5) / 4
    siren_row(seven(0, 1, 0, 1, 1, 0, 1), peak_frac=0.5, mean=1.8125),
]

ROWS = [
    *neutral_rows(),
    *DUAL_CLIP_ROWS,
    *BASELINE_ROWS,
    *CLIP_COV_ROWS,
    *KL_COV_ROWS,
    *STEER_ROWS,
    *ADVANTAGE_ROWS,
    *FLEX_CLIP_ROWS,
    *CLIP_ROWS,
    *GSPO_ROWS,
    *ENTROPY_TERM_ROWS,
]


# ---- losses: controllers by hand -----------------------------------------------------------------


class Batch(NamedTuple):
    """What a rule is given for one rollout batch, and what the state must hold after it."""

    entropy: float
    progress: float
    metrics: dict
    expected: dict


def batch(entropy, progress=0.0, metrics=None, **expected):
    return Batch(entropy, progress, metrics or {}, expected)


class Training(NamedTuple):
    """Rollout batches of one training, one after the other."""

    method: str
    knobs: dict
    batches: list


CONTROLLER_RUNS = [
    Training(
        "par",
        dict(delta=0.4),
        [
            batch(0.2, positive_weight=0.4),  # at the target it still goes up
            batch(9.0, positive_weight=0.8),
            batch(9.0, positive_weight=1.0),  # not above 1
            batch(0.1, positive_weight=0.6),
            batch(0.0, positive_weight=0.2),
            batch(0.0, positive_weight=0.0),  # not below 0
        ],
    ),
    Training(
        "par",
        dict(schedule="stage"),
        [
            batch(9.0, progress=0.25, positive_weight=0.0),
            batch(9.0, progress=0.5, positive_weight=0.0),
            batch(9.0, progress=0.75, positive_weight=0.5),
        ],
    ),
    Training(
        "par",
        dict(schedule="epoch", epochs=3),
        [
            batch(9.0, progress=0.0, positive_weight=0.0),
            batch(9.0, progress=0.4, positive_weight=0.5),
            batch(9.0, progress=0.9, positive_weight=1.0),
        ],
    ),
    Training(
        "par",
        dict(schedule="constant", positive_weight=0.7),
        [batch(9.0, positive_weight=0.7)],
    ),
    Training(
        "entropic",
        {},
        [
            batch(0.3, alpha=0.202),  # 0.2 + 0.01 * 0.2
            batch(0.05, alpha=-0.05 + 0.01 * 0.15),
            batch(5.0, alpha=1.0),  # not above 1
        ],
    ),
    Training(
        "entropic",
        dict(target_entropy=0.3, kp=2.0, ki=0.5),
        [
            batch(0.5, alpha=0.5, integral=0.2),  # 2 * 0.2 + 0.5 * 0.2
            batch(-9.0, alpha=-1.0, integral=-9.1),  # 0.2 - 9.3
        ],
    ),
    # a0 is 0.05 / 0.25, 0 / 0.25, 0.1 / 0.5 and 0.1 / 0.1; a = a0 / (1 + a0).
    Training("dcpo", {}, [batch(0.45, metrics={"reward/mean": 0.25}, mix=1 / 6, hot=1)]),
    Training("dcpo", {}, [batch(0.5, metrics={"reward/mean": 0.25}, mix=0, hot=1)]),
    Training("dcpo", {}, [batch(0.9, metrics={"reward/mean": 0.5}, mix=1 / 6, hot=0)]),
    Training("dcpo", {}, [batch(0.1, metrics={"reward/mean": 0.1}, mix=0.5, hot=1)]),
    Training(
        "aepo",
        {},
        [
            batch(0.5, second_temperature=1.2, taken_share=1.0),
            batch(0.51, second_temperature=0.8, taken_share=0.5),
        ],
    ),
    Training(
        "aepo",
        dict(target_entropy=0.3, hot=2.0, cold=0.5),
        [
            batch(0.2, second_temperature=2.0),
            batch(0.4, second_temperature=0.5),
        ],
    ),
    Training(
        "flex_clip",
        dict(schedule="id"),
        [
            batch(9.0, progress=0.0, upper_share=1.0, lower_share=0.0),
            batch(9.0, progress=0.25, upper_share=0.5, lower_share=0.0),
            batch(9.0, progress=0.5, upper_share=0.0, lower_share=0.0),
            batch(9.0, progress=0.75, upper_share=0.0, lower_share=0.5),
            batch(9.0, progress=0.875, upper_share=0.0, lower_share=0.25),
        ],
    ),
    Training(
        "flex_clip",
        dict(schedule="did"),
        [
            batch(9.0, progress=0.0, upper_share=0.0, lower_share=0.0),
            batch(9.0, progress=0.25, upper_share=0.5, lower_share=0.0),
            batch(9.0, progress=0.5, upper_share=1.0, lower_share=0.0),
            batch(9.0, progress=0.75, upper_share=1.0, lower_share=0.5),
            batch(9.0, progress=0.875, upper_share=1.0, lower_share=0.25),
        ],
    ),
    # H_0 is 1. Halfway the line is at 0.6; between it and the floor at 0.2 the last state stays.
    Training(
        "flex_clip",
        dict(schedule="od"),
        [
            batch(1.0, progress=0.0, upper_share=0.0, lower_share=1.0),
            batch(0.5, progress=0.5, upper_share=0.0, lower_share=1.0),
            batch(0.2, progress=0.5, upper_share=1.0, lower_share=0.0),
            batch(0.5, progress=0.5, upper_share=1.0, lower_share=0.0),
            batch(0.61, progress=0.5, upper_share=0.0, lower_share=1.0),
        ],
    ),
    Training(
        "adaptive_entropy",
        {},
        [
            batch(0.1, c=1e-4, entropy_coef=1e-4),
            batch(0.19, c=2e-4, entropy_coef=2e-4),
            batch(0.2, c=1e-4, entropy_coef=0.0),  # at the target it goes down, and is not used
            batch(9.0, c=0.0, entropy_coef=0.0),
        ],
    ),
    Training(
        "adaptive_entropy",
        dict(delta=0.3, max_coef=0.5),
        [
            batch(0.1, c=0.3),
            batch(0.1, c=0.5),  # not above max_coef
            batch(0.5, c=0.2),
        ],
    ),
    # The target is 0.8 * 2 = 1.6.
    Training(
        "aer",
        {},
        [
            batch(2.0, alpha=0.0, first_entropy=2.0),
            batch(1.0, alpha=0.003, first_entropy=2.0),  # 0.005 * 0.6
            batch(1.0, alpha=0.006, first_entropy=2.0),
            batch(1.8, alpha=0.005, first_entropy=2.0),
            batch(9.0, alpha=0.0, first_entropy=2.0),  # not below 0
        ],
    ),
    Training(
        "siren",
        {},
        [
            batch(9.0),  # nothing is measured yet
            batch(9.0, metrics={"entropy/peak_mean": 0.9}, anchor=0.9),
            batch(9.0, metrics={"entropy/peak_mean": 2.0}, anchor=0.9),
        ],
    ),
]


def assert_training(L, training):
    state = {}
    for one in training.batches:
        rule = L.CONTROLLERS[training.method]
        state = rule(state, one.entropy, one.progress, one.metrics, **training.knobs)
        for name, value in one.expected.items():
            assert state[name] == pytest.approx(value, abs=1e-12)


# ---- losses: masks, draws and shared lines by hand -----------------------------------------------


def dropped_tokens(mask_function, S=0 * P, x=ENTROPY, ranks=1, **knobs):
    """The tokens, 1 to 7, that a mask takes out, where each token has a given S and x.

    S = p (log p + H) and x = H sum p^2 + sum p^2 log p - S."""
    H = S / P - P.log()
    old = {
        "log_probs": in_answers(P.log()),
        "token_entropy": in_answers(H),
        "sum_p2": in_answers(0.5 * ONE),
        "sum_p2_log_p": in_answers(x + S - 0.5 * H),
    }

    def sum_over_ranks(values):
        return ranks * values

    kept = mask_function(old, in_answers(A), MASK, sum_over_ranks, **knobs)
    assert not (kept & ~MASK).any()
    places = (MASK & ~kept).flatten().nonzero().flatten()
    return (places + 1).tolist()


# The last token of each answer: mean -1, so -2.5 from it, which is 1.58 of the population standard
# deviation and 1.46 of the unbiased one. Only the wrong answer's may go.
CLIP_B_S = seven(0, 0, 0, -3.5, 0, 0, -3.5)


def check_clip_b_mask(L):
    mask = L.clip_b_mask
    assert dropped_tokens(mask, CLIP_B_S, mu=1.55) == [7]
    assert dropped_tokens(mask, CLIP_B_S, mu=1.55, ranks=2) == [7]
    assert dropped_tokens(mask, CLIP_B_S, mu=1.6) == []
    assert dropped_tokens(mask, CLIP_B_S, mu=2.5) == []
    assert dropped_tokens(mask, -CLIP_B_S, mu=1.5) == []
    # The mean is taken off: -0.6 is -2.45 standard deviations, -2.7 would be many more.
    assert dropped_tokens(mask, seven(-2, -2, -2, -2, -2, -2, -2.7), mu=2.4) == [7]


# Tokens 1, 6 and 7: 8, 6 and 8 are 2.17, 1.63 and 2.17 of the population standard deviation (6 is
# 1.51 of the unbiased one). The first is a right answer's.
CLIP_V_X = seven(8, 0, 0, 0, 0, 6, 8)


def check_clip_v_mask(L):
    mask = L.clip_v_mask
    for S in (0 * P, seven(0, 3, -3, 0, 3, 0, 1)):  # S itself must not matter
        assert dropped_tokens(mask, S, CLIP_V_X, mu=1.55, most_frac=0.45) == [6, 7]  # at most 3
        assert dropped_tokens(mask, S, CLIP_V_X, mu=1.55, most_frac=0.3) == [6, 7]  # at most 2
        assert dropped_tokens(mask, S, CLIP_V_X, mu=1.55, most_frac=0.15) == [7]  # at most 1
        assert dropped_tokens(mask, S, CLIP_V_X, mu=1.55, most_frac=1e-4) == []  # int(0.0007) = 0
        assert dropped_tokens(mask, S, CLIP_V_X, mu=1.7, most_frac=0.3) == [7]
        assert dropped_tokens(mask, S, CLIP_V_X, mu=2.2, most_frac=1) == []
    assert dropped_tokens(mask, x=-CLIP_V_X, mu=1.0, most_frac=1.0) == []


def check_clip_cov_draws(L):
    """Each of the three candidates is drawn at some time, and always as many as cov_frac says."""
    for count, cov_frac in ((1, 0.25), (2, 0.375)):
        drawn = set()
        for seed in range(30):
            torch.manual_seed(seed)
            log_probs = leaf(in_answers(P.log()))
            loss, _ = L.clip_cov(
                log_probs,
                in_answers(P_OLD.log()),
                in_answers(A),
                MASK,
                cov_low=0.2,
                cov_frac=cov_frac,
                clip_high=9.0,
            )
            loss.backward()
            places = (log_probs.grad == 0)[MASK].nonzero().flatten().tolist()
            assert len(places) == count
            drawn.add(tuple(places))
        assert len(drawn) == 3


def check_rand_pos_clip_draws(L):
    """It takes a share of the right answer's tokens, and none of the wrong one's."""
    log_probs = torch.full((2, 5000), -1.0, requires_grad=True)
    advantages = torch.tensor([[1.0], [-1.0]]).expand(2, 5000)
    mask = torch.ones(2, 5000, dtype=torch.bool)
    loss, _ = L.rand_pos_clip(log_probs, log_probs.detach(), advantages, mask, drop_frac=0.3)
    loss.backward()
    assert 0.27 < (log_probs.grad[0] == 0).float().mean() < 0.33
    assert (log_probs.grad[1] != 0).all()


def check_shared_lines(L):
    # Centred 2/3, -1/3, -1/3, divided by 1/sqrt(3).
    advantages = L.group_advantages(torch.tensor([1.0, 0, 0, 0, 1, 1]), 3)
    assert torch.allclose(advantages[:3], torch.tensor([2.0, -1, -1]) / 3**0.5)
    new = torch.tensor([0.0, -99.0, math.nan])
    old = torch.tensor([-99.0, 0.0, 0.0])
    mask = torch.tensor([True, True, False])
    assert L.log_ratio(new, old, mask).tolist() == [20, -20, 0]


def check_clip_frac(L, method):
    """Three tokens are clipped, of 14 in the step."""
    metrics = assert_row(L, Row(method, LOSS, GRAD))
    assert math.isclose(metrics["policy/clip_frac"], 3 / 14, rel_tol=1e-6)


def check_peak_mean(L):
    """siren's metric is a share of the step's: it adds up over micro-batches."""
    _, metrics = L.siren(
        in_answers(P.log()),
        in_answers(P_OLD.log()),
        in_answers(A),
        MASK,
        nucleus_entropy=in_answers(ENTROPY),
        anchor=2.0,
        coef=0.0,
        num_tokens=14,
    )
    assert math.isclose(metrics["entropy/peak_mean"], 2.75 / 2, rel_tol=1e-9)


def check(L, method):
    """All that is calculated by hand for one method, of a losses.py L."""
    for row in ROWS:
        if row.method == method:
            assert_row(L, row)
    for training in CONTROLLER_RUNS:
        if training.method == method:
            assert_training(L, training)
    if method in ("grpo", "flex_clip"):
        check_shared_lines(L)
        check_clip_frac(L, method)
    if method == "siren":
        check_peak_mean(L)
    if method == "clip_cov":
        check_clip_cov_draws(L)
    if method == "rand_pos_clip":
        check_rand_pos_clip_draws(L)
    if method == "clip_b":
        check_clip_b_mask(L)
    if method == "clip_v":
        check_clip_v_mask(L)


@pytest.mark.parametrize("method", METHODS)
def test_by_hand(method):
    if method not in MUTANTS:
        pytest.skip("a new method: give it rows in ROWS, and mutants in MUTANTS")
    assert any(row.method == method for row in ROWS)
    check(losses, method)


def test_a_huge_mu_keeps_every_token():
    assert dropped_tokens(losses.clip_b_mask, S=CLIP_B_S, mu=0.5)
    assert not dropped_tokens(losses.clip_b_mask, S=CLIP_B_S, mu=1e9)
    assert dropped_tokens(losses.clip_v_mask, x=CLIP_V_X, mu=0.5, most_frac=1.0)
    assert not dropped_tokens(losses.clip_v_mask, x=CLIP_V_X, mu=1e9, most_frac=1.0)


# ---- losses: mutants -----------------------------------------------------------------------------

# method: (text that stands once in the code of its functions, what replaces it). Each of them must
# turn test_by_hand red.
MUTANTS = {
    "grpo": [
        (".sum() / num_tokens", ".sum() / response_mask.numel()"),
        ("if num_tokens is None:", "if True:"),
        ("groups.std(dim=1, keepdim=True)", "groups.std(dim=1, keepdim=True, unbiased=False)"),
        ("(1.0 - clip_low, 1.0 + clip_high)", "(1.0 - clip_high, 1.0 + clip_low)"),
        ("difference = log_probs - old_log_probs", "difference = old_log_probs - log_probs"),
        ("clamp(-20.0, 20.0)", "clamp(-20.0)"),
        ("clip_low, clip_high, dual_clip)", "clip_low, clip_high)"),
        ("torch.maximum(free", "torch.minimum(free"),
        ("(advantages < 0) & (token", "(advantages > 0) & (token"),
        ("bounded > free", "bounded >= free"),
    ],
    "clip_higher": [
        ("clip_high=0.28", "clip_high=0.2"),
        ("clip_low=clip_low", "clip_low=clip_high"),
    ],
    "entropy_bonus": [
        ("loss - entropy_coef", "loss + entropy_coef"),
        (
            "token_mean(token_entropy, response_mask, num_tokens)",
            "token_mean(token_entropy, response_mask)",
        ),
        ("token_mean(token_entropy,", "token_mean(token_entropy.detach(),"),
    ],
    "kl_loss": [
        ("loss + kl_coef", "loss - kl_coef"),
        (".square() / 2", ".square()"),
        (
            "k3(log_probs, ref_log_probs, response_mask)",
            "k3(ref_log_probs, log_probs, response_mask)",
        ),
        ('if estimator == "k3"', 'if estimator != "k3"'),
        ("d.exp() - 1.0 - d", "d.exp() - 1.0 + d"),
    ],
    "clip_cov": [
        ("torch.randperm(", "torch.arange("),
        ("(cov < cov_high)", "(cov < 5.0)"),
        ("int(cov_frac * int(response_mask.sum()))", "int(cov_frac * response_mask.numel())"),
        ("(log_probs - mean_log_prob) * (", "log_probs * ("),
        ("response_mask & ~clipped & (cov", "response_mask & (cov"),
        ("(cov > cov_low)", "(cov < cov_low)"),
    ],
    "kl_cov": [
        (".topk(count)", ".topk(count, largest=False)"),
        ("-advantages * log_r.exp()", "-advantages * log_r.exp().clamp(0.0, 2.0)"),
        ("max(1, int(cov_frac", "max(0, int(cov_frac"),
        ("kl_coef * log_r.abs()", "kl_coef * log_r"),
    ],
    "steer": [
        ("clip_low, clip_high, dual_clip)", "clip_low, clip_high)"),
        ("where(clipped, 0.0, omega * p)", "where(clipped, omega * p, omega * p)"),
        ("largest.clamp(min=0.02)", "largest"),
        ("log_probs + old_token_entropy)", "log_probs - old_token_entropy)"),
        ("(1.0 - p) *", "p *"),
        ("(size - smallest) / (largest - smallest)", "(largest - size) / (largest - smallest)"),
    ],
    "par": [
        ("max(epochs - 1, 1)", "epochs"),
        (
            "-delta if entropy < target_entropy else delta",
            "delta if entropy < target_entropy else -delta",
        ),
        ("advantages > 0, positive_weight", "advantages < 0, positive_weight"),
        ("2.0 * progress - 1.0", "progress"),
        ("positive_weight * advantages", "positive_weight"),
        ("max(weight, 0.0), 1.0)", "max(weight, 0.0), 9.0)"),
    ],
    "rand_pos_clip": [
        ("(advantages > 0)", "(advantages < 0)"),
        ("(u < drop_frac)", "(u > drop_frac)"),
        ("(advantages > 0) & (", "("),
    ],
    "quadrant": [
        ("likely = old_log_probs", "likely = log_probs"),
        ("old_token_entropy > 0", "old_token_entropy < 0"),
        ("pos_likely, pos_rare)", "pos_rare, pos_likely)"),
        ("neg_likely, neg_rare)", "neg_rare, neg_likely)"),
        ("advantages > 0, of_right", "advantages < 0, of_right"),
    ],
    "w_reinforce": [
        ("positive_weight, -negative_weight)", "positive_weight, -1.0)"),
        ("rewards > 0, positive_weight", "rewards > 1, positive_weight"),
        ("-negative_weight)", "negative_weight)"),
    ],
    "entropy_advantage": [
        ("advantages.abs() / kappa", "advantages / kappa"),
        ("torch.minimum(", "torch.maximum("),
        ("advantages + added", "advantages - added"),
        ("advantages.abs() / kappa", "advantages.abs()"),
    ],
    "entropic": [
        ("1.0 + alpha", "1.0 - alpha"),
        ("-1.0), 1.0)", "-1.0), 9.0)"),
        ("error = entropy - target_entropy", "error = target_entropy - entropy"),
        ("ki * integral", "ki * error"),
        ("old_log_probs.exp() > confident", "old_log_probs.exp() < confident"),
        ("alpha * advantages.sign()", "alpha"),
    ],
    "dcpo": [
        ("mix * (rewards > 0) * rho", "mix * rho"),
        ("(tempered, old_log_probs, response_mask)", "(old_log_probs, tempered, response_mask)"),
        ("old_hot_log_probs if hot else old_cold_log_probs", "old_hot_log_probs"),
        ("a0 / (1.0 + a0)", "a0"),
        ("entropy <= target_entropy", "entropy > target_entropy"),
        ("(1.0 - mix) * advantages", "advantages"),
    ],
    "aepo": [
        ("ratio, advantages, clip_low, clip_high", "ratio, advantages, clip_high, clip_high"),
        ("entropy <= target_entropy", "entropy < target_entropy"),
        ("hot if low else cold", "cold if low else hot"),
        ("1.0 if low else 0.5", "0.5 if low else 1.0"),
    ],
    "flex_clip": [
        ("clip + lower_share * (flexible_lower - clip)", "clip"),
        ("(lower_slope * p + lower_offset)", "(upper_slope * p + upper_offset)"),
        ("entropy <= low", "entropy < low"),
        ("1.0 - lam if first_half else 1.0", "lam if first_half else 1.0"),
        ('state.get("upper_share", 0.0)', "0.0"),
        ("clip + upper_share * (flexible_upper - clip)", "upper_share * flexible_upper"),
        ('"upper_share": lam if first_half else 0.0', '"upper_share": lam'),
        ("upper_slope * p + upper_offset", "upper_offset"),
    ],
    "ce_gppo": [
        ("(advantages < 0)", "(advantages > 0)"),
        ("ratio / ratio.detach()", "ratio"),
        ("beta_low * (1.0 - clip_low)", "(1.0 - clip_low)"),
        ("beta_high * (1.0 + clip_high)", "beta_high"),
    ],
    "cispo": [
        ("1.0 - clip_low", "1.0 - clip_high"),
        ("-bounded * advantages", "-weight * advantages"),
        ("response_mask).detach()", "response_mask)"),
    ],
    "gspo": [
        ("lengths, response_mask, num_sequences)", "lengths, response_mask, num_tokens)"),
        ("log_s.detach()", "log_s"),
        ("log_r.sum(1, keepdim=True) / lengths", "log_r.sum(1, keepdim=True)"),
        ("token_loss / lengths", "token_loss"),
    ],
    "fork_tokens": [
        ("max(1, int(top_frac", "max(0, int(top_frac"),
        ("num_tokens=top_frac * num_tokens", "num_tokens=num_tokens"),
        ("forks,", "response_mask,"),
        (".topk(count)", ".topk(count, largest=False)"),
    ],
    "adaptive_entropy": [
        ("0.0), max_coef)", "0.0), 5e-3)"),
        ("c if low else 0.0", "c"),
        ("delta if low else -delta", "-delta if low else delta"),
        ("entropy_coef=entropy_coef", "entropy_coef=0.0"),
    ],
    "aer": [
        ("(hard_below - group_accuracy)", "(group_accuracy - hard_below)"),
        ("target_ratio * first - entropy", "entropy - target_ratio * first"),
        ("loss - alpha", "loss + alpha"),
        (".clamp(min=0.0) / hard_below", ".clamp(min=0.0)"),
        ('state.get("first_entropy", entropy)', "entropy"),
    ],
    "siren": [
        ("mean - anchor", "mean"),
        ("coef * share", "coef"),
        ("if anchor is None else {", "if anchor is not None else {"),
        ("share * mean.detach()", "mean.detach()"),
        ("torch.ceil(peak_frac", "torch.floor(peak_frac"),
        ("descending=True", "descending=False"),
    ],
    "clip_b": [
        ("-mu * std", "mu * std"),
        ("S - mean <", "S <"),
        ("second / count", "second / (count - 1)"),
        ("(advantages < 0) & (S", "(S"),
        ("log_p + old", "log_p - old"),
    ],
    "clip_v": [
        ("int(most_frac * int(response_mask.sum()))", "int(response_mask.sum())"),
        ("(advantages < 0) & (x", "(x"),
        ("- log_p.exp() * (log_p + H)", "- log_p.exp() * log_p"),
        ("x > mu * std", "x > mu"),
        ("H * old", "old"),
        ("chosen & candidates", "chosen"),
    ],
}

# Shared lines whose mutants are counted with a method.
SHARED = {
    "grpo": ["group_advantages", "log_ratio", "ppo_surrogate", "token_mean"],
    "kl_loss": ["k3"],
    "clip_cov": ["token_covariance"],
    "kl_cov": ["mask_of_largest"],
    "fork_tokens": ["mask_of_largest"],
    "clip_b": ["batch_mean_std"],
    "clip_v": ["mask_of_largest"],
}


def code_lines(node):
    """Places in the source of a function's lines, without those of its docstring."""
    places = set(range(node.lineno - 1, node.end_lineno))
    if ast.get_docstring(node):
        docstring = node.body[0]
        places -= set(range(docstring.lineno - 1, docstring.end_lineno))
    return sorted(places)


def mutated(method, old, new):
    """losses.py as a module, with one line of one method's functions changed."""
    names = list(SHARED.get(method, []))
    for functions in (METHODS, CONTROLLERS, MASKS):
        if method in functions:
            names.append(functions[method].__name__)
    source = Path(losses.__file__).read_text()
    lines = source.splitlines()
    places = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name in names:
            for place in code_lines(node):
                places += [place] * lines[place].count(old)
    assert len(places) == 1, f"{method}: {old!r} stands {len(places)} times in {names}"
    place = places[0]
    lines[place] = lines[place].replace(old, new)
    module = types.ModuleType("mutant")
    exec(compile("\n".join(lines), "mutant", "exec"), module.__dict__)
    return module


def test_every_mutant_is_killed():
    assert MUTANTS.keys() <= METHODS.keys()
    alive = []
    count = 0
    for method, mutants in MUTANTS.items():
        assert len(mutants) >= 2
        for old, new in mutants:
            count += 1
            mutant = mutated(method, old, new)
            try:
                check(mutant, method)
            except Exception:  # an AssertionError, or no gradient at all
                continue
            alive.append((method, old, new))
    assert not alive
    print(count, "mutants of", len(MUTANTS), "methods, all killed")


# ---- losses: identities of single methods --------------------------------------------------------


def test_flex_clip_bounds_are_the_closed_form():
    """With p = r pi_old the bounds have a closed form.

    r = 1 + a p + b at (1 + b) / (1 - a pi_old); r = 1 - a p - b at (1 - b) / (1 + a pi_old)."""
    for p_old in (0.05, 0.3, 0.7):
        old = torch.tensor([[p_old]], dtype=torch.float64).log()
        upper_bound = 1.5 / (1 + 0.25 * p_old)
        lower_bound = 0.7 / (1 - 0.13 * p_old)
        for sign, bound in ((1, upper_bound), (-1, lower_bound)):
            just_inside = bound * (1 - sign * 1e-9)
            just_outside = bound * (1 + sign * 1e-9)
            for ratio, has_gradient in ((just_inside, True), (just_outside, False)):
                log_prob = leaf(old + math.log(ratio))
                loss, _ = losses.flex_clip(
                    log_prob,
                    old,
                    torch.full_like(old, sign),
                    old < 0,
                    upper_share=1.0,
                    lower_share=1.0,
                    narrowest=-9.0,
                    widest=9.0,
                )
                loss.backward()
                assert (log_prob.grad != 0) == has_gradient


def test_gspo_does_not_see_the_length():
    """An answer whose tokens all stand three times has the same loss, and gradient in total."""
    case = random_case(spread=2e-3)
    case = case._replace(response_mask=torch.ones_like(case.response_mask))
    repeated = Case(*[x.detach().repeat_interleave(3, dim=1) for x in case])
    loss, gradient, _ = run("gspo", case)
    long_loss, long_gradient, _ = run("gspo", repeated)
    assert torch.isclose(loss, long_loss, rtol=1e-12)
    assert torch.allclose(gradient.sum(1), long_gradient.sum(1), rtol=1e-9)
    learned = gradient.sum(1) != 0
    assert 0 < learned.sum() < len(learned)  # some answers are clipped, as a whole


# ---- losses: which way one real step moves the entropy -------------------------------------------
#
# On random softmaxes, with all actions enumerated.


class Term(NamedTuple):
    """A loss, and the probabilities (n, V) of drawing the actions that it learns from."""

    method: str
    drawn: torch.Tensor
    advantages: torch.Tensor | None = None  # None: GRPO's
    kwargs: dict = {}


def entropies_after(z, right, *terms):
    """Entropy (n,) of softmaxes with logits z (n, V) after a small step on the expected losses."""
    z = leaf(z)
    log_p = torch.log_softmax(z, 1)
    p = torch.softmax(z.detach(), 1)
    accuracy = (p * right).sum(1, keepdim=True)
    std = (accuracy * (1 - accuracy)).sqrt()
    for term in terms:
        advantages = (right - accuracy) / std if term.advantages is None else term.advantages
        loss, _ = METHODS[term.method](
            scale_gradient(log_p, term.drawn),
            log_p.detach(),
            advantages,
            p > -1,
            num_tokens=1,
            **term.kwargs,
        )
        loss.backward(retain_graph=True)
    log_p = torch.log_softmax(z.detach() - 1e-3 * z.grad, 1)
    return -(log_p.exp() * log_p).sum(1)


def softmaxes(share_right, confident=False, n=1000, V=16):
    """Logits, rewards and probabilities, (up to n, V) each.

    confident: the first action has almost all of the probability."""
    g = torch.Generator().manual_seed(0)
    z = 2 * torch.randn(n, V, generator=g).double()
    right = (torch.rand(n, V, generator=g) < share_right).double()
    if confident:
        z[:, 0] += 12
    p = torch.softmax(z, 1)
    accuracy = (p * right).sum(1)
    mixed = (accuracy - 0.5).abs() < 0.5 - 1e-9  # neither all right nor all wrong
    return z[mixed], right[mixed], p[mixed]


def share_true(x):
    return x.double().mean()


def test_entropic_steers_every_confident_softmax():
    """Above the target each confident softmax ends lower than after GRPO's step, below it higher.

    There is no exception."""
    z, right, p = softmaxes(0.5, confident=True)
    sure = p[:, 0] > 0.95
    assert sure.sum() > 800
    after_grpo = entropies_after(z, right, Term("grpo", p))
    for H, sign in ((0.5, -1), (0.02, 1)):
        alpha = losses.entropic_alpha({}, H, 0.0, {})["alpha"]
        after = entropies_after(z, right, Term("entropic", p, kwargs=dict(alpha=alpha)))
        moved = after - after_grpo
        assert (sign * moved[sure] > 0).all()


def test_aepo_steers_the_mean_of_softmaxes():
    """aepo's second term is E_{o ~ pi^T}[grad log pi(o) R].

    Added to GRPO's step, T = 1.2 raises the entropy and T = 0.8 lowers it in the mean over random
    softmaxes, but not in each: hot, 85, 61 and 90 % rise (with 10, 50, 90 % of the actions right);
    cold, only 15, 51 and 85 % fall, since learning from right actions has an effect of its own.
    Against this same term at T = 1 it holds in 97 % and more."""
    for share_right in (0.1, 0.5, 0.9):
        z, right, p = softmaxes(share_right)
        of_grpo = Term("grpo", p)
        after_grpo = entropies_after(z, right, of_grpo)
        after = {}
        for T in (1.2, 1.0, 0.8):
            second = Term("aepo", torch.softmax(z / T, 1), right)
            after[T] = entropies_after(z, right, of_grpo, second)
        for H, sign in ((0.4, 1), (0.6, -1)):  # below the target, above it
            T = losses.aepo_temperature({}, H, 0.0, {})["second_temperature"]
            assert sign * (after[T] - after_grpo).mean() > 0
            assert share_true(sign * (after[T] - after[1.0]) > 0) > 0.95


def test_aepo_gradient_is_that_of_its_second_term():
    z, right, p = softmaxes(0.9)
    hot = torch.softmax(z / 1.2, 1)
    z = leaf(z)
    log_p = torch.log_softmax(z, 1)
    (estimator,) = torch.autograd.grad((hot * right * log_p).sum(), z, retain_graph=True)
    loss, _ = METHODS["aepo"](
        scale_gradient(log_p, hot),
        log_p.detach(),
        right,
        p > 0,
        num_tokens=1,
    )
    loss.backward()
    assert torch.allclose(-z.grad, estimator, rtol=1e-9, atol=1e-12)


def test_dcpo_steers_only_against_its_own_term():
    """The hot term leaves the entropy above, the cold one below the same step at T = 1 (rho = 1).

    That holds in 97 % and more. Against GRPO's step only the mean effect of the cold one has its
    sign everywhere: with 10 % of the actions right the hot one lowers the entropy too, in the mean
    and in 85 % of the softmaxes; with 90 % right it does raise it."""
    for share_right in (0.1, 0.5, 0.9):
        z, right, p = softmaxes(share_right)

        def after_dcpo(hot_log_p, cold_log_p, hot):
            kwargs = dict(
                rewards=right,
                old_hot_log_probs=hot_log_p,
                old_cold_log_probs=cold_log_p,
                mix=0.1,
                hot=hot,
            )
            return entropies_after(z, right, Term("dcpo", p, kwargs=kwargs))

        log_p = p.log()
        hot_log_p = torch.log_softmax(z / 1.2, 1)
        cold_log_p = torch.log_softmax(z / 0.8, 1)
        after_grpo = entropies_after(z, right, Term("grpo", p))
        after_at_one = after_dcpo(log_p, log_p, 1.0)
        mean_effects = []
        for H, sign in ((0.4, 1), (0.6, -1)):  # below the target, above it
            hot = losses.dcpo_mix({}, H, 0.0, {"reward/mean": 0.5})["hot"]
            after = after_dcpo(hot_log_p, cold_log_p, hot)
            assert share_true(sign * (after - after_at_one) > 0) > 0.95
            mean_effects.append((after - after_grpo).mean())
        hot_effect, cold_effect = mean_effects
        assert cold_effect < 0
        if share_right == 0.1:
            assert hot_effect <= 0
        if share_right == 0.9:
            assert hot_effect > 0


# ---- losses: the controllers' state --------------------------------------------------------------


def batches_of_a_training():
    """(entropy, progress, metrics) of twelve rollout batches."""
    for i in range(12):
        metrics = {"reward/mean": 0.1 + i / 20}
        if i > 0:  # nothing was updated before the first batch
            metrics["entropy/peak_mean"] = 1 / i
        yield 0.5 + 0.4 * math.cos(i), i / 12, metrics


@pytest.mark.parametrize(
    "method, knobs",
    [(method, {}) for method in CONTROLLERS] + [("flex_clip", dict(schedule="od"))],
)
def test_a_controller_goes_on_after_a_round_trip(method, knobs):
    """Its state is numbers only, so that torch.save and json give back what they were given."""
    rule = CONTROLLERS[method]
    state = {}
    restored = {}
    for one_batch in batches_of_a_training():
        before = dict(state)
        next_state = rule(state, *one_batch, **knobs)
        assert state == before  # a rule is a pure function
        state = next_state
        assert all(type(value) in (int, float) for value in state.values())
        restored = rule(restored, *one_batch, **knobs)
        buffer = io.BytesIO()
        torch.save(restored, buffer)
        buffer.seek(0)
        restored = json.loads(json.dumps(torch.load(buffer, weights_only=True)))
        assert json.dumps(state) == json.dumps(restored)  # as text, where nan equals nan
    assert state


# ---- rollout: aepo's second sample ---------------------------------------------------------------

# Rewards of the four answers in each group. Their mean is 0, so without a division by the standard
# deviation they are the advantages: the second and the fourth are above 0.05.
SECOND_REWARDS = (0.04, 0.06, -1.0, 0.9)


def made_answer(problem, i, seed):
    return dict(
        problem=problem,
        prompt=[1],
        seed=seed,
        response=[i],
        log_probs=[-1.0],
        reward=SECOND_REWARDS[i],
        verdict="right",
    )


class SecondSample(NamedTuple):
    """Answers and advantages before and after mixing, and what was asked of the engine."""

    before: list
    after: list
    advantages: torch.Tensor
    asked: dict
    verdicts: dict


def second_sample(monkeypatch, state, ranks=1):
    """aepo's edit of a batch of eight groups of four."""
    asked = {}

    def sample_and_verify(engine, tokenizer, problems, prompts, seeds, **options):
        asked.update(options, problems=problems, seeds=seeds)
        groups = []
        for problem, seed in zip(problems, seeds):
            groups.append([made_answer(f"second {problem}", i, seed) for i in range(4)])
        return groups

    monkeypatch.setattr(rollout, "sample_and_verify", sample_and_verify)
    monkeypatch.setattr(rollout.dist, "get_world_size", lambda: ranks)
    before = []
    for group in range(8):
        before += [made_answer(f"problem {group}", i, 4 * group) for i in range(4)]
    cfg = types.SimpleNamespace(
        group_size=4,
        max_response_len=9,
        adv_norm="none",
        temperature=0.7,
    )
    advantages = torch.full((32,), 0.5)
    after, advantages, verdicts = rollout.mix_second_sample(
        None, None, before, advantages, state, cfg
    )
    return SecondSample(before, after, advantages, asked, verdicts)


@pytest.mark.parametrize(
    "most_rows, ranks, replaced",
    [
        (60, 1, 4),  # two groups, two good answers in each
        (3, 1, 3),
        (6, 2, 3),  # a rank's share of six
        (0, 1, 0),
    ],
)
def test_second_sample_takes_the_first_rows(monkeypatch, most_rows, ranks, replaced):
    state = dict(second_temperature=1.2, most_rows=most_rows, taken_share=1.0)
    sample = second_sample(monkeypatch, state, ranks)

    # A quarter of the prompts is sampled once more, with seeds of its own.
    assert sample.asked["problems"] == ["problem 0", "problem 1"]
    assert sample.asked["n"] == 4
    assert sample.asked["max_tokens"] == 9
    assert sample.asked["temperature"] == 0.7 * 1.2
    used_seeds = {answer["seed"] + i for answer in sample.before for i in range(4)}
    new_seeds = set(sample.asked["seeds"])
    assert len(new_seeds) == 2
    assert not used_seeds & new_seeds
    assert sample.verdicts == {"right": 8}

    # Good answers take the first rows, with A = 1; the others stay.
    stayed = [old is new for old, new in zip(sample.before, sample.after)]
    assert stayed == [False] * replaced + [True] * (32 - replaced)
    assert sample.advantages.tolist() == [1.0] * replaced + [0.5] * (32 - replaced)
    for answer, place in zip(sample.after[:replaced], (1, 3, 1, 3)):
        assert answer["problem"].startswith("second")
        assert answer["response"] == [place]
        assert all(map(math.isnan, answer["log_probs"]))


@pytest.mark.parametrize("H, replaced", [(0.4, 4), (0.6, 2)])
def test_above_the_target_aepo_replaces_half_of_what_it_kept(monkeypatch, H, replaced):
    state = losses.aepo_temperature({}, H, 0.0, {})
    sample = second_sample(monkeypatch, state)
    changed = [old is not new for old, new in zip(sample.before, sample.after)]
    assert sum(changed) == replaced


def test_without_a_second_temperature_aepo_changes_nothing(monkeypatch):
    sample = second_sample(monkeypatch, state={})
    assert not sample.asked
    assert all(old is new for old, new in zip(sample.before, sample.after))
    assert (sample.advantages == 0.5).all()


# ---- train: knobs --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, setting, complaint",
    [
        ("clip_kov", "", "Methods: .*clip_cov"),
        ("clip_cov", "cov_fraction=1e-2", "cov_frac=0.0002"),
        ("clip_cov", "cov_frac=20", "not per cent"),
        ("clip_cov", "cov_frac=many", "a number"),
        ("aepo", "most_rows=1.5", "a whole number"),
        ("aepo", "most_rows=-1", "0 or more"),
        ("grpo", "clip_low=inf", "a finite number"),
        ("grpo", "clip_low=-0.5", "above 0 and at most 1"),
        ("grpo", "clip_low=0", "above 0 and at most 1"),
        ("clip_cov", "clip_low=5", "clip_low=5: it must be above 0 and at most 1"),
        ("cispo", "clip_low=20", "above 0 and at most 10"),
        ("grpo", "clip_high=0", "clip_high=0: it must be above 0$"),
        ("gspo", "clip_high=-3e-4", "above 0$"),
        ("flex_clip", "clip=2", "above 0 and at most 1"),
        ("flex_clip", "narrowest=0.7", "narrowest=0.7 widest=0.6: the first is larger"),
        ("clip_cov", "cov_low=6", "cov_low=6.0 cov_high=5.0: the first is larger"),
        ("steer", "max_weight=0.5", "min_weight=0.8 max_weight=0.5: the first is larger"),
        ("grpo", "dual_clip=1", "above 1$"),
        ("entropy_advantage", "kappa=0", "above 0$"),
        ("entropic", "confident=1.5", "at most 1$"),
        ("aepo", "cold=0", "above 0$"),
        ("par", "epochs=0", "above 0$"),
        ("par", "target_entropy=-1", "0 or more"),
        ("clip_b", "mu=-1", "0 or more"),
        ("steer", "mapping=cubic", "exp"),
        ("steer", "form=final", "theorem"),
        ("steer", "min_weight=0", "min_weight=0.0"),
        ("kl_loss", "estimator=k1", "k2 or k3"),
        ("aer", "hard_below=0", "hard_below=0.0"),
        ("par", "schedule=weekly", "stage"),
        ("flex_clip", "schedule=weekly", "did"),
    ],
)
def test_bad_knobs_are_refused_with_what_there_is(method, setting, complaint):
    settings = [setting] if setting else []
    with pytest.raises(ValueError, match=complaint):
        parse_knobs(method, settings)


@pytest.mark.parametrize("method", METHODS)
def test_the_default_of_every_knob_lies_within_its_range(method):
    functions = METHODS[method], CONTROLLERS.get(method), MASKS.get(method)
    for knobs in map(train.default_knobs, functions):
        for name, default in knobs.items():
            if default is not None and name in train.KNOB_RANGES | dict.fromkeys(
                train.NOT_NEGATIVE
            ):
                assert train.read_knob(name, str(default), default) == default


@pytest.mark.parametrize(
    "method, settings",
    [
        ("grpo", "clip_low=1 clip_high=5 dual_clip=3"),
        ("cispo", "clip_low=10"),
        ("flex_clip", "upper_slope=-1 narrowest=0.6 widest=0.6"),
        ("quadrant", "pos_likely=-0.5"),
        ("entropy_bonus", "entropy_coef=-0.01"),
        ("par", "target_entropy=0 delta=0"),
    ],
)
def test_knobs_within_their_ranges_are_taken(method, settings):
    loss_knobs, rule_knobs, _ = parse_knobs(method, settings.split())
    for setting in settings.split():
        name, _, text = setting.partition("=")
        assert (loss_knobs | rule_knobs)[name] == float(text)


def test_knobs_reach_loss_and_controller():
    settings = ["positive_weight=0.3", "schedule=constant", "clip_high=0.25"]
    loss_knobs, rule_knobs, _ = parse_knobs("par", settings)
    assert loss_knobs["clip_high"] == 0.25
    assert rule_knobs["schedule"] == "constant"
    assert rule_knobs["positive_weight"] == 0.3
    loss_knobs, _, _ = parse_knobs("steer", ["dual_clip=none"])
    assert loss_knobs["dual_clip"] is None


# ---- the embedded task ---------------------------------------------------------------------------


def reachable(numbers):
    """Every value of four numbers under + - *, by taking pairs away: another way than tiny.py's."""
    if len(numbers) == 1:
        return set(numbers)
    values = set()
    for a, b in itertools.combinations(range(len(numbers)), 2):
        x = numbers[a]
        y = numbers[b]
        rest = [number for i, number in enumerate(numbers) if i not in (a, b)]
        for joined in (x + y, x - y, y - x, x * y):
            values |= reachable([*rest, joined])
    return values


def prompts_of(problems):
    return {problem.prompt for problem in problems}


def test_problems_are_deterministic_nested_and_disjoint():
    train_problems = tiny.problems("train", 2000)
    test_problems = tiny.problems("test", 500)
    assert train_problems[:100] == tiny.problems("train", 100)
    assert test_problems == tiny.problems("test", 500)
    # In another process too.
    assert train_problems[0].prompt == "1 5 7 13=26:"
    assert test_problems[0].prompt == "2 9 10 11=20:"

    trained_on = prompts_of(train_problems)
    another_seed = prompts_of(tiny.problems("train", 2000, seed=1))
    a_third_seed = prompts_of(tiny.problems("train", 2000, seed=2))
    assert len(trained_on) == 2000
    assert trained_on != another_seed
    assert not prompts_of(test_problems) & (trained_on | another_seed | a_third_seed)

    for split, count in (("dev", 1), ("train", 5001), ("test", -1)):
        with pytest.raises(ValueError):
            tiny.problems(split, count)


@pytest.mark.parametrize("split", ["train", "test"])
def test_problems_are_solvable(split):
    for problem in tiny.problems(split, 40):
        gold = json.loads(problem.answer)
        numbers = gold["numbers"]
        target = gold["target"]
        in_order = " ".join(map(str, sorted(numbers)))
        assert problem.prompt == f"{in_order}={target}:"
        assert problem.rule == "countdown"
        assert len(numbers) == 4
        assert set(numbers) <= set(range(1, 14))
        assert 1 <= target <= 99
        assert target in reachable(numbers)


def value_with_large_numbers(text):
    """The value of an expression after its numbers were replaced by four that lie far apart."""
    large = iter(("101", "1009", "20011", "300007"))
    return eval(re.sub(r"\d+", lambda match: next(large), text))


def pairs_of_parentheses(text):
    """Where each pair begins and ends."""
    opened = []
    found = []
    for i, character in enumerate(text):
        if character == "(":
            opened.append(i)
        elif character == ")":
            found.append((opened.pop(), i))
    return found


def test_solutions_reach_the_target_and_parentheses_are_needed():
    rng = random.Random(0)
    for _ in range(2000):
        numbers, target, text = tiny.random_solution(rng)
        nodes = ast.walk(ast.parse(text))
        leaves = sorted(node.value for node in nodes if isinstance(node, ast.Constant))
        assert leaves == numbers
        assert eval(text) == target
        assert 1 <= target <= 99
        assert len(text) <= 15
        for i, j in pairs_of_parentheses(text):
            without = text[:i] + text[i + 1 : j] + text[j + 1 :]
            assert value_with_large_numbers(without) != value_with_large_numbers(text)


def test_batches_train_on_the_answer_alone_and_never_on_a_test_problem():
    seen = set()
    token = {i: text for text, i in tiny.VOCAB.items()}
    batches = tiny.supervised_batches(random.Random(0), 32)
    for ids, labels in itertools.islice(batches, 100):
        for row, label in zip(ids.tolist(), labels.tolist()):
            text = "".join(token[i] for i in row).replace(tiny.PAD, "")
            answer = "".join(token[i] for i in label if i != -100)
            prompt = text[: text.index(":") + 1]
            assert text == prompt + answer
            assert answer.endswith(tiny.EOS)
            expression = answer.removesuffix(tiny.EOS)
            target = prompt[prompt.index("=") + 1 : -1]
            assert eval(expression) == int(target)
            assert all(b in (-100, a) for a, b in zip(row, label))
            seen.add(prompt)
    assert len(seen) > 2000
    assert not seen & prompts_of(tiny.problems("test", 2000))


SHORT_TRAINING = tiny.TRAINING | dict(steps=3, batch=4)


def test_each_size_of_the_tiny_model_trains_with_its_own_base_and_the_default_settings(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tiny, "TRAINING", SHORT_TRAINING)
    command = (
        "--model tiny-mini --steps 1 --prompts_per_step 4 --group_size 2 "
        "--eval_data none --engine torch"
    )
    train.main(command.split())
    folder = Path("runs/grpo-tiny-mini-seed0")
    config = json.loads((folder / "config.json").read_text())
    assert config["max_response_len"] == tiny.DEFAULTS["max_response_len"]
    assert config["updates_per_rollout"] == 4
    shape = json.loads((folder / "checkpoint-1" / "config.json").read_text())
    assert shape["hidden_size"] == tiny.SIZES["tiny-mini"]["hidden_size"]
    assert shape["hidden_size"] != tiny.SIZES["tiny"]["hidden_size"]


def fail(*args):
    raise ZeroDivisionError


def weights_of(path):
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


def test_base_is_made_once_and_complete_or_not_at_all(tmp_path, monkeypatch):
    folder = str(tmp_path / "base")
    monkeypatch.setattr(tiny, "TRAINING", SHORT_TRAINING)
    with monkeypatch.context() as patch:  # killed while saving
        patch.setattr(tiny, "make_tokenizer", fail)
        with pytest.raises(ZeroDivisionError):
            tiny.base_model(folder, progress=False)
    assert all(name.endswith(".tmp") for name in os.listdir(tmp_path))

    path = tiny.base_model(folder, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(tiny, "train_base", fail)
        assert tiny.base_model(folder, progress=False) == path  # found
        patch.setitem(tiny.TRAINING, "lr", 1.0)  # other settings, another base
        with pytest.raises(ZeroDivisionError):
            tiny.base_model(folder, progress=False)

    generation = AutoModelForCausalLM.from_pretrained(path).generation_config
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert tokenizer.eos_token_id == tiny.VOCAB[tiny.EOS]
    assert generation.eos_token_id == tiny.VOCAB[tiny.EOS]
    assert tokenizer.pad_token_id != tiny.VOCAB[tiny.EOS]
    texts = [problem.prompt for problem in tiny.problems("test", 200)]
    for text in [*texts, "(11+10)*(12-3)", "7*(5-(3-2))"]:
        ids = tokenizer(text)["input_ids"]
        assert ids == [tiny.VOCAB[character] for character in text]
        assert tokenizer.decode(ids) == text


def test_base_is_deterministic_and_leaves_the_caller_alone(tmp_path, monkeypatch):
    def states():
        return random.getstate(), torch.get_rng_state().tolist(), torch.get_num_threads()

    monkeypatch.setattr(tiny, "TRAINING", SHORT_TRAINING)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    before = states()
    path = tiny.base_model(str(tmp_path / "base"), progress=False)
    assert states() == before
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    again = tiny.base_model(str(tmp_path / "other"), progress=False)
    first = weights_of(path)
    second = weights_of(again)
    assert all(torch.equal(first[name], second[name]) for name in first)
    tied = first["model.embed_tokens.weight"]
    assert first["lm_head.weight"].data_ptr() == tied.data_ptr()


# ---- the verifier: what is right and what is wrong -----------------------------------------------
@pytest.mark.parametrize("answer, gold", pairs_of(RIGHT_ANSWERS))
def test_right_answers(answer, gold):
    assert judge_math(rf"so \boxed{{{answer}}}.", gold) == "right"


@pytest.mark.parametrize("answer, gold", pairs_of(WRONG_ANSWERS))
def test_wrong_answers(answer, gold):
    assert judge_math(rf"so \boxed{{{answer}}}.", gold) != "right"


BOX_OF_1000 = r"\boxed{" + "1" * 1000 + "}"
BOX_OF_1001 = r"\boxed{" + "1" * 1001 + "}"


@pytest.mark.parametrize(
    "response, answer",
    [
        # the last box
        (r"\boxed{1} \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed {\{1\}}", r"\{1\}"),
        (r"\boxed{\{5}", r"\{5"),
        (r"\boxed{5} \boxed{6", None),
        (r"\boxed{}", None),
        (r"\boxed{\fbox{5}}", "5"),
        (r"\fbox{5}", "5"),
        (r"\boxed{5} \fbox{6}", "5"),
        # a box without braces
        (r"\boxed 5", "5"),
        (r"\boxed5", "5"),
        (r"$\boxed -12.$", "-12"),
        (r"\boxed 1,234.", "1,234"),
        (r"\boxed x", "x"),
        (r"\boxed xy", None),
        (r"\boxedx", None),
        (r"\boxed 5 or \boxed 6", "6"),
        # without a box, the last <answer> block
        ("<answer>5</answer>", "5"),
        ("<answer>4</answer> <answer> 5\n</answer>", "5"),
        ("<answer>5", None),
        ("Answer: 6 <answer>5</answer>", "5"),
        (r"<answer>so \boxed{5}</answer>", "5"),
        # without a box, the last line that is marked
        ("Answer: 5\n#### 6", "5"),
        ("**Answer: 5**", "5"),
        ("**Answer**: 5", "5"),
        ("answer: 5", "5"),
        ("Answer : 5", "5"),
        ("ANSWER: `5`", "`5`"),
        ("my answers: 5", None),
        ("x\n#### 1,000\n", "1,000"),
        ("Answer:\n5", None),
        ("5", None),
        # 1,000 characters and no more
        (BOX_OF_1000, "1" * 1000),
        (BOX_OF_1001, None),
        ("Answer: " + "1" * 1001, None),
    ],
)
def test_where_the_answer_is(response, answer):
    assert verify.extract(response) == answer


# What a fair grader takes and verify.py does not, with the reason.
REFUSED_ON_PURPOSE = {
    r"so \boxed{1 728}.",  # between a space and two answers only a comma decides
    r"so \boxed{\mathbb{R}\setminus[0,1]}.",  # no algebra of sets
    r"so \boxed{x\cdot y}.",  # a gold answer of letters alone, xy, is taken for a word
}


def test_pairs_that_a_fair_grader_decided():
    refused = []
    for pair in PAIRS:
        is_right = judge_math(pair["response"], pair["gold"]) == "right"
        assert pair["right"] or not is_right, pair
        if pair["right"] and not is_right:
            refused.append(pair["response"])
    assert set(refused) == REFUSED_ON_PURPOSE
    assert len(refused) <= 0.05 * sum(pair["right"] for pair in PAIRS)


@pytest.mark.parametrize("gold, other", OTHERS.items())
def test_hedges_are_wrong(gold, other):
    accepted = [
        response for response in hedges_of(gold, other) if judge_math(response, gold) == "right"
    ]
    assert accepted == []


@settings(max_examples=200, deadline=None)
@given(
    st.fractions(min_value=-(10**6), max_value=10**6, max_denominator=999),
    st.fractions(max_denominator=999),
)
def test_numbers_match_exactly_when_equal(x, y):
    spellings = [
        f"{x}",
        rf"\frac{{{x.numerator}}}{{{x.denominator}}}",
        rf"\dfrac{{{2 * x.numerator}}}{{{2 * x.denominator}}}",
    ]
    for text in spellings:
        assert judge_math(f"Answer: {text}", f"{x}") == "right"
        assert (judge_math(f"Answer: {text}", f"{y}") == "right") == (x == y)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="0123456789\\{}()[]^_.,+-*/=$% fracsqtbox\u0664", max_size=60))
def test_any_text_is_judged(text):  # against a number sympy is never asked
    verdict = judge_math(rf"\boxed{{{text}}}", "17")
    assert verdict in ("right", "wrong", "no_answer")
    if not any(part in text for part in ("17", "34", "/", "frac", ".", "%")):
        assert verdict != "right"
    countdown = '{"numbers": [1, 2], "target": 3}'
    assert judge_countdown(text, countdown) in ("right", "wrong", "no_answer")


PIECES = (
    r"0 1 2 3 . , - + * / = ^ _ % $ { } ( ) [ ] \{ \} & \\ \boxed{ Answer: ½ ٣ − "
    r"\frac \sqrt \text{ \cup \pm \infty ^\circ \, \! \left \right \in "
    r"x k and or cm percent e10 10^"
)


def never(answer, gold):
    return False


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([*PIECES.split(), "\u200b"]), max_size=12).map("".join))
def test_any_answer_is_read_against_any_gold(text):
    """What spells none of these gold answers is not right: it has no digit above 3 and no word."""
    golds = [
        "17",
        "8k+9",
        "(4,5)",
        r"\{4, 5\}",
        r"[4,5)\cup(6,7]",
        "east",
        r"45\%",
        "y=4",
        r"4\pm\sqrt{5}",
    ]
    for gold in golds:
        answer = verify.normalise(text)
        assert verify.same_answer(answer, verify.normalise(gold), never) is False


# ---- the verifier: hostile answers, workers that hang --------------------------------------------

HOSTILE = [
    # powers and factorials that nobody can compute
    "9^{9^{9^9}}x",
    "x^{9^{9^{9^9}}}",
    "(99999999!)x",
    "x!" + "!" * 100,
    "(x+1)^{99999999}",
    r"\binom{10^9}{10^8}x",
    "1e999",
    "10^{10^{10}}",
    # deep
    "{" * 10**6 + "}" * 10**6,
    "{" * 400 + "x" + "}" * 400,
    "(" * 490 + "x" + ")" * 490,
    r"\boxed{" * 1000,
    r"\sqrt{" * 120 + "x" + "}" * 120,
    r"\frac{" * 90 + "x" + "}{x}" * 90,
    "\\{" * 300,
    r"\text{" * 150,
    "x^" * 400 + "x",
    # long
    "x+1" * 300000,
    "x=" * 300 + "x",
    "x," * 400,
    ", ".join(map(str, range(200))),
    " or ".join("ABCDE"),
    "9" * 990,
    "9/" * 490 + "9",
    "1," * 490,
    "1" * 10**6,
    r"\gcd" * 150,
    # what patterns could read in many ways
    "a b " * 240 + "!",
    "12 " + "cm " * 300 + "!",
    "12 " + "word " * 190 + "!",
    "x+" * 490 + "!",
    "x_1 " * 240 + "= 5",
    "1,2 " * 240,
    "`" * 900,
    "5 `" * 300,
    r"\in" * 300,
    "x<" * 400 + "x",
    r"x \text{ or } " * 70 + "x<1",
    # programs
    r"\def\a{\a\a}\a x",
    r"\let\x=\x\x",
    "__import__('os').system('touch /tmp/pwned')x",
    "x;import os",
    r"\input{/etc/passwd}x",
    # odd characters
    "x\0",
    "\ud800x",
    "x" + "\u200b",
    "٣" * 900,
    "ﷺ" * 900,
    # next to nothing
    "\\",
    "x\\",
    "}{",
    "$",
    r"\,",
    "°",
    "%",
    ".",
    "$$ $$",
    r"\text{}",
    r"\left",
    # no number
    r"\infty-\infty",
    "0/0",
    "nan",
]

GOLDS_OF_ALL_KINDS = [
    "x^2+2x+5",
    "34",
    "(1,2)",
    r"\{1,3\}",
    r"(1,2]\cup(3,\infty)",
    "east",
    r"50\%",
    r"\begin{pmatrix}1\\2\end{pmatrix}",
]


def children():
    """Process ids of the living workers."""
    command = ["pgrep", "-P", str(os.getpid()), "-f", "verify.py"]
    return subprocess.run(command, capture_output=True, text=True).stdout.split()


@pytest.mark.slow
def test_hostile_math_is_judged_in_time(monkeypatch):
    monkeypatch.setattr(verify, "TIME_LIMIT", 0.5)  # of processor time
    monkeypatch.setattr(verify, "PATIENCE", 40)
    verify.close()
    verify.ask_worker.cache_clear()
    responses = []
    for text in HOSTILE:
        responses.append(rf"\boxed{{{text}}}")
        responses.append(f"Answer: {text}")
        responses.append(text * 2 + rf"\boxed{{{text}")
    verdicts = Counter()
    for gold in GOLDS_OF_ALL_KINDS:
        # Only against a formula the worker is asked about most of them.
        tried = responses if gold.startswith("x") else responses[::3]
        for response in tried:
            start = time.process_time()
            verdict = RULES["math"](response, gold)
            assert verdict != "right", (response[:40], gold)
            assert time.process_time() - start < 2, (response[:40], gold)
            verdicts[verdict] += 1
    assert set(verdicts) == {"wrong", "no_answer", "timeout"}
    assert not os.path.exists("/tmp/pwned")
    assert judge_math(r"\boxed{2(k+3)}", "2k+6") == "right"
    assert len(children()) <= verify.WORKERS  # killed workers leave nothing behind


@pytest.mark.slow
def test_a_worker_that_hangs_is_killed(monkeypatch):
    verify.close()
    verify.ask_worker.cache_clear()
    assert children() == []
    assert judge_math(r"\boxed{2(k+1)}", "2k+2") == "right"
    (pid,) = children()
    os.kill(int(pid), signal.SIGSTOP)
    with monkeypatch.context() as patch:
        patch.setattr(verify, "TIME_LIMIT", 0.1)
        assert judge_math(r"\boxed{3(k+1)}", "3k+3") == "timeout"
    assert children() == []
    assert judge_math(r"\boxed{3(k+1)}", "3k+3") == "right"  # the timeout was not the answer's

    (pid,) = children()
    os.kill(int(pid), signal.SIGKILL)  # from outside, while idle
    while "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
        time.sleep(0.01)
    assert judge_math(r"\boxed{5(k+1)}", "5k+5") == "timeout"
    assert judge_math(r"\boxed{5(k+1)}", "5k+5") == "right"
    verify.close()
    assert children() == []


@pytest.mark.slow
def test_an_answer_that_takes_too_long_is_not_tried_again(monkeypatch):
    """What used up its processor time would do so again, whatever else the machine does."""
    monkeypatch.setattr(verify, "TIME_LIMIT", 0.5)
    monkeypatch.setattr(verify, "PATIENCE", 100)
    verify.close()
    verify.ask_worker.cache_clear()
    assert judge_math(r"\boxed{(99999999!)k}", "2k+2") == "timeout"
    assert children() == []
    monkeypatch.setattr(verify, "start_worker", None)
    assert judge_math(r"\boxed{(99999999!)k}", "2k+2") == "timeout"


@pytest.mark.slow
def test_a_worker_that_does_not_start_is_an_error(monkeypatch):
    verify.close()
    verify.ask_worker.cache_clear()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="does not start"):
        judge_math(r"\boxed{9(k+1)}", "9k+9")


@pytest.mark.slow
def test_a_worker_does_not_survive_its_parent():
    code = f"""
import os, sys
sys.path.insert(0, {os.path.dirname(verify.__file__)!r})
import verify
print(verify.start_worker().pid, flush=True)
os.kill(os.getpid(), 9)
"""
    parent = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    pid = int(parent.stdout)
    time.sleep(1)
    process = Path(f"/proc/{pid}/stat")
    assert not process.exists() or "Z" in process.read_text().split()[2]


# ---- scores and rules ----------------------------------------------------------------------------


def math_problems(*golds):
    return [Problem("", gold, "math") for gold in golds]


def rewards_of(problems, responses):
    return [result.reward for result in score(problems, responses)]


def test_score_off_the_main_thread():
    """There SIGALRM timeouts would give silent zeros."""
    problems = math_problems("5", "2k+2", "2k+4", "x") * 3
    responses = [r"\boxed{5}", r"\boxed{2(k+1)}", r"\boxed{2(k+2)}", "?"] * 3
    found = []

    def work():
        found.extend(rewards_of(problems, responses))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [1.0, 1.0, 1.0, 0.0] * 3


def test_score_of_a_whole_batch_is_quick():
    problems = math_problems("5") * 4096
    responses = [rf"\boxed{{{i}}}" for i in range(4096)]
    start = time.monotonic()
    assert sum(rewards_of(problems, responses)) == 1
    assert time.monotonic() - start < 20
    with pytest.raises(ValueError, match="1 problems, but 2"):
        score(problems[:1], ["", ""])


def test_score_tells_the_verdict_of_each_answer(monkeypatch):
    monkeypatch.setattr(verify, "ask_worker", lambda answer, gold: "timeout")
    problems = math_problems("4", "4", "4", "3k+3", "3k+3")
    responses = ["Answer: 4", "Answer: 5", "?", r"\boxed{3(k+1)}", r"\boxed{3k + 3}"]
    found = score(problems, responses)
    assert found == [
        Score(1.0, "right"),
        Score(0.0, "wrong"),
        Score(0.0, "no_answer"),
        Score(0.0, "timeout"),
        Score(1.0, "right"),
    ]
    verdicts = Counter(result.verdict for result in found)
    assert verdicts == {"right": 2, "wrong": 1, "no_answer": 1, "timeout": 1}
    assert set(verdicts) == set(verify.VERDICTS)


def test_score_counts_nothing_between_calls():
    problems = math_problems("4")
    assert score(problems, ["Answer: 4"]) == score(problems, ["Answer: 4"])
    assert not hasattr(verify, "outcomes")


def test_a_rule_may_return_a_number(monkeypatch):
    def share_of_digits(response, gold):
        return sum(a == b for a, b in zip(response, gold)) / len(gold) - 0.25

    monkeypatch.setitem(RULES, "digits", share_of_digits)
    problems = [Problem("", "1234", "digits")] * 4
    assert score(problems, ["1234", "1299", "1999", "9999"]) == [
        Score(0.75, "right"),
        Score(0.25, "right"),
        Score(0.0, "wrong"),
        Score(-0.25, "wrong"),
    ]


def test_a_further_rule_is_one_function_and_a_name_in_rules(tmp_path, monkeypatch):
    def starts_like(response, gold):
        return "right" if response.startswith(gold) else "wrong"

    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "Who?", "answer": "Ada"}))
    with pytest.raises(ValueError, match="unknown rule 'starts'; known: countdown, math"):
        load_problems(path, rule="starts")
    monkeypatch.setitem(RULES, "starts", starts_like)
    (problem,) = load_problems(path, rule="starts")
    assert problem.rule == "starts"
    assert score([problem] * 2, ["Ada L.", "Eva"]) == [Score(1.0, "right"), Score(0.0, "wrong")]


# ---- Countdown -----------------------------------------------------------------------------------

COUNTDOWN_VERDICTS = {
    "right": [
        "(3+5)*7-2",
        "(5+3)*7-2\n",
        " 7*(5+3)-2 = 54 ",
        "a <answer>1</answer> b <answer>(3+5)*7-2</answer>",
    ],
    "wrong": [
        "(3+5)*7-2=55",  # says something else than it is
        "(3+5)*7",  # 56, and without the 2
        "54",
        "(3+5)*7-2+7-7",  # two sevens too many
        "(3+5)*7-1-1",  # ones instead of the 2
        "3/(5-5)+7*2",
    ],
    "no_answer": [
        "",
        "<answer>(3+5)*7-2",
        "((3+5)*7-2",
        # other notation
        "(3+5)*7--2",
        "-2+(3+5)*7",
        "(3+5)*7.0-2",
        "(3+5)*07-2",
        "(3+5)*7_0-2",
        "(3+5)*７-2",
        "1e9",
        "3 5",
        "3(5)",
        "(3,5)",
        "3;5",
        "3+\u200b5",
        "3//5",
        "True+3",
        # programs
        "3**5*7-2",
        "9**9**9**9",
        "int('54')",
        "__import__('os').system('ls')",
        "(3).real",
        # long
        "(" * 10**6,
        "9" * 10**6,
    ],
}
COUNTDOWN_TABLE = [
    (verdict, text) for verdict, texts in COUNTDOWN_VERDICTS.items() for text in texts
]


@pytest.mark.parametrize("verdict, text", COUNTDOWN_TABLE)
def test_countdown_table(verdict, text):
    assert judge_countdown(text, '{"numbers": [2, 3, 5, 7], "target": 54}') == verdict


def countdown_gold(numbers, target):
    return json.dumps({"numbers": numbers, "target": target})


def test_countdown_divides_exactly():
    assert judge_countdown("8/(3-8/3)", countdown_gold([3, 3, 8, 8], 24)) == "right"
    near_one = "9999999999999999/9999999999999998"  # 1.0 in floating point
    numbers = [9999999999999999, 9999999999999998]
    assert judge_countdown(near_one, countdown_gold(numbers, 1)) == "wrong"
    large = "9" * 99
    gold = countdown_gold([int(large)] * 2, 1)
    assert judge_countdown(f"{large}*{large}", gold) == "wrong"


# ---- pass@k and calibration ----------------------------------------------------------------------


def test_pass_at_k_counts_subsets():
    for n in range(1, 8):
        for c in range(n + 1):
            answers = [True] * c + [False] * (n - c)
            for k in range(1, n + 1):
                draws = list(itertools.combinations(answers, k))
                with_a_right_one = sum(any(draw) for draw in draws)
                assert pass_at_k(n, c, k) == float(Fraction(with_a_right_one, len(draws)))
    assert pass_at_k(10**5, 1, 1) == 1e-5
    for n, c, k in ((4, 5, 1), (4, 1, 5), (4, 1, 0), (4, -1, 1)):
        with pytest.raises(ValueError, match="pass@k needs"):
            pass_at_k(n, c, k)


def test_calibration_by_hand():
    found = verify.calibration([0.9, 0.8, 0.8, 0.3], [1, 1, 0, 0])
    assert found == pytest.approx(
        {
            "conf_right": 0.85,
            "conf_wrong": 0.55,
            "conf_gap": 0.3,
            # The pairs (right, wrong): .9 > .8, .9 > .3, .8 = .8 (a half), .8 > .3.
            "auroc": 3.5 / 4,
            # Bins: |.9 - 1|, |.8 + .8 - 1|, |.3 - 0|.
            "ece": (0.1 + 0.6 + 0.3) / 4,
        }
    )
    found = verify.calibration([0.2, 0.7], [1, 0])
    assert found == pytest.approx(
        {"conf_right": 0.2, "conf_wrong": 0.7, "conf_gap": -0.5, "auroc": 0, "ece": 0.75}
    )
    # 1 and 0.9 are of one bin.
    assert verify.calibration([1.0, 0.9], [0, 1])["ece"] == pytest.approx((1 - 0.1) / 2)


def test_calibration_leaves_out_what_it_cannot_say():
    only_right = verify.calibration([0.5, 0.7], [1, 1])
    assert only_right == pytest.approx({"conf_right": 0.6, "ece": 0.4})
    only_wrong = verify.calibration([0.5, 0.7], [0, 0])
    assert only_wrong == pytest.approx({"conf_wrong": 0.6, "ece": 0.6})
    assert verify.calibration([], []) == {}
    for confidence, right in (([math.nan], [1]), ([1.5], [1]), ([0.5], [])):
        with pytest.raises(ValueError, match="calibration needs"):
            verify.calibration(confidence, right)


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=20))
def test_auroc_counts_pairs(answers):
    of_right = [confidence for confidence, right in answers if right]
    of_wrong = [confidence for confidence, right in answers if not right]
    pairs = list(itertools.product(of_right, of_wrong))
    won = sum((a > b) + 0.5 * (a == b) for a, b in pairs)
    confidence = [confidence / 5 for confidence, _ in answers]
    found = verify.calibration(confidence, [right for _, right in answers])
    if pairs:
        assert found["auroc"] == won / len(pairs)
    else:
        assert "auroc" not in found


# ---- loaders -------------------------------------------------------------------------------------

CHAT = [{"content": "1+1?", "role": "user"}]


@pytest.fixture
def write_rows(tmp_path):
    """write_rows(name, rows): the path of a file with these rows."""
    import pyarrow
    import pyarrow.parquet

    def write(name, rows):
        path = tmp_path / name
        if path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path

    return write


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_repeated_problems_are_loaded_once(write_rows, name):
    row = {
        "prompt": CHAT,
        "reward_model": {"ground_truth": "2", "style": "rule"},
        "data_source": "a",
    }
    assert load_problems(write_rows(name, [row] * 32)) == [Problem(CHAT, "2", "math")]


def test_a_limit_and_the_answers_of_gsm8k(write_rows):
    rows = [{"question": f"{i}?", "answer": f"so\n#### {i},000"} for i in range(5)]
    loaded = load_problems(write_rows("b.parquet", rows * 2), limit=3)
    assert [problem.answer for problem in loaded] == ["0,000", "1,000", "2,000"]
    assert r"\boxed{}" in loaded[0].prompt


def test_columns_in_capitals_and_answers_that_are_numbers(write_rows):
    (problem,) = load_problems(write_rows("c.jsonl", [{"Problem": "p", "Answer": 27.0}]))
    assert problem.answer == "27.0"


COUNTDOWN_ROW = {"nums": [2, 3, 5, 7], "target": 54}
COUNTDOWN_IN_VERL = {
    "prompt": CHAT,
    "reward_model": {"ground_truth": {"numbers": [2, 3, 5, 7], "target": 54}},
}


@pytest.mark.parametrize("row", [COUNTDOWN_ROW, COUNTDOWN_IN_VERL])
def test_countdown_is_known_by_its_columns(write_rows, row):
    (problem,) = load_problems(write_rows("d.parquet", [row]))
    assert problem.rule == "countdown"
    assert rewards_of([problem], ["<answer>(3+5)*7-2</answer>"]) == [1.0]


def complaint(path, rule=None):
    """What load_problems says, which is one line."""
    with pytest.raises(ValueError) as error:
        load_problems(path, rule)
    text = str(error.value)
    assert "\n" not in text
    return text


def test_bad_files_are_refused_in_one_line(write_rows, tmp_path):
    good_row = {"question": "?", "answer": "1"}
    long_answer = {"question": "?", "answer": "9" * 1001}
    unknown = "has the columns a, b; understood are prompt"
    assert "no such file" in complaint(tmp_path / "none.jsonl")
    assert "not a .jsonl" in complaint(tmp_path)
    assert "has no problems" in complaint(write_rows("e.jsonl", []))
    assert unknown in complaint(write_rows("f.jsonl", [{"a": 1, "b": 2}]))
    assert "row 2" in complaint(write_rows("g.jsonl", [good_row, {"question": "?"}]))
    assert "cannot judge" in complaint(write_rows("h.jsonl", [long_answer]))

    (tmp_path / "i.parquet").write_bytes(b"PAR1 no")
    assert "not a whole Parquet file" in complaint(tmp_path / "i.parquet")
    (tmp_path / "j.jsonl").write_text("{}\n{")
    assert re.search("row 1|line 2", complaint(tmp_path / "j.jsonl"))

    (tmp_path / "deep.jsonl").write_text('{"answer": ' + "[" * 10**5)
    assert "line 1 is not a whole JSON object" in complaint(tmp_path / "deep.jsonl")
    (tmp_path / "deep.json").write_text("[" * 10**5)
    assert "is no JSON array" in complaint(tmp_path / "deep.json")


def test_parquet_files_of_odd_columns_are_refused_in_one_line(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "d.parquet"
    columns = [pyarrow.array([text]) for text in ("a", "b", "1")]
    names = ["question", "question", "answer"]
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, names), path)
    assert complaint(path) == f"{path} has the column question twice; leave one out"

    views = [pyarrow.array([text], pyarrow.string_view()) for text in ("a", "1")]
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(views, names[1:]), path)
    assert "has a column of an unusual type" in complaint(path)


def test_rules_that_do_not_fit_are_refused_in_one_line(write_rows):
    arithmetic = write_rows("k.jsonl", [{"question": "?", "answer": "1"}])
    countdown = write_rows("l.parquet", [COUNTDOWN_ROW])
    assert "unknown rule 'x'; known: countdown, math" in complaint(arithmetic, "x")
    assert "row 1" in complaint(countdown, "math")
    assert "row 1" in complaint(arithmetic, "countdown")


def one_problem(write_rows, row, rule=None):
    (problem,) = load_problems(write_rows("one.jsonl", [row]), rule)
    return problem


def question(answer):
    return {"question": "?", "answer": answer}


def verl_row(gold, prompt=CHAT):
    return {"prompt": prompt, "reward_model": {"ground_truth": gold}}


@pytest.mark.parametrize(
    "row, gold",
    [
        (question(r"\boxed{2}"), "2"),
        (question(r"$x = \boxed{\frac{1}{2}}$."), r"\frac{1}{2}"),
        (question(r"so #### \boxed{3}"), "3"),
        (question([r"\boxed{2}", 3]), "2, 3"),
        (verl_row(r"\boxed{2}"), "2"),
        ({"question": "?", "solution": r"It is \boxed{\boxed{2}}."}, "2"),
        ({"question": "?", "solution": ["First,", r"it is \boxed{2}."]}, "2"),
        ({"question": "?", "answer": math.nan, "final_answer": "2"}, "2"),  # as pandas writes null
        (question(2), "2"),
        (question(2.0), "2.0"),
        (question(1e-7), "1e-07"),
        (question(True), "True"),
        (verl_row(5), "5"),
        ({"prompt": CHAT, "reward_model": '{"ground_truth": "2", "style": "rule"}'}, "2"),
        (verl_row('["2"]'), "2"),  # as Skywork-OR1 writes it
        (verl_row(r'["\\frac{1}{2}"]'), r"\frac{1}{2}"),
        (verl_row("[2, 3]"), "[2, 3]"),  # an interval
    ],
)
def test_a_gold_answer_however_it_is_written(row, gold, write_rows):
    problem = one_problem(write_rows, row)
    assert problem.answer == gold
    assert rewards_of([problem] * 2, [f"\\boxed{{{gold}}}", r"\boxed{77}"]) == [1.0, 0.0]


@pytest.mark.parametrize(
    "row, why",
    [
        # no answer, or none that a response could equal
        ({"question": "?", "solution": "It is 2."}, "no answer found in the solution, which ends"),
        (question("proof"), "no answer found: it is 'proof'"),
        (question("notfound"), "no answer found: it is 'notfound'"),
        (verl_row('["1", "2"]'), "the answer is a list of 2: "),
        (verl_row('["1"'), "the answer looks like JSON and is none"),
        ({"question": "?", "solution": r"It is \boxed{}"}, "no answer found in the solution"),
        (question(""), "cannot judge the answer ''"),
        (question(" "), "cannot judge the answer ''"),
        (question("$$"), "cannot judge the answer '$$'"),
        (question(r"\text{ }"), "cannot judge the answer"),
        (question("{2"), "cannot judge the answer '{2'"),
        (question("2}"), "cannot judge the answer '2}'"),
        (question(r"\boxed{}"), r"one whole \boxed{...}"),
        (question(r"\boxed{2"), r"one whole \boxed{...}"),
        (question(r"\boxed{1}, \boxed{2}"), r"one whole \boxed{...}"),
        (question("nan"), "no answer found: it is 'nan'"),
        (question("None"), "no answer found: it is 'None'"),
        (question(math.inf), "no answer found: it is inf"),
        (question(["1", None]), "an answer is a text or a number, not None"),
        (question([["1"]]), "an answer is a text or a number, not ['1']"),
        (question([]), "cannot judge the answer ''"),
        (question(None), "has the columns question, answer (nothing in answer); understood are"),
        (verl_row(None), "reward_model has nothing in ground_truth"),
        (verl_row(math.nan), "reward_model has nothing in ground_truth"),
        ({"prompt": CHAT, "reward_model": "{'ground_truth': 2}"}, "looks like JSON and is none"),
        ({"prompt": CHAT, "reward_model": 2}, "reward_model has nothing in ground_truth"),
        (verl_row({"target": 3}), "numbers and a target are expected"),
        ({**question("1"), "Answer": "2"}, "has the column answer twice"),
        # prompts
        (verl_row("2", ""), "the prompt is empty"),
        (verl_row("2", []), "the prompt is empty"),
        (verl_row("2", 7), "neither a text nor messages: 7"),
        (verl_row("2", ["1+1?"]), "a message needs a role and a content, not '1+1?'"),
        (verl_row("2", [{"from": "human", "value": "1+1?"}]), "needs a role and a content"),
        (verl_row("2", [{"role": "user", "content": None}]), "role and content must be texts"),
        (verl_row("2", [{"role": "user", "content": " "}]), "the prompt is empty"),
        (verl_row("2", [{"role": "system", "content": "1+1?"}]), "no message of the role user"),
        (verl_row("2", [*CHAT, {"role": "assistant", "content": "2"}]), "ends in an answer"),
        (verl_row("2", "[{'role': 'user', 'content': '1+1?'}]"), "the prompt looks like JSON"),
        (
            verl_row("2", [{"role": "user", "content": [{"type": "image"}, {"text": "?"}]}]),
            "role and content must be texts",
        ),
        ({"question": " ", "answer": "2"}, "the question is no text: ' '"),
        ({"question": ["a"], "answer": "2"}, "the question is no text: ['a']"),
        (verl_row("2", "\ud83d"), "surrogates not allowed"),
        # Countdown
        ({"nums": [], "target": 1}, "a list, not []"),
        ({"nums": "1 2", "target": 1}, "a list, not '1 2'"),
        ({"nums": [[1, 2]], "target": 1}, "whole numbers, not [1, 2]"),
        ({"nums": [1, True], "target": 1}, "whole numbers, not True"),
        ({"nums": [1, 2.5], "target": 1}, "whole numbers, not 2.5"),
        ({"nums": [1, None], "target": 1}, "whole numbers, not None"),
        ({"nums": [1, 2], "target": "three"}, "whole numbers, not 'three'"),
        ({"nums": [5, -2], "target": 3}, "from 0"),
        ({"nums": [1] * 101, "target": 3}, "200 characters"),
    ],
)
def test_a_row_that_could_never_be_right_is_refused(row, why, write_rows):
    told = complaint(write_rows("never.jsonl", [question("1"), row]))
    assert "never.jsonl, row 2: " in told and why in told


def test_numbers_of_countdown_may_be_texts_or_floats(write_rows):
    expected = one_problem(write_rows, {"nums": [3, 1], "target": 4})
    assert one_problem(write_rows, {"nums": ["3", 1.0], "target": "4"}) == expected
    texts = one_problem(write_rows, verl_row({"target": 4.0, "numbers": ["3", "1"]}))
    assert texts.answer == expected.answer
    assert rewards_of([texts], ["3+1"]) == [1.0]


def test_messages_may_be_a_text_or_hold_parts(write_rows):
    parts = [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}]
    for prompt in (json.dumps(CHAT), [{"role": "user", "content": parts, "name": None}]):
        assert one_problem(write_rows, verl_row("2", prompt)).prompt == CHAT
    assert one_problem(write_rows, verl_row("2", "[1, 2] has what sum?")).prompt[0] == "["


def test_unsolvable_countdown_is_refused(write_rows):
    rows = [{"nums": [1] * count, "target": 9} for count in (1, 2, 3)]
    told = complaint(write_rows("u.jsonl", rows))
    assert "none of the first three problems has a solution" in told
    some = [*rows, COUNTDOWN_ROW]
    with pytest.raises(ValueError, match="none of the first three"):
        load_problems(write_rows("s.jsonl", some))
    assert len(load_problems(write_rows("t.jsonl", some[1:]))) == 3
    six_numbers = {"nums": [1] * 6, "target": 99}  # to try all would take long
    assert load_problems(write_rows("long.jsonl", [six_numbers]))


def test_json_with_blank_lines_or_as_one_array(write_rows, tmp_path):
    rows = [question("1"), question("2")]
    expected = load_problems(write_rows("plain.jsonl", rows))
    lines = [json.dumps(row) for row in rows]
    for name, text in {
        "blank.jsonl": "\n".join(["", *lines, "  ", ""]),
        "windows.JSONL": "\ufeff" + "\r\n\r\n".join(lines),
        "array.jsonl": json.dumps(rows),
        "array.json": "\ufeff\n" + json.dumps(rows, indent=1),
        "lines.json": "\n".join(lines),
    }.items():
        (tmp_path / name).write_text(text)
        assert load_problems(tmp_path / name) == expected, name
    (tmp_path / "late.jsonl").write_text("\n\n" + lines[0] + "\n{}")
    assert "late.jsonl, row 4: has the columns" in complaint(tmp_path / "late.jsonl")
    (tmp_path / "half.json").write_text("[" + lines[0])
    assert "begins with [ and is no JSON array" in complaint(tmp_path / "half.json")
    (tmp_path / "object.json").write_text(json.dumps({"train": rows}, indent=1))
    assert "line 1 is not a whole JSON object" in complaint(tmp_path / "object.json")
    (tmp_path / "rows.csv").write_text("question,answer\n?,1")
    assert "not a .jsonl, .json or .parquet file; convert" in complaint(tmp_path / "rows.csv")
    assert "no such file" in complaint("C:\\data\\rows")
    assert "no such file" in complaint("~nobody/rows")


def test_of_equal_parquet_rows_only_the_first_is_made_a_dictionary(tmp_path, monkeypatch):
    """Equal in the columns that are read, across batches, whatever the columns' types."""
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr(data, "BATCH", 4)
    rows = []
    for i, prompt in enumerate("aabacbad"):
        chat = [{"role": "user", "content": prompt}, {"role": "user", "content": "?"}]
        rows.append({**verl_row(str(i // 6), chat), "index": i})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    read = list(data.read_rows(str(tmp_path / "rows.parquet")))
    assert [number for number, _ in read] == [1, 3, 5, 7, 8]
    assert [row for _, row in read] == [rows[number - 1] for number, _ in read]

    columns = {
        "prompt": pyarrow.array(["a", "a", None, "a", "a"]).dictionary_encode(),
        "nums": pyarrow.array([[1, 2], [1, 2], [12], [12], [1, 2]]),
        "target": pyarrow.array([1.5, 1.5, 1.5, 1.5, None]),
        "reward_model": pyarrow.array([{"a": b"\xff"}] * 4 + [{"a": None}]),
        "other": pyarrow.array(range(5)),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "types.parquet")
    read = data.read_rows(str(tmp_path / "types.parquet"))
    assert [number for number, _ in read] == [1, 3, 4, 5]


# A row by hand in the schema of each set that data.py names, and the gold answer in it.
HUB = {
    "BytedTsinghua-SIA/DAPO-Math-17k": (
        {
            "data_source": "math_dapo",
            "prompt": [{"content": "1+1? Answer: $Answer", "role": "user"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": "2", "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": "a"},
        },
        "2",
    ),
    "openai/gsm8k:main:test": (
        {
            "question": "1+1?",
            "answer": "It is <<1+1=2>>2.\n#### 1,002",
        },
        "1,002",
    ),
    "HuggingFaceH4/MATH-500": (
        {
            "problem": "1+1?",
            "solution": r"\boxed{3}",
            "answer": r"\frac{4}{2}",
            "subject": "Algebra",
            "level": 1,
            "unique_id": "a",
        },
        r"\frac{4}{2}",
    ),
    "math-ai/aime24": (
        {
            "id": 60,
            "problem": "1+1?",
            "solution": r"It is $1$; no: \boxed{2}.",
            "url": "u",
        },
        "2",
    ),
    "math-ai/aime25": (
        {"problem": "1+1?", "answer": "2", "id": "0"},
        "2",
    ),
    "math-ai/amc23": (
        {"id": 0, "answer": "2", "question": "1+1?", "url": "u"},
        "2",
    ),
    "math-ai/minervamath": (
        {"question": "1+1?", "answer": "2e0"},
        "2e0",
    ),
    "math-ai/olympiadbench": (
        {
            "id": 1,
            "question": "1+1?",
            "solution": ["It is 2."],
            "final_answer": ["$2$", "3"],
            "context": None,
            "is_multiple_answer": True,
        },
        "$2$, 3",
    ),
    "Hothan/OlympiadBench:OE_TO_maths_en_COMP:train": (
        {
            "question": "1+1?",
            "solution": ["It is 2."],
            "final_answer": ["2"],
            "image_1": None,
            "unit": None,
        },
        "2",
    ),
    "Jiayi-Pan/Countdown-Tasks-3to4": (
        {"target": 2, "nums": [1, 1]},
        '{"numbers": [1, 1], "target": 2}',
    ),
}


@pytest.mark.parametrize("name", HUB)
def test_every_named_set_is_read_by_its_columns(name, tmp_path, monkeypatch):
    """The hub is played by a function with the signature of its own."""
    import datasets

    row, answer = HUB[name]
    repo, config, split = (name.split(":") + ["", ""])[:3]
    rows = datasets.Dataset.from_list([row] * 3)
    rows.to_parquet(tmp_path / "a.parquet")
    rows.to_json(tmp_path / "a.jsonl")
    hub = Mock(return_value=rows if split else datasets.DatasetDict(test=rows))
    monkeypatch.setattr(datasets, "load_dataset", hub)
    for source in (tmp_path / "a.parquet", tmp_path / "a.jsonl", name):
        (problem,) = load_problems(source)  # the three rows are one problem
        assert problem.answer == answer, source
        if problem.rule == "countdown":
            right_response = "<answer>1+1</answer>"
        else:
            right_response = f"Answer: {answer}"
            assert "1+1?" in str(problem.prompt)
        responses = [right_response, "Answer: 77"]
        assert rewards_of([problem] * 2, responses) == [1.0, 0.0], source
    hub.assert_called_once_with(repo, config or None, split=split or None)
    assert name in data.__doc__


# ---- prompts -------------------------------------------------------------------------------------


def test_subsets_are_nested_and_mix_all_sets():
    def tokenize(text, add_special_tokens):
        return {"input_ids": list(text.encode())}

    tokenizer = Mock(side_effect=tokenize, chat_template=None, bos_token=None, eos_token_id=None)
    sets = {name: [Problem(f"{name}{i}", "1", "math") for i in range(20)] for name in "ab"}

    def subset(count, seed):
        problems, _ = render_all(sets, tokenizer, 9, count, seed)
        return problems

    whole, prompts = render_all(sets, tokenizer, 9)
    assert whole == sets["a"] + sets["b"]
    assert bytes(prompts[21]) == b"b1"
    large = subset(16, seed=1)
    small = subset(8, seed=1)
    assert large[:8] == small
    assert len(set(large)) == 16
    assert {problem.prompt[0] for problem in small} == {"a", "b"}
    assert large != subset(16, seed=2)
    assert large == subset(16, seed=1)


def test_render():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {"<s>": 0, "</s>": 1, "hi": 2, "A": 3, "you": 4, "?": 5}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="?"
    )
    chat = [{"role": "user", "content": "hi"}, {"role": "user", "content": "you"}]

    def ids(prompt):
        return render(Problem(prompt, "", "math"), tokenizer)

    # Without a chat template: one BOS, no EOS.
    assert ids("hi") == [0, 2]
    assert ids("<s> hi") == [0, 2]
    assert ids(chat) == [0, 2, 4]

    tokenizer.chat_template = (
        "{{ bos_token }} {% for m in messages %}{{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}A{% endif %}"
    )
    assert ids("hi") == [0, 2, 3]
    assert ids(chat) == [0, 2, 4, 3]

    for template in ("{{ raise_exception('No system.') }}", "{{ messages[0].content + 1 }}"):
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match="refuses messages of the roles user, user .* 'hi'"):
            ids(chat)


def test_a_prompt_of_which_no_token_is_left_is_refused():
    tokenizer = tiny.make_tokenizer()  # knows digits, and drops letters
    sets = {"a": [Problem("1", "1", "math"), Problem("Why?", "1", "math")]}
    with pytest.raises(ValueError, match="leaves nothing of the prompt 'Why"):
        render_all(sets, tokenizer, 9)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}{{ eos_token }}"


@pytest.mark.parametrize(
    "template, end",
    [
        (CHATML, {2}),  # another token than the tokenizer's eos
        (CHATML.replace("<|im_end|>", "<|end|>"), {3}),  # added, but not special
        (LLAMA_2, {0}),
        (PLAIN.replace("{{ eos_token }}", "user:"), set()),  # plain text ends the turn
        ("{{ messages[0].content }}", set()),  # it leaves the answer out
        ("{% if messages[1] %}{{ raise_exception('no answers') }}{% endif %}", set()),
        (None, set()),
    ],
)
def test_the_token_that_a_template_ends_a_turn_with(template, end):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|end|>", "?", "user", ":"]
    vocab = {word: i for i, word in enumerate(words)}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    raw.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")  # spaces are tokens, too
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|endoftext|>", unk_token="?"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": words[1:3]})
    tokenizer.add_tokens(words[3:4])
    tokenizer.chat_template = template
    assert data.turn_ends(tokenizer) == end


# ---- entropy: exact, chunked, aligned ------------------------------------------------------------


def naive_statistics(logits, tokens, temperature):
    """The STATISTICS from all logits (N, V) at once, by other words."""
    log_p = torch.log_softmax(logits / temperature, -1)
    p = log_p.exp()
    nucleus = []
    for row in log_p:
        order = row.argsort(descending=True)
        count = int((row[order].exp().cumsum(0) < 0.8).sum()) + 1
        q = row[order[:count]].softmax(0)
        nucleus.append(-(q * q.log()).sum())
    rows = range(len(tokens))
    return {
        "log_probs": log_p[rows, tokens],
        "token_entropy": -(p * log_p).sum(1),
        "sum_p2": (p * p).sum(1),
        "sum_p2_log_p": (p * p * log_p).sum(1),
        "nucleus_entropy": torch.stack(nucleus),
        "hot_log_probs": torch.log_softmax(logits / (1.2 * temperature), -1)[rows, tokens],
        "cold_log_probs": torch.log_softmax(logits / (0.8 * temperature), -1)[rows, tokens],
    }


def test_token_statistics_equal_the_naive_ones_and_never_hold_all_logits():
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 8, generator=g, dtype=torch.float64)
    weight = torch.randn(50, 8, generator=g, dtype=torch.float64)
    tokens = torch.randint(50, (37,), generator=g)
    names = list(entropy.STATISTICS)
    seen = []

    def results(chunked):
        h = hidden.clone().requires_grad_()
        w = weight.clone().requires_grad_()

        def head(x):
            seen.append(len(x))
            return x @ w.T

        if chunked:
            found = entropy.token_statistics(h, head, tokens, 0.7, names, chunk_tokens=10)
        else:
            found = naive_statistics((h @ w.T).float(), tokens, 0.7)
        sum((i + 1.0) * found[name].sin().sum() for i, name in enumerate(names)).backward()
        return [found[name] for name in names] + [h.grad, w.grad]

    for ours, naive in zip(results(chunked=True), results(chunked=False)):
        assert torch.allclose(ours, naive, rtol=1e-4, atol=1e-5 * naive.abs().max().item())
    assert max(seen) == 10 and len(seen) == 8  # 4 chunks, computed again in backward


def test_the_statistics_without_gradient_by_the_definitions_in_float64(monkeypatch):
    """Also where a chunk is taken in several blocks; some tokens are all but certain."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 3000, generator=g) * torch.linspace(0.1, 20, 40)[:, None]
    tokens = torch.randint(3000, (40,), generator=g)
    wanted = entropy.NEEDED_STATISTICS
    exact = naive_statistics(logits.double(), tokens, 1.0)
    for rows in (40, 7):
        monkeypatch.setattr(entropy, "rows_of_block", lambda logits: rows)
        with torch.no_grad():
            found = entropy.token_statistics(logits, torch.nn.Identity(), tokens, 1.0, wanted, 30)
        for name in wanted:
            error = (found[name] - exact[name]).abs() / exact[name].abs().clamp(min=1)
            assert error.max() < 2e-6, name
            assert found[name].dtype == torch.float32


def test_log_probs_are_the_same_bits_with_gradient_and_without():
    """Else the first ratio of a token would not be 1. The number of rows of a block is the same,
    whatever else is wanted."""
    g = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(16, 400_000, bias=False)
    hidden = torch.randn(20, 16, generator=g)
    tokens = torch.randint(400_000, (20,), generator=g)
    assert entropy.rows_of_block(torch.empty(20, 400_000)) == 2

    def log_probs(wanted):
        return entropy.token_statistics(hidden, head, tokens, 0.9, wanted, 13)["log_probs"]

    with torch.no_grad():
        scored = log_probs(entropy.NEEDED_STATISTICS)
    for wanted in (["log_probs"], ["log_probs", "token_entropy"]):
        found = log_probs(wanted)
        assert found.requires_grad and torch.equal(found, scored)


def two_likely_tokens(count=300, vocab=8000, width=256):
    """bfloat16 hidden states whose most likely tokens are two of logits around 20, a head, and the
    first of the two."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(vocab, width, generator=g) / width**0.5
    first, second = torch.randint(vocab, (2, count), generator=g)
    hidden = torch.randn(count, width, generator=g) + 19 * (weight[first] + weight[second])
    head = torch.nn.Linear(width, vocab, bias=False, dtype=torch.bfloat16)
    head.weight.data.copy_(weight)
    return hidden.bfloat16(), head, first


def log_probs_of(logits, tokens):
    return torch.log_softmax(logits, -1).gather(1, tokens[:, None])[:, 0]


@torch.no_grad()
def test_float32_logits_keep_what_a_small_step_changes():
    """bfloat16 logits are wrong by 0.02 nats, and so a third of the log-ratios of a small step have
    the wrong sign: KL-Cov, GSPO and clip fractions would act on these."""
    hidden, head, tokens = two_likely_tokens()
    moved = torch.nn.Linear(256, 8000, bias=False, dtype=torch.bfloat16)
    noise = torch.randn(8000, 256, generator=torch.Generator().manual_seed(1))
    moved.weight.data.copy_(head.weight.float() + 1e-3 * noise)

    def exact(head, hidden):
        return hidden.double() @ head.weight.double().T

    def rounded(head, hidden):
        return head(hidden).float()

    found = {}
    for product in (exact, rounded, entropy.float32_logits):
        before = log_probs_of(product(head, hidden), tokens)
        after = log_probs_of(product(moved, hidden), tokens)
        found[product] = before, after - before
    true_log_probs, true_ratio = found[exact]
    assert 0.01 < true_ratio.std() < 0.05
    error = {}
    wrong_sign = {}
    for product in (rounded, entropy.float32_logits):
        log_probs, ratio = found[product]
        error[product] = (log_probs - true_log_probs).abs().mean()
        wrong_sign[product] = (ratio.sign() != true_ratio.sign()).float().mean()
    assert 0.01 < error[rounded] < 0.04 and error[entropy.float32_logits] < 1e-4
    assert wrong_sign[rounded] > 0.25 and wrong_sign[entropy.float32_logits] < 0.01


def test_the_gradient_of_float32_logits():
    """It is that of the product, rounded to bfloat16 once; with a bias and more dimensions, too."""
    hidden, head, _ = two_likely_tokens(count=6, vocab=50, width=16)
    head.bias = torch.nn.Parameter(torch.linspace(-1, 1, 50).bfloat16())
    hidden = hidden.view(2, 3, 16).requires_grad_()
    slope = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(1))
    logits = entropy.float32_logits(head, hidden)
    assert logits.dtype == torch.float32 and logits.shape == (2, 3, 50)
    (logits * slope).sum().backward()
    exact_hidden = hidden.detach().double().requires_grad_()
    weight = head.weight.detach().double().requires_grad_()
    bias = head.bias.detach().double().requires_grad_()
    exact = exact_hidden @ weight.T + bias
    assert torch.allclose(logits.double(), exact, atol=1e-5)
    (exact * slope).sum().backward()
    pairs = ((hidden, exact_hidden), (head.weight, weight), (head.bias, bias))
    for ours, expected in pairs:
        assert ours.grad.dtype == torch.bfloat16
        error = (ours.grad.double() - expected.grad).abs().max()
        assert error < 0.02 * expected.grad.abs().max()


def test_float32_logits_under_autocast_and_in_float32():
    """Under DDP's autocast the float32 weights are rounded as FSDP2 rounds them, and the logits are
    not; in float32 nothing changes."""
    hidden, head, _ = two_likely_tokens(count=6)
    master = torch.nn.Linear(256, 8000, dtype=torch.float32)
    master.weight.data.copy_(head.weight)
    head.bias = torch.nn.Parameter(master.bias.detach().bfloat16())
    master.bias.data.copy_(head.bias)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = entropy.float32_logits(master, hidden.float())
    assert torch.equal(under_autocast, entropy.float32_logits(head, hidden))
    under_autocast.sum().backward()
    assert master.weight.grad.dtype == torch.float32 and master.weight.grad.any()
    exact = master(hidden.float())
    assert torch.equal(entropy.float32_logits(master, hidden.float()), exact)


def test_entropy_of_known_distributions():
    def entropy_of(logits, temperature=1.0):
        head = torch.nn.Identity()
        wanted = ["token_entropy"]
        tokens = torch.tensor([0])
        found = entropy.token_statistics(logits, head, tokens, temperature, wanted)
        return found["token_entropy"].item()

    uniform = torch.zeros(1, 12)
    sure = torch.tensor([[100.0] + [0.0] * 11])
    assert math.isclose(entropy_of(uniform), math.log(12), rel_tol=1e-6)
    assert entropy_of(sure) < 1e-6
    p = 1 / (1 + math.exp(-1.0))  # T = 2 halves the logits (2, 0), not the log-probs
    expected = -p * math.log(p) - (1 - p) * math.log(1 - p)
    assert math.isclose(entropy_of(torch.tensor([[2.0, 0.0]]), 2.0), expected, rel_tol=1e-6)


def one_rank(values):
    return values.double()


def test_entropy_metrics_by_hand():
    """Both averages of entropy; quadrants; shares of the predicted change."""
    p = torch.tensor([[0.9, 0.5, 0.1], [0.5, 0.5, 0.5]])
    H = torch.tensor([[0.3, 0.6, 2.0], [0.5, 9.0, 9.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    A = torch.tensor([[1.0, 1.0, 1.0], [-1.0, -1.0, -1.0]])
    zero = torch.zeros_like(p)
    old = dict(log_probs=p.log(), token_entropy=H, sum_p2=zero, sum_p2_log_p=zero)
    m = entropy.entropy_metrics(old, A, mask, zero, 2, one_rank)
    assert math.isclose(m["entropy/token_mean"], (0.3 + 0.6 + 2.0 + 0.5) / 4, rel_tol=1e-6)
    per_answer = ((0.3 + 0.6 + 2.0) / 3 + 0.5) / 2
    assert math.isclose(m["entropy/response_mean"], per_answer, rel_tol=1e-6)
    # Likely is p > e^-H: 0.9 > 0.74; 0.5 < 0.549; 0.1 < 0.135; the wrong answer's 0.5 < 0.607.
    shares_of_tokens = [m[f"quadrant/{q}_frac"] for q in entropy.QUADRANTS]
    assert shares_of_tokens == [0.25, 0.5, 0.0, 0.25]
    change = -A * p * (p.log() + H)
    assert math.isclose(m["entropy/change_predicted"], change[mask].sum() / 4, rel_tol=1e-5)
    size = change[mask].abs().sum()
    expected = {
        "pos_likely": change[0, 0] / size,
        "pos_rare": (change[0, 1] + change[0, 2]) / size,
        "neg_likely": 0.0,
        "neg_rare": change[1, 0] / size,
    }
    for name, share in expected.items():
        assert math.isclose(m[f"quadrant/{name}_dH_share"], share, rel_tol=1e-5, abs_tol=1e-8)
    assert m["quadrant/pos_likely_dH_share"] < 0 < m["quadrant/pos_rare_dH_share"]
    cov = token_covariance(p.log(), A, mask)[mask]
    assert math.isclose(m["policy/cov_mean"], cov.mean(), rel_tol=1e-5, abs_tol=1e-7)
    assert math.isclose(m["policy/cov_top_0.2"], cov.max(), rel_tol=1e-5)


def test_log_entropy_by_hand():
    """The same rows as above, with advantages (B,), an integer mask and nan on padding. The change
    is -A p (1 - p)(log p + H)."""
    nan = math.nan
    p = torch.tensor([[0.9, 0.5, 0.1], [0.5, nan, nan], [nan, nan, nan]])
    H = torch.tensor([[0.3, 0.6, 2.0], [0.5, nan, nan], [nan, nan, nan]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    log_probs = p.log().requires_grad_()
    m = entropy.log_entropy(log_probs, H, torch.tensor([1.0, -2.0, 1.0]), mask)
    pos_likely = -0.9 * 0.1 * (math.log(0.9) + 0.3)
    pos_rare = -0.5 * 0.5 * (math.log(0.5) + 0.6) - 0.1 * 0.9 * (math.log(0.1) + 2.0)
    neg_rare = 2 * 0.5 * 0.5 * (math.log(0.5) + 0.5)
    size = abs(pos_likely) + pos_rare + abs(neg_rare)
    mean_log_p = math.log(0.9 * 0.5 * 0.1 * 0.5) / 4
    largest = (math.log(0.9) - mean_log_p) * (1.0 - 0.25)  # mean A = (1 + 1 + 1 - 2) / 4
    cov_mean = 0.0
    for q, A in ((0.9, 1), (0.5, 1), (0.1, 1), (0.5, -2)):
        cov_mean += (math.log(q) - mean_log_p) * (A - 0.25) / 4
    expected = {
        "entropy/token_mean": (0.3 + 0.6 + 2.0 + 0.5) / 4,
        "entropy/response_mean": ((0.3 + 0.6 + 2.0) / 3 + 0.5) / 2,  # the empty answer is none
        "entropy/change_predicted": (pos_likely + pos_rare + neg_rare) / 4,
        "policy/log_prob_mean": mean_log_p,
        "policy/cov_top_0.0002": largest,
        "policy/cov_top_0.002": largest,
        "policy/cov_top_0.02": largest,
        "policy/cov_top_0.2": largest,
        "policy/cov_mean": cov_mean,
        "quadrant/pos_likely_frac": 0.25,
        "quadrant/pos_likely_dH_share": pos_likely / size,
        "quadrant/pos_rare_frac": 0.5,
        "quadrant/pos_rare_dH_share": pos_rare / size,
        "quadrant/neg_likely_frac": 0.0,
        "quadrant/neg_likely_dH_share": 0.0,
        "quadrant/neg_rare_frac": 0.25,
        "quadrant/neg_rare_dH_share": neg_rare / size,
    }
    assert m.keys() == expected.keys()
    for name, value in expected.items():
        assert math.isclose(m[name], value, rel_tol=1e-5, abs_tol=1e-7), name
    assert entropy.log_entropy(log_probs, H, torch.ones(3), torch.zeros(3, 3)) == {}
    flat = entropy.log_entropy(log_probs, H, torch.zeros(3, 1), mask)  # all right, or all wrong
    assert [flat[f"quadrant/{q}_dH_share"] for q in entropy.QUADRANTS] == [0.0] * 4


def test_log_entropy_says_what_entropy_metrics_says():
    """All but the predicted change, which has another estimate."""
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(30) < torch.randint(1, 31, (40, 1), generator=g)
    log_probs = -torch.rand(40, 30, generator=g)
    H = torch.rand(40, 30, generator=g)
    A = torch.randn(40, 1, generator=g).expand(40, 30)
    accuracy = torch.full_like(H, 0.5)
    old = dict(log_probs=log_probs, token_entropy=H, sum_p2=H, sum_p2_log_p=-H)
    expected = entropy.entropy_metrics(old, A, mask, accuracy, 4, one_rank)
    found = entropy.log_entropy(log_probs, H, A, mask)
    same = [name for name in found if "dH_share" not in name and "predicted" not in name]
    assert len(same) == len(found) - 5 == 12
    for name in same:
        assert math.isclose(found[name], expected[name], rel_tol=1e-4, abs_tol=1e-6), name
    theorem = entropy.change_estimates(log_probs, H, H, H, A, mask)["steer theorem"][mask]
    assert math.isclose(found["entropy/change_predicted"], theorem.mean(), rel_tol=1e-4)


def test_the_largest_covariances_are_averaged_by_their_share():
    many = torch.rand(50, 100).clamp(min=1e-3)
    A = torch.randn(50, 1).expand(50, 100)
    old = dict(log_probs=many.log(), token_entropy=many, sum_p2=many, sum_p2_log_p=many)
    m = entropy.entropy_metrics(old, A, many > 0, many, 2, one_rank)
    cov = token_covariance(many.log(), A, many > 0).flatten().sort(descending=True).values
    for share in ("0.0002", "0.002", "0.02", "0.2"):
        mean = cov[: round(5000 * float(share))].mean()
        assert math.isclose(m[f"policy/cov_top_{share}"], mean, rel_tol=1e-5)


def test_estimates_of_the_entropy_change_against_the_measured_one():
    """Tokens with free logits of their own take one step of plain gradient descent. The exact
    estimate is the derivative; the others leave something out."""
    g = torch.Generator().manual_seed(0)
    B, T, V = 64, 8, 16
    logits = (2 * torch.randn(B, T, V, generator=g, dtype=torch.float64)).requires_grad_()
    tokens = torch.distributions.Categorical(logits=logits.detach()).sample()
    rewards = (torch.rand(B, generator=g) < 0.3).double()
    A = group_advantages(rewards, 8)[:, None].expand(B, T)
    mask = torch.arange(T) < torch.randint(1, T + 1, (B, 1), generator=g)

    def statistics(z):
        distribution = entropy.Distribution(z.view(-1, V))
        found = {}
        for name in entropy.NEEDED_STATISTICS:
            found[name] = entropy.STATISTICS[name](distribution, tokens.flatten()).view(B, T)
        return found

    old = statistics(logits)
    loss, _ = losses.grpo(old["log_probs"], old["log_probs"].detach(), A, mask)
    loss.backward()
    after = statistics(logits.detach() - 1e-3 * mask.sum() * logits.grad)
    measured = (after["token_entropy"] - old["token_entropy"].detach())[mask]
    given = [old[name].detach() for name in entropy.NEEDED_STATISTICS]
    found = entropy.change_estimates(*given, A, mask)
    pearson = {name: np.corrcoef(x[mask], measured)[0, 1] for name, x in found.items()}
    assert torch.allclose(1e-3 * found["exact"][mask], measured, rtol=0, atol=1e-5)
    assert pearson.pop("exact") > 0.9999
    assert len(pearson) == 3 and all(0 < r < 0.95 for r in pearson.values()), pearson


def test_group_covariance_by_hand():
    """Groups of three: flat, one right of three, two right of three. A bucket without a group has
    no metric. The third token is padding."""
    log_probs = torch.tensor(
        [
            [-1.0, -9, 7],  # the flat group
            [-1, -9, 7],
            [-1, -9, 7],
            [-1, -1, 7],  # mean -1, right
            [-2, -4, 7],  # mean -3
            [-2, -2, 7],  # mean -2
            [0, -2, 7],  # mean -1, right
            [-1, -1, 7],  # mean -1
            [-4, -4, 7],  # mean -4, right
        ]
    )
    rewards = torch.tensor([0.0, 0, 0, 1, 0, 0, 1, 0, 1])
    A = group_advantages(rewards, 3, "none")[:, None]
    accuracy = rewards.view(3, 3).mean(1).repeat_interleave(3)[:, None]
    mask = torch.tensor([[True, True, False]]).expand(9, 3)

    def found(rows):
        columns = [x[rows] for x in (log_probs, A * mask, mask, accuracy * mask)]
        return entropy.group_covariance(*columns, 3, one_rank)

    # l = (-1, -3, -2) around -2 and A = (2, -1, -1) / 3
    hard = (1 * 2 + -1 * -1 + 0 * -1) / 9
    # l = (-1, -1, -4) around -2 and A = (1, -2, 1) / 3
    easy = (1 * 1 + 1 * -2 + -2 * 1) / 9
    expected = {
        "policy/group_cov_mean": (hard + easy) / 3,
        "policy/group_cov_hard": hard,
        "policy/group_cov_easy": easy,
    }
    assert found(slice(0, 9)) == pytest.approx(expected, abs=1e-7)
    assert found(slice(0, 3)) == {"policy/group_cov_mean": 0}
    half = group_advantages(torch.tensor([1.0, 0]), 2, "none")[:, None]
    share = torch.full((2, 1), 0.5)
    middle = entropy.group_covariance(log_probs[3:5, :1], half, half != 0, share, 2, one_rank)
    assert middle == pytest.approx({"policy/group_cov_mean": 0.25, "policy/group_cov_mid": 0.25})

    # Rows of two ranks, dealt anyhow: what this rank puts in is added to the other's.
    columns = [log_probs, A * mask, mask, accuracy * mask]
    of_ranks = [torch.tensor([8, 0, 5, 3]), torch.tensor([1, 7, 4, 2, 6])]
    tables = []
    for place in (of_ranks[0], of_ranks[1], of_ranks[0]):

        def two_ranks(values):
            if values.dim() == 0:
                return torch.tensor(9)
            tables.append(values)
            return sum(tables[-2:])

        some = [x[place] for x in columns]
        both = entropy.group_covariance(*some, 3, two_ranks, place)
    assert both == pytest.approx(expected, abs=1e-7)


# ---- the trained model ---------------------------------------------------------------------------


def batch_of(pairs):
    """collate's batch of (prompt, response) pairs."""
    answers = []
    for prompt, response in pairs:
        answer = dict(prompt=prompt, response=response, reward=0.0, group_accuracy=0.0)
        answers.append(answer | {"log_probs": [0.0] * len(response)})
    return rollout.collate(answers, torch.zeros(len(answers)), "cpu")


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_policy_scores_as_the_model_does_one_row_at_a_time(kind):
    model = random_model(kind)
    scorer = policy.Policy(model, temperature=0.8).eval()
    pairs = [([3, 4, 5], [6, 7, 1]), ([8], [9, 10, 11, 12, 1]), ([5] * 9, [2])]
    batch = batch_of(pairs)
    wanted = ["log_probs", "token_entropy"]
    found = scorer(batch["ids"], batch["prompt_lens"], batch["response_mask"], wanted)
    for i, (prompt, response) in enumerate(pairs):
        n = len(response)
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        log_p = torch.log_softmax(logits.float() / 0.8, -1)
        H = -(log_p.exp() * log_p).sum(1)
        assert torch.allclose(found["log_probs"][i, :n], log_p[range(n), response], atol=1e-5)
        assert torch.allclose(found["token_entropy"][i, :n], H, atol=1e-5)
        assert (found["log_probs"][i, n:] == 0).all()


def packable_model(model_type):
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=32)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, initializer_range=0.5)
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, pad_token_id=0, eos_token_id=1, **sizes, **heads)
    return AutoModelForCausalLM.from_config(config).eval()


def few_shot_pairs():
    """Long prompts, one of which begins another, with short responses, some of a single token; no
    two rows of a prompt stand together."""
    g = torch.Generator().manual_seed(0)
    prompts = [torch.randint(2, 32, (n,), generator=g).tolist() for n in (21, 17)]
    prompts.append(prompts[0][:19])
    pairs = []
    for n in (1, 5, 3, 1, 4):
        for prompt in prompts:
            pairs.append((prompt, torch.randint(2, 32, (n,), generator=g).tolist()))
    return pairs


def scores_and_gradient(scorer, batch, wanted=("log_probs", "token_entropy")):
    scorer.zero_grad()
    found = scorer(batch["ids"], batch["prompt_lens"], batch["response_mask"], wanted)
    slopes = torch.linspace(-1, 1, found["log_probs"].numel()).view_as(found["log_probs"])
    sum((found[name] * slopes).sum() for name in wanted).backward()
    gradient = torch.cat([p.grad.flatten() for p in scorer.model.parameters()])
    return [found[name].detach() for name in wanted], gradient


@pytest.mark.parametrize("model_type", policy.PACKED_ARCHITECTURES)
def test_a_prompt_that_runs_once_gives_the_same(model_type):
    """Values and gradient, with checkpointed activations, too; and it is run once."""
    model = packable_model(model_type).double()
    scorer = policy.Policy(model, 1.0)
    batch = batch_of(few_shot_pairs())
    run = []
    decoder = policy.decoder_of(model)

    def count(module, args, kwargs):
        run.append(kwargs["input_ids"].shape)

    decoder.register_forward_pre_hook(count, with_kwargs=True)
    packed = scores_and_gradient(scorer, batch)
    policy.checkpoint_activations(model, policy.decoder_layers(model))
    checkpointed = scores_and_gradient(scorer, batch)
    scorer.can_pack = False
    plain = scores_and_gradient(scorer, batch)
    longest = 21 + 1 + 5 + 3 + 1 + 4
    assert run == [(3, longest), (3, longest), (15, 26)]
    for values, gradient in (packed, checkpointed):
        for found, expected in zip(values, plain[0]):
            assert torch.allclose(found, expected, rtol=0, atol=1e-6)
        assert torch.allclose(gradient, plain[1], rtol=1e-6, atol=1e-6 * plain[1].abs().max())


@pytest.mark.parametrize("autocast", [torch.float32, torch.bfloat16])
def test_packed_rows_score_the_same_bits_with_gradient_and_without(autocast):
    scorer = policy.Policy(packable_model("llama"), 1.0, autocast)
    batch = batch_of(few_shot_pairs())
    with torch.no_grad():
        scored = scorer(batch["ids"], batch["prompt_lens"], batch["response_mask"])["log_probs"]
    (learned,), gradient = scores_and_gradient(scorer, batch, ("log_probs",))
    assert torch.equal(scored, learned)
    scorer.can_pack = False
    (plain,), expected = scores_and_gradient(scorer, batch, ("log_probs",))
    tolerance = 1e-5 if autocast == torch.float32 else 0.2
    assert torch.allclose(learned, plain, rtol=0, atol=tolerance)
    assert torch.cosine_similarity(gradient, expected, dim=0) > 1 - tolerance


def test_what_is_not_packed():
    def packed(pairs):
        batch = batch_of(pairs)
        lens = batch["response_mask"].sum(1)
        return policy.pack_by_prompt(batch["ids"], batch["prompt_lens"], lens)

    prompt = list(range(2, 22))
    assert packed([(prompt, [3, 4])] * 2)  # 24 of 44 tokens
    assert not packed([(prompt, [3] * 20)] * 2)  # 60 of 80
    assert not packed([(prompt, [3, 4]), (prompt[1:], [3, 4])])
    assert not packed([(prompt, [3, 4])] * 2000)
    window = dict(use_sliding_window=True, sliding_window=4, max_window_layers=0)
    for name, more, fits in (("qwen2", {}, True), ("qwen2", window, False), ("gpt2", {}, False)):
        config = AutoConfig.for_model(name, **more)
        config._attn_implementation = "sdpa"
        assert policy.can_pack(config) == fits
        config._attn_implementation = "eager"  # adds its mask, which a bool is not made for
        assert not policy.can_pack(config)


CHANGED_LOGITS = {  # model_type: (the setting that changes logits after the head, others)
    "cohere": ({"logit_scale": 0.25}, {}),
    "granite": ({"logits_scaling": 8.0}, {}),
    "gemma2": ({"final_logit_softcapping": 2.0}, {"head_dim": 8}),
    "falcon_h1": (
        {"lm_head_multiplier": 0.3},
        dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, mamba_d_ssm=64),
    ),
    "gemma4": (  # its settings stand in a text_config
        {"final_logit_softcapping": 2.0},
        dict(head_dim=8, global_head_dim=8, hidden_size_per_layer_input=0),
    ),
}


@pytest.mark.parametrize("model_type", CHANGED_LOGITS)
def test_logits_that_a_model_changes_after_its_head(model_type):
    """Every statistic, at a temperature, is that of the logits which the model itself gives."""
    change, others = CHANGED_LOGITS[model_type]
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=32)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, initializer_range=0.5)
    settings = sizes | heads | others | change
    if model_type == "gemma4":
        settings = dict(text_config=settings, vision_config=None, audio_config=None)
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, pad_token_id=0, eos_token_id=1, **settings)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(2, 32, (1, 9))
    mask = torch.ones(1, 6, dtype=torch.bool)
    wanted = list(entropy.STATISTICS)
    with torch.no_grad():
        found = policy.Policy(model, 0.7)(ids, torch.tensor([3]), mask, wanted)
        distribution = entropy.Distribution(model(ids).logits[0, 2:-1] / 0.7)
        for name, values in found.items():
            expected = entropy.STATISTICS[name](distribution, ids[0, 3:])
            assert torch.allclose(values[0], expected, atol=1e-5), name
        without = policy.Policy(model, 0.7)
        without.logit_scale, without.logit_cap = 1.0, None
        plain = without(ids, torch.tensor([3]), mask)["log_probs"]
        assert (plain - found["log_probs"]).abs().max() > 0.05  # so the change is seen


def test_a_head_that_is_not_tied_though_the_config_says_so(tmp_path):
    model = random_model()  # tied
    model.save_pretrained(tmp_path)
    assert policy.load_model(tmp_path, False).lm_head.weight.shape == (32, 32)
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    untied = AutoModelForCausalLM.from_config(config)
    untied.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='a head that is not its.*"tie_word_embeddings": false'):
        policy.load_model(tmp_path, False)
    model.save_pretrained(tmp_path)  # and the reverse: no head, but the config wants one
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not hold lm_head.weight"):
        policy.load_model(tmp_path, False)


def test_generation_settings_that_contradict_each_other_do_not_stop_a_checkpoint(tmp_path):
    """Some models on the hub hold a temperature without do_sample, and cannot be saved as loaded.
    Settings that fit together stay."""
    model = random_model()
    model.generation_config.eos_token_id = [1, 3]
    model.save_pretrained(tmp_path)
    path = tmp_path / "generation_config.json"
    settings = json.loads(path.read_text()) | {"temperature": 0.9, "do_sample": True}
    for do_sample, kept in ((True, 0.9), (False, None)):
        path.write_text(json.dumps(settings | {"do_sample": do_sample}))
        loaded = policy.load_model(tmp_path, False)
        loaded.save_pretrained(tmp_path / "saved")
        saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
        assert (saved.get("temperature"), saved["eos_token_id"]) == (kept, [1, 3])


def test_a_model_that_never_ties_is_loaded_whatever_its_config_says(tmp_path):
    config = AutoConfig.for_model(
        "xlstm", vocab_size=32, hidden_size=32, num_hidden_layers=1, num_heads=2
    )
    config.tie_word_embeddings = True
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    loaded = policy.load_model(tmp_path, False)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_models_of_images_and_text_train_their_text_part():
    """DDP would wait for gradients of the rest. The layers that FSDP2 shards are the text's, though
    those of the eyes are more."""
    text = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=32, head_dim=8
    )
    eyes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2)
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=eyes)
    model = AutoModelForCausalLM.from_config(config)
    scorer = policy.Policy(model, 1.0)
    ids = torch.randint(2, 32, (2, 9))
    mask = torch.ones(2, 6, dtype=torch.bool)
    scorer(ids, torch.tensor([3, 3]), mask)["log_probs"].sum().backward()
    names = dict(model.named_parameters())
    frozen = {name for name, parameter in names.items() if not parameter.requires_grad}
    seeing = ("vision_tower", "multi_modal_projector")
    assert frozen == {name for name in names if any(part in name for part in seeing)}
    assert len(frozen) > 10
    policy.check_gradients(scorer)
    layers = policy.decoder_layers(model)
    assert [type(layer).__name__ for layer in layers] == ["Gemma3DecoderLayer"] * 2
    names["lm_head.weight" if "lm_head.weight" in names else list(names)[-1]].grad = None
    with pytest.raises(ValueError, match="no gradient.*--parallel fsdp"):
        policy.check_gradients(scorer)


def test_layers_are_found_where_transformers_names_none():
    """FSDP2 would wrap nothing layer by layer, and the whole model would be gathered at once."""
    config = AutoConfig.for_model("ctrl", vocab_size=32, n_embd=32, dff=32, n_layer=3, n_head=2)
    model = AutoModelForCausalLM.from_config(config)
    assert not model._no_split_modules
    experts = [torch.nn.Linear(2, 2) for _ in range(9)]  # more of them than layers, but smaller
    model.transformer.h[0].experts = torch.nn.ModuleList(experts)
    assert policy.decoder_layers(model) is model.transformer.h
    del model.transformer.h[0].experts
    model.transformer.h = torch.nn.Sequential(*model.transformer.h)
    with pytest.raises(ValueError, match="ctrl keeps no list of layers"):
        policy.decoder_layers(model)


def test_entropy_after_is_the_change_on_the_first_answers(monkeypatch):
    dist.init_process_group("gloo")
    model = random_model()
    scorer = policy.Policy(model, 1.0)
    cfg = types.SimpleNamespace(group_size=2, micro_batch_tokens=12)
    batch = batch_of([([3, 4], list(range(5, 5 + n))) for n in (3, 9, 7, 1, 2, 4)])
    batch["place"] = torch.tensor([4, 1, 2, 7, 0, 5])  # the first of each two are 0, 2 and 4

    def entropies():
        rows = [[0, 1, 2], [3, 4, 5]]
        return policy.batch_statistics(scorer, batch, ["token_entropy"], rows)["token_entropy"]

    before = entropies()
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    first = (entropies() - before)[::2]
    change = first[batch["response_mask"][::2]].mean().item()
    assert change < -0.01
    found = policy.entropy_after(scorer, batch, {"token_entropy": before}, cfg)
    assert math.isclose(found, change, rel_tol=1e-4)
    # Another rank has four lists, so one more answer fills up here. It does not count.
    monkeypatch.setattr(policy, "max_over_ranks", lambda value: 4)
    found = policy.entropy_after(scorer, batch, {"token_entropy": before}, cfg)
    assert math.isclose(found, change, rel_tol=1e-4)


def test_micro_batches_hold_the_budget_and_every_row():
    lengths = [5, 100, 7, 60, 33, 8, 2, 300]
    batches = policy.micro_batches(lengths, range(8), budget=128)
    assert sorted(row for batch in batches for row in batch) == list(range(8))
    assert len(batches) < 8
    for batch in batches:
        longest = max(lengths[row] for row in batch)
        assert len(batch) * longest <= 128 or len(batch) == 1
    more = policy.micro_batches(lengths, range(8), budget=128, at_least=7)
    assert len(more) == 7 and sorted(row for batch in more for row in batch) == list(range(8))
    assert policy.micro_batches(lengths, [], budget=128) == []


def agreed(monkeypatch, others, lengths, rows, **more):
    """policy.agree_on_micro_batches beside a rank that needs `others` lists."""
    monkeypatch.setattr(policy, "max_over_ranks", functools.partial(max, others))
    return policy.agree_on_micro_batches(lengths, rows, 100, **more)


def test_micro_batches_are_even_and_as_many_as_on_other_ranks(monkeypatch):
    lengths = [10, 40, 30, 20, 50, 60]
    rows = list(range(6))
    # 3 x 30, 2 x 50 and 60 tokens: no smaller budget has three lists
    assert agreed(monkeypatch, 0, lengths, rows) == [[0, 3, 2], [1, 4], [5]]
    # Another rank has four lists; no smaller budget than 80 has as few here.
    assert agreed(monkeypatch, 4, lengths, rows) == [[0, 3], [2, 1], [4], [5]]
    # Three even lists where the budget alone would fill one and leave a rest.
    assert agreed(monkeypatch, 0, [10] * 11, range(11)) == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
    # Halved lists stand in the order of their lengths, too.
    assert agreed(monkeypatch, 3, [10] * 3 + [15] * 2, range(5)) == [[0], [1, 2], [3, 4]]


def test_a_rank_with_too_few_rows_runs_others_as_well(monkeypatch):
    lengths = [10, 40, 30, 20]
    assert agreed(monkeypatch, 3, lengths, [1], spare=[0, 2, 3]) == [[0], [3], [1]]
    assert agreed(monkeypatch, 0, lengths, [], spare=[1, 2], fewest=1) == [[2]]
    assert agreed(monkeypatch, 0, lengths, [], spare=[1, 2]) == []
    assert agreed(monkeypatch, 1, lengths, [], spare=[1, 2]) == [[2]]


def test_the_split_of_a_batch(monkeypatch):
    """The updates run what the method learns from, and one row at least; the rest stands in lists
    of its own, before them, as a filler's values are those of its update."""
    monkeypatch.setattr(policy, "max_over_ranks", int)
    learned = torch.tensor([1, 0, 1, 0, 0, 0, 0, 0, 1, 1, 1, 1]).bool()
    lengths = torch.tensor([5, 5, 9, 9, 8, 7, 6, 9, 4, 3, 2, 1])
    split = policy.split_batch({"lengths": lengths, "to_run": learned}, budget=18, updates=3)
    assert split.rows == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert split.micro_batches == [[[0, 2]], [[6]], [[11, 10, 9, 8]]]
    assert split.left_out == [[1, 5], [4, 3], [7]] or split.left_out == [[1, 5], [4], [3, 7]]
    assert split.all_micro_batches() == split.left_out + [[0, 2], [6], [11, 10, 9, 8]]
    everything = {"lengths": lengths, "to_run": torch.ones(12, dtype=torch.bool)}
    assert policy.split_batch(everything, 18, 3).left_out == []


def test_sorted_micro_batches_give_the_gradient_of_one_padded_block():
    model = random_model("qwen2").double()
    scorer = policy.Policy(model, 1.0)
    lengths = [1, 20, 3, 7, 2, 13, 5, 1, 9, 17, 4, 6]
    B, T = 12, 20
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    batch = dict(
        ids=torch.randint(2, 20, (B, 4 + T)),
        prompt_lens=torch.full((B,), 4),
        lengths=torch.tensor(lengths) + 4,
        response_mask=mask,
    )
    advantages = torch.randn(B, 1).double() * mask

    def gradient(split):
        model.zero_grad()
        for rows in split:
            found = policy.response_statistics(scorer, batch, rows, ["log_probs"])
            log_probs = found["log_probs"].double()
            width = log_probs.shape[1]
            loss, _ = losses.grpo(
                log_probs,
                log_probs.detach(),
                advantages[rows, :width],
                mask[rows, :width],
                num_tokens=mask.sum(),
            )
            loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    split = policy.micro_batches(batch["lengths"].tolist(), range(B), 40)
    assert len(split) > 4 and split[0] != [0, 1, 2]
    whole = gradient([list(range(B))])
    assert (gradient(split) - whole).norm() < 1e-6 * whole.norm()


# ---- what a run takes of a GPU -------------------------------------------------------------------

# (hidden, query heads, key-value heads, head_dim, MLP): other ratios in each
SHAPES = [(256, 4, 2, 64, 512), (128, 4, 1, 32, 768), (192, 6, 6, 32, 320)]


def small_config(name, hidden, heads, kv_heads, head_dim, mlp, layers, **more):
    kind = getattr(transformers, name)
    return kind(
        vocab_size=67,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=mlp,
        tie_word_embeddings=True,
        **more,
    )


def bytes_kept(config, dtype, autocast, checkpointing=False, tokens=274):
    """Bytes of all storages but the weights' that autograd keeps of a forward over two rows,
    without the weights' casts, which have the shape of a weight."""
    model = AutoModelForCausalLM.from_config(config).eval()
    if not autocast:
        model.to(dtype)
    if checkpointing:
        policy.checkpoint_activations(model, policy.decoder_layers(model))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {tuple(p.shape) for p in model.parameters()}
    shapes |= {shape[::-1] for shape in shapes}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tuple(tensor.shape) not in shapes:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    ids = torch.randint(67, (2, tokens // 2))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model.base_model(input_ids=ids, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


def bytes_per_layer(name, shape, dtype, autocast, **more):
    """Of a token, from the difference of two depths."""
    two = bytes_kept(small_config(name, *shape, 2, **more), dtype, autocast)
    three = bytes_kept(small_config(name, *shape, 3, **more), dtype, autocast)
    return (three - two) / 274


@pytest.mark.parametrize("dtype, autocast", [("bfloat16", 0), ("bfloat16", 1), ("float32", 0)])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_layer_keeps_what_the_plan_says(shape, dtype, autocast):
    """Within 1 %: the rest are sums of rows, 8 bytes a norm and 4 a head. FSDP2 computes in the
    dtype, DDP under autocast."""
    dtype = getattr(torch, dtype)
    size = memory.model_size(small_config("Qwen2Config", *shape, 2))
    planned = memory.kept_per_token(size, dtype, bool(autocast))
    measured = bytes_per_layer("Qwen2Config", shape, dtype, bool(autocast))
    assert planned == pytest.approx(measured, rel=0.01)
    hidden, heads, kv_heads, head_dim, mlp = shape
    if dtype == torch.bfloat16:
        of_hidden = 26 if autocast else 16
        kv = kv_heads * head_dim
        assert planned == of_hidden * hidden + 4 * heads * head_dim + 4 * kv + 8 * mlp


@pytest.mark.parametrize("autocast", [False, True])
def test_a_layer_with_norms_of_queries_or_with_experts_keeps_what_the_plan_says(autocast):
    """Within 3 %: the router is not counted."""
    experts = dict(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=96)
    for name, more in (("LlamaConfig", {}), ("Qwen3Config", {}), ("Qwen3MoeConfig", experts)):
        size = memory.model_size(small_config(name, *SHAPES[0], 2, **more))
        assert size.qk_norm == ("Qwen3" in name) and size.experts == 3 * bool(more)
        planned = memory.kept_per_token(size, torch.bfloat16, autocast)
        measured = bytes_per_layer(name, SHAPES[0], torch.bfloat16, autocast, **more)
        assert planned == pytest.approx(measured, rel=0.03), name


def test_a_checkpointed_layer_keeps_its_input():
    for autocast, itemsize in ((False, 2), (True, 4)):
        kept = []
        for layers in (2, 3):
            config = small_config("Qwen2Config", *SHAPES[0], layers)
            kept.append(bytes_kept(config, torch.bfloat16, autocast, checkpointing=True))
        size = memory.model_size(config)
        planned, _ = memory.activations(size, torch.bfloat16, autocast, True, 274)
        assert planned == 3 * (kept[1] - kept[0]) == 3 * itemsize * 256 * 274


def planned(total=80e9, ranks=1, parameters=1_000_000_000, **settings):
    """A memory.Plan of a model of a billion parameters, in bfloat16, with settings of train.py."""
    size = memory.ModelSize(
        parameters=parameters,
        trained=parameters,
        layer=50_000_000,
        root=100_000_000,
        layers=18,
        vocab=100_000,
        hidden=1000,
        query=1000,
        key_value=250,
        mlp=4000,
        experts=0,
        tied=True,
        qk_norm=False,
    )
    cfg = types.SimpleNamespace(
        steps=1,
        engine="vllm",
        parallel="fsdp",
        activation_checkpointing=True,
        lora_rank=0,
        rollout_gpu_memory=0.0,
        rollout_tp=1,
        prompts_per_step=64,
        group_size=8,
        updates_per_rollout=8,
        micro_batch_tokens=10_000,
        max_prompt_len=1000,
        max_response_len=3000,
    )
    vars(cfg).update(settings)
    return memory.plan_memory(size, cfg, ranks, torch.bfloat16, False, total)


def test_vllm_gets_what_the_trainer_leaves():
    # 12 GB are held while vLLM samples, 2 are assumed for contexts, and 5 % stay free.
    assert planned().share == 0.77  # 66 / 80 = 0.825
    assert planned(parallel="ddp").share == 0.72  # 4 GB of buckets more
    assert planned(ranks=8).share == 0.80
    assert planned(steps=0).share == 0.80
    assert planned(rollout_gpu_memory=0.3).share == 0.3
    for plan in (planned(), planned(parallel="ddp"), planned(rollout_gpu_memory=0.3)):
        held = plan.peaks["rollout"] - plan.parts["KV cache"] - plan.parts["engine weights"]
        assert plan.parts["KV cache"] == pytest.approx(plan.share * 80e9 - 2e9 - 2e9)
        assert held == pytest.approx((16 if plan.share == 0.72 else 12) * 1e9 + 4e9)
        assert not plan.misfit and not plan.tight


def test_what_cannot_fit_is_said_with_a_remedy():
    plan = planned(total=19e9)
    assert "weights, gradients and AdamW take 20.0 GB of each GPU's 19.0 GB: use" in plan.misfit
    assert not planned(total=19e9, ranks=2).misfit
    # 21 GB: 14 are taken, so 0.28 of the card or 5.9 GB are vLLM's: 2 of weights, 2 for itself.
    assert planned(total=21e9).share == 0.28 and not planned(total=21e9).misfit
    # With answers of 300,000 tokens, 18 kB each, one alone has 5.4 GB.
    long = planned(total=21e9, max_response_len=300_000)
    assert "vllm does not fit: of each GPU's 21.0 GB the trainer holds 12.0 GB while" in long.misfit
    assert "--rollout_tp" in long.misfit
    given = planned(total=21e9, max_response_len=300_000, rollout_gpu_memory=0.2)
    assert not given.misfit  # what is given is used as it is
    no_recomputation = planned(total=25e9, activation_checkpointing=False)
    assert "the update may take" in no_recomputation.tight
    assert "--micro_batch_tokens" in no_recomputation.tight
    assert "lower --rollout_gpu_memory" in planned(rollout_gpu_memory=0.9).tight


def test_peaks_of_the_phases():
    """By hand, GB: a billion parameters on 4 ranks."""
    plan = planned(ranks=4)
    assert plan.parts["weights"] == plan.parts["gradients"] == 1e9
    held = 3e9 + 4e9  # weights, AdamW, overhead
    gathered = 2 * (2 * 0.05e9 + 0.1e9)
    unreduced = 6 * 0.15e9 + 2 * 0.1e9
    layer = 10_000 * (26_000 - 10_000 + 5000 + 32_000)
    gradients_of_layer = 10_000 * 2 * (3 * 4000 + 2 * 1000)
    inputs = 10_000 * 18 * 2 * 1000
    chunk = 20 * 512 * 100_000
    update = held + 1e9 + gathered + unreduced + inputs + layer + gradients_of_layer + chunk
    assert plan.peaks["update"] == pytest.approx(update)
    assert plan.peaks["score"] == pytest.approx(held + gathered + layer + chunk)
    assert plan.peaks["optimizer step"] == pytest.approx(held + 1e9)
    assert plan.peaks["push"] == pytest.approx(held + 2e9 + 0.8e9)
    whole = planned(ranks=4, parallel="ddp")  # its gradients are buckets, and stay
    assert whole.peaks["optimizer step"] == 16e9 + 4e9
    assert whole.parts["gathered or cast"] == 2e9


def test_rows_of_the_torch_engine(monkeypatch):
    """On a CPU 256; on a GPU a power of two that half of the free memory holds; what is given
    where it is given."""
    config = small_config("Qwen2Config", *SHAPES[0], 2)
    # keys and values of 2 layers of 2 heads of 64, 2 bytes each; six float32 of the vocabulary
    per_row = 2 * 2 * 128 * 2 * 100 + 24 * 67
    assert memory.bytes_per_row(config, torch.bfloat16, 100) == per_row
    assert memory.rows_that_fit(2 * 64 * per_row, per_row) == 64
    assert memory.rows_that_fit(2 * 127 * per_row, per_row) == 64
    assert memory.rows_that_fit(0, per_row) == 1
    assert memory.rows_that_fit(1e12, per_row) == 1024

    def engine(max_rows=None, device="cpu"):
        built = rollout.TorchEngine.__new__(rollout.TorchEngine)
        built.max_rows = max_rows
        built.device = device
        built.model = types.SimpleNamespace(config=config, dtype=torch.bfloat16)
        return built

    assert engine().rows_at_once(100) == 256 and engine(12).rows_at_once(100) == 12
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30 * per_row, 1e12))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 54 * per_row)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20 * per_row)
    assert engine(device="cuda:0").rows_at_once(100) == 32
    assert engine(12, "cuda:0").rows_at_once(100) == 12


def test_the_memory_of_the_card(monkeypatch):
    properties = types.SimpleNamespace(total_memory=24e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert memory.card_memory(torch.device("cuda", 0)) == 24e9
    assert memory.card_memory(torch.device("cpu")) == 80e9


def test_the_optimizer_is_fused_on_gpus_only(monkeypatch):
    told = []
    monkeypatch.setattr(torch.optim, "AdamW", lambda *_, **options: told.append(options))
    cfg = types.SimpleNamespace(lr=1.0, weight_decay=0.0)
    for is_cuda in (True, False):
        parameter = types.SimpleNamespace(is_cuda=is_cuda, requires_grad=True)
        train.make_optimizer(types.SimpleNamespace(parameters=lambda: iter([parameter])), cfg)
    assert [options["fused"] for options in told] == [True, None]


def test_ddp_does_not_send_buffers(recwarn):
    """With no argument that only some versions of torch know, and none that one warns of."""
    dist.init_process_group("gloo")
    cfg = types.SimpleNamespace(parallel="ddp", steps=1)
    wrapped = train.wrap_ddp(policy.Policy(random_model(), 1.0), cfg)
    assert len(wrapped.modules_buffers) and not wrapped.will_sync_module_buffers()
    assert not [warning for warning in recwarn if "buffers" in str(warning.message)]


def test_segments_of_the_allocator_may_grow_and_shrink():
    assert "PYTORCH_ALLOC_CONF" in os.environ
    lines = (HERE / "rollout.py").read_text().splitlines()
    set_in = lines.index('os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")')
    assert set_in < lines.index("import torch")


def test_stages_tell_their_memory_on_gpus(monkeypatch):
    """The most of each stage, on the rank with most."""
    peaks = [0.0]

    def reset():
        peaks[0] = 0.0

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peaks[0])
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 7 * 2**30)
    monkeypatch.setattr(train, "max_over_ranks", lambda value: value + 1)
    watch = train.Stopwatch(torch.device("cuda"))
    for stage, gib in (("rollout", 1), ("score", 4), ("update", 6), ("push", 2)):
        peaks[0] = max(peaks[0], gib * 2**30)
        watch.lap(stage)
    found = watch.all_metrics(100)
    in_gib = {name: value for name, value in found.items() if name.startswith("memory/")}
    expected = dict(rollout=2, score=5, update=7, push=3)
    assert in_gib == {f"memory/{name}_gib": gib for name, gib in expected.items()} | {
        "memory/reserved_gib": 8
    }
    for name in found:
        diagnose.explain(name)


def test_padding_and_imbalance_by_hand(monkeypatch):
    """This rank runs rows of 4, 6 and of 8, 2 tokens in two updates and leaves two out, the other
    one runs micro-batches of 16 and of 10 padded tokens and leaves one of six rows out."""
    others = [torch.tensor([16.0, 10.0]), torch.tensor([16.0, 10.0])]
    others.append(torch.tensor([20, 5, 6]))  # tokens, answers run, answers

    def all_reduce(tensor, op=dist.ReduceOp.SUM):
        other = others.pop(0)
        tensor.copy_(torch.maximum(tensor, other) if op == dist.ReduceOp.MAX else tensor + other)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    split = policy.Split([[0, 1, 4], [2, 3, 5]], [[[0, 1]], [[2, 3]]], [[4, 5]])
    found = policy.padding_metrics([4, 6, 8, 2, 50, 60], split)
    # Here 2 x 6 and 2 x 8 padded tokens of 20; in all 54 of 40. The larger ones are 16 and 16.
    assert found == pytest.approx(
        {
            "time/padding_frac": 1 - 40 / 54,
            "time/imbalance": (16 + 16) / 27,
            "time/left_out_frac": 1 - 9 / 12,
        }
    )


def test_no_warning_sends_to_float32():
    """On a GPU it has no fast attention, and scores take memory with the square of the length."""
    assert not any("float32" in limit.advice for limit in diagnose.SUSPICIOUS)


# ---- rollout: what is drawn, from what, in which order -------------------------------------------

EOS = 1
LIMIT = 256
PROMPTS = [
    [3, 4, 5],
    [6, 7] * 70,  # 140 tokens: over one block of vLLM's cache
    [8],
    list(range(2, 30)),
    [9, 9],
]
SEEDS = [0, 100, 200, 300, 400]


def rollout_model(kind="qwen2", seed=0):
    """The config's own EOS is another token than the engine's: stop_ids alone must decide."""
    common = dict(vocab_size=32, initializer_range=0.2, bos_token_id=0, eos_token_id=5)
    if kind == "qwen2":  # head_dim 32, as vLLM on CPU wants it; tied embeddings
        config = Qwen2Config(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=LIMIT,
            tie_word_embeddings=True,
            pad_token_id=0,
            **common,
        )
    else:
        config = GPT2Config(
            n_embd=64, n_layer=2, n_head=2, n_positions=LIMIT, pad_token_id=0, **common
        )
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


def torch_engine(model, folder, **options):
    model.config.save_pretrained(folder)
    options = dict(device="cpu", stop_ids=[EOS], max_model_len=LIMIT) | options
    engine = rollout.TorchEngine(folder, dtype=torch.float32, **options)
    engine.push_weights(policy.full_tensors(model))
    return engine


@torch.no_grad()
def trainer_log_probs(model, prompts, ids, n, temperature):
    """As a trainer computes them: one right-padded forward without the cache."""
    rows = [prompts[k // n] + answer for k, answer in enumerate(ids)]
    width = max(map(len, rows))
    batch = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    log_probs = torch.log_softmax(model(batch, attention_mask=mask).logits / temperature, -1)
    found = []
    for k, (row, answer) in enumerate(zip(rows, ids)):
        before = log_probs[k, len(row) - len(answer) - 1 : len(row) - 1]
        found.append(before.gather(-1, torch.tensor(answer)[:, None])[:, 0].tolist())
    return found


def largest_difference(a, b):
    """Between two lists of lists of numbers of the same shape."""
    differences = []
    for row_a, row_b in zip(a, b, strict=True):
        differences += [abs(x - y) for x, y in zip(row_a, row_b, strict=True)]
    return max(differences)


def check_ends(ids, truncated, max_tokens):
    assert any(truncated) and not all(truncated)
    for answer, is_cut in zip(ids, truncated, strict=True):
        assert EOS not in answer[:-1] and is_cut == (answer[-1] != EOS)
        assert len(answer) == max_tokens or not is_cut


def rng_state():
    numpy_state = np.random.get_state()
    return str(
        (random.getstate(), numpy_state[1].tolist(), numpy_state[2], torch.get_rng_state().tolist())
    )


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_the_trainers(tmp_path, kind, temperature):
    model = rollout_model(kind)
    engine = torch_engine(model, tmp_path)
    request = dict(n=6, max_tokens=20, temperature=temperature, seeds=SEEDS)
    ids, log_probs, _ = engine.generate(PROMPTS, **request)
    expected = trainer_log_probs(model, PROMPTS, ids, 6, temperature)
    assert largest_difference(log_probs, expected) < 1e-4


def test_answers_depend_on_weights_prompt_and_seed_only(tmp_path):
    model = rollout_model()
    before = rng_state()
    options = dict(max_tokens=20, temperature=1.0)
    engine = torch_engine(model, tmp_path)
    ids, log_probs, truncated = engine.generate(PROMPTS, n=6, seeds=SEEDS, **options)
    small = torch_engine(model, tmp_path, max_rows=12)  # other batches: two prompts at a time
    assert rng_state() == before
    again, again_log_probs, _ = small.generate(PROMPTS, n=6, seeds=SEEDS, **options)
    assert again == ids and largest_difference(again_log_probs, log_probs) < 1e-5
    for i, prompt in enumerate(PROMPTS):  # alone, so the order of the results is right too
        alone, _, _ = small.generate([prompt], n=1, seeds=[SEEDS[i] + 4], **options)
        assert alone == [ids[6 * i + 4]]
    others, _, _ = small.generate(PROMPTS, n=6, seeds=[seed + 50 for seed in SEEDS], **options)
    assert others != ids
    check_ends(ids, truncated, 20)
    # EOS as the last allowed token is no truncation.
    k = next(i for i, answer in enumerate(ids) if 2 < len(answer) < 20)
    prompt = PROMPTS[k // 6]
    seed = SEEDS[k // 6] + k % 6
    for limit, is_cut in ((len(ids[k]), False), (len(ids[k]) - 1, True)):
        short = small.generate([prompt], n=1, max_tokens=limit, temperature=1.0, seeds=[seed])
        assert short[0] == [ids[k][:limit]] and short[2] == [is_cut]
    assert small.generate([], n=6, seeds=[], **options) == ([], [], [])


def test_frequencies_are_the_softmax(tmp_path):
    model = rollout_model()
    n = 4000
    engine = torch_engine(model, tmp_path)
    ids, _, _ = engine.generate([PROMPTS[0]], n=n, max_tokens=1, temperature=2.0, seeds=[7])
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[0]])).logits[0, -1].double()
    expected = n * torch.softmax(logits / 2.0, -1).numpy()
    counts = np.bincount([answer[0] for answer in ids], minlength=32)
    keep = expected > 5
    chi_squared = ((counts - expected)[keep] ** 2 / expected[keep]).sum()
    assert chi_squared < 2 * keep.sum() and keep.sum() > 10


def test_sample_reaches_rare_tokens_and_never_impossible_ones():
    logits = torch.zeros(1, 151_936)
    logits[0, 0] = 18.8  # p = 0.999; 7e-9 for each of the others
    # Steps of 3 tokens, below float32's 6e-8.
    uniform = 0.9999 - 2e-8 * torch.arange(50, dtype=torch.float64)
    tokens, _ = rollout.sample(logits.expand(50, -1), uniform, 1.0)
    assert len(tokens.unique()) == 50
    almost_one = 1 - 2**-53
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]]).expand(3, -1)
    uniform = torch.tensor([0.0, 0.5, almost_one], dtype=torch.float64)
    tokens, log_probs = rollout.sample(logits, uniform, 1.0)
    assert tokens.tolist() == [1, 3, 3] and log_probs.isfinite().all()
    # Cdfs that end a little below or above 1.
    logits = torch.randn(100, 32, generator=torch.Generator().manual_seed(0))
    tokens, _ = rollout.sample(logits, torch.full((100,), almost_one, dtype=torch.float64), 1.0)
    assert tokens.max() == 31
    with pytest.raises(FloatingPointError):
        rollout.sample(logits * torch.nan, torch.zeros(100, dtype=torch.float64), 1.0)


def test_push_weights(tmp_path):
    engine = torch_engine(rollout_model(), tmp_path)
    other = rollout_model(seed=1)
    embeddings = engine.model.get_input_embeddings()
    assert engine.model.lm_head.weight is embeddings.weight  # tied: held once
    pushed = {name: tensor.double() for name, tensor in policy.full_tensors(other)}
    engine.push_weights(iter(pushed.items()))
    ids, log_probs, _ = engine.generate(PROMPTS, n=2, max_tokens=9, temperature=1.0, seeds=SEEDS)
    assert largest_difference(log_probs, trainer_log_probs(other, PROMPTS, ids, 2, 1.0)) < 1e-4
    name = "model.norm.weight"
    missing = {key: tensor for key, tensor in pushed.items() if key != name}
    misshapen = {**pushed, name: torch.ones(1)}
    too_many = {**pushed, "unknown": torch.ones(1)}
    for wrong in (missing, misshapen, too_many):
        with pytest.raises(ValueError):
            engine.push_weights(iter(wrong.items()))


def test_prompt_once_per_group_and_finished_rows_leave(tmp_path):
    engine = torch_engine(rollout_model(), tmp_path)
    shapes = []

    def note_shape(module, args, kwargs):
        shapes.append(tuple(kwargs["input_ids"].shape))

    engine.model.register_forward_pre_hook(note_shape, with_kwargs=True)
    request = dict(n=6, max_tokens=20, temperature=1.0, seeds=SEEDS)
    ids, _, _ = engine.generate(PROMPTS, **request)
    lengths = [len(answer) for answer in ids]
    assert shapes[0] == (5, 140)  # 5 prompts, not 30 answers
    assert shapes[1:] == [(sum(k > t for k in lengths), 1) for t in range(1, 20)]
    assert min(lengths) < 20
    engine.max_rows = 12
    shapes.clear()
    engine.generate(PROMPTS, **request)
    assert shapes[0] == (2, 2)  # the two shortest prompts first
    assert max(rows for rows, _ in shapes) <= 12


def test_bad_requests_and_engines(tmp_path, monkeypatch):
    engine = torch_engine(rollout_model(), tmp_path)
    good = dict(prompts=[[2]], n=1, max_tokens=4, temperature=1.0, seeds=[0])
    for bad in (dict(max_tokens=LIMIT), dict(temperature=0.0), dict(seeds=[]), dict(prompts=[[]])):
        request = {**good, **bad}
        with pytest.raises(ValueError):
            engine.generate(request.pop("prompts"), **request)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert rollout.resolve_engine("auto") == "torch"
    for args, words in (
        (("vllm",), "not installed"),
        (("sglang",), "unknown"),
        (("torch", 2), "rollout_tp"),
    ):
        with pytest.raises(ValueError, match=words):
            rollout.resolve_engine(*args)


def test_vllm_sleeps_and_wakes_in_order():
    """The order that vLLM documents for a colocated trainer, on a stand-in: on CPU vLLM cannot
    sleep."""
    engine = object.__new__(rollout.VllmEngine)
    engine.on_gpu = True
    engine.asleep = False
    engine.max_model_len = LIMIT
    engine.llm = Mock()
    engine.wake()  # awake at first
    engine.sleep()
    engine.sleep()  # no second call
    with pytest.raises(RuntimeError, match="push_weights"):
        engine.generate([[2]], n=1, max_tokens=1, temperature=1.0, seeds=[0])
    engine.wake()
    engine.push_weights(iter(()))
    assert [(call[0], call[2].get("tags")) for call in engine.llm.mock_calls] == [
        ("sleep", None),
        ("wake_up", ["weights"]),
        ("collective_rpc", None),
        ("wake_up", ["kv_cache"]),
        ("reset_prefix_cache", None),
    ]


def test_evaluation_by_hand(monkeypatch):
    """Two problems, two answers each: of the first both are wrong, of the second one is right."""

    def made(reward, log_probs, verdict="wrong"):
        return dict(
            reward=reward,
            verdict=verdict,
            log_probs=log_probs,
            response=[0] * len(log_probs),
            truncated=len(log_probs) == 4,
        )

    def sample_and_verify(engine, tokenizer, problems, prompts, seeds, **settings):
        assert (problems, prompts) == (["p", "q"], [[1], [2]])
        assert seeds == [2**60, 2**60 + 2]
        assert settings == dict(n=2, max_tokens=9, temperature=0.6)
        first = [made(0.0, [-1.0, -3.0], "timeout"), made(0.0, [-1.0, -1.0, -1.0, -1.0])]
        second = [made(1.0, [-0.5], "right"), made(0.0, [-4.0])]
        return [first, second]

    monkeypatch.setattr(rollout, "sample_and_verify", sample_and_verify)
    dist.init_process_group("gloo")
    cfg = types.SimpleNamespace(eval_samples=2, max_response_len=9, eval_temperature=0.6)
    sets = {"few": (["p", "q"], [[1], [2]])}
    ((name, found),) = rollout.evaluate(None, None, sets, cfg)
    confidence = [math.exp(-2), math.exp(-1), math.exp(-0.5), math.exp(-4)]
    expected = {
        "problems": 2,
        "pass@1": 0.25,
        "pass@2": 0.5,
        "len_mean": 2,
        "truncated_frac": 0.25,
        "entropy": (2 + 1 + 0.5 + 4) / 4,
        **verify.calibration(confidence, [0, 0, 1, 0]),
        "timeout": 1,
    }
    assert name == "few" and found == pytest.approx(expected)
    assert found["auroc"] == 1 and found["conf_right"] == confidence[2]


def test_ngram_diversity_by_hand():
    """Mean over n = 1 ... 4 of distinct / all. An n for which all answers are too short is left
    out."""
    three = [[1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6], [7, 8, 9]]
    assert math.isclose(rollout.ngram_diversity(three), (9 / 14 + 7 / 11 + 5 / 8 + 3 / 5) / 4)
    same = (1 / 6 + 1 / 5 + 1 / 4 + 1 / 3) / 4
    assert math.isclose(rollout.ngram_diversity([[5] * 6]), same)
    assert rollout.ngram_diversity([[1, 2, 3]]) == 1
    pairs = (1 / 2 + 2 / 3) / 2
    assert math.isclose(rollout.ngram_diversity([[1, 2, 1, 2]], longest=2), pairs)
    dist.init_process_group("gloo")
    responses = [[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4], [4, 3, 2, 1], [1], [2]]
    answers = [dict(response=r, reward=1.0, truncated=False) for r in responses]
    twice = 1 / 2  # the first group's answers are the same
    reversed_order = (1 / 2 + 1 + 1 + 1) / 4
    found = rollout.answer_metrics(answers, 2)["response/ngram_diversity"]
    assert found == (twice + reversed_order + 1) / 3


def test_data_order_is_a_fresh_permutation_each_epoch():
    order = [rollout.data_index(i, 7, seed=3) for i in range(21)]
    epochs = [order[0:7], order[7:14], order[14:21]]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1


# ---- real vLLM: one engine per process, so its checks run in processes of their own --------------


def vllm_rank(folder, tp):
    """What each process of test_vllm_under_torchrun does: this file, started by torchrun."""
    rollout.prepare_environment()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    world = dist.get_world_size()
    model = rollout_model()
    plain = rollout_model()
    if rank == 0:
        model.config.save_pretrained(folder)
    dist.barrier()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    before = rng_state()
    engine = rollout.make_engine(
        "vllm",
        folder,
        dtype=torch.float32,
        device="cpu",
        stop_ids=[EOS],
        max_model_len=LIMIT,
        tensor_parallel_size=tp,
    )
    assert rng_state() == before
    mine = slice(rank * len(PROMPTS) // world, (rank + 1) * len(PROMPTS) // world)
    everything = []
    for step in range(3):  # weights change between: stale ones would show
        plain.load_state_dict(dict(policy.full_tensors(model)))
        engine.wake()
        engine.push_weights(policy.full_tensors(model))
        for temperature in (1.0, 0.7):
            before = rng_state()
            request = dict(n=6, max_tokens=20, temperature=temperature, seeds=SEEDS[mine])
            ids, log_probs, truncated = engine.generate(PROMPTS[mine], **request)
            assert rng_state() == before
            expected = trainer_log_probs(plain, PROMPTS[mine], ids, 6, temperature)
            assert largest_difference(log_probs, expected) < 1e-4
            gathered = [None] * world
            dist.all_gather_object(gathered, (ids, truncated))
            ids = [answer for part in gathered for answer in part[0]]
            truncated = [is_cut for part in gathered for is_cut in part[1]]
            if step == 0:
                check_ends(ids, truncated, 20)
            everything.append(ids)
        if world == 1:  # answer j is drawn with seed + j, alone or not
            request = dict(n=1, max_tokens=20, temperature=0.7, seeds=[SEEDS[1] + 4])
            alone, _, _ = engine.generate(PROMPTS[1:2], **request)
            assert alone == [ids[6 + 4]]
        engine.sleep()
        batch = torch.tensor([PROMPTS[3]])
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert everything[0] != everything[2] != everything[4]
    if rank == 0:
        Path(folder, f"answers{world}{tp}.json").write_text(json.dumps(everything))
    engine.close()


@pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vllm is not installed: .ci/run installs it"
)
def test_vllm_under_torchrun(tmp_path):
    """World 1, two data-parallel FSDP2 ranks, two tensor-parallel ranks: the trainer's log-probs,
    and equal answers."""
    answers = []
    for world, tp in ((1, 1), (2, 1), (2, 2)):
        command = f"-m torch.distributed.run --standalone --nproc-per-node={world}".split()
        result = subprocess.run(
            [sys.executable, *command, __file__, str(tmp_path), str(tp)],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert result.returncode == 0, result.stderr[-4000:]
        answers.append(json.loads((tmp_path / f"answers{world}{tp}.json").read_text()))
    assert answers[0] == answers[1] == answers[2]


# ---- the law and the diagnosis of a run ----------------------------------------------------------


def falling(i):
    """An entropy that falls with step i."""
    return 0.6 - 0.005 * i


def made_up_run(entropy=falling, n=60, **other):
    """Metrics of n steps whose reward obeys R = -0.2 exp(H) + 0.5 exactly; pos_likely spends
    entropy, pos_rare adds some. other: metrics of every step."""
    shares = {"pos_likely": -0.5, "pos_rare": 0.2, "neg_likely": 0.1, "neg_rare": -0.2}
    rows = [{"step": 0, "eval/pass@1": 0.5 - 0.2 * math.exp(entropy(1))}]
    for i in range(1, n + 1):
        row = {
            "step": i,
            "entropy/response_mean": entropy(i),
            "reward/mean": 0.5 - 0.2 * math.exp(entropy(i)),
            "response/truncated_frac": 0.0,
            "reward/zero_std_frac": 0.5,
            "rollout/mismatch_mean": 1e-7,
        }
        for quadrant, share in shares.items():
            row[f"quadrant/{quadrant}_frac"] = 0.125
            row[f"quadrant/{quadrant}_dH_share"] = share
        row |= other
        if i % 20 == 0:
            row["eval/pass@1"] = 0.5 - 0.2 * math.exp(entropy(i + 1))
        rows.append(row)
    return rows


def as_lines(rows):
    """The text of a metrics file."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def made_up_folder(folder, method="grpo", rows=None):
    """A run's folder with these metrics and an unfinished last line."""
    folder.mkdir()
    text = as_lines(rows or made_up_run())
    (folder / "metrics.jsonl").write_text(text + '{"step": 9')
    (folder / "config.json").write_text(json.dumps({"method": method}))
    return folder


def test_the_law_is_recovered_exactly_and_foretold():
    H = np.linspace(1.2, 0.1, 40)
    R = 0.7 - 0.15 * np.exp(H)
    law = diagnose.fit_law(H, R)
    found = [law[name] for name in ("a", "b", "ceiling", "r2", "rmse")]
    assert np.allclose(found, [0.15, 0.7, 0.55, 1, 0])

    ahead = diagnose.law_forecast(H, R)
    assert ahead["points"] == 6
    found = [ahead[name] for name in ("ceiling", "rmse_rest", "error_last")]
    assert np.allclose(found, [0.55, 0, 0])

    bent = R + 0.03 * (np.arange(40) >= 6)  # only what was not fitted departs, by a constant
    ahead = diagnose.law_forecast(H, bent)
    assert np.allclose([ahead["rmse_rest"], ahead["error_last"]], 0.03)
    assert diagnose.fit_law(H, bent)["r2"] < 1


def test_the_law_under_noise():
    H = np.linspace(1.2, 0.1, 2000)
    noise = np.random.default_rng(0).normal(0, 0.05, 2000)
    R = 0.7 - 0.15 * np.exp(H) + noise
    law = diagnose.fit_law(H, R)
    assert abs(law["a"] - 0.15) < 0.01
    assert abs(law["ceiling"] - 0.55) < 0.02
    assert abs(law["rmse"] - 0.05) < 0.003
    assert abs(law["r2"] - (1 - 0.05**2 / np.var(R))) < 0.01


@pytest.mark.parametrize(
    "H, R, message",
    [
        ([0.5, 0.4], [0.1, 0.2], "at least 3 points, not 2"),
        ([0.5] * 4, [1, 2, 3, 4], "are equal"),
        ([1, 2, 3], [0, 0, 0], "are equal"),
    ],
)
def test_the_law_needs_something_to_fit(H, R, message):
    with pytest.raises(ValueError, match=message):
        diagnose.fit_law(H, R)
    with pytest.raises(ValueError, match="at least 3 points, not 2"):
        diagnose.law_forecast([3, 2, 1], [1, 2, 3], first=0.6)


def test_law_points_pair_an_evaluation_with_the_next_steps_entropy():
    rows = made_up_run(n=40)
    H, R = diagnose.law_points(rows, "eval/pass@1")
    # after step 40 there is no further entropy
    assert H == [rows[1]["entropy/response_mean"], rows[21]["entropy/response_mean"]]
    assert R == [rows[0]["eval/pass@1"], rows[20]["eval/pass@1"]]
    H, R = diagnose.law_points(rows, "reward/mean")
    assert H == [row["entropy/response_mean"] for row in rows[1:]]


def test_share_made_by_hand():
    fall = [12.0 - min(step, 6) for step in range(12)]  # six steps, a nat each
    assert diagnose.share_made(range(1, 13), fall, 1 / 12) == 1 / 6
    assert diagnose.share_made(range(1, 13), fall, 1 / 3) == 4 / 6
    assert diagnose.share_made(range(0, 24, 2), fall, 1 / 11) == 1 / 6
    assert diagnose.share_made(range(51, 63), fall, 1 / 12) == 1 / 6


def test_diagnosis_in_sentences():
    rows = made_up_run(**{"policy/selected_frac": 0.02})
    told = "\n".join(diagnose.diagnose(rows, "mine"))
    for part in (
        "mine: 60 steps; entropy fell from 0.595 to 0.312 nats per token, by 47 %",
        "twelfth of the steps made 9 %",
        "third 35 %",
        "Predicted: pos_likely",
        "took the most: -0.50",
        "by 12.5 % of the tokens",
        "neg_rare -0.20",
        "Net -0.40, the direction measured",
        "act on pos_likely: clip_cov, kl_cov",
        "chose 2.0 %",
        "reward/zero_std_frac: 50.0 %",
        "never over train.py's limit of 90.0 %",
        "reward/mean = -0.200 exp(H) +0.500",
        "R^2 1.00",
        "ceiling at H = 0: 0.300",
        "on the first 9 points",
    ):
        assert part in told, part
    assert "Not in these metrics" not in told
    assert told.count("no explanation") == 3


def test_diagnosis_of_a_rise_a_hold_and_of_what_may_explain_them():
    rising = made_up_run(lambda i: 0.3 + 0.01 * i)
    told = "\n".join(diagnose.diagnose(rising, "up"))
    assert "entropy rose from 0.310" in told
    assert "pos_rare, the rare tokens of right answers" in told
    assert "raised the most: +0.20" in told
    assert "against the direction measured" in told

    level = made_up_run(lambda i: 0.5 + 0.001 * (i % 2))
    told = "\n".join(diagnose.diagnose(level, "flat"))
    assert "entropy held: 0.501" in told
    assert "measured" not in told

    other = {
        "response/truncated_frac": 0.95,
        "reward/zero_std_frac": 0.91,
        "rollout/mismatch_mean": 0.2,
    }
    told = "\n".join(diagnose.diagnose(made_up_run(**other), "bad"))
    assert told.count("in 60 of 60 steps") == 3
    for limit in diagnose.SUSPICIOUS:
        if limit.metric in other:
            assert limit.advice in told


def test_diagnosis_names_what_is_missing_and_goes_on():
    wanted = [key for key in made_up_run()[20] if key != "step"]
    for gone in wanted:
        rows = made_up_run()
        for row in rows:
            row.pop(gone, None)
        told = diagnose.diagnose(rows, "x")
        assert told[-1] == f"Not in these metrics, so nothing is said of it: {gone}."
        assert len(told) > 4
    assert len(diagnose.diagnose([{"step": 1}], "x")) == 2
    for n in (1, 2, 3, 12, 13):  # unfinished runs
        assert f"x: {n} steps" in diagnose.diagnose(made_up_run(n=n), "x")[0]
    rows = made_up_run() + [{"step": 61, "reward/mean": math.nan}]
    told = diagnose.diagnose(rows, "x")
    assert "Not finite in some steps, which were left out: reward/mean." in told


def test_sentences_and_colours_name_methods_that_exist():
    """A new method need not be named, but what is named is a method."""
    named = set(diagnose.ACT_EVERYWHERE)
    for methods in diagnose.ACTS.values():
        named |= set(methods)
    assert named <= set(METHODS) - {"grpo"}
    papers = {"clip_cov", "kl_cov", "steer", "par", "w_reinforce", "entropy_bonus", "kl_loss"}
    assert papers <= named
    assert set(diagnose.ACTS) == set(diagnose.QUADRANTS)
    assert set(diagnose.COLOURS) <= set(METHODS)
    assert papers <= set(diagnose.COLOURS)
    assert len(set(diagnose.COLOURS.values())) == len(diagnose.COLOURS)


def test_diagnosis_of_a_method_that_is_not_listed(tmp_path, monkeypatch, capsys):
    folder = made_up_folder(tmp_path / "mine", method="brand_new")
    monkeypatch.setattr(sys, "argv", ["diagnose.py", str(folder)])
    diagnose.main()
    assert "mine: 60 steps" in capsys.readouterr().out
    assert (folder / "diagnosis.png").exists()
    colour, _ = diagnose.line_styles(["brand_new: mine"])["brand_new: mine"]
    assert colour == "tab:gray"


def test_diagnosis_command(tmp_path):
    made_up_folder(tmp_path / "a", "grpo")
    level = made_up_run(lambda i: 0.6, 30)
    made_up_folder(tmp_path / "b", "clip_cov", level)
    command = [sys.executable, "diagnose.py", str(tmp_path / "a"), str(tmp_path / "b")]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True)
    told = done.stdout
    assert "a: 60 steps" in told
    assert "b: 30 steps" in told
    assert "Entropy at step 30" in told
    assert "b 0.600, a 0.455" in told
    assert (tmp_path / "a" / "diagnosis.png").stat().st_size > 10_000


def test_each_run_is_told_once_and_by_a_name_of_its_own(tmp_path, monkeypatch, capsys):
    (tmp_path / "other").mkdir()
    one = made_up_folder(tmp_path / "run")
    other = made_up_folder(tmp_path / "other" / "run")
    monkeypatch.setattr(sys, "argv", ["diagnose.py", str(one), str(other), str(one)])
    diagnose.main()
    told = capsys.readouterr().out
    assert told.count(": 60 steps") == 2
    assert "run: 60 steps" in told
    assert f"\n{other}: 60 steps" in told


def poisoned(folder, *packages):
    """An environment in which the import of one of these packages ends the program at once."""
    folder.mkdir()
    for package in packages:
        (folder / f"{package}.py").write_text("import os\nos._exit(3)\n")
    return os.environ | {"PYTHONPATH": str(folder), "PYTHONUNBUFFERED": ""}


def test_it_begins_to_print_within_two_seconds_and_without_torch(tmp_path):
    run = made_up_folder(tmp_path / "run")
    env = poisoned(tmp_path / "poison", "torch", "transformers", "safetensors")
    command = [sys.executable, "diagnose.py", str(run)]
    start = time.perf_counter()
    with subprocess.Popen(command, cwd=HERE, env=env, stdout=subprocess.PIPE, text=True) as process:
        first_line = process.stdout.readline()
        seconds = time.perf_counter() - start
        process.stdout.read()
    assert first_line.startswith("run: 60 steps")
    assert seconds < 2
    assert process.returncode == 0
    assert (run / "diagnosis.png").exists()


def test_sentences_come_before_the_figure(tmp_path):
    run = made_up_folder(tmp_path / "run")
    env = poisoned(tmp_path / "poison", "matplotlib")
    command = [sys.executable, "diagnose.py", str(run)]
    done = subprocess.run(command, cwd=HERE, env=env, capture_output=True, text=True)
    assert done.returncode == 3
    assert done.stdout.startswith("run: 60 steps")


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "no metrics to read"),
        ("", "are empty"),
        ("hello\n", "JSON object per line"),
        ("[1]\n", "only numbers"),
        ('{"step": 1, "set": "x"}\n', "only numbers"),
        ('{"reward/mean": 1}\n', "a step"),
    ],
)
def test_diagnosis_of_no_metrics_is_one_line_and_exit_code_2(
    text, message, tmp_path, monkeypatch, capsys
):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    monkeypatch.setattr(sys, "argv", ["diagnose.py", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        diagnose.main()
    told = capsys.readouterr().err
    assert end.value.code == 2
    assert message in told
    assert told.count("\n") == 1


def test_curves_have_a_band_over_seeds_and_a_fixed_colour_per_method(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, "close", lambda figure: None)
    seeds = []
    for first, n in ((0.1, 5), (0.3, 4)):
        seeds.append([{"step": i, "reward/mean": first + 0.1 * i} for i in range(n)])
    runs = {"kl_cov-seed0": seeds, "kl_cov: other": seeds[:1], "mine": seeds[:1]}
    diagnose.plot_curves(runs, tmp_path / "x.png", {"reward/mean": "R"})
    (axis,) = plt.gcf().axes
    mean, other, mine = axis.get_lines()
    assert np.allclose(mean.get_ydata(), [0.2, 0.3, 0.4, 0.5])  # at the steps that both seeds have
    low, high = axis.collections[0].get_datalim(axis.transData).intervaly
    assert np.allclose([low, high], [0.1, 0.6])
    assert mean.get_color() == diagnose.COLOURS["kl_cov"]
    assert mean.get_color() == other.get_color()
    assert mean.get_color() != mine.get_color()
    assert mean.get_linestyle() != other.get_linestyle()


# ---- reading metrics -----------------------------------------------------------------------------


def test_old_names_of_metrics_are_read(tmp_path):
    rows = made_up_run()
    old = []
    for row in rows:
        renamed = dict(row)
        if "rollout/mismatch_mean" in row:
            renamed["rollout/gap_mean"] = renamed.pop("rollout/mismatch_mean")
            renamed["rollout/gap_max"] = 0.25
        old.append(renamed)
    (tmp_path / "old.jsonl").write_text(as_lines(old))
    read = diagnose.read_metrics(tmp_path / "old.jsonl")
    assert read[1]["rollout/mismatch_max"] == 0.25
    assert diagnose.diagnose(read, "x") == diagnose.diagnose(rows, "x")
    assert not any("gap_" in key for row in read for key in row if key.startswith("rollout/"))


def test_a_folder_a_file_and_a_compressed_file_read_alike(tmp_path):
    rows = made_up_run()
    folder = made_up_folder(tmp_path / "mine")
    (tmp_path / "plain.jsonl").write_text(as_lines(rows))
    with gzip.open(tmp_path / "packed.jsonl.gz", "wt") as file:
        file.write(as_lines(rows))
    assert diagnose.read_runs(folder) == {"mine": rows}
    assert diagnose.read_runs(folder / "metrics.jsonl") == {"mine": rows}
    assert diagnose.read_runs(tmp_path / "plain.jsonl") == {"plain": rows}
    assert diagnose.read_runs(tmp_path / "packed.jsonl.gz") == {"packed": rows}
    assert diagnose.read_metrics(folder) == rows
    assert diagnose.read_metrics(tmp_path / "packed.jsonl.gz") == rows


@pytest.fixture
def several_runs(tmp_path):
    """A compressed file of two runs whose rows alternate."""
    falls = made_up_run(n=30)
    rises = made_up_run(lambda i: 0.3 + 0.01 * i, n=30)
    with gzip.open(tmp_path / "runs.jsonl.gz", "wt") as file:
        for one, other in zip(falls, rises):
            file.write(as_lines([{"run": "falls", **one}, {"run": "clip_cov-0.02", **other}]))
    return tmp_path / "runs.jsonl.gz", {"falls": falls, "clip_cov-0.02": rises}


def test_one_file_holds_several_runs(several_runs, monkeypatch, capsys):
    file, runs = several_runs
    assert diagnose.read_runs(file) == runs
    assert diagnose.read_metrics(f"{file}:clip_cov-0.02") == runs["clip_cov-0.02"]
    with pytest.raises(ValueError, match="several runs.*falls, clip_cov-0.02"):
        diagnose.read_metrics(file)
    with pytest.raises(ValueError, match="no run nothing.*falls, clip_cov-0.02"):
        diagnose.read_metrics(f"{file}:nothing")

    names = [f"{file}:clip_cov-0.02", f"{file}:falls"]
    monkeypatch.setattr(sys, "argv", ["diagnose.py", *names])
    diagnose.main()
    told = capsys.readouterr().out
    assert "clip_cov-0.02: 30 steps; entropy rose" in told
    assert "falls: 30 steps; entropy fell" in told
    assert "Entropy at step 30" in told
    assert (file.parent / "diagnosis.png").exists()


@pytest.mark.parametrize("damage", [lambda whole: whole[:-20], lambda whole: b"hello"])
def test_a_damaged_compressed_file_is_one_line_and_exit_code_2(
    damage, several_runs, monkeypatch, capsys
):
    file, _ = several_runs
    file.write_bytes(damage(file.read_bytes()))
    monkeypatch.setattr(sys, "argv", ["diagnose.py", f"{file}:falls"])
    with pytest.raises(SystemExit) as end:
        diagnose.main()
    told = capsys.readouterr().err
    assert end.value.code == 2
    assert "not a gzip file" in told
    assert told.count("\n") == 1


# ---- the legend ----------------------------------------------------------------------------------


def test_the_legend_explains_every_metric_in_a_sentence():
    for entry, (unit, meaning) in diagnose.METRICS.items():
        assert unit, entry
        assert meaning.endswith("."), entry
        assert "  " not in meaning, entry


@pytest.mark.parametrize(
    "key, entry",
    [
        ("reward/mean", "reward/mean"),
        ("eval/pass@16", "eval/pass@K"),
        ("eval/entropy", "eval/entropy"),
        ("eval/no-way-2/pass@16", "eval/SET/METRIC"),
        ("policy/cov_mean", "policy/cov_mean"),
        ("policy/cov_top_0.0002", "policy/cov_top_F"),
        ("policy/cov_top_1e-05", "policy/cov_top_F"),
        ("quadrant/pos_rare_dH_share", "quadrant/Q_dH_share"),
        ("quadrant/neg_likely_frac", "quadrant/Q_frac"),
        ("controller/positive_weight", "controller/NAME"),
        ("rollout/gap_max", "rollout/mismatch_max"),
        ("eval/pass@K", "eval/pass@K"),
    ],
)
def test_a_logged_metric_finds_its_entry(key, entry):
    unit, meaning = diagnose.METRICS[entry]
    assert diagnose.explain(key) == (entry, unit, meaning)


@pytest.mark.parametrize(
    "key",
    ["reward", "reward/mean_of_two", "eval/pass@x", "quadrant/all_frac", "policy/cov_top_"],
)
def test_an_unknown_metric_has_no_entry(key, monkeypatch, capsys):
    with pytest.raises(ValueError, match="--legend lists them all"):
        diagnose.explain(key)
    monkeypatch.setattr(sys, "argv", ["diagnose.py", "--legend", key])
    with pytest.raises(SystemExit) as end:
        diagnose.main()
    told = capsys.readouterr().err
    assert end.value.code == 2
    assert told.startswith(key)
    assert told.count("\n") == 1


def test_legend_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["diagnose.py", "--legend"])
    diagnose.main()
    told = capsys.readouterr().out
    for entry, (unit, _) in diagnose.METRICS.items():
        assert f"{entry} [{unit}]\n" in told
    assert max(len(line) for line in told.splitlines()) <= 100

    monkeypatch.setattr(sys, "argv", ["diagnose.py", "--legend", "quadrant/pos_rare_dH_share"])
    diagnose.main()
    told = capsys.readouterr().out
    assert told.startswith("quadrant/pos_rare_dH_share [fraction")
    assert told.count("[") == 1
    _, meaning = diagnose.METRICS["quadrant/Q_dH_share"]
    assert " ".join(told.split()).endswith(meaning)


def test_neither_runs_nor_legend_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["diagnose.py"])
    with pytest.raises(SystemExit) as end:
        diagnose.main()
    assert end.value.code == 2
    assert "runs" in capsys.readouterr().err


def rows_of_toy_runs(toy, folder):
    """Rows of runs that, together, log every metric: of methods with metrics of their own, of two
    test sets, and of a model that learns until some prompts are easy."""

    rows = []
    for method in ("clip_cov", "steer", "kl_loss", "siren"):
        rows += toy_run(toy, folder, method, "--method", method)
    digits = f"{toy}/digits.jsonl"
    rows += toy_run(toy, folder, "two", "--steps", "0", "--eval_data", digits, digits)
    learns = ("--steps", "12", "--prompts_per_step", "64", "--lr", "3e-3", "--eval_data", "none")
    rows += toy_run(toy, folder, "learns", *learns)
    return rows


@pytest.mark.slow
def test_every_logged_metric_has_an_entry_and_every_entry_a_metric(toy, tmp_path):
    rows = rows_of_toy_runs(toy, tmp_path)
    logged = {key for row in rows for key in row}
    entries = {diagnose.explain(key)[0] for key in logged}  # ValueError if a metric has none
    on_gpus = {entry for entry in diagnose.METRICS if entry.startswith("memory/")}
    assert entries == set(diagnose.METRICS) - on_gpus


# ---- whole runs of a toy model that learns to repeat a digit -------------------------------------


def random_model(kind="qwen2", vocab_size=32, hidden=32):
    torch.manual_seed(0)
    common = dict(vocab_size=vocab_size, bos_token_id=None, eos_token_id=1, pad_token_id=0)
    if kind == "gpt2":
        config = GPT2Config(n_embd=hidden, n_layer=2, n_head=2, n_positions=64, **common)
    else:
        config = Qwen2Config(
            hidden_size=hidden,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            **common,
        )
    return AutoModelForCausalLM.from_config(config).eval()


def countdown_row(prompt, numbers, target):
    """A line of a JSONL file in verl's schema."""
    row = {
        "prompt": [{"role": "user", "content": prompt}],
        "reward_model": {"ground_truth": {"numbers": numbers, "target": target}},
    }
    return json.dumps(row) + "\n"


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A model that answers the prompt "7" with some digit, and problems whose answer is that
    digit."""
    folder = tmp_path_factory.mktemp("toy")
    tokenizer = tiny.make_tokenizer()
    model = random_model("gpt2", vocab_size=len(tokenizer)).train()
    digits = torch.tensor([tokenizer(str(d))["input_ids"][0] for d in range(1, 9)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(100):
        prompt = digits[torch.randint(8, (64,))]
        answer = digits[torch.randint(8, (64,))]
        ids = torch.stack([prompt, answer, torch.full_like(prompt, tokenizer.eos_token_id)], 1)
        labels = torch.where(torch.arange(3) < 1, -100, ids)
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [countdown_row(f"{d}", [d], d) for d in range(1, 9)]
    (folder / "digits.jsonl").write_text("".join(rows))
    return folder


def toy_args(toy, out, name, *more):
    """Words of a command line. Each of `more` is one word, or several if it begins with --. The
    problems are the toy's digits, unless `more` names others."""
    later = []
    for text in more:
        later += text.split() if text.startswith("--") else [text]
    words = []
    for flag in ("--data", "--eval_data"):
        words += [] if flag in later else [flag, f"{toy}/digits.jsonl"]
    words += (
        f"--model {toy}/model --out {out} --name {name} --engine torch"
        " --prompts_per_step 8 --group_size 4 --updates_per_rollout 2 --steps 2 --lr 1e-3"
        " --max_prompt_len 8 --max_response_len 4 --eval_every 2 --eval_samples 4 --save_every 2"
    ).split()
    return words + later


def toy_run(toy, out, name, *more):
    """train.main in this process; returns the rows of its metrics."""
    train.main(toy_args(toy, out, name, *more))
    return read_metrics(Path(out) / name)


def recorded(folder, step=1, rank=0):
    """The answers that a rank wrote with --record_step."""
    lines = (folder / f"step-{step}-rank-{rank}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def dealt(ranks, updates, is_run):
    """Which answers of a step each rank learns from, of those that the ranks have recorded: a list
    of (rank, row) for each rank, update after update. is_run(rank, row): the updates run it."""

    def cost(where):
        answer = ranks[where[0]][where[1]]
        return is_run(*where), len(answer["prompt"]) + len(answer["response"])

    hands = [[] for _ in ranks]
    snake = [*hands, *reversed(hands)]
    of_rank = len(ranks[0])
    share = of_rank // updates
    for start in range(0, of_rank, share):
        rows = range(start, start + share)
        cards = [(rank, row) for rank in range(len(ranks)) for row in rows]
        if len(ranks) > 1:
            cards.sort(key=cost, reverse=True)
        for i, card in enumerate(cards):
            snake[i % len(snake)].append(card)
    return hands


@pytest.fixture
def no_figures(monkeypatch):
    """To draw the curves takes longer than the rest of such a run."""
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda *_, **__: None)


def without_times(rows):
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def free_port():
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def launcher(ranks):
    """The words before train.py that start so many ranks."""
    if ranks == 1:
        return [sys.executable]
    torchrun = f"-m torch.distributed.run --nproc-per-node {ranks} --master-port {free_port()}"
    return [sys.executable, *torchrun.split()]


def environment():
    """This process' environment without what torchrun sets."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in ours}


def torchrun(ranks, args, timeout=120):
    return subprocess.run(
        [*launcher(ranks), "train.py", *args],
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment(),
    )


@pytest.fixture(autouse=True)
def no_process_group_left():
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def saved(folder):
    """Names of the checkpoints of a run, oldest first."""
    return [path.name for path in checkpoints(folder)]


def weights(folder):
    path = checkpoints(folder)[-1]
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()


def complaint_of(toy, out, name, capsys, *more):
    """The last line that train.py writes to stderr before it refuses to run."""
    with pytest.raises(SystemExit):
        train.main(toy_args(toy, out, name, *more))
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.slow
def test_learns_and_spends_entropy(toy, tmp_path):
    sizes = "--steps 60 --lr 3e-3 --prompts_per_step 32 --group_size 8"
    rows = toy_run(toy, tmp_path, "learns", sizes, "--eval_every 60 --save_every 60")
    assert rows[1]["reward/mean"] < 0.2 and rows[-1]["reward/mean"] > 0.5
    assert rows[-1]["eval/pass@1"] > rows[0]["eval/pass@1"] + 0.3
    assert rows[-1]["entropy/response_mean"] < rows[1]["entropy/response_mean"] - 0.4
    assert [row["step"] for row in rows] == list(range(61))
    assert rows[1]["rollout/mismatch_max"] < 1e-4  # sampler and trainer agree
    assert (tmp_path / "learns" / "curves.png").stat().st_size > 10_000
    tokenizer = AutoTokenizer.from_pretrained(checkpoints(tmp_path / "learns")[-1])
    assert tokenizer("7*")["input_ids"] == [tiny.VOCAB["7"], tiny.VOCAB["*"]]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["grpo", *CONTROLLERS])
def test_resume_is_bit_for_bit(method, toy, tmp_path, monkeypatch):
    """A run is interrupted in step 3, after its updates. With the checkpoint of step 2 and --resume
    it ends as the undisturbed run does."""
    args = f"--method {method} --dynamic_sampling --steps 4 --eval_every 1 --save_every 1"
    whole = toy_run(toy, tmp_path, "whole", args)
    write = record.RunLog.write

    def interrupted(log, row):
        if row["step"] == 3:
            raise KeyboardInterrupt
        write(log, row)

    with monkeypatch.context() as patch:
        patch.setattr(record.RunLog, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            toy_run(toy, tmp_path, "parts", args)
    dist.destroy_process_group()
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as file:
        # A row of after the checkpoint is not kept.
        file.write(json.dumps({"step": 3, "reward/mean": 99.0}) + "\n")
    parts = toy_run(toy, tmp_path, "parts", args, "--resume")
    assert without_times(parts) == without_times(whole)
    expected = weights(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "parts").items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_read_in_the_dtype_of_their_file(parallel, dtype, tmp_path):
    """So that ranks share the mapped file; the master weights are the file's, in float32, whatever
    config.json says of the dtype."""
    model = rollout_model().to(dtype)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["dtype"] = "float32" if dtype == torch.bfloat16 else "bfloat16"
    (tmp_path / "config.json").write_text(json.dumps(config))
    cfg = train.parse(["--parallel", parallel, "--out", str(tmp_path)])
    cpu = torch.device("cpu")
    dist.init_process_group("gloo")
    loaded = policy.build_policy(tmp_path, cfg, cpu, torch.float32)
    found = dict(policy.full_tensors(loaded.model))
    cfg.steps = 0
    mapped = policy.build_policy(tmp_path, cfg, cpu, torch.float32)
    dist.destroy_process_group()
    for name, tensor in model.state_dict().items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], tensor.float())
    assert {parameter.dtype for parameter in mapped.parameters()} == {dtype}


@pytest.mark.slow
def test_a_finished_run_goes_on_as_the_longer_run(toy, tmp_path):
    args = "--eval_every 1 --save_every 1"
    whole = toy_run(toy, tmp_path, "whole", args, "--steps 4")
    toy_run(toy, tmp_path, "parts", args, "--steps 2")
    parts = toy_run(toy, tmp_path, "parts", args, "--steps 4", "--resume")
    assert without_times(parts) == without_times(whole)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_update_sees_a_ratio_of_exactly_one(dtype, toy, tmp_path):
    """Else KL-Cov's sign(log r) would act on rounding errors, and a clip of 3e-4 on bfloat16's."""
    args = f"--updates_per_rollout 1 --steps 1 --micro_batch_tokens 40 --dtype {dtype}"
    row = toy_run(toy, tmp_path, "one", args)[1]
    assert row["policy/kl_to_rollout"] == 0.0 and row["train/grad_norm"] > 0


def test_micro_batches_give_the_same_run(toy, tmp_path):
    one = toy_run(toy, tmp_path, "one", "--micro_batch_tokens 10000")
    many = toy_run(toy, tmp_path, "many", "--micro_batch_tokens 9")
    for a, b in zip(one[1:], many[1:]):
        assert math.isclose(a["train/grad_norm"], b["train/grad_norm"], rel_tol=1e-5)
        assert math.isclose(a["train/loss"], b["train/loss"], rel_tol=1e-5, abs_tol=1e-6)


@pytest.mark.slow
def test_two_ranks_equal_one_and_fsdp_equals_ddp(toy, tmp_path):
    few = "--eval_prompts 1"  # of two ranks, one has nothing to evaluate
    toy_run(toy, tmp_path, "one", few)
    one = read_metrics(tmp_path / "one")
    # Covariances are per rank; the mismatch is rounding.
    may_differ = ("time/", "policy/cov", "rollout/mismatch")
    for parallel in ("ddp", "fsdp"):
        args = toy_args(toy, tmp_path, parallel, f"--parallel {parallel}", few)
        result = torchrun(2, args)
        assert result.returncode == 0, result.stderr
        two = read_metrics(tmp_path / parallel)
        assert [row.keys() for row in one] == [row.keys() for row in two]
        for a, b in zip(one, two):
            # The second step's weights differ by what AdamW made of rounding: see below.
            tolerance = 1e-5 if a["step"] < 2 else 5e-5
            for key in a:
                if not key.startswith(may_differ):
                    assert math.isclose(a[key], b[key], rel_tol=tolerance, abs_tol=1e-6), key
        # AdamW scales gradients that are rounding only (k_proj.bias) to the size of real ones.
        of_two = weights(tmp_path / parallel)
        close = [
            torch.isclose(tensor, of_two[name], rtol=0, atol=1e-6).flatten()
            for name, tensor in weights(tmp_path / "one").items()
        ]
        assert torch.cat(close).float().mean() > 0.99
    args = toy_args(toy, tmp_path, "fsdp", "--parallel fsdp --steps 3 --resume", few)
    result = torchrun(2, args)
    assert result.returncode == 0, result.stderr
    assert read_metrics(tmp_path / "fsdp")[-1]["step"] == 3


@pytest.mark.parametrize("method", ["grpo", "gspo"])
def test_a_step_without_any_gradient(method, toy, tmp_path, monkeypatch):
    """No answer is right, so all advantages are 0: an update runs one answer, for AdamW's step."""

    def never(response, gold):
        return "wrong"

    monkeypatch.setitem(verify.RULES, "never", never)
    args = f"--method {method} --rule never --eval_data none --steps 1"
    (row,) = toy_run(toy, tmp_path, "never", args)
    assert row["reward/mean"] == 0 and row["time/left_out_frac"] == 1 - 2 / 32
    assert row["train/loss"] == row["train/grad_norm"] == row["policy/kl_to_rollout"] == 0
    assert row["train/skipped"] == 0 and abs(row["entropy/change_measured"]) < 1e-6


# What every rank runs: an update on its half of 24 answers, of which the named ones have
# advantage 0. A list of (update's metrics, its whole gradient) goes to a file.
TWO_RANKS = """
import sys, time, types
import torch, torch.distributed as dist
import losses, policy, test_all, train

class Kept:
    def step(self):
        named = scorer.named_parameters()
        self.grads = {name: policy.whole_tensor(p.grad).clone() for name, p in named}
    def zero_grad(self):
        scorer.zero_grad()

parallel, method, folder = sys.argv[1:]
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
model = test_all.random_model()
scorer = policy.Policy(model, 1.0).eval()
if parallel == "fsdp":
    policy.shard(scorer, policy.decoder_layers(model), torch.device("cpu"), torch.float32)
cfg = types.SimpleNamespace(
    parallel=parallel, method=method, tis_cap=0.0, grad_clip=1e9, steps=1, group_size=4
)
called = train.wrap_ddp(scorer, cfg)
found = []
for name, flat in test_all.FLAT.items():
    g = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 9, (24,), generator=g).tolist()
    pairs = [([3, 4], torch.randint(2, 20, (n,), generator=g).tolist()) for n in lengths]
    advantages = torch.randn(24, generator=g)
    advantages[list(flat)] = 0.0
    mine = slice(rank * 24 // world, (rank + 1) * 24 // world)
    batch = test_all.batch_of(pairs[mine])
    batch["advantages"] = advantages[mine, None] * batch["response_mask"]
    batch["loss_mask"] = batch["response_mask"]
    batch["to_run"] = advantages[mine] != 0 if world == 2 else torch.ones(24, dtype=torch.bool)
    split = policy.split_batch(batch, 20 if world == 2 else 1000, 1)
    old = policy.batch_statistics(called, batch, ["log_probs"], split.all_micro_batches())
    tensors = {"advantages": batch["advantages"], "old_log_probs": old["log_probs"]}
    kept = Kept()
    metrics = train.update(
        called, kept, batch, tensors, split.rows[0], split.micro_batches[0], {}, cfg
    )
    seen = torch.tensor([len(split.micro_batches[0]), sum(map(len, split.micro_batches[0]))])
    everyone = [torch.zeros_like(seen) for _ in range(world)]
    dist.all_gather(everyone, seen)
    found.append((metrics, kept.grads, torch.stack(everyone).tolist()))
if rank == 0:
    torch.save(found, folder)
del called  # as in train.main
dist.destroy_process_group()
time.sleep(0.3)  # as in train.start_process_group
"""
FLAT = {
    "unevenly spread": [0, 1, 2, 3, 4, 5, 6, 7, 13],
    "all of one rank": range(12, 24),
    "all": range(24),
    "none": [],
}


@pytest.mark.slow
@pytest.mark.parametrize("parallel, method", [("ddp", "grpo"), ("fsdp", "grpo"), ("fsdp", "gspo")])
def test_two_ranks_that_leave_answers_out_have_the_gradient_of_all(parallel, method, tmp_path):
    """Against one rank that runs every answer; ratios are exactly 1."""
    results = []
    for ranks in (1, 2):
        file = tmp_path / f"{ranks}.pt"
        (tmp_path / "update.py").write_text(TWO_RANKS)
        kind = "ddp" if ranks == 1 else parallel
        result = subprocess.run(
            [*launcher(ranks), str(tmp_path / "update.py"), kind, method, str(file)],
            cwd=HERE,
            capture_output=True,
            text=True,
            timeout=120,
            env=environment() | {"PYTHONPATH": str(HERE)},
        )
        assert result.returncode == 0, result.stderr
        results.append(torch.load(file))
    for name, one, two in zip(FLAT, *results):
        (metrics, gradient, _), (metrics_of_two, gradient_of_two, run) = one, two
        assert metrics_of_two["policy/kl_to_rollout"] == 0
        assert metrics_of_two["train/loss"] == pytest.approx(metrics["train/loss"], abs=1e-6)
        for key, expected in gradient.items():
            assert torch.allclose(gradient_of_two[key], expected, rtol=1e-5, atol=1e-6), (name, key)
        (lists, rows), (other_lists, other_rows) = run
        assert lists == other_lists > 0
        # No rank runs more than what teaches, but for fillers.
        teaching = [12 - sum(row // 12 == rank for row in FLAT[name]) for rank in (0, 1)]
        assert [rows, other_rows] == [max(n, lists) for n in teaching]
        assert (metrics["train/grad_norm"] == 0) == (name == "all")


def test_dealing_over_ranks(monkeypatch):
    """Two updates of two ranks: the longest first in a snake, those of advantage 0 last. An
    update's answers stay in it, and each comes out once, with its place and its advantage."""
    g = random.Random(0)
    ranks = []
    for rank in range(2):
        answers = []
        for i in range(8):
            response = [g.randrange(2, 20) for _ in range(g.randrange(1, 40))]
            log_probs = [-g.random() for _ in response]
            answer = dict(prompt=[3, 4], response=response, log_probs=log_probs, text="not sent")
            answers.append(answer | dict(reward=float(i % 2), group_accuracy=0.5))
        ranks.append(answers)
    advantages = [torch.tensor([0.5, -0.5, 0, 0, 1, -1, 0, 0.25]), torch.tensor([0.0] * 6 + [1, 2])]
    learned = [A != 0 for A in advantages]
    sent = {}

    def all_gather_object(of_ranks, mine):
        sent[rank] = mine
        if len(sent) < 2:
            raise BlockingIOError("the other rank is not here yet")
        of_ranks[:] = sent[0], sent[1]

    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    monkeypatch.setattr(dist, "all_gather_object", all_gather_object)
    hands = dealt(ranks, 2, lambda rank, i: bool(learned[rank][i]))
    rank = 0
    with pytest.raises(BlockingIOError):
        rollout.deal_over_ranks(ranks[0], advantages[0], learned[0], 2)
    for rank in (1, 0):
        got, A, place = rollout.deal_over_ranks(ranks[rank], advantages[rank], learned[rank], 2)
        assert [divmod(i, 8) for i in place.tolist()] == hands[rank]
        for answer, value, (of_rank, i) in zip(got, A.tolist(), hands[rank]):
            assert value == advantages[of_rank][i]
            assert answer["response"].tolist() == ranks[of_rank][i]["response"]
            expected = torch.tensor(ranks[of_rank][i]["log_probs"])
            assert torch.equal(torch.as_tensor(answer["log_probs"]), expected)
        as_lists = rollout.collate([ranks[r][i] for r, i in hands[rank]], A, "cpu")
        as_arrays = rollout.collate(got, A, "cpu")
        assert all(torch.equal(as_arrays[name], as_lists[name]) for name in as_lists)
    assert sorted(hands[0] + hands[1]) == [(r, i) for r in range(2) for i in range(8)]


@pytest.mark.slow
def test_steps_0_evaluates_a_folder(toy, tmp_path, capsys):
    """Two sets, one of three rows that are one problem without a right answer; one rank and two."""
    (tmp_path / "no way.jsonl").write_text(countdown_row("7", [13, 13], 7) * 3)
    args = (
        "--steps 0 --eval_samples 32 --eval_temperature 0.6",
        "--data nowhere.jsonl --prompts_per_step 7",  # neither is looked at
        "--eval_data",
        f"{toy}/digits.jsonl",
        f"{tmp_path}/no way.jsonl",
    )
    (row,) = toy_run(toy, tmp_path, "one", *args)
    out, err = capsys.readouterr()
    assert "the first prompt:\n1\n" in out and "warning" not in err.lower()
    marks = ("avg@32", "digits ", "no-way ")
    lines = [line.split() for line in out.splitlines() if any(mark in line for mark in marks)]
    head = "set problems avg@32 pass@2 pass@4 pass@8 pass@16 pass@32 len truncated entropy"
    assert lines[0] == [*head.split(), "AUROC", "ECE"]
    assert [line[:2] for line in lines[1:]] == [["digits", "8"], ["no-way", "1"]]
    assert lines[2][-2] == "-"
    written = ["config.json", "eval-digits.json", "eval-no-way.json", "metrics.jsonl"]
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == written
    files = {}
    for name in ("digits", "no-way"):
        files[name] = json.loads((tmp_path / "one" / f"eval-{name}.json").read_text())
        metrics = {f"eval/{name}/{key}": files[name][key] for key in list(files[name])[8:]}
        assert metrics.items() <= row.items()
    digits = files["digits"]
    assert digits["model"] == f"{toy}/model"
    assert digits["samples"] == 32 and digits["temperature"] == 0.6
    assert 0 < row["eval/pass@1"] == digits["pass@1"] / 2
    assert row["eval/problems"] == 9
    assert "eval/digits/auroc" in row
    assert not {"eval/auroc", "eval/no-way/auroc", "eval/conf_right"} & set(row)
    result = torchrun(2, toy_args(toy, tmp_path, "two", *args))
    assert result.returncode == 0 and result.stdout.count("the first prompt:") == 1, result.stderr
    (two,) = read_metrics(tmp_path / "two")
    assert two == pytest.approx(row, rel=1e-5, abs=1e-6) and list(two) == list(row)


def test_training_evaluates_as_steps_0_does(toy, tmp_path, capsys):
    """The last evaluation of a run is that of its last checkpoint. With one set there are no keys
    of sets."""
    trained = toy_run(toy, tmp_path, "trained", "--eval_temperature 0.8")[-1]
    assert capsys.readouterr().out.count("the first prompt:") == 1
    evaluate = f"--eval_temperature 0.8 --steps 0 --model {tmp_path}/trained/checkpoint-2"
    (again,) = toy_run(toy, tmp_path, "again", evaluate)
    expected = {key: value for key, value in trained.items() if key.startswith("eval/")}
    assert again == pytest.approx(expected | {"step": 0}, rel=1e-5)
    (last,) = (tmp_path / "trained").glob("eval-*")
    assert last.name == "eval-digits.json" and json.loads(last.read_text())["step"] == 2
    assert "eval/entropy" in again and not any("digits" in key for key in again)


def test_an_evaluation_file_is_whole_or_absent(tmp_path, monkeypatch):
    def half(path, text):
        path.open("w").write(text[:1])
        raise OSError("the disk is full")

    record.write_whole(tmp_path / "eval-a.b.json", "old")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", half)
        with pytest.raises(OSError, match="the disk is full"):
            record.write_whole(tmp_path / "eval-a.b.json", "new")
    assert (tmp_path / "eval-a.b.json").read_text() == "old"


def test_activation_checkpointing_changes_no_number(toy, tmp_path):
    plain = toy_run(toy, tmp_path, "plain")
    recomputed = toy_run(toy, tmp_path, "recomputed", "--activation_checkpointing")
    assert without_times(plain) == without_times(recomputed)


def test_dynamic_sampling_replaces_flat_groups(toy, tmp_path):
    plain = toy_run(toy, tmp_path, "plain", "--steps 1")
    dynamic = toy_run(toy, tmp_path, "dynamic", "--steps 1 --dynamic_sampling")
    assert dynamic[1]["reward/zero_std_frac"] == 0 < plain[1]["reward/zero_std_frac"]


def test_tis_cap_scales_the_gradient(toy, tmp_path):
    plain = toy_run(toy, tmp_path, "plain", "--steps 1")[1]
    # Engine and trainer agree, so every weight is 0.5.
    halved = toy_run(toy, tmp_path, "halved", "--steps 1 --tis_cap 0.5")[1]
    assert math.isclose(halved["train/loss"], plain["train/loss"], rel_tol=0.1, abs_tol=1e-3)
    assert halved["train/grad_norm"] < 0.6 * plain["train/grad_norm"]


def test_updates_that_are_not_finite_are_skipped_counted_and_end_the_run(
    toy, tmp_path, monkeypatch
):
    grpo = METHODS["grpo"]
    calls = []

    def sometimes_nan(*args, **kwargs):
        calls.append(1)
        loss, metrics = grpo(*args, **kwargs)
        return (loss * math.nan if len(calls) in (1, 2) else loss), metrics

    def always_nan(*args, **kwargs):
        loss, _ = grpo(*args, **kwargs)
        return loss * math.nan, {}

    monkeypatch.setattr(train, "parse_knobs", lambda *_: ({}, {}, {}))
    monkeypatch.setitem(METHODS, "grpo", sometimes_nan)
    rows = toy_run(toy, tmp_path, "sometimes")
    assert [row["train/skipped"] for row in rows[1:]] == [2, 0]
    assert math.isfinite(rows[2]["train/loss"])
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "sometimes").values())
    monkeypatch.setitem(METHODS, "grpo", always_nan)
    with pytest.raises(SystemExit, match="ten updates in a row"):
        toy_run(toy, tmp_path, "always", "--steps 20")


def test_a_new_method_is_one_function_and_its_name(toy, tmp_path, monkeypatch, capsys):
    """The method of the README's recipe: it trains, its knob and tensor reach it, and the diagnosis
    and the figures take its run."""
    recipe = (HERE / "README.md").read_text().split("**A further method**")[1].split("```")[1]
    names = vars(losses) | {"METHODS": {}}
    exec(recipe.removeprefix("python\n"), names)
    monkeypatch.setitem(METHODS, "mine", names["mine"])
    plain = toy_run(toy, tmp_path, "plain")
    same = toy_run(toy, tmp_path, "same", "--method mine --knobs strength=0")
    strong = toy_run(toy, tmp_path, "strong", "--method mine --knobs strength=0.5")
    # GRPO leaves out answers of advantage 0, this one does not: other micro-batches, other rounding
    expected = pytest.approx(plain[1]["train/grad_norm"], rel=1e-5)
    assert same[1]["train/grad_norm"] == expected
    assert strong[2]["entropy/response_mean"] > plain[2]["entropy/response_mean"]
    monkeypatch.setattr(sys, "argv", ["diagnose.py", str(tmp_path / "strong")])
    capsys.readouterr()
    diagnose.main()
    assert "strong: 2 steps" in capsys.readouterr().out
    assert (tmp_path / "strong" / "diagnosis.png").exists()


def test_a_new_reward_is_one_function_and_its_name(toy, tmp_path, monkeypatch):
    """The rule of the README's recipe: rewards are any number, and above 0 counts as right."""
    recipe = (HERE / "README.md").read_text().split("**A further reward**")[1].split("```")[1]
    names = {"RULES": {}}
    exec(recipe.removeprefix("python\n"), names)
    monkeypatch.setitem(verify.RULES, "length", names["judge_length"])
    (tmp_path / "words.jsonl").write_text('{"problem": "1", "answer": "x"}\n' * 2)
    data = f"--data {tmp_path}/words.jsonl --eval_data {tmp_path}/words.jsonl --rule length"
    rows = toy_run(toy, tmp_path, "length", data, "--max_prompt_len 40")
    assert 0 < rows[1]["reward/mean"] < 0.05
    assert rows[1]["verify/right"] + rows[1]["verify/wrong"] == 32
    assert rows[2]["eval/pass@4"] == 1.0


# ---- runs that survive ---------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_runs_go_on_bit_for_bit():
    """The short form of `python -m experiments.reliability kill 50`: SIGKILL at random moments."""
    result = subprocess.run(
        [sys.executable, "-m", "experiments.reliability", "kill", "2"],
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=300,
    )
    told = result.stdout + result.stderr
    assert "2 kills" in result.stdout and "left alone: 0;" in result.stdout, told


@pytest.mark.skipif(
    "LONG" not in os.environ, reason="ten minutes: LONG=1 pytest test_all.py -k killed_often"
)
@pytest.mark.parametrize("kills, ranks, apart", [(50, 1, 0.0), (10, 2, 1e-6)])
def test_killed_often(kills, ranks, apart):
    result = subprocess.run(
        [sys.executable, "-m", "experiments.reliability", "kill", str(kills), str(ranks)],
        cwd=HERE,
        capture_output=True,
        text=True,
    )
    largest = re.search("left alone: (.*);", result.stdout)
    assert largest and float(largest[1]) <= apart, result.stdout + result.stderr


ENDLESS = "--steps 100000 --save_every 100000 --eval_every 100000"


def started(args, ranks=1):
    """train.py in the background, after its first step; under torchrun with several ranks."""
    process = subprocess.Popen(
        [*launcher(ranks), "train.py", *args],
        cwd=HERE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    out = args[args.index("--out") + 1]
    name = args[args.index("--name") + 1]
    metrics = Path(out, name, "metrics.jsonl")
    while process.poll() is None:
        if metrics.exists() and '"step": 1,' in metrics.read_text():
            break
        time.sleep(0.02)
    return process


@pytest.mark.slow
def test_sigterm_writes_a_checkpoint_and_says_how_to_go_on(toy, tmp_path):
    process = started(toy_args(toy, tmp_path, "term", ENDLESS))
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "--resume" in out and "stopped by SIGTERM" in out, out + err
    step = read_metrics(tmp_path / "term")[-1]["step"]
    assert saved(tmp_path / "term") == [f"checkpoint-{step}"]
    assert "torchrun --nproc-per-node 1 train.py" in out
    command = shlex.split(out[out.index("train.py --") :].splitlines()[0])[1:]
    command[command.index("100000")] = str(step + 1)  # --steps
    train.main(command)
    assert read_metrics(tmp_path / "term")[-1]["step"] == step + 1


@pytest.mark.slow
def test_sigterm_before_the_first_step_ends_the_run(toy, tmp_path):
    args = toy_args(toy, tmp_path, "early", "--eval_samples 200000")  # an evaluation of minutes
    process = subprocess.Popen(
        [sys.executable, "train.py", *args],
        cwd=HERE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not (tmp_path / "early" / "metrics.jsonl").exists():
        time.sleep(0.02)
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == -signal.SIGTERM


@pytest.mark.slow
def test_sigterm_to_two_ranks_saves_one_checkpoint_that_two_ranks_resume(toy, tmp_path):
    args = toy_args(toy, tmp_path, "ranks", ENDLESS)
    process = started(args, ranks=2)
    process.terminate()  # torchrun passes it on to its ranks
    out, err = process.communicate(timeout=60)
    step = read_metrics(tmp_path / "ranks")[-1]["step"]
    assert saved(tmp_path / "ranks") == [f"checkpoint-{step}"], out + err
    assert "--nproc-per-node 2 train.py" in out and "--resume" in out
    args[args.index("100000")] = str(step + 1)  # --steps
    assert torchrun(2, [*args, "--resume"]).returncode == 0
    assert read_metrics(tmp_path / "ranks")[-1]["step"] == step + 1


@pytest.mark.slow
def test_one_rank_of_two_dying_ends_the_other(toy, tmp_path):
    process = started(toy_args(toy, tmp_path, "two", ENDLESS), ranks=2)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout
    ranks = [int(pid) for pid in children.split()]
    os.kill(ranks[-1], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and "Signal 9" in err
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


def test_a_full_disk_leaves_the_last_checkpoint(toy, tmp_path, monkeypatch):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    write = record.RunLog.write
    args = "--save_every 1 --eval_every 5"

    def until_full(log, row):
        write(log, row)
        if row["step"] == 2:  # the next file ends after 20 kB, as on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))

    monkeypatch.setattr(record.RunLog, "write", until_full)
    told = "no room for checkpoint-2.*last complete one is checkpoint-1; make room"
    try:
        with pytest.raises(SystemExit, match=told):
            toy_run(toy, tmp_path, "full", args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    dist.destroy_process_group()
    monkeypatch.setattr(record.RunLog, "write", write)
    left = ["checkpoint-1", "config.json", "eval-digits.json", "metrics.jsonl"]
    assert sorted(path.name for path in (tmp_path / "full").iterdir()) == left
    assert len(toy_run(toy, tmp_path, "full", args, "--resume")) == 3


def off_by(error):
    """generate of an engine whose log-probs are that much too high: it computes another model."""
    generate = rollout.TorchEngine.generate

    def off(*args, **kwargs):
        ids, log_probs, truncated = generate(*args, **kwargs)
        return ids, [[x + error for x in row] for row in log_probs], truncated

    return off


@pytest.mark.parametrize(
    "dtype, error, refused",
    [("float32", 9e-4, 0), ("float32", 1.1e-3, 1), ("bfloat16", 0.08, 0), ("bfloat16", 0.12, 1)],
)
def test_a_model_that_is_scored_otherwise_than_sampled_is_not_trained(
    dtype, error, refused, toy, tmp_path, monkeypatch, capsys, no_figures
):
    """Neither from the start nor after --resume: it ends before the first update."""
    args = f"--dtype {dtype} --save_every 1 --eval_data none --temperature 0.7"
    toy_run(toy, tmp_path, "resumed", args, "--steps 1")
    monkeypatch.setattr(rollout.TorchEngine, "generate", off_by(error))
    updates = Mock(side_effect=train.update)
    monkeypatch.setattr(train, "update", updates)
    for name, more in (("new", ""), ("resumed", "--resume")):
        words = toy_args(toy, tmp_path, name, args, "--steps 2", *more.split())
        updates.reset_mock()
        if not refused:
            train.main(words)
            assert updates.called
            continue
        before = saved(tmp_path / name)
        with pytest.raises(SystemExit) as end:
            train.main(words)
        assert end.value.code == 2 and not updates.called
        dist.destroy_process_group()
        lines = re.findall(r"train\.py: error: (.*)", capsys.readouterr().err)
        assert len(lines) == 1
        assert re.match(r"gpt2: engine and trainer differ by 0\.\d+ nats per token, more", lines[0])
        assert saved(tmp_path / name) == before
        assert len(read_metrics(tmp_path / name)) == len(before)


def test_a_rank_that_has_only_answers_of_another_temperature_knows_no_mismatch(monkeypatch):
    """aepo's, dealt to one rank: it takes part in the sums over ranks, and adds nothing."""
    of_other_rank = torch.tensor([2.0, 0.5], dtype=torch.float64)  # tokens, mismatch
    monkeypatch.setattr(rollout, "sum_over_ranks", lambda values: values + of_other_rank)
    monkeypatch.setattr(rollout, "max_over_ranks", lambda largest: max(largest.item(), 0.3))
    batch = {
        "response_mask": torch.tensor([[True, True], [True, False]]),
        "rollout_log_probs": torch.tensor([[math.nan, math.nan], [math.nan, 0.0]]),
    }
    found = rollout.mismatch_metrics(batch, torch.full((2, 2), -1.0))
    assert found == {"rollout/mismatch_mean": 0.25, "rollout/mismatch_max": 0.3}


def test_a_mismatch_that_comes_later_is_warned_of(toy, tmp_path, monkeypatch, capsys, no_figures):
    """The check is for an architecture or for a push that is wrong from the start."""
    generate = rollout.TorchEngine.generate
    wrong = off_by(0.2)
    calls = []

    def later(*args, **kwargs):
        calls.append(args)
        return (generate if len(calls) == 1 else wrong)(*args, **kwargs)

    monkeypatch.setattr(rollout.TorchEngine, "generate", later)
    rows = toy_run(toy, tmp_path, "late", "--eval_data none")
    assert rows[0]["rollout/mismatch_mean"] < 1e-6 and rows[1]["rollout/mismatch_mean"] > 0.1
    assert "warning: engine and trainer differ" in capsys.readouterr().err


def test_positions_of_a_composite_configuration(tmp_path):
    text = dict(hidden_size=32, max_position_embeddings=64)
    AutoConfig.for_model("gemma3", text_config=text).save_pretrained(tmp_path)
    tiny.make_tokenizer().save_pretrained(tmp_path)
    cfg = types.SimpleNamespace(trust_remote_code=False, max_prompt_len=40, max_response_len=24)
    train.load_tokenizer(tmp_path, cfg)
    cfg.max_response_len = 25
    with pytest.raises(ValueError, match="65, is more than the 64 positions"):
        train.load_tokenizer(tmp_path, cfg)


def test_an_architecture_without_a_cache_to_share_is_refused(tmp_path, capsys, toy):
    config = AutoConfig.for_model("openai-gpt", vocab_size=32, n_embd=32, n_layer=1, n_head=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny.make_tokenizer().save_pretrained(tmp_path)
    error = complaint_of(toy, tmp_path, "run", capsys, "--model", f"{tmp_path}")
    assert "openai-gpt keeps no cache that --engine torch could share" in error
    assert not (tmp_path / "run").exists()


def cut(path):
    path.write_bytes(path.read_bytes()[:500])


def with_three_layers(checkpoint):
    config = checkpoint / "config.json"
    config.write_text(config.read_text().replace('"n_layer": 2', '"n_layer": 3'))


def with_state(state):
    return lambda checkpoint: torch.save(state, checkpoint / "trainer_state.pt")


@pytest.mark.parametrize(
    "harm, complaint",
    [
        (lambda checkpoint: cut(checkpoint / "trainer_state.pt"), "truncated or no checkpoint"),
        (lambda checkpoint: cut(checkpoint / "model.safetensors"), "truncated"),
        (with_state({"step": 2}), "truncated or no checkpoint"),
        (with_state({"step": 2, "run": "other"}), "of the run other"),
        (with_state(Fraction(1, 2)), "truncated or no checkpoint"),  # pickled code is not loaded
        (with_three_layers, "another model"),
    ],
)
def test_a_broken_or_foreign_checkpoint_is_refused(harm, complaint, toy, tmp_path, capsys):
    toy_run(toy, tmp_path, "harmed")
    harm(tmp_path / "harmed" / "checkpoint-2")
    error = complaint_of(toy, tmp_path, "harmed", capsys, "--resume --steps 3")
    assert error.startswith("train.py: error: ")
    assert f"{tmp_path}/harmed/checkpoint-2" in error and complaint in error


def test_the_best_and_the_last_checkpoints_stay(toy, tmp_path, monkeypatch):
    scores = iter([0.1, 0.2, 0.9, 0.3, 0.4, 0.5, 0.6])
    monkeypatch.setattr(train, "evaluate", lambda *_: [("digits", {"pass@1": next(scores)})])
    two = "--save_every 1 --keep_checkpoints 2"
    toy_run(toy, tmp_path, "best", two, "--steps 6 --eval_every 1")
    assert saved(tmp_path / "best") == ["checkpoint-2", "checkpoint-5", "checkpoint-6"]
    toy_run(toy, tmp_path, "none", two, "--steps 3 --eval_data none")
    assert saved(tmp_path / "none") == ["checkpoint-2", "checkpoint-3"]


def test_an_unfinished_line_of_metrics_is_dropped(toy, tmp_path):
    rows = toy_run(toy, tmp_path, "cut")
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "reward/me')
    assert read_metrics(tmp_path / "cut") == rows
    longer = toy_run(toy, tmp_path, "cut", "--resume --steps 3")
    assert [row["step"] for row in longer] == [0, 1, 2, 3]


def test_dry_run_prints_the_plan_and_writes_nothing(toy, tmp_path, capsys):
    train.main(toy_args(toy, tmp_path, "dry", "--dry_run"))
    text = capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(f"{toy}/model")
    count = sum(p.numel() for p in model.parameters())
    assert f"{count / 1e6:,.2f} M parameters" in text
    assert f"{16 * count / 2**30:9.3f}  weights" in text
    assert text.count("---- prompt") == 3 and text.count(": right") == 3
    assert not (tmp_path / "dry").exists()
    problems = [Problem("What is 1+1?", "2", "math"), Problem("Impossible?", r"\begin{", "math")]
    preview(Mock(decode=str), problems, [[1], [2]])
    text = capsys.readouterr().out
    assert "2}: right" in text and "refused" in text


def test_metrics_go_to_wandb_or_tensorboard_too(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(record, "find_spec", lambda name: None)
    assert "run `pip install wandb`" in complaint_of(toy, tmp_path, "log", capsys, "--log_to wandb")
    monkeypatch.setattr(record, "find_spec", lambda name: True)
    sent = []
    run = types.SimpleNamespace(log=lambda row, step: sent.append((step, row)))
    wandb = types.SimpleNamespace(init=lambda **_: run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    rows = toy_run(toy, tmp_path, "wandb", "--log_to wandb")
    assert sent == [(row["step"], row) for row in rows]
    scalars = []
    writer = types.SimpleNamespace(add_scalar=lambda *scalar: scalars.append(scalar))
    tensorboard = types.SimpleNamespace(SummaryWriter=lambda folder: writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    rows = toy_run(toy, tmp_path, "board", "--log_to tensorboard")
    assert scalars == [(name, value, row["step"]) for row in rows for name, value in row.items()]


CODE = """
from transformers import GPT2Config, GPT2LMHeadModel

open({path!r}, "w").close()


class Config(GPT2Config):
    model_type = "mine"


class Model(GPT2LMHeadModel):
    config_class = Config
"""


def test_code_that_comes_with_a_model_runs_only_when_trusted(toy, tmp_path, capsys):
    shutil.copytree(toy / "model", tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    config["model_type"] = "mine"
    config["auto_map"] = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    file.write_text(json.dumps(config))
    (tmp_path / "model" / "mine.py").write_text(CODE.format(path=str(tmp_path / "ran")))
    args = f"--model {tmp_path}/model --steps 1"
    with pytest.raises(SystemExit):
        train.main(toy_args(toy, tmp_path, "trust", args))
    assert "trust_remote_code" in capsys.readouterr().err and not (tmp_path / "ran").exists()
    toy_run(toy, tmp_path, "trust", args, "--trust_remote_code")
    assert (tmp_path / "ran").exists() and saved(tmp_path / "trust")


# ---- LoRA ----------------------------------------------------------------------------------------


def lora_policy(folder, rank=4, dtype=torch.float32, spread=0.1, parallel="ddp"):
    """A policy with adapters that have learned something: B is drawn instead of 0."""
    cfg = types.SimpleNamespace(
        temperature=1.0,
        steps=1,
        parallel=parallel,
        activation_checkpointing=False,
        trust_remote_code=False,
        lora_rank=rank,
        lora_alpha=8.0,
        seed=0,
    )
    built = policy.build_policy(folder, cfg, torch.device("cpu"), dtype)
    adapters = policy.adapter_tensors(built.model)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in adapters.items():
        if ".lora_B." in name:
            tensor += spread * torch.randn(tensor.shape, generator=generator)
    policy.load_adapters(built.model, adapters)
    return built


@pytest.fixture(scope="module", params=["qwen2", "gpt2"])
def base(request, tmp_path_factory):
    """The folder of a model, of nn.Linear or of GPT-2's Conv1D, whose weights are transposed."""
    folder = tmp_path_factory.mktemp("base")
    random_model(request.param).save_pretrained(folder)
    return folder


def scored(scorer):
    """Log-probs of three answers, with gradient."""
    batch = batch_of([([3, 4, 5], [6, 7, 1]), ([8], [9, 10, 11, 12, 1]), ([5] * 9, [2])])
    return scorer(batch["ids"], batch["prompt_lens"], batch["response_mask"])["log_probs"]


def test_lora_starts_as_the_base_and_adapts_every_linear_layer_but_the_head(base):
    state = torch.get_rng_state()
    adapted = lora_policy(base, spread=0.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(scored(adapted), scored(lora_policy(base, rank=0)))
    plain = AutoModelForCausalLM.from_pretrained(base)
    linear = []
    for name, module in plain.named_modules():
        if type(module).__name__ in ("Linear", "Conv1D") and name != "lm_head":
            linear.append(name)
    names = [name for name, _ in adapted.model.named_parameters() if ".lora_A." in name]
    assert sorted(names) == sorted(f"{name}.lora_A.default.weight" for name in linear)
    torch.rand(1)  # as on another rank, which may have drawn something else before
    again = dict(lora_policy(base, spread=0.0).named_parameters())
    assert all(torch.equal(again[name], tensor) for name, tensor in adapted.named_parameters())


@pytest.mark.parametrize("dtype_of_file", [torch.float32, torch.bfloat16])
def test_adapters_are_float32_whatever_the_file_holds(dtype_of_file):
    model = random_model(hidden=64).to(dtype_of_file)
    policy.add_lora(model, 4, 8.0, 0, torch.bfloat16)
    dtypes = {True: set(), False: set()}
    for parameter in model.parameters():
        dtypes[parameter.requires_grad].add(parameter.dtype)
    assert dtypes == {True: {torch.float32}, False: {torch.bfloat16}}


def test_only_adapters_have_gradients(base):
    adapted = lora_policy(base)
    scored(adapted).sum().backward()
    for name, parameter in adapted.named_parameters():
        assert policy.is_adapter(name) == parameter.requires_grad, name
        assert (parameter.grad is not None and parameter.grad.any()) == parameter.requires_grad
    optimizer = train.make_optimizer(adapted, types.SimpleNamespace(lr=1e-3, weight_decay=0.0))
    learned = optimizer.param_groups[0]["params"]
    assert len(learned) == 2 * len(policy.lora_layers(adapted)) > 0


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_pushed_weights_are_the_merged_ones(parallel, base):
    dist.init_process_group("gloo")
    adapted = lora_policy(base, parallel=parallel)
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    pushed = dict(policy.full_tensors(adapted.model))
    plain = lora_policy(base, rank=0)
    unlike_base = (scored(adapted) - scored(plain)).abs().max()
    shapes = {name: tensor.shape for name, tensor in plain.model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in pushed.items()} == shapes
    assert not any(tensor.requires_grad for tensor in pushed.values())
    plain.model.load_state_dict(pushed)
    assert (scored(adapted) - scored(plain)).abs().max() < 1e-5 < 0.1 < unlike_base
    for name, tensor in adapted.state_dict().items():
        assert torch.equal(policy.whole_tensor(tensor), policy.whole_tensor(before[name])), name


def test_without_its_adapters_the_policy_is_its_base(base):
    adapted = lora_policy(base)
    before = scored(adapted)
    with policy.adapters_off(adapted):
        off = scored(adapted)
    assert torch.equal(off, scored(lora_policy(base, rank=0))) and not torch.equal(off, before)
    assert torch.equal(scored(adapted), before)
    scored(adapted).sum().backward()
    assert all(p.grad is not None for n, p in adapted.named_parameters() if policy.is_adapter(n))


def test_the_frozen_base_is_held_in_the_compute_dtype(base):
    adapted = lora_policy(base, dtype=torch.bfloat16)
    for name, parameter in adapted.named_parameters():
        adapter = policy.is_adapter(name)
        assert parameter.dtype == (torch.float32 if adapter else torch.bfloat16), name
    merged = dict(policy.full_tensors(adapted.model))
    linear = [layer.base_layer for layer in policy.lora_layers(adapted)]
    assert sum(tensor.dtype == torch.float32 for tensor in merged.values()) == len(linear)


def test_lora_of_full_rank_learns_as_all_weights_do():
    """SGD with the rate lr moves W by -lr G. With LoRA B moves by -lr s G A', so W by
    -lr s^2 G A' A, s = alpha / rank. peft draws A, (rank, inputs), with the variance
    1 / (3 inputs), so with rank = inputs the mean of A' A is 1/3, and s^2 = 3 makes both alike."""
    falls = []
    for rank in (0, 64):
        model = random_model(hidden=64)  # every linear layer has 64 inputs
        learned = []
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.weight"):
                learned.append(parameter)
        if rank:
            policy.add_lora(model, rank, rank * math.sqrt(3), 0, torch.float32)
            learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(learned, lr=0.1)
        ids = torch.arange(96).view(8, 12) ** 2 % 29 + 2
        losses_seen = []
        for _ in range(60):
            loss = model(ids, labels=ids).loss
            losses_seen.append(loss.item())
            loss.backward()
            optimizer.step()
            model.zero_grad()
        falls.append(losses_seen[0] - losses_seen[-1])
    assert falls[0] > 0.3 and math.isclose(*falls, rel_tol=0.05), falls


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_update_with_lora_sees_a_ratio_of_exactly_one(dtype, toy, tmp_path):
    args = (
        f"--lora_rank 4 --updates_per_rollout 1 --steps 2 --micro_batch_tokens 40 --dtype {dtype}"
    )
    _, first, second = toy_run(toy, tmp_path, "one", args)
    assert first["policy/kl_to_rollout"] == second["policy/kl_to_rollout"] == 0.0
    assert first["train/grad_norm"] > 0


def test_a_checkpoint_of_lora_is_a_model_that_needs_no_peft(toy, tmp_path, monkeypatch):
    """Evaluated as any model it scores as the run did, and it has learned: so it is merged."""
    with_lora = "--lora_rank 4 --lr 1e-2 --warmup_updates 0 --eval_samples 16"
    rows = toy_run(toy, tmp_path, "lora", with_lora)
    assert rows[-1]["rollout/mismatch_max"] < 1e-4  # the engine has the merged weights
    path = checkpoints(tmp_path / "lora")[-1]
    monkeypatch.setitem(sys.modules, "peft", None)  # not to be imported
    _, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    base_of_run = AutoModelForCausalLM.from_pretrained(toy / "model").state_dict()
    moved = []
    for name, tensor in weights(tmp_path / "lora").items():
        if not torch.equal(tensor, base_of_run[name]):
            moved.append(name)
    assert len(moved) == 8 and all(".c_" in name and ".weight" in name for name in moved)
    (again,) = toy_run(toy, tmp_path, "again", f"--steps 0 --eval_samples 16 --model {path}")
    expected = {key: value for key, value in rows[-1].items() if key.startswith("eval/")}
    assert again == pytest.approx(expected | {"step": 0}, rel=1e-5)
    assert abs(again["eval/entropy"] - rows[0]["eval/entropy"]) > 1e-3


def test_a_run_with_lora_is_resumed_bit_for_bit(toy, tmp_path, capsys):
    args = "--lora_rank 4 --lr 1e-2 --method kl_loss --eval_every 1 --save_every 1"
    whole = toy_run(toy, tmp_path, "whole", args, "--steps 4")
    toy_run(toy, tmp_path, "parts", args, "--steps 2")
    parts = toy_run(toy, tmp_path, "parts", args, "--steps 4", "--resume")
    assert without_times(parts) == without_times(whole)
    expected = weights(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "parts").items():
        assert torch.equal(tensor, expected[name]), name
    error = complaint_of(toy, tmp_path, "parts", capsys, args, "--steps 5 --lora_rank 8 --resume")
    assert "--lora_rank 4, not 8" in error


def test_a_run_of_all_weights_is_not_resumed_with_lora(toy, tmp_path, capsys):
    toy_run(toy, tmp_path, "full")
    config = tmp_path / "full" / "config.json"
    before = json.loads(config.read_text())
    del before["lora_rank"]  # as a run of before the flag
    config.write_text(json.dumps(before))
    error = complaint_of(toy, tmp_path, "full", capsys, "--steps 3 --lora_rank 4 --resume")
    assert "--lora_rank 0, not 4" in error


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_with_lora_equal_one_and_resume_bit_for_bit(parallel, toy, tmp_path):
    args = "--lora_rank 4 --lr 1e-2 --method kl_loss --micro_batch_tokens 40 --save_every 1"
    one = toy_run(toy, tmp_path, "one", args, "--steps 4")
    parallel = f"--parallel {parallel}"
    for name, more in (
        ("whole", "--steps 4"),
        ("parts", "--steps 2"),
        ("parts", "--steps 4 --resume"),
    ):
        result = torchrun(2, toy_args(toy, tmp_path, name, args, parallel, more))
        assert result.returncode == 0, result.stderr
    whole = read_metrics(tmp_path / "whole")
    assert without_times(read_metrics(tmp_path / "parts")) == without_times(whole)
    expected = weights(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "parts").items():
        assert torch.equal(tensor, expected[name]), name
    for a, b in zip(one[1:], whole[1:], strict=True):
        for key in ("reward/mean", "train/grad_norm", "train/loss", "policy/kl_to_rollout"):
            assert math.isclose(a[key], b[key], rel_tol=1e-4, abs_tol=1e-6), key


def test_the_reference_of_lora_is_the_base(toy, tmp_path, monkeypatch):
    seen = []
    fixed_tensors = train.fixed_tensors

    def spy(batch, old, ref):
        seen.append((batch, old["log_probs"], ref["log_probs"]))
        return fixed_tensors(batch, old, ref)

    monkeypatch.setattr(train, "fixed_tensors", spy)
    build_once = Mock(side_effect=train.build_policy)
    monkeypatch.setattr(train, "build_policy", build_once)
    toy_run(toy, tmp_path, "kl", "--lora_rank 4 --lr 1e-2 --method kl_loss")
    build_once.assert_called_once()  # no second model
    dist.init_process_group("gloo")
    of_base = lora_policy(toy / "model", rank=0)
    (_, first_old, first_ref), (batch, old, ref) = seen
    assert torch.equal(first_old, first_ref)
    lists = policy.split_batch(batch, 16384, 2).all_micro_batches()
    expected = policy.batch_statistics(of_base, batch, ["log_probs"], lists)["log_probs"]
    assert torch.equal(ref, expected) and not torch.allclose(old, ref, atol=1e-3)


@pytest.mark.parametrize(
    "args, complaint",
    [
        ("--lora_rank -1", "--lora_rank -1: it must be 0 or more"),
        ("--lora_rank 33", "--lora_rank 33: no weight of this model has a rank above 32"),
        ("--lora_rank 33 --dry_run", "--lora_rank 33: no weight"),
        ("--lora_rank 4 --lora_alpha 0", "--lora_alpha 0.0: it must be positive"),
    ],
)
def test_bad_ranks_are_refused_in_one_line(args, complaint, toy, tmp_path, capsys):
    assert complaint in complaint_of(toy, tmp_path, "bad", capsys, args)


def test_the_plan_puts_7b_with_lora_on_one_card_of_80_gb(monkeypatch):
    """GiB of a 7B model: with the rank 32 an adapter of inputs i and outputs o has 32 (i + o)
    parameters of 16 bytes, and the base and the engine's copy have 2 bytes a parameter."""
    hidden, wide, narrow, layers = 3584, 18944, 512, 28
    config = Qwen2Config(
        hidden_size=hidden,
        intermediate_size=wide,
        num_hidden_layers=layers,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
    )
    words = "--model a/7b --engine torch --activation_checkpointing --method kl_loss"
    found = {}
    for rank in (0, 32):
        cfg = train.parse([*words.split(), "--lora_rank", f"{rank}"])
        size = memory.model_size(config, lora_rank=rank)
        plan = memory.plan_memory(size, cfg, 1, torch.bfloat16, with_reference=True, total=80e9)
        lines = record.plan(cfg, size, 1, torch.bfloat16, plan).splitlines()
        numbers = [re.match(r" +([\d.]+)  (.*)", line) for line in lines]
        found[rank] = {number[2][:15]: float(number[1]) for number in numbers if number}
    in_and_out = 2 * 2 * hidden + 2 * (hidden + narrow) + 3 * (hidden + wide)
    adapters = 32 * in_and_out * layers
    count = 7_615_616_512
    for part, numbers in (
        ("weights that ar", 4 * adapters),
        ("gradients, floa", 4 * adapters),
        ("AdamW's two ave", 8 * adapters),
        ("the frozen base", 2 * count),
        ("the engine's we", 2 * count),
        ("a frozen refere", 0),
    ):
        assert found[32][part] == pytest.approx(numbers / 2**30, abs=6e-4)
    assert max(found[32][phase] for phase in ("score", "update", "push")) < 60
    assert found[0]["optimizer step"] > 150 and found[0]["the frozen base"] == 0
    assert found[0]["a frozen refere"] == pytest.approx(4 * count / 2**30, abs=6e-4)
    disk = f"a checkpoint: {(4 * count + 12 * adapters) / 2**30:.3f} GiB"
    assert disk in lines[-1]


def test_lora_without_peft_says_what_to_install(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "find_spec", lambda name: None)
    error = complaint_of(toy, tmp_path, "bare", capsys, "--lora_rank 4")
    assert error == "train.py: error: --lora_rank needs the package peft: run `pip install peft`"
    assert not (tmp_path / "bare").exists()


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args, complaint",
    [
        ("--method clip_kov", "Methods: "),
        ("--knobs cov_frac=0.1", "grpo has no knob 'cov_frac'. It has: clip_low"),
        ("--engine sglang", "there are auto"),
        ("--data nowhere.jsonl", "nowhere.jsonl"),
        ("--prompts_per_step 6 --updates_per_rollout 4", "multiple of"),
        (f"--data {HERE}/nowhere.parquet", "nowhere.parquet"),
        ("--resume", "no complete checkpoint"),
        ("--name ../up", "one folder's name"),
        ("--temperature 0", "must be positive"),
        ("--parallel ddpp", "choose from ddp, fsdp"),
        ("--method w_reinforce --dynamic_sampling", "no baseline"),
        ("--knobs clip_low=nan", "finite"),
        ("--max_response_len 100", "more than the 64 positions"),
        ("--rule poetry", "poetry"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(args, complaint, toy, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(toy_args(toy, tmp_path, "bad", args))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and error.startswith("train.py: error: ") and complaint in error


def test_a_prompt_that_is_too_long_is_refused(toy, tmp_path, capsys):
    (tmp_path / "long.jsonl").write_text(countdown_row("1" * 9, [1], 1))
    error = complaint_of(toy, tmp_path, "long", capsys, f"--data {tmp_path}/long.jsonl")
    assert "1 of 1 prompts are longer than --max_prompt_len 8: raise it to 9" in error


def test_overwrite_deletes_runs_only(toy, tmp_path, capsys):
    (tmp_path / "precious").mkdir()
    error = complaint_of(toy, tmp_path, "precious", capsys, "--overwrite")
    assert "no run's folder" in error and (tmp_path / "precious").exists()


def test_sets_with_equal_names_are_both_read(toy, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        row = json.dumps({"question": name, "answer": "1"})
        (tmp_path / name / "train.jsonl").write_text(row)
    sets = train.load_sets([f"{tmp_path}/a/train.jsonl", f"{tmp_path}/b/train.jsonl"], "train")
    first_letters = {name: problems[0].prompt[0] for name, problems in sets.items()}
    assert first_letters == {"train": "a", "train-2": "b"}


def test_a_sets_name_is_a_safe_file_name(monkeypatch):
    monkeypatch.setattr(train, "load_problems", lambda name, *_, **__: [name])
    expected = {
        "gsm8k-main-test": "openai/gsm8k:main:test",
        "x-y": "../../x y.jsonl",
        "": "/",
        "..": "..",
        "a" * 100: "a" * 250 + ".jsonl",
        "digits": "digits.jsonl",
        "digits-2": "digits.jsonl",
    }
    sets = train.load_sets(list(expected.values()), "test")
    assert sets == {name: [source] for name, source in expected.items()}


def test_the_first_prompt():
    def codes(text):
        return list(map(ord, text))

    tokenizer = Mock(decode=lambda ids: "".join(map(chr, ids)))
    test_sets = {"a": ([], [codes("2+2="), codes("3+3=")])}
    assert first_prompt(tokenizer, [codes("1+1=")], test_sets) == "1+1="
    assert first_prompt(tokenizer, [], test_sets) == "2+2="
    assert first_prompt(tokenizer, [], {}) == ""
    long = first_prompt(tokenizer, [codes("a" * 500 + "b" * 500)], {})
    assert long == "a" * 400 + " [... 400 characters ...] " + "b" * 200


def test_an_evaluation_never_touches_a_trained_run(toy, tmp_path, capsys):
    toy_run(toy, tmp_path, "mine")
    config = (tmp_path / "mine" / "config.json").read_text()
    for args, complaint in (
        ("--steps 0 --resume", "trained run's folder"),
        ("--steps 0 --overwrite", "trained run's folder"),
        ("--steps 1 --resume", "is at step 2 already"),
        ("--steps 0 --eval_data none", "nothing to do"),
    ):
        assert complaint in complaint_of(toy, tmp_path, "mine", capsys, args)
    assert (tmp_path / "mine" / "config.json").read_text() == config and saved(tmp_path / "mine")
    for run in "AB":
        args = f"--model runs/{run}/checkpoint-10 --steps 0 --eval_data countdown --out {tmp_path}"
        assert train.parse(args.split()).name == f"eval-{run}-checkpoint-10-seed0"


def test_runs_are_neither_overwritten_nor_resumed_as_another(toy, tmp_path, capsys):
    toy_run(toy, tmp_path, "mine")
    assert "--resume goes on" in complaint_of(toy, tmp_path, "mine", capsys)
    error = complaint_of(toy, tmp_path, "mine", capsys, "--resume --method kl_cov")
    assert "--method grpo, not kl_cov" in error
    assert len(toy_run(toy, tmp_path, "mine", "--overwrite --steps 1")) == 2


@pytest.mark.slow
def test_bad_input_ends_every_rank(toy, tmp_path):
    result = torchrun(2, toy_args(toy, tmp_path, "bad", "--knobs x=1"), timeout=60)
    assert result.returncode != 0 and result.stderr.count("train.py: error: --knobs x=1") == 1


def test_warnings_name_the_cause_and_the_flag(toy, tmp_path, capsys):
    args = "--method kl_cov --updates_per_rollout 1 --max_response_len 1 --steps 1"
    toy_run(toy, tmp_path, "warned", args)
    text = capsys.readouterr().err
    assert "kl_cov with --updates_per_rollout 1" in text and "raise --max_response_len" in text


def test_help_fits_two_screens(capsys):
    with pytest.raises(SystemExit):
        train.parse(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 70
    assert any("--lr " in line and "0.0001" in line for line in lines)  # tiny's default


@pytest.mark.parametrize("chat", [True, False])
def test_real_schemas_go_through_every_part(chat, tmp_path):
    """Problems in verl's schema and a model with a byte-level BPE tokenizer trained on them, with
    and without a chat template."""
    lines = []
    for i in range(5):
        for j in range(5):
            problem = {
                "prompt": [{"role": "user", "content": f"What is ${i}+{j}$? Answer: $Answer"}],
                "data_source": "math",
                "reward_model": {"ground_truth": str(i + j), "style": "rule"},
            }
            lines.append(json.dumps(problem) + "\n")
    (tmp_path / "sums.jsonl").write_text("".join(lines))
    make_model(tmp_path / "sums.jsonl", tmp_path / "model", vocab_size=300, chat=chat)
    args = (
        f"--model {tmp_path}/model --data {tmp_path}/sums.jsonl --out {tmp_path} --name sums"
        " --steps 1 --prompts_per_step 4 --group_size 2 --updates_per_rollout 2"
        " --max_prompt_len 60 --max_response_len 8 --method clip_cov"
    )
    train.main(args.split())
    (row,) = read_metrics(tmp_path / "sums")
    assert sum(row[f"verify/{verdict}"] for verdict in verify.VERDICTS) == 8
    assert math.isfinite(row["train/grad_norm"])


def test_a_run_whose_tokenizer_has_more_tokens_than_the_model_has_ends(tmp_path, capsys):
    tiny.make_tokenizer().save_pretrained(tmp_path / "model")
    Qwen2Config(vocab_size=5).save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit):
        train.main(f"--model {tmp_path}/model --data countdown --out {tmp_path} --dry_run".split())
    assert "but the model has only 5: is it the tokenizer of another" in capsys.readouterr().err


@pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vllm is not installed: .ci/run installs it"
)
def test_train_with_vllm_under_torchrun(toy, tmp_path):
    """FSDP2 on two ranks, and weights pushed into vLLM after every step. Were they stale, the
    mismatch would show it."""
    random_model(hidden=64).save_pretrained(tmp_path / "model")
    tiny.make_tokenizer().save_pretrained(tmp_path / "model")
    more = f"--model {tmp_path}/model --engine vllm --parallel fsdp"
    args = toy_args(toy, tmp_path, "vllm", more, "--steps 3 --method kl_cov --lr 1e-2")
    result = torchrun(2, args, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    rows = read_metrics(tmp_path / "vllm")
    assert len(rows) == 4 and all(row["rollout/mismatch_max"] < 1e-4 for row in rows[1:])


# ---- the README ----------------------------------------------------------------------------------


def shown_commands():
    """Every train.py command in a code block of the README or of the page on teaching."""
    commands = []
    for page in ("README.md", "experiments/teaching.md"):
        blocks = (HERE / page).read_text().split("```")[1::2]
        for line in "\n".join(blocks).splitlines():
            for part in line.split("&&"):
                command = " ".join(part.split("#")[0].split())
                if "train.py --" in command and " -> " not in command:
                    commands.append(command)
    return commands


def readme_code(first_words):
    """The names that a code block of the README defines or changes: a function of the names that it
    is given. The block is the one that begins with first_words."""
    blocks = (HERE / "README.md").read_text().split("```python\n")[1:]
    code = [block.split("```")[0] for block in blocks if block.startswith(first_words)]
    assert len(code) == 1, first_words

    def run(**given):
        names = dict(given)
        exec(code[0], names)
        return names

    return run


@pytest.mark.parametrize("frac", [2e-4, 0.1, 1.0])
def test_the_clip_cov_to_paste_is_ours(frac):
    """Loss and gradient bit for bit, with tokens outside the ratio clip, and nan on padding."""
    paste = readme_code("def clip_cov_loss")(torch=torch)["clip_cov_loss"]
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(20) < torch.randint(1, 21, (30, 1), generator=g)
    old = torch.where(mask, -2 * torch.rand(30, 20, generator=g), math.nan)
    now = old + torch.randn(30, 20, generator=g)
    A = 2 * torch.randn(30, 1, generator=g).expand(30, 20)
    found = []
    for loss_of in (
        lambda x: paste(x, old, A, mask, 1000, frac=frac, low=0.2, high=4.0),
        lambda x: losses.clip_cov(
            x, old, A, mask, cov_frac=frac, cov_low=0.2, cov_high=4.0, num_tokens=1000
        )[0],
    ):
        log_probs = now.clone().requires_grad_()
        torch.manual_seed(1)
        loss = loss_of(log_probs)
        loss.backward()
        found.append((loss.detach(), log_probs.grad))
    (pasted, pasted_grad), (ours, our_grad) = found
    assert pasted == ours and torch.equal(pasted_grad, our_grad)
    plain = losses.clip_cov(now, old, A, mask, cov_low=1e6, cov_high=1e7, num_tokens=1000)[0]
    assert ours != plain
    defaults = inspect.signature(paste).parameters
    ours = train.default_knobs(losses.clip_cov)
    for theirs in ("frac", "low", "high"):
        assert defaults[theirs].default == ours[f"cov_{theirs}"]


def test_the_lines_for_another_loop_write_a_run(tmp_path, monkeypatch, capsys):
    """log_entropy's row is one that diagnose.py reads."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    lines = readme_code("from entropy import log_entropy")
    mask = torch.ones(4, 5, dtype=torch.bool)
    for step in (1, 2, 3):
        lines(
            json=json,
            step=step,
            rewards=torch.tensor([0.0, 1.0, 0.0, 1.0]),
            old_log_probs=-torch.rand(4, 5),
            token_entropy=torch.full((4, 5), 0.5 / step),
            advantages=torch.tensor([-1.0, 1.0, -1.0, 1.0]),
            mask=mask,
        )
    monkeypatch.setattr(sys, "argv", ["diagnose.py", "metrics.jsonl"])
    diagnose.main()
    told = " ".join(capsys.readouterr().out.split())
    assert "3 steps; entropy fell from 0.500 to 0.167" in told and "Predicted: neg_" in told


@pytest.mark.parametrize("command", shown_commands())
def test_every_command_of_the_readme_parses(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "resolve_engine", lambda name, tp: name)
    words = shlex.split(command)
    ranks = 1
    for i, word in enumerate(words):
        if word in ("--nproc-per-node", "--nnodes"):
            ranks *= int(words[i + 1])
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    args = words[words.index("train.py") + 1 :]
    train.parse([word for word in args if word != "--resume"])


# ---- the exercises of experiments/teaching.md ----------------------------------------------------


def exercises():
    """(function, [(test, its parameters), ...]) of each row of the table."""
    page = (HERE / "experiments" / "teaching.md").read_text()
    found = []
    for row in re.findall(r"^\| \d+ \|.*", page, re.MULTILINE):
        _, where, _, tests, _ = row.strip("| ").split(" | ")
        name, module = re.fullmatch(r"`(\w+)` \((\w+)\.py\)", where).groups()
        function = getattr(sys.modules[module], name)
        assert function.__module__ == module
        named = re.findall(r"`(\w+)(?:\[(\w+)\])?`", tests)
        assert named
        calls = [(globals()[test], [parameter] if parameter else []) for test, parameter in named]
        found.append((function, calls))
    return found


def without_body(function):
    """Its code as an exercise leaves it. Put into the function itself, it reaches METHODS and every
    module alike."""
    tree = ast.parse(inspect.getsource(function))
    tree.body[0].body = ast.parse("raise NotImplementedError").body
    names = dict(function.__globals__)
    exec(compile(tree, "exercise", "exec"), names)
    return names[function.__name__].__code__


@pytest.mark.parametrize("number", range(1, 11))
def test_teaching_exercises(number, monkeypatch):
    """With this and all later bodies deleted its tests are red. As soon as this one is written
    again they are green."""
    rows = exercises()
    assert len(rows) == 10
    function, calls = rows[number - 1]
    for later, _ in rows[number:]:
        monkeypatch.setattr(later, "__code__", without_body(later))
    for test, parameters in calls:
        with monkeypatch.context() as patch:
            patch.setattr(function, "__code__", without_body(function))
            with pytest.raises(NotImplementedError):
                test(*parameters)
        test(*parameters)


if __name__ == "__main__":
    vllm_rank(sys.argv[1], int(sys.argv[2]))
