# SPDX-License-Identifier: Apache-2.0
"""Names, URLs, answers and waiting times of collateral."""

from __future__ import annotations

import base64
from datetime import timedelta
from urllib.parse import quote

import pytest

from cloister.collateral.decode import Answer, decode, decode_chain, decode_crl
from cloister.collateral.failures import Failure, FetchFailed, age
from cloister.collateral.family import Edition, Family, PckCa, Tee
from cloister.collateral.resources import CollateralServer, DocumentKind, origin
from cloister.collateral.schedule import LAST_RETRY_S, MIN_REFRESH, NOT_FOUND_S, Hold, hold_after, refresh_at
from cloister.errors import CloisterError, Code
from fakes.collateral_authority import NOW, SGX_FAMILY, TDX_FAMILY, CollateralAuthority

MINUTE = timedelta(minutes=1)


@pytest.fixture(scope="module")
def authority() -> CollateralAuthority:
    return CollateralAuthority()


class TestFamilies:
    def test_a_family_is_named_as_people_write_it(self) -> None:
        family = Family.of("B0C06F000000", "platform", "tdx")
        assert family == Family(bytes.fromhex("b0c06f000000"), PckCa.PLATFORM, Tee.TDX, Edition.STANDARD)
        assert family.name == "tdx-b0c06f000000-platform-standard"

    @pytest.mark.parametrize(
        ("fmspc", "ca", "tee", "edition"),
        [
            ("b0c06f0000", "platform", "tdx", "standard"),
            ("b0c06f00000g", "platform", "tdx", "standard"),
            ("b0c06f000000", "root", "tdx", "standard"),
            ("b0c06f000000", "platform", "sev", "standard"),
            ("b0c06f000000", "platform", "tdx", "late"),
            ("../../../etc", "platform", "tdx", "standard"),
            ("b0c06f000000", "platform", "tdx", "standard\n"),
        ],
    )
    def test_anything_else_is_refused_with_what_is_allowed(self, fmspc: str, ca: str, tee: str, edition: str) -> None:
        with pytest.raises(CloisterError) as caught:
            Family.of(fmspc, ca, tee, edition)
        assert caught.value.code is Code.ARGUMENT_INVALID
        assert "12 hexadecimal digits" in caught.value.why

    def test_an_fmspc_has_six_bytes(self) -> None:
        with pytest.raises(CloisterError, match="6 bytes"):
            Family(bytes(5), PckCa.PLATFORM, Tee.TDX)


class TestUrls:
    def test_the_urls_are_those_of_intels_service(self) -> None:
        server = CollateralServer.intel()
        assert [resource.url for resource in server.resources(TDX_FAMILY)] == [
            "https://certificates.trustedservices.intel.com/IntelSGXRootCA.der",
            "https://api.trustedservices.intel.com/sgx/certification/v4/pckcrl?ca=platform&encoding=der",
            "https://api.trustedservices.intel.com/tdx/certification/v4/tcb?fmspc=B0C06F000000&update=standard",
            "https://api.trustedservices.intel.com/tdx/certification/v4/qe/identity?update=standard",
        ]
        assert server.tcb_info(SGX_FAMILY).url.endswith("/sgx/certification/v4/tcb?fmspc=00606A000000&update=standard")

    def test_a_pccs_passes_on_the_root_crl(self) -> None:
        server = CollateralServer.pccs("https://pccs.example:8081/")
        assert server.root_crl().url == "https://pccs.example:8081/sgx/certification/v4/rootcacrl"
        assert server.origins == {("pccs.example", 8081)}

    def test_early_and_standard_are_different_keys(self) -> None:
        early = Family(TDX_FAMILY.fmspc, TDX_FAMILY.ca, TDX_FAMILY.tee, Edition.EARLY)
        server = CollateralServer.intel()
        for document in (server.tcb_info, server.qe_identity):
            assert document(early).url == document(TDX_FAMILY).url.replace("update=standard", "update=early")

    def test_an_evaluation_number_takes_the_place_of_the_edition(self) -> None:
        url = CollateralServer.intel().tcb_info(TDX_FAMILY, 19).url
        assert url.endswith("?fmspc=B0C06F000000&tcbEvaluationDataNumber=19")

    @pytest.mark.parametrize(
        "url",
        [
            "http://pccs.example",
            "https://",
            "https://user:word@pccs.example",
            "https://pccs.example/?x=1",
            "https://pccs.example/#x",
            "https://pccs.example:port",
            "https://pccs example",
            "https://pccs.example/\r\nHost: other",
            "ftp://pccs.example",
            "https://" + "a" * 2000,
        ],
    )
    def test_a_server_is_a_plain_https_url(self, url: str) -> None:
        with pytest.raises(CloisterError) as caught:
            CollateralServer.pccs(url)
        assert caught.value.code is Code.CONFIG_INVALID

    def test_the_default_port_is_part_of_an_origin(self) -> None:
        assert origin("https://a.example/x") == ("a.example", 443)


