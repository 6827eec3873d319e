"""What must not be survived: a touch of memory that is not there, and a handle on the wrong side of a fork."""

from __future__ import annotations

import os
import signal

from helpers import run_python

TOUCH = """
    import resource, sys
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from shoal import testing
    with testing.simulated_memory("16MiB") as mem:
        region = mem.region("weights", "4MiB")
        region.stage(0, b"x" * (4 << 20))
        region.seal()
        view = memoryview(region.buffer())
        if "guard" in sys.argv:
            with mem.guard():
                print(view[0], flush=True)
        else:
            region.wake()
            region.sleep()
            print("asleep", flush=True)
            print(view[0], flush=True)
        view.release()
"""


def test_touching_a_sleeping_region_is_a_fault() -> None:
    said = run_python(TOUCH)
    assert said.stdout == "asleep\n", said.stderr
    assert said.returncode == -signal.SIGSEGV


def test_touching_it_under_a_guard_is_not() -> None:
    said = run_python(TOUCH, "guard")
    assert said.returncode == 0, said.stderr
    assert said.stdout == f"{ord('x')}\n"


FORK = """
    import os, pickle, sys, gc, warnings
    warnings.simplefilter("ignore")
    import shoal
    from shoal import testing
    with testing.simulated_memory("16MiB") as mem:
        region = mem.region("weights", "4MiB")
        region.stage(0, b"x" * (4 << 20))
        region.seal()
        transfer = region.wake()
        kv = shoal.KvBacking(mem.region("kv", "4MiB", kind="kv"), block_bytes=1 << 20, blocks=4)
        buffer = region.buffer()
        uses = [
            lambda: mem.usage(), lambda: mem.region("x", 1), lambda: mem.guard(1).__enter__(), lambda: mem.reclaim(1),
            lambda: region.sleep(), lambda: region.wake(), lambda: region.usage(), lambda: region.buffer(),
            lambda: region.stage(0, b"y"), lambda: transfer.progress(), lambda: kv.back([0]), lambda: kv.backed_bytes,
            lambda: memoryview(buffer), lambda: region.seal(), lambda: region.commit(0, 1), lambda: kv.unback([0]),
        ]
        pid = os.fork()
        if pid == 0:
            raised = 0
            for use in uses:
                try:
                    use()
                except shoal.ForkError as error:
                    raised += error.owner == os.getppid() and error.pid == os.getpid()
            del mem, region, kv, transfer, buffer, uses, use
            gc.collect()
            os._exit(0 if raised == 16 else raised + 1)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
        # The child dropped its handles: the parent's memory must not have noticed.
        with mem.guard(10):
            assert bytes(memoryview(region.buffer())) == b"x" * (4 << 20)
        assert region.sleep().freed == 4 << 20
        print(mem.device_memory()["used_by_this_process"])
"""


def test_handles_raise_after_a_fork_and_the_parent_keeps_its_bytes() -> None:
    said = run_python(FORK)
    assert said.returncode == 0, said.stderr
    assert said.stdout == "0\n0\n"


KILLED = """
    import os, signal, sys
    import shoal
    mem = shoal.MemoryManager("sim", device_capacity="16MiB", host_budget="32MiB", runtime_dir=sys.argv[1])
    region = mem.region("weights", "12MiB")
    region.stage(0, b"x" * (12 << 20))
    region.seal()
    region.wake()
    print(mem.device_memory()["free"], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_gives_its_share_back(tmp_path: os.PathLike[str]) -> None:
    import shoal

    said = run_python(KILLED, str(tmp_path))
    assert said.returncode == -signal.SIGKILL, said.stderr
    assert said.stdout == f"{4 << 20}\n"
    mem = shoal.MemoryManager("sim", device_capacity="16MiB", host_budget="32MiB", runtime_dir=tmp_path)
    assert mem.device_memory()["free"] == 16 << 20
    region = mem.region("weights", "12MiB")
    region.stage(0, b"y" * (12 << 20))
    region.seal()
    with mem.guard():
        assert memoryview(region.buffer())[0] == ord("y")
