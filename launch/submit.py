#!/usr/bin/env python
"""Submit a run to SLURM: ``--config F [--nodes N] [--dry-run]``.

    python launch/submit.py --config configs/15b_k16.yaml --dry-run
    python launch/submit.py --config configs/15b_k16.yaml --nodes 128 --time 12:00:00

Prints the plan and the batch script, then submits it. Guide: docs/guides/slurm.md.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run as a file, from anywhere

from megatron_muloco.config import RunConfig, load_config
from megatron_muloco.data.checks import check_run_data
from megatron_muloco.errors import ConfigError, run_tool
from tools.batch_script import ROOT, ArrayTask, Layout, Request, batch_script, layout_for

_SIGNAL_LIMIT = 65535  # sbatch's own
_MOUNT = re.compile(r"/[^:,\s]*(:/[^:,\s]*(:(ro|rw))?)?")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = _parser().parse_args(argv)
    return run_tool(lambda: _run(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--config", required=True, help="YAML file of the run")
    add(
        "--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE",
        help="override a key of the configuration",
    )  # fmt: skip
    add("--dry-run", action="store_true", help="print plan and script; write and submit nothing")
    add("--test-only", action="store_true", help="ask SLURM whether it would accept the job")
    add("--nodes", type=_positive, help="nodes; by default the fewest that fit")
    add(
        "--ranks-per-node", type=_positive,
        help="GPUs, and ranks, of a node; by default 8, or fewer if the config needs fewer",
    )  # fmt: skip
    add("--cpu", action="store_true", help="ranks are CPU processes; no GPU is requested")
    add("--gpu", help="GPU for the plan's verdict, such as 'H200'")
    add("--launcher", choices=("deepspeed", "srun"), default="deepspeed",
        help="deepspeed: one launcher per node; srun: one task per rank")  # fmt: skip
    _add_slurm_options(parser)
    _add_environment_options(parser)
    return parser


def _add_slurm_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("SLURM").add_argument
    add(
        "--partition", nargs="+", default=[],
        help="partition; several make a heterogeneous job with equal parts, one part in each",
    )  # fmt: skip
    add("--components", type=_positive, help="equal parts that SLURM places separately")
    add("--switches", help="most switches of the job, or of each part: 1 or 1@HH:MM:SS")
    add("--account", help="account")
    add("--time", help="time limit of one start, as sbatch takes it")
    add("--signal-seconds", type=_positive, help="warning before the time limit (300)")
    add("--job-name", help="name of the job; by default that of the config file")
    add("--log-dir", help="directory of logs; by default slurm in checkpoint.dir")
    add(
        "--array", metavar="FILE",
        help="one run for each line of FILE, which holds overrides such as inner.lr=0.01",
    )  # fmt: skip
    add("--array-limit", type=_positive, help="most runs of the array at the same time")
    add("--sbatch", action="append", default=[], metavar="=--OPTION[=VALUE]",
        help="another option of sbatch, such as --sbatch=--qos=high")  # fmt: skip


def _add_environment_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("environment").add_argument
    add("--modules", nargs="+", default=[], help="environment modules to load")
    add("--activate", help="shell file to source instead of .venv/bin/activate")
    add("--container", help="image that the ranks run in")
    add("--container-runtime", choices=("pyxis", "apptainer"), default="pyxis", help="(pyxis)")
    add("--mount", nargs="+", default=[], metavar="SOURCE[:TARGET[:ro]]",
        help="directories for the container, beside the repository and the logs")  # fmt: skip
    add("--interface", help="network interface of NCCL's and gloo's sockets, such as eth0")
    add("--launcher-log-level", choices=("debug", "info", "warning", "error"),
        help="of DeepSpeed's launcher (warning)")  # fmt: skip


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def _run(options: argparse.Namespace) -> None:
    config_path = Path(options.config).resolve()
    lines = _array_lines(options.array)
    if options.activate:
        options.activate = str(_existing(options.activate, "--activate"))
    log_dir = Path(options.log_dir).resolve() if options.log_dir else None
    os.chdir(ROOT)  # the paths of a config are relative to where the job runs
    config = load_config(str(config_path), options.set)
    layout = _layout(config, options)
    logs = log_dir or ROOT / (config.checkpoint.dir or "") / "slurm"
    request = Request(
        config=config_path,
        overrides=tuple(options.set),
        layout=layout,
        gpus=not options.cpu,
        logs=logs,
        name=options.job_name or config_path.stem,
        partitions=tuple(options.partition),
        directives=_directives(options),
        settings=_settings(options, config, layout, logs),
        tasks=_array_tasks(config_path, layout, options, lines),
        at_once=options.array_limit or 0,
    )
    script = batch_script(request)
    plan = _plan(request, options.gpu)
    print(f"{plan}{_placement(request, config)}\nbatch script\n\n{script}", end="", flush=True)
    if not options.dry_run:
        _submit(script, request, config, options)


def _existing(name: str, option: str) -> Path:
    path = Path(name).resolve()
    if not path.is_file():
        raise ConfigError(f"{option} {name}: there is no such file.")
    return path


# ---- layout, options, arrays -------------------------------------------------------------


def _layout(config: RunConfig, options: argparse.Namespace) -> Layout:
    components = options.components or max(1, len(options.partition))
    if len(options.partition) > 1 and components % len(options.partition):
        raise ConfigError(
            f"--components {components}: it is no multiple of the {len(options.partition)} "
            "partitions, so they would hold different numbers of replicas. Use a multiple."
        )
    if components > 1 and options.array:
        raise ConfigError(
            "--array with several components: SLURM has no arrays of heterogeneous jobs. Submit "
            "each run of the array by itself, or use one partition."
        )
    return layout_for(
        config,
        nodes=options.nodes,
        ranks_per_node=options.ranks_per_node,
        components=components,
    )


def _directives(options: argparse.Namespace) -> dict[str, str | None]:
    """Return the options of sbatch that the command line gives."""
    found: dict[str, str | None] = {
        name: value
        for name, value in (
            ("account", options.account),
            ("time", options.time),
            ("switches", options.switches),
        )
        if value
    }
    if options.signal_seconds:
        if options.signal_seconds > _SIGNAL_LIMIT:
            raise ConfigError(
                f"--signal-seconds {options.signal_seconds}: SLURM accepts up to {_SIGNAL_LIMIT}."
            )
        found["signal"] = f"USR1@{options.signal_seconds}"
    for text in options.sbatch:
        name, equals, value = text.removeprefix("--").partition("=")
        if not text.startswith("--") or not re.fullmatch(r"[a-z][a-z-]*", name):
            raise ConfigError(
                f"--sbatch={text}: not an option in its long form. Write --sbatch=--qos=high."
            )
        found[name] = value if equals else None
    return found


def _array_lines(name: str | None) -> list[tuple[int, tuple[str, ...]]]:
    """Return the number and the words of each line of an array file."""
    if name is None:
        return []
    text = _existing(name, "--array").read_text(encoding="utf-8")
    lines = [
        (number, tuple(shlex.split(line, comments=True)))
        for number, line in enumerate(text.splitlines(), 1)
    ]
    found = [(number, words) for number, words in lines if words]
    if not found:
        raise ConfigError(f"--array {name}: it has no line with overrides, such as inner.lr=0.01.")
    return found


def _array_tasks(
    config: Path,
    layout: Layout,
    options: argparse.Namespace,
    lines: list[tuple[int, tuple[str, ...]]],
) -> tuple[ArrayTask, ...]:
    """Return the runs of an array; each has been checked, and none shares a directory."""
    tasks: list[ArrayTask] = []
    owners: dict[tuple[str, str], str] = {}
    problems: list[str] = []
    for number, words in lines:
        place = f"{options.array}:{number}"
        try:
            run = load_config(str(config), [*options.set, *words])
            layout_for(run, nodes=layout.nodes, ranks_per_node=layout.ranks_per_node)
        except ConfigError as error:
            problems += [f"{place}: {problem}" for problem in error.problems]
            continue
        directories = (("checkpoint.dir", run.checkpoint.dir), ("monitor.dir", run.monitor.dir))
        for key, directory in directories:
            first = owners.setdefault((key, directory), place) if directory else place
            if first != place:
                problems.append(
                    f"{place}: {key} is {directory}, as in {first}. Runs of an array write at the "
                    f"same time, so each needs a directory of its own. Add {key}=... to each line."
                )
        tasks.append(ArrayTask(words, run.checkpoint.dir or ""))
    if problems:
        raise ConfigError(problems)
    return tuple(tasks)


def _settings(
    options: argparse.Namespace, config: RunConfig, layout: Layout, logs: Path
) -> dict[str, str]:
    """Return the variables of the template that this job needs."""
    if options.mount and not options.container:
        raise ConfigError("--mount without --container: there is nothing to mount into.")
    bad = [mount for mount in options.mount if not _MOUNT.fullmatch(mount)]
    if bad:
        raise ConfigError(
            f"--mount {' '.join(bad)}: not absolute paths. Write /source, /source:/target or "
            "/source:/target:ro."
        )
    settings = {
        "MULOCO_ROOT": str(ROOT),
        "MULOCO_LOGS": str(logs),
        "MULOCO_SLOTS_PER_NODE": str(layout.ranks_per_node),
        "MULOCO_LAUNCHER": options.launcher,
        "MULOCO_LAUNCHER_LOG_LEVEL": options.launcher_log_level,
        "MULOCO_CHECKPOINTS": None if options.array else config.checkpoint.dir,
        "MULOCO_MODULES": " ".join(options.modules),
        "MULOCO_ACTIVATE": options.activate,
        "MULOCO_INTERFACE": options.interface,
    }
    if options.container:
        settings |= {
            "MULOCO_CONTAINER": options.container,
            "MULOCO_CONTAINER_RUNTIME": options.container_runtime,
            # A mount of one path is that path on both sides, in pyxis and in Apptainer alike.
            "MULOCO_CONTAINER_MOUNTS": ",".join(
                mount if ":" in mount else f"{mount}:{mount}" for mount in options.mount
            ),
        }
    return {name: value for name, value in settings.items() if value}


# ---- what is printed and submitted -------------------------------------------------------


def _plan(request: Request, gpu: str | None) -> str:
    """Return the plan that ``pretrain.py --dry-run`` prints for the ranks of this job.

    Raises:
        ConfigError: The program has refused the configuration, and has said why.
    """
    command = [sys.executable, "launch/pretrain.py", "--config", str(request.config), "--dry-run"]
    command += ["--world-size", str(request.layout.topology.world_size)]
    command += ["--gpu", gpu] if gpu else []
    command += ["--set", *request.overrides] if request.overrides else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"the plan failed:\n{done.stdout}{done.stderr}".rstrip())
    return done.stdout


def _placement(request: Request, config: RunConfig) -> str:
    """Return the lines about nodes, logs, and what the layout costs."""
    layout = request.layout
    rows = [
        ("nodes", f"{layout.nodes:,}", f"of {layout.ranks_per_node} ranks"),
        ("layout", "", str(layout)),
        ("logs", "", str(request.logs)),
    ]
    if request.tasks:
        rows.append(("array", f"{len(request.tasks):,}", "runs; the plan is that of the config"))
    tensor = layout.topology.tensor
    if layout.ranks_per_node % tensor:
        rows.append(
            ("note", "", f"tp {tensor} crosses nodes of {layout.ranks_per_node}: several exchanges")
        )
        rows.append(("", "", "per layer over the network; tp that divides them is faster"))
    if config.checkpoint.dir is None and not request.tasks:
        rows.append(("note", "", "without checkpoint.dir nothing is saved at the time limit"))
    lines = [f"  {name:<16}{value:>12}  {note}".rstrip() for name, value, note in rows]
    return "\n".join(["cluster", *lines])


def _submit(script: str, request: Request, config: RunConfig, options: argparse.Namespace) -> None:
    """Submit the script, or ask whether SLURM would take it.

    Raises:
        ConfigError: There is no sbatch, it refused, or the run would be refused for its data.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "there is no sbatch here. Run this on a login node, or write the script with --dry-run."
        )
    if options.test_only:
        done = _sbatch("--test-only", text=script)
        print(done.stderr.strip())
        return
    # A container may have the data elsewhere.
    if not options.container and (problems := check_run_data(config)):
        raise ConfigError([f"not submitted, the run would be refused: {each}" for each in problems])
    request.logs.mkdir(parents=True, exist_ok=True)
    path = request.logs / f"{request.name}.sbatch"
    path.write_text(script, encoding="utf-8")
    job = _sbatch("--parsable", str(path)).stdout.strip().split(";")[0]
    log = request.logs / f"{request.name}-{job}{'_*' if request.tasks else ''}.out"
    print(
        f"submitted job {job}\n"
        f"  its log           tail -F {log}\n"
        f"  stop and requeue  scancel --signal=USR1 {job}\n"
        f"  end for good      scancel {job}"
    )


def _sbatch(*arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        ["sbatch", *arguments], input=text, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ConfigError(f"sbatch refused the job: {done.stderr.strip()}")
    return done


if __name__ == "__main__":
    sys.exit(main())
