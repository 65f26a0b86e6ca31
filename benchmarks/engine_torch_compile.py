"""torch.compile on what engine_torch.py times."""

import engine_torch


def encode(case):
    return engine_torch.encode(case, compiled=True)
