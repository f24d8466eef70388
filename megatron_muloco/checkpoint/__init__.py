"""Checkpoints: one directory each, stored in model space and published atomically."""
