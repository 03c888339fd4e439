# SPDX-License-Identifier: Apache-2.0
"""Wire messages to values and back, for all services of the broker."""

from __future__ import annotations

from typing import Final

from cloister.api.keybroker.v1 import keybroker_pb2 as pb
from cloister.release.keys import KeyState, Purpose
from cloister_keybroker.answers import DataKeyAnswer, Receipt, argument_error
from cloister_keybroker.keys import KeyRecord

PACKAGE: Final = "cloister.api.keybroker.v1"
MAX_PAGE: Final = 1000

_PURPOSES: Final = {
    pb.PURPOSE_TRAIN: Purpose.TRAIN,
    pb.PURPOSE_SERVE: Purpose.SERVE,
    pb.PURPOSE_EVALUATE: Purpose.EVALUATE,
    pb.PURPOSE_EXPORT: Purpose.EXPORT,
}
_WIRE_PURPOSES: Final = {purpose: wire for wire, purpose in _PURPOSES.items()}
_WIRE_STATES: Final = {
    KeyState.ENABLED: pb.KEY_STATE_ENABLED,
    KeyState.DISABLED: pb.KEY_STATE_DISABLED,
    KeyState.DESTRUCTION_SCHEDULED: pb.KEY_STATE_DESTRUCTION_SCHEDULED,
    KeyState.DESTROYED: pb.KEY_STATE_DESTROYED,
}


def purpose(wire: int) -> Purpose:
    """Read a purpose; raise ARGUMENT_INVALID for a number that names none."""
    found = _PURPOSES.get(wire)  # type: ignore[call-overload]  # an unknown number is just an int
    if not isinstance(found, Purpose):
        raise argument_error("purpose", f"{wire}", "one of: " + ", ".join(purpose.value for purpose in Purpose))
    return found


def wire_purpose(purpose: Purpose) -> pb.Purpose.ValueType:
    """Write a purpose."""
    return _WIRE_PURPOSES[purpose]


def page(asked: int, default: int, name: str) -> int:
    """Return how many items to answer with; raise ARGUMENT_INVALID when that is too many."""
    if asked > MAX_PAGE:
        raise argument_error(name, f"{asked}", f"at most {MAX_PAGE}")
    return asked or default


def key(record: KeyRecord, *, backend: str) -> pb.Key:
    """Write a key; `backend` is where its newest version is, empty when it is destroyed."""
    return pb.Key(
        uri=str(record.uri),
        version=record.newest,
        state=_WIRE_STATES[record.state],
        purposes=sorted(_WIRE_PURPOSES[purpose] for purpose in record.purposes),
        owner=record.owner,
        created_unix_ms=record.created_ms,
        policy_version=record.policy_version,
        policy_digest=record.policy_digest,
        min_version=record.min_version,
        destroy_at_unix_ms=record.destroy_at_ms,
        signer=record.signer,
        policy_withdrawn=record.policy_withdrawn,
        backend=backend,
        imported=record.imported,
    )


def data_key(answer: DataKeyAnswer) -> pb.SealedDataKey:
    """Write a data key on its way."""
    return pb.SealedDataKey(
        sealed=answer.sealed,
        wrapped=answer.wrapped,
        key_uri=answer.binding.key_uri,
        key_version=answer.binding.key_version,
    )


def receipt(receipt: Receipt) -> pb.Receipt:
    """Write a receipt."""
    return pb.Receipt(
        signature=receipt.signature,
        log_id=receipt.log_id,
        index=receipt.place.index,
        root=receipt.place.root,
        receipt_spki_der=receipt.receipt_spki_der,
    )
