"""Behind `tools/plan.py`: what is planned, compared, calibrated and drawn."""
