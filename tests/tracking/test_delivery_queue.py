"""Deliveries by a thread: in order, lost with a warning, never in the way."""

import threading
import time

import pytest

from slm_ray.tracking import delivery_queue
from slm_ray.tracking.delivery_queue import DeliveryQueue


def fail() -> None:
    raise RuntimeError("no answer\nand a long story")


def test_calls_are_made_in_order_and_flush_waits_for_them() -> None:
    made: list[int] = []
    box = DeliveryQueue("the store", print)
    for number in range(100):
        box.put(lambda number=number: made.append(number))
    assert box.flush()
    assert made == list(range(100))


def test_failures_are_said_once_and_their_end_too() -> None:
    said: list[str] = []
    box = DeliveryQueue("the store", said.append)
    for call in (fail, fail, lambda: None):
        box.put(call)
    assert box.flush()
    assert said == [
        "the store does not take the records, the run goes on without: no answer",
        "the store takes records again; 2 were lost",
    ]


def test_records_that_were_lost_to_the_end_are_counted() -> None:
    said: list[str] = []
    box = DeliveryQueue("the store", said.append)
    for _ in range(3):
        box.put(fail)
    assert box.flush()
    assert said[1:] == ["the store did not take 3 records"]
    assert box.flush()
    assert len(said) == 2


def test_a_receiver_that_hangs_holds_nothing_up() -> None:
    said: list[str] = []
    box, is_over = DeliveryQueue("the store", said.append), threading.Event()
    box.put(is_over.wait)
    box.put(lambda: None)
    assert not box.flush(timeout_s=0.05)
    assert said == ["the store did not take the last 2 records within 0.05 s"]
    is_over.set()
    assert box.flush()


def test_no_more_than_so_many_wait() -> None:
    said: list[str] = []
    box, is_over = DeliveryQueue("the store", said.append), threading.Event()
    box.put(is_over.wait)
    made: list[int] = []
    for _ in range(delivery_queue.CAPACITY + 5):
        box.put(lambda: made.append(1))
    is_over.set()
    assert box.flush()
    assert len(made) == delivery_queue.CAPACITY - 1
    assert "10,000 records are waiting" in said[0]


def test_a_warning_that_cannot_be_written_is_no_matter() -> None:
    def warn(text: str) -> None:
        raise OSError("disk full")

    box = DeliveryQueue("the store", warn)
    made: list[int] = []
    box.put(fail)
    box.put(lambda: made.append(1))
    assert box.flush()
    assert made == [1]


def test_the_thread_of_a_silent_queue_ends_and_the_next_call_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tune's process trains trial after trial, each with three queues."""
    monkeypatch.setattr(delivery_queue, "SILENT_S", 0.01)
    box, names = DeliveryQueue("the quiet store", print), lambda: [thread.name for thread in threading.enumerate()]
    made: list[int] = []
    for number in range(3):
        box.put(lambda number=number: made.append(number))
        assert box.flush()
        deadline = time.monotonic() + 10
        while "delivery to the quiet store" in names() and time.monotonic() < deadline:
            time.sleep(0.005)
        assert "delivery to the quiet store" not in names()
    assert made == [0, 1, 2]


def test_where_no_thread_can_be_begun_a_call_is_lost_and_the_work_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread is begun at any step, not at the first one alone: a limit of threads would end a training there."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    said: list[str] = []
    made: list[int] = []
    box = DeliveryQueue("the store", said.append)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        box.put(lambda: made.append(0))
    box.put(lambda: made.append(1))
    assert box.flush(timeout_s=10)
    assert made == [1]
    assert said == [
        "the store does not take the records, the run goes on without: can't start new thread",
        "the store takes records again; 1 were lost",
    ]
