"""Print the plan of a config: parameters, length, rounds, memory and traffic. Starts nothing."""

import argparse
import sys

from megatron_muloco.config import check, load_config, topology_of
from megatron_muloco.errors import ConfigError
from megatron_muloco.planning import render_plan
from megatron_muloco.planning.report import write_out


def main(arguments: list[str] | None = None) -> int:
    """Return 0 after printing the plan, 2 when the config cannot run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("--world-size", type=int, help="ranks; default the smallest that fit")
    parser.add_argument(
        "--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE", dest="overrides",
        help="replace keys of the configuration, for instance inner.lr=0.01",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        config = load_config(options.config, options.overrides)
        topology = None
        if options.world_size is not None:
            topology = topology_of(config, options.world_size)
        check(config, topology)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    write_out(f"plan of {options.config}\n\n{render_plan(config, topology)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
