#!/usr/bin/env python
"""Training steps with documents: packed attention against the mask of all pairs, and a floor.

Three runs of this program in one process, on one rank, on the same model and samples: attention
with a mask of s x s elements, attention on packed documents, and none at all. Their steps alternate
in random order. The floor is

    step without attention + counted FLOPs of visible pairs / rate of matrix products

    python tools/bench/attention.py [--pairs 30] [--write docs/performance/attention.md]
    python tools/bench/attention.py --one-step 32768    # time and peak memory of one step
"""

import argparse
import random
import resource
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from inner_overhead import clocks, machine_rows, step_of
from one_rank import ALONE, median_interval

BAR = 1.15
WARM_UP_PAIRS = 1
RATE_SHAPE = (512, 64)  # of the products whose rate the floor has: rows of a document, head width
# Products of an element of the score matrix with d channels: q k^T and p v forward; the same scores
# again, dv, dp, dq and dk backward.
PRODUCTS = 2 + 5

Step = Callable[[int], None]


def main() -> int:
    """Measure, print, and write the result page if asked; 1 if the bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/cpu_k2.yaml", help="model and data")
    parser.add_argument("--pairs", type=int, default=30, help="triples of steps that are timed")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens per sequence")
    parser.add_argument("--one-step", type=int, metavar="TOKENS", help="make one step this long")
    parser.add_argument("--write", type=Path, help="result page to write")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as cache:
        if options.one_step:
            print(one_step(options.config, options.one_step, cache))
            return 0
        runs = build(options.config, options.tokens, WARM_UP_PAIRS + options.pairs, cache)
        page, passed = report(measure(runs, options.pairs), runs, options)
    print(page)
    if options.write:
        options.write.write_text(page + written_by_hand(options.write), encoding="utf-8")
    return 0 if passed else 1


def written_by_hand(path: Path) -> str:
    """Return the sections below the measured part of a page, which a new measurement keeps."""
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    _, heading, rest = old.partition("\n## ")
    return "\n" + heading + rest


# ---- the runs ------------------------------------------------------------------------------------


def start(config_path: str, length: int, steps: int, cache: str, *keys: str) -> Any:
    """Return the context of a run of one sequence a step, packed from the config's documents."""
    from megatron_muloco.config import load_config
    from megatron_muloco.training.build import build_run

    overrides = (
        *ALONE,
        f"model.seq_length={length}",
        "training.micro_batch_size=1",
        "training.global_batch_size=1",
        f"training.train_iters={steps}",
        "inner.lr_warmup_iters=0",
        f"data.cache_dir={cache}",
        *keys,
    )
    return build_run(load_config(config_path, overrides))


def build(config_path: str, length: int, steps: int, cache: str) -> dict[str, Any]:
    """Return the contexts of the three runs, by name."""
    from megatron_muloco.model.attention import CoreAttention
    from megatron_muloco.runtime.parallel_state import unmirror_groups

    runs = {}
    for name, impl in (("mask", "dense"), ("packed", "varlen"), ("none", "varlen")):
        if runs:
            unmirror_groups()  # one rank: the groups of all runs are alike
        key = f"model.attention_impl={impl}"
        runs[name] = start(config_path, length, steps, cache, key)
    for module in runs["none"].model.modules():
        if isinstance(module, CoreAttention):
            module.backend = no_attention()
    return runs


def no_attention() -> Any:
    """Return a backend that adds query, key and value: gradients flow, at almost no cost."""
    from megatron_muloco.model.attention import PackedAttention

    class NoAttention(PackedAttention):
        def attend_packed(
            self, query: Any, key: Any, value: Any, boundaries: Any, *, scale: float
        ) -> Any:
            repeats = query.shape[1] // key.shape[1]
            return query + (key + value).repeat_interleave(repeats, dim=1)

    return NoAttention()


def lengths_of(context: Any, step: int) -> np.ndarray:
    """Return the lengths of the documents of a step."""
    from megatron_muloco.data.batches import document_ids
    from megatron_muloco.model.attention import document_boundaries

    tokens = context.train_data.microbatch(step, 0)["tokens"]
    ids = document_ids(tokens, context.tokenizer.eod)
    return np.diff(document_boundaries(ids).numpy()).astype(np.int64)


def one_step(config_path: str, length: int, cache: str) -> str:
    """Make one training step of packed documents; return its time and peak memory as a line."""
    context = start(config_path, length, 1, cache)
    documents = lengths_of(context, 1)
    before = peak_gib()
    started = time.perf_counter()
    step_of(context)(1)
    seconds = time.perf_counter() - started
    mask = length * length / 2**30
    return (
        f"{context.derived.parameters.total / 1e6:.2f}M parameters, 1 x {length:,} tokens in "
        f"{len(documents)} documents, the longest of {documents.max():,}: {seconds:.1f} s; peak "
        f"memory {peak_gib():.2f} GiB, before the step {before:.2f} GiB. A boolean mask alone "
        f"would have {mask:.2f} GiB, and its fp32 copy in each layer {4 * mask:.2f} GiB."
    )


