#!/usr/bin/env python
"""How long a save holds training: in the background, and waited for, on the same state and disk.

One rank with MuLoCo's state. Each trial measures, one after the other: a bare copy of everything
that the rank saves into memory that it has used before; a save in the background, until training
may go on, and until it is published; and a save that training waits for. The state changes between
trials by an inner step, during which nothing is written.

    python tools/bench/background_save.py --dir DISK [--trials 5]
        [--set model.hidden_size=1024 ...] [--write docs/performance/background_save.md]
"""

import argparse
import platform
import shutil
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from one_rank import median_interval
from provenance import commit

ONE_RANK = (
    "parallel.num_replicas=1",
    "training.eval_interval=0",
    "training.micro_batch_size=1",
    "training.global_batch_size=1",
    "checkpoint.dir=null",
    "checkpoint.save_interval=0",
    "monitor.dir=null",
    "monitor.sample_tokens=0",
)
WARM_UP = 1  # trials that are not counted: memory is new, and files are not in their place
NAMES = {
    "copy": "bare copy of the state",
    "held": "save in the background: training is held",
    "published": "save in the background: until it is published",
    "blocking": "save that training waits for",
}


def main() -> None:
    """Measure, print, and write the result page if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/cpu_k2.yaml", help="model and data")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides")
    parser.add_argument("--dir", type=Path, required=True, help="directory on the disk to measure")
    parser.add_argument("--trials", type=int, default=5, help="trials that are counted")
    parser.add_argument("--write", type=Path, help="result page to write")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    seconds, description = measure(options)
    page = report(seconds, description, options)
    print(page)
    if options.write:
        options.write.write_text(page + "\n", encoding="utf-8")


def measure(options: argparse.Namespace) -> tuple[dict[str, np.ndarray], str]:
    """Return the seconds of each trial by name, and what was saved."""
    from megatron_muloco.checkpoint.store import CheckpointStore
    from megatron_muloco.config import load_config
    from megatron_muloco.training.build import build_run
    from megatron_muloco.training.loop import inner_step, outer_step
    from megatron_muloco.training.stopping import StopRequest

    trials = options.trials + WARM_UP
    # No outer step in between: right after one a checkpoint has no masters.
    length = (f"training.train_iters={trials + 1}", f"outer.sync_interval={trials + 1}")
    given = (*ONE_RANK, *length, "inner.lr_warmup_iters=1", *options.set)
    context = build_run(load_config(options.config, given))
    place = options.dir / "background_save"
    beside = CheckpointStore(place / "beside", context.groups, keep=1, background=True)
    waited = CheckpointStore(place / "waited", context.groups, keep=1)
    copy, nbytes = bare_copy(context)
    found: dict[str, list[float]] = {name: [] for name in NAMES}
    stop = StopRequest()
    try:
        for trial in range(1, trials + 1):
            inner_step(context, trial, stop, None)
            outer_step(context, trial)
            found["copy"].append(timed(copy))
            began = time.perf_counter()
            found["held"].append(timed(lambda step=trial: beside.save(step, context.state)))
            if not beside.wait():
                raise SystemExit("the save in the background failed")
            found["published"].append(time.perf_counter() - began)
            found["blocking"].append(timed(lambda step=trial: waited.save(step, context.state)))
    finally:
        shutil.rmtree(place, ignore_errors=True)
    context.monitor.close()
    millions = context.derived.parameters.total / 1e6
    description = f"{millions:.1f}M parameters, {nbytes / 1e9:.2f} GB of state, one rank"
    return {name: np.array(values[WARM_UP:]) for name, values in found.items()}, description


def bare_copy(context: Any) -> tuple[Callable[[], None], int]:
    """Return a function that copies all that this rank saves, and the bytes of it."""
    import torch

    from megatron_muloco.checkpoint.io import run_kinds

    kinds = run_kinds(context.state, with_masters=True)
    live = [tensor.detach() for kind in kinds.values() for tensor in kind.values()]
    pairs = [(torch.zeros(tensor.shape, dtype=tensor.dtype), tensor) for tensor in live]

    def copy() -> None:
        for target, source in pairs:
            target.copy_(source)

    return copy, sum(target.nbytes for target, _ in pairs)


def timed(call: Callable[[], Any]) -> float:
    """Return the seconds that a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def report(seconds: dict[str, np.ndarray], description: str, options: argparse.Namespace) -> str:
    """Return the page: times, and the two ratios that matter, each within a trial."""
    rows = []
    for name, label in NAMES.items():
        middle, low, high = median_interval(seconds[name])
        rows.append(f"| {label} | {middle:.3f} | {low:.3f} to {high:.3f} |")
    lines = [
        "# How long a save holds training",
        "",
        "<!-- Written by tools/bench/background_save.py -->",
        "",
        f"{description}; {len(seconds['copy'])} trials, {platform.machine()}, "
        f"{datetime.now(UTC):%Y-%m-%d}, commit {commit()}.",
        "",
        "| | s, median | 95 % |",
        "|---|---|---|",
        *rows,
        "",
        "| ratio, within each trial | median | 95 % |",
        "|---|---|---|",
        ratio("held / copy", seconds["held"] / seconds["copy"]),
        ratio("held / save that training waits for", seconds["held"] / seconds["blocking"]),
        "",
        "```",
        f"python tools/bench/background_save.py --dir {options.dir} --config {options.config}"
        + (f" --set {' '.join(options.set)}" if options.set else ""),
        "```",
    ]
    return "\n".join(lines)


def ratio(label: str, values: np.ndarray) -> str:
    """Return a row of the table of ratios."""
    middle, low, high = median_interval(values)
    return f"| {label} | {middle:.3f} | {low:.3f} to {high:.3f} |"


if __name__ == "__main__":
    main()
