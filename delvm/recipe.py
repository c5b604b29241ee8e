"""A recipe's YAML and `key=value` overrides -> Recipe: the typed sections, composed and checked."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from delvm.distill.cache import CacheConfig
from delvm.distill.module import DistillConfig
from delvm.distill.teacher import serves
from delvm.errors import UserError
from delvm.evaluate.probe import ProbeConfig
from delvm.evaluate.prompting import PromptingConfig
from delvm.evaluate.scores import SCORES
from delvm.finetune.training import FinetuneConfig
from delvm.images.tasks import TOKEN_SOURCES, DataConfig, TaskConfig
from delvm.pretrain import OptimizerConfig, PretrainConfig
from delvm.tokenizer.training import TokenizerConfig
from delvm.tokens.balance import BalanceConfig
from delvm.tokens.encoder import TokensConfig
from delvm.tokens.sentences import SentencesConfig
from delvm.training import TrainerConfig

SECTIONS: dict[str, type] = {
    "data": DataConfig, "balance": BalanceConfig, "tokenizer": TokenizerConfig, "tokens": TokensConfig,
    "sentences": SentencesConfig,
    "teacher": PretrainConfig, "scratch": OptimizerConfig, "cache": CacheConfig, "student": DistillConfig,
    "prompting": PromptingConfig, "probe": ProbeConfig, "finetune": FinetuneConfig, "trainer": TrainerConfig,
}  # fmt: skip
BY_TASK = (
    "balance.shares", "sentences.kinds", "sentences.shots",
    "student.task_ce_weights", "student.task_kd_weights", "student.task_temperatures", "prompting.scores",
)  # fmt: skip
"""Settings that name tasks."""
MAX_SEED = 2**32 - 2  # the student takes the next one, Lightning none from 2**32


@dataclass
class Recipe:
    """A whole run. Sections are stages: `teacher`, `scratch` and `student` run where the recipe has them."""

    name: str = ""
    """Defaults to the file's name."""
    run_dir: str = ""
    """Where everything goes; defaults to `runs/<name>`."""
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    tasks: dict[str, TaskConfig] = field(default_factory=dict)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    tokens: TokensConfig = field(default_factory=TokensConfig)
    """How pictures are encoded."""
    sentences: SentencesConfig = field(default_factory=SentencesConfig)
    teacher: PretrainConfig | None = None
    """Learns from labels alone."""
    scratch: OptimizerConfig | None = None
    """The control: the student's size, steps, batches and seed, no teacher, on a schedule of its own."""
    cache: CacheConfig | None = None
    """What the teacher says of the student's sentences, written once; else the teacher runs in every step."""
    student: DistillConfig | None = None
    """Learns from labels and teacher."""
    prompting: PromptingConfig = field(default_factory=PromptingConfig)
    probe: ProbeConfig | None = None
    """How well classes can be read from the models' features; alone, of given models, it needs no tasks."""
    finetune: FinetuneConfig | None = None
    """The models as classifiers, all their weights trained; alone, of given models, it needs no tasks."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    def __post_init__(self) -> None:
        if not self.tasks and not self.probe and not self.finetune:
            raise ValueError("tasks: none; a recipe needs at least one task")
        for task in self.tasks:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", task):
                raise ValueError(f"tasks.{task}: a task's name may hold letters, digits, '_' and '-'")
        for key in BY_TASK:
            section, name = key.split(".")
            for task in getattr(getattr(self, section), name, ()):
                if task not in self.tasks:
                    raise ValueError(f"{key}.{task}: no such task; tasks: {', '.join(self.tasks)}")
        for task, kind in self.prompting.scores.items():
            if kind not in SCORES:
                raise ValueError(
                    f"prompting.scores.{task}: '{kind}' is unknown; choices: {', '.join(SCORES)}"
                )
        if self.seed < 0:
            raise ValueError(f"seed: {self.seed} must be at least 0")
        if self.seed > MAX_SEED:
            raise ValueError(f"seed: {self.seed} must be at most {MAX_SEED}")
        if self.probe:
            self._check_models("probe", self.probe.models)
        if self.finetune:
            self._check_finetune(self.finetune)
        if self.student and not self.teacher:
            raise ValueError("student: needs a teacher section")
        if self.scratch and not self.student:
            raise ValueError("scratch: needs a student section, whose size, steps and batches it takes")
        if self.cache and not self.student:
            raise ValueError("cache: needs a student section, whose sentences it is written for")
        if self.cache and self.student:
            try:
                serves(self.cache.kind, self.student.divergence)
            except UserError as error:
                raise ValueError(f"student.{error}") from error
            if not self.student.learns_from_teacher:
                raise ValueError("cache: student.kd_weight is 0, nobody would read what the teacher says")
            if self.student.teacher_sharded:
                raise ValueError("student.teacher_sharded: a student that reads a cache has no live teacher")
            if self.student.on_policy.share:
                raise ValueError("student.on_policy: the student's own pictures need a teacher, no cache")
            if set(self.student.task_temperatures.values()) - {self.student.temperature}:
                raise ValueError("student.task_temperatures: a cache is written at student.temperature alone")
        if self.cache and self.balance.online:
            raise ValueError("cache: balance.online draws other sentences each time; choose one of them")
        for role in ("student", "scratch"):
            if getattr(getattr(self, role), "folder", ""):
                raise ValueError(f"{role}.folder: only the teacher's can be given")
        for task, config in self.tasks.items():
            if config.source in TOKEN_SOURCES and not self.tokenizer.folder:
                raise ValueError(
                    f"tasks.{task}.source: '{config.source}' are tokens; give their tokenizer as"
                    " tokenizer.folder"
                )
        if not self.tokenizer.folder and self.data.image_size % self.tokenizer.factor:
            raise ValueError(
                f"data.image_size: {self.data.image_size} is not a multiple of the tokenizer's downsampling"
                f" ({self.tokenizer.factor})"
            )

    def _check_models(self, section: str, models: Mapping[str, str], *, read_codes: bool = True) -> list[str]:
        """Refuse a section that has no models, or no tokenizer for them; returns the run's own models."""
        roles = [role for role in ("teacher", "scratch", "student") if getattr(self, role)]
        for role in roles:
            if not self.tasks:
                raise ValueError(f"tasks: none; {role} needs at least one task, {section}.models needs none")
            if role in models:
                raise ValueError(f"{section}.models.{role}: the run has its own; choose another name")
        if not roles and not models:
            raise ValueError(f"{section}.models: none, and the recipe trains none; add NAME: FOLDER")
        if not self.tasks and not self.tokenizer.folder and read_codes:
            raise ValueError("tokenizer.folder: missing, there are no tasks to train a tokenizer on")
        return roles

    def _check_finetune(self, finetune: FinetuneConfig) -> None:
        read_codes = finetune.input == "tokens"
        roles = self._check_models("finetune", finetune.models, read_codes=read_codes)
        for role in finetune.roles:
            if role not in roles:
                choices = ", ".join(roles) or "none, the recipe trains no model"
                raise ValueError(f"finetune.roles: '{role}' is no model of the run; choices: {choices}")


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `key=value` overrides; mappings merge, everything else replaces.

    `tasks.NAME=null` leaves a task out, with what the recipe says of it elsewhere.

    Raises:
        UserError: one line with the file, the key, the value and what would be right.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such recipe")
    try:
        given = OmegaConf.load(path)
    except (YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not readable as YAML: {_one_line(error)}") from error
    if not isinstance(given, DictConfig):
        raise UserError(f"{path}: a recipe is a mapping of sections")
    for override in overrides:
        if "=" not in override:
            raise UserError(f"'{override}': an override is key=value, such as teacher.steps=100")
    try:
        flags = OmegaConf.from_dotlist(list(overrides))
    except (OmegaConfBaseException, YAMLError) as error:
        raise UserError(f"overrides: {_one_line(error)}") from error
    given, flags = _leave_out(given, flags)
    config = OmegaConf.structured(Recipe)
    for place, layer in ((str(path), given), ("override", flags)):
        config = _merge(config, layer, place)
    # of the layers: where a key has a default, the merged config has forgotten the `???`
    for place, layer in (("override", flags), (str(path), OmegaConf.merge(given, flags))):
        for key in _missing(OmegaConf.to_container(layer)):
            raise UserError(f"{place}: {key}: missing, give a value")
    recipe = build(config, str(path))
    recipe.name = recipe.name or path.stem
    recipe.run_dir = str(Path(recipe.run_dir or f"runs/{recipe.name}").expanduser())
    for section in (recipe.tokenizer, recipe.teacher, recipe.cache):
        if section and section.folder:
            section.folder = str(Path(section.folder).expanduser())
    for reader in (recipe.probe, recipe.finetune):
        if reader:
            reader.models = {name: str(Path(folder).expanduser()) for name, folder in reader.models.items()}
    for key in ("choices", "lvm_jsonl"):
        if file := getattr(recipe.prompting, key):
            setattr(recipe.prompting, key, str(Path(file).expanduser()))
    if recipe.probe and recipe.probe.folder:
        recipe.probe.folder = str(Path(recipe.probe.folder).expanduser())
    if recipe.student and recipe.student.start_folder:
        recipe.student.start_folder = str(Path(recipe.student.start_folder).expanduser())
    return recipe


def build(config: DictConfig, place: str) -> Recipe:
    """A checked Recipe from a merged config; errors name the section."""
    parts: dict[str, Any] = {}
    for entry in fields(Recipe):
        if entry.name == "tasks":
            parts["tasks"] = {
                str(task): _section(config.tasks, task, f"tasks.{task}", place) for task in config.tasks
            }
        else:
            parts[entry.name] = _section(config, entry.name, entry.name, place)
    try:
        return Recipe(**parts)
    except ValueError as error:
        raise UserError(f"{place}: {error}") from error


def check_run_dir(recipe: Recipe) -> None:
    """Refuse a run folder that holds something else.

    Raises:
        UserError: a file, a folder of another recipe, or a folder that is not a run.
    """
    folder = Path(recipe.run_dir)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"run_dir: '{folder}' is a file")
    saved = folder / "recipe.yaml"
    if not saved.is_file():
        # a first stage that was killed may be there
        if any(path.name != ".data.partial" for path in folder.iterdir()):
            raise UserError(f"run_dir: '{folder}' is not empty and holds no run; choose another run_dir")
        return
    try:
        name = OmegaConf.load(saved).get("name")
    except (YAMLError, UnicodeDecodeError, OSError, AttributeError) as error:
        raise UserError(f"{saved}: not readable as YAML: {_one_line(error)}") from error
    if name != recipe.name:
        raise UserError(
            f"run_dir: '{folder}' belongs to recipe '{name}', this one is '{recipe.name}';"
            " choose another run_dir"
        )


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe, loadable again."""
    return OmegaConf.to_yaml(OmegaConf.structured(recipe))


def _section(config: DictConfig, key: str, name: str, place: str) -> Any:
    try:
        value = config[key]
        return OmegaConf.to_object(value) if isinstance(value, DictConfig) else value
    except OmegaConfBaseException as error:
        raise UserError(f"{place}: {error.full_key or name}: {_one_line(error)}") from error
    except ValueError as error:  # of a section's own checks: it begins with the key
        raise UserError(f"{place}: {name}.{error}") from error


def _leave_out(given: DictConfig, flags: DictConfig) -> tuple[DictConfig, DictConfig]:
    """File and overrides without the tasks that are null, the file also without its other words on these."""
    layers: list[Any] = [OmegaConf.to_container(layer) for layer in (given, flags)]
    listed, asked = (_mapping(layer, "tasks") for layer in layers)
    for task in asked:
        if asked[task] is None and task not in listed:
            choices = ", ".join(map(str, listed)) or "none"
            raise UserError(f"override: tasks.{task}: no such task to leave out; tasks: {choices}")
    for task, settings in {**listed, **asked}.items():
        if settings is None:
            for key in ("tasks", *BY_TASK):
                _mapping(layers[0], key).pop(task, None)
            asked.pop(task, None)
        elif listed.get(task, settings) is None:  # null in the file, an override gives it settings again
            del listed[task]
    return OmegaConf.create(layers[0]), OmegaConf.create(layers[1])


def _mapping(layer: Any, key: str) -> dict:
    """What a dotted key holds, an empty mapping where it holds none."""
    for name in key.split("."):
        layer = layer.get(name) if isinstance(layer, dict) else None
    return layer if isinstance(layer, dict) else {}


def _merge(config: DictConfig, layer: DictConfig, place: str) -> DictConfig:
    plain: Any = OmegaConf.to_container(layer)
    _need_mappings(plain, {*SECTIONS, "tasks"}, "", place)
    _need_mappings(plain.get("tasks"), None, "tasks.", place)
    for section, kind in SECTIONS.items():
        nested = {entry.name for entry in fields(kind) if is_dataclass(entry.default_factory)}
        _need_mappings(plain.get(section), nested, f"{section}.", place)
    try:
        return OmegaConf.merge(config, layer)
    except ConfigKeyError as error:
        key = str(error.full_key)
        near = difflib.get_close_matches(key, list(known_keys(config, layer)), n=3, cutoff=0.5)
        leaf = key.rsplit(".", 1)[-1]
        near += [k for k in known_keys(config, layer) if k.rsplit(".", 1)[-1] == leaf and k not in near][:3]
        hint = f"; nearest: {', '.join(near)}" if near else f"; sections: {', '.join(str(k) for k in config)}"
        raise UserError(f"{place}: unknown key '{key}'{hint}") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{place}: {error.full_key}: {_one_line(error)}") from error
    except TypeError as error:  # a place in a list, asked for as if it were a mapping
        raise UserError(f"{place}: {_one_line(error)}") from error


def _need_mappings(layer: Any, keys: set[str] | None, prefix: str, place: str) -> None:
    """Refuse sections that are no mapping; OmegaConf would not say which, or raise TypeError."""
    for key, value in layer.items() if isinstance(layer, dict) else ():
        if (keys is None or key in keys) and not isinstance(value, dict | None) and value != "???":
            raise UserError(f"{place}: {prefix}{key}: {value!r} is not a mapping of settings")


def known_keys(config: DictConfig, layer: DictConfig) -> Iterator[str]:
    """Every key that a recipe may hold, dotted; a task's keys once for each task of `layer` and `config`."""
    whole: dict[str, Any] = {**{entry.name: None for entry in fields(Recipe)}, **SECTIONS}
    tasks = set(config.tasks) | set(layer.get("tasks") or {})
    for task in sorted(map(str, tasks)):
        whole[f"tasks.{task}"] = TaskConfig
    for section, kind in whole.items():
        yield section
        if kind is not None:
            yield from _keys(section, kind)


def _keys(section: str, kind: Any) -> Iterator[str]:
    for entry in fields(kind):
        yield f"{section}.{entry.name}"
        if is_dataclass(entry.default_factory):
            yield from _keys(f"{section}.{entry.name}", entry.default_factory)


def _missing(layer: Any, key: str = "") -> Iterator[str]:
    """The dotted keys that say `???`."""
    if isinstance(layer, dict):
        for name, value in layer.items():
            yield from _missing(value, f"{key}.{name}" if key else str(name))
    elif layer == "???":
        yield key


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split("\n    full_key")[0].split())
