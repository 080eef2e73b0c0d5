"""Measurements in the work directory: kept under a key, ours alone, gone with the rest."""

from __future__ import annotations

import pytest

from d2qconv.errors import RunError
from d2qconv.ir.store import Store
from d2qconv.ir.workdir import MEASURED, prepare, read_measured, write_measured

VALUES = b'{"blk.0.q.weight":[1.5,2e-7]}'


def test_it_comes_back_under_its_key_alone(tmp_path):
    folder = tmp_path / "work"
    assert read_measured(folder, "k") is None
    write_measured(folder, "k", VALUES)
    assert read_measured(folder, "k") == VALUES
    assert read_measured(folder, "other") is None
    write_measured(folder, "other", b"[]")
    assert (read_measured(folder, "k"), read_measured(folder, "other")) == (None, b"[]")


@pytest.mark.parametrize(
    "change", [lambda b: b[:-1], lambda b: b.replace(b"1.5", b"1.6"), lambda b: b"\xff\xfe"]
)
def test_a_damaged_one_is_none(tmp_path, change):
    write_measured(tmp_path, "k", VALUES)
    path = tmp_path / MEASURED
    path.write_bytes(change(path.read_bytes()))
    assert read_measured(tmp_path, "k") is None


def test_somebody_elses_file_of_that_name_is_left_alone(tmp_path):
    theirs = tmp_path / MEASURED
    theirs.write_text('{"results": [1, 2]}')
    assert read_measured(tmp_path, "k") is None
    for use in (lambda: write_measured(tmp_path, "k", VALUES), lambda: prepare(tmp_path)):
        with pytest.raises(RunError, match=f"not ours: {MEASURED}"):
            use()
    assert theirs.read_text() == '{"results": [1, 2]}'


def test_a_store_takes_the_folder_over_and_removes_it(tmp_path):
    folder = tmp_path / "work"
    prepare(folder)
    write_measured(folder, "k", VALUES)
    with Store(folder, "f", {}) as store:
        assert read_measured(folder, "k") == VALUES
        with pytest.raises(RunError, match="another run uses"):
            write_measured(folder, "k", VALUES)
        store.delete()
    assert not folder.exists()
