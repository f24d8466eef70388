"""Rates from the log of a measured run of the same config: seconds of a step, rate of the link."""

from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from megatron_muloco.config.outer import NoOuter
from megatron_muloco.errors import ConfigError
from megatron_muloco.planning.timing import Rate, Rates
from tools.planning.estimate import Estimate
from tools.run_points import read_run

__all__ = ["Log", "calibrated", "read_log"]

_SKIPPED = 0.2  # share of the points, at the start: compilation, caches


@dataclass(frozen=True)
class Log:
    """Medians of a run's log, without its beginning.

    Attributes:
        directory: Where it is.
        step: Seconds of an inner step, without outer steps.
        exposed: Seconds of a round that waited for outer steps; ``None`` without them.
    """

    directory: Path
    step: float
    exposed: float | None


def read_log(directory: Path, fragments: int = 1) -> Log:
    """Return the medians of a run's points.

    Args:
        directory: Its `monitor.dir`.
        fragments: P; a round has as many launches, each with its exposed time.

    Raises:
        ConfigError: There are no points of its steps.
    """
    points = read_run(directory).points

    def middle(tag: str) -> float | None:
        values = [value for _, value in points.get(tag, [])]
        return median(values[int(_SKIPPED * len(values)) :]) / 1e3 if values else None

    step = middle("perf/replica_step_ms")
    if step is None:
        raise ConfigError(
            f"--measured {directory} has no points of perf/replica_step_ms. Give the monitor.dir "
            "of a run that wrote at least one line of its log."
        )
    exposed = middle("muloco/exposed_ms")
    return Log(
        directory,
        step,
        None if exposed is None else exposed * fragments,
    )


def calibrated(base: Estimate, log: Log) -> Rates:
    """Return the rates with what the log tells.

    The step is the log's. Where outer steps block, the exposed time of a round is the exchange, and
    with the planner's bits gives the rate of payload; with overlap the log does not tell it.
    """
    origin = f"measured in {log.directory}"
    rates = replace(base.rates, step=Rate(log.step, origin))
    outer = base.config.outer
    if isinstance(outer, NoOuter) or outer.overlap_steps or not log.exposed or not base.bits:
        return rates
    payload = sum(base.bits) / log.exposed
    return replace(rates, link=Rate(payload, f"{origin}, payload"), efficiency=Rate(1.0, origin))
