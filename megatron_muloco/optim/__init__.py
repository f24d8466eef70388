"""The inner optimizer: Muon on matrices that are scattered over ranks, AdamW on everything else.

``units``, ``assignment``, ``routes`` and ``parameter_table`` are arithmetic without torch, so
that a plan can be made without it; nothing is imported here for the same reason.
"""
