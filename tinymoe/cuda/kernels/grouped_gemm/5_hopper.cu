// Rung 5: Hopper. As its first step, 5_wgmma.cu, but the tensor cores need not wait: not for the end of their last products,
// nor for who loads, nor from one tile to the next.
//
// What changes:
// * 128 x 256 outputs to a tile, 128 sums in the registers of each thread that multiplies.
// * specialists: a producer keeps STAGES tiles on their way while two warpgroups of consumers multiply. To `full` comes
//   `empty`, a second barrier for each stage, when all consumers are done with it, in the place of a meeting of all threads.
//   The producer gives most of its registers to the consumers.
// * two groups of products are under way: a stage is handed back a step late, when those that read it are known to be done.
// * persistent: a block takes tile after tile, so that the producer already loads the next one while the consumers store.
// * order: tiles of GROUP row tiles, all columns of them, before the next: blocks that run at a time share what they read.
//
// Grid: as many blocks as the card has multiprocessors, 384 threads each. Memory sees 128 + 256 operands of 2 bytes for
// 128 * 256 multiply-adds: 85 FLOPs per byte before the L2 cache. inner and outer are multiples of 8 (rows of 16 bytes).
//
// The variant, to be measured beside: gathered_gemm and gathered_swiglu need no copy of x in expert order. The producer is
// then a warpgroup that gathers rows by cp.async, as rung 4 does, while its first thread asks for the weights.
//
// Read grouped_gemm, then for_each_tile and consume; the other kernels differ in what they load and store.
#include "hopper_tile.h"
#include "ragged.h"

constexpr int COLUMNS = 256, STAGES = 4, THREADS = WARPGROUP + MULTIPLIERS;
constexpr int WIDE = COLUMNS / 2;  // of gate, and of up
constexpr int GROUP = 16;          // row tiles

struct Shared {
    Stage<COLUMNS> stages[STAGES];
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

// sums = a b over `inner`, as the producer brings it. For a warpgroup, whose 64 rows of a are number `half`.
template <bool A_WIDE, bool B_WIDE, bool GATHERED>
__device__ __forceinline__ void consume(Shared &shared, Turn &turn, int inner, int half, Sums &sums) {
    const auto release = [&](int stage) {
        if (threadIdx.x % WARP == 0) mbarrier_arrive(shared.empty + stage);
    };
    int before = 0;
    for (float &sum : sums) sum = 0;
    pin(sums);
    for (int deep = 0; deep < inner; deep += DEPTH, turn.next()) {
        Stage<COLUMNS> &stage = shared.stages[turn.stage];
        mbarrier_wait(shared.full + turn.stage, turn.parity);
        // cp.async writes as threads do, and wgmma reads as the copy engine does. A fence must stand between, and behind the
        // barrier, since the thread that began a copy goes on without knowing of its end.
        if (GATHERED) fence_async_proxy();
        if ((A_WIDE || B_WIDE) && inner - deep < DEPTH) clear_from<A_WIDE, B_WIDE>(inner - deep, stage);
        start_products<A_WIDE, B_WIDE>(sums, stage, half);
        wgmma_wait<1>();  // for all but these: nobody reads the stage before any more
        if (deep > 0) release(before);
        before = turn.stage;
    }
    wgmma_wait<0>();
    pin(sums);
    if (inner > 0) release(before);
}

// All tiles of this block: load(tile, stage, barrier, deep) begins the copies of a step, and store(tile, half, sums) is for
// each warpgroup of consumers. If a is GATHERED, all threads of the producer's warpgroup load.
template <bool A_WIDE, bool B_WIDE, bool GATHERED = false, class TileOf, class Load, class Store>
__device__ __forceinline__ void for_each_tile(int tiles, TileOf tile_of, Load load, Store store) {
    DYNAMIC_SHARED(Shared, shared);
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            mbarrier_init(shared->full + i, 1 + (GATHERED ? WARPGROUP : 0));  // who expects bytes; the copies of each thread
            mbarrier_init(shared->empty + i, MULTIPLIERS / WARP);             // a lane of each warp
        }
        fence_mbarrier_init();
    }
    __syncthreads();  // the barriers are there
    Turn turn;
    if (threadIdx.x < WARPGROUP) {
        give_registers_up<GATHERED ? 56 : 40>();
        if (!GATHERED && threadIdx.x > 0) return;
        for (int i = blockIdx.x; i < tiles; i += gridDim.x) {
            const Tile tile = tile_of(i);
            for (int deep = 0; deep < tile.inner; deep += DEPTH, turn.next()) {
                Stage<COLUMNS> &stage = shared->stages[turn.stage];
                mbarrier_wait(shared->empty + turn.stage, turn.parity ^ 1);
                if (threadIdx.x == 0) mbarrier_arrive_expect(shared->full + turn.stage, GATHERED ? sizeof stage.b : sizeof stage);
                load(tile, stage, shared->full + turn.stage, deep);
            }
        }
        if (GATHERED) commit_copies(), wait_for_copies<0>();  // nobody leaves before the copies that are still on their way
    } else {
        take_registers<GATHERED ? 224 : 232>();
        const int half = threadIdx.x / WARPGROUP - 1;
        for (int i = blockIdx.x; i < tiles; i += gridDim.x) {
            const Tile tile = tile_of(i);
            Sums sums;
            consume<A_WIDE, B_WIDE, GATHERED>(*shared, turn, tile.inner, half, sums);
            store(tile, half, sums);
        }
    }
}

