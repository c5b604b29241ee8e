from copy import deepcopy
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from omegaconf import OmegaConf

from delvm.distill.module import DistillConfig
from delvm.errors import UserError
from delvm.evaluate.prompting import PromptingConfig
from delvm.images.sources import DataConfig, TaskConfig
from delvm.pretrain import OptimizerConfig, PretrainConfig
from delvm.recipe import Recipe, check_run_dir, known_keys, load, to_yaml
from delvm.tokenizer.training import TokenizerConfig
from delvm.tokens.balance import BalanceConfig
from delvm.tokens.sentences import SentencesConfig
from delvm.training import TrainerConfig

RECIPES = Path(__file__).parents[1] / "recipes"
EDGES = ["tasks.edges.images=photos", "tasks.edges.annotations=drawings"]
TASK = "scene: pose, samples: 5, validation_samples: 2"
SMALL = f"""
data: {{image_size: 32}}
tasks:
  pose: {{{TASK}}}
  edges: {{images: a, annotations: b, validation_fraction: 0.2}}
teacher: {{size: tiny-192, steps: 20}}
scratch: {{learning_rate: 1.0e-3}}
student: {{size: tiny, steps: 10}}
"""
SECTIONS = (
    "name, run_dir, seed, data, tasks, balance, tokenizer, tokens, sentences, teacher, scratch, cache,"
    " student, prompting, probe, finetune, trainer"
)


@pytest.fixture
def write(tmp_path):
    """Writes small.yaml; returns its path."""

    def file(text=SMALL):
        path = tmp_path / "small.yaml"
        path.write_text(text)
        return path

    return file


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """What small.yaml says, without overrides."""
    path = tmp_path_factory.mktemp("recipes") / "small.yaml"
    path.write_text(SMALL)
    return asdict(load(path))


def _refused(function, *arguments):
    """The message with which a call is refused, one line."""
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _hint(message):
    """The keys that a message calls nearest."""
    return message.partition("; nearest: ")[2].split(", ")


# --- what is shipped


def test_the_quickstart():
    recipe = load(RECIPES / "quickstart.yaml")
    assert {task: config.samples for task, config in recipe.tasks.items()} == {
        "segmentation": 850,
        "deraining": 100,
        "pose": 50,
    }
    for task, config in recipe.tasks.items():
        assert (config.scene, config.images) == (task, "")
    assert (recipe.seed, recipe.data.image_size, recipe.tokenizer.factor) == (0, 32, 4)
    assert isinstance(recipe.scratch, OptimizerConfig)


def test_the_recipe_for_own_folders_asks_for_them():
    path = RECIPES / "pairs.yaml"
    assert _refused(load, path).startswith(f"{path}: tasks.edges.images: missing")
    message = _refused(load, path, ["tasks.edges.images=photos"])
    assert message.startswith(f"{path}: tasks.edges.annotations: missing")
    task = load(path, EDGES).tasks["edges"]
    assert task == TaskConfig(
        images="photos", annotations="drawings", validation_fraction=0.2, policy="crops"
    )


# --- defaults


def test_what_a_recipe_leaves_out_is_the_default(write):
    path = write(f"tasks: {{pose: {{{TASK}}}}}")
    assert load(path) == Recipe(
        name="small",
        run_dir="runs/small",
        seed=0,
        data=DataConfig(),
        tasks={"pose": TaskConfig(scene="pose", samples=5, validation_samples=2)},
        balance=BalanceConfig(),
        tokenizer=TokenizerConfig(),
        sentences=SentencesConfig(),
        teacher=None,
        scratch=None,
        student=None,
        prompting=PromptingConfig(),
        probe=None,
        finetune=None,
        trainer=TrainerConfig(),
    )


def test_a_section_named_gets_its_own_defaults(write):
    recipe = load(write())
    assert recipe.teacher == PretrainConfig(size="tiny-192", steps=20)
    assert recipe.scratch == OptimizerConfig(learning_rate=1e-3)
    assert recipe.student == DistillConfig(size="tiny", steps=10)
    assert type(recipe.student) is DistillConfig
    assert type(recipe.scratch) is OptimizerConfig


