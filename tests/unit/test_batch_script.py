"""Layouts of replicas on nodes, and the batch script that `launch/submit.py` makes of them."""

import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launch import submit
from megatron_muloco.config import RunConfig, load_config
from megatron_muloco.errors import ConfigError
from tools.batch_script import TEMPLATE, Layout, Request, batch_script, layout_for

ROOT = Path(__file__).parents[2]


def config_of(*overrides: str) -> RunConfig:
    return load_config(str(ROOT / "configs/15b_k16.yaml"), overrides)


def request(layout: Layout, **changes: object) -> Request:
    values = {
        "config": Path("/r/my config.yaml"), "overrides": ("a.b=[1, 2]",), "layout": layout,
        "gpus": True, "logs": Path("/r/logs"), "name": "mine",
    }  # fmt: skip
    return Request(**(values | changes))  # type: ignore[arg-type]


def directives(script: str) -> list[str]:
    return re.findall(r"^#SBATCH (.+)", script, re.MULTILINE)


@pytest.mark.parametrize(
    ("nodes", "ranks_per_node", "overrides", "words"),
    [
        (None, 8, (), "1 replica on each of 16 nodes"),
        (64, 8, (), "16 replicas on 4 nodes each"),
        (8, 16, (), "2 replicas on each of 8 nodes"),
        (1, 8, ("parallel.num_replicas=1",), "1 replica on each of 1 node"),
    ],
)
def test_a_layout_in_words(
    nodes: int | None, ranks_per_node: int, overrides: tuple[str, ...], words: str
) -> None:
    layout = layout_for(config_of(*overrides), nodes=nodes, ranks_per_node=ranks_per_node)
    assert str(layout) == words


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"nodes": 17, "ranks_per_node": 8}, "but there are 136"),
        ({"nodes": 12, "ranks_per_node": 32}, "would share nodes"),
        ({"nodes": 16, "ranks_per_node": 8, "components": 3}, "whole replicas"),
        ({"nodes": 16, "ranks_per_node": 8, "components": 32}, "divides both 16 nodes"),
        ({"nodes": 16 * 7, "ranks_per_node": 8}, "training.global_batch_size"),
    ],
)
def test_an_impossible_layout_is_refused(options: dict[str, int], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        layout_for(config_of("training.global_batch_size=12288"), **options)


def test_the_fewest_nodes_are_possible_and_fewer_are_not() -> None:
    """Against every smaller number of nodes, by the definition of a layout."""
    for replicas, ranks_per_node, components in itertools.product(
        (1, 2, 3, 6), (1, 4, 6, 8), (1, 2)
    ):
        if replicas % components:
            continue
        config = config_of(
            f"parallel.num_replicas={replicas}",
            "training.global_batch_size=5184",
        )
        found = layout_for(
            config, nodes=None, ranks_per_node=ranks_per_node, components=components
        ).nodes
        possible = []
        for nodes in range(1, found + 1):
            try:
                layout_for(
                    config, nodes=nodes, ranks_per_node=ranks_per_node, components=components
                )
            except ConfigError:
                continue
            possible.append(nodes)
        assert possible == [found], (replicas, ranks_per_node, components)


def test_the_script_is_the_template_under_other_directives() -> None:
    layout = layout_for(config_of(), nodes=32, ranks_per_node=8)
    script = batch_script(request(layout, directives={"time": "1:00:00", "qos": "high"}))
    template = TEMPLATE.read_text()
    body = template[template.index("set -euo pipefail") :]
    assert script.endswith(body)
    expected = {
        **dict(line.removeprefix("--").partition("=")[::2] for line in directives_of(template)),
        "job-name": "mine", "nodes": "32", "time": "1:00:00", "output": "/r/logs/%x-%j.out",
        "qos": "high",
    }  # fmt: skip
    assert dict(line.removeprefix("--").partition("=")[::2] for line in directives(script)) == (
        expected
    )


def directives_of(template: str) -> list[str]:
    """Return the template's directives without their comments."""
    return [line.split()[0] for line in directives(template)]


def test_the_arguments_survive_the_shell() -> None:
    layout = layout_for(config_of(), nodes=None, ranks_per_node=8)
    script = batch_script(request(layout, settings={"MULOCO_MODULES": "a b"}))
    head = script[: script.index("set -euo pipefail")]
    done = subprocess.run(
        ["bash", "-c", f'{head}\nprintf "%s|" "$MULOCO_MODULES" "$@"'],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "a b|/r/my config.yaml|--set|a.b=[1, 2]|"


def test_parts_have_their_partitions_and_the_same_options() -> None:
    layout = layout_for(config_of(), nodes=16, ranks_per_node=8, components=4)
    script = batch_script(
        request(layout, partitions=("east", "west"), directives={"switches": "1"})
    )
    parts = "\n".join(directives(script)).split("hetjob\n")
    assert len(parts) == 4
    for part, partition in zip(parts, ("east", "west", "east", "west"), strict=True):
        assert {"--nodes=4", f"--partition={partition}", "--switches=1"} <= set(part.splitlines())
    assert str(layout).endswith("4 parts of 4 nodes and 4 replicas")


def test_with_srun_as_launcher_every_rank_is_a_task() -> None:
    layout = layout_for(config_of(), nodes=16, ranks_per_node=8)
    given = directives(batch_script(request(layout, settings={"MULOCO_LAUNCHER": "srun"})))
    assert "--ntasks-per-node=8" in given
    assert "--gpus-per-node=8" in given


# ---- the command -------------------------------------------------------------------------


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    here = os.getcwd()
    try:
        code = submit.main(["--config", str(ROOT / "configs/15b_k16.yaml"), *arguments])
    finally:
        os.chdir(here)
    assert code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--mount /data", "without --container"),
        ("--container i --mount data", "not absolute paths"),
        ("--signal-seconds 70000", "up to 65535"),
        ("--sbatch=qos", "long form"),
        ("--components 3 --partition a b", "no multiple of the 2 partitions"),
        ("--array no_such", "no such file"),
        ("--activate no_such", "no such file"),
        ("--set inner.lr_warmup=2", "Did you mean inner.lr_warmup_iters?"),
    ],
)
def test_a_command_that_cannot_work_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: str, said: str
) -> None:
    assert said in refusal(capsys, "--dry-run", *arguments.split())


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("# nothing\n", "no line with overrides"),
        ("inner.lr=1 checkpoint.dir=a monitor.dir=a\ninner.lr=2 monitor.dir=b\n"
         "inner.lr=3 checkpoint.dir=a monitor.dir=c\n", ":3: checkpoint.dir is a, as in"),
        ("inner.lr=x\n\nparallel.num_replicas=3\n", ":3: 3 replicas"),
    ],
)  # fmt: skip
def test_an_array_that_cannot_work_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, lines: str, said: str
) -> None:
    runs = tmp_path / "runs.txt"
    runs.write_text(lines)
    assert (
        f"{runs}{said}"
        if said.startswith(":")
        else said in refusal(capsys, "--dry-run", "--array", str(runs))
    )


