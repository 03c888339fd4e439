# SPDX-License-Identifier: Apache-2.0
"""The `cloister` command: a local stack, keys, sealing, training, serving, and what their evidence says."""
