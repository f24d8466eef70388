"""Weights of a run in the formats of other programs, and back; see docs/guides/export.md."""
