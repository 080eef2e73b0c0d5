"""The three diagnoses: of this machine, of a package, of a model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from d2qconv import __version__
from d2qconv.doctor.libraries import findings as library_findings
from d2qconv.doctor.libraries import installed, module_of, runtime_state, states, wanted
from d2qconv.doctor.machine import machine_facts
from d2qconv.doctor.model import model_diagnosis
from d2qconv.doctor.package import package_diagnosis
from d2qconv.doctor.probe import Seen, examine
from d2qconv.errors import PluginError
from d2qconv.exporters.base import Runtime
from d2qconv.exporters.diagnosis import Diagnosis, Finding
from d2qconv.exporters.discover import Found
from d2qconv.exporters.manifest import MANIFEST

_TORCH = "d2qconv.doctor.machine:torch_facts"


def diagnose(what: str | None, found: Collection[Found], *, format_name: str = "") -> Diagnosis:
    """Of the machine, or of what is named: a file or a folder with a manifest is a package, anything else a model.

    format_name: the exporter of a package, empty to find it out. Raises no D2qError for what is wrong with it.
    """
    if what is None:
        return machine_diagnosis(found)
    path = Path(what).expanduser()
    if format_name or path.is_file() or (path / MANIFEST).is_file():
        return package_diagnosis(path, found, format_name)
    diagnosis = model_diagnosis(what, found)
    if not (diagnosis.wrong and path.is_dir()):
        return diagnosis
    detail = f"there is none ({MANIFEST}), so the folder was taken for a model"
    todo = f"if it is a package, copy or download it again: every folder that d2qconv wrote has {MANIFEST}"
    return replace(diagnosis, findings=(*diagnosis.findings, Finding("manifest", detail, None, todo)))


def machine_diagnosis(found: Collection[Found]) -> Diagnosis:
    """Python, processor, memory, disks, GPUs; every library and runtime; what follows from it."""
    libraries, runtimes = wanted(), runtimes_of(found)
    names = [library.distribution for library in libraries]
    names += [name for runtime in runtimes for name in runtime.distributions]
    details = {module_of(r.distributions[0]): r.details for r in runtimes if r.details}
    seen = examine(list(dict.fromkeys(_importable(names, details))), {**details, "torch": _TORCH})
    torch_seen = seen.get("torch", Seen())
    facts: dict[str, Any] = {
        "d2qconv": __version__,
        **machine_facts({} if torch_seen.error else torch_seen.facts),
        "extras": states(libraries, seen),
        "exporters": {f.name: f.state for f in found},
        "runtimes": {runtime.name: runtime_state(runtime, libraries, seen) for runtime in runtimes},
    }
    findings = [*library_findings(libraries, seen), *_exporter_findings(found), _conversion(seen)]
    return Diagnosis("this machine", facts, tuple(findings))


def runtimes_of(found: Collection[Found]) -> list[Runtime]:
    """Every runtime that an exporter names, once each."""
    named = [runtime for f in found if f.info is not None for runtime in f.info.runtimes]
    return list(dict.fromkeys(named))


def _importable(names: Collection[str], details: Mapping[str, str]) -> list[str]:
    """Modules that are worth an import: of what pip has, and those that come under other names too."""
    return [module_of(name) for name in names if installed(name) or module_of(name) in details]


def _exporter_findings(found: Collection[Found]) -> list[Finding]:
    """Broken exporters; that none can be used."""
    broken = [Finding(f"exporter {f.name}", f.state, PluginError) for f in found if f.info is None]
    if any(f.is_ready for f in found):
        return broken
    todo = next((f.state.partition(": ")[2] for f in found if f.info is not None), "reinstall d2qconv")
    return [*broken, Finding("exporters", "none can be used", PluginError, todo)]


def _conversion(seen: Mapping[str, Seen]) -> Finding:
    """What this machine converts, by the memory of a model that everybody knows."""
    absent = [name for name in ("torch", "tokenizers") if name not in seen or seen[name].error]
    if absent:
        todo = "pip install 'd2qconv[quantize]'"
        return Finding("conversion", f"not possible without {', '.join(absent)}", PluginError, todo)
    from d2qconv.doctor.memory import memory_finding, seven_b
    from d2qconv.pipeline import choose_device

    return memory_finding(seven_b(), choose_device(None), "a 7B model", is_asked=False)
