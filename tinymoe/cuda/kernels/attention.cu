// Attention: o[t] = sum over s of softmax_s(q[t] . k[s] / sqrt(K)) v[s], over the keys s that query t sees: itself and what
// came before, of a window's length at most. Query head h reads the key/value head h / (H / G).
//
// All kernels are one picture (FlashAttention-2, Dao 2023, arXiv 2307.08691). A block owns a tile of 32 rows, 8 rows a warp,
// and streams tiles of 32 other rows through shared memory, one row a lane. Two products make up all the work:
//   dots:        (8, K) own rows times (K, 32) streamed rows: each lane has the 8 dots of its streamed row;
//   accumulate:  (8, 32) weights times (32, K) streamed rows: each lane sums the columns lane, lane + 32, ... in registers.
// Between them the weights go through shared memory, from a lane per streamed row to a lane per column. Tiles that no row of
// the block sees are skipped. No (T, S) array exists: memory is O(T).
//
// Forward: own queries, streamed keys and values. An online softmax keeps each row's highest score and rescales what was
// summed when it grows. It leaves log_sum = highest + log(sum of exp(score - highest)), 4 bytes a row, to the backward.
//
// Backward, with p = exp(score - log_sum) computed again, dp = do . v and delta = do . o = sum over s of p dp:
//   dv = sum over t of p do,  ds = p (dp - delta),  dq = sum over s of ds k / sqrt(K),  dk = sum over t of ds q / sqrt(K).
// One kernel for delta (a warp per row), one for dq (own queries, streamed keys), and one for dk and dv (own keys, streamed
// queries of all heads of the group). Scores are computed twice, and in return no sum needs an atomic: all have one order.
//
// Decode: one query per sequence. The own rows are up to 8 query heads of a group, so that they share one reading of the
// cache. A block is one warp and takes one split of the keys; a second kernel merges the splits' softmaxes in order. How many
// keys there are may lie on the device, one number a sequence: the grid is then that of full caches, of which a sequence uses
// the splits that its text has come to.
//
// FLOPs per head, with P pairs of a query and a key that it sees (T^2 / 2 when causal, T W with a window): forward 4 P K,
// backward 14 P K. Bytes: 2 T H K + 2 S G K elements once from memory, but a block reads 2 K elements of each streamed row for
// its 32 own rows, from the L2 cache mostly: P K / 16 elements per head forward, which is 16 FLOPs a byte in float32 and 32 in
// bfloat16. So these kernels are bound by float32 arithmetic, and by its 3 to 6 FMAs per load from shared memory. Decode reads
// the cache's 2 S G K elements once (per 8 heads of a group) for 4 S H K FLOPs: bound by memory. Each split, of 64 keys at
// least, writes K + 2 floats a head, and the merge reads them.
#include "prelude.h"
#include "warp.h"

constexpr int TILE = 32;        // own rows of a block, and streamed rows at a time: one a lane
constexpr int ROWS = 8;         // own rows of a warp
constexpr int PAD = 4;          // floats between rows in shared memory: the lanes' rows start in different banks
constexpr int BATCH = 8;        // loads that a thread has under way at once: that, times a block's threads, divides every tile
constexpr int LEAST_KEYS = 64;  // keys of a split, or more
constexpr int DELTA_ROWS = 4;   // rows (warps) of a block of attention_delta
// A score below all, but finite: in a row that has seen no key (those beyond the end) exp(-INFINITY - LOWEST) is 0, not NaN.
constexpr float LOWEST = -3.402823466e38f;

// HEAD is K rounded up to 32, 64, 128 or 256: it makes the columns of a lane, HEAD / 32, a constant. A row in shared memory
// has HEAD floats, those from K on 0, and PAD.
template <int HEAD>
constexpr int STRIDE = HEAD + PAD;
template <int HEAD>
using Columns = float[ROWS][HEAD / WARP];  // a lane's columns of the warp's rows

// Whether the query at `position` sees key s.
__device__ __forceinline__ bool sees(int position, int s, int window) { return s <= position && position - s < window; }

// Fills a tile with rows first, first + 1, ... of x, which lie `stride` elements apart; rows from `end` on become 0. Queries
// are scaled by 1 / sqrt(K) here, so that all kernels take a score from `dots` as it is, with the same bits: then
// exp(score - log_sum) cannot exceed 1, however large the scores.
template <int HEAD, class T>
__device__ __forceinline__ void load_tile(
    float *tile, int rows, const T *x, int first, int end, size_t stride, int K, float scale = 1.0f) {
    for (int start = threadIdx.x; start < rows * HEAD; start += BATCH * blockDim.x) {
        T batch[BATCH];
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
            const int i = start + j * blockDim.x, row = first + i / HEAD, d = i % HEAD;
            batch[j] = row < end && d < K ? x[row * stride + d] : from_float<T>(0.0f);
        }
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
            const int i = start + j * blockDim.x;
            tile[i / HEAD * STRIDE<HEAD> + i % HEAD] = to_float(batch[j]) * scale;
        }
    }
}

