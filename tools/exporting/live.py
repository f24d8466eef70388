"""`LiveModel`: a checkpoint's anchor in our own model, on one rank, to generate and to evaluate."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_muloco.comm.groups import Groups
from megatron_muloco.config import RunConfig
from megatron_muloco.data.tokenizer import Tokenizer, load_tokenizer
from megatron_muloco.errors import ConfigError
from megatron_muloco.model.build import build_model
from megatron_muloco.model.names import named_parameters
from megatron_muloco.runtime.distributed import shutdown
from megatron_muloco.runtime.parallel_state import unmirror_groups
from megatron_muloco.training.forward import generate
from megatron_muloco.training.start import initialize_replicas
from tools.exporting.source import TrainedModel

__all__ = ["LiveModel", "live_config", "live_model"]

# The data of a checkpoint that was not trained here; nothing reads it.
_NO_DATA = {"train": ({"path": "none"},)}
_TRAINING = {"micro_batch_size": 1, "global_batch_size": 1, "train_iters": 1}
_INNER = {"kind": "adamw", "lr": 1e-3, "lr_warmup_iters": 0, "weight_decay": 0.0}


def live_config(source: TrainedModel, *, precision: str, tokenizer: str | None) -> RunConfig:
    """Return the configuration of the run that wrote a checkpoint, for one rank.

    Args:
        source: The checkpoint.
        precision: Dtype of the forward pass.
        tokenizer: Where the tokenizer is now; by default where it was in training.

    Raises:
        ConfigError: This version of the package does not know a key.
    """
    saved: Mapping[str, Any] = source.settings
    data = {**_NO_DATA, **saved.get("data", {})}
    if tokenizer is not None:
        data["tokenizer_model"] = tokenizer
    training = {**_TRAINING, **saved.get("training", {}), "precision": precision}
    # A length in tokens would be one of another batch here; nothing is trained.
    training |= {"train_tokens": None, "tokens_per_parameter": None, "train_iters": 1}
    training |= {"rampup_batch_size": None, "deterministic": False}
    tree = {
        # Nothing is drawn, and "megatron" is there for every architecture.
        "model": {**source.model.model_dump(), "transformer_impl": "local", "init": "megatron"},
        "parallel": {},
        "data": data,
        "training": {key: value for key, value in training.items() if value is not None},
        "inner": _INNER,
        "outer": {"kind": "none"},
    }
    try:
        return RunConfig.model_validate(tree)
    except ValueError as error:
        raise ConfigError(f"{source.path}: its configuration cannot be used ({error})") from error


class LiveModel:
    """Weights in Megatron's model.

    Attributes:
        source: The checkpoint.
        config: The configuration that the model was built from.
        groups: Groups of the one rank.
        model: The model.
    """

    def __init__(self, source: TrainedModel, config: RunConfig, groups: Groups) -> None:
        self.source, self.config, self.groups = source, config, groups
        self.model = build_model(config, groups, draw=False)
        with torch.no_grad():
            for name, parameter in named_parameters(self.model):
                parameter.copy_(source.tensor(name))
        source.verify()
        self.model.eval()
        self._tokenizer: Tokenizer | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the training data."""
        if self._tokenizer is None:
            data = self.config.data
            self._tokenizer = load_tokenizer(
                data.tokenizer_type,
                data.tokenizer_model,
                model_vocab_size=self.config.model.vocab_size,
            )
        return self._tokenizer

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Return fp32 logits in host memory.

        Shapes: tokens [b, s], s at most ``model.seq_length``; the result [b, s, V].
        """
        device = next(self.model.parameters()).device
        positions = torch.arange(tokens.size(1), device=device).unsqueeze(0)
        found: Tensor = self.model(tokens.to(device), positions, None)
        return found.float().cpu()

    def continuation(
        self, prompt: list[int], *, length: int, temperature: float, top_p: float, seed: int
    ) -> list[int]:
        """Return the tokens after a prompt, up to the end of the document."""
        return generate(
            self.model,
            prompt,
            length=length,
            window=self.config.model.seq_length,
            vocab_size=min(self.tokenizer.vocab_size, self.config.model.vocab_size),
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            end=self.tokenizer.eod,
        )


@contextmanager
def live_model(
    path: Path, *, precision: str = "fp32", tokenizer: str | None = None
) -> Iterator[LiveModel]:
    """Load a run's latest checkpoint, or one checkpoint, as a job of one rank.

    Raises:
        ConfigError: See `TrainedModel.open` and `live_config`.
    """
    source = TrainedModel.open(path)
    config = live_config(source, precision=precision, tokenizer=tokenizer)
    started = not torch.distributed.is_initialized()
    groups = initialize_replicas(config)
    try:
        yield LiveModel(source, config, groups)
    finally:
        unmirror_groups()
    if started:
        shutdown(groups.control)
