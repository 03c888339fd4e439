# SPDX-License-Identifier: Apache-2.0
"""A simulated platform: launches TDs, keeps their registers, signs quotes of TDs (version 4) and of enclaves (3)."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256

from cloister.collateral.bundle import CollateralBundle, save
from cloister.collateral.family import Edition, Family, PckCa, Tee
from cloister.tdx import quote as wire
from cloister.tdx.body import SgxReport
from cloister.tdx.collateral import Collateral
from cloister.tdx.eventlog import Event, EventLog
from cloister.tdx.pckextension import SGX_EXTENSION_OID, PckExtension
from cloister.tdx.quote import QeReport, Quote, QuoteSignature, SgxQuote, TdBody
from cloister.tdx.trustroot import TrustRoot
from cloister.tlv import sha384
from cloister_sim import pki
from cloister_sim.collateral import make_collateral
from cloister_sim.store import PlatformKeys, load_or_create

DIGEST_SIZE: Final = 48
REPORT_DATA_SIZE: Final = 64
EXTENDABLE: Final = (2, 3)  # RTMR0 and RTMR1 belong to the firmware

_QE_AUTH_DATA: Final = bytes(range(32))  # what Intel's quoting enclave writes, too
_ENCLAVE_SVNS: Final = (4).to_bytes(2, "little") + (13).to_bytes(2, "little")  # quoting enclave, PCE
_SEPT_VE_DISABLE: Final = 1 << 28
_XFAM: Final = 0x600E7  # x87, SSE, AVX, AVX-512, AMX: what real TDs on today's platforms have
# TCG PC Client Platform Firmware Profile, 10.4.1.
_EV_PLATFORM_CONFIG_FLAGS: Final = 0x0000000A
_EV_EFI_BOOT_SERVICES_APPLICATION: Final = 0x80000003
_EV_IPL: Final = 0x0000000D


class SimulationError(Exception):
    """A request that a TD cannot make; the TD goes on."""


class SimulatedPlatform:
    """A platform with its quoting enclave. Safe to share between threads: it never changes."""

    def __init__(self, keys: PlatformKeys) -> None:
        self._keys = keys
        self._attestation_key = keys.attestation_key
        self._tcb_signing_key = ec.generate_private_key(ec.SECP256R1())
        self.root_pem = pki.to_pem(keys.root)
        numbers = keys.attestation_key.public_key().public_numbers()
        key = numbers.x.to_bytes(32, "big") + numbers.y.to_bytes(32, "big")
        report = _qe_report(key).to_bytes()
        # The same in every quote but for its signature: what leads from the root to the attestation key.
        self._vouching = QuoteSignature(
            signature=bytes(64),
            attestation_key=key,
            qe_report=report,
            qe_report_signature=_sign(keys.pck_key, report),
            qe_auth_data=_QE_AUTH_DATA,
            pck_chain_pem=pki.to_pem(keys.pck, keys.ca, keys.root) + b"\0",
        )

    @classmethod
    def create(cls, directory: Path | str, *, now: datetime | None = None) -> SimulatedPlatform:
        """Return the platform of a directory, made now if there is none; raise CloisterError when neither works."""
        return cls(load_or_create(Path(directory), now or datetime.now(UTC)))

    def collateral(self, now: datetime, tee: Tee = Tee.TDX) -> Collateral:
        """Return what Intel would publish about this platform at `now`: up to date, for thirty days."""
        report = QeReport.parse(self._vouching.qe_report)
        td = self.launch(bytes(DIGEST_SIZE)).report(bytes(REPORT_DATA_SIZE)) if tee is Tee.TDX else None
        return make_collateral(self._keys, self._tcb_signing_key, report, td, now)

    def publish(self, directory: Path, now: datetime, tee: Tee = Tee.TDX) -> Path:
        """Write that collateral, in both editions, as a directory of bundles; raise CloisterError."""
        pck = PckExtension.parse(
            self._keys.pck.extensions.get_extension_for_oid(SGX_EXTENSION_OID).value.public_bytes()
        )
        root, collateral = TrustRoot.from_pem(self.root_pem, simulated=True), self.collateral(now, tee)
        for edition in Edition:
            family = Family(pck.fmspc, PckCa.PLATFORM, tee, edition)
            # What a platform says about itself replaces what it said before, even when the clock was set back.
            save(CollateralBundle(family, now, collateral), directory, root=root, now=now, reset=True)
        return directory

    def launch(self, image_digest: bytes) -> SimulatedTd:
        """Launch a TD from an image (SHA-384, 48 bytes)."""
        if len(image_digest) != DIGEST_SIZE:
            raise SimulationError(f"an image digest has {DIGEST_SIZE} bytes, not {len(image_digest)}")
        return SimulatedTd(self, _boot_log(image_digest))

    def sign(self, body: TdBody) -> bytes:
        """Return a quote over this body, as the quoting enclave makes it of a TD report."""
        quote = Quote(
            version=wire.VERSION,
            att_key_type=wire.ATT_KEY_ECDSA_P256,
            tee_type=wire.TEE_TDX,
            qe_vendor_id=wire.INTEL_QE_VENDOR_ID,
            user_data=bytes(20),
            body=body,
            signature=self._vouching,
        )
        signature = _sign(self._attestation_key, quote.signed_bytes())
        return replace(quote, signature=replace(self._vouching, signature=signature)).to_bytes()

    def sign_enclave(self, report: SgxReport) -> bytes:
        """Return a version 3 quote over the report of an enclave."""
        quote = SgxQuote(
            version=wire.VERSION_SGX,
            att_key_type=wire.ATT_KEY_ECDSA_P256,
            tee_type=wire.TEE_SGX,
            svns=_ENCLAVE_SVNS,
            qe_vendor_id=wire.INTEL_QE_VENDOR_ID,
            user_data=bytes(20),
            body=report,
            signature=self._vouching,
        )
        signature = _sign(self._attestation_key, quote.signed_bytes())
        return replace(quote, signature=replace(self._vouching, signature=signature)).to_bytes()


class SimulatedTd:
    """A running TD: its registers end with it. For one thread at a time."""

    def __init__(self, platform: SimulatedPlatform, boot_log: EventLog) -> None:
        self._platform = platform
        self._rtmrs = list(boot_log.replay())
        self.boot_log = boot_log.to_json()

    def extend(self, index: int, digest: bytes) -> bytes:
        """Extend RTMR2 or RTMR3 with a digest (48 bytes); return the register's new value."""
        if index not in EXTENDABLE:
            raise SimulationError(f"RTMR{index} cannot be extended from inside a TD; RTMR2 and RTMR3 can")
        if len(digest) != DIGEST_SIZE:
            raise SimulationError(f"a digest has {DIGEST_SIZE} bytes, not {len(digest)}")
        self._rtmrs[index] = sha384(self._rtmrs[index], digest)
        return self._rtmrs[index]

    def quote(self, report_data: bytes) -> bytes:
        """Return a version 4 quote over the present registers and these 64 bytes."""
        if len(report_data) != REPORT_DATA_SIZE:
            raise SimulationError(f"report data has {REPORT_DATA_SIZE} bytes, not {len(report_data)}")
        return self._platform.sign(self.report(report_data))

    def report(self, report_data: bytes) -> TdBody:
        """Return what the simulated TDX module reports about this TD."""
        r0, r1, r2, r3 = self._rtmrs
        return TdBody(
            tee_tcb_svn=bytes.fromhex("05010700000000000000000000000000"),
            mr_seam=sha384(b"simulated TDX module"),
            mr_signer_seam=bytes(48),
            seam_attributes=bytes(8),
            td_attributes=_SEPT_VE_DISABLE.to_bytes(8, "little"),
            xfam=_XFAM.to_bytes(8, "little"),
            mr_td=sha384(b"simulated virtual firmware"),
            mr_config_id=bytes(48),
            mr_owner=bytes(48),
            mr_owner_config=bytes(48),
            rtmrs=(r0, r1, r2, r3),
            report_data=report_data,
        )


