"""AdamW in place: bound by memory. Each call changes its arguments; only the first answer is compared."""

CASES = [{"shape": (25_165_824,)}]  # 100 MB an array: out of every cache here


def work(both, parameter, **_):
    return 16 * parameter.size, 7 * parameter.nbytes  # reads four arrays, writes three


def ours(parameter, gradient, m, v, **settings):
    from fastlm import ops

    ops.adamw(parameter, gradient, m, v, **settings)
    return parameter, m, v


def torch(parameter, gradient, m, v, step, lr, beta1, beta2, eps, weight_decay, scale):
    import torch

    steps = [torch.tensor(float(step))]
    torch._fused_adamw_(
        [parameter], [gradient], [m], [v], [], steps, lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=eps,
        amsgrad=False, maximize=False, grad_scale=None, found_inf=None,
    )  # fmt: skip
    return parameter, m, v
