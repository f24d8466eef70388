"""Suggest a config for a size, a number of replicas and a link, with the reason of each value.

    python tools/suggest.py --params 1.5e9 --replicas 8 --link 10Gbit

The config goes to standard output or to ``--output``, a report to standard error. Values come from
the tables of the papers; times from the planner's bytes and an assumed speed of the GPUs. Guide:
docs/guides/choosing.md.
"""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run as a file, from anywhere

from typing_extensions import override

from megatron_muloco.config import RunConfig, check, topology_of
from megatron_muloco.errors import ConfigError, run_tool
from megatron_muloco.planning import memory_plan
from megatron_muloco.planning.report import human_bytes, human_count
from megatron_muloco.planning.timing import link_rate
from tools.scaling.advice import (
    LADDER,
    Exchange,
    Machine,
    Round,
    Shape,
    choose_exchange,
    fitting_layout,
    interval_label,
    loss_table,
    nearest_published,
    round_of,
    shape_near,
)
from tools.scaling.evidence import Published, millions
from tools.scaling.labelled import METHODS, Target, Value
from tools.scaling.ready import CONFIGS, Ready, check_text, load_text, ready_config, tokens_of
from tools.scaling.report import text_table

GOALS = ("loss", "time")
# Heads -> name of the published size and its sequences per GPU in the authors' code; 1 at 15B.
SIZES = {4: ("150m", 32), 8: ("416m", 16), 12: ("914m", 16), 16: ("1.76b", 8), 20: ("3.1b", 4),
         36: ("15b", 1)}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--params", type=float, required=True, help="such as 1.5e9, with embeddings"
    )
    parser.add_argument("--replicas", type=int, required=True, help="K")
    parser.add_argument("--link", required=True, help="of each replica to the others, as 10Gbit")
    parser.add_argument("--tokens", default="20x", help="such as 30e9, 30B or 20x parameters")
    parser.add_argument("--gpus", type=int, help="of all replicas; by default 8 in each")
    parser.add_argument("--goal", choices=GOALS, default=GOALS[0], help="best or critical batch")
    parser.add_argument("--method", choices=("auto", *METHODS), default="auto")
    parser.add_argument("--share", type=float, default=0.95, help="of a round that has to compute")
    parser.add_argument("--gpu-tflops", type=float, default=989.0, help="peak; of an H100 in bf16")
    parser.add_argument("--gpu-memory", type=float, default=80.0, help="GB")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the peak; assumed")
    parser.add_argument("--output", type=Path, help="file; standard output by default")
    options = parser.parse_args(argv)
    return run_tool(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    suggestion = suggest(options)
    directory = options.output.parent if options.output else Path.cwd()
    text = check_text(suggestion.ready, directory)
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    else:
        print(text, end="", flush=True)
    sys.stderr.write(f"{report(suggestion, options)}\n")


@dataclass(frozen=True)
class Suggestion:
    """A config and how it was found.

    Attributes:
        target: The run.
        shape: Of the model.
        ready: The config.
        config: The same, checked.
        machine: What it runs on.
        chosen: The round of its exchange.
        tried: Rounds of the exchanges up to that one.
    """

    target: Target
    shape: Shape
    ready: Ready
    config: RunConfig
    machine: Machine
    chosen: Round
    tried: list[Round]


@dataclass(frozen=True)
class Advised(Published):
    """The published settings, with the batch of a goal and the H of an exchange."""

    goal: str = "loss"
    exchange: Exchange = LADDER[0]

    @override
    def batch(self, target: Target) -> Value:
        """Return the best batch, or the largest power of two within the critical batch."""
        if self.goal == "loss":
            return super().batch(target)
        law, sequences = self.critical(target), 1
        while 2 * sequences * target.seq_length <= law.value:
            sequences *= 2
        label = f"fitted: critical batch {law.words}; the power of 2 below, for time"
        return Value("training.global_batch_size", sequences, label)

    @override
    def outer(self, target: Target) -> list[Value]:
        """Return the outer settings, with H of the exchange."""
        interval = self.exchange.interval
        return [
            replace(value, value=interval, label=interval_label(target.method, interval))
            if value.key == "outer.sync_interval"
            else value
            for value in super().outer(target)
        ]


def suggest(options: argparse.Namespace) -> Suggestion:
    """Return what the options ask for.

    Raises:
        ConfigError: The options contradict each other or have no answer; all of them are named.
    """
    machine = _machine(options)
    shape = shape_near(options.params)
    method = options.method
    if method == "auto":
        method = _best_method(shape.params, options.replicas)
    tokens = tokens_of(options.tokens, shape.params)
    name = f"{human_count(shape.params)}".lower()
    target = Target(name, shape.params, tokens, method, options.replicas)

    def build(tensor: int, pipeline: int, exchange: Exchange) -> Ready:
        return _ready(target, shape, machine, (tensor, pipeline), exchange, options.goal)

    def load(tensor: int, pipeline: int) -> RunConfig:
        return load_text(build(tensor, pipeline, LADDER[0]))

    layout = fitting_layout(load, machine, target.replicas, shape.heads, shape.layers)

    def plan(exchange: Exchange) -> Round:
        return round_of(exchange, load_text(build(*layout, exchange)), machine)

    alone = target.replicas == 1  # nothing crosses the link
    chosen, tried = choose_exchange(plan, 0.0 if alone else options.share)
    ready = build(*layout, chosen.exchange)
    ready = replace(ready, world=machine.gpus, notes=_reasons(target, options))
    config = load_text(ready)
    check(config, topology_of(config, machine.gpus))
    return Suggestion(target, shape, ready, config, machine, chosen, tried)


def _machine(options: argparse.Namespace) -> Machine:
    problems: list[str] = []
    try:
        link = link_rate(options.link)
    except ConfigError as error:
        problems += error.problems
        link = 0.0
    gpus = options.gpus if options.gpus is not None else 8 * options.replicas
    if options.replicas < 1:
        problems.append(f"--replicas {options.replicas}: a run has at least one replica.")
    elif gpus < 1 or gpus % options.replicas:
        problems.append(
            f"--gpus {gpus} is not divisible by {options.replicas} replicas; every replica has as "
            f"many GPUs. Use a multiple of {options.replicas}."
        )
    for name, most in (("params", 1e15), ("share", 1), ("mfu", 1), ("gpu_tflops", 1e6),
                       ("gpu_memory", 1e6)):  # fmt: skip
        if not 0 < getattr(options, name) <= most:
            option = f"--{name.replace('_', '-')}"
            problems.append(
                f"{option} {getattr(options, name):g} is not above 0 and up to {most:g}."
            )
    if problems:
        raise ConfigError(problems)
    return Machine(gpus, link, 1e12 * options.gpu_tflops, options.mfu, 1e9 * options.gpu_memory)


def _best_method(params: float, replicas: int) -> str:
    """Return the method with the lowest published loss at the nearest size and K."""
    _, losses = loss_table(params, replicas)
    near = nearest_published(replicas)
    found = {name: losses[f"{name}_k{near}"] for name in ("muloco", "diloco")}
    if replicas == 1:
        found |= {name: losses[name] for name in ("dp_muon", "dp_adamw")}
    return min(found, key=found.__getitem__)


def _ready(
    target: Target,
    shape: Shape,
    machine: Machine,
    layout: tuple[int, int],
    exchange: Exchange,
    goal: str,
) -> Ready:
    tensor, pipeline = layout
    model, values, micro = _model(shape)
    ranks = machine.gpus // (tensor * pipeline)
    why = "rule: the smallest layout whose plan fits 60 % of a GPU's memory"
    values += [
        Value("parallel.tensor_model_parallel_size", tensor, why),
        Value("parallel.pipeline_model_parallel_size", pipeline, why),
        Value("parallel.sequence_parallel", tensor > 1, "rule: with tensor parallelism"),
    ]
    if target.has_outer_step:
        reason = "the first of the ladder that leaves the asked share of a round to compute"
        reason = "one replica sends nothing" if target.replicas == 1 else reason
        values += exchange.values(target.method, reason)
    evidence = Advised(goal, exchange)
    run = f"runs/{target.name}_{target.series}"
    return ready_config(target, evidence, model, run, others=values, ranks=ranks, micro=micro)


def _model(shape: Shape) -> tuple[Path, list[Value], int]:
    """Return the file, values and microbatch of a shape."""
    if shape.heads in SIZES:
        name, micro = SIZES[shape.heads]
        return CONFIGS / f"models/{name}.yaml", [], micro
    near = max(heads for heads in SIZES if heads <= max(shape.heads, min(SIZES)))
    name, micro = SIZES[near]
    rule = "rule: the MuLoCo family"
    values = [
        Value("model.num_layers", shape.layers, f"{rule}, 1.5 x heads"),
        Value("model.hidden_size", shape.width, f"{rule}, 128 x heads"),
        Value("model.ffn_hidden_size", shape.ffn, f"{rule}, 2.75 x hidden_size"),
        Value("model.num_attention_heads", shape.heads, f"{rule}; {human_count(shape.params)}"),
        Value("training.micro_batch_size", micro, f"paper: code, at {name}; sequences per GPU"),
    ]
    return CONFIGS / "paper.yaml", values, micro


# ---- report -------------------------------------------------------------------------------------


def _reasons(target: Target, options: argparse.Namespace) -> list[str]:
    size, losses = loss_table(target.params, target.replicas)
    shown = ", ".join(f"{series} {loss:.3f}" for series, loss in sorted(losses.items()))
    how = "asked for" if options.method != "auto" else "lowest published loss"
    return [f"Method: {target.method}, {how}. Paper, losses at {size}: {shown}."]


def report(suggestion: Suggestion, options: argparse.Namespace) -> str:
    """Return why this exchange and layout, what it costs, and what was assumed."""
    target, machine, chosen = suggestion.target, suggestion.machine, suggestion.chosen
    lines = [
        f"model: {human_count(suggestion.shape.params)} parameters for {options.params:.3g} asked "
        f"for; {suggestion.shape.layers} layers, width {suggestion.shape.width:,}",
        *_loss_lines(target, chosen),
        f"assumed: {options.mfu:g} of {options.gpu_tflops:g} TFLOP/s on {machine.gpus} GPUs, so "
        f"{chosen.step_seconds:.3g} s per inner step; {options.link} between replicas, fully used",
    ]
    if target.replicas > 1:
        lines += ["", _ladder_text(suggestion), ""]
    if target.replicas > 1 and chosen.share < options.share:
        lines.append(
            f"no exchange leaves {options.share:.0%} of a round to compute; the last one leaves "
            f"{chosen.share:.0%}. Use a faster link or fewer, larger replicas."
        )
    batch = suggestion.config.training.global_batch_size * target.seq_length
    critical = Published().critical(target).value
    if batch > critical:
        lines.append(
            f"warning: {machine.gpus} GPUs need a batch of {millions(batch)} tokens, more than the "
            f"critical {millions(critical)}: the loss is more than 1 % above the best. Use fewer."
        )
    memory = memory_plan(suggestion.config, topology_of(suggestion.config, machine.gpus))
    lines.append(
        f"plan: passes for {machine.gpus} GPUs; {human_bytes(memory.device)} of state per rank of "
        f"{human_bytes(machine.memory)}, activations not counted"
    )
    return "\n".join(lines)


def _loss_lines(target: Target, chosen: Round) -> list[str]:
    size, losses = loss_table(target.params, target.replicas)
    if not target.has_outer_step:
        return []
    series = f"{target.method}_k{nearest_published(target.replicas)}"
    own = losses[f"dp_{METHODS[target.method]}"]
    lost = 100 * (losses[series] / own - 1)
    exchange = chosen.exchange.penalty(target.method)
    return [
        f"loss: {series} at {size} is {lost:+.2f} % of its own data parallelism (paper); the "
        f"exchange adds {exchange:+.2f} % (paper, 416M)"
    ]


def _ladder_text(suggestion: Suggestion) -> str:
    method = suggestion.target.method
    rows = [
        (
            round_.exchange.name,
            human_bytes(round_.sent),
            f"{round_.exchange_seconds:.3g}",
            f"{round_.compute_seconds:.3g}",
            f"{round_.share:.1%}",
            f"{round_.exchange.penalty(method):+.2f}",
        )
        for round_ in suggestion.tried
    ]
    header = ("exchange", "sent a round", "s", "compute, s", "computing", "loss, %")
    return text_table(header, rows)


if __name__ == "__main__":
    sys.exit(main())
