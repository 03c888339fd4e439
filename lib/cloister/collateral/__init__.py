# SPDX-License-Identifier: Apache-2.0
"""Collateral: what Intel says about platforms (TCB info, QE identity, revocation lists), fetched, kept and carried.

    family.py, resources.py   which platforms, which documents, at which URL
    client.py, failures.py    one request to Intel's PCS or to a PCCS, and the ways in which it can fail
    decode.py, documents.py   an answer -> the signed text -> a document that verified under the pinned root
    schedule.py, store.py     when to ask again (pure); what survives a restart
    cache.py, watch.py        the nine rules; warning before something expires
    bundle.py, pccsfile.py    collateral as a file, for machines without a network
    commands.py               fetch, export and import

Nothing here is trusted for being here: a server, a cache file and a bundle are all read as if an attacker wrote them.
"""
