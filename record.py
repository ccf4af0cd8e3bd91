"""The folder of a run: config.json, metrics.jsonl, checkpoints, tables, curves; and what a run will
need (--dry_run).

What is written is complete or absent, so that a run killed at any moment goes on from its last
checkpoint.
"""

import json
import math
import os
import shlex
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from tqdm import tqdm

from data import preview
from diagnose import SUSPICIOUS, plot_curves, read_metrics, usual_panels
from losses import CONTROLLERS
from policy import adapter_tensors, full_tensors

# ---- files ---------------------------------------------------------------------------------------


def write_whole(path, text):
    """All of the text or the file as it was: a run that is killed here loses no line."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.rename(path)


def json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def record_answers(path, answers):
    """--record_step: one line of JSON for each answer that a step learned from, as sampled: a
    prompt's answers side by side. With several ranks deal_over_ranks deals them anew after that.

    With the weights of the checkpoint before it, the files of all ranks are all that one needs to
    compute the step again. log_probs are the engine's, nats; null for an answer that was drawn at
    another temperature (aepo)."""
    rows = []
    for answer in answers:
        at_other_temperature = math.isnan(answer["log_probs"][0])
        row = {
            "prompt": answer["prompt"],
            "response": answer["response"],
            "seed": answer["seed"],
            "reward": answer["reward"],
            "group_accuracy": answer["group_accuracy"],
            "truncated": answer["truncated"],
            "gold": answer["problem"].answer,
            "log_probs": None if at_other_temperature else answer["log_probs"],
        }
        rows.append(row)
    write_whole(path, json_lines(rows))


# ---- checkpoints ---------------------------------------------------------------------------------


def step_of(checkpoint):
    """The step in the name of a folder checkpoint-STEP."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def checkpoints(folder):
    """The complete checkpoints of a run, oldest first."""
    found = []
    for path in folder.glob("checkpoint-*"):
        if path.name.removeprefix("checkpoint-").isdigit():
            found.append(path)
    return sorted(found, key=step_of)


def save_checkpoint(folder, policy, optimizer, tokenizer, state, keep):
    """A Hugging Face folder with the optimizer and the counters beside it, and with LoRA the
    adapters, which the folder's weights have merged. A collective.

    Complete or absent: it is written under another name, then renamed. Gathered on rank 0, so that
    it can be resumed with another number of ranks. The newest `keep` stay, and the one of best
    pass@1."""
    on_rank_0 = dist.get_rank() == 0
    weights = {}
    for name, tensor in full_tensors(policy.model):
        weights[name] = tensor.cpu() if on_rank_0 else None
    adapters = adapter_tensors(policy.model)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    optimizer_state = get_optimizer_state_dict(policy, optimizer, options=options)
    if on_rank_0:
        unfinished = folder / "unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            policy.model.save_pretrained(unfinished, state_dict=weights)
            tokenizer.save_pretrained(unfinished)
            trainer_state = state | {"optimizer": optimizer_state, "run": folder.name}
            if adapters:
                trainer_state["adapters"] = adapters
            torch.save(trainer_state, unfinished / "trainer_state.pt")
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk is any of the three
            shutil.rmtree(unfinished, ignore_errors=True)
            saved = checkpoints(folder)
            last, then = (saved[-1].name, "--resume") if saved else ("none", "--overwrite")
            raise SystemExit(
                f"{folder}: no room for checkpoint-{state['step']}? ({error}) The last complete "
                f"one is {last}; make room, then {then}"
            ) from None
        unfinished.rename(folder / f"checkpoint-{state['step']}")
        delete_old_checkpoints(folder, keep)
    dist.barrier()


def delete_old_checkpoints(folder, keep):
    """All but the newest `keep` and the one of best pass@1, if any was evaluated."""
    pass_at_1 = {row["step"]: row.get("eval/pass@1", -1) for row in read_metrics(folder)}
    saved = checkpoints(folder)
    scores = {path: pass_at_1.get(step_of(path), -1) for path in saved}  # -1: not evaluated
    best = max(saved, key=scores.get)
    for path in saved[:-keep]:
        if path != best or scores[path] < 0:
            # Renamed first: interrupted, it leaves no half a checkpoint.
            shutil.rmtree(path.rename(folder / "unfinished"))


