"""Memory and traffic of a plan as rows of text."""

from collections.abc import Iterator

from megatron_muloco.config.outer import NoOuter
from megatron_muloco.config.schema import RunConfig
from megatron_muloco.planning.code_words import code_name
from megatron_muloco.planning.memory import MemoryPlan
from megatron_muloco.planning.text import human_bytes
from megatron_muloco.planning.traffic import TrafficPlan
from megatron_muloco.topology import Topology

__all__ = ["Row", "memory_rows", "traffic_rows"]

Row = tuple[str, str, str]

_LINKS_GBIT = (10, 100, 400)  # Gbit/s between replicas: thin, common, one InfiniBand port


def memory_rows(config: RunConfig, memory: MemoryPlan, layout: Topology) -> Iterator[Row]:
    """Yield bytes by kind, and their sum."""
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
            "matrices under way, kept all the time",
        )
    if memory.anchor:
        yield (
            "outer state",
            human_bytes(memory.outer_state),
            f"anchor and momentum, {where}, {shared}",
        )
    step = memory.outer_step
    if step.buffers:
        flights = f"of {step.in_flight} fragments in flight" if step.in_flight > 1 else ""
        yield "outer buffers", human_bytes(step.buffers), f"kept between rounds {flights}".strip()
    if step.queued:
        note = "fp32, for the thread that reduces, or for the apply"
        yield "under way", human_bytes(step.queued), note
    if step.at_launch:
        yield "copies at launch", human_bytes(step.at_launch), "fp32, for the merge after overlap"
    if step.residuals:
        yield "residuals", human_bytes(step.residuals), "fp32, what error feedback keeps"
    if step.temporary:
        note = "fp32 pseudogradients or their mean, during the step"
        yield "outer step", human_bytes(step.temporary), note
    if step.staged:
        yield "host buffers", human_bytes(step.staged), "what travels, in host memory"
    yield "sum", human_bytes(memory.device), "activations and other temporary buffers not counted"


def traffic_rows(config: RunConfig, traffic: TrafficPlan, layout: Topology) -> Iterator[Row]:
    """Yield bytes per step and per round."""
    parts = {
        "gradients": traffic.gradient_reduce,
        "parameters": traffic.parameter_gather,
        "Muon exchange": traffic.muon_exchange,
        "tensor parallel": traffic.tensor_parallel,
        "pipeline": traffic.pipeline,
    }
    yield "each inner step", human_bytes(traffic.inner_step), "inside the replica"
    for name, size in parts.items():
        if size:
            yield f"  {name}", human_bytes(size), ""
    if isinstance(config.outer, NoOuter):
        return
    code = config.outer.compression
    others = layout.num_replicas - 1
    note = f"to {others} other {'replicas' if others > 1 else 'replica'}, {code_name(code)}"
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
    if not code.is_all_reduce:
        ratio = traffic.outer_uncoded / traffic.outer_per_replica
        all_reduce = human_bytes(traffic.outer_uncoded)
        yield "  ratio", f"1/{ratio:.2f}", f"of {all_reduce}, what fp32 all-reduces would send"
