import json
from dataclasses import dataclass, field

import pytest

from delvm.stages import Stage, record, run_stage, stage_key, write_atomic


@dataclass
class Section:
    steps: int = 3
    weights: dict[str, float] = field(default_factory=dict)


class Chain:
    """Two stages that count their runs; `second` reads `first`."""

    def __init__(self, run_dir):
        self.dir, self.said, self.ran = run_dir, [], []

    def work(self, name, value):
        def write(folder):
            assert folder.is_dir()
            self.ran.append(name)
            (folder / "result.txt").write_text(f"{name} {value}")
            return {"value": value}

        return write

    def run(self, first=1, second=1, **others):
        keys, self.said, self.ran = {}, [], []
        stages = [
            Stage("first", [Section(first)], [], self.work("first", first)),
            Stage("second", [Section(second), *others.values()], ["first"], self.work("second", second)),
        ]
        return [run_stage(stage, self.dir, keys, self.said.append) for stage in stages]


@pytest.fixture
def chain(tmp_path):
    return Chain(tmp_path / "run")


def _names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_stage_leaves_its_result_and_its_record(chain):
    assert chain.run() == [{"value": 1}, {"value": 1}]
    assert chain.ran == ["first", "second"]
    assert _names(chain.dir) == ["first", "second"]  # nothing half-finished beside them
    assert _names(chain.dir / "first") == ["result.txt", "stage.json"]
    assert (chain.dir / "second" / "result.txt").read_text() == "second 1"
    made = record(chain.dir / "first")
    assert set(made) == {"key", "inputs", "seconds", "metrics"}
    assert made["inputs"] == [{"steps": 1, "weights": {}}]  # the resolved section
    assert made["metrics"] == {"value": 1}
    assert made["seconds"] >= 0
    assert made["key"] == stage_key(Stage("first", [Section(1)], [], chain.work("first", 1)), {})


def test_the_work_takes_place_beside_the_result(chain):
    def work(folder):
        assert folder == chain.dir / ".first.partial"
        assert not (chain.dir / "first").exists()
        assert "metrics" not in record(folder)  # begun, not done
        return {}

    run_stage(Stage("first", [], [], work), chain.dir, {}, chain.said.append)
    assert chain.said == ["first: done in 0 s"]


def test_unchanged_stages_are_reused(chain):
    metrics = chain.run()
    before = (chain.dir / "first" / "stage.json").stat().st_mtime_ns
    assert chain.run() == metrics
    assert chain.ran == []
    assert chain.said == ["first: unchanged, reused", "second: unchanged, reused"]
    assert (chain.dir / "first" / "stage.json").stat().st_mtime_ns == before


def test_a_changed_section_makes_its_stage_anew(chain):
    chain.run()
    (chain.dir / "second" / "old.txt").write_text("of the old section")
    assert chain.run(second=2) == [{"value": 1}, {"value": 2}]
    assert chain.ran == ["second"]
    assert _names(chain.dir / "second") == ["result.txt", "stage.json"]
    assert (chain.dir / "second" / "result.txt").read_text() == "second 2"


def test_a_changed_stage_makes_those_anew_that_read_it(chain):
    chain.run()
    chain.run(first=2)
    assert chain.ran == ["first", "second"]


def test_going_back_is_a_change_too(chain):
    chain.run()
    chain.run(second=2)
    chain.run()
    assert chain.ran == ["second"]


@pytest.mark.parametrize(
    "extra", [{"seed": 1}, {"tasks": {"pose": {"share": 1.0}}}, {"section": Section(1, {"a": 2.0})}]
)
def test_every_input_counts(chain, extra):
    chain.run()
    chain.run(**extra)
    assert chain.ran == ["second"]
    chain.run(**extra)
    assert chain.ran == []


def test_keys():
    def key(name="a", inputs=(), needs=(), keys=None):
        return stage_key(Stage(name, inputs, needs, lambda folder: {}), keys or {})

    assert len(key()) == 16
    assert int(key(), 16) >= 0
    assert key() == key()
    assert key(inputs=[{"x": 1, "y": 2}]) == key(
        inputs=[{"y": 2, "x": 1}]
    )  # the order of a mapping says nothing
    distinct = [
        key(),
        key(name="b"),
        key(inputs=[1]),
        key(inputs=[1, 2]),
        key(inputs=[2, 1]),
        key(inputs=[[1], 2]),
        key(inputs=[Section()]),
        key(inputs=[None]),
        key(needs=["n"], keys={"n": "0"}),
        key(needs=["n"], keys={"n": "1"}),
    ]
    assert len(set(distinct)) == len(distinct)
    # stages that are not needed say nothing
    assert key(needs=["n"], keys={"n": "0", "m": "5"}) == key(needs=["n"], keys={"n": "0"})


