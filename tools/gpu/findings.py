"""`Finding`: one line of a check on a GPU. Imports no torch."""

from dataclasses import dataclass

__all__ = ["Finding"]


@dataclass(frozen=True)
class Finding:
    """One line of a check.

    Attributes:
        what: What was tried or measured.
        result: What came out, with its unit.
        passed: Whether it is as it must be; ``None`` for a measurement without a bar.
    """

    what: str
    result: str
    passed: bool | None = None
