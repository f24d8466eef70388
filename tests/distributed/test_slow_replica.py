"""A replica that is slower than the others is named to all of them, without a collective more."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from megatron_muloco.config import RunConfig
from tests.support.byte_runs import byte_config, byte_dataset, run_here
from tests.support.faults import count_calls
from tests.support.spawn import run_ranks

SLOW, SLEEP_S = 1, 0.3
STEPS, INTERVAL, LINE = 8, 4, 2


def times_and_points(config: RunConfig) -> tuple[list[float], dict[int, dict[str, float]]]:
    """This rank's milliseconds by step, and what its monitor writes of all replicas by step."""
    recorded: list[tuple[Any, ...]] = []
    written: list[tuple[Any, ...]] = []

    @contextmanager
    def slow(context: Any) -> Iterator[None]:
        forward = context.forward.losses

        def late(*args: Any, **kwargs: Any) -> Any:
            time.sleep(SLEEP_S if context.groups.coords.replica == SLOW else 0)
            return forward(*args, **kwargs)

        context.forward.losses = late
        with ExitStack() as stack:
            recorded.append(stack.enter_context(count_calls(context.monitor, "record")))
            written.append(stack.enter_context(count_calls(context.monitor, "scalars")))
            yield

    run_here(config, around=slow)
    times = [metrics["perf/replica_step_ms"] for _, metrics in recorded[0]]
    points = {step: values for step, values in written[0] if "perf/slowest_replica" in values}
    return times, points


def test_the_slow_replica_is_named(tmp_path: Path) -> None:
    dataset = byte_dataset(tmp_path)
    config = byte_config(
        dataset,
        parallel={"num_replicas": 2},
        training={"train_iters": STEPS, "global_batch_size": 2},
        outer={"sync_interval": INTERVAL},
        monitor={"log_interval": LINE},
    )
    (first, points), (second, nothing) = run_ranks(times_and_points, 2, config)
    assert not nothing  # one rank writes
    assert min(second) >= 1e3 * SLEEP_S
    assert sorted(points) == list(range(LINE, STEPS + 1, LINE))
    for step, values in points.items():
        means = [sum(times[step - LINE : step]) / LINE for times in (first, second)]
        # Sent as fp32: half a unit in the last of 24 bits.
        allowed = max(means) * 2**-24
        assert abs(values["perf/replica_step_ms_min"] - min(means)) <= allowed
        assert abs(values["perf/replica_step_ms_max"] - max(means)) <= allowed
        assert values["perf/slowest_replica"] == means.index(max(means))
