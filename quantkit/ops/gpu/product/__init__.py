"""From INT8 codes to a result.

A request says what is wanted (:mod:`.request`), the door chooses a kernel and its setting (:mod:`.door`), and :mod:`.kernels`
says of each what it takes and launches it. Device code is in :mod:`.portable`, :mod:`.vector`, :mod:`.many` and :mod:`.few`,
settings are in :mod:`.tiles` and :mod:`.tuned`.
"""
