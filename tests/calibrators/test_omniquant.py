"""OmniQuant: its gradient, that what is trained is what runs, the guard, and a kill in the middle that changes no bit."""

from __future__ import annotations

import copy
import logging
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from helpers import assert_same, llama, mlp, normal, state, tokens
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import quantkit
from quantkit import GPTQ, LLMInt8, MethodError, OmniQuant, PerSite, SmoothQuant, Stage, Transform
from quantkit.calibration.blocks import record_calls
from quantkit.calibrators.learned import rounding
from quantkit.calibrators.learned.layers import Block
from quantkit.calibrators.learned.omniquant import distance
from quantkit.calibrators.learned.rounding import RoundRows, round_activation, round_symmetric
from quantkit.core.formats import Int, PerToken, Quantized
from quantkit.core.numerics import qmax

pytestmark = pytest.mark.usefixtures("found_once")

BATCHES = [tokens(2, 24, seed=i) for i in range(8)]


class Chain(nn.Module):
    """Residual blocks that no library knows."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(mlp(outliers=True) for _ in range(depth))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def chain_data(count: int = 16) -> list[Tensor]:
    return [normal(1, 20, 16, seed=i) for i in range(count)]


def learn(model: nn.Module, method: Any = "omniquant", batches: Any = None, **options: Any) -> nn.Module:
    options = {"scheme": "w4a4"} | options
    return quantkit.quantize(model, method, calibration=batches or BATCHES, progress=False, **options)


def errors(model: nn.Module) -> list[tuple[float, float]]:
    """Held-out error of each site's block, before and after."""
    notes = [layer.notes["block error"] for layer in quantkit.report(model).layers if "block error" in layer.notes]
    return [tuple(map(float, note.split(" -> "))) for note in notes]


# ---- the gradient


