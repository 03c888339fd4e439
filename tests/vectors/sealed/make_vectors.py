# SPDX-License-Identifier: Apache-2.0
"""Make the vectors of this directory: `PYTHONPATH=tests python tests/vectors/sealed/make_vectors.py`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from cloister.sealed.format import AssociatedData, Header
from cloister.sealed.stream import SealedWriter
from fakes.sealed_material import content, data_key

HERE = Path(__file__).parent
FILES = [("empty", 0, 64), ("one", 1, 65536), ("full-first", 200, 256), ("edge", 440, 256), ("many", 3000, 256)]


def main() -> None:
    """Write everything."""
    listed = []
    for name, length, segment_size in FILES:
        file, path = f"{name}.sealed", f"sub/{name}.tsv"
        about = AssociatedData("vectors", path)
        with SealedWriter(
            HERE / file, data_key=data_key("vector"), associated=about, segment_size=segment_size
        ) as sealed:
            sealed.write(content(length, salt="vector"))
        listed.append({"file": file, "path": path, "length": length, "segment_size": segment_size})
    (HERE / "vectors.json").write_text(json.dumps(listed, indent=1) + "\n")
    header = Header.make(data_key(), AssociatedData("reviews", "train.tsv"), segment_size=65536)
    about = AssociatedData("reviews", "sub/训练.tsv", 1, bytes(range(16)))
    pinned = replace(header, associated=about, commitment=bytes(32), padding=3).to_bytes().hex()
    lines = [pinned[at : at + 100] for at in range(0, len(pinned), 100)]
    (HERE / "header.hex").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
