"""Writes a run's tokenizer in the form of the tokenizers library, which gives the same ids.

- ``sentencepiece`` BPE as `tools/train_tokenizer.py` trains it: a BPE with byte fallback. Its pairs
  are every cut of a piece into two pieces, in the order of the pieces, which is the order in which
  sentencepiece joins them.
- ``byte-level``: every byte is its own id.
- ``huggingface``: the files of a local directory, copied.

Others are left out with a note: a tokenizer that gives other ids would be worse than none.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_muloco.checkpoint.layout import write_file
from megatron_muloco.config.schema import ModelConfig

__all__ = ["Written", "bpe_tokenizer", "byte_tokenizer", "write_tokenizer"]

_BLANK = "▁"  # sentencepiece's own mark of a blank
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # types of pieces in a sentencepiece model
_BPE = 2  # sentencepiece's model type


@dataclass
class Written:
    """What is known of a tokenizer.

    Attributes:
        end_id: Id that ends a document; ``None`` where it is not known.
        pad_id: Id of padding; ``None`` without one.
        notes: What the user should know.
    """

    end_id: int | None = None
    pad_id: int | None = None
    notes: list[str] = field(default_factory=list)


def write_tokenizer(data: Mapping[str, Any], model: ModelConfig, directory: Path) -> Written:
    """Write the tokenizer of a run's ``data`` section into ``directory``."""
    kind, path = data.get("tokenizer_type"), Path(data.get("tokenizer_model") or "")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.seq_length,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "add_eos_token": False,
    }
    if kind == "byte-level":
        tokenizer = byte_tokenizer()
        _write(directory, tokenizer, {**settings, "eos_token": "<0x00>"})
        return Written(end_id=0)
    if kind not in ("sentencepiece", "huggingface"):
        return Written(notes=[f"no tokenizer was written: {kind} has no form in that library"])
    if not path.exists():
        return Written(
            notes=[f"no tokenizer was written: {path} does not exist here; name it by --tokenizer"]
        )
    if kind == "huggingface":
        return _copy(path, directory)
    shutil.copyfile(path, directory / "tokenizer.model")
    pieces, problem = _sentencepiece(path)
    if problem:
        return Written(
            notes=[f"tokenizer.model was copied, but no tokenizer.json was written: {problem}"]
        )
    tokenizer, special = bpe_tokenizer(pieces)
    _write(directory, tokenizer, {**settings, **{f"{k}_token": v for k, v in special.items()}})
    ids = {piece: place for place, (piece, _) in enumerate(pieces)}
    return Written(end_id=ids.get(special.get("eos", "")), pad_id=ids.get(special.get("pad", "")))


def _write(directory: Path, tokenizer: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    text = json.dumps(tokenizer, ensure_ascii=False, indent=1)
    write_file(directory / "tokenizer.json", text + "\n")
    write_file(directory / "tokenizer_config.json", json.dumps(settings, indent=1) + "\n")


def _copy(path: Path, directory: Path) -> Written:
    kept = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json",
            "merges.txt", "tokenizer.model", "added_tokens.json", "vocab.txt",
            "spiece.model")  # fmt: skip
    for name in kept:
        if (path / name).is_file():
            shutil.copyfile(path / name, directory / name)
    return Written(notes=["eos_token_id is not in config.json: the tokenizer's own files name it"])


def _sentencepiece(path: Path) -> tuple[list[tuple[str, int]], str]:
    """Return (piece, type) by id, and why the model has no equal in the other library."""
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(path.read_bytes())
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    kinds = {piece.type for piece in proto.pieces}
    checks = {
        "it is no BPE model": trainer.model_type == _BPE,
        "it normalises text": normalizer.name == "identity",
        "it adds a blank in front": not normalizer.add_dummy_prefix,
        "it removes blanks": not normalizer.remove_extra_whitespaces,
        "it has no byte pieces": _BYTE in kinds,
        "it has pieces of other kinds": kinds <= {_NORMAL, _UNKNOWN, _CONTROL, _BYTE},
    }
    problem = "; ".join(text for text, holds in checks.items() if not holds)
    return [(piece.piece, piece.type) for piece in proto.pieces], problem


def bpe_tokenizer(pieces: list[tuple[str, int]]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a tokenizer.json, and the special tokens by their names in tokenizer_config.json.

    Args:
        pieces: (piece, sentencepiece's type) by id.
    """
    vocabulary = {piece: place for place, (piece, _) in enumerate(pieces)}
    normal = {piece: place for place, (piece, kind) in enumerate(pieces) if kind == _NORMAL}
    merges: list[tuple[int, int, int, list[str]]] = []
    for piece, place in normal.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in normal and right in normal:
                merges.append((place, normal[left], normal[right], [left, right]))
    control = [piece for piece, kind in pieces if kind in (_UNKNOWN, _CONTROL)]
    names = {"<unk>": "unk", "</s>": "eos", "<pad>": "pad"}
    special = {names[piece]: piece for piece in control if piece in names}
    tree = _tokenizer(vocabulary, [pair for *_, pair in sorted(merges)], special.get("unk"))
    tree["added_tokens"] = [_added(vocabulary[piece], piece) for piece in control]
    return tree, special


def byte_tokenizer() -> dict[str, Any]:
    """Return a tokenizer.json of bytes; the other 256 ids of Megatron's are unused."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocabulary |= {f"<unused{place}>": place for place in range(256, 512)}
    tree = _tokenizer(vocabulary, [], None)
    tree["normalizer"] = None  # a blank is a byte as any other
    tree["decoder"]["decoders"].pop(0)
    tree["added_tokens"] = [_added(0, "<0x00>")]
    return tree


def _added(place: int, piece: str) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": place, "content": piece, **plain, "special": True}


def _tokenizer(
    vocabulary: Mapping[str, int], merges: list[list[str]], unknown: str | None
) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": _BLANK},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _BLANK}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": dict(vocabulary),
            "merges": merges,
        },
    }
