"""Small real models, made on the spot from a seed: the architectures people run, a few tens of MiB each."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def byte_tokenizer() -> Any:
    """Make a byte-level tokenizer that needs no vocabulary file: 256 symbols and an end mark."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<eos>": 0, **{symbol: index + 1 for index, symbol in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def make_llama(path: Path, *, seed: int, layers: int = 8, hidden: int = 256, context: int = 512) -> Path:
    """Save a random Llama (about 24 MiB in float32 with the defaults) that never ends by itself."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=hidden,
        intermediate_size=hidden * 3,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).eval().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def make_bert(path: Path, *, seed: int, layers: int = 6, hidden: int = 384, context: int = 256) -> Path:
    """Save a random BERT, which a worker serves as an embedding model."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=257,
        hidden_size=hidden,
        intermediate_size=hidden * 4,
        num_hidden_layers=layers,
        num_attention_heads=6,
        max_position_embeddings=context,
        pad_token_id=0,
        initializer_range=0.1,
    )
    BertModel(config, add_pooling_layer=False).eval().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def tables(paths: dict[str, Path]) -> list[dict[str, object]]:
    """Give models made here as `[[model]]` tables."""
    return [{"name": name, "source": str(path), "dtype": "float32", "context": 512} for name, path in paths.items()]


def plain_embedding(path: Path, text: str, device: str = "cpu") -> list[float]:
    """What plain transformers makes of a text: the normalised mean of its tokens' last states, in float32."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModel.from_pretrained(path, dtype=torch.float32, add_pooling_layer=False).eval().to(device)
    ids = torch.tensor([tokenizer(text).input_ids], device=device)
    with torch.no_grad():
        states = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
    return [float(x) for x in torch.nn.functional.normalize(states.mean(dim=0), dim=0).cpu()]


def plain_greedy(path: Path, prompt: str, tokens: int, device: str = "cpu") -> str:
    """What plain transformers answers alone, greedily, in float32, with an explicit all-ones mask."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval().to(device)
    ids = torch.tensor([tokenizer(prompt).input_ids], device=device)
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0
        )
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
