# SPDX-License-Identifier: Apache-2.0
"""`cloister dev ehsm`: a development server with the REST API of Intel's EHSM-KMS."""

from __future__ import annotations

import asyncio
import enum
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import quote

import typer

from cloister.cli.options import Json, State, run_async, state_directory
from cloister.cli.output import Output
from cloister.errors import CloisterError, Code
from cloister.runtime.endpoints import read_endpoints

if TYPE_CHECKING:
    from cloister.cli.state import StateDirectory

PACKAGE = "cloister_sim.ehsm"


class EhsmApi(enum.StrEnum):
    """Which EHSM to be."""

    CURRENT = "0.4.0"
    OLD = "0.3.2"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("ehsm")(ehsm)


def ehsm(
    listen: Annotated[str, typer.Option(help="Address and port; port 0: any free one.")] = "127.0.0.1:9000",
    api: Annotated[EhsmApi, typer.Option(help="Generation of the API: 0.3.2 is what BigDL deploys.")] = EhsmApi.CURRENT,
    state: State = None,
    json: Json = False,
) -> None:
    """Run an EHSM-compatible server until Ctrl-C, with a client enrolled whose files the key broker takes.

    For development: its keys lie on this disk, readable by you.
    """
    directory = state_directory(state).create()
    run_async(_serve(directory, listen, api, Output(as_json=json)))


def arguments(directory: StateDirectory, listen: str, *, endpoints: Path, api: EhsmApi = EhsmApi.CURRENT) -> list[str]:
    """Return how the server is started; it writes `endpoints` when it is ready."""
    return [
        *(sys.executable, "-P", "-m", PACKAGE),
        *("--directory", str(directory.ehsm / "server")),
        *("--client", str(directory.ehsm / "client")),
        *("--endpoints-file", str(endpoints)),
        *("--listen", listen, "--api", api.value),
    ]


def backend_uri(directory: StateDirectory, address: str) -> str:
    """Return the line that puts the key broker's keys behind this server."""
    client = directory.ehsm / "client"
    files = {
        name: quote(str(client / file)) for name, file in (("ca", "ca.pem"), ("appid", "appid"), ("apikey", "apikey"))
    }
    return f"ehsm:https://{address}?" + "&".join(f"{name}={path}" for name, path in files.items())


async def _serve(directory: StateDirectory, listen: str, api: EhsmApi, output: Output) -> None:
    # Of its own: another one, which is about to be refused, must not take this one's away.
    endpoints = directory.endpoints_file(f"ehsm-{os.getpid()}")
    read, write = os.pipe2(os.O_CLOEXEC)
    process = await asyncio.create_subprocess_exec(
        *arguments(directory, listen, endpoints=endpoints, api=api),
        *("--lifeline-fd", str(read)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        pass_fds=[read],
        # Ctrl-C reaches this command only, which then ends it in order.
        start_new_session=True,
    )
    os.close(read)
    try:
        ended = asyncio.ensure_future(process.communicate())
        while not endpoints.exists() and not ended.done():
            await asyncio.wait({ended}, timeout=0.02)
        if not ended.done():
            output.item(_document(directory, read_endpoints(endpoints)["https"]))
            output.note("Ctrl-C stops the server.")
        _, errors = await ended
        raise _ended(process.returncode, errors.decode(errors="replace").splitlines())
    finally:
        endpoints.unlink(missing_ok=True)
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            await process.wait()
        os.close(write)


def _document(directory: StateDirectory, address: str) -> dict[str, str]:
    client = directory.ehsm / "client"
    return {
        "url": f"https://{address}",
        "certificate": str(client / "ca.pem"),
        "appid": str(client / "appid"),
        "apikey": str(client / "apikey"),
        "backend": backend_uri(directory, address),
    }


def _ended(returncode: int | None, words: list[str]) -> CloisterError:
    return CloisterError(
        Code.PROCESS_DIED,
        what=f"the EHSM development server ended with exit code {returncode}",
        why=" | ".join(words[-4:]) or "it said nothing",
        todo="is the port free? --listen 127.0.0.1:0 takes any",
    )
