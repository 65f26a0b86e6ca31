"""Rotary positions: bound by memory."""

BACKWARD = True


def work(both, x, cos, sin, positions, interleaved):
    return (12 if both else 6) * x.size // 2, (4 if both else 2) * x.nbytes


def torch(x, cos, sin, positions, interleaved):
    """As transformers applies it: x * cos + rotate_half(x) * sin."""
    import torch

    if interleaved or positions is not None:
        raise NotImplementedError("the cases that are timed have neither")
    T, half = x.shape[1], cos.shape[1]
    c, s = (torch.cat((t, t), -1)[:T, None, :] for t in (cos, sin))
    rotated = torch.cat((-x[..., half:], x[..., :half]), -1)
    return x * c + rotated * s
