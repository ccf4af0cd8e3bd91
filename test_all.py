"""Every test here turns red when the behaviour that it names is taken away: pytest -q test_all.py"""
import ast
import dataclasses
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
from fractions import Fraction
from pathlib import Path
from unittest.mock import Mock

from rollout import prepare_environment

prepare_environment()

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, Qwen2Config

import entropy
import losses
import record
import rollout
import tiny
import train
import verify
from experiments import compare, difficulty, findings, over_seeds, scaling, scaling_measured
from experiments.make_model import make_model
from losses import METHODS, group_advantages, importance_ratio, k3, ppo_surrogate, scale_gradient, token_covariance, token_mean
from verify import RULES, Problem, judge_countdown, judge_math, load_problems, outcomes, pass_at_k, render, score

HERE = Path(__file__).parent


def random_case(B=6, T=10, dtype=torch.float64, spread=0.3, seed=0):
    """Log-probs, old log-probs, advantages and a ragged mask, as from G = 3 answers to each of two prompts."""
    g = torch.Generator().manual_seed(seed)
    old = -torch.rand(B, T, generator=g, dtype=dtype) * 3 - 0.02
    log_probs = (old + spread * torch.randn(B, T, generator=g, dtype=dtype)).clamp(max=-1e-3)
    advantages = group_advantages(torch.tensor([1, 0, 0, 1, 1, 0] * (B // 6), dtype=dtype), 3)[:, None].expand(B, T).clone()
    lengths = torch.tensor([10, 7, 3, 9, 10, 1] * (B // 6))
    return log_probs.requires_grad_(), old, advantages, torch.arange(T) < lengths[:, None]


def extras(method, case, seed=1):
    """The further tensors that a method wants, plausible and with the case's shape."""
    g = torch.Generator().manual_seed(seed)
    made = {}
    for name in losses.wanted_tensors(method):
        noise = torch.rand(case[0].shape, generator=g, dtype=case[0].dtype)
        if name == "num_sequences":
            made[name] = torch.tensor(len(case[0]))
            continue
        made[name] = case[0].detach() + 0.2 * noise if name.endswith("log_probs") else 0.1 + 2 * noise
    return made


def run(method, case, **kwargs):
    """Loss and gradient with respect to log_probs."""
    log_probs = case[0].detach().clone().requires_grad_()
    torch.manual_seed(0)
    loss, metrics = METHODS[method](log_probs, *case[1:], **extras(method, case), **kwargs)
    loss.backward()
    return loss.detach(), log_probs.grad, metrics


# ---- arithmetic by hand -----------------------------------------------------------------------------------------------

def test_group_advantages_by_hand():
    rewards = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 1])
    a = group_advantages(rewards, 4)
    assert torch.allclose(a[:4], torch.tensor([0.75, -0.25, -0.25, -0.25]) / (0.5 + 1e-6))  # unbiased std of 1,0,0,0 is 0.5
    assert (a[4:] == 0).all()                                                                # no variance: exactly zero
    assert torch.equal(group_advantages(rewards, 4, "none")[:4], torch.tensor([0.75, -0.25, -0.25, -0.25]))
    assert torch.equal(group_advantages(rewards, 1), rewards)


def test_ppo_surrogate_by_hand():
    ratio = torch.tensor([[1.5, 0.5, 1.5, 0.5, 20.0]])
    a = torch.tensor([[1.0, 1.0, -1.0, -1.0, -1.0]])
    loss, clipped = ppo_surrogate(ratio, a, 0.2, 0.28)
    assert torch.allclose(loss, torch.tensor([[-1.28, -0.5, 1.5, 0.8, 20.0]]))
    assert clipped.tolist() == [[True, False, False, True, False]]
    loss, clipped = ppo_surrogate(ratio, a, 0.2, 0.28, dual_clip=3.0)
    assert loss[0, 4] == 3.0 and clipped[0, 4] and not clipped[0, 2]


def test_token_mean_counts_tokens_of_the_step():
    values, mask = torch.tensor([[1.0, 2.0], [3.0, math.nan]]), torch.tensor([[True, True], [True, False]])
    assert token_mean(values, mask) == 2.0
    assert token_mean(values, mask, num_tokens=12) == 0.5


def test_token_covariance_by_hand():
    cov = token_covariance(torch.tensor([[-1.0, -3.0, -9.0]]), torch.tensor([[1.0, 0.0, 5.0]]), torch.tensor([[True, True, False]]))
    assert cov.tolist() == [[0.5, 0.5, 0.0]]


def test_k3_is_kl_from_the_sampling_side():
    """E over pi of k3(pi, other) is KL(pi || other), exactly, over a whole vocabulary; the other direction is not."""
    pi, other = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64), torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    estimate = (pi * k3(pi.log(), other.log(), torch.ones(3, dtype=torch.bool))).sum()
    assert torch.isclose(estimate, (pi * (pi / other).log()).sum(), rtol=1e-12)
    assert not torch.isclose(estimate, (other * (other / pi).log()).sum(), rtol=1e-2)


def test_kl_loss_points_at_the_reference_and_k2_gives_the_gradient_of_kl():
    logits = torch.tensor([0.5, -0.2, 0.1], dtype=torch.float64, requires_grad=True)
    reference = torch.log_softmax(torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64), 0)
    log_probs = torch.log_softmax(logits, 0)
    true_gradient, = torch.autograd.grad((log_probs.exp() * (log_probs - reference)).sum(), logits, retain_graph=True)
    p = log_probs.detach().exp()
    for estimator, exact in (("k2", True), ("k3", False)):
        gradient = torch.zeros(3, dtype=torch.float64)
        for token in range(3):  # the expectation over tokens drawn from pi, on-policy
            lp = log_probs[token].view(1, 1)
            loss, _ = losses.kl_loss(lp, lp.detach(), torch.zeros_like(lp), lp > -99, ref_log_probs=reference[token].view(1, 1),
                                     kl_coef=1.0, estimator=estimator)
            gradient += p[token] * torch.autograd.grad(loss, logits, retain_graph=True)[0]
        assert torch.allclose(gradient, true_gradient, rtol=1e-10) == exact


def test_par_gradient_law_on_logits():
    """Sampled token: r (1 - pi) A; every other: -r pi A; times lambda where A > 0; zero where clipped."""
    for advantage, weight in ((2.0, 0.25), (-2.0, 1.0)):
        logits = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        lp = torch.log_softmax(logits, 0)[2].view(1, 1)
        old = lp.detach() + 0.1
        loss, _ = losses.par(lp, old, torch.full_like(lp, advantage), lp < 0, positive_weight=0.25)
        loss.backward()
        pi, r = torch.softmax(logits.detach(), 0), math.exp(-0.1)
        law = -r * pi * advantage * weight
        law[2] = r * (1 - pi[2]) * advantage * weight
        assert torch.allclose(-logits.grad, law, rtol=1e-12)
    lp = torch.full((1, 1), -1.0, dtype=torch.float64, requires_grad=True)
    losses.par(lp, lp.detach() - 0.5, torch.ones(1, 1), lp < 0, positive_weight=1.0)[0].backward()
    assert lp.grad == 0


def test_par_schedules():
    state, weights = {}, []
    for entropy in (0.5, 0.5, 0.5, 0.1, 0.1, 0.1, 0.1):
        state = losses.par_weight(state, entropy, 0.0, {}, delta=0.4)
        weights.append(round(state["positive_weight"], 6))
    assert weights == [0.4, 0.8, 1.0, 0.6, 0.2, 0.0, 0.0]
    at = lambda p, **k: losses.par_weight({}, 0.5, p, {}, **k)["positive_weight"]
    assert [at(p, schedule="stage") for p in (0.0, 0.5, 0.75)] == [0.0, 0.0, 0.5]
    assert [at(p, schedule="epoch", epochs=3) for p in (0.0, 0.34, 0.99)] == [0.0, 0.5, 1.0]
    assert at(0.3, schedule="constant", positive_weight=0.7) == 0.7


def test_steer_weights_by_hand():
    """Two tokens: the larger |Omega| gets min_weight (exp), the smaller its power; both orders and both forms."""
    p, p_old, H, A = torch.tensor([[0.5, 0.9]]), torch.tensor([[0.4, 0.9]]), torch.tensor([[1.0, 0.5]]), torch.tensor([[1.0, 1.0]])
    mask, base = torch.ones(1, 2, dtype=torch.bool), -A * (p / p_old)
    omega = A / p_old * p * (1 - p) * (p.log() + H)
    for form, size in (("released", omega.abs()), ("theorem", (omega * p).abs())):
        k = -math.log(0.8) / max(size.max().item(), 0.02)
        loss, _ = losses.steer(p.log(), p_old.log(), A, mask, old_token_entropy=H, form=form, clip_low=0.9, clip_high=9.0)
        assert torch.isclose(loss, ((-k * size).exp() * base).mean(), rtol=1e-6)
    loss, _ = losses.steer(p.log(), p_old.log(), A, mask, old_token_entropy=H, mapping="linear", clip_low=0.9, clip_high=9.0)
    weights = torch.tensor([[0.8, 1.2]]) if omega[0, 0].abs() > omega[0, 1].abs() else torch.tensor([[1.2, 0.8]])
    assert torch.isclose(loss, (weights * base).mean(), rtol=1e-6)
    same = torch.full((1, 2), 0.5)
    loss, _ = losses.steer(same.log(), same.log(), A, mask, old_token_entropy=same, mapping="linear")
    assert torch.isclose(loss, torch.tensor(-1.0))                     # all equal: the midpoint of 0.8 and 1.2


def test_scale_gradient_multiplies_the_loss_gradient_only():
    case = random_case()
    _, plain, _ = run("grpo", case)
    lp = case[0].detach().clone().requires_grad_()
    weight = torch.rand(lp.shape, dtype=lp.dtype)
    loss, _ = losses.grpo(scale_gradient(lp, weight), *case[1:])
    loss.backward()
    assert torch.allclose(lp.grad, plain * weight, rtol=1e-12) and torch.isclose(loss, losses.grpo(*case)[0], rtol=1e-12)


# ---- exact identities over a tiny vocabulary --------------------------------------------------------------------------

def test_policy_gradient_changes_entropy_as_the_theorem_says():
    """Theorem 1 of 2505.22617 on a tabular softmax: dH = -eta Cov(log pi, pi A), and by tokens, entropy.entropy_change."""
    g = torch.Generator().manual_seed(3)
    logits, A, eta = torch.randn(7, generator=g, dtype=torch.float64), torch.randn(7, generator=g, dtype=torch.float64), 1e-6
    logp = torch.log_softmax(logits, 0)
    p, H = logp.exp(), -(logp.exp() * logp).sum()
    entropy_of = lambda z: -(torch.softmax(z, 0) * torch.log_softmax(z, 0)).sum()
    gradient = p * (A - (p * A).sum())                                  # of E_pi[A] with respect to the logits
    change = (entropy_of(logits + eta * gradient) - H) / eta
    centred = lambda x: x - (p * x).sum()
    # An advantage is centred under the policy; the theorem leaves its mean out.
    A = A - (p * A).sum()
    theorem = -(p * centred(logp) * centred(p * A)).sum()
    per_token = entropy.entropy_change(logp, H.expand(7), (p * p).sum().expand(7), (p * p * logp).sum().expand(7), A)
    assert torch.isclose(change, theorem, rtol=1e-4)
    assert torch.isclose((p * per_token).sum(), theorem, rtol=1e-9)
    one = torch.autograd.functional.jvp(entropy_of, logits, torch.eye(7, dtype=torch.float64)[4] - p)[1]  # of one sampled token
    assert torch.isclose(per_token[4], A[4] * one, rtol=1e-9)


# ---- switched off, a method is GRPO, bit for bit ----------------------------------------------------------------------

NEUTRAL = {
    "clip_higher": dict(clip_high=0.2),
    "entropy_bonus": dict(entropy_coef=0.0),
    "kl_loss": dict(kl_coef=0.0),
    "clip_cov": dict(cov_low=1e9, cov_high=2e9, clip_low=0.2, clip_high=0.2),
    "steer": dict(min_weight=1.0, clip_high=0.2, dual_clip=None),
    "par": dict(positive_weight=1.0),
    "quadrant": dict(pos_likely=1.0, pos_rare=1.0, neg_likely=1.0, neg_rare=1.0),
    "grpo": {}, "aepo": {}, "clip_b": {}, "clip_v": {},  # these act on the batch or on the mask
    "w_reinforce": dict(positive_weight=2.0),            # where A = 2 on right answers and -1 on wrong ones
    "entropy_advantage": dict(alpha=0.0), "entropic": dict(alpha=0.0), "dcpo": dict(mix=0.0),
    "flex_clip": dict(upper_share=0.0, lower_share=0.0), "rand_pos_clip": dict(drop_frac=0.0),
    "fork_tokens": dict(top_frac=1.0), "adaptive_entropy": dict(entropy_coef=0.0), "aer": dict(alpha=0.0),
    "siren": dict(coef=0.0, anchor=1.0),
}
SWITCHED_ON = {  # by their controllers, that is: their defaults do nothing
    "entropic": dict(alpha=0.5, confident=0.5), "dcpo": dict(mix=0.3), "aer": dict(alpha=0.1),
    "siren": dict(anchor=0.5), "flex_clip": dict(upper_share=1.0, lower_share=1.0),
    "adaptive_entropy": dict(entropy_coef=0.1), "rand_pos_clip": dict(drop_frac=0.5), "quadrant": dict(neg_rare=0.5),
}


@pytest.mark.parametrize("method", NEUTRAL)
def test_switched_off_equals_grpo(method):
    case = random_case(dtype=torch.float32)
    if method == "w_reinforce":                                        # extras() makes all its rewards positive
        case = (*case[:2], torch.full_like(case[2], 2.0), case[3])
    loss, gradient, _ = run("grpo", case)
    off_loss, off_gradient, _ = run(method, case, **NEUTRAL[method])
    assert torch.equal(loss, off_loss) and torch.equal(gradient, off_gradient)
    if method not in ("grpo", "aepo", "clip_b", "clip_v"):             # and switched on it does something
        on_loss, on_gradient, _ = run(method, case, **SWITCHED_ON.get(method, {}))
        assert not torch.equal(loss, on_loss) or not torch.equal(gradient, on_gradient)


def test_kl_cov_is_policy_gradient_on_policy_and_not_after():
    case = random_case()
    on_policy = (case[1].clone().requires_grad_(), *case[1:])
    _, gradient, _ = run("kl_cov", on_policy, cov_frac=0.5)
    assert torch.allclose(gradient, torch.where(case[3], -case[2], 0) / case[3].sum(), rtol=1e-12)
    _, gradient, _ = run("kl_cov", case, cov_frac=0.5)
    plain = torch.where(case[3], -case[2] * importance_ratio(case[0].detach(), case[1], case[3]), 0) / case[3].sum()
    assert (gradient - plain).abs().max() > 1e-3


# ---- gradients on exactly the chosen tokens ---------------------------------------------------------------------------

def test_grpo_gradient_is_zero_exactly_where_clipped_or_padded():
    case = random_case(B=60)
    ratio, A, mask = importance_ratio(case[0].detach(), case[1], case[3]), case[2], case[3]
    clipped = (A > 0) & (ratio > 1.2) | (A < 0) & (ratio < 0.8)
    assert 0 < (clipped & mask).sum() < mask.sum()
    _, gradient, metrics = run("grpo", case)
    assert torch.equal(gradient == 0, clipped | ~mask)
    assert torch.isclose(metrics["policy/clip_frac"].float(), (clipped & mask).sum() / mask.sum(), rtol=1e-6)


def test_clip_cov_drops_only_candidates_and_as_many_as_it_says():
    case = random_case(B=60)
    cov, mask, ratio = token_covariance(case[0], case[2], case[3]), case[3], importance_ratio(case[0].detach(), case[1], case[3])
    clipped = (case[2] > 0) & (ratio > 1.2) | (case[2] < 0) & (ratio < 0.8)
    candidates = (cov > 0.3) & (cov < 1.0) & ~clipped & mask
    knobs = dict(cov_frac=0.05, cov_low=0.3, cov_high=1.0, clip_low=0.2, clip_high=0.2)
    _, plain, _ = run("grpo", case)
    _, gradient, metrics = run("clip_cov", case, **knobs)
    dropped = (gradient == 0) & (plain != 0)
    assert dropped.sum() == int(0.05 * mask.sum()) < candidates.sum() and not (dropped & ~candidates).any()
    assert torch.equal(gradient[~dropped], plain[~dropped])            # N still counts the dropped tokens
    assert torch.isclose(metrics["policy/selected_frac"].float(), dropped.sum() / mask.sum(), rtol=1e-6)
    draws = {tuple((METHODS["clip_cov"](case[0], *case[1:], **knobs)[0].item(),)) for _ in range(5)}
    assert len(draws) > 1                                              # drawn at random
    before = torch.get_rng_state()
    METHODS["clip_cov"](case[0], *case[1:], cov_low=1e9, cov_high=2e9)
    assert torch.equal(before, torch.get_rng_state())                  # no candidate, no draw


def test_kl_cov_penalises_the_largest_covariances():
    case = random_case(B=60)
    cov, mask = token_covariance(case[0], case[2], case[3]).masked_fill(~case[3], -math.inf), case[3]
    chosen = torch.zeros_like(mask).view(-1).index_fill(0, cov.flatten().topk(int(0.1 * mask.sum())).indices, True).view_as(mask)
    log_r = (case[0] - case[1]).detach()
    plain = torch.where(mask, -case[2] * log_r.exp(), 0) / mask.sum()
    _, gradient, _ = run("kl_cov", case, cov_frac=0.1, kl_coef=0.7)
    assert torch.allclose(gradient, plain + torch.where(chosen, 0.7 * log_r.sign(), 0) / mask.sum(), rtol=1e-10)
    _, gradient, _ = run("kl_cov", case, cov_frac=1e-9)
    assert (~torch.isclose(gradient, plain, rtol=1e-10)).sum() == 1    # at least one token, always


def test_par_at_zero_trains_on_wrong_answers_only():
    case = random_case()
    _, gradient, _ = run("par", case, positive_weight=0.0)
    only_wrong = (case[0], case[1], case[2].clamp(max=0), case[3])
    assert torch.equal(gradient, run("grpo", only_wrong)[1])


# ---- invariances ------------------------------------------------------------------------------------------------------

SELECTS_PER_CALL = {"clip_cov", "kl_cov", "steer", "fork_tokens", "siren"}  # a choice, maximum or mean over the call's tokens
DRAWS = {"clip_cov", "rand_pos_clip"}


def rows_of(tensors, rows):
    return {name: x[rows] if x.dim() else x for name, x in tensors.items()}


@pytest.mark.parametrize("method", METHODS)
def test_padding_changes_nothing(method):
    """Neither more padding nor what stands on it: nan, inf, whatever a model makes of a pad token."""
    case, tensors = random_case(), None
    tensors = extras(method, case)
    padded, padded_tensors = [], {}
    for x in (*case, *tensors.values()):
        if x.dim() == 0:
            padded.append(x)
            continue
        filled = torch.where(case[3], x.detach(), math.nan) if x.is_floating_point() else x
        padded.append(torch.nn.functional.pad(filled, (0, 4), value=math.inf if x.is_floating_point() else False))
    for name, x in zip(tensors, padded[4:]):
        padded_tensors[name] = x
    results = []
    for args, kwargs in ((case, tensors), (padded[:4], padded_tensors)):
        lp = args[0].detach().clone().requires_grad_()
        torch.manual_seed(0)
        loss, _ = METHODS[method](lp, *args[1:], **kwargs)
        loss.backward()
        results.append((loss.detach(), lp.grad[:, :10]))
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-12) and torch.allclose(*[g for _, g in results], rtol=1e-12)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in SELECTS_PER_CALL | DRAWS])
def test_micro_batches_add_up(method):
    case, tensors = random_case(), extras(method, random_case())
    loss, gradient, metrics = run(method, case)
    N, sums, metric_sums, gradients = case[3].sum(), 0, {}, []
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        lp = case[0].detach()[rows].clone().requires_grad_()
        part, m = METHODS[method](lp, *(x[rows] for x in case[1:]), **rows_of(tensors, rows), num_tokens=N)
        part.backward()
        sums, gradients = sums + part.detach(), gradients + [lp.grad]
        metric_sums = {k: metric_sums.get(k, 0) + v for k, v in m.items()}
    assert torch.allclose(sums, loss, rtol=1e-6) and torch.allclose(torch.cat(gradients), gradient, rtol=1e-6)
    for name, value in metrics.items():
        assert torch.allclose(metric_sums[name], value, rtol=1e-6)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in DRAWS])
def test_row_order_does_not_matter(method):
    case, tensors = random_case(), extras(method, random_case())
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    loss, gradient, _ = run(method, case)
    lp = case[0].detach()[order].clone().requires_grad_()
    shuffled, _ = METHODS[method](lp, *(x[order] for x in case[1:]), **rows_of(tensors, order))
    shuffled.backward()
    assert torch.allclose(shuffled, loss, rtol=1e-10) and torch.allclose(lp.grad, gradient[order], rtol=1e-10)


# ---- parity with the released code's numbers --------------------------------------------------------------------------

def golden():
    for i, case in enumerate(json.loads((HERE / "experiments" / "golden_losses.json").read_text())):
        for j, expected in enumerate(case["expected"]):
            yield pytest.param(case, expected, id=f"{expected['method']}-{i}-{j}")


@pytest.mark.parametrize("case, expected", list(golden()))
def test_parity_with_released_code(case, expected):
    inputs = {name: torch.tensor(value) for name, value in case["inputs"].items() if name != "group_size"}
    mask = inputs["response_mask"]
    advantages = group_advantages(inputs["rewards"].float(), case["inputs"]["group_size"])[:, None] * mask
    assert torch.allclose(advantages, torch.tensor(case["group_advantages"]), rtol=1e-5)
    lp = inputs["log_probs"].float().requires_grad_()
    tensors = {"old_token_entropy": inputs["token_entropy"]} if expected["method"] == "steer" else {}
    loss, _ = METHODS[expected["method"]](lp, inputs["old_log_probs"], inputs["advantages"], mask, **tensors, **expected["knobs"])
    loss.backward()
    assert torch.isclose(loss, torch.tensor(expected["loss"]), rtol=1e-5)
    gradient = torch.tensor(expected["grad"])
    assert torch.allclose(lp.grad, gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max().item())


# ---- every method by hand, on a right answer of four tokens (A = 2) and a wrong one of three (A = -1) ----------------

nan, ln, ln2, HALF = math.nan, math.log, math.log(2), dict(num_tokens=14)
RATIO, P_OLD = [[1, 1.5, 0.5, 3], [1, 1.5, 0.5]], [[0.4, 0.4, 0.8, 0.2], [0.9, 0.5, 0.4]]
P, A, ENTROPY = [[0.4, 0.6, 0.4, 0.6], [0.9, 0.75, 0.2]], [[2] * 4, [-1] * 3], [[0.5, 1, 0.25, 4], [0.75, 0.1, 1.5]]
LOSS, GRAD = [[-2, -2.4, -1, -2.4], [1, 1.5, 0.8]], [[-2, 0, -1, 0], [1, 1.5, 0]]        # GRPO's, per token
FREE = [[-2, -3, -1, -6], [1, 1.5, 0.5]]                                                  # -A r


def table(rows):
    """(2, 4) float64, nan on padding."""
    return torch.tensor([[*row, *[nan] * (4 - len(row))] for row in rows], dtype=torch.float64)


def each(f, *tables):
    return [[f(*x) for x in zip(*rows)] for rows in zip(*tables)]


MASK, FLAT = ~table(P).isnan(), each(lambda p: 0, P)
TENSORS = {  # by name. ref: d = -ln 2 at the second token, ln 2 at the last; hot: rho as listed; cold: rho = 4
    "token_entropy": ENTROPY, "old_token_entropy": ENTROPY, "nucleus_entropy": ENTROPY, "rewards": [[1] * 4, [0] * 3],
    "group_accuracy": [[0.25] * 4, [0.75] * 3], "ref_log_probs": each(ln, [[0.4, 0.3, 0.4, 0.6], [0.9, 0.75, 0.4]]),
    "old_hot_log_probs": each(lambda p, rho: ln(p * rho), P_OLD, [[2, 2, 0.5, 1], [9, 9, 9]]),
    "old_cold_log_probs": each(lambda p: ln(p * 4), P_OLD), "num_sequences": torch.tensor(2)}


