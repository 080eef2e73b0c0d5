"""Streams: the same bits wherever the activations lie, and statistics of weighed tokens."""

import pytest
import torch

import d2qconv.walk.stream as stream_module
from d2qconv.errors import RunError
from d2qconv.ir.coded import Coded
from d2qconv.ir.store import Store
from d2qconv.ir.workdir import ACTIVATIONS
from d2qconv.team import Team
from d2qconv.walk.activations import Activations, Place, Placement
from d2qconv.walk.stream import Stream
from d2qconv_gguf.grids import GRIDS

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Two sequences of 6 tokens a batch, the last one alone."""
    monkeypatch.setattr(stream_module, "BATCH_TOKENS", 12)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def embedded(folder, place, *, has_source=True):
    tokens = torch.randint(40, (5, 6), generator=torch.Generator().manual_seed(1))
    source = random(40, 32).bfloat16()
    grid = GRIDS["q8_0"]
    params = grid.fit(source.float(), torch.ones(32))
    codes = grid.encode(source.float(), params, 0)
    coded = Coded(grid, (40, 32), codes, {name: p[:, None] for name, p in params.items()})
    made = Stream.embedded(
        tokens, coded, source if has_source else None, Placement(place, CPU, folder), Team.alone()
    )
    return made, tokens, coded, source


@pytest.mark.parametrize("place", list(Place))
def test_embedding_gathers_the_rows_and_decodes_them(tmp_path, place):
    stream, tokens, coded, source = embedded(tmp_path, place)
    every = slice(0, 5)
    assert torch.equal(stream.x.rows(every), coded.decode()[tokens])
    assert torch.equal(stream.source.rows(every), source.float()[tokens])
    assert (len(stream.x), tuple(stream.x.shape), stream.device) == (5, (5, 6, 32), CPU)
    assert embedded(tmp_path, place, has_source=False)[0].source is None


def walked(folder, place):
    """What a few steps of a walk give: activations and statistics."""
    stream, *_ = embedded(folder, place)
    w, v = random(32, 32, seed=3), random(48, 32, seed=4)
    stream.advance(lambda x: x + torch.tanh(x @ w.T), lambda x: x - torch.tanh(x @ w.T))
    found = stream.measure(lambda x: x @ v.T, lambda x: torch.relu(x @ v.T))
    stream.advance(lambda x: x * found.gram[0, 0], lambda x: x * found.cross[0, 0])
    weighed = stream.measure_weighed(lambda x: x, lambda x: x, lambda x: x.square().mean(-1))
    return [
        *stream.x, *stream.source, found.gram, found.mean, found.cross, found.source_mean, weighed.gram, weighed.mean
    ]  # fmt: skip


def test_every_place_gives_the_same_bits(tmp_path):
    device, host, disk = (walked(tmp_path, place) for place in Place)
    assert len(device) == 16
    for a, b, c in zip(device, host, disk, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_batches_are_whole_sequences_in_order():
    stream = Stream.of(random(5, 6, 32), random(5, 6, 32, seed=1))
    assert [len(x) for x, _ in stream.batches()] == [2, 2, 1]
    assert torch.equal(torch.cat([x for x, _ in stream.batches()]), random(5, 6, 32))
    assert torch.equal(torch.cat([s for _, s in stream.batches()]), random(5, 6, 32, seed=1))


def test_weighed_statistics_are_those_of_repeated_tokens():
    x, source = random(4, 6, 8), random(4, 6, 8, seed=1)
    counts = torch.tensor([[0.0, 1, 2, 0, 1, 2]]).expand(4, 6)
    found = Stream.of(x, source).measure_weighed(lambda x: x, lambda s: s, lambda x: counts[: len(x)])
    rows = torch.arange(24).view(4, 6).repeat_interleave(counts[0].long(), dim=1).reshape(-1)
    a, b = x.view(-1, 8)[rows].double(), source.view(-1, 8)[rows].double()
    for got, want in (
        (found.gram, a.T @ a / 24), (found.cross, b.T @ a / 24), (found.mean, a.mean(0)), (found.source_mean, b.mean(0))
    ):  # fmt: skip
        torch.testing.assert_close(got, want.float())
    alone = Stream.of(x).measure_weighed(lambda x: x, lambda s: s, lambda x: counts[: len(x)])
    assert alone.cross is None
    assert alone.source_mean is None
    assert torch.equal(alone.gram, found.gram)


@pytest.mark.parametrize("place", list(Place))
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_values_that_are_not_finite_are_seen(tmp_path, place, bad):
    x = Placement(place, CPU, tmp_path).empty(3, 4, 8)
    x.set(slice(0, 3), torch.zeros(3, 4, 8))
    assert x.is_finite()
    worse = torch.zeros(1, 4, 8)
    worse[0, 3, 7] = bad
    x.set(slice(2, 3), worse)
    assert not x.is_finite()


def test_a_file_of_activations_has_no_name(tmp_path):
    (tmp_path / ACTIVATIONS).write_text("left by a kill")
    x = Placement(Place.DISK, CPU, tmp_path).empty(3, 4, 8)
    assert list(tmp_path.iterdir()) == []
    x.set(slice(0, 3), random(3, 4, 8))
    assert torch.equal(x.rows(slice(0, 3)), random(3, 4, 8))
    x.close()
    assert x.values.numel() == 0


def test_the_store_takes_a_folder_with_activations_of_a_killed_run(tmp_path):
    (tmp_path / ACTIVATIONS).write_text("left by a kill")
    store = Store(tmp_path, "f", GRIDS)
    store.delete()
    assert not tmp_path.exists()


def test_a_folder_that_cannot_be_written_is_a_run_error(tmp_path):
    with pytest.raises(RunError, match="cannot be used"):
        Placement(Place.DISK, CPU, tmp_path / "missing").empty(3, 4, 8)


def test_a_full_disk_is_a_run_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(RunError, match="No space left"):
        Placement(Place.DISK, CPU, tmp_path).empty(3, 4, 8)
    assert list(tmp_path.iterdir()) == []


def test_closing_a_stream_gives_both_back():
    stream = Stream.of(random(2, 3, 4), random(2, 3, 4))
    stream.close()
    assert (len(stream.x), len(stream.source)) == (0, 0)


def test_activations_of_a_tensor_are_that_tensor():
    x = random(2, 3, 4)
    Activations.of(x).set(slice(1, 2), torch.zeros(1, 3, 4))
    assert x[1].abs().max() == 0
    assert x[0].abs().max() > 0
