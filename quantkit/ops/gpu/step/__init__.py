"""Kernels for what lies between the INT8 products of one decoding step: rotary positions, and attention of one token.

Each has the plain arithmetic beside it (``*_reference``), which it is tested against.
"""
