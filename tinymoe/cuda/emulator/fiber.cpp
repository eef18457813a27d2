// The switch itself, for x86-64 and aarch64, and the stacks.
#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>

#if defined(__APPLE__)
#define SYMBOL(name) "_" name
#else
#define SYMBOL(name) name
#endif
#define FUNCTION(name) ".text\n.globl " SYMBOL(name) "\n" SYMBOL(name) ":\n"

// Every fiber begins here, with `body` in a register that the switch has popped. `.cfi_undefined` of where the return
// address would be tells debuggers that nobody called this: a fiber's stack ends here.
extern "C" void emulator_first();

#if defined(__x86_64__)
constexpr int SAVED = 7, BODY = 4, RETURN = 6;  // words that a switch pushes; which are rbx and the return address
asm(FUNCTION("emulator_switch")
    "  push %rbp\n  push %rbx\n  push %r12\n  push %r13\n  push %r14\n  push %r15\n"
    "  mov %rsp, (%rdi)\n"
    "  mov %rsi, %rsp\n"
    "  pop %r15\n  pop %r14\n  pop %r13\n  pop %r12\n  pop %rbx\n  pop %rbp\n"
    "  ret\n");
asm(FUNCTION("emulator_first")
    "  .cfi_startproc\n  .cfi_undefined rip\n"
    "  call *%rbx\n"
    "  .cfi_endproc\n");
#elif defined(__aarch64__)
constexpr int SAVED = 20, BODY = 0, RETURN = 11;  // x19 and x30
asm(FUNCTION("emulator_switch")
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
asm(FUNCTION("emulator_first")
    "  .cfi_startproc\n  .cfi_undefined x30\n"
    "  blr x19\n"
    "  .cfi_endproc\n");
#else
#error "the emulator knows x86-64 and aarch64"
#endif

namespace emulator {

constexpr int MOST_THREADS = 1024;  // of a block

// Pages have 4 KiB here, 16 on Apple's processors and 64 on some servers': the guard comes on top of the stack.
static const size_t GUARD_BYTES = sysconf(_SC_PAGESIZE), STRIDE = GUARD_BYTES + STACK_BYTES;

static char *stacks() {
    static char *memory = [] {
        void *m = mmap(nullptr, MOST_THREADS * STRIDE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
        for (int i = 0; i < MOST_THREADS; i++) mprotect((char *)m + i * STRIDE, GUARD_BYTES, PROT_NONE);
        return (char *)m;
    }();
    return memory;
}

char *stack_of(int i) { return stacks() + i * STRIDE + GUARD_BYTES; }

void *new_fiber(int i, void (*body)()) {
    // Stacks lie whole pages apart: without the stagger all their tops would share one set of the cache.
    void **top = (void **)(stack_of(i) + STACK_BYTES - 64 - i % 32 * 320);
    top -= SAVED;
    memset(top, 0, SAVED * sizeof *top);
    top[BODY] = (void *)body;
    top[RETURN] = (void *)emulator_first;
    return top;
}

}  // namespace emulator
