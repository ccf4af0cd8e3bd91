"""The methods of losses.py in TRL 1.16's GRPOTrainer, by name. Copy this file, losses.py and
entropy.py to where your training script is; only train_on_countdown() and what follows it need
more.

    knobs = {"cov_frac": 2e-3}
    trainer = MethodTrainer(model, reward, config, data, method="clip_cov", knobs=knobs)
    trainer.train()

    pip install trl==1.16.0 -c requirements-cpu.txt
    python -m experiments.in_trl --method clip_cov --steps 60     the embedded default, in runs/
    python -m experiments.in_trl --commit                         keeps its metrics in results/
    python -m experiments.in_trl --figure                         results/in_trl.png and .md

In TRL an optimizer step is `gradient_accumulation_steps` micro-batches; `steps_per_generation`
micro-batches share a generation batch, `num_iterations` times. One step of ours is one generation
batch: METRICS_FILE, in the output folder, has a row for each, in the names of
`python diagnose.py --legend`, and `python diagnose.py FOLDER` reads it. The predicted changes of
entropy in it are those of entropy.log_entropy. TRL's own logs hold these metrics, too.

Where it is not train.py: num_tokens is the mean over the optimizer steps of a generation batch, as
in TRL's "dapo", not the count of each. Advantages are TRL's (std + 1e-4). With vLLM, its importance
weight multiplies gradients and leaves the value of the loss. A generation batch costs one forward
more than in TRL: it gives the entropies of the policy that sampled, which TRL does not keep.
"""

import argparse
import dataclasses
import inspect
import json
import os
from pathlib import Path

import torch
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import grpo_trainer

from entropy import log_entropy
from losses import CONTROLLERS, METHODS, k3, scale_gradient, token_mean

METRICS_FILE = "metrics.jsonl"
STATE_FILE = "method_state.json"  # in each checkpoint, beside trainer_state.json

# ---- what goes together --------------------------------------------------------------------------

# The tensors that a loss can ask for here.
TENSORS = (
    "token_entropy",
    "old_token_entropy",
    "ref_log_probs",
    "rewards",
    "group_accuracy",
    "num_sequences",
)
ACTS_ON_THE_MASK = "it acts on the response mask before the updates; its loss alone is GRPO's"
IMPOSSIBLE = {
    "clip_b": ACTS_ON_THE_MASK,
    "clip_v": ACTS_ON_THE_MASK,
    "aepo": "it replaces answers of the batch by others; its loss alone is GRPO's",
}
# Settings that only TRL's own loss reads, which is not used.
SETTINGS_OF_TRLS_LOSS = (
    "loss_type",
    "epsilon",
    "epsilon_high",
    "delta",
    "importance_sampling_level",
    "top_entropy_quantile",
    "entropy_coef",
    "use_adaptive_entropy",
    "off_policy_mask_threshold",
)
# TRL's metrics of a generation batch, over all ranks, and our names for them.
RENAMED = {
    "reward": "reward/mean",
    "frac_reward_zero_std": "reward/zero_std_frac",
    "completions/mean_length": "response/len_mean",
    "completions/clipped_ratio": "response/truncated_frac",
}


def keyword_arguments(function):
    """{name: default} of a loss's or a rule's; inspect.Parameter.empty where there is none."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def read_method(method, knobs):
    """Names of the tensors that the method wants, the knobs of its loss and those of its
    controller's rule, of {name: value}. ValueError if it cannot work here, or has no such knob."""
    if method not in METHODS:
        raise ValueError(f"{method} is no method. Methods: {', '.join(sorted(METHODS))}")
    if method in IMPOSSIBLE:
        raise ValueError(f"{method} does not work in TRL: {IMPOSSIBLE[method]}")
    arguments = keyword_arguments(METHODS[method])
    wanted = [name for name, default in arguments.items() if default is inspect.Parameter.empty]
    missing = [name for name in wanted if name not in TENSORS]
    if missing:
        raise ValueError(
            f"{method} does not work in TRL: it needs {', '.join(missing)}, and TRL's fused head "
            "returns only the log-prob and the entropy of a token"
        )
    of_loss = set(arguments) - set(wanted) - {"num_tokens"}
    rule = CONTROLLERS.get(method)
    of_rule = set(keyword_arguments(rule)) if rule else set()
    for name in knobs:
        if name not in of_loss | of_rule:
            known = ", ".join(sorted(of_loss | of_rule))
            raise ValueError(f"{method} has no knob {name}. It has: {known}")
    loss_knobs = {name: value for name, value in knobs.items() if name in of_loss}
    rule_knobs = {name: value for name, value in knobs.items() if name in of_rule}
    return wanted, loss_knobs, rule_knobs


