"""The outer step: when replicas synchronise, what they exchange, and how they use it.

Tensors and time only; process groups are in `comm`. Start with `reference.py`, the whole algorithm
in one process. The other modules do the same on one rank's shards:

    schedule      inner step -> launches and applies       optimizer     pseudogradient, Nesterov,
    fragments     which parameters travel together                       merge rules, anchor state
    guard         weight of a replica in the mean          in_flight     fragments between launch
    reducer       interface to communication,                            and apply
                  measurements                             diagnostics   reports, sketches
    synchronizer  runs all of this on one rank
"""
