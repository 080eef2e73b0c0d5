"""The real files that are corrupted: small models, tokenizers, packages, work directories, by our own writers."""

from __future__ import annotations

import atexit
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests" / "shared"))

import msgspec  # noqa: E402
import numpy as np  # noqa: E402
import sentencepiece  # noqa: E402
import torch  # noqa: E402
from foreign_models import Scheme, make_foreign  # noqa: E402
from random_models import PROVENANCE, make_desc, quantized  # noqa: E402
from report_samples import large, sample, whole  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402

from d2qconv.arch.bind import bind  # noqa: E402
from d2qconv.arch.spec import Dims, ModelDesc  # noqa: E402
from d2qconv.checkpoint.open import Checkpoint, open_checkpoint  # noqa: E402
from d2qconv.exporters.base import Carrier, silent  # noqa: E402
from d2qconv.ir.importance import Importance  # noqa: E402
from d2qconv.ir.model import QuantizedModel  # noqa: E402
from d2qconv.ir.store import Store  # noqa: E402
from d2qconv.ir.workdir import write_measured, write_tokens  # noqa: E402
from d2qconv.names import Role, TensorId  # noqa: E402
from d2qconv.report.schema import encode  # noqa: E402
from d2qconv.testing.models import make_checkpoint  # noqa: E402
from d2qconv_gguf import GgufOptions, imatrix  # noqa: E402
from d2qconv_gguf.exporter import GgufExporter  # noqa: E402
from d2qconv_gguf.grids import GRIDS  # noqa: E402
from d2qconv_hf import HfOptions  # noqa: E402
from d2qconv_hf.exporter import HfExporter  # noqa: E402
from d2qconv_onnx import OnnxOptions  # noqa: E402
from d2qconv_onnx.exporter import OnnxExporter  # noqa: E402

#: Few tokens: gguf-py takes long for each.
VOCAB = 64
SMALL = Dims(vocab=VOCAB, hidden=64, ffn=64, n_layers=1, n_heads=2, n_kv_heads=1, head=32)
#: For the types whose blocks have 256 columns.
WIDE = Dims(vocab=VOCAB, hidden=256, ffn=256, n_layers=1, n_heads=4, n_kv_heads=2, head=64)
TEXT = (
    "The lighthouse keeper didn't count the ships; he counted the years. In 1987 there were 12,345 of them. "
)
TOKENS_KEY, MEASURED_KEY, FINGERPRINT = "tokens-key", "measured-key", "fingerprint"
NORM = TensorId(Role.ATTN_NORM, 0)


class Notes(msgspec.Struct):
    """What the work directory's parts say."""

    loss: float


@cache
def small_source() -> Checkpoint:
    """A checkpoint with the first tokens of a real tokenizer, and no weights."""
    folder = Path(tempfile.mkdtemp(prefix="d2qconv-fuzz-tokenizer-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    real = ROOT / "tests" / "data" / "tiny-llama-5m"
    parts = json.loads((real / "tokenizer.json").read_text())
    model = parts["model"]
    ordered = sorted(model["vocab"], key=model["vocab"].__getitem__)
    # The special ones, small letters, the letter for a space, and the first that merges make.
    made = [text for text in ordered[256:400] if text.lstrip("Ġ").islower()]
    kept = [*ordered[:3], *map(chr, range(ord("a"), ord("z") + 1)), "Ġ", *made][:VOCAB]
    model["vocab"] = {text: i for i, text in enumerate(kept)}
    pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    model["merges"] = [p for p in pairs if {*p, "".join(p)} <= model["vocab"].keys()]
    (folder / "tokenizer.json").write_text(json.dumps(parts))
    shutil.copy(real / "tokenizer_config.json", folder)
    config = json.loads((real / "config.json").read_text()) | {"vocab_size": VOCAB}
    return Checkpoint(folder, str(folder), "", config, {}, "")


def _model(folder: Path, kind: str, **more: Any) -> Path:
    sizes = {"hidden": 64, "ffn": 64, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 32, "vocab": VOCAB}
    made = make_checkpoint(folder, kind, **(sizes | {"tokenizer": small_source().path} | more))
    (made / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 1], "temperature": 0.7}))
    return made


def checkpoints(root: Path) -> None:
    """A model of every architecture; one in shards, one as it lies in the hub's cache, one with RoPE scaling."""
    llama = _model(root / "llama", "llama", tied=False)
    (llama / "README.md").write_text("---\nlicense: other\nlicense_name: mine\ntags:\n- a\n---\n# A model\n")
    _model(root / "qwen3", "qwen3", shards=3)
    _model(root / "qwen2", "qwen2", attention_bias=True)
    scaled = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    }  # fmt: skip
    _model(root / "scaled", "llama", rope_parameters=scaled)
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    _model(root / "yarn", "mistral", rope_parameters=yarn)
    snapshot = root / "cached" / "models--a--b" / "snapshots" / "0123abc"
    _model(snapshot, "llama", shards=2)
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir()
    for i, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(blobs / f"{i}")
        file.symlink_to(Path("../../blobs") / f"{i}")


