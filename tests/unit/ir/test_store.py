"""The work directory keeps what was finished, and nothing else."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import save_file

from d2qconv.errors import RunError
from d2qconv.ir.coded import Coded
from d2qconv.ir.store import VERSION, Store
from d2qconv.ir.workdir import read_measured, read_tokens, write_measured, write_tokens
from d2qconv.names import Part, Role, TensorId
from d2qconv.quant.sweep import round_to_nearest
from d2qconv_gguf.grids import GRIDS

Q, NORM = TensorId(Role.Q, 3), TensorId(Role.ATTN_NORM, 3)
BIAS = TensorId(Role.GATE, 3, Part.BIAS)


BAD_PART = json.dumps({"version": VERSION, "fingerprint": "a", "parts": {"x": 3}})


class Notes(msgspec.Struct):
    loss: float


def open_store(folder, fingerprint="a"):
    return Store(folder, fingerprint, GRIDS)


def filled(folder, fingerprint="a", n_more=0):
    """A closed store of block-0003 and `n_more` small parts after it; returns block-0003's codes."""
    w = torch.randn(8, 512, generator=torch.Generator().manual_seed(0))
    coded = round_to_nearest(w, torch.ones(512), GRIDS["q2_k"])
    with open_store(folder, fingerprint) as store:
        store.write("block-0003", {Q: coded, NORM: torch.arange(4.0), BIAS: torch.ones(3)}, Notes(0.25))
        for i in range(n_more):
            store.write(f"block-{4 + i:04d}", {NORM: torch.full((4,), float(i))}, None)
    return coded


def names(folder):
    return sorted(f.name for f in folder.iterdir())


def parts(folder, fingerprint="a"):
    with open_store(folder, fingerprint) as store:
        return store.parts()


def test_what_is_read_is_what_was_written(tmp_path):
    coded = filled(tmp_path / "w")
    with open_store(tmp_path / "w") as store:
        back = store.tensors()[Q]
        assert isinstance(back, Coded)
        assert back.grid is GRIDS["q2_k"]
        assert torch.equal(back.codes, coded.codes)
        assert torch.equal(back.decode(), coded.decode())
        assert torch.equal(store.tensors()[NORM].load(), torch.arange(4.0))
        assert set(store.tensors()) == {Q, NORM, BIAS}
        assert store.notes("block-0003", Notes).loss == 0.25
        assert store.n_discarded == 0


def test_another_fingerprint_starts_over(tmp_path):
    filled(tmp_path / "w", n_more=2)
    with open_store(tmp_path / "w", "b") as store:
        assert store.parts() == ()
        assert store.n_discarded == 3
    assert names(tmp_path / "w") == ["lock", "manifest.json"]
    with open_store(tmp_path / "w", "a") as store:
        assert store.parts() == ()
        assert store.n_discarded == 0


def test_another_version_starts_over_whatever_its_parts_look_like(tmp_path):
    filled(tmp_path / "w", n_more=1)
    manifest = tmp_path / "w" / "manifest.json"
    found = json.loads(manifest.read_bytes())
    manifest.write_text(
        json.dumps({**found, "version": 0, "parts": dict.fromkeys(found["parts"], "unlike ours")})
    )
    with open_store(tmp_path / "w") as store:
        assert (store.parts(), store.n_discarded) == ((), 2)
    assert names(tmp_path / "w") == ["lock", "manifest.json"]


def cut_last(file):
    file.write_bytes(file.read_bytes()[:-1] + b"x")


@pytest.mark.parametrize("damage", [Path.unlink, cut_last])
def test_a_damaged_part_is_made_again(tmp_path, damage):
    filled(tmp_path / "w")
    damage(tmp_path / "w" / "block-0003.safetensors")
    assert parts(tmp_path / "w") == ()


@pytest.mark.parametrize("damage", [Path.unlink, cut_last])
@pytest.mark.parametrize("n_kept", [0, 1, 2, 3])
def test_parts_after_a_damaged_one_are_made_again_too(tmp_path, damage, n_kept):
    filled(tmp_path / "w", n_more=3)
    damage(tmp_path / "w" / f"block-{3 + n_kept:04d}.safetensors")
    kept = tuple(f"block-{3 + i:04d}" for i in range(n_kept))
    assert parts(tmp_path / "w") == kept
    assert names(tmp_path / "w") == [*(f"{k}.safetensors" for k in kept), "lock", "manifest.json"]
    assert tuple(json.loads((tmp_path / "w" / "manifest.json").read_bytes())["parts"]) == kept
    assert parts(tmp_path / "w") == kept


def test_the_order_of_writing_counts_and_not_the_names(tmp_path):
    with open_store(tmp_path / "w") as store:
        for part in ("z", "m", "a", "z"):
            store.write(part, {NORM: torch.ones(2)}, None)
    assert parts(tmp_path / "w") == ("m", "a", "z")
    (tmp_path / "w" / "a.safetensors").unlink()
    assert parts(tmp_path / "w") == ("m",)


