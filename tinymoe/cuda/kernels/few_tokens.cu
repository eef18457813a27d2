// The experts of a few tokens. With a row or two for an expert a product does nothing but read weights, each once, so what
// counts is that loads never stop; tensor cores would wait as long.
//
// few_up    hidden[s] = silu(x w1^T) (x w3^T) for the slots s of every expert. A warp owns 2 rows of w1 and the same 2 of w3.
// few_down  y[n] = sum over the choices of weight * (hidden w2^T): a warp owns 2 rows of w2 of all experts, one after the
//           other, hence 2 columns of y: the combine is a sum of what it has, in the order of the choices.
//
// The lanes of a warp share out a row, 16 bytes each at a time, past the L1 cache; the rows of x, read again by every warp,
// are in it. Up to MOST rows of an expert are multiplied while its weights pass by; more take another pass.
// Bytes: 3 D F elements for every expert that has work, and nothing beside. FLOPs: 6 D F for a slot.
#include "pack.h"
#include "warp.h"

constexpr int WARPS = 8, THREADS = WARPS * WARP;
constexpr int OWNED = 2;  // rows of a matrix that a warp multiplies by
constexpr int MOST = 16;  // rows of x at a time

// sums[i][r] = this lane's part of the product of row i of w and row r of x: w(i) and x(r) are where they begin.
template <int WIDTH, int ROWS, class W, class X>
__device__ __forceinline__ void multiply(W w, X x, int count, int inner, float (&sums)[ROWS][MOST]) {
    for (int i = 0; i < ROWS; i++)
        for (int r = 0; r < MOST; r++) sums[i][r] = 0;
#pragma unroll 2
    for (int at = threadIdx.x % WARP * WIDTH; at < inner; at += WARP * WIDTH) {
        decltype(load_pack<WIDTH>(w(0))) of_w[ROWS];
#pragma unroll
        for (int i = 0; i < ROWS; i++) of_w[i] = load_once<WIDTH>(w(i) + at);
#pragma unroll
        for (int r = 0; r < MOST; r++) {
            if (r == count) break;
            const auto of_x = load_pack<WIDTH>(x(r) + at);
#pragma unroll
            for (int i = 0; i < ROWS; i++)
#pragma unroll
                for (int j = 0; j < WIDTH; j++) sums[i][r] += to_float(of_w[i].values[j]) * to_float(of_x.values[j]);
        }
    }
}

// x (N, inner), tokens (S,); w1, w3 (E, outer, inner); hidden (S, outer), of which slots that nobody owns stay as they are.
template <class T, int WIDTH>
__global__ void __launch_bounds__(THREADS)
    few_up(const T *x, const int *tokens, const T *w1, const T *w3, const int *offsets, T *hidden, int inner, int outer) {
    const int e = blockIdx.y, lane = threadIdx.x % WARP, column = (blockIdx.x * WARPS + threadIdx.x / WARP) * OWNED;
    if (column >= outer) return;
    const auto w = [&](int i) {  // of the last, which may own one row only, it again
        return (i < OWNED ? w1 : w3) + ((size_t)e * outer + min(column + i % OWNED, outer - 1)) * inner;
    };
    for (int first = offsets[e], end = offsets[e + 1]; first < end; first += MOST) {
        const int count = min(MOST, end - first);
        const auto row = [&](int r) { return x + (size_t)tokens[first + r] * inner; };
        float sums[2 * OWNED][MOST];
        multiply<WIDTH>(w, row, count, inner, sums);
#pragma unroll
        for (int r = 0; r < MOST; r++) {
            if (r == count) break;
#pragma unroll
            for (int i = 0; i < OWNED; i++) {
                const float gate = warp_sum(sums[i][r]), up = warp_sum(sums[OWNED + i][r]);
                if (lane == 0 && column + i < outer)
                    hidden[(size_t)(first + r) * outer + column + i] = from_float<T>(gate / (1 + expf(-gate)) * up);
            }
        }
    }
}

// hidden (S, inner); w2 (E, outer, inner); weights and slots (N, k), a slot -1 adding nothing; y (N, outer).
template <class T, int WIDTH>
__global__ void __launch_bounds__(THREADS)
    few_down(const T *hidden, const T *w2, const float *weights, const int *slots, const int *offsets, T *y, int N, int k, int E,
             int inner, int outer) {
    DYNAMIC_SHARED(float, products);  // (WARPS, OWNED, N k): of this warp's rows of w2 with each slot
    const int lane = threadIdx.x % WARP, column = (blockIdx.x * WARPS + threadIdx.x / WARP) * OWNED;
    if (column >= outer) return;
    products += threadIdx.x / WARP * OWNED * N * k;
    for (int e = 0; e < E; e++)
        for (int first = offsets[e], end = offsets[e + 1]; first < end; first += MOST) {
            const int count = min(MOST, end - first);
            const auto w = [&](int i) { return w2 + ((size_t)e * outer + min(column + i, outer - 1)) * inner; };
            const auto row = [&](int r) { return hidden + (size_t)(first + r) * inner; };
            float sums[OWNED][MOST];
            multiply<WIDTH>(w, row, count, inner, sums);
#pragma unroll
            for (int r = 0; r < MOST; r++) {
                if (r == count) break;
#pragma unroll
                for (int i = 0; i < OWNED; i++) {
                    const float product = warp_sum(sums[i][r]);
                    if (lane == 0) products[i * N * k + first + r] = product;
                }
            }
        }
    __syncwarp();  // lane 0's products are for all
    for (int j = lane; j < N * OWNED; j += WARP) {
        const int n = j / OWNED, i = j % OWNED;
        float sum = 0;
        for (int choice = n * k; choice < (n + 1) * k; choice++)
            if (slots[choice] >= 0) sum += weights[choice] * products[i * N * k + slots[choice]];
        if (column + i < outer) y[(size_t)n * outer + column + i] = from_float<T>(sum);
    }
}
