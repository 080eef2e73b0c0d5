"""The files of a package and their digest."""

import hashlib

import pytest

from d2qconv.errors import InputError
from d2qconv.exporters.contents import contents


def sha(data):
    return hashlib.sha256(data).hexdigest()


def test_a_file(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"abc")
    (tmp_path / "b.gguf").write_bytes(b"other")
    found = contents(tmp_path / "a.gguf")
    assert (found.n_bytes, found.sha256) == (3, sha(b"abc"))


def test_a_set_and_a_folder_are_digested_as_sha256sum_lists_them(tmp_path):
    names = [f"a-0000{i}-of-00002.gguf" for i in (1, 2)]
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    lines = "".join(f"{sha(name.encode())}  {name}\n" for name in names)
    assert contents(tmp_path).sha256 == sha(lines.encode())
    (tmp_path / "b.gguf").write_bytes(b"other")
    found = contents(tmp_path / names[0])
    assert (found.n_bytes, found.sha256) == (2 * len(names[0]), sha(lines.encode()))
    (tmp_path / names[1]).unlink()
    with pytest.raises(InputError, match="cannot be read"):
        contents(tmp_path / names[0])
