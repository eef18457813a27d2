// The scheduler: one block at a time, its threads as fibers that run until they must wait for each other.
//
// A pass visits every thread of the block in turn and runs those that are ready. A thread gives way when it waits: at a
// barrier, at a warp instruction, or for a condition. When a pass finds nobody ready, the block is deadlocked.
#include "scheduler.h"

#include <setjmp.h>
#include <signal.h>
#include <time.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "fiber.h"

namespace emulator {

constexpr int BARRIERS = 16;

Position here;
std::vector<Thread> threads;
int current = -1, block_number;
Options options;
std::mt19937 random_bits;
volatile sig_atomic_t late;

static int alive;               // threads of the block that have not exited
static int arrived[BARRIERS];   // threads that wait at each barrier
static void *scheduler_stack;   // the scheduler's stack pointer while a thread runs
static void (*kernel)(void **);
static void **arguments;
static bool failed;
static Report report;
static sigjmp_buf out_of_launch;
static const char *library_begin, *library_end;  // of the kernel
alignas(1024) static char dynamic_memory[MOST_SHARED];

unsigned lane() { return current % 32; }
char *dynamic_shared() { return dynamic_memory; }

// ---- failing

static void describe(const char *kind, Where where, const char *format, va_list values) {
    failed = true;
    report = {};
    snprintf(report.kind, sizeof report.kind, "%s", kind);
    vsnprintf(report.message, sizeof report.message, format, values);
    if (where.file) snprintf(report.file, sizeof report.file, "%s", where.file);
    report.line = where.line;
    report.block = here.block;
    report.thread = here.thread;
}

Culprit culprit;

void fail(const char *kind, Where where, const char *format, ...) {
    va_list values;
    va_start(values, format);
    describe(kind, where.file ? where : culprit.where, format, values);
    va_end(values);
    if (!where.file) report.address = culprit.instruction;
    siglongjmp(out_of_launch, 1);
}

void timeout(Where where) {
    fail("timeout", where, "the kernel ran for %g seconds of processor time without an end", options.seconds);
}

static void append(char *&to, const char *end, const char *format, ...) {
    va_list values;
    va_start(values, format);
    int n = vsnprintf(to, end - to, format, values);
    va_end(values);
    to = std::min(to + n, (char *)end - 1);
}

static void deadlock() {
    static const char *doing[] = {"runs", "waits at __syncthreads", "waits for its warp", "waits", "has exited"};
    char text[sizeof report.message], *to = text;
    const int n = threads.size();
    Where first = {nullptr, 0};
    append(to, text + sizeof text, "no thread of the block can go on:");
    for (int t = 0, u; t < n; t = u + 1) {  // neighbours that do the same in one line
        const Thread &a = threads[t];
        for (u = t; u + 1 < n && threads[u + 1].state == a.state && threads[u + 1].where.line == a.where.line;) u++;
        append(to, text + sizeof text, " %d-%d %s", t, u, doing[(int)a.state]);
        if (a.state != State::exited) {
            append(to, text + sizeof text, " (line %d)", a.where.line);
            if (!first.file) first = a.where, here.thread = a.index;
        }
        append(to, text + sizeof text, u + 1 < n ? ";" : "");
    }
    fail("deadlock", first, "%s", text);
}

// ---- switching

static void to_scheduler() { emulator_switch(&threads[current].stack_pointer, scheduler_stack); }

static void run(int t) {
    current = t;
    here.thread = threads[t].index;
    emulator_switch(&scheduler_stack, threads[t].stack_pointer);
    current = -1;
}

void yield() { to_scheduler(); }

static void wait_as(State state, Where where) {
    if (late) timeout(where);
    threads[current].state = state;
    threads[current].where = where;
}

// Return whether the collective that thread t is at includes thread u.
static bool meets(const Thread &thread, int t, int u) {
    if (thread.operation == Operation::warpgroup) return t / 128 == u / 128;
    return t / 32 == u / 32 && thread.mask >> u % 32 & 1;
}

static void open_barrier(int id);

static void thread_body() {
    kernel(arguments);
    check_no_copies(threads[current]);
    check_no_products();
    threads[current].state = State::exited;
    for (int t = current - current % 128; t < (int)threads.size() && t / 128 == current / 128; t++)
        if (threads[t].state == State::at_collective && meets(threads[t], t, current))
            fail("divergence", threads[t].where, "thread %d waits here for thread %d, which exits", t, current);
    alive--;
    if (arrived[0] && arrived[0] == alive) open_barrier(0);  // reports the divergence
    to_scheduler();
}

// ---- barriers

// All that barrier `id` waits for have arrived: let them go on.
static void open_barrier(int id) {
    static std::vector<int> meeting;
    meeting.clear();
    for (int t = 0; t < (int)threads.size(); t++)
        if (threads[t].state == State::at_barrier && threads[t].barrier == id) meeting.push_back(t);
    const Thread &first = threads[meeting[0]];
    for (int t : meeting)  // only __syncthreads is one place for all
        if (!first.barrier_count && (threads[t].where.line != first.where.line || strcmp(threads[t].where.file, first.where.file)))
            fail("divergence", threads[t].where, "threads %d and %d are at different barriers, at lines %d and %d", meeting[0], t,
                 first.where.line, threads[t].where.line);
    if (!first.barrier_count && alive < (int)threads.size())
        fail("divergence", first.where, "%d threads have exited and will never reach this barrier",
             (int)threads.size() - alive);
    arrived[id] = 0;
    if (meeting.size() == threads.size()) order_all();
    else order_some(meeting);
    for (int t : meeting) threads[t].state = State::ready;
}

void barrier(int id, int count, Where where) {
    Thread &me = threads[current];
    me.barrier = id;
    me.barrier_count = count;
    wait_as(State::at_barrier, where);
    if (++arrived[id] == (count ? count : alive)) open_barrier(id);
    if (me.state != State::ready) to_scheduler();
}

// ---- instructions of a warp, or of a warpgroup

void collective(Operation operation, unsigned mask, void *argument, Complete complete, Where where) {
    const int lanes = operation == Operation::warpgroup ? 128 : 32;
    const int first = current - current % lanes, size = threads.size();
    Thread &me = threads[current];
    me.operation = operation;
    me.mask = mask;
    me.argument = argument;
    if (!meets(me, current, current)) fail("divergence", where, "lane %d is not in its own mask %08x", current - first, mask);
    wait_as(State::at_collective, where);
    void *deposits[128] = {};
    for (int i = lanes - 1; i >= 0; i--) {
        const int t = first + i;
        if (!meets(me, current, t)) continue;
        if (t >= size || threads[t].state == State::exited)
            fail("divergence", where, "lane %d, which should be here too, does not exist or has exited", i);
        const Thread &other = threads[t];
        if (other.state != State::at_collective) return to_scheduler();  // a later lane will complete it
        if (!meets(other, t, current)) return to_scheduler();            // it meets others before
        const bool elsewhere = operation != Operation::sync_warp && other.where.line != where.line;
        if (other.operation != operation || other.mask != mask || elsewhere)
            fail("divergence", where, "the lane meets lane %d in another operation or mask, at line %d", i, other.where.line);
        deposits[i] = other.argument;
    }
    if (complete) complete(deposits, mask, where);
    static std::vector<int> meeting;
    meeting.clear();
    for (int t = first; t < first + lanes; t++)
        if (meets(me, current, t)) threads[t].state = State::ready, meeting.push_back(t);
    if (operation == Operation::sync_warp) order_some(meeting);  // a shuffle does not order memory
}

void wait_until(bool (*ready)(void *), void *argument, Where where) {
    if (ready(argument)) return;
    threads[current].ready = ready;
    threads[current].argument = argument;
    wait_as(State::waiting, where);
    to_scheduler();
}

// ---- the watchdog: a signal after so much processor time

#if defined(__linux__)
static const void *instruction(void *context) {
#if defined(__x86_64__)
    return (const void *)((ucontext_t *)context)->uc_mcontext.gregs[REG_RIP];
#else
    return (const void *)((ucontext_t *)context)->uc_mcontext.pc;
#endif
}

// The first bark only tells: a wait or a checked access is near, and knows its line. What comes to none is stopped by
// the next, wherever it is, unless that is outside of the kernel, perhaps amid an allocation.
static void bark(int, siginfo_t *, void *context) {
    const bool told = late;
    late = 1;
    const char *at = (const char *)instruction(context);
    if (!told || at < library_begin || at >= library_end) return;
    culprit = {at + 1, {}};
    timeout({nullptr, 0});
}

struct Watchdog {
    timer_t timer;
    struct sigaction before;
    bool set;

