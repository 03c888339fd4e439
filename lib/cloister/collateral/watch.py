# SPDX-License-Identifier: Apache-2.0
"""What operators see of a cache: metrics, and a log line while there is still time to do something."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Final

import prometheus_client

from cloister.collateral.documents import Document
from cloister.collateral.failures import FETCH_HINT, FetchFailed, age
from cloister.collateral.resources import Resource
from cloister.collateral.schedule import WARNING
from cloister.runtime.logging import get_logger

_LABELS: Final = ("document", "tee", "fmspc", "ca", "edition")
_REMIND: Final = timedelta(days=1)  # between two lines about one document


class CollateralWatch:
    """Counters and gauges of one cache. Labels come from verified documents, never from a caller."""

    def __init__(self, registry: prometheus_client.CollectorRegistry | None = None) -> None:
        self.registry = registry or prometheus_client.CollectorRegistry()
        self._expiry = prometheus_client.Gauge(
            "cloister_collateral_expiry_timestamp_seconds",
            "When a cached document expires, in seconds since 1970.",
            _LABELS,
            registry=self.registry,
        )
        self._expiring = prometheus_client.Gauge(
            "cloister_collateral_expiring_documents",
            "Cached documents that expire within 7 days, or have expired.",
            registry=self.registry,
        )
        self._fetches = prometheus_client.Counter(
            "cloister_collateral_fetches_total",
            "Requests for collateral by what came of them.",
            ("document", "outcome"),
            registry=self.registry,
        )
        self._log = get_logger()
        self._reminded: dict[str, datetime] = {}

    def kept(self, document: Document, *, changed: bool) -> None:
        """Take note of a document that is in the cache now."""
        self._expiry.labels(*_labels(document.resource)).set(document.expires.timestamp())
        self._reminded.pop(document.resource.url, None)
        if changed:
            self._log.info(
                "collateral stored",
                url=document.resource.url,
                number=document.number,
                issued=document.issued.isoformat(),
                expires=document.expires.isoformat(),
            )

    def fetched(self, resource: Resource, *, changed: bool) -> None:
        self._fetches.labels(str(resource.kind), "stored" if changed else "unchanged").inc()

    def failed(self, resource: Resource, failed: FetchFailed, *, good_until: datetime | None) -> None:
        """Take note of a request that brought nothing; what was good stays."""
        self._fetches.labels(str(resource.kind), str(failed.failure)).inc()
        self._log.warning(
            "collateral could not be fetched",
            url=resource.url,
            failure=str(failed.failure),
            reason=failed.reason,
            good_until=None if good_until is None else good_until.isoformat(),
        )

    def forgotten(self, document: Document) -> None:
        """Take note of a document that was reset."""
        self._expiry.remove(*_labels(document.resource))
        self._log.warning("collateral reset", url=document.resource.url, number=document.number)

    def look(self, documents: Iterable[Document], now: datetime) -> None:
        """Warn of what expires soon, each document once a day."""
        expiring = [document for document in documents if document.expires - now <= WARNING]
        self._expiring.set(len(expiring))
        for document in expiring:
            url, left = document.resource.url, document.expires - now
            last = self._reminded.get(url)
            if last is not None and abs(now - last) < _REMIND:
                continue
            self._reminded[url] = now
            if left >= timedelta(0):
                self._log.warning(
                    "collateral expires soon", url=url, expires=document.expires.isoformat(), left=age(left)
                )
            else:
                self._log.error(
                    "collateral has expired", url=url, expires=document.expires.isoformat(), todo=FETCH_HINT
                )


def _labels(resource: Resource) -> tuple[str, ...]:
    fmspc = "" if resource.fmspc is None else resource.fmspc.hex()
    return str(resource.kind), resource.tee or "", fmspc, resource.ca or "", resource.edition
