"""vLLM's API server as far as tests ask for it: completions, and one engine in a process of its own.

As a program (``python -m vllm.entrypoints.openai.api_server``) it is vLLM by itself, with memory of the process's own.
"""

import asyncio
import contextlib
import importlib
import json
import multiprocessing
import os
import signal
import socket
import uuid
from types import SimpleNamespace

from aiohttp import web

from vllm import SamplingParams
from vllm.v1.engine import EngineCoreRequestType


class InputProcessor:
    def process_inputs(self, request_id, prompt, params):
        return SimpleNamespace(
            request_id=request_id, prompt=prompt, most=params.max_tokens, cache_salt=prompt.get("cache_salt")
        )


class Engine:
    def __init__(self, config):
        self.model_config = config.model_config
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        from vllm.v1.engine.core import run_engine_core

        self.process = context.Process(target=run_engine_core, args=(config, theirs), name="EngineCore")
        self.process.start()
        theirs.close()
        self.number = 0
        self.most_logprobs = config.max_logprobs
        self.input_processor = InputProcessor()
        self.streams, self.calls = {}, {}

    async def begin(self):
        loop = asyncio.get_running_loop()
        try:
            assert (await loop.run_in_executor(None, self.pipe.recv))[0] == "ready"
        except EOFError as error:
            raise RuntimeError("Engine core initialization failed. See root cause above.") from error
        self.reading = loop.run_in_executor(None, self._read, loop)

    def _read(self, loop):
        while True:
            try:
                said = self.pipe.recv()
            except (EOFError, OSError):
                # As vLLM ends when its engine is dead.
                loop.call_soon_threadsafe(os.kill, os.getpid(), signal.SIGTERM)
                return
            loop.call_soon_threadsafe(self._hear, said)

    def _hear(self, said):
        if said[0] == "outputs":
            for request_id, tokens, is_done, cached in said[1]:
                self.streams[request_id].put_nowait((tokens, is_done, cached))
        else:
            future = self.calls.pop(said[1])
            future.set_result(said[2]) if said[0] == "result" else future.set_exception(RuntimeError(said[2]))

    async def collective_rpc(self, method, args=()):
        self.number = number = self.number + 1
        self.calls[number] = future = asyncio.get_running_loop().create_future()
        self.pipe.send((EngineCoreRequestType.UTILITY, (number, method, args)))
        return await future

    async def generate(self, prompt, sampling_params, request_id):
        wanted = getattr(sampling_params, "logprobs", None) or 0
        if wanted > self.most_logprobs:
            raise ValueError(f"Requested sample logprobs of {wanted}, which is greater than max allowed")
        self.streams[request_id] = stream = asyncio.Queue()
        request = self.input_processor.process_inputs(request_id, prompt, sampling_params)
        tokens = request.prompt["prompt_token_ids"]
        self.pipe.send((EngineCoreRequestType.ADD, (request_id, tokens, request.most, request.cache_salt)))
        said, is_done = [], False
        while not is_done:
            tokens, is_done, cached = await stream.get()
            said += tokens
            chances = [{token: SimpleNamespace(logprob=0.0)} for token in said]
            one = SimpleNamespace(token_ids=list(said), logprobs=chances)
            yield SimpleNamespace(outputs=[one], num_cached_tokens=cached, new=tokens)
        del self.streams[request_id]


def setup_server(args, *, reuse_port):
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(args.uds)
    return f"unix:{args.uds}", sock