    Watchdog() : set(options.seconds > 0) {
        if (!set) return;
        struct sigaction action = {};
        action.sa_sigaction = bark;
        action.sa_flags = SA_SIGINFO;
        sigaction(SIGRTMIN + 7, &action, &before);
        struct sigevent event = {};
        event.sigev_notify = SIGEV_THREAD_ID;
        event.sigev_signo = SIGRTMIN + 7;
#ifdef sigev_notify_thread_id
        event.sigev_notify_thread_id = syscall(SYS_gettid);
#else
        event._sigev_un._tid = syscall(SYS_gettid);
#endif
        timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &timer);
        struct itimerspec limit = {};
        limit.it_interval.tv_nsec = 1000000;
        limit.it_value.tv_sec = (time_t)options.seconds;
        limit.it_value.tv_nsec = (long)((options.seconds - (double)limit.it_value.tv_sec) * 1e9) + 1;
        timer_settime(timer, 0, &limit, nullptr);
    }
    ~Watchdog() {
        if (!set) return;
        timer_delete(timer);
        sigaction(SIGRTMIN + 7, &before, nullptr);
    }
};
#else
struct Watchdog {};  // best effort elsewhere: an endless kernel is endless
#endif

// ---- launching

static void run_block(char *shared, char *shared_end, size_t dynamic_bytes) {
    memset(dynamic_memory, 0xFF, dynamic_bytes);  // NaN in every floating-point format: what is not set shows
    memset(shared, 0xFF, shared_end - shared);
    check_block();
    begin_block();
    const int n = threads.size();
    const Index size = here.block_size;
    for (int t = 0; t < n; t++) {
        Thread &thread = threads[t];
        thread.state = State::ready;
        thread.copies.clear();
        thread.copy_group = 0;
        thread.index = {t % size.x, t / size.x % size.y, t / size.x / size.y};
        thread.stack_pointer = new_fiber(t, thread_body);
    }
    alive = n;
    memset(arrived, 0, sizeof arrived);
    static std::vector<int> order;
    order.resize(n);
    for (int t = 0; t < n; t++) order[t] = options.schedule == reverse ? n - 1 - t : t;
    while (alive) {
        bool progress = false;
        if (options.schedule == shuffled) {
            std::shuffle(order.begin(), order.end(), random_bits);
            if (random_bits() % 2) finish_one_copy();
        }
        for (int t : order) {
            Thread &thread = threads[t];
            if (thread.state == State::waiting && thread.ready(thread.argument)) thread.state = State::ready;
            if (thread.state == State::ready) {
                progress = true;
                run(t);
            }
        }
        if (!progress && !finish_one_copy()) deadlock();
    }
    end_block();
}

