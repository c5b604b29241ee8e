"""The command as a user meets it: status, one line for what is wrong, nothing half-written, going on."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from delvm import fit, llama
from delvm.images.listing import Entries
from tests.processes import PATIENCE, launched
from tests.test_features import write_classes

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[1]


def command(*arguments, program=("-m", "delvm.fit")):
    """A process of its own, as a shell starts it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
    )


def contents(folder):
    """Every file below a folder with its bytes; None where there is no folder."""
    if not folder.is_dir():
        return None
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(capfd, recipe, *overrides, run_dir=None):
    """The one line that a refused run prints; checks status and that nothing was written."""
    run_dir = run_dir or recipe.parent / "run"
    before = contents(run_dir)
    capfd.readouterr()
    assert fit.main([str(recipe), f"run_dir={run_dir}", *overrides]) == 2
    assert contents(run_dir) == before
    # a progress bar may stand above the line
    line = capfd.readouterr().err.rstrip("\n").split("\n")[-1].split("\r")[-1]
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def test_help_says_enough(capsys):
    with pytest.raises(SystemExit) as stop:
        fit.main(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    for word in (
        "recipes/quickstart.yaml",
        "key=value",
        "--dry-run",
        "run_dir",
        "goes on where it was stopped",
    ):
        assert word in said


def test_no_recipe_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as stop:
        fit.main([])
    assert stop.value.code == 2
    assert "recipe" in capsys.readouterr().err


# --- what is wrong in the recipe ---


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("studnet.steps=3", "override: unknown key 'studnet'; nearest: student"),
        ("student.temprature=2", "override: unknown key 'student.temprature'; nearest: student.temperature"),
        ("student.steps=???", "override: student.steps: missing, give a value"),
        ("tasks.grey.images=???", "override: tasks.grey.images: missing, give a value"),
        (
            "student.steps=many",
            "override: student.steps: Value 'many' of type 'str' could not be converted to Integer",
        ),
        ("student.steps=0", "{recipe}: student.steps: 0 must be at least 1"),
        (
            "balance.strategy=more",
            "{recipe}: balance.strategy: 'more' is unknown; choices: none, resample, augment, mixture",
        ),
        (
            "student.divergence=kl",
            "{recipe}: student.divergence: 'kl' is unknown; choices: forward_kl",
        ),
        ("tasks.pose.scene=dance", "{recipe}: tasks.pose.scene: 'dance' is unknown; choices: "),
        ("nonsense", "'nonsense': an override is key=value, such as teacher.steps=100"),
    ],
)
def test_a_wrong_recipe(capfd, micro, override, line):
    assert refused(capfd, micro, override).startswith(line.format(recipe=micro))


def test_a_recipe_that_is_not_there(capfd, tmp_path):
    assert refused(capfd, tmp_path / "none.yaml") == f"{tmp_path}/none.yaml: no such recipe"


# --- what is wrong in the data ---


def test_a_missing_folder(capfd, micro, pairs):
    shutil.rmtree(pairs / "annotations")
    assert refused(capfd, micro) == f"tasks.grey.annotations: no folder '{pairs}/annotations'"


def test_an_image_without_annotation(capfd, micro, pairs):
    (pairs / "annotations" / "7.png").unlink()
    assert refused(capfd, micro) == f"tasks.grey: image without annotation: {pairs}/images/7.jpg"


def test_an_empty_task(capfd, micro, pairs):
    for file in (pairs / "images").iterdir():
        file.unlink()
    line = refused(capfd, micro)
    assert line == f"tasks.grey.images: no pictures (.jpg, .jpeg, .png) in '{pairs}/images'"


