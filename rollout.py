"""Sample answers from the current policy: token ids in, token ids and their log-probs out.

Two engines with one interface, from make_engine("vllm" | "torch" | "auto", ...):

    push_weights(named_tensors)   copy the trainer's weights into the engine's own model
    generate(prompts, ...)        (ids, rollout_log_probs, truncated), three lists in the order of
                                  the prompts
    sleep(), wake()               give GPU memory back during the update; take it again just before
                                  the next push
    close()                       at the end of the program

Both sample from softmax(logits / T) over the whole vocabulary: top_p = 1 and top_k off, always. The
trainer computes log_softmax(logits / T) over the whole vocabulary, and pi_new / pi_old is an
importance weight only if that is the distribution which drew the answer. With top_p = 0.9 a token
was drawn with up to 1/0.9 of the probability that the trainer believes, and what was cut off can
never be learned: entropy falls for a reason that no loss shows.

Each engine owns its model and never runs the trainer's: an FSDP forward is a collective, and ranks
whose answers end at different lengths would run different numbers of them and wait for one another
forever.

Shapes: P prompts, n answers to each, B rows decoded together, S tokens in the cache, V tokens in
the vocabulary.
"""

import functools
import importlib.util
import inspect
import math
import os
import random
import time
from collections import Counter
from contextlib import contextmanager
from operator import itemgetter
from statistics import fmean

# OpenMP reads this once, when torch is imported. Threads that spin while they wait make shared
# cores 10 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# So does the CUDA allocator. AdamW's averages would pin segments that activations left, and vLLM
# could not have them back; segments that grow and shrink leave no such holes. vLLM's sleep mode
# switches them off in its own pool.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.initialization import no_init_weights

import verify
from entropy import sums_by_name, use_float32_logits
from losses import group_advantages
from memory import MOST_ROWS, ROWS_ON_CPU, bytes_per_row, rows_that_fit, shape_of
from policy import max_over_ranks, sum_over_ranks


def check_request(prompts, max_tokens, temperature, seeds, max_model_len):
    """ValueError for what no engine can generate."""
    longest = max(map(len, prompts), default=0)
    if longest + max_tokens > max_model_len:
        raise ValueError(
            f"the longest prompt has {longest} tokens and {max_tokens} may follow: more than the "
            f"{max_model_len} of max_model_len; drop long prompts or lower max_tokens"
        )
    if not all(prompts):
        raise ValueError("a prompt has no tokens")
    if len(seeds) != len(prompts):
        raise ValueError(f"one seed per prompt: {len(prompts)} prompts, {len(seeds)} seeds")
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")


# ---- engine 1: plain PyTorch ---------------------------------------------------------------------


def sample(logits, uniform, temperature):
    """Draw one token per row by inverting the distribution function: the first token with
    cdf > uniform * mass.

    logits (B, V); uniform (B,) float64 in [0, 1). Returns tokens (B,) int64 and their log-probs
    (B,) float32."""
    log_probs = torch.log_softmax(logits.float() / temperature, dim=-1)
    # float64: a float32 cdf moves in steps of 6e-8, and of 152k tokens a quarter would share a step
    # with a neighbour and never be drawn.
    cdf = log_probs.exp().cumsum(dim=-1, dtype=torch.float64)
    mass = cdf[:, -1:]
    if not mass.isfinite().all():
        raise FloatingPointError(
            "the sampling model's logits are not finite: were NaN weights pushed?"
        )
    # uniform * mass < mass, so a token is always found; > never finds one of probability zero.
    tokens = torch.searchsorted(cdf, uniform[:, None] * mass, right=True)
    return tokens[:, 0], log_probs.gather(-1, tokens)[:, 0]


def cache_argument(model):
    """Under which name a model takes a DynamicCache of keys and values or of recurrent states.
    ValueError if it takes none."""
    arguments = inspect.signature(model.forward).parameters
    if model._supports_default_dynamic_cache():
        for name in ("past_key_values", "cache_params"):  # the latter: Mamba
            if name in arguments:
                return name
    raise ValueError(
        f"{model.config.model_type} keeps no cache that --engine torch could share among the "
        "answers to a prompt: choose --engine vllm or another model"
    )


