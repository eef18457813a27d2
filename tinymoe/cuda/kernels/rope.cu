// Rotary positions: neighbours in a head, z = x[2j] + i x[2j + 1], times exp(i angle) of the token's position.
//
// A block per token; its threads walk over the pairs of all heads, which share the token's row of the table. A pair is one
// load and one store, and the row of the table stays in the cache. Bytes: 2 N H K loads and stores of x and y, and N K of
// the table; FLOPs: 3 N H K; bound by memory. The backward turns the other way: the transpose of a rotation is its inverse.
#include "prelude.h"

template <class T>
struct alignas(2 * sizeof(T)) Pair {  // so aligned that it moves in one piece
    T real, imaginary;
};

template <class T>
__global__ void rope_rotate(const T *x, const float *rotation, T *y, float direction, int times, int heads, int pairs) {
    const size_t first = (size_t)blockIdx.x * heads * pairs;  // of the token's pairs
    const Pair<T> *from = reinterpret_cast<const Pair<T> *>(x) + first;
    Pair<T> *to = reinterpret_cast<Pair<T> *>(y) + first;
    const Pair<float> *turns = reinterpret_cast<const Pair<float> *>(rotation) + (size_t)(blockIdx.x % times) * pairs;
    for (int i = threadIdx.x; i < heads * pairs; i += blockDim.x) {
        const Pair<float> turn = turns[i % pairs];
        const Pair<T> z = from[i];
        const float real = to_float(z.real), imaginary = to_float(z.imaginary);
        const float cosine = turn.real, sine = turn.imaginary * direction;
        to[i] = {from_float<T>(real * cosine - imaginary * sine), from_float<T>(real * sine + imaginary * cosine)};
    }
}
