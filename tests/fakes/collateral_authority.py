# SPDX-License-Identifier: Apache-2.0
"""An authority with Intel's names and a root of its own: signs collateral, right or wrong in one named way."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from cloister.collateral.family import Family, PckCa, Tee
from cloister.tdx.trustroot import TrustRoot

NOW = datetime(2026, 11, 1, 12, 0, tzinfo=UTC)
TDX_FAMILY = Family.of("b0c06f000000", "platform", "tdx")
SGX_FAMILY = Family.of("00606a000000", "processor", "sgx")


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What the collateral should be like; the defaults are good for 30 days from NOW."""

    issued: datetime = NOW - timedelta(days=1)
    life: timedelta = timedelta(days=30)
    number: int = 20
    crl_number: int = 1
    crl_issued: datetime = NOW - timedelta(days=1)
    crl_life: timedelta = timedelta(days=30)
    fmspc: bytes | None = None  # of another platform than asked for

    def but(self, **changes: Any) -> Wish:
        return replace(self, **changes)


class CollateralAuthority:
    """Root, both PCK CAs and a TCB signer."""

    def __init__(self, now: datetime = NOW, *, signer_life: timedelta = timedelta(days=3650)) -> None:
        self._now = now
        self._keys: dict[str, ec.EllipticCurvePrivateKey] = {}
        self.root = self._issue("Intel SGX Root CA", None, path_length=1)
        self.cas = {
            PckCa.PLATFORM: self._issue("Intel SGX PCK Platform CA", self.root, path_length=0),
            PckCa.PROCESSOR: self._issue("Intel SGX PCK Processor CA", self.root, path_length=0),
        }
        self.signer = self._issue("Intel SGX TCB Signing", self.root, life=signer_life)

    @property
    def trust_root(self) -> TrustRoot:
        return TrustRoot.from_pem(_pem(self.root).encode(), simulated=True)

    def collateral(
        self, family: Family, wish: Wish | None = None, *, revoked: Sequence[x509.Certificate] = ()
    ) -> dict[str, str]:
        """Return the nine strings; `revoked` certificates are on the list of whoever issued them."""
        wish = wish or Wish()
        ca = self.cas[family.ca]
        signer_chain = _pem(self.signer, self.root)
        tcb_info = _json(self._tcb_info(family, wish))
        qe_identity = _json(self._qe_identity(family, wish))
        return {
            "pck_crl_issuer_chain": _pem(ca, self.root),
            "root_ca_crl": self.crl(self.root, wish, revoked).hex(),
            "pck_crl": self.crl(ca, wish, revoked).hex(),
            "tcb_info_issuer_chain": signer_chain,
            "tcb_info": tcb_info,
            "tcb_info_signature": self.sign(tcb_info),
            "qe_identity_issuer_chain": signer_chain,
            "qe_identity": qe_identity,
            "qe_identity_signature": self.sign(qe_identity),
        }

    def sign(self, text: str, name: str = "Intel SGX TCB Signing") -> str:
        """Return r || s in hexadecimal."""
        r, s = decode_dss_signature(self._keys[name].sign(text.encode(), ec.ECDSA(SHA256())))
        return f"{r:064x}{s:064x}"

    def impostor(self, nine: dict[str, str], common_name: str) -> dict[str, str]:
        """Return the collateral with TCB info of a signer that the root certified for something else."""
        signer = self._issue(common_name, self.root)
        return {
            **nine,
            "tcb_info_signature": self.sign(nine["tcb_info"], common_name),
            "tcb_info_issuer_chain": _pem(signer, self.root),
        }

    def crl(self, issuer: x509.Certificate, wish: Wish, revoked: Sequence[x509.Certificate] = ()) -> bytes:
        key = self._keys[_common_name(issuer)]
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(issuer.subject)
            .last_update(wish.crl_issued)
            .next_update(wish.crl_issued + wish.crl_life)
            .add_extension(x509.CRLNumber(wish.crl_number), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        )
        for certificate in revoked:
            if certificate.issuer == issuer.subject:
                entry = x509.RevokedCertificateBuilder().serial_number(certificate.serial_number)
                builder = builder.add_revoked_certificate(entry.revocation_date(wish.crl_issued).build())
        return builder.sign(key, SHA256()).public_bytes(Encoding.DER)

    def large_crl(self, issuer: x509.Certificate, wish: Wish, entries: int) -> bytes:
        """Return a list that revokes this many certificates of nobody."""
        key = self._keys[_common_name(issuer)]
        builder = (
            x509.CertificateRevocationListBuilder(
                revoked_certificates=[
                    x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(wish.crl_issued).build()
                    for serial in range(1, entries + 1)
                ]
            )
            .issuer_name(issuer.subject)
            .last_update(wish.crl_issued)
            .next_update(wish.crl_issued + wish.crl_life)
            .add_extension(x509.CRLNumber(wish.crl_number), critical=False)
        )
        return builder.sign(key, SHA256()).public_bytes(Encoding.DER)

    def _tcb_info(self, family: Family, wish: Wish) -> dict[str, Any]:
        components = [{"svn": svn} for svn in (2, 2, 2, 2, 3, 1, 0, 3, *[0] * 8)]
        tcb: dict[str, Any] = {"sgxtcbcomponents": components, "pcesvn": 13}
        info: dict[str, Any] = {
            "id": family.tee.upper(),
            "version": 3,
            "issueDate": _time(wish.issued),
            "nextUpdate": _time(wish.issued + wish.life),
            "fmspc": (wish.fmspc or family.fmspc).hex().upper(),
            "pceId": "0000",
            "tcbType": 0,
            "tcbEvaluationDataNumber": wish.number,
        }
        if family.tee is Tee.TDX:
            module = {"mrsigner": "00" * 48, "attributes": "00" * 8, "attributesMask": "FF" * 8}
            level = {"tcb": {"isvsvn": 5}, "tcbDate": "2025-08-13T00:00:00Z", "tcbStatus": "UpToDate"}
            info["tdxModule"] = module
            info["tdxModuleIdentities"] = [{"id": "TDX_01", **module, "tcbLevels": [level]}]
            tcb["tdxtcbcomponents"] = [{"svn": svn} for svn in (5, 0, 4, *[0] * 13)]
        info["tcbLevels"] = [{"tcb": tcb, "tcbDate": "2025-08-13T00:00:00Z", "tcbStatus": "UpToDate"}]
        return info

    def _qe_identity(self, family: Family, wish: Wish) -> dict[str, Any]:
        tdx = family.tee is Tee.TDX
        level = {"tcb": {"isvsvn": 4}, "tcbDate": "2025-08-13T00:00:00Z", "tcbStatus": "UpToDate"}
        return {
            "id": "TD_QE" if tdx else "QE",
            "version": 2,
            "issueDate": _time(wish.issued),
            "nextUpdate": _time(wish.issued + wish.life),
            "tcbEvaluationDataNumber": wish.number,
            "miscselect": "00000000",
            "miscselectMask": "FFFFFFFF",
            "attributes": "11000000000000000000000000000000",
            "attributesMask": "FBFFFFFFFFFFFFFF0000000000000000",
            "mrsigner": "DC" * 32,
            "isvprodid": 2 if tdx else 1,
            "tcbLevels": [level],
        }

    def _issue(
        self,
        common_name: str,
        issuer: x509.Certificate | None,
        *,
        path_length: int | None = None,
        life: timedelta = timedelta(days=3650),
    ) -> x509.Certificate:
        key = ec.generate_private_key(ec.SECP256R1())
        self._keys[common_name] = key
        subject = x509.Name(
            [
                x509.NameAttribute(NameOID.COMMON_NAME, common_name),
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Cloister Tests"),
            ]
        )
        issuer_key = self._keys[_common_name(issuer)] if issuer else key
        is_ca = path_length is not None
        usage = x509.KeyUsage(not is_ca, not is_ca, False, False, False, is_ca, is_ca, False, False)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer.subject if issuer else subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(self._now - timedelta(days=1000))
            .not_valid_after(self._now + life)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(usage, critical=True)
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=path_length), critical=True)
            .sign(issuer_key, SHA256())
        )


def _common_name(certificate: x509.Certificate) -> str:
    return str(certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)


def _pem(*certificates: x509.Certificate) -> str:
    return "".join(certificate.public_bytes(Encoding.PEM).decode() for certificate in certificates)


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"))


def _time(moment: datetime) -> str:
    return f"{moment:%Y-%m-%dT%H:%M:%SZ}"
