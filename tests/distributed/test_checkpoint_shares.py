"""All ranks write equal shares of a checkpoint, and a resume reads each byte of it once."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader

from megatron_muloco.checkpoint import sharding
from megatron_muloco.checkpoint.sharding import divide
from tests.distributed.test_checkpoint import (
    STREAMING,
    everything,
    load_elsewhere,
    save_after,
    state_of,
    store_of,
    stored_tensors,
)
from tests.support.spawn import run_ranks
from tests.support.tensors import assert_equal
from tests.support.tiny_models import ADAMW, MUON, TinyRun, finish_tiny, start_tiny, tiny_config

# Wide enough that what torch adds to each stored chunk, about 1.6 KB, is small beside the values.
MODEL = {"hidden_size": 128, "ffn_hidden_size": 192, "kv_channels": 32, "vocab_size": 300}
TP2 = {"tensor_model_parallel_size": 2}
# A round of two steps: masters differ from the anchor after the first.
RUNS: dict[str, tuple[int, dict[str, Any], int]] = {  # world, sections, step of the save
    "k4-tp2-muloco": (8, {"inner": MUON, "parallel": {"num_replicas": 4, **TP2}}, 2),
    "k4-tp2-diloco": (8, {"inner": ADAMW, "parallel": {"num_replicas": 4, **TP2}}, 1),
    "k2-tp2-dp2-muloco": (8, {"inner": MUON, "parallel": {"num_replicas": 2, **TP2}}, 1),
    "k2-tp2-dp2-diloco": (8, {"inner": ADAMW, "parallel": {"num_replicas": 2, **TP2}}, 2),
}


def started(sections: dict[str, Any]) -> TinyRun:
    return start_tiny(tiny_config(model=MODEL, **sections))


@contextmanager
def counted_reads() -> Iterator[list[int]]:
    """Collect the lengths of the byte ranges that torch's reader loads."""
    lengths: list[int] = []
    plain = FileSystemReader.read_data

    def read_data(self: FileSystemReader, plan: Any, planner: Any) -> Any:
        lengths.extend(self.storage_data[item.storage_index].length for item in plan.items)
        return plain(self, plan, planner)

    with mock.patch.object(FileSystemReader, "read_data", read_data):
        yield lengths


def whole_tensors_to_one(
    sizes: Mapping[str, int], shares: int, snap: Any
) -> Iterator[tuple[str, int, int, int]]:
    """Divide as earlier versions did: replica 0 writes whole what replicas share."""
    for name, size in sizes.items():
        yield name, 0, size, 0


def save_and_load(
    directory: Path, sections: dict[str, Any], steps: int, division: Any = divide
) -> tuple[int, int]:
    """Return the bytes that this rank wrote, and those that it read when it loaded them again."""
    run = started(sections).train(steps)
    with mock.patch.object(sharding, "divide", division):
        path = store_of(run, directory).save(steps, state_of(run))
    before = everything(run)
    rank = torch.distributed.get_rank()
    written = sum(file.stat().st_size for file in path.glob(f"__{rank}_*.distcp"))
    run.train(1)  # to another state, so that a value which is not loaded shows
    with counted_reads() as lengths:
        store_of(run, directory).load(path, state_of(run))
    after = everything(run)
    finish_tiny()
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        assert_equal(after[key], tensor, key)
    return written, sum(lengths)


@pytest.mark.parametrize("name", RUNS)
def test_a_save_is_balanced_and_a_resume_reads_it_once(name: str, tmp_path: Path) -> None:
    world, sections, steps = RUNS[name]
    ranks = run_ranks(save_and_load, world, tmp_path, sections, steps, timeout_s=120.0)
    written, read = zip(*ranks, strict=True)
    assert max(written) <= 1.1 * sum(written) / world
    assert sum(read) <= 1.1 * sum(written)


def test_a_checkpoint_of_an_earlier_version_is_read_once_too(tmp_path: Path) -> None:
    sections = {"inner": MUON, "parallel": {"num_replicas": 2, **TP2}}
    ranks = run_ranks(save_and_load, 4, tmp_path, sections, 1, whole_tensors_to_one)
    written, read = zip(*ranks, strict=True)
    assert max(written) > 1.1 * sum(written) / 4  # else this is not how they wrote
    assert sum(read) <= 1.1 * sum(written)


def test_another_layout_reads_the_same_values(tmp_path: Path) -> None:
    sections = {"inner": MUON, "outer": STREAMING}
    source, target = tmp_path / "source", tmp_path / "target"
    data = {"num_replicas": 2}
    run_ranks(save_after, 4, 2, 0, sections | {"parallel": data}, source)
    expected = stored_tensors(source / "iter_0000002")
    run_ranks(load_elsewhere, 4, source, target, sections | {"parallel": data | TP2})
    written = stored_tensors(target / "iter_0000002")
    assert written.keys() == expected.keys()
    for key in expected:
        assert_equal(written[key], expected[key], key)


def test_shares_are_even_and_leave_nothing_out() -> None:
    """Any cut is at most half a row away from its ideal place, so a share is at most a row off."""
    sizes = {"matrix": 40 * 7, "norm": 7, "small": 3 * 7, "empty": 0}
    for shares in range(1, 12):
        found = list(divide(sizes, shares, lambda _, place: (place + 3) // 7 * 7))
        places = [(name, place) for name, start, end, _ in found for place in range(start, end)]
        assert places == [(name, place) for name, size in sizes.items() for place in range(size)]
        owners = [share for *_, share in found]
        assert owners == sorted(owners)
        loads = [sum(e - s for _, s, e, owner in found if owner == i) for i in range(shares)]
        assert max(loads) <= sum(sizes.values()) / shares + 7
