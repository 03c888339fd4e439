# SPDX-License-Identifier: Apache-2.0
"""An attestation result says after verification exactly what was issued."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from cloister import ear
from cloister.identity import Role
from fakes.ear_sample import AUDIENCE, ISSUER, NOW, sample_ear

KEY = ec.generate_private_key(ec.SECP256R1())
JWK = ear.public_jwk(KEY.public_key())


def verify(token: str, now: datetime = NOW, **changes: object) -> ear.Ear:
    arguments = {"keys": [JWK], "issuer": ISSUER, "audience": AUDIENCE, "now": now, **changes}
    return ear.verify(token, **arguments)  # type: ignore[arg-type]


def issue(value: ear.Ear) -> str:
    return ear.issue(value, key=KEY, key_id=JWK["kid"])


def test_every_claim_of_a_rank_survives_the_token() -> None:
    value = sample_ear()
    assert verify(issue(value)) == value


def test_every_claim_of_a_service_survives_the_token() -> None:
    value = sample_ear(role=Role.KEYBROKER)
    assert verify(issue(value)) == value


def test_every_claim_of_a_backend_survives_the_token() -> None:
    value = sample_ear(role=Role.BACKEND)
    assert verify(issue(value)) == value


def test_evaluated_tcb_survives_the_token() -> None:
    tee = replace(sample_ear().tee, tcb_status="UpToDate", tcb_date="2026-02-11", advisories=("INTEL-SA-00837",))
    assert verify(issue(replace(sample_ear(), tee=tee))).tee == tee


def test_the_token_is_a_plain_es256_jwt_for_other_libraries() -> None:
    token = issue(sample_ear())
    assert jwt.get_unverified_header(token) == {"alg": "ES256", "typ": "eat+jwt", "kid": JWK["kid"]}
    claims = jwt.decode(
        token,
        KEY.public_key(),
        algorithms=["ES256"],
        audience=AUDIENCE,
        options={"verify_exp": False, "verify_nbf": False, "verify_iat": False},
    )
    assert claims["submods"]["cpu0"]["ear_status"] == "affirming"
    assert claims["submods"]["cpu0"]["cloister_tdx"]["simulated"] is True
    assert claims["submods"]["workload0"]["cloister_workload"]["rank"] == 1


def test_the_key_id_is_the_rfc_7638_thumbprint() -> None:
    # Key and thumbprint made with an independent implementation of RFC 7638 (canonical JSON by hand, SHA-256).
    numbers = ec.derive_private_key(1, ec.SECP256R1()).public_key()
    jwk = ear.public_jwk(numbers)
    assert jwk["x"] == "axfR8uEsQkf4vOblY6RA8ncDfYEt6zOg9KE5RdiYwpY"
    assert jwk["y"] == "T-NC4v4af5uO5-tKfA-eFivOM1drMV7Oy7ZAaDe_UfU"


def test_a_token_is_accepted_until_its_end_plus_the_leeway() -> None:
    token = issue(sample_ear())
    assert verify(token, NOW + timedelta(minutes=5, seconds=29))
    with pytest.raises(ear.TokenRejected) as caught:
        verify(token, NOW + timedelta(minutes=5, seconds=30))
    assert caught.value.check == "exp"


def test_a_clock_that_lags_by_the_leeway_is_accepted() -> None:
    token = issue(sample_ear())
    assert verify(token, NOW - timedelta(seconds=30))
    with pytest.raises(ear.TokenRejected) as caught:
        verify(token, NOW - timedelta(seconds=31))
    assert caught.value.check == "iat"


@pytest.mark.parametrize("lifetime", [timedelta(0), timedelta(minutes=5, seconds=1), -timedelta(seconds=1)])
def test_no_token_of_more_than_five_minutes_is_issued(lifetime: timedelta) -> None:
    value = replace(sample_ear(), expires_at=NOW + lifetime)
    with pytest.raises(ValueError, match="5 minutes"):
        issue(value)


def test_times_are_whole_seconds() -> None:
    now = datetime(2026, 11, 1, 12, 0, 0, 999_999, tzinfo=UTC)
    value = replace(sample_ear(), issued_at=now, expires_at=now + timedelta(minutes=5))
    assert verify(issue(value)).issued_at == now.replace(microsecond=0)


def test_a_token_with_many_datasets_stays_below_the_size_limit() -> None:
    workload = replace(sample_ear().workload, datasets=tuple(bytes([i]) * 48 for i in range(64)))
    assert len(verify(issue(replace(sample_ear(), workload=workload))).workload.datasets) == 64


def test_the_payload_is_canonical_json() -> None:
    payload = jwt.PyJWS().decode(issue(sample_ear()), KEY.public_key(), algorithms=["ES256"])
    assert payload == json.dumps(json.loads(payload), separators=(",", ":"), sort_keys=True).encode()


# Tokens that were seen before.


def test_a_token_that_was_authenticated_is_not_verified_again_and_still_expires() -> None:
    tokens, keys = ear.AuthenticTokens(), [JWK]
    token = issue(sample_ear())
    first = tokens.authenticate(token, keys=keys)
    assert tokens.authenticate(token, keys=keys) is first
    assert ear.current(first, issuer=ISSUER, audience=AUDIENCE, now=NOW) == sample_ear()
    for change in ({"now": NOW + timedelta(minutes=6)}, {"audience": "other"}, {"issuer": "other"}):
        arguments = {"issuer": ISSUER, "audience": AUDIENCE, "now": NOW} | change
        with pytest.raises(ear.TokenRejected):
            ear.current(first, **arguments)  # type: ignore[arg-type]


def test_a_token_is_not_believed_under_keys_that_did_not_sign_it_because_it_was_under_others() -> None:
    tokens, token = ear.AuthenticTokens(), issue(sample_ear())
    first = tokens.authenticate(token, keys=[JWK])
    assert tokens.authenticate(token, keys=[dict(JWK)]) is first
    other = ear.public_jwk(ec.generate_private_key(ec.SECP256R1()).public_key())
    with pytest.raises(ear.TokenRejected):
        tokens.authenticate(token, keys=[other])
    assert tokens.authenticate(token, keys=[JWK]) is not first


def test_a_forged_token_is_not_remembered_and_few_genuine_ones_are() -> None:
    tokens = ear.AuthenticTokens(capacity=2)
    genuine = [issue(replace(sample_ear(), token_id=f"{n}")) for n in range(3)]
    for _ in range(2):
        with pytest.raises(ear.TokenRejected):
            tokens.authenticate(genuine[0][:-4] + "AAAA", keys=[JWK])
    found = [tokens.authenticate(token, keys=[JWK]) for token in genuine]
    assert tokens.authenticate(genuine[2], keys=[JWK]) is found[2]
    assert tokens.authenticate(genuine[0], keys=[JWK]) is not found[0]
