"""Cross-entropy over a vocabulary: one pass over the logits forward, one more backward."""

BACKWARD = True


def work(both, logits, targets, reduction):
    return (16 if both else 10) * logits.size, (3 if both else 1) * logits.nbytes


def torch(logits, targets, reduction):
    import torch.nn.functional as F

    return F.cross_entropy(logits, targets.long(), ignore_index=-100, reduction=reduction)