def exactly(L, method, loss, grad, also=(), steps=(({}, 7), (HALF, 14)), **kwargs):
    """Loss and gradient of L's method are what was computed by hand per token, before the division by N. also: {tensor:
    the gradient that it must get}. In the second of the steps half of the tokens are elsewhere. Returns the metrics."""
    for step, N in steps:
        inputs = {name: TENSORS[name] for name in L.wanted_tensors(method)} | kwargs | {"log_probs": each(ln, P)}
        inputs = {k: table(v).requires_grad_() if isinstance(v, list) else v for k, v in inputs.items()}
        value, metrics = L.METHODS[method](old_log_probs=table(P_OLD).log(), advantages=table(A), response_mask=MASK,
                                           **inputs | step)
        value.backward()
        assert math.isclose(value.item(), sum(map(sum, loss)) / N, rel_tol=1e-9)
        for name, expected in (dict(also) | {"log_probs": grad}).items():
            assert torch.allclose(inputs[name].grad[MASK], table(expected)[MASK] / N, rtol=1e-9, atol=1e-12), name
    return metrics


def closed_forms():
    """(method, loss, gradient, knobs, tensors ...): every row is one calculation by hand."""
    for method, neutral in NEUTRAL.items():  # switched off it is GRPO, and both clip bounds reach it
        if "clip_low" in losses.default_knobs(METHODS[method]) and method not in ("ce_gppo", "cispo", "gspo"):
            yield method, LOSS, GRAD, neutral | dict(clip_low=0.2, clip_high=0.2)
            yield (method, [[-2, -3, -1, -3.4], [1, 1.5, 0.6]], [[-2, -3, -1, 0], [1, 1.5, 0]],
                   neutral | dict(clip_low=0.4, clip_high=0.7))
    for method in ("grpo", "steer"):
        yield (method, [[-2, -2.4, -1, -2.4], [1, 1.2, 0.8]], [[-2, 0, -1, 0], [1, 0, 0]],
               NEUTRAL[method] | dict(dual_clip=1.2))
    yield "clip_higher", [[-2, -2.56, -1, -2.56], LOSS[1]], GRAD, {}
    for method in ("entropy_bonus", "adaptive_entropy"):
        yield (method, each(lambda l, H: l - 0.1 * H, LOSS, ENTROPY), GRAD,
               dict(entropy_coef=0.1, also={"token_entropy": each(lambda p: -0.1, P)}))
    for estimator, a, da, b, db in (("k3", ln2 - 0.5, 0.5, 1 - ln2, -1), ("k2", ln2**2 / 2, ln2, ln2**2 / 2, -ln2)):
        yield ("kl_loss", [[-2, -2.4 + 2 * a, -1, -2.4], [1, 1.5, 0.8 + 2 * b]],
               [[-2, 2 * da, -1, 0], [1, 1.5, 2 * db]], dict(kl_coef=2.0, estimator=estimator))
    # cov is 0.235 at the second and fourth token, 1.569 at the last, and negative elsewhere.
    yield "clip_cov", [[-2, -3, -1, -4], [1, 1.5, 0]], [[-2, -3, -1, 0], [1, 1.5, 0]], {}
    for bounds in (dict(cov_high=1.5), dict(cov_low=1.6)):
        yield "clip_cov", [[-2, -3, -1, -4], FREE[1]], [[-2, -3, -1, 0], FREE[1]], bounds
    yield "clip_cov", LOSS, GRAD, dict(cov_low=0.2, cov_frac=1.0, clip_low=0.2, clip_high=0.2)  # clipped already: stay
    for frac, top in ((0.25, [[0] * 4, [0, 0, 1]]), (0.43, [[0, 1, 0, 1], [0, 0, 1]]), (1e-9, [[0] * 4, [0, 0, 1]])):
        yield ("kl_cov", each(lambda f, r, i: f + 2 * i * abs(ln(r)), FREE, RATIO, top),
               each(lambda f, r, i: f + 2 * i * math.copysign(1, r - 1), FREE, RATIO, top),
               dict(cov_frac=frac, kl_coef=2.0))
    # H_old = c - log p makes Omega = A r (1 - p) c; its largest here is 1.2, or 0.48 for the theorem's.
    c, omega = [[1, 1, 0, 0], [1, 1, -1]], [[1.2, 1.2, 0, 0], [0.1, 0.375, 0.4]]
    for scale, size, options in ((1, each(lambda o: o / 1.2, omega), {}), (1e-3, each(lambda o: o / 20, omega), {}),
                                 (1, [[1, 0, 0, 0], [0.09 / 0.48, 0.28125 / 0.48, 0]], dict(form="theorem")),
                                 (1, each(lambda o: o / 1.2, omega), dict(mapping="linear"))):
        weight = each(lambda s: 1.2 - 0.95 * s if "mapping" in options else 4 ** -s, size)
        yield ("steer", each(lambda w, l: w * l, weight, [[-2, -2.56, -1, -2.56], LOSS[1]]),
               each(lambda w, g: w * g, weight, GRAD),
               dict(min_weight=0.25, old_token_entropy=each(lambda x, p: scale * x - ln(p), c, P), **options))
    yield "par", [[-0.5, -0.6, -0.25, -0.6], LOSS[1]], [[-0.5, 0, -0.25, 0], GRAD[1]], dict(positive_weight=0.25)
    # quadrant: rare by p_old and H are the first token and the sixth; by p now, the third and the last would be too.
    for name, rows in (("pos_likely", [[-2, -1.2, -0.5, -1.2], LOSS[1]]), ("pos_rare", [[-1, -2.4, -1, -2.4], LOSS[1]]),
                       ("neg_likely", [LOSS[0], [0.5, 1.5, 0.4]]), ("neg_rare", [LOSS[0], [1, 0.75, 0.8]])):
        yield "quadrant", rows, each(lambda row, g: row * (g != 0), rows, GRAD), {name: 0.5}
    for up, down in ((0.5, 0.25), (1.0, 0.0), (0.0, 1.0)):  # the second is PSR, the third NSR
        rows = [[[up * x / 2 for x in right], [down * x for x in wrong]] for right, wrong in (LOSS, GRAD)]
        yield "w_reinforce", *rows, dict(positive_weight=up, negative_weight=down)
    yield "entropy_advantage", [[-2.2, -2.88, -1.05, -3.6], [0.7, 1.44, 0.4]], [[-2.2, 0, -1.05, 0], [0.7, 1.44, 0]], {}
    yield ("entropy_advantage", [[-2.5, -3, -1.125, -3], [0.75, 1.35, 0.6]], [[-2.5, 0, -1.125, 0], [0.75, 1.35, 0]],
           dict(alpha=1.0, kappa=4.0))
    yield ("entropic", [[-2, -2.4, -1.5, -2.4], [0.5, 1.5, 0.8]], [[-2, 0, -1.5, 0], [0.5, 1.5, 0]],
           dict(alpha=0.5, confident=0.6))  # of the third and the fifth token
    wrong = [[0.75, 1.125, 0.6], [0.75, 1.125, 0]]
    yield "dcpo", [[-2, -2.4, -0.8125, -2.1], wrong[0]], [[-2, 0, -0.8125, 0], wrong[1]], dict(mix=0.25, hot=1.0)
    yield "dcpo", [[-2.5, -3, -1.25, -3], wrong[0]], [[-2.5, 0, -1.25, 0], wrong[1]], dict(mix=0.25, hot=0.0)
    # flex_clip, p = 0.6 at the upper bounds: 0.35; p = 0.2 at the lower: 0.274; halfway to 0.2 at half a share.
    on, half = dict(upper_share=1.0, lower_share=1.0), dict(upper_share=0.5, lower_share=0.5)
    other = on | dict(upper_slope=-0.5, upper_offset=0.7, lower_slope=0.3, lower_offset=0.1)
    for up, low, knobs in ((0.35, 0.274, on), (0.275, 0.237, half), (0.35, 0.2, dict(upper_share=1.0)),
                           (0.4, 0.16, other), (0.36, 0.36, on | dict(narrowest=0.36)),
                           (0.25, 0.25, on | dict(widest=0.25)), (0.2, 0.2, {}), (0.1, 0.1, dict(clip=0.1))):
        yield "flex_clip", [[-2, -2 - 2 * up, -1, -2 - 2 * up], [1, 1.5, 1 - low]], GRAD, knobs
    # ce_gppo: outside the clip the value is the clipped one times beta, and the gradient is that bound too.
    wide = dict(beta_low=0.5, beta_high=2.0, clip_low=0.3, clip_high=0.4)
    for knobs, rows in ((dict(beta_high=0.5), [[-2, -1.2, -1, -1.2], [1, 1.5, 0.6]]),
                        (wide, [[-2, -5.6, -1, -5.6], [1, 1.5, 0.35]])):
        yield "ce_gppo", rows, rows, knobs
    for knobs, rows in (({}, [[-2, -2.4, -1, -2.4], [1, 1.2, 0.5]]),
                        (dict(clip_low=0.3, clip_high=0.4), [[-2, -2.8, -1.4, -2.8], [1, 1.4, 0.7]])):
        yield "cispo", each(lambda g, p: g * ln(p), rows, P), rows, knobs
    s, w = 2.25 ** (1 / 4), 0.75 ** (1 / 3)  # gspo's ratios, 1.225 and 0.909; one clip for each, then both
    for up, low, clip in ((s, w, dict(clip_low=0.1, clip_high=0.3)), (1.2, w, dict(clip_low=0.1, clip_high=0.2)),
                          (s, 0.95, dict(clip_low=0.05, clip_high=0.3)), (1.0004, 0.9997, {})):
        yield ("gspo", [[-up / 2] * 4, [low / 3] * 3], [[-s / 2 * (up == s)] * 4, [w / 3 * (low == w)] * 3],
               clip | dict(steps=(({}, 2), (HALF | dict(num_sequences=torch.tensor(4)), 4))))
    yield "rand_pos_clip", [[0] * 4, LOSS[1]], [[0] * 4, GRAD[1]], dict(drop_frac=1.0)  # N still counts them
    forks = dict(old_token_entropy=[[3, 0.1, 0.2, 0.3], [0.4, 2, 1]])
    yield ("fork_tokens", [[-2, 0, 0, 0], [0, 1.5, 0.8]], [[-2, 0, 0, 0], [0, 1.5, 0]],
           forks | dict(top_frac=7 / 16, steps=(({}, 49 / 16), (HALF, 98 / 16))))
    yield "fork_tokens", [[-2], [0]], [[-2, 0, 0, 0], [0] * 3], forks | dict(top_frac=1 / 64, steps=(({}, 7 / 64),))
    yield ("aer", [[l - 0.05 * H for l, H in zip(LOSS[0], ENTROPY[0])], LOSS[1]], GRAD,
           dict(alpha=0.1, also={"token_entropy": [[-0.05] * 4, [0] * 3]}))  # hard: half the bonus; easy: none
    yield "aer", LOSS, GRAD, dict(alpha=0.1, hard_below=0.25)
    yield "siren", LOSS, GRAD, {}
    for frac, mean, peaks in ((0.2, 2.75, [[0, 0, 0, 1], [0, 0, 1]]), (0.5, 1.8125, [[0, 1, 0, 1], [1, 0, 1]])):
        slope = 7 * 2 * 0.5 * (mean - 2) / sum(map(sum, peaks))
        yield ("siren", LOSS + [[7 * 0.5 * (mean - 2) ** 2]], GRAD, dict(
            anchor=2.0, coef=0.5, peak_frac=frac, also={"nucleus_entropy": each(lambda i: i * slope, peaks)}))


def controller_rows():
    """(method, knobs of its rule, [(entropy, progress, metrics, what the state must hold), ...] batch after batch)."""
    def rows(method, names, *values, progress=False, **knobs):
        values = values if progress else [(H, 0, *state) for H, *state in values]
        return method, knobs, [(H, at, {}, dict(zip(names.split(), state))) for H, at, *state in values]

    yield rows("par", "positive_weight", (0.2, 0.4), (9, 0.8), (9, 1), (0.1, 0.6), (0, 0.2), (0, 0), delta=0.4)
    yield rows("par", "positive_weight", (9, 0.25, 0), (9, 0.5, 0), (9, 0.75, 0.5), progress=True, schedule="stage")
    yield rows("par", "positive_weight", (9, 0, 0), (9, 0.4, 0.5), (9, 0.9, 1), epochs=3, progress=True,
               schedule="epoch")
    yield rows("par", "positive_weight", (9, 0.7), schedule="constant", positive_weight=0.7)
    yield rows("entropic", "alpha", (0.3, 0.202), (0.05, -0.05 + 0.01 * 0.15), (5, 1))
    yield rows("entropic", "alpha integral", (0.5, 0.5, 0.2), (-9, -1, -9.1), target_entropy=0.3, kp=2.0, ki=0.5)
    for H, right, mix, hot in ((0.45, 0.25, 1 / 6, 1), (0.5, 0.25, 0, 1), (0.9, 0.5, 1 / 6, 0), (0.1, 0.1, 0.5, 1)):
        yield "dcpo", {}, [(H, 0, {"reward/mean": right}, dict(mix=mix, hot=hot))]
    yield rows("aepo", "second_temperature taken_share", (0.5, 1.2, 1), (0.51, 0.8, 0.5))
    yield rows("aepo", "second_temperature", (0.2, 2), (0.4, 0.5), target_entropy=0.3, hot=2.0, cold=0.5)
    both = "upper_share lower_share"
    for schedule, upper in (("id", (1, 0.5, 0, 0, 0)), ("did", (0, 0.5, 1, 1, 1))):
        values = zip([9] * 5, (0, 0.25, 0.5, 0.75, 0.875), upper, (0, 0, 0, 0.5, 0.25))
        yield rows("flex_clip", both, *values, progress=True, schedule=schedule)
    # od, H_0 = 1: halfway the line is at 0.6. Between it and the floor at 0.2 the last state stays, at first lowering.
    yield rows("flex_clip", both, (1, 0, 0, 1), (0.5, 0.5, 0, 1), (0.2, 0.5, 1, 0), (0.5, 0.5, 1, 0), (0.61, 0.5, 0, 1),
               progress=True, schedule="od")
    yield rows("adaptive_entropy", "c entropy_coef", (0.1, 1e-4, 1e-4), (0.19, 2e-4, 2e-4), (0.2, 1e-4, 0), (9, 0, 0))
    yield rows("adaptive_entropy", "c", (0.1, 0.3), (0.1, 0.5), (0.5, 0.2), delta=0.3, max_coef=0.5)
    yield rows("aer", "alpha first_entropy", (2, 0, 2), (1, 0.003, 2), (1, 0.006, 2), (1.8, 0.005, 2), (9, 0, 2))
    seen = lambda peak: {"entropy/peak_mean": peak}
    held = dict(anchor=0.9)
    yield "siren", {}, [(9, 0, {}, {}), (9, 0, seen(0.9), held), (9, 0, seen(2), held)]


def dropped(mask_function, S=FLAT, x=ENTROPY, ranks=1, **knobs):
    """Flat places that a mask drops, for chosen S = p (log p + H) and x = H sum p^2 + sum p^2 log p - S."""
    H = each(lambda s, p: s / p - ln(p), S, P)
    old = dict(log_probs=table(P).log(), token_entropy=table(H), sum_p2=0.5 + 0 * table(P),
               sum_p2_log_p=table(each(lambda v, s, h: v + s - 0.5 * h, x, S, H)))
    mask = mask_function(old, table(A), MASK, lambda sums: ranks * sums, **knobs)
    assert not (mask & ~MASK).any()
    return (MASK & ~mask).flatten().nonzero().flatten().tolist()


def check_masks(L):
    """clip_b: S = -3.5 in each answer has z = -2.5, 1.58 of its population std (1.46 of the unbiased one).
    clip_v: x = 8 in each answer, 6 in the wrong one: 2.17 and 1.63 of the std (1.51 for the unbiased one)."""
    S, x = [[0, 0, 0, -3.5], [0, 0, -3.5]], [[8, 0, 0, 0], [0, 6, 8]]
    for ranks, mu, expected in ((1, 1.55, [6]), (2, 1.55, [6]), (1, 1.6, []), (1, 2.5, [])):
        assert dropped(L.clip_b_mask, S, mu=mu, ranks=ranks) == expected
    assert dropped(L.clip_b_mask, each(lambda s: -s, S), mu=1.5) == []
    assert dropped(L.clip_b_mask, [[-2, -2, -2, -2], [-2, -2, -2.7]], mu=2.4) == [6]  # the mean is taken off
    for mu, most, expected in ((1.55, 0.45, [5, 6]), (1.55, 0.3, [5, 6]), (1.55, 0.15, [6]), (1.7, 0.3, [6]),
                               (2.2, 1, []), (1.55, 1e-4, [])):
        for other_S in (FLAT, [[0, 3, -3, 0], [3, 0, 1]]):
            assert dropped(L.clip_v_mask, other_S, x, mu=mu, most_frac=most) == expected
    assert dropped(L.clip_v_mask, x=each(lambda v: -v, x), mu=1.0, most_frac=1.0) == []


def check_draws(L):
    """Clip-Cov takes any of its three candidates; rand_pos_clip a share of the right answers' tokens."""
    for count, frac in ((1, 0.25), (2, 0.375)):
        drawn = set()
        for seed in range(30):
            torch.manual_seed(seed)
            lp = table(P).log().requires_grad_()
            L.clip_cov(lp, table(P_OLD).log(), table(A), MASK, cov_low=0.2, cov_frac=frac, clip_high=9.0)[0].backward()
            drawn.add(tuple((lp.grad == 0)[MASK].nonzero().flatten().tolist()))
        assert len(drawn) == 3 and {len(places) for places in drawn} == {count}
    lp, sign = torch.full((2, 5000), -1.0, requires_grad=True), torch.tensor([[1.0], [-1.0]]).expand(2, 5000)
    L.rand_pos_clip(lp, lp.detach(), sign, sign != 0, drop_frac=0.3)[0].backward()
    assert 0.27 < (lp.grad[0] == 0).float().mean() < 0.33 and (lp.grad[1] != 0).all()


def check_shared_lines(L):
    advantages = L.group_advantages(torch.tensor([1.0, 0, 0, 0, 1, 1]), 3)
    assert torch.allclose(advantages[:3], torch.tensor([2.0, -1, -1]) / 3**0.5)
    far, near = torch.tensor([0.0, -99.0, nan]), torch.tensor([-99.0, 0.0, 0.0])
    assert L.log_ratio(far, near, torch.tensor([True, True, False])).tolist() == [20, -20, 0]
    metrics = {method: exactly(L, method, *row) for method, *row in (("grpo", LOSS, GRAD), ("flex_clip", LOSS, GRAD))}
    assert all(math.isclose(m["policy/clip_frac"], 3 / 14, rel_tol=1e-6) for m in metrics.values())
    knobs = dict(anchor=2.0, coef=0.0, nucleus_entropy=table(ENTROPY), num_tokens=14)
    peak = L.siren(table(P).log(), table(P_OLD).log(), table(A), MASK, **knobs)[1]["entropy/peak_mean"]
    assert math.isclose(peak, 2.75 / 2, rel_tol=1e-9)                  # a share of the step: micro-batches add up


def check(L, method):
    """Everything above that is about one method, of a losses.py L."""
    for name, loss, grad, knobs in closed_forms():
        if name == method:
            exactly(L, method, loss, grad, **knobs)
    for name, knobs, rows in controller_rows():
        state = {}
        for H, progress, metrics, expected in rows if name == method else ():
            state = L.CONTROLLERS[method](state, H, progress, metrics, **knobs)
            assert {k: state[k] for k in expected} == pytest.approx(expected, abs=1e-12, nan_ok=True)
    for names, more in ((("clip_b", "clip_v"), check_masks), (("clip_cov", "rand_pos_clip"), check_draws),
                        (("grpo", "flex_clip", "siren"), check_shared_lines)):
        if method in names:
            more(L)


@pytest.mark.parametrize("method", METHODS)
def test_by_hand(method):
    assert any(row[0] == method for row in closed_forms())
    check(losses, method)


def test_gradient_of_grpo_but_not_its_value():
    """CE-GPPO without its betas; on-policy CISPO, and GSPO where all answers are as long."""
    case = random_case(dtype=torch.float32)
    loss, gradient, _ = run("grpo", case)
    off_loss, off_gradient, _ = run("ce_gppo", case, beta_low=0.0, beta_high=0.0)
    assert torch.equal(gradient, off_gradient) and not torch.equal(loss, off_loss)
    on_policy = (case[1].clone(), *case[1:3], case[3] | True)
    gradient, of_cispo, of_gspo = (run(method, on_policy)[1] for method in ("grpo", "cispo", "gspo"))
    assert torch.equal(gradient, of_cispo) and torch.allclose(gradient, of_gspo, rtol=1e-5)


@pytest.mark.parametrize("method", losses.MASKS)
def test_a_huge_mu_keeps_every_token(method):
    S, x = [[0, 0, 0, -3.5], [0, 0, -3.5]], [[8, 0, 0, 0], [0, 6, 8]]
    knobs = dict(S=S) if method == "clip_b" else dict(x=x, most_frac=1.0)
    assert dropped(losses.MASKS[method], mu=0.5, **knobs) and not dropped(losses.MASKS[method], mu=1e9, **knobs)


# ---- identities of single methods ------------------------------------------------------------------------------------

def test_flex_clip_bounds_are_the_closed_form():
    """With p = r pi_old, r = 1 + a p + b at (1 + b) / (1 - a pi_old), r = 1 - a p - b at (1 - b) / (1 + a pi_old)."""
    for p_old in (0.05, 0.3, 0.7):
        for sign, r in ((1, 1.5 / (1 + 0.25 * p_old)), (-1, 0.7 / (1 - 0.13 * p_old))):
            for factor, free in ((1 - sign * 1e-9, True), (1 + sign * 1e-9, False)):
                old = torch.tensor([[p_old]], dtype=torch.float64).log()
                lp = (old + ln(r * factor)).requires_grad_()
                losses.flex_clip(lp, old, torch.full_like(old, sign), old < 0, upper_share=1.0, lower_share=1.0,
                                 narrowest=-9.0, widest=9.0)[0].backward()
                assert (lp.grad != 0) == free


def test_gspo_does_not_see_the_length():
    """An answer whose tokens are all repeated has the same loss, and the same gradient in total."""
    case = random_case(spread=2e-3)
    case = (*case[:3], case[3] | True)
    (loss, gradient, _), (long_loss, long_gradient, _) = (
        run("gspo", [x.detach().repeat_interleave(k, dim=1) for x in case]) for k in (1, 3))
    assert torch.isclose(loss, long_loss, rtol=1e-12)
    assert torch.allclose(gradient.sum(1), long_gradient.sum(1), rtol=1e-9)
    assert 0 < (gradient.sum(1) != 0).sum() < len(gradient)            # some answers are clipped, as a whole


# ---- which way one real step moves the entropy: random softmaxes, all actions enumerated -----------------------------

def entropies_after(z, right, *terms):
    """Entropy (n,) of softmaxes with logits z (n, V) after a small step on the expected loss.
    Each of terms: (method, probabilities (n, V) of drawing the actions, advantages or None for GRPO's, kwargs)."""
    z = z.clone().requires_grad_()
    logp, p = torch.log_softmax(z, 1), torch.softmax(z.detach(), 1)
    accuracy = (p * right).sum(1, keepdim=True)
    centred = (right - accuracy) / (accuracy * (1 - accuracy)).sqrt()
    for method, drawn, advantages, kwargs in terms:
        METHODS[method](scale_gradient(logp, drawn), logp.detach(), centred if advantages is None else advantages,
                        p > -1, num_tokens=1, **kwargs)[0].backward(retain_graph=True)
    logp = torch.log_softmax(z.detach() - 1e-3 * z.grad, 1)
    return -(logp.exp() * logp).sum(1)


def softmaxes(share_right, confident=False, n=1000, V=16):
    g = torch.Generator().manual_seed(0)
    z, right = 2 * torch.randn(n, V, generator=g).double(), (torch.rand(n, V, generator=g) < share_right).double()
    z[:, 0] += 12 if confident else 0
    p = torch.softmax(z, 1)
    mixed = ((p * right).sum(1) - 0.5).abs() < 0.5 - 1e-9
    return z[mixed], right[mixed], p[mixed]


def test_entropic_steers_every_confident_softmax():
    """Above the target each confident softmax ends lower than after GRPO's step, below it higher: no exception."""
    z, right, p = softmaxes(0.5, confident=True)
    sure = p[:, 0] > 0.95
    assert sure.sum() > 800
    plain = entropies_after(z, right, ("grpo", p, None, {}))
    for entropy, sign in ((0.5, -1), (0.02, 1)):
        alpha = losses.entropic_alpha({}, entropy, 0.0, {})["alpha"]
        moved = entropies_after(z, right, ("entropic", p, None, dict(alpha=alpha))) - plain
        assert (sign * moved[sure] > 0).all()


