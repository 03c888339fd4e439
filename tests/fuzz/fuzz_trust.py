# SPDX-License-Identifier: Apache-2.0
"""Fuzz trust updates: any bytes are refused with the one error, or are the genuine update. Run: python FILE"""

from __future__ import annotations

import sys
from datetime import UTC, datetime

import atheris

with atheris.instrument_imports(include=["cloister.runtime.trust", "cloister.runtime.bundle", "cloister.strictjson"]):
    from cloister.errors import CloisterError, Code
    from cloister.runtime.trust import Trust, _parse, adopt, sign_update
    from cloister.strictjson import StrictJsonError
    from cloister_attest.epochs import Epochs

_EPOCHS = Epochs.begin("cloister.test", now=datetime(2026, 1, 1, tzinfo=UTC))
_HELD = Trust.of(_EPOCHS.bundle)
_GENUINE = Trust(_EPOCHS.bundle, _EPOCHS.sequence(1))
_UPDATE = sign_update(_GENUINE, [_EPOCHS.issuing.root])


def one_input(data: bytes) -> None:
    """Feed bytes as they are, bytes written into a genuine update, and bytes as a payload that was signed."""
    place = int.from_bytes(data[:2], "big") % len(_UPDATE)
    for update in (data, _UPDATE[:place] + data[2:] + _UPDATE[place + len(data[2:]) :]):
        try:
            found = adopt(_HELD, update)
        except CloisterError as error:
            if error.code is not Code.BUNDLE_INVALID:
                raise
        else:
            if found != _GENUINE:
                raise AssertionError("an edited update was believed")
    try:
        _parse(data)
    except (CloisterError, StrictJsonError, ValueError):
        return


if __name__ == "__main__":
    one_input(b"")
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
