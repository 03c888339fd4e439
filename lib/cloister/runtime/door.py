# SPDX-License-Identifier: Apache-2.0
"""A door before a server whose callers have no identity yet: few connections of an address inside, the rest in line.

To refuse a call costs gRPC as much as to answer a small one, and whoever is refused may call again at once. So how much
an address can have in flight is decided before its calls are read, by bytes that nobody takes from the kernel:

  inside       at most `inside` connections of one address, so many new ones a second, and so many bytes
  in line      the others, in the order in which they came; of each a handshake's first bytes are read at most
  turned away  who waited too long; and, when there are too many in line, the newest of the longest line

Only connections are passed on here, to a port of the loopback interface: TLS and calls are the server's. It learns from
`address_of` whose connection a call came by. An address is one of IPv4, or the /64 of IPv6 that a host may have whole.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import resource
import socket
import sys
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import Final, cast

import prometheus_client

from cloister.runtime.address import bind_error, split_address

_BACKLOG: Final = 4096  # the kernel's own line; more than it allows is cut to what it allows
# Bytes that the kernel keeps of a connection; all in line together are 256 MiB. An enrolment has 12 KiB.
_KEPT_UNREAD: Final = 64 * 1024
_OTHER_DESCRIPTORS: Final = 256
_SWEEP_S: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DoorLimits:
    """Bounds of one door."""

    # Connections of one address inside. An enrolment takes some 20 ms of it: a thousand TDs are through in time.
    inside: int = 32
    # New connections of one address: so many at once, then so many a second. A handshake costs a millisecond and more.
    burst: int = 400
    per_s: float = 100.0
    # Bytes of one address: so many at once, then so many a second. An enrolment has 15 to 50 KiB; one with a log of
    # 1 MiB is allowed, and costs as much to read as fifty others.
    bytes_burst: int = 8 * 1024 * 1024
    bytes_per_s: int = 2 * 1024 * 1024
    # Of all addresses. One that is inside has three descriptors, one in line has one.
    inside_in_all: int = 256
    in_line: int = 4096
    # Longer than a thousand TDs behind one address take, shorter than any of them would wait.
    wait_s: float = 60.0
    # A connection on which nothing moves; the clients of ours send pings every second.
    silent_s: float = 15.0


class Door:
    """One listening port. Belongs to one event loop."""

    def __init__(
        self, listen: str, limits: DoorLimits | None = None, *, registry: prometheus_client.CollectorRegistry | None
    ) -> None:
        self._listen = listen
        limits = limits or DoorLimits()
        self._limits = replace(limits, in_line=max(1, min(limits.in_line, _room() - 3 * limits.inside_in_all)))
        self._lines: dict[str, _Line] = {}
        self._full: OrderedDict[str, None] = OrderedDict()  # addresses that wait for any place at all
        self._places: dict[int, str] = {}  # loopback port of a connection inside: its address
        self._inside: set[_Visitor] = set()
        self._in_line = 0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._sweep: asyncio.TimerHandle | None = None
        self._to = ("", 0)
        self._stopped = False
        self.endpoint = ""
        gauge = functools.partial(prometheus_client.Gauge, labelnames=("place",), registry=registry)
        connections = gauge("cloister_door_connections", "Connections of callers without identity.")
        connections.labels("inside").set_function(lambda: len(self._inside))
        connections.labels("in-line").set_function(lambda: self._in_line)
        self._turned_away = prometheus_client.Counter(
            "cloister_door_turned_away_total", "Connections closed unread.", ("reason",), registry=registry
        )

    async def start(self, endpoint: str) -> None:
        """Listen, and let connections through to `endpoint`; raise CloisterError(PORT_TAKEN)."""
        self._to = split_address(endpoint)
        listener = _listener(self._listen)
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(functools.partial(_Visitor, self), sock=listener, backlog=_BACKLOG)
        self.endpoint = f"{split_address(self._listen)[0]}:{listener.getsockname()[1]}"
        self._sweep = loop.call_later(min(_SWEEP_S, self._limits.wait_s, self._limits.silent_s), self._look_around)

    async def stop(self) -> None:
        """Stop listening and end every connection."""
        if self._server is not None:
            self._server.close()
            self._server = None
        if self._sweep is not None:
            self._sweep.cancel()
        self._stopped = True
        for visitor in [*self._inside, *(one for line in self._lines.values() for one in line.waiting)]:
            visitor.end()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def address_of(self, peer: str) -> str | None:
        """Return the address behind gRPC's name of a peer, such as "ipv4:127.0.0.1:4711"; None if it is not inside."""
        port = peer.rpartition(":")[2]
        return self._places.get(int(port)) if port.isascii() and port.isdigit() else None

    def arrived(self, visitor: _Visitor) -> None:
        """Put a new connection in line, and let in whoever may come in."""
        line = self._lines.setdefault(visitor.address, _Line())
        line.waiting[visitor] = None
        self._in_line += 1
        self._let_in(visitor.address)
        if self._in_line > self._limits.in_line:
            longest = max(self._lines.values(), key=lambda one: len(one.waiting))
            self._turn_away(next(reversed(longest.waiting)), "too-many")

    def connected(self, visitor: _Visitor) -> None:
        """Note which port of the loopback interface a connection has."""
        self._places[visitor.port] = visitor.address

    def received(self, visitor: _Visitor, size: int) -> None:
        """Count bytes of an address; when it has sent too many, let its connections wait until it has earned them."""
        line, limits, loop = self._lines.get(visitor.address), self._limits, asyncio.get_running_loop()
        if line is None:
            return
        now = loop.time()
        line.paid_s = max(line.paid_s, now - limits.bytes_burst / limits.bytes_per_s) + size / limits.bytes_per_s
        if line.paid_s > now:
            visitor.wait("limit", True)
            line.silenced.add(visitor)
            if line.reading is None:
                line.reading = loop.call_at(line.paid_s, self._read_again, visitor.address)

    def _read_again(self, address: str) -> None:
        line, loop = self._lines[address], asyncio.get_running_loop()
        if line.paid_s > loop.time():  # others of the address have sent more meanwhile
            line.reading = loop.call_at(line.paid_s, self._read_again, address)
            return
        line.reading = None
        for visitor in line.silenced:
            visitor.wait("limit", False)
        line.silenced.clear()

    def left(self, visitor: _Visitor) -> None:
        """Give a connection's place to the next."""
        line = self._lines.get(visitor.address)
        if line is not None:
            line.silenced.discard(visitor)
        if line is not None and visitor in line.waiting:
            del line.waiting[visitor]
            self._in_line -= 1
        if line is None or visitor not in self._inside:
            return
        self._inside.discard(visitor)
        self._places.pop(visitor.port, None)
        line.inside -= 1
        while self._full and len(self._inside) < self._limits.inside_in_all:
            self._let_in(self._full.popitem(last=False)[0])
        self._let_in(visitor.address)

    def _let_in(self, address: str) -> None:
        line, limits, loop = self._lines.get(address), self._limits, asyncio.get_running_loop()
        while line is not None and line.waiting and line.inside < limits.inside and not self._stopped:
            if len(self._inside) >= limits.inside_in_all:
                self._full[address] = None
                return
            wait_s = line.due_s - (limits.burst - 1) / limits.per_s - loop.time()
            if wait_s > 0:
                if line.timer is None:
                    line.timer = loop.call_later(wait_s, self._on_time, address)
                return
            line.due_s = max(line.due_s, loop.time()) + 1 / limits.per_s
            visitor, _ = line.waiting.popitem(last=False)
            self._in_line -= 1
            line.inside += 1
            self._inside.add(visitor)
            task = loop.create_task(visitor.come_in(*self._to))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _on_time(self, address: str) -> None:
        self._lines[address].timer = None
        self._let_in(address)

    def _turn_away(self, visitor: _Visitor, reason: str) -> None:
        self._turned_away.labels(reason).inc()
        self.left(visitor)
        visitor.end()

    def _look_around(self) -> None:
        """End what waits or is silent for too long, and forget addresses of which nothing is left to know."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        for visitor in [one for one in self._inside if now - one.moved_at > self._limits.silent_s]:
            self._turn_away(visitor, "silent")
        for address, line in list(self._lines.items()):
            # The first came first; nothing has moved on any of them.
            while line.waiting and now - next(iter(line.waiting)).moved_at > self._limits.wait_s:
                self._turn_away(next(iter(line.waiting)), "waited")
            timers = line.timer or line.reading
            if not line.waiting and not line.inside and timers is None and max(line.due_s, line.paid_s) <= now:
                del self._lines[address]
        self._sweep = loop.call_later(min(_SWEEP_S, self._limits.wait_s, self._limits.silent_s), self._look_around)


@dataclass(slots=True)
class _Line:
    """What is known of an address. `due_s` counts connections: each adds 1/per_s to it, and to now at the least."""

    waiting: OrderedDict[_Visitor, None] = field(default_factory=OrderedDict)
    inside: int = 0
    due_s: float = 0.0
    timer: asyncio.TimerHandle | None = None
    paid_s: float = 0.0  # the same for bytes
    silenced: set[_Visitor] = field(default_factory=set)  # nothing more is read of these until `paid_s`
    reading: asyncio.TimerHandle | None = None


class _Visitor(asyncio.Protocol):
    """A connection from outside. Nothing but its first bytes is read before it is inside."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._outside: asyncio.Transport | None = None
        self._server: asyncio.Transport | None = None
        self._unread: list[bytes] = []
        self._waits: set[str] = set()  # why nothing is read: the limit, the server
        self._ended = False
        self.address = ""
        self.port = 0  # of the loopback interface, once it is inside
        self.moved_at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._outside = cast("asyncio.Transport", transport)  # uvloop's own class does not say that it is one
        self.address = caller_address(transport.get_extra_info("peername"))
        self.moved()
        self._door.arrived(self)

    async def come_in(self, host: str, port: int) -> None:
        """Connect to the server, and pass bytes on from now on."""
        try:
            transport, _ = await asyncio.get_running_loop().create_connection(lambda: _ServerEnd(self), host, port)
        except OSError:
            self.end()
            return
        self._server = transport
        if self._ended or self._outside is None:
            self._server.abort()
            return
        self.port = self._server.get_extra_info("sockname")[1]
        self._door.connected(self)
        self.moved()
        unread, self._unread = b"".join(self._unread), []
        self._server.write(unread)
        self._outside.resume_reading()
        self._door.received(self, len(unread))

    def data_received(self, data: bytes) -> None:
        if self._server is not None:
            self.moved()
            self._server.write(data)
            self._door.received(self, len(data))
        elif self._outside is not None:
            # An event loop reads once before it can be told not to: no more than the kernel's buffer holds.
            self._unread.append(data)
            self._outside.pause_reading()

    def pause_writing(self) -> None:
        if self._server is not None:
            self._server.pause_reading()

    def resume_writing(self) -> None:
        if self._server is not None:
            self._server.resume_reading()

    def connection_lost(self, _error: Exception | None) -> None:
        self._ended = True
        if self._server is not None:
            self._server.close()
        self._door.left(self)

    def write(self, data: bytes) -> None:
        """Pass on what the server says."""
        self.moved()
        if self._outside is not None:
            self._outside.write(data)

    def wait(self, why: str, wait: bool) -> None:
        """Let the caller wait, or not any more, for this reason."""
        (self._waits.add if wait else self._waits.discard)(why)
        if self._outside is not None and not self._ended:
            self._outside.pause_reading() if self._waits else self._outside.resume_reading()

    def moved(self) -> None:
        """Note the time."""
        self.moved_at = asyncio.get_running_loop().time()

    def finish(self) -> None:
        """Close, after what the server said has been sent."""
        if self._outside is not None:
            self._outside.close()

    def end(self) -> None:
        """Close at once."""
        if self._outside is not None:
            self._outside.abort()


