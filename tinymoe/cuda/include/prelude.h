// The first line of every kernel: CUDA itself on a GPU, the emulator's CUDA on a CPU.
#pragma once

#if defined(__CUDACC_RTC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long long;
using int64_t = long long;
#define INFINITY __int_as_float(0x7f800000)
// Dynamic shared memory, of the size that the launch asks for.
#define DYNAMIC_SHARED(T, name)                                         \
    extern __shared__ __align__(1024) unsigned char dynamic_shared_[]; \
    T *name = reinterpret_cast<T *>(dynamic_shared_)
#else
#include "cuda.h"
#define DYNAMIC_SHARED(T, name) T *name = reinterpret_cast<T *>(emulator::dynamic_shared())
#endif

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int WARP = 32;

using bfloat16 = __nv_bfloat16;

// Kernels compute in float32, whatever they load and store.
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bfloat16 x) { return __bfloat162float(x); }
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ bfloat16 from_float<bfloat16>(float x) {
    return __float2bfloat16(x);
}
