"""Calls of a thread: how often, from where, and what happens at the end."""

import threading

from slm_ray.periodic import every


def test_it_calls_until_the_block_ends_and_once_more() -> None:
    calls: list[str] = []
    seen = threading.Event()

    def call() -> None:
        calls.append(threading.current_thread().name)
        seen.set()

    with every(0.01, call, at_start=lambda: calls.append("start")):
        assert seen.wait(10)
        seen.clear()
    assert seen.is_set()  # the last one, which the block waited for
    assert calls[0] == "start" and len(calls) >= 3
    assert threading.current_thread().name not in calls


def test_a_block_that_ends_with_an_error_has_its_last_call_too() -> None:
    calls: list[int] = []
    try:
        with every(60, lambda: calls.append(1)):
            raise KeyError
    except KeyError:
        pass
    assert calls == [1]


def test_where_no_last_call_is_wanted_nothing_is_waited_for() -> None:
    calls: list[int] = []
    with every(60, lambda: calls.append(1), at_end=False):
        pass
    assert calls == []
