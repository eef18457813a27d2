// A kernel to stop in.
#include "prelude.h"

__global__ void turned_around(const int *x, int *out) {  // each block's part of x
    __shared__ int values[64];
    const int t = threadIdx.x, first = blockIdx.x * blockDim.x;
    values[t] = x[first + t];
    __syncthreads();
    out[first + t] = values[63 - t];
}
