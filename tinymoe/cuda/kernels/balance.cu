// Balance: the experts' load, the Switch loss E/N sum_n sum_e f_e p[n, e], the z-loss 1/N sum_n (log sum_e exp l[n, e])^2.
//
// Everything about a token is its row of E numbers: a warp per row, the lanes stride over the experts. A loss is a value per
// row, then one block that adds them: each thread every 1024th in order, then a tree, so that the sum is always the same.
// The arrays are (N, E), E / D of the size of the activations; FLOPs: a few N E.
#include "warp.h"

constexpr int ROWS = 4;     // rows (warps) of a block
constexpr int COUNT = 256;  // threads of a block that counts
constexpr int SUM = 1024;   // threads of a block that sums: as many warps as a warp has lanes

// counts += how often each expert stands in ids (integers: no order changes the sum). -1 is none.
__global__ void balance_count(const int *ids, int *counts, int64_t size, int E) {
    DYNAMIC_SHARED(int, count);  // (E,)
    for (int e = threadIdx.x; e < E; e += COUNT) count[e] = 0;
    __syncthreads();  // zeros before sums
    for (int64_t i = (int64_t)blockIdx.x * COUNT + threadIdx.x; i < size; i += (int64_t)gridDim.x * COUNT)
        if (0 <= ids[i] && ids[i] < E) atomicAdd(&count[ids[i]], 1);
    __syncthreads();  // all have counted
    for (int e = threadIdx.x; e < E; e += COUNT) atomicAdd(&counts[e], count[e]);
}

// load = counts / their sum, which each of the threads of the only block sums for itself; zeros if nothing was counted.
__global__ void balance_load(const int *counts, float *load, int E) {
    int sum = 0;
    for (int e = 0; e < E; e++) sum += counts[e];
    for (int e = threadIdx.x; e < E; e += COUNT) load[e] = (float)counts[e] / (float)max(sum, 1);
}

// probs[first + row] = softmax(logits[row]); log_normaliser = the logarithm of the sum of exponentials.
__global__ void balance_softmax(const float *logits, float *probs, float *log_normaliser, int first, int rows, int E) {
    const int row = blockIdx.x * ROWS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (row >= rows) return;  // the whole warp
    logits += (size_t)row * E, probs += (size_t)(first + row) * E;
    float largest = -INFINITY, sum = 0;
    for (int e = lane; e < E; e += WARP) largest = max(largest, logits[e]);
    largest = warp_max(largest);
    for (int e = lane; e < E; e += WARP) sum += expf(logits[e] - largest);
    sum = warp_sum(sum);
    for (int e = lane; e < E; e += WARP) probs[e] = expf(logits[e] - largest) / sum;
    if (lane == 0) log_normaliser[first + row] = logf(sum) + largest;
}

__device__ __forceinline__ float expected_load(const float *load, const float *probs, int E, int lane) {
    float sum = 0;
    for (int e = lane; e < E; e += WARP) sum += load[e] * probs[e];
    return warp_sum(sum);
}

// expected[row] = sum over e of load[e] * probs[row, e].
__global__ void switch_rows(const float *probs, const float *load, float *expected, int rows, int E) {
    const int row = blockIdx.x * ROWS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (row >= rows) return;
    const float of_row = expected_load(load, probs + (size_t)row * E, E, lane);
    if (lane == 0) expected[row] = of_row;
}

// dlogits = scale * p * (load - expected load).
__global__ void switch_backward(const float *probs, const float *load, float *dlogits, float scale, int rows, int E) {
    const int row = blockIdx.x * ROWS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (row >= rows) return;
    probs += (size_t)row * E, dlogits += (size_t)row * E;
    const float expected = expected_load(load, probs, E, lane);
    for (int e = lane; e < E; e += WARP) dlogits[e] = scale * probs[e] * (load[e] - expected);
}

// dlogits = scale * log_normaliser * p, a thread per element.
__global__ void z_backward(const float *probs, const float *log_normaliser, float *dlogits, float scale, int rows, int E) {
    const int64_t i = (int64_t)blockIdx.x * COUNT + threadIdx.x;
    if (i < (int64_t)rows * E) dlogits[i] = scale * log_normaliser[i / E] * probs[i];
}

// The sum of all threads' x, in thread 0 of a block of SUM.
__device__ __forceinline__ float block_sum(float x) {
    __shared__ float of_warp[WARP];
    x = warp_sum(x);
    if (threadIdx.x % WARP == 0) of_warp[threadIdx.x / WARP] = x;
    __syncthreads();  // every warp's sum is there
    return warp_sum(of_warp[threadIdx.x % WARP]);
}

// loss = scale * the sum of the values, by the only block.
__global__ void balance_sum(const float *values, float *loss, float scale, int count) {
    float sum = 0;
    for (int i = threadIdx.x; i < count; i += SUM) sum += values[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) loss[0] = scale * sum;
}

// loss = scale * the sum of the values' squares.
__global__ void balance_sum_of_squares(const float *values, float *loss, float scale, int count) {
    float sum = 0;
    for (int i = threadIdx.x; i < count; i += SUM) sum += values[i] * values[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) loss[0] = scale * sum;
}
