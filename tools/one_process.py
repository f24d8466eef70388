"""Train all replicas of a run in one process: python tools/one_process.py --config F [--set K=V].

Prints what rank 0 of K ranks would print, then held-out losses and the digest of the last anchor.
"""

import argparse
import sys
from collections.abc import Sequence

from megatron_muloco.config import load_config
from megatron_muloco.errors import run_tool
from megatron_muloco.runtime.distributed import silence_known_warnings


def train(config_path: str, overrides: Sequence[str], *, quiet: bool) -> None:
    """Run a config to its end and print the result."""
    config = load_config(config_path, overrides)
    silence_known_warnings()
    from megatron_muloco.training.one_process import run_in_one_process

    result = run_in_one_process(config, writes=not quiet)
    for step, loss in result.held_out.items():
        print(f"held-out loss after iteration {step}: {loss:.6f}")
    if result.test_loss is not None:
        print(f"loss on data.test: {result.test_loss:.6f}")
    print(f"training loss of the last iteration: {result.losses[-1]:.6f}")
    print(f"bytes sent per rank in outer steps, had there been ranks: {max(result.wire_bytes):,}")
    print(f"anchor digest: {result.anchor_digest}")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description="Train all replicas of a run in one process.")
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument(
        "--set",
        action="extend",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="override a key of the configuration, for instance parallel.num_replicas=16",
    )
    parser.add_argument("--quiet", action="store_true", help="print the result only")
    arguments = parser.parse_args(argv)
    return run_tool(lambda: train(arguments.config, arguments.set, quiet=arguments.quiet))


if __name__ == "__main__":
    sys.exit(main())