// dot[r] = own[r] . streamed, where `streamed` is the lane's row.
template <int HEAD>
__device__ __forceinline__ void dots(float (&dot)[ROWS], const float *own, const float *streamed, int K) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) dot[r] = 0;
    for (int d = 0; d < K; d += 4) {
        const float4 b = *reinterpret_cast<const float4 *>(streamed + d);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float4 a = *reinterpret_cast<const float4 *>(own + r * STRIDE<HEAD> + d);
            dot[r] = dot[r] + a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;  // from the left: four FMAs
        }
    }
}

// sum[r] += sum over the tile's rows i of weights[r][i] tile[i], in the lane's columns.
template <int HEAD>
__device__ __forceinline__ void accumulate(Columns<HEAD> &sum, const float *weights, const float *tile, int lane) {
    for (int i = 0; i < TILE; i += 4) {
        float x[4][HEAD / WARP];
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int c = 0; c < HEAD / WARP; c++) x[j][c] = tile[(i + j) * STRIDE<HEAD> + lane + WARP * c];
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float4 w = *reinterpret_cast<const float4 *>(weights + r * TILE + i);
#pragma unroll
            for (int c = 0; c < HEAD / WARP; c++)
                sum[r][c] = sum[r][c] + w.x * x[0][c] + w.y * x[1][c] + w.z * x[2][c] + w.w * x[3][c];
        }
    }
}

// Writes the lane's columns of row r of a sum, times a factor, to y.
template <int HEAD, class T>
__device__ __forceinline__ void store_row(T *y, const Columns<HEAD> &sum, int r, float factor, int lane, int K) {
#pragma unroll
    for (int c = 0; c < HEAD / WARP; c++)
        if (lane + WARP * c < K) y[lane + WARP * c] = from_float<T>(sum[r][c] * factor);
}

// ---- forward

// A warp's softmax over the keys so far.
template <int HEAD>
struct Softmax {
    float highest[ROWS];
    float total[ROWS];  // the lane's share of the sum of exp(score - highest)
    Columns<HEAD> out;  // the sum of exp(score - highest) v
};

template <int HEAD>
__device__ __forceinline__ void begin(Softmax<HEAD> &softmax) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        softmax.highest[r] = LOWEST, softmax.total[r] = 0;
#pragma unroll
        for (int c = 0; c < HEAD / WARP; c++) softmax.out[r][c] = 0;
    }
}

// Takes in a tile of keys and values: score[r] is of row r and the lane's key, -INFINITY if hidden.
template <int HEAD>
__device__ __forceinline__ void absorb(
    Softmax<HEAD> &softmax, const float (&score)[ROWS], float *weights, const float *v_tile, int lane) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const float before = softmax.highest[r], highest = max(before, warp_max(score[r]));
        const float rescale = expf(before - highest), weight = expf(score[r] - highest);
        softmax.highest[r] = highest;
        softmax.total[r] = softmax.total[r] * rescale + weight;
#pragma unroll
        for (int c = 0; c < HEAD / WARP; c++) softmax.out[r][c] *= rescale;
        weights[r * TILE + lane] = weight;
    }
    __syncwarp();  // every lane reads the weights of all
    accumulate<HEAD>(softmax.out, weights, v_tile, lane);
}

