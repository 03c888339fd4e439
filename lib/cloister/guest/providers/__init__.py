# SPDX-License-Identifier: Apache-2.0
"""The platforms a TD can run on, each behind `QuoteProvider`: simulated, configfs-tsm, /dev/tdx_guest with a QGS."""
