"""Bridges to other libraries: transformers, PEFT through it, and the engines that read the compressed-tensors layout.

Importing this room imports none of those libraries, and importing quantkit changes nothing in them. What needs transformers
imports it when it is called. transformers itself learns of quantkit by :func:`quantkit.register_with_transformers` and no
sooner; whatever of quantkit's has a model of transformers in its hands calls this by itself.

- ``folders`` has the public ``save`` and ``load``, which know both layouts: quantkit's own and compressed-tensors.
- ``transformers/`` makes models out of ``config.json`` and writes it (``files``), registers (``register``), is the quantizer
  behind ``from_pretrained`` and ``save_pretrained`` (``quantizer``), knows what files call the tensors of a model (``names``),
  and finds models for the command line (``models``).
- ``compressed/`` knows the layout as JSON (``layout``), writes it (``export``), looks at folders of it from strangers
  (``folder``) and runs them (``load``).

The room stands above ``checkpoint``, which knows no library but safetensors.
"""
