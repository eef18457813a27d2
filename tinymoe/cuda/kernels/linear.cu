// The linear map of a few rows, as when a text is written, y = x w^T: each weight is read once, as few_rows.h says. (Many rows
// are cuBLAS's, which CuPy does not record in a graph.)
//
// A block owns 32 rows of w, hence as many columns of y. More than MOST rows of x take another pass.
// Bytes: D_in D_out elements of w once for every MOST rows, beside N (D_in + D_out) of x and y. FLOPs: 2 N D_in D_out.
#include "few_rows.h"

// x (N, inner), w (outer, inner), y (N, outer).
template <class T, class By>
__global__ void __launch_bounds__(MOST_WARPS * WARP, 1) linear_few(const T *x, const T *w, T *y, int N, int inner, int outer) {
    __shared__ float products[By::MOST * ROWS];
    const int column = blockIdx.x * ROWS;
    const auto of_w = [&](int i) { return w + (size_t)min(column + i, outer - 1) * inner; };  // beyond the last row, it again
    for (int first = 0; first < N; first += By::MOST) {
        const int count = min(By::MOST, N - first);
        const auto row = [&](int r) { return x + (size_t)(first + r) * inner; };
        By::template multiply<MOST_WARPS>(of_w, row, count, inner, products);
        __syncthreads();  // all products are there
        for (int j = threadIdx.x; j < count * ROWS; j += MOST_WARPS * WARP) {
            const int r = j / ROWS, i = j % ROWS;
            if (column + i < outer) y[(size_t)(first + r) * outer + column + i] = from_float<T>(products[j]);
        }
        __syncthreads();  // read before the next pass writes
    }
}
