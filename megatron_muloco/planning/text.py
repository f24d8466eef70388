"""Numbers for people, and a place to write them to."""

import os
import sys

__all__ = ["human_bytes", "human_count", "write_out"]


def human_count(number: float) -> str:
    """Return a count with three or four digits and a unit: ``15.23B``."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            scaled = number / size
            return f"{scaled:.2f}{unit}" if scaled < 100 else f"{scaled:.1f}{unit}"
    return f"{number:g}"


def human_bytes(number: float) -> str:
    """Return a size in decimal units: ``3.81 GB`` is 3.81e9 bytes."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:.0f} B"


def write_out(text: str) -> None:
    """Write to standard output; a reader that has seen enough, such as ``head``, is no error."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
