# SPDX-License-Identifier: Apache-2.0
"""What a policy wants of an event log: each rule accepts its log, and refuses the neighbours of it."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.appraisal.events import check_events
from cloister.appraisal.policy import parse_td_policy
from cloister.errors import CloisterError, Code
from cloister.tdx.bootevents import EVENT_TYPES, MAX_NAME, event_name, type_name
from cloister.tdx.check import Check
from cloister.tdx.eventlog import Event, EventLog, EventLogRejected
from cloister.tlv import sha384

HEAD = "apiVersion: cloister.dev/v1\nkind: AppraisalPolicy\nmetadata: {name: test, version: 1}\n"
GLOBAL = bytes.fromhex("61dfe48bca93d211aa0d00e098032b8c")  # EFI_GLOBAL_VARIABLE
KERNEL, OTHER_KERNEL = sha384(b"kernel"), sha384(b"another kernel")


def variable(name: str, value: bytes) -> bytes:
    """UEFI_VARIABLE_DATA."""
    return GLOBAL + struct.pack("<QQ", len(name), len(value)) + name.encode("utf-16-le") + value


def boot(register: int, kind: str, data: bytes, digest: bytes | None = None, name: str = "") -> Event:
    return Event(register, EVENT_TYPES[kind], name, data, sha384(data) if digest is None else digest)


SECURE_BOOT = boot(0, "EV_EFI_VARIABLE_DRIVER_CONFIG", variable("SecureBoot", b"\1"))
NO_SECURE_BOOT = boot(0, "EV_EFI_VARIABLE_DRIVER_CONFIG", variable("SecureBoot", b"\0"))
SEPARATOR = boot(0, "EV_SEPARATOR", bytes(4))
CALLING = boot(1, "EV_EFI_ACTION", b"Calling EFI Application from Boot Option")
APPLICATION = boot(1, "EV_EFI_BOOT_SERVICES_APPLICATION", b"where it lay", KERNEL)
OTHER_APPLICATION = boot(1, "EV_EFI_BOOT_SERVICES_APPLICATION", b"where it lay", OTHER_KERNEL)
LEAVING = boot(1, "EV_EFI_ACTION", b"Exit Boot Services Invocation")
COMMAND = boot(2, "EV_IPL", b"grub_cmd: set timeout=0\0", sha384(b"set timeout=0"))
INITRD = boot(2, "EV_EVENT_TAG", struct.pack("<II", 0x8F3B22EC, 13) + b"Linux initrd\0", sha384(b"initrd"))
SCRIPT = Event.runtime("cloister.workload.script", b"\x13" * 48)
LOG = (SECURE_BOOT, SEPARATOR, CALLING, APPLICATION, LEAVING, COMMAND, INITRD, SCRIPT)


def checked(rules: str, *events: Event) -> list[Check]:
    text = f"{HEAD}spec:\n  tcb: {{status: [UpToDate]}}\n  event_log: {rules}\n"
    policy = parse_td_policy(text.encode())
    assert policy.events is not None
    return list(check_events(EventLog(events), policy.events))


def failed(rules: str, *events: Event) -> list[str]:
    checks = checked(rules, *events)
    assert checks
    return [check.name for check in checks if not check.ok]


def without(*events: Event) -> tuple[Event, ...]:
    return tuple(event for event in LOG if event not in events)


def swapped(one: Event, other: Event) -> tuple[Event, ...]:
    return tuple(other if event is one else event for event in LOG)


BY_TYPE_AND_NAME = "{required: [{register: rtmr0, type: EV_EFI_VARIABLE_DRIVER_CONFIG, name: SecureBoot}]}"
BY_DIGEST = f'{{required: [{{register: rtmr1, type: EV_EFI_BOOT_SERVICES_APPLICATION, digests: ["{KERNEL.hex()}"]}}]}}'
VALUE = (
    "{required: [{register: rtmr0, type: EV_EFI_VARIABLE_DRIVER_CONFIG, name: SecureBoot, "
    f'digests: ["{SECURE_BOOT.digest.hex()}"]}}]}}'
)


@pytest.mark.parametrize(
    ("rules", "refused"),
    [
        (BY_TYPE_AND_NAME, without(SECURE_BOOT)),
        (BY_TYPE_AND_NAME, swapped(SECURE_BOOT, boot(0, "EV_EFI_VARIABLE_BOOT", variable("SecureBoot", b"\1")))),
        (
            BY_TYPE_AND_NAME,
            swapped(SECURE_BOOT, boot(0, "EV_EFI_VARIABLE_DRIVER_CONFIG", variable("SecureBoo", b"\1"))),
        ),
        (
            BY_TYPE_AND_NAME,
            swapped(SECURE_BOOT, boot(1, "EV_EFI_VARIABLE_DRIVER_CONFIG", variable("SecureBoot", b"\1"))),
        ),
        (VALUE, swapped(SECURE_BOOT, NO_SECURE_BOOT)),
        (VALUE, (*LOG, NO_SECURE_BOOT)),
        (VALUE, (NO_SECURE_BOOT, *LOG)),
        (BY_DIGEST, without(APPLICATION)),
        (BY_DIGEST, swapped(APPLICATION, OTHER_APPLICATION)),
        (BY_DIGEST, (*LOG, OTHER_APPLICATION)),
        ("{required: [{register: rtmr2}]}", without(COMMAND, INITRD)),
        ("{required: [{register: rtmr2, name: Linux initrd}]}", without(INITRD)),
        ('{required: [{register: rtmr2, type: EV_IPL, name: "grub_cmd: set timeout=0"}]}', without(COMMAND)),
        ("{required: [{register: rtmr3, type: runtime, name: cloister.workload.script}]}", without(SCRIPT)),
        ('{required: [{register: rtmr1, type: "0x80000007"}]}', without(CALLING, LEAVING)),
    ],
)
def test_a_required_event_is_there_and_no_other_stands_in_for_it(rules: str, refused: tuple[Event, ...]) -> None:
    assert failed(rules, *LOG) == []
    assert failed(rules, *refused) == ["event-log.required[0]"]


@pytest.mark.parametrize(
    ("rules", "refused"),
    [
        ('{forbidden: [{register: rtmr2, type: EV_IPL, name: "grub_cmd: insmod"}]}', b"grub_cmd: insmod"),
        (f'{{forbidden: [{{register: rtmr2, digests: ["{OTHER_KERNEL.hex()}"]}}]}}', b"harmless"),
    ],
)
def test_a_forbidden_event_is_not_there(rules: str, refused: bytes) -> None:
    assert failed(rules, *LOG) == []
    assert failed(rules, *LOG, boot(2, "EV_IPL", refused, OTHER_KERNEL)) == ["event-log.forbidden[0]"]
    assert failed(rules, *LOG, boot(1, "EV_IPL", refused, OTHER_KERNEL)) == []  # another register


def test_of_a_forbidden_kind_of_event_there_is_none_at_all() -> None:
    assert failed("{forbidden: [{register: rtmr0}]}", CALLING) == []
    assert failed("{forbidden: [{register: rtmr0}]}", CALLING, SEPARATOR) == ["event-log.forbidden[0]"]


ORDERED = (
    "{required: [{register: rtmr1, name: Calling EFI Application from Boot Option}, "
    "{register: rtmr0, type: EV_SEPARATOR}, "
    "{register: rtmr1, type: EV_EFI_BOOT_SERVICES_APPLICATION}, "
    "{register: rtmr1, name: Exit Boot Services Invocation}], order: %s}"
)


def test_required_events_of_a_register_come_in_the_order_of_the_policy() -> None:
    ordered = ORDERED % "as-listed"
    assert failed(ordered, *LOG) == []
    assert failed(ordered, *reversed(LOG)) == ["event-log.order"]
    late = (CALLING, SEPARATOR, LEAVING, APPLICATION)
    assert failed(ordered, *late) == ["event-log.order"]
    assert failed(ordered, CALLING, APPLICATION, LEAVING, OTHER_APPLICATION, SEPARATOR) == ["event-log.order"]
    # Registers have no order among each other.
    assert failed(ordered, SEPARATOR, CALLING, APPLICATION, LEAVING) == []
    assert failed(ORDERED % "any", *late) == []


def test_what_is_not_there_is_not_also_out_of_order() -> None:
    assert failed(ORDERED % "as-listed", *without(APPLICATION)) == ["event-log.required[2]"]


def test_a_closed_register_holds_required_events_and_no_others() -> None:
    both = f'["{SECURE_BOOT.digest.hex()}", "{SEPARATOR.digest.hex()}"]'
    rules = f"{{required: [{{register: rtmr0, digests: {both}}}], closed: [rtmr0]}}"
    assert failed(rules, *LOG) == []
    stranger = boot(0, "EV_NONHOST_INFO", b"", sha384(b"something else"))
    assert set(failed(rules, *LOG, stranger)) == {"event-log.required[0]", "event-log.closed.rtmr0"}
    assert failed(rules, *LOG, boot(1, "EV_NONHOST_INFO", b"", sha384(b"something else"))) == []


def test_an_event_under_a_false_name_does_not_slip_into_a_closed_register() -> None:
    rule = (
        f'{{register: rtmr1, type: EV_EFI_BOOT_SERVICES_APPLICATION, digests: ["{KERNEL.hex()}"]}}, '
        f'{{register: rtmr1, type: EV_EFI_ACTION, digests: ["{CALLING.digest.hex()}", "{LEAVING.digest.hex()}"]}}'
    )
    disguised = boot(1, "EV_NONHOST_INFO", b"", OTHER_KERNEL)
    assert failed(f"{{required: [{rule}]}}", *LOG, disguised) == []  # the weakness of a register that is open
    assert failed(f"{{required: [{rule}], closed: [rtmr1]}}", *LOG) == []
    assert failed(f"{{required: [{rule}], closed: [rtmr1]}}", *LOG, disguised) == ["event-log.closed.rtmr1"]


def test_each_check_says_what_was_wanted_and_what_was_there() -> None:
    (check,) = checked(VALUE, *swapped(SECURE_BOOT, NO_SECURE_BOOT))
    assert check.wanted == (
        f"EV_EFI_VARIABLE_DRIVER_CONFIG in rtmr0 named 'SecureBoot' with the digest {SECURE_BOOT.digest.hex()}"
    )
    assert check.got == f"1 with another digest, the first {NO_SECURE_BOOT.digest.hex()}"
    assert [check.got for check in checked("{required: [{register: rtmr0}]}", *LOG)] == ["2 such events"]
    assert [check.got for check in checked("{required: [{register: rtmr0}]}")] == ["none"]


@pytest.mark.parametrize(
    ("rules", "place"),
    [
        ("{}", "spec.event_log.required"),
        ("{order: any}", "spec.event_log.required"),
        ("{required: []}", "spec.event_log.required"),
        ("{required: [{}]}", "spec.event_log.required[0].register"),
        ("{required: [rtmr0]}", "spec.event_log.required[0]"),
        ("{required: [{register: rtmr4}]}", "spec.event_log.required[0].register"),
        ("{required: [{register: rtmr0, type: EV_NO_ACTION}]}", "spec.event_log.required[0].type"),
        ("{required: [{register: rtmr0, type: '0x4'}]}", "spec.event_log.required[0].type"),
        ("{required: [{register: rtmr0, name: ''}]}", "spec.event_log.required[0].name"),
        (f"{{required: [{{register: rtmr0, name: {'n' * 129}}}]}}", "spec.event_log.required[0].name"),
        ("{required: [{register: rtmr0, digests: []}]}", "spec.event_log.required[0].digests"),
        (
            f'{{required: [{{register: rtmr0, digests: ["sha384:{"00" * 48}"]}}]}}',
            "spec.event_log.required[0].digests[0]",
        ),
        ("{required: [{register: rtmr0, digest: x}]}", "spec.event_log.required[0].digest"),
        ("{required: [{register: rtmr0}], order: yes}", "spec.event_log.order"),
        ("{required: [{register: rtmr0}], allowed: []}", "spec.event_log.allowed"),
        ("{required: [{register: rtmr0}], closed: [rtmr0]}", "spec.event_log.closed"),
        ("{required: [{register: rtmr0}], closed: [rtmr1]}", "spec.event_log.closed"),
        ("{required: [{register: rtmr3}], closed: [rtmr3]}", "spec.event_log.closed[0]"),
        ("{forbidden: [{register: rtmr0}], closed: []}", "spec.event_log.closed"),
        (f"{{required: [{', '.join('{register: rtmr0}' for _ in range(65))}]}}", "spec.event_log.required"),
    ],
)
def test_what_is_not_allowed_is_an_error_with_its_place(rules: str, place: str) -> None:
    with pytest.raises(CloisterError) as caught:
        checked(rules)
    assert caught.value.code is Code.POLICY_INVALID
    assert caught.value.what.startswith(f"{place} (line ")


def test_events_are_called_what_their_data_calls_them() -> None:
    assert [event_name(event) for event in LOG] == [
        "SecureBoot",
        "",
        "Calling EFI Application from Boot Option",
        "",
        "Exit Boot Services Invocation",
        "grub_cmd: set timeout=0",
        "Linux initrd",
        "cloister.workload.script",
    ]
    assert type_name(SECURE_BOOT.event_type) == "EV_EFI_VARIABLE_DRIVER_CONFIG"
    assert type_name(0x2A) == "0x0000002a"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        GLOBAL,
        variable("SecureBoot", b"\1")[:40],
        GLOBAL + struct.pack("<QQ", 2**63, 0) + b"S\0",
        GLOBAL + struct.pack("<QQ", 1, 0) + b"\0\xd8",
        variable("Ünicode", b""),
        variable("n" * (MAX_NAME + 1), b""),
        variable("new\nline", b""),
    ],
)
def test_data_that_is_no_variable_has_no_name(data: bytes) -> None:
    assert event_name(boot(0, "EV_EFI_VARIABLE_BOOT", data)) == ""


@given(st.sampled_from(sorted(EVENT_TYPES.values())), st.binary(max_size=300))
def test_whatever_the_data_is_a_name_is_short_and_printable(kind: int, data: bytes) -> None:
    if kind == EVENT_TYPES["runtime"]:
        return
    name = event_name(Event(0, kind, "", data, sha384(data)))
    assert len(name) <= MAX_NAME
    assert name == "" or (name.isascii() and name.isprintable())


@pytest.mark.parametrize("kind", ["EV_SEPARATOR", "EV_EFI_VARIABLE_DRIVER_CONFIG", "EV_EFI_ACTION", "EV_EFI_GPT_EVENT"])
def test_data_that_a_digest_covers_cannot_be_another(kind: str) -> None:
    with pytest.raises(EventLogRejected):
        boot(0, kind, b"what is shown", sha384(b"what was measured"))
    boot(0, kind, b"", sha384(b"what was measured"))  # left out, and so nameless
    boot(0, "EV_EFI_BOOT_SERVICES_APPLICATION", b"what is shown", sha384(b"what was measured"))
