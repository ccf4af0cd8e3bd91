"""The methods of losses.py in TRL's trainer. TRL is not among the requirements: .ci/run installs it
after the other tests, which run without."""

import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed: .ci/run installs it")

from datasets import Dataset
from transformers import AutoTokenizer, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

import diagnose
import tiny
from experiments import in_trl, runs
from experiments.in_trl import MethodTrainer, read_method
from losses import IDLE_WITH_ONE_UPDATE, METHODS, grpo

ROOT = Path(__file__).resolve().parents[1]
GROUP = 4
REFUSED = ("clip_b", "clip_v", "aepo", "dcpo", "siren")
# Knobs with which a method differs from GRPO on the toy's few tokens, at GRPO's clip bounds.
ACTING = {
    "clip_higher": {"clip_high": 1.0},
    "entropy_bonus": {"entropy_coef": 0.1},
    "kl_loss": {"kl_coef": 1.0},
    "clip_cov": {"cov_frac": 0.2, "cov_low": 0.01, "clip_low": 0.2, "clip_high": 0.2},
    "kl_cov": {"cov_frac": 0.3},
    "steer": {"clip_high": 0.2, "dual_clip": None},
    "par": {},
    "rand_pos_clip": {"drop_frac": 0.3},
    "quadrant": {"pos_likely": 0.0, "neg_likely": 0.0},
    "w_reinforce": {},
    "entropy_advantage": {},
    "entropic": {"confident": 0.01, "target_entropy": 2.0},
    "flex_clip": {},
    "ce_gppo": {},
    "cispo": {},
    "gspo": {},
    "fork_tokens": {},
    "adaptive_entropy": {"target_entropy": 9.0, "delta": 0.1, "max_coef": 1.0},
    "aer": {"target_ratio": 2.0, "rate": 0.1, "hard_below": 1.0},
}


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch):
    """The other tests leave train.py's world of one in the environment; TRL would join it."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model with random weights, whose answers are random characters."""
    folder = str(tmp_path_factory.mktemp("base"))
    tiny.untrained_base("tiny-mini").save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)
    return folder


def has_digit(completions, **_):
    """A reward that differs within most groups of random answers."""
    return [float(any(c.isdigit() for c in completion[:2])) for completion in completions]


def config_of(folder, **settings):
    """Two micro-batches of 8 answers for an optimizer step, two optimizer steps on each generation
    batch: the second has a ratio other than 1."""
    usual = dict(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=2 * GROUP,
        gradient_accumulation_steps=2,
        num_iterations=2,
        num_generations=GROUP,
        max_completion_length=6,
        top_k=0,
        max_steps=4,
        learning_rate=2.0,
        lr_scheduler_type="constant",
        optim="sgd",
        report_to="none",
        save_strategy="no",
        logging_steps=1000,
        disable_tqdm=True,
    )
    return GRPOConfig(**(usual | settings))


def run(base, folder, method=None, knobs=None, resume=None, eval_dataset=None, **settings):
    """Trains, by TRL's own loss without a method. Returns the trainer."""
    if method == "kl_loss":
        settings["beta"] = 1.0
    prompts = [{"prompt": problem.prompt} for problem in tiny.problems("train", 32)]
    arguments = (
        Qwen2ForCausalLM.from_pretrained(base, dtype=torch.float32),
        has_digit,
        config_of(folder, **settings),
        Dataset.from_list(prompts),
        eval_dataset,
    )
    tokenizer = AutoTokenizer.from_pretrained(base)
    if method is None:
        trainer = GRPOTrainer(*arguments, processing_class=tokenizer)
    else:
        trainer = MethodTrainer(*arguments, processing_class=tokenizer, method=method, knobs=knobs)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def distance(one, other):
    """The largest difference of two trainers' weights."""
    pairs = zip(one.model.parameters(), other.model.parameters())
    return max(float((a - b).abs().max().detach()) for a, b in pairs)


@pytest.fixture(scope="module")
def plain(base, tmp_path_factory):
    return run(base, tmp_path_factory.mktemp("plain"), "grpo")


