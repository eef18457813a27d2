// Rung 1: a thread per output.
//
// The grouped GEMM is one product per expert, of the rows that the router sent there and the expert's weights:
//   grouped_gemm     y[s] = x[rows[s]] W[e]^T  (or x[rows[s]] W[e])      for the slots s of expert e
//   grouped_gemm_dw  dW[e] = sum over the slots s of e of dy[s]^T x[rows[s]]
//
// Idea: none yet. Grid: a block of 32 columns x 8 rows of y per (row tile, column tile); each thread walks the inner
// dimension alone. Per multiply-add it loads two operands: 2 FLOPs for 8 bytes of float32, all of it from the caches or
// worse, so a memory of 4.8 TB/s, an H200's by its datasheet, would feed 1.2 TFLOP/s but for the caches.
// Neighbouring threads read neighbouring rows of W, `inner` elements apart: 32 cache lines for one warp's load.
#include "prelude.h"
#include "ragged.h"

constexpr int ROWS = 8, COLUMNS = 32;  // of a block

// W[e] is (outer, inner) with TRANSPOSED, as in the forward, else (inner, outer), as for the gradient of x.
template <class T, bool TRANSPOSED>
__global__ void grouped_gemm(const T *x, const int *rows, const T *w, const int *offsets, T *y, int experts, int slots,
                             int inner, int outer) {
    const RowTile tile = row_tile(offsets, experts, slots, blockIdx.x, ROWS);
    const int slot = tile.begin + threadIdx.y, column = blockIdx.y * COLUMNS + threadIdx.x;
    if (slot >= tile.end || column >= outer) return;
    float sum = 0;
    if (tile.expert < experts) {
        const T *from = x + (size_t)(rows ? rows[slot] : slot) * inner;
        w += (size_t)tile.expert * inner * outer;
        for (int i = 0; i < inner; i++)
            sum += to_float(from[i]) * to_float(TRANSPOSED ? w[(size_t)column * inner + i] : w[(size_t)i * outer + column]);
    }
    y[(size_t)slot * outer + column] = from_float<T>(sum);
}

template <class T>
__global__ void grouped_gemm_dw(const T *dy, const T *x, const int *rows, const int *offsets, T *dw, int outer, int inner) {
    const int e = blockIdx.z, column = blockIdx.x * COLUMNS + threadIdx.x, row = blockIdx.y * ROWS + threadIdx.y;
    if (row >= outer || column >= inner) return;
    float sum = 0;  // and stays so for an expert without rows
    for (int slot = offsets[e]; slot < offsets[e + 1]; slot++)
        sum += to_float(dy[(size_t)slot * outer + row]) * to_float(x[(size_t)(rows ? rows[slot] : slot) * inner + column]);
    dw[((size_t)e * outer + row) * inner + column] = from_float<T>(sum);
}
