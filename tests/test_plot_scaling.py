import json
import re
import xml.etree.ElementTree as ElementTree

import pytest
import yaml
from transformers import LlamaConfig

from delvm import llama
from tools.plot_scaling import Point, draw, main, points, series


def _run(folder, *, width=16, samples=4, views=3, loss=2.0, seed=0):
    """What of a run folder counts here; the width stands in the recipe as its size."""
    (folder / "teacher").mkdir(parents=True)
    recipe = {"name": "x", "seed": seed, "tasks": {"pose": {"samples": samples}, "edges": {}},
              "balance": {"max_views": views}, "teacher": {"size": f"w{width}", "folder": ""}}  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    metrics = {
        "balance": {task: {"samples": samples, "views": views} for task in ("pose", "edges")},
        "evaluate": {
            "teacher": {t: {"loss": loss + i, "perplexity": 9.0} for i, t in enumerate(("pose", "edges"))}
        },
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    config = LlamaConfig(
        vocab_size=18, hidden_size=width, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    llama.save(llama.LlamaForCausalLM(config), folder / "teacher")
    return folder


def _point(task, parameters, samples, views, *losses):
    values = list(losses or [1.0])
    return Point(task, parameters, samples, views, {"loss": values, "perplexity": values})


def test_seeds_are_one_point_and_sizes_are_read(tmp_path):
    folders = [
        _run(tmp_path / "a"), _run(tmp_path / "b", loss=3.0, seed=1), _run(tmp_path / "c", width=32),
    ]  # fmt: skip
    found = points(folders, "teacher")
    small, large = (llama.count_parameters(llama.load_config(folders[i] / "teacher")) for i in (0, 2))
    assert small < large
    assert [(p.task, p.parameters, p.samples, p.views, p.scores["loss"]) for p in found] == [
        ("pose", small, 4, 3, [2.0, 3.0]), ("edges", small, 4, 3, [3.0, 4.0]),
        ("pose", large, 4, 3, [2.0]), ("edges", large, 4, 3, [3.0]),
    ]  # fmt: skip


def test_a_line_splits_only_where_points_would_share_a_place():
    together = [_point("a", 1, 100, 8), _point("a", 1, 50, 17)]  # fewer samples, more views: still one line
    assert series(together, "samples") == {("a", ""): together[::-1]}
    assert series([together[0]] * 2, "samples") == {("a", ""): [together[0]] * 2}  # nothing tells them apart
    crossed = [_point("a", size, samples, 1) for size in (1, 2) for samples in (10, 20)]
    assert series(crossed, "parameters") == {
        ("a", "samples 10"): [crossed[0], crossed[2]], ("a", "samples 20"): [crossed[1], crossed[3]],
    }  # fmt: skip


def test_panels_are_those_on_which_runs_differ():
    found = [
        _point("a", 10, 5, 1, 2.0, 4.0),
        _point("a", 1000, 5, 1, 1.0),
        _point("b", 10, 7, 1),
        _point("b", 1000, 7, 1),
    ]
    root = ElementTree.fromstring(draw(found))
    space = "{http://www.w3.org/2000/svg}"
    panels = root.findall(f"{space}svg")
    assert [panel.get("aria-label") for panel in panels] == [
        "loss (nats) by parameters", "perplexity by parameters",
    ]  # fmt: skip
    lines = [line for line in panels[0].iter(f"{space}polyline") if line.get("data-line")]
    assert [line.get("data-line") for line in lines] == ["a", "b"]
    first, last = (tuple(map(float, point.split(","))) for point in lines[0].get("points").split())
    assert first[1] < last[1]  # 3.0 stands above 1.0
    (bar,) = [line for line in panels[0].iter(f"{space}line") if line.get("class").startswith("range")]
    assert float(bar.get("x1")) == first[0]
    assert float(bar.get("y1")) > first[1] > float(bar.get("y2"))
    names = [text.text for text in root.findall(f"{space}text")]
    assert names == ["a", "b"]  # the key


def test_a_file_and_a_table(tmp_path, capsys):
    folders = [_run(tmp_path / str(views), views=views, loss=views) for views in (1, 2, 4)]
    out = tmp_path / "scaling.svg"
    assert main([*map(str, folders), str(out)]) == 0
    svg = out.read_text()
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert not re.search(r"href|url\(|@import", svg)
    assert "4.000" in capsys.readouterr().out


def test_what_cannot_be_drawn_ends_in_one_line(tmp_path, capsys):
    folder, out = _run(tmp_path / "a"), str(tmp_path / "out.svg")
    assert main([str(folder), out, "--model", "student"]) == 2
    assert capsys.readouterr().err == f"error: {folder}: has no scores of 'student'; models: teacher\n"
    assert main([str(folder), out]) == 2
    assert "the runs differ in none of parameters, real samples, views of a sample" in capsys.readouterr().err
    assert main([str(tmp_path / "no"), out]) == 2
    with pytest.raises(SystemExit):
        main([str(folder)])
