// The probe of docs/math/kernel_fragments.md: what each lane holds after rung 4's own loads, and after a product.
//
// One warp. It copies a (16 x 16) and b, as rung 4 lays its tiles, loads fragments by ldmatrix with rung 4's addresses and
// multiplies once. Registers come back as they are, so that the page can compare them with the layout on paper.
#include "prelude.h"
#include "tensor_core.h"

// a is stored (row, k), or (k, row) with A_IS_COLUMNS; b is stored (column, k), or (k, column) with B_IS_COLUMNS: 16
// columns, of which the product takes the first 8. a_registers and b_registers (32, 4), d (32, 4).
template <bool A_IS_COLUMNS, bool B_IS_COLUMNS>
__global__ void fragments(const bfloat16 *a, const bfloat16 *b, unsigned *a_registers, unsigned *b_registers, float *d) {
    DYNAMIC_SHARED(bfloat16, a_tile);
    bfloat16 *b_tile = a_tile + 16 * 16;
    const int lane = threadIdx.x;
    for (int i = lane; i < 16 * 16; i += WARP) a_tile[i] = a[i], b_tile[i] = b[i];
    __syncwarp();  // the tiles are there

    uint32_t a_held[4], b_held[4];
    if (A_IS_COLUMNS) load_matrices<true>(a_held, a_tile + (lane % 8 + lane / 16 * 8) * 16 + lane / 8 % 2 * 8);
    else load_matrices<false>(a_held, a_tile + lane % 16 * 16 + lane / 16 * 8);
    if (B_IS_COLUMNS) load_matrices<true>(b_held, b_tile + lane % 16 * 16 + lane / 16 * 8);
    else load_matrices<false>(b_held, b_tile + (lane % 8 + lane / 16 * 8) * 16 + lane / 8 % 2 * 8);

    float sums[4] = {};
    mma_16x8x16(sums, a_held, b_held[0], b_held[1]);
    for (int i = 0; i < 4; i++) {
        a_registers[lane * 4 + i] = a_held[i];
        b_registers[lane * 4 + i] = b_held[i];
        d[lane * 4 + i] = sums[i];
    }
}