def test_aepo_steers_the_mean_of_softmaxes():
    """Its second term is E_{o ~ pi^T}[grad log pi(o) R]. Added to GRPO's step, T = 1.2 raises the entropy and T = 0.8
    lowers it in the mean over random softmaxes, but not in each: hot, 85, 61 and 90 % rise (with 10, 50, 90 % of the
    actions right); cold, only 15, 51 and 85 % fall, since learning from right actions has an effect of its own.
    Against this same term at T = 1 it holds in 97 % and more."""
    for share_right in (0.1, 0.5, 0.9):
        z, right, p = softmaxes(share_right)
        plain, after = entropies_after(z, right, ("grpo", p, None, {})), {}
        for T in (1.2, 1.0, 0.8):
            after[T] = entropies_after(z, right, ("grpo", p, None, {}), ("aepo", torch.softmax(z / T, 1), right, {}))
        for entropy, sign in ((0.4, 1), (0.6, -1)):                    # below the target, above it
            T = losses.aepo_temperature({}, entropy, 0.0, {})["second_temperature"]
            assert sign * (after[T] - plain).mean() > 0
            assert (sign * (after[T] - after[1.0]) > 0).double().mean() > 0.95
    leaf = z.clone().requires_grad_()
    estimator, = torch.autograd.grad((torch.softmax(z / 1.2, 1) * right * torch.log_softmax(leaf, 1)).sum(), leaf)
    lp = torch.log_softmax(leaf, 1)
    losses.aepo(scale_gradient(lp, torch.softmax(z / 1.2, 1)), lp.detach(), right, p > 0, num_tokens=1)[0].backward()
    assert torch.allclose(-leaf.grad, estimator, rtol=1e-9, atol=1e-12)


def test_dcpo_steers_only_against_its_own_term():
    """The hot term leaves the entropy above, the cold one below the same step at T = 1 (rho = 1), in 97 % and more.
    Against GRPO's step only the mean effect of the cold one has its sign everywhere: with 10 % of the actions right the
    hot one lowers the entropy too, in the mean and in 85 % of the softmaxes; with 90 % right it does raise it."""
    for share_right in (0.1, 0.5, 0.9):
        z, right, p = softmaxes(share_right)
        logp, (hot, cold) = p.log(), (torch.log_softmax(z / T, 1) for T in (1.2, 0.8))
        step = lambda hot, cold, heat: entropies_after(z, right, ("dcpo", p, None, dict(
            rewards=right, old_hot_log_probs=hot, old_cold_log_probs=cold, mix=0.1, hot=heat)))
        plain, at_one = entropies_after(z, right, ("grpo", p, None, {})), step(logp, logp, 1.0)
        means = []
        for entropy, sign in ((0.4, 1), (0.6, -1)):
            after = step(hot, cold, losses.dcpo_mix({}, entropy, 0.0, {"reward/mean": 0.5})["hot"])
            assert (sign * (after - at_one) > 0).double().mean() > 0.95
            means.append((after - plain).mean())
        assert means[1] < 0 and (share_right == 0.5 or (means[0] > 0) == (share_right == 0.9))


# ---- controllers and aepo's second sample ----------------------------------------------------------------------------

@pytest.mark.parametrize("method, knobs", [(m, {}) for m in losses.CONTROLLERS] + [("flex_clip", dict(schedule="od"))])
def test_a_controller_goes_on_after_a_round_trip(method, knobs):
    peaks = [{}] + [{"entropy/peak_mean": 1 / i} for i in range(1, 12)]  # nothing was updated before the first batch
    batches = [(0.5 + 0.4 * math.cos(i), i / 12, {"reward/mean": 0.1 + i / 20} | peaks[i]) for i in range(12)]
    one, two = (losses.Controller(losses.CONTROLLERS[method], knobs) for _ in range(2))
    for i, batch in enumerate(batches):
        one.update(*batch)
        two.update(*batch)
        buffer = io.BytesIO()
        torch.save(two.state_dict(), buffer)
        buffer.seek(0)
        two = losses.Controller(losses.CONTROLLERS[method], knobs)
        two.load_state_dict(json.loads(json.dumps(torch.load(buffer, weights_only=True))))
        assert json.dumps(one.state) == json.dumps(two.state)          # as text, where nan equals nan
        assert all(type(value) in (int, float) for value in one.state.values())
    one.state_dict().clear()
    assert one.state                                                   # a copy, not the state itself


def second_sample(monkeypatch, state, ranks=1, prompts=8):
    """Answers, groups of 4, before and after mixing, and what the engine was asked for. Half of each group is good."""
    made, asked = lambda name, i, seed: dict(problem=name, prompt=[1], seed=seed, response=[i], log_probs=[-1.0],
                                             advantage=(0.05, 0.06, -1.0, 0.9)[i], reward=1.0), {}

    def answer(engine, tokenizer, problems, prompts, seeds, **options):
        asked.update(options, problems=problems, seeds=seeds)
        return [[made("second " + name, i, seed) for i in range(4)] for name, seed in zip(problems, seeds)]

    monkeypatch.setattr(rollout, "answer", answer)
    monkeypatch.setattr(rollout.dist, "get_world_size", lambda: ranks)
    before = [made(f"problem {g}", i, 4 * g) for g in range(prompts) for i in range(4)]
    after = list(before)
    cfg = types.SimpleNamespace(group_size=4, max_response_len=9, adv_norm="std", temperature=0.7)
    rollout.mix_second_sample(None, None, after, state, cfg)
    return before, after, asked


def test_second_sample_takes_the_first_rows(monkeypatch):
    for rows, ranks, replaced in ((60, 1, 4), (3, 1, 3), (6, 2, 3), (0, 1, 0)):
        before, after, asked = second_sample(monkeypatch, dict(second_temperature=1.2, most_rows=rows, taken_share=1.0), ranks)
        assert asked["problems"] == ["problem 0", "problem 1"] and asked["n"] == 4 and asked["max_tokens"] == 9
        seeds = {a["seed"] + i for a in before for i in range(4)}
        assert len({*asked["seeds"]}) == 2 and not seeds & {*asked["seeds"]} and asked["temperature"] == 0.7 * 1.2
        assert [a is b for a, b in zip(before, after)] == [False] * replaced + [True] * (32 - replaced)
        for new, place in zip(after[:replaced], (1, 3, 1, 3)):         # advantage over 0.05: the second and the fourth
            assert new["problem"].startswith("second") and new["response"] == [place] and new["advantage"] == 1.0
            assert all(map(math.isnan, new["log_probs"]))


def test_above_the_target_aepo_replaces_half_of_what_it_kept(monkeypatch):
    for entropy, replaced in ((0.4, 4), (0.6, 2)):
        before, after, _ = second_sample(monkeypatch, losses.aepo_temperature({}, entropy, 0.0, {}))
        assert sum(a is not b for a, b in zip(before, after)) == replaced


# ---- mutants: one line of losses.py changed, and test_by_hand turns red ----------------------------------------------

MUTANTS = {  # method: (text that stands once in the code of its functions, what replaces it)
    "grpo": [(".sum() / count", ".sum() / response_mask.numel()"),
        ("count = response_mask.sum() if num_tokens is None else num_tokens", "count = response_mask.sum()"),
        ("groups.std(dim=1, keepdim=True)", "groups.std(dim=1, keepdim=True, unbiased=False)"),
        ("(1.0 - clip_low, 1.0 + clip_high)", "(1.0 - clip_high, 1.0 + clip_low)"),
        ("log_probs - old_log_probs, 0.0", "old_log_probs - log_probs, 0.0"), ("clamp(-20.0, 20.0)", "clamp(-20.0)"),
        ("clip_low, clip_high, dual_clip)", "clip_low, clip_high)"), ("torch.maximum(free", "torch.minimum(free"),
        ("(advantages < 0) & (token", "(advantages > 0) & (token"), ("bounded > free", "bounded >= free")],
    "clip_higher": [("clip_high=0.28", "clip_high=0.2"),
        ("clip_low=clip_low, clip_high=clip_high", "clip_low=clip_high, clip_high=clip_high")],
    "entropy_bonus": [("loss - entropy_coef", "loss + entropy_coef"),
        ("token_mean(token_entropy, response_mask, num_tokens)", "token_mean(token_entropy, response_mask)"),
        ("token_mean(token_entropy,", "token_mean(token_entropy.detach(),")],
    "kl_loss": [("loss + kl_coef", "loss - kl_coef"), (".square() / 2", ".square()"),
        ("k3(log_probs, ref_log_probs, response_mask)", "k3(ref_log_probs, log_probs, response_mask)"),
        ('if estimator == "k3" else', 'if estimator != "k3" else'), ("d.exp() - 1.0 - d", "d.exp() - 1.0 + d")],
    "clip_cov": [("torch.randperm(", "torch.arange("), ("(cov < cov_high)", "(cov < 5.0)"),
        ("int(cov_frac * int(response_mask.sum()))", "int(cov_frac * response_mask.numel())"),
        ("centred_log_probs * centred_advantages", "log_probs * centred_advantages"),
        ("response_mask & ~clipped & (cov", "response_mask & (cov"), ("(cov > cov_low)", "(cov < cov_low)")],
    "kl_cov": [("cov.flatten().topk(count)", "cov.flatten().topk(count, largest=False)"),
        ("-advantages * log_r.exp()", "-advantages * log_r.exp().clamp(0.0, 2.0)"),
        ("max(1, int(cov_frac", "max(0, int(cov_frac"), ("kl_coef * log_r.abs()", "kl_coef * log_r")],
    "steer": [("clip_low, clip_high, dual_clip)", "clip_low, clip_high)"),
        ("where(clipped, 0.0, omega * p)", "where(clipped, omega * p, omega * p)"), ("high.clamp(min=0.02)", "high"),
        ("log_probs + old_token_entropy)", "log_probs - old_token_entropy)"), ("(1.0 - p) *", "p *"),
        ("(size - low) / (high - low)", "(high - size) / (high - low)")],
    "par": [("max(epochs - 1, 1)", "epochs"),
        ("-delta if entropy < target_entropy else delta", "delta if entropy < target_entropy else -delta"),
        ("advantages > 0, positive_weight", "advantages < 0, positive_weight"), ("2.0 * progress - 1.0", "progress"),
        ("positive_weight * advantages", "positive_weight"), ("+ step, 0.0), 1.0)", "+ step, 0.0), 9.0)")],
    "quadrant": [("likely = old_log_probs", "likely = log_probs"), ("old_token_entropy > 0", "old_token_entropy < 0"),
        ("pos_likely, pos_rare)", "pos_rare, pos_likely)"), ("neg_likely, neg_rare)", "neg_rare, neg_likely)"),
        ("advantages > 0, right", "advantages < 0, right")],
    "w_reinforce": [("positive_weight, -negative_weight)", "positive_weight, -1.0)"),
        ("rewards > 0, positive_weight", "rewards > 1, positive_weight"), ("-negative_weight)", "negative_weight)")],
    "entropy_advantage": [("advantages.abs() / kappa", "advantages / kappa"), ("torch.minimum(", "torch.maximum("),
        ("advantages + torch.minimum", "advantages - torch.minimum"), ("advantages.abs() / kappa", "advantages.abs()")],
    "entropic": [("1.0 + alpha", "1.0 - alpha"), ("-1.0), 1.0)", "-1.0), 9.0)"),
        ("error = entropy - target_entropy", "error = target_entropy - entropy"), ("ki * integral", "ki * error"),
        ("old_log_probs.exp() > confident", "old_log_probs.exp() < confident"), ("alpha * advantages.sign()", "alpha")],
    "dcpo": [("mix * (rewards > 0) * rho", "mix * rho"),
        ("(tempered, old_log_probs, response_mask)", "(old_log_probs, tempered, response_mask)"),
        ("old_hot_log_probs if hot else old_cold_log_probs", "old_hot_log_probs"), ("a0 / (1.0 + a0)", "a0"),
        ("entropy <= target_entropy", "entropy > target_entropy"), ("(1.0 - mix) * advantages", "advantages")],
    "aepo": [("clip_low=clip_low, clip_high=clip_high", "clip_low=clip_high, clip_high=clip_high"),
        ("entropy <= target_entropy", "entropy < target_entropy"), ("hot if low else cold", "cold if low else hot"),
        ("1.0 if low else 0.5", "0.5 if low else 1.0")],
    "flex_clip": [("clip + lower_share * (lower - clip)", "clip"),
        ("(lower_slope * p + lower_offset)", "(upper_slope * p + upper_offset)"), ("entropy <= low", "entropy < low"),
        ("1.0 - lam if first_half else 1.0", "lam if first_half else 1.0"), ('state.get("upper_share", 0.0)', "0.0"),
        ("clip + upper_share * (upper - clip)", "upper_share * upper"),
        ('lam if first_half else 0.0, "lower', 'lam, "lower'), ("upper_slope * p + upper_offset", "upper_offset")],
    "ce_gppo": [("(advantages < 0)", "(advantages > 0)"), ("ratio / ratio.detach()", "ratio"),
        ("beta_low * (1.0 - clip_low)", "(1.0 - clip_low)"), ("beta_high * (1.0 + clip_high)", "beta_high")],
    "cispo": [("1.0 - clip_low", "1.0 - clip_high"),
        ("-bounded * advantages", "-weight * advantages"), ("response_mask).detach()", "response_mask)")],
    "gspo": [
        ("lengths, response_mask, num_sequences)", "lengths, response_mask, num_tokens)"), ("log_s.detach()", "log_s"),
        ("log_r.sum(1, keepdim=True) / lengths", "log_r.sum(1, keepdim=True)"), ("token_loss / lengths", "token_loss")],
    "rand_pos_clip": [
        ("(advantages > 0)", "(advantages < 0)"), (") < drop_frac)", ") > drop_frac)"), ("(advantages > 0) & (", "(")],
    "fork_tokens": [("max(1, int(top_frac", "max(0, int(top_frac"), ("tokens = top_frac * (", "tokens = ("),
        ("advantages, forks,", "advantages, response_mask,"), (".topk(count)", ".topk(count, largest=False)")],
    "clip_b": [("-mu * std", "mu * std"), ("S - mean <", "S <"),
        ("second / count", "second / (count - 1)"), ("(advantages < 0) & (S", "(S"), ("log_p + old", "log_p - old")],
    "clip_v": [
        ("x.topk(int(most_frac * int(response_mask.sum())))", "x.topk(len(x))"), ("(advantages < 0) & (x", "(x"),
        ("- log_p.exp() * (log_p + H)", "- log_p.exp() * log_p"), ("x > mu * std", "x > mu"), ("H * old", "old")],
    "adaptive_entropy": [("0.0), max_coef)", "0.0), 5e-3)"), ("c if low else 0.0", "c"),
        ("delta if low else -delta", "-delta if low else delta"), ("entropy_coef=entropy_coef", "entropy_coef=0.0")],
    "aer": [("(hard_below - group_accuracy)", "(group_accuracy - hard_below)"),
        ("target_ratio * first - entropy", "entropy - target_ratio * first"), ("loss - alpha", "loss + alpha"),
        (".clamp(min=0.0) / hard_below", ".clamp(min=0.0)"), ('state.get("first_entropy", entropy)', "entropy")],
    "siren": [("mean - anchor", "mean"), ("coef * share", "coef"),
        ("if anchor is None else {", "if anchor is not None else {"), ("share * mean.detach()}", "mean.detach()}"),
        ("torch.ceil(peak_frac", "torch.floor(peak_frac"), ("descending=True", "descending=False")],
}
SHARED = {"grpo": ["group_advantages", "log_ratio", "ppo_surrogate", "token_mean"], "kl_loss": ["k3"],
          "clip_cov": ["token_covariance"], "clip_b": ["batch_mean_std"]}


def mutated(method, old, new):
    """losses.py as a module, with one line of one method's functions changed."""
    source = Path(losses.__file__).read_text()
    names = [f.__name__ for functions in (METHODS, losses.CONTROLLERS, losses.MASKS) if (f := functions.get(method))]
    lines, places = source.splitlines(), []
    for node in ast.parse(source).body:
        if getattr(node, "name", None) in names + SHARED.get(method, []):
            code = set(range(node.lineno - 1, node.end_lineno))
            if ast.get_docstring(node):
                code -= set(range(node.body[0].lineno - 1, node.body[0].end_lineno))
            places += [n for n in code for _ in range(lines[n].count(old))]
    assert len(places) == 1, f"{method}: {old!r} stands {len(places)} times in {names}"
    lines[places[0]] = lines[places[0]].replace(old, new)
    module = types.ModuleType("mutant")
    exec(compile("\n".join(lines), "mutant", "exec"), module.__dict__)
    return module


def test_every_mutant_is_killed():
    assert MUTANTS.keys() == METHODS.keys() and min(map(len, MUTANTS.values())) >= 2
    alive = []
    for method, old, new in ((method, *pair) for method, pairs in MUTANTS.items() for pair in pairs):
        mutant = mutated(method, old, new)
        try:
            check(mutant, method)
            alive.append((method, old, new))
        except Exception:                                              # an AssertionError, or no gradient at all
            pass
    assert not alive
    print(sum(map(len, MUTANTS.values())), "mutants of", len(MUTANTS), "methods, all killed")


# ---- knobs ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method, setting, complaint", [
    ("clip_kov", "", "Methods: .*clip_cov"), ("clip_cov", "cov_fraction=1e-2", "cov_frac=0.0002"),
    ("clip_cov", "cov_frac=20", "not per cent"), ("clip_cov", "cov_frac=many", "a number"), ("steer", "mapping=cubic", "exp"),
    ("par", "schedule=weekly", "stage")])
def test_bad_knobs_are_refused_with_what_there_is(method, setting, complaint):
    with pytest.raises(ValueError, match=complaint):
        losses.parse_knobs(method, [setting] if setting else [])


def test_knobs_reach_loss_and_controller():
    loss_knobs, rule_knobs, _ = losses.parse_knobs("par", ["positive_weight=0.3", "schedule=constant", "clip_high=0.25"])
    assert loss_knobs["clip_high"] == 0.25 and rule_knobs["schedule"] == "constant" and rule_knobs["positive_weight"] == 0.3
    assert losses.parse_knobs("steer", ["dual_clip=none"])[0]["dual_clip"] is None


# ---- the embedded task ------------------------------------------------------------------------------------------------

def reachable(numbers):
    """Every value of four numbers under + - *, by taking pairs away: another way than tiny.py's."""
    if len(numbers) == 1:
        return set(numbers)
    values = set()
    for a, b in itertools.combinations(range(len(numbers)), 2):
        x, y, rest = numbers[a], numbers[b], [n for i, n in enumerate(numbers) if i not in (a, b)]
        for z in {x + y, x - y, y - x, x * y}:
            values |= reachable(rest + [z])
    return values


def test_problems_are_deterministic_nested_disjoint_and_solvable():
    train, test = tiny.problems("train", 2000), tiny.problems("test", 500)
    assert train[:100] == tiny.problems("train", 100) and test == tiny.problems("test", 500)
    assert train[0].prompt == "1 5 7 13=26:" and test[0].prompt == "2 9 10 11=20:"                  # in another process too
    other = {p.prompt for seed in (1, 2) for p in tiny.problems("train", 2000, seed)}
    assert len({p.prompt for p in train}) == 2000 and not {p.prompt for p in test} & (other | {p.prompt for p in train})
    assert {p.prompt for p in train} != {p.prompt for p in tiny.problems("train", 2000, 1)}
    for p in train[:40] + test[:40]:
        numbers, target = json.loads(p.answer)["numbers"], json.loads(p.answer)["target"]
        assert p.prompt == f"{' '.join(map(str, sorted(numbers)))}={target}:" and p.rule == "countdown"
        assert len(numbers) == 4 and set(numbers) <= set(range(1, 14)) and 1 <= target <= 99
        assert target in reachable(numbers)
    for bad in (("dev", 1), ("train", 5001), ("test", -1)):
        with pytest.raises(ValueError):
            tiny.problems(*bad)


def test_solutions_reach_the_target_and_parentheses_are_needed():
    rng = random.Random(0)
    value = lambda text: eval(re.sub(r"\d+", lambda n, row=iter((101, 1009, 20011, 300007)): str(next(row)), text))
    for numbers, target, text in (tiny.random_solution(rng) for _ in range(2000)):
        leaves = sorted(n.value for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Constant))
        assert leaves == numbers and eval(text) == target and 1 <= target <= 99 and len(text) <= 15
        opened = []
        for j, c in enumerate(text):
            if c == "(":
                opened.append(j)
            elif c == ")":
                i = opened.pop()
                assert value(text[:i] + text[i + 1:j] + text[j + 1:]) != value(text)


def test_batches_train_on_the_answer_alone_and_never_on_a_test_problem():
    test, seen = {p.prompt for p in tiny.problems("test", 2000)}, set()
    token = {i: t for t, i in tiny.VOCAB.items()}
    for ids, labels in itertools.islice(tiny.supervised_batches(random.Random(0), 32), 100):
        for row, label in zip(ids.tolist(), labels.tolist()):
            text = "".join(token[i] for i in row).replace(tiny.PAD, "")
            answer = "".join(token[i] for i in label if i != -100)
            prompt = text[:text.index(":") + 1]
            assert text == prompt + answer and answer.endswith(tiny.EOS)
            assert eval(answer[:-len(tiny.EOS)]) == int(prompt[prompt.index("=") + 1:-1])
            assert all(b in (-100, a) for a, b in zip(row, label))
            seen.add(prompt)
    assert len(seen) > 2000 and not seen & test


def test_each_size_of_the_tiny_model_trains_with_its_own_base_and_the_default_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tiny, "TRAINING", tiny.TRAINING | dict(steps=3, batch=4))
    train.main("--model tiny-mini --steps 1 --prompts_per_step 4 --group_size 2 --eval_data none --engine torch".split())
    config = json.loads(Path("runs/grpo-tiny-mini-seed0/config.json").read_text())
    assert config["max_response_len"] == tiny.DEFAULTS["max_response_len"] and config["updates_per_rollout"] == 4
    shape = json.loads(Path("runs/grpo-tiny-mini-seed0/checkpoint-1/config.json").read_text())
    assert shape["hidden_size"] == tiny.SIZES["tiny-mini"]["hidden_size"] != tiny.SIZES["tiny"]["hidden_size"]


