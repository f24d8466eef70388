"""`EventWriter`, `PointLog`, `WandbWriter`: TensorBoard files, a JSONL log, Weights & Biases.

Errors of the file system, and of Weights & Biases, do not end the run.

`PointLog` writes the same points as lines of JSON, for programs. Every start of a run appends to
the file; `tools/run_points.py` reads it::

    {"run": {"method": "MuLoCo, K = 2", ...}, "resumed_step": 0, "time": 1767225600.0}
    {"step": 10, "time": 1767225617.3, "values": {"lm loss": 5.8, "learning-rate": 0.03}}
    {"tag": "run/sample", "text": "Returns the ..."}

A number that JSON does not have is a string: "nan", "inf", "-inf".

Every start of a run begins its event file with a session mark at ``resumed_step + 1``, so readers
drop points that an earlier start wrote after the resumed step. The first start writes one too:
TensorBoard's server takes the first mark as the beginning, and purges only at later ones.

wandb is optional (``pip install wandb``). What the package reads from the environment holds here
too: ``WANDB_MODE=offline`` on nodes without internet, ``WANDB_RUN_ID`` and ``WANDB_RESUME=allow``
to continue a run after a restart.
"""

import importlib.util
import io
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from megatron_muloco.config.messages import Problem
from megatron_muloco.config.schema import RunConfig, WandbConfig
from megatron_muloco.monitor.metrics import METRICS, Metric, MetricTable
from megatron_muloco.topology import Topology

__all__ = [
    "POINTS_FILE",
    "EventWriter",
    "Mirrored",
    "PointLog",
    "PointWriter",
    "TokenAxis",
    "WandbWriter",
    "layout_of",
    "wandb_is_installed",
]

# A full disk may get free again, but every retry leaves a small file behind: retry seldom.
_RETRY_SECONDS = 600.0

POINTS_FILE = "points.jsonl"

_STEP = "iteration"  # the x-axis in Weights & Biases


