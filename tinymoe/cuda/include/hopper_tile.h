// A tile of outputs on Hopper, as both steps of rung 5 have it: what is loaded for one step along the inner dimension, how
// two warpgroups multiply it, and who stores which sums.
#pragma once
#include "hopper.h"

constexpr int DEPTH = 64;                   // of a step along the inner dimension
constexpr int BOX = DEPTH;                  // a box is 64 elements wide: one swizzled row of 128 bytes
constexpr int MULTIPLIERS = 2 * WARPGROUP;  // threads
constexpr int ROWS = 128;                   // 64 for each warpgroup

// Rows from `row` on (below `end`) and columns from `column` on, each a sum of `inner` products.
struct Tile {
    int expert, row, end, column, inner;
};

// The operands of a step. Each lies as its matrix does: where rows of the matrix go along the output, the tile is one box,
// DEPTH wide; where they go along the inner dimension ("wide"), it is boxes of DEPTH rows, 64 outputs wide, one after the
// other.
template <int COLUMNS>
struct Stage {
    bfloat16 a[ROWS * DEPTH], b[COLUMNS * DEPTH];
};

// Load `length` outputs from `along` on, DEPTH rows from `deep` on, of a matrix whose rows go along the inner dimension.
__device__ __forceinline__ void load_wide(bfloat16 *tile, const TileMap &map, uint64_t *barrier, int deep, int along, int length) {
    for (int i = 0; i < length; i += BOX) load_tile(tile + i * DEPTH, map, barrier, deep, along + i);
}

// An expert's last step may be less than a stage: then the next expert's rows have come along, and zeros take their place,
// in both operands, since infinity times zero is NaN.
template <bool A_WIDE, bool B_WIDE, int COLUMNS>
__device__ __forceinline__ void clear_from(int first, Stage<COLUMNS> &stage) {
    const int size = (DEPTH - first) * BOX;  // of the part of a box
    const auto clear = [=](bfloat16 *tile, int boxes) {
        for (int i = threadIdx.x % MULTIPLIERS; i < boxes * size; i += MULTIPLIERS)
            tile[i / size * DEPTH * BOX + first * BOX + i % size] = from_float<bfloat16>(0);
    };
    if (A_WIDE) clear(stage.a, ROWS / BOX);
    if (B_WIDE) clear(stage.b, COLUMNS / BOX);
    fence_async_proxy();
    sync_some(1, MULTIPLIERS);  // whoever multiplies reads what all have cleared
}

// Start sums += a b of a stage, for the warpgroup whose 64 rows of a are number `half`: a group of products.
template <bool A_WIDE, bool B_WIDE, int COLUMNS>
__device__ __forceinline__ void start_products(float (&sums)[COLUMNS / 2], const Stage<COLUMNS> &stage, int half) {
    const bfloat16 *a = stage.a + half * 64 * DEPTH;  // lie it this way or that
    wgmma_fence();
    for (int k = 0; k < DEPTH; k += 16)
        wgmma<A_WIDE, B_WIDE>(sums, shared_matrix(a + (A_WIDE ? k * BOX : k)),
                              shared_matrix(stage.b + (B_WIDE ? k * BOX : k), DEPTH * SWIZZLED_ROW), true);
    wgmma_commit();
}

// Call visit(j, row, column) for every pair of neighbouring sums of this thread: sums[j] and sums[j + 1] are the outputs at
// that place of the tile, and at the next column.
template <class Visit>
__device__ __forceinline__ void for_each_pair(int half, int columns, Visit visit) {
    const int t = threadIdx.x % WARPGROUP, row = half * 64 + t / 32 * 16 + t % 32 / 4, column = t % 4 * 2;
#pragma unroll
    for (int j = 0; j < columns / 2; j += 2) visit(j, row + j / 2 % 2 * 8, column + j / 4 * 8);
}

__device__ __forceinline__ void store_pair(bfloat16 *to, float x, float y) { *reinterpret_cast<uint32_t *>(to) = pack(x, y); }

// Store the tile's outputs that exist, in rows of `outer`.
template <int HELD>
__device__ __forceinline__ void store_sums(bfloat16 *y, const Tile &tile, int half, const float (&sums)[HELD], int outer) {
    for_each_pair(half, 2 * HELD, [&](int j, int row, int column) {
        if (tile.row + row < tile.end && tile.column + column < outer)
            store_pair(y + (size_t)(tile.row + row) * outer + tile.column + column, sums[j], sums[j + 1]);
    });
}

// The same where half of the columns are gate's and the others up's, so that a thread has gate and up of the same outputs,
// and hidden = silu(gate) up as well. Without a gradient to come gate and up are null.
template <int HELD>
__device__ __forceinline__ void store_swiglu(bfloat16 *gate, bfloat16 *up, bfloat16 *hidden, const Tile &tile, int half,
                                             const float (&sums)[HELD], int outer) {
    for_each_pair(half, HELD, [&](int j, int row, int column) {
        if (tile.row + row >= tile.end || tile.column + column >= outer) return;
        const size_t to = (size_t)(tile.row + row) * outer + tile.column + column;
        const float *g = &sums[j], *u = &sums[j + HELD / 2];
        if (gate) store_pair(gate + to, g[0], g[1]), store_pair(up + to, u[0], u[1]);
        store_pair(hidden + to, g[0] / (1 + expf(-g[0])) * u[0], g[1] / (1 + expf(-g[1])) * u[1]);
    });
}
