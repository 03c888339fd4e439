# SPDX-License-Identifier: Apache-2.0
"""What every process of the system stands on: transport, identity, configuration, logs, state, processes."""
