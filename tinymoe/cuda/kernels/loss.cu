// Cross-entropy: loss = mean over the rows that count of log(sum_v exp(x[v])) - x[target], x a row of the logits.
//
// Forward: a block per row reads the row once. Each thread keeps the largest of the logits that it has met and the sum
// of exp(x - largest), rescaled whenever a larger one comes (an online softmax, Milakov and Gimelshein 2018); the threads'
// pairs are merged by a tree. The pair is what the backward keeps of a row: largest + log(total) is its log-sum-exp, and
// in two numbers it loses nothing to cancellation where the logits are large. One block more takes the mean.
// Bytes: N V loads of the logits; FLOPs: 3 N V and as many exponentials; bound by memory.
//
// Backward: dx[v] = (exp(x[v] - largest) / total - [v = target]) * dloss / counted, and zero in a row that does not count;
// a block per row. Bytes: 2 N V loads and stores; FLOPs: 3 N V; bound by memory.
#include "prelude.h"
#include "warp.h"

constexpr int THREADS = 256;   // of every block
constexpr int IGNORED = -100;  // a target with this value does not count

struct Softmax {
    float largest, total;  // of a set of logits: total = sum of exp(x - largest); {x, 1} is the set of x
};

// The total of s relative to another `largest`. Both may be -inf, and exp(-inf + inf) would be NaN; a NaN logit stays NaN.
__device__ __forceinline__ float rescaled(Softmax s, float largest) {
    return s.largest == largest ? s.total : s.total * expf(s.largest - largest);
}

__device__ __forceinline__ Softmax merged(Softmax a, Softmax b) {
    const float largest = max(a.largest, b.largest);
    return {largest, rescaled(a, largest) + rescaled(b, largest)};
}

template <class T>
__global__ void cross_entropy_rows(const T *logits, const int *targets, float *largest, float *total, float *losses, int V) {
    __shared__ Softmax of_warps[THREADS / WARP];
    const int row = blockIdx.x, t = threadIdx.x, target = targets[row];
    logits += (size_t)row * V;
    Softmax mine = {-INFINITY, 0};
    for (int v = t; v < V; v += THREADS) mine = merged(mine, {to_float(logits[v]), 1});
    for (int bits = WARP / 2; bits; bits /= 2)
        mine = merged(mine, {__shfl_xor_sync(ALL_LANES, mine.largest, bits), __shfl_xor_sync(ALL_LANES, mine.total, bits)});
    if (t % WARP == 0) of_warps[t / WARP] = mine;
    __syncthreads();  // every warp's pair is there
    if (t > 0) return;
    for (int warp = 1; warp < THREADS / WARP; warp++) mine = merged(mine, of_warps[warp]);
    largest[row] = mine.largest;
    total[row] = mine.total;
    losses[row] = target == IGNORED ? 0 : logf(mine.total) - (to_float(logits[target]) - mine.largest);
}

// The sum over the block, to thread 0, by a tree through shared memory.
template <class A>
__device__ __forceinline__ A block_sum(A mine, A *sums) {
    const int t = threadIdx.x;
    sums[t] = mine;
    for (int half = THREADS / 2; half; half /= 2) {
        __syncthreads();  // the sums of the round before are there
        if (t < half) sums[t] += sums[t + half];
    }
    return sums[t];
}

__global__ void cross_entropy_mean(const float *losses, const int *targets, float *loss, int *counted, int rows) {
    __shared__ float loss_sums[THREADS];
    __shared__ int count_sums[THREADS];
    float sum = 0;
    int count = 0;
    for (int row = threadIdx.x; row < rows; row += THREADS) {
        sum += losses[row];
        count += targets[row] != IGNORED;
    }
    sum = block_sum(sum, loss_sums);
    count = block_sum(count, count_sums);
    if (threadIdx.x > 0) return;
    *loss = sum / max(count, 1);
    *counted = count;
}

template <class T>
__global__ void cross_entropy_backward(const T *logits, const float *largest, const float *total, const int *targets,
                                       const int *counted, T *dlogits, float dloss, int V) {
    const int row = blockIdx.x, target = targets[row];
    logits += (size_t)row * V, dlogits += (size_t)row * V;
    const bool counts = target != IGNORED;
    const float scale = dloss / max(*counted, 1), shift = largest[row], share = 1 / total[row];
    for (int v = threadIdx.x; v < V; v += THREADS)
        dlogits[v] = from_float<T>(counts ? (expf(to_float(logits[v]) - shift) * share - (v == target)) * scale : 0);
}
