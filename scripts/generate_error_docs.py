# SPDX-License-Identifier: Apache-2.0
"""Write docs/errors.md from `cloister.errors.Code`, or say whether it is up to date: `--check`."""

from __future__ import annotations

import sys
from pathlib import Path

from cloister.errors import EXIT_CODE, GRPC_STATUS, Code

TARGET = Path(__file__).resolve().parent.parent / "docs" / "errors.md"

_CTRL_C = 130

ROOMS = {
    10: "Configuration, command line, files",
    11: "Transport and identity",
    12: "Attestation",
    13: "Keys",
    14: "Sealed files",
    15: "Training",
    16: "Serving",
}

HEAD = """\
# Errors

Generated from `lib/cloister/errors.py` by `scripts/generate_error_docs.py`; do not edit.

Every error that a person or a program sees has a stable code, one line *what* happened, one *why*, and one *what to
do*. On the wire it is a `google.rpc.Status` whose `ErrorInfo` has the code as `reason` and `cloister.dev` as `domain`;
the command line ends with the exit code of the same row, except that Ctrl-C ends it with 130. A number is never reused.
"""


def render() -> str:
    """Return the document: one table a room, in order of number."""
    parts = [HEAD]
    codes = sorted(Code, key=lambda code: code.value.number)
    for room in sorted({code.value.number // 100 for code in codes}):
        parts.append(f"\n## {ROOMS[room]}\n\n| code | name | meaning | gRPC status | exit |\n|---|---|---|---|---|\n")
        for code in codes:
            if code.value.number // 100 == room:
                status, exit_code = GRPC_STATUS[code.kind], EXIT_CODE[code.kind]
                exit_code = _CTRL_C if code is Code.INTERRUPTED else exit_code
                parts.append(f"| {code.text} | `{code.name}` | {code.value.summary} | {status} | {exit_code} |\n")
    return "".join(parts)


def main(arguments: list[str]) -> int:
    if arguments == ["--check"]:
        if TARGET.exists() and TARGET.read_text(encoding="utf-8") == render():
            return 0
        print(f"{TARGET} is not what the codes say: run python scripts/generate_error_docs.py", file=sys.stderr)
        return 1
    TARGET.write_text(render(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