def peak_gib() -> float:
    """Return the largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# ---- times ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Times:
    """Seconds by both clocks, [repetitions, 2] each.

    Attributes:
        steps: Of a step of each run.
        counted: Of the counted products of attention at the measured rate.
        documents: Lengths of the documents of each repetition.
    """

    steps: dict[str, np.ndarray]
    counted: np.ndarray
    documents: Sequence[np.ndarray]


def measure(runs: dict[str, Any], pairs: int) -> Times:
    """Time the steps of all runs in turns, after the warm-up."""
    order = random.Random(0)
    steps = {name: step_of(context) for name, context in runs.items()}
    seconds: dict[str, list[np.ndarray]] = {name: [] for name in runs}
    counted, documents = [], []
    for number in range(1, WARM_UP_PAIRS + pairs + 1):
        names = list(runs)
        order.shuffle(names)
        for name in names:
            started = clocks()
            steps[name](number)
            if number > WARM_UP_PAIRS:
                seconds[name].append(clocks() - started)
        if number > WARM_UP_PAIRS:
            documents.append(lengths_of(runs["packed"], number))
            counted.append(flops(runs["packed"].config.model, documents[-1]) * per_flop())
    return Times(
        {name: np.array(each) for name, each in seconds.items()}, np.array(counted), documents
    )


def flops(model: Any, documents: np.ndarray) -> int:
    """Return the FLOPs of attention on the visible pairs in a training step."""
    pairs = int((documents * (documents + 1) // 2).sum())
    return 2 * PRODUCTS * pairs * model.kv_channels * model.num_attention_heads * model.num_layers


def per_flop() -> np.ndarray:
    """Return the seconds of a FLOP in a product of queries and keys, by both clocks."""
    import torch

    rows, width = RATE_SHAPE
    q, k, scores = torch.randn(rows, width), torch.randn(width, rows), torch.empty(rows, rows)
    repeats = 20
    started = clocks()
    for _ in range(repeats):
        torch.mm(q, k, out=scores)
    return (clocks() - started) / (repeats * 2 * rows * rows * width)


def report(times: Times, runs: dict[str, Any], options: argparse.Namespace) -> tuple[str, bool]:
    """Return the result page, and whether the bar is met."""
    mask, packed, none = (times.steps[name] for name in ("mask", "packed", "none"))
    wall, cpu = (median_interval((mask / packed)[:, clock]) for clock in (0, 1))
    floor = none + times.counted
    over_floor = median_interval((packed / floor)[:, 1])
    medians = {
        name: np.median(each, axis=0) * 1e3
        for name, each in (*times.steps.items(), ("counted", times.counted), ("floor", floor))
    }
    lengths = np.concatenate(times.documents)
    shown = np.mean([(d * (d + 1) / 2).sum() / options.tokens**2 for d in times.documents])
    model = runs["packed"].config.model
    passed = wall[1] >= BAR and cpu[1] >= BAR

    def row(name: str, key: str) -> str:
        return f"| {name} | {medians[key][0]:.0f} ms | {medians[key][1]:.0f} ms |"

    def interval(values: tuple[float, float, float]) -> str:
        return f"{values[0]:.2f} ({values[1]:.2f} to {values[2]:.2f})"

    return "\n".join(
        [
            "# Attention inside documents",
            "",
            f"`python tools/bench/attention.py --pairs {options.pairs}`: training steps on packed",
            "documents, with a mask of all pairs of positions (`model.attention_impl: dense`) and",
            "on packed documents (`varlen`, here the loop over documents), alternating in one",
            "process. The floor is a step without attention and the counted FLOPs of the pairs",
            "that documents show, at the rate of single matrix products.",
            "",
            "| quantity | by the wall | of CPU |",
            "|---|---|---|",
            f"| **median ratio, mask / packed** (bar: {BAR}), 95 % interval | **{interval(wall)}** "
            f"| **{interval(cpu)}** |",
            row("median step with the mask", "mask"),
            row("median step with packed documents", "packed"),
            row("median step without attention", "none"),
            row("counted products of attention", "counted"),
            row("floor", "floor"),
            f"| packed / floor | | {interval(over_floor)} |",
            "",
            "| run | |",
            "|---|---|",
            f"| model | {runs['packed'].derived.parameters.total / 1e6:.2f}M parameters, "
            f"{model.num_layers} layers, {model.num_attention_heads} heads of "
            f"{model.kv_channels}, fp32, Muon, one rank |",
            f"| step | 1 x {options.tokens:,} tokens; "
            f"{len(lengths) / len(times.documents):.1f} documents a sequence, "
            f"median length {np.median(lengths):.0f} |",
            f"| pairs that documents show | {100 * shown:.0f} % of s x s |",
            f"| repetitions | {options.pairs}, after {WARM_UP_PAIRS} that is not counted |",
            *machine_rows(),
            "",
            f"{'The bar is met' if passed else 'THE BAR IS MISSED'}: both intervals are "
            f"{'above' if passed else 'not above'} {BAR}. Times by the wall",
            "include waiting for other processes, as the load average says; CPU times do not.",
        ]
    ), passed


if __name__ == "__main__":
    raise SystemExit(main())
