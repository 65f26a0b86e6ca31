"""Layer normalization, alone and with the residual addition: bound by memory."""

BACKWARD = True


def work(backward, x, weight, bias, eps, residual=None):
    # forward: read x, write y (with residual: read 2, write 2). backward: read dy and x, write dx (with residual: read dtotal too)
    forward = 2 if residual is None else 4
    passes = forward + (3 if residual is None else 4) if backward else forward
    return (16 if backward else 8) * x.size, passes * x.nbytes


def ours(x, weight, bias, eps, residual=None):
    from fastlm import ops

    return ops.layer_norm(x, weight, bias, eps) if residual is None else ops.add_layer_norm(x, residual, weight, bias, eps)


def torch(x, weight, bias, eps, residual=None):
    import torch.nn.functional as F

    if residual is None:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    total = x + residual
    return F.layer_norm(total, weight.shape, weight, bias, eps), total
