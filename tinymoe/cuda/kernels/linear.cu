// The linear map of a few rows, as when a text is written: y = x w^T. Such a product does nothing but read w, so what counts
// is that loads never stop. (Many rows are cuBLAS's, which CuPy does not record in a graph.)
//
// A warp owns OWNED rows of w, hence as many columns of y; a block has WARPS of them, so few that a w of a thousand rows still
// makes a block for nearly every multiprocessor. The lanes share out a row, 16 bytes each at a time, past the L1 cache; the
// rows of x, read again by every warp, are in it. Up to MOST of them are multiplied while w passes by; more take another pass.
// Bytes: D_in D_out elements of w once for every MOST rows, beside N (D_in + D_out) of x and y. FLOPs: 2 N D_in D_out.
#include "pack.h"
#include "warp.h"

constexpr int WARPS = 4, THREADS = WARPS * WARP;
constexpr int OWNED = 2;  // rows of w that a warp multiplies by
constexpr int MOST = 16;  // rows of x at a time

// x (N, inner), w (outer, inner), y (N, outer).
template <class T, int WIDTH>
__global__ void __launch_bounds__(THREADS) linear_few(const T *x, const T *w, T *y, int N, int inner, int outer) {
    const int lane = threadIdx.x % WARP, column = (blockIdx.x * WARPS + threadIdx.x / WARP) * OWNED;
    if (column >= outer) return;  // the whole warp
    for (int first = 0; first < N; first += MOST) {
        const int count = min(MOST, N - first);
        float sums[OWNED][MOST] = {};
#pragma unroll 2
        for (int at = lane * WIDTH; at < inner; at += WARP * WIDTH) {
            Pack<T, WIDTH> of_w[OWNED];
#pragma unroll
            for (int i = 0; i < OWNED; i++)  // the last warp may own one row only: it twice
                of_w[i] = load_once<WIDTH>(w + (size_t)min(column + i, outer - 1) * inner + at);
#pragma unroll
            for (int r = 0; r < MOST; r++) {
                if (r == count) break;
                const Pack<T, WIDTH> of_x = load_pack<WIDTH>(x + (size_t)(first + r) * inner + at);
#pragma unroll
                for (int i = 0; i < OWNED; i++)
#pragma unroll
                    for (int j = 0; j < WIDTH; j++) sums[i][r] += to_float(of_w[i].values[j]) * to_float(of_x.values[j]);
            }
        }
#pragma unroll
        for (int r = 0; r < MOST; r++) {
            if (r == count) break;
#pragma unroll
            for (int i = 0; i < OWNED; i++) {
                const float sum = warp_sum(sums[i][r]);
                if (lane == 0 && column + i < outer) y[(size_t)(first + r) * outer + column + i] = from_float<T>(sum);
            }
        }
    }
}
