"""Finding out how a model is connected by running it, with no list of architectures.

To quantize a linear well, one wants to scale, shift, reorder or rotate the channels of its input, and to have another module do
that for nothing: the norm or the linear that writes these channels. Which module that is, and whether something else reads the
channels too and would be disturbed, is not written in the model in any form that code could read. But it can be observed.

**What is asked.** The :mod:`.probe` runs the model with every linear replaced by one that puts out made-up values, so that a
change stops at the next linear. Then questions are asked by changing something and looking at where it arrives:

* :mod:`.prober` multiplies the output rows of each norm and linear by powers of two. Where exactly these multipliers arrive,
  channel by channel, and nothing else changes, the *producer* of a linear's input is found, with the row behind each channel.
* :mod:`.orders` shuffles rows: which linears *carry* the order of the channels of an input?
* :mod:`.residual` adds vectors and rotates: who writes the residual stream, who reads it, and does it rotate as a whole?
* :mod:`.heads` rotates the rows of value projections: how wide are the heads of attention?
* :mod:`.readers` hides weights: does other code of the model read one?

**What comes out** are values of :mod:`quantkit.core.sites` and :mod:`quantkit.core.spaces`, which later rooms act on: the
linears that read one activation, joined into *sites* (:mod:`.joining`), each with its producer and carriers; the linears that
are better kept in floating point, with the reason (:mod:`.kept`); the residual stream; the value heads.

**What is proven.** A completeness proof is part of each question: if anything in the model changes that should not, the answer
is no. At last everything is rehearsed on the real model and the real batch (:mod:`.rehearsal`), through hooks
(:mod:`.hooks`), and compared with what the model computed before (:mod:`.equivalence`).

The other files are tools: :mod:`.places` (which modules may be asked in one pass), :mod:`.distances` (of two tensors),
:mod:`.layouts` (of fused projections), :mod:`.norms` (what the parameters of a norm do), :mod:`.rotating` (the probe with
rotated outputs).
"""

from quantkit.discovery.discover import discover
from quantkit.discovery.equivalence import Equivalence, verify_equivalence

__all__ = ["Equivalence", "discover", "verify_equivalence"]