def load_checkpoint(path):
    """The counters, the controller's state and the optimizer's of a checkpoint of this run.

    ValueError if it is not whole or of another run. Plain tensors only: weights_only refuses
    anything that could run code."""
    try:
        state = torch.load(path / "trainer_state.pt", weights_only=True, mmap=True)
        run = state.pop("run")
        step = state["step"]
    except Exception as error:  # torch, zipfile and pickle each have their own
        raise ValueError(
            f"{path} is truncated or no checkpoint of train.py ({type(error).__name__}: {error}); "
            "delete it to resume from the one before"
        ) from None
    if run != path.parent.name or step != step_of(path):
        raise ValueError(
            f"{path} is a checkpoint of the run {run} at step {step}: put it back, or delete it"
        )
    return state


# ---- may this run start? -------------------------------------------------------------------------

MAY_CHANGE_ON_RESUME = {
    "out",
    "save_every",
    "keep_checkpoints",
    "resume",
    "overwrite",
    "engine",
    "log_to",
    "record_step",
    "rollout_gpu_memory",
}


def check_folder(cfg):
    """ValueError if the run's folder is taken, or holds nothing to resume, or a run of other
    settings."""
    folder = Path(cfg.out, cfg.name)
    if cfg.log_to and not find_spec(cfg.log_to):
        raise ValueError(
            f"--log_to {cfg.log_to}: the package is not installed; run `pip install {cfg.log_to}`"
        )
    if not cfg.steps and set(cfg.eval_data) <= {"none"}:
        raise ValueError("--steps 0 without --eval_data: there is nothing to do")
    if not cfg.steps and (cfg.resume or checkpoints(folder)):
        raise ValueError(
            f"--steps 0 would evaluate into a trained run's folder, {folder}: give another --name, "
            "no --resume; --model RUN/checkpoint-N evaluates a checkpoint"
        )
    if cfg.dry_run:
        return
    check_writable(folder)
    if cfg.resume:
        check_resume(cfg, folder)
    elif cfg.overwrite and folder.exists() and not (folder / "config.json").exists():
        raise ValueError(
            f"--overwrite: {folder} is no run's folder (it has no config.json); choose another "
            "--name"
        )
    elif (folder / "metrics.jsonl").exists() and not cfg.overwrite:
        raise ValueError(
            f"{folder} holds an earlier run: --resume goes on, --overwrite deletes it, "
            "--name keeps both"
        )


def check_writable(folder):
    """ValueError if the run's folder cannot be made, or not be written to."""
    existing = folder
    while not os.path.lexists(existing):
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(
            f"{folder} cannot be written, since {existing} is no folder or allows no writing: "
            "choose another --out or --name"
        )


def check_resume(cfg, folder):
    """ValueError if the folder has no checkpoint, or its run other settings than these."""
    saved = checkpoints(folder)
    if not saved:
        raise ValueError(
            f"--resume: {folder} has no complete checkpoint; start it without --resume"
        )
    done = step_of(saved[-1])
    if cfg.steps < done:
        raise ValueError(f"--steps {cfg.steps}: {folder} is at step {done} already")
    may_change = set(MAY_CHANGE_ON_RESUME)
    if cfg.method not in CONTROLLERS:  # a controller's schedule depends on --steps
        may_change.add("steps")
    try:
        saved_settings = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise ValueError(f"--resume: {folder}/config.json is no JSON ({error})") from None
    # A run of before --lora_rank trained all weights.
    before = {"lora_rank": 0} | saved_settings
    changed = []
    for name, value in vars(cfg).items():
        old_value = before.get(name, value)  # a run of before a flag was added lacks it
        if old_value != value and name not in may_change:
            changed.append(f"--{name} {old_value}, not {value}")
    if changed:
        raise ValueError(
            f"--resume: {folder} was trained with {'; '.join(changed)}: give these, or a new --name"
        )


# ---- the log -------------------------------------------------------------------------------------

# The columns of the table of a training run: {head: metric}.
STEP_TABLE = {
    "step": "step",
    "reward": "reward/mean",
    "pass@1": "eval/pass@1",
    "pass@8": "eval/pass@8",
    "entropy": "entropy/response_mean",
    "s/step": "time/step_s",
}


def eval_table(cfg):
    """The columns of the table of --steps 0."""
    columns = {f"{'set':>24}": "set", "problems": "problems", f"avg@{cfg.eval_samples}": "pass@1"}
    for power in range(1, cfg.eval_samples.bit_length()):
        columns[f"pass@{2**power}"] = f"pass@{2**power}"
    return columns | {
        "len": "len_mean",
        "truncated": "truncated_frac",
        "entropy": "entropy",
        "AUROC": "auroc",
        "ECE": "ece",
    }


