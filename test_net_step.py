"""One step of every method, computed again from what a run wrote: merged into test_all.py."""
import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_all import HERE, no_process_group_left, toy, toy_args, toy_run, torchrun  # noqa: F401
from transformers import AutoModelForCausalLM

import record
import rollout

# ---- a whole step, computed again from outside -----------------------------------------------------------------------
#
# A run of three steps writes its checkpoints and, with --record_step 3, the answers of its third step. From the weights
# and AdamW's averages of checkpoint-2 and from these answers the step is computed again here, in float64, one answer and
# one token at a time, with nothing of the program but the recorded numbers. Loss, gradient norm, metrics and the weights
# of checkpoint-3 must be those of the run. So no wire between a flag, a tensor, a knob and a loss can be loose.

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
    "steer": dict(min_weight=0.3, max_weight=1.3, mapping="linear", form="theorem", clip_low=0.02, clip_high=0.03,
                  dual_clip=1.05),
    "par": dict(schedule="entropy", target_entropy=0.2, delta=0.15, positive_weight=0.1, clip_low=0.02, clip_high=0.03),
    "quadrant": dict(pos_likely=0.5, pos_rare=1.5, neg_likely=0.2, neg_rare=2.0, clip_low=0.02, clip_high=0.03),
    "w_reinforce": dict(positive_weight=0.3, negative_weight=0.7, clip_low=0.02, clip_high=0.03),
    "entropy_advantage": dict(alpha=0.2, kappa=3.0, clip_low=0.02, clip_high=0.03),
    "entropic": dict(target_entropy=0.5, kp=0.5, ki=0.1, confident=0.3, clip_low=0.02, clip_high=0.03),
    "dcpo": dict(target_entropy=9.0, clip_low=0.02, clip_high=0.03),
    "aepo": dict(target_entropy=9.0, hot=1.5, cold=0.7, most_rows=5, clip_low=0.02, clip_high=0.03),
    "flex_clip": dict(schedule="did", upper_slope=-0.05, upper_offset=0.06, lower_slope=-0.04, lower_offset=0.05,
                      narrowest=0.01, widest=0.055, clip=0.02),
    "ce_gppo": dict(beta_low=0.6, beta_high=0.8, clip_low=0.02, clip_high=0.03),
    "cispo": dict(clip_low=0.02, clip_high=0.03),
    "gspo": dict(clip_low=0.005, clip_high=0.008),
    "rand_pos_clip": dict(drop_frac=0.4, clip_low=0.02, clip_high=0.03),
    "fork_tokens": dict(top_frac=0.4, clip_low=0.02, clip_high=0.03),
    "clip_b": dict(mu=0.5, clip_low=0.02, clip_high=0.03),
    "clip_v": dict(mu=0.2, most_frac=0.1, clip_low=0.02, clip_high=0.03),
    "adaptive_entropy": dict(target_entropy=9.0, delta=0.1, max_coef=0.25, clip_low=0.02, clip_high=0.03),
    "aer": dict(target_ratio=1.5, rate=0.3, hard_below=0.6, clip_low=0.02, clip_high=0.03),
    "siren": dict(coef=0.5, peak_frac=0.3, clip_low=0.02, clip_high=0.03),
}


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
    """A list with the facts of each response token under the model, by one forward of this answer alone."""
    ids = torch.tensor([answer["prompt"] + answer["response"]])
    logits = model(input_ids=ids).logits[0, len(answer["prompt"]) - 1:-1] / TEMPERATURE
    facts = []
    for row, token in zip(logits, answer["response"]):
        log_p = row.log_softmax(0)
        p = log_p.exp()
        facts.append(SimpleNamespace(
            log_prob=log_p[token],
            entropy=-(p * log_p).sum(),
            sum_p2=p.square().sum(),
            sum_p2_log_p=(p.square() * log_p).sum(),
            nucleus=nucleus_entropy_of(p),
            hot=(row / 1.2).log_softmax(0)[token],
            cold=(row / 0.8).log_softmax(0)[token],
        ))
    return facts


def advantages_of(answers):
    """The advantage of each answer, by hand. Answers that aepo mixed in, drawn at another temperature, have 1; what is
    left of a group that they entered knows the group's rewards, 0 or 1, by its accuracy."""
    advantages = []
    for start in range(0, len(answers), 4):
        group = answers[start:start + 4]
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
        loss, clipped = torch.tensor(-A * dual), True
    return loss, clipped


