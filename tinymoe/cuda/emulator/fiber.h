// Fibers: stacks that hand the processor to each other. Every CUDA thread of the running block is one.
//
// A switch pushes the registers that a function must preserve, swaps the stack pointer, and pops the other fiber's: a
// few nanoseconds, against hundreds for swapcontext (which makes a system call) and thousands for an operating system's
// thread. That is what makes a block of 256 threads that meet at a barrier affordable on one core.
#pragma once
#include <cstddef>

namespace emulator {

constexpr size_t STACK_BYTES = 64 << 10;  // of each fiber; a guard page lies below

// Return the lowest address of fiber i's stack.
char *stack_of(int i);

// Prepare fiber i to call `body` when it is switched to for the first time; return its stack pointer.
void *new_fiber(int i, void (*body)());

}  // namespace emulator

// Save the running fiber's stack pointer to *save and continue the one whose stack pointer is `load`.
extern "C" void emulator_switch(void **save, void *load);
