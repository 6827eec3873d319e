"""Models from a hub: what is taken, what is refused, and what an interruption costs."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING

import pytest
from hub_imitation import COMMIT, Hub, safetensors

from shoal import sources

if TYPE_CHECKING:
    from pathlib import Path

TAKEN = {"config.json", "tokenizer.json", "1_Pooling/config.json", "model.safetensors"}


def names(path: Path) -> set[str]:
    return {str(entry.relative_to(path)) for entry in path.rglob("*") if entry.is_file()}


def test_takes_weights_and_texts_and_nothing_that_runs(hub: Hub, cache: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    path = sources.resolve("org/model", progress=lambda *event: seen.append(event))
    assert path == cache / "hub" / "org--model" / COMMIT
    assert names(path) == TAKEN
    for name in TAKEN:
        assert (path / name).read_bytes() == hub.files[name]
    total = sum(len(hub.files[name]) for name in TAKEN)
    assert seen[-1] == ("downloading", total, total)
    assert all(0 <= done <= total for _, done, _ in seen)


def test_second_time_downloads_nothing_and_offline_asks_nothing(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    first = sources.resolve("org/model")
    before = len(hub.requests)
    assert sources.resolve("org/model") == first
    assert [where for where, _, _ in hub.requests[before:]] == ["hub"]
    before = len(hub.requests)
    assert sources.resolve("org/model@" + COMMIT) == first
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert sources.resolve("org/model") == first
    assert len(hub.requests) == before


def test_cut_connection_is_resumed_where_it_stopped(hub: Hub) -> None:
    hub.cut_after = [500_000, 100_000]
    path = sources.resolve("org/model")
    assert (path / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
    assert [headers.get("Range") for headers in hub.downloads("model.safetensors")] == [
        None,
        "bytes=500000-",
        "bytes=600000-",
    ]


def test_interrupted_run_is_gone_on_with_by_the_next(hub: Hub, cache: Path) -> None:
    class InterruptError(Exception):
        pass

    def stop(_phase: str, done: int, _total: int) -> None:
        if done > 400_000:
            raise InterruptError

    hub.cut_after = [500_000]
    with pytest.raises(InterruptError):
        sources.resolve("org/model", progress=stop)
    assert not (cache / "hub" / "org--model" / COMMIT).exists()
    sources.resolve("org/model")
    resumed = hub.downloads("model.safetensors")[-1]["Range"]
    assert int(resumed.removeprefix("bytes=").removesuffix("-")) > 400_000
    assert len(hub.downloads("tokenizer.json")) == 1


def test_server_without_ranges_starts_over(hub: Hub) -> None:
    hub.ranges = False
    hub.cut_after = [700_000]
    path = sources.resolve("org/model")
    assert (path / "model.safetensors").read_bytes() == hub.files["model.safetensors"]


def test_hub_that_keeps_hanging_up_is_given_up_with_what_came_kept(hub: Hub, cache: Path) -> None:
    hub.cut_after = [1000] + [0] * 20
    with pytest.raises(sources.SourceUnreachableError, match="what has arrived is kept"):
        sources.resolve("org/model")
    part = cache / "hub" / "org--model" / (COMMIT + ".partial") / "model.safetensors.part"
    assert part.stat().st_size == 1000


def test_busy_hub_is_asked_again(hub: Hub) -> None:
    hub.busy = 3
    assert names(sources.resolve("org/model")) == TAKEN


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_wrong_bytes_never_reach_the_cache(hub: Hub, cache: Path, name: str) -> None:
    true = hub.files[name]
    hub.lie[name] = bytes([true[0] ^ 1]) + true[1:]
    with pytest.raises(sources.SourceCorruptError, match=f"{name} of org/model twice arrived with another hash"):
        sources.resolve("org/model")
    assert not (cache / "hub" / "org--model" / COMMIT).exists()
    del hub.lie[name]
    assert (sources.resolve("org/model") / name).read_bytes() == true


def test_token_goes_to_the_hub_and_not_where_it_redirects(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "secret"
    monkeypatch.setenv("HF_TOKEN", "secret")
    sources.resolve("org/model")
    for where, path, headers in hub.requests:
        assert ("Authorization" in headers) == (where == "hub"), (where, path)


def test_token_file_is_read(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "from-file"
    (tmp_path / "token").write_text("from-file\n")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    assert sources.resolve("org/model").is_dir()


def test_refusals_say_what_to_do(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "secret"
    with pytest.raises(sources.SourceUnauthorizedError, match="set HF_TOKEN") as refused:
        sources.resolve("org/model")
    assert refused.value.code == "model_unauthorized"
    monkeypatch.setenv("HF_TOKEN", "stale")
    with pytest.raises(sources.SourceUnauthorizedError, match="expired"):
        sources.resolve("org/model")
    monkeypatch.setenv("HF_TOKEN", "secret")
    hub.gated = True
    with pytest.raises(sources.SourceUnauthorizedError, match="gated: ask for access"):
        sources.resolve("org/model")
    hub.gated = False
    with pytest.raises(sources.SourceMissingError, match="no such revision: v9"):
        sources.resolve("org/model@v9")
    with pytest.raises(sources.SourceMissingError, match="has no org/other"):
        sources.resolve("org/other")
    assert sources.resolve("org/model", "refs/pr/1").name == COMMIT


def test_only_pickled_weights_are_refused_unread(hub: Hub) -> None:
    del hub.files["model.safetensors"], hub.files["consolidated.safetensors"]
    with pytest.raises(sources.SourceUnsupportedError, match=r"only pickled weights .pytorch_model.bin."):
        sources.resolve("org/model")
    assert not hub.downloads("pytorch_model.bin")


def test_shards_are_those_the_index_names(hub: Hub) -> None:
    hub.files["a-1.safetensors"], hub.files["a-2.safetensors"] = safetensors(10), safetensors(20)
    hub.files["stray.safetensors"] = safetensors(30)
    hub.files["model.safetensors.index.json"] = json.dumps(
        {"weight_map": {"x": "a-1.safetensors", "y": "a-2.safetensors"}}
    ).encode()
    taken = names(sources.resolve("org/model"))
    assert {name for name in taken if name.endswith(".safetensors")} == {"a-1.safetensors", "a-2.safetensors"}


@pytest.mark.parametrize("name", ["../evil.safetensors", "/etc/evil.safetensors", "a/../../evil.safetensors"])
def test_names_that_leave_the_directory_are_ignored(hub: Hub, cache: Path, name: str) -> None:
    hub.files[name] = safetensors(1)
    hub.files["model.safetensors.index.json"] = json.dumps({"weight_map": {"x": name}}).encode()
    with pytest.raises(sources.SourceCorruptError):
        sources.resolve("org/model")
    assert not list(cache.rglob("evil*"))


def test_offline_and_not_cached(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(sources.SourceMissingError, match=r"not in the cache .* HF_HUB_OFFLINE"):
        sources.resolve("org/model", offline=True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "true")
    with pytest.raises(sources.SourceMissingError):
        sources.resolve("org/model")
    assert hub.requests == []


def test_unreachable_hub_falls_back_to_the_cache(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    path = sources.resolve("org/model")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert sources.resolve("org/model") == path
    with pytest.raises(sources.SourceUnreachableError, match=r"127\.0\.0\.1:9 did not give org/other"):
        sources.resolve("org/other")


def test_a_copy_of_another_program_is_used_as_it_lies(hub: Hub, tmp_path: Path) -> None:
    root = tmp_path / "cache" / "huggingface" / "hub" / "models--org--model"
    snapshot = root / "snapshots" / COMMIT
    for name in TAKEN:
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).write_bytes(hub.files[name])
    assert sources.resolve("org/model") == snapshot
    assert not [path for where, path, _ in hub.requests if where == "storage"]
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    assert sources.resolve("org/model", offline=True) == snapshot
    (snapshot / "model.safetensors").write_bytes(hub.files["model.safetensors"][:1000])
    assert sources.resolve("org/model") != snapshot


def test_two_at_once_download_once(hub: Hub) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(sources.resolve("org/model"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == 3
    assert len(set(found)) == 1
    assert len(hub.downloads("model.safetensors")) == 1


def test_full_disk_is_said_before_a_byte_is_fetched(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.sources.hub.shutil.disk_usage", lambda _path: type("U", (), {"free": 1 << 20}))
    with pytest.raises(sources.SourceError, match=r"needs .* MiB more"):
        sources.resolve("org/model")
    assert not hub.downloads("model.safetensors")
