"""`draw_run` draws a tiny run from a number; `undisturbed` returns the state that it ends in."""

import json
import random
import shutil
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from megatron_muloco.config import RunConfig
from megatron_muloco.config.derived import topology_of
from megatron_muloco.config.outer import NoOuter
from megatron_muloco.config.rules import check
from megatron_muloco.errors import ConfigError
from tests.chaos.points import nan_in_gradient
from tests.support.byte_runs import byte_config, byte_dataset, run_here
from tests.support.spawn import run_ranks
from tests.support.tiny_models import ADAMW, MUON

__all__ = [
    "START_SECONDS",
    "ChaosRun",
    "State",
    "UndisturbedRuns",
    "draw_run",
    "final_state",
    "latest_step",
    "undisturbed",
]

MOST_RANKS = 4
CODECS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"kind": "none", "wire_dtype": "bf16"},
    "linear 4": {"kind": "linear", "bits": 4},
    "statistical 2": {"kind": "statistical", "bits": 2},
    "e3m0": {"kind": "e3m0"},
    "top-k": {"kind": "topk", "density": 0.1, "block_size": 32},
}
START_SECONDS = 300.0  # for rank workers of a loaded machine
State = dict[str, Any]


@dataclass(frozen=True)
class ChaosRun:
    """A tiny run.

    Attributes:
        number: What it was drawn from.
        config: Its configuration, without ``checkpoint.dir``.
        world: Number of ranks.
        nan: Rank and inner step of a gradient of NaN, or ``None``.
        words: What was drawn, for people.
    """

    number: int
    config: RunConfig
    world: int
    nan: tuple[int, int] | None
    words: str

    @property
    def steps(self) -> int:
        """Inner steps of the run."""
        assert self.config.training.train_iters is not None
        return self.config.training.train_iters

    @property
    def counts(self) -> dict[str, int]:
        """How often the run reaches each point, at least."""
        outer, every = self.config.outer, self.config.checkpoint.save_interval
        saves, outer_steps = -(-self.steps // every), 0
        if not isinstance(outer, NoOuter):
            assert isinstance(outer.sync_interval, int)
            outer_steps = self.steps // outer.sync_interval * outer.fragments.count
        interval = self.config.training.eval_interval
        counts = {"start": 1, "load": 1, "step": self.steps, "final anchor": 1}
        counts |= {"launch": outer_steps, "apply": outer_steps, "flush": 1 if outer_steps else 0}
        counts |= {"evaluate": 1 + (self.steps // interval if interval else 0)}
        counts |= dict.fromkeys(("save", "publish", "latest", "prune"), saves)
        # Measured with one rank: 100 tensors and 13 changes of files a save. Ranks share tensors.
        return counts | {"write tensor": 100 * saves // self.world, "file": 12 * saves}

    def located(self, directory: Path) -> RunConfig:
        """Return the configuration with its files in ``directory``."""
        tree = self.config.model_dump()
        tree["checkpoint"]["dir"] = str(directory / "saved")
        tree["data"]["cache_dir"] = str(directory / "cache")
        return RunConfig.model_validate(tree)


def draw_run(number: int, prefix: str) -> ChaosRun:
    """Draw the run of a number; sizes that the program refuses are drawn again."""
    rng = random.Random(f"run {number}")
    while True:
        run = _draw(rng, number, prefix)
        if run is not None:
            return run


def _draw(rng: random.Random, number: int, prefix: str) -> ChaosRun | None:
    replicas, (tp, pp, dp) = rng.choice((1, 2, 2, 3)), (rng.choice((1, 1, 2)) for _ in range(3))
    world = replicas * tp * pp * dp
    # Most trials are small: they need as many cores as ranks.
    if world > MOST_RANKS or (world > 2 and rng.random() < 0.4):
        return None
    inner, codec = rng.choice(("muon", "adamw")), rng.choice([*CODECS])
    kind = rng.choice(("nesterov", "nesterov", "none" if replicas == 1 else "average"))
    interval, fragments, overlap = rng.choice((2, 3)), rng.choice((1, 2)), rng.choice((0, 0, 1))
    precision = rng.choice(("fp32", "fp32", "bf16"))
    outer: dict[str, Any] = {"kind": kind}
    if kind != "none":
        outer |= {"sync_interval": interval, "compression": CODECS[codec]}
    if kind == "nesterov":
        outer |= {"lr": 0.7, "momentum": 0.6, "overlap_steps": overlap}
        outer |= {"fragments": {"count": fragments}, "max_in_flight": 2}
    steps = rng.randint(6, 9)
    every = rng.randint(1, 3)
    try:
        config = byte_config(
            prefix,
            parallel={
                "num_replicas": replicas,
                "tensor_model_parallel_size": tp,
                "pipeline_model_parallel_size": pp,
            },
            training={
                "train_iters": steps,
                "global_batch_size": 12 if replicas == 3 else 8,
                "precision": precision,
                "eval_interval": rng.choice((0, 2)),
                "eval_iters": 1,
                "distributed_timeout_minutes": 1,
                "control_timeout_minutes": 2,
            },
            inner=MUON if inner == "muon" else ADAMW,
            outer=outer,
            checkpoint={"dir": "saved", "save_interval": every, "keep": rng.choice((1, 2))},
            monitor={"log_interval": 2, "digest_interval": 1},
        )
        check(config, topology_of(config, world))
    except (ConfigError, ValueError):  # also pydantic's
        return None
    nan = (rng.randrange(world), rng.randint(1, steps)) if rng.random() < 0.25 else None
    words = f"K{replicas} tp{tp} pp{pp} dp{dp} {inner} {kind} {precision}"
    if kind != "none":
        words += f" H{interval} {codec}"
    if kind == "nesterov":
        words += f" fragments{fragments} overlap{overlap}"
    words += f" saves/{every}" + (f" NaN at step {nan[1]}" if nan else "")
    return ChaosRun(number, config, world, nan, words)


# ---- states ----


def final_state(saved: Path, steps: int) -> State | None:
    """Return what the files say of the end of a run; ``None`` if it has not ended.

    Digests of all tensors of the last checkpoint, counters, the guard's medians, and the digest of
    the flushed anchor. Paths, versions and layouts of files are left out.
    """
    last = saved / f"iter_{steps:07d}"
    anchor = last / "final_anchor" / "muloco.json"
    if not anchor.is_file():
        return None
    tree = json.loads((last / "muloco.json").read_text())
    state = {key: tree[key] for key in ("step", "anchor_digest", "scalars", "replicas")}
    return state | {"final anchor": json.loads(anchor.read_text())["anchor_digest"]}


def latest_step(saved: Path) -> int:
    """Return the step of the checkpoint that a start would resume from; 0 if there is none."""
    try:
        return int((saved / "latest_checkpointed_iteration.txt").read_text())
    except (OSError, ValueError):
        return 0


def undisturbed(run: ChaosRun, directory: Path) -> State:
    """Run without faults, in warm rank workers, and return the final state."""
    run_ranks(_run_undisturbed, run.world, run, directory, timeout_s=START_SECONDS)
    state = final_state(directory / "saved", run.steps)
    assert state is not None
    return state


class UndisturbedRuns:
    """Final states of undisturbed runs, each made once for the trials that share it.

    Args:
        work: Directory for the files; its ``data`` holds the dataset of all runs.

    Attributes:
        prefix: The dataset.
    """

    def __init__(self, work: Path) -> None:
        self._work = work
        data = work / "data"
        data.mkdir(exist_ok=True)
        self.prefix = byte_dataset(data)
        self._states: dict[int, State] = {}

    def state(self, run: ChaosRun) -> State:
        """Return the final state of a run."""
        if run.number not in self._states:
            directory = self._work / f"undisturbed{run.number}"
            self._states[run.number] = undisturbed(run, directory)
            shutil.rmtree(directory)
        return self._states[run.number]


def _run_undisturbed(run: ChaosRun, directory: Path) -> None:
    nan = nan_in_gradient(*run.nan) if run.nan else nullcontext()
    with nan, redirect_stdout(StringIO()):
        run_here(run.located(directory))
