"""Run kvcached's own tests with :mod:`shoal.compat.kvcached` in the place of its extension and its block manager.

Usage: ``python scripts/run_kvcached_tests.py CHECKOUT [pytest arguments]``. The checkout is one of
https://github.com/ovg-project/kvcached; its files are neither changed nor copied. It needs posix_ipc and wrapt to be
importable. Without a GPU, ``--simulate`` lets the tests that want one run on the simulated device: ``torch.cuda`` then
speaks of that one, and tensors lie in host memory.

Each test file runs in a process of its own, because many of them put stand-ins into ``sys.modules``.

One of them, ``test_paged_allocator_aliasing``, is a program of two halves. The first asserts that writes to pages
without memory land in one page that all share; here such a write is a fault, in which its process ends. So it is run
whole, and has to end so; and once more without the call of that half, which then has to pass.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

# What they test is the extension and the block manager; the others concern patches of engines, the controller, shell
# tools, which stay kvcached's own.
ALLOCATOR = (
    "test_alloc_rollback",
    "test_bestfit_page_selection",
    "test_memory_limit_control",
    "test_resize_reserved_order",
    "test_observability",
    "test_vllm_virtual_kv_capacity",
    "test_page_aware_eviction",
    "test_prefix_cache",
)
WANT_A_GPU = (
    "test_kvcache_manager",
    "test_page_allocator_snapshot",
    "test_prealloc_gil_deadlock",
    "test_alloc_kv_cache_alignment",
    "test_hetero_contiguous_layout",
    "test_hybrid_contiguous_layout",
)
PROGRAM, SHARED_PAGE = "test_paged_allocator_aliasing", "test_without_alloc_data_corrupted"
# How a process ends that touches a page without memory: on the host, and on a GPU by a kernel and by a copy.
FAULTS = ("segmentation fault", "illegal memory access")
# The driver refuses a copy there; a wrong argument of any other call is none.
REFUSED = ("k_buf[token] = torch.full(", "cuda error: invalid argument")
PACKAGE = Path(__file__).resolve().parents[1] / "python"
SUMMARY = re.compile(r"(\d+) (passed|failed|skipped|errors?|deselected|xfailed)")

# Runs at the start of each Python below, those that tests start included.
CUSTOMIZE = """
import os, types
import shoal.compat.kvcached
shoal.compat.kvcached.install()
if os.environ.get("SHOAL_KVCACHED_SIMULATE"):
    import torch
    total = 64 << 30
    torch.cuda.is_available = lambda: True
    torch.cuda.set_device = lambda device: None
    torch.cuda.current_device = lambda: 0
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(total_memory=total)
    from shoal.compat.kvcached import vmm_ops
    real = vmm_ops.init_kvcached
    vmm_ops.init_kvcached = lambda dev_str, *rest, **named: real("sim", *rest, **named)
    full = torch.full
    torch.full = lambda *rest, device=None, **named: full(*rest, **named)
"""


def start(checkout: Path, customize: Path, simulate: bool, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a Python with what stands for kvcached's modules, and wait for its end."""
    environment = dict(os.environ)
    paths = [str(customize), str(PACKAGE), str(checkout), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    if simulate:
        environment["SHOAL_KVCACHED_SIMULATE"] = "1"
    command = [sys.executable, "-X", "faulthandler", *arguments]
    return subprocess.run(
        command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


def run_program(checkout: Path, customize: Path, simulate: bool) -> dict[str, int]:
    """Run the program of two halves: whole, which has to fault in the first, and without that."""
    source = (checkout / f"tests/{PROGRAM}.py").read_text("utf-8")
    tree = ast.parse(source)
    main = tree.body[-1]
    calls = [line for line in main.body if SHARED_PAGE in ast.unparse(line)] if isinstance(main, ast.If) else []
    if not isinstance(main, ast.If) or len(calls) != 1:
        raise SystemExit(f"{PROGRAM} is not as at commit e8e6406: look")
    main.body.remove(calls[0])
    rest = customize / f"{PROGRAM}.py"
    rest.write_text(ast.unparse(tree), "utf-8")
    whole = start(checkout, customize, simulate, f"tests/{PROGRAM}.py")
    half = start(checkout, customize, simulate, str(rest))
    said = whole.stdout + whole.stderr
    is_fault = any(fault in said.lower() for fault in FAULTS) or all(part in said.lower() for part in REFUSED)
    has_faulted = whole.returncode != 0 and is_fault and "[PASS]" not in said
    has_passed = (
        half.returncode == 0 and half.stdout.count("[PASS]") == 1 and "Results: 1 passed, 0 failed" in half.stdout
    )
    if not (has_faulted and has_passed):
        sys.stdout.write(said[-3000:] + half.stdout[-3000:] + half.stderr[-3000:])
    failed = 2 - has_faulted - has_passed
    counts = {"passed": int(has_passed), "failed": failed, "faulted": int(has_faulted)}
    return {kind: number for kind, number in counts.items() if number}


def run(checkout: Path, customize: Path, name: str, simulate: bool, arguments: list[str]) -> dict[str, int]:
    """Run one test file and count."""
    done = start(
        checkout, customize, simulate,
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(checkout), f"tests/{name}.py", *arguments,
    )  # fmt: skip
    last = done.stdout.strip().rsplit("\n", 1)[-1]
    counts = {kind.rstrip("s"): int(number) for number, kind in SUMMARY.findall(last)}
    if done.returncode not in {0, 5}:
        sys.stdout.write(done.stdout[-6000:] + done.stderr[-2000:])
        if not counts.get("failed") and not counts.get("error"):
            counts["error"] = 1
    return counts


def main() -> int:
    """Run them and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--simulate", action="store_true", help="run those that want a GPU on the simulated device")
    parser.add_argument("--only", help="one file, without its ending")
    parser.add_argument("--counts", type=Path, help="a file to write the counts to, as JSON")
    options, arguments = parser.parse_known_args()
    names = [options.only] if options.only else [*ALLOCATOR, *WANT_A_GPU, PROGRAM]
    wrong = 0
    rows = []
    with tempfile.TemporaryDirectory(prefix="shoal-kvcached-") as directory:
        (Path(directory) / "sitecustomize.py").write_text(CUSTOMIZE, "utf-8")
        for name in names:
            checkout, customize = options.checkout.resolve(), Path(directory)
            if name == PROGRAM:
                counts = run_program(checkout, customize, options.simulate)
            else:
                counts = run(checkout, customize, name, options.simulate, arguments)
            wrong += counts.get("failed", 0) + counts.get("error", 0)
            rows.append((name, counts))
    if options.counts is not None:
        options.counts.write_text(json.dumps(dict(rows)), "utf-8")
    for name, counts in rows:
        print(f"{name:34} " + ", ".join(f"{number} {kind}" for kind, number in counts.items()))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
