"""A plan as text and as JSON."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_muloco.config.outer import NoOuter, interval_words
from megatron_muloco.planning.report import (
    Row,
    human_bytes,
    human_count,
    section_lines,
    verdict_rows,
)
from megatron_muloco.planning.timing import Rate
from megatron_muloco.planning.verdict import Verdict
from tools.planning.estimate import SHARES, Estimate
from tools.planning.variants import Choice, Method
from tools.scaling.report import text_table

__all__ = ["Plan", "as_json", "as_text", "duration", "rate_words"]


@dataclass(frozen=True)
class Plan:
    """All that is printed.

    Attributes:
        base: Estimate of the config.
        gpu: Name of the GPU.
        verdict: Whether a rank fits; ``None`` for CPUs.
        methods: Other methods for the same run.
        hiding: Numbers of fragments and the fewest tau of each that hides the exchange.
        wanted: Share of a round that has to compute, and the most percent of published loss.
        allowed: Whether `choice` is within these limits.
        choice: The best exchange; ``None`` without replicas.
        warnings: What is likely not meant.
    """

    base: Estimate
    gpu: str
    verdict: Verdict | None
    methods: Sequence[Method]
    hiding: Sequence[tuple[int, int | None]]
    wanted: tuple[float, float]
    allowed: bool
    choice: Choice | None
    warnings: Sequence[str]


# ---- numbers ------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """Return a duration with a unit that fits: ``4.2 h``."""
    for size, unit in (
        (365 * 86400.0, "years"),
        (86400.0, "days"),
        (3600.0, "h"),
        (60.0, "min"),
        (1.0, "s"),
    ):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s" if seconds >= 0.1 else f"{1e3 * seconds:.3g} ms"


def rate_words(bits: float | None) -> str:
    """Return a rate: ``10 Gbit/s``."""
    if bits is None:
        return "none"
    for size, unit in ((1e12, "Tbit/s"), (1e9, "Gbit/s"), (1e6, "Mbit/s")):
        if bits >= size:
            return f"{bits / size:.3g} {unit}"
    return f"{bits / 1e3:.3g} kbit/s"


# ---- text ---------------------------------------------------------------------------------------


def as_text(plan: Plan) -> str:
    """Return the plan as text."""
    sections = {
        "machine": list(_machine_rows(plan)),
        "inner step": list(_step_rows(plan.base)),
        "exchange": list(_exchange_rows(plan)),
        "run": list(_run_rows(plan.base)),
        "memory and checkpoints": list(_memory_rows(plan)),
        "failures": list(_failure_rows(plan.base)),
    }
    lines = section_lines(sections)
    lines += ["", "the same model, tokens and GPUs by other methods", _methods_text(plan), ""]
    lines += _advice_lines(plan)
    lines += [f"warning: {warning}" for warning in plan.warnings]
    return "\n".join(lines) + "\n"


def _machine_rows(plan: Plan) -> Iterator[Row]:
    rates, layout = plan.base.rates, plan.base.topology
    yield "ranks", f"{layout.world_size:,}", str(layout).partition(" = ")[0]
    if rates.step is None:
        yield "GPU", f"{rates.flops.value / 1e12:g} TFLOP/s", f"{plan.gpu}; {rates.flops.origin}"
        note = f"of forward and backward, with communication inside a replica; {rates.mfu.origin}"
        yield "mfu", f"{rates.mfu.value:.0%}", note
    else:
        yield "inner step", duration(rates.step.value), rates.step.origin
    where = "between a replica and the others"
    yield "link", rate_words(rates.link.value), f"{where}; {rates.link.origin}"
    yield "link's payload", f"{rates.efficiency.value:.1%}", f"of it; {rates.efficiency.origin}"
    yield "writing", f"{human_bytes(rates.writing.value)}/s", f"all ranks; {rates.writing.origin}"
    yield "a GPU fails", f"every {duration(rates.mtbf.value)}", rates.mtbf.origin
    yield "restart", duration(rates.restart.value), rates.restart.origin


def _part(seconds: float, whole: float) -> tuple[str, str]:
    return duration(seconds), f"{seconds / whole:.1%}"


def _step_rows(base: Estimate) -> Iterator[Row]:
    step, layout = base.step, base.topology
    yield ("forward, backward", *_part(step.compute, step.seconds))
    if layout.pipeline > 1:
        yield ("uneven stages", *_part(step.imbalance, step.seconds))
        microbatches = base.derived.num_microbatches
        value, share = _part(step.bubble, step.seconds)
        note = f"{share}: {layout.pipeline} stages, {microbatches} microbatches"
        yield "pipeline bubble", value, note
    if step.newton_schulz:
        yield ("Newton-Schulz", *_part(step.newton_schulz, step.seconds))
    used = "" if step.utilisation is None else f"{step.utilisation:.1%} of the peak in model FLOPs"
    yield "step", duration(step.seconds), used


def _exchange_rows(plan: Plan) -> Iterator[Row]:
    base, outer = plan.base, plan.base.config.outer
    if not base.exchange_bits:
        return
    unit = "each step" if isinstance(outer, NoOuter) else "each round"
    yield "sent", human_bytes(base.exchange_bits / 8), f"by a replica, {unit}"
    length = base.interval * base.step.seconds
    words = f"in {duration(length)} of compute"
    yield "on the link", duration(base.exchange_seconds), words
    exposed = length * (1 / base.share - 1)
    yield "exposed", duration(exposed), "training waits for it"
    yield "utilisation", f"{base.share:.1%}", "of a round computes"
    for share in SHARES:
        yield f"  {share:.0%} needs", rate_words(base.rate_for(share)), ""
    if not plan.hiding:
        return
    for count, overlap in plan.hiding:
        pieces = "fragment" if count == 1 else "equal fragments"
        if overlap is not None:
            note = f"overlap steps are the fewest that hide it with {count} {pieces}"
            yield "hidden", f"tau = {overlap}", note
    if all(overlap is None for _, overlap in plan.hiding):
        yield "hidden", "never", "the link needs more time than a round; send less, or raise H"


def _run_rows(base: Estimate) -> Iterator[Row]:
    derived, outer = base.derived, base.config.outer
    yield "inner steps", f"{derived.train_iters:,}", f"{human_count(derived.train_tokens)} tokens"
    if not isinstance(outer, NoOuter):
        length = interval_words(outer.sync_interval, "inner step")
        yield "rounds", f"{derived.rounds:,}", f"of {length}"
    yield "tokens/s", human_count(base.tokens_per_second), "of all replicas"
    yield "training", duration(base.train_seconds), f"{duration(base.exposed_seconds)} exposed"
    if base.evaluation_seconds:
        yield "evaluation", duration(base.evaluation_seconds), ""
    if base.days is None:
        yield "with failures", "never", "failures come faster than checkpoints"
        return
    note = f"and checkpoints at Daly's interval: {base.failures.goodput:.1%} of it trains"
    yield "with failures", duration(86400 * base.days), note
    yield "GPU hours", f"{base.gpu_hours:,.0f}", ""


def _memory_rows(plan: Plan) -> Iterator[Row]:
    base = plan.base
    yield "needed", human_bytes(base.memory.needed), "by the fullest rank; --dry-run has its parts"
    if plan.verdict is not None:
        yield from verdict_rows(plan.verdict)
    yield "checkpoint", human_bytes(base.checkpoint), f"written in {duration(base.write_seconds)}"
    how = "copied to host memory" if base.config.checkpoint.async_save else "written"
    yield "a save holds", duration(base.held_seconds), f"training, until it is {how}"


def _failure_rows(base: Estimate) -> Iterator[Row]:
    found = base.failures
    step = base.train_seconds / base.derived.train_iters
    yield "a failure", f"every {duration(found.mtbf)}", "one GPU stops all of the job"
    for name, interval in (("Young", found.young), ("Daly", found.daly)):
        note = f"between checkpoints, {max(1, round(interval / step)):,} steps"
        yield name, duration(interval), note
    yield "goodput", f"{found.goodput:.1%}", "of the time trains, with Daly's interval"
    if found.goodput_at is not None:
        every = base.config.checkpoint.save_interval
        yield "  as configured", f"{found.goodput_at:.1%}", f"checkpoint.save_interval {every:,}"


def _methods_text(plan: Plan) -> str:
    header = ("method", "sent", "step", "utilisation", "95% needs", "GB/rank", "days", "GPU hours")
    rows = []
    for method in plan.methods:
        found = method.estimate
        if found is None:
            rows.append((method.name, "n/a", *[""] * 6))
            continue
        per = "/step" if isinstance(found.config.outer, NoOuter) else "/round"
        rows.append(
            (
                method.name,
                human_bytes(found.exchange_bits / 8) + per,
                duration(found.step.seconds),
                f"{found.share:.1%}",
                rate_words(found.rate_for(0.95)),
                f"{found.memory.needed / 1e9:.1f}",
                "never" if found.days is None else f"{found.days:.3g}",
                "" if found.gpu_hours is None else f"{found.gpu_hours:,.0f}",
            )
        )
    notes = [f"n/a: {method.name}: {method.why}" for method in plan.methods if method.why]
    return "\n".join([text_table(header, rows), *notes])


def _advice_lines(plan: Plan) -> list[str]:
    choice, (share, loss) = plan.choice, plan.wanted
    if choice is None:
        return []
    words = f"P = {choice.fragments}, {choice.exchange.name}"
    limits = f"{share:.0%} of a round computing and at most {loss:g} % of published loss"
    cost = f"{choice.share:.1%} computing, {choice.penalty:+.2f} % of loss (paper, 416M)"
    if plan.allowed:
        return [f"best with {limits}: {words}; {cost}"]
    return [f"no exchange has {limits}; the nearest: {words}; {cost}"]


# ---- JSON ---------------------------------------------------------------------------------------


def as_json(plan: Plan) -> dict[str, Any]:
    """Return the plan as plain values; seconds, bytes and bits per second."""
    base, step = plan.base, plan.base.step
    names = ("flops", "mfu", "link", "efficiency", "writing", "mtbf", "restart", "step")
    rates: dict[str, Rate | None] = {name: getattr(base.rates, name) for name in names}
    return {
        "world_size": base.topology.world_size,
        "layout": str(base.topology).partition(" = ")[0],
        "rates": {
            name: {"value": rate.value, "origin": rate.origin}
            for name, rate in rates.items()
            if rate is not None
        },
        "step": {
            "seconds": step.seconds,
            "compute": step.compute,
            "imbalance": step.imbalance,
            "bubble": step.bubble,
            "newton_schulz": step.newton_schulz,
            "model_flops_utilisation": step.utilisation,
        },
        "rounds": base.derived.rounds,
        "train_iters": base.derived.train_iters,
        **_estimate_json(base),
        "rate_for_share": {f"{share:g}": base.rate_for(share) for share in SHARES},
        "hiding_overlap_steps": {str(count): overlap for count, overlap in plan.hiding},
        "fits": None if plan.verdict is None else plan.verdict.fits,
        "checkpoint_bytes": base.checkpoint,
        "checkpoint_write_seconds": base.write_seconds,
        "checkpoint_held_seconds": base.held_seconds,
        "failures": {
            name: getattr(base.failures, name)
            for name in ("mtbf", "young", "daly", "goodput", "goodput_at")
        },
        "methods": {
            method.name: {"refused": method.why}
            if method.estimate is None
            else _estimate_json(method.estimate)
            for method in plan.methods
        },
        "best": _choice_json(plan),
        "warnings": list(plan.warnings),
    }


def _estimate_json(found: Estimate) -> dict[str, Any]:
    return {
        "exchange_bytes": found.exchange_bits / 8,
        "exchange_seconds": found.exchange_seconds,
        "utilisation": found.share,
        "tokens_per_second": found.tokens_per_second,
        "train_seconds": found.train_seconds,
        "exposed_seconds": found.exposed_seconds,
        "days": found.days,
        "gpu_hours": found.gpu_hours,
        "memory_bytes_per_rank": found.memory.needed,
    }


def _choice_json(plan: Plan) -> dict[str, Any] | None:
    choice = plan.choice
    if choice is None:
        return None
    return {
        "within_limits": plan.allowed,
        "bits": choice.exchange.bits,
        "error_feedback": choice.exchange.feedback,
        "sync_interval": choice.exchange.interval,
        "fragments": choice.fragments,
        "overlap_steps": choice.exchange.overlap,
        "utilisation": choice.share,
        "published_loss_percent": choice.penalty,
    }