static void run_grid(char *shared, char *shared_end, size_t dynamic_bytes) {
    const Index grid = here.grid_size;
    const size_t count = (size_t)grid.x * grid.y * grid.z;
    static std::vector<size_t> order;
    order.resize(count);
    for (size_t i = 0; i < count; i++) order[i] = options.schedule == reverse ? count - 1 - i : i;
    if (options.schedule == shuffled) std::shuffle(order.begin(), order.end(), random_bits);
    for (size_t i : order) {
        block_number = (int)i;
        here.block = {(unsigned)(i % grid.x), (unsigned)(i / grid.x % grid.y), (unsigned)(i / grid.x / grid.y)};
        run_block(shared, shared_end, dynamic_bytes);
    }
}

}  // namespace emulator

using namespace emulator;

// Run a kernel over a grid; return 0, or 1 with *why filled in. One launch at a time.
extern "C" int emulator_launch(void (*entry)(void **), void **values, const unsigned *grid, const unsigned *block, size_t dynamic_bytes,
                               const Options *how, const Buffer *buffers, int buffer_count, char *image, char *image_end,
                               char *shared, char *shared_end, Report *why) {
    here = {{}, {}, {block[0], block[1], block[2]}, {grid[0], grid[1], grid[2]}};
    kernel = entry;
    arguments = values;
    library_begin = image;
    library_end = image_end;
    options = *how;
    random_bits.seed(how->seed);
    threads.assign(block[0] * block[1] * block[2], {});
    failed = false;
    late = 0;
    culprit = {};
    Watchdog watchdog;
    if (!sigsetjmp(out_of_launch, 1)) {
        if (dynamic_bytes > MOST_SHARED)
            fail("launch", {nullptr, 0}, "%zu bytes of dynamic shared memory; a block has at most %zu", dynamic_bytes, MOST_SHARED);
        check_launch(buffers, buffer_count, image, image_end, shared, shared_end, dynamic_bytes);
        run_grid(shared, shared_end, dynamic_bytes);
    }
    current = -1;
    *why = report;
    return failed;
}
