"""Measures of a quantized model beside the model it was made from.

``perplexity`` compares two language models on the same text by what they predict, ``pictures`` draws what a linear reads
before and after quantization. They only look: no model is changed.
"""