def table_line(heads, cells):
    """One line of a table: a cell under each head, numbers with three digits."""
    texts = []
    for head, cell in zip(heads, cells):
        text = f"{cell:.3f}" if isinstance(cell, float) else f"{cell}"
        texts.append(text.rjust(max(8, len(head))))
    return " ".join(texts)


def table_head(columns):
    return table_line(columns, columns)


def table_row(columns, metrics):
    """A dash stands for a metric that the row lacks."""
    return table_line(columns, [metrics.get(name, "-") for name in columns.values()])


class RunLog:
    """A run's folder (config.json, metrics.jsonl, curves.png, eval-SET.json), its progress bar,
    table and warnings. Rank 0 writes."""

    def __init__(self, folder, cfg, step, rank, prompt):
        """step: of the checkpoint that is resumed; what an interrupted run wrote after it is
        computed again. prompt: the first one's text, to be shown; "" if there is no problem at
        all."""
        self.folder = folder
        self.cfg = cfg
        self.writes = rank == 0
        self.warned = set()
        self.send = None
        if self.writes:
            self.start_folder(step)
            if cfg.steps:
                knobs = " ".join(cfg.knobs) or "its default knobs"
                tqdm.write(f"{cfg.method} with {knobs}\n")
            tqdm.write(f"the first prompt:\n{prompt}\n")
            tqdm.write(table_head(STEP_TABLE if cfg.steps else eval_table(cfg)))
            if cfg.log_to:
                self.send = sender(cfg, folder)
        self.bar = tqdm(
            total=cfg.steps,
            initial=step,
            desc=cfg.name,
            disable=not self.writes or not cfg.steps,
        )

    def start_folder(self, step):
        rows = []
        if self.cfg.resume:
            rows = [row for row in read_metrics(self.folder) if row["step"] <= step]
        elif self.cfg.overwrite:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / "config.json", json.dumps(vars(self.cfg), indent=1))
        write_whole(self.folder / "metrics.jsonl", json_lines(rows))

    def warn(self, cause, advice):
        """Once per cause."""
        if self.writes and cause not in self.warned:
            tqdm.write(f"warning: {cause}: {advice}", file=sys.stderr)
        self.warned.add(cause)

    def write(self, row):
        """One line of metrics.jsonl; a line of the table too if it holds an evaluation."""
        for limit in SUSPICIOUS:
            if row.get(limit.metric, 0) > limit.above:
                self.warn(limit.cause, limit.advice)
        if self.writes:
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            if self.send:
                self.send(row)
            evaluated = any(name.startswith("eval/") for name in row)
            if self.cfg.steps and evaluated:
                tqdm.write(table_row(STEP_TABLE, row))
        if row["step"]:
            self.bar.set_postfix(
                reward=f"{row['reward/mean']:.3f}",
                entropy=f"{row['entropy/response_mean']:.3f}",
                s=f"{row['time/step_s']:.1f}",
            )
            self.bar.update()

    def evaluation(self, step, results):
        """Writes eval-SET.json for each (set, metrics) of the results as it comes; with --steps 0
        prints a line, too. Returns metrics of a row: see evaluation_row."""
        sets = {}
        for name, metrics in results:
            sets[name] = metrics
            if self.writes:
                self.write_evaluation(step, name, metrics)
        return evaluation_row(sets)

    def write_evaluation(self, step, name, metrics):
        cfg = self.cfg
        settings = {
            "set": name,
            "model": cfg.model,
            "step": step,
            "eval_data": cfg.eval_data,
            "eval_prompts": cfg.eval_prompts,
            "samples": cfg.eval_samples,
            "temperature": cfg.eval_temperature,
            "max_response_len": cfg.max_response_len,
        }
        write_whole(self.folder / f"eval-{name}.json", json.dumps(settings | metrics, indent=1))
        if not cfg.steps:
            tqdm.write(table_row(eval_table(cfg), {"set": name} | metrics))

    def close(self, interrupted):
        """interrupted: by SIGTERM, so that the command that goes on is printed."""
        self.bar.close()
        if not self.writes:
            return
        if self.cfg.steps:
            runs = {self.folder.name: [read_metrics(self.folder)]}
            plot_curves(runs, self.folder / "curves.png", usual_panels(runs))
        files = sorted(path.name for path in self.folder.iterdir())
        print(f"{self.folder}: {', '.join(files)}")
        if interrupted:
            ranks = os.environ.get("LOCAL_WORLD_SIZE", 1)
            print(
                f"stopped by SIGTERM; to go on (on each node): torchrun --nproc-per-node {ranks} "
                f"train.py {shlex.join(sys.argv[1:])} --resume"
            )


