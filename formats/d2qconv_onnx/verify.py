"""Is a written package what the quantizer made, and does ONNX Runtime compute with it what it says?"""

from __future__ import annotations

import math
from contextlib import closing
from pathlib import Path

import numpy as np
import onnx
import torch

from d2qconv.arch.spec import ModelDesc
from d2qconv.budget import lacks_room
from d2qconv.decoder.rope import attention_factor, inverse_frequencies
from d2qconv.errors import VerifyError
from d2qconv.exporters.base import Check, Progress
from d2qconv.exporters.manifest import Manifest, files_check, read_manifest, require_known
from d2qconv.exporters.planned import SIDE_FILES
from d2qconv.measure.agreement import distance
from d2qconv.measure.reference import logits as reference_logits
from d2qconv.measure.reference import needed_bytes
from d2qconv.threads import each
from d2qconv_onnx.container import Container, open_model
from d2qconv_onnx.data import DATA
from d2qconv_onnx.genai import CONFIG, MODEL
from d2qconv_onnx.names import ROPE_COS, ROPE_SIN
from d2qconv_onnx.nodes import integer
from d2qconv_onnx.reader import Matrix, OnnxModel, desc_of, digest, read_model
from d2qconv_onnx.runtime import OrtModel, genai_greedy, installed, lacks

N_SEQUENCES, N_TOKENS, N_NEW = 2, 48, 16
#: Largest accepted difference of a logit, over the largest logit. f32 sums in another order: 8e-7 to 8e-6 measured on
#: 96 random models of two blocks, and no more on ones of 12 and 24 blocks: half of it is the reference's own. Ten times
#: that, so that a wider model does not fail for its sums; what is wrong moves logits by more than a thousandth.
EXACT_BOUND = 1e-4
#: Largest accepted `Distance.noise` with activations rounded to int8.
ROUNDED_BOUND = 0.10
_SHOWN = 5
#: Positions whose cos and sin are computed at a time.
_POSITIONS = 4096
#: Other machines' powers, cosines and sines differ by some units in the last place: accepted, of an angle and of 1.
_LAST_PLACES = 4 * float(np.finfo(np.float32).eps)


def verify_folder(path: Path, progress: Progress) -> list[Check]:
    """All checks of one package; see `Exporter.verify`. The runtimes see it only if the others passed."""
    manifest = read_manifest(path)
    require_known(path, manifest, (MODEL, DATA, CONFIG, *SIDE_FILES))
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
    lacking = lacks_room(runtime_bytes(model, desc))
    if lacking:
        return [*checks, Check("ONNX Runtime", f"{lacking}; not checked", True, is_skipped=True)]
    checks += _runtime_checks(model, desc, progress)
    if not all(check.is_passed for check in checks):
        return checks
    return [*checks, _genai_check(path, desc, manifest)]


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
    """Sizes fit each other (`desc_of` raised if not), and positions are turned as the model is said to turn them."""
    container = model.container
    turned = _rope_difference(container, desc)
    if turned is None:
        return Check("structure", f"{ROPE_COS} and {ROPE_SIN} are not what {desc.rope} gives", False)
    products = [node for node in model.nodes.values() if node.op_type == "MatMulNBits"]
    levels = {integer(container, node, "accuracy_level", 0) for node in products}
    bits = sorted({t.bits for t in model.tensors.values() if isinstance(t, Matrix)})
    detail = (
        f"{desc.arch.id}, {desc.dims.n_layers} blocks, {len(model.nodes)} nodes, containers of {bits} bits, "
        f"accuracy level {sorted(levels)}, cos and sin {turned}"
    )
    return Check("structure", detail, len(levels) == 1)


