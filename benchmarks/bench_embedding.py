"""Embedding: rows of a table that no cache holds. Its gradient is dense in both libraries."""

BACKWARD = True


def work(backward, ids, weight):
    C = weight.shape[1]
    forward = ids.size * C * (weight.itemsize + 4)
    return 2 * ids.size * C, forward + (ids.size * C * 12 + weight.shape[0] * C * 4 if backward else 0)


def torch(ids, weight):
    import torch.nn.functional as F

    return F.embedding(ids, weight).float()
