# SPDX-License-Identifier: Apache-2.0
"""Keys that were read and authenticated already, for as long as no key changes.

A release reads its key before it decides, and once more in the transaction that makes the decision durable: the first
reading may come from here. It is never older than the last change that was begun, and the second one would notice.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Final, Generic, TypeVar

_V = TypeVar("_V")
_CAPACITY: Final = 4096  # keys; some kilobytes each, with their policies


class Memo(Generic[_V]):
    """The last results of a function, by what they were made from; for one thread."""

    def __init__(self, capacity: int = _CAPACITY) -> None:
        self._capacity = capacity
        self._found: OrderedDict[object, _V] = OrderedDict()

    def get(self, key: object, make: Callable[[], _V]) -> _V:
        """Return the result for `key`, made now unless it is known. What raises is not remembered."""
        found = self._found.get(key)
        if found is None:
            found = make()
            self.put(key, found)
        else:
            self._found.move_to_end(key)
        return found

    def look(self, key: object) -> _V | None:
        """Return the result for `key` if it is known."""
        found = self._found.get(key)
        if found is not None:
            self._found.move_to_end(key)
        return found

    def put(self, key: object, value: _V) -> None:
        """Remember a result, and forget the one that was not asked for the longest."""
        self._found[key] = value
        if len(self._found) > self._capacity:
            self._found.popitem(last=False)


class Changes:
    """How often a key, a version or a policy was written. Counted on the database's thread, read on any."""

    def __init__(self) -> None:
        self.count = 0

    def note(self) -> None:
        """Count a change that begins; one that is undone later is counted as well."""
        self.count += 1
