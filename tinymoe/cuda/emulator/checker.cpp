// The checker: a shadow of every byte that a kernel may touch, and a clock for every thread.
//
// The checked build compiles kernels with -fsanitize=thread, which puts a call before every load and store, and defines
// those calls here instead of linking the sanitizer's runtime. Each call looks up whose memory the address is (out of
// bounds? read-only?) and then its shadow cells (who touched it last, and does that come before us?).
//
// "Before" is the happens-before of vector clocks (Fidge 1988, Mattern 1989; FastTrack, Flanagan and Freund 2009). A
// thread's clock counts its releases. `known(u)` is the newest clock of thread u that is ordered before the running
// thread's present; an access by u at clock c is ordered before it if c <= known(u). A __syncthreads makes all that
// came before known to all, which is one number per thread (`met`), not a vector each; a __syncwarp makes vectors.
//
// Hopper's copies and products work beside the threads. They are agents with a clock of their own, which only a wait makes
// known: the copies of one barrier are an agent whose clock is the phase, the products of one warpgroup an agent whose
// clock is the group. What an agent does is ordered after what those who started it knew.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <memory>

#include "fiber.h"
#include "scheduler.h"

namespace emulator {

constexpr size_t GRAIN = 2;  // bytes of a cell: no kernel shares anything smaller

struct Touch {
    uint32_t block;  // 1 + its number; 0: nobody
    uint32_t who : 11, clock : 21;  // a thread, or an agent
};

// The reads, or the atomics, since the last write. A touch that is ordered before a later one need not be kept. Two of
// each warp are enough as long as its lanes meet with full masks: no lane is ordered after both, nor after one between.
struct Touches {
    Touch elsewhere;                // by a block that ran before
    Touch two[2];                   // by two threads
    std::unique_ptr<Touch[]> more;  // if there was a third: two by each warp, and by each warpgroup's products
};

struct Cell {
    Touch write;
    Touches reads;
    std::unique_ptr<Touches> atomics;  // few cells have any
    bool in_flight;                    // an asynchronous copy may write it at any moment
};

struct Region {  // memory with one shadow: array arguments that overlap share it
    const char *begin, *end;
    std::vector<Cell> cells;  // none if nobody may write here
};

struct Argument {
    const char *begin, *end;
    bool writable;
    const char *name;
    Region *region;
};

static std::vector<Region> regions;
static std::vector<Argument> array_arguments;
static Region static_shared, dynamic_region;
static const char *image_begin, *image_end;  // of the kernel's library: its constants
static bool checking;

static std::vector<uint32_t> clocks;  // of each thread
static Knowledge met;                 // what all threads know, since the block last met
static std::vector<Knowledge> heard;  // what one thread knows beyond that
static Knowledge visible;             // what has been shown to the agents that read shared memory
static int agents;

struct Toucher {
    int who;
    uint32_t clock;
    const Knowledge *heard;
};
static Toucher we;  // who touches memory now

void check_launch(const Buffer *buffers, int count, char *image, char *end, char *shared, char *shared_end, size_t dynamic_bytes) {
    checking = options.checked;
    if (!checking) return;
    image_begin = image;
    image_end = end;
    array_arguments.clear();
    for (int i = 0; i < count; i++)
        array_arguments.push_back({buffers[i].begin, buffers[i].begin + buffers[i].bytes, buffers[i].writable != 0, buffers[i].name, nullptr});
    std::vector<Argument> sorted = array_arguments;
    std::sort(sorted.begin(), sorted.end(), [](const Argument &a, const Argument &b) { return a.begin < b.begin; });
    regions.clear();
    for (const Argument &a : sorted) {
        if (regions.empty() || a.begin >= regions.back().end) regions.push_back({a.begin, a.end, {}});
        else regions.back().end = std::max(regions.back().end, a.end);
    }
    for (Argument &a : array_arguments)
        for (Region &r : regions)
            if (a.begin >= r.begin && a.end <= r.end) {
                a.region = &r;
                if (a.writable) r.cells.resize((r.end - r.begin) / GRAIN + 1);
            }
    static_shared = {shared, shared_end, std::vector<Cell>((shared_end - shared) / GRAIN + 1)};
    dynamic_region = {dynamic_shared(), dynamic_shared() + dynamic_bytes, std::vector<Cell>(dynamic_bytes / GRAIN + 1)};
}

void check_block() {
    agents = warpgroups();
    if (!checking) return;
    clocks.assign(threads.size(), 1);
    met.clear();
    visible.clear();
    heard.assign(threads.size(), {});
    for (Region *shared : {&static_shared, &dynamic_region})
        for (Cell &cell : shared->cells) cell.in_flight = false;
}

static uint32_t known(const Knowledge &knowledge, size_t who) { return who < knowledge.size() ? knowledge[who] : 0; }

void merge(Knowledge &into, const Knowledge &from) {
    if (into.size() < from.size()) into.resize(from.size());
    for (size_t i = 0; i < from.size(); i++) into[i] = std::max(into[i], from[i]);
}

void order_all() {
    if (!checking) return;
    const size_t n = threads.size();
    for (Knowledge &h : heard) {
        for (size_t agent = n; agent < h.size(); agent++) {
            if (met.size() <= agent) met.resize(agent + 1);
            met[agent] = std::max(met[agent], h[agent]);
        }
        h.clear();
    }
    if (met.size() < n) met.resize(n);
    std::copy(clocks.begin(), clocks.end(), met.begin());
    for (uint32_t &clock : clocks) clock++;
}

void order_some(const std::vector<int> &meeting) {
    if (!checking) return;
    static Knowledge together;
    together = met;
    together.resize(std::max(met.size(), threads.size()));
    for (int t : meeting) merge(together, heard[t]);
    for (int t : meeting) together[t] = clocks[t];
    for (int t : meeting) {
        heard[t] = together;
        clocks[t]++;
    }
}

Knowledge release() {
    if (!checking) return {};
    Knowledge mine = met;
    mine.resize(std::max(met.size(), threads.size()));
    merge(mine, heard[current]);
    mine[current] = clocks[current]++;
    return mine;
}

void learn(const Knowledge &knowledge) {
    if (checking) merge(heard[current], knowledge);
}

Knowledge known_to_all(int first, int count) {
    if (!checking) return {};
    Knowledge common(threads.size() + agents, ~0u);
    for (int t = first; t < first + count; t++)
        for (size_t who = 0; who < common.size(); who++) {
            const uint32_t knows = (int)who == t ? clocks[t] : std::max(known(met, who), known(heard[t], who));
            common[who] = std::min(common[who], knows);
        }
    for (int t = first; t < first + count; t++) clocks[t]++;
    return common;
}

void fence_async_proxy() { merge(visible, release()); }

int warpgroups() { return ((int)threads.size() + 127) / 128; }
int agent_of_warpgroup(int warpgroup) { return (int)threads.size() + warpgroup; }
int new_agent() {
    if (threads.size() + agents == MOST_TOUCHERS) fail("launch", {nullptr, 0}, "a block of %zu threads has up to %zu barriers", threads.size(), MOST_TOUCHERS - threads.size() - warpgroups());
    return (int)threads.size() + agents++;
}
static bool is_agent(int who) { return who >= (int)threads.size(); }

static bool is_before_us(const Touch &touch, bool shared) {
    if (touch.block == 0) return true;
    if (touch.block != (uint32_t)block_number + 1) return shared;  // shared memory begins anew with every block
    return (int)touch.who == we.who || touch.clock <= std::max(known(met, touch.who), known(*we.heard, touch.who));
}

static size_t most_touches() { return 2 * ((threads.size() + 31) / 32 + warpgroups()); }
static const char *verb(Access access) { return access == Access::read ? "read" : access == Access::write ? "write" : "atomic"; }
static constexpr Where UNKNOWN = {nullptr, 0};  // the culprit tells

[[noreturn]] static void race(Access access, const char *before, const Touch &other, const char *memory, size_t offset) {
    if (other.block == (uint32_t)block_number + 1 && is_agent(other.who))
        fail("in flight", UNKNOWN, "%s of %s at byte %zu, which %s that has not been waited for may still %s", verb(access), memory, offset,
             (int)other.who < agent_of_warpgroup(warpgroups()) ? "a product" : "a tile's copy", before);
    if (other.block == (uint32_t)block_number + 1)
        fail("race", UNKNOWN, "%s of %s at byte %zu, not ordered after the %s by thread %d of the block", verb(access), memory, offset, before, other.who);
    fail("race", UNKNOWN, "%s of %s at byte %zu, not ordered with the %s by thread %d of block %u", verb(access), memory, offset, before, other.who, other.block - 1);
}

// Return one of the touches that the running thread's present does not come after; null: there is none.
static const Touch *unordered(const Touches &touches, bool shared) {
    if (!touches.two[0].block) return nullptr;  // nobody
    for (const Touch *t : {&touches.elsewhere, &touches.two[0], &touches.two[1]})
        if (!is_before_us(*t, shared)) return t;
    for (size_t i = 0; touches.more && i < most_touches(); i++)
        if (!is_before_us(touches.more[i], shared)) return &touches.more[i];
    return nullptr;
}

static void remember(Touches &touches, const Touch &now) {
    const auto take = [&](Touch &place) {
        if (place.block && place.block != now.block) touches.elsewhere = place;
        place = now;
    };
    for (Touch &place : touches.two)
        if (is_before_us(place, true)) return take(place);
    if (!touches.more) touches.more.reset(new Touch[most_touches()]());
    const size_t warps = (threads.size() + 31) / 32;
    Touch *of_warp = &touches.more[2 * (is_agent(now.who) ? warps + now.who - threads.size() : now.who / 32)];
    take(is_before_us(of_warp[0], true) ? of_warp[0] : of_warp[1]);
}

static void forget(Touches &touches) {
    if (!touches.two[0].block) return;
    touches.elsewhere = touches.two[0] = touches.two[1] = {};
    if (touches.more) std::fill_n(touches.more.get(), most_touches(), Touch());
}

static void touch_cell(Cell &cell, Access access, bool shared, const char *memory, size_t offset) {
    if (cell.in_flight)
        fail("in flight", UNKNOWN, "%s of %s at byte %zu, where an asynchronous copy that nobody waited for may write", verb(access), memory, offset);
    if (!is_before_us(cell.write, shared)) race(access, "write", cell.write, memory, offset);
    if (access != Access::read)
        if (const Touch *read = unordered(cell.reads, shared)) race(access, "read", *read, memory, offset);
    if (access != Access::atomic && cell.atomics)
        if (const Touch *atomic = unordered(*cell.atomics, shared)) race(access, "atomic", *atomic, memory, offset);
    const uint32_t block = block_number + 1;
    if (shared && access != Access::write && cell.write.block != block)
        fail("uninitialised", UNKNOWN, "%s of %s at byte %zu, which nobody has written", verb(access), memory, offset);
    if (shared && is_agent(we.who) && access == Access::read && !is_agent(cell.write.who) && cell.write.clock > known(visible, cell.write.who))
        fail("unfenced", UNKNOWN, "a product reads %s at byte %zu, but no fence_async_proxy stands after the write by thread %d", memory, offset, cell.write.who);
    const Touch now = {block, (uint32_t)we.who, we.clock};
    if (access == Access::read) {
        remember(cell.reads, now);
    } else if (access == Access::atomic) {
        if (!cell.atomics) cell.atomics.reset(new Touches());
        remember(*cell.atomics, now);
    } else {
        cell.write = now;
        forget(cell.reads);
        if (cell.atomics) forget(*cell.atomics);
    }
}

static void touch_region(Region &region, const char *p, size_t bytes, Access access, bool shared, const char *memory, const char *base) {
    if (region.cells.empty()) return;
    const size_t last = (p + bytes - 1 - region.begin) / GRAIN;
    for (size_t i = (p - region.begin) / GRAIN; i <= last; i++)
        touch_cell(region.cells[i], access, shared, memory, region.begin + i * GRAIN - base);
}

static Argument *argument_at(const char *p, size_t bytes, bool writable) {
    Argument *found = nullptr;
    for (Argument &a : array_arguments)
        if (p >= a.begin && p + bytes <= a.end && (!found || (writable && a.writable))) found = &a;
    return found;
}

[[noreturn]] static void out_of_bounds(const char *p, size_t bytes, Access access) {
    for (const Argument &a : array_arguments) {
        const ptrdiff_t offset = p - a.begin, size = a.end - a.begin;
        if (offset > -65536 && offset < size + 65536)
            fail("out of bounds", UNKNOWN, "%s of %zu bytes at byte %td of %s, which %s %td", verb(access), bytes, offset, a.name, a.begin ? "has" : "is null and has", size);
    }
    fail("out of bounds", UNKNOWN, "%s of %zu bytes at %p, which is nobody's memory", verb(access), bytes, (const void *)p);
}

void touch(const void *address, size_t bytes, Access access, Where where) {
    culprit = {nullptr, where};
    touch(address, bytes, access);
}

static void touch_memory(const char *p, size_t bytes, Access access) {
    if (p >= dynamic_region.begin && p < dynamic_region.begin + MOST_SHARED) {
        if (p + bytes > dynamic_region.end)
            fail("out of bounds", UNKNOWN, "%s of %zu bytes at byte %td of dynamic shared memory; the launch asked for %td", verb(access), bytes,
                 p - dynamic_region.begin, dynamic_region.end - dynamic_region.begin);
        return touch_region(dynamic_region, p, bytes, access, true, "dynamic shared memory", dynamic_region.begin);
    }
    if (p >= static_shared.begin && p + bytes <= static_shared.end)
        return touch_region(static_shared, p, bytes, access, true, "shared memory", static_shared.begin);
    if (Argument *a = argument_at(p, bytes, access != Access::read)) {
        if (access != Access::read && !a->writable) fail("read-only", UNKNOWN, "%s of %s, which is const", verb(access), a->name);
        return touch_region(*a->region, p, bytes, access, false, a->name, a->begin);
    }
    if (access == Access::read && p >= image_begin && p + bytes <= image_end) return;  // a constant
    if (access == Access::read && p >= (char *)&here && p + bytes <= (char *)(&here + 1)) return;  // threadIdx and its kin
    out_of_bounds(p, bytes, access);
}

void touch(const void *address, size_t bytes, Access access) {
    if (current < 0) return;
    if (late) timeout(UNKNOWN);
    if (!checking) return;
    const char *p = (const char *)address;
    if (p >= stack_of(current) && p < stack_of(current) + STACK_BYTES) return;  // the thread's own
    if (options.preempt && random_bits() % options.preempt == 0) {
        const Culprit before = culprit;
        yield();
        culprit = before;
    }
    we = {current, clocks[current], &heard[current]};
    touch_memory(p, bytes, access);
}

void touch_as(int agent, uint32_t clock, const Knowledge &knowledge, const void *address, size_t bytes, Access access, Where where) {
    if (!checking) return;
    culprit = {nullptr, where};
    we = {agent, clock, &knowledge};
    touch_memory((const char *)address, bytes, access);
}

static void mark_flight(const void *to, size_t bytes, bool in_flight) {
    if (!checking) return;
    const char *p = (const char *)to;
    for (Region *shared : {&static_shared, &dynamic_region})
        if (p >= shared->begin && p + bytes <= shared->end)
            for (size_t i = (p - shared->begin) / GRAIN; i <= (p + bytes - 1 - shared->begin) / GRAIN; i++) shared->cells[i].in_flight = in_flight;
}

void begin_flight(const void *to, size_t bytes) { mark_flight(to, bytes, true); }
void end_flight(const void *to, size_t bytes) { mark_flight(to, bytes, false); }

}  // namespace emulator