def test_name_and_folder(write):
    names = {
        (): ("small", "runs/small"),
        ("name=other",): ("other", "runs/other"),
        ("run_dir=/disk/run 1",): ("small", "/disk/run 1"),
        ("name=other", "run_dir=here"): ("other", "here"),
        ("name=7",): ("7", "runs/7"),
    }
    for overrides, expected in names.items():
        recipe = load(write(), overrides)
        assert (recipe.name, recipe.run_dir) == expected


# --- overrides


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("seed=3", 3),
        ("teacher.steps=7", 7),
        ("teacher.learning_rate=3e-4", 3e-4),
        ("teacher.learning_rate=1", 1.0),
        ("tokenizer.attention=true", True),
        ("tokenizer.channel_multipliers=[1,2]", [1, 2]),
        ("tasks.pose.samples=9", 9),
        ("tasks.pose.nearest=true", True),
        ("tasks.edges.images=my photos/x=1", "my photos/x=1"),
        ("tasks.edges.images=~/photos", "~/photos"),
        ("balance.shares.pose=2", 2.0),
        ("balance.shares={pose: 0.5, edges: 3}", {"pose": 0.5, "edges": 3.0}),
        ("student=null", None),
        ("scratch=null", None),
        ("teacher.steps=${student.steps}", 10),
        ("data.unreadable=skip", "skip"),
        ("student.on_policy.share=0.5", 0.5),
        ("student.divergence=jsd", "jsd"),
        ("student.task_temperatures.pose=2", 2.0),
        ("prompting.scores.edges=edges", "edges"),
        ("student.ce_weight_end=2", 2.0),
        ("teacher.folder=~/teacher", str(Path("~/teacher").expanduser())),
    ],
)
def test_overrides_have_the_type_of_their_key(write, small, override, value):
    others = ["scratch=null"] if override == "student=null" else []
    before, after = deepcopy(small), asdict(load(write(), [override, *others]))
    *path, last = override.partition("=")[0].split(".")
    old, new = before, after
    for key in path:
        old, new = old[key], new[key]
    assert (new[last], type(new[last])) == (value, type(value))
    assert old.get(last) != value
    # nothing else has changed
    new.pop(last)
    old.pop(last, None)
    for name in others:
        after.pop(name.removesuffix("=null"))
        before.pop(name.removesuffix("=null"))
    assert after == before


def test_the_last_override_counts(write):
    assert load(write(), ["seed=1", "seed=2"]).seed == 2


def test_mappings_merge_and_lists_replace(write):
    path = write(f"{SMALL}\nbalance: {{shares: {{pose: 2}}}}\ntokenizer: {{channel_multipliers: [1, 2]}}\n")
    recipe = load(path, ["balance.shares.edges=3", "tokenizer.channel_multipliers=[1]"])
    assert recipe.balance.shares == {"pose": 2.0, "edges": 3.0}
    assert recipe.tokenizer.channel_multipliers == [1]


def test_overrides_can_add_a_section_and_a_task(write):
    path = write(f"tasks: {{pose: {{{TASK}}}}}")
    overrides = ["tasks.edges={images: a, annotations: b}", "tasks.edges.validation_fraction=0.5"]
    recipe = load(path, ["teacher.size=tiny", *overrides])
    assert recipe.teacher == PretrainConfig(size="tiny")
    assert list(recipe.tasks) == ["pose", "edges"]
    assert recipe.tasks["edges"] == TaskConfig(images="a", annotations="b", validation_fraction=0.5)


@pytest.mark.parametrize("override", ["nothing", "", "teacher.steps", "teacher.steps:3"])
def test_an_override_needs_a_value(write, override):
    message = f"'{override}': an override is key=value, such as teacher.steps=100"
    assert _refused(load, write(), ["seed=1", override]) == message


def test_an_override_that_is_not_yaml(write):
    assert _refused(load, write(), ["teacher.steps=[1"]).startswith("overrides: while parsing a flow")


