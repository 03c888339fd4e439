# SPDX-License-Identifier: Apache-2.0
"""Rank logs as lines: whole ones, in order, to the end, and bounded."""

from pathlib import Path

from cloister_trainer.logs import MAX_LINE_BYTES, follow


async def lines(paths: dict[int, Path]) -> list[tuple[int, str]]:
    return [found async for found in follow(paths, go_on=lambda: False)]


async def test_all_lines_of_all_ranks_come_in_the_order_of_each_rank(tmp_path: Path) -> None:
    (tmp_path / "0").write_text("a\nb\n\nlast without end")
    (tmp_path / "1").write_text("c\n")
    found = await lines({0: tmp_path / "0", 1: tmp_path / "1", 2: tmp_path / "absent"})
    assert [line for rank, line in found if rank == 0] == ["a", "b", "", "last without end"]
    assert [line for rank, line in found if rank == 1] == ["c"]


async def test_lines_written_while_following_come_too_and_a_half_line_waits_for_its_end(tmp_path: Path) -> None:
    path = tmp_path / "0"
    path.write_text("first\nsec")
    steps = iter([True, True, False])

    def go_on() -> bool:
        more = next(steps, False)
        if not more:
            path.write_text("first\nsecond\nthird\n")
        return more

    assert [line async for _, line in follow({0: path}, go_on=go_on)] == ["first", "second", "third"]


async def test_a_line_without_end_is_given_in_pieces(tmp_path: Path) -> None:
    (tmp_path / "0").write_bytes(b"x" * (20 * MAX_LINE_BYTES) + b"\n\xff\xfe\n")
    found = [line for _, line in await lines({0: tmp_path / "0"})]
    assert max(len(line) for line in found) <= MAX_LINE_BYTES
    assert sum(line.count("x") for line in found) == 20 * MAX_LINE_BYTES
    assert found[-1] == "\ufffd\ufffd"
