# SPDX-License-Identifier: Apache-2.0
"""The back end in front of Intel's EHSM-KMS, by its REST API: see docs/ehsm.md.

What EHSM does not do is done here: its server is pinned, every request has a hexadecimal nonce and a signature of its
own, nothing is sent twice that must not be done twice, keys are made anew before EHSM deletes them, and what it holds
opens nothing alone.
"""
