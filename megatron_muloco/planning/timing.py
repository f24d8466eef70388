"""Time of a run in closed form: steps, exchanges, rounds, checkpoints, failures.

Rates are assumptions until somebody measures them, so each has an origin that a plan prints. The
*mfu* here is the share of a GPU's peak while it computes forward and backward, with communication
inside a replica. Pipeline bubble, uneven stages and Newton-Schulz come on top; `StepTime` has the
utilisation that results.

Letters: H inner steps of a round, t seconds of a step, b bits of an exchange, W bits per second,
x = b / W. A blocking exchange leaves the share ``H t / (H t + x)`` of a round to compute, so a
share u needs ``W = b u / (H t (1 - u))``. One that has tau steps to arrive is exposed for
``max(0, x - tau t)``, as long as the next one does not have to wait for the link.

Sources: wall-clock of the DiLoCo scaling-law paper (arXiv 2503.09799, appendix A); checkpoints of
Young (1974) and Daly (2006).
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron_muloco.config.derived import derive, parameter_counts
from megatron_muloco.config.inner import MuonInner
from megatron_muloco.config.schema import RunConfig
from megatron_muloco.errors import ConfigError
from megatron_muloco.model.flops import flops_per_token
from megatron_muloco.optim.parameter_table import assign
from megatron_muloco.planning.layout import BYTES, stage_flops, stage_matrices
from megatron_muloco.planning.traffic import planned_on_accelerator
from megatron_muloco.topology import Topology

__all__ = [
    "BACKWARD_SHARE",
    "LINKS",
    "Failures",
    "Rate",
    "Rates",
    "StepTime",
    "blocking_share",
    "data_parallel_bits",
    "exposed_seconds",
    "failures",
    "ideal_seconds",
    "link_rate",
    "rate_for_share",
    "smallest_rate",
    "step_time",
]

BACKWARD_SHARE = 2 / 3
"""Share of a step's FLOPs that backward has: of three products forward has one."""


# ------------------------------------------------------------------------------------------
# Rates.


LINKS: Mapping[str, float] = {
    "1gbe": 1e9,
    "10gbe": 10e9,
    "25gbe": 25e9,
    "100gbe": 100e9,
    "hdr": 200e9,
    "400gbe": 400e9,
    "ndr": 400e9,
    "xdr": 800e9,
}
"""Bits per second of one port, by name: Ethernet and InfiniBand."""

_UNITS = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def link_rate(text: str) -> float:
    """Return the rate of a link in bits per second: ``10Gbit``, ``800Mbit/s``, or a name.

    Raises:
        ConfigError: There is no such unit or name; bytes are refused because they are so easily
            meant.
    """
    if text.strip().lower() in LINKS:
        return LINKS[text.strip().lower()]
    match = re.fullmatch(r"([\d.]+(?:e\d+)?)\s*([kMGT])bit(?:/s|ps)?", text.strip())
    try:
        rate = float(match[1]) * _UNITS[match[2]] if match else 0.0
    except ValueError:
        rate = 0.0
    if rate <= 0:
        raise ConfigError(
            f"--link {text} is no rate; write bits per second with their unit, such as 10Gbit or "
            f"800Mbit, or one of {', '.join(LINKS)}. A byte is 8 bits: 1 GB/s is 8Gbit."
        )
    return rate


@dataclass(frozen=True, slots=True)
class Rate:
    """A rate and where it comes from.

    Attributes:
        value: The number.
        origin: ``given``, ``assumed``, ``measured in ...``, or a source.
    """

    value: float
    origin: str


@dataclass(frozen=True, slots=True)
class Rates:
    """Rates of a machine.

    Attributes:
        flops: Peak of one GPU, FLOP/s.
        mfu: Share of it while forward and backward compute.
        link: Bits per second between a replica and the others, in each direction.
        efficiency: Share of the link's rate that payload reaches.
        writing: Bytes per second at which all ranks together write a checkpoint.
        mtbf: Seconds between failures of one GPU, with its share of node and network.
        restart: Seconds from a failure to the next step.
        step: Seconds of an inner step, where it was measured; ``None`` computes it from FLOPs.
    """

    flops: Rate
    mfu: Rate
    link: Rate
    efficiency: Rate
    writing: Rate
    mtbf: Rate
    restart: Rate
    step: Rate | None = None

    @property
    def payload(self) -> float:
        """Bits per second of payload between a replica and the others."""
        return self.link.value * self.efficiency.value


