#!/bin/bash
# Packs vLLM 0.26 for a GPU machine without network that has torch 2.11, transformers and Python 3.12:
#   tests/gpu/pack_vllm.sh FOLDER        writes vllm_a.tar.xz, vllm_b.tar.xz and vllm_more.tar.xz, each below 64 MiB
# There, in any order and in as many calls as it takes to carry them:
#   python3 -m tests.gpu.vllm_site SITE vllm_b.tar.xz vllm_a.tar.xz vllm_more.tar.xz
#   PYTHONPATH=SITE VLLM_USE_FLASHINFER_SAMPLER=0 tests/gpu/run.sh vllm
# Left out is what other GPUs than Hopper's need, and kernels of models that the parts do not use.
set -euo pipefail
out=$(realpath -m "${1:?the folder to write to}")
mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

fetch() { # fetch FOLDER REQUIREMENT..: wheels for that machine, without what they need themselves
    local folder=$1 flags=(--no-deps --only-binary=:all: --python-version 3.12 --implementation cp)
    shift
    for tag in 2_31 2_28 2_27 2_26 2_24 2_17 2_5; do
        flags+=(--platform "manylinux_${tag}_x86_64")
    done
    flags+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
    python3 -m pip download -q "${flags[@]}" -d "$folder" "$@"
}

# What vLLM needs at these versions, whatever else is there.
fetch "$work/wheels" vllm==0.26.0 'fastapi<0.137' starlette uvicorn pydantic==2.14.3 pydantic-core==2.50.4 annotated-types \
    typing-inspection openai openai-harmony jiter distro sniffio httpx2 httpcore2 truststore cbor2 pyzmq msgspec pybase64 blake3 \
    cachetools watchfiles 'llguidance<1.8' xgrammar 'apache-tvm-ffi>=0.1.15' partial-json-parser \
    model-hosting-container-standards jmespath
# What it needs as well, and a machine with transformers may have.
fetch "$work/more" prometheus-fastapi-instrumentator prometheus-client python-multipart ijson setproctitle einops cloudpickle \
    py-cpuinfo lark==1.2.2 tiktoken mistral_common python-json-logger mcp sse-starlette httpx-sse pydantic-settings python-dotenv \
    email-validator dnspython pydantic-extra-types pycountry anthropic docstring-parser depyf astor compressed-tensors==0.17.0 \
    gguf jsonschema jsonschema-specifications referencing rpds-py attrs httptools uvloop websockets pyjwt

mkdir "$work/site" "$work/apart"
for wheel in "$work"/wheels/*.whl; do
    case $wheel in
    */vllm-0*)
        unzip -qo "$wheel" -d "$work/site" -x 'vllm/vllm_flash_attn/_vllm_fa2_C*' vllm/vllm-rs 'vllm/_moe_C*' \
            'vllm/_flashmla*' 'vllm/_qutlass*' 'vllm/third_party/*/include/*'
        ;;
    *) unzip -qo "$wheel" -d "$work/site" ;;
    esac
done
rm -f "$work"/site/vllm/third_party/deep_gemm/_C.cpython-31[0134]*
for wheel in "$work"/more/*.whl; do # each apart, so that what is there already can be left out
    name=$(basename "$wheel")
    mkdir -p "$work/apart/${name%%-*}"
    unzip -qo "$wheel" -d "$work/apart/${name%%-*}"
done
tar -C "$work/site" -cf - vllm/_C_stable_libtorch.abi3.so | xz -T0 -6 >"$out/vllm_b.tar.xz"
tar -C "$work/site" --exclude='_C_stable*' -cf - . | xz -T0 -6 >"$out/vllm_a.tar.xz"
tar -C "$work/apart" -cf - . | xz -T0 -6 >"$out/vllm_more.tar.xz"
ls -l "$out"
