"""Packages of random models: bytes, plans, refusals, and what the real runtimes compute with them."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hf_models import EXPORTERS, plan, source, write
from random_models import as_stored, quantized

from d2qconv.checkpoint.dense import Dense
from d2qconv.checkpoint.open import open_checkpoint
from d2qconv.errors import ExportError
from d2qconv.exporters.base import Carrier, FloatType, silent
from d2qconv.grids.affine import AffineGrid
from d2qconv.ir.coded import Coded
from d2qconv.measure.reference import logits as reference
from d2qconv.names import Part, Role, TensorId
from d2qconv.testing.models import make_checkpoint
from d2qconv_hf import HfOptions, types
from d2qconv_hf.container import open_folder
from d2qconv_hf.reader import read_model
from d2qconv_hf.runtime import logits
from d2qconv_hf.types import significand

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
TYPES = ("int2", "int3", "int4")
MIXED = {"type": "int2", "tensor_type": ("down=int3", "v@0=int4", "o@1=float")}
TOKENS = torch.randint(512, (2, 24), generator=torch.Generator().manual_seed(3))
#: The codes of one matrix by the dialects' names.
CODES = [f"model.layers.1.mlp.up_proj.{name}" for name in ("weight_packed", "qweight", "weight")]
#: Largest difference of a logit, over the largest one. AutoRound's linears compute in f16.
BOUNDS = {"safetensors": 1e-5, "auto-round": 2e-3, "mlx": 1e-5}


def difference(dialect, folder, model):
    """How far the runtime's logits are from those of what was quantized, with floats as the package stores them."""
    as_written = {
        tensor: stored if isinstance(stored, Coded) else Dense.of(stored.load().half())
        for tensor, stored in model.tensors.items()
    }
    stored = as_stored(replace(model, tensors=as_written))
    wanted = reference(stored, TOKENS).numpy()
    found = logits(dialect, folder, TOKENS.numpy())
    assert np.abs(wanted).max() > 0.5
    return np.abs(found - wanted).max() / np.abs(wanted).max()


@pytest.mark.parametrize("dialect", ["safetensors", "auto-round", "mlx"])
@pytest.mark.parametrize(("arch", "type_"), product(ARCHITECTURES, TYPES))
def test_the_runtime_computes_what_was_quantized(tmp_path, dialect, arch, type_):
    # With the correction on two thirds of the cases, each kind of zero point on some.
    carrier = Carrier.NONE if type_ == "int3" or (dialect, arch) == ("mlx", "qwen3") else Carrier.BIAS
    zero = "integer" if arch in ("llama", "qwen3") else "auto"
    _, _, model, _ = write(tmp_path / "p", dialect, arch, carrier, type=type_, zero=zero)
    assert difference(dialect, tmp_path / "p", model) <= BOUNDS[dialect]


@pytest.mark.parametrize("dialect", ["safetensors", "auto-round", "mlx"])
def test_types_may_differ_from_matrix_to_matrix(tmp_path, dialect):
    _, _, model, _ = write(tmp_path / "p", dialect, "llama", Carrier.BIAS, **MIXED)
    assert difference(dialect, tmp_path / "p", model) <= BOUNDS[dialect]


def test_one_linear_may_stay_float_beside_a_tied_head(tmp_path):
    _, _, model, _ = write(tmp_path / "p", "safetensors", "llama", type="int2", tensor_type=("o@1=float",))
    assert difference("safetensors", tmp_path / "p", model) <= BOUNDS["safetensors"]


@pytest.mark.parametrize("group", ["32", "64", "channel"])
def test_groups_of_every_size(tmp_path, group):
    _, _, model, _ = write(tmp_path / "p", "safetensors", "qwen3", type="int2", group_size=group)
    assert difference("safetensors", tmp_path / "p", model) <= BOUNDS["safetensors"]


