"""Whatever comes in, the answer is one of ours: never another exception."""

from __future__ import annotations

import contextlib
import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.worker import chat, loading, parsing
from shoal.worker.errors import ApiError, LoadError

from .conftest import byte_tokenizer

TOKENIZER = byte_tokenizer()
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = sorted(
    parsing._COMMON
    | parsing._HARMLESS
    | set(parsing._UNSUPPORTED)
    | {"max_completion_tokens", "top_logprobs", "best_of", "else"}
)


@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4), st.booleans())
def test_any_common_fields(body, is_chat):
    with contextlib.suppress(ApiError):
        ask = parsing.generation_ask(body, "m", parsing.SamplingDefaults(), chat=is_chat)
        assert 0.0 <= ask.sampling.temperature <= 2.0
        assert 0.0 <= ask.sampling.top_p <= 1.0
        assert ask.sampling.top_k >= 0
        assert ask.tokens_max is None or ask.tokens_max > 0
        assert all(ask.stops)
        assert not body.get("tools")
        assert 1 <= ask.n <= 128
        assert ask.sampling.logprobs is None or 0 <= ask.sampling.logprobs <= (20 if is_chat else 5)


@given(JSON)
def test_any_prompt(value):
    with contextlib.suppress(ApiError):
        for prompt in parsing.one_or_many({"prompt": value}, "prompt", 257, 128):
            assert isinstance(prompt, str) or all(0 <= token < 257 for token in prompt)


MESSAGE = st.dictionaries(
    st.sampled_from(["role", "content", "name", "tool_calls", "tool_call_id", "refusal", "reasoning_content"]),
    JSON | st.sampled_from(["user", "system", "developer", "assistant", "tool"]),
)


@given(JSON | st.lists(MESSAGE, max_size=3))
def test_any_messages(value):
    with contextlib.suppress(ApiError):
        tokens = chat.render(TOKENIZER, chat.checked_messages(value))
        assert all(0 <= token < 257 for token in tokens)


def small_file(entries=None):
    header = json.dumps(entries or {"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(16)


@given(st.binary(max_size=40) | st.tuples(st.integers(0, 90), st.integers(0, 255)) | st.integers(0, 100))
def test_any_bytes_for_a_safetensors_file(tmp_path_factory, change):
    good = small_file()
    match change:
        case bytes():
            data = change
        case (at, value):
            data = good[: at % len(good)] + bytes([value]) + good[at % len(good) + 1 :]
        case _:
            data = good[:change]
    path = tmp_path_factory.mktemp("file") / "model.safetensors"
    path.write_bytes(data)
    with contextlib.suppress(LoadError):
        for place in loading.safetensors_places(path).values():
            assert 8 <= place.offset <= place.offset + place.bytes <= len(data)


@given(JSON)
def test_any_header_for_a_safetensors_file(tmp_path_factory, entry):
    path = tmp_path_factory.mktemp("file") / "model.safetensors"
    path.write_bytes(small_file({"w": entry}))
    with contextlib.suppress(LoadError):
        loading.safetensors_places(path)


@given(JSON, st.sampled_from(["config.json", "modules.json", "1_Pooling/config.json", "sentence_bert_config.json"]))
def test_any_json_in_a_model_directory(tmp_path_factory, value, name):
    path = tmp_path_factory.mktemp("model")
    (path / "1_Pooling").mkdir()
    (path / "model.safetensors").write_bytes(small_file())
    (path / "tokenizer.json").write_text("{}")
    (path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    (path / "modules.json").write_text('[{"type": "x.Transformer"}, {"type": "x.Pooling", "path": "1_Pooling"}]')
    (path / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    assert loading.inspect(path).pooling.modes == ("pooling_mode_cls_token",)
    (path / name).write_text(json.dumps(value))
    with contextlib.suppress(LoadError):
        loading.inspect(path)


@given(JSON, JSON, JSON)
def test_any_config(tmp_path_factory, model_type, architectures, index):
    path = tmp_path_factory.mktemp("model")
    (path / "tokenizer.json").write_text("{}")
    (path / "config.json").write_text(json.dumps({"model_type": model_type, "architectures": architectures}))
    with contextlib.suppress(LoadError):
        loading.inspect(path)
    (path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with contextlib.suppress(LoadError):
        loading.inspect(path)


def test_a_directory_that_cannot_be_read(monkeypatch, tmp_path):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr("pathlib.Path.is_dir", denied)
    with pytest.raises(LoadError, match="cannot be read: Permission denied"):
        loading.inspect(tmp_path)
