# SPDX-License-Identifier: Apache-2.0
"""The command line in this process: exit code, standard output and standard error of one command."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

from cloister.cli.main import execute


@dataclass(frozen=True)
class Ran:
    """What one command left."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        return cast(dict[str, Any], json.loads(self.out))


def run(*arguments: object) -> Ran:
    """Run a command; its output is collected, not shown."""
    return _run([str(argument) for argument in arguments])


def _run(arguments: Iterable[str]) -> Ran:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = execute(list(arguments))
    return Ran(code, out.getvalue(), err.getvalue())
