"""`WandbWriter`: the points of TensorBoard also in Weights & Biases, by DeepSpeed's monitor.

wandb is optional (``pip install wandb``). What the package reads from the environment holds here
too: ``WANDB_MODE=offline`` on nodes without internet, ``WANDB_RUN_ID`` and ``WANDB_RESUME=allow``
to continue a run after a restart.
"""

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from megatron_muloco.config.messages import Problem
from megatron_muloco.config.schema import RunConfig, WandbConfig
from megatron_muloco.topology import Topology

__all__ = ["Mirrored", "PointWriter", "WandbWriter", "wandb_is_installed"]

STEP = "iteration"


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
        wandb.define_metric(STEP)
        wandb.define_metric("*", step_metric=STEP)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write one point per tag, with the inner step as x-axis."""
        self._attempt(lambda: self._monitor.log({STEP: step, **values}), points=len(values))

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
