// Rung 5, first step: wgmma and TMA. As rung 4, but nobody computes the address of an operand, and none passes through
// registers.
//
// Ideas:
// * wgmma: four warps, a warpgroup, together multiply 64 x 128 x 16 with both operands in shared memory. A tile of 128 x 128
//   outputs is two warpgroups, 64 sums in the registers of each thread.
// * TMA: one thread names a box of a matrix, and the copy engine brings it, swizzled, with zeros outside of the matrix. So
//   rows of x must lie in expert order already: the launcher gathers them, once for all products.
// * a barrier in memory for each stage: `full` has a phase for each time that the stage is filled, and it ends when all
//   bytes have come. Thread 0 says how many; all wait.
//
// Grid: (row tiles, column tiles) as in rung 4, 256 threads each; for the gradient of the weights a tile of each expert's.
// Memory sees 128 + 128 operands of 2 bytes for 128 * 128 multiply-adds: 64 FLOPs per byte, as on rung 4. Three stages are
// 96 KiB, so that a multiprocessor has room for two blocks: one multiplies while the other waits. inner and outer are
// multiples of 8 (rows of 16 bytes).
//
// What is left to 5_hopper.cu: here the products of a step end before the next begin, and all meet at each step's end.
#include "hopper_tile.h"
#include "ragged.h"

constexpr int COLUMNS = 128, STAGES = 3;

struct Shared {
    Stage<COLUMNS> stages[STAGES];
    uint64_t full[STAGES];
};
using Sums = float[COLUMNS / 2];  // of a thread: 64 x 128 by 128 threads

// sums = a b over `inner`, of which load(stage, barrier, deep) begins the copies of a step.
template <bool A_WIDE, bool B_WIDE, class Load>
__device__ __forceinline__ void multiply(int inner, Load load, Sums &sums) {
    DYNAMIC_SHARED(Shared, shared);
    const auto ask = [&](int step) {  // the copy engine, for all threads
        if (threadIdx.x > 0 || step * DEPTH >= inner) return;
        mbarrier_arrive_expect(shared->full + step % STAGES, sizeof(Stage<COLUMNS>));
        load(shared->stages[step % STAGES], shared->full + step % STAGES, step * DEPTH);
    };
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) mbarrier_init(shared->full + i, 1);  // thread 0; the bytes that it expects
        fence_mbarrier_init();
    }
    __syncthreads();  // the barriers are there
    for (int step = 0; step < STAGES; step++) ask(step);
#pragma unroll  // no index that is known only at run time: sums stay in registers
    for (float &sum : sums) sum = 0;
    pin(sums);
    for (int step = 0; step * DEPTH < inner; step++) {
        Stage<COLUMNS> &stage = shared->stages[step % STAGES];
        mbarrier_wait(shared->full + step % STAGES, step / STAGES % 2);
        const int left = inner - step * DEPTH;
        if ((A_WIDE || B_WIDE) && left < DEPTH) clear_from<A_WIDE, B_WIDE>(left, stage);
        start_products<A_WIDE, B_WIDE>(sums, stage, threadIdx.x / WARPGROUP);
        wgmma_wait<0>();
        __syncthreads();  // nobody reads the stage any more
        ask(step + STAGES);
    }
    pin(sums);
}

// The tile of slots x outer that this block has, `wide` columns. Rows that no expert owns are sums of nothing.
__device__ __forceinline__ Tile tile_of_slots(const int *offsets, int experts, int slots, int inner, int wide) {
    const RowTile rows = row_tile(offsets, experts, slots, blockIdx.x, ROWS);
    return {rows.expert, rows.begin, rows.end, (int)blockIdx.y * wide, rows.expert < experts ? inner : 0};
}

// x (slots, inner) lies in expert order. w is (experts * outer, inner) with TRANSPOSED, else (experts * inner, outer).
template <bool TRANSPOSED>
__global__ void __launch_bounds__(MULTIPLIERS, 2)
    grouped_gemm(const __grid_constant__ TileMap x, const __grid_constant__ TileMap w, const int *offsets, bfloat16 *y, int experts,
                 int slots, int inner, int outer) {
    const Tile tile = tile_of_slots(offsets, experts, slots, inner, COLUMNS);
    const auto load = [&](Stage<COLUMNS> &stage, uint64_t *barrier, int deep) {
        load_tile(stage.a, x, barrier, tile.row, deep);
        if (TRANSPOSED) load_tile(stage.b, w, barrier, tile.expert * outer + tile.column, deep);
        else load_wide(stage.b, w, barrier, tile.expert * inner + deep, tile.column, COLUMNS);
    };
    Sums sums;
    multiply<false, !TRANSPOSED>(tile.inner, load, sums);
    store_sums(y, tile, threadIdx.x / WARPGROUP, sums, outer);
}

// gate = x w1^T, up = x w3^T and hidden = silu(gate) up in one pass: columns 0-63 of the tile are w1's, the others w3's.
__global__ void __launch_bounds__(MULTIPLIERS, 2)
    grouped_swiglu(const __grid_constant__ TileMap x, const __grid_constant__ TileMap w1, const __grid_constant__ TileMap w3,
                   const int *offsets, bfloat16 *gate, bfloat16 *up, bfloat16 *hidden, int experts, int slots, int inner, int outer) {
    constexpr int WIDE = COLUMNS / 2;
    const Tile tile = tile_of_slots(offsets, experts, slots, inner, WIDE);
    const auto load = [&](Stage<COLUMNS> &stage, uint64_t *barrier, int deep) {
        load_tile(stage.a, x, barrier, tile.row, deep);
        load_tile(stage.b, w1, barrier, tile.expert * outer + tile.column, deep);
        load_tile(stage.b + WIDE * DEPTH, w3, barrier, tile.expert * outer + tile.column, deep);
    };
    Sums sums;
    multiply<false, false>(tile.inner, load, sums);
    store_swiglu(gate, up, hidden, tile, threadIdx.x / WARPGROUP, sums, outer);
}

// dw[e] = dy^T x over the slots of e: both operands lie along them, and neither is transposed in memory.
__global__ void __launch_bounds__(MULTIPLIERS, 2)
    grouped_gemm_dw(const __grid_constant__ TileMap dy, const __grid_constant__ TileMap x, const int *offsets, bfloat16 *dw, int outer,
                    int inner) {
    const int e = blockIdx.z, begin = offsets[e], row = blockIdx.y * ROWS, column = blockIdx.x * COLUMNS;
    const auto load = [&](Stage<COLUMNS> &stage, uint64_t *barrier, int deep) {
        load_wide(stage.a, dy, barrier, begin + deep, row, ROWS);
        load_wide(stage.b, x, barrier, begin + deep, column, COLUMNS);
    };
    Sums sums;
    multiply<true, true>(offsets[e + 1] - begin, load, sums);
    store_sums(dw + (size_t)e * outer * inner, {e, row, outer, column, 0}, threadIdx.x / WARPGROUP, sums, inner);
}
