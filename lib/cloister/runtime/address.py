# SPDX-License-Identifier: Apache-2.0
"""Addresses to listen on, "host:port", and errors that name them."""

from __future__ import annotations

import errno
import os
import socket

from cloister.errors import CloisterError, Code


def split_address(listen: str) -> tuple[str, int]:
    """Return host and port of "127.0.0.1:0" or "[::1]:0"; raise CloisterError(CONFIG_INVALID)."""
    host, separator, port = listen.rpartition(":")
    if not separator or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise CloisterError(
            Code.CONFIG_INVALID,
            what=f"{listen!r} is not an address to listen on",
            why="an address is host:port, port 0 to 65535",
            todo="write for example 127.0.0.1:0 to have a free port chosen",
        )
    return host.strip("[]"), int(port)


def bind_error(listen: str, error: OSError | None = None) -> CloisterError:
    """Return the error that says why nothing can listen there: PORT_TAKEN, or an address that is not ours."""
    found = error or _try_to_bind(listen)
    if found is None or found.errno == errno.EADDRINUSE:
        return CloisterError(
            Code.PORT_TAKEN,
            what=f"cannot listen on {listen}",
            why="another process listens there",
            todo="stop that process, choose another port, or use port 0",
        )
    return CloisterError(
        Code.CONFIG_INVALID,
        what=f"cannot listen on {listen}",
        why=os.strerror(found.errno) if found.errno and found.errno > 0 else str(found),
        todo="give an address of this machine",
    )


def _try_to_bind(listen: str) -> OSError | None:
    """Bind and let go again: gRPC does not pass on why it could not."""
    host, port = split_address(listen)
    try:
        kind, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(kind, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen()
    except OSError as error:
        return error
    return None
