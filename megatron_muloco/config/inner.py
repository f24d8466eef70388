"""Config schema of the inner optimizer, and its `learning_rate` as a function of the step."""

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from megatron_muloco.config.section import Section

__all__ = [
    "Accumulation",
    "AdamConfig",
    "AdamWInner",
    "CoefficientType",
    "InnerConfig",
    "MuonConfig",
    "MuonInner",
    "NSImplementation",
    "PerOptimizer",
    "ScaleMode",
    "VectorConfig",
    "WSDDecay",
    "learning_rate",
]


Accumulation = Literal["heavy_ball", "ema"]
CoefficientType = Literal["quintic", "simple", "polar_express"]
ScaleMode = Literal["unit_rms_norm", "spectral", "shape_scaling", "match_rms"]

WSDDecay = Literal["exponential", "linear", "cosine", "minus_sqrt"]

NSImplementation = Literal["plain", "triangle", "gram"]
"""How the Newton-Schulz steps are computed.

- ``plain``: as published.
- ``triangle``: each symmetric product by one of its triangles.
- ``gram``: like ``triangle``, and steps in pairs on the Gram matrix.
"""


class MuonConfig(Section):
    """Constants of Muon, which updates matrix parameters; the defaults are the MuLoCo paper's."""

    momentum: float = Field(
        0.9, ge=0, lt=1, description="Decay of the momentum buffer M per inner step."
    )
    accumulation: Accumulation = Field(
        "heavy_ball", description="M <- momentum*M + G, or M <- momentum*M + (1 - momentum)*G."
    )
    nesterov: bool = Field(
        False, description="Orthogonalise the Nesterov look-ahead of M instead of M."
    )
    num_ns_steps: int = Field(5, ge=1, le=100, description="Newton-Schulz steps per update.")
    coefficient_type: CoefficientType = Field(
        "quintic", description="Coefficients of the Newton-Schulz polynomials."
    )
    scale_mode: ScaleMode = Field(
        "unit_rms_norm",
        description="Factor on the orthogonal update: sqrt(fan_out/fan_in), sqrt(max(fan_out, "
        "fan_in)), sqrt(max(1, fan_out/fan_in)), or 0.2*sqrt(max(fan_out, fan_in)).",
    )
    eps: float = Field(1e-8, gt=0, description="Added to the Frobenius norm before dividing by it.")
    ns_dtype: Literal["auto", "bf16", "fp32"] = Field(
        "auto",
        description="Dtype of the Newton-Schulz products; auto is bf16 on an accelerator and fp32 "
        "on a CPU.",
    )
    ns_impl: Literal["auto", NSImplementation] = Field(
        "auto",
        description="Implementation of the Newton-Schulz products: plain computes them as "
        "published, triangle computes half of each symmetric product, gram also combines steps in "
        "pairs. All agree within rounding. auto chooses by shape; it uses plain in bf16, on "
        "accelerators and for small matrices. triangle and gram need ns_dtype fp32.",
    )
    split_heads: bool = Field(
        False,
        description="Orthogonalise and scale each head of q, k and v as a separate matrix "
        "instead of all heads together.",
    )
    exchange_dtype: Literal["auto", "bf16", "fp32"] = Field(
        "auto",
        description="Dtype in which shards are sent to the rank that orthogonalises them; auto is "
        "ns_dtype.",
    )
    exchange_chunks: int = Field(
        4,
        ge=1,
        description="Number of buckets in which matrices are sent to their owner ranks and back, "
        "so that communication overlaps with Newton-Schulz, except for the first bucket sent and "
        "the last one returned; 1 does not overlap. More buckets make the batches of equal shapes "
        "smaller. A stage of one rank has one bucket.",
    )

    def compute_dtype(self, *, accelerator: bool) -> Literal["bf16", "fp32"]:
        """Return ``ns_dtype`` with ``auto`` resolved for a device."""
        if self.ns_dtype != "auto":
            return self.ns_dtype
        return "bf16" if accelerator else "fp32"

    def wire_dtype(self, *, accelerator: bool) -> Literal["bf16", "fp32"]:
        """Return ``exchange_dtype`` with ``auto`` resolved for a device."""
        if self.exchange_dtype != "auto":
            return self.exchange_dtype
        return self.compute_dtype(accelerator=accelerator)


class AdamConfig(Section):
    """Constants of AdamW: for all parameters with kind adamw, for vector parameters with muon."""

    beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the first moment.")
    beta2: float = Field(0.99, ge=0, lt=1, description="Decay of the second moment.")
    eps: float = Field(1e-8, gt=0, description="Added to the square root of the second moment.")


class VectorConfig(Section):
    """Multipliers for vector parameters: embedding, output head and norms."""

    lr_mult: float = Field(1.0, ge=0, description="Factor on the learning rate.")
    weight_decay_mult: float = Field(1.0, ge=0, description="Factor on the weight decay.")


class PerOptimizer(Section):
    """A value for each inner optimizer, so that one model file fits every method."""

    kind: Literal["per_optimizer"] = Field(description="per_optimizer, where not a plain number.")
    muon: float = Field(ge=0, description="Value with kind muon.")
    adamw: float = Field(ge=0, description="Value with kind adamw.")


