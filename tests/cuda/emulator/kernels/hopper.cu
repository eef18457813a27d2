// A product in Hopper's way, and the ways to get it wrong. C = A B, float32 from bfloat16, in tiles of 64 x 64 x 64: one
// producer thread keeps STAGES tiles of A and B on their way, and a warpgroup multiplies them. "Caught below" names the
// bugs that a checked launch finds at the next line, in one schedule or another.
#include "hopper.h"

constexpr int SIDE = 64;
constexpr int TILE_BYTES = SIDE * SIDE * 2;

enum Bug {
    NONE,
    STAGE_FREED_TOO_EARLY,    // before its products are done
    STAGE_NEVER_WAITED_FOR,   // the producer overwrites what may be in use
    WRONG_PARITY,             // the consumer reads before the tiles are there
    TOO_FEW_BYTES,            // the phase ends before its tiles
    TOO_MANY_BYTES,           // and this one never
    NO_BARRIER_AFTER_INIT,
    NO_FENCE_AFTER_INIT,
    NO_INIT,
    NO_BARRIER_AT_ALL,        // a word in its place
    ARRIVES_TWICE,
    NO_WGMMA_FENCE,
    NO_WGMMA_WAIT,
    NO_COMMIT,
    ONE_WARP_ELSEWHERE,       // starts a product of other matrices
    MISALIGNED_TILE,
    TILE_NOBODY_WAITS_FOR,
    ACCUMULATOR_READ_TOO_EARLY,
    // of multiply_copied
    COPIES_UNFENCED,
    COPIES_NOT_WAITED_FOR,
    COPIES_NOBODY_READS,
    ARRIVES_BEFORE_ITS_COPIES,
    TOO_FEW_ARRIVALS,
    TOO_MANY_ARRIVALS,
};

// A is stored (M, K) or, with A_IS_COLUMNS, (K, M); B is stored (N, K) or (K, N).
template <int STAGES, bool A_IS_COLUMNS, bool B_IS_COLUMNS, int BUG>
__global__ void __launch_bounds__(WARPGROUP + WARP)
multiply(const __grid_constant__ TileMap a, const __grid_constant__ TileMap b, float *c, int m, int n, int inner) {
    DYNAMIC_SHARED(unsigned char, tiles);
    unsigned char *as = tiles, *bs = tiles + STAGES * TILE_BYTES;
    uint64_t *full = reinterpret_cast<uint64_t *>(tiles + 2 * STAGES * TILE_BYTES), *empty = full + STAGES;
    const int t = threadIdx.x, row = blockIdx.y * SIDE, column = blockIdx.x * SIDE, steps = (inner + SIDE - 1) / SIDE;
    if (t == 0 && BUG != NO_INIT) {
        for (int stage = 0; stage < STAGES; stage++) {
            if (BUG == NO_BARRIER_AT_ALL) full[stage] = 0;
            else mbarrier_init(full + stage, 1);
            mbarrier_init(empty + stage, 1);
        }
        if (BUG != NO_FENCE_AFTER_INIT) fence_mbarrier_init();
    }
    if (BUG != NO_BARRIER_AFTER_INIT) __syncthreads();
    if (t >= WARPGROUP) {
        if (t > WARPGROUP) return;
        for (int i = 0; i < steps; i++) {
            const int stage = i % STAGES, k = i * SIDE;
            // caught below: NO_INIT, NO_BARRIER_AFTER_INIT
            if (BUG != STAGE_NEVER_WAITED_FOR) mbarrier_wait(empty + stage, i / STAGES % 2 ^ 1);
            const int wrong = BUG == TOO_FEW_BYTES ? -TILE_BYTES : BUG == TOO_MANY_BYTES ? 2 : 0;
            // caught below: STAGE_NEVER_WAITED_FOR, NO_BARRIER_AT_ALL
            mbarrier_arrive_expect(full + stage, 2 * TILE_BYTES + wrong);
            // caught below: ARRIVES_TWICE
            if (BUG == ARRIVES_TWICE) mbarrier_arrive(full + stage);
            unsigned char *to = as + stage * TILE_BYTES + (BUG == MISALIGNED_TILE ? 128 : 0);
            // caught below: MISALIGNED_TILE, NO_FENCE_AFTER_INIT, STAGE_FREED_TOO_EARLY, STAGE_NEVER_WAITED_FOR, TOO_FEW_BYTES, NO_WGMMA_WAIT, NO_COMMIT
            load_tile(to, a, full + stage, A_IS_COLUMNS ? k : row, A_IS_COLUMNS ? row : k);
            // caught below: TOO_FEW_BYTES
            load_tile(bs + stage * TILE_BYTES, b, full + stage, B_IS_COLUMNS ? k : column, B_IS_COLUMNS ? column : k);
        }
        if (BUG == TILE_NOBODY_WAITS_FOR) {
            const int stage = steps % STAGES;
            mbarrier_wait(empty + stage, steps / STAGES % 2 ^ 1);
            mbarrier_arrive_expect(full + stage, TILE_BYTES);
            // caught below: TILE_NOBODY_WAITS_FOR
            load_tile(as + stage * TILE_BYTES, a, full + stage, 0, 0);
        }
        return;
    }
    float d[SIDE / 2], early = 0;
    for (int i = 0; i < steps; i++) {
        const int stage = i % STAGES;
        // caught below: TOO_MANY_BYTES, NO_INIT, NO_BARRIER_AFTER_INIT, NO_BARRIER_AT_ALL, STAGE_NEVER_WAITED_FOR, WRONG_PARITY
        mbarrier_wait(full + stage, i / STAGES % 2 ^ (BUG == WRONG_PARITY));
        // caught below: WRONG_PARITY
        if (BUG != NO_WGMMA_FENCE) wgmma_fence();
        for (int k = 0; k < SIDE; k += 16) {
            const int skew = BUG == ONE_WARP_ELSEWHERE && t / WARP == 2 ? 32 : 0;
            const uint64_t a_part = shared_matrix(as + stage * TILE_BYTES + k * (A_IS_COLUMNS ? 128 : 2) + skew);
            const uint64_t b_part = shared_matrix(bs + stage * TILE_BYTES + k * (B_IS_COLUMNS ? 128 : 2));
            // caught below: NO_WGMMA_FENCE, ONE_WARP_ELSEWHERE, WRONG_PARITY, TOO_FEW_BYTES
            wgmma<A_IS_COLUMNS, B_IS_COLUMNS>(d, a_part, b_part, i + k > 0);
        }
        if (BUG != NO_COMMIT) wgmma_commit();
        if (BUG == ACCUMULATOR_READ_TOO_EARLY) early = d[0];
        if (BUG == STAGE_FREED_TOO_EARLY && t == 0) mbarrier_arrive(empty + stage);
        if (BUG != NO_WGMMA_WAIT) wgmma_wait<0>();
        if (BUG != STAGE_FREED_TOO_EARLY && t == 0) mbarrier_arrive(empty + stage);
    }
    if (BUG == ACCUMULATOR_READ_TOO_EARLY) d[0] = early;
    for (int e = 0; e < SIDE / 2; e++) {
        const int r = row + t / 32 * 16 + e / 2 % 2 * 8 + t % 32 / 4, s = column + e / 4 * 8 + t % 4 * 2 + e % 2;
        if (r < m && s < n) c[(size_t)r * n + s] = d[e];
    }
}

