"""The bridge to transformers: its models in quantkit's checkpoints, and quantkit in its ``from_pretrained``.

``files`` and ``register`` import transformers when they are called, ``quantizer`` and ``names`` when they are imported.
"""
