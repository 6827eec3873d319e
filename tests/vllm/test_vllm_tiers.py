"""What lies below vLLM's staging memory, without vLLM: settings, facts, rows that go down and come back."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import shoal
from shoal.vllm import tiers
from shoal.vllm.tiers import Rows, TierSettings, model_facts

if TYPE_CHECKING:
    from pathlib import Path

ROWS, BYTES = 12, 8192
FACTS = {"model": "a"}


def staging() -> np.ndarray[Any, np.dtype[np.int8]]:
    return np.zeros((ROWS, BYTES), np.int8)


def names(count: int) -> list[bytes]:
    return [bytes([number]) * 36 for number in range(count)]


def end(rows: Rows) -> list[tuple[int, bool]]:
    rows.drain()
    return rows.finished()


def test_settings_are_read_and_what_is_wrong_is_said() -> None:
    whole = TierSettings.of(
        {
            "host": "2GiB",
            "disks": [{"path": "/a", "bytes": "1TiB", "write_bytes_per_hour": "1GiB"}, ["/b", 7]],
            "other": 1,
        }
    )
    assert whole.host_bytes == 2 << 30
    assert whole.disks == (("/a", 1 << 40, 1 << 30), ("/b", 7, None))
    assert TierSettings.of({"host": 5}).host_bytes == 5
    for wrong, said in (
        ({}, "has no place"),
        ({"host": "many"}, "many"),
        ({"disks": ["/a"]}, "a disk is"),
        ({"disks": [{"path": "/a"}]}, "a disk is"),
        ({"disks": [{"path": "/a", "bytes": 1, "size": 2}]}, "a disk is"),
        ({"host": "1GiB", "threads": "x"}, "'x'"),
    ):
        with pytest.raises(ValueError, match=said):
            TierSettings.of(wrong)


def test_rows_go_down_and_come_back_after_a_restart(tmp_path: Path) -> None:
    chance = np.random.default_rng(1)
    first = staging()
    first[:] = chance.integers(-128, 127, first.shape)
    settings = TierSettings.of({"host": "1MiB", "disks": [(tmp_path / "kv", "64MiB")]})
    rows = Rows(settings, memoryview(first), FACTS)
    assert not rows.has(names(1)[0])
    rows.save(7, names(8), np.arange(8))
    assert end(rows) == [(7, True)]
    assert all(rows.has(name) for name in names(8))
    with pytest.raises(shoal.TierError) as refused:
        Rows(settings, memoryview(staging()), FACTS)
    assert refused.value.kind == "in_use"
    # Another replica has a directory of its own.
    other = Rows(settings, memoryview(staging()), FACTS, replica=1)
    assert not other.has(names(1)[0])
    other.close()
    assert rows.flush(60)
    view = memoryview(first)
    rows.close()
    view.release()

    second = staging()
    rows = Rows(settings, memoryview(second), FACTS)
    until_found(rows, names(8)[0])
    rows.load(3, names(8), [11, 10, 9, 8, 0, 1, 2, 3])
    assert end(rows) == [(3, True)]
    assert (second[[11, 10, 9, 8, 0, 1, 2, 3]] == first[:8]).all()
    assert not second[4:8].any(), "rows were written that nobody asked for"
    rows.close()
    # Another model's rows are not found.
    rows = Rows(settings, memoryview(second), {"model": "b"})
    assert not rows.has(names(1)[0])
    rows.close()


def until_found(rows: Rows, name: bytes) -> None:
    deadline = time.monotonic() + 60
    while not rows.has(name):
        assert time.monotonic() < deadline, "the directory was not opened"
        time.sleep(0.01)


def test_a_row_that_cannot_be_read_is_a_miss_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = staging()
    rows = Rows(TierSettings.of({"host": "1MiB"}), memoryview(memory), FACTS)
    rows.save(1, names(4), range(4))
    assert end(rows) == [(1, True)]
    blocks = rows._up
    monkeypatch.setattr(blocks, "_store", Failing(blocks._store, {2}))
    rows.load(2, names(4), range(4))
    assert end(rows) == [(2, False)]
    assert [rows.has(name) for name in names(4)] == [True, True, False, True]
    monkeypatch.setattr(tiers, "AGAIN_S", 0.0)
    assert rows.has(names(4)[2]), "it is asked for again in the end"
    rows.close()


class Failing:
    """A store that cannot read some of what it has."""

    def __init__(self, store: Any, places: set[int]) -> None:
        self.store, self.places = store, places

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def get(self, keys: list[Any], buffers: list[Any], deadline_s: float) -> list[bool]:
        found = self.store.get(keys, buffers, deadline_s)
        return [ok and place not in self.places for place, ok in enumerate(found)]


def test_weights_that_changed_are_other_facts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1234")
    (tmp_path / "notes.txt").write_text("what is no weight does not count")
    before = model_facts(str(tmp_path))
    (tmp_path / "notes.txt").write_text("...")
    (tmp_path / "gone.safetensors").symlink_to(tmp_path / "nowhere")
    assert model_facts(str(tmp_path)) == before
    os.utime(tmp_path / "model.safetensors", ns=(1, 1))
    assert model_facts(str(tmp_path)) != before
    one = model_facts(str(tmp_path / "model.safetensors"))
    assert one["weights"].startswith("model.safetensors:4:1")
    hub = model_facts("nobody/has-this", "main")
    assert (hub["model"], hub["revision"], hub["weights"]) == ("nobody/has-this", "main", "")
