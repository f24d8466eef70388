"""How the data tools end: 0 done, 2 bad input, 130 interrupted; never a stack trace for a user."""

import sys
from collections.abc import Callable

from megatron_muloco.errors import ConfigError

__all__ = ["run_tool"]

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
