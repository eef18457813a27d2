// The second probe of docs/math/kernel_fragments.md: what each thread of a warpgroup holds after one wgmma. For sm_90a.
//
// One warpgroup writes a (64, 16) and b (64, 16) into shared memory with the 128-byte swizzle, as the copy engine would,
// and multiplies them: d (128, 32) are the threads' accumulators of a b^T, 64 x 64, as they are.
#include "hopper.h"

__global__ void __launch_bounds__(WARPGROUP) accumulators(const bfloat16 *a, const bfloat16 *b, float *d) {
    DYNAMIC_SHARED(unsigned char, tiles);
    unsigned char *a_tile = tiles, *b_tile = tiles + 64 * SWIZZLED_ROW;
    const auto place = [](unsigned char *tile, int row, int k) {
        return reinterpret_cast<bfloat16 *>(tile + row * SWIZZLED_ROW + ((k / 8 ^ row % 8) * 16 + k % 8 * 2));
    };
    const int t = threadIdx.x;
    for (int i = t; i < 64 * 16; i += WARPGROUP) {
        *place(a_tile, i / 16, i % 16) = a[i];
        *place(b_tile, i / 16, i % 16) = b[i];
    }
    fence_async_proxy();  // the tensor cores see what was written in the ordinary way
    __syncthreads();      // by all threads
    float sums[32];
    wgmma_fence();
    wgmma<false, false>(sums, shared_matrix(a_tile), shared_matrix(b_tile), false);
    wgmma_commit();
    wgmma_wait<0>();
    for (int e = 0; e < 32; e++) d[t * 32 + e] = sums[e];
}
