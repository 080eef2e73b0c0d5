"""Folders that somebody changed: always an error of ours, never another one, and nothing large is allocated."""

import json
import os
import random
import shutil
from contextlib import suppress

import msgspec
import pytest
from hf_models import EXPORTERS, write

from d2qconv.errors import D2qError
from d2qconv.exporters.base import silent
from d2qconv.exporters.manifest import file_records, files_check, read_manifest, write_manifest
from d2qconv_hf.container import open_folder
from d2qconv_hf.reader import read_model
from d2qconv_hf.verify import verify_folder


@pytest.fixture(scope="module", params=EXPORTERS)
def package(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "p"
    exporter, *_ = write(folder, request.param, "llama", type="int3", tensor_type=("o@1=float",))
    return exporter, folder


def decode(folder):
    model = read_model(open_folder(folder), "llama")
    for dense in model.desc.tensors.values():
        dense.load()


def rewritten(folder, change):
    """The header with a change; the data stay."""
    file = folder / "model.safetensors"
    data = file.read_bytes()
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + n :])


def first(header):
    return next(entry for name, entry in header.items() if name.endswith((".scales", ".weight_scale")))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda h: first(h).update(shape=[10**9, 10**9]), "does not lie where"),
        (lambda h: first(h).update(shape=[-1, 2]), "has no sizes"),
        (lambda h: first(h).update(dtype="F8"), "not understood"),
        (lambda h: first(h).update(data_offsets=[0, 16]), "does not lie where"),
        (
            lambda h: h.update(extra={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}),
            "does not lie where",
        ),
        (lambda h: h.pop("model.norm.weight"), "header says"),
    ],
)
def test_a_header_that_does_not_fit_its_file(package, tmp_path, change, what):
    _, folder = package
    shutil.copytree(folder, tmp_path / "p")
    rewritten(tmp_path / "p", change)
    with pytest.raises(D2qError, match=what):
        decode(tmp_path / "p")


@pytest.mark.parametrize("bits", [0, 5, "3", None, 10**12])
def test_bits_that_no_dialect_has(package, tmp_path, bits):
    exporter, folder = package
    shutil.copytree(folder, tmp_path / "p")
    file = tmp_path / "p" / "config.json"
    name = '"num_bits": 3' if exporter.dialect.facts.name == "safetensors" else '"bits": 3'
    text = file.read_text()
    assert name in text
    file.write_text(text.replace(name, name.replace("3", json.dumps(bits))))
    with pytest.raises(D2qError, match="bits in groups"):
        decode(tmp_path / "p")


def test_an_index_may_not_lead_out_of_the_folder(tmp_path):
    write(tmp_path / "p", "gptq", "llama", type="int4", max_shard_size="300KB")
    index = tmp_path / "p" / "model.safetensors.index.json"
    given = json.loads(index.read_text())
    given["weight_map"]["model.norm.weight"] = "../secret.safetensors"
    index.write_text(json.dumps(given))
    with pytest.raises(D2qError, match="no file of the folder's"):
        open_folder(tmp_path / "p")


@pytest.mark.timeout(60, func_only=True)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
@pytest.mark.parametrize("is_pipe", [True, False])
def test_a_pipe_or_link_is_no_file_of_a_package(package, tmp_path, name, is_pipe):
    _, folder = package
    shutil.copytree(folder, tmp_path / "p")
    file = tmp_path / "p" / name
    if file.exists():
        file.rename(tmp_path / name)
    if is_pipe:
        os.mkfifo(file)
    else:
        file.symlink_to(tmp_path / name)
    with pytest.raises(D2qError, match="no regular file"):
        open_folder(tmp_path / "p")


def test_a_file_that_no_package_has_is_refused(package, tmp_path):
    """transformers would follow an adapter_config.json to another model."""
    exporter, folder = package
    shutil.copytree(folder, tmp_path / "p")
    (tmp_path / "p" / "adapter_config.json").write_text("{}")
    manifest = msgspec.structs.replace(read_manifest(tmp_path / "p"), files=file_records(tmp_path / "p"))
    write_manifest(tmp_path / "p", manifest)
    with pytest.raises(D2qError, match="does not write: adapter_config"):
        verify_folder(tmp_path / "p", exporter.dialect.facts, silent)


def test_version_1_of_gptq_is_not_taken_for_version_2(tmp_path):
    write(tmp_path / "p", "gptq", "llama", type="int4")
    file = tmp_path / "p" / "config.json"
    file.write_text(file.read_text().replace('"checkpoint_format": "gptq_v2"', '"checkpoint_format": "gptq"'))
    with pytest.raises(D2qError, match="off by one"):
        decode(tmp_path / "p")


def test_flipped_bits_give_errors_of_ours_or_other_values(package, tmp_path):
    exporter, folder = package
    random_ = random.Random(exporter.dialect.facts.name)
    shutil.copytree(folder, tmp_path / "p")
    for name in ("config.json", "model.safetensors", "d2qconv.json"):
        file = tmp_path / "p" / name
        good = file.read_bytes()
        reach = len(good) if name.endswith("json") else int.from_bytes(good[:8], "little") + 8
        for _ in range(25):
            bad = bytearray(good)
            bad[random_.randrange(reach)] ^= 1 << random_.randrange(8)
            file.write_bytes(bad)
            with suppress(D2qError):
                decode(tmp_path / "p")
            with suppress(D2qError):
                is_whole = files_check(tmp_path / "p", read_manifest(tmp_path / "p")).is_passed
                assert not is_whole or name == "d2qconv.json"
        file.write_bytes(good)
