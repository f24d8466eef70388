#!/usr/bin/env python
"""Overhead of Muon in a whole training step, against AdamW on every parameter and a floor.

Two runs of this program in one process, on one rank: one with Muon, one with AdamW, the same
model and samples. Their steps alternate in random order, and each pair also measures the rate of
matrix products at the shapes of the model and the rate of copies. The floor is

    AdamW step + counted Newton-Schulz FLOPs / matrix rate + counted bytes / copy rate

    python tools/bench/inner_overhead.py [--pairs 60] [--write docs/performance/inner_overhead.md]
"""

import argparse
import platform
import random
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from one_rank import ALONE, median_interval
from provenance import commit

BAR = 1.3
WARM_UP_PAIRS = 3
FLOOR_STEPS = 8
PRODUCT_REPEATS, COPY_REPEATS = 8, 2
OVERRIDES = (
    *ALONE,
    "training.micro_batch_size=8",
    "training.global_batch_size=8",
    "inner.lr_warmup_iters=2",
)
INNER = {
    "adamw": ("inner.kind=adamw", "inner.lr=0.001"),
    "muon": ("inner.kind=muon", "inner.muon.ns_dtype=fp32"),
}
# Reads and writes of each element of a matrix that a step with Muon cannot do without.
WORDS = {"momentum": 3, "collect": 2, "return": 2, "apply": 3}

Step = Callable[[int], None]


