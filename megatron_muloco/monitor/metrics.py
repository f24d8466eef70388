"""Every metric of a run, one row each: what may be written, and what it means.

Tags that Megatron has keep Megatron's names, so that runs of both overlay in one TensorBoard. The
x axis of all of them is the inner step. `docs/reference/metrics.md` is generated from here; no
torch.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_muloco.config.outer import NoCompression, NoOuter
from megatron_muloco.config.schema import RunConfig
from megatron_muloco.errors import RuntimeMismatch

__all__ = ["METRICS", "Applies", "Metric", "applicable_tags", "metric"]

Applies = Literal[
    "always",
    "outer",
    "wire",
    "compared",
    "codec",
    "compared codec",
    "feedback",
    "muon",
    "eval",
    "gpu",
]
OverSteps = Literal["mean", "last", "event"]
OverRanks = Literal["mean over replicas", "the same everywhere", "replica 0", "writing rank"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the registry.

    Attributes:
        tag: Name in TensorBoard.
        unit: Of the value; ``1`` for a pure number.
        over_steps: ``mean`` of the inner steps since the last line, the ``last`` of them, or
            written at the ``event`` itself.
        over_ranks: Whose value it is.
        applies: When a run writes it; ``wire`` is an outer step with more than one replica,
            ``compared`` one that also compares them, ``codec`` an outer step with a lossy code,
            ``feedback`` one with error feedback.
        meaning: In a sentence.
    """

    tag: str
    unit: str
    over_steps: OverSteps
    over_ranks: OverRanks
    applies: Applies
    meaning: str


METRICS: tuple[Metric, ...] = (
    # Megatron's own.
    Metric(
        "lm loss", "nats per token", "mean", "mean over replicas", "always",
        "Training loss. What a stop leaves of an unfinished round is replica 0's alone.",
    ),
    Metric(
        "learning-rate", "1", "last", "the same everywhere", "always",
        "Inner learning rate of the step.",
    ),
    Metric(
        "batch-size", "sequences", "last", "the same everywhere", "always",
        "Sequences of one inner step over all replicas.",
    ),
    Metric(
        "grad-norm", "1", "last", "mean over replicas", "always",
        "Norm of a replica's gradient before clipping; not finite where a step was skipped.",
    ),
    Metric(
        "iteration-time", "s", "mean", "writing rank", "always",
        "Wall-clock of an inner step with its outer steps, without evaluation and saving.",
    ),
    Metric(
        "throughput", "TFLOP/s per rank", "mean", "writing rank", "always",
        "Model FLOPs (recompute not counted) of all replicas over time and ranks.",
    ),
    Metric(
        "lm loss validation", "nats per token", "event", "the same everywhere", "eval",
        "Loss of the anchor on held-out data.",
    ),
    Metric(
        "lm loss validation ppl", "1", "event", "the same everywhere", "eval",
        "exp of the held-out loss, of at most 20 as Megatron has it.",
    ),
    # Speed.
    Metric(
        "perf/mfu", "1", "mean", "writing rank", "gpu",
        "Throughput over the accelerator's dense bf16 peak; absent where no peak is known.",
    ),
    Metric(
        "perf/tokens_per_s", "tokens/s", "mean", "writing rank", "always",
        "Tokens of all replicas over time.",
    ),
    Metric(
        "perf/inner_optimizer_ms", "ms", "mean", "writing rank", "always",
        "Time of the inner optimizer's step, its communication and clipping included.",
    ),
    Metric(
        "perf/adamw_ms", "ms", "mean", "writing rank", "always",
        "Time of an inner step for AdamW's part.",
    ),
    Metric(
        "perf/collect_ms", "ms", "mean", "writing rank", "muon",
        "Time of an inner step for momentum, packing, and waiting until matrices are at their "
        "owners; what Newton-Schulz hides is not in it.",
    ),
    Metric(
        "perf/newton_schulz_ms", "ms", "mean", "writing rank", "muon",
        "Time of an inner step in which this rank orthogonalises.",
    ),
    Metric(
        "perf/return_ms", "ms", "mean", "writing rank", "muon",
        "Time of an inner step for waiting until updates are back, and applying them; what "
        "Newton-Schulz hides is not in it.",
    ),
    # Muon.
    Metric(
        "muon/ns_calls", "matrices", "last", "writing rank", "muon",
        "Matrices that this rank orthogonalised in the step.",
    ),
    Metric(
        "muon/balance", "1", "last", "the same everywhere", "muon",
        "Largest over mean Newton-Schulz cost of the ranks of this rank's stage; 1 is perfect.",
    ),
    Metric(
        "muon/orthogonality_error", "1", "last", "writing rank", "muon",
        "Frobenius norm of X·Xᵀ − I over the root of the shorter side, for one matrix; each line "
        "takes the next of this rank's. The default polynomials do not go to 0.",
    ),
    # The outer step: of the fragments applied after this inner step.
    Metric(
        "muloco/pseudogradient_norm", "1", "event", "replica 0", "outer",
        "Norm of the replica's own pseudogradient, anchor − local.",
    ),
    Metric(
        "muloco/update_norm", "1", "event", "the same everywhere", "outer",
        "Norm of what the anchor moved by.",
    ),
    Metric(
        "muloco/cosine_to_mean", "1", "event", "replica 0", "outer",
        "Cosine of the own and the mean pseudogradient; the mean of it over fragments.",
    ),
    Metric(
        "muloco/cosine_pairwise_min", "1", "event", "the same everywhere", "compared",
        "Smallest cosine of two replicas' pseudogradients, estimated from random sketches; every "
        "monitor.pseudogradient_interval rounds.",
    ),
    Metric(
        "muloco/weight_sum", "replicas", "event", "the same everywhere", "outer",
        "Replicas that took part; the smallest of it over fragments.",
    ),
    Metric(
        "muloco/wire_bytes", "bytes", "event", "writing rank", "outer",
        "Bytes that this rank sent.",
    ),
    Metric(
        "muloco/wire_bytes_total", "bytes", "event", "writing rank", "outer",
        "Bytes that this rank has sent in outer steps since the run was started or resumed.",
    ),
    Metric(
        "muloco/compression_ratio", "1", "event", "writing rank", "wire",
        "Bytes of an fp32 all-reduce of the same tensors over the bytes sent.",
    ),
    Metric(
        "muloco/exposed_ms", "ms", "event", "writing rank", "outer",
        "Host time of launching outer steps and waiting for them; on an accelerator with what was "
        "queued before.",
    ),
    Metric(
        "muloco/round_ms", "ms", "event", "writing rank", "outer",
        "Wall-clock of a complete round, without evaluation and saving.",
    ),
    Metric(
        "muloco/compression_error", "1", "event", "replica 0", "codec",
        "Norm of what encoding lost over the norm of what was encoded.",
    ),
    Metric(
        "muloco/compression_cosine", "1", "event", "the same everywhere", "compared codec",
        "Cosine of the decoded mean and the mean of the exact pseudogradients, estimated from the "
        "sketches of monitor.pseudogradient_interval; the smallest over fragments.",
    ),
    Metric(
        "muloco/encode_ms", "ms", "event", "writing rank", "codec",
        "Host time of encoding, twice a round; with overlap training goes on meanwhile.",
    ),
    Metric(
        "muloco/decode_ms", "ms", "event", "writing rank", "codec",
        "Host time of decoding.",
    ),
    Metric(
        "muloco/residual_norm", "1", "event", "replica 0", "feedback",
        "Norm of what error feedback keeps for the next round, of the fragments sent now.",
    ),
    Metric(
        "muloco/excluded", "replicas", "event", "the same everywhere", "outer",
        "Replicas with weight 0: left out by the guard, or with tokens as weights not trained; the "
        "most of any fragment.",
    ),
    Metric(
        "muloco/round", "rounds", "event", "the same everywhere", "outer",
        "Round that the inner step belongs to, counted from 1.",
    ),
)  # fmt: skip

