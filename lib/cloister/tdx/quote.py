# SPDX-License-Identifier: Apache-2.0
"""Quotes of TDs (versions 4 and 5) and of SGX enclaves (versions 3 and 5): bytes <-> values, byte for byte.

Layout: Intel TDX DCAP Quoting Library API, A.3 (`sgx_quote_4.h`, `sgx_quote_5.h`), and Intel SGX ECDSA Quote Library
API, A.4 (`sgx_quote_3.h`); everything little-endian.

    header 48 | body | u32 size | signature data | zeros, if any
    body: 3: SGX report 384   4: TD report 584   5: u16 type, u32 size, report (384, 584, 648, 885)
    signature data = signature 64 | attestation key 64 | [4, 5: u16 6 | u32 size] | QE data
    QE data        = QE report 384 | signature 64 | u16 size, QE auth data | u16 5 | u32 size, PEM chain

A quote is well formed and *claimed*: nothing in it is authentic before it is verified. `Quote` is a TD's, `SgxQuote`
an enclave's, and neither parser returns the other.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final, NoReturn

from cloister.tdx.body import SGX_BODY_TYPE, SGX_REPORT_SIZE, TD_10_SIZE, TD_BODIES, QeReport, SgxReport, TdBody

__all__ = ["AnyQuote", "QeReport", "Quote", "QuoteRejected", "QuoteSignature", "SgxQuote", "TdBody", "parse_quote"]

MAX_QUOTE_SIZE: Final = 64 * 1024  # a real quote has 5 KB; the rest is room for other certificates
MAX_QE_AUTH_SIZE: Final = 1024  # Intel's quoting enclave uses 32

VERSION: Final = 4
VERSION_SGX: Final = 3
VERSION_5: Final = 5
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
_QE_REPORT_SIZE: Final = SGX_REPORT_SIZE
_SMALLEST: Final = _HEADER.size + SGX_REPORT_SIZE + _U32.size
_MEANING: Final = {1: "PPID in clear", 2: "PPID, RSA-2048", 3: "PPID, RSA-3072", 4: "PCK leaf only", 6: "QE report"}


class QuoteRejected(Exception):
    """A quote that is malformed or does not verify; the only error this package raises about one."""

    def __init__(self, check: str, reason: str) -> None:
        super().__init__(f"{check}: {reason}")
        self.check = check  # the row id of the check that failed
        self.reason = reason  # public text


@dataclass(frozen=True, slots=True)
class QuoteSignature:
    """The signature data: who vouches for the body, and who vouches for them."""

    signature: bytes  # 64, r || s big-endian, by the attestation key over header and body
    attestation_key: bytes  # 64, x || y big-endian, P-256
    qe_report: bytes  # 384
    qe_report_signature: bytes  # 64, by the PCK key
    qe_auth_data: bytes  # 0 to 1,024
    pck_chain_pem: bytes  # leaf, CA, root; often NUL-terminated

    def to_bytes(self, version: int = VERSION) -> bytes:
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
        # Version 3 has no frame around the QE data.
        outer = b"" if version == VERSION_SGX else _TYPE_AND_SIZE.pack(CERTIFICATION_QE_REPORT, len(qe_data))
        return self.signature + self.attestation_key + outer + qe_data

    @classmethod
    def parse(cls, data: bytes, version: int = VERSION) -> QuoteSignature:
        """Read the signature data, all of it; raise QuoteRejected D1 to D4."""
        # D1, D3: one QE-report certification block fills the rest exactly. Version 3 has what is in it, bare.
        start = 128 if version == VERSION_SGX else 134
        if len(data) < start:
            _reject("D3", f"the signature data has {len(data)} bytes, too few for a signature and a key")
        if version != VERSION_SGX:
            kind, size = _TYPE_AND_SIZE.unpack_from(data, 128)
            if kind != CERTIFICATION_QE_REPORT:
                _reject("D1", f"certification data of type {kind}, where version {version} has 6 (QE report)")
            if size != len(data) - start:
                _reject("D3", f"QE certification data of {size} bytes in a field of {len(data) - start}")
        signature_start = start + _QE_REPORT_SIZE
        auth_start = signature_start + 64 + 2
        if len(data) < auth_start:
            _reject("D3", f"QE certification data of {len(data) - start} bytes is too short for a QE report")
        # D4: whatever the quoting enclave added to its key.
        (auth_size,) = _U16.unpack_from(data, auth_start - 2)
        if auth_size > MAX_QE_AUTH_SIZE:
            _reject("D4", f"QE authentication data of {auth_size} bytes; at most {MAX_QE_AUTH_SIZE}")
        auth_end = auth_start + auth_size
        if auth_end + 6 > len(data):
            _reject("D4", f"QE authentication data of {auth_size} bytes runs over the end")
        # D2, D3: a PCK chain fills the rest exactly.
        kind, size = _TYPE_AND_SIZE.unpack_from(data, auth_end)
        if kind != CERTIFICATION_PCK_CHAIN:
            meaning = f" ({_MEANING[kind]})" if kind in _MEANING else ""
            _reject("D2", f"inner certification data of type {kind}{meaning}; only 5 (PCK chain) is accepted")
        if size != len(data) - auth_end - 6:
            _reject("D3", f"a PCK chain of {size} bytes in a field of {len(data) - auth_end - 6}")
        return cls(
            signature=data[:64],
            attestation_key=data[64:128],
            qe_report=data[start:signature_start],
            qe_report_signature=data[signature_start : auth_start - 2],
            qe_auth_data=data[auth_start:auth_end],
            pck_chain_pem=data[auth_end + 6 :],
        )


@dataclass(frozen=True, slots=True)
class Quote:
    """A well-formed TD quote of version 4 or 5; `to_bytes` gives back exactly what `parse` read."""

    version: int
    att_key_type: int
    tee_type: int
    qe_vendor_id: bytes  # 16
    user_data: bytes  # 20: the first 16 name the platform's quoting enclave
    body: TdBody  # of version 5 also one of its two longer kinds
    signature: QuoteSignature
    trailing_zeros: int = 0  # some providers hand out their whole buffer

    @classmethod
    def parse(cls, data: bytes) -> Quote:
        """Parse a TD quote; raise QuoteRejected (H1 to H9, D1 to D4) for anything that is not exactly one."""
        quote = parse_quote(data)
        if not isinstance(quote, Quote):
            _reject("H5", f"a version {quote.version} quote of an SGX enclave; only TD quotes are accepted")
        return quote

    def signed_bytes(self) -> bytes:
        """Return header and body, in version 5 with the body's type and size: what the attestation key signs."""
        header = _HEADER.pack(
            self.version, self.att_key_type, self.tee_type, bytes(4), self.qe_vendor_id, self.user_data
        )
        body = self.body.to_bytes()
        return header + body if self.version == VERSION else header + _framed(self.body.TYPE, body)

    def to_bytes(self) -> bytes:
        signature = self.signature.to_bytes(self.version)
        return self.signed_bytes() + _U32.pack(len(signature)) + signature + bytes(self.trailing_zeros)


