"""`Run`: one training run of a study, with its settings, its config and its key.

The key is a digest of everything that the run's file and the study say, and of the data. Two slices
that ask for the same run share it, and a run that is in the table is not repeated. Defaults of the
program are not part of it: the column ``commit`` says which program ran.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from typing import Any

from megatron_muloco.config import RunConfig, load_config
from megatron_muloco.config.derived import parameter_counts
from megatron_muloco.config.load import load_document
from megatron_muloco.data.indexed import read_manifest
from megatron_muloco.errors import ConfigError
from tools.sweeps.study import TOKENS, Cell, Study

__all__ = ["Run", "Runs"]

_SPLITS = ("train", "valid", "test")
_BATCH, _MICRO_BATCH = "training.global_batch_size", "training.micro_batch_size"

Point = tuple[tuple[str, float], ...]
"""Key of an axis -> its value."""


@dataclass(frozen=True)
class Run:
    """A run that a cell asks for.

    Attributes:
        key: Digest of settings and data; equal keys are the same run.
        size: Name of the size.
        method: Name of the method.
        variant: Name of the variant, ``""`` for none.
        replicas: K.
        seed: Seed of weights and of the order of samples.
        params: Parameters without embedding and output head.
        params_total: All parameters.
        steps: Inner steps.
        batch_tokens: Tokens of a step over all replicas.
        seq_length: Tokens of a sequence.
        settings: Key -> value of what the study varies.
        overrides: ``key=value`` texts that make the run's config of the base file.
    """

    key: str
    size: str
    method: str
    variant: str
    replicas: int
    seed: int
    params: int
    params_total: int
    steps: int
    batch_tokens: int
    seq_length: int
    settings: Mapping[str, Any] = field(repr=False)
    overrides: tuple[str, ...] = field(repr=False)

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return self.steps * self.batch_tokens

    @property
    def work(self) -> float:
        """Estimate of the run's length for the progress bar: 6 x parameters x tokens, in FLOPs."""
        return 6.0 * self.params_total * self.tokens


