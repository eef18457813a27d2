// cp.async: copies from global to shared memory that happen at some moment between their issue and their wait.
//
// A kernel that is right only for one of those moments is wrong. So the data moves as late as is legal (in the forward
// schedule), as early (reverse), or at random; and the checker takes the destination as written from the issue on.
#include <cstring>

#include "scheduler.h"

namespace emulator {

static void move(Copy &copy) {
    memcpy(copy.to, copy.from, copy.valid);
    memset((char *)copy.to + copy.valid, 0, copy.bytes - copy.valid);
    copy.done = true;
}

void copy_asynchronously(void *to, const void *from, int bytes, int valid, Where where) {
    if ((uintptr_t)to % bytes || (valid && (uintptr_t)from % bytes))
        fail("misaligned", where, "an asynchronous copy of %d bytes needs addresses that are multiples of it", bytes);
    Thread &thread = threads[current];
    if (valid) touch(from, valid, Access::read, where);
    touch(to, bytes, Access::write, where);
    begin_flight(to, bytes);
    thread.copies.push_back({to, from, bytes, valid, thread.copy_group, false, where});
    if (options.schedule == reverse || (options.schedule == shuffled && random_bits() % 2)) move(thread.copies.back());
}

void commit_copies() { threads[current].copy_group++; }

void finish(Copy &copy) {
    if (!copy.done) move(copy);
    end_flight(copy.to, copy.bytes);
}

void wait_for_copies(int groups_left) {
    Thread &thread = threads[current];
    std::vector<Copy> left;
    for (Copy &copy : thread.copies) {
        if (copy.group >= thread.copy_group - groups_left) {
            left.push_back(copy);
            continue;
        }
        finish(copy);
        touch(copy.to, copy.bytes, Access::write, copy.where);
    }
    thread.copies = left;
}

void check_no_copies(const Thread &thread) {
    if (!thread.copies.empty())
        fail("in flight", thread.copies[0].where, "the thread exits before its asynchronous copy was waited for");
}

}  // namespace emulator
