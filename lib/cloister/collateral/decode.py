# SPDX-License-Identifier: Apache-2.0
"""What a server sent -> the text that was signed. Every check here is of form; nothing is authentic yet."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote_to_bytes

from cloister.collateral.failures import Failure, FetchFailed
from cloister.collateral.resources import DocumentKind
from cloister.tdx.crl import to_der
from cloister.tdx.quote import QuoteRejected

MAX_CHAIN_BYTES: Final = 16 * 1024  # two certificates have 2 KB

_SIGNED_MEMBER: Final = {DocumentKind.TCB_INFO: "tcbInfo", DocumentKind.QE_IDENTITY: "enclaveIdentity"}
# The signature is over the member's exact bytes, so they are cut out and never parsed and written again. Where they
# end is not trusted either: text that was cut wrongly does not verify.
_SIGNED: Final = {
    kind: re.compile(
        rb'\s*\{\s*"%s"\s*:\s*(\{.*\})\s*,\s*"signature"\s*:\s*"([0-9A-Fa-f]{128})"\s*\}\s*' % member.encode(),
        re.DOTALL,
    )
    for kind, member in _SIGNED_MEMBER.items()
}
_PEM_CHAIN: Final = re.compile(rb"(?:-----BEGIN CERTIFICATE-----[A-Za-z0-9+/=\r\n]+-----END CERTIFICATE-----\s*){1,4}")
_DER_SEQUENCE: Final = b"\x30"  # hexadecimal digits of the same begin with "3", which is 33
_SPACE: Final = b" \t\r\n"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server answered: exact body, and the issuer chain's header as it came."""

    body: bytes
    chain_header: str | None


@dataclass(frozen=True, slots=True)
class SignedText:
    """A document cut from its answer, still only claimed."""

    text: bytes  # TCB info or QE identity: the exact signed JSON; a CRL: DER
    signature: bytes  # 128 hexadecimal digits, r || s; empty for a CRL, which carries its own
    chain_pem: bytes  # signer and root; empty for the root CRL


def decode(kind: DocumentKind, answer: Answer) -> SignedText:
    """Cut the signed text out of an answer; raise FetchFailed(NOT_COLLATERAL)."""
    chain = _decode_chain(kind, answer.chain_header)
    if kind.is_crl:
        return SignedText(decode_crl(answer.body), b"", chain)
    text, signature = split_signed(kind, answer.body)
    return SignedText(text, signature, chain)


def split_signed(kind: DocumentKind, body: bytes) -> tuple[bytes, bytes]:
    """Return the exact signed text and the signature (in hexadecimal) of a TCB info or QE identity body."""
    found = _SIGNED[kind].fullmatch(body)
    if found is None:
        what = "HTML" if looks_like_html(body) else "something else"
        raise FetchFailed(
            Failure.NOT_COLLATERAL, f"the answer is {what}, not a signed {_SIGNED_MEMBER[kind]} and its signature"
        )
    return found[1], found[2]


def decode_crl(body: bytes) -> bytes:
    """Return the DER of a CRL that came as DER, PEM or hexadecimal digits, whatever the server called it."""
    try:
        return to_der(body.strip(_SPACE) if not body.startswith(_DER_SEQUENCE) else body, "CRL")
    except QuoteRejected as rejected:
        what = "the answer is HTML, not a CRL" if looks_like_html(body) else rejected.reason
        raise FetchFailed(Failure.NOT_COLLATERAL, what) from None


def decode_chain(header: str) -> bytes:
    """Return the PEM of an issuer chain that came URL-encoded, or plain, as PCCS files have it."""
    # '+' stays: it is base64 here, and never a space.
    pem = unquote_to_bytes(header.encode("ascii", "replace")).replace(b"\r\n", b"\n")
    if len(pem) > MAX_CHAIN_BYTES or _PEM_CHAIN.fullmatch(pem) is None:
        raise FetchFailed(Failure.NOT_COLLATERAL, "the issuer chain is not a few PEM certificates")
    return pem


def looks_like_html(body: bytes) -> bool:
    """Say whether a body is a web page: of a proxy, of a portal, of a PCCS that does not know the path."""
    return body[:64].lstrip().startswith(b"<")


def _decode_chain(kind: DocumentKind, header: str | None) -> bytes:
    if kind.chain_header is None:
        return b""
    if header is None:
        raise FetchFailed(Failure.NOT_COLLATERAL, f"the answer has no header {kind.chain_header}")
    return decode_chain(header)
