// CUDA C++ for a plain C++17 compiler: what a kernel sees when it is compiled for this CPU.
//
// Keywords become nothing or C++; threadIdx and its kin read the emulator's position; barriers, warp instructions and
// atomics are calls into the runtime (runtime.h). Included by include/prelude.h, never by a kernel itself.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "runtime.h"

#define __global__ __attribute__((noinline))
#define __device__
#define __host__
#define __constant__ static const
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// One block runs at a time, so what a block shares can be static. A kernel's library has no other zero-initialised
// data: its .bss is static shared memory, which the scheduler poisons before each block and the checker shadows.
#define __shared__ static

#define threadIdx (emulator::here.thread)
#define blockIdx (emulator::here.block)
#define blockDim (emulator::here.block_size)
#define gridDim (emulator::here.grid_size)
constexpr int warpSize = 32;

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// ---- barriers

inline void __syncthreads(EMULATOR_WHERE) { emulator::barrier(0, 0, EMULATOR_HERE); }
inline void __syncwarp(unsigned mask = ~0u, EMULATOR_WHERE) {
    emulator::collective(emulator::Operation::sync_warp, mask, nullptr, nullptr, EMULATOR_HERE);
}
inline void __threadfence() {}

// ---- shuffles and votes

namespace emulator {

struct Shuffle {
    uint64_t value, result;
    int source;  // lane
};

EMULATOR_UNCHECKED inline void complete_shuffle(void **deposits, unsigned mask, Where where) {
    for (int i = 0; i < 32; i++) {
        if (!(mask >> i & 1)) continue;
        Shuffle &mine = *(Shuffle *)deposits[i];
        if (!(mask >> mine.source & 1))
            fail("divergence", where, "lane %d reads lane %d, which is not in mask %08x", i, mine.source, mask);
        mine.result = ((Shuffle *)deposits[mine.source])->value;
    }
}

template <class T>
EMULATOR_UNCHECKED T shuffle(unsigned mask, T value, int source, Where where) {
    static_assert(sizeof(T) <= 8, "a shuffle moves up to 8 bytes");
    Shuffle mine = {0, 0, source};
    memcpy(&mine.value, &value, sizeof value);
    collective(Operation::shuffle, mask, &mine, complete_shuffle, where);
    memcpy(&value, &mine.result, sizeof value);
    return value;
}

EMULATOR_UNCHECKED inline void complete_vote(void **deposits, unsigned mask, Where) {
    unsigned result = 0;
    for (int i = 0; i < 32; i++)
        if (mask >> i & 1) result |= *(unsigned *)deposits[i] << i;
    for (int i = 0; i < 32; i++)
        if (mask >> i & 1) *(unsigned *)deposits[i] = result;
}

}  // namespace emulator

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMULATOR_WHERE) {
    const int first = emulator::lane() & ~(width - 1);
    return emulator::shuffle(mask, value, first | (source & (width - 1)), EMULATOR_HERE);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, EMULATOR_WHERE) {
    const int lane = emulator::lane(), other = lane ^ bits;
    return emulator::shuffle(mask, value, other < (lane & ~(width - 1)) + width ? other : lane, EMULATOR_HERE);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int by, int width = 32, EMULATOR_WHERE) {
    const int lane = emulator::lane();
    return emulator::shuffle(mask, value, (lane & (width - 1)) < by ? lane : lane - by, EMULATOR_HERE);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int by, int width = 32, EMULATOR_WHERE) {
    const int lane = emulator::lane();
    return emulator::shuffle(mask, value, (lane & (width - 1)) + by < width ? lane + by : lane, EMULATOR_HERE);
}
EMULATOR_UNCHECKED inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATOR_WHERE) {
    unsigned bit = predicate != 0;
    emulator::collective(emulator::Operation::vote, mask, &bit, emulator::complete_vote, EMULATOR_HERE);
    return bit;
}
inline int __any_sync(unsigned mask, int predicate, EMULATOR_WHERE) { return __ballot_sync(mask, predicate, file, line) != 0; }
inline int __all_sync(unsigned mask, int predicate, EMULATOR_WHERE) { return __ballot_sync(mask, predicate, file, line) == mask; }

// ---- atomics: threads switch only where they wait, or at a checked access, so a plain update is one

namespace emulator {
template <class T, class Update>
EMULATOR_UNCHECKED T update(T *p, Update next, Where where) {
    touch(p, sizeof(T), Access::atomic, where);
    const T before = *p;
    *p = next(before);
    return before;
}
}  // namespace emulator

