# SPDX-License-Identifier: Apache-2.0
"""One adversarial input after the other, by the row of the check list that must refuse it.

Each case changes one thing in a `World` that is accepted otherwise. Rows that are no refusals (merging, advisories) are
proven by tests that say so with `@proves`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from fakes.forged_collateral import World

_T = TypeVar("_T", bound=Callable[..., Any])

ROWS: Final = tuple(
    f"{letter}{number}"
    for letter, count in zip("HDPRTQEMAX", (9, 4, 8, 6, 14, 8, 4, 3, 11, 2), strict=True)
    for number in range(1, count + 1)
)
PROVEN: Final[set[str]] = set()  # rows with a test of their own


@dataclass(frozen=True)
class Case:
    """What is done to a world, and the row that refuses it."""

    row: str
    what: str
    change: Callable[[World], object]
    specs: dict[str, Any] = field(default_factory=dict)  # of the world's certificates

    @property
    def id(self) -> str:
        return f"{self.row}-{self.what.replace(' ', '-')}"

    def world(self) -> World:
        world = World(**self.specs)
        self.change(world)
        return world


def proves(*rows: str) -> Callable[[_T], _T]:
    """Say of a test which rows it is about."""
    PROVEN.update(rows)
    return lambda test: test


def edited(edit: Callable[[bytes], bytes], *, prepare: Callable[[World], object] = lambda world: None) -> Any:
    """Change the quote's bytes, after it was signed."""

    def change(world: World) -> None:
        prepare(world)
        world.edit = edit

    return change


def patched(offset: int, new: bytes) -> Callable[[bytes], bytes]:
    return lambda quote: quote[:offset] + new + quote[offset + len(new) :]


def u16(offset: int, value: int) -> Callable[[bytes], bytes]:
    return patched(offset, struct.pack("<H", value))


def u32(offset: int, value: int) -> Callable[[bytes], bytes]:
    return patched(offset, struct.pack("<I", value))


def added(offset: int, difference: int) -> Callable[[bytes], bytes]:
    """Add to the u32 at an offset."""
    return lambda quote: u32(offset, struct.unpack_from("<I", quote, offset)[0] + difference)(quote)


def flipped(offset: int) -> Callable[[bytes], bytes]:
    return lambda quote: patched(offset, bytes([quote[offset] ^ 1]))(quote)


def assign(owner: str, **values: Any) -> Callable[[World], None]:
    """Set members of a document ("tcb_info", "qe_identity") or, with owner "", attributes of the world."""

    def change(world: World) -> None:
        for name, value in values.items():
            if owner:
                getattr(world, owner)[name] = value
            else:
                setattr(world, name, value)

    return change


def part(name: str, make: Callable[[World], object]) -> Callable[[World], None]:
    """Replace one of the nine parts of the collateral."""
    return lambda world: world.parts.update({name: make(world)})


def text(document: str, edit: Callable[[bytes], bytes]) -> Callable[[World], None]:
    """Change a document's text before it is signed."""
    return lambda world: world.text.update({document: edit})
