#!/usr/bin/env python3
"""Compile the kernels beside this file to PTX, with NVIDIA's run-time compiler; no GPU and no driver needed.

Usage: python3 crates/shoal-device/src/cuda/kernels/regenerate.py [--check]

libnvrtc comes with the CUDA toolkit, with `pip install nvidia-cuda-nvrtc`, and with torch's CUDA build; run this with
the Python that has one of them. The PTX is for sm_75 and later. Its ISA version is lowered to the oldest one that has
what the kernels use, so that drivers older than the compiler take it. The header carries a hash of the source and one
of the PTX itself; a test of shoal-device compares both, so a change of one without the other fails.

--check compiles and compares, and writes nothing.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ARCHITECTURE = "compute_75"
# CUDA 11.4 and its drivers, the oldest that CudaDevice accepts.
PTX_VERSION = "7.4"


def fnv1a(data: bytes) -> str:
    """64-bit FNV-1a, as the Rust test computes it."""
    value = 0xCBF29CE484222325
    for byte in data:
        value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return f"{value:016x}"


def library() -> ctypes.CDLL:
    """Load the newest libnvrtc that can be found."""
    folders: list[Path] = []
    spec = importlib.util.find_spec("nvidia")
    if spec is not None and spec.submodule_search_locations:
        folders += [Path(place) for place in spec.submodule_search_locations]
    folders += [Path("/usr/local/cuda")]
    found = sorted(path for folder in folders for path in folder.glob("**/libnvrtc.so.*") if ".alt" not in path.name)
    names = [str(path) for path in reversed(found)] + [ctypes.util.find_library("nvrtc") or "libnvrtc.so"]
    for name in names:
        try:
            # NVRTC opens its builtins by name alone; loaded before, they are found wherever they lie.
            for builtins in Path(name).parent.glob("libnvrtc-builtins.so.*"):
                ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(name)
        except OSError:
            continue
    sys.exit("no libnvrtc here: pip install nvidia-cuda-nvrtc, or install the CUDA toolkit")


def compile_ptx(nvrtc: ctypes.CDLL, name: str, source: bytes) -> str:
    """Compile one source file to PTX, or exit with the compiler's log."""
    program = ctypes.c_void_p()

    def call(function: str, *arguments: object) -> None:
        code = getattr(nvrtc, function)(*arguments)
        if code != 0:
            size = ctypes.c_size_t()
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            sys.exit(f"{function}: error {code}\n{log.value.decode()}")

    options = [f"--gpu-architecture={ARCHITECTURE}".encode(), b"--std=c++17"]
    call("nvrtcCreateProgram", ctypes.byref(program), source, name.encode(), 0, None, None)
    call("nvrtcCompileProgram", program, len(options), (ctypes.c_char_p * len(options))(*options))
    size = ctypes.c_size_t()
    call("nvrtcGetPTXSize", program, ctypes.byref(size))
    ptx = ctypes.create_string_buffer(size.value)
    call("nvrtcGetPTX", program, ptx)
    call("nvrtcDestroyProgram", ctypes.byref(program))
    return ptx.value.decode()


def stamped(source: Path, nvrtc: ctypes.CDLL) -> str:
    """Make the text of the file that belongs beside `source`."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    ptx = compile_ptx(nvrtc, source.name, source.read_bytes())
    body = re.sub(r"^//.*\n", "", ptx, flags=re.MULTILINE).strip() + "\n"
    body, versions = re.subn(r"^\.version .*$", f".version {PTX_VERSION}", body, flags=re.MULTILINE)
    assert versions == 1, "the compiler's output has no one .version line"
    body = "\n".join(line.rstrip() for line in body.splitlines()) + "\n"
    header = [
        f"// {source.name}, compiled by regenerate.py with NVRTC {major.value}.{minor.value} for {ARCHITECTURE}.",
        f"// source {fnv1a(source.read_bytes())}",
        f"// ptx {fnv1a(body.encode())}",
    ]
    return "\n".join(header) + "\n" + body


def main() -> None:
    """Write, or with --check compare, the PTX of every kernel."""
    nvrtc = library()
    for source in sorted(HERE.glob("*.cu")):
        target = source.with_suffix(".ptx")
        text = stamped(source, nvrtc)
        if "--check" not in sys.argv[1:]:
            target.write_text(text, "utf-8")
        elif not target.is_file() or target.read_text("utf-8") != text:
            made = text.splitlines()[0].partition("with ")[2]
            sys.exit(f"{target.name} is not what this compiler makes of {source.name} ({made})")


if __name__ == "__main__":
    main()
