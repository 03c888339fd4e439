# SPDX-License-Identifier: Apache-2.0
"""The ehsm: back end as the configuration names it, and the limits of its calls.

ehsm:https://HOST:PORT?appid=FILE&apikey=FILE&ca=FILE[&pin=sha256:HEX,...][&server-name=NAME][&enclave-policy=FILE]

Without `ca` or `pin` it is not used at all. `ca` is a PEM file with a CA's certificate or the server's own; `pin` is
SHA-256 of the server's public key (SubjectPublicKeyInfo, DER), several while it is changed; with both, both must hold.
`server-name` is the name in the certificate when the address has another: EHSM's own certificate says "ehsm".
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

from cloister.secret import SecretBytes
from cloister_keybroker.backends.uri import BackendUri, invalid, read_credential

_PIN: Final = re.compile(r"sha256:([0-9a-f]{64})")
_MAX_PINS: Final = 4
_NAME: Final = re.compile(r"[A-Za-z0-9.-]{1,253}")
_APPID: Final = re.compile(r"[A-Za-z0-9-]{1,64}")
_APIKEY: Final = re.compile(r"[!-~]{16,128}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EhsmLimits:
    """Bounds of calls, in seconds unless they say otherwise."""

    connect_s: float = 2.0  # TCP and TLS
    total_s: float = 5.0  # of a call: waiting for a place, all attempts, the answer
    idle_s: float = 4.0  # after which a connection is not used again; EHSM closes it at 5 to 6
    unwraps: int = 16  # at once
    changes: int = 2  # at once: creating, wrapping, disabling, deleting
    waiting: int = 64  # calls of a kind that wait for a place
    skew_alarm_s: float = 60.0  # EHSM refuses requests that are ten minutes off


@dataclass(frozen=True, slots=True)
class EhsmOptions:
    """What the configuration says."""

    name: str
    url: str  # https://HOST:PORT
    appid: str
    api_key: SecretBytes
    ca_file: Path | None
    pins: frozenset[bytes]  # SHA-256, 32 bytes each
    server_name: str | None
    enclave_policy: Path | None
    limits: EhsmLimits = field(default_factory=EhsmLimits)

    @classmethod
    def of(cls, uri: BackendUri) -> Self:
        """Read a URI and the credentials that it names; raise CloisterError."""
        uri.only("appid", "apikey", "ca", "pin", "server-name", "enclave-policy")
        address = uri.https()
        if address.path not in ("", "/"):
            raise invalid(str(uri), "the address is https://HOST:PORT, without a path")
        options = uri.options
        if "ca" not in options and "pin" not in options:
            raise invalid(str(uri), "it has neither ca nor pin: whoever answers at that address would be believed")
        server_name = options.get("server-name")
        if server_name is not None and not _NAME.fullmatch(server_name):
            raise invalid(str(uri), "server-name is not a host name")
        appid = read_credential(uri.file("appid")).reveal().decode(errors="replace")
        if not _APPID.fullmatch(appid):
            raise invalid(str(uri), "the appid in its file is not one")
        api_key = read_credential(uri.file("apikey"))
        if not _APIKEY.fullmatch(api_key.reveal().decode(errors="replace")):
            raise invalid(str(uri), "the API key in its file is not one")
        return cls(
            name=uri.name,
            url=f"https://{address.netloc}",
            appid=appid,
            api_key=api_key,
            ca_file=uri.file("ca") if "ca" in options else None,
            pins=read_pins(uri) if "pin" in options else frozenset(),
            server_name=server_name,
            enclave_policy=uri.file("enclave-policy") if "enclave-policy" in options else None,
        )


def read_pins(uri: BackendUri) -> frozenset[bytes]:
    """Return the pins of a URI; raise CONFIG_INVALID."""
    found = [_PIN.fullmatch(pin) for pin in uri.required("pin").split(",")]
    if not 1 <= len(found) <= _MAX_PINS or None in found:
        raise invalid(str(uri), f"a pin is sha256: and 64 hexadecimal digits; up to {_MAX_PINS}, separated by commas")
    return frozenset(bytes.fromhex(match[1]) for match in found if match)