// One warpgroup writes both matrices itself, in the ordinary way, and multiplies them: c (64, N) = a (64, 16) b (N, 16)^T.
template <int N, bool FENCED>
__global__ void __launch_bounds__(WARPGROUP) multiply_written(const bfloat16 *a, const bfloat16 *b, float *c) {
    DYNAMIC_SHARED(unsigned char, tiles);
    unsigned char *as = tiles, *bs = tiles + 64 * SWIZZLED_ROW;
    const auto place = [](unsigned char *tile, int row, int k) {
        return reinterpret_cast<bfloat16 *>(tile + row * SWIZZLED_ROW + ((k / 8 ^ row % 8) * 16 + k % 8 * 2));
    };
    const int t = threadIdx.x;
    for (int i = t; i < 64 * 16; i += WARPGROUP) *place(as, i / 16, i % 16) = a[i];
    for (int i = t; i < N * 16; i += WARPGROUP) *place(bs, i / 16, i % 16) = b[i];
    if (FENCED) fence_async_proxy();
    __syncthreads();
    float d[N / 2];
    wgmma_fence();
    // caught below: UNFENCED
    wgmma<false, false>(d, shared_matrix(as), shared_matrix(bs), false);
    wgmma_commit();
    wgmma_wait<0>();
    for (int e = 0; e < N / 2; e++)
        c[(t / 32 * 16 + e / 2 % 2 * 8 + t % 32 / 4) * N + e / 4 * 8 + t % 4 * 2 + e % 2] = d[e];
}

// The same, when another warp copies both matrices, 16 bytes at a time, and goes on: the barrier tells when they are there.
template <int BUG>
__global__ void __launch_bounds__(WARPGROUP + WARP) multiply_copied(const bfloat16 *a, const bfloat16 *b, float *c) {
    DYNAMIC_SHARED(unsigned char, tiles);
    unsigned char *as = tiles, *bs = tiles + 64 * SWIZZLED_ROW;
    uint64_t *full = reinterpret_cast<uint64_t *>(tiles + 2 * 64 * SWIZZLED_ROW);
    const int t = threadIdx.x;
    if (t == 0) mbarrier_init(full, BUG == TOO_FEW_ARRIVALS ? WARP / 2 : BUG == TOO_MANY_ARRIVALS ? WARP + 1 : WARP);
    __syncthreads();
    if (t >= WARPGROUP) {
        for (int i = t - WARPGROUP; i < 2 * 64; i += WARP) {  // chunk i % 2 of row i / 2
            const int to = i / 2 * SWIZZLED_ROW + (i % 2 ^ i / 2 % 8) * 16;
            // caught below: ARRIVES_BEFORE_ITS_COPIES
            copy_16_bytes(as + to, a + i * 8, true);
            copy_16_bytes(bs + to, b + i * 8, true);
        }
        if (BUG == ARRIVES_BEFORE_ITS_COPIES) mbarrier_arrive(full);
        // caught below: COPIES_NOBODY_READS
        else mbarrier_arrive_when_copied(full);
        return;
    }
    if (BUG == COPIES_NOBODY_READS) return;
    // caught below: TOO_MANY_ARRIVALS, TOO_FEW_ARRIVALS
    if (BUG != COPIES_NOT_WAITED_FOR) mbarrier_wait(full, 0);
    if (BUG != COPIES_UNFENCED) fence_async_proxy();
    float d[32];
    wgmma_fence();
    // caught below: COPIES_UNFENCED, COPIES_NOT_WAITED_FOR, ARRIVES_BEFORE_ITS_COPIES, TOO_FEW_ARRIVALS
    wgmma<false, false>(d, shared_matrix(as), shared_matrix(bs), false);
    wgmma_commit();
    wgmma_wait<0>();
    for (int e = 0; e < 32; e++) c[(t / 32 * 16 + e / 2 % 2 * 8 + t % 32 / 4) * 64 + e / 4 * 8 + t % 4 * 2 + e % 2] = d[e];
}