def _tag(value: Any) -> str | None:
    """Return the ``kind`` of a value per optimizer, given as keys or as an object."""
    if value is None:
        return "none"
    if isinstance(value, dict):
        kind = value.get("kind")
        return None if kind is None else str(kind)
    return str(getattr(value, "kind", "number"))


_DecayBase = Annotated[
    Annotated[Annotated[float, Field(ge=0)], Tag("number")]
    | Annotated[PerOptimizer, Tag("per_optimizer")]
    | Annotated[None, Tag("none")],
    Discriminator(_tag),
]


class _Inner(Section):
    """Keys that every inner optimizer has."""

    lr: float = Field(gt=0, description="Peak learning rate, reached after the warm-up.")
    min_lr_ratio: float = Field(
        0.1, ge=0, le=1, description="Learning rate of the last step as a fraction of the peak."
    )
    lr_warmup_iters: int = Field(500, ge=0, description="Inner steps of linear warm-up from zero.")
    lr_decay_style: Literal["cosine", "linear", "constant", "WSD"] = Field(
        "cosine",
        description="Shape of the learning rate from the warm-up to the last step. WSD (warm-up, "
        "stable, decay) stays at the peak until the last lr_wsd_decay_iters steps.",
    )
    lr_wsd_decay_style: WSDDecay = Field(
        "exponential",
        description="Shape of the decay at the end of WSD: of its share x of steps, exponential "
        "keeps 2 * 0.5^x - 1, linear 1 - x, minus_sqrt 1 - sqrt(x), cosine half a cosine.",
    )
    lr_wsd_decay_iters: int | None = Field(
        None, ge=1, description="Inner steps of the decay at the end of WSD; none with others."
    )
    weight_decay: float | None = Field(
        None,
        ge=0,
        description="Decoupled weight decay, multiplied by the learning rate of the step. Set "
        "exactly one of weight_decay and weight_decay_base.",
    )
    weight_decay_base: _DecayBase = Field(
        None,
        description="Weight decay at a per-replica batch of weight_decay_reference_batch "
        "sequences; it scales in proportion to the per-replica batch. A number, or a number for "
        "each inner optimizer: {kind: per_optimizer, muon: 0.01, adamw: 0.001}.",
    )
    weight_decay_reference_batch: int = Field(
        512, ge=1, description="Per-replica batch, in sequences, for which weight_decay_base holds."
    )
    adam: AdamConfig = Field(default_factory=AdamConfig, description="AdamW constants.")
    vector: VectorConfig = Field(
        default_factory=VectorConfig, description="Multipliers for vector parameters."
    )


class MuonInner(_Inner):
    """Inner optimizer of MuLoCo: Muon for matrices, AdamW for vector parameters."""

    kind: Literal["muon"] = Field(description="muon or adamw.")
    muon: MuonConfig = Field(default_factory=MuonConfig, description="Muon constants.")

    @property
    def decay_base(self) -> float | None:
        """``weight_decay_base`` of Muon; ``None`` if not set."""
        base = self.weight_decay_base
        return base.muon if isinstance(base, PerOptimizer) else base


class AdamWInner(_Inner):
    """Inner optimizer of DiLoCo: AdamW for every parameter."""

    kind: Literal["adamw"] = Field(description="muon or adamw.")

    @property
    def decay_base(self) -> float | None:
        """``weight_decay_base`` of AdamW; ``None`` if not set."""
        base = self.weight_decay_base
        return base.adamw if isinstance(base, PerOptimizer) else base


InnerConfig = Annotated[MuonInner | AdamWInner, Field(discriminator="kind")]


# ---- learning rate: a pure function of the inner step, so that resuming needs no state ---


def learning_rate(inner: InnerConfig, train_iters: int, step: int) -> float:
    """Return the learning rate of inner step ``step``, counted from 1 over the whole run.

    It rises linearly from lr / lr_warmup_iters at step 1 to lr at step ``lr_warmup_iters``, then
    decays to ``min_lr_ratio * lr`` at step ``train_iters`` and stays there. WSD stays at lr until
    its decay begins, so a run can be resumed from there with another ``train_iters``.

    Source: MuLoCo research code (500 steps of linear warm-up, cosine to 0.1 of the peak over the
    rest); Megatron's scheduler for WSD. Steps are counted from 1, so that the first step has a
    learning rate above zero.
    """
    if step < 1:
        raise ValueError(f"inner steps are counted from 1, got {step}")
    warmup = inner.lr_warmup_iters
    if step <= warmup:
        return inner.lr * step / warmup
    if inner.lr_decay_style == "constant":
        return inner.lr
    start: int = warmup
    shape: str = inner.lr_decay_style
    if inner.lr_decay_style == "WSD":
        start, shape = train_iters - (inner.lr_wsd_decay_iters or 0), inner.lr_wsd_decay_style
        if step <= start:
            return inner.lr
    progress = min(1.0, (step - start) / (train_iters - start))
    floor = inner.lr * inner.min_lr_ratio
    return floor + (inner.lr - floor) * _DECAYS[shape](progress)


# Share of the way from the peak to the last rate that is left, by the share of the decay's steps.
_DECAYS: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1.0 - progress,
    "exponential": lambda progress: 2.0 * 0.5**progress - 1.0,
    "minus_sqrt": lambda progress: 1.0 - math.sqrt(progress),
}
