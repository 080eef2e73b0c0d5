"""Is a written GGUF what the quantizer made, and does llama.cpp compute with it what it says?"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from gguf.constants import GGUF_DEFAULT_ALIGNMENT

from d2qconv.arch.spec import ModelDesc
from d2qconv.budget import lacks_room
from d2qconv.decoder.rope import attention_factor, inverse_frequencies
from d2qconv.errors import VerifyError
from d2qconv.exporters.base import Check, Progress
from d2qconv.measure.agreement import distance
from d2qconv.measure.reference import logits as reference_logits
from d2qconv.measure.reference import needed_bytes
from d2qconv.threads import each
from d2qconv_gguf.container import GgufFile, StoredTensor, read
from d2qconv_gguf.ggml_types import NEEDS, NewerType
from d2qconv_gguf.metadata import METADATA_SHA256, metadata_digest
from d2qconv_gguf.reader import layout_of, model_of
from d2qconv_gguf.runtime import LlamaCpp, is_installed
from d2qconv_gguf.shards import SPLIT_KEYS
from d2qconv_gguf.zeros import padding_check

N_SEQUENCES = 4
N_TOKENS = 64
_SHOWN = 5
#: Keys of the record that the values are compared with.
RECORD = ("d2qconv.tensor_names", "d2qconv.decoded_sha256")

#: Largest accepted `Distance.noise` by the least exact type in the file. Measured on four random models of two blocks
#: and two trained ones of four (right file): F32 1e-6, F16 0.2 %, BF16 1.2 %, quantized 1.3-5.7 %. Wrong files (rows of
#: q in the wrong order, heads or rows swapped, a bias or a gain of noticeable size left out): 17-140 %.
BOUNDS = {"F32": 0.001, "F16": 0.01, "BF16": 0.03}
QUANTIZED_BOUND = 0.10


def verify_file(path: Path, progress: Progress) -> list[Check]:
    """All checks of one file; see `Exporter.verify`. The runtime sees the file only if the others passed."""
    file = read(path)
    layout_of(file)
    checks = [_record_check(file, progress), metadata_check(file)]
    model = model_of(file)
    checks += [structure_check(file, model)]
    padding = padding_check(file, model)
    checks += [] if padding is None else [padding]
    if not all(c.is_passed for c in checks):
        return checks
    if not is_installed():
        return [
            *checks,
            Check(
                "llama.cpp",
                "not installed (pip install 'd2qconv[verify]'); not checked",
                True,
                is_skipped=True,
            ),
        ]
    return [*checks, *_runtime_checks(file, model, progress)]


def require_same_function(path: Path, source: ModelDesc) -> None:
    """Raise VerifyError if the file's metadata describe another computation than the source's config.

    A wrong RoPE base or norm epsilon moves a 2-bit file's logits by less than the rounding of llama.cpp's kernels,
    so it is looked for here: everything is read back with the meaning that llama.cpp gives it.
    """
    found = model_of(read(path))
    head = source.dims.head
    pairs = {
        "sizes": (found.dims, source.dims),
        "context length": (found.max_positions, source.max_positions),
        "tied head": (found.is_tied, source.is_tied),
        "q and k norms": (found.arch.has_qk_norm, source.arch.has_qk_norm),
    }
    wrong = [f"{name}: {a} instead of {b}" for name, (a, b) in pairs.items() if a != b]
    numbers = {
        "norm epsilon": (torch.tensor(found.norm_eps), torch.tensor(source.norm_eps)),
        "RoPE frequencies": (inverse_frequencies(found.rope, head), inverse_frequencies(source.rope, head)),
        "RoPE attention factor": (
            torch.tensor(attention_factor(found.rope)),
            torch.tensor(attention_factor(source.rope)),
        ),
    }
    wrong += [name for name, (a, b) in numbers.items() if not torch.allclose(a, b, rtol=1e-4, atol=0)]
    if wrong:
        raise VerifyError(
            f"its metadata describe another model than the source: {'; '.join(wrong)}", where=str(path)
        )


def _record_check(file: GgufFile, progress: Progress) -> Check:
    """Every tensor decoded by gguf-py has the digest that the quantizer's own decoding had."""
    names, recorded = (file.keys.get(key) for key in RECORD)
    if not isinstance(names, list) or not isinstance(recorded, list) or len(names) != len(recorded):
        raise VerifyError(
            "has no record of its tensors",
            where=str(file.path),
            todo="only files that d2qconv wrote can be verified",
        )
    digests = dict(zip(names, recorded, strict=True))
    found = decoded_digests(file, progress)
    wrong = [name for name in file.tensors if digests.get(name) != found[name]]
    wrong += sorted(set(digests) - set(file.tensors))
    n_weights = sum(int(np.prod(t.shape)) for t in file.tensors.values())
    newer = sorted({t.type.name for t in file.tensors.values() if isinstance(t.type, NewerType)})
    also = (
        f" (gguf-py does not know {', '.join(newer)}: by a second decoder of d2qconv's own)" if newer else ""
    )
    good = f"{len(digests)} tensors, {n_weights:,} values, bit for bit equal when decoded by gguf-py{also}"
    more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
    bad = (
        f"{len(wrong)} of {len(digests)} tensors differ from their record: {', '.join(wrong[:_SHOWN])}{more}"
    )
    return Check("decoded values", bad if wrong else good, not wrong)


