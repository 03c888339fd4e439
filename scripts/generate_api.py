# SPDX-License-Identifier: Apache-2.0
"""Generate lib/cloister/api from protos/; with --check, say whether what is committed is what would be generated."""

from __future__ import annotations

import filecmp
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
OUT = ROOT / "lib/cloister/api"
HEADER = "# SPDX-License-Identifier: Apache-2.0\n# Generated from protos/ by scripts/generate_api.py; not edited.\n"


def generate(into: Path) -> None:
    """Write the cloister/api package below `into`."""
    protos = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto"))
    out = str(into)
    plugins = Path(sys.executable).parent
    command = [
        sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTOS}",
        f"--plugin=protoc-gen-mypy={plugins / 'protoc-gen-mypy'}",
        f"--plugin=protoc-gen-mypy_grpc={plugins / 'protoc-gen-mypy_grpc'}",
        f"--python_out={out}", f"--grpc_python_out={out}", f"--mypy_out=quiet:{out}", f"--mypy_grpc_out=quiet:{out}",
        *protos,
    ]  # fmt: skip
    subprocess.run(command, check=True, cwd=ROOT)
    for directory in [into / "cloister/api", *sorted((into / "cloister/api").rglob("*"))]:
        if directory.is_dir():
            (directory / "__init__.py").write_text(HEADER)


def differences(made: Path, committed: Path) -> list[str]:
    """Return the relative paths that differ between two generated trees."""

    def files(root: Path) -> set[Path]:
        return {p.relative_to(root) for p in root.rglob("*") if p.is_file() and "__pycache__" not in p.parts}

    left, right = files(made), files(committed)
    changed = {p for p in left & right if not filecmp.cmp(made / p, committed / p, shallow=False)}
    return sorted(str(p) for p in (left ^ right) | changed)


def main() -> int:
    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch))
        made = Path(scratch) / "cloister/api"
        if "--check" in sys.argv[1:]:
            stale = differences(made, OUT)
            for path in stale:
                print(f"stale: lib/cloister/api/{path}")
            if stale:
                print("run `make protos` and commit the result")
            return 1 if stale else 0
        if OUT.exists():
            shutil.rmtree(OUT)
        shutil.copytree(made, OUT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
