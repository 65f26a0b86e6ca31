"""Gated activation, on separate arrays and on the halves of one."""

BACKWARD = True


def work(backward, gate, up, kind):
    return (70 if backward else 32) * gate.size, (8 if backward else 3) * gate.nbytes


def torch(gate, up, kind):
    import torch.nn.functional as F

    return (F.gelu(gate, approximate="tanh") if kind == "gelu_tanh" else getattr(F, kind)(gate)) * up
