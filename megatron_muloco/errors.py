"""Exception types of this package, and the exit codes of its tools.

::

    MulocoError
      ConfigError        the user can fix it in YAML or on the command line
        TopologyError    ranks, degrees and world size do not fit together
      RuntimeMismatch    a package is missing, untested or misused
      SyncError          a launch or apply failed, or replicas disagree
      CheckpointError    state on disk is missing, incompatible or incomplete
      NumericsError      gradients or weights are not finite, so that nothing is trained any more

A message answers four questions in this order: what is wrong (with the values), where, why it
matters, what to do.
"""

import sys
from collections.abc import Callable, Sequence

__all__ = [
    "EXIT_BAD_INPUT",
    "EXIT_LOST",
    "EXIT_NUMERICS",
    "EXIT_PREFLIGHT",
    "CheckpointError",
    "ConfigError",
    "MulocoError",
    "NumericsError",
    "RuntimeMismatch",
    "SyncError",
    "TopologyError",
    "run_tool",
]

EXIT_NUMERICS = 17  # nothing is trained any more; Megatron's code for results that are not valid
EXIT_BAD_INPUT = 2  # of the training program and of every tool; argparse exits with it too
EXIT_PREFLIGHT = 3  # of the training program: --preflight has found a fault
EXIT_LOST = 86  # of the training program: a rank was lost or did not arrive; start again
_EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class MulocoError(Exception):
    """Base class of all errors that this package raises on purpose."""


class ConfigError(MulocoError):
    """A problem that the user can fix in YAML, on the command line or in the data files.

    Args:
        problems: One self-contained message per problem; all of them are reported at once.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class TopologyError(ConfigError):
    """The number of ranks does not fit the parallel sizes."""


class RuntimeMismatch(MulocoError):
    """Megatron, DeepSpeed or another package is missing, of an untested version, or misused."""


class SyncError(MulocoError):
    """A launch or apply of an outer step failed, or replicas hold different state."""


class CheckpointError(MulocoError):
    """A checkpoint is missing, incompatible or incomplete, or cannot be written."""


class NumericsError(MulocoError):
    """Steps or rounds without usable gradients have reached their limit."""


def run_tool(body: Callable[[], None]) -> int:
    """Run a tool's body and return its exit code, without a stack trace for a user's mistake.

    Returns:
        0 when done, `EXIT_BAD_INPUT` after a `ConfigError`, whose problems go to stderr one a line,
        and 130 after Ctrl-C.
    """
    try:
        body()
    except ConfigError as error:
        for problem in error.problems:
            sys.stderr.write(f"error: {problem}\n")
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; nothing was published\n")
        return _EXIT_INTERRUPTED
    return 0
