"""`main`: the command line ``deepspeed launch/pretrain.py --config F [--set a.b=c] [--dry-run]``.

Exit codes: 0 done; 2 bad input, nothing was trained; 3 ``--preflight`` found a fault; 85 stopped on
request with the state saved, start the same command again; 86 a rank was lost or did not arrive,
start the same command again; 17 nothing was trained any more (gradients or weights not finite),
starting again would not help; any other code is a fault that a new start may repeat.
"""

import argparse
import faulthandler
import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from megatron_muloco.config import RunConfig, load_config
from megatron_muloco.config.derived import smallest_topology, topology_of
from megatron_muloco.config.rules import check
from megatron_muloco.errors import (
    EXIT_BAD_INPUT,
    EXIT_NUMERICS,
    EXIT_PREFLIGHT,
    ConfigError,
    MulocoError,
    TopologyError,
)
from megatron_muloco.runtime.distributed import (
    hide_unwanted_gpus,
    raise_file_limit,
    silence_known_warnings,
)
from megatron_muloco.runtime.ranks import RankInfo, discover_ranks
from megatron_muloco.training.stopping import Launchers, StopRequest
from megatron_muloco.training.watch import Watch

__all__ = ["main"]

EXIT_DONE = 0
EXIT_FAULT = 1
EXIT_STOPPED = 85  # the launcher passes it on, and no shell or scheduler uses it

_ASSUMED_GPU = "NVIDIA H100 80GB HBM3"  # for plans without --gpu
_USUAL_ACCELERATORS = 8  # per machine; the suggested command names a hostfile for more

# The launcher ends all ranks once one has exited, so rank 0 must print its message before any other
# rank exits.
_RANK_ZERO_FIRST_SECONDS = 3.0


def main(arguments: Sequence[str] | None = None, stop: StopRequest | None = None) -> NoReturn:
    """Run the program and exit with one of the exit codes above.

    Args:
        arguments: Words of the command line; by default those of this process.
        stop: Request whose handlers are installed already; by default a new one.
    """
    if sys.__stderr__ is not None:  # a daemon may have closed it
        # Written from C, so it also works while Python waits.
        faulthandler.register(signal.SIGUSR2, file=sys.__stderr__, all_threads=True)
    launchers = Launchers()
    launchers.attend()
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parse(given)
    hide_unwanted_gpus(os.environ)
    with stop or StopRequest() as stop:
        try:
            raise_file_limit()
            config = load_config(options.config, options.set)
            if options.dry_run:
                _print_plan(config, options.world_size, options.gpu)
                sys.exit(EXIT_DONE)
            ranks = discover_ranks(os.environ)
            if not options.preflight:
                _check_inputs(config)
            _fit_world(config, ranks, given, options.config, stop)
        except ConfigError as error:
            sys.exit(_report_problems(error))
        watch = Watch(
            launchers.ended,
            launchers.request_stop,
            start_limit=60.0 * config.training.control_timeout_minutes,
        )
        if options.preflight:
            code = _ended(lambda: _preflight(config, watch), watch)
        else:
            code = _ended(lambda: _train(config, stop, watch), watch)
        if code == EXIT_STOPPED and _rank() == 0:
            _say_how_to_go_on(launchers)
        stop.give_back_terminal()
        _exit_now(code)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="pretrain.py",
        description="Pre-train a language model with MuLoCo, DiLoCo or data parallelism.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument(
        "--set",
        action="extend",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="override a key of the configuration, for instance inner.lr=0.01",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print the plan, start nothing"
    )
    parser.add_argument(
        "--preflight",
        action="store_true",
        help="join the job, check all ranks, groups and links, name faults by rank, train nothing",
    )
    parser.add_argument(
        "--world-size",
        type=int,
        help="number of ranks to plan for with --dry-run; by default the smallest that fits",
    )
    parser.add_argument(
        "--gpu",
        help="GPU for the verdict of --dry-run, such as 'H200' or 'A100 40GB'; by default an H100 "
        "of 80 GB, and none with training.precision=fp32",
    )
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _print_plan(config: RunConfig, world_size: int | None, gpu: str | None) -> None:
    from megatron_muloco.data.checks import check_run_data
    from megatron_muloco.monitor.throughput import gpu_by_name
    from megatron_muloco.planning.report import render_plan, write_out
    from megatron_muloco.planning.traffic import planned_on_accelerator
    from megatron_muloco.planning.verdict import Device

    device = None
    if gpu is not None or planned_on_accelerator(config):
        chosen = gpu_by_name(gpu or _ASSUMED_GPU)
        device = Device(chosen.device, chosen.memory_gb * 10**9)
    topology = None if world_size is None else topology_of(config, world_size)
    check(config, topology or smallest_topology(config))
    if _rank() == 0:
        warnings = "".join(f"warning: {warning}\n" for warning in config.warnings)
        plan = render_plan(config, topology, device)
        write_out(f"{plan}\n{_data_report(check_run_data(config))}\n{warnings}")


def _data_report(problems: Sequence[str]) -> str:
    """Return the part of a plan about the data.

    Problems do not fail a dry run, because plans are often made on a machine without the data.
    """
    if not problems:
        return "data\n  no problem found"
    number = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    head = f"data\n  {number}: a run would be refused. A plan needs no data, so the exit code is 0."
    return "\n\n".join([head, *(f"  {problem}" for problem in problems)])


