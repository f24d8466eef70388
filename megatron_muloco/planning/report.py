"""The plan of a run as text, as ``--dry-run`` prints it, and the verdict whether a rank fits."""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence

from megatron_muloco.config.derived import (
    Derived,
    batch_schedule,
    derive,
    smallest_topology,
    spacing_of_launches,
    stage_layers,
)
from megatron_muloco.config.inner import InnerConfig
from megatron_muloco.config.outer import (
    AverageOuter,
    CompressionConfig,
    NesterovOuter,
    NoCompression,
    NoOuter,
    interval_values,
    interval_words,
    rate_words,
)
from megatron_muloco.config.schema import RunConfig
from megatron_muloco.model.flops import flops_per_token
from megatron_muloco.planning.layout import Split, best_split, stage_flops
from megatron_muloco.planning.memory import ALLOCATOR_SLACK, MemoryPlan, memory_plan
from megatron_muloco.planning.traffic import TrafficPlan, planned_on_accelerator, traffic_plan
from megatron_muloco.planning.verdict import Device, Verdict, judge
from megatron_muloco.topology import Topology

__all__ = [
    "Row",
    "human_bytes",
    "human_count",
    "memory_rows",
    "refusal",
    "render_plan",
    "section_lines",
    "stage_rows",
    "traffic_rows",
    "verdict_rows",
    "write_out",
]


# ------------------------------------------------------------------------------------------
# Readable numbers, and output.


def human_count(number: float) -> str:
    """Return a count with three or four digits and a unit: ``15.23B``."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            scaled = number / size
            return f"{scaled:.2f}{unit}" if scaled < 100 else f"{scaled:.1f}{unit}"
    return f"{number:g}"


def human_bytes(number: float) -> str:
    """Return a size in decimal units: ``3.81 GB`` is 3.81e9 bytes."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:.0f} B"


