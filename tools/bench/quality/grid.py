"""Grid of the campaign: the variants that run, and the comparisons between them.

Every variant is `small.yaml` with a few keys replaced; a seed sets the initial weights and the
order of samples. Runs of the same seed are paired: they start from the same weights and read the
same samples in the same order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from megatron_muloco.errors import ConfigError

INTERVALS = (15, 30, 60, 120)
"""H of the sweep: around the papers' 30, each the double of the one before."""

METHODS = {"muloco": (), "diloco": ("inner.kind=adamw", "inner.lr=0.08")}
"""Method -> keys. Learning rates come from the short sweep in docs/experiments/LOG.md."""

PLAIN = "plain"
"""MuLoCo with one fragment, waiting, fp32 on the wire: the baseline."""

# Four rounds of H = 120. With two, the momentum of the first round, whose inner steps are the
# largest, is still carrying the anchor past its goal when the run ends (docs/experiments/LOG.md).
_LONGER = ("training.train_iters=480", "training.eval_interval=480")

BLOCKING = "fragments-3"
"""The same in three fragments, waiting: the baseline of overlap."""

_THREE = ("outer.fragments.count=3",)
# Half of the ten steps between two launches (H = 30, three fragments): 0 < tau < 10.
_OVERLAP = (*_THREE, "outer.overlap_steps=5")


class Rule(Enum):
    """Claim of a comparison about a variant's loss relative to its baseline's."""

    EQUAL = "equal"
    NO_WORSE = "no worse"
    BETTER = "better"
    SHOWN = "-"


@dataclass(frozen=True)
class Comparison:
    """A variant, its baseline, and the claim.

    Attributes:
        variant: What is compared.
        baseline: With what.
        rule: Claim about the losses.
        seeds: Number of paired seeds that the comparison needs, from 1 on.
    """

    variant: str
    baseline: str
    rule: Rule
    seeds: int = 3


def _compressed(
    kind: str, bits: int, *, feedback: bool = True, bins: str | None = None
) -> tuple[str, ...]:
    keys = f"kind: {kind}, bits: {bits}, granularity: tensor, error_feedback: {feedback!s}"
    rule = f", bins: {bins}" if bins else ""
    return (f"outer.compression={{{keys.lower()}{rule}}}",)


def _with_intervals() -> dict[str, tuple[str, ...]]:
    return {
        f"{method}-h{interval}": (*keys, f"outer.sync_interval={interval}", *_LONGER)
        for interval in (15, 120, 30, 60)  # those that decide most come first
        for method, keys in METHODS.items()
    }


VARIANTS: dict[str, tuple[str, ...]] = {
    PLAIN: ("outer.sync_interval=30",),
    BLOCKING: _THREE,
    "overlap-mix": (*_OVERLAP, "outer.mixing_weight=0.5"),
    "overlap-additive": (*_OVERLAP, "outer.apply=additive"),
    "linear-4": _compressed("linear", 4),
    "statistical-4": _compressed("statistical", 4),
    "statistical-2": _compressed("statistical", 2),
    "linear-2": _compressed("linear", 2),
    "linear-2-without": _compressed("linear", 2, feedback=False),
    "statistical-2-without": _compressed("statistical", 2, feedback=False),
    **{
        f"{rule}-2{'' if feedback else '-without'}": _compressed(
            "statistical", 2, feedback=feedback, bins=rule
        )
        for rule in ("centred", "edged")
        for feedback in (True, False)
    },
    "low-bandwidth": (*_OVERLAP, "outer.mixing_weight=0.5", *_compressed("statistical", 2)),
    **_with_intervals(),
}
"""Name -> keys replaced in `small.yaml`, in the order in which they are run.

``-2`` and ``-4`` are bits, with error feedback unless ``-without``; ``centred`` and ``edged`` are
rules for the bins of kind statistical, whose default chooses those of least error.
``low-bandwidth`` is everything at once: two bits with error feedback, three fragments, overlap with
mixing. ``-h`` is the length of a round in the sweep, whose runs are longer.
"""

# With two bits, values that cross an edge change the course of a run, and differences vary by
# several percent from seed to seed: with three seeds, the interval of statistical-2 against
# linear-2 was -14.8 to +0.6 %. That is more than rules for bins differ.
_TWO_BIT_SEEDS = 8


def _two_bits(variant: str, baseline: str, rule: Rule = Rule.SHOWN) -> Comparison:
    return Comparison(variant, baseline, rule, _TWO_BIT_SEEDS)


COMPARISONS = (
    Comparison("linear-4", PLAIN, Rule.EQUAL),
    Comparison("statistical-4", PLAIN, Rule.EQUAL),
    _two_bits("statistical-2", "linear-2", Rule.BETTER),
    _two_bits("statistical-2", "linear-2-without"),
    _two_bits("statistical-2-without", "linear-2-without"),
    _two_bits("statistical-2", "statistical-2-without"),
    _two_bits("statistical-2", "centred-2"),
    _two_bits("statistical-2", "edged-2"),
    _two_bits("statistical-2-without", "centred-2-without"),
    _two_bits("statistical-2-without", "edged-2-without"),
    _two_bits("centred-2-without", "edged-2-without"),
    _two_bits("linear-2", "linear-2-without"),
    _two_bits("statistical-2", PLAIN),
    _two_bits("linear-2", PLAIN),
    Comparison(BLOCKING, PLAIN, Rule.EQUAL),
    Comparison("overlap-mix", BLOCKING, Rule.NO_WORSE),
    Comparison("overlap-additive", BLOCKING, Rule.NO_WORSE),
    Comparison("overlap-mix", PLAIN, Rule.SHOWN),
    Comparison("overlap-additive", PLAIN, Rule.SHOWN),
    _two_bits("low-bandwidth", PLAIN),
)

_SWEEP_SEEDS = 3


def seeds_of(variant: str) -> range:
    """Return the seeds of a variant: as many as the comparisons that it is in need."""
    needed = [pair.seeds for pair in COMPARISONS if variant in (pair.variant, pair.baseline)]
    return range(1, max(needed, default=_SWEEP_SEEDS) + 1)


def chosen_variants(names: Sequence[str], only: str) -> dict[str, tuple[str, ...]]:
    """Return the variants named (all if none is), of these those with ``only`` in the name.

    Raises:
        ConfigError: A name is no variant, or nothing is left.
    """
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise ConfigError(
            f"--variants: {', '.join(unknown)} unknown. There are {', '.join(VARIANTS)}."
        )
    kept = {name: VARIANTS[name] for name in names or VARIANTS if only in name}
    if not kept:
        raise ConfigError(f"--only: no variant has {only!r} in its name.")
    return kept
