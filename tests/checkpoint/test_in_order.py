from __future__ import annotations

import threading

import pytest

from megatron_vilg.checkpoint.new_folder import InOrder


def test_calls_are_made_in_order_on_one_other_thread() -> None:
    made: list[tuple[int, int]] = []
    with InOrder(3) as calls:
        for number in range(100):
            calls.submit(lambda n: made.append((n, threading.get_ident())), number)
    assert [number for number, _ in made] == list(range(100))
    assert len({thread for _, thread in made} | {threading.get_ident()}) == 2


def test_the_caller_waits_for_more_than_so_many_calls() -> None:
    go_on, submitted = threading.Event(), []
    with InOrder(2) as calls:

        def submit_all() -> None:
            for number in range(4):
                calls.submit(go_on.wait, 10.0)
                submitted.append(number)

        caller = threading.Thread(target=submit_all)
        caller.start()
        caller.join(0.2)
        assert caller.is_alive() and submitted == [0, 1]
        go_on.set()
        caller.join(10.0)
    assert submitted == [0, 1, 2, 3]


@pytest.mark.parametrize("calls_behind", [0, 20])
def test_an_error_reaches_the_caller_and_drops_what_has_not_begun(calls_behind: int) -> None:
    made: list[int] = []

    def fail() -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"), InOrder(2) as calls:
        calls.submit(fail)
        for number in range(calls_behind):
            calls.submit(made.append, number)
    assert len(made) < 5


def test_an_error_of_the_caller_is_not_hidden_by_that_of_a_call() -> None:
    def fail() -> None:
        raise OSError("no space left")

    with pytest.raises(ValueError, match="of the caller"), InOrder(2) as calls:
        calls.submit(fail)
        raise ValueError("of the caller")