def _failing(value, error):
    def work(folder):
        (folder / "half.txt").write_text("half")
        raise error

    return Stage("first", [Section(value)], [], work)


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), SystemExit(1)])
def test_a_failing_stage_leaves_no_result(chain, error):
    with pytest.raises(type(error)):
        run_stage(_failing(1, error), chain.dir, {}, chain.said.append)
    assert _names(chain.dir) == [".first.partial"]
    assert chain.said == []


def test_a_failing_stage_leaves_the_old_result_whole(chain):
    chain.run(first=1)
    with pytest.raises(RuntimeError):
        run_stage(_failing(2, RuntimeError()), chain.dir, {}, chain.said.append)
    assert (chain.dir / "first" / "result.txt").read_text() == "first 1"
    chain.run(first=1)  # and still good for its own section
    assert chain.ran == []


def test_a_half_finished_stage_goes_on_with_what_it_wrote(chain):
    with pytest.raises(RuntimeError):
        run_stage(_failing(1, RuntimeError()), chain.dir, {}, chain.said.append)

    def resume(folder):
        assert (folder / "half.txt").read_text() == "half"
        (folder / "half.txt").unlink()
        return {}

    run_stage(Stage("first", [Section(1)], [], resume), chain.dir, {}, chain.said.append)
    assert _names(chain.dir) == ["first"]


def test_a_stage_begun_for_other_settings_starts_afresh(chain):
    with pytest.raises(RuntimeError):
        run_stage(_failing(1, RuntimeError()), chain.dir, {}, chain.said.append)

    def work(folder):
        assert _names(folder) == ["stage.json"]
        return {}

    run_stage(Stage("first", [Section(2)], [], work), chain.dir, {}, chain.said.append)


def test_a_stage_killed_just_before_it_was_renamed_is_whole(chain):
    made = chain.run()
    (chain.dir / "second").rename(chain.dir / ".second.partial")
    assert chain.run() == made
    assert chain.ran == []
    assert _names(chain.dir) == ["first", "second"]


def test_the_seconds_of_a_stopped_stage_count(chain, monkeypatch):
    clock = iter([0.0, 5.0, 100.0, 102.5])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with pytest.raises(RuntimeError):
        run_stage(_failing(1, RuntimeError()), chain.dir, {}, chain.said.append)
    run_stage(Stage("first", [Section(1)], [], lambda folder: {}), chain.dir, {}, chain.said.append)
    assert record(chain.dir / "first")["seconds"] == 7.5


@pytest.mark.parametrize("text", ["", "{", '{"key": 1}'])
def test_a_damaged_record_is_no_result(chain, text):
    chain.run()
    (chain.dir / "first" / "stage.json").write_text(text)
    chain.run()
    assert chain.ran == ["first"]  # same key again, so that the second is reused


def test_metrics_are_the_same_whether_made_or_reused(chain):
    stage = Stage("first", [], [], lambda folder: {"a": {"loss": 0.1 + 0.2, "n": 3}})
    made = run_stage(stage, chain.dir, {}, chain.said.append)
    assert run_stage(stage, chain.dir, {}, chain.said.append) == made == {"a": {"loss": 0.1 + 0.2, "n": 3}}


def test_record_of_no_stage(tmp_path):
    assert record(tmp_path) == {}
    assert record(tmp_path / "nowhere") == {}


def test_write_atomic_writes_and_replaces(tmp_path):
    path = tmp_path / "metrics.json"
    for text in ("one", "two"):
        write_atomic(path, text)
        assert path.read_text() == text
    assert _names(tmp_path) == ["metrics.json"]


def test_write_atomic_leaves_nothing_behind_on_failure(tmp_path):
    path = tmp_path / "metrics.json"
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "half of it \ud800")  # a lone surrogate cannot be encoded
    assert _names(tmp_path) == []
    write_atomic(path, "whole")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "\ud800")
    assert path.read_text() == "whole"
    assert _names(tmp_path) == ["metrics.json"]


def test_write_atomic_where_nothing_can_be_put(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        write_atomic(tmp_path / "taken", "text")
    assert _names(tmp_path) == ["taken"]
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "nowhere" / "file", "text")


def test_the_record_is_plain_json(chain):
    chain.run()
    assert json.loads((chain.dir / "first" / "stage.json").read_text()) == record(chain.dir / "first")
