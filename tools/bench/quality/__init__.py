"""Quality of outer steps on real text: `python -m tools.bench.quality`."""