class PointWriter(Protocol):
    """Writes the points and texts of a run."""

    @property
    def lost_points(self) -> int:
        """Number of points that could not be written."""
        ...

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write one point per tag."""
        ...

    def text(self, tag: str, content: str) -> None:
        """Write a text."""
        ...

    def close(self) -> None:
        """Finish writing."""
        ...


# ---- TensorBoard -------------------------------------------------------------------------


def layout_of(metrics: Iterable[Metric]) -> dict[str, dict[str, list[object]]]:
    """Return the custom-scalars page of these metrics: categories, their charts, and tags.

    Categories and charts are in the order of the rows.
    """
    categories: dict[str, dict[str, list[object]]] = {}
    for row in metrics:
        if row.chart is not None:
            title = row.chart.title if row.unit == "1" else f"{row.chart.title} ({row.unit})"
            charts = categories.setdefault(row.chart.category, {})
            charts[title] = ["Multiline", [f"^{row.tag}$"]]  # a regular expression
    return categories


def _point(row: Metric, value: float) -> Summary.Value:
    return Summary.Value(tag=row.tag, simple_value=value)


def _described(row: Metric, value: float) -> Summary.Value:
    """Return a point with its unit and meaning, which TensorBoard shows with the chart.

    Readers take them from the first point of a tag in a file, and they are several times as long
    as a point, so later points do not have them.
    """
    unit = "" if row.unit == "1" else f" ({row.unit})"
    metadata = SummaryMetadata(
        display_name=row.tag + unit,
        summary_description=f"{row.meaning} Written: {row.when}; {row.over_ranks}.",
        # Without a plugin's name readers of event files print a warning for every tag.
        plugin_data=SummaryMetadata.PluginData(plugin_name="scalars"),
    )
    return Summary.Value(tag=row.tag, simple_value=value, metadata=metadata)


class EventWriter:
    """Writes scalars and texts; refuses unknown tags, tolerates errors of the file system.

    After a failed write it reports once, counts the points that it cannot write in ``lost_points``,
    and tries a new file after `_RETRY_SECONDS`. (The writing thread of the tensorboard package also
    prints its own traceback, once per file.)

    Args:
        directory: Directory of the event files; created if missing.
        resumed_step: Inner step that the run continues from, 0 for a new run.
        report: Called once, with a sentence, at the first failure.
        metrics: Table of the metrics that may be written.
        charts: Metrics with a chart on the custom-scalars page; by default all.
        settings: Row of this run on the page of hyperparameters; none where it is empty.
        results: Tags whose last value is in that row.
        clock: Monotonic time in seconds.

    Attributes:
        directory: Directory of the event files.
        lost_points: Number of points that could not be written.
    """

    def __init__(
        self,
        directory: str,
        *,
        resumed_step: int,
        report: Callable[[str], None],
        metrics: MetricTable = METRICS,
        charts: Iterable[Metric] | None = None,
        settings: Mapping[str, str | float] | None = None,
        results: Sequence[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.directory = directory
        self.lost_points = 0
        self._report, self._metrics, self._clock = report, metrics, clock
        self._layout = layout_of(metrics if charts is None else charts)
        self._settings, self._results = dict(settings or {}), dict.fromkeys(results, 0.0)
        self._reported = False
        self._retry_at = clock()
        self._writer: SummaryWriter | None = None
        self._described: set[str] = set()  # tags of which the present file has a point
        # A mark at 0 makes a new run in an old directory hide the old run's evaluation at step 0.
        self._open(purge_step=resumed_step + 1 if resumed_step else 0)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write one point per tag and flush.

        Raises:
            RuntimeMismatch: A tag is not in the registry.
        """
        rows = [(self._metrics[tag], value) for tag, value in values.items()]

        def write(writer: SummaryWriter) -> None:
            for row, value in rows:
                point = (_point if row.tag in self._described else _described)(row, value)
                self._described.add(row.tag)
                _event_file(writer).add_summary(Summary(value=[point]), step)

        self._attempt(write, points=len(rows))

    def text(self, tag: str, content: str) -> None:
        """Write a text as a code block."""
        # Indented by four spaces any text is a code block in Markdown.
        block = "\n".join(f"    {line}" for line in content.splitlines())
        self._attempt(lambda writer: writer.add_text(tag, block), points=1)

    def close(self) -> None:
        """Close the event file."""
        writer, self._writer = self._writer, None
        if writer is not None:
            try:
                if self._settings:  # the end of the row
                    _event_file(writer).add_summary(hparams(self._settings, self._results)[2])
                writer.close()
            except OSError as error:
                self._failed(error, points=0)

    def _attempt(self, write: Callable[[SummaryWriter], None], *, points: int) -> None:
        if self._writer is None and self._clock() >= self._retry_at:
            # Without a mark, which would hide the points that this start has written so far.
            self._open(purge_step=None)
        if self._writer is None:
            self.lost_points += points
            return
        try:
            write(self._writer)
            # Raises here also an error of the writing thread.
            self._writer.flush()
        except OSError as error:
            self._failed(error, points=points)
            self.close()

    def _open(self, *, purge_step: int | None) -> None:
        self._described.clear()
        try:
            self._writer = SummaryWriter(self.directory, purge_step=purge_step)
            if self._layout:
                self._writer.add_custom_scalars(self._layout)
            if self._settings:
                for begin in hparams(self._settings, self._results)[:2]:
                    _event_file(self._writer).add_summary(begin)
            self._writer.flush()
        except OSError as error:
            self._failed(error, points=0)
            self.close()

    def _failed(self, error: OSError, *, points: int) -> None:
        self.lost_points += points
        self._retry_at = self._clock() + _RETRY_SECONDS
        if not self._reported:
            self._reported = True
            self._report(
                f"monitor.dir: cannot write TensorBoard events to {self.directory}: {error}. "
                "Training goes on without them; free space or make the directory writable, and "
                f"new points will follow within {_RETRY_SECONDS / 60:.0f} minutes."
            )


