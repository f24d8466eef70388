"""Which keys may change between save and resume."""

from pathlib import Path

import pytest

from megatron_muloco.checkpoint.state import FIXED_KEYS, differences

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
    assert differences(CONFIG, current) == []


@pytest.mark.parametrize(
    ("current", "key"),
    [
        (changed("model", num_layers=3), "model.num_layers: 2 when saved, 3 now"),
        (changed("model", seq_length=16), "model.seq_length: None when saved, 16 now"),
        (changed("parallel", num_replicas=4), "parallel.num_replicas: 2 when saved, 4 now"),
        (changed("inner", kind="adamw"), "inner.kind: 'muon' when saved, 'adamw' now"),
        (
            changed("outer", sync_interval={"kind": "steps", "values": [[1, 30], [9, 60]]}),
            "outer.sync_interval: 30 when saved, {'kind': 'steps', 'values': [[1, 30], [9, 60]]} n",
        ),
        (changed("outer", fragments={"count": 2}), "outer.fragments.count: 1 when saved, 2 now"),
    ],
)
def test_a_change_of_what_the_state_means_is_named(current: dict[str, object], key: str) -> None:
    (line,) = differences(CONFIG, current)
    assert line.startswith(key)


def test_the_documented_table_is_the_one_that_is_checked() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for key in FIXED_KEYS:
        assert f"`{key}`" in page or f"`{key}.*`" in page, key
