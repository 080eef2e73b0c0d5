"""A stock llama.cpp (the wheel `cyllama`) as a judge of written files: loads on the CPU, gives logits and text.

llama.cpp's CPU kernels round activations to 8 bits for quantized weights and to f16 for f16 weights, so its logits
are near those of a float reference and never equal. The KV cache is kept in f32 here, and flash attention is off.
`Measured` is the same as `evaluate` asks for it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from d2qconv.errors import PluginError, VerifyError
from d2qconv.threads import n_cores

_F32 = 0
#: Tokens that llama.cpp computes at once, its own default.
_STEP = 512


def is_installed() -> bool:
    """Whether the runtime can be imported."""
    return importlib.util.find_spec("cyllama") is not None


class LlamaCpp:
    """One GGUF, loaded. A context manager; llama.cpp's log is kept off stderr.

    n_context: tokens of the longest sequence. n_threads: 0 for all cores that this process may use: with more than
    that they wait for each other in loops. is_mapped: weights stay in the file's pages, which the system takes back
    when it needs them; otherwise llama.cpp copies those of some types into memory of its own, in an order that is
    faster for its kernels. Raises VerifyError if llama.cpp refuses the file, with its own words, and PluginError if
    cyllama is not installed.
    """

    def __init__(
        self, path: Path, *, n_context: int = 512, n_threads: int = 0, is_mapped: bool = False
    ) -> None:
        self._api = _import()
        self.n_context = n_context
        log: list[str] = []
        self._api.set_log_callback(lambda level, text: log.append(text) if level >= 3 else None)
        try:
            params = self._api.LlamaModelParams()
            params.n_gpu_layers = 0
            params.use_extra_bufts = not is_mapped
            self._model = _model_class(self._api)(str(path), params)
            self._context = self._api.LlamaContext(self._model, self._context_params(n_threads))
        except (ValueError, RuntimeError, OSError, MemoryError) as error:
            said = "".join(log).strip() or str(error)
            raise VerifyError(f"llama.cpp does not load it: {said[-600:]}", where=str(path)) from error
        finally:
            # A Python callback that outlives the interpreter crashes it.
            self._api.disable_logging()
        self._vocab = self._model.get_vocab()

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._context.close()
        self._model.close()

    @staticmethod
    def version() -> str:
        """Which build of llama.cpp, as far as the wheel says it."""
        api = _import()
        return f"cyllama, ggml {api.ggml_version()} ({api.ggml_commit()})"

    @property
    def n_vocab(self) -> int:
        """Number of tokens."""
        return int(self._vocab.n_vocab)

    @property
    def bos(self) -> int | None:
        """The token that begins a text, None if the file names none."""
        token = int(self._vocab.token_bos())
        return token if 0 <= token < self.n_vocab else None

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """Tokens of a text. add_special: with BOS where the file asks for it."""
        return [int(t) for t in self._vocab.tokenize(text, add_special, parse_special)]

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Text of tokens, special ones spelled out."""
        return str(self._vocab.detokenize(list(tokens), unparse_special=True))

    @property
    def is_bos_added(self) -> bool:
        """Whether the file asks for BOS before a text."""
        return bool(self._vocab.get_add_bos())

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence that the model was made for, as the file says."""
        return int(self._model.n_ctx_train)

    def logits(self, tokens: Sequence[int], first: int = 0) -> np.ndarray:
        """Logits after each token of one sequence from position `first` on, f32[n_tokens - first, vocab]."""
        if not 0 <= first < len(tokens) <= self.n_context:
            raise ValueError(f"{len(tokens)} tokens from {first} on in a context of {self.n_context}")
        self._context.kv_cache_clear()
        self._decode(tokens, 0, first)
        rows = [
            np.array(self._context.get_logits_ith(i), dtype=np.float32) for i in range(first, len(tokens))
        ]
        return np.stack(rows)

    def sample(self, tokens: Sequence[int], n: int, seed: int | None = None) -> list[int]:
        """`n` tokens that follow `tokens`: the likeliest ones, or drawn at temperature 1 with a seed.

        Goes on after an end of text, so that `n` tokens come back.
        """
        rng = np.random.default_rng(seed)
        self._context.kv_cache_clear()
        self._decode(tokens, 0, len(tokens) - 1)
        made: list[int] = []
        while len(made) < n:
            if made:
                self._decode(made[-1:], len(tokens) + len(made) - 1, 0)
            logits = np.array(self._context.get_logits_ith(-1), dtype=np.float64)
            made.append(int(logits.argmax()) if seed is None else _draw(logits, rng))
        return made

    def generate(self, prompt: str, n: int, seed: int | None = None) -> str:
        """The prompt's continuation by `n` tokens."""
        start = self.tokenize(prompt, add_special=True)
        # Alone, the new tokens would lose the space that they begin with.
        whole = self.detokenize([*start, *self.sample(start, n, seed)])
        return whole[len(self.detokenize(start)) :]

    def _context_params(self, n_threads: int) -> Any:
        params = self._api.LlamaContextParams()
        params.n_ctx = params.n_batch = self.n_context
        # What attention keeps at a time grows with both: tokens of a step times the context.
        params.n_ubatch = min(self.n_context, _STEP)
        params.n_threads = params.n_threads_batch = n_threads or n_cores()
        params.type_k = params.type_v = _F32
        params.flash_attn_type = 0
        return params

    def _decode(self, tokens: Sequence[int], start: int, first: int) -> None:
        """Run tokens at positions start…; logits of those from number `first` on."""
        batch = self._api.LlamaBatch(n_tokens=len(tokens), embd=0, n_seq_max=1)
        for i, token in enumerate(tokens):
            batch.add(int(token), start + i, [0], i >= first)
        try:
            self._context.decode(batch)
        except (ValueError, RuntimeError) as error:
            raise VerifyError(f"llama.cpp cannot run it: {error}") from error