@pytest.mark.parametrize("kind", ["llama3", "yarn"])
def test_every_loader_reads_the_same_positions(tmp_path, kind):
    rope = {
        "rope_type": kind,
        "rope_theta": 500000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    checkpoint = open_checkpoint(
        str(make_checkpoint(tmp_path / "s", "qwen2", rope_parameters=rope, max_positions=256))
    )
    for dialect in ("safetensors", "mlx"):
        _, _, model, _ = write(tmp_path / dialect, dialect, "qwen2", Carrier.NONE, of=checkpoint, type="int4")
        assert difference(dialect, tmp_path / dialect, model) <= BOUNDS[dialect]


@pytest.mark.parametrize("dialect", EXPORTERS)
@pytest.mark.parametrize("options", [{"type": t} for t in types.BITS] + [MIXED])
def test_the_reader_finds_bit_for_bit_what_was_quantized(tmp_path, dialect, options):
    _, planned, model, package = write(tmp_path / "p", dialect, "qwen2", Carrier.BIAS, **options)
    found = read_model(open_folder(tmp_path / "p"), "qwen2")
    for t in planned.tensors:
        stored = model.tensors[t.id]
        is_float = isinstance(t.storage, FloatType)
        wanted = stored.load().half().float() if is_float else stored.decode()
        assert torch.equal(found.desc.tensors[t.id].load(), wanted), t.id
    # Llama has biases of o and down, which this model has not.
    extra = {t for t in found.desc.tensors if t not in planned.by_id}
    assert extra == {TensorId(role, block, Part.BIAS) for role in (Role.O, Role.DOWN) for block in (0, 1)}
    assert not any(found.desc.tensors[t].load().any() for t in extra)
    assert set(package.decoded_sha256) == {t.stored_as for t in planned.tensors}


@pytest.mark.parametrize("dialect", EXPORTERS)
@pytest.mark.parametrize("options", [{}, {"type": "int3", "zero": "none"}, MIXED])
def test_predicted_bytes_are_written(tmp_path, dialect, options):
    exporter, planned, _, package = write(tmp_path / "p", dialect, "llama", Carrier.BIAS, **options)
    arrays = sum(s.raw().nbytes for s in open_folder(tmp_path / "p").spans.values())
    assert planned.n_bytes == arrays
    found = exporter.tensor_bytes(tmp_path / "p")
    assert {t.stored_as: t.n_bytes for t in planned.tensors} == {
        t.stored_as: found[t.stored_as] for t in planned.tensors
    }
    files = [f for f in (tmp_path / "p").iterdir() if f.name != "d2qconv.json"]
    assert package.n_bytes == sum(f.stat().st_size for f in files)


@pytest.mark.parametrize("dialect", EXPORTERS)
def test_a_package_passes_its_own_verification_and_a_changed_byte_does_not(tmp_path, dialect):
    exporter, *_ = write(tmp_path / "p", dialect, "llama", Carrier.BIAS, type="int2")
    checks = exporter.verify(tmp_path / "p", silent)
    assert [c for c in checks if not c.is_passed] == []
    assert [c.name for c in checks if c.is_skipped] == (
        ["gptqmodel computes it"] if dialect == "gptq" else []
    )
    file = tmp_path / "p" / "model.safetensors"
    data = bytearray(file.read_bytes())
    codes = next(n for n in CODES if n in (spans := open_folder(tmp_path / "p").spans))
    data[spans[codes].begin + 5] ^= 1
    file.write_bytes(data)
    assert [c.name for c in exporter.verify(tmp_path / "p", silent) if not c.is_passed] == [
        "files",
        "decoded values",
    ]


def test_shards_hold_the_same_arrays(tmp_path):
    write(tmp_path / "one", "gptq", "llama", type="int4")
    write(tmp_path / "many", "gptq", "llama", type="int4", max_shard_size="200KB")
    one, many = open_folder(tmp_path / "one"), open_folder(tmp_path / "many")
    files = sorted(f.name for f in (tmp_path / "many").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 2
    assert one.spans.keys() == many.spans.keys()
    assert all(np.array_equal(one.spans[n].raw(), many.spans[n].raw()) for n in one.spans)
    write(tmp_path / "loads", "safetensors", "llama", type="int4", max_shard_size="200KB")
    assert logits("safetensors", tmp_path / "loads", TOKENS.numpy()).shape == (2, 24, 512)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("zero", ["integer", "none"])
def test_products_of_steps_and_codes_are_exact_in_f16(bits, zero):
    grid = types.grid(f"int{bits}", "32", 64, zero, "float16")
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(bits)) * 0.03
    params = grid.fit(weight, torch.ones(32))
    values = grid.decode(grid.encode(weight, params, 0), params)
    assert torch.equal(values.half().float(), values)
    assert significand(bits, zero) >= 7
    # A step of 11 bits would not do: the sharper test of the two.
    full = AffineGrid(bits, 32, zero, "f16")
    params = full.fit(weight, torch.ones(32))
    values = full.decode(full.encode(weight, params, 0), params)
    assert bits == 2 or not torch.equal(values.half().float(), values)


@pytest.mark.parametrize(
    ("dialect", "options", "why"),
    [
        ("safetensors", {"type": "int5"}, "'int5' is not a choice"),
        ("safetensors", {"group_size": "96"}, "'96' is not a choice"),
        ("safetensors", {"max_shard_size": "big"}, "not a size of memory"),
        ("safetensors", {"zero": "integer", "tensor_type": ("down=int4",)}, "only without zero points"),
        ("safetensors", {"tensor_type": ("embed=int4",)}, "embedding and head stay float"),
        ("safetensors", {"tensor_type": ("down=q4_k",)}, "'q4_k' is not a storage type"),
        ("mlx", {"group_size": "channel"}, "no scale for a whole row"),
        ("mlx", {"dtype": "bfloat16"}, "does not hold exactly"),
    ],
)
def test_what_a_dialect_cannot_hold_is_refused_with_the_way_out(dialect, options, why):
    _, _, planned = plan(dialect, source("llama"), **options)
    assert any(why in r.why for r in planned.refusals), planned.refusals
    assert all(r.todo for r in planned.refusals)


def test_a_bias_that_a_loader_would_drop_is_refused_or_warned_of():
    _, _, planned = plan("mlx", source("qwen3"), Carrier.BIAS)
    assert ["has no class of qwen3 with biases" in r.why for r in planned.refusals] == [True]
    _, _, planned = plan("mlx", source("qwen3"))
    assert planned.carrier is Carrier.RANK1
    _, _, planned = plan("safetensors", source("qwen3"), Carrier.BIAS)
    assert planned.layout == "hy_v3"
    assert "relabelled as hy_v3" in planned.carrier_note
    assert any("SGLang" in w for w in planned.warnings)
    assert any("--model-impl transformers" in place for place in planned.loads_in)
    _, _, planned = plan("safetensors", source("llama"), Carrier.BIASES)
    assert "bias at every linear" in planned.refusals[0].why


def test_floats_that_f16_does_not_hold_stop_the_writer(tmp_path):
    checkpoint = source("llama")
    exporter, desc, planned = plan("safetensors", checkpoint)
    model = quantized(desc, planned)
    model.tensors[TensorId(Role.FINAL_NORM)] = Dense.of(torch.full((256,), 1e6))
    (tmp_path / "p").mkdir()
    with pytest.raises(ExportError, match="f16 does not"):
        exporter.write(model, checkpoint, planned, tmp_path / "p", silent)


def test_bytes_are_the_same_every_time(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name, "safetensors", "llama", type="int2")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("other", ["mlx", "gptq", "auto-round"])
def test_floats_beside_another_folder_have_the_type_of_its_steps(dtype, other):
    """Of an f32 norm beside f16 steps MLX would go on in f32; bf16 steps beside f16 norms are no better."""
    _, desc, planned = plan("safetensors", source("llama"), Carrier.NONE, type="int4", dtype=dtype)
    storages = {t.id: t.storage for t in planned.tensors}
    exporter, *_ = plan(other, source("llama"), Carrier.NONE, type="int4")
    adopted = type(exporter)(HfOptions()).plan_adopted(desc, Carrier.NONE, storages)
    assert not adopted.refusals
    floats = {t.storage for t in adopted.tensors if isinstance(t.storage, FloatType)}
    assert floats == {types.FLOATS[dtype]}
    wide = {t: FloatType.F32 if isinstance(s, FloatType) else s for t, s in storages.items()}
    adopted = type(exporter)(HfOptions()).plan_adopted(desc, Carrier.NONE, wide)
    assert {t.storage for t in adopted.tensors if isinstance(t.storage, FloatType)} == floats
