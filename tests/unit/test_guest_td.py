# SPDX-License-Identifier: Apache-2.0
"""A TD from inside: what it measures, when it has keys, and what its evidence is over."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from cloister.errors import CloisterError, Code
from cloister.guest import measure as measurements
from cloister.guest.evidence import report_data_of
from cloister.guest.guest import Guest
from cloister.guest.provider import open_provider
from cloister.identity import Role
from cloister.runtime.bundle import TrustBundle
from cloister.tdx import workload
from cloister.tdx.quote import Quote
from cloister.tdx.workload import read_workload
from cloister_sim.platform import SimulatedPlatform
from fakes.attest_harness import TdProvider, measure
from fakes.certs import TestCa

KEY_URI = "cloister-key://hospital-a/datasets/reviews"
BUNDLE: TrustBundle = TestCa().bundle


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> SimulatedPlatform:
    return SimulatedPlatform.create(tmp_path_factory.mktemp("platform"))


@pytest.fixture
def guest(platform: SimulatedPlatform) -> Guest:
    return Guest(TdProvider(platform))


def test_a_td_has_keys_only_after_its_last_measurement(guest: Guest) -> None:
    for attempt in (
        lambda: guest.keys,
        lambda: guest.role,
        lambda: guest.record_key("cloister-key://a/b", 1, b"x" * 48),
    ):
        with pytest.raises(CloisterError) as caught:
            attempt()
        assert caught.value.code is Code.ARGUMENT_INVALID
    assert not guest.sealed
    measure(guest, Role.RANK, bundle=BUNDLE.digest)
    assert guest.sealed
    assert guest.keys.tls.curve.name == "secp256r1"


def test_nothing_is_measured_after_sealing(guest: Guest) -> None:
    measure(guest, Role.TRAINER, bundle=BUNDLE.digest)
    before = guest.event_log
    with pytest.raises(CloisterError):
        guest.measure(workload.SCRIPT, b"\x00" * 48)
    with pytest.raises(CloisterError):
        guest.seal(Role.TRAINER)
    assert guest.event_log is before


def test_evidence_replays_and_is_over_its_own_fields(guest: Guest) -> None:
    measure(guest, Role.KEYBROKER, bundle=BUNDLE.digest)
    evidence = guest.evidence(nonce=b"\x01" * 32, audience="spiffe://x", trust_domain="cloister.test")
    body = Quote.parse(evidence.quote).body
    assert body.report_data == report_data_of(evidence)
    assert body.rtmrs == guest.event_log.replay()
    assert evidence.tls_spki_der == guest.keys.tls_spki_der
    assert evidence.receipt_spki_der == guest.keys.receipt_spki_der
    assert read_workload(guest.event_log).trust_bundle == BUNDLE.digest


@pytest.mark.parametrize("role", [Role.ATTEST, Role.TRAINER, Role.GATEWAY, Role.RANK, Role.BACKEND])
def test_roles_that_sign_no_receipts_quote_no_receipt_key(platform: SimulatedPlatform, role: Role) -> None:
    guest = Guest(TdProvider(platform))
    measure(guest, role, bundle=BUNDLE.digest)
    evidence = guest.evidence(nonce=b"\x01" * 32, audience="spiffe://x", trust_domain="cloister.test")
    assert evidence.receipt_spki_der == b""


def test_a_received_key_shows_in_the_register(guest: Guest) -> None:
    measure(guest, Role.RANK, bundle=BUNDLE.digest)
    before = guest.event_log.replay()
    guest.record_key(KEY_URI, 3, b"\x07" * 48)
    assert guest.event_log.replay()[3] != before[3]
    (claim,) = read_workload(guest.event_log).keys_received
    assert (claim.uri, claim.version, claim.receipt_digest) == (
        KEY_URI,
        3,
        b"\x07" * 48,
    )


def test_evidence_and_recording_at_once_never_disagree(guest: Guest) -> None:
    measure(guest, Role.RANK, bundle=BUNDLE.digest)

    def record() -> None:
        for version in range(1, 50):
            guest.record_key(KEY_URI, version, b"\x07" * 48)

    thread = threading.Thread(target=record)
    thread.start()
    while thread.is_alive():
        evidence = guest.evidence(nonce=b"\x01" * 32, audience="a", trust_domain="cloister.test")
        log = guest.event_log.parse(evidence.event_log)
        assert Quote.parse(evidence.quote).body.rtmrs == log.replay()
    thread.join()


def test_two_tds_have_no_key_in_common(platform: SimulatedPlatform) -> None:
    guests = [Guest(TdProvider(platform)) for _ in range(2)]
    for guest in guests:
        measure(guest, Role.RANK, bundle=BUNDLE.digest)
    one, other = (guest.keys for guest in guests)
    assert one.tls_spki_der != other.tls_spki_der
    assert one.hpke.public_bytes != other.hpke.public_bytes
    assert one.receipt_spki_der != other.receipt_spki_der


# providers


@pytest.mark.parametrize("uri", ["", "tdx", "simulated:", "http://platform", "simulated"])
def test_an_unknown_provider_is_refused_with_the_allowed_ones(uri: str) -> None:
    with pytest.raises(CloisterError) as caught:
        open_provider(uri, b"\x00" * 48)
    assert caught.value.code is Code.CONFIG_INVALID
    assert "simulated:" in caught.value.why


def test_a_platform_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CloisterError) as caught:
        Guest.open(f"simulated:{tmp_path}/none.sock")
    assert caught.value.code is Code.QUOTE_PROVIDER_FAILED
    assert "No such file" in caught.value.why


# measurements


def test_a_package_is_measured_by_names_and_contents_of_its_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))

    def digest(name: str, files: dict[str, str]) -> bytes:
        for path, text in files.items():
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_text(text)
        measurements.digest_of_package.cache_clear()
        return measurements.digest_of_package(name)

    first = digest("measured_a", {"__init__.py": "", "x.py": "1", "sub/y.py": "2"})
    assert len(first) == 48
    assert digest("measured_a", {"notes.txt": "not code", "__pycache__/x.pyc": "not source"}) == first
    assert digest("measured_a", {"x.py": "2"}) != first
    assert digest("measured_b", {"__init__.py": "", "x.py": "12", "sub/y.py": ""}) != first
    assert digest("measured_c", {"__init__.py": "", "y.py": "1", "sub/x.py": "2"}) != first
    measurements.digest_of_package.cache_clear()


def test_the_digest_of_a_service_covers_the_library_it_stands_on(monkeypatch: pytest.MonkeyPatch) -> None:
    measurements.digest_of_package.cache_clear()
    before = measurements.digest_of_package("cloister_attest")
    measurements.digest_of_package.cache_clear()
    sources = measurements.digest_of_sources
    monkeypatch.setattr(
        measurements, "digest_of_sources", lambda name: b"\x66" * 48 if name == "cloister" else sources(name)
    )
    assert measurements.digest_of_package("cloister_attest") != before
    measurements.digest_of_package.cache_clear()


def test_a_package_that_is_not_installed_cannot_be_measured() -> None:
    with pytest.raises(CloisterError) as caught:
        measurements.digest_of_package("no_such_package_anywhere")
    assert caught.value.code is Code.PREREQUISITE_MISSING


def test_a_file_is_measured_as_it_was_read(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_bytes(b"print(1)")
    measured = measurements.read_measured(path)
    path.write_bytes(b"print(2)")
    assert measured.data == b"print(1)"
    assert measured.digest == measurements.sha384(b"print(1)")
    with pytest.raises(CloisterError) as caught:
        measurements.read_measured(tmp_path / "none.py")
    assert caught.value.code is Code.FILE_NOT_FOUND
