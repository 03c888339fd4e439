# SPDX-License-Identifier: Apache-2.0
"""Enrol the broker at an EHSM, once: its credentials go to files and nowhere else.

python -m cloister_keybroker.backends.ehsm https://HOST:9000 --ca FILE --out DIR [--pin sha256:HEX] [--server-name NAME]
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

from cloister.atomicfile import file_error, write_atomically
from cloister.errors import EXIT_CODE, CloisterError, Code
from cloister.secret import SecretBytes
from cloister_keybroker.backends.ehsm.answers import AnswerInvalid
from cloister_keybroker.backends.ehsm.failures import not_the_server
from cloister_keybroker.backends.ehsm.options import EhsmOptions, read_pins
from cloister_keybroker.backends.ehsm.transport import ExchangeFailed, NotTheServer, Transport
from cloister_keybroker.backends.failures import answer_invalid, refused, unavailable
from cloister_keybroker.backends.uri import BackendUri, invalid

_NAME = "ehsm"
_MAX_CREDENTIAL = 128  # characters


async def enroll(options: EhsmOptions, directory: Path) -> None:
    """Ask for a user of the broker's own and write appid and apikey (0600); never over files that are there."""
    appid_file, key_file = directory / "appid", directory / "apikey"
    for file in (appid_file, key_file):
        if file.exists():
            raise CloisterError(
                Code.ARGUMENT_INVALID,
                what=f"{file} is there already",
                why="keys belong to the user that made them, and another user cannot open them",
                todo="use it, or name another directory with --out",
            )
    transport = Transport(options, connections=1, clock=lambda: datetime.now(UTC))
    try:
        async with asyncio.timeout(options.limits.total_s):
            answer = (await transport.get("Enroll")).answer
        if answer.refusal is not None:
            raise refused(_NAME, f"it answered with code {answer.code}")
        appid = answer.text("appid", most=_MAX_CREDENTIAL)
        api_key = SecretBytes(answer.text("apikey", most=_MAX_CREDENTIAL).encode())
    except NotTheServer as other:
        raise not_the_server(_NAME, other.why) from None
    except (ExchangeFailed, TimeoutError) as failed:
        raise unavailable(_NAME, str(failed) or "no answer in time") from None
    except AnswerInvalid as wrong:
        raise answer_invalid(_NAME, str(wrong)) from None
    finally:
        await transport.aclose()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise file_error(error, what=f"{directory} cannot be made") from None
    write_atomically(key_file, api_key.reveal() + b"\n")
    write_atomically(appid_file, f"{appid}\n".encode())


def backend_line(arguments: argparse.Namespace) -> str:
    """Return what to put into the broker's configuration."""
    directory = arguments.out.resolve()
    options = {
        "appid": directory / "appid",
        "apikey": directory / "apikey",
        "ca": arguments.ca and arguments.ca.resolve(),
    }
    options |= {"pin": arguments.pin, "server-name": arguments.server_name}
    text = "&".join(f"{name}={quote(str(value), safe='/:,')}" for name, value in options.items() if value)
    return f"ehsm:{arguments.url}?{text}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m cloister_keybroker.backends.ehsm", description=__doc__)
    parser.add_argument("url", help="https://HOST:PORT of EHSM-KMS")
    parser.add_argument("--ca", type=Path, help="PEM: its CA's certificate, or its own")
    parser.add_argument("--pin", help="sha256: and 64 hexadecimal digits of its public key, instead of --ca or with it")
    parser.add_argument("--server-name", help="the name in its certificate, when the address has another")
    parser.add_argument("--out", type=Path, required=True, help="directory for appid and apikey")
    arguments = parser.parse_args()
    try:
        line = backend_line(arguments)
        uri = BackendUri.parse(line)
        if arguments.ca is None and arguments.pin is None:
            raise invalid(str(uri), "give --ca or --pin: whoever answers at that address would be believed")
        options = EhsmOptions(
            name=_NAME,
            url=f"https://{uri.https().netloc}",
            appid="",
            api_key=SecretBytes(b""),
            ca_file=arguments.ca,
            pins=read_pins(uri) if arguments.pin else frozenset(),
            server_name=arguments.server_name,
            enclave_policy=None,
        )
        asyncio.run(enroll(options, arguments.out))
    except CloisterError as error:
        print(error, file=sys.stderr)  # noqa: T201 - a command's answer
        return EXIT_CODE[error.kind]
    print(f'backend = "{line}"')  # noqa: T201 - a command's answer
    return 0


if __name__ == "__main__":
    sys.exit(main())
