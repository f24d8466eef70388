"""`judge` says whether the fullest rank of a plan fits on a GPU, and what would make it fit.

Changes are tried, not guessed: each is applied to the config, the rules are checked, and the memory
of the changed run is planned. Changes that the rules refuse are left out.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from megatron_muloco.config.derived import topology_of
from megatron_muloco.config.outer import NoOuter
from megatron_muloco.config.rules import check
from megatron_muloco.config.schema import RunConfig
from megatron_muloco.errors import ConfigError
from megatron_muloco.planning.memory import MemoryPlan, memory_plan
from megatron_muloco.topology import Topology

__all__ = ["Change", "Device", "Verdict", "judge"]

_LARGEST = 3  # parts that the verdict names
_MOST_CHANGES = 6
_DOUBLINGS = 6  # of the number of ranks, tried until the run fits


@dataclass(frozen=True, slots=True)
class Device:
    """A kind of GPU.

    Attributes:
        name: Its name.
        memory: Bytes of its memory.
    """

    name: str
    memory: int


@dataclass(frozen=True, slots=True)
class Change:
    """A change of the run and what a rank would need then.

    Attributes:
        words: The keys and values, or the number of ranks.
        needed: Bytes of the fullest rank.
    """

    words: str
    needed: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the fullest rank fits on a GPU.

    Attributes:
        device: The GPU.
        needed: Bytes of the fullest rank.
        largest: Its largest parts and their bytes.
        changes: Changes that need less, best first; none where it fits.
    """

    device: Device
    needed: int
    largest: tuple[tuple[str, int], ...]
    changes: tuple[Change, ...]

    @property
    def fits(self) -> bool:
        """Whether the GPU has enough memory."""
        return self.needed <= self.device.memory


def judge(config: RunConfig, topology: Topology, memory: MemoryPlan, device: Device) -> Verdict:
    """Return the verdict on a plan.

    Args:
        config: A checked config.
        topology: Topology of the world.
        memory: Its plan.
        device: GPU of every rank.
    """
    changes = () if memory.needed <= device.memory else _changes(config, topology, memory, device)
    largest = sorted(_parts(memory).items(), key=lambda part: -part[1])[:_LARGEST]
    return Verdict(device, memory.needed, tuple(largest), tuple(changes))


def _parts(memory: MemoryPlan) -> dict[str, int]:
    """Return the parts of the peak by name."""
    outer = memory.outer_step
    return {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "masters": memory.masters,
        "inner state": memory.inner_state,
        "Muon exchange": memory.exchange,
        "outer state": 0 if memory.outer_on_host else memory.outer_state,
        "outer buffers": outer.device - outer.temporary,
        "temporary buffers" if memory.temporary > memory.activations.peak else "activations": (
            memory.temporary
        ),
        "NCCL": memory.communicators,
    }


def _changes(
    config: RunConfig, topology: Topology, memory: MemoryPlan, device: Device
) -> list[Change]:
    """Return the changes that need less memory, best first."""
    world = topology.world_size
    found = [
        _changed(config, keys, ranks, world=world) for keys, ranks in _candidates(config, world)
    ]
    for ranks in (2**power * world for power in range(1, _DOUBLINGS + 1)):
        more = _changed(config, {}, ranks, world=world)
        if more is not None and more.needed <= device.memory:
            found.append(more)
            break
    smaller: dict[int, Change] = {}  # of changes with the same effect the shortest
    for change in sorted(filter(None, found), key=lambda change: len(change.words)):
        if change.needed < memory.needed:
            smaller.setdefault(change.needed, change)
    return [smaller[needed] for needed in sorted(smaller)][:_MOST_CHANGES]


def _changed(
    config: RunConfig, keys: Mapping[str, Any], ranks: int, *, world: int
) -> Change | None:
    """Return what a rank needs with other keys and ranks; ``None`` where the rules refuse them."""
    try:
        changed = _with(config, keys)
        layout = topology_of(changed, ranks)
        check(changed, layout)
    except (ConfigError, ValidationError):
        return None
    words = " ".join(f"{key}={value}" for key, value in keys.items())
    words += f" on {ranks:,} ranks" if ranks != world else ""
    return Change(words.strip(), memory_plan(changed, layout).needed)


def _candidates(config: RunConfig, world: int) -> Iterator[tuple[Mapping[str, Any], int]]:
    """Yield changed keys and number of ranks."""
    training, parallel = config.training, config.parallel
    without_layout: dict[str, Any] = {}
    if not isinstance(config.outer, NoOuter) and config.outer.state_device != "cpu":
        without_layout["outer.state_device"] = "cpu"
        yield {"outer.state_device": "cpu"}, world
    if training.recompute_granularity != "full":
        full = {"training.recompute_granularity": "full", "training.recompute_num_layers": 1}
        without_layout |= full
        yield full, world
    if training.micro_batch_size > 1:
        half = {"training.micro_batch_size": training.micro_batch_size // 2}
        without_layout |= half
        yield half, world
    yield without_layout, world
    # On as many ranks, where data parallelism can give some up, and on twice as many.
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
        key = f"parallel.{name}"
        double = 2 * getattr(parallel, name)
        yield {key: double}, world
        yield {key: double}, 2 * world


def _with(config: RunConfig, keys: Mapping[str, Any]) -> RunConfig:
    """Return the config with other values of dotted keys."""
    tree = config.model_dump(mode="json")
    for key, value in keys.items():
        section, _, name = key.partition(".")
        tree[section][name] = value
    return RunConfig.model_validate(tree)
