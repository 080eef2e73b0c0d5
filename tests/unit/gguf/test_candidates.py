"""What may be chosen from, and how many bytes a size leaves for tensors."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from gguf_models import DIMS, make_desc, quantized, small_source

from d2qconv.exporters.base import Allocating, FloatType, silent
from d2qconv.names import Role, TensorId
from d2qconv_gguf import GgufOptions
from d2qconv_gguf.exporter import GgufExporter

QUANTIZED = {"q2_k", "q3_k", "q4_k", "q4_0", "q8_0"}


def asked(desc=None, **options):
    exporter = GgufExporter(GgufOptions(**options))
    assert isinstance(exporter, Allocating)
    return exporter.candidates(desc or make_desc("llama"), small_source(), None)


def names(found, role, block=0):
    tensor = TensorId(role, None if role in (Role.EMBED, Role.HEAD) else block)
    return [
        option.storage if isinstance(option.storage, FloatType) else option.storage.id
        for option in found.options[tensor]
    ]


def test_nothing_is_chosen_where_types_are_given():
    assert asked(type="q2_k") is None


def test_every_quantized_type_that_fits_smallest_first():
    found = asked(bpw=3.0)
    assert set(names(found, Role.DOWN)) >= QUANTIZED
    for options in found.options.values():
        sizes = [o.n_bytes for o in options]
        assert sizes == sorted(sizes)
    narrow = make_desc("llama", dims=replace(DIMS, hidden=224, n_heads=7, n_kv_heads=1, head=32))
    assert not set(names(asked(narrow, bpw=6.0), Role.Q)) & {"q2_k", "q3_k", "q4_k"}
    odd = make_desc("llama", dims=replace(DIMS, ffn=200))
    assert names(asked(odd, bpw=9.0), Role.DOWN) == [FloatType.F16]


def test_a_type_that_was_given_stays():
    found = asked(bpw=3.0, tensor_type=("v@1=f16",), embedding="q3_k", candidates="q2_k, q4_0")
    assert names(found, Role.V, 1) == [FloatType.F16]
    assert names(found, Role.V, 0) == ["q2_k", "q4_0"]
    assert names(found, Role.EMBED) == ["q3_k"]


def test_bits_are_those_of_all_tensors():
    desc = make_desc("llama")
    found = asked(desc, bpw=3.5)
    assert found.n_bytes == math.floor(3.5 * desc.n_weights / 8)
    exporter = GgufExporter(GgufOptions(bpw=3.5))
    smallest = exporter.plan(desc, None)
    assert smallest.n_bytes == found.fixed_bytes + sum(o[0].n_bytes for o in found.options.values())
    chosen = {tensor: options[-1].storage for tensor, options in found.options.items()}
    largest = exporter.plan_chosen(desc, None, chosen)
    assert largest.n_bytes == found.fixed_bytes + sum(o[-1].n_bytes for o in found.options.values())


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_a_file_as_large_as_its_tensors_may_be_has_the_size_that_was_asked_for(tmp_path, arch):
    """The header is bounded from above, and not by much."""
    desc = make_desc(arch, rope="llama3" if arch == "llama" else "default")
    exporter = GgufExporter(GgufOptions(size="1MB"))
    found = exporter.candidates(desc, small_source(), None)
    plan = exporter.plan(desc, None)
    package = exporter.write(quantized(desc, plan), small_source(), plan, tmp_path / "x.gguf", silent)
    header = package.n_bytes - plan.n_bytes
    assert header <= 1_000_000 - found.n_bytes <= header + 6000


@pytest.mark.parametrize(
    ("options", "where", "why"),
    [
        ({"bpw": 3.0, "type": "q2_k"}, "option bpw", "--type does too"),
        ({"size": "1MB", "mix": "Q2_K"}, "option size", "--mix does too"),
        ({"size": "1MB", "bpw": 2.0}, "option size", "--bpw says"),
        ({"size": "big"}, "option size", "not a size"),
        ({"bpw": 0.0}, "option bpw", "not a number of bits above 0"),
        ({"bpw": math.nan}, "option bpw", "not a number of bits above 0"),
        ({"candidates": "q2_k"}, "option candidates", "nothing is to be chosen"),
        ({"bpw": 3.0, "candidates": "q2_k,f16"}, "option candidates", "not quantized types: f16"),
        ({"bpw": 3.0, "candidates": ","}, "option candidates", "no type in it"),
    ],
)
def test_what_contradicts_is_refused(options, where, why):
    refusals = GgufExporter(GgufOptions(**options)).plan(make_desc("llama"), None).refusals
    assert (refusals[0].where, why in refusals[0].why) == (where, True)
