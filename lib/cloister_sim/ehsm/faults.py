# SPDX-License-Identifier: Apache-2.0
"""What can go wrong on the way, made to happen on purpose: for tests of clients."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Change = Callable[[dict[str, Any]], Any]  # the answer's members in, any JSON value out


@dataclass(slots=True, eq=False)
class Fault:
    """One thing that goes wrong, for the next `times` requests of an action, or of any."""

    action: str | None = None
    times: int = 1
    delay_s: float = 0.0  # before the request is looked at
    gate: asyncio.Event | None = None  # the request waits for it before it is looked at
    answer_gate: asyncio.Event | None = None  # the answer waits for it; the work is done
    drop: bool = False  # the connection ends before the request is looked at
    drop_answer: bool = False  # the work is done, and the connection ends instead of an answer
    body: bytes | None = None  # sent instead of an answer; nothing is done
    status: int = 200  # HTTP status of `body`
    change: Change | None = None  # applied to the answer; the work is done


@dataclass(slots=True)
class Faults:
    """Faults that wait for their request; and the requests that came, whatever became of them."""

    requests: list[str] = field(default_factory=list)  # their actions
    connections: list[object] = field(default_factory=list)  # where each came from
    _waiting: list[Fault] = field(default_factory=list)

    def add(self, fault: Fault) -> Fault:
        self._waiting.append(fault)
        return fault

    def clear(self) -> None:
        self._waiting.clear()

    def count(self, action: str) -> int:
        return self.requests.count(action)

    def take(self, action: str, connection: object) -> Fault | None:
        """Record a request and return the oldest fault that is for it, one use less."""
        self.requests.append(action)
        self.connections.append(connection)
        for fault in self._waiting:
            if fault.action in (None, action):
                fault.times -= 1
                if fault.times <= 0:
                    self._waiting.remove(fault)
                return fault
        return None


def answer(code: int, message: Any, result: Any = None) -> Change:
    """Replace an answer's members; a message of None leaves it out."""

    def change(_: dict[str, Any]) -> dict[str, Any]:
        replaced = {"code": code, "result": {} if result is None else result}
        return replaced if message is None else replaced | {"message": message}

    return change