def _event_file(writer: SummaryWriter) -> Any:
    """Return the event file of a writer, for which torch declares no type."""
    return writer.file_writer


class TokenAxis:
    """Writes chosen metrics a second time, with the tokens of all replicas as x axis.

    TensorBoard has one x axis for a run, and drops all points after a resumed step. So these points
    are a run of their own, in the directory ``tokens`` below that of the run.

    Args:
        writer: Writer of the run with the tokens.
        tokens: Inner step -> tokens of all replicas up to it.
        tags: Tag of a metric -> its tag over tokens.
    """

    def __init__(
        self, writer: EventWriter, tokens: Callable[[int], int], tags: Mapping[str, str]
    ) -> None:
        self._writer, self._tokens, self._tags = writer, tokens, tags

    @property
    def lost_points(self) -> int:
        """Number of points that could not be written."""
        return self._writer.lost_points

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write the points of the chosen metrics."""
        chosen = {self._tags[tag]: value for tag, value in values.items() if tag in self._tags}
        if chosen:
            self._writer.scalars(self._tokens(step), chosen)

    def text(self, tag: str, content: str) -> None:
        """Write nothing: texts have no axis."""

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


# ---- lines of JSON -----------------------------------------------------------------------


class PointLog:
    """Appends every point to a file of JSON lines, and first a line with the run's facts.

    Invariant: a line is written whole and flushed, or it is counted in ``lost_points``. What a kill
    left of a line stays a line of its own.

    Args:
        directory: Directory of `POINTS_FILE`; created if missing.
        facts: Facts of the run for the first line; values that JSON can hold.
        resumed_step: Inner step that the run continues from, 0 for a new run. Readers drop the
            points that earlier starts wrote after it.
        report: Called once, with a sentence, at the first failure.
        clock: Seconds since the epoch.

    Attributes:
        path: The file.
        lost_points: Number of points that could not be written.
    """

    def __init__(
        self,
        directory: str,
        facts: Mapping[str, Any],
        *,
        resumed_step: int,
        report: Callable[[str], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.path = Path(directory) / POINTS_FILE
        self.lost_points = 0
        self._report, self._clock, self._reported = report, clock, False
        self._retry_at = 0.0
        self._file: io.FileIO | None = None
        # Written again with every new file handle until it has been written once: without it the
        # reader would take the points for those of the earlier start.
        self._head: dict[str, Any] | None = {
            "run": dict(facts),
            "resumed_step": resumed_step,
            "time": round(clock(), 3),
        }
        self._attempt([], points=0)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write the points of one step as a line."""
        shown = {tag: _json_number(value) for tag, value in values.items()}
        line = {"step": step, "time": round(self._clock(), 3), "values": shown}
        self._attempt([line], points=len(values))

    def text(self, tag: str, content: str) -> None:
        """Write a text as a line."""
        self._attempt([{"tag": tag, "text": content}], points=1)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _attempt(self, lines: list[dict[str, Any]], *, points: int) -> None:
        if self._clock() < self._retry_at:
            self.lost_points += points
            return
        try:
            if self._file is None:
                self._file = _opened_at_a_line(self.path)
            pending = lines if self._head is None else [self._head, *lines]
            text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in pending)
            content = text.encode()
            # Unbuffered: after an error nothing is left over that a later call would write.
            if self._file.write(content) != len(content):
                raise OSError("only part of the line was written")
            self._head = None
        except OSError as error:
            self._failed(error, points=points)

    def _failed(self, error: OSError, *, points: int) -> None:
        self.close()
        self.lost_points += points
        self._retry_at = self._clock() + _RETRY_SECONDS
        if not self._reported:
            self._reported = True
            self._report(
                f"monitor: cannot write points to {self.path}: {error}. Training goes on without "
                "them; free space or make the directory writable, and new points will follow "
                f"within {_RETRY_SECONDS / 60:.0f} minutes."
            )


