"""Drive a prebuilt llama.cpp through ctypes: tokenize, logits, activation sums, quantize, tensor list.

What is loaded: a folder with ``libllama*.so`` and ``libggml*.so`` of llama.cpp v0.5.0, for example
- the npm package ``@node-llama-cpp/linux-x64`` 3.22.1 (``npm pack``, unpack, ``package/bins/linux-x64``);
- ``site-packages/llama_cpp/lib`` of the PyPI package ``llama-cpp-python`` 0.3.36;
- the ``bin`` folder of an own build.
Why ctypes: no Python wheel passes an importance matrix to ``llama_model_quantize``.
Struct layouts follow ``include/llama.h`` and ``ggml/include/ggml.h`` of that release. The default values that
the library itself returns are compared with the expected ones; another layout raises ``LayoutError``.
"""

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator, Mapping
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]

# enum ggml_type and the enum llama_ftype whose --pure result is that type in every matrix.
GGML_TYPES = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "q2_k": 10, "q3_k": 11,
    "q4_k": 12, "q5_k": 13, "q6_k": 14, "iq2_xxs": 16, "iq2_xs": 17, "iq3_xxs": 18, "iq1_s": 19, "iq4_nl": 20,
    "iq3_s": 21, "iq2_s": 22, "iq4_xs": 23, "iq1_m": 29, "bf16": 30, "tq1_0": 34, "tq2_0": 35, "q2_0": 42,
}  # fmt: skip
FTYPES = {
    "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k": 11, "q4_k": 14, "q5_k": 16,
    "q6_k": 18, "iq2_xxs": 19, "iq2_xs": 20, "iq3_xxs": 23, "iq1_s": 24, "iq4_nl": 25, "iq3_s": 26,
    "iq2_s": 29, "iq4_xs": 30, "iq1_m": 31, "tq1_0": 36, "tq2_0": 37, "q2_0": 41,
}  # fmt: skip
# enum ggml_log_level: warnings and errors are kept; everything while a dry run speaks.
LOG_KEPT = (3, 4)


class LlamaError(RuntimeError):
    """llama.cpp returned an error; the message holds its last log lines."""


class LayoutError(LlamaError):
    """The library's structs are not those of the release that this module was written for."""


class _ModelParams(ctypes.Structure):
    # Opaque: passed by value on the stack, so a larger struct is harmless (SysV x86-64 ABI, class MEMORY).
    _fields_ = (("bytes", ctypes.c_uint8 * 256), ("align", c_void_p))


class _ContextParams(ctypes.Structure):
    _fields_ = (
        ("n_ctx", c_uint32), ("n_batch", c_uint32), ("n_ubatch", c_uint32), ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32), ("n_outputs_max", c_uint32), ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32), ("n_threads_batch", c_int32), ("ctx_type", c_int32),
        ("rope_scaling_type", c_int32), ("pooling_type", c_int32), ("attention_type", c_int32),
        ("flash_attn_type", c_int32), ("rope", c_float * 6), ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float), ("cb_eval", c_void_p), ("cb_eval_user_data", c_void_p),
        ("type_k", c_int32), ("type_v", c_int32), ("abort_callback", c_void_p), ("abort_data", c_void_p),
        ("embeddings", c_bool), ("offload_kqv", c_bool), ("no_perf", c_bool), ("op_offload", c_bool),
        ("swa_full", c_bool), ("kv_unified", c_bool), ("tail", c_void_p * 8),
    )  # fmt: skip


class _ImatrixEntry(ctypes.Structure):
    _fields_ = (("name", c_char_p), ("data", POINTER(c_float)), ("size", c_size_t))


class _TensorOverride(ctypes.Structure):
    _fields_ = (("pattern", c_char_p), ("type", c_int32))


class _QuantizeParams(ctypes.Structure):
    _fields_ = (
        ("nthread", c_int32), ("ftype", c_int32), ("output_tensor_type", c_int32),
        ("token_embedding_type", c_int32), ("allow_requantize", c_bool), ("quantize_output_tensor", c_bool),
        ("only_copy", c_bool), ("pure", c_bool), ("keep_split", c_bool), ("dry_run", c_bool),
        ("imatrix", c_void_p), ("kv_overrides", c_void_p), ("tt_overrides", c_void_p),
        ("prune_layers", c_void_p), ("max_buf_size", c_size_t), ("tail", c_void_p * 4),
    )  # fmt: skip


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", c_int32), ("token", POINTER(c_int32)), ("embd", c_void_p), ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)), ("seq_id", POINTER(POINTER(c_int32))), ("logits", POINTER(c_int8)),
    )  # fmt: skip


