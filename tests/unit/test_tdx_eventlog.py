# SPDX-License-Identifier: Apache-2.0
"""Claims about event logs and the workloads they tell of."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from cloister.identity import Role
from cloister.tdx import workload as w
from cloister.tdx.eventlog import MAX_EVENTS, RUNTIME_EVENT_TYPE, Event, EventLog, EventLogRejected
from cloister.tlv import sha384, tlv

VECTORS = Path(__file__).parents[1] / "vectors" / "tdx"
LOG = (VECTORS / "eventlog.json").read_bytes()
EXPECTED: dict[str, Any] = json.loads((VECTORS / "expected.json").read_text())


def entries() -> list[dict[str, Any]]:
    parsed: list[dict[str, Any]] = json.loads(LOG)
    return parsed


def changed(number: int, **members: Any) -> bytes:
    events = entries()
    events[number] |= members
    return json.dumps(events).encode()


def reason(data: bytes) -> str:
    with pytest.raises(EventLogRejected) as caught:
        EventLog.parse(data)
    return caught.value.reason


def test_the_pinned_log_replays_to_the_pinned_quote() -> None:
    assert [rtmr.hex() for rtmr in EventLog.parse(LOG).replay()] == [EXPECTED["body"][f"rtmr{n}"] for n in range(4)]


def test_a_log_is_written_as_it_was_read() -> None:
    assert EventLog.parse(LOG).to_json() == LOG


def test_a_register_is_a_hash_chain_from_zero() -> None:
    one, two = Event.runtime("a", b"1"), Event.runtime("b", b"2")
    register = hashlib.sha384(hashlib.sha384(bytes(48) + one.digest).digest() + two.digest).digest()
    assert EventLog((one, two)).replay() == (bytes(48), bytes(48), bytes(48), register)
    assert EventLog((two, one)).replay()[3] != register
    assert EventLog((one,)).appended(two) == EventLog((one, two))
    assert EventLog((one, two)).of(3) == (one, two)
    assert EventLog((one, two)).of(0) == ()


def test_a_runtime_digest_is_over_type_name_and_payload() -> None:
    digest = hashlib.sha384(b"\x01\x00\x00\x08:cloister.key:payload").digest()
    assert Event.runtime("cloister.key", b"payload").digest == digest


@pytest.mark.parametrize(
    "members",
    [
        {"event_payload": "00"},
        {"event": "cloister.workload.config"},
        {"digest": "00" * 48},
    ],
)
def test_a_runtime_event_that_says_other_than_was_extended_is_refused(members: dict[str, Any]) -> None:
    assert "digest" in reason(changed(5, **members))


def test_a_log_without_an_event_or_with_one_more_replays_to_something_else() -> None:
    whole = EventLog.parse(LOG)
    for number in range(len(whole.events)):
        less = EventLog(whole.events[:number] + whole.events[number + 1 :])
        assert less.replay() != whole.replay()
        twice = EventLog((*whole.events[: number + 1], *whole.events[number:]))
        assert twice.replay() != whole.replay()


@pytest.mark.parametrize(
    "members",
    [
        {"imr": 4},
        {"imr": -1},
        {"imr": True},
        {"imr": 1.0},
        {"imr": "1"},
        {"event_type": 2**32},
        {"event_type": -1},
        {"event_type": None},
        {"event_type": 3},  # EV_NO_ACTION
        {"event": 7},
        {"event": "x" * 129},
        {"event": "\u0000"},
        {"event": "\ud800"},
        {"digest": "00" * 47},
        {"digest": "00" * 49},
        {"digest": "AA" * 48},
        {"digest": " " + "00" * 47 + "0"},
        {"digest": ["00" * 48]},
        {"event_payload": "0"},
        {"event_payload": "00 00"},
        {"event_payload": "zz"},
        {"event_payload": 1},
        {"event_payload": "00" * (64 * 1024 + 1)},
        {"extra": 1},
    ],
)
def test_an_event_of_another_shape_is_refused(members: dict[str, Any]) -> None:
    assert "event 0" in reason(changed(0, **members))


def test_an_event_without_a_member_is_refused() -> None:
    for member in ("imr", "event_type", "digest", "event", "event_payload"):
        events = entries()
        del events[0][member]
        assert "exactly" in reason(json.dumps(events).encode())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"null",
        b"[1]",
        b"[[]]",
        b"\xef\xbb\xbf[]",
        b"\xff",
        b"[] []",
        b"[NaN]",
        b"[Infinity]",
        b"[" * 100_000,
        b'[{"a":' * 100_000,
        b"[1" + b"0" * 5000 + b"]",
        LOG.replace(b'{"imr":0,', b'{"imr":1,"imr":0,', 1),
        b" " * (1024 * 1024 + 1),
        b"[" + b"0," * MAX_EVENTS + b"0]",
    ],
)
def test_what_is_not_a_list_of_events_is_refused(data: bytes) -> None:
    assert reason(data)


def test_an_empty_log_is_a_log_of_nothing() -> None:
    assert EventLog.parse(b"[]").replay() == (bytes(48),) * 4


def test_runtime_events_live_in_register_3_under_plain_names() -> None:
    event = Event.runtime("a", b"")
    for number in (0, 1, 2):
        with pytest.raises(EventLogRejected, match="register"):
            Event(number, RUNTIME_EVENT_TYPE, "a", b"", event.digest)
    for name in ("", "A", "a b", "a:b", "a" * 65, "ä", "\ud800"):
        with pytest.raises(EventLogRejected, match="name"):
            Event.runtime(name, b"")


D = {name: sha384(name.encode()) for name in ("environment", "bundle", "script", "config", "manifest", "receipt")}
HEAD = [
    (w.ENVIRONMENT, D["environment"]),
    (w.TRUST_BUNDLE, D["bundle"]),
    (w.SCRIPT, D["script"]),
    (w.CONFIG, D["config"]),
]
A_RANK = (w.RANK, w.RankClaim("hospital-a", "job-7", 1, 2).to_payload())
A_BACKEND = (w.BACKEND, w.BackendClaim("hospital-a", "reviews", "0").to_payload())
A_DATASET = (w.DATASET, w.DatasetClaim("reviews", D["manifest"]).to_payload())
A_KEY = (w.KEY, w.KeyClaim("cloister-key://hospital-a/datasets/reviews", 3, D["receipt"]).to_payload())
Events = list[tuple[str, bytes]]


def sealed(role: str) -> tuple[str, bytes]:
    return (w.SEALED, role.encode())


def log_of(events: Events) -> EventLog:
    return EventLog(tuple(Event.runtime(name, payload) for name, payload in events))


def test_the_pinned_log_tells_of_a_rank() -> None:
    assert w.read_workload(EventLog.parse(LOG)) == w.Workload(
        role=Role.RANK,
        environment=D["environment"],
        trust_bundle=D["bundle"],
        script=D["script"],
        config=D["config"],
        rank=w.RankClaim("hospital-a", "job-7", 1, 2),
        backend=None,
        datasets=(D["manifest"],),
        dataset_names=("reviews",),
        keys_received=(w.KeyClaim("cloister-key://hospital-a/datasets/reviews", 3, D["receipt"]),),
    )


@pytest.mark.parametrize("role", ["attest", "keybroker", "trainer", "gateway"])
def test_a_service_is_head_and_seal(role: str) -> None:
    workload = w.read_workload(log_of([*HEAD, sealed(role)]))
    assert (workload.role, workload.rank, workload.backend) == (Role(role), None, None)
    assert (workload.datasets, workload.keys_received) == ((), ())


def test_a_backend_names_its_model() -> None:
    workload = w.read_workload(log_of([*HEAD, A_BACKEND, sealed("backend"), A_KEY, A_KEY]))
    assert workload.backend == w.BackendClaim("hospital-a", "reviews", "0")
    assert len(workload.keys_received) == 2


@pytest.mark.parametrize(
    "events",
    [
        [],
        HEAD,
        [*HEAD[1:], sealed("trainer")],
        [*HEAD[:3], sealed("trainer")],
        [HEAD[1], HEAD[0], *HEAD[2:], sealed("trainer")],
        [HEAD[0], *HEAD, sealed("trainer")],
        [*HEAD, HEAD[2], sealed("trainer")],
        [*HEAD, sealed("trainer"), sealed("trainer")],
        [*HEAD, sealed("trainer"), HEAD[2]],
        [*HEAD, sealed("trainer"), A_DATASET],
        [*HEAD, A_KEY, sealed("trainer")],
        [("system-ready", b""), *HEAD, sealed("trainer")],
        [*HEAD, sealed("trainer"), ("cloister.keys", b"")],
        [*HEAD, sealed("rank")],
        [*HEAD, sealed("backend")],
        [*HEAD, A_RANK, sealed("trainer")],
        [*HEAD, A_BACKEND, sealed("rank")],
        [*HEAD, A_RANK, A_BACKEND, sealed("rank")],
        [*HEAD, A_RANK, A_RANK, sealed("rank")],
        [*HEAD, A_DATASET, A_RANK, sealed("rank")],
        [*HEAD, A_RANK, A_DATASET, A_DATASET, sealed("rank")],
        [*HEAD, sealed("user")],
        [*HEAD, sealed("")],
        [*HEAD, sealed("Trainer")],
        [*HEAD, (w.SEALED, b"\xff")],
        [(w.ENVIRONMENT, bytes(47)), *HEAD[1:], sealed("trainer")],
        [*HEAD[:3], (w.CONFIG, D["config"].hex().encode()), sealed("trainer")],
    ],
)
def test_another_order_another_name_or_another_count_is_refused(events: Events) -> None:
    with pytest.raises(EventLogRejected):
        w.read_workload(log_of(events))


@pytest.mark.parametrize(
    "event",
    [
        (w.RANK, b""),
        (w.RANK, A_RANK[1] + b"\0"),
        (w.RANK, A_RANK[1][:-1]),
        (w.RANK, w.RankClaim("hospital-a", "job-7", 2, 2).to_payload()),
        (w.RANK, w.RankClaim("hospital-a", "job-7", 0, 0).to_payload()),
        (w.RANK, w.RankClaim("hospital-a", "job-7", 0, 65_536).to_payload()),
        (w.RANK, w.RankClaim("Hospital", "job-7", 0, 2).to_payload()),
        (w.RANK, w.RankClaim("hospital-a", "job/7", 0, 2).to_payload()),
        (w.RANK, tlv("cloister-rank-v1", "hospital-a", "job-7", b"\0", 2)),
        (w.RANK, tlv("cloister-rank-v2", "hospital-a", "job-7", 0, 2)),
    ],
)
def test_a_rank_that_cannot_be_is_refused(event: tuple[str, bytes]) -> None:
    with pytest.raises(EventLogRejected, match=r"cloister\.workload\.rank"):
        w.read_workload(log_of([*HEAD, event, sealed("rank")]))


@pytest.mark.parametrize(
    "event",
    [
        (w.DATASET, b""),
        (w.DATASET, w.DatasetClaim("", D["manifest"]).to_payload()),
        (w.DATASET, w.DatasetClaim("x" * 257, D["manifest"]).to_payload()),
        (w.DATASET, w.DatasetClaim("x", bytes(32)).to_payload()),
        (w.DATASET, tlv("cloister-dataset-v1", b"\xff", D["manifest"])),
    ],
)
def test_a_data_set_that_cannot_be_is_refused(event: tuple[str, bytes]) -> None:
    with pytest.raises(EventLogRejected, match="dataset"):
        w.read_workload(log_of([*HEAD, A_RANK, event, sealed("rank")]))


@pytest.mark.parametrize(
    "event",
    [
        (w.KEY, b""),
        (w.KEY, w.KeyClaim("cloister-key://", 1, D["receipt"]).to_payload()),
        (w.KEY, w.KeyClaim("cloister-key://a/b", 1, b"").to_payload()),
        (w.KEY, tlv("cloister-key-v1", b"\xff", 1, D["receipt"])),
        (w.KEY, tlv("cloister-key-v1", "cloister-key://a/b", b"1", D["receipt"])),
    ],
)
def test_a_key_that_cannot_be_is_refused(event: tuple[str, bytes]) -> None:
    with pytest.raises(EventLogRejected, match=r"cloister\.key"):
        w.read_workload(log_of([*HEAD, sealed("trainer"), event]))


def test_more_than_64_data_sets_are_refused() -> None:
    sets: Events = [(w.DATASET, w.DatasetClaim(f"d{n}", D["manifest"]).to_payload()) for n in range(65)]
    assert len(w.read_workload(log_of([*HEAD, A_RANK, *sets[:64], sealed("rank")])).datasets) == 64
    with pytest.raises(EventLogRejected, match="data sets"):
        w.read_workload(log_of([*HEAD, A_RANK, *sets, sealed("rank")]))


def test_a_boot_event_in_register_3_is_refused() -> None:
    log = log_of([*HEAD, sealed("trainer")])
    hidden = Event(3, 0x80000001, w.SCRIPT, b"", bytes(48))
    with pytest.raises(EventLogRejected, match="register 3"):
        w.read_workload(log.appended(hidden))
