"""rollout.py - sample answers from the current policy: token ids in, token ids and their log-probs out.

Two engines with one interface, from make_engine("vllm" | "torch" | "auto", ...):

    push_weights(named_tensors)   copy the trainer's weights into the engine's own model
    generate(prompts, ...)        (ids, rollout_log_probs, truncated), three lists in the order of the prompts
    sleep(), wake()               give GPU memory back during the update; take it again just before the next push
    close()                       at the end of the program

Both sample from softmax(logits / T) over the whole vocabulary: top_p = 1 and top_k off, always. The trainer computes
log_softmax(logits / T) over the whole vocabulary, and pi_new / pi_old is an importance weight only if that is the
distribution which drew the answer. With top_p = 0.9 a token was drawn with up to 1/0.9 of the probability that the
trainer believes, and what was cut off can never be learned: entropy falls for a reason that no loss shows.

Each engine owns its model and never runs the trainer's: an FSDP forward is a collective, and ranks whose answers end
at different lengths would run different numbers of them and wait for one another forever.

Shapes: P prompts, n answers to each, B rows decoded together, S tokens in the cache, V tokens in the vocabulary.
"""
import functools
import importlib.util
import math
import os
import random
import socket
from contextlib import contextmanager
from statistics import fmean

# OpenMP reads this once, when torch is imported. Threads that spin while they wait make shared cores 10 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.initialization import no_init_weights

import verify
from losses import group_advantages


def full_tensors(model):
    """(name, tensor) of model.state_dict(), sharded tensors gathered one at a time, so that a rank holds its shards and
    one whole tensor. A collective under FSDP2: every rank must exhaust the iterator.

    state_dict(), not named_parameters(): it repeats a tied lm_head.weight. vLLM on CPU keeps a packed copy of the head
    and without that entry would go on sampling from the old one, silently."""
    for name, tensor in model.state_dict().items():
        yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_request(prompts, max_tokens, temperature, seeds, max_model_len):
    longest = max(map(len, prompts), default=0)
    if longest + max_tokens > max_model_len:
        raise ValueError(f"the longest prompt has {longest} tokens and {max_tokens} may follow: more than the "
                         f"{max_model_len} of max_model_len; drop long prompts or lower max_tokens")
    if not all(prompts):
        raise ValueError("a prompt has no tokens")
    if len(seeds) != len(prompts):
        raise ValueError(f"one seed per prompt: {len(prompts)} prompts, {len(seeds)} seeds")
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")


# ---------------------------------------------------------------------------------------------- plain PyTorch

def sample(logits, uniform, temperature):
    """Draw one token per row by inverting the distribution function: the first token with cdf > uniform * total.

    logits (B, V); uniform (B,) float64 in [0, 1). Returns tokens (B,) int64 and their log-probs (B,) float32."""
    log_probs = torch.log_softmax(logits.float() / temperature, dim=-1)
    # float64: a float32 cdf moves in steps of 6e-8, and of 152k tokens a quarter would share a step with a neighbour
    # and never be drawn. uniform * total < total, so a token is always found; > never finds one of probability zero.
    cdf = log_probs.exp().cumsum(dim=-1, dtype=torch.float64)
    total = cdf[:, -1:]
    if not total.isfinite().all():
        raise FloatingPointError("the sampling model's logits are not finite: were NaN weights pushed?")
    tokens = torch.searchsorted(cdf, uniform[:, None] * total, right=True)
    return tokens[:, 0], log_probs.gather(-1, tokens)[:, 0]