class _Tensor(ctypes.Structure):
    """struct ggml_tensor; it points to itself, so its fields come after the class."""


_Tensor._fields_ = (
    ("type", c_int32), ("buffer", c_void_p), ("ne", c_int64 * 4), ("nb", c_size_t * 4), ("op", c_int32),
    ("op_params", c_int32 * 16), ("flags", c_int32), ("src", POINTER(_Tensor) * 10), ("view_src", c_void_p),
    ("view_offs", c_size_t), ("data", c_void_p), ("name", ctypes.c_char * 64),
)  # fmt: skip

_EvalCallback = ctypes.CFUNCTYPE(c_bool, POINTER(_Tensor), c_bool, c_void_p)
_LogCallback = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)


class _GgufInitParams(ctypes.Structure):
    _fields_ = (("no_alloc", c_bool), ("ctx", c_void_p))


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a GGUF file: ggml type id and name, shape in ggml order (row length first), bytes."""

    name: str
    type_id: int
    type_name: str
    shape: tuple[int, ...]
    n_bytes: int

    @property
    def n_elements(self) -> int:
        return int(np.prod(self.shape))


def _find(folder: Path, stem: str) -> Path:
    hits = sorted(p for p in folder.iterdir() if p.name.startswith(stem + ".") and ".so" in p.name)
    if not hits:
        raise LlamaError(f"{folder}: no {stem}*.so here; pass the folder that holds libllama and libggml")
    return hits[0]


class Library:
    """The loaded llama.cpp; ``folder`` holds its shared libraries."""

    def __init__(self, folder: Path, n_threads: int) -> None:
        self.folder = folder.resolve()
        self.n_threads = n_threads
        self.log: list[str] = []
        self._said: list[str] | None = None
        self.base = ctypes.CDLL(str(_find(self.folder, "libggml-base")), mode=ctypes.RTLD_GLOBAL)
        self.ggml = ctypes.CDLL(str(_find(self.folder, "libggml")), mode=ctypes.RTLD_GLOBAL)
        self.llama = ctypes.CDLL(str(_find(self.folder, "libllama")), mode=ctypes.RTLD_GLOBAL)
        self._declare()
        self._log_callback = _LogCallback(self._on_log)
        self.llama.llama_log_set(self._log_callback, None)
        self.ggml.ggml_backend_load_all_from_path(os.fsencode(self.folder))
        self.llama.llama_backend_init()
        self._check_layout()

    def _on_log(self, level: int, text: bytes, _data: int | None) -> None:
        if self._said is not None:
            self._said.append(text.decode(errors="replace"))
        if level in LOG_KEPT:
            self.log = [*self.log[-19:], text.decode(errors="replace").rstrip()]

    def _declare(self) -> None:
        ll, gb = self.llama, self.base
        ll.llama_model_default_params.restype = _ModelParams
        ll.llama_context_default_params.restype = _ContextParams
        ll.llama_model_quantize_default_params.restype = _QuantizeParams
        ll.llama_model_load_from_file.argtypes = [c_char_p, _ModelParams]
        ll.llama_model_load_from_file.restype = c_void_p
        ll.llama_model_free.argtypes = [c_void_p]
        ll.llama_model_get_vocab.argtypes, ll.llama_model_get_vocab.restype = [c_void_p], c_void_p
        ll.llama_init_from_model.argtypes = [c_void_p, _ContextParams]
        ll.llama_init_from_model.restype = c_void_p
        ll.llama_free.argtypes = [c_void_p]
        ll.llama_set_n_threads.argtypes = [c_void_p, c_int32, c_int32]
        ll.llama_get_memory.argtypes, ll.llama_get_memory.restype = [c_void_p], c_void_p
        ll.llama_memory_clear.argtypes = [c_void_p, c_bool]
        ll.llama_batch_init.argtypes, ll.llama_batch_init.restype = [c_int32, c_int32, c_int32], _Batch
        ll.llama_batch_free.argtypes = [_Batch]
        ll.llama_decode.argtypes, ll.llama_decode.restype = [c_void_p, _Batch], c_int32
        ll.llama_get_logits.argtypes, ll.llama_get_logits.restype = [c_void_p], POINTER(c_float)
        ll.llama_vocab_n_tokens.argtypes = [c_void_p]
        ll.llama_vocab_get_add_bos.argtypes, ll.llama_vocab_get_add_bos.restype = [c_void_p], c_bool
        ll.llama_vocab_bos.argtypes, ll.llama_vocab_bos.restype = [c_void_p], c_int32
        ll.llama_tokenize.argtypes = [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]
        ll.llama_model_quantize.argtypes = [c_char_p, c_char_p, POINTER(_QuantizeParams)]
        ll.llama_model_quantize.restype = c_uint32
        self.ggml.ggml_backend_load_all_from_path.argtypes = [c_char_p]
        gb.ggml_op_desc.argtypes, gb.ggml_op_desc.restype = [POINTER(_Tensor)], c_char_p
        gb.ggml_get_name.argtypes, gb.ggml_get_name.restype = [POINTER(_Tensor)], c_char_p
        gb.ggml_backend_tensor_get.argtypes = [POINTER(_Tensor), c_void_p, c_size_t, c_size_t]
        gb.ggml_type_name.argtypes, gb.ggml_type_name.restype = [c_int32], c_char_p
        gb.ggml_commit.restype = gb.ggml_version.restype = c_char_p
        gb.gguf_init_from_file.argtypes, gb.gguf_init_from_file.restype = (
            [c_char_p, _GgufInitParams],
            c_void_p,
        )
        gb.gguf_free.argtypes = [c_void_p]
        gb.gguf_get_n_tensors.argtypes, gb.gguf_get_n_tensors.restype = [c_void_p], c_int64
        for name, result in (
            ("name", c_char_p), ("type", c_int32), ("size", c_size_t), ("ne", POINTER(c_int64))
        ):  # fmt: skip
            getattr(gb, f"gguf_get_tensor_{name}").argtypes = [c_void_p, c_int64]
            getattr(gb, f"gguf_get_tensor_{name}").restype = result

    def _check_layout(self) -> None:
        c = self.llama.llama_context_default_params()
        q = self.llama.llama_model_quantize_default_params()
        context = (c.n_ctx, c.n_batch, c.n_ubatch, c.n_seq_max, c.cb_eval, c.type_k, c.type_v, c.offload_kqv)
        quantize = (q.ftype >= 0, q.output_tensor_type, q.quantize_output_tensor, q.pure, q.imatrix)
        if context != (512, 2048, 512, 1, None, 1, 1, True):
            raise LayoutError(f"{self.folder}: llama_context_params has another layout: {context}")
        if quantize[0] is not True or quantize[2:] != (True, False, None):
            raise LayoutError(f"{self.folder}: llama_model_quantize_params has another layout: {quantize}")

    @property
    def version(self) -> str:
        """ggml's version and commit, as the library states them."""
        return f"ggml {self.base.ggml_version().decode()} commit {self.base.ggml_commit().decode()}"

    def fail(self, what: str) -> LlamaError:
        return LlamaError(what + ": " + " | ".join(self.log[-4:]))

    def tensors(self, file: Path) -> dict[str, TensorInfo]:
        """Every tensor of a GGUF file, in file order."""
        handle = self.base.gguf_init_from_file(os.fsencode(file), _GgufInitParams(True, None))
        if not handle:
            raise self.fail(f"{file}: llama.cpp cannot read this GGUF")
        try:
            return {t.name: t for t in self._tensors(handle)}
        finally:
            self.base.gguf_free(handle)

    def _tensors(self, handle: int) -> Iterator[TensorInfo]:
        gb = self.base
        for i in range(gb.gguf_get_n_tensors(handle)):
            ne = gb.gguf_get_tensor_ne(handle, i)[:4]
            while len(ne) > 1 and ne[-1] == 1:
                ne.pop()
            type_id = gb.gguf_get_tensor_type(handle, i)
            yield TensorInfo(
                gb.gguf_get_tensor_name(handle, i).decode(),
                type_id,
                gb.ggml_type_name(type_id).decode(),
                tuple(ne),
                gb.gguf_get_tensor_size(handle, i),
            )

    def quantize(
        self,
        source: Path,
        target: Path,
        type_name: str,
        imatrix: Mapping[str, F32],
        overrides: Mapping[str, str],
        embedding: str = "q8_0",
    ) -> None:
        """``llama-quantize --pure --imatrix``: ``llama_model_quantize`` with C structs.

        imatrix: tensor name → f32[n_in], the mean of x² (llama-quantize divides its sums by the counts
        before this call). overrides: tensor name → type name, for files that are not of one type.
        Raises LlamaError with llama.cpp's own message.
        """
        entries, _kept = _entries(imatrix)
        patterns = (_TensorOverride * (len(overrides) + 1))()
        for item, (name, wanted) in zip(patterns, overrides.items(), strict=False):
            item.pattern, item.type = b"^" + name.replace(".", "\\.").encode() + b"$", GGML_TYPES[wanted]
        patterns[len(overrides)].type = self._type_count()
        params = self.llama.llama_model_quantize_default_params()
        params.nthread, params.ftype, params.pure = self.n_threads, FTYPES[type_name], True
        params.token_embedding_type = params.output_tensor_type = GGML_TYPES[embedding]
        if imatrix:
            params.imatrix = ctypes.addressof(entries)
        if overrides:
            params.tt_overrides = ctypes.addressof(patterns)
        if self.llama.llama_model_quantize(os.fsencode(source), os.fsencode(target), params) != 0:
            raise self.fail(f"{target}: llama_model_quantize to {type_name} failed")

    def quantize_mix(self, source: Path, target: Path | None, ftype: int, imatrix: Mapping[str, F32]) -> str:
        """``llama-quantize --imatrix`` to one of its mixes; to no file: a dry run. Returns all that it says.

        imatrix: as for ``quantize``. Raises LlamaError with llama.cpp's own message.
        """
        entries, _kept = _entries(imatrix)
        params = self.llama.llama_model_quantize_default_params()
        params.nthread, params.ftype, params.dry_run = self.n_threads, ftype, target is None
        params.imatrix = ctypes.addressof(entries)
        self._said = said = []
        try:
            status = self.llama.llama_model_quantize(
                os.fsencode(source), os.fsencode(target or os.devnull), params
            )
        finally:
            self._said = None
        if status != 0:
            raise self.fail(f"{source}: llama_model_quantize to file type {ftype} failed")
        return "".join(said)

    def _type_count(self) -> int:
        return int(self.llama.llama_model_quantize_default_params().output_tensor_type)


