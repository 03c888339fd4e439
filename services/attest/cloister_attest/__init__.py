# SPDX-License-Identifier: Apache-2.0
"""Verify evidence, appraise it and issue identities."""
