# SPDX-License-Identifier: Apache-2.0
"""TorchServe handler for sealed text classifiers.

It gets the model's data key from the agent that started this process, opens the model in memory, and answers
{"texts": [...]} with one {"label", "probability"} for each. Opened weights never become a file, and neither key nor
texts are printed. This file is packed into the archive as it stands: it uses the library, and no service.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cloister.data.tensors import load_tensors
from cloister.runtime.process import harden
from cloister.sealed.datakey import DataKey
from cloister.sealed.directory import SealedDirectory
from cloister.secret import SecretBytes
from cloister.tlv import parse_tlv
from cloister.train.classifier import WEIGHTS, load_classifier

# Texts that go through the model together: enough to fill a core, few enough that short ones are not padded much.
_TEXTS_PER_PASS = 32
_KEY_TIMEOUT_S = 10.0
_PACKET_SIZE = 16 * 1024


class TextClassifierHandler:
    """What the worker calls: `initialize` once, `handle` for every batch."""

    def initialize(self, context: Any) -> None:
        """Open the model; any failure ends the worker, and its agent reports the last line."""
        harden()
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        data_key, manifest_digest = _receive_key()
        sealed = SealedDirectory.open(
            Path(context.system_properties["model_dir"]), data_key=data_key, manifest_digest=manifest_digest
        )
        texts = {name: sealed.read(name) for name in sealed.files if name != WEIGHTS}
        weights = {WEIGHTS: load_tensors(sealed, WEIGHTS)} if WEIGHTS in sealed.files else {}
        self._predictor = load_classifier({**texts, **weights})
        # The first pass allocates and plans; no user should wait for that.
        self._predictor.predict(["."])

    def handle(self, data: Sequence[Mapping[str, bytes]], _context: Any) -> list[str]:
        """Answer a batch: one JSON text for each request."""
        return [self._answer(json.loads(bytes(request["body"]))["texts"]) for request in data]

    def _answer(self, texts: list[str]) -> str:
        found: list[dict[str, str | float]] = [{}] * len(texts)
        by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(texts), _TEXTS_PER_PASS):
            places = by_length[start : start + _TEXTS_PER_PASS]
            for place, (label, probability) in zip(
                places, self._predictor.predict([texts[i] for i in places]), strict=True
            ):
                found[place] = {"label": label, "probability": probability}
        return json.dumps(found, ensure_ascii=False)


def _receive_key() -> tuple[DataKey, bytes]:
    """Return the model's data key and the digest of the manifest that was measured."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as agent:
        agent.settimeout(_KEY_TIMEOUT_S)
        agent.connect(os.environ["CLOISTER_KEY_SOCKET"])
        packet = agent.recv(_PACKET_SIZE)
    try:
        secret, wrapped, key_uri, version, manifest = parse_tlv(packet, label="cloister-model-key-v1", fields=5)
    except ValueError:
        raise RuntimeError("the agent did not give this process the model's key") from None
    return DataKey(SecretBytes(secret), wrapped, key_uri.decode(), int.from_bytes(version, "big")), manifest
