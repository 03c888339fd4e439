# SPDX-License-Identifier: Apache-2.0
"""Release policies as text: what the demo puts in force and what `key draft-policy` prints to start from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class PolicyDraft:
    """The choices of a release policy; everything else is as strict as it gets."""

    name: str
    owner: str  # SPIFFE id
    key_uri: str
    purposes: Sequence[str]  # "train", "serve", "evaluate"
    scripts: Sequence[str]  # "sha384:<hex>" of every script that may hold the key
    identities: Sequence[str]  # globs over SPIFFE ids
    measurements: Mapping[str, Sequence[str]] = field(default_factory=dict)  # "mr_td", "rtmr1", ...: hex of 48 bytes
    # What scripts may run on: without these a script's digest proves little, since what runs it could do anything.
    environments: Sequence[str] = ()  # "sha384:<hex>" over interpreter, packages and Cloister itself
    simulated: bool = False  # True: evidence of a simulated TD may pass
    version: int = 1
    previous: str = ""  # "sha384:<hex>" of the policy in force, empty for the first
    max_per_job: int = 8
    lease: str = "1h"

    def to_yaml(self) -> str:
        """Render the policy; every value is quoted, so that YAML finds nothing to interpret."""
        previous = f", previous: {_text(self.previous)}" if self.previous else ""
        return "\n".join(
            [
                "apiVersion: cloister.dev/v1",
                "kind: ReleasePolicy",
                "metadata:",
                f"  {{name: {_text(self.name)}, version: {self.version}{previous}, owner: {_text(self.owner)}}}",
                "spec:",
                f"  key: {{uri: {_text(self.key_uri)}, versions: {{min: 1}}, purposes: {_list(self.purposes)}}}",
                "  when:",
                f"    tee: {{type: tdx, debug: deny, simulated: {'allow' if self.simulated else 'deny'}}}",
                *self._measurements(),
                "    workload:",
                f"      script: {_list(self.scripts)}",
                *([f"      environment: {_list(self.environments)}"] if self.environments else []),
                "      no_events_after: cloister.workload.sealed",
                f"    identity: {{spiffe: {_list(self.identities)}}}",
                "    evidence: {max_age: 5m, nonce: broker}",
                f"  release: {{wrap: [hpke-x25519-mlkem768], max_per_job: {self.max_per_job}, lease: {self.lease}}}",
                "",
            ]
        )

    def _measurements(self) -> list[str]:
        if not self.measurements:
            return []
        registers = (f"      {name}: {_list(values)}" for name, values in self.measurements.items())
        return ["    measurements:", *registers]


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)


def _list(values: Sequence[str]) -> str:
    return "[" + ", ".join(_text(value) for value in values) + "]"