# ------------------------------------------------------------------------------------------
# An inner step.


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of an inner step, without outer steps.

    Attributes:
        compute: Forward and backward of all microbatches, as if stages had equal work.
        imbalance: More of it on the stage with the most work.
        bubble: Waiting for the first and after the last microbatch of the pipeline.
        newton_schulz: Newton-Schulz on the rank with the most of it.
        utilisation: Model FLOPs over the peak of all GPUs in this time; ``None`` where the peak is
            not known.
    """

    compute: float
    imbalance: float
    bubble: float
    newton_schulz: float
    utilisation: float | None

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.compute + self.imbalance + self.bubble + self.newton_schulz


def step_time(config: RunConfig, topology: Topology, rates: Rates) -> StepTime:
    """Return the time of an inner step.

    1F1B: with m microbatches and P stages, a step takes ``(m + P - 1)`` times a microbatch on the
    fullest stage. A measured step is divided in the same proportions.
    """
    tokens = config.training.micro_batch_size * config.model.seq_length
    speed = rates.flops.value * rates.mfu.value
    flops = stage_flops(config, topology)
    ranks = topology.tensor * topology.context
    slowest, mean = (
        part * tokens / (ranks * speed) for part in (max(flops), sum(flops) / len(flops))
    )
    microbatches = derive(config, topology).num_microbatches
    parts = (
        microbatches * mean,
        microbatches * (slowest - mean),
        (topology.pipeline - 1) * slowest,
        _newton_schulz_flops(config, topology) / speed,
    )
    scale = rates.step.value / sum(parts) if rates.step else 1.0
    seconds = scale * sum(parts)
    model = flops_per_token(config.model).total * derive(config, topology).tokens_per_step
    peak = topology.world_size * rates.flops.value
    known = planned_on_accelerator(config)
    compute, imbalance, bubble, newton_schulz = (scale * part for part in parts)
    return StepTime(
        compute,
        imbalance,
        bubble,
        newton_schulz,
        utilisation=model / (seconds * peak) if known else None,
    )


def _newton_schulz_flops(config: RunConfig, topology: Topology) -> int:
    """Return the Newton-Schulz FLOPs of a step on the rank with the most; 0 with AdamW."""
    if not isinstance(config.inner, MuonInner):
        return 0
    accelerator, most = planned_on_accelerator(config), 0
    for stage in range(topology.pipeline):
        matrices = stage_matrices(config, topology, stage=stage, accelerator=accelerator)
        most = max(most, *assign(matrices, topology.stage_size).loads)
    return most


# ------------------------------------------------------------------------------------------
# Exchanges.


def blocking_share(steps: int, step_seconds: float, exchange_seconds: float) -> float:
    """Return the share of a round that computes where training waits for the exchange."""
    return steps * step_seconds / (steps * step_seconds + exchange_seconds)


def exposed_seconds(exchange_seconds: float, overlap_steps: int, step_seconds: float) -> float:
    """Return what tau steps do not hide of one exchange that does not wait for another."""
    return max(0.0, exchange_seconds - overlap_steps * step_seconds)


def rate_for_share(share: float, bits: float, steps: int, step_seconds: float) -> float:
    """Return the bits per second at which a blocking exchange leaves a share to compute."""
    return bits * share / (steps * step_seconds * (1 - share))


def ideal_seconds(
    steps: int, step_seconds: float, bits: float, rate: float, interval: int = 1
) -> float:
    """Return the seconds of a run whose exchange of ``bits`` after ``interval`` steps blocks.

    The wall-clock of both papers: compute and communication add up.
    """
    return steps * (step_seconds + bits / rate / interval)


def data_parallel_bits(
    config: RunConfig, topology: Topology, sites: int, *, hierarchical: bool
) -> tuple[float, float]:
    """Return the bits that one site sends in a data-parallel step, gradients and parameters.

    Gradients are reduced in the accumulation dtype and parameters gathered in the precision of the
    forward pass. In rings over all R data-parallel ranks, one rank of a site sends to the next site
    ``(R - 1) / R`` of each. Hierarchically, ranks reduce inside their site first, and only sums of
    sites cross the link: ``(S - 1) / S`` of each for S sites.

    Returns:
        Bits of gradients and bits of parameters.
    """
    numel = parameter_counts(config.model).total
    members = sites if hierarchical else topology.sharding * topology.num_replicas
    share = 8 * numel * (members - 1) / members
    training = config.training
    return share * BYTES[training.accumulate_dtype], share * BYTES[training.precision]


# ------------------------------------------------------------------------------------------
# Failures.


@dataclass(frozen=True, slots=True)
class Failures:
    """Checkpoints and failures of a job in which one failure stops all ranks.

    Attributes:
        mtbf: Seconds between failures of the job.
        young: Young's interval between checkpoints, in seconds of training.
        daly: Daly's, of higher order.
        goodput: Share of the time that trains, with Daly's interval.
        goodput_at: The same with the config's interval; ``None`` where it has none.
    """

    mtbf: float
    young: float
    daly: float
    goodput: float
    goodput_at: float | None


def failures(
    ranks: int, rates: Rates, held_seconds: float, interval_seconds: float | None
) -> Failures:
    """Return what failures cost, after Daly's complete model.

    With failures at random at a mean distance M, checkpoints that hold training for d seconds and
    restarts of R seconds, T seconds of training between two checkpoints take
    ``M exp(R / M) (exp((T + d) / M) - 1)`` seconds.

    Args:
        ranks: GPUs of the job.
        rates: Mean time between failures of a GPU, and restart.
        held_seconds: Seconds for which a checkpoint holds training.
        interval_seconds: Seconds of training between the config's checkpoints.
    """
    mean = rates.mtbf.value / ranks
    young = math.sqrt(2 * held_seconds * mean)
    if held_seconds < 2 * mean:
        root = math.sqrt(held_seconds / (2 * mean))
        daly = young * (1 + root / 3 + root**2 / 9) - held_seconds
    else:
        daly = mean

    def goodput(interval: float) -> float:
        exponent = (interval + held_seconds + rates.restart.value) / mean
        if exponent > 700:  # exp would overflow; nothing is trained
            return 0.0
        lost = math.exp(rates.restart.value / mean)
        return interval / (mean * lost * math.expm1((interval + held_seconds) / mean))

    at = goodput(interval_seconds) if interval_seconds else None
    return Failures(mean, young, daly, goodput(max(daly, 1e-9)), at)


# ------------------------------------------------------------------------------------------
# Searching.


def smallest_rate(share: float, share_at: Callable[[float], float]) -> float | None:
    """Return the least rate at which a share is reached, to 0.1 %; ``None`` up to 1 Ebit/s.

    Args:
        share: Share of the time that computes, below 1.
        share_at: The share at a rate in bits per second; does not fall as the rate rises.
    """
    low, high = 1.0, 1e18
    if share_at(high) < share:
        return None
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if share_at(middle) >= share else (middle, high)
    return high
