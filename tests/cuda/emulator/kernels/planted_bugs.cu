// One bug each, and its correct twin: RIGHT = false has the bug, and a checked launch must be caught at one of the lines
// that say so ("caught"); RIGHT = true must pass in every schedule.
//
// All kernels take the same: `in` and `out` of one element per thread, side by side in one buffer, and a null pointer.
#include "prelude.h"
#include "tensor_core.h"

#define GLOBAL_INDEX (int)(blockIdx.x * blockDim.x + threadIdx.x)
#define ELEMENTS (int)(gridDim.x * blockDim.x)

// ---- bounds

template <bool RIGHT>
__global__ void read_beyond_the_end(int *out, const int *in, const int *) {
    const int i = GLOBAL_INDEX;
    if (RIGHT ? i + 1 < ELEMENTS : i + 1 <= ELEMENTS) out[i] = in[i + 1];  // caught: in[ELEMENTS] is out[0]
}

template <bool RIGHT>
__global__ void read_before_the_beginning(int *out, const int *in, const int *) {
    const int i = GLOBAL_INDEX;
    if (i > 0 || !RIGHT) out[i] = in[i - 1];  // caught
}

template <bool RIGHT>
__global__ void write_beyond_the_end(int *out, const int *, const int *) {
    const int i = GLOBAL_INDEX;
    out[RIGHT ? i : i + 1] = i;  // caught
}

template <bool RIGHT>
__global__ void beyond_static_shared(int *out, const int *in, const int *) {
    __shared__ int s[64];
    const int t = threadIdx.x;
    for (int i = t; RIGHT ? i < 64 : i <= 64; i += 64) s[i] = in[i % 64];  // caught
    __syncthreads();
    out[t] = s[63 - t];
}

template <bool RIGHT>
__global__ void beyond_dynamic_shared(int *out, const int *in, const int *) {
    DYNAMIC_SHARED(int, s);
    const int t = threadIdx.x;
    for (int i = t; RIGHT ? i < 64 : i <= 64; i += 64) s[i] = in[i % 64];  // caught
    __syncthreads();
    out[t] = s[63 - t];
}

template <bool RIGHT>
__global__ void too_little_dynamic_shared(int *out, const int *in, const int *) {
    DYNAMIC_SHARED(int, s);
    int *second = s + (RIGHT ? 0 : 64);  // a second tile, which the launch forgot
    second[threadIdx.x] = in[threadIdx.x];  // caught
    out[threadIdx.x] = second[threadIdx.x];
}

template <bool RIGHT>
__global__ void beyond_a_local_array(int *out, const int *in, const int *) {
    int sums[4] = {};
    for (int i = 0; RIGHT ? i < 4 : i <= 4; i++) sums[i] += in[(threadIdx.x + i) % 64];  // caught
    out[threadIdx.x] = sums[in[0] & 3];
}

template <bool RIGHT>
__global__ void null_array(int *out, const int *in, const int *none) {
    out[threadIdx.x] = (RIGHT ? in : none)[threadIdx.x];  // caught
}

template <bool RIGHT>
__global__ void write_to_const(int *out, const int *in, const int *) {
    (RIGHT ? out : const_cast<int *>(in))[threadIdx.x] = 1;  // caught
}

template <bool RIGHT>
__global__ void misaligned_vector(int *out, const int *in, const int *) {
    const int t = threadIdx.x;
    if (t < 16) *reinterpret_cast<uint4 *>(out + 4 * t) = *reinterpret_cast<const uint4 *>(in + 4 * t + !RIGHT);  // caught
}

// ---- races inside a block

template <bool RIGHT>
__global__ void no_barrier_before_reading(int *out, const int *in, const int *) {
    __shared__ int s[64];
    const int t = threadIdx.x;
    s[t] = 0;
    __syncthreads();
    s[t] = in[t];  // caught
    if (RIGHT) __syncthreads();
    out[t] = s[63 - t];  // caught
}

