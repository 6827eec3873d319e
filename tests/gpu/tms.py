"""torch_memory_saver's own examples against Shoal, each in a process of its own. Run by `tests/gpu/run.sh tms`.

They are not part of this repository: `$SHOAL_TMS_EXAMPLES` names the folder `test/examples` of that library's source.
Only the import is changed (`shoal.compat.torch_memory_saver.install`). Where an example looks behind the interface,
what it looks at is stood in for here, in :func:`open_box`, and the row says so.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.gpu.report import result

MMAP = {"TMS_INIT_CPU_BACKUP_BACKEND": "mmap"}
INIT = {"TMS_INIT_ENABLE": "1", "TMS_INIT_ENABLE_CPU_BACKUP": "1"}
# Example and function, hook modes, environment.
CASES: list[tuple[str, tuple[str, ...], dict[str, str]]] = [
    ("simple.run", ("torch", "preload"), {}),
    ("cuda_graph.run", ("torch", "preload"), {}),
    ("rl_example.run", ("torch", "preload"), {}),
    ("cpu_backup.run", ("torch", "preload"), {}),
    ("cpu_backup.run_rss", ("torch",), {}),
    ("cpu_backup.run_backend_from_env", ("torch", "preload"), MMAP),
    ("cpu_backup.run_preload_backend_from_env", ("preload",), INIT | MMAP),
    ("cpu_backup.run_retain_from_env", ("torch", "preload"), {"TMS_RETAIN_CPU_BACKUP": "1"}),
    ("disk_backup.run", ("torch", "preload"), {}),
    ("nested_region.run", ("preload",), INIT),
]
OPENED = {"cpu_backup.run", "nested_region.run", "cpu_backup.run_backend_from_env",
          "cpu_backup.run_preload_backend_from_env"}  # fmt: skip
NOT_APPLICABLE = {
    "training_engine.run": "needs every cudaMalloc of the process hooked by LD_PRELOAD: it expects torch to give back "
    "what it caches of a pool in use and to try again, which torch does for its default pool alone",
    "cuda_vmm_granularity.run": "calls cudaMalloc itself under LD_PRELOAD; only torch's allocations are ours",
    "multi_device.run": "needs two GPUs",
    "multi_device_torch_mode.run": "needs two GPUs",
    "cpu_backup.run_multi_device_mmap_restore": "needs two GPUs",
    "xpu_scenarios.*": "needs an Intel GPU",
    "test_configure_subprocess, test_utils, test_merge_cuda_wheels": "LD_PRELOAD and that library's own packaging",
}


def open_box(saver: Any) -> None:
    """Stand in for what is behind that library's interface, where its examples look at it."""
    from shoal.torch import pools

    def key() -> Any:
        slots = saver._thread.slots
        return slots[-1].group.key if slots else None

    def tag() -> bytes:
        found = key()
        return (found.tag if found else "default").encode()

    def backend() -> bytes:
        found = key()
        return ((found.backend if found else "") or saver._ensure_initialized().backend).encode()

    names = ("libcudart.so.13", "libcudart.so.12", "libcudart.so")
    cudart = ctypes.CDLL(next(name for name in names if _loads(name)))
    cdll = SimpleNamespace(
        cudaHostGetFlags=cudart.cudaHostGetFlags,
        cudaGetLastError=cudart.cudaGetLastError,
        tms_get_interesting_region=lambda: key() is not None,
        tms_get_current_tag=tag,
        tms_get_enable_cpu_backup=lambda: bool(key()) and key().backup == "cpu",
        tms_get_cpu_backup_backend=backend,
    )

    class Pools:
        def pop(self, wanted: tuple[str, bool, bool, str, int]) -> object:
            tag, cpu, disk, backend, device = wanted
            from shoal.compat.torch_memory_saver.groups import Key

            return saver._groups.pop(Key(tag, "cpu" if cpu else "disk" if disk else "none", backend, device))

    @contextlib.contextmanager
    def with_region_config(**_: object) -> Iterator[None]:
        # The example frees a tensor and its pool in here, and looks at once whether host memory has gone.
        yield
        deadline = time.monotonic() + 10
        mem = next(iter(saver._managers.values()))
        pools._sweep()
        while mem.usage()["host"] and time.monotonic() < deadline:
            time.sleep(0.01)
        mem._native.trim_host()

    saver._impl = SimpleNamespace(
        _binary_wrapper=SimpleNamespace(cdll=cdll), _mem_pools=Pools(), _with_region_config=with_region_config
    )


def _loads(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def run_one(case: str, mode: str) -> None:
    """Run one example in this process."""
    import torch  # noqa: F401  (its libraries bring libcudart)

    import shoal.compat.torch_memory_saver as face

    face.install()
    name, function = case.split(".")
    if case in OPENED:
        open_box(face.torch_memory_saver)
    sys.path.insert(0, os.environ["SHOAL_TMS_EXAMPLES"])
    getattr(importlib.import_module(name), function)(hook_mode=mode)


def main() -> None:
    """Run them all and write the file; fail if one failed."""
    if len(sys.argv) == 3:
        run_one(sys.argv[1], sys.argv[2])
        return
    if not Path(os.environ.get("SHOAL_TMS_EXAMPLES", "missing")).is_dir():
        sys.exit("SHOAL_TMS_EXAMPLES must name the folder test/examples of torch_memory_saver's source")
    rows, failed = [], 0
    for case, modes, environment in CASES:
        for mode in modes:
            began = time.monotonic()
            said = subprocess.run(
                [sys.executable, "-X", "faulthandler", "-m", "tests.gpu.tms", case, mode],
                env=os.environ | environment, capture_output=True, text=True, check=False, timeout=120,
            )  # fmt: skip
            passed = said.returncode == 0
            failed += not passed
            note = ", with what it looks at behind the interface stood in for" if case in OPENED else ""
            took = time.monotonic() - began
            print(f"{'passed' if passed else 'FAILED'}  {case} [{mode}] in {took:.1f} s{note}", flush=True)
            if not passed:
                print(said.stdout[-3000:], said.stderr[-3000:], sep="\n", flush=True)
            rows.append({
                "case": f"torch_memory_saver's {case} [{mode}]{note}", "metric": "passed", "value": int(passed),
                "unit": "bool", "better": "higher", "ceiling": None, "peer": None, "peer_value": None, "target": 1,
                "met": passed, "samples": 1, "spread": [int(passed), int(passed)],
            })  # fmt: skip
    for case, why in NOT_APPLICABLE.items():
        print(f"not applicable  {case}: {why}")
    target = Path(os.environ["SHOAL_RESULT"])
    before = json.loads(target.read_text("utf-8"))["rows"] if target.exists() else []
    target.write_text(json.dumps(result(before + rows) | {"not_applicable": NOT_APPLICABLE}, indent=1) + "\n", "utf-8")
    if failed:
        sys.exit(f"{failed} of {len(rows)} failed")


if __name__ == "__main__":
    main()
