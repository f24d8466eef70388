"""The first and the last words of a run: pure functions from numbers to text."""

from dataclasses import dataclass

from typing_extensions import override

from megatron_muloco.config.compression import NoCompression
from megatron_muloco.config.derived import Derived
from megatron_muloco.config.outer import AverageOuter, NesterovOuter, NoOuter
from megatron_muloco.config.round_schedules import interval_words, rate_words
from megatron_muloco.config.schema import RunConfig
from megatron_muloco.monitor.console import count
from megatron_muloco.planning.code_words import code_name
from megatron_muloco.topology import Topology

__all__ = ["RunSummary", "method_name", "start_banner"]


def method_name(config: RunConfig) -> str:
    """Return what the papers call the method of a config."""
    muon = config.inner.kind == "muon"
    if isinstance(config.outer, NoOuter):
        return f"{'Muon' if muon else 'AdamW'} data parallelism"
    return f"{'MuLoCo' if muon else 'DiLoCo'}, K = {config.parallel.num_replicas}"


def _counted(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _outer_words(outer: NesterovOuter | AverageOuter) -> str:
    rule = "plain mean"
    if isinstance(outer, NesterovOuter):
        rule = f"nesterov, lr {rate_words(outer.lr)}, momentum {rate_words(outer.momentum)}"
    words = [rule, f"every {interval_words(outer.sync_interval, 'step')}"]
    if outer.fragments.count > 1:
        words.append(f"{outer.fragments.count} fragments ({outer.fragments.pattern})")
    if outer.overlap_steps:
        words.append(f"overlapped by {_counted(outer.overlap_steps, 'step')}")
    compression = outer.compression
    words.append(f"{code_name(compression)} on the wire")
    if not isinstance(compression, NoCompression) and compression.error_feedback:
        words.append("error feedback")
    return ", ".join(words)


def start_banner(
    config: RunConfig,
    topology: Topology,
    derived: Derived,
    *,
    device: str,
    resumed_step: int = 0,
) -> str:
    """Return who trains what on what, a fact a line.

    Args:
        config: The run.
        topology: The world that it has.
        derived: Numbers of the config in that world.
        device: Name of the accelerator, or ``cpu``.
        resumed_step: Inner step that the run continues from, 0 for a new one.
    """
    parameters, training = derived.parameters, config.training
    begin = f"from iteration {resumed_step}" if resumed_step else "from the beginning"
    facts = {
        "method": method_name(config),
        "ranks": f"{topology} on {device}, {training.precision}",
        "model": f"{count(parameters.total)} parameters: {count(parameters.matrices)} in matrices, "
        f"{count(parameters.vectors)} in embedding, output head and norms",
        "inner": f"{config.inner.kind}, lr {config.inner.lr:g}, "
        f"warm-up {derived.lr_warmup_iters} steps, weight decay {derived.weight_decay:g}",
        "outer": "none" if isinstance(config.outer, NoOuter) else _outer_words(config.outer),
        "batch": f"{training.global_batch_size} sequences of {config.model.seq_length} tokens, "
        f"{derived.replica_batch_size} per replica in "
        f"{_counted(derived.num_microbatches, 'microbatch', 'microbatches')}",
        "length": f"{derived.train_iters} steps, {count(derived.train_tokens)} tokens"
        + (f", {_counted(derived.rounds, 'round')}" if derived.rounds else "")
        + f", {begin}",
        "tensorboard": f"tensorboard --logdir {config.monitor.dir}"
        if config.monitor.dir
        else "off",
        "checkpoints": config.checkpoint.dir or "off",
    }
    return "\n".join(f" > {name + ':':13s}{fact}" for name, fact in facts.items())


@dataclass(frozen=True, slots=True)
class RunSummary:
    """What a run came to.

    Attributes:
        outcome: Why it ends, ``done`` or a sentence.
        steps: Inner steps of this start.
        last_step: Inner step reached.
        seconds: Training time of this start, without evaluation and saving.
        tokens_per_s: Over all replicas and all of this start.
        wire_bytes: Bytes that the writing rank sent in outer steps.
        skipped: Steps skipped by replicas, as far as they were reported.
        validation: First and last evaluation, ``(step, loss)``; ``None`` without.
        lost_points: TensorBoard points that could not be written.
    """

    outcome: str
    steps: int
    last_step: int
    seconds: float
    tokens_per_s: float | None
    wire_bytes: int
    skipped: int
    validation: tuple[tuple[int, float], tuple[int, float]] | None
    lost_points: int

    @override
    def __str__(self) -> str:
        speed = "n/a" if self.tokens_per_s is None else f"{self.tokens_per_s:,.0f} tokens/s"
        facts = {
            "outcome": f"{self.outcome}, at iteration {self.last_step}",
            "training": f"{self.steps} steps in {self.seconds:,.1f} s, {speed}",
            "outer bytes": f"{self.wire_bytes:,} sent by this rank",
        }
        if self.skipped:
            facts["skipped"] = (
                f"{self.skipped} steps of replicas with a gradient that is not finite"
            )
        if self.validation is not None:
            (first, before), (last, after) = self.validation
            facts["held-out"] = (
                f"{before:.4f} at iteration {first}, {after:.4f} at iteration {last}"
            )
        if self.lost_points:
            facts["monitor"] = f"{self.lost_points} TensorBoard points could not be written"
        return "\n".join(f" > {name + ':':13s}{fact}" for name, fact in facts.items())
