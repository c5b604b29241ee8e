"""A stage's work -> a whole folder or none.

A stage writes into `.NAME.partial` beside its place and is renamed when whole. Its key is a hash of its
section and of the keys of the stages it reads: a folder with the same key is reused, any other is made anew.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

from delvm import ranks

RECORD = "stage.json"


@dataclass(frozen=True)
class Stage:
    """One arrow of the chain.

    `inputs` is everything but other stages' results that the work depends on: dataclasses or JSON values.
    `work` writes into the folder it is given, and returns the stage's metrics, JSON-ready. Of several
    processes the first does it while the others wait; if it is `together`, all do, and the metrics are those
    of the first.
    """

    name: str
    inputs: Sequence[Any]
    needs: Sequence[str]
    work: Callable[[Path], dict]
    together: bool = False


def stage_key(stage: Stage, keys: dict[str, str]) -> str:
    """16 hex digits that change with anything the stage's result depends on."""
    text = json.dumps(
        [stage.name, _plain(stage.inputs), [keys[need] for need in stage.needs]], sort_keys=True
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(inputs: Sequence[Any]) -> list:
    return [asdict(item) if is_dataclass(item) and not isinstance(item, type) else item for item in inputs]


def record(folder: Path) -> dict:
    """What a whole folder says of its making (key, inputs, seconds, metrics); empty where there is none."""
    try:
        return json.loads((folder / RECORD).read_text())
    except (OSError, json.JSONDecodeError):
        return {}


def run_stage(stage: Stage, run_dir: Path, keys: dict[str, str], say: Callable[[str], None] = print) -> dict:
    """Do a stage, or find it done; adds its key to `keys` and returns its metrics."""
    key = stage_key(stage, keys)
    keys[stage.name] = key
    folder, partial = run_dir / stage.name, run_dir / f".{stage.name}.partial"
    done = ranks.on_first(lambda: record(folder))
    if done.get("key") == key:
        say(f"{stage.name}: unchanged, reused")
        return done["metrics"]
    done = ranks.on_first(lambda: _begin(stage, key, partial))
    if "metrics" not in done:  # else it was killed just before its renaming
        start = time.monotonic()
        try:
            metrics = stage.work(partial) if stage.together else ranks.on_first(lambda: stage.work(partial))
        finally:
            done["seconds"] = round(done["seconds"] + time.monotonic() - start, 2)
            if ranks.is_first():
                with contextlib.suppress(OSError):  # what went wrong matters more
                    write_atomic(partial / RECORD, json.dumps(done, indent=2))
        done["metrics"] = metrics
    if stage.together:
        ranks.barrier()  # all have written what they had to write
    done = ranks.on_first(lambda: _end(done, partial, folder))
    say(f"{stage.name}: done in {done['seconds']:.0f} s")
    return done["metrics"]


def _begin(stage: Stage, key: str, partial: Path) -> dict:
    """A folder to work in; returns its record."""
    if partial.is_dir() and record(partial).get("key") != key:
        shutil.rmtree(partial)  # begun for other settings
    partial.mkdir(parents=True, exist_ok=True)
    done = record(partial)
    if "metrics" not in done:
        done = {"key": key, "inputs": _plain(stage.inputs), "seconds": done.get("seconds", 0.0)}
        write_atomic(partial / RECORD, json.dumps(done, indent=2))
    return done


def _end(done: dict, partial: Path, folder: Path) -> dict:
    """Put the folder in its place, with its record; returns that."""
    write_atomic(partial / RECORD, json.dumps(done, indent=2))
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old")  # never half a folder under the stage's name
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
        os.replace(partial, folder)
        shutil.rmtree(old)
    else:
        os.replace(partial, folder)
    return done


def write_atomic(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