def test_grpo_is_trls_own_loss_bit_for_bit(base, tmp_path, plain):
    """With gradient accumulation and several iterations, where the clip acts."""
    theirs = run(base, tmp_path, loss_type="dapo")
    assert distance(plain, theirs) == 0.0
    start = Qwen2ForCausalLM.from_pretrained(base, dtype=torch.float32)
    moved = zip(plain.model.parameters(), start.parameters())
    assert max(float((a - b).abs().max().detach()) for a, b in moved) > 1e-2
    assert all(row["policy/clip_frac"] > 0.01 for row in plain.rows)


@pytest.mark.parametrize("method", sorted(ACTING))
def test_every_method_trains_and_differs_from_grpo(base, tmp_path, plain, method):
    trainer = run(base, tmp_path, method, ACTING[method])
    assert all(math.isfinite(value) for row in trainer.rows for value in row.values())
    assert [row["step"] for row in trainer.rows] == [1, 2]
    assert distance(trainer, plain) > 1e-4


def test_all_methods_are_tried_or_refused():
    assert {*ACTING, *REFUSED, "grpo"} == set(METHODS)


def test_one_update_per_generation_batch(base, tmp_path):
    """There TRL keeps no old log-probs, the ratio is 1, and these methods are GRPO's gradient."""
    once = dict(num_iterations=1, max_steps=2)
    plain = run(base, tmp_path, "grpo", **once)
    assert distance(plain, run(base, tmp_path, loss_type="dapo", **once)) == 0.0
    for method in (*IDLE_WITH_ONE_UPDATE, "cispo"):
        assert distance(run(base, tmp_path, method, **once), plain) < 1e-6, method
    assert distance(run(base, tmp_path, "steer", ACTING["steer"], **once), plain) > 1e-4


def spy(
    log_probs,
    old_log_probs,
    advantages,
    mask,
    *,
    token_entropy,
    old_token_entropy,
    rewards,
    group_accuracy,
    num_sequences,
    num_tokens=None,
):
    """GRPO that keeps what it was given, in spy.calls, and checks that reward and group accuracy
    are those of the rows: they give the advantage."""
    std = (group_accuracy * (1 - group_accuracy) * GROUP / (GROUP - 1)).sqrt()
    expected = (rewards - group_accuracy) / (std + 1e-4)
    assert torch.allclose(advantages, expected, atol=1e-4)
    spy.calls.append(locals())
    return grpo(log_probs, old_log_probs, advantages, mask, num_tokens=num_tokens)


def test_tensors_and_counts_are_of_the_same_answers(base, tmp_path, monkeypatch):
    """TRL shuffles the answers; spy checks the rows. The old entropy is that before the first
    update."""
    monkeypatch.setitem(METHODS, "spy", spy)
    spy.calls = []
    run(base, tmp_path, "spy", steps_per_generation=4, num_iterations=1, max_steps=2)
    assert len(spy.calls) == 4
    for call in spy.calls:
        assert call["mask"].dtype == torch.bool
        assert call["num_sequences"] == 2 * 2 * GROUP  # of one optimizer step: two micro-batches
    assert any(call["advantages"].any() for call in spy.calls)
    first, _, second, _ = spy.calls
    mask = first["mask"]
    assert torch.allclose(first["token_entropy"][mask], first["old_token_entropy"][mask], atol=1e-5)
    mask = second["mask"]
    moved = second["token_entropy"] - second["old_token_entropy"]
    assert moved[mask].abs().max() > 1e-3  # after the first update
    tokens = sum(call["mask"].sum() for call in spy.calls)
    assert all(call["num_tokens"] == tokens / 2 for call in spy.calls)


