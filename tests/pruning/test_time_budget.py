"""How a time limit is shared out, on a clock that the tests move."""

import pytest

from sparsekit.pruning.time_budget import TimeBudget


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def sweeps(budget: TimeBudget, clock: Clock, size: int, falls: list[float], seconds: float) -> int:
    """Rounds that a weight gets whose loss falls by `falls`, at so many seconds each."""
    done, fall = 0, None
    with budget.weight(size) as should_continue:
        while done < len(falls) and should_continue(fall):
            clock.now += seconds
            fall = falls[done]
            done += 1
    return done


def test_first_block_gets_its_even_share():
    clock = Clock()
    budget = TimeBudget(40.0, [100, 100], clock)  # 20 s a block, 10 s for each half of one
    assert sweeps(budget, clock, 50, [0.1] * 99, seconds=1.0) == 10
    assert sweeps(budget, clock, 50, [0.1] * 99, seconds=1.0) == 10


def test_later_weight_whose_loss_falls_slower_stops_and_a_faster_one_goes_on():
    clock = Clock()
    budget = TimeBudget(400.0, [100] * 4, clock)
    first = sweeps(budget, clock, 100, [0.1] * 999, seconds=1.0)
    assert first == 100  # an even share; from now on 0.1 * 100 numbers a second is the least rate
    assert sweeps(budget, clock, 100, [0.5, 0.3, 0.2, 0.05, 0.05], seconds=1.0) == 4
    assert sweeps(budget, clock, 100, [0.5] * 999, seconds=1.0) > 150


def test_limit_is_kept_whatever_the_losses_do():
    clock = Clock()
    budget = TimeBudget(100.0, [10] * 10, clock)
    for _ in range(10):
        sweeps(budget, clock, 10, [1.0] * 999, seconds=0.5)
        clock.now += 1.0  # other work of the block
    assert 80 < clock.now <= 105


def test_other_work_of_blocks_to_come_is_put_aside():
    clock = Clock()
    budget = TimeBudget(100.0, [10] * 5, clock)
    clock.now += 10.0  # of the first block
    first = sweeps(budget, clock, 10, [0.1] * 999, seconds=1.0)
    assert first == 18  # 90 s / 5: that blocks need other work is not known yet
    clock.now += 10.0
    # 62 s are left, of which the three blocks after this one take at least 10 s each.
    assert sweeps(budget, clock, 10, [9.0] * 999, seconds=1.0) < 62 / 4 * 3 - 15


def test_weights_without_time_left_get_no_round():
    clock = Clock()
    budget = TimeBudget(1.0, [10, 10], clock)
    clock.now += 5.0
    assert sweeps(budget, clock, 10, [0.1] * 9, seconds=1.0) == 0


def test_weight_that_ends_by_itself_leaves_its_time_to_the_others():
    clock = Clock()
    budget = TimeBudget(40.0, [100, 100], clock)
    assert sweeps(budget, clock, 50, [0.1], seconds=1.0) == 1
    assert sweeps(budget, clock, 50, [0.1] * 99, seconds=1.0) == pytest.approx(
        13, abs=1
    )  # 39 s / 3
