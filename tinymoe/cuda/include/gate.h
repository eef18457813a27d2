// What a warp does for its token at the gate: a logit per expert, and their softmax. Lane l holds what belongs to the
// experts l, l + 32, ..., HELD of them, so that there are at most 32 HELD.
#pragma once
#include "pack.h"
#include "warp.h"

constexpr int TILE = 8;  // experts whose sums a thread keeps in registers
constexpr float LOWEST = -3.4e38f;

// The places of experts that do not exist: bit i is for the expert 32 i + lane.
template <int HELD>
__device__ __forceinline__ unsigned beyond(int E, int lane) {
    unsigned taken = 0;
    for (int i = 0; i < HELD; i++)
        if (WARP * i + lane >= E) taken |= 1u << i;
    return taken;
}

// held = x w^T for a row x (D,) and w (E, D): the lanes share out the row, multiply, and add by shuffles.
template <int WIDTH, class T, int HELD>
__device__ __forceinline__ void row_times(const T *x, const T *w, float (&held)[HELD], int D, int E, int lane) {
    for (int first = 0; first < E; first += TILE) {
        float sums[TILE] = {};
        for (int d = lane * WIDTH; d < D; d += WARP * WIDTH) {
            const auto of_x = load_pack<WIDTH>(x + d);
#pragma unroll
            for (int t = 0; t < TILE; t++) {
                if (first + t >= E) break;
                const auto of_w = load_pack<WIDTH>(w + (size_t)(first + t) * D + d);
                for (int j = 0; j < WIDTH; j++) sums[t] += to_float(of_x.values[j]) * to_float(of_w.values[j]);
            }
        }
#pragma unroll
        for (int t = 0; t < TILE; t++) {
            if (first + t >= E) break;
            const float sum = warp_sum(sums[t]);
#pragma unroll
            for (int i = 0; i < HELD; i++)  // no index that is known only at run time: held stays in registers
                if (WARP * i + lane == first + t) held[i] = sum;
        }
    }
}

// Store the logits. One that is NaN or infinite is told, and becomes a number: softmax of what is held then is one, too.
template <int HELD>
__device__ __forceinline__ void store_logits(float (&held)[HELD], float *logits, int *not_finite, int E, int lane) {
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const int e = WARP * i + lane;
        if (e >= E) continue;
        logits[e] = held[i];
        if (held[i] - held[i] != 0) {
            atomicOr(not_finite, 1);
            held[i] = LOWEST;
        }
    }
}

// held = softmax(held), zeros for experts that do not exist.
template <int HELD>
__device__ __forceinline__ void softmax(float (&held)[HELD], int E, int lane) {
    const unsigned none = beyond<HELD>(E, lane);
    float largest = LOWEST, sum = 0;
#pragma unroll
    for (int i = 0; i < HELD; i++)
        if (!(none >> i & 1)) largest = max(largest, held[i]);
    largest = warp_max(largest);
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        held[i] = none >> i & 1 ? 0 : expf(held[i] - largest);
        sum += held[i];
    }
    sum = warp_sum(sum);
#pragma unroll
    for (int i = 0; i < HELD; i++) held[i] /= sum;
}
