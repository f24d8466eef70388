#!/usr/bin/env python
"""Times Newton-Schulz per transformer layer against its plain five steps, side by side.

A layer has four square matrices and three of ratio 2.75 (gate, up, down). Every round runs both
implementations of each shape and one plain matrix product, in random order, in fp32. Samples are
kept in a file, so that several short runs add up; the page is made of all of them.

    python tools/bench/newton_schulz.py --width 1024 --seconds 120 --samples runs/ns.json
    python tools/bench/newton_schulz.py --samples runs/ns.json --write docs/performance/...

Two clocks: wall time, and CPU time of all threads, which other programs on the machine disturb
less. Waiting threads sleep (OMP_WAIT_POLICY=passive); spinning would be counted as CPU time.
"""

import argparse
import json
import os
import platform
import random
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")  # both are read when torch is loaded
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from provenance import commit
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megatron_muloco.optim.newton_schulz import NORM_EPSILON, choose, newton_schulz

RESAMPLES = 10_000
RATIO = 2.75
COUNTS = {"square": 4, "tall": 2, "wide": 1}  # per layer: q, k, v, proj; gate, up; down
# Steps of the quintic, copied so that the baseline stays what it was.
TRIPLES = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
# Clock readings in a sample: wall and CPU seconds.
Clocks = tuple[float, float]


def shapes(width: int) -> dict[str, tuple[int, int]]:
    """Return the shape of each kind of matrix."""
    longer = int(RATIO * width)
    return {"square": (width, width), "tall": (longer, width), "wide": (width, longer)}