// x (slots, inner) lies in expert order. w is (experts * outer, inner) with TRANSPOSED, else (experts * inner, outer).
template <bool TRANSPOSED>
__global__ void __launch_bounds__(THREADS, 1)
    grouped_gemm(const __grid_constant__ TileMap x, const __grid_constant__ TileMap w, const int *offsets, bfloat16 *y, int experts,
                 int slots, int inner, int outer) {
    const int columns = (outer + COLUMNS - 1) / COLUMNS, tiles = row_tiles(offsets, experts, slots, ROWS) * columns;
    const auto tile_of = [&](int i) { return tile_of_slots(i, offsets, experts, slots, inner, columns, COLUMNS); };
    const auto load = [&](const Tile &tile, Stage<COLUMNS> &stage, uint64_t *barrier, int deep) {
        load_tile(stage.a, x, barrier, tile.row, deep);
        if (TRANSPOSED) load_tile(stage.b, w, barrier, tile.expert * outer + tile.column, deep);
        else load_wide(stage.b, w, barrier, tile.expert * inner + deep, tile.column, COLUMNS);
    };
    const auto store = [&](const Tile &tile, int half, const Sums &sums) { store_sums(y, tile, half, sums, outer); };
    for_each_tile<false, !TRANSPOSED>(tiles, tile_of, load, store);
}

// gate = x w1^T, up = x w3^T and hidden = silu(gate) up in one pass: columns 0-127 of the tile are w1's, the others w3's.
__global__ void __launch_bounds__(THREADS, 1)
    grouped_swiglu(const __grid_constant__ TileMap x, const __grid_constant__ TileMap w1, const __grid_constant__ TileMap w3,
                   const int *offsets, bfloat16 *gate, bfloat16 *up, bfloat16 *hidden, int experts, int slots, int inner, int outer) {
    const int columns = (outer + WIDE - 1) / WIDE, tiles = row_tiles(offsets, experts, slots, ROWS) * columns;
    const auto tile_of = [&](int i) { return tile_of_slots(i, offsets, experts, slots, inner, columns, WIDE); };
    const auto load = [&](const Tile &tile, Stage<COLUMNS> &stage, uint64_t *barrier, int deep) {
        load_tile(stage.a, x, barrier, tile.row, deep);
        load_tile(stage.b, w1, barrier, tile.expert * outer + tile.column, deep);
        load_tile(stage.b + WIDE * DEPTH, w3, barrier, tile.expert * outer + tile.column, deep);
    };
    const auto store = [&](const Tile &tile, int half, const Sums &sums) { store_swiglu(gate, up, hidden, tile, half, sums, outer); };
    for_each_tile<false, false>(tiles, tile_of, load, store);
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
    const auto load = [&](const Tile &tile, Stage<COLUMNS> &stage, uint64_t *barrier, int deep) {
        load_wide(stage.a, dy, barrier, offsets[tile.expert] + deep, tile.row, ROWS);
        load_wide(stage.b, x, barrier, offsets[tile.expert] + deep, tile.column, COLUMNS);
    };
    const auto store = [&](const Tile &tile, int half, const Sums &sums) {
        store_sums(dw + (size_t)tile.expert * outer * inner, tile, half, sums, inner);
    };
    for_each_tile<true, true>(experts * rows * columns, tile_of, load, store);
}