def _json_number(value: float) -> float | str:
    """Return a number as JSON can hold it: as a string where it is not finite."""
    return value if math.isfinite(value) else str(float(value))


def _opened_at_a_line(path: Path) -> io.FileIO:
    """Open a file for appending; what a kill left of its last line gets a line break."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = io.FileIO(path, "a+")
    size = file.seek(0, io.SEEK_END)
    if size:
        file.seek(size - 1)
        if file.read(1) != b"\n":
            file.write(b"\n")
    return file


# ---- Weights & Biases --------------------------------------------------------------------


def wandb_is_installed(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Require the package wandb where the run writes to Weights & Biases."""
    if config.monitor.wandb.project is not None and importlib.util.find_spec("wandb") is None:
        yield Problem(
            "monitor.wandb.project",
            f"{config.monitor.wandb.project}, but the package wandb is not installed.\n"
            "Install it (pip install wandb), or remove monitor.wandb.",
        )


class WandbWriter:
    """Writes points to Weights & Biases; an error there does not end the run.

    wandb drops points whose step is lower than one that it has, and lines of training arrive after
    evaluations of later steps. So the step is a value of its own, the x-axis of all charts.

    Args:
        config: Where the run appears.
        settings: The whole configuration of the run, shown beside the charts.
        report: Called once, with a sentence, at the first failure.

    Attributes:
        lost_points: Number of points that wandb did not take.
    """

    def __init__(
        self, config: WandbConfig, settings: Mapping[str, Any], *, report: Callable[[str], None]
    ) -> None:
        import wandb  # type: ignore[import-not-found]  # optional
        from deepspeed.monitor.config import WandbConfig as DeepSpeedConfig
        from deepspeed.monitor.wandb import WandbMonitor

        self.lost_points = 0
        self._report, self._reported = report, False
        named = {"project": config.project, "group": config.group, "team": config.team}
        self._monitor = WandbMonitor(DeepSpeedConfig(enabled=True, **named))
        self._wandb = wandb
        wandb.config.update(dict(settings), allow_val_change=True)
        wandb.define_metric(_STEP)
        wandb.define_metric("*", step_metric=_STEP)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write one point per tag, with the inner step as x-axis."""
        self._attempt(lambda: self._monitor.log({_STEP: step, **values}), points=len(values))

    def text(self, tag: str, content: str) -> None:
        """Write a text into the summary of the run."""
        self._attempt(lambda: self._wandb.run.summary.update({tag: content}), points=1)

    def close(self) -> None:
        """Finish the run in Weights & Biases; waits until its points are sent."""
        self._attempt(self._wandb.finish, points=0)

    def _attempt(self, write: Callable[[], object], *, points: int) -> None:
        try:
            write()
        # The package raises errors of many kinds; none of them is worth the training.
        except Exception as error:  # noqa: BLE001
            self.lost_points += points
            if not self._reported:
                self._reported = True
                self._report(
                    f"monitor.wandb: Weights & Biases failed: {error}. Training goes on; points "
                    "that it does not take are only in TensorBoard."
                )


class Mirrored:
    """Writes everything with several writers, in order."""

    def __init__(self, *writers: PointWriter) -> None:
        self._writers = writers

    @property
    def lost_points(self) -> int:
        """Number of points that could not be written, of all writers."""
        return sum(writer.lost_points for writer in self._writers)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write one point per tag with every writer."""
        for writer in self._writers:
            writer.scalars(step, values)

    def text(self, tag: str, content: str) -> None:
        """Write a text with every writer."""
        for writer in self._writers:
            writer.text(tag, content)

    def close(self) -> None:
        """Finish every writer."""
        for writer in self._writers:
            writer.close()
