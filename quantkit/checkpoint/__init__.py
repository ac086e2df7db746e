"""Checkpoints: a quantized model as a folder of files, and back to the same bits.

A checkpoint is a folder::

    model-00001-of-00001.safetensors    every tensor: int8 codes, float32 scales, the rest in the dtype of the model
    quantkit.json                       the record: the layers, the report, and the SHA-256 of each file and of itself
    ...                                 whatever the caller writes beside them, such as a configuration or a tokenizer

Three promises hold. The folder appears whole or not at all, so that a crash leaves no half checkpoint behind. Nothing in it is
ever executed: there is no pickle, and every key, name, shape and size is checked before a model is touched. And saving or
loading needs little more memory than the model itself, because tensors are written and read one by one.

Each file of this room has one trade:

- ``files`` makes folders that appear whole, hashes files, and refuses names and links that lead out of a folder;
- ``tensors`` reads and writes safetensors files, one tensor at a time;
- ``record`` knows what ``quantkit.json`` says, in every version that can be read;
- ``save`` and ``load`` put the three together for models, and ``plans`` does for plans.

This room knows modules and files and no other library. It does not build models either: :func:`quantkit.load` does, in
``integrations``, and hands an empty one to :func:`quantkit.checkpoint.load.fill`.
"""
