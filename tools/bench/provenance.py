"""`commit` and `program_commit`: the version of the program that a measurement belongs to."""

import subprocess
from pathlib import Path

__all__ = ["commit", "program_commit"]

_ROOT = Path(__file__).resolve().parents[2]
_MEASURED = ("megatron_muloco", "launch", "configs", "tools")


# What changes a training run: not the other tools.
_PROGRAM = ("megatron_muloco", "launch", "configs", "tools/bench/quality", "requirements")


def commit() -> str:
    """Return the short name of the commit, with ``+`` where the program differs from it."""
    return _git("rev-parse", "--short", "HEAD") + _changed(_MEASURED)


def program_commit() -> str:
    """Return the last commit that changed what a training run depends on.

    Commits of pages and of other tools do not change it. With ``+`` where the files differ from it.
    """
    return _git("log", "-1", "--format=%h", "--", *_PROGRAM) + _changed(_PROGRAM)


def _changed(paths: tuple[str, ...]) -> str:
    return "+" if _git("status", "--porcelain", "--", *paths) else ""


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(_ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
