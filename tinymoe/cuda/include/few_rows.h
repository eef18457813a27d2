// The product of a block's 32 rows of weights and a few rows of x. It does nothing but read weights, each once, so what counts
// is that loads never stop and that nothing else takes as long. Weights pass by 16 bytes of a lane at a time and past the L1
// cache, and up to MOST rows of x are multiplied by them; a kernel that has more lets them pass again. There are two ways.
//
// TensorCores, for bfloat16. 16 rows of weights are the operand a, 8 rows of x are b. A sum over k may be taken in any order,
// so the four lanes that hold a row may deal its k to themselves as they like, if x is dealt alike: each loads 8 neighbours
// and puts the first four into one product and the last four into the next. What is loaded is an operand, without shared
// memory and without ldmatrix. The warps of a block share out k, and add up in their order. A lane has 8 loads under way
// and a multiprocessor 16 warps, 64 KB: 4.3 TB/s over 132 of them, for 700 ns, are 23 KB.
// x comes as it lies: a block needs each element once, of count rows for 32 rows of weights, so shared memory would save
// nothing.
//
// Lanes, for float32, and for rows that are not made of whole steps. A warp owns rows, and its lanes share out k.
#pragma once
#include "pack.h"
#include "tensor_core.h"
#include "warp.h"

constexpr int TILE = 16, ROWS = 2 * TILE;  // rows of weights: of the operand a; of a block
constexpr int MOST_WARPS = 16;             // that a multiprocessor has room for, of at most 128 registers a thread

// Ways to compute products[r * ROWS + i] = row i of w times row r of x for r < count <= MOST, by a block of WARPS warps.
// w(i) and x(r) are where the rows begin. The products are there for all after a barrier.
template <int WIDTH>
struct Lanes {
    static constexpr int MOST = 12;

    template <int WARPS, class W, class X>
    static __device__ __forceinline__ void multiply(W w, X x, int count, int inner, float *products) {
        constexpr int OWNED = ROWS / WARPS;
        const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
        float sums[OWNED][MOST] = {};
#pragma unroll 2
        for (int at = lane * WIDTH; at < inner; at += WARP * WIDTH) {
            decltype(load_pack<WIDTH>(w(0))) of_w[OWNED];
#pragma unroll
            for (int i = 0; i < OWNED; i++) of_w[i] = load_once<WIDTH>(w(i * WARPS + warp) + at);
#pragma unroll
            for (int r = 0; r < MOST; r++) {
                if (r == count) break;
                const auto of_x = load_pack<WIDTH>(x(r) + at);
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
                const float product = warp_sum(sums[i][r]);
                if (lane == 0) products[r * ROWS + i * WARPS + warp] = product;
            }
        }
    }
};

struct TensorCores {
    static constexpr int MOST = 16;
    static constexpr int COLUMNS = 8;           // rows of x in a product
    static constexpr int PART = 32, STEP = 64;  // elements of a row: that four lanes load at once; of a warp's step

    static __device__ __forceinline__ Pack<uint32_t, 4> load_weights(const bfloat16 *from) {
        return load_once<4>(reinterpret_cast<const uint32_t *>(from));
    }

    template <int WARPS, class W, class X>
    static __device__ __forceinline__ void multiply(W w, X x, int count, int inner, float *products) {
        __shared__ float shares[WARPS][COLUMNS][ROWS];  // of each warp in the sums
        const int warp = threadIdx.x / WARP, g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
        float sums[MOST / COLUMNS][2][4] = {};
        for (int step = warp * STEP; step < inner; step += WARPS * STEP) {
            Pack<uint32_t, 4> of_w[STEP / PART][2][2];  // rows g and g + 8 of two tiles
#pragma unroll
            for (int i = 0; i < 8; i++)
                of_w[i % 2][i / 4][i / 2 % 2] = load_weights(w(i / 2 * 8 + g) + step + i % 2 * PART + 8 * t);
#pragma unroll
            for (int n = 0; n < MOST / COLUMNS; n++) {
                if (n * COLUMNS >= count) break;
                const bfloat16 *row = x(min(n * COLUMNS + g, count - 1)) + step + 8 * t;  // beyond the last, it again
#pragma unroll
                for (int part = 0; part < STEP / PART; part++) {
                    const auto of_x = load_pack<4>(reinterpret_cast<const uint32_t *>(row + part * PART));
#pragma unroll
                    for (int word = 0; word < 4; word += 2)
#pragma unroll
                        for (int tile = 0; tile < 2; tile++) {
                            const auto &[upper, lower] = of_w[part][tile];
                            const uint32_t a[4] = {upper.values[word], lower.values[word], upper.values[word + 1],
                                                   lower.values[word + 1]};
                            mma_16x8x16(sums[n][tile], a, of_x.values[word], of_x.values[word + 1]);
                        }
                }
            }
        }
#pragma unroll
        for (int n = 0; n < MOST / COLUMNS; n++) {
            if (n * COLUMNS >= count) break;
#pragma unroll
            for (int i = 0; i < 8; i++) shares[warp][2 * t + i % 2][i / 2 * 8 + g] = sums[n][i / 4][i % 4];
            __syncthreads();  // every warp's share is there
            for (int i = threadIdx.x; i < COLUMNS * ROWS; i += WARPS * WARP) {
                float sum = 0;
                for (int of = 0; of < WARPS; of++) sum += shares[of][i / ROWS][i % ROWS];
                if (n * COLUMNS + i / ROWS < count) products[n * COLUMNS * ROWS + i] = sum;
            }
            __syncthreads();  // read before the next are written
        }
    }
};
