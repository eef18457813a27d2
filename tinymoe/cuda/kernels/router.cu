// The router: logits = x w_gate^T + noise, p = softmax(logits), experts = the k largest of p + bias, weights = p[experts] /
// sum p[experts]. Plain top-k has neither noise nor bias; the bias selects, and is in no weight.
//
// Forward: a warp per token, which holds the logits (gate.h). Softmax and the k largest are trees of shuffles over what the
// lanes hold: nothing but the results goes to memory. The weights are a softmax over the chosen logits, the same numbers,
// since p of what only the bias chooses may be too small for a float.
// Bytes: the N D elements of x, while w_gate stays in the cache; FLOPs: 2 N E D.
//
// Backward: the gradient of the logits is dlogits + weights (dweights - sum weights dweights) for the chosen experts, a
// warp per token; dx = that times w_gate, a thread per token and WIDTH columns; dw_gate = that transposed times x, a
// thread per TILE experts, WIDTH columns and slice of rows, then the slices in order. FLOPs: 4 N E D.
#include "gate.h"

constexpr int ROWS = 4;       // tokens (warps) of a block
constexpr int COLUMNS = 128;  // threads of a block of the column sums

struct Choice {
    float score;
    int expert;
};

__device__ __forceinline__ Choice better(Choice a, Choice b) {
    return a.score > b.score || (a.score == b.score && a.expert < b.expert) ? a : b;
}

// The largest score that is not taken, ties to the lowest expert; all lanes get it. Bit i of taken is for scores[i], the
// score of expert 32 i + lane. No score may be NaN.
template <int HELD>
__device__ __forceinline__ Choice next_choice(const float (&scores)[HELD], unsigned taken, int lane) {
    Choice best = {-INFINITY, WARP * HELD};
    for (int i = 0; i < HELD; i++)
        if (!(taken >> i & 1)) best = better(best, {scores[i], WARP * i + lane});
    for (int bits = WARP / 2; bits; bits /= 2)
        best = better(best, {__shfl_xor_sync(ALL_LANES, best.score, bits), __shfl_xor_sync(ALL_LANES, best.expert, bits)});
    return best;
}

template <class T, int HELD, int WIDTH>
__global__ void router_forward(const T *x, const T *w_gate, const float *noise, const float *bias, float *weights, int *experts,
                               float *logits, int *not_finite, int rows, int D, int E, int k) {
    const int row = blockIdx.x * ROWS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (row >= rows) return;  // the whole warp
    weights += (size_t)row * k, experts += (size_t)row * k;

    float held[HELD] = {}, scores[HELD];  // the logits; what the choice goes by
    row_times<WIDTH>(x + (size_t)row * D, w_gate, held, D, E, lane);
    unsigned taken = beyond<HELD>(E, lane);
#pragma unroll
    for (int i = 0; i < HELD; i++)
        if (noise && !(taken >> i & 1)) held[i] += noise[(size_t)row * E + WARP * i + lane];
    store_logits(held, logits + (size_t)row * E, not_finite, E, lane);
#pragma unroll
    for (int i = 0; i < HELD; i++) scores[i] = held[i];
    softmax(scores, E, lane);
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        if (bias && !(taken >> i & 1)) scores[i] += bias[WARP * i + lane];
        if (scores[i] != scores[i]) scores[i] = -INFINITY;
    }

    float largest = -INFINITY, sum = 0;
    for (int choice = 0; choice < k; choice++) {
        const int best = next_choice(scores, taken, lane).expert;
        if (lane == best % WARP) taken |= 1u << best / WARP;
        float logit = 0;
#pragma unroll
        for (int i = 0; i < HELD; i++) logit = i == best / WARP ? held[i] : logit;
        logit = __shfl_sync(ALL_LANES, logit, best % WARP);
        largest = max(largest, logit);
        if (lane == choice % WARP) {
            experts[choice] = best;
            weights[choice] = logit;
        }
    }
    for (int choice = lane; choice < k; choice += WARP) {  // each lane's own, here and below
        weights[choice] = expf(weights[choice] - largest);
        sum += weights[choice];
    }
    sum = warp_sum(sum);
    for (int choice = lane; choice < k; choice += WARP) weights[choice] /= sum;
}

