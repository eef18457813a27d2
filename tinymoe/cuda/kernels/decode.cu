// Decoding: the newest key and value of each sequence join its cache, at the slot of its position.
//
// keys[b, positions[b] mod slots[b]] = k[b], and values likewise: the positions lie on the device, so that the same launch
// serves every token. A block per sequence, whose threads share out the G K elements of a position. All caches lie in one
// array, `capacity` slots each, of which a sequence with a shorter text, or a window, uses the first slots[b].
// Bytes: 2 G K elements a sequence, loaded and stored: less than a launch costs. No FLOPs.
#include "prelude.h"

template <class T>
__global__ void cache_store(
    const T *k, const T *v, const int *positions, const int *slots, T *keys, T *values, int capacity, int size) {
    const int b = blockIdx.x;
    const size_t from = (size_t)b * size, to = ((size_t)b * capacity + positions[b] % slots[b]) * size;
    for (int i = threadIdx.x; i < size; i += blockDim.x) {
        keys[to + i] = k[from + i];
        values[to + i] = v[from + i];
    }
}
