# SPDX-License-Identifier: Apache-2.0
"""The SGX extension of a PCK certificate: which platform it is, and at which security version.

Source: Intel SGX PCK Certificate and Certificate Revocation List Profile Specification, 1.3.5. Row P7: strict DER,
every member exactly once and of exactly its size, nothing unknown.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cryptography.x509 import ObjectIdentifier

from cloister.tdx.der import BOOLEAN, ENUMERATED, INTEGER, OBJECT_IDENTIFIER, OCTET_STRING, DerError, DerReader

SGX_EXTENSION_OID: Final = ObjectIdentifier("1.2.840.113741.1.13.1")
_ARC: Final = bytes.fromhex("2a864886f84d010d01")  # the contents of that OID
_PPID, _TCB, _PCE_ID, _FMSPC, _SGX_TYPE, _INSTANCE, _CONFIGURATION = range(1, 8)
_COMPONENTS: Final = range(1, 17)
_PCE_SVN, _CPU_SVN = 17, 18
_CONFIGURATION_FLAGS: Final = (1, 2, 3)  # dynamic platform, cached keys, SMT enabled


@dataclass(frozen=True, slots=True)
class PckExtension:
    """A platform's identity and TCB, as Intel certified them."""

    ppid: bytes  # 16
    tcb_components: bytes  # 16 numbers
    pce_svn: int  # 0 to 65,535
    pce_id: bytes  # 2
    fmspc: bytes  # 6: family, model, stepping, platform, custom SKU
    sgx_type: int  # 0 standard, 1 scalable, 2 scalable with integrity
    platform_instance_id: bytes  # 16, or empty: only the Platform CA certifies one

    @classmethod
    def parse(cls, data: bytes) -> PckExtension:
        """Parse the extension's value; raise DerError for anything that is not exactly one."""
        outer = DerReader(data)
        members = _Members(outer.enter(), _ARC)
        outer.finish()
        tcb = members.nested(_TCB)
        components = bytes(tcb.integer(number, highest=255) for number in _COMPONENTS)
        pce_svn = tcb.integer(_PCE_SVN, highest=65_535)
        if tcb.octets(_CPU_SVN, size=16) != components:
            raise DerError("the 16 TCB components are not the bytes of CPUSVN")
        tcb.finish()
        extension = cls(
            ppid=members.octets(_PPID, size=16),
            tcb_components=components,
            pce_svn=pce_svn,
            pce_id=members.octets(_PCE_ID, size=2),
            fmspc=members.octets(_FMSPC, size=6),
            sgx_type=members.integer(_SGX_TYPE, highest=2, tag=ENUMERATED),
            platform_instance_id=members.octets(_INSTANCE, size=16) if _INSTANCE in members else b"",
        )
        if _CONFIGURATION in members:
            configuration = members.nested(_CONFIGURATION)
            for number in _CONFIGURATION_FLAGS:
                if number in configuration:
                    configuration.boolean(number)
            configuration.finish()
        members.finish()
        return extension


class _Members:
    """SEQUENCE OF SEQUENCE {OID arc.n, value}: members by n, each taken once."""

    def __init__(self, reader: DerReader, arc: bytes) -> None:
        self._arc = arc
        self._values: dict[int, DerReader] = {}
        while not reader.at_end:
            member = reader.enter()
            oid = member.take(OBJECT_IDENTIFIER)
            if len(oid) != len(arc) + 1 or not oid.startswith(arc) or oid[-1] in self._values:
                raise DerError(f"object identifier {oid.hex()} is there twice or does not belong there")
            self._values[oid[-1]] = member

    def __contains__(self, number: int) -> bool:
        return number in self._values

    def octets(self, number: int, *, size: int) -> bytes:
        member = self._take(number)
        value = member.take(OCTET_STRING)
        member.finish()
        if len(value) != size:
            raise DerError(f"member {number} has {len(value)} bytes, not {size}")
        return value

    def integer(self, number: int, *, highest: int, tag: int = INTEGER) -> int:
        member = self._take(number)
        value = member.integer(tag)
        member.finish()
        if not 0 <= value <= highest:
            raise DerError(f"member {number} is {value}, not a number from 0 to {highest}")
        return value

    def boolean(self, number: int) -> bool:
        member = self._take(number)
        value = member.take(BOOLEAN)
        member.finish()
        if value not in (b"\x00", b"\xff"):
            raise DerError(f"member {number} is not a DER boolean")
        return value == b"\xff"

    def nested(self, number: int) -> _Members:
        member = self._take(number)
        inner = _Members(member.enter(), self._arc + bytes([number]))
        member.finish()
        return inner

    def finish(self) -> None:
        if self._values:
            raise DerError(f"members {sorted(self._values)} are unknown")

    def _take(self, number: int) -> DerReader:
        try:
            return self._values.pop(number)
        except KeyError:
            raise DerError(f"member {number} is missing") from None
