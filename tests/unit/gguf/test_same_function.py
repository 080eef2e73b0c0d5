"""A file whose metadata say something else than the source is caught, however small the effect on its logits."""

from dataclasses import replace

import pytest
from gguf_models import FAST, ROPES, make_desc, write

from d2qconv.arch.spec import Rope
from d2qconv.errors import VerifyError
from d2qconv.exporters.base import silent
from d2qconv_gguf.verify import require_same_function, verify_file

YARN = Rope(10000.0, "yarn", 4.0, original_max_positions=512)


@pytest.mark.parametrize("rope", sorted(ROPES))
def test_a_right_file_passes(tmp_path, rope):
    desc = make_desc("llama", rope=rope)
    write(tmp_path / "m.gguf", desc, FAST)
    require_same_function(tmp_path / "m.gguf", desc)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda d: replace(d, norm_eps=d.norm_eps * 10), "norm epsilon"),
        (lambda d: replace(d, rope=Rope(d.rope.theta * 1.5)), "RoPE frequencies"),
        (lambda d: replace(d, rope=YARN), "RoPE attention factor"),
        (lambda d: replace(d, max_positions=d.max_positions * 2), "context length"),
        (lambda d: replace(d, is_tied=not d.is_tied), "tied head"),
        (lambda d: replace(d, dims=replace(d.dims, n_kv_heads=d.dims.n_heads * 2)), "sizes"),
    ],
)
def test_a_wrong_file_does_not(tmp_path, change, what):
    desc = make_desc("llama")
    write(tmp_path / "m.gguf", desc, FAST)
    with pytest.raises(VerifyError, match=what):
        require_same_function(tmp_path / "m.gguf", change(desc))


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "what", [b"rope.freq_base", b"layer_norm_rms_epsilon", b"eos_token_id", b"d2qconv.recipe"]
)
def test_a_changed_key_is_noticed(tmp_path, what):
    path = tmp_path / "m.gguf"
    write(path, make_desc("llama"), FAST)
    assert all(c.is_passed for c in verify_file(path, silent))
    # behind the key: u32 type, then the value (of a string: its u64 length first)
    flip(path, path.read_bytes().index(what) + len(what) + (13 if b"recipe" in what else 4))
    failed = [c.name for c in verify_file(path, silent) if not c.is_passed]
    assert failed == ["metadata"]


def test_bytes_behind_the_last_tensor_are_noticed(tmp_path):
    path = tmp_path / "m.gguf"
    write(path, make_desc("llama"), FAST)
    path.write_bytes(path.read_bytes() + bytes(64))
    assert [c.name for c in verify_file(path, silent) if not c.is_passed] == ["metadata"]