class TorchEngine:
    """Any Hugging Face causal LM with a KV cache, whole on each rank, on CPU or GPU."""

    def __init__(self, model_dir, *, dtype, device, stop_ids, max_model_len, max_rows=256, trust_remote_code=False):
        """model_dir: folder or hub id; only its config is read. max_rows: answers decoded together (at least those of
        one prompt). KV-cache memory grows with it; on CPU 256 was as fast as 512 and 1.2 times faster than 128."""
        with no_init_weights(), torch.device(device):  # allocates, and draws nothing from the global generator
            config = AutoConfig.from_pretrained(model_dir, trust_remote_code=trust_remote_code)
            self.model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        self.model.eval().tie_weights()  # no_init_weights skips this too, and a large head would be held twice
        self.device, self.max_model_len, self.max_rows = device, max_model_len, max_rows
        self.stop_ids = torch.tensor(sorted(stop_ids), device=device)

    @torch.no_grad()
    def push_weights(self, named_tensors):
        own = self.model.state_dict()
        missing = set(own)
        for name, tensor in named_tensors:
            if name not in own or own[name].shape != tensor.shape:  # copy_ would broadcast a wrong shape
                raise ValueError(f"the engine's model has no {name} of shape {tuple(tensor.shape)}")
            own[name].copy_(tensor)
            missing.discard(name)
        if missing:
            raise ValueError(f"weights that were not pushed: {sorted(missing)}")

    def generate(self, prompts, *, n, max_tokens, temperature, seeds):
        """prompts: P lists of token ids; seeds: P ints >= 0. Answer j of prompt i is drawn with seeds[i] + j, so keep
        the seeds n apart. Returns three lists of length P * n, all answers to prompt 0 first: token ids (EOS
        included), the log-prob with which each was drawn, and whether the answer is truncated (no EOS in max_tokens).

        An answer depends on weights, prompt and seed, and on the rows beside it only through the rounding of batched
        matrix products. The global random generators are not touched."""
        check_request(prompts, max_tokens, temperature, seeds, self.max_model_len)
        answers = [None] * len(prompts)
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # less padding in a batch
        size = max(1, self.max_rows // n)
        for chunk in (by_length[start:start + size] for start in range(0, len(prompts), size)):
            # default_rng hashes its seed: the streams of neighbouring seeds are unrelated
            streams = [np.random.default_rng(seeds[i] + j) for i in chunk for j in range(n)]
            uniform = np.stack([stream.random(max_tokens) for stream in streams])
            rows = self._decode([prompts[i] for i in chunk], n, torch.from_numpy(uniform), temperature)
            for k, i in enumerate(chunk):
                answers[i] = rows[k * n:(k + 1) * n]
        return tuple([answer[field] for group in answers for answer in group] for field in range(3))

    @torch.inference_mode()
    def _decode(self, prompts, n, uniform, temperature):
        """The n answers to each of a batch of prompts; uniform (P * n, max_tokens).
        Returns (ids, log_probs, truncated) per row."""
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=self.device)               # (P, S)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device)   # (P, S)
        # Without position_ids a model counts the padding too: wrong by nats where positions are learned (GPT-2).
        positions = (mask.cumsum(-1) - 1).clamp(min=0)                                                      # (P, S)
        cache = DynamicCache(config=self.model.config)

        def next_logits(ids, positions):
            return self.model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache,
                              use_cache=True, logits_to_keep=1).logits[:, -1]                               # (B, V)

        # A prompt is run once; its keys, values and last logits then serve its n answers.
        logits = next_logits(ids, positions).repeat_interleave(n, dim=0)
        cache.batch_repeat_interleave(n)
        mask = mask.repeat_interleave(n, dim=0)

        uniform = uniform.to(self.device)
        total, max_tokens = uniform.shape
        tokens = torch.zeros(total, max_tokens, dtype=torch.long, device=self.device)
        log_probs = torch.zeros(total, max_tokens, device=self.device)
        length = torch.zeros(total, dtype=torch.long, device=self.device)
        row = torch.arange(total, device=self.device)  # (B,) which answer each row of the shrinking batch is
        for t in range(max_tokens):
            token, token_log_prob = sample(logits, uniform[row, t], temperature)
            tokens[row, t], log_probs[row, t], length[row] = token, token_log_prob, t + 1
            going = ~torch.isin(token, self.stop_ids)
            if t + 1 == max_tokens or not going.any():
                break
            if not going.all():  # finished rows leave the batch
                keep = going.nonzero()[:, 0]
                cache.batch_select_indices(keep)
                token, row, mask = token[keep], row[keep], mask[keep]
            mask = torch.cat([mask, mask.new_ones(len(row), 1)], dim=-1)
            logits = next_logits(token[:, None], mask.sum(-1, keepdim=True) - 1)
        ended = torch.isin(tokens.gather(1, length[:, None] - 1)[:, 0], self.stop_ids)
        return [(ids[:k], lps[:k], not end) for ids, lps, k, end in
                zip(tokens.tolist(), log_probs.tolist(), length.tolist(), ended.tolist())]

    def sleep(self):
        """Nothing to free: the KV cache lives inside generate only."""

    def wake(self):
        """Nothing to restore."""

    def close(self):
        """Nothing to shut down."""


