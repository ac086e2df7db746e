"""Let each version of the package compressed-tensors read what export() writes (``make compressed-tensors-matrix``).

Every version is installed without its requirements into a folder of its own, in front of the environment that runs this. All
validate the JSON of the four schemes; those that transformers accepts load the models too, and compute what quantkit computes:
codes taken for weights would be far off.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parents[1]
"""Where ``helpers`` are."""
VERSIONS = ("0.9.0", "0.15.0", "0.17.0", "0.18.0", "0.20.0")
SCHEMES = ("w8a8", "w8a8-asym", "w8a8-static", "w8a8-static-asym")
LOADS_FROM = (0, 15)
"""What transformers asks for."""
CLOSE = 0.1
"""Relative difference of logits: 127 steps or 127.5 to the largest value of a token, through two random layers."""


def write(folder: Path) -> None:
    """A small model by every scheme, and quantkit's logits on some tokens."""
    import torch
    from helpers import llama, tokens
    from safetensors.torch import save_file

    import quantkit

    for scheme in SCHEMES:
        torch.manual_seed(0)
        model = quantkit.quantize(llama(), calibration=[tokens()], scheme=scheme, progress=False)
        quantkit.export(model, folder / scheme)
        with torch.no_grad():
            save_file({"ids": tokens(), "logits": quantkit.load(folder / scheme)(tokens()).logits}, folder / f"{scheme}.said")


def read(folder: Path) -> None:
    """In a process with one version of the package in front."""
    import compressed_tensors
    import torch
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    version = compressed_tensors.__version__
    loads = tuple(int(part) for part in version.split(".")[:2]) >= LOADS_FROM
    for scheme in SCHEMES:
        config = json.loads((folder / scheme / "config.json").read_text())["quantization_config"]
        config.pop("quantkit")  # readers take the keys that they know
        group = QuantizationConfig.model_validate(config).config_groups["group_0"]
        assert group.weights.num_bits == group.input_activations.num_bits == 8
        if not loads:
            print(version, scheme, "validates")
            continue
        said = load_file(folder / f"{scheme}.said")
        model = AutoModelForCausalLM.from_pretrained(folder / scheme)
        with torch.no_grad():
            off = float((model(said["ids"]).logits - said["logits"]).norm() / said["logits"].norm())
        print(version, scheme, f"validates and loads: logits differ by {off:.4f}")
        assert off < CLOSE


def main() -> None:
    versions, failed = sys.argv[1:] or VERSIONS, []
    sys.path.insert(0, str(HERE))
    with tempfile.TemporaryDirectory() as place:
        write(Path(place))
        for version in versions:
            site = Path(place) / f"site-{version}"
            pip = [sys.executable, "-m", "pip", "install", "-q", "--target", str(site)]
            subprocess.run([*pip, "--no-deps", f"compressed-tensors=={version}"], check=True)
            subprocess.run([*pip, "pydantic>=2", "loguru", "frozendict"], check=True)
            paths = [str(site), str(HERE), os.environ.get("PYTHONPATH", "")]
            env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
            command = [sys.executable, __file__, "--read", place]
            failed += [] if subprocess.run(command, env=env).returncode == 0 else [version]
    print("failed with compressed-tensors", *failed) if failed else print("read by every version")
    sys.exit(bool(failed))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--read"]:
        read(Path(sys.argv[2]))
    else:
        main()
