"""Log probabilities of texts in a runtime: what multiple-choice tasks ask a model for.

As EleutherAI's lm-evaluation-harness defines them (lm_eval/api/model.py `_encode_pair`, models/huggingface.py,
utils.py `get_rolling_token_windows`): a context and a continuation are tokenized together, white space at the context's
end belongs to the continuation, and BOS stands first where the tokenizer puts it. A context that is too long for the
window loses its beginning. Two things differ: where no BOS stands first the harness puts EOS there, here the first
token of a text is not scored then; and letters that spell a special token are letters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from d2qconv.errors import InputError
from d2qconv.exporters.runtime import LoadedPackage


@dataclass
class Continuations:
    """Scores texts. window: tokens that the runtime may read at once."""

    runtime: LoadedPackage
    window: int
    _last: tuple[tuple[int, ...], int, NDArray[np.float64]] | None = field(default=None, init=False)

    def of(self, context: str, continuation: str) -> tuple[float, bool]:
        """(log probability in nats of the continuation, whether each of its tokens is the likeliest).

        Raises InputError for an empty context where nothing stands before a text, and for an empty continuation.
        """
        before, after = self._pair(context, continuation)
        if not after:
            raise InputError("a continuation without a token cannot be scored", where=repr(continuation))
        if not before:
            raise InputError(
                "nothing stands before the first token, so it has no probability",
                where=repr(continuation),
                todo="this tokenizer puts no BOS before a text: leave out tasks with empty contexts",
            )
        return self._score((*before, *after), len(after))

    def rolling(self, text: str) -> float:
        """Log probability in nats of a whole text, window by window: each token is scored once.

        The first window begins with BOS; without one the first token is not scored. Windows are read whole: the last
        one begins before the tokens that are left to be scored.
        """
        tokens = (*self._start(), *self.runtime.encode(text))
        total = 0.0
        for start in range(0, len(tokens) - 1, self.window):
            end = min(start + self.window, len(tokens) - 1)
            total += self._score(tokens[: end + 1], end - start)[0]
        return total

    def _start(self) -> list[int]:
        return [] if self.runtime.bos is None else [self.runtime.bos]

    def _pair(self, context: str, continuation: str) -> tuple[Sequence[int], Sequence[int]]:
        """Tokens of both, as the harness cuts them."""
        kept = context.rstrip()
        whole = self.runtime.encode(context + continuation)
        before = self.runtime.encode(kept) if kept else []
        return [*self._start(), *before], whole[len(before) :]

    def _score(self, tokens: tuple[int, ...], n_after: int) -> tuple[float, bool]:
        """Of the last n_after tokens; those before are dropped from the front where the window is too short."""
        if n_after > self.window:
            raise InputError(
                f"a continuation of {n_after} tokens does not fit into the window of {self.window}",
                where="--tasks",
                todo="give a longer --context, or leave the task out",
            )
        tokens = tokens[-(self.window + 1) :]
        log_p = self._log_p(tokens[:-1], n_after)
        wanted = np.array(tokens[-n_after:])
        found = log_p[np.arange(n_after), wanted]
        return float(found.sum()), bool((log_p.argmax(-1) == wanted).all())

    def _log_p(self, tokens: tuple[int, ...], n_last: int) -> NDArray[np.float64]:
        """f64[n_last, vocab] after the last tokens. Choices of one token share a prompt: the last result is kept."""
        if self._last is None or self._last[:2] != (tokens, n_last):
            row = np.array([tokens], dtype=np.int64)
            logits = self.runtime.logits(row, len(tokens) - n_last)[0].astype(np.float64)
            logits -= logits.max(-1, keepdims=True)
            logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
            self._last = (tokens, n_last, logits)
        return self._last[2]