# --- keys and values


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("teacher.stps", "teacher.steps"),
        ("tasks.pose.smples", "tasks.pose.samples"),
        ("tasks.edges.images_folder", "tasks.edges.images"),
        ("tasks.new.polcy", "tasks.new.policy"),
        ("balance.stratgy", "balance.strategy"),
        ("sed", "seed"),
        ("student.on_policy.shre", "student.on_policy.share"),
        ("student.on_polcy.share", "student.on_policy"),
        ("cache.kinds", "cache.kind"),
        ("studnet.steps", "student"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(write, key, nearest):
    named = ".".join(key.split(".")[: nearest.count(".") + 1])  # up to the part that is unknown
    message = _refused(load, write(), [f"{key}=3"])
    assert message.startswith(f"override: unknown key '{named}'; nearest: ")
    assert _hint(message)[0] == nearest
    nested = "".join(f"{part}: {{" for part in key.split(".")[:-1])
    text = f"{nested}{key.split('.')[-1]}: 3{'}' * key.count('.')}"
    path = write(text)
    message = _refused(load, path)
    assert message.startswith(f"{path}: unknown key '{named}'; nearest: ")
    assert _hint(message)[0] == nearest


def test_a_key_of_another_section(write):
    message = _refused(load, write(), ["scratch.steps=3"])
    assert message.startswith("override: unknown key 'scratch.steps'; nearest: ")
    assert {"teacher.steps", "student.steps", "tokenizer.steps"} <= set(_hint(message))


def test_a_key_like_no_other(write):
    message = f"override: unknown key 'zzzzzz'; sections: {SECTIONS}"
    assert _refused(load, write(), ["zzzzzz=3"]) == message
    path = write("qqq: {a: 1}")
    assert _refused(load, path) == f"{path}: unknown key 'qqq'; sections: {SECTIONS}"


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("seed", "x", "Integer"),
        ("seed", "1.5", "Integer"),
        ("seed", "true", "Integer"),
        ("teacher.steps", "many", "Integer"),
        ("teacher.learning_rate", "fast", "Float"),
        ("tokenizer.attention", "maybe", "bool"),
        ("tokenizer.channel_multipliers[0]", "wide", "Integer"),
        ("balance.shares.pose", "half", "Float"),
        ("tasks.pose.samples", "all", "Integer"),
        ("student.on_policy.share", "half", "Float"),
    ],
)
def test_a_value_of_the_wrong_type(write, key, value, kind):
    given = f"{key.removesuffix('[0]')}={f'[{value}]' if key.endswith('[0]') else value}"
    message = _refused(load, write(), [given])
    assert message.startswith(f"override: {key}: Value '{value.replace('true', 'True')}' ")
    assert kind in message


def test_a_value_of_the_wrong_type_in_the_file(write):
    path = write("teacher: {steps: many}")
    assert _refused(load, path).startswith(f"{path}: teacher.steps: Value 'many' ")


@pytest.mark.parametrize(
    "key", ["seed", "run_dir", "teacher.steps", "tasks.pose.policy", "trainer", "tasks", "student.on_policy"]
)
def test_models_and_cache_alone_can_be_null(write, key):
    assert _refused(load, write(), [f"{key}=null"]).startswith(f"override: {key}: ")


