"""kvcached built from a checkout, for what measures it beside ours on a GPU.

kvcached is not part of this repository: `$SHOAL_KVCACHED` names a checkout of https://github.com/ovg-project/kvcached
(its folders `kvcached`, `csrc` and `tests`). It is built in a temporary folder as its own setup does, but for the line
that it prints when a page allocator is made, which crashes beside torch 2.11. What it imports (posix_ipc, wrapt) has to
be importable.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PRINTS = re.compile(r"^\s*std::cout << \"Init C\+\+ PageAllocator.*?;$", re.MULTILINE | re.DOTALL)


def checkout() -> Path:
    """Give the checkout that `$SHOAL_KVCACHED` names.

    Raises
    ------
    SystemExit
        It names none.
    """
    folder = Path(os.environ.get("SHOAL_KVCACHED", "missing"))
    if not (folder / "csrc").is_dir():
        sys.exit("SHOAL_KVCACHED must name a checkout of kvcached, with its folders kvcached, csrc and tests")
    return folder.resolve()


def built(source: Path, folder: Path) -> None:
    """Build it, or say that it cannot be: then ours is measured alone, and fails as not run."""
    start = time.monotonic()
    try:
        build(source, folder)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"FAILED  kvcached cannot be built: {error}", flush=True)
    else:
        print(f"kvcached built in {time.monotonic() - start:.0f} s", flush=True)


def build(checkout: Path, folder: Path) -> None:
    """Build its extension as its setup does, all files at once, beside a copy of its Python files."""
    import torch
    from torch.utils import cpp_extension

    shutil.copytree(checkout / "kvcached", folder / "kvcached")
    shutil.copytree(checkout / "csrc", folder / "csrc")
    allocator = folder / "csrc/page_allocator.cpp"
    text, found = PRINTS.subn("", allocator.read_text("utf-8"))
    if found != 1:
        raise SystemExit("kvcached prints something else than at commit e8e6406 when a page allocator is made: look")
    allocator.write_text(text, "utf-8")
    headers = [
        *cpp_extension.include_paths(device_type="cuda"),
        str(folder / "csrc/inc"),
        sysconfig.get_path("include"),
    ]
    flags = [
        "-O3", "-DNDEBUG", "-std=c++17", "-fPIC", "-DKVCACHED_USE_CUDA",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}", "-DTORCH_EXTENSION_NAME=vmm_ops",
        "-DTORCH_API_INCLUDE_EXTENSION_H", *(f"-I{path}" for path in headers),
    ]  # fmt: skip
    compiler = os.environ.get("CXX", "c++")

    def compiled(source: Path) -> str:
        made = str(source.with_suffix(".o"))
        subprocess.run([compiler, *flags, "-c", str(source), "-o", made], check=True)
        return made

    with ThreadPoolExecutor(16) as threads:
        objects = list(threads.map(compiled, sorted((folder / "csrc").rglob("*.cpp"))))
    libraries = cpp_extension.library_paths(device_type="cuda")
    stubs = [f"{path}/stubs" for path in libraries if Path(path, "stubs").is_dir()]
    subprocess.run(
        [
            compiler, "-shared", *objects, *(f"-L{path}" for path in [*libraries, *stubs]), "-lc10", "-ltorch",
            "-ltorch_cpu", "-ltorch_python", "-lc10_cuda", "-lcudart", "-lcuda",
            "-o", str(folder / "kvcached/vmm_ops.so"),
        ],
        check=True,
    )  # fmt: skip
