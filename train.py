"""Train a language model with verifiable rewards and any of the METHODS of losses.py, and watch its entropy.

A step: 1 sample answers from the current policy - 2 verify, centre the rewards within each group - 3 old_log_probs,
the gap to the engine's - 4 updates_per_rollout optimizer steps - 5 push the weights - 6 log, evaluate, checkpoint.
Left out of GRPO as first published: the KL to a reference (see kl_loss), the mean per answer before that of answers.

Shapes: P prompts a step over all ranks, G answers each, B answers on this rank, T response tokens of the longest.
"""
from rollout import prepare_environment

prepare_environment()  # RANK ... for plain python, vLLM's variables; importing rollout has set OMP_WAIT_POLICY

import argparse
import math
import os
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoTokenizer, HfArgumentParser

import tiny
import verify
from entropy import MICROSCOPE, STATISTICS, build_policy, entropy_after, measure, score, score_all
from losses import (CONTROLLERS, IDLE_WITH_ONE_UPDATE, MASKS, METHODS, REFUSED, Controller, k3, log_ratio, parse_knobs,
                    scale_gradient, token_mean, wanted_tensors, with_state)
from record import (RunLog, check_folder, checkpoints, dry_run, load_checkpoint, record_answers,
                    save_checkpoint)
from rollout import (collate, evaluate, full_tensors, gap_metrics, make_engine, micro_batches, mix_second_sample,
                     resolve_engine, reward_metrics, rollout_batch, total)

# ---- configuration ---------------------------------------------------------------------------------------------------

def flag(default, help):
    kind = dict(default_factory=default.copy) if isinstance(default, list) else dict(default=default)
    return field(**kind, metadata={"help": help})


@dataclass
class Data:
    _argument_group_name = "policy and data"
    model: str = flag("tiny", "Hugging Face folder or hub name; tiny, tiny-mini, tiny-small: of tiny.py, with its settings")
    data: list[str] = flag(["countdown"], "training problems: .jsonl, .parquet, hub names; countdown: those of tiny.py")
    num_prompts: int = flag(0, "train on so many of the problems, nested subsets by --seed (0: all)")
    max_prompt_len: int = flag(2048, "longest prompt in tokens; a longer one is an error")
    max_response_len: int = flag(8192, "longest response in tokens; a longer one is cut: truncated")


@dataclass
class Method:
    _argument_group_name = "method"
    method: str = flag("grpo", ", ".join(METHODS))
    knobs: list[str] = flag([], "settings of the method, as in --knobs cov_frac=2e-2 cov_low=0.5")
    prompts_per_step: int = flag(256, "P, prompts of a rollout batch, over all ranks")
    group_size: int = flag(8, "G, answers per prompt")
    updates_per_rollout: int = flag(8, "optimizer steps per rollout batch")
    temperature: float = flag(1.0, "of sampling and of every log-prob")
    adv_norm: str = flag("std", "std: advantages divided by their group's std; none: Dr. GRPO")
    dynamic_sampling: bool = flag(False, "drop groups without variance, sample others instead")
    max_resample: int = flag(4, "with --dynamic_sampling: further rounds at most")
    tis_cap: float = flag(0.0, "cap of the truncated importance weight for the engine gap (0: off)")


@dataclass
class Training:
    _argument_group_name = "training and hardware"
    steps: int = flag(300, "rollout batches; 0: evaluate only")
    lr: float = flag(1e-6, "AdamW's learning rate, constant after the warm-up")
    warmup_updates: int = flag(10, "optimizer steps of linear warm-up")
    weight_decay: float = flag(0.0, "AdamW's weight decay")
    grad_clip: float = flag(1.0, "largest gradient norm")
    parallel: str = flag("ddp", "ddp, or fsdp: weights, gradients and optimizer sharded (FSDP2)")
    dtype: str = flag("auto", "compute in bfloat16 or float32; auto: bfloat16 on GPUs. Master weights are float32")
    micro_batch_tokens: int = flag(16384, "padded tokens per forward: memory and speed; same gradient (but see README)")
    activation_checkpointing: bool = flag(False, "recompute layers in backward: less memory, more time")
    engine: str = flag("auto", "vllm, torch; auto: vllm where a GPU and vllm are present")
    rollout_tp: int = flag(1, "ranks per vllm engine (tensor parallel)")
    rollout_gpu_memory: float = flag(0.4, "vllm's share of each GPU's memory")