def check_config(config, method, wanted):
    """ValueError if a setting would have no effect with this method, or lacks for it."""
    defaults = {field.name: field.default for field in dataclasses.fields(GRPOConfig)}
    for name in SETTINGS_OF_TRLS_LOSS:
        value = getattr(config, name)
        if value != defaults[name]:
            raise ValueError(
                f"{name}={value} is a setting of TRL's own loss, which is not used here: leave it "
                f"out and give the knobs of {method}"
            )
    needs_reference = "ref_log_probs" in wanted
    if needs_reference and config.beta == 0:
        raise ValueError(
            f"{method} needs a reference, which TRL keeps only with beta above 0: give any such "
            "beta. The coefficient is the knob kl_coef"
        )
    if config.beta != 0 and not needs_reference:
        raise ValueError(f"beta={config.beta} has no effect with {method}: use kl_loss, or beta 0")
    if method == "gspo" and config.use_vllm and config.vllm_importance_sampling_correction:
        raise ValueError(
            "gspo's ratio is the sequence's, and vLLM's importance weights per token would change "
            "it: set vllm_importance_sampling_correction=False"
        )
    micro_batches = config.steps_per_generation * config.num_iterations
    if micro_batches % config.gradient_accumulation_steps:
        raise ValueError(
            f"an optimizer step would span two generation batches: make steps_per_generation x "
            f"num_iterations, {micro_batches}, a multiple of gradient_accumulation_steps, "
            f"{config.gradient_accumulation_steps}"
        )


# ---- the trainer ---------------------------------------------------------------------------------


