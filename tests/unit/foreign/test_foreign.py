"""Reading what other tools quantized: every dialect decodes to the values that were packed, and nothing else passes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from foreign_models import Scheme, change, make_foreign
from safetensors.numpy import load_file

from d2qconv.arch.bind import bind
from d2qconv.checkpoint.open import open_checkpoint
from d2qconv.errors import InputError, PlanError
from d2qconv.foreign.read import read_foreign

CASES = {
    **{
        f"gptq-v{version}-{bits}-{'sym' if sym else 'asym'}": (
            "gptq",
            Scheme(bits, 32, sym),
            {"version": version, "config": {"checkpoint_format": "gptq" if version == 1 else "gptq_v2"}},
        )
        for version in (1, 2)
        for bits in (2, 3, 4, 8)
        for sym in (True, False)
        # Version 1 cannot say every zero point.
        if sym or version == 2
    },
    "gptq-row": ("gptq", Scheme(4, -1), {}),
    "gptq-no-index": ("gptq", Scheme(4, 64), {"index": False}),
    "gptq-act-order": ("gptq", Scheme(4, 32, order=True), {}),
    "gptq-zero-biases": ("gptq", Scheme(4, 32), {"zero_biases": True}),
    "gptq-qwen2": ("gptq", Scheme(4, 32), {"arch": "qwen2"}),
    "gptq-f32": ("gptq", Scheme(4, 32, dtype="float32", step_bits=24), {"float_dtype": np.float32}),
    "awq": ("awq", Scheme(4, 32, symmetric=False), {}),
    "auto-round-2": ("auto-round", Scheme(2, 32, symmetric=False), {}),
    "auto-round-gptq": (
        "auto-round", Scheme(4, 64), {"version": 1, "config": {"packing_format": "auto_round:auto_gptq"}},
    ),
    **{
        f"ct-{bits}-{'sym' if sym else 'asym'}": ("compressed-tensors", Scheme(bits, 32, sym), {})
        for bits in (2, 3, 4, 8)
        for sym in (True, False)
    },
    "ct-row": ("compressed-tensors", Scheme(4, -1), {}),
    "ct-3-old": ("compressed-tensors", Scheme(3, 32, symmetric=False), {"old": True}),
    "ct-signed-zeros": ("compressed-tensors", Scheme(4, 32, symmetric=False), {"signed_zeros": True}),
    "ct-order": ("compressed-tensors", Scheme(4, 32, order=True), {}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_dialect_decodes_to_what_was_packed(tmp_path, case):
    method, scheme, more = CASES[case]
    folder, values = make_foreign(tmp_path / "m", method, scheme, **more)
    foreign = read_foreign(open_checkpoint(str(folder)))
    assert set(foreign.linears) == set(values)
    bind(foreign.checkpoint)
    for name, wanted in values.items():
        assert np.array_equal(foreign.checkpoint.tensors[name].load().numpy(), wanted), name
        linear = foreign.linears[name]
        if scheme.order and linear.n_groups > 1:
            assert linear.grid is None
            continue
        coded = linear.coded()
        assert np.array_equal(coded.decode().numpy(), wanted), name
        assert coded.grid.zero == ("none" if scheme.symmetric else "integer")
        assert coded.grid.scale == ("f16" if scheme.dtype == "float16" else "f32")


def test_columns_in_runs_of_groups_in_another_order_are_on_a_grid(tmp_path):
    """As GPTQModel's group-aware order leaves them: a group is a run, and runs are numbered as they come."""
    folder, _ = make_foreign(tmp_path / "m", "gptq", Scheme(4, 32, symmetric=True))

    def reverse(index):
        return index.max() - index

    def turned(array):
        return array[::-1].copy()

    before = read_foreign(open_checkpoint(str(folder)))
    wanted = {name: linear.decode() for name, linear in before.linears.items()}
    change(folder, g_idx=reverse, scales=turned, qzeros=turned)
    after = read_foreign(open_checkpoint(str(folder)))
    for name, linear in after.linears.items():
        assert torch.equal(linear.decode(), wanted[name])
        assert torch.equal(linear.coded().decode(), wanted[name])


