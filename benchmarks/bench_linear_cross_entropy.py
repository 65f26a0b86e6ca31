"""Output layer and loss: bound by three products, of which the logits are never held as a whole."""

BACKWARD = True


def work(both, x, weight, targets, reduction):
    product = 2 * x.size * weight.shape[0]
    return (3 if both else 1) * product, (3 if both else 1) * weight.nbytes


def torch(x, weight, targets, reduction):
    import torch.nn.functional as F

    return F.cross_entropy(F.linear(x, weight), targets.long(), ignore_index=-100, reduction=reduction)
