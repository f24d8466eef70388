#!/usr/bin/env python
"""Cost of codecs on one core: each against torch.clone, and an outer step against its round.

Every repetition encodes and decodes the same buffer with every codec and clones it, in random
order, so that other load on the machine affects all of them. Then steps of the demo model
alternate with all the coding that a rank does in an outer step among two replicas.

    python tools/bench/codec_throughput.py [--write docs/performance/codec_throughput.md]

The clock is CPU time of the process, which runs one thread: other programs disturb it less than
wall time. `make demo` makes the data that the steps train on.
"""

import argparse
import os
import platform
import random
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is loaded

import numpy as np
import torch
from one_rank import ALONE, median_interval
from provenance import commit
from torch import Tensor

from megatron_muloco.comm.chunking import chunk_pieces, payload_sizes
from megatron_muloco.compress.codec import Codec
from megatron_muloco.compress.format import CodingUnit, Grouping
from megatron_muloco.compress.quantizers import E3M0, Linear
from megatron_muloco.compress.statistical import Statistical
from megatron_muloco.compress.topk import TopK

WARM_UP = 2
BITS = (8, 4, 2, 1)
DENSITY = 1 / 32
SIZES = (1 << 20, 1 << 22)
REPLICAS, SYNC_INTERVAL = 2, 30  # of configs/cpu_k2.yaml, and of the round that the bar is about
BAR = 0.01  # share of a round that coding may take
OVERRIDES = (
    *ALONE,
    "training.micro_batch_size=8",  # what one of two replicas has
    "training.global_batch_size=8",
)
Action = Callable[[], object]


def codecs() -> dict[str, Codec]:
    """Return the codecs of the table, one group a buffer; x is followed by bits."""
    coded = {f"top-k 1/32, values x {bits}": TopK(DENSITY, value_bits=bits) for bits in BITS}
    return {
        **{f"statistical x {bits}": Statistical(bits, Grouping()) for bits in BITS},
        **{
            f"statistical x {bits}, edged bins": Statistical(bits, Grouping(), "edged")
            for bits in BITS
        },
        "statistical x 2, blocks of 256": Statistical(2, Grouping("block", 256)),
        "statistical x 2, blocks of 256, edged bins": Statistical(
            2, Grouping("block", 256), "edged"
        ),
        **{f"linear x {bits}": Linear(bits, Grouping()) for bits in BITS},
        "e3m0": E3M0(Grouping()),
        "top-k 1/32, fp32 values": TopK(DENSITY),
        **coded,
    }


def pseudogradient(count: int) -> Tensor:
    """Return values of different scales, with tails: normal times log-normal."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.randn(count, generator=generator).div_(2).exp_()
    return torch.randn(count, generator=generator).mul_(scales).mul_(1e-3)


def measure(actions: dict[str, Action], repetitions: int) -> dict[str, np.ndarray]:
    """Return CPU seconds of each action, [repetitions], in random order within a repetition."""
    order, seconds = random.Random(0), {name: np.zeros(repetitions) for name in actions}
    for repetition in range(-WARM_UP, repetitions):
        for name in order.sample(sorted(actions), len(actions)):
            started = time.process_time()
            actions[name]()
            if repetition >= 0:
                seconds[name][repetition] = time.process_time() - started
    return seconds


def actions_on(values: Tensor) -> dict[str, Action]:
    """Return clone, and encode and decode of every codec."""
    unit, out = CodingUnit(values.numel()), torch.empty_like(values)
    actions: dict[str, Action] = {"clone": values.clone}
    for name, codec in codecs().items():
        payload = codec.encode(values, unit)
        actions[f"{name} encode"] = lambda codec=codec: codec.encode(values, unit)  # type: ignore[misc]
        actions[f"{name} decode"] = lambda codec=codec, payload=payload: codec.decode(  # type: ignore[misc]
            payload, unit, out
        )
    return actions


def coding_of_an_outer_step(sizes: list[tuple[str, int]], codec: Codec) -> Action:
    """Return what a rank encodes and decodes in an outer step, error feedback on both sides.

    Its own tensors are encoded and, for the residual, decoded. Of its chunk, every replica's
    payload is decoded, and the mean encoded and decoded. All chunks of the mean are decoded.
    """
    chunks = chunk_pieces(sizes, REPLICAS, {})
    units = [piece.unit for pieces in chunks for piece in pieces]
    own = [piece.unit for piece in chunks[0]]
    values = {unit.numel: pseudogradient(unit.numel) for unit in units}
    out = {numel: torch.empty_like(each) for numel, each in values.items()}
    payloads = {unit.numel: codec.encode(values[unit.numel], unit) for unit in units}
    assert sum(payload_sizes(chunks, lambda name: codec)) == sum(
        payloads[unit.numel].numel() for unit in units
    )

    def encode(what: list[CodingUnit]) -> None:
        for unit in what:
            codec.encode(values[unit.numel], unit)

    def decode(what: list[CodingUnit]) -> None:
        for unit in what:
            codec.decode(payloads[unit.numel], unit, out[unit.numel])

    def action() -> None:
        encode(units)
        decode(units)
        decode(own * REPLICAS)
        encode(own)
        decode(own)
        decode(units)

    return action


def demo_step(config_path: str, steps: int) -> tuple[Action, list[tuple[str, int]]]:
    """Return the inner step of one replica of the demo, and its tensors' names and sizes."""
    from megatron_muloco.config import load_config
    from megatron_muloco.training.build import build_run
    from megatron_muloco.training.loop import inner_step, outer_step
    from megatron_muloco.training.stopping import StopRequest

    length = (f"training.train_iters={steps}", "inner.lr_warmup_iters=2")
    context: Any = build_run(load_config(config_path, (*OVERRIDES, *length)))
    stop, numbers = StopRequest(), iter(range(1, steps + 1))

    def action() -> None:
        number = next(numbers)
        inner_step(context, number, stop, None)
        outer_step(context, number)

    model = context.model.module
    return action, [(name, each.numel()) for name, each in model.named_parameters()]


