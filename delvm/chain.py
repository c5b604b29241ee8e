"""Recipe -> its stages, in the order of the data flow: images to a distilled, evaluated student."""

import json
import shutil
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from delvm import console, llama, ranks
from delvm import recipe as recipes
from delvm.distill.cache import Cached, CachedRows, open_cache, weights_hash, write_cache
from delvm.distill.module import Distill
from delvm.distill.teacher import Live
from delvm.errors import UserError
from delvm.evaluate import likelihood, prompting
from delvm.export import export
from delvm.generation import complete
from delvm.images.sources import SPLITS, Views, fingerprint, index_data, open_sources
from delvm.images.tasks import TOKEN_SOURCES, TaskConfig
from delvm.plan import Plan, check_plan, make_plan
from delvm.pretrain import Pretrain, PretrainConfig
from delvm.recipe import Recipe
from delvm.stages import Stage, run_stage, write_atomic
from delvm.tokenizer import Tokenizer
from delvm.tokenizer import training as tokenizer_training
from delvm.tokens import lines, sentences
from delvm.tokens.balance import TaskPlan
from delvm.tokens.encoding import write_store
from delvm.tokens.online import Encode, OnlineSentences
from delvm.tokens.rows import TrainingSentences
from delvm.tokens.store import TokenStore, open_store
from delvm.training import (
    Shuffled,
    TrainerConfig,
    check_batch_size,
    discard_checkpoint,
    set_up_model,
    train,
)

ROLES = ("teacher", "scratch", "student")


