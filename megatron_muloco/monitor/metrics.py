"""`METRICS`, the table of metrics: unit, reduction, meaning and chart of every TensorBoard tag.

Metrics that Megatron has keep Megatron's tags, so that runs of both overlay in one TensorBoard. The
x axis of all metrics is the inner step. `docs/reference/metrics.md` and TensorBoard's charts are
made from this table. Imports no torch.

A metric of your own needs a row before it can be written, which no file of the package has to
change for::

    METRICS.register(Metric("perf/data_ms", "ms", "mean", "writing rank", "always", "Time of ..."))

Register before the monitor is built. The value is then recorded like any other: with
`Monitor.record` in every inner step (``mean``, ``last``), with `Monitor.scalars` at an ``event``,
or, for a fragment of an outer step, as a `Measurement` in `ReductionStats.measurements`. A monitor
can also be given a table of its own: ``build_monitor(..., metrics=MetricTable([*METRICS, row]))``.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from megatron_muloco.config.outer import LossyCompression, NoOuter
from megatron_muloco.config.schema import RunConfig
from megatron_muloco.errors import RuntimeMismatch

__all__ = ["METRICS", "Chart", "Metric", "MetricTable", "applies"]

OverSteps = Literal["mean", "last", "event"]
OverRanks = Literal["mean over replicas", "the same everywhere", "replica 0", "writing rank"]


@dataclass(frozen=True, slots=True)
class Chart:
    """A line chart on TensorBoard's custom-scalars page.

    A chart has one metric. Curves of several would have one colour there, that of their run.

    Attributes:
        category: Heading under which the chart is shown.
        title: Title of the chart; the unit follows it.
    """

    category: str
    title: str


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the registry.

    Attributes:
        tag: Name in TensorBoard.
        unit: Unit of the value; ``1`` for a pure number.
        over_steps: ``mean`` over the inner steps since the last line, the ``last`` of them, or
            written at the ``event`` itself.
        over_ranks: Reduction over ranks, or the rank whose value is written.
        when: Runs and events that write it, in words.
        meaning: Meaning in a sentence.
        chart: Chart that shows it on the custom-scalars page; ``None`` for no chart there.
    """

    tag: str
    unit: str
    over_steps: OverSteps
    over_ranks: OverRanks
    when: str
    meaning: str
    chart: Chart | None = None


class MetricTable:
    """Rows by tag, in the order in which they were registered.

    Invariant: no two rows have the same tag.

    Args:
        rows: First rows.
    """

    def __init__(self, rows: Iterable[Metric] = ()) -> None:
        self._rows: dict[str, Metric] = {}
        for row in rows:
            self.register(row)

    def register(self, row: Metric) -> None:
        """Add a row.

        Raises:
            RuntimeMismatch: The table has a row with this tag.
        """
        if row.tag in self._rows:
            raise RuntimeMismatch(
                f"metric {row.tag!r} is already registered, with the meaning "
                f"{self._rows[row.tag].meaning!r}. Two metrics in one curve cannot be told apart; "
                "choose another tag."
            )
        self._rows[row.tag] = row

    def __getitem__(self, tag: str) -> Metric:
        """Return the row of a tag.

        Raises:
            RuntimeMismatch: There is no such row: a typo, or a metric that was not registered.
        """
        if tag not in self._rows:
            raise RuntimeMismatch(
                f"metric {tag!r} is not in the registry, so its meaning is documented nowhere. "
                "Correct the tag, or add a row with METRICS.register before the monitor is built."
            )
        return self._rows[tag]

    def __iter__(self) -> Iterator[Metric]:
        """Iterate over the rows in order."""
        return iter(self._rows.values())


