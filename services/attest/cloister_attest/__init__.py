# SPDX-License-Identifier: Apache-2.0
"""The verifier: is the evidence authentic, is the workload welcome, and then: who is it?"""
