# SPDX-License-Identifier: Apache-2.0
"""Quotes of the simulated enclave, and verification of quotes of the same platform.

As at EHSM the report data is zero whatever the challenge was: a quote says that such an enclave ran on the platform
once, not that it is behind this connection.
"""

from __future__ import annotations

import hashlib
import hmac
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from cloister import ehsm
from cloister.collateral.family import Tee
from cloister.tdx.body import SGX_REPORT_SIZE, SgxReport
from cloister.tdx.collateral import Collateral
from cloister.tdx.quote import QuoteRejected, SgxQuote
from cloister.tdx.tcbinfo import TcbStatus
from cloister.tdx.trustroot import TrustRoot
from cloister.tdx.verify import verify_with_collateral
from cloister_sim.ehsm import core
from cloister_sim.ehsm.vault import Vault
from cloister_sim.ehsm.wire import Answer, Call, bad_request
from cloister_sim.pki import CPU_SVN
from cloister_sim.platform import SimulatedPlatform

_ATTRIBUTES: Final = bytes.fromhex("0500000000000000e700000000000000")  # initialised, 64-bit; not a debug enclave
# sgx_ql_qv_result_t
_RESULT: Final = {
    TcbStatus.UP_TO_DATE: 0,
    TcbStatus.CONFIGURATION_NEEDED: 0xA001,
    TcbStatus.OUT_OF_DATE: 0xA002,
    TcbStatus.OUT_OF_DATE_CONFIGURATION_NEEDED: 0xA003,
    TcbStatus.REVOKED: 0xA005,
    TcbStatus.SW_HARDENING_NEEDED: 0xA007,
    TcbStatus.CONFIGURATION_AND_SW_HARDENING_NEEDED: 0xA008,
}
_INVALID_SIGNATURE: Final = 0xA004
_UNSPECIFIED: Final = 0xA006
MR_ENCLAVE: Final = hashlib.sha256(b"simulated EHSM enclave").digest()
MR_SIGNER: Final = hashlib.sha256(b"signer of the simulated EHSM enclave").digest()


class QuoteActions:
    """One method per action: raise Refused."""

    def __init__(self, vault: Vault, platform: SimulatedPlatform, collateral_directory: Path) -> None:
        self._vault = vault
        self._platform = platform
        self._directory = collateral_directory
        self._root = TrustRoot.from_pem(platform.root_pem, simulated=True)
        self._collateral: Collateral | None = None

    def publish(self) -> None:
        """Write the collateral that quotes of this server are verified with, and keep it for VerifyQuote.

        Its time is the machine's, whatever clock the rest of the server has.
        """
        now = datetime.now(UTC)
        self._platform.publish(self._directory, now, Tee.SGX)
        self._collateral = self._platform.collateral(now, Tee.SGX)

    async def generate(self, call: Call) -> Answer:
        quote = self._platform.sign_enclave(_report())
        return Answer(
            200, "success!", {"challenge": ehsm.encode(call.fields["challenge"]), "quote": ehsm.encode(quote)}
        )

    async def verify(self, call: Call) -> Answer:
        quote_bytes = call.fields["quote"]
        if len(quote_bytes) < SGX_REPORT_SIZE:
            raise bad_request("The quote's length is invalid.")
        result, quote = self._judge(quote_bytes)
        answer: dict[str, Any] = {"result": result, "nonce": ehsm.encode(call.fields["nonce"])}
        if policy_id := call.fields.get("policyId"):
            policy = await self._policy(call.appid, policy_id)
            if policy is None:
                raise bad_request("Invalid  policyId.")
            wanted = (policy["mr_enclave"], policy["mr_signer"])
            if quote is None or (quote.body.mr_enclave.hex(), quote.body.mr_signer.hex()) != wanted:
                raise core.server_exception()
            answer |= {"mr_enclave": wanted[0], "mr_signer": wanted[1]}
        text = ehsm.canonical(answer)
        answer["sign"] = ehsm.encode(hmac.digest(call.api_key.reveal(), text.encode(), "sha256"))
        return Answer(200, "success!", answer)

    async def upload_policy(self, call: Call) -> Answer:
        policy_id = str(uuid.uuid4())
        row = (policy_id, call.appid, call.fields["mr_enclave"], call.fields["mr_signer"], call.now_ms)
        await self._vault.write(lambda db: db.execute("INSERT INTO policies VALUES (?, ?, ?, ?, ?)", row))
        return Answer(200, "Upload quote policy success.", {"policyId": policy_id})

    async def get_policy(self, call: Call) -> Answer:
        policy_id = call.fields["policyId"]
        policy = await self._policy(call.appid, policy_id) or {}
        return Answer(200, "Query quote policy success.", {"policyId": policy_id, **policy})

    async def _policy(self, appid: str, policy_id: str) -> dict[str, Any] | None:
        query = "SELECT mr_enclave, mr_signer, created_ms FROM policies WHERE policyid = ? AND appid = ?"
        rows = await self._vault.read(lambda db: db.execute(query, (policy_id, appid)).fetchall())
        return dict(zip(("mr_enclave", "mr_signer", "createTime"), rows[0], strict=True)) if rows else None

    def _judge(self, data: bytes) -> tuple[int, SgxQuote | None]:
        if self._collateral is None:
            return _UNSPECIFIED, None
        try:
            verdict = verify_with_collateral(data, self._collateral, roots=[self._root], now=datetime.now(UTC))
        except QuoteRejected:
            return _INVALID_SIGNATURE, None
        quote = verdict.quote if isinstance(verdict.quote, SgxQuote) else None
        return _RESULT.get(verdict.status, _UNSPECIFIED), quote


def _report() -> SgxReport:
    return SgxReport(
        cpu_svn=CPU_SVN,
        misc_select=bytes(4),
        reserved_1=bytes(12),
        isv_ext_prod_id=bytes(16),
        attributes=_ATTRIBUTES,
        mr_enclave=MR_ENCLAVE,
        reserved_2=bytes(32),
        mr_signer=MR_SIGNER,
        reserved_3=bytes(32),
        config_id=bytes(64),
        isv_prod_id=bytes(2),
        isv_svn=(1).to_bytes(2, "little"),
        config_svn=bytes(2),
        reserved_4=bytes(42),
        isv_family_id=bytes(16),
        report_data=bytes(64),
    )
