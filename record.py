"""The folder of a run: config.json, metrics.jsonl, checkpoints, tables, curves; and what a run will need (--dry_run).

What is written is complete or absent, so that a run killed at any moment goes on from its last checkpoint.
"""
import json
import math
import os
import re
import shlex
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from tqdm import tqdm
from transformers import AutoModelForCausalLM

import verify
from losses import CONTROLLERS, wanted_tensors
from rollout import full_tensors


def read_metrics(run):
    """The rows of runs/NAME/metrics.jsonl (or of such a file), a dict per line; an unfinished last line is none."""
    path = Path(run) / "metrics.jsonl" if Path(run).is_dir() else Path(run)
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


SUSPICIOUS = (  # metric, limit, what it means, what to change: silence would be an error
    ("response/truncated_frac", 0.9, "over 90 % of the answers are truncated", "raise --max_response_len"),
    ("reward/zero_std_frac", 0.9, "over 90 % of the groups have equal rewards", "other --data, or --dynamic_sampling"),
    ("rollout/gap_mean", 0.05, "engine and trainer differ by 0.05 nats per token", "--tis_cap 2, or --dtype float32"),
    ("train/skipped", 0, "updates were skipped: loss or gradient not finite", "lower --lr, or --dtype float32"),
    ("verify/timeout", 0, "answers that ran out of the verifier's time count as wrong", "raise verify.TIME_LIMIT"),
    ("eval/truncated_frac", 0.9, "over 90 % of the test answers are truncated", "raise --max_response_len"),
    ("eval/timeout", 0, "test answers that ran out of the verifier's time count as wrong", "raise verify.TIME_LIMIT"))


MAY_CHANGE_ON_RESUME = {"out", "save_every", "keep_checkpoints", "resume", "overwrite", "engine", "log_to",
                        "record_step"}


def checkpoints(folder):
    """The complete checkpoints of a run, oldest first."""
    return sorted((p for p in folder.glob("checkpoint-*") if p.name[11:].isdigit()), key=lambda p: int(p.name[11:]))


def save_checkpoint(folder, policy, optimizer, tokenizer, state, keep):
    """A Hugging Face folder with the optimizer and the counters beside it, complete or absent: written under another
    name, then renamed. Gathered on rank 0, so that it can be resumed with another number of ranks. The newest `keep`
    stay, and the one of best pass@1."""
    weights = {name: tensor.cpu() if dist.get_rank() == 0 else None for name, tensor in full_tensors(policy.model)}
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = state | {"optimizer": get_optimizer_state_dict(policy, optimizer, options=options), "run": folder.name}
    if dist.get_rank() == 0:
        unfinished = folder / "unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            policy.model.save_pretrained(unfinished, state_dict=weights)
            tokenizer.save_pretrained(unfinished)
            torch.save(state, unfinished / "trainer_state.pt")
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk is any of the three
            shutil.rmtree(unfinished, ignore_errors=True)
            last = [path.name for path in checkpoints(folder)[-1:]]
            raise SystemExit(f"{folder}: no room for checkpoint-{state['step']}? ({error}) The last complete one is "
                             f"{last[0] if last else 'none'}; make room, then --resume") from None
        unfinished.rename(folder / f"checkpoint-{state['step']}")
        saved = checkpoints(folder)
        scores = {folder / f"checkpoint-{row['step']}": row.get("eval/pass@1", -1) for row in read_metrics(folder)}
        best = max(saved, key=lambda path: scores.get(path, -1))
        for old in saved[:-keep]:
            if old != best or scores.get(old, -1) < 0:  # -1: not evaluated
                shutil.rmtree(old.rename(unfinished))  # renamed first: interrupted, it leaves no half a checkpoint
    dist.barrier()


def load_checkpoint(path):
    """The counters, controller and optimizer state of a checkpoint of this run; ValueError if it is not whole or of
    another run. Plain tensors only: weights_only refuses anything that could run code."""
    try:
        state = torch.load(path / "trainer_state.pt", weights_only=True, mmap=True)
        run, step = state.pop("run"), state["step"]
    except Exception as error:  # torch, zipfile and pickle each have their own
        raise ValueError(f"{path} is truncated or no checkpoint of train.py ({type(error).__name__}: {error}); delete "
                         "it to resume from the one before") from None
    if (run, f"checkpoint-{step}") != (path.parent.name, path.name):
        raise ValueError(f"{path} is a checkpoint of the run {run} at step {step}: put it back, or delete it")
    return state


def write_whole(path, text):
    """All of the text or the file as it was: a run that is killed here loses no line."""
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").rename(path)


