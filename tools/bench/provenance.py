"""`commit`: the version of the program that a measurement belongs to."""

import subprocess
from pathlib import Path

__all__ = ["commit"]

_ROOT = Path(__file__).resolve().parents[2]
_MEASURED = ("megatron_muloco", "launch", "configs", "tools")


def commit() -> str:
    """Return the short name of the commit, with ``+`` where the program differs from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(_ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--", *_MEASURED)
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
