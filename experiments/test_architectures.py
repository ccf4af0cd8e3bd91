"""Models of many architectures, each through two steps of train.py: architectures.md says what
happens."""

import re

import pytest

import policy
import rollout
from diagnose import read_metrics
from experiments import architectures
from test_all import no_figures, no_process_group_left, torchrun  # noqa: F401


@pytest.mark.slow
def test_the_page_says_what_happens_to_each_architecture(no_figures):
    outcomes = architectures.outcomes_of(architectures.FAMILIES)
    assert architectures.page(outcomes) == architectures.PAGE.read_text()
    runs = {name for name, said in outcomes.items() if said == "runs"}
    assert len(runs) > 60 and {"llama", "gemma4", "qwen3_next", "mamba", "llama4"} <= runs


def test_a_few_lines_of_the_page(no_figures):
    """Those that run a line of their own in policy.py or rollout.py."""
    assert architectures.outcome(9e-5, "") == "runs"
    assert architectures.outcome(2e-4, "") != "runs"
    names = ["falcon_h1", "llama4", "mamba", "modernbert-decoder", "rwkv", "zamba2"]
    found = architectures.outcomes_of(names)
    assert [name for name, said in found.items() if said == "runs"] == names[:3]
    written = architectures.PAGE.read_text()
    for name in names[:3]:
        assert f"`{name}`," in written.split("|---|---|")[0]
    for name in names[3:]:
        assert f"|`{name}`|{found[name]}|\n" in written


@pytest.mark.parametrize("fault", ["scale", "mask", "positions"])
def test_an_architecture_that_is_scored_wrongly_shows(fault, monkeypatch, no_figures):
    """What a new architecture may do that the trainer does not know of."""
    if fault == "scale":
        monkeypatch.setattr(policy, "logit_changes", lambda config: (1.0, None))
        name = "granite"
    elif fault == "mask":  # recurrent states run through the padding
        monkeypatch.setattr(rollout, "cache_argument", lambda model: "past_key_values")
        name = "mamba"
    else:
        forward = policy.Policy.forward

        def one_too_early(self, ids, prompt_lens, *args):
            return forward(self, ids, prompt_lens - 1, *args)

        monkeypatch.setattr(policy.Policy, "forward", one_too_early)
        name = "llama"
    said = architectures.outcomes_of([name])[name]
    assert said.startswith(f"{name}: engine and trainer differ, more than rounding in float32")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3", "qwen3_next", "zamba2", "ctrl"])
def test_two_ranks_under_fsdp(name, tmp_path):
    """A model that reads images, one with recurrent states, one that leaves weights unused, one
    whose layers transformers does not name."""
    words = architectures.words_for(name, tmp_path, "--parallel", "fsdp")
    result = torchrun(2, words)
    assert result.returncode == 0, result.stderr
    rows = read_metrics(tmp_path / name)
    assert len(rows) == 2
    assert all(row["rollout/mismatch_mean"] < 1e-3 and row["train/skipped"] == 0 for row in rows)


@pytest.mark.slow
def test_every_rank_ends_where_the_trainer_scores_wrongly(tmp_path):
    result = torchrun(2, architectures.words_for("recurrent_gemma", tmp_path))
    assert result.returncode != 0
    # torchrun may end a rank that is slower than the other to end itself
    assert re.search(r"exitcode *: 2 ", result.stderr), result.stderr
    assert result.stderr.count("train.py: error: recurrent_gemma: engine and trainer differ") == 1
    assert "Error:" not in result.stderr.split("train.py: error:")[0]
    assert not read_metrics(tmp_path / "recurrent_gemma")
