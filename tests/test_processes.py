"""Processes side by side: results in order, errors whole, progress told on."""

import os
from contextlib import contextmanager

import pytest
import torch

from recall_merge.runtime.errors import DataError, Fault
from recall_merge.runtime.processes import local_executor, side_by_side


class Heard:
    def __init__(self):
        self.stages = {}

    @contextmanager
    def stage(self, label, total, unit):
        self.stages[label] = [total, unit, 0]

        def advance(amount):
            self.stages[label][2] += amount

        yield advance


def square(number, progress):
    with progress.stage(f"square of {number}", number, "steps") as advance:
        for _ in range(number):
            advance(1)
    return number**2, os.getpid(), torch.get_num_threads()


def fail(number, progress):
    if number == 2:
        raise DataError([Fault("two is no number", "here", "take three"), Fault("nor is it one")])
    return number


def test_results_in_order_one_thread_each_and_progress():
    heard = Heard()
    found = side_by_side(square, [(3,), (1,), (2,)], 2, heard)
    assert [result for result, _, _ in found] == [9, 1, 4]
    assert os.getpid() not in {process for _, process, _ in found}
    assert {threads for _, _, threads in found} == {1}
    assert heard.stages == {f"square of {number}": [number, "steps", number] for number in (1, 2, 3)}


def test_errors_come_whole():
    with pytest.raises(DataError) as caught:
        side_by_side(fail, [(1,), (2,)], 2, Heard())
    assert caught.value.faults == (Fault("two is no number", "here", "take three"), Fault("nor is it one"))


def test_a_task_has_one_thread_in_this_process_too():
    """A training gives other bytes on two threads, so one worker and several must agree on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with local_executor(1) as executor:
            assert executor.submit("threads", torch.get_num_threads).result() == 1
            with pytest.raises(DataError):
                executor.submit("fails", fail, 2, None).result()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
