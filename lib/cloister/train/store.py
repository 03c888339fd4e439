# SPDX-License-Identifier: Apache-2.0
"""torch.distributed's rendezvous over the coordinator's authenticated channel, and the process group on top of it.

The key space is that of the caller's certificate, so no rank of another job can read, write or guess its way in;
torch's own TCPStore, an open port without authentication, is not used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Final, Protocol

import torch.distributed as dist

from cloister.errors import CloisterError, Code

_LOOPBACK: Final = "127.0.0.1"


class Rendezvous(Protocol):
    """The coordinator's key-value store; every call may block for `timeout_s` and raises CloisterError."""

    def set(self, key: str, value: bytes, *, timeout_s: float) -> None: ...
    def get(self, key: str, *, timeout_s: float) -> bytes: ...
    def wait(self, keys: Sequence[str], *, timeout_s: float) -> None: ...
    def add(self, key: str, amount: int, *, timeout_s: float) -> int: ...
    def check(self, keys: Sequence[str], *, timeout_s: float) -> bool: ...
    def compare_set(self, key: str, expected: bytes, desired: bytes, *, timeout_s: float) -> bytes: ...
    def delete_key(self, key: str, *, timeout_s: float) -> bool: ...


class RendezvousStore(dist.Store):  # type: ignore[misc]  # torch is not typed
    """A torch.distributed.Store over a Rendezvous."""

    def __init__(self, rendezvous: Rendezvous, timeout: timedelta) -> None:
        super().__init__()
        self.set_timeout(timeout)
        self._rendezvous = rendezvous
        self._clones: list[RendezvousStore] = []

    def set(self, key: str, value: str | bytes) -> None:
        self._call(self._rendezvous.set, key, value.encode() if isinstance(value, str) else bytes(value))

    def get(self, key: str) -> bytes:
        return self._call(self._rendezvous.get, key)  # type: ignore[no-any-return]  # as above

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        self._call(self._rendezvous.wait, list(keys), timeout=timeout)

    def add(self, key: str, amount: int) -> int:
        return self._call(self._rendezvous.add, key, amount)  # type: ignore[no-any-return]

    def check(self, keys: Sequence[str]) -> bool:
        return self._call(self._rendezvous.check, list(keys))  # type: ignore[no-any-return]

    def compare_set(self, key: str, expected: str | bytes, desired: str | bytes) -> bytes:
        old, new = (v.encode() if isinstance(v, str) else bytes(v) for v in (expected, desired))
        return self._call(self._rendezvous.compare_set, key, old, new)  # type: ignore[no-any-return]

    def delete_key(self, key: str) -> bool:
        return self._call(self._rendezvous.delete_key, key)  # type: ignore[no-any-return]

    def num_keys(self) -> int:
        raise NotImplementedError("the rendezvous does not count its keys")

    # The C++ side looks these two up in camel case.
    deleteKey = delete_key  # noqa: N815
    getNumKeys = num_keys  # noqa: N815

    def clone(self) -> RendezvousStore:
        """Return a store over the same key space.

        C++ keeps no reference to the Python half of what it clones; without ours the next call on it would fail.
        """
        made = RendezvousStore(self._rendezvous, self.timeout)
        self._clones.append(made)
        return made

    def _call(self, method: Callable[..., Any], *args: Any, timeout: timedelta | None = None) -> Any:
        seconds = (timeout or self.timeout).total_seconds()
        try:
            return method(*args, timeout_s=seconds)
        except CloisterError as error:
            if error.code is Code.DEADLINE_EXCEEDED:
                what = f"the other ranks did not come within {seconds:g} s"
                raise dist.DistStoreError(f"{what}: {error.why}") from None
            raise dist.DistStoreError(str(error)) from None


def join_process_group(rendezvous: Rendezvous, *, rank: int, world_size: int, timeout: timedelta) -> None:
    """Make torch.distributed's default process group: gloo on loopback, found through `rendezvous`.

    `timeout` bounds each wait for the others, at the start and in every collective.
    """
    options = dist.ProcessGroupGloo._Options()
    # The name of the machine may stand for an address that others reach; ranks of one machine need none.
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=_LOOPBACK)]
    options._timeout = timeout
    dist.init_process_group(
        "gloo",
        store=RendezvousStore(rendezvous, timeout),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        pg_options=options,
    )
