"""The methods that are compared, as changes to the demo's config."""

from dataclasses import dataclass

__all__ = [
    "CONFIG",
    "METHODS",
    "OVERLAP",
    "RANKS",
    "SYNC_INTERVAL",
    "TABLE",
    "Method",
    "Sizes",
    "overrides",
]

CONFIG = "configs/cpu_k2.yaml"  # model and data
RANKS = 4  # K of the replica methods, dp of the others
SYNC_INTERVAL = 30  # the MuLoCo paper's

_MUON = ("inner.kind=muon", "inner.lr=0.0625")  # the MuLoCo paper's for its smallest model
# Chosen: between the two best of the sweep for a narrower model in docs/experiments/LOG.md.
_ADAMW = ("inner.kind=adamw", "inner.lr=0.06")
_NO_OUTER = (
    "parallel.num_replicas=1",
    "outer.kind=none",
    "outer.lr=null",
    "outer.momentum=null",
    "outer.sync_interval=null",
)
_REPLICAS = (f"parallel.num_replicas={RANKS}", f"outer.sync_interval={SYNC_INTERVAL}")
# Between the MuLoCo paper's K = 1 (0.7, 0.6) and K = 8 (0.9, 0.8).
_MULOCO = (*_MUON, *_REPLICAS, "outer.lr=0.8", "outer.momentum=0.7")
_DILOCO = (*_ADAMW, *_REPLICAS, "outer.lr=0.6", "outer.momentum=0.9")  # arXiv 2503.09799, K = 4
# What travels in data parallelism on accelerators: gradients, parameters and Muon's matrices in
# bf16. Megatron accumulates in bf16 only where parameters are bf16, so the whole variant is, and
# most CPUs compute slowly in it.
_BF16 = ("training.precision=bf16", "training.accumulate_dtype=bf16")
_FRAGMENTS = ("outer.fragments.count=3", "outer.fragments.pattern=strided")


@dataclass(frozen=True, slots=True)
class Method:
    """One way of training.

    Attributes:
        name: Name in file names and on the command line.
        title: Name in tables.
        changes: Changes to the config, as ``key=value``.
    """

    name: str
    title: str
    changes: tuple[str, ...]

    @property
    def is_bf16(self) -> bool:
        """Whether it computes in bf16."""
        return "training.precision=bf16" in self.changes

    @property
    def is_data_parallel(self) -> bool:
        """Whether ranks exchange gradients in every step."""
        return "outer.kind=none" in self.changes

    @property
    def overlaps(self) -> bool:
        """Whether compute goes on while a fragment is under way."""
        return any(change.startswith("outer.overlap_steps=") for change in self.changes)


def _code(kind: str, bits: int) -> tuple[str, ...]:
    names = ("kind", "bits", "error_feedback")
    values = (kind, bits, "true")
    return tuple(f"outer.compression.{n}={v}" for n, v in zip(names, values, strict=True))


def _overlap(steps: int, *apply: str) -> tuple[str, ...]:
    return (*_FRAGMENTS, f"outer.overlap_steps={steps}", *apply)


_MIX, _ADDITIVE = "outer.mixing_weight=0.5", "outer.apply=additive"

_PLAIN = Method("muloco", "MuLoCo", _MULOCO)  # one fragment, and it blocks
TABLE = (
    Method("adamw_dp", "AdamW DP", (*_ADAMW, *_NO_OUTER)),
    Method(
        "muon_dp",
        "Muon DP, fp32 gradients",
        (*_MUON, *_NO_OUTER, "inner.muon.exchange_dtype=fp32"),
    ),
    Method(
        "muon_dp_bf16",
        "Muon DP, bf16 gradients*",
        (*_MUON, *_NO_OUTER, *_BF16, "inner.muon.exchange_dtype=bf16"),
    ),
    Method("diloco", "DiLoCo", _DILOCO),
    _PLAIN,
    Method("muloco_4bit", "MuLoCo, 4 bits", (*_MULOCO, *_code("statistical", 4))),
    Method(
        "muloco_2bit_stream",
        "MuLoCo, 2 bits + EF, streaming",
        # Chosen: a fragment of at most 0.7 MB needs a step at 10 Mbit/s, and ranks that share cores
        # are a few steps apart.
        (*_MULOCO, *_code("statistical", 2), *_overlap(5, _MIX)),
    ),
)
# Chosen: of the 10 steps between two launches of three fragments; the last two are a margin.
_TAU = 8
OVERLAP = (
    _PLAIN,
    Method("overlap_mix", "MuLoCo, 3 fragments, τ = 8, α = 0.5", (*_MULOCO, *_overlap(_TAU, _MIX))),
    Method(
        "overlap_additive",
        "MuLoCo, 3 fragments, τ = 8, additive",
        (*_MULOCO, *_overlap(_TAU, _ADDITIVE)),
    ),
)
METHODS = {method.name: method for method in (*TABLE, *OVERLAP)}


@dataclass(frozen=True, slots=True)
class Sizes:
    """Length of a training and its batch.

    Attributes:
        steps: Inner steps.
        batch: Sequences of a step, over all ranks.
        eval_interval: Steps between evaluations; 0 is off.
        seed: Seed of weights and data.
    """

    steps: int
    batch: int
    eval_interval: int
    seed: int


def overrides(method: Method, sizes: Sizes, events: str) -> tuple[str, ...]:
    """Return all changes to the config of one run that writes its events to ``events``."""
    return (
        *method.changes,
        f"training.train_iters={sizes.steps}",
        f"inner.lr_warmup_iters={sizes.steps * 8 // 100}",  # as in the demo, 8 % of the steps
        f"training.global_batch_size={sizes.batch}",
        f"training.micro_batch_size={sizes.batch // RANKS}",
        f"training.eval_interval={sizes.eval_interval}",
        "training.eval_iters=16",  # 16 batches of 8 sequences are 32,768 tokens
        f"training.seed={sizes.seed}",
        f"data.seed={sizes.seed}",
        "checkpoint.dir=null",
        "checkpoint.save_interval=0",
        f"monitor.dir={events}",
        "monitor.log_interval=1",
        "monitor.sample_tokens=0",
    )
