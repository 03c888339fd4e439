# SPDX-License-Identifier: Apache-2.0
"""From the claims of a token to an `Ear`: every claim present, of its type, and none unknown."""

from __future__ import annotations

import re
from datetime import datetime

from cloister.ear.members import DIGEST_SIZE, Members, TokenRejected, unb64
from cloister.ear.values import PROFILE, STATUSES, TRUST_CLAIMS, Ear, TeeClaims, WorkloadClaims
from cloister.errors import CloisterError
from cloister.identity import Role, SpiffeId


def read_claims(payload: Members) -> tuple[Ear, datetime]:
    """Read every claim; return the result and `nbf`."""
    if (profile := payload.text("eat_profile")) != PROFILE:
        raise TokenRejected("eat_profile", f"{profile!r}, not {PROFILE}")
    not_before = payload.time("nbf")
    nonces = payload.texts("eat_nonce", 2)
    if not nonces or not all(re.fullmatch(r"[0-9a-f]{64}", nonce, re.ASCII) for nonce in nonces):
        raise TokenRejected("shape", "payload.eat_nonce: not one or two nonces of 32 bytes in hexadecimal")
    confirmation, verifier = payload.object("cnf"), payload.object("ear_verifier_id")
    thumbprint = unb64(confirmation.text("x5t#S256", 64))
    if len(thumbprint) != 32:
        raise TokenRejected("shape", "payload.cnf.x5t#S256: not 32 bytes")
    verifier_id = verifier.text("build", 256)
    verifier.text("developer", 256)
    inputs_object = payload.object("cloister_inputs")
    inputs = {name: inputs_object.digest(name) for name in inputs_object.names()}
    submods = payload.object("submods")
    cpu, guest = submods.object("cpu0"), submods.object("workload0")
    status, policy = _appraisal(cpu)
    if _appraisal(guest) != (status, policy):
        raise TokenRejected("shape", "the two submodules carry different appraisals")
    vector_object = cpu.object("ear_trustworthiness_vector")
    vector = {name: vector_object.number(name, -128, 127) for name in vector_object.names()}
    if not TRUST_CLAIMS.issuperset(vector):
        raise TokenRejected("shape", "an unknown name in the trustworthiness vector")
    tdx, workload = cpu.object("cloister_tdx"), guest.object("cloister_workload")
    ear = Ear(
        issuer=payload.text("iss"),
        audience=payload.text("aud"),
        issued_at=payload.time("iat"),
        expires_at=payload.time("exp"),
        token_id=payload.text("jti", 128),
        nonces=nonces,
        certificate_sha256=thumbprint,
        hpke_key_digest=payload.digest("cloister_hpke_key"),
        spiffe_id=payload.text("sub"),
        status=status,
        trustworthiness=vector,
        tee=_tee(tdx),
        workload=_workload(workload),
        policy_digest=policy,
        verifier_id=verifier_id,
        inputs=inputs,
    )
    for members in (payload, confirmation, verifier, inputs_object, submods, cpu, guest, vector_object, tdx, workload):
        members.end()
    _check_names(ear)
    return ear, not_before


def _appraisal(submodule: Members) -> tuple[str, bytes]:
    status = submodule.text("ear_status", 32)
    policies = submodule.digests("ear_appraisal_policy_ids", 1)
    if status not in STATUSES or len(policies) != 1:
        raise TokenRejected("shape", "a submodule has an unknown ear_status, or not exactly one appraisal policy")
    return status, policies[0]


def _tee(tdx: Members) -> TeeClaims:
    rtmrs = tdx.hexes("rtmrs", DIGEST_SIZE, 4)
    if len(rtmrs) != 4:
        raise TokenRejected("shape", "cloister_tdx.rtmrs: not four registers")
    return TeeClaims(
        mr_td=tdx.hex("mr_td", DIGEST_SIZE),
        mr_seam=tdx.hex("mr_seam", DIGEST_SIZE),
        rtmrs=(rtmrs[0], rtmrs[1], rtmrs[2], rtmrs[3]),
        debug=tdx.flag("debug"),
        simulated=tdx.flag("simulated"),
        fmspc=tdx.hex("fmspc", 6),
        piid=tdx.hex("piid", 16, 0),
        tcb_status=tdx.optional_text("tcb_status"),
        tcb_date=tdx.optional_text("tcb_date"),
        advisories=tdx.texts("advisories", 256),
        tcb_evaluation=tdx.optional_number("tcb_evaluation", 0, 2**32 - 1),
        collateral_issued=tdx.optional_text("collateral_issued"),
        collateral_expires=tdx.optional_text("collateral_expires"),
    )


def _workload(claims: Members) -> WorkloadClaims:
    try:
        role = Role(claims.text("role", 32))
    except ValueError:
        raise TokenRejected("shape", "cloister_workload.role: unknown") from None
    return WorkloadClaims(
        role=role,
        environment=claims.digest("environment"),
        trust_bundle=claims.digest("trust_bundle"),
        script=claims.digest("script"),
        config=claims.digest("config"),
        datasets=claims.digests("datasets", 64),
        tenant=claims.text("tenant", 63),
        job=claims.text("job", 63),
        rank=claims.optional_number("rank", 0, 99_999),
        world_size=claims.optional_number("world_size", 1, 100_000),
        model=claims.text("model", 63),
        backend=claims.text("backend", 63),
    )


def _check_names(ear: Ear) -> None:
    """Refuse a token whose subject and workload speak of different identities."""
    try:
        subject = SpiffeId.parse(ear.spiffe_id)
    except CloisterError:
        raise TokenRejected("sub", "not a SPIFFE id of this system") from None
    w = ear.workload
    rank = -1 if w.rank is None else w.rank
    if (subject.role, subject.tenant, subject.job, subject.rank) != (w.role, w.tenant, w.job, rank):
        raise TokenRejected("sub", "the subject is not the workload's identity")
    if (subject.model, subject.backend) != (w.model, w.backend):
        raise TokenRejected("sub", "the subject is not the workload's identity")
    if (w.rank is None) != (w.world_size is None) or (w.world_size is not None and rank >= w.world_size):
        raise TokenRejected("sub", "rank and world size do not fit together")
