"""The position scores of Transformer-XL: bound by arithmetic. torch has what transformers does: all scores, then the shift."""

BACKWARD = True


def work(backward, q, r, keys, **rest):
    B, T, H, D = q.shape
    operations = 2 * B * H * T * keys * D
    return (3 if backward else 1) * operations, (3 if backward else 1) * (q.nbytes + r.nbytes + 4 * B * H * T * keys)


def ours(**inputs):
    from fastlm import ops

    return ops.rel_shift(**inputs)


def torch(q, r, bias, starts, keys, scale, mask=None, **segments):
    import torch

    B, T, H, _ = q.shape
    every = torch.einsum("bthd,phd->bhtp", q + bias, r)
    shifted = every.reshape(B, H, T + keys, T)[:, :, 1:].reshape(B, H, T, T + keys - 1)[..., :keys]
    if segments:
        term = torch.einsum("bthd,chd->bhtc", q + segments["segment_bias"], segments["segment_embedding"])
        other = (segments["query_segments"][:, :, None] != segments["key_segments"][:, None]).long()
        kinds = torch.nn.functional.one_hot(other, 2).to(q.dtype)
        shifted = shifted + torch.einsum("btsc,bhtc->bhts", kinds, term)
    return shifted * scale if mask is None else shifted * scale + mask[:, None]
