"""From activations to INT8 codes.

A request says what is wanted (:mod:`.request`), the door chooses a kernel (:mod:`.door`), and :mod:`.kernels` says of each what
it takes and launches it. Device code is in :mod:`.portable`, :mod:`.rows` and :mod:`.order`, sizes are in :mod:`.shapes`.
"""
