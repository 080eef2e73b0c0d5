"""Quality of an ONNX package: its logits through ONNX Runtime on the CPU, by the protocol of source_score.py."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
from metrics import Positions
from source_score import F32, I64, Reference

_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def score(reference: Reference, folder: Path, threads: int) -> list[Positions]:
    """One Positions a chunk of the package."""
    return reference.compared(Runner(folder, threads).logits)


class Runner:
    """One package in ONNX Runtime, by the contract of onnxruntime-genai."""

    def __init__(self, folder: Path, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(
            str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        self.inputs = self.session.get_inputs()
        decoder = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
        # The builder leaves the head size of the graph's caches open.
        self.empty = (1, decoder["num_key_value_heads"], 0, decoder["head_size"])

    def logits(self, tokens: I64) -> F32:
        """i64[n] → f32[n, vocab], from an empty cache."""
        known = {
            "input_ids": tokens[None],
            "attention_mask": np.ones((1, len(tokens)), np.int64),
            "position_ids": np.arange(len(tokens), dtype=np.int64)[None],
        }
        feeds = {}
        for i in self.inputs:
            if i.name in known:
                feeds[i.name] = known[i.name]
            else:
                # past_key_values.N.key: [batch, kv_heads, past, head]
                feeds[i.name] = np.zeros(self.empty, _DTYPES[i.type])
        (found,) = self.session.run(["logits"], feeds)
        return found[0].astype(np.float32)