class RowAfterLastUpdate(TrainerCallback):
    """Ends the row of a generation batch after the last optimizer step on it, and so before TRL
    logs and saves."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **_):
        trainer = self.trainer
        if trainer._step % trainer.micro_batches_per_generation == 0:
            trainer.end_row()


class MethodTrainer(GRPOTrainer):
    """GRPOTrainer with a method of losses.py. Text models; no auxiliary loss of experts.

    model, reward_funcs, args and the others: as GRPOTrainer's. method: a name of METHODS. knobs:
    {name: value} of its loss and of its controller's rule; what is left out has its default.
    """

    def __init__(self, model, reward_funcs, args, *others, method, knobs=None, **more):
        self.method = method
        self.wanted, self.loss_knobs, self.rule_knobs = read_method(method, knobs or {})
        check_config(args, method, self.wanted)
        super().__init__(model, reward_funcs, args, *others, **more)
        if self.aux_loss_enabled:
            raise ValueError("a mixture of experts: set router_aux_loss_coef=0, it is not added")
        # A checkpoint holds the same.
        self.method_state = {
            "method": method,
            "step": 0,  # generation batches that are done
            "controller": {},
            "last_update_metrics": {},
        }
        self.micro_batches_per_generation = args.steps_per_generation * args.num_iterations
        self.rows = []
        self.row = {}
        self.update_sums = {}
        self.add_callback(RowAfterLastUpdate(self))

    # -- once per generation batch

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        per_function = super()._calculate_rewards(
            inputs, prompts, completions, completion_ids_list
        )  # of all ranks' answers, the groups side by side
        weights = self.reward_weights.to(per_function.device)
        self.rewards_of_all_ranks = (per_function * weights).nansum(dim=1)
        return per_function

    def _generate_and_score_completions(self, inputs):
        """TRL's batch, and what our methods want beside it: tensors (B, ...) and counts."""
        batch = super()._generate_and_score_completions(inputs)
        if "pixel_values" in batch:
            raise ValueError("prompts with images: MethodTrainer is for text")
        training = self.model.training
        mask = loss_mask(batch)
        with torch.no_grad():
            old_log_probs, old_token_entropy = self.log_probs_and_entropy(self.model, batch)

        rewards = self.rewards_of_all_ranks
        group_size = self.num_generations if training else self.num_generations_eval
        accuracy = (rewards > 0).float().view(-1, group_size).mean(1)
        accuracy = accuracy.repeat_interleave(group_size)
        start = self.accelerator.process_index * len(mask)
        of_this_rank = slice(start, start + len(mask))
        batch["rewards"] = rewards[of_this_rank]
        batch["group_accuracy"] = accuracy[of_this_rank]
        batch["old_token_entropy"] = old_token_entropy
        batch["num_sequences"] = self.accelerator.gather(mask.any(1).sum()).sum()
        if training:
            self.begin_row(old_log_probs, old_token_entropy, batch["advantages"], mask)
        return batch

    def begin_row(self, *tensors):
        """The metrics of a generation batch, over all ranks, and the controller's next state."""
        gathered = []
        for tensor in tensors:
            if tensor.dim() > 1:
                tensor = self.accelerator.pad_across_processes(tensor, dim=1)
            gathered.append(self.accelerator.gather(tensor))
        metrics = log_entropy(*gathered)
        for theirs, ours in RENAMED.items():
            metrics[ours] = self._metrics["train"][theirs][-1]
        state = self.method_state
        if self.method in CONTROLLERS and "entropy/response_mean" in metrics:
            state["controller"] = CONTROLLERS[self.method](
                state["controller"],
                metrics["entropy/response_mean"],
                self.state.global_step / self.state.max_steps,
                state["last_update_metrics"] | metrics,
                **self.rule_knobs,
            )
        for name, value in state["controller"].items():
            metrics[f"controller/{name}"] = value
        self.row = metrics
        self.update_sums = {}

    def end_row(self):
        """Adds the means over the updates, over all ranks, and writes the row."""
        updates = self.micro_batches_per_generation // self.args.gradient_accumulation_steps
        sums = torch.stack(list(self.update_sums.values())).double()
        means = self.accelerator.reduce(sums, reduction="mean") / updates
        update_metrics = dict(zip(self.update_sums, means.tolist()))
        state = self.method_state
        state["step"] += 1
        state["last_update_metrics"] = update_metrics
        row = self.row | update_metrics
        for name, value in row.items():
            self._metrics["train"][name].append(value)
        self.rows.append({"step": state["step"]} | row)
        if self.accelerator.is_main_process:
            file = Path(self.args.output_dir, METRICS_FILE)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    # -- once per micro-batch

    def log_probs_and_entropy(self, model, batch):
        """Of the completion's tokens, (B, T) each; TRL divides the logits by the temperature."""
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        log_probs, token_entropy, _ = self._get_per_token_logps_and_entropies(
            model,
            ids,
            attention,
            batch["completion_ids"].size(1),
            batch_size=self.args.per_device_train_batch_size,
            compute_entropy=True,
        )
        return log_probs, token_entropy

    def of_one_update(self, count):
        """The part of an optimizer step in a count of the generation batch over all ranks, divided
        by their number, as DDP averages gradients over ranks."""
        part = count.clamp(min=1.0) / self.accelerator.num_processes
        if self.model.training:  # an evaluation is not split into updates
            accumulation = self.current_gradient_accumulation_steps
            part = part * accumulation / self.args.steps_per_generation
        return part

    def _compute_loss(self, model, inputs):
        log_probs, token_entropy = self.log_probs_and_entropy(model, inputs)
        mask = loss_mask(inputs)
        num_tokens = self.of_one_update(inputs["num_items_in_batch"])
        advantages = inputs["advantages"]
        if advantages.dim() == 1:
            advantages = advantages[:, None]
        old_log_probs = inputs.get("old_per_token_logps")
        if old_log_probs is None:  # one update per generation batch
            old_log_probs = log_probs.detach()
        if "importance_sampling_ratio" in inputs:  # of vLLM's log-probs
            log_probs = scale_gradient(log_probs, inputs["importance_sampling_ratio"])
        available = {
            "token_entropy": token_entropy,
            "old_token_entropy": inputs["old_token_entropy"],
            "ref_log_probs": inputs.get("ref_per_token_logps"),
            "rewards": inputs["rewards"][:, None],
            "group_accuracy": inputs["group_accuracy"][:, None],
            "num_sequences": self.of_one_update(inputs["num_sequences"]),
        }
        loss, metrics = METHODS[self.method](
            log_probs,
            old_log_probs,
            advantages,
            mask,
            **{name: available[name] for name in self.wanted},
            **self.knobs_with_state(),
            num_tokens=num_tokens,
        )
        kl = token_mean(k3(old_log_probs, log_probs.detach(), mask), mask, num_tokens)
        metrics = {"train/loss": loss.detach(), "policy/kl_to_rollout": kl, **metrics}
        if self.model.training:
            for name, value in metrics.items():
                self.update_sums[name] = self.update_sums.get(name, 0.0) + value
        return loss

    def knobs_with_state(self):
        """The knobs of the loss, those that the controller sets taken from its state."""
        names = keyword_arguments(METHODS[self.method])
        state = self.method_state["controller"]
        return self.loss_knobs | {name: value for name, value in state.items() if name in names}

    # -- checkpoints

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
            (folder / STATE_FILE).write_text(json.dumps(self.method_state))

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        state = json.loads(Path(checkpoint, STATE_FILE).read_text())
        if state["method"] != self.method:
            raise ValueError(f"{checkpoint} is of the method {state['method']}, not {self.method}")
        self.method_state = state
        lines = Path(self.args.output_dir, METRICS_FILE).read_text().splitlines()
        self.rows = [row for row in map(json.loads, lines) if row["step"] <= state["step"]]


