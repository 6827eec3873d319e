"""From a directory of files to a model on the CPU, with a clear word where that cannot be.

Only safetensors files are read and no code of a model is run. Everything that can be wrong with the files is looked for
before torch is asked to load them, so that the message names the file and what would be right.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .engine_embedding import POOLINGS, Pooling
from .errors import LoadError, described
from .stamps import Stamp

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .spec import WorkerSpec

Progress = Callable[[str, int, int], None]

_HEADER_BYTES_MAX = 100 << 20
_TORCH_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len")
_ENCODERS = (
    "bert",
    "roberta",
    "xlm-roberta",
    "distilbert",
    "mpnet",
    "electra",
    "camembert",
    "modernbert",
    "nomic_bert",
)


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor's bytes lie in a file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


@dataclass(frozen=True)
class ModelFiles:
    """What a model directory holds, checked.

    Attributes
    ----------
    kind
        ``"causal"`` or ``"embedding"``.
    stamps
        Of the configuration and of each file of weights, from before anything was read of them.
    """

    path: Path
    kind: str
    config: dict[str, Any]
    tensors: dict[str, TensorPlace]
    pooling: Pooling | None = None
    length_max: int | None = None
    stamps: dict[Path, Stamp] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """All bytes of the tensors."""
        return sum(place.bytes for place in self.tensors.values())


@dataclass(frozen=True)
class LoadedModel:
    """A model on the CPU and what serves it."""

    files: ModelFiles
    model: PreTrainedModel
    tokenizer: Any
    context_tokens: int
    eos: tuple[int, ...] = ()
    generation_config: dict[str, Any] = field(default_factory=dict)


def _corrupt(message: str) -> LoadError:
    return LoadError("model_corrupt", message)


def _unsupported(message: str) -> LoadError:
    return LoadError("model_unsupported", message)


def inspect(path: Path) -> ModelFiles:
    """Check a model directory without loading it.

    Raises
    ------
    LoadError
        It is missing, truncated, corrupt or of a kind this worker does not serve.
    """
    try:
        return _inspect(path)
    except OSError as error:
        raise LoadError(
            "model_missing", f"{error.filename or path} cannot be read: {error.strerror or described(error)}"
        ) from error


def _inspect(path: Path) -> ModelFiles:
    if not path.exists():
        raise LoadError(
            "model_missing", f"{path} does not exist; a directory with config.json and *.safetensors is needed"
        )
    if not path.is_dir():
        raise LoadError("model_missing", f"{path} is a file; a directory with config.json and *.safetensors is needed")
    if not (path / "config.json").is_file() and (path / "modules.json").is_file():
        raise _unsupported(f"{path / 'config.json'} is missing: the transformer must lie in the directory itself")
    at = path / "config.json"
    stamps = {at: Stamp.of(at.stat())} if at.is_file() else {}
    config = read_object(at, missing="model_missing")
    if (path / "modules.json").is_file():
        kind = "embedding"
        pooling, length_max = _sentence_transformers(path)
    else:
        kind, pooling, length_max = _kind(path, config), None, None
        if kind == "embedding":
            pooling = Pooling()
    if not (path / "tokenizer.json").is_file() and not any(path.glob("tokenizer*")) and not any(path.glob("vocab*")):
        raise LoadError("model_missing", f"{path / 'tokenizer.json'} is missing; the model's tokenizer is needed")
    return ModelFiles(path, kind, config, _tensors(path, stamps), pooling, length_max, stamps)


def read_json(path: Path, *, missing: str = "model_corrupt") -> Any:
    """Read JSON from a file.

    Raises
    ------
    LoadError
        The file is missing or no JSON object.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise LoadError(missing, f"{path} is missing") from None
    except OSError as error:
        raise LoadError("model_missing", f"{path} cannot be read: {error.strerror or described(error)}") from error
    except ValueError as error:
        raise _corrupt(f"{path} is not JSON: {error}") from error
    return value


