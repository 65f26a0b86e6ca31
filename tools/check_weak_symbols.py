"""Fails where a kernel's object file has a weak or unique symbol: the linker may give one instruction set's body to another's caller.

python tools/check_weak_symbols.py build/dev
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def weak_symbols(objects: list[Path]) -> list[str]:
    """'FILE: KIND SYMBOL' for each weak (W, w, V, v) or unique (u) symbol that an object file defines."""
    found = []
    for path in objects:
        listing = subprocess.run(["nm", "-C", "--defined-only", str(path)], capture_output=True, text=True, check=True).stdout
        for line in listing.splitlines():
            _, kind, symbol = line.split(maxsplit=2)
            if kind in "WwVvu":
                found.append(f"{path.name}: {kind} {symbol}")
    return found


def main() -> int:
    build = Path(sys.argv[1] if len(sys.argv) > 1 else "build/dev")
    objects = sorted(p for p in build.rglob("*_cpu.cpp.o") if "CMakeFiles/kernels_" in p.as_posix())
    if not objects:
        print(f"no kernel object files under {build}: build first", file=sys.stderr)
        return 2
    found = weak_symbols(objects)
    for line in found:
        print(line, file=sys.stderr)
    if found:
        print(f"{len(found)} weak symbols in {len(objects)} files: put them into the unnamed namespace", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
