# SPDX-License-Identifier: Apache-2.0
"""The options behind a provider's scheme: "?name=value&name=value", percent-encoded."""

from __future__ import annotations

from collections.abc import Collection
from typing import NoReturn
from urllib.parse import unquote

from cloister.errors import CloisterError, Code


def parse_options(uri: str, rest: str, allowed: Collection[str]) -> dict[str, str]:
    """Return the options in `rest`, the part of `uri` behind its scheme; raise CloisterError(CONFIG_INVALID)."""
    if not rest:
        return {}
    if not rest.startswith("?"):
        _refuse(uri, f"options begin with a question mark, not {rest[:20]!r}", allowed)
    found: dict[str, str] = {}
    for part in rest[1:].split("&"):
        name, _, value = part.partition("=")
        if name not in allowed:
            _refuse(uri, f"{name[:50]!r} is no option of this provider", allowed)
        if name in found or not value:
            _refuse(uri, f"{name} has {'two values' if name in found else 'no value'}", allowed)
        found[name] = unquote(value)
    return found


def _refuse(uri: str, why: str, allowed: Collection[str]) -> NoReturn:
    raise CloisterError(
        Code.CONFIG_INVALID,
        what=f"{uri[:200]!r} names no quote provider",
        why=f"{why}; allowed: {', '.join(sorted(allowed))}",
        todo="correct guest.provider in the configuration",
    )
