"""Tokens per second of SmolLM2 on this CPU: eager, captured, llama.cpp and OpenVINO beside them, turn by turn in one run.

    python benchmarks/decode.py [--rounds 5] [--context 64 512] [--llama-cpp PYTHON] [--openvino PYTHON] [--only INT8 ...]

Decode is a step after a prompt of so many tokens, head and cache included; generate() also has what transformers does around
it. Prefill is 1 x 512 tokens. PYTHON is an interpreter of an environment of its own with the package llama-cpp-python, built
for this processor (CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary llama-cpp-python llama-cpp-python), or openvino-genai.
Their Q8_0 file is made here from the embedded one, whose 4 bits stand beside it. Run it with nothing else on the machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

NEW, PREFILL, ROOM = 32, 512, 1024


# ---- peers, in processes and environments of their own: each line ``[what, tokens]`` is answered with seconds


def llama_cpp(path: str, threads: int) -> None:
    from llama_cpp import Llama  # type: ignore[import-not-found]

    model = Llama(path, n_ctx=ROOM + NEW, n_batch=PREFILL, n_threads=threads, n_threads_batch=threads, verbose=False)
    print("ready", flush=True)
    for line in sys.stdin:
        what, tokens = json.loads(line)
        model.reset()
        start = time.perf_counter()
        model.eval(tokens)
        if what == "decode":
            start = time.perf_counter()
            for i in range(NEW):
                model.eval([1000 + i])
        print((time.perf_counter() - start) / (NEW if what == "decode" else 1), flush=True)


def openvino(path: str, threads: int) -> None:
    import numpy as np
    from openvino import Tensor  # type: ignore[import-not-found]
    from openvino_genai import (  # type: ignore[import-not-found]
        GenerationConfig,
        LLMPipeline,
        SchedulerConfig,
        TokenizedInputs,
    )

    scheduler = SchedulerConfig()
    scheduler.enable_prefix_caching, scheduler.cache_size = False, 1
    model = LLMPipeline(path, "CPU", INFERENCE_NUM_THREADS=threads, scheduler_config=scheduler)
    print("ready", flush=True)
    for line in sys.stdin:
        what, tokens = json.loads(line)
        config = GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = NEW + 1 if what == "decode" else 1
        config.ignore_eos, config.do_sample, config.apply_chat_template = True, False, False
        ids = np.array([tokens])
        metrics = model.generate(TokenizedInputs(Tensor(ids), Tensor(np.ones_like(ids))), config).perf_metrics
        print((metrics.get_tpot() if what == "decode" else metrics.get_ttft()).mean / 1e3, flush=True)


PEERS = {"llama.cpp": llama_cpp, "OpenVINO": openvino}


def to_q8_0(source: Path, target: Path) -> None:
    """The same model with 8 bits: every matrix that has fewer, dequantized and rounded by the package gguf."""
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
    from gguf.quants import dequantize, quantize

    reader = GGUFReader(source)
    writer = GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    writer.add_file_type(7)  # which OpenVINO looks for: mostly Q8_0
    for name, value in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        inner = value.types[-1] if value.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, value.contents(), value.types[0], inner)
    for tensor in reader.tensors:
        plain = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if plain.ndim < 2:
            writer.add_tensor(tensor.name, plain)
        else:
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(tensor.name, quantize(plain, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Peer:
    """Another library on one file."""

    def __init__(self, name: str, python: str, path: Path, threads: int) -> None:
        self._process = subprocess.Popen(
            [python, __file__, "--peer", name, "--file", str(path), "--threads", str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() != "ready":
            raise SystemExit(f"{python} does not run {name} on {path}")

    def seconds(self, what: str, tokens: list[int]) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([what, tokens]), file=self._process.stdin, flush=True)
        return float(self._process.stdout.readline())


# ---- quantkit


def decode_of(model: Any, ids: Any, how: str) -> Callable[[], float]:
    """Seconds for a step after the prompt ``ids``, called as generate() calls it; "eager", "captured" or "compiled"."""
    import torch
    from transformers import StaticCache

    from quantkit import CapturedStep

    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + NEW)

    def plain(token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True).logits
        return logits

    makers = {"eager": lambda: plain, "captured": lambda: CapturedStep(plain, model), "compiled": lambda: torch.compile(plain)}
    step: Callable[..., Any] = makers[how]()

    @torch.no_grad()
    def run() -> float:
        if cache.layers[0].is_initialized:
            cache.reset()
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        start = time.perf_counter()
        for i in range(NEW):
            step(torch.tensor([[1000 + i]]), torch.tensor([[ids.shape[1] + i]]))
        return (time.perf_counter() - start) / NEW

    return run


def generate_of(model: Any, ids: Any) -> Callable[[], float]:
    """Seconds for each token of generate() but the first, prompt left out."""
    import torch

    class Clock:
        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: torch.Tensor) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    def run() -> float:
        clock = Clock()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW + 1,
            min_new_tokens=NEW + 1,
            do_sample=False,
            streamer=clock,
        )
        return (clock.times[-1] - clock.times[1]) / (len(clock.times) - 2)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--context", type=int, nargs="+", default=[64, 512], help="tokens before the step; default: 64 512")
    parser.add_argument(
        "--llama-cpp", metavar="PYTHON", help="an interpreter that has llama-cpp-python; left out, so is the peer"
    )
    parser.add_argument("--openvino", metavar="PYTHON", help="an interpreter that has openvino-genai")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of fp32, INT8 and 'INT8, head too'; default: all")
    parser.add_argument("--compiled", action="store_true", help="also what torch.compile makes of a step, after minutes")
    parser.add_argument("--name", default="decode", help="of the file of results; default: decode")
    for name in ("--peer", "--file", "--threads"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        PEERS[args.peer](args.file, int(args.threads))
        return

    import torch
    from common import interleaved, record, spread

    import quantkit
    from quantkit.integrations.transformers.models import SMOLLM2, load_float, smollm2_file

    models: dict[str, Any] = {}
    for name, options in {"fp32": None, "INT8": {}, "INT8, head too": {"heads": True}}.items():
        if args.only and name not in args.only:
            continue
        model = load_float(SMOLLM2)[0]
        model.generation_config.eos_token_id = None
        models[name] = model if options is None else quantkit.quantize(model, "rtn", progress=False, **options)
    captured = quantkit.capture_decoding(quantkit.quantize(load_float(SMOLLM2)[0], "rtn", progress=False, heads=True))
    calls: dict[str, Callable[[], float]] = {}
    generator = torch.Generator().manual_seed(0)
    ids = {n: torch.randint(1000, 40_000, (1, n), generator=generator) for n in (*args.context, PREFILL)}

    def prefill(model: Any) -> Callable[[], float]:
        @torch.no_grad()
        def run() -> float:
            start = time.perf_counter()
            model(input_ids=ids[PREFILL], use_cache=False, logits_to_keep=1)
            return time.perf_counter() - start

        return run

    with tempfile.TemporaryDirectory() as folder:
        for name, model in models.items():
            calls[f"prefill/{name}"] = prefill(model)
            for n in args.context:
                for how in ("eager", "captured", *(["compiled"] if args.compiled else [])):
                    calls[f"decode {n}/{name}, {how}"] = decode_of(model, ids[n], how)
        for n in args.context:
            if "INT8, head too" in models:
                calls[f"generate {n}/INT8, head too, eager"] = generate_of(models["INT8, head too"], ids[n])
                calls[f"generate {n}/INT8, head too, captured"] = generate_of(captured, ids[n])
        to_q8_0(smollm2_file(), Path(folder, "q8_0.gguf"))
        files = {"Q8_0": Path(folder, "q8_0.gguf"), smollm2_file().stem.split(".")[-1]: smollm2_file()}
        for peer, python in {"llama.cpp": args.llama_cpp, "OpenVINO": args.openvino}.items():
            for kind, file in files.items() if python else ():
                other, name = Peer(peer, python, file, torch.get_num_threads()), f"{peer}, {kind}"
                for what, n in (("prefill", PREFILL), *(("decode", n) for n in args.context)):
                    label = "prefill" if what == "prefill" else f"decode {n}"
                    calls[f"{label}/{name}"] = partial(other.seconds, what, ids[n][0].tolist())
        for call in calls.values():  # once without the clock, which also captures steps
            call()
        times = interleaved(calls, args.rounds)
    rows = []
    for key, seconds in times.items():
        what, name = key.split("/")
        rows.append({"what": what, "name": name, "seconds": spread(seconds)})
        print(f"{what:14} {name:30} {1e3 * rows[-1]['seconds']['median']:9.2f} ms", flush=True)
    print("written", record(args.name, rows, prefill=PREFILL, new=NEW, rounds=args.rounds))


if __name__ == "__main__":
    main()
