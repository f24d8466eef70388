"""Data from text to microbatches: tokenizer, indexed datasets, sample order and batches.

This file imports nothing on purpose: the sampler and the checks must stay free of torch, and the
preparation code runs in worker processes that should start quickly.
"""