def smooth(x: Tensor, scale: Tensor, offset: Tensor, codes: Tensor, inside: Tensor) -> Tensor:
    """What rounding is between two steps: its offset and the values beyond the grid stay what they were."""
    return torch.where(inside, x / scale + offset, codes) * scale


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 8])
def test_gradient_is_that_of_the_smooth_part(bits: int, symmetric: bool) -> None:
    """Against central differences in float64, for every scale and every clipping."""
    torch.manual_seed(1)
    x, w = torch.randn(7, 6).double(), torch.randn(5, 6).double()
    x[:, 2] *= 10
    log_scale, steps = torch.randn(6).double() * 0.3, torch.full((5, 1), 0.3).double() * qmax(bits)
    readout = torch.randn(7, 5).double()
    own = Quantized(Int(bits, symmetric), PerToken())

    def forward(log_scale: Tensor, steps: Tensor) -> Tensor:
        xs, ws = x / log_scale.exp(), w * log_scale.exp()
        share = 1 - steps / qmax(bits)
        if symmetric:
            return ((RoundRows.apply(xs, None, bits) @ RoundRows.apply(ws, share, bits).T) * readout).sum()
        ends = xs.amin(1, keepdim=True), xs.amax(1, keepdim=True)
        q = round_symmetric(ws, ws.abs().amax(1, keepdim=True) * share, bits)
        return ((round_activation(xs, own, *ends) @ q.T) * readout).sum()

    def parts(log_scale: Tensor, steps: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Values, scales and zeros of both sides, in float64."""
        xs, ws = x / log_scale.exp(), w * log_scale.exp()
        if symmetric:
            x_scale = xs.abs().amax(1, keepdim=True) / qmax(bits)
            zero = torch.zeros_like(x_scale)
        else:
            low, high = xs.amin(1, keepdim=True).clamp_max(0), xs.amax(1, keepdim=True).clamp_min(0)
            x_scale = (high - low) / (2**bits - 1)
            zero = torch.round(-(qmax(bits) + 1) - low / x_scale).detach()
        w_scale = ws.abs().amax(1, keepdim=True) * (1 - steps / qmax(bits)) / qmax(bits)
        return [(xs, x_scale, zero), (ws, w_scale, torch.zeros_like(w_scale))]

    frozen = []
    for (v, s, zero), even in zip(parts(log_scale, steps), (symmetric, True), strict=True):
        top, bottom = qmax(bits), -qmax(bits) - (not even)
        wanted = torch.round(v / s) + zero
        frozen.append((torch.round(v / s) - v / s, wanted.clamp(bottom, top) - zero, (wanted >= bottom) & (wanted <= top)))
    assert not frozen[1][2].all(), "some weight has to be clipped"

    def reference(log_scale: Tensor, steps: Tensor) -> Tensor:
        (xs, sx, _), (ws, sw, _) = parts(log_scale, steps)
        return ((smooth(xs, sx, *frozen[0]) @ smooth(ws, sw, *frozen[1]).T) * readout).sum()

    got = torch.autograd.grad(forward(*(leaves := [log_scale.requires_grad_(), steps.requires_grad_()])), leaves)
    with torch.no_grad():
        torch.testing.assert_close(forward(*leaves), reference(*leaves), rtol=1e-5, atol=1e-5)
        for which, gradient in enumerate(got):
            for index in range(gradient.numel()):
                ends = []
                for h in (1e-6, -1e-6):
                    moved = [leaf.clone() for leaf in leaves]
                    moved[which].view(-1)[index] += h
                    ends.append(reference(*moved))
                numeric = float(ends[0] - ends[1]) / 2e-6
                assert float(gradient.view(-1)[index]) == pytest.approx(
                    numeric, rel=1e-4, abs=1e-4 * float(gradient.abs().max())
                )


@given(st.integers(1, 6), st.integers(1, 40), st.sampled_from([2, 4, 8]), st.booleans(), st.integers(0, 99))
def test_rows_are_rounded_as_anything_is(rows: int, columns: int, bits: int, clipped: bool, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(2, rows, columns, generator=random)
    x[0, 0] = 0
    share = torch.rand(rows, 1, generator=random) * 0.9 + 0.1 if clipped else torch.ones(rows, 1)
    weights = torch.randn(2, rows, columns, generator=random)
    found = []
    for function in (
        lambda x, share: RoundRows.apply(x, share, bits),
        lambda x, share: round_symmetric(x, x.abs().amax(-1, keepdim=True) * share, bits),
    ):
        leaves = x.clone().requires_grad_(), share.clone().requires_grad_()
        y = function(*leaves)
        found.append([y, *torch.autograd.grad((y * weights).sum(), leaves)])
    assert torch.equal(found[0][0], found[1][0])
    live = x.abs().amax(-1) > 0  # of equal largest values, zeros here, one has the gradient or all share it
    torch.testing.assert_close(found[0][1][live], found[1][1][live], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-4, atol=1e-5)


def test_compiled_passes_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU large weights take them."""

    def rounded(x: Tensor, share: Tensor | None) -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        y = RoundRows.apply(leaf, share, 4)
        return y, torch.autograd.grad((y * x.cos()).sum(), leaf)[0]

    for x, share in ((torch.randn(9, 40), torch.rand(9, 1) * 0.6 + 0.4), (torch.randn(2, 5, 30), None)):
        with monkeypatch.context() as patch:
            patch.setattr(rounding, "fused", lambda function, x: rounding.compiled(function))
            found = rounded(x, share)
        torch.testing.assert_close(found, rounded(x, share))


# ---- what is trained is what runs


class Spy(OmniQuant):
    """Keeps the trained blocks."""

    blocks: dict[str, Block]

    def _learn(self, block: Block, *args: Any) -> Any:
        out = super()._learn(block, *args)
        kept[block.name] = block
        return out


kept: dict[str, Block] = {}


class Shuffle(PerSite):
    """Renumbers the channels, so that what is learned has to be translated."""

    name, stage = "shuffle", Stage.SCALE

    def plan_site(self, site: Any) -> Any:
        return Transform(permutation=torch.randperm(site.site.channels)), {}


class Shift(PerSite):
    name, stage, statistics = "shift", Stage.SCALE, (quantkit.Range,)

    def plan_site(self, site: Any) -> Any:
        seen = site.statistic(quantkit.Range)
        return Transform(shift=(seen.low + seen.high) / 2), {}


@pytest.mark.parametrize(
    "before",
    [[SmoothQuant()], [], [SmoothQuant(), LLMInt8(4)], [Shuffle()], [Shift()]],
    ids=["smoothquant", "alone", "outliers", "permutation", "shift"],
)
@pytest.mark.parametrize("scheme", ["w8a8", "w4a4", "w4a8-asym", "w8a8-static", "w6a6-pertensor"])
def test_trained_is_exported(scheme: str, before: list[Any]) -> None:
    """The INT8 block returns what the trained one returned, to rounding; how far both are from float is 100 times more."""
    kept.clear()
    model = llama()
    ours = learn(copy.deepcopy(model), [*before, Spy(samples=8)], scheme=scheme)
    assert len(kept) == 2
    _, calls = record_calls(model, tuple(kept), [tokens(1, 24, seed=99)], "cpu")
    x = normal(1, 24, 32, seed=5)
    for way, (name, block) in zip(calls[0], kept.items(), strict=True):
        with torch.no_grad(), block.fixed():
            trained = way.run(block.quantized, x)
            exported = way.run(ours.get_submodule(name), x)
            exact = way.run(block.float, x)
        assert distance(exported, trained) < 1e-2 * distance(trained, exact)


def test_everything_folds() -> None:
    ours = learn(llama())
    layers = [layer for layer in quantkit.report(ours).layers if layer.kind == "int8"]
    assert len(layers) == 14
    assert all(layer.folded_into and not layer.at_run_time for layer in layers)
    assert quantkit.report(ours).method == ["smoothquant", "omniquant"]
    assert quantkit.report(ours).equivalence < 1e-5


# ---- it helps, and never harms


@pytest.mark.parametrize("make", [llama, Chain], ids=["llama", "chain"])
@pytest.mark.parametrize(("scheme", "least"), [("w4a4", 0.97), ("w6a6", 1.0)])
def test_better_than_its_start(make: Any, scheme: str, least: float) -> None:
    """On fresh data, by the output of the whole model.

    Random weights have little to gain at 6 bits, and a block that is nearer is no proof for the whole: small steps are.
    """
    model = make()
    batches, fresh = (BATCHES, tokens(4, 24, seed=77)) if make is llama else (chain_data(), normal(1, 50, 16, seed=77))

    def far(method: Any) -> float:
        ours = learn(copy.deepcopy(model), method, batches, scheme=scheme)
        with torch.no_grad():
            got, wanted = (getattr(m(fresh), "logits", None) if make is llama else m(fresh) for m in (ours, model))
        return float((got - wanted).norm())

    gentle = OmniQuant(epochs=4, scale_lr=5e-3, clip_lr=1e-2)
    assert far([SmoothQuant(), gentle]) < least * far("smoothquant")


@pytest.mark.parametrize("lr", [0.99, 0.005])
def test_a_block_is_never_worse_than_its_start(lr: float) -> None:
    """Even when learning does nothing but harm."""
    ours = learn(llama(), ["smoothquant", OmniQuant(scale_lr=lr, clip_lr=lr)], scheme="w8a8")
    assert len(errors(ours)) == 14
    assert all(after <= before for before, after in errors(ours))


def test_without_learning_it_is_its_start() -> None:
    model = llama()
    ours = learn(copy.deepcopy(model), ["smoothquant", OmniQuant(scale_lr=0, clip_lr=0)])
    assert_same(ours.state_dict(), learn(copy.deepcopy(model), "smoothquant").state_dict())


def test_gptq_takes_the_learned_grid() -> None:
    model = llama()
    plain, rounded = (learn(copy.deepcopy(model), ["omniquant", *last]) for last in ([], [GPTQ()]))
    name = "model.layers.1.mlp.down_proj"
    assert_same(rounded.get_submodule(name).weight_scale, plain.get_submodule(name).weight_scale)
    assert not torch.equal(rounded.get_submodule(name).weight, plain.get_submodule(name).weight)


def test_nothing_touches_the_model_before_it_is_done() -> None:
    """A calibrator after it that fails leaves the model as it was."""

    class Fails:
        name, stage, statistics = "fails", Stage.ROUND, ()

        def plan(self, view: Any) -> Any:
            raise MethodError("on purpose")

    model = llama()
    before = state(model)
    with pytest.raises(MethodError, match="on purpose"):
        learn(model, ["omniquant", Fails()])
    after = state(model)
    assert_same(after["bits"], before["bits"])
    assert after["modules"] == before["modules"]


class Offsets(Chain):
    """What norms write has a mean of its own in every channel, up to 20 times its deviation."""

    def __init__(self) -> None:
        super().__init__(2)
        with torch.no_grad():
            for i, block in enumerate(self.blocks):
                block.norm.weight.fill_(1)
                block.norm.bias.copy_(20 * normal(16, seed=i))


@pytest.mark.parametrize("scheme", ["w8a8", "w4a4", "w8a8-static", "w8a8-asym"])
def test_shifts_are_learned_and_fold(scheme: str) -> None:
    """Into the bias of the norm; not through the curve between up and down."""
    model = Offsets()
    with_shifts, without = (
        learn(copy.deepcopy(model), OmniQuant(shift_lr=lr), chain_data(), scheme=scheme) for lr in (1e-2, 0.0)
    )
    for block in range(2):
        better, worse = (errors(learned)[2 * block][1] for learned in (with_shifts, without))
        assert better < (1 if scheme == "w8a8-asym" else 0.9) * worse
    assert all(layer.at_run_time == [] for layer in quantkit.report(with_shifts).layers)
    assert not torch.equal(with_shifts.blocks[0].norm.bias, model.blocks[0].norm.bias)
    site = {site.name: site for site in quantkit.discover(model, chain_data()[0]).sites}
    assert site["blocks.0.up"].producer.bias == "bias"
    assert site["blocks.0.down"].producer.bias is None


def test_shifts_are_read_back(tmp_path: Path) -> None:
    model = Offsets()
    whole = learn(copy.deepcopy(model), OmniQuant(folder=tmp_path), chain_data())
    (tmp_path / "0001.safetensors").unlink()
    again = learn(model, OmniQuant(folder=tmp_path), chain_data())
    assert_same(state(again)["bits"], state(whole)["bits"])


def test_float_model_only_folds() -> None:
    model = llama()
    with torch.no_grad():
        wanted = model(tokens()).logits
    learn(model, "omniquant", scheme=None)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_floating_point(dtype: torch.dtype) -> None:
    ours = learn(llama().to(dtype), scheme="w4a8")
    assert all(after <= before for before, after in errors(ours))
    assert ours(tokens()).logits.dtype == dtype
    with_biases = learn(Chain().to(dtype), ["smoothquant", OmniQuant()], [x.to(dtype) for x in chain_data()])
    assert all(after <= before for before, after in errors(with_biases))
    assert with_biases(chain_data()[0].to(dtype)).dtype == dtype


@pytest.mark.parametrize(
    "name", ["bert", "gpt-neox", "gemma3", "mixtral", "qwen3-next", "deepseek-v3", "nanogpt", "encoder-pre-norm", "jamba"]
)
def test_architectures(name: str) -> None:
    """Post-norm, parallel branches, masks that differ between blocks, experts, linear attention, none of transformers, fused
    paths of torch, and blocks of two classes."""
    family = FAMILIES[name]
    ours = learn(family.build(), ["smoothquant", OmniQuant(epochs=1), "gptq"], [family.batch()] * 3, scheme="w4a8")
    found = errors(ours)
    assert len(found) >= sum(layer.kind == "int8" for layer in quantkit.report(ours).layers)
    assert all(after <= before for before, after in found)


# ---- going on after a kill

SCRIPT = """
import logging, os, signal, sys
sys.path[:0] = {path!r}
from test_omniquant import learn, llama
import torch
from quantkit import OmniQuant
class Kill(logging.Handler):
    def emit(self, record):
        if "model.layers.1," in record.getMessage(): os.kill(os.getpid(), signal.SIGKILL)
logging.getLogger("quantkit").setLevel(logging.INFO)
logging.getLogger("quantkit").addHandler(Kill())
torch.manual_seed(0)
torch.set_num_threads({threads})
learn(llama(num_hidden_layers=3), ["smoothquant", OmniQuant(folder={folder!r})])
"""


def test_kill_and_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """SIGKILL while block 2 is at work: two blocks are read back, one is learned, and not a bit differs."""
    folder = str(tmp_path / "work")
    script = SCRIPT.format(
        path=[str(Path(__file__).parent), str(Path(__file__).parents[1])], folder=folder, threads=torch.get_num_threads()
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert sorted(p.name for p in Path(folder).iterdir()) == ["0000.safetensors", "0001.safetensors"]
    (Path(folder) / "0002.new").write_bytes(b"half a file")

    torch.manual_seed(0)
    model = llama(num_hidden_layers=3)
    with caplog.at_level(logging.INFO, "quantkit"):
        ours = learn(copy.deepcopy(model), ["smoothquant", OmniQuant(folder=folder)])
    said = [r.getMessage() for r in caplog.records if "held-out" in r.getMessage()]
    assert [bool(re.search("read back", s)) for s in said] == [True, True, False]
    whole = learn(copy.deepcopy(model), "omniquant")
    assert_same(ours.state_dict(), whole.state_dict())
    assert quantkit.report(ours).to_dict() == quantkit.report(whole).to_dict()  # a folder is no part of the recipe


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A model, and the folder of a run on it."""
    model, folder = llama(), tmp_path_factory.mktemp("work")
    learn(copy.deepcopy(model), ["smoothquant", OmniQuant(folder=folder)])
    return model, folder


@pytest.mark.parametrize("change", ["weights", "options", "data", "seed", "scheme"])
def test_another_run_in_the_folder_is_refused(learned: tuple[nn.Module, Path], change: str) -> None:
    model, folder = copy.deepcopy(learned[0]), learned[1]
    options: dict[str, Any] = {"epochs": 1} if change == "options" else {}
    more: dict[str, Any] = {"scheme": {"scheme": "w4a8"}, "seed": {"seed": 1}}.get(change, {})
    if change == "weights":
        model.model.layers[1].mlp.down_proj.weight.data[0, 0] += 1
    batches = [b.flip(0) for b in BATCHES] if change == "data" else BATCHES
    with pytest.raises(MethodError, match="another run"):
        learn(model, ["smoothquant", OmniQuant(folder=folder, **options)], batches, **more)


def test_a_damaged_file_is_told(learned: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model, folder = copy.deepcopy(learned[0]), shutil.copytree(learned[1], tmp_path / "work")
    file = folder / "0001.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(MethodError, match="is damaged"):
        learn(model, ["smoothquant", OmniQuant(folder=folder)])


def test_the_place_of_hidden_states_changes_nothing() -> None:
    model = llama()
    one, *others = (
        learn(copy.deepcopy(model), ["smoothquant", OmniQuant(offload=place, epochs=2)]).state_dict()
        for place in ("device", "cpu", "disk")
    )
    for other in others:
        assert_same(other, one)


# ---- blocks


@pytest.mark.parametrize("model", [mlp(), nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))], ids=["one", "mixed"])
def test_no_blocks(model: nn.Module) -> None:
    with pytest.raises(MethodError, match="no blocks were found"):
        learn(model, "omniquant", chain_data())


class Crossed(Chain):
    """Its blocks read what another layer made of it."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x).tanh()
        return self.head(x)


class Partial(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks[1](self.blocks[0](x)))


@pytest.mark.parametrize(("kind", "message"), [(Crossed, "they are no chain"), (Partial, "2 of 3 blocks ran")])
def test_blocks_that_are_no_chain(kind: Any, message: str) -> None:
    with pytest.raises(MethodError, match=message):
        learn(kind(), "omniquant", chain_data(), ignore=["blocks.2.*"])


def test_one_sample_is_not_enough() -> None:
    with pytest.raises(MethodError, match="at least two"):
        learn(Chain(), "omniquant", [normal(1, 20, 16)])


@pytest.mark.parametrize(
    "options",
    [{"samples": 1}, {"samples": 2.0}, {"epochs": 0}, {"epochs": True}, {"scale_lr": -1}, {"clip_lr": 1}, {"offload": "gpu"}],
)
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(MethodError, match="OmniQuant"):
        OmniQuant(**options)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (["hadamard", "omniquant"], "a rotation mixes channels"),
        (["gptq", "omniquant"], "rounding comes last"),
        (["omniquant", LLMInt8(4)], "put llm_int8 first"),
        (["omniquant", "smoothquant"], "put smoothquant first|smoothquant twice"),
    ],
)
def test_orders_that_make_no_sense(method: Any, message: str) -> None:
    with pytest.raises(MethodError, match=message):
        learn(llama(), method)
