"""Turn a Hugging Face language model into a verified low-bit package."""

__version__ = "0.1.0"