class TorchEngine:
    """Any Hugging Face causal LM that takes a DynamicCache, whole on each rank, on CPU or GPU."""

    def __init__(
        self,
        model_dir,
        *,
        dtype,
        device,
        stop_ids,
        max_model_len,
        max_rows=None,
        trust_remote_code=False,
    ):
        """model_dir: folder or hub id; only its config is read. max_rows: answers decoded together
        (at least those of one prompt); None: as many as fit into a GPU's free memory. On a CPU 256,
        which was as fast as 512 and 1.2 times faster than 128."""
        trust = {"trust_remote_code": trust_remote_code}
        # It allocates, and draws nothing from the global generator.
        with no_init_weights(), torch.device(device):
            config = AutoConfig.from_pretrained(model_dir, **trust)
            self.model = AutoModelForCausalLM.from_config(config, dtype=dtype, **trust)
        self.model.eval()
        use_float32_logits(self.model)
        self.model.tie_weights()  # no_init_weights skips it, and a large head would be held twice
        self.cache_argument = cache_argument(self.model)
        self.device = device
        self.max_model_len = max_model_len
        self.max_rows = max_rows
        self.stop_ids = torch.tensor(sorted(stop_ids), device=device)

    def rows_at_once(self, length):
        """Answers decoded together, of `length` tokens with their prompts."""
        if self.max_rows:
            return self.max_rows
        if torch.device(self.device).type != "cuda":
            return ROWS_ON_CPU
        free, _ = torch.cuda.mem_get_info(self.device)
        # What torch has cached is free, too.
        free += torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        shape = shape_of(self.model.config)
        return rows_that_fit(free, bytes_per_row(shape, self.model.dtype, length))

    @torch.no_grad()
    def push_weights(self, named_tensors):
        own = self.model.state_dict()
        missing = set(own)
        for name, tensor in named_tensors:
            # copy_ would broadcast a wrong shape
            if name not in own or own[name].shape != tensor.shape:
                raise ValueError(f"the engine's model has no {name} of shape {tuple(tensor.shape)}")
            own[name].copy_(tensor)
            missing.discard(name)
        if missing:
            raise ValueError(f"weights that were not pushed: {sorted(missing)}")

    def generate(self, prompts, *, n, max_tokens, temperature, seeds):
        """n answers to each of P prompts.

        prompts: P lists of token ids; seeds: P ints >= 0. Answer j of prompt i is drawn with
        seeds[i] + j, so keep the seeds n apart. Returns three lists of length P * n, all answers to
        prompt 0 first: token ids (EOS included), the log-prob with which each was drawn, and
        whether the answer is truncated (no EOS in max_tokens).

        An answer depends on weights, prompt and seed, and on the rows beside it only through the
        rounding of batched matrix products. The global random generators are not touched."""
        check_request(prompts, max_tokens, temperature, seeds, self.max_model_len)
        answers_to = [None] * len(prompts)
        # Prompts of like length together: less padding in a batch.
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        length = max(map(len, prompts), default=0) + max_tokens
        size = max(1, self.rows_at_once(length) // n)
        for start in range(0, len(prompts), size):
            chunk = by_length[start : start + size]
            # default_rng hashes its seed: the streams of neighbouring seeds are unrelated
            streams = [np.random.default_rng(seeds[i] + j) for i in chunk for j in range(n)]
            uniform = np.stack([stream.random(max_tokens) for stream in streams])
            chunk_prompts = [prompts[i] for i in chunk]
            rows = self._decode(chunk_prompts, n, torch.from_numpy(uniform), temperature)
            for k, i in enumerate(chunk):
                answers_to[i] = rows[k * n : (k + 1) * n]
        answers = [answer for group in answers_to for answer in group]
        ids = [answer[0] for answer in answers]
        log_probs = [answer[1] for answer in answers]
        truncated = [answer[2] for answer in answers]
        return ids, log_probs, truncated

    @torch.inference_mode()
    def _decode(self, prompts, n, uniform, temperature):
        """The n answers to each of a batch of prompts; uniform (P * n, max_tokens).

        Returns (ids, log_probs, truncated) per row."""
        width = max(map(len, prompts))
        padded = [[0] * (width - len(prompt)) + prompt for prompt in prompts]
        real = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        ids = torch.tensor(padded, device=self.device)  # (P, S), padded on the left
        mask = torch.tensor(real, device=self.device)  # (P, S)
        # Without position_ids a model counts the padding too: wrong by nats where positions are
        # learned (GPT-2).
        positions = (mask.cumsum(-1) - 1).clamp(min=0)  # (P, S)
        cache = DynamicCache(config=self.model.config)

        def next_logits(ids, positions):
            # Recurrent states hold no old tokens that a mask could be for.
            new = ids.shape[1] if self.cache_argument == "cache_params" else mask.shape[1]
            output = self.model(
                input_ids=ids,
                attention_mask=mask[:, -new:],
                position_ids=positions,
                use_cache=True,
                logits_to_keep=1,
                **{self.cache_argument: cache},
            )
            return output.logits[:, -1]  # (B, V)

        # A prompt is run once; its keys, values and last logits then serve its n answers.
        answers = torch.arange(len(prompts), device=self.device).repeat_interleave(n)
        logits = next_logits(ids, positions)[answers]
        cache.reorder_cache(answers)
        mask = mask[answers]

        uniform = uniform.to(self.device)
        count, max_tokens = uniform.shape
        tokens = torch.zeros(count, max_tokens, dtype=torch.long, device=self.device)
        log_probs = torch.zeros(count, max_tokens, device=self.device)
        length = torch.zeros(count, dtype=torch.long, device=self.device)
        row = torch.arange(count, device=self.device)  # (B,): which answer a row of the batch is
        for t in range(max_tokens):
            token, token_log_prob = sample(logits, uniform[row, t], temperature)
            tokens[row, t] = token
            log_probs[row, t] = token_log_prob
            length[row] = t + 1
            going = ~torch.isin(token, self.stop_ids)
            if t + 1 == max_tokens or not going.any():
                break
            if not going.all():  # finished rows leave the batch
                keep = going.nonzero()[:, 0]
                cache.reorder_cache(keep)
                token = token[keep]
                row = row[keep]
                mask = mask[keep]
            mask = torch.cat([mask, mask.new_ones(len(row), 1)], dim=-1)
            logits = next_logits(token[:, None], mask.sum(-1, keepdim=True) - 1)
        last = tokens.gather(1, length[:, None] - 1)[:, 0]
        ended = torch.isin(last, self.stop_ids)
        columns = zip(tokens.tolist(), log_probs.tolist(), length.tolist(), ended.tolist())
        return [(ids[:k], values[:k], not end) for ids, values, k, end in columns]

    def sleep(self):
        """Nothing to free: the KV cache lives inside generate only."""

    def wake(self):
        """Nothing to restore."""

    def close(self):
        """Nothing to shut down."""


# ---- engine 2: vLLM ------------------------------------------------------------------------------


def prepare_environment():
    """Variables that vLLM and torch.distributed read. Those of torchrun make `python train.py` a
    world of one."""
    defaults = {
        "RANK": 0,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": 1,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 0,  # a free one
        # vLLM in this process, where it can take the trainer's tensors
        "VLLM_ENABLE_V1_MULTIPROCESSING": 0,
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": 1,  # or it sends some to its makers
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, str(value))


@contextmanager
def own_rng():
    """vLLM reseeds the global generators when it is built and draws from torch's on CPU. Leave them
    as they were, or the trainer's shuffles would depend on the engine."""
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield
    random.setstate(python_state)
    np.random.set_state(numpy_state)


class VllmEngine:
    """vLLM inside this process: an engine per rank, or one over each tensor_parallel_size
    neighbouring ranks. Build it on all ranks together, after init_process_group and
    torch.set_num_threads (vLLM makes the latter a no-op on CPU)."""

    def __init__(
        self,
        model_dir,
        *,
        dtype,
        device,
        stop_ids,
        max_model_len,
        max_rows=MOST_ROWS,
        trust_remote_code=False,
        tensor_parallel_size=1,
        gpu_memory_utilization=0.3,
    ):
        """gpu_memory_utilization: share of the GPU for weights and KV cache; it must be free when
        the engine is built. max_rows: answers decoded together at most. On CPU head_dim must be a
        multiple of 32."""
        from vllm import LLM  # takes seconds, so only where it is used

        self.on_gpu = torch.device(device).type == "cuda"
        self.asleep = False
        self.stop_ids = sorted(stop_ids)
        self.max_model_len = max_model_len
        if self.on_gpu:
            options = {
                "gpu_memory_utilization": gpu_memory_utilization,
                "enable_sleep_mode": True,
            }
        else:
            # else the first generate compiles a small helper with g++: 4-12 s
            torch._dynamo.config.disable = True
            options = {
                "kv_cache_memory_bytes": 2**30,
                "enforce_eager": True,
                # a seeded prompt cut in two raises "CPU Generator does not use offset"
                "enable_chunked_prefill": False,
            }
        with own_rng():
            self.llm = LLM(
                model_dir,
                dtype=dtype,
                max_model_len=max_model_len,
                max_num_seqs=max_rows,
                seed=0,
                load_format="dummy",  # reads the config only; the weights are pushed
                skip_tokenizer_init=True,
                distributed_executor_backend="external_launcher",
                tensor_parallel_size=tensor_parallel_size,
                logprobs_mode="processed_logprobs",  # log_softmax(logits / T), of what was sampled
                hf_overrides={"head_dtype": "float32"},  # see entropy.float32_logits
                trust_remote_code=trust_remote_code,
                disable_log_stats=True,
                **options,
            )

    def push_weights(self, named_tensors):
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": named_tensors})
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])  # not before: the gathered tensors need the room
            self.asleep = False
        # or prompts would be continued from the old weights' keys and values
        self.llm.reset_prefix_cache()

    def generate(self, prompts, *, n, max_tokens, temperature, seeds):
        """As TorchEngine.generate; the same seeds give other answers than there."""
        check_request(prompts, max_tokens, temperature, seeds, self.max_model_len)
        if self.asleep:
            raise RuntimeError("sleep() dropped the weights: call wake() and push_weights() first")
        from vllm import SamplingParams
        from vllm.distributed.parallel_state import get_tp_group

        # The ranks of a tensor-parallel group must step through the same requests: all run the
        # union of theirs.
        tp = get_tp_group()
        requests = [None] * tp.world_size
        dist.all_gather_object(requests, list(zip(prompts, seeds)), group=tp.cpu_group)
        start = sum(map(len, requests[: tp.rank_in_group]))
        union = [request for rank_requests in requests for request in rank_requests]

        def sampling_params(seed):
            return SamplingParams(
                n=n,
                seed=seed,  # answer j gets seed + j
                temperature=temperature,
                top_p=1.0,
                top_k=0,
                max_tokens=max_tokens,
                stop_token_ids=self.stop_ids,
                ignore_eos=True,  # stop at stop_ids and not at what the folder's config adds
                logprobs=0,  # of the sampled token alone
                detokenize=False,
            )

        # One SamplingParams per prompt: shared, it would give all prompts the same noise.
        params = [sampling_params(seed) for _, seed in union]
        vllm_prompts = [{"prompt_token_ids": prompt} for prompt, _ in union]
        with own_rng():
            results = self.llm.generate(vllm_prompts, params, use_tqdm=False)
        mine = results[start : start + len(prompts)]
        answers = [answer for result in mine for answer in result.outputs]

        ids = [list(answer.token_ids) for answer in answers]
        truncated = [answer.finish_reason == "length" for answer in answers]
        log_probs = []
        for answer in answers:
            steps = zip(answer.token_ids, answer.logprobs)
            log_probs.append([found[token].logprob for token, found in steps])
        return ids, log_probs, truncated

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
        """On all ranks together, last of all: vLLM destroys the default process group with its
        own."""
        dist.barrier()
        self.llm.llm_engine.engine_core.shutdown()


