# SPDX-License-Identifier: Apache-2.0
"""Run distributed training jobs on attested ranks."""
