// What CUDA's words need from the emulator: where a thread is, how threads wait for each other, what they touched.
//
// The kernel is compiled with cuda.h, which turns each word of CUDA into C++ on top of these few functions; they live
// in a library of their own (scheduler.cpp, checker.cpp, asynchronous.cpp, fiber.cpp), which is never instrumented.
#pragma once
#include <cstddef>
#include <cstdint>

namespace emulator {

struct Index {
    unsigned x, y, z;
};

struct Position {
    Index thread, block, block_size, grid_size;
};
extern Position here;  // of the running thread: the scheduler sets it at every switch

struct Where {  // a line of the kernel
    const char *file;
    int line;
};

// ---- waiting (scheduler.cpp)

// Wait for the other threads of the block. Barrier 0 with count 0 is __syncthreads; `count` threads meet at the others.
void barrier(int id, int count, Where where);

// Meet the other lanes of `mask`. Each deposits `argument`; the last to arrive runs `complete` over all deposits, and
// all go on. Every warp instruction (shuffle, vote, ldmatrix, mma) is one of these.
enum class Operation : uint8_t { sync_warp, shuffle, vote, load_matrix, mma, warpgroup, other };
using Complete = void (*)(void **deposits, unsigned mask, Where where);
void collective(Operation operation, unsigned mask, void *argument, Complete complete, Where where);

// Wait until `ready(argument)`; other threads run meanwhile.
void wait_until(bool (*ready)(void *), void *argument, Where where);

unsigned lane();
char *dynamic_shared();

// ---- checking (checker.cpp)

enum class Access : uint8_t { read, write, atomic };
void touch(const void *address, size_t bytes, Access access);  // in the fast build only the watchdog looks
void touch(const void *address, size_t bytes, Access access, Where where);

// Stop the launch with an error. `kind` is one word or two, the rest as printf.
[[noreturn]] void fail(const char *kind, Where where, const char *format, ...) __attribute__((format(printf, 3, 4)));

// ---- Ampere's asynchronous copies (asynchronous.cpp)

// Copy `valid` bytes and fill up to `bytes` with zeros, at some moment between now and the wait for its group.
void copy_asynchronously(void *to, const void *from, int bytes, int valid, Where where);
void commit_copies();
void wait_for_copies(int groups_left);  // all but the newest `groups_left` groups are done when this returns

// ---- Hopper's barriers, tiles and products (hopper.cpp)

struct alignas(64) TileMap {  // a matrix of 16-bit elements in global memory, and the box that is cut of it
    const char *begin;
    int64_t pitch;  // bytes from row to row
    int rows, columns, box_rows, box_columns;
    char unused[96];
};
static_assert(sizeof(TileMap) == 128, "as large as CUDA's");

void init_barrier(void *barrier, int arrivals, Where where);
void publish_barriers();
void arrive(void *barrier, int bytes, Where where);
void arrive_when_copied(void *barrier, Where where);  // when all copies that this thread has begun are done
void wait_for_phase(void *barrier, unsigned parity, Where where);
void load_tile(void *to, const TileMap &map, void *barrier, int row, int column, Where where);
void fence_async_proxy();

struct Matrix {
    uint64_t descriptor;
    bool is_columns;
};
struct Product {  // d = a b, or d += a b if `add`: 64 x 16 by 16 x n
    Matrix a, b;
    int n;
    bool add;
};
void multiply(const Product &product, float *d, Where where);  // d: the thread's share
void fence_products(Where where);
void commit_products(Where where);
void wait_for_products(int groups_left, Where where);

}  // namespace emulator

// How a word of CUDA learns the line it stands on: as default arguments of its last parameters.
#define EMULATOR_WHERE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define EMULATOR_HERE emulator::Where{file, line}
// Bodies of CUDA's words in a kernel's own object are not part of the kernel: the checker must not see their accesses.
#define EMULATOR_UNCHECKED __attribute__((no_sanitize("thread"), noinline))
