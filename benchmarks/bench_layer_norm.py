"""Layer normalization: bound by memory."""

BACKWARD = True


def work(backward, x, weight, bias, eps):
    passes = 5 if backward else 2  # read x, write y; read dy and x, write dx
    return (16 if backward else 8) * x.size, passes * x.nbytes


def torch(x, weight, bias, eps):
    import torch.nn.functional as F

    return F.layer_norm(x, weight.shape, weight, bias, eps)
