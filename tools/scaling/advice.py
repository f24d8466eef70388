"""What to take for a size, K and link: shape, layout, and how replicas exchange.

*Shape.* The MuLoCo models are one family: heads of 128 (from 12 on, their number is a multiple of
4), layers = 1.5 x heads, MLP = 2.75 x width, vocabulary 128,256, untied. `shape_near` returns the
member nearest to a size.

*Exchange.* `LADDER` lists exchanges in the order in which they are tried. Each sends no more bytes
per inner step than the one before, and its published loss is higher or equal within the reading of
the figures. `choose_exchange` takes the first whose exposed time leaves a given share of a round
to compute, so a link with less bandwidth never gets more bytes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

from megatron_muloco.config import RunConfig, find_problems, topology_of
from megatron_muloco.errors import ConfigError
from megatron_muloco.model.flops import flops_per_token
from megatron_muloco.planning import memory_plan, traffic_plan
from megatron_muloco.planning.timing import blocking_share, exposed_seconds
from megatron_muloco.scaling.table import read_table
from tools.scaling.evidence import rows_of
from tools.scaling.labelled import Value
from tools.scaling.published import DIRECTORY

__all__ = [
    "LADDER", "Exchange", "Machine", "Round", "Shape", "choose_exchange",
    "fitting_layout", "interval_label", "loss_table", "nearest_published", "round_of", "shape_near",
]  # fmt: skip

# Smallest first; of equal ones that with less tensor parallelism, whose messages are the larger.
_LAYOUTS = sorted(product((1, 2, 4, 8), (1, 2, 3, 4, 6, 8, 9, 12)), key=lambda x: (math.prod(x), x))
_OVERLAP = 5  # steps; Streaming DiLoCo (arXiv 2501.18512): no loss up to here


@dataclass(frozen=True)
class Shape:
    """A member of the MuLoCo family, by its heads."""

    heads: int

    @property
    def layers(self) -> int:
        """1.5 for each head."""
        return 3 * self.heads // 2

    @property
    def width(self) -> int:
        """128 for each head."""
        return 128 * self.heads

    @property
    def ffn(self) -> int:
        """2.75 x the width."""
        return 11 * self.width // 4

    @property
    def params(self) -> int:
        """Parameters, embeddings included."""
        matrices = 4 * self.width**2 + 3 * self.width * self.ffn
        norms = 4 * self.width + 2 * 128
        return 2 * 128256 * self.width + self.layers * (matrices + norms) + self.width


@dataclass(frozen=True)
class Machine:
    """What the run has.

    Attributes:
        gpus: Ranks of all replicas.
        link: Bits per second between each replica and the others.
        flops: Of one GPU at its peak, per second.
        utilisation: Share of the peak that a step reaches; assumed.
        memory: Bytes of one GPU.
    """

    gpus: int
    link: float
    flops: float
    utilisation: float
    memory: float


@dataclass(frozen=True)
class Exchange:
    """How replicas exchange pseudogradients.

    Attributes:
        bits: Bits per value on the network; 32 is fp32 and 16 is bf16.
        interval: H.
        overlap: Steps of compute between launch and apply.
    """

    bits: int
    interval: int = 30
    overlap: int = 0

    @property
    def feedback(self) -> bool:
        """Error feedback; the published losses are lower with it at 2 bits alone."""
        return self.bits == 2

    @property
    def name(self) -> str:
        """In words."""
        codec = {32: "fp32", 16: "bf16"}.get(self.bits, f"statistical, {self.bits} bits")
        waits = f", {self.overlap} steps of overlap" if self.overlap else ""
        return f"{codec}{' with error feedback' * self.feedback}, H = {self.interval}{waits}"

    def penalty(self, method: str) -> float:
        """Return the published percent of loss above fp32 at H = 30; overlap is counted as 0."""
        return _codec_penalty(method, self.bits, self.feedback) + _interval_penalty(
            method, self.interval
        )

    def values(self, method: str, reason: str) -> list[Value]:
        """Return its config keys; H is a key of the method's values."""
        codec = _codec_penalty(method, self.bits, self.feedback)
        found = []
        if self.overlap:
            words = (
                "paper: arXiv 2501.18512, no loss up to 5 steps, there with fragments of 3 layers"
            )
            found.append(Value("outer.overlap_steps", self.overlap, words))
        key = "outer.compression"
        if self.bits == 32:
            return [Value(f"{key}.kind", "none", f"rule: {reason}"), *found]
        if self.bits == 16:
            words = f"rule: {reason}; finer than 8 bits, which cost nothing that was measured"
            return [Value(f"{key}.wire_dtype", "bf16", words), *found]
        words = f"paper: {codec:+.2f} % of loss at 416M, K = 8 (read to +-0.15)"
        return [
            Value(f"{key}.kind", "statistical", words),
            Value(f"{key}.bits", self.bits, f"rule: {reason}"),
            Value(f"{key}.error_feedback", self.feedback, _feedback_label(method, self.bits)),
            *found,
        ]


LADDER = (
    Exchange(32),
    Exchange(16),
    Exchange(8),
    Exchange(4),
    Exchange(4, overlap=_OVERLAP),
    Exchange(4, interval=60, overlap=_OVERLAP),
    Exchange(2, interval=60, overlap=_OVERLAP),
    Exchange(2, interval=120, overlap=_OVERLAP),
    Exchange(2, interval=240, overlap=_OVERLAP),
)


