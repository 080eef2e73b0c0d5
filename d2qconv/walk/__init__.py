"""The walk: quantize a model block by block, each on what the quantized blocks before it really produce."""
