"""Mutants: one line of the program is changed, and a test must turn red.

    python -m experiments.mutants                        all of them, with a bar
    python -m experiments.mutants rollout.py tiny.py     those of some files
    python -m experiments.mutants --part 1/2             every second one, for two terminals

It prints a line per file, how many there were and how many were killed, and each mutant that is
alive. The mutants of the mathematics of losses.py stand in test_all.py (MUTANTS), where a test runs
them in seconds. Those here change what connects the functions: the loop, the ranks, the files, the
flags. Each is tried on a copy of the project, in a process of its own, with the tests that its row
names.
"""

import argparse
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tqdm import tqdm

HERE = Path(__file__).resolve().parents[1]
TIME_LIMIT = 180  # seconds; a mutant that hangs counts as killed
NO_TEST_CHOSEN = 5  # pytest's exit code


def copy_of_the_project(folder):
    """The project's files in another folder; runs/, with the base policy, is shared."""
    ignore = shutil.ignore_patterns(".git", "runs", "__pycache__", ".*cache", "*.png")
    shutil.copytree(HERE, folder, ignore=ignore)
    (HERE / "runs").mkdir(exist_ok=True)
    (folder / "runs").symlink_to(HERE / "runs")


def test_in_child(folder, tests):
    """Runs pytest in the project's copy and ends this process with its exit code."""
    os.setsid()
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    for name in list(sys.modules):
        if name.split(".")[0] == "experiments":
            del sys.modules[name]  # or the tests would import the project that is not mutated
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    import pytest

    options = ["-x", "-q", "-p", "no:cacheprovider", "--rootdir", str(folder)]
    code = pytest.main([*options, *shlex.split(tests)])
    os._exit(int(code))


def run_tests(folder, tests):
    """Exit code of pytest in a forked process, which has torch imported already."""
    child = os.fork()
    if child == 0:
        test_in_child(folder, tests)
    end = time.monotonic() + TIME_LIMIT
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -signal.SIGKILL


