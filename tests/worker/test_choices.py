"""Several choices of one request, and how likely their tokens were, as OpenAI gives both."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from shoal.worker import loading
from shoal.worker.logprobs import Words
from shoal.worker.spec import WorkerSpec

from .conftest import byte_tokenizer
from .test_http import HELLO, with_worker

ASK = {"model": "tiny", "prompt": "abc", "max_tokens": 12, "ignore_eos": True}


async def choices(worker, path, ask):
    status, answer = await worker.post(path, ask)
    assert status == 200, answer
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(answer["choices"])))
    return answer


async def streamed(worker, path, ask):
    """The chunks of a stream, each with one choice."""
    async with worker.session.post(f"http://x/v1/{path}", json=ask | {"stream": True}) as answer:
        assert answer.status == 200
        events = [line[6:] for line in (await answer.text()).split("\n\n") if line]
    assert events[-1] == "[DONE]"
    return [json.loads(event)["choices"][0] for event in events[:-1]]


def test_choices_share_their_batches_and_draw_each_for_itself(llama_dir, tmp_path):
    sampled = ASK | {"temperature": 1.0, "seed": 7}

    async def act(worker):
        before = worker.memory.guards
        await choices(worker, "completions", sampled)
        alone = worker.memory.guards - before
        answer = await choices(worker, "completions", sampled | {"n": 4})
        assert worker.memory.guards - before - alone <= alone + 4, "four take no more steps than one"
        texts = [choice["text"] for choice in answer["choices"]]
        assert len(set(texts)) == 4
        cached = {"cached_tokens": 0}
        usage = {"prompt_tokens": 3, "completion_tokens": 48, "total_tokens": 51, "prompt_tokens_details": cached}
        assert answer["usage"] == usage
        for number, text in enumerate(texts):
            one = await choices(worker, "completions", sampled | {"seed": 7 + number})
            assert one["choices"][0]["text"] == text
        pieces = ["", "", "", ""]
        ended = []
        for choice in await streamed(worker, "completions", sampled | {"n": 4, "best_of": 4}):
            pieces[choice["index"]] += choice["text"]
            ended += [choice["index"]] if choice["finish_reason"] else []
        assert pieces == texts
        assert sorted(ended) == [0, 1, 2, 3]

    with_worker(llama_dir, tmp_path, act)


def test_choices_of_many_prompts_come_prompt_by_prompt(llama_dir, tmp_path):
    async def act(worker):
        many = ASK | {"prompt": ["one", "three"], "n": 2, "temperature": 1.0, "seed": 3}
        answer = await choices(worker, "completions", many)
        assert answer["usage"]["prompt_tokens"] == 8
        for index, prompt in enumerate(["one", "three"]):
            two = await choices(worker, "completions", many | {"prompt": prompt})
            assert [c["text"] for c in two["choices"]] == [c["text"] for c in answer["choices"][2 * index :][:2]]

    with_worker(llama_dir, tmp_path, act)


def test_openais_client_reads_several_choices(llama_dir, tmp_path):
    async def act(worker):
        ask = {
            "model": "tiny",
            "messages": HELLO,
            "max_tokens": 6,
            "n": 3,
            "seed": 5,
            "extra_body": {"ignore_eos": True},
        }
        whole = await worker.client.chat.completions.create(**ask)
        texts = ["", "", ""]
        roles = []
        async for chunk in await worker.client.chat.completions.create(**ask, stream=True):
            delta = chunk.choices[0].delta
            texts[chunk.choices[0].index] += delta.content or ""
            roles += [chunk.choices[0].index] if delta.role else []
        assert texts == [choice.message.content for choice in whole.choices]
        assert len(set(texts)) == 3
        assert roles == [0, 1, 2]

    with_worker(llama_dir, tmp_path, act)


def plain_logprobs(loaded, prompt, count):
    """What plain transformers says of its own greedy tokens: a row of logarithms for each."""
    model = loading.load(loaded.files, WorkerSpec(source="x")).model
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=None,
        pad_token_id=0, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    tokens = out.sequences[0, len(prompt) :].tolist()
    return tokens, [row[0].float().log_softmax(-1) for row in out.logits]


@pytest.mark.parametrize("stream", [False, True])
def test_chat_tells_the_models_own_likelihoods(llama_dir, tmp_path, stream):
    async def act(worker):
        ask = {"model": "tiny", "messages": HELLO, "max_tokens": 20, "temperature": 0, "ignore_eos": True}
        ask |= {"logprobs": True, "top_logprobs": 3}
        if stream:
            chunks = await streamed(worker, "chat/completions", ask)
            told = [entry for chunk in chunks if chunk["logprobs"] for entry in chunk["logprobs"]["content"]]
            assert chunks[0]["logprobs"] is None
            for chunk in chunks[1:-1]:
                text, last = chunk["delta"]["content"], chunk["logprobs"]["content"][-1]["token"]
                assert text.endswith(last) or "\ufffd" in text
        else:
            answer = await choices(worker, "chat/completions", ask)
            told = answer["choices"][0]["logprobs"]["content"]
            assert answer["choices"][0]["logprobs"]["refusal"] is None
        tokens, rows = plain_logprobs(worker.loaded, worker.tokenizer("<user>hello\n<assistant>")["input_ids"], 20)
        assert len(told) == 20
        for entry, token, row in zip(told, tokens, rows, strict=True):
            assert set(entry) == {"token", "logprob", "bytes", "top_logprobs"}
            assert entry["logprob"] == pytest.approx(float(row[token]), abs=1e-4)
            best = row.topk(3).values.tolist()
            assert [other["logprob"] for other in entry["top_logprobs"]] == pytest.approx(best, abs=1e-4)
            assert entry["top_logprobs"][0]["bytes"] == entry["bytes"], "a greedy token is the likeliest"
        raw = b"".join(bytes(entry["bytes"]) for entry in told)
        assert raw.decode(errors="replace") == worker.tokenizer.decode(tokens)

    with_worker(llama_dir, tmp_path, act)


@pytest.mark.parametrize("stream", [False, True])
def test_completions_tell_them_in_their_own_form(llama_dir, tmp_path, stream):
    async def act(worker):
        ask = ASK | {"temperature": 0.8, "seed": 2, "logprobs": 2, "n": 2, "max_tokens": 16}
        whole = await choices(worker, "completions", ask)
        for choice in whole["choices"]:
            told = choice["logprobs"]
            if stream:
                chunks = [c for c in await streamed(worker, "completions", ask) if c["index"] == choice["index"]]
                parts = [c["logprobs"] for c in chunks if c["logprobs"]]
                assert {key: [x for part in parts for x in part[key]] for key in told} == told
            assert {key: len(value) for key, value in told.items()} == dict.fromkeys(told, 16)
            for word, logprob, top, start in zip(*(told[key] for key in (
                "tokens", "token_logprobs", "top_logprobs", "text_offset")), strict=True):  # fmt: skip
                assert top[word] == logprob <= max(top.values())
                assert 2 <= len(top) <= 3
                if not word.startswith("bytes:") and word != "<eos>":
                    assert choice["text"].find(word, start) <= start + 8, "behind the half characters before it"
        assert sorted(told) == ["text_offset", "token_logprobs", "tokens", "top_logprobs"]
        none = await choices(worker, "completions", ASK | {"logprobs": 0, "temperature": 0})
        told = none["choices"][0]["logprobs"]
        assert [list(top) for top in told["top_logprobs"]] == [[word] for word in told["tokens"]]

    with_worker(llama_dir, tmp_path, act)


def test_they_end_with_the_text(llama_dir, tmp_path):
    async def act(worker):
        ask = ASK | {"temperature": 0, "max_tokens": 40, "logprobs": 0}
        whole = (await choices(worker, "completions", ask))["choices"][0]
        text = whole["text"]
        stop = text[10:13]
        cut = (await choices(worker, "completions", ask | {"stop": stop}))["choices"][0]
        kept = cut["logprobs"]["text_offset"]
        assert cut["text"] == text[: text.index(stop)]
        assert kept == [start for start in whole["logprobs"]["text_offset"] if start < len(cut["text"])]
        parts = await streamed(worker, "completions", ask | {"stop": stop})
        assert [start for part in parts if part["logprobs"] for start in part["logprobs"]["text_offset"]] == kept
        # The token that ends an answer is no part of it.
        ended = ask | {"ignore_eos": False, "logit_bias": {"0": 100}}
        for bias, tokens in ((100, 0), (None, 40)):
            one = (await choices(worker, "completions", ended | {"logit_bias": bias and {"0": bias}}))["choices"][0]
            assert len(one["logprobs"]["tokens"]) == tokens or one["finish_reason"] == "stop"
            assert "<eos>" not in one["logprobs"]["tokens"]

    with_worker(llama_dir, tmp_path, act)


def test_they_survive_a_shortage_that_preempts(llama_dir, tmp_path):
    async def act(worker):
        ask = ASK | {"temperature": 0.7, "seed": 9, "logprobs": 1, "n": 4, "max_tokens": 60}
        calm = await choices(worker, "completions", ask)
        refusals = worker.memory.space.refusals
        worker.memory.blocks_max = 11
        short = await choices(worker, "completions", ask)
        assert worker.memory.space.refusals > refusals
        for one, other in zip(calm["choices"], short["choices"], strict=True):
            assert one["text"] == other["text"]
            told, again = one["logprobs"], other["logprobs"]
            assert told["tokens"] == again["tokens"]
            assert told["token_logprobs"] == pytest.approx(again["token_logprobs"], abs=1e-4)

    with_worker(llama_dir, tmp_path, act)


def test_a_name_reaches_the_prompt_where_the_template_has_a_place_for_it(llama_dir, tmp_path):
    async def act(worker):
        ask = {"max_tokens": 1, "messages": [HELLO[0] | {"name": "Ann", "refusal": None, "annotations": []}]}
        status, answer = await worker.post("chat/completions", ask)
        assert status == 200, answer
        named = worker.tokenizer("<user Ann>hello\n<assistant>")["input_ids"]
        assert answer["usage"]["prompt_tokens"] == len(named)

    with_worker(llama_dir, tmp_path, act)


def test_bytes_of_half_characters_and_of_spaces_that_are_marks():
    words = Words(byte_tokenizer())
    first, second = byte_tokenizer()("\u00e9")["input_ids"]
    assert (words.text(first), words.bytes(first), words.bytes(second)) == ("\ufffd", [0xC3], [0xA9])
    assert words.name(first) == "bytes:\\xc3"
    raw = Tokenizer(models.BPE(vocab={"\u2581sea": 0, "sea": 1, "<0xC3>": 2}, merges=[], byte_fallback=True))
    raw.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    marked = Words(PreTrainedTokenizerFast(tokenizer_object=raw))
    assert [marked.text(token) for token in (0, 1)] == [" sea", "sea"]
    assert marked.bytes(2) == [0xC3]
