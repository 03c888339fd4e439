# SPDX-License-Identifier: Apache-2.0
# Generated from protos/ by scripts/generate_api.py; not edited.
