"""Ops kept as one node because their higher terms have a closed form: softmax, log-softmax, normalization.

And the generic rule: anything else that is smooth, through `torch.func` at that node alone.
"""
