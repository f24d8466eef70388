"""Write a trained model for other programs: python -m tools.export RUN --format hf --to DIR.

RUN is a run's checkpoint directory, one checkpoint, or a final anchor. One process reads it without
a launcher, whatever layout and number of replicas wrote it.
"""

import argparse
import shutil
import sys
from pathlib import Path

from megatron_muloco.errors import ConfigError, run_tool
from megatron_muloco.runtime.distributed import silence_known_warnings

_TARGETS = ("llama", "qwen3", "gemma3", "lfm3")
_DTYPES = ("float32", "bfloat16")


def export(
    run: Path, directory: Path, *, form: str, target: str | None = None, dtype: str = "float32"
) -> list[str]:
    """Write an export and return notes about what it leaves out.

    The directory appears whole or not at all.

    Raises:
        ConfigError: There is no checkpoint, the target cannot express the model, or the directory
            exists.
    """
    silence_known_warnings()
    import torch

    from tools.exporting.card import model_card
    from tools.exporting.hugging_face import choose_family, write_model
    from tools.exporting.megatron import arguments, require_expressible, write_release
    from tools.exporting.source import TrainedModel
    from tools.exporting.torch_dist import one_rank

    if form == "megatron" and target:
        raise ConfigError("--target names a Hugging Face class; leave it out for megatron.")
    source = TrainedModel.open(run)
    family = None
    if form == "hf":
        family = choose_family(source.model, target)
    else:
        require_expressible(source.model)
    kind = getattr(torch, dtype)
    notes: list[str] = []
    with new_directory(directory) as temporary, one_rank():
        if family is None:
            write_release(source, temporary, dtype=kind)
            notes.append(f"arguments of Megatron-LM: {' '.join(arguments(source.model))}")
        else:
            notes += write_model(source, family, temporary, dtype=kind)
        (temporary / "README.md").write_text(model_card(source, family, notes), encoding="utf-8")
    name = "Megatron's GPT model" if family is None else family.model_class
    print(f"{source.path} after inner step {source.description.step}: written for {name}")
    for note in notes:
        print(f"note: {note}")
    print(f"wrote {directory}")
    return notes


class new_directory:
    """A directory that gets its name when the body ends without an error, and else is deleted."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._temporary = directory.with_name(f".tmp-{directory.name}")

    def __enter__(self) -> Path:
        if self._directory.exists():
            raise ConfigError(f"--to {self._directory} exists already. Name a new directory.")
        shutil.rmtree(self._temporary, ignore_errors=True)
        try:
            self._temporary.mkdir(parents=True)
        except OSError as error:
            raise ConfigError(f"--to {self._directory}: it cannot be made ({error}).") from error
        return self._temporary

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._temporary.rename(self._directory)
        else:
            shutil.rmtree(self._temporary, ignore_errors=True)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description="Write a trained model for other programs.")
    parser.add_argument("run", type=Path, help="checkpoint.dir of a run, or one checkpoint")
    parser.add_argument(
        "--format", required=True, choices=("hf", "megatron"), help="hf: Hugging Face"
    )
    parser.add_argument(
        "--target",
        choices=_TARGETS,
        help="Hugging Face class; by default the first of these that can express the model",
    )
    parser.add_argument("--to", required=True, type=Path, help="directory to make")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="of the weights")
    arguments = parser.parse_args(argv)
    return run_tool(
        lambda: export(
            arguments.run,
            arguments.to,
            form=arguments.format,
            target=arguments.target,
            dtype=arguments.dtype,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
