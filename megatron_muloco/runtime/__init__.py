"""What lies under the algorithm: accelerator seam, process start-up, Megatron adapter."""
