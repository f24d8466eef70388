"""The inner optimizer: Muon on matrices that are sharded over ranks, AdamW on everything else.

`matrices`, `routing` and `parameter_table` do not import torch, so that a run can be planned
without it; nothing is imported here for the same reason.
"""
