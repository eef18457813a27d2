// Hopper's set: barriers in shared memory (mbarrier), tiles that the copy engine moves (TMA), and products that a warpgroup
// starts and waits for (wgmma). Each wrapper is one PTX instruction, or the emulator's idea of it. For sm_90a only.
#pragma once
#include "tensor_core.h"

constexpr int WARPGROUP = 128;      // threads
constexpr int SWIZZLED_ROW = 128;   // bytes: a tile in shared memory has rows of 64 elements of 16 bits
constexpr int SWIZZLED_ROWS = 1024;  // bytes of the 8 rows after which the swizzle repeats: every tile begins at a multiple

#if defined(__CUDACC_RTC__)

// A matrix in global memory and the box that is cut of it: CUtensorMap's bytes, encoded on the host.
struct alignas(64) TileMap {
    unsigned char opaque[128];
};

// ---- barriers: a phase ends when all arrivals and all expected bytes have come, and the next begins

__device__ __forceinline__ void mbarrier_init(uint64_t *barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Show the barriers that this thread has set up to the copy engine.
__device__ __forceinline__ void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void mbarrier_arrive(uint64_t *barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrive, and let the phase wait for so many bytes of tiles as well.
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t *barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
// Arrive when the copies that this thread has begun (copy_16_bytes) are done, as one of the arrivals that the phase has.
__device__ __forceinline__ void mbarrier_arrive_when_copied(uint64_t *barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Wait for the end of the phase with that parity: of phases 0, 1, 2, … the parities are 0, 1, 0, … A new barrier takes
// the phase before its first, of parity 1, for ended.
__device__ __forceinline__ void mbarrier_wait(uint64_t *barrier, unsigned parity) {
    asm volatile(
        "{\n.reg .pred ended;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
        "@!ended bra again;\n}" ::"r"(shared_address(barrier)), "r"(parity) : "memory");
}

// A barrier of so many threads, whole warps, among them those that come here; 0 is that of __syncthreads.
__device__ __forceinline__ void sync_some(int number, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// ---- registers: a warpgroup that needs few gives of its own, so that others may have more; multiples of 8

template <int LEFT>
__device__ __forceinline__ void give_registers_up() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(LEFT));
}
template <int THEN>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(THEN));
}

// ---- tiles

// Begin to copy the box whose first element is (row, column), zeros outside the matrix; `to` is a multiple of 1024, row r
// of the box lies at 128 r bytes, its 16-byte chunk c at place c ^ (r % 8). One thread does it, for the whole block.
__device__ __forceinline__ void load_tile(void *to, const TileMap &map, uint64_t *barrier, int row, int column) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
            shared_address(to)), "l"(&map), "r"(shared_address(barrier)), "r"(column), "r"(row) : "memory");
}
// Show what has been written to shared memory in the ordinary way to the copy engine and the tensor cores.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- products: each of these is for all 128 threads of a warpgroup together

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// Keep what the compiler computes with d on its side of this line. It knows nothing of products that are under way.
template <int N>
__device__ __forceinline__ void pin(float (&d)[N]) {
#pragma unroll
    for (float &x : d) asm volatile("" : "+f"(x)::"memory");
}

// Operands %0 to %n of an instruction, ten by ten, and the accumulators that they are.
#define TEN(t) "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9, "
#define UNITS "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, "
#define D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define D32(i) D8(i), D8(i + 8), D8(i + 16), D8(i + 24)

#define WGMMA(n, registers, a, b, accumulate, transposed_a, transposed_b, ...)                                            \
    asm volatile(                                                                                                         \
        "{\n.reg .pred add;\nsetp.ne.b32 add, %" #accumulate ", 0;\n"                                                     \
        "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" registers "}, %" #a ", %" #b ", add, 1, 1, %" #transposed_a \
        ", %" #transposed_b ";\n}"                                                                                        \
        : __VA_ARGS__                                                                                                     \
        : "l"(a_matrix), "l"(b_matrix), "r"((int)add), "n"(A_IS_COLUMNS), "n"(B_IS_COLUMNS)                               \
        : "memory")

// d = a b, or d += a b if `add`, for a 64 x 16 and b 16 x n in bfloat16, both in shared memory, and d 64 x n in float32. In
// the warpgroup's thread 32 w + 4 g + t, d[4 j + 2 h + i] is the element of row 16 w + 8 h + g, column 8 j + 2 t + i.
// Done when wgmma_wait says so: until then d is not to be touched, and neither is shared memory to be overwritten.
template <bool A_IS_COLUMNS, bool B_IS_COLUMNS>
__device__ __forceinline__ void wgmma(float (&d)[32], uint64_t a_matrix, uint64_t b_matrix, bool add) {
    WGMMA(64, UNITS TEN(1) TEN(2) "%30, %31", 32, 33, 34, 35, 36, D32(0));
}
template <bool A_IS_COLUMNS, bool B_IS_COLUMNS>
__device__ __forceinline__ void wgmma(float (&d)[64], uint64_t a_matrix, uint64_t b_matrix, bool add) {
    WGMMA(128, UNITS TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) "%60, %61, %62, %63", 64, 65, 66, 67, 68, D32(0), D32(32));
}
template <bool A_IS_COLUMNS, bool B_IS_COLUMNS>
__device__ __forceinline__ void wgmma(float (&d)[128], uint64_t a_matrix, uint64_t b_matrix, bool add) {
    WGMMA(256,
          UNITS TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) TEN(6) TEN(7) TEN(8) TEN(9) TEN(10) TEN(11)
          "%120, %121, %122, %123, %124, %125, %126, %127", 128, 129, 130, 131, 132, D32(0), D32(32), D32(64), D32(96));
}

#undef WGMMA
#undef D32
#undef D8
#undef UNITS
#undef TEN

#else
#include "hopper_emulated.h"
#endif

// How wgmma finds a matrix in shared memory, in tiles as load_tile lays them. Where rows of the tile are rows of a (or
// columns of b), k runs along them: `stride` bytes lead from 8 rows to the next 8, and `leading` is unused. Where they are
// columns (A_IS_COLUMNS, B_IS_COLUMNS), each row of the tile is one k: `leading` bytes lead from 64 rows of a (or columns
// of b) to the next 64, `stride` bytes from 8 k to the next 8. A step of 16 along k adds 32 bytes to the address, or 2048.
__device__ __forceinline__ uint64_t shared_matrix(const void *tile, int leading = 16, int stride = SWIZZLED_ROWS) {
    constexpr uint64_t SWIZZLE_128_BYTES = 1;
    const auto field = [](uint32_t bytes) { return (uint64_t)((bytes & 0x3ffff) >> 4); };
    return field(shared_address(tile)) | field(leading) << 16 | field(stride) << 32 | SWIZZLE_128_BYTES << 62;
}
