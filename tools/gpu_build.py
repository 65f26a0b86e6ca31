"""Compiles the GPU kernels ahead of time and packs them: fastlm/cuda/images/sm_90.zip and the like. No GPU is needed.

    python tools/gpu_build.py                        everything that the tools here allow
    python tools/gpu_build.py --ops layer_norm --archs 90 --check
    python tools/gpu_build.py --emulate build/emulated    the CUDA C++ kernels as libraries for the host

--check refuses kernels over their budget: a stack, spilled registers, products of bfloat16 that use no tensor cores, or an instruction
missing that EXPECTS in <op>_gpu.py names for the kernel on that architecture (`{"matmul*": {"90": "HGMMA"}}`).
What was compiled is kept in build/gpu, by a hash of what it is made of.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import importlib
import importlib.metadata
import inspect
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "kernels"
IMAGES = ROOT / "fastlm/cuda/images"
CACHE = ROOT / "build/gpu"
INSTRUCTIONS = {n: n for n in ("HGMMA", "HMMA", "IMMA", "IGMMA", "UTMALDG", "LDGSTS", "LDL", "STL")} | {"UTCMMA": r"UTC\w*MMA"}
ARCHS = ("80", "90", "100")  # 90 and 100 are compiled as 90a and 100a, which run nowhere else; "ptx" is for the rest
sys.path.insert(0, str(ROOT))

from tools import gpu_sources  # noqa: E402


def cuda_ops() -> list[str]:
    return sorted(p.parent.name for p in KERNELS.glob("*/*_cuda.cu"))


def triton_ops() -> list[str]:
    return sorted(p.parent.name for p in KERNELS.glob("*/*_triton.py"))


# --- the host ---


def emulate(op: str, folder: Path, defines: tuple[str, ...] = (), name: str | None = None, source: Path | None = None) -> Path:
    """<op>_cuda.cu, or another source, as a library for the host; made again where a file that it includes, or a flag, has changed.
    defines: planted bugs, for the tests of the emulator."""
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{name or op}.so"
    source = source or KERNELS / op / f"{op}_cuda.cu"
    flags = [
        "-std=c++17",
        "-O1",
        "-g1",
        "-shared",
        "-fPIC",
        "-fno-gnu-unique",  # each library has its own emulator
        "-ffp-contract=off",
        "-Wall",
        "-Wno-unused-function",
        "-Wno-unknown-pragmas",
        "-x",
        "c++",
        "-DFASTLM_EMULATE",
        *(f"-D{d}" for d in defines),
        f"-I{ROOT}",
    ]
    text = "\0".join([*flags, *(f.read_text() for f in gpu_sources.cuda(source, host=True))])
    made_of = hashlib.sha256(text.encode()).hexdigest()
    stamp = library.with_suffix(".made-of")
    if library.exists() and stamp.exists() and stamp.read_text() == made_of:
        return library
    with tempfile.TemporaryDirectory(dir=folder) as name_:
        made = Path(name_) / "library.so"
        run(["g++", *flags, str(source), "-o", str(made)])
        made.replace(library)
        written = Path(name_) / "made-of"
        written.write_text(made_of)
        written.replace(stamp)
    return library


# --- the device ---


def nvcc() -> str | None:
    return shutil.which("nvcc") or next((str(p) for p in [Path("/usr/local/cuda/bin/nvcc")] if p.exists()), None)


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def target(arch: str) -> tuple[str, str]:
    """nvcc's names: of the virtual architecture and of the real one."""
    if arch == "ptx":
        return "compute_80", "compute_80"
    suffix = "a" if int(arch) >= 90 else ""
    return f"compute_{arch}{suffix}", f"sm_{arch}{suffix}"


