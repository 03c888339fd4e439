# SPDX-License-Identifier: Apache-2.0
"""Serve models from pinned TorchServe backends behind one gateway."""
