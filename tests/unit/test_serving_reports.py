# SPDX-License-Identifier: Apache-2.0
"""What an agent reports is what its gateway reads, and nothing else is."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.errors import CloisterError, Code
from cloister_serving import reports
from cloister_serving.reports import Failed, Milestone, Reached, Reporter, WorkerStarted


@pytest.mark.parametrize("report", [Reached(Milestone.ENROLLED), WorkerStarted(4711)])
def test_a_report_is_read_as_it_was_sent(report: reports.Report) -> None:
    line = reports.encode(report)
    assert line.count(b"\n") == 1
    assert reports.decode(line) == report


def test_a_failure_keeps_its_code_and_its_words() -> None:
    line = reports.encode(Failed(CloisterError(Code.RELEASE_DENIED, what="w\n" * 5000, why="好", todo="t")))
    assert len(line) < reports.MAX_LINE
    found = reports.decode(line)
    assert isinstance(found, Failed)
    assert (found.error.code, found.error.why, found.error.todo) == (Code.RELEASE_DENIED, "好", "t")


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"[]",
        b'{"event": "reached", "milestone": "rich"}',
        b'{"event": "worker", "pid": -1}',
        b'{"event": 1}',
    ],
)
def test_another_line_is_a_value_error(line: bytes) -> None:
    with pytest.raises(ValueError):
        reports.decode(line)


@given(st.binary(max_size=200))
def test_any_line_is_a_report_or_a_value_error(line: bytes) -> None:
    try:
        reports.decode(line)
    except ValueError:
        return


def test_reporting_to_a_gateway_that_is_gone_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    Reporter(write).send(Reached(Milestone.READY))
    os.close(write)
