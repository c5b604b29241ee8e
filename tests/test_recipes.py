"""The recipes that come with the project: each loads; those of the paper have its numbers."""

import io
import json
import re
import tarfile
from dataclasses import replace
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlamaConfig

from delvm import fit, llama
from delvm.errors import UserError
from delvm.images.annotate import COCO_KEYPOINTS
from delvm.images.sources import held_out, split_samples
from delvm.pretrain import learning_rate_factor
from delvm.recipe import load, to_yaml
from delvm.tokenizer.training import TokenizerConfig, build
from tests.test_published_models import LVM, delvm_state, llama_of, to_bin, write_delvm

RECIPES = Path(__file__).parents[1] / "recipes"
ALL = sorted(RECIPES.glob("*.yaml"))
SIZES = {  # of the paper's recipes: teacher and student
    "pretrain_300m": ("300m", None),
    "pretrain_1b": ("1b", None),
    "distill_1b_to_300m": ("1b", "300m"),
    "distill_1b_to_80m": ("1b", "80m"),
    "distill_1b_to_300m_paper": ("1b", "300m"),
    "distill_1b_to_80m_paper": ("1b", "80m"),
}
PUBLISHED = ["distill_delvm1b_to_80m", "distill_lvm7b_to_300m"]  # of published teachers
PARAMETERS = {"80m": "83,429,888", "300m": "299,504,640", "1b": "1,164,191,744"}
HEIGHT, WIDTH = 24, 40

FOLDERS = {  # what stands for `???` elsewhere
    "pairs": ["tasks.edges.images=photos", "tasks.edges.annotations=drawings"],
    "probe_imagenet": [
        *(f"probe.{split}={split}" for split in ("train", "validation")),
        "probe.models.student=student",
        "tokenizer.folder=tokenizer",
    ],
    "finetune_imagenet": [
        *(f"finetune.{split}={split}" for split in ("train", "validation")),
        "finetune.models.student=student",
    ],
    "finetune_imagenet_384": [
        *(f"finetune.{split}={split}" for split in ("train", "validation")),
        "finetune.models.student=student",
    ],
    "vqgan_64": ["tasks.photos.images=photos"],
    "vqgan_256": ["tasks.photos.images=photos", "tokenizer.perceptual_weights=vgg16.pth"],
    "balance": [
        *(f"tasks.{task}.images=photos" for task in ("colour", "edges", "segmentation")),
        *(f"tasks.{task}.annotations=drawings" for task in ("edges", "segmentation")),
    ],
}


def _stems(pattern, held, trained):
    """Names of which so many fall on the held-out side of a split of one in a hundred, and on the other."""
    names = [pattern.format(number) for number in range(2000)]
    sides = [[name for name in names if held_out(name, 0.01, 0) == side] for side in (True, False)]
    return sides[0][:held] + sides[1][:trained]