def write_out(text: str) -> None:
    """Write to standard output; a reader that closes early, such as ``head``, is no error."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit


# ------------------------------------------------------------------------------------------
# Rows of memory and traffic.


Row = tuple[str, str, str]

# Gbit/s between replicas: a low-bandwidth link, a common one, one InfiniBand port.
_LINKS_GBIT = (10, 100, 400)


def memory_rows(config: RunConfig, memory: MemoryPlan, layout: Topology) -> Iterator[Row]:
    """Yield the bytes of each kind of memory, and their sum."""
    shared = f"1/{layout.sharding} of the slice" if layout.sharding > 1 else "the whole slice"
    where = "host memory" if memory.outer_on_host else "fp32"
    training = config.training
    stage = f", pipeline stage {memory.stage}, which needs most" if layout.pipeline > 1 else ""
    yield "weights", human_bytes(memory.weights), f"{training.precision}{stage}"
    yield "gradients", human_bytes(memory.gradients), f"{training.accumulate_dtype}, accumulated"
    note = f"fp32, {shared}" if memory.masters else "fp32 weights are their own masters"
    yield "masters", human_bytes(memory.masters), note
    yield "inner state", human_bytes(memory.inner_state), f"fp32, {shared}"
    if memory.exchange:
        yield (
            "Muon exchange",
            human_bytes(memory.exchange),
            "buffers of matrices, kept between steps",
        )
    if memory.anchor:
        yield (
            "outer state",
            human_bytes(memory.outer_state),
            f"anchor and momentum, {where}, {shared}",
        )
    step = memory.outer_step
    if step.buffers:
        flights = f"{step.in_flight} fragments" if step.in_flight > 1 else "a fragment"
        yield "outer buffers", human_bytes(step.buffers), f"of {flights} in flight"
    if step.queued:
        note = "fp32, pseudogradients and means of the communication thread"
        yield "in flight", human_bytes(step.queued), note
    if step.at_launch:
        yield "copies at launch", human_bytes(step.at_launch), "fp32, for the merge after overlap"
    if step.residuals:
        yield "residuals", human_bytes(step.residuals), "fp32, error feedback"
    if step.temporary:
        note = "pseudogradients, buffers and means, during an outer step"
        yield "outer step", human_bytes(step.temporary), note
    if step.staged:
        yield "host buffers", human_bytes(step.staged), "sent and received, in host memory"
    if memory.saved_copy:
        note = "of what this rank writes of a checkpoint, in host memory"
        yield "copy for saving", human_bytes(memory.saved_copy), note
    yield "  sum", human_bytes(memory.device), "without activations"
    yield from _peak_rows(memory)


def _peak_rows(memory: MemoryPlan) -> Iterator[Row]:
    """Yield activations, other temporary buffers, and what a rank needs in all."""
    activations, layers = memory.activations, memory.activations.layers
    flights = activations.in_flight
    of = f"of {flights} microbatches in flight" if flights > 1 else "of one microbatch"
    parts = {
        "norms": (layers.norms, "inputs of norms, with the residual stream"),
        "attention": (layers.attention, "projections, queries, keys, values, outputs"),
        "document masks": (layers.mask, "dense, in every layer that is not recomputed"),
        "MLP": (layers.mlp, "gate, up and SwiGLU"),
        "layer inputs": (layers.inputs, "of recomputed layers"),
    }
    yield "activations", human_bytes(activations.kept), f"{of}, kept for backward"
    for name, (size, note) in parts.items():
        if size:
            yield f"  {name}", human_bytes(flights * size), note
    if activations.head:
        yield "  logits and loss", human_bytes(activations.head), "fp32, with the final norm"
    backward = activations.peak - activations.kept
    yield "backward", human_bytes(backward), "temporary, beside the activations"
    yield "optimizer step", human_bytes(memory.optimizer_step), "temporary, instead of activations"
    yield "peak", human_bytes(memory.allocated), "tensors; of temporary buffers the largest"
    if memory.context:
        yield "allocator", human_bytes(memory.slack), f"{ALLOCATOR_SLACK:.0%} of the peak, assumed"
        if memory.communicators:
            yield "NCCL", human_bytes(memory.communicators), "communicators, as others reported"
        yield "CUDA context", human_bytes(memory.context), "assumed"
        yield "needed", human_bytes(memory.needed), "in all"


def traffic_rows(config: RunConfig, traffic: TrafficPlan, layout: Topology) -> Iterator[Row]:
    """Yield bytes per step and per round."""
    parts = {
        "gradients": traffic.gradient_reduce,
        "parameters": traffic.parameter_gather,
        "Muon exchange": traffic.muon_exchange,
        "tensor parallel": traffic.tensor_parallel,
        "context parallel": traffic.context_parallel,
        "pipeline": traffic.pipeline,
    }
    yield "each inner step", human_bytes(traffic.inner_step), "inside the replica"
    for name, size in parts.items():
        if size:
            yield f"  {name}", human_bytes(size), ""
    if isinstance(config.outer, NoOuter):
        return
    compression = config.outer.compression
    others = layout.num_replicas - 1
    note = f"to {others} other {'replicas' if others > 1 else 'replica'}, {compression.short_name}"
    if config.outer.fragments.count > 1:
        note += f", in {config.outer.fragments.count} launches"
    if layout.num_replicas == 1:
        note = "one replica: the outer step needs no network"
    yield "each round", human_bytes(traffic.outer_per_rank), note
    if not traffic.outer_per_replica:
        return
    seconds = ", ".join(
        f"{traffic.outer_per_replica * 8 / (gbit * 1e9):.2g} s at {gbit}" for gbit in _LINKS_GBIT
    )
    sent = human_bytes(traffic.outer_per_replica)
    yield "  whole replica", sent, f"sent by its ranks: {seconds} Gbit/s"
    if not compression.is_all_reduce:
        ratio = traffic.outer_uncoded / traffic.outer_per_replica
        all_reduce = human_bytes(traffic.outer_uncoded)
        yield "  ratio", f"1/{ratio:.2f}", f"of {all_reduce}, what fp32 all-reduces would send"


# ------------------------------------------------------------------------------------------
# Rows of the pipeline.


def stage_rows(config: RunConfig, layout: Topology) -> Iterator[Row]:
    """Yield each stage's layers and share of the FLOPs, and the best split; none for one stage."""
    stages = layout.pipeline
    if stages == 1:
        return
    layers, flops = stage_layers(config, layout), stage_flops(config, layout)
    for first, last in ((0, 0), (1, stages - 2), (stages - 1, stages - 1)):
        if first <= last:
            name = f"stage {first}" if first == last else f"stages {first} to {last}"
            share = f"{flops[first] / sum(flops):.1%} of the FLOPs{' each' * (first < last)}"
            head = ", with output head and loss" if first == stages - 1 else ""
            yield name, f"{len(layers[first])} layers", share + head
    balance, best = max(flops) * stages / sum(flops), best_split(config, layout)
    yield "balance", f"{balance:.3f}", "FLOPs of the fullest stage over the mean"
    if balance <= best.balance * (1 + 1e-9):
        yield "best balance", f"{best.balance:.3f}", "this one: no other split is better"
    else:
        yield "best balance", f"{best.balance:.3f}", f"with {_split_words(best)}"


