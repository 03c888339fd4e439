# SPDX-License-Identifier: Apache-2.0
"""A small PCCS: real HTTPS, version 4 paths and headers, and the quirks of Intel's own (hexadecimal CRLs, HTML 404s).

It serves whatever it was given, expired or not, as PCCS do, and lies on request:

    async with FakePccs() as pccs:
        pccs.serve(family, authority.collateral(family))
        pccs.lie(DocumentKind.TCB_INFO, lies.status(429, retry_after="120"))
"""

from __future__ import annotations

import asyncio
import json
import ssl
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Self
from urllib.parse import quote

from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from multidict import CIMultiDict

from cloister.collateral.family import Family
from cloister.collateral.resources import CollateralServer, DocumentKind
from cloister.tdx.collateral import Collateral

_PATHS = {
    "/tdx/certification/v4/tcb": DocumentKind.TCB_INFO,
    "/sgx/certification/v4/tcb": DocumentKind.TCB_INFO,
    "/tdx/certification/v4/qe/identity": DocumentKind.QE_IDENTITY,
    "/sgx/certification/v4/qe/identity": DocumentKind.QE_IDENTITY,
    "/sgx/certification/v4/pckcrl": DocumentKind.PCK_CRL,
    "/sgx/certification/v4/rootcacrl": DocumentKind.ROOT_CRL,
}


