"""What the tests stand on: ranks, tensors, faults, ports and a small SLURM."""