template <bool RIGHT>
__global__ void no_barrier_before_overwriting(int *out, const int *in, const int *) {
    __shared__ int s[64];
    const int t = threadIdx.x;
    s[t] = in[t];
    __syncthreads();
    const int other = s[63 - t];  // caught
    if (RIGHT) __syncthreads();
    s[t] = other;  // caught
    __syncthreads();
    out[t] = s[t];
}

template <bool RIGHT>
__global__ void no_barrier_in_a_sum(int *out, const int *in, const int *) {
    __shared__ int s[64];
    const int t = threadIdx.x;
    s[t] = in[t];
    for (int half = 32; half; half /= 2) {
        if (RIGHT || half == 32) __syncthreads();
        if (t < half) s[t] += s[t + half];  // caught
    }
    __syncthreads();
    out[t] = s[0];
}

template <bool RIGHT>
__global__ void no_syncwarp(int *out, const int *in, const int *) {
    __shared__ int s[64];
    const int t = threadIdx.x;
    s[t] = 0;
    __syncwarp();
    if (t % 32 < 16) {  // producers and consumers
        s[t] = in[t];  // caught
        if (RIGHT) __syncwarp();
        out[t] = 0;
    } else {
        if (RIGHT) __syncwarp();
        out[t] = s[t - 16];  // caught
    }
}

// The writer has met one of the readers, but not the one between.
template <bool RIGHT>
__global__ void syncwarp_where_the_block_must_meet(int *out, const int *in, const int *) {
    __shared__ int s;
    const int t = threadIdx.x;
    if (t == 0) s = in[0];
    __syncthreads();
    out[t] = s;  // caught
    if (RIGHT) __syncthreads();
    else __syncwarp();
    if (t == 0) s = 0;  // caught
}

// Lanes 0 to 3 meet, lanes 4 to 7 do, and both halves do with lane 0: what lane 0 heard, lane 5 must hear from it.
template <bool RIGHT>
__global__ void heard_from_another(int *out, const int *in, const int *) {
    __shared__ int s[32];
    const int t = threadIdx.x;
    s[t] = 0;
    __syncwarp();
    s[t] = in[t];  // caught
    if (t < 4) __syncwarp(0x0f);
    if (t == 0 || t == 5) __syncwarp(0x21);
    if (t == 5) out[0] = s[RIGHT ? 3 : 7];  // caught
}

template <bool RIGHT>
__global__ void lost_update(int *out, const int *in, const int *) {
    __shared__ int counts[4];
    const int t = threadIdx.x;
    if (t < 4) counts[t] = 0;
    __syncthreads();
    if (RIGHT) atomicAdd(&counts[in[t] & 3], 1);
    else counts[in[t] & 3]++;  // caught
    __syncthreads();
    if (t < 4) out[t] = counts[t];
}

template <bool RIGHT>
__global__ void read_beside_atomics(int *out, const int *, const int *) {
    const int t = threadIdx.x;
    atomicAdd(&out[0], 1);  // caught
    if (RIGHT) __syncthreads();
    if (t == 63) out[1] = out[0];  // caught: it adds last in the forward order, but the others have added, too
}

template <bool RIGHT>
__global__ void write_beside_atomics(int *out, const int *, const int *) {
    if (threadIdx.x == 0) out[0] = 0;  // caught
    if (RIGHT) __syncthreads();
    atomicAdd(&out[0], 1);  // caught
}

template <bool RIGHT>
__global__ void uninitialised_shared(int *out, const int *in, const int *) {
    __shared__ int s[64];
    const int t = threadIdx.x;
    if (RIGHT || t < 63) s[t] = in[t];
    __syncthreads();
    out[t] = s[63 - t];  // caught
}

// ---- races between blocks

template <bool RIGHT>
__global__ void update_from_every_block(int *out, const int *, const int *) {
    if (threadIdx.x) return;
    if (RIGHT) atomicAdd(&out[0], 1);
    else out[0]++;  // caught
}

template <bool RIGHT>
__global__ void in_place(int *out, const int *in, const int *) {  // both are the same array
    const int i = GLOBAL_INDEX;
    out[i] = in[i] + (RIGHT || i + 1 == ELEMENTS ? 1 : in[i + 1]);  // caught
}

