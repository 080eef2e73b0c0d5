"""What a package needs to be loaded, whether that is here, and what is wrong with it. Reads no weights.

Of a folder the manifest is compared with what is there by name and size; what only its digests or its decoded values
would show is `verify`'s. The rest is asked of the exporter, if it can tell (`Diagnosing`).
"""

from __future__ import annotations

import stat
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from d2qconv.doctor.libraries import installed, is_older, module_of, runtime_state, wanted
from d2qconv.doctor.probe import Seen, examine
from d2qconv.errors import D2qError, InputError, PluginError, VerifyError
from d2qconv.exporters.base import Exporter, ExporterInfo
from d2qconv.exporters.diagnosis import Diagnosing, Diagnosis, Finding
from d2qconv.exporters.discover import Found, find, for_file
from d2qconv.exporters.manifest import MANIFEST, Manifest, read_manifest

_SHOWN = 5


def package_diagnosis(path: Path, found: Collection[Found], format_name: str = "") -> Diagnosis:
    """Everything that is known of a package without reading it."""
    about = str(path)
    if not path.exists():
        return Diagnosis(about, {}, (Finding("package", "there is no such file", InputError),))
    try:
        info = find(format_name, found) if format_name else for_file(path, found)
    except D2qError as error:
        return Diagnosis(about, {}, (Finding.of("package", error),))
    findings: list[Finding] = []
    requires: Mapping[str, str] = {}
    if info.is_folder:
        try:
            manifest = read_manifest(path)
        except D2qError as error:
            findings.append(Finding.of(MANIFEST, error))
        else:
            requires = manifest.requires
            findings += file_findings(path, manifest)
    facts: dict[str, Any] = {"format": f"{info.name}: {info.summary}"}
    exporter = _loaded(info, findings)
    if exporter is not None:
        facts |= _inspected(exporter, path, findings)
        if isinstance(exporter, Diagnosing):
            findings += [f for f in exporter.diagnose(path) if f not in findings]
    facts["needs"] = dict(requires) or info.facts.get("loads in", "")
    facts["runtimes here"], missing = _runtimes(info, requires)
    # What is wrong with the package comes first: without it, no library helps.
    return Diagnosis(about, facts, (*findings, *missing))


def file_findings(path: Path, manifest: Manifest) -> list[Finding]:
    """Files that are missing, of another size, or not the manifest's."""
    missing, changed = [], []
    for name, record in manifest.files.items():
        try:
            about = (path / name).lstat()
        except OSError:
            missing.append(name)
            continue
        if not stat.S_ISREG(about.st_mode):
            changed.append(f"{name} (no regular file)")
        elif about.st_size != record.n_bytes:
            changed.append(f"{name} ({about.st_size:,} bytes instead of {record.n_bytes:,})")
    try:
        strange = sorted({p.name for p in path.iterdir()} - set(manifest.files) - {MANIFEST})
    except OSError as error:
        return [Finding("files", f"the folder cannot be listed: {error.strerror}", InputError)]
    found = []
    todo = "copy or download the package again"
    for text, names in (("missing", missing), ("changed", changed)):
        if names:
            found.append(Finding("files", f"{text}: {_listed(names)}", VerifyError, todo))
    if strange:
        detail = f"not of the package: {_listed(strange)}; `verify` fails as long as they are there"
        found.append(Finding("files", detail, VerifyError, "move them away"))
    good = f"{len(manifest.files)} files, all there with the recorded sizes"
    return found or [Finding("files", good)]


def _loaded(info: ExporterInfo, findings: list[Finding]) -> Exporter | None:
    try:
        return info.load(info.default_options())
    except D2qError as error:
        findings.append(Finding.of(f"exporter {info.name}", error))
        return None


def _inspected(exporter: Exporter, path: Path, findings: list[Finding]) -> Mapping[str, Any]:
    try:
        return exporter.inspect(path)
    except D2qError as error:
        finding = Finding.of("package", error)
        if all(f.detail != finding.detail for f in findings):
            findings.append(finding)
        return {}


def _runtimes(info: ExporterInfo, requires: Mapping[str, str]) -> tuple[dict[str, str], list[Finding]]:
    """State of each runtime of this format here, and what of `requires` is not met by it."""
    names = {name for runtime in info.runtimes for name in runtime.distributions} | set(requires)
    details = {module_of(r.distributions[0]): r.details for r in info.runtimes if r.details}
    modules = sorted({module_of(name) for name in names if installed(name)} | set(details))
    seen = examine(modules, details)
    states = {runtime.name: runtime_state(runtime, wanted(), seen) for runtime in info.runtimes}
    pips = {name: runtime.pip for runtime in info.runtimes for name in runtime.distributions}
    findings = []
    for name in sorted(names):
        finding = _requirement(name, requires.get(name), seen, pips.get(name, f"pip install {name}"))
        findings += [] if finding is None else [finding]
    return states, findings


def _requirement(name: str, least: str | None, seen: Mapping[str, Seen], pip: str) -> Finding | None:
    """Why a library would not load the package here. least: the version that the package asks for, None if it does not.

    What it does not ask for, such as our own binding of llama.cpp, is worth having: other builds load it too.
    """
    about = seen.get(module_of(name), Seen())
    here = installed(name) or about.version
    if not here and least is None:
        return Finding(
            name, "not installed here; verify and evaluate run packages of this format in it", None, pip
        )
    if not here:
        since = f" {least} or newer" if least else ""
        return Finding(name, f"not installed here; the package needs it{since}", PluginError, pip)
    if about.error:
        return Finding(
            name, f"{here} is broken: {about.error}", PluginError, f"pip install --force-reinstall {name}"
        )
    if least is not None and is_older(here, least):
        todo = f"pip install --upgrade {name}"
        return Finding(name, f"{here} is older than {least}, which the package needs", PluginError, todo)
    return None


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