def test_an_evaluation_is_trls_own_and_moves_nothing(base, tmp_path):
    """It is neither split into updates nor a step, and adds nothing to the row that it interrupts;
    the controller stays."""
    prompts = Dataset.from_list([{"prompt": p.prompt} for p in tiny.problems("test", 4)])
    settings = dict(
        eval_dataset=prompts,
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=2 * GROUP,
        steps_per_generation=4,
        num_iterations=1,
        logging_steps=2,
    )
    theirs = run(base, tmp_path, loss_type="dapo", **settings)
    ours = run(base, tmp_path, "grpo", **settings)
    assert distance(ours, theirs) == 0.0
    losses = []
    for trainer in (ours, theirs):
        logs = trainer.state.log_history
        losses.append([entry["eval_loss"] for entry in logs if "eval_loss" in entry])
    assert losses[0] == losses[1] and len(losses[0]) == 4 and losses[0][0] != 0
    logged = [entry["loss"] for entry in ours.state.log_history if "loss" in entry]
    assert logged == pytest.approx([row["train/loss"] for row in ours.rows], rel=1e-3, abs=1e-6)
    knobs = ACTING["adaptive_entropy"]
    held = run(base, tmp_path, "adaptive_entropy", knobs, **settings)
    assert [row["controller/c"] for row in held.rows] == pytest.approx([0.1, 0.2])


def test_a_controllers_state_survives_a_resume(base, tmp_path):
    """It advances once per generation batch, is saved with the checkpoint and goes on from there;
    so do the weights and the rows."""
    knobs = ACTING["adaptive_entropy"]
    saving = dict(save_strategy="steps", save_steps=2)
    whole = run(base, tmp_path / "whole", "adaptive_entropy", knobs, max_steps=6, **saving)
    assert [row["controller/c"] for row in whole.rows] == pytest.approx([0.1, 0.2, 0.3])
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    state = json.loads((checkpoint / in_trl.STATE_FILE).read_text())
    assert state["step"] == 2 and state["controller"]["c"] == pytest.approx(0.2)
    assert state["last_update_metrics"]["train/loss"] == whole.rows[1]["train/loss"]
    again = run(
        base, tmp_path / "whole", "adaptive_entropy", knobs, str(checkpoint), max_steps=6, **saving
    )
    assert again.rows == whole.rows
    assert distance(again, whole) == 0.0
    with pytest.raises(ValueError, match="is of the method adaptive_entropy, not grpo"):
        run(base, tmp_path / "whole", "grpo", resume=str(checkpoint), max_steps=6)


def test_the_controller_reads_entropy_and_progress(base, tmp_path, monkeypatch):
    given = []

    def rule(state, entropy, progress, metrics, *, positive_weight=0.0):
        given.append((entropy, progress, metrics))
        return {"positive_weight": 0.25 * len(given)}

    monkeypatch.setitem(in_trl.CONTROLLERS, "par", rule)
    trainer = run(base, tmp_path, "par")
    assert [progress for _, progress, _ in given] == [0.0, 0.5]
    assert [entropy for entropy, _, _ in given] == [
        row["entropy/response_mean"] for row in trainer.rows
    ]
    assert "train/loss" not in given[0][2]
    assert given[1][2]["train/loss"] == trainer.rows[0]["train/loss"]
    assert trainer.knobs_with_state() == {"positive_weight": 0.5}


def test_rows_have_trls_numbers_in_our_names(base, tmp_path):
    trainer = run(base, tmp_path, "clip_cov", ACTING["clip_cov"], logging_steps=2)
    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert len(logs) == len(trainer.rows) == 2
    for log, row in zip(logs, trainer.rows):
        for theirs, ours in in_trl.RENAMED.items():
            assert log[theirs] == row[ours]
        assert log["policy/selected_frac"] == row["policy/selected_frac"] > 0.1
        assert math.isclose(log["loss"], row["train/loss"], rel_tol=1e-3, abs_tol=1e-5)


@pytest.mark.parametrize("method", REFUSED)
def test_methods_that_cannot_work_are_refused(method):
    reason = {
        "dcpo": "old_hot_log_probs, old_cold_log_probs",
        "siren": "nucleus_entropy",
        "aepo": "replaces answers",
    }.get(method, "acts on the response mask")
    with pytest.raises(ValueError, match=f"{method} does not work in TRL: .*{reason}"):
        read_method(method, {})


