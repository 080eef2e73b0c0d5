"""A package of several files: llama.cpp's own layout of them, read back by gguf-py and loaded by llama.cpp."""

from __future__ import annotations

import shutil
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from gguf_models import FAST, make_desc, write

from d2qconv.errors import InputError, VerifyError
from d2qconv.exporters.base import silent
from d2qconv.measure.reference import logits
from d2qconv_gguf import exporter, shards
from d2qconv_gguf.container import read
from d2qconv_gguf.exporter import GgufExporter
from d2qconv_gguf.metadata import KV
from d2qconv_gguf.reader import read_model
from d2qconv_gguf.runtime import LlamaCpp
from d2qconv_gguf.verify import verify_file

LIMIT = 200_000
SPLIT = replace(FAST, max_shard_size=str(LIMIT))


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A random model, rounded to nearest, in several files; (first file, the same in one file)."""
    folder = tmp_path_factory.mktemp("shards")
    made, _, _ = write(folder / "m.gguf", make_desc("llama"), SPLIT)
    one, _, _ = write(folder / "one.gguf", make_desc("llama"), FAST)
    return made, one


@pytest.fixture
def copied(package, tmp_path):
    """Its files, to be changed."""
    files = [shutil.copy(file.path, tmp_path) for file in read(package[0].path).files]
    return [tmp_path / file.rsplit("/", 1)[-1] for file in map(str, files)]


def test_the_files_are_those_of_gguf_split(package):
    made, one = package
    whole = gguf.GGUFReader(one.path)
    files = sorted(made.path.parent.glob("m-*.gguf"))
    n = len(files)
    assert n > 2
    assert [f.name for f in files] == [f"m-{i + 1:05d}-of-{n:05d}.gguf" for i in range(n)]
    assert made.path == files[0]
    assert made.n_bytes == sum(f.stat().st_size for f in files)
    names, sizes = [], []
    for number, path in enumerate(files):
        file = gguf.GGUFReader(path)
        keys = {k: f for k, f in file.fields.items() if not k.startswith("GGUF.")}
        split = {k: keys.pop(k) for k in list(keys) if k.startswith("split.")}
        assert {k: (int(f.contents()), f.types[0].name) for k, f in split.items()} == {
            "split.no": (number, "UINT16"),
            "split.count": (n, "UINT16"),
            "split.tensors.count": (len(whole.tensors), "INT32"),
        }
        assert set(keys) == (set() if number else {k for k in whole.fields if not k.startswith("GGUF.")})
        names += [t.name for t in file.tensors]
        sizes.append(path.stat().st_size)
    assert names == [t.name for t in whole.tensors]
    assert all(
        size <= LIMIT or len(gguf.GGUFReader(f).tensors) == 1 for size, f in zip(sizes, files, strict=True)
    )
    # Nothing more would have gone in.
    for size, path in zip(sizes, files[1:], strict=False):
        assert size + int(gguf.GGUFReader(path).tensors[0].n_bytes) + 100 > LIMIT


def test_its_values_are_those_of_one_file_and_llama_cpp_computes_them(package):
    made, one = package
    split, whole = read(made.path), read(one.path)
    assert list(split.tensors) == list(whole.tensors)
    for name, tensor in whole.tensors.items():
        assert np.array_equal(split.tensors[name].data, tensor.data)
    checks = verify_file(made.path, silent)
    assert all(c.is_passed and not c.is_skipped for c in checks), checks
    assert f"in {len(split.files)} files" in {c.name: c.detail for c in checks}["metadata"]
    tokens = list(range(3, 20))
    with LlamaCpp(made.path) as a, LlamaCpp(one.path) as b:
        assert np.array_equal(a.logits(tokens), b.logits(tokens))
    ids = torch.tensor([tokens])
    assert torch.equal(logits(read_model(made.path), ids), logits(read_model(one.path), ids))


def test_it_is_inspected_by_its_first_file(package):
    made, one = package
    facts, plain = (GgufExporter(FAST).inspect(p.path) for p in (made, one))
    assert facts["files"] == len(read(made.path).files)
    assert facts["file_bytes"] == made.n_bytes
    for name in ("layout", "blocks", "tokenizer", "tensors", "bytes", "bits_per_weight"):
        assert facts[name] == plain[name]


def test_what_fits_into_one_file_is_one(tmp_path):
    made, plan, _ = write(tmp_path / "m.gguf", make_desc("llama"), replace(FAST, max_shard_size="1GB"))
    assert plan.is_split
    assert [f.name for f in tmp_path.iterdir()] == ["m.gguf"]
    assert made.path == tmp_path / "m.gguf"
    assert not [k for k in read(made.path).keys if k.startswith("split.")]


def test_a_tensor_above_the_limit_is_said_in_the_plan():
    made = GgufExporter(replace(FAST, max_shard_size="200kB")).plan(make_desc("llama"), None)
    embedding = next(t for t in made.tensors if t.stored_as == "token_embd.weight")
    assert embedding.n_bytes > 200_000
    (warning,) = made.warnings
    assert f"token_embd.weight takes {embedding.n_bytes:,} bytes" in warning
    with pytest.raises(InputError, match="max-shard-size"):
        GgufExporter(replace(FAST, max_shard_size="much")).plan(make_desc("llama"), None)


def test_the_header_is_counted_to_the_byte(package):
    """Keys and tensor infos as `groups` counts them end where the first tensor begins, but for the padding."""
    file = read(package[1].path)
    kinds = {k: [gguf.GGUFValueType(t) for t in types] for k, types in file.types.items()}
    keys = [KV(k, file.keys[k], t[0], t[-1] if len(t) > 1 else None) for k, t in kinds.items()]
    counted = shards.header_bytes(keys)
    counted += sum(24 + len(t.name) + 8 * len(t.shape) for t in file.tensors.values())
    start = min(int(t.data_offset) for t in gguf.GGUFReader(package[1].path).tensors)
    assert start - 32 < counted <= start


@pytest.mark.parametrize(
    ("change", "error", "what"),
    [
        (lambda files: files[1].unlink(), InputError, "cannot be read"),
        (lambda files: files[2].replace(files[1]), VerifyError, "does not say that it is file 2"),
        (lambda files: shutil.copy(files[0], files[1]), VerifyError, "does not say that it is file 2"),
        (
            lambda files: files[0].rename(files[0].with_name("x.gguf")),
            VerifyError,
            "its name does not say so",
        ),
    ],
)
def test_a_set_that_is_not_whole_is_refused(copied, change, error, what):
    change(copied)
    first = copied[0] if copied[0].exists() else copied[0].with_name("x.gguf")
    with pytest.raises(error, match=what):
        read(first)


def test_another_than_the_first_file_is_refused(copied):
    with pytest.raises(VerifyError, match="is file 2 of"):
        read(copied[1])


def test_a_key_or_a_byte_in_a_later_file_is_noticed(copied):
    """The record in the first file covers the tensors of all, and no other file may have keys of its own."""
    data = bytearray(copied[1].read_bytes())
    data[-40] ^= 1
    copied[1].write_bytes(data)
    checks = {c.name: c for c in verify_file(copied[0], silent)}
    assert not checks["decoded values"].is_passed
    old = gguf.GGUFReader(copied[2])
    new = gguf.GGUFWriter(copied[2].with_name("new"), "llama")
    for name in ("split.no", "split.count", "split.tensors.count"):
        field = old.fields[name]
        new.add_key_value(name, field.contents(), field.types[0])
    for t in old.tensors:
        new.add_tensor(t.name, np.array(t.data), raw_dtype=t.tensor_type)
    new.write_header_to_file()
    new.write_kv_data_to_file()
    new.write_tensors_to_file()
    new.close()
    copied[2].with_name("new").replace(copied[2])
    checks = {c.name: c for c in verify_file(copied[0], silent)}
    assert "general.architecture" in checks["metadata"].detail
    assert not checks["metadata"].is_passed


def test_more_files_than_llama_cpp_counts_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(shards, "MOST_FILES", 2)
    with pytest.raises(exporter.ExportError, match=r"llama\.cpp takes 2"):
        write(tmp_path / "m.gguf", make_desc("llama"), SPLIT)
