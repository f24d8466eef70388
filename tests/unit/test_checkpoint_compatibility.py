"""Which keys may change between save and resume."""

from pathlib import Path

import pytest

from megatron_muloco.checkpoint.changes import (
    FIXED_KEYS,
    NAMED_CHANGES,
    Differences,
    differences,
    model_differences,
    refusal,
)
from megatron_muloco.config.schema import CheckpointConfig

PAGE = Path(__file__).parents[2] / "docs" / "concepts" / "checkpoints.md"
CONFIG = {
    "model": {"num_layers": 2, "init": "muloco"},
    "parallel": {"num_replicas": 2, "tensor_model_parallel_size": 1},
    "data": {"seed": 42},
    "inner": {"kind": "muon", "lr": 0.02, "muon": {"momentum": 0.9}},
    "outer": {"kind": "nesterov", "sync_interval": 30, "fragments": {"count": 1}},
}


def changed(section: str, **keys: object) -> dict[str, object]:
    return {**CONFIG, section: {**CONFIG[section], **keys}}


@pytest.mark.parametrize(
    "current",
    [
        CONFIG,
        changed("inner", lr=0.01),
        changed("parallel", tensor_model_parallel_size=4),
        changed("model", init="megatron"),
        changed("model", transformer_impl="transformer_engine"),
        changed("outer", lr={"kind": "linear", "start": 0.9, "end": 0.7, "rounds": 5}),
    ],
)
def test_harmless_keys_may_change(current: dict[str, object]) -> None:
    assert differences(CONFIG, current) == Differences((), {})


@pytest.mark.parametrize(
    ("current", "key"),
    [
        (changed("model", num_layers=3), "model.num_layers: 2 when saved, 3 now"),
        (changed("model", seq_length=16), "model.seq_length: None when saved, 16 now"),
        (
            changed("outer", sync_interval={"kind": "steps", "values": [[1, 30], [9, 60]]}),
            "outer.sync_interval: 30 when saved, {'kind': 'steps', 'values': [[1, 30], [9, 60]]} n",
        ),
        (changed("outer", fragments={"count": 2}), "outer.fragments.count: 1 when saved, 2 now"),
    ],
)
def test_a_change_of_what_the_state_means_is_named(current: dict[str, object], key: str) -> None:
    found = differences(CONFIG, current)
    assert found.named == {}
    (line,) = found.fixed
    assert line.startswith(key)
    # No name allows it.
    assert line in refusal(found, NAMED_CHANGES)


@pytest.mark.parametrize(
    ("current", "name", "line"),
    [
        (
            changed("parallel", num_replicas=4),
            "replicas",
            "parallel.num_replicas: 2 when saved, 4 now",
        ),
        (
            changed("inner", kind="adamw"),
            "inner_optimizer",
            "inner.kind: 'muon' when saved, 'adamw' now",
        ),
        (
            changed("outer", kind="average"),
            "method",
            "outer.kind: 'nesterov' when saved, 'average' now",
        ),
        # Its keys come and go with the outer step.
        ({**CONFIG, "outer": {"kind": "none"}}, "method", "outer.kind: 'nesterov' when saved, 'n"),
    ],
)
def test_a_change_of_the_training_is_refused_unless_it_is_named(
    current: dict[str, object], name: str, line: str
) -> None:
    found = differences(CONFIG, current)
    assert found.fixed == ()
    assert list(found.named) == [name]
    assert found.named[name].startswith(line)
    assert refusal(found, [name]) == ""
    said = refusal(found, [other for other in NAMED_CHANGES if other != name])
    assert line in said
    assert f"allow_changes: [{name}]" in said
    assert f"--set 'checkpoint.allow_changes=[{name}]'" in said


def test_a_refusal_names_all_changes_in_the_line_to_add() -> None:
    current = {**changed("parallel", num_replicas=1), "outer": {"kind": "none"}}
    found = differences(CONFIG, current)
    assert "allow_changes: [method, replicas]" in refusal(found, [])
    # One of them is named already: its line is not repeated, but the line to add has both.
    said = refusal(found, ["method"])
    assert "outer.kind" not in said
    assert "allow_changes: [method, replicas]" in said


def test_weights_to_begin_with_are_no_reason_to_go_on() -> None:
    """A run that began with them resumes; another run, which would not use them, does not."""
    began = {**CONFIG, "checkpoint": {"init_from": "a"}}
    assert refusal(differences(began, began), []) == ""
    assert refusal(differences(began, {**CONFIG, "checkpoint": {"init_from": None}}), []) == ""
    without = {**CONFIG, "checkpoint": {"init_from": None}}
    (line,) = differences(without, began).fixed
    assert line.startswith("checkpoint.init_from: None when saved, 'a' now")


def test_another_model_is_named() -> None:
    (line,) = model_differences(CONFIG, changed("model", num_layers=3))
    assert line.startswith("model.num_layers: 2 when saved, 3 now")


def test_the_names_are_those_of_the_schema() -> None:
    names = CheckpointConfig(allow_changes=list(NAMED_CHANGES)).allow_changes
    assert names == tuple(NAMED_CHANGES)
    with pytest.raises(ValueError, match="allow_changes"):
        CheckpointConfig(allow_changes=["everything"])


def test_the_documented_table_is_the_one_that_is_checked() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for key in (*FIXED_KEYS, *NAMED_CHANGES, *NAMED_CHANGES.values()):
        assert f"`{key}`" in page or f"`{key}.*`" in page, key
