"""What a run reports about itself: console lines, TensorBoard points, and the registry of both.

Nothing is imported here: the registry and the arithmetic must stay free of torch.
"""
