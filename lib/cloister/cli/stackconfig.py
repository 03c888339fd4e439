# SPDX-License-Identifier: Apache-2.0
"""Configuration files of a local stack: what `dev up` writes for each service, as TOML."""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cloister.cli.state import StateDirectory

TomlValue = str | int | bool | Sequence[str] | Sequence[int]
Table = Mapping[str, TomlValue]

PACKAGES: Mapping[str, str] = {
    "attest": "cloister_attest",
    "keybroker": "cloister_keybroker",
    "trainer": "cloister_trainer",
    "gateway": "cloister_serving",
}


class Kms(enum.StrEnum):
    """Where the key broker of a local stack keeps new keys."""

    EMBEDDED = "embedded"
    EHSM = "ehsm"  # an EHSM development server, started with the stack


@dataclass(frozen=True, slots=True)
class StackOptions:
    """What a user may choose about a local stack; port 0 means any free one."""

    tenant: str = "demo"
    user: str = "owner"
    trust_domain: str = "cloister.test"  # RFC 2606: a name nobody can own
    rank_cores: tuple[int, ...] = (0, 1)
    gateway_core: int = 0
    backend_core: int = 1
    gateway_port: int = 0
    https_port: int = 0
    kms: Kms = Kms.EMBEDDED

    @property
    def user_id(self) -> str:
        return f"spiffe://{self.trust_domain}/ns/{self.tenant}/user/{self.user}"


@dataclass(frozen=True, slots=True)
class Places:
    """Where things are that the configuration points to."""

    state: StateDirectory
    platform_socket: Path

    def service_section(self, service: str, options: StackOptions) -> Table:
        port = options.gateway_port if service == "gateway" else 0
        return {
            "trust_domain": options.trust_domain,
            "listen": f"127.0.0.1:{port}",
            "state_dir": str(self.state.service_directory(service)),
            "endpoints_file": str(self.state.endpoints_file(service)),
        }

    def guest_section(self, attest_enrolment: str | None) -> Table:
        section: dict[str, TomlValue] = {"provider": f"simulated:{self.platform_socket}"}
        if attest_enrolment is not None:
            section |= {"attest_endpoint": attest_enrolment, "trust_bundle": str(self.state.bundle)}
        return section


def attest_config(places: Places, options: StackOptions, *, digests: Mapping[str, str], user_spki_sha256: str) -> str:
    """Return attest's TOML: the development root, the services' measurements and the one registered user."""
    state = places.state
    return render_toml(
        {
            "service": places.service_section("attest", options),
            "guest": places.guest_section(None),
            "attest": {"bundle_file": str(state.bundle)},
            "collateral": {"source": f"offline:{state.platform / 'collateral'}"},
        },
        {
            "trust_roots": [{"path": str(state.platform / "root.pem"), "simulated": True}],
            "services": [{"role": service, "script": [digests[service]]} for service in PACKAGES],
            "users": [{"spiffe_id": options.user_id, "spki_sha256": user_spki_sha256, "operator": True}],
        },
    )


def keybroker_config(
    places: Places,
    options: StackOptions,
    *,
    attest_enrolment: str,
    root_key: Path,
    backends: Sequence[str],
) -> str:
    """Return the keybroker's TOML; the first of its back ends takes new keys."""
    return render_toml(
        {
            "service": places.service_section("keybroker", options),
            "guest": places.guest_section(attest_enrolment),
            "keybroker": {
                "root_key": f"file:{root_key}",
                "operators": [options.user_id],
                "backend": backends[0],
                "former_backends": list(backends[1:]),
            },
        }
    )


def trainer_config(places: Places, options: StackOptions, *, attest: Mapping[str, str], keybroker: str) -> str:
    """Return the trainer's TOML; `attest` are that service's endpoints."""
    return render_toml(
        {
            "service": places.service_section("trainer", options),
            "guest": places.guest_section(attest["enrolment"]),
            "trainer": {
                "attest_endpoint": attest["grpc"],
                "keybroker_endpoint": keybroker,
                "cores": list(options.rank_cores),
            },
        }
    )


def gateway_config(places: Places, options: StackOptions, *, attest: Mapping[str, str], keybroker: str) -> str:
    """Return the gateway's TOML; `attest` are that service's endpoints."""
    return render_toml(
        {
            "service": places.service_section("gateway", options),
            "guest": places.guest_section(attest["enrolment"]),
            "serving": {
                "attest_endpoint": attest["grpc"],
                "https_listen": f"127.0.0.1:{options.https_port}",
                "keybroker_endpoint": keybroker,
                "gateway_cores": [options.gateway_core],
                "backend_cores": [options.backend_core],
                "archive_dir": str(places.state.service_directory("gateway") / "archives"),
            },
        }
    )


def render_toml(tables: Mapping[str, Table], arrays: Mapping[str, Sequence[Table]] | None = None) -> str:
    """Render tables, then arrays of tables, as TOML. The standard library reads TOML but does not write it."""
    blocks = [_block(f"[{name}]", table) for name, table in tables.items()]
    for name, entries in (arrays or {}).items():
        blocks += [_block(f"[[{name}]]", entry) for entry in entries]
    return "\n".join(["# Written by `cloister dev up` at every start; changes are lost.\n", *blocks])


def _block(head: str, table: Table) -> str:
    return "\n".join([head, *(f"{key} = {_value(value)}" for key, value in table.items()), ""])


def _value(value: TomlValue | str | int) -> str:
    if isinstance(value, str):
        # A JSON string without control characters is a TOML basic string.
        if not value.isprintable():
            raise ValueError("a configuration value holds a control character")
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    return "[" + ", ".join(_value(item) for item in value) + "]"
