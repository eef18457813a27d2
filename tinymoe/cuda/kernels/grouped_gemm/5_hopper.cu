// Rung 5: Hopper. As rung 4, but nobody computes the address of an operand, none passes through registers, and loading does
// not stop between two tiles.
//
// Ideas:
// * wgmma: four warps together multiply 64 x 256 x 16 with both operands in shared memory. A tile of 128 x 256 outputs is two
//   such warpgroups, 128 sums in the registers of each thread.
// * TMA: one thread names a box of a matrix, and the copy engine brings it, swizzled, with zeros outside of the matrix. So
//   rows of x must lie in expert order already: the launcher gathers them, once for all products.
// * specialists: a producer keeps STAGES tiles on their way while two warpgroups of consumers multiply. Two barriers in
//   memory for each stage: `full`, when all its bytes have come, and `empty`, when all consumers are done with it. The
//   producer gives most of its registers to the consumers.
// * persistent: a block takes tile after tile, so that the producer already loads the next one while the consumers store.
// * order: tiles of GROUP row tiles, all columns of them, before the next: blocks that run at a time share what they read.
//
// Grid: as many blocks as the card has multiprocessors, 384 threads each. Memory sees 128 + 256 operands of 2 bytes for
// 128 * 256 multiply-adds: 85 FLOPs per byte before the L2 cache. inner and outer are multiples of 8 (rows of 16 bytes).
//
// Read grouped_gemm, at the end, then for_each_tile and consume; the other kernels differ in what they load and store.
#include "hopper.h"
#include "ragged.h"

constexpr int ROWS = 128, COLUMNS = 256, DEPTH = 64, STAGES = 4;
constexpr int CONSUMERS = ROWS / 64, THREADS = (1 + CONSUMERS) * WARPGROUP;
constexpr int GROUP = 16;   // row tiles
constexpr int BOX = DEPTH;  // a box is 64 elements wide: one swizzled row of 128 bytes

// Each operand lies as its matrix does. Where rows of the matrix go along the output, the tile is one box, DEPTH wide; where
// they go along the inner dimension, it is boxes of DEPTH rows, 64 outputs wide, one after the other.
struct Stage {
    bfloat16 a[ROWS * DEPTH], b[COLUMNS * DEPTH];
};
struct Shared {
    Stage stages[STAGES];
    uint64_t full[STAGES], empty[STAGES];
};

using Sums = float[COLUMNS / 2];  // of a thread: 64 x 256 by 128 threads

