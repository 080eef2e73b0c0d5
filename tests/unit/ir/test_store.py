"""The work directory keeps what was finished, and nothing else."""

import msgspec
import pytest
import torch

from d2qconv.errors import RunError
from d2qconv.ir.coded import Coded
from d2qconv.ir.store import Store
from d2qconv.names import Part, Role, TensorId
from d2qconv.quant.sweep import round_to_nearest
from d2qconv_gguf.grids import GRIDS

Q, NORM = TensorId(Role.Q, 3), TensorId(Role.ATTN_NORM, 3)
BIAS = TensorId(Role.GATE, 3, Part.BIAS)


class Notes(msgspec.Struct):
    loss: float


def filled(folder, fingerprint="a"):
    store = Store(folder, fingerprint, GRIDS)
    w = torch.randn(8, 512, generator=torch.Generator().manual_seed(0))
    coded = round_to_nearest(w, torch.ones(512), GRIDS["q2_k"])
    store.write("block-0003", {Q: coded, NORM: torch.arange(4.0), BIAS: torch.ones(3)}, Notes(0.25))
    return store, coded


def test_what_is_read_is_what_was_written(tmp_path):
    _, coded = filled(tmp_path / "w")
    store = Store(tmp_path / "w", "a", GRIDS)
    back = store.tensors()[Q]
    assert isinstance(back, Coded)
    assert back.grid is GRIDS["q2_k"]
    assert torch.equal(back.codes, coded.codes)
    assert torch.equal(back.decode(), coded.decode())
    assert torch.equal(store.tensors()[NORM].load(), torch.arange(4.0))
    assert set(store.tensors()) == {Q, NORM, BIAS}
    assert store.notes("block-0003", Notes).loss == 0.25


def test_another_fingerprint_starts_over(tmp_path):
    filled(tmp_path / "w")
    assert Store(tmp_path / "w", "b", GRIDS).parts() == ()
    assert list((tmp_path / "w").glob("*.safetensors")) == []
    assert Store(tmp_path / "w", "a", GRIDS).parts() == ()


@pytest.mark.parametrize(
    "damage", [lambda f: f.unlink(), lambda f: f.write_bytes(f.read_bytes()[:-1] + b"x")]
)
def test_a_damaged_part_is_made_again(tmp_path, damage):
    filled(tmp_path / "w")
    damage(tmp_path / "w" / "block-0003.safetensors")
    assert Store(tmp_path / "w", "a", GRIDS).parts() == ()


def test_a_part_that_was_not_entered_does_not_count(tmp_path):
    filled(tmp_path / "w")
    (tmp_path / "w" / "block-0004.safetensors").write_bytes(b"half")
    assert Store(tmp_path / "w", "a", GRIDS).parts() == ("block-0003",)


def test_a_damaged_manifest_is_said(tmp_path):
    filled(tmp_path / "w")
    (tmp_path / "w" / "manifest.json").write_text('{"version": 1')
    with pytest.raises(RunError, match="damaged"):
        Store(tmp_path / "w", "a", GRIDS)


def test_a_folder_of_somebody_else_is_not_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match="not ours"):
        Store(tmp_path, "a", GRIDS)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_delete_leaves_nothing(tmp_path):
    store, _ = filled(tmp_path / "w")
    store.delete()
    assert not (tmp_path / "w").exists()


def test_row_operations_are_exact():
    w = torch.randn(8, 512, generator=torch.Generator().manual_seed(0))
    coded = round_to_nearest(w, torch.ones(512), GRIDS["q4_k"])
    index = torch.tensor([5, 0, 5, 7])
    assert torch.equal(coded.take_rows(index).decode(), coded.decode()[index])
