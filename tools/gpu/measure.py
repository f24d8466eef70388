"""Measurements of runs: B1 of whole programs; T6, B2 and B4 to B7 inside this process.

On a CPU, in a rehearsal, the same calls are made at small sizes.
"""

import gzip
import json
import re
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_muloco.comm.compressed import build_compressed_reducer_for
from megatron_muloco.comm.reducers import build_plain_reducer_for
from megatron_muloco.config.outer import (
    LinearCompression,
    StatisticalCompression,
    TopKCompression,
)
from megatron_muloco.errors import ConfigError
from megatron_muloco.model.flops import flops_per_token
from megatron_muloco.outer.optimizer import AnchorState, Mix, OuterNesterov
from megatron_muloco.outer.reducer import Reducer
from megatron_muloco.training.build import RunContext
from tools.gpu.findings import Finding
from tools.gpu.inside import Sections, merged, opened, run_config, write_documents
from tools.gpu.kernels import milliseconds
from tools.gpu.runs import PAPER, Program, Run, planned
from tools.gpu.runs import TINY as REHEARSED

__all__ = ["gaps", "layer", "outer_step", "speed", "storage", "synchronizations"]

ALONE: Sections = {
    "parallel": {
        "num_replicas": 1,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "sequence_parallel": False,
    },
    "training": {"train_tokens": None, "train_iters": 100, "eval_interval": 0},
    "inner": {"lr": 0.01, "lr_warmup_iters": 5},
    "checkpoint": {"save_interval": 0},
    # Beyond the steps that are made: no output is due.
    "monitor": {"log_interval": 1000},
}
MODEL = ("models/150m.yaml", "methods/muloco_k1.yaml")
MICROBATCHES = 8
# One layer of configs/models/15b.yaml as a rank of tp 4 holds it.
LAYER: Mapping[str, int] = {
    "num_layers": 1,
    "hidden_size": 4608,
    "ffn_hidden_size": 12672 // 4,
    "num_attention_heads": 36 // 4,
}
TINY: Mapping[str, int] = {
    "num_layers": 1,
    "hidden_size": 64,
    "ffn_hidden_size": 176,
    "num_attention_heads": 2,
    "kv_channels": 32,
    "seq_length": 64,
}


@contextmanager
def _run(
    device: torch.device, *sections: Sections, base: tuple[str, ...] = MODEL, micro: int = 2
) -> Iterator[RunContext]:
    """Open a run of one rank on made-up documents."""
    sizes: Sections = {
        "training": {"micro_batch_size": micro, "global_batch_size": micro * MICROBATCHES},
        "model": {} if device.type == "cuda" else TINY,
    }
    with tempfile.TemporaryDirectory() as name:
        prefix = write_documents(Path(name) / "data")
        config = run_config(prefix, merged(ALONE, *sections, sizes), base=base)
        with opened(config) as context:
            yield context


def _step(context: RunContext, step: int) -> None:
    from megatron_muloco.training.loop import inner_step
    from megatron_muloco.training.stopping import StopRequest

    with StopRequest() as stop:
        inner_step(context, step, stop, None)


def _passes(context: RunContext, *, forward_only: bool = False) -> Callable[[], Tensor]:
    """Return a call that runs the microbatches of one step forward and back."""
    batches = [context.train_data.microbatch(1, index) for index in range(MICROBATCHES)]

    def both_ways() -> Tensor:
        context.model.zero_grad_buffer()
        return context.forward(iter(batches), MICROBATCHES, forward_only=forward_only)

    return both_ways


# ---- whole programs ------------------------------------------------------------------------------

# Micro-batch by model: with 128,256 rows of the output head, logits take most of the memory.
SPEED = {"150m": 8, "416m": 8}
_CLASSES = (
    ("matrix products", r"gemm|cutlass|nvjet|cublas|sm90_xmma"),
    ("attention", r"flash|fmha|sdpa|cudnn.*attn|efficient_attention|mha"),
    ("copies and fills", r"memcpy|memset|copy_kernel|CatArray|fill"),
    ("reductions and softmax", r"reduce|softmax|norm"),
    ("pointwise", r"elementwise|pointwise|vectorized|foreach|multi_tensor"),
)


