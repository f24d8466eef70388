"""`build_monitor`: the monitor of a run from its configuration."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_muloco.config.derived import Derived, derive
from megatron_muloco.config.outer import NesterovOuter, NoOuter, interval_words, rate_words
from megatron_muloco.config.schema import RunConfig
from megatron_muloco.data.indexed import read_manifest
from megatron_muloco.data.sampler import RunLayout, run_layout
from megatron_muloco.model.flops import flops_per_token
from megatron_muloco.monitor.console import Console, method_name, next_steps, start_banner
from megatron_muloco.monitor.metrics import METRICS, MetricTable, applies
from megatron_muloco.monitor.monitor import Monitor, RunFacts
from megatron_muloco.monitor.terminal import console_for
from megatron_muloco.monitor.throughput import TimeLeft, peak_tflops
from megatron_muloco.monitor.writers import (
    EventWriter,
    Mirrored,
    PointLog,
    PointWriter,
    TokenAxis,
    WandbWriter,
)
from megatron_muloco.optim.parameter_table import ParameterReport
from megatron_muloco.outer.schedule import LineCalendar, SyncSchedule
from megatron_muloco.topology import Topology

__all__ = [
    "PARAMETERS_FILE",
    "build_monitor",
    "device_name",
    "hyperparameters",
    "program_commit",
    "run_facts",
]

PARAMETERS_FILE = "parameters.txt"

# Shown beside a run's settings on the page of hyperparameters, the most important one first.
_RESULTS = ("lm loss validation", "lm loss", "perf/tokens_per_s", "muloco/wire_bytes_total")
_OVER_TOKENS = {
    "lm loss": "lm loss vs tokens",
    "lm loss validation": "lm loss validation vs tokens",
}


def device_name(device: torch.device) -> str:
    """Return the device name reported by the driver, or ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def build_monitor(
    config: RunConfig,
    topology: Topology,
    schedule: SyncSchedule | None,
    *,
    device: torch.device,
    writes: bool,
    resumed_step: int = 0,
    layout: RunLayout | None = None,
    plan_text: str = "",
    parameters: ParameterReport | None = None,
    attention: str = "",
    console: Console | None = None,
    metrics: MetricTable = METRICS,
) -> Monitor:
    """Return this rank's monitor; on the writing rank, print the banner and open the event file.

    Args:
        config: Configuration of the run.
        topology: Arrangement of the ranks.
        schedule: Schedule of outer steps; ``None`` for ``outer.kind: none``.
        device: Device that this rank trains on.
        writes: Whether this rank writes; true on one rank of the job.
        resumed_step: Inner step that this start continues from, 0 for a new run. Readers no longer
            see points of later steps that an earlier start wrote.
        layout: Samples of every step; by default those of a run that keeps its batch.
        plan_text: Plan of the run, written to TensorBoard beside the configuration.
        parameters: Parameter report: its summary goes to the console, its table to TensorBoard and
            to `PARAMETERS_FILE` beside the event files.
        attention: Attention backend of the run and why, for the console.
        console: Console; by default that of standard output, with a progress bar on a terminal.
        metrics: Table of the metrics that the run may write.
    """
    derived = derive(config, topology)
    name = device_name(device)
    facts = RunFacts(
        num_replicas=topology.num_replicas,
        world_size=topology.world_size,
        train_iters=derived.train_iters,
        layout=layout or run_layout(config, topology),
        seq_length=config.model.seq_length,
        flops_per_token=flops_per_token(config.model).total,
        peak_tflops=peak_tflops(name, config.training.precision),
        resumed_step=resumed_step,
    )
    calendar = LineCalendar(config.monitor.log_interval, schedule)
    if not writes:
        return Monitor(facts, calendar, device=device, metrics=metrics)
    console = console or console_for(derived.train_iters, resumed_step, config.monitor.dir)
    console.line(start_banner(config, topology, derived, device=name, resumed_step=resumed_step))
    for warning in config.warnings:
        console.stamped(f"warning: {warning}")
    if parameters is not None:
        console.line(f" > parameters:  {parameters.summary}")
    if attention:
        console.line(f" > attention:   {attention}")
    log = _log(config, topology, derived, name, resumed_step, console)
    writer = Mirrored(*_writers(config, derived, facts, console, metrics), *log)
    writer.text("run/config", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    if plan_text:
        writer.text("run/plan", plan_text)
    if parameters is not None:
        writer.text("run/parameters", parameters.table)
        if config.monitor.dir is not None:
            _keep(Path(config.monitor.dir) / PARAMETERS_FILE, parameters.table, console)
    return Monitor(
        facts,
        calendar,
        device=device,
        console=console,
        writer=writer,
        metrics=metrics,
        left=_time_left(config, facts, schedule),
        next_steps=next_steps(config),
    )


def _time_left(config: RunConfig, facts: RunFacts, schedule: SyncSchedule | None) -> TimeLeft:
    evaluates = bool(config.data.valid)
    return TimeLeft(
        facts.train_iters,
        facts.layout.consumed,
        outer_steps=() if schedule is None else schedule.steps_with_events(),
        intervals={
            "evaluation": config.training.eval_interval if evaluates else 0,
            "save": config.checkpoint.save_interval if config.checkpoint.dir else 0,
        },
    )


def hyperparameters(config: RunConfig, derived: Derived) -> dict[str, str | float]:
    """Return the settings that tell runs apart, for TensorBoard's page of hyperparameters."""
    outer, training = config.outer, config.training
    # TensorBoard sorts the names, capitals first, and shows the first five at once.
    settings: dict[str, str | float] = {
        "Method": method_name(config).split(",")[0],
        "K": config.parallel.num_replicas,
        "Inner lr": config.inner.lr,
        "parameters": derived.parameters.total,
        "tokens": derived.train_tokens,
        "batch": training.global_batch_size,
        "weight decay": derived.weight_decay,
        "seed": training.seed,
    }
    if isinstance(outer, NoOuter):
        return settings
    interval = outer.sync_interval
    settings["H"] = interval if isinstance(interval, int) else interval_words(interval, "step")
    settings["Wire"] = outer.compression.short_name
    settings["fragments"], settings["overlap"] = outer.fragments.count, outer.overlap_steps
    if isinstance(outer, NesterovOuter):
        for name, rate in (("outer lr", outer.lr), ("outer momentum", outer.momentum)):
            settings[name] = rate if isinstance(rate, float) else rate_words(rate)
    return settings


def _writers(
    config: RunConfig,
    derived: Derived,
    facts: RunFacts,
    console: Console,
    metrics: MetricTable,
) -> Iterator[PointWriter]:
    """Yield a writer for each place that the configuration names."""
    if config.monitor.dir is not None:
        charts = [row for row in metrics if applies(row, config)]
        tags = {row.tag for row in charts}
        yield EventWriter(
            config.monitor.dir,
            resumed_step=facts.resumed_step,
            report=console.stamped,
            metrics=metrics,
            charts=charts,
            settings=hyperparameters(config, derived),
            results=[tag for tag in _RESULTS if tag in tags],
        )
        over_tokens = EventWriter(
            str(Path(config.monitor.dir) / "tokens"),
            resumed_step=facts.tokens(0, facts.resumed_step),
            report=lambda _: None,  # the writer above reports it
            metrics=metrics,
            charts=(),
        )
        yield TokenAxis(over_tokens, lambda step: facts.tokens(0, step), _OVER_TOKENS)
    if config.monitor.wandb.project is not None:
        settings = config.model_dump(mode="json")
        yield WandbWriter(config.monitor.wandb, settings, report=console.stamped)


def _log(
    config: RunConfig,
    topology: Topology,
    derived: Derived,
    device: str,
    resumed_step: int,
    console: Console,
) -> Iterator[PointLog]:
    """Yield the log of points: beside the event files, else beside the checkpoints, else none."""
    directory = config.monitor.dir or config.checkpoint.dir
    if directory is not None:
        facts = run_facts(config, topology, derived, device=device)
        yield PointLog(directory, facts, resumed_step=resumed_step, report=console.stamped)


def run_facts(
    config: RunConfig, topology: Topology, derived: Derived, *, device: str
) -> dict[str, Any]:
    """Return the facts of a run for the first line of its log, as values that JSON can hold.

    ``sync_interval`` is H, or ``None`` without outer steps; ``config`` is the whole configuration,
    with defaults; ``commit`` that of the program. ``held_out_tokens`` is ``None`` where another
    tool prepared the data.
    """
    values = config.model_dump(mode="json")
    held_out = [read_manifest(source.path) for source in config.data.valid]
    steps = None if isinstance(config.outer, NoOuter) else values["outer"]["sync_interval"]
    return {
        "method": method_name(config),
        "num_replicas": topology.num_replicas,
        "sync_interval": steps,
        "world_size": topology.world_size,
        "device": device,
        "train_iters": derived.train_iters,
        "tokens_per_step": derived.tokens_per_step,
        "parameters": derived.parameters.total,
        "held_out_tokens": sum(m.tokens for m in held_out if m) if all(held_out) else None,
        "commit": program_commit(),
        "config_digest": config.digest(),
        "config": values,
    }


def program_commit() -> str:
    """Return the commit of the checkout that this program runs from, ``-dirty`` where files differ.

    ``n/a`` for an installed package, without git, or where git takes longer than ten seconds.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # git itself would find a checkout around site-packages
        return "n/a"
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "n/a"
    return done.stdout.strip() or "n/a"


def _keep(path: Path, text: str, console: Console) -> None:
    """Write a text file; report an error of the file system and go on."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        console.stamped(f"monitor.dir: cannot write {path}: {error}. Training goes on without it.")
