"""Appending to a cache: one token of a batch, and a prompt."""


def work(both, k, v, **_):
    return k.size + v.size, 2 * (k.nbytes + v.nbytes)


def torch(keys, values, k, v, positions):
    import torch

    rows, at = torch.arange(len(k))[:, None], positions[:, None] + torch.arange(k.shape[1])
    keys[rows, at], values[rows, at] = k, v