def _split_words(split: Split) -> str:
    """Return the keys that set a split; the stages without a key share the rest."""
    keys = {}
    if split.middle and split.first != split.middle:
        keys["num_layers_in_first_pipeline_stage"] = split.first
    if split.last != (split.middle or split.first):
        keys["num_layers_in_last_pipeline_stage"] = split.last
    return ", ".join(f"{key} {number}" for key, number in keys.items()) or "equal stages"


# ------------------------------------------------------------------------------------------
# Whether a rank fits on a GPU.


def refusal(verdict: Verdict) -> str:
    """Return why a run that does not fit is not started, and what to do."""
    changes = [
        f"    {human_bytes(change.needed)} with {change.words}" for change in verdict.changes
    ]
    remedies = ["  It would need less:", *changes] if changes else []
    return "\n".join(
        [
            f"training.check_memory: does not fit: {human_bytes(verdict.needed)} of "
            f"{human_bytes(verdict.device.memory)} per rank on {verdict.device.name}.",
            f"  The largest parts are {_largest_words(verdict)}.",
            *remedies,
            "  To start all the same, set training.check_memory=false.",
        ]
    )


def _largest_words(verdict: Verdict) -> str:
    return ", ".join(f"{name} {human_bytes(size)}" for name, size in verdict.largest)


def verdict_rows(verdict: Verdict) -> Iterator[Row]:
    """Yield whether a rank fits on a GPU, its largest parts, and what would change that."""
    yield "GPU", human_bytes(verdict.device.memory), verdict.device.name
    share = f"{human_bytes(verdict.needed)} of {human_bytes(verdict.device.memory)} per rank"
    yield "verdict", "fits" if verdict.fits else "does not fit", share
    yield "", "", f"largest: {_largest_words(verdict)}"
    if verdict.fits:
        return
    for change in verdict.changes:
        fits = change.needed <= verdict.device.memory
        yield "  fits with" if fits else "  less with", human_bytes(change.needed), change.words


# ------------------------------------------------------------------------------------------
# The whole plan.


