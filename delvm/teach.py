"""Material and a teacher on disk -> trained models."""

import json
from pathlib import Path

import pytorch_lightning as pl
from torch.utils.data import Dataset
from transformers import LlamaForCausalLM

from delvm import llama, ranks
from delvm.callbacks import CHECKPOINT
from delvm.distill.cache import CacheConfig, Cached, CachedRows, open_cache, weights_hash, write_cache
from delvm.distill.module import Distill
from delvm.distill.slice import slice_embedding, slice_student
from delvm.distill.teacher import Live, Signal
from delvm.material import Material
from delvm.pretrain import Pretrain
from delvm.recipe import Recipe
from delvm.stages import write_atomic
from delvm.tokens.online import Encode, OnlineSentences
from delvm.tokens.rows import TrainingSentences
from delvm.training import TrainerConfig, discard_checkpoint, set_up_model, train


def seed_of(recipe: Recipe, role: str) -> int:
    """Of a model's first weights and of its rows; the student and its control share theirs."""
    return recipe.seed if role == "teacher" else recipe.seed + 1


def new_model(material: Material, role: str) -> LlamaForCausalLM:
    """An untrained model; the scratch control is the student's."""
    given = material.given
    config = given.training_config(role)
    return llama.initialise(
        given.model_config(role, material.plan.positions),
        seed=seed_of(given.recipe, role),
        scheme=config.init,
        embedding=config.embedding,
        codebook=None if config.embedding == "learned" else material.tokenizer().codebook,
    )


def first_weights(material: Material) -> LlamaForCausalLM:
    """The student before its first step, as `student.start` says."""
    config, folder = material.recipe.student, material.run_dir / "teacher"
    assert config is not None
    if config.start == "checkpoint":
        return llama.load(config.start_folder).float().train()
    model = new_model(material, "student")
    if config.start == "random":
        return model
    rows = rows_of(material, "student")
    number = min(len(rows), -(-config.start_tokens // rows.length))
    batch = rows.__getitems__(range(number))
    sentences, positions = batch["tokens"], batch.get("positions")
    teacher = llama.load(folder).float().to(material.recipe.trainer.device())
    if config.start == "slice":
        return slice_student(
            teacher, model.config, sentences, positions=positions, layers=config.start_layers
        )
    seed = seed_of(material.recipe, "student")
    return slice_embedding(teacher, model.config, sentences, seed, positions=positions)


def rows_of(material: Material, role: str) -> TrainingSentences:
    """The rows that a role is trained on; the scratch control's are the student's."""
    config = material.given.training_config(role)
    return material.rows(config.steps * config.batch_size, seed_of(material.recipe, role))


def live_teacher(material: Material, *, sharded: bool = False) -> Live:
    """The run's teacher, frozen. `sharded`: only where all processes ask it equally often."""
    return Live(
        llama.load(material.run_dir / "teacher"),
        precision=material.given.teacher_precision,
        compile=material.recipe.trainer.compile,
        sharded=sharded,
    )


def cache_teacher(material: Material, teacher: Live, config: CacheConfig, folder: Path) -> None:
    """Write into `folder` what the teacher says of the student's rows."""
    recipe, student = material.recipe, material.recipe.student
    assert student is not None
    write_cache(
        folder,
        rows_of(material, "student"),
        teacher,
        config,
        temperature=student.temperature,
        seed=recipe.seed,
        batch_size=student.batch_size // (ranks.world() * recipe.trainer.accumulate),
        device=recipe.trainer.device(),
        teacher_hash=weights_hash(material.run_dir / "teacher"),
        tokenizer_hash=material.tokenizer().hash,
    )


def cached(material: Material, folder: Path) -> tuple[Cached, CachedRows]:
    """The teacher's signal as it stands in `folder`, and the student's rows that bring it along."""
    student = material.recipe.student
    assert student is not None
    cache = open_cache(
        folder,
        teacher=weights_hash(material.run_dir / "teacher"),
        tokenizer=material.tokenizer().hash,
        temperature=student.temperature,
    )
    return Cached(cache), CachedRows(rows_of(material, "student"), cache)


def teach_student(material: Material, folder: Path, cache: Path | None) -> None:
    """Train the student in `folder`, from the teacher itself or from its cache."""
    config = material.recipe.student
    assert config is not None
    signal: Signal
    rows: TrainingSentences | CachedRows
    if cache:
        signal, rows = cached(material, cache)
    else:
        signal = live_teacher(material, sharded=config.teacher_sharded)
        rows = rows_of(material, "student")
    model = new_model(material, "student")
    # of several processes all take the weights of the first, as those of a run that goes on are replaced
    if ranks.is_first() and not (folder / CHECKPOINT).exists():
        model = first_weights(material)
    ranks.barrier()
    module = Distill(model, signal, config, material.tasks, material.given.num_codes)
    train_model(material, "student", module, rows, folder)


def train_model(
    material: Material, role: str, module: Pretrain, rows: TrainingSentences | CachedRows, folder: Path
) -> None:
    """Train a role's model on `rows` in `folder` and save it there as a transformers folder."""
    recipe, config = material.recipe, material.given.training_config(role)
    dataset: Dataset = rows
    if recipe.balance.online:
        assert isinstance(rows, TrainingSentences)
        dataset = OnlineSentences(rows, material.views("train"))
        module.prepare = Encode(rows, material.tokenizer(), recipe.tokens)
    set_up_model(module.model, recipe.trainer)
    pl.seed_everything(seed_of(recipe, role), verbose=False)
    train_and_log(
        role, module, dataset, recipe.trainer, steps=config.steps, batch_size=config.batch_size,
        clip=module.config.clip, folder=folder, run_dir=material.run_dir,
    )  # fmt: skip
    if ranks.is_first():
        llama.save(module.model.cpu(), folder, num_codes=material.given.num_codes)
        discard_checkpoint(folder)


def train_and_log(
    name: str,
    module: pl.LightningModule,
    dataset: Dataset,
    config: TrainerConfig,
    *,
    steps: int,
    batch_size: int,
    clip: float,
    folder: Path,
    run_dir: Path,
) -> None:
    """`train`, with its curve as `curve.json` and its events in the run's TensorBoard."""
    curve = train(
        module, dataset, name=name, steps=steps, batch_size=batch_size, clip=clip, config=config,
        folder=folder, tensorboard=run_dir / "tensorboard",
    )  # fmt: skip
    if ranks.is_first():
        write_atomic(folder / "curve.json", json.dumps(curve))
