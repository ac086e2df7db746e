"""The demo's table as a result: what ``make demo`` shows, recorded with device, versions and commit.

python benchmarks/demo.py [--output demo-out]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import record

from quantkit.demo import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo-out"))
    print("written", record("demo", run(parser.parse_args().output)))


if __name__ == "__main__":
    main()
