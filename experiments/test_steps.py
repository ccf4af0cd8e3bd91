"""A whole training step, computed again from outside.

A run of three steps writes its checkpoints and, with --record_step 3, the answers of its third
step. From the weights and AdamW's averages of checkpoint-2 and from these answers the step is
computed again here, in float64, one answer and one token at a time, with nothing of the program but
the recorded numbers. Loss, gradient norm, metrics and the weights of checkpoint-3 must be those of
the run. So no wire between a flag, a tensor, a knob and a loss can be loose.
"""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import rollout
from diagnose import read_metrics
from test_all import (  # noqa: F401
    dealt,
    no_process_group_left,
    recorded,
    toy,
    toy_args,
    toy_run,
    torchrun,
)

TEMPERATURE = 0.8
LEARNING_RATE = 4e-3

# Settings with which every method acts on some of the toy's 64 tokens an update.
STEP_KNOBS = {
    "grpo": dict(clip_low=0.02, clip_high=0.03, dual_clip=1.01),
    "clip_higher": dict(clip_low=0.02, clip_high=0.04),
    "entropy_bonus": dict(entropy_coef=0.3, clip_low=0.02, clip_high=0.03),
    "kl_loss": dict(kl_coef=0.7, estimator="k2", clip_low=0.02, clip_high=0.03),
    "clip_cov": dict(cov_frac=0.2, cov_low=0.01, cov_high=3.0, clip_low=0.02, clip_high=0.03),
    "kl_cov": dict(cov_frac=0.1, kl_coef=0.6),
    "steer": dict(
        min_weight=0.3,
        max_weight=1.3,
        mapping="linear",
        form="theorem",
        clip_low=0.02,
        clip_high=0.03,
        dual_clip=1.05,
    ),
    "par": dict(
        schedule="entropy",
        target_entropy=0.2,
        delta=0.15,
        positive_weight=0.1,
        clip_low=0.02,
        clip_high=0.03,
    ),
    "quadrant": dict(
        pos_likely=0.5,
        pos_rare=1.5,
        neg_likely=0.2,
        neg_rare=2.0,
        clip_low=0.02,
        clip_high=0.03,
    ),
    "w_reinforce": dict(positive_weight=0.3, negative_weight=0.7, clip_low=0.02, clip_high=0.03),
    "entropy_advantage": dict(alpha=0.2, kappa=3.0, clip_low=0.02, clip_high=0.03),
    "entropic": dict(
        target_entropy=0.5, kp=0.5, ki=0.1, confident=0.3, clip_low=0.02, clip_high=0.03
    ),
    "dcpo": dict(target_entropy=9.0, clip_low=0.02, clip_high=0.03),
    "aepo": dict(target_entropy=9.0, hot=1.5, cold=0.7, most_rows=5, clip_low=0.02, clip_high=0.03),
    "flex_clip": dict(
        schedule="did",
        upper_slope=-0.05,
        upper_offset=0.06,
        lower_slope=-0.04,
        lower_offset=0.05,
        narrowest=0.01,
        widest=0.055,
        clip=0.02,
    ),
    "ce_gppo": dict(beta_low=0.6, beta_high=0.8, clip_low=0.02, clip_high=0.03),
    "cispo": dict(clip_low=0.02, clip_high=0.03),
    "gspo": dict(clip_low=0.005, clip_high=0.008),
    "rand_pos_clip": dict(drop_frac=0.4, clip_low=0.02, clip_high=0.03),
    "fork_tokens": dict(top_frac=0.4, clip_low=0.02, clip_high=0.03),
    "clip_b": dict(mu=0.5, clip_low=0.02, clip_high=0.03),
    "clip_v": dict(mu=0.2, most_frac=0.1, clip_low=0.02, clip_high=0.03),
    "adaptive_entropy": dict(
        target_entropy=9.0, delta=0.1, max_coef=0.25, clip_low=0.02, clip_high=0.03
    ),
    "aer": dict(target_ratio=1.5, rate=0.3, hard_below=0.6, clip_low=0.02, clip_high=0.03),
    "siren": dict(coef=0.5, peak_frac=0.3, clip_low=0.02, clip_high=0.03),
}


