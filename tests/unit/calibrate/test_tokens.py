"""Calibration tokens from every source, and what is refused."""

import json
import shutil
import sys
from io import BytesIO
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

import d2qconv
from d2qconv.arch.bind import bind
from d2qconv.calibrate.statistics import InputAccumulator
from d2qconv.calibrate.tokens import bos_token, check_spec, encoder, load_tokens, read_stream
from d2qconv.checkpoint.open import open_checkpoint
from d2qconv.errors import InputError
from d2qconv.run import CalibrationSpec

MODEL = Path(d2qconv.__file__).parent / "data" / "tiny-qwen3-5m"
TEXT = "The little dog ran over the green hill, and nobody knew why. " * 200


@pytest.fixture(scope="module")
def checkpoint():
    return open_checkpoint(str(MODEL))


@pytest.fixture(scope="module")
def model(checkpoint):
    return bind(checkpoint)


def load(spec, checkpoint, model, on_step=lambda done: None):
    return load_tokens(spec, checkpoint, model, device="cpu", on_step=on_step)


def ids_of(text):
    return Tokenizer.from_file(str(MODEL / "tokenizer.json")).encode(text, add_special_tokens=False).ids


def test_a_text_is_cut_into_sequences_without_overlap(tmp_path, checkpoint, model):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    got = load(CalibrationSpec(str(path), 20, 32), checkpoint, model)
    stream = np.array(ids_of(TEXT))
    pieces = {tuple(p) for p in stream[: len(stream) // 32 * 32].reshape(-1, 32).tolist()}
    rows = torch.cat([got.calibration, got.held_out]).tolist()
    assert got.calibration.shape == (20, 32)
    assert len(got.held_out) == 2
    assert {tuple(r) for r in rows} <= pieces
    assert load(CalibrationSpec(str(path), 20, 32), checkpoint, model).digest == got.digest
    assert load(CalibrationSpec(str(path), 20, 32, seed=1), checkpoint, model).digest != got.digest


def test_less_text_than_asked_for_is_said(tmp_path, checkpoint, model):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    got = load(CalibrationSpec(str(path), 5000, 64), checkpoint, model)
    assert "were asked for" in got.warnings[0]
    assert len(got.calibration) + len(got.held_out) == len(ids_of(TEXT)) // 64


def test_jsonl_and_token_files_give_the_same_stream(tmp_path, checkpoint, model):
    lines = [f"Line {i} of the file tells a small story." for i in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in lines))
    stream = [i for t in lines for i in ids_of(t + "\n\n")]
    np.save(tmp_path / "a.npy", np.array(stream, dtype=np.uint16))
    by_name = [
        load(CalibrationSpec(str(tmp_path / n), 8, 16), checkpoint, model) for n in ("a.jsonl", "a.npy")
    ]
    assert by_name[0].digest == by_name[1].digest


def test_a_raw_line_separator_in_a_string_ends_no_line(tmp_path, checkpoint, model):
    lines = [f"Line {i} of\u2028the file\x85tells a small story." for i in range(12)]
    text = "\r\n".join(json.dumps({"text": t}, ensure_ascii=False) for t in lines)
    (tmp_path / "a.jsonl").write_bytes(text.encode())
    np.save(tmp_path / "a.npy", np.array([i for t in lines for i in ids_of(t + "\n\n")]))
    by_name = [
        load(CalibrationSpec(str(tmp_path / n), 8, 16), checkpoint, model) for n in ("a.jsonl", "a.npy")
    ]
    assert by_name[0].digest == by_name[1].digest


def test_a_long_jsonl_is_read_only_as_far_as_needed(tmp_path, checkpoint, model):
    path = tmp_path / "a.jsonl"
    good = (json.dumps({"text": TEXT}) + "\n") * 50
    path.write_bytes(good.encode() + b"not json\n")
    assert len(load(CalibrationSpec(str(path), 4, 16), checkpoint, model).calibration) == 4


def edited(folder, config=None, **parts):
    """The tiny model with other parts in its tokenizer.json and other keys in tokenizer_config.json."""
    shutil.copytree(MODEL, folder)
    for name, more in (("tokenizer.json", parts), ("tokenizer_config.json", config or {})):
        content = json.loads((folder / name).read_text()) | more
        (folder / name).write_text(json.dumps(content))
    return open_checkpoint(str(folder))


def test_of_a_long_text_the_beginning_is_read_and_its_tokens_are_those_of_the_whole(
    tmp_path, checkpoint, monkeypatch
):
    text = "".join(f"Day {i}: the old keeper counted {i * i} ships and went to bed.\n" for i in range(900))
    (tmp_path / "t.txt").write_text(text)
    asked = []

    def make():
        whole = encoder(checkpoint)
        return lambda piece: asked.append(len(piece)) or whole(piece)

    every = read_stream(str(tmp_path / "t.txt"), make)
    assert asked == [len(text)]
    monkeypatch.setattr("d2qconv.calibrate.tokens.LONG_TEXT", 1000)
    for most in (1, 200, 2000, len(every) - 10, len(every) + 10):
        asked.clear()
        found = read_stream(str(tmp_path / "t.txt"), make, most=most)
        assert min(most, len(every)) <= len(found) <= len(every)
        assert torch.equal(found, every[: len(found)])
        if most <= 200:
            assert max(asked) < len(text) / 10
    assert len(found) == len(every)


def test_truncation_and_padding_of_the_tokenizer_do_not_count(tmp_path, checkpoint, model):
    truncation = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    pad = {"pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"}
    padding = {"strategy": {"Fixed": 90_000}, "direction": "Left", "pad_to_multiple_of": None, **pad}
    short = edited(tmp_path / "m", truncation=truncation, padding=padding)
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    spec = CalibrationSpec(str(path), 20, 32)
    assert load(spec, short, model).digest == load(spec, checkpoint, model).digest
    assert bos_token(short, model) is None


def test_self_samples_are_seeded_and_from_the_model(checkpoint, model):
    seen = []
    spec = CalibrationSpec("self", 8, 24, seed=5)
    got = load(spec, checkpoint, model, seen.append)
    assert seen == list(range(1, 24))
    assert load(spec, checkpoint, model).digest == got.digest
    from d2qconv.measure.reference import logits

    log_p = logits(model, got.calibration).log_softmax(-1)[:, :-1]
    chosen = log_p.gather(-1, got.calibration[:, 1:, None]).mean()
    entropy = (log_p.exp() * log_p).sum(-1).mean()
    # A sample of the model has the model's own entropy; a uniform one would have far less likelihood.
    assert abs(float(chosen - entropy)) < 0.7


def test_a_hub_data_set_is_streamed(checkpoint, model, monkeypatch):
    asked = []

    def load_dataset(name, split, streaming):
        asked.append((name, split, streaming))
        return ({"text": TEXT} for _ in range(3))

    fake = ModuleType("datasets")
    fake.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", fake)
    got = load(CalibrationSpec("org/name:validation", 4, 16), checkpoint, model)
    assert asked == [("org/name", "validation", True)]
    assert len(got.calibration) == 4


def npy(dtype, shape):
    """A .npy of 64 bytes whose header says something else."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(64)


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("latin.jsonl", b'{"text": "\xe9"}\n', "cannot be read"),
        ("short.txt", b"too short", "less than one sequence"),
        ("latin.txt", b"\xff\xfe\xff", "cannot be read"),
        ("bad.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "line 2"),
        ("bad.npy", b"\x93NUMPY", "not a token file"),
        ("bad.safetensors", b"\x00\x01", "not a token file"),
        ("zip.npy", b"PK\x03\x04", "not a token file"),
        ("huge.npy", npy("<i8", "(1000000000000,)"), "not a token file"),
        ("open.npy", npy("<i8", "(8,"), "not a token file"),
        ("negative.npy", npy("<i8", "(-8, -8)"), "not a token file"),
    ],
)
def test_bad_files_are_refused(tmp_path, checkpoint, model, name, content, what):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=what):
        load(CalibrationSpec(str(path), 4, 64), checkpoint, model)


def test_a_pickled_token_file_is_never_opened(tmp_path, checkpoint, model):
    path = tmp_path / "evil.npy"
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="not a token file"):
        load(CalibrationSpec(str(path), 4, 64), checkpoint, model)


@pytest.mark.parametrize(
    ("values", "what"), [([1.5] * 64, "integers"), ([9000] * 64, "outside the vocabulary")]
)
def test_tokens_must_be_tokens(tmp_path, checkpoint, model, values, what):
    np.save(tmp_path / "t.npy", np.array(values))
    with pytest.raises(InputError, match=what):
        load(CalibrationSpec(str(tmp_path / "t.npy"), 2, 16), checkpoint, model)


def test_one_sequence_is_not_enough(tmp_path, checkpoint, model):
    np.save(tmp_path / "t.npy", np.arange(20))
    with pytest.raises(InputError, match="at least two sequences"):
        load(CalibrationSpec(str(tmp_path / "t.npy"), 4, 16), checkpoint, model)


@pytest.mark.parametrize(
    ("spec", "what"),
    [
        (CalibrationSpec(sequences=0), "at least 1"),
        (CalibrationSpec(length=4096), "longer than the model's context"),
        (CalibrationSpec(seed=-1), "seed"),
        (CalibrationSpec(source="./nothing.txt"), "no such file"),
    ],
)
def test_impossible_requests_are_known_before_work(model, spec, what):
    with pytest.raises(InputError, match=what):
        check_spec(spec, model)


def test_bos_is_put_where_the_tokenizer_puts_it(tmp_path, checkpoint, model):
    assert bos_token(checkpoint, model) is None
    folder = tmp_path / "m"
    shutil.copytree(MODEL, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    bos = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    tokenizer["post_processor"]["single"].insert(0, bos)
    tokenizer["post_processor"]["special_tokens"] = {
        "<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with_bos = open_checkpoint(str(folder))
    assert bos_token(with_bos, model) == 0
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    got = load(CalibrationSpec(str(path), 4, 16), with_bos, model)
    assert got.calibration[:, 0].tolist() == [0] * 4


WITH_BOS = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
}


@pytest.mark.parametrize(
    ("stated", "processor", "expected"),
    [
        ({"bos_token": "<|im_start|>"}, WITH_BOS, 1),
        ({"bos_token": "<|im_start|>", "add_bos_token": False}, WITH_BOS, None),
        ({"bos_token": "<|im_start|>", "add_bos_token": True}, None, 1),
        ({"add_bos_token": True}, None, 0),
        ({}, None, None),
    ],
)
def test_calibration_and_the_gguf_agree_about_bos(tmp_path, model, stated, processor, expected):
    from d2qconv_gguf.tokenizer import tokenizer_metadata

    made = edited(tmp_path / "m", stated, post_processor=processor)
    keys = {kv.key: kv.value for kv in tokenizer_metadata(made, model.dims.vocab)}
    is_added, bos = keys["tokenizer.ggml.add_bos_token"], keys["tokenizer.ggml.bos_token_id"]
    assert bos_token(made, model) == expected
    assert (bos if is_added else None) == expected


def test_bos_of_a_sentencepiece_model_and_of_none(tmp_path, model):
    import sentencepiece

    out = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split(".")[:100]),
        model_writer=out,
        model_type="bpe",
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    made = edited(tmp_path / "m", {"bos_token": "<s>"})
    (made.path / "tokenizer.json").unlink()
    assert bos_token(made, model) == model.bos_ids[0] == 0
    (made.path / "tokenizer.model").write_bytes(out.getvalue())
    assert bos_token(made, model) == 1
    (made.path / "added_tokens.json").write_text('{"<s>": 9000}')
    with pytest.raises(InputError, match="9000"):
        bos_token(made, model)
    (made.path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(InputError, match=r"tokenizer\.model"):
        bos_token(made, model)


def test_a_broken_tokenizer(tmp_path, model):
    made = edited(tmp_path / "m", model={"type": "Nothing"})
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        bos_token(made, model)


def test_statistics_equal_their_definition_and_shift():
    generator = torch.Generator().manual_seed(0)
    x, source = torch.randn(2, 3, 50, 8, generator=generator)
    mu = torch.randn(8, generator=generator)

    def measured(values):
        accumulator = InputAccumulator(8, "cpu", is_source_seen=True)
        for batch, s in zip(values, source, strict=True):
            accumulator.add(batch, s)
        return accumulator.finish()

    rows = x.reshape(-1, 8)
    statistics = measured(x)
    assert torch.allclose(statistics.gram, rows.T @ rows / 150, atol=1e-5)
    assert torch.allclose(statistics.cross, source.reshape(-1, 8).T @ rows / 150, atol=1e-5)
    shifted, wanted = statistics.shifted(mu), measured(x + mu)
    for name in ("gram", "mean", "cross", "source_mean"):
        assert torch.allclose(getattr(shifted, name), getattr(wanted, name), atol=1e-4)