// ---- the variant: rows of x gathered on their way

// Copy x[rows] of the tile, or zeros where it has none, to where the copy engine would put it. Eight neighbouring threads
// copy a row's 128 bytes; full when the copies of all threads have come.
__device__ __forceinline__ void gather_tile(bfloat16 *to, const bfloat16 *x, const int *rows, uint64_t *barrier, const Tile &tile, int deep) {
    const int chunk = threadIdx.x % 8, column = deep + chunk * 8;
    for (int row = threadIdx.x / 8; row < ROWS; row += WARPGROUP / 8) {
        const int slot = tile.row + row;
        const bool valid = slot < tile.end && column < tile.inner;
        const bfloat16 *from = valid ? x + (size_t)(rows ? rows[slot] : slot) * tile.inner + column : x;
        copy_16_bytes(to + row * DEPTH + (chunk ^ row % 8) * 8, from, valid);
    }
    mbarrier_arrive_when_copied(barrier);
}

// grouped_gemm<true> of x[rows]; of x itself if rows is null.
__global__ void __launch_bounds__(THREADS, 1)
    gathered_gemm(const bfloat16 *x, const int *rows, const __grid_constant__ TileMap w, const int *offsets, bfloat16 *y, int experts,
                  int slots, int inner, int outer) {
    const int columns = (outer + COLUMNS - 1) / COLUMNS, tiles = row_tiles(offsets, experts, slots, ROWS) * columns;
    const auto tile_of = [&](int i) { return tile_of_slots(i, offsets, experts, slots, inner, columns, COLUMNS); };
    const auto load = [&](const Tile &tile, Stage<COLUMNS> &stage, uint64_t *barrier, int deep) {
        if (threadIdx.x == 0) load_tile(stage.b, w, barrier, tile.expert * outer + tile.column, deep);
        gather_tile(stage.a, x, rows, barrier, tile, deep);
    };
    const auto store = [&](const Tile &tile, int half, const Sums &sums) { store_sums(y, tile, half, sums, outer); };
    for_each_tile<false, false, true>(tiles, tile_of, load, store);
}

// grouped_swiglu of x[rows]; of x itself if rows is null.
__global__ void __launch_bounds__(THREADS, 1)
    gathered_swiglu(const bfloat16 *x, const int *rows, const __grid_constant__ TileMap w1, const __grid_constant__ TileMap w3,
                    const int *offsets, bfloat16 *gate, bfloat16 *up, bfloat16 *hidden, int experts, int slots, int inner, int outer) {
    const int columns = (outer + WIDE - 1) / WIDE, tiles = row_tiles(offsets, experts, slots, ROWS) * columns;
    const auto tile_of = [&](int i) { return tile_of_slots(i, offsets, experts, slots, inner, columns, WIDE); };
    const auto load = [&](const Tile &tile, Stage<COLUMNS> &stage, uint64_t *barrier, int deep) {
        if (threadIdx.x == 0) {
            load_tile(stage.b, w1, barrier, tile.expert * outer + tile.column, deep);
            load_tile(stage.b + WIDE * DEPTH, w3, barrier, tile.expert * outer + tile.column, deep);
        }
        gather_tile(stage.a, x, rows, barrier, tile, deep);
    };
    const auto store = [&](const Tile &tile, int half, const Sums &sums) { store_swiglu(gate, up, hidden, tile, half, sums, outer); };
    for_each_tile<false, false, true>(tiles, tile_of, load, store);
}
