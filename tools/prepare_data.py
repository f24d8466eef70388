"""Turn text into a Megatron indexed dataset: ``--input FILES --output-prefix PREFIX``."""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from megatron_muloco.data.prepare import (
    Part,
    PrepareOptions,
    check_inputs,
    check_prefix,
    prepare,
)
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
    parser.add_argument(
        "--split", type=float, metavar="SHARE",
        help="hold out this share of the documents: PREFIX_train and PREFIX_valid are written",
    )  # fmt: skip
    parser.add_argument("--split-seed", type=int, default=0, help="another seed, another split")
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
    if arguments.split is not None and not 0 < arguments.split < 1:
        raise ConfigError(f"--split {arguments.split}: the share held out is between 0 and 1.")
    if not 0 <= arguments.split_seed < 2**64:
        raise ConfigError(f"--split-seed {arguments.split_seed}: use a number from 0 to 2^64 - 1.")
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
    prefix = arguments.output_prefix
    if arguments.split is None:
        _write(arguments.input, prefix, options)
        return
    outputs = {f"{prefix}_train": False, f"{prefix}_valid": True}
    for output in outputs:  # both, before the first is written
        check_prefix(arguments.input, output, options)
    for output, valid in outputs.items():
        part = Part(arguments.split, arguments.split_seed, valid)
        _write(arguments.input, output, replace(options, part=part))


def _write(inputs: list[str], prefix: str, options: PrepareOptions) -> None:
    total = sum(Path(path).stat().st_size for path in inputs)
    with tqdm(total=total, unit="B", unit_scale=True, desc="tokenizing") as bar:

        def show(read: int, tokens: int) -> None:
            bar.update(read - bar.n)
            bar.set_postfix_str(f"{tokens:,} tokens", refresh=False)

        manifest = prepare(
            inputs, prefix, options, progress=show,
            report_bad=lambda message: bar.write(f"skipped {message}", file=sys.stderr),
        )  # fmt: skip
    print(
        f"{prefix}: {manifest.documents:,} documents, {manifest.tokens:,} tokens, "
        f"{manifest.text_bytes / manifest.tokens:.2f} bytes per token, "
        f"{manifest.skipped} skipped, {manifest.empty} empty"
    )


if __name__ == "__main__":
    sys.exit(main())
