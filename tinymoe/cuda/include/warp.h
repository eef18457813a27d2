// Sums and maxima over the 32 lanes of a warp, by a tree of shuffles; every lane gets the result.
#pragma once
#include "prelude.h"

__device__ __forceinline__ float warp_sum(float x) {
    for (int bits = WARP / 2; bits; bits /= 2) x += __shfl_xor_sync(ALL_LANES, x, bits);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
    for (int bits = WARP / 2; bits; bits /= 2) x = max(x, __shfl_xor_sync(ALL_LANES, x, bits));
    return x;
}
