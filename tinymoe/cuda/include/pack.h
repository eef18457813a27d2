// WIDTH neighbouring elements of a row, which one instruction loads or stores: 4 where a row's length is a multiple of 4,
// so that every row begins aligned, else 1.
#pragma once
#include "prelude.h"

template <class T, int WIDTH>
struct alignas(sizeof(T) * WIDTH) Pack {
    T values[WIDTH];
};

template <int WIDTH, class T>
__device__ __forceinline__ Pack<T, WIDTH> load_pack(const T *from) {
    return *reinterpret_cast<const Pack<T, WIDTH> *>(from);
}

// The same, of what is read only once: it does not take the place of other things in the L1 cache.
template <int WIDTH, class T>
__device__ __forceinline__ Pack<T, WIDTH> load_once(const T *from) {
#if defined(__CUDACC_RTC__)
    if constexpr (sizeof(Pack<T, WIDTH>) == 16) {
        union {
            uint32_t words[4];
            Pack<T, WIDTH> pack;
        } loaded;
        asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(loaded.words[0]), "=r"(loaded.words[1]), "=r"(loaded.words[2]), "=r"(loaded.words[3]) : "l"(from));
        return loaded.pack;
    }
#endif
    return load_pack<WIDTH>(from);
}

template <int WIDTH, class T>
__device__ __forceinline__ void store_pack(T *to, const Pack<T, WIDTH> &pack) {
    *reinterpret_cast<Pack<T, WIDTH> *>(to) = pack;
}
