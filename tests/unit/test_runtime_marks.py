# SPDX-License-Identifier: Apache-2.0
"""Marks: what was newest stays newest after a restart."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloister.errors import CloisterError, Code
from cloister.runtime.marks import Mark, Marks


async def test_a_mark_is_there_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "state" / "marks.sqlite"
    marks = Marks.open(path)
    assert await marks.of(["a", "b"]) == {}
    await marks.put({"a": Mark(3, "x"), "b": Mark(2**31, "")})
    await marks.put({"a": Mark(4, "y")})
    marks.close()
    again = Marks.open(path)
    assert await again.of(["a", "c", "b"]) == {"a": Mark(4, "y"), "b": Mark(2**31, "")}
    again.close()
    assert path.stat().st_mode & 0o777 == 0o600


async def test_a_file_of_marks_has_one_owner_and_is_not_made_anew_when_it_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "marks.sqlite"
    marks = Marks.open(path)
    with pytest.raises(CloisterError) as caught:
        Marks.open(path)
    assert caught.value.code is Code.STACK_RUNNING
    marks.close()
    path.write_bytes(b"damaged" * 1000)
    with pytest.raises(CloisterError) as caught:
        Marks.open(path)
    assert caught.value.code is Code.IO_FAILED
