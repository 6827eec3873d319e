"""Directories as sources: each way they can be wrong is named before anything is loaded."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from hub_imitation import safetensors

from shoal import sources

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def model(tmp_path: Path, cache: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(safetensors(100))
    return path


def test_good_directory_is_itself(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sources.resolve(str(model)) == model
    monkeypatch.chdir(model.parent)
    assert sources.resolve("model") == model
    assert sources.resolve("./model") == model


def test_missing_things(model: Path, tmp_path: Path) -> None:
    for source, words in [
        (str(tmp_path / "none"), "there is no directory"),
        (str(model / "config.json"), "is a file"),
        ("no-slash", "neither a directory here nor a hub id"),
        ("a/b/c", "neither a directory here nor a hub id"),
        ("demo:poems", "the demo has no model 'poems'; it has chat, documents, code"),
        ("demo:chat", "not prepared yet"),
    ]:
        with pytest.raises(sources.SourceMissingError, match=words) as error:
            sources.resolve(source)
        assert error.value.source == source
    (model / "config.json").unlink()
    with pytest.raises(sources.SourceMissingError, match=r"no config.json"):
        sources.resolve(str(model))


@pytest.mark.parametrize("keep", [0, 4, 60, 399, 460])
def test_truncated_weights(model: Path, keep: int) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(sources.SourceCorruptError, match="cut off"):
        sources.resolve(str(model))


def test_garbage(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"\x10" + b"\0" * 7 + b"not json at all!" + b"\0" * 40)
    with pytest.raises(sources.SourceCorruptError, match="header that cannot be read"):
        sources.resolve(str(model))
    (model / "config.json").write_text("{")
    with pytest.raises(sources.SourceCorruptError, match="cannot be read as JSON"):
        sources.resolve(str(model))


def test_index_with_missing_shard(model: Path) -> None:
    (model / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}})
    )
    with pytest.raises(sources.SourceCorruptError, match=r"1 are missing: model-2.safetensors"):
        sources.resolve(str(model))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pytorch_model.bin", "only pickled weights"),
        ("model.Q4_1.gguf", "GGUF only"),
        ("adapter_model.safetensors", "adapter to another model"),
        ("notes.txt", "holds no weights"),
    ],
)
def test_other_forms_of_weights(model: Path, name: str, words: str) -> None:
    (model / "model.safetensors").rename(model / name)
    with pytest.raises(sources.SourceUnsupportedError, match=words):
        sources.resolve(str(model))


def test_revision_rules(model: Path) -> None:
    with pytest.raises(sources.SourceUnsupportedError, match="has no revision 'v1'"):
        sources.resolve(str(model), "v1")
    with pytest.raises(sources.SourceUnsupportedError, match="keep one"):
        sources.resolve("org/model@a", "b")