// ---- the calls that -fsanitize=thread puts into the kernel

using emulator::Access;
#define HOOK(name, kind, size)                                    \
    extern "C" void __tsan_##name(void *p) {                      \
        emulator::culprit = {__builtin_return_address(0), {}};    \
        emulator::touch(p, size, kind);                           \
    }
#define HOOKS(size)                                 \
    HOOK(read##size, Access::read, size)            \
    HOOK(write##size, Access::write, size)          \
    HOOK(unaligned_read##size, Access::read, size)  \
    HOOK(unaligned_write##size, Access::write, size)
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16)

extern "C" void __tsan_read_range(void *p, size_t n) { emulator::culprit = {__builtin_return_address(0), {}}, emulator::touch(p, n, Access::read); }
extern "C" void __tsan_write_range(void *p, size_t n) { emulator::culprit = {__builtin_return_address(0), {}}, emulator::touch(p, n, Access::write); }
extern "C" void __tsan_func_entry(void *) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_init() {}
extern "C" void *__tsan_memset(void *p, int c, size_t n) { return __tsan_write_range(p, n), memset(p, c, n); }
extern "C" void *__tsan_memcpy(void *to, const void *from, size_t n) { return __tsan_read_range((void *)from, n), __tsan_write_range(to, n), memcpy(to, from, n); }
extern "C" void *__tsan_memmove(void *to, const void *from, size_t n) { return __tsan_read_range((void *)from, n), __tsan_write_range(to, n), memmove(to, from, n); }

// ---- the calls that -fsanitize=bounds,alignment puts there: what an address does not tell

struct TypeName {
    uint16_t kind, information;
    char name[1];
};
struct BadIndex {
    const char *file;
    uint32_t line, column;
    const TypeName *array, *index;
};
struct BadPointer {
    const char *file;
    uint32_t line, column;
    const TypeName *type;
};

extern "C" void __ubsan_handle_out_of_bounds(BadIndex *bad, size_t index) {
    emulator::culprit = {__builtin_return_address(0), {}};
    emulator::fail("out of bounds", emulator::UNKNOWN, "index %td of %s", (ptrdiff_t)index, bad->array->name);
}
extern "C" void __ubsan_handle_type_mismatch_v1(BadPointer *bad, void *address) {
    emulator::culprit = {__builtin_return_address(0), {}};
    emulator::fail("misaligned", emulator::UNKNOWN, "access to %s at %p", bad->type->name, address);
}
