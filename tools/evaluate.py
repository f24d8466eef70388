"""Loss and bits per byte of a trained model: python -m tools.evaluate RUN [--text FILE ...].

RUN is a run's checkpoint directory, one checkpoint, or a final anchor. Without --text it evaluates
on the run's held-out data, on the same samples as training did.
"""

import argparse
import json
import sys
from pathlib import Path

from megatron_muloco.errors import ConfigError, run_tool
from megatron_muloco.runtime.distributed import silence_known_warnings


def read_texts(path: Path) -> list[str]:
    """Return the documents of a file: the ``text`` of each line of JSON Lines, or the whole file.

    Raises:
        ConfigError: It does not exist, or a line has no text.
    """
    if not path.is_file():
        raise ConfigError(f"--text {path} does not exist.")
    try:
        content = path.read_text(encoding="utf-8")
        if path.suffix != ".jsonl":
            return [content]
        return [str(json.loads(line)["text"]) for line in content.splitlines() if line.strip()]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--text {path}: {type(error).__name__}: {error}. It has to be UTF-8, and a line of "
            'JSON Lines has to be {"text": "..."}.'
        ) from error


def evaluate(arguments: argparse.Namespace) -> None:
    """Print the losses.

    Raises:
        ConfigError: There is no checkpoint, or a text cannot be read.
    """
    texts = {path: read_texts(path) for path in arguments.text}
    silence_known_warnings()
    from tools.exporting.live import live_model
    from tools.exporting.scoring import held_out, score_texts

    with live_model(
        arguments.run, precision=arguments.precision, tokenizer=arguments.tokenizer
    ) as live:
        print(f"{live.source.path} after inner step {live.source.description.step}")
        if not texts:
            print(f"data.{arguments.split}: {held_out(live, arguments.split)}")
        for path, documents in texts.items():
            print(f"{path}: {score_texts(live, documents)}")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description="Loss and bits per byte of a trained model.")
    parser.add_argument("run", type=Path, help="checkpoint.dir of a run, or one checkpoint")
    parser.add_argument("--split", choices=("valid", "test"), default="valid", help="of the run")
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="files of text or .jsonl")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--tokenizer", help="where the tokenizer is, if it has moved")
    arguments = parser.parse_args(argv)
    return run_tool(lambda: evaluate(arguments))


if __name__ == "__main__":
    sys.exit(main())
