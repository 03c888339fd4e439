# SPDX-License-Identifier: Apache-2.0
"""Claims about the simulated platform: real format, real checks, a root of its own, made once and whole."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from cloister.errors import CloisterError, Code
from cloister.tdx.defaultpolicy import appraise
from cloister.tdx.eventlog import Event, EventLog
from cloister.tdx.quote import QuoteRejected
from cloister.tdx.tcbinfo import TcbStatus
from cloister.tdx.verify import TrustRoot, verify_quote, verify_with_collateral
from cloister.tlv import sha384
from cloister_sim import SimulatedPlatform, SimulatedTd, SimulationError
from cloister_sim.collateral import LIFE

IMAGE = sha384(b"image")
CREATE = """
import sys
from cloister_sim import SimulatedPlatform
sys.stdout.buffer.write(SimulatedPlatform.create(sys.argv[1]).root_pem)
"""


def now() -> datetime:
    return datetime.now(UTC)


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> SimulatedPlatform:
    return SimulatedPlatform.create(tmp_path_factory.mktemp("platform"))


@pytest.fixture
def td(platform: SimulatedPlatform) -> SimulatedTd:
    return platform.launch(IMAGE)


def test_its_quotes_pass_the_verifier_under_its_root_and_say_simulated(
    platform: SimulatedPlatform, td: SimulatedTd
) -> None:
    root = TrustRoot.from_pem(platform.root_pem, simulated=True)
    verified = verify_quote(td.quote(b"r" * 64), roots=[root], now=now())
    assert verified.simulated
    assert verified.quote.body.report_data == b"r" * 64
    assert len(verified.ppid) == len(verified.platform_instance_id) == 16


def test_its_quotes_pass_under_no_other_root(td: SimulatedTd, tmp_path: Path) -> None:
    other = TrustRoot.from_pem(SimulatedPlatform.create(tmp_path).root_pem, simulated=True)
    with pytest.raises(QuoteRejected) as caught:
        verify_quote(td.quote(bytes(64)), roots=[other], now=now())
    assert caught.value.check == "P2"


def test_registers_are_what_boot_log_and_extensions_replay_to(platform: SimulatedPlatform, td: SimulatedTd) -> None:
    log = EventLog.parse(td.boot_log)
    assert td.report(bytes(64)).rtmrs == log.replay()
    assert log.of(3) == ()
    for name in ("cloister.environment", "cloister.trust-bundle"):
        event = Event.runtime(name, b"x" * 48)
        log = log.appended(event)
        assert td.extend(3, event.digest) == log.replay()[3]
    root = TrustRoot.from_pem(platform.root_pem, simulated=True)
    assert verify_quote(td.quote(bytes(64)), roots=[root], now=now()).quote.body.rtmrs == log.replay()


def test_the_image_is_in_rtmr2_and_nowhere_else(platform: SimulatedPlatform) -> None:
    one, two = (platform.launch(sha384(image)).report(bytes(64)) for image in (b"1", b"2"))
    assert [a == b for a, b in zip(one.rtmrs, two.rtmrs, strict=True)] == [True, True, False, True]
    assert one.mr_td == two.mr_td


def test_one_td_does_not_touch_another(platform: SimulatedPlatform) -> None:
    one, two = platform.launch(IMAGE), platform.launch(IMAGE)
    one.extend(3, b"x" * 48)
    assert two.report(bytes(64)).rtmrs[3] == bytes(48)


@pytest.mark.parametrize("index", [0, 1, 4, 255, -1])
def test_firmware_registers_are_not_extended(td: SimulatedTd, index: int) -> None:
    with pytest.raises(SimulationError, match="RTMR2 and RTMR3"):
        td.extend(index, bytes(48))


def test_sizes_are_exact(platform: SimulatedPlatform, td: SimulatedTd) -> None:
    for request in (lambda: td.extend(3, bytes(47)), lambda: td.quote(bytes(63)), lambda: platform.launch(bytes(32))):
        with pytest.raises(SimulationError, match="bytes"):
            request()


def test_a_directory_keeps_its_platform(tmp_path: Path) -> None:
    first = SimulatedPlatform.create(tmp_path / "new" / "platform")
    again = SimulatedPlatform.create(tmp_path / "new" / "platform")
    assert again.root_pem == first.root_pem == (tmp_path / "new" / "platform" / "root.pem").read_bytes()
    root = TrustRoot.from_pem(first.root_pem, simulated=True)
    verified = [verify_quote(p.launch(IMAGE).quote(bytes(64)), roots=[root], now=now()) for p in (first, again)]
    assert verified[0].ppid == verified[1].ppid


def test_nobody_else_reads_its_files(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        SimulatedPlatform.create(tmp_path / "platform")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "platform").iterdir()}
    assert modes == {"lock": 0o600, "platform.json": 0o600, "root.pem": 0o600}
    assert stat.S_IMODE((tmp_path / "platform").stat().st_mode) == 0o700


def test_processes_that_start_at_once_find_one_platform(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", CREATE, str(tmp_path / "platform")]
    started = [subprocess.Popen(argv, stdout=subprocess.PIPE) for _ in range(4)]
    roots = {process.communicate(timeout=60)[0] for process in started}
    assert [process.returncode for process in started] == [0] * 4
    assert roots == {(tmp_path / "platform" / "root.pem").read_bytes()}


def test_a_killed_process_leaves_nothing_half_made(tmp_path: Path) -> None:
    directory = tmp_path / "platform"
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", CREATE, str(directory)], stdout=subprocess.DEVNULL)
        while process.poll() is None and not directory.exists():
            os.sched_yield()
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
        # Whatever it left behind, a platform is there afterwards, and it is whole.
        platform = SimulatedPlatform.create(directory)
        root = TrustRoot.from_pem((directory / "root.pem").read_bytes(), simulated=True)
        assert verify_quote(platform.launch(IMAGE).quote(bytes(64)), roots=[root], now=now()).simulated
        for path in directory.iterdir():
            path.unlink()
        directory.rmdir()


def test_leftovers_of_a_killed_process_are_overwritten(tmp_path: Path) -> None:
    (tmp_path / "platform.json.new").write_bytes(b'{"version": 1, "root_k')
    (tmp_path / "root.pem").write_bytes(b"-----BEGIN")
    platform = SimulatedPlatform.create(tmp_path)
    assert (tmp_path / "root.pem").read_bytes() == platform.root_pem
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "platform.json", "root.pem"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda members: "",
        lambda members: "[]",
        lambda members: json.dumps(members | {"version": 2}),
        lambda members: json.dumps({name: value for name, value in members.items() if name != "ca_key"}),
        lambda members: json.dumps(members | {"ca_key": 7}),
        lambda members: json.dumps(members | {"pck_key": members["pck"]}),
        lambda members: json.dumps(members | {"root": "nonsense"}),
    ],
)
def test_a_damaged_platform_is_named_and_never_replaced(tmp_path: Path, damage: object) -> None:
    SimulatedPlatform.create(tmp_path)
    path = tmp_path / "platform.json"
    assert callable(damage)
    damaged = damage(json.loads(path.read_text()))
    path.write_text(damaged)
    with pytest.raises(CloisterError) as caught:
        SimulatedPlatform.create(tmp_path)
    assert caught.value.code is Code.CONFIG_INVALID
    assert "remove the directory" in caught.value.todo
    assert path.read_text() == damaged


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CloisterError) as caught:
        SimulatedPlatform.create(tmp_path / "file" / "platform")
    assert caught.value.code is Code.IO_FAILED


def test_its_collateral_makes_it_up_to_date_and_acceptable_for_thirty_days(
    platform: SimulatedPlatform, td: SimulatedTd
) -> None:
    roots = [TrustRoot.from_pem(platform.root_pem, simulated=True)]
    at = now()
    collateral, quote = platform.collateral(at), td.quote(b"r" * 64)
    verdict = verify_with_collateral(quote, collateral, roots=roots, now=at)
    assert verdict.simulated
    assert verdict.status is TcbStatus.UP_TO_DATE
    assert verdict.advisories == verdict.warnings == ()
    assert appraise(verdict, report_data=b"r" * 64, event_log=EventLog.parse(td.boot_log).replay).accepted
    end = verdict.earliest_expiry
    assert timedelta(days=29) < end - at <= LIFE
    for moment in (end + timedelta(seconds=1), at - timedelta(seconds=2)):
        with pytest.raises(QuoteRejected):
            verify_with_collateral(quote, collateral, roots=roots, now=moment)


def test_its_collateral_may_follow_itself_but_not_precede(platform: SimulatedPlatform, td: SimulatedTd) -> None:
    roots = [TrustRoot.from_pem(platform.root_pem, simulated=True)]
    earlier, later = (
        verify_with_collateral(td.quote(b"r" * 64), platform.collateral(at), roots=roots, now=at).collateral
        for at in (now(), now() + timedelta(hours=1))
    )
    later.require_not_older(earlier)
    with pytest.raises(QuoteRejected) as caught:
        earlier.require_not_older(later)
    assert caught.value.check == "T13"


def test_its_collateral_says_nothing_about_another_platform(
    platform: SimulatedPlatform, td: SimulatedTd, tmp_path: Path
) -> None:
    other = SimulatedPlatform.create(tmp_path)
    roots = [TrustRoot.from_pem(each.root_pem, simulated=True) for each in (platform, other)]
    with pytest.raises(QuoteRejected):
        verify_with_collateral(td.quote(b"r" * 64), other.collateral(now()), roots=roots, now=now())
