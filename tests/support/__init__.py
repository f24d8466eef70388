"""Test support: rank processes, tensors, tiny models, faults, ports and a small SLURM."""
