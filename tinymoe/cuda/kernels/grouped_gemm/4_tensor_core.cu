// Rung 4: tensor cores. As rung 3, but a warp multiplies 16 x 8 x 16 in one instruction, and memory is asked three tiles ahead.
//
// Ideas:
// * mma.sync: a warp's 64 x 32 outputs are 4 x 4 accumulators in registers; bfloat16 in, float32 sums.
// * ldmatrix: shared memory to registers in the layout that mma.sync wants, four 8 x 8 matrices at a time, transposed on the
//   way where the operand lies the other way round. So no weight is ever transposed in memory.
// * cp.async in 4 stages: while one tile is multiplied, the next three are on their way, past the registers. The gather of
//   token rows needs no pass of its own: each copy has its own address.
// * swizzle: the 16-byte chunks of a row are permuted by the row's number, so that the 8 rows that ldmatrix reads at once lie
//   in different banks, without padding.
// * fused SwiGLU: a block takes the same 64 columns of w1 and of w3, so that gate and up of an element end in one thread.
//
// Grid: a block of 128 x 128 outputs (128 x 64 of gate and up), 256 threads, 32 deep. Memory sees 128 + 128 operands of 2 bytes
// for 128 * 128 multiply-adds: 64 FLOPs per byte, and the tiles of neighbouring blocks come from the L2 cache.
// inner and outer are multiples of 8 (16-byte copies); other sizes run on rung 3.
#include "prelude.h"
#include "ragged.h"
#include "tensor_core.h"

constexpr int TILE = 128, DEPTH = 32, STAGES = 4, THREADS = 256;
constexpr int CHUNK = 8;                            // elements of a 16-byte copy
constexpr int CHUNKS = TILE * DEPTH / CHUNK;        // of a tile; each thread copies CHUNKS / THREADS of them
constexpr int WARP_ROWS = 64, WARP_COLUMNS = 32;    // outputs of a warp; 2 x 4 warps
constexpr int MMA_ROWS = WARP_ROWS / 16, MMA_COLUMNS = WARP_COLUMNS / 8;

struct Stage {
    bfloat16 a[TILE * DEPTH], b[TILE * DEPTH];
};
constexpr int SHARED = STAGES * sizeof(Stage);  // bytes; the launcher asks for them

using Sums = float[MMA_ROWS][MMA_COLUMNS][4];

// Where chunk (row, chunk) of a tile lies. A tile is DEEP (rows along the output, DEPTH elements each, 64 bytes: two rows
// share a line of 128) or wide (rows along the inner dimension, TILE elements each).
template <bool DEEP>
__device__ __forceinline__ int place(int row, int chunk) {
    return DEEP ? row * DEPTH + (chunk ^ (row / 2 % 4)) * CHUNK : row * TILE + (chunk ^ (row % 8)) * CHUNK;
}

// Begin to copy a tile. `source(along, deep)` is the address of CHUNK elements at (output `along`, inner `deep`), which
// follow each other along the inner dimension (DEEP) or the output's; null where there is nothing.
template <bool DEEP, class Source>
__device__ __forceinline__ void copy_tile(bfloat16 *tile, const bfloat16 *anything, Source source) {
    for (int i = threadIdx.x; i < CHUNKS; i += THREADS) {
        const int per_row = (DEEP ? DEPTH : TILE) / CHUNK, row = i / per_row, chunk = i % per_row;
        const bfloat16 *from = DEEP ? source(row, chunk * CHUNK) : source(chunk * CHUNK, row);
        copy_16_bytes(tile + place<DEEP>(row, chunk), from ? from : anything, from != nullptr);
    }
}