def test_steps_of_few_bits_are_known_as_such(tmp_path):
    folder, _ = make_foreign(tmp_path / "m", "gptq", Scheme(4, 32, symmetric=False, step_bits=7), version=2,
                             config={"checkpoint_format": "gptq_v2"})  # fmt: skip
    foreign = read_foreign(open_checkpoint(str(folder)))
    assert {linear.grid.significand for linear in foreign.linears.values()} == {7}
    assert all(linear.grid.has_f16_offsets for linear in foreign.linears.values())


@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_whose_step_is_nothing_have_no_signs(tmp_path, symmetric):
    """-0.0 is a value that MLX's offsets cannot say; all values stay equal."""
    folder, _ = make_foreign(tmp_path / "m", "gptq", Scheme(4, 32, symmetric), version=2,
                             config={"checkpoint_format": "gptq_v2"})  # fmt: skip
    random = np.random.default_rng(0)
    change(folder, scales=lambda s: (s * random.choice([-0.0, 0.0, 1.0, -1.0], s.shape)).astype(s.dtype))
    for linear in read_foreign(open_checkpoint(str(folder))).linears.values():
        coded = linear.coded()
        nothing = coded.params["step"] == 0
        assert nothing.any()
        assert not nothing.all()
        assert torch.equal(coded.decode(), linear.decode())
        values = coded.decode().view(len(nothing), -1, 32)[nothing]
        assert not torch.signbit(values).any()


def test_two_configs_that_differ_are_refused(tmp_path):
    folder, _ = make_foreign(tmp_path / "m", "gptq", Scheme(4, 32))
    config = json.loads((folder / "config.json").read_text())
    config["compression_config"] = config["quantization_config"] | {"bits": 8}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="say different things"):
        read_everything(folder)


# ruff: noqa: E501 one case a line
#: Every packed part of a dialect: method, scheme, how it is written.
PACKED = {
    "qweight": [
        ("gptq", Scheme(4, 32), {}),
        ("awq", Scheme(4, 32, False), {}),
        ("auto-round", Scheme(2, 32), {}),
    ],
    "qzeros": [
        ("gptq", Scheme(4, 32), {}),
        ("awq", Scheme(4, 32, False), {}),
        ("auto-round", Scheme(2, 32), {}),
    ],
    "weight_packed": [
        ("compressed-tensors", Scheme(4, 32), {}),
        ("compressed-tensors", Scheme(3, 32), {"old": True}),
    ],
}
#: Types that these may not be of: as wide words, as bytes, as floats.
OTHER_TYPES = ("int64", "int8", "uint8", "float32")
#: Indices of groups likewise; int64 says them as well as int32.
INDICES = {
    "g_idx": ("gptq", Scheme(4, 32), {}),
    "weight_g_idx": ("compressed-tensors", Scheme(4, 32, order=True), {}),
}


def ct(**weights):
    """A config whose weights are 4 bits in groups of 32, but for what is said."""
    said = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32} | weights
    return {"config": {"config_groups": {"g": {"targets": ["Linear"], "weights": said}}}}


