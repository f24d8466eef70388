"""The plan of a run as text: what ``--dry-run`` and `tools/plan.py` print."""

from collections.abc import Iterator

from megatron_muloco.config.compression import CompressionConfig, NoCompression
from megatron_muloco.config.derived import Derived, derive, smallest_topology, spacing_of_launches
from megatron_muloco.config.outer import AverageOuter, NesterovOuter, NoOuter
from megatron_muloco.config.round_schedules import interval_values, interval_words, rate_words
from megatron_muloco.config.schema import RunConfig
from megatron_muloco.model.flops import flops_per_token
from megatron_muloco.planning.code_words import (
    code_name,
    code_words,
    exception_words,
    feedback_words,
)
from megatron_muloco.planning.cost_rows import Row, memory_rows, traffic_rows
from megatron_muloco.planning.memory import memory_plan
from megatron_muloco.planning.text import human_count
from megatron_muloco.planning.traffic import planned_on_accelerator, traffic_plan
from megatron_muloco.topology import Topology

__all__ = ["render_plan"]


def render_plan(config: RunConfig, topology: Topology | None = None) -> str:
    """Return the plan of a checked config.

    Args:
        config: The run.
        topology: The layout of the world. Without it the smallest world is taken, and said so.
    """
    layout = topology or smallest_topology(config)
    derived = derive(config, layout)
    sections = {
        "world": list(_world_rows(config, layout, assumed=topology is None)),
        "model": list(_model_rows(config, derived)),
        "run": list(_run_rows(config, layout, derived)),
        "memory per rank": list(memory_rows(config, memory_plan(config, layout), layout)),
        "sent per rank": list(traffic_rows(config, traffic_plan(config, layout), layout)),
    }
    rows = [row for section in sections.values() for row in section]
    name_width = max(len(name) for name, _, _ in rows)
    value_width = max(len(value) for _, value, _ in rows if len(value) <= 24)
    lines = []
    for title, section in sections.items():
        lines.append(title)
        for name, value, note in section:
            lines.append(f"  {name:<{name_width}}  {value:>{value_width}}  {note}".rstrip())
    return "\n".join(lines)


def _world_rows(config: RunConfig, layout: Topology, *, assumed: bool) -> Iterator[Row]:
    """Yield the layout, and the device that is assumed."""
    yield "ranks", f"{layout.world_size:,}", str(layout).partition(" = ")[0]
    precision = config.training.precision
    device = "accelerators" if planned_on_accelerator(config) else "CPUs"
    yield "", "", f"for {device}, as training.precision is {precision}"
    if assumed:
        yield "", "", "the smallest world of this config, as no other is known"


def _model_rows(config: RunConfig, derived: Derived) -> Iterator[Row]:
    """Yield parameters by kind and FLOPs."""
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
    yield "tokens", human_count(derived.train_tokens), f"{derived.train_tokens:,}"
    yield (
        "batch per replica",
        f"{derived.replica_batch_size:,}",
        f"sequences: {_microbatches(derived, training.micro_batch_size, layout)}",
    )
    yield (
        "learning rate",
        f"{inner.lr:g}",
        f"{inner.kind}, {inner.lr_warmup_iters} steps of warm-up, {inner.lr_decay_style} "
        f"to x{inner.min_lr_ratio:g}"
        if inner.lr_decay_style != "constant"
        else f"{inner.kind}, {inner.lr_warmup_iters} steps of warm-up, then constant",
    )
    rule = (
        f"{inner.weight_decay_base:g} x {derived.replica_batch_size} / "
        f"{inner.weight_decay_reference_batch} sequences per replica"
        if inner.weight_decay_base is not None
        else "as given"
    )
    yield "weight decay", f"{derived.weight_decay:g}", rule
    if isinstance(outer, NoOuter):
        yield "rounds", "none", "data parallelism, no outer step"
    else:
        yield from _round_rows(outer, derived)


def _microbatches(derived: Derived, size: int, layout: Topology) -> str:
    """Return how a replica's batch is worked off."""
    number = derived.num_microbatches
    turns = f"{number:,} microbatches of {size}" if number > 1 else f"one microbatch of {size}"
    return f"{turns} on each of {layout.data} data-parallel ranks" if layout.data > 1 else turns


def _round_rows(outer: NesterovOuter | AverageOuter, derived: Derived) -> Iterator[Row]:
    """Yield what happens between replicas."""
    length = interval_words(outer.sync_interval, "inner step")
    yield "rounds", f"{derived.rounds:,}", f"of {length}"
    yield (
        "outer optimizer",
        outer.kind,
        f"lr {rate_words(outer.lr)}, momentum {rate_words(outer.momentum)}",
    )
    yield "fragments", str(outer.fragments.count), _fragment_words(outer)
    yield "overlap", *_overlap_words(outer)
    yield from _code_rows(outer.compression)
    if derived.flushed_steps:
        yield (
            "warning",
            f"{derived.flushed_steps} steps",
            "follow the last round; the run ends with the plain mean of the replicas",
        )


def _fragment_words(outer: NesterovOuter | AverageOuter) -> str:
    """Return what a fragment is and how often one is sent."""
    if outer.fragments.count == 1:
        return "all parameters at once"
    spacing = spacing_of_launches(outer)
    widest = -(-max(interval_values(outer.sync_interval)) // outer.fragments.count)
    uneven = f" {'or' if widest == spacing + 1 else 'to'} {widest}" if widest > spacing else ""
    steps = "step" if widest == 1 else "steps"
    return f"{outer.fragments.pattern} layers, a launch every {spacing}{uneven} {steps}"


def _overlap_words(outer: NesterovOuter | AverageOuter) -> tuple[str, str]:
    """Return how long a launch is under way, and how its result is taken."""
    steps = outer.overlap_steps
    if not steps:
        return "none", "training waits for every launch"
    rule = "the progress since the launch is added"
    if outer.apply == "mix":
        rule = f"{outer.effective_mixing_weight:g} of the local value is kept"
    return f"{steps} {'step' if steps == 1 else 'steps'}", f"from launch to apply; {rule}"


def _code_rows(code: CompressionConfig) -> Iterator[Row]:
    """Yield the code that pseudogradients travel in; nothing where they are not encoded."""
    if isinstance(code, NoCompression):
        return
    kind, _, amount = code_name(code).partition(", ")
    yield "code", kind, f"{amount}; {code_words(code)}"
    if exceptions := exception_words(code):
        yield "", "", f"but {exceptions}"
    decay, what = feedback_words(code)
    yield "error feedback", decay, what
