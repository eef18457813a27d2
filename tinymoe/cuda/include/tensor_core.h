// Tensor cores and asynchronous copies, Ampere's set: each wrapper is one PTX instruction, or the emulator's idea of it.
#pragma once
#include "prelude.h"

#if defined(__CUDACC_RTC__)

__device__ __forceinline__ uint32_t shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

// d += a b, for a 16 x 16 and b 16 x 8 in bfloat16 and d 16 x 8 in float32, spread over the warp. With g = lane / 4 and
// t = lane % 4 a lane holds
//   a[0], a[1], a[2], a[3]   rows g, g + 8, g, g + 8 and columns 2t, 2t + 1 (the last two 8 further)
//   b[0], b[1]               rows 2t, 2t + 1 (the second 8 further) of column g
//   d[0], d[1]; d[2], d[3]   row g; g + 8, columns 2t, 2t + 1
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Load four 8 x 8 matrices of 16-bit elements: lane 8 i + r gives the address of row r of matrix i, 16 aligned bytes.
// Then register i of a lane holds row lane / 4, columns 2t and 2t + 1, of matrix i; or of its transpose.
template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void *row) {
    if (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

// Begin to copy 16 bytes from global to shared memory, zeros if not `valid`; both addresses are multiples of 16.
__device__ __forceinline__ void copy_16_bytes(void *to, const void *from, bool valid) {
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
}
// The copies begun since the last call are a group; wait until at most `LEFT` of the newest groups are under way.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

#else
#include "tensor_core_emulated.h"
#endif

__device__ __forceinline__ uint32_t pack(float low, float high) {
    union {
        bfloat16 halves[2];
        uint32_t word;
    } both;
    both.halves[0] = __float2bfloat16(low);
    both.halves[1] = __float2bfloat16(high);
    return both.word;
}