template <bool RIGHT>
__global__ void neighbour_of_another_block(int *out, const int *in, const int *) {  // both are the same array
    const int i = GLOBAL_INDEX, mine = in[i];  // caught
    if (threadIdx.x == 0 && blockIdx.x == 0) out[i] = RIGHT ? mine : in[64];  // caught
    if (threadIdx.x == 0 && blockIdx.x == 1) out[i] = mine + 1;  // caught
}

// ---- barriers and warp instructions

template <bool RIGHT>
__global__ void barrier_in_a_branch(int *out, const int *in, const int *) {
    const int t = threadIdx.x;
    if (RIGHT || in[t] >= 32) __syncthreads();  // caught
    out[t] = t;
}

template <bool RIGHT>
__global__ void exit_before_a_barrier(int *out, const int *, const int *) {
    const int t = threadIdx.x;
    if (!RIGHT && t >= 40) return;
    __syncthreads();  // caught
    out[t] = t;
}

template <bool RIGHT>
__global__ void two_barriers(int *out, const int *, const int *) {
    const int t = threadIdx.x;
    if (RIGHT || t < 32) {
        __syncthreads();  // caught
    } else {
        __syncthreads();  // caught
    }
    out[t] = t;
}

template <bool RIGHT>
__global__ void barrier_or_syncwarp(int *out, const int *, const int *) {
    const int t = threadIdx.x;
    if (RIGHT || t != 5) __syncwarp();  // caught
    __syncthreads();  // caught
    out[t] = t;
}

template <bool RIGHT>
__global__ void shuffle_with_an_absent_lane(int *out, const int *in, const int *) {  // a warp and a half
    const int t = threadIdx.x;
    out[t] = __shfl_sync(RIGHT && t >= 32 ? 0xffff : ALL_LANES, in[t], 7);  // caught
}

template <bool RIGHT>
__global__ void shuffle_after_an_exit(int *out, const int *in, const int *) {
    const int t = threadIdx.x;
    if (!RIGHT && t == 63) return;
    out[t] = __shfl_xor_sync(ALL_LANES, in[t], 1);  // caught
}

template <bool RIGHT>
__global__ void shuffle_outside_the_mask(int *out, const int *in, const int *) {
    const int t = threadIdx.x;
    if (t % 32 < 16) out[t] = __shfl_sync(0xffff, in[t], RIGHT ? 3 : 20);  // caught
}

template <bool RIGHT>
__global__ void lane_outside_its_mask(int *out, const int *in, const int *) {
    const int t = threadIdx.x;
    if (t % 32 < (RIGHT ? 16 : 17)) out[t] = __shfl_sync(0xffff, in[t], 3);  // caught
}

template <bool RIGHT>
__global__ void different_operations(int *out, const int *in, const int *) {
    const int t = threadIdx.x;
    if (RIGHT || t % 32 < 16) out[t] = __shfl_xor_sync(ALL_LANES, in[t], 1);  // caught
    else out[t] = __ballot_sync(ALL_LANES, in[t]);  // caught
}

template <bool RIGHT>
__global__ void different_shuffles(int *out, const int *in, const int *) {
    const int t = threadIdx.x;
    if (RIGHT || t % 32 < 16) out[t] = __shfl_xor_sync(ALL_LANES, in[t], 1);  // caught
    else out[t] = __shfl_xor_sync(ALL_LANES, in[t], 2);  // caught
}

// ---- asynchronous copies: each of 64 threads copies 16 bytes where it copies

template <bool RIGHT>
__global__ void copy_without_a_wait(int *out, const int *in, const int *) {
    __shared__ __align__(16) int s[64];
    const int t = threadIdx.x;
    if (t < 16) copy_16_bytes(s + 4 * t, in + 4 * t, true);  // caught
    commit_copies();
    if (RIGHT) wait_for_copies<0>();
    __syncthreads();
    out[t] = s[63 - t];  // caught
}

