// CUDA's words one by one, for a comparison with what NumPy makes of them.
#include "prelude.h"

// ---- half precision

__global__ void widen(const int *bits, float *from_half, float *from_bfloat16, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const uint16_t word = bits[i];
    from_half[i] = __half2float(*reinterpret_cast<const __half *>(&word));
    from_bfloat16[i] = to_float(*reinterpret_cast<const bfloat16 *>(&word));
}

__global__ void narrow(const float *x, int *to_half, int *to_bfloat16, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const __half half = __float2half(x[i]);
    const bfloat16 rounded = from_float<bfloat16>(x[i]);
    to_half[i] = *reinterpret_cast<const uint16_t *>(&half);
    to_bfloat16[i] = *reinterpret_cast<const uint16_t *>(&rounded);
}

// ---- warps

template <class T>
__global__ void shuffle(const T *x, const int *source, T *any, T *exclusive, T *up, T *down, int by, int width) {
    const int t = threadIdx.x;
    any[t] = __shfl_sync(ALL_LANES, x[t], source[t], width);
    exclusive[t] = __shfl_xor_sync(ALL_LANES, x[t], by, width);
    up[t] = __shfl_up_sync(ALL_LANES, x[t], by, width);
    down[t] = __shfl_down_sync(ALL_LANES, x[t], by, width);
}

// Two groups of lanes, each with a mask of its own.
__global__ void vote(const int *predicate, unsigned *ballot, int *any, int *all, unsigned first_mask) {
    const int t = threadIdx.x;
    if (first_mask >> t % 32 & 1) {
        ballot[t] = __ballot_sync(first_mask, predicate[t]);
        any[t] = __any_sync(first_mask, predicate[t]);
        all[t] = __all_sync(first_mask, predicate[t]);
    } else {
        ballot[t] = __ballot_sync(~first_mask, predicate[t]);
        any[t] = __any_sync(~first_mask, predicate[t]);
        all[t] = __all_sync(~first_mask, predicate[t]);
    }
}

// ---- atomics

__global__ void atomics(const int *x, int *cells, unsigned *bits, float *sum, int *tickets, int *exchanged) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    tickets[i] = atomicAdd(&cells[0], 1);
    atomicMax(&cells[1], x[i]);
    atomicMin(&cells[2], x[i]);
    exchanged[i] = atomicExch(&cells[3], x[i]);
    int found = atomicAdd(&cells[4], 0), expected;
    do {
        expected = found;
        found = atomicCAS(&cells[4], expected, expected ^ x[i]);
    } while (found != expected);
    atomicOr(&bits[0], 1u << (x[i] & 31));
    atomicAdd(&bits[1], (unsigned)x[i]);
    atomicAdd(sum, (float)x[i]);
}

// ---- arithmetic, vectors, positions

__global__ void arithmetic(const int *x, const float *y, const float *z, int *counts, float *results, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    counts[3 * i] = __popc(x[i]);
    counts[3 * i + 1] = __ffs(x[i]);
    counts[3 * i + 2] = __clz(x[i]);
    results[4 * i] = __int_as_float(__float_as_int(__ldg(y + i)));
    results[4 * i + 1] = rsqrtf(fabsf(y[i]));
    results[4 * i + 2] = max(y[i], z[i]);
    results[4 * i + 3] = min(y[i], z[i]);
}

__global__ void vectors(const float *x, float *reversed, float *swapped, unsigned *words) {
    const int t = threadIdx.x;
    const float4 four = reinterpret_cast<const float4 *>(x)[t];
    reinterpret_cast<float4 *>(reversed)[t] = make_float4(four.w, four.z, four.y, four.x);
    for (int i = 2 * t; i < 2 * t + 2; i++) {
        const float2 two = reinterpret_cast<const float2 *>(x)[i];
        reinterpret_cast<float2 *>(swapped)[i] = make_float2(two.y, two.x);
    }
    const uint4 bits = reinterpret_cast<const uint4 *>(x)[t];
    const uint2 low = make_uint2(bits.x, bits.y);
    reinterpret_cast<uint4 *>(words)[t] = make_uint4(low.x, low.y, bits.z, bits.w);
}

__global__ void positions(int *out) {
    const int size = blockDim.x * blockDim.y * blockDim.z;
    const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    int *mine = out + 8 * (block * size + thread);
    mine[0] = threadIdx.x, mine[1] = threadIdx.y, mine[2] = threadIdx.z;
    mine[3] = blockIdx.x, mine[4] = blockIdx.y, mine[5] = blockIdx.z;
    mine[6] = size, mine[7] = warpSize;
}
