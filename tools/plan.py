"""Plan a run: time, utilisation, bandwidth, memory, failures, and the same run by other methods.

    python tools/plan.py --config configs/15b_k16.yaml --world-size 1024 --link 10Gbit

Bytes and memory are those of ``--dry-run``. The speed of a GPU, of links and of the disk, and how
often GPUs fail, are assumptions unless they are given or measured; the plan says which. Guide:
docs/guides/planning.md.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run as a file, from anywhere

from megatron_muloco.config import RunConfig, check, load_config, smallest_topology, topology_of
from megatron_muloco.config.outer import NoOuter
from megatron_muloco.errors import ConfigError, run_tool
from megatron_muloco.monitor.throughput import Peak, gpu_by_name
from megatron_muloco.planning.report import write_out
from megatron_muloco.planning.timing import Rate, Rates, link_rate
from megatron_muloco.planning.traffic import planned_on_accelerator
from megatron_muloco.planning.verdict import Device, judge
from tools.planning.drawing import draw
from tools.planning.estimate import Estimate, estimate
from tools.planning.measured import calibrated, read_log
from tools.planning.text import Plan, as_json, as_text
from tools.planning.variants import best_exchange, fragments_that_hide, methods, warnings

_GPU = "NVIDIA H100 80GB HBM3"
_LINK = "10Gbit"
_MFU = 0.4
_MTBF_HOURS = 50_000.0
_MTBF_SOURCE = (
    "assumed: Llama 3 (arXiv 2407.21783) had 419 unexpected interruptions of 16,384 GPUs in 54 days"
)
_WRITE_GB = 10.0
_RESTART_MINUTES = 10.0


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = _parser().parse_args(argv)
    return run_tool(lambda: _run(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="YAML file of the run")
    add = parser.add_argument
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="change a key")
    add("--world-size", type=int, help="ranks; by default the smallest that fits")
    add("--gpu", help=f"such as 'H200' or 'A100 40GB'; by default {_GPU}")
    add("--mfu", type=float, help=f"share of the peak in forward and backward; {_MFU} if not given")
    add("--step-seconds", type=float, help="of an inner step, instead of the mfu")
    add("--measured", type=Path, metavar="DIR", help="monitor.dir of a run: its step and its link")
    add("--link", help=f"of each replica to the others, such as {_LINK} or ndr")
    add("--efficiency", type=float, help="share of the link's rate that payload reaches")
    add("--sites", type=int, help="groups of GPUs behind a link each; by default the replicas")
    add("--share", type=float, default=0.95, help="of a round that the best exchange computes")
    add("--max-loss", type=float, default=1.0, help="percent of published loss it may cost")
    add("--write", type=float, metavar="GB/s", help="checkpoints, all ranks together")
    add("--mtbf", type=float, metavar="HOURS", help="between failures of a GPU")
    add("--restart", type=float, metavar="MINUTES", help="from a failure to the next step")
    add("--json", action="store_true", help="print JSON")
    add("--plot", type=Path, help="file for utilisation and days against the link")
    return parser


def _run(options: argparse.Namespace) -> None:
    plan = make_plan(options)
    if options.plot:
        draw(plan, options.plot)
    write_out(json.dumps(as_json(plan), indent=1) + "\n" if options.json else as_text(plan))


def make_plan(options: argparse.Namespace) -> Plan:
    """Return the plan that the options ask for.

    Raises:
        ConfigError: The config does not pass its checks, or an option has no meaning.
    """
    _check_options(options)
    config = load_config(options.config, options.set)
    topology = (
        smallest_topology(config)
        if options.world_size is None
        else topology_of(config, options.world_size)
    )
    check(config, topology)
    gpu = _gpu(config, options)
    base = estimate(config, topology, _rates(gpu, options), sites=options.sites or 1)
    if options.measured:
        fragments = 1 if isinstance(config.outer, NoOuter) else config.outer.fragments.count
        base = _measured(base, options, fragments)
    allowed, choice = (
        best_exchange(base, options.share, options.max_loss) if base.bits else (False, None)
    )
    verdict = None
    if planned_on_accelerator(config):
        device = Device(gpu.device, gpu.memory_gb * 10**9)
        verdict = judge(config, topology, base.memory, device)
    return Plan(
        base,
        gpu.device,
        verdict,
        methods(base, options.sites or max(2, topology.num_replicas)),
        fragments_that_hide(base) if base.bits else (),
        (options.share, options.max_loss),
        allowed,
        choice,
        warnings(base),
    )


def _measured(base: Estimate, options: argparse.Namespace, fragments: int) -> Estimate:
    """Return the estimate with the rates of the measured run; given options stay."""
    rates = calibrated(base, read_log(options.measured, fragments))
    if options.link:
        rates = replace(rates, link=base.rates.link, efficiency=base.rates.efficiency)
    return estimate(base.config, base.topology, rates, sites=base.sites)


def _check_options(options: argparse.Namespace) -> None:
    """Raise for numbers without a meaning; all of them are named."""
    problems = []
    limits = {"mfu": 1, "efficiency": 1, "share": 1, "step_seconds": 1e6, "write": 1e6, "mtbf": 1e9,
              "restart": 1e6, "sites": 1e6, "world_size": 1e9}  # fmt: skip
    for name, most in limits.items():
        value = getattr(options, name)
        if value is not None and not 0 < value <= most:
            option = f"--{name.replace('_', '-')}"
            problems.append(f"{option} {value:g} is not above 0 and up to {most:g}.")
    if options.measured and options.step_seconds:
        problems.append("--measured and --step-seconds both give the seconds of a step; give one.")
    if problems:
        raise ConfigError(problems)


def _gpu(config: RunConfig, options: argparse.Namespace) -> Peak:
    """Return the GPU.

    Raises:
        ConfigError: It is unknown, or the run is for CPUs, whose speed is not known.
    """
    gpu = gpu_by_name(options.gpu or _GPU)
    known = options.step_seconds or options.measured
    if not planned_on_accelerator(config) and not known:
        raise ConfigError(
            "training.precision: fp32 is planned for CPUs, whose speed is not in a table. Give "
            "--step-seconds, or --measured with the monitor.dir of a short run."
        )
    return gpu


def _rates(gpu: Peak, options: argparse.Namespace) -> Rates:
    """Return the rates; what is not given is assumed."""

    def rate(given: float | None, default: float, unit: float, origin: str = "assumed") -> Rate:
        return Rate(default * unit, origin) if given is None else Rate(given * unit, "given")

    step = None if options.step_seconds is None else Rate(options.step_seconds, "given")
    link = Rate(link_rate(options.link or _LINK), "given" if options.link else "assumed")
    return Rates(
        flops=Rate(gpu.tflops * 1e12, gpu.source),
        mfu=rate(options.mfu, _MFU, 1.0),
        link=link,
        efficiency=rate(options.efficiency, 1.0, 1.0),
        writing=rate(options.write, _WRITE_GB, 1e9),
        mtbf=rate(options.mtbf, _MTBF_HOURS, 3600.0, _MTBF_SOURCE),
        restart=rate(options.restart, _RESTART_MINUTES, 60.0),
        step=step,
    )


if __name__ == "__main__":
    sys.exit(main())