def speed(program: Program) -> list[Finding]:
    """Time 150M and 416M on one rank, and divide the device's time by kinds of kernels."""
    findings: list[Finding] = []
    for model, micro_batch in SPEED.items():
        steps = (10, 20) if program.on_gpu else (2, 4)
        length: Sections = {
            "training": {
                "micro_batch_size": micro_batch,
                "global_batch_size": 8 * micro_batch,
                "train_iters": steps[1] + 3,
                "train_tokens": None,
                "eval_interval": 0,
            },
            "outer": {"sync_interval": steps[0]},
            "monitor": {
                "log_interval": steps[0],
                "profile": {"steps": [steps[1] + 2, steps[1] + 3]},
            },
        }
        config = program.config(
            f"speed_{model}",
            [f"models/{model}.yaml", "methods/muloco_k1.yaml"],
            PAPER,
            {} if program.on_gpu else REHEARSED,
            length,
        )
        run = program.run(config)
        if run.code:
            findings.append(Finding("B1", f"{model}, speed", run.tail(), passed=False))
            continue
        findings += _speed_of(model, run, steps, planned(config))
        findings += _kernel_time(model, config.parent / "events/profile")
    return findings


def _speed_of(model: str, run: Run, steps: tuple[int, int], plan: int) -> list[Finding]:
    def mean(tag: str) -> float:
        points = run.points.get(tag, {})
        chosen = [value for step, value in points.items() if steps[0] < step <= steps[1]]
        return sum(chosen) / len(chosen) if chosen else float("nan")

    phases = ("adamw", "collect", "newton_schulz", "return")
    parts = ", ".join(f"{name} {mean(f'perf/{name}_ms'):.1f}" for name in phases)
    peak = max(run.points.get("perf/peak_memory_gib", {0: float("nan")}).values()) * 2**30
    return [
        Finding(
            "B1",
            f"{model}, steps {steps[0] + 1} to {steps[1]}",
            f"{mean('perf/tokens_per_s'):,.0f} tokens/s, {mean('throughput'):.1f} TFLOP/s, "
            f"MFU {mean('perf/mfu'):.1%}",
            run.code == 0,
        ),
        Finding(
            "B1",
            f"{model}, inner optimizer, ms a step",
            f"on the device: {parts}; for the host, with its waits for the gradients: "
            f"{mean('perf/inner_optimizer_ms'):.1f}",
        ),
        Finding(
            "B1",
            f"{model}, memory",
            f"peak {peak / 1e9:.2f} GB; plan {plan / 1e9:.2f} GB",
        ),
    ]


def _kernel_time(model: str, directory: Path) -> list[Finding]:
    """Return the device's time by kind of kernel, of the last two steps."""
    traces = sorted(directory.glob("*.json.gz"))
    if not traces:
        return [Finding("B1", f"{model}, trace", "n/a", passed=False)]
    with gzip.open(traces[0], "rt", encoding="utf-8") as text:
        events = json.load(text)["traceEvents"]
    work = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if not work:
        return [Finding("B1", f"{model}, trace", "no kernels in the trace")]
    took: dict[str, float] = {}
    for event in work:
        kind = next((k for k, p in _CLASSES if re.search(p, event["name"], re.I)), "other")
        took[kind] = took.get(kind, 0.0) + event["dur"]
    span = max(e["ts"] + e["dur"] for e in work) - min(e["ts"] for e in work)
    busy = sum(took.values())
    shares = ", ".join(
        f"{kind} {value / busy:.1%}" for kind, value in sorted(took.items(), key=lambda p: -p[1])
    )
    return [
        Finding(
            "B1",
            f"{model}, kernels of two profiled steps",
            f"{busy / 1e3:.0f} of {span / 1e3:.0f} ms busy, {len(work):,} kernels; {shares}",
        )
    ]


# ---- synchronizations ----------------------------------------------------------------------------

# Where an inner step waits for the device: gradient norm, and the numbers that a replica shares.
KNOWN_SYNCS = ("megatron/core/utils.py", "clip_grads.py", "training/loop.py", "forward.py")


