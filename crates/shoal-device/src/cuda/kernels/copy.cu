// Many small copies in one launch: gather reads host memory that is mapped for the device and writes device memory,
// scatter the other way. The same code under two names, so that a profile tells the directions apart.
//
// A warp takes a piece at a time, eight loads of 16 bytes a thread in flight: what hides the latency of the link is
// bytes under way, and few blocks of threads are enough for that. The description of a warp's next piece is read before
// the bytes of this one, since it lies in host memory too.
//
// Loads and stores are marked as used once, so that what the device's caches hold of others' work stays there.
//
// Regenerate the PTX after any change: see regenerate.py.

typedef unsigned long long u64;
typedef unsigned int u32;

constexpr u32 WARP = 32;
constexpr u32 IN_FLIGHT = 8;
constexpr u32 WIDE = 16;

// One copy; as src/cuda/copies/pieces.rs lays it out.
struct Piece {
    u64 source, target, bytes;
};

// A few bytes, one a thread.
__device__ __forceinline__ void copy_bytes(u64 source, u64 target, u64 bytes, u32 lane) {
#pragma unroll 1
    for (u64 i = lane; i < bytes; i += WARP) {
        reinterpret_cast<unsigned char *>(target)[i] = reinterpret_cast<const unsigned char *>(source)[i];
    }
}

__device__ __forceinline__ void copy_piece(u64 source, u64 target, u64 bytes, u32 lane) {
    if (((source ^ target) & (WIDE - 1)) != 0) {
        // Never wide at both ends. Right, and slow: the planner does not send such pieces here.
        copy_bytes(source, target, bytes, lane);
        return;
    }
    const u64 gap = (WIDE - (source & (WIDE - 1))) & (WIDE - 1);
    const u64 head = gap < bytes ? gap : bytes;
    copy_bytes(source, target, head, lane);
    source += head;
    target += head;
    bytes -= head;
    const uint4 *from = reinterpret_cast<const uint4 *>(source);
    uint4 *to = reinterpret_cast<uint4 *>(target);
    const u64 count = bytes / WIDE;
    u64 i = lane;
    for (; i + (IN_FLIGHT - 1) * WARP < count; i += IN_FLIGHT * WARP) {
        uint4 data[IN_FLIGHT];
#pragma unroll
        for (u32 k = 0; k < IN_FLIGHT; k++) {
            data[k] = __ldcs(from + i + k * WARP);
        }
#pragma unroll
        for (u32 k = 0; k < IN_FLIGHT; k++) {
            __stcs(to + i + k * WARP, data[k]);
        }
    }
#pragma unroll 1
    for (; i < count; i += WARP) {
        __stcs(to + i, __ldcs(from + i));
    }
    copy_bytes(source + count * WIDE, target + count * WIDE, bytes % WIDE, lane);
}

__device__ __forceinline__ void copy_pieces(const Piece *pieces, u64 count) {
    const u32 lane = threadIdx.x % WARP;
    const u64 warps = static_cast<u64>(gridDim.x) * (blockDim.x / WARP);
    // Neighbouring pieces go to different multiprocessors.
    u64 index = static_cast<u64>(threadIdx.x / WARP) * gridDim.x + blockIdx.x;
    if (index >= count) {
        return;
    }
    Piece next = pieces[index];
    while (true) {
        const Piece piece = next;
        index += warps;
        const bool is_last = index >= count;
        if (!is_last) {
            next = pieces[index];
        }
        copy_piece(piece.source, piece.target, piece.bytes, lane);
        if (is_last) {
            return;
        }
    }
}

extern "C" __global__ void __launch_bounds__(1024) shoal_gather(const Piece *pieces, u64 count) {
    copy_pieces(pieces, count);
}

extern "C" __global__ void __launch_bounds__(1024) shoal_scatter(const Piece *pieces, u64 count) {
    copy_pieces(pieces, count);
}
