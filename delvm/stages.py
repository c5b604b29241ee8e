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

RECORD = "stage.json"


@dataclass(frozen=True)
class Stage:
    """One arrow of the chain.

    `inputs` is everything but other stages' results that the work depends on: dataclasses or JSON values.
    `work` writes into the folder it is given, and returns the stage's metrics, JSON-ready.
    """

    name: str
    inputs: Sequence[Any]
    needs: Sequence[str]
    work: Callable[[Path], dict]


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
    folder = run_dir / stage.name
    done = record(folder)
    if done.get("key") == key:
        say(f"{stage.name}: unchanged, reused")
        return done["metrics"]
    partial = run_dir / f".{stage.name}.partial"
    if partial.is_dir() and record(partial).get("key") != key:
        shutil.rmtree(partial)  # begun for other settings
    partial.mkdir(parents=True, exist_ok=True)
    done = record(partial)
    if "metrics" not in done:  # else it was killed just before its renaming
        begun = {"key": key, "inputs": _plain(stage.inputs), "seconds": done.get("seconds", 0.0)}
        write_atomic(partial / RECORD, json.dumps(begun, indent=2))
        start = time.monotonic()
        try:
            metrics = stage.work(partial)
        finally:
            begun["seconds"] = round(begun["seconds"] + time.monotonic() - start, 2)
            with contextlib.suppress(OSError):  # what went wrong matters more
                write_atomic(partial / RECORD, json.dumps(begun, indent=2))
        done = {**begun, "metrics": metrics}
        write_atomic(partial / RECORD, json.dumps(done, indent=2))
    if folder.exists():
        old = run_dir / f".{stage.name}.old"  # never half a folder under the stage's name
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
        os.replace(partial, folder)
        shutil.rmtree(old)
    else:
        os.replace(partial, folder)
    say(f"{stage.name}: done in {done['seconds']:.0f} s")
    return done["metrics"]


def write_atomic(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
