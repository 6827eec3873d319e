"""Weights at rest in a worker: used for the very files they were made of; whatever fails, the files are read."""

from __future__ import annotations

import json
import os
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch

from shoal.testing import simulated_memory
from shoal.worker import loading
from shoal.worker.__main__ import _placed
from shoal.worker.device import DeviceMemory
from shoal.worker.spec import WeightShare, WorkerSpec
from shoal.worker.weights import WeightsAtRest
from tests.support import models
from tests.support.witness import until

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return models.make_llama(tmp_path / "model", seed=0, hidden=256)


@pytest.fixture
def share(tmp_path: Path) -> WeightShare:
    return WeightShare(str(tmp_path / "weights"), 256 * MIB)


def start(made: Path, share: WeightShare, *, spoil: Any = None) -> bool:
    """Start as a worker does, compare all weights with the files', store them; whether they came from the store."""
    told = run(made, share, spoil=spoil)
    assert told["state"] in ("read", "stored", "unused"), told
    assert (told["reason"] is None) == (told["state"] != "unused"), told
    return told["state"] == "read"


def run(made: Path, share: WeightShare, *, spoil: Any = None) -> dict[str, Any]:
    """As :func:`start`; what the server is told in the end."""
    files, spec = loading.inspect(made), WorkerSpec(source=str(made), dtype="float32")
    want = loading.load(files, spec).model.state_dict()
    with simulated_memory("256MiB") as mem:
        memory = DeviceMemory(mem)
        at_rest = WeightsAtRest(share, files, "torch.float32")
        loaded, _ = _placed(memory, files, spec, lambda *_: None, at_rest)
        with mem.guard():
            have = loaded.model.state_dict()
            assert have.keys() == want.keys()
            assert all(torch.equal(value, want[name]) for name, value in have.items())
        if spoil is not None:
            spoil()
        memory.store_weights()
        until(lambda: at_rest._thread is None or is_over(memory.weights_at_rest()), 60, "they are stored, or not")
        told = memory.weights_at_rest()
        memory.close()
        assert told is not None
        return told


def is_over(told: dict[str, Any] | None) -> bool:
    """Whether nothing more is to come: the store was looked at once that was done which could be."""
    return told is not None and told["state"] != "waiting" and told.get("looked_at_ms", 0) > 0


def pack_of(share: WeightShare) -> Path:
    from pathlib import Path

    (pack,) = (path for path in (Path(share.path) / "packs").iterdir() if not path.suffix)
    return pack


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def relabel(share: WeightShare) -> None:
    """Make it what another version of Shoal might have stored under the name: laid out in another way."""
    from pathlib import Path

    import shoal

    (at,) = (Path(share.path) / "models").iterdir()
    _, _, body = at.read_bytes().partition(b"\n")
    note = json.loads(json.loads(body)["note"])
    note["layout"] = "0" * 64
    at.unlink()
    store = shoal.WeightStore(share.path, share.bytes)
    with simulated_memory("64MiB") as mem:
        region = mem.region("other", 4 * MIB, kind="weights", backing="keep")
        region.stage(0, bytes(4 * MIB))
        region.seal()
        store.fill(region, at.name, json.dumps(note), [])


@pytest.mark.parametrize(
    "harm",
    [
        lambda share: flip(pack_of(share)),
        lambda share: pack_of(share).unlink(),
        relabel,
    ],
    ids=["a bit", "a pack", "another layout"],
)
def test_whatever_is_wrong_there_the_files_are_read_and_stored_anew(made: Path, share: WeightShare, harm: Any) -> None:
    assert not start(made, share)
    assert start(made, share)
    harm(share)
    assert not start(made, share)
    assert start(made, share)


