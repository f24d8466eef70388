"""Warnings of other packages that say nothing to the user of this one; each with its reason.

They would come from every rank, before the first line of a run. Only these are silenced, by their
text, so that a new one is seen.
"""

import logging
import warnings
from dataclasses import dataclass

from typing_extensions import override

__all__ = ["silence_known_warnings"]

_KNOWN: tuple[tuple[type[Warning], str], ...] = (
    # Both are optional; the README says what they are for. Megatron says it in five modules.
    (UserWarning, r"Transformer Engine and Apex are not installed\. Falling back to "),
    (UserWarning, r"Apex is not installed\. Falling back to Torch Norm"),
    # Megatron's default for a feature that is off here; its own later versions drop the value.
    (UserWarning, r"full scope is deprecated\. Use empty cuda_graph_"),
    # The optimizer's shards are views of parameters; Megatron asks each for a gradient it has not.
    (UserWarning, r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed"),
    # Names that torch 2.13 is about to retire, called by DeepSpeed and Megatron; ranges are pinned.
    (
        FutureWarning,
        r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated",
    ),
    # An import in Megatron for its own older callers.
    (DeprecationWarning, r"The following imports from `dynamic_context\.py` will be removed"),
)

# Logger and beginning of the message.
_KNOWN_LOGS: tuple[tuple[str, str], ...] = (
    # Megatron 0.19 points to other classes; the ones used here are in both supported versions.
    ("megatron.core.models.gpt.gpt_model", "GPTModel IS DEPRECATED"),
    ("megatron.core.transformer.transformer_layer", "Rewrapping ModuleSpec"),
    ("megatron.core.distributed.distributed_data_parallel", "DistributedDataParallel: full_param_"),
    # Nothing is compiled on a CPU.
    ("torch.utils.cpp_extension", "No CUDA runtime is found"),
)


@dataclass(frozen=True)
class _Drop(logging.Filter):
    """Drops messages that begin with ``beginning``."""

    beginning: str

    @override
    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self.beginning)


def silence_known_warnings() -> None:
    """Ignore the warnings above for the rest of the process; best before Megatron is imported."""
    for category, message in _KNOWN:
        warnings.filterwarnings("ignore", message=message, category=category)
    for name, beginning in _KNOWN_LOGS:
        logging.getLogger(name).addFilter(_Drop(beginning))  # an equal one is not added again
