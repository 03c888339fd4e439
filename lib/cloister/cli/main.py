# SPDX-License-Identifier: Apache-2.0
"""Entry point: the command tree, and the one place where a failure becomes text and an exit code."""

from __future__ import annotations

import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import Final

import typer
from typer.exceptions import Abort, TyperException

from cloister.cli import (
    attest,
    audit,
    broker,
    ca,
    collateral,
    demo,
    dev,
    doctor,
    identity,
    imports,
    keys,
    measure,
    model,
    policy,
    predict,
    quote,
    references,
    sealed,
    sealing,
    train,
)
from cloister.cli.options import remember_state
from cloister.cli.output import print_error
from cloister.errors import CloisterError, Code

INTERRUPTED_EXIT: Final = 130  # 128 + SIGINT, as shells report it


def build_app() -> typer.Typer:
    """Return the command tree."""
    app = typer.Typer(
        name="cloister",
        help="Train and serve PyTorch models on sealed data, in attested Intel TDX trust domains.",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(invoke_without_command=True)(_root)
    app.add_typer(dev.app, name="dev")
    app.add_typer(identity.app, name="identity")
    app.add_typer(keys.app, name="key")
    app.add_typer(broker.app, name="broker")
    app.add_typer(policy.command_group(), name="policy")
    sealing.register(app)
    app.add_typer(sealed.app, name="sealed")
    app.add_typer(imports.app, name="import")
    measure.register(app)
    app.add_typer(train.app, name="train")
    app.add_typer(model.app, name="model")
    predict.register(app)
    app.add_typer(quote.app, name="quote")
    app.add_typer(collateral.app, name="collateral")
    app.add_typer(attest.app, name="attest")
    ca.register(attest.app)
    app.add_typer(references.app, name="references")
    app.add_typer(audit.app, name="audit")
    doctor.register(app)
    demo.register(app)
    return app


def _root(
    context: typer.Context,
    state: Path = typer.Option(None, "--state", help="State directory; each command takes it as well."),
    version: bool = typer.Option(False, "--version", help="Print the version and end."),
) -> None:
    remember_state(state)
    if version:
        from cloister import __version__

        sys.stdout.write(f"cloister {__version__}\n")
        raise typer.Exit
    if context.invoked_subcommand is None:
        sys.stdout.write(context.get_help() + "\n")


def run(arguments: list[str] | None = None) -> None:
    """Run the command line and end the process with the exit code of docs/cli.md.

    What nobody foresaw is written to a file by the exception hook: one line on the screen, no traceback.
    """
    sys.excepthook = _unexpected
    given = sys.argv[1:] if arguments is None else arguments
    sys.exit(execute(given))


def execute(arguments: list[str]) -> int:
    """Run one command line; return its exit code. Failures that can be foreseen are printed, never raised."""
    as_json = "--json" in _before_separator(arguments)
    try:
        outcome = typer.main.get_command(build_app()).main(args=arguments, prog_name="cloister", standalone_mode=False)
    except CloisterError as error:
        return print_error(error, as_json=as_json)
    except TyperException as error:
        return _usage(error, as_json=as_json)
    except (KeyboardInterrupt, Abort):
        outcome = INTERRUPTED_EXIT
    except BrokenPipeError:
        _drop_stdout()
        return 0
    if outcome == INTERRUPTED_EXIT:
        return _interrupted()
    return outcome if isinstance(outcome, int) else 0


def _usage(error: TyperException, *, as_json: bool) -> int:
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "cloister"
    if type(error).__name__ == "NoArgsIsHelpError":
        sys.stdout.write(error.format_message() + "\n")
        return 2
    problem = CloisterError(
        Code.ARGUMENT_INVALID,
        what=f"{path}: the command line is not right",
        why=error.format_message() or "a parameter is missing",
        todo=f"{path} --help lists what it takes",
    )
    return print_error(problem, as_json=as_json)


def _interrupted() -> int:
    # Nothing on stdout: a stream that ends early, or no document, and the exit code say it.
    sys.stderr.write("\nstopped by you\n")
    return INTERRUPTED_EXIT


def _unexpected(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Write the traceback, without local variables, to a private file and one line to stderr."""
    if issubclass(kind, KeyboardInterrupt):
        _interrupted()
        return
    text = "".join(traceback.format_exception(kind, error, trace))
    with tempfile.NamedTemporaryFile(  # made 0600
        "w", prefix=time.strftime("cloister-%Y%m%d-%H%M%S-"), suffix=".log", delete=False, encoding="utf-8"
    ) as log:
        log.write(text)
    sys.stderr.write(f"error {Code.INTERNAL.text}: unexpected {kind.__name__}; the details are in {log.name}\n")


def _before_separator(arguments: list[str]) -> list[str]:
    """Return the arguments before `--`: behind it they are a job's, not ours."""
    return arguments[: arguments.index("--")] if "--" in arguments else arguments


def _drop_stdout() -> None:
    """Keep the interpreter from complaining at exit about a reader that went away."""
    sys.stdout = Path("/dev/null").open("w", encoding="utf-8")  # noqa: SIM115 (for the rest of the process)


if __name__ == "__main__":
    run()
