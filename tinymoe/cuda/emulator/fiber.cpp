// The switch itself, for x86-64 and aarch64, and the stacks.
#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>

#if defined(__APPLE__)
#define SYMBOL "_emulator_switch"
#else
#define SYMBOL "emulator_switch"
#endif

#if defined(__x86_64__)
asm(".text\n"
    ".globl " SYMBOL "\n" SYMBOL ":\n"
    "  push %rbp\n  push %rbx\n  push %r12\n  push %r13\n  push %r14\n  push %r15\n"
    "  mov %rsp, (%rdi)\n"
    "  mov %rsi, %rsp\n"
    "  pop %r15\n  pop %r14\n  pop %r13\n  pop %r12\n  pop %rbx\n  pop %rbp\n"
    "  ret\n");
#elif defined(__aarch64__)
asm(".text\n"
    ".globl " SYMBOL "\n" SYMBOL ":\n"
    "  sub sp, sp, #160\n"
    "  stp x19, x20, [sp]\n  stp x21, x22, [sp, #16]\n  stp x23, x24, [sp, #32]\n  stp x25, x26, [sp, #48]\n"
    "  stp x27, x28, [sp, #64]\n  stp x29, x30, [sp, #80]\n"
    "  stp d8, d9, [sp, #96]\n  stp d10, d11, [sp, #112]\n  stp d12, d13, [sp, #128]\n  stp d14, d15, [sp, #144]\n"
    "  mov x9, sp\n  str x9, [x0]\n  mov sp, x1\n"
    "  ldp x19, x20, [sp]\n  ldp x21, x22, [sp, #16]\n  ldp x23, x24, [sp, #32]\n  ldp x25, x26, [sp, #48]\n"
    "  ldp x27, x28, [sp, #64]\n  ldp x29, x30, [sp, #80]\n"
    "  ldp d8, d9, [sp, #96]\n  ldp d10, d11, [sp, #112]\n  ldp d12, d13, [sp, #128]\n  ldp d14, d15, [sp, #144]\n"
    "  add sp, sp, #160\n"
    "  ret\n");
#else
#error "the emulator knows x86-64 and aarch64"
#endif

namespace emulator {

constexpr int MOST_THREADS = 1024;  // of a block

static char *stacks() {
    static char *memory = [] {
        void *m = mmap(nullptr, MOST_THREADS * STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
        for (int i = 0; i < MOST_THREADS; i++)
            mprotect((char *)m + i * STACK_BYTES, sysconf(_SC_PAGESIZE), PROT_NONE);
        return (char *)m;
    }();
    return memory;
}

char *stack_of(int i) { return stacks() + i * STACK_BYTES; }

void *new_fiber(int i, void (*body)()) {
    // Stacks lie a power of two apart: without the stagger all their tops would share one set of the cache.
    void **top = (void **)(stack_of(i) + STACK_BYTES - 64 - i % 32 * 320);
#if defined(__x86_64__)
    *--top = nullptr;  // where `body` would return to: it never does, and debuggers stop here
    *--top = (void *)body;
    top -= 6;
    memset(top, 0, 6 * sizeof *top);
#else
    top -= 20;
    memset(top, 0, 20 * sizeof *top);
    top[11] = (void *)body;  // x30
#endif
    return top;
}

}  // namespace emulator
