# SPDX-License-Identifier: Apache-2.0
"""Servers of collateral, and the URLs of documents on them (PCS and PCCS, API version 4).

Source: Intel SGX and TDX Registration and Provisioning Certification Service, API version 4; the URL with its whole
query is the key under which a document is cached.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from cloister.collateral.family import Edition, Family, PckCa, Tee
from cloister.errors import CloisterError, Code

INTEL_API: Final = "https://api.trustedservices.intel.com"
INTEL_ROOT_CRL: Final = "https://certificates.trustedservices.intel.com/IntelSGXRootCA.der"
_MAX_URL_CHARS: Final = 1024


class DocumentKind(enum.StrEnum):
    """The four documents that a quote is verified with."""

    TCB_INFO = "tcb-info"
    QE_IDENTITY = "qe-identity"
    PCK_CRL = "pck-crl"
    ROOT_CRL = "root-crl"

    @property
    def is_crl(self) -> bool:
        return self in {DocumentKind.PCK_CRL, DocumentKind.ROOT_CRL}

    @property
    def chain_header(self) -> str | None:
        """The response header with the issuer chain; None for the root CRL, which the root itself signed."""
        return _CHAIN_HEADERS.get(self)


_CHAIN_HEADERS: Final = {
    DocumentKind.TCB_INFO: "TCB-Info-Issuer-Chain",
    DocumentKind.QE_IDENTITY: "SGX-Enclave-Identity-Issuer-Chain",
    DocumentKind.PCK_CRL: "SGX-PCK-CRL-Issuer-Chain",
}


@dataclass(frozen=True, slots=True)
class Resource:
    """One document on one server. `url` is the cache key; the rest is what the document must say of itself."""

    kind: DocumentKind
    url: str
    tee: Tee | None = None  # of TCB info and QE identity
    fmspc: bytes | None = None  # of TCB info
    ca: PckCa | None = None  # of a PCK CRL
    evaluation_number: int | None = None  # TCB info or QE identity of exactly this evaluation

    @property
    def edition(self) -> str:
        """What was asked for of TCB info and QE identity: "standard", "early" or an evaluation number; else empty."""
        return self.url.rpartition("=")[2] if self.tee is not None else ""


@dataclass(frozen=True, slots=True)
class CollateralServer:
    """Where collateral is fetched: Intel's own service, or a PCCS in the operator's network.

    Neither is trusted: not for authenticity (documents are signed) and not for freshness (they say when they expire).
    """

    base_url: str
    root_crl_url: str
    ca_file: Path | None = None  # PEM; the only CAs that may certify the server; None: those of the system

    def __post_init__(self) -> None:
        for url in (self.base_url, self.root_crl_url):
            _require_https(url)

    @classmethod
    def intel(cls) -> CollateralServer:
        """Return Intel's Provisioning Certification Service."""
        return cls(INTEL_API, INTEL_ROOT_CRL)

    @classmethod
    def pccs(cls, base_url: str, *, ca_file: Path | None = None) -> CollateralServer:
        """Return a PCCS at "https://host:port", which passes on the root CRL, too."""
        base = base_url.rstrip("/")
        return cls(base, f"{base}/sgx/certification/v4/rootcacrl", ca_file)

    @property
    def origins(self) -> frozenset[tuple[str, int]]:
        """Hosts and ports that may be asked; there are no others, whatever an answer says."""
        return frozenset({origin(self.base_url), origin(self.root_crl_url)})

    def resources(self, family: Family, evaluation_number: int | None = None) -> tuple[Resource, ...]:
        """Return the four documents of a family, the root's CRL first: the others' issuers are looked up in it."""
        return (
            self.root_crl(),
            self.pck_crl(family),
            self.tcb_info(family, evaluation_number),
            self.qe_identity(family, evaluation_number),
        )

    def tcb_info(self, family: Family, evaluation_number: int | None = None) -> Resource:
        fmspc = family.fmspc.hex().upper()
        selection = _selection(family.edition, evaluation_number)
        url = f"{self.base_url}/{family.tee}/certification/v4/tcb?fmspc={fmspc}&{selection}"
        return Resource(
            DocumentKind.TCB_INFO, url, tee=family.tee, fmspc=family.fmspc, evaluation_number=evaluation_number
        )

    def qe_identity(self, family: Family, evaluation_number: int | None = None) -> Resource:
        selection = _selection(family.edition, evaluation_number)
        url = f"{self.base_url}/{family.tee}/certification/v4/qe/identity?{selection}"
        return Resource(DocumentKind.QE_IDENTITY, url, tee=family.tee, evaluation_number=evaluation_number)

    def pck_crl(self, family: Family) -> Resource:
        url = f"{self.base_url}/sgx/certification/v4/pckcrl?ca={family.ca}&encoding=der"
        return Resource(DocumentKind.PCK_CRL, url, ca=family.ca)

    def root_crl(self) -> Resource:
        return Resource(DocumentKind.ROOT_CRL, self.root_crl_url)


def origin(url: str) -> tuple[str, int]:
    """Return host and port of an https URL; raise ValueError."""
    parts = urlsplit(url)
    if parts.scheme != "https" or not parts.hostname:
        raise ValueError("not an https URL")
    return parts.hostname, parts.port or 443


def _selection(edition: Edition, evaluation_number: int | None) -> str:
    # Both at once is an error (400). The edition is always written out: a default that changes must not change a key.
    return f"update={edition}" if evaluation_number is None else f"tcbEvaluationDataNumber={evaluation_number}"


def _require_https(url: str) -> None:
    try:
        parts = urlsplit(url)
        origin(url)
        allowed = not (parts.username or parts.password or parts.query or parts.fragment)
    except ValueError:
        allowed = False
    if not allowed or len(url) > _MAX_URL_CHARS or not url.isascii() or not url.isprintable() or " " in url:
        raise CloisterError(
            Code.CONFIG_INVALID,
            what=f"{url[:80]!r} is not the URL of a collateral server",
            why="it must be https://host[:port][/path], without user, query or fragment",
            todo=f"write {INTEL_API}, or the address of your PCCS",
        )