def test_a_part_that_was_not_entered_does_not_count(tmp_path):
    filled(tmp_path / "w")
    (tmp_path / "w" / "block-0004.safetensors").write_bytes(b"half")
    assert parts(tmp_path / "w") == ("block-0003",)


def test_a_part_that_was_entered_but_not_put_in_place_does_not_count(tmp_path, monkeypatch):
    """The write stops between manifest and rename; nothing of it stays but what came before."""
    filled(tmp_path / "w")
    replace = Path.replace

    def full(self, target):
        if Path(target).name == "output.safetensors":
            raise OSError(errno.ENOSPC, "disk full")
        return replace(self, target)

    with open_store(tmp_path / "w") as store:
        monkeypatch.setattr(Path, "replace", full)
        with pytest.raises(RunError, match="disk full"):
            store.write("output", {NORM: torch.ones(2)}, None)
        monkeypatch.undo()
        assert store.parts() == ("block-0003",)
    assert names(tmp_path / "w") == ["block-0003.safetensors", "lock", "manifest.json"]
    assert parts(tmp_path / "w") == ("block-0003",)


@pytest.mark.parametrize(
    "text",
    [
        '{"version": 1',
        '{"name": "my web page"}',
        '{"version": 2, "fingerprint": "a", "parts": {"../thesis": {}}}',
        '{"version": 0, "fingerprint": "a", "parts": {"../thesis": {}}}',
    ],
)
def test_a_damaged_manifest_is_said(tmp_path, text):
    (tmp_path / "w").mkdir()
    (tmp_path / "thesis.safetensors").write_text("years of work")
    (tmp_path / "w" / "manifest.json").write_text(text)
    with pytest.raises(RunError, match="damaged"):
        open_store(tmp_path / "w")
    assert names(tmp_path / "w") == ["manifest.json"]
    assert (tmp_path / "thesis.safetensors").exists()


def test_a_part_of_the_manifest_that_is_not_one_is_said(tmp_path):
    (tmp_path / "manifest.json").write_text(BAD_PART)
    with pytest.raises(RunError, match="damaged"):
        open_store(tmp_path)


def test_text_that_is_no_utf_8_in_the_manifest_is_said(tmp_path):
    filled(tmp_path)
    manifest = tmp_path / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"q2_k"', b'"q2_\xff"'))
    with pytest.raises(RunError, match="damaged"):
        open_store(tmp_path)


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        (b'"blk.', b'"block.'),
        (b'"q2_k"', b'"p2_k"'),
        # A grid of as many bits, a shape of as many weights, another job's fingerprint, other notes.
        (b'"q2_k"', b'"q2_0"'),
        (b"[8,512]", b"[4,1024]"),
        (b'"fingerprint":"a"', b'"fingerprint":"b"'),
        (b'"loss":0.25', b'"loss":0.26'),
    ],
)
def test_a_manifest_that_is_not_as_it_was_written_is_said(tmp_path, good, bad):
    filled(tmp_path)
    manifest = tmp_path / "manifest.json"
    assert good in manifest.read_bytes()
    manifest.write_bytes(manifest.read_bytes().replace(good, bad, 1))
    with pytest.raises(RunError, match="damaged"):
        open_store(tmp_path)


@pytest.mark.timeout(10)
@pytest.mark.parametrize("name", ["manifest.json", "lock", "block-0003.safetensors", "tokens.safetensors"])
@pytest.mark.parametrize("is_pipe", [True, False])
def test_a_pipe_or_link_is_no_file_of_a_work_directory(tmp_path, name, is_pipe):
    work, elsewhere = tmp_path / "w", tmp_path / "elsewhere"
    filled(work)
    write_tokens(work, "key", {"t": torch.arange(3)})
    if (work / name).exists():
        (work / name).rename(elsewhere)
    elsewhere.touch()
    if is_pipe:
        os.mkfifo(work / name)
    else:
        (work / name).symlink_to(elsewhere)
    before = elsewhere.read_bytes()
    if name == "tokens.safetensors":
        assert read_tokens(work, "key") is None
    elif name == "block-0003.safetensors":
        assert parts(work) == ()
    elif name == "lock" and is_pipe:
        # Never read; as good a lock as a file.
        assert parts(work) == ("block-0003",)
    else:
        with pytest.raises(RunError):
            open_store(work)
    assert elsewhere.read_bytes() == before


