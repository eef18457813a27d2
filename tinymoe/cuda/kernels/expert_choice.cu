// Experts choose tokens: p = softmax(x w_gate^T), expert e takes the `capacity` tokens with the largest p[:, e], ties to the
// earliest, and weighs each by its p.
//
// Probabilities: a warp per token, which holds its logits (gate.h). Bytes: N D elements of x; FLOPs: 2 N E D.
//
// The choice: a block per expert, and no sort. A float that is not negative orders as its bits do. Put ~n below them, and
// each token has a key of 64 bits that no other has: larger for a larger p, and for an earlier token where p is the same. A
// radix select finds the smallest key that is taken, 8 bits at a time from the top: count the next digit of the keys that
// begin as it does; the digit at which the count from above reaches what is still to be taken is its own. Counts are whole
// numbers, so the answer is exact and the same in any order. It ends as soon as all with that digit are taken: after the
// 4 digits of p at most, unless there are ties.
// Bytes: each expert reads its N floats of p up to 5 times, and up to 9 times where there are ties. They lie E floats apart,
// so from 8 experts on each read costs a sector of 32 bytes: up to 160 N E, from the L2 cache. FLOPs: none. E blocks leave
// most of a large card idle, and keys that share a digit queue at its count.
//
// Backward: the gradient of the logits is dlogits + p (dp - sum p dp), with dp = dweights where chosen and 0 elsewhere, a
// warp per token; dx and dw_gate come of it as the router's do.
#include "gate.h"

constexpr int ROWS = 4;        // tokens (warps) of a block
constexpr int THREADS = 1024;  // of a block that chooses
constexpr int BITS = 8, VALUES = 1 << BITS, EACH = VALUES / WARP;

template <class T, int HELD, int WIDTH>
__global__ void token_probabilities(const T *x, const T *w_gate, float *probs, float *logits, int *not_finite, int rows, int D,
                                    int E) {
    const int row = blockIdx.x * ROWS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (row >= rows) return;  // the whole warp
    float held[HELD] = {};
    row_times<WIDTH>(x + (size_t)row * D, w_gate, held, D, E, lane);
    store_logits(held, logits + (size_t)row * E, not_finite, E, lane);
    softmax(held, E, lane);
#pragma unroll
    for (int i = 0; i < HELD; i++)
        if (WARP * i + lane < E) probs[(size_t)row * E + WARP * i + lane] = held[i];
}

__device__ __forceinline__ uint64_t key_of(float p, int n) { return (uint64_t)__float_as_int(p) << 32 | ~(unsigned)n; }

struct Digit {
    int value;
    int taken, count;  // of the tokens with it
};

// Set the digit at which the count from the largest value down reaches `needed`, by a warp whose lanes have EACH values.
__device__ __forceinline__ void find_digit(const int *counts, int needed, Digit *digit, int lane) {
    int own = 0;
    for (int value = lane * EACH; value < (lane + 1) * EACH; value++) own += counts[value];
    int from_here = own;  // the count of this lane's values and all that are larger
    for (int by = 1; by < WARP; by *= 2) {
        const int more = __shfl_down_sync(ALL_LANES, from_here, by);
        if (lane + by < WARP) from_here += more;
    }
    int above = from_here - own;
    for (int value = (lane + 1) * EACH - 1; value >= lane * EACH; value--) {
        const int count = counts[value];
        if (above < needed && needed <= above + count) *digit = {value, needed - above, count};  // one lane, once
        above += count;
    }
}

// weights and experts (N, E): p and e where expert e takes the token, 0 and -1 elsewhere.
__global__ void choose_tokens(const float *probs, float *weights, int *experts, int N, int E, int capacity) {
    __shared__ int counts[VALUES];
    __shared__ Digit digit;
    const int e = blockIdx.x;
    uint64_t smallest = 0, known = 0;  // the smallest key that is taken, as far as known: a mask of its digits
    int needed = capacity;             // so many are taken of the keys that begin so
    for (int shift = 64 - BITS; shift >= 0 && needed > 0; shift -= BITS) {
        if (threadIdx.x < VALUES) counts[threadIdx.x] = 0;
        __syncthreads();  // zeros before counts
        for (int n = threadIdx.x; n < N; n += THREADS) {
            const uint64_t key = key_of(probs[(size_t)n * E + e], n);
            if (((key ^ smallest) & known) == 0) atomicAdd(&counts[key >> shift & (VALUES - 1)], 1);
        }
        __syncthreads();  // all have counted
        if (threadIdx.x < WARP) find_digit(counts, needed, &digit, threadIdx.x);
        __syncthreads();  // the digit is there, and nobody reads the counts any more
        smallest |= (uint64_t)digit.value << shift;
        known |= (uint64_t)(VALUES - 1) << shift;
        needed = digit.taken < digit.count ? digit.taken : 0;
    }
    for (int n = threadIdx.x; n < N; n += THREADS) {
        const size_t i = (size_t)n * E + e;
        const bool taken = capacity > 0 && key_of(probs[i], n) >= smallest;
        weights[i] = taken ? probs[i] : 0;
        experts[i] = taken ? e : -1;
    }
}

// total = dlogits (NULL: zeros) + what comes through the weights.
__global__ void choice_backward_logits(const float *dweights, const float *dlogits, const float *probs, const int *experts,
                                       float *total, int rows, int E) {
    const int row = blockIdx.x * ROWS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (row >= rows) return;
    const size_t first = (size_t)row * E;
    float along = 0;
    for (int e = lane; e < E; e += WARP) along += experts[first + e] >= 0 ? probs[first + e] * dweights[first + e] : 0;
    along = warp_sum(along);
    for (int e = lane; e < E; e += WARP) {
        const float dp = experts[first + e] >= 0 ? dweights[first + e] : 0;
        total[first + e] = (dlogits ? dlogits[first + e] : 0) + probs[first + e] * (dp - along);
    }
}
