"""The public names, and the README's example."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from foreign_models import Scheme, make_foreign

import d2qconv
from d2qconv.testing.models import make_checkpoint

ROOT = Path(__file__).parents[2]
PUBLIC = d2qconv._PUBLIC


def test_nothing_is_loaded_before_it_is_asked_for():
    code = "import sys, d2qconv; d2qconv.D2qError, d2qconv.Recipe, dir(d2qconv); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "d2qconv.run" in loaded
    assert loaded & {"torch", "numpy", "cyclopts", "rich", "d2qconv.pipeline"} == set()


@pytest.mark.parametrize("name", PUBLIC)
def test_every_name_is_what_its_module_has(name):
    # A module of that name would take its place as soon as anything imports it.
    assert find_spec(f"d2qconv.{name}") is None
    found = getattr(d2qconv, name)
    assert found is getattr(importlib.import_module(PUBLIC[name]), name)
    assert found.__doc__
    assert name in dir(d2qconv)


def test_functions_are_typed_and_take_options_by_name():
    for name in PUBLIC:
        found = getattr(d2qconv, name)
        if not inspect.isfunction(found):
            continue
        parameters = inspect.signature(found).parameters.values()
        assert all(p.annotation is not p.empty for p in parameters)
        assert all(p.kind is p.KEYWORD_ONLY for p in parameters if p.default is not p.empty)
        assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters)


def test_a_type_checker_sees_the_same_names():
    tree = ast.parse((ROOT / "d2qconv/__init__.pyi").read_text())
    imported = {
        alias.asname: node.module
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == PUBLIC


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        d2qconv.nothing  # noqa: B018


def test_the_readmes_example(tmp_path, monkeypatch, capsys):
    for runtime in ("transformers", "compressed_tensors", "cyllama"):
        pytest.importorskip(runtime)
    (example,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), scope)
    said = capsys.readouterr().out
    found = scope["found"]
    assert f"KL divergence {found.judged.divergence.kl.value:.4f}" in said
    assert 0.001 < found.judged.divergence.kl.value < 0.5
    assert found.text.n_judged == 2 * 31
    # All the matrices inside the blocks, and their values.
    assert scope["exported"].n_exact == 4 * 7
    assert not scope["exported"].rounded
    assert all(check.is_passed for check in scope["exported"].checks)
    origin = d2qconv.inspect(scope["exported"].path)["provenance"]["d2qconv.recipe"]
    assert "not quantized again" in origin
    assert "nearest, from tiny-qwen3-5m" in origin
    assert not found.warnings


def test_floats_are_not_exported_and_codes_not_planned(tmp_path):
    make_foreign(tmp_path / "gptq", "gptq", Scheme(4, 32))
    make_checkpoint(tmp_path / "floats", "llama")
    with pytest.raises(d2qconv.D2qError, match="not quantized"):
        d2qconv.export(tmp_path / "floats", tmp_path / "m.gguf")
    with pytest.raises(d2qconv.D2qError, match=r"quantized already.*\n.*`export`.*`requantize`"):
        d2qconv.plan(tmp_path / "gptq", tmp_path / "m.gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["floats", "gptq"]
