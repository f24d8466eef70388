"""`FragmentPlan`: the partition of the model's parameters into fragments. Imports no torch.

A fragment is a set of whole layers that are synchronised together. Fragments of six layers, three
fragments::

    layer        0 1 2 3 4 5
    sequential   0 0 1 1 2 2      neighbouring layers together
    strided      0 1 2 0 1 2      interleaved, so that every fragment holds early and late layers

In both patterns the embedding is in fragment 0, and everything after the last layer (final norm,
output head) is in the last fragment.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_muloco.config.outer import FragmentPattern, SynchronizedOuter
from megatron_muloco.errors import ConfigError
from megatron_muloco.params import ParamInfo, coverage

__all__ = ["FragmentPlan"]


@dataclass(frozen=True, slots=True)
class FragmentPlan:
    """Parameter names by fragment.

    Invariant: no name is in two fragments, or twice in one.

    Attributes:
        fragments: Names of each fragment; the fragment's index is its place.
    """

    fragments: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        """Raise `ConfigError` if a name is in two fragments."""
        self.check(self.names())

    @classmethod
    def from_config(
        cls, outer: SynchronizedOuter, params: Iterable[ParamInfo], *, num_layers: int
    ) -> "FragmentPlan":
        """Return the plan of a run's outer step; see `by_layer`."""
        fragments = outer.fragments
        return cls.by_layer(
            params, num_layers=num_layers, count=fragments.count, pattern=fragments.pattern
        )

    @classmethod
    def by_layer(
        cls,
        params: Iterable[ParamInfo],
        *,
        num_layers: int,
        count: int = 1,
        pattern: FragmentPattern = "sequential",
    ) -> "FragmentPlan":
        """Return the plan that assigns every parameter by its layer number.

        The fragment of a parameter depends on its layer, its kind and the keyword arguments alone,
        so a rank that knows only the parameters of its pipeline stage gets the same fragments,
        restricted to them.

        Args:
            params: Parameters, with layers numbered over the whole model.
            num_layers: Layers of the whole model.
            count: Number of fragments, in 1..num_layers.
            pattern: ``sequential`` (the MuLoCo experiments) or ``strided`` (Streaming DiLoCo,
                arXiv:2501.18512).

        Raises:
            ConfigError: There are more fragments than layers, or names without a layer number.
        """
        if not 1 <= count <= num_layers:
            raise ConfigError(
                f"outer.fragments.count: {count} is not in 1..{num_layers}, the number of layers; "
                "a fragment holds at least one whole layer. Use fewer fragments."
            )
        members: list[list[str]] = [[] for _ in range(count)]
        unplaced: list[str] = []
        for param in params:
            fragment = _fragment_of(param, num_layers, count, pattern)
            if fragment is None:
                unplaced.append(param.name)
            else:
                members[fragment].append(param.name)
        if unplaced:
            raise ConfigError(
                f"no fragment for {', '.join(unplaced)}: neither in one of the model's "
                f"{num_layers} layers, nor the embedding, the final norm or the output head. A "
                "parameter without a fragment would never be synchronised. Add it to the "
                "ParameterNames of the model or build a FragmentPlan from explicit lists."
            )
        return cls(tuple(tuple(group) for group in members))

    @property
    def count(self) -> int:
        """Number of fragments, including those without parameters on this rank."""
        return len(self.fragments)

    def names(self) -> tuple[str, ...]:
        """Return all names, fragment by fragment."""
        return tuple(name for group in self.fragments for name in group)

    def members(self, names: Iterable[str]) -> tuple[tuple[str, ...], ...]:
        """Return ``names`` grouped by fragment, each group in the order of ``names``.

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
            ConfigError: Names are missing, repeated or not trainable; the message lists them.
        """
        missing, surplus = coverage(self.names(), trainable)
        if missing or surplus:
            raise ConfigError(
                "fragments must contain every trainable parameter exactly once, or some would "
                f"never be synchronised; missing: {', '.join(missing) or 'none'}; repeated or "
                f"unknown: {', '.join(surplus) or 'none'}"
            )


def _fragment_of(
    param: ParamInfo, num_layers: int, count: int, pattern: FragmentPattern
) -> int | None:
    layer = param.layer
    if layer is None:
        if param.kind == "embedding":
            return 0
        return None if param.kind is None else count - 1
    if layer >= num_layers:
        return None
    return layer % count if pattern == "strided" else layer * count // num_layers
