# SPDX-License-Identifier: Apache-2.0
"""How requests are made: signed afresh at every attempt, within a deadline, past a bulkhead and a circuit breaker.

A request is sent again only when that can do no harm: what it asks for may be done twice, or was not done for sure.
The same bytes are never sent twice: every attempt has a nonce and a signature of its own.
"""

from __future__ import annotations

import asyncio
import enum
import json
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, TypeVar

from cloister import ehsm
from cloister.errors import CloisterError
from cloister.runtime.logging import get_logger
from cloister_keybroker.backends import Clock
from cloister_keybroker.backends.ehsm.answers import MAX_ANSWER, MAX_LIST, Answer, AnswerInvalid, Outcome, Refusal
from cloister_keybroker.backends.ehsm.breaker import Breaker
from cloister_keybroker.backends.ehsm.failures import Undone, no_answer, not_the_server, refusal_error
from cloister_keybroker.backends.ehsm.lanes import Lane
from cloister_keybroker.backends.ehsm.options import EhsmOptions
from cloister_keybroker.backends.ehsm.skew import SkewWatch
from cloister_keybroker.backends.ehsm.transport import ExchangeFailed, NotTheServer, Transport
from cloister_keybroker.backends.failures import answer_invalid, unavailable

T = TypeVar("T")

_ATTEMPTS: Final = 3
_PAUSE_S: Final = 0.05  # before the second attempt; twice that before the third
_NONCE_BYTES: Final = 16
_CLOCK_STEP_MS: Final = 1000  # a clock that went back by more is believed


class Kind(enum.Enum):
    """Which bulkhead a request goes through."""

    UNWRAP = "unwrap"
    CHANGE = "change"


@dataclass(frozen=True, slots=True)
class Request:
    """What to ask for."""

    action: str
    payload: Mapping[str, str | int] | None = field(default=None, repr=False)  # of Encrypt it holds a part
    kind: Kind = Kind.CHANGE
    again: bool = True  # it may be done twice
    signed: bool = True  # else a GET
    limit: int = MAX_ANSWER  # bytes of the answer


Ask = Callable[[Request], Awaitable[Answer]]


