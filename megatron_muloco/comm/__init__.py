"""Process groups and collectives: no other package calls a collective itself.

Pseudogradients and the inner optimizer's exchange go through ``deepspeed.comm``, objects and sums
for control through ``torch.distributed``. Megatron and torch's checkpoint planner make collectives
of their own.
"""
