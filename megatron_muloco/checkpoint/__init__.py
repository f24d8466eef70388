"""State on disk: one directory per checkpoint, in model space, published atomically."""
