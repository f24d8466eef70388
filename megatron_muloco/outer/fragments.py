"""Which parameters are synchronised together: a partition of the model's names.

A fragment is a set of whole layers. With six layers and three fragments::

    sequential   0 0 1 1 2 2      neighbours together
    strided      0 1 2 0 1 2      interleaved, so early layers never travel in one burst

The embedding goes with fragment 0 and all that follows the last layer (final norm, output head)
with the last fragment, in both patterns. No torch here.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from megatron_muloco.errors import ConfigError
from megatron_muloco.params import coverage

__all__ = ["FragmentPattern", "FragmentPlan"]

FragmentPattern = Literal["sequential", "strided"]

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_BEFORE_LAYERS = ("embedding.",)
_AFTER_LAYERS = ("decoder.final_layernorm.", "output_layer.")


@dataclass(frozen=True, slots=True)
class FragmentPlan:
    """Fragment index to parameter names; no name is in two fragments."""

    fragments: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        """Refuse a name in two fragments."""
        self.check(self.names())

    @classmethod
    def by_layer(
        cls,
        names: Iterable[str],
        *,
        num_layers: int,
        count: int = 1,
        pattern: FragmentPattern = "sequential",
    ) -> "FragmentPlan":
        """Return the plan that assigns every parameter by the number of its layer.

        The fragment of a name depends on nothing but the name and the keyword arguments, so a rank
        that knows only its pipeline stage's names gets the same fragments, cut to these names.

        Args:
            names: Parameter names, layers numbered over the whole model.
            num_layers: Layers of the whole model.
            count: Fragments; at most one a layer.
            pattern: ``sequential`` (the MuLoCo experiments) or ``strided`` (Streaming DiLoCo,
                arXiv:2501.18512).

        Raises:
            ConfigError: More fragments than layers, or names that the rule cannot place.
        """
        if not 1 <= count <= num_layers:
            raise ConfigError(
                f"outer.fragments.count: {count} is not in 1..{num_layers}, the number of layers; "
                "a fragment holds at least one whole layer. Use fewer fragments."
            )
        members: list[list[str]] = [[] for _ in range(count)]
        unplaced: list[str] = []
        for name in names:
            fragment = _fragment_of(name, num_layers, count, pattern)
            (unplaced if fragment is None else members[fragment]).append(name)
        if unplaced:
            raise ConfigError(
                f"no fragment for {', '.join(unplaced)}: neither one of the model's {num_layers} "
                f"layers ('decoder.layers.N.') nor {', '.join(_BEFORE_LAYERS + _AFTER_LAYERS)}. A "
                "parameter without a fragment would never be synchronised. Name it by that rule "
                "or build a FragmentPlan from explicit lists."
            )
        return cls(tuple(tuple(group) for group in members))

    @property
    def count(self) -> int:
        """Fragments of the plan, also those without parameters on this rank."""
        return len(self.fragments)

    def names(self) -> tuple[str, ...]:
        """Return all names, fragment by fragment."""
        return tuple(name for group in self.fragments for name in group)

    def members(self, names: Iterable[str]) -> tuple[tuple[str, ...], ...]:
        """Return ``names`` by fragment, in their order.

        Raises:
            ConfigError: A name is in no fragment.
        """
        given = tuple(names)
        missing, _ = coverage(self.names(), given)
        if missing:
            raise ConfigError(
                f"no fragment for {', '.join(missing)}; these parameters would never be "
                "synchronised"
            )
        groups = [frozenset(group) for group in self.fragments]
        return tuple(tuple(name for name in given if name in group) for group in groups)

    def check(self, trainable: Iterable[str]) -> None:
        """Raise unless every trainable parameter is in exactly one fragment.

        Raises:
            ConfigError: Lists the missing names and those repeated or not trainable.
        """
        missing, surplus = coverage(self.names(), trainable)
        if missing or surplus:
            raise ConfigError(
                "fragments must contain every trainable parameter exactly once, or some would "
                f"never be synchronised; missing: {', '.join(missing) or 'none'}; repeated or "
                f"unknown: {', '.join(surplus) or 'none'}"
            )


def _fragment_of(name: str, num_layers: int, count: int, pattern: FragmentPattern) -> int | None:
    if name.startswith(_BEFORE_LAYERS):
        return 0
    if name.startswith(_AFTER_LAYERS):
        return count - 1
    match = _LAYER.match(name)
    if match is None or int(match[1]) >= num_layers:
        return None
    layer = int(match[1])
    return layer % count if pattern == "strided" else layer * count // num_layers
