"""Bad input: exit code 2 and the message that docs/guides/errors.md shows, never a stack trace."""

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from unittest import mock

import pytest
import yaml

from megatron_muloco.data.prepare import PrepareOptions, prepare
from megatron_muloco.data.tokenizer import train_tokenizer
from megatron_muloco.training.main import main
from tests.support.byte_runs import byte_config, byte_dataset
from tests.support.spawn import run_ranks

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "guides" / "errors.md"
REPORT = re.compile(r"^\d+ problems? in the input:$", re.MULTILINE)


@dataclass
class Example:
    """Block of the guide: its files, the command, and the message of the program."""

    command: str = ""
    files: dict[str, str] = field(default_factory=dict)
    said: str = ""

    @property
    def resumes(self) -> bool:
        """Whether the message comes from ranks that have started."""
        return "--config run.yaml" in self.command


def blocks_of(text: str) -> Iterator[Example]:
    """Read the fenced blocks that begin with a command."""
    for block in re.findall(r"^```\n(\$ .*?)^```$", text, re.MULTILINE | re.DOTALL):
        shown = Example()
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, rest = part.partition("\n")
            if command.startswith("cat "):
                shown.files[command.removeprefix("cat ")] = rest
            else:
                shown.command, shown.said = command, rest
        yield shown


SHOWN = list(blocks_of(GUIDE.read_text(encoding="utf-8")))


def arguments_of(command: str) -> tuple[list[str], dict[str, str]]:
    """Return the arguments of the program and the environment that a launcher would set."""
    words = shlex.split(command)
    script = words.index("launch/pretrain.py")
    environment = {}
    if "--num_accelerators" in words[:script]:
        world = words[words.index("--num_accelerators") + 1]
        environment = {"RANK": "0", "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1"}
    return words[script + 1 :], environment


def said_by(arguments: list[str], directory: Path) -> tuple[object, str]:
    """Run the program in this process; return its exit code and its report."""
    errors = io.StringIO()
    with (
        contextlib.chdir(directory),
        contextlib.redirect_stderr(errors),
        contextlib.redirect_stdout(io.StringIO()),
        mock.patch.object(os, "_exit", sys.exit),
        pytest.raises(SystemExit) as exit_,
    ):
        main(arguments)
    text = errors.getvalue()
    report = REPORT.search(text)
    return exit_.value.code, text[report.start() :] if report else text


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory after `make demo`, with a smaller text."""
    directory = tmp_path_factory.mktemp("clone")
    (directory / "configs").symlink_to(ROOT / "configs")
    demo = directory / "data" / "demo"
    demo.mkdir(parents=True)
    paragraphs = [p for text in topics.values() for p in text.split("\n\n")]
    (demo / "tokenizer.model").write_bytes(train_tokenizer(paragraphs, vocab_size=4096))
    (demo / "text.txt").write_text("\n\n".join(paragraphs[:200]))
    options = PrepareOptions(
        "sentencepiece", str(demo / "tokenizer.model"), layout="paragraphs", workers=1
    )
    for name in ("train", "valid"):
        prepare([str(demo / "text.txt")], str(demo / name), options)
    return directory


@pytest.mark.parametrize(
    "shown", [s for s in SHOWN if not s.resumes], ids=lambda s: s.command.split()[-1]
)
def test_bad_input_is_explained_as_the_guide_shows(
    shown: Example, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in shown.files.items():
        (directory / name).write_text(text)
    arguments, environment = arguments_of(shown.command)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code, said = said_by(arguments, directory)
    assert (code, said.replace(str(directory), "/where/you/are")) == (2, shown.said)


def said_in_rank(commands: list[list[str]], directory: Path) -> list[tuple[object, str]]:
    from megatron_muloco.runtime.parallel_state import unmirror_groups

    said = []
    for arguments in commands:
        with mock.patch("megatron_muloco.training.loop.shutdown"):
            said.append(said_by(arguments, directory))
        unmirror_groups()
    return said


def without_sizes(text: str) -> str:
    return re.sub(r"\d+ bytes of \d+", "N bytes of N", text)


def test_checkpoints_are_refused_as_the_guide_shows(tmp_path: Path) -> None:
    config = byte_config(
        byte_dataset(tmp_path),
        training={"train_iters": 2},
        inner={"kind": "adamw", "lr": 0.003, "lr_warmup_iters": 1, "weight_decay": 0.01},
        checkpoint={"dir": "runs/mine"},
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    (trained,) = run_ranks(said_in_rank, 1, [["--config", "run.yaml"]], tmp_path)
    assert trained[0][0] == 0, trained
    runs = tmp_path / "runs"
    for name in ("other", "short"):
        shutil.copytree(runs / "mine", runs / name)
    (runs / "other" / "iter_0000002" / "muloco.json").unlink()
    tensors = runs / "short" / "iter_0000002" / "__0_0.distcp"
    tensors.write_bytes(tensors.read_bytes()[:-1000])
    shown = [s for s in SHOWN if s.resumes]
    (answers,) = run_ranks(said_in_rank, 1, [arguments_of(s.command)[0] for s in shown], tmp_path)
    for (code, said), expected in zip(answers, shown, strict=True):
        assert (code, without_sizes(said)) == (2, without_sizes(expected.said))


def test_the_real_command_refuses_without_a_stack_trace(directory: Path) -> None:
    command = [sys.executable, str(ROOT / "launch" / "pretrain.py"), "--config", "none.yaml"]
    done = subprocess.run(
        command,
        cwd=directory,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "none.yaml" in done.stderr
    assert "Traceback" not in done.stderr


def test_other_ranks_leave_the_word_to_the_first(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_muloco.training import main as module

    waited: list[float] = []
    monkeypatch.setattr(module.time, "sleep", waited.append)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    code, said = said_by(["--config", "none.yaml"], directory)
    assert code == 2
    assert waited
    assert waited[0] > 1  # the launcher looks once a second
    assert said.startswith("1 problem in the input on rank 1:")
