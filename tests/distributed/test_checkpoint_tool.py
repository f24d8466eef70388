"""`tools/checkpoint.py` on checkpoints of a tiny run: every damage is found, and by name."""

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from tests.distributed.test_checkpoint import started, state_of, store_of
from tests.support.spawn import run_ranks
from tests.support.tiny_models import ADAMW, MUON, finish_tiny
from tools.checkpoint import _Checkpoint, main, verify_checkpoint

REPLICAS: dict[str, Any] = {"inner": MUON, "parallel": {"num_replicas": 2}}
SLICED: dict[str, Any] = {"inner": ADAMW, "parallel": {"tensor_model_parallel_size": 2}}
NAMES = ("iter_0000001", "iter_0000002")

HOLD = """
import sys
from pathlib import Path
from megatron_muloco.checkpoint.lease import Lease
lease = Lease(Path(sys.argv[1]), print)
lease.acquire()
print("held", flush=True)
sys.stdin.readline()
lease.release()
"""


def save_twice(directory: Path, sections: dict[str, Any]) -> None:
    run = started(sections)
    for step in (1, 2):
        run.train(1)
        store_of(run, directory).save(step, state_of(run, consumed_samples=step * 8))
    finish_tiny()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 1 and 2 of two replicas."""
    directory = tmp_path_factory.mktemp("saved") / "run"
    run_ranks(save_twice, 2, directory, REPLICAS)
    return directory


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


def tool(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_whole_checkpoints_of_replicas_and_of_slices(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Slices are cut along both dimensions, and gate and up separately."""
    run_ranks(save_twice, 2, tmp_path / "sliced", SLICED)
    for directory in (saved, tmp_path / "sliced"):
        code, text = tool(capsys, "verify", directory)
        assert code == 0, text
        assert text.count(": whole, ") == 2
    code, text = tool(capsys, "verify", saved / NAMES[0])
    assert (code, text.count(": whole, ")) == (0, 1)


def values_in_files(path: Path, key: str) -> list[tuple[Path, int, int]]:
    """Return the places of a tensor's values: file, first byte and their number."""
    checkpoint = _Checkpoint.open(path)
    found = []
    for chunk in checkpoint.chunks(key):
        place = checkpoint.index.storage_data[MetadataIndex(key, chunk.place)]
        file = path / place.relative_path
        record = file.read_bytes()[place.offset : place.offset + place.length]
        values = checkpoint.read(chunk).numpy().tobytes()
        assert values in record
        found.append((file, place.offset + record.find(values), len(values)))
    return found


def test_a_flipped_bit_of_every_kind_is_found_by_name(saved: Path, run: Path) -> None:
    path = run / NAMES[1]
    generator = random.Random(5)
    opened = _Checkpoint.open(path)
    flipped = set()
    for kind in opened.kinds():
        keys = [key for key in opened.keys if opened.kind_of(key) == kind]
        places = [(key, place) for key in keys for place in values_in_files(path, key)]
        for key, (file, first, count) in generator.sample(places, min(3, len(places))):
            content = bytearray(file.read_bytes())
            content[first + generator.randrange(count)] ^= 1 << generator.randrange(8)
            whole = file.read_bytes()
            file.write_bytes(content)
            problems = verify_checkpoint(path).problems
            assert len(problems) == 1, problems
            assert problems[0].startswith(f"{key}: ")
            file.write_bytes(whole)
            flipped.add(kind)
    # No fragment is in flight, so the kinds of those have no tensors.
    assert flipped == {kind for kind in map(opened.kind_of, opened.keys) if kind}
    assert verify_checkpoint(path).problems == []


def truncate(path: Path) -> None:
    file = path / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-100])


def exchange(path: Path) -> None:
    """The file of another rank under this name, as a copy by hand might leave it."""
    one, other = path / "__0_0.distcp", path / "__1_0.distcp"
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def of_another_step(path: Path) -> None:
    for file in path.glob("*.distcp"):
        shutil.copy(path.parent / NAMES[0] / file.name, file)


def index_of_another_step(path: Path) -> None:
    shutil.copy(path.parent / NAMES[0] / ".metadata", path / ".metadata")


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = path / "muloco.json"
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))