def foreign_checkpoints(root: Path) -> None:
    """What other tools quantized, one folder a dialect."""
    schemes = {
        "gptq": (Scheme(4, 32), {}),
        "gptq-v2": (Scheme(3, 32, False), {"version": 2, "config": {"checkpoint_format": "gptq_v2"}}),
        "awq": (Scheme(4, 32, False), {}),
        "auto-round": (Scheme(2, 32, False), {}),
        "compressed-tensors": (Scheme(4, 32, False), {}),
    }
    for name, (scheme, more) in schemes.items():
        method = name.removesuffix("-v2")
        make_foreign(root / name, method, scheme, model={"ffn": 64, "vocab": 64}, **more)


def tokenizers(root: Path) -> None:
    """A byte-level BPE, a SentencePiece model alone, and one beside its tokenizer.json."""
    bpe = root / "bpe"
    _model(bpe, "llama")
    config = json.loads((bpe / "tokenizer_config.json").read_text())
    templates = [{"name": "default", "template": "{{ x }}"}, {"name": "tool", "template": "{{ y }}"}]
    (bpe / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": templates}))
    (bpe / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "<pad>"}}))
    rich = root / "rich"
    shutil.copytree(bpe, rich)
    parts = json.loads((rich / "tokenizer.json").read_text())
    parts["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}]}
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "x", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"x": {"id": "x", "ids": [0], "tokens": ["x"]}},
    }
    parts["post_processor"] = {"type": "Sequence", "processors": [template]}
    (rich / "tokenizer.json").write_text(json.dumps(parts))
    (rich / "additional_chat_templates").mkdir()
    (rich / "chat_template.jinja").write_text("{{ messages }}")
    (rich / "additional_chat_templates" / "tool.jinja").write_text("{{ tools }}")
    alone = root / "sentencepiece"
    _model(alone, "llama", vocab=512)
    (alone / "tokenizer.json").unlink()
    (alone / "tokenizer.model").write_bytes(_sentencepiece())
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (alone / "tokenizer_config.json").write_text(
        json.dumps(names | {"added_tokens_decoder": {"1": {"content": "<s>", "special": True}}})
    )
    (alone / "added_tokens.json").write_text(json.dumps({"<more>": 511}))
    for folder in (bpe, rich, alone):
        (folder / "model.safetensors").unlink()
    both = root / "both"
    shutil.copytree(alone, both)
    (both / "tokenizer.json").write_text(_as_json(_sentencepiece()))


@cache
def _sentencepiece() -> bytes:
    """A BPE model with byte pieces."""
    out = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 4), model_writer=out, model_type="bpe", vocab_size=300,
        normalization_rule_name="identity", byte_fallback=True, remove_extra_whitespaces=False,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return out.getvalue()