def _picture(number, suffix):
    """An encoded photograph, (HEIGHT, WIDTH), of blocks of colour."""
    blocks = np.random.default_rng(number).integers(256, size=(HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(np.kron(blocks, np.ones((8, 8, 1), np.uint8))).save(file, suffix)
    return file.getvalue()


def _write_sa1b(tar):
    with tarfile.open(tar, "w") as out:
        for number, stem in enumerate(_stems("sa_{}", held=1, trained=2)):
            counts = [5 * HEIGHT, 3 * HEIGHT, (WIDTH - 8) * HEIGHT]  # columns 5 to 7
            annotations = [{"segmentation": {"size": [HEIGHT, WIDTH], "counts": counts}}]
            text = json.dumps({"annotations": annotations}).encode()
            for name, content in ((f"{stem}.jpg", _picture(number, "jpeg")), (f"{stem}.json", text)):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                out.addfile(member, io.BytesIO(content))


def _write_coco(folder):
    (folder / "train2017").mkdir()
    keypoints = [
        value for place, _ in enumerate(COCO_KEYPOINTS) for value in (4 + 2 * place, 4 + place % 7, 2)
    ]
    photographs, people = [], []
    for number, stem in enumerate(_stems("{:012}", held=4, trained=4)):
        (folder / "train2017" / f"{stem}.jpg").write_bytes(_picture(100 + number, "jpeg"))
        photographs.append({"id": number, "file_name": f"{stem}.jpg", "height": HEIGHT, "width": WIDTH})
        people.append({"image_id": number, "category_id": 1, "iscrowd": 0, "keypoints": keypoints})
    content = {"images": photographs, "annotations": people}
    (folder / "person_keypoints_train2017.json").write_text(json.dumps(content))


def _write_lmdb(folder, first):
    stems = _stems("rain-{}", held=8, trained=8)
    with lmdb.open(str(folder), map_size=1 << 22) as environment, environment.begin(write=True) as values:
        for number, stem in enumerate(stems):
            values.put(stem.encode(), _picture(first + number, "png"))
    (folder / "meta_info.txt").write_text("".join(f"{s}.png ({HEIGHT},{WIDTH},3) 1\n" for s in stems))


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Overrides that give the paper's recipes tiny data in the true formats, and an untrained tokenizer."""
    root = tmp_path_factory.mktemp("published")
    (root / "sa1b").mkdir()
    _write_sa1b(root / "sa1b" / "sa_000000.tar")
    _write_coco(root)
    for name, first in (("input", 200), ("target", 300)):
        _write_lmdb(root / f"{name}.lmdb", first)
    torch.manual_seed(0)
    build(TokenizerConfig(num_codes=8192, code_dim=4, patch=16, channels=32), 256).save(root / "tokenizer")
    return [
        f"run_dir={root / 'run'}",
        f"tokenizer.folder={root / 'tokenizer'}",
        f"tasks.segmentation.images={root / 'sa1b' / '*.tar'}",
        f"tasks.pose.images={root / 'train2017'}",
        f"tasks.pose.annotations={root / 'person_keypoints_train2017.json'}",
        f"tasks.deraining.images={root / 'input.lmdb'}",
        f"tasks.deraining.annotations={root / 'target.lmdb'}",
    ]


def _header(path):
    """The comment that opens a recipe, one paragraph a word."""
    return path.read_text().partition("\n\n")[0]


# --- every recipe


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_every_recipe_loads_and_loads_again(path, given, tmp_path):
    published = ["teacher.folder=published"] if path.stem in PUBLISHED else []
    of_paper = path.stem in SIZES or published
    recipe = load(path, [*given, *published] if of_paper else FOLDERS.get(path.stem, []))
    assert recipe.name == path.stem
    assert recipe.teacher or recipe.probe or recipe.finetune or path.stem.startswith("vqgan")
    saved = tmp_path / "recipe.yaml"
    saved.write_text(to_yaml(recipe))
    assert load(saved) == recipe


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_every_recipe_says_what_it_is_and_how_it_is_launched(path):
    header = _header(path)
    assert all(line.startswith("# ") for line in header.splitlines())
    assert re.findall(r"^# (\w+)", header, re.M)[:3] == ["What", "Needs", "Launch"]
    assert f"recipes/{path.name}" in header
    assert max(map(len, path.read_text().splitlines())) <= 120


# --- the paper's


@pytest.mark.parametrize("name", SIZES)
def test_what_they_need_is_asked_for(name):
    path = RECIPES / f"{name}.yaml"
    with pytest.raises(UserError, match=r"tasks\.segmentation\.images: missing, give a value"):
        load(path)


@pytest.mark.parametrize(("name", "sizes"), SIZES.items())
def test_they_have_the_papers_settings(name, sizes, given):
    recipe = load(RECIPES / f"{name}.yaml", given)
    assert recipe.data.image_size == 256
    assert (recipe.sentences.pairs, recipe.sentences.specials, recipe.sentences.length) == (4, False, 0)
    assert (recipe.prompting.temperature, recipe.prompting.top_p) == (0.1, 0.75)
    for model, size in zip((recipe.teacher, recipe.student), sizes, strict=True):
        if size is None:
            assert model is None
            continue
        assert (model.size, model.steps, model.batch_size) == (size, 40_000, 128)
        assert (model.beta1, model.beta2, model.weight_decay, model.clip) == (0.9, 0.95, 0.1, 1.0)
        rates = [1.5e-4 * learning_rate_factor(step, 40_000, model) for step in range(40_000)]
        assert model.learning_rate == 1.5e-4
        assert rates[111] == pytest.approx(0.75e-4)
        assert rates.index(max(rates)) == 223  # the last of 224 steps of warm-up
        assert rates[223] == pytest.approx(1.5e-4)
        assert rates[223 + (40_000 - 224) // 2] == pytest.approx(0.825e-4)  # a cosine, half its way
        assert rates[-1] == pytest.approx(1.5e-5)
    if student := recipe.student:
        assert (student.ce_weight, student.kd_weight, student.temperature) == (1, 1, 1)
        assert (student.ce_weight_end, student.kd_weight_end) == (None, None)
        assert (student.divergence, student.kd_on) == ("forward_kl", "all")
        paper = name.endswith("_paper")
        assert (student.start, student.embedding) == (
            ("random", "codebook") if paper else ("slice", "learned")
        )
        assert load(RECIPES / f"{name}.yaml", [*given, "cache.kind=topk"]).cache.kind == "topk"
    assert 128 % (8 * recipe.trainer.accumulate) == 0  # eight GPUs, as the launch line says


def test_sa1b_comes_in_six_crops_and_a_photograph_on_one_side(given):
    recipe = load(RECIPES / "pretrain_1b.yaml", given)
    found = list(split_samples("segmentation", recipe.tasks["segmentation"], seed=0))
    crops = {}
    for split, _, (stem, *_, number) in found:
        crops.setdefault((split, stem), []).append(number)
    assert list(crops.values()) == [[0, 1, 2, 3, 4, 5]] * 3
    assert [split for split, _ in crops] == ["validation", "train", "train"]
    pose = recipe.tasks["pose"]
    assert (pose.policy, pose.draw, pose.radius, pose.thickness) == ("pose", "skeletons", 8, 4)


@pytest.mark.parametrize(("name", "sizes"), SIZES.items())
def test_their_dry_run_states_the_papers_sizes(name, sizes, given, capsys):
    path = RECIPES / f"{name}.yaml"
    accumulate = 8 * load(path, given).trainer.accumulate  # one process with the micro-batches of eight
    assert fit.run(path, [*given, f"trainer.accumulate={accumulate}"], dry_run=True) == 0
    said = capsys.readouterr().out
    assert "segmentation: 12 training, 6 held-out samples; pairs: 8 pictures, 2048 tokens" in said
    assert "rows: 2048 tokens, 8192 codes\n" in said
    for role, size in zip(("teacher", "student"), sizes, strict=True):
        if size:
            line = [role, size, PARAMETERS[size], "40,000", "262,144", "10,485,760,000"]
            assert re.search(" *│ *".join(line), said), role
    # and the memory that the header speaks of
    rows = 128 // accumulate
    assert f"memory a GPU (estimates; 1 process, accumulate {accumulate})" in said
    needs = dict(re.findall(rf"│ (\w[\w, ]*?) +│ +{rows} rows │.*│ +([\d.]+ GiB) │\n", said))
    names = ["teacher", "student, live teacher", "student, cached teacher"]
    assert list(needs) == (names if sizes[1] else names[:1])
    header = _header(path).replace("\n#        ", "")
    own = needs[names[1] if sizes[1] else names[0]]
    assert f"micro-batches of {rows} rows, {own} each" in header
    assert not sizes[1] or f"({needs['teacher']} for the teacher's training)" in header
    checkpointing = "false" if load(path, given).trainer.checkpointing else "true"
    other = [*given, f"trainer.accumulate={accumulate}", f"trainer.checkpointing={checkpointing}"]
    assert fit.run(path, other, dry_run=True) == 0
    said = capsys.readouterr().out
    need = re.search(rf"│ {names[1] if sizes[1] else names[0]} .*│ +([\d.]+ GiB) │\n", said)[1]
    assert f"with trainer.checkpointing={checkpointing} {need}" in header


def test_a_dry_run_in_one_process_says_what_that_takes(given, capsys):
    path = RECIPES / "distill_1b_to_300m.yaml"
    alone = ["tasks.pose=null", "tasks.deraining=null"]
    assert fit.run(path, [*given[:3], *alone, "teacher.batch_size=64"], dry_run=True) == 0
    said = capsys.readouterr().out
    assert "memory a GPU (estimates; 1 process, accumulate 4)" in said
    assert re.search(r"│ teacher +│ +16 rows │", said)
    assert re.search(r"│ student, live teacher +│ +32 rows │", said)
    assert "pose" not in said


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("quickstart", {"start", "learning_rate"}),
        ("distill_1b_to_300m", {"start", "init", "embedding"}),
        ("distill_1b_to_80m", {"start", "init", "embedding"}),
    ],
)
def test_the_papers_own_student_is_a_named_control(name, changed, given):
    ours, paper = (
        vars(load(RECIPES / f"{stem}.yaml", given if name != "quickstart" else []))
        for stem in (name, f"{name}_paper")
    )
    assert {key for key in ours if ours[key] != paper[key]} == {
        "name",
        "student",
        *({"run_dir"} if name == "quickstart" else ()),
    }
    ours, paper = vars(ours["student"]), vars(paper["student"])
    assert {key for key in ours if ours[key] != paper[key]} == changed


# --- published teachers


def _delvm_teacher(folder, monkeypatch):
    """A tiny checkpoint of DeLVM's own format, of two tensor-parallel and two pipeline parts."""
    return write_delvm(
        folder, delvm_state(num_codes=8192), monkeypatch, tensor=2, pipeline=(1, 2), vocab_size=8192
    )


def _lvm_teacher(folder, monkeypatch):
    """A tiny folder as LVM's: pickled shards, 100 ids beyond the codes, LLaMA's special ids 1 and 2."""
    config = LVM.to_diff_dict() | {"vocab_size": 8292, "max_position_embeddings": 4096}
    llama_of(LlamaConfig(**config)).save_pretrained(folder, max_shard_size="400KB")
    to_bin(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "teacher", "ids", "positions"),
    [
        ("distill_delvm1b_to_80m", _delvm_teacher, (8192, None, None), 2048),
        ("distill_lvm7b_to_300m", _lvm_teacher, (8292, 8192, 8291), 3586),
    ],
)
def test_a_published_teacher_distils_by_its_recipe(
    name, teacher, ids, positions, given, tmp_path, monkeypatch
):
    run, folder = tmp_path / "run", teacher(tmp_path / "teacher", monkeypatch)
    # what is cut from these teachers, with the rest of the recipe's own size
    size = load(RECIPES / f"{name}.yaml", [*given, f"teacher.folder={folder}"]).student.size
    tiny = replace(llama.SIZES[size], hidden=16, intermediate=32, layers=1, heads=2)
    monkeypatch.setitem(llama.SIZES, "cut", tiny)
    small = ["student.size=cut", "student.steps=2", "student.batch_size=1", "trainer.accumulate=1",
             "trainer.num_workers=0", "sentences.validation=1", "prompting.pictures=1", "prompting.queries=0",
             "tasks.pose=null", "tasks.segmentation=null"]  # fmt: skip
    overrides = [*given, f"run_dir={run}", f"teacher.folder={folder}", "trainer.accelerator=cpu", *small]
    overrides = [entry for entry in overrides if not entry.startswith(("tasks.pose.", "tasks.segmentation."))]
    assert fit.run(RECIPES / f"{name}.yaml", overrides) == 0
    for model in ("student", "export"):
        config = llama.load_config(run / model)
        assert (config.vocab_size, config.bos_token_id, config.eos_token_id) == ids
        assert config.max_position_embeddings == positions
    [*_, last] = json.loads((run / "student" / "curve.json").read_text())
    assert last["step"] == 2
    assert 0 < last["kd"] < 20
    assert [path.name for path in (run / "evaluate" / "pictures").iterdir()] == ["deraining"]


