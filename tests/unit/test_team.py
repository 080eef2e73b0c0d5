"""Several processes of one run. This file is also the program that those processes run: see `main`."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from d2qconv.calibrate.statistics import InputAccumulator
from d2qconv.errors import InputError, RunError
from d2qconv.ir.coded import Coded
from d2qconv.ir.store import Store
from d2qconv.measure.metrics import Divergence
from d2qconv.names import Role, TensorId
from d2qconv.quant.dac import ShiftAccumulator
from d2qconv.quant.dsq import SCALE, ColumnScaled, split
from d2qconv.quant.hessian import inverse_factor
from d2qconv.quant.sweep import gptq, round_to_nearest
from d2qconv.team import VARIABLES, Team, started
from d2qconv.walk.sharing import RowShare, SharedStore, gather_coded, same_tensors
from d2qconv_gguf.grids import GRIDS

CPU = torch.device("cpu")
#: A process that is silent for so long is given up.
SILENT = timedelta(seconds=3)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def everywhere(team, tensor):
    """The tensor is the same, bit by bit, on all processes."""
    values = team.gather(tensor.cpu())
    return all(torch.equal(value, values[0]) for value in values)


# What the processes check together. Each function runs on all of them.


def shares_cover_everything(team, folder):
    for n in (0, 1, 2, 3, 7, 128):
        items = [i for part in team.gather(team.share(n)) for i in range(n)[part]]
        assert items == list(range(n))
        sizes = [part.stop - part.start for part in team.gather(team.share(n))]
        assert max(sizes) - min(sizes) <= 1


def sums(team, folder):
    for dtype in (torch.float32, torch.float64, torch.int64):
        mine, transposed = torch.full((3, 2), team.rank + 1, dtype=dtype), torch.zeros(2, 3, dtype=dtype).T
        transposed += team.rank
        team.sum_(mine, transposed)
        assert torch.equal(mine, torch.full_like(mine, team.size * (team.size + 1) / 2))
        assert torch.equal(transposed, torch.full_like(mine, team.size * (team.size - 1) / 2))
    noise = random(1000, seed=team.rank) * 10.0 ** random(1000, seed=9)
    team.sum_(noise)
    assert everywhere(team, noise)
    assert team.total(1) == team.size


def rows_are_gathered(team, folder):
    for dtype in (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int16):
        for shape in ((7, 5), (1, 3), (128,), (9, 2, 3), (0, 4), (4, 0)):
            whole = (random(*shape) * 50).to(dtype)
            got = team.gather_rows(whole[team.share(len(whole))], len(whole))
            assert got.dtype == dtype
            assert torch.equal(got, whole)
    if team.size > 1:
        with pytest.raises(ValueError, match="of 7 rows"):
            team.gather_rows(torch.zeros(0, 2), 7)


def disagreement_is_an_error_on_all(team, folder):
    team.same("the fingerprint", "equal")
    with pytest.raises(RunError, match=r"the fingerprint differs .*0: 0, 1: 1"):
        team.same("the fingerprint", str(team.rank))


def tensors_that_differ_by_a_bit_are_an_error(team, folder):
    same_tensors(team, "the norms", {"a": torch.ones(3), "b": torch.zeros(0)})
    with pytest.raises(RunError, match="the norms differs"):
        same_tensors(team, "the norms", {"a": torch.ones(3) + 2.0**-23 * team.rank})


def the_leader_speaks(team, folder):
    assert team.is_leader == (team.rank == 0)
    assert team.from_leader(lambda: (team.rank, "word")) == (0, "word")
    assert team.from_leader(lambda: None) is None
    sent = {
        "a": random(3, 4).half(),
        "empty": torch.zeros(0, 2),
        "scalar": torch.tensor(7),
        "t": random(2, 3).T,
    }
    got = team.tensors_from_leader(lambda: sent if team.is_leader else pytest.fail("called"))
    assert list(got) == list(sent)
    assert all(torch.equal(got[name], sent[name]) and got[name].dtype == sent[name].dtype for name in sent)


def an_error_of_the_leader_reaches_all(team, folder):
    def fail():
        raise InputError("no such file", where="tokens.npy")

    for call in (team.from_leader, team.tensors_from_leader):
        with pytest.raises(InputError if team.is_leader else RunError, match="no such file"):
            call(fail)


def statistics_are_of_all_tokens(team, folder):
    """Also with a process that has no sequence."""
    for n_seq in (2, 5):
        x, source = random(n_seq, 6, 8), random(n_seq, 6, 8, seed=1)
        alone = InputAccumulator(8, CPU, is_source_seen=True)
        alone.add(x, source)
        shared = InputAccumulator(8, CPU, is_source_seen=True)
        shared.add(x[team.share(n_seq)], source[team.share(n_seq)])
        expected, got = alone.finish(), shared.finish(team)
        for name in ("gram", "mean", "cross", "source_mean"):
            assert torch.allclose(getattr(got, name), getattr(expected, name), atol=1e-6), name
            assert everywhere(team, getattr(got, name))


def shifts_are_of_all_tokens(team, folder):
    teacher, student = random(2, 6, 8), random(2, 6, 8, seed=1)
    alone, shared = ShiftAccumulator(8, CPU), ShiftAccumulator(8, CPU)
    alone.add(teacher, student)
    shared.add(teacher[team.share(2)], student[team.share(2)])
    (expected, explained), (got, part) = alone.finish(), shared.finish(team)
    assert torch.allclose(got, expected, atol=1e-7)
    assert everywhere(team, got)
    assert part == pytest.approx(explained)


def divergence_is_of_all_tokens(team, folder):
    p, q, targets = random(4, 5, 9), random(4, 5, 9, seed=1), torch.arange(20).view(4, 5) % 9
    alone, mine = Divergence(), Divergence()
    for i in range(4):
        alone.add(p[i], q[i], targets[i])
        if i in range(4)[team.share(4)]:
            mine.add(p[i], q[i], targets[i])
    whole = mine.joined(team)
    assert whole.mean_kl == alone.mean_kl
    assert whole.perplexity == alone.perplexity
    assert (whole.same_top, whole.n_tokens) == (alone.same_top, alone.n_tokens)


def a_matrix_is_put_together(team, folder):
    """Rounding to nearest, whose rows never meet: exactly what one process makes. Also with too few rows to share."""
    importance = random(512).square() + 0.1
    for n_out in (2, 3, 2 * team.size, 17):
        w = random(n_out, 512) * 0.02
        rows = RowShare(team, n_out)
        assert rows.is_shared == (n_out >= 2 * team.size)
        assert (rows.reduce is None) != rows.is_shared
        for name in ("q2_k", "q3_k", "q8_0"):
            whole = round_to_nearest(w, importance, GRIDS[name])
            got = rows.gather(round_to_nearest(w[rows.mine], importance, GRIDS[name]))
            assert got.shape == whole.shape
            assert torch.equal(got.codes, whole.codes)
            assert list(got.params) == list(whole.params)
            assert all(torch.equal(got.params[p], whole.params[p]) for p in whole.params)
        assert torch.equal(rows.gather(w[rows.mine].half()), w.half())


def column_scales_are_of_all_rows(team, folder):
    sizes = (0.4 * random(512, seed=2)).exp()
    w = random(64, 512) * 0.02 * sizes
    x = random(2000, 512, seed=3)
    factor = inverse_factor(x.T @ x / 2000, 0.01, "test")
    rows = RowShare(team, 64)
    plain = ColumnScaled(GRIDS["q2_k"])
    shared = ColumnScaled(GRIDS["q2_k"], rows.reduce)
    assert shared == plain
    first = w[:, :256], factor.diagonal()[:256].square().reciprocal()
    assert torch.allclose(
        shared.fit(first[0][rows.mine], first[1])[SCALE], plain.fit(*first)[SCALE], rtol=1e-4
    )
    alone = gptq(w, factor, plain, is_refit=True)
    got = rows.gather(gptq(w[rows.mine], factor, shared, is_refit=True))
    assert everywhere(team, got.decode())
    errors = [float(((w - coded.decode()) @ x.T).square().sum()) for coded in (got, alone)]
    assert errors[0] == pytest.approx(errors[1], rel=0.01)
    assert split(got)[0].grid is GRIDS["q2_k"]
    own = gptq(w[rows.mine], factor, plain, is_refit=True)
    with pytest.raises(RunError, match=f"{SCALE}.* differs"):
        rows.gather(own)
    with pytest.raises(ValueError, match="too few"):
        gather_coded(team, own, 3)


def the_leaders_store_is_everybodys(team, folder):
    head, norm = TensorId(Role.HEAD), TensorId(Role.FINAL_NORM)
    held = {head: round_to_nearest(random(6, 256), torch.ones(256), GRIDS["q2_k"]), norm: random(256)}
    store = Store(folder / "work", "fingerprint", GRIDS) if team.is_leader else None
    shared = SharedStore(team, store, GRIDS)
    assert shared.parts() == ()
    shared.write("output", held, {"n": 1})
    assert shared.parts() == ("output",)
    assert shared.notes("output", dict[str, int]) == {"n": 1}
    assert list(shared.tensor_ids("output")) == [head, norm]
    got = shared.read_tensor("output", head)
    assert got.grid is GRIDS["q2_k"]
    assert torch.equal(got.decode(), held[head].decode())
    assert torch.equal(shared.read_tensor("output", norm), held[norm])
    louder = Coded(
        GRIDS["q2_k"], (6, 256), held[head].codes, held[head].scale_rows(torch.full((6,), 2.0))[0].params
    )
    shared.write_changed("refined", {head: louder}, {})
    assert torch.equal(shared.read_tensor("output", head).decode(), louder.decode())
    assert torch.equal(
        shared.read_tensor("output", head, "cpu", as_written=True).decode(), held[head].decode()
    )
    if store is not None:
        store.close()


CHECKS = (
    shares_cover_everything,
    sums,
    rows_are_gathered,
    disagreement_is_an_error_on_all,
    tensors_that_differ_by_a_bit_are_an_error,
    the_leader_speaks,
    an_error_of_the_leader_reaches_all,
    statistics_are_of_all_tokens,
    shifts_are_of_all_tokens,
    divergence_is_of_all_tokens,
    a_matrix_is_put_together,
    column_scales_are_of_all_rows,
    the_leaders_store_is_everybodys,
)


def process(what, rank, folder):
    """One process: `checks` writes what became of each check, `fails` and `hangs` let process 1 do so."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    with Team.join(CPU, wait=SILENT if what == "hangs" else timedelta(seconds=60)) as team:
        if what == "checks":
            failed = {}
            for check in CHECKS:
                try:
                    check(team, folder)
                    failed[check.__name__] = ""
                except Exception:  # noqa: BLE001 told by the test of this check
                    failed[check.__name__] = traceback.format_exc()
            (folder / f"{rank}.json").write_text(json.dumps(failed))
            return
        team.barrier()
        if rank == 1 and what == "fails":
            raise MemoryError("no more")
        if rank == 1:
            time.sleep(60)
        try:
            team.sum_(torch.zeros(1))
        except RunError as error:
            (folder / f"{rank}.txt").write_text(str(error))
            sys.exit(error.exit_code)


