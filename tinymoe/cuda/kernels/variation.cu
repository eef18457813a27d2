// What other routings add to plain top-k: noise on the router's logits, jitter on what the router sees.
//
// Noise: noise = normal * softplus(z) with z = x w_noise^T, a warp per token, which holds z as the router's logits (gate.h).
// Its slope by z, normal * sigmoid(z), is kept for the backward: dz = dnoise * slope, and from there as for a router.
// Bytes: N D elements of x; FLOPs: 2 N E D.
//
// Jitter, and what else is element by element: a thread per element, in a stride of the whole grid, bound by memory.
#include "gate.h"

constexpr int ROWS = 4;  // tokens (warps) of a block

template <class T, int HELD, int WIDTH>
__global__ void noise_forward(const T *x, const T *w_noise, const float *normal, float *noise, float *slope, int rows, int D,
                              int E) {
    const int row = blockIdx.x * ROWS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (row >= rows) return;  // the whole warp
    float held[HELD] = {};
    row_times<WIDTH>(x + (size_t)row * D, w_noise, held, D, E, lane);
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        if (WARP * i + lane >= E) continue;
        const size_t at = (size_t)row * E + WARP * i + lane;
        const float z = held[i];
        noise[at] = normal[at] * (max(z, 0.0f) + log1pf(expf(-fabsf(z))));  // softplus, for any z
        slope[at] = normal[at] / (1 + expf(-z));  // zero where the exponential is infinite
    }
}

// y = base (NULL: zeros) + x * factor; y may be base.
template <class T>
__global__ void multiply_add(const T *base, const T *x, const float *factor, T *y, int64_t size) {
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < size; i += (int64_t)gridDim.x * blockDim.x)
        y[i] = from_float<T>((base ? to_float(base[i]) : 0) + to_float(x[i]) * factor[i]);
}
