"""The demo's table as a result: what ``make demo`` shows, recorded with device, versions and commit.

python benchmarks/demo.py [--output demo-out] [--ran]

``--ran`` records what ``make demo`` left in the folder, in place of running it again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from common import record

from quantkit.cli.demo import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo-out"))
    parser.add_argument("--ran", action="store_true")
    args = parser.parse_args()
    rows = json.loads((args.output / "results.json").read_text(encoding="utf-8")) if args.ran else run(args.output)
    print("written", record("demo", rows))


if __name__ == "__main__":
    main()
