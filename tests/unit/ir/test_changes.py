"""Params are written again, codes are not."""

import errno
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from d2qconv.errors import RunError
from d2qconv.ir.coded import Coded
from d2qconv.ir.store import Store
from d2qconv.names import Role, TensorId
from d2qconv_gguf.grids import GRIDS

Q0, Q1, NORM = TensorId(Role.Q, 0), TensorId(Role.Q, 1), TensorId(Role.ATTN_NORM, 1)
PARTS = ("block-0000", "block-0001")


def open_store(folder):
    return Store(folder, "a", GRIDS)


def coded(seed, grid="q3_k"):
    random = torch.Generator().manual_seed(seed)
    d = torch.randn(6, 2, generator=random).half()
    sc = torch.randint(0, 64, (6, 2, 16), dtype=torch.uint8, generator=random)
    codes = torch.randint(0, GRIDS[grid].levels, (6, 512), dtype=torch.uint8, generator=random)
    return Coded(GRIDS[grid], (6, 512), codes, {"d": d, "sc": sc})


def refined(of):
    return replace(of, params={**of.params, "d": of.params["d"] * 1.25})


@pytest.fixture
def store(tmp_path):
    with open_store(tmp_path) as opened:
        opened.write(PARTS[0], {Q0: coded(0)}, 1)
        opened.write(PARTS[1], {Q1: coded(1), NORM: torch.ones(8)}, 2)
        yield opened


CHANGED = {Q1: refined(coded(1)), NORM: torch.full((8,), 3.0)}


def seen(store):
    """Values by tensor, the way of an exporter and the way of a walk."""
    by_part = {PARTS[0]: (Q0,), PARTS[1]: (Q1, NORM)}
    found = {t: store.read_tensor(part, t) for part, ids in by_part.items() for t in ids}
    for tensor_id, stored in store.tensors().items():
        again, values = found[tensor_id], stored if isinstance(stored, Coded) else stored.load()
        same = (again.decode(), values.decode()) if isinstance(again, Coded) else (again, values)
        assert torch.equal(*same)
    return found


def is_changed(store):
    """All or nothing; Q0 never."""
    found = seen(store)
    assert torch.equal(found[Q0].decode(), coded(0).decode())
    wanted = CHANGED if float(found[NORM][0]) == 3 else {Q1: coded(1), NORM: torch.ones(8)}
    assert torch.equal(found[Q1].decode(), wanted[Q1].decode())
    assert torch.equal(found[NORM], wanted[NORM])
    return wanted is CHANGED


def test_changes_are_read_and_the_written_stays(store, tmp_path):
    assert not is_changed(store)
    store.write_changed("refined", CHANGED, 7)
    assert is_changed(store)
    assert store.notes("refined", int) == 7
    assert store.parts() == (*PARTS, "refined")
    assert set(store.tensors()) == {Q0, Q1, NORM}
    first = store.read_tensor(PARTS[1], Q1, as_written=True)
    assert torch.equal(first.decode(), coded(1).decode())
    store.close()
    with open_store(tmp_path) as again:
        assert is_changed(again)
        again.delete()
    assert not tmp_path.exists()


def test_changes_hold_no_codes(store, tmp_path):
    store.write_changed("refined", {Q1: CHANGED[Q1]}, None)
    n_params = sum(p.numel() * p.element_size() for p in CHANGED[Q1].params.values())
    assert (tmp_path / "refined.safetensors").stat().st_size < n_params + 300
    assert CHANGED[Q1].codes.numel() // 2 > n_params + 300


def test_changes_of_changes_keep_the_first_codes(store):
    store.write_changed("first", {Q1: refined(coded(1)), NORM: torch.zeros(8)}, None)
    twice = refined(refined(coded(1)))
    store.write_changed("second", {Q1: twice}, None)
    assert torch.equal(seen(store)[Q1].decode(), twice.decode())
    assert torch.equal(seen(store)[NORM], torch.zeros(8))
    store.write_changed("second", CHANGED, None)
    assert is_changed(store)


def fail_at(monkeypatch, name):
    """Stop before the file `name` is renamed to its place."""
    replace_ = Path.replace

    def stop(self, target):
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, "disk full")
        return replace_(self, target)

    monkeypatch.setattr(Path, "replace", stop)


@pytest.mark.parametrize("name", ["manifest.json", "refined.safetensors"])
def test_a_write_that_stops_leaves_the_old_state(store, tmp_path, monkeypatch, name):
    fail_at(monkeypatch, name)
    with pytest.raises(RunError, match="disk full"):
        store.write_changed("refined", CHANGED, None)
    monkeypatch.undo()
    assert not is_changed(store)
    store.close()
    with open_store(tmp_path) as again:
        assert again.parts() == PARTS
        assert not is_changed(again)
        again.write_changed("refined", CHANGED, None)
        assert is_changed(again)


def cut_last(file):
    file.write_bytes(file.read_bytes()[:-1] + b"x")


@pytest.mark.parametrize("damage", [Path.unlink, cut_last])
def test_damaged_changes_are_dropped_alone(store, tmp_path, damage):
    store.write_changed("refined", CHANGED, None)
    store.close()
    damage(tmp_path / "refined.safetensors")
    with open_store(tmp_path) as again:
        assert again.parts() == PARTS
        assert not is_changed(again)


def test_changes_go_with_the_part_that_they_change(store, tmp_path):
    store.write_changed("refined", CHANGED, None)
    store.close()
    cut_last(tmp_path / f"{PARTS[1]}.safetensors")
    with open_store(tmp_path) as again:
        assert again.parts() == PARTS[:1]
        assert set(again.tensors()) == {Q0}
    assert not (tmp_path / "refined.safetensors").exists()


def test_other_codes_are_refused(store):
    other = coded(1)
    other.codes[5, 511] ^= 1
    wrong = [{Q1: other}, {Q1: coded(1).decode()}, {NORM: coded(1)}, {NORM: torch.ones(7)}]
    wrong += [{Q1: coded(1).take_rows(torch.arange(5))}]
    for changed in wrong:
        with pytest.raises(RunError, match="other codes, grid or shape"):
            store.write_changed("refined", changed, None)
    assert store.parts() == PARTS


def test_a_part_with_changes_elsewhere_is_not_written_over(store):
    with pytest.raises(AssertionError, match="changes of this one"):
        store.write_changed(PARTS[1], CHANGED, None)
    store.write_changed("refined", CHANGED, None)
    with pytest.raises(AssertionError, match="changes of this one"):
        store.write(PARTS[1], {Q1: coded(1)}, None)
    assert is_changed(store)
