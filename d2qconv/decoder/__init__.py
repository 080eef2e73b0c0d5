"""The float forward pass of a decoder, block by block, driven by the architecture tables."""