_BY_TAG = {row.tag: row for row in METRICS}


def metric(tag: str) -> Metric:
    """Return the row of a tag.

    Raises:
        RuntimeMismatch: The registry has no such tag: a typo, or a metric without a description.
    """
    if tag not in _BY_TAG:
        raise RuntimeMismatch(
            f"metric {tag!r} is not in the registry, so nobody could look up what it means. "
            "Add a row to megatron_muloco/monitor/metrics.py or correct the tag."
        )
    return _BY_TAG[tag]


def applicable_tags(config: RunConfig, *, peak_known: bool = False) -> tuple[str, ...]:
    """Return the tags that a run of this config has something to say about.

    Args:
        config: A checked config.
        peak_known: Whether it runs on an accelerator whose peak is known.
    """
    outer = config.outer
    synchronised = not isinstance(outer, NoOuter)
    meets = synchronised and config.parallel.num_replicas > 1
    compares = meets and config.monitor.pseudogradient_interval > 0
    code = NoCompression() if isinstance(outer, NoOuter) else outer.compression
    coded = not isinstance(code, NoCompression)
    applies: dict[Applies, bool] = {
        "always": True,
        "outer": synchronised,
        "wire": meets,
        "compared": compares,
        "codec": coded,
        "compared codec": coded and compares,
        "feedback": not isinstance(code, NoCompression) and code.error_feedback,
        "muon": config.inner.kind == "muon",
        "eval": config.training.eval_interval > 0,
        "gpu": peak_known,
    }
    return tuple(row.tag for row in METRICS if applies[row.applies])