// A block per (tile of queries, head, sequence), those that see most keys first.
template <class T, int HEAD>
__global__ void attention_forward(
    const T *q, const T *k, const T *v, T *o, float *log_sum,
    int queries, int keys, int heads, int groups, int K, int window) {
    DYNAMIC_SHARED(float, q_tile);
    float *k_tile = q_tile + TILE * STRIDE<HEAD>, *v_tile = k_tile + TILE * STRIDE<HEAD>;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, own = warp * ROWS;
    float *weights = v_tile + TILE * STRIDE<HEAD> + own * TILE;

    const int tiles = (queries + TILE - 1) / TILE, first = (tiles - 1 - blockIdx.x % tiles) * TILE, past = keys - queries;
    const int h = blockIdx.x / tiles % heads, b = blockIdx.x / tiles / heads, g = h / (heads / groups);
    const size_t q_stride = (size_t)heads * K, k_stride = (size_t)groups * K;
    const size_t q_head = (size_t)b * queries * q_stride + h * K, k_head = (size_t)b * keys * k_stride + g * K;
    q += q_head, o += q_head, k += k_head, v += k_head, log_sum += (size_t)b * queries * heads + h;

    const float scale = 1.0f / sqrtf((float)K);
    Softmax<HEAD> softmax;
    begin(softmax);
    load_tile<HEAD>(q_tile, TILE, q, first, queries, q_stride, K, scale);
    const int begin_key = max(0, past + first - window + 1), end_key = past + min(first + TILE, queries);
    for (int s = begin_key; s < end_key; s += TILE) {
        __syncthreads();  // all warps are done with the tiles before
        load_tile<HEAD>(k_tile, TILE, k, s, end_key, k_stride, K);
        load_tile<HEAD>(v_tile, TILE, v, s, end_key, k_stride, K);
        __syncthreads();  // the tiles are there
        float score[ROWS];
        dots<HEAD>(score, q_tile + own * STRIDE<HEAD>, k_tile + lane * STRIDE<HEAD>, K);
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            if (!sees(past + first + own + r, s + lane, window)) score[r] = -INFINITY;
        absorb(softmax, score, weights, v_tile, lane);
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const int t = first + own + r;
        const float total = warp_sum(softmax.total[r]);
        if (t >= queries) continue;  // the whole warp
        store_row<HEAD>(o + t * q_stride, softmax.out, r, 1.0f / total, lane, K);
        if (lane == 0) log_sum[(size_t)t * heads] = softmax.highest[r] + logf(total);
    }
}

// ---- backward

// delta[row] = do[row] . o[row], for each row of (B, T, H).
template <class T>
__global__ void attention_delta(const T *dout, const T *o, float *delta, int64_t rows, int K) {
    const int64_t row = (int64_t)blockIdx.x * DELTA_ROWS + threadIdx.x / WARP;
    const int lane = threadIdx.x % WARP;
    if (row >= rows) return;  // the whole warp
    float sum = 0;
    for (int d = lane; d < K; d += WARP) sum += to_float(dout[row * K + d]) * to_float(o[row * K + d]);
    sum = warp_sum(sum);
    if (lane == 0) delta[row] = sum;
}

// A block per (tile of queries, head, sequence), as in the forward.
template <class T, int HEAD>
__global__ void attention_backward_queries(
    const T *q, const T *k, const T *v, const T *dout, const float *log_sum, const float *delta, T *dq,
    int queries, int keys, int heads, int groups, int K, int window) {
    DYNAMIC_SHARED(float, q_tile);
    float *do_tile = q_tile + TILE * STRIDE<HEAD>;
    float *k_tile = do_tile + TILE * STRIDE<HEAD>, *v_tile = k_tile + TILE * STRIDE<HEAD>;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, own = warp * ROWS;
    float *weights = v_tile + TILE * STRIDE<HEAD> + own * TILE;

    const int tiles = (queries + TILE - 1) / TILE, first = (tiles - 1 - blockIdx.x % tiles) * TILE, past = keys - queries;
    const int h = blockIdx.x / tiles % heads, b = blockIdx.x / tiles / heads, g = h / (heads / groups);
    const size_t q_stride = (size_t)heads * K, k_stride = (size_t)groups * K;
    const size_t q_head = (size_t)b * queries * q_stride + h * K, k_head = (size_t)b * keys * k_stride + g * K;
    q += q_head, dout += q_head, dq += q_head, k += k_head, v += k_head;
    log_sum += (size_t)b * queries * heads + h, delta += (size_t)b * queries * heads + h;

    const float scale = 1.0f / sqrtf((float)K);
    Columns<HEAD> sum = {};
    float log_sums[ROWS], deltas[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const int t = first + own + r;
        log_sums[r] = t < queries ? log_sum[(size_t)t * heads] : INFINITY;  // beyond the end every p is 0
        deltas[r] = t < queries ? delta[(size_t)t * heads] : 0.0f;
    }
    load_tile<HEAD>(q_tile, TILE, q, first, queries, q_stride, K, scale);
    load_tile<HEAD>(do_tile, TILE, dout, first, queries, q_stride, K);
    const int begin_key = max(0, past + first - window + 1), end_key = past + min(first + TILE, queries);
    for (int s = begin_key; s < end_key; s += TILE) {
        __syncthreads();  // all warps are done with the tiles before
        load_tile<HEAD>(k_tile, TILE, k, s, end_key, k_stride, K);
        load_tile<HEAD>(v_tile, TILE, v, s, end_key, k_stride, K);
        __syncthreads();  // the tiles are there
        float score[ROWS], dp[ROWS];
        dots<HEAD>(score, q_tile + own * STRIDE<HEAD>, k_tile + lane * STRIDE<HEAD>, K);
        dots<HEAD>(dp, do_tile + own * STRIDE<HEAD>, v_tile + lane * STRIDE<HEAD>, K);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const bool seen = sees(past + first + own + r, s + lane, window);
            const float p = seen ? expf(score[r] - log_sums[r]) : 0.0f;
            weights[r * TILE + lane] = p * (dp[r] - deltas[r]);
        }
        __syncwarp();  // every lane reads the weights of all
        accumulate<HEAD>(sum, weights, k_tile, lane);
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++)
        if (first + own + r < queries) store_row<HEAD>(dq + (first + own + r) * q_stride, sum, r, scale, lane, K);
}