def plain(M: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Compute the fixed baseline: this package's first version, on a batch of one."""
    norm = torch.linalg.vector_norm(M, dim=(-2, -1), keepdim=True, dtype=torch.float64)
    X = (M.to(dtype) / (norm + NORM_EPSILON).to(dtype)).unsqueeze(0)
    tall = M.shape[-2] > M.shape[-1]
    X = (X.mT if tall else X).contiguous()
    for a, b, c in TRIPLES:
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    result: Tensor = (X.mT if tall else X)[0].contiguous()
    return result


def ours(M: Tensor) -> Tensor:
    """Compute what the optimizer runs on the CPU."""
    impl = choose(M.shape[0], M.shape[1], torch.float32, torch.device("cpu"))
    return newton_schulz(M, dtype=torch.float32, impl=impl)


def flops(orthogonalise: Callable[[Tensor], Tensor], shape: tuple[int, int]) -> float:
    """Count the FLOPs of the matrix products without executing them."""
    with FlopCounterMode(display=False) as counter:
        orthogonalise(torch.empty(shape, device="meta"))
    return float(counter.get_total_flops())


def measure(width: int, seconds: float) -> dict[str, list[Clocks]]:
    """Return samples of every case, one per round, of at least one round after a warm-up."""
    generator = torch.Generator().manual_seed(0)
    matrices = {k: torch.randn(s, generator=generator) for k, s in shapes(width).items()}
    cases: dict[str, Callable[[], Tensor]] = {"product": lambda: square @ square}
    square = matrices["square"]
    for kind, M in matrices.items():
        cases[f"{kind} plain"] = lambda M=M: plain(M)  # type: ignore[misc]
        cases[f"{kind} ours"] = lambda M=M: ours(M)  # type: ignore[misc]
    cases["product"]()
    ours(matrices["square"])
    order = random.Random(time.time_ns())
    samples: dict[str, list[Clocks]] = {name: [] for name in cases}
    deadline, longest = time.perf_counter() + seconds, 0.0
    while time.perf_counter() + longest < deadline or not samples["product"]:
        started = time.perf_counter()
        for kind in order.sample(sorted(cases), len(cases)):
            wall, cpu = time.perf_counter(), time.process_time()
            cases[kind]()
            samples[kind].append((time.perf_counter() - wall, time.process_time() - cpu))
        longest = max(longest, time.perf_counter() - started)
    return samples


def error(shape: tuple[int, int], orthogonalise: Callable[[Tensor], Tensor]) -> float:
    """Return the relative Frobenius distance to the plain implementation in float64."""
    M = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    exact = plain(M.double(), torch.float64)
    return float((orthogonalise(M).double() - exact).norm() / exact.norm())


def median_with_interval(ratios: np.ndarray) -> str:
    """Return the median and its bootstrap 95 % interval."""
    draws = np.random.default_rng(0).integers(0, len(ratios), (RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(ratios[draws], axis=1), [2.5, 97.5])
    return f"{np.median(ratios):.2f} ({low:.2f} to {high:.2f})"


def floor(rows: int, columns: int, impl: str) -> float:
    """Return FLOPs over m^3 if every symmetric product cost half of itself."""
    r = max(rows, columns) / min(rows, columns)
    return {"plain": 5 * (4 * r + 2), "triangle": 5 * (3 * r + 1), "gram": 9 * r + 11}[impl]


def table(width: int, samples: dict[str, list[Clocks]]) -> list[str]:
    """Return the rows of one width: each shape, then the layer."""
    clocks = {name: np.array(values) for name, values in samples.items()}
    product_rate = 2 * width**3 / np.median(clocks["product"], axis=0)
    rows, totals = [], {which: np.zeros_like(clocks["product"]) for which in ("plain", "ours")}
    work = {"plain": 0.0, "ours": 0.0, "floor": 0.0}
    for kind, shape in shapes(width).items():
        impl = choose(*shape, torch.float32, torch.device("cpu"))
        counted = {"plain": flops(plain, shape), "ours": flops(ours, shape)}
        ideal = floor(*shape, impl) * width**3
        for which in totals:
            totals[which] += COUNTS[kind] * clocks[f"{kind} {which}"]
            work[which] += COUNTS[kind] * counted[which]
        work["floor"] += COUNTS[kind] * ideal
        times = clocks[f"{kind} plain"], clocks[f"{kind} ours"]
        rows.append(row(f"{width}, {kind}, `{impl}`", *times, counted, ideal, product_rate))
    name = f"**{width}, layer**"
    counted = {"plain": work["plain"], "ours": work["ours"]}
    return [*rows, row(name, totals["plain"], totals["ours"], counted, work["floor"], product_rate)]


def row(
    name: str,
    base: np.ndarray,
    fast: np.ndarray,
    counted: dict[str, float],
    ideal: float,
    product_rate: np.ndarray,
) -> str:
    """Return one row; rates and the distance to the floor are by CPU time."""
    wall, cpu = (median_with_interval(base[:, i] / fast[:, i]) for i in (0, 1))
    base_rate, fast_rate = (
        counted[which] / np.median(times[:, 1]) / product_rate[1]
        for which, times in (("plain", base), ("ours", fast))
    )
    best = counted["plain"] / ideal
    reached = np.median(base[:, 1] / fast[:, 1]) / best
    return (
        f"| {name} | {wall} | {cpu} | {counted['plain'] / 1e9:.1f} → {counted['ours'] / 1e9:.1f} "
        f"| {base_rate:.2f} → {fast_rate:.2f} | {best:.2f} | {reached:.2f} |"
    )


def report(recorded: dict[str, dict[str, list[Clocks]]], loads: list[float]) -> str:
    """Return the measured part of the page."""
    version = commit()
    lines = [
        "| width, shape, implementation | wall, plain / ours | CPU time, plain / ours "
        "| GFLOP, plain → ours | rate / product's, plain → ours | floor | reached of floor |",
        "|---|---|---|---|---|---|---|",
    ]
    for width, samples in sorted(recorded.items(), key=lambda item: int(item[0])):
        lines += table(int(width), samples)
    lines.append("")
    for width, samples in sorted(recorded.items(), key=lambda item: int(item[0])):
        product = np.array(samples["product"])
        gflops = 2 * int(width) ** 3 / np.median(product, axis=0) / 1e9
        lines.append(
            f"- {width}: {len(product)} rounds; plain product {gflops[0]:.0f} GFLOP/s by wall, "
            f"{gflops[1]:.0f} GFLOP per second of CPU."
        )
    for kind, shape in shapes(512).items():
        lines.append(
            f"- Error against float64, width 512, {kind}: plain {error(shape, plain):.1e}, "
            f"ours {error(shape, ours):.1e}."
        )
    lines += [
        f"- {datetime.now(UTC):%Y-%m-%d}, commit {version}, torch {torch.__version__}, "
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, load "
        f"average {min(loads):.0f} to {max(loads):.0f}: other programs ran.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure if asked, print what all samples say, and put it into the page if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, help="hidden width to measure")
    parser.add_argument("--seconds", type=float, default=120, help="duration of the measurement")
    parser.add_argument("--samples", type=Path, required=True, help="file of the samples")
    parser.add_argument("--write", type=Path, help="result page; its measured part is replaced")
    options = parser.parse_args()
    recorded: dict[str, dict[str, list[Clocks]]] = {}
    loads: list[float] = []
    if options.samples.exists():
        recorded, loads = json.loads(options.samples.read_text(encoding="utf-8"))
    if options.width:
        loads.append(os.getloadavg()[0])
        into = recorded.setdefault(str(options.width), {})
        for name, values in measure(options.width, options.seconds).items():
            into.setdefault(name, []).extend(values)
        options.samples.write_text(json.dumps((recorded, loads)), encoding="utf-8")
    measured = report(recorded, loads)
    print(measured)
    if options.write:
        page = options.write.read_text(encoding="utf-8")
        before, rest = page.split("<!-- measured -->\n")
        _, after = rest.split("<!-- end -->\n")
        page = f"{before}<!-- measured -->\n{measured}\n<!-- end -->\n{after}"
        options.write.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
