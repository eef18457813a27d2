// Rung 2: tiles in shared memory. As rung 1, but the threads of a block load together what they all need.
//
// Idea: the 32 x 32 outputs of a block need 32 rows of x and 32 columns of W. Both are staged 32 deep in shared memory, by
// 1024 threads that each load one element of both, and every element is then used 32 times.
// Grid: as before, now 32 rows high. Per output and step: 2 loads from memory serve 32 multiply-adds, so memory sees 8 bytes
// for 64 FLOPs (float32); shared memory still delivers two operands for each multiply-add, and that is the new limit.
// The loads run along the contiguous dimension of their matrix, so a warp reads whole cache lines. A row of a tile has 33
// elements: with 32, a column would lie in a single bank.
#include "prelude.h"
#include "ragged.h"

constexpr int TILE = 32;

__device__ __forceinline__ float multiply(const float (&a)[TILE][TILE + 1], const float (&b)[TILE][TILE + 1]) {
    float sum = 0;
    for (int i = 0; i < TILE; i++) sum += a[threadIdx.y][i] * b[i][threadIdx.x];
    return sum;
}

template <class T, bool TRANSPOSED>
__global__ void __launch_bounds__(TILE *TILE)
    grouped_gemm(const T *x, const int *rows, const T *w, const int *offsets, T *y, int experts, int slots, int inner, int outer) {
    __shared__ float a[TILE][TILE + 1], b[TILE][TILE + 1];  // (row, inner), (inner, column)
    const RowTile tile = row_tile(offsets, experts, slots, blockIdx.x, TILE);
    const int tx = threadIdx.x, ty = threadIdx.y;
    const int slot = tile.begin + ty, first = blockIdx.y * TILE, column = first + tx;
    const int row = slot < tile.end ? (rows ? rows[slot] : slot) : -1;
    w += (size_t)min(tile.expert, experts - 1) * inner * outer;
    const int used = tile.expert < experts ? inner : 0;  // rows that no expert owns become zeros
    float sum = 0;
    for (int i = 0; i < used; i += TILE) {
        a[ty][tx] = row >= 0 && i + tx < inner ? to_float(x[(size_t)row * inner + i + tx]) : 0;
        if (TRANSPOSED) b[tx][ty] = first + ty < outer && i + tx < inner ? to_float(w[(size_t)(first + ty) * inner + i + tx]) : 0;
        else b[ty][tx] = column < outer && i + ty < inner ? to_float(w[(size_t)(i + ty) * outer + column]) : 0;
        __syncthreads();  // both tiles are complete
        sum += multiply(a, b);
        __syncthreads();  // nobody reads them any more
    }
    if (slot < tile.end && column < outer) y[(size_t)slot * outer + column] = from_float<T>(sum);
}

template <class T>
__global__ void __launch_bounds__(TILE *TILE)
    grouped_gemm_dw(const T *dy, const T *x, const int *rows, const int *offsets, T *dw, int outer, int inner) {
    __shared__ float a[TILE][TILE + 1], b[TILE][TILE + 1];  // (outer, slot), (slot, inner)
    const int tx = threadIdx.x, ty = threadIdx.y, e = blockIdx.z, end = offsets[e + 1];
    const int first = blockIdx.y * TILE, row = first + ty, column = blockIdx.x * TILE + tx;
    float sum = 0;
    for (int slot = offsets[e] + ty; slot - ty < end; slot += TILE) {
        a[tx][ty] = slot < end && first + tx < outer ? to_float(dy[(size_t)slot * outer + first + tx]) : 0;
        b[ty][tx] = slot < end && column < inner ? to_float(x[(size_t)(rows ? rows[slot] : slot) * inner + column]) : 0;
        __syncthreads();  // both tiles are complete
        sum += multiply(a, b);
        __syncthreads();  // nobody reads them any more
    }
    if (row < outer && column < inner) dw[((size_t)e * outer + row) * inner + column] = from_float<T>(sum);
}
