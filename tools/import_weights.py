"""Read a Hugging Face model: python -m tools.import_weights DIR --to CHECKPOINT.

The result holds weights only, in the form of a run's final anchor: `checkpoint.init_from` starts a
run from it, and export, generation and evaluation read it.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from megatron_muloco.errors import ConfigError, run_tool
from megatron_muloco.runtime.distributed import silence_known_warnings
from tools.export import new_directory


def import_weights(source: Path, checkpoint: Path) -> str:
    """Write the weights of a Hugging Face directory as a checkpoint; return their digest.

    Raises:
        ConfigError: It is no such directory, or our decoder cannot express the model.
    """
    silence_known_warnings()
    import yaml

    from megatron_muloco.checkpoint.io import write_description
    from megatron_muloco.checkpoint.state import ANCHOR, FORMAT, Description
    from megatron_muloco.topology import Topology
    from tools.exporting.hugging_face import ImportedModel
    from tools.exporting.torch_dist import one_rank, whole, write_torch_dist

    model = ImportedModel(source)
    with new_directory(checkpoint) as temporary, one_rank():
        tensors = [whole(f"{ANCHOR}.{name}", model.tensor(name)) for name in model.shapes]
        digest = model.digest()
        write_torch_dist(temporary, tensors, {})
        # The same files as of a final anchor, from a run that made no step.
        write_description(
            temporary,
            Description(
                format=FORMAT,
                step=0,
                topology=asdict(Topology(num_replicas=1, tensor=1, pipeline=1, data=1)),
                anchor_digest=digest,
                versions={},
                has_masters=False,
                scalars={},
                replicas=[{"digests": {ANCHOR: digest}, "inner_step": 0, "synchronizer": None}],
                config={
                    "model": model.model.model_dump(mode="json"),
                    "parallel": {"num_replicas": 1},
                    "data": _tokenizer(model),
                    # A description has these sections; no optimizer made these weights.
                    "inner": {"kind": "none"},
                    "outer": {"kind": "none"},
                },
            ),
        )
    print(f"{source}: read as {model.family.model_class}, weights of {model.dtype}")
    exported = model.exported.get("anchor_digest")
    if exported:
        same = "bit for bit those" if exported == digest else "not bit for bit those"
        print(f"the weights are {same} that were exported")
    section = yaml.safe_dump({"model": model.model.model_dump(mode="json")}, sort_keys=False)
    print(
        f"model section of a run that begins with them (checkpoint.init_from):\n{section}", end=""
    )
    print(f"wrote {checkpoint}")
    return digest


def _tokenizer(model: object) -> dict[str, str]:
    """Return the keys of the section ``data`` that name the tokenizer of the directory."""
    from tools.exporting.hugging_face import ImportedModel

    assert isinstance(model, ImportedModel)
    directory = model.directory
    if model.exported.get("tokenizer_type") == "byte-level":
        return {"tokenizer_type": "byte-level"}
    if (directory / "tokenizer.model").is_file():
        return {
            "tokenizer_type": "sentencepiece",
            "tokenizer_model": str((directory / "tokenizer.model").resolve()),
        }
    if (directory / "tokenizer.json").is_file():
        return {"tokenizer_type": "huggingface", "tokenizer_model": str(directory.resolve())}
    raise ConfigError(
        f"{directory} has no tokenizer (tokenizer.model or tokenizer.json), so no text could be "
        "given to the model. Copy it there."
    )


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description="Read the weights of a Hugging Face model.")
    parser.add_argument(
        "source", type=Path, help="directory with config.json and safetensors files"
    )
    parser.add_argument("--to", required=True, type=Path, help="checkpoint directory to make")
    arguments = parser.parse_args(argv)

    def body() -> None:
        import_weights(arguments.source, arguments.to)

    return run_tool(body)


if __name__ == "__main__":
    sys.exit(main())
