"""Parts of `tools/sweep.py`: study files, searches, the table of runs, workers, SLURM, plots."""