@dataclass
class Run:
    _argument_group_name = "evaluation and run"
    eval_data: list[str] = flag([], "test problems, as --data; none: no evaluation")
    eval_every: int = flag(20, "steps between evaluations; also before the first step and after the last")
    eval_prompts: int = flag(0, "the first so many problems of each set (0: all)")
    eval_samples: int = flag(8, "answers per problem, for pass@1, 2, 4 ...")
    eval_temperature: float = flag(1.0, "their temperature")
    name: str = flag("", "folder of the run; if empty: METHOD-MODEL-seedSEED")
    out: str = flag("runs", "folder of all runs")
    seed: int = flag(0, "of data order, sampling, random selections")
    save_every: int = flag(50, "steps between checkpoints; the last step always")
    keep_checkpoints: int = flag(2, "the newest so many are kept, and the best of the evaluated")
    resume: bool = flag(False, "go on from the run's last complete checkpoint")
    overwrite: bool = flag(False, "delete an earlier run of that name")
    dry_run: bool = flag(False, "print the plan, three prompts and verdicts on their gold answers, then exit")
    log_to: str = flag("", "tensorboard or wandb, beside metrics.jsonl")
    record_step: int = flag(0, "write the answers that this step learns from to step-N-rank-R.jsonl (0: none)")
    trust_remote_code: bool = flag(False, "run Python code that comes with the model")


MAY_BE_ZERO = {"num_prompts", "max_resample", "tis_cap", "steps", "warmup_updates", "weight_decay", "eval_prompts",
               "seed", "record_step"}
CHOICES = {"parallel": ("ddp", "fsdp"), "dtype": ("auto", "float32", "bfloat16"), "adv_norm": ("std", "none"),
           "log_to": ("", "tensorboard", "wandb")}


class OneLine(argparse.ArgumentDefaultsHelpFormatter):  # --help, a line for each flag
    def __init__(self, prog):
        super().__init__(prog, max_help_position=28, width=150)

    def _format_action_invocation(self, action):
        return action.option_strings[0]


@contextmanager
def clear_errors():
    """Bad input: one line per node, exit code 2 on every rank, before anything slow."""
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ["LOCAL_RANK"] == "0":
            print(f"train.py: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def parse(argv):
    """The command line as one checked namespace; ValueError with one clear line on bad input."""
    parser = HfArgumentParser([Data, Method, Training, Run], usage="train.py --method METHOD [options]",
                              description=__doc__.splitlines()[0] + " Defaults are shown for the --model given.",
                              formatter_class=OneLine, allow_abbrev=False)
    if parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])[0].model in tiny.SIZES:
        parser.set_defaults(**tiny.DEFAULTS)
    cfg, world = parser.parse_args(argv), int(os.environ["WORLD_SIZE"])
    if cfg.model in tiny.SIZES:
        cfg.knobs = tiny.KNOBS.get(cfg.method, []) + cfg.knobs
    parse_knobs(cfg.method, cfg.knobs)
    for (method, name), why in REFUSED.items():
        if method == cfg.method and getattr(cfg, name) != parser.get_default(name):
            raise ValueError(f"--method {method} with --{name}: {why}")
    for name, value in vars(cfg).items():
        if type(value) in (int, float) and not (value > 0 or value == 0 and name in MAY_BE_ZERO):
            raise ValueError(f"--{name} {value}: it must be positive")
    cfg.engine = resolve_engine(cfg.engine, cfg.rollout_tp)
    for name, choices in CHOICES.items():
        if getattr(cfg, name) not in choices:
            raise ValueError(f"--{name} {getattr(cfg, name)}: choose from {', '.join(filter(None, choices))}")
    if cfg.steps and cfg.prompts_per_step % (world * cfg.updates_per_rollout):
        raise ValueError(f"--prompts_per_step {cfg.prompts_per_step} must be a multiple of {world} (ranks) x "
                         f"{cfg.updates_per_rollout} (--updates_per_rollout)")
    if cfg.seed * cfg.group_size >= 2 ** 28 or cfg.dynamic_sampling and cfg.group_size == 1:
        raise ValueError("--seed x --group_size must stay below 2^28; --dynamic_sampling needs groups of 2 or more")
    model_name = "-".join(Path(cfg.model).parts[-2 if Path(cfg.model).name.startswith("checkpoint-") else -1:])
    cfg.name = cfg.name or f"{cfg.method if cfg.steps else 'eval'}-{model_name}-seed{cfg.seed}"
    if Path(cfg.name).name != cfg.name or cfg.name.startswith("."):
        raise ValueError(f"--name {cfg.name}: one folder's name is expected; --out says where it goes")
    check_folder(cfg)
    return cfg