def synchronizations(device: torch.device) -> list[Finding]:
    """T6: list the places at which an inner step without output waits for the device."""
    if device.type != "cuda":
        return []
    with _run(device) as context:
        for step in range(1, 4):
            _step(context, step)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            _step(context, 4)
            torch.cuda.set_sync_debug_mode("default")
    places = Counter(
        f"{'/'.join(Path(each.filename).parts[-3:])}:{each.lineno}"
        for each in caught
        if "synchroniz" in str(each.message)
    )
    unknown = [
        place
        for place in places
        if not any(place.rpartition(":")[0].endswith(known) for known in KNOWN_SYNCS)
    ]
    listed = ", ".join(f"{place} x {count}" for place, count in places.most_common())
    return [
        Finding(
            "T6",
            f"synchronizations of one inner step, {MICROBATCHES} microbatches",
            f"{sum(places.values())}: {listed or 'none'}; unknown: {', '.join(unknown) or 'none'}",
            not unknown,
        )
    ]


# ---- one layer of the 15B model ------------------------------------------------------------------


# Settings that change how a layer is computed.
SWITCHES: Mapping[str, Sections] = {
    "as configured": {},
    "without document boundaries": {"data": {"mask_document_boundaries": False}},
    "attention dense": {"model": {"attention_impl": "dense"}},
    "attention varlen": {"model": {"attention_impl": "varlen"}},
    "attention flex": {"model": {"attention_impl": "flex"}},
    "without fusions": {"training": {"fusions": "none"}},
}


def layer(device: torch.device) -> list[Finding]:
    """B2: time one layer of the 15B model as a rank of tp 4 computes it, without communication."""
    findings = []
    for micro in (1, 2):
        for name, sections in SWITCHES.items():
            size: Sections = {"model": LAYER}
            base = ("models/15b.yaml", "methods/muloco_k1.yaml")
            label = f"15B layer as for tp 4, microbatch {micro}, {name}"
            try:
                with _run(device, size, sections, base=base, micro=micro) as context:
                    findings.append(_layer(label, context, device, micro))
            except ConfigError as error:  # a backend that this machine lacks
                findings.append(Finding("B2", label, f"refused: {str(error)[:300]}"))
            except Exception as error:  # noqa: BLE001 - the others are measured all the same
                text = f"{type(error).__name__}: {error}"[:300]
                findings.append(Finding("B2", label, text, passed=False))
    return findings


def _layer(label: str, context: RunContext, device: torch.device, micro: int) -> Finding:
    forward = milliseconds(_passes(context, forward_only=True), device) / MICROBATCHES
    both = milliseconds(_passes(context), device) / MICROBATCHES
    model = context.config.model
    flops = flops_per_token(model).total * micro * model.seq_length
    return Finding(
        "B2",
        label,
        f"{forward:.2f} ms forward, {both - forward:.2f} ms backward with the gradients' addition, "
        f"{flops / both / 1e9:.0f} TFLOP/s",
    )


# ---- outer step ----------------------------------------------------------------------------------


def outer_step(device: torch.device) -> list[Finding]:
    """B4: time an outer step of the values that a rank of the 15B run holds, without peers."""
    numel = 238_000_000 if device.type == "cuda" else 100_000
    masters = {"a": torch.randn(numel, device=device)}
    lossy: Mapping[str, Any] = {
        "linear 4": LinearCompression(kind="linear", bits=4),
        "statistical 2": StatisticalCompression(kind="statistical", bits=2),
        "top-k 1/32": TopKCompression(kind="topk", density=1 / 32),
    }
    reducers: dict[str, Reducer] = {
        "fp32": build_plain_reducer_for(None, device),
        "bf16": build_plain_reducer_for(None, device, wire_dtype="bf16"),
    }
    for name, each in lossy.items():
        reducers[name] = build_compressed_reducer_for(
            None, device, each, {"a": (0, 0)}, {"a": None}
        )
    findings = []
    for place in dict.fromkeys((device.type, "cpu")):
        state = AnchorState(masters, torch.device(place))
        for name, reducer in reducers.items():
            call = _one_outer_step(masters, state, reducer)
            took = milliseconds(call, device)
            label = f"outer step of {numel:,} values, {name}, state on {place}"
            findings.append(
                Finding("B4", label, f"{took:.1f} ms, {4 * numel / took / 1e6:.1f} GB/s")
            )
    return findings


def _one_outer_step(
    masters: Mapping[str, Tensor], state: AnchorState, reducer: Reducer
) -> Callable[[], None]:
    optimizer, rule = OuterNesterov(lr=0.7, momentum=0.6), Mix()
    local = masters["a"]
    metadata = torch.zeros(3, device=local.device)

    def step() -> None:
        difference = reducer.memory({"a": local.numel()}, metadata.numel())
        state.pseudogradient("a", local, out=difference["a"])
        handle = reducer.launch(0, difference, 1.0, metadata, round_index=1)
        mean = reducer.wait(handle).mean["a"]
        rule.merge(local, state.step("a", mean, optimizer, 1), local)

    return step


