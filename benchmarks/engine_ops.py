"""The half of benchmarks/engine.py that runs in the environment of the engine, without quantkit.

python engine_ops.py kernels LAYERS.safetensors OUT.json     vLLM's CPU operators on stored activations
python engine_ops.py transformers MODEL WINDOWS.json OUT.json     plain transformers with the package compressed-tensors
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

TIE = 1e-3
"""How near to a half a quotient must be for two correct programs to round it differently."""


def kernels(source: str) -> list[dict[str, Any]]:
    """Each layer's activations through the engine's operators, against the codes and scales that are stored beside them."""
    from vllm import _custom_ops as ops
    from vllm.platforms import current_platform

    if hasattr(current_platform, "import_kernels"):
        current_platform.import_kernels()
    rows = []
    with safe_open(source, framework="pt") as file:
        for name in sorted({key.rpartition(".")[0] for key in file.keys()}):  # noqa: SIM118  safe_open is no mapping
            part = {key: file.get_tensor(f"{name}.{key}") for key in ("x", "codes", "scale", "weight", "weight_scale")}
            zero = file.get_tensor(f"{name}.zero") if f"{name}.zero" in file.keys() else None  # noqa: SIM118
            rows.append({"layer": name, **_compare(ops, part, zero)})
    return rows


def _compare(ops: Any, part: dict[str, torch.Tensor], zero: torch.Tensor | None) -> dict[str, float]:
    x, weight, weight_scale = part["x"], part["weight"], part["weight_scale"]
    q, scale, point = ops.onednn_scaled_int8_quant(x, None, None, zero is None)
    exact = x.double() / part["scale"].double()
    off = (q.int() - part["codes"].int()).abs()
    tie = ((exact - exact.floor()) - 0.5).abs() < TIE
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype)
    handle = ops.create_onednn_scaled_mm(weight.t(), weight_scale, x.dtype, True, zero is not None, 32)
    sums = weight.t().sum(0, keepdim=True, dtype=torch.float32) * weight_scale.view(1, -1)
    ops.onednn_scaled_mm(handle, q, y, scale, point, sums, None)
    # From the engine's own codes: a code that a tie sent elsewhere is no fault of the product.
    shifted = q.double() if point is None else q.double() - point.double().view(-1, 1)
    wanted = shifted @ weight.double().t() * scale.double().view(-1, 1) * weight_scale.double().view(1, -1)
    return {
        "codes": off.numel(),
        "differ": int((off > 0).sum()),
        "largest": int(off.max()),
        "not_at_a_tie": int(((off > 0) & ~tie).sum()),
        "scale_error": float((scale.double().view(-1) / part["scale"].double().view(-1) - 1).abs().max()),
        "product_error": float((y.double() - wanted).norm() / wanted.norm()),
    }


def plain_transformers(model: str, windows: str) -> dict[str, Any]:
    """Negative log-likelihood of each window, in nats."""
    import compressed_tensors
    import transformers

    net = transformers.AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
    nll = []
    with torch.no_grad():
        for ids in json.loads(Path(windows).read_text()):
            x = torch.tensor([ids])
            logits = net(x).logits[0, :-1].float().log_softmax(-1)
            nll.append(float(-logits.gather(1, x[0, 1:, None]).mean()))
    return {"transformers": transformers.__version__, "compressed_tensors": compressed_tensors.__version__, "nll": nll}


if __name__ == "__main__":
    result = kernels(sys.argv[2]) if sys.argv[1] == "kernels" else plain_transformers(*sys.argv[2:4])
    Path(sys.argv[-1]).write_text(json.dumps(result))
