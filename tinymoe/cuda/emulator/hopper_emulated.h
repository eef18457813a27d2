// The CPU's bodies of include/hopper.h; what they mean is in hopper.cpp.
#pragma once
#include "cuda.h"

using emulator::TileMap;

inline uint32_t shared_address(const void *p) { return (uint32_t)((const char *)p - emulator::dynamic_shared()); }

inline void mbarrier_init(uint64_t *barrier, int arrivals, EMULATOR_WHERE) { emulator::init_barrier(barrier, arrivals, EMULATOR_HERE); }
inline void fence_mbarrier_init() { emulator::publish_barriers(); }
inline void mbarrier_arrive(uint64_t *barrier, EMULATOR_WHERE) { emulator::arrive(barrier, 0, EMULATOR_HERE); }
inline void mbarrier_arrive_expect(uint64_t *barrier, int bytes, EMULATOR_WHERE) { emulator::arrive(barrier, bytes, EMULATOR_HERE); }
inline void mbarrier_arrive_when_copied(uint64_t *barrier, EMULATOR_WHERE) { emulator::arrive_when_copied(barrier, EMULATOR_HERE); }
inline void mbarrier_wait(uint64_t *barrier, unsigned parity, EMULATOR_WHERE) {
    emulator::wait_for_phase(barrier, parity, EMULATOR_HERE);
}

inline void sync_some(int number, int threads, EMULATOR_WHERE) { emulator::barrier(number, threads, EMULATOR_HERE); }
template <int LEFT>
void give_registers_up() {}  // the CPU's threads have as many as they like
template <int THEN>
void take_registers() {}

inline void load_tile(void *to, const TileMap &map, uint64_t *barrier, int row, int column, EMULATOR_WHERE) {
    emulator::load_tile(to, map, barrier, row, column, EMULATOR_HERE);
}
inline void fence_async_proxy() { emulator::fence_async_proxy(); }

inline void wgmma_fence(EMULATOR_WHERE) { emulator::fence_products(EMULATOR_HERE); }
inline void wgmma_commit(EMULATOR_WHERE) { emulator::commit_products(EMULATOR_HERE); }
template <int LEFT>
void wgmma_wait(EMULATOR_WHERE) {
    emulator::wait_for_products(LEFT, EMULATOR_HERE);
}
template <int N>
void pin(float (&)[N]) {}
template <bool A_IS_COLUMNS, bool B_IS_COLUMNS, int N>
EMULATOR_UNCHECKED void wgmma(float (&d)[N], uint64_t a, uint64_t b, bool add, EMULATOR_WHERE) {
    emulator::multiply({{a, A_IS_COLUMNS}, {b, B_IS_COLUMNS}, 2 * N, add}, d, EMULATOR_HERE);
}
