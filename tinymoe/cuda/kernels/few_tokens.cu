// The experts of a few tokens. With a few rows for an expert a product does nothing but read weights, each once, so what
// counts is that loads never stop and that nothing else takes as long.
//
// few_up    hidden[s] = silu(x w1^T) (x w3^T) for the slots s of every expert. A block owns 16 rows of w1 and the same 16 of
//           w3 of an expert; along y the grid is as high as experts can have work, and the blocks of y find the y-th that has.
// few_down  y[n] = sum over the choices of weight * (hidden w2^T): a block owns 32 rows of w2 of all experts, one after the
//           other, hence 32 columns of y: the combine is a sum of what it has, in the order of the choices.
//
// Either way a block has 32 rows of weights, which pass by it once, 16 bytes of a lane at a time and past the L1 cache, and
// up to MOST rows of x are multiplied by them; more take another pass. There are two ways to multiply.
//
// TensorCores, for bfloat16. 16 rows of weights are the operand a, 8 rows of x are b. A sum over k may be taken in any order,
// so the four lanes that hold a row may deal its k to themselves as they like, if x is dealt alike: each loads 8 neighbours
// and puts the first four into one product and the last four into the next. What is loaded is an operand, without shared
// memory and without ldmatrix. The warps of a block share out k, and add up in their order. A lane has 8 loads under way
// and a multiprocessor 16 warps, 64 KB: 4.3 TB/s over 132 of them, for 700 ns, are 23 KB.
// x comes as it lies: a block needs each element once, of count rows for 32 rows of weights, so shared memory would save
// nothing. What the L1 cache holds, about 16 rows of x, the next block of few_up finds there; hidden comes from L2.
//
// Lanes, for float32, and for rows that are not made of whole steps. A warp owns rows, and its lanes share out k.
//
// Bytes: 3 D F elements for every expert that has work, and from L2 a 32nd of that for each row. FLOPs: 6 D F for a slot.
#include "pack.h"
#include "tensor_core.h"
#include "warp.h"

constexpr int TILE = 16, ROWS = 2 * TILE;     // rows of weights: of the operand a; of a block
constexpr int UP_WARPS = 8, DOWN_WARPS = 16;  // of a block. A multiprocessor has room for 16 of at most 128 registers

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
    static constexpr int MOST = 32;
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

// x (N, inner), tokens (S,); w1, w3 (E, outer, inner); hidden (S, outer), of which slots that nobody owns stay as they are.
template <class T, class By>
__global__ void __launch_bounds__(UP_WARPS * WARP, DOWN_WARPS / UP_WARPS)
    few_up(const T *x, const int *tokens, const T *w1, const T *w3, const int *offsets, T *hidden, int E, int inner,
           int outer) {
    __shared__ float products[By::MOST * ROWS];
    const int column = blockIdx.x * TILE, mine = blockIdx.y;
    int e = -1, busy = 0;  // the expert that has work, as `mine` before it have; how many there are
    for (int i = 0; i < E; i++)
        if (offsets[i] < offsets[i + 1] && busy++ == mine) e = i;
    if (e < 0) return;
    const auto w = [&](int i) {  // beyond the last row, it again
        return (i < TILE ? w1 : w3) + ((size_t)e * outer + min(column + i % TILE, outer - 1)) * inner;
    };
    for (int first = offsets[e], end = offsets[e + 1]; first < end; first += By::MOST) {
        const int count = min(By::MOST, end - first);
        const auto row = [&](int r) { return x + (size_t)tokens[first + r] * inner; };
        By::template multiply<UP_WARPS>(w, row, count, inner, products);
        __syncthreads();  // all products are there
        for (int j = threadIdx.x; j < count * TILE; j += UP_WARPS * WARP) {
            const int r = j / TILE, i = j % TILE;
            const float gate = products[r * ROWS + i], up = products[r * ROWS + TILE + i];
            if (column + i < outer)
                hidden[(size_t)(first + r) * outer + column + i] = from_float<T>(gate / (1 + expf(-gate)) * up);
        }
        __syncthreads();  // read before the next pass writes
    }
}

// hidden (S, inner); w2 (E, outer, inner); weights and slots (N, k), a slot -1 adding nothing; y (N, outer).
template <class T, class By>
__global__ void __launch_bounds__(DOWN_WARPS * WARP, 1)
    few_down(const T *hidden, const T *w2, const float *weights, const int *slots, const int *offsets, T *y, int N, int k, int E,
             int inner, int outer) {
    DYNAMIC_SHARED(float, products);  // (N k, ROWS): of each slot
    const int column = blockIdx.x * ROWS;
    for (int e = 0; e < E; e++)
        for (int first = offsets[e], end = offsets[e + 1]; first < end; first += By::MOST) {
            const auto w = [&](int i) { return w2 + ((size_t)e * outer + min(column + i, outer - 1)) * inner; };
            const auto row = [&](int r) { return hidden + (size_t)(first + r) * inner; };
            By::template multiply<DOWN_WARPS>(w, row, min(By::MOST, end - first), inner, products + first * ROWS);
        }
    __syncthreads();  // all products are there
    for (int j = threadIdx.x; j < N * ROWS; j += DOWN_WARPS * WARP) {
        const int n = j / ROWS, i = j % ROWS;
        float sum = 0;
        for (int choice = n * k; choice < (n + 1) * k; choice++)
            if (slots[choice] >= 0) sum += weights[choice] * products[slots[choice] * ROWS + i];
        if (column + i < outer) y[(size_t)n * outer + column + i] = from_float<T>(sum);
    }
}
