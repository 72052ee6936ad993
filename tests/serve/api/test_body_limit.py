"""Slow bodies: who sends them, however many and however small their parts, takes nobody else's place."""

import asyncio
from typing import Any

import pytest

from serve.api import middleware
from serve.api.middleware import ARRIVING_FOR_FEW, MAX_ARRIVING, MAX_BODIES_OF_ONE, BodyLimitMiddleware


async def never(*_: object) -> dict[str, Any]:
    await asyncio.sleep(3600)
    raise AssertionError


async def whole() -> dict[str, Any]:
    await asyncio.sleep(0.001)  # through Ray's proxy it takes a moment
    return {"type": "http.request", "body": b"{}", "more_body": False}


async def ask(limit: BodyLimitMiddleware, address: str, receive: Any) -> int:
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/generate", "client": (address, 1), "headers": []}
    await limit(scope, receive, send)
    return int(sent[0]["status"])


async def answer(_scope: Any, _receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})


def test_slow_bodies_of_one_address_leave_room_for_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "LATE_S", 0.05)

    async def run() -> None:
        limit = BodyLimitMiddleware(answer, 100)
        tasks = [asyncio.create_task(ask(limit, "10.0.0.1", never)) for _ in range(MAX_BODIES_OF_ONE)]
        await asyncio.sleep(0.2)
        assert await ask(limit, "10.0.0.1", never) == 429
        monkeypatch.setattr(middleware, "LATE_S", 60.0)  # on a busy machine five hundred take longer than those above
        burst = [ask(limit, "10.0.0.1", whole) for _ in range(MAX_ARRIVING - ARRIVING_FOR_FEW)]
        assert set(await asyncio.gather(*burst)) == {200}, "whole bodies of a hundred readers behind one proxy"
        assert await ask(limit, "10.0.0.2", whole) == 200
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert await ask(limit, "10.0.0.1", whole) == 200

    asyncio.run(run())


def test_late_bodies_of_one_network_of_version_6_are_of_one_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client may send each request from another address of it."""
    monkeypatch.setattr(middleware, "LATE_S", 0.001)

    async def run() -> None:
        limit = BodyLimitMiddleware(answer, 100)
        tasks = [asyncio.create_task(ask(limit, f"2001:db8::{n:x}", never)) for n in range(MAX_BODIES_OF_ONE)]
        await asyncio.sleep(0.2)
        assert await ask(limit, "2001:db8::ffff:1:2", never) == 429
        assert await ask(limit, "2001:db8:0:1::1", whole) == 200
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(run())


def test_bodies_of_one_address_that_are_not_late_yet_leave_room_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six hundred new requests a second, each with a head alone, would else answer 429 to everybody."""
    monkeypatch.setattr(middleware, "LATE_S", 60.0)

    async def run() -> None:
        limit = BodyLimitMiddleware(answer, 100, 3600)
        tasks = [asyncio.create_task(ask(limit, "10.0.0.1", never)) for _ in range(MAX_ARRIVING)]
        await asyncio.sleep(0)
        assert await ask(limit, "10.0.0.1", whole) == 429
        others = [ask(limit, f"10.0.1.{number % 100}", whole) for number in range(ARRIVING_FOR_FEW)]
        assert set(await asyncio.gather(*others)) == {200}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert await ask(limit, "10.0.0.1", whole) == 200

    asyncio.run(run())


@pytest.mark.parametrize("is_whole", [True, False])
def test_a_body_that_comes_byte_by_byte_is_held_as_one(is_whole: bool) -> None:
    """A message of one byte takes 400: 64 KiB of them, of 32 clients, were gigabytes."""
    end: dict[str, Any] = {"type": "http.request"} if is_whole else {"type": "http.disconnect"}
    coming = iter([{"type": "http.request", "body": b"x", "more_body": True} for _ in range(100)] + [end])
    got: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return next(coming)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        got.append(await receive())
        if got[0]["more_body"]:
            got.append(await receive())
        await answer(scope, receive, send)

    assert asyncio.run(ask(BodyLimitMiddleware(app, 100), "10.0.0.1", receive)) == 200
    expected = [{"type": "http.request", "body": b"x" * 100, "more_body": not is_whole}]
    assert got == expected + ([] if is_whole else [end])