def read_object(path: Path, *, missing: str = "model_corrupt") -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises
    ------
    LoadError
        The file is missing or holds no object.
    """
    value = read_json(path, missing=missing)
    if not isinstance(value, dict):
        raise _corrupt(f"{path} holds no object")
    return value


def _kind(path: Path, config: dict[str, Any]) -> str:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type, names = config.get("model_type"), config.get("architectures") or []
    if not isinstance(model_type, str | None) or not isinstance(names, list):
        raise _corrupt(f"{path / 'config.json'}: model_type must be a string and architectures a list")
    if model_type not in CONFIG_MAPPING_NAMES:
        own_code = " (it brings code of its own, which is never run)" if config.get("auto_map") else ""
        raise _unsupported(f"{path / 'config.json'}: model_type {model_type!r} is not known to transformers{own_code}")
    if config.get("quantization_config"):
        raise _unsupported(
            f"{path / 'config.json'}: quantised weights are not served; use the plain safetensors of the model"
        )
    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and any(str(name).endswith("CausalLM") for name in names):
        return "causal"
    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]) in names:
        return "causal"
    if model_type in _ENCODERS:
        return "embedding"
    raise _unsupported(
        f"{path / 'config.json'}: architecture {', '.join(map(str, names)) or model_type} is neither a causal language "
        "model nor a BERT-like encoder"
    )


def _sentence_transformers(path: Path) -> tuple[Pooling, int | None]:
    """Pooling, normalisation and length of a sentence-transformers directory."""
    modules = read_json(path / "modules.json")
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise _corrupt(f"{path / 'modules.json'} is not a list of modules")
    modes: tuple[str, ...] = ("pooling_mode_mean_tokens",)
    normalize = False
    for module in modules:
        name = str(module.get("type", "")).rsplit(".", 1)[-1]
        if name == "Pooling":
            folder = str(module.get("path", ""))
            if not re.fullmatch(r"[\w.-]+", folder) or folder == "..":
                raise _corrupt(f"{path / 'modules.json'}: {folder!r} is no folder beside it")
            at = path / folder / "config.json"
            config = read_object(at)
            wanted = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
            unknown = [key for key in wanted if key not in POOLINGS]
            if unknown or not wanted:
                raise _unsupported(f"{at}: {unknown[0] if unknown else 'no pooling mode'} is not served")
            modes = tuple(key for key in POOLINGS if key in wanted)
        elif name == "Normalize":
            normalize = True
        elif name != "Transformer":
            raise _unsupported(f"{path / 'modules.json'}: a module of type {name} is not served")
    lengths = path / "sentence_bert_config.json"
    length = read_object(lengths).get("max_seq_length") if lengths.is_file() else None
    return Pooling(modes, normalize), length if isinstance(length, int) and length > 0 else None


def _tensors(path: Path, stamps: dict[Path, Stamp]) -> dict[str, TensorPlace]:
    """Find every tensor; `stamps` gets those of the files."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        mapping = read_object(index).get("weight_map")
        if not isinstance(mapping, dict) or not mapping:
            raise _corrupt(f"{index} has no weight_map")
        names = sorted(set(map(str, mapping.values())))
        for name in names:
            if Path(name).name != name:
                raise _corrupt(f"{index} names {name}, which is not a file beside it")
            if not (path / name).is_file():
                raise LoadError("model_missing", f"{path / name} is missing, but {index.name} names it")
    elif (path / "model.safetensors").is_file():
        mapping, names = None, ["model.safetensors"]
    else:
        other = next((p.name for pattern in ("*.bin", "*.pt", "*.gguf") for p in sorted(path.glob(pattern))), None)
        if other is not None:
            raise _unsupported(
                f"{path / 'model.safetensors'} is missing; {other} is not read, only safetensors files are"
            )
        raise LoadError("model_missing", f"{path / 'model.safetensors'} is missing")
    tensors: dict[str, TensorPlace] = {}
    for name in names:
        stamps[path / name] = Stamp.of((path / name).stat())
        tensors |= safetensors_places(path / name)
    for name, file in (mapping or {}).items():
        if name not in tensors:
            raise _corrupt(f"{path / file} has no tensor {name}, but {index.name} says so")
    return tensors


