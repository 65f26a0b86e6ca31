"""Linear layers with weights and activations of 8 bits, one scale a row. torch: its dynamically quantised linear layer, which has one scale
for all activations of a call and one for each row of the weight."""

CEILING = "int8_gops"
RANDOM = ("torch",)  # it rounds x by the range of the whole call


def work(both, x, weight):
    return 2 * x.shape[0] * weight.shape[0] * weight.shape[1], weight.nbytes + x.nbytes + 4 * x.shape[0] * weight.shape[0]


def ours(x, weight):
    from fastlm import ops

    return ops.linear(x, weight)


def torch(x, weight):
    import engine
    import torch

    def quantized(weight):
        layer = torch.nn.Linear(x.shape[1], weight.shape[0], bias=False)
        layer.weight.data = torch.from_numpy(weight.dequantize())
        return torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(layer), {torch.nn.Linear})

    return engine.made_from(weight, quantized)(x)
