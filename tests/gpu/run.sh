#!/bin/sh
# Runs one part of the GPU tests and writes $OUT/PART.json (default: the folder gpu-results); a part takes minutes.
#   tests/gpu/run.sh conformance    every promise of a device, on the GPU
#   tests/gpu/run.sh vmm            what virtual memory, hashing and page-locked memory cost
#   tests/gpu/run.sh copies         blocks from 4 KiB to 64 MiB up, down and both ways at once, against the link
#   tests/gpu/run.sh arena          how fast memory for host copies is made and locked, by kind, against cuMemHostAlloc
#   tests/gpu/run.sh sanitizer      kernels, and regions that sleep and wake, under compute-sanitizer: memory, races, barriers
#   tests/gpu/run.sh sleep_wake     how fast 13 GiB sleep and wake, against the link
#   tests/gpu/run.sh swap           how fast one region of 13 GiB takes another's place, against both directions at once
#   tests/gpu/run.sh churn          growing and shrinking regions with the frame pool and without
#   tests/gpu/run.sh faults         every device call failing in turn: wakes, growths, swaps, the pool
#   tests/gpu/run.sh kv_grow        how fast a KV cache grows by 16 GiB, in both layouts; what memory stays after bursts
#   tests/gpu/run.sh kv_peer        kvcached ($SHOAL_KVCACHED, a checkout of it) beside ours, and its own tests on our face of it
#   tests/gpu/run.sh kv_peer_blocks  what blocks cost in kvcached and ours: 1 to 4096 at once, fresh, part-filled, scattered
#   tests/gpu/run.sh python         the Python package: regions, tensors, KV blocks, kills; needs pytest and torch
#   tests/gpu/run.sh torch          torch's allocations in regions: pools, graphs, out of memory, neighbours
#   tests/gpu/run.sh first_token    first token of a sleeping 8B, woken in order of use; needs transformers
#   tests/gpu/run.sh tms            the face of torch_memory_saver, and that library's examples ($SHOAL_TMS_EXAMPLES) on it
#   tests/gpu/run.sh sleep_wake_torch  13 GiB in torch against torch_memory_saver (importable) and the link
#   tests/gpu/run.sh soak           1,000 sleeps and wakes of 2 GiB and of a model with CUDA graphs: nothing lost
#   tests/gpu/run.sh trade          two processes trade memory for four minutes, one of them killed in its restores
#   tests/gpu/run.sh tiers_blocks   host memory up and down by length and layout of blocks, against the link
#   tests/gpu/run.sh tiers_restore  prefixes of an 8B from host memory and from disk against computing them; needs transformers
#   tests/gpu/run.sh tiers_concurrency  conversations of an 8B held with a first token within a second: no tier, host, disk
#   tests/gpu/run.sh tiers_weights  13 GiB of weights at rest on the disk of $SHOAL_DISK: starts and wakes from there and from files
#   tests/gpu/run.sh vllm           vLLM 0.26 (importable) on Shoal and alone: tokens, sleep, wake, memory while asleep
#   tests/gpu/run.sh vllm_graphs, vllm_eager  of these the cases that compare tokens, by themselves; vllm_large: sleep, wake, throughput
#   tests/gpu/run.sh vllm_offload   vLLM's own KV offloading on Shoal's host tier and disks: tokens, first tokens of restored prompts
#   tests/gpu/run.sh vllm_offload_times  of these the first tokens by themselves, with vLLM's CPU offload and fs tier beside
#   tests/gpu/run.sh vllm_serve     `SHOAL=1 vllm serve` as it is typed, against `vllm serve`: texts, /sleep, /wake_up
#   tests/gpu/run.sh shelf          the server with three models that share the GPU; needs transformers and aiohttp
#   tests/gpu/run.sh shelf_life     workers under the next server, a reload, programs of others, what prefixes cost: on the GPU
#   tests/gpu/run.sh forked         workers forked and started by themselves: what a start takes, the same answers
#   tests/gpu/run.sh shelf_8b       the server with three models of 8B's layers: first tokens by residency, all busy
#   tests/gpu/run.sh vllm_shelf     the server with four vLLM engines (importable) that share the GPU, and OpenAI's client
#   tests/gpu/run.sh vllm_burst     three vLLM engines of $SHOAL_LAYERS (8) of 8B's layers in overlapping bursts, by $SHOAL_ARMS: shoal,
#                                   lru, static (these three by default), kvcached ($SHOAL_KVCACHED_SITE), llama-swap ($SHOAL_LLAMA_SWAP)
#   tests/gpu/run.sh vllm_all_active  the three busy at once with 100, 75 and 50 % of the memory ($SHOAL_SHELF_SHARES); SHOAL_MPS=1 with MPS
# tests/gpu/pack_vllm.sh packs vLLM for a machine without network.
# From python on they use the shoal that `python3` imports. A machine without cargo takes built programs from $SHOAL_GPU_PROGRAMS (cuda, cuda_vmm, cuda_copies, cuda_arena, cuda_sleep_wake, cuda_swap,
# cuda_churn, cuda_kv_grow, faults, pool, swap), which
# this makes on another one:  tests/gpu/run.sh build FOLDER
set -eu
cd "$(dirname "$0")/../.."
part=${1:-conformance}