# ---- update ----------------------------------------------------------------------------------------------------------

def update(trained, optimizer, batch, tensors, rows, knobs, cfg):
    """Stage 4: one optimizer step on some rows of the batch; {metric: float} over all ranks, None if loss or gradient
    were not finite and the step was not taken.

    tensors: {name: (B, T)}, all that stays fixed during the updates. The loss is a sum / num_tokens with the tokens of
    all micro-batches and ranks, so the gradient does not depend on how they are split."""
    wanted, loss_mask = wanted_tensors(cfg.method), batch["loss_mask"]
    num_tokens, num_sequences = total(torch.stack([loss_mask[rows].sum(), loss_mask[rows].any(1).sum()])).float()
    micro, sums = micro_batches(batch["lengths"].tolist(), rows, cfg.micro_batch_tokens), {}
    for i, rows in enumerate(micro):
        postpone = cfg.parallel == "ddp" and i + 1 < len(micro)  # DDP exchanges gradients in the last backward only
        with trained.no_sync() if postpone else nullcontext():
            now = score(trained, batch, rows, ["log_probs"] + [name for name in wanted if name in STATISTICS])
            log_probs, width = now["log_probs"], now["log_probs"].shape[1]
            mask, fixed = loss_mask[rows, :width], {name: tensor[rows, :width] for name, tensor in tensors.items()}
            fixed["num_sequences"] = num_sequences
            if cfg.tis_cap:
                gap = log_ratio(fixed["old_log_probs"], fixed["rollout_log_probs"], mask)
                log_probs = scale_gradient(log_probs, gap.exp().clamp(max=cfg.tis_cap))
            loss, metrics = METHODS[cfg.method](
                log_probs, fixed["old_log_probs"], fixed["advantages"], mask,
                **{name: (now | fixed)[name] for name in wanted}, **knobs, num_tokens=num_tokens)
            (loss * dist.get_world_size()).backward()  # DDP and FSDP2 average over ranks; the loss is a sum over them
        kl = token_mean(k3(fixed["old_log_probs"], log_probs.detach(), mask), mask, num_tokens)
        for name, value in {"train/loss": loss.detach(), "policy/kl_to_rollout": kl, **metrics}.items():
            sums[name] = sums.get(name, 0.0) + value
    norm = torch.nn.utils.clip_grad_norm_(trained.parameters(), cfg.grad_clip)
    norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    means = dict(zip(sums, total(torch.stack([value.double() for value in sums.values()])).tolist()))
    finite = math.isfinite(norm) and math.isfinite(means["train/loss"])
    if finite:
        optimizer.step()
    optimizer.zero_grad()
    return means | {"train/grad_norm": norm} if finite else None


# ---- the program -----------------------------------------------------------------------------------------------------