def decoded_digests(file: GgufFile, progress: Progress) -> dict[str, str]:
    """Digest of every tensor as gguf-py decodes it; tensors in threads, each in pieces, largest first."""
    tensors = sorted(file.tensors.values(), key=lambda t: -t.n_bytes)
    found: dict[str, str] = {}
    # Pieces are small: as many tensors as there are threads fit into any memory.
    done = each(tensors, StoredTensor.digest, cost=lambda _: 0, budget=0, in_order=False)
    with closing(done):
        for number, digest in done:
            progress(len(found), len(tensors), f"decode {tensors[number].name}")
            found[tensors[number].name] = digest
    return found


def metadata_check(file: GgufFile) -> Check:
    """Every key has the value that was written, and nothing stands behind the last tensor but padding."""
    if file.keys.get(METADATA_SHA256) != metadata_digest(file.keys):
        return Check("metadata", "keys or tokens are not those that were written", False)
    for part in file.files:
        if part.n_spare >= GGUF_DEFAULT_ALIGNMENT:
            return Check(
                "metadata", f"{part.n_spare} bytes behind the last tensor of {part.path.name}", False
            )
    strange = sorted(key for part in file.others for key in part.keys if key not in SPLIT_KEYS)
    if strange:
        return Check(
            "metadata", f"a file that is not the first has keys: {', '.join(strange[:_SHOWN])}", False
        )
    split = f" in {len(file.files)} files" if file.others else ""
    return Check("metadata", f"{len(file.keys)} keys as they were written{split}", True)


def structure_check(file: GgufFile, model: ModelDesc) -> Check:
    """Names, shapes and hyper-parameters fit each other (`model_of` raised if not), and so does the vocabulary."""
    tokens = file.keys.get("tokenizer.ggml.tokens")
    n_tokens = len(tokens) if isinstance(tokens, list) else 0
    detail = (
        f"{file.architecture}, {model.dims.n_layers} blocks, {len(file.tensors)} tensors, {n_tokens} tokens"
    )
    if n_tokens != model.dims.vocab:
        return Check("structure", f"{n_tokens} tokens, but {model.dims.vocab} rows in the embedding", False)
    return Check("structure", detail, True)


def _runtime_checks(file: GgufFile, model: ModelDesc, progress: Progress) -> list[Check]:
    """llama.cpp loads the file, and its logits are the reference's up to the rounding of its kernels."""
    length = min(N_TOKENS, model.max_positions)
    lacking = lacks_room(needed_bytes(model, N_SEQUENCES * length))
    if lacking:
        return [Check("llama.cpp", f"{lacking}; not checked", True, is_skipped=True)]
    try:
        with LlamaCpp(file.path, n_context=max(length, 8), is_mapped=True) as runtime:
            loads = Check("llama.cpp loads it", runtime.version(), True)
            progress(0, 2, "llama.cpp")
            sequences = sample_sequences(runtime, N_SEQUENCES, length)
            seen = np.stack([runtime.logits(s) for s in sequences])
    except VerifyError as error:
        too_old = _too_old(file, error.what)
        return [too_old or Check("llama.cpp loads it", error.what, False)]
    progress(1, 2, "float reference")
    wanted = reference_logits(model, torch.tensor(sequences), device="cpu").float().numpy()
    found, allowed = distance(wanted, seen), bound(file)
    detail = (
        f"mean KL {found.mean_kl:.2e} nats, logit noise {100 * found.noise:.3g} % (allowed {100 * allowed:g} %) "
        f"over {found.n_positions} positions"
    )
    return [loads, Check("llama.cpp computes it", detail, found.noise <= allowed)]


def _too_old(file: GgufFile, said: str) -> Check | None:
    """The check left out because this llama.cpp does not know a type of the file, by its own words; else None."""
    for newer in NewerType:
        if f"invalid ggml type {int(newer)}." in said and any(t.type is newer for t in file.tensors.values()):
            what = f"{LlamaCpp.version()} does not know {newer.name}, which needs {NEEDS[newer]}; not checked"
            return Check("llama.cpp", what, True, is_skipped=True)
    return None


def sample_sequences(runtime: LlamaCpp, n: int, length: int) -> list[list[int]]:
    """Text that the model itself makes, drawn at temperature 1: tokens as they occur, without any text of ours."""
    start = runtime.bos if runtime.bos is not None else 0
    return [[start, *runtime.sample([start], length - 1, seed)] for seed in range(n)]


def bound(file: GgufFile) -> float:
    """Largest accepted logit noise of that file: how coarsely llama.cpp rounds activations for its types."""
    kinds = {t.type.name for t in file.tensors.values()}
    return max(BOUNDS.get(kind, QUANTIZED_BOUND) for kind in kinds)