build() { # build PACKAGE PROFILE-FLAGS TARGET-KIND NAME: prints the program's path
    # shellcheck disable=SC2086
    cargo build -q -p "$1" --features cuda $2 --$3 "$4" --message-format json |
        python3 -c '
import json, sys
for line in sys.stdin:
    event = json.loads(line)
    if event.get("executable") and event["target"]["name"] == sys.argv[1]:
        print(event["executable"])' "$4"
}

program() {
    if [ -n "${SHOAL_GPU_PROGRAMS:-}" ]; then
        echo "$SHOAL_GPU_PROGRAMS/$1"
    elif [ "$1" = cuda ]; then
        build shoal-device "" test cuda
    elif [ "$1" = faults ] || [ "$1" = pool ] || [ "$1" = swap ]; then
        build shoal-memory "" test "$1"
    elif [ "$1" = cuda_arena ] || [ "$1" = cuda_sleep_wake ] || [ "$1" = cuda_swap ] || [ "$1" = cuda_churn ] ||
        [ "$1" = cuda_kv_grow ]; then
        build shoal-memory --release bench "$1"
    else
        build shoal-device --release bench "$1"
    fi
}

if [ "$part" = build ]; then
    mkdir -p "$2"
    for name in cuda cuda_vmm cuda_copies cuda_arena cuda_sleep_wake cuda_swap cuda_churn cuda_kv_grow faults pool swap; do
        built=$(program $name)
        strip -o "$2/$name" "$built"
    done
    exit
fi

if ! command -v nvidia-smi >/dev/null; then
    echo "These tests need an NVIDIA GPU with its driver, and there is no nvidia-smi here; 'make test' runs all that need none." >&2
    exit 1
fi
OUT=${OUT:-gpu-results}
mkdir -p "$OUT"
export SHOAL_REQUIRE_GPU=1
SHOAL_DRIVER=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n 1)
SHOAL_COMMIT=${SHOAL_COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || true)}
export SHOAL_DRIVER SHOAL_COMMIT SHOAL_RESULT="$OUT/$part.json"

case $part in
conformance)
    status=0
    "$(program cuda)" --test-threads 1 --nocapture >"$OUT/conformance.log" 2>&1 || status=$?
    # The kernels are committed as compiled: where the compiler is, it has to make the same of their source.
    if python3 crates/shoal-device/src/cuda/kernels/regenerate.py --check >>"$OUT/conformance.log" 2>&1; then
        echo "test the_compiler_makes_the_committed_kernels ... ok" >>"$OUT/conformance.log"
    else
        echo "test the_compiler_makes_the_committed_kernels ... FAILED" >>"$OUT/conformance.log"
        status=1
    fi
    python3 tests/gpu/report.py "$OUT/conformance.log" "$SHOAL_RESULT" || status=$?
    exit $status
    ;;