def test_other_refusals_come_before_the_model_is_loaded(tmp_path):
    def refused(method, knobs=None, **settings):
        with pytest.raises(ValueError) as error:
            MethodTrainer(
                "no such model",
                has_digit,
                config_of(tmp_path, **settings),
                method=method,
                knobs=knobs,
            )
        return str(error.value)

    assert "clip_bov is no method. Methods: adaptive_entropy, " in refused("clip_bov")
    assert "kl_cov has no knob cov_low. It has: cov_frac, kl_coef" in refused(
        "kl_cov", {"cov_low": 1.0}
    )
    assert "epsilon=0.3 is a setting of TRL's own loss" in refused("grpo", epsilon=0.3)
    assert "loss_type=bnpo is a setting" in refused("grpo", loss_type="bnpo")
    assert "kl_loss needs a reference" in refused("kl_loss")
    assert "beta=0.1 has no effect with grpo" in refused("grpo", beta=0.1)
    assert "would span two generation batches" in refused(
        "grpo", steps_per_generation=1, num_iterations=1
    )
    weighted = dict(use_vllm=True, vllm_importance_sampling_correction=True)
    assert "gspo's ratio is the sequence's" in refused("gspo", **weighted)


@pytest.mark.parametrize("method", ["steer", "clip_cov", "aer"])
def test_micro_batches_without_tokens_add_nothing(base, tmp_path, method):
    """Where TRL masks truncated answers, all of a micro-batch may be: here of answers of one token,
    all that are not an end of sequence."""
    cut = dict(max_completion_length=1, mask_truncated_completions=True, learning_rate=0.1)
    trainer = run(base, tmp_path, method, ACTING[method], **cut)
    assert all(math.isfinite(value) for row in trainer.rows for value in row.values())
    assert [row["step"] for row in trainer.rows] == [1, 2]
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_vllms_importance_weights_multiply_gradients(base, tmp_path, plain, monkeypatch):
    """As TRL gives them, (B, 1): a weight of 0 for all answers leaves the weights as they were."""
    prepare = MethodTrainer._prepare_inputs

    def with_weights(self, batch):
        inputs = prepare(self, batch)
        return inputs | {"importance_sampling_ratio": torch.zeros(2 * GROUP, 1)}

    monkeypatch.setattr(MethodTrainer, "_prepare_inputs", with_weights)
    still = run(base, tmp_path, "grpo")
    start = Qwen2ForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(still.model.parameters(), start.parameters()))
    assert still.rows[0]["train/loss"] != 0


def test_tokens_of_tools_are_not_learned_from():
    batch = {
        "completion_mask": torch.tensor([[1, 1, 1, 0]]),
        "tool_mask": torch.tensor([[1, 0, 1, 1]]),
    }
    assert in_trl.loss_mask(batch).tolist() == [[True, False, True, False]]


def test_the_command_writes_a_run_that_diagnose_reads(base, tmp_path, monkeypatch, capsys):
    """On the embedded problems, with the verifier's rewards and the default's own knobs."""
    monkeypatch.setattr(tiny, "base_model", lambda: base)
    monkeypatch.setitem(tiny.DEFAULTS, "prompts_per_step", 8)
    command = f"in_trl --method clip_cov --knobs cov_low=0.1 --steps 2 --out {tmp_path}"
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    in_trl.main()
    folder = tmp_path / "clip_cov-trl-seed0"
    rows = diagnose.read_metrics(folder)
    assert [row["step"] for row in rows] == [1, 2]
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["diagnose.py", str(folder)])
    diagnose.main()
    told = " ".join(capsys.readouterr().out.split())
    assert "clip_cov-trl-seed0: 2 steps; entropy" in told
    assert "The method itself chose" in told
    assert "nothing is said of it: eval/pass@1, rollout/mismatch_mean." in told
    for text, message in (
        ("--method siren", "siren does not work in TRL"),
        ("--method clip_cov --knobs cov_frac=2", "a fraction in (0, 1] is expected, not per cent"),
    ):
        monkeypatch.setattr(sys, "argv", ["in_trl", *text.split()])
        with pytest.raises(SystemExit, match="error:") as error:
            in_trl.main()
        assert message in str(error.value)