class Measured:
    """A file in llama.cpp for `evaluate`; see `d2qconv.exporters.runtime.LoadedPackage`. Raises as `LlamaCpp` does.

    Texts are tokenized by llama.cpp itself, which takes no special token from their letters.
    """

    name = "llama.cpp"
    settings = "on the CPU, f32 KV cache, no flash attention"

    def __init__(self, path: Path, length: int) -> None:
        self._llama = LlamaCpp(path, n_context=length)
        self.version = LlamaCpp.version()
        self.n_vocab = self._llama.n_vocab
        self.max_length = self._llama.max_length
        self.bos = self._llama.bos if self._llama.is_bos_added else None

    def encode(self, text: str) -> list[int]:
        """Tokens of a text."""
        return self._llama.tokenize(text, parse_special=False)

    def logits(self, tokens: np.ndarray, first: int) -> np.ndarray:
        """See `LoadedPackage`; one sequence after the other."""
        return np.stack([self._llama.logits([int(token) for token in row], first) for row in tokens])

    def __enter__(self) -> Measured:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._llama.__exit__(kind, error, trace)


def _draw(logits: np.ndarray, rng: np.random.Generator) -> int:
    """A token by its probability; raises VerifyError where there is none."""
    if not np.isfinite(logits).all():
        raise VerifyError("llama.cpp computes logits that are not finite", todo="look at the weights' sizes")
    p = np.exp(logits - logits.max())
    return int(rng.choice(len(p), p=p / p.sum()))


def _import() -> Any:
    if not is_installed():
        raise PluginError("llama.cpp is not installed (cyllama)", todo="pip install 'd2qconv[verify]'")
    from cyllama.llama import llama_cpp

    llama_cpp.disable_logging()
    llama_cpp.ggml_backend_load_all()
    return llama_cpp


def _model_class(api: Any) -> Any:
    """The wheel's model class; 0.2.18 reads an attribute `n_vocab` for its logits that its class lacks."""

    class Model(api.LlamaModel):  # type: ignore[misc]
        @property
        def n_vocab(self) -> int:
            return int(self.get_vocab().n_vocab)

    return Model