# They learn nothing from an answer whose advantage is 0, so the updates leave it out.
LEAVE_OUT = (
    *("grpo", "clip_higher", "par", "quadrant", "entropy_advantage", "entropic", "aepo"),
    *("flex_clip", "ce_gppo", "cispo", "gspo", "clip_b", "clip_v"),
)


def nucleus_entropy_of(p):
    """Entropy of the likeliest tokens with 0.8 of the probability in all, renormalised; p (V,)."""
    order = p.detach().argsort(descending=True).tolist()
    kept = []
    mass = 0.0
    for v in order:
        if mass >= 0.8:
            break
        kept.append(v)
        mass += p[v].item()
    q = p[kept] / p[kept].sum()
    return -(q * q.log()).sum()


def token_facts(model, answer):
    """A list with the facts of each response token under the model, by one forward of this answer
    alone."""
    ids = torch.tensor([answer["prompt"] + answer["response"]])
    logits = model(input_ids=ids).logits[0, len(answer["prompt"]) - 1 : -1] / TEMPERATURE
    facts = []
    for row, token in zip(logits, answer["response"]):
        log_p = row.log_softmax(0)
        p = log_p.exp()
        facts.append(
            SimpleNamespace(
                log_prob=log_p[token],
                entropy=-(p * log_p).sum(),
                sum_p2=p.square().sum(),
                sum_p2_log_p=(p.square() * log_p).sum(),
                nucleus=nucleus_entropy_of(p),
                hot=(row / 1.2).log_softmax(0)[token],
                cold=(row / 0.8).log_softmax(0)[token],
            )
        )
    return facts


def advantages_of(answers):
    """The advantage of each answer, by hand. Answers that aepo mixed in, drawn at another
    temperature, have 1. What is left of a group that they entered knows the group's rewards, 0 or
    1, by its accuracy."""
    advantages = []
    for start in range(0, len(answers), 4):
        group = answers[start : start + 4]
        mean = sum(answer["reward"] for answer in group) / 4
        mixed = [answer["log_probs"] is None for answer in group]
        for answer, new in zip(group, mixed):
            assert any(mixed) or answer["group_accuracy"] == mean
            share = answer["group_accuracy"]
            deviation = math.sqrt(share * (1 - share) * 4 / 3)
            advantages.append(1.0 if new else (answer["reward"] - share) / (deviation + 1e-6))
    return advantages


def surrogate(t, low, high, A, dual=None, r=None):
    """The clipped loss of a token, and whether the clip took its gradient."""
    r = (t.log_prob - t.old.log_prob).exp() if r is None else r
    loss = -A * r
    bounded = -A * torch.clamp(r, 1 - low, 1 + high)
    clipped = bool(bounded > loss)
    if clipped:
        loss = bounded
    if dual and A < 0 and loss > -A * dual:
        loss = torch.tensor(-A * dual)
        clipped = True
    return loss, clipped


def mean_and_deviation(values):
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((x - mean) ** 2 for x in values) / len(values))


def covariances(call):
    log_probs = [float(t.log_prob) for answer in call for t in answer]
    advantages = [t.A for answer in call for t in answer]
    mean_l = sum(log_probs) / len(log_probs)
    mean_a = sum(advantages) / len(advantages)
    return [(x - mean_l) * (a - mean_a) for x, a in zip(log_probs, advantages)]


def expected_kl_cov(call, k, N, add):
    kept = [t for answer in call for t in answer]
    cov = covariances(call)
    order = sorted(range(len(kept)), key=lambda i: -cov[i])
    chosen = order[: max(1, int(k["cov_frac"] * len(kept)))]
    add("policy/selected_frac", len(chosen) / N)
    loss = 0.0
    for i, t in enumerate(kept):
        log_r = t.log_prob - t.old.log_prob
        loss = loss - t.A * log_r.exp()
        if i in chosen:
            loss = loss + k["kl_coef"] * log_r.abs()
    return loss / N