def test_base_is_made_once_complete_or_not_at_all_and_leaves_the_caller_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "TRAINING", tiny.TRAINING | dict(steps=3, batch=4))
    states = lambda: (random.getstate(), torch.get_rng_state().tolist(), torch.get_num_threads())
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    before = states()
    with monkeypatch.context() as patch:                                                 # killed while saving
        patch.setattr(tiny, "make_tokenizer", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tiny.base_model(str(tmp_path / "base"), progress=False)
    assert all(name.endswith(".tmp") for name in os.listdir(tmp_path))
    path = tiny.base_model(str(tmp_path / "base"), progress=False)
    assert states() == before
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    again = tiny.base_model(str(tmp_path / "other"), progress=False)                     # deterministic
    a, b = (AutoModelForCausalLM.from_pretrained(p).state_dict() for p in (path, again))
    assert all(torch.equal(a[k], b[k]) for k in a) and a["lm_head.weight"].data_ptr() == a["model.embed_tokens.weight"].data_ptr()
    with monkeypatch.context() as patch:
        patch.setattr(tiny, "train_base", lambda *_: 1 / 0)
        assert tiny.base_model(str(tmp_path / "base"), progress=False) == path           # cached
        patch.setitem(tiny.TRAINING, "lr", 1.0)                                          # other settings, another base
        with pytest.raises(ZeroDivisionError):
            tiny.base_model(str(tmp_path / "base"), progress=False)
    tokenizer = AutoTokenizer.from_pretrained(path)
    for text in [p.prompt for p in tiny.problems("test", 200)] + ["(11+10)*(12-3)", "7*(5-(3-2))"]:
        ids = tokenizer(text)["input_ids"]
        assert ids == [tiny.VOCAB[c] for c in text] and tokenizer.decode(ids) == text
    generation = AutoModelForCausalLM.from_pretrained(path).generation_config
    assert tokenizer.eos_token_id == generation.eos_token_id == tiny.VOCAB[tiny.EOS] != tokenizer.pad_token_id


# ---- verifier: a table, hostile answers, loaders ----------------------------------------------------------------------

ROWS = r"""
right | 34 | 34 ;; 1,234 | 1234 ;; 1{,}234 | 1234 ;; 11,\!111,\!100 | 11111100 ;; 1\,234 | 1,234 ;; 34.0 | 34 ;; $34$. | 34
right | x = 34 | 34 ;; N = \frac{68}{2} = 34 | 34 ;; m+n = 34 | 34 ;; \$34 | 34 ;; 34 \text{ cm}^2 | 34 ;; \(34\) | 34
right | 34 \mathrm{~m/s^{2}} | 34 ;; 34 dollars | 34 ;; 34^{\circ} | 34 ;; 62.5 | 62.5\% ;; 0.625 | 62.5% ;; 50\% | 0.5
right | \dfrac12 | \frac{1}{2} ;; 0.5 | \frac{1}{2} ;; 1/2 | 0.5 ;; 1\frac{4}{5} | 9/5 ;; -\frac{1}{3} | \frac{-1}{3} ;; (5) | 5
right | 4.5 \times 10^{33} | 4.5e33 ;; 10^{-5} | 1e-5 ;; .5 | 0.50 ;; \frac{270}7 | \frac{270}{7} ;; \text{(C)} | C ;; C | (C)
right | \text{ Evelyn } | Evelyn ;; East | east ;; 3, 1 | 1,3 ;; \{1, 3\} | 3,1 ;; 1 \text{ and } 3 | 1,3 ;; \text{even} | even
right | \left( 1, \frac{1}{2} \right) | (1,0.5) ;; (1,2),(3,4) | (3,4), (1,2) ;; [-2, 7] | [-2,7] ;; x \in [-2,7] | [-2,7]
right | (3,\infty)\cup(-\infty,2) | (-\infty,2)\cup(3,\infty) ;; 1+\sqrt{5}, 1-\sqrt5 | 1\pm\sqrt{5} ;; y=-2x | -2x
right | \begin{bmatrix}1\\2\end{bmatrix} | \begin{pmatrix}1\\2\end{pmatrix} ;; 2(k+1) | 2k+2 ;; 2r \pi | 2\pi r ;; 2x | f(x)=2 x
right | \frac{\sqrt{3}}{3} | \frac{1}{\sqrt{3}} ;; 0.5\pi | \frac{\pi}{2} ;; k \ge 2 | k \geqslant 2 ;; (b+2)(a+5) | (a+5)(b+2)
right | 2y=4x+2 | y-2x=1 ;; 4210_{5} | 4210_5 ;; 8,5 | 5,8 ;; (6, 5) | (6,5) ;; \binom{2n}{n} | \frac{(2n)!}{(n!)^2}
wrong | 35 | 34 ;; -34 | 34 ;; 3 4 | 34 ;; 3 4 | 7 ;; 1, 234 | 1234 ;; 33, 34, 35 | 34 ;; 33 or 34 | 34 ;; 34 million | 34
wrong | 34 or more | 34 ;; 34x | 34 ;; x = 33 = 34 | 34 ;; \sqrt{1156} | 34 ;; \sum_{k=1}^{9} k | 45 ;; 0.33 | \frac{1}{3}
wrong | 0.3333333333333333 | 1/3 ;; 1e-9 | 1e-8 ;; NaN | 5 ;; \infty | 5 ;; inf | 5 ;; nan | NaN5 ;; 1e400 | 5 ;; 1_0 | 10
wrong | (2,1) | (1,2) ;; [1,2] | (1,2) ;; 1,2 | (1,2) ;; (1,3) | (1,2) ;; 1,2,2 | 1,2 ;; 1 | 1,2 ;; 1,2,3 | 1,2 ;; 1,1 | 1,2
wrong | (8,-2) | (9,-2) ;; seat | east ;; m | M ;; 2m+1 | 2M+1 ;; 4210_7 | 4210_5 ;; 4210 | 4210_5 ;; m = 3 | k = 3 ;; 2k+3 | 2k+2
wrong | \int_0^1 2x dx + k | k+1 ;; y=-2x | y'=-2x ;; -\frac{dx}{dt}=kx | \frac{dx}{dt}=kx ;; 10^{-9}\pi | 10^{-8}\pi ;; 1=0 | x+1=x
wrong | c(\gamma^2-7) | c(\gamma^2-1) ;; ３４ | 34 ;; 3​4 | 34 ;; 34​ | 34 ;; −34 | -34 ;; 2х | 2x ;; 1 / 0 | 0 ;; \frac{1}{0} | 5
wrong | \frac{k}{0} | \frac{2k}{0}+k ;; \boxed{3}, 34 | 34 ;; 34 \text{ or } 35 | 34 ;; 5 \text{ but maybe 7} | 5 ;; -\frac{1}{2} | \frac{1}{2}
wrong | eaſt | east ;; k+\gcd(2,3) | k+1 ;; 1024.0000001 | 2^{10} ;; 1.41421356 | \sqrt{2} ;; 0.00000001 | 2^{-40} ;; 34 \text{ or more} | 34
wrong | 510^3 | 5000 ;; 210^{2} | 200 ;; 0.5% | 50% ;; 5000\% | 50\% ;; \not=34 | 34 ;; 34\text{}^2 | 34 ;; 34 squared | 34 ;; 0,123 | 123
wrong | 34 plus five | 34 ;; 34 \text{ minus one} | 34 ;; 34 point five | 34 ;; 34 sin x | 34 ;; 34 thirds | 34 ;; 3$4 | 34 ;; 3\(4 | 34
wrong | 3\left4 | 34 ;; 3°4 | 34 ;; 3^\circ 4 | 34 ;; \arcsin(-\frac12) | -\frac{\pi}{6} ;; \cos(\pi/6) | \frac{\sqrt{3}}{2} ;; (3!)^2x | 36
wrong | 5\mathrm{i} | 5 ;; 5 \text{x} | 5 ;; 5\text{/x} | 5 ;; 5 \mathrm{\pi} | 5 ;; 5\text{$\pi$} | 5 ;; 5 times x | 5 ;; \neq=5 | 5 ;; $$ | (1,2)
right | 5 \mathrm{\mu m} | 5 ;; 5 \text{ m/s} | 5 ;; 5 miles/hour | 5 ;; \theta = 5 | 5 ;; P(A) = 0.5 | 0.5 ;; a_{1} = 5 | 5 ;; 5 inches | 5
wrong | 12 \text{ or } 13 | 12 ;; 12 13 | 12 ;; 12; 13 | 12 ;; 12abc | 12 ;; \text{12}3 | 123 ;; 1 2 | 12 ;; 1,2,3 | 123 ;; \pm 34 | 34 ;; |34| | 34
wrong | 2k+2, 2k+3 | 2k+2 ;; 2k+2 \lor 2k+3 | 2k+2 ;; A, B, C, D | C ;; even, odd | even ;; ABCD | C ;; 33-34 | 34 ;; 34? | 34
wrong | 0/0 | 0 ;; \frac{x}{x-x} | x ;; \infty-\infty | 0 ;; x\cdot\infty | x ;; 10^{10^{10}} | 10 ;; 1e999 | 10 ;; \nan | 5 ;; ³ | 3 ;; x² | x^2
wrong | ½ | 0.5 ;; ٣٤ | 34 ;; –34 | -34 ;; ｘ | x ;; 3 4 | 34 ;; \input{34} | 34 ;; \def\x{34}\x | 34 ;; \x34 | 34 ;; \1 1/2 | \frac{11}{2}
wrong | 0y=0x | 2y=4x+2 ;; xy=xy | 2y=4x+2 ;; k>2 | k \ge 2 ;; k \le 2 | k \ge 2 ;; [1,2) | [1,2] ;; (1,2,3) | (1,2) ;; ((1,2),3) | (1,2,3)
wrong | \begin{pmatrix}1&2\end{pmatrix} | \begin{pmatrix}1\\2\end{pmatrix} ;; \begin{pmatrix}1\\3\end{pmatrix} | \begin{pmatrix}1\\2\end{pmatrix}
right | 34 feet squared | 34 ;; \left(45^\circ, 60^\circ\right) | (45^{\circ}, 60^{\circ}) ;; 50\% | 50%
right | 5 \cdot 10^{3} | 5000 ;; 10^3 | 1000 ;; 18^{\circ}\text{C} | 18 ;; \$1,\!000 | 1000 ;; 1\frac12 | 1.5 ;; 3 \times 10^{-2} | .03 ;; 34 times | 34
wrong | (312123231) | (312,123,231) ;; 1\frac{-4}{5} | \frac{1}{5} ;; 10^{-21}\pi | 10^{-20}\pi ;; 2k+2\approx 3 | 2k+2 ;; (5,\infty+1) | (5,\infty)
"""
TABLE = [(verdict, *pair.split(" | ")) for line in ROWS.strip().splitlines()
         for verdict, rest in [line.split(" | ", 1)] for pair in rest.split(" ;; ")]


@pytest.mark.parametrize("verdict, answer, gold", TABLE)
def test_math_table(verdict, answer, gold):
    assert (judge_math(rf"so \boxed{{{answer}}}.", gold) == "right") == (verdict == "right")


def test_where_the_answer_is():
    for response, answer in [(r"\boxed{1} \boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\boxed{\boxed{5}}", "5"), ("Answer: 5\n#### 6", "5"),
                             (r"\boxed {\{1\}}", r"\{1\}"), ("**Answer: 5**", "5"), ("x\n#### 1,000\n", "1,000"), ("5", None), (r"\boxed{\{5}", r"\{5"),
                             (r"\boxed{5} \boxed{6", None), (r"\boxed{}", None), ("Answer:\n5", None), (r"\boxed5", None),
                             (r"\boxed{" + "1" * 1001 + "}", None), ("Answer: " + "1" * 1001, None), (r"\boxed{" + "1" * 1000 + "}", "1" * 1000)]:
        assert verify.extract(response) == answer, response


HOSTILE = ["9^{9^{9^9}}x", "x^{9^{9^{9^9}}}", "{" * 10**6 + "}" * 10**6, "{" * 400 + "x" + "}" * 400, "(" * 490 + "x" + ")" * 490,
           "x+1" * 300000, r"\def\a{\a\a}\a x", r"\let\x=\x\x", r"\boxed{" * 1000, r"\sqrt{" * 120 + "x" + "}" * 120, "x!" + "!" * 100,
           "(99999999!)x", r"\frac{" * 90 + "x" + "}{x}" * 90, "(x+1)^{99999999}", r"\binom{10^9}{10^8}x", "__import__('os').system('touch /tmp/pwned')x",
           "x;import os", r"\input{/etc/passwd}x", "x\0", "\ud800x", "x" + "\u200b", "\\", "x\\", "}{", "x=" * 300 + "x", "x," * 400, "\\{" * 300,
           ", ".join(map(str, range(200))), " or ".join("ABCDE"), "9" * 990, "9/" * 490 + "9", "1," * 490, "1" * 10**6, "1e999", "10^{10^{10}}", r"\infty-\infty",
           "$", r"\,", "°", "%", ".", "$$ $$", r"\text{}", r"\left", "0/0", "nan", r"\gcd" * 150, r"\text{" * 150, "x^" * 400 + "x", "٣" * 900, "ﷺ" * 900]


def test_hostile_math_is_judged_in_time(monkeypatch):
    monkeypatch.setattr(verify, "TIME_LIMIT", 0.5)
    judge_math(r"\boxed{2(k+1)}", "2k+2"), outcomes.clear()                     # the worker is up
    responses = [response for text in HOSTILE for response in (rf"\boxed{{{text}}}", f"Answer: {text}", text * 2 + rf"\boxed{{{text}")]
    for gold in "x^2+2x+5", "34", "(1,2)", r"\{1,3\}", r"(1,2]\cup(3,\infty)", "east", r"50\%", r"\begin{pmatrix}1\\2\end{pmatrix}":
        for response in responses if gold[0] == "x" else responses[::3]:
            start = time.monotonic()
            assert RULES["math"](response, gold) == 0.0, (response[:40], gold)
            assert time.monotonic() - start < 20, (response[:40], gold)
    assert outcomes.total() == len(responses) + 7 * len(responses[::3]) and set(outcomes) == {"wrong", "no_answer", "timeout"}
    assert not os.path.exists("/tmp/pwned") and judge_math(r"\boxed{2(k+3)}", "2k+6") == "right"
    assert len(children()) <= verify.WORKERS                                   # killed workers leave nothing behind


HEDGES = r"""
G, O ;; O, G ;; G or O ;; G \text{ or } O ;; G \text{, or maybe } O ;; G and O ;; G; O ;; G O ;; O G ;; G \lor O
G | O ;; G / O ;; G \\ O ;; G \quad O ;; \{G, O\} ;; (G, O) ;; [G, O] ;; (G), (O) ;; G = O ;; O = G ;; x = G = O
x = G, x = O ;; G \neq O ;; G < O ;; O < G ;; G \to O ;; G \approx O ;; G \pm O ;; G \cup O ;; O \cup G ;; G. O ;; O. G
G.O ;; G: O ;; G^O ;; G_O ;; G\text{O} ;; \text{G}O ;; \text{not } G ;; \neg G ;; \neq G ;; G + O ;; G - O
\boxed{G} O ;; O \boxed{G}, O ;; \boxed{G}\boxed{O} ;; G\\boxed{O} ;; \frac{G}{O} ;; \sqrt{G} ;; -G ;; G + 1 ;; 2 G
G\cdot O ;; G\infty ;; \infty ;; NaN ;; G\u200b ;; G, G ;; G G ;; \pm G ;; G? ;; \frac{G}{0} ;; 0 \cdot G ;; G^{G^{G^G}}
\text{the answer to the question} ;; O ;; G \text{ (or O)} ;; \gcd(G, G) ;; \max(G, O)
""".strip().replace(r"\u200b", "\u200b").replace("\n", " ;; ").split(" ;; ")


OTHERS = {"34": "35", "-7": "8", r"\frac{1}{2}": r"\frac{1}{3}", "(1,2)": "(3,4)", "[1,2)": "[3,4)", "5,6": "7,8",
          r"\{1,3\}": r"\{2,4\}", "2k+3": "2k+5", r"\sqrt{5}": r"\sqrt{7}", "C": "D", "east": "west", r"50\%": r"60\%",
          "y=2x+1": "y=3x+1"}


@pytest.mark.parametrize("gold, other", OTHERS.items())
def test_hedges_are_wrong(gold, other):
    answers = [re.sub("[GO]", lambda match: {"G": gold, "O": other}[match[0]], hedge) for hedge in HEDGES]
    responses = [rf"\boxed{{{answer}}}" for answer in answers] + [
        f"What is ${gold}$? It is ${gold}$.", rf"\boxed{{{gold}}} \boxed{{{other}}}", rf"\boxed{{{gold}}} or \boxed{{{other}",
        f"Answer: {gold}. Answer: {other}", rf"\boxed{{{other}}}, that is {gold}. Answer: {gold}"]
    assert [r for r in responses if judge_math(r, gold) == "right"] == []


def children():
    return subprocess.run(["pgrep", "-P", str(os.getpid()), "-f", "verify.py"], capture_output=True, text=True).stdout.split()


def test_a_worker_that_hangs_is_killed_and_counted(monkeypatch):
    monkeypatch.setattr(verify, "TIME_LIMIT", 0.5)
    verify.close(), verify.ask.cache_clear(), outcomes.clear()
    assert children() == [] and RULES["math"](r"\boxed{2(k+1)}", "2k+2") == 1.0
    (pid,) = children()
    os.kill(int(pid), signal.SIGSTOP)
    assert RULES["math"](r"\boxed{3(k+1)}", "3k+3") == 0.0 and children() == []
    assert RULES["math"](r"\boxed{4(k+1)}", "4k+4") == 1.0 and RULES["math"]("?", "4") == 0.0 and RULES["math"]("Answer: 5", "4") == 0.0
    assert outcomes == {"right": 2, "timeout": 1, "no_answer": 1, "wrong": 1}
    os.kill(int(children()[0]), signal.SIGKILL), time.sleep(0.1)               # killed from outside while idle
    assert judge_math(r"\boxed{5(k+1)}", "5k+5") == "timeout" and judge_math(r"\boxed{6(k+1)}", "6k+6") == "right"
    verify.close()
    assert children() == []
    monkeypatch.setattr(sys, "executable", "/bin/false"), verify.ask.cache_clear()
    with pytest.raises(RuntimeError, match="does not start"):
        judge_math(r"\boxed{9(k+1)}", "9k+9")


def test_a_worker_does_not_survive_its_parent():
    code = (f"import sys, os; sys.path.insert(0, {os.path.dirname(verify.__file__)!r}); import verify\n"
            "w = verify.start_worker(); print(w.pid, flush=True); os.kill(os.getpid(), 9)")
    pid = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
    time.sleep(1)
    assert not os.path.exists(f"/proc/{pid}") or "Z" in open(f"/proc/{pid}/stat").read().split()[2]


def test_score_off_the_main_thread():                                          # where SIGALRM timeouts give silent zeros
    out, problems = [], [Problem("", gold, "math") for gold in ("5", "2k+2", "2k+4", "x")] * 3
    thread = threading.Thread(target=lambda: out.extend(score(problems, [r"\boxed{5}", r"\boxed{2(k+1)}", r"\boxed{2(k+2)}", "?"] * 3)))
    thread.start(), thread.join()
    assert out == [1.0, 1.0, 1.0, 0.0] * 3
    start = time.monotonic()
    assert sum(score(problems[:1] * 4096, [rf"\boxed{{{i}}}" for i in range(4096)])) == 1 and time.monotonic() - start < 20
    with pytest.raises(ValueError, match="1 problems, but 2"):
        score(problems[:1], ["", ""])


@settings(max_examples=200, deadline=None)
@given(st.fractions(min_value=-10**6, max_value=10**6, max_denominator=999), st.fractions(max_denominator=999))
def test_numbers_match_exactly_when_equal(x, y):
    spelled = [f"{x}", rf"\frac{{{x.numerator}}}{{{x.denominator}}}", rf"\dfrac{{{2 * x.numerator}}}{{{2 * x.denominator}}}"]
    for text in spelled:
        assert judge_math(f"Answer: {text}", f"{x}") == "right" and (judge_math(f"Answer: {text}", f"{y}") == "right") == (x == y)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="0123456789\\{}()[]^_.,+-*/=$% fracsqtbox\u0664", max_size=60))
def test_any_text_is_judged(text):                                             # against a number sympy is never asked
    assert judge_math(rf"\boxed{{{text}}}", "17") in (("right", "wrong", "no_answer") if "17" in text or "/" in text or "frac" in text
                                                      or "34" in text or "." in text or "%" in text else ("wrong", "no_answer"))
    assert judge_countdown(text, '{"numbers": [1, 2], "target": 3}') in ("right", "wrong", "no_answer")


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(r"0 1 2 3 . , - + * / = ^ _ % $ { } ( ) [ ] \{ \} \frac \sqrt \text{ \cup \pm \infty ^\circ \, \! x k and or "
                                r"cm percent \left \right \in & \\ e10 10^ \boxed{ Answer: ½ ٣ −".split() + ["\u200b"]), max_size=12).map("".join))
def test_any_answer_is_read_against_any_gold(text):                            # and what is no gold answer's spelling is not right
    for gold in "17", "8k+9", "(4,5)", r"\{4, 5\}", r"[4,5)\cup(6,7]", "east", r"45\%", "y=4", r"4\pm\sqrt{5}":
        assert verify.same(verify.normalise(text), verify.normalise(gold), lambda *_: False) is False


@pytest.mark.parametrize("verdict, text", [
    ("right", "(3+5)*7-2"), ("right", " 7*(5+3)-2 = 54 "), ("right", "a <answer>1</answer> b <answer>(3+5)*7-2</answer>"), ("right", "(5+3)*7-2\n"),
    ("wrong", "(3+5)*7-2=55"), ("wrong", "(3+5)*7"), ("wrong", "54"), ("wrong", "(3+5)*7-2+7-7"), ("wrong", "(3+5)*7-1-1"), ("wrong", "3/(5-5)+7*2"),
    ("no_answer", ""), ("no_answer", "((3+5)*7-2"), ("no_answer", "(3+5)*7--2"), ("no_answer", "-2+(3+5)*7"), ("no_answer", "(3+5)*7.0-2"), ("no_answer", "(3+5)*07-2"),
    ("no_answer", "(3+5)*7_0-2"), ("no_answer", "3**5*7-2"), ("no_answer", "9**9**9**9"), ("no_answer", "(3+5)*７-2"), ("no_answer", "int('54')"), ("no_answer", "3 5"),
    ("no_answer", "__import__('os').system('ls')"), ("no_answer", "(3).real"), ("no_answer", "3(5)"), ("no_answer", "(3,5)"), ("no_answer", "3//5"), ("no_answer", "1e9"),
    ("no_answer", "(" * 10**6), ("no_answer", "9" * 10**6), ("no_answer", "<answer>(3+5)*7-2"), ("no_answer", "3+\u200b5"), ("no_answer", "3;5"), ("no_answer", "True+3")])
def test_countdown_table(verdict, text):
    assert judge_countdown(text, '{"numbers": [2, 3, 5, 7], "target": 54}') == verdict


def test_countdown_divides_exactly():
    assert judge_countdown("8/(3-8/3)", '{"numbers": [3, 3, 8, 8], "target": 24}') == "right"
    assert judge_countdown("9999999999999999/9999999999999998", '{"numbers": [9999999999999999, 9999999999999998], "target": 1}') == "wrong"
    assert judge_countdown("9" * 99 + "*" + "9" * 99, json.dumps({"numbers": [int("9" * 99)] * 2, "target": 1})) == "wrong"


def test_pass_at_k_counts_subsets():
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
                assert pass_at_k(n, c, k) == float(Fraction(sum(map(any, draws)), len(draws)))
    assert pass_at_k(10**5, 1, 1) == 1e-5
    for n, c, k in (4, 5, 1), (4, 1, 5), (4, 1, 0), (4, -1, 1):
        with pytest.raises(ValueError, match="pass@k needs"):
            pass_at_k(n, c, k)


def test_calibration_by_hand():
    found = verify.calibration([0.9, 0.8, 0.8, 0.3], [1, 1, 0, 0])
    # Pairs (right, wrong): .9 > .8, .9 > .3, .8 = .8, .8 > .3. Bins: |.9 - 1|, |.8 + .8 - 1|, |.3 - 0|.
    assert found == pytest.approx(dict(conf_right=0.85, conf_wrong=0.55, conf_gap=0.3, auroc=3.5 / 4, ece=(0.1 + 0.6 + 0.3) / 4))
    assert verify.calibration([0.2, 0.7], [1, 0]) == pytest.approx(dict(conf_right=0.2, conf_wrong=0.7, conf_gap=-0.5, auroc=0, ece=0.75))
    assert verify.calibration([1.0, 0.9], [0, 1])["ece"] == pytest.approx((1 - 0.1) / 2)  # 1 and 0.9 are of one bin
    assert verify.calibration([0.5, 0.7], [1, 1]) == pytest.approx(dict(conf_right=0.6, ece=0.4))  # no wrong answer: no gap
    assert verify.calibration([0.5, 0.7], [0, 0]) == pytest.approx(dict(conf_wrong=0.6, ece=0.6))
    assert verify.calibration([], []) == {}
    for confidence, right in (([math.nan], [1]), ([1.5], [1]), ([0.5], [])):
        with pytest.raises(ValueError, match="calibration needs"):
            verify.calibration(confidence, right)


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=20))
def test_auroc_counts_pairs(answers):
    pairs = [(a > b) + 0.5 * (a == b) for a, right in answers if right for b, other in answers if not other]
    found = verify.calibration([a / 5 for a, _ in answers], [right for _, right in answers])
    assert found.get("auroc") == (sum(pairs) / len(pairs) if pairs else None)


def test_load_problems(tmp_path):
    import pyarrow
    import pyarrow.parquet

    def file(name, rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows)) if name.endswith("jsonl") else \
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    chat = [{"content": "1+1?", "role": "user"}]
    verl = [{"prompt": chat, "reward_model": {"ground_truth": "2", "style": "rule"}, "data_source": "a"}] * 32
    for name in "a.parquet", "a.jsonl":
        assert load_problems(file(name, verl)) == [Problem(chat, "2", "math")]
    plain = [{"question": f"{i}?", "answer": f"so\n#### {i},000"} for i in range(5)] * 2
    loaded = load_problems(file("b.parquet", plain), limit=3)
    assert [p.answer for p in loaded] == ["0,000", "1,000", "2,000"] and r"\boxed{}" in loaded[0].prompt
    assert load_problems(file("b.jsonl", [{"Problem": "p", "Answer": 27.0}]))[0].answer == "27.0"
    counting = [{"nums": [2, 3, 5, 7], "target": 54}]
    in_verl = {"prompt": chat, "reward_model": {"ground_truth": {"numbers": [2, 3, 5, 7], "target": 54}}}
    for rows in counting, [in_verl]:
        (problem,) = load_problems(file("c.parquet", rows))
        assert problem.rule == "countdown" and score([problem], ["<answer>(3+5)*7-2</answer>"]) == [1.0]
    bad = {"no such file": tmp_path / "none.jsonl", "not a .jsonl": tmp_path, "no problems": file("e.jsonl", []), "unknown rule 'x'; known: countdown, math": None,
           "columns a, b; understood are prompt": file("f.jsonl", [{"a": 1, "b": 2}]), "row 2": file("g.jsonl", [*plain[:1], {"question": "?"}]),
           "cannot judge": file("h.jsonl", [{"question": "?", "answer": "9" * 1001}]), "whole Parquet": file("i.parquet", counting)}
    (tmp_path / "i.parquet").write_bytes(b"PAR1 no")
    for message, path in bad.items():
        with pytest.raises(ValueError, match=message) as error:
            load_problems(path or tmp_path / "a.jsonl", rule=None if path else "x")
        assert "\n" not in str(error.value)
    (tmp_path / "j.jsonl").write_text("{}\n{")
    for path, rule in (tmp_path / "j.jsonl", None), (tmp_path / "c.parquet", "math"), (tmp_path / "b.jsonl", "countdown"):
        with pytest.raises(ValueError, match="row 1|line 2"):
            load_problems(path, rule)