def compile_cuda(op: str, arch: str, source: Path | None = None) -> tuple[bytes, list[dict[str, Any]]]:
    """The image of <op>_cuda.cu, or of another source, and for each entry point what the compiler says that it uses."""
    compiler = nvcc()
    assert compiler is not None
    virtual, real = target(arch)
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "image"
        kind = "-ptx" if arch == "ptx" else "-cubin"
        flags = ["-std=c++17", "-O3", kind, f"-gencode=arch={virtual},code={real}", f"-I{ROOT}", "-Xptxas", "-v"]
        said = run([compiler, *flags, "--expt-relaxed-constexpr", str(source or KERNELS / op / f"{op}_cuda.cu"), "-o", str(image)])
        data = image.read_bytes()
    if arch == "ptx":
        return data, [{"kernel": n.decode()} for n in re.findall(rb"\.entry\s+(\w+)", data)]
    entries = []
    for part in said.split("Compiling entry function ")[1:]:
        name = re.match(r"'(\w+)'", part)
        numbers = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        if name and numbers and registers:
            stack, stores, loads = map(int, numbers.groups())
            entries.append({"kernel": name[1], "registers": int(registers[1]), "stack": stack, "spills": stores + loads})
    if any(fnmatch.fnmatch(e["kernel"], pattern) for e in entries for pattern in expects(op)):
        count_instructions(data, entries)
    return data, entries


def count_instructions(cubin: bytes, entries: list[dict[str, Any]]) -> None:
    """Adds to each entry point how many of INSTRUCTIONS it has. The disassembler is that of triton."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        code = run([str(Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"), "-c", file.name])
    parts = re.split(r"\.section\s+\.text\.(\w+)", code)
    bodies = dict(zip(parts[1::2], parts[2::2], strict=True))
    for e in entries:
        e |= {n: len(re.findall(rf"\b{pattern}", bodies.get(e["kernel"], ""))) for n, pattern in INSTRUCTIONS.items()}


def expects(op: str) -> dict[str, dict[str, str]]:
    """EXPECTS of <op>_gpu.py: pattern of kernels' names -> architecture -> an instruction that must be there."""
    module = importlib.import_module(f"fastlm.kernels.{op}.{op}_gpu") if (KERNELS / op / f"{op}_gpu.py").exists() else None
    found: dict[str, dict[str, str]] = getattr(module, "EXPECTS", {})
    return found


def one_of_each(variants: Iterable[Any]) -> list[Any]:
    """Of each kernel the form with the most arrays in bfloat16, the first of equal ones: what tensor cores are for."""
    found: dict[str, list[Any]] = {}
    for form in variants:
        found.setdefault(form[0], []).append(form)
    return [max(forms, key=lambda form: list(form[1].values()).count("*bf16")) for forms in found.values()]


def compile_triton(op: str, arch: str, one_each: bool = False) -> list[tuple[dict[str, Any], bytes]]:
    """Every variant of <op>_triton.py, or one of each kernel: its manifest entry and its image."""
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
    from triton.compiler import ASTSource

    from fastlm.cuda.images import variant

    made = []
    module = importlib.import_module(f"fastlm.kernels.{op}.{op}_triton")
    letters = {"i32": "i", "i64": "l", "fp32": "f"}
    for kernel, types, constants, options in one_of_each(module.variants()) if one_each else module.variants():
        function = getattr(module, kernel)
        names = function.arg_names
        signature = {n: "constexpr" if n in constants or types[n] is None else types[n].split(":")[0] for n in names}
        given = {(names.index(n),): v for n, v in constants.items()} | {
            (names.index(n),): None for n, t in types.items() if t is None
        }
        aligned = {
            (names.index(n),): [["tt.divisibility", 16]] for n, t in types.items() if t and (t[0] == "*" or t.endswith(":16"))
        }
        source = ASTSource(fn=function, signature=signature, constexprs=given, attrs=aligned)
        compiled, used = compiled_form(source, arch, dict(options))
        meta = compiled.metadata
        image = compiled.asm["ptx"].encode() if arch == "ptx" else compiled.asm["cubin"]
        entry = {
            "key": f"triton {variant(kernel, types, constants, options)}",
            "entry": meta.name,
            "signature": "".join("p" if t[0] == "*" else letters[t.split(":")[0]] for t in types.values() if t),
            "block": 32 * meta.num_warps,
            "shared": meta.shared,
        }
        if getattr(meta, "global_scratch_size", 0):
            raise RuntimeError(f"{op}: {kernel} wants scratch memory, which our launcher does not give")
        if arch != "ptx":
            entry |= used
            entry["products"] = len(re.findall(r"tt\.dot [^\n]*xbf16", compiled.asm["ttir"]))  # of bfloat16
        made.append((entry, image))
    return made


