"""W8A8 post-training quantization: INT8 weights and INT8 activations for PyTorch models.

>>> import quantkit
>>> model = quantkit.quantize(model, method="smoothquant")
>>> quantkit.save(model, "out/")
>>> model = quantkit.load("out/")
"""

from quantkit._version import __version__
from quantkit.calibration.statistics import Range, Statistic, TokenSample
from quantkit.calibrators import (
    GPTQ,
    RPTQ,
    RTN,
    Calibrator,
    Codes,
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
from quantkit.checkpoint.load import load, save
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
from quantkit.core.progress import Progress
from quantkit.core.report import LayerRecord, Report, report
from quantkit.core.rotation import Rotation
from quantkit.core.scheme import Scheme
from quantkit.core.sites import Carriers, Discovery, Producer, Site
from quantkit.core.transform import Transform
from quantkit.discovery import Equivalence, discover, verify_equivalence
from quantkit.integrations import compressed_tensors_as_int8
from quantkit.integrations import register_with_transformers as _register
from quantkit.integrations.compressed.export import export
from quantkit.layers.linear import W8A8Linear
from quantkit.ops.table import Backend, backends, register_backend, use_backend
from quantkit.pipeline.quantize import quantize
from quantkit.pipeline.recipe import Recipe

__all__ = [
    "GPTQ", "RPTQ", "RTN", "BackendError", "CalibrationError", "Calibrator", "Carriers", "CheckpointError", "Codes",
    "Discovery", "Equivalence", "EquivalenceError", "Hadamard", "Hessian", "LLMInt8", "LayerRecord", "MethodError",
    "ModelError", "OmniQuant", "PerSite", "Plan", "PluginError", "Producer", "Progress", "QuantkitError", "Range", "Recipe",
    "Report", "Rotate", "Rotation", "Scheme", "SchemeError", "Site", "SiteView", "SmoothQuant", "Stage", "Statistic",
    "TargetError", "TokenSample", "Transform", "View", "W8A8Linear", "__version__", "backends", "compressed_tensors_as_int8",
    "discover", "export", "load", "quantize", "register_method", "report", "save", "use_backend", "verify_equivalence",
]  # fmt: skip

_register()


def __getattr__(name: str) -> object:
    if name == "QuantKitConfig":  # not in __all__: it needs transformers, and takes the seconds of importing it
        try:
            from quantkit.integrations.transformers.quantizer import QuantKitConfig
        except ImportError as error:
            raise ImportError(f"quantkit.QuantKitConfig: pip install 'quantkit-w8a8[transformers]' ({error})") from error
        return QuantKitConfig
    raise AttributeError(f"module 'quantkit' has no attribute {name!r}")
