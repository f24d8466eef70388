"""Config files in which every value has a label that says where it comes from.

A label begins with its kind:

- ``paper``: printed by a paper, or in its authors' code or summary;
- ``measured``: the best of the runs of a study at this size;
- ``fitted``: a law at the target, with its interval, or ``interval unknown`` where the points do
  not give one;
- ``rule``: follows from other values;
- ``target``: asked for;
- ``chosen``: ours.
"""

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_muloco.errors import ConfigError

__all__ = [
    "KINDS", "METHODS", "SEQ_LENGTH", "Prediction", "Target", "Value", "config_text", "lr_step",
    "power_of_two",
]  # fmt: skip

KINDS = ("paper", "measured", "fitted", "rule", "target", "chosen")
SEQ_LENGTH = 2048  # configs/paper.yaml

METHODS = {"muloco": "muon", "diloco": "adamw", "dp_muon": "muon", "dp_adamw": "adamw"}  # inner

_COMMENT_COLUMN, _WIDTH = 37, 100


@dataclass(frozen=True)
class Target:
    """A run to configure.

    Attributes:
        name: Name of the size, for file names and comments.
        params: Parameters, embeddings included, as the MuLoCo paper counts.
        tokens: Training tokens.
        method: ``muloco``, ``diloco``, ``dp_muon`` or ``dp_adamw``.
        replicas: K; 1 for data parallelism.
        seq_length: Tokens per sequence.
    """

    name: str
    params: int
    tokens: float
    method: str
    replicas: int
    seq_length: int = SEQ_LENGTH

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(
                f"there is no method {self.method}; choose one of {', '.join(METHODS)}."
            )
        if self.replicas < 1:
            raise ConfigError(f"{self.replicas} replicas: a run has at least one.")
        if not self.has_outer_step and self.replicas != 1:
            raise ConfigError(
                f"{self.method} with {self.replicas} replicas: data parallelism has no outer step "
                f"and one replica. Use one replica, or method muloco or diloco."
            )

    @property
    def has_outer_step(self) -> bool:
        """Whether replicas exchange pseudogradients."""
        return not self.method.startswith("dp_")

    @property
    def series(self) -> str:
        """Name of method and K in the published tables."""
        return f"{self.method}_k{self.replicas}" if self.has_outer_step else self.method

    @property
    def inner(self) -> str:
        """``muon`` or ``adamw``."""
        return METHODS[self.method]


@dataclass(frozen=True)
class Value:
    """A config key with its value and label.

    Attributes:
        key: Dotted.
        value: What YAML reads back as the value.
        label: Begins with one of `KINDS` and a colon; a name such as a directory has none.
    """

    key: str
    value: Any
    label: str = ""

    def __post_init__(self) -> None:
        if self.label and self.label.partition(":")[0] not in KINDS:
            raise ValueError(f"{self.key}: the label {self.label!r} has no kind")


@dataclass(frozen=True)
class Prediction:
    """What a law says at a target.

    Attributes:
        value: The law there.
        law: Its formula or a description, the number of points and how far it is extrapolated.
        low: Lower end of the 95 % interval; nan where it is unknown.
        high: Upper end.
        interval: What the interval covers.
        show: Writes a value with its unit.
    """

    value: float
    law: str
    low: float = math.nan
    high: float = math.nan
    interval: str = "95 %"
    show: Callable[[float], str] = "{:.4g}".format

    @property
    def words(self) -> str:
        """Value, interval and law as text."""
        known = math.isfinite(self.low) and math.isfinite(self.high)
        ends = f"{self.interval} {self.show(self.low)} to {self.show(self.high)}"
        return f"{self.show(self.value)} ({ends if known else 'interval unknown'}), {self.law}"


def power_of_two(value: float) -> int:
    """Return the nearest power of two on a logarithmic scale, at least 1."""
    return int(2 ** max(0, round(math.log2(value))))


def lr_step(value: float) -> float:
    """Return the nearest power of sqrt(2), the grid of the MuLoCo paper, to 6 decimals."""
    return round(2 ** (round(2 * math.log2(value)) / 2), 6)


def config_text(title: Sequence[str], extends: Sequence[Path], values: Sequence[Value]) -> str:
    """Return a config file: comment lines, ``extends``, and values with their labels."""
    lines = [line for text in title for line in _comment(text)]
    if extends:
        lines.append(f"extends: [{', '.join(path.as_posix() for path in extends)}]")
    open_sections: list[str] = []
    for value in values:
        *sections, name = value.key.split(".")
        same = [a == b for a, b in zip(sections, open_sections, strict=False)]
        shared = next((i for i, equal in enumerate(same) if not equal), len(same))
        for depth in range(shared, len(sections)):
            lines += [""] if depth == 0 else []
            lines.append(f"{'  ' * depth}{sections[depth]}:")
        open_sections = sections
        lines += _line(f"{'  ' * len(sections)}{name}: {_scalar(value.value)}", value.label)
    return "\n".join(lines) + "\n"


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent="# ", subsequent_indent="# ")


def _line(text: str, label: str) -> list[str]:
    if not label:
        return [text]
    column = max(_COMMENT_COLUMN, len(text) + 2)
    wrapped = textwrap.wrap(label, _WIDTH - column - 2, break_on_hyphens=False)
    before = [text.ljust(column), *[" " * column] * (len(wrapped) - 1)]
    return [f"{left}# {part}" for left, part in zip(before, wrapped, strict=True)]


def _scalar(value: object) -> str:
    """Return a value as YAML; a small number as ``5e-5``."""
    if isinstance(value, float) and abs(value) < 1e-4:
        mantissa, exponent = f"{value:e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}" if value else "0.0"
    if isinstance(value, float):
        return repr(round(value, 6))
    return str(yaml.safe_dump(value, default_flow_style=True)).removesuffix("...\n").strip()
