"""`doctor` on packages that are whole, and on what is left of them; its exit codes."""

from dataclasses import replace

import pytest
from random_models import DIMS, LLAMA_5M, make_desc, quantized, small_source

from d2qconv.doctor import package as package_module
from d2qconv.doctor import report as report_module
from d2qconv.doctor.probe import Seen
from d2qconv.exporters.base import Carrier, silent
from d2qconv.exporters.manifest import MANIFEST, read_manifest, write_manifest

DESC = make_desc("llama", dims=replace(DIMS, n_layers=1))


@pytest.fixture(autouse=True)
def runtimes(monkeypatch):
    """Every library imports at once, in the version that this says."""
    seen = {}

    def examine(modules, details=None):
        return {name: seen.get(name, Seen("99")) for name in modules}

    for module in (package_module, report_module):
        monkeypatch.setattr(module, "examine", examine)
    monkeypatch.setattr(package_module, "installed", lambda name: "99")
    return seen


def gguf(folder, **options):
    from d2qconv_gguf import GgufOptions
    from d2qconv_gguf.exporter import GgufExporter

    return made(GgufExporter(GgufOptions(**{"type": "q8_0"} | options)), folder / "m.gguf")


def onnx(folder):
    from d2qconv_onnx import OnnxOptions
    from d2qconv_onnx.exporter import OnnxExporter

    return made(OnnxExporter(OnnxOptions(type="int4")), folder / "m-onnx", is_folder=True)


def safetensors(folder):
    from d2qconv_hf import HfOptions
    from d2qconv_hf.exporter import CompressedTensorsExporter

    return made(CompressedTensorsExporter(HfOptions(type="int4")), folder / "m-w4", is_folder=True)


def made(exporter, path, *, is_folder=False):
    source = small_source()
    dims = DESC.dims
    sizes = {"hidden_size": dims.hidden, "intermediate_size": dims.ffn, "num_hidden_layers": dims.n_layers}
    heads = {
        "num_attention_heads": dims.n_heads,
        "num_key_value_heads": dims.n_kv_heads,
        "head_dim": dims.head,
    }
    more = {"tie_word_embeddings": True, "max_position_embeddings": DESC.max_positions}
    source = replace(source, config={**source.config, **sizes, **heads, **more})
    plan = exporter.plan(DESC, Carrier.NONE)
    assert not plan.refusals, plan.refusals
    if is_folder:
        path.mkdir()
    return exporter.write(quantized(DESC, plan), source, plan, path, silent).path


MAKERS = {"gguf": gguf, "onnx": onnx, "safetensors": safetensors}


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_a_whole_package(d2q, tmp_path, maker):
    path = maker(tmp_path)
    result = d2q("doctor", path)
    assert (result.code, result.err) == (0, "")
    assert result.out.endswith(f"{path}: nothing is wrong\n")
    facts = d2q("doctor", path, "--json").json
    assert facts["is_well"] is True
    assert facts["facts"]["runtimes here"]


def wrong(d2q, path, code):
    """The wrong findings, by subject."""
    result = d2q("doctor", path, "--json")
    assert result.code == code
    assert result.json["is_well"] is False
    return {f["subject"]: f["detail"] for f in result.json["findings"] if f["is_wrong"]}


def test_a_truncated_gguf(d2q, tmp_path):
    path = gguf(tmp_path)
    path.write_bytes(path.read_bytes()[:-5000])
    assert "are not in the file" in wrong(d2q, path, 6)["file"]


def test_a_gguf_with_an_unknown_type(d2q, tmp_path):
    path = gguf(tmp_path)
    data = bytearray(path.read_bytes())
    name = b"blk.0.ffn_up.weight"
    # Behind the name: number of dimensions, dimensions, type.
    at = data.index(name + (2).to_bytes(4, "little")) + len(name) + 4 + 16
    assert data[at : at + 4] == (8).to_bytes(4, "little")
    data[at : at + 4] = (99).to_bytes(4, "little")
    path.write_bytes(data)
    assert "has ggml type 99" in wrong(d2q, path, 6)["file"]


def test_a_gguf_whose_second_file_is_gone(d2q, tmp_path):
    path = gguf(tmp_path, max_shard_size="200kB")
    later = sorted(tmp_path.iterdir())[1]
    assert d2q("doctor", path).code == 0
    later.unlink()
    assert later.name in wrong(d2q, path, 2)["file"]


def test_no_gguf(d2q, tmp_path):
    path = tmp_path / "text.gguf"
    path.write_text("hello")
    assert wrong(d2q, path, 2)["file"].endswith("not a GGUF file")