def main(what, size, folder):
    """Fork the processes of a team, which is quicker than starting each; exit codes by rank go to `codes.json`."""
    torch.set_num_threads(1)
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=process, args=(what, rank, folder)) for rank in range(size)]
    for each in processes:
        each.start()
    codes = []
    for rank, each in enumerate(processes):
        if what == "hangs" and rank == 1:
            each.kill()
        each.join(50)
        codes.append(each.exitcode)
        each.kill()
    (folder / "codes.json").write_text(json.dumps(codes))


def run_team(what, size, folder):
    """Exit codes by rank. As under torchrun, the parent is the meeting point, so that no port is guessed."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meeting = {
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, __file__, what, str(size), str(folder)]
    done = subprocess.run(
        command, env=os.environ | meeting, timeout=400, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "codes.json").read_text()), done.stderr


@pytest.fixture(scope="module", params=[2, 3])
def checked(request, tmp_path_factory):
    """What became of each check, by rank."""
    folder = tmp_path_factory.mktemp("team")
    codes, errors = run_team("checks", request.param, folder)
    assert codes == [0] * request.param, errors
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(request.param)]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_together(checked, check):
    assert [failed[check.__name__] for failed in checked] == [""] * len(checked)


@pytest.mark.parametrize("check", CHECKS[:3], ids=lambda check: check.__name__)
def test_alone(check, tmp_path):
    check(Team.alone(), tmp_path)


def test_alone_nothing_is_sent():
    team = Team.alone()
    assert team.is_leader
    team.same("anything", "at all")
    assert team.gather(3) == [3]
    x = random(3)
    assert team.gather_rows(x, 3) is x
    assert team.from_leader(lambda: 5) == 5
    assert torch.equal(team.tensors_from_leader(lambda: {"x": x})["x"], x)
    with pytest.raises(InputError, match="as it is"):
        team.from_leader(lambda: (_ for _ in ()).throw(InputError("as it is")))
    with team:
        team.barrier()


def test_statistics_alone_do_not_change_by_a_bit():
    x = random(3, 5, 8)
    got = []
    for team in (None, Team.alone()):
        sums, shifts = InputAccumulator(8, CPU, is_source_seen=False), ShiftAccumulator(8, CPU)
        sums.add(x)
        shifts.add(x, x + 1)
        got.append((sums.finish(team), shifts.finish(team)))
    (plain, (mu, explained)), (teamed, (team_mu, team_explained)) = got
    assert torch.equal(plain.gram, teamed.gram)
    assert torch.equal(plain.mean, teamed.mean)
    assert torch.equal(mu, team_mu)
    assert explained == team_explained


def test_a_process_that_fails_ends_the_others(tmp_path):
    codes, errors = run_team("fails", 3, tmp_path)
    assert codes == [RunError.exit_code, 1, RunError.exit_code]
    assert "MemoryError: no more" in errors
    for rank in (0, 2):
        assert f"process {rank} of 3 lost the others" in (tmp_path / f"{rank}.txt").read_text()


def test_a_process_that_hangs_is_given_up(tmp_path):
    codes, _ = run_team("hangs", 2, tmp_path)
    assert codes[0] == RunError.exit_code
    assert "process 0 of 2 lost the others while adding up" in (tmp_path / "0.txt").read_text()


@pytest.fixture
def environment(monkeypatch):
    """Sets what torchrun would set, and nothing else of it."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def put(**values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return put


