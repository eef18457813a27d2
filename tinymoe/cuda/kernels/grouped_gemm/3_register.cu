// Rung 3: tiles in registers. As rung 2, but a thread owns 8 x 8 outputs and keeps them in registers.
//
// Idea: with one output per thread, every multiply-add takes two operands from shared memory. A thread that owns 8 x 8 of
// them takes 8 + 8 operands for 64 multiply-adds, an eighth of the traffic.
// Grid: a block of 128 x 128 outputs, 256 threads, 8 deep. Memory sees (128 + 128) operands for 128 * 128 multiply-adds:
// 32 FLOPs per byte of float32; shared memory 2 FLOPs per byte. Rows of a thread are 16 apart, columns too, so that
// neighbouring threads read neighbouring words of shared memory and write neighbouring words of y.
// Loads take 4 elements along the contiguous dimension (16 bytes of float32) where the matrix allows it.
#include "pack.h"
#include "prelude.h"
#include "ragged.h"

constexpr int TILE = 128, DEPTH = 8, EACH = 8, SIDE = TILE / EACH, THREADS = SIDE * SIDE;
constexpr int VECTOR = 4;  // elements of a load; TILE * DEPTH / VECTOR loads are one for each thread

// Load up to 4 neighbours: those below `count` (which may be 0 or less), zeros beyond.
template <class T>
__device__ __forceinline__ void load(const T *p, int count, bool aligned, float (&to)[VECTOR]) {
    const bool whole = aligned && count >= VECTOR;
    Pack<T, VECTOR> four;
    if (whole) four = load_pack<VECTOR>(p);
    for (int j = 0; j < VECTOR; j++) to[j] = whole ? to_float(four.values[j]) : j < count ? to_float(p[j]) : 0;
}

struct Tiles {
    float a[DEPTH][TILE], b[DEPTH][TILE];  // (inner, row), (inner, column)
};

// sums += a^T b, this thread's 8 x 8 of it.
__device__ __forceinline__ void multiply(const Tiles &tiles, float (&sums)[EACH][EACH]) {
    const int ty = threadIdx.x / SIDE, tx = threadIdx.x % SIDE;
    for (int i = 0; i < DEPTH; i++) {
        float a[EACH], b[EACH];
#pragma unroll
        for (int j = 0; j < EACH; j++) a[j] = tiles.a[i][ty + SIDE * j], b[j] = tiles.b[i][tx + SIDE * j];
#pragma unroll
        for (int r = 0; r < EACH; r++)
#pragma unroll
            for (int c = 0; c < EACH; c++) sums[r][c] += a[r] * b[c];
    }
}

template <class T, bool TRANSPOSED>
__global__ void __launch_bounds__(THREADS)
    grouped_gemm(const T *x, const int *rows, const T *w, const int *offsets, T *y, int experts, int slots, int inner, int outer) {
    __shared__ Tiles tiles;
    const RowTile tile = row_tile(offsets, experts, slots, blockIdx.x, TILE);
    const int t = threadIdx.x, first = blockIdx.y * TILE;
    const int deep = t % (DEPTH / VECTOR) * VECTOR, along = t / (DEPTH / VECTOR);  // of a load 4 deep
    const int across = t % (TILE / VECTOR) * VECTOR, down = t / (TILE / VECTOR);   // of a load 4 across
    const int slot = tile.begin + along;
    const int row = slot < tile.end ? (rows ? rows[slot] : slot) : -1;
    w += (size_t)min(tile.expert, experts - 1) * inner * outer;
    const int used = tile.expert < experts ? inner : 0;  // rows that no expert owns become zeros
    float sums[EACH][EACH] = {};
    for (int i = 0; i < used; i += DEPTH) {
        float loaded[VECTOR];
        load(x + (int64_t)row * inner + i + deep, row >= 0 ? inner - i - deep : 0, inner % VECTOR == 0, loaded);
        for (int j = 0; j < VECTOR; j++) tiles.a[deep + j][along] = loaded[j];
        if (TRANSPOSED) {
            const int column = min(first + along, outer - 1);  // beyond the last, its sums again, which nobody stores
            load(w + (size_t)column * inner + i + deep, inner - i - deep, inner % VECTOR == 0, loaded);
            for (int j = 0; j < VECTOR; j++) tiles.b[deep + j][along] = loaded[j];
        } else {
            const int column = first + across;
            load(w + (size_t)min(i + down, inner - 1) * outer + column, i + down < inner ? outer - column : 0, outer % VECTOR == 0, loaded);
            for (int j = 0; j < VECTOR; j++) tiles.b[down][across + j] = loaded[j];
        }
        __syncthreads();  // both tiles are complete
        multiply(tiles, sums);
        __syncthreads();  // nobody reads them any more
    }
    for (int r = 0; r < EACH; r++)
        for (int c = 0; c < EACH; c++) {
            const int to = tile.begin + t / SIDE + SIDE * r, column = first + t % SIDE + SIDE * c;
            if (to < tile.end && column < outer) y[(size_t)to * outer + column] = from_float<T>(sums[r][c]);
        }
}

template <class T>
__global__ void __launch_bounds__(THREADS)
    grouped_gemm_dw(const T *dy, const T *x, const int *rows, const int *offsets, T *dw, int outer, int inner) {
    __shared__ Tiles tiles;  // here the inner dimension are the expert's slots
    const int t = threadIdx.x, e = blockIdx.z, end = offsets[e + 1];
    const int across = t % (TILE / VECTOR) * VECTOR, down = t / (TILE / VECTOR);
    const int row = blockIdx.y * TILE + across, column = blockIdx.x * TILE + across;
    float sums[EACH][EACH] = {};
    for (int i = offsets[e]; i < end; i += DEPTH) {
        const int slot = i + down, from = slot < end ? (rows ? rows[slot] : slot) : -1;
        float loaded[VECTOR];
        load(dy + (size_t)min(slot, end - 1) * outer + row, slot < end ? outer - row : 0, outer % VECTOR == 0, loaded);
        for (int j = 0; j < VECTOR; j++) tiles.a[down][across + j] = loaded[j];
        load(x + (int64_t)from * inner + column, from >= 0 ? inner - column : 0, inner % VECTOR == 0, loaded);
        for (int j = 0; j < VECTOR; j++) tiles.b[down][across + j] = loaded[j];
        __syncthreads();  // both tiles are complete
        multiply(tiles, sums);
        __syncthreads();  // nobody reads them any more
    }
    dw += (size_t)e * outer * inner;
    for (int r = 0; r < EACH; r++)
        for (int c = 0; c < EACH; c++) {
            const int to = blockIdx.y * TILE + t / SIDE + SIDE * r, at = blockIdx.x * TILE + t % SIDE + SIDE * c;
            if (to < outer && at < inner) dw[(size_t)to * inner + at] = from_float<T>(sums[r][c]);
        }
}
