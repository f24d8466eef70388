"""Seeded faults in real runs; `python -m tests.chaos --help`."""
