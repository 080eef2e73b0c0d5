"""What import-linter (run by tools/check) cannot see."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import d2qconv

CORE = Path(d2qconv.__file__).parent
MODULES = sorted(CORE.rglob("*.py"))
IDS = [str(p.relative_to(CORE)) for p in MODULES]
#: Modules that `import d2qconv.cli` loads, and what they may load in turn at module level.
LIGHT = (
    "cli.py",
    "commands/conversion.py",
    "commands/convert.py",
    "commands/demo.py",
    "commands/evaluate.py",
    "commands/doctor.py",
    "commands/packages.py",
    "commands/parameters.py",
    "console.py",
    "errors.py",
    "names.py",
    "options.py",
    "report_options.py",
    "progress.py",
    "run.py",
    "startup.py",
    "views/allocation.py",
    "views/evaluation.py",
    "views/facts.py",
    "views/imports.py",
    "views/outcome.py",
    "views/plan.py",
    "watches.py",
    "exporters/base.py",
    "exporters/diagnosis.py",
    "exporters/discover.py",
    "exporters/info.py",
)
HEAVY = {"torch", "numpy", "gguf", "safetensors", "tokenizers", "transformers", "huggingface_hub"}


def imported(tree: ast.AST, *, everywhere: bool) -> set[str]:
    """Names of the top-level packages that a module imports."""
    found: set[str] = set()
    for node in ast.walk(tree) if everywhere else ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("path", MODULES, ids=IDS)
def test_the_core_names_no_format_package(path):
    """Not even in a string, where an import by name would hide."""
    strings = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
    assert [s for s in strings if isinstance(s, str) and "d2qconv_" in s] == []


@pytest.mark.parametrize("path", MODULES, ids=IDS)
def test_only_the_console_draws_and_only_the_commands_parse(path):
    roots = imported(ast.parse(path.read_text()), everywhere=True)
    assert "rich" not in roots or path in (CORE / "console.py", CORE / "watches.py")
    parses = (
        path in (CORE / "cli.py", CORE / "options.py", CORE / "report_options.py")
        or path.parent == CORE / "commands"
    )
    assert "cyclopts" not in roots or parses


@pytest.mark.parametrize("name", LIGHT)
def test_modules_of_the_command_line_import_nothing_heavy(name):
    assert imported(ast.parse((CORE / name).read_text()), everywhere=False) & HEAVY == set()


@pytest.mark.parametrize("path", MODULES, ids=IDS)
def test_nothing_exits_behind_the_command_line(path):
    names = {n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}
    assert "_exit" not in names
    assert "exit" not in names or path == CORE / "__main__.py"
