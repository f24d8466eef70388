"""`DamageTrials`: one seeded change to the bytes of one file, and what a run makes of it.

A run of one replica is stopped in its middle. Each trial takes a copy of its directory, damages one
file that the program reads, and starts the program again, in a warm rank worker::

    refused     exit code 2, a message, no stack trace
    harmless    done, and every digest and held-out loss is that of the undamaged run
    anything else is a failure: SILENT, RAN CODE, TRACEBACK, CRASH, HUNG
"""

import contextlib
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import yaml

from megatron_muloco.config import RunConfig
from tests.chaos.runs import START_SECONDS, State, final_state
from tests.support.byte_runs import byte_config, run_here
from tests.support.faults import signal_at_call
from tests.support.spawn import RankFailure, run_ranks
from tests.support.tiny_models import MUON

__all__ = ["ACTIONS", "DamageTrials", "files_of", "kind_of"]

STEPS, STOP_AT = 7, 2
VOCABULARY = 512
LONGEST_RUN = 120.0  # seconds; alone it takes one
MORE_MEMORY = 4 << 30  # bytes; a flipped length must not take the machine's memory
HELD = ("refused", "harmless")
SOURCES = ("run.yaml", "train.txt", "valid.txt")  # what a person writes; no kind of file of ours


class DamageTrials:
    """Makes trials by seed.

    Args:
        work: Directory for the files.
    """

    def __init__(self, work: Path) -> None:
        self._work = work
        self._base = work / "base"
        _write_inputs(self._base)
        run_ranks(_train_half, 1, self._base, timeout_s=START_SECONDS)
        whole = work / "undamaged"
        shutil.copytree(self._base, whole)
        code, said, self._losses = run_ranks(_start, 1, whole, timeout_s=START_SECONDS)[0]
        assert code == 0, said
        expected = final_state(whole / "saved", STEPS)
        assert expected is not None
        self._expected: State = expected

    def __call__(self, seed: int) -> dict[str, object]:
        """Make the trial of a seed; return a line of the table."""
        rng = random.Random(f"damage {seed}")
        began = time.monotonic()
        directory = self._work / str(seed)
        shutil.copytree(self._base, directory)
        by_kind = files_of(directory)
        kind = rng.choice([*by_kind])
        file = rng.choices(by_kind[kind], [_weight(path) for path in by_kind[kind]])[0]
        action = rng.choices([*ACTIONS], [weight for weight, _ in ACTIONS.values()])[0]
        where = ACTIONS[action][1](rng, file, directory)
        result, code, said = self._outcome(directory)
        return {
            "kind": kind,
            "file": file.relative_to(directory),
            "action": action,
            "where": where,
            "code": code,
            "said": said,
            "result": result,
            "held": "yes" if result in HELD else "no",
            "seconds": round(time.monotonic() - began, 1),
        }

    def _outcome(self, directory: Path) -> tuple[str, object, str]:
        """Start the program; return the result, its exit code and its first words."""
        code: object = ""
        try:
            code, said, losses = run_ranks(_start, 1, directory, timeout_s=LONGEST_RUN)[0]
        except RankFailure as failure:
            said = str(failure)
            result = "HUNG" if "did not finish" in said else "CRASH"
        else:
            if code == 0:
                equal = final_state(directory / "saved", STEPS) == self._expected
                both = losses.keys() & self._losses.keys()
                equal = equal and all(losses[step] == self._losses[step] for step in both)
                result = "harmless" if equal else "SILENT"
            else:
                result = "refused" if code == 2 and "Traceback" not in said else "TRACEBACK"
        if _marker(directory).exists():
            result = "RAN CODE"
        said = "" if code == 0 else _first_words(said.replace(f"{directory}/", ""))
        return result, code, said


def kind_of(path: Path) -> str:
    """Return the kind of a file: its name without what differs from file to file."""
    if path.suffix == ".distcp":
        return "distcp (tensors)"
    if path.parent.name == "data" and path.suffix in (".bin", ".idx", ".json"):
        return f"data {path.suffix}"
    cached = re.search(r"-([a-z_]+\.\w+)$", path.name)
    return f"index cache {cached.group(1)}" if cached else path.name


def files_of(directory: Path) -> dict[str, list[Path]]:
    """Return the files that the program reads, by kind."""
    found: dict[str, list[Path]] = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        if path.name not in SOURCES:
            found.setdefault(kind_of(path), []).append(path)
    return dict(sorted(found.items()))


def _weight(path: Path) -> int:
    """Prefer what the run reads: the newest checkpoint, and the data that it trains on."""
    newest = max(p.name for p in path.parents[1].glob("iter_*")) if "iter_" in str(path) else ""
    return 5 if "train" in path.name or path.parent.name == newest else 1


def _first_words(said: str) -> str:
    """Return the last problem or error of an output in one short line."""
    report = re.search(r"problems? in the input[^\n]*:\n(.*)", said, re.DOTALL)
    lines = (report.group(1) if report else said.strip().rpartition("\n")[2]).split()
    return " ".join(lines)[:160]


# ---- the run ----


def _write_inputs(base: Path) -> None:
    """Write texts, a tokenizer, two datasets and the configuration."""
    from pydoc_data.topics import topics

    from megatron_muloco.data.prepare import PrepareOptions, prepare
    from megatron_muloco.data.tokenizer import train_tokenizer

    data = base / "data"
    data.mkdir(parents=True)
    paragraphs = [p for _, text in sorted(topics.items())[:6] for p in text.split("\n\n")]
    model = data / "tokenizer.model"
    model.write_bytes(train_tokenizer(paragraphs, vocab_size=VOCABULARY))
    with contextlib.chdir(base):
        for name, part in (("train", paragraphs[::2]), ("valid", paragraphs[1::2])):
            (data / f"{name}.txt").write_text("\n\n".join(part))
            options = PrepareOptions(
                "sentencepiece", "data/tokenizer.model", layout="paragraphs", workers=1
            )
            prepare([f"data/{name}.txt"], f"data/{name}", options)
    (base / "run.yaml").write_text(yaml.safe_dump(_config().model_dump(mode="json")))