def is_killed(file, old, new, tests):
    """Whether the tests see the mutant; ValueError if the old text is not in the file exactly once,
    or if no test is chosen."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "project"
        copy_of_the_project(folder)
        source = (folder / file).read_text()
        if source.count(old) != 1:
            raise ValueError(f"{file}: {old!r} stands there {source.count(old)} times, not once")
        (folder / file).write_text(source.replace(old, new))
        code = run_tests(folder, tests)
        if code == NO_TEST_CHOSEN:
            raise ValueError(f"{file}: {old!r}: pytest {tests} chooses no test")
        return code != 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", help="mutate these files only")
    parser.add_argument("--part", default="1/1", help="I/N: every N-th mutant, from the I-th on")
    args = parser.parse_args()
    part, parts = map(int, args.part.split("/"))
    chosen = [mutant for mutant in MUTANTS if not args.files or mutant[0] in args.files]
    chosen = chosen[part - 1 :: parts]
    import datasets  # noqa: F401  slow imports, once, before the forks
    import matplotlib.pyplot  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401

    counts = Counter()
    alive = Counter()
    for file, old, new, tests in tqdm(chosen, "mutants"):
        counts[file] += 1
        if not is_killed(file, old, new, tests):
            alive[file] += 1
            tqdm.write(f"alive: {file}: {old!r} -> {new!r}")
    for file, count in counts.items():
        print(f"{file:12} {count:4} mutants, {count - alive[file]:4} killed")
    total = counts.total()
    print(f"{'in all':12} {total:4} mutants, {total - alive.total():4} killed")
    return 1 if alive else 0


# (file, text that stands in it exactly once, what replaces it, the tests that see it)
MUTANTS = [
    # ---- train.py
    (
        "train.py",
        "if model in tiny.SIZES:\n        parser",
        'if model == "tiny":\n        parser',
        "experiments/test_flags.py -k defaults_of_the_tiny",
    ),
    (
        "train.py",
        "tiny.KNOBS.get(cfg.method, []) + cfg.knobs",
        "cfg.knobs + tiny.KNOBS.get(cfg.method, [])",
        "experiments/test_flags.py -k users_knobs",
    ),
    (
        "train.py",
        "tiny.KNOBS.get(cfg.method, []) + cfg.knobs",
        "cfg.knobs or tiny.KNOBS.get(cfg.method, [])",
        "experiments/test_flags.py -k users_knobs",
    ),
    (
        "train.py",
        "and getattr(cfg, name) != parser.get_default(name)",
        "and getattr(cfg, name)",
        "experiments/test_flags.py -k refused_on_two_ranks",
    ),
    (
        "train.py",
        "(value > 0 or value == 0 and name in MAY_BE_ZERO)",
        "(value >= 0)",
        "experiments/test_flags.py -k numbers_must_be",
    ),
    (
        "train.py",
        "(value > 0 or value == 0 and name in MAY_BE_ZERO)",
        "(value > 0 or name in MAY_BE_ZERO)",
        "experiments/test_flags.py -k numbers_must_be",
    ),
    (
        "train.py",
        "type(value) in (int, float)",
        "type(value) is int",
        "experiments/test_flags.py -k numbers_must_be",
    ),
    (
        "train.py",
        '    "steps",\n    "warmup_updates",\n',
        '    "steps",\n',
        "experiments/test_flags.py -k numbers_must_be",
    ),
    (
        "train.py",
        '"adv_norm": ("std", "none")',
        '"adv_norm": ("std", "none", "mean")',
        "experiments/test_flags.py -k refused_on_two_ranks",
    ),
    (
        "train.py",
        '(CHOICES | {"rule": ("", *RULES)}).items()',
        "CHOICES.items()",
        "experiments/test_flags.py -k refused_on_two_ranks",
    ),
    (
        "train.py",
        "    check_values(cfg)\n    cfg.engine = resolve_engine(cfg.engine, cfg.rollout_tp)\n",
        "    cfg.engine = resolve_engine(cfg.engine, cfg.rollout_tp)\n    check_values(cfg)\n",
        "experiments/test_flags.py -k rollout_tp_of_zero",
    ),
    (
        "train.py",
        "if cfg.steps and cfg.prompts_per_step %",
        "if cfg.prompts_per_step %",
        "experiments/test_flags.py -k refused_on_two_ranks",
    ),
    (
        "train.py",
        "% (ranks * cfg.updates_per_rollout):",
        "% cfg.updates_per_rollout:",
        "experiments/test_flags.py -k refused_on_two_ranks",
    ),
    (
        "train.py",
        ">= 2**28",
        "> 2**28",
        "experiments/test_flags.py -k refused_on_two_ranks",
    ),
    (
        "train.py",
        "cfg.seed * cfg.group_size >= 2",
        "cfg.seed >= 2",
        "experiments/test_flags.py -k refused_on_two_ranks",
    ),
    (
        "train.py",
        "cfg.dynamic_sampling and cfg.group_size == 1",
        "cfg.group_size == 1",
        "experiments/test_flags.py -k refused_on_two_ranks",
    ),
    (
        "train.py",
        'what = cfg.method if cfg.steps else "eval"',
        "what = cfg.method",
        "experiments/test_flags.py -k named_after_method",
    ),
    (
        "train.py",
        "parts[-2:] if is_checkpoint",
        "parts[-1:] if is_checkpoint",
        "experiments/test_flags.py -k named_after_method",
    ),
    (
        "train.py",
        ' or cfg.name.startswith(".")',
        "",
        "experiments/test_flags.py -k refused_on_two_ranks",
    ),
    (
        "train.py",
        "allow_abbrev=False",
        "allow_abbrev=True",
        "experiments/test_flags.py -k flags_are_not_abbreviated",
    ),
    (
        "train.py",
        "max_resample: int = flag(4",
        "max_resample: int = flag(3",
        "experiments/test_flags.py -k defaults_of_the_tiny",
    ),
    (
        "train.py",
        "grad_clip: float = flag(1.0",
        "grad_clip: float = flag(0.5",
        "experiments/test_flags.py -k defaults_of_the_tiny",
    ),
    (
        "train.py",
        '("gspo", "tis_cap"):',
        '("gspo", "adv_norm"):',
        "experiments/test_flags.py -k refused_on_two_ranks",
    ),
    (
        "train.py",
        "return {name: controller_state.get(name, value) for name, value in loss_knobs.items()}",
        "return loss_knobs",
        "experiments/test_flags.py -k 'masks_and_controllers and adaptive'",
    ),
    (
        "train.py",
        "for knobs in (loss_knobs, rule_knobs, mask_knobs):",
        "for knobs in (loss_knobs, rule_knobs):",
        "experiments/test_flags.py -k 'masks_and_controllers and clip_b'",
    ),
    (
        "train.py",
        "for knobs in (loss_knobs, rule_knobs, mask_knobs):",
        "for knobs in (loss_knobs, mask_knobs):",
        "experiments/test_flags.py -k controller_gets_progress",
    ),
    (
        "train.py",
        "not 0 < value <= 1:",
        "not 0 < value <= 100:",
        "experiments/test_flags.py -k refused_on_two_ranks",
    ),
    (
        "train.py",
        'for name in wanted_tensors(method):\n        if name.startswith("old_"):',
        'for name in ():\n        if name.startswith("old_"):',
        "experiments/test_steps.py -k 'recomputed_from and kl_loss'",
    ),
    (
        "train.py",
        'ref_names.append(name.removeprefix("ref_"))',
        "pass",
        "experiments/test_steps.py -k 'recomputed_from and kl_loss'",
    ),
    (
        "train.py",
        'loss_mask = batch["loss_mask"]',
        'loss_mask = batch["response_mask"]',
        "experiments/test_flags.py -k 'masks_and_controllers and clip_b'",
    ),
    (
        "train.py",
        "torch.stack([loss_mask[rows].sum(), loss",
        'torch.stack([batch["response_mask"][rows].sum(), loss',
        "experiments/test_steps.py -k 'recomputed_from and clip_b and not ranks'",
    ),
    (
        "train.py",
        "loss_mask[rows].any(1).sum()",
        "loss_mask[rows].sum()",
        "experiments/test_steps.py -k 'recomputed_from and gspo'",
    ),
    (
        "train.py",
        'log_ratio(old_log_probs, fixed["rollout_log_probs"], mask)',
        'log_ratio(fixed["rollout_log_probs"], old_log_probs, mask)',
        "experiments/test_steps.py -k mismatch_recomputed_from",
    ),
    (
        "train.py",
        ".clamp(max=cfg.tis_cap)",
        ".clamp(min=cfg.tis_cap)",
        "experiments/test_flags.py -k tis_cap_weighs",
    ),
    (
        "train.py",
        "log_probs = scale_gradient(log_probs, weight)",
        "log_probs = log_probs * weight",
        "experiments/test_flags.py -k tis_cap_weighs",
    ),
    (
        "train.py",
        "                **knobs,\n",
        "",
        "experiments/test_flags.py -k 'masks_and_controllers and quadrant'",
    ),
    (
        "train.py",
        "(loss * dist.get_world_size()).backward()",
        "loss.backward()",
        "experiments/test_steps.py -k two_ranks_recomputed_from",
    ),
    (
        "train.py",
        "and i + 1 < len(micro)",
        "and i > 0",
        "experiments/test_steps.py -k two_ranks_recomputed_from",
    ),
    (
        "train.py",
        "k3(old_log_probs, log_probs.detach(), mask)",
        "k3(log_probs.detach(), old_log_probs, mask)",
        "experiments/test_steps.py -k 'recomputed_from and grpo'",
    ),
    (
        "train.py",
        "sums.get(name, 0.0) + value",
        "value",
        "experiments/test_steps.py -k several_micro_batches_recomputed_from",
    ),
    (
        "train.py",
        "for i, micro_rows in enumerate(micro):",
        "for i, micro_rows in enumerate(micro[:1]):",
        "experiments/test_steps.py -k several_micro_batches_recomputed_from",
    ),
    (
        "train.py",
        "clip_grad_norm_(ddp_policy.parameters(), cfg.grad_clip)",
        "clip_grad_norm_(ddp_policy.parameters(), 1.0)",
        "experiments/test_flags.py -k seen_in_the_checkpoint",
    ),
    (
        "train.py",
        "sums_by_name(sums, sum_over_ranks)",
        "sums_by_name(sums)",
        "experiments/test_steps.py -k two_ranks_recomputed_from",
    ),
    (
        "train.py",
        'math.isfinite(metrics["train/grad_norm"]) and math.isfinite(metrics["train/loss"])',
        'math.isfinite(metrics["train/grad_norm"])',
        "experiments/test_flags.py -k loss_of_infinity",
    ),
    (
        "train.py",
        'math.isfinite(metrics["train/grad_norm"]) and math.isfinite(metrics["train/loss"])',
        'math.isfinite(metrics["train/loss"])',
        "experiments/test_flags.py -k skipped_update",
    ),
    (
        "train.py",
        "        optimizer.step()\n    optimizer.zero_grad()",
        "        optimizer.step()\n        optimizer.zero_grad()",
        "experiments/test_flags.py -k skipped_update",
    ),
    (
        "train.py",
        'load_sets(train_names, "train", cfg.rule)',
        'load_sets(train_names, "test", cfg.rule)',
        "experiments/test_flags.py -k users_knobs",
    ),
    (
        "train.py",
        'load_sets(eval_names, "test", cfg.rule)',
        'load_sets(eval_names, "train", cfg.rule)',
        "experiments/test_flags.py -k users_knobs",
    ),
    (
        "train.py",
        'load_sets(train_names, "train", cfg.rule)',
        'load_sets(train_names, "train")',
        "experiments/test_flags.py -k 'says_and_nothing_else and rule'",
    ),
    (
        "train.py",
        'load_sets(eval_names, "test", cfg.rule)',
        'load_sets(eval_names, "test")',
        "experiments/test_flags.py -k 'says_and_nothing_else and rule'",
    ),
    (
        "train.py",
        "dtype = getattr(torch, cfg.dtype)",
        "dtype = torch.float32",
        "experiments/test_flags.py -k policy_are_told",
    ),
    (
        "train.py",
        "max_model_len=cfg.max_prompt_len + cfg.max_response_len",
        "max_model_len=cfg.max_response_len",
        "experiments/test_flags.py -k policy_are_told",
    ),
    (
        "train.py",
        "longest = cfg.max_prompt_len + cfg.max_response_len",
        "longest = cfg.max_response_len",
        "experiments/test_flags.py -k longest_answer_may",
    ),
    (
        "train.py",
        "if longest > getattr(",
        "if longest >= getattr(",
        "experiments/test_flags.py -k longest_answer_may",
    ),
    (
        "train.py",
        "cfg.max_prompt_len, cfg.num_prompts, cfg.seed)",
        "cfg.max_prompt_len, cfg.num_prompts)",
        "experiments/test_flags.py -k what_is_sampled",
    ),
    (
        "train.py",
        "cfg.max_prompt_len, cfg.num_prompts, cfg.seed)",
        "cfg.max_prompt_len)",
        "experiments/test_flags.py -k what_is_sampled",
    ),
    (
        "train.py",
        "problems[: cfg.eval_prompts or None]",
        "problems",
        "experiments/test_flags.py -k 'says_and_nothing_else and eval_prompts'",
    ),
    (
        "train.py",
        "[(problems, prompts)] if cfg.steps else eval_sets.values()",
        "[(problems, prompts)]",
        "experiments/test_flags.py -k the_plan_reckons",
    ),
    (
        "train.py",
        "        weight_decay=cfg.weight_decay,\n",
        "",
        "experiments/test_flags.py -k seen_in_the_checkpoint",
    ),
    (
        "train.py",
        "betas=(0.9, 0.95)",
        "betas=(0.9, 0.999)",
        "experiments/test_flags.py -k seen_in_the_checkpoint",
    ),
    (
        "train.py",
        'optimizer, state.pop("optimizer"))',
        'optimizer, state.pop("optimizer"))\n        state["controller"] = {}',
        "test_all.py -k 'resume_is_bit_for_bit and par'",
    ),
    (
        "train.py",
        "reference = build_policy(base,",
        "reference = build_policy(start or base,",
        "experiments/test_flags.py -k 'resume_of_references and kl_loss'",
    ),
    (
        "train.py",
        "stop_ids = {tokenizer.eos_token_id, *ends}",
        "stop_ids = {tokenizer.eos_token_id}",
        "experiments/test_flags.py -k every_end",
    ),
    (
        "train.py",
        "stop_ids = {tokenizer.eos_token_id, *ends}",
        "stop_ids = {*ends}",
        "experiments/test_flags.py -k every_end",
    ),
    (
        "train.py",
        "        gpu_memory_utilization=cfg.rollout_gpu_memory,\n",
        "",
        "experiments/test_flags.py -k policy_are_told",
    ),
    (
        "train.py",
        "cfg.method in IDLE_WITH_ONE_UPDATE and cfg.updates_per_rollout == 1",
        "cfg.method in IDLE_WITH_ONE_UPDATE",
        "experiments/test_flags.py -k idle_with_one_update",
    ),
    (
        "train.py",
        "if eval_sets and not start:",
        "if eval_sets:",
        "experiments/test_flags.py -k 'resume_of_references and kl_loss'",
    ),
    (
        "train.py",
        "hash((cfg.seed, step, rank))",
        "hash((cfg.seed, rank))",
        "experiments/test_steps.py -k 'recomputed_from and clip_cov and not ranks'",
    ),
    (
        "train.py",
        "hash((cfg.seed, step, rank))",
        "hash((step, rank))",
        "experiments/test_steps.py -k several_micro_batches_recomputed_from",
    ),
    (
        "train.py",
        "torch.manual_seed(hash((cfg.seed, step, rank)) % 2**63)",
        "pass",
        "experiments/test_flags.py -k 'resume_of_references and clip_cov'",
    ),
    (
        "train.py",
        'engine, tokenizer, problems, prompts, state["drawn"], cfg',
        "engine, tokenizer, problems, prompts, 0, cfg",
        "experiments/test_flags.py -k when_a_run_evaluates",
    ),
    (
        "train.py",
        'answers, verdicts, state["drawn"] = sample_batch(',
        "answers, verdicts, _ = sample_batch(",
        "experiments/test_flags.py -k when_a_run_evaluates",
    ),
    (
        "train.py",
        'answers, advantages, state["controller"], cfg',
        "answers, advantages, {}, cfg",
        "experiments/test_flags.py -k aepo_mixes",
    ),
    (
        "train.py",
        "if step == cfg.record_step:",
        "if cfg.record_step and step >= cfg.record_step:",
        "experiments/test_flags.py -k when_a_run_evaluates",
    ),
    (
        "train.py",
        "progress = (step - 1) / cfg.steps",
        "progress = step / cfg.steps",
        "experiments/test_flags.py -k controller_gets_progress",
    ),
    (
        "train.py",
        'entropy = metrics["entropy/response_mean"]',
        'entropy = metrics["entropy/token_mean"]',
        "experiments/test_flags.py -k controller_gets_progress",
    ),
    (
        "train.py",
        'seen = state["last_update_metrics"] | metrics',
        "seen = metrics",
        "experiments/test_flags.py -k controller_gets_progress",
    ),
    (
        "train.py",
        "sum_over_ranks, **mask_knobs)",
        "sum_over_ranks)",
        "experiments/test_flags.py -k 'masks_and_controllers and clip_v'",
    ),
    (
        "train.py",
        '(state["updates"] + 1) / max',
        "step / max",
        "experiments/test_flags.py -k rate_warms_up",
    ),
    (
        "train.py",
        '(state["updates"] + 1) / max',
        'state["updates"] / max',
        "experiments/test_flags.py -k rate_warms_up",
    ),
    (
        "train.py",
        "warmup = min(1.0,",
        "warmup = max(1.0,",
        "experiments/test_flags.py -k rate_warms_up",
    ),
    (
        "train.py",
        'knobs = with_state(loss_knobs, state["controller"])',
        "knobs = loss_knobs",
        "experiments/test_flags.py -k 'masks_and_controllers and adaptive'",
    ),
    (
        "train.py",
        "np.array_split(np.arange(len(answers)), cfg.updates_per_rollout)",
        "np.array_split(np.arange(len(answers)), 1)",
        "experiments/test_flags.py -k rate_warms_up",
    ),
    (
        "train.py",
        "update(ddp_policy, optimizer, batch, tensors, rows.tolist(), knobs, cfg)",
        "update(ddp_policy, optimizer, batch, tensors, list(range(len(rows))), knobs, cfg)",
        "experiments/test_steps.py -k 'recomputed_from and fork'",
    ),
    (
        "train.py",
        "failures + 1 if updated is None else 0",
        "failures + 1 if updated is None else failures",
        "experiments/test_flags.py -k ten_updates",
    ),
    (
        "train.py",
        "if failures == 10:",
        "if failures == 9:",
        "experiments/test_flags.py -k ten_updates",
    ),
    (
        "train.py",
        "if failures == 10:",
        "if failures == 11:",
        "experiments/test_flags.py -k ten_updates",
    ),
    (
        "train.py",
        "for metrics in taken) / len(taken)",
        "for metrics in taken) / len(updates)",
        "experiments/test_flags.py -k skipped_update",
    ),
    (
        "train.py",
        "taken = [metrics for metrics in updates if metrics is not None]",
        "taken = [metrics for metrics in updates[:1] if metrics is not None]",
        "experiments/test_flags.py -k skipped_update",
    ),
    (
        "train.py",
        "= updates.count(None)",
        "= failures",
        "experiments/test_flags.py -k ten_updates",
    ),
    (
        "train.py",
        'self.seconds[f"time/{stage}_s"] = now - self.last',
        'self.seconds[f"time/{stage}_s"] = now - self.start',
        "experiments/test_flags.py -k times_are_those",
    ),
    (
        "train.py",
        'self.seconds["time/step_s"] = now - self.start',
        'self.seconds["time/step_s"] = self.last - self.start',
        "experiments/test_flags.py -k times_are_those",
    ),
    (
        "train.py",
        "(step % cfg.eval_every == 0 or step == cfg.steps)",
        "(step % cfg.eval_every == 0)",
        "experiments/test_flags.py -k when_a_run_evaluates",
    ),
    (
        "train.py",
        "(step % cfg.eval_every == 0 or",
        "(step % cfg.save_every == 0 or",
        "experiments/test_flags.py -k when_a_run_evaluates",
    ),
    (
        "train.py",
        "if stopped or step % cfg.save_every == 0 or step == cfg.steps:",
        "if stopped or step % cfg.save_every == 0:",
        "experiments/test_flags.py -k when_a_run_evaluates",
    ),
    (
        "train.py",
        "tokenizer, state, cfg.keep_checkpoints)",
        'tokenizer, state | {"controller": {}}, cfg.keep_checkpoints)',
        "test_all.py -k 'resume_is_bit_for_bit and par'",
    ),
    (
        "train.py",
        "state, cfg.keep_checkpoints)",
        "state, 2)",
        "experiments/test_flags.py -k when_a_run_evaluates",
    ),
    (
        "train.py",
        "        engine.push_weights(full_tensors(policy.model))\n        watch",
        "        watch",
        "experiments/test_flags.py -k newest_weights",
    ),
    (
        "train.py",
        "        engine.sleep()\n",
        "",
        "experiments/test_flags.py -k policy_are_told",
    ),
    (
        "train.py",
        "        engine.wake()\n",
        "",
        "experiments/test_flags.py -k policy_are_told",
    ),
    (
        "train.py",
        "    engine.close()\n",
        "",
        "experiments/test_flags.py -k policy_are_told",
    ),
    (
        "train.py",
        "return {name: controller_state.get(name, value) for name, value in loss_knobs.items()}",
        "return dict(loss_knobs)",
        "experiments/test_metrics.py -k 'test_what_the_methods_report'",
    ),
    (
        "train.py",
        'rule(state["controller"], entropy, progress, seen, **rule_knobs)',
        "rule({}, entropy, progress, seen, **rule_knobs)",
        "experiments/test_metrics.py -k 'test_a_controllers_trajectory'",
    ),
    (
        "train.py",
        "entropy, progress, seen, **rule_knobs)",
        "entropy, progress, seen)",
        "experiments/test_metrics.py -k 'test_a_controllers_trajectory'",
    ),
    (
        "train.py",
        "state = load_checkpoint(start) if start else first_state()",
        'state = load_checkpoint(start) | {"controller": {}} if start else first_state()',
        "test_all.py -k 'test_resume_is_bit_for_bit and siren'",
    ),
    (
        "train.py",
        "save_checkpoint(folder, policy, optimizer, tokenizer, state, cfg.keep_checkpoints)",
        "save_checkpoint(folder, policy, optimizer, tokenizer, state | "
        '{"controller": {}}, cfg.keep_checkpoints)',
        "test_all.py -k 'test_resume_is_bit_for_bit and siren'",
    ),
    (
        "train.py",
        "{name: value for name, value in loss_knobs.items() if name not in set_by_controller}",
        "dict(loss_knobs)",
        "experiments/test_metrics.py -k 'test_knobs_are_read_by'",
    ),
    (
        "train.py",
        '{"reward/mean": 0.5, "entropy/peak_mean": 1.0}',
        '{"reward/mean": 0.5}',
        "experiments/test_metrics.py -k 'test_knobs_are_read_by'",
    ),
    (
        "train.py",
        "CONTROLLERS[method]({}, 1.0, 0.0, metrics, **rule_knobs)",
        "CONTROLLERS[method]({}, 1.0, 0.0, metrics)",
        "experiments/test_metrics.py -k 'test_knobs_are_read_by'",
    ),
    (
        "train.py",
        "not 0 < value <= 1:",
        "not 0 <= value <= 1:",
        "experiments/test_metrics.py -k 'test_knobs_are_read_by'",
    ),
    (
        "train.py",
        "not 0 < value <= 1:",
        "not 0 < value < 1:",
        "experiments/test_metrics.py -k 'test_knobs_are_read_by'",
    ),
    (
        "train.py",
        "value = int(text) if type(default) is int else float(text)",
        "value = float(text)",
        "experiments/test_metrics.py -k 'test_knobs_are_read_by'",
    ),
    (
        "train.py",
        'if text == "none" and name == "dual_clip":',
        'if text == "none":',
        "experiments/test_metrics.py -k 'test_knobs_are_read_by'",
    ),
    (
        "train.py",
        "if not math.isfinite(value):",
        "if math.isnan(value):",
        "experiments/test_metrics.py -k 'test_knobs_are_read_by'",
    ),
    (
        "train.py",
        ' and argument.name != "num_tokens":',
        ":",
        "experiments/test_metrics.py -k 'test_knobs_are_read_by'",
    ),
    (
        "train.py",
        '("aepo", "tis_cap"):',
        '("dcpo", "tis_cap"):',
        "experiments/test_metrics.py -k 'test_flags_that_do_not_go_with_a_method'",
    ),
    (
        "train.py",
        '("w_reinforce", "adv_norm"):',
        '("w_reinforce", "group_size"):',
        "experiments/test_metrics.py -k 'test_flags_that_do_not_go_with_a_method'",
    ),
    (
        "train.py",
        "tiny.problems(split, tiny.PROBLEMS[split])",
        'tiny.problems("train", tiny.PROBLEMS[split])',
        "experiments/test_rollouts.py -k evaluation_of_countdown",
    ),
    (
        "train.py",
        "        number = 2\n        while key in sets:",
        "        number = 1\n        while key in sets:",
        "test_all.py -k equal_names",
    ),
    # ---- rollout.py
    (
        "rollout.py",
        "sums_by_name(counts, sum_over_ranks)",
        "sums_by_name(counts)",
        "test_all.py -k two_ranks_equal_one",
    ),
    (
        "rollout.py",
        "    verdicts = Counter()\n    teaching",
        '    verdicts = vars(sample_batch).setdefault("verdicts", Counter())\n    teaching',
        "experiments/test_flags.py -k controller_gets_progress",
    ),
    (
        "rollout.py",
        "np.random.default_rng(seeds[i] + j) for i in chunk",
        "np.random.default_rng(seeds[i]) for i in chunk",
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "rollout.py",
        "np.random.default_rng(seeds[i] + j) for i in chunk",
        "np.random.default_rng(i + j) for i in chunk",
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "rollout.py",
        "padded = [[0] * (width - len(prompt)) + prompt for prompt in prompts]",
        "padded = [prompt + [0] * (width - len(prompt)) for prompt in prompts]",
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "rollout.py",
        "            for k, i in enumerate(chunk):",
        "            for k, i in enumerate(range(len(chunk))):",
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "rollout.py",
        "(ids[:k], values[:k], not end)",
        "(ids[:k], values[:k], end)",
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "rollout.py",
        "(ids[:k], values[:k], not end)",
        "(ids[: k - end], values[: k - end], not end)",
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "rollout.py",
        "log_probs.gather(-1, tokens)",
        "torch.log_softmax(logits.float(), -1).gather(-1, tokens)",
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "rollout.py",
        "(cfg.seed * 2**32 + position) * cfg.group_size for",
        "(cfg.seed * 2**32 + position) for",
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "rollout.py",
        "(cfg.seed * 2**32 + position) * cfg.group_size for",
        "position * cfg.group_size for",
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "rollout.py",
        "(cfg.seed * 2**32 + position) * cfg.group_size for",
        "(cfg.seed * 2**32 + position % cfg.prompts_per_step) * cfg.group_size for",
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "rollout.py",
        "[2**60 + i * n for i in mine]",
        "[2**60 + i for i in mine]",
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "rollout.py",
        "[2**60 + i * n for i in mine]",
        "[2**60 + i * n for i in range(len(mine))]",
        "experiments/test_rollouts.py -k two_ranks_drawn_again",
    ),
    (
        "rollout.py",
        "(cfg.seed * 2**32 + position) * cfg.group_size for",
        "(cfg.seed + position) * cfg.group_size for",
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "rollout.py",
        "epoch, offset = divmod(position, count)",
        "epoch, offset = 0, position % count",
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "rollout.py",
        "default_rng([seed, epoch]).permutation(count)",
        "default_rng([epoch]).permutation(count)",
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "rollout.py",
        "default_rng([seed, epoch]).permutation(count)",
        "default_rng(seed + epoch).permutation(count)",
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "rollout.py",
        "positions = range(drawn + rank, drawn + cfg.prompts_per_step, world)",
        "positions = range(drawn, drawn + cfg.prompts_per_step, world)",
        "experiments/test_rollouts.py -k two_ranks_drawn_again",
    ),
    (
        "rollout.py",
        "positions = range(drawn + rank, drawn + cfg.prompts_per_step, world)",
        "positions = range(drawn + rank * share, drawn + (rank + 1) * share)",
        "experiments/test_rollouts.py -k two_ranks_drawn_again",
    ),
    (
        "rollout.py",
        "drawn += cfg.prompts_per_step",
        "drawn += share",
        "experiments/test_rollouts.py -k two_ranks_drawn_again",
    ),
    (
        "rollout.py",
        "1 + cfg.max_resample if cfg.dynamic_sampling else 1",
        "cfg.max_resample if cfg.dynamic_sampling else 1",
        "experiments/test_rollouts.py -k resampled_and_second_answers",
    ),
    (
        "rollout.py",
        "    return len(rewards) == 1\n",
        "    return 1.0 not in rewards\n",
        "experiments/test_rollouts.py -k resampled_and_second_answers",
    ),
    (
        "rollout.py",
        "if sum_over_ranks(torch.tensor(missing)) == 0:",
        "if missing == 0:",
        "experiments/test_rollouts.py -k two_ranks_drawn_again",
    ),
    (
        "rollout.py",
        "missing = max(0, share - len(teaching))",
        "missing = share - len(teaching)",
        "experiments/test_rollouts.py -k two_ranks_drawn_again",
    ),
    (
        "rollout.py",
        "if sum_over_ranks(torch.tensor(missing)) == 0:",
        "if sum_over_ranks(torch.tensor(share - len(teaching))) <= 0:",
        "experiments/test_rollouts.py -k two_ranks_drawn_again",
    ),
    (
        "rollout.py",
        "groups = (teaching + flat)[:share]",
        "groups = (flat + teaching)[:share]",
        "experiments/test_rollouts.py -k resampled_and_second_answers",
    ),
    (
        "rollout.py",
        "groups = (teaching + flat)[:share]",
        "groups = (teaching + flat)[-share:]",
        "experiments/test_rollouts.py -k resampled_and_second_answers",
    ),
    (
        "rollout.py",
        'groups.sort(key=lambda group: group[0]["seed"])',
        "pass",
        "experiments/test_rollouts.py -k resampled_and_second_answers",
    ),
    (
        "rollout.py",
        "temperature=cfg.temperature,\n",
        "temperature=1.0,\n",
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "rollout.py",
        '"seed": seeds[i],',
        '"seed": seeds[i] + row % n,',
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "rollout.py",
        "right = sum(scores[row].reward > 0 for row in rows)",
        "right = sum(one.reward > 0 for one in scores[i :: len(problems)])",
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "rollout.py",
        "right = sum(scores[row].reward > 0 for row in rows)",
        "right = n * any(scores[row].reward > 0 for row in rows)",
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "rollout.py",
        "skip_special_tokens=True)\n",
        "skip_special_tokens=False)\n",
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "rollout.py",
        "torch.log_softmax(logits.float() / temperature, dim=-1)",
        "torch.log_softmax(logits.float() * temperature, dim=-1)",
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "rollout.py",
        "uniform[:, None] * mass, right=True)",
        "uniform[:, None], right=False)",
        "test_all.py -k rare_tokens",
    ),
    (
        "rollout.py",
        "positions = (mask.cumsum(-1) - 1).clamp(min=0)",
        "positions = mask.cumsum(-1)",
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "rollout.py",
        "next_logits(token[:, None], mask.sum(-1, keepdim=True) - 1)",
        "next_logits(token[:, None], mask.sum(-1, keepdim=True))",
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "rollout.py",
        "next_logits(token[:, None], mask.sum(-1, keepdim=True) - 1)",
        "next_logits(token[:, None], mask.cumsum(-1)[:, -1:] * 0 + mask.shape[1] - 1)",
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "rollout.py",
        "(ids[:k], values[:k], not end)",
        "(ids[:k], values[:k], k == max_tokens)",
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "rollout.py",
        "last = tokens.gather(1, length[:, None] - 1)[:, 0]",
        "last = tokens[:, -1]",
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "rollout.py",
        "uniform[row, t], temperature)",
        "uniform[row, 0], temperature)",
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "rollout.py",
        "sample(logits, uniform[row, t], temperature)",
        "sample(logits, uniform[: len(row), t], temperature)",
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "rollout.py",
        "answers[: len(answers) // 4 : cfg.group_size]",
        "answers[: len(answers) // 2 : cfg.group_size]",
        "experiments/test_rollouts.py -k resampled_and_second_answers",
    ),
    (
        "rollout.py",
        "answers[: len(answers) // 4 : cfg.group_size]",
        "answers[: len(answers) // 4]",
        "experiments/test_rollouts.py -k resampled_and_second_answers",
    ),
    (
        "rollout.py",
        '[answer["seed"] + 2**61 for answer in first]',
        '[answer["seed"] for answer in first]',
        "experiments/test_rollouts.py -k resampled_and_second_answers",
    ),
    (
        "rollout.py",
        'cfg.temperature * state["second_temperature"]',
        'state["second_temperature"]',
        "experiments/test_rollouts.py -k resampled_and_second_answers",
    ),
    (
        "rollout.py",
        'cfg.temperature * state["second_temperature"]',
        'cfg.temperature / state["second_temperature"]',
        "experiments/test_rollouts.py -k resampled_and_second_answers",
    ),
    (
        "rollout.py",
        'good[: int(state["most_rows"]) // dist.get_world_size()]',
        'good[: int(state["most_rows"])]',
        "experiments/test_rollouts.py -k two_ranks_drawn_again",
    ),
    (
        "rollout.py",
        'int(len(good) * state["taken_share"])',
        "len(good)",
        "test_all.py -k replaces_half_of",
    ),
    (
        "rollout.py",
        "if A > 0.05]",
        "if A < -0.05]",
        "experiments/test_rollouts.py -k resampled_and_second_answers",
    ),
    (
        "rollout.py",
        'unknown = [math.nan] * len(answer["response"])',
        'unknown = answer["log_probs"]',
        "experiments/test_rollouts.py -k resampled_and_second_answers",
    ),
    (
        "rollout.py",
        'answers[row] = answer | {"log_probs": unknown}',
        'answers[-1 - row] = answer | {"log_probs": unknown}',
        "experiments/test_rollouts.py -k resampled_and_second_answers",
    ),
    (
        "rollout.py",
        'verdicts.update(answer["verdict"] for answer in group)\n        rewards =',
        "rewards =",
        "experiments/test_rollouts.py -k resampled_and_second_answers",
    ),
    (
        "rollout.py",
        "for power in range(n.bit_length()):",
        "for power in range(n.bit_length() - 1):",
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "rollout.py",
        "mine = range(rank, len(problems), world)",
        "mine = range(rank, len(problems) - 1, world)",
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "rollout.py",
        "temperature=cfg.eval_temperature,",
        "temperature=cfg.temperature,",
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "rollout.py",
        'sum(result["timeout"] for result in results)',
        'sum(x["timeout"] for x in results[: len(results) // dist.get_world_size()])',
        "experiments/test_rollouts.py -k two_ranks_drawn_again",
    ),
    (
        "rollout.py",
        '"timeout": answer["verdict"] == "timeout",',
        '"timeout": answer["verdict"] == "no_answer",',
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "rollout.py",
        '"log_prob": fmean(answer["log_probs"]),',
        '"log_prob": sum(answer["log_probs"]),',
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "rollout.py",
        "solved = [sum(right[i : i + n])",
        "solved = [max(right[i : i + n])",
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "rollout.py",
        'metrics["entropy"] = -fmean(log_probs)',
        'metrics["entropy"] = fmean(log_probs)',
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "rollout.py",
        'metrics["entropy"] = -fmean(log_probs)',
        'metrics["entropy"] = -np.average(log_probs, weights=[x["length"] for x in results])',
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "rollout.py",
        'metrics["len_mean"] = fmean(result',
        'metrics["len_mean"] = max(result',
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "rollout.py",
        'metrics["truncated_frac"] = fmean(result',
        'metrics["truncated_frac"] = sum(result',
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "rollout.py",
        "dist.all_gather_object(shares, my_results)",
        "shares = [[]] * world; dist.all_gather_object(shares[:], my_results)",
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "rollout.py",
        "results = [result for share in shares for result in share]",
        "results = shares[0]",
        "experiments/test_rollouts.py -k two_ranks_drawn_again",
    ),
    (
        "rollout.py",
        "[min(1.0, math.exp(log_prob)) for log_prob",
        "[math.exp(min(0.0, 2 * log_prob)) for log_prob",
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "rollout.py",
        "mismatch = (old_log_probs - rollout_log_probs)[known].abs()",
        "mismatch = (old_log_probs - rollout_log_probs)[known]",
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "rollout.py",
        "largest = max_over_ranks(mismatch.max().double())",
        "largest = -max_over_ranks(-mismatch.max().double())",
        "experiments/test_rollouts.py -k two_ranks_drawn_again",
    ),
    (
        "rollout.py",
        "largest = max_over_ranks(mismatch.max().double())",
        "largest = mismatch.max().item()",
        "experiments/test_rollouts.py -k two_ranks_drawn_again",
    ),
    (
        "rollout.py",
        'sums_by_name({"tokens": known.sum(), "mismatch": mismatch.sum()}, sum_over_ranks)',
        '{"tokens": known.sum().item(), "mismatch": mismatch.sum().item()}',
        "experiments/test_rollouts.py -k two_ranks_drawn_again",
    ),
    (
        "rollout.py",
        'known = batch["response_mask"] & ~rollout_log_probs.isnan()',
        'known = batch["response_mask"]; rollout_log_probs = rollout_log_probs.nan_to_num()',
        "experiments/test_rollouts.py -k resampled_and_second_answers",
    ),
    (
        "rollout.py",
        'sums["mismatch"] / sums["tokens"]',
        'sums["mismatch"] / len(batch["lengths"])',
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "rollout.py",
        '"reward/mean": sums["reward"] / count',
        '"reward/mean": sums["reward"] / sums["prompts"]',
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "rollout.py",
        "group_size * len(flat)",
        "len(flat)",
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "rollout.py",
        "flat = [group for group in groups if is_flat(group)]",
        'flat = [group for group in groups if not any(answer["reward"] for answer in group)]',
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "rollout.py",
        '"reward/zero_std_frac": sums["answers_in_flat_groups"] / count',
        '"reward/zero_std_frac": 1 - sums["answers_in_flat_groups"] / count',
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "rollout.py",
        '"response/len_mean": sums["tokens"] / count',
        '"response/len_mean": sums["tokens"] / sums["prompts"]',
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "rollout.py",
        '"tokens": sum(len(answer["response"]) for answer in answers)',
        '"tokens": sum(len(answer["prompt"] + answer["response"]) for answer in answers)',
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "rollout.py",
        '"response/truncated_frac": sums["truncated"] / count',
        '"response/truncated_frac": sums["truncated"] / sums["tokens"]',
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "rollout.py",
        'sums["diversity"] / sums["prompts"]',
        'sums["diversity"] / count',
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "rollout.py",
        'ngram_diversity([answer["response"] for answer in group])',
        'ngram_diversity([answer["response"] for answer in answers])',
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "rollout.py",
        "for n in range(1, longest + 1):",
        "for n in range(1, longest):",
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "rollout.py",
        "zip(*(ids[start:] for start in range(n)))",
        "zip(*(ids[:: start + 1] for start in range(n)))",
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "rollout.py",
        "mask = columns < response_lens[:, None]",
        "mask = columns <= response_lens[:, None]",
        "experiments/test_rollouts.py -k answers_become",
    ),
    (
        "rollout.py",
        "ids[i, : lengths[i]] = torch.tensor",
        "ids[i, -lengths[i] :] = torch.tensor",
        "experiments/test_rollouts.py -k answers_become",
    ),
    (
        "rollout.py",
        '"rewards": rewards[:, None] * mask',
        '"rewards": accuracy[:, None] * mask',
        "experiments/test_rollouts.py -k answers_become",
    ),
    (
        "rollout.py",
        '"advantages": advantages[:, None] * mask',
        '"advantages": rewards[:, None] * mask',
        "experiments/test_rollouts.py -k answers_become",
    ),
    (
        "rollout.py",
        '"advantages": advantages[:, None] * mask',
        '"advantages": advantages[:, None].expand(mask.shape)',
        "experiments/test_rollouts.py -k answers_become",
    ),
    (
        "rollout.py",
        "torch.zeros(len(answers), int(lengths.max()), dtype=torch.long)",
        "torch.zeros(len(answers), int(prompt_lens.max() + response_lens.max()), dtype=torch.long)",
        "experiments/test_rollouts.py -k answers_become",
    ),
    (
        "rollout.py",
        "random.setstate(python_state)",
        "pass",
        "experiments/test_rollouts.py -k leave_the_generators",
    ),
    (
        "rollout.py",
        "np.random.set_state(numpy_state)",
        "pass",
        "experiments/test_rollouts.py -k leave_the_generators",
    ),
    (
        "rollout.py",
        "    with torch.random.fork_rng(devices=devices):\n        yield",
        "    yield",
        "experiments/test_rollouts.py -k leave_the_generators",
    ),
    (
        "rollout.py",
        "os.environ.setdefault(name, str(value))",
        "os.environ[name] = str(value)",
        "experiments/test_rollouts.py -k environment_of_plain",
    ),
    (
        "rollout.py",
        "if installed and torch.cuda.is_available() else",
        "if installed or torch.cuda.is_available() else",
        "experiments/test_rollouts.py -k which_engine",
    ),
    (
        "rollout.py",
        "if installed and torch.cuda.is_available() else",
        "if installed else",
        "experiments/test_rollouts.py -k which_engine",
    ),
    (
        "rollout.py",
        "if world_size % tensor_parallel_size:",
        "if tensor_parallel_size > world_size:",
        "experiments/test_rollouts.py -k which_engine",
    ),
    (
        "rollout.py",
        'name == "torch" and tensor_parallel_size > 1',
        'name == "torch" and tensor_parallel_size > 2',
        "experiments/test_rollouts.py -k which_engine",
    ),
    (
        "rollout.py",
        "if longest + max_tokens > max_model_len:",
        "if longest + max_tokens >= max_model_len:",
        "experiments/test_rollouts.py -k what_vllm_is_asked",
    ),
    (
        "rollout.py",
        "longest = max(map(len, prompts), default=0)",
        "longest = min(map(len, prompts), default=0)",
        "experiments/test_rollouts.py -k what_vllm_is_asked",
    ),
    (
        "rollout.py",
        "seed=seed,  # answer j",
        "seed=seeds[0],  # answer j",
        "experiments/test_rollouts.py -k what_vllm_is_asked",
    ),
    (
        "rollout.py",
        "start = sum(map(len, requests[: tp.rank_in_group]))",
        "start = 0",
        "experiments/test_rollouts.py -k what_vllm_is_asked",
    ),
    (
        "rollout.py",
        'answer.finish_reason == "length" for',
        'answer.finish_reason == "stop" for',
        "experiments/test_rollouts.py -k what_vllm_is_asked",
    ),
    (
        "rollout.py",
        'logprobs_mode="processed_logprobs"',
        'logprobs_mode="raw_logprobs"',
        "experiments/test_rollouts.py -k what_vllm_is_asked",
    ),
    (
        "rollout.py",
        "        self.llm.reset_prefix_cache()",
        "        pass",
        "experiments/test_rollouts.py -k what_vllm_is_asked",
    ),
    (
        "rollout.py",
        "ignore_eos=True,",
        "ignore_eos=False,",
        "experiments/test_rollouts.py -k what_vllm_is_asked",
    ),
    (
        "rollout.py",
        "top_p=1.0,",
        "top_p=0.9,",
        "experiments/test_rollouts.py -k what_vllm_is_asked",
    ),
    (
        "rollout.py",
        "top_k=0,",
        "top_k=50,",
        "experiments/test_rollouts.py -k what_vllm_is_asked",
    ),
    (
        "rollout.py",
        "logprobs=0,  #",
        "logprobs=1,  #",
        "experiments/test_rollouts.py -k what_vllm_is_asked",
    ),
    (
        "rollout.py",
        "[found[token].logprob for token, found in steps]",
        "[next(iter(found.values())).logprob for token, found in steps]",
        "experiments/test_rollouts.py -k what_vllm_is_asked",
    ),
    (
        "rollout.py",
        'load_format="dummy"',
        'load_format="auto"',
        "experiments/test_rollouts.py -k what_vllm_is_asked",
    ),
    (
        "rollout.py",
        '"enable_chunked_prefill": False,',
        '"enable_chunked_prefill": True,',
        "experiments/test_rollouts.py -k what_vllm_is_asked",
    ),
    (
        "rollout.py",
        "with own_rng():\n            results =",
        "if True:\n            results =",
        "experiments/test_rollouts.py -k what_vllm_is_asked",
    ),
    (
        "rollout.py",
        "if self.on_gpu and not self.asleep:",
        "if not self.asleep:",
        "experiments/test_rollouts.py -k what_vllm_is_asked",
    ),
    (
        "rollout.py",
        "self.llm.sleep(level=2)",
        "self.llm.sleep(level=1)",
        "experiments/test_rollouts.py -k what_vllm_is_asked",
    ),
    (
        "rollout.py",
        '"gpu_memory_utilization": gpu_memory_utilization,\n',
        '"gpu_memory_utilization": 0.3,\n',
        "experiments/test_rollouts.py -k what_vllm_is_asked",
    ),
    (
        "rollout.py",
        '"enable_sleep_mode": True,',
        '"enable_sleep_mode": False,',
        "experiments/test_rollouts.py -k what_vllm_is_asked",
    ),
    (
        "rollout.py",
        "max_num_seqs=max_rows,",
        "max_num_seqs=256,",
        "experiments/test_rollouts.py -k what_vllm_is_asked",
    ),
    # ---- policy.py
    (
        "policy.py",
        "hidden[row, position - 1],",
        "hidden[row, position],",
        "experiments/test_metrics.py -k 'test_every_measure_of_a_step'",
    ),
    (
        "policy.py",
        "use_autocast = self.autocast != torch.float32",
        "use_autocast = False",
        "experiments/test_metrics.py -k 'test_bfloat16_is_computed_in'",
    ),
    (
        "policy.py",
        'dtype if cfg.parallel == "ddp" else torch.float32)',
        'dtype if cfg.parallel == "fsdp" else torch.float32)',
        "experiments/test_metrics.py -k 'test_bfloat16_is_computed_in'",
    ),
    (
        "policy.py",
        "policy = Policy(model, cfg.temperature,",
        "policy = Policy(model, 1.0,",
        "experiments/test_metrics.py -k 'test_every_measure_of_a_step'",
    ),
    (
        "policy.py",
        'wrong = [str(name) for name in info["missing_keys"]]',
        "wrong = []",
        "experiments/test_metrics.py -k 'test_weights_of_another_model_are_refused'",
    ),
    (
        "policy.py",
        'in info["mismatched_keys"]:',
        "in ():",
        "experiments/test_metrics.py -k 'test_weights_of_another_shape_are_refused'",
    ),
    (
        "policy.py",
        "except SafetensorError as error:",
        "except KeyError as error:",
        "experiments/test_metrics.py -k 'test_half_a_file_of_weights'",
    ),
    (
        "policy.py",
        "layer.training = True",
        "layer.train()",
        "test_all.py -k 'test_activation_checkpointing_changes_no_number'",
    ),
    (
        "policy.py",
        "longest_response = mask.sum(1).max()",
        "longest_response = mask.sum(1).min()",
        "experiments/test_metrics.py -k 'test_every_measure_of_a_step'",
    ),
    (
        "policy.py",
        "np.array_split(np.arange(len(lengths)), updates)",
        "np.array_split(np.arange(len(lengths)), 1)",
        "experiments/test_metrics.py -k 'test_the_split_of_the_batch'",
    ),
    (
        "policy.py",
        "range(0, len(lengths), cfg.group_size)",
        "range(len(lengths))",
        "experiments/test_metrics.py -k 'test_every_measure_of_a_step'",
    ),
    (
        "policy.py",
        "change = (after - entropy_before[rows, :width])",
        "change = (entropy_before[rows, :width] - after)",
        "experiments/test_metrics.py -k 'test_every_measure_of_a_step'",
    ),
    (
        "policy.py",
        "change, tokens = sum_over_ranks(sums).tolist()",
        "change, tokens = sums.tolist()",
        "experiments/test_metrics.py -k 'test_the_measures_and_the_mask_of_two_ranks'",
    ),
    (
        "policy.py",
        "dist.all_reduce(largest, op=dist.ReduceOp.MAX)",
        "dist.all_reduce(largest, op=dist.ReduceOp.MIN)",
        "experiments/test_rollouts.py -k two_ranks_drawn_again",
    ),
    (
        "policy.py",
        "    dist.all_reduce(values)\n",
        "    pass\n",
        "experiments/test_rollouts.py -k two_ranks_drawn_again",
    ),
    (
        "policy.py",
        "at_least = max_over_ranks(len(micro_batches(lengths, rows, budget)))",
        "at_least = -max_over_ranks(-len(micro_batches(lengths, rows, budget)))",
        "experiments/test_rollouts.py -k two_ranks_drawn_again",
    ),
    (
        "policy.py",
        "if batches[-1] and padded > budget:",
        "if batches[-1] and padded >= budget:",
        "experiments/test_rollouts.py -k micro_batches_by_hand",
    ),
    (
        "policy.py",
        "if batches[-1] and padded > budget:",
        "if padded > budget:",
        "experiments/test_rollouts.py -k micro_batches_by_hand",
    ),
    (
        "policy.py",
        "for row in sorted(rows, key=lambda row: lengths[row]):",
        "for row in rows:",
        "experiments/test_rollouts.py -k micro_batches_by_hand",
    ),
    (
        "policy.py",
        "padded = (len(batches[-1]) + 1) * lengths[row]",
        "padded = len(batches[-1]) * lengths[row]",
        "experiments/test_rollouts.py -k micro_batches_by_hand",
    ),
    # ---- record.py
    (
        "record.py",
        "if row.get(limit.metric, 0) > limit.above:",
        "if row.get(limit.metric, 0) >= limit.above:",
        "experiments/test_flags.py -k warnings_come_once",
    ),
    (
        "record.py",
        "if row.get(limit.metric, 0) > limit.above:",
        "if row.get(limit.metric, 0) < limit.above:",
        "experiments/test_flags.py -k warnings_come_once",
    ),
    (
        "record.py",
        "self.warned.add(cause)",
        "pass",
        "experiments/test_flags.py -k warnings_come_once",
    ),
    (
        "record.py",
        '    "engine",\n    "log_to",\n',
        '    "engine",\n    "log_to",\n    "seed",\n',
        "experiments/test_flags.py -k may_change_on_resume",
    ),
    (
        "record.py",
        '    "engine",\n    "log_to",\n',
        '    "log_to",\n',
        "experiments/test_flags.py -k may_change_on_resume",
    ),
    (
        "record.py",
        '    "out",\n    "save_every",\n',
        '    "out",\n',
        "experiments/test_flags.py -k may_change_on_resume",
    ),
    (
        "record.py",
        "sorted(found, key=step_of)",
        "sorted(found)",
        "experiments/test_flags.py -k may_change_on_resume",
    ),
    (
        "record.py",
        "if cfg.method not in CONTROLLERS:",
        "if True:",
        "experiments/test_flags.py -k may_change_on_resume",
    ),
    (
        "record.py",
        "if cfg.method not in CONTROLLERS:",
        "if False:",
        "experiments/test_flags.py -k may_change_on_resume",
    ),
    (
        "record.py",
        "if cfg.steps < done:",
        "if cfg.steps <= done:",
        "experiments/test_flags.py -k may_change_on_resume",
    ),
    (
        "record.py",
        "done = step_of(saved[-1])",
        "done = step_of(saved[0])",
        "experiments/test_flags.py -k may_change_on_resume",
    ),
    (
        "record.py",
        'set(cfg.eval_data) <= {"none"}',
        "not cfg.eval_data",
        "experiments/test_flags.py -k refused_on_two_ranks",
    ),
    (
        "record.py",
        "and (cfg.resume or checkpoints(folder))",
        "and cfg.resume",
        "experiments/test_flags.py -k overwritten_by_accident",
    ),
    (
        "record.py",
        "    if cfg.dry_run:\n        return\n",
        "",
        "experiments/test_flags.py -k refused_on_two_ranks",
    ),
    (
        "record.py",
        'and folder.exists() and not (folder / "config.json").exists()',
        'and not (folder / "config.json").exists()',
        "experiments/test_flags.py -k 'overwritten_by_accident or overwrite_leaves'",
    ),
    (
        "record.py",
        '(folder / "metrics.jsonl").exists() and not cfg.overwrite',
        '(folder / "metrics.jsonl").exists()',
        "experiments/test_flags.py -k 'overwritten_by_accident or overwrite_leaves'",
    ),
    (
        "record.py",
        "elif self.cfg.overwrite:",
        "if self.cfg.overwrite:",
        "experiments/test_flags.py -k 'resume_of_references and kl_loss'",
    ),
    (
        "record.py",
        "shutil.rmtree(self.folder, ignore_errors=True)",
        "pass",
        "experiments/test_flags.py -k overwrite_leaves",
    ),
    (
        "record.py",
        'if row["step"] <= step]',
        'if row["step"] < step]',
        "experiments/test_flags.py -k 'resume_of_references and kl_loss'",
    ),
    (
        "record.py",
        'row.get("eval/pass@1", -1) for row',
        'row.get("reward/mean", -1) for row',
        "experiments/test_flags.py -k best_evaluated",
    ),
    (
        "record.py",
        'row.get("eval/pass@1", -1) for row',
        'row.get("eval/pass@1", 0) for row',
        "experiments/test_flags.py -k best_evaluated",
    ),
    (
        "record.py",
        "best = max(saved,",
        "best = min(saved,",
        "experiments/test_flags.py -k best_evaluated",
    ),
    (
        "record.py",
        "best = max(saved,",
        "best = max(saved[::-1],",
        "experiments/test_flags.py -k best_evaluated",
    ),
    (
        "record.py",
        "for path in saved[:-keep]:",
        "for path in saved[: -keep - 1]:",
        "experiments/test_flags.py -k best_evaluated",
    ),
    (
        "record.py",
        "if path != best or scores[path] < 0:",
        "if path != best:",
        "experiments/test_flags.py -k best_evaluated",
    ),
    (
        "record.py",
        "if run != path.parent.name or step != step_of(path):",
        "if run != path.parent.name:",
        "experiments/test_flags.py -k checkpoint_of_another_step",
    ),
    (
        "record.py",
        '"reward": answer["reward"],',
        '"reward": answer["group_accuracy"],',
        "experiments/test_flags.py -k adv_norm_seen",
    ),
    (
        "record.py",
        '"seed": answer["seed"],',
        '"seed": 0,',
        "experiments/test_flags.py -k what_is_sampled",
    ),
    (
        "record.py",
        '"truncated": answer["truncated"],',
        '"truncated": False,',
        "experiments/test_flags.py -k what_is_sampled",
    ),
    (
        "record.py",
        '"log_probs": None if at_other_temperature else answer["log_probs"],',
        '"log_probs": answer["log_probs"],',
        "experiments/test_steps.py -k 'recomputed_from and aepo'",
    ),
    (
        "record.py",
        "            initial=step,\n",
        "",
        "experiments/test_flags.py -k table_and_the_bar",
    ),
    (
        "record.py",
        "entropy=f\"{row['entropy/response_mean']:.3f}\"",
        "entropy=f\"{row['entropy/token_mean']:.3f}\"",
        "experiments/test_flags.py -k table_and_the_bar",
    ),
    (
        "record.py",
        'evaluated = any(name.startswith("eval/") for name in row)',
        "evaluated = True",
        "experiments/test_flags.py -k table_and_the_bar",
    ),
    (
        "record.py",
        '"entropy": "entropy/response_mean",',
        '"entropy": "entropy/token_mean",',
        "experiments/test_flags.py -k table_and_the_bar",
    ),
    (
        "record.py",
        '"pass@8": "eval/pass@8"',
        '"pass@8": "eval/pass@4"',
        "experiments/test_flags.py -k table_and_the_bar",
    ),
    (
        "record.py",
        '"s/step": "time/step_s"',
        '"s/step": "time/rollout_s"',
        "experiments/test_flags.py -k table_and_the_bar",
    ),
    (
        "record.py",
        "max(8, len(head))",
        "max(9, len(head))",
        "experiments/test_flags.py -k table_and_the_bar",
    ),
    (
        "record.py",
        'name in ("problems", "timeout")',
        'name == "problems"',
        "experiments/test_flags.py -k evaluation_of_several_sets",
    ),
    (
        "record.py",
        "sum(values) / len(values)",
        "max(values)",
        "experiments/test_flags.py -k evaluation_of_several_sets",
    ),
    (
        "record.py",
        "if len(values) < len(sets):",
        "if not values:",
        "experiments/test_flags.py -k evaluation_of_several_sets",
    ),
    (
        "record.py",
        '"samples": cfg.eval_samples',
        '"samples": cfg.group_size',
        "experiments/test_flags.py -k when_a_run_evaluates",
    ),
    (
        "record.py",
        '"temperature": cfg.eval_temperature',
        '"temperature": cfg.temperature',
        "experiments/test_flags.py -k when_a_run_evaluates",
    ),
    (
        "record.py",
        "if len(sets) > 1:\n        for set_name",
        "if sets:\n        for set_name",
        "experiments/test_flags.py -k when_a_run_evaluates",
    ),
    (
        "record.py",
        "range(1, cfg.eval_samples.bit_length())",
        "range(1, cfg.eval_samples.bit_length() - 1)",
        "experiments/test_flags.py -k evaluation_of_several_sets",
    ),
    (
        "record.py",
        '"AUROC": "auroc",\n        "ECE": "ece",',
        '"AUROC": "ece",\n        "ECE": "auroc",',
        "experiments/test_flags.py -k evaluation_of_several_sets",
    ),
    (
        "record.py",
        'SummaryWriter(folder / "tensorboard")',
        "SummaryWriter(folder)",
        "experiments/test_flags.py -k where_metrics_are_sent",
    ),
    (
        "record.py",
        "name=cfg.name, dir=folder",
        "name=cfg.method, dir=folder",
        "experiments/test_flags.py -k where_metrics_are_sent",
    ),
    (
        "record.py",
        'run.log(row, step=row["step"])',
        'run.log(row, step=row["step"] + 1)',
        "experiments/test_flags.py -k where_metrics_are_sent",
    ),
    (
        "record.py",
        "weights = 16 * count / shards",
        "weights = 16 * count",
        "experiments/test_flags.py -k the_plan_reckons",
    ),
    (
        "record.py",
        "reference = 4 * count / shards if",
        "reference = 4 * count if",
        "experiments/test_flags.py -k the_plan_reckons",
    ),
    (
        "record.py",
        "min(max(cfg.micro_batch_tokens, longest)",
        "max(max(cfg.micro_batch_tokens, longest)",
        "experiments/test_flags.py -k the_plan_reckons",
    ),
    (
        "record.py",
        "kept = 2 * layers + 34 if cfg.activation_checkpointing else 34 * layers",
        "kept = 34 * layers",
        "experiments/test_flags.py -k the_plan_reckons",
    ),
    (
        "record.py",
        "{cfg.keep_checkpoints + 2} is needed",
        "{cfg.keep_checkpoints} is needed",
        "experiments/test_flags.py -k the_plan_reckons",
    ),
    (
        "record.py",
        "* dtype.itemsize / 2",
        "* dtype.itemsize",
        "experiments/test_flags.py -k the_plan_reckons",
    ),
    (
        "record.py",
        "dtype.itemsize * count / cfg.rollout_tp",
        "dtype.itemsize * count",
        "experiments/test_flags.py -k the_plan_reckons",
    ),
    # ---- data.py
    (
        "data.py",
        'answer.rpartition("####")[2]',
        'answer.partition("####")[2]',
        "experiments/test_rollouts.py -k test_columns",
    ),
    (
        "data.py",
        'columns.get("problem", columns.get("question"))',
        'columns.get("question", columns.get("problem"))',
        "experiments/test_rollouts.py -k test_columns",
    ),
    (
        "data.py",
        'columns.get("answer", columns.get("final_answer"))',
        'columns.get("final_answer", columns.get("answer"))',
        "experiments/test_rollouts.py -k test_columns",
    ),
    (
        "data.py",
        'if answer is None and isinstance(columns.get("solution"), str):',
        'if isinstance(columns.get("solution"), str):',
        "experiments/test_rollouts.py -k test_columns",
    ),
    (
        "data.py",
        "for key, value in row.items() if value is not None}",
        "for key, value in row.items()}",
        "experiments/test_rollouts.py -k test_columns",
    ),
    (
        "data.py",
        "columns = {key.lower(): value",
        "columns = {key: value",
        "experiments/test_rollouts.py -k test_columns",
    ),
    (
        "data.py",
        "return str(answer).strip()",
        "return str(answer)",
        "experiments/test_rollouts.py -k test_columns",
    ),
    (
        "data.py",
        '("" if rule == "countdown" else BOXED)',
        "BOXED",
        "experiments/test_rollouts.py -k distinct_problems",
    ),
    (
        "data.py",
        '"content": message["content"]} for message in prompt]',
        '"content": message["content"], **message} for message in prompt]',
        "experiments/test_rollouts.py -k distinct_problems",
    ),
    (
        "data.py",
        "json.dumps([problem.prompt, problem.answer])",
        "json.dumps([problem.prompt])",
        "experiments/test_rollouts.py -k distinct_problems",
    ),
    (
        "data.py",
        "if limit is not None and len(problems) >= limit:",
        "if limit is not None and number > limit:",
        "experiments/test_rollouts.py -k distinct_problems",
    ),
    (
        "data.py",
        "if unfit or not 0 < len(answer) <= MAX_ANSWER:",
        "if unfit or not 0 < len(answer) < MAX_ANSWER:",
        "experiments/test_rollouts.py -k rows_that_are_no",
    ),
    (
        "data.py",
        'next(s for s in ("train", "test", *data) if s in data)',
        'next(s for s in ("test", "train", *data) if s in data)',
        "experiments/test_rollouts.py -k splits_of_the_hub",
    ),
    (
        "data.py",
        'if split not in ("train", "test") and len(data) > 1:',
        "if len(data) > 2:",
        "experiments/test_rollouts.py -k splits_of_the_hub",
    ),
    (
        "data.py",
        'text = "\\n\\n".join(message',
        'text = "\\n".join(message',
        "experiments/test_rollouts.py -k prompts_as_token",
    ),
    (
        "data.py",
        "add_special_tokens=not has_bos",
        "add_special_tokens=has_bos",
        "experiments/test_rollouts.py -k prompts_as_token",
    ),
    (
        "data.py",
        "        return ids[:-1]\n",
        "        return ids\n",
        "experiments/test_rollouts.py -k prompts_as_token",
    ),
    (
        "data.py",
        "random.Random(seed).shuffle(problems)",
        "random.Random(count).shuffle(problems)",
        "experiments/test_rollouts.py -k subsets_and_prompts",
    ),
    (
        "data.py",
        "        random.Random(seed).shuffle(problems)\n        problems = problems[:count]\n",
        "        problems = problems[:count]\n        random.Random(seed).shuffle(problems)\n",
        "experiments/test_rollouts.py -k subsets_and_prompts",
    ),
    (
        "data.py",
        "if count:\n        random.Random(seed).shuffle(problems)\n        problems",
        "random.Random(seed).shuffle(problems)\n    if count:\n        problems",
        "experiments/test_rollouts.py -k subsets_and_prompts",
    ),
    (
        "data.py",
        "sum(len(prompt) > max_prompt_len for",
        "sum(len(prompt) >= max_prompt_len for",
        "experiments/test_rollouts.py -k subsets_and_prompts",
    ),
    (
        "data.py",
        "verdict = score_one(problem.rule, response, problem.answer).verdict",
        'verdict = "right" if response else "wrong"',
        "experiments/test_rollouts.py -k dry_run_judges",
    ),
    (
        "data.py",
        '(a - b, f"({x}-{y})")',
        '(b - a, f"({x}-{y})")',
        "experiments/test_rollouts.py -k dry_run_judges",
    ),
    (
        "data.py",
        "list(zip(problems, prompts))[:count]",
        "list(zip(problems, prompts))",
        "experiments/test_rollouts.py -k dry_run_judges",
    ),
    (
        "data.py",
        'if problem.rule != "countdown":\n        return',
        'if problem.rule == "math" and False:\n        return',
        "experiments/test_rollouts.py -k dry_run_judges",
    ),
    # ---- verify.py
    (
        "verify.py",
        'response.rpartition("<answer>")[2]',
        'response.partition("<answer>")[2]',
        "experiments/test_rollouts.py -k countdown_verdicts",
    ),
    (
        "verify.py",
        "return text.strip() if closed else None",
        "return text.strip()",
        "experiments/test_rollouts.py -k countdown_verdicts",
    ),
    (
        "verify.py",
        "[0-9 +*/()-]{1,200}",
        "[0-9 +*/()-]{1,199}",
        "experiments/test_rollouts.py -k countdown_verdicts",
    ),
    (
        "verify.py",
        "[0-9 +*/()-]{1,200}",
        "[0-9 +*/()-]{1,2000}",
        "experiments/test_rollouts.py -k countdown_verdicts",
    ),
    (
        "verify.py",
        'except ZeroDivisionError:\n        return "wrong"',
        'except ZeroDivisionError:\n        return "no_answer"',
        "experiments/test_rollouts.py -k countdown_verdicts",
    ),
    (
        "verify.py",
        'sorted(numbers) == sorted(gold["numbers"])',
        'set(numbers) == set(gold["numbers"])',
        "experiments/test_rollouts.py -k countdown_verdicts",
    ),
    (
        "verify.py",
        'sorted(numbers) == sorted(gold["numbers"])',
        'numbers == gold["numbers"]',
        "experiments/test_rollouts.py -k countdown_verdicts",
    ),
    (
        "verify.py",
        'sorted(numbers) == sorted(gold["numbers"])',
        'set(numbers) <= set(gold["numbers"])',
        "experiments/test_rollouts.py -k countdown_verdicts",
    ),
    (
        "verify.py",
        "if equals and result.strip() !=",
        "if result and result.strip() !=",
        "experiments/test_rollouts.py -k countdown_verdicts",
    ),
    (
        "verify.py",
        "if equals and result.strip() !=",
        "if equals and result !=",
        "experiments/test_rollouts.py -k countdown_verdicts",
    ),
    (
        "verify.py",
        "            return left - right",
        "            return right - left",
        "experiments/test_rollouts.py -k countdown_operations",
    ),
    (
        "verify.py",
        'return Score(float(judged == "right"), judged)',
        'return Score(float(judged == "right"), "right")',
        "experiments/test_rollouts.py -k rewards_are_those",
    ),
    (
        "verify.py",
        'Score(float(judged == "right"), judged)',
        'Score(float(judged != "wrong"), judged)',
        "experiments/test_rollouts.py -k rewards_are_those",
    ),
    (
        "verify.py",
        "return score_one(problem.rule, response, problem.answer)",
        "return score_one(problems[0].rule, response, problem.answer)",
        "experiments/test_rollouts.py -k rewards_are_those",
    ),
    (
        "verify.py",
        "return found in (expected, scale * expected)",
        "return found in (expected, expected / scale)",
        "experiments/test_rollouts.py -k answers_of_mathematics",
    ),
    (
        "verify.py",
        "return found in (expected, scale * expected)",
        "return found == expected",
        "experiments/test_rollouts.py -k answers_of_mathematics",
    ),
    (
        "verify.py",
        "same = without_spaces(answer).casefold() == without_spaces(gold).casefold()",
        "return sorted(without_spaces(answer).casefold()) == sorted(gold.casefold())",
        "experiments/test_rollouts.py -k answers_of_mathematics",
    ),
    (
        "verify.py",
        "return same and words(answer) == words(gold)",
        "return same",
        "test_all.py -k wrong_answers",
    ),
    (
        "verify.py",
        "return True if words(answer) == words(gold) else None",
        "return True",
        "test_all.py -k wrong_answers",
    ),
    (
        "verify.py",
        "if unit and gold_unit and unit != gold_unit and not degrees:",
        "if False:",
        "test_all.py -k wrong_answers",
    ),
    (
        "verify.py",
        "bare=not letters(expected)",
        "bare=True",
        "test_all.py -k wrong_answers",
    ),
    (
        "verify.py",
        "if len(solved_for) == 2:",
        "if False:",
        "test_all.py -k wrong_answers",
    ),
    (
        "verify.py",
        "    if names[0] != names[-1]:\n        return False\n",
        "",
        "test_all.py -k wrong_answers",
    ),
    (
        "verify.py",
        "return bool(SEVERAL_LETTERS.fullmatch(text)) and len(set(symbols)) == len(symbols)",
        "return bool(SEVERAL_LETTERS.fullmatch(text))",
        "test_all.py -k wrong_answers",
    ),
    (
        "verify.py",
        'if "degree" in its_unit and',
        'if "radian" in its_unit and',
        "test_all.py -k wrong_answers",
    ),
    (
        "verify.py",
        "                left.pop(i)\n",
        "",
        "experiments/test_rollouts.py -k answers_of_mathematics",
    ),
    (
        "verify.py",
        "        if len(found) != len(expected):\n            return False",
        "        if len(found) < len(expected):\n            return False",
        "experiments/test_rollouts.py -k another_number_of_members",
    ),
    (
        "verify.py",
        "if (answer[:1], answer[-1:], len(found)) != (gold[:1], gold[-1:], len(expected)):",
        "if len(found) != len(expected):",
        "experiments/test_rollouts.py -k answers_of_mathematics",
    ),
    (
        "verify.py",
        "(Fraction(whole or 0) + Fraction(numerator) / Fraction(denominator))",
        "Fraction(whole or 1) * Fraction(numerator) / Fraction(denominator)",
        "experiments/test_rollouts.py -k answers_of_mathematics",
    ),
    (
        "verify.py",
        "return sign * (Fraction(whole or 0) + Fraction(numerator) / Fraction(denominator))",
        "return sign * Fraction(whole or 0) + Fraction(numerator) / Fraction(denominator)",
        "experiments/test_rollouts.py -k answers_of_mathematics",
    ),
    (
        "verify.py",
        "if None not in (found_name, gold_name) and found_name != gold_name:",
        "if None not in (found_name, gold_name):",
        "experiments/test_rollouts.py -k answers_of_mathematics",
    ),
    (
        "verify.py",
        "if None not in (found_name, gold_name) and found_name != gold_name:",
        "if False:",
        "experiments/test_rollouts.py -k answers_of_mathematics",
    ),
    (
        "verify.py",
        'found += [piece.replace("\\\\pm", "+"), piece.replace("\\\\pm", "-")]',
        'found += [piece.replace("\\\\pm", "+")]',
        "experiments/test_rollouts.py -k answers_of_mathematics",
    ),
    (
        "verify.py",
        "signal.setitimer(signal.ITIMER_PROF, time_limit)",
        "pass",
        "experiments/test_rollouts.py -k worker_ends_itself",
    ),
    (
        "verify.py",
        "raise WorkerLost",
        'return "timeout"',
        "test_all.py -k a_worker_that_hangs",
    ),
    (
        "verify.py",
        '        if "." not in match[0]:\n            return match[0]',
        "        return match[0]",
        "test_all.py -k 'wrong_answers or right_answers'",
    ),
    (
        "verify.py",
        "            return value == 0\n",
        "            return abs(value) < 1e-50\n",
        "test_all.py -k 'wrong_answers or right_answers'",
    ),
    (
        "verify.py",
        "poll.poll(1000 * seconds)",
        "poll.poll(seconds)",
        "test_all.py -k a_worker_that_hangs",
    ),
    (
        "verify.py",
        "    stop_worker(worker)\n    if worker.returncode",
        "    if worker.returncode",
        "test_all.py -k a_worker_that_hangs",
    ),
    (
        "verify.py",
        "        _idle.put(worker)\n        return verdict",
        "        return verdict",
        "test_all.py -k 'a_worker_that_hangs or hostile_math'",
    ),
    (
        "verify.py",
        "return (comb(n, k) - comb(n - c, k)) / comb(n, k)",
        "return 1 - (1 - c / n) ** k",
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "verify.py",
        'found["conf_right"] - found["conf_wrong"]',
        'found["conf_wrong"] - found["conf_right"]',
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "verify.py",
        "bisect_left(of_wrong, c) + bisect_right(of_wrong, c)",
        "2 * bisect_left(of_right, c)",
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "verify.py",
        "fsum(abs(fsum(one_bin)) for one_bin in bins)",
        "abs(fsum(fsum(one_bin) for one_bin in bins))",
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    (
        "verify.py",
        "bins[min(int(10 * c), 9)]",
        "bins[min(round(10 * c), 9)]",
        "experiments/test_rollouts.py -k every_step_and_evaluation_drawn",
    ),
    # ---- tiny.py
    (
        "tiny.py",
        "updates_per_rollout=4,",
        "updates_per_rollout=8,",
        "experiments/test_flags.py -k defaults_of_the_tiny",
    ),
    (
        "tiny.py",
        '"kl_cov": ["cov_frac=2e-2"]',
        '"kl_cov": ["cov_frac=2e-4"]',
        "experiments/test_flags.py -k users_knobs",
    ),
    (
        "tiny.py",
        '"clip_v": ["most_frac=2e-2"]',
        '"clip_v": []',
        "experiments/test_flags.py -k users_knobs",
    ),
    (
        "tiny.py",
        "ROPE_THETA, TRAINING, examples, first_prompt]",
        "ROPE_THETA, examples, first_prompt]",
        "experiments/test_rollouts.py -k named_after_all",
    ),
    (
        "tiny.py",
        "SIZES[size], INIT, ROPE_THETA, TRAINING,",
        "SIZES[size], ROPE_THETA, TRAINING,",
        "experiments/test_rollouts.py -k named_after_all",
    ),
    (
        "tiny.py",
        "recipe = [VOCAB, SIZES[size], INIT,",
        "recipe = [VOCAB, SIZES, INIT,",
        "experiments/test_rollouts.py -k named_after_all",
    ),
    (
        "tiny.py",
        "SIZES[size], INIT, ROPE_THETA, TRAINING,",
        "SIZES[size], INIT, TRAINING,",
        "experiments/test_rollouts.py -k named_after_all",
    ),
    (
        "tiny.py",
        "TRAINING, examples, first_prompt]",
        "TRAINING, first_prompt]",
        "experiments/test_rollouts.py -k named_after_all",
    ),
    (
        "tiny.py",
        "TRAINING, examples, first_prompt]",
        "TRAINING, examples]",
        "experiments/test_rollouts.py -k named_after_all",
    ),
    (
        "tiny.py",
        "INIT = 0.05",
        "INIT = 0.02",
        "experiments/test_rollouts.py -k named_after_all",
    ),
    (
        "tiny.py",
        '== 0 else "train"',
        '== 1 else "train"',
        "experiments/test_rollouts.py -k 'first_solutions or evaluation_of_countdown'",
    ),
    (
        "tiny.py",
        "zlib.crc32(prompt.encode()) % 10 == 0",
        "hash(prompt) % 10 == 0",
        "experiments/test_rollouts.py -k first_solutions",
    ),
    (
        "tiny.py",
        'random.Random(f"{split} {seed}")',
        'random.Random(f"{split}")',
        "experiments/test_rollouts.py -k first_solutions",
    ),
    (
        "tiny.py",
        "return sorted(numbers), target, text",
        "return numbers, target, text",
        "experiments/test_rollouts.py -k 'first_solutions or whole_task'",
    ),
    (
        "tiny.py",
        "key=lambda part: -part[0])",
        "key=lambda part: part[0])",
        "experiments/test_rollouts.py -k whole_task",
    ),
    (
        "tiny.py",
        "NUMBERS = range(1, 14)",
        "NUMBERS = range(1, 13)",
        "experiments/test_rollouts.py -k whole_task",
    ),
    (
        "tiny.py",
        "TARGETS = range(1, 100)",
        "TARGETS = range(1, 99)",
        "experiments/test_rollouts.py -k whole_task",
    ),
    (
        "tiny.py",
        'if right_is_sum and operator != "+":',
        'if right_is_sum and operator == "*":',
        "test_all.py -k parentheses_are_needed",
    ),
    (
        "tiny.py",
        '[PAD, EOS, *"0123456789',
        '[EOS, PAD, *"0123456789',
        "experiments/test_rollouts.py -k token_is_a_character",
    ),
    (
        "tiny.py",
        "        pad_token=PAD,\n",
        "        pad_token=EOS,\n",
        "experiments/test_rollouts.py -k token_is_a_character",
    ),
    (
        "tiny.py",
        "rows.sort(key=lambda row: len(row[0]) + len(row[1]))",
        "rows.sort(key=lambda row: len(row[0]))",
        "experiments/test_rollouts.py -k of_like_lengths",
    ),
    (
        "tiny.py",
        "        rows.sort(key=lambda row: len(row[0]) + len(row[1]))\n",
        "",
        "experiments/test_rollouts.py -k of_like_lengths",
    ),
    (
        "tiny.py",
        "rng.sample(range(0, len(rows), batch), 16)",
        "range(0, len(rows), batch)",
        "experiments/test_rollouts.py -k of_like_lengths",
    ),
    (
        "tiny.py",
        "rng.sample(range(0, len(rows), batch), 16)",
        "rng.choices(range(0, len(rows), batch), k=16)",
        "experiments/test_rollouts.py -k of_like_lengths",
    ),
    (
        "tiny.py",
        'if split_of(prompt) == "train":',
        'if split_of(prompt) == "test":',
        "experiments/test_rollouts.py -k of_like_lengths",
    ),
    (
        "tiny.py",
        'if split_of(prompt) == "train":',
        "if True:",
        "experiments/test_rollouts.py -k of_like_lengths",
    ),
    (
        "tiny.py",
        "[-100] * len(prompt_ids) + answer_ids)",
        "prompt_ids + answer_ids)",
        "experiments/test_rollouts.py -k of_like_lengths",
    ),
    (
        "tiny.py",
        "batch_first=True, padding_value=-100)",
        "batch_first=True, padding_value=VOCAB[PAD])",
        "experiments/test_rollouts.py -k of_like_lengths",
    ),
    (
        "tiny.py",
        "min(warmup, cosine)",
        "max(warmup, cosine)",
        "experiments/test_rollouts.py -k trained_as_its_recipe",
    ),
    (
        "tiny.py",
        '(step + 1) / TRAINING["warmup"]',
        'step / TRAINING["warmup"]',
        "experiments/test_rollouts.py -k trained_as_its_recipe",
    ),
    (
        "tiny.py",
        "torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)",
        "pass",
        "experiments/test_rollouts.py -k trained_as_its_recipe",
    ),
    (
        "tiny.py",
        "clip_grad_norm_(model.parameters(), 1.0)",
        "clip_grad_norm_(model.parameters(), 10.0)",
        "experiments/test_rollouts.py -k trained_as_its_recipe",
    ),
    (
        "tiny.py",
        'torch.default_generator.manual_seed(TRAINING["seed"])',
        "pass",
        "experiments/test_rollouts.py -k trained_as_its_recipe",
    ),
    (
        "tiny.py",
        "optimizer.zero_grad()",
        "pass",
        "experiments/test_rollouts.py -k trained_as_its_recipe",
    ),
    (
        "tiny.py",
        "        bos_token_id=None,\n        eos_token_id=VOCAB[EOS],",
        "        bos_token_id=None,\n        eos_token_id=VOCAB[PAD],",
        "experiments/test_rollouts.py -k trained_as_its_recipe",
    ),
    (
        "tiny.py",
        "pad_token_id=VOCAB[PAD],",
        "pad_token_id=VOCAB[EOS],",
        "experiments/test_rollouts.py -k trained_as_its_recipe",
    ),
    (
        "tiny.py",
        "train=4000, test=128)",
        "train=4000, test=256)",
        "experiments/test_rollouts.py -k first_solutions",
    ),
    (
        "tiny.py",
        "train=4000, test=128)",
        "train=400, test=128)",
        "experiments/test_rollouts.py -k first_solutions",
    ),
    # ---- entropy.py
    (
        "entropy.py",
        "torch.log_softmax(log_p / temperature, 1), token)",
        "log_p / temperature, token)",
        "experiments/test_metrics.py -k 'test_what_the_methods_report'",
    ),
    (
        "entropy.py",
        "tempered_log_prob(log_p, token, 0.8)",
        "tempered_log_prob(log_p, token, 1.2)",
        "experiments/test_metrics.py -k 'test_what_the_methods_report'",
    ),
    (
        "entropy.py",
        "mass_before.detach() >= mass",
        "mass_before.detach() + ordered.exp() >= mass",
        "experiments/test_metrics.py -k 'test_what_the_methods_report'",
    ),
    (
        "entropy.py",
        "torch.log_softmax(ordered.masked_fill(outside, -1e9), 1)",
        "ordered.masked_fill(outside, -1e9)",
        "experiments/test_metrics.py -k 'test_what_the_methods_report'",
    ),
    (
        "entropy.py",
        "head(hidden).float() / temperature",
        "head(hidden).float()",
        "experiments/test_metrics.py -k 'test_every_measure_of_a_step'",
    ),
    (
        "entropy.py",
        "expected = sum_p2_log_p + token_entropy * sum_p2",
        "expected = sum_p2_log_p",
        "experiments/test_metrics.py -k 'test_every_measure_of_a_step'",
    ),
    (
        "entropy.py",
        "return -advantages * (sampled - expected)",
        "return advantages * (sampled - expected)",
        "experiments/test_metrics.py -k 'test_every_measure_of_a_step'",
    ),
    (
        "entropy.py",
        '"steer theorem": p * released',
        '"steer theorem": released',
        "experiments/test_metrics.py -k 'test_the_four_estimates'",
    ),
    (
        "entropy.py",
        '"covariance": -covariance',
        '"covariance": covariance',
        "experiments/test_metrics.py -k 'test_the_four_estimates'",
    ),
    (
        "entropy.py",
        "(1.0 - p) * (log_probs + token_entropy)",
        "(1.0 - p) * (log_probs - token_entropy)",
        "experiments/test_metrics.py -k 'test_the_four_estimates'",
    ),
    (
        "entropy.py",
        "response_mask & (advantages < 0)",
        "response_mask & (advantages <= 0)",
        "experiments/test_metrics.py -k 'test_every_measure_of_a_step'",
    ),
    (
        "entropy.py",
        "response_mask & (advantages > 0)",
        "response_mask & (advantages >= 0)",
        "experiments/test_metrics.py -k 'test_every_measure_of_a_step'",
    ),
    (
        "entropy.py",
        "likely = log_probs + token_entropy > 0",
        "likely = log_probs + token_entropy.mean() > 0",
        "experiments/test_metrics.py -k 'test_every_measure_of_a_step'",
    ),
    (
        "entropy.py",
        '"neg_likely": negative & likely,\n        "neg_rare": negative & ~likely,',
        '"neg_likely": negative & ~likely,\n        "neg_rare": negative & likely,',
        "experiments/test_metrics.py -k 'test_every_measure_of_a_step'",
    ),
    (
        "entropy.py",
        "(entropy.sum(1) / lengths.clamp(min=1)).sum()",
        "(entropy.sum(1) / lengths.max()).sum()",
        "experiments/test_metrics.py -k 'test_every_measure_of_a_step'",
    ),
    (
        "entropy.py",
        'sums["entropy_of_answers"] / sums["answers"]',
        'sums["entropy"] / tokens',
        "experiments/test_metrics.py -k 'test_every_measure_of_a_step'",
    ),
    (
        "entropy.py",
        'sums["log_prob"] / tokens',
        'sums["log_prob"] / sums["answers"]',
        "experiments/test_metrics.py -k 'test_every_measure_of_a_step'",
    ),
    (
        "entropy.py",
        "change[mask].abs().sum()",
        "change[mask].sum().abs()",
        "experiments/test_metrics.py -k 'test_every_measure_of_a_step'",
    ),
    (
        "entropy.py",
        "math.ceil(fraction * len(largest_first))",
        "int(fraction * len(largest_first))",
        "experiments/test_metrics.py -k 'test_every_measure_of_a_step'",
    ),
    (
        "entropy.py",
        "covariance[mask].sort(descending=True)",
        "covariance[mask].sort()",
        "experiments/test_metrics.py -k 'test_every_measure_of_a_step'",
    ),
    (
        "entropy.py",
        '_change"] / sums["abs_change"] if',
        '_change"] / tokens if',
        "experiments/test_metrics.py -k 'test_every_measure_of_a_step'",
    ),
    (
        "entropy.py",
        "sums = sums_by_name(sums, sum_over_ranks)\n\n    tokens =",
        "sums = sums_by_name(sums)\n\n    tokens =",
        "experiments/test_metrics.py -k 'test_the_measures_and_the_mask_of_two_ranks'",
    ),
    (
        "entropy.py",
        ".mean() * len(largest_first)",
        ".mean()",
        "experiments/test_metrics.py -k 'test_every_measure_of_a_step'",
    ),
    (
        "entropy.py",
        "(log_prob_sums / lengths).view(",
        "log_prob_sums.view(",
        "experiments/test_metrics.py -k 'test_every_measure_of_a_step'",
    ),
    (
        "entropy.py",
        "third = 1 / 3 + 1e-6",
        "third = 1 / 3 - 1e-6",
        "experiments/test_metrics.py -k 'test_every_measure_of_a_step'",
    ),
    (
        "entropy.py",
        '"hard": (accuracy > least) & (accuracy <= third)',
        '"hard": accuracy <= third',
        "experiments/test_metrics.py -k 'test_every_measure_of_a_step'",
    ),
    (
        "entropy.py",
        "(accuracy < 1 - least)",
        "(accuracy > 0)",
        "experiments/test_metrics.py -k 'test_a_controllers_trajectory'",
    ),
    (
        "entropy.py",
        "sums = sums_by_name(sums, sum_over_ranks)\n\n    metrics =",
        "sums = sums_by_name(sums)\n\n    metrics =",
        "experiments/test_metrics.py -k 'test_the_measures_and_the_mask_of_two_ranks'",
    ),
    (
        "entropy.py",
        "(log_prob_sums / lengths).view(-1, group_size)\n"
        "    advantage = advantages[:, 0].double().view(-1, group_size)",
        "(log_prob_sums / lengths).view(group_size, -1)\n"
        "    advantage = advantages[:, 0].double().view(group_size, -1)",
        "experiments/test_metrics.py -k 'test_every_measure_of_a_step'",
    ),
    # ---- diagnose.py
    (
        "diagnose.py",
        '"reward/zero_std_frac",\n        0.9,',
        '"reward/zero_std_frac",\n        0.99,',
        "experiments/test_flags.py -k warnings_come_once",
    ),
    (
        "diagnose.py",
        '"rollout/mismatch_mean",\n        0.05,',
        '"rollout/mismatch_mean",\n        0.5,',
        "experiments/test_flags.py -k warnings_come_once",
    ),
    (
        "diagnose.py",
        '"eval/timeout",\n        0,',
        '"eval/timeouts",\n        0,',
        "experiments/test_flags.py -k warnings_come_once",
    ),
    (
        "diagnose.py",
        '"ceiling": b - a',
        '"ceiling": b',
        "experiments/test_metrics.py -k 'test_the_law_the_forecast'",
    ),
    (
        "diagnose.py",
        "1 - error.var() / reward.var()",
        "1 - error.std() / reward.std()",
        "experiments/test_metrics.py -k 'test_the_law_the_forecast'",
    ),
    (
        "diagnose.py",
        "if n < 3:",
        "if n < 2:",
        "experiments/test_metrics.py -k 'test_short_and_partial'",
    ),
    (
        "diagnose.py",
        "np.ptp(entropy) == 0 or np.ptp(reward) == 0",
        "np.ptp(entropy) == 0",
        "experiments/test_metrics.py -k 'test_short_and_partial'",
    ),
    (
        "diagnose.py",
        "points = math.ceil(first * len(entropy))",
        "points = int(first * len(entropy))",
        "experiments/test_metrics.py -k 'test_the_law_the_forecast'",
    ),
    (
        "diagnose.py",
        "h = running_means(entropy[:points], smooth)\n"
        "    r = running_means(reward[:points], smooth)",
        "h = running_means(entropy, smooth)[:points]\n"
        "    r = running_means(reward, smooth)[:points]",
        "experiments/test_metrics.py -k 'test_the_law_the_forecast'",
    ),
    (
        "diagnose.py",
        'error = r_rest - (law["b"] - law["a"]',
        'error = r_rest - (law["b"] + law["a"]',
        "experiments/test_metrics.py -k 'test_the_law_the_forecast'",
    ),
    (
        "diagnose.py",
        '"error_last": error[-1]',
        '"error_last": -error[-1]',
        "experiments/test_metrics.py -k 'test_the_law_the_forecast'",
    ),
    (
        "diagnose.py",
        "(r_rest - r.mean())",
        "(r_rest - r_rest.mean())",
        "experiments/test_metrics.py -k 'test_the_law_the_forecast'",
    ),
    (
        "diagnose.py",
        'later = 0 if reward == "reward/mean" else 1',
        "later = 0",
        "experiments/test_metrics.py -k 'test_the_law_the_forecast'",
    ),
    (
        "diagnose.py",
        'steps = [row for row in rows if row["step"] > 0]',
        "steps = rows",
        "experiments/test_metrics.py -k 'test_short_and_partial'",
    ),
    (
        "diagnose.py",
        "rows = only_finite(rows)",
        "rows = list(rows)",
        "experiments/test_metrics.py -k 'test_the_diagnosis_of_a_fall'",
    ),
    (
        "diagnose.py",
        "present = metrics_in(steps) | {key for key",
        "present = metrics_in(rows) | {key for key",
        "experiments/test_metrics.py -k 'test_short_and_partial'",
    ),
    (
        "diagnose.py",
        "return [row[key] for row in rows if key in row]",
        "return [row.get(key, 0.0) for row in rows]",
        "experiments/test_metrics.py -k 'test_the_diagnosis_of_a_fall'",
    ),
    (
        "diagnose.py",
        "end = np.mean(last_tenth(values))",
        "end = values[-1]",
        "experiments/test_metrics.py -k 'test_how_much_of_a_change'",
    ),
    (
        "diagnose.py",
        "length = steps[-1] - max(steps[0] - 1, 0)",
        "length = steps[-1] - steps[0]",
        "experiments/test_metrics.py -k 'test_how_much_of_a_change'",
    ),
    (
        "diagnose.py",
        "np.interp(part * length, np.subtract(steps, steps[0]), values)",
        "np.interp(part * length, steps, values)",
        "experiments/test_metrics.py -k 'test_how_much_of_a_change'",
    ),
    (
        "diagnose.py",
        "(at_part - values[0]) / (end - values[0])",
        "(at_part - values[0]) / (values[-1] - values[0])",
        "experiments/test_metrics.py -k 'test_how_much_of_a_change'",
    ),
    (
        "diagnose.py",
        "end = float(np.mean(last_tenth(entropy)))",
        "end = entropy[-1]",
        "experiments/test_metrics.py -k 'test_the_diagnosis_of_a_fall'",
    ),
    (
        "diagnose.py",
        "if abs(change) <= 0.05 * start:",
        "if abs(change) <= 0.05:",
        "experiments/test_metrics.py -k 'test_the_diagnosis_of_a_rise'",
    ),
    (
        "diagnose.py",
        "percent(abs(change) / start)",
        "percent(abs(change) / end)",
        "experiments/test_metrics.py -k 'test_the_diagnosis_of_a_fall'",
    ),
    (
        "diagnose.py",
        "    if n > 12:\n",
        "    if n >= 12:\n",
        "experiments/test_metrics.py -k 'test_short_and_partial'",
    ),
    (
        "diagnose.py",
        "made {early} of that, the first third {third}",
        "made {third} of that, the first third {early}",
        "experiments/test_metrics.py -k 'test_the_diagnosis_of_a_fall'",
    ),
    (
        "diagnose.py",
        "return text, direction\n",
        "return text, -direction\n",
        "experiments/test_metrics.py -k 'test_the_diagnosis_of_a_rise'",
    ),
    (
        "diagnose.py",
        "        if direction == FELL:\n",
        "        if direction != HELD:\n",
        "experiments/test_metrics.py -k 'test_the_diagnosis_of_a_rise'",
    ),
    (
        "diagnose.py",
        "if direction == ROSE:\n        return max(",
        "if direction != FELL:\n        return max(",
        "experiments/test_metrics.py -k 'test_the_diagnosis_of_a_rise'",
    ),
    (
        "diagnose.py",
        "if net * direction > 0:",
        "if net < 0:",
        "experiments/test_metrics.py -k 'test_the_diagnosis_of_a_rise'",
    ),
    (
        "diagnose.py",
        "if quadrant != leading:",
        "if leading:",
        "experiments/test_metrics.py -k 'test_the_diagnosis_of_a_fall'",
    ),
    (
        "diagnose.py",
        "net = sum(shares.values())",
        "net = shares[leading]",
        "experiments/test_metrics.py -k 'test_the_diagnosis_of_a_fall'",
    ),
    (
        "diagnose.py",
        "over = sum(value > limit.above for value in values)",
        "over = sum(value >= limit.above for value in values)",
        "experiments/test_metrics.py -k 'test_the_diagnosis_of_a_fall'",
    ),
    (
        "diagnose.py",
        "largest = show(key, max(values))",
        "largest = show(key, limit.above)",
        "experiments/test_metrics.py -k 'test_the_diagnosis_of_a_fall'",
    ),
    (
        "diagnose.py",
        'if key == "rollout/mismatch_mean":',
        'if key != "rollout/mismatch_mean":',
        "experiments/test_metrics.py -k 'test_the_diagnosis_of_a_fall'",
    ),
    (
        "diagnose.py",
        'if law["a"] < 0:',
        'if law["a"] > 0:',
        "experiments/test_metrics.py -k 'test_the_diagnosis_of_a_rise'",
    ),
    (
        "diagnose.py",
        "ahead = law_forecast(entropy, reward)",
        "ahead = law_forecast(reward, entropy)",
        "experiments/test_metrics.py -k 'test_the_diagnosis_of_a_fall'",
    ),
    (
        "diagnose.py",
        "{-law['a']:+.3f} exp(H)",
        "{law['a']:+.3f} exp(H)",
        "experiments/test_metrics.py -k 'test_the_diagnosis_of_a_fall'",
    ),
    (
        "diagnose.py",
        "last = min(last_step(rows)",
        "last = max(last_step(rows)",
        "experiments/test_metrics.py -k 'test_the_comparison_of_runs'",
    ),
    (
        "diagnose.py",
        'if 0 < row["step"] <= last]',
        'if 0 < row["step"] < last]',
        "experiments/test_metrics.py -k 'test_the_comparison_of_runs'",
    ),
    (
        "diagnose.py",
        "means[name] = float(np.mean(last_tenth(entropy)))",
        "means[name] = float(np.mean(entropy))",
        "experiments/test_metrics.py -k 'test_the_comparison_of_runs'",
    ),
    (
        "diagnose.py",
        "order = sorted(entropies, key=entropies.get, reverse=True)",
        "order = sorted(entropies, key=entropies.get)",
        "experiments/test_metrics.py -k 'test_the_comparison_of_runs'",
    ),
    (
        "diagnose.py",
        "widths[quadrant] = np.ptp(",
        "widths[quadrant] = np.mean(",
        "experiments/test_metrics.py -k 'test_the_comparison_of_runs'",
    ),
    (
        "diagnose.py",
        "if len(entropies) > 1:",
        "if entropies:",
        "experiments/test_metrics.py -k 'test_the_comparison_of_runs'",
    ),
    (
        "diagnose.py",
        'if path.name == "metrics.jsonl":',
        'if path.name == "":',
        "experiments/test_metrics.py -k 'test_runs_are_named_by'",
    ),
    (
        "diagnose.py",
        "if name in loaded:",
        "if name not in loaded:",
        "experiments/test_metrics.py -k 'test_runs_are_named_by'",
    ),
    (
        "diagnose.py",
        "for path in dict.fromkeys(paths):",
        "for path in paths:",
        "experiments/test_metrics.py -k 'test_runs_are_named_by'",
    ),
    (
        "diagnose.py",
        'if method in ("", method_of(name)):',
        "if method != method_of(name):",
        "experiments/test_metrics.py -k 'test_runs_are_named_by'",
    ),
    (
        "diagnose.py",
        "folder_of(args.runs[0])",
        "folder_of(args.runs[-1])",
        "experiments/test_metrics.py -k 'test_runs_are_named_by'",
    ),
    (
        "diagnose.py",
        "return {key: title for key, title in panels.items() if key in present}",
        "return panels",
        "experiments/test_metrics.py -k 'test_runs_are_named_by'",
    ),
    (
        "diagnose.py",
        'if not line.endswith("\\n"):',
        "if not line.strip():",
        "experiments/test_metrics.py -k 'test_metrics_are_read_from'",
    ),
    (
        "diagnose.py",
        '    if file.is_dir():\n        file = file / "metrics.jsonl"\n',
        '    file = (file if file.is_dir() else file.parent) / "metrics.jsonl"\n',
        "experiments/test_metrics.py -k 'test_metrics_are_read_from'",
    ),
    (
        "diagnose.py",
        "RENAMED.get(key, key): value for",
        "key: value for",
        "experiments/test_metrics.py -k 'test_the_diagnosis_of_a_fall'",
    ),
    (
        "diagnose.py",
        're.match("[a-z_]*", label)[0]',
        're.match("[a-z]*", label)[0]',
        "experiments/test_metrics.py -k 'test_styles_tell_lines'",
    ),
    (
        "diagnose.py",
        "len(earlier) % len(LINE_STYLES)",
        "len(earlier) % 3",
        "experiments/test_metrics.py -k 'test_styles_tell_lines'",
    ),
    (
        "diagnose.py",
        "earlier = [style for style in styles.values() if style[0] == colour]",
        "earlier = [other for other in labels if COLOURS.get(method_of(other), "
        '"tab:gray") == colour]',
        "experiments/test_metrics.py -k 'test_styles_tell_lines'",
    ),
    (
        "diagnose.py",
        'COLOURS.get(method_of(label), "tab:gray")',
        'COLOURS.get(method_of(label), "tab:blue")',
        "experiments/test_metrics.py -k 'test_styles_tell_lines'",
    ),
    (
        "diagnose.py",
        "usual = 8 if 8 in ks else max(ks)",
        "usual = max(ks)",
        "experiments/test_metrics.py -k 'test_the_usual_panels'",
    ),
    (
        "diagnose.py",
        "8 if 8 in ks else max(ks)",
        "8 if 8 in ks else max(ks, key=str)",
        "experiments/test_metrics.py -k 'test_the_usual_panels'",
    ),
    (
        "diagnose.py",
        "lines = math.ceil(len(panels) / columns)",
        "lines = max(1, len(panels) // columns)",
        "experiments/test_metrics.py -k 'test_the_lines_of_a_figure'",
    ),
    (
        "diagnose.py",
        "steps = sorted(set.intersection(*(set(curve) for curve in curves)))",
        "steps = sorted(curves[0])",
        "experiments/test_metrics.py -k 'test_the_lines_of_a_figure'",
    ),
    (
        "diagnose.py",
        "values.mean(0),\n        line,",
        "values[0],\n        line,",
        "experiments/test_metrics.py -k 'test_the_lines_of_a_figure'",
    ),
    (
        "diagnose.py",
        "        values.min(0),\n",
        "        values.mean(0),\n",
        "experiments/test_metrics.py -k 'test_the_lines_of_a_figure'",
    ),
    (
        "diagnose.py",
        "axis.set_ylim(top=0)",
        "axis.set_ylim(bottom=0)",
        "experiments/test_metrics.py -k 'test_the_lines_of_a_figure'",
    ),
    (
        "diagnose.py",
        "if axis.dataLim.y0 >= 0:",
        "if True:",
        "experiments/test_metrics.py -k 'test_the_lines_of_a_figure'",
    ),
    (
        "diagnose.py",
        'marker = "o" if key.startswith("eval")',
        'marker = "o" if key.startswith("reward")',
        "experiments/test_metrics.py -k 'test_the_lines_of_a_figure'",
    ),
    (
        "diagnose.py",
        "axes.flat[len(panels) :]",
        "axes.flat[len(panels) + 1 :]",
        "experiments/test_metrics.py -k 'test_the_lines_of_a_figure'",
    ),
    (
        "diagnose.py",
        "axes[0, 0].legend(",
        "axes[-1, -1].legend(",
        "experiments/test_metrics.py -k 'test_the_lines_of_a_figure'",
    ),
    # ---- losses.py
    (
        "losses.py",
        "clipped = bounded != weight",
        "clipped = bounded == weight",
        "experiments/test_metrics.py -k 'test_clip_frac_counts'",
    ),
    (
        "losses.py",
        '"policy/selected_frac": token_mean(dropped.float(), response_mask, num_tokens)',
        '"policy/selected_frac": token_mean(dropped.float(), response_mask)',
        "experiments/test_metrics.py -k 'test_clip_frac_counts'",
    ),
    (
        "losses.py",
        "token_mean(penalised.float(), response_mask, num_tokens)",
        "token_mean((~penalised).float(), response_mask, num_tokens)",
        "experiments/test_metrics.py -k 'test_what_the_methods_report'",
    ),
    (
        "losses.py",
        '"policy/weight_mean": token_mean(weight, response_mask, num_tokens)',
        '"policy/weight_mean": token_mean(weight, response_mask)',
        "experiments/test_metrics.py -k 'test_clip_frac_counts'",
    ),
    (
        "losses.py",
        '"policy/weight_mean": token_mean(weight, response_mask, num_tokens)',
        '"policy/weight_mean": token_mean(omega, response_mask, num_tokens)',
        "experiments/test_metrics.py -k 'test_what_the_methods_report'",
    ),
    (
        "losses.py",
        'metrics["entropy/peak_mean"] = share * mean.detach()',
        'metrics["entropy/peak_mean"] = token_mean(nucleus_entropy.detach(), '
        "response_mask, num_tokens)",
        "experiments/test_metrics.py -k 'test_what_the_methods_report'",
    ),
    (
        "losses.py",
        'metrics["policy/selected_frac"] = token_mean(dropped.float()',
        'metrics["policy/selected_frac"] = token_mean(1.0 - dropped.float()',
        "experiments/test_metrics.py -k 'test_what_the_methods_report'",
    ),
    (
        "losses.py",
        "token_mean(outside.float(), response_mask",
        "token_mean(low.float(), response_mask",
        "experiments/test_metrics.py -k 'test_clip_frac_counts'",
    ),
    (
        "losses.py",
        "response_mask, num_sequences)\n"
        "    metrics = {\n"
        '        "policy/clip_frac": token_mean(clipped.float(), response_mask, '
        "num_tokens),",
        "response_mask, num_sequences)\n"
        "    metrics = {\n"
        '        "policy/clip_frac": token_mean(clipped.float(), response_mask, '
        "num_sequences),",
        "experiments/test_metrics.py -k 'test_clip_frac_counts'",
    ),
    (
        "losses.py",
        'metrics["policy/kl_to_ref"] = token_mean(token_k3.detach()',
        'metrics["policy/kl_to_ref"] = token_mean(penalty.detach()',
        "experiments/test_metrics.py -k 'test_the_penalty_and_the_metric_of_kl_loss'",
    ),
    (
        "losses.py",
        "torch.where(rewards > 0, positive_weight",
        "torch.where(advantages > 0, positive_weight",
        "experiments/test_metrics.py -k 'test_w_reinforce_goes_by_the_reward'",
    ),
    (
        "losses.py",
        "return values + weight.detach() * (log_probs - values)",
        "return values + (log_probs - values) / weight.detach()",
        "test_all.py -k 'test_scale_gradient_multiplies'",
    ),
    (
        "losses.py",
        "count, first, second = sum_over_ranks(torch.stack(sums))",
        "count, first, second = torch.stack(sums)",
        "experiments/test_metrics.py -k 'test_the_measures_and_the_mask_of_two_ranks'",
    ),
    (
        "losses.py",
        'state.get("anchor", metrics.get("entropy/peak_mean"))',
        'metrics.get("entropy/peak_mean", state.get("anchor"))',
        "experiments/test_metrics.py -k 'test_a_controllers_trajectory'",
    ),
    (
        "losses.py",
        'max(metrics["reward/mean"], 1e-6)',
        'max(1.0 - metrics["reward/mean"], 1e-6)',
        "experiments/test_metrics.py -k 'test_a_controllers_trajectory'",
    ),
    (
        "losses.py",
        "most_rows=60,",
        "most_rows=6,",
        "experiments/test_metrics.py -k 'test_a_controllers_trajectory'",
    ),
    (
        "losses.py",
        "    delta=0.05,\n",
        "    delta=0.5,\n",
        "experiments/test_metrics.py -k 'test_a_controllers_trajectory'",
    ),
    (
        "losses.py",
        '"aer": aer_alpha,',
        '"aer": adaptive_entropy_coef,',
        "experiments/test_metrics.py -k 'test_a_controllers_trajectory'",
    ),
    (
        "losses.py",
        '"clip_v": clip_v_mask',
        '"clip_v": clip_b_mask',
        "experiments/test_metrics.py -k 'test_what_the_methods_report'",
    ),
    (
        "losses.py",
        '    "flex_clip": NO_CLIP_ACTS,\n',
        "",
        "experiments/test_metrics.py -k 'test_the_first_step_of_the_idle_methods'",
    ),
]

if __name__ == "__main__":
    sys.exit(main())
