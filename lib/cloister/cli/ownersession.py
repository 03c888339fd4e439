# SPDX-License-Identifier: Apache-2.0
"""`with cloister.session():` data keys for an owner's own scripts, from the broker that the owner's commands speak to.

As every command does, it verifies the broker's evidence on this machine first. Keys that it opens need the purpose
`export`, as for `cloister open`; the broker logs each.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cloister.cli.options import state_directory
from cloister.cli.session import open_session
from cloister.cli.trust import owner_keys
from cloister.data import keyring
from cloister.errors import CloisterError, Code
from cloister.sealed.datakey import DataKey

if TYPE_CHECKING:
    from cloister.guest.ownerkeys import OwnerKeyClient

T = TypeVar("T")


class OwnerKeyring:
    """Asks the broker for each key once. Safe for several threads; a forked process has the keys of before the fork."""

    def __init__(self, client: OwnerKeyClient, loop: asyncio.AbstractEventLoop, output_key: str) -> None:
        self._client = client
        self._loop = loop
        self._output_key = output_key
        self._known: dict[bytes, DataKey] = {}

    def open(self, key_uri: str, *, key_version: int, wrapped: bytes, manifest_digest: bytes = b"") -> DataKey:
        if wrapped not in self._known:
            self._known[wrapped] = self._ask(
                self._client.open_data_key(
                    key_uri, key_version=key_version, wrapped=wrapped, manifest_digest=manifest_digest
                )
            )
        return self._known[wrapped]

    def new(self, key_uri: str = "") -> DataKey:
        uri = key_uri or self._output_key
        if not uri:
            raise CloisterError(
                Code.ARGUMENT_INVALID,
                what="there is no key to seal with",
                why="neither this call nor the session names one",
                todo='name it: cloister.session(key="cloister-key://...")',
            )
        made = self._ask(self._client.generate_data_key(uri))
        self._known[made.wrapped] = made
        return made

    def _ask(self, call: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(call, self._loop).result()


@contextmanager
def session(*, key: str = "", state: Path | None = None) -> Iterator[OwnerKeyring]:
    """Find keys by themselves inside of the block, as the owner whose state directory this is.

    `key` is what new data is sealed under unless a call names another. Raises CloisterError when the stack cannot be
    reached or its evidence does not verify.
    """
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="cloister session", daemon=True)
    thread.start()
    opened = open_session(state_directory(state))

    def run(call: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(call, loop).result()

    try:
        inner = run(opened.__aenter__())
        try:
            with keyring.using(OwnerKeyring(run(owner_keys(inner)), loop, key)) as ring:
                yield ring  # type: ignore[misc]  # the keyring that was put in
        finally:
            run(opened.__aexit__(None, None, None))
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
