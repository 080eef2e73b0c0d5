"""Work in threads, bounded."""

import threading
import time
from contextlib import closing

import pytest
import torch

from d2qconv.threads import each


def test_results_come_in_order_when_asked():
    def work(n):
        time.sleep(0.01 * (n % 3 == 0))
        return n * n

    found = list(each(range(20), work, cost=lambda n: 1, budget=5, in_order=True, n_threads=4))
    assert found == [(n, n * n) for n in range(20)]
    found = list(each(range(20), work, cost=lambda n: 1, budget=5, in_order=False, n_threads=4))
    assert sorted(found) == [(n, n * n) for n in range(20)]
    assert list(each([], work, cost=lambda n: 1, budget=1, in_order=True)) == []


@pytest.mark.parametrize("in_order", [False, True])
def test_the_budget_holds_until_a_result_was_used(in_order):
    costs = [3, 9, 1, 1, 5, 4, 2, 30, 1, 8, 2]
    held, most, lock = 0, [], threading.Lock()

    def work(cost):
        nonlocal held
        with lock:
            held += cost
            most.append(held)
        time.sleep(0.002)
        return cost

    for _, cost in each(costs, work, cost=lambda c: c, budget=10, in_order=in_order, n_threads=8):
        with lock:
            held -= cost
    assert held == 0
    # One job is larger than the budget, and then it is alone.
    assert sorted(most)[-1] == 30
    assert all(h <= 10 or h == 30 for h in most)
    assert max(h for h in most if h <= 10) > 5


def test_jobs_run_at_the_same_time():
    meet = threading.Barrier(3)
    assert (
        len(list(each(range(3), lambda n: meet.wait(5), cost=len_1, budget=9, in_order=False, n_threads=3)))
        == 3
    )


def len_1(_):
    return 1


@pytest.mark.parametrize("in_order", [False, True])
def test_an_error_ends_it(in_order):
    started = []

    def work(n):
        started.append(n)
        if n == 2:
            raise KeyError(n)
        time.sleep(0.001)

    with pytest.raises(KeyError):
        list(each(range(500), work, cost=len_1, budget=4, in_order=in_order, n_threads=2))
    assert len(started) < 100
    assert threading.active_count() == 1 or not any("ThreadPool" in t.name for t in threading.enumerate())


def test_torch_has_one_thread_inside_and_its_own_number_after():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        inside = each(
            range(4), lambda n: torch.get_num_threads(), cost=len_1, budget=9, in_order=True, n_threads=2
        )
        assert [n for _, n in inside] == [1, 1, 1, 1]
        assert torch.get_num_threads() == 3
        with closing(each(range(4), len_1, cost=len_1, budget=9, in_order=True)) as results:
            next(results)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
