"""Every test here turns red when the behaviour that it names is taken away."""
import json
import math
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

from rollout import prepare_environment

prepare_environment()

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, Qwen2Config

import entropy
import losses
import rollout
import tiny
import train
from losses import METHODS, group_advantages, importance_ratio, k3, ppo_surrogate, scale_gradient, token_covariance, token_mean

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
        state = losses.par_weight(state, entropy, 0.0, delta=0.4)
        weights.append(round(state["positive_weight"], 6))
    assert weights == [0.4, 0.8, 1.0, 0.6, 0.2, 0.0, 0.0]
    at = lambda p, **k: losses.par_weight({}, 0.5, p, **k)["positive_weight"]
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
}


@pytest.mark.parametrize("method", NEUTRAL)
def test_switched_off_equals_grpo(method):
    case = random_case(dtype=torch.float32)
    loss, gradient, _ = run("grpo", case)
    off_loss, off_gradient, _ = run(method, case, **NEUTRAL[method])
    assert torch.equal(loss, off_loss) and torch.equal(gradient, off_gradient)
    on_loss, on_gradient, _ = run(method, case)                        # and with its defaults it does something
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

SELECTS_PER_CALL = {"clip_cov", "kl_cov", "steer"}  # a choice, or a maximum, over the tokens of the call: as released


@pytest.mark.parametrize("method", METHODS)
def test_padding_changes_nothing(method):
    """Neither more padding nor what stands on it: nan, inf, whatever a model makes of a pad token."""
    case, tensors = random_case(), None
    tensors = extras(method, case)
    padded, padded_tensors = [], {}
    for x in (*case, *tensors.values()):
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


@pytest.mark.parametrize("method", [m for m in METHODS if m not in SELECTS_PER_CALL])
def test_micro_batches_add_up(method):
    case, tensors = random_case(), extras(method, random_case())
    loss, gradient, metrics = run(method, case)
    N, sums, metric_sums, gradients = case[3].sum(), 0, {}, []
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        lp = case[0].detach()[rows].clone().requires_grad_()
        part, m = METHODS[method](lp, *(x[rows] for x in case[1:]), **{k: v[rows] for k, v in tensors.items()}, num_tokens=N)
        part.backward()
        sums, gradients = sums + part.detach(), gradients + [lp.grad]
        metric_sums = {k: metric_sums.get(k, 0) + v for k, v in m.items()}
    assert torch.allclose(sums, loss, rtol=1e-6) and torch.allclose(torch.cat(gradients), gradient, rtol=1e-6)
    for name, value in metrics.items():
        assert torch.allclose(metric_sums[name], value, rtol=1e-6)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "clip_cov"])
def test_row_order_does_not_matter(method):
    case, tensors = random_case(), extras(method, random_case())
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    loss, gradient, _ = run(method, case)
    lp = case[0].detach()[order].clone().requires_grad_()
    shuffled, _ = METHODS[method](lp, *(x[order] for x in case[1:]), **{k: v[order] for k, v in tensors.items()})
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


# ---- knobs ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method, setting, complaint", [
    ("clip_kov", "", "Methods: .*clip_cov"), ("clip_cov", "cov_fraction=1e-2", "cov_frac=0.0002"),
    ("clip_cov", "cov_frac=20", "not per cent"), ("clip_cov", "cov_frac=many", "a number"), ("steer", "mapping=cubic", "exp"),
    ("par", "schedule=weekly", "stage")])
def test_bad_knobs_are_refused_with_what_there_is(method, setting, complaint):
    with pytest.raises(ValueError, match=complaint):
        losses.parse_knobs(method, [setting] if setting else [])


def test_knobs_reach_loss_and_controller():
    loss_knobs, rule_knobs = losses.parse_knobs("par", ["positive_weight=0.3", "schedule=constant", "clip_high=0.25"])
    assert loss_knobs["clip_high"] == 0.25 and rule_knobs["schedule"] == "constant" and rule_knobs["positive_weight"] == 0.3
    assert losses.parse_knobs("steer", ["dual_clip=none"])[0]["dual_clip"] is None


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
            found = dict(log_probs=logp[range(37), tokens], token_entropy=-(p * logp).sum(1), sum_p2=(p * p).sum(1),
                         sum_p2_log_p=(p * p * logp).sum(1))
        sum((i + 1.0) * found[name].sin().sum() for i, name in enumerate(names)).backward()
        results.append([found[name] for name in names] + [h.grad, w.grad])
    for ours, naive in zip(*results):
        assert torch.allclose(ours, naive, rtol=1e-5, atol=1e-6)
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
    batch = rollout.collate([dict(prompt=p, response=r, log_probs=[0.0] * len(r), truncated=False, reward=0.0) for p, r in rows], "cpu")
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
    m = entropy.measure(old, A, mask, total=lambda x: x.double())
    assert math.isclose(m["entropy/token_mean"], (0.3 + 0.6 + 2.0 + 0.5) / 4, rel_tol=1e-6)
    assert math.isclose(m["entropy/response_mean"], ((0.3 + 0.6 + 2.0) / 3 + 0.5) / 2, rel_tol=1e-6)
    # likely: p > e^-H. 0.9 > 0.74; 0.5 < 0.549; 0.1 < 0.135; and the wrong answer's 0.5 < 0.607
    assert [m[f"quadrant/{q}_frac"] for q in entropy.QUADRANTS] == [0.25, 0.5, 0.0, 0.25]
    change = -A * p * (p.log() + H)
    shares = [change[0, 0], change[0, 1] + change[0, 2], 0.0, change[1, 0]]
    size = change[mask].abs().sum()
    assert np.allclose([m[f"quadrant/{q}_dH_share"] for q in entropy.QUADRANTS], [float(s / size) for s in shares])
    assert m["quadrant/pos_likely_dH_share"] < 0 < m["quadrant/pos_rare_dH_share"]
    cov = token_covariance(p.log(), A, mask)[mask]
    assert math.isclose(m["policy/cov_mean"], cov.mean(), rel_tol=1e-5, abs_tol=1e-7)
    assert math.isclose(m["policy/cov_top_0.2"], cov.max(), rel_tol=1e-5)


