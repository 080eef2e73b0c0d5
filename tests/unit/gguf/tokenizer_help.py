"""Tokenizers trained on the spot, and stock llama.cpp to hold them against."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from d2qconv.arch.spec import Architecture, Dim, Dims, ModelDesc, Rope
from d2qconv.checkpoint.dense import Dense
from d2qconv.checkpoint.open import Checkpoint
from d2qconv.names import TensorId
from d2qconv_gguf.metadata import KV, model_metadata

CORPUS = [
    "The lighthouse keeper didn't count the ships; he counted the years. In 1987 there were 12,345 of them, "
    "and in 2023 it's 98765 or so. They're fewer now, he'd say, and we'll see what I'VE kept. DON'T ask.",
    'def read(path: str, n: int = 16) -> list[int]:\n    """Read n values."""\n    with open(path, \'rb\') as f:\n'
    "        return [b ^ 0xFF for b in f.read(n)]\n\n\nif __name__ == '__main__':\n\tprint(read('/tmp/x.bin'))\n",
    "Über die Brücke fährt täglich ein Zug nach Zürich, où l'été déjà s'achève. ¿Qué hora es? Žluťoučký kůň.",
    "これは灯台です。船は三十隻あります。今天天气很好，我们去海边散步。한국어 문장도 있습니다. Привет, как дела?",
    "HTTPServer, camelCase, snake_case and CONSTANT_NAME; x=1;y+=2 // done!!! <b>bold</b> $99.99 50% a@b.org #tag",
]
TEXTS = [
    "Hello world",
    " Hello  world",
    "   three spaces",
    "trailing  ",
    "tab\tand\t\ttabs",
    "a\nb\n\nc\n\n\nd",
    "\n",
    " \n ",
    "line\r\nline\r\n\r\nend",
    "  \n\n  \t x",
    "1",
    "12",
    "123",
    "1234",
    "1234567890",
    "3.14159",
    "1,000,000",
    "v1.2.3-rc4",
    "x2y34z567",
    "it's IT'S we'LL they'Re I'VE 'd 'em rock'n'roll",
    "don't DON'T can''t",
    "'s",
    "don’t",
    "HelloWorld HTTPServer camelCase ABC abc aBC",
    "snake_case __init__ --flag",
    "if(x>=10){return y[3];}  // ok!!!",
    "...!?!?",
    "a/b\\c",
    "path/to//file.txt",
    "$100 €200 ¥300",
    "今天天气很好。船は三十隻。한국어",
    "日本語123テスト",
    "Привет, МИР",
    "Ünïcödé straße",
    "naïve café",
    "😀😃 👩‍👩‍👧 🇩🇪",
    "\u3000full\u3000width",
    "a\u00a0b",
    "（全角）！？",
    "x  y   z    w",
    "½ ² Ⅷ ①",
    "\u200bzero\u200bwidth",
    "end\n",
    "  ",
    "\t",
    "a" * 40,
    " " * 20 + "x",
    "<|im_start|>user\nHi<|im_end|>\n",
    "text<|endoftext|>text",
    "<|im_end|><|im_end|>",
    "a <|im_start|> b",
]
#: Combining marks and mixed case beyond ASCII, where llama.cpp's splitters simplify.
MARKS = ["e\u0301te\u0301", "नमस्ते दुनिया", "ÉCOLE École éCole", "ПриветМир", "ﬁ ǅ"]

#: Words that no merge makes, found only if whole words are looked up first.
UNMERGED = ("Hello", "\u0120world", "HelloWorld", "Server", "lighthouse", "\u0120lighthouse")


#: A vocabulary does not keep its model alive.
_KEPT: list[Any] = []


@cache
def greedy_model() -> dict[str, Any]:
    """A byte-level BPE trained without any splitting: it merges across every boundary.

    So a splitter that cuts anywhere else gives other tokens.
    """
    return _trained([])


@cache
def digitless_model() -> dict[str, Any]:
    """The same, but no token holds two digits."""
    return _trained([pre_tokenizers.Digits(individual_digits=True)])


def _trained(steps: list[Any]) -> dict[str, Any]:
    made = Tokenizer(models.BPE())
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([*steps, bytes_only])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=6000, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(TEXTS + MARKS + CORPUS, trainer)
    parts: dict[str, Any] = json.loads(made.to_str())
    vocab = parts["model"]["vocab"]
    for word in UNMERGED:
        vocab.setdefault(word, len(vocab))
    return parts


def split_bpe(
    parts: dict[str, Any], pre_tokenizer: Mapping[str, Any], ignore_merges: bool = False
) -> Tokenizer:
    """That vocabulary behind a pre-tokenizer, with three special tokens and one that is not."""
    model = {**parts["model"], "ignore_merges": ignore_merges}
    made = Tokenizer.from_str(json.dumps({**parts, "model": model, "pre_tokenizer": pre_tokenizer}))
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    made.add_tokens([AddedToken("<tool>", normalized=False)])
    return made


def value(keys: Sequence[KV], key: str) -> Any:
    """The value of one key, None if it is not there."""
    return next((kv.value for kv in keys if kv.key == key), None)


def checkpoint_of(folder: Path, tokenizer: Tokenizer | str | None, **config: Any) -> Checkpoint:
    """A checkpoint that is nothing but a tokenizer."""
    if tokenizer is not None:
        text = tokenizer if isinstance(tokenizer, str) else tokenizer.to_str()
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    if not (folder / "tokenizer_config.json").exists():
        put(folder, "tokenizer_config.json", {"eos_token": "<|endoftext|>"})
    return Checkpoint(folder, "local", "", config, {}, "")


def put(folder: Path, name: str, content: Mapping[str, Any]) -> None:
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


def load(path: Path, keys: Sequence[KV]) -> Any:
    """Write a one-block model with this tokenizer and load it in llama.cpp."""
    from cyllama.llama.llama_cpp import LlamaModel, disable_logging

    desc = tiny_desc(len(value(keys, "tokenizer.ggml.tokens")))
    tensors = {name: np.ones(shape, np.float32) for name, shape in tensor_shapes(desc).items()}
    write_gguf(path, [*model_metadata(desc, layout="llama", file_type=0), *keys], tensors)
    disable_logging()
    _KEPT.append(LlamaModel(str(path)))
    return _KEPT[-1]


def write_gguf(path: Path, keys: Sequence[KV], tensors: Mapping[str, np.ndarray]) -> None:
    writer = GGUFWriter(path, "llama")
    for kv in keys:
        if kv.key != "general.architecture":
            writer.add_key_value(kv.key, kv.value, kv.type, kv.sub_type)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tiny_desc(
    vocab: int, rope: Rope | None = None, tensors: Mapping[TensorId, Dense] | None = None
) -> ModelDesc:
    arch = Architecture("llama", "llama", ("LlamaForCausalLM",), (), (), ())
    dims = Dims(vocab=vocab, hidden=32, ffn=32, n_layers=1, n_heads=2, n_kv_heads=1, head=16)
    return ModelDesc(arch, dims, rope or Rope(1e4), 1e-5, True, 4096, (0,), (0,), tensors or {})


def tensor_shapes(desc: ModelDesc) -> dict[str, tuple[int, ...]]:
    d = desc.dims
    q, kv = d.size(Dim.Q_OUT), d.size(Dim.KV_OUT)
    inner = {
        "attn_norm": (d.hidden,),
        "attn_q": (q, d.hidden),
        "attn_k": (kv, d.hidden),
        "attn_v": (kv, d.hidden),
        "attn_output": (d.hidden, q),
        "ffn_norm": (d.hidden,),
        "ffn_gate": (d.ffn, d.hidden),
        "ffn_up": (d.ffn, d.hidden),
        "ffn_down": (d.hidden, d.ffn),
    }
    outer = {"token_embd.weight": (d.vocab, d.hidden), "output_norm.weight": (d.hidden,)}
    return outer | {f"blk.0.{name}.weight": shape for name, shape in inner.items()}


def llama_vocab(path: Path, keys: Sequence[KV]) -> Callable[[str], list[int]]:
    """llama.cpp's tokenizer, special tokens parsed, none added."""
    vocab = load(path, keys).get_vocab()
    return lambda text: list(vocab.tokenize(text, False, True))
