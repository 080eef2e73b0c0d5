"""The mixes of llama-quantize as tables: which type every matrix of a model gets under a name such as `Q4_K_M`.

A mix is a base type, the types of embedding and output, and rules for the matrices that deserve another. The facts are
those of `llama_tensor_get_type_impl` in llama.cpp's src/llama-quant.cpp, for dense models, quantized with an
importance matrix (without one llama-quantize gives some first `down` matrices of IQ3_XXS, IQ4_XS and IQ4_NL more
bits): our calibration is what an importance matrix stands for. `tests/golden/mixes.json` holds what a stock llama.cpp
chose, `tools/golden_mixes` asks it again. Where llama-quantize falls back to another type because a width does not
fit, the exporter refuses instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from gguf import LlamaFileType

from d2qconv.names import Role

#: Blocks of what llama.cpp calls a 70B.
_LARGE_LAYERS = 80
#: include/llama.h has it, gguf-py not yet.
_MOSTLY_Q2_0 = 41


class Where(StrEnum):
    """Blocks that a rule is about, i of n; divisions are those of integers."""

    ALL = "all"
    FIRST_2 = "i < 2"
    FIRST_4 = "i < 4"
    FIRST_16TH = "i < n/16"
    FIRST_8TH = "i < n/8"
    INNER = "n/8 <= i < 7n/8"
    MORE_BITS = "i < n/8, i >= 7n/8, or every third between"

    def holds(self, i: int, n: int) -> bool:
        """Whether block i of n is one of them."""
        eighth, last = n // 8, 7 * n // 8
        # The remainder is that of a number below 0 only where the first condition has answered.
        more = i < eighth or i >= last or (i - eighth) % 3 == 2
        return {
            Where.ALL: True,
            Where.FIRST_2: i < 2,
            Where.FIRST_4: i < 4,
            Where.FIRST_16TH: i < n // 16,
            Where.FIRST_8TH: i < eighth,
            Where.INNER: eighth <= i < last,
            Where.MORE_BITS: more,
        }[self]


@dataclass(frozen=True)
class Rule:
    """`roles` in the blocks of `where` get `type`. is_shared: only where 4 or more query heads share a value head."""

    roles: tuple[Role, ...]
    type: str
    where: Where = Where.ALL
    is_shared: bool = False


@dataclass(frozen=True)
class Model:
    """What a rule may ask of a model. layout: llama.cpp's name of the architecture."""

    layout: str
    n_layers: int
    n_heads: int
    n_kv_heads: int

    @property
    def is_shared(self) -> bool:
        """4 or more query heads to a value head."""
        return self.n_heads // self.n_kv_heads >= 4

    @property
    def is_70b(self) -> bool:
        """What src/llama-model.cpp calls a 70B: 80 blocks, of Llama's only those with shared heads."""
        is_one = self.layout == "qwen2" or (self.layout == "llama" and self.n_heads != self.n_kv_heads)
        return self.n_layers == _LARGE_LAYERS and is_one


@dataclass(frozen=True)
class Mix:
    """One of llama-quantize's names. Of the rules the first that holds decides; else `base` does.

    output: of the output matrix, and of an embedding that is the output matrix too. embedding: of any other.
    file_type: `general.file_type`, llama.h's number. lifted: types that v does not get in a 70B model, where it gets
    q5_k.
    """

    base: str
    output: str
    embedding: str
    file_type: int
    rules: tuple[Rule, ...] = ()
    lifted: tuple[str, ...] = ("q3_k", "q4_k")

    def type_of(self, role: Role, block: int | None, model: Model, *, is_tied: bool) -> str:
        """Storage type of one matrix."""
        if role is Role.HEAD or (role is Role.EMBED and is_tied):
            return self.output
        if block is None:
            return self.embedding
        found = next((rule.type for rule in self.rules if _holds(rule, role, block, model)), self.base)
        return "q5_k" if role is Role.V and model.is_70b and found in self.lifted else found


def _holds(rule: Rule, role: Role, block: int, model: Model) -> bool:
    is_wide_enough = model.is_shared or not rule.is_shared
    return role in rule.roles and is_wide_enough and rule.where.holds(block, model.n_layers)


_V, _O, _DOWN = (Role.V,), (Role.O,), (Role.DOWN,)
_QK, _GATE_UP = (Role.Q, Role.K), (Role.GATE, Role.UP)
_SHARED_V = Rule(_V, "q4_k", is_shared=True)


def _iq2(base: str, better: str, file_type: int, *, is_o_better: bool) -> Mix:
    """The 2-bit code books: v, the first eighth of down, and with some o, in a type of their own."""
    rules = (_SHARED_V, Rule(_V, better), Rule(_DOWN, better, Where.FIRST_8TH))
    return Mix(base, "q5_k", better, file_type, (*rules, *([Rule(_O, better)] if is_o_better else [])), ())


