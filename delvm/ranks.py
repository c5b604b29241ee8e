"""Processes that a launcher started -> one run: who goes first, who waits, how all of them end.

`torchrun --nproc-per-node N -m delvm.fit RECIPE`, or any launcher that sets the same environment variables
(WORLD_SIZE, RANK, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT), starts N processes of one program.
What one of them alone has to do goes through `on_first`; what all do together ends at a `barrier`. They wait
by asking the store that they share, not in a collective: for hours if need be, never for one that has failed.
Where there is one process only, nothing here does anything.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, distributed

from delvm.errors import UserError

Result = TypeVar("Result")

PATIENCE = timedelta(hours=1)  # of a collective; within training no process is this far behind another
POLL, GRACE = 0.1, 5.0  # seconds
ENDED = "ended"


class Ended(Exception):
    """Another process has ended the run and says why."""


@dataclass
class _Processes:
    """This process among the others."""

    store: distributed.Store
    rank: int
    world: int
    meetings: int = 0
    """How often they have met in `on_first` or `barrier`: every process counts the same."""
    left: threading.Event = field(default_factory=threading.Event)

    def meeting(self) -> str:
        """A key of the store for the next meeting."""
        self.meetings += 1
        return f"meeting {self.meetings}"

    def wait(self, key: str) -> bytes:
        """What another process has set."""
        while not self.store.check([key]):
            if self.store.check([ENDED]):
                raise Ended
            time.sleep(POLL)
        return self.store.get(key)

    def ends_first(self) -> bool:
        """Whether no other process has ended the run before this one."""
        if self.rank:
            time.sleep(2 * POLL)  # where all fail alike, the first process speaks
        try:
            return self.store.add(ENDED, 1) == 1
        except RuntimeError:  # the process that kept the store is gone
            return False

    def watch(self) -> None:
        """Leave when another process has ended the run, even out of a collective that waits for it."""
        while not self.left.wait(10 * POLL):
            try:
                ended = self.store.check([ENDED])
            except RuntimeError:
                ended = True
            if ended and not self.left.wait(GRACE):  # most come to their own end, at the same step
                os._exit(1)


_processes: _Processes | None = None


def rank() -> int:
    """This process' number, 0 the first."""
    return _processes.rank if _processes else 0


def world() -> int:
    """How many processes there are."""
    return _processes.world if _processes else 1


def local_world() -> int:
    """How many of them are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world())) if _processes else 1


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return rank() == 0


@contextmanager
def joined() -> Iterator[None]:
    """Be one process of those that were launched together; they end together.

    Raises:
        UserError: a variable that the launcher should have set is missing; srun has started several processes
            that do not know of each other.
        Ended: in place of any exception, where another process has ended the run already: of all errors only
            the first comes through. A process that hangs waiting for one that has failed is ended.
    """
    global _processes
    # SLURM_STEP_NUM_TASKS counts what this very srun has started. SLURM_NTASKS is that of the job, which a
    # batch script or a shell of salloc, one process both, have as well.
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "WORLD_SIZE" not in os.environ and int(tasks) > 1:
        raise UserError(
            f"SLURM_STEP_NUM_TASKS: srun has started {tasks} processes that do not know of each other; let it"
            " start one torchrun on each machine (or set WORLD_SIZE=1 if each is a run of its own)"
        )
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise UserError(f"{name}: not set, but WORLD_SIZE is; torchrun sets both")
    gpu = torch.cuda.is_available()
    if gpu:  # more processes than GPUs are refused by TrainerConfig, or all train on the CPU
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    store, number, total = next(distributed.rendezvous("env://", timeout=PATIENCE))
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if gpu else "gloo",
        store=distributed.PrefixStore("group", store), rank=number, world_size=total, timeout=PATIENCE,
    )  # fmt: skip
    here = _processes = _Processes(distributed.PrefixStore("delvm", store), number, total)
    threading.Thread(target=here.watch, daemon=True).start()
    try:
        yield
        any_rank(False)  # the store goes with the process that keeps it: nobody leaves before all are done
    except BaseException as error:
        here.left.set()
        if not here.ends_first():
            raise Ended from error
        raise  # the group is left as it is: to take it down could wait for the others
    here.left.set()
    distributed.destroy_process_group()
    _processes = None


def on_first(work: Callable[[], Result]) -> Result:
    """The result of work that the first process does while the others wait. It must be JSON.

    Raises:
        Ended: on the others, where the work failed.
    """
    if _processes is None:
        return work()
    key = _processes.meeting()
    if _processes.rank == 0:
        result = work()
        _processes.store.set(key, json.dumps(result))
        return result
    return json.loads(_processes.wait(key))


def barrier() -> None:
    """Wait for all processes, however long it takes them."""
    if _processes is None:
        return
    key = _processes.meeting()
    if _processes.store.add(f"{key} arrived", 1) == _processes.world:
        _processes.store.set(key, "")
    _processes.wait(key)


def any_rank(flag: bool) -> bool:
    """Whether the flag is set in any process; they must ask at the same time."""
    if _processes is None:
        return flag
    seen = torch.tensor(int(flag))
    distributed.all_reduce(seen, distributed.ReduceOp.MAX)
    return bool(seen)


def mean(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scalars -> their means over the processes, which must have the same ones in the same order."""
    if _processes is None or not values:
        return values
    stacked = torch.stack([value.detach().double().cpu() for value in values.values()])
    distributed.all_reduce(stacked)
    stacked /= _processes.world
    return {key: part.to(value) for (key, value), part in zip(values.items(), stacked, strict=True)}
