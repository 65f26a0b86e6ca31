"""Activation functions: bound by memory, gelu nearly by arithmetic."""

BACKWARD = True


def work(backward, x, kind):
    return (60 if backward else 30) * x.size, (5 if backward else 2) * x.nbytes


def torch(x, kind):
    import torch.nn.functional as F

    return F.gelu(x, approximate="tanh") if kind == "gelu_tanh" else getattr(F, kind)(x)
