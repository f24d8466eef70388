"""The outer step: when replicas meet, what they exchange, and what they do with it.

Knows tensors and time, not process groups. Read `reference.py` first: it is the whole algorithm on
one page. The other modules are the same lines, one idea each, on a rank's shards:

    pseudogradient  anchor - local                   fragments    which parameters meet together
    schedule        launch and apply, by inner step  optimizer    the Nesterov step on the anchor
    guard           the weight of a replica          merge        how a replica takes the anchor
    reducer         the seam to communication        synchronizer all of it, for one rank
"""