def evaluation_row(sets):
    """The metrics {set: {metric: number}} of an evaluation as those of a row.

    eval/METRIC; with several sets eval/SET/METRIC as well, and then eval/METRIC is the mean over
    the sets, of counts the sum. Where a set lacks the metric there is no eval/METRIC."""
    names = dict.fromkeys(name for metrics in sets.values() for name in metrics)
    row = {}
    for name in names:
        values = [metrics[name] for metrics in sets.values() if name in metrics]
        if len(values) < len(sets):
            continue
        is_count = name in ("problems", "timeout")
        row[f"eval/{name}"] = sum(values) if is_count else sum(values) / len(values)
    if len(sets) > 1:
        for set_name, metrics in sets.items():
            for name, value in metrics.items():
                row[f"eval/{set_name}/{name}"] = value
    return row


def sender(cfg, folder):
    """A function of a row of metrics, for --log_to: beside metrics.jsonl and not instead of it."""
    if cfg.log_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(folder / "tensorboard")

        def send(row):
            for name, value in row.items():
                writer.add_scalar(name, value, row["step"])

        return send

    import wandb

    run = wandb.init(project="entropy-rlvr", name=cfg.name, dir=folder, config=vars(cfg))

    def send(row):
        run.log(row, step=row["step"])

    return send


# ---- --dry_run -----------------------------------------------------------------------------------

GIB = 2**30
# What the parts of a memory.Plan are.
EXPLAINED = {
    "weights": "weights that are trained, float32",
    "frozen base": "the frozen base of LoRA",
    "gradients": "gradients, float32",
    "AdamW": "AdamW's two averages, float32",
    "reference": "a frozen reference, float32",
    "gathered or cast": "weights in use: gathered layers (fsdp), autocast's copies (ddp)",
    "unreduced gradients": "gradients before they are reduced or added",
    "activations": "activations that are kept for backward",
    "one layer": "more in the backward of one layer",
    "log-prob chunk": "log-probs of a chunk of tokens",
    "engine weights": "the engine's weights",
    "KV cache": "the engine's KV cache",
    "overhead": "contexts and graphs, assumed",
}


def dry_run(cfg, size, tokenizer, sets, dtype, memory_plan):
    """Prints the plan, and for each set (problems, prompts) three prompts and verdicts on their
    gold answers."""
    if dist.get_rank() == 0:
        print(plan(cfg, size, dist.get_world_size(), dtype, memory_plan))
        for problems, prompts in sets:
            preview(tokenizer, problems, prompts)


def plan(cfg, size, ranks, dtype, memory_plan):
    """Memory, tokens and disk of a run in a few lines. size: memory.ModelSize of the model."""
    longest = cfg.max_prompt_len + cfg.max_response_len
    step_tokens = cfg.prompts_per_step * cfg.group_size * longest
    layers = "recomputed in backward" if cfg.activation_checkpointing else "kept for backward"
    lines = [
        f"{size.parameters / 1e6:,.2f} M parameters, {ranks} ranks, --parallel {cfg.parallel}, "
        f"{dtype}, layers {layers}. GiB per rank, by arithmetic:"
    ]
    for part, number in memory_plan.parts.items():
        lines.append(f"  {number / GIB:9.3f}  {EXPLAINED[part]}")
    lines.append("the worst moment of each phase, GiB:")
    for phase, number in memory_plan.peaks.items():
        lines.append(f"  {number / GIB:9.3f}  {phase}")
    card = f"{memory_plan.total / GIB:.1f} GiB"
    if not torch.cuda.is_available():
        card += " (assumed: there is no GPU here)"
    lines.append(f"each GPU has {card}")
    if cfg.engine == "vllm":
        chosen = "as given" if cfg.rollout_gpu_memory else "what the trainer leaves"
        lines.append(f"vllm's share of it: {memory_plan.share:.2f}, {chosen}")
    for complaint in (memory_plan.misfit, memory_plan.tight):
        if complaint:
            lines.append(f"warning: {complaint}")
    frozen = size.parameters if cfg.lora_rank else 0
    checkpoint = 12 * size.trained + 4 * frozen
    lines += [
        f"a step: {cfg.prompts_per_step} prompts x {cfg.group_size} answers, at most "
        f"{step_tokens:,} tokens, in {cfg.updates_per_rollout} updates; {cfg.steps} steps",
        f"a checkpoint: {checkpoint / GIB:.3f} GiB; room for {cfg.keep_checkpoints + 2} is needed",
    ]
    return "\n".join(lines)
