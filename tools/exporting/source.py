"""`TrainedModel`: model, facts and weights of a checkpoint, read by one process without a launcher.

Weights are read one tensor at a time, whole and in fp32, whatever layout and number of replicas
wrote them. `TrainedModel.verify` compares what was read with the digest of the save.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from pydantic import ValidationError
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from megatron_muloco.checkpoint.directory import missing_bytes, read_index, read_tensors
from megatron_muloco.checkpoint.layout import FINAL_ANCHOR, STATE_FILE, resolve
from megatron_muloco.checkpoint.sharding import digest_sum, render
from megatron_muloco.checkpoint.state import ANCHOR, Description, read_description
from megatron_muloco.config.derived import padded_vocab_size
from megatron_muloco.config.schema import ModelConfig
from megatron_muloco.errors import CheckpointError, ConfigError
from megatron_muloco.params import GPT_NAMES, ParamInfo, Shard

__all__ = ["Digest", "TrainedModel", "model_section", "parameter_shapes"]


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the name and whole shape of every parameter of a model, layer by layer."""
    hidden, width = model.hidden_size, model.kv_channels
    heads, groups, ffn = model.num_attention_heads, model.query_groups, model.ffn_hidden_size
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attention.linear_qkv.weight": ((heads + 2 * groups) * width, hidden),
        "self_attention.linear_proj.weight": (hidden, heads * width),
        "pre_mlp_layernorm.weight": (hidden,),
        "mlp.linear_fc1.weight": (2 * ffn, hidden),
        "mlp.linear_fc2.weight": (hidden, ffn),
    }
    if model.qk_layernorm:
        layer["self_attention.q_layernorm.weight"] = (width,)
        layer["self_attention.k_layernorm.weight"] = (width,)
    if model.post_layernorm:
        layer["self_attention.linear_proj.post_norm.weight"] = (hidden,)
        layer["mlp.linear_fc2.post_norm.weight"] = (hidden,)
    vocabulary = (padded_vocab_size(model), hidden)
    shapes: dict[str, tuple[int, ...]] = {GPT_NAMES.embedding: vocabulary}
    for number in range(model.num_layers):
        shapes |= {GPT_NAMES.in_layer(number, name): shape for name, shape in layer.items()}
    shapes["decoder.final_layernorm.weight"] = (hidden,)
    if model.untie_embeddings_and_output_weights:
        shapes[GPT_NAMES.output] = vocabulary
    return shapes


def model_section(tree: Mapping[str, Any], where: object) -> ModelConfig:
    """Return the section ``model`` of a resolved configuration.

    Raises:
        ConfigError: It is missing, or this version of the package does not know a key of it.
    """
    try:
        return ModelConfig.model_validate(dict(tree["model"]))
    except (KeyError, TypeError, ValidationError) as error:
        first = str(error).strip().replace("\n", " ")
        raise ConfigError(
            f"{where}: its configuration has no model section that this version reads ({first}). "
            "Use the version of the package that wrote it."
        ) from error


class Digest:
    """Digest of whole parameters that come one after the other; independent of their order."""

    def __init__(self) -> None:
        self._sums: dict[str, int] = {}

    def add(self, name: str, values: Tensor) -> None:
        """Count a parameter, once however often it is given."""
        shard = Shard(ParamInfo.from_name(name, tuple(values.shape), None), 0, values.numel())
        device = torch.device("cpu")
        total = digest_sum([(shard, values)], tensor_rank=0, tensor_size=1, device=device)
        self._sums[name] = int(total)

    def names(self) -> set[str]:
        """Return the parameters that were counted."""
        return set(self._sums)

    def __str__(self) -> str:
        return render(sum(self._sums.values()))


class TrainedModel:
    """The anchor of a checkpoint.

    Attributes:
        path: The checkpoint.
        description: Its plain values.
        model: The architecture.
        shapes: Name -> shape of every parameter.
    """

    def __init__(
        self, path: Path, description: Description, model: ModelConfig, index: Metadata
    ) -> None:
        self.path, self.description, self.model = path, description, model
        self.shapes = parameter_shapes(model)
        self._index = index
        self._digest = Digest()

    @classmethod
    def open(cls, path: Path) -> "TrainedModel":
        """Return the model of a run's latest checkpoint, or of the checkpoint that ``path`` is.

        The anchor after the final flush is preferred where there is one.

        Raises:
            ConfigError: There is no checkpoint, it is incomplete, or its tensors are not those of
                its architecture.
        """
        with as_config_errors():
            path = resolve(path)
            if (path / FINAL_ANCHOR / STATE_FILE).is_file():
                path = path / FINAL_ANCHOR
            description = read_description(path)
            index = _index(path, description)
        model = model_section(description.config, path)
        found = cls(path, description, model, index)
        found._require_architecture()
        return found

    @property
    def settings(self) -> Mapping[str, Any]:
        """The resolved configuration of the run that saved the checkpoint."""
        return self.description.config

    def tensor(self, name: str) -> Tensor:
        """Return a parameter, whole and in fp32, in host memory."""
        shape = self.shapes[name]
        values = torch.full(shape, float("nan"))
        whole = ShardedTensor(
            key=f"{ANCHOR}.{name}",
            data=values,
            dtype=values.dtype,
            local_shape=shape,
            global_shape=shape,
            global_offset=(0,) * len(shape),
            axis_fragmentations=None,
        )
        with as_config_errors():
            read_tensors(self.path, self._index, [whole])
        self._digest.add(name, values)
        return values

    def verify(self) -> str:
        """Return the digest of the anchor, after every parameter has been read.

        Raises:
            ConfigError: The tensors that were read are not those that were saved.
        """
        unread = self.shapes.keys() - self._digest.names()
        assert not unread, f"not read yet: {sorted(unread)}"
        if str(self._digest) != self.description.anchor_digest:
            raise ConfigError(
                f"{self.path}: the weights that were read have digest {self._digest}, but those "
                f"that were saved have {self.description.anchor_digest}, so a file has changed "
                "since. Nothing was written. Use another checkpoint."
            )
        return str(self._digest)

    def _require_architecture(self) -> None:
        prefix = f"{ANCHOR}."
        stored = {
            key.removeprefix(prefix): tuple(getattr(entry, "size", ()))
            for key, entry in self._index.state_dict_metadata.items()
            if key.startswith(prefix)
        }
        wrong = sorted(
            name
            for name in stored.keys() | self.shapes.keys()
            if stored.get(name) != self.shapes.get(name)
        )
        if wrong:
            lines = "".join(
                f"\n  {name}: {stored.get(name, 'missing')} in the checkpoint, "
                f"{self.shapes.get(name, 'absent')} in the model"
                for name in wrong[:4]
            )
            more = f"\n  and {len(wrong) - 4} more" if len(wrong) > 4 else ""
            raise ConfigError(
                f"{self.path} holds another architecture than its model section says:{lines}{more}"
                "\nOnly the decoder of this package (docs/reference/config.md, model) is read."
            )


@contextmanager
def as_config_errors() -> Iterator[None]:
    """Turn errors of reading a checkpoint into a ConfigError, which `run_tool` prints.

    Reading a damaged file can raise anything.
    """
    try:
        yield
    except ConfigError:
        raise
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError) as error:
        raise ConfigError(
            f"the checkpoint cannot be read ({type(error).__name__}: {error}). Use another one."
        ) from error


def _index(path: Path, description: Description) -> Metadata:
    index = read_index(path, description.index_digest)
    if problems := missing_bytes(path, index):
        raise CheckpointError(f"the checkpoint {path} is incomplete: {'; '.join(problems[:4])}.")
    return index
