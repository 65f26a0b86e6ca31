"""Float32 linear layers by Winograd's inner product, against products by multiply-adds alone; "backward" is matmul's."""

CEILING = "fast_gflops"


def work(both, x, weight):
    return 2 * x.shape[0] * weight.size, weight.nbytes + x.nbytes + 4 * x.shape[0] * weight.shape[0]


def ours(x, weight):
    from fastlm import ops

    return ops.linear(x, weight, fast=True)


def numpy(x, weight):
    return x @ weight.T


def torch(x, weight):
    import torch.nn.functional as F

    return F.linear(x, weight)