@dataclass(frozen=True)
class Round:
    """Time and bytes of a round.

    Attributes:
        exchange: How replicas exchange.
        step_seconds: Compute of one inner step.
        sent: Bytes of the replica that sends most.
        exchange_seconds: ``sent`` at the link's rate.
    """

    exchange: Exchange
    step_seconds: float
    sent: int
    exchange_seconds: float

    @property
    def compute_seconds(self) -> float:
        """Compute of the round."""
        return self.exchange.interval * self.step_seconds

    @property
    def exposed_seconds(self) -> float:
        """What the steps between launch and apply do not hide, as if in a single launch."""
        return exposed_seconds(self.exchange_seconds, self.exchange.overlap, self.step_seconds)

    @property
    def share(self) -> float:
        """Compute over compute and exposed communication."""
        return blocking_share(self.exchange.interval, self.step_seconds, self.exposed_seconds)


def round_of(exchange: Exchange, config: RunConfig, machine: Machine) -> Round:
    """Return the time and bytes of a round of a checked config that has this exchange."""
    topology = topology_of(config, machine.gpus)
    tokens = config.training.global_batch_size * config.model.seq_length
    needed = flops_per_token(config.model).total * tokens
    step = needed / (machine.gpus * machine.flops * machine.utilisation)
    sent = traffic_plan(config, topology).outer_per_replica
    return Round(exchange, step, sent, 8 * sent / machine.link)


def choose_exchange(
    plan: Callable[[Exchange], Round], share: float, ladder: Sequence[Exchange] = LADDER
) -> tuple[Round, list[Round]]:
    """Return the first exchange that leaves a share of the round to compute, and those tried.

    Where none does, it is the last.
    """
    tried = []
    for exchange in ladder:
        tried.append(plan(exchange))
        if tried[-1].share >= share:
            break
    return tried[-1], tried


def shape_near(params: float) -> Shape:
    """Return the shape whose size is nearest in ratio.

    Raises:
        ConfigError: The family has no member near it.
    """
    shapes = [Shape(heads) for heads in (*range(2, 12, 2), *range(12, 81, 4))]
    nearest = min(shapes, key=lambda shape: abs(math.log(shape.params / params)))
    if abs(math.log(nearest.params / params)) > math.log(1.5):
        smallest, largest = shapes[0].params, shapes[-1].params
        raise ConfigError(
            f"--params {params:g}: the family has models from {smallest / 1e6:.0f}M to "
            f"{largest / 1e9:.0f}B parameters, embeddings of 128,256 words included; published "
            f"values are from 150M to 15B. Take a size in between."
        )
    return nearest


def fitting_layout(
    load: Callable[[int, int], RunConfig], machine: Machine, replicas: int, heads: int, layers: int
) -> tuple[int, int]:
    """Return tp and pp of the smallest layout whose plan fits 60 % of a GPU's memory.

    The rest is for activations, which the plan does not count.

    Raises:
        ConfigError: None fits.
    """
    each = machine.gpus // replicas
    least = math.inf
    for tensor, pipeline in _LAYOUTS:
        if each % (tensor * pipeline) or heads % tensor or layers % pipeline:
            continue
        config = load(tensor, pipeline)
        topology = topology_of(config, machine.gpus)
        if find_problems(config, topology):
            continue
        needed = memory_plan(config, topology).device
        least = min(least, needed)
        if needed <= 0.6 * machine.memory:
            return tensor, pipeline
    raise ConfigError(
        f"the model does not fit: its state needs at least {least / 1e9:.0f} GB per rank with "
        f"{each} GPUs in each replica, and 60 % of {machine.memory / 1e9:.0f} GB are for it. Use "
        f"more GPUs in each replica, or a smaller model."
    )


# ---- published losses ---------------------------------------------------------------------------


def loss_table(params: float, replicas: int) -> tuple[str, dict[str, float]]:
    """Return the nearest published size, and the loss of each method there at the nearest K."""
    rows = rows_of(read_table(DIRECTORY / "muloco_losses.csv"))
    size = min(rows, key=lambda row: abs(math.log(float(row["params"]) / params)))["size"]
    near = nearest_published(replicas)
    return size, {
        row["series"]: float(row["loss"])
        for row in rows
        if row["size"] == size and int(row["replicas"]) in (near, 1)
    }


def nearest_published(replicas: int) -> int:
    """Return the K of the figures that is nearest on a logarithmic scale."""
    return min((1, 2, 4, 8, 16), key=lambda k: abs(math.log2(k / replicas)))


def interval_label(method: str, interval: int) -> str:
    """Return the label of H."""
    if interval == 30:
        return "paper: code, all scaling experiments"
    return (
        f"paper: {_interval_penalty(method, interval):+.2f} points of loss over H = 30 (size and K "
        f"not printed); outer lr and momentum were tuned at 30"
    )


def _codec_penalty(method: str, bits: int, feedback: bool) -> float:
    """Return the published percent of loss above fp32; 0 for bf16, which was not published."""
    rows = [
        r
        for r in rows_of(read_table(DIRECTORY / "muloco_compression.csv"))
        if r["method"] == method
    ]
    exact = next(float(row["loss"]) for row in rows if row["kind"] == "none")
    words = ("statistical", str(bits), str(feedback).lower())
    for row in rows:
        if (row["kind"], row["bits"], row["error_feedback"]) == words:
            return 100 * (float(row["loss"]) / exact - 1)
    return 0.0


def _interval_penalty(method: str, interval: int) -> float:
    rows = rows_of(read_table(DIRECTORY / "muloco_sync_interval.csv"))
    above = {
        int(row["sync_interval"]): float(row["loss_increase_percent"])
        for row in rows
        if row["method"] == method
    }
    return above[interval] - above[30]


def _feedback_label(method: str, bits: int) -> str:
    with_it, without = (_codec_penalty(method, bits, on) for on in (True, False))
    return f"paper: {with_it:+.2f} % with it and {without:+.2f} % without, at 416M, K = 8"
