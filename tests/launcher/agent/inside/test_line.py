"""The connection between a client and a session, over real sockets."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from launcher.agent.inside.line import MAX_MESSAGE, OUTPUT, Line, NotTrusted, admit, introduce

KEY = secrets.token_bytes(32)

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def sockets() -> AsyncIterator[tuple[Streams, Streams]]:
    """Both ends of a connection."""
    accepted: asyncio.Queue[Streams] = asyncio.Queue()
    server = await asyncio.start_server(lambda *streams: accepted.put_nowait(streams), "127.0.0.1", 0)
    dialled = await asyncio.open_connection(*server.sockets[0].getsockname())
    client = await accepted.get()
    try:
        yield client, dialled
    finally:
        for _, writer in (client, dialled):
            writer.close()
        server.close()


def run(test: Callable[[Streams, Streams], Awaitable[None]]) -> None:
    async def main() -> None:
        async with sockets() as (client, session), asyncio.timeout(30):
            await test(client, session)

    asyncio.run(main())


async def connected(client: Streams, session: Streams) -> tuple[Line, Line]:
    return await asyncio.gather(admit(*client, KEY), introduce(*session, KEY))


def test_messages_arrive_in_order_and_the_end_is_seen() -> None:
    async def test(client: Streams, session: Streams) -> None:
        one, other = await connected(client, session)
        await one.send(command=["true"])
        one.write(OUTPUT, b"x" * 1_000_000)
        assert await other.receive_fields() == {"command": ["true"]}
        assert await other.receive() == (OUTPUT, b"x" * 1_000_000)
        await asyncio.gather(one.close(), other.close())
        assert await other.receive() == (b"", b"")
        assert await other.receive_fields() is None

    run(test)


def test_a_stranger_is_not_admitted() -> None:
    async def test(client: Streams, session: Streams) -> None:
        admitting = asyncio.create_task(admit(*client, KEY))
        session[1].write(bytes(32))
        await session[0].readexactly(64)
        session[1].write(bytes(32))  # a proof that it cannot make
        with pytest.raises(NotTrusted, match="key"):
            await admitting

    run(test)


def test_what_the_client_proves_is_no_proof_of_a_session() -> None:
    """A stranger cannot send the client's own proof back."""

    async def test(client: Streams, session: Streams) -> None:
        admitting = asyncio.create_task(admit(*client, KEY))
        session[1].write(bytes(32))
        answer = await session[0].readexactly(64)
        session[1].write(answer[32:])
        with pytest.raises(NotTrusted):
            await admitting

    run(test)


def test_a_session_proves_nothing_to_a_stranger() -> None:
    async def test(client: Streams, session: Streams) -> None:
        introducing = asyncio.create_task(introduce(*session, KEY))
        number = await client[0].readexactly(32)
        client[1].write(number + bytes(32))
        with pytest.raises(NotTrusted):
            await introducing
        session[1].close()
        assert await client[0].read() == b""

    run(test)


@pytest.mark.parametrize("change", ["data", "repeated", "left out", "length"])
def test_a_changed_message_is_refused(change: str) -> None:
    async def test(client: Streams, session: Streams) -> None:
        one, other = await connected(client, session)
        frames: list[bytes] = []
        raw, client[1].write = client[1].write, frames.append  # type: ignore[method-assign,assignment]
        one.write(OUTPUT, b"first")
        one.write(OUTPUT, b"second")
        client[1].write = raw  # type: ignore[method-assign]
        sent = {
            "data": [frames[0].replace(b"first", b"worst")],
            "repeated": [frames[0], frames[0]],
            "left out": [frames[1]],
            "length": [(MAX_MESSAGE + 2).to_bytes(4, "big")],
        }[change]
        for frame in sent:
            raw(frame)
        for _ in sent[1:]:
            assert await other.receive() == (OUTPUT, b"first")
        with pytest.raises(NotTrusted):
            await other.receive()

    run(test)
