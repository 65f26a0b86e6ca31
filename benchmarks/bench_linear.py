"""Linear layers with what is fused into them. Few rows are bound by reading the weight, many by the multiply-add units."""


def BACKWARD(case):
    return case.get("weight") is None and "cold" not in case and case["x"][0] > 8


def work(both, x, weight, bias, activation, residual):
    rows, out = x.size // x.shape[-1], weight.shape[0]
    flops, size = 2 * rows * weight.size, weight.nbytes + x.nbytes + 4 * rows * out * (1 if residual is None else 2)
    return (3 * flops, 3 * size) if both else (flops, size)


def torch(x, weight, bias, activation, residual):
    import torch
    import torch.nn.functional as F

    if weight.dtype == torch.bfloat16:  # as a bfloat16 model computes
        y = F.linear(x.bfloat16(), weight, None if bias is None else bias.bfloat16()).float()
    else:
        y = F.linear(x, weight, bias)
    if activation == "gelu_tanh":
        y = F.gelu(y, approximate="tanh")
    elif activation:
        y = {"gelu": F.gelu, "silu": F.silu, "relu": F.relu}[activation](y)
    return y if residual is None else y + residual