@contextlib.asynccontextmanager
async def build_async_engine_client(args):
    text = SimpleNamespace(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, vocab_size=128, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            model=args.model,
            max_model_len=args.max_model_len,
            dtype="float32",
            enforce_eager=True,
            hf_text_config=text,
            enable_sleep_mode=False,
            enable_cumem_allocator=False,
        ),
        cache_config=SimpleNamespace(
            block_size=16,
            kv_cache_memory_bytes=args.kv_cache_memory_bytes,
            gpu_memory_utilization=args.gpu_memory_utilization,
        ),
        scheduler_config=SimpleNamespace(max_num_seqs=args.max_num_seqs, max_num_batched_tokens=512),
        parallel_config=SimpleNamespace(world_size=args.tensor_parallel_size, data_parallel_size=1),
        compilation_config=SimpleNamespace(static_forward_context={}),
        kv_transfer_config=None,
        speculative_config=None,
        num_speculative_tokens=0,
        worker_cls=args.worker_cls or "vllm.v1.worker.gpu_worker.Worker",
        caches=not args.no_enable_prefix_caching,
        step_seconds=args.step_seconds,
        token_seconds=args.token_seconds,
        profile_seconds=args.profile_seconds,
        fail_at=args.fail_at,
        rots_with=args.rots_with,
        max_logprobs=args.max_logprobs,
    )
    engine = Engine(config)
    try:
        await engine.begin()
        yield engine
    finally:
        engine.pipe.close()
        engine.process.join(10)


async def build_and_serve(engine, listen_address, sock, args):
    async def health(request):
        return web.Response()

    async def described(request):
        return web.json_response({"paths": {"/v1/completions": {"post": {}}, "/v1/models": {"get": {}}}})

    async def completions(request):
        async def app(scope, receive, send):
            scope["answer"] = await answer(request)

        for path in args.middleware:
            module, _, name = path.rpartition(".")
            app = getattr(importlib.import_module(module), name)(app)
        headers = [(name.lower().encode(), value.encode()) for name, value in request.headers.items()]
        scope = {"type": "http", "headers": headers}
        await app(scope, None, None)
        return scope["answer"]

    async def answer(request):
        body = await request.json()
        prompt = list(body["prompt"].encode())
        inputs = {"prompt_token_ids": prompt}
        if "cache_salt" in body:
            inputs["cache_salt"] = body["cache_salt"]
        text, cached = [], 0
        stream = None
        sampling = SamplingParams(max_tokens=body["max_tokens"])
        async for made in engine.generate(inputs, sampling, f"cmpl-{uuid.uuid4().hex}"):
            cached, tokens = made.num_cached_tokens, made.new
            text += tokens
            if body.get("stream"):
                if stream is None:
                    stream = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
                    await stream.prepare(request)
                piece = {"choices": [{"index": 0, "text": bytes(tokens).decode()}]}
                await stream.write(f"data: {json.dumps(piece)}\n\n".encode())
        usage = {
            "prompt_tokens": len(prompt), "completion_tokens": len(text),
            "prompt_tokens_details": {"cached_tokens": cached},
        }  # fmt: skip
        if stream is not None:
            if body.get("stream_options", {}).get("include_usage"):
                await stream.write(f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n".encode())
            await stream.write(b"data: [DONE]\n\n")
            return stream
        choices = [{"index": 0, "text": bytes(text).decode()}]
        # What nobody else would pass on shows that bodies are not touched on their way.
        return web.json_response({"choices": choices, "usage": usage, "echo": body.get("vllm_xargs")})

    app = web.Application()
    app.add_routes([web.get("/health", health), web.get("/openapi.json", described)])
    app.add_routes([web.post("/v1/completions", completions)])
    if args.enable_sleep_mode:
        # Nobody else wants its memory, so that nothing has to go.
        app.add_routes([web.post("/sleep", health), web.post("/wake_up", health)])
    runner = web.AppRunner(app)
    await runner.setup()
    await web.SockSite(runner, sock).start()
    ending = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ending.set)
    await ending.wait()

    async def shut_down():
        await runner.cleanup()

    return shut_down()


async def run_server(args):
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((args.host, args.port))
    async with build_async_engine_client(args) as engine:
        shutdown = await build_and_serve(engine, f"{args.host}:{args.port}", sock, args)
    await shutdown


if __name__ == "__main__":
    from vllm.entrypoints.openai.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    asyncio.run(run_server(make_arg_parser(FlexibleArgumentParser()).parse_args()))
