"""Biases by distance: bound by what is written. torch has what transformers does: the table's rows by bucket, transposed."""

BACKWARD = True


def work(backward, buckets, weight, positions, keys, center):
    size = positions.size * weight.shape[1] * keys
    return (2 if backward else 1) * size, (2 if backward else 1) * size * 4


def torch(buckets, weight, positions, keys, center):
    import torch
    import torch.nn.functional as F

    distance = torch.arange(keys) - positions[:, :, None].long()
    index = buckets.long()[(center + distance).clamp(0, len(buckets) - 1)]
    return F.embedding(index, weight).permute(0, 3, 1, 2).contiguous()
