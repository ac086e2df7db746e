"""What a saved model said to made-up numbers is what it says when it has been opened, or it is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import llama, normal
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import quantkit
from quantkit import CheckpointError
from quantkit.checkpoint.record import digest_of
from quantkit.checkpoint.rerun import CHECK_FILE, SAMPLE
from quantkit.core.numerics import sqnr_db
from quantkit.model.example import made_up

pytestmark = pytest.mark.usefixtures("found_once")

SAME = "gives the same bits"


class Scaled(nn.Module):
    """A model with a number that no checkpoint holds."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.factor = factor

    def forward(self, x: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        y = self.down(self.up(self.norm(x)).relu() * self.factor - 0.1)
        return {"y": y if mask is None else y * mask[..., None], "x": x}


class Noisy(Scaled):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        return super().forward(x + torch.randn_like(x), mask)


def quantized(model: nn.Module, batch: Any = None, **options: Any) -> nn.Module:
    batch = {"x": normal(8, 16)} if batch is None else batch
    return quantkit.quantize(model, "rtn", calibration=[batch], progress=False, **options)


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "quantkit.json").read_text())


def test_a_language_model_gives_the_same_bits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "quantkit")
    model = quantkit.quantize(llama(), progress=False)
    folder = quantkit.save(model, tmp_path / "a")
    again = quantkit.load(folder)
    assert SAME in caplog.messages[-1]
    second = quantkit.save(again, tmp_path / "b")  # an opened model has the same example
    assert record(second)["check"] == record(folder)["check"]
    assert (second / CHECK_FILE).read_bytes() == (folder / CHECK_FILE).read_bytes()


@pytest.mark.parametrize("batch", [{"x": normal(8, 16), "mask": torch.ones(8)}, (normal(8, 16),), normal(8, 16)], ids=type)
def test_batches_of_all_forms(batch: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "quantkit")
    quantkit.load(quantkit.save(quantized(Scaled(), batch), tmp_path / "a"), model=Scaled())
    assert SAME in caplog.messages[-1]


@pytest.mark.parametrize("factor", [0.5, -1.0, float("nan")])
def test_another_model_around_the_layers_is_refused(factor: float, tmp_path: Path) -> None:
    folder = quantkit.save(quantized(Scaled()), tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"from what it said when it was saved.*verify=False"):
        quantkit.load(folder, model=Scaled(factor))
    assert quantkit.load(folder, model=Scaled(factor), verify=False) is not None


def test_a_model_that_does_not_run_or_says_another_shape_is_refused(tmp_path: Path) -> None:
    folder = quantkit.save(quantized(Scaled()), tmp_path / "a")
    broken, longer = Scaled(), Scaled()
    broken.register_forward_pre_hook(lambda module, args: 1 / 0)
    longer.register_forward_hook(lambda module, args, output: output | {"y": output["y"].repeat(2, 1)})
    with pytest.raises(CheckpointError, match=r"does not run \(ZeroDivisionError"):
        quantkit.load(folder, model=broken)
    with pytest.raises(CheckpointError, match="not of the shapes"):
        quantkit.load(folder, model=longer)