@pytest.mark.parametrize("content", [b"", b"no picture", "half"])
def test_an_unreadable_picture(capfd, micro, pairs, content):
    file = pairs / "images" / "5.jpg"
    if content == "half":
        whole = file.read_bytes()
        content = whole[: len(whole) // 2]
    file.write_bytes(content)
    line = refused(capfd, micro)
    assert line.startswith(f"{file}: unreadable picture (")
    assert line.endswith("; data.unreadable=skip leaves such samples out")
    # a dry run says the same
    assert refused(capfd, micro, "--dry-run") == line


def test_unreadable_pictures_skipped(capfd, micro, pairs):
    (pairs / "images" / "5.jpg").write_bytes(b"no picture")
    overrides = ["data.unreadable=skip", "student=null", "scratch=null", "teacher=null", "tokenizer.steps=1"]
    run_dir = micro.parent / "run"
    assert fit.main([str(micro), f"run_dir={run_dir}", *overrides]) == 0
    assert f"left out: {pairs}/images/5.jpg: unreadable picture" in capfd.readouterr().out
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert {task: entry["skipped"] for task, entry in metrics["data"].items()} == {
        "segmentation": 0, "pose": 0, "grey": 1,
    }  # fmt: skip
    splits = ("train", "validation")
    names = [name for split in splits for name, *_ in Entries(run_dir / "data" / f"grey.{split}")]
    assert sorted(names) == [str(number) for number in range(10) if number != 5]


def test_a_picture_trained_on_and_held_out(capfd, micro, pairs):
    line = refused(
        capfd,
        micro,
        f"tasks.grey.validation_images={pairs}/images",
        f"tasks.grey.validation_annotations={pairs}/annotations",
    )
    assert line == (
        "tasks.grey: no training samples left, all are held out too:"
        " tasks.grey: '0' is nearly '0' held out by tasks.grey"
    )


def test_a_picture_gone_bad_leaves_a_finished_run_as_it_was(capfd, finished, micro, pairs):
    run_dir = micro.parent / "run"
    shutil.copytree(finished / "run", run_dir)
    (pairs / "images" / "5.jpg").write_bytes(b"no picture")
    assert refused(capfd, micro, "seed=3").startswith(f"{pairs}/images/5.jpg: unreadable picture (")


def test_too_few_held_out_pictures(capfd, micro):
    line = refused(capfd, micro, "tasks.pose.validation_samples=1")
    assert line == "tasks.pose: 1 held-out samples, a sentence shows 2"
    assert refused(capfd, micro, "tasks.pose.validation_samples=1", "--dry-run") == line


def test_views_that_the_cap_cuts_are_said(micro, capfd):
    assert fit.main([str(micro), "balance.max_views=2", "--dry-run"]) == 0
    assert "tasks.pose: 3 views wanted, cut by balance.max_views" in capfd.readouterr().out


# --- what is wrong in the run folder ---


def test_a_run_folder_that_cannot_be_made(capfd, micro, pairs):
    file = pairs / "images" / "0.jpg"
    assert refused(capfd, micro, run_dir=file / "run") == f"{file}/run: Not a directory"


def test_a_run_of_another_machine_can_be_gone_on_with(finished, tmp_path, capsys):
    run_dir = tmp_path / "run"
    shutil.copytree(finished / "run", run_dir)
    saved = run_dir / "recipe.yaml"
    saved.write_text(saved.read_text().replace("accelerator: cpu", "accelerator: gpu") + "gone_key: 1\n")
    assert fit.main([str(finished / "micro.yaml"), f"run_dir={run_dir}"]) == 0
    assert "done in" not in capsys.readouterr().out


def test_a_damaged_recipe_in_the_run_folder(capfd, finished, tmp_path):
    (tmp_path / "recipe.yaml").write_text("[")
    line = refused(capfd, finished / "micro.yaml", run_dir=tmp_path)
    assert line.startswith(f"{tmp_path}/recipe.yaml: not readable as YAML: ")


def test_a_run_folder_of_another_recipe(capfd, finished, micro):
    other = micro.rename(micro.parent / "other.yaml")
    run_dir = finished / "run"
    before = sorted(run_dir.rglob("*"))
    assert refused(capfd, other, run_dir=run_dir) == (
        f"run_dir: '{run_dir}' belongs to recipe 'micro', this one is 'other'; choose another run_dir"
    )
    assert sorted(run_dir.rglob("*")) == before


def test_a_folder_that_is_no_run(capfd, micro, pairs):
    line = refused(capfd, micro, run_dir=pairs)
    assert line == f"run_dir: '{pairs}' is not empty and holds no run; choose another run_dir"
    assert {path.name for path in pairs.iterdir()} == {"images", "annotations"}


def test_a_file_in_the_place_of_the_run_folder(capfd, micro, pairs):
    file = pairs / "images" / "0.jpg"
    assert refused(capfd, micro, run_dir=file) == f"run_dir: '{file}' is a file"


def test_a_teacher_with_another_vocabulary(capfd, finished, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(finished / "run", run_dir)
    llama.save(llama.build("micro", 40, 66, bos=16, eos=17, seed=0), run_dir / "teacher")
    student = contents(run_dir / "student")
    assert fit.main([str(finished / "micro.yaml"), f"run_dir={run_dir}", "student.kd_weight=2"]) == 2
    assert capfd.readouterr().err.split("\n")[-2] == (
        "error: student: vocabulary of 18 ids, the teacher's has 40;"
        " both must speak the codes of one tokenizer"
    )
    assert contents(run_dir / "student") == student  # the old one is whole


def test_a_collapsed_tokenizer(capfd, micro):
    assert fit.main([str(micro), f"run_dir={micro.parent / 'run'}", "tokenizer.min_psnr=59"]) == 2
    line = capfd.readouterr().err.rstrip("\n").split("\n")[-1]
    assert line.startswith("error: the tokenizer")
    assert "min_psnr" in line
    # its training is kept: where less is asked of it, the same command goes on
    assert not (micro.parent / "run" / "tokens").exists()
    before = contents(micro.parent / "run" / "tokenizer")
    assert fit.main([str(micro), f"run_dir={micro.parent / 'run'}", "tokenizer.min_psnr=58"]) == 2
    assert contents(micro.parent / "run" / "tokenizer") == before
    assert fit.main([str(micro), f"run_dir={micro.parent / 'run'}"]) == 0
    assert contents(micro.parent / "run" / "tokenizer") == before


# --- a full disk ---


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 300 KB; needs the right to mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    made = mount and subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=300k", "tmpfs", folder], capture_output=True, check=False
    )
    if not made or made.returncode:
        pytest.skip("mounting a small disk is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk(capfd, micro, small_disk):
    run_dir = small_disk / "run"
    assert fit.main([str(micro), f"run_dir={run_dir}"]) == 2
    line = capfd.readouterr().err.rstrip("\n").split("\n")[-1]
    assert line == (
        f"error: run_dir: no space left on the disk of '{run_dir}'; free some, the same command goes on"
    )
    for stage in (path for path in run_dir.iterdir() if path.is_dir() and path.name != "tensorboard"):
        assert stage.name.startswith(".") or (stage / "stage.json").is_file()  # whole, or not there


def test_what_counts_as_a_full_disk(tmp_path):
    assert fit.disk_full(OSError(errno.ENOSPC, "no"), tmp_path)
    assert fit.disk_full(RuntimeError("I/O error: No space left on device (os error 28)"), tmp_path)
    wrapped = RuntimeError("saving failed")
    wrapped.__cause__ = OSError(errno.ENOSPC, "no")
    assert fit.disk_full(wrapped, tmp_path)
    # torch says no more than this; here the disk has room
    assert not fit.disk_full(RuntimeError("unexpected write error"), tmp_path / "not" / "there")
    assert not fit.disk_full(OSError(errno.EIO, "no"), tmp_path)
    assert not fit.disk_full(None, tmp_path)


def test_what_is_our_own_mistake_keeps_its_traceback(micro, monkeypatch):
    def broken(*_):
        raise RuntimeError("ours")

    monkeypatch.setattr(torch.Tensor, "backward", broken)
    with pytest.raises(RuntimeError, match=r"^ours$"):
        fit.main([str(micro), f"run_dir={micro.parent / 'run'}"])


# --- stopping and going on ---


def stop_when(process, file, number):
    """Send a signal as soon as a file is there; returns what the process printed."""
    deadline = time.monotonic() + PATIENCE
    try:
        while not file.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert process.poll() is None, process.communicate()
        process.send_signal(number)
        out, error = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()  # one that hangs is not left behind
    return out, error


@pytest.mark.parametrize(
    ("number", "stage"), [(signal.SIGTERM, "student"), (signal.SIGINT, "tokenizer")], ids=str
)
def test_a_stopped_run_goes_on_to_the_same_result(finished, tmp_path, number, stage):
    recipe, run_dir = finished / "micro.yaml", tmp_path / "run"
    # long enough to be caught in the middle; the stages before are taken over from the finished run
    for folder in (run_dir, tmp_path / "whole"):
        shutil.copytree(finished / "run", folder)
    steps = f"{stage}.steps=80"
    process = command(recipe, f"run_dir={run_dir}", steps)
    _, error = stop_when(process, run_dir / f".{stage}.partial" / "last.ckpt", number)
    assert process.returncode == 130
    last = error.rstrip("\n").split("\n")[-1]
    assert last.startswith(f"{stage}: stopped at step ")
    assert last.endswith(" of 80; the same command goes on from here")
    assert "Traceback" not in error
    assert fit.main([str(recipe), f"run_dir={run_dir}", steps]) == 0
    assert fit.main([str(recipe), f"run_dir={tmp_path / 'whole'}", steps]) == 0
    stopped, whole = (
        json.loads((folder / "metrics.json").read_text()) for folder in (run_dir, tmp_path / "whole")
    )
    assert stopped["evaluate"] == whole["evaluate"]
    assert stopped["tokenizer"] == whole["tokenizer"]
    for role in ("teacher", "scratch", "student"):
        curves = [(folder / role / "curve.json").read_text() for folder in (run_dir, tmp_path / "whole")]
        assert curves[0] == curves[1]


def test_stopped_outside_of_training(finished, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(finished / "run", run_dir)
    process = command(finished / "micro.yaml", f"run_dir={run_dir}", "sentences.validation=20000")
    _, error = stop_when(process, run_dir / ".evaluate.partial" / "stage.json", signal.SIGTERM)
    assert process.returncode == 130
    assert error.rstrip("\n").split("\n")[-1] == "stopped; the same command goes on from here"
    assert (run_dir / "student" / "model.safetensors").is_file()


# --- several processes ---


def test_of_several_processes_one_says_what_is_wrong(micro, pairs, capfd):
    (pairs / "images" / "5.jpg").write_bytes(b"no picture")
    arguments = [str(micro), f"run_dir={micro.parent / 'run'}"]
    # an unknown key, which all notice, and a picture, which the first alone reads
    for overrides in (["studnet.steps=3"], []):
        assert launched(lambda given=overrides: fit.main([*arguments, *given])) == [2, 1]
        lines = [line for line in capfd.readouterr().err.split("\n") if line.startswith("error: ")]
        assert len(lines) == 1
    assert lines[0].startswith(f"error: {pairs}/images/5.jpg: unreadable picture")
    assert not (micro.parent / "run").exists()


def test_a_dry_run_of_several_processes(micro, capfd):
    assert launched(lambda: fit.main([str(micro), f"run_dir={micro.parent / 'run'}", "--dry-run"])) == [0, 0]
    assert capfd.readouterr().out.count("export: to do") == 1


def test_torchrun_stops_and_goes_on(finished, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(finished / "run", run_dir)
    recipe, short = finished / "micro.yaml", ["student.steps=60", "scratch=null"]
    launcher = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "delvm.fit"
    process = command(recipe, f"run_dir={run_dir}", *short, program=launcher)
    _, error = stop_when(process, run_dir / ".student.partial" / "last.ckpt", signal.SIGTERM)
    lines = [line for line in error.split("\n") if "the same command goes on from here" in line]
    assert len(lines) == 1
    assert lines[0].startswith("student: stopped at step ")
    assert fit.main([str(recipe), f"run_dir={run_dir}", *short]) == 0
    curve = json.loads((run_dir / "student" / "curve.json").read_text())
    assert [point["step"] for point in curve] == list(range(2, 61, 2))


# --- a probe of given models ---


@pytest.fixture
def probing(finished, tmp_path):
    """Folders of classes, and the overrides with which the recipe for ImageNet reads them."""
    write_classes(tmp_path / "train", {"ant": 7, "bee": 7})
    write_classes(tmp_path / "val", {"ant": 3, "bee": 2})
    run = finished / "run"
    return [
        f"probe.train={tmp_path / 'train'}", f"probe.validation={tmp_path / 'val'}",
        f"probe.models.student={run / 'student'}", f"probe.models.scratch={run / 'scratch'}",
        f"tokenizer.folder={run / 'tokenizer'}", "probe.layers=[1,2]", "probe.epochs=2",
        "trainer.num_workers=0", "trainer.precision=32-true", "trainer.accelerator=cpu",
    ]  # fmt: skip


def test_the_recipe_for_imagenet_probes_any_classes(probing, tmp_path, capfd):
    recipe, run_dir = ROOT / "recipes" / "probe_imagenet.yaml", f"run_dir={tmp_path / 'run'}"
    assert (
        fit.main([str(recipe), run_dir, *probing, "probe.timm=[timm/vit_tiny_patch16_224]", "--dry-run"]) == 0
    )
    said = capfd.readouterr().out
    assert "random, timm/vit_tiny_patch16_224" in said.replace("\n", " ")
    assert "probe: 14 training, 5 held-out pictures of 2 classes; student, scratch, tokens" in said
    assert "probe: to do" in said
    assert not (tmp_path / "run").exists()
    assert fit.main([str(recipe), run_dir, *probing]) == 0
    said = capfd.readouterr().out
    assert "probe: 5 held-out pictures of 2 classes" in said
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"recipe.yaml", "probe", "features", "metrics.json", "report.html", "tensorboard"}
    rows = json.loads((tmp_path / "run" / "probe" / "metrics.json").read_text())["models"]
    assert list(rows) == ["student", "scratch", "random", "tokens", "pixels", "codebook"]
    assert {kind for kinds in rows.values() for kind in kinds} == {"ridge", "nearest", "linear"}
    assert fit.main([str(recipe), run_dir, *probing]) == 0
    assert "probe: unchanged, reused" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        ("empty", "probe.train: no pictures (.jpg, .jpeg, .png) in '{0}/train/cat'"),
        ("strange", "probe.validation: '{0}/val' has class 'cat', which the training pictures have not"),
        ("broken", "{0}/val/bee/1.png: unreadable picture (not a picture)"),
        ("folder", "probe.models.student: {0}/none: no such folder"),
        ("codes", "probe.models.student: num_codes: 16, the model has 8 ids"),
        ("timm", "probe.timm: 'resnt18' is no pretrained model of timm; nearest: resnet18"),
        ("many", "probe.models.student: was trained on 256 codes, the tokenizer has 16 codes"),
    ],
)
def test_a_probe_that_cannot_be(probing, tmp_path, capfd, damage, line):
    if damage == "empty":
        (tmp_path / "train" / "cat").mkdir()
    elif damage == "strange":
        write_classes(tmp_path / "val", {"cat": 1})
    elif damage == "broken":
        (tmp_path / "val" / "bee" / "1.png").write_bytes(b"no picture")
    elif damage == "codes":
        llama.save(llama.build("micro", 8, 32), tmp_path / "few")
    elif damage == "many":
        llama.save(llama.build("micro", 258, 32), tmp_path / "many", num_codes=256)
    models = {"folder": "none", "codes": "few", "many": "many"}
    more = [f"probe.models.student={tmp_path / models[damage]}"] if damage in models else []
    more += ["probe.timm=[resnet18.a1_in1k,resnt18]"] * (damage == "timm")
    recipe = ROOT / "recipes" / "probe_imagenet.yaml"
    assert fit.main([str(recipe), f"run_dir={tmp_path / 'run'}", *probing, *more]) == 2
    said = capfd.readouterr().err.rstrip("\n").split("\n")[-1].split("\r")[-1]
    assert said.startswith("error: " + line.format(tmp_path))
    assert (tmp_path / "run").exists() == (damage == "broken")  # what was read is kept