@pytest.mark.parametrize(
    "name", ["thesis.txt", "model.safetensors", "x.part", "lock", "tokens.safetensors"], ids=str
)
def test_a_folder_of_somebody_else_is_not_touched(tmp_path, name):
    if name == "tokens.safetensors":
        save_file({"tokens": torch.arange(8)}, tmp_path / name)
    else:
        (tmp_path / name).write_text("years of work")
    before = (tmp_path / name).read_bytes()
    with pytest.raises(RunError, match="not ours"):
        open_store(tmp_path)
    with pytest.raises(RunError, match="not ours"):
        write_tokens(tmp_path, "k", {"x": torch.ones(1)})
    assert names(tmp_path) == [name]
    assert (tmp_path / name).read_bytes() == before


def test_a_file_cannot_be_a_work_directory(tmp_path):
    (tmp_path / "w").write_text("")
    with pytest.raises(RunError, match="cannot be used"):
        open_store(tmp_path / "w")
    with pytest.raises(RunError, match="cannot be used"):
        write_tokens(tmp_path / "w", "k", {})


LEFTOVERS = ["manifest.json.part", "tokens.safetensors.part", "pending.safetensors.part"]


@pytest.mark.parametrize("is_filled", [False, True])
def test_what_a_killed_run_left_half_written_is_removed(tmp_path, is_filled):
    if is_filled:
        filled(tmp_path)
    for name in [*LEFTOVERS, "lock"]:
        (tmp_path / name).write_text("ha" if name != "lock" else "")
    with open_store(tmp_path) as store:
        assert len(store.parts()) == is_filled
        assert not set(LEFTOVERS) & set(names(tmp_path))


def test_delete_leaves_nothing(tmp_path):
    write_tokens(tmp_path / "w", "k", {"x": torch.ones(1)})
    filled(tmp_path / "w", n_more=1)
    with open_store(tmp_path / "w") as store:
        for name in LEFTOVERS:
            (tmp_path / "w" / name).write_text("ha")
        store.delete()
    assert not (tmp_path / "w").exists()


def test_delete_leaves_what_is_not_ours(tmp_path):
    filled(tmp_path)
    theirs = {"thesis.txt", "model.safetensors", "model.safetensors.part", "tokens.safetensors", "sub"}
    (tmp_path / "sub").mkdir()
    for name in theirs - {"tokens.safetensors", "sub"}:
        (tmp_path / name).write_text("years of work")
    save_file({"tokens": torch.arange(8)}, tmp_path / "tokens.safetensors")
    with open_store(tmp_path, "b"):
        assert set(names(tmp_path)) == theirs | {"lock", "manifest.json"}
    with open_store(tmp_path, "b") as store:
        store.write("output", {NORM: torch.ones(2)}, None)
        store.delete()
    assert set(names(tmp_path)) == theirs


def test_a_directory_serves_one_run_at_a_time(tmp_path):
    first = open_store(tmp_path)
    for fingerprint in "ab":
        with pytest.raises(RunError, match="another run uses this work directory") as caught:
            open_store(tmp_path, fingerprint)
        assert caught.value.todo
    with pytest.raises(RunError, match="another run uses"):
        write_tokens(tmp_path, "k", {"x": torch.ones(1)})
    first.write("output", {NORM: torch.ones(2)}, None)
    first.close()
    first.close()
    assert parts(tmp_path) == ("output",)


def test_a_closed_store_is_read_but_not_written(tmp_path):
    filled(tmp_path)
    with open_store(tmp_path) as store:
        pass
    assert torch.equal(store.read_tensor("block-0003", NORM), torch.arange(4.0))
    with pytest.raises(AssertionError, match="closed"):
        store.write("output", {}, None)
    with pytest.raises(AssertionError, match="closed"):
        store.delete()


def test_a_store_that_could_not_be_opened_holds_no_lock(tmp_path):
    filled(tmp_path)
    manifest = (tmp_path / "manifest.json").read_bytes()
    (tmp_path / "manifest.json").write_text(BAD_PART)
    with pytest.raises(RunError, match="damaged") as caught:
        open_store(tmp_path)
    (tmp_path / "manifest.json").write_bytes(manifest)
    assert parts(tmp_path) == ("block-0003",)
    del caught


def test_a_dropped_store_holds_no_lock(tmp_path):
    open_store(tmp_path).parts()
    in_cycle = [open_store(tmp_path)]
    in_cycle.append(in_cycle)
    del in_cycle
    assert parts(tmp_path) == ()


