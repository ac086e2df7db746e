"""W8A8 post-training quantization: INT8 weights and INT8 activations for PyTorch models.

>>> import quantkit
>>> model = quantkit.quantize(model, method="smoothquant")
>>> quantkit.save(model, "out/")
>>> model = quantkit.load("out/")
"""

from quantkit.calibrators import RTN, SmoothQuant
from quantkit.linear import W8A8Linear
from quantkit.pipeline import quantize
from quantkit.report import Report, report
from quantkit.scheme import Scheme
from quantkit.transform import Rotation, Transform
from quantkit.discovery import Equivalence, verify_equivalence
