# SPDX-License-Identifier: Apache-2.0
"""Archives as a stranger could make them, and small sealed files to put into them."""

from __future__ import annotations

import io
import json
import secrets
import zipfile
from collections.abc import Mapping

from cloister.sealed.datakey import DataKey
from cloister.sealed.format import AssociatedData
from cloister.sealed.stream import SealedWriter
from cloister.secret import SecretBytes

HANDLER = b"class Handler:\n    pass\n"
MANIFEST = {"runtime": "python", "model": {"modelName": "m", "handler": "h.py", "modelVersion": "1.0"}}


def data_key(uri: str = "cloister-key://hospital-a/models/reviews") -> DataKey:
    """A key that no broker knows."""
    return DataKey(SecretBytes(secrets.token_bytes(32)), b"wrapped by nobody", uri, 1)


def sealed_bytes(path: str, content: bytes = b"weights", key: DataKey | None = None) -> bytes:
    """One sealed file."""
    target = io.BytesIO()
    writer = SealedWriter(
        target, data_key=key or data_key(), associated=AssociatedData("reviews", path), segment_size=4096
    )
    writer.write(content)
    writer.close()
    return target.getvalue()


def good_entries() -> dict[str, bytes]:
    """What an archive must hold."""
    return {
        "MAR-INF/MANIFEST.json": json.dumps(MANIFEST).encode(),
        "h.py": HANDLER,
        "model/cloister-manifest.json": b"{}",
        "model/model.safetensors.sealed": sealed_bytes("model.safetensors"),
    }


def packed(entries: Mapping[str, bytes], *, method: int = zipfile.ZIP_STORED) -> io.BytesIO:
    """A zip file of these entries."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(zipfile.ZipInfo(name), content, compress_type=method)
    return target
