"""Matrix products of float32: bound by the multiply-add units."""


def BACKWARD(case):
    return "cold" not in case


def work(both, a, b):
    flops = 2 * a.size * b.shape[-1]
    size = 4 * (a.size + b.size + a.size // a.shape[-1] * b.shape[-1])
    return (3 * flops, 3 * size) if both else (flops, size)


def torch(a, b):
    return a @ b
