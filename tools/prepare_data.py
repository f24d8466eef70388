"""Turn text into a Megatron indexed dataset: ``--input FILES --output-prefix PREFIX``."""

import argparse
import os
import sys
from pathlib import Path

from tqdm import tqdm

from megatron_muloco.data.prepare import PrepareOptions, check_inputs, prepare
from megatron_muloco.data.tokenizer import TOKENIZER_TYPES
from megatron_muloco.errors import ConfigError, run_tool


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = _parser().parse_args(argv)
    return run_tool(lambda: _run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Write PREFIX.bin, PREFIX.json and PREFIX.idx.")
    parser.add_argument(
        "--input", nargs="+", required=True, help="text or JSON lines, plain or .gz"
    )
    parser.add_argument("--output-prefix", required=True, help="path of the dataset without suffix")
    parser.add_argument(
        "--tokenizer-type",
        choices=TOKENIZER_TYPES,
        default="sentencepiece",
        help="type of the tokenizer",
    )
    parser.add_argument("--tokenizer-model", help="file of the tokenizer; byte-level needs none")
    parser.add_argument(
        "--format", choices=("auto", "jsonl", "text", "paragraphs"), default="auto",
        help="auto: by file name; text: one document per file; paragraphs: split at blank lines",
    )  # fmt: skip
    parser.add_argument(
        "--json-keys", nargs="+", default=["text"],
        help="field with the text (default text); one per dataset",
    )  # fmt: skip
    parser.add_argument(
        "--append-eod", action=argparse.BooleanOptionalAction, default=True,
        help="end every document with the end-of-document id",
    )  # fmt: skip
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="worker processes")
    parser.add_argument(
        "--on-error", choices=("fail", "skip"), default="fail",
        help="stop at a bad record, or print, count and skip it",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    return parser


def _run(arguments: argparse.Namespace) -> None:
    if len(arguments.json_keys) != 1:
        raise ConfigError(
            f"--json-keys {' '.join(arguments.json_keys)}: a dataset has one text per record. "
            f"Run the tool once per key, each with its own --output-prefix."
        )
    if arguments.workers < 1:
        raise ConfigError(f"--workers {arguments.workers}: at least one process has to work.")
    check_inputs(arguments.input)
    options = PrepareOptions(
        tokenizer_type=arguments.tokenizer_type,
        tokenizer_model=arguments.tokenizer_model,
        layout=None if arguments.format == "auto" else arguments.format,
        json_key=arguments.json_keys[0],
        append_eod=arguments.append_eod,
        workers=arguments.workers,
        on_error=arguments.on_error,
        overwrite=arguments.overwrite,
    )
    total = sum(Path(path).stat().st_size for path in arguments.input)
    with tqdm(total=total, unit="B", unit_scale=True, desc="tokenizing") as bar:

        def show(read: int, tokens: int) -> None:
            bar.update(read - bar.n)
            bar.set_postfix_str(f"{tokens:,} tokens", refresh=False)

        manifest = prepare(
            arguments.input, arguments.output_prefix, options, progress=show,
            report_bad=lambda message: bar.write(f"skipped {message}", file=sys.stderr),
        )  # fmt: skip
    print(
        f"{arguments.output_prefix}: {manifest.documents:,} documents, {manifest.tokens:,} tokens, "
        f"{manifest.text_bytes / manifest.tokens:.2f} bytes per token, "
        f"{manifest.skipped} skipped, {manifest.empty} empty"
    )


if __name__ == "__main__":
    sys.exit(main())
