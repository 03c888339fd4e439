# SPDX-License-Identifier: Apache-2.0
"""What a TD puts into its quote's report_data: its keys, its role, and the nonce it was asked with.

    rd_core     = SHA-384(TLV("cloister-rd-v1", role, trust_domain, audience, nonce,
                              tls_spki_der, hpke_kem_id, hpke_public_key, receipt_spki_der [, trust_bundle]))
    report_data = rd_core (48) || "cloister-rd-v1\\0\\0" (16, clear)

The clear tail keeps these quotes apart from other systems' and makes a downgrade visible.
"""

from __future__ import annotations

from typing import Final

from cloister.tlv import sha384, tlv

LABEL: Final = "cloister-rd-v1"
TAIL: Final = LABEL.encode().ljust(16, b"\0")
REPORT_DATA_SIZE: Final = 64


def report_data(
    *,
    role: str,
    trust_domain: str,
    audience: str,
    nonce: bytes,
    tls_spki_der: bytes,
    hpke_kem_id: int,
    hpke_public_key: bytes,
    receipt_spki_der: bytes,
    trust_bundle: bytes = b"",
) -> bytes:
    """Return the 64 bytes; made by the TD before it quotes, and again by whoever verifies the quote.

    `receipt_spki_der` is empty for roles that sign no receipts. `trust_bundle` is the digest of the bundle that the TD
    holds now (48 bytes), left out while that is the one it measured. Compare in constant time.
    """
    core = sha384(
        tlv(
            LABEL,
            role,
            trust_domain,
            audience,
            nonce,
            tls_spki_der,
            hpke_kem_id,
            hpke_public_key,
            receipt_spki_der,
            *((trust_bundle,) if trust_bundle else ()),
        )
    )
    return core + TAIL