def render_plan(
    config: RunConfig, topology: Topology | None = None, device: Device | None = None
) -> str:
    """Return the plan of a checked config as text.

    Args:
        config: The run.
        topology: Topology of the world; ``None`` takes the smallest one and states that in the
            plan.
        device: GPU for the verdict; ``None`` for a plan without one.
    """
    layout = topology or smallest_topology(config)
    derived, memory = derive(config, layout), memory_plan(config, layout)
    sections = {
        "world": list(_world_rows(config, layout, assumed=topology is None)),
        "model": list(_model_rows(config, derived)),
        "run": list(_run_rows(config, layout, derived)),
        "pipeline stages": list(stage_rows(config, layout)),
        "memory per rank": list(memory_rows(config, memory, layout)),
        "sent per rank": list(traffic_rows(config, traffic_plan(config, layout), layout)),
    }
    if device is not None:
        sections["memory per rank"] += verdict_rows(judge(config, layout, memory, device))
    return "\n".join(section_lines(sections))


def section_lines(sections: Mapping[str, Sequence[Row]]) -> list[str]:
    """Return title -> rows as lines with aligned columns; a section without rows has no title."""
    rows = [row for section in sections.values() for row in section]
    name_width = max(len(name) for name, _, _ in rows)
    value_width = max(len(value) for _, value, _ in rows if len(value) <= 24)
    lines = []
    for title, section in sections.items():
        lines += [title] if section else []
        for name, value, note in section:
            lines.append(f"  {name:<{name_width}}  {value:>{value_width}}  {note}".rstrip())
    return lines


def _world_rows(config: RunConfig, layout: Topology, *, assumed: bool) -> Iterator[Row]:
    """Yield the topology and the assumed device."""
    yield "ranks", f"{layout.world_size:,}", str(layout).partition(" = ")[0]
    precision = config.training.precision
    device = "accelerators" if planned_on_accelerator(config) else "CPUs"
    yield "", "", f"for {device}, as training.precision is {precision}"
    if assumed:
        yield "", "", "the smallest world of this config, as no other is known"


def _model_rows(config: RunConfig, derived: Derived) -> Iterator[Row]:
    """Yield parameters by kind, and FLOPs."""
    model, counts = config.model, derived.parameters
    inner = "Muon" if config.inner.kind == "muon" else "AdamW"
    tied = "" if model.untie_embeddings_and_output_weights else ", tied to the output head"
    shape = (
        f"width {model.hidden_size}, {model.num_attention_heads} heads of "
        f"{model.kv_channels}, {model.query_groups} key/value heads, MLP {model.ffn_hidden_size}"
    )
    yield "parameters", human_count(counts.total), f"{counts.total:,}"
    yield "layers", str(model.num_layers), shape
    yield "attention", human_count(counts.attention), f"matrices, {inner}"
    yield "MLP", human_count(counts.mlp), f"matrices, {inner}"
    yield "embedding", human_count(counts.embedding), f"vector parameter, AdamW{tied}"
    if counts.output:
        yield "output head", human_count(counts.output), "vector parameter, AdamW"
    yield "norms", human_count(counts.norms), "vector parameters, AdamW"
    padding = derived.padded_vocab_size - model.vocab_size
    note = f"{padding} of them padding" if padding else "no padding"
    yield "vocabulary", f"{derived.padded_vocab_size:,}", note
    flops = flops_per_token(model)
    yield (
        "FLOPs per token",
        human_count(flops.total),
        f"forward and backward, at {model.seq_length:,} tokens per sequence",
    )


def _run_rows(config: RunConfig, layout: Topology, derived: Derived) -> Iterator[Row]:
    """Yield length, batch, rates and rounds."""
    training, inner, outer = config.training, config.inner, config.outer
    yield (
        "inner steps",
        f"{derived.train_iters:,}",
        f"of {training.global_batch_size:,} sequences, {derived.tokens_per_step:,} tokens",
    )
    stages = batch_schedule(training).stages
    if len(stages) > 1:
        yield "ramp-up", f"{stages[-1][0] - 1:,}", f"steps, from {stages[0][1]:,} sequences"
    yield "tokens", human_count(derived.train_tokens), f"{derived.train_tokens:,}"
    yield (
        "batch per replica",
        f"{derived.replica_batch_size:,}",
        f"sequences: {_microbatches(derived, training.micro_batch_size, layout)}",
    )
    yield (
        "learning rate",
        f"{inner.lr:g}",
        f"{inner.kind}, {inner.lr_warmup_iters} steps of warm-up, {_decay(inner)}",
    )
    rule = (
        f"{inner.decay_base:g} x {derived.replica_batch_size} / "
        f"{inner.weight_decay_reference_batch} sequences per replica"
        if inner.decay_base is not None
        else "as given"
    )
    yield "weight decay", f"{derived.weight_decay:g}", rule
    if isinstance(outer, NoOuter):
        yield "rounds", "none", "data parallelism, no outer step"
    else:
        yield from _round_rows(outer, derived)


