// Dispatch: a stable counting sort of the (token, choice) pairs by expert, and rows carried there and back.
//
// The sort takes three launches, or for few pairs one, and never asks the host. A block owns PAIRS neighbouring pairs, a thread one of them.
//   count     each block counts its pairs of each expert: counts (E, blocks);
//   scan      one block sums all counts that stand before each: as (E, blocks) lies in memory, these are the slots where
//             each block's pairs of each expert begin, and every block's first is its expert's offset;
//   scatter   a pair's slot is where its block begins, plus the pairs of its expert in the warps before its own, plus those
//             in the lanes before its own, which ballots show. So pairs keep their order, whatever runs first.
// Bytes: 4 ints per pair (its expert read twice, its slot and its token written) and 4 E per block (counts and where they
// begin, each written and read); nothing beside the rows that follow.
//
// A capacity drops pairs by the same sort, of the transposed routing: there, first choices come first, and a pair's rank at
// its expert is its slot there less the expert's offset. A thread per pair; 10 ints per pair more.
//
// gather, combine and their backward own WIDTH columns of a row per thread, a warp 32 of these, a block ROWS rows; the
// gradient of the weights needs a whole row's product, so combine_backward has a warp per pair. All are bound by memory:
// gather moves 2 S D elements, the sum over slots S D + N D, combine_backward 3 S D (FLOPs: 3 S D).
#include "pack.h"
#include "warp.h"

constexpr int PAIRS = 256;  // of a block, a thread each
constexpr int SCAN = 1024;  // threads of the scan: as many warps as a warp has lanes
constexpr int ROWS = 4;     // rows of a block

// An expert id that names none, -1 or any other, sends its pair nowhere.
__device__ __forceinline__ bool is_expert(int e, int E) { return 0 <= e && e < E; }

__global__ void dispatch_count(const int *experts, int *counts, int pairs, int E) {
    DYNAMIC_SHARED(int, count);  // (E,)
    for (int e = threadIdx.x; e < E; e += PAIRS) count[e] = 0;
    __syncthreads();  // zeros before sums
    const int i = blockIdx.x * PAIRS + threadIdx.x;
    if (i < pairs && is_expert(experts[i], E)) atomicAdd(&count[experts[i]], 1);
    __syncthreads();  // all have counted
    for (int e = threadIdx.x; e < E; e += PAIRS) counts[(size_t)e * gridDim.x + blockIdx.x] = count[e];
}

// All of it for up to PAIRS pairs, by one block: a pair's slot is the number of those that stand before it.
__global__ void dispatch_few(const int *experts, int *tokens, int *offsets, int *slots, int pairs, int E, int k) {
    __shared__ int of[PAIRS];
    const int i = threadIdx.x;
    const bool goes = i < pairs && is_expert(experts[i], E);
    const int e = goes ? experts[i] : E;  // those that go nowhere stand behind all others
    of[i] = e;
    __syncthreads();  // every pair's expert is there
    int before = 0;
    for (int j = 0; j < pairs; j++) before += of[j] < e || (of[j] == e && j < i);
    if (i < pairs) {
        slots[i] = goes ? before : -1;
        tokens[before] = goes ? i / k : -1;
    }
    for (int expert = i; expert <= E; expert += PAIRS) {
        int lower = 0;
        for (int j = 0; j < pairs; j++) lower += of[j] < expert;
        offsets[expert] = lower;
    }
}

// The sum over this lane and those before it.
__device__ __forceinline__ int sum_up_to_lane(int x, int lane) {
    for (int by = 1; by < WARP; by *= 2) {
        const int before = __shfl_up_sync(ALL_LANES, x, by);
        if (lane >= by) x += before;
    }
    return x;
}