def expected_gspo(call, k, N, sequences, add):
    loss = 0.0
    for answer in call:
        log_s = sum(float(t.log_prob - t.old.log_prob) for t in answer) / len(answer)
        for t in answer:
            s = math.exp(log_s) * (t.log_prob - t.log_prob.detach()).exp()
            token_loss, clipped = surrogate(t, k["clip_low"], k["clip_high"], t.A, r=s)
            loss = loss + token_loss / len(answer)
            add("policy/clip_frac", clipped / N)
    return loss / sequences


def dropped_by_clip_cov(call, k, draw):
    kept = [t for answer in call for t in answer]
    candidates = []
    for i, cov in enumerate(covariances(call)):
        _, clipped = surrogate(kept[i], k["clip_low"], k["clip_high"], kept[i].A)
        if not clipped and k["cov_low"] < cov < k["cov_high"]:
            candidates.append(i)
    count = max(1, int(k["cov_frac"] * len(kept)))
    order = torch.randperm(len(candidates), generator=draw) if candidates else torch.tensor([])
    return {candidates[j] for j in order[:count].tolist()}


def dropped_at_random(call, k, draw):
    """Numbers are drawn for the padding, too."""
    uniform = torch.rand(len(call), max(map(len, call)), generator=draw)
    drawn = [uniform[i, j] for i, answer in enumerate(call) for j in range(len(answer))]
    kept = [t for answer in call for t in answer]
    limit = torch.tensor(k["drop_frac"])
    return {i for i, t in enumerate(kept) if t.A > 0 and drawn[i] < limit}


def steer_weights(call, k):
    sizes = []
    for t in (t for answer in call for t in answer):
        _, clipped = surrogate(t, k["clip_low"], k["clip_high"], t.A, k["dual_clip"])
        p = float(t.log_prob.exp())
        r = float((t.log_prob - t.old.log_prob).exp())
        change = r * t.A * p * (1 - p) * (float(t.log_prob) + float(t.old.entropy))
        sizes.append(0.0 if clipped else abs(change))
    least = min(sizes)
    most = max(sizes)
    span = k["max_weight"] - k["min_weight"]
    return [k["max_weight"] - span * (size - least) / (most - least) for size in sizes]


def new_advantage(method, t, k):
    """The advantage that a method puts in the place of t.A."""
    A = t.A
    if method == "par" and A > 0:
        return A * k["positive_weight"]
    if method == "quadrant":
        kind = "likely" if float(t.old.log_prob) > -float(t.old.entropy) else "rare"
        return A * k[("pos_" if A > 0 else "neg_") + kind]
    if method == "w_reinforce":
        return k["positive_weight"] if t.reward > 0 else -k["negative_weight"]
    if method == "entropy_advantage":
        return A + min(k["alpha"] * float(t.old.entropy), abs(A) / k["kappa"])
    if method == "entropic" and float(t.old.log_prob.exp()) > k["confident"]:
        return A * (1 + k["alpha"]) if A > 0 else A * (1 - k["alpha"])
    if method == "dcpo":
        tempered = t.old.hot if k["hot"] else t.old.cold
        rho = float((tempered - t.old.log_prob).exp())
        return (1 - k["mix"]) * A + k["mix"] * (t.reward > 0) * rho
    return A


def flexible_bound(side, t, k):
    p = float(t.log_prob.exp())
    bound = k[f"{side}_slope"] * p + k[f"{side}_offset"]
    bound = min(max(bound, k["narrowest"]), k["widest"])
    share = k[f"{side}_share"]
    return share * bound + (1 - share) * k["clip"]


def token_loss_of(method, t, A, k):
    """The loss of one token before weights and terms, and whether the clip acted."""
    if method == "cispo":
        r = float((t.log_prob - t.old.log_prob).exp())
        bounded = min(max(r, 1 - k["clip_low"]), 1 + k["clip_high"])
        return -bounded * A * t.log_prob, bounded != r and A != 0
    if method == "ce_gppo":
        r = (t.log_prob - t.old.log_prob).exp()
        held = r / r.detach()
        if r < 1 - k["clip_low"] and A < 0:
            return -k["beta_low"] * (1 - k["clip_low"]) * held * A, True
        if r > 1 + k["clip_high"] and A > 0:
            return -k["beta_high"] * (1 + k["clip_high"]) * held * A, True
        return -A * r, False
    if method == "flex_clip":
        return surrogate(t, flexible_bound("lower", t, k), flexible_bound("upper", t, k), A)
    dual = k["dual_clip"] if method in ("grpo", "steer") else None
    return surrogate(t, k["clip_low"], k["clip_high"], A, dual)


