"""Where the report of a package lies, however the package is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from d2qconv.errors import InputError
from d2qconv.exporters.beside import page_of, report_of


@pytest.mark.parametrize(
    ("package", "name"),
    [("m.gguf", "m.gguf"), ("m-00001-of-00003.gguf", "m.gguf"), ("m-onnx", "m-onnx"), ("a/../m", "m")],
)
def test_the_report_lies_beside_the_package_under_its_name(tmp_path, package, name):
    report = report_of(tmp_path / package)
    assert report.parent.resolve() == tmp_path
    assert report.name == f"{name}.report.json"
    assert page_of(report) == report.with_name(f"{name}.report.html")


@pytest.mark.parametrize(("where", "named"), [("m", "."), ("m/inner", ".."), ("m/inner", "../../m")])
def test_a_folder_that_is_named_from_inside_has_its_report_beside_it(tmp_path, monkeypatch, where, named):
    (tmp_path / "m" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / where)
    assert report_of(Path(named)).resolve() == tmp_path / "m.report.json"


def test_a_path_without_a_name_is_refused():
    for look in (report_of, page_of):
        with pytest.raises(InputError, match="no place of a package"):
            look(Path("/"))
