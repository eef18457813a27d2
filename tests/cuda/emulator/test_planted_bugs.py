"""Every bug of kernels/planted_bugs.cu is caught in every schedule, where it stands, and its correct twin never is."""

import itertools
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from tinymoe.cuda import device
from tinymoe.cuda.emulator import Array, KernelError, Library, scheduled

SOURCE = Path(__file__).parent / "kernels" / "planted_bugs.cu"
SCHEDULES = [("forward", 0, 0), ("reverse", 0, 0), ("reverse", 1, 3)] + [
    ("shuffled", seed, preempt) for seed, preempt in itertools.product(range(3), (0, 2, 10))
]


class Bug(NamedTuple):
    """A kernel's bug, and how to launch it."""

    kernel: str
    kind: str  # of the error in the forward order
    or_else: str | None = None  # in another
    thread: int | None = None  # that is caught in the forward order, if only one can be
    block: int = 0
    blocks: int = 1
    threads: int = 64
    shared: int = 0
    same: bool = False  # in and out are one array
    seconds: float = 60.0


BUGS = [
    Bug("read_beyond_the_end", "out of bounds", thread=63, block=1, blocks=2),
    Bug("read_before_the_beginning", "out of bounds", thread=0, blocks=2),
    Bug("write_beyond_the_end", "out of bounds", thread=63, block=1, blocks=2),
    Bug("beyond_static_shared", "out of bounds", thread=0),
    Bug("beyond_dynamic_shared", "out of bounds", thread=0, shared=256),
    Bug("too_little_dynamic_shared", "out of bounds", thread=0, shared=256),
    Bug("beyond_a_local_array", "out of bounds", thread=0),
    Bug("null_array", "out of bounds", thread=0),
    Bug("write_to_const", "read-only", thread=0),
    Bug("misaligned_vector", "misaligned", thread=0),
    Bug("no_barrier_before_reading", "race"),
    Bug("no_barrier_before_overwriting", "race"),
    Bug("no_barrier_in_a_sum", "race"),
    Bug("no_syncwarp", "race"),
    Bug("syncwarp_where_the_block_must_meet", "race"),
    Bug("heard_from_another", "race", threads=32),
    Bug("lost_update", "race"),
    Bug("read_beside_atomics", "race"),
    Bug("write_beside_atomics", "race"),
    Bug("uninitialised_shared", "uninitialised", thread=0),
    Bug("update_from_every_block", "race", thread=0, block=1, blocks=3),
    Bug("in_place", "race", same=True),
    Bug("neighbour_of_another_block", "race", thread=0, block=1, blocks=2, same=True),
    Bug("barrier_in_a_branch", "divergence"),
    Bug("exit_before_a_barrier", "divergence"),
    Bug("two_barriers", "divergence"),
    Bug("barrier_or_syncwarp", "deadlock"),
    Bug("shuffle_with_an_absent_lane", "divergence", threads=48),
    Bug("shuffle_after_an_exit", "divergence"),
    Bug("shuffle_outside_the_mask", "divergence"),
    Bug("lane_outside_its_mask", "divergence"),
    Bug("different_operations", "divergence"),
    Bug("different_shuffles", "divergence"),
    Bug("copy_without_a_wait", "in flight"),
    Bug("copy_without_a_barrier", "race"),
    Bug("wait_for_too_few_groups", "in flight"),
    Bug("read_before_the_wait", "in flight", thread=0),
    Bug("write_before_the_wait", "in flight", thread=0),
    Bug("stage_overwritten_while_read", "race", or_else="in flight"),
    Bug("misaligned_copy", "misaligned", thread=0),
    Bug("copy_from_beyond_the_end", "out of bounds", thread=16),
    Bug("endless", "timeout", seconds=0.05),
    Bug("endless_with_barriers", "timeout", seconds=0.05),
]
each_bug = pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.kernel)


@pytest.fixture(scope="module")
def library():
    expressions = [f"{bug.kernel}<{right}>" for bug in BUGS for right in ("true", "false")]
    return Library(SOURCE, expressions, "checked")


def launch(library, bug, right, schedule):
    """Launch a bug or its twin and return what it wrote."""
    n = bug.blocks * bug.threads
    buffer = device.empty(2 * n, np.int32)
    buffer[:n], buffer[n:] = np.arange(n), 0
    there = Array(buffer.ctypes.data, 4 * n, False, "in")
    out = Array(buffer.ctypes.data + (0 if bug.same else 4 * n), 4 * n, True, "out")
    with scheduled(*schedule, seconds=bug.seconds if not right else 60.0):
        library.launch(
            f"{bug.kernel}<{str(right).lower()}>",
            (bug.blocks, 1, 1),
            (bug.threads, 1, 1),
            [out, there, Array(0, 0, False, "none")],
            bug.shared,
        )
    return buffer


def lines_of(kernel):
    """Return the lines of a kernel that say that it is caught there."""
    body = re.search(rf"__global__ void {kernel}\(.*?\n\}}\n", SOURCE.read_text(), re.DOTALL)
    first = SOURCE.read_text()[: body.start()].count("\n") + 1
    return [first + i for i, line in enumerate(body[0].splitlines()) if "// caught" in line]


@each_bug
def test_bug_is_caught_where_it_stands(library, bug):
    for schedule in SCHEDULES[:1] if bug.kind == "timeout" else SCHEDULES:
        with pytest.raises(KernelError) as caught:
            launch(library, bug, False, schedule)
        error = caught.value
        kinds = [bug.kind] if schedule[0] == "forward" else [bug.kind, bug.or_else]
        assert error.kind in kinds, (schedule, error)
        assert error.line in lines_of(bug.kernel), (schedule, error)
        assert Path(error.file) == SOURCE
        if bug.thread is not None and schedule[0] == "forward":
            assert (error.block, error.thread) == ((bug.block, 0, 0), (bug.thread, 0, 0)), error


@each_bug
def test_correct_twin_passes_in_every_schedule(library, bug):
    first = launch(library, bug, True, SCHEDULES[0])
    for schedule in SCHEDULES[1:]:
        assert np.array_equal(launch(library, bug, True, schedule), first), schedule