# ---------------------------------------------------------------------------------------------- vLLM

def prepare_environment():
    """Variables that vLLM and torch.distributed read. Those of torchrun make `python train.py` a world of one."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        free_port = probe.getsockname()[1]
    defaults = dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port,
                    VLLM_ENABLE_V1_MULTIPROCESSING=0,  # in this process, where it can take the trainer's tensors
                    VLLM_LOGGING_LEVEL="ERROR")
    for name, value in defaults.items():
        os.environ.setdefault(name, str(value))


@contextmanager
def own_rng():
    """vLLM reseeds the global generators when it is built and draws from torch's on CPU. Leave them as they were, or
    the trainer's shuffles would depend on the engine."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
        yield
    random.setstate(python_state)
    np.random.set_state(numpy_state)


class VllmEngine:
    """vLLM inside this process: an engine per rank, or one over each tensor_parallel_size neighbouring ranks. Build it
    on all ranks together, after init_process_group and torch.set_num_threads (vLLM makes the latter a no-op on CPU)."""

    def __init__(self, model_dir, *, dtype, device, stop_ids, max_model_len, max_rows=256, trust_remote_code=False,
                 tensor_parallel_size=1, gpu_memory_utilization=0.3):
        """gpu_memory_utilization: share of the GPU for weights and KV cache; it must be free when the engine is built.
        max_rows: answers decoded together at most. On CPU head_dim must be a multiple of 32."""
        from vllm import LLM  # seconds, so only where it is used
        self.on_gpu, self.asleep = torch.device(device).type == "cuda", False
        if self.on_gpu:
            options = dict(gpu_memory_utilization=gpu_memory_utilization, enable_sleep_mode=True)
        else:
            torch._dynamo.config.disable = True  # else the first generate compiles a small helper with g++: 4-12 s
            # Chunked prefill: a seeded prompt cut in two raises "CPU Generator does not use offset".
            options = dict(kv_cache_memory_bytes=2**30, enforce_eager=True, enable_chunked_prefill=False)
        with own_rng():
            self.llm = LLM(
                model_dir, dtype=dtype, max_model_len=max_model_len, max_num_seqs=max_rows, seed=0,
                load_format="dummy", skip_tokenizer_init=True,  # reads the config only; the weights are pushed
                distributed_executor_backend="external_launcher", tensor_parallel_size=tensor_parallel_size,
                logprobs_mode="processed_logprobs",  # log_softmax(logits / T), of what was really sampled
                trust_remote_code=trust_remote_code, disable_log_stats=True, **options)
        self.stop_ids, self.max_model_len = sorted(stop_ids), max_model_len

    def push_weights(self, named_tensors):
        self.llm.collective_rpc("reload_weights", kwargs=dict(weights_iterator=named_tensors))
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])  # not before: the gathered tensors need the room
            self.asleep = False
        self.llm.reset_prefix_cache()  # or prompts would be continued from the old weights' keys and values

    def generate(self, prompts, *, n, max_tokens, temperature, seeds):
        """As TorchEngine.generate; the same seeds give other answers than there."""
        check_request(prompts, max_tokens, temperature, seeds, self.max_model_len)
        if self.asleep:
            raise RuntimeError("sleep() dropped the weights: call wake() and push_weights() first")
        from vllm import SamplingParams
        from vllm.distributed.parallel_state import get_tp_group
        # The ranks of a tensor-parallel group must step through the same requests: all run the union of theirs.
        tp = get_tp_group()
        requests = [None] * tp.world_size
        dist.all_gather_object(requests, list(zip(prompts, seeds)), group=tp.cpu_group)
        start = sum(map(len, requests[:tp.rank_in_group]))
        union = [request for rank_requests in requests for request in rank_requests]
        # A SamplingParams per prompt: shared, it would give all prompts the same noise. Answer j gets seed + j.
        # logprobs=0 is the sampled token alone. ignore_eos: stop at stop_ids and not at what the folder's config adds.
        params = [SamplingParams(n=n, seed=seed, temperature=temperature, top_p=1.0, top_k=0, max_tokens=max_tokens,
                                 stop_token_ids=self.stop_ids, ignore_eos=True, logprobs=0, detokenize=False)
                  for _, seed in union]
        with own_rng():
            results = self.llm.generate([{"prompt_token_ids": prompt} for prompt, _ in union], params, use_tqdm=False)
        answers = [answer for result in results[start:start + len(prompts)] for answer in result.outputs]
        log_probs = [[step[token].logprob for token, step in zip(a.token_ids, a.logprobs)] for a in answers]
        return [list(a.token_ids) for a in answers], log_probs, [a.finish_reason == "length" for a in answers]

    def sleep(self):
        """Drop weights and KV cache from the GPU: the update makes both stale anyway."""
        if self.on_gpu and not self.asleep:
            self.llm.sleep(level=2)
            self.asleep = True

    def wake(self):
        """Make room for the weights; push_weights fills it and brings the KV cache back."""
        if self.asleep:
            self.llm.wake_up(tags=["weights"])

    def close(self):
        """On all ranks together, last of all: vLLM destroys the default process group with its own."""
        dist.barrier()
        self.llm.llm_engine.engine_core.shutdown()


