# SPDX-License-Identifier: Apache-2.0
"""Encrypted files and directories on storage that is not trusted; docs/sealed-format.md describes every byte."""