# ---- which engine --------------------------------------------------------------------------------


def resolve_engine(name, tensor_parallel_size=1):
    """The engine that "auto", "vllm" or "torch" stands for here. Imports nothing; ValueError for
    what this machine cannot run."""
    installed = importlib.util.find_spec("vllm") is not None
    if name == "auto":
        name = "vllm" if installed and torch.cuda.is_available() else "torch"
    if name not in ("vllm", "torch"):
        raise ValueError(f"unknown engine {name!r}; there are auto, vllm, torch")
    if name == "vllm" and not installed:
        raise ValueError(
            "engine vllm: the package is not installed; run `pip install -r requirements.txt` "
            "or use --engine torch"
        )
    if name == "torch" and tensor_parallel_size > 1:
        raise ValueError(
            "--rollout_tp above 1 needs --engine vllm: the torch engine keeps a whole model on "
            "each rank"
        )
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size % tensor_parallel_size:
        raise ValueError(
            f"--rollout_tp {tensor_parallel_size} does not divide the {world_size} ranks"
        )
    return name


def make_engine(name, model_dir, *, tensor_parallel_size=1, gpu_memory_utilization=0.3, **options):
    """options: dtype, device, stop_ids, max_model_len and, if wanted, max_rows and
    trust_remote_code; the same for both engines."""
    if resolve_engine(name, tensor_parallel_size) == "torch":
        return TorchEngine(model_dir, **options)
    return VllmEngine(
        model_dir,
        tensor_parallel_size=tensor_parallel_size,
        gpu_memory_utilization=gpu_memory_utilization,
        **options,
    )


