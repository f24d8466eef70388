"""Runs the real program for one variant and seed at a time, and stores one JSON file a run.

Two ranks are started, one thread each, with the variables that a launcher sets. A run whose file
exists is not repeated, so an interrupted campaign resumes where it stopped. A file made with other
settings is refused.
"""

import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from multiprocessing.process import BaseProcess
from pathlib import Path

import yaml

from megatron_muloco.errors import ConfigError
from tools.bench.provenance import commit

ROOT = Path(__file__).resolve().parents[3]
CONFIG = Path(__file__).with_name("small.yaml")
RANKS = 2
PRELOADED = ["megatron_muloco.training.build", __name__]
ALL_RANKS = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
_TERMINATE_SECONDS = 10.0  # chosen: a rank that was asked to end is killed after this
_POLL_SECONDS = 0.2  # chosen: short against a run


@dataclass(frozen=True)
class Result:
    """One finished run.

    Attributes:
        variant: Name in the grid.
        seed: Seed of weights and of the order of samples.
        settings: Keys replaced, as given to the program.
        config_digest: Digest of the file whose keys were replaced.
        iterations: Inner step of the last evaluation.
        loss: Held-out loss of the anchor at that step, nats per token.
        initial_loss: Held-out loss before the first step.
        bytes_sent: Bytes sent by the writing rank in all outer steps; ``None`` where not written.
        seconds: Wall time of the run with its start.
        commit: Commit of the program; with ``+`` where the program differed from it.
    """

    variant: str
    seed: int
    settings: tuple[str, ...]
    config_digest: str
    iterations: int
    loss: float
    initial_loss: float
    bytes_sent: int | None
    seconds: float
    commit: str


def config_digest() -> str:
    """Return a digest of the base configuration; comments do not change it."""
    values = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    return sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def settings_of(keys: Sequence[str], seed: int) -> tuple[str, ...]:
    """Return the keys of a run: those of the variant and the seed."""
    return (*keys, f"training.seed={seed}", f"data.seed={seed}")


def path_of(out: Path, variant: str, seed: int) -> Path:
    """Return the file of a run."""
    return out / f"{variant}-seed{seed}.json"


def read_result(out: Path, variant: str, seed: int, keys: Sequence[str]) -> Result | None:
    """Return a finished run, ``None`` where there is none.

    Raises:
        ConfigError: The file was made with other settings.
    """
    path = path_of(out, variant, seed)
    if not path.exists():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    result = Result(**{**values, "settings": tuple(values["settings"])})
    if (result.settings, result.config_digest) != (settings_of(keys, seed), config_digest()):
        raise ConfigError(
            f"{path}: made with other settings than {variant} has now, so it cannot stand beside "
            "the others. Remove it, or choose another --out."
        )
    return result


def run(out: Path, variant: str, seed: int, keys: Sequence[str]) -> Result:
    """Train one variant with one seed, store the result, and return it.

    Raises:
        ConfigError: A rank failed; the message names the file with what it said.
    """
    from tools.demo_summary import read_points

    events = out / "events" / f"{variant}-seed{seed}-{time.time_ns()}"
    events.mkdir(parents=True)
    started = time.perf_counter()
    settings = settings_of(keys, seed)
    _run_ranks((*settings, f"monitor.dir={events}"), events)
    seconds = time.perf_counter() - started
    points = read_points(str(events))
    held_out = sorted(points["lm loss validation"])
    sent = points.get("muloco/wire_bytes")
    result = Result(
        variant=variant,
        seed=seed,
        settings=settings,
        config_digest=config_digest(),
        iterations=held_out[-1][0],
        loss=held_out[-1][1],
        initial_loss=held_out[0][1],
        bytes_sent=round(sum(value for _, value in sent)) if sent else None,
        seconds=round(seconds, 1),
        commit=commit(),
    )
    path = path_of(out, variant, seed)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(result), indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    return result


def rank_environment(rank: int, port: int) -> dict[str, str]:
    """Return what a launcher would set for one of the ranks."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
        "LOCAL_WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _run_ranks(settings: Sequence[str], directory: Path) -> None:
    """Run all ranks to their end; when one fails, end the others and raise.

    Ranks come from a fork server that has imported the program once: importing it takes as long as
    a third of a run.
    """
    os.environ.update(ALL_RANKS)  # read when torch is loaded, by the fork server
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    port = _free_port()
    logs = [directory / f"rank{rank}.log" for rank in range(RANKS)]
    ranks = [
        context.Process(target=be_rank, args=(rank, port, str(log), ("--set", *settings)))
        for rank, log in enumerate(logs)
    ]
    for rank in ranks:
        rank.start()
    try:
        while any(rank.is_alive() for rank in ranks) and not any(r.exitcode for r in ranks):
            time.sleep(_POLL_SECONDS)
    finally:
        failed = [log for rank, log in zip(ranks, logs, strict=True) if rank.exitcode]
        _end(ranks)
    if failed:
        raise ConfigError(f"the run failed; see {', '.join(map(str, failed))}.")


def be_rank(rank: int, port: int, log: str, arguments: Sequence[str]) -> None:
    """Run one rank of the program in this process, with all its output in ``log``."""
    with open(log, "wb") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    os.environ.update(rank_environment(rank, port))
    from megatron_muloco.training.main import main

    main(("--config", str(CONFIG), *arguments))


def _end(ranks: Sequence[BaseProcess]) -> None:
    for rank in ranks:
        rank.terminate()
    for rank in ranks:
        rank.join(_TERMINATE_SECONDS)
        if rank.is_alive():
            rank.kill()
            rank.join()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
