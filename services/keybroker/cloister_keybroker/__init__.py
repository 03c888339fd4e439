# SPDX-License-Identifier: Apache-2.0
"""Release data keys to attested workloads that the owner's policy allows."""
