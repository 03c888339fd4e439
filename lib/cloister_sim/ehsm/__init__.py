# SPDX-License-Identifier: Apache-2.0
"""A development server that speaks the REST API of Intel's EHSM-KMS: for machines without SGX, and for tests.

It answers what EHSM answers, so that a client which works here works there. Where EHSM is unsafe and no client depends
on it, this one is strict: it authenticates before it looks at a payload, remembers a request only when its signature
was right, refuses one signature twice (also after a restart), compares signatures in constant time, takes a nonce only
as text or number, authenticates what it stores, signs import tokens and never overwrites an imported key.

Keys lie in a directory, under a key in the same directory: whoever reads it has them all. It is no key store.
"""
