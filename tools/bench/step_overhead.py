#!/usr/bin/env python
"""Overhead of this program in an inner step, against a bare Megatron loop, side by side.

Both train the same model on the same samples with AdamW inside Megatron's distributed optimizer,
on one rank, without an outer step. The bare loop has Megatron's own optimizer, schedule and DDP,
and nothing else. Steps alternate within one process, in random order inside each pair, so that
other load on the machine affects both.

    python tools/bench/step_overhead.py [--pairs 200] [--write docs/performance/step_overhead.md]
"""

import argparse
import platform
import random
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from one_rank import ALONE, median_interval
from provenance import commit

WARM_UP_PAIRS = 5
OVERRIDES = (
    *ALONE,
    "training.micro_batch_size=4",
    "training.global_batch_size=4",
    "inner.kind=adamw",
    "inner.lr=0.001",
)


def main() -> None:
    """Measure, print, and write the result page if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/cpu_k2.yaml", help="model and data")
    parser.add_argument("--pairs", type=int, default=200, help="pairs of steps that are timed")
    parser.add_argument("--write", type=Path, help="result page to write")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    ours, bare, description = build(options.config, options.pairs + WARM_UP_PAIRS)
    seconds = measure(ours, bare, options.pairs)
    page = report(seconds, description, options)
    print(page)
    if options.write:
        options.write.write_text(page + "\n", encoding="utf-8")


Step = Callable[[int], None]


def build(config_path: str, steps: int) -> tuple[Step, Step, str]:
    """Return both loops' steps over one process group, and what they train."""
    from megatron_muloco.config import load_config
    from megatron_muloco.training.build import build_run
    from megatron_muloco.training.loop import inner_step, outer_step
    from megatron_muloco.training.stopping import StopRequest

    length = (f"training.train_iters={steps}", "inner.lr_warmup_iters=2")
    config = load_config(config_path, (*OVERRIDES, *length))
    context = build_run(config)
    stop = StopRequest()

    def ours(step: int) -> None:
        inner_step(context, step, stop, None)
        outer_step(context, step)

    model, batch = config.model, config.training.global_batch_size
    description = (
        f"{context.derived.parameters.total / 1e6:.2f}M parameters, {batch} x {model.seq_length} "
        "tokens a step, fp32, AdamW, one rank"
    )
    return ours, bare_loop(config, context), description


def bare_loop(config: Any, context: Any) -> Step:
    """Return a step of a hand-written Megatron loop on a second copy of the model."""
    import torch
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_muloco.config.inner import learning_rate
    from megatron_muloco.data.batches import document_ids
    from megatron_muloco.model.attention import attention_of
    from megatron_muloco.model.build import build_model

    groups = context.groups
    stage = build_model(config, groups)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=True, check_for_nan_in_grad=False
    )
    model = DistributedDataParallel(stage.config, ddp_config, stage, pg_collection=groups.pg)
    stage.config.finalize_model_grads_func = finalize_model_grads
    adam = config.inner.adam
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=config.inner.lr,
            weight_decay=context.derived.weight_decay,
            adam_beta1=adam.beta1,
            adam_beta2=adam.beta2,
            adam_eps=adam.eps,
            bf16=False,
            params_dtype=torch.float32,
            use_distributed_optimizer=True,
            clip_grad=config.training.clip_grad,
        ),
        [model],
        pg_collection=groups.pg,
        use_gloo_process_groups=False,
    )
    forward_backward = get_forward_backward_func(vp_size=None, pp_size=1)
    end = context.tokenizer.eod

    def forward_step(batches: Any, model: Any) -> Any:
        batch = next(batches)
        ids = document_ids(batch["tokens"], end)
        mask = attention_of(stage).documents(ids, ids.device)
        output = model(batch["tokens"], batch["position_ids"], mask, labels=batch["labels"])

        def loss(output: Any) -> Any:
            mean = output.float().mean()
            return mean, {"lm loss": mean.detach().clone()}

        return output, loss

    def step(number: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.inner, context.derived.train_iters, number)
        model.zero_grad_buffer()
        optimizer.zero_grad()
        forward_backward(
            forward_step_func=forward_step,
            data_iterator=iter([context.train_data.microbatch(number, 0)]),
            model=[model],
            num_microbatches=1,
            seq_length=config.model.seq_length,
            micro_batch_size=config.training.micro_batch_size,
            pg_collection=groups.pg,
        )
        optimizer.step()

    return step


def measure(ours: Step, bare: Step, pairs: int) -> np.ndarray:
    """Return seconds [pairs, 2] of ours and bare, after the warm-up."""
    order = random.Random(0)
    seconds = np.zeros((pairs, 2))
    for pair in range(-WARM_UP_PAIRS, pairs):
        loops = [(0, ours), (1, bare)]
        order.shuffle(loops)
        for index, loop in loops:
            started = time.perf_counter()
            loop(pair + WARM_UP_PAIRS + 1)
            if pair >= 0:
                seconds[pair, index] = time.perf_counter() - started
    return seconds


def report(seconds: np.ndarray, description: str, options: argparse.Namespace) -> str:
    """Return the result page."""
    ratios = seconds[:, 0] / seconds[:, 1]
    middle, low, high = median_interval(ratios)
    ours, bare = np.median(seconds, axis=0) * 1e3
    import megatron.core
    import torch

    return "\n".join(
        [
            "# Overhead of an inner step",
            "",
            f"`python tools/bench/step_overhead.py --pairs {options.pairs}`: this program's inner",
            "step against a bare Megatron loop on the same model and samples, alternating in one",
            "process.",
            "",
            "| quantity | value |",
            "|---|---|",
            f"| **median ratio, ours / bare** | **{middle:.4f}** |",
            f"| bootstrap 95 % interval of the median | {low:.4f} to {high:.4f} |",
            f"| median of ours | {ours:.1f} ms |",
            f"| median of bare (the floor) | {bare:.1f} ms |",
            f"| pairs | {len(ratios)}, after {WARM_UP_PAIRS} that are not counted |",
            f"| run | {description} |",
            f"| machine | {platform.machine()}, {_processor()}, "
            f"{torch.get_num_threads()} thread(s) |",
            f"| versions | Python {platform.python_version()}, torch {torch.__version__}, "
            f"megatron-core {megatron.core.__version__} |",
            f"| commit, date | {commit()}, {datetime.now(UTC):%Y-%m-%d} |",
            "",
            "The difference is what a run needs beyond a bare loop: sharing loss and stop requests",
            "over the replica, the finite check of the gradient norm, timing and metrics. The",
            "inner optimizers differ too: ours updates all shards in one foreach pass.",
        ]
    )


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown processor"


if __name__ == "__main__":
    main()
