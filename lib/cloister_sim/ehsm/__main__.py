# SPDX-License-Identifier: Apache-2.0
"""Run the development server: python -m cloister_sim.ehsm --directory DIR [--listen HOST:PORT] [--client DIR]."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from cloister.atomicfile import write_atomically
from cloister.errors import EXIT_CODE, CloisterError
from cloister.runtime.endpoints import write_endpoints
from cloister_sim.ehsm.server import EhsmServer
from cloister_sim.ehsm.service import Generation
from cloister_sim.ending import end_event


async def run(arguments: argparse.Namespace) -> None:
    """Serve until SIGTERM, SIGINT, or the other end of the lifeline closes."""
    stop = end_event(arguments.lifeline_fd)
    async with EhsmServer(arguments.directory, listen=arguments.listen, generation=Generation(arguments.api)) as server:
        if arguments.client is not None:
            await write_client(server, arguments.client)
        if arguments.endpoints_file is not None:
            write_endpoints(arguments.endpoints_file, {"https": server.url.removeprefix("https://")})
        sys.stdout.write(f"EHSM development server ready on {server.url}, certificate {server.certificate_file}\n")
        sys.stdout.flush()
        await stop.wait()


async def write_client(server: EhsmServer, directory: Path) -> None:
    """Enrol a client once and write what it needs, readable by this user only: ca.pem, appid, apikey."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomically(directory / "ca.pem", server.certificate_file.read_bytes())
    # The API key is written first: with an appid there is always one.
    if not (directory / "appid").exists():
        appid, api_key = await server.service.enroll()
        write_atomically(directory / "apikey", f"{api_key}\n".encode())
        write_atomically(directory / "appid", f"{appid}\n".encode())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m cloister_sim.ehsm", description=__doc__)
    parser.add_argument(
        "--directory", type=Path, required=True, help="keys, users and certificate; made at first start"
    )
    parser.add_argument("--listen", default="127.0.0.1:9000", help="address and port; port 0 for any free one")
    parser.add_argument("--client", type=Path, help="directory for one client's ca.pem, appid and apikey")
    parser.add_argument("--endpoints-file", type=Path, help="written when the server accepts connections")
    parser.add_argument("--lifeline-fd", type=int, help="end when this pipe does")
    parser.add_argument("--api", choices=[generation.value for generation in Generation], default="0.4.0")
    try:
        asyncio.run(run(parser.parse_args()))
    except CloisterError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_CODE[error.kind]
    return 0


if __name__ == "__main__":
    sys.exit(main())