class Runs:
    """Makes the runs of a study, each once.

    Args:
        study: The study.
    """

    def __init__(self, study: Study) -> None:
        self._study = study
        self._made: dict[tuple[Any, ...], Run] = {}

    @cached_property
    def _given(self) -> dict[str, Any]:
        """Batches of the base file by dotted key; a run needs them before its config is whole."""
        training = load_document(self._study.base).values["training"]
        return {key: training[key.rpartition(".")[2]] for key in (_BATCH, _MICRO_BATCH)}

    @cached_property
    def data(self) -> str:
        """Digest of the study's texts and tokenizer, 8 characters.

        Raises:
            ConfigError: A dataset is missing.
        """
        document = load_document(self._study.base, _texts(self._study.settings)).values
        found = []
        for split in _SPLITS:
            for entry in document["data"].get(split) or []:
                manifest = read_manifest(entry["path"])
                if manifest is None:
                    raise ConfigError(
                        f"{self._study.path}: data.{split} {entry['path']} has no manifest, so "
                        "nothing tells whether runs of this table share their data. Prepare it "
                        "with tools/prepare_data.py."
                    )
                origin = (manifest.origin or {}).get("digest", "")
                identity = [manifest.tokens, manifest.documents, manifest.tokenizer_digest, origin]
                found.append([split, entry.get("weight", 1.0), *identity])
        return sha256(json.dumps(found).encode()).hexdigest()[:8]

    def run(self, cell: Cell, taken: Mapping[str, Any], point: Point, seed: int) -> Run:
        """Return the run of a cell at a point.

        Args:
            cell: The cell.
            taken: Best values of earlier slices.
            point: Values of the cell's axes.
            seed: Seed of the run.

        Raises:
            ConfigError: The settings are no valid config; the cell and the point are named.
        """
        identity = (cell.name, json.dumps(dict(taken)), point, seed)
        if identity not in self._made:
            try:
                self._made[identity] = self._make(cell, dict(taken), point, seed)
            except ConfigError as error:
                at = ", ".join(f"{key} = {value}" for key, value in point)
                where = f"{self._study.path}: slice {cell.name}" + (f" at {at}" if at else "")
                raise ConfigError([f"{where}: {text}" for text in error.problems]) from None
        return self._made[identity]

    def config(self, run: Run) -> RunConfig:
        """Return the run's config."""
        return load_config(self._study.base, run.overrides)

    def _make(self, cell: Cell, taken: dict[str, Any], point: Point, seed: int) -> Run:
        study = self._study
        chosen = {
            **study.methods[cell.method],
            **taken,
            **cell.part.settings,
            **dict(cell.over),
            **cell.part.variants[cell.variant],
            **dict(point),
        }
        ratio = float(chosen.pop(TOKENS, study.tokens_per_parameter))
        fixed = {
            **study.settings,
            **study.sizes[cell.size],
            **chosen,
            "parallel.num_replicas": cell.replicas,
            "training.seed": seed,
            "data.seed": seed,
            "checkpoint.dir": None,
            "checkpoint.save_interval": 0,
            "monitor.dir": None,
        }
        fixed = {**fixed, **self._lengths(fixed, cell, ratio)}
        overrides = tuple(_texts(fixed))
        config = load_config(study.base, overrides)
        counts = parameter_counts(config.model)
        return Run(
            key=self._key(overrides),
            size=cell.size,
            method=cell.method,
            variant=cell.variant,
            replicas=cell.replicas,
            seed=seed,
            params=counts.total - counts.embedding - counts.output,
            params_total=counts.total,
            steps=int(fixed["training.train_iters"]),
            batch_tokens=config.training.global_batch_size * config.model.seq_length,
            seq_length=config.model.seq_length,
            settings={TOKENS: ratio, **chosen},
            overrides=overrides,
        )

    def _lengths(self, fixed: Mapping[str, Any], cell: Cell, ratio: float) -> dict[str, Any]:
        """Return the settings that follow from the batch and the token budget."""
        study = self._study
        base = load_config(study.base, _texts({**fixed, **_divisible(cell.replicas)}))
        batch = _batch({**self._given, **fixed}, cell)
        counts = parameter_counts(base.model)
        params = counts.total
        if not study.count_embeddings:
            params -= counts.embedding + counts.output
        steps = ratio * params / (batch * base.model.seq_length)
        multiple = cell.part.steps_multiple or study.steps_multiple
        iterations = max(multiple, round(steps / multiple) * multiple)
        lengths = {
            _BATCH: batch,
            _MICRO_BATCH: _micro_batch({**self._given, **fixed}, batch // cell.replicas),
            "training.train_iters": iterations,
            "training.eval_interval": iterations,
        }
        if study.warmup_fraction is not None:
            lengths["inner.lr_warmup_iters"] = round(study.warmup_fraction * iterations)
        return lengths

    def _key(self, overrides: tuple[str, ...]) -> str:
        """Return the digest of a run's merged file and its data, wherever the data lies."""
        values = load_document(self._study.base, overrides).values
        for section in ("monitor", "checkpoint"):
            values.pop(section, None)
        for name in (*_SPLITS, "tokenizer_model", "cache_dir"):
            values["data"].pop(name, None)
        text = json.dumps([values, self.data], sort_keys=True)
        return sha256(text.encode()).hexdigest()[:12]


def _divisible(replicas: int) -> dict[str, Any]:
    """Return a batch that fits every K, to read a model before its batch is known."""
    return {_BATCH: replicas, _MICRO_BATCH: 1}


def _batch(settings: Mapping[str, Any], cell: Cell) -> int:
    """Return the sequences of a step.

    Raises:
        ConfigError: The replicas cannot share it evenly.
    """
    batch = int(settings[_BATCH])
    if batch % cell.replicas:
        raise ConfigError(
            f"{_BATCH} is {batch} sequences, which {cell.replicas} replicas cannot share evenly. "
            "Leave this K out of the slice, or take another batch."
        )
    return batch


def _micro_batch(settings: Mapping[str, Any], share: int) -> int:
    """Return the largest divisor of a replica's share that is at most the file's micro batch."""
    largest = min(share, int(settings[_MICRO_BATCH]))
    return next(size for size in range(largest, 0, -1) if share % size == 0)


def _texts(settings: Mapping[str, Any]) -> list[str]:
    """Return settings as ``--set`` texts; JSON is YAML."""
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]
