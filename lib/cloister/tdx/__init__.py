# SPDX-License-Identifier: Apache-2.0
"""TDX evidence as values: quotes, event logs, report data, and what a workload's measurements say.

Pure: bytes in, values or one typed error out; no clock, no socket, no file. Errors and comments
name the checks of a quote by row ("H8", "P2", "E3"); `cloister.tdx.verify` lists the rows in their order.
"""