# ---- sample and verify ---------------------------------------------------------------------------
# An answer is a dict: problem, prompt (token ids), response (token ids), log_probs (of the
# response, by the engine, nats), truncated, reward, verdict, group_accuracy (share of right answers
# in its group) and seed (of its group).


def sample_and_verify(
    engine, tokenizer, problems, prompts, seeds, *, n, max_tokens, temperature, seconds=None
):
    """n answers to each problem, sampled and judged: per problem a list of n answers, its group.

    prompts: the problems' token ids; seeds: one each, at least n apart. seconds: a Counter to which
    "time/sample_s" and "time/verify_s" are added."""
    seconds = Counter() if seconds is None else seconds
    start = time.perf_counter()
    ids, log_probs, truncated = engine.generate(
        prompts, n=n, max_tokens=max_tokens, temperature=temperature, seeds=seeds
    )
    seconds["time/sample_s"] += time.perf_counter() - start
    if not problems:
        return []  # not before generate: under tensor parallelism all ranks of a group must call it
    start = time.perf_counter()
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    repeated_problems = [problem for problem in problems for _ in range(n)]
    scores = verify.score(repeated_problems, texts)
    seconds["time/verify_s"] += time.perf_counter() - start
    groups = []
    for i, problem in enumerate(problems):
        rows = range(i * n, (i + 1) * n)
        right = sum(scores[row].reward > 0 for row in rows)
        group = []
        for row in rows:
            answer = {
                "problem": problem,
                "prompt": prompts[i],
                "response": ids[row],
                "log_probs": log_probs[row],
                "truncated": truncated[row],
                "reward": scores[row].reward,
                "verdict": scores[row].verdict,
                "group_accuracy": right / n,
                "seed": seeds[i],
            }
            group.append(answer)
        groups.append(group)
    return groups


