"""Rows of the comparison, as a markdown table and as JSON."""

import math
from dataclasses import dataclass

from llama import TensorInfo
from metrics import Estimate, Score
from rows import markdown, plus_minus


@dataclass(frozen=True)
class Row:
    """One file. Without a score it was refused, and ``note`` says why.

    bits: bits a weight of the matrices inside the blocks. delta: KLD minus the peer's (or the row above), paired.
    against: the KLD that ``ratio`` divides by. command: what repeats the row.
    """

    type_name: str
    who: str
    n_bytes: int
    bits: float
    score: Score | None
    against: float
    delta: Estimate | None
    note: str
    sha256: str
    seconds: float
    command: tuple[str, ...]

    @property
    def ratio(self) -> float:
        return self.score.kld.mean / self.against if self.score and self.against > 0 else math.nan


def block_bits(tensors: dict[str, TensorInfo]) -> float:
    """Bits a weight over all tensors inside the blocks, biases and norms included."""
    inside = [t for t in tensors.values() if t.name.startswith("blk.")]
    matrices = sum(t.n_elements for t in inside if len(t.shape) > 1)
    return 8 * sum(t.n_bytes for t in inside) / matrices


def _cells(row: Row) -> list[str]:
    if row.score is None:
        return [row.type_name, row.who, "–", "–", "–", "–", "–", "–", "–", row.note]
    s = row.score
    ratio = "–" if math.isnan(row.ratio) else f"{row.ratio:.3f}"
    delta = "–" if row.delta is None else f"{row.delta.mean:+.4f} ± {row.delta.se:.4f}"
    return [
        row.type_name, row.who, f"{row.n_bytes:,}", f"{row.bits:.3f}", plus_minus(s.perplexity, 3),
        plus_minus(s.kld, 4), ratio, delta, plus_minus(s.same_top, 1, 100.0) + " %", row.note,
    ]  # fmt: skip


def table(rows: list[Row], against: str) -> str:
    """Markdown; ``against`` names the row that ratio and delta refer to."""
    head = ["type", "who", "bytes", "bpw in blocks", "perplexity", "mean KLD", f"ratio to {against}",
            f"KLD minus {against}", "same top token", "note"]  # fmt: skip
    lines = [head, ["---", "---", *["--:"] * 7, "---"], *(_cells(r) for r in rows)]
    return markdown(lines)