def test_a_killed_process_holds_no_lock(tmp_path):
    code = (
        "import sys; from pathlib import Path; from d2qconv.ir.store import Store\n"
        "store = Store(Path(sys.argv[1]), 'a', {}); print('open', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as run:
        assert run.stdout.readline() == b"open\n"
        with pytest.raises(RunError, match="another run uses"):
            open_store(tmp_path)
        run.send_signal(signal.SIGKILL)
        run.wait()
        assert parts(tmp_path) == ()


def test_a_lock_file_that_was_removed_meanwhile_does_not_count(tmp_path, monkeypatch):
    """Another run deletes the directory's files between our opening and our locking of the lock file."""
    import fcntl

    flock, n_calls = fcntl.flock, 0

    def late(descriptor, operation):
        nonlocal n_calls
        n_calls += 1
        if n_calls == 1:
            (tmp_path / "lock").unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with open_store(tmp_path):
        assert n_calls == 2
        with pytest.raises(RunError, match="another run uses"):
            open_store(tmp_path)


def test_a_part_that_does_not_parse_is_said(tmp_path):
    filled(tmp_path)
    file = tmp_path / "block-0003.safetensors"
    with open_store(tmp_path) as store:
        data = file.read_bytes()
        for damaged in (b"", data[:100], data[:-1], data.replace(b"codes", b"cokes")):
            file.write_bytes(damaged)
            with pytest.raises(RunError, match="cannot be read back"):
                store.read_tensor("block-0003", Q)
        file.unlink()
        with pytest.raises(RunError, match="cannot be read back"):
            store.tensors()[NORM]
        with pytest.raises(RunError, match="notes of block-0003"):
            store.notes("block-0003", list[int])


TOKENS = {"calibration": torch.arange(12).reshape(3, 4), "held_out": torch.arange(4).reshape(1, 4)}


def test_tokens_come_back_under_their_key_alone(tmp_path):
    folder = tmp_path / "not" / "there"
    assert read_tokens(folder, "k") is None
    assert not folder.exists()
    rows = torch.arange(16).reshape(4, 4)
    write_tokens(folder, "k", {"calibration": rows[:3], "held_out": rows[3:], "columns": rows.T})
    back = read_tokens(folder, "k")
    assert set(back) == {"calibration", "held_out", "columns"}
    assert torch.equal(back["calibration"], rows[:3])
    assert torch.equal(back["held_out"], rows[3:])
    assert torch.equal(back["columns"], rows.T)
    assert back["columns"].dtype == torch.int64
    assert read_tokens(folder, "") is None
    assert read_tokens(folder, "other") is None
    write_tokens(folder, "other", TOKENS)
    assert read_tokens(folder, "k") is None
    assert torch.equal(read_tokens(folder, "other")["held_out"], TOKENS["held_out"])
    assert names(folder) == ["lock", "tokens.safetensors"]


def test_tokens_outlive_the_store_and_its_fingerprints(tmp_path):
    write_tokens(tmp_path, "k", TOKENS)
    filled(tmp_path)
    assert parts(tmp_path) == ("block-0003",)
    assert parts(tmp_path, "b") == ()
    assert torch.equal(read_tokens(tmp_path, "k")["calibration"], TOKENS["calibration"])
    write_tokens(tmp_path, "l", TOKENS)
    assert parts(tmp_path, "b") == ()


@pytest.mark.parametrize("n_kept", [0, 7, 50, -1])
def test_damaged_tokens_are_made_again(tmp_path, n_kept):
    write_tokens(tmp_path, "k", TOKENS)
    file = tmp_path / "tokens.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:n_kept])
    assert read_tokens(tmp_path, "k") is None
    write_tokens(tmp_path, "k", TOKENS)
    assert file.read_bytes() == data
    assert read_tokens(tmp_path, "k") is not None


def test_a_flipped_bit_in_the_tokens_is_seen(tmp_path):
    write_tokens(tmp_path, "k", TOKENS)
    cut_last(tmp_path / "tokens.safetensors")
    assert read_tokens(tmp_path, "k") is None


def test_tokens_of_somebody_else_are_no_tokens(tmp_path):
    save_file(TOKENS, tmp_path / "tokens.safetensors")
    assert read_tokens(tmp_path, "k") is None


def test_row_operations_are_exact():
    w = torch.randn(8, 512, generator=torch.Generator().manual_seed(0))
    coded = round_to_nearest(w, torch.ones(512), GRIDS["q4_k"])
    index = torch.tensor([5, 0, 5, 7])
    assert torch.equal(coded.take_rows(index).decode(), coded.decode()[index])


@pytest.mark.parametrize("name", ["tokens.safetensors", "measured.json"])
def test_a_link_where_a_file_is_written_first_is_not_followed(tmp_path, name):
    work, victim = tmp_path / "w", tmp_path / "victim"
    victim.write_text("mine")
    # With a manifest: the folder is ours.
    filled(work)
    (work / f"{name}.part").symlink_to(victim)
    if name == "measured.json":
        write_measured(work, "key", b"[1]")
        assert read_measured(work, "key") == b"[1]"
    else:
        write_tokens(work, "key", {"own": torch.zeros(2, 2)})
        assert read_tokens(work, "key").keys() == {"own"}
    assert victim.read_text() == "mine"
    assert not (work / name).is_symlink()