def main() -> int:
    """Measure, print, and write the result page if asked; 1 if the bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/cpu_k2.yaml", help="model and data")
    parser.add_argument("--pairs", type=int, default=60, help="pairs of steps that are timed")
    parser.add_argument("--write", type=Path, help="result page to write")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    steps, work, description = build(options.config, WARM_UP_PAIRS + FLOOR_STEPS + options.pairs)
    floor = floor_first(steps["adamw"], work)
    print(
        f"floor: {floor.total * 1e3:.1f} ms = AdamW step {floor.adamw * 1e3:.1f} + "
        f"{work.flops / 1e9:.2f} GFLOP {floor.newton_schulz * 1e3:.1f} + "
        f"{work.bytes / 1e6:.1f} MB {floor.moving * 1e3:.1f}; bar: {BAR} x",
        flush=True,
    )
    seconds = measure(steps, work, options.pairs)
    page, passed = report(seconds, floor, work, description, options)
    print(page)
    if options.write:
        options.write.write_text(page + "\n", encoding="utf-8")
    return 0 if passed else 1


@dataclass(frozen=True)
class Floor:
    """Wall seconds of the parts of the floor."""

    adamw: float
    newton_schulz: float
    moving: float

    @property
    def total(self) -> float:
        """Seconds of a step that takes no longer than it must."""
        return self.adamw + self.newton_schulz + self.moving


class CountedWork:
    """Counted work of Muon in a step, and the time it takes on this machine at best.

    Attributes:
        flops: FLOPs of Newton-Schulz per step.
        numel: Elements of all matrices.
        bytes: Bytes read and written per step.
    """

    def __init__(self, matrices: Sequence[Any], ns_steps: int) -> None:
        import torch

        self._steps = ns_steps
        self._shapes = Counter((min(u.shape), max(u.shape)) for u in matrices)
        self.flops = sum(
            count * ns_steps * (4 * m * m * n + 2 * m**3) for (m, n), count in self._shapes.items()
        )
        self.numel = sum(u.numel for u in matrices)
        self.bytes = 4 * self.numel * sum(WORDS.values())
        self._copies = (torch.randn(self.numel), torch.empty(self.numel))

    def newton_schulz_seconds(self) -> np.ndarray:
        """Return the counted FLOPs over the rate of single products of these shapes."""
        import torch

        total = np.zeros(2)
        for (m, n), count in self._shapes.items():
            X, A = torch.randn(m, n), torch.randn(m, m)
            wide, small = torch.empty(m, n), torch.empty(m, m)
            started = clocks()
            for _ in range(PRODUCT_REPEATS):
                torch.mm(X, X.mT, out=small)
                torch.mm(A, A, out=small)
                torch.mm(A, X, out=wide)
            total += count * self._steps * (clocks() - started) / PRODUCT_REPEATS
        return total

    def moving_seconds(self) -> np.ndarray:
        """Return the counted bytes over the rate of a copy, which reads and writes each element."""
        source, target = self._copies
        started = clocks()
        for _ in range(COPY_REPEATS):
            target.copy_(source)
        return self.bytes * (clocks() - started) / (COPY_REPEATS * 2 * 4 * self.numel)


def build(config_path: str, steps: int) -> tuple[dict[str, Step], CountedWork, str]:
    """Return both runs' steps, the work that Muon adds to AdamW's, and what they train."""
    from megatron_muloco.config import load_config
    from megatron_muloco.runtime.parallel_state import unmirror_groups
    from megatron_muloco.training.build import build_run

    length = f"training.train_iters={steps}"
    runs = {}
    for kind, keys in INNER.items():
        if runs:
            unmirror_groups()  # one rank: the groups of both runs are alike
        runs[kind] = build_run(load_config(config_path, (*OVERRIDES, length, *keys)))
    muon = runs["muon"]
    work = CountedWork(muon.optimizer.inner.table.matrices, muon.config.inner.muon.num_ns_steps)
    model, batch = muon.config.model, muon.config.training.global_batch_size
    description = (
        f"{muon.derived.parameters.total / 1e6:.2f}M parameters, {work.numel / 1e6:.2f}M of them "
        f"in matrices, {batch} x {model.seq_length} tokens a step, fp32, one rank, no outer step"
    )
    return {kind: step_of(context) for kind, context in runs.items()}, work, description


def step_of(context: Any) -> Step:
    """Return a whole training step of a context."""
    from megatron_muloco.training.loop import inner_step, outer_step
    from megatron_muloco.training.stopping import StopRequest

    stop = StopRequest()

    def step(number: int) -> None:
        inner_step(context, number, stop, None)
        outer_step(context, number)

    return step


def clocks() -> np.ndarray:
    """Return seconds by the wall and seconds of CPU."""
    return np.array([time.perf_counter(), time.process_time()])


def timed(action: Callable[[], object]) -> np.ndarray:
    """Return the seconds of an action by both clocks."""
    started = clocks()
    action()
    return clocks() - started


def floor_first(adamw: Step, work: CountedWork) -> Floor:
    """Return the floor from a few AdamW steps and rates, before Muon has made a step."""
    numbers = range(1, WARM_UP_PAIRS + FLOOR_STEPS + 1)
    steps = [timed(lambda number=number: adamw(number)) for number in numbers][WARM_UP_PAIRS:]
    rates = [(work.newton_schulz_seconds(), work.moving_seconds()) for _ in numbers]
    newton_schulz, moving = np.median(rates[WARM_UP_PAIRS:], axis=0)[:, 0]
    return Floor(float(np.median(steps, axis=0)[0]), float(newton_schulz), float(moving))


def measure(steps: dict[str, Step], work: CountedWork, pairs: int) -> dict[str, np.ndarray]:
    """Return seconds [pairs, clocks] of both steps, and of the counted work at its rates."""
    actions: dict[str, Callable[[int], np.ndarray]] = {
        "adamw": lambda number: timed(lambda: steps["adamw"](number)),
        "muon": lambda number: timed(lambda: steps["muon"](number)),
        "newton_schulz": lambda number: work.newton_schulz_seconds(),
        "moving": lambda number: work.moving_seconds(),
    }
    order = random.Random(0)
    made = {"adamw": WARM_UP_PAIRS + FLOOR_STEPS, "muon": WARM_UP_PAIRS}
    for number in range(1, WARM_UP_PAIRS + 1):
        steps["muon"](number)
    seconds: dict[str, list[np.ndarray]] = {name: [] for name in actions}
    for pair in range(1, pairs + 1):
        for name in order.sample(sorted(actions), len(actions)):
            seconds[name].append(actions[name](made.get(name, 0) + pair))
    return {name: np.array(values) for name, values in seconds.items()}


def spread(figures: tuple[float, float, float]) -> str:
    """Return a median and its interval as text."""
    middle, low, high = figures
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def report(
    seconds: dict[str, np.ndarray],
    first: Floor,
    work: CountedWork,
    description: str,
    options: argparse.Namespace,
) -> tuple[str, bool]:
    """Return the result page and whether the bar is met."""
    wall, cpu = ({name: values[:, clock] for name, values in seconds.items()} for clock in (0, 1))
    added = wall["newton_schulz"] + wall["moving"]
    ratio, low, high = median_interval(wall["muon"] / (wall["adamw"] + added))
    of_cpu = median_interval(cpu["muon"] / (cpu["adamw"] + cpu["newton_schulz"] + cpu["moving"]))
    plain = median_interval(wall["muon"] / wall["adamw"])
    ms = {name: float(np.median(values)) * 1e3 for name, values in wall.items()}
    cpu_ms = {name: float(np.median(values)) * 1e3 for name, values in cpu.items()}
    difference = float(np.median(cpu["muon"] - cpu["adamw"])) * 1e3
    counted = float(np.median(cpu["newton_schulz"] + cpu["moving"])) * 1e3
    floor = float(np.median(wall["adamw"] + added)) * 1e3
    passed = high <= BAR
    return "\n".join(
        [
            "# What Muon adds to a training step",
            "",
            f"`python tools/bench/inner_overhead.py --pairs {options.pairs}`: whole training steps",
            "of this program with Muon against the same with AdamW on every parameter, alternating",
            "in one process. The floor is an AdamW step, the counted Newton-Schulz FLOPs at the",
            "rate of single matrix products of these shapes, and the counted bytes at the rate of",
            "a copy; the rates are measured beside every pair.",
            "",
            "| quantity | value |",
            "|---|---|",
            f"| **median ratio, step with Muon / floor** (bar: {BAR}) | **{ratio:.3f}** |",
            f"| bootstrap 95 % interval of the median | {low:.3f} to {high:.3f} |",
            f"| the same by CPU time | {spread(of_cpu)} |",
            f"| step with Muon | {ms['muon']:.1f} ms; {cpu_ms['muon']:.1f} ms of CPU |",
            f"| floor | {floor:.1f} ms |",
            f"| of it AdamW step | {ms['adamw']:.1f} ms; {cpu_ms['adamw']:.1f} ms of CPU |",
            f"| of it Newton-Schulz, {work.flops / 1e9:.2f} GFLOP | {ms['newton_schulz']:.1f} ms: "
            f"{work.flops / ms['newton_schulz'] / 1e6:.0f} GFLOP/s |",
            f"| of it moving {work.bytes / 1e6:.1f} MB | {ms['moving']:.1f} ms: "
            f"{work.bytes / ms['moving'] / 1e6:.1f} GB/s |",
            f"| floor as computed before the first step with Muon | {first.total * 1e3:.1f} ms |",
            f"| step with Muon / step with AdamW | {spread(plain)} |",
            "| what Muon adds in CPU time, measured / counted work at these rates | "
            f"{difference:.1f} / {counted:.1f} ms |",
            f"| pairs | {options.pairs} |",
            f"| run | {description} |",
            *machine_rows(),
            "",
            f"{'The bar is met' if passed else 'THE BAR IS MISSED'}: the whole interval is "
            f"{'below' if passed else 'not below'} {BAR}.",
            "",
            f"Bytes: momentum {WORDS['momentum']} words of 4 bytes an element of a matrix, "
            f"collecting {WORDS['collect']},",
            f"returning {WORDS['return']}, decay and descent {WORDS['apply']}. The floor keeps "
            "what the AdamW step spends on",
            "matrices, which Muon does not, so it is generous by that; and it leaves out what",
            "Newton-Schulz moves between its products, so it is strict by that.",
        ]
    ), passed


def machine_rows() -> list[str]:
    """Return the rows that say where and with what this was measured."""
    import megatron.core
    import torch

    return [
        f"| machine | {platform.machine()}, {_processor()}, {torch.get_num_threads()} thread(s); "
        "load average "
        f"{Path('/proc/loadavg').read_text(encoding='utf-8').split()[0]} at the end |",
        f"| versions | Python {platform.python_version()}, torch {torch.__version__}, "
        f"megatron-core {megatron.core.__version__} |",
        f"| commit, date | {commit()}, {datetime.now(UTC):%Y-%m-%d} |",
    ]


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown processor"


if __name__ == "__main__":
    raise SystemExit(main())