HUB = {
    "BytedTsinghua-SIA/DAPO-Math-17k": (
        {"data_source": "math_dapo", "prompt": [{"content": "1+1? Answer: $Answer", "role": "user"}], "ability": "MATH",
         "reward_model": {"ground_truth": "2", "style": "rule-lighteval/MATH_v2"}, "extra_info": {"index": "a"}}, "2"),
    "openai/gsm8k:main:test": ({"question": "1+1?", "answer": "It is <<1+1=2>>2.\n#### 1,002"}, "1,002"),
    "HuggingFaceH4/MATH-500": ({"problem": "1+1?", "solution": r"\boxed{3}", "answer": r"\frac{4}{2}", "subject": "Algebra",
                                "level": 1, "unique_id": "a"}, r"\frac{4}{2}"),
    "math-ai/aime24": ({"id": 60, "problem": "1+1?", "solution": r"It is $1$; no: \boxed{2}.", "url": "u"}, "2"),
    "math-ai/aime25": ({"problem": "1+1?", "answer": "2", "id": "0"}, "2"),
    "math-ai/amc23": ({"id": 0, "answer": "2", "question": "1+1?", "url": "u"}, "2"),
    "math-ai/minervamath": ({"question": "1+1?", "answer": "2e0"}, "2e0"),
    "math-ai/olympiadbench": ({"id": 1, "question": "1+1?", "solution": ["It is 2."], "final_answer": ["$2$", "3"],
                               "context": None, "is_multiple_answer": True}, "$2$, 3"),
    "Hothan/OlympiadBench:OE_TO_maths_en_COMP:train": (
        {"question": "1+1?", "solution": ["It is 2."], "final_answer": ["2"], "image_1": None, "unit": None}, "2"),
    "Jiayi-Pan/Countdown-Tasks-3to4": ({"target": 2, "nums": [1, 1]}, '{"numbers": [1, 1], "target": 2}')}


@pytest.mark.parametrize("name", HUB)
def test_every_named_set_is_read_by_its_columns(name, tmp_path, monkeypatch):
    """Rows made by hand in the schema of each set of the README; the hub is played by a function with its signature."""
    import datasets
    row, answer = HUB[name]
    rows, (repo, config, split) = datasets.Dataset.from_list([row] * 3), (name.split(":") + ["", ""])[:3]
    rows.to_parquet(tmp_path / "a.parquet"), rows.to_json(tmp_path / "a.jsonl")
    hub = Mock(return_value=rows if split else datasets.DatasetDict(test=rows))
    monkeypatch.setattr(datasets, "load_dataset", hub)
    for source in tmp_path / "a.parquet", tmp_path / "a.jsonl", name:
        (problem,) = load_problems(source)                                      # the three rows are one problem
        response = "<answer>1+1</answer>" if problem.rule == "countdown" else f"Answer: {answer}"
        assert problem.answer == answer and score([problem] * 2, [response, "Answer: 77"]) == [1.0, 0.0], source
        assert problem.rule == "countdown" or "1+1?" in str(problem.prompt)
    hub.assert_called_once_with(repo, config or None, split=split or None)
    assert f"`{name}`" in (HERE / "README.md").read_text()


def test_subsets_are_nested_and_mix_all_sets():
    tokenizer = Mock(side_effect=lambda text, add_special_tokens: {"input_ids": list(text.encode())}, chat_template=None,
                     bos_token=None, eos_token_id=None)
    sets = {name: [Problem(f"{name}{i}", "1", "math") for i in range(20)] for name in "ab"}
    whole, prompts = verify.render_all(sets, tokenizer, 9)
    assert whole == sets["a"] + sets["b"] and bytes(prompts[21]) == b"b1"
    large, small = (verify.render_all(sets, tokenizer, 9, count, seed=1)[0] for count in (16, 8))
    assert large[:8] == small and len(set(large)) == 16 and {problem.prompt[0] for problem in small} == {"a", "b"}
    assert large != verify.render_all(sets, tokenizer, 9, 16, seed=2)[0] and large == verify.render_all(sets, tokenizer, 9, 16, seed=1)[0]


def test_render():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    raw = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "hi": 2, "A": 3, "you": 4, "?": 5}, unk_token="?"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="?")
    chat = [{"role": "user", "content": "hi"}, {"role": "user", "content": "you"}]
    assert render(Problem("hi", "", "math"), tokenizer) == [0, 2] and render(Problem(chat, "", "math"), tokenizer) == [0, 2, 4]
    assert render(Problem("<s> hi", "", "math"), tokenizer) == [0, 2]
    tokenizer.chat_template = "{{ bos_token }} {% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}A{% endif %}"
    assert render(Problem("hi", "", "math"), tokenizer) == [0, 2, 3] and render(Problem(chat, "", "math"), tokenizer) == [0, 2, 4, 3]


# ---- rollout: what is drawn, from what, in which order ----------------------------------------------------------------

EOS, LIMIT = 1, 256
PROMPTS = [[3, 4, 5], [6, 7] * 70, [8], list(range(2, 30)), [9, 9]]  # 140 tokens: over one block of vLLM's cache
SEEDS = [0, 100, 200, 300, 400]


def rollout_model(kind="qwen2", seed=0):
    # The config's own EOS is another token: stop_ids alone must decide.
    common = dict(vocab_size=32, initializer_range=0.2, bos_token_id=0, eos_token_id=5, pad_token_id=0)
    if kind == "qwen2":  # head_dim 32, as vLLM on CPU wants it; tied embeddings
        config = Qwen2Config(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
                             num_key_value_heads=1, max_position_embeddings=LIMIT, tie_word_embeddings=True, **common)
    else:
        config = GPT2Config(n_embd=64, n_layer=2, n_head=2, n_positions=LIMIT, **common)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


def torch_engine(model, folder, **options):
    model.config.save_pretrained(folder)
    engine = rollout.TorchEngine(folder, dtype=torch.float32, device="cpu", stop_ids=[EOS], max_model_len=LIMIT,
                                 **options)
    engine.push_weights(rollout.full_tensors(model))
    return engine


@torch.no_grad()
def trainer_log_probs(model, prompts, ids, n, temperature):
    """As a trainer computes them: one right-padded forward without the cache."""
    rows = [prompts[k // n] + answer for k, answer in enumerate(ids)]
    width = max(map(len, rows))
    batch = torch.tensor([r + [0] * (width - len(r)) for r in rows])
    mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
    log_probs = torch.log_softmax(model(batch, attention_mask=mask).logits / temperature, -1)
    return [log_probs[k, len(r) - len(a) - 1:len(r) - 1].gather(-1, torch.tensor(a)[:, None])[:, 0].tolist()
            for k, (r, a) in enumerate(zip(rows, ids))]


def gap(a, b):
    return max(abs(x - y) for row_a, row_b in zip(a, b, strict=True) for x, y in zip(row_a, row_b, strict=True))


def check_ends(ids, truncated, max_tokens):
    assert any(truncated) and not all(truncated)
    for answer, cut in zip(ids, truncated, strict=True):
        assert EOS not in answer[:-1] and cut == (answer[-1] != EOS) and (len(answer) == max_tokens or not cut)


def rng_state():
    numpy_state = np.random.get_state()
    return str((random.getstate(), numpy_state[1].tolist(), numpy_state[2], torch.get_rng_state().tolist()))


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_the_trainers(tmp_path, kind, temperature):
    model = rollout_model(kind)
    ids, log_probs, _ = torch_engine(model, tmp_path).generate(
        PROMPTS, n=6, max_tokens=20, temperature=temperature, seeds=SEEDS)
    assert gap(log_probs, trainer_log_probs(model, PROMPTS, ids, 6, temperature)) < 1e-4


def test_answers_depend_on_weights_prompt_and_seed_only(tmp_path):
    model = rollout_model()
    before = rng_state()
    options = dict(max_tokens=20, temperature=1.0)
    ids, log_probs, truncated = torch_engine(model, tmp_path).generate(PROMPTS, n=6, seeds=SEEDS, **options)
    small = torch_engine(model, tmp_path, max_rows=12)              # other batches: two prompts at a time
    assert rng_state() == before
    again, again_log_probs, _ = small.generate(PROMPTS, n=6, seeds=SEEDS, **options)
    assert again == ids and gap(again_log_probs, log_probs) < 1e-5
    for i, prompt in enumerate(PROMPTS):                            # alone, so the order of the results is right too
        assert small.generate([prompt], n=1, seeds=[SEEDS[i] + 4], **options)[0] == [ids[6 * i + 4]]
    assert small.generate(PROMPTS, n=6, seeds=[s + 50 for s in SEEDS], **options)[0] != ids
    check_ends(ids, truncated, 20)
    k = next(i for i, a in enumerate(ids) if 2 < len(a) < 20)       # EOS as the last allowed token is no truncation
    for limit, cut in ((len(ids[k]), False), (len(ids[k]) - 1, True)):
        short = small.generate([PROMPTS[k // 6]], n=1, max_tokens=limit, temperature=1.0, seeds=[SEEDS[k // 6] + k % 6])
        assert short[0] == [ids[k][:limit]] and short[2] == [cut]
    assert small.generate([], n=6, seeds=[], **options) == ([], [], [])


def test_frequencies_are_the_softmax(tmp_path):
    model, n = rollout_model(), 4000
    ids, _, _ = torch_engine(model, tmp_path).generate([PROMPTS[0]], n=n, max_tokens=1, temperature=2.0, seeds=[7])
    with torch.no_grad():
        expected = n * torch.softmax(model(torch.tensor([PROMPTS[0]])).logits[0, -1].double() / 2.0, -1).numpy()
    counts = np.bincount([a[0] for a in ids], minlength=32)
    keep = expected > 5
    assert ((counts - expected)[keep] ** 2 / expected[keep]).sum() < 2 * keep.sum() and keep.sum() > 10


def test_sample_reaches_rare_tokens_and_never_impossible_ones():
    logits = torch.zeros(1, 151_936)
    logits[0, 0] = 18.8                                             # p = 0.999; 7e-9 for each of the others
    uniform = 0.9999 - 2e-8 * torch.arange(50, dtype=torch.float64)  # a step of 3 tokens, below float32's 6e-8
    tokens, _ = rollout.sample(logits.expand(50, -1), uniform, 1.0)
    assert len(tokens.unique()) == 50
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]]).expand(3, -1)
    tokens, log_probs = rollout.sample(logits, torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64), 1.0)
    assert tokens.tolist() == [1, 3, 3] and log_probs.isfinite().all()
    logits = torch.randn(100, 32, generator=torch.Generator().manual_seed(0))  # cdfs that end a little below or above 1
    assert rollout.sample(logits, torch.full((100,), 1 - 2**-53, dtype=torch.float64), 1.0)[0].max() == 31
    with pytest.raises(FloatingPointError):
        rollout.sample(logits * torch.nan, torch.zeros(100, dtype=torch.float64), 1.0)


def test_push_weights(tmp_path):
    engine, other = torch_engine(rollout_model(), tmp_path), rollout_model(seed=1)
    assert engine.model.lm_head.weight is engine.model.get_input_embeddings().weight  # tied: held once
    weights = {name: tensor.double() for name, tensor in rollout.full_tensors(other)}
    engine.push_weights(iter(weights.items()))
    ids, log_probs, _ = engine.generate(PROMPTS, n=2, max_tokens=9, temperature=1.0, seeds=SEEDS)
    assert gap(log_probs, trainer_log_probs(other, PROMPTS, ids, 2, 1.0)) < 1e-4
    name = "model.norm.weight"
    missing = {k: v for k, v in weights.items() if k != name}
    for wrong in (missing, {**weights, name: torch.ones(1)}, {**weights, "unknown": torch.ones(1)}):
        with pytest.raises(ValueError):
            engine.push_weights(iter(wrong.items()))


def test_prompt_once_per_group_and_finished_rows_leave(tmp_path):
    engine, shapes = torch_engine(rollout_model(), tmp_path), []
    engine.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True)
    ids, _, _ = engine.generate(PROMPTS, n=6, max_tokens=20, temperature=1.0, seeds=SEEDS)
    lengths = [len(a) for a in ids]
    assert shapes[0] == (5, 140)                                    # 5 prompts, not 30 answers
    assert shapes[1:] == [(sum(k > t for k in lengths), 1) for t in range(1, 20)] and min(lengths) < 20
    engine.max_rows = 12
    shapes.clear()
    engine.generate(PROMPTS, n=6, max_tokens=20, temperature=1.0, seeds=SEEDS)
    assert shapes[0] == (2, 2) and max(rows for rows, _ in shapes) <= 12  # the two shortest prompts first


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
    for args, words in ((("vllm",), "not installed"), (("sglang",), "unknown"), (("torch", 2), "rollout_tp")):
        with pytest.raises(ValueError, match=words):
            rollout.resolve_engine(*args)


def test_vllm_sleeps_and_wakes_in_order():
    """The order that vLLM documents for a colocated trainer, on a stand-in (vLLM on CPU cannot sleep)."""
    engine = object.__new__(rollout.VllmEngine)
    engine.on_gpu, engine.asleep, engine.max_model_len = True, False, LIMIT
    engine.llm = Mock()
    for step in (engine.wake, engine.sleep, engine.sleep):          # awake at first; a second sleep is no second call
        step()
    with pytest.raises(RuntimeError, match="push_weights"):
        engine.generate([[2]], n=1, max_tokens=1, temperature=1.0, seeds=[0])
    engine.wake()
    engine.push_weights(iter(()))
    assert [(c[0], c[2].get("tags")) for c in engine.llm.mock_calls] == [
        ("sleep", None), ("wake_up", ["weights"]), ("collective_rpc", None), ("wake_up", ["kv_cache"]),
        ("reset_prefix_cache", None)]


# One vLLM engine per process: its checks run in processes of their own, this file under torchrun.

def vllm_rank(folder, tp):
    rollout.prepare_environment()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    model, plain = rollout_model(), rollout_model()
    if rank == 0:
        model.config.save_pretrained(folder)
    dist.barrier()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    before = rng_state()
    engine = rollout.make_engine("vllm", folder, dtype=torch.float32, device="cpu", stop_ids=[EOS], max_model_len=LIMIT,
                                 tensor_parallel_size=tp)
    assert rng_state() == before
    mine = slice(rank * len(PROMPTS) // world, (rank + 1) * len(PROMPTS) // world)
    everything = []
    for step in range(3):                                           # weights change between: stale ones would show
        state = dict(rollout.full_tensors(model))
        plain.load_state_dict(state)
        engine.wake()
        engine.push_weights(rollout.full_tensors(model))
        for temperature in (1.0, 0.7):
            before = rng_state()
            ids, log_probs, truncated = engine.generate(
                PROMPTS[mine], n=6, max_tokens=20, temperature=temperature, seeds=SEEDS[mine])
            assert rng_state() == before
            assert gap(log_probs, trainer_log_probs(plain, PROMPTS[mine], ids, 6, temperature)) < 1e-4
            gathered = [None] * world
            dist.all_gather_object(gathered, (ids, truncated))
            ids, truncated = ([x for part in gathered for x in part[field]] for field in range(2))
            if step == 0:
                check_ends(ids, truncated, 20)
            everything.append(ids)
        if world == 1:                                              # answer j is drawn with seed + j, alone or not
            alone = engine.generate(PROMPTS[1:2], n=1, max_tokens=20, temperature=0.7, seeds=[SEEDS[1] + 4])
            assert alone[0] == [ids[6 + 4]]
        engine.sleep()
        batch = torch.tensor([PROMPTS[3]])
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert everything[0] != everything[2] != everything[4]
    if rank == 0:
        with open(f"{folder}/answers{world}{tp}.json", "w") as file:
            json.dump(everything, file)
    engine.close()


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed: .ci/run installs it")
def test_vllm_under_torchrun(tmp_path):
    """World 1, two data-parallel FSDP2 ranks, two tensor-parallel ranks: the trainer's log-probs, and equal answers."""
    answers = []
    for world, tp in ((1, 1), (2, 1), (2, 2)):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}", __file__]
        run = subprocess.run(command + [str(tmp_path), str(tp)], capture_output=True, text=True, timeout=300,
                             env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert run.returncode == 0, run.stderr[-4000:]
        answers.append(json.loads((tmp_path / f"answers{world}{tp}.json").read_text()))
    assert answers[0] == answers[1] == answers[2]


def test_evaluation_by_hand(monkeypatch):
    """Two problems, two answers each: of the first both are wrong, of the second one is right."""
    def answer(engine, tokenizer, problems, prompts, seeds, *, n, max_tokens, temperature):
        assert (problems, prompts, seeds, n, max_tokens, temperature) == (["p", "q"], [[1], [2]], [2**60, 2**60 + 2], 2, 9, 0.6)
        made = lambda reward, *log_probs: dict(reward=reward, log_probs=log_probs, response=[0] * len(log_probs),
                                               truncated=len(log_probs) == 4)
        outcomes["timeout"] += 1
        return [[made(0.0, -1.0, -3.0), made(0.0, -1.0, -1.0, -1.0, -1.0)], [made(1.0, -0.5), made(0.0, -4.0)]]

    monkeypatch.setattr(rollout, "answer", answer)
    outcomes.clear()
    dist.init_process_group("gloo")
    cfg = types.SimpleNamespace(eval_samples=2, max_response_len=9, eval_temperature=0.6)
    (name, found), = rollout.evaluate(None, None, {"few": (["p", "q"], [[1], [2]])}, cfg)
    confidence = [math.exp(-2), math.exp(-1), math.exp(-0.5), math.exp(-4)]
    assert name == "few" and found == pytest.approx({
        "problems": 2, "pass@1": 0.25, "pass@2": 0.5, "len_mean": 2, "truncated_frac": 0.25, "entropy": (2 + 1 + 0.5 + 4) / 4,
        **verify.calibration(confidence, [0, 0, 1, 0]), "timeout": 1})
    assert found["auroc"] == 1 and found["conf_right"] == confidence[2] and not outcomes


def test_ngram_diversity_by_hand():
    """Mean over n = 1 ... 4 of distinct / all; an n for which all answers are too short is left out."""
    three = [[1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6], [7, 8, 9]]
    assert math.isclose(rollout.ngram_diversity(three), (9 / 14 + 7 / 11 + 5 / 8 + 3 / 5) / 4)
    assert math.isclose(rollout.ngram_diversity([[5] * 6]), (1 / 6 + 1 / 5 + 1 / 4 + 1 / 3) / 4)
    assert rollout.ngram_diversity([[1, 2, 3]]) == 1 and math.isclose(rollout.ngram_diversity([[1, 2, 1, 2]], longest=2), (1 / 2 + 2 / 3) / 2)
    dist.init_process_group("gloo")
    responses = [[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4], [4, 3, 2, 1], [1], [2]]
    answers = [dict(response=r, reward=1.0, truncated=False) for r in responses]
    assert rollout.reward_metrics(answers, 2)["response/ngram_diversity"] == (1 / 2 + (1 / 2 + 1 + 1 + 1) / 4 + 1) / 3


# ---- entropy: exact, chunked, aligned ---------------------------------------------------------------------------------

def test_token_statistics_equal_the_naive_ones_and_never_hold_all_logits():
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(37, 8, generator=g, dtype=torch.float64), torch.randn(50, 8, generator=g, dtype=torch.float64)
    tokens, T = torch.randint(50, (37,), generator=g), 0.7
    names, results, seen = list(entropy.STATISTICS), [], []
    for chunked in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if chunked:
            def head(x):
                seen.append(len(x))
                return x @ w.T
            found = entropy.token_statistics(h, head, tokens, T, names, chunk_tokens=10)
        else:
            logp = torch.log_softmax((h @ w.T).float() / T, -1)
            p = logp.exp()
            logits = (h @ w.T).float()
            nucleus = []
            for row in logp:
                order = row.argsort(descending=True)
                kept = order[:int((row[order].exp().cumsum(0) < 0.8).sum()) + 1]
                q = row[kept].softmax(0)
                nucleus.append(-(q * q.log()).sum())
            found = dict(log_probs=logp[range(37), tokens], token_entropy=-(p * logp).sum(1), sum_p2=(p * p).sum(1),
                         sum_p2_log_p=(p * p * logp).sum(1), nucleus_entropy=torch.stack(nucleus),
                         hot_log_probs=torch.log_softmax(logits / (1.2 * T), -1)[range(37), tokens],
                         cold_log_probs=torch.log_softmax(logits / (0.8 * T), -1)[range(37), tokens])
        sum((i + 1.0) * found[name].sin().sum() for i, name in enumerate(names)).backward()
        results.append([found[name] for name in names] + [h.grad, w.grad])
    for ours, naive in zip(*results):
        assert torch.allclose(ours, naive, rtol=1e-4, atol=1e-5 * naive.abs().max().item())
    assert max(seen) == 10 and len(seen) == 8                          # 4 chunks, computed again in backward


def test_entropy_of_known_distributions():
    head = torch.nn.Identity()
    uniform, sure = torch.zeros(1, 12), torch.tensor([[100.0] + [0.0] * 11])
    h = lambda logits, T=1.0: entropy.token_statistics(logits, head, torch.tensor([0]), T, ["token_entropy"])["token_entropy"].item()
    assert math.isclose(h(uniform), math.log(12), rel_tol=1e-6) and h(sure) < 1e-6
    two = torch.tensor([[2.0, 0.0]])
    p = 1 / (1 + math.exp(-1.0))                                       # T = 2 halves the logits, not the log-probs
    assert math.isclose(h(two, 2.0), -p * math.log(p) - (1 - p) * math.log(1 - p), rel_tol=1e-6)


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_policy_scores_as_the_model_does_one_row_at_a_time(kind):
    model = random_model(kind)
    policy = entropy.Policy(model, temperature=0.8).eval()
    rows = [([3, 4, 5], [6, 7, 1]), ([8], [9, 10, 11, 12, 1]), ([5] * 9, [2])]
    batch = rollout.collate([dict(prompt=p, response=r, log_probs=[0.0] * len(r), advantage=0.0, reward=0.0, group_accuracy=0.0) for p, r in rows], "cpu")
    found = policy(batch["ids"], batch["prompt_lens"], batch["response_mask"], ["log_probs", "token_entropy"])
    for i, (p, r) in enumerate(rows):
        logp = torch.log_softmax(model(torch.tensor([p + r])).logits[0, len(p) - 1:-1].float() / 0.8, -1)
        assert torch.allclose(found["log_probs"][i, :len(r)], logp[range(len(r)), r], atol=1e-5)
        assert torch.allclose(found["token_entropy"][i, :len(r)], -(logp.exp() * logp).sum(1), atol=1e-5)
        assert (found["log_probs"][i, len(r):] == 0).all()


def test_policy_refuses_models_that_change_their_logits():
    model = random_model()
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="softcapping"):
        entropy.Policy(model, 1.0)


def test_microscope_by_hand():
    """Both averages of entropy; quadrants; shares of the predicted change."""
    p = torch.tensor([[0.9, 0.5, 0.1], [0.5, 0.5, 0.5]])
    H = torch.tensor([[0.3, 0.6, 2.0], [0.5, 9.0, 9.0]])
    mask, A = torch.tensor([[True, True, True], [True, False, False]]), torch.tensor([[1.0, 1.0, 1.0], [-1.0, -1.0, -1.0]])
    old = dict(log_probs=p.log(), token_entropy=H, sum_p2=torch.zeros_like(p), sum_p2_log_p=torch.zeros_like(p))
    m = entropy.measure(old, A, mask, lambda x: x.double(), group_accuracy=torch.zeros(2, 3), group_size=2)
    assert math.isclose(m["entropy/token_mean"], (0.3 + 0.6 + 2.0 + 0.5) / 4, rel_tol=1e-6)
    assert math.isclose(m["entropy/response_mean"], ((0.3 + 0.6 + 2.0) / 3 + 0.5) / 2, rel_tol=1e-6)
    # likely: p > e^-H. 0.9 > 0.74; 0.5 < 0.549; 0.1 < 0.135; and the wrong answer's 0.5 < 0.607
    assert [m[f"quadrant/{q}_frac"] for q in entropy.QUADRANTS] == [0.25, 0.5, 0.0, 0.25]
    change = -A * p * (p.log() + H)
    assert math.isclose(m["entropy/change_predicted"], change[mask].sum() / 4, rel_tol=1e-5)
    shares = [change[0, 0], change[0, 1] + change[0, 2], 0.0, change[1, 0]]
    size = change[mask].abs().sum()
    assert np.allclose([m[f"quadrant/{q}_dH_share"] for q in entropy.QUADRANTS], [float(s / size) for s in shares])
    assert m["quadrant/pos_likely_dH_share"] < 0 < m["quadrant/pos_rare_dH_share"]
    cov = token_covariance(p.log(), A, mask)[mask]
    assert math.isclose(m["policy/cov_mean"], cov.mean(), rel_tol=1e-5, abs_tol=1e-7)
    assert math.isclose(m["policy/cov_top_0.2"], cov.max(), rel_tol=1e-5)
    many, A = torch.rand(50, 100).clamp(min=1e-3), torch.randn(50, 1).expand(50, 100)
    old = dict(log_probs=many.log(), token_entropy=many, sum_p2=many, sum_p2_log_p=many)
    m = entropy.measure(old, A, many > 0, lambda x: x.double(), group_accuracy=many, group_size=2)
    cov = token_covariance(many.log(), A, many > 0).flatten().sort(descending=True).values
    for share in over_seeds.TOP_SHARES:
        assert math.isclose(m[f"policy/cov_top_{share}"], cov[:round(5000 * float(share))].mean(), rel_tol=1e-5)


