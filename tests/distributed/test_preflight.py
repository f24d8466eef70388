"""Every injected fault is found, with its rank and its cause; a healthy job is ready."""

import functools
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_muloco.comm.collectives import DeviceWire
from megatron_muloco.config import RunConfig
from megatron_muloco.data.checks import check_run_data
from megatron_muloco.data.indexed import bin_path
from megatron_muloco.training import known_answers, preflight
from megatron_muloco.training.known_answers import Link, _rounds, slow_links
from tests.support.byte_runs import byte_config, byte_dataset
from tests.support.spawn import run_ranks

RANKS = 3
ODD = 1  # the rank with the fault
START_SECONDS = 300.0  # of rank workers that import Megatron on a loaded machine


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    directory = tmp_path_factory.mktemp("preflight")
    return byte_config(
        byte_dataset(directory),
        parallel={"num_replicas": RANKS},
        training={"global_batch_size": 6},
        outer={
            "kind": "nesterov",
            "lr": 0.7,
            "momentum": 0.6,
            "sync_interval": 2,
            "compression": {"kind": "linear", "bits": 4},
        },
        checkpoint={"dir": str(directory / "saved")},
    )


# ---- faults: each returns the configuration of the rank and what is broken around the call ----


@contextmanager
def _nothing(config: RunConfig) -> Iterator[RunConfig]:
    yield config


@contextmanager
def _other_config(config: RunConfig) -> Iterator[RunConfig]:
    yield config.model_copy(update={"inner": config.inner.model_copy(update={"lr": 0.5})})


@contextmanager
def _other_version(config: RunConfig) -> Iterator[RunConfig]:
    facts = preflight.program_facts() | {"torch": "2.0.0"}
    with mock.patch.object(preflight, "program_facts", return_value=facts):
        yield config


@contextmanager
def _wrong_group(config: RunConfig) -> Iterator[RunConfig]:
    make = preflight.make_groups

    def wrong(*args: Any) -> Any:
        groups = make(*args)
        return replace(groups, outer=groups.replica)

    with mock.patch.object(preflight, "make_groups", wrong):
        yield config


@contextmanager
def _slow_link(config: RunConfig) -> Iterator[RunConfig]:
    """What this rank sends takes longer: 2 MB/s."""
    send = DeviceWire.all_to_all

    def slow(self: Any, received: Any, sent: Any, **splits: Any) -> Any:
        time.sleep(sent.numel() * sent.element_size() / 2e6)
        return send(self, received, sent, **splits)

    with mock.patch.object(DeviceWire, "all_to_all", slow):
        yield config


@contextmanager
def _missing_file(config: RunConfig) -> Iterator[RunConfig]:
    """On this rank's machine there is no such file."""
    gone = bin_path(config.data.train[0].path)
    is_file, exists = Path.is_file, Path.exists
    with (
        mock.patch.object(Path, "is_file", lambda path: path != gone and is_file(path)),
        mock.patch.object(Path, "exists", lambda path: path != gone and exists(path)),
    ):
        yield config


@contextmanager
def _full_disk(config: RunConfig) -> Iterator[RunConfig]:
    usage = shutil.disk_usage("/")._replace(free=1000)
    with mock.patch.object(shutil, "disk_usage", return_value=usage):
        yield config


@contextmanager
def _wrong_clock(config: RunConfig) -> Iterator[RunConfig]:
    ahead = functools.partial(known_answers.clock_offset, now=lambda: time.time() + 60.0)
    with mock.patch.object(preflight, "clock_offset", ahead):
        yield config


@contextmanager
def _small_memory(config: RunConfig) -> Iterator[RunConfig]:
    with mock.patch.object(preflight, "_available", return_value=1000):
        yield config


@contextmanager
def _wrong_codec(config: RunConfig) -> Iterator[RunConfig]:
    """The reference of this rank rounds to other values."""
    keys = known_answers.reference_keys
    wrong = {"codec": lambda name, start, values: values + 1.0}
    with mock.patch.object(known_answers, "reference_keys", lambda *args: keys(*args) | wrong):
        yield config


