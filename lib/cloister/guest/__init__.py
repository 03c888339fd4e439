# SPDX-License-Identifier: Apache-2.0
"""Inside a TD: what it measures, what it proves, whom it becomes, and which keys it gets."""
