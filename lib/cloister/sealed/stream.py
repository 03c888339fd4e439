# SPDX-License-Identifier: Apache-2.0
"""One sealed file, written and read."""

from cloister.sealed.reader import SealedReader, is_sealed
from cloister.sealed.writer import SealedWriter

__all__ = ["SealedReader", "SealedWriter", "is_sealed"]