Fault = Callable[[RunConfig], Any]


def _verdict(config: RunConfig, fault: Fault) -> preflight.Verdict:
    broken = fault if int(os.environ["RANK"]) == ODD else _nothing
    # Small messages: the limits of a slow link hold for any size.
    with mock.patch.object(known_answers, "_MOST_BYTES", 1 << 20), broken(config) as mine:
        return preflight.preflight(mine, check_run_data(mine))


FAULTS: dict[str, tuple[Fault, str, str]] = {
    "another configuration": (_other_config, "config", "inner.lr is 0.5, and 0.003 on most"),
    "another version": (_other_version, "packages", "torch is 2.0.0, and "),
    "a wrong group": (_wrong_group, "groups", "its outer group has the ranks [1], and the"),
    "a slow link": (_slow_link, "outer link", "slow link with the ranks [0, 2]: "),
    "a missing file": (_missing_file, "data", "bottles.bin"),
    "a full disk": (_full_disk, "disk", "the disk has 1,000 bytes free, and one checkpoint"),
    "a wrong clock": (_wrong_clock, "clocks", "its clock is +60.0 s off"),
    "too little memory": (_small_memory, "memory", "need "),
    "a wrong codec": (_wrong_codec, "outer step", "differs from the reference by "),
}


@pytest.mark.parametrize("what", FAULTS)
def test_a_fault_is_named_by_rank_and_cause(what: str, config: RunConfig) -> None:
    fault, check, text = FAULTS[what]
    first, *others = run_ranks(_verdict, RANKS, config, fault, timeout_s=START_SECONDS)
    assert not first.is_ready
    faults = [finding for finding in first.findings if finding.is_fault]
    assert {finding.rank for finding in faults} == {ODD}, str(first)
    assert any(each.check == check and text in each.text for each in faults), str(first)
    assert f"FAULT on rank [{ODD}]" in first.rows[check]
    assert [other.findings for other in others] == [first.findings] * (RANKS - 1)


def test_a_healthy_job_is_ready(config: RunConfig) -> None:
    verdict = run_ranks(_verdict, RANKS, config, _nothing, timeout_s=START_SECONDS)[0]
    assert verdict.is_ready, str(verdict)
    assert str(verdict).startswith("preflight of 3 ranks on 1 hosts")
    assert {"config", "data", "groups", "outer step", "outer link"} <= verdict.rows.keys()


# ---- links ----


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8])
def test_neighbours_send_in_both_directions_and_a_rank_has_one_peer_at_a_time(size: int) -> None:
    pairs = []
    for part in _rounds(size):
        ends = [end for pair in part for end in pair]
        assert len(ends) == len(set(ends))
        pairs += part
    ring = {(i, (i + 1) % size) for i in range(size)}
    assert sorted(pairs) == sorted(ring | {(b, a) for a, b in ring})


def link(source: int, target: int, seconds: float, kind: str = "outer link") -> Link:
    return Link(kind, source, target, 1 << 20, seconds)


def test_of_two_ends_the_one_with_more_slow_links_is_named() -> None:
    ring = [link(0, 1, 0.01), link(1, 0, 2.0), link(1, 2, 3.0), link(2, 1, 0.01), link(2, 0, 0.01)]
    assert slow_links(ring, ["a", "b", "c"]).keys() == {(1, "outer link")}
    assert slow_links(ring[:2], ["a", "b"]).keys() == {(0, "outer link"), (1, "outer link")}


def test_links_inside_a_host_are_not_compared_with_those_between_hosts() -> None:
    inside, between = link(0, 1, 0.001), link(1, 2, 1.0)
    assert slow_links([inside, between, link(2, 1, 1.1)], ["a", "a", "b"]) == {}


def test_short_differences_do_not_count() -> None:
    assert slow_links([link(0, 1, 0.001), link(1, 0, 0.09)], ["a", "b"]) == {}
