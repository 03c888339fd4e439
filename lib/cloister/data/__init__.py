# SPDX-License-Identifier: Apache-2.0
"""Training data, tensors and model archives on sealed files; torch and numpy are imported only where they are used."""