def is_flat(group):
    """Whether all answers of a group have the same reward, so that their advantages are 0."""
    rewards = {answer["reward"] for answer in group}
    return len(rewards) == 1


def data_index(position, count, seed):
    """Which of `count` problems stands at a position of the endless stream of shuffled epochs."""
    epoch, offset = divmod(position, count)
    return int(shuffled(count, seed, epoch)[offset])


@functools.lru_cache(maxsize=2)
def shuffled(count, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(count)


def sample_batch(engine, tokenizer, problems, prompts, drawn, cfg, seconds=None):
    """This rank's share of the P groups of G answers of one step.

    Returns the answers in one list, the verdicts of all that were judged (a Counter), and how many
    problems have been drawn by now, over all ranks. seconds: see sample_and_verify.

    The stream of problems is dealt to the ranks in turn, so P problems and their seeds are the same
    for any number of ranks. --dynamic_sampling: groups without variance teach nothing and make room
    for others; what is still missing after --max_resample further rounds is filled up with them."""
    rank = dist.get_rank()
    world = dist.get_world_size()
    share = cfg.prompts_per_step // world
    verdicts = Counter()
    teaching = []
    flat = []
    rounds = 1 + cfg.max_resample if cfg.dynamic_sampling else 1
    for _ in range(rounds):
        positions = range(drawn + rank, drawn + cfg.prompts_per_step, world)
        drawn += cfg.prompts_per_step
        chosen = [data_index(position, len(problems), cfg.seed) for position in positions]
        groups = sample_and_verify(
            engine,
            tokenizer,
            problems=[problems[i] for i in chosen],
            prompts=[prompts[i] for i in chosen],
            seeds=[(cfg.seed * 2**32 + position) * cfg.group_size for position in positions],
            n=cfg.group_size,
            max_tokens=cfg.max_response_len,
            temperature=cfg.temperature,
            seconds=seconds,
        )
        for group in groups:
            verdicts.update(answer["verdict"] for answer in group)
            if cfg.dynamic_sampling and is_flat(group):
                flat.append(group)
            else:
                teaching.append(group)
        missing = max(0, share - len(teaching))
        if sum_over_ranks(torch.tensor(missing)) == 0:
            break
    groups = (teaching + flat)[:share]
    groups.sort(key=lambda group: group[0]["seed"])  # or the last update would get all flat groups
    answers = [answer for group in groups for answer in group]
    return answers, verdicts, drawn


def mix_second_sample(engine, tokenizer, answers, advantages, state, cfg):
    """aepo's edit of the batch: the first quarter of the prompts is sampled once more, at
    state["second_temperature"] times the temperature. Of its answers those of advantage > 0.05, at
    most most_rows over all ranks, and of these taken_share, get A = 1 and take the place of the
    first answers.

    advantages (B,). Returns the answers and advantages after it, and the verdicts of the second
    sample (a Counter). Does nothing while the controller's state has no second temperature: in the
    first step."""
    verdicts = Counter()
    if "second_temperature" not in state:
        return answers, advantages, verdicts
    first = answers[: len(answers) // 4 : cfg.group_size]
    groups = sample_and_verify(
        engine,
        tokenizer,
        problems=[answer["problem"] for answer in first],
        prompts=[answer["prompt"] for answer in first],
        seeds=[answer["seed"] + 2**61 for answer in first],
        n=cfg.group_size,
        max_tokens=cfg.max_response_len,
        temperature=cfg.temperature * state["second_temperature"],
    )
    good = []
    for group in groups:
        verdicts.update(answer["verdict"] for answer in group)
        rewards = torch.tensor([answer["reward"] for answer in group])
        second_advantages = group_advantages(rewards, cfg.group_size, cfg.adv_norm).tolist()
        good += [answer for answer, A in zip(group, second_advantages) if A > 0.05]
    good = good[: int(state["most_rows"]) // dist.get_world_size()]
    taken = good[: int(len(good) * state["taken_share"])]

    answers = list(answers)
    advantages = advantages.clone()
    for row, answer in enumerate(taken):
        # Its log-probs are at the other temperature, and say nothing of the engine.
        unknown = [math.nan] * len(answer["response"])
        answers[row] = answer | {"log_probs": unknown}
        advantages[row] = 1.0
    return answers, advantages, verdicts


# Methods that edit the batch itself: (engine, tokenizer, answers, advantages, the controller's
# state, cfg) -> (answers, advantages, further verdicts). train.py calls it in stage 2.
BATCH_EDITS = {"aepo": mix_second_sample}


def deal_over_ranks(answers, advantages, to_run, updates):
    """This rank's answers and advantages (B,) for even work on all ranks: each update's, of all
    ranks, are sorted by length and dealt in a snake, 0 1 2 2 1 0 0 1 ... The ranks wait for one
    another, so what the slowest has to run is what counts.

    to_run (B,) bool: those that the updates run; the others are dealt after them. An update's
    answers stay those that they were: the u-th part of each rank's. Returns the answers, with what
    collate reads, their advantages and their place (B,): of each in the list of all answers, rank
    after rank, where groups stand side by side. A collective; nothing moves if there is one rank.
    """
    rank = dist.get_rank()
    world = dist.get_world_size()
    B = len(answers)
    if world == 1:
        return answers, advantages, torch.arange(B)
    mine = []
    for i, answer in enumerate(answers):
        compact = {
            "prompt": np.array(answer["prompt"], np.int32),
            "response": np.array(answer["response"], np.int32),
            "log_probs": np.array(answer["log_probs"], np.float32),
            "reward": answer["reward"],
            "group_accuracy": answer["group_accuracy"],
        }
        cost = len(answer["prompt"]) + len(answer["response"])
        mine.append((bool(to_run[i]), cost, rank * B + i, advantages[i].item(), compact))
    of_ranks = [None] * world
    dist.all_gather_object(of_ranks, mine)

    dealt = []
    for start in range(0, B, B // updates):
        of_update = [row for rows in of_ranks for row in rows[start : start + B // updates]]
        of_update.sort(key=itemgetter(0, 1), reverse=True)
        turns = (rank, 2 * world - 1 - rank)
        dealt += [row for i, row in enumerate(of_update) if i % (2 * world) in turns]
    _, _, place, advantages, answers = zip(*dealt)
    return answers, torch.tensor(advantages), torch.tensor(place)


def collate(answers, advantages, device):
    """B answers and their advantages (B,) as one batch of tensors, padded on the right.

    ids (B, L): prompt and response; prompt_lens, lengths (B,): tokens of the prompt, of both;
    response_mask (B, T) bool; and, (B, T) and 0 on padding: rollout_log_probs, advantages, rewards,
    group_accuracy."""
    prompt_lens = torch.tensor([len(answer["prompt"]) for answer in answers])
    response_lens = torch.tensor([len(answer["response"]) for answer in answers])
    lengths = prompt_lens + response_lens
    columns = torch.arange(int(response_lens.max()))
    mask = columns < response_lens[:, None]  # (B, T); never ids != pad, as pad may be EOS
    ids = torch.zeros(len(answers), int(lengths.max()), dtype=torch.long)
    log_probs = torch.zeros(mask.shape)
    for i, answer in enumerate(answers):
        ids[i, : lengths[i]] = torch.as_tensor(
            np.concatenate([answer["prompt"], answer["response"]])
        )
        log_probs[i, : response_lens[i]] = torch.as_tensor(answer["log_probs"])
    rewards = torch.tensor([answer["reward"] for answer in answers])
    accuracy = torch.tensor([answer["group_accuracy"] for answer in answers])
    batch = {
        "ids": ids,
        "prompt_lens": prompt_lens,
        "lengths": lengths,
        "response_mask": mask,
        "rollout_log_probs": log_probs,
        "advantages": advantages[:, None] * mask,
        "rewards": rewards[:, None] * mask,
        "group_accuracy": accuracy[:, None] * mask,
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


# ---- evaluation ----------------------------------------------------------------------------------


def evaluate(engine, tokenizer, sets, cfg):
    """n = --eval_samples answers to each problem of the sets {name: (problems, prompts)}; yields
    (name, {metric: number}) set by set, the same on all ranks. The same seeds every time, so that
    two evaluations differ by their weights only.

        pass@k         k = 1, 2, 4 ... <= n, unbiased; pass@1 is avg@n
        entropy        mean over answers y of -log pi(y) / |y|, nats per token, pi at
                       --eval_temperature: a Monte-Carlo estimate, unbiased for the expectation of
                       just that. entropy/response_mean, of the exact token entropies, has another
                       one where an answer's length depends on the tokens drawn
        conf_right ... those of verify.calibration, the confidence of an answer being pi(y)^(1/|y|)
        timeout        answers that ran out of the verifier's time
    """
    rank = dist.get_rank()
    world = dist.get_world_size()
    n = cfg.eval_samples
    for name, (problems, prompts) in sets.items():
        mine = range(rank, len(problems), world)
        groups = sample_and_verify(
            engine,
            tokenizer,
            problems=[problems[i] for i in mine],
            prompts=[prompts[i] for i in mine],
            seeds=[2**60 + i * n for i in mine],
            n=n,
            max_tokens=cfg.max_response_len,
            temperature=cfg.eval_temperature,
        )
        my_results = [evaluation_result(answer) for group in groups for answer in group]
        shares = [None] * world
        dist.all_gather_object(shares, my_results)
        results = [result for share in shares for result in share]
        yield name, evaluation_metrics(results, len(problems), n)


def evaluation_result(answer):
    """What evaluation_metrics needs of an answer."""
    return {
        "right": int(answer["reward"] > 0),
        "length": len(answer["response"]),
        "truncated": answer["truncated"],
        "log_prob": fmean(answer["log_probs"]),
        "timeout": answer["verdict"] == "timeout",
    }


def evaluation_metrics(results, problems, n):
    """results: evaluation_result of n answers to each of so many problems, group by group."""
    right = [result["right"] for result in results]
    log_probs = [result["log_prob"] for result in results]
    solved = [sum(right[i : i + n]) for i in range(0, len(right), n)]  # of each problem's n answers
    confidence = [min(1.0, math.exp(log_prob)) for log_prob in log_probs]
    metrics = {"problems": problems}
    for power in range(n.bit_length()):
        k = 2**power
        metrics[f"pass@{k}"] = fmean(verify.pass_at_k(n, count, k) for count in solved)
    metrics["len_mean"] = fmean(result["length"] for result in results)
    metrics["truncated_frac"] = fmean(result["truncated"] for result in results)
    metrics["entropy"] = -fmean(log_probs)
    metrics |= verify.calibration(confidence, right)
    metrics["timeout"] = sum(result["timeout"] for result in results)
    return metrics


# ---- metrics of a rollout batch ------------------------------------------------------------------


def ngram_diversity(responses, longest=4):
    """Distinct n-grams / all n-grams of some answers (lists of token ids), mean over n = 1 ...
    longest; an n for which all answers are too short is left out."""
    shares = []
    for n in range(1, longest + 1):
        ngrams = []
        for ids in responses:
            ngrams += zip(*(ids[start:] for start in range(n)))
        if ngrams:
            shares.append(len(set(ngrams)) / len(ngrams))
    return fmean(shares)


def answer_metrics(answers, group_size):
    """What the answers of a step look like, {metric: float} over all ranks."""
    groups = [answers[i : i + group_size] for i in range(0, len(answers), group_size)]
    flat = [group for group in groups if is_flat(group)]
    diversities = []
    for group in groups:
        diversities.append(ngram_diversity([answer["response"] for answer in group]))
    sums = {
        "answers": len(answers),
        "prompts": len(groups),
        "reward": sum(answer["reward"] for answer in answers),
        "answers_in_flat_groups": group_size * len(flat),
        "tokens": sum(len(answer["response"]) for answer in answers),
        "truncated": sum(answer["truncated"] for answer in answers),
        "diversity": sum(diversities),
    }
    sums = sums_by_name(sums, sum_over_ranks)
    count = sums["answers"]
    return {
        "reward/mean": sums["reward"] / count,
        "reward/zero_std_frac": sums["answers_in_flat_groups"] / count,
        "response/len_mean": sums["tokens"] / count,
        "response/truncated_frac": sums["truncated"] / count,
        "response/ngram_diversity": sums["diversity"] / sums["prompts"],
    }


def verdict_metrics(verdicts):
    """How often the verifier gave each of its verdicts (a Counter), {metric: float} over all
    ranks."""
    counts = {f"verify/{verdict}": verdicts[verdict] for verdict in verify.VERDICTS}
    return sums_by_name(counts, sum_over_ranks)


# A larger mean mismatch is no rounding, nats per token. Float32 rounds to 1e-6 (1e-4 where states
# are recurrent); bfloat16 to 0.005 on the tiny base and to 0.03 where logits are large.
LARGEST_MISMATCH = {torch.float32: 1e-3, torch.bfloat16: 0.1}


def check_mismatch(metrics, architecture, dtype):
    """ValueError if the trainer's log-probs are others than the engine's: the ratio would compare
    two models. metrics: mismatch_metrics, before the first update; dtype: in which both compute."""
    mean = metrics["rollout/mismatch_mean"]
    limit = LARGEST_MISMATCH[dtype]
    if mean > limit:
        name = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"{architecture}: engine and trainer differ by {mean:.2g} nats per token, more than "
            f"rounding in {name} explains ({limit:g}), so they do not compute the same model, and "
            "no update is taken: try the other --engine, or another model"
        )


def mismatch_metrics(batch, old_log_probs):
    """How far the engine's log-probs are from the trainer's, nats per token: {metric: float} over
    all ranks. Where rollout_log_probs are nan, of a second sample at its own temperature, they do
    not count."""
    rollout_log_probs = batch["rollout_log_probs"]
    known = batch["response_mask"] & ~rollout_log_probs.isnan()
    mismatch = torch.where(known, (old_log_probs - rollout_log_probs).abs(), 0.0)
    largest = max_over_ranks(mismatch.max().double())
    sums = sums_by_name({"tokens": known.sum(), "mismatch": mismatch.sum()}, sum_over_ranks)
    return {
        "rollout/mismatch_mean": sums["mismatch"] / sums["tokens"],
        "rollout/mismatch_max": largest,
    }