@pytest.mark.parametrize("size", [1e-6, 1e-3])
def test_other_arithmetic_is_no_fault(size: float, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Noise far below that of INT8, as between two machines."""
    caplog.set_level(logging.INFO, "quantkit")
    folder, other = quantkit.save(quantized(Scaled()), tmp_path / "a"), Scaled()
    other.down.register_forward_hook(lambda module, args, output: output * (1 + size * normal(*output.shape)))
    quantkit.load(folder, model=other)
    assert "dB from what it said" in caplog.messages[-1]


def test_the_noise_of_int8_is_about_the_bound(tmp_path: Path) -> None:
    original, model = Scaled(), Scaled()
    model.load_state_dict(original.state_dict())
    folder = quantkit.save(quantized(model), tmp_path / "a")
    level = sqnr_db(original(x := normal(64, 16))["y"], model(x)["y"])
    for decibels, opens in ((level + 3, True), (level - 20, False)):
        other = Scaled()

        def shake(module: nn.Module, args: Any, y: Tensor, decibels: float = decibels) -> Tensor:
            return y + normal(*y.shape) * y.pow(2).mean().sqrt() * 10 ** (-decibels / 20)

        other.down.register_forward_hook(shake)
        if opens:
            quantkit.load(folder, model=other)
        else:
            with pytest.raises(CheckpointError):
                quantkit.load(folder, model=other)


def test_no_number_of_the_calibration_data_is_kept(tmp_path: Path) -> None:
    secret = {"x": normal(8, 16), "mask": torch.tensor([1.0, 1, 1, 1, 1, 0, 0, 0])}
    folder = quantkit.save(quantized(Scaled(), secret), tmp_path / "a")
    kept = load_file(folder / CHECK_FILE)
    assert not torch.isin(secret["x"], torch.cat([t.flatten() for t in kept.values()])).any()
    assert torch.equal(kept["input.1"], secret["mask"])


def test_made_up_numbers_have_the_range_of_those_they_stand_for() -> None:
    ids, one, wide = torch.randint(7, 99, (4, 50)), torch.full((3,), 5), torch.tensor([1.0, float("inf"), 3.0])
    flag = torch.tensor([True])
    made = made_up({"ids": ids, "one": one, "wide": wide, "none": None, "empty": torch.zeros(0, 3), "flag": flag})
    assert made["ids"].min() >= ids.min()
    assert made["ids"].max() <= ids.max()
    assert not torch.equal(made["ids"], ids)
    assert torch.equal(made["one"], one)
    assert made["wide"].isfinite().all()
    assert made["none"] is None
    assert made["empty"].shape == (0, 3)
    assert torch.equal(made["flag"], flag)


def test_an_output_is_sampled(tmp_path: Path) -> None:
    folder = quantkit.save(quantized(Scaled(), {"x": normal(1, 40 * 10, 16)}), tmp_path / "a")
    kept = load_file(folder / CHECK_FILE)
    assert all(t.numel() <= SAMPLE for name, t in kept.items() if name.startswith("output"))


@pytest.mark.parametrize(
    ("model", "options", "why"),
    [
        (Scaled(), {"verify": False}, "not run"),
        (Noisy(), {}, "random"),
        (Scaled(), {"batch": {"x": normal(1, 90_000, 16)}}, "MiB"),
    ],
    ids=["not verified", "random", "large"],
)
def test_why_there_is_no_answer(model: nn.Module, options: Any, why: str, tmp_path: Path) -> None:
    folder = quantkit.save(quantized(model, **options), tmp_path / "a")
    assert why in record(folder)["check"]["why_not"]
    assert not (folder / CHECK_FILE).exists()
    quantkit.load(folder, model=type(model)())


FORMS: dict[str, Any] = {
    "no form": {}, "two kinds": {"tensor": 0, "value": 1}, "unknown": {"pickle": "x"}, "no tensor": {"tensor": 7}, "list": [1],
    "not a batch": {"value": 3},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_hostile_forms(form: str, tmp_path: Path) -> None:
    folder = quantkit.save(quantized(Scaled()), tmp_path / "a")
    body = record(folder)
    body.pop("digest")
    body["check"]["input"] = FORMS[form]
    body["digest"] = digest_of(body)
    (folder / "quantkit.json").write_text(json.dumps(body))
    with pytest.raises(CheckpointError):
        quantkit.load(folder, model=Scaled())


def test_a_changed_answer_is_refused_by_its_hash(tmp_path: Path) -> None:
    folder = quantkit.save(quantized(Scaled()), tmp_path / "a")
    kept = load_file(folder / CHECK_FILE)
    save_file({name: t + 1 for name, t in kept.items()}, folder / CHECK_FILE)
    with pytest.raises(CheckpointError, match=CHECK_FILE):
        quantkit.load(folder, model=Scaled())
