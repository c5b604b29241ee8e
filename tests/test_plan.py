import pytest

from delvm.distill.module import DistillConfig
from delvm.distill.on_policy import OnPolicyConfig
from delvm.errors import UserError
from delvm.images.tasks import TaskConfig
from delvm.plan import MOST_SAID, check_plan, make_plan
from delvm.pretrain import PretrainConfig
from delvm.recipe import Recipe
from delvm.tokenizer.training import TokenizerConfig
from delvm.tokens.balance import BalanceConfig
from delvm.tokens.sentences import SentencesConfig

PLACE = {"num_tokens": 16, "num_codes": 256}


def _recipe(tasks, **sections):
    configs = {
        "scene": TaskConfig(scene="pose", samples=5, validation_samples=3),
        "clips": TaskConfig(source="video", images="a", frames=4),
        "lines": TaskConfig(source="delvm", images="b"),
        "classes": TaskConfig(source="classes", images="c"),
    }
    tokenizer = TokenizerConfig(folder="tokenizer")
    return Recipe(tasks={task: configs[task] for task in tasks}, tokenizer=tokenizer, **sections)


def _listed(train, validation=9, pictures=2, skipped=(), dropped=()):
    left_out = {"skipped": list(skipped), "dropped": list(dropped)}
    return {"train": train, "validation": validation, "pictures": pictures, **left_out}


def _refused(recipe, manifest):
    with pytest.raises(UserError) as caught:
        make_plan(recipe, manifest, **PLACE)
    return str(caught.value)


def test_a_plan_has_forms_rows_and_views():
    plan = make_plan(_recipe(["scene", "lines"]), {"scene": _listed(30), "lines": _listed(10)}, **PLACE)
    assert {task: (form.kind, form.length) for task, form in plan.forms.items()} == {
        "scene": ("pairs", 66),
        "lines": ("pairs", 66),
    }
    assert plan.length == 66
    # tokens have no views: the same lines three times instead
    assert {task: (entry.views, entry.draws) for task, entry in plan.tasks.items()} == {
        "scene": (1, 30),
        "lines": (1, 30),
    }
    assert plan.summary["lines"]["tokens_after"] == 30 * 32
    assert plan.notes == ["tasks.lines: tokens have no views, shown 3 times instead"]


def test_the_length_of_a_row_can_be_given():
    tasks = ["scene", "clips"]
    manifest = {"scene": _listed(30), "clips": _listed(30, pictures=4)}
    plan = make_plan(_recipe(tasks, sentences=SentencesConfig(length=128)), manifest, **PLACE)
    assert (plan.length, plan.forms["clips"].length, plan.notes) == (128, 66, [])
    assert _refused(_recipe(tasks), {**manifest, "clips": _listed(30, pictures=8)}) == (
        "sentences.length: needed, the tasks' sentences differ in length: scene 66, clips 130"
    )


def test_what_a_user_should_know():
    left_out = [f"number {n}" for n in range(14)]
    manifest = {
        "scene": _listed(1, skipped=left_out[:2], dropped=left_out[2:]),
        "clips": _listed(40, pictures=4),
    }
    cut = {"sentences": SentencesConfig(length=40), "balance": BalanceConfig(max_views=8)}
    notes = make_plan(_recipe(["scene", "clips"], **cut), manifest, **PLACE).notes
    assert notes[:MOST_SAID] == [f"left out: {message}" for message in left_out[:MOST_SAID]]
    assert notes[MOST_SAID:] == [
        "left out: 4 more, see data/manifest.json",
        "tasks.scene: 1 training samples, a sentence shows 2: they repeat",
        "tasks.scene: sentences of 66 tokens, cut into rows of 40",
        "tasks.clips: sentences of 66 tokens, cut into rows of 40",
        "tasks.scene: 80 views wanted, cut by balance.max_views: 9.1% of the tokens instead of 50.0%",
    ]


