"""Linear layers with float32 and bfloat16 weights in fewer bits; NumPy multiplies by the float32 that they stand for."""

_dense = {}


def work(both, x, weight):
    return 2 * x.shape[0] * weight.shape[0] * weight.shape[1], weight.nbytes + x.nbytes + 4 * x.shape[0] * weight.shape[0]


def ours(x, weight):
    from fastlm import ops

    return ops.linear(x, weight)


def numpy(x, weight):
    if id(weight) not in _dense:
        _dense.clear()
        _dense[id(weight)] = weight.dequantize()
    return x @ _dense[id(weight)].T