// sums += a b over one stage. Column j of 8 of this warp begins at column(j) of the tile of b.
template <bool A_DEEP, bool B_DEEP, class Column>
__device__ __forceinline__ void multiply(const Stage &stage, Sums &sums, Column column) {
    const int lane = threadIdx.x % WARP, first_row = threadIdx.x / WARP / 4 * WARP_ROWS;
    for (int deep = 0; deep < DEPTH; deep += 16) {
        uint32_t a[MMA_ROWS][4], b[MMA_COLUMNS / 2][4];
        for (int i = 0; i < MMA_ROWS; i++) {  // matrices: rows 0-7 and 8-15 at inner 0-7, then both at inner 8-15
            const int row = first_row + i * 16;
            if (A_DEEP) load_matrices<false>(a[i], stage.a + place<true>(row + lane % 16, deep / CHUNK + lane / 16));
            else load_matrices<true>(a[i], stage.a + place<false>(deep + lane % 8 + lane / 16 * 8, row / CHUNK + lane / 8 % 2));
        }
        for (int j = 0; j < MMA_COLUMNS; j += 2) {  // matrices: inner 0-7 and 8-15 of eight columns, then of the next eight
            const int at = column(j);
            if (B_DEEP) load_matrices<false>(b[j / 2], stage.b + place<true>(at + lane % 8 + lane / 16 * 8, deep / CHUNK + lane / 8 % 2));
            else load_matrices<true>(b[j / 2], stage.b + place<false>(deep + lane % 16, at / CHUNK + lane / 16));
        }
        for (int i = 0; i < MMA_ROWS; i++)
            for (int j = 0; j < MMA_COLUMNS; j++) mma_16x8x16(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
}

// Multiply all of the inner dimension: STAGES - 1 tiles are on their way while one is multiplied.
template <bool A_DEEP, bool B_DEEP, class SourceA, class SourceB, class Column>
__device__ __forceinline__ void multiply_all(int inner, const bfloat16 *anything, SourceA a, SourceB b, Column column, Sums &sums) {
    DYNAMIC_SHARED(Stage, stages);
    auto copy = [&](int i) {
        Stage &stage = stages[i % STAGES];
        if (i * DEPTH < inner) {
            copy_tile<A_DEEP>(stage.a, anything, [&](int along, int deep) { return a(along, i * DEPTH + deep); });
            copy_tile<B_DEEP>(stage.b, anything, [&](int along, int deep) { return b(along, i * DEPTH + deep); });
        }
        commit_copies();  // an empty group, too, so that their number tells which tile has come
    };
    for (int i = 0; i < STAGES - 1; i++) copy(i);
    for (int i = 0; i * DEPTH < inner; i++) {
        wait_for_copies<STAGES - 2>();  // tile i has come, of this thread
        __syncthreads();                // and of all; and nobody multiplies tile i - 1 any more, whose stage is next
        copy(i + STAGES - 1);
        multiply<A_DEEP, B_DEEP>(stages[i % STAGES], sums, column);
    }
}

// Call store(row, column, two neighbouring sums) for all of this thread's outputs, by their place in the tile.
template <class Column, class Store>
__device__ __forceinline__ void for_each_pair(const Sums &sums, Column column, Store store) {
    const int lane = threadIdx.x % WARP, first_row = threadIdx.x / WARP / 4 * WARP_ROWS;
    for (int i = 0; i < MMA_ROWS; i++)
        for (int j = 0; j < MMA_COLUMNS; j++)
            for (int half = 0; half < 2; half++)
                store(first_row + i * 16 + half * 8 + lane / 4, column(j) + lane % 4 * 2, sums[i][j][2 * half], sums[i][j][2 * half + 1]);
}

__device__ __forceinline__ void store_pair(bfloat16 *to, float x, float y) { *reinterpret_cast<uint32_t *>(to) = pack(x, y); }

template <class T, bool TRANSPOSED>
__global__ void __launch_bounds__(THREADS, 1)
    grouped_gemm(const T *x, const int *rows, const T *w, const int *offsets, T *y, int experts, int slots, int inner, int outer) {
    const RowTile tile = row_tile(offsets, experts, slots, blockIdx.x, TILE);
    const int first = blockIdx.y * TILE, warp_column = threadIdx.x / WARP % 4 * WARP_COLUMNS;
    w += (size_t)min(tile.expert, experts - 1) * inner * outer;
    const int used = tile.expert < experts ? inner : 0;  // rows that no expert owns become zeros
    auto from_x = [&](int along, int deep) -> const T * {
        const int slot = tile.begin + along;
        return slot < tile.end && deep < inner ? x + (size_t)(rows ? rows[slot] : slot) * inner + deep : nullptr;
    };
    auto from_w = [&](int along, int deep) -> const T * {
        if (first + along >= outer || deep >= inner) return nullptr;
        return TRANSPOSED ? w + (size_t)(first + along) * inner + deep : w + (size_t)deep * outer + first + along;
    };
    auto column = [&](int j) { return warp_column + j * 8; };
    Sums sums = {};
    multiply_all<true, TRANSPOSED>(used, x, from_x, from_w, column, sums);
    for_each_pair(sums, column, [&](int row, int at, float left, float right) {
        if (tile.begin + row < tile.end && first + at < outer) store_pair(y + (size_t)(tile.begin + row) * outer + first + at, left, right);
    });
}

// gate = x w1^T, up = x w3^T and hidden = silu(gate) up in one pass: columns 0-63 of the tile are w1's, 64-127 w3's.
template <class T>
__global__ void __launch_bounds__(THREADS, 1)
    grouped_swiglu(const T *x, const int *rows, const T *w1, const T *w3, const int *offsets, T *gate, T *up, T *hidden, int experts,
                   int slots, int inner, int outer) {
    const RowTile tile = row_tile(offsets, experts, slots, blockIdx.x, TILE);
    const int first = blockIdx.y * (TILE / 2), warp_column = threadIdx.x / WARP % 4 * (WARP_COLUMNS / 2);
    const size_t expert = (size_t)min(tile.expert, experts - 1) * inner * outer;
    const int used = tile.expert < experts ? inner : 0;
    auto from_x = [&](int along, int deep) -> const T * {
        const int slot = tile.begin + along;
        return slot < tile.end && deep < inner ? x + (size_t)(rows ? rows[slot] : slot) * inner + deep : nullptr;
    };
    auto from_w = [&](int along, int deep) -> const T * {
        const int at = first + along % (TILE / 2);
        return at < outer && deep < inner ? (along < TILE / 2 ? w1 : w3) + expert + (size_t)at * inner + deep : nullptr;
    };
    auto column = [&](int j) { return j / 2 * (TILE / 2) + warp_column + j % 2 * 8; };  // of gate, gate, up, up
    Sums sums = {};
    multiply_all<true, true>(used, x, from_x, from_w, column, sums);
    const int lane = threadIdx.x % WARP, first_row = threadIdx.x / WARP / 4 * WARP_ROWS;
    for (int i = 0; i < MMA_ROWS; i++)
        for (int j = 0; j < 2; j++)
            for (int half = 0; half < 2; half++) {
                const int slot = tile.begin + first_row + i * 16 + half * 8 + lane / 4, at = first + column(j) + lane % 4 * 2;
                if (slot >= tile.end || at >= outer) continue;
                const float *g = &sums[i][j][2 * half], *u = &sums[i][j + 2][2 * half];
                float h[2];
                for (int k = 0; k < 2; k++) h[k] = g[k] / (1.0f + expf(-g[k])) * u[k];
                const size_t to = (size_t)slot * outer + at;
                store_pair(gate + to, g[0], g[1]);
                store_pair(up + to, u[0], u[1]);
                store_pair(hidden + to, h[0], h[1]);
            }
}

template <class T>
__global__ void __launch_bounds__(THREADS, 1)
    grouped_gemm_dw(const T *dy, const T *x, const int *rows, const int *offsets, T *dw, int outer, int inner) {
    const int e = blockIdx.z, begin = offsets[e], count = offsets[e + 1] - begin;
    const int first_row = blockIdx.y * TILE, first_column = blockIdx.x * TILE, warp_column = threadIdx.x / WARP % 4 * WARP_COLUMNS;
    auto from_dy = [&](int along, int deep) -> const T * {
        return deep < count && first_row + along < outer ? dy + (size_t)(begin + deep) * outer + first_row + along : nullptr;
    };
    auto from_x = [&](int along, int deep) -> const T * {
        if (deep >= count || first_column + along >= inner) return nullptr;
        return x + (size_t)(rows ? rows[begin + deep] : begin + deep) * inner + first_column + along;
    };
    auto column = [&](int j) { return warp_column + j * 8; };
    Sums sums = {};
    multiply_all<false, false>(count, x, from_dy, from_x, column, sums);
    dw += (size_t)e * outer * inner;
    for_each_pair(sums, column, [&](int row, int at, float left, float right) {
        if (first_row + row < outer && first_column + at < inner)
            store_pair(dw + (size_t)(first_row + row) * inner + first_column + at, left, right);
    });
}