def mean_and_deviation(values):
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((x - mean) ** 2 for x in values) / len(values))


def covariances(call):
    log_probs = [float(t.log_prob) for answer in call for t in answer]
    advantages = [t.A for answer in call for t in answer]
    mean_l, mean_a = sum(log_probs) / len(log_probs), sum(advantages) / len(advantages)
    return [(x - mean_l) * (a - mean_a) for x, a in zip(log_probs, advantages)]


def expected_call(method, call, k, N, sequences, draw):
    """Loss and sums of metrics that one micro-batch must give. call: answers, lists of tokens, all of the response.

    k: knobs, with those that the controller sets; N: kept tokens of the optimizer step over all ranks; sequences: its
    answers; draw: the rank's random generator.
    """
    kept = [t for answer in call for t in answer if t.kept]
    low, high = k.get("clip_low"), k.get("clip_high")
    metrics = {"policy/clip_frac": 0.0}

    def add(name, value):
        metrics[name] = metrics.get(name, 0.0) + float(value)

    if method == "kl_cov":
        del metrics["policy/clip_frac"]
        order = sorted(range(len(kept)), key=lambda i: -covariances(call)[i])
        chosen = order[:max(1, int(k["cov_frac"] * len(kept)))]
        add("policy/selected_frac", len(chosen) / N)
        loss = 0.0
        for i, t in enumerate(kept):
            log_r = t.log_prob - t.old.log_prob
            loss = loss - t.A * log_r.exp() + (k["kl_coef"] * log_r.abs() if i in chosen else 0.0)
        return loss / N, metrics

    if method == "gspo":
        loss = 0.0
        for answer in call:
            log_s = sum(float(t.log_prob - t.old.log_prob) for t in answer) / len(answer)
            for t in answer:
                s = math.exp(log_s) * (t.log_prob - t.log_prob.detach()).exp()
                token_loss, clipped = surrogate(t, low, high, t.A, r=s)
                loss = loss + token_loss / len(answer)
                add("policy/clip_frac", clipped / N)
        return loss / sequences, metrics

    dropped, weight, forks = set(), {}, None
    if method == "clip_cov":
        cov = covariances(call)
        free = [i for i, t in enumerate(kept) if not surrogate(t, low, high, t.A)[1]]
        candidates = [i for i in free if k["cov_low"] < cov[i] < k["cov_high"]]
        count = max(1, int(k["cov_frac"] * len(kept)))
        if candidates:
            dropped = {candidates[j] for j in torch.randperm(len(candidates), generator=draw)[:count].tolist()}
        add("policy/selected_frac", len(dropped) / N)
    if method == "rand_pos_clip":
        uniform = torch.rand(len(call), max(map(len, call)), generator=draw)
        flat = [uniform[i, j] for i, answer in enumerate(call) for j in range(len(answer))]
        dropped = {i for i, t in enumerate(kept) if t.A > 0 and flat[i] < torch.tensor(k["drop_frac"])}
        add("policy/selected_frac", len(dropped) / N)
    if method == "steer":
        size = []
        for t in kept:
            p, r = float(t.log_prob.exp()), float((t.log_prob - t.old.log_prob).exp())
            clipped = surrogate(t, low, high, t.A, dual=k["dual_clip"])[1]
            size.append(0.0 if clipped else abs(r * t.A * p * (1 - p) * (float(t.log_prob) + float(t.old.entropy))))
        least, most = min(size), max(size)
        for i, x in enumerate(size):
            weight[i] = k["max_weight"] - (k["max_weight"] - k["min_weight"]) * (x - least) / (most - least)
            add("policy/weight_mean", weight[i] / N)
    if method == "fork_tokens":
        order = sorted(range(len(kept)), key=lambda i: -float(kept[i].old.entropy))
        forks = order[:max(1, int(k["top_frac"] * len(kept)))]
        N = k["top_frac"] * N

    loss = 0.0
    for i, t in enumerate(kept):
        A, dual = t.A, None
        if forks is not None and i not in forks:
            continue
        if method in ("grpo", "steer"):
            dual = k["dual_clip"]
        if method == "par" and A > 0:
            A = A * k["positive_weight"]
        if method == "quadrant":
            likely = float(t.old.log_prob) > -float(t.old.entropy)
            A = A * k[("pos_" if A > 0 else "neg_") + ("likely" if likely else "rare")]
        if method == "w_reinforce":
            A = k["positive_weight"] if t.reward > 0 else -k["negative_weight"]
        if method == "entropy_advantage":
            A = A + min(k["alpha"] * float(t.old.entropy), abs(A) / k["kappa"])
        if method == "entropic" and float(t.old.log_prob.exp()) > k["confident"]:
            A = A * (1 + k["alpha"]) if A > 0 else A * (1 - k["alpha"])
        if method == "dcpo":
            tempered = t.old.hot if k["hot"] else t.old.cold
            A = (1 - k["mix"]) * A + k["mix"] * (t.reward > 0) * float((tempered - t.old.log_prob).exp())
        if method == "flex_clip":
            p = float(t.log_prob.exp())
            flexible = [min(max(k[f"{side}_slope"] * p + k[f"{side}_offset"], k["narrowest"]), k["widest"])
                        for side in ("lower", "upper")]
            low, high = (k[f"{side}_share"] * bound + (1 - k[f"{side}_share"]) * k["clip"]
                         for side, bound in zip(("lower", "upper"), flexible))
        if method == "ce_gppo":
            r = (t.log_prob - t.old.log_prob).exp()
            token_loss, clipped = -A * r, False
            if r < 1 - low and A < 0:
                token_loss, clipped = -k["beta_low"] * (1 - low) * r / r.detach() * A, True
            if r > 1 + high and A > 0:
                token_loss, clipped = -k["beta_high"] * (1 + high) * r / r.detach() * A, True
        elif method == "cispo":
            r = float((t.log_prob - t.old.log_prob).exp())
            bounded = min(max(r, 1 - low), 1 + high)
            token_loss, clipped = -bounded * A * t.log_prob, bounded != r
        else:
            if method == "rand_pos_clip" and i in dropped:
                A = 0.0
            token_loss, clipped = surrogate(t, low, high, A, dual)
        add("policy/clip_frac", clipped / N)
        if method == "clip_cov" and i in dropped:
            continue
        loss = loss + weight.get(i, 1.0) * token_loss / N
        if method == "kl_loss":
            d = t.ref.log_prob - t.log_prob
            add("policy/kl_to_ref", (d.exp() - 1 - d) / N)
            loss = loss + k["kl_coef"] * d.square() / 2 / N
        if method in ("entropy_bonus", "adaptive_entropy"):
            loss = loss - k["entropy_coef"] * t.entropy / N
        if method == "aer":
            loss = loss - k["alpha"] * max(0.0, k["hard_below"] - t.accuracy) / k["hard_below"] * t.entropy / N
    if method == "siren":
        peaks = []
        for answer in call:
            ordered = sorted(answer, key=lambda t: -float(t.nucleus))
            peaks += [t.nucleus for t in ordered[:math.ceil(k["peak_frac"] * len(answer))]]
        mean = sum(peaks) / len(peaks)
        share = len(kept) / N
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
            over = sorted((t for t in mine if t.A < 0 and t.x > k["mu"] * deviation), key=lambda t: -t.x)
            for t in over[:int(k["most_frac"] * len(mine))]:
                t.kept = False
    return [t.kept for t in tokens]