class _ServerEnd(asyncio.Protocol):
    """The same connection from here to the server."""

    def __init__(self, visitor: _Visitor) -> None:
        self._visitor = visitor

    def data_received(self, data: bytes) -> None:
        self._visitor.write(data)

    def pause_writing(self) -> None:
        self._visitor.wait("server", True)

    def resume_writing(self) -> None:
        self._visitor.wait("server", False)

    def connection_lost(self, _error: Exception | None) -> None:
        self._visitor.finish()


def caller_address(peername: tuple[str, int] | tuple[str, int, int, int]) -> str:
    """Return what a caller is known by: an IPv4 address, or the first 64 bits of an IPv6 one."""
    address = ipaddress.ip_address(peername[0].partition("%")[0])
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(address) >> 64 << 64, 64)))


def _room() -> int:
    """Return how many descriptors may be spent here: what this process may have, less what else it needs."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft - _OTHER_DESCRIPTORS


def _listener(listen: str) -> socket.socket:
    """Return a listening socket; "[::]" is for IPv4, too, as it is for gRPC."""
    host, port = split_address(listen)
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        both = family == socket.AF_INET6 and host == "::"
        listener = socket.create_server((host, port), family=family, backlog=_BACKLOG, dualstack_ipv6=both)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _KEPT_UNREAD)  # connections inherit it
        return listener
    except OSError as error:
        raise bind_error(listen, error) from None