def test_in_order_a_prompts_answers_are_in_one_update(base, tmp_path, monkeypatch):
    """TRL's shuffle is off then: what --in_order compares with."""
    monkeypatch.setitem(METHODS, "spy", spy)
    shuffle = in_trl.grpo_trainer.shuffle_sequence_dict
    monkeypatch.setattr(in_trl.grpo_trainer, "shuffle_sequence_dict", shuffle)  # taken back later
    together = []
    for replaced in (shuffle, in_trl.as_it_is):
        in_trl.grpo_trainer.shuffle_sequence_dict = replaced
        spy.calls = []
        run(base, tmp_path, "spy", max_steps=2, steps_per_generation=4, num_iterations=1)
        groups = [call["advantages"].view(-1, GROUP).sum(1) for call in spy.calls]
        together.append(max(float(sums.abs().max()) for sums in groups) < 1e-3)
    assert together == [False, True]


def test_the_reward_is_our_verifiers():
    gold = json.dumps({"numbers": [3, 5, 7, 11], "target": 39})
    assert in_trl.countdown_reward(["11*(7-3)-5", "11*7"], [gold, gold]) == [1.0, 0.0]


def test_knobs_are_read_as_train_py_reads_them():
    assert in_trl.read_knobs("clip_cov", [])["cov_frac"] == 0.02  # the tiny model's own
    assert in_trl.read_knobs("clip_cov", ["cov_frac=0.1"])["cov_frac"] == 0.1
    assert in_trl.read_knobs("par", ["schedule=stage"])["schedule"] == "stage"


def test_the_committed_page_has_the_committed_runs():
    page = (ROOT / "experiments" / "results" / "in_trl.md").read_text()
    shown = in_trl.figure_runs()
    assert all(len(rows) == in_trl.STEPS for seeds in shown.values() for rows in seeds)
    assert in_trl.figure_table(shown) in page


def test_runs_are_committed_with_the_metrics_of_the_figure(tmp_path, monkeypatch):
    rows = [{"step": 1, "reward/mean": 0.123456, "train/loss": 1.0}]
    (tmp_path / "grpo-trl-seed3").mkdir()
    file = tmp_path / "grpo-trl-seed3" / in_trl.METRICS_FILE
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    in_trl.commit_runs(tmp_path)
    kept = diagnose.read_runs(tmp_path / "in_trl.jsonl")
    assert kept == {"grpo-trl-seed3": [{"step": 1, "reward/mean": 0.1235}]}


TWO_RANKS = """
import sys
import torch.distributed as dist
from experiments.test_in_trl import GROUP, METHODS, distance, run, spy
base, folder = sys.argv[1:]
settings = dict(per_device_train_batch_size=GROUP, ddp_find_unused_parameters=False)
ours = run(base, folder, "grpo", **settings)
theirs = run(base, folder, loss_type="dapo", **settings)
METHODS["spy"] = spy
spy.calls = []
run(base, folder, "spy", **settings)
num_sequences = float(spy.calls[0]["num_sequences"])
print("RESULT", distance(ours, theirs), ours.rows[0]["policy/clip_frac"], num_sequences)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_are_trls_own_too(base, tmp_path):
    """The normaliser's division by the ranks, and rewards of this rank's answers."""
    script = tmp_path / "two.py"
    script.write_text(TWO_RANKS)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*words, str(script), base, str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": ":".join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = [line.split()[1:] for line in result.stdout.splitlines() if "RESULT" in line]
    assert len(found) == 2
    for own, clipped, num_sequences in found:
        assert float(own) == 0.0
        assert float(clipped) > 0
        assert float(num_sequences) == 2 * GROUP  # two micro-batches of this rank
