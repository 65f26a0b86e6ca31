"""The grouped product of experts against one dense product of as many operations: what cutting the rows into runs costs."""

import numpy as np

CASES = [{"R": 4096, "E": 8, "C": 512, "F": 1792}, {"R": 4096, "E": 64, "C": 512, "F": 1024}]
BACKWARD = True
GRADIENTS = ("x", "weights")
RANDOM = ("dense",)  # another answer


def inputs(case, rng):
    """Uneven runs of rows, as a router gives them."""
    shares = rng.dirichlet(np.full(case["E"], 8.0))
    return {
        "x": rng.standard_normal((case["R"], case["C"]), np.float32),
        "weights": rng.standard_normal((case["E"], case["F"], case["C"]), np.float32),
        "counts": rng.multinomial(case["R"], shares).astype(np.int64),
    }


def work(both, x, weights, counts):
    flops, size = 2 * x.size * weights.shape[1], weights.nbytes + x.nbytes + 4 * len(x) * weights.shape[1]
    return (3 * flops, 3 * size) if both else (flops, size)


def ours(x, weights, counts):
    from fastlm import ops

    return ops.grouped_linear(x, weights, counts)


def dense(x, weights, counts):
    from fastlm import ops

    return ops.linear(x, first(weights))


def first(weights):
    """A matrix of one expert, with a gradient where the experts have one."""
    import engine

    from fastlm.tensor import Tensor

    if not isinstance(weights, Tensor):
        return weights[0]
    one = engine.made_from(weights, lambda w: Tensor(w.data[0].copy(), requires_grad=True))
    one.grad = None
    return one


def runs(counts):
    ends = np.cumsum(counts)
    return [slice(end - n, end) for end, n in zip(ends, counts, strict=True)]


def forward(x, weights, counts):
    return np.concatenate([x[span] @ w.T for span, w in zip(runs(counts), weights, strict=True)])


def backward(dy, x, weights, counts):
    spans = runs(counts)
    dx = np.concatenate([dy[span] @ w for span, w in zip(spans, weights, strict=True)])
    return {"x": dx, "weights": np.stack([dy[span].T @ x[span] for span in spans])}
