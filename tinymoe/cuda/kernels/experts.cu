// SwiGLU, element by element: hidden = silu(gate) * up, with silu(z) = z sigmoid(z).
//
// Grid: a thread per element, in a stride of the whole grid. Bytes: forward 3, backward 5 elements moved for each, or 6; a
// few FLOPs; bound by memory, which is why the tensor-core rung of the grouped GEMM does it before it stores gate and up.
#include "prelude.h"

__device__ __forceinline__ float sigmoid(float z) { return 1.0f / (1.0f + expf(-z)); }

template <class T>
__global__ void swiglu_forward(const T *gate, const T *up, T *hidden, int64_t size) {
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < size; i += (int64_t)gridDim.x * blockDim.x) {
        const float z = to_float(gate[i]);
        hidden[i] = from_float<T>(z * sigmoid(z) * to_float(up[i]));
    }
}

// dgate = dhidden up (s + z s (1 - s)) with s = sigmoid(z), z the gate;  dup = dhidden z s. All that hidden is made of is
// at hand: unless it is null it is written once more, for a forward that did not keep it.
template <class T>
__global__ void swiglu_backward(const T *dhidden, const T *gate, const T *up, T *dgate, T *dup, T *hidden, int64_t size) {
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < size; i += (int64_t)gridDim.x * blockDim.x) {
        const float z = to_float(gate[i]), s = sigmoid(z), silu = z * s, d = to_float(dhidden[i]), u = to_float(up[i]);
        dgate[i] = from_float<T>(d * u * (s + silu * (1 - s)));
        dup[i] = from_float<T>(d * silu);
        if (hidden) hidden[i] = from_float<T>(silu * u);
    }
}

// sum = a + b; sum may be a.
template <class T>
__global__ void add(const T *a, const T *b, T *sum, int64_t size) {
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < size; i += (int64_t)gridDim.x * blockDim.x)
        sum[i] = from_float<T>(to_float(a[i]) + to_float(b[i]));
}
