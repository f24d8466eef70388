"""`Player` plays compute and transfers of one replica; the programs say what happens when.

A program is a list of events. Compute and waiting take time one after the other; transfers share
one link and follow each other on it in the order of their sends::

    compute   |#####|#####|#####|.....|#####|        # computes, . waits
                 send a|           |wait a
    link               |===a=========|

Replicas are equal, so one stands for all. Two programs:

- `trainer_rounds`: the outer steps of a run, at the steps that `outer.schedule` gives. A step is
  one piece, and training waits where a fragment is applied.
- `layered_rounds`: the directed graph of Streaming DiLoCo (arXiv 2501.18512). Gradients of a layer
  are sent as soon as its backward is done, and are needed at the layer's next forward. With H = 1
  it is data parallelism that overlaps its reduction with backward.

Both repeat from round to round, so a share is measured in a round after the first ones.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from megatron_muloco.outer.schedule import Apply, Average, Launch, SyncSchedule
from megatron_muloco.planning.timing import BACKWARD_SHARE

__all__ = [
    "Compute",
    "Event",
    "Layered",
    "Player",
    "Program",
    "Send",
    "Wait",
    "fewest_overlap_steps",
    "layered_rounds",
    "steady_share",
    "trainer_rounds",
]

_WARM_UP = 2  # rounds before the one that is measured: by then the link has its steady queue


class Compute(NamedTuple):
    """Compute for some time."""

    seconds: float


class Send(NamedTuple):
    """Begin a transfer as soon as the link is free."""

    key: Hashable
    bits: float


class Wait(NamedTuple):
    """Wait for the last transfer of that key; no time where there was none."""

    key: Hashable


Event = Compute | Send | Wait


@dataclass(slots=True)
class Player:
    """Clock of one replica and its link.

    Attributes:
        rate: Bits per second of the link.
        now: Seconds since the start.
        computed: Seconds that computed.
        busy: Seconds in which the link sent.
    """

    rate: float
    now: float = 0.0
    computed: float = 0.0
    busy: float = 0.0
    _free: float = 0.0
    _arrivals: dict[Hashable, float] = field(default_factory=dict)

    def play(self, events: Sequence[Event]) -> None:
        """Play events after what has been played so far."""
        for event in events:
            if isinstance(event, Compute):
                self.now += event.seconds
                self.computed += event.seconds
            elif isinstance(event, Send):
                begin = max(self._free, self.now)
                self._free = begin + event.bits / self.rate
                self._arrivals[event.key] = self._free
                self.busy += self._free - begin
            else:
                self.now = max(self.now, self._arrivals.pop(event.key, 0.0))


Program = Callable[[int], Sequence[Event]]
"""Events of a round, by its number, counted from 0."""


def steady_share(program: Program, rate: float) -> float:
    """Return the share of a round that computes, once rounds repeat.

    A round cannot be shorter than its transfers. Where the link is only a little too slow, its
    queue grows over many rounds until training waits, so that bound is taken without playing them.

    Args:
        program: Events of each round.
        rate: Bits per second of the link.
    """
    player = Player(rate)
    for index in range(_WARM_UP):
        player.play(program(index))
    begin, before, sent = player.now, player.computed, player.busy
    player.play(program(_WARM_UP))
    return (player.computed - before) / max(player.now - begin, player.busy - sent)


def _merged(events: Iterator[Event]) -> list[Event]:
    """Return events with neighbouring pieces of compute as one."""
    found: list[Event] = []
    for event in events:
        if isinstance(event, Compute) and found and isinstance(found[-1], Compute):
            found[-1] = Compute(found[-1].seconds + event.seconds)
        else:
            found.append(event)
    return found


# ------------------------------------------------------------------------------------------
# Our trainer.


def trainer_rounds(
    interval: int, fragment_bits: Sequence[float], overlap_steps: int, step_seconds: float
) -> Program:
    """Return the rounds of a run with a constant H.

    Args:
        interval: H.
        fragment_bits: Bits of each fragment that a replica sends.
        overlap_steps: tau.
        step_seconds: Seconds of an inner step.
    """
    first, later = (
        [
            Compute(steps * step_seconds)
            if event is None
            else Send(event.fragment, fragment_bits[event.fragment])
            if isinstance(event, Launch)
            else Wait(event.fragment)
            for steps, event in pattern
        ]
        for pattern in _round_patterns(interval, len(fragment_bits), overlap_steps)
    )
    return lambda number: later if number else first


@lru_cache(maxsize=256)
def _round_patterns(
    interval: int, fragments: int, overlap_steps: int
) -> tuple[tuple[tuple[int, Launch | Apply | Average | None], ...], ...]:
    """Return the first round and a later one: numbers of steps without an event, and events."""
    schedule = SyncSchedule(interval, 2 * interval, fragments, overlap_steps)
    found = []
    for number in range(2):
        parts: list[tuple[int, Launch | Apply | Average | None]] = []
        quiet = 0
        for step in range(number * interval + 1, (number + 1) * interval + 1):
            quiet += 1
            for event in schedule.events(step):
                if quiet:
                    parts.append((quiet, None))
                    quiet = 0
                parts.append((0, event))
        found.append((*parts, (quiet, None)))
    return tuple(found)


def fewest_overlap_steps(
    interval: int, fragment_bits: Sequence[float], step_seconds: float, rate: float, share: float
) -> int | None:
    """Return the fewest tau with which a share of the round computes; ``None`` if no tau has it."""
    for overlap in range(interval):
        program = trainer_rounds(interval, fragment_bits, overlap, step_seconds)
        if steady_share(program, rate) >= share:
            return overlap
    return None


# ------------------------------------------------------------------------------------------
# The papers' graph.


@dataclass(frozen=True, slots=True)
class Layered:
    """A model as the simulator of Streaming DiLoCo sees it: equal layers.

    Attributes:
        layers: Number of layers.
        step_seconds: Seconds of forward and backward together.
        bits: Bits of all layers in one exchange.
        interval: H; 1 for data parallelism.
        fragments: P. Layer l is in fragment l mod P: strided, as in the paper.
        overlap_steps: tau.
    """

    layers: int
    step_seconds: float
    bits: float
    interval: int = 1
    fragments: int = 1
    overlap_steps: int = 0

    def launch_step(self, layer: int) -> int:
        """Return the step of a round, from 0, in whose backward a layer is sent.

        The paper's distance between fragments is floor(H / (P + 1)): the embedding is one more.
        """
        if self.fragments == 1:
            return 0
        spacing = max(1, self.interval // (self.fragments + 1))
        return spacing * (layer % self.fragments + 1) % self.interval


def layered_rounds(model: Layered) -> Program:
    """Return the rounds of a model; all are equal."""
    forward = model.step_seconds * (1 - BACKWARD_SHARE) / model.layers
    backward = model.step_seconds * BACKWARD_SHARE / model.layers
    sends: dict[int, set[int]] = {}
    needs: dict[int, set[int]] = {}
    for layer in range(model.layers):
        launched = model.launch_step(layer)
        sends.setdefault(launched, set()).add(layer)
        needed = (launched + 1 + model.overlap_steps) % model.interval
        needs.setdefault(needed, set()).add(layer)

    def events() -> Iterator[Event]:
        for step in range(model.interval):
            if step not in sends and step not in needs:
                yield Compute(model.step_seconds)
                continue
            for layer in range(model.layers):
                if layer in needs.get(step, ()):
                    yield Wait(layer)
                yield Compute(forward)
            for layer in reversed(range(model.layers)):
                yield Compute(backward)
                if layer in sends.get(step, ()):
                    yield Send(layer, model.bits / model.layers)

    played = _merged(events())
    return lambda _: played