def record_answers(path, answers):
    """--record_step: one line of JSON for each answer that a step learned from, in the order of the batch.

    With the weights of the checkpoint before it, they are all that one needs to compute the step again. log_probs are
    the engine's, nats; null for an answer that was drawn at another temperature (aepo)."""
    rows = [{"prompt": a["prompt"], "response": a["response"], "seed": a["seed"], "reward": a["reward"],
             "group_accuracy": a["group_accuracy"], "truncated": a["truncated"], "gold": a["problem"].answer,
             "log_probs": None if math.isnan(a["log_probs"][0]) else a["log_probs"]} for a in answers]
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def check_folder(cfg):
    """ValueError if the run's folder is taken, or holds nothing to resume, or a run of other settings."""
    folder = Path(cfg.out, cfg.name)
    if cfg.log_to and not find_spec(cfg.log_to):
        raise ValueError(f"--log_to {cfg.log_to}: the package is not installed; run `pip install {cfg.log_to}`")
    if not cfg.steps and set(cfg.eval_data) <= {"none"}:
        raise ValueError("--steps 0 without --eval_data: there is nothing to do")
    if not cfg.steps and (cfg.resume or checkpoints(folder)):
        raise ValueError(f"--steps 0 would evaluate into a trained run's folder, {folder}: give another --name, no "
                         "--resume; --model RUN/checkpoint-N evaluates a checkpoint")
    if cfg.dry_run:
        return
    if cfg.resume and not checkpoints(folder):
        raise ValueError(f"--resume: {folder} has no complete checkpoint; start it without --resume")
    if cfg.resume:
        before = json.loads((folder / "config.json").read_text())
        free = MAY_CHANGE_ON_RESUME | (set() if cfg.method in CONTROLLERS else {"steps"})  # schedules depend on --steps
        done = int(checkpoints(folder)[-1].name[11:])
        if cfg.steps < done:
            raise ValueError(f"--steps {cfg.steps}: {folder} is at step {done} already")
        changed = [f"--{name} {before.get(name)}, not {value}" for name, value in vars(cfg).items()
                   if before.get(name) != value and name not in free]
        if changed:
            raise ValueError(f"--resume: {folder} was trained with {'; '.join(changed)}: give these, or a new --name")
    elif cfg.overwrite and folder.exists() and not (folder / "config.json").exists():
        raise ValueError(f"--overwrite: {folder} is no run's folder (it has no config.json); choose another --name")
    elif (folder / "metrics.jsonl").exists() and not cfg.overwrite:
        raise ValueError(f"{folder} holds an earlier run: --resume goes on, --overwrite deletes it, --name keeps both")