class Run:
    """One recipe in one run folder: the chain of stages and what they hand on."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.dir = Path(recipe.run_dir)
        self.keys: dict[str, str] = {}
        self.metrics: dict[str, dict] = {}
        self.manifest: dict[str, dict] = {}
        self.listed = self.dir / "data"
        self.plan: Plan

    # --- the arrows, in the order of the data flow; each writes into the folder it is given ---

    def data(self, folder: Path) -> dict:
        """Images -> the list of readable samples."""
        manifest = self.index(folder)
        write_atomic(folder / "manifest.json", json.dumps(manifest, indent=1))
        return {
            task: {key: len(entry[key]) for key in ("skipped", "dropped")} for task, entry in manifest.items()
        }

    def tokenizer(self, folder: Path) -> dict:
        """The training pictures -> a tokenizer."""
        recipe, config = self.recipe, self.recipe.tokenizer
        tokenizer = self.given_tokenizer
        if tokenizer is None:
            views: ConcatDataset = ConcatDataset(self.views("train").values())
            pl.seed_everything(recipe.seed, verbose=False)
            module = tokenizer_training.TokenizerTraining(config, recipe.data.image_size)
            samples = max(1, config.batch_size // max(entry["pictures"] for entry in self.manifest.values()))
            # its codes are moving averages over whole batches
            plain = replace(recipe.trainer, accumulate=1, averaging=0.0)
            self.train("tokenizer", module, Shuffled(views, config.steps * samples, recipe.seed),
                       config.steps, samples, clip=1.0, folder=folder, config=plain)  # fmt: skip
            tokenizer = module.finish()
        if not ranks.is_first():
            return {}
        metrics: dict = {}
        if held_out := self.views("validation"):  # else all tasks come as tokens
            pictures: ConcatDataset = ConcatDataset(held_out.values())
            sample = Shuffled(pictures, min(len(pictures), 512), recipe.seed + 1)
            metrics = tokenizer_training.measure(
                tokenizer.to(recipe.trainer.device()),
                DataLoader(sample, batch_size=64, collate_fn=sample.collate),
            )
        if self.given_tokenizer is None:
            tokenizer_training.check(metrics, config)
        tokenizer.cpu().save(folder)
        discard_checkpoint(folder)
        return metrics

    def tokens(self, folder: Path) -> dict:
        """Pairs and views -> token grids."""
        recipe = self.recipe
        tokenizer = Tokenizer.load(self.dir / "tokenizer").to(recipe.trainer.device())
        views = {split: self.views(split, once=recipe.balance.online) for split in SPLITS}
        write_store(folder, tokenizer, recipe.tasks, self.manifest, views, seed=recipe.seed,
                    num_workers=recipe.trainer.num_workers,
                    rank=ranks.rank(), world=ranks.world())  # fmt: skip
        return {}

    def teacher(self, folder: Path) -> dict:
        """Visual sentences -> the teacher."""
        config = self.recipe.teacher
        assert config is not None
        if config.folder:
            if ranks.is_first():
                llama.save(llama.load(config.folder), folder)
            return {}
        model = self.new_model("teacher", self.recipe.seed)
        module = Pretrain(model, config, config.steps, self.tasks)
        rows = self.rows(config.steps * config.batch_size, self.recipe.seed)
        return self.train_model("teacher", module, rows, config, self.recipe.seed, folder)

    def cache(self, folder: Path) -> dict:
        """The teacher and the student's sentences -> what the teacher says of them."""
        recipe, config, student = self.recipe, self.recipe.cache, self.recipe.student
        assert config is not None
        assert student is not None
        write_cache(
            folder,
            self.rows(student.steps * student.batch_size, recipe.seed + 1),
            self.live_teacher(),
            config,
            temperature=student.temperature,
            seed=recipe.seed,
            batch_size=student.batch_size // (ranks.world() * recipe.trainer.accumulate),
            device=recipe.trainer.device(),
            teacher_hash=weights_hash(self.dir / "teacher"),
            tokenizer_hash=Tokenizer.load(self.dir / "tokenizer").hash,
            rank=ranks.rank(),
            world=ranks.world(),
        )
        return {}

    def scratch(self, folder: Path) -> dict:
        """Visual sentences -> the student's control: same start, sentences and steps, no teacher."""
        config, student = self.recipe.scratch, self.recipe.student
        assert config is not None
        assert student is not None
        seed = self.recipe.seed + 1
        module = Pretrain(self.new_model("scratch", seed), config, student.steps, self.tasks)
        rows = self.rows(student.steps * student.batch_size, seed)
        return self.train_model("scratch", module, rows, student, seed, folder)

    def student(self, folder: Path) -> dict:
        """Visual sentences and the teacher -> the student."""
        config, seed = self.recipe.student, self.recipe.seed + 1
        assert config is not None
        plain = self.rows(config.steps * config.batch_size, seed)
        if self.recipe.cache:
            cache = open_cache(
                self.dir / "cache",
                teacher=weights_hash(self.dir / "teacher"),
                tokenizer=Tokenizer.load(self.dir / "tokenizer").hash,
                temperature=config.temperature,
            )
            signal: Live | Cached = Cached(cache)
            rows: TrainingSentences | CachedRows = CachedRows(plain, cache)
        else:
            signal, rows = self.live_teacher(), plain
        model = self.new_model("student", seed)
        module = Distill(model, signal, config, self.tasks, self.num_codes)
        return self.train_model("student", module, rows, config, seed, folder)

    def evaluate(self, folder: Path) -> dict:
        """Models -> their scores on held-out sentences, and the annotations they generate."""
        recipe = self.recipe
        device = recipe.trainer.device()
        tokenizer = Tokenizer.load(self.dir / "tokenizer").to(device)
        store = open_store(self.dir / "tokens", tokenizer=tokenizer.hash)
        count = recipe.sentences.validation
        held_out = sentences.validation_sentences(store, self.plan.forms, recipe.sentences, recipe.seed)
        roles = {task: form.roles for task, form in self.plan.forms.items()}
        scores: dict[str, dict] = {}
        pictures = self.prompt_pictures(store, tokenizer)
        total = len(self.models) * len(held_out) * count
        with tqdm(total=total, desc="evaluate", unit="sentence") as bar:
            for role in self.models:
                model = llama.load(self.dir / role).to(device)
                scores[role] = likelihood.evaluate(model, held_out, roles, progress=bar.update)
                for task, rows in pictures.items():
                    end = self.plan.forms[task].length - recipe.sentences.specials - store.tokens_per_image
                    settings = recipe.prompting
                    codes = complete(
                        model, held_out[task][: len(rows), :end], store.tokens_per_image, store.num_codes,
                        temperature=settings.temperature, top_p=settings.top_p, seed=recipe.seed,
                    )  # fmt: skip
                    for row, picture in zip(rows, decoded_pictures(tokenizer, codes), strict=True):
                        row.append((role, picture))
        prompting.save_pictures(folder / "pictures", pictures)
        return scores

    def export(self, folder: Path) -> dict:
        """The student (the teacher where there is none) -> a folder that transformers loads without delvm."""
        tokenizer = Tokenizer.load(self.dir / "tokenizer")
        metrics = {role: self.metrics["evaluate"][role] for role in self.models}
        card = {"name": self.recipe.name, "metrics": metrics, "recipe": recipes.to_yaml(self.recipe),
                "data": self.describe_data()}  # fmt: skip
        export(
            self.dir / self.models[-1],
            self.dir / "tokenizer",
            folder,
            num_codes=tokenizer.num_codes,
            card=card,
        )
        return {}

    # --- the chain ---

    @property
    def tasks(self) -> list[str]:
        """The tasks' names, in the order of their indices."""
        return list(self.recipe.tasks)

    @property
    def models(self) -> list[str]:
        """The models that the recipe trains, the student last."""
        return [role for role in ROLES if getattr(self.recipe, role) is not None]

    def stages(self) -> list[Stage]:
        """The stages that the recipe has, in order."""
        recipe = self.recipe
        tasks = [[task, asdict(config)] for task, config in recipe.tasks.items()]  # their order counts
        rows = {key: value for key, value in asdict(recipe.sentences).items() if key != "validation"}
        files = fingerprint(recipe.tasks)
        given = self.given_tokenizer.hash if self.given_tokenizer else ""
        data = [tasks, recipe.data, recipe.seed, files, given if self.token_tasks else ""]
        machine = [recipe.seed, recipe.trainer.precision]
        learning = [rows, *machine, recipe.trainer.averaging]
        chain = [
            Stage("data", data, [], self.data),
            Stage("tokenizer", [recipe.tokenizer, given, recipe.balance, *machine], ["data"], self.tokenizer,
                  together=True),
            Stage("tokens", [], ["tokenizer"], self.tokens, together=True),
            Stage("teacher", [recipe.teacher, *given_weights(recipe), *learning], ["tokens"], self.teacher,
                  together=True),
            Stage("scratch", [recipe.scratch, *student_frame(recipe), *learning], ["tokens"], self.scratch,
                  together=True),
            Stage("cache", [recipe.cache, *cache_frame(recipe), *learning], ["tokens", "teacher"], self.cache,
                  together=True),
            Stage("student", [recipe.student, *learning],
                  ["tokens", "teacher", *(["cache"] if recipe.cache else [])], self.student, together=True),
            Stage("evaluate", [recipe.sentences, recipe.prompting], ["tokens", *self.models], self.evaluate),
            Stage("export", [recipe.name], ["evaluate"], self.export),
        ]  # fmt: skip
        skipped = set(ROLES) - set(self.models) | (set() if self.models else {"evaluate", "export"})
        skipped |= set() if recipe.cache else {"cache"}
        return [stage for stage in chain if stage.name not in skipped]

    def fit(self) -> None:
        """Run what is not done yet.

        Raises:
            UserError: what is wrong with the input; a run folder that is not there yet is then not made.
        """
        data, *others = self.stages()
        new = not self.dir.exists()
        if ranks.is_first():
            self.dir.mkdir(parents=True, exist_ok=True)
        try:
            self.run(data)
        except UserError:
            shutil.rmtree(self.dir if new else self.dir / ".data.partial")
            raise
        listed = self.dir / "data"
        self.open_data(json.loads((listed / "manifest.json").read_text()), listed)
        self.check_models()  # which nobody has where the list of data is reused
        if ranks.is_first():
            write_atomic(self.dir / "recipe.yaml", recipes.to_yaml(self.recipe))
        self.show_plan()
        for stage in others:
            self.run(stage)

    def run(self, stage: Stage) -> None:
        """Do one stage, or find it done."""
        self.metrics[stage.name] = run_stage(stage, self.dir, self.keys, console.console.print)

    # --- what the arrows share ---

    def index(self, folder: Path) -> dict[str, dict]:
        """List the samples in `folder`, every file read once."""
        recipe = self.recipe
        check_plan(recipe, num_tokens=self.num_tokens, num_codes=self.num_codes)
        self.check_models()
        found = index_data(self.image_tasks, recipe.data, recipe.seed, folder)
        for task, config in self.token_tasks.items():
            found[task] = lines.index_lines(
                task, config, tokens_per_image=self.num_tokens, num_codes=self.num_codes, seed=recipe.seed
            )
        manifest = {task: found[task] for task in recipe.tasks}
        self.open_data(manifest, folder)
        return manifest

    def check_models(self) -> None:
        """Refuse models that cannot be trained so, before anything runs.

        Raises:
            UserError: a teacher of another vocabulary; steps that processes and micro-batches cannot share; a
                cache of more codes or rows than there are.
        """
        recipe, cache, student = self.recipe, self.recipe.cache, self.recipe.student
        for key, model in (("teacher", recipe.teacher), ("student", recipe.student)):
            if model and not model.folder:
                check_batch_size(f"{key}.batch_size", model.batch_size, recipe.trainer.accumulate)
        _ = self.given_teacher
        if cache and student:
            if cache.kind == "topk" and cache.codes > self.vocabulary:
                raise UserError(
                    f"cache.count: {cache.codes}, codes and special ids here are {self.vocabulary}"
                )
            if cache.rows > student.steps * student.batch_size:
                raise UserError(
                    f"cache.rows: {cache.rows}, the student sees {student.steps * student.batch_size}"
                )

    def open_data(self, manifest: dict[str, dict], folder: Path) -> None:
        """Take over the list of samples in `folder`, and plan by it.

        Raises:
            UserError: samples that do not fit the sentences, or too few of them; sentences that are longer
                than what a given teacher takes.
        """
        self.manifest, self.listed = manifest, folder
        self.plan = make_plan(self.recipe, manifest, num_tokens=self.num_tokens, num_codes=self.num_codes)
        teacher = self.given_teacher
        if teacher and teacher.max_position_embeddings < self.positions:
            raise UserError(
                f"teacher.folder: '{self.training_config('teacher').folder}' takes"
                f" {teacher.max_position_embeddings} tokens, rows and sentences here have up to"
                f" {self.positions}"
            )

    def show_plan(self) -> None:
        """Print what the plan has to say."""
        for note in self.plan.notes:
            console.console.print(note, soft_wrap=True)
        console.show_plan(self.plan.summary)

    def stored(self, plan: TaskPlan) -> TaskPlan:
        """The plan over what is stored: where views are drawn online, the samples alone."""
        return replace(plan, views=1) if self.recipe.balance.online else plan

    def views(self, split: str, *, once: bool = False) -> dict[str, Views]:
        """The pictures of a split by task: training has the planned views, validation the samples alone.

        Tasks that come as tokens have none. `once`: training, too, has the samples alone.
        """
        recipe = self.recipe
        sources = open_sources(self.manifest, self.image_tasks, split, recipe.seed, self.listed)
        return {
            task: Views(
                source,
                task,
                recipe.tasks[task],
                size=recipe.data.image_size,
                num_views=self.plan.tasks[task].views if split == "train" and not once else 1,
                seed=recipe.seed,
            )
            for task, source in sources.items()
        }

    @cached_property
    def given_tokenizer(self) -> Tokenizer | None:
        """The tokenizer of `tokenizer.folder`; None where one is trained.

        Raises:
            UserError: it cannot be loaded, or is for pictures of another size.
        """
        folder, size = self.recipe.tokenizer.folder, self.recipe.data.image_size
        if not folder:
            return None
        tokenizer = Tokenizer.load(folder)
        if tokenizer.image_size != size:
            raise UserError(
                f"tokenizer.folder: '{folder}' is for {tokenizer.image_size} px, data.image_size is {size}"
            )
        return tokenizer

    @property
    def image_tasks(self) -> dict[str, TaskConfig]:
        """The tasks that come as pictures, or are drawn."""
        return {task: c for task, c in self.recipe.tasks.items() if c.source not in TOKEN_SOURCES}

    @property
    def token_tasks(self) -> dict[str, TaskConfig]:
        """The tasks that come as tokens."""
        return {task: c for task, c in self.recipe.tasks.items() if c.source in TOKEN_SOURCES}

    @property
    def num_tokens(self) -> int:
        """Tokens of one picture."""
        if self.given_tokenizer:
            return self.given_tokenizer.num_tokens
        return (self.recipe.data.image_size // self.recipe.tokenizer.factor) ** 2

    @property
    def num_codes(self) -> int:
        """Codes of the tokenizer."""
        return self.given_tokenizer.num_codes if self.given_tokenizer else self.recipe.tokenizer.num_codes

    @property
    def vocabulary(self) -> int:
        """Ids of the models: the codes, and BOS and EOS where sentences have them."""
        return max(self.num_codes - 1, *(self.recipe.sentences.ends(self.num_codes) or (0,))) + 1

    @property
    def positions(self) -> int:
        """Tokens that the models read at once: a row, or a sentence to be scored."""
        return max(self.plan.length, *(form.length for form in self.plan.forms.values()))

    def training_config(self, role: str) -> PretrainConfig:
        """The size, steps and batches of a role; the scratch control has the student's."""
        config = self.recipe.teacher if role == "teacher" else self.recipe.student
        assert config is not None
        return config

    def new_model(self, role: str, seed: int) -> LlamaForCausalLM:
        """An untrained model; the scratch control is the student's."""
        return llama.initialise(self.model_config(role), seed=seed, scheme=self.training_config(role).init)

    def rows(self, num_rows: int, seed: int) -> TrainingSentences:
        """The rows that a model is trained on, drawn from `seed`."""
        tokenizer = Tokenizer.load(self.dir / "tokenizer")
        store = open_store(self.dir / "tokens", tokenizer=tokenizer.hash)
        plans = {task: self.stored(plan) for task, plan in self.plan.tasks.items()}
        return TrainingSentences(
            store, plans, self.plan.forms, self.recipe.sentences, num_rows=num_rows, seed=seed, details=True
        )

    def train_model(
        self,
        name: str,
        module: Pretrain,
        rows: TrainingSentences | CachedRows,
        config: PretrainConfig,
        seed: int,
        folder: Path,
    ) -> dict:
        """Train for the steps of `config` and save as a transformers folder."""
        recipe = self.recipe
        dataset: Dataset = rows
        if recipe.balance.online:
            assert isinstance(rows, TrainingSentences)
            dataset = OnlineSentences(rows, self.views("train"))
            module.prepare = Encode(rows, Tokenizer.load(self.dir / "tokenizer"))
        set_up_model(module.model, recipe.trainer, self.plan.length)
        pl.seed_everything(seed, verbose=False)
        self.train(
            name, module, dataset, config.steps, config.batch_size, clip=module.config.clip, folder=folder
        )
        if ranks.is_first():
            llama.save(module.model.cpu(), folder)
            discard_checkpoint(folder)
        return {}

    def live_teacher(self) -> Live:
        """The trained teacher, frozen."""
        student, trainer = self.recipe.student, self.recipe.trainer
        assert student is not None
        mixed = "bf16" if trainer.precision == "bf16-mixed" else "32"
        precision = mixed if student.teacher_precision == "auto" else student.teacher_precision
        return Live(llama.load(self.dir / "teacher"), precision=precision, compile=trainer.compile)

    @cached_property
    def given_teacher(self) -> LlamaConfig | None:
        """The configuration of `teacher.folder`; None where a teacher is trained.

        Raises:
            UserError: it cannot be read, or is for another vocabulary.
        """
        folder = self.recipe.teacher.folder if self.recipe.teacher else ""
        if not folder:
            return None
        config = llama.load_config(folder)
        if config.vocab_size != self.vocabulary:
            raise UserError(
                f"teacher.folder: '{folder}' has {config.vocab_size} ids, codes and special ids here are"
                f" {self.vocabulary}"
            )
        return config

    def model_config(self, role: str) -> LlamaConfig:
        """The architecture of a role; the scratch control has the student's."""
        if role == "teacher" and self.given_teacher:
            return self.given_teacher
        bos, eos = self.recipe.sentences.ends(self.num_codes) or (None, None)
        size = self.training_config(role).size
        return llama.configuration(size, self.vocabulary, self.positions, bos=bos, eos=eos)

    def train(
        self,
        name: str,
        module: pl.LightningModule,
        dataset: Dataset,
        steps: int,
        batch_size: int,
        *,
        clip: float,
        folder: Path,
        config: TrainerConfig | None = None,
    ) -> None:
        """Train and keep the curve as `curve.json`."""
        curve = train(
            module, dataset, name=name, steps=steps, batch_size=batch_size, clip=clip,
            config=config or self.recipe.trainer, folder=folder, tensorboard=self.dir / "tensorboard",
        )  # fmt: skip
        if ranks.is_first():
            write_atomic(folder / "curve.json", json.dumps(curve))

    def prompt_pictures(
        self, store: TokenStore, tokenizer: Tokenizer
    ) -> dict[str, list[list[prompting.Picture]]]:
        """The pictures of the first held-out sentences, captioned; the last one is to be generated.

        They are the real ones, or decoded where a task comes as tokens.
        """
        recipe, views = self.recipe, self.views("validation")
        rows: dict[str, list[list[prompting.Picture]]] = {}
        for index, (task, form) in enumerate(self.plan.forms.items()):
            if form.images == 1:  # nothing stands before it
                continue
            count, classes = recipe.sentences.validation, store.classes["validation"].get(task)
            grid = store.grids["validation"][task]
            picks = sentences.validation_picks(form, len(grid), count, recipe.seed, index, classes)
            annotated = (form.image_roles == sentences.ANNOTATION).tolist()
            captions = [
                "annotation" if drawn else "example" if any(annotated) else "image" for drawn in annotated
            ]
            captions[-1] = "truth"
            if annotated[-1] and not annotated[-2]:
                captions[-2] = "query"
            rows[task] = []
            for sentence in picks[: recipe.prompting.pictures]:
                if task in views:
                    shown = [views[task][int(sample)][picture].numpy() for sample, _, picture in sentence]
                else:
                    codes = grid.gather(*sentence.T.copy()).astype(np.int64)
                    shown = decoded_pictures(tokenizer, torch.from_numpy(codes))
                rows[task].append(list(zip(captions, shown, strict=True)))
        return rows

    def describe_data(self) -> str:
        """One line a task: where its samples come from and how many there are."""
        lines = []
        for task, config in self.recipe.tasks.items():
            origin = f"scenes '{config.scene}'" if config.scene else config.source
            made = f", {config.make}" if config.make else ""
            train, held = (self.manifest[task][split] for split in SPLITS)
            lines.append(f"{task}: {origin}{made}, {train} training and {held} held-out samples")
        return "\n".join(lines)


def decoded_pictures(tokenizer: Tokenizer, codes: torch.Tensor) -> list[np.ndarray]:
    """(n, tokens) int64 codes -> n pictures (H, W, 3) uint8."""
    with torch.inference_mode():
        decoded = tokenizer.decode(codes.to(tokenizer.codebook.device)).cpu()
    return list((decoded.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy())


def student_frame(recipe: Recipe) -> list:
    """What the scratch control takes from the student's section."""
    student = recipe.student
    return [student.size, student.init, student.steps, student.batch_size] if student else []


def given_weights(recipe: Recipe) -> list[str]:
    """What tells the weights of `teacher.folder` from others; none where a teacher is trained."""
    folder = recipe.teacher.folder if recipe.teacher else ""
    return [weights_hash(Path(folder))] if folder else []


def cache_frame(recipe: Recipe) -> list:
    """What a cache takes from the student's section; a student of another size can have the same."""
    student = recipe.student
    if student is None or recipe.cache is None:
        return []
    rows = [] if recipe.cache.rows else [student.steps * student.batch_size]
    return [student.temperature, student.teacher_precision, *rows]
