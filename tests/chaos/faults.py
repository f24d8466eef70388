"""`Fault`: what happens, where and on which rank; `draw_faults` draws them from a seed."""

import json
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass

__all__ = [
    "ACTS",
    "CLOCK",
    "FAULTS_VARIABLE",
    "FILE",
    "JOB_VARIABLE",
    "NAN_VARIABLE",
    "NEEDS_MOUNT",
    "POINTS",
    "Fault",
    "draw_faults",
    "given",
    "to_environment",
]

FAULTS_VARIABLE = "CHAOS_FAULTS"
JOB_VARIABLE = "CHAOS_JOB"  # directory of this start; every process of the start inherits it
NAN_VARIABLE = "CHAOS_NAN"  # rank and inner step whose gradients are NaN

# Point -> module, class ("" for a function of the module) and name of what is called there.
POINTS: dict[str, tuple[str, str, str]] = {
    "start": ("megatron_muloco.training.loop", "", "build_run"),
    "load": ("megatron_muloco.checkpoint.store", "CheckpointStore", "load"),
    "step": ("megatron_muloco.training.replica_optimizer", "ReplicaOptimizer", "inner_step"),
    "launch": ("megatron_muloco.outer.synchronizer", "Synchronizer", "_launch"),
    "apply": ("megatron_muloco.outer.synchronizer", "Synchronizer", "_apply"),
    "flush": ("megatron_muloco.outer.synchronizer", "Synchronizer", "flush"),
    "evaluate": ("megatron_muloco.training.loop", "", "_evaluate"),
    "save": ("megatron_muloco.checkpoint.store", "CheckpointStore", "save"),
    "write tensor": ("torch.distributed.checkpoint.filesystem", "", "_write_item"),
    "publish": ("megatron_muloco.checkpoint.layout", "", "publish"),
    "latest": ("megatron_muloco.checkpoint.layout", "", "set_latest"),
    "prune": ("megatron_muloco.checkpoint.layout", "", "prune"),
    "final anchor": ("megatron_muloco.checkpoint.store", "CheckpointStore", "save_final_anchor"),
}
CLOCK = "clock"  # seconds after the start of the process
FILE = "file"  # n-th change of a file or directory inside checkpoint.dir
_LONGEST_CLOCK = 12.0  # seconds; on a quiet machine of two cores a start of two ranks takes ten
_FIRST_RANK = ("publish", "latest", "prune")  # called on rank 0 only

# Act -> its share of the draws. Kills are what the promise is about.
ACTS: dict[str, int] = {
    "kill rank": 6,
    "kill everything": 4,
    "kill launcher": 3,  # the per-node launcher, parent of the ranks
    "kill command": 1,  # the `deepspeed` command, its parent
    "TERM rank": 2,
    "TERM launcher": 1,
    "TERM command": 1,
    "INT command": 1,
    "USR1 ranks": 2,  # as SLURM signals before a time limit
    "pause": 2,  # SIGSTOP, and SIGCONT after some seconds
    "freeze": 1,  # SIGSTOP for ever
    "delay": 1,
    "full disk": 2,
    "read-only disk": 1,
    "slow disk": 1,
    "lost directory": 2,
    "I/O error": 2,
    "Ctrl-C": 0,  # the driver's to send (`tests.chaos.interrupts`); other drivers have no terminal
}
ON_DISK = ("full disk", "read-only disk", "slow disk", "lost directory", "I/O error")
NEEDS_MOUNT = ("full disk", "read-only disk")


@dataclass(frozen=True)
class Fault:
    """One fault of one start.

    Attributes:
        act: A key of `ACTS`.
        rank: Rank in which it begins.
        point: A key of `POINTS`, `CLOCK` or `FILE`.
        number: The act comes at the ``number``-th call of the point, from 1.
        seconds: Time between the point and the act; meanwhile the rank goes on.
        length: Seconds of a pause or delay.
    """

    act: str
    rank: int
    point: str
    number: int = 1
    seconds: float = 0.0
    length: float = 0.0

    def __str__(self) -> str:
        at = self.point if self.point == CLOCK else f"{self.point} {self.number}"
        after = f" + {self.seconds:g} s" if self.seconds else ""
        length = f" for {self.length:g} s" if self.length else ""
        return f"{self.act}{length}, rank {self.rank} at {at}{after}"


def draw_faults(rng: random.Random, world: int, counts: Mapping[str, int]) -> list[Fault]:
    """Return one fault for each of the first one to three starts.

    Args:
        rng: What to draw with.
        world: Number of ranks.
        counts: Point -> how often a whole run reaches it.
    """
    faults = []
    for start in range(rng.choice((1, 1, 1, 2, 2, 3))):
        act = rng.choices([*ACTS], [*ACTS.values()])[0]
        faults.append(_draw(rng, act, world, {**counts, "load": min(start, 1)}))
    return faults


def _draw(rng: random.Random, act: str, world: int, counts: Mapping[str, int]) -> Fault:
    points = [point for point in POINTS if counts[point]]
    if act in ON_DISK:
        points = ["save", "step", "final anchor"]
    if act == "I/O error":  # one operation on a file fails; the program's own functions do not
        points = []
    clock = [] if act in (*ON_DISK, "delay") else [CLOCK] * 3
    point = rng.choice([*points, FILE, FILE, *clock])
    number = rng.randint(1, counts.get(point, 1))
    # Rank 0 changes most of the files.
    first = point in _FIRST_RANK or (point == FILE and rng.random() < 0.7)
    rank = 0 if first else rng.randrange(world)
    seconds = 0.0
    if point == CLOCK:
        seconds = round(rng.uniform(0.0, _LONGEST_CLOCK), 2)
    elif act not in (*ON_DISK, "delay") and rng.random() < 0.4:
        seconds = round(rng.uniform(0.0, 0.3), 3)
    length = round(rng.uniform(0.5, 5.0), 1) if act in ("pause", "delay") else 0.0
    return Fault(act, rank, point, number, seconds, length)


def to_environment(faults: list[Fault]) -> dict[str, str]:
    """Return the variables that carry faults to the ranks."""
    return {FAULTS_VARIABLE: json.dumps([asdict(fault) for fault in faults])}


def given(environ: Mapping[str, str]) -> list[Fault]:
    """Return the faults of an environment."""
    return [Fault(**keys) for keys in json.loads(environ.get(FAULTS_VARIABLE, "[]"))]
