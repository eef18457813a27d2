// RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight, row by row.
//
// Forward: a warp per row. Each lane sums every 32nd element, a shuffle tree adds the lanes, and the row is read a second
// time (from the cache) to scale it. Bytes: 2 N D loads and stores of x and y; FLOPs: 4 N D; bound by memory.
//
// Backward, with x_hat = x / rms and g = dy * weight:
//   dx = (g - x_hat * mean(g x_hat)) / rms        a warp per row, as the forward;
//   dweight = sum over rows of dy * x_hat         a thread per column and slice of rows, then the slices in order.
#include "prelude.h"
#include "warp.h"

constexpr int ROWS = 4;       // rows (warps) of a block
constexpr int COLUMNS = 128;  // threads of a block of the column sums

template <class T>
__global__ void rmsnorm_forward(const T *x, const T *weight, T *y, float *inverse_rms, float eps, int rows, int D) {
    const int row = blockIdx.x * ROWS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (row >= rows) return;  // the whole warp
    x += (size_t)row * D, y += (size_t)row * D;
    float squares = 0;
    for (int d = lane; d < D; d += WARP) squares += to_float(x[d]) * to_float(x[d]);
    const float inverse = 1.0f / sqrtf(warp_sum(squares) / D + eps);
    for (int d = lane; d < D; d += WARP) y[d] = from_float<T>(to_float(x[d]) * inverse * to_float(weight[d]));
    if (lane == 0) inverse_rms[row] = inverse;
}

template <class T>
__global__ void rmsnorm_backward_rows(const T *dy, const T *x, const float *inverse_rms, const T *weight, T *dx, int rows, int D) {
    const int row = blockIdx.x * ROWS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (row >= rows) return;
    dy += (size_t)row * D, x += (size_t)row * D, dx += (size_t)row * D;
    const float inverse = inverse_rms[row];
    float along = 0;  // the part of g along x_hat
    for (int d = lane; d < D; d += WARP) along += to_float(dy[d]) * to_float(weight[d]) * to_float(x[d]) * inverse;
    along = warp_sum(along) / D;
    for (int d = lane; d < D; d += WARP) {
        const float g = to_float(dy[d]) * to_float(weight[d]);
        dx[d] = from_float<T>((g - to_float(x[d]) * inverse * along) * inverse);
    }
}

// partial[slice, d] = sum over the slice's rows of dy * x_hat.
template <class T>
__global__ void rmsnorm_backward_columns(const T *dy, const T *x, const float *inverse_rms, float *partial, int rows, int D, int slice_rows) {
    const int d = blockIdx.x * COLUMNS + threadIdx.x, first = blockIdx.y * slice_rows;
    if (d >= D) return;
    float sum = 0;
    for (int row = first; row < min(first + slice_rows, rows); row++)
        sum += to_float(dy[(size_t)row * D + d]) * to_float(x[(size_t)row * D + d]) * inverse_rms[row];
    partial[(size_t)blockIdx.y * D + d] = sum;
}

template <class T>
__global__ void rmsnorm_backward_sum(const float *partial, T *dweight, int slices, int D) {
    const int d = blockIdx.x * COLUMNS + threadIdx.x;
    if (d >= D) return;
    float sum = 0;
    for (int slice = 0; slice < slices; slice++) sum += partial[(size_t)slice * D + d];
    dweight[d] = from_float<T>(sum);
}
