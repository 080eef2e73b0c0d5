"""Opening folders, snapshots and hub names."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from d2qconv.checkpoint.open import open_checkpoint
from d2qconv.errors import InputError, PluginError
from d2qconv.testing.models import make_checkpoint, write_shards

INDEX = "model.safetensors.index.json"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", "llama")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "sharded", "llama", shards=3)


def edit_index(folder: Path, tensor: str, file: str | None) -> None:
    index = json.loads((folder / INDEX).read_text())
    if file is None:
        del index["weight_map"][tensor]
    else:
        index["weight_map"][tensor] = file
    (folder / INDEX).write_text(json.dumps(index))


def test_one_file_and_shards_hold_the_same(model: Path, sharded: Path) -> None:
    one, many = open_checkpoint(str(model)), open_checkpoint(str(sharded))
    assert one.tensors.keys() == many.tensors.keys()
    assert all(torch.equal(one.tensors[n].load(), many.tensors[n].load()) for n in one.tensors)
    assert one.source == str(model)
    assert (one.revision, one.license) == ("", "")
    assert one.config["hidden_size"] == 256


def test_a_name_does_not_tell_where_the_folder_lies(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model)
    assert open_checkpoint(".").name == open_checkpoint(str(model)).name == model.name


def test_side_files(model: Path) -> None:
    (model / "generation_config.json").write_text('{"eos_token_id": 3}')
    (model / "tokenizer_config.json").write_text("[1]")
    checkpoint = open_checkpoint(str(model))
    assert checkpoint.file("tokenizer.model") is None
    assert checkpoint.json("tokenizer.json") is None
    assert checkpoint.file("generation_config.json") == model / "generation_config.json"
    assert checkpoint.json("generation_config.json") == {"eos_token_id": 3}
    with pytest.raises(InputError, match="not a JSON object"):
        checkpoint.json("tokenizer_config.json")
    for name in ("../config.json", "/etc/passwd", "..", "", "a\0b", "c:x"):
        with pytest.raises(InputError, match="not a plain file name"):
            checkpoint.file(name)


@pytest.mark.parametrize("text", [None, "{", "[]", '"x"', "\xff", '{"a": NaN}', '{"a":' + "[" * 100_000])
def test_bad_config(model: Path, text: str | None) -> None:
    path = model / "config.json"
    if text is None:
        path.unlink()
    else:
        path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"config\.json"):
        open_checkpoint(str(model))


@pytest.mark.parametrize(
    ("card", "license_"),
    [
        ("---\nlicense: apache-2.0\n---\n# x", "apache-2.0"),
        ("---\nlanguage:\n- en\nlicense: 'mit' # see file\ntags: [x]\n---\n", "mit"),
        ("---\nlicense: other\nlicense_name: my-own\n---\n", "other (my-own)"),
        ("---\nlicense:\n- mit\n- apache-2.0\n---\n", "mit, apache-2.0"),
        ("---\nlanguage: en\n---\nlicense: mit\n", ""),
        ("license: mit\n", ""),
        ("", ""),
    ],
)
def test_license(model: Path, card: str, license_: str) -> None:
    (model / "README.md").write_text(card)
    assert open_checkpoint(str(model)).license == license_


def test_license_of_the_config(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "license": "bsd"}))
    assert open_checkpoint(str(model)).license == "bsd"


def test_pickles_are_never_opened(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"not even a pickle")
    with pytest.raises(InputError, match=r"pickled weights \('pytorch_model.bin'\)"):
        open_checkpoint(str(model))


def test_no_weights(model: Path) -> None:
    (model / "model.safetensors").rename(model / "other.safetensors")
    with pytest.raises(InputError, match=r"only 'other\.safetensors'"):
        open_checkpoint(str(model))
    (model / "other.safetensors").unlink()
    with pytest.raises(InputError, match="no weights"):
        open_checkpoint(str(model))


def test_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(InputError, match=r"missing: 'model-00002-of-00003\.safetensors'"):
        open_checkpoint(str(sharded))


def test_truncated_shard(sharded: Path) -> None:
    path = sharded / "model-00003-of-00003.safetensors"
    size = path.stat().st_size
    os.truncate(path, size - 100)
    with pytest.raises(InputError, match=f"(?s)00003-of.*expected {size} bytes, found {size - 100}"):
        open_checkpoint(str(sharded))


def test_index_and_files_disagree(sharded: Path) -> None:
    edit_index(sharded, "model.norm.weight", "model-00001-of-00003.safetensors")
    with pytest.raises(
        InputError, match=r"in the index but not in the file: 'model\.norm\.weight in model-00001"
    ):
        open_checkpoint(str(sharded))
    edit_index(sharded, "model.norm.weight", None)
    with pytest.raises(InputError, match=r"in the file but not in the index: 'model\.norm\.weight"):
        open_checkpoint(str(sharded))


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..\\x.safetensors", "..", "", "w.bin"],
)
def test_index_names_that_are_no_files_of_the_folder(sharded: Path, name: str) -> None:
    edit_index(sharded, "model.norm.weight", name)
    with pytest.raises(InputError, match="not plain names"):
        open_checkpoint(str(sharded))


@pytest.mark.parametrize("text", ["{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[]", "{"])
def test_bad_index(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_text(text)
    with pytest.raises(InputError, match=r"index\.json"):
        open_checkpoint(str(sharded))


def test_single_file_beside_an_index(sharded: Path) -> None:
    write_shards(sharded, {"a": torch.ones(1)})
    with pytest.raises(InputError, match="both"):
        open_checkpoint(str(sharded))
    (sharded / INDEX).write_text('{"weight_map": {"a": "model.safetensors"}}')
    assert list(open_checkpoint(str(sharded)).tensors) == ["a"]


def test_links_inside_are_legal_and_outside_are_not(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").rename(model / "weights")
    (model / "model.safetensors").symlink_to("weights")
    open_checkpoint(str(model))
    link = tmp_path / "link"
    link.symlink_to(model)
    open_checkpoint(str(link))
    outside = tmp_path / "secret.json"
    outside.write_text("{}")
    (model / "tokenizer.json").symlink_to(outside)
    with pytest.raises(InputError, match="leaves the folder"):
        open_checkpoint(str(model)).file("tokenizer.json")
    (model / "weights").rename(tmp_path / "weights")
    with pytest.raises(InputError, match="leads nowhere"):
        open_checkpoint(str(model))
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to(tmp_path / "weights")
    with pytest.raises(InputError, match="leaves the folder"):
        open_checkpoint(str(model))


def test_files_of_an_inner_folder(model: Path, tmp_path: Path) -> None:
    checkpoint, inner = open_checkpoint(str(model)), model / "inner"
    assert checkpoint.files("inner", ".x") == []
    inner.mkdir()
    for name in ("b.x", "a.x", "c.y"):
        (inner / name).write_text("")
    assert checkpoint.files("inner", ".x") == [inner / "a.x", inner / "b.x"]
    (tmp_path / "secret.x").write_text("")
    (inner / "d.x").symlink_to(tmp_path / "secret.x")
    with pytest.raises(InputError, match=r"'inner/d\.x' is a link that leaves the folder"):
        checkpoint.files("inner", ".x")
    (inner / "d.x").unlink()
    (inner / "d.x").mkdir()
    with pytest.raises(InputError, match=r"'inner/d\.x' is not a file"):
        checkpoint.files("inner", ".x")
    (tmp_path / "elsewhere").mkdir()
    (model / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="'link' is a link that leaves the folder"):
        checkpoint.files("link", ".x")
    for name, said in (("config.json", "not a folder"), ("..", "plain"), ("inner/..", "plain")):
        with pytest.raises(InputError, match=said):
            checkpoint.files(name, ".x")


def as_snapshot(model: Path, cache: Path, *, shared: bool = False) -> Path:
    """The folder as huggingface_hub would have cached it."""
    repository = cache / "models--org--name"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "abc123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted(model.iterdir())):
        target = blobs / f"etag{i}"
        if shared and path.suffix == ".safetensors":
            store = cache / "blobs" / "ab" / f"hash{i}"
            store.parent.mkdir(parents=True)
            path.rename(store)
            target.symlink_to(f"../../blobs/ab/hash{i}")
        else:
            path.rename(target)
        (snapshot / path.name).symlink_to(f"../../blobs/etag{i}")
    return snapshot


@pytest.mark.parametrize("shared", [False, True])
def test_snapshot_of_the_cache(model: Path, tmp_path: Path, shared: bool) -> None:
    checkpoint = open_checkpoint(str(as_snapshot(model, tmp_path / "hub", shared=shared)))
    assert checkpoint.revision == "abc123"
    assert checkpoint.file("config.json") is not None
    assert checkpoint.tensors["model.norm.weight"].load().shape == (256,)


def test_snapshot_links_must_stay_in_the_cache(model: Path, tmp_path: Path) -> None:
    snapshot = as_snapshot(model, tmp_path / "hub")
    (tmp_path / "secret.json").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(InputError, match="leaves the folder"):
        open_checkpoint(str(snapshot)).file("tokenizer.json")


def test_inner_folder_of_a_snapshot(model: Path, tmp_path: Path) -> None:
    snapshot = as_snapshot(model, tmp_path / "hub")
    (snapshot / "inner").mkdir()
    (snapshot.parents[1] / "blobs" / "etag").write_text("")
    (snapshot / "inner" / "a.x").symlink_to("../../../blobs/etag")
    assert open_checkpoint(str(snapshot)).files("inner", ".x") == [snapshot / "inner" / "a.x"]


def test_blobs_folder_that_is_itself_a_link(model: Path, tmp_path: Path) -> None:
    snapshot = as_snapshot(model, tmp_path / "hub")
    blobs = snapshot.parent.parent / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="leaves the folder"):
        open_checkpoint(str(snapshot))


def test_names_that_cannot_be_opened(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        open_checkpoint(str(tmp_path / "absent"))
    with pytest.raises(InputError, match="no such folder"):
        open_checkpoint("just-a-name")
    with pytest.raises(InputError, match="cannot be opened"):
        open_checkpoint("x" * 5000)
    with pytest.raises(InputError, match="cannot be opened"):
        open_checkpoint("~no-such-user-of-this-machine/model")
    with pytest.raises(InputError, match="not a folder"):
        open_checkpoint(str(model / "config.json"))
    with pytest.raises(InputError, match="belongs to a hub name"):
        open_checkpoint(str(model), revision="main")


def fake_hub(monkeypatch: pytest.MonkeyPatch, result: str | Exception) -> list[dict[str, object]]:
    calls: list[dict[str, object]] = []

    def snapshot_download(name: str, **options: object) -> str:
        calls.append({"name": name, **options})
        if isinstance(result, Exception):
            raise result
        return result

    module = ModuleType("huggingface_hub")
    module.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return calls


def test_hub_name(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_hub(monkeypatch, str(as_snapshot(model, tmp_path / "hub")))
    checkpoint = open_checkpoint("org/name", revision="v1")
    assert (checkpoint.source, checkpoint.revision) == ("org/name", "abc123")
    assert calls[0]["name"] == "org/name"
    assert calls[0]["revision"] == "v1"
    allowed = calls[0]["allow_patterns"]
    assert isinstance(allowed, list)
    assert {"*.safetensors", "*.json", "tokenizer.model", "*.jinja", "LICENSE*", "README.md"} == set(allowed)


def test_hub_errors_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    class RepositoryNotFoundError(Exception):
        pass

    for error, sentence in (
        (RepositoryNotFoundError("404\nmany\nlines"), "no such repository"),
        (RuntimeError("first line\nsecond line"), "RuntimeError: first line"),
        (OSError(), "OSError"),
    ):
        fake_hub(monkeypatch, error)
        with pytest.raises(InputError) as found:
            open_checkpoint("org/name")
        assert sentence in found.value.what
        assert "\n" not in found.value.what
        assert found.value.where == "org/name"


def test_hub_library_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(PluginError, match=r"pip install 'd2qconv\[hub\]'"):
        open_checkpoint("org/name")


def test_modules_are_light() -> None:
    code = (
        "import sys, d2qconv.checkpoint.open, d2qconv.arch.bind\n"
        "heavy = {'torch', 'numpy', 'safetensors', 'huggingface_hub', 'transformers'} & set(sys.modules)\n"
        "sys.exit(repr(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