def test_without_torchrun_one_is_alone(environment):
    assert Team.join(CPU) == Team.alone()
    environment(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="1")
    assert Team.join(CPU) == Team.alone()
    assert not dist.is_initialized()


def test_what_torchrun_started_is_known_before_joining(environment):
    assert started() == (0, 1, 1)
    environment(RANK="3", WORLD_SIZE="4", LOCAL_RANK="1", MASTER_ADDR="localhost", MASTER_PORT="1")
    for here in ("", "0", "5", "two"):
        environment(LOCAL_WORLD_SIZE=here)
        with pytest.raises(InputError, match=f"'{here}' of 4"):
            started()
    environment(LOCAL_WORLD_SIZE="2")
    assert started() == (3, 4, 2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not"),
        ({"WORLD_SIZE": "two"}, "no number.*two"),
        ({"RANK": "2"}, r"no process 2 \(local 0\) of 2"),
        ({"LOCAL_RANK": "-1"}, r"no process 0 \(local -1\) of 2"),
    ],
)
def test_what_torchrun_would_not_set_is_refused(environment, values, message):
    whole = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }
    environment(**(values if values == {"RANK": "0"} else {**whole, **values}))
    with pytest.raises(InputError, match=message):
        Team.join(CPU)


@pytest.mark.parametrize(
    ("device", "n_gpus", "message"),
    [("cuda", 1, "it has 1"), ("cuda", 0, "it has 0"), ("cuda:0", 2, "GPU of its own number")],
)
def test_every_process_needs_its_own_gpu(environment, monkeypatch, device, n_gpus, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    environment(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", MASTER_ADDR="localhost", MASTER_PORT="1")
    with pytest.raises(InputError, match=message):
        Team.join(torch.device(device))


def test_others_that_do_not_come_are_an_error(environment):
    environment(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="9")
    with pytest.raises(RunError, match="process 1 of 2 did not meet the others"):
        Team.join(CPU, wait=timedelta(seconds=1))
    assert not dist.is_initialized()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