#: Every name that `--mix` takes.
MIXES: Mapping[str, Mix] = {
    "IQ2_XXS": _iq2("iq2_xxs", "q2_k", LlamaFileType.MOSTLY_IQ2_XXS, is_o_better=False),
    "IQ2_XS": _iq2("iq2_xs", "q2_k", LlamaFileType.MOSTLY_IQ2_XS, is_o_better=False),
    "IQ2_S": _iq2("iq2_xs", "iq3_s", LlamaFileType.MOSTLY_IQ2_S, is_o_better=True),
    "IQ2_M": _iq2("iq2_s", "iq3_s", LlamaFileType.MOSTLY_IQ2_M, is_o_better=True),
    "Q2_0": Mix("q2_0", "q6_k", "q4_k", _MOSTLY_Q2_0),
    "Q2_K_S": Mix(
        "q2_k",
        "q6_k",
        "q2_k",
        LlamaFileType.MOSTLY_Q2_K_S,
        (_SHARED_V, Rule(_DOWN, "q4_k", Where.FIRST_8TH)),
    ),
    "Q2_K": Mix(
        "q2_k",
        "q6_k",
        "q2_k",
        LlamaFileType.MOSTLY_Q2_K,
        (_SHARED_V, Rule((Role.V, Role.O, Role.DOWN), "q3_k")),
    ),
    "IQ3_XXS": Mix(
        "iq3_xxs",
        "q5_k",
        "iq3_s",
        LlamaFileType.MOSTLY_IQ3_XXS,
        (_SHARED_V, Rule(_QK, "iq2_s"), Rule(_O, "iq3_s")),
    ),
    "IQ3_XS": Mix(
        "iq3_s",
        "q6_k",
        "iq3_s",
        LlamaFileType.MOSTLY_IQ3_XS,
        (_SHARED_V, Rule(_QK, "iq3_xxs"), Rule(_GATE_UP, "iq3_xxs", Where.INNER)),
    ),
    "IQ3_S": Mix("iq3_s", "q6_k", "iq3_s", LlamaFileType.MOSTLY_IQ3_S, (_SHARED_V,)),
    "IQ3_M": Mix(
        "iq3_s",
        "q6_k",
        "iq3_s",
        LlamaFileType.MOSTLY_IQ3_M,
        (Rule((Role.V, Role.O), "q4_k"), Rule(_DOWN, "q4_k", Where.FIRST_8TH)),
    ),
    "Q3_K_S": Mix("q3_k", "q6_k", "q3_k", LlamaFileType.MOSTLY_Q3_K_S),
    "Q3_K_M": Mix(
        "q3_k",
        "q6_k",
        "q3_k",
        LlamaFileType.MOSTLY_Q3_K_M,
        (
            Rule(_V, "q5_k", Where.FIRST_2),
            Rule(_DOWN, "q5_k", Where.FIRST_16TH),
            Rule((Role.V, Role.O, Role.DOWN), "q4_k"),
        ),
    ),
    "Q3_K_L": Mix(
        "q3_k",
        "q6_k",
        "q3_k",
        LlamaFileType.MOSTLY_Q3_K_L,
        (Rule((Role.V, Role.O, Role.DOWN), "q5_k"),),
    ),
    "IQ4_XS": Mix(
        "iq4_xs",
        "q6_k",
        "iq4_xs",
        LlamaFileType.MOSTLY_IQ4_XS,
        (Rule(_V, "q5_k", is_shared=True),),
    ),
    "IQ4_NL": Mix(
        "iq4_nl",
        "q6_k",
        "iq4_nl",
        LlamaFileType.MOSTLY_IQ4_NL,
        (Rule(_V, "q5_k", is_shared=True),),
    ),
    "Q4_K_S": Mix(
        "q4_k",
        "q6_k",
        "q4_k",
        LlamaFileType.MOSTLY_Q4_K_S,
        (Rule(_V, "q5_k", Where.FIRST_4), Rule(_DOWN, "q5_k", Where.FIRST_8TH)),
    ),
    "Q4_K_M": Mix(
        "q4_k",
        "q6_k",
        "q4_k",
        LlamaFileType.MOSTLY_Q4_K_M,
        (Rule((Role.V, Role.DOWN), "q6_k", Where.MORE_BITS),),
    ),
    "Q5_K_S": Mix("q5_k", "q6_k", "q5_k", LlamaFileType.MOSTLY_Q5_K_S),
    "Q5_K_M": Mix(
        "q5_k",
        "q6_k",
        "q5_k",
        LlamaFileType.MOSTLY_Q5_K_M,
        (Rule((Role.V, Role.DOWN), "q6_k", Where.MORE_BITS),),
    ),
    "Q6_K": Mix("q6_k", "q6_k", "q6_k", LlamaFileType.MOSTLY_Q6_K),
}
