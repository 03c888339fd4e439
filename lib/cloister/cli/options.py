# SPDX-License-Identifier: Apache-2.0
"""Options that many commands share, and the split of a command line at `--`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand

from cloister.cli.state import StateDirectory
from cloister.errors import CloisterError, Code

if TYPE_CHECKING:
    from cloister.cli.session import Session

T = TypeVar("T")

Json = Annotated[bool, typer.Option("--json", help="Machine-readable result on stdout; progress goes to stderr.")]
Receipt = Annotated[
    Path | None,
    typer.Option("--receipt", metavar="FILE", help="Keep the broker's receipt here, with what proves it offline."),
]
State = Annotated[
    Path | None,
    typer.Option("--state", envvar="CLOISTER_STATE", help="State directory (default ~/.local/state/cloister)."),
]


class WithJobArguments(TyperCommand):
    """A command whose arguments behind `--` belong to somebody else; they are in `ctx.meta[JOB_ARGUMENTS]`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Cut the line at the first `--` before anything is parsed, so that no positional argument swallows them."""
        own, behind = (args[: args.index("--")], args[args.index("--") + 1 :]) if "--" in args else (args, [])
        ctx.meta[JOB_ARGUMENTS] = behind
        return super().parse_args(ctx, own)


JOB_ARGUMENTS = "cloister.job-arguments"


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """Run a command's coroutine; Ctrl-C cancels it, so that its `finally` blocks run, and raises KeyboardInterrupt."""
    return asyncio.run(work)


def parse_assignment(text: str, *, option: str) -> tuple[str, str]:
    """Split NAME=VALUE; raise CloisterError(ARGUMENT_INVALID) when either side is missing."""
    name, separator, value = text.partition("=")
    if not (separator and name and value):
        raise CloisterError(
            Code.ARGUMENT_INVALID,
            what=f"{option} {text}: not NAME=VALUE",
            why="the name says how the job's script asks for it",
            todo=f"write it like {option} reviews=./sealed",
        )
    return name, value


def existing_directory(path: Path, *, what: str) -> Path:
    """Return the absolute path of a directory that is there, or raise CloisterError(FILE_NOT_FOUND)."""
    if not path.is_dir():
        raise CloisterError(
            Code.FILE_NOT_FOUND,
            what=f"{what} {path} is not a directory",
            why="it does not exist" if not path.exists() else "it is a file",
            todo="name the directory",
        )
    return path.resolve()


def existing_file(path: Path, *, what: str) -> Path:
    """Return the absolute path of a file that is there, or raise CloisterError(FILE_NOT_FOUND)."""
    if not path.is_file():
        raise CloisterError(
            Code.FILE_NOT_FOUND,
            what=f"{what} {path} is not a file",
            why="it does not exist" if not path.exists() else "it is a directory",
            todo="name the file",
        )
    return path.resolve()


_root_state: ContextVar[Path | None] = ContextVar("cloister-state", default=None)


def remember_state(option: Path | None) -> None:
    """Keep what stood before the command (`cloister --state DIR dev up`)."""
    _root_state.set(option)


def state_directory(option: Path | None) -> StateDirectory:
    """Return the state directory a command works in: its own `--state`, then the one before the command."""
    return StateDirectory.resolve(option or _root_state.get())


def in_session(
    state: Path | None, work: Callable[[Session], Coroutine[Any, Any, T]], *, receipts: Path | None = None
) -> T:
    """Run `work` with a session on the running stack; keep the receipts that it got in a file, if one is named."""
    from cloister.cli.session import open_session

    async def with_session() -> T:
        async with open_session(state_directory(state)) as session:
            result = await work(session)
            if receipts is not None:
                from cloister.cli.auditlog import save_receipts

                await save_receipts(session, receipts)
            return result

    return run_async(with_session())
