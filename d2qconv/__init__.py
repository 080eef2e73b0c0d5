"""Turn a Hugging Face language model into a verified low-bit package.

The functions of `d2qconv.api` are here by their names, with the types that they take and give: `d2qconv.plan`,
`d2qconv.quantize`, `d2qconv.export`, `d2qconv.verify`, `d2qconv.inspect`, `d2qconv.evaluate`, `d2qconv.evaluate_tasks`.
They are loaded when they are asked for, and torch with them; `import d2qconv` itself loads nothing. `__init__.pyi` says
the types.
"""

from importlib import import_module

__version__ = "0.1.0"

_API = "d2qconv.api"
#: Module by public name.
_PUBLIC = {
    "plan": _API,
    "quantize": _API,
    "export": _API,
    "verify": _API,
    "inspect": _API,
    "evaluate": _API,
    "evaluate_tasks": _API,
    "Recipe": "d2qconv.run",
    "CalibrationSpec": "d2qconv.run",
    "D2qError": "d2qconv.errors",
}


def __getattr__(name: str) -> object:
    """A public name, loaded now (PEP 562)."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: object = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """All that there is, loaded or not."""
    return sorted({*globals(), *_PUBLIC})
