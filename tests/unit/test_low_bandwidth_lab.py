"""One small laboratory: shaped, swept, and left by a rank that fails. Needs root."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools.bench.lowbandwidth import lab, probe
from tools.bench.lowbandwidth.commands import Link, Names, owner_of
from tools.bench.lowbandwidth.runs import run_ranks

REPOSITORY = Path(__file__).parents[2]

WHY_NOT = lab.why_not_here()
needs_lab = pytest.mark.skipif(bool(WHY_NOT), reason=f"no network laboratory: {WHY_NOT}")


def namespaces_of(names: Names) -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    all_names = [line.split()[0] for line in listed.stdout.splitlines() if line]
    return [name for name in all_names if owner_of(name) == (names.pid, names.started)]


def check_until_it_fails(laboratory: lab.Lab) -> None:
    while True:
        laboratory.check()
        time.sleep(0.01)


@needs_lab
def test_a_link_carries_no_more_than_its_rate_and_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(probe, "SETTLE_SECONDS", 0.5)
    monkeypatch.setattr(probe, "MEASURE_SECONDS", 1.0)
    with lab.Lab(2, Link(4)) as laboratory:
        assert len(namespaces_of(laboratory.names)) == 3
        achieved = probe.probe(laboratory)
    assert namespaces_of(laboratory.names) == []
    # A loaded machine may send less, but no machine more: in a second at 4 Mbit/s, 0.5 MB, a full
    # bucket adds 15 kB (3 %).
    assert all(0 < rate < 4 * 1.05 for link in achieved for rate in (link.up, link.down))


@needs_lab
def test_a_relay_delays_every_datagram_and_loses_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "_impairer", lambda _link: "relay")  # also where there is netem
    with lab.Lab(3, Link(4, delay_ms=15, loss=0.05)) as laboratory:
        found = probe.echoes(laboratory)
        laboratory.check()
        listed = ["ip", "netns", "pids", laboratory.names.hub]
        relay = subprocess.run(listed, capture_output=True, text=True, check=True).stdout
        os.kill(int(relay), signal.SIGKILL)
        with pytest.raises(lab.LabError, match="relay ended with -9"):
            check_until_it_fails(laboratory)
    assert namespaces_of(laboratory.names) == []
    # A loaded machine answers later, but none earlier than the link allows.
    assert all(trip >= 30 for trip in found.round_trip_ms)
    # 3,000 echoes, each lost with 1 - 0.95^2 = 9.75 %: 292.5, and six deviations of 16.2.
    assert abs(found.lost - 292.5) <= 98


@needs_lab
def test_what_a_killed_laboratory_leaves_is_swept() -> None:
    script = (
        "import sys, time; from tools.bench.lowbandwidth.lab import Lab; "
        "from tools.bench.lowbandwidth.commands import Link\n"
        "with Lab(1, Link(None)) as lab: print(lab.names.pid, lab.names.started, flush=True); "
        "time.sleep(60)"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    )
    assert owner.stdout is not None
    names = Names(*map(int, owner.stdout.readline().split()))
    assert len(namespaces_of(names)) == 2
    lab.sweep()
    assert len(namespaces_of(names)) == 2  # its owner lives
    owner.kill()
    owner.wait()
    owner.stdout.close()
    assert lab.started(names.pid) == 0
    assert set(lab.sweep()) >= {names.hub, names.rank(0)}
    assert namespaces_of(names) == []


@needs_lab
def test_a_rank_that_fails_ends_the_run_with_its_words(tmp_path: Path) -> None:
    began = time.monotonic()
    with lab.Lab(1, Link(None)) as laboratory, pytest.raises(lab.LabError, match="no-such-file"):
        run_ranks(laboratory, "no-such-file.yaml", ["a=b"], tmp_path / "run", timeout=300)
    assert time.monotonic() - began < 300