def entropy_term(method, t, k):
    """What a method adds to a token's loss for its entropy or its reference."""
    if method in ("entropy_bonus", "adaptive_entropy"):
        return -k["entropy_coef"] * t.entropy
    if method == "aer":
        weight = max(0.0, k["hard_below"] - t.accuracy) / k["hard_below"]
        return -k["alpha"] * weight * t.entropy
    if method == "kl_loss":
        return k["kl_coef"] * (t.ref.log_prob - t.log_prob).square() / 2
    return 0.0


def siren_peaks(call, k):
    peaks = []
    for answer in call:
        ordered = sorted((t.nucleus for t in answer), key=lambda H: -float(H))
        peaks += ordered[: math.ceil(k["peak_frac"] * len(answer))]
    return sum(peaks) / len(peaks)


def expected_call(method, call, k, N, sequences, draw):
    """Loss and sums of metrics that one micro-batch must give.

    call: answers, lists of tokens; k: knobs, with those that the controller sets; N: kept tokens of
    the optimizer step over all ranks; sequences: its answers; draw: the rank's random generator.
    """
    metrics = {}

    def add(name, value):
        metrics[name] = metrics.get(name, 0.0) + float(value)

    if method == "kl_cov":
        return expected_kl_cov(call, k, N, add), metrics
    if method == "gspo":
        return expected_gspo(call, k, N, sequences, add), metrics

    kept = [t for answer in call for t in answer if t.kept]
    tokens = range(len(kept))
    weights = [1.0] * len(kept)
    dropped = set()
    add("policy/clip_frac", 0.0)
    if method == "clip_cov":
        dropped = dropped_by_clip_cov(call, k, draw)
        add("policy/selected_frac", len(dropped) / N)
    if method == "rand_pos_clip":
        dropped = dropped_at_random(call, k, draw)
        add("policy/selected_frac", len(dropped) / N)
    if method == "steer":
        weights = steer_weights(call, k)
        add("policy/weight_mean", sum(weights) / N)
    if method == "fork_tokens":
        by_entropy = sorted(tokens, key=lambda i: -float(kept[i].old.entropy))
        tokens = by_entropy[: max(1, int(k["top_frac"] * len(kept)))]
        N = k["top_frac"] * N

    loss = 0.0
    for i in tokens:
        t = kept[i]
        A = new_advantage(method, t, k)
        if method == "rand_pos_clip" and i in dropped:
            A = 0.0  # no advantage, so no clip either
        token_loss, clipped = token_loss_of(method, t, A, k)
        add("policy/clip_frac", clipped / N)
        if i not in dropped:
            loss = loss + weights[i] * token_loss / N
        loss = loss + entropy_term(method, t, k) / N
        if method == "kl_loss":
            d = float(t.ref.log_prob - t.log_prob)
            add("policy/kl_to_ref", (math.exp(d) - 1 - d) / N)
    if method == "siren":
        share = len(kept) / N
        mean = siren_peaks(call, k)
        add("entropy/peak_mean", share * mean)
        loss = loss + k["coef"] * share * (mean - k["anchor"]).square()
    return loss, metrics


def tokens_to_keep(method, per_rank, k):
    """Sets .kept of the tokens: all but those that clip_b and clip_v take out of the batch."""
    tokens = [t for answers in per_rank for answer in answers for t in answer]
    for t in tokens:
        t.kept = True
        p = float(t.old.log_prob.exp())
        t.S = p * (float(t.old.log_prob) + float(t.old.entropy))
        t.x = float(t.old.entropy) * float(t.old.sum_p2) + float(t.old.sum_p2_log_p) - t.S
    if method == "clip_b":
        mean, deviation = mean_and_deviation([t.S for t in tokens])
        for t in tokens:
            t.kept = not (t.A < 0 and t.S - mean < -k["mu"] * deviation)
    if method == "clip_v":
        _, deviation = mean_and_deviation([t.x for t in tokens])
        for answers in per_rank:
            mine = [t for answer in answers for t in answer]
            over = sorted(
                (t for t in mine if t.A < 0 and t.x > k["mu"] * deviation), key=lambda t: -t.x
            )
            for t in over[: int(k["most_frac"] * len(mine))]:
                t.kept = False
    return [t.kept for t in tokens]


