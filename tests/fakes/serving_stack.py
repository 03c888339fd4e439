# SPDX-License-Identifier: Apache-2.0
"""Platform, attest, keybroker and gateway as the processes they are, a user, and a small sealed model."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cloister.api.serving.v1 import serving_pb2, serving_pb2_grpc
from cloister.cli import stackconfig
from cloister.cli.login import ensure_certificate, make_user_key, spki_sha256
from cloister.cli.policyfile import PolicyDraft
from cloister.cli.stackconfig import PACKAGES, Places, StackOptions
from cloister.cli.state import StateDirectory
from cloister.data.archive import build_archive
from cloister.guest.measure import digest_of_package
from cloister.guest.ownerkeys import OwnerKeyClient
from cloister.identity import Role
from cloister.runtime.channel import invoke, open_channel
from cloister.runtime.credentials import FileCredentials
from cloister.runtime.endpoints import read_endpoints
from cloister.sealed.directory import SealedDirectoryWriter
from cloister.tlv import sha384
from fakes.signing import OWNER_KEY

HANDLER = Path(__file__).parents[2] / "services/serving/cloister_serving/handlers/text_classifier.py"
KEY_URI = "cloister-key://demo/models/reviews"
_START_S = 60


@dataclass
class Stack:
    """Running processes and what a user of them holds."""

    state: StateDirectory
    options: StackOptions
    places: Places
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    endpoints: dict[str, dict[str, str]] = field(default_factory=dict)

    async def start(self) -> None:
        """Start everything but the gateway."""
        self.state.create()
        key = make_user_key(self.state)
        socket = self.places.platform_socket
        self._spawn("platform", "cloister_sim", "--directory", str(self.state.platform), "--socket", str(socket))
        await self._until(lambda: socket.exists(), "platform")
        digest_of_package.cache_clear()  # the services measure what is there when they start
        digests = {service: f"sha384:{digest_of_package(package).hex()}" for service, package in PACKAGES.items()}
        attest = stackconfig.attest_config(
            self.places, self.options, digests=digests, user_spki_sha256=spki_sha256(key)
        )
        await self._service("attest", attest)
        root_key = self.state.root / "root.key"
        command = [sys.executable, "-m", "cloister_keybroker", "init", "--root-key-file", str(root_key)]
        command += ["--state-dir", str(self.state.service_directory("keybroker"))]
        subprocess.run(command, check=True, capture_output=True)
        enrolment = self.endpoints["attest"]["enrolment"]
        broker = stackconfig.keybroker_config(
            self.places, self.options, attest_enrolment=enrolment, root_key=root_key, backends=["embedded:"]
        )
        await self._service("keybroker", broker)
        await ensure_certificate(self.state, enrolment=enrolment)

    async def start_gateway(self) -> None:
        broker = self.endpoints["keybroker"]["grpc"]
        config = stackconfig.gateway_config(
            self.places, self.options, attest=self.endpoints["attest"], keybroker=broker
        )
        await self._service("gateway", config)

    async def create_key(
        self, handler: bytes, *, purposes: tuple[str, ...] = ("serve",), uri: str = KEY_URI, lease: str = "1h"
    ) -> None:
        """Create a key that is released to backends of this handler."""
        policy = PolicyDraft(
            name="serve",
            owner=self.options.user_id,
            key_uri=uri,
            purposes=purposes,
            scripts=[f"sha384:{sha384(handler).hex()}"],
            identities=[f"spiffe://{self.options.trust_domain}/ns/demo/model/*/backend/*"],
            simulated=True,
            lease=lease,
        )
        await self.owner.create_key(uri, purposes=list(purposes), policy=policy.to_yaml().encode())

    @property
    def owner(self) -> OwnerKeyClient:
        return OwnerKeyClient(self.credentials, self.endpoints["keybroker"]["grpc"], signing_key=OWNER_KEY)

    @property
    def credentials(self) -> FileCredentials:
        return FileCredentials(self.state.user_key, self.state.user_chain, self.state.bundle)

    async def sealed_archive(
        self, files: dict[str, bytes], handler: bytes, *, uri: str = KEY_URI
    ) -> tuple[bytes, bytes]:
        """Seal a model under a new data key; return the archive and the data key in the clear."""
        data_key = await self.owner.generate_data_key(uri)
        with tempfile.TemporaryDirectory() as scratch:
            writer = SealedDirectoryWriter(Path(scratch) / "sealed", data_key=data_key, dataset="model")
            for name, content in files.items():
                writer.add(name, content)
            writer.finish()
            out = Path(scratch) / "model.mar"
            build_archive(Path(scratch) / "sealed", out, handler_source=handler)
            return out.read_bytes(), data_key.secret.reveal()

    async def call(self, service: str, method: str, request: Any, *, timeout_s: float = 90) -> Any:
        stub = getattr(serving_pb2_grpc, f"{service}Stub")
        endpoint = self.endpoints["gateway"]["grpc"]
        async with open_channel(endpoint, role=Role.GATEWAY, credentials=self.credentials) as channel:
            return await invoke(getattr(stub(channel), method), request, timeout_s=timeout_s, what="ask the gateway")

    async def deploy(self, archive: bytes, name: str = "reviews") -> serving_pb2.Model:
        async def chunks() -> AsyncIterator[serving_pb2.UploadArchiveRequest]:
            for start in range(0, len(archive), 1 << 20):
                yield serving_pb2.UploadArchiveRequest(chunk=archive[start : start + (1 << 20)])

        uploaded = await self.call("ModelService", "UploadArchive", chunks())
        request = serving_pb2.DeployModelRequest(name=name, archive_digest=uploaded.archive_digest)
        model: serving_pb2.Model = (await self.call("ModelService", "DeployModel", request)).model
        return model

    async def predict(self, *texts: str, name: str = "reviews") -> serving_pb2.PredictResponse:
        request = serving_pb2.PredictRequest(model=name, texts=texts)
        answer: serving_pb2.PredictResponse = await self.call("InferenceService", "Predict", request)
        return answer

    def stop(self, name: str, number: int = signal.SIGTERM) -> None:
        process = self.processes.pop(name)
        process.send_signal(number)
        process.wait(30)

    def log(self, name: str) -> str:
        return self.state.log_file(name).read_text(errors="replace")

    async def _service(self, name: str, config: str) -> None:
        path = self.state.config_file(name)
        path.write_text(config)
        self.state.service_directory(name).mkdir(mode=0o700, exist_ok=True)
        endpoints = self.state.endpoints_file(name)
        endpoints.unlink(missing_ok=True)
        self._spawn(name, PACKAGES[name], "--config", str(path))
        await self._until(endpoints.exists, name)
        self.endpoints[name] = read_endpoints(endpoints)

    def _spawn(self, name: str, module: str, *arguments: str) -> None:
        with self.state.log_file(name).open("ab") as log:
            command = [sys.executable, "-m", module, *arguments]
            self.processes[name] = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    async def _until(self, ready: Any, name: str) -> None:
        deadline = time.monotonic() + _START_S
        while not ready():
            if self.processes[name].poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"{name} did not start:\n{self.log(name)[-3000:]}")
            await asyncio.sleep(0.02)


def tiny_model() -> dict[str, bytes]:
    """The files of an untrained classifier of two labels."""
    import safetensors.torch
    from transformers import BertConfig

    from cloister.train import classifier

    vocabulary = [*classifier.SPECIAL_TOKENS, *"这家酒店很好坏", "good", "bad"]
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    encoder = classifier.TextEncoder(vocabulary, classifier.Preprocessing(max_length=32))
    model = classifier.TextClassifier(classifier.new_encoder(config, attention="sdpa"), 2)
    made = classifier.classifier_files(model, encoder, ["negative", "positive"])
    return {
        name: content if isinstance(content, bytes) else safetensors.torch.save(dict(content))
        for name, content in made.items()
    }


@contextlib.asynccontextmanager
async def running_stack(directory: Path) -> AsyncIterator[Stack]:
    """Attest and keybroker on a simulated platform; the gateway is started by the test."""
    with _short_directory() as short:
        state = StateDirectory(directory)
        stack = Stack(state, StackOptions(), Places(state, short / "platform.sock"))
        try:
            await stack.start()
            yield stack
        finally:
            for name in reversed(list(stack.processes)):
                stack.stop(name)


@contextlib.contextmanager
def _short_directory() -> Iterator[Path]:
    # The address of a Unix socket has 107 bytes.
    with tempfile.TemporaryDirectory(prefix="cl-") as name:
        yield Path(name)