def _fit_world(
    config: RunConfig,
    ranks: RankInfo,
    arguments: Sequence[str],
    config_path: str,
    stop: StopRequest,
) -> None:
    """Return if the number of ranks fits the configuration; otherwise start the missing ranks.

    Raises:
        TopologyError: The number of ranks does not fit, and the launcher has to start others.
    """
    try:
        check(config, topology_of(config, ranks.world_size))
        return
    except TopologyError as error:
        needed = smallest_topology(config).world_size
        if ranks.world_size > 1 or needed == 1:
            raise
        reason = _why_not_here(config)
        if reason:
            raise TopologyError(_how_to_start(config, reason, str(error), arguments)) from error
    check(config, smallest_topology(config))
    sys.stdout.write(
        f"{config_path} needs {needed} ranks ({smallest_topology(config)}), but one was started. "
        f"There is no accelerator here, so {needed} CPU ranks are started now.\n"
    )
    from megatron_muloco.training.launch import relaunch

    if stop.requested:  # the new program would not know of it
        sys.exit(EXIT_STOPPED)
    stop.give_back_terminal()
    relaunch(needed, arguments, os.environ)


def _why_not_here(config: RunConfig) -> str:
    """Return why this process does not start the missing ranks itself, else ``""``."""
    from megatron_muloco.training.launch import machine_memory, why_not_on_cpus

    if _accelerators():
        return "on accelerators the launcher starts the ranks"
    reason = why_not_on_cpus(config, machine_memory())
    return f"there is no accelerator here, and {reason}" if reason else ""


def _how_to_start(config: RunConfig, reason: str, error: str, arguments: Sequence[str]) -> str:
    """Return an error message with the plan and the command that starts enough ranks."""
    from megatron_muloco.planning.report import render_plan

    needed = smallest_topology(config).world_size
    machine = f"--num_gpus {needed}" if needed <= _USUAL_ACCELERATORS else "--hostfile hosts"
    return (
        f"{error}\n  Not started here: {reason}.\n\n{render_plan(config)}\n\n"
        f"Start it on {needed} or a multiple of {needed} accelerators, for instance:\n"
        f"  deepspeed {machine} launch/pretrain.py {shlex.join(arguments)}"
    )


def _accelerators() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _check_inputs(config: RunConfig) -> None:
    """Raise one ConfigError with all problems of the data and tokenizer files."""
    from megatron_muloco.data.checks import check_run_data

    problems = check_run_data(config)
    if problems:
        raise ConfigError(problems)


def _train(config: RunConfig, stop: StopRequest, watch: Watch) -> int:
    """Train and return the exit code."""
    from megatron_muloco.training.loop import Outcome, run

    exit_codes = {
        Outcome.DONE: EXIT_DONE,
        Outcome.STOPPED: EXIT_STOPPED,
        Outcome.UNSAVED: EXIT_FAULT,  # restarting would train from the beginning
        Outcome.SAVE_FAILED: EXIT_FAULT,  # restarting would fail again
        Outcome.STALLED: EXIT_NUMERICS,
        Outcome.NOT_FINITE: EXIT_NUMERICS,
    }
    return exit_codes[run(config, stop, watch)]


def _preflight(config: RunConfig, watch: Watch) -> int:
    """Check all ranks, print the verdict and return the exit code."""
    from megatron_muloco.data.checks import check_run_data
    from megatron_muloco.training.preflight import preflight

    verdict = preflight(config, check_run_data(config), watch)
    if _rank() == 0:
        sys.stdout.write(f"{verdict}\n")
        sys.stdout.flush()
    elif not verdict.is_ready:
        time.sleep(_RANK_ZERO_FIRST_SECONDS)
    return EXIT_DONE if verdict.is_ready else EXIT_PREFLIGHT


def _ended(body: Callable[[], int], watch: Watch) -> int:
    """Return the exit code of ``body``, also if it raises.

    After an error the ranks may be at different points, so no collective is called any more. They
    agree on the exit code through the store of the job.
    """
    watch.start()
    silence_known_warnings()
    try:
        return body()
    except ConfigError as error:
        code = watch.verdict(error, EXIT_BAD_INPUT)
        _report_problems(error)
        return code
    except MulocoError as error:
        traceback.print_exc()
        sys.stderr.write(f"\n{type(error).__name__}: {error}\n")
        return watch.verdict(error, EXIT_FAULT)
    except Exception as error:  # noqa: BLE001 - the process ends here, whatever the error
        traceback.print_exc()
        return watch.verdict(error, EXIT_FAULT)
    finally:
        watch.close()


def _say_how_to_go_on(launchers: Launchers) -> None:
    """Print the last line of a run that stopped on request: the command that goes on."""
    command = launchers.command(sys.argv)
    if "SLURM_JOB_ID" in os.environ:
        command = f"the same job script, or {command}"
    sys.stdout.write(f" > go on with:  {command}\n")


def _report_problems(error: ConfigError) -> int:
    """Print the problems and return the exit code.

    Rank 0 prints first. Other ranks wait; the launcher usually ends them meanwhile. A rank that is
    still alive prints too, because the problem may exist on its machine only.
    """
    rank = _rank()
    if rank:
        time.sleep(_RANK_ZERO_FIRST_SECONDS)
    count = len(error.problems)
    at = f" on rank {rank}" if rank else ""
    sys.stderr.write(f"{count} problem{'s' if count > 1 else ''} in the input{at}:\n")
    for problem in error.problems:
        sys.stderr.write(f"\n{problem}\n")
    return EXIT_BAD_INPUT


def _rank() -> int:
    try:
        return discover_ranks(os.environ).rank
    except ConfigError:  # this error is the one that is being reported
        return 0


def _exit_now(code: int) -> NoReturn:
    """End the process without interpreter teardown.

    Teardown of process groups may wait for other ranks after an error, and a second signal during
    it would replace the exit code.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
