"""Train a sentencepiece BPE tokenizer: ``--input FILES --output tokenizer.model``."""

import argparse
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from megatron_muloco.data.indexed import write_whole
from megatron_muloco.data.prepare import (
    BadRecord,
    Layout,
    check_inputs,
    check_outputs,
    layout_of,
    raw_records,
    text_of,
)
from megatron_muloco.data.tokenizer import tokenizer_digest, train_tokenizer
from megatron_muloco.errors import ConfigError, run_tool


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = _parser().parse_args(argv)
    return run_tool(lambda: _run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train a sentencepiece BPE tokenizer on text.")
    parser.add_argument(
        "--input", nargs="+", required=True, help="text or JSON lines, plain or .gz"
    )
    parser.add_argument(
        "--output", required=True, help="model file to write, e.g. data/tokenizer.model"
    )
    parser.add_argument(
        "--vocab-size", type=int, default=4096, help="total number of ids (default 4096)"
    )
    parser.add_argument(
        "--format", choices=("auto", "jsonl", "text", "paragraphs"), default="auto",
        help="auto: by file name; text: one document per file; paragraphs: split at blank lines",
    )  # fmt: skip
    parser.add_argument("--json-keys", default="text", help="field with the text (default text)")
    parser.add_argument(
        "--sample-fraction", type=float, default=1.0,
        help="share of the documents to read, chosen by a hash of the text; a few hundred MB of "
        "text are enough for any vocabulary and have to fit in memory",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace an existing model")
    return parser


def _run(arguments: argparse.Namespace) -> None:
    output = Path(arguments.output)
    check_outputs([output], inputs=arguments.input, overwrite=arguments.overwrite, other="--output")
    if not 0 < arguments.sample_fraction <= 1:
        raise ConfigError(f"--sample-fraction {arguments.sample_fraction} is not in (0, 1].")
    check_inputs(arguments.input)
    model = train_tokenizer(_texts(arguments), vocab_size=arguments.vocab_size)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, model)
    digest = tokenizer_digest("sentencepiece", str(output))
    print(f"{output}: {arguments.vocab_size} ids, {len(model)} bytes, digest {digest[:16]}")


def _texts(arguments: argparse.Namespace) -> Iterator[str]:
    total = sum(Path(path).stat().st_size for path in arguments.input)
    before = 0
    with tqdm(total=total, unit="B", unit_scale=True, desc="reading") as bar:
        for path in arguments.input:
            layout: Layout = layout_of(path) if arguments.format == "auto" else arguments.format
            for record in raw_records(path, layout):
                try:
                    text = text_of(record, arguments.json_keys)
                except BadRecord as error:
                    raise ConfigError(f"{error}. Repair it or leave the file out.") from error
                bar.update(before + record.consumed - bar.n)
                # A checksum makes the same choice in every run, whatever the order of the files.
                if zlib.crc32(text.encode()) < arguments.sample_fraction * 2**32:
                    yield text
            before += Path(path).stat().st_size
    print("training ...", flush=True)


if __name__ == "__main__":
    sys.exit(main())
