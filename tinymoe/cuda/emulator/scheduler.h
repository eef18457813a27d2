// What the runtime's own files share: the threads of the running block and the launch they belong to.
#pragma once
#include <signal.h>

#include <random>
#include <vector>

#include "runtime.h"

namespace emulator {

enum class State : uint8_t { ready, at_barrier, at_collective, waiting, exited };

constexpr size_t MOST_SHARED = 227 << 10;  // bytes of dynamic shared memory, as on Hopper
constexpr size_t MOST_TOUCHERS = 2048;     // threads and agents of a block

struct Copy {  // an asynchronous copy on its way
    void *to;
    const void *from;
    int bytes, valid;
    int group;
    bool done;  // the data has moved; nobody may rely on it yet
    Where where;
};

struct Thread {
    void *stack_pointer;
    Index index;
    State state;
    Where where;  // the line it waits at
    int barrier, barrier_count;
    Operation operation;
    unsigned mask;
    void *argument;  // of the collective, or of `ready`
    bool (*ready)(void *);
    std::vector<Copy> copies;
    int copy_group;
};

enum Schedule : int { forward = 0, reverse = 1, shuffled = 2 };  // the order of threads in a pass, and of blocks

struct Options {
    int schedule;
    int seed;
    int preempt;  // switch to another thread at one checked access in so many; 0: never
    int checked;
    double seconds;  // of processor time until the watchdog ends the launch
};

struct Buffer {  // an array argument
    const char *begin;
    size_t bytes;
    int writable;
    const char *name;
};

struct Report {  // of a launch that failed
    char kind[32];
    char message[2048];
    Index block, thread;
    char file[512];
    int line;
    const void *address;  // of the failing instruction, when no line is known
};

struct Culprit {  // of the access under way: an instruction of the kernel, or a line
    const void *instruction;
    Where where;
};

extern Culprit culprit;
extern std::vector<Thread> threads;  // of the running block
extern int current;                  // the running one; −1: none
extern int block_number;             // linear
extern Options options;
extern std::mt19937 random_bits;
extern volatile sig_atomic_t late;  // the watchdog has barked

[[noreturn]] void timeout(Where where);
void yield();  // let other threads run; the running one stays ready

// checker.cpp
void check_launch(const Buffer *buffers, int count, char *image, char *image_end, char *shared, char *shared_end,
                  size_t dynamic_bytes);
void check_block();                                // a new block begins
void order_all();                                  // all threads of the block have met
void order_some(const std::vector<int> &meeting);  // these have
using Knowledge = std::vector<uint32_t>;           // of each thread and agent, the newest clock that comes before
void merge(Knowledge &into, const Knowledge &from);
Knowledge release();                          // what the running thread knows, its own past included
void learn(const Knowledge &knowledge);       // the running thread comes after all that
Knowledge known_to_all(int first, int count);  // what each of so many threads knows
int new_agent();                              // that works beside the threads
int warpgroups();
int agent_of_warpgroup(int warpgroup);
void touch_as(int agent, uint32_t clock, const Knowledge &knowledge, const void *address, size_t bytes, Access access, Where where);
void begin_flight(const void *to, size_t bytes);  // an asynchronous write may happen from now on
void end_flight(const void *to, size_t bytes);

// asynchronous.cpp
void finish(Copy &copy);  // move it, if that is still to come
void check_no_copies(const Thread &thread);

// hopper.cpp
void begin_block();
bool finish_one_copy();    // of those that a barrier waits for; false: there is none
void check_no_products();  // when the running thread exits
void end_block();

}  // namespace emulator