def safetensors_places(path: Path) -> dict[str, TensorPlace]:
    """Where each tensor of a safetensors file lies; the file's length is checked.

    Raises
    ------
    LoadError
        The file is truncated or its header is not what the format says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        header_bytes = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= header_bytes <= min(_HEADER_BYTES_MAX, max(size - 8, 0)):
            raise _corrupt(f"{path} is truncated or no safetensors file: {size} bytes, header of {header_bytes}")
        try:
            header = json.loads(file.read(header_bytes))
            places = {
                name: TensorPlace(
                    path,
                    str(entry["dtype"]),
                    tuple(map(int, entry["shape"])),
                    8 + header_bytes + int(entry["data_offsets"][0]),
                    int(entry["data_offsets"][1]) - int(entry["data_offsets"][0]),
                )
                for name, entry in header.items()
                if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise _corrupt(f"{path} is corrupt: its header cannot be read ({described(error)})") from error
    end = max((place.offset + place.bytes for place in places.values()), default=8 + header_bytes)
    if any(place.bytes < 0 or place.offset < 8 + header_bytes for place in places.values()):
        raise _corrupt(f"{path} is corrupt: a tensor lies outside the file")
    if end != size:
        state = "truncated" if size < end else "corrupt"
        raise _corrupt(f"{path} is {state}: it has {size} bytes, its header describes {end}")
    return places


def load(
    files: ModelFiles, spec: WorkerSpec, progress: Progress = lambda *_: None, *, is_blank: bool = False
) -> LoadedModel:
    """Load a checked directory on the CPU.

    Parameters
    ----------
    files
        From :func:`inspect`.
    spec
        What the server says of the model.
    progress
        Told the phase, bytes done and bytes in all.
    is_blank
        Make the model without reading its weights: its parameters hold anything, for whoever has the bytes elsewhere.

    Raises
    ------
    LoadError
        transformers cannot make a model of the files.
    """
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    progress("reading", 0, files.bytes)
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(files.path, **options)
    except Exception as error:
        raise _corrupt(f"{files.path}: the tokenizer cannot be loaded ({described(error)})") from error
    auto = AutoModelForCausalLM if files.kind == "causal" else AutoModel
    if files.kind == "embedding":
        options["add_pooling_layer"] = False
    dtype = dtype_of(files, spec)
    try:
        if is_blank:
            model, info = _blank(auto, files, dtype, options)
        else:
            model, info = _from_pretrained(auto, files.path, dtype=dtype, use_safetensors=True, **options)
    except LoadError:
        raise
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise _corrupt(f"{files.path}: transformers cannot load the model ({described(error)})") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise _corrupt(
            f"{files.path}: {len(missing)} tensors are missing from the safetensors files, {missing[0]} first"
        )
    if info.get("mismatched_keys"):
        raise _corrupt(
            f"{files.path}: tensors do not have the shape config.json says: {sorted(info['mismatched_keys'])[0]}"
        )
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    _refuse_unserved(files, model)
    progress("reading", files.bytes, files.bytes)
    generation = files.path / "generation_config.json"
    generation_config = read_object(generation) if generation.is_file() else {}
    return LoadedModel(
        files,
        model,
        tokenizer,
        _context(files, model, tokenizer),
        _eos(files, tokenizer, generation_config),
        generation_config,
    )


def dtype_of(files: ModelFiles, spec: WorkerSpec) -> Any:
    """Give what the specification says; without a word, that of the files, but no causal model in float32 on a GPU.

    A GPU computes in bfloat16 several times as fast and in half the memory; the same choice as other engines make.
    Embeddings stay as they are: their numbers are the answer.
    """
    import torch

    if spec.dtype != "auto":
        return getattr(torch, spec.dtype)
    kinds = {place.dtype for place in files.tensors.values()} & {"F64", "F32", "F16", "BF16"}
    if spec.on_gpu and files.kind == "causal" and kinds <= {"F64", "F32"}:
        return torch.bfloat16
    return "auto"


def _from_pretrained(auto: Any, path: Path | None, **options: Any) -> tuple[Any, dict[str, Any]]:
    try:
        return auto.from_pretrained(path, output_loading_info=True, **options)
    except TypeError:
        if "add_pooling_layer" not in options:  # only BERT's family has one
            raise
        options.pop("add_pooling_layer")
        return auto.from_pretrained(path, output_loading_info=True, **options)


def _blank(auto: Any, files: ModelFiles, dtype: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Make the model of tensors that nobody has written to, so that they take neither time nor memory."""
    import torch
    from transformers import AutoConfig
    from transformers.models.auto.auto_factory import _get_model_class

    config = AutoConfig.from_pretrained(files.path, **_only(options, "local_files_only", "trust_remote_code"))
    kind = _get_model_class(config, auto._model_mapping)
    tensors = {}
    for name, place in files.tensors.items():
        own = getattr(torch, _TORCH_DTYPES[place.dtype])
        # In what it is served in at once: a conversion would write to it.
        is_converted = isinstance(dtype, torch.dtype) and own.is_floating_point
        tensors[name] = torch.empty(place.shape, dtype=dtype if is_converted else own)
    pooling = _only(options, "add_pooling_layer")
    return _from_pretrained(kind, None, config=config, state_dict=tensors, dtype=dtype, **pooling)


