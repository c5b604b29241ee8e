import time

import pytest
import torch
from torch import distributed

from delvm import ranks
from delvm.errors import UserError
from tests.processes import together


def test_one_process_does_all_itself(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    values = {"loss": torch.tensor(2.0)}
    with ranks.joined():
        assert (ranks.rank(), ranks.world(), ranks.local_world(), ranks.is_first()) == (0, 1, 1, True)
        assert ranks.on_first(lambda: values) is values  # as it is
        assert ranks.mean(values) is values
        assert (ranks.any_rank(True), ranks.any_rank(False)) == (True, False)
        ranks.barrier()
        assert not distributed.is_initialized()


def test_every_process_has_its_place():
    def place():
        return ranks.rank(), ranks.world(), ranks.local_world(), ranks.is_first()

    assert together(place, num=3) == [(0, 3, 3, True), (1, 3, 3, False), (2, 3, 3, False)]


def test_the_first_does_it_and_all_have_the_result(tmp_path):
    def work():
        def write(name):
            return ranks.on_first(lambda: (tmp_path / name).write_text(str(ranks.rank())))

        result = ranks.on_first(lambda: {"rank": ranks.rank(), "none": None, "loss": 0.1 + 0.2})
        return [write(name) for name in "012"], result

    expected = ([1, 1, 1], {"rank": 0, "none": None, "loss": 0.1 + 0.2})
    assert together(work) == [expected, expected]
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"0": "0", "1": "0", "2": "0"}


def test_nobody_passes_a_barrier_before_all_are_there(tmp_path):
    def work():
        for slow in (0, 1, 0):
            if ranks.rank() == slow:
                time.sleep(0.3)
                (tmp_path / "there").write_text("")
            ranks.barrier()
            if ranks.rank() != slow:
                (tmp_path / "there").unlink()  # fails where it is not there
            ranks.barrier()
        return True

    assert together(work) == [True, True]


def test_flags_and_means():
    def work():
        mine = ranks.rank()
        values = {"a": torch.tensor(float(mine)), "b": torch.tensor(10.0 * mine, dtype=torch.float64)}
        found = ranks.mean(values)
        flags = [ranks.any_rank(mine == chosen) for chosen in (0, 1, 2)]
        return flags, {key: (float(value), value.dtype) for key, value in found.items()}, ranks.mean({})

    expected = ([True, True, False], {"a": (0.5, torch.float32), "b": (5.0, torch.float64)}, {})
    assert together(work) == [expected, expected]


# --- how a run ends ---


def _fail_on(rank, waiting):
    if ranks.rank() == rank:
        raise UserError(f"{rank} failed")
    waiting()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "waiting",
    [ranks.barrier, lambda: ranks.any_rank(False), lambda: distributed.all_reduce(torch.zeros(3))],
    ids=["barrier", "flag", "collective"],
)
def test_one_that_fails_ends_all(rank, waiting):
    results = together(_fail_on, rank, waiting)
    assert (type(results[rank]), str(results[rank])) == (UserError, f"{rank} failed")
    assert type(results[1 - rank]) is ranks.Ended


def test_who_waits_for_the_first_hears_of_its_failure():
    def work():
        ranks.on_first(lambda: 1 / 0)

    assert [type(result) for result in together(work)] == [ZeroDivisionError, ranks.Ended]


def test_one_that_hears_nothing_is_ended(monkeypatch):
    monkeypatch.setattr(ranks, "GRACE", 0.1)
    results = together(_fail_on, 0, lambda: time.sleep(50))
    assert [type(result) for result in results] == [UserError, type(None)]


def test_of_a_failure_of_all_the_first_process_speaks():
    def work():
        raise UserError(f"{ranks.rank()} failed")

    results = together(work, num=3)
    assert [type(result) for result in results] == [UserError, ranks.Ended, ranks.Ended]
    assert str(results[0]) == "0 failed"


def test_srun_without_a_launcher_is_refused(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    said = (
        r"^SLURM_STEP_NUM_TASKS: srun has started 8 processes .*; let it start one torchrun on each machine "
    )
    with pytest.raises(UserError, match=said), ranks.joined():
        pass
    monkeypatch.setenv("WORLD_SIZE", "1")
    with ranks.joined():
        assert ranks.world() == 1


@pytest.mark.parametrize("job", [{"NTASKS": 8, "PROCID": 0}, {"NTASKS": 8, "PROCID": 0, "STEP_NUM_TASKS": 1}])
def test_one_process_of_a_job_for_several_is_a_run_of_its_own(monkeypatch, job):
    # a batch script's, and a shell's within salloc
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    with ranks.joined():
        assert ranks.world() == 1


def test_torchrun_under_srun(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")  # one on each machine
    assert together(ranks.rank) == [0, 1]


def test_a_launcher_that_says_too_little(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    said = r"^RANK: not set, but WORLD_SIZE is; torchrun sets both$"
    with pytest.raises(UserError, match=said), ranks.joined():
        pass
