"""`read_run`: points and facts of a run, from its JSONL log or, without one, its event files.

The log is what `megatron_muloco.monitor.writers.PointLog` writes. Every start of a run appends to
it, so a step may be there twice: the last start wins, and what an earlier start wrote after the
step that a later one resumed from is dropped, as TensorBoard does.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_muloco.errors import ConfigError
from megatron_muloco.monitor.writers import POINTS_FILE

__all__ = ["TRAINING_TAGS", "Points", "RunPoints", "read_log", "read_points", "read_run", "text_of"]

Points = Mapping[str, list[tuple[int, float]]]
"""Tag -> (inner step, value) in the order of steps."""

_EVENT_FILES = "events.out.tfevents.*"
_CONFIG_TEXT = "run/config"

TRAINING_TAGS = ("lm loss", "lm loss replica 0")
"""Tags of the training loss; steps that no launch sent have the second one."""


@dataclass(frozen=True)
class RunPoints:
    """What a run wrote.

    Attributes:
        source: The log, or the directory of the event files.
        facts: Facts of the last start, as `monitor.build.run_facts` makes them; event files have
            only ``config``, and very old ones nothing.
        points: Every point by tag.
        notes: What was skipped while reading, a sentence each.
    """

    source: Path
    facts: Mapping[str, Any]
    points: Points
    notes: tuple[str, ...] = ()

    @property
    def last_step(self) -> int:
        """Inner step of the last training point."""
        return max(
            (step for tag in TRAINING_TAGS for step, _ in self.points.get(tag, [])), default=0
        )


def read_run(directory: str | Path) -> RunPoints:
    """Return the points of a run.

    Args:
        directory: The run's directory, or the one below it that holds the log or the event files.

    Raises:
        ConfigError: There is no such directory, it has no points, or it has several runs.
    """
    root = Path(directory)
    if not root.is_dir():
        raise ConfigError(f"{root}: no such directory, so there is no run to read.")
    log = _only(root, "logs", root.rglob(POINTS_FILE))
    if log is not None:
        run = read_log(log)
    else:
        events = _only(root, "event files", {path.parent for path in root.rglob(_EVENT_FILES)})
        if events is None:
            raise ConfigError(
                f"{root}: neither {POINTS_FILE} nor event files are here or below, so there are no "
                "points to read. Give a run's monitor.dir or checkpoint.dir, or a directory above."
            )
        found = _load(events)
        text = _text_in(found, _CONFIG_TEXT)
        facts = {} if text is None else {"config": yaml.safe_load(_unindented(text))}
        run = RunPoints(events, facts, _points_in(found))
    if not run.points:
        raise ConfigError(
            f"{run.source}: no points; the run ended before its first line. Train it longer, or "
            "leave it out."
        )
    return run


def _only(root: Path, what: str, found: Iterable[Path]) -> Path | None:
    """Return the only path of several that may be found, ``None`` for none."""
    everything = sorted(found)
    # Below a run's event files are others that belong to it.
    paths = [path for path in everything if not set(everything) & set(path.parents)]
    if len(paths) > 1:
        shown = ", ".join(str(path.relative_to(root)) for path in paths[:5])
        raise ConfigError(
            f"{root}: {len(paths)} {what} are below it ({shown}{', ...' if paths[5:] else ''}), so "
            "it is not clear which run is meant. Give the directory of one run."
        )
    return paths[0] if paths else None


# ---- the log -------------------------------------------------------------------------------------


@dataclass
class _Log:
    """What has been read of a log so far."""

    facts: dict[str, Any] = field(default_factory=dict)
    values: dict[str, dict[int, float]] = field(default_factory=dict)
    torn: list[int] = field(default_factory=list)

    def start(self, facts: dict[str, Any], resumed_step: int) -> None:
        """Begin a start of the run: drop what earlier ones wrote after the resumed step."""
        self.facts = facts
        for points in self.values.values():
            # Step 0 is the evaluation of a new run, not of one that resumes.
            for step in [step for step in points if step > resumed_step or not resumed_step]:
                del points[step]

    def line(self, record: Mapping[str, Any]) -> None:
        """Add a line."""
        if "run" in record:
            self.start(record["run"], int(record["resumed_step"]))
        elif "values" in record:
            for tag, value in record["values"].items():
                self.values.setdefault(tag, {})[int(record["step"])] = float(value)


def read_log(path: Path) -> RunPoints:
    """Return the points of a JSONL log; lines that are no whole record are skipped and named."""
    log = _Log()
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                log.line(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError):
                log.torn.append(number)
    points = {tag: sorted(values.items()) for tag, values in log.values.items() if values}
    return RunPoints(path, log.facts, points, tuple(_torn_notes(path, log.torn)))


def _torn_notes(path: Path, torn: list[int]) -> Iterator[str]:
    if torn:
        shown = ", ".join(map(str, torn[:5])) + (", ..." if torn[5:] else "")
        lines = f"line {shown} is" if len(torn) == 1 else f"lines {shown} are"
        yield f"{path}: {lines} no whole record and skipped, as a kill while writing leaves them."


# ---- event files ---------------------------------------------------------------------------------


def read_points(directory: str) -> Points:
    """Return every scalar in the event files of a run.

    Raises:
        ConfigError: There are none.
    """
    if not Path(directory).is_dir():
        raise ConfigError(
            f"monitor.dir: {directory} does not exist, so there is no run to summarise. "
            "Train first, and run this from the same working directory."
        )
    return _points_in(_load(directory))


def text_of(directory: str | Path, tag: str) -> str | None:
    """Return the last text of a tag in the event files, ``None`` where there is none."""
    return _text_in(_load(directory), tag)


def _load(directory: str | Path) -> EventAccumulator:
    """Read the event files of a directory, every point instead of a sample."""
    return EventAccumulator(str(directory), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def _points_in(events: EventAccumulator) -> Points:
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def _text_in(events: EventAccumulator, tag: str) -> str | None:
    name = f"{tag}/text_summary"
    if name not in events.Tags()["tensors"]:
        return None
    return str(events.Tensors(name)[-1].tensor_proto.string_val[0].decode())


def _unindented(block: str) -> str:
    """Return the text of a Markdown code block, as `EventWriter.text` writes it."""
    return "\n".join(line.removeprefix("    ") for line in block.splitlines())