class TestAnswers:
    def test_a_crl_comes_as_der_pem_or_hexadecimal(self, authority: CollateralAuthority) -> None:
        der = bytes.fromhex(authority.collateral(TDX_FAMILY)["pck_crl"])
        lines = base64.encodebytes(der).decode()
        pem = f"-----BEGIN X509 CRL-----\n{lines}-----END X509 CRL-----\n".encode()
        for form in (der, pem, der.hex().encode(), der.hex().upper().encode() + b"\n"):
            assert decode_crl(form) == der

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"<html>log in</html>",
            b"308",
            b"3082zz",
            b"-----BEGIN X509 CRL-----\nAAA\n-----END X509 CRL-----\n",
            b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        ],
    )
    def test_nothing_else_is_a_crl(self, body: bytes) -> None:
        with pytest.raises(FetchFailed) as caught:
            decode_crl(body)
        assert caught.value.failure is Failure.NOT_COLLATERAL

    def test_the_signed_text_is_cut_out_byte_for_byte(self) -> None:
        text = b'{"id":"TDX", "odd" :  "spacing and a \\"signature\\":\\"brace }\\"" }'
        body = b'{ "tcbInfo" : ' + text + b' , "signature":"' + b"ab" * 64 + b'"}\n'
        chain = quote(_chain())
        signed = decode(DocumentKind.TCB_INFO, Answer(body, chain))
        assert (signed.text, signed.signature, signed.chain_pem) == (text, b"ab" * 64, _chain().encode())

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"{}",
            b"<html></html>",
            b'{"tcbInfo":{},"signature":"ab"}',
            b'{"tcbInfo":[],"signature":"' + b"ab" * 64 + b'"}',
            b'{"enclaveIdentity":{},"signature":"' + b"ab" * 64 + b'"}',
            b'{"tcbInfo":{},"signature":"' + b"ab" * 64 + b'","more":1}',
            b'[{"tcbInfo":{},"signature":"' + b"ab" * 64 + b'"}]',
            b'\xef\xbb\xbf{"tcbInfo":{},"signature":"' + b"ab" * 64 + b'"}',
        ],
    )
    def test_another_shape_is_refused(self, body: bytes) -> None:
        with pytest.raises(FetchFailed) as caught:
            decode(DocumentKind.TCB_INFO, Answer(body, quote(_chain())))
        assert caught.value.failure is Failure.NOT_COLLATERAL

    def test_a_hostile_body_is_refused_in_linear_time(self) -> None:
        for body in (b'{"tcbInfo":' + b"{" * 500_000, b'{"tcbInfo":{' + b"} " * 250_000, b" " * 500_000):
            with pytest.raises(FetchFailed):
                decode(DocumentKind.TCB_INFO, Answer(body, quote(_chain())))

    def test_a_chain_is_url_encoded_or_plain(self) -> None:
        pem = _chain()
        assert "+" in pem
        assert decode_chain(quote(pem)) == decode_chain(pem) == decode_chain(pem.replace("\n", "\r\n")) == pem.encode()

    @pytest.mark.parametrize("header", ["", "%", "abc", "-----BEGIN CERTIFICATE-----", "é" * 10, "A" * 20_000])
    def test_nothing_else_is_a_chain(self, header: str) -> None:
        with pytest.raises(FetchFailed):
            decode_chain(header)

    def test_a_missing_chain_is_named(self) -> None:
        with pytest.raises(FetchFailed, match="TCB-Info-Issuer-Chain"):
            decode(DocumentKind.TCB_INFO, Answer(b"{}", None))


class TestWaiting:
    @pytest.mark.parametrize(("jitter", "days"), [(0.0, 15.0), (1.0, 22.5), (0.5, 18.75)])
    def test_a_document_is_refreshed_between_half_and_three_quarters_of_its_time(
        self, jitter: float, days: float
    ) -> None:
        assert refresh_at(NOW, NOW + timedelta(days=30), jitter) == NOW + timedelta(days=days)

    def test_near_its_end_it_is_not_asked_for_ever_more_often(self) -> None:
        assert refresh_at(NOW, NOW + MINUTE, 0.0) == NOW + MIN_REFRESH
        assert refresh_at(NOW, NOW - MINUTE, 0.0) == NOW + MIN_REFRESH

    def test_failures_in_a_row_wait_twice_as_long_each_up_to_a_limit(self) -> None:
        hold: Hold | None = None
        waits = []
        for _ in range(40):
            hold = hold_after(FetchFailed(Failure.UNREACHABLE, ""), hold, 0.0, 1.0)
            waits.append(hold.until)
        assert waits[:4] == [2.0, 4.0, 8.0, 16.0]
        assert waits[-1] == LAST_RETRY_S
        assert hold_after(FetchFailed(Failure.UNREACHABLE, ""), None, 0.0, 0.0).until == 1.0

    def test_retry_after_is_honoured_when_it_is_longer(self) -> None:
        asked = FetchFailed(Failure.THROTTLED, "", retry_after=timedelta(seconds=120))
        assert hold_after(asked, None, 0.0, 1.0).until == 120.0
        soon = FetchFailed(Failure.THROTTLED, "", retry_after=timedelta(0))
        assert hold_after(soon, None, 0.0, 1.0).until == 2.0

    def test_not_found_is_believed_for_minutes(self) -> None:
        hold = hold_after(FetchFailed(Failure.NOT_FOUND, ""), None, 50.0, 0.0)
        assert hold.until == 50.0 + NOT_FOUND_S
        assert hold.active(51.0)
        assert not hold.active(hold.until)

    @pytest.mark.parametrize(
        ("span", "text"),
        [
            (timedelta(days=3, hours=5), "3 days"),
            (timedelta(days=1), "1 day"),
            (timedelta(hours=2), "2 hours"),
            (timedelta(minutes=1), "1 minute"),
            (timedelta(seconds=59), "less than a minute"),
            (timedelta(seconds=-5), "less than a minute"),
        ],
    )
    def test_spans_are_said_as_people_do(self, span: timedelta, text: str) -> None:
        assert age(span) == text


def _chain() -> str:
    block = "-----BEGIN CERTIFICATE-----\nMII+/w==\n-----END CERTIFICATE-----\n"
    return block + block
