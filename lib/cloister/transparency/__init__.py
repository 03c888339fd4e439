# SPDX-License-Identifier: Apache-2.0
"""The key broker's decision log as everybody reads it: what an entry says, and what proves that it was not changed.

entry.py    one decision or change of a key, and its bytes in the log
"""
