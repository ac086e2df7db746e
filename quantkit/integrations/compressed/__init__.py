"""INT8 checkpoints in the compressed-tensors layout, which vLLM, SGLang and transformers read and tools such as llm-compressor
write. The package of that name is not needed.
"""