template <class T>
T atomicAdd(T *p, std::common_type_t<T> value, EMULATOR_WHERE) {
    return emulator::update(p, [=](T old) { return (T)(old + value); }, EMULATOR_HERE);
}
template <class T>
T atomicMax(T *p, std::common_type_t<T> value, EMULATOR_WHERE) {
    return emulator::update(p, [=](T old) { return old < value ? value : old; }, EMULATOR_HERE);
}
template <class T>
T atomicMin(T *p, std::common_type_t<T> value, EMULATOR_WHERE) {
    return emulator::update(p, [=](T old) { return value < old ? value : old; }, EMULATOR_HERE);
}
template <class T>
T atomicOr(T *p, std::common_type_t<T> value, EMULATOR_WHERE) {
    return emulator::update(p, [=](T old) { return (T)(old | value); }, EMULATOR_HERE);
}
template <class T>
T atomicExch(T *p, std::common_type_t<T> value, EMULATOR_WHERE) {
    return emulator::update(p, [=](T) { return value; }, EMULATOR_HERE);
}
template <class T>
T atomicCAS(T *p, std::common_type_t<T> compare, std::common_type_t<T> value, EMULATOR_WHERE) {
    return emulator::update(p, [=](T old) { return old == compare ? value : old; }, EMULATOR_HERE);
}

// ---- arithmetic

template <class T>
T __ldg(const T *p) {
    return *p;
}
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v ? __builtin_clz(v) : 32; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __int_as_float(int i) {
    float f;
    memcpy(&f, &i, sizeof f);
    return f;
}
inline int __float_as_int(float f) {
    int i;
    memcpy(&i, &f, sizeof i);
    return i;
}
template <class A, class B>  // of a NaN and a number, the number
std::common_type_t<A, B> min(A a, B b) {
    return b < a || a != a ? b : a;
}
template <class A, class B>
std::common_type_t<A, B> max(A a, B b) {
    return a < b || a != a ? b : a;
}

// ---- half precision, in software: g++ 12 has no _Float16 on aarch64

struct __nv_bfloat16 {
    uint16_t bits;
};
struct __half {
    uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 h) { return __int_as_float((int)((uint32_t)h.bits << 16)); }
inline __nv_bfloat16 __float2bfloat16(float f) {  // to nearest, ties to even
    const uint32_t u = (uint32_t)__float_as_int(f);
    return {(uint16_t)(f != f ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
inline float __half2float(__half h) {
    const float magnitude = __int_as_float((h.bits & 0x7fff) << 13) * 0x1p112f;  // the product normalises subnormals
    const uint32_t infinite = (h.bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0, sign = (uint32_t)(h.bits & 0x8000) << 16;
    return __int_as_float((int)((uint32_t)__float_as_int(magnitude) | infinite | sign));
}
inline __half __float2half(float f) {  // to nearest, ties to even
    uint32_t u = (uint32_t)__float_as_int(f);
    const uint32_t sign = u >> 16 & 0x8000;
    u &= 0x7fffffff;
    if (u > 0x7f800000) return {0x7fff};
    if (u >= 0x477ff000) return {(uint16_t)(sign | 0x7c00)};
    if (u < 0x38800000)  // subnormal: adding 0.5 rounds at 2^-24
        return {(uint16_t)(sign | (uint32_t)(__float_as_int(__int_as_float((int)u) + 0.5f) - 0x3f000000))};
    return {(uint16_t)(sign | (u - 0x38000000 + 0xfff + (u >> 13 & 1)) >> 13)};
}

// ---- how the runtime calls a kernel, and finds the memory of its library

namespace emulator {

template <auto kernel>
struct Entry;
template <class... Parameters, void (*kernel)(Parameters...)>
struct Entry<kernel> {
    static constexpr int sizes[] = {(int)sizeof(Parameters)..., 0};
    template <size_t... i>
    EMULATOR_UNCHECKED static void unpack(void **arguments, std::index_sequence<i...>) {
        kernel(*static_cast<Parameters *>(arguments[i])...);
    }
    EMULATOR_UNCHECKED static void call(void **arguments) { unpack(arguments, std::index_sequence_for<Parameters...>{}); }
};

}  // namespace emulator

#define EMULATOR_KERNEL(number, ...)                                                                             \
    extern "C" void kernel_##number(void **arguments) { emulator::Entry<&__VA_ARGS__>::call(arguments); }        \
    extern "C" const int *kernel_sizes_##number() { return emulator::Entry<&__VA_ARGS__>::sizes; }
#if defined(__APPLE__)  // whose linker has no such symbols: what nobody wrote in shared memory is zero instead of NaN
#define EMULATOR_LIBRARY                                                                                         \
    extern "C" char *library_begin() { return nullptr; }                                                         \
    extern "C" char *shared_begin() { return nullptr; }                                                          \
    extern "C" char *library_end() { return nullptr; }
#else
#define EMULATOR_LIBRARY                                                                                         \
    extern "C" __attribute__((visibility("hidden"))) char __ehdr_start[], __bss_start[], _end[];                 \
    extern "C" char *library_begin() { return __ehdr_start; }                                                    \
    extern "C" char *shared_begin() { return __bss_start; }                                                      \
    extern "C" char *library_end() { return _end; }
#endif