// A block per (tile of keys, key/value head, sequence); those that most queries see come first by themselves.
template <class T, int HEAD>
__global__ void attention_backward_keys(
    const T *q, const T *k, const T *v, const T *dout, const float *log_sum, const float *delta, T *dk, T *dv,
    int queries, int keys, int heads, int groups, int K, int window) {
    DYNAMIC_SHARED(float, k_tile);
    float *v_tile = k_tile + TILE * STRIDE<HEAD>;
    float *q_tile = v_tile + TILE * STRIDE<HEAD>, *do_tile = q_tile + TILE * STRIDE<HEAD>;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, own = warp * ROWS;
    float *p_weights = do_tile + TILE * STRIDE<HEAD> + own * TILE, *ds_weights = p_weights + TILE * TILE;

    const int tiles = (keys + TILE - 1) / TILE, first = blockIdx.x % tiles * TILE, past = keys - queries;
    const int g = blockIdx.x / tiles % groups, b = blockIdx.x / tiles / groups, repeats = heads / groups;
    const size_t q_stride = (size_t)heads * K, k_stride = (size_t)groups * K;
    const size_t first_query = (size_t)b * queries, k_head = (size_t)b * keys * k_stride + g * K;
    k += k_head, v += k_head, dk += k_head, dv += k_head, q += first_query * q_stride, dout += first_query * q_stride;
    log_sum += first_query * heads, delta += first_query * heads;

    Columns<HEAD> dk_sum = {}, dv_sum = {};
    load_tile<HEAD>(k_tile, TILE, k, first, keys, k_stride, K);
    load_tile<HEAD>(v_tile, TILE, v, first, keys, k_stride, K);
    const float scale = 1.0f / sqrtf((float)K);
    const int last = min(first + TILE, keys) - 1;  // key
    const int begin_query = max(0, first - past), end_query = min(queries, last + window - past);
    for (int h = g * repeats; h < (g + 1) * repeats; h++) {
        for (int t = begin_query; t < end_query; t += TILE) {
            __syncthreads();  // all warps are done with the tiles before
            load_tile<HEAD>(q_tile, TILE, q + h * K, t, end_query, q_stride, K, scale);
            load_tile<HEAD>(do_tile, TILE, dout + h * K, t, end_query, q_stride, K);
            __syncthreads();  // the tiles are there
            const int mine = t + lane;  // the lane's query
            const float mine_log_sum = mine < end_query ? log_sum[(size_t)mine * heads + h] : INFINITY;  // beyond: p is 0
            const float mine_delta = mine < end_query ? delta[(size_t)mine * heads + h] : 0.0f;
            float score[ROWS], dp[ROWS];
            dots<HEAD>(score, k_tile + own * STRIDE<HEAD>, q_tile + lane * STRIDE<HEAD>, K);
            dots<HEAD>(dp, v_tile + own * STRIDE<HEAD>, do_tile + lane * STRIDE<HEAD>, K);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const bool seen = sees(past + mine, first + own + r, window);
                const float p = seen ? expf(score[r] - mine_log_sum) : 0.0f;
                p_weights[r * TILE + lane] = p;
                ds_weights[r * TILE + lane] = p * (dp[r] - mine_delta);
            }
            __syncwarp();  // every lane reads the weights of all
            accumulate<HEAD>(dv_sum, p_weights, do_tile, lane);
            accumulate<HEAD>(dk_sum, ds_weights, q_tile, lane);
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const int s = first + own + r;
        if (s >= keys) continue;
        store_row<HEAD>(dk + s * k_stride, dk_sum, r, 1.0f, lane, K);  // the queries were scaled
        store_row<HEAD>(dv + s * k_stride, dv_sum, r, 1.0f, lane, K);
    }
}

