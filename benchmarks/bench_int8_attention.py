"""Attention in 8 bits. torch: its attention in float32, there being none in 8 bits."""

CEILING = "int8_gops"
RANDOM = ("torch",)  # it does not round


def work(both, q, k, v):
    (B, T, H, D), S, E = q.shape, k.shape[1], v.shape[3]
    return 2 * B * H * T * S * (D + E), 2 * q.nbytes + k.nbytes + v.nbytes


def ours(q, k, v):
    from fastlm import ops

    return ops.int8_attention(q, k, v)


def torch(q, k, v):
    import torch.nn.functional as F

    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
