"""Directories of Hugging Face models: `write_model`, and `ImportedModel` for the way back.

A directory holds the weights (safetensors), ``config.json``, ``generation_config.json``, the
tokenizer, a model card, and ``muloco_export.json`` with what config.json has no keys for: our own
model section and the digest of the weights. No other program needs that file.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from megatron_muloco.checkpoint.layout import write_file
from megatron_muloco.config.derived import padded_vocab_size
from megatron_muloco.config.schema import ModelConfig
from megatron_muloco.errors import ConfigError
from tools.exporting.family import Family, join, pieces, shared_config, split
from tools.exporting.gemma3 import Gemma3
from tools.exporting.lfm3 import Lfm3
from tools.exporting.llama import Llama, Qwen3
from tools.exporting.safetensors_file import SafetensorsDirectory, write_safetensors
from tools.exporting.source import Digest, TrainedModel, parameter_shapes
from tools.exporting.tokenizer_files import write_tokenizer

__all__ = ["EXPORT_FILE", "FAMILIES", "ImportedModel", "choose_family", "write_model"]

EXPORT_FILE = "muloco_export.json"

# In the order of preference where no target is named: what most programs load comes first.
FAMILIES: tuple[Family, ...] = (Llama(), Qwen3(), Gemma3(), Lfm3())


def choose_family(model: ModelConfig, wanted: str | None = None) -> Family:
    """Return the family that was asked for, or the first that can express an architecture.

    Raises:
        ConfigError: It cannot, or none can; the message says what is in the way.
    """
    reasons = {family.key: family.unsupported(model) for family in FAMILIES}
    fitting = [family for family in FAMILIES if not reasons[family.key]]
    if wanted is None:
        if fitting:
            return fitting[0]
        listed = "".join(f"\n  {key}: {'; '.join(why)}" for key, why in reasons.items())
        raise ConfigError(f"no Hugging Face class of these can express this model:{listed}")
    family = next(each for each in FAMILIES if each.key == wanted)
    if reasons[wanted]:
        use = " or ".join(each.key for each in fitting) or "none of these: use --format megatron"
        raise ConfigError(
            f"--target {wanted}: {family.model_class} cannot express this model, because "
            f"{'; '.join(reasons[wanted])}. Targets that can: {use}."
        )
    return family


def write_model(
    source: TrainedModel, family: Family, directory: Path, *, dtype: torch.dtype
) -> list[str]:
    """Write everything but the model card into an existing directory; return notes for the user.

    Raises:
        ConfigError: The tensors are not those that were saved.
    """
    model = source.model
    cut = dict(pieces(family, model, source.shapes))
    shapes = {name: shape for parts in cut.values() for name, shape in parts}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, parts in cut.items():
            values = split(family, model, name, source.tensor(name), dtype)
            yield from zip((piece for piece, _ in parts), values, strict=True)

    write_safetensors(directory, shapes, tensors(), dtype=dtype)
    digest = source.verify()
    tokenizer = write_tokenizer(source.settings.get("data", {}), model, directory)
    end = tokenizer.end_id
    config = {
        "architectures": [family.model_class],
        "model_type": family.model_type,
        **shared_config(model, dtype),
        **family.config(model),
        # Training has no id that begins a text. Defaults of the classes would be other models'.
        "bos_token_id": None,
        "eos_token_id": end,
        "pad_token_id": tokenizer.pad_id,
    }
    _write_json(directory / "config.json", config)
    generation: dict[str, Any] = {"eos_token_id": end, "pad_token_id": tokenizer.pad_id}
    padding = range(model.vocab_size, padded_vocab_size(model))
    if padding:
        generation["suppress_tokens"] = list(padding)  # ids without a token
    _write_json(directory / "generation_config.json", generation)
    facts = {
        "family": family.key,
        "dtype": str(dtype).removeprefix("torch."),
        "anchor_digest": digest,
        "step": source.description.step,
        "model": model.model_dump(mode="json"),
        "tokenizer_type": source.settings.get("data", {}).get("tokenizer_type"),
    }
    _write_json(directory / EXPORT_FILE, facts)
    return tokenizer.notes


def _write_json(path: Path, tree: Mapping[str, Any]) -> None:
    write_file(path, json.dumps(tree, indent=2) + "\n")


class ImportedModel:
    """A directory of a Hugging Face model, as parameters of ours.

    Attributes:
        directory: The directory.
        family: The family of its class.
        model: The architecture as our model section.
        exported: What ``muloco_export.json`` says; empty for a model of another origin.

    Raises:
        ConfigError: It is no such directory, its class is unknown, or our decoder cannot express
            the model.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        config = _read_json(directory / "config.json")
        names = config.get("architectures") or []
        known = {family.model_class: family for family in FAMILIES}
        if len(names) != 1 or names[0] not in known:
            raise ConfigError(
                f"{directory / 'config.json'}: architectures is {names}, and weights are read from "
                f"{', '.join(known)} only. Other classes compute something else."
            )
        self.family = known[names[0]]
        self.exported: dict[str, Any] = {}
        if (directory / EXPORT_FILE).is_file():
            self.exported = _read_json(directory / EXPORT_FILE)
        self.model = self._model(config)
        self._files = SafetensorsDirectory(directory)
        self.dtype = self._dtype()
        self.shapes = parameter_shapes(self.model)
        self._pieces = dict(pieces(self.family, self.model, self.shapes))
        self._require_tensors()
        self._digest = Digest()

    def tensor(self, name: str) -> Tensor:
        """Return a parameter of ours, whole and in fp32."""
        parts = [self._files.tensor(piece) for piece, _ in self._pieces[name]]
        values = join(self.family, self.model, name, parts, self.dtype)
        self._digest.add(name, values)
        return values

    def digest(self) -> str:
        """Return the digest of what `tensor` returned."""
        return str(self._digest)

    def _model(self, config: Mapping[str, Any]) -> ModelConfig:
        fields = self.family.model(config)
        try:
            if "model" not in self.exported:
                return ModelConfig.model_validate(fields)
            model = ModelConfig.model_validate(self.exported["model"])
        except ValidationError as error:
            raise ConfigError(f"{self.directory}: {error}") from error
        own = {**shared_config(model, torch.float32), **self.family.config(model)}
        skipped = {"dtype", "torch_dtype", "initializer_range", "use_cache", "attention_dropout"}
        changed = [
            f"{key}: {config[key]!r}, not {value!r}"
            for key, value in own.items()
            if key in config and config[key] != value and key not in skipped
        ]
        if changed:
            raise ConfigError(
                f"{self.directory}: config.json says another model than {EXPORT_FILE}: "
                f"{'; '.join(changed)}. Delete {EXPORT_FILE} to go by config.json alone."
            )
        return model

    def _dtype(self) -> torch.dtype:
        found = self._files.dtypes()
        if len(found) > 1:
            raise ConfigError(
                f"{self.directory} has weights of {', '.join(sorted(found))}; its class computes "
                "in one of them. Save the model in one dtype."
            )
        return {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[found.pop()]

    def _require_tensors(self) -> None:
        wanted = {piece: shape for parts in self._pieces.values() for piece, shape in parts}
        stored = self._files.shapes()
        wrong = [
            f"{name}: {stored.get(name, 'missing')}, not {wanted.get(name, 'absent')}"
            for name in sorted(stored.keys() | wanted.keys())
            if stored.get(name) != wanted.get(name)
        ]
        if wrong:
            raise ConfigError(
                f"{self.directory}: tensors do not fit config.json: {'; '.join(wrong[:4])}"
                f"{f' and {len(wrong) - 4} more' if len(wrong) > 4 else ''}."
            )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{path} does not exist. Give the directory of a Hugging Face model.")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(tree, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error}). Copy it again.") from error
    return tree
