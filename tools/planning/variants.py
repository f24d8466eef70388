"""The same run by other methods and with other exchanges: side by side, and the best in limits."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from pydantic import ValidationError

from megatron_muloco.config import RunConfig, check, topology_of
from megatron_muloco.config.inner import AdamWInner
from megatron_muloco.config.outer import NoOuter, interval_values
from megatron_muloco.errors import ConfigError
from megatron_muloco.planning.simulation import steady_share, trainer_rounds
from megatron_muloco.planning.timing import Rate, Rates, step_time
from megatron_muloco.scaling.table import read_table
from megatron_muloco.topology import Topology
from tools.planning.estimate import Estimate, estimate
from tools.scaling.advice import Exchange, nearest_published
from tools.scaling.evidence import rows_of
from tools.scaling.published import DIRECTORY

__all__ = [
    "Choice",
    "Method",
    "best_exchange",
    "changed",
    "fragments_that_hide",
    "methods",
    "warnings",
]

_INTERVAL = 30  # H of the MuLoCo paper, for configs without one
_FRAGMENT_LAYERS = 3  # Streaming DiLoCo (arXiv 2501.18512)
_OVERLAPS = (0, 1, 2, 5)  # no loss up to 5 there
_INTERVALS = (30, 60, 120, 240)  # with published losses; outer values were tuned at 30
_BITS = (32, 16, 8, 4, 2)


# ---- changed configs ----------------------------------------------------------------------------


def changed(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """Return the config with other values of dotted keys; unknown keys of a kind are dropped."""
    tree = config.model_dump(mode="json")
    for key, value in changes.items():
        *sections, name = key.split(".")
        place = tree
        for section in sections:
            place = place[section]
        place[name] = value
    return RunConfig.model_validate(tree)


def _inner(config: RunConfig, kind: str) -> dict[str, Any]:
    """Return the inner section of another kind, with what both have."""
    given = config.inner.model_dump(mode="json")
    if kind == config.inner.kind:
        return given
    shared = {name: given[name] for name in AdamWInner.model_fields if name in given}
    return {**shared, "kind": kind}


def _outer(config: RunConfig, exchange: Exchange, fragments: int) -> dict[str, Any]:
    """Return the outer section of a config with an exchange; the papers' lr and momentum."""
    outer = config.outer
    given: dict[str, Any] = {"kind": "nesterov", "lr": 0.9, "momentum": 0.9}
    if not isinstance(outer, NoOuter):
        given = outer.model_dump(mode="json")
    compression: dict[str, Any] = {"kind": "none"}
    if exchange.bits == 16:
        compression["wire_dtype"] = "bf16"
    elif exchange.bits < 16:
        compression = {"kind": "statistical", "bits": exchange.bits}
        compression["error_feedback"] = exchange.feedback
    return {
        **given,
        "sync_interval": exchange.interval,
        "fragments": {"count": fragments, "pattern": "strided"},
        "overlap_steps": exchange.overlap,
        "max_in_flight": max(1, fragments),
        "compression": compression,
        "apply": "mix",
        "mixing_weight": None,
    }


