"""Registry of metrics: one row per TensorBoard tag, with unit, reduction and meaning.

Metrics that Megatron has keep Megatron's tags, so that runs of both overlay in one TensorBoard. The
x axis of all metrics is the inner step. `docs/reference/metrics.md` is generated from this table.
Imports no torch.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_muloco.errors import RuntimeMismatch

__all__ = ["METRICS", "Metric", "metric"]

OverSteps = Literal["mean", "last", "event"]
OverRanks = Literal["mean over replicas", "the same everywhere", "replica 0", "writing rank"]


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
    """

    tag: str
    unit: str
    over_steps: OverSteps
    over_ranks: OverRanks
    when: str
    meaning: str


# Conditions that several rows share.
_ALWAYS = "always"
_EVALUATION = "`training.eval_interval` above 0"
_KNOWN_PEAK = "an accelerator with a known peak"
_MUON = "`inner.kind: muon`"
_OUTER = "an outer step"
_REPLICAS = "an outer step, K > 1"
_COMPARED = "an outer step, K > 1, replicas compared"
_COMPRESSION = "compression"
_COMPARED_COMPRESSION = "compression, K > 1, replicas compared"
_FEEDBACK = "error feedback"

METRICS: tuple[Metric, ...] = (
    # Metrics that Megatron has too.
    Metric(
        "lm loss", "nats per token", "mean", "mean over replicas", _ALWAYS,
        "Training loss. After a stop within a round, the last points are those of replica 0 alone.",
    ),
    Metric(
        "learning-rate", "1", "last", "the same everywhere", _ALWAYS,
        "Inner learning rate of the step.",
    ),
    Metric(
        "batch-size", "sequences", "last", "the same everywhere", _ALWAYS,
        "Sequences of one inner step over all replicas.",
    ),
    Metric(
        "grad-norm", "1", "last", "mean over replicas", _ALWAYS,
        "Norm of a replica's gradient before clipping; not finite if a step was skipped.",
    ),
    Metric(
        "iteration-time", "s", "mean", "writing rank", _ALWAYS,
        "Wall-clock time of an inner step and its outer steps, without evaluation and saving.",
    ),
    Metric(
        "throughput", "TFLOP/s per rank", "mean", "writing rank", _ALWAYS,
        "Model FLOPs of all replicas (without recomputation) divided by time and number of ranks.",
    ),
    Metric(
        "lm loss validation", "nats per token", "event", "the same everywhere", _EVALUATION,
        "Loss of the anchor on held-out data.",
    ),
    Metric(
        "lm loss validation ppl", "1", "event", "the same everywhere", _EVALUATION,
        "Perplexity: exp(loss), with the loss capped at 20 as in Megatron.",
    ),
    # Speed.
    Metric(
        "perf/mfu", "1", "mean", "writing rank", _KNOWN_PEAK,
        "Model FLOPs utilization: throughput divided by the accelerator's dense bf16 peak.",
    ),
    Metric(
        "perf/tokens_per_s", "tokens/s", "mean", "writing rank", _ALWAYS,
        "Tokens per second of all replicas together.",
    ),
    Metric(
        "perf/inner_optimizer_ms", "ms", "mean", "writing rank", _ALWAYS,
        "Time of the inner optimizer's step, including clipping and communication.",
    ),
    Metric(
        "perf/adamw_ms", "ms", "mean", "writing rank", _ALWAYS,
        "Time in an inner step for the parameters that AdamW updates.",
    ),
    Metric(
        "perf/collect_ms", "ms", "mean", "writing rank", _MUON,
        "Time in an inner step for momentum, packing and waiting for matrices to reach their owner "
        "ranks; without the part hidden behind Newton-Schulz.",
    ),
    Metric(
        "perf/newton_schulz_ms", "ms", "mean", "writing rank", _MUON,
        "Time in an inner step for Newton-Schulz on this rank.",
    ),
    Metric(
        "perf/return_ms", "ms", "mean", "writing rank", _MUON,
        "Time in an inner step for waiting for updates and applying them; without the part hidden "
        "behind Newton-Schulz.",
    ),
    # Muon.
    Metric(
        "muon/ns_calls", "matrices", "last", "writing rank", _MUON,
        "Matrices orthogonalised by this rank in the step.",
    ),
    Metric(
        "muon/balance", "1", "last", "the same everywhere", _MUON,
        "Largest over mean Newton-Schulz cost of the ranks of a pipeline stage; 1 is perfect.",
    ),
    Metric(
        "muon/orthogonality_error", "1", "last", "writing rank", _MUON,
        "Frobenius norm of X·Xᵀ − I divided by the root of the shorter side, for one matrix of "
        "this rank, another one in each line. It does not reach 0 by default.",
    ),
    # The outer step: values of the fragments applied after this inner step.
    Metric(
        "muloco/pseudogradient_norm", "1", "event", "replica 0", _OUTER,
        "Norm of the replica's pseudogradient, anchor − local.",
    ),
    Metric(
        "muloco/update_norm", "1", "event", "the same everywhere", _OUTER,
        "Norm of the anchor's change.",
    ),
    Metric(
        "muloco/cosine_to_mean", "1", "event", "replica 0", _OUTER,
        "Cosine of the replica's own and the mean pseudogradient; mean over fragments.",
    ),
    Metric(
        "muloco/cosine_pairwise_min", "1", "event", "the same everywhere", _COMPARED,
        "Smallest cosine of two replicas' pseudogradients, estimated from count sketches every "
        "`monitor.pseudogradient_interval` rounds.",
    ),
    Metric(
        "muloco/weight_sum", "replicas", "event", "the same everywhere", _OUTER,
        "Sum of the replicas' weights; smallest over fragments.",
    ),
    Metric(
        "muloco/wire_bytes", "bytes", "event", "writing rank", _OUTER,
        "Bytes sent by this rank.",
    ),
    Metric(
        "muloco/wire_bytes_total", "bytes", "event", "writing rank", _OUTER,
        "Bytes sent by this rank in outer steps since the run was started or resumed.",
    ),
    Metric(
        "muloco/compression_ratio", "1", "event", "writing rank", _REPLICAS,
        "Bytes of an fp32 all-reduce of the same tensors divided by the bytes sent.",
    ),
    Metric(
        "muloco/exposed_ms", "ms", "event", "writing rank", _OUTER,
        "Host time of launching reductions and waiting for them; on an accelerator it includes "
        "work queued before.",
    ),
    Metric(
        "muloco/round_ms", "ms", "event", "writing rank", _OUTER,
        "Wall-clock time of a complete round, without evaluation and saving.",
    ),
    Metric(
        "muloco/compression_error", "1", "event", "replica 0", _COMPRESSION,
        "Norm of the encoding error divided by the norm of the encoded values.",
    ),
    Metric(
        "muloco/compression_cosine", "1", "event", "the same everywhere", _COMPARED_COMPRESSION,
        "Cosine of the decoded mean and the mean of the exact pseudogradients, estimated from "
        "count sketches every `monitor.pseudogradient_interval` rounds; smallest over fragments.",
    ),
    Metric(
        "muloco/encode_ms", "ms", "event", "writing rank", _COMPRESSION,
        "Host time of encoding, twice per fragment; with overlap it may run beside training.",
    ),
    Metric(
        "muloco/decode_ms", "ms", "event", "writing rank", _COMPRESSION,
        "Host time of decoding.",
    ),
    Metric(
        "muloco/residual_norm", "1", "event", "replica 0", _FEEDBACK,
        "Norm of the residuals that error feedback keeps for the next round, of these fragments.",
    ),
    Metric(
        "muloco/excluded", "replicas", "event", "the same everywhere", _OUTER,
        "Replicas with weight 0: excluded by the guard, or without trained tokens where tokens are "
        "the weights; largest over fragments.",
    ),
    Metric(
        "muloco/round", "rounds", "event", "the same everywhere", _OUTER,
        "Round of the inner step, counted from 1.",
    ),
)  # fmt: skip

_BY_TAG = {row.tag: row for row in METRICS}


def metric(tag: str) -> Metric:
    """Return the row of a tag.

    Raises:
        RuntimeMismatch: The registry has no such tag: a typo, or a metric without a row.
    """
    if tag not in _BY_TAG:
        raise RuntimeMismatch(
            f"metric {tag!r} is not in the registry, so its meaning is documented nowhere. "
            "Add a row to megatron_muloco/monitor/metrics.py or correct the tag."
        )
    return _BY_TAG[tag]