@pytest.mark.parametrize("key", ["data", "teacher", "cache", "tasks", "tasks.pose", "student.on_policy"])
@pytest.mark.parametrize("value", ["5", "[1]"])
def test_a_section_is_a_mapping(write, key, value):
    assert _refused(load, write(), [f"{key}={value}"]).startswith(f"override: {key}: ")
    path = write(OmegaConf.to_yaml(OmegaConf.from_dotlist([f"{key}={value}"])))
    assert _refused(load, path).startswith(f"{path}: {key}: ")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.image_size=4"], "data.image_size: 4 must be at least 8"),
        (["data.unreadable=ask"], "data.unreadable: 'ask' is unknown; choices: stop, skip"),
        (
            ["balance.strategy=mix"],
            "balance.strategy: 'mix' is unknown; choices: none, resample, augment, mixture",
        ),
        (["balance.shares.pose=-1"], "balance.shares.pose: -1.0 must be above 0 and finite"),
        (["balance.shares.nope=2"], "balance.shares.nope: no such task; tasks: pose, edges"),
        (["prompting.scores.nope=edges"], "prompting.scores.nope: no such task; tasks: pose, edges"),
        (
            ["prompting.scores.edges=lines"],
            "prompting.scores.edges: 'lines' is unknown; choices: segmentation, foreground, pose,"
            " restoration, difference, edges",
        ),
        (["sentences.pairs=0"], "sentences.pairs: 0 must be at least 1"),
        (["teacher.learning_rate=nan"], "teacher.learning_rate: nan must be above 0 and finite"),
        (["student.kd_weight=-1"], "student.kd_weight: -1.0 must be at least 0 and finite"),
        (["prompting.top_p=2"], "prompting.top_p: 2.0 must be above 0 and at most 1"),
        (["trainer.log_every=0"], "trainer.log_every: 0 must be at least 1"),
        (
            ["tasks.pose.scene=poses"],
            "tasks.pose.scene: 'poses' is unknown; choices: segmentation, deraining, pose",
        ),
        (
            ["tasks.edges.images=''"],
            "tasks.edges.images: missing; source 'pairs' needs images and annotations; or give a scene",
        ),
        (["tasks.new.scene=pose"], "tasks.new.samples: a scene needs at least 1"),
        (["seed=-1"], "seed: -1 must be at least 0"),
        (["student=null"], "scratch: needs a student section, whose size, steps and batches it takes"),
        (["teacher=null"], "student: needs a teacher section"),
        (["data.image_size=30"], "data.image_size: 30 is not a multiple of the tokenizer's downsampling (4)"),
        (
            ["tokenizer.channel_multipliers=[1,1,1]", "data.image_size=24"],
            "data.image_size: 24 is not a multiple of the tokenizer's downsampling (16)",
        ),
        (["tokenizer.patch=0"], "tokenizer.patch: 0, must be at least 1"),
        (["student.on_policy.share=2"], "student.on_policy.share: 2.0 must lie in 0..1"),
        (
            ["student.on_policy.share=0.5", "student.kd_weight=0"],
            "student.on_policy.share: of its own pictures a student learns by kd_weight, which is 0",
        ),
        (
            ["student.task_kd_weights.nope=2"],
            "student.task_kd_weights.nope: no such task; tasks: pose, edges",
        ),
        (
            ["student.task_ce_weights.pose=-1"],
            "student.task_ce_weights.pose: -1.0 must be at least 0 and finite",
        ),
        (["cache.kind=all"], "cache.kind: 'all' is unknown; choices: topk, sampled"),
        (
            ["cache.kind=topk", "student=null", "scratch=null"],
            "cache: needs a student section, whose sentences it is written for",
        ),
        (
            ["cache.kind=sampled", "student.divergence=jsd"],
            "student.divergence: 'jsd' cannot be had from a teacher's cache of kind 'sampled';"
            " choices: forward_kl",
        ),
        (
            ["student.start=best"],
            "student.start: 'best' is unknown; choices: random, slice, embedding, checkpoint",
        ),
        (
            ["student.start_layers=some"],
            "student.start_layers: 'some' is unknown; choices: greedy, even",
        ),
        (
            ["student.start=checkpoint"],
            "student.start_folder: '' with start 'checkpoint'; start: checkpoint needs one, no other takes"
            " one",
        ),
        (
            ["student.start_folder=old"],
            "student.start_folder: 'old' with start 'random'; start: checkpoint needs one, no other takes"
            " one",
        ),
        (
            ["student.embedding=frozen"],
            "student.embedding: 'frozen' is unknown; choices: learned, codebook, codebook_start",
        ),
        (
            ["student.embedding=codebook", "student.start=slice"],
            "student.embedding: 'codebook' with start 'slice', which has an embedding; choose embedding:"
            " learned or start: random",
        ),
        (["student.start_tokens=0"], "student.start_tokens: 0 must be at least 1"),
        (
            ["cache.kind=topk", "student.kd_weight=0"],
            "cache: student.kd_weight is 0, nobody would read what the teacher says",
        ),
        (
            ["cache.kind=topk", "student.teacher_sharded=true"],
            "student.teacher_sharded: a student that reads a cache has no live teacher",
        ),
        (
            ["cache.kind=topk", "student.on_policy.share=0.5"],
            "student.on_policy: the student's own pictures need a teacher, no cache",
        ),
        (
            ["cache.kind=topk", "student.task_temperatures.pose=2"],
            "student.task_temperatures: a cache is written at student.temperature alone",
        ),
        (
            ["cache.kind=topk", "balance.online=true"],
            "cache: balance.online draws other sentences each time; choose one of them",
        ),
        (["student.folder=there"], "student.folder: only the teacher's can be given"),
    ],
)
def test_an_impossible_value_names_section_and_key(write, overrides, message):
    path = write()
    assert _refused(load, path, overrides) == f"{path}: {message}"