def median(samples: np.ndarray, digits: int) -> str:
    """Return the median and its bootstrap 95 % interval."""
    middle, low, high = median_interval(samples)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def table(count: int, seconds: dict[str, np.ndarray]) -> list[str]:
    """Return the rows of one buffer."""
    clone, size = seconds["clone"], 4 * count
    lines = [
        f"## 2^{count.bit_length() - 1} values, clone {size / np.median(clone) / 1e9:.1f} GB/s "
        f"({np.median(clone) * 1e3:.2f} ms)",
        "",
        "| codec x bits | encode, of clone | GB/s | decode, of clone | GB/s | both, of clone |",
        "|---|---|---|---|---|---|",
    ]
    for name in codecs():
        encode, decode = seconds[f"{name} encode"], seconds[f"{name} decode"]
        cells = [
            cell
            for each in (encode, decode)
            for cell in (median(clone / each, 3), f"{size / np.median(each) / 1e9:.2f}")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | {median(clone / (encode + decode), 3)} |")
    return [*lines, ""]


def round_table(seconds: dict[str, np.ndarray], parameters: int) -> list[str]:
    """Return the share of a round that an outer step's coding takes."""
    coding, step = seconds["coding"], seconds["step"]
    edged = seconds["coding, edged bins"]
    share, edged_share = (each / (SYNC_INTERVAL * step) * 100 for each in (coding, edged))
    met = "met" if np.median(share) <= BAR * 100 else "missed"
    return [
        "## Of a round",
        "",
        "| quantity | value |",
        "|---|---|",
        f"| **coding / round of {SYNC_INTERVAL} steps** | **{median(share, 3)} %** |",
        f"| the same with edged bins | {median(edged_share, 3)} % |",
        f"| coding of an outer step, statistical 2 bits | {median(coding * 1e3, 1)} ms |",
        f"| the same with edged bins | {median(edged * 1e3, 1)} ms |",
        f"| inner step | {median(step * 1e3, 1)} ms |",
        f"| bar | at most {BAR:.0%}: {met} |",
        f"| model | the demo's, {parameters / 1e6:.2f}M parameters, 8 x 256 tokens a step |",
        "",
        f"Coding is all that a rank does among K = {REPLICAS} replicas with error feedback: its",
        "own tensors encoded and decoded, its chunk decoded K times, the chunk's mean encoded and",
        "decoded, all chunks of the mean decoded.",
    ]


def report(by_size: dict[int, dict[str, np.ndarray]], of_round: list[str], repetitions: int) -> str:
    """Return the page."""
    lines = [
        "# Codecs on one core",
        "",
        f"`python tools/bench/codec_throughput.py --repetitions {repetitions}`: encode and decode",
        "against `torch.clone` of the same fp32 buffer, in CPU time of one thread, in random",
        "order. *Of clone* is clone's time over the codec's, the median of all repetitions and its",
        "bootstrap 95 % interval; GB/s count fp32 bytes. The values are normal times log-normal.",
        "Kind statistical chooses the bins of least error but where edged ones are named. One",
        "scale or table a buffer, but where blocks are named; top-k chooses in blocks of 4,096.",
        "Clone includes the page faults of its new memory.",
        "",
    ]
    for count, seconds in by_size.items():
        lines += table(count, seconds)
    return "\n".join(
        [
            *lines,
            *of_round,
            "",
            f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread, load "
            f"average {os.getloadavg()[0]:.0f}: other programs ran. torch {torch.__version__},",
            f"{datetime.now(UTC):%Y-%m-%d}, commit {commit()}.",
        ]
    )


def main() -> None:
    """Measure, print, and write the result page if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/cpu_k2.yaml", help="model and data")
    parser.add_argument(
        "--repetitions", type=int, default=40, help="repetitions of every measurement"
    )
    parser.add_argument("--write", type=Path, help="result page to write")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    step, sizes = demo_step(options.config, options.repetitions + WARM_UP)
    torch.set_num_threads(1)
    coding = coding_of_an_outer_step(sizes, Statistical(2, Grouping()))
    edged = coding_of_an_outer_step(sizes, Statistical(2, Grouping(), "edged"))
    actions = {"coding": coding, "coding, edged bins": edged, "step": step}
    of_round = round_table(
        measure(actions, options.repetitions),
        sum(size for _, size in sizes),
    )
    by_size = {n: measure(actions_on(pseudogradient(n)), options.repetitions) for n in SIZES}
    page = report(by_size, of_round, options.repetitions)
    print(page)
    if options.write:
        options.write.write_text(page + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
