"""Our forward pass against transformers' own classes."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama import LlamaConfig

from d2qconv.arch.bind import bind
from d2qconv.arch.spec import Rope
from d2qconv.checkpoint.open import open_checkpoint
from d2qconv.decoder.block import Past, load_block, load_ends
from d2qconv.decoder.rope import attention_factor, cos_sin, inverse_frequencies, rotate
from d2qconv.measure.reference import logits
from d2qconv.testing.models import make_checkpoint

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
    "rope_theta": 500000.0,
}
LINEAR = {"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("model_type", "rope"),
    [
        ("llama", None),
        ("llama", LINEAR),
        ("llama", LLAMA3),
        ("mistral", None),
        ("qwen2", YARN),
        ("qwen3", None),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_transformers(tmp_path, model_type, rope, tied):
    folder = make_checkpoint(tmp_path / "m", model_type, dtype=torch.float32, tied=tied, rope_parameters=rope)
    tokens = torch.randint(512, (2, 300), generator=torch.Generator().manual_seed(1))
    theirs_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        theirs = theirs_model(tokens).logits
    ours = logits(bind(open_checkpoint(str(folder))), tokens)
    assert float((ours - theirs).abs().max()) < 2e-5 * float(theirs.abs().max())


@pytest.mark.parametrize(("kind", "parameters"), [("linear", LINEAR), ("llama3", LLAMA3), ("yarn", YARN)])
def test_rope_frequencies_equal_transformers(kind, parameters):
    config = LlamaConfig(head_dim=64, max_position_embeddings=2048, rope_parameters=parameters)
    theirs, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    rope = Rope(
        theta=parameters["rope_theta"],
        kind=kind,
        factor=parameters["factor"],
        low_freq_factor=parameters.get("low_freq_factor", 1.0),
        high_freq_factor=parameters.get("high_freq_factor", 4.0),
        original_max_positions=parameters.get("original_max_position_embeddings", 0),
    )
    assert torch.allclose(inverse_frequencies(rope, 64), theirs, rtol=1e-6, atol=0)
    assert attention_factor(rope) == pytest.approx(factor)


def test_rotation_keeps_lengths_and_depends_on_distance_only():
    rope = Rope(theta=10000.0)
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(64, generator=generator), torch.randn(64, generator=generator)

    def score(i, j):
        ci, si = cos_sin(rope, 64, range(i, i + 1), "cpu")
        cj, sj = cos_sin(rope, 64, range(j, j + 1), "cpu")
        return float(rotate(q[None], ci, si)[0] @ rotate(k[None], cj, sj)[0])

    assert score(3, 1) == pytest.approx(score(103, 101), abs=1e-4)
    assert score(0, 0) == pytest.approx(float(q @ k), abs=1e-5)


def test_one_position_at_a_time_equals_all_at_once(tmp_path):
    folder = make_checkpoint(tmp_path / "m", "qwen3", dtype=torch.float32)
    model = bind(open_checkpoint(str(folder)))
    tokens = torch.randint(512, (3, 20), generator=torch.Generator().manual_seed(1))
    ends = load_ends(model, "cpu")
    blocks = [load_block(model, i, "cpu") for i in range(model.dims.n_layers)]
    pasts = [Past.empty(model, 3, 20, "cpu") for _ in blocks]
    for position in range(20):
        x = ends.embed(tokens[:, position : position + 1])
        for block, past in zip(blocks, pasts, strict=True):
            x = block(x, past)
    assert torch.allclose(ends.logits(x[:, 0]), logits(model, tokens)[:, -1], atol=1e-4)