def loss_mask(batch):
    """(B, T) bool: the tokens that the policy produced; those of a tool's answer are not."""
    mask = batch["completion_mask"]
    if "tool_mask" in batch:
        mask = mask * batch["tool_mask"]
    return mask.bool()


# ---- the embedded default ------------------------------------------------------------------------
# What follows is train.py's embedded default in TRL, and needs the whole project. It is imported
# where it is used, so that the trainer above needs two files only.

STEPS = 60


def countdown_reward(completions, gold, **_):
    """1 for a right answer, else 0."""
    from verify import judge_countdown

    verdicts = [judge_countdown(*pair) for pair in zip(completions, gold)]
    return [float(verdict == "right") for verdict in verdicts]


def countdown_config(folder, steps, seed):
    """The settings of `train.py --model tiny`: 64 prompts, 8 answers, 4 updates of 128 answers."""
    import tiny

    settings = tiny.DEFAULTS
    group_size = 8
    updates = settings["updates_per_rollout"]
    return GRPOConfig(
        output_dir=str(folder),
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=settings["prompts_per_step"] * group_size // updates,
        gradient_accumulation_steps=1,
        steps_per_generation=updates,
        num_generations=group_size,
        max_completion_length=settings["max_response_len"],
        top_k=0,
        max_steps=steps * updates,
        learning_rate=settings["lr"],
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=10,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        seed=seed,
        report_to="none",
        save_strategy="no",
        logging_steps=updates,
        disable_tqdm=True,
    )


def countdown_data():
    """TRL's data set of train.py's problems; "gold" reaches the reward function."""
    import tiny
    from datasets import Dataset

    problems = tiny.problems("train", tiny.PROBLEMS["train"])
    rows = [{"prompt": problem.prompt, "gold": problem.answer} for problem in problems]
    return Dataset.from_list(rows)


def as_it_is(batch):
    """In place of TRL's shuffle, so that a prompt's answers are in one update, as in train.py."""
    return batch


def train_on_countdown(method, knobs, steps, seed, folder):
    """Trains the tiny base; knobs: {name: value}. Writes metrics.jsonl in the folder."""
    import tiny
    from transformers import AutoTokenizer, Qwen2ForCausalLM

    base = tiny.base_model()
    config = countdown_config(folder, steps, seed)
    if method == "kl_loss":
        config.beta = 1.0  # or TRL would keep no reference
    trainer = MethodTrainer(
        Qwen2ForCausalLM.from_pretrained(base, dtype=torch.float32),
        countdown_reward,
        config,
        countdown_data(),
        processing_class=AutoTokenizer.from_pretrained(base),
        method=method,
        knobs=knobs,
    )
    trainer.train()


