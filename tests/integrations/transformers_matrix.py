"""Run test_transformers.py and test_export.py with each version of transformers that is supported (``make
transformers-matrix``), or with those that are given.

Every version is installed with what it requires into a folder of its own, in front of the environment that runs this.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

VERSIONS = ("5.17.0", "5.19.0", "5.20.2", "5.21.1", "")  # the last: the newest
TESTS = [Path(__file__).with_name(name) for name in ("test_transformers.py", "test_export.py")]
ROOT = Path(__file__).parents[2]
CONSTRAINTS = ROOT / "constraints.txt"


def passes(version: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        limits = Path(folder) / "limits.txt"  # ours, but for what a version of transformers may want otherwise
        free = ("transformers", "huggingface", "tokenizers", "hf")
        limits.write_text("".join(f"{line}\n" for line in CONSTRAINTS.read_text().splitlines() if not line.startswith(free)))
        wanted = f"transformers=={version}" if version else "transformers"
        command = [sys.executable, "-m", "pip", "install", "-q", "--target", f"{folder}/site", "-c", str(limits), wanted]
        subprocess.run(command, check=True)
        env = os.environ | {"PYTHONPATH": f"{folder}/site"}
        shown = subprocess.run([sys.executable, "-c", "import transformers as t; print(t.__version__)"], env=env, check=True)
        tests = subprocess.run([sys.executable, "-m", "pytest", "-q", "-n0", *map(str, TESTS)], env=env, cwd=ROOT)
        return shown.returncode == tests.returncode == 0


def main() -> None:
    failed = [version or "newest" for version in sys.argv[1:] or VERSIONS if not passes(version)]
    print("failed with transformers", *failed) if failed else print("passed with every version")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