def test_each_run_of_an_array_gets_its_own_overrides(tmp_path: Path) -> None:
    runs = tmp_path / "runs.txt"
    runs.write_text(
        "inner.lr=0.01 checkpoint.dir=runs/a monitor.dir=a\n# a comment\n"
        "'data.train=[{path: x}]' checkpoint.dir=runs/b monitor.dir=b\n"
    )
    script = dry_run("--array", str(runs), "--array-limit", "1", "--set", "inner.lr=0.5")[1]
    assert "--array=0-1%1" in directives(script)
    assert any(line.endswith("%x-%A_%a.out") for line in directives(script))
    head = script[: script.index("set -euo pipefail")]
    expected = ["inner.lr=0.5", "--set", "data.train=[{path: x}]", "checkpoint.dir=runs/b"]
    done = subprocess.run(
        ["bash", "-c", f'{head}\nprintf "%s\\n" "$MULOCO_CHECKPOINTS" "${{@:3}}"'],
        capture_output=True, text=True, check=True,
        env=os.environ | {"SLURM_ARRAY_TASK_ID": "1"},
    )  # fmt: skip
    assert done.stdout.splitlines() == ["runs/b", *expected, "monitor.dir=b"]


def dry_run(*arguments: str) -> tuple[str, str]:
    """Return the plan and the script of a dry run, which is started from another directory."""
    command = [sys.executable, str(ROOT / "launch/submit.py"), "--dry-run", *arguments]
    done = subprocess.run(
        [*command, "--config", str(ROOT / "configs/15b_k16.yaml")],
        capture_output=True, text=True, check=False, cwd="/",
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    plan, _, script = done.stdout.partition("batch script\n\n")
    return plan, script


def test_the_plan_is_that_of_the_program(tmp_path: Path) -> None:
    changed = ["--set", "outer.sync_interval=15"]
    plan, script = dry_run("--nodes", "32", "--gpu", "H200", *changed)
    command = [sys.executable, "launch/pretrain.py", "--config", f"{ROOT}/configs/15b_k16.yaml"]
    command += ["--dry-run", "--world-size", "256", "--gpu", "H200", *changed]
    program = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert plan.startswith(program.stdout)
    assert "16 replicas on 2 nodes each" in plan
    assert shlex.join(["set", "--", f"{ROOT}/configs/15b_k16.yaml", *changed]) in script