def test_a_newer_type_says_what_it_needs(d2q, tmp_path):
    out = d2q("doctor", gguf(tmp_path, type="q2_0")).out
    assert "q2_0 needs llama.cpp b9916" in out
    assert "no fast kernel for x86 CPUs" in out


@pytest.mark.parametrize("maker", [onnx, safetensors])
def test_folders_by_sizes(d2q, tmp_path, maker):
    path = maker(tmp_path)
    largest = max(path.iterdir(), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-64])
    (path / "tokenizer.json").unlink()
    (path / "notes.txt").write_text("mine")
    found = [f["detail"] for f in d2q("doctor", path, "--json").json["findings"] if f["is_wrong"]]
    assert any("missing: tokenizer.json" in text for text in found)
    assert any(text.startswith(f"changed: {largest.name} (") for text in found)
    assert any(text.startswith("not of the package: notes.txt") for text in found)
    assert "tokenizer" in wrong(d2q, path, 6)


@pytest.mark.parametrize("maker", [onnx, safetensors])
def test_folders_without_their_weights(d2q, tmp_path, maker):
    path = maker(tmp_path)
    largest = max(path.iterdir(), key=lambda p: p.stat().st_size)
    largest.unlink()
    assert f"missing: {largest.name}" in wrong(d2q, path, 6)["files"]


def test_a_folder_without_its_manifest(d2q, tmp_path):
    path = safetensors(tmp_path)
    (path / MANIFEST).unlink()
    facts = d2q("doctor", path, "--json").json
    assert facts["is_well"] is True
    assert facts["facts"]["quantized"] == "compressed-tensors, pack-quantized"
    assert "has no manifest" in d2q("doctor", path, "--format", "safetensors").out


def test_a_folder_that_is_neither_model_nor_package(d2q, tmp_path):
    said = d2q("doctor", tmp_path).out
    (line,) = (line for line in said.splitlines() if "taken for a model" in line)
    assert line.startswith("note")
    assert "copy or download it again" in said


def test_a_manifest_that_is_none(d2q, tmp_path):
    path = onnx(tmp_path)
    (path / MANIFEST).write_text("{}")
    assert "is not a manifest" in wrong(d2q, path, 6)["package"]


def test_libraries_that_are_too_old_or_not_there(d2q, tmp_path, runtimes, monkeypatch):
    path = onnx(tmp_path)
    monkeypatch.setattr(package_module, "installed", lambda name: {"onnxruntime": "1.20.1"}.get(name, ""))
    runtimes["onnxruntime"] = Seen("1.20.1")
    found = wrong(d2q, path, 7)
    assert "1.20.1 is older than 1.23" in found["onnxruntime"]
    assert "not installed here" in found["onnxruntime-genai"]


def test_a_gguf_needs_no_binding_of_ours(d2q, tmp_path, runtimes, monkeypatch):
    path = gguf(tmp_path)
    monkeypatch.setattr(package_module, "installed", lambda _name: "")
    runtimes["cyllama"] = Seen()
    result = d2q("doctor", path)
    assert result.code == 0
    (line,) = (line for line in result.out.splitlines() if "cyllama: not installed here" in line)
    assert line.startswith("note")


def test_a_later_need_of_the_manifest(d2q, tmp_path):
    path = onnx(tmp_path)
    manifest = read_manifest(path)
    write_manifest(path, type(manifest)(**{**_fields(manifest), "requires": {"onnxruntime": "120.1"}}))
    assert "is older than 120.1" in wrong(d2q, path, 7)["onnxruntime"]


def _fields(struct):
    return {name: getattr(struct, name) for name in struct.__struct_fields__}


def test_the_machine(d2q, runtimes):
    result = d2q("doctor", "--json")
    assert result.code == 0
    facts = result.json["facts"]
    assert facts["python"].startswith("CPython 3.")
    assert facts["exporters"]["gguf"] == "ready"
    assert facts["runtimes"]["llama.cpp"].startswith("cyllama ")
    assert any("a 7B model" in f["subject"] for f in result.json["findings"])
    runtimes["torch"] = Seen(error="OSError: libtorch_cpu.so: cannot open shared object file")
    result = d2q("doctor")
    assert result.code == 7
    assert "broken: OSError: libtorch_cpu.so" in result.out
    assert "not possible without torch" in result.out


def test_nothing_of_that_name(d2q, tmp_path):
    assert d2q("doctor", tmp_path / "no.gguf").code == 2
    assert d2q("doctor", tmp_path).code == 2
    assert d2q("doctor", LLAMA_5M / "config.json").code == 2
