# SPDX-License-Identifier: Apache-2.0
"""Is there an enclave behind EHSM? Its quote, verified against a policy of the operator's, once a day.

    apiVersion: cloister.dev/v1
    kind: EhsmEnclavePolicy
    spec:
      root: intel                                    # or simulated:/path/root.pem, for a development server
      collateral: /var/lib/cloister/collateral       # bundles, see docs/collateral.md
      enclave: {mr_enclave: ["..."], mr_signer: ["..."], min_isv_svn: 1, debug: deny}
      tcb: {status: [UpToDate, SWHardeningNeeded]}

What it proves is little: EHSM puts nothing into its quote, no challenge and no key, so a quote says that such an
enclave ran on such a platform at some time, not that it is behind this connection, nor now. The log says so each time.
A quote that does not verify is refused all the same: it shows a wrong installation.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final, NoReturn, Self

from cloister.atomicfile import file_error
from cloister.collateral.commands import family_of
from cloister.collateral.offline import OfflineCollateral
from cloister.errors import CloisterError, Code
from cloister.policyblocks import API_VERSION, TCB_STATUSES, BlockReader, parse_hex, read_document
from cloister.runtime.logging import get_logger
from cloister.tdx.body import SgxReport
from cloister.tdx.intelroot import intel_root
from cloister.tdx.quote import QuoteRejected, SgxQuote
from cloister.tdx.trustroot import TrustRoot
from cloister.tdx.verify import Verdict, verify_with_collateral
from cloister_keybroker.backends import Clock
from cloister_keybroker.backends.ehsm.client import EhsmClient
from cloister_keybroker.backends.failures import refused

KIND: Final = "EhsmEnclavePolicy"
EVERY: Final = timedelta(days=1)
_GOOD_FOR: Final = timedelta(days=7)
_AFTER_FAILURE: Final = timedelta(minutes=1)
_BAD: Final = frozenset({Code.CUSTODIAN_REFUSED, Code.QUOTE_REJECTED})
_MANUAL: Final = "docs/ehsm.md"
_SIMULATED: Final = "simulated:"
_MEASUREMENT_SIZE: Final = 32
# Their private keys are in EHSM's repository: anybody can sign an enclave as these.
_PUBLISHED_SIGNERS: Final = frozenset(
    bytes.fromhex(digest)
    for digest in (
        "c30446b4be9baf0f69728423ea613ef81a63e72acf7439fa0549001fd5482835",
        "83d719e77deaca1470f6baf62a4d774303c899db69020f9c70ee1dfc08c7ce9e",
        "60277ad2fdfc57e980e876e7f878ac1909880ea5380795a7e8ea98b157841f85",
    )
)
_DIGEST: Final = "64 hexadecimal digits"


@dataclass(frozen=True, slots=True)
class EnclavePolicy:
    """What the enclave and its platform must be. An empty set of measurements is not looked at."""

    root: TrustRoot
    collateral: Path
    mr_enclave: frozenset[bytes]
    mr_signer: frozenset[bytes]
    min_isv_svn: int
    debug: bool  # allowed
    statuses: frozenset[str]

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read YAML; raise CloisterError(POLICY_INVALID) for anything else, also for a policy that protects nothing."""
        document = read_document(data, what="enclave policy", manual=_MANUAL)
        top = BlockReader(document, (), document.root)
        top.choice("apiVersion", [API_VERSION])
        top.choice("kind", [KIND])
        spec = top.block("spec")
        top.end()
        root = spec.parsed("root", _root, 'intel, or "simulated:" and the absolute path of a root certificate')
        collateral = spec.parsed("collateral", _absolute, "the absolute path of a directory")
        enclave, tcb = spec.block("enclave"), spec.block("tcb")
        spec.end()
        mr_enclave, mr_signer = _measurements(enclave, "mr_enclave"), _measurements(enclave, "mr_signer")
        min_isv_svn = enclave.number("min_isv_svn", 0, 65_535) if enclave.has("min_isv_svn") else 0
        debug = enclave.choice("debug", ["deny", "allow"], "deny") == "allow"
        enclave.end()
        if not mr_enclave and not mr_signer:
            enclave.refuse("mr_enclave", "any enclave would do", "list mr_enclave, or mr_signer, or both")
        if not mr_enclave and mr_signer & _PUBLISHED_SIGNERS:
            todo = "list mr_enclave too, or sign EHSM's enclave with a key of your own"
            enclave.refuse("mr_signer", "the private key of this signer is published in EHSM's repository", todo)
        statuses = frozenset(tcb.choices("status", TCB_STATUSES))
        tcb.end()
        return cls(root, collateral, mr_enclave, mr_signer, min_isv_svn, debug, statuses)

    def problem(self, report: SgxReport, status: str) -> str:
        """Return what is wrong with a verified report; "" when nothing is."""
        svn = int.from_bytes(report.isv_svn, "little")
        if self.mr_enclave and report.mr_enclave not in self.mr_enclave:
            return f"its enclave is another one (MRENCLAVE {report.mr_enclave.hex()})"
        if self.mr_signer and report.mr_signer not in self.mr_signer:
            return f"its enclave is signed by another (MRSIGNER {report.mr_signer.hex()})"
        if svn < self.min_isv_svn:
            return f"its enclave has security version {svn}, below {self.min_isv_svn}"
        if report.debug and not self.debug:
            return "its enclave is a debug enclave: whoever runs its host reads its memory"
        if status not in self.statuses:
            return f"its platform is {status}"
        return ""


