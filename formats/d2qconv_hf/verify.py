"""Is a written folder what the quantizer made, and does its runtime compute with it what it says?"""

from __future__ import annotations

import hashlib
import math
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from d2qconv.arch.spec import ModelDesc
from d2qconv.budget import lacks_room
from d2qconv.errors import VerifyError
from d2qconv.exporters.base import Check, Progress
from d2qconv.exporters.manifest import Manifest, files_check, read_manifest, require_known
from d2qconv.exporters.planned import SIDE_FILES
from d2qconv.measure.agreement import distance
from d2qconv.measure.reference import logits as reference_logits
from d2qconv.measure.reference import needed_bytes
from d2qconv.threads import each
from d2qconv_hf import runtime
from d2qconv_hf.config import LICENSES
from d2qconv_hf.container import INDEX, open_folder
from d2qconv_hf.dialects.base import Facts
from d2qconv_hf.reader import Model, read_model

N_SEQUENCES, N_TOKENS = 2, 48
#: What a manifest says of step · (code - zero), and the value for packages whose products a runtime cannot round.
PRODUCTS, EXACT = "products", "exact in float16"
#: Largest accepted difference of a logit, over the largest one, where they may be rounded.
ROUNDED_BOUND = 5e-3
_SHOWN = 5


def verify_folder(path: Path, facts: Facts, progress: Progress) -> list[Check]:
    """All checks of one package; see `Exporter.verify`. The runtime sees it only if the others passed."""
    manifest = read_manifest(path)
    opened = open_folder(path)
    weights = {span.path.name for span in opened.spans.values()}
    require_known(path, manifest, ("config.json", INDEX, *weights, *SIDE_FILES, *LICENSES))
    checks = [files_check(path, manifest)]
    model = read_model(opened, str(manifest.facts.get("architecture")))
    checks += [_record_check(model, manifest, progress)]
    if not all(check.is_passed for check in checks):
        return checks
    return [*checks, _runtime_check(path, model, facts, manifest, progress)]


def _record_check(model: Model, manifest: Manifest, progress: Progress) -> Check:
    """Every tensor decoded from its bytes has the digest that the quantizer's own decoding had."""
    recorded = manifest.decoded_sha256
    found: dict[str, str] = {}
    n_values = 0
    names = [*model.matrices, *model.floats]

    def work(name: str) -> tuple[str, bool, int]:
        matrix = model.matrices.get(name)
        pieces = matrix.pieces() if matrix is not None else model.folder.span(name).pieces()
        sha, is_something, size = hashlib.sha256(), False, 0
        for piece in pieces:
            sha.update(np.ascontiguousarray(piece, dtype="<f4").data)
            is_something = is_something or bool(piece.any())
            size += piece.size
        return sha.hexdigest(), is_something, size

    with closing(each(names, work, cost=lambda _: 0, budget=0, in_order=False)) as done:
        for number, (sha256, is_something, size) in done:
            name = names[number]
            progress(len(found), len(names), f"decode {name}")
            # Zero biases are there for a label's sake, and no record is kept of them.
            if name in recorded or is_something or not name.endswith(".bias"):
                found[name] = sha256
                n_values += size
    wrong = [name for name in found if recorded.get(name) != found[name]] + sorted(set(recorded) - set(found))
    good = f"{len(found)} tensors, {n_values:,} values, bit for bit equal when decoded by a reader of its own"
    bad = f"{len(wrong)} of {len(recorded)} tensors differ from their record: {', '.join(wrong[:_SHOWN])}"
    return Check("decoded values", bad if wrong else good, not wrong)


def _runtime_check(path: Path, model: Model, facts: Facts, manifest: Manifest, progress: Progress) -> Check:
    """Logits of the runtime against the float reference of the decoded weights."""
    name = f"{facts.runtime} computes it"
    absent = runtime.missing(facts.name)
    if absent:
        return Check(name, f"{absent}; not checked", True, is_skipped=True)
    lacking = lacks_room(runtime_bytes(model, facts))
    if lacking:
        return Check(name, f"{lacking}; not checked", True, is_skipped=True)
    tokens = _tokens(model.desc)
    progress(0, 2, "float reference")
    wanted = reference_logits(model.desc, torch.from_numpy(tokens), device="cpu").numpy()
    progress(1, 2, facts.runtime)
    try:
        seen = runtime.logits(facts.name, path, tokens)
    except VerifyError as error:
        return Check(name, error.what, False)
    bound = facts.bound if manifest.facts.get(PRODUCTS) == EXACT else max(facts.bound, ROUNDED_BOUND)
    near = distance(wanted, seen)
    detail = (
        f"{runtime.versions(facts.name)}: largest difference of a logit {near.largest:.2e} of the largest logit "
        f"(allowed {bound:g}) over {near.n_positions} positions"
    )
    return Check(name, detail, near.largest <= bound)


def runtime_bytes(model: Model, facts: Facts) -> int:
    """About the bytes that the runtime and the reference take.

    transformers holds every weight in f32, and beside them the largest matrix and its codes while it unpacks; MLX keeps
    codes packed, and makes its float arrays f32.
    """
    n_weights = [dense.n_elements for dense in model.desc.tensors.values()]
    if facts.runtime == "mlx-lm":
        coded = sum(matrix.scheme.bits * math.prod(matrix.shape) // 8 for matrix in model.matrices.values())
        whole = sum(n_weights) - sum(math.prod(m.shape) for m in model.matrices.values())
        held = 2 * coded + 4 * whole
    else:
        held = 4 * (sum(n_weights) + 2 * max(n_weights))
    return held + needed_bytes(model.desc, N_SEQUENCES * N_TOKENS)


def _tokens(desc: ModelDesc) -> np.ndarray:
    """Random tokens, i64[N_SEQUENCES, length]."""
    random = np.random.default_rng(0)
    length = min(N_TOKENS, desc.max_positions)
    return random.integers(0, desc.dims.vocab, (N_SEQUENCES, length)).astype(np.int64)