# --- tasks that are left out


def test_a_task_that_is_null_is_left_out_with_all_that_it_needs(given):
    path = RECIPES / "pretrain_300m.yaml"
    whole = load(path, given)
    alone = load(path, [*given[:3], "tasks.pose=null", "tasks.deraining=null"])
    assert list(alone.tasks) == ["segmentation"]
    assert alone.tasks["segmentation"] == whole.tasks["segmentation"]
    whole.tasks = alone.tasks
    assert alone == whole


MANY = """
tasks:
  pose: {scene: pose, samples: 5, validation_samples: 2}
  edges: {images: "???", annotations: b}
  grey: null
balance: {shares: {pose: 2, edges: 3}}
sentences: {kinds: {edges: pairs}, shots: {edges: 3, pose: 4}}
teacher: {size: tiny}
student:
  {size: micro, task_ce_weights: {edges: 2}, task_kd_weights: {edges: 2}, task_temperatures: {edges: 2}}
"""


@pytest.fixture
def many(tmp_path):
    path = tmp_path / "many.yaml"
    path.write_text(MANY)
    return path


def test_what_a_recipe_says_elsewhere_of_a_task_goes_with_it(many):
    recipe = load(many, ["tasks.edges=null"])
    assert list(recipe.tasks) == ["pose"]
    assert recipe.balance.shares == {"pose": 2}
    assert (recipe.sentences.kinds, recipe.sentences.shots) == ({}, {"pose": 4})
    student = recipe.student
    assert student.task_ce_weights == student.task_kd_weights == student.task_temperatures == {}


def test_the_last_word_on_a_task_counts(many):
    edges = "tasks.edges.images=a"
    assert list(load(many, [edges]).tasks) == ["pose", "edges"]  # null in the file
    assert list(load(many, [edges, "tasks.edges=null"]).tasks) == ["pose"]
    assert list(load(many, ["tasks.edges=null", edges]).tasks) == ["pose", "edges"]
    back = load(many, ["tasks.edges=null", "tasks.grey.images=a", "tasks.grey.annotations=b"])
    assert list(back.tasks) == ["pose", "grey"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tasks.pos=null"], r"override: tasks.pos: no such task to leave out; tasks: pose, edges, grey$"),
        (["tasks.edges=null", "tasks.pose=null"], r"many.yaml: tasks: none; a recipe needs at least one"),
        (["tasks.edges=null", "balance.shares.edges=2"], "balance.shares.edges: no such task; tasks: pose$"),
        (["tasks.pose=null"], "tasks.edges.images: missing"),
    ],
)
def test_what_cannot_be_left_out(many, overrides, message):
    with pytest.raises(UserError, match=message):
        load(many, overrides)