def fragments_of(config: RunConfig) -> int:
    """Return the number of fragments of three layers."""
    return max(1, config.model.num_layers // _FRAGMENT_LAYERS)


# ---- methods side by side -----------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """One method for the same model, tokens and GPUs.

    Attributes:
        name: Its name.
        estimate: Its estimate; ``None`` where the rules refuse it.
        why: Why they do.
    """

    name: str
    estimate: Estimate | None
    why: str = ""


def methods(base: Estimate, sites: int) -> list[Method]:
    """Return the methods side by side, with one site for each replica.

    Args:
        base: Estimate of the config.
        sites: Replicas of the methods that have them, and sites of data parallelism.
    """
    config, interval = base.config, base.interval if base.bits else _INTERVAL
    plain, small = Exchange(32, interval), Exchange(4, interval, min(5, max(0, interval - 1)))
    pieces = min(fragments_of(config), interval)
    described: list[tuple[str, str, Exchange | None, int, bool]] = [
        ("AdamW data parallel", "adamw", None, 1, False),
        ("Muon data parallel", "muon", None, 1, False),
        ("AdamW DP, hierarchical", "adamw", None, 1, True),
        ("Muon DP, hierarchical", "muon", None, 1, True),
        (f"DiLoCo, H = {interval}", "adamw", plain, 1, False),
        (f"MuLoCo, H = {interval}", "muon", plain, 1, False),
        (f"MuLoCo, 4 bits, H = {interval}", "muon", Exchange(4, interval), 1, False),
        (f"streaming MuLoCo, 4 bits, P = {pieces}, tau = {small.overlap}", "muon", small, pieces,
         False),
    ]  # fmt: skip
    return [
        _method(base, name, kind, exchange, fragments, sites, hierarchical=hierarchical)
        for name, kind, exchange, fragments, hierarchical in described
    ]


def _method(
    base: Estimate,
    name: str,
    kind: str,
    exchange: Exchange | None,
    fragments: int,
    sites: int,
    *,
    hierarchical: bool,
) -> Method:
    config = base.config
    replicas = 1 if exchange is None else sites
    outer = {"kind": "none"} if exchange is None else _outer(config, exchange, fragments)
    changes = {
        "inner": _inner(config, kind),
        "outer": outer,
        "parallel.num_replicas": replicas,
    }
    try:
        other, topology = _checked(config, changes, base.topology.world_size)
    except ConfigError as error:
        return Method(name, None, error.problems[0])
    rates = _without_step(base)
    found = estimate(other, topology, rates, sites=sites, hierarchical=hierarchical)
    return Method(name, found)


def _without_step(base: Estimate) -> Rates:
    """Return rates that give the estimate's step by an mfu, for steps of another method."""
    rates = base.rates
    if rates.step is None:
        return rates
    computed = step_time(base.config, base.topology, replace(rates, step=None)).seconds
    mfu = rates.mfu.value * computed / rates.step.value
    return replace(rates, step=None, mfu=Rate(mfu, f"from the step {rates.step.origin}"))


def _checked(
    config: RunConfig, changes: Mapping[str, Any], world: int
) -> tuple[RunConfig, Topology]:
    """Return a changed config and its topology.

    Raises:
        ConfigError: The schema or the rules refuse it.
    """
    try:
        other = changed(config, changes)
    except ValidationError as error:
        raise ConfigError(str(error.errors()[0]["msg"])) from error
    topology = topology_of(other, world)
    check(other, topology)
    return other, topology


# ---- the best exchange --------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """An exchange within the limits.

    Attributes:
        exchange: Bits, H and tau.
        fragments: P.
        share: Share of a round that computes.
        penalty: Published percent of loss above fp32 at H = 30.
    """

    exchange: Exchange
    fragments: int
    share: float
    penalty: float


def best_exchange(base: Estimate, share: float, most_loss: float) -> tuple[bool, Choice | None]:
    """Return whether an exchange is within the limits, and that of least published loss.

    Among equal losses the one with the fewest overlap steps and fragments. Without one within the
    limits, it is the one of most share among those with at most that loss.

    Args:
        base: Estimate of a run with replicas.
        share: Least share of a round that has to compute.
        most_loss: Most percent of published loss above fp32 at H = 30.
    """
    method = "muloco" if base.config.inner.kind == "muon" else "diloco"
    pieces, t = dict.fromkeys((1, fragments_of(base.config))), base.step.seconds
    sent: dict[tuple[int, int], tuple[float, ...] | None] = {}
    exchanges = [Exchange(bits, interval) for bits in _BITS for interval in _INTERVALS]
    found: list[Choice] = []
    for exchange in sorted(exchanges, key=lambda e: (e.penalty(method), e.interval, -e.bits)):
        if (penalty := exchange.penalty(method)) > most_loss:
            break
        for overlap, count in product(_OVERLAPS, pieces):
            if count > exchange.interval:
                continue
            key = (exchange.bits, count)
            if key not in sent:
                sent[key] = _sent_bits(base, exchange, count)
            if bits := sent[key]:
                rounds = trainer_rounds(exchange.interval, bits, overlap, t)
                taken = replace(exchange, overlap=overlap)
                found.append(
                    Choice(taken, count, steady_share(rounds, base.rates.payload), penalty)
                )
                if found[-1].share >= share:
                    return True, found[-1]
    return False, max(found, key=lambda c: c.share, default=None)


def _sent_bits(base: Estimate, exchange: Exchange, fragments: int) -> tuple[float, ...] | None:
    """Return the bits of each fragment; ``None`` where the rules refuse the exchange."""
    outer = _outer(base.config, exchange, fragments)
    try:
        other, topology = _checked(base.config, {"outer": outer}, base.topology.world_size)
    except ConfigError:
        return None
    return estimate(other, topology, base.rates).bits


def fragments_that_hide(base: Estimate, most_overlap: int = 5) -> list[tuple[int, int | None]]:
    """Return for some numbers of fragments the fewest tau that hides the exchange.

    Fragments are counted as equal, in the bits of the config's exchange.

    Args:
        base: Estimate of a run with replicas.
        most_overlap: tau up to which the papers found no loss.
    """
    found = []
    total = sum(base.bits)
    numbers = [n for n in (1, 2, 3, 6, 9, 18, 27) if n <= base.config.model.num_layers]
    for count in dict.fromkeys([n for n in numbers if n <= base.interval]):
        equal = replace(base, bits=(total / count,) * count)
        found.append((count, equal.hiding_overlap()))
        if found[-1][1] is not None and found[-1][1] <= most_overlap:
            break
    return found


# ---- warnings -----------------------------------------------------------------------------------


def warnings(base: Estimate) -> list[str]:
    """Return what is likely not meant: outer values of another K, few rounds, a flush, saves."""
    return [*_outer_values(base), *_round_warnings(base), *_save_warnings(base)]


def _outer_values(base: Estimate) -> Iterator[str]:
    outer, replicas = base.config.outer, base.topology.num_replicas
    if isinstance(outer, NoOuter):
        return
    method = "muloco" if base.config.inner.kind == "muon" else "diloco"
    rows = [r for r in rows_of(read_table(DIRECTORY / "muloco_outer.csv")) if r["method"] == method]
    pair = (outer.lr, outer.momentum)
    own = nearest_published(replicas)
    for row in rows:
        if not row["outer_lr"] or (float(row["outer_lr"]), float(row["outer_momentum"])) != pair:
            continue
        published = int(row["replicas"])
        if published != own and max(published / replicas, replicas / published) > 2:
            yield (
                f"outer.lr {outer.lr:g} and outer.momentum {outer.momentum:g} are the published "
                f"values for K = {published}; this run has K = {replicas}"
            )


def _round_warnings(base: Estimate) -> Iterator[str]:
    outer, derived = base.config.outer, base.derived
    if isinstance(outer, NoOuter):
        return
    momentum = outer.momentum
    if isinstance(momentum, int | float) and momentum and derived.rounds * (1 - momentum) < 10:
        yield (
            f"{derived.rounds:,} rounds are few for outer.momentum {momentum:g}, which averages "
            f"over about {1 / (1 - momentum):.0f}; take a lower momentum or a shorter H"
        )
    if derived.flushed_steps:
        lengths = interval_values(outer.sync_interval)
        yield (
            f"{derived.flushed_steps} inner steps follow the last round of {lengths[-1]}; they end "
            "in a plain mean without an outer step. Choose training.train_iters as a multiple of "
            "outer.sync_interval"
        )


def _save_warnings(base: Estimate) -> Iterator[str]:
    interval, failures = base.config.checkpoint.save_interval, base.failures
    if failures.goodput_at is None or base.config.checkpoint.dir is None:
        return
    if failures.goodput_at < failures.goodput - 0.02:
        steps = failures.daly / (base.train_seconds / base.derived.train_iters)
        yield (
            f"checkpoint.save_interval {interval:,} gives a goodput of {failures.goodput_at:.1%}; "
            f"about {max(1, round(steps)):,} steps give {failures.goodput:.1%}"
        )