# ---------------------------------------------------------------------------------------------- which engine

def resolve_engine(name, tensor_parallel_size=1):
    """"auto", "vllm" or "torch" -> "vllm" or "torch". Imports nothing; ValueError for what this machine cannot run."""
    installed = importlib.util.find_spec("vllm") is not None
    if name == "auto":
        name = "vllm" if installed and torch.cuda.is_available() else "torch"
    if name not in ("vllm", "torch"):
        raise ValueError(f"unknown engine {name!r}; there are auto, vllm, torch")
    if name == "vllm" and not installed:
        raise ValueError("engine vllm: the package is not installed; run `pip install -r requirements.txt` "
                         "or use --engine torch")
    if name == "torch" and tensor_parallel_size > 1:
        raise ValueError("--rollout_tp above 1 needs --engine vllm: the torch engine keeps a whole model on each rank")
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size % tensor_parallel_size:
        raise ValueError(f"--rollout_tp {tensor_parallel_size} does not divide the {world_size} ranks")
    return name


def make_engine(name, model_dir, *, tensor_parallel_size=1, gpu_memory_utilization=0.3, **options):
    """options: dtype, device, stop_ids, max_model_len and, if wanted, max_rows; the same for both engines."""
    if resolve_engine(name, tensor_parallel_size) == "torch":
        return TorchEngine(model_dir, **options)
    return VllmEngine(model_dir, tensor_parallel_size=tensor_parallel_size,
                      gpu_memory_utilization=gpu_memory_utilization, **options)


# --------------------------------------------------------------------------------------------- from problems to a batch

def total(values):
    """Sum of a tensor over ranks, float64."""
    values = values.detach().double()
    dist.all_reduce(values)
    return values


def data_index(position, count, seed):
    """Which of `count` problems stands at a position of the endless stream of shuffled epochs."""
    epoch, offset = divmod(position, count)
    return int(shuffled(count, seed, epoch)[offset])