@dataclass(frozen=True, slots=True)
class SgxQuote:
    """A well-formed quote of an SGX enclave, version 3 or 5."""

    version: int
    att_key_type: int
    tee_type: int
    svns: bytes  # 4: QE SVN u16, PCE SVN u16; in version 5 reserved, and zero
    qe_vendor_id: bytes  # 16
    user_data: bytes  # 20
    body: SgxReport
    signature: QuoteSignature
    trailing_zeros: int = 0

    def signed_bytes(self) -> bytes:
        """Return header and body, in version 5 with the body's type and size: what the attestation key signs."""
        header = _HEADER.pack(
            self.version, self.att_key_type, self.tee_type, self.svns, self.qe_vendor_id, self.user_data
        )
        body = self.body.to_bytes()
        return header + body if self.version == VERSION_SGX else header + _framed(SGX_BODY_TYPE, body)

    def to_bytes(self) -> bytes:
        signature = self.signature.to_bytes(self.version)
        return self.signed_bytes() + _U32.pack(len(signature)) + signature + bytes(self.trailing_zeros)


AnyQuote = Quote | SgxQuote


def parse_quote(data: bytes) -> AnyQuote:
    """Parse a quote of any kind; raise QuoteRejected (H1 to H9, D1 to D4) for anything that is not exactly one."""
    # H1: size, before anything is read.
    if not _SMALLEST <= len(data) <= MAX_QUOTE_SIZE:
        _reject("H1", f"{len(data)} bytes; a quote has {_SMALLEST} to {MAX_QUOTE_SIZE}")
    version, att_key_type, tee_type, reserved, vendor, user_data = _HEADER.unpack_from(data)
    # H2: version.
    if version not in (VERSION_SGX, VERSION, VERSION_5):
        _reject("H2", f"quote version {version}; only 3, 4 and 5 are accepted")
    # H3: kind of attestation key.
    if att_key_type != ATT_KEY_ECDSA_P256:
        _reject("H3", f"attestation key of type {att_key_type}; only 2 (ECDSA P-256) is accepted")
    # H4: kind of TEE.
    if tee_type not in (TEE_SGX, TEE_TDX):
        _reject("H4", f"TEE type {tee_type:#x} is neither SGX nor TDX")
    # H5: version and TEE belong together.
    if version != VERSION_5 and (version == VERSION_SGX) != (tee_type == TEE_SGX):
        _reject("H5", f"a version {version} quote of TEE type {tee_type:#x}")
    # H6: vendor of the quoting enclave.
    if vendor != INTEL_QE_VENDOR_ID:
        _reject("H6", f"quoting enclave of vendor {vendor.hex()}, not Intel")
    # H7: in version 5, type and size of the body.
    body_start, kind, body_size = _body_frame(data, version, tee_type)
    body_end = body_start + body_size
    if len(data) < body_end + _U32.size:
        _reject("H1", f"{len(data)} bytes; a version {version} quote has at least {body_end + _U32.size}")
    # H8: the signature data is all there, and nothing but zeros is behind it.
    (size,) = _U32.unpack_from(data, body_end)
    start = body_end + _U32.size
    end = start + size
    if end > len(data):
        _reject("H8", f"signature data of {size} bytes in a quote with {len(data) - start} left")
    if any(data[end:]):
        _reject("H8", f"{len(data) - end} bytes behind the signature data that are not all zero")
    # H9: reserved bytes of the header; in version 3 they are SVNs.
    if version != VERSION_SGX and any(reserved):
        _reject("H9", f"reserved header bytes are {reserved.hex()}, not zero")
    signature = QuoteSignature.parse(bytes(data[start:end]), version)
    trailing = len(data) - end
    if kind == SGX_BODY_TYPE:
        report = SgxReport.parse(bytes(data[body_start:body_end]))
        return SgxQuote(version, att_key_type, tee_type, reserved, vendor, user_data, report, signature, trailing)
    body = TD_BODIES[kind][0].parse(data, body_start)
    return Quote(version, att_key_type, tee_type, vendor, user_data, body, signature, trailing)