def _only(options: dict[str, Any], *names: str) -> dict[str, Any]:
    """Give those of the options that are named."""
    return {name: options[name] for name in names if name in options}


def _refuse_unserved(files: ModelFiles, model: PreTrainedModel) -> None:
    """Kinds of attention that the worker's kernel would compute wrongly."""
    if files.kind != "causal":
        return
    config = model.config.get_text_config()
    at = files.path / "config.json"
    if getattr(config, "attn_logit_softcapping", None):
        raise _unsupported(f"{at}: soft-capped attention is not served")
    if config.model_type in ("gpt_oss", "bloom", "mpt") or getattr(config, "alibi", False):
        raise _unsupported(f"{at}: {config.model_type}'s attention (sinks or ALiBi) is not served")
    if getattr(model, "_is_stateful", False) or not model._supports_attention_backend:
        raise _unsupported(f"{at}: {type(model).__name__} keeps state that is no paged KV cache")
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        # Recurrent state holds for one length only: it would have to be copied wherever a prefix may end.
        raise _unsupported(f"{at}: layers of kind {', '.join(sorted(kinds))} are not served, only attention is")
    if getattr(config, "sliding_window", None) == 1:
        raise _unsupported(f"{at}: a sliding_window of 1 is not served: to transformers' cache it means none")


def _context(files: ModelFiles, model: PreTrainedModel, tokenizer: Any) -> int:
    config = model.config.get_text_config()
    found = [value for value in (getattr(config, key, None) for key in _CONTEXT_KEYS) if isinstance(value, int)]
    if not found:
        raise _unsupported(
            f"{files.path / 'config.json'}: none of {', '.join(_CONTEXT_KEYS)} says how long a text may be"
        )
    length = found[0]
    if files.kind == "embedding":
        if files.config.get("model_type") in ("roberta", "xlm-roberta", "camembert", "mpnet"):
            length -= 2  # their positions begin after the padding index
        length = min(length, files.length_max or length, int(min(tokenizer.model_max_length, 1 << 30)))
    return length


def _eos(files: ModelFiles, tokenizer: Any, generation_config: dict[str, Any]) -> tuple[int, ...]:
    """Every token that ends an answer: of the generation config, else of the config, and the tokenizer's own."""
    stated = generation_config.get("eos_token_id", files.config.get("eos_token_id"))
    tokens = set(stated) if isinstance(stated, list) else {stated}
    tokens.add(tokenizer.eos_token_id)
    return tuple(sorted(token for token in tokens if isinstance(token, int) and token >= 0))