# ---- checkpoints ---------------------------------------------------------------------------------


def storage(device: torch.device) -> list[Finding]:
    """B5: time a save, a load, the digest and the initial weights of the 150M model."""
    from megatron_muloco.checkpoint.io import digests_of
    from megatron_muloco.checkpoint.state import ANCHOR
    from megatron_muloco.checkpoint.store import CheckpointStore
    from megatron_muloco.model.initialise import initialise_weights

    findings = []
    with _run(device) as context, tempfile.TemporaryDirectory() as directory:
        _step(context, 1)
        state, groups = context.state, context.groups
        store = CheckpointStore(Path(directory), groups)
        saved, path = _seconds(lambda: store.save(1, state), device)
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        loaded, _ = _seconds(lambda: store.load(path, state), device)
        for name, seconds in (("save", saved), ("load", loaded)):
            result = f"{seconds:.2f} s for {size / 1e9:.2f} GB, {size / seconds / 1e9:.2f} GB/s"
            findings.append(Finding("B5", f"150M, {name}, local disk", result))
        anchors = state.anchors()
        numel = sum(each.numel() for each in anchors.values())
        seconds, _ = _seconds(
            lambda: digests_of(groups, state.view.shards, {ANCHOR: anchors}, device), device
        )
        rate = f"{seconds:.3f} s, {4 * numel / seconds / 1e9:.2f} GB/s"
        findings.append(Finding("B5", f"digest of {numel:,} values", rate))
        model = context.config.model
        seconds, _ = _seconds(
            lambda: initialise_weights(
                context.model.module,
                groups.pg,
                seed=1,
                std=model.init_method_std,
                hidden_size=model.hidden_size,
            ),
            device,
        )
        result = f"{seconds:.2f} s, {numel / seconds / 1e6:.0f} million values a second"
        findings.append(Finding("B5", "initial weights of 150M", result))
    return findings


def _seconds(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Return how long a call took until the device was done, and its result."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, result


# ---- host and device -----------------------------------------------------------------------------


def gaps(device: torch.device) -> list[Finding]:
    """B6 and B7: compare the host's time with the device's, and measure gaps between kernels."""
    sizes: Sections = {"model": {"vocab_size": 128256 if device.type == "cuda" else 512}}
    with _run(device, sizes) as context:
        call = _passes(context)
        for _ in range(3):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        host = (time.perf_counter() - began) * 1e3
        whole = milliseconds(call, device)
        kernels = _kernels(call)
    findings = [
        Finding(
            "B6",
            f"150M, {MICROBATCHES} microbatches of 2: time until the host is free",
            f"{host:.1f} ms of {whole:.1f} ms, {host / whole:.0%}",
        )
    ]
    if not kernels:
        return [*findings, Finding("B7", "gaps between kernels", "no kernels in the trace")]
    idle, end = [], kernels[0][0]
    for begin, duration in kernels:
        if begin > end:
            idle.append(begin - end)
        end = max(end, begin + duration)
    span = end - kernels[0][0]
    largest = ", ".join(f"{each:.0f}" for each in sorted(idle, reverse=True)[:MICROBATCHES])
    findings.append(
        Finding(
            "B7",
            f"150M, {MICROBATCHES} microbatches of 2: gaps between {len(kernels):,} kernels",
            f"{sum(idle) / span:.1%} of {span / 1e3:.1f} ms idle; the largest, in us: {largest}",
        )
    )
    return findings


def _kernels(call: Callable[[], object]) -> list[tuple[float, float]]:
    """Return begin and duration of the kernels and copies of a call, in us, in their order."""
    activity = torch.profiler.ProfilerActivity
    wanted = [activity.CUDA] if torch.cuda.is_available() else [activity.CPU]
    with tempfile.TemporaryDirectory() as directory:
        trace = Path(directory) / "trace.json.gz"
        with torch.profiler.profile(activities=wanted) as profile:
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        profile.export_chrome_trace(str(trace))
        with gzip.open(trace, "rt", encoding="utf-8") as text:
            events = json.load(text)["traceEvents"]
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    return sorted((e["ts"], e["dur"]) for e in events if e.get("cat") in kinds)
