"""Translates a ``compression`` section into the codec and coding units of the reference."""

from megatron_muloco.training.known_answers import reference_keys

__all__ = ["reference_keys"]