def _rope_difference(container: Container, desc: ModelDesc) -> str | None:
    """How near the stored tables are to cos and sin of position · frequency; None if they are others.

    A frequency that is off by a unit in its last place turns position p by p times as much, so far positions may
    differ by more.
    """
    frequencies, factor = inverse_frequencies(desc.rope, desc.dims.head), attention_factor(desc.rope)
    stored = container.array(ROPE_COS), container.array(ROPE_SIN)
    largest = 0.0
    for at in range(0, desc.max_positions, _POSITIONS):
        rows = slice(at, min(at + _POSITIONS, desc.max_positions))
        angles = torch.outer(torch.arange(rows.start, rows.stop).float(), frequencies)
        allowed = _LAST_PLACES * abs(factor) * (1 + angles.numpy().astype(np.float64))
        for table, wanted in zip(stored, (angles.cos(), angles.sin()), strict=True):
            off = np.abs(table[rows].astype(np.float64) - (wanted * factor).numpy())
            # Written so that what is not finite fails.
            if not (off <= allowed).all():
                return None
            largest = max(largest, float(off.max()))
    return f"within {largest:.1e}" if largest else "bit for bit"


def _standard_check(container: Container) -> Check:
    """Whether the model is legal ONNX, by the library's own checker with shape inference."""
    try:
        onnx.checker.check_model(str(container.path), full_check=True)
    # The checker raises what its C++ part throws, whatever that is.
    except Exception as error:  # noqa: BLE001
        return Check("onnx.checker", " ".join(str(error).split())[-300:], False)
    return Check("onnx.checker", f"onnx {onnx.__version__}, full check", True)


def runtime_bytes(model: OnnxModel, desc: ModelDesc) -> int:
    """About the bytes that a session and the reference take: the weights once more, packed for the kernels.

    At accuracy level 1 codes of 2 and 8 bits are decoded to a whole f32 matrix at every call.
    """
    stored = sum(span.n_bytes for span in model.container.spans.values())
    matrices = [t for t in model.tensors.values() if isinstance(t, Matrix)]
    largest = max((math.prod(t.shape) for t in matrices if t.bits != 4), default=0)
    return stored + 4 * largest + needed_bytes(desc, N_SEQUENCES * N_TOKENS)


def _runtime_checks(model: OnnxModel, desc: ModelDesc, progress: Progress) -> list[Check]:
    tokens = _tokens(desc)
    folder = model.container.folder
    try:
        progress(0, 3, "ONNX Runtime")
        rounded = OrtModel(folder).logits(tokens)
        progress(1, 3, "ONNX Runtime, accuracy level 1")
        exact = OrtModel(folder, accuracy_level=1).logits(tokens)
    except VerifyError as error:
        return [Check("ONNX Runtime loads it", error.what, False)]
    loads = Check("ONNX Runtime loads it", f"onnxruntime {installed('onnxruntime')}", True)
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
        loads,
        Check("ONNX Runtime computes it", first, near.largest <= EXACT_BOUND),
        Check("rounded activations", second, far.noise <= ROUNDED_BOUND),
    ]


def _genai_check(path: Path, desc: ModelDesc, manifest: Manifest) -> Check:
    """Greedy tokens of ONNX Runtime GenAI against ONNX Runtime's.

    Both leave out end tokens: a model may end at once, and then nothing would be compared.
    """
    name = "ONNX Runtime GenAI"
    missing = lacks({"onnxruntime-genai": manifest.requires.get("onnxruntime-genai", "0")})
    if missing:
        return Check(name, f"{missing}; not checked", True, is_skipped=True)
    prompt = _tokens(desc)[0, : N_TOKENS // 2].tolist()
    try:
        n_new = min(N_NEW, desc.max_positions - len(prompt))
        theirs = genai_greedy(path, prompt, n_new)
        ours = OrtModel(path).greedy(prompt, n_new, never=desc.eos_ids)
    except VerifyError as error:
        return Check(name, error.what, False)
    same = sum(1 for a, b in zip(ours, theirs, strict=False) if a == b)
    detail = f"{installed('onnxruntime-genai')}: {same} of {n_new} greedy tokens as ONNX Runtime's"
    return Check(name, detail, ours == theirs)


def _tokens(desc: ModelDesc) -> np.ndarray:
    """Random tokens that end no text, i64[N_SEQUENCES, length]."""
    random = np.random.default_rng(0)
    length = min(N_TOKENS, desc.max_positions)
    tokens = random.integers(0, desc.dims.vocab, (N_SEQUENCES, length))
    tokens[np.isin(tokens, desc.eos_ids)] = (max(desc.eos_ids, default=0) + 1) % desc.dims.vocab
    return tokens.astype(np.int64)