def test_estimates_of_the_entropy_change_against_the_measured_one():
    """Tokens with free logits of their own, one step of plain gradient descent: the exact estimate is the derivative, the
    others leave something out."""
    g = torch.Generator().manual_seed(0)
    B, T, V = 64, 8, 16
    logits = (2 * torch.randn(B, T, V, generator=g, dtype=torch.float64)).requires_grad_()
    tokens = torch.distributions.Categorical(logits=logits.detach()).sample()
    A = group_advantages((torch.rand(B, generator=g) < 0.3).double(), 8)[:, None].expand(B, T)
    mask = torch.arange(T) < torch.randint(1, T + 1, (B, 1), generator=g)
    statistics = lambda z: {name: f(torch.log_softmax(z, -1).view(-1, V), tokens.flatten()).view(B, T)
                            for name, f in entropy.STATISTICS.items() if name in entropy.MICROSCOPE}
    old = statistics(logits)
    losses.grpo(old["log_probs"], old["log_probs"].detach(), A, mask)[0].backward()
    after = statistics(logits.detach() - 1e-3 * mask.sum() * logits.grad)
    measured = (after["token_entropy"] - old["token_entropy"].detach())[mask]
    found = entropy.estimates(*(old[name].detach() for name in entropy.MICROSCOPE), A, mask)
    pearson = {name: np.corrcoef(x[mask], measured)[0, 1] for name, x in found.items()}
    assert torch.allclose(1e-3 * found["exact"][mask], measured, rtol=0, atol=1e-5)
    assert pearson["exact"] > 0.9999
    assert all(0 < r < 0.95 for name, r in pearson.items() if name != "exact"), pearson


def test_group_covariance_by_hand():
    """Groups of three: flat, one right of three, two right of three; and a bucket without a group has no metric."""
    log_probs = torch.tensor([[-1, -9, 7]] * 3 + [[-1, -1, 7], [-2, -4, 7], [-2, -2, 7]] + [[0, -2, 7], [-1, -1, 7], [-4, -4, 7]]).float()
    rewards = torch.tensor([0, 0, 0, 1, 0, 0, 1, 0, 1]).float()
    A, accuracy = group_advantages(rewards, 3, "none"), rewards.view(3, 3).mean(1).repeat_interleave(3)
    mask = torch.tensor([[True, True, False]]).expand(9, 3)
    columns = lambda x: x[:, None] * mask
    found = lambda rows: entropy.group_covariance(log_probs[rows], columns(A)[rows], mask[rows], lambda x: x, columns(accuracy)[rows], 3)
    # l = (-1, -3, -2) around -2, A = (2, -1, -1) / 3; then l = (-1, -1, -4) around -2, A = (1, -2, 1) / 3
    hard, easy = (1 * 2 + -1 * -1 + 0) / 9, (1 * 1 + 1 * -2 + -2 * 1) / 9
    expected = {"policy/group_cov_mean": (hard + easy) / 3, "policy/group_cov_hard": hard, "policy/group_cov_easy": easy}
    assert found(slice(0, 9)) == pytest.approx(expected, abs=1e-7)
    assert found(slice(0, 3)) == {"policy/group_cov_mean": 0}
    half = group_advantages(torch.tensor([1.0, 0]), 2, "none")[:, None]
    middle = entropy.group_covariance(log_probs[3:5, :1], half, half != 0, lambda x: x, torch.full((2, 1), 0.5), 2)
    assert middle == pytest.approx({"policy/group_cov_mean": 0.25, "policy/group_cov_mid": 0.25})


def test_entropy_after_is_the_change_on_the_first_answers():
    dist.init_process_group("gloo")
    model, cfg = random_model(), types.SimpleNamespace(group_size=2, micro_batch_tokens=12)
    policy = entropy.Policy(model, 1.0)
    batch = rollout.collate([dict(prompt=[3, 4], response=list(range(5, 5 + n)), log_probs=[0.0] * n, advantage=0.0, reward=0.0,
                                  group_accuracy=0.0) for n in (3, 9, 7, 1, 2, 4)], "cpu")
    before, after = [], []
    for entropies in (before, after):
        entropies.append(entropy.score_all(policy, batch, ["token_entropy"], 100, 1)["token_entropy"])
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)
    change = (after[0] - before[0])[::2][batch["response_mask"][::2]].mean().item()
    with torch.no_grad():
        model.lm_head.weight.div_(1.5)
    assert change < -0.01
    assert math.isclose(entropy.entropy_after(policy, batch, {"token_entropy": before[0]}, cfg), change, rel_tol=1e-4)


def test_micro_batches_hold_the_budget_and_every_row():
    dist.init_process_group("gloo")
    lengths = [5, 100, 7, 60, 33, 8, 2, 300]
    batches = rollout.micro_batches(lengths, [0, 1, 2, 3, 4, 5, 6, 7], budget=128)
    assert sorted(i for b in batches for i in b) == list(range(8))
    assert all(len(b) * max(lengths[i] for i in b) <= 128 or len(b) == 1 for b in batches) and len(batches) < 8


def test_sorted_micro_batches_give_the_gradient_of_one_padded_block():
    dist.init_process_group("gloo")
    model, (B, T) = random_model("qwen2").double(), (12, 20)
    policy, lengths = entropy.Policy(model, 1.0), [1, 20, 3, 7, 2, 13, 5, 1, 9, 17, 4, 6]
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    batch = dict(ids=torch.randint(2, 20, (B, 4 + T)), prompt_lens=torch.full((B,), 4), lengths=torch.tensor(lengths) + 4,
                 response_mask=mask)
    advantages, found = torch.randn(B, 1).double() * mask, []
    for budget in (10**9, 40):
        split = rollout.micro_batches(batch["lengths"].tolist(), range(B), budget) if budget < 10**9 else [list(range(B))]
        assert budget == 10**9 or len(split) > 4 and split[0] != [0, 1, 2]
        model.zero_grad()
        for rows in split:
            log_probs = entropy.score(policy, batch, rows, ["log_probs"])["log_probs"].double()
            width = log_probs.shape[1]
            loss, _ = METHODS["grpo"](log_probs, log_probs.detach(), advantages[rows, :width], mask[rows, :width],
                                      num_tokens=mask.sum())
            loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (found[0] - found[1]).norm() < 1e-6 * found[0].norm()


def test_data_order_is_a_fresh_permutation_each_epoch():
    order = [rollout.data_index(i, 7, seed=3) for i in range(21)]
    assert all(sorted(order[i:i + 7]) == list(range(7)) for i in (0, 7, 14)) and len({tuple(order[i:i + 7]) for i in (0, 7, 14)}) > 1


# ---- the law and the diagnosis of a run -------------------------------------------------------------------------------

def made_up_run(entropy=lambda i: 0.6 - 0.005 * i, n=60, **other):
    """Metrics of n steps whose reward obeys R = -0.2 exp(H) + 0.5 exactly; pos_likely spends, pos_rare adds entropy."""
    shares = dict(pos_likely=-0.5, pos_rare=0.2, neg_likely=0.1, neg_rare=-0.2)
    rows = [{"step": 0, "eval/pass@1": 0.5 - 0.2 * math.exp(entropy(1))}]
    for i in range(1, n + 1):
        rows.append({"step": i, "entropy/response_mean": entropy(i), "reward/mean": 0.5 - 0.2 * math.exp(entropy(i)),
                     "response/truncated_frac": 0.0, "reward/zero_std_frac": 0.5, "rollout/gap_mean": 1e-7}
                    | {f"quadrant/{q}_frac": 0.125 for q in shares}
                    | {f"quadrant/{q}_dH_share": share for q, share in shares.items()} | other)
        if i % 20 == 0:
            rows[-1]["eval/pass@1"] = 0.5 - 0.2 * math.exp(entropy(i + 1))
    return rows


def test_the_law_is_recovered_exactly_and_foretold():
    H = np.linspace(1.2, 0.1, 40)
    law = entropy.fit_law(H, 0.7 - 0.15 * np.exp(H))
    assert np.allclose([law[k] for k in ("a", "b", "ceiling", "r2", "rmse")], [0.15, 0.7, 0.55, 1, 0])
    ahead = entropy.law_forecast(H, 0.7 - 0.15 * np.exp(H))
    assert ahead["points"] == 6 and np.allclose([ahead["ceiling"], ahead["rmse_rest"], ahead["error_last"]], [0.55, 0, 0])
    bent = 0.7 - 0.15 * np.exp(H) + 0.03 * (np.arange(40) >= 6)  # only what was not fitted departs, by a constant
    ahead = entropy.law_forecast(H, bent)
    assert np.allclose([ahead["rmse_rest"], ahead["error_last"]], 0.03) and entropy.fit_law(H, bent)["r2"] < 1


def test_the_law_under_noise():
    H, noise = np.linspace(1.2, 0.1, 2000), np.random.default_rng(0).normal(0, 0.05, 2000)
    law = entropy.fit_law(H, 0.7 - 0.15 * np.exp(H) + noise)
    assert abs(law["a"] - 0.15) < 0.01 and abs(law["ceiling"] - 0.55) < 0.02 and abs(law["rmse"] - 0.05) < 0.003
    assert abs(law["r2"] - (1 - 0.05**2 / np.var(0.7 - 0.15 * np.exp(H) + noise))) < 0.01


@pytest.mark.parametrize("H, R, message", [([0.5, 0.4], [0.1, 0.2], "at least 3 points, not 2"), ([0.5] * 4, [1, 2, 3, 4], "are equal"),
                                           ([1, 2, 3], [0, 0, 0], "are equal")])
def test_the_law_needs_something_to_fit(H, R, message):
    with pytest.raises(ValueError, match=message):
        entropy.fit_law(H, R)
    with pytest.raises(ValueError, match="at least 3 points, not 2"):
        entropy.law_forecast([3, 2, 1], [1, 2, 3], first=0.6)


def test_law_points_pair_an_evaluation_with_the_next_steps_entropy():
    rows = made_up_run(n=40)
    H, R = entropy.law_points(rows, "eval/pass@1")
    assert H == [rows[1]["entropy/response_mean"], rows[21]["entropy/response_mean"]]  # after step 40 there is none
    assert R == [rows[0]["eval/pass@1"], rows[20]["eval/pass@1"]]
    assert entropy.law_points(rows, "reward/mean")[0] == [row["entropy/response_mean"] for row in rows[1:]]


def test_diagnosis_in_sentences():
    told = "\n".join(entropy.diagnose(made_up_run(**{"policy/selected_frac": 0.02}), "mine"))
    for part in ("mine: 60 steps; entropy fell from 0.595 to 0.312 nats per token, by 47 %", "twelfth of the steps made 9 %",
                 "third 35 %", "Predicted: pos_likely", "took the most: -0.50", "by 12.5 % of the tokens", "neg_rare -0.20",
                 "Net -0.40, the direction measured", "act on pos_likely: clip_cov, kl_cov", "chose 2.0 %",
                 "reward/zero_std_frac: 50.0 %", "never over train.py's limit of 90.0 %", "reward/mean = -0.200 exp(H) +0.500",
                 "R^2 1.00", "ceiling at H = 0: 0.300", "on the first 9 points"):
        assert part in told, part
    assert "Not in these metrics" not in told and told.count("no explanation") == 3


def test_diagnosis_of_a_rise_a_hold_and_of_what_may_explain_them():
    rose = "\n".join(entropy.diagnose(made_up_run(lambda i: 0.3 + 0.01 * i), "up"))
    assert "entropy rose from 0.310" in rose and "pos_rare, the rare tokens of right answers" in rose and "raised the most: +0.20" in rose
    assert "against the direction measured" in rose
    held = "\n".join(entropy.diagnose(made_up_run(lambda i: 0.5 + 0.001 * (i % 2)), "flat"))
    assert "entropy held: 0.501" in held and "measured" not in held
    other = {"response/truncated_frac": 0.95, "reward/zero_std_frac": 0.91, "rollout/gap_mean": 0.2}
    told = "\n".join(entropy.diagnose(made_up_run(**other), "bad"))
    assert told.count("in 60 of 60 steps") == 3 and all(s[3] in told for s in record.SUSPICIOUS if s[0] in other)


def test_diagnosis_names_what_is_missing_and_goes_on():
    wanted = [key for key in made_up_run()[20] if key != "step"]
    for gone in wanted:
        told = entropy.diagnose([{k: v for k, v in row.items() if k != gone} for row in made_up_run()], "x")
        assert told[-1] == f"Not in these metrics, so nothing is said of it: {gone}." and len(told) > 4
    assert len(entropy.diagnose([{"step": 1}], "x")) == 2
    for n in (1, 2, 3, 12, 13):  # unfinished runs
        assert f"x: {n} steps" in entropy.diagnose(made_up_run(n=n), "x")[0]
    assert "Not finite in some steps, which were left out: reward/mean." in entropy.diagnose(made_up_run() + [
        {"step": 61, "reward/mean": math.nan}], "x")


def test_every_method_is_said_to_act_somewhere():
    assert set(METHODS) - {"grpo"} == {m for names in entropy.ACTS.values() for m in names} | set(entropy.ACT_EVERYWHERE)
    assert set(record.COLOURS) == set(METHODS) and len(set(record.COLOURS.values())) == len(METHODS)


def test_diagnosis_command(tmp_path):
    for name, method, n in (("a", "grpo", 60), ("b", "clip_cov", 30)):
        (tmp_path / name).mkdir()
        rows = made_up_run(lambda i: 0.6 - 0.005 * i * (method == "grpo"), n)
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9')
        (tmp_path / name / "config.json").write_text(json.dumps({"method": method}))
    command = [sys.executable, "entropy.py", str(tmp_path / "a"), str(tmp_path / "b")]
    told = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True).stdout
    assert "a: 60 steps" in told and "b: 30 steps" in told and "Entropy at step 30" in told and "b 0.600, a 0.455" in told
    assert (tmp_path / "a" / "diagnosis.png").stat().st_size > 10_000


@pytest.mark.parametrize("text, message", [(None, "no metrics to read"), ("", "are empty"), ("hello\n", "JSON object per line"),
                                           ('[1]\n', "only numbers"), ('{"step": 1, "set": "x"}\n', "only numbers"),
                                           ('{"reward/mean": 1}\n', "a step")])
