# SPDX-License-Identifier: Apache-2.0
"""Real quotes, collateral and event logs: of Intel's platforms, not ours, and not part of this repository.

They are found in $CLOISTER_TEST_VECTORS or in ../shared/vectors beside the repository. Where they are missing, tests
that need them are skipped with that message; with CI=true importing this module is an error, and so they fail.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, cast

import pytest

_DEFAULT = Path(__file__).parents[3] / "shared" / "vectors"
DIRECTORY = Path(os.environ.get("CLOISTER_TEST_VECTORS", _DEFAULT)) / "tdx"
_MISSING = f"no real quotes in {DIRECTORY}; set CLOISTER_TEST_VECTORS"


def _manifest() -> dict[str, Any]:
    path = DIRECTORY / "manifest.json"
    if path.exists():
        return cast(dict[str, Any], json.loads(path.read_text()))
    if os.environ.get("CI") == "true":
        raise RuntimeError(_MISSING)
    return {"vectors": [], "eventlogs": []}


MANIFEST = _manifest()
needs_vectors = pytest.mark.skipif(not MANIFEST["vectors"], reason=_MISSING)