// Which stage comes next, and the parity of the phase that its barriers are in.
struct Turn {
    int stage = 0, parity = 0;
    __device__ __forceinline__ void next() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

// A tile of outputs: ROWS rows from `row` on (below `end`) and COLUMNS columns from `column` on, sums of `inner` products.
struct Tile {
    int expert, row, end, column, inner;
};

// Number i of rows x columns tiles: GROUP rows of them, all columns, and then the next.
__device__ __forceinline__ int2 in_order(int i, int rows, int columns) {
    const int first = i / (GROUP * columns) * GROUP, high = min(GROUP, rows - first);
    i -= first * columns;
    return {first + i % high, i / high};
}

// Tile i of slots x outer, `wide` columns to a tile. Rows that no expert owns are sums of nothing.
__device__ __forceinline__ Tile tile_of_slots(int i, const int *offsets, int experts, int slots, int inner, int columns, int wide) {
    const int2 at = in_order(i, row_tiles(offsets, experts, slots, ROWS), columns);
    const RowTile rows = row_tile(offsets, experts, slots, at.x, ROWS);
    return {rows.expert, rows.begin, rows.end, at.y * wide, rows.expert < experts ? inner : 0};
}

// Load `length` outputs from `along` on, DEPTH rows from `deep` on, of a matrix whose rows go along the inner dimension.
__device__ __forceinline__ void load_wide(bfloat16 *tile, const TileMap &map, uint64_t *barrier, int deep, int along, int length) {
    for (int i = 0; i < length; i += BOX) load_tile(tile + i * DEPTH, map, barrier, deep, along + i);
}

// An expert's last step may be less than a stage: then the next expert's rows have come along, and zeros take their place,
// in both operands, since infinity times zero is NaN.
template <bool A_WIDE, bool B_WIDE>
__device__ __forceinline__ void clear_from(int first, Stage &stage) {
    const int size = (DEPTH - first) * BOX;  // of the part of a box
    const auto clear = [=](bfloat16 *tile, int boxes) {
        for (int i = threadIdx.x - WARPGROUP; i < boxes * size; i += CONSUMERS * WARPGROUP)
            tile[i / size * DEPTH * BOX + first * BOX + i % size] = from_float<bfloat16>(0);
    };
    if (A_WIDE) clear(stage.a, ROWS / BOX);
    if (B_WIDE) clear(stage.b, COLUMNS / BOX);
    fence_async_proxy();
    sync_some(1, CONSUMERS * WARPGROUP);
}

// sums = a b over `inner`, as the producer brings it. For a warpgroup, whose 64 rows of a are number `half`.
template <bool A_WIDE, bool B_WIDE>
__device__ __forceinline__ void consume(Shared &shared, Turn &turn, int inner, int half, Sums &sums) {
    const auto release = [&](int stage) {
        if (threadIdx.x % WARP == 0) mbarrier_arrive(shared.empty + stage);
    };
    int before = 0;
    for (float &sum : sums) sum = 0;
    pin(sums);
    for (int deep = 0; deep < inner; deep += DEPTH, turn.next()) {
        Stage &stage = shared.stages[turn.stage];
        mbarrier_wait(shared.full + turn.stage, turn.parity);
        if ((A_WIDE || B_WIDE) && inner - deep < DEPTH) clear_from<A_WIDE, B_WIDE>(inner - deep, stage);
        const bfloat16 *a = stage.a + half * 64 * DEPTH;  // lie it this way or that
        wgmma_fence();
        for (int k = 0; k < DEPTH; k += 16)
            wgmma<A_WIDE, B_WIDE>(sums, shared_matrix(a + (A_WIDE ? k * BOX : k)),
                                  shared_matrix(stage.b + (B_WIDE ? k * BOX : k), DEPTH * SWIZZLED_ROW), true);
        wgmma_commit();
        wgmma_wait<1>();  // for all but these: nobody reads the stage before any more
        if (deep > 0) release(before);
        before = turn.stage;
    }
    wgmma_wait<0>();
    pin(sums);
    if (inner > 0) release(before);
}

// All tiles of this block: load(tile, stage, barrier, deep) begins the copies of a step, and store(tile, half, sums) is for
// each warpgroup of consumers.
template <bool A_WIDE, bool B_WIDE, class TileOf, class Load, class Store>
__device__ __forceinline__ void for_each_tile(int tiles, TileOf tile_of, Load load, Store store) {
    DYNAMIC_SHARED(Shared, shared);
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            mbarrier_init(shared->full + i, 1);                              // the producer; the bytes that it expects
            mbarrier_init(shared->empty + i, CONSUMERS * WARPGROUP / WARP);  // a lane of each warp
        }
        fence_mbarrier_init();
    }
    __syncthreads();
    Turn turn;
    if (threadIdx.x < WARPGROUP) {
        give_registers_up<40>();
        if (threadIdx.x > 0) return;
        for (int i = blockIdx.x; i < tiles; i += gridDim.x) {
            const Tile tile = tile_of(i);
            for (int deep = 0; deep < tile.inner; deep += DEPTH, turn.next()) {
                mbarrier_wait(shared->empty + turn.stage, turn.parity ^ 1);
                mbarrier_arrive_expect(shared->full + turn.stage, sizeof(Stage));
                load(tile, shared->stages[turn.stage], shared->full + turn.stage, deep);
            }
        }
    } else {
        take_registers<232>();
        const int half = threadIdx.x / WARPGROUP - 1;
        for (int i = blockIdx.x; i < tiles; i += gridDim.x) {
            const Tile tile = tile_of(i);
            Sums sums;
            consume<A_WIDE, B_WIDE>(*shared, turn, tile.inner, half, sums);
            store(tile, half, sums);
        }
    }
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

