"""Attention: causal and full prefill, and decoding one token against a long cache of grouped heads."""


def BACKWARD(case):
    return not case.get("forward_only")


def work(both, q, k, v, causal, **_):
    (B, T, H, D), S = q.shape, k.shape[1]
    pairs = B * H * (T * S - (T * (T - 1) // 2 if causal else 0))
    flops, size = 4 * pairs * D, 2 * q.nbytes + k.nbytes + v.nbytes
    return (flops * 7 // 2, 3 * size) if both else (flops, size)


def torch(q, k, v, causal, scale, bias, lengths, window):
    import torch.nn.functional as F

    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    causal = causal and q.shape[2] > 1  # torch aligns the starts: one query would see the first key alone
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped).transpose(1, 2)