def compiled_form(source: Any, arch: str, options: dict[str, int]) -> tuple[Any, dict[str, int]]:
    """A compiled variant and its `resources`. ptxas may spill a value where that lets one more block run; then it is asked not to."""
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", 80 if arch == "ptx" else int(arch), 32)
    options = {"enable_fp_fusion": True} | options  # what 3.6 does by itself
    compiled = triton.compile(source, target=target, options=options)
    if arch == "ptx":
        return compiled, {}
    used = resources(compiled.asm["cubin"], triton)
    for limit in (128, 168, 255):
        if used["stack"] and used["registers"] < limit and 32 * options["num_warps"] * limit <= 65536:
            compiled = triton.compile(source, target=target, options=options | {"maxnreg": limit})
            used = resources(compiled.asm["cubin"], triton)
    return compiled, used


def resources(cubin: bytes, triton: Any) -> dict[str, int]:
    """Registers, stack and tensor core instructions of a cubin."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        used = run([str(tools / "cuobjdump"), "-res-usage", file.name])
        code = run([str(tools / "nvdisasm"), "-c", file.name])
    found = re.search(r"REG:(\d+) STACK:(\d+)", used)
    assert found, used
    counts = {name: len(re.findall(rf"\b{pattern}", code)) for name, pattern in INSTRUCTIONS.items()}
    return {"registers": int(found[1]), "stack": int(found[2])} | counts


def job(arguments: tuple[str, str, str, bool]) -> tuple[str, str, str, list[tuple[dict[str, Any], bytes]], float]:
    """The arguments, what was compiled, and the processor's seconds that it took."""
    twin, op, arch, one_each = arguments
    start = sum(os.times()[:4])
    kept = CACHE / f"{twin}-{op}-{arch}-{key(*arguments)}"
    if kept.exists():
        return twin, op, arch, pickle.loads(kept.read_bytes()), 0.0
    if twin == "triton":
        made = compile_triton(op, arch, one_each)
    else:
        image, entries = compile_cuda(op, arch)
        made = [({"key": f"cuda {e['kernel']}", "entry": e["kernel"]} | e, image) for e in entries]
    CACHE.mkdir(parents=True, exist_ok=True)
    for old in CACHE.glob(f"{twin}-{op}-{arch}-*"):
        if time.time() - old.stat().st_mtime > 86400:
            old.unlink(missing_ok=True)
    with tempfile.NamedTemporaryFile(dir=CACHE, delete=False) as file:
        file.write(pickle.dumps(made))
    Path(file.name).replace(kept)
    return twin, op, arch, made, sum(os.times()[:4]) - start


@cache
def tools_used(twin: str) -> bytes:
    """What names the compiler's version."""
    if twin == "cuda":
        return run([nvcc() or "nvcc", "--version"]).encode()
    return importlib.metadata.version("triton").encode()


@cache
def oldest_driver(twin: str, arch: str) -> int:
    """The CUDA version that a driver must have for what the compiler makes: of its major version, for PTX of its own."""
    if twin == "cuda":
        found = re.search(r"release (\d+)\.(\d+)", tools_used(twin).decode())
    else:
        from triton.backends.nvidia.compiler import get_ptxas

        found = re.match(r"(\d+)\.(\d+)", get_ptxas(80 if arch == "ptx" else int(arch)).version)
    assert found
    return 1000 * int(found[1]) + (10 * int(found[2]) if arch == "ptx" else 0)


def key(twin: str, op: str, arch: str, one_each: bool) -> str:
    """A hash of all that a job's result depends on: sources, how they are compiled, the compiler. A kernel may import others' helpers."""
    folder = KERNELS / op
    files = gpu_sources.triton(folder / f"{op}_triton.py") if twin == "triton" else gpu_sources.cuda(folder / f"{op}_cuda.cu")
    files = [*files, ROOT / "fastlm/cuda/images.py"]
    compilers = (
        (compile_triton, one_of_each, compiled_form, resources) if twin == "triton" else (compile_cuda, count_instructions, target)
    )
    how = "".join(inspect.getsource(f) for f in compilers)
    how += repr(expects(op)) if twin == "cuda" else ""  # instructions are counted where there are expectations
    parts = [f"{twin} {op} {arch} {one_each} {how}".encode(), tools_used(twin), *(f.read_bytes() for f in files)]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]


