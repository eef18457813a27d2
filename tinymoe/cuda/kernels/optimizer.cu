// AdamW, fused: m += (1 - beta1) (g - m);  v += (1 - beta2) (g^2 - v);  p = p decay - rate m / (sqrt(v) + eps).
//
// The host folds the corrections of step t into three numbers: rate = learning_rate sqrt(1 - beta2^t) / (1 - beta1^t),
// eps, times sqrt(1 - beta2^t), and decay = 1 - learning_rate weight_decay.
//
// Where the parameter is bfloat16, p is its float32 master copy: a step is mostly smaller than half the distance between
// neighbours in bfloat16, and would be lost in rounding. `rounded` is then the parameter itself; else it is NULL.
//
// A thread per element, and a stride of the whole grid to the next. Bytes: 28 an element (p, m, v loaded and stored, g
// loaded) in float32, and with bfloat16 weights and gradients also 28; FLOPs: about 12; bound by memory.
#include "prelude.h"

template <class G>
__global__ void adamw_update(float *p, const G *g, float *m, float *v, bfloat16 *rounded, int64_t size, float one_minus_beta1,
                             float one_minus_beta2, float rate, float eps, float decay) {
    const int64_t stride = (int64_t)gridDim.x * blockDim.x;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < size; i += stride) {
        const float gradient = to_float(g[i]);
        const float mean = m[i] + one_minus_beta1 * (gradient - m[i]);
        const float square = v[i] + one_minus_beta2 * (gradient * gradient - v[i]);
        const float updated = p[i] * decay - rate * mean / (sqrtf(square) + eps);
        m[i] = mean, v[i] = square, p[i] = updated;
        if (rounded) rounded[i] = from_float<bfloat16>(updated);
    }
}
