"""Several processes that are one run, for tests: forked, so that they need no imports of their own.

None outlives its test: at its end Python waits for every child, for ever if one hangs.
"""

import multiprocessing
import os
import signal
import socket
import sys

import torch

from delvm import ranks

# Autograd's engine counts devices at its first backward pass; after a compiled model it would find one beside
# the CPU, start threads for it, and refuse to work in a process that is forked then.
torch.ones(1, requires_grad=True).sum().backward()

PATIENCE = 900
"""Seconds until a process is said to hang: many, since others may keep the machine busy."""


def together(work, *arguments, num=2):
    """What `work(*arguments)` returns or raises in each of `num` joined processes."""

    def joined():
        with ranks.joined():
            return work(*arguments)

    return launched(joined, num=num)


def launched(work, *, num=2):
    """What `work()` returns or raises in each of `num` processes, started as a launcher does.

    None from one that has just left.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    for rank in range(num):
        receiving, sending = context.Pipe(duplex=False)
        process = context.Process(target=_one, args=(rank, num, port, sending, work))
        process.start()
        sending.close()
        pipes.append(receiving)
        processes.append(process)
    try:
        return [_result(receiving) for receiving in pipes]
    finally:
        end(*processes)


def end(*processes, after=10):
    """Wait so many seconds for each to leave, and kill those that have not."""
    for process in processes:
        process.join(after)
        process.kill()
        process.join()


def _result(receiving):
    assert receiving.poll(PATIENCE), "it hangs"
    try:
        return receiving.recv()
    except EOFError:
        return None


def _one(rank, num, port, sending, work):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num, "LOCAL_WORLD_SIZE": num,
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
    os.environ.update({name: str(value) for name, value in place.items()})
    try:
        result = work()
    except Exception as error:
        result = error
    sending.send(result)
    sending.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # nothing of the parent's is to be taken down here
