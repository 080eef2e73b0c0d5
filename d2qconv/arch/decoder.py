"""What Llama, Mistral, Qwen2 and Qwen3 share: names, shapes and neighbours of a pre-norm gated decoder.

Names and shapes are those of transformers' modeling_llama.py and its siblings.
"""

from __future__ import annotations

from collections.abc import Collection

from d2qconv.arch.spec import Coupling, Dim, Residual, Site
from d2qconv.names import Role

_ATTN = "model.layers.{i}.self_attn"
_MLP = "model.layers.{i}.mlp"

#: Which config key says that these roles, where their site can have a bias, have one.
ATTENTION_ROLES = (Role.Q, Role.K, Role.V, Role.O)
MLP_ROLES = (Role.GATE, Role.UP, Role.DOWN)


def decoder_sites(*, can_have_bias: Collection[Role] = (), has_qk_norm: bool = False) -> tuple[Site, ...]:
    """Sites in the order of the forward pass. has_qk_norm: q and k are normalised per head before RoPE."""

    def linear(role: Role, module: str, n_out: Dim, n_in: Dim) -> Site:
        return Site(role, module, n_out, n_in, role in can_have_bias)

    qk_norm = (
        Site(Role.Q_NORM, f"{_ATTN}.q_norm", Dim.HEAD),
        Site(Role.K_NORM, f"{_ATTN}.k_norm", Dim.HEAD),
    )
    return (
        Site(Role.EMBED, "model.embed_tokens", Dim.VOCAB, Dim.HIDDEN),
        Site(Role.ATTN_NORM, "model.layers.{i}.input_layernorm", Dim.HIDDEN),
        linear(Role.Q, f"{_ATTN}.q_proj", Dim.Q_OUT, Dim.HIDDEN),
        linear(Role.K, f"{_ATTN}.k_proj", Dim.KV_OUT, Dim.HIDDEN),
        linear(Role.V, f"{_ATTN}.v_proj", Dim.KV_OUT, Dim.HIDDEN),
        *(qk_norm if has_qk_norm else ()),
        linear(Role.O, f"{_ATTN}.o_proj", Dim.HIDDEN, Dim.Q_OUT),
        Site(Role.FFN_NORM, "model.layers.{i}.post_attention_layernorm", Dim.HIDDEN),
        linear(Role.GATE, f"{_MLP}.gate_proj", Dim.FFN, Dim.HIDDEN),
        linear(Role.UP, f"{_MLP}.up_proj", Dim.FFN, Dim.HIDDEN),
        linear(Role.DOWN, f"{_MLP}.down_proj", Dim.HIDDEN, Dim.FFN),
        Site(Role.FINAL_NORM, "model.norm", Dim.HIDDEN),
        Site(Role.HEAD, "lm_head", Dim.VOCAB, Dim.HIDDEN),
    )


DECODER_COUPLINGS = (
    Coupling(
        "scale",
        Role.DOWN,
        (Role.UP,),
        "down_proj reads silu(gate) * up, which is linear in up: a factor on column j of down_proj "
        "is a factor on row j of up_proj and on element j of its bias",
    ),
    Coupling(
        "scale",
        Role.O,
        (Role.V,),
        "o_proj reads sums of value rows with weights that do not depend on v_proj: a factor on the columns of o_proj "
        "that read one channel of a value head is a factor on that row of v_proj and on its bias",
    ),
    Coupling(
        "shift",
        Role.FFN_NORM,
        (Role.GATE, Role.UP),
        "only gate_proj and up_proj read the norm's output: a constant d added to it adds W d "
        "to the output of each, which is a bias",
    ),
)

#: x += o(attention(attn_norm(x))); x += down(silu(gate) * up of ffn_norm(x)); logits = head(final_norm(x))
DECODER_RESIDUAL = Residual(
    source=Role.EMBED,
    writers=(Role.O, Role.DOWN),
    readers={
        Role.ATTN_NORM: (Role.Q, Role.K, Role.V),
        Role.FFN_NORM: (Role.GATE, Role.UP),
        Role.FINAL_NORM: (Role.HEAD,),
    },
)