def _as_json(model: bytes) -> str:
    """The tokenizer.json that a converter makes of it."""
    library = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [library.id_to_piece(i) for i in range(library.get_piece_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [
        (i, [piece[:cut], piece[cut:]])
        for i, piece in enumerate(pieces)
        for cut in range(1, len(piece))
        if not piece.startswith("<") and piece[:cut] in vocab and piece[cut:] in vocab
    ]
    added = [{"id": i, "content": pieces[i], "special": True, "normalized": False, "single_word": False,
              "lstrip": False, "rstrip": False} for i in range(3)]  # fmt: skip
    steps = [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]
    kinds = {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    return json.dumps({
        "version": "1.0", "added_tokens": added, "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None, "post_processor": None,
        "model": {**kinds, "vocab": vocab, "merges": [merge for _, merge in merges]},
    })  # fmt: skip


def token_files(root: Path) -> None:
    """Calibration of every kind that is a file."""
    ids = np.arange(200) % VOCAB
    for name in ("text", "lines", "array", "tensors"):
        (root / name).mkdir()
    (root / "text" / "c.txt").write_text(TEXT * 20)
    lines = [json.dumps({"text": TEXT, "n": i}) for i in range(20)]
    (root / "lines" / "c.jsonl").write_text("\n".join(lines) + "\n")
    np.save(root / "array" / "c.npy", ids.astype(np.int32))
    save_file({"ids": ids.astype(np.int64).reshape(20, 10)}, root / "tensors" / "c.safetensors")


@cache
def small_model(arch: str, rope: str = "default", *, is_wide: bool = False) -> ModelDesc:
    """A random model of one block, its tensors bf16."""
    return make_desc(arch, rope=rope, dims=WIDE if is_wide else SMALL)


def ggufs(root: Path) -> None:
    """Types with small and with large blocks, floats, a set of files, Llama 3's RoPE, YaRN, a newer type."""
    plans: dict[str, tuple[ModelDesc, GgufOptions]] = {
        "q4_0": (small_model("llama"), GgufOptions(type="q4_0", embedding="q8_0")),
        "k": (
            small_model("qwen3", is_wide=True),
            GgufOptions(
                type="q2_k", embedding="q6_k", tensor_type=("down=iq2_xxs", "v=q4_k", "o=iq3_s", "k=tq2_0")
            ),
        ),
        "floats": (small_model("qwen2", "yarn"), GgufOptions(type="f32", embedding="f16", head="bf16")),
        "set": (
            small_model("llama", "llama3"),
            GgufOptions(type="q4_0", embedding="q8_0", max_shard_size="45kB"),
        ),
        "newer": (small_model("mistral"), GgufOptions(type="q2_0", embedding="q8_0")),
    }
    for name, (desc, options) in plans.items():
        (root / name).mkdir()
        write_gguf(root / name / "m.gguf", desc, options)


def write_gguf(path: Path, desc: ModelDesc, options: GgufOptions) -> None:
    """Plan, round to nearest, write."""
    exporter = GgufExporter(options)
    plan = exporter.plan(desc, Carrier.NONE)
    exporter.write(quantized(desc, plan), small_source(), plan, path, silent)


def base_ggufs(root: Path) -> None:
    """What llama.cpp's converter would make of `small_model`: floats only."""
    for name, options in {"f32": "f32", "bf16": "bf16"}.items():
        (root / name).mkdir()
        write_gguf(root / name / "m.gguf", small_model("llama"), GgufOptions(type=options, embedding="f16"))


def importances(root: Path) -> None:
    """An importance matrix of ours."""
    desc = small_model("llama")
    held = {
        tensor: Importance((tensor.role,), bytes(np.ones(dense.shape[1], "<f4")), 64, 16, is_source=True)
        for tensor, dense in desc.tensors.items()
        if len(dense.shape) == 2 and tensor.block is not None
    }
    (root / "ours").mkdir()
    imatrix.write(root / "ours" / "m.gguf", QuantizedModel(desc, {}, PROVENANCE, held))


def onnx_folders(root: Path) -> None:
    """Packages for ONNX Runtime."""
    plans = {
        "int4": (small_model("llama"), OnnxOptions(type="int4", block_size="32")),
        "int2": (small_model("qwen3", "yarn"), OnnxOptions(type="int2", block_size="32", embedding="int8")),
    }
    for name, (desc, options) in plans.items():
        exporter = OnnxExporter(options)
        plan = exporter.plan(desc, Carrier.BIAS if name == "int4" else Carrier.NONE)
        (root / name).mkdir()
        exporter.write(quantized(desc, plan, shift=0.3), small_source(), plan, root / name, silent)


def hf_folders(exporter: type[HfExporter]) -> Callable[[Path], None]:
    """Packages of one dialect: zero points or none, mixed types where they are held, shards, DAC's biases."""

    def make(root: Path) -> None:
        source = root / "source"
        for name, arch, options, carrier in (
            ("int4", "llama", HfOptions(type="int4", group_size="32"), Carrier.BIAS),
            ("shards", "qwen2", HfOptions(type="int2", group_size="32", max_shard_size="60kB"), Carrier.NONE),
        ):
            checkpoint = open_checkpoint(str(_model(source, arch)))
            desc, writer = bind(checkpoint), exporter(options)
            plan = writer.plan(desc, carrier)
            (root / name).mkdir()
            writer.write(quantized(desc, plan, shift=0.3), checkpoint, plan, root / name, silent)
            shutil.rmtree(source)

    return make


def work_folders(root: Path) -> None:
    """A work directory with tokens, a measurement, two parts and one that changes them; and one of another run."""
    for name, fingerprint in (("same", FINGERPRINT), ("other", "another run's")):
        folder = root / name
        write_tokens(folder, TOKENS_KEY, {"calibration": torch.arange(20), "held_out": torch.arange(9)})
        write_measured(folder, MEASURED_KEY, b'{"kld": [0.1, 0.2]}')
        desc, exporter = small_model("llama"), GgufExporter(GgufOptions(type="q4_0", embedding="q8_0"))
        held = quantized(desc, exporter.plan(desc, Carrier.NONE)).tensors
        with Store(folder, fingerprint, GRIDS) as store:
            for part in ("block-0000", "embed"):
                tensors = {
                    t: h if hasattr(h, "codes") else h.load()
                    for t, h in held.items()
                    if (t.block is None) == (part == "embed")
                }
                store.write(part, tensors, Notes(0.5))
            store.write_changed("scales", {NORM: torch.ones(SMALL.hidden, dtype=torch.bfloat16)}, None)


def reports(root: Path) -> None:
    """Of the least that a run can tell, of everything, and of several blocks."""
    for name, report in {"small": sample("m", 1000, 0.5), "whole": whole(), "large": large()}.items():
        (root / name).mkdir()
        (root / name / "m.report.json").write_bytes(encode(report))


def config_alone(folder: Path, config: dict[str, Any]) -> Checkpoint:
    """A checkpoint without its weights."""
    return Checkpoint(folder, str(folder), "", config, {}, "")
