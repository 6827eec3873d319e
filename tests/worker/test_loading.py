"""Model directories that cannot be served, and the sentence each of them gets."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from shoal.worker import loading
from shoal.worker.errors import LoadError
from shoal.worker.spec import SpecError, WorkerSpec

from .plain import PlainMemory


def edited(path, name="config.json", **changes):
    at = path / name
    at.write_text(json.dumps({k: v for k, v in (json.loads(at.read_text()) | changes).items() if v is not None}))


def truncate(path):
    at = path / "model.safetensors"
    at.write_bytes(at.read_bytes()[:-100])


def garble(path):
    at = path / "model.safetensors"
    at.write_bytes(at.read_bytes()[:8] + b"x" * (at.stat().st_size - 8))


def only_a_pickle(path):
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def half_an_index(path):
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-2.safetensors"}}))


def an_index_that_escapes(path):
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))


def a_tensor_short(path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def no_tokenizer(path):
    for at in path.glob("tokenizer*"):
        at.unlink()


DAMAGE = [
    (shutil.rmtree, "model_missing", "does not exist"),
    (lambda p: (shutil.rmtree(p), p.write_text("")), "model_missing", "is a file"),
    (lambda p: (p / "config.json").unlink(), "model_missing", "config.json is missing"),
    (lambda p: (p / "config.json").write_text("{"), "model_corrupt", "config.json is not JSON"),
    (lambda p: (p / "config.json").write_text("[]"), "model_corrupt", "holds no object"),
    (lambda p: edited(p, model_type="zebra"), "model_unsupported", "model_type 'zebra'"),
    (lambda p: edited(p, model_type="zebra", auto_map={"AutoModel": "x"}), "model_unsupported", "never run"),
    (lambda p: edited(p, model_type="vit", architectures=["ViTModel"]), "model_unsupported", "ViTModel is neither"),
    (lambda p: edited(p, quantization_config={"bits": 4}), "model_unsupported", "quantised"),
    (
        lambda p: edited(p, layer_types=["full_attention", "linear_attention", "full_attention"]),
        "model_unsupported",
        "layers of kind linear_attention are not served",
    ),
    (lambda p: edited(p, sliding_window=1), "model_unsupported", "sliding_window of 1 is not served"),
    (lambda p: edited(p, hidden_size=32), "model_corrupt", "cannot load the model|do not have the shape"),
    (lambda p: edited(p, num_hidden_layers=4), "model_corrupt", "tensors are missing.*layers.3"),
    (lambda p: edited(p, max_position_embeddings=None), None, ""),
    (truncate, "model_corrupt", "model.safetensors is truncated"),
    (
        lambda p: (p / "model.safetensors").write_bytes(b"abc"),
        "model_corrupt",
        "truncated or no safetensors file: 3 bytes",
    ),
    (garble, "model_corrupt", "header cannot be read"),
    (only_a_pickle, "model_unsupported", "pytorch_model.bin is not read, only safetensors"),
    (lambda p: (p / "model.safetensors").unlink(), "model_missing", "model.safetensors is missing"),
    (half_an_index, "model_missing", "model-2.safetensors is missing, but"),
    (an_index_that_escapes, "model_corrupt", "not a file beside it"),
    (a_tensor_short, "model_corrupt", "up_proj"),
    (no_tokenizer, "model_missing", "tokenizer.json is missing"),
    (lambda p: (p / "tokenizer.json").write_text("{}"), "model_corrupt", "the tokenizer cannot be loaded"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("damage", "code", "message"), DAMAGE)
def test_a_damaged_directory_is_refused_by_name(llama_dir, tmp_path, damage, code, message):
    path = tmp_path / "model"
    shutil.copytree(llama_dir, path)
    damage(path)
    spec = WorkerSpec(source=str(path))
    if code is None:
        loading.load(loading.inspect(path), spec)
        return
    with pytest.raises(LoadError, match=message) as caught:
        loading.load(loading.inspect(path), spec)
    assert caught.value.code == code
    assert str(path) in str(caught.value)


def test_a_good_directory_loads(llama_dir):
    files = loading.inspect(llama_dir)
    assert files.kind == "causal"
    told = []
    loaded = loading.load(files, WorkerSpec(source="x", dtype="bfloat16"), lambda *step: told.append(step))
    assert loaded.model.dtype == torch.bfloat16
    assert (loaded.context_tokens, loaded.eos) == (256, (0,))
    assert told[-1] == ("reading", files.bytes, files.bytes)


def test_an_embedding_directory_loads(bert_dir):
    files = loading.inspect(bert_dir)
    assert (files.kind, files.length_max) == ("embedding", 16)
    assert files.pooling.normalize
    assert files.pooling.modes == ("pooling_mode_mean_tokens",)
    assert loading.load(files, WorkerSpec(source="x")).context_tokens == 16


def test_a_module_that_would_be_skipped_is_refused(bert_dir, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(bert_dir, path)
    modules = json.loads((path / "modules.json").read_text())
    (path / "modules.json").write_text(json.dumps([*modules, {"type": "sentence_transformers.models.Dense"}]))
    with pytest.raises(LoadError, match="type Dense is not served"):
        loading.inspect(path)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, "source"),
        ({"source": 3}, "source: 3 is not a string"),
        ({"source": "x", "dtype": "int4"}, "dtype: 'int4' is not one of"),
        ({"source": "x", "context": 0}, "context: 0 is less than 1"),
        ({"source": "x", "context": "many"}, "context: 'many' is not a whole number"),
        ({"source": "x", "kv_max_bytes": "64 mb"}, "kv_max_bytes: '64 mb' is not a number of bytes"),
        ({"source": "x", "threads": True}, "threads: True is not a whole number"),
    ],
)
def test_a_specification_is_checked(spec, message):
    with pytest.raises(SpecError, match=message):
        WorkerSpec.from_welcome(spec)


def test_a_specification_is_read():
    spec = WorkerSpec.from_welcome({"source": "x", "kv_max_bytes": "64 MiB", "context": None, "from_next_year": 1})
    assert (spec.kv_max_bytes, spec.context) == (64 << 20, None)
    assert WorkerSpec.from_welcome({"source": "x", "kv_max_bytes": 5}).kv_max_bytes == 5


def test_no_room_for_kv_says_how_much_is_needed(llama_dir):
    from shoal.worker.serving import assemble

    spec = WorkerSpec(source="x", kv_max_bytes=1000)
    loaded = loading.load(loading.inspect(llama_dir), spec)
    with pytest.raises(LoadError, match=r"kv_max_bytes is 1000; the least for this model is \d+"):
        assemble("tiny", loaded, PlainMemory(), spec, 1)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama_dir", "bert_dir"])
def test_a_blank_model_differs_in_its_bytes_alone(request, kind, dtype):
    path = request.getfixturevalue(kind)
    files, spec = loading.inspect(path), WorkerSpec(source=str(path), dtype=dtype)
    whole, blank = loading.load(files, spec), loading.load(files, spec, is_blank=True)
    tensors = [
        {
            name: (value.shape, value.dtype, value.stride())
            for name, value in one.model.state_dict(keep_vars=True).items()
        }
        for one in (whole, blank)
    ]
    assert tensors[0] == tensors[1]
    stored = whole.model.state_dict().keys()
    kept = {name: value for name, value in whole.model.named_buffers() if name not in stored}
    for name, value in blank.model.named_buffers():
        assert name in stored or torch.equal(value, kept[name]), name
    ties = [{name for name, _ in one.model.named_parameters()} for one in (whole, blank)]
    assert ties[0] == ties[1]
    assert (whole.context_tokens, whole.eos, whole.generation_config) == (
        blank.context_tokens, blank.eos, blank.generation_config,
    )  # fmt: skip
    assert whole.model.config._attn_implementation == blank.model.config._attn_implementation
    assert not blank.model.training
