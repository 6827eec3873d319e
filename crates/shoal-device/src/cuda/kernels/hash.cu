// One level of the tree hash that src/hash.rs defines: the xxh3-64 (seed 0) of every tile of 4 KiB, the last tile
// padded with zeroes. Called again on its own output until one digest is left.
//
// Why a tree: xxh3's sum over the 16 stripes of a 1 KiB block has no order, but its blocks do (a multiplication
// between them), so one long input is one long chain; tiles of 4 blocks are short chains, one warp each.
//
// A warp reads a tile as 8 loads of 16 bytes a thread, all at once: thread t has accumulators 2*(t%4) and
// 2*(t%4)+1 of stripe t/4. Accumulator i adds the data of lane i^1, so both stay in one thread. The stripes of a
// block are summed by shuffles; the chain over blocks, four steps, is done by all threads alike.
//
// Regenerate the PTX after any change: see regenerate.py.

typedef unsigned long long u64;
typedef unsigned int u32;

constexpr int TILE = 4096;
constexpr int WARP = 32;

// The first 192 bytes of xxh3's default secret, as little-endian words at offsets 0, 8, 16 ..
__constant__ u64 SECRET[24] = {
    0xbe4ba423396cfeb8ULL, 0x1cad21f72c81017cULL, 0xdb979083e96dd4deULL, 0x1f67b3b7a4a44072ULL,
    0x78e5c0cc4ee679cbULL, 0x2172ffcc7dd05a82ULL, 0x8e2443f7744608b8ULL, 0x4c263a81e69035e0ULL,
    0xcb00c391bb52283cULL, 0xa32e531b8b65d088ULL, 0x4ef90da297486471ULL, 0xd8acdea946ef1938ULL,
    0x3f349ce33f76faa8ULL, 0x1d4f0bc7c7bbdcf9ULL, 0x3159b4cd4be0518aULL, 0x647378d9c97e9fc8ULL,
    0xc3ebd33483acc5eaULL, 0xeb6313faffa081c5ULL, 0x49daf0b751dd0d17ULL, 0x9e68d429265516d3ULL,
    0xfca1477d58be162bULL, 0xce31d07ad1b8f88fULL, 0x280416958f3acb45ULL, 0x7e404bbbcafbd7afULL,
};

// A word of the secret at any byte offset.
__device__ __forceinline__ u64 secret(int offset) {
    int word = offset >> 3, shift = (offset & 7) * 8;
    u64 low = SECRET[word];
    return shift == 0 ? low : (low >> shift) | (SECRET[word + 1] << (64 - shift));
}

// 16 bytes at `at`, zeroes from `end` on.
__device__ __forceinline__ ulonglong2 load16(const unsigned char *at, const unsigned char *end, bool is_aligned) {
    if (at + 16 <= end && is_aligned) {
        return *reinterpret_cast<const ulonglong2 *>(at);
    }
    u64 word[2] = {0, 0};
#pragma unroll 1
    for (int i = 0; i < 16; i++) {
        if (at + i < end) {
            word[i >> 3] |= static_cast<u64>(at[i]) << ((i & 7) * 8);
        }
    }
    return make_ulonglong2(word[0], word[1]);
}

__device__ __forceinline__ u64 halves(u64 key) { return (key & 0xffffffffULL) * (key >> 32); }

__device__ __forceinline__ void accumulate(u64 &even, u64 &odd, ulonglong2 data, u64 key_even, u64 key_odd) {
    even += data.y + halves(data.x ^ key_even);
    odd += data.x + halves(data.y ^ key_odd);
}

__device__ __forceinline__ u64 scramble(u64 sum, u64 key) { return ((sum ^ (sum >> 47)) ^ key) * 0x9e3779b1ULL; }

// Sums over the 8 threads that hold the same accumulators.
__device__ __forceinline__ u64 over_stripes(u64 value) {
    for (int step = 4; step < WARP; step *= 2) {
        value += __shfl_xor_sync(0xffffffffu, value, step);
    }
    return value;
}

extern "C" __global__ void __launch_bounds__(256)
    shoal_hash_tiles(const unsigned char *bytes, u64 length, u64 tiles, u64 *digests) {
    const int thread = threadIdx.x % WARP;
    const int pair = thread % 4, stripe = thread / 4;
    const u64 warps = static_cast<u64>(gridDim.x) * (blockDim.x / WARP);
    const unsigned char *end = bytes + length;
    const bool is_aligned = (reinterpret_cast<u64>(bytes) & 15) == 0;

    // Keys of this thread's two stripes of a block, of the scrambling, of the last stripe and of the merging.
    const int lane = 16 * pair;
    const u64 first_even = secret(8 * stripe + lane), first_odd = secret(8 * stripe + lane + 8);
    const u64 second_even = secret(8 * (stripe + 8) + lane), second_odd = secret(8 * (stripe + 8) + lane + 8);
    const u64 scramble_even = secret(128 + lane), scramble_odd = secret(136 + lane);
    const bool is_last = stripe == 7;
    const u64 last_even = is_last ? secret(121 + lane) : second_even;
    const u64 last_odd = is_last ? secret(129 + lane) : second_odd;
    const u64 merge_even = secret(11 + lane), merge_odd = secret(19 + lane);
    // The accumulators' first values, by pair.
    const u64 start_even = pair == 0 ? 0xc2b2ae3dULL
                           : pair == 1 ? 0xc2b2ae3d27d4eb4fULL
                           : pair == 2 ? 0x85ebca77c2b2ae63ULL
                                       : 0x27d4eb2f165667c5ULL;
    const u64 start_odd = pair == 0 ? 0x9e3779b185ebca87ULL
                          : pair == 1 ? 0x165667b19e3779f9ULL
                          : pair == 2 ? 0x85ebca77ULL
                                      : 0x9e3779b1ULL;

    for (u64 tile = (static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x) / WARP; tile < tiles; tile += warps) {
        const unsigned char *at = bytes + tile * TILE + 16 * thread;
        ulonglong2 data[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            data[i] = load16(at + i * 16 * WARP, end, is_aligned);
        }
        u64 even = start_even, odd = start_odd;
#pragma unroll
        for (int block = 0; block < 4; block++) {
            u64 sum_even = 0, sum_odd = 0;
            const bool has_last = block == 3;
            accumulate(sum_even, sum_odd, data[2 * block], first_even, first_odd);
            accumulate(sum_even, sum_odd, data[2 * block + 1], has_last ? last_even : second_even,
                       has_last ? last_odd : second_odd);
            even += over_stripes(sum_even);
            odd += over_stripes(sum_odd);
            if (!has_last) {
                even = scramble(even, scramble_even);
                odd = scramble(odd, scramble_odd);
            }
        }
        const u64 left = even ^ merge_even, right = odd ^ merge_odd;
        u64 merged = (left * right) ^ __umul64hi(left, right);
        merged += __shfl_xor_sync(0xffffffffu, merged, 1);
        merged += __shfl_xor_sync(0xffffffffu, merged, 2);
        merged += static_cast<u64>(TILE) * 0x9e3779b185ebca87ULL;
        merged ^= merged >> 37;
        merged *= 0x165667919e3779f9ULL;
        merged ^= merged >> 32;
        if (thread == 0) {
            digests[tile] = merged;
        }
    }
}
