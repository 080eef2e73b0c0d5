"""Bind a checkpoint to its architecture: every tensor named, present, and of the shape that config.json says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from d2qconv.arch.config import ConfigFacts, read_config
from d2qconv.arch.decoder import ATTENTION_ROLES, MLP_ROLES
from d2qconv.arch.registry import architecture_of
from d2qconv.arch.spec import Architecture, ModelDesc, Site
from d2qconv.checkpoint.dense import Dense
from d2qconv.checkpoint.open import Checkpoint
from d2qconv.errors import InputError, Refusal, refuse
from d2qconv.names import Part, Role, TensorId

#: Buffers that old checkpoints hold; they follow from config.json and are not read.
_BUFFERS = ("rotary_emb.inv_freq",)
_N_LISTED = 20


def bind(checkpoint: Checkpoint) -> ModelDesc:
    """The model that a checkpoint holds. Reads no weight, but for a tied checkpoint that has a head of its own.

    Raises PlanError: the architecture, a config key or a tensor is not supported. InputError: tensors are
    missing or contradict config.json.
    """
    arch = architecture_of(checkpoint.config)
    facts = read_config(arch, checkpoint.config)
    expected = dict(expected_tensors(arch, facts))
    where = str(checkpoint.path)
    names = {name: tensor for tensor, (name, _) in expected.items()}
    missing = [name for name in names if name not in checkpoint.tensors]
    _raise("tensors are missing", missing, where, "download the checkpoint completely")
    wrong = [
        f"{name} has shape {_shape(checkpoint.tensors[name])}, config.json says {list(shape)}"
        for name, shape in expected.values()
        if checkpoint.tensors[name].shape != shape
    ]
    _raise("tensors contradict config.json", wrong, where, "")
    extra = sorted(set(checkpoint.tensors) - set(names))
    _check_biases(arch, extra, facts, where)
    refuse(_check_extra(arch, checkpoint, extra, facts))
    return described(arch, facts, {tensor: checkpoint.tensors[name] for name, tensor in names.items()})


def described(arch: Architecture, facts: ConfigFacts, tensors: Mapping[TensorId, Dense]) -> ModelDesc:
    """The model of a config.json and these tensors."""
    return ModelDesc(
        arch=arch,
        dims=facts.dims,
        rope=facts.rope,
        norm_eps=facts.norm_eps,
        is_tied=facts.is_tied,
        max_positions=facts.max_positions,
        bos_ids=facts.bos_ids,
        eos_ids=facts.eos_ids,
        tensors=tensors,
    )


def expected_tensors(
    arch: Architecture, facts: ConfigFacts
) -> Iterator[tuple[TensorId, tuple[str, tuple[int, ...]]]]:
    """Id, checkpoint name and shape of every tensor, embedding first, then block by block, then the rest.

    A tied head is not among them.
    """
    before, blocks, after = _by_place(arch.sites)
    places: list[tuple[Site, int | None]] = [(site, None) for site in before]
    places += [(site, i) for i in range(facts.dims.n_layers) for site in blocks]
    places += [(site, None) for site in after]
    for site, block in places:
        if site.role is Role.HEAD and facts.is_tied:
            continue
        module = site.module.format(i=block)
        n_out = facts.dims.size(site.n_out)
        shape = (n_out,) if site.n_in is None else (n_out, facts.dims.size(site.n_in))
        yield TensorId(site.role, block), (f"{module}.weight", shape)
        if site.can_have_bias and _has_bias(site.role, facts):
            yield TensorId(site.role, block, Part.BIAS), (f"{module}.bias", (n_out,))


def checkpoint_names(config: Mapping[str, Any]) -> dict[TensorId, str]:
    """What each tensor is called in the checkpoint of a config.json; raises PlanError as `read_config` does."""
    arch = architecture_of(config)
    return {tensor: name for tensor, (name, _) in expected_tensors(arch, read_config(arch, config))}


def _by_place(sites: Sequence[Site]) -> tuple[list[Site], list[Site], list[Site]]:
    """Sites before, in and after the blocks, each in the table's order."""
    blocks = [s for s in sites if "{i}" in s.module]
    first = sites.index(blocks[0]) if blocks else len(sites)
    outside = [(i, s) for i, s in enumerate(sites) if "{i}" not in s.module]
    return [s for i, s in outside if i < first], blocks, [s for i, s in outside if i >= first]


def _has_bias(role: Role, facts: ConfigFacts) -> bool:
    """Whether config.json puts a bias there, if the site can have one."""
    if role in ATTENTION_ROLES:
        return facts.has_attention_bias
    return role in MLP_ROLES and facts.has_mlp_bias


def _check_biases(arch: Architecture, extra: Sequence[str], facts: ConfigFacts, where: str) -> None:
    """A bias where the architecture can have one but config.json says that there is none."""
    possible = {
        f"{site.module.format(i=i)}.bias"
        for site in arch.sites
        if site.can_have_bias
        for i in range(facts.dims.n_layers)
    }
    found = [name for name in extra if name in possible]
    _raise(
        "biases are there, and attention_bias or mlp_bias in config.json says that they are not",
        found,
        where,
        "",
    )


def _check_extra(
    arch: Architecture, checkpoint: Checkpoint, extra: Sequence[str], facts: ConfigFacts
) -> Iterator[Refusal]:
    """Tensors that the architecture does not have."""
    head, embed = arch.site(Role.HEAD), arch.site(Role.EMBED)
    unknown = []
    for name in extra:
        if name.endswith(_BUFFERS):
            continue
        if facts.is_tied and head and embed and name == f"{head.module}.weight":
            # transformers 4 ignores such a head; transformers 5 uses it if it differs from the embedding. Only
            # a head that equals the embedding means the same model to both, and is dropped.
            if not _are_equal(checkpoint.tensors[name], checkpoint.tensors[f"{embed.module}.weight"]):
                yield Refusal(
                    name,
                    "tie_word_embeddings is true, but this head differs from the embedding: versions of "
                    "transformers disagree on which one counts",
                    "set tie_word_embeddings to false, or remove the tensor",
                )
            continue
        unknown.append(name)
    if unknown:
        yield Refusal(
            str(checkpoint.path),
            f"tensors that {arch.id} does not have; they may change the function: {_list(unknown)}",
        )


def _are_equal(a: Dense, b: Dense) -> bool:
    """Whether two tensors hold the same values in the same type."""
    return a.shape == b.shape and a.dtype == b.dtype and bool(a.load().equal(b.load()))


def _raise(what: str, found: Sequence[str], where: str, todo: str) -> None:
    """Raise InputError if anything was found."""
    if found:
        raise InputError(f"{what}: {_list(found)}", where=where, todo=todo)


def _list(found: Sequence[str]) -> str:
    more = f" and {len(found) - _N_LISTED} more" if len(found) > _N_LISTED else ""
    return ", ".join(found[:_N_LISTED]) + more


def _shape(dense: Dense) -> list[int]:
    return list(dense.shape)