// ---- decode

// How many keys the query of sequence b sees: all, or what its positions have filled of a cache.
__device__ __forceinline__ int keys_seen(const int *positions, const int *slots, int b, int keys) {
    return positions ? min(positions[b] + 1, slots[b]) : keys;
}

// How many of them make a split: LEAST_KEYS, or more where there would be more splits than `splits`.
__device__ __forceinline__ int keys_of_split(int seen, int splits) {
    return max(LEAST_KEYS, (seen + TILE * splits - 1) / (TILE * splits) * TILE);
}

// A block, of one warp, per (split of the keys, up to 8 heads of a group, group, sequence): the softmax over the split, as
// highest and total (B, H, splits) and out (B, H, splits, K).
template <class T, int HEAD>
__global__ void attention_decode_split(
    const T *q, const T *k, const T *v, const int *positions, const int *slots, float *highest, float *total, float *out,
    int keys, int heads, int groups, int K, int splits) {
    DYNAMIC_SHARED(float, q_tile);
    float *k_tile = q_tile + ROWS * STRIDE<HEAD>, *v_tile = k_tile + TILE * STRIDE<HEAD>;
    float *weights = v_tile + TILE * STRIDE<HEAD>;
    const int lane = threadIdx.x, repeats = heads / groups, octets = (repeats + ROWS - 1) / ROWS;
    const int split = blockIdx.x % splits, octet = blockIdx.x / splits % octets;
    const int g = blockIdx.x / splits / octets % groups, b = blockIdx.x / splits / octets / groups;
    const int seen = keys_seen(positions, slots, b, keys), split_keys = keys_of_split(seen, splits);
    const int begin_key = split * split_keys, end_key = min(begin_key + split_keys, seen);
    if (begin_key >= seen) return;  // the text has not come so far
    const int first = g * repeats + octet * ROWS, end = min(first + ROWS, (g + 1) * repeats);  // heads
    const size_t k_stride = (size_t)groups * K, k_head = (size_t)b * keys * k_stride + g * K;
    k += k_head, v += k_head;

    const float scale = 1.0f / sqrtf((float)K);
    Softmax<HEAD> softmax;
    begin(softmax);
    load_tile<HEAD>(q_tile, ROWS, q + (size_t)b * heads * K, first, end, K, K, scale);
    for (int s = begin_key; s < end_key; s += TILE) {
        // Nobody reads the tiles before any more: absorb's barrier came after k_tile's reads, and of v_tile a lane writes and
        // reads the same columns.
        load_tile<HEAD>(k_tile, TILE, k, s, end_key, k_stride, K);
        load_tile<HEAD>(v_tile, TILE, v, s, end_key, k_stride, K);
        __syncwarp();  // the tiles are there
        float score[ROWS];
        dots<HEAD>(score, q_tile, k_tile + lane * STRIDE<HEAD>, K);
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            if (s + lane >= end_key) score[r] = -INFINITY;
        absorb(softmax, score, weights, v_tile, lane);
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const float sum = warp_sum(softmax.total[r]);
        if (first + r >= end) continue;  // the whole warp
        const size_t row = ((size_t)b * heads + first + r) * splits + split;
        store_row<HEAD>(out + row * K, softmax.out, r, 1.0f, lane, K);
        if (lane == 0) highest[row] = softmax.highest[r], total[row] = sum;
    }
}

// A block per row of (B, H), a thread per column: o = sum of out exp(highest - the highest of all) over that sum of total, of
// the splits that the text has come to.
template <class T>
__global__ void attention_decode_merge(
    const float *highest, const float *total, const float *out, const int *positions, const int *slots, T *o,
    int keys, int heads, int K, int splits) {
    const size_t row = blockIdx.x;
    const int seen = keys_seen(positions, slots, blockIdx.x / heads, keys), split_keys = keys_of_split(seen, splits);
    const int used = (seen + split_keys - 1) / split_keys;
    highest += row * splits, total += row * splits, out += row * splits * K, o += row * K;
    float most = LOWEST;
    for (int split = 0; split < used; split++) most = max(most, highest[split]);
    for (int d = threadIdx.x; d < K; d += blockDim.x) {
        float sum = 0, all = 0;
        for (int split = 0; split < used; split++) {
            const float rescale = expf(highest[split] - most);
            sum += out[(size_t)split * K + d] * rescale;
            all += total[split] * rescale;
        }
        o[d] = from_float<T>(sum / all);
    }
}
