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

template <int WIDTH, class T>
__device__ __forceinline__ void store_pack(T *to, const Pack<T, WIDTH> &pack) {
    *reinterpret_cast<Pack<T, WIDTH> *>(to) = pack;
}
