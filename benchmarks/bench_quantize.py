"""float32 weights to ggml's blocks."""


def work(both, w, kind):
    return 4 * w.size, 5 * w.size


def ours(w, kind):
    from fastlm.checkpoint import quantize

    return quantize(w, kind).blocks