python | torch)
    status=0
    files="tests/gpu/test_attention.py tests/gpu/test_python.py tests/gpu/test_kv_blocks.py tests/gpu/test_shared_prefixes.py"
    [ "$part" = python ] || files="tests/gpu/test_pools.py tests/gpu/test_attached.py"
    # shellcheck disable=SC2086
    python3 -X faulthandler -m pytest -v --capture=sys -W default -p no:cacheprovider $files >"$OUT/$part.log" 2>&1 || status=$?
    python3 tests/gpu/report.py "$OUT/$part.log" "$SHOAL_RESULT" || status=$?
    exit $status
    ;;
tms)
    status=0
    python3 -X faulthandler -m pytest -v -W default -p no:cacheprovider tests/gpu/test_tms.py \
        >"$OUT/tms.log" 2>&1 || status=$?
    python3 tests/gpu/report.py "$OUT/tms.log" "$SHOAL_RESULT" || status=$?
    python3 -m tests.gpu.tms || status=$?
    exit $status
    ;;
sleep_wake_torch | soak | trade) python3 -X faulthandler -m "tests.gpu.$part" ;;
first_token) python3 -X faulthandler -m tests.gpu.first_token ;;
shelf | shelf_life | forked) python3 -X faulthandler -m "tests.gpu.$part" ;;
tiers_blocks | tiers_restore | tiers_concurrency | tiers_weights) python3 -X faulthandler -m "tests.gpu.$part" ;;
shelf_8b) python3 -X faulthandler -m tests.gpu.shelf_8b ;;
vllm_shelf) python3 -X faulthandler -m tests.gpu.vllm_shelf ;;
vllm_burst | vllm_all_active) python3 -X faulthandler -m tests.gpu.vllm_load "${part#vllm_}" ;;
vllm) python3 -X faulthandler -m tests.gpu.vllm_part ;;
vllm_graphs | vllm_eager | vllm_large)
    SHOAL_VLLM_CASES="stock ${part#vllm_},shoal ${part#vllm_}" python3 -X faulthandler -m tests.gpu.vllm_part
    ;;
vllm_offload_times)
    SHOAL_VLLM_CASES="large none,large cpu,large shoal,large shoal again,large fs,large fs again" SHOAL_VLLM_TIME=330 \
        python3 -X faulthandler -m tests.gpu.vllm_offload
    ;;
vllm_offload | vllm_serve) python3 -X faulthandler -m "tests.gpu.$part" ;;
vmm) "$(program cuda_vmm)" ;;
copies) "$(program cuda_copies)" ;;
arena) "$(program cuda_arena)" ;;
sanitizer) python3 -m tests.gpu.sanitizer "$(program cuda)" "$(program swap)" "$SHOAL_RESULT" "$OUT" ;;
sleep_wake) "$(program cuda_sleep_wake)" ;;
swap) "$(program cuda_swap)" ;;
kv_grow)
    # Beside kvcached as kv_peer measured it in the same folder, if it did.
    [ ! -f "$OUT/kv_peer.json" ] || eval "$(python3 -m tests.gpu.kvcached_peer --grown "$OUT/kv_peer.json")"
    "$(program cuda_kv_grow)"
    ;;
kv_peer) python3 -X faulthandler -m tests.gpu.kvcached_peer ;;
kv_peer_blocks) python3 -X faulthandler -m tests.gpu.kvcached_blocks ;;
churn) "$(program cuda_churn)" ;;
faults)
    status=0
    export SHOAL_TEST_GPU=1
    : >"$OUT/faults.log"
    for name in faults swap pool; do
        "$(program $name)" --test-threads 1 --nocapture >>"$OUT/faults.log" 2>&1 || status=$?
    done
    python3 tests/gpu/report.py "$OUT/faults.log" "$SHOAL_RESULT" || status=$?
    exit $status
    ;;
*)
    echo "no part named $part; there are conformance, vmm, copies, arena, sanitizer, sleep_wake, swap, churn, faults, kv_grow, kv_peer, kv_peer_blocks, python, torch, first_token, tms, sleep_wake_torch, soak, trade, shelf, shelf_life, forked, shelf_8b, tiers_blocks, tiers_restore, tiers_concurrency, tiers_weights, vllm, vllm_graphs, vllm_eager, vllm_large, vllm_offload, vllm_offload_times, vllm_serve, vllm_shelf, vllm_burst and vllm_all_active" >&2
    exit 2
    ;;
esac