def over_budget(op: str, entry: dict[str, Any], arch: str = "") -> list[str]:
    """What is wrong with a compiled kernel."""
    problems = []
    name = entry["key"].partition(" ")[2]
    for pattern, wanted in expects(op).items():
        needed = wanted.get(arch)
        if needed and fnmatch.fnmatch(name, pattern) and not entry.get(needed):
            problems.append(f"no {needed} on sm_{arch}")
    if entry.get("products") and not any(entry.get(n) for n in ("HMMA", "HGMMA", "UTCMMA")):
        problems.append(f"products of bfloat16 without tensor cores on sm_{arch}")
    if entry.get("stack", 0) > 0:
        problems.append(f"{entry['stack']} bytes of stack")
    if entry.get("spills", 0) + entry.get("LDL", 0) + entry.get("STL", 0) > 0:
        problems.append("spilled registers")
    return [f"{op}: {entry['key']}: {p}" for p in problems]


def unmatched(op: str, names: set[str]) -> list[str]:
    """What EXPECTS says of kernels that are not there: a pattern that matches nothing asserts nothing."""
    return [f"{op}: EXPECTS has {p!r}, but no kernel is called so" for p in expects(op) if not fnmatch.filter(names, p)]


def build(ops: list[str], archs: list[str], check: bool, pack: bool, jobs: int, one_each: bool = False) -> list[str]:
    """Compiles, and returns what is over budget."""
    work = [("triton", op, arch, one_each) for op in triton_ops() if op in ops for arch in archs]
    if nvcc():
        work += [("cuda", op, arch, False) for op in cuda_ops() if op in ops for arch in archs]
    else:
        print("no nvcc: the CUDA C++ kernels are left out", file=sys.stderr)
    problems: list[str] = []
    archives: dict[str, dict[str, Any]] = {a: {} for a in archs}
    images: dict[str, dict[str, bytes]] = {a: {} for a in archs}
    names: dict[str, set[str]] = {op: set() for op in ops}
    with ProcessPoolExecutor(jobs) as pool:
        for twin, op, arch, made, seconds in pool.map(job, work):
            for entry, image in made:
                name = hashlib.sha256(image).hexdigest()[:16]
                images[arch][name] = image
                rest = {"file": name} | ({"driver": oldest_driver(twin, arch)} if pack else {})
                archives[arch][entry["key"]] = {k: v for k, v in entry.items() if k != "key"} | rest
                problems += over_budget(op, entry, arch) if check else []
                names[op].add(entry["key"].partition(" ")[2])
            print(f"{twin:<7} {op:<22} {arch:<4} {len(made)} kernels, {seconds:.1f} s", file=sys.stderr)
    if check and nvcc() and not one_each:
        problems += [p for op in ops for p in unmatched(op, names[op])]
    if pack:
        IMAGES.mkdir(exist_ok=True)
        for arch in archs:
            path = IMAGES / (f"sm_{arch}.zip" if arch != "ptx" else "ptx.zip")
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
                archive.writestr("manifest.json", json.dumps(archives[arch], indent=0, sort_keys=True))
                for name, image in sorted(images[arch].items()):
                    archive.writestr(name, image)
            print(f"{path.name}: {len(archives[arch])} kernels, {path.stat().st_size / 1e6:.2f} MB", file=sys.stderr)
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--ops", nargs="+", default=sorted({*cuda_ops(), *triton_ops()}))
    parser.add_argument("--archs", nargs="+", default=[*ARCHS, "ptx"])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--one-each", action="store_true", help="one variant of each Triton kernel, of bfloat16 where there is one")
    parser.add_argument("--no-pack", dest="pack", action="store_false")
    parser.add_argument("--emulate", type=Path, metavar="FOLDER")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    if arguments.emulate:
        for op in arguments.ops:
            if op in cuda_ops():
                print(emulate(op, arguments.emulate))
        return 0
    problems = build(arguments.ops, arguments.archs, arguments.check, arguments.pack, arguments.jobs, arguments.one_each)
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
