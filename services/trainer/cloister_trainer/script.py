# SPDX-License-Identifier: Apache-2.0
"""Execute a job's script: exactly the bytes that were measured, as `__main__`, and say in one line how it failed."""

from __future__ import annotations

import linecache
import sys
import traceback
import types
from collections.abc import Sequence
from typing import Final

from cloister.errors import CloisterError, Code
from cloister.runtime.logging import redact

_MAX_FRAMES: Final = 40
# What gloo says when the other side of a connection is gone; torch gives it no type of its own.
_PEER_GONE: Final = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo", "Gloo")


def run_script(script: bytes, *, name: str, args: Sequence[str]) -> None:
    """Run a script to its end; raise CloisterError when it fails, after its traceback went to stderr."""
    # Tracebacks show lines of the measured bytes: there is no file to read them from.
    source = script.decode("utf-8", "replace")
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    module = types.ModuleType("__main__")
    module.__file__ = name
    sys.modules["__main__"] = module
    sys.argv = [name, *args]
    try:
        exec(compile(script, name, "exec"), module.__dict__)  # noqa: S102 - running it is the point
    except SystemExit as end:
        if end.code not in (None, 0):
            what = f"the script ended with exit code {end.code}"
            raise CloisterError(Code.RANK_FAILED, what=what, why="", todo="read the rank's log") from None
    except CloisterError:
        raise  # it says itself what happened, why and what to do: a traceback would only hide that
    except BaseException as error:  # noqa: BLE001 - whatever a script raises ends the job with its own words
        _print(error)
        raise _failure(error) from None


def _print(error: BaseException) -> None:
    """Write the traceback, without local variables, from the script's own first frame on."""
    trace = error.__traceback__
    own = trace.tb_next if trace else None
    shown = traceback.TracebackException(type(error), error, own, limit=_MAX_FRAMES, capture_locals=False)
    text = "".join(shown.format())
    print(redact(None, "", {"event": text})["event"], file=sys.stderr, end="")  # noqa: T201 - the rank's log


def _failure(error: BaseException) -> CloisterError:
    message = " ".join(str(redact(None, "", {"event": str(error)})["event"]).split())[:500]
    kind = type(error).__name__
    if _is_lost_peer(error, message):
        return CloisterError(
            Code.PEER_LOST,
            what="lost another rank of the job",
            why=message,
            todo="see how the other rank ended",
        )
    place = next((f for f in reversed(traceback.extract_tb(error.__traceback__)) if f.filename == sys.argv[0]), None)
    where = f" at line {place.lineno}" if place else ""
    if isinstance(error, SyntaxError):
        where = f" at line {error.lineno}"
    return CloisterError(
        Code.RANK_FAILED,
        what=f"the script failed{where}: {kind}" + (f": {message}" if message else ""),
        why="",
        todo="read the rank's log for the traceback, correct the script and submit it again",
    )


def _is_lost_peer(error: BaseException, message: str) -> bool:
    distributed = sys.modules.get("torch.distributed")
    if distributed is None:
        return False
    if isinstance(error, distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and any(words in message for words in _PEER_GONE)
