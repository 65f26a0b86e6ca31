"""Quantised blocks to float32: bound by writing the result."""


def work(both, kind, shape, blocks):
    return 2 * shape[0] * shape[1], blocks.nbytes + 4 * shape[0] * shape[1]


def ours(kind, shape, blocks):
    from fastlm.checkpoint import QuantizedArray

    return QuantizedArray(kind, shape, blocks).dequantize()
