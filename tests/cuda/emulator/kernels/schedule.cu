// Kernels that show in what order threads run, and kernels that go wrong.
#include "prelude.h"

__global__ void tickets(int *out, int *counter) { out[blockIdx.x * blockDim.x + threadIdx.x] = atomicAdd(counter, 1); }

__global__ void interleaved(int *out, int *counter) {  // two tickets for each thread, with other accesses between
    const int t = threadIdx.x;
    out[2 * t] = atomicAdd(counter, 1);
    out[2 * t + 1] = atomicAdd(counter, 1);
}

__global__ void endless(int *out) {
    while (true) out[threadIdx.x]++;
}

__global__ void endless_without_memory(int *) {
    while (true) __syncwarp();
}

__global__ void add(const int *x, int *out, int by) { out[threadIdx.x] = x[threadIdx.x] + by; }