def test_what_is_refused():
    one = {"scene": _listed(5, validation=1)}
    assert _refused(_recipe(["scene"]), one) == "tasks.scene: 1 held-out samples, a sentence shows 2"
    sentences = SentencesConfig(kinds={"clips": "category"})
    found = _refused(_recipe(["clips"], sentences=sentences), {"clips": _listed(5, pictures=4)})
    assert found.startswith("sentences.kinds.clips: 'category' does not take samples of 4 x 1 pictures")
    assert _refused(_recipe(["scene"], sentences=SentencesConfig(bos=7)), {"scene": _listed(5)}) == (
        "sentences.bos: 7 is a code, there are 256"
    )
    online = BalanceConfig(online=True)
    assert _refused(_recipe(["lines"], balance=online), {"lines": _listed(5)}) == (
        "balance.online: tasks.lines has no pictures to view anew"
    )
    short = SentencesConfig(length=30)
    assert _refused(_recipe(["scene"], balance=online, sentences=short), {"scene": _listed(5)}) == (
        "balance.online: a row must be a whole sentence; leave sentences.length at 0"
    )


def test_only_classes_make_categories():
    sentences = SentencesConfig(kinds={"classes": "category"}, shots={"classes": 8})
    recipe = _recipe(["classes"], sentences=sentences)
    plan = make_plan(recipe, {"classes": _listed(50, validation=20, pictures=1)}, **PLACE)
    assert (plan.forms["classes"].kind, plan.forms["classes"].images) == ("category", 8)
    recipe.tasks["classes"] = TaskConfig(images="photos")
    assert _refused(recipe, {"classes": _listed(50, validation=20, pictures=1)}) == (
        "sentences.kinds.classes: 'category' needs source 'classes'"
    )


def test_the_first_samples_show_what_is_impossible():
    check_plan(_recipe(["scene"]), **PLACE)
    with pytest.raises(UserError, match=r"^sentences.kinds.scene: 'sequence' does not take"):
        check_plan(_recipe(["scene"], sentences=SentencesConfig(kinds={"scene": "sequence"})), **PLACE)


def test_kd_on_annotations_that_a_task_has_not_is_refused():
    tasks = {"scene": _listed(30), "clips": _listed(30, pictures=4)}
    taught = {"teacher": PretrainConfig(), "student": DistillConfig(kd_on="annotations")}
    rows = SentencesConfig(length=64)
    assert _refused(_recipe(["scene", "clips"], sentences=rows, **taught), tasks) == (
        "student.kd_on: 'annotations', but tasks.clips has none in sentences of kind 'sequence'"
    )
    make_plan(_recipe(["scene"], **taught), {"scene": _listed(30)}, **PLACE)
    taught["student"] = DistillConfig(kd_on="annotations", kd_weight=0.0)  # no reason to refuse
    plan = make_plan(_recipe(["scene", "clips"], sentences=rows, **taught), tasks, **PLACE)
    assert "student.kd_on: annotations has no effect without kd_weight" in plan.notes


@pytest.mark.parametrize(
    ("settings", "notes"),
    [
        ({}, []),
        ({"decay": 0.1, "blend": 0.5, "course": "cosine"}, [
            "decay: 0.1 has no effect without schedule: wsd",
            "blend: 0.5 has no effect without divergence: taid",
            "course: cosine has no effect without a weight with an end, or taid",
        ]),
        ({"decay": 0.1, "schedule": "wsd", "blend": 0.5, "divergence": "taid", "course": "cosine"}, []),
        ({"start_layers": "even", "start_tokens": 5, "start": "embedding"},
         ["start_layers: even has no effect without start: slice"]),
        ({"start_tokens": 5}, ["start_tokens: 5 has no effect without start: slice or embedding"]),
        ({"kd_weight": 0.0, "temperature": 2.0}, ["temperature: 2.0 has no effect without kd_weight"]),
        ({"on_policy": OnPolicyConfig(confidence=0.5)}, ["on_policy: has no effect without on_policy.share"]),
    ],
)  # fmt: skip
def test_settings_without_effect_are_said(settings, notes):
    recipe = _recipe(["scene"], teacher=PretrainConfig(), student=DistillConfig(**settings))
    plan = make_plan(recipe, {"scene": _listed(30)}, **PLACE)
    assert plan.notes == [f"student.{note}" for note in notes]