def _config() -> RunConfig:
    """Return a run that has every kind of tensor and of file; its paths are relative."""
    return byte_config(
        "data/train",
        model={"vocab_size": VOCABULARY},
        data={
            "valid": ({"path": "data/valid"},),
            "tokenizer_type": "sentencepiece",
            "tokenizer_model": "data/tokenizer.model",
        },
        training={"train_iters": STEPS, "eval_interval": 2, "eval_iters": 1},
        inner=MUON,
        outer={
            "kind": "nesterov",
            "lr": 0.7,
            "momentum": 0.6,
            "sync_interval": 2,
            "compression": {"kind": "statistical", "bits": 2},
        },
        checkpoint={"dir": "saved", "save_interval": 1, "keep": 2},
    )


def _train_half(directory: Path) -> None:
    """Train until a stop request, which leaves two checkpoints."""

    def around(context: Any) -> Any:
        return signal_at_call(context.monitor, "record", number=STOP_AT, signum=signal.SIGUSR1)

    with contextlib.chdir(directory), contextlib.redirect_stdout(io.StringIO()):
        ended = run_here(_config(), around=around)
    assert ended.outcome == "STOPPED"


def _start(directory: Path) -> tuple[object, str, dict[int, float]]:
    """Run the program in this rank worker; return exit code, output and held-out losses."""
    from megatron_muloco.monitor.monitor import Monitor
    from megatron_muloco.runtime.parallel_state import unmirror_groups
    from megatron_muloco.training.main import main

    said = io.StringIO()
    code: object = None
    found: list[Any] = []  # steps and held-out losses
    with (
        contextlib.chdir(directory),
        mock.patch.object(Monitor, "evaluation", lambda _, *result: found.append(result)),
        contextlib.redirect_stderr(said),
        contextlib.redirect_stdout(said),
        mock.patch.object(os, "_exit", sys.exit),
        mock.patch("megatron_muloco.training.loop.shutdown"),
        _limited_memory(),
    ):
        try:
            main(["--config", "run.yaml"])
        except SystemExit as exit_:
            code = exit_.code
        except Exception:  # as the interpreter would end
            traceback.print_exc(file=said)
            code = 1
        finally:
            unmirror_groups()
    return code, said.getvalue(), dict(found)


@contextlib.contextmanager
def _limited_memory() -> Iterator[None]:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MORE_MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


# ---- actions: each changes a file and returns where ----


def _flip(rng: random.Random, file: Path, directory: Path) -> str:
    content = bytearray(file.read_bytes())
    if not content:
        return "empty file"
    place, bit = rng.randrange(len(content)), rng.randrange(8)
    content[place] ^= 1 << bit
    file.write_bytes(content)
    return f"bit {bit} of byte {place} of {len(content)}"


def _zero(rng: random.Random, file: Path, directory: Path) -> str:
    """Write zeros over a part, as a file system does that has lost a block."""
    content = bytearray(file.read_bytes())
    place = rng.randrange(max(1, len(content)))
    length = min(rng.choice((8, 64, 4096)), len(content) - place)
    content[place : place + length] = bytes(length)
    file.write_bytes(content)
    return f"{length} bytes from {place} of {len(content)}"


def _truncate(rng: random.Random, file: Path, directory: Path) -> str:
    content = file.read_bytes()
    length = rng.randrange(max(1, len(content)))
    file.write_bytes(content[:length])
    return f"{length} bytes of {len(content)} are left"


def _delete(rng: random.Random, file: Path, directory: Path) -> str:
    file.unlink()
    return ""


def _exchange(rng: random.Random, file: Path, directory: Path) -> str:
    """Exchange with a file of the same kind; where there is none, with any other file."""
    by_kind = files_of(directory)
    alike = [other for other in by_kind[kind_of(file)] if other != file]
    every = [other for files in by_kind.values() for other in files if other != file]
    other = rng.choice(alike or every)
    content = file.read_bytes()
    file.write_bytes(other.read_bytes())
    other.write_bytes(content)
    return f"with {other.relative_to(directory)}"


class _Hostile:
    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self._marker),)


def _marker(directory: Path) -> Path:
    return directory / "code-ran"


def _hostile(rng: random.Random, file: Path, directory: Path) -> str:
    """Put a pickle that runs code in place of a file, in the form that a reader of it expects."""
    value = _Hostile(_marker(directory))
    if file.suffix == ".npy":
        held = np.empty(1, dtype=object)
        held[0] = value
        np.save(file, held, allow_pickle=True)
    elif file.suffix in (".pt", ".distcp"):
        torch.save(value, file)
    elif file.suffix == ".json" and rng.random() < 0.5:
        file.write_text(json.dumps({"py/reduce": ["os.mkdir", str(_marker(directory))]}))
    elif file.suffix == ".yaml":
        file.write_text(f"!!python/object/apply:os.mkdir ['{_marker(directory)}']\n")
    else:
        file.write_bytes(pickle.dumps(value))
    return ""


ACTIONS: dict[str, tuple[int, Callable[[random.Random, Path, Path], str]]] = {  # with weights
    "flipped bit": (10, _flip),
    "zeroed block": (3, _zero),
    "truncated": (3, _truncate),
    "deleted": (2, _delete),
    "exchanged": (2, _exchange),
    "hostile pickle": (2, _hostile),
}
