"""Process start-up, the CPU seam and the adapters to Megatron, below the algorithm."""