def edit_config(path: Path) -> None:
    file = path / "run_config.yaml"
    file.write_text(file.read_text().replace("seed: ", "seed: 1"))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, "__0_0.distcp has "),
    "missing tensors": (lambda p: (p / "__1_0.distcp").unlink(), "__1_0.distcp is missing"),
    "exchanged": (exchange, "cannot be read"),
    "of another step": (of_another_step, "replica_0.inner.exp_avg"),
    "index of another step": (index_of_another_step, ".metadata is not the index that was saved"),
    "no index": (lambda p: (p / ".metadata").unlink(), ".metadata"),
    "no description": (lambda p: (p / "muloco.json").unlink(), "muloco.json"),
    "no common state": (lambda p: (p / "common.pt").unlink(), "common.pt is missing"),
    "no format": (lambda p: (p / "metadata.json").unlink(), "metadata.json is missing"),
    "no config": (lambda p: (p / "run_config.yaml").unlink(), "run_config.yaml is missing"),
    "edited config": (edit_config, "run_config.yaml: not the configuration in muloco.json"),
    "cut common state": (lambda p: (p / "common.pt").write_bytes(b"PK"), "common.pt: cannot be"),
    "edited digest": (
        lambda p: edit(p, lambda tree: tree.update(anchor_digest="0" * 16)),
        "muloco.json",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_of_any_file_is_found(
    run: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    inflict, reason = DAMAGES[damage]
    inflict(run / NAMES[1])
    code, text = tool(capsys, "verify", run)
    assert code == 1
    assert f"{run / NAMES[0]}: whole" in text
    assert f"{run / NAMES[1]}: DAMAGED" in text
    assert reason in text
    assert "1 of 2 checkpoints are damaged" in text


def test_the_list_says_what_is_whole_and_which_one_is_the_latest(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = tool(capsys, "list", run)
    head, first, second = text.splitlines()
    assert code == 0
    assert head.split() == ["step", "size", "saved", "K", "layout", "method", "state"]
    assert first.split()[0] == "1"
    assert first.endswith("2  1 rank  muon, nesterov  whole")
    assert second.endswith("whole, latest")
    assert max(map(len, (head, first, second))) <= 80
    truncate(run / NAMES[1])
    assert "incomplete" in tool(capsys, "list", run)[1].splitlines()[2]


def test_the_difference_of_two_steps_and_of_equal_ones(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = (run / name for name in NAMES)
    code, text = tool(capsys, "diff", one, one)
    assert (code, text.count("no difference")) == (0, 3)
    code, text = tool(capsys, "diff", one, other)
    assert code == 1
    configuration, rest = text.split("\nkinds\n")
    assert "no difference" in configuration
    before, after = (_Checkpoint.open(path) for path in (one, other))
    gaps = {
        key: float((whole(before, key) - whole(after, key)).abs().max())
        for key in before.keys
        if key in after.keys and before.kind_of(key)
    }
    tensors = [line.strip() for line in rest.splitlines() if "by up to" in line]
    assert tensors
    for line in tensors:
        key = line.partition(": ")[0]
        assert line.endswith(f"by up to {gaps[key]:.3g}")


def whole(checkpoint: _Checkpoint, key: str) -> torch.Tensor:
    values = torch.full(checkpoint.shape(key), torch.nan)
    for chunk in checkpoint.chunks(key):
        ranges = chunk.overlap(chunk)
        assert ranges is not None
        values[tuple(slice(*edges) for edges in ranges)] = checkpoint.read(chunk)
    assert not values.isnan().any()
    return values


def test_pruning_is_the_packages_own(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # A run that was resumed from step 2 has left a later checkpoint, which stays.
    shutil.copytree(run / NAMES[1], run / "iter_0000009")
    code, text = tool(capsys, "prune", run, "--keep", 1, "--dry-run")
    assert code == 0
    assert "would delete 1 of 3 checkpoints" in text
    assert str(run / NAMES[0]) in text
    holder = subprocess.Popen(  # a run of its own: a lease of this process does not refuse it
        [sys.executable, "-c", HOLD, str(run)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    code, text = tool(capsys, "prune", run, "--keep", 1)
    holder.communicate("end\n")
    assert code == 2
    assert "is in use by another run" in text
    assert (run / NAMES[0]).is_dir()
    code, text = tool(capsys, "prune", run, "--keep", 1)
    assert (code, "deleted 1 of 3 checkpoints" in text) == (0, True)
    assert sorted(path.name for path in run.glob("iter_*")) == [NAMES[1], "iter_0000009"]
    assert tool(capsys, "prune", run, "--keep", 0)[0] == 2


def test_provenance_and_configuration_are_shown(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = tool(capsys, "show", saved)
    assert code == 0
    opened = _Checkpoint.open(saved / NAMES[1])
    length = opened.description.config["model"]["seq_length"]
    assert f"checkpoint  {saved / NAMES[1]}" in text
    assert f"tokens      {16 * length:,} (16 samples of {length:,})" in text
    assert f"written by  torch {version('torch')}" in text
    assert f"{opened.description.anchor_digest}  anchor" in text
    assert "    num_replicas: 2" in text


def test_what_is_no_checkpoint_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["list"], ["verify"], ["show"], ["prune", "--keep", "1"], ["diff", "x"]):
        code, text = tool(capsys, *command, tmp_path / "absent")
        assert code == 2
        assert "error: " in text