def test_a_size_is_answered_with_the_choices(write):
    path = write()
    message = _refused(load, path, ["student.size=tny"])
    assert message.startswith(f"{path}: student.size: 'tny' is unknown; nearest: tiny")
    assert {"tiny", "80m", "300m", "1b"} <= set(message.partition("choices: ")[2].split(", "))


def test_a_seed_too_large_for_every_generator(write):
    path = write()
    assert load(path, [f"seed={2**32 - 2}"]).seed == 2**32 - 2
    assert _refused(load, path, [f"seed={2**32 - 1}"]).startswith(f"{path}: seed: {2**32 - 1} must ")


def test_a_recipe_without_tasks(write):
    message = "tasks: none; a recipe needs at least one task"
    for text in ("", "# nothing yet\n", "seed: 1\n", "tasks: {}\n"):
        path = write(text)
        assert _refused(load, path) == f"{path}: {message}"


PROBE = "probe: {train: t, validation: v, models: {student: ~/s}}\ntokenizer: {folder: f}\n"


def test_a_probe_of_given_models_needs_no_tasks(write):
    found = load(write(PROBE))
    assert found.tasks == {}
    assert found.probe.models == {"student": str(Path("~/s").expanduser())}
    assert load(write(), ["probe.train=t", "probe.validation=v"]).probe.models == {}


@pytest.mark.parametrize(
    ("text", "override", "message"),
    [
        (PROBE, "teacher.steps=1", "tasks: none; teacher needs at least one task, probe.models needs none"),
        (
            PROBE.replace("train: t, ", ""),
            "seed=0",
            "probe.train: missing, give a folder with one folder of pictures a class",
        ),
        (PROBE[:-24], "seed=0", "tokenizer.folder: missing, there are no tasks to train a tokenizer on"),
        (PROBE, "probe.seeds=0", "probe.seeds: 0 must be at least 1"),
        ("probe: {train: t, validation: v}", "seed=0", "probe.models: none, and the recipe trains none; add"),
        (SMALL + PROBE, "seed=0", "probe.models.student: the run has its own; choose another name"),
    ],
)
def test_a_probe_that_lacks_something(write, text, override, message):
    path = write(text)
    assert _refused(load, path, [override]).startswith(f"{path}: {message}")


TUNE = "finetune: {train: t, validation: v, models: {student: ~/s}}\n"


def test_a_fine_tuning_of_given_models_needs_no_tasks(write):
    found = load(write(TUNE + "tokenizer: {folder: f}\n"))
    assert found.tasks == {}
    assert found.finetune.models == {"student": str(Path("~/s").expanduser())}
    assert load(write(TUNE), ["finetune.input=patches"]).tokenizer.folder == ""
    found = load(write(), ["finetune.train=t", "finetune.validation=v", "finetune.roles=[scratch]"])
    assert found.finetune.roles == ["scratch"]


@pytest.mark.parametrize(
    ("text", "override", "message"),
    [
        (TUNE, "teacher.steps=1", "tasks: none; teacher needs at least one task, finetune.models needs none"),
        (TUNE, "seed=0", "tokenizer.folder: missing, there are no tasks to train a tokenizer on"),
        (TUNE, "finetune.views.crop=2", "finetune.views.crop: 2.0 must lie in 0..1, 0 excluded"),
        (TUNE, "finetune.views=1", "finetune.views: 1 is not a mapping of settings"),
        (SMALL + TUNE, "seed=0", "finetune.models.student: the run has its own; choose another name"),
        (
            SMALL,
            "finetune={train: t, validation: v, roles: [pupil]}",
            "finetune.roles: 'pupil' is no model of the run; choices: teacher, scratch, student",
        ),
    ],
)
def test_a_fine_tuning_that_lacks_something(write, text, override, message):
    path = write(text)
    assert message in _refused(load, path, [override])