@functools.lru_cache(maxsize=2)
def shuffled(count, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(count)


def answer(engine, tokenizer, problems, prompts, seeds, *, n, max_tokens, temperature, adv_norm="std"):
    """n answers to each problem, sampled, verified and centred within their group: per problem a list of n dicts.

    prompts: the problems' token ids; seeds: one each, at least n apart."""
    ids, log_probs, truncated = engine.generate(
        prompts, n=n, max_tokens=max_tokens, temperature=temperature, seeds=seeds)
    if not problems:
        return []  # not before generate: under tensor parallelism all ranks of a group must call it
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    rewards = torch.tensor(verify.score([problem for problem in problems for _ in range(n)], texts))
    columns = [ids, log_probs, truncated, rewards.tolist(), group_advantages(rewards, n, adv_norm).tolist(),
               rewards.view(-1, n).mean(1).repeat_interleave(n).tolist()]
    names = ("response", "log_probs", "truncated", "reward", "advantage", "group_accuracy")
    answers = [dict(zip(names, row), problem=problems[i // n], prompt=prompts[i // n], seed=seeds[i // n])
               for i, row in enumerate(zip(*columns))]
    return [answers[i:i + n] for i in range(0, len(answers), n)]


def rollout_batch(engine, tokenizer, problems, prompts, drawn, cfg):
    """This rank's share of the P groups of G answers of one step, as one list, and how many problems were drawn by now.

    The stream of problems is dealt to the ranks in turn, so P problems and their seeds are the same for any number of
    ranks. --dynamic_sampling: groups without variance teach nothing and make room for others; what is still missing
    after --max_resample further rounds is filled up with them."""
    rank, world = dist.get_rank(), dist.get_world_size()
    share, varied, flat = cfg.prompts_per_step // world, [], []
    for _ in range(1 + (cfg.max_resample if cfg.dynamic_sampling else 0)):
        positions = range(drawn + rank, drawn + cfg.prompts_per_step, world)
        drawn += cfg.prompts_per_step
        chosen = [data_index(position, len(problems), cfg.seed) for position in positions]
        for group in answer(engine, tokenizer, [problems[i] for i in chosen], [prompts[i] for i in chosen],
                            [(cfg.seed * 2**32 + position) * cfg.group_size for position in positions],
                            n=cfg.group_size, max_tokens=cfg.max_response_len, temperature=cfg.temperature,
                            adv_norm=cfg.adv_norm):
            teaches = len({a["reward"] for a in group}) > 1
            (varied if teaches or not cfg.dynamic_sampling else flat).append(group)
        if total(torch.tensor(max(0, share - len(varied)))) == 0:
            break
    groups = sorted((varied + flat)[:share], key=lambda group: group[0]["seed"])  # flat ones not all in the last update
    return [a for group in groups for a in group], drawn


def mix_second_sample(engine, tokenizer, answers, state, cfg):
    """Sample the first quarter of the prompts once more, at state["second_temperature"] times the temperature. Those of
    advantage > 0.05, at most most_rows over all ranks, and of these taken_share, get A = 1 and take the place of the
    first answers. In place; the method is aepo."""
    first = answers[:len(answers) // 4:cfg.group_size]
    groups = answer(engine, tokenizer, [a["problem"] for a in first], [a["prompt"] for a in first],
                    [a["seed"] + 2**61 for a in first], n=cfg.group_size, max_tokens=cfg.max_response_len,
                    adv_norm=cfg.adv_norm, temperature=cfg.temperature * state["second_temperature"])
    good = [a for group in groups for a in group if a["advantage"] > 0.05]
    good = good[:int(state["most_rows"]) // dist.get_world_size()]
    for row, a in enumerate(good[:int(len(good) * state["taken_share"])]):
        a["log_probs"] = [math.nan] * len(a["response"])  # at the other temperature they are, and no engine gap
        answers[row] = a | {"advantage": 1.0}


def evaluate(engine, tokenizer, sets, cfg):
    """n = --eval_samples answers to each problem of the sets {name: (problems, prompts)}; yields (name, {metric:
    number}) set by set, the same on all ranks. The same seeds every time, so that two evaluations differ by their
    weights only.

        pass@k        k = 1, 2, 4 ... <= n, unbiased; pass@1 is avg@n
        entropy       mean over answers y of -log pi(y) / |y|, nats per token, pi at --eval_temperature: a Monte-Carlo
                      estimate, unbiased for the expectation of just that. entropy/response_mean, of the exact token
                      entropies, has another one where an answer's length depends on the tokens drawn
        conf_right .. those of verify.calibration, the confidence of an answer being pi(y)^(1/|y|)
    """
    rank, world, n = dist.get_rank(), dist.get_world_size(), cfg.eval_samples
    ks = [2**i for i in range(n.bit_length())]
    for name, (problems, prompts) in sets.items():
        mine = range(rank, len(problems), world)
        groups = answer(engine, tokenizer, [problems[i] for i in mine], [prompts[i] for i in mine],
                        [2**60 + i * n for i in mine], n=n, max_tokens=cfg.max_response_len,
                        temperature=cfg.eval_temperature)
        timeouts = int(total(torch.tensor(verify.outcomes["timeout"])))
        verify.outcomes.clear()  # the others are counted for training answers
        shares = [None] * world
        dist.all_gather_object(shares, [(int(a["reward"]), len(a["response"]), a["truncated"], fmean(a["log_probs"]))
                                        for group in groups for a in group])
        right, lengths, truncated, log_probs = zip(*(row for share in shares for row in share))
        solved = [sum(right[i:i + n]) for i in range(0, len(right), n)]
        yield name, {
            "problems": len(problems), **{f"pass@{k}": fmean(verify.pass_at_k(n, c, k) for c in solved) for k in ks},
            "len_mean": fmean(lengths), "truncated_frac": fmean(truncated), "entropy": -fmean(log_probs),
            **verify.calibration([min(1.0, math.exp(x)) for x in log_probs], right), "timeout": timeouts}


def collate(answers, device):
    """Answers as tensors: ids (B, L), prompt and response, padded on the right; prompt_lens, lengths (B,), tokens;
    response_mask and, 0 on padding, rollout_log_probs, advantages, rewards, group_accuracy (B, T)."""
    prompt_lens = torch.tensor([len(a["prompt"]) for a in answers])
    response_lens = torch.tensor([len(a["response"]) for a in answers])
    lengths = prompt_lens + response_lens
    mask = torch.arange(int(response_lens.max())) < response_lens[:, None]  # never ids != pad: pad may be EOS
    ids, log_probs = torch.zeros(len(answers), int(lengths.max()), dtype=torch.long), torch.zeros(mask.shape)
    for i, a in enumerate(answers):
        ids[i, :lengths[i]] = torch.tensor(a["prompt"] + a["response"])
        log_probs[i, :response_lens[i]] = torch.tensor(a["log_probs"])
    batch = dict(ids=ids, prompt_lens=prompt_lens, lengths=lengths, response_mask=mask, rollout_log_probs=log_probs)
    for name, key in (("advantages", "advantage"), ("rewards", "reward"), ("group_accuracy", "group_accuracy")):
        batch[name] = torch.tensor([a[key] for a in answers])[:, None] * mask
    return {name: tensor.to(device) for name, tensor in batch.items()}


def micro_batches(lengths, rows, budget):
    """Rows (indices into lengths, tokens each) as lists of like lengths of at most `budget` padded tokens, or one row.

    As many lists on every rank: FSDP gathers the weights from all ranks in every forward, and a rank without one would
    leave the others waiting."""
    batches = [[]]
    for row in sorted(rows, key=lambda i: lengths[i]):
        if batches[-1] and (len(batches[-1]) + 1) * lengths[row] > budget:
            batches.append([])
        batches[-1].append(row)
    most = torch.tensor(len(batches))
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    while len(batches) < most:  # every rank has as many rows, so there is a list to split
        batches.sort(key=len)
        rows = batches.pop()
        batches += [rows[:len(rows) // 2], rows[len(rows) // 2:]]
    return batches


def gap_metrics(batch, old_log_probs):
    """How far the engine's log-probs are from the trainer's, nats per token: {metric: float} over all ranks."""
    gap = (old_log_probs - batch["rollout_log_probs"])[batch["response_mask"]].abs()
    gap = gap[~batch["rollout_log_probs"][batch["response_mask"]].isnan()]  # nan: a second sample's, at its temperature
    largest = gap.max().double()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    tokens, summed = total(torch.stack([torch.ones_like(gap).sum(), gap.sum()])).tolist()
    return {"rollout/gap_mean": summed / tokens, "rollout/gap_max": largest.item()}


def ngram_diversity(responses, longest=4):
    """Distinct n-grams / all n-grams of some answers (lists of token ids), mean over n = 1 ... longest; an n for which
    all answers are too short is left out."""
    ngrams = [[ngram for ids in responses for ngram in zip(*(ids[i:] for i in range(n)))] for n in range(1, longest + 1)]
    return fmean(len(set(found)) / len(found) for found in ngrams if found)


def reward_metrics(answers, group_size):
    """What the answers of a step look like, {metric: float} over all ranks."""
    slices = [answers[i:i + group_size] for i in range(0, len(answers), group_size)]
    groups = [[a["reward"] for a in group] for group in slices]
    diversity = [ngram_diversity([a["response"] for a in group]) for group in slices]
    count, reward, flat, tokens, cut, diverse, prompts = total(torch.tensor([
        len(answers), sum(map(sum, groups)), group_size * sum(len(set(g)) == 1 for g in groups),
        sum(len(a["response"]) for a in answers), sum(a["truncated"] for a in answers), sum(diversity), len(groups)],
        dtype=torch.float64)).tolist()
    return {"reward/mean": reward / count, "reward/zero_std_frac": flat / count, "response/len_mean": tokens / count,
            "response/truncated_frac": cut / count, "response/ngram_diversity": diverse / prompts}