def test_micro_batches_hold_the_budget_and_every_row():
    torch.distributed.init_process_group("gloo")
    lengths = [5, 100, 7, 60, 33, 8, 2, 300]
    batches = rollout.micro_batches(lengths, [0, 1, 2, 3, 4, 5, 6, 7], budget=128)
    assert sorted(i for b in batches for i in b) == list(range(8))
    assert all(len(b) * max(lengths[i] for i in b) <= 128 or len(b) == 1 for b in batches) and len(batches) < 8


def test_data_order_is_a_fresh_permutation_each_epoch():
    order = [rollout.data_index(i, 7, seed=3) for i in range(21)]
    assert all(sorted(order[i:i + 7]) == list(range(7)) for i in (0, 7, 14)) and len({tuple(order[i:i + 7]) for i in (0, 7, 14)}) > 1


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
    return entropy.read_metrics(Path(out) / name)


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
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


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
    assert AutoTokenizer.from_pretrained(train.checkpoints(tmp_path / "learns")[-1])("7:")["input_ids"] == [10, 19]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_two_steps(method, toy, tmp_path):
    rows = toy_run(toy, tmp_path, method, "--method", method)
    assert len(rows) == 3 and all(math.isfinite(row["train/loss"]) and row["train/skipped"] == 0 for row in rows[1:])


def test_resume_is_bit_for_bit(toy, tmp_path):
    args = ("--method", "par", "--knobs", "delta=0.2", "--dynamic_sampling")
    whole = toy_run(toy, tmp_path, "whole", *args, "--steps", "4")
    toy_run(toy, tmp_path, "parts", *args, "--steps", "2")
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as file:       # as if it had gone on after its last checkpoint
        file.write(json.dumps({"step": 3, "reward/mean": 99.0}) + "\n")
    parts = toy_run(toy, tmp_path, "parts", *args, "--steps", "4", "--resume")
    assert without_times(parts) == without_times(whole)
    assert all(torch.equal(a, b) for a, b in zip(weights(tmp_path / "parts").values(), weights(tmp_path / "whole").values()))


def test_micro_batches_give_the_same_run(toy, tmp_path):
    one, many = (toy_run(toy, tmp_path, f"m{budget}", "--micro_batch_tokens", budget) for budget in ("10000", "9"))
    for a, b in zip(one[1:], many[1:]):
        assert math.isclose(a["train/grad_norm"], b["train/grad_norm"], rel_tol=1e-5)
        assert math.isclose(a["train/loss"], b["train/loss"], rel_tol=1e-5, abs_tol=1e-7)


def test_two_ranks_equal_one_and_fsdp_equals_ddp(toy, tmp_path):
    toy_run(toy, tmp_path, "one")
    for parallel in ("ddp", "fsdp"):
        result = torchrun(2, toy_args(toy, tmp_path, parallel, "--parallel", parallel))
        assert result.returncode == 0, result.stderr
        one, two = (entropy.read_metrics(tmp_path / name) for name in ("one", parallel))
        assert [row.keys() for row in one] == [row.keys() for row in two]
        for a, b in zip(one, two):
            for key in a:
                if not key.startswith(("time/", "policy/cov", "rollout/gap")):  # covariances are per rank; the gap is rounding
                    assert math.isclose(a[key], b[key], rel_tol=1e-5, abs_tol=1e-6), key
        two = weights(tmp_path / parallel)  # AdamW scales gradients that are rounding only (k_proj.bias) to the size of real ones
        close = torch.cat([torch.isclose(x, two[name], rtol=0, atol=1e-6).flatten() for name, x in weights(tmp_path / "one").items()])
        assert close.float().mean() > 0.99
    args = toy_args(toy, tmp_path, "fsdp", "--parallel", "fsdp", "--steps", "3", "--resume")
    assert (result := torchrun(2, args)).returncode == 0, result.stderr
    assert entropy.read_metrics(tmp_path / "fsdp")[-1]["step"] == 3


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
    monkeypatch.setattr(train, "parse_knobs", lambda *a: ({}, {}))
    rows = toy_run(toy, tmp_path, "sometimes")
    assert [row["train/skipped"] for row in rows[1:]] == [2, 0] and math.isfinite(rows[2]["train/loss"])
    assert all(x.isfinite().all() for x in weights(tmp_path / "sometimes").values())
    monkeypatch.setitem(METHODS, "grpo", lambda *a, **k: (grpo(*a, **k)[0] * math.nan, {}))
    with pytest.raises(SystemExit, match="ten updates in a row"):
        toy_run(toy, tmp_path, "always", "--steps", "20")


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


def readme_commands():
    blocks = (HERE / "README.md").read_text().split("```")[1::2]
    return [line.strip() for block in blocks for line in block.splitlines() if "train.py --" in line]


@pytest.mark.parametrize("command", readme_commands())
def test_every_command_of_the_readme_parses(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "resolve_engine", lambda name, tp: name)
    words = shlex.split(command.split("#")[0])
    processes = [words[i + 1] for i, word in enumerate(words) if word in ("--nproc-per-node", "--nnodes")]
    monkeypatch.setenv("WORLD_SIZE", str(math.prod(map(int, processes))))
    monkeypatch.setattr(train, "checkpoints", lambda folder: [folder])
    args = words[words.index("train.py") + 1:]
    train.parse([a for a in args if a != "--resume"])
