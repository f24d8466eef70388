"""Communication: process groups, collectives, reducers over replicas, and consistency checks.

Everything between replicas goes through ``deepspeed.comm``.
"""