@pytest.mark.parametrize("error", [ImportError("no such name"), RuntimeError("shape"), MemoryError(), AssertionError()])
def test_no_failure_of_the_store_is_one_of_the_model(
    made: Path, share: WeightShare, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    assert not start(made, share)

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(loading, "_blank", fail)
        assert not start(made, share)
    with monkeypatch.context() as patched:
        patched.setattr("shoal.torch.placement._load", fail)
        assert not start(made, share)
    with monkeypatch.context() as patched:
        patched.setattr("shoal.worker.weights.WeightStore", fail)
        told = run(made, share)
        assert (told["state"], told.get("looked_at_ms")) == ("unused", None), told
        assert str(error) in told["reason"], told
    assert start(made, share)


def test_a_directory_that_does_not_answer_keeps_no_model_from_serving(
    made: Path, share: WeightShare, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not start(made, share)
    answers = threading.Event()

    def hang(*_: Any, **__: Any) -> Any:
        answers.wait(60)
        raise OSError("it was gone")

    with monkeypatch.context() as patched:
        patched.setattr("shoal.worker.weights.WeightStore", hang)
        patched.setattr("shoal.worker.weights._FIND_S", 0.2)
        begun = time.monotonic()
        told = run(made, share)
        took_s = time.monotonic() - begun
        answers.set()
    assert took_s < 50
    assert (told["state"], told["reason"]) == ("unused", f"{share.path} does not answer within 0.2 s")
    assert start(made, share)


def change(made: Path) -> None:
    """Write in place where no sample is taken, and set the times back."""
    at = made / "model.safetensors"
    stat = at.stat()
    header = int.from_bytes(at.read_bytes()[:8], "little")
    tensors = json.loads(at.read_bytes()[8 : 8 + header])
    begin, end = max(
        (one["data_offsets"] for name, one in tensors.items() if name != "__metadata__"),
        key=lambda one: one[1] - one[0],
    )
    assert end - begin > 8192
    with at.open("r+b") as file:
        file.seek(8 + header + begin + 6000)
        was = file.read(4)
        file.seek(-4, os.SEEK_CUR)
        file.write(bytes([was[0] ^ 1, *was[1:]]))
    os.utime(at, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert at.stat().st_mtime_ns == stat.st_mtime_ns


def test_files_that_were_written_to_are_others_whatever_their_times_say(made: Path, share: WeightShare) -> None:
    assert not start(made, share)
    change(made)
    assert not start(made, share)
    assert start(made, share)


def test_what_was_read_of_files_that_change_meanwhile_is_not_stored(made: Path, share: WeightShare) -> None:
    assert not start(made, share, spoil=lambda: change(made))
    assert not start(made, share), "it was read before the change"
    assert start(made, share)


def test_what_a_wake_could_not_use_is_told(made: Path, share: WeightShare) -> None:
    assert not start(made, share)
    files, spec = loading.inspect(made), WorkerSpec(source=str(made), dtype="float32")
    with simulated_memory("256MiB", host_budget="1MiB") as mem:
        memory = DeviceMemory(mem)
        _placed(memory, files, spec, lambda *_: None, WeightsAtRest(share, files, "torch.float32"))
        memory.store_weights()
        until(lambda: is_over(memory.weights_at_rest()), 60, "the store is looked at")
        told = memory.weights_at_rest()
        assert told is not None
        assert (told["state"], told["reason"], told["models"]) == ("read", None, 1)
        assert 0 < told["bytes"] <= told["unshared"] <= told["bytes_max"] == share.bytes
        pack = pack_of(share)
        pack.write_bytes(bytes(pack.stat().st_size))
        with mem.guard():
            pass
        told = memory.weights_at_rest()
        memory.close()
        assert told is not None
        assert told["state"] == "unused"
        assert "wakes read the model's files" in told["reason"]


def test_why_weights_wait_is_told(made: Path, share: WeightShare) -> None:
    narrow = WeightShare(share.path, share.bytes, write_bytes_per_hour=1 << 20)
    other = models.make_llama(made.parent / "other", seed=1, hidden=256)
    assert not start(other, narrow)
    files, spec = loading.inspect(made), WorkerSpec(source=str(made), dtype="float32")
    with simulated_memory("256MiB") as mem:
        memory = DeviceMemory(mem)
        _placed(memory, files, spec, lambda *_: None, WeightsAtRest(narrow, files, "torch.float32"))
        memory.store_weights()
        until(lambda: (memory.weights_at_rest() or {})["reason"] is not None, 60, "why")
        told = memory.weights_at_rest()
        memory.close()
        assert told is not None
        assert told["state"] == "waiting"
        assert "too much for the disk now" in told["reason"]
