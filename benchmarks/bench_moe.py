"""A mixture of experts: router, rows gathered, two grouped products, their weighted sum. Few rows are bound by reading the weights of
the chosen experts, many by the multiply-add units."""


def BACKWARD(case):
    return False  # the oracle's backward pass goes row by row


def work(both, x, logits, up, down, k, renormalise):
    flops = 4 * k * x.shape[0] * up[0].size
    used = min(len(up), k * x.shape[0])
    return flops, used * 2 * up[0].nbytes + 2 * x.nbytes


def ours(x, logits, up, down, k, renormalise):
    from fastlm import ops

    routing = ops.route(logits, k, renormalise=renormalise)
    h = ops.grouped_linear(ops.dispatch(x, routing), up, routing.counts, "relu")
    return ops.combine(ops.grouped_linear(h, down, routing.counts), routing)


def torch(x, logits, up, down, k, renormalise):
    """As transformers does without a grouped product: one expert after the other."""
    import torch

    weights, experts = logits.softmax(-1).topk(k, -1)
    weights = weights / weights.sum(-1, keepdim=True)
    y = torch.zeros_like(x)
    for e in range(len(up)):
        row, choice = torch.where(experts == e)
        if len(row):
            h = torch.nn.functional.linear(torch.relu(torch.nn.functional.linear(x[row], up[e])), down[e])
            y.index_add_(0, row, h * weights[row, choice, None])
    return y
