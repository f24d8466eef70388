"""MuLoCo and DiLoCo pre-training on Megatron-core and DeepSpeed."""

__version__ = "0.1.0"
