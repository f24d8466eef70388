"""The error family: every failure that a user can meet has one of these types.

Messages answer four questions in this order: what is wrong (with the values), where, why it
matters, what to do.
"""

import sys
from collections.abc import Callable, Sequence

__all__ = [
    "CheckpointError",
    "ConfigError",
    "MulocoError",
    "RuntimeMismatch",
    "SyncError",
    "TopologyError",
    "run_tool",
]


class MulocoError(Exception):
    """Base of all errors raised on purpose by this package."""


class ConfigError(MulocoError):
    """Something the user can fix in YAML, on the command line or in the data it names.

    Args:
        problems: One self-contained sentence per problem; all of them are reported at once.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class TopologyError(ConfigError):
    """Ranks, degrees and world size do not fit together."""


class RuntimeMismatch(MulocoError):
    """Megatron, DeepSpeed or another package is missing, of an untested version, or misused."""


class SyncError(MulocoError):
    """An outer launch or apply failed, or replicas disagree about their state."""


class CheckpointError(MulocoError):
    """State on disk is missing, incompatible or incomplete."""


# ------------------------------------------------------------------------------------------
# How the data tools end: 0 done, 2 bad input, 130 interrupted; never a stack trace for a user.


_BAD_INPUT = 2
_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def run_tool(body: Callable[[], None]) -> int:
    """Run a tool and return its exit code; problems go to stderr, one a line."""
    try:
        body()
    except ConfigError as error:
        for problem in error.problems:
            sys.stderr.write(f"error: {problem}\n")
        return _BAD_INPUT
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; nothing was published\n")
        return _INTERRUPTED
    return 0
