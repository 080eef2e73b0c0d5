"""Whether there is a last pass, over what, and in how many steps."""

from dataclasses import replace

import pytest
import torch

from d2qconv.arch.bind import bind
from d2qconv.checkpoint.open import open_checkpoint
from d2qconv.exporters.base import Carrier, FloatType, TargetPlan, TensorPlan
from d2qconv.grids.affine import AffineGrid
from d2qconv.names import Role
from d2qconv.refine.memory import predict_bytes
from d2qconv.refine.settings import BLOCK_SETTINGS, RefineSettings
from d2qconv.run import CalibrationSpec, Recipe
from d2qconv.testing.models import make_checkpoint
from d2qconv.walk.last_pass import (
    MOST_BITS,
    MOST_WEIGHTS,
    OWN,
    STEPS,
    LastPass,
    choose_last_pass,
    own_sequences,
)
from d2qconv_gguf.grids import GRIDS

CPU, GPU = torch.device("cpu"), torch.device("cuda")
PLENTY = 1 << 60
LENGTH = 128
LINEARS = {Role.Q, Role.K, Role.V, Role.O, Role.GATE, Role.UP, Role.DOWN}


@pytest.fixture(scope="module")
def desc(tmp_path_factory):
    folder = tmp_path_factory.mktemp("last_pass") / "m"
    return bind(open_checkpoint(str(make_checkpoint(folder, "llama", layers=3))))


def plan_of(desc, storage, **others):
    """storage: of the blocks' matrices; others: of a role's."""

    def stored(tensor_id, shape):
        if len(shape) == 1:
            return FloatType.F32
        if tensor_id.role in (Role.EMBED, Role.HEAD):
            return GRIDS["q8_0"]
        return others.get(tensor_id.role.value, storage)

    tensors = tuple(TensorPlan(t, str(t), d.shape, stored(t, d.shape), 0) for t, d in desc.tensors.items())
    return TargetPlan("test", tensors, Carrier.NONE, "", ())


def choose(desc, storage=GRIDS["q2_k"], device=GPU, free=PLENTY, others=None, own=0, **recipe):
    plan, spec = plan_of(desc, storage, **(others or {})), CalibrationSpec(length=LENGTH, own=own)
    return choose_last_pass(Recipe(**recipe), desc, plan, spec, free, device)


def grids(storage):
    return dict.fromkeys(LINEARS, storage)


def test_a_gpu_has_one_over_the_whole_model_and_a_cpu_none(desc):
    found = choose(desc)
    assert (found.scope, found.steps) == ("model", STEPS["model"])
    settings = RefineSettings(steps=STEPS["model"])
    assert found.n_bytes == predict_bytes(desc, grids(GRIDS["q2_k"]), LENGTH, settings, "model")
    assert choose(desc, device=CPU) == LastPass("none", 0, 0)


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_steps_that_are_asked_for_are_taken_on_every_device(desc, device):
    for scope in ("model", "block"):
        found = choose(desc, device=device, refine=7, refine_scope=scope)
        assert (found.scope, found.steps) == (scope, 7)
    assert choose(desc, device=device, refine=0, refine_scope="model") == LastPass()


def test_the_scope_follows_from_the_memory_that_is_free(desc):
    needed = choose(desc).n_bytes
    assert choose(desc, free=needed).scope == "model"
    found = choose(desc, free=needed - 1)
    assert (found.scope, found.steps) == ("block", STEPS["block"])
    assert 0 < found.n_bytes < needed
    settings = RefineSettings(steps=STEPS["block"])
    assert found.n_bytes == predict_bytes(desc, grids(GRIDS["q2_k"]), LENGTH, settings, "block")
    assert choose(desc, free=-1, refine=5).scope == "block"
    assert (choose(desc, free=-1, refine=5).steps, choose(desc, refine=5).steps) == (5, 5)


def test_a_scope_that_is_asked_for_is_taken_whatever_is_free(desc):
    assert choose(desc, free=0, refine_scope="model").scope == "model"
    assert choose(desc, refine_scope="block").scope == "block"


def test_at_many_bits_it_must_be_asked_for(desc):
    many, few = AffineGrid(4, 128, "float"), AffineGrid(3, 128, "float")
    assert many.bits_per_weight > MOST_BITS > few.bits_per_weight
    assert choose(desc, few).scope == "model"
    assert choose(desc, many) == LastPass()
    assert choose(desc, many, refine=3).steps == 3
    # The mean over all weights counts: a mix gives its smallest matrices the most bits.
    assert choose(desc, few, others={"v": many}).scope == "model"
    rest = dict.fromkeys(("q", "k", "o", "gate", "up", "down"), many)
    assert choose(desc, few, others=rest) == LastPass()


def test_memory_is_that_of_the_widest_grid_of_a_role(desc):
    """Whichever block has it."""
    wide = grids(GRIDS["q2_k"]) | {Role.DOWN: GRIDS["q8_0"]}
    plan = plan_of(desc, GRIDS["q2_k"])
    tensors = tuple(
        replace(t, storage=GRIDS["q8_0"]) if (t.id.role, t.id.block) == (Role.DOWN, 2) else t
        for t in plan.tensors
    )
    spec = CalibrationSpec(length=LENGTH)
    found = choose_last_pass(Recipe(refine=3), desc, replace(plan, tensors=tensors), spec, PLENTY, GPU)
    assert found.n_bytes == predict_bytes(desc, wide, LENGTH, RefineSettings(steps=3), "model")


def test_float_matrices_have_no_say(desc):
    assert choose(desc, FloatType.F16) == LastPass()
    assert choose(desc, FloatType.F16, refine=9, refine_scope="block") == LastPass()
    mixed = choose(desc, others={"down": FloatType.F16, "q": FloatType.F32})
    assert mixed.scope == "model"
    assert mixed.n_bytes > choose(desc).n_bytes


def test_weights_that_were_rounded_to_nearest_are_left_so(desc):
    assert choose(desc, rounding="nearest") == LastPass()
    assert choose(desc, rounding="nearest", refine=4).steps == 4


def test_sequences_of_its_own(desc):
    """As many as are asked for; else on a GPU for models that are sampled quickly, and for the whole model alone."""
    assert choose(desc, own=-1).own == OWN
    assert choose(desc, own=-1, refine_scope="block").own == 0
    assert choose(desc, own=-1, device=CPU, refine=3).own == 0
    for scope in ("model", "block"):
        assert choose(desc, own=7, device=CPU, refine=3, refine_scope=scope).own == 7
    assert choose(desc, own=7, refine=0) == LastPass()
    large = replace(desc, tensors={i: _Large(t) for i, t in desc.tensors.items()})
    spec = CalibrationSpec(length=LENGTH)
    assert large.n_weights >= MOST_WEIGHTS
    assert own_sequences(spec, Recipe(), large, GPU) == 0
    assert own_sequences(replace(spec, own=9), Recipe(), large, GPU) == 9
    assert own_sequences(replace(spec, own=9), Recipe(refine=0), desc, GPU) == 0


class _Large:
    """A tensor that says it has very many weights."""

    n_elements = MOST_WEIGHTS

    def __init__(self, tensor):
        self.shape = tensor.shape


def test_every_scope_has_settings_of_its_own():
    assert LastPass("block", 9).settings == replace(BLOCK_SETTINGS, steps=9)
    assert LastPass("model", 9).settings == RefineSettings(steps=9)
