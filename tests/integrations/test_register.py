"""transformers learns of quantkit when it is asked to or when quantkit has a model of transformers, and never by an import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import llama, tokens
from transformers import AutoModelForCausalLM
from transformers.quantizers import auto

import quantkit


def run(code: str) -> str:
    """What code prints in a fresh process."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


TABLE = "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as table; "


def test_an_import_changes_nothing() -> None:
    code = "import sys, torch; before = list(sys.meta_path); import quantkit; print(sys.meta_path == before); "
    assert run(code + TABLE + "print('quantkit' in table)").split() == ["True", "False"]
    assert run(TABLE + "import quantkit; print('quantkit' in table)").split() == ["False"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model, as quantkit saves it and as transformers does."""
    root = tmp_path_factory.mktemp("saved")
    model = quantkit.quantize(llama(), calibration=[tokens()], progress=False)
    quantkit.save(model, root / "own")
    model.save_pretrained(root / "theirs")
    return root


@pytest.mark.parametrize(
    "how",
    [
        "quantkit.register_with_transformers()",
        "quantkit.QuantKitConfig",
        "quantkit.compressed_tensors_as_int8().__enter__()",
        "quantkit.load(folder)",
    ],
)
def test_a_folder_of_save_pretrained_opens_afterwards(how: str, folders: Path) -> None:
    code = f"""
import quantkit; folder = {str(folders / "own")!r}; {how}
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(folders / "theirs")!r})
print(sum(isinstance(m, quantkit.W8A8Linear) for m in model.modules()))
"""
    assert run(code).split() == ["14"]


def test_twice_is_no_harm(tmp_path: Path) -> None:
    quantkit.register_with_transformers()
    before = dict(auto.AUTO_QUANTIZER_MAPPING)
    quantkit.register_with_transformers()
    assert before == auto.AUTO_QUANTIZER_MAPPING


def test_without_transformers() -> None:
    code = """
import sys; sys.modules["transformers"] = None
import quantkit, torch
try: quantkit.register_with_transformers()
except ImportError as error: print(error)
model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 16))
print(type(quantkit.quantize(model, calibration=[torch.randn(2, 16)], progress=False)[0]).__name__)
"""
    says, made = run(code).splitlines()
    assert says.startswith("quantkit.register_with_transformers: pip install 'quantkit-w8a8[transformers]'")
    assert made == "W8A8Linear"


def test_models_of_other_libraries_import_no_transformers() -> None:
    code = """
import sys, torch, quantkit
model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 16))
quantkit.quantize(model, calibration=[torch.randn(2, 16)], progress=False)
print("transformers" in sys.modules)
"""
    assert run(code).split() == ["False"]


def test_a_model_in_floating_point_is_left_alone(tmp_path: Path) -> None:
    model = quantkit.quantize(llama(), calibration=[tokens()], scheme=None, progress=False)
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is type(model)
