"""Training: builds a run from its configuration and trains it."""