template <bool RIGHT>
__global__ void copy_without_a_barrier(int *out, const int *in, const int *) {
    __shared__ __align__(16) int s[64];
    const int t = threadIdx.x;
    s[t] = 0;
    __syncthreads();
    if (t < 16) copy_16_bytes(s + 4 * t, in + 4 * t, true);  // caught
    commit_copies();
    wait_for_copies<0>();
    if (RIGHT) __syncthreads();
    out[t] = s[63 - t];  // caught
}

template <bool RIGHT>
__global__ void wait_for_too_few_groups(int *out, const int *in, const int *) {
    __shared__ __align__(16) int s[2][64];
    const int t = threadIdx.x;
    for (int stage = 0; stage < 2; stage++) {
        if (t < 16) copy_16_bytes(&s[stage][4 * t], in + 4 * t, true);  // caught
        commit_copies();
    }
    wait_for_copies<1>();
    __syncthreads();
    out[t] = s[RIGHT ? 0 : 1][63 - t];  // caught
    wait_for_copies<0>();
}

template <bool RIGHT>
__global__ void read_before_the_wait(int *out, const int *in, const int *) {
    __shared__ __align__(16) int s[64];
    const int t = threadIdx.x;
    if (t < 16) copy_16_bytes(s + 4 * t, in + 4 * t, true);
    commit_copies();
    if (!RIGHT && t < 16) out[t] = s[4 * t];  // caught
    wait_for_copies<0>();
    if (RIGHT && t < 16) out[t] = s[4 * t];
}

template <bool RIGHT>
__global__ void write_before_the_wait(int *out, const int *in, const int *) {
    __shared__ __align__(16) int s[64];
    const int t = threadIdx.x;
    if (t < 16) copy_16_bytes(s + 4 * t, in + 4 * t, true);
    commit_copies();
    if (!RIGHT && t < 16) s[4 * t] = 0;  // caught
    wait_for_copies<0>();
    if (t < 16) out[t] = s[4 * t];
}

// Two stages: while one is used the next is on its way.
template <bool RIGHT>
__global__ void stage_overwritten_while_read(int *out, const int *in, const int *) {
    __shared__ __align__(16) int s[2][64];
    const int t = threadIdx.x, rounds = 6;
    int sum = 0;
    const auto fetch = [&](int round) {
        if (round < rounds && t < 16) copy_16_bytes(&s[round % 2][4 * t], in + 4 * t, true);  // caught
        commit_copies();
    };
    fetch(0);
    for (int round = 0; round < rounds; round++) {
        fetch(round + 1);
        wait_for_copies<1>();
        __syncthreads();  // all copies of this round are here
        sum += s[round % 2][63 - t];  // caught
        if (RIGHT) __syncthreads();  // all have read: the next round may overwrite
    }
    out[t] = sum;
}

template <bool RIGHT>
__global__ void misaligned_copy(int *out, const int *in, const int *) {
    __shared__ __align__(16) int s[64];
    const int t = threadIdx.x;
    if (t < 15) copy_16_bytes(s + 4 * t, in + 4 * t + !RIGHT, true);  // caught
    commit_copies();
    wait_for_copies<0>();
    out[t] = 0;
}

template <bool RIGHT>
__global__ void copy_from_beyond_the_end(int *out, const int *in, const int *) {
    __shared__ __align__(16) int s[128];
    const int t = threadIdx.x;
    if (t < 17) copy_16_bytes(s + 4 * t, in + 4 * t, !RIGHT || t < 16);  // caught
    commit_copies();
    wait_for_copies<0>();
    if (t < 17) out[t] = s[4 * t + 3];
}

// ---- kernels that do not end

template <bool RIGHT>
__global__ void endless(int *out, const int *in, const int *) {
    for (int i = 0; !RIGHT || i < 9; i++) out[threadIdx.x] += in[threadIdx.x] + i;  // caught
}

template <bool RIGHT>
__global__ void endless_with_barriers(int *out, const int *, const int *) {
    for (int i = 0; !RIGHT || i < 9; i++) {  // caught
        out[threadIdx.x] = i;  // caught
        __syncthreads();  // caught
    }
}
