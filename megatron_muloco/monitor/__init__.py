"""Console lines and TensorBoard points of a run, and the registry of metrics behind both.

Nothing is imported here, so that `metrics` and `throughput` can be imported without torch.
"""
