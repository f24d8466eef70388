"""Which units travel together: chunks that can move while others are computed.

Every owner's units are laid on a line, those of one shape side by side, and the line is cut into
equal parts by elements. So each chunk gives each owner about the same share of its own work, and
batches of one shape stay together where they can. No torch here; all ranks cut alike.
"""

from collections.abc import Sequence

from megatron_muloco.optim.units import Unit

__all__ = ["by_shape", "divide", "largest_batch"]


def divide(
    units: Sequence[Unit], owners: Sequence[int], chunks: int
) -> tuple[tuple[int, ...], ...]:
    """Return the indices of the units of each chunk, in order; chunks without units are left out.

    Args:
        units: All units of a stage.
        owners: Group rank of each unit's owner.
        chunks: How many chunks at most.
    """
    if chunks < 1:
        raise ValueError(f"an exchange needs at least one chunk, not {chunks}")
    members: list[list[int]] = [[] for _ in range(chunks)]
    for owner in sorted(set(owners)):
        owned = [index for index, other in enumerate(owners) if other == owner]
        total, before = sum(units[index].numel for index in owned), 0
        for index in sorted(owned, key=lambda i: (units[i].shape, units[i].blocks, i)):
            # By the middle of the unit, in integers: floor((before + numel / 2) / total * chunks).
            middle = 2 * before + units[index].numel
            members[middle * chunks // (2 * total)].append(index)
            before += units[index].numel
    return tuple(tuple(sorted(chunk)) for chunk in members if chunk)


def by_shape(units: Sequence[Unit]) -> list[list[Unit]]:
    """Return the units of each shape, which an owner computes together, in order.

    Units of one shape that are cut into other blocks are not of one kind.
    """
    batches: dict[tuple[tuple[int, int], int], list[Unit]] = {}
    for unit in units:
        batches.setdefault((unit.shape, unit.blocks), []).append(unit)
    return list(batches.values())


def largest_batch(units: Sequence[Unit]) -> int:
    """Return the elements of the largest batch that the units form by shape."""
    return max((sum(unit.numel for unit in batch) for batch in by_shape(units)), default=0)
