"""The GPT model: layer specification, construction, initialisation, names and FLOPs."""