def main(argv=None):
    with clear_errors():
        cfg = parse(sys.argv[1:] if argv is None else argv)
        train_sets = verify.load_sets(cfg.data if cfg.steps else [], "train")
        eval_sets = verify.load_sets([name for name in cfg.eval_data if name != "none"], "test")
        if cfg.model not in tiny.SIZES:
            AutoConfig.from_pretrained(cfg.model, trust_remote_code=cfg.trust_remote_code)  # a wrong name is found here
    cuda, local_rank = torch.cuda.is_available(), int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    dtype = torch.bfloat16 if cfg.dtype == "bfloat16" or cfg.dtype == "auto" and cuda else torch.float32
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    rank, folder = dist.get_rank(), Path(cfg.out, cfg.name)

    if cfg.model in tiny.SIZES and rank == 0:
        tiny.base_model(size=cfg.model)  # made once; the other ranks wait, then find it
    dist.barrier()
    base = tiny.base_model(size=cfg.model) if cfg.model in tiny.SIZES else cfg.model
    with clear_errors():
        trust = dict(trust_remote_code=cfg.trust_remote_code)
        tokenizer, longest = AutoTokenizer.from_pretrained(base, **trust), cfg.max_prompt_len + cfg.max_response_len
        model_config = AutoConfig.from_pretrained(base, **trust)
        if longest > getattr(model_config, "max_position_embeddings", longest):
            raise ValueError(f"--max_prompt_len + --max_response_len, {longest}, is more than the positions of {base}")
        problems, prompts = verify.render_all(train_sets, tokenizer, cfg.max_prompt_len, cfg.num_prompts, cfg.seed)
        eval_sets = {name: verify.render_all({name: one_set[:cfg.eval_prompts or None]}, tokenizer, cfg.max_prompt_len)
                     for name, one_set in eval_sets.items()}

    if cfg.dry_run:
        dry_run(cfg, model_config, tokenizer, [(problems, prompts)] if cfg.steps else eval_sets.values(), dtype)
        return dist.destroy_process_group()

    # Weights, optimizer, controller, counters: all that --resume needs. Random draws depend on seed and step only.
    start = checkpoints(folder)[-1] if cfg.resume else None
    with clear_errors():
        state = load_checkpoint(start) if start else dict(step=0, drawn=0, updates=0, controller={}, means={})
        policy = build_policy(start or base, cfg, device if cfg.steps else torch.device("cpu"), dtype)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, betas=(0.9, 0.95))
    loss_knobs, rule_knobs, mask_knobs = parse_knobs(cfg.method, cfg.knobs)
    controller = Controller(CONTROLLERS.get(cfg.method), rule_knobs)
    if start:
        whole = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(policy, optimizer, state.pop("optimizer"), options=whole)
    controller.load_state_dict(state["controller"])
    trained = policy if cfg.parallel == "fsdp" or not cfg.steps else DistributedDataParallel(
        policy, forward_sync_buffers=False, gradient_as_bucket_view=True)
    wanted = wanted_tensors(cfg.method)
    old_names = sorted({*MICROSCOPE, *(name[4:] for name in wanted if name.startswith("old_"))})
    ref_names = [name[4:] for name in wanted if name.startswith("ref_")]
    reference = build_policy(base, cfg, device, dtype) if ref_names else None
    ends = policy.model.generation_config.eos_token_id or []  # one id, or several for chat models
    stop_ids = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    engine = make_engine(cfg.engine, base, dtype=dtype, device=device, stop_ids=stop_ids, max_model_len=longest,
                         tensor_parallel_size=cfg.rollout_tp, gpu_memory_utilization=cfg.rollout_gpu_memory, **trust)
    engine.push_weights(full_tensors(policy.model))

    run_log = RunLog(folder, cfg, state["step"], rank, verify.first_prompt(tokenizer, prompts, eval_sets))
    if cfg.method in IDLE_WITH_ONE_UPDATE and cfg.updates_per_rollout == 1:
        run_log.warn(f"{cfg.method} with --updates_per_rollout 1", IDLE_WITH_ONE_UPDATE[cfg.method])
    if eval_sets and not start:
        run_log.write({"step": 0} | run_log.evaluation(0, evaluate(engine, tokenizer, eval_sets, cfg)))
    failures, interrupted, stop = 0, False, []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))  # obeyed after the step; before the first it just ends

    for step in range(state["step"] + 1, cfg.steps + 1):
        torch.manual_seed(hash((cfg.seed, step, rank)) % 2 ** 63)  # a method's random draws, the same after --resume
        clock = [time.perf_counter()]

        # ---- 1 sample · 2 verify and centre per group
        answers, state["drawn"] = rollout_batch(engine, tokenizer, problems, prompts, state["drawn"], cfg)
        metrics = reward_metrics(answers, cfg.group_size)
        if "second_temperature" in controller.state:
            mix_second_sample(engine, tokenizer, answers, controller.state, cfg)
        if step == cfg.record_step:
            record_answers(folder / f"step-{step}-rank-{rank}.jsonl", answers)
        verdicts = total(torch.tensor([verify.outcomes.pop(v, 0) for v in verify.VERDICTS])).tolist()
        batch = collate(answers, device)
        engine.sleep()
        clock.append(time.perf_counter())

        # ---- 3 old_log_probs, the gap to the engine's, and what the tokens say about the entropy
        old = score_all(trained, batch, old_names, cfg.micro_batch_tokens, cfg.updates_per_rollout)
        tensors = {name: batch[name] for name in ("advantages", "rewards", "group_accuracy", "rollout_log_probs")}
        tensors |= {f"old_{name}": values for name, values in old.items()}
        if reference:
            ref = score_all(reference, batch, ref_names, cfg.micro_batch_tokens, cfg.updates_per_rollout)
            tensors |= {f"ref_{name}": values for name, values in ref.items()}
        batch_of = (old, batch["advantages"], batch["response_mask"], total)
        metrics |= gap_metrics(batch, old["log_probs"]) | measure(*batch_of, batch["group_accuracy"], cfg.group_size)
        controller.update(metrics["entropy/response_mean"], (step - 1) / cfg.steps, state["means"] | metrics)
        batch["loss_mask"] = batch["response_mask"]  # the tokens that the updates learn from
        if cfg.method in MASKS:
            batch["loss_mask"] = MASKS[cfg.method](*batch_of, **mask_knobs)
        clock.append(time.perf_counter())

        # ---- 4 optimizer steps
        updates = []
        for rows in np.array_split(np.arange(len(answers)), cfg.updates_per_rollout):
            optimizer.param_groups[0]["lr"] = cfg.lr * min(1.0, (state["updates"] + 1) / max(1, cfg.warmup_updates))
            knobs = with_state(loss_knobs, controller.state)
            updates.append(update(trained, optimizer, batch, tensors, rows.tolist(), knobs, cfg))
            state["updates"] += 1
            failures = failures + 1 if updates[-1] is None else 0
            if failures == 10:
                raise SystemExit(f"ten updates in a row without finite loss or gradient; {folder} has checkpoints")
        metrics["entropy/change_measured"] = entropy_after(trained, batch, old, cfg)
        clock.append(time.perf_counter())

        # ---- 5 push the weights
        engine.wake()
        engine.push_weights(full_tensors(policy.model))
        clock.append(time.perf_counter())

        # ---- 6 log, evaluate, checkpoint
        state["step"] = step
        taken = [m for m in updates if m]
        state["means"] = {name: sum(m[name] for m in taken) / len(taken) for name in (taken[0] if taken else ())}
        metrics = {"step": step, **metrics, **state["means"],
                   **{f"controller/{name}": value for name, value in controller.state.items()},
                   **{f"verify/{name}": count for name, count in zip(verify.VERDICTS, verdicts)},
                   "train/skipped": len(updates) - len(taken), "train/lr": optimizer.param_groups[0]["lr"]}
        for name, i, j in (("rollout", 0, 1), ("score", 1, 2), ("update", 2, 3), ("push", 3, 4), ("step", 0, 4)):
            metrics[f"time/{name}_s"] = clock[j] - clock[i]
        if eval_sets and (step % cfg.eval_every == 0 or step == cfg.steps):
            metrics |= run_log.evaluation(step, evaluate(engine, tokenizer, eval_sets, cfg))
        run_log.write(metrics)
        stopped = total(torch.tensor(len(stop))) > 0  # by a SIGTERM to any rank: all must save
        if step % cfg.save_every == 0 or step == cfg.steps or stopped:
            state["controller"] = controller.state_dict()
            save_checkpoint(folder, policy, optimizer, tokenizer, state, cfg.keep_checkpoints)
        if interrupted := stopped and step < cfg.steps:
            break

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    run_log.close(interrupted)
    engine.close()
    del trained  # or DDP, the process group's last owner, ends it with the GIL held, which gloo's thread may wait for
    if dist.is_initialized():  # vLLM's shutdown takes the process group with it
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
