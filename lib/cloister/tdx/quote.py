# SPDX-License-Identifier: Apache-2.0
"""TD quotes, version 4: bytes <-> values, byte for byte.

Layout: Intel TDX DCAP Quoting Library API, A.3 (`sgx_quote_4.h`); everything little-endian.

    header 48 | TD body 584 | u32 size | signature data | zeros, if any
    signature data = signature 64 | attestation key 64 | u16 6 | u32 size | QE data
    QE data        = QE report 384 | signature 64 | u16 size, QE auth data | u16 5 | u32 size, PEM chain

A `Quote` is well formed and *claimed*: nothing in it is authentic before `verify_quote` says so.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, fields
from typing import ClassVar, Final, NoReturn

MAX_QUOTE_SIZE: Final = 64 * 1024  # a real quote has 5 KB; the rest is room for other certificates
MAX_QE_AUTH_SIZE: Final = 1024  # Intel's quoting enclave uses 32

VERSION: Final = 4
ATT_KEY_ECDSA_P256: Final = 2
TEE_SGX: Final = 0x00
TEE_TDX: Final = 0x81
INTEL_QE_VENDOR_ID: Final = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
CERTIFICATION_PCK_CHAIN: Final = 5
CERTIFICATION_QE_REPORT: Final = 6

_HEADER: Final = struct.Struct("<HHI4s16s20s")
_U16: Final = struct.Struct("<H")
_U32: Final = struct.Struct("<I")
_TYPE_AND_SIZE: Final = struct.Struct("<HI")
_SIGNED_SIZE: Final = 48 + 584  # header and body: what the attestation key signs
_SIGNATURE_START: Final = _SIGNED_SIZE + 4
_QE_REPORT_SIZE: Final = 384


class QuoteRejected(Exception):
    """A quote that is malformed or does not verify; the only error this package raises about one."""

    def __init__(self, check: str, reason: str) -> None:
        super().__init__(f"{check}: {reason}")
        self.check = check  # the row id of the check that failed
        self.reason = reason  # public text


class _FixedFields:
    """A dataclass of byte strings with fixed sizes, and its packed form."""

    __slots__ = ()
    SIZES: ClassVar[tuple[int, ...]]

    def _require_sizes(self, values: tuple[bytes, ...]) -> None:
        if tuple(map(len, values)) != self.SIZES:
            raise ValueError(f"{type(self).__name__}: fields of {self.SIZES} bytes, not {tuple(map(len, values))}")


@dataclass(frozen=True, slots=True)
class TdBody(_FixedFields):
    """What the TDX module says about a TD (TD report 1.0, 584 bytes)."""

    SIZES: ClassVar[tuple[int, ...]] = (16, 48, 48, 8, 8, 8, 48, 48, 48, 48, 48, 48, 48, 48, 64)
    _STRUCT: ClassVar[struct.Struct] = struct.Struct("".join(f"{size}s" for size in SIZES))

    tee_tcb_svn: bytes  # 16
    mr_seam: bytes  # 48: SHA-384 of the TDX module
    mr_signer_seam: bytes  # 48: zero for a module of Intel
    seam_attributes: bytes  # 8
    td_attributes: bytes  # 8: bit 0 is debug
    xfam: bytes  # 8
    mr_td: bytes  # 48: initial contents of the TD
    mr_config_id: bytes  # 48
    mr_owner: bytes  # 48
    mr_owner_config: bytes  # 48
    rtmrs: tuple[bytes, bytes, bytes, bytes]  # 48 each
    report_data: bytes  # 64

    def __post_init__(self) -> None:
        self._require_sizes(self._values())

    @classmethod
    def parse(cls, data: bytes, offset: int = 0) -> TdBody:
        """Read 584 bytes at `offset`; the caller has made sure that they are there."""
        v = cls._STRUCT.unpack_from(data, offset)
        rtmrs = (v[10], v[11], v[12], v[13])
        return cls(v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9], rtmrs, v[14])

    def to_bytes(self) -> bytes:
        return b"".join(self._values())

    def _values(self) -> tuple[bytes, ...]:
        return (
            self.tee_tcb_svn,
            self.mr_seam,
            self.mr_signer_seam,
            self.seam_attributes,
            self.td_attributes,
            self.xfam,
            self.mr_td,
            self.mr_config_id,
            self.mr_owner,
            self.mr_owner_config,
            *self.rtmrs,
            self.report_data,
        )


@dataclass(frozen=True, slots=True)
class QeReport(_FixedFields):
    """The quoting enclave's SGX report (384 bytes), reserved fields included because they are signed."""

    SIZES: ClassVar[tuple[int, ...]] = (16, 4, 28, 16, 32, 32, 32, 96, 2, 2, 60, 64)
    _STRUCT: ClassVar[struct.Struct] = struct.Struct("".join(f"{size}s" for size in SIZES))

    cpu_svn: bytes
    misc_select: bytes
    reserved_1: bytes
    attributes: bytes  # 16: flags u64 (bit 1 is debug), xfrm u64
    mr_enclave: bytes
    reserved_2: bytes
    mr_signer: bytes
    reserved_3: bytes
    isv_prod_id: bytes  # u16
    isv_svn: bytes  # u16
    reserved_4: bytes
    report_data: bytes

    def __post_init__(self) -> None:
        self._require_sizes(self._values())

    @classmethod
    def parse(cls, data: bytes) -> QeReport:
        """Read exactly 384 bytes."""
        return cls(*cls._STRUCT.unpack(data))

    def to_bytes(self) -> bytes:
        return b"".join(self._values())

    @property
    def debug(self) -> bool:
        return bool(self.attributes[0] & 0x02)

    def _values(self) -> tuple[bytes, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True, slots=True)