// ids = the columns of the k largest scores of a row, a warp per row. NaN counts as minus infinity.
template <int HELD>
__global__ void top_k(const float *scores, int *ids, int rows, int E, int k) {
    const int row = blockIdx.x * ROWS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (row >= rows) return;
    scores += (size_t)row * E, ids += (size_t)row * k;
    unsigned taken = beyond<HELD>(E, lane);
    float held[HELD];
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        held[i] = taken >> i & 1 ? 0 : scores[WARP * i + lane];
        if (held[i] != held[i]) held[i] = -INFINITY;
    }
    for (int choice = 0; choice < k; choice++) {
        const Choice best = next_choice(held, taken, lane);
        if (lane == best.expert % WARP) taken |= 1u << best.expert / WARP;
        if (lane == 0) ids[choice] = best.expert;
    }
}

// total = dlogits (NULL: zeros) + what comes through the weights.
__global__ void router_backward_logits(const float *dweights, const float *dlogits, const float *weights, const int *experts,
                                       float *total, int rows, int E, int k) {
    const int row = blockIdx.x * ROWS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (row >= rows) return;
    weights += (size_t)row * k, dweights += (size_t)row * k, experts += (size_t)row * k, total += (size_t)row * E;
    float along = 0;
    for (int choice = lane; choice < k; choice += WARP) along += weights[choice] * dweights[choice];
    along = warp_sum(along);
    for (int e = lane; e < E; e += WARP) total[e] = dlogits ? dlogits[(size_t)row * E + e] : 0;
    __syncwarp();  // what one lane has written, another adds to
    for (int choice = lane; choice < k; choice += WARP)  // a token's experts are distinct: no update is lost
        total[experts[choice]] += weights[choice] * (dweights[choice] - along);
}

template <class T, int WIDTH>
__global__ void router_backward_x(const float *total, const T *w_gate, T *dx, int rows, int D, int E) {
    const int row = blockIdx.x * ROWS + threadIdx.y, d = (blockIdx.y * WARP + threadIdx.x) * WIDTH;
    if (row >= rows || d >= D) return;
    total += (size_t)row * E;
    float sums[WIDTH] = {};
    for (int e = 0; e < E; e++) {
        const auto of_w = load_pack<WIDTH>(w_gate + (size_t)e * D + d);
        for (int j = 0; j < WIDTH; j++) sums[j] += total[e] * to_float(of_w.values[j]);
    }
    Pack<T, WIDTH> result;
    for (int j = 0; j < WIDTH; j++) result.values[j] = from_float<T>(sums[j]);
    store_pack(dx + (size_t)row * D + d, result);
}

// partial[slice, e, d] = sum over the slice's rows of total[row, e] * x[row, d].
template <class T, int WIDTH>
__global__ void router_backward_gate(const float *total, const T *x, float *partial, int rows, int D, int E, int slice_rows) {
    const int d = (blockIdx.x * COLUMNS + threadIdx.x) * WIDTH, slice = blockIdx.y, first = blockIdx.z * TILE;
    if (d >= D) return;
    float sums[TILE][WIDTH] = {};
    for (int row = slice * slice_rows; row < min((slice + 1) * slice_rows, rows); row++) {
        const auto of_x = load_pack<WIDTH>(x + (size_t)row * D + d);
#pragma unroll
        for (int t = 0; t < TILE; t++) {
            if (first + t >= E) break;
            const float of_total = total[(size_t)row * E + first + t];
            for (int j = 0; j < WIDTH; j++) sums[t][j] += of_total * to_float(of_x.values[j]);
        }
    }
#pragma unroll
    for (int t = 0; t < TILE; t++) {
        if (first + t >= E) break;
        for (int j = 0; j < WIDTH; j++) partial[((size_t)slice * E + first + t) * D + d + j] = sums[t][j];
    }
}

// dw_gate = the slices of partial, each of so many elements, added in order.
template <class T>
__global__ void router_backward_sum(const float *partial, T *dw_gate, int slices, int elements) {
    const int i = blockIdx.x * COLUMNS + threadIdx.x;
    if (i >= elements) return;
    float sum = 0;
    for (int slice = 0; slice < slices; slice++) sum += partial[(size_t)slice * elements + i];
    dw_gate[i] = from_float<T>(sum);
}
