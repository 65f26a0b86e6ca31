"""Which form of the Triton kernel multiplies what; for the host's side, which has no triton, and for the list of variants."""

from __future__ import annotations

from typing import Any

WIDE, HALF = "*fp32", "*bf16"
Tile = tuple[dict[str, int], dict[str, int]]  # constants, options

# For any sizes: of bfloat16, and of float32, which has no tensor cores to feed.
ANY: Tile = {"BM": 64, "BN": 64, "BK": 32}, {"num_warps": 4, "num_stages": 3}
PLAIN: Tile = {"BM": 64, "BN": 64, "BK": 16}, {"num_warps": 8, "num_stages": 3}
# For rows of a multiple of 16 elements: where there are few tiles, where there are many, and for up to 16 rows of A, where reading B
# is all that takes time.
EVEN: Tile = {"BM": 64, "BN": 64, "BK": 64}, {"num_warps": 4, "num_stages": 4}
EVEN_WEIGHTS: Tile = EVEN[0], {"num_warps": 8, "num_stages": 4}  # experts' gradients, which spill on sm_100 with four warps
LARGE: Tile = {"BM": 128, "BN": 128, "BK": 64}, {"num_warps": 8, "num_stages": 3}
FEW: Tile = {"BM": 16, "BN": 32, "BK": 128}, {"num_warps": 4, "num_stages": 4}
FEW_WIDE: Tile = {"BM": 16, "BN": 32, "BK": 32}, {"num_warps": 4, "num_stages": 3}

MANY = 96  # large tiles from which a card is full
ALL = "M", "N", "K"
# What is transposed, (a, b) -> the sizes that are lengths of rows of A or B.
ROWS = {(False, True): "K", (False, False): "KN", (True, False): "MN", (True, True): "MK"}


def form(types: tuple[str, str, str], layout: tuple[bool, bool], sizes: dict[str, int], batch: int) -> tuple[Tile, tuple[str, ...]]:
    """The tile for a product of a, b and c of these types, and the sizes that need no form of their own."""
    half = types[:2] == (HALF, HALF)
    plain = tuple(n for n in ALL if n not in ROWS[layout])
    if any(sizes[n] % 16 for n in ROWS[layout]):
        return ANY if half else PLAIN, ALL
    if sizes["M"] <= 16 and layout == (False, True):
        return FEW if half else FEW_WIDE, plain
    if not half:
        return PLAIN, ALL
    many = -(-sizes["M"] // 128) * -(-sizes["N"] // 128) * batch >= MANY
    if many and sizes["N"] % 16 == 0 and types[2] == (WIDE if layout[0] else HALF):
        return LARGE, tuple(n for n in plain if n != "N")  # its 64 sums a thread leave no registers for single elements
    return EVEN, plain


def products() -> list[tuple[tuple[str, str, str], tuple[bool, bool], Tile, tuple[str, ...]]]:
    """Every form that `form` gives for what the operations ask for: types, layout, tile, plain sizes."""
    NN, NT, TN = (False, False), (False, True), (True, False)
    asked: list[tuple[tuple[str, str, str], tuple[tuple[bool, bool], ...]]] = [
        ((WIDE, WIDE, WIDE), (NN, NT, TN)),
        ((WIDE, HALF, WIDE), (NN, NT)),
        ((HALF, HALF, HALF), (NN, NT, TN)),
        ((HALF, HALF, WIDE), (NT, TN)),
    ]
    found = []
    large = 16 * MANY * 128
    for types, layouts in asked:
        for layout in layouts:
            for M, N, K in ((17, 17, 17), (16, 16, 16), (32, 32, 32), (large, large, 32)):
                one = types, layout, *form(types, layout, {"M": M, "N": N, "K": K}, 1)
                if one not in found:
                    found.append(one)
    return found


EXPERTS = 32  # counts of runs that are looked at together


def group_form(
    types: tuple[str, str, str], layout: tuple[bool, bool], sizes: dict[str, int], E: int
) -> tuple[Tile, tuple[str, ...]]:
    """As `form`, for runs of rows of E experts; the number of rows of a run is not known."""
    a_t, half = layout[0], types[:2] == (HALF, HALF)
    rows = sizes["K" if a_t else "M"]
    (tile, options), plain = form(types, layout, sizes | {"K" if a_t else "M": max(rows, 32)}, 1)
    if not a_t and rows <= 32 and layout[1] and sizes["K"] % 16 == 0:
        return (FEW if half else FEW_WIDE), ("M", "N")
    if (tile, options) == LARGE and not a_t and rows < 128 * E:
        return EVEN, tuple(n for n in ALL if n not in ROWS[layout])
    return EVEN_WEIGHTS if a_t and (tile, options) == EVEN else (tile, options), plain


def groups() -> list[tuple[tuple[str, str, str], tuple[bool, bool], Tile, tuple[str, ...]]]:
    """As `products`, of what `group_form` gives."""
    found = []
    for types, layout, *_ in products():
        if (types, layout) in (((HALF, HALF, HALF), (True, False)), ((HALF, HALF, WIDE), (False, True))):
            continue
        for M, N, K in ((33, 17, 17), (16, 16, 16), (33, 32, 32), (16 * MANY * 128, 128, 32), (128, 16 * MANY * 128, 32)):
            one = types, layout, *group_form(types, layout, {"M": M, "N": N, "K": K}, 1)
            if one not in found:
                found.append(one)
    return found


def listed(types: tuple[str, str, str], layout: tuple[bool, bool]) -> bool:
    """Whether such a product is compiled."""
    return any(one[:2] == (types, layout) for one in products())


def launch(tile: Tile) -> dict[str, Any]:
    """A tile as arguments of Gpu.triton."""
    constants, options = tile
    return {"warps": options["num_warps"], "stages": options["num_stages"], **constants}