class EnclaveCheck:
    """Fetch a quote, verify it, and remember what came of it for a day; a failure for a minute."""

    def __init__(self, policy: EnclavePolicy, *, backend: str, clock: Clock) -> None:
        self._policy = policy
        self._backend = backend
        self._clock = clock
        self._collateral = OfflineCollateral(policy.collateral, root=policy.root, clock=clock)
        self._verified: datetime | None = None
        self._failed: tuple[datetime, CloisterError] | None = None
        self._checking = asyncio.Lock()

    @classmethod
    def read(cls, path: Path, *, backend: str, clock: Clock) -> Self:
        """Read a policy's file; raise CloisterError."""
        try:
            return cls(EnclavePolicy.parse(path.read_bytes()), backend=backend, clock=clock)
        except OSError as error:
            raise file_error(error, what=f"the enclave policy {path} cannot be read") from None

    async def require(self, client: EhsmClient) -> None:
        """Raise CloisterError unless EHSM has shown a good quote within a day.

        While no quote can be had, or no collateral for it, the last good one counts for a week; a bad one ends that.
        """
        async with self._checking:
            now = self._clock()
            if _within(self._verified, now, EVERY):
                return
            if self._failed is not None and _within(self._failed[0], now, _AFTER_FAILURE):
                error = self._failed[1]
            else:
                try:
                    await self._verify(client, now)
                except CloisterError as failed:
                    self._failed, error = (now, failed), failed
                else:
                    self._verified, self._failed = now, None
                    return
                get_logger().error("the back end's enclave is not verified", backend=self._backend, problem=str(error))
            if error.code in _BAD:
                self._verified = None
            if not _within(self._verified, now, _GOOD_FOR):
                raise CloisterError(error.code, what=error.what, why=error.why, todo=error.todo)

    async def _verify(self, client: EhsmClient, now: datetime) -> None:
        quote = await client.quote()
        family = family_of(quote, roots=[self._policy.root])
        collateral = await self._collateral.get(family.fmspc, family.ca, family.tee)
        try:
            verdict = verify_with_collateral(quote, collateral, roots=[self._policy.root], now=now)
        except QuoteRejected as rejected:
            self._refuse(f"its enclave's quote does not verify: {rejected.check}: {rejected.reason}")
        report = self._judge(verdict)
        get_logger().info(
            "quote of the back end's enclave verified",
            backend=self._backend,
            mr_enclave=report.mr_enclave.hex(),
            mr_signer=report.mr_signer.hex(),
            debug=report.debug,
            platform=str(verdict.status),
            simulated=verdict.simulated,
            bound_to_this_connection=False,
            fresh=False,
        )

    def _judge(self, verdict: Verdict) -> SgxReport:
        if not isinstance(verdict.quote, SgxQuote):
            self._refuse("its quote is of a TD, not of an enclave")
        report = verdict.quote.body
        if problem := self._policy.problem(report, str(verdict.status)):
            self._refuse(problem)
        return report

    def _refuse(self, why: str) -> NoReturn:
        raise refused(self._backend, why, "compare the enclave policy with what was installed; see docs/ehsm.md")


def _within(moment: datetime | None, now: datetime, time: timedelta) -> bool:
    """Say whether a moment was so recently; one that is ahead of a clock that was set back was not."""
    return moment is not None and timedelta() <= now - moment < time


def _measurements(block: BlockReader, name: str) -> frozenset[bytes]:
    if not block.has(name):
        return frozenset()
    return frozenset(block.each(name, lambda text: parse_hex(text, _MEASUREMENT_SIZE), _DIGEST))


def _root(text: str) -> TrustRoot | None:
    if text == "intel":
        return intel_root()
    path = Path(text.removeprefix(_SIMULATED))
    if not text.startswith(_SIMULATED) or not path.is_absolute():
        return None
    try:
        return TrustRoot.from_pem(path.read_bytes(), simulated=True)
    except OSError as error:
        raise file_error(error, what=f"the root certificate {path} cannot be read") from None


def _absolute(text: str) -> Path | None:
    path = Path(text)
    return path if path.is_absolute() else None
