# SPDX-License-Identifier: Apache-2.0
"""A PCCS that lies: whatever it serves, nothing that is bad gets in, and nothing that is good gets out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from pathlib import Path

import pytest

from cloister.collateral.cache import CollateralCache
from cloister.collateral.client import ClientLimits, CollateralClient
from cloister.collateral.failures import Failure, FetchFailed
from cloister.collateral.family import Family
from cloister.collateral.resources import CollateralServer, DocumentKind
from cloister.errors import CloisterError, Code
from fakes.collateral_authority import NOW, SGX_FAMILY, TDX_FAMILY, CollateralAuthority, Wish
from fakes.collateral_harness import DAY, LIMITS, Clocks, get, open_cache, serving
from fakes.fake_pccs import FakePccs, Lie, lies

TCB, QE, PCK, ROOT = (
    DocumentKind.TCB_INFO,
    DocumentKind.QE_IDENTITY,
    DocumentKind.PCK_CRL,
    DocumentKind.ROOT_CRL,
)
Nine = dict[str, str]


@pytest.fixture(scope="module")
def authority() -> CollateralAuthority:
    return CollateralAuthority()


@pytest.fixture(scope="module")
def evil() -> CollateralAuthority:
    """Return an authority with the same names and another root."""
    return CollateralAuthority()


@pytest.fixture
async def pccs(authority: CollateralAuthority) -> AsyncIterator[FakePccs]:
    async with serving(authority) as server:
        yield server


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


@pytest.fixture
async def cache(
    pccs: FakePccs, tmp_path: Path, authority: CollateralAuthority, clocks: Clocks
) -> AsyncIterator[CollateralCache]:
    async with open_cache(pccs, tmp_path / "cache.db", authority.trust_root, clocks) as opened:
        yield opened


async def require_refused_and_harmless(
    cache: CollateralCache, pccs: FakePccs, clocks: Clocks, lie: Callable[[], None], code: Code, tmp_path: Path
) -> CloisterError:
    """Lie to a cache that is empty and to one that is full: the first has nothing, the second keeps what it has."""
    honest = dict(pccs._replies)
    lie()
    with pytest.raises(CloisterError) as caught:
        await get(cache)
    pccs.honest()
    pccs._replies = honest
    clocks.elapsed_s += 7 * 3600
    good = await get(cache)
    lie()
    clocks.advance(20 * DAY)
    await cache.refresh_due()
    assert (await get(cache)).digest == good.digest
    assert caught.value.code is code
    return caught.value


class TestAnswers:
    @pytest.mark.parametrize("kind", list(DocumentKind))
    @pytest.mark.parametrize(
        ("lie", "code"),
        [
            (lies.status(400), Code.COLLATERAL_NOT_FOUND),
            (lies.status(401), Code.COLLATERAL_UNAVAILABLE),
            (lies.status(404), Code.COLLATERAL_NOT_FOUND),
            (lies.status(410), Code.COLLATERAL_NOT_FOUND),
            (lies.status(429, retry_after="60"), Code.COLLATERAL_UNAVAILABLE),
            (lies.status(500), Code.COLLATERAL_UNAVAILABLE),
            (lies.status(502), Code.COLLATERAL_UNAVAILABLE),
            (lies.status(503, retry_after="60"), Code.COLLATERAL_UNAVAILABLE),
            (lies.status(204), Code.COLLATERAL_UNAVAILABLE),
            (lies.status(461), Code.COLLATERAL_UNAVAILABLE),
            (lies.html_with_headers(), Code.COLLATERAL_UNAVAILABLE),
            (lies.html(), Code.COLLATERAL_UNAVAILABLE),
            (lies.body(lambda _: b""), Code.COLLATERAL_UNAVAILABLE),
            (lies.redirect("https://elsewhere.example/tcb"), Code.COLLATERAL_UNAVAILABLE),
            (lies.header("Content-Encoding", "gzip"), Code.COLLATERAL_UNAVAILABLE),
            (lies.announced(1024**3), Code.COLLATERAL_UNAVAILABLE),
            (lies.endless(), Code.COLLATERAL_UNAVAILABLE),
        ],
        ids=[
            *("400", "401", "404", "410", "429", "500", "502", "503", "204", "461"),
            *("html body", "html answer", "empty", "redirect", "gzip", "1 GB announced", "endless"),
        ],
    )
    async def test_nothing_that_is_not_collateral_gets_in(
        self,
        cache: CollateralCache,
        pccs: FakePccs,
        clocks: Clocks,
        tmp_path: Path,
        kind: DocumentKind,
        lie: Lie,
        code: Code,
    ) -> None:
        await require_refused_and_harmless(cache, pccs, clocks, lambda: pccs.lie(kind, lie), code, tmp_path)

    async def test_a_wrong_content_type_and_hexadecimal_crls_are_no_lies(
        self, cache: CollateralCache, authority: CollateralAuthority, pccs: FakePccs
    ) -> None:
        pccs.serve(TDX_FAMILY, authority.collateral(TDX_FAMILY), hex_crls=True)
        for kind in DocumentKind:
            pccs.lie(kind, lies.content_type("video/mp4"))
        found = await get(cache)
        assert found.pck_crl[:1] == b"\x30"

    @pytest.mark.parametrize("kind", [TCB, QE, PCK])
    async def test_an_answer_without_its_issuer_chain_is_refused(
        self, cache: CollateralCache, pccs: FakePccs, kind: DocumentKind
    ) -> None:
        pccs.lie(kind, lies.header(kind.chain_header or "", None))
        with pytest.raises(CloisterError, match="no collateral") as caught:
            await get(cache)
        assert kind.chain_header is not None
        assert kind.chain_header in caught.value.why

    @pytest.mark.parametrize("kind", [TCB, QE, PCK])
    async def test_an_answer_with_two_issuer_chains_is_refused(
        self, cache: CollateralCache, pccs: FakePccs, kind: DocumentKind
    ) -> None:
        pccs.lie(kind, lies.twice(kind.chain_header or ""))
        with pytest.raises(CloisterError, match="no collateral"):
            await get(cache)

    async def test_a_drip_ends_at_the_deadline(self, pccs: FakePccs) -> None:
        pccs.lie(TCB, lies.drip(0.02))
        limits = ClientLimits(total_s=0.3)
        async with CollateralClient(pccs.server, limits=limits) as client:
            begun = time.monotonic()
            with pytest.raises(FetchFailed) as caught:
                await client.fetch(pccs.server.tcb_info(TDX_FAMILY))
        assert caught.value.failure is Failure.TIMED_OUT
        assert time.monotonic() - begun < 2

    async def test_no_more_is_read_of_an_endless_body_than_the_limit(self, pccs: FakePccs) -> None:
        pccs.lie(PCK, lies.endless())
        async with CollateralClient(pccs.server, limits=LIMITS) as client:
            with pytest.raises(FetchFailed) as caught:
                await client.fetch(pccs.server.pck_crl(TDX_FAMILY))
        assert caught.value.failure is Failure.TOO_LARGE

    @pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
    async def test_a_redirect_makes_no_second_request_not_even_to_the_same_server(
        self, pccs: FakePccs, status: int
    ) -> None:
        pccs.lie(ROOT, lies.redirect(f"{pccs.server.base_url}/elsewhere", status))
        async with CollateralClient(pccs.server, limits=LIMITS) as client:
            with pytest.raises(FetchFailed) as caught:
                await client.fetch(pccs.server.root_crl())
        assert caught.value.failure is Failure.REDIRECTED
        assert pccs.requests == ["/sgx/certification/v4/rootcacrl"]

    async def test_a_server_under_another_ca_is_refused(self, pccs: FakePccs) -> None:
        async with FakePccs() as other:
            server = CollateralServer.pccs(pccs.server.base_url, ca_file=other.ca_file)
            async with CollateralClient(server, limits=LIMITS) as client:
                with pytest.raises(FetchFailed) as caught:
                    await client.fetch(server.root_crl())
        assert caught.value.failure is Failure.TLS
        assert pccs.requests == []

    async def test_a_self_signed_server_is_refused_without_its_ca(self, pccs: FakePccs) -> None:
        server = CollateralServer.pccs(pccs.server.base_url)
        async with CollateralClient(server, limits=LIMITS) as client:
            with pytest.raises(FetchFailed) as caught:
                await client.fetch(server.root_crl())
        assert caught.value.failure is Failure.TLS

    async def test_a_name_that_is_not_the_certificates_is_refused(self, pccs: FakePccs) -> None:
        server = CollateralServer.pccs(pccs.server.base_url.replace("127.0.0.1", "localhost"), ca_file=pccs.ca_file)
        async with CollateralClient(server, limits=LIMITS) as client:
            with pytest.raises(FetchFailed) as caught:
                await client.fetch(server.root_crl())
        assert caught.value.failure is Failure.TLS

    async def test_no_server_at_all_is_said_plainly(self, tmp_path: Path) -> None:
        server = CollateralServer.pccs("https://127.0.0.1:1")
        async with CollateralClient(server, limits=LIMITS) as client:
            with pytest.raises(FetchFailed) as caught:
                await client.fetch(server.root_crl())
        assert caught.value.failure is Failure.UNREACHABLE

    async def test_something_that_does_not_speak_tls_is_refused(self) -> None:
        async def shout(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
            writer.close()

        listener = await asyncio.start_server(shout, "127.0.0.1", 0)
        port = listener.sockets[0].getsockname()[1]
        server = CollateralServer.pccs(f"https://127.0.0.1:{port}")
        async with listener, CollateralClient(server, limits=LIMITS) as client:
            with pytest.raises(FetchFailed) as caught:
                await client.fetch(server.root_crl())
        assert caught.value.failure in {Failure.TLS, Failure.UNREACHABLE}

    @pytest.mark.parametrize("content", [None, b"", b"not PEM"])
    def test_a_ca_file_that_is_none_is_named_at_once(self, tmp_path: Path, content: bytes | None) -> None:
        path = tmp_path / "ca.pem"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(CloisterError) as caught:
            CollateralClient(CollateralServer.pccs("https://pccs.example", ca_file=path))
        assert caught.value.code is Code.CONFIG_INVALID
        assert "ca.pem" in caught.value.what


def _with(good: Nine, other: Nine, *names: str) -> Nine:
    return {**good, **{name: other[name] for name in names}}


def _first(chain: str) -> str:
    return chain[: chain.index(END) + len(END)]


def _last(chain: str) -> str:
    return chain[chain.index(END) + len(END) :]


END = "-----END CERTIFICATE-----\n"
TCB_PARTS = ("tcb_info", "tcb_info_signature", "tcb_info_issuer_chain")
QE_PARTS = ("qe_identity", "qe_identity_signature", "qe_identity_issuer_chain")
PCK_PARTS = ("pck_crl", "pck_crl_issuer_chain")
Forge = Callable[[CollateralAuthority, CollateralAuthority, Nine], Nine]

FORGERIES: dict[str, Forge] = {
    "another root's TCB info": lambda a, e, good: _with(good, e.collateral(TDX_FAMILY), *TCB_PARTS),
    "another root's QE identity": lambda a, e, good: _with(good, e.collateral(TDX_FAMILY), *QE_PARTS),
    "another root's PCK CRL": lambda a, e, good: _with(good, e.collateral(TDX_FAMILY), *PCK_PARTS),
    "another root's root CRL": lambda a, e, good: _with(good, e.collateral(TDX_FAMILY), "root_ca_crl"),
    "a signature under the wrong key": lambda a, e, good: _with(good, e.collateral(TDX_FAMILY), "tcb_info_signature"),
    "a signature by the PCK CA": lambda a, e, good: {
        **good,
        "tcb_info_signature": a.sign(good["tcb_info"], "Intel SGX PCK Platform CA"),
        "tcb_info_issuer_chain": good["pck_crl_issuer_chain"],
    },
    "a signature by the root": lambda a, e, good: {
        **good,
        "tcb_info_signature": a.sign(good["tcb_info"], "Intel SGX Root CA"),
    },
    "an issuer chain of another role": lambda a, e, good: {
        **good,
        "tcb_info_issuer_chain": good["pck_crl_issuer_chain"],
    },
    "an issuer chain without its root": lambda a, e, good: {
        **good,
        "tcb_info_issuer_chain": _first(good["tcb_info_issuer_chain"]),
    },
    "another root's signer over this root": lambda a, e, good: {
        **good,
        "tcb_info_signature": e.sign(good["tcb_info"]),
        "tcb_info_issuer_chain": _first(e.collateral(TDX_FAMILY)["tcb_info_issuer_chain"])
        + _last(good["tcb_info_issuer_chain"]),
    },
    "this root's signer over another root": lambda a, e, good: {
        **good,
        "tcb_info_issuer_chain": _first(good["tcb_info_issuer_chain"])
        + _last(e.collateral(TDX_FAMILY)["tcb_info_issuer_chain"]),
    },
    "a signer that the root certified for platforms": lambda a, e, good: a.impostor(good, "Intel SGX PCK Certificate"),
    "one changed byte": lambda a, e, good: {**good, "tcb_info": good["tcb_info"].replace('"svn":5', '"svn":4', 1)},
    "one more space": lambda a, e, good: {**good, "qe_identity": good["qe_identity"].replace(",", ", ", 1)},
    "TCB info about another platform": lambda a, e, good: _with(
        good, a.collateral(TDX_FAMILY, Wish(fmspc=bytes(6))), *TCB_PARTS
    ),
    "TCB info about SGX": lambda a, e, good: _with(
        good, a.collateral(Family.of(TDX_FAMILY.fmspc.hex(), "platform", "sgx")), *TCB_PARTS
    ),
    "the identity of the other enclave": lambda a, e, good: _with(good, a.collateral(SGX_FAMILY), *QE_PARTS),
    "swapped CRLs": lambda a, e, good: {**good, "pck_crl": good["root_ca_crl"], "root_ca_crl": good["pck_crl"]},
    "the other CA's CRL": lambda a, e, good: _with(good, a.collateral(SGX_FAMILY), *PCK_PARTS),
    "the other CA's CRL under this CA's chain": lambda a, e, good: _with(good, a.collateral(SGX_FAMILY), "pck_crl"),
    "QE identity as TCB info": lambda a, e, good: {
        **good,
        "tcb_info": good["qe_identity"],
        "tcb_info_signature": good["qe_identity_signature"],
    },
}


class TestDocuments:
    @pytest.mark.parametrize("name", list(FORGERIES))
    async def test_nothing_that_does_not_verify_gets_in(
        self,
        cache: CollateralCache,
        authority: CollateralAuthority,
        evil: CollateralAuthority,
        pccs: FakePccs,
        clocks: Clocks,
        tmp_path: Path,
        name: str,
    ) -> None:
        good = authority.collateral(TDX_FAMILY)
        pccs.serve(TDX_FAMILY, good)
        forged = FORGERIES[name](authority, evil, good)
        lie = lambda: pccs.serve(TDX_FAMILY, forged)  # noqa: E731
        error = await require_refused_and_harmless(cache, pccs, clocks, lie, Code.COLLATERAL_INVALID, tmp_path)
        assert "does not verify" in error.why

    async def test_expired_collateral_that_is_served_silently_is_refused(
        self, cache: CollateralCache, authority: CollateralAuthority, pccs: FakePccs
    ) -> None:
        old = Wish(issued=NOW - 500 * DAY, crl_issued=NOW - 500 * DAY)
        pccs.serve(TDX_FAMILY, authority.collateral(TDX_FAMILY, old))
        with pytest.raises(CloisterError) as caught:
            await get(cache)
        assert caught.value.code is Code.COLLATERAL_EXPIRED
        assert "clock" in caught.value.todo

    async def test_the_last_second_counts_of_what_is_served_and_the_next_does_not(
        self, cache: CollateralCache, authority: CollateralAuthority, pccs: FakePccs, clocks: Clocks
    ) -> None:
        ends_now = Wish(issued=NOW - 30 * DAY)
        pccs.serve(TDX_FAMILY, authority.collateral(TDX_FAMILY, ends_now))
        await get(cache)
        await cache.reset(TDX_FAMILY)
        clocks.advance(timedelta(seconds=1))
        with pytest.raises(CloisterError) as caught:
            await get(cache)
        assert caught.value.code is Code.COLLATERAL_EXPIRED
        assert "that is served expired" in caught.value.why

    @pytest.mark.parametrize("wish", [Wish(issued=NOW + DAY), Wish(crl_issued=NOW + DAY)])
    async def test_collateral_from_the_future_is_refused(
        self, cache: CollateralCache, authority: CollateralAuthority, pccs: FakePccs, wish: Wish
    ) -> None:
        pccs.serve(TDX_FAMILY, authority.collateral(TDX_FAMILY, wish))
        with pytest.raises(CloisterError) as caught:
            await get(cache)
        assert caught.value.code is Code.COLLATERAL_NOT_YET_VALID

    async def test_documents_of_a_revoked_signer_are_refused(
        self, cache: CollateralCache, authority: CollateralAuthority, pccs: FakePccs
    ) -> None:
        pccs.serve(TDX_FAMILY, authority.collateral(TDX_FAMILY, revoked=[authority.signer]))
        with pytest.raises(CloisterError) as caught:
            await get(cache)
        assert caught.value.code is Code.COLLATERAL_INVALID
        assert "revoked" in caught.value.why

    async def test_a_signer_that_is_revoked_later_takes_what_it_signed_with_it(
        self, cache: CollateralCache, authority: CollateralAuthority, pccs: FakePccs, clocks: Clocks
    ) -> None:
        await get(cache)
        newer = Wish(crl_number=2, crl_issued=NOW, crl_life=60 * DAY)
        revoking = authority.collateral(TDX_FAMILY, newer, revoked=[authority.signer])
        pccs.serve(TDX_FAMILY, _with(authority.collateral(TDX_FAMILY), revoking, "root_ca_crl"))
        clocks.advance(16 * DAY)
        await cache.refresh_due()
        with pytest.raises(CloisterError) as caught:
            await get(cache)
        assert "revoked" in caught.value.why

    async def test_a_list_with_ten_thousand_entries_works(
        self, cache: CollateralCache, authority: CollateralAuthority, pccs: FakePccs
    ) -> None:
        good = authority.collateral(TDX_FAMILY)
        many = authority.large_crl(authority.cas[TDX_FAMILY.ca], Wish(), 10_000)
        pccs.serve(TDX_FAMILY, {**good, "pck_crl": many.hex()}, hex_crls=True)
        assert (await get(cache)).pck_crl == many