def read_knobs(method, settings):
    """["cov_frac=2e-2", ...] as {name: value}, read and checked as train.py does it, with the
    embedded default's own before them."""
    before = set(os.environ)
    import tiny
    from train import parse_knobs

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if name not in before:
            os.environ.pop(name, None)  # train.py's world of one; TRL would take it for its own

    read_method(method, {})  # its refusals come before those of the knobs
    loss_knobs, rule_knobs, _ = parse_knobs(method, tiny.KNOBS.get(method, []) + settings)
    return loss_knobs | rule_knobs


PANELS = {
    "entropy/response_mean": "policy entropy (nats per token)",
    "reward/mean": "training reward (mean)",
    "policy/clip_frac": "clipped tokens (fraction)",
    "policy/selected_frac": "tokens that Clip-Cov dropped (fraction)",
}


def commit_runs(out):
    """Keeps the figure's metrics of all TRL runs in a folder, as results/in_trl.jsonl."""
    from diagnose import read_metrics
    from experiments.runs import RESULTS

    lines = []
    for run in sorted(Path(out).glob("*-trl-seed*")):
        for row in read_metrics(run):
            kept = {key: float(f"{row[key]:.4g}") for key in PANELS if key in row}
            lines.append(json.dumps({"run": run.name, "step": row["step"]} | kept) + "\n")
    (RESULTS / "in_trl.jsonl").write_text("".join(lines))


def figure_runs():
    """{label: [rows, a list per seed]} of train.py's committed runs and TRL's, the same steps."""
    from diagnose import read_runs
    from experiments.runs import RESULTS, read_committed

    runs = read_committed() | read_runs(RESULTS / "in_trl.jsonl")
    shown = {}
    for label, name in (
        ("grpo, train.py", "grpo-seed"),
        ("grpo, TRL", "grpo-trl-seed"),
        ("grpo, TRL in order", "grpo-in-order-trl-seed"),
        ("clip_cov, train.py", "clip_cov-0.02-seed"),
        ("clip_cov, TRL", "clip_cov-trl-seed"),
    ):
        seeds = [rows for run, rows in runs.items() if run.startswith(name)]
        shown[label] = [[row for row in rows if 0 < row["step"] <= STEPS] for rows in seeds]
    return shown


def figure_table(shown):
    from experiments.runs import table

    lines = []
    for label, seeds in shown.items():
        lines.append([label, len(seeds), *(means_at_the_end(seeds, key) for key in PANELS)])
    return table(["mean of the last 10 steps", "seeds", *PANELS], lines)


def draw_figure():
    """results/in_trl.png, and the table of in_trl.md."""
    from diagnose import plot_curves
    from experiments.runs import RESULTS, write_page

    shown = figure_runs()
    plot_curves(shown, RESULTS / "in_trl.png", PANELS)
    command = "`python -m experiments.in_trl --figure`"
    write_page(RESULTS / "in_trl.md", command, figure_table(shown))


def means_at_the_end(seeds, key):
    """A metric's mean over the last ten steps: of all seeds, and their range."""
    means = []
    for rows in seeds:
        values = [row[key] for row in rows[-10:] if key in row]
        if values:
            means.append(sum(values) / len(values))
    if not means:
        return "–"
    return f"{sum(means) / len(means):.3f} ({min(means):.3f} to {max(means):.3f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="grpo")
    parser.add_argument("--knobs", nargs="*", default=[], help="name=value ...")
    parser.add_argument("--steps", type=int, default=STEPS, help="generation batches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs", help="the run is OUT/METHOD-trl-seedSEED")
    parser.add_argument("--in_order", action="store_true", help="without TRL's shuffle of answers")
    parser.add_argument("--commit", action="store_true", help="keep OUT's runs in results/")
    parser.add_argument("--figure", action="store_true", help="draw results/in_trl.png of these")
    args = parser.parse_args()
    if args.commit:
        return commit_runs(args.out)
    if args.figure:
        return draw_figure()
    name = f"{args.method}-trl-seed{args.seed}"
    if args.in_order:
        grpo_trainer.shuffle_sequence_dict = as_it_is
        name = f"{args.method}-in-order-trl-seed{args.seed}"
    try:
        knobs = read_knobs(args.method, args.knobs)
    except ValueError as error:
        raise SystemExit(f"in_trl.py: error: {error}") from None
    train_on_countdown(args.method, knobs, args.steps, args.seed, Path(args.out, name))


if __name__ == "__main__":
    main()