// x (slots, inner) lies in expert order. w is (experts * outer, inner) with TRANSPOSED, else (experts * inner, outer).
template <bool TRANSPOSED>
__global__ void __launch_bounds__(THREADS, 1)
    grouped_gemm(const __grid_constant__ TileMap x, const __grid_constant__ TileMap w, const int *offsets, bfloat16 *y, int experts,
                 int slots, int inner, int outer) {
    const int columns = (outer + COLUMNS - 1) / COLUMNS, tiles = row_tiles(offsets, experts, slots, ROWS) * columns;
    const auto tile_of = [&](int i) { return tile_of_slots(i, offsets, experts, slots, inner, columns, COLUMNS); };
    const auto load = [&](const Tile &tile, Stage &stage, uint64_t *barrier, int deep) {
        load_tile(stage.a, x, barrier, tile.row, deep);
        if (TRANSPOSED) load_tile(stage.b, w, barrier, tile.expert * outer + tile.column, deep);
        else load_wide(stage.b, w, barrier, tile.expert * inner + deep, tile.column, COLUMNS);
    };
    for_each_tile<false, !TRANSPOSED>(tiles, tile_of, load, [&](const Tile &tile, int half, const Sums &sums) {
        for_each_pair(half, COLUMNS, [&](int j, int row, int column) {
            if (tile.row + row < tile.end && tile.column + column < outer)
                store_pair(y + (size_t)(tile.row + row) * outer + tile.column + column, sums[j], sums[j + 1]);
        });
    });
}

// gate = x w1^T, up = x w3^T and hidden = silu(gate) up in one pass: columns 0-127 of the tile are w1's, the others w3's, so
// that a thread has gate and up of the same outputs. Without a gradient to come gate and up are null.
__global__ void __launch_bounds__(THREADS, 1)
    grouped_swiglu(const __grid_constant__ TileMap x, const __grid_constant__ TileMap w1, const __grid_constant__ TileMap w3,
                   const int *offsets, bfloat16 *gate, bfloat16 *up, bfloat16 *hidden, int experts, int slots, int inner, int outer) {
    constexpr int WIDE = COLUMNS / 2;
    const int columns = (outer + WIDE - 1) / WIDE, tiles = row_tiles(offsets, experts, slots, ROWS) * columns;
    const auto tile_of = [&](int i) { return tile_of_slots(i, offsets, experts, slots, inner, columns, WIDE); };
    const auto load = [&](const Tile &tile, Stage &stage, uint64_t *barrier, int deep) {
        load_tile(stage.a, x, barrier, tile.row, deep);
        load_tile(stage.b, w1, barrier, tile.expert * outer + tile.column, deep);
        load_tile(stage.b + WIDE * DEPTH, w3, barrier, tile.expert * outer + tile.column, deep);
    };
    for_each_tile<false, false>(tiles, tile_of, load, [&](const Tile &tile, int half, const Sums &sums) {
        for_each_pair(half, WIDE, [&](int j, int row, int column) {
            if (tile.row + row >= tile.end || tile.column + column >= outer) return;
            const size_t to = (size_t)(tile.row + row) * outer + tile.column + column;
            const float *g = &sums[j], *u = &sums[j + WIDE / 2];
            if (gate) store_pair(gate + to, g[0], g[1]), store_pair(up + to, u[0], u[1]);
            store_pair(hidden + to, g[0] / (1 + expf(-g[0])) * u[0], g[1] / (1 + expf(-g[1])) * u[1]);
        });
    });
}

// dw[e] = dy^T x over the slots of e: both operands lie along them, and neither is transposed in memory.
__global__ void __launch_bounds__(THREADS, 1)
    grouped_gemm_dw(const __grid_constant__ TileMap dy, const __grid_constant__ TileMap x, const int *offsets, bfloat16 *dw, int experts,
                    int outer, int inner) {
    const int rows = (outer + ROWS - 1) / ROWS, columns = (inner + COLUMNS - 1) / COLUMNS;
    const auto tile_of = [&](int i) -> Tile {
        const int e = i / (rows * columns);
        const int2 at = in_order(i % (rows * columns), rows, columns);
        return {e, at.x * ROWS, outer, at.y * COLUMNS, offsets[e + 1] - offsets[e]};
    };
    const auto load = [&](const Tile &tile, Stage &stage, uint64_t *barrier, int deep) {
        load_wide(stage.a, dy, barrier, offsets[tile.expert] + deep, tile.row, ROWS);
        load_wide(stage.b, x, barrier, offsets[tile.expert] + deep, tile.column, COLUMNS);
    };
    for_each_tile<true, true>(experts * rows * columns, tile_of, load, [&](const Tile &tile, int half, const Sums &sums) {
        for_each_pair(half, COLUMNS, [&](int j, int row, int column) {
            if (tile.row + row < outer && tile.column + column < inner)
                store_pair(dw + ((size_t)tile.expert * outer + tile.row + row) * inner + tile.column + column, sums[j], sums[j + 1]);
        });
    });
}
