# SPDX-License-Identifier: Apache-2.0
"""Named, versioned sets of reference values: measurements that a policy accepts by name.

    apiVersion: cloister.dev/v1
    kind: ReferenceSet
    metadata: {name: firmware, version: 3}
    spec:
      mr_td: ["<96 hexadecimal digits>", ...]
      rtmr0: [...]

Whoever uses a set names it and those who may sign it (did:key); the file is a DSSE envelope around this text, signed
with Ed25519. Versions only go up. A set is known by the digest of its contents (SHA-384 of the canonical form).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from cloister.dsse import Envelope
from cloister.errors import CloisterError, Code
from cloister.identity import is_name
from cloister.policyblocks import API_VERSION, BlockReader, digest_of, parse_hex, read_document

# RTMR3 is meant as it was when the workload was sealed: it grows with every key that a TD receives.
REGISTERS: Final = (
    "mr_td",
    "mr_seam",
    "mr_config_id",
    "mr_owner",
    "mr_owner_config",
    "rtmr0",
    "rtmr1",
    "rtmr2",
    "rtmr3",
)
REGISTER_TEXT: Final = "96 hexadecimal digits in lower case"
MAX_VERSION: Final = 2**31 - 1
PAYLOAD_TYPE: Final = "application/vnd.cloister.reference-set.v1+yaml"
_KIND: Final = "ReferenceSet"
_MANUAL: Final = "docs/appraisal.md"


@dataclass(frozen=True, slots=True)
class ReferenceSet:
    """Accepted values by register, 48 bytes each."""

    name: str
    version: int
    values: Mapping[str, tuple[bytes, ...]]
    digest: bytes  # 48 bytes
    source: bytes  # the text

    def __str__(self) -> str:
        return f"{self.name} version {self.version}"


def parse_reference_set(data: bytes) -> ReferenceSet:
    """Parse a set (YAML, at most 64 KiB); raise CloisterError(POLICY_INVALID) for anything else."""
    document = read_document(data, what="reference set", manual=_MANUAL)
    top = BlockReader(document, (), document.root)
    top.choice("apiVersion", (API_VERSION,))
    top.choice("kind", (_KIND,))
    metadata, spec = top.block("metadata"), top.block("spec")
    top.end()
    name = metadata.parsed("name", lambda text: text if is_name(text) else None, "a name of [a-z0-9-], 1 to 63 long")
    version = metadata.number("version", 1, MAX_VERSION)
    metadata.end()
    values = {
        register: spec.each(register, lambda text: parse_hex(text, 48), REGISTER_TEXT)
        for register in REGISTERS
        if spec.has(register)
    }
    spec.end()
    if not values:
        spec.refuse(REGISTERS[0], "the set is empty", f"name at least one of: {', '.join(REGISTERS)}")
    return ReferenceSet(name, version, values, digest_of(document.root), data)


def open_reference_set(data: bytes, *, name: str, signers: Collection[str], threshold: int = 1) -> ReferenceSet:
    """Return the set of this name in a signed envelope, when at least `threshold` of `signers` (did:key) signed it.

    Raises CloisterError: ENVELOPE_INVALID, SIGNATURE_INVALID, POLICY_INVALID, REFERENCES_REJECTED.
    """
    envelope = Envelope.parse(data)
    signed = envelope.signers(PAYLOAD_TYPE)
    counted = signed & frozenset(signers)
    if not 0 < threshold <= len(counted):
        raise CloisterError(
            Code.REFERENCES_REJECTED,
            what=f"the reference set is signed by {len(counted)} of those who may sign {name}, not by {threshold}",
            why=f"it is signed by {', '.join(sorted(signed))}",
            todo="have it signed by those whom the configuration names",
        )
    found = parse_reference_set(envelope.payload)
    if found.name != name:
        raise CloisterError(
            Code.REFERENCES_REJECTED,
            what=f"this is the reference set {found}, not {name}",
            why="a signature under one name is none under another",
            todo="configure the file of the set that is meant",
        )
    return found
