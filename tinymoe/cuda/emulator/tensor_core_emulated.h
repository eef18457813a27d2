// The CPU's bodies of include/tensor_core.h, by the lane layouts that the PTX ISA documents. Sums are in float32, element
// after element: the hardware's order and rounding inside one instruction are its own.
#pragma once
#include "cuda.h"

namespace emulator {

struct Mma {
    float *d;
    const uint32_t *a;
    uint32_t b[2];
};

EMULATOR_UNCHECKED inline float half_of(uint32_t word, int i) { return __bfloat162float({(uint16_t)(word >> 16 * i)}); }

EMULATOR_UNCHECKED inline void complete_mma(void **deposits, unsigned, Where) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; lane++) {
        const Mma &mine = *(Mma *)deposits[lane];
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 8; i++) a[g + i / 2 % 2 * 8][2 * t + i % 2 + i / 4 * 8] = half_of(mine.a[i / 2], i % 2);
        for (int i = 0; i < 4; i++) b[2 * t + i % 2 + i / 2 * 8][g] = half_of(mine.b[i / 2], i % 2);
    }
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++) {
            float &d = ((Mma *)deposits[lane])->d[i];
            for (int k = 0; k < 16; k++) d += a[lane / 4 + i / 2 * 8][k] * b[k][2 * (lane % 4) + i % 2];
        }
}

struct LoadMatrices {
    uint32_t *registers;
    const uint16_t *row;
    bool transposed;
};

EMULATOR_UNCHECKED inline void complete_load(void **deposits, unsigned, Where) {
    for (int lane = 0; lane < 32; lane++)
        for (int matrix = 0; matrix < 4; matrix++) {
            const LoadMatrices &mine = *(LoadMatrices *)deposits[lane];
            uint32_t word = 0;
            for (int i = 0; i < 2; i++) {
                const int r = lane / 4, c = lane % 4 * 2 + i;
                const int row = mine.transposed ? c : r, column = mine.transposed ? r : c;
                word |= (uint32_t)((LoadMatrices *)deposits[8 * matrix + row])->row[column] << 16 * i;
            }
            mine.registers[matrix] = word;
        }
}

}  // namespace emulator

EMULATOR_UNCHECKED inline void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, EMULATOR_WHERE) {
    emulator::Mma mine = {d, a, {b0, b1}};
    emulator::collective(emulator::Operation::mma, ALL_LANES, &mine, emulator::complete_mma, EMULATOR_HERE);
}

template <bool TRANSPOSED>
EMULATOR_UNCHECKED void load_matrices(uint32_t (&registers)[4], const void *row, EMULATOR_WHERE) {
    if ((uintptr_t)row % 16) emulator::fail("misaligned", EMULATOR_HERE, "a row for ldmatrix must lie at a multiple of 16 bytes");
    emulator::touch(row, 16, emulator::Access::read, EMULATOR_HERE);
    emulator::LoadMatrices mine = {registers, (const uint16_t *)row, TRANSPOSED};
    emulator::collective(emulator::Operation::load_matrix, ALL_LANES, &mine, emulator::complete_load, EMULATOR_HERE);
}

inline void copy_16_bytes(void *to, const void *from, bool valid, EMULATOR_WHERE) {
    emulator::copy_asynchronously(to, from, 16, valid ? 16 : 0, EMULATOR_HERE);
}
inline void commit_copies() { emulator::commit_copies(); }
template <int LEFT>
void wait_for_copies() {
    emulator::wait_for_copies(LEFT);
}
