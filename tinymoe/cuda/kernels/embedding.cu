// Embedding: y[n] = weight[tokens[n]]; dweight[v] = sum over the n with tokens[n] = v of dy[n].
//
// Forward: a block per token copies its row. Bytes: 2 N D loads and stores of the rows; no FLOPs; bound by memory.
//
// Backward: to add dy[n] to its row of dweight as it comes would take atomics on floats, whose order, and so whose bits,
// change from run to run. Instead the tokens are first grouped by id, in the order of the text, with integers only: a
// stable counting sort, in slices of SLICE tokens that are sorted at the same time.
//   count     a block per slice: counts[slice, v] = how often v occurs in the slice (integer atomics: any order, one sum);
//   slices    a thread per v: counts[slice, v] becomes how often v occurs in the slices before; total[v] in all;
//   starts    one block: start[v] = sum of total[u] over u < v, where v's group begins; start[V] = N;
//   place     a block per slice, a thread per token: order[start[v] + counts[slice, v] + occurrences before in the slice] = n;
//   rows      a block per v: its threads share the columns, and each sums its column over order[start[v] .. start[v + 1]).
// A token that does not occur has an empty group, and its sum is exactly zero.
// Bytes: (N + V) D loads of dy and stores of dweight, and 12 of each of the V N / SLICE counts: 1.5 KB a token where
// V = 32000, beside the 8 KB of its row of dy in Mixtral's bfloat16. FLOPs: N D; bound by memory.
#include "prelude.h"

constexpr int THREADS = 256;        // of a block that shares the columns of a row
constexpr int SLICE = 256;          // tokens (threads) of a block that counts or places
constexpr int COLUMNS = 128;        // threads of a block of `slices`
constexpr int SCAN_THREADS = 1024;  // of the one block of `starts`

template <class T>
__global__ void embedding_forward(const int *tokens, const T *weight, T *y, int D) {
    weight += (size_t)tokens[blockIdx.x] * D, y += (size_t)blockIdx.x * D;
    for (int d = threadIdx.x; d < D; d += THREADS) y[d] = weight[d];
}

__global__ void embedding_count(const int *tokens, int *counts, int N, int V) {
    const int n = blockIdx.x * SLICE + threadIdx.x;
    if (n < N) atomicAdd(&counts[(size_t)blockIdx.x * V + tokens[n]], 1);
}

__global__ void embedding_slices(int *counts, int *total, int slices, int V) {
    const int v = blockIdx.x * COLUMNS + threadIdx.x;
    if (v >= V) return;
    int before = 0;
    for (int slice = 0; slice < slices; slice++) {
        int &count = counts[(size_t)slice * V + v];
        const int here = count;
        count = before;
        before += here;
    }
    total[v] = before;
}

// Each thread owns a stretch of v: it sums the stretch, the block scans the sums, and it goes through the stretch again.
__global__ void embedding_starts(const int *total, int *start, int V) {
    __shared__ int sums[2][SCAN_THREADS];
    const int t = threadIdx.x, stretch = (V + SCAN_THREADS - 1) / SCAN_THREADS;
    const int first = min(t * stretch, V), last = min(first + stretch, V);
    int sum = 0;
    for (int v = first; v < last; v++) sum += total[v];
    // After the round of `by`, a thread's entry sums those of 2 by threads up to itself (Hillis and Steele 1986).
    int from = 0;
    sums[from][t] = sum;
    for (int by = 1; by < SCAN_THREADS; by *= 2, from = 1 - from) {
        __syncthreads();  // the last round's sums are there, and its other half has been read
        sums[1 - from][t] = sums[from][t] + (t >= by ? sums[from][t - by] : 0);
    }
    int before = sums[from][t] - sum;
    for (int v = first; v < last; v++) {
        start[v] = before;
        before += total[v];
    }
    if (t == SCAN_THREADS - 1) start[V] = before;
}

__global__ void embedding_place(const int *tokens, const int *counts, const int *start, int *order, int N, int V) {
    __shared__ int slice[SLICE];
    const int t = threadIdx.x, n = blockIdx.x * SLICE + t;
    if (n < N) slice[t] = tokens[n];
    __syncthreads();  // the slice is there for all to read
    if (n >= N) return;
    const int v = slice[t];
    int before = 0;
    for (int i = 0; i < t; i++) before += slice[i] == v;
    order[start[v] + counts[(size_t)blockIdx.x * V + v] + before] = n;
}

template <class T>
__global__ void embedding_rows(const T *dy, const int *order, const int *start, T *dweight, int D) {
    const int v = blockIdx.x, first = start[v], last = start[v + 1];
    for (int d = threadIdx.x; d < D; d += THREADS) {
        float sum = 0;
        for (int i = first; i < last; i++) sum += to_float(dy[(size_t)order[i] * D + d]);
        dweight[(size_t)v * D + d] = from_float<T>(sum);
    }
}