#: method, scheme, how it is written, what is changed in arrays, the error and words of it
BAD = {
    "v1-zeros-ambiguous": (
        "gptq", Scheme(4, 32, symmetric=False), {}, {"qzeros": lambda z: np.full_like(z, -1)},
        PlanError, "may mean 0 or 16",
    ),
    "v2-called-v1": ("gptq", Scheme(4, 32), {"version": 2}, {}, InputError, "of the other version"),
    "v1-called-v2": (
        "gptq", Scheme(4, 32), {"config": {"checkpoint_format": "gptq_v2"}}, {}, InputError, "of the other version",
    ),
    "no-index": (
        "gptq", Scheme(4, 32, order=True), {}, {"g_idx": None}, InputError, "there is no g_idx",
    ),
    "index-out-of-range": ("gptq", Scheme(4, 32), {}, {"g_idx": lambda i: i + 7}, InputError, "puts columns into groups"),
    "index-short": ("gptq", Scheme(4, 32), {}, {"g_idx": lambda i: i[:-1]}, InputError, "g_idx has shape"),
    "bits": ("gptq", Scheme(4, 32), {"config": {"bits": 3}}, {}, InputError, "config.json says 3 bits"),
    "group": ("gptq", Scheme(4, 32), {"config": {"group_size": 64}}, {}, InputError, "groups of 64 columns"),
    "group-is-a-row": (
        "gptq", Scheme(4, 32), {"config": {"group_size": -1}}, {}, InputError, "says one group a row, and by its shapes there are 4 groups",
    ),
    "group-is-a-row-awq": ("awq", Scheme(4, 32, False), {"config": {"group_size": -1}}, {}, InputError, "says one group a row"),
    "group-is-a-row-auto-round": ("auto-round", Scheme(4, 32), {"config": {"group_size": -1}}, {}, InputError, "one group a row"),
    "group-nothing": ("gptq", Scheme(4, 32), {"config": {"group_size": 0}}, {}, InputError, "says groups of 0 columns"),
    "no-zeros": ("gptq", Scheme(4, 32), {}, {"qzeros": None}, InputError, "qzeros is missing"),
    "cut-scales": ("gptq", Scheme(4, 32), {}, {"scales": lambda s: s[:, :-1].copy()}, InputError, "do not fit together"),
    "nan-scales": ("gptq", Scheme(4, 32), {}, {"scales": lambda s: s * np.float16("nan")}, InputError, "NaN or Inf"),
    "float-codes": ("gptq", Scheme(4, 32), {}, {"qweight": lambda q: q.astype(np.float32)}, InputError, "qweight is of float32"),
    "index-zero": ("gptq", Scheme(4, 32), {}, {"g_idx": np.zeros_like}, InputError, "is 0 everywhere"),
    "marlin": ("gptq", Scheme(4, 32), {"config": {"checkpoint_format": "marlin"}}, {}, PlanError, "'marlin'"),
    "list-format": ("gptq", Scheme(4, 32), {"config": {"checkpoint_format": ["gptq"]}}, {}, PlanError, "only gptq"),
    "bitsandbytes": ("gptq", Scheme(4, 32), {"config": {"quant_method": "bitsandbytes"}}, {}, PlanError, "what is read is"),
    "no-method": ("gptq", Scheme(4, 32), {"config": {"quant_method": None}}, {}, PlanError, "what is read is"),
    "awq-gemv": ("awq", Scheme(4, 32), {"config": {"version": "gemv"}}, {}, PlanError, "'gemv'"),
    "awq-is-gptq": ("gptq", Scheme(4, 32), {"config": {"quant_method": "awq"}}, {}, InputError, "qzeros has 8 where"),
    "auto-round-mx": (
        "auto-round", Scheme(4, 32), {"config": {"data_type": "mx_fp"}}, {}, PlanError, "data_type is 'mx_fp",
    ),
    "auto-round-packing": (
        "auto-round", Scheme(4, 32), {"config": {"packing_format": "auto_round:fp8"}}, {}, PlanError, "packing_format",
    ),
    "ct-activations": (
        "compressed-tensors", Scheme(4, 32), {"config": {"config_groups": {"g": {
            "weights": {"num_bits": 4, "strategy": "channel"}, "input_activations": {"num_bits": 8}}}}}, {}, PlanError, "input activations too",
    ),
    "ct-format": (
        "compressed-tensors", Scheme(4, 32), {"config": {"format": "float-quantized"}}, {}, PlanError, "'float-quantized'",
    ),
    "ct-bits": (
        "compressed-tensors", Scheme(4, 32), {"config": {"config_groups": {"g": {"weights": {"num_bits": 3, "group_size": 32}}}}}, {},
        InputError, "are none of config.json's schemes",
    ),
    "ct-group": ("compressed-tensors", Scheme(4, 32), ct(group_size=64), {}, InputError, "4 bits without zero points in groups of 64"),
    "ct-channel": ("compressed-tensors", Scheme(4, 32), ct(strategy="channel"), {}, InputError, "in one group a row"),
    "ct-not-channel": ("compressed-tensors", Scheme(4, -1), ct(strategy="group", group_size=32), {}, InputError, "in groups of 32"),
    "ct-strategy": ("compressed-tensors", Scheme(4, 32), ct(strategy="tensor"), {}, PlanError, "has the strategy 'tensor'"),
    "ct-no-strategy": (
        "compressed-tensors", Scheme(4, 32), ct(strategy=None, group_size=None), {}, PlanError, "has the strategy 'tensor'",
    ),
    "ct-no-size": ("compressed-tensors", Scheme(4, 32), ct(group_size=None), {}, PlanError, "group_size of None"),
    "ct-order-no-index": (
        "compressed-tensors", Scheme(4, 32, order=True), {}, {"weight_g_idx": None}, InputError, "actorder is group, and there is no",
    ),
    "ct-index-no-order": (
        "compressed-tensors", Scheme(4, 32, order=True), ct(), {}, InputError, "actorder is not group, and there is a",
    ),
    "ct-zeros-out-of-range": (
        "compressed-tensors", Scheme(4, 32, False), {"signed_zeros": True}, {"weight_zero_point": lambda z: z - 60},
        InputError, "values that 4 bits do not have",
    ),
    "ct-several-ways": (
        "compressed-tensors", Scheme(4, -1), {"config": {"config_groups": {
            str(bits): ct(num_bits=bits, strategy="channel")["config"]["config_groups"]["g"] for bits in (3, 4)}},
            "model": {"hidden": 32, "head_dim": 32, "heads": 1}},
        {}, InputError, "may be 3 bits, by words or 4 bits, dense",
    ),
    "ct-no-shape": (
        "compressed-tensors", Scheme(4, 32), {}, {"weight_shape": None}, InputError, "weight_shape is not there",
    ),
    "ct-other-shape": (
        "compressed-tensors", Scheme(4, 32), {}, {"weight_shape": lambda s: s + 8}, InputError, "weight_shape says",
    ),
    "ct-cache": (
        "compressed-tensors", Scheme(4, 32), {"config": {"kv_cache_scheme": {"num_bits": 8}}}, {}, PlanError, "kv_cache_scheme",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_contradicts_itself_or_is_not_known_is_refused(tmp_path, case):
    method, scheme, more, arrays, error, words = BAD[case]
    folder, _ = make_foreign(tmp_path / "m", method, scheme, **more)
    change(folder, **arrays)
    with pytest.raises(error, match=words):
        read_everything(folder)


#: 72 columns and rows everywhere.
ODD = {"hidden": 72, "ffn": 72, "heads": 1, "kv_heads": 1, "head_dim": 72}


def ragged(group):
    """An index of groups of which the last one is shorter, as AutoGPTQ makes it; n_in = 72 there."""
    return lambda index: (np.arange(len(index)) // group).astype(np.int32)


@pytest.mark.parametrize(
    ("group", "n_groups", "runs"), [(64, 2, None), (48, 2, None), (72, 1, 72), (128, 1, 72), (16, 5, None)]
)
def test_a_last_group_that_is_shorter_is_read_and_no_grid_has_it(tmp_path, group, n_groups, runs):
    """AutoGPTQ allocates ceil(n_in / group) groups."""
    config = {"group_size": group, "bits": 4}
    folder, _ = make_foreign(tmp_path / "m", "gptq", Scheme(4, -1), config=config, model=ODD)
    random = np.random.default_rng(1)

    def more(scales):
        return np.concatenate([scales * np.float16(random.choice([1, 2, 4])) for _ in range(n_groups)])

    change(folder, g_idx=ragged(group), scales=more, qzeros=lambda z: np.concatenate([z] * n_groups))
    found = read_foreign(open_checkpoint(str(folder)))
    steps = {n: a for n, a in load_file(folder / "model.safetensors").items() if n.endswith("scales")}
    for linear in found.linears.values():
        at = np.arange(72) // group
        step = steps[f"{linear.module}.scales"].T.astype(np.float32)[:, at]
        codes = linear.codes().numpy().astype(np.float32)
        assert np.array_equal(linear.decode().numpy(), (codes - 8) * step)
        assert (None if linear.grid is None else linear.grid.group) == runs
        assert ("no whole number of groups of" in linear.why_no_grid) == (runs is None)


def test_groups_of_a_length_that_no_format_has_are_told_from_act_order(tmp_path):
    folder, _ = make_foreign(tmp_path / "m", "gptq", Scheme(4, 24), model=ODD)
    found = read_foreign(open_checkpoint(str(folder))).linears.values()
    assert {linear.why_no_grid for linear in found} == {
        "its groups are of 24 columns, which no format here stores"
    }


def test_a_ragged_group_without_an_index_is_refused(tmp_path):
    folder, _ = make_foreign(
        tmp_path / "m", "gptq", Scheme(4, 8), config={"group_size": 16}, index=False,
        model=ODD,
    )  # fmt: skip
    change(folder, scales=lambda s: s[:5].copy(), qzeros=lambda z: z[:5].copy())
    with pytest.raises(InputError, match="72 columns cannot be split into 5 groups of one length"):
        read_everything(folder)


@pytest.mark.parametrize("kind", OTHER_TYPES)
@pytest.mark.parametrize(
    ("part", "case"),
    [(part, case) for part, cases in PACKED.items() for case in cases],
    ids=lambda c: str(c)[:40],
)
def test_words_of_another_width_are_refused(tmp_path, part, case, kind):
    """Taken for words of 32 bits they would give other codes."""
    method, scheme, more = case
    folder, _ = make_foreign(tmp_path / "m", method, scheme, **more)
    change(folder, **{part: lambda words: words.astype(kind)})
    with pytest.raises(InputError, match=f"{part} is of {kind}, and codes are read from 32-bit words"):
        read_everything(folder)


def test_packed_zero_points_of_another_width_are_refused(tmp_path):
    folder, _ = make_foreign(tmp_path / "m", "compressed-tensors", Scheme(4, 32, symmetric=False))
    change(folder, weight_zero_point=lambda words: words.astype(np.int64))
    with pytest.raises(InputError, match=r"of torch\.int64"):
        read_everything(folder)


def test_words_that_say_they_have_no_sign_are_the_same_words(tmp_path):
    folder, values = make_foreign(tmp_path / "m", "gptq", Scheme(4, 32))
    change(folder, qweight=lambda words: words.view(np.uint32), qzeros=lambda words: words.view(np.uint32))
    tensors = read_foreign(open_checkpoint(str(folder))).checkpoint.tensors
    assert all(np.array_equal(tensors[name].load().numpy(), wanted) for name, wanted in values.items())


@pytest.mark.parametrize("part", INDICES)
@pytest.mark.parametrize("kind", ["float32", "float16", "int8", "uint8"])
def test_an_index_of_another_type_is_refused(tmp_path, part, kind):
    method, scheme, more = INDICES[part]
    folder, _ = make_foreign(tmp_path / "m", method, scheme, **more)
    change(folder, **{part: lambda index: (index + (0.7 if kind.startswith("float") else 0)).astype(kind)})
    with pytest.raises(InputError, match=f"{part} is of {kind}"):
        read_everything(folder)


@pytest.mark.parametrize("part", INDICES)
def test_an_index_of_64_bits_says_the_same(tmp_path, part):
    method, scheme, more = INDICES[part]
    folder, values = make_foreign(tmp_path / "m", method, scheme, **more)
    change(folder, **{part: lambda index: index.astype(np.int64)})
    tensors = read_foreign(open_checkpoint(str(folder))).checkpoint.tensors
    assert all(np.array_equal(tensors[name].load().numpy(), wanted) for name, wanted in values.items())


def read_everything(folder):
    """As an import does."""
    foreign = read_foreign(open_checkpoint(str(folder)))
    bind(foreign.checkpoint)
    for linear in foreign.linears.values():
        assert linear.grid is None or linear.coded() is not None


@pytest.mark.parametrize("name", ["group", "dynamic", "Group", True])
def test_names_of_act_order_and_groups_that_differ_in_it_alone(tmp_path, name):
    """compressed_tensors' ActivationOrdering has aliases; a config may have groups with and without an index."""
    weights = ct(actorder=name)["config"]["config_groups"]["g"]
    plain = ct()["config"]["config_groups"]["g"]
    for groups in ({"a": weights}, {"a": weights, "b": plain}, {"b": plain, "a": weights}):
        folder = tmp_path / "-".join(groups)
        _, values = make_foreign(
            folder, "compressed-tensors", Scheme(4, 32, order=True), config={"config_groups": groups}
        )
        foreign = read_foreign(open_checkpoint(str(folder)))
        for weight, wanted in values.items():
            assert torch.equal(foreign.linears[weight].decode(), torch.from_numpy(wanted))


def test_integers_in_a_checkpoint_of_floats_are_refused(tmp_path):
    folder, _ = make_foreign(tmp_path / "m", "gptq", Scheme(4, 32))
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="seems to be quantized"):
        open_checkpoint(str(folder))


def test_both_a_float_matrix_and_its_codes_are_refused(tmp_path):
    from safetensors.numpy import save_file

    folder, values = make_foreign(tmp_path / "m", "gptq", Scheme(4, 32))
    tensors = load_file(folder / "model.safetensors")
    name = next(iter(values))
    save_file(tensors | {name: values[name]}, folder / "model.safetensors")
    with pytest.raises(InputError, match="and arrays of its codes"):
        read_foreign(open_checkpoint(str(folder)))
