"""Workers: a map over threads, with one BLAS thread each."""

import os
import platform
import threading

import numpy as np
import pytest
from threadpoolctl import ThreadpoolController

from tinymoe import workers


def blas_threads():
    return [library.num_threads for library in ThreadpoolController().select(user_api="blas").lib_controllers]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_results_come_in_the_order_of_the_arguments(number):
    assert workers.run(lambda a, b: (a, b), range(10), "abcdefghij", workers=number) == list(enumerate("abcdefghij"))


def test_calls_run_side_by_side():
    barrier = threading.Barrier(3, timeout=30)  # broken unless three wait at once
    assert sorted(workers.run(lambda _: barrier.wait(), range(3), workers=3)) == [0, 1, 2]


def test_one_worker_is_the_calling_thread():
    assert workers.run(lambda _: threading.get_ident(), range(2), workers=1) == [threading.get_ident()] * 2


@pytest.mark.parametrize("number", [1, 2])
def test_blas_has_one_thread_inside_and_its_own_number_after(number):
    controller = ThreadpoolController()
    with controller.limit(limits=2, user_api="blas"):
        before = blas_threads()
        assert before
        inside = workers.run(lambda _: blas_threads(), range(2), workers=number)
        assert inside == [[1] * len(before)] * 2
        assert blas_threads() == before


@pytest.mark.parametrize("number", [1, 2])
def test_an_error_reaches_the_caller_and_blas_has_its_threads_again(number):
    before = blas_threads()
    with pytest.raises(ZeroDivisionError):
        workers.run(lambda a: 1 / a, [1, 0, 1], workers=number)
    assert blas_threads() == before
    assert workers.run(abs, [-1, 2], workers=number) == [1, 2]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep memory")
def test_memory_that_was_freed_is_used_again_without_page_faults():
    import resource

    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        np.ones(2**23)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    with workers.kept_memory():
        faults()
        assert faults() < 50  # of 16,384 pages, or of 32 huge ones and the rest


def test_usable_cores_are_those_this_process_may_run_on(monkeypatch):
    assert 1 <= workers.usable_cores() <= os.cpu_count()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5}, raising=False)
    assert workers.usable_cores() == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    assert workers.usable_cores() == os.cpu_count()
