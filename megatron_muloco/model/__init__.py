"""The model: its layer specification, its construction and its arithmetic."""
