# SPDX-License-Identifier: Apache-2.0
"""Bundles out of a PCCS administrator's file: what `pccsadmin fetch` writes and `PUT .../platformcollateral` takes.

Source: Intel's PCCS, `service/services/pccs_schemas.js` (version 4): tcbinfos[] with `{sgx,tdx}_tcbinfo[_early]`,
`[td]qeidentity[_early]`, pckcacrl, rootcacrl (hexadecimal) and certificates (URL-encoded chains).

Signed documents are JSON inside JSON there. They are written out again compactly, members in their order, which is the
form that Intel signed; should that not be so, the signature says it, and the document is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any, Final

from cloister.collateral.bundle import CollateralBundle
from cloister.collateral.decode import decode_chain, decode_crl
from cloister.collateral.failures import FetchFailed
from cloister.collateral.family import Edition, Family, PckCa, Tee
from cloister.errors import CloisterError, Code
from cloister.tdx.collateral import Collateral

_MAX_TCB_INFOS: Final = 1024
_QE_IDENTITY: Final = {Tee.SGX: "qeidentity", Tee.TDX: "tdqeidentity"}
_CRL: Final = {PckCa.PLATFORM: "platformCrl", PckCa.PROCESSOR: "processorCrl"}


def is_platform_collateral(data: bytes) -> bool:
    """Say whether a file is of this shape rather than one of our bundles."""
    try:
        members = json.loads(data.decode())
    except (ValueError, RecursionError):
        return False
    return isinstance(members, dict) and isinstance(members.get("collaterals"), dict)


def read_platform_collateral(data: bytes, *, fetched_at: datetime) -> list[CollateralBundle]:
    """Return a bundle for each family that the file has all parts for; nothing is verified yet.

    Raise CloisterError(COLLATERAL_INVALID) when there is none.
    """
    try:
        parts = json.loads(data.decode())["collaterals"]
        bundles = list(_bundles(parts, fetched_at))
    except CloisterError as error:
        raise _invalid(error.what) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, FetchFailed) as error:
        why = error.reason if isinstance(error, FetchFailed) else "it is not of the shape of version 4"
        raise _invalid(why) from None
    if not bundles:
        raise _invalid("no platform family in it has TCB info, QE identity, CRLs and issuer chains")
    return bundles


def _bundles(parts: Mapping[str, Any], fetched_at: datetime) -> Iterator[CollateralBundle]:
    certificates = parts["certificates"]
    root_crl = parts.get("rootcacrl")
    tcb_infos = parts["tcbinfos"]
    if not isinstance(root_crl, str) or not isinstance(tcb_infos, list) or len(tcb_infos) > _MAX_TCB_INFOS:
        return
    signer_chains = [
        _chain(certificates.get(name)) for name in ("TCB-Info-Issuer-Chain", "SGX-Enclave-Identity-Issuer-Chain")
    ]
    tcb_chain, qe_chain = signer_chains
    for entry in tcb_infos:
        for tee in Tee:
            for edition in Edition:
                suffix = "_early" if edition is Edition.EARLY else ""
                tcb_info = _signed(entry.get(f"{tee}_tcbinfo{suffix}"), "tcbInfo")
                qe_identity = _signed(parts.get(f"{_QE_IDENTITY[tee]}{suffix}"), "enclaveIdentity")
                if tcb_info is None or qe_identity is None:
                    continue
                for ca, crl, ca_chain in _pck_crls(parts, certificates, tee):
                    collateral = Collateral(
                        pck_crl_issuer_chain=ca_chain,
                        root_ca_crl=decode_crl(root_crl.encode()),
                        pck_crl=crl,
                        tcb_info_issuer_chain=tcb_chain,
                        tcb_info=tcb_info[0],
                        tcb_info_signature=tcb_info[1],
                        qe_identity_issuer_chain=qe_chain,
                        qe_identity=qe_identity[0],
                        qe_identity_signature=qe_identity[1],
                    )
                    family = Family.of(str(entry["fmspc"]), ca, tee, edition)
                    yield CollateralBundle(family, fetched_at, collateral)


def _pck_crls(
    parts: Mapping[str, Any], certificates: Mapping[str, Any], tee: Tee
) -> Iterator[tuple[PckCa, bytes, bytes]]:
    """Yield CA, CRL and chain. The file does not say which CA is a family's; machines with TDX are under Platform."""
    crls = parts.get("pckcacrl") or {}
    chains = certificates.get("SGX-PCK-Certificate-Issuer-Chain") or {}
    for ca in PckCa:
        crl, chain = crls.get(_CRL[ca]), chains.get(ca.upper())
        if crl and chain and not (tee is Tee.TDX and ca is PckCa.PROCESSOR):
            yield ca, decode_crl(str(crl).encode()), _chain(chain)


def _signed(document: object, member: str) -> tuple[bytes, bytes] | None:
    """Return exact text and signature of a signed document, which stands there as an object or as its text."""
    if isinstance(document, str):
        document = json.loads(document)
    if not isinstance(document, dict):
        return None
    text = json.dumps(document[member], separators=(",", ":"), ensure_ascii=False)
    return text.encode(), str(document["signature"]).encode()


def _chain(header: object) -> bytes:
    return decode_chain(header) if isinstance(header, str) else b""


def _invalid(why: str) -> CloisterError:
    return CloisterError(
        Code.COLLATERAL_INVALID,
        what="this is not a platformcollateral file that can be imported",
        why=why,
        todo="make one with Intel's `pccsadmin fetch`, API version 4",
    )