@pytest.mark.parametrize("name", ["a b", "a/b", "..", "-a", "_a", "é", "a.b", ""])
def test_a_task_name_that_makes_no_file_name(write, name):
    path = write(f'tasks: {{"{name}": {{{TASK}}}}}')
    message = f"{path}: tasks.{name}: a task's name may hold letters, digits, '_' and '-'"
    assert _refused(load, path) == message


@pytest.mark.parametrize("name", ["a", "A9", "2d-pose_v2"])
def test_a_task_name(write, name):
    assert list(load(write(f"tasks: {{{name}: {{{TASK}}}}}")).tasks) == [name]


# --- values that must be given


@pytest.mark.parametrize(
    ("key", "value", "given"),
    [
        ("teacher.size", "tiny", "tiny"),
        ("seed", "4", 4),
        ("tasks.pose.samples", "7", 7),
        ("balance.shares.pose", "2", 2.0),
    ],
)
def test_a_missing_value(write, key, value, given):
    config = OmegaConf.create(SMALL)
    OmegaConf.update(config, key, "???")
    path = write(OmegaConf.to_yaml(config))
    assert _refused(load, path) == f"{path}: {key}: missing, give a value"
    found = asdict(load(path, [f"{key}={value}"]))
    for part in key.split("."):
        found = found[part]
    assert found == given


def test_an_override_without_a_value_gives_none(write):
    path = write()
    assert _refused(load, path, ["seed='???'"]) == "override: seed: missing, give a value"
    path = write('tasks: {edges: {images: "???", annotations: "???", validation_fraction: 0.2}}')
    overrides = ["tasks.edges.images=a", "tasks.edges.annotations='???'"]
    assert _refused(load, path, overrides).startswith("override: tasks.edges.annotations: missing")


def test_a_cache_serves_what_it_can(write):
    for overrides in (["cache.kind=topk", "student.divergence=jsd"], ["cache.kind=sampled"],
                      ["cache.kind=topk", "student.task_temperatures.pose=1"]):  # fmt: skip
        recipe = load(write(), overrides)
        assert recipe.cache.codes == {"topk": 64, "sampled": 12}[recipe.cache.kind]
    assert load(write(), ["cache={count: 7}", "cache.kind=sampled"]).cache.codes == 7


def test_a_reference_to_nothing(write):
    path = write()
    for key in ("teacher.steps", "seed", "name", "tasks.pose.samples"):
        message = _refused(load, path, [f"{key}=${{nowhere}}"])
        assert message == f"{path}: {key}: Interpolation key 'nowhere' not found"


# --- files


@pytest.mark.parametrize(
    "text", ["tasks: [1\n", "tasks:\n\t- a\n", "seed: 1\nseed: 2\n", "seed: !!python/name:os.system\n", "3"]
)
def test_a_file_that_is_not_yaml(write, text):
    path = write(text)
    assert _refused(load, path).startswith(f"{path}: not readable as YAML: ")


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n\0\0", b"\xff\xfe\0\1", b"\0\1\2"])
def test_a_binary_file(tmp_path, content):
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    assert _refused(load, path).startswith(f"{path}: not readable as YAML: ")


def test_a_file_that_is_not_a_mapping(write):
    path = write("- seed\n- tasks\n")
    assert _refused(load, path) == f"{path}: a recipe is a mapping of sections"


def test_no_such_recipe(tmp_path):
    for path in (tmp_path / "nowhere.yaml", tmp_path):
        assert _refused(load, path) == f"{path}: no such recipe"


# --- saved and loaded again


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["scratch=null"],
        ["scratch=null", "student=null"],
        ["scratch=null", "student=null", "teacher=null"],
        ["balance.shares={pose: 0.1, edges: 3}"],
        ["tokenizer.channel_multipliers=[1,2]", "tokenizer.attention=true"],
        ["name=7", "run_dir=1e3", "tokenizer.folder='a: b # c'"],
        ["tasks.edges.images=true", "tasks.edges.annotations=été/[1]"],
        ["teacher.learning_rate=1e-5", "teacher.clip=1e20", "seed=123456789"],
        ["teacher.steps=${student.steps}", "run_dir=out/${seed}"],
        ["cache={kind: sampled, rows: 3}", "student.task_kd_weights.pose=0.5", "student.kd_weight_end=0"],
        [
            "student.on_policy={share: 0.5, confidence: 0.1}",
            "student.divergence_settings.alpha=0.2",
            "student.divergence=skew_kl",
            "teacher.folder=there",
        ],
    ],
)
def test_a_saved_recipe_is_the_recipe(write, tmp_path, overrides):
    recipe = load(write(), overrides)
    saved = tmp_path / "recipe.yaml"
    saved.write_text(to_yaml(recipe))
    again = load(saved)
    assert again == recipe
    assert to_yaml(again) == saved.read_text()