@dataclass(frozen=True)
class Reply:
    """One answer. `drip_s` is the pause between its bytes; `endless` sends its body again and again, without end."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    drip_s: float = 0.0
    endless: bool = False


Lie = Callable[[Reply], Reply]


class FakePccs:
    """The server, in this event loop; `requests` are the paths and queries that it was asked for, in order."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.gate = asyncio.Event()  # no answer leaves before it is set
        self.gate.set()
        self.asked = asyncio.Event()  # set by every request
        self._replies: dict[str, Reply] = {}
        self._lies: dict[DocumentKind, Lie] = {}
        self._directory = tempfile.TemporaryDirectory(prefix="pccs-")
        self.ca_file = Path(self._directory.name) / "server.pem"
        self._runner: web.AppRunner | None = None
        self.server = CollateralServer.intel()  # until it has started

    async def __aenter__(self) -> Self:
        application = web.Application()
        application.router.add_get("/{path:.*}", self._answer)
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=self._tls())
        await site.start()
        port = self._runner.addresses[0][1]
        self.server = CollateralServer.pccs(f"https://127.0.0.1:{port}", ca_file=self.ca_file)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.gate.set()
        if self._runner is not None:
            await self._runner.cleanup()
        self._directory.cleanup()

    def serve(self, family: Family, collateral: Collateral | Mapping[str, str], *, hex_crls: bool = False) -> None:
        """Serve these nine strings for a family, in the place of what was there; nothing looks at dates."""
        if isinstance(collateral, Collateral):
            collateral = dict[str, str](json.loads(collateral.to_json()))
        tcb, tcb_signature = collateral["tcb_info"], collateral["tcb_info_signature"]
        qe, qe_signature = collateral["qe_identity"], collateral["qe_identity_signature"]
        bodies = {
            self.server.tcb_info(family).url: (
                DocumentKind.TCB_INFO,
                f'{{"tcbInfo":{tcb},"signature":"{tcb_signature}"}}'.encode(),
                "tcb_info_issuer_chain",
            ),
            self.server.qe_identity(family).url: (
                DocumentKind.QE_IDENTITY,
                f'{{"enclaveIdentity":{qe},"signature":"{qe_signature}"}}'.encode(),
                "qe_identity_issuer_chain",
            ),
            self.server.pck_crl(family).url: (
                DocumentKind.PCK_CRL,
                collateral["pck_crl"].encode() if hex_crls else bytes.fromhex(collateral["pck_crl"]),
                "pck_crl_issuer_chain",
            ),
            self.server.root_crl().url: (DocumentKind.ROOT_CRL, collateral["root_ca_crl"].encode(), None),
        }
        for url, (kind, body, chain) in bodies.items():
            headers = {"Content-Type": "application/x-pem-file" if kind.is_crl else "application/json"}
            if chain is not None and kind.chain_header is not None:
                headers[kind.chain_header] = quote(collateral[chain])
            self._replies[url.removeprefix(self.server.base_url)] = Reply(200, headers, body)

    def serve_at(self, path_and_query: str, reply: Reply) -> None:
        """Serve one answer at one path."""
        self._replies[path_and_query] = reply

    def reply_of(self, path_and_query: str) -> Reply:
        return self._replies[path_and_query]

    def lie(self, kind: DocumentKind, lie: Lie) -> None:
        """Change every answer of this kind until `honest`."""
        self._lies[kind] = lie

    def honest(self) -> None:
        self._lies.clear()

    def count(self, kind: DocumentKind) -> int:
        """Return how many requests of this kind came."""
        return sum(_PATHS.get(request.partition("?")[0]) is kind for request in self.requests)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request.raw_path)
        self.asked.set()
        await self.gate.wait()
        reply = self._replies.get(request.raw_path, _NOT_FOUND)
        kind = _PATHS.get(request.path)
        if kind in self._lies:
            reply = self._lies[kind](reply)
        response = web.StreamResponse(status=reply.status, headers=reply.headers)
        if not reply.endless and not reply.drip_s:
            response.content_length = len(reply.body)
        await response.prepare(request)
        with suppress(ConnectionError):  # the client has had enough
            await _send(response, reply)
        return response

    def _tls(self) -> ssl.SSLContext:
        """Return a context with a self-signed certificate, as PCCS installations have."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "pccs.cloister.test")])
        now = datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(hours=1))
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(key, SHA256())
        )
        self.ca_file.write_bytes(certificate.public_bytes(Encoding.PEM))
        key_file = self.ca_file.with_name("key.pem")
        key_file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.ca_file, key_file)
        return context


async def _send(response: web.StreamResponse, reply: Reply) -> None:
    if reply.drip_s:
        for offset in range(len(reply.body)):
            await response.write(reply.body[offset : offset + 1])
            await asyncio.sleep(reply.drip_s)
    elif reply.endless:
        while True:
            await response.write(reply.body)
            # On a connection whose other end has closed, writing alone never lets the loop find that out.
            await asyncio.sleep(0)
    else:
        await response.write(reply.body)
    await response.write_eof()


_NOT_FOUND = Reply(404, {"Content-Type": "text/html"}, b"<!DOCTYPE html><html>No cache data for this platform.</html>")


class lies:  # a namespace, so that tests read `lies.status(404)`
    """Ways to change an answer."""

    @staticmethod
    def status(status: int, *, retry_after: str | None = None) -> Lie:
        headers = {} if retry_after is None else {"Retry-After": retry_after}
        return lambda _: Reply(status, headers, b"<html>Something about it.</html>")

    @staticmethod
    def html() -> Lie:
        """Return 200 and a web page, as captive portals do."""
        return lambda _: Reply(200, {"Content-Type": "text/html"}, b"<html><body>Please log in.</body></html>")

    @staticmethod
    def html_with_headers() -> Lie:
        return lambda reply: replace(reply, body=b"<html><body>Please log in.</body></html>")

    @staticmethod
    def content_type(value: str) -> Lie:
        return lambda reply: replace(reply, headers={**reply.headers, "Content-Type": value})

    @staticmethod
    def header(name: str, value: str | None) -> Lie:
        def change(reply: Reply) -> Reply:
            headers = {key: old for key, old in reply.headers.items() if key != name}
            return replace(reply, headers=headers if value is None else {**headers, name: value})

        return change

    @staticmethod
    def twice(name: str) -> Lie:
        """Send a header twice."""
        return lambda reply: replace(reply, headers=CIMultiDict([*reply.headers.items(), (name, reply.headers[name])]))

    @staticmethod
    def drip(seconds: float) -> Lie:
        return lambda reply: replace(reply, drip_s=seconds)

    @staticmethod
    def endless() -> Lie:
        return lambda reply: replace(reply, body=b" " * 65536, endless=True)

    @staticmethod
    def announced(size: int) -> Lie:
        """Announce a length and send nothing of it."""
        return lambda reply: replace(reply, headers={**reply.headers, "Content-Length": str(size)}, endless=True)

    @staticmethod
    def redirect(url: str, status: int = 302) -> Lie:
        return lambda _: Reply(status, {"Location": url})

    @staticmethod
    def body(change: Callable[[bytes], bytes]) -> Lie:
        return lambda reply: replace(reply, body=change(reply.body))
