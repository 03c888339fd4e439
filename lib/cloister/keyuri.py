# SPDX-License-Identifier: Apache-2.0
"""Names of keys: cloister-key://<tenant>/<path>."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from cloister.errors import CloisterError, Code
from cloister.identity import is_name

SCHEME: Final = "cloister-key://"
_PATH_SEGMENT: Final = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,62}")
_MAX_SEGMENTS: Final = 8


@dataclass(frozen=True, slots=True)
class KeyUri:
    """A key of one tenant."""

    tenant: str
    path: str

    @classmethod
    def parse(cls, text: str) -> KeyUri:
        """Parse a key URI; raise CloisterError(KEY_URI_INVALID) for anything else."""
        tenant, _, path = text.removeprefix(SCHEME).partition("/")
        segments = path.split("/")
        fits = len(segments) <= _MAX_SEGMENTS and all(_PATH_SEGMENT.fullmatch(segment) for segment in segments)
        if not (text.startswith(SCHEME) and is_name(tenant) and fits):
            raise CloisterError(
                Code.KEY_URI_INVALID,
                what=f"{text[:200]!r} is not a key URI",
                why="a key is cloister-key://<tenant>/<path>, the path of 1 to 8 segments of letters, digits and . _ -",
                todo="write it like cloister-key://hospital-a/datasets/reviews",
            )
        return cls(tenant, path)

    def __str__(self) -> str:
        return f"{SCHEME}{self.tenant}/{self.path}"
