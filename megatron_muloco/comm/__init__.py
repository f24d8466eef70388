"""The only package that calls collectives: groups, reducers, digests.

Everything across replicas goes through ``deepspeed.comm``.
"""
