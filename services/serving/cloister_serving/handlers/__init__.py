# SPDX-License-Identifier: Apache-2.0
"""Handlers that archives carry: each one file, a stock TorchServe handler, measured before a key is released."""
