# SPDX-License-Identifier: Apache-2.0
"""A platform in an attacker's hands: every byte of its certificates and quotes can be other than it should be.

Certificates are assembled by hand, because no library writes the broken ones. `ForgedPlatform()` as it stands is
valid under its own root; each test changes one thing.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256, HashAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cloister.tdx.body import SgxReport, TdBody
from cloister.tdx.quote import INTEL_QE_VENDOR_ID, AnyQuote, QeReport, Quote, QuoteSignature, SgxQuote
from cloister.tdx.verify import TrustRoot
from cloister_sim import der

NOW: Final = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
ECDSA_SHA256: Final = bytes.fromhex("300a06082a8648ce3d040302")
ECDSA_SHA384: Final = bytes.fromhex("300a06082a8648ce3d040303")
BASIC_CONSTRAINTS: Final = (2, 5, 29, 19)
KEY_USAGE: Final = (2, 5, 29, 15)
SGX: Final = (1, 2, 840, 113741, 1, 13, 1)
UNKNOWN: Final = (1, 3, 6, 1, 4, 1, 99999, 1)
MAY_ISSUE: Final = bytes.fromhex("03020106")  # keyCertSign, cRLSign
MAY_SIGN: Final = bytes.fromhex("030206c0")  # digitalSignature, nonRepudiation

Extension = tuple[tuple[int, ...], bool, bytes]  # object identifier, critical, value


def ca_constraints(path_length: int | None) -> bytes:
    return der.sequence(der.boolean(value=True), *([] if path_length is None else [der.integer(path_length)]))


def sgx_member(arcs: Sequence[int], value: bytes) -> bytes:
    return der.sequence(der.oid((*SGX, *arcs)), value)


def sgx_tcb(
    *, components: Sequence[bytes] | None = None, pce_svn: bytes | None = None, cpu_svn: bytes | None = None
) -> bytes:
    """Return member 2: by default components 200, 1, 2, ... 15, whose first needs a leading zero in DER."""
    values = components or [der.integer(200), *(der.integer(n) for n in range(1, 16))]
    return der.sequence(
        *(sgx_member((2, n), value) for n, value in enumerate(values, start=1)),
        sgx_member((2, 17), pce_svn or der.integer(13)),
        sgx_member((2, 18), cpu_svn or der.octets(bytes([200, *range(1, 16)]))),
    )


def sgx_members() -> dict[str, bytes]:
    """Return the members of a valid SGX extension, to be changed and joined by `sgx_extension`."""
    return {
        "ppid": sgx_member((1,), der.octets(bytes(range(16)))),
        "tcb": sgx_member((2,), sgx_tcb()),
        "pceid": sgx_member((3,), der.octets(bytes(2))),
        "fmspc": sgx_member((4,), der.octets(bytes.fromhex("00806f050000"))),
        "type": sgx_member((5,), der.enumerated(1)),
        "instance": sgx_member((6,), der.octets(bytes(range(16, 32)))),
    }


def sgx_extension(members: dict[str, bytes] | None = None) -> bytes:
    return der.sequence(*(sgx_members() if members is None else members).values())


@dataclass(frozen=True)
class Spec:
    """What one certificate says."""

    name: str
    extensions: tuple[Extension, ...]
    not_before: datetime = datetime(2026, 1, 1, tzinfo=UTC)
    not_after: datetime = datetime(2027, 1, 1, tzinfo=UTC)
    issuer: str | None = None  # default: the name of whoever signs
    version: int = 2
    serial: int = 0x1234
    inner_algorithm: bytes = ECDSA_SHA256
    outer_algorithm: bytes = ECDSA_SHA256
    digest: HashAlgorithm = field(default_factory=SHA256)
    curve: ec.EllipticCurve = field(default_factory=ec.SECP256R1)
    signed_by: str = ""  # "root", "ca", "leaf" or "stranger"; default: the one above it
    spki: bytes | None = None
    subject: bytes | None = None  # instead of the name

    def without(self, oid: tuple[int, ...]) -> Spec:
        return replace(self, extensions=tuple(e for e in self.extensions if e[0] != oid))

    def with_extension(self, oid: tuple[int, ...], value: bytes, *, critical: bool = False) -> Spec:
        return replace(self, extensions=(*self.extensions, (oid, critical, value)))

    def changed(self, oid: tuple[int, ...], value: bytes) -> Spec:
        extensions = tuple((o, c, value if o == oid else v) for o, c, v in self.extensions)
        return replace(self, extensions=extensions)


ROOT: Final = Spec("Intel SGX Root CA", ((KEY_USAGE, True, MAY_ISSUE), (BASIC_CONSTRAINTS, True, ca_constraints(1))))
CA: Final = Spec(
    "Intel SGX PCK Platform CA", ((KEY_USAGE, True, MAY_ISSUE), (BASIC_CONSTRAINTS, True, ca_constraints(0)))
)
LEAF: Final = Spec(
    "Intel SGX PCK Certificate",
    ((KEY_USAGE, True, MAY_SIGN), (BASIC_CONSTRAINTS, True, der.sequence()), (SGX, False, sgx_extension())),
)
BODY: Final = TdBody(
    tee_tcb_svn=bytes(16),
    mr_seam=b"s" * 48,
    mr_signer_seam=bytes(48),
    seam_attributes=bytes(8),
    td_attributes=bytes.fromhex("0000001000000000"),
    xfam=bytes.fromhex("e700060000000000"),
    mr_td=b"t" * 48,
    mr_config_id=bytes(48),
    mr_owner=bytes(48),
    mr_owner_config=bytes(48),
    rtmrs=(b"0" * 48, b"1" * 48, b"2" * 48, b"3" * 48),
    report_data=b"r" * 64,
)
QE_REPORT: Final = QeReport.parse(bytes(48) + bytes.fromhex("15") + bytes(335))


class ForgedPlatform:
    """Keys, a chain, and a quoting enclave that signs whatever it is told to."""

    def __init__(self, *, root: Spec = ROOT, ca: Spec = CA, leaf: Spec = LEAF) -> None:
        specs = {"root": root, "ca": ca, "leaf": leaf}
        self.keys = {name: ec.generate_private_key(spec.curve) for name, spec in specs.items()}
        self.keys["stranger"] = ec.generate_private_key(ec.SECP256R1())
        self.attestation_key = ec.generate_private_key(ec.SECP256R1())
        self.root_der = self.certificate(root, "root", "root", root)
        self.ca_der = self.certificate(ca, "ca", "root", root)
        self.leaf_der = self.certificate(leaf, "leaf", "ca", ca)
        self.chain = (self.leaf_der, self.ca_der, self.root_der)

    @property
    def trust_root(self) -> TrustRoot:
        return TrustRoot(self.root_der, simulated=True)

    def quote(
        self,
        *,
        chain: bytes | None = None,
        body: TdBody | SgxReport = BODY,
        version: int | None = None,
        qe_report: QeReport = QE_REPORT,
        qe_report_data: bytes | None = None,
        qe_auth_data: bytes = b"",
        attestation_key: ec.EllipticCurvePrivateKey | None = None,
    ) -> bytes:
        """Return a quote that is signed all the way through, whatever it says; by default of the body's version."""
        key = attestation_key or self.attestation_key
        point = key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)[1:]
        named = hashlib.sha256(point + qe_auth_data).digest() + bytes(32)
        report = replace(qe_report, report_data=qe_report_data or named).to_bytes()
        vouching = QuoteSignature(
            signature=bytes(64),
            attestation_key=point,
            qe_report=report,
            qe_report_signature=raw_signature(self.keys["leaf"], report),
            qe_auth_data=qe_auth_data,
            pck_chain_pem=pem(*self.chain) if chain is None else chain,
        )
        quote: AnyQuote
        if isinstance(body, SgxReport):
            quote = SgxQuote(version or 3, 2, 0, bytes(4), INTEL_QE_VENDOR_ID, bytes(20), body, vouching)
        else:
            version = version or (4 if type(body) is TdBody else 5)
            quote = Quote(version, 2, 0x81, INTEL_QE_VENDOR_ID, bytes(20), body, vouching)
        signature = replace(vouching, signature=raw_signature(key, quote.signed_bytes()))
        return replace(quote, signature=signature).to_bytes()

    def resigned(self, quote: bytes) -> bytes:
        """Sign header and body again after a change, as an attacker with the attestation key would."""
        return quote[:636] + raw_signature(self.attestation_key, quote[:632]) + quote[700:]

    def certificate(self, spec: Spec, holder: str, above: str | None = None, issuer: Spec | None = None) -> bytes:
        """Return a certificate for the key of `holder`, by default signed by itself."""
        spki = spec.spki or self.keys[holder].public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        extensions = [
            der.sequence(der.oid(oid), *([der.boolean(value=True)] if critical else []), der.octets(value))
            for oid, critical, value in spec.extensions
        ]
        tbs = der.sequence(
            der.element(0xA0, der.integer(spec.version)),
            der.element(0x02, spec.serial.to_bytes(spec.serial.bit_length() // 8 + 1, "big", signed=True)),
            spec.inner_algorithm,
            name(spec.issuer or (issuer or spec).name),
            der.sequence(_time(spec.not_before), _time(spec.not_after)),
            spec.subject or name(spec.name),
            spki,
            der.element(0xA3, der.sequence(*extensions)),
        )
        signature = self.keys[spec.signed_by or above or holder].sign(tbs, ec.ECDSA(spec.digest))
        return der.sequence(tbs, spec.outer_algorithm, der.element(0x03, b"\0" + signature))


def pem(*certificates: bytes, label: str = "CERTIFICATE") -> bytes:
    """Return PEM blocks as Intel writes them: lines of 64, each ended by a newline."""
    blocks = []
    for certificate in certificates:
        text = base64.b64encode(certificate).decode()
        lines = [text[start : start + 64] for start in range(0, len(text), 64)]
        blocks.append("\n".join([f"-----BEGIN {label}-----", *lines, f"-----END {label}-----", ""]))
    return "".join(blocks).encode()


def name(common_name: str) -> bytes:
    attribute = der.sequence(der.oid((2, 5, 4, 3)), der.element(0x0C, common_name.encode()))
    return der.sequence(der.element(0x31, attribute))


def raw_signature(key: ec.EllipticCurvePrivateKey, message: bytes) -> bytes:
    size = (key.curve.key_size + 7) // 8
    r, s = decode_dss_signature(key.sign(message, ec.ECDSA(SHA256())))
    return (r.to_bytes(size, "big") + s.to_bytes(size, "big"))[:64]


def _time(moment: datetime) -> bytes:
    return der.element(0x17, moment.strftime("%y%m%d%H%M%SZ").encode())