class RunLog:
    """A run's folder (config.json, metrics.jsonl, curves.png, eval-SET.json), its progress bar, table and warnings.
    Rank 0 writes."""

    def __init__(self, folder, cfg, step, rank, prompt):
        """step: of the checkpoint that is resumed; what an interrupted run wrote after it is computed again. prompt:
        the first one's text, to be shown; "" if there is no problem at all."""
        self.folder, self.cfg, self.writes, self.warned = folder, cfg, rank == 0, set()
        if self.writes:
            rows = [row for row in read_metrics(folder) if row["step"] <= step] if cfg.resume else []
            if cfg.overwrite and not cfg.resume:
                shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / "config.json", json.dumps(vars(cfg), indent=1))
            write_whole(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
            tqdm.write(f"the first prompt:\n{prompt}\n")
            tqdm.write(table_line(STEP_TABLE if cfg.steps else eval_table(cfg)))
        self.send = sender(cfg, folder) if self.writes and cfg.log_to else None
        self.bar = tqdm(total=cfg.steps, initial=step, desc=cfg.name, disable=not self.writes or not cfg.steps)

    def warn(self, cause, advice):
        """Once per cause."""
        if self.writes and cause not in self.warned:
            tqdm.write(f"warning: {cause}: {advice}", file=sys.stderr)
        self.warned.add(cause)

    def write(self, row):
        """One line of metrics.jsonl; a line of the table too if it holds an evaluation."""
        for name, limit, cause, advice in SUSPICIOUS:
            if row.get(name, 0) > limit:
                self.warn(cause, advice)
        if self.writes:
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            if self.send:
                self.send(row)
            if self.cfg.steps and any(key.startswith("eval/") for key in row):
                tqdm.write(table_line(STEP_TABLE, row))
        if row["step"]:
            self.bar.set_postfix(reward=f"{row['reward/mean']:.3f}", entropy=f"{row['entropy/response_mean']:.3f}",
                                 s=f"{row['time/step_s']:.1f}")
            self.bar.update()

    def evaluation(self, step, results):
        """Writes eval-SET.json for each (set, metrics) of the results as it comes; with --steps 0 prints a line, too.

        Returns metrics of a row: eval/METRIC, with several sets eval/SET/METRIC as well, and then eval/METRIC is the
        mean over the sets, of counts the sum; where a set lacks the metric there is none."""
        cfg, sets = self.cfg, {}
        for name, metrics in results:
            sets[name] = metrics
            if self.writes:
                about = {"set": name, "model": cfg.model, "step": step, "eval_data": cfg.eval_data,
                         "eval_prompts": cfg.eval_prompts, "samples": cfg.eval_samples,
                         "temperature": cfg.eval_temperature, "max_response_len": cfg.max_response_len}
                write_whole(self.folder / f"eval-{name}.json", json.dumps(about | metrics, indent=1))
                if not cfg.steps:
                    tqdm.write(table_line(eval_table(cfg), {"set": name} | metrics))
        row = {}
        for key in dict.fromkeys(key for metrics in sets.values() for key in metrics):
            values = [metrics[key] for metrics in sets.values() if key in metrics]
            if len(values) == len(sets):
                row[f"eval/{key}"] = sum(values) if key in ("problems", "timeout") else sum(values) / len(values)
        if len(sets) > 1:
            row |= {f"eval/{name}/{key}": value for name, metrics in sets.items() for key, value in metrics.items()}
        return row

    def close(self, interrupted):
        """interrupted: by SIGTERM, so that the command that goes on is printed."""
        self.bar.close()
        if self.writes and self.cfg.steps:
            runs = {self.folder.name: [read_metrics(self.folder)]}
            plot_curves(runs, self.folder / "curves.png", usual_panels(runs))
        if self.writes:
            print(f"{self.folder}: {', '.join(sorted(path.name for path in self.folder.iterdir()))}")
        if self.writes and interrupted:
            print("stopped by SIGTERM; to go on (on each node): torchrun --nproc-per-node "
                  f"{os.environ.get('LOCAL_WORLD_SIZE', 1)} train.py {shlex.join(sys.argv[1:])} --resume")


def sender(cfg, folder):
    """A function of a row of metrics, for --log_to: imported only here, beside metrics.jsonl and not instead of it."""
    if cfg.log_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(folder / "tensorboard")
        return lambda row: [writer.add_scalar(name, value, row["step"]) for name, value in row.items()]
    import wandb
    run = wandb.init(project="entropy-rlvr", name=cfg.name, dir=folder, config=vars(cfg))
    return lambda row: run.log(row, step=row["step"])


STEP_TABLE = {"step": "step", "reward": "reward/mean", "pass@1": "eval/pass@1", "pass@8": "eval/pass@8",
              "entropy": "entropy/response_mean", "s/step": "time/step_s"}


def eval_table(cfg):
    """The columns of the table of --steps 0: {head: metric}."""
    passes = {f"pass@{2**i}": f"pass@{2**i}" for i in range(1, cfg.eval_samples.bit_length())}
    return {f"{'set':>24}": "set", "problems": "problems", f"avg@{cfg.eval_samples}": "pass@1", **passes,
            "len": "len_mean", "truncated": "truncated_frac", "entropy": "entropy", "AUROC": "auroc", "ECE": "ece"}


def table_line(columns, row=None):
    """One line of a table with columns {head: metric}: its head, or a row of metrics; a dash for what the row lacks."""
    cells = columns if row is None else [row.get(key, "-") for key in columns.values()]
    texts = [f"{cell:.3f}" if isinstance(cell, float) else f"{cell}" for cell in cells]
    return " ".join(f"{text:>{max(8, len(head))}}" for head, text in zip(columns, texts))


# One colour per method in every figure of the project.
COLOURS = dict(
    grpo="tab:blue", clip_cov="tab:orange", kl_cov="tab:green", clip_higher="tab:red", entropy_bonus="tab:purple",
    kl_loss="tab:brown", steer="tab:pink", par="tab:olive", w_reinforce="tab:cyan", entropy_advantage="navy",
    entropic="gold", dcpo="darkgreen", aepo="lightgreen", flex_clip="salmon", ce_gppo="darkred", cispo="deeppink",
    gspo="darkkhaki", rand_pos_clip="tan", fork_tokens="teal", clip_b="slateblue", clip_v="violet",
    adaptive_entropy="crimson", aer="yellowgreen", siren="chocolate", quadrant="black")


def method_of(label):
    """The method that a label starts with: clip_cov of "clip_cov-tiny-seed0"."""
    return re.match("[a-z_]*", label)[0]


def line_styles(labels):
    """{label: (colour, line style)}: its method's colour, grey if it names none; a further label of the same colour has
    another line style."""
    colours = {label: COLOURS.get(method_of(label), "tab:gray") for label in labels}
    earlier = {label: list(colours.values())[:i].count(colours[label]) for i, label in enumerate(labels)}
    return {label: (colours[label], ("-", "--", ":", "-.")[earlier[label] % 4]) for label in labels}


def usual_panels(runs):
    """{metric: title} of the entropy, the reward, pass@1 and pass@8 (or the largest pass@k) of such runs."""
    keys = {key for seeds in runs.values() for rows in seeds for row in rows for key in row}
    ks = sorted(int(key[10:]) for key in keys if key.startswith("eval/pass@"))
    panels = {"entropy/response_mean": "policy entropy (nats per token)", "reward/mean": "training reward (mean)"}
    shown = ks[:1] + [8 if 8 in ks else ks[-1]] if ks else []
    return panels | {f"eval/pass@{k}": f"test pass@{k}" for k in shown}


def plot_curves(runs, png, panels):
    """Metrics against the step, four panels a row. runs: {label: [rows of metrics, a list per seed]}: a line per label,
    the mean over its seeds, and a band from the least to the most, at the steps that all its seeds have. panels:
    {metric: title}."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    columns, styles = min(4, len(panels)), line_styles(runs)
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.2 * columns, 3.4 * lines), constrained_layout=True,
                                squeeze=False)
    for axis, (key, title) in zip(axes.flat, panels.items()):
        for label, seeds in runs.items():
            curves = [{row["step"]: row[key] for row in rows if key in row} for rows in seeds]
            steps = sorted(set.intersection(*map(set, curves)))
            values = np.array([[curve[step] for step in steps] for curve in curves])
            colour, style = styles[label]
            axis.plot(steps, values.mean(0), style, color=colour, label=label,
                      marker="o" if key.startswith("eval") else None, markersize=3)
            axis.fill_between(steps, values.min(0), values.max(0), alpha=0.2, color=colour, linewidth=0)
        axis.set(title=title, xlabel="step")
        if axis.dataLim.y0 >= 0:
            axis.set_ylim(bottom=0)
        elif axis.dataLim.y1 <= 0:  # a quadrant that spends entropy
            axis.set_ylim(top=0)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels):]:
        axis.axis("off")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(png, dpi=130)
    plt.close(figure)


def dry_run(cfg, model_config, tokenizer, sets, dtype):
    """--dry_run: the plan, and for each set (problems, prompts) three prompts and verdicts on their gold answers."""
    if dist.get_rank() == 0:
        print(plan(cfg, model_config, dist.get_world_size(), dtype))
        for problems, prompts in sets:
            verify.preview(tokenizer, problems, prompts)


def plan(cfg, model_config, ranks, dtype):
    """Memory, tokens and disk of a run in a few lines, by arithmetic; no weights are loaded.

    Activations: 34 bytes per token, hidden unit and layer in 16 bits without attention matrices, Korthikanti et al.
    2022, arXiv 2205.05198, eq. 1; 2 with checkpointing, which adds one layer's 34. experiments/scaling.py reckons more
    finely, for two models."""
    with torch.device("meta"):  # shapes without memory
        model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=cfg.trust_remote_code)
    shape, count = model_config.get_text_config(), sum(p.numel() for p in model.parameters())
    shards, longest = ranks if cfg.parallel == "fsdp" else 1, cfg.max_prompt_len + cfg.max_response_len
    answers, layers = cfg.prompts_per_step * cfg.group_size, shape.num_hidden_layers
    tokens = min(max(cfg.micro_batch_tokens, longest), answers * longest // (cfg.updates_per_rollout * ranks))
    wants_reference = any(name.startswith("ref_") for name in wanted_tensors(cfg.method))
    kept = 2 * layers + 34 if cfg.activation_checkpointing else 34 * layers
    memory = {
        "weights, gradients and AdamW's two averages, float32": 16 * count / shards,
        "activations of a micro-batch, roughly": kept * tokens * shape.hidden_size * dtype.itemsize / 2,
        "log-probs of a chunk, five times float32 (512, V)": 20 * 512 * shape.vocab_size,
        "a frozen reference, float32 (methods that want one)": 4 * count / shards * wants_reference,
        f"the engine's weights, {dtype} (vllm sleeps during the update)": dtype.itemsize * count / cfg.rollout_tp}
    lines = [f"{count / 1e6:,.2f} M parameters, {ranks} ranks, --parallel {cfg.parallel}. GiB per rank:"]
    lines += [f"  {size / 2**30:9.3f}  {part}" for part, size in memory.items()]
    lines += [f"  {sum(memory.values()) / 2**30:9.3f}  in all; KV cache, gathered layers and overhead come on top",
              f"a step: {cfg.prompts_per_step} prompts x {cfg.group_size} answers, at most {answers * longest:,} tokens"
              f", in {cfg.updates_per_rollout} updates; {cfg.steps} steps",
              f"a checkpoint: {12 * count / 2**30:.3f} GiB; room for {cfg.keep_checkpoints + 2} is needed"]
    return "\n".join(lines)
