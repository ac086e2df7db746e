"""W8A8 post-training quantization: INT8 weights and INT8 activations for PyTorch models.

>>> import quantkit
>>> model = quantkit.quantize(model, method="smoothquant")
>>> quantkit.save(model, "out/")
>>> model = quantkit.load("out/")

This file is the list of the public names, and the one place where the rooms of the package are connected. Importing it imports
torch and nothing heavier, and changes nothing outside of quantkit.
"""

from quantkit._version import __version__
from quantkit.calibration.statistics import Range, Statistic, TokenSample
from quantkit.calibrators import (
    GPTQ,
    RPTQ,
    RTN,
    Calibrator,
    Hadamard,
    Hessian,
    LLMInt8,
    OmniQuant,
    PerSite,
    Plan,
    Rotate,
    SiteView,
    SmoothQuant,
    Stage,
    View,
    register_method,
)
from quantkit.capture.step import CapturedStep
from quantkit.checkpoint.plans import load_plan, save_plan
from quantkit.core.errors import (
    BackendError,
    CalibrationError,
    CheckpointError,
    EquivalenceError,
    MethodError,
    ModelError,
    PluginError,
    QuantkitError,
    SchemeError,
    TargetError,
)
from quantkit.core.plan import Codes, ModelPlan
from quantkit.core.progress import Progress
from quantkit.core.report import LISTENERS as _LISTENERS
from quantkit.core.report import LayerRecord, Report, Verification, report
from quantkit.core.rotation import Rotation
from quantkit.core.scheme import Scheme
from quantkit.core.sites import Carriers, Discovery, Producer, Site
from quantkit.core.transform import Transform
from quantkit.discovery import Equivalence, discover, verify_equivalence
from quantkit.integrations.compressed.export import export
from quantkit.integrations.compressed.folder import compressed_tensors_as_int8
from quantkit.integrations.folders import load, save
from quantkit.integrations.transformers.decoding import capture_decoding, release_decoding
from quantkit.integrations.transformers.register import count_parameters as _count_parameters
from quantkit.integrations.transformers.register import prepare_for_saving as _prepare_for_saving
from quantkit.integrations.transformers.register import register_with_transformers
from quantkit.layers.adapted import watch_adapters as _watch_adapters
from quantkit.layers.linear import W8A8Linear
from quantkit.layers.norm import fuse_norms, unfuse_norms
from quantkit.ops.table import Backend, backends, register_backend, use_backend, why_simulated
from quantkit.pipeline.plans import convert, plan
from quantkit.pipeline.quantize import quantize
from quantkit.pipeline.recipe import Recipe

__all__ = [
    "Backend", "BackendError", "CalibrationError", "Calibrator", "CapturedStep", "Carriers", "CheckpointError", "Codes",
    "Discovery", "Equivalence", "EquivalenceError", "GPTQ", "Hadamard", "Hessian", "LLMInt8", "LayerRecord", "MethodError",
    "ModelError", "ModelPlan", "OmniQuant", "PerSite", "Plan", "PluginError", "Producer", "Progress", "QuantkitError", "RPTQ",
    "RTN", "Range", "Recipe", "Report", "Rotate", "Rotation", "Scheme", "SchemeError", "Site", "SiteView", "SmoothQuant",
    "Stage", "Statistic", "TargetError", "TokenSample", "Transform", "Verification", "View", "W8A8Linear", "__version__",
    "backends", "capture_decoding", "compressed_tensors_as_int8", "convert", "discover", "export", "fuse_norms", "load",
    "load_plan", "plan", "quantize", "register_backend", "register_method", "register_with_transformers", "release_decoding",
    "report", "save", "save_plan", "unfuse_norms", "use_backend", "verify_equivalence", "why_simulated",
]  # fmt: skip

_LISTENERS.extend([_prepare_for_saving, _count_parameters, _watch_adapters])
__path__.append(f"{__path__[0]}/_old")  # modules that have moved since the last version


def __getattr__(name: str) -> object:
    if name == "QuantKitConfig":  # not in __all__: it needs transformers, and takes the seconds of importing it
        register_with_transformers()
        from quantkit.integrations.transformers.quantizer import QuantKitConfig

        return QuantKitConfig
    raise AttributeError(f"module 'quantkit' has no attribute {name!r}")
