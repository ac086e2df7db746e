"""What every benchmark shares: models, windows of text, and results as JSON with device, versions and commit."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "transformers", "torchao", "bitsandbytes", "gemlite", "llmcompressor", "quantkit-w8a8")


def record(name: str, rows: Any, **facts: Any) -> Path:
    """Write ``results/NAME.json``: the rows, and everything needed to read them."""
    body = {
        "benchmark": name,
        "command": " ".join(["python", _program(), *map(shlex.quote, sys.argv[1:])]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        # a machine that only has a copy of the tree is told the commit
        "commit": os.environ.get("QUANTKIT_COMMIT") or _git("rev-parse", "HEAD"),
        "dirty": "QUANTKIT_COMMIT" not in os.environ
        and bool(_git("status", "--porcelain", "--", "quantkit", "benchmarks/*.py")),
        "device": ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})
        | {"cpu": _cpu(), "threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version()} | {p: v for p in PACKAGES if (v := _version(p))},
        **facts,
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(body, indent=1) + "\n")
    return path


def interleaved(calls: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds per call, round by round, every candidate once in each and the order reversed in every other round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds):
        for name in list(calls) if index % 2 == 0 else list(calls)[::-1]:
            times[name].append(calls[name]())
    return times


def spread(values: list[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def _program() -> str:
    """The path of the running program, in the repository if it is there."""
    path = Path(sys.argv[0]).resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def _git(*args: str) -> str:
    return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    flags = next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])
    return f"{name}, {os.cpu_count()} cores" + (", AVX-512 VNNI" if "avx512_vnni" in flags else "")


def shared_out(
    tasks: Sequence[Any], jobs: int, device: str, begin: Callable[..., None], work: Callable[[Any], Any], *arguments: Any
) -> Iterator[tuple[Any, Any]]:
    """``(task, work(task))`` as they are done, by ``jobs`` processes, each after ``begin(device, *arguments)``.

    With ``device="cuda"`` the processes are spread over the GPUs. A task whose peer is not installed is left out; another
    that fails does not stop those that follow, and is raised at the end.
    """
    context = multiprocessing.get_context("spawn")
    devices = context.Queue()
    for job in range(jobs):
        devices.put(f"cuda:{job % torch.cuda.device_count()}" if device == "cuda" else device)
    with ProcessPoolExecutor(jobs, context, _begin, (devices, begin, arguments)) as pool:
        waiting, failed = {pool.submit(work, task): task for task in tasks}, []
        for done in as_completed(waiting):
            try:
                yield waiting[done], done.result()
            except BrokenProcessPool:
                raise
            except ImportError as error:
                print(f"{waiting[done]}: not installed ({error})", flush=True)
            except Exception as error:  # noqa: BLE001  raised below, once the others are done
                print(f"{waiting[done]}: {type(error).__name__}: {error}\n{error.__cause__}", flush=True)
                failed.append(waiting[done])
        if failed:
            raise RuntimeError(f"failed, see above: {failed}")


def _begin(devices: Any, begin: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    device = devices.get()
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    begin(device, *arguments)