# Conditions that several rows share.
_ALWAYS = "always"
_EVALUATION = "`training.eval_interval` above 0"
_TEST = "`data.test`; once, at the end of the run"
_TOKENS = "always, in the run `tokens`"
_EVALUATED_TOKENS = "`training.eval_interval` above 0, in the run `tokens`"
_SAVES = "`checkpoint.dir`"
_FAILED = "a save that failed"
_KNOWN_PEAK = "an accelerator with a known peak"
_MUON = "`inner.kind: muon`"
_SPIKES = "`training.spikes.max_loss_ratio` above 0"
_SENT = "K > 1, lines that a launch sends"
_UNSENT = "K > 1, lines after the last launch"
_OUTER = "an outer step"
_REPLICAS = "an outer step, K > 1"
_COMPARED = "an outer step, K > 1, replicas compared"
_COMPRESSION = "compression"
_COMPARED_COMPRESSION = "compression, K > 1, replicas compared"
_FEEDBACK = "error feedback"


def _synchronises(config: RunConfig) -> bool:
    return not isinstance(config.outer, NoOuter)


def _has_replicas(config: RunConfig) -> bool:
    return _synchronises(config) and config.parallel.num_replicas > 1


def _compares(config: RunConfig) -> bool:
    return _has_replicas(config) and config.monitor.pseudogradient_interval > 0


def _compresses(config: RunConfig) -> bool:
    return not isinstance(config.outer, NoOuter) and isinstance(
        config.outer.compression, LossyCompression
    )


def _evaluates(config: RunConfig) -> bool:
    return config.training.eval_interval > 0 and bool(config.data.valid)


def _feeds_back(config: RunConfig) -> bool:
    outer = config.outer
    return (
        not isinstance(outer, NoOuter)
        and isinstance(outer.compression, LossyCompression)
        and outer.compression.error_feedback
    )


_HOLDS: Mapping[str, Callable[[RunConfig], bool]] = {
    _EVALUATION: _evaluates,
    _EVALUATED_TOKENS: _evaluates,
    _TEST: lambda config: bool(config.data.test),
    _SAVES: lambda config: config.checkpoint.dir is not None,
    _FAILED: lambda config: config.checkpoint.dir is not None,
    _KNOWN_PEAK: lambda config: config.training.precision == "bf16",
    _MUON: lambda config: config.inner.kind == "muon",
    _SPIKES: lambda config: bool(config.training.spikes.max_loss_ratio),
    _SENT: _has_replicas,
    _UNSENT: _has_replicas,
    _OUTER: _synchronises,
    _REPLICAS: _has_replicas,
    _COMPARED: _compares,
    _COMPRESSION: _compresses,
    _COMPARED_COMPRESSION: lambda config: _compares(config) and _compresses(config),
    _FEEDBACK: _feeds_back,
}


def applies(row: Metric, config: RunConfig) -> bool:
    """Return whether a run of this configuration may write a metric.

    That of a row of one's own, with a condition in other words, is taken to apply.
    """
    return row.when not in _HOLDS or _HOLDS[row.when](config)


# Categories of TensorBoard's custom-scalars page, in the order of their first rows.
_LOSS = "Loss"
_TRAINING = "Training"
_SPEED = "Speed"
_INNER = "Inner optimizer"
_SAVING = "Saving"
_OUTER_STEP = "Outer step"
_EXCHANGE = "Exchange"
_REPLICAS_PRESENT = "Replicas"