def test_what_is_saved(write):
    saved = OmegaConf.to_container(OmegaConf.create(to_yaml(load(write(), ["scratch=null"]))))
    assert list(saved) == SECTIONS.split(", ")  # in the order of the data flow
    assert (saved["name"], saved["run_dir"], saved["scratch"]) == ("small", "runs/small", None)
    assert saved["student"] == asdict(DistillConfig(size="tiny", steps=10))


# --- the run folder


@pytest.fixture
def run(write, tmp_path):
    """A recipe whose run folder is tmp_path/run."""

    def recipe(name="small"):
        return load(write(), [f"name={name}", f"run_dir={tmp_path / 'run'}"])

    return recipe


def _begin(recipe):
    folder = Path(recipe.run_dir)
    folder.mkdir()
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    (folder / "tokens").mkdir()


def test_a_folder_that_is_free(run, tmp_path):
    check_run_dir(run())
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    check_run_dir(run())
    assert list((tmp_path / "run").iterdir()) == []


def test_the_folder_of_the_same_recipe(run, write, tmp_path):
    _begin(run())
    check_run_dir(run())
    # with other settings it is still this recipe: its stages say what is to be made anew
    check_run_dir(load(write(), ["seed=1", "student.steps=3", f"run_dir={tmp_path / 'run'}"]))


def test_the_folder_of_another_recipe(run, tmp_path):
    _begin(run())
    assert _refused(check_run_dir, run("other")) == (
        f"run_dir: '{tmp_path / 'run'}' belongs to recipe 'small', this one is 'other';"
        " choose another run_dir"
    )


def test_a_folder_that_is_no_run(run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "photo.jpg").touch()
    message = f"run_dir: '{tmp_path / 'run'}' is not empty and holds no run; choose another run_dir"
    assert _refused(check_run_dir, run()) == message


def test_a_run_folder_that_is_a_file(run, tmp_path):
    (tmp_path / "run").touch()
    assert _refused(check_run_dir, run()) == f"run_dir: '{tmp_path / 'run'}' is a file"


def test_a_run_folder_whose_recipe_is_damaged(run, tmp_path):
    _begin(run())
    saved = tmp_path / "run" / "recipe.yaml"
    saved.write_text("tasks: [1\n")
    assert _refused(check_run_dir, run()).startswith(f"{saved}: not readable as YAML: ")


# --- every key


def _expected_keys(tasks):
    """From the types of `Recipe` alone."""
    for name, kind in get_type_hints(Recipe).items():
        yield name
        kinds = [kind, *get_args(kind)]
        places = [f"{name}.{task}" for task in tasks] if name == "tasks" else [name]
        yield from (place for place in places if place != name)
        for section in filter(is_dataclass, kinds):
            for place in places:
                yield from _expected_in(section, place)


def _expected_in(section, place):
    for name, kind in get_type_hints(section).items():
        yield f"{place}.{name}"
        if is_dataclass(kind):
            yield from _expected_in(kind, f"{place}.{name}")


def test_every_key_is_known():
    config, layer = OmegaConf.structured(Recipe), OmegaConf.create({"tasks": {"b": {}, "a": {}}})
    expected = sorted(_expected_keys(["a", "b"]))
    assert sorted(known_keys(config, layer)) == expected
    assert {"tasks.a.validation_fraction", "student.kd_weight", "scratch.beta1", "tokenizer"} <= {*expected}
    assert {"student.on_policy", "student.on_policy.share"} <= {*expected}
    # the tasks of the recipe, while an override is read
    config.tasks["c"] = TaskConfig(images="a", annotations="b", validation_fraction=0.5)
    assert sorted(known_keys(config, OmegaConf.create({}))) == sorted(_expected_keys(["c"]))