def calls_of(lengths, rows, budget, at_least):
    """The micro-batches of a rank: rows by length, as many as fit into the padded budget; then halved until enough."""
    calls, call = [], []
    for i in sorted(rows, key=lambda i: lengths[i]):
        if call and (len(call) + 1) * lengths[i] > budget:
            calls.append(call)
            call = []
        call.append(i)
    calls.append(call)
    while len(calls) < at_least:
        calls.sort(key=len)
        longest = calls.pop()
        calls += [longest[:len(longest) // 2], longest[len(longest) // 2:]]
    return calls


def adamw(parameters, averages, gradients, lr, update):
    """One step of AdamW in place, betas 0.9 and 0.95; averages: {name: (first, second)}."""
    for name, p in parameters.items():
        first, second = averages[name]
        g = gradients[name]
        first.mul_(0.9).add_(g, alpha=0.1)
        second.mul_(0.95).addcmul_(g, g, value=0.05)
        size = (second / (1 - 0.95**update)).sqrt() + 1e-8
        p.data.sub_(lr * (first / (1 - 0.9**update)) / size)


def check_step(folder, method, knobs, *, ranks=1, budget=16384, grad_clip=1.0, cap=0.0, warmup=10, seed=0, updates=2):
    """Computes step 3 of the run again and compares the metrics of its row and the weights of its checkpoint."""
    row = record.read_metrics(folder)[-1]
    k = dict(knobs)
    k |= {name.removeprefix("controller/"): value for name, value in row.items() if name.startswith("controller/")}
    load = lambda path: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    config = json.loads((folder / "config.json").read_text())
    model, base = load(folder / "checkpoint-2"), load(config["model"])
    state = torch.load(folder / "checkpoint-2" / "trainer_state.pt", weights_only=True)
    parameters = dict(model.named_parameters())
    averages = {}
    for name in parameters:
        slot = state["optimizer"]["state"][f"model.{name}"]
        averages[name] = (slot["exp_avg"].double(), slot["exp_avg_sq"].double())
        assert int(slot["step"]) == 2 * updates == state["updates"]

    recorded, batches, draws = [], [], []
    for rank in range(ranks):
        lines = (folder / f"step-3-rank-{rank}.jsonl").read_text().splitlines()
        answers = [json.loads(line) for line in lines]
        recorded.append(answers)
        draws.append(torch.Generator().manual_seed(hash((seed, 3, rank)) % 2**63))
        batch = []
        with torch.no_grad():
            for answer, A in zip(answers, advantages_of(answers)):
                old, ref = token_facts(model, answer), token_facts(base, answer)
                batch.append([SimpleNamespace(old=o, ref=r, A=A, reward=answer["reward"], accuracy=answer["group_accuracy"])
                              for o, r in zip(old, ref)])
        batches.append(batch)
    kept = tokens_to_keep(method, batches, k)

    losses, norms, metrics = [], [], {}
    for u in range(updates):
        parts = [range(len(b) * u // updates, len(b) * (u + 1) // updates) for b in batches]
        chosen = [b[i] for b, part in zip(batches, parts) for i in part]
        N = sum(t.kept for answer in chosen for t in answer)
        sequences = sum(any(t.kept for t in answer) for answer in chosen)
        lengths = [[len(a["prompt"]) + len(a["response"]) for a in answers] for answers in recorded]
        calls = [calls_of(lengths[r], parts[r], budget, 1) for r in range(ranks)]
        calls = [calls_of(lengths[r], parts[r], budget, max(map(len, calls))) for r in range(ranks)]
        model.zero_grad()
        loss_of_update = 0.0
        for r in range(ranks):
            for rows in calls[r]:
                call = []
                for i in rows:
                    now = token_facts(model, recorded[r][i])
                    for t, new, engine in zip(batches[r][i], now, recorded[r][i]["log_probs"] or [None] * len(now)):
                        vars(t).update(vars(new))
                        if cap:
                            w = min(math.exp(float(t.old.log_prob) - engine), cap)
                            t.log_prob = t.log_prob.detach() + w * (t.log_prob - t.log_prob.detach())
                    call.append(batches[r][i])
                loss, found = expected_call(method, call, k, N, sequences, draws[r])
                loss.backward()
                loss_of_update += float(loss)
                for t in (t for answer in call for t in answer if t.kept):
                    d = float(t.log_prob - t.old.log_prob)
                    found["policy/kl_to_rollout"] = found.get("policy/kl_to_rollout", 0.0) + (math.exp(d) - 1 - d) / N
                for name, value in found.items():
                    metrics[name] = metrics.get(name, 0.0) + value / updates
        gradients = {name: p.grad for name, p in parameters.items()}
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        losses.append(loss_of_update)
        norms.append(norm)
        gradients = {name: g * min(1.0, grad_clip / (norm + 1e-6)) for name, g in gradients.items()}
        done = 2 * updates + u
        lr = LEARNING_RATE * min(1.0, (done + 1) / warmup)
        adamw(parameters, averages, gradients, lr, done + 1)

    metrics |= {"train/loss": sum(losses) / updates, "train/grad_norm": sum(norms) / updates, "train/lr": lr, "train/skipped": 0}
    for name, value in metrics.items():
        assert math.isclose(row[name], value, rel_tol=2e-4, abs_tol=2e-6), (name, row[name], value)
    mine = {name for name in row if name.startswith("train/")} | {"policy/kl_to_rollout"}
    mine |= {f"policy/{name}" for name in ("clip_frac", "selected_frac", "weight_mean", "kl_to_ref")} & row.keys()
    assert mine | {"entropy/peak_mean"} & row.keys() == metrics.keys()
    after = load_file(folder / "checkpoint-3" / "model.safetensors")
    before = load_file(folder / "checkpoint-2" / "model.safetensors")
    moved = sum(float((after[name] - before[name]).abs().sum()) for name in parameters)
    apart = sum(float((after[name] - parameters[name].data).abs().sum()) for name in parameters)
    assert moved > 0 and apart < 0.01 * moved
    return SimpleNamespace(row=row, kept=kept, answers=[a for answers in recorded for a in answers])


def step_args(method, knobs, *more):
    settings = [f"{name}={value}" for name, value in knobs.items()]
    return ["--method", method, "--knobs", *settings, "--temperature", str(TEMPERATURE), "--lr", str(LEARNING_RATE),
            "--steps", "3", "--record_step", "3", "--save_every", "1", "--keep_checkpoints", "3", "--eval_data", "none", *more]


@pytest.mark.parametrize("method", STEP_KNOBS)
def test_a_step_recomputed_from_what_the_run_wrote(method, toy, tmp_path):
    knobs = STEP_KNOBS[method]
    toy_run(toy, tmp_path, "run", *step_args(method, knobs))
    seen = check_step(tmp_path / "run", method, knobs)
    acts = {name: seen.row[name] for name in ("policy/clip_frac", "policy/selected_frac") if name in seen.row}
    assert all(0 < share < 0.95 for share in acts.values()), acts
    assert all(seen.kept) == (method not in ("clip_b", "clip_v"))
    assert any(a["log_probs"] is None for a in seen.answers) == (method == "aepo")
    assert len({a["reward"] for a in seen.answers}) == 2


def test_several_micro_batches_recomputed_from_what_the_run_wrote(toy, tmp_path):
    """A micro-batch of one or two answers; the clip of the gradient's norm acts, a warm-up of four updates is over, and
    the rate of a fifth is the same."""
    for method in ("clip_cov", "siren", "gspo"):
        knobs = STEP_KNOBS[method]
        args = step_args(method, knobs, "--micro_batch_tokens", "8", "--grad_clip", "0.05", "--warmup_updates", "4")
        toy_run(toy, tmp_path, method, *args, "--seed", "5")
        seen = check_step(tmp_path / method, method, knobs, budget=8, grad_clip=0.05, warmup=4, seed=5)
        assert seen.row["train/grad_norm"] > 0.05


def test_a_mismatch_recomputed_from_what_the_run_wrote(toy, tmp_path, monkeypatch):
    """An engine whose log-probs are off by up to 0.6 nats, either way: --tis_cap weighs each token's gradient by
    min(exp(old - engine's), cap), and the logged mismatch is the absolute one."""
    generate = rollout.TorchEngine.generate

    def distorted(*args, **kwargs):
        ids, log_probs, truncated = generate(*args, **kwargs)
        off = [[x + 0.6 * math.sin(7 * i + j) for j, x in enumerate(row)] for i, row in enumerate(log_probs)]
        return ids, off, truncated

    monkeypatch.setattr(rollout.TorchEngine, "generate", distorted)
    knobs = STEP_KNOBS["grpo"]
    toy_run(toy, tmp_path, "run", *step_args("grpo", knobs, "--tis_cap", "1.2"))
    seen = check_step(tmp_path / "run", "grpo", knobs, cap=1.2)
    sizes = [abs(0.6 * math.sin(7 * i + j)) for i, a in enumerate(seen.answers) for j in range(len(a["response"]))]
    mean, largest = (next(seen.row[f"rollout/{name}_{part}"] for name in ("gap", "mismatch") if f"rollout/{name}_{part}" in seen.row)
                     for part in ("mean", "max"))
    assert math.isclose(mean, sum(sizes) / len(sizes), rel_tol=1e-4) and math.isclose(largest, max(sizes), rel_tol=1e-4)


def test_two_ranks_recomputed_from_what_the_run_wrote(toy, tmp_path):
    """Tokens, clips and means are those of both ranks; what is chosen is chosen per micro-batch of a rank."""
    for method, more in (("clip_b", ("--micro_batch_tokens", "12")), ("clip_cov", ("--parallel", "fsdp"))):
        knobs = STEP_KNOBS[method]
        result = torchrun(2, toy_args(toy, tmp_path, method, *step_args(method, knobs, *more)))
        assert result.returncode == 0, result.stderr
        check_step(tmp_path / method, method, knobs, ranks=2, budget=12 if method == "clip_b" else 16384)
