"""Run folders -> reports, and which of them differ in their seed alone."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from delvm import llama
from delvm.errors import UserError
from delvm.evaluate import scores
from delvm.evaluate.prompting import load_pictures
from delvm.evaluate.report import Group, Report

ROLES = ("teacher", "scratch", "student")
OWN = ("name", "run_dir", "seed")
"""What runs of the same settings may differ in."""
SHOWN = ("balance", "tokenizer", "evaluate", "data")
"""Sections of metrics.json that have a place of their own on the page, or none."""
NAMED = 3  # settings that name a group, at most
ABSENT = "–"
"""What stands for a setting that a recipe does not have."""


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A run's recipe and metrics, as they stand in its files.

    Raises:
        UserError: no folder of a run that has ended, or a file that cannot be read.
    """
    found = {}
    for name, reader in (("recipe.yaml", yaml.safe_load), ("metrics.json", json.loads)):
        file = folder / name
        if not file.is_file():
            raise UserError(f"{folder}: has no {name}; give the folder of a run that has ended")
        try:
            found[name] = reader(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, ValueError, OSError) as error:
            raise UserError(f"{file}: not readable: {' '.join(str(error).split())}") from error
        if not isinstance(found[name], dict):
            raise UserError(f"{file}: holds no mapping")
    return found["recipe.yaml"], found["metrics.json"]


def report(folder: Path) -> Report:
    """What the page shows of a run. Raises as `read`."""
    recipe, metrics = read(folder)
    curves = {}
    facts = [("seed", str(recipe.get("seed", 0)))]
    if "image_size" in recipe.get("data", {}):
        facts.append(("image size", f"{recipe['data']['image_size']} px"))
    for role in ROLES:
        section = recipe.get(role)
        if not section:
            continue
        given = section.get("folder")
        parameters = num_parameters(folder, recipe, role)
        size = "" if parameters is None else f": {parameters / 1e6:.2f}M parameters"
        if given:
            facts.append((role, f"{given}{size}"))
            continue
        section = recipe.get("student") or section if role == "scratch" else section
        facts.append((role, f"{section.get('size')}{size}, {section.get('steps')} steps"))
        if (folder / role / "curve.json").is_file():
            points = json.loads((folder / role / "curve.json").read_text())
            curves[role] = [(point["step"], point["ce"]) for point in points]
    drawn = recipe.get("prompting") or {}
    if {"temperature", "top_p"} <= set(drawn):
        how = f"temperature {drawn['temperature']:g}, top-p {drawn['top_p']:g}"
        facts.append(("annotations", how if drawn["temperature"] else "greedy"))
    seconds = metrics.get("seconds", {})
    facts.append(("time", f"{sum(seconds.values()):.0f} s"))
    pictures = load_pictures(folder / "evaluate" / "pictures")
    by_picture = scores.load(folder / "evaluate" / "by_picture.json")
    return Report(
        title=_title(recipe, folder),
        facts=facts,
        balance=metrics.get("balance", {}),
        tokenizer=metrics.get("tokenizer", {}),
        curves=curves,
        scores=metrics.get("evaluate", {}),
        pictures={task: pictures[task] for task in recipe.get("tasks", {}) if task in pictures},
        scored=by_picture,
        tables={
            {"seconds": "seconds by stage"}.get(key, key): value
            for key, value in metrics.items()
            if key not in SHOWN and isinstance(value, Mapping)
        },
        recipe=(folder / "recipe.yaml").read_text(encoding="utf-8"),
    )


def num_parameters(folder: Path, recipe: Mapping[str, Any], role: str) -> int | None:
    """Of a run's model, its own or the one it was given; None where its folder is gone."""
    place = Path((recipe.get(role) or {}).get("folder") or folder / role).expanduser()
    try:
        return llama.count_parameters(llama.load_config(place))
    except UserError:
        return None


def grouped(folders: Sequence[Path]) -> list[list[Path]]:
    """Runs of the same settings together, in the order of the folders. Raises as `read`."""
    groups: list[tuple[Any, list[Path]]] = []
    for folder in dict.fromkeys(folder.absolute() for folder in folders):
        settings = _settings(read(folder)[0])
        same = next((members for known, members in groups if known == settings), None)
        if same is None:
            groups.append((settings, [folder]))
        else:
            same.append(folder)
    return [members for _, members in groups]


def _settings(recipe: Mapping[str, Any]) -> Any:
    """A recipe without what is each run's own; `seed10` in a path of seed 10 is like that of any other."""
    own = rf"(?<=seed){recipe.get('seed', 0)}(?!\d)"

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        return re.sub(own, "*", value) if isinstance(value, str) else value

    return {key: plain(value) for key, value in recipe.items() if key not in OWN}


def groups(folders: Sequence[Path]) -> list[Group]:
    """Runs as the page shows them side by side. Raises UserError as `read`.

    A group is named by its recipe, among groups of one recipe by the few settings in which they differ, and
    by its first folder where these are many.
    """
    members = grouped(folders)
    recipes = [read(runs[0])[0] for runs in members]
    titles = [_title(recipe, runs[0]) for recipe, runs in zip(recipes, members, strict=True)]
    settings = [_settings(recipe) for recipe in recipes]
    names = []
    for place, title in enumerate(titles):
        alike = [other for other, name in enumerate(titles) if name == title]
        own = alike.index(place)
        differ = differences([settings[other] for other in alike])
        # a setting that one recipe lacks is most often one that its version of the project did not have
        both = {key: values for key, values in differ.items() if ABSENT not in values}
        few = next((found for found in (differ, both) if 0 < len(found) <= NAMED), None)
        name = (
            ", ".join(f"{key}={values[own]}" for key, values in few.items())
            if few
            else members[place][0].name
        )
        names.append(title if len(alike) == 1 else name)
    found = differences(settings)
    return [
        Group(
            name if names.count(name) == 1 else f"{name} ({runs[0]})",
            [report(folder) for folder in runs],
            {key: values[place] for key, values in found.items()},
        )
        for place, (name, runs) in enumerate(zip(names, members, strict=True))
    ]


def _title(recipe: Mapping[str, Any], folder: Path) -> str:
    return recipe.get("name") or folder.name


def differences(settings: Sequence[Any], key: str = "") -> dict[str, list[str]]:
    """Dotted keys in which nested settings differ -> the value in each of them, in words."""
    if all(each == settings[0] for each in settings):
        return {}
    if not all(isinstance(each, Mapping) and each for each in settings):
        return {key: [_say(each) for each in settings]}
    found: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for each in settings for name in each):
        inner = f"{key}.{name}" if key else str(name)
        found |= differences([each.get(name, ABSENT) for each in settings], inner)
    return found


def _say(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{…}" if value else "{}"
    return str(value) if isinstance(value, str) and value else json.dumps(value)
