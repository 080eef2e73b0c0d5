"""What `verify --deep` finds, of packages and reports that are made by hand."""

from __future__ import annotations

import hashlib
import json

import msgspec
import pytest
from foreign_models import Scheme, make_foreign
from report_samples import sample

from d2qconv import __version__
from d2qconv.arch.bind import bind
from d2qconv.checkpoint.digest import content_digest
from d2qconv.checkpoint.open import open_checkpoint
from d2qconv.exporters.beside import page_of, report_of
from d2qconv.foreign.read import open_float_source, read_foreign
from d2qconv.report.deep import deep_checks
from d2qconv.report.page import render
from d2qconv.report.schema import FileEntry, decode, encode
from d2qconv.testing.models import make_checkpoint


class Plain:
    """An exporter that says of a package what its report does."""

    def inspect(self, path):
        return {"provenance": PROVENANCE}


PROVENANCE = {"fingerprint": "f", "source": "m"}


def put(package, report):
    """Write the report and its page beside a package."""
    data = encode(report)
    report_of(package).write_bytes(data)
    page_of(report_of(package)).write_bytes(render(decode(data, ""), data))
    return report_of(package)


def of(name, files, *, is_folder=False):
    """The report of a package with these files: contents by name."""
    report = sample(name, sum(map(len, files.values())), 0.5)
    entries = [FileEntry(n, len(data), hashlib.sha256(data).hexdigest()) for n, data in files.items()]
    package = msgspec.structs.replace(
        report.package, is_folder=is_folder, files=entries, provenance=PROVENANCE
    )
    return msgspec.structs.replace(report, package=package)


@pytest.fixture
def folder(tmp_path):
    """A package that is a folder, with its report."""
    package = tmp_path / "m-onnx"
    package.mkdir()
    files = {"a.onnx": b"one", "b.json": b"{}"}
    for name, data in files.items():
        (package / name).write_bytes(data)
    put(package, of("m-onnx", files, is_folder=True))
    return package


def verdicts(checks):
    return {c.name: "skipped" if c.is_skipped else "ok" if c.is_passed else "failed" for c in checks}


WELL = {"report": "ok", "page": "ok", "files": "ok", "provenance": "ok", "source": "skipped"}


@pytest.mark.parametrize("name", [".", "../m-onnx", "../m-onnx/../m-onnx"])
def test_a_folder_is_looked_at_from_inside(folder, monkeypatch, name):
    monkeypatch.chdir(folder)
    package = type(folder)(name)
    assert verdicts(deep_checks(package, report_of(package), Plain())) == WELL


def test_the_page_of_another_version_need_only_carry_the_report(tmp_path):
    package = tmp_path / "m.gguf"
    package.write_bytes(b"good")
    report = put(package, of("m.gguf", {"m.gguf": b"good"}))
    page = page_of(report)
    drawn = page.read_bytes().replace(f'content="d2qconv {__version__}"'.encode(), b'content="d2qconv 99.0"')
    assert drawn != page.read_bytes()
    # Another version draws another page; the sample's name stands in what is carried and in what is drawn.
    page.write_bytes(drawn.replace(b"<h2>", b"<h2>Our "))
    (check,) = [c for c in deep_checks(package, report, Plain()) if c.name == "page"]
    assert check.is_passed
    assert "d2qconv 99.0 drew it, and the drawing was not compared" in check.detail
    for changed in (drawn.replace(b'"kld": 0.5', b'"kld": 0.4'), drawn.partition(b"<script")[0]):
        page.write_bytes(changed)
        assert verdicts(deep_checks(package, report, Plain())) == WELL | {"page": "failed"}


def test_the_page_of_this_version_is_compared_as_a_whole(tmp_path):
    package = tmp_path / "m.gguf"
    package.write_bytes(b"good")
    report = put(package, of("m.gguf", {"m.gguf": b"good"}))
    page_of(report).write_bytes(page_of(report).read_bytes().replace(b"<h2>", b"<h2>Our "))
    assert verdicts(deep_checks(package, report, Plain())) == WELL | {"page": "failed"}


def test_a_quantized_source_is_read_as_the_run_read_it(folder, tmp_path):
    source = tmp_path / "source"
    make_foreign(source, "gptq", Scheme(4, 32), model={"ffn": 64, "vocab": 64})
    checkpoint = read_foreign(open_checkpoint(str(source))).checkpoint
    digest = content_digest(checkpoint.config, bind(checkpoint).tensors, lambda *_: None)
    report = of("m-onnx", {"a.onnx": b"one", "b.json": b"{}"}, is_folder=True)
    where = put(
        folder, msgspec.structs.replace(report, source=msgspec.structs.replace(report.source, sha256=digest))
    )
    assert verdicts(deep_checks(folder, where, Plain(), str(source))) == WELL | {"source": "ok"}
    assert open_float_source(str(source)).tensors.keys() == checkpoint.tensors.keys()


@pytest.mark.parametrize(
    "config", [None, {"quantization_config": {"quant_method": "none of ours"}}, {"model_type": "no such"}]
)
def test_a_source_that_cannot_be_read_is_one_failed_check(folder, tmp_path, config):
    source = tmp_path / "source"
    if config is not None:
        source = make_checkpoint(
            source, "llama", hidden=64, ffn=64, layers=1, heads=2, kv_heads=1, head_dim=32
        )
        about = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(about | config))
    checks = deep_checks(folder, report_of(folder), Plain(), str(source))
    assert verdicts(checks) == WELL | {"source": "failed"}
    assert "cannot be read" in checks[-1].detail


def test_a_set_is_looked_at_by_the_name_of_any_of_its_files(tmp_path):
    names = [f"m-0000{k}-of-00002.gguf" for k in (1, 2)]
    files = {name: name.encode() for name in names}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    where = put(tmp_path / "m.gguf", of("m.gguf", files))
    for name in names:
        assert report_of(tmp_path / name) == where
        assert verdicts(deep_checks(tmp_path / name, where, Plain())) == WELL
    (tmp_path / "m-00003-of-00003.gguf").write_bytes(b"a stranger")
    (tmp_path / names[1]).unlink()
    assert verdicts(deep_checks(tmp_path / names[0], where, Plain())) == WELL | {"files": "failed"}


def test_a_folder_with_anything_more_is_found(folder):
    (folder / "inner").mkdir()
    (check,) = [c for c in deep_checks(folder, report_of(folder), Plain()) if not c.is_passed]
    assert check.detail == "not as the report has them: inner"


def test_a_further_package_is_compared_by_the_sum_of_its_tensors(folder):
    class Sized(Plain):
        def tensor_bytes(self, path):
            return {"a": 5, "b": 3}

    report = of("m-onnx", {"a.onnx": b"one", "b.json": b"{}"}, is_folder=True)
    # None: the exporter that wrote it told no sizes.
    for written, found in ((8, {"bytes of tensors": "ok"}), (9, {"bytes of tensors": "failed"}), (None, {})):
        also = msgspec.structs.replace(report.package, written=written)
        where = put(folder, msgspec.structs.replace(sample("m.gguf", 3, 0.5), also=[also]))
        assert verdicts(deep_checks(folder, where, Sized())) == WELL | found