def _body_frame(data: bytes, version: int, tee_type: int) -> tuple[int, int, int]:
    """Return offset, type and size of the body (H7, and H5 of version 5)."""
    if version == VERSION_SGX:
        return _HEADER.size, SGX_BODY_TYPE, SGX_REPORT_SIZE
    if version == VERSION:
        return _HEADER.size, TdBody.TYPE, TD_10_SIZE
    kind, size = _TYPE_AND_SIZE.unpack_from(data, _HEADER.size)
    wanted = SGX_REPORT_SIZE if kind == SGX_BODY_TYPE else TD_BODIES[kind][1] if kind in TD_BODIES else None
    if wanted is None:
        _reject("H7", f"a body of type {kind}; only 1 to 4 are known")
    if size != wanted:
        _reject("H7", f"a body of type {kind} and {size} bytes, not {wanted}")
    if (kind == SGX_BODY_TYPE) != (tee_type == TEE_SGX):
        _reject("H5", f"a body of type {kind} in a quote of TEE type {tee_type:#x}")
    return _HEADER.size + _TYPE_AND_SIZE.size, kind, size


def _framed(kind: int, body: bytes) -> bytes:
    return _TYPE_AND_SIZE.pack(kind, len(body)) + body


def _reject(check: str, reason: str) -> NoReturn:
    raise QuoteRejected(check, reason)