class Calls:
    """Requests of one broker to one EHSM. Use in one event loop, and close."""

    def __init__(self, options: EhsmOptions, *, clock: Clock, breaker: Breaker) -> None:
        limits = options.limits
        self._options = options
        self._clock = clock
        self._breaker = breaker
        self._skew = SkewWatch(options.name, limits.skew_alarm_s)
        widths = {Kind.UNWRAP: limits.unwraps, Kind.CHANGE: limits.changes}
        self._lanes = {kind: Lane(options.name, width=width, waiting=limits.waiting) for kind, width in widths.items()}
        # Connections of their own, so that slow changes take none away from unwrapping; one more for a probe.
        self._transports = {
            kind: Transport(options, connections=width + 1, clock=clock) for kind, width in widths.items()
        }
        self._last_ms = 0
        # How an open circuit is probed; raises ExchangeFailed or AnswerInvalid when it has to stay open.
        self.probe: Callable[[Ask], Awaitable[None]] = probe_by_list

    async def aclose(self) -> None:
        for transport in self._transports.values():
            await transport.aclose()

    async def call(self, request: Request, read: Callable[[Answer], T]) -> T:
        """Return what `read` makes of a good answer; raise CloisterError, as Undone when nothing was done for sure."""
        deadline = asyncio.get_running_loop().time() + self._options.limits.total_s
        await self._admit(deadline)
        async with self._lanes[request.kind].place(deadline):
            answer = await self._attempts(request, deadline)
        try:
            return read(answer)
        except AnswerInvalid as invalid:
            raise answer_invalid(self._options.name, str(invalid)) from None

    async def _attempts(self, request: Request, deadline: float) -> Answer:
        """Return a good answer, of the first attempt that gets one."""
        for attempt in range(1, _ATTEMPTS + 1):
            more = attempt < _ATTEMPTS
            try:
                answer = await self._once(request, deadline)
            except ExchangeFailed as failed:
                if not (more and (request.again or not failed.sent)) or self._breaker.is_open:
                    raise no_answer(self._options.name, failed.why, sent=failed.sent) from None
            else:
                refusal = answer.refusal
                if refusal is None:
                    return answer
                if refusal.outcome is Outcome.REPEATED and more:
                    continue  # at once: the next attempt has another nonce and time
                if not (refusal.outcome is Outcome.TROUBLE and more and request.again) or self._breaker.is_open:
                    raise self._refused(request, refusal)
            await asyncio.sleep(_PAUSE_S * attempt)
        raise AssertionError("the last attempt returns or raises")

    async def _once(self, request: Request, deadline: float) -> Answer:
        """Make one attempt, and let the circuit breaker know; raise ExchangeFailed, or CloisterError."""
        name = self._options.name
        try:
            answer = await self._exchange(request, deadline)
        except NotTheServer as other:
            self._failed()
            raise not_the_server(name, other.why) from None
        except ExchangeFailed:
            self._failed()
            raise
        except AnswerInvalid as invalid:
            self._failed()
            raise answer_invalid(name, str(invalid)) from None
        if answer.refusal is not None and answer.refusal.outcome is Outcome.TROUBLE:
            self._failed()
        else:
            self._breaker.succeeded()
        return answer

    async def _exchange(self, request: Request, deadline: float) -> Answer:
        transport = self._transports[request.kind]
        try:
            async with asyncio.timeout_at(deadline):
                if request.signed:
                    exchange = await transport.post(request.action, self._sign(request), limit=request.limit)
                else:
                    exchange = await transport.get(request.action)
        except TimeoutError:
            raise ExchangeFailed(f"no answer within {self._options.limits.total_s:g} s", sent=True) from None
        self._skew.observe(exchange.skew_s)
        return exchange.answer

    def _sign(self, request: Request) -> bytes:
        members: dict[str, ehsm.JsonValue] = {
            "appid": self._options.appid,
            "timestamp": str(self._timestamp()),
            "nonce": secrets.token_hex(_NONCE_BYTES),
        }
        if request.payload is not None:
            members["payload"] = request.payload
        ehsm.require_plain(members)
        return json.dumps({**members, "sign": ehsm.sign(self._options.api_key, members)}).encode()

    def _timestamp(self) -> int:
        """Return the time in milliseconds, no millisecond twice: to version 0.3.2 the time is the nonce."""
        now_ms = int(self._clock().timestamp() * 1000)
        if now_ms > self._last_ms - _CLOCK_STEP_MS:
            now_ms = max(now_ms, self._last_ms + 1)
        self._last_ms = now_ms
        return now_ms

    async def _admit(self, deadline: float) -> None:
        """Return when calls may be made; probe when it is time to."""
        now = asyncio.get_running_loop().time()
        if not self._breaker.is_open:
            return
        name = self._options.name
        if not self._breaker.may_probe(now):
            wait_s = self._breaker.wait_s(now)
            why = f"it did not before; the next attempt is in {wait_s:.0f} s" if wait_s else "it is being asked again"
            raise Undone.of(unavailable(name, why))
        try:
            await self.probe(lambda request: self._exchange(request, deadline))
        except (ExchangeFailed, AnswerInvalid) as failed:
            self._failed()
            raise Undone.of(unavailable(name, str(failed))) from None
        except BaseException:
            self._breaker.gave_up_probe()
            raise
        self._breaker.succeeded()
        get_logger().info("back end answers again", backend=name)

    def _failed(self) -> None:
        now = asyncio.get_running_loop().time()
        if self._breaker.failed(now):
            get_logger().warning(
                "back end does not answer", backend=self._options.name, next_attempt_s=self._breaker.wait_s(now)
            )

    def _refused(self, request: Request, refusal: Refusal) -> CloisterError:
        get_logger().warning(
            "back end refused a request",
            backend=self._options.name,
            action=request.action,
            code=refusal.code,
            words=refusal.message,
        )
        error = refusal_error(self._options.name, refusal, self._skew.last_s)
        return Undone.of(error) if refusal.undone else error


async def probe_by_list(ask: Ask) -> None:
    """Ask for the list of keys: database, enclave and credentials have to work for it."""
    answer = await ask(Request("ListKey", limit=MAX_LIST))
    if answer.refusal is not None and answer.refusal.outcome is Outcome.TROUBLE:
        raise AnswerInvalid("its database or its enclave fails")
