"""Is a written package what the quantizer made, and does ONNX Runtime compute with it what it says?"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import onnx
import torch

from d2qconv.arch.spec import ModelDesc
from d2qconv.decoder.rope import cos_sin
from d2qconv.evaluate.agreement import distance
from d2qconv.evaluate.reference import logits as reference_logits
from d2qconv.export.base import Check, Progress
from d2qconv.export.manifest import Manifest, files_check, read_manifest
from d2qconv.threads import each
from d2qconv_onnx.container import Container, open_model
from d2qconv_onnx.names import ROPE_COS, ROPE_SIN
from d2qconv_onnx.reader import Matrix, OnnxModel, attributes, desc_of, digest, read_model
from d2qconv_onnx.runtime import OrtModel, genai_greedy, lacks

N_SEQUENCES, N_TOKENS, N_NEW = 2, 48, 16
#: Largest accepted difference of a logit, over the largest logit. f32 sums in another order: 1e-6 to 4e-6 measured on
#: random models of two blocks and trained ones of four.
EXACT_BOUND = 1e-5
#: Largest accepted `Distance.noise` with activations rounded to int8.
ROUNDED_BOUND = 0.10
_SHOWN = 5


def verify_folder(path: Path, progress: Progress) -> list[Check]:
    """All checks of one package; see `Exporter.verify`. The runtimes see it only if the others passed."""
    manifest = read_manifest(path)
    checks = [files_check(path, manifest)]
    container = open_model(path)
    model = read_model(container)
    checks += [_record_check(model, manifest, progress)]
    desc = desc_of(model)
    checks += [_structure_check(model, desc), _standard_check(container)]
    if not all(check.is_passed for check in checks):
        return checks
    missing = lacks({"onnxruntime": manifest.requires.get("onnxruntime", "0")})
    if missing:
        return [*checks, Check("ONNX Runtime", f"{missing}; not checked", True, is_skipped=True)]
    return [*checks, *_runtime_checks(model, desc, progress), _genai_check(path, desc, manifest)]


def _record_check(model: OnnxModel, manifest: Manifest, progress: Progress) -> Check:
    """Every tensor decoded from its bytes has the digest that the quantizer's own decoding had."""
    names = sorted(model.tensors)
    found: dict[str, str] = {}
    jobs = [model.tensors[name] for name in names]
    # Pieces are small: as many tensors as there are threads fit into any memory.
    with closing(each(jobs, digest, cost=lambda _: 0, budget=0, in_order=False)) as done:
        for number, sha256 in done:
            progress(len(found), len(names), f"decode {names[number]}")
            found[names[number]] = sha256
    recorded = manifest.decoded_sha256
    wrong = [name for name in names if recorded.get(name) != found[name]]
    wrong += sorted(set(recorded) - set(found))
    n_values = sum(int(np.prod(t.shape)) for t in jobs)
    good = f"{len(found)} tensors, {n_values:,} values, bit for bit equal when decoded by a reader of its own"
    bad = f"{len(wrong)} of {len(recorded)} tensors differ from their record: {', '.join(wrong[:_SHOWN])}"
    return Check("decoded values", bad if wrong else good, not wrong)


def _structure_check(model: OnnxModel, desc: ModelDesc) -> Check:
    """Sizes fit each other (`desc_of` raised if not); heads and positions are those that the model is said to have."""
    half = desc.dims.head // 2
    tables = cos_sin(desc.rope, desc.dims.head, range(desc.max_positions), "cpu")
    for name, wanted in zip((ROPE_COS, ROPE_SIN), tables, strict=True):
        if not np.array_equal(model.container.array(name), wanted[:, :half].numpy()):
            return Check("structure", f"{name} is not what the rotary embedding gives", False)
    levels = {attributes(node).get("accuracy_level", 0) for node in model.nodes.values() if _is_product(node)}
    bits = sorted({t.bits for t in model.tensors.values() if isinstance(t, Matrix)})
    detail = (
        f"{desc.arch.id}, {desc.dims.n_layers} blocks, {len(model.nodes)} nodes, containers of {bits} bits, "
        f"accuracy level {sorted(levels)}"
    )
    return Check("structure", detail, len(levels) == 1)


def _is_product(node: onnx.NodeProto) -> bool:
    return bool(node.op_type == "MatMulNBits")


def _standard_check(container: Container) -> Check:
    """Whether the model is legal ONNX, by the library's own checker with shape inference."""
    try:
        onnx.checker.check_model(str(container.path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, RuntimeError) as error:
        return Check("onnx.checker", " ".join(str(error).split())[-300:], False)
    return Check("onnx.checker", f"onnx {onnx.__version__}, full check", True)


def _runtime_checks(model: OnnxModel, desc: ModelDesc, progress: Progress) -> list[Check]:
    tokens = _tokens(desc)
    folder = model.container.folder
    progress(0, 3, "ONNX Runtime")
    rounded = OrtModel(folder).logits(tokens)
    progress(1, 3, "ONNX Runtime, accuracy level 1")
    exact = OrtModel(folder, accuracy_level=1).logits(tokens)
    progress(2, 3, "float reference")
    wanted = reference_logits(desc, torch.from_numpy(tokens), device="cpu").numpy()
    near, far = distance(wanted, exact), distance(wanted, rounded)
    first = (
        f"largest difference of a logit {near.largest:.2e} of the largest logit (allowed {EXACT_BOUND:g}) over "
        f"{near.n_positions} positions at accuracy level 1"
    )
    second = (
        f"mean KL {far.mean_kl:.2e} nats, logit noise {100 * far.noise:.3g} % (allowed {100 * ROUNDED_BOUND:g} %) at "
        "the package's own accuracy level"
    )
    return [
        Check("ONNX Runtime computes it", first, near.largest <= EXACT_BOUND),
        Check("rounded activations", second, far.noise <= ROUNDED_BOUND),
    ]


def _genai_check(path: Path, desc: ModelDesc, manifest: Manifest) -> Check:
    """Greedy tokens of ONNX Runtime GenAI against ONNX Runtime's, up to an end token."""
    name = "ONNX Runtime GenAI"
    missing = lacks({"onnxruntime-genai": manifest.requires.get("onnxruntime-genai", "0")})
    if missing:
        return Check(name, f"{missing}; not checked", True, is_skipped=True)
    prompt = _tokens(desc)[0, : N_TOKENS // 2].tolist()
    theirs = genai_greedy(path, prompt, min(N_NEW, desc.max_positions - len(prompt)))
    ours = OrtModel(path).greedy(prompt, len(theirs))
    same = sum(1 for a, b in zip(ours, theirs, strict=True) if a == b)
    return Check(
        name, f"{same} of {len(theirs)} greedy tokens as ONNX Runtime's", bool(theirs) and ours == theirs
    )


def _tokens(desc: ModelDesc) -> np.ndarray:
    """Random tokens that end no text, i64[N_SEQUENCES, length]."""
    random = np.random.default_rng(0)
    length = min(N_TOKENS, desc.max_positions)
    tokens = random.integers(0, desc.dims.vocab, (N_SEQUENCES, length))
    tokens[np.isin(tokens, desc.eos_ids)] = (max(desc.eos_ids, default=0) + 1) % desc.dims.vocab
    return tokens.astype(np.int64)
