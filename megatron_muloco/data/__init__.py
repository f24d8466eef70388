"""From text to microbatches: corpus, tokenizer, indexed datasets, and who reads which sample.

Nothing is imported here on purpose: the sampler and the checks must stay free of torch, and the
corpus and preparation code runs in worker processes that should start quickly.
"""