// starts[i] = the sum of the counts before i; offsets (E + 1) = the starts of each expert, and the sum of all.
__global__ void dispatch_scan(const int *counts, int *starts, int *offsets, int blocks, int E) {
    __shared__ int of_warp[WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int carry = 0;  // the sum of all tiles before
    for (int first = 0; first < E * blocks; first += SCAN) {
        const int i = first + threadIdx.x, count = i < E * blocks ? counts[i] : 0;
        const int up_to_me = sum_up_to_lane(count, lane);
        if (lane == WARP - 1) of_warp[warp] = up_to_me;
        __syncthreads();  // every warp's sum is there
        const int up_to_warp = sum_up_to_lane(of_warp[lane], lane);  // of the warp whose number is our lane
        const int before_warp = __shfl_sync(ALL_LANES, up_to_warp, max(warp - 1, 0)) * (warp > 0);
        const int start = carry + before_warp + up_to_me - count;
        if (i < E * blocks) {
            starts[i] = start;
            if (i % blocks == 0) offsets[i / blocks] = start;
        }
        carry += __shfl_sync(ALL_LANES, up_to_warp, WARP - 1);
        __syncthreads();  // read before the next tile writes
    }
    if (threadIdx.x == 0) offsets[E] = carry;
}

// slots[pair] and tokens[slot]; both are -1 where there is none.
__global__ void dispatch_scatter(const int *experts, const int *starts, const int *offsets, int *tokens, int *slots,
                                 int pairs, int E, int k) {
    DYNAMIC_SHARED(int, next);  // (warps, E): first each warp's count, then the slot of its first pair
    const int i = blockIdx.x * PAIRS + threadIdx.x, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    for (int j = threadIdx.x; j < PAIRS / WARP * E; j += PAIRS) next[j] = 0;

    const int e = i < pairs ? experts[i] : -1;
    const bool goes = is_expert(e, E);
    unsigned alike = __ballot_sync(ALL_LANES, goes);  // the lanes whose expert is ours: alike in every bit of its id
    for (int bit = 1; bit < E; bit *= 2) {
        const unsigned ones = __ballot_sync(ALL_LANES, goes && e & bit);
        alike &= e & bit ? ones : ~ones;
    }
    const int rank = __popc(alike & ((1u << lane) - 1));

    __syncthreads();  // zeros before counts
    if (goes && rank == 0) next[warp * E + e] = __popc(alike);
    __syncthreads();  // every warp's counts before they become slots
    for (int of = threadIdx.x; of < E; of += PAIRS) {
        int slot = starts[(size_t)of * gridDim.x + blockIdx.x];
        for (int w = 0; w < PAIRS / WARP; w++) {
            const int count = next[w * E + of];
            next[w * E + of] = slot;
            slot += count;
        }
    }
    __syncthreads();  // slots before they are read
    if (i >= pairs) return;
    slots[i] = goes ? next[warp * E + e] + rank : -1;
    if (goes) tokens[slots[i]] = i / k;
    if (i >= offsets[E]) tokens[i] = -1;  // there are as many slots as pairs: those that dropped pairs leave over
}

// to (k, N) = from (N, k) transposed.
__global__ void dispatch_transpose(const int *from, int *to, int pairs, int k) {
    const int i = blockIdx.x * PAIRS + threadIdx.x;
    if (i < pairs) to[i % k * (pairs / k) + i / k] = from[i];
}

// kept = experts, but -1 for a pair that finds its expert full; offsets and slots (k, N) are of the transposed routing.
__global__ void dispatch_drop(const int *experts, const int *offsets, const int *slots, int *kept, int pairs, int k,
                              int capacity) {
    const int i = blockIdx.x * PAIRS + threadIdx.x;
    if (i >= pairs) return;
    const int slot = slots[i % k * (pairs / k) + i / k];
    kept[i] = slot >= 0 && slot - offsets[experts[i]] < capacity ? experts[i] : -1;
}

// share = what part of the pairs has no slot, by the only thread.
__global__ void dispatch_dropped(const int *offsets, float *share, int pairs, int E) {
    share[0] = (float)(pairs - offsets[E]) / (float)pairs;
}

// rows[s] = x[tokens[s]], zeros where the token is -1.
template <class T, int WIDTH>
__global__ void gather_rows(const T *x, const int *tokens, T *rows, int count, int D) {
    const int s = blockIdx.x * ROWS + threadIdx.y, d = (blockIdx.y * WARP + threadIdx.x) * WIDTH;
    if (s >= count || d >= D) return;
    Pack<T, WIDTH> row;
    if (tokens[s] >= 0) row = load_pack<WIDTH>(x + (size_t)tokens[s] * D + d);
    else
        for (int j = 0; j < WIDTH; j++) row.values[j] = from_float<T>(0);
    store_pack(rows + (size_t)s * D + d, row);
}

// y[n] = sum over choices, in their order, of weights[n, choice] * rows[slots[n, choice]]; weights NULL: ones.
template <class T, int WIDTH>
__global__ void sum_slots(const T *rows, const float *weights, const int *slots, T *y, int N, int k, int D) {
    const int n = blockIdx.x * ROWS + threadIdx.y, d = (blockIdx.y * WARP + threadIdx.x) * WIDTH;
    if (n >= N || d >= D) return;
    float sums[WIDTH] = {};
    for (int choice = 0; choice < k; choice++) {
        const size_t pair = (size_t)n * k + choice;
        if (slots[pair] < 0) continue;
        const float weight = weights ? weights[pair] : 1;
        const auto row = load_pack<WIDTH>(rows + (size_t)slots[pair] * D + d);
        for (int j = 0; j < WIDTH; j++) sums[j] += weight * to_float(row.values[j]);
    }
    Pack<T, WIDTH> result;
    for (int j = 0; j < WIDTH; j++) result.values[j] = from_float<T>(sums[j]);
    store_pack(y + (size_t)n * D + d, result);
}

// dout[slot] = weight * dy[token] and dweights = out[slot] . dy[token] for every pair; zeros where a pair has no slot, and
// in slots that no pair has. There are at most as many slots as pairs.
template <class T, int WIDTH>
__global__ void combine_backward(const T *dy, const T *out, const float *weights, const int *tokens, const int *slots,
                                 T *dout, float *dweights, int pairs, int count, int k, int D) {
    const int pair = blockIdx.x * ROWS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (pair >= pairs) return;  // the whole warp
    if (pair < count && tokens[pair] < 0) {  // the slot of that number is left over
        for (int d = lane; d < D; d += WARP) dout[(size_t)pair * D + d] = from_float<T>(0);
    }
    float product = 0;
    if (slots[pair] >= 0) {
        const float weight = weights[pair];
        dy += (size_t)(pair / k) * D, out += (size_t)slots[pair] * D, dout += (size_t)slots[pair] * D;
        for (int d = lane * WIDTH; d < D; d += WARP * WIDTH) {
            const auto of_dy = load_pack<WIDTH>(dy + d), of_out = load_pack<WIDTH>(out + d);
            Pack<T, WIDTH> result;
            for (int j = 0; j < WIDTH; j++) {
                product += to_float(of_dy.values[j]) * to_float(of_out.values[j]);
                result.values[j] = from_float<T>(weight * to_float(of_dy.values[j]));
            }
            store_pack(dout + d, result);
        }
    }
    product = warp_sum(product);
    if (lane == 0) dweights[pair] = product;
}
