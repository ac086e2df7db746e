"""All attacks as one program: ``python tests/attack/attack.py`` runs the long forms and writes what came of them as JSON.

Each kind is a module beside this file with a function ``attack(count, seed)``. Kinds run in processes of their own, two at a
time, since some of them crash what they attack, and one replaces the handler of signals.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent / "benchmarks"), str(HERE.parent.parent)]


class Kind(NamedTuple):
    """An attack, and how many cases its short and its long form have."""

    module: str
    short: int
    long: int
    options: dict[str, Any] = {}  # noqa: RUF012  nobody writes to it


KINDS = {
    "interrupts": Kind("interrupts", 6, 2500, {"kept": True}),
    "interrupts of large models": Kind("interrupts", 4, 500, {"kept": False}),
    "checkpoints of others": Kind("mutations", 25, 10_000, {"bases": "other_bases"}),
    "checkpoints": Kind("mutations", 50, 10_000, {"bases": "own_bases"}),
    "kills": Kind("kills", 10, 500),
    "readers beside writers": Kind("readers", 30, 2000),
    "tensors and states": Kind("states", 400, 50_000),
    "clocks": Kind("clocks", 30, 6000),
    "native cache": Kind("caches", 2, 200),
}


def run(name: str, count: int, seed: int) -> dict[str, Any]:
    """One attack, in this process."""
    import torch

    torch.set_num_threads(1)
    kind = KINDS[name]
    module = importlib.import_module(kind.module)
    options = {key: getattr(module, value) if key == "bases" else value for key, value in kind.options.items()}
    start = time.perf_counter()
    found = module.attack(count, seed, **options)
    return {"attack": name, **found, "seconds": round(time.perf_counter() - start, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="the counts of the test suite, which take a minute")
    parser.add_argument("--only", choices=KINDS, action="append", metavar="KIND", help=f"one of: {', '.join(KINDS)}")
    parser.add_argument("--count", type=int, help="cases of each kind, in place of its own")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn; 0 by default")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time; 2 by default")
    parser.add_argument("--output", type=Path, help="a file for the result; long forms write benchmarks/results/attack-*.json")
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    rows = []
    with ProcessPoolExecutor(arguments.jobs, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        tasks = {}
        for name in arguments.only or KINDS:
            count = arguments.count or (KINDS[name].short if arguments.short else KINDS[name].long)
            tasks[name] = pool.submit(run, name, count, arguments.seed)
        for name, task in tasks.items():
            row = task.result()
            rows.append(row)
            print(f"{name}: {row['cases']} in {row['seconds']} s: {row['outcomes']}, {len(row['wrong'])} wrong", flush=True)
            for case in row["wrong"][:20]:
                print(f"  {case}", flush=True)
    write(rows, arguments)
    return int(any(row["wrong"] for row in rows))


def write(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Everything into one file where one is asked for; else each kind into its own, and only in its long form."""
    if arguments.output:
        arguments.output.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    elif not arguments.short and not arguments.count:
        from common import record

        for row in rows:
            record(f"attack-{row['attack'].replace(' ', '-')}", [row], seed=arguments.seed)


if __name__ == "__main__":
    sys.exit(main())
