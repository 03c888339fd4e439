# SPDX-License-Identifier: Apache-2.0
"""A simulated TDX platform: a development root, a quoting enclave and TDs that live as long as a connection."""

from cloister_sim.platform import SimulatedPlatform, SimulatedTd, SimulationError

__all__ = ["SimulatedPlatform", "SimulatedTd", "SimulationError"]