_ROWS = (
    # Training; tags without a slash are Megatron's.
    Metric(
        "lm loss", "nats per token", "mean", "mean over replicas", _ALWAYS,
        "Training loss. With K > 1, steps after the last launch of a start have no point: see "
        "`lm loss replica 0`.",
        Chart(_LOSS, "training loss"),
    ),
    Metric(
        "lm loss validation", "nats per token", "event", "the same everywhere", _EVALUATION,
        "Loss of the anchor on held-out data.",
        Chart(_LOSS, "held-out loss"),
    ),
    Metric(
        "lm loss vs tokens", "nats per token", "mean", "mean over replicas", _TOKENS,
        "`lm loss`, with the tokens of all replicas as x axis.",
        Chart(_LOSS, "training loss over tokens"),
    ),
    Metric(
        "lm loss validation vs tokens", "nats per token", "event", "the same everywhere",
        _EVALUATED_TOKENS,
        "`lm loss validation`, with the tokens of all replicas as x axis.",
        Chart(_LOSS, "held-out loss over tokens"),
    ),
    Metric(
        "lm loss validation ppl", "1", "event", "the same everywhere", _EVALUATION,
        "Perplexity: exp(loss), with the loss capped at 20 as in Megatron.",
        Chart(_LOSS, "held-out perplexity"),
    ),
    Metric(
        "lm loss test", "nats per token", "event", "the same everywhere", _TEST,
        "Loss of the last anchor on `data.test`.",
        Chart(_LOSS, "test loss"),
    ),
    Metric(
        "lm loss test ppl", "1", "event", "the same everywhere", _TEST,
        "Perplexity: exp(loss), with the loss capped at 20 as in Megatron.",
        Chart(_LOSS, "test perplexity"),
    ),
    Metric(
        "lm loss replica 0", "nats per token", "mean", "replica 0", _UNSENT,
        "Training loss of replica 0 alone. A start that ends within a round has no launch that "
        "could send its last values to the other replicas.",
        Chart(_LOSS, "training loss of replica 0 alone"),
    ),
    Metric(
        "grad-norm", "1", "last", "mean over replicas", _ALWAYS,
        "Norm of a replica's gradient before clipping. A step is skipped where it is not finite.",
        Chart(_TRAINING, "gradient norm"),
    ),
    Metric(
        "skipped", "1", "mean", "writing rank", _ALWAYS,
        "Share of the inner steps that this replica skipped, because the gradient norm was not "
        "finite or a spike. The console counts those of all replicas.",
        Chart(_TRAINING, "share of skipped steps"),
    ),
    Metric(
        "rolled-back", "1", "mean", "writing rank", _SPIKES,
        "Share of the inner steps after which this replica was set back to the anchor.",
        Chart(_TRAINING, "share of steps set back to the anchor"),
    ),
    Metric(
        "learning-rate", "1", "last", "the same everywhere", _ALWAYS,
        "Inner learning rate of the step.",
        Chart(_TRAINING, "learning rate"),
    ),
    Metric(
        "batch-size", "sequences", "last", "the same everywhere", _ALWAYS,
        "Sequences of one inner step over all replicas.",
        Chart(_TRAINING, "batch"),
    ),
    Metric(
        "grad-norm replica 0", "1", "last", "replica 0", _UNSENT,
        "Gradient norm of replica 0 alone, where there is `lm loss replica 0`.",
        Chart(_TRAINING, "gradient norm of replica 0 alone"),
    ),
    # Speed.
    Metric(
        "perf/tokens_per_s", "tokens/s", "mean", "writing rank", _ALWAYS,
        "Tokens per second of all replicas together.",
        Chart(_SPEED, "speed"),
    ),
    Metric(
        "throughput", "TFLOP/s per rank", "mean", "writing rank", _ALWAYS,
        "Model FLOPs of all replicas (without recomputation) divided by time and number of ranks.",
        Chart(_SPEED, "model FLOPs"),
    ),
    Metric(
        "perf/mfu", "1", "mean", "writing rank", _KNOWN_PEAK,
        "Model FLOPs utilization: throughput divided by the accelerator's dense bf16 peak.",
        Chart(_SPEED, "model FLOPs utilization"),
    ),
    Metric(
        "iteration-time", "s", "mean", "writing rank", _ALWAYS,
        "Wall-clock time of an inner step and its outer steps, without evaluation and saving.",
        Chart(_SPEED, "inner step with its outer steps"),
    ),
    Metric(
        "perf/peak_memory_gib", "GiB", "last", "writing rank", _ALWAYS,
        "Peak memory since the start: allocated on the device, or, on a CPU, resident in the "
        "process.",
        Chart(_SPEED, "peak memory"),
    ),
    Metric(
        "perf/replica_step_ms", "ms", "mean", "writing rank", _ALWAYS,
        "Time of an inner step of the writing rank's replica, without outer steps.",
        Chart(_SPEED, "inner step of replica 0"),
    ),
    Metric(
        "perf/replica_step_ms_min", "ms", "mean", "the same everywhere", _SENT,
        "The same of the fastest replica.",
        Chart(_SPEED, "inner step of the fastest replica"),
    ),
    Metric(
        "perf/replica_step_ms_max", "ms", "mean", "the same everywhere", _SENT,
        "The same of the slowest replica, for which all others wait in every round.",
        Chart(_SPEED, "inner step of the slowest replica"),
    ),
    Metric(
        "perf/slowest_replica", "replica", "mean", "the same everywhere", _SENT,
        "Index of the slowest replica; the console names it where it takes 1.25 times as long as "
        "the fastest one.",
        Chart(_SPEED, "index of the slowest replica"),
    ),
    Metric(
        "perf/inner_optimizer_ms", "ms", "mean", "writing rank", _ALWAYS,
        "Time of the inner optimizer's step, including clipping and communication.",
        Chart(_INNER, "inner optimizer"),
    ),
    Metric(
        "perf/adamw_ms", "ms", "mean", "writing rank", _ALWAYS,
        "Time in an inner step for the parameters that AdamW updates.",
        Chart(_INNER, "AdamW"),
    ),
    Metric(
        "perf/collect_ms", "ms", "mean", "writing rank", _MUON,
        "Time in an inner step for momentum, packing and waiting for matrices to reach their owner "
        "ranks; without the part hidden behind Newton-Schulz.",
        Chart(_INNER, "momentum, packing and waiting"),
    ),
    Metric(
        "perf/newton_schulz_ms", "ms", "mean", "writing rank", _MUON,
        "Time in an inner step for Newton-Schulz on this rank.",
        Chart(_INNER, "Newton-Schulz"),
    ),
    Metric(
        "perf/return_ms", "ms", "mean", "writing rank", _MUON,
        "Time in an inner step for waiting for updates and applying them; without the part hidden "
        "behind Newton-Schulz.",
        Chart(_INNER, "waiting for updates"),
    ),
    # Muon.
    Metric(
        "checkpoint/held_s", "s", "event", "writing rank", _SAVES,
        "Time for which a save held training; with `checkpoint.async_save` that of the copy.",
        Chart(_SAVING, "time held by a save"),
    ),
    Metric(
        "checkpoint/failed_saves", "saves", "event", "the same everywhere", _FAILED,
        "Saves that failed since the start.",
        Chart(_SAVING, "failed saves"),
    ),
    Metric(
        "muon/ns_calls", "matrices", "last", "writing rank", _MUON,
        "Matrices orthogonalised by this rank in the step.",
        Chart(_INNER, "matrices orthogonalised"),
    ),
    Metric(
        "muon/balance", "1", "last", "the same everywhere", _MUON,
        "Largest over mean Newton-Schulz cost of the ranks of a pipeline stage; 1 is perfect.",
        Chart(_INNER, "balance of Newton-Schulz"),
    ),
    Metric(
        "muon/orthogonality_error", "1", "last", "writing rank", _MUON,
        "Frobenius norm of X·Xᵀ − I divided by the root of the shorter side, for one matrix of "
        "this rank, a different one for each line. The default coefficients do not bring it to 0.",
        Chart(_INNER, "orthogonality error"),
    ),
    # The outer step: values of the fragments applied after this inner step.
    Metric(
        "muloco/round", "rounds", "event", "the same everywhere", _OUTER,
        "Round of the inner step, counted from 1.",
        Chart(_OUTER_STEP, "round"),
    ),
    Metric(
        "muloco/pseudogradient_norm", "1", "event", "replica 0", _OUTER,
        "Norm of the replica's pseudogradient, anchor − local.",
        Chart(_OUTER_STEP, "pseudogradient norm"),
    ),
    Metric(
        "muloco/update_norm", "1", "event", "the same everywhere", _OUTER,
        "Norm of the anchor's change.",
        Chart(_OUTER_STEP, "update norm"),
    ),
    Metric(
        "muloco/cosine_to_mean", "1", "event", "replica 0", _OUTER,
        "Cosine of the replica's own and the mean pseudogradient; mean over fragments.",
        Chart(_OUTER_STEP, "cosine to the mean pseudogradient"),
    ),
    Metric(
        "muloco/cosine_pairwise_min", "1", "event", "the same everywhere", _COMPARED,
        "Smallest cosine of two replicas' pseudogradients, estimated from count sketches every "
        "`monitor.pseudogradient_interval` rounds.",
        Chart(_OUTER_STEP, "smallest cosine of two replicas"),
    ),
    Metric(
        "muloco/exposed_ms", "ms", "event", "writing rank", _OUTER,
        "Host time of launching reductions and waiting for them; on an accelerator it includes "
        "the wait for work queued earlier.",
        Chart(_EXCHANGE, "waiting for outer steps"),
    ),
    Metric(
        "muloco/round_ms", "ms", "event", "writing rank", _OUTER,
        "Wall-clock time of a complete round, without evaluation and saving.",
        Chart(_EXCHANGE, "round"),
    ),
    Metric(
        "muloco/wire_bytes", "bytes", "event", "writing rank", _OUTER,
        "Bytes sent by this rank.",
        Chart(_EXCHANGE, "sent in an outer step"),
    ),
    Metric(
        "muloco/wire_bytes_total", "bytes", "event", "writing rank", _OUTER,
        "Bytes sent by this rank in outer steps since the run was started or resumed.",
        Chart(_EXCHANGE, "sent in all"),
    ),
    Metric(
        "muloco/compression_error", "1", "event", "replica 0", _COMPRESSION,
        "Norm of the encoding error divided by the norm of the encoded values.",
        Chart(_EXCHANGE, "compression error"),
    ),
    Metric(
        "muloco/compression_ratio", "1", "event", "writing rank", _REPLICAS,
        "Bytes of an fp32 all-reduce of the same tensors divided by the bytes sent.",
        Chart(_EXCHANGE, "compression ratio"),
    ),
    Metric(
        "muloco/compression_cosine", "1", "event", "the same everywhere", _COMPARED_COMPRESSION,
        "Cosine of the decoded mean and the mean of the exact pseudogradients, estimated from "
        "count sketches every `monitor.pseudogradient_interval` rounds; smallest over fragments.",
        Chart(_EXCHANGE, "cosine of decoded and exact mean"),
    ),
    Metric(
        "muloco/encode_ms", "ms", "event", "writing rank", _COMPRESSION,
        "Host time of encoding, twice per fragment; with overlap it may run beside training.",
        Chart(_EXCHANGE, "encoding"),
    ),
    Metric(
        "muloco/decode_ms", "ms", "event", "writing rank", _COMPRESSION,
        "Host time of decoding.",
        Chart(_EXCHANGE, "decoding"),
    ),
    Metric(
        "muloco/residual_norm", "1", "event", "replica 0", _FEEDBACK,
        "Norm of the residuals that error feedback keeps of these fragments for the next round.",
        Chart(_EXCHANGE, "residual norm"),
    ),
    Metric(
        "muloco/weight_sum", "replicas", "event", "the same everywhere", _OUTER,
        "Sum of the replicas' weights; smallest over fragments.",
        Chart(_REPLICAS_PRESENT, "replicas in the mean"),
    ),
    Metric(
        "muloco/excluded", "replicas", "event", "the same everywhere", _OUTER,
        "Replicas with weight 0: excluded by the guard, or without a trained step; largest over "
        "fragments.",
        Chart(_REPLICAS_PRESENT, "replicas left out"),
    ),
    Metric(
        "muloco/empty_rounds", "rounds", "event", "the same everywhere", _OUTER,
        "Rounds in a row with fewer usable replicas than `outer.guard.min_usable_replicas`; "
        "largest over fragments. At `outer.guard.max_empty_rounds` the run stops.",
        Chart(_REPLICAS_PRESENT, "empty rounds in a row"),
    ),
)  # fmt: skip

METRICS = MetricTable(_ROWS)
"""The metrics of the package, in the order of the reference page and of the charts."""
