"""The training program: wiring, loop, evaluation, stopping."""