def test_diagnosis_of_no_metrics_is_one_line_and_exit_code_2(text, message, tmp_path, monkeypatch, capsys):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    monkeypatch.setattr(sys, "argv", ["entropy.py", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        entropy.main()
    told = capsys.readouterr().err
    assert end.value.code == 2 and message in told and told.count("\n") == 1


def test_curves_have_a_band_over_seeds_and_a_fixed_colour_per_method(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt
    monkeypatch.setattr(plt, "close", lambda figure: None)
    seeds = [[{"step": i, "reward/mean": r + 0.1 * i} for i in range(n)] for r, n in ((0.1, 5), (0.3, 4))]
    record.plot_curves({"kl_cov-seed0": seeds, "kl_cov: other": seeds[:1], "mine": seeds[:1]}, tmp_path / "x.png", {"reward/mean": "R"})
    axis, = plt.gcf().axes
    mean, other, mine = axis.get_lines()
    assert np.allclose(mean.get_ydata(), [0.2, 0.3, 0.4, 0.5])  # at the steps that both seeds have
    low, high = axis.collections[0].get_datalim(axis.transData).intervaly
    assert np.allclose([low, high], [0.1, 0.6])
    assert mean.get_color() == other.get_color() == record.COLOURS["kl_cov"] != mine.get_color()
    assert mean.get_linestyle() != other.get_linestyle()


# ---- end to end: a toy model that learns to repeat a digit ------------------------------------------------------------

def random_model(kind="qwen2", vocab_size=32, hidden=32):
    torch.manual_seed(0)
    common = dict(vocab_size=vocab_size, bos_token_id=None, eos_token_id=1, pad_token_id=0)
    if kind == "gpt2":
        config = GPT2Config(n_embd=hidden, n_layer=2, n_head=2, n_positions=64, **common)
    else:
        config = Qwen2Config(hidden_size=hidden, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                             num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True, **common)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A model that answers the prompt "7" with some digit, and problems whose right answer is that digit."""
    folder = tmp_path_factory.mktemp("toy")
    tokenizer = tiny.make_tokenizer()
    model = random_model("gpt2", vocab_size=len(tokenizer)).train()
    digits = torch.tensor([tokenizer(str(d))["input_ids"][0] for d in range(1, 9)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(100):
        prompt, answer = digits[torch.randint(8, (64,))], digits[torch.randint(8, (64,))]
        ids = torch.stack([prompt, answer, torch.full_like(prompt, tokenizer.eos_token_id)], 1)
        model(input_ids=ids, labels=torch.where(torch.arange(3) < 1, -100, ids)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    with open(folder / "digits.jsonl", "w") as file:
        for d in range(1, 9):
            file.write(json.dumps({"prompt": [{"role": "user", "content": f"{d}"}],
                                   "reward_model": {"ground_truth": {"numbers": [d], "target": d}}}) + "\n")
    return folder


def toy_args(toy, out, name, *more):
    return ["--model", f"{toy}/model", "--data", f"{toy}/digits.jsonl", "--eval_data", f"{toy}/digits.jsonl", "--out", str(out),
            "--name", name, "--prompts_per_step", "8", "--group_size", "4", "--updates_per_rollout", "2", "--steps", "2", "--lr", "1e-3",
            "--max_prompt_len", "8", "--max_response_len", "4", "--eval_every", "2", "--eval_samples", "4", "--save_every", "2",
            "--engine", "torch", *more]


def toy_run(toy, out, name, *more):
    """train.main in this process; returns the rows of its metrics."""
    train.main(toy_args(toy, out, name, *more))
    return record.read_metrics(Path(out) / name)


def without_times(rows):
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def torchrun(processes, args, timeout=120):
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port",
                           str(free_port()), "train.py", *args], cwd=HERE, capture_output=True, text=True, timeout=timeout,
                          env={k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")})


def free_port():
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


@pytest.fixture(autouse=True)
def no_process_group_left():
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def weights(folder):
    path = train.checkpoints(folder)[-1]
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()


def test_learns_and_spends_entropy(toy, tmp_path):
    rows = toy_run(toy, tmp_path, "learns", "--steps", "60", "--lr", "3e-3", "--prompts_per_step", "32", "--group_size", "8",
                   "--eval_every", "60", "--save_every", "60")
    assert rows[1]["reward/mean"] < 0.2 and rows[-1]["reward/mean"] > 0.5 and rows[-1]["eval/pass@1"] > rows[0]["eval/pass@1"] + 0.3
    assert rows[-1]["entropy/response_mean"] < rows[1]["entropy/response_mean"] - 0.4
    assert [row["step"] for row in rows] == list(range(61))
    assert rows[1]["rollout/gap_max"] < 1e-4                           # sampler and trainer agree
    assert (tmp_path / "learns" / "curves.png").stat().st_size > 10_000
    assert AutoTokenizer.from_pretrained(train.checkpoints(tmp_path / "learns")[-1])("7*")["input_ids"] == [tiny.VOCAB["7"], tiny.VOCAB["*"]]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_two_steps(method, toy, tmp_path):
    rows = toy_run(toy, tmp_path, method, "--method", method)
    assert len(rows) == 3 and all(math.isfinite(row["train/loss"]) and row["train/skipped"] == 0 for row in rows[1:])


@pytest.mark.parametrize("method", ["grpo", *losses.CONTROLLERS])
def test_resume_is_bit_for_bit(method, toy, tmp_path, monkeypatch):
    """Interrupted in step 3, after its updates: the checkpoint of step 2 and --resume give what the whole run gives."""
    args = ("--method", method, "--dynamic_sampling", "--steps", "4", "--eval_every", "1", "--save_every", "1")
    whole = toy_run(toy, tmp_path, "whole", *args)
    with monkeypatch.context() as patch:
        write = record.RunLog.write
        patch.setattr(record.RunLog, "write", lambda log, row: write(log, row) if row["step"] < 3 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            toy_run(toy, tmp_path, "parts", *args)
    dist.destroy_process_group()
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as file:       # a row of after the checkpoint is not kept
        file.write(json.dumps({"step": 3, "reward/mean": 99.0}) + "\n")
    parts = toy_run(toy, tmp_path, "parts", *args, "--resume")
    assert without_times(parts) == without_times(whole)
    assert all(torch.equal(a, b) for a, b in zip(weights(tmp_path / "parts").values(), weights(tmp_path / "whole").values()))


def test_a_finished_run_goes_on_as_the_longer_run(toy, tmp_path):
    args = ("--eval_every", "1", "--save_every", "1")
    whole = toy_run(toy, tmp_path, "whole", *args, "--steps", "4")
    toy_run(toy, tmp_path, "parts", *args, "--steps", "2")
    assert without_times(toy_run(toy, tmp_path, "parts", *args, "--steps", "4", "--resume")) == without_times(whole)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_update_sees_a_ratio_of_exactly_one(dtype, toy, tmp_path):
    """Else KL-Cov's sign(log r) would act on rounding errors, and a clip of 3e-4 on bfloat16's."""
    row = toy_run(toy, tmp_path, "one", "--updates_per_rollout", "1", "--steps", "1", "--micro_batch_tokens", "40", "--dtype", dtype)[1]
    assert row["policy/kl_to_rollout"] == 0.0 and row["train/grad_norm"] > 0


def test_micro_batches_give_the_same_run(toy, tmp_path):
    one, many = (toy_run(toy, tmp_path, f"m{budget}", "--micro_batch_tokens", budget) for budget in ("10000", "9"))
    for a, b in zip(one[1:], many[1:]):
        assert math.isclose(a["train/grad_norm"], b["train/grad_norm"], rel_tol=1e-5)
        assert math.isclose(a["train/loss"], b["train/loss"], rel_tol=1e-5, abs_tol=1e-6)


def test_two_ranks_equal_one_and_fsdp_equals_ddp(toy, tmp_path):
    toy_run(toy, tmp_path, "one", "--eval_prompts", "1")                # of two ranks, one has nothing to evaluate
    for parallel in ("ddp", "fsdp"):
        result = torchrun(2, toy_args(toy, tmp_path, parallel, "--parallel", parallel, "--eval_prompts", "1"))
        assert result.returncode == 0, result.stderr
        one, two = (record.read_metrics(tmp_path / name) for name in ("one", parallel))
        assert [row.keys() for row in one] == [row.keys() for row in two]
        for a, b in zip(one, two):
            for key in a:
                if not key.startswith(("time/", "policy/cov", "rollout/gap")):  # covariances are per rank; the gap is rounding
                    assert math.isclose(a[key], b[key], rel_tol=1e-5, abs_tol=1e-6), key
        two = weights(tmp_path / parallel)  # AdamW scales gradients that are rounding only (k_proj.bias) to the size of real ones
        close = torch.cat([torch.isclose(x, two[name], rtol=0, atol=1e-6).flatten() for name, x in weights(tmp_path / "one").items()])
        assert close.float().mean() > 0.99
    args = toy_args(toy, tmp_path, "fsdp", "--parallel", "fsdp", "--steps", "3", "--resume", "--eval_prompts", "1")
    assert (result := torchrun(2, args)).returncode == 0, result.stderr
    assert record.read_metrics(tmp_path / "fsdp")[-1]["step"] == 3


def test_steps_0_evaluates_a_folder(toy, tmp_path, capsys):
    """Two sets, one of three rows that are one problem, and of which no answer is right; on one rank and on two."""
    row = {"prompt": [{"role": "user", "content": "7"}], "reward_model": {"ground_truth": {"numbers": [13, 13], "target": 7}}}
    (tmp_path / "no way.jsonl").write_text((json.dumps(row) + "\n") * 3)
    args = ("--steps", "0", "--data", "nowhere.jsonl", "--eval_data", f"{toy}/digits.jsonl", f"{tmp_path}/no way.jsonl",
            "--eval_samples", "32", "--eval_temperature", "0.6", "--prompts_per_step", "7")   # data and batches are not looked at
    row, = toy_run(toy, tmp_path, "one", *args)
    out, err = capsys.readouterr()
    assert "the first prompt:\n1\n" in out and "warning" not in err.lower()
    head, *lines = [line.split() for line in out.splitlines() if "digits " in line or "no-way " in line or "avg@32" in line]
    assert head == ["set", "problems", "avg@32", *(f"pass@{k}" for k in (2, 4, 8, 16, 32)), "len", "truncated", "entropy", "AUROC", "ECE"]
    assert [line[:2] for line in lines] == [["digits", "8"], ["no-way", "1"]] and lines[1][-2] == "-"
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == \
        ["config.json", "eval-digits.json", "eval-no-way.json", "metrics.jsonl"]
    files = {name: json.loads((tmp_path / "one" / f"eval-{name}.json").read_text()) for name in ("digits", "no-way")}
    assert files["digits"]["model"] == f"{toy}/model" and files["digits"]["samples"] == 32 and files["digits"]["temperature"] == 0.6
    for name, file in files.items():
        assert {f"eval/{name}/{key}": file[key] for key in list(file)[8:]}.items() <= row.items()
    assert 0 < row["eval/pass@1"] == files["digits"]["pass@1"] / 2 and row["eval/problems"] == 9
    assert "eval/digits/auroc" in row and not {"eval/auroc", "eval/no-way/auroc", "eval/conf_right"} & set(row)
    result = torchrun(2, toy_args(toy, tmp_path, "two", *args))
    assert result.returncode == 0 and result.stdout.count("the first prompt:") == 1, result.stderr
    two, = record.read_metrics(tmp_path / "two")
    assert two == pytest.approx(row, rel=1e-5, abs=1e-6) and list(two) == list(row)


def test_training_evaluates_as_steps_0_does(toy, tmp_path, capsys):
    """The last evaluation of a run is that of its last checkpoint; one set has no other keys than its own."""
    trained = toy_run(toy, tmp_path, "trained", "--eval_temperature", "0.8")[-1]
    assert capsys.readouterr().out.count("the first prompt:") == 1
    again, = toy_run(toy, tmp_path, "again", "--eval_temperature", "0.8", "--steps", "0", "--model", f"{tmp_path}/trained/checkpoint-2")
    assert again == pytest.approx({key: value for key, value in trained.items() if key.startswith("eval/")} | {"step": 0}, rel=1e-5)
    last, = (tmp_path / "trained").glob("eval-*")
    assert last.name == "eval-digits.json" and json.loads(last.read_text())["step"] == 2
    assert "eval/entropy" in again and not any("digits" in key for key in again)


def test_an_evaluation_file_is_whole_or_absent(tmp_path, monkeypatch):
    record.write_whole(tmp_path / "eval-a.b.json", "old")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", lambda path, text: path.open("w").write(text[:1]) / 0)
        with pytest.raises(ZeroDivisionError):
            record.write_whole(tmp_path / "eval-a.b.json", "new")
    assert (tmp_path / "eval-a.b.json").read_text() == "old"


def test_activation_checkpointing_changes_no_number(toy, tmp_path):
    plain, recomputed = toy_run(toy, tmp_path, "plain"), toy_run(toy, tmp_path, "recomputed", "--activation_checkpointing")
    assert without_times(plain) == without_times(recomputed)


def test_dynamic_sampling_replaces_flat_groups(toy, tmp_path):
    plain, dynamic = toy_run(toy, tmp_path, "plain", "--steps", "1"), toy_run(toy, tmp_path, "dynamic", "--steps", "1", "--dynamic_sampling")
    assert dynamic[1]["reward/zero_std_frac"] == 0 < plain[1]["reward/zero_std_frac"]


def test_tis_cap_scales_the_gradient(toy, tmp_path, monkeypatch):
    plain = toy_run(toy, tmp_path, "plain", "--steps", "1")
    halved = toy_run(toy, tmp_path, "halved", "--steps", "1", "--tis_cap", "0.5")  # engine and trainer agree: every weight is 0.5
    assert math.isclose(halved[1]["train/loss"], plain[1]["train/loss"], rel_tol=0.1, abs_tol=1e-3)
    assert halved[1]["train/grad_norm"] < 0.6 * plain[1]["train/grad_norm"]


def test_updates_that_are_not_finite_are_skipped_counted_and_end_the_run(toy, tmp_path, monkeypatch):
    calls, grpo = [], METHODS["grpo"]

    def sometimes_nan(*args, **kwargs):
        calls.append(1)
        loss, metrics = grpo(*args, **kwargs)
        return (loss * math.nan if len(calls) in (1, 2) else loss), metrics

    monkeypatch.setitem(METHODS, "grpo", sometimes_nan)
    monkeypatch.setattr(train, "parse_knobs", lambda *a: ({}, {}, {}))
    rows = toy_run(toy, tmp_path, "sometimes")
    assert [row["train/skipped"] for row in rows[1:]] == [2, 0] and math.isfinite(rows[2]["train/loss"])
    assert all(x.isfinite().all() for x in weights(tmp_path / "sometimes").values())
    monkeypatch.setitem(METHODS, "grpo", lambda *a, **k: (grpo(*a, **k)[0] * math.nan, {}))
    with pytest.raises(SystemExit, match="ten updates in a row"):
        toy_run(toy, tmp_path, "always", "--steps", "20")


# ---- runs that survive ------------------------------------------------------------------------------------------------

def test_killed_runs_go_on_bit_for_bit():
    """Short form of `python -m experiments.reliability kill 50`: SIGKILL at random moments, begun in sampling, in an update."""
    result = subprocess.run([sys.executable, "-m", "experiments.reliability", "kill", "2"], cwd=HERE, capture_output=True, text=True,
                            timeout=300)
    assert "2 kills" in result.stdout and "left alone: 0;" in result.stdout, result.stdout + result.stderr


@pytest.mark.skipif("LONG" not in os.environ, reason="ten minutes: LONG=1 pytest test_all.py -k killed_often")
@pytest.mark.parametrize("kills, ranks, apart", [(50, 1, 0.0), (10, 2, 1e-6)])
def test_killed_often(kills, ranks, apart):
    result = subprocess.run([sys.executable, "-m", "experiments.reliability", "kill", str(kills), str(ranks)], cwd=HERE,
                            capture_output=True, text=True)
    assert float(re.search("left alone: (.*);", result.stdout)[1]) <= apart, result.stdout + result.stderr


def started(args, ranks=1):
    """train.py in the background, after its first step; under torchrun with several ranks."""
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", str(free_port())] if ranks > 1 else []
    process = subprocess.Popen([sys.executable, *launch, "train.py", *args], cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")})
    metrics = Path(args[args.index("--out") + 1], args[args.index("--name") + 1], "metrics.jsonl")
    while process.poll() is None and not (metrics.exists() and '"step": 1,' in metrics.read_text()):
        time.sleep(0.02)
    return process


def test_sigterm_writes_a_checkpoint_and_says_how_to_go_on(toy, tmp_path):
    args = toy_args(toy, tmp_path, "term", "--steps", "100000", "--save_every", "100000", "--eval_every", "100000")
    process = started(args)
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "--resume" in out and "stopped by SIGTERM" in out, out + err
    step = record.read_metrics(tmp_path / "term")[-1]["step"]
    assert [path.name for path in train.checkpoints(tmp_path / "term")] == [f"checkpoint-{step}"]
    assert "torchrun --nproc-per-node 1 train.py" in out
    command = shlex.split(out[out.index("train.py --"):].splitlines()[0])[1:]
    command[command.index("100000")] = str(step + 1)                   # --steps
    train.main(command)
    assert record.read_metrics(tmp_path / "term")[-1]["step"] == step + 1


def test_sigterm_before_the_first_step_ends_the_run(toy, tmp_path):
    args = toy_args(toy, tmp_path, "early", "--eval_samples", "200000")  # an evaluation of minutes
    process = subprocess.Popen([sys.executable, "train.py", *args], cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (tmp_path / "early" / "metrics.jsonl").exists():
        time.sleep(0.02)
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == -signal.SIGTERM


def test_sigterm_to_two_ranks_saves_one_checkpoint_that_two_ranks_resume(toy, tmp_path):
    args = toy_args(toy, tmp_path, "ranks", "--steps", "100000", "--save_every", "100000", "--eval_every", "100000")
    process = started(args, ranks=2)
    process.terminate()                                                # torchrun passes it on to its ranks
    out, err = process.communicate(timeout=60)
    step = record.read_metrics(tmp_path / "ranks")[-1]["step"]
    assert [path.name for path in train.checkpoints(tmp_path / "ranks")] == [f"checkpoint-{step}"], out + err
    assert "--nproc-per-node 2 train.py" in out and "--resume" in out
    args[args.index("100000")] = str(step + 1)
    assert torchrun(2, [*args, "--resume"]).returncode == 0
    assert record.read_metrics(tmp_path / "ranks")[-1]["step"] == step + 1


def test_one_rank_of_two_dying_ends_the_other(toy, tmp_path):
    args = toy_args(toy, tmp_path, "two", "--steps", "100000", "--save_every", "100000", "--eval_every", "100000")
    process = started(args, ranks=2)
    ranks = [int(pid) for pid in subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()]
    os.kill(ranks[-1], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and "Signal 9" in err
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


def test_a_full_disk_leaves_the_last_checkpoint(toy, tmp_path, monkeypatch):
    before, write = resource.getrlimit(resource.RLIMIT_FSIZE), record.RunLog.write

    def until_full(log, row):
        write(log, row)
        if row["step"] == 2:                                           # the next file ends after 20 kB, as on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    monkeypatch.setattr(record.RunLog, "write", until_full)
    try:
        with pytest.raises(SystemExit, match="no room for checkpoint-2.*last complete one is checkpoint-1; make room"):
            toy_run(toy, tmp_path, "full", "--save_every", "1", "--eval_every", "5")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    dist.destroy_process_group()
    monkeypatch.setattr(record.RunLog, "write", write)
    assert sorted(path.name for path in (tmp_path / "full").iterdir()) == ["checkpoint-1", "config.json", "eval-digits.json",
                                                                            "metrics.jsonl"]
    assert len(toy_run(toy, tmp_path, "full", "--save_every", "1", "--eval_every", "5", "--resume")) == 3


@pytest.mark.parametrize("harm, complaint", [
    (lambda c: (c / "trainer_state.pt").write_bytes((c / "trainer_state.pt").read_bytes()[:500]), "truncated or no checkpoint"),
    (lambda c: torch.save({"step": 2}, c / "trainer_state.pt"), "truncated or no checkpoint"),
    (lambda c: torch.save({"step": 2, "run": "other"}, c / "trainer_state.pt"), "of the run other"),
    (lambda c: torch.save(Fraction(1, 2), c / "trainer_state.pt"), "truncated or no checkpoint"),  # pickled code: not loaded
    (lambda c: (c / "model.safetensors").write_bytes((c / "model.safetensors").read_bytes()[:500]), "truncated"),
    (lambda c: (c / "config.json").write_text((c / "config.json").read_text().replace('"n_layer": 2', '"n_layer": 3')), "another model"),
])
def test_a_broken_or_foreign_checkpoint_is_refused(harm, complaint, toy, tmp_path, capsys):
    toy_run(toy, tmp_path, "harmed")
    harm(tmp_path / "harmed" / "checkpoint-2")
    with pytest.raises(SystemExit):
        train.main(toy_args(toy, tmp_path, "harmed", "--resume", "--steps", "3"))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("train.py: error: ") and f"{tmp_path}/harmed/checkpoint-2" in error and complaint in error


def test_the_best_and_the_last_checkpoints_stay(toy, tmp_path, monkeypatch):
    scores = iter([0.1, 0.2, 0.9, 0.3, 0.4, 0.5, 0.6])
    monkeypatch.setattr(train, "evaluate", lambda *a: [("digits", {"pass@1": next(scores)})])
    toy_run(toy, tmp_path, "best", "--steps", "6", "--save_every", "1", "--eval_every", "1", "--keep_checkpoints", "2")
    assert [path.name for path in train.checkpoints(tmp_path / "best")] == ["checkpoint-2", "checkpoint-5", "checkpoint-6"]
    toy_run(toy, tmp_path, "none", "--steps", "3", "--save_every", "1", "--eval_data", "none", "--keep_checkpoints", "2")
    assert [path.name for path in train.checkpoints(tmp_path / "none")] == ["checkpoint-2", "checkpoint-3"]


def test_an_unfinished_line_of_metrics_is_dropped(toy, tmp_path):
    rows = toy_run(toy, tmp_path, "cut")
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "reward/me')
    assert record.read_metrics(tmp_path / "cut") == rows
    assert [row["step"] for row in toy_run(toy, tmp_path, "cut", "--resume", "--steps", "3")] == [0, 1, 2, 3]


def test_dry_run_prints_the_plan_and_writes_nothing(toy, tmp_path, capsys):
    train.main(toy_args(toy, tmp_path, "dry", "--dry_run"))
    text = capsys.readouterr().out
    count = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(f"{toy}/model").parameters())
    assert f"{count / 1e6:,.2f} M parameters" in text and f"{16 * count / 2**30:9.3f}  weights" in text
    assert text.count("---- prompt") == 3 and text.count(": right") == 3 and not (tmp_path / "dry").exists()
    problems = [Problem("What is 1+1?", "2", "math"), Problem("Impossible?", r"\begin{", "math")]
    verify.preview(Mock(decode=str), problems, [[1], [2]])
    assert "2}: right" in (text := capsys.readouterr().out) and "refused" in text


def test_metrics_go_to_wandb_or_tensorboard_too(toy, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        monkeypatch.setattr(record, "find_spec", lambda name: None)
        train.main(toy_args(toy, tmp_path, "log", "--log_to", "wandb"))
    assert "run `pip install wandb`" in capsys.readouterr().err
    monkeypatch.setattr(record, "find_spec", lambda name: True)
    sent, scalars = [], []
    run = types.SimpleNamespace(log=lambda row, step: sent.append((step, row)))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **_: run))
    writer = types.SimpleNamespace(add_scalar=lambda *scalar: scalars.append(scalar))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=lambda folder: writer))
    rows = toy_run(toy, tmp_path, "wandb", "--log_to", "wandb")
    assert sent == [(row["step"], row) for row in rows]
    rows = toy_run(toy, tmp_path, "board", "--log_to", "tensorboard")
    assert scalars == [(name, value, row["step"]) for row in rows for name, value in row.items()]


def test_code_that_comes_with_a_model_runs_only_when_trusted(toy, tmp_path, capsys):
    shutil.copytree(toy / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "mine.py").write_text(
        "from transformers import GPT2Config, GPT2LMHeadModel\n"
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "class Config(GPT2Config):\n    model_type = 'mine'\n"
        "class Model(GPT2LMHeadModel):\n    config_class = Config\n")
    args = toy_args(toy, tmp_path, "trust", "--model", f"{tmp_path}/model", "--steps", "1")
    with pytest.raises(SystemExit):
        train.main(args)
    assert "trust_remote_code" in capsys.readouterr().err and not (tmp_path / "ran").exists()
    train.main([*args, "--trust_remote_code"])
    assert (tmp_path / "ran").exists() and train.checkpoints(tmp_path / "trust")


# ---- bad input --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("args, complaint", [
    (["--method", "clip_kov"], "Methods: "),
    (["--method", "grpo", "--knobs", "cov_frac=0.1"], "grpo has no knob 'cov_frac'. It has: clip_low"),
    (["--engine", "sglang"], "there are auto"),
    (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    (["--prompts_per_step", "6", "--updates_per_rollout", "4"], "multiple of"),
    (["--data", f"{HERE}/nowhere.parquet"], "nowhere.parquet"),
    (["--resume"], "no complete checkpoint"),
    (["--name", "../up"], "one folder's name"),
    (["--temperature", "0"], "must be positive"),
    (["--parallel", "ddpp"], "choose from ddp, fsdp"),
    (["--method", "w_reinforce", "--dynamic_sampling"], "no baseline"),
    (["--knobs", "clip_low=nan"], "finite"),
    (["--max_response_len", "100"], "more than the positions"),
])
def test_bad_input_is_one_line_and_exit_code_2(args, complaint, toy, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(toy_args(toy, tmp_path, "bad", *args))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and error.startswith("train.py: error: ") and complaint in error


def test_a_prompt_that_is_too_long_is_refused(toy, tmp_path, capsys):
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": [{"role": "user", "content": "1" * 9}],
                                                     "reward_model": {"ground_truth": {"numbers": [1], "target": 1}}}))
    with pytest.raises(SystemExit):
        train.main(toy_args(toy, tmp_path, "long", "--data", f"{tmp_path}/long.jsonl"))
    assert "1 of 1 prompts are longer than --max_prompt_len 8: raise it to 9" in capsys.readouterr().err


def test_overwrite_deletes_runs_only(toy, tmp_path, capsys):
    (tmp_path / "precious").mkdir()
    with pytest.raises(SystemExit):
        train.main(toy_args(toy, tmp_path, "precious", "--overwrite"))
    assert "no run's folder" in capsys.readouterr().err and (tmp_path / "precious").exists()


def test_sets_with_equal_names_are_both_read(toy, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(json.dumps({"question": name, "answer": "1"}))
    sets = verify.load_sets([f"{tmp_path}/a/train.jsonl", f"{tmp_path}/b/train.jsonl"], "train")
    assert {name: problems[0].prompt[0] for name, problems in sets.items()} == {"train": "a", "train-2": "b"}


def test_a_sets_name_is_a_safe_file_name(monkeypatch):
    monkeypatch.setattr(verify, "load_problems", lambda name: [name])
    names = ["openai/gsm8k:main:test", "../../x y.jsonl", "/", "..", "a" * 250 + ".jsonl", "digits.jsonl", "digits.jsonl"]
    assert verify.load_sets(names, "test") == dict(zip(
        ["gsm8k-main-test", "x-y", "", "..", "a" * 100, "digits", "digits-2"], ([name] for name in names)))


def test_the_first_prompt():
    tokenizer = Mock(decode=lambda ids: "".join(map(chr, ids)))
    of = lambda text: list(map(ord, text))
    test_sets = {"a": ([], [of("2+2="), of("3+3=")])}
    assert verify.first_prompt(tokenizer, [of("1+1=")], test_sets) == "1+1="
    assert verify.first_prompt(tokenizer, [], test_sets) == "2+2=" and verify.first_prompt(tokenizer, [], {}) == ""
    long = verify.first_prompt(tokenizer, [of("a" * 500 + "b" * 500)], {})
    assert long == "a" * 400 + " [... 400 characters ...] " + "b" * 200


def test_an_evaluation_never_touches_a_trained_run(toy, tmp_path, capsys):
    toy_run(toy, tmp_path, "mine")
    config = (tmp_path / "mine" / "config.json").read_text()
    for args, complaint in ((["--steps", "0", "--resume"], "trained run's folder"), (["--steps", "0", "--overwrite"], "trained run's folder"),
                            (["--steps", "1", "--resume"], "is at step 2 already"),
                            (["--steps", "0", "--eval_data", "none"], "nothing to do")):
        with pytest.raises(SystemExit):
            train.main(toy_args(toy, tmp_path, "mine", *args))
        assert complaint in capsys.readouterr().err
    assert (tmp_path / "mine" / "config.json").read_text() == config and train.checkpoints(tmp_path / "mine")
    names = [train.parse(["--model", f"runs/{run}/checkpoint-10", "--steps", "0", "--eval_data", "countdown", "--out", str(tmp_path)]).name
             for run in "AB"]
    assert names == ["eval-A-checkpoint-10-seed0", "eval-B-checkpoint-10-seed0"]


def test_runs_are_neither_overwritten_nor_resumed_as_another(toy, tmp_path, capsys):
    toy_run(toy, tmp_path, "mine")
    for args, complaint in (([], "--resume goes on"), (["--resume", "--method", "kl_cov"], "--method grpo, not kl_cov")):
        with pytest.raises(SystemExit):
            train.main(toy_args(toy, tmp_path, "mine", *args))
        assert complaint in capsys.readouterr().err
    assert len(toy_run(toy, tmp_path, "mine", "--overwrite", "--steps", "1")) == 2


def test_bad_input_ends_every_rank(toy, tmp_path):
    result = torchrun(2, toy_args(toy, tmp_path, "bad", "--knobs", "x=1"), timeout=60)
    assert result.returncode != 0 and result.stderr.count("train.py: error: --knobs x=1") == 1


def test_warnings_name_the_cause_and_the_flag(toy, tmp_path, capsys):
    toy_run(toy, tmp_path, "warned", "--method", "kl_cov", "--updates_per_rollout", "1", "--max_response_len", "1", "--steps", "1")
    text = capsys.readouterr().err
    assert "kl_cov with --updates_per_rollout 1" in text and "raise --max_response_len" in text


def test_help_fits_two_screens(capsys):
    with pytest.raises(SystemExit):
        train.parse(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 70 and any("--lr " in line and "0.0001" in line for line in lines)  # tiny's defaults are shown


@pytest.mark.parametrize("chat", [True, False])
def test_real_schemas_go_through_every_part(chat, tmp_path):
    """Problems in verl's schema, a model with a byte-level BPE tokenizer trained on them, with and without a chat template."""
    problems = [{"prompt": [{"role": "user", "content": f"What is ${i}+{j}$? Answer: $Answer"}], "data_source": "math",
                 "reward_model": {"ground_truth": str(i + j), "style": "rule"}} for i in range(5) for j in range(5)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    make_model(tmp_path / "sums.jsonl", tmp_path / "model", vocab_size=300, chat=chat)
    outcomes.clear()                                                           # of the tests before
    train.main(["--model", f"{tmp_path}/model", "--data", f"{tmp_path}/sums.jsonl", "--out", str(tmp_path), "--name", "sums", "--steps", "1",
                "--prompts_per_step", "4", "--group_size", "2", "--updates_per_rollout", "2", "--max_prompt_len", "60",
                "--max_response_len", "8", "--method", "clip_cov"])
    row, = record.read_metrics(tmp_path / "sums")
    assert sum(row[f"verify/{verdict}"] for verdict in verify.VERDICTS) == 8 and math.isfinite(row["train/grad_norm"])


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed: .ci/run installs it")
def test_train_with_vllm_under_torchrun(toy, tmp_path):
    """FSDP2 on two ranks, weights pushed into vLLM after every step: were they stale, the gap would show it."""
    random_model(hidden=64).save_pretrained(tmp_path / "model")
    tiny.make_tokenizer().save_pretrained(tmp_path / "model")
    args = toy_args(toy, tmp_path, "vllm", "--model", f"{tmp_path}/model", "--engine", "vllm", "--parallel", "fsdp", "--steps", "3",
                    "--method", "kl_cov", "--lr", "1e-2")
    assert (result := torchrun(2, args, timeout=300)).returncode == 0, result.stderr[-4000:]
    rows = record.read_metrics(tmp_path / "vllm")
    assert len(rows) == 4 and all(row["rollout/gap_max"] < 1e-4 for row in rows[1:])


def readme_commands():
    """(environment of torchrun, words after train.py) of every train.py command in the README."""
    blocks = (HERE / "README.md").read_text().split("```")[1::2]
    lines = [part for block in blocks for line in block.replace("\\\n", " ").splitlines() for part in line.split("#")[0].split("&&")]
    return [" ".join(line.split()) for line in lines if "train.py --" in line]


@pytest.mark.parametrize("command", readme_commands())
def test_every_command_of_the_readme_parses(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "resolve_engine", lambda name, tp: name)
    words = shlex.split(command)
    processes = [int(words[i + 1]) for i, word in enumerate(words) if word in ("--nproc-per-node", "--nnodes")]
    monkeypatch.setenv("WORLD_SIZE", str(math.prod(processes)))
    train.parse([word for word in words[words.index("train.py") + 1:] if word != "--resume"])


# ---- what a step costs: the formulas of experiments/scaling.py against what is really held and sent ------------------

SMALL = scaling.Shape(hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, intermediate=96, vocab=128, tied=True)


@pytest.mark.parametrize("shape", [SMALL, dataclasses.replace(SMALL, tied=False, layers=3)])
def test_parameter_formula_counts_a_real_model(shape):
    model = AutoModelForCausalLM.from_config(scaling_measured.qwen2_config(shape))
    assert scaling.parameters(shape) == sum(p.numel() for p in model.parameters())
    assert scaling.layer_parameters(shape) == sum(p.numel() for p in model.model.layers[0].parameters())


def test_parameter_formula_gives_the_published_sizes():
    assert [round(scaling.parameters(shape) / 1e9, 1) for shape in (scaling.SEVEN, scaling.THIRTY_TWO)] == [7.6, 32.8]


def test_memory_formula_equals_the_bytes_held(tmp_path):
    scaling_measured.write_model(tmp_path, SMALL)
    dist.init_process_group("gloo")
    cfg = types.SimpleNamespace(temperature=1.0, parallel="fsdp", activation_checkpointing=False, trust_remote_code=False)
    policy = entropy.build_policy(tmp_path, cfg, torch.device("cpu"), torch.float32)
    optimizer = torch.optim.AdamW(policy.parameters())
    ids, mask = torch.ones(2, 5, dtype=torch.long), torch.ones(2, 3, dtype=torch.bool)
    policy(ids, torch.tensor([2, 2]), mask)["log_probs"].sum().backward()
    optimizer.step()
    parameters, states = list(policy.parameters()), [s for state in optimizer.state.values() for s in state.values()]
    groups = {"weights": parameters, "gradients": [p.grad for p in parameters], "optimizer": states}
    parts, _ = scaling.memory_per_gpu(SMALL, ranks=1)
    for name, tensors in groups.items():
        assert parts[name] == sum(x.to_local().nbytes for x in tensors if x.ndim), name  # AdamW's step counts are 0-d


@pytest.mark.parametrize("parallel", ["fsdp"])
def test_formula_equals_the_bytes_that_two_ranks_send(parallel, tmp_path):
    scaling_measured.write_model(tmp_path / "model", SMALL)
    flags = scaling_measured.flags_of(tmp_path / "model", prompts=8, group=4, response=8, updates=2, micro_batch_tokens=100)
    counted = scaling_measured.run(tmp_path, 2, *flags, "--parallel", parallel, steps=2, mode="count")["bytes"]
    assert counted["score"] > 2  # more micro-batches than updates, or a factor between them would not show
    formula = scaling.communication_per_step(SMALL, parallel, 2, counted["score"], bytes_per_weight=4)
    assert formula == {name: size for name, size in counted.items() if " " in name}
    assert counted["scalars"] < 2000


def test_the_commands_on_paper_parse_and_32b_needs_two_nodes(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "resolve_engine", lambda name, tp: name)
    for name, _, tp, nodes, prompts in scaling.CASES:
        monkeypatch.setenv("WORLD_SIZE", str(8 * nodes))
        train.parse(shlex.split(scaling.command(name, tp, nodes, prompts).split("train.py ")[1]))
    largest = {ranks: max(scaling.memory_per_gpu(scaling.THIRTY_TWO, ranks, rollout_tp=4)[1].values()) for ranks in (8, 16)}
    assert largest[16] < scaling.MEMORY < largest[8]


def test_the_readme_shows_what_the_diagnosis_says_of_committed_runs(monkeypatch, capsys, tmp_path):
    """Sentence by sentence, in order, as the README shortens it."""
    section = (HERE / "README.md").read_text().split("\n## Why did my entropy collapse?\n")[1].split("\n## ")[0]
    files = re.findall(r"experiments/results/diagnosis/\w+\.jsonl", section)
    for name in files:
        shutil.copy(HERE / name, tmp_path)
    monkeypatch.setattr(sys, "argv", ["entropy.py", *(str(tmp_path / Path(name).name) for name in files)])
    entropy.main()
    said, place = " ".join(capsys.readouterr().out.split()), 0
    shown = re.split(r"(?<=[.,;]) (?=[A-Z])|(?<=\.) ", " ".join(section.split("```")[1].split()))
    assert len(shown) > 15 and (tmp_path / "diagnosis.png").exists()
    for sentence in shown:
        place = said.index(sentence.strip(), place) + 1
    assert "Methods that act on neg_rare" in said


# ---- the findings: runs over seeds, verdicts computed from committed metrics -----------------------------------------

def test_numbers_over_seeds_by_hand():
    assert over_seeds.column([{"a": 1}, {"b": 5}, {"a": 2}, {"a": 6}], "a", smooth=2).tolist() == [1.5, 4]
    with pytest.raises(ValueError, match="0 rows have the metric b, not 1"):
        over_seeds.column([{"a": 1}], "b")
    rows = [{"step": 0, over_seeds.RIGHT: 0.5}, *({"step": i, over_seeds.H: 10.0 - i // 10} for i in range(1, 40)), {over_seeds.RIGHT: 0.75}]
    assert [over_seeds.at(part)(rows) for part in ("first", "end")] == [10, 7] and over_seeds.kept(rows) == 0.7
    assert [over_seeds.at(part, over_seeds.RIGHT)(rows) for part in ("first", "last")] == [0.5, 0.75] and over_seeds.gain(rows) == 0.25
    assert over_seeds.after_updates(76, 4)(rows) == (9 + 9 + 8 + 8 + 8) / 5                # steps 18 to 22; H of step 20 is after 19 x 4
    half = [{"step": 0, "x": 1.0}, {"step": 50, "x": 4.0}, {"step": 100, "x": 5.0}]
    assert over_seeds.made_by(1 / 2, "x")(half) == 0.75 and over_seeds.made_by(1 / 4, "x")(half) == 0.375
    said = "| a | holds |\n| ours: b | **does not hold here** |\n"
    assert over_seeds.verdict(said) == "holds (1 of 1)" and over_seeds.verdict(said + "| c | **does not hold here** |\n") == "in part (1 of 2)"
    course = [{"step": 0}, *({"step": t, over_seeds.H: 1 - t / 100, over_seeds.REWARD: 2 - 0.5 * math.exp(1 - t / 100) + (t > 15)} for t in range(1, 101))]
    assert math.isclose(over_seeds.forecast_error(course), 1, abs_tol=1e-4)                # the law fits both parts, a step up between them
    level = [row | {over_seeds.REWARD: 3.0} if row["step"] > 15 else row for row in course]
    means = [np.mean([row[over_seeds.REWARD] for row in course[t:t + 9]]) for t in range(1, 8)]  # of steps 1 to 15
    assert math.isclose(over_seeds.forecast_error(level, "rmse_mean"), 3 - np.mean(means))
    fall = [12.0 - min(t, 6) for t in range(12)]                                           # six steps, a nat each
    assert entropy.share_made(range(1, 13), fall, 1 / 12) == 1 / 6 and entropy.share_made(range(1, 13), fall, 1 / 3) == 4 / 6
    assert entropy.share_made(range(0, 24, 2), fall, 1 / 11) == 1 / 6 and entropy.share_made(range(51, 63), fall, 1 / 12) == 1 / 6
    found = {"low": [1, 2, 3], "mid": [2, 3, 4], "high": [5, 6, 7]}
    assert over_seeds.rising(found, "low", "high") and not over_seeds.rising(found, "low", "mid", "high") and not over_seeds.rising(found, "high", "low")
    assert over_seeds.above(found, "high") and over_seeds.above(found, "high", "mid") and not over_seeds.above(found, "mid", "low")
    assert over_seeds.below(found, "mid", "high") and not over_seeds.below(found, "low") and not over_seeds.below(found, "high", "low")
    assert over_seeds.apart(found, "low", "high", "mid") and over_seeds.apart(found, "high", "low") and not over_seeds.apart(found, "low", "mid")
    assert over_seeds.told({"a": [1, 2, 6], "b": [0.5]}) == "a 3.000 (1.000 to 6.000); b 0.500" and over_seeds.flat(found)[2:4] == [3, 2]
    rows = [{"step": t, "policy/group_cov_mean": 2 + t % 3, "entropy/change_measured": -5 - t % 3 - 9 * (t < 11) + 2 * (-1)**t} for t in range(50)]
    del rows[20]["policy/group_cov_mean"], rows[21]["entropy/change_measured"]
    assert over_seeds.covariance_and_fall(1)(rows) < 0.5 and over_seeds.covariance_and_fall(2)(rows) > 0.95
    with pytest.raises(ValueError, match="3 rows have the metric a, not 9"):
        over_seeds.column([{"a": 1}, {"b": 5}, {"a": 2}, {"a": 6}], "a", smooth=9)
    assert math.isclose(over_seeds.spearman([1, 2, 3, 4], [1, 8, 9, 100]), 1) and math.isclose(over_seeds.spearman([1, 2, 3], [1, 3, 2]), 0.5)
    assert math.isclose(over_seeds.spearman([1, 1, 2], [5, 7, 9]), math.sqrt(3) / 2)       # the tie's ranks are 1.5 and 1.5


def made_up(h=lambda t: 1 - t / 200, right=lambda t: 0.1 + t / 500, steps=100, **more):
    """Three seeds of a run: H, pass@1 and further metrics, NAME_OF: a constant or a function of the step and the seed."""
    def row(t, seed):
        metrics = {"entropy/response_mean": h(t), "reward/mean": right(t), **({"eval/pass@1": right(t), "eval/pass@8": 0.5, "eval/entropy": h(t)} if t % 10 == 0 else {})}
        metrics |= {name.replace("__", "/").replace("pass", "pass@").replace("_0", "_0."): value(t, seed) if callable(value) else value
                    for name, value in more.items()}
        return {"step": t} | {name: value + 1e-4 * seed for name, value in metrics.items() if t or name.startswith("eval/")}
    return [[row(t, seed) for t in range(steps + 1)] for seed in range(3)]


def ends(h, right={}, **more):
    """{name: made-up seeds} with H falling or rising to h[name] at step 90, and the last pass@1 of right."""
    line = lambda end: lambda t: 1 + (end - 1) * min(t, 90) / 90
    return {name: made_up(line(end), (lambda last: lambda t: 0.1 + (last - 0.1) * t / 100)(right.get(name, 0.3)),
                          **{metric: values[name] for metric, values in more.items() if name in values}) for name, end in h.items()}


def claims_hold(number):
    """Two sets of made-up runs: one in which every claim of the finding holds, one in which none does."""
    names = findings.FINDINGS[number].names
    if number == 1:
        fast, slow = (lambda t, k=k: math.exp(-t / k) for k in (2, 1e6))
        return [{name: made_up(h, lambda t, h=h: 0.5 - h(t) / 4) for name in names} for h in (fast, slow)]
    if number == 2:
        slopes = [dict.fromkeys(names, 0.2) | {"grpo-easy": 0.3}, dict.fromkeys(names, 0.2) | {"grpo-no-std": 0.3}]
        noise = [lambda t: 0, lambda t: t // 10 % 2 + 3 * (t > 20)]
        return [{name: made_up(right=lambda t, a=a[name], e=e: 2 * a - a * math.exp(1 - t / 200) + e(t)) for name in names} for a, e in zip(slopes, noise)]
    if number == 3:
        wave = lambda t, _: 1 + math.sin(t / 8)
        sides = [(wave, (1, 2, 3)), (lambda t, _: -wave(t, 0), (3, 2, 1))]
        return [{names[0]: made_up(policy__group_cov_mean=mean, entropy__change_measured=lambda t, _: -wave(t, 0), policy__group_cov_hard=parts[0],
                                   train__grad_norm=1,
                                   policy__group_cov_mid=parts[1], policy__group_cov_easy=parts[2])} for mean, parts in sides]
    if number == 4:
        return [{"grpo": made_up(policy__cov_top_00002=9, policy__cov_top_0002=top, policy__cov_top_002=1, policy__cov_top_02=0.5, policy__cov_mean=0)}
                for top in (3, 2)]
    if number == 7:
        return [{}, {}]
    if number == 14:
        h = {name: 0.2 + 0.05 * i for i, name in enumerate(names)}
        tied = [{name: sign * h[name] for name in names} for sign in (1, -1)]
        right = [{name: 0.3 + 0.01 * (5 * i % 7) for i, name in enumerate(names)} | {"grpo": 0.2}, {name: 0.3 + h[name] / 4 for name in names} | {"grpo": 0.9}]
        return [ends(h, r, response__ngram_diversity=up, eval__conf_wrong=down, eval__conf_gap=up, eval__ece=down)
                for r, up, down in zip(right, tied, tied[::-1])]
    updates = {name: 0.5 - 0.01 * i for i, name in enumerate(names)}
    good, bad = {
        5: (({"grpo": 0.3, "entropy_bonus-0.001": 0.3001, "entropy_bonus-0.01": 0.4, "entropy_bonus-0.1": 3, "kl_loss-0.1": 0.4, "kl_loss-1": 0.5},
             {"grpo": 0.4, "kl_loss-0.1": 0.3, "kl_loss-1": 0.2}), ({name: 0.3 + 0.1 * (name == "grpo") for name in names}, {})),
        6: (({name: 0.02 + 0.2 * (i and 1 + (i - 1) % 3) for i, name in enumerate(names)}, {"grpo": 0.2}),
            ({name: 0.3 - 0.1 * (i and 1) for i, name in enumerate(names)}, {"grpo": 0.9})),
        8: (({"grpo": 0.5, **{f"quadrant-{q}": 0.6 if q in ("pos_likely", "neg_rare") else 0.4 for q in findings.WEAKENED}},),
            ({"grpo": 0.5, **{f"quadrant-{q}": 0.4 if q in ("pos_likely", "neg_rare") else 0.6 for q in findings.WEAKENED}},)),
        9: (({name: 0.95 if name.startswith("steer") else 0.3 for name in names}, {"steer-unclipped": 0.5}), ({name: 0.3 for name in names},)),
        10: ((updates | {"entropy_bonus-0.1": 3, "entropy_bonus-0.1-updates-1": 2}, {"grpo": 0.4}), ({name: 1 - h for name, h in updates.items()},)),
        11: (({name: 0.2 + 0.1 * i for i, name in enumerate(names)},), ({name: 0.5 - 0.1 * i for i, name in enumerate(names)}, {"grpo-prompts-256": 0.2})),
        12: (({name: {"grpo-wide": 0.1, "clip_higher": 0.4, "grpo-tight": 0.4}.get(name, 0.3) for name in names},),
             ({name: {"grpo-wide": 0.4, "clip_higher": 0.2, "grpo-tight": 0.2}.get(name, 0.3) for name in names},)),
        13: (({"grpo": 0.3, "quadrant-positive": 0.1, "par-0": 0.95, "par-0.5": 0.5, "par": 0.37, "grpo-easy": 0.2, "quadrant-positive-easy": 0.1},),
             ({"grpo": 0.3, "quadrant-positive": 0.6, "par-0": 0.2, "par-0.5": 0.25, "par": 0.1, "grpo-easy": 0.2, "quadrant-positive-easy": 0.3},))}[number]
    more = dict(zip(findings.UPDATES, (0.8, 0.75, 0.7, 0.65))) | {"entropy_bonus-0.1": 0, "entropy_bonus-0.1-updates-1": 0}
    passes = lambda sign: {6: {"eval__pass16": {name: sign * (name != "grpo") for name in names}},
                           10: {"eval__pass64": {name: sign * value for name, value in more.items()}}}.get(number, {})
    good, bad = ends(*good, **passes(1)), ends(*bad, **passes(-1))
    if number == 10:  # more updates, less entropy after as many steps: a run of 8 falls over 12 rollout batches what one of 1 falls over 96
        for runs, sign in ((good, 1), (bad, -1)):
            for rows, (name, n) in ((rows, item) for item in findings.UPDATES.items() for rows in runs[item[0]]):
                for row in rows[1:60]:
                    row["entropy/response_mean"] = 1 - sign * 0.01 * n * row["step"] * n
    return [good, bad]


@pytest.mark.parametrize("number", range(1, 15))
def test_each_claim_holds_in_runs_made_to_show_it_and_fails_in_runs_made_against_it(number, monkeypatch, tmp_path):
    monkeypatch.setattr(findings, "RESULTS", tmp_path / "findings")
    for runs, expected in zip(claims_hold(number), (True, False)):
        batches = {name: [{"Pearson": sign * i, "Spearman": sign * i} for sign in [1 if expected else -1] for _ in range(3)]
                   for i, name in enumerate(("covariance", "steer released", "steer theorem", "exact"))}
        (tmp_path / "microscope.json").write_text(json.dumps({"base": {"sgd": batches, "adamw": batches}}))
        rows = over_seeds.table_rows(number, findings.FINDINGS[number], runs)
        verdicts = [line.split(" | ")[4] == "holds" for line in rows.splitlines()]
        assert verdicts and set(verdicts) == {expected}, rows
        count = len(verdicts) - rows.count("| ours: ")
        assert over_seeds.verdict(rows) == (f"holds ({count} of {count})" if expected else f"does not hold here (0 of {count})")
        if number != 7 and expected:                                                   # 7 has microscope.png
            findings.FINDINGS[number].draw(runs, tmp_path / "figure.png")
            assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_settings_of_the_findings_are_all_used_and_train_takes_them(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert {*findings.SETTINGS, "microscope"} == {name for finding in findings.FINDINGS.values() for name in finding.names}
    assert list(findings.FINDINGS) == list(range(1, 15)) and len(findings.SEEDS) >= 3
    configs = {name: vars(train.parse(flags.split())) for name, flags in findings.SETTINGS.items()}
    trained = {json.dumps({key: value for key, value in config.items() if "eval" not in key and key != "name"}) for config in configs.values()}
    assert len(trained) == len(configs)  # no two train alike
    for name, config in configs.items():
        assert config["method"] == name.split("-")[0] and config["prompts_per_step"] == 64


def test_committed_findings_and_readme_say_what_the_committed_metrics_say():
    """findings.md is what the metrics give, row by row, for all 14 and three seeds each; the README's table has its verdicts,
    and no number that is not, rounded, in the finding's rows."""
    results = HERE / findings.RESULTS
    text = (results.parent / "findings.md").read_text()
    section = (HERE / "README.md").read_text().split("\n## The papers' findings, rerun\n")[1].split("\n## ")[0]
    table = {int(line.split("]")[0][3:]): line for line in section.splitlines() if re.match(r"\| \[\d", line)}
    assert set(table) == set(findings.FINDINGS)
    for number, finding in findings.FINDINGS.items():
        runs = {name: [record.read_metrics(results / f"{name}-seed{seed}.jsonl") for seed in findings.SEEDS]
                for name in finding.names if name != "microscope"}
        rows, (_, link, papers, here, verdict, _) = over_seeds.table_rows(number, finding, runs), table[number].split("|")
        assert rows in text and verdict.strip() == over_seeds.verdict(rows), (number, over_seeds.verdict(rows))
        assert (HERE / re.search(r"\((.*)\)", link)[1]).exists()
        found, told = re.findall(r"\d+\.\d{3}", rows), re.findall(r"\d+\.\d{2,}", here)
        known = {f"{float(value):.{digits}f}" for value in found for digits in (2, 3)} | set(re.findall(r"\d+\.\d+", rows))
        assert told and not [value for value in told if value not in known], number
    count = sum(map(text.count, ("| holds |", "| **does not hold here** |")))
    assert f"All {count} claims" in section and f"{len(findings.SETTINGS)} settings × {len(findings.SEEDS)} seeds" in section


def test_findings_runs_what_it_needs_and_tables_what_it_has(monkeypatch, tmp_path, capsys):
    """run_all stands in: --only 12 asks for its runs alone; findings.md has every finding whose runs are all there."""
    folder, asked = tmp_path / "findings", []
    folder.mkdir()

    def made(settings, seeds, *_):
        asked.append(settings)
        for name, seeds_rows in ends({name: 0.5 for name in settings}).items():
            for seed in seeds:
                (folder / f"{name}-seed{seed}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in seeds_rows[seed]))

    monkeypatch.setattr(findings, "RESULTS", folder)
    monkeypatch.setattr(findings, "run_all", made)
    for number in (12, 9):
        monkeypatch.setattr(sys, "argv", ["findings.py", "--only", str(number)])
        findings.main()
        assert set(asked[-1]) == set(findings.FINDINGS[number].names) and (folder / f"{number}.png").exists()
        assert set(re.findall(r"^\| (\d+)\. ", capsys.readouterr().out, re.MULTILINE)) == {str(number)}
    table = (tmp_path / "findings.md").read_text()
    assert set(re.findall(r"^\| (\d+)\. ", table, re.MULTILINE)) == {"9", "12"}
    assert asked[0]["grpo-tight"] == "--eval_every 10 --save_every 50 --knobs clip_low=0.05 --updates_per_rollout 8".split()
    assert "- `grpo-tight`: `train.py --eval_every 10 --save_every 50 --knobs clip_low=0.05" in table and "`par-0`" not in table
    assert "- 9. STEER: does not hold here (0 of 3)" in table


def test_a_run_for_a_table_is_resumed_kept_and_not_run_again(monkeypatch, tmp_path):
    """train.py stands in as a function that does two steps at a time, as if stopped by SIGTERM, and leaves a checkpoint."""
    calls, (runs, results) = [], (tmp_path / "runs", tmp_path / "results")
    for folder in (runs / "a-seed1", results):
        folder.mkdir(parents=True)

    def two_steps(command, **_):
        calls.append(command)
        (runs / "a-seed1" / f"checkpoint-{2 * len(calls)}").mkdir()
        (runs / "a-seed1" / "config.json").write_text('{"steps": 4}')
        rows = [{"step": i, "reward/mean": i / 3, "eval/auroc": 1 / 7, "policy/cov_mean": 0.5} for i in range(2 * len(calls) + 1)]
        (runs / "a-seed1" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    made, settings = [], {"a": ["--model", "tiny-mini"]}
    monkeypatch.setattr(compare.subprocess, "run", two_steps)
    monkeypatch.setattr(tiny, "base_model", lambda size: made.append(size))
    with pytest.raises(SystemExit, match="a-seed1 was stopped"):
        compare.run_all(settings, [1], runs, results, 1)
    rows = compare.run_all(settings, [1], runs, results, 1)["a"][0]
    assert [("--overwrite" in call, "--resume" in call) for call in calls] == [(True, False), (False, True)]
    assert all({"tiny-mini", "a-seed1", str(runs)} <= set(call) and call[call.index("--seed") + 1] == "1" for call in calls)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4] and rows[4] == {"step": 4, "reward/mean": 1.333, "eval/auroc": 0.1429}
    assert [row.get("policy/cov_mean") for row in rows] == [None, 0.5, None, None, None] and type(rows[1]["step"]) is int
    assert compare.run_all(settings, [1], runs, results, 1)["a"][0] == rows and len(calls) == 2 == len(made)
    with pytest.raises(ValueError, match="runs a with --model tiny-mini, not --lr 1: delete a-seed"):
        compare.run_all({"a": ["--lr", "1"]}, [1], runs, results, 1)
    ran = []
    monkeypatch.setattr(compare, "run", lambda name, flags, *_: ran.append(name) or name)
    assert compare.run_all({"b": [], "c": []}, [0, 1], runs, results, 1) == {name: [f"{name}-seed0", f"{name}-seed1"] for name in "bc"}
    assert ran == ["b-seed0", "c-seed0", "b-seed1", "c-seed1"]


def test_difficulty_splits_the_problems_by_what_the_base_solves(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tiny, "TRAINING", tiny.TRAINING | dict(steps=3, batch=4))
    monkeypatch.setattr(tiny, "PROBLEMS", dict(train=20, test=5))
    problems, drawn = tiny.problems("train", 20), []

    def answer(engine, tokenizer, problems, prompts, seeds, *, n, **_):                # the base is right in every third problem
        drawn.append((n, [b - a for a, b in zip(seeds, seeds[1:])]))
        return [[{"group_accuracy": 0.5 if i % 3 == 0 else 0.0}] * n for i in range(len(problems))]

    monkeypatch.setattr(difficulty, "answer", answer)
    difficulty.main()
    assert drawn == [(16, [16] * 19)]
    easy, hard = (load_problems(path) for path in difficulty.FILES.values())
    assert easy == [problems[i] for i in (0, 1, 2, 3, 4, 6, 9, 12, 15, 18)] and sorted(easy + hard, key=problems.index) == problems
    difficulty.main()                                                                  # both are there: nothing is sampled
    assert len(drawn) == 1


# ---- teaching: the README's exercises --------------------------------------------------------------------------------

def exercises():
    """(function, [(test, its parameters), ...]) of each row of the README's table."""
    teaching = (HERE / "README.md").read_text().split("\n## Teaching\n")[1].split("\n## ")[0]
    found = []
    for row in re.findall(r"^\| \d+ \|.*", teaching, re.MULTILINE):
        _, where, _, tests, _ = row.strip("| ").split(" | ")
        name, module = re.fullmatch(r"`(\w+)` \((\w+)\.py\)", where).groups()
        tests = re.findall(r"`(\w+)(?:\[(\w+)\])?`", tests)
        function = getattr(sys.modules[module], name)
        assert tests and function.__module__ == module
        found.append((function, [(globals()[test], [parameter] if parameter else []) for test, parameter in tests]))
    return found


def without_body(function):
    """Its code as an exercise leaves it. Put into the function itself, it reaches METHODS and every module alike."""
    tree = ast.parse(inspect.getsource(function))
    tree.body[0].body = ast.parse("raise NotImplementedError").body
    names = dict(function.__globals__)
    exec(compile(tree, "exercise", "exec"), names)
    return names[function.__name__].__code__


@pytest.mark.parametrize("number", range(1, 11))
def test_teaching_exercises(number, monkeypatch):
    """With this and all later bodies deleted its tests are red; as soon as this one is written again they are green."""
    rows = exercises()
    assert len(rows) == 10
    function, tests = rows[number - 1]
    for later, _ in rows[number:]:
        monkeypatch.setattr(later, "__code__", without_body(later))
    for test, parameters in tests:
        with monkeypatch.context() as patch, pytest.raises(NotImplementedError):
            patch.setattr(function, "__code__", without_body(function))
            test(*parameters)
        test(*parameters)


if __name__ == "__main__":
    vllm_rank(sys.argv[1], int(sys.argv[2]))
