"""A checkpoint by its hub name: downloaded into the Hugging Face cache, only the files that are needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from d2qconv.errors import InputError, PluginError

ALLOWED = ("*.safetensors", "*.json", "tokenizer.model", "*.jinja", "LICENSE*", "README.md")
#: Of them what says how a model is made, without its weights.
DESCRIBING = tuple(pattern for pattern in ALLOWED if pattern != "*.safetensors")
#: Files in sub-folders (`original/`, `onnx/`) and a second copy of the weights in another naming.
IGNORED = ("*/*", "consolidated*.safetensors")


def download(name: str, revision: str | None, patterns: Sequence[str] = ALLOWED) -> Path:
    """Folder of the snapshot of `org/name`; its last component is the commit. patterns: of the files that are fetched.

    Raises PluginError without huggingface_hub; InputError if the repository, the revision or the network is
    not there.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise PluginError(
            f"opening {name!r} by its hub name needs huggingface_hub", todo="pip install 'd2qconv[hub]'"
        ) from error
    try:
        path = snapshot_download(
            name, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(IGNORED)
        )
    # The library's errors come from its own tree, from its HTTP client and from the system.
    except Exception as error:
        at = f" at revision {revision!r}" if revision else ""
        raise InputError(
            f"cannot be downloaded{at}: {_reason(error)}",
            where=name,
            todo="check the name, the network and, for a gated model, that you are logged in",
        ) from error
    return Path(path)


def _reason(error: BaseException) -> str:
    """One sentence of the library's message, which runs over many lines."""
    known = {
        "GatedRepoError": "access to this repository must be granted first",
        "RepositoryNotFoundError": "there is no such repository, or it is private",
        "RevisionNotFoundError": "there is no such revision",
        "LocalEntryNotFoundError": "the hub cannot be reached and the model is not in the cache",
        "OfflineModeIsEnabled": "offline mode is on and the model is not in the cache",
        "HFValidationError": "this is not a valid repository name",
    }
    name = type(error).__name__
    lines = str(error).strip().splitlines()
    return known.get(name, f"{name}: {lines[0] if lines else ''}".rstrip(": "))