class QuoteSignature:
    """The signature data: who vouches for the body, and who vouches for them."""

    signature: bytes  # 64, r || s big-endian, by the attestation key over header and body
    attestation_key: bytes  # 64, x || y big-endian, P-256
    qe_report: bytes  # 384
    qe_report_signature: bytes  # 64, by the PCK key
    qe_auth_data: bytes  # 0 to 1,024
    pck_chain_pem: bytes  # leaf, CA, root; often NUL-terminated

    def to_bytes(self) -> bytes:
        qe_data = b"".join(
            (
                self.qe_report,
                self.qe_report_signature,
                _U16.pack(len(self.qe_auth_data)),
                self.qe_auth_data,
                _TYPE_AND_SIZE.pack(CERTIFICATION_PCK_CHAIN, len(self.pck_chain_pem)),
                self.pck_chain_pem,
            )
        )
        outer = _TYPE_AND_SIZE.pack(CERTIFICATION_QE_REPORT, len(qe_data))
        return self.signature + self.attestation_key + outer + qe_data

    @classmethod
    def parse(cls, data: bytes) -> QuoteSignature:
        """Read the signature data, all of it; raise QuoteRejected D1 to D4."""
        # D1, D3: one QE-report certification block fills the rest exactly.
        if len(data) < 134:
            _reject("D3", f"the signature data has {len(data)} bytes, too few for a signature and a key")
        kind, size = _TYPE_AND_SIZE.unpack_from(data, 128)
        if kind != CERTIFICATION_QE_REPORT:
            _reject("D1", f"certification data of type {kind}, where version 4 has 6 (QE report)")
        if size != len(data) - 134:
            _reject("D3", f"QE certification data of {size} bytes in a field of {len(data) - 134}")
        # D4: whatever the quoting enclave added to its key.
        if size < _QE_REPORT_SIZE + 64 + 2:
            _reject("D3", f"QE certification data of {size} bytes is too short for a QE report")
        (auth_size,) = _U16.unpack_from(data, 582)
        if auth_size > MAX_QE_AUTH_SIZE:
            _reject("D4", f"QE authentication data of {auth_size} bytes; at most {MAX_QE_AUTH_SIZE}")
        auth_end = 584 + auth_size
        if auth_end + 6 > len(data):
            _reject("D4", f"QE authentication data of {auth_size} bytes runs over the end")
        # D2, D3: a PCK chain fills the rest exactly.
        kind, size = _TYPE_AND_SIZE.unpack_from(data, auth_end)
        if kind != CERTIFICATION_PCK_CHAIN:
            _reject("D2", f"inner certification data of type {kind}; only 5 (PCK certificate chain) is accepted")
        if size != len(data) - auth_end - 6:
            _reject("D3", f"a PCK chain of {size} bytes in a field of {len(data) - auth_end - 6}")
        return cls(
            signature=data[:64],
            attestation_key=data[64:128],
            qe_report=data[134:518],
            qe_report_signature=data[518:582],
            qe_auth_data=data[584:auth_end],
            pck_chain_pem=data[auth_end + 6 :],
        )