def calls_of(lengths, rows, budget):
    """Rows by length, as many in a call as fit into the padded budget."""
    calls = []
    for i in sorted(rows, key=lambda i: lengths[i]):
        if calls and (len(calls[-1]) + 1) * lengths[i] <= budget:
            calls[-1].append(i)
        else:
            calls.append([i])
    return calls


def even_calls(lengths, rows, budget, number):
    """The micro-batches of a rank: by the smallest budget that needs no more than the number, then
    halved until there are as many, then the shortest rows first."""
    for smaller in range(budget + 1):
        calls = calls_of(lengths, rows, smaller)
        if len(calls) <= number:
            break
    while len(calls) < number:
        calls.sort(key=len)
        longest = calls.pop()
        calls += [longest[: len(longest) // 2], longest[len(longest) // 2 :]]
    return sorted(calls, key=lambda call: max(lengths[i] for i in call))


def adamw(parameters, averages, gradients, lr, update):
    """One step of AdamW in place, betas 0.9 and 0.95; averages: {name: (first, second)}."""
    for name, p in parameters.items():
        first, second = averages[name]
        g = gradients[name]
        first.mul_(0.9).add_(g, alpha=0.1)
        second.mul_(0.95).addcmul_(g, g, value=0.05)
        size = (second / (1 - 0.95**update)).sqrt() + 1e-8
        p.data.sub_(lr * (first / (1 - 0.9**update)) / size)


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()


@torch.no_grad()
def facts_before(answers, model, base):
    """A list of tokens for each answer: what model and base said of them before the updates."""
    batch = []
    for answer, A in zip(answers, advantages_of(answers)):
        tokens = []
        for old, ref in zip(token_facts(model, answer), token_facts(base, answer)):
            token = SimpleNamespace(old=old, ref=ref, A=A, reward=answer["reward"])
            token.accuracy = answer["group_accuracy"]
            tokens.append(token)
        batch.append(tokens)
    return batch


def facts_now(tokens, answer, model, cap):
    """Adds what the model says of an answer's tokens now, with gradient; cap: of --tis_cap."""
    for i, (token, now) in enumerate(zip(tokens, token_facts(model, answer))):
        vars(token).update(vars(now))
        if cap:
            mismatch = float(token.old.log_prob) - answer["log_probs"][i]
            weight = min(math.exp(mismatch), cap)
            held = token.log_prob.detach()
            token.log_prob = held + weight * (token.log_prob - held)


def averages_of(state, parameters, updates):
    """AdamW's averages of a checkpoint, {name: (first, second)}, after so many updates."""
    averages = {}
    for name in parameters:
        slot = state["optimizer"]["state"][f"model.{name}"]
        averages[name] = (slot["exp_avg"].double(), slot["exp_avg_sq"].double())
        assert int(slot["step"]) == updates == state["updates"]
    return averages


def split_over_ranks(answers, learned, part, budget):
    """The micro-batches of each rank, as many on all. learned: of each rank, whether the method
    learns from the answer; part: the rows of the update."""
    lengths = []
    to_run = []
    for of_rank, learns in zip(answers, learned):
        lengths.append([len(a["prompt"]) + len(a["response"]) for a in of_rank])
        to_run.append([i for i in part if learns[i]])
    most = max(1, *(len(calls_of(n, rows, budget)) for n, rows in zip(lengths, to_run)))
    calls = []
    for n, rows in zip(lengths, to_run):
        others = sorted((i for i in part if i not in rows), key=lambda i: n[i])
        while len(rows) < most:
            rows.append(others.pop(0))
        calls.append(even_calls(n, rows, budget, most))
    return calls


def check_step(
    folder,
    method,
    knobs,
    *,
    ranks=1,
    budget=16384,
    grad_clip=1.0,
    cap=0.0,
    warmup=10,
    seed=0,
    updates=2,
):
    """Computes step 3 of the run again. Compares the metrics of its row and the weights of its
    checkpoint."""
    row = read_metrics(folder)[-1]
    k = dict(knobs)
    for name, value in row.items():
        if name.startswith("controller/"):
            k[name.removeprefix("controller/")] = value
    config = json.loads((folder / "config.json").read_text())
    model = load(folder / "checkpoint-2")
    base = load(config["model"])
    state = torch.load(folder / "checkpoint-2" / "trainer_state.pt", weights_only=True)
    parameters = dict(model.named_parameters())
    averages = averages_of(state, parameters, 2 * updates)
    answers = [recorded(folder, 3, rank) for rank in range(ranks)]
    draws = [torch.Generator().manual_seed(hash((seed, 3, r)) % 2**63) for r in range(ranks)]
    batches = [facts_before(of_rank, model, base) for of_rank in answers]

    def is_run(rank, i):
        return method not in LEAVE_OUT or batches[rank][i][0].A != 0

    hands = dealt(answers, updates, is_run)
    learned = [[is_run(*where) for where in hand] for hand in hands]
    answers = [[answers[rank][i] for rank, i in hand] for hand in hands]
    batches = [[batches[rank][i] for rank, i in hand] for hand in hands]
    kept = tokens_to_keep(method, batches, k)

    losses = []
    norms = []
    metrics = {}

    def add(name, value):
        metrics[name] = metrics.get(name, 0.0) + value / updates

    for u in range(updates):
        share = len(answers[0]) // updates
        part = range(u * share, (u + 1) * share)
        chosen = [batch[i] for batch in batches for i in part]
        chosen_learned = [batches[r][i] for r in range(ranks) for i in part if learned[r][i]]
        M = sum(t.kept for answer in chosen_learned for t in answer)
        N = sum(t.kept for answer in chosen for t in answer)
        sequences = sum(any(t.kept for t in answer) for answer in chosen)
        calls = split_over_ranks(answers, learned, part, budget)
        model.zero_grad()
        losses.append(0.0)
        for r in range(ranks):
            for rows in calls[r]:
                call = [batches[r][i] for i in rows]
                for i in rows:
                    facts_now(batches[r][i], answers[r][i], model, cap)
                loss, found = expected_call(method, call, k, N, sequences, draws[r])
                loss.backward()
                losses[-1] += loss.item()
                for name, value in found.items():
                    add(name, value)
                moved = [batches[r][i] for i in rows if learned[r][i]]
                for t in (t for answer in moved for t in answer if t.kept):
                    d = float(t.log_prob - t.old.log_prob)
                    add("policy/kl_to_rollout", (math.exp(d) - 1 - d) / M)
        norms.append(math.sqrt(sum(float(p.grad.square().sum()) for p in parameters.values())))
        scale = min(1.0, grad_clip / (norms[-1] + 1e-6))
        gradients = {name: p.grad * scale for name, p in parameters.items()}
        done = 2 * updates + u
        lr = LEARNING_RATE * min(1.0, (done + 1) / warmup)
        adamw(parameters, averages, gradients, lr, done + 1)

    metrics["train/loss"] = sum(losses) / updates
    metrics["train/grad_norm"] = sum(norms) / updates
    metrics["train/lr"] = lr
    metrics["train/skipped"] = 0
    for name, value in metrics.items():
        close = math.isclose(row[name], value, rel_tol=2e-4, abs_tol=2e-6)
        assert close, (name, row[name], value)
    of_updates = ("train/", "policy/kl", "policy/clip", "policy/selected", "policy/weight")
    logged = {name for name in row if name.startswith((*of_updates, "entropy/peak"))}
    assert logged == metrics.keys()
    after = load_file(folder / "checkpoint-3" / "model.safetensors")
    before = load_file(folder / "checkpoint-2" / "model.safetensors")
    moved = sum(float((after[name] - before[name]).abs().sum()) for name in parameters)
    apart = sum(float((after[name] - p.data).abs().sum()) for name, p in parameters.items())
    assert moved > 0 and apart < 0.01 * moved
    all_answers = [answer for of_rank in answers for answer in of_rank]
    return SimpleNamespace(row=row, kept=kept, answers=all_answers)


def step_args(method, knobs, *more):
    settings = [f"{name}={value}" for name, value in knobs.items()]
    return (
        f"--method {method} --temperature {TEMPERATURE} --lr {LEARNING_RATE}",
        "--steps 3 --record_step 3 --save_every 1 --keep_checkpoints 3 --eval_data none",
        *more,
        "--knobs",
        *settings,
    )


@pytest.mark.parametrize("method", STEP_KNOBS)
def test_a_step_recomputed_from_what_the_run_wrote(method, toy, tmp_path):
    knobs = STEP_KNOBS[method]
    # With seed 0 cispo has gradients that are rounding alone, and AdamW makes steps of them.
    seed = 1 if method == "cispo" else 0
    toy_run(toy, tmp_path, "run", *step_args(method, knobs, f"--seed {seed}"))
    seen = check_step(tmp_path / "run", method, knobs, seed=seed)
    for name in ("policy/clip_frac", "policy/selected_frac"):
        assert 0 < seen.row.get(name, 0.5) < 0.95, name  # the method acts
    assert all(seen.kept) == (method not in ("clip_b", "clip_v"))
    assert any(a["log_probs"] is None for a in seen.answers) == (method == "aepo")
    assert len({a["reward"] for a in seen.answers}) == 2


@pytest.mark.parametrize("method", ["clip_cov", "siren", "gspo"])
def test_several_micro_batches_recomputed_from_what_the_run_wrote(method, toy, tmp_path):
    """A micro-batch has one or two answers. The clip of the gradient's norm acts, and the warm-up
    of four updates is over."""
    knobs = STEP_KNOBS[method]
    more = "--micro_batch_tokens 8 --grad_clip 0.05 --warmup_updates 4 --seed 5"
    toy_run(toy, tmp_path, method, *step_args(method, knobs, more))
    folder = tmp_path / method
    seen = check_step(folder, method, knobs, budget=8, grad_clip=0.05, warmup=4, seed=5)
    assert seen.row["train/grad_norm"] > 0.05


def test_a_mismatch_recomputed_from_what_the_run_wrote(toy, tmp_path, monkeypatch):
    """An engine whose log-probs are off by up to 0.6 nats, either way. --tis_cap weighs each
    token's gradient by min(exp(old - engine's), cap). The logged mismatch is the absolute one."""
    generate = rollout.TorchEngine.generate

    def off_by(i, j):
        return 0.6 * math.sin(7 * i + j)

    def distorted(*args, **kwargs):
        ids, log_probs, truncated = generate(*args, **kwargs)
        off = [[x + off_by(i, j) for j, x in enumerate(row)] for i, row in enumerate(log_probs)]
        return ids, off, truncated

    monkeypatch.setattr(rollout.TorchEngine, "generate", distorted)
    monkeypatch.setitem(rollout.LARGEST_MISMATCH, torch.float32, 1.0)
    knobs = STEP_KNOBS["grpo"]
    toy_run(toy, tmp_path, "run", *step_args("grpo", knobs, "--tis_cap 1.2"))
    seen = check_step(tmp_path / "run", "grpo", knobs, cap=1.2)
    sizes = []
    for i, answer in enumerate(seen.answers):
        sizes += [abs(off_by(i, j)) for j in range(len(answer["response"]))]
    mean = sum(sizes) / len(sizes)
    assert math.isclose(seen.row["rollout/mismatch_mean"], mean, rel_tol=1e-4)
    assert math.isclose(seen.row["rollout/mismatch_max"], max(sizes), rel_tol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, more, budget",
    [("clip_b", "--micro_batch_tokens 12", 12), ("clip_cov", "--parallel fsdp", 16384)],
)
def test_two_ranks_recomputed_from_what_the_run_wrote(method, more, budget, toy, tmp_path):
    """Tokens, clips and means are those of both ranks. What is chosen is chosen per micro-batch of
    a rank."""
    knobs = STEP_KNOBS[method]
    result = torchrun(2, toy_args(toy, tmp_path, method, *step_args(method, knobs, more)))
    assert result.returncode == 0, result.stderr
    check_step(tmp_path / method, method, knobs, ranks=2, budget=budget)