def _decay(inner: InnerConfig) -> str:
    """Say in a few words what the learning rate does after the warm-up."""
    if inner.lr_decay_style == "constant":
        return "then constant"
    if inner.lr_decay_style == "WSD":
        return (
            f"constant, last {inner.lr_wsd_decay_iters:,} steps {inner.lr_wsd_decay_style} "
            f"to x{inner.min_lr_ratio:g}"
        )
    return f"{inner.lr_decay_style} to x{inner.min_lr_ratio:g}"


def _microbatches(derived: Derived, size: int, layout: Topology) -> str:
    """Return how a replica's batch is divided into microbatches."""
    number = derived.num_microbatches
    turns = f"{number:,} microbatches of {size}" if number > 1 else f"one microbatch of {size}"
    return f"{turns} on each of {layout.data} data-parallel ranks" if layout.data > 1 else turns


def _round_rows(outer: NesterovOuter | AverageOuter, derived: Derived) -> Iterator[Row]:
    """Yield the settings of the outer step."""
    length = interval_words(outer.sync_interval, "inner step")
    yield "rounds", f"{derived.rounds:,}", f"of {length}"
    yield (
        "outer optimizer",
        outer.kind,
        f"lr {rate_words(outer.lr)}, momentum {rate_words(outer.momentum)}",
    )
    yield "fragments", str(outer.fragments.count), _fragment_words(outer)
    yield "overlap", *_overlap_words(outer)
    yield from _compression_rows(outer.compression)
    if derived.flushed_steps:
        yield (
            "warning",
            f"{derived.flushed_steps} steps",
            "follow the last round; the run ends with the plain mean of the replicas",
        )


def _fragment_words(outer: NesterovOuter | AverageOuter) -> str:
    """Return what a fragment contains and how often one is launched."""
    if outer.fragments.count == 1:
        return "all parameters at once"
    spacing = spacing_of_launches(outer)
    widest = -(-max(interval_values(outer.sync_interval)) // outer.fragments.count)
    uneven = f" {'or' if widest == spacing + 1 else 'to'} {widest}" if widest > spacing else ""
    steps = "step" if widest == 1 else "steps"
    return f"{outer.fragments.pattern} layers, a launch every {spacing}{uneven} {steps}"


def _overlap_words(outer: NesterovOuter | AverageOuter) -> tuple[str, str]:
    """Return how long a launch is in flight, and how its result is applied."""
    steps = outer.overlap_steps
    if not steps:
        return "none", "training waits for every launch"
    rule = "the progress since the launch is added"
    if outer.apply == "mix":
        rule = f"{outer.effective_mixing_weight:g} of the local value is kept"
    return f"{steps} {'step' if steps == 1 else 'steps'}", f"from launch to apply; {rule}"


def _compression_rows(compression: CompressionConfig) -> Iterator[Row]:
    """Yield the compression of pseudogradients; nothing without one."""
    if isinstance(compression, NoCompression):
        return
    kind, _, amount = compression.short_name.partition(", ")
    yield "compression", kind, "; ".join(filter(None, (amount, compression.describe())))
    if exceptions := compression.exceptions.describe():
        yield "", "", f"but {exceptions}"
    decay, what = compression.describe_feedback()
    yield "error feedback", decay, what