@dataclass(frozen=True, slots=True)
class Quote:
    """A well-formed TD quote of version 4; `to_bytes` gives back exactly what `parse` read."""

    version: int
    att_key_type: int
    tee_type: int
    qe_vendor_id: bytes  # 16
    user_data: bytes  # 20: the first 16 name the platform's quoting enclave
    body: TdBody
    signature: QuoteSignature
    trailing_zeros: int = 0  # some providers hand out their whole buffer

    @classmethod
    def parse(cls, data: bytes) -> Quote:
        """Parse a quote; raise QuoteRejected (H1 to H9, D1 to D4) for anything that is not exactly one."""
        # H1: size, before anything is read.
        if not _SIGNATURE_START <= len(data) <= MAX_QUOTE_SIZE:
            _reject("H1", f"{len(data)} bytes; a quote has {_SIGNATURE_START} to {MAX_QUOTE_SIZE}")
        version, att_key_type, tee_type, reserved, vendor, user_data = _HEADER.unpack_from(data)
        # H2: version. Versions 3 (SGX) and 5 have other layouts.
        if version != VERSION:
            _reject("H2", f"quote version {version}; only version {VERSION} is accepted")
        # H3: kind of attestation key.
        if att_key_type != ATT_KEY_ECDSA_P256:
            _reject("H3", f"attestation key of type {att_key_type}; only 2 (ECDSA P-256) is accepted")
        # H4: kind of TEE.
        if tee_type not in (TEE_SGX, TEE_TDX):
            _reject("H4", f"TEE type {tee_type:#x} is neither SGX nor TDX")
        # H5: version and TEE belong together.
        if tee_type != TEE_TDX:
            _reject("H5", f"a version {version} quote of TEE type {tee_type:#x}; only TDX (0x81) is accepted")
        # H6: vendor of the quoting enclave.
        if vendor != INTEL_QE_VENDOR_ID:
            _reject("H6", f"quoting enclave of vendor {vendor.hex()}, not Intel")
        # H7 is about version 5.
        # H8: the signature data is all there, and nothing but zeros is behind it.
        (size,) = _U32.unpack_from(data, _SIGNED_SIZE)
        end = _SIGNATURE_START + size
        if end > len(data):
            _reject("H8", f"signature data of {size} bytes in a quote with {len(data) - _SIGNATURE_START} left")
        if any(data[end:]):
            _reject("H8", f"{len(data) - end} bytes behind the signature data that are not all zero")
        # H9: reserved bytes of the header.
        if any(reserved):
            _reject("H9", f"reserved header bytes are {reserved.hex()}, not zero")
        return cls(
            version=version,
            att_key_type=att_key_type,
            tee_type=tee_type,
            qe_vendor_id=vendor,
            user_data=user_data,
            body=TdBody.parse(data, _HEADER.size),
            signature=QuoteSignature.parse(bytes(data[_SIGNATURE_START:end])),
            trailing_zeros=len(data) - end,
        )

    def signed_bytes(self) -> bytes:
        """Return header and body (632 bytes): what the attestation key signs."""
        header = _HEADER.pack(
            self.version, self.att_key_type, self.tee_type, bytes(4), self.qe_vendor_id, self.user_data
        )
        return header + self.body.to_bytes()

    def to_bytes(self) -> bytes:
        signature = self.signature.to_bytes()
        return self.signed_bytes() + _U32.pack(len(signature)) + signature + bytes(self.trailing_zeros)


def _reject(check: str, reason: str) -> NoReturn:
    raise QuoteRejected(check, reason)
