// The experts of a few tokens: each weight is read once, as few_rows.h says.
//
// few_up    hidden[s] = silu(x w1^T) (x w3^T) for the slots s of every expert. A block owns 16 rows of w1 and the same 16 of
//           w3 of an expert; along y the grid is as high as experts can have work, and the blocks of y find the y-th that has.
// few_down  y[n] = sum over the choices of weight * (hidden w2^T): a block owns 32 rows of w2 of all experts, one after the
//           other, hence 32 columns of y: the combine is a sum of what it has, in the order of the choices.
//
// What the L1 cache holds, about 16 rows of x, the next block of few_up finds there; hidden comes from L2.
// Bytes: 3 D F elements for every expert that has work, and from L2 a 32nd of that for each row. FLOPs: 6 D F for a slot.
#include "few_rows.h"

constexpr int UP_WARPS = MOST_WARPS / 2, DOWN_WARPS = MOST_WARPS;  // of a block

// x (N, inner), tokens (S,); w1, w3 (E, outer, inner); hidden (S, outer), of which slots that nobody owns stay as they are.
template <class T, class By>
__global__ void __launch_bounds__(UP_WARPS * WARP, MOST_WARPS / UP_WARPS)
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
