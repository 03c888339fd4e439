# SPDX-License-Identifier: Apache-2.0
"""Cloister: attested PyTorch training and serving inside Intel TDX trust domains."""

__version__ = "0.1.0"