def _boot_log(image_digest: bytes) -> EventLog:
    """Return what firmware and boot loader measured: the machine, the kernel, the image."""
    measured = (
        (0, _EV_PLATFORM_CONFIG_FLAGS, b"simulated machine configuration"),
        (1, _EV_EFI_BOOT_SERVICES_APPLICATION, b"simulated kernel"),
        (2, _EV_IPL, image_digest),
    )
    return EventLog(tuple(Event(imr, kind, "", payload, sha384(payload)) for imr, kind, payload in measured))


def _qe_report(attestation_key: bytes) -> QeReport:
    """Return the quoting enclave's report about its attestation key."""
    return QeReport(
        cpu_svn=pki.CPU_SVN,
        misc_select=bytes(4),
        reserved_1=bytes(12),
        isv_ext_prod_id=bytes(16),
        attributes=bytes.fromhex("1500000000000000e700000000000000"),  # initialised, 64-bit, provision key
        mr_enclave=hashlib.sha256(b"simulated quoting enclave").digest(),
        reserved_2=bytes(32),
        mr_signer=hashlib.sha256(b"signer of the simulated quoting enclave").digest(),
        reserved_3=bytes(32),
        config_id=bytes(64),
        isv_prod_id=(2).to_bytes(2, "little"),
        isv_svn=(4).to_bytes(2, "little"),
        config_svn=bytes(2),
        reserved_4=bytes(42),
        isv_family_id=bytes(16),
        report_data=hashlib.sha256(attestation_key + _QE_AUTH_DATA).digest() + bytes(32),
    )


def _sign(key: ec.EllipticCurvePrivateKey, message: bytes) -> bytes:
    """Return r || s, 64 bytes."""
    r, s = decode_dss_signature(key.sign(message, ec.ECDSA(SHA256())))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")
