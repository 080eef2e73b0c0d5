"""Checkpoints that other tools quantized: GPTQ, AWQ, compressed-tensors, AutoRound.

::

    config.json, arrays  →  `read`: of every quantized linear its shape, bits, groups, codes (one module a dialect)
                         →  `checkpoint`: the same model as a checkpoint of floats, decoded when loaded
                         →  `linears`: codes and parameters as they are, on the affine grid that they are on
"""
