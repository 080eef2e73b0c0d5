"""A rotated model is the same function, by other weights.

BOUND: both models compute in f32 (unit roundoff 6e-8) and the turned weights are rounded to f32 once. Each of the two
blocks has about six matrix products in a row over 256 to 576 terms; independent errors of that size add up to some
1e-6 of the logits' rms, and the largest of 20 000 logits lies five deviations out (measured: 3e-6 to 7e-6). Forgetting
one site of one block moves them by 0.2 at least.
"""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from d2qconv.arch.bind import bind
from d2qconv.arch.registry import BUILT_IN
from d2qconv.arch.spec import Dim, Site
from d2qconv.checkpoint.dense import Dense
from d2qconv.checkpoint.open import open_checkpoint
from d2qconv.errors import PlanError
from d2qconv.fold.rotation import Rotation, check, hadamard, rotated, walsh
from d2qconv.measure.reference import logits
from d2qconv.names import Part, Role, TensorId
from d2qconv.testing.models import make_checkpoint

BOUND = 5e-5
SIZES = [16, 32, 64, 128]
HADAMARD = Rotation("hadamard", seed=3)

MODELS = {
    "llama-tied": ("llama", {}),
    "llama-biases": ("llama", {"tied": False, "attention_bias": True, "mlp_bias": True}),
    "llama-wide": ("llama", {"hidden": 576, "dtype": torch.float32}),
    "mistral": ("mistral", {"tied": False, "dtype": torch.float16}),
    "qwen2": ("qwen2", {"attention_bias": True}),
    "qwen2-untied": ("qwen2", {"attention_bias": True, "tied": False}),
    "qwen3": ("qwen3", {}),
    "qwen3-biases": ("qwen3", {"tied": False, "attention_bias": True}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model by its name in MODELS; made once."""
    made = {}

    def make(name):
        if name not in made:
            arch, options = MODELS[name]
            folder = make_checkpoint(tmp_path_factory.mktemp("m") / name, arch, **options)
            made[name] = bind(open_checkpoint(str(folder)))
        return made[name]

    return make


def distance(a, b):
    """Largest difference of the logits over the rms of b's, on the same random tokens."""
    tokens = torch.randint(0, b.dims.vocab, (2, 20), generator=torch.Generator().manual_seed(1))
    x, y = logits(a, tokens), logits(b, tokens)
    return float((x - y).abs().max() / y.pow(2).mean().sqrt())


@pytest.mark.parametrize("kind", ["hadamard", "walsh"])
@pytest.mark.parametrize("name", MODELS)
def test_the_function_stays(models, name, kind):
    desc = models(name)
    turned = rotated(desc, Rotation(kind, seed=3))
    assert distance(turned, desc) < BOUND
    assert not turned.is_tied
    assert turned.is_untied == desc.is_tied
    assert turned.tensors.keys() == desc.tensors.keys() | {TensorId(Role.HEAD)}
    assert turned.n_weights == desc.n_weights
    for tensor, dense in turned.tensors.items():
        values = dense.load()
        assert (tuple(values.shape), values.dtype) == (dense.shape, dense.dtype)
        if tensor.role in desc.arch.residual.readers:
            assert bool((values == 1).all())


TURNED = [
    *((role, Part.WEIGHT) for role in Role if role not in (Role.Q_NORM, Role.K_NORM)),
    (Role.O, Part.BIAS),
    (Role.DOWN, Part.BIAS),
]


@pytest.mark.parametrize(("role", "part"), TURNED)
def test_a_site_that_is_left_out_is_noticed(models, role, part):
    desc = models("llama-biases")
    turned = rotated(desc, HADAMARD)
    place = TensorId(role, None if role in (Role.EMBED, Role.FINAL_NORM, Role.HEAD) else 1, part)
    wrong = replace(turned, tensors={**turned.tensors, place: desc.tensors[place]})
    assert distance(wrong, desc) > 100 * BOUND


def test_what_is_not_wide_as_the_stream_is_untouched(models):
    desc = models("qwen3-biases")
    turned = rotated(desc, HADAMARD)
    kept = [t for t, dense in desc.tensors.items() if turned.tensors[t] is dense]
    assert {(t.role, t.part) for t in kept} == {
        (Role.Q_NORM, Part.WEIGHT),
        (Role.K_NORM, Part.WEIGHT),
        (Role.Q, Part.BIAS),
        (Role.K, Part.BIAS),
        (Role.V, Part.BIAS),
    }


@pytest.mark.parametrize("name", ["llama-wide", "qwen2"])
def test_the_weights_are_those_of_the_formula(models, name):
    """Against Q written out, in f64."""
    desc = models(name)
    turned = rotated(desc, HADAMARD)
    n = HADAMARD.size(desc.dims.hidden)
    q = torch.block_diag(*[HADAMARD.matrix(n)] * (desc.dims.hidden // n))

    def source(role, block=None):
        return desc.tensors[TensorId(role, block)].load().double()

    wanted = {
        TensorId(Role.EMBED): source(Role.EMBED) @ q,
        TensorId(Role.K, 1): source(Role.K, 1) * source(Role.ATTN_NORM, 1) @ q,
        TensorId(Role.UP, 0): source(Role.UP, 0) * source(Role.FFN_NORM, 0) @ q,
        TensorId(Role.O, 0): q.T @ source(Role.O, 0),
        TensorId(Role.DOWN, 1): q.T @ source(Role.DOWN, 1),
        TensorId(Role.HEAD): source(Role.EMBED) * source(Role.FINAL_NORM) @ q,
    }
    for tensor, values in wanted.items():
        found = turned.tensors[tensor].load()
        assert torch.allclose(found.double(), values, rtol=1e-7, atol=1e-9), str(tensor)


def test_nothing_is_read_before_it_is_asked_for(models):
    desc, reads = models("llama-tied"), []

    def counted(tensor, dense):
        return Dense(dense.shape, dense.dtype, lambda: reads.append(tensor) or dense.load())

    watched = replace(desc, tensors={t: counted(t, d) for t, d in desc.tensors.items()})
    turned = rotated(watched, HADAMARD)
    assert reads == []
    turned.tensors[TensorId(Role.HEAD)].load()
    assert sorted(map(str, reads)) == ["embed.weight", "final_norm.weight"]
    reads.clear()
    turned.tensors[TensorId(Role.FFN_NORM, 0)].load()
    assert reads == []


def test_rows_in_chunks_are_the_rows(models, monkeypatch):
    desc, embed = models("llama-tied"), TensorId(Role.EMBED)
    whole = rotated(desc, HADAMARD).tensors[embed].load()
    # 512 rows in pieces of 5
    monkeypatch.setattr("d2qconv.fold.rotation._CHUNK", 5 * desc.dims.hidden)
    assert torch.allclose(rotated(desc, HADAMARD).tensors[embed].load(), whole, rtol=0, atol=1e-7)


@given(st.sampled_from(["hadamard", "walsh"]), st.integers(0, 2**40), st.sampled_from(SIZES))
def test_blocks_are_orthogonal(kind, seed, n):
    b = Rotation(kind, seed).matrix(n)
    assert float((b @ b.T - torch.eye(n)).abs().max()) < 1e-6
    assert torch.allclose(b.abs(), torch.full((n, n), n**-0.5, dtype=torch.float64))


@pytest.mark.parametrize("n", [1, 2, *SIZES])
def test_sequency_order_is_rising(n):
    rows = walsh(n).tolist()
    changes = [sum(a != b for a, b in pairwise(row)) for row in rows]
    assert changes == list(range(n))
    assert torch.equal(walsh(n), walsh(n).T)
    assert sorted(rows) == sorted(hadamard(n).tolist())


def test_hadamard_is_sylvesters():
    parity = [[(-1.0) ** bin(i & j).count("1") for j in range(16)] for i in range(16)]
    assert hadamard(16).tolist() == parity


def test_a_seed_gives_one_matrix(models):
    assert torch.equal(Rotation("hadamard", 5).matrix(128), Rotation("hadamard", 5).matrix(128))
    assert not torch.equal(Rotation("hadamard", 5).matrix(128), Rotation("hadamard", 6).matrix(128))
    assert torch.equal(Rotation("walsh", 5).matrix(128), Rotation("walsh", 6).matrix(128))
    # signs stand on the stream's channels: they undo to Sylvester's matrix row by row
    b = Rotation("hadamard", 5).matrix(64) * 8
    assert torch.equal(b[:, :1] * b, hadamard(64))
    desc = models("llama-tied")
    one, two = (rotated(desc, HADAMARD).tensors for _ in range(2))
    assert all(torch.equal(one[t].load(), two[t].load()) for t in one)


@pytest.mark.parametrize(
    ("hidden", "n"), [(256, 128), (576, 64), (4096, 128), (896, 128), (48, 16), (64, 64)]
)
def test_blocks_are_as_large_as_the_width_allows(hidden, n):
    assert HADAMARD.size(hidden) == n
    assert HADAMARD.describe(hidden) == f"hadamard {n}, seed 3"
    assert Rotation("walsh", 3).describe(hidden) == f"walsh {n}"


def test_a_width_that_does_not_divide_is_refused(models):
    desc = models("llama-tied")
    narrow = replace(desc, dims=replace(desc.dims, hidden=200))
    (refusal,) = check(narrow, HADAMARD)
    assert refusal.where == "hidden_size"
    assert "200 is not a multiple of 16" in refusal.why
    with pytest.raises(PlanError, match="200"):
        rotated(narrow, HADAMARD)


def test_a_model_is_rotated_once(models):
    turned = rotated(models("llama-tied"), HADAMARD)
    assert turned.rotation == "hadamard 128, seed 3"
    with pytest.raises(PlanError, match="rotated already"):
        rotated(turned, Rotation("walsh"))


def test_a_table_that_says_too_little_is_refused(models):
    desc = models("llama-tied")
    assert check(desc, HADAMARD) == []
    silent = replace(desc.arch, residual=None)
    assert "does not say" in check(replace(desc, arch=silent), HADAMARD)[0].why
    post_norm = Site(Role.Q_NORM, "model.layers.{i}.post_norm", Dim.HIDDEN)
    more = replace(desc.arch, sites=(*desc.arch.sites, post_norm))
    assert "q_norm is as wide" in check(replace(desc, arch=more), HADAMARD)[0].why
    sites = tuple(replace(s, can_have_bias=s.n_in is None) for s in desc.arch.sites)
    biased = check(replace(desc, arch=replace(desc.arch, sites=sites)), HADAMARD)
    assert len(biased) == 3
    assert all("can have a bias" in r.why for r in biased)


@pytest.mark.parametrize("arch", BUILT_IN)
def test_tables_agree_with_the_shapes(arch):
    """What the residual's table says of a site is what its shape says."""
    table = BUILT_IN[arch]
    residual = table.residual
    by_shape = {s.role: (s.n_out is Dim.HIDDEN, s.n_in is Dim.HIDDEN, s.n_in is None) for s in table.sites}
    readers = [role for linears in residual.readers.values() for role in linears]
    assert {r for r, shape in by_shape.items() if shape == (True, False, False)} == set(residual.writers)
    assert {r for r, shape in by_shape.items() if shape == (True, False, True)} == set(residual.readers)
    assert {r for r, shape in by_shape.items() if shape[1]} == {*readers, residual.source}
    assert len(readers) == len(set(readers))