def _entries(imatrix: Mapping[str, F32]) -> tuple["ctypes.Array[_ImatrixEntry]", list[F32]]:
    """The importance matrix as C has it, and the arrays that it points into: keep both while it is used."""
    entries = (_ImatrixEntry * (len(imatrix) + 1))()
    kept = []
    for entry, (name, values) in zip(entries, imatrix.items(), strict=False):
        flat = np.ascontiguousarray(values, np.float32)
        kept.append(flat)
        entry.name, entry.size = name.encode(), flat.size
        entry.data = flat.ctypes.data_as(POINTER(c_float))
    return entries, kept


class Model:
    """One GGUF opened by llama.cpp with a context of ``n_ctx`` tokens.

    on_product, if given, is called as ``on_product(weight name, x)`` for every MUL_MAT with a ``blk.*`` weight
    and at least 16 rows, x: f32[..., n_in] (tools/imatrix/imatrix.cpp, collect_imatrix).
    """

    def __init__(
        self, lib: Library, file: Path, n_ctx: int, on_product: Callable[[str, F32], None] | None = None
    ) -> None:
        self.lib, self.n_ctx, self._on_product = lib, n_ctx, on_product
        self.model = lib.llama.llama_model_load_from_file(
            os.fsencode(file), lib.llama.llama_model_default_params()
        )
        if not self.model:
            raise lib.fail(f"{file}: llama.cpp cannot load this model")
        self.vocab = lib.llama.llama_model_get_vocab(self.model)
        self.n_vocab: int = lib.llama.llama_vocab_n_tokens(self.vocab)
        self._callback = _EvalCallback(self._on_tensor)
        self._error: BaseException | None = None
        params = lib.llama.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = n_ctx
        if on_product is not None:
            params.cb_eval = ctypes.cast(self._callback, c_void_p).value
        self.ctx = lib.llama.llama_init_from_model(self.model, params)
        if not self.ctx:
            lib.llama.llama_model_free(self.model)
            raise lib.fail(f"{file}: llama.cpp cannot make a context")
        lib.llama.llama_set_n_threads(self.ctx, lib.n_threads, lib.n_threads)
        self._batch = lib.llama.llama_batch_init(n_ctx, 0, 1)

    def close(self) -> None:
        self.lib.llama.llama_batch_free(self._batch)
        self.lib.llama.llama_free(self.ctx)
        self.lib.llama.llama_model_free(self.model)

    def _on_tensor(self, tensor: "ctypes._Pointer[_Tensor]", ask: bool, _data: int | None) -> bool:
        # An exception cannot pass through C: keep it and raise after llama_decode.
        try:
            return self._collect(tensor, ask)
        except BaseException as error:  # noqa: BLE001
            self._error = error
            return False

    def _collect(self, tensor: "ctypes._Pointer[_Tensor]", ask: bool) -> bool:
        if self.lib.base.ggml_op_desc(tensor) != b"MUL_MAT":
            return not ask
        weight, rows = tensor.contents.src[0], tensor.contents.src[1]
        if weight.contents.name != self.lib.base.ggml_get_name(weight):
            raise LayoutError("struct ggml_tensor has another layout than this module expects")
        name = weight.contents.name.decode()
        x = rows.contents
        if not name.startswith("blk.") or x.ne[1] < 16 or x.type != GGML_TYPES["f32"]:
            return not ask
        if ask or self._on_product is None:
            return True
        shape = tuple(x.ne[i] for i in (3, 2, 1, 0))
        values = np.empty(shape, np.float32)
        if values.strides != tuple(x.nb[i] for i in (3, 2, 1, 0)):
            raise LlamaError(f"{name}: its input is not contiguous; cannot collect it")
        self.lib.base.ggml_backend_tensor_get(rows, values.ctypes.data, 0, values.nbytes)
        self._on_product(name, values)
        return True

    def tokenize(self, text: str) -> I32:
        """i32[n]: the whole text, special tokens added as the vocabulary says, none parsed in the text."""
        raw = text.encode()
        out = np.empty(len(raw) + 8, np.int32)
        n = self.lib.llama.llama_tokenize(
            self.vocab, raw, len(raw), out.ctypes.data_as(POINTER(c_int32)), out.size, True, False
        )
        if n < 0:
            raise self.lib.fail("llama_tokenize failed")
        return out[:n].copy()

    def logits(self, tokens: I32, first: int) -> F32:
        """f32[len(tokens) - first, n_vocab] of one fresh sequence; token 0 becomes BOS if the vocabulary says so.

        Equal to one chunk of llama-perplexity and llama-imatrix.
        """
        llama = self.lib.llama
        n = len(tokens)
        if n > self.n_ctx:
            raise LlamaError(f"{n} tokens do not fit into a context of {self.n_ctx}")
        llama.llama_memory_clear(llama.llama_get_memory(self.ctx), True)
        self._batch.n_tokens = n
        for i, token in enumerate(tokens.tolist()):
            self._batch.token[i], self._batch.pos[i] = token, i
            self._batch.n_seq_id[i], self._batch.seq_id[i][0] = 1, 0
            self._batch.logits[i] = int(i >= first)
        if llama.llama_vocab_get_add_bos(self.vocab):
            self._batch.token[0] = llama.llama_vocab_bos(self.vocab)
        status = llama.llama_decode(self.ctx, self._batch)
        if self._error is not None:
            raise self._error
        if status != 0:
            raise self.lib.fail(f"llama_decode returned {status}")
        data = llama.llama_get_logits(self.ctx)
        return np.ctypeslib.as_array(data, (n - first, self.n_vocab)).copy()


@contextlib.contextmanager
def opened(
    lib: Library, file: Path, n_ctx: int, on_product: Callable[[str, F32], None] | None = None
) -> Iterator[Model]:
    """A Model that is closed on exit."""
    model = Model(lib, file, n_ctx, on_product)
    try:
        yield model
    finally:
        model.close()
