"""Starts launch/pretrain.py with the faults that the environment names for this rank."""

import os
import runpy

from tests.chaos import faults, points

if __name__ == "__main__":
    # A launcher without ranks of its own replaces itself by one that has; only ranks have a RANK.
    if "RANK" in os.environ:
        for fault in faults.given(os.environ):
            if fault.rank == int(os.environ["RANK"]):
                points.install(fault)
        if nan := os.environ.get(faults.NAN_VARIABLE):
            rank, step = nan.split()
            points.install_nan(int(rank), int(step))
    runpy.run_path(str(points.ROOT / "launch" / "pretrain.py"), run_name="__main__")
