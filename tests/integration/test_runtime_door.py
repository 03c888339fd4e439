# SPDX-License-Identifier: Apache-2.0
"""The door before a server: few connections of an address inside, the rest in line; nobody waits for a neighbour."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import prometheus_client
import pytest

from cloister.errors import CloisterError, Code
from cloister.runtime.door import Door, DoorLimits, caller_address

Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]
_SECOND = "127.0.0.2"
_LONG = 2_000_000  # bytes of a line


class Server:
    """Answers each line with it; knows who came, and by which name gRPC would know them."""

    def __init__(self) -> None:
        self.peers: list[str] = []
        self.arrivals: asyncio.Queue[bytes] = asyncio.Queue()
        self.reads = asyncio.Event()
        self.reads.set()
        self.endpoint = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.peers.append("ipv4:127.0.0.1:{}".format(writer.get_extra_info("peername")[1]))
        try:
            await self.reads.wait()
            while line := await reader.readline():
                self.arrivals.put_nowait(line)
                writer.write(line)
                await writer.drain()
        except (ConnectionError, ValueError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def door(**limits: float) -> AsyncIterator[tuple[Server, Door]]:
    server, opened = Server(), Door("127.0.0.1:0", DoorLimits(**limits), registry=prometheus_client.CollectorRegistry())  # type: ignore[arg-type]
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0, limit=_LONG)
    async with listener:
        server.endpoint = f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        await opened.start(server.endpoint)
        try:
            yield server, opened
        finally:
            await opened.stop()


async def visit(door: Door, source: str = "127.0.0.1") -> Ends:
    host, port = door.endpoint.split(":")
    return await asyncio.open_connection(host, int(port), local_addr=(source, 0), limit=_LONG)


async def ask(ends: Ends, line: bytes = b"hello\n") -> bytes:
    reader, writer = ends
    writer.write(line)
    return await asyncio.wait_for(reader.readline(), 10)


async def is_left_outside(ends: Ends) -> bool:
    """Say something, and say whether that is not answered for a while."""
    reader, writer = ends
    writer.write(b"hello\n")
    done, _ = await asyncio.wait([task := asyncio.create_task(reader.readline())], timeout=0.05)
    task.cancel()
    return not done


async def test_what_both_say_arrives_whole() -> None:
    async with door() as (_, opened):
        ends = await visit(opened)
        line = b"x" * 1_000_000 + b"\n"
        assert await ask(ends, line) == line
        assert await ask(ends) == b"hello\n"


async def test_the_first_bytes_of_a_caller_in_line_are_not_lost() -> None:
    async with door(inside=1) as (_, opened):
        first, second = await visit(opened), await visit(opened)
        assert await ask(first) == b"hello\n"
        second[1].write(b"early\n")
        await second[1].drain()
        assert await is_left_outside(second)
        first[1].close()
        assert await asyncio.wait_for(second[0].readline(), 10) == b"early\n"
        assert await asyncio.wait_for(second[0].readline(), 10) == b"hello\n"


async def test_an_address_has_so_many_inside_and_another_does_not_wait_for_it() -> None:
    async with door(inside=2) as (server, opened):
        ours = [await visit(opened) for _ in range(3)]
        assert [await ask(ends) for ends in ours[:2]] == [b"hello\n", b"hello\n"]
        assert await is_left_outside(ours[2])
        assert len(server.peers) == 2
        assert await ask(await visit(opened, _SECOND)) == b"hello\n"


async def test_those_in_line_come_in_in_the_order_in_which_they_came() -> None:
    async with door(inside=1) as (server, opened):
        first = await visit(opened)
        assert await ask(first) == b"hello\n"
        line = [await visit(opened) for _ in range(3)]
        for number, ends in reversed(list(enumerate(line))):  # it is not who speaks first
            ends[1].write(f"{number}\n".encode())
        server.arrivals.get_nowait()
        first[1].close()
        for number, ends in enumerate(line):
            assert await asyncio.wait_for(server.arrivals.get(), 10) == f"{number}\n".encode()
            ends[1].close()


async def test_who_leaves_the_line_takes_no_place() -> None:
    async with door(inside=1) as (_, opened):
        first, second, third = [await visit(opened) for _ in range(3)]
        assert await ask(first) == b"hello\n"
        second[1].transport.abort()
        first[1].close()
        assert await ask(third) == b"hello\n"


async def test_the_server_learns_whose_connection_a_call_came_by() -> None:
    async with door() as (server, opened):
        ends = await visit(opened, _SECOND)
        await ask(ends)
        assert opened.address_of(server.peers[0]) == _SECOND
        ends[1].close()
        while opened.address_of(server.peers[0]) is not None:
            await asyncio.sleep(0)


@pytest.mark.parametrize("peer", ["ipv4:127.0.0.1:9", "unix:", "", "ipv4:127.0.0.1:", "ipv4:127.0.0.1:x1"])
async def test_who_came_by_no_door_has_no_address(peer: str) -> None:
    async with door() as (_, opened):
        assert opened.address_of(peer) is None


async def test_a_new_connection_waits_until_its_address_has_earned_it() -> None:
    async with door(burst=2, per_s=20.0) as (_, opened):
        began = asyncio.get_running_loop().time()
        for _ in range(4):
            ends = await visit(opened)
            assert await ask(ends) == b"hello\n"
            ends[1].close()
        assert 0.09 <= asyncio.get_running_loop().time() - began <= 5
        assert await ask(await visit(opened, _SECOND)) == b"hello\n"


async def test_an_address_that_sends_too_much_is_read_no_faster_than_it_earns() -> None:
    async with door(bytes_burst=100_000, bytes_per_s=1_000_000) as (_, opened):
        line = b"x" * 149_999 + b"\n"
        greedy, also_greedy, modest = await visit(opened), await visit(opened), await visit(opened, _SECOND)
        began = asyncio.get_running_loop().time()
        assert await asyncio.gather(ask(greedy, line), ask(also_greedy, line)) == [line, line]
        assert await ask(modest) == b"hello\n"
        assert await asyncio.gather(ask(greedy), ask(also_greedy)) == [b"hello\n", b"hello\n"]  # what it owed is paid
        assert 0.19 <= asyncio.get_running_loop().time() - began <= 10


async def test_who_waited_too_long_is_turned_away_and_who_is_inside_stays() -> None:
    async with door(inside=1, wait_s=0.01) as (_, opened):
        first, second = await visit(opened), await visit(opened)
        assert await ask(first) == b"hello\n"
        assert await asyncio.wait_for(second[0].read(), 10) == b""
        assert await ask(first) == b"hello\n"


async def test_a_connection_on_which_nothing_moves_is_ended_and_its_place_is_the_next_ones() -> None:
    async with door(inside=1, silent_s=0.01) as (_, opened):
        first, second = await visit(opened), await visit(opened)
        assert await asyncio.wait_for(first[0].read(), 10) == b""
        assert await ask(second) == b"hello\n"


async def test_too_many_in_line_cost_the_longest_line_its_newest() -> None:
    async with AsyncExitStack() as stack:
        _, opened = await stack.enter_async_context(door(inside=1, in_line=3))
        flood = [await visit(opened) for _ in range(4)]  # one inside, three in line
        ours = [await visit(opened, _SECOND) for _ in range(2)]  # one inside, one in line
        assert await ask(flood[0]) == b"hello\n"
        assert await ask(ours[0]) == b"hello\n"
        assert await _turned_away(flood[3])
        assert await is_left_outside(flood[1])
        ours[0][1].close()
        assert await ask(ours[1]) == b"hello\n"


async def test_all_addresses_share_what_there_is_in_turn() -> None:
    async with door(inside_in_all=1) as (_, opened):
        first = await visit(opened)
        assert await ask(first) == b"hello\n"
        second, third = await visit(opened), await visit(opened, _SECOND)
        assert await is_left_outside(second)
        assert await is_left_outside(third)
        first[1].close()
        assert await asyncio.wait_for(second[0].readline(), 10)
        assert await is_left_outside(third)
        second[1].close()
        assert await asyncio.wait_for(third[0].readline(), 10)


async def test_a_server_that_is_slow_to_read_makes_its_caller_wait() -> None:
    async with door() as (server, opened):
        server.reads.clear()
        ends = await visit(opened)
        for _ in range(1024):  # 64 MiB: more than the kernel's and the transports' buffers hold
            ends[1].write(b"x" * 65_536)
            done, _ = await asyncio.wait([task := asyncio.create_task(ends[1].drain())], timeout=0.05)
            if not done:
                break
        assert not done
        task.cancel()
        ends[1].transport.abort()
        server.reads.set()


async def test_without_a_server_a_caller_is_closed_and_the_door_stays() -> None:
    async with door() as (server, opened):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        opened._to = ("127.0.0.1", port)
        assert await _turned_away(await visit(opened))
        opened._to = ("127.0.0.1", int(server.endpoint.rpartition(":")[2]))
        assert await ask(await visit(opened)) == b"hello\n"


async def test_a_door_that_stops_ends_all_connections() -> None:
    async with door(inside=1) as (_, opened):
        first, second = await visit(opened), await visit(opened)
        await ask(first)
        await opened.stop()
        assert await _turned_away(first)
        assert await _turned_away(second)
        with pytest.raises(OSError):
            await visit(opened)


async def test_a_taken_port_is_named() -> None:
    async with door() as (_, opened):
        other = Door(opened.endpoint, registry=None)
        with pytest.raises(CloisterError) as caught:
            await other.start("127.0.0.1:1")
        assert caught.value.code is Code.PORT_TAKEN
        assert opened.endpoint in caught.value.what


async def test_what_goes_on_at_the_door_can_be_seen() -> None:
    registry = prometheus_client.CollectorRegistry()
    opened = Door("127.0.0.1:0", DoorLimits(inside=1, wait_s=0.01), registry=registry)
    server = Server()
    async with await asyncio.start_server(server.serve, "127.0.0.1", 0) as listener:
        await opened.start(f"127.0.0.1:{listener.sockets[0].getsockname()[1]}")
        first, second = await visit(opened), await visit(opened)
        await ask(first)
        assert registry.get_sample_value("cloister_door_connections", {"place": "inside"}) == 1
        assert registry.get_sample_value("cloister_door_connections", {"place": "in-line"}) == 1
        assert await _turned_away(second)
        assert registry.get_sample_value("cloister_door_turned_away_total", {"reason": "waited"}) == 1
        await opened.stop()


@pytest.mark.parametrize(
    ("peername", "known_by"),
    [
        (("10.0.0.7", 1), "10.0.0.7"),
        (("::ffff:10.0.0.7", 1, 0, 0), "10.0.0.7"),
        (("2001:db8:1:2:3:4:5:6", 1, 0, 0), "2001:db8:1:2::/64"),
        (("2001:db8:1:2:ffff::1", 1, 0, 0), "2001:db8:1:2::/64"),
        (("2001:db8:1:3::1", 1, 0, 0), "2001:db8:1:3::/64"),
        (("fe80::1%eth0", 1, 0, 2), "fe80::/64"),
    ],
)
def test_a_host_does_not_become_another_by_another_address_of_its_network(
    peername: tuple[str, int], known_by: str
) -> None:
    assert caller_address(peername) == known_by


async def _turned_away(ends: Ends) -> bool:
    try:
        return await asyncio.wait_for(ends[0].read(), 10) == b""
    except ConnectionError:
        return True
