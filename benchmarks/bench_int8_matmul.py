"""Linear layers with quantised weights and 8-bit activations. NumPy is the oracle: as slow as the definition reads.

torch: its dynamically quantised linear layer, which has one scale for all activations of a call and one for each row of the weight.
"""

CEILING = "int8_scaled_gops"
_kept = {}


def work(both, x, weight):
    return 2 * x.shape[0] * weight.shape[0] * weight.shape[1], weight.nbytes + x.nbytes + 4 * x.shape[0] * weight.shape[0]


def ours(x, weight):
    from fastlm import ops

    if id(weight) not in _kept:
        _kept.clear()
        _kept[id(weight)] = weight, weight.with_activations("int8")  # with the weight itself, so that no other one has its id
    return ops.linear(x, _kept[id(weight)][1])
