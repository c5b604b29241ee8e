"""Recipe -> its stages, in the order of the data flow: images to a distilled, evaluated student."""

import json
import shutil
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from tqdm.auto import tqdm

from delvm import console, llama
from delvm import recipe as recipes
from delvm.distill.module import Distill
from delvm.errors import UserError
from delvm.evaluate import likelihood, prompting
from delvm.export import export
from delvm.images.sources import Views, fingerprint, index_data, open_sources
from delvm.pretrain import Pretrain, PretrainConfig
from delvm.recipe import Recipe
from delvm.stages import Stage, run_stage, write_atomic
from delvm.tokenizer import Tokenizer
from delvm.tokenizer import training as tokenizer_training
from delvm.tokens import balance, sentences
from delvm.tokens.store import code_dtype, encode, open_store, write_grid, write_manifest
from delvm.training import Shuffled, discard_checkpoint, train

ROLES = ("teacher", "scratch", "student")


class Run:
    """One recipe in one run folder: the chain of stages and what they hand on."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.dir = Path(recipe.run_dir)
        self.keys: dict[str, str] = {}
        self.metrics: dict[str, dict] = {}
        self.manifest: dict[str, dict] = {}
        self.plans: dict[str, balance.TaskPlan] = {}

    # --- the arrows, in the order of the data flow; each writes into the folder it is given ---

    def data(self, folder: Path) -> dict:
        """Images -> the list of readable samples."""
        manifest = self.index()
        write_atomic(folder / "manifest.json", json.dumps(manifest, indent=1))
        return {task: len(entry["skipped"]) for task, entry in manifest.items()}

    def tokenizer(self, folder: Path) -> dict:
        """The training pictures -> a tokenizer."""
        recipe, config = self.recipe, self.recipe.tokenizer
        views: ConcatDataset = ConcatDataset(self.views("train").values())
        tokenizer = self.given_tokenizer
        if tokenizer is None:
            pl.seed_everything(recipe.seed, verbose=False)
            module = tokenizer_training.TokenizerTraining(config, recipe.data.image_size)
            pairs = max(1, config.batch_size // 2)
            self.train("tokenizer", module, Shuffled(views, config.steps * pairs, recipe.seed), config.steps,
                       pairs, clip=1.0, folder=folder)  # fmt: skip
            tokenizer = module.finish()
        held_out: ConcatDataset = ConcatDataset(self.views("validation").values())
        sample = Shuffled(held_out, min(len(held_out), 512), recipe.seed + 1)
        metrics = tokenizer_training.measure(
            tokenizer.to(recipe.trainer.device()), DataLoader(sample, batch_size=64)
        )
        if self.given_tokenizer is None:
            tokenizer_training.check(metrics, config)
        tokenizer.cpu().save(folder)
        discard_checkpoint(folder)
        return metrics

    def tokens(self, folder: Path) -> dict:
        """Pairs and views -> token grids."""
        device = self.recipe.trainer.device()
        tokenizer = Tokenizer.load(self.dir / "tokenizer").to(device)
        dtype = code_dtype(tokenizer.num_codes)
        tasks: dict[str, dict] = {task: {} for task in self.recipe.tasks}
        splits = {split: self.views(split) for split in ("train", "validation")}
        total = sum(len(views) for parts in splits.values() for views in parts.values())
        with tqdm(total=total, desc="tokens", unit="pair") as bar:
            for split, parts in splits.items():
                for task, views in parts.items():
                    shape = (len(views.source), views.num_views, 2, tokenizer.num_tokens)
                    loader = DataLoader(views, batch_size=64, num_workers=self.recipe.trainer.num_workers)
                    rows = encode(tokenizer, loader, bar.update)
                    checksum = write_grid(folder / f"{task}.{split}.npy", shape, dtype, rows)
                    tasks[task][split] = {"shape": list(shape), "sha256": checksum}
        write_manifest(folder, {
            "tokenizer": tokenizer.hash, "num_codes": tokenizer.num_codes,
            "tokens_per_image": tokenizer.num_tokens, "tasks": tasks,
        })  # fmt: skip
        return {}

    def teacher(self, folder: Path) -> dict:
        """Visual sentences -> the teacher."""
        config = self.recipe.teacher
        assert config is not None
        model = self.new_model(config.size, self.recipe.seed)
        module = Pretrain(model, config, config.steps)
        return self.train_model("teacher", module, config.steps, config.batch_size, self.recipe.seed, folder)

    def scratch(self, folder: Path) -> dict:
        """Visual sentences -> the student's control: same start, sentences and steps, no teacher."""
        config, student = self.recipe.scratch, self.recipe.student
        assert config is not None
        assert student is not None
        module = Pretrain(self.new_model(student.size, self.recipe.seed + 1), config, student.steps)
        return self.train_model(
            "scratch", module, student.steps, student.batch_size, self.recipe.seed + 1, folder
        )

    def student(self, folder: Path) -> dict:
        """Visual sentences and the teacher -> the student."""
        config = self.recipe.student
        assert config is not None
        model = self.new_model(config.size, self.recipe.seed + 1)
        module = Distill(model, llama.load(self.dir / "teacher"), config)
        return self.train_model(
            "student", module, config.steps, config.batch_size, self.recipe.seed + 1, folder
        )

    def evaluate(self, folder: Path) -> dict:
        """Models -> their scores on held-out sentences, and the annotations they generate."""
        recipe = self.recipe
        device = recipe.trainer.device()
        store = open_store(self.dir / "tokens")
        held_out = sentences.validation_sentences(store, recipe.sentences, recipe.seed)
        roles = sentences.roles(recipe.sentences.pairs, store.tokens_per_image)
        tokenizer = Tokenizer.load(self.dir / "tokenizer").to(device)
        scores: dict[str, dict] = {}
        pictures = self.prompt_pictures()
        prompt_end = int((roles == sentences.ANNOTATION).nonzero()[-store.tokens_per_image])
        total = len(self.models) * len(held_out) * recipe.sentences.validation
        with tqdm(total=total, desc="evaluate", unit="sentence") as bar:
            for role in self.models:
                model = llama.load(self.dir / role).to(device)
                scores[role] = likelihood.evaluate(model, held_out, roles, progress=bar.update)
                for task, rows in pictures.items():
                    prompts = held_out[task][: len(rows), :prompt_end]
                    settings = recipe.prompting
                    codes = prompting.complete(
                        model, prompts, store.tokens_per_image, store.num_codes,
                        temperature=settings.temperature, top_p=settings.top_p, seed=recipe.seed,
                    )  # fmt: skip
                    with torch.inference_mode():
                        decoded = tokenizer.decode(codes.to(device)).cpu()
                    for row, picture in zip(rows, decoded, strict=True):
                        row.append((role, (picture.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()))
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
    def models(self) -> list[str]:
        """The models that the recipe trains, the student last."""
        return [role for role in ROLES if getattr(self.recipe, role) is not None]

    def stages(self) -> list[Stage]:
        """The stages that the recipe has, in order."""
        recipe = self.recipe
        tasks = [[task, asdict(config)] for task, config in recipe.tasks.items()]  # their order counts
        files = fingerprint(recipe.tasks)
        given = self.given_tokenizer.hash if self.given_tokenizer else ""
        data = [tasks, recipe.data, recipe.seed, files]
        machine = [recipe.seed, recipe.trainer.precision]
        learning = [recipe.sentences.pairs, *machine]
        chain = [
            Stage("data", data, [], self.data),
            Stage("tokenizer", [recipe.tokenizer, given, recipe.balance, *machine], ["data"], self.tokenizer),
            Stage("tokens", [], ["tokenizer"], self.tokens),
            Stage("teacher", [recipe.teacher, *learning], ["tokens"], self.teacher),
            Stage("scratch", [recipe.scratch, *student_frame(recipe), *learning], ["tokens"], self.scratch),
            Stage("student", [recipe.student, *learning], ["tokens", "teacher"], self.student),
            Stage("evaluate", [recipe.sentences, recipe.prompting], ["tokens", *self.models], self.evaluate),
            Stage("export", [recipe.name], ["evaluate"], self.export),
        ]
        skipped = set(ROLES) - set(self.models) | (set() if self.models else {"evaluate", "export"})
        return [stage for stage in chain if stage.name not in skipped]

    def fit(self) -> None:
        """Run what is not done yet.

        Raises:
            UserError: what is wrong with the input; a run folder that is not there yet is then not made.
        """
        data, *others = self.stages()
        new = not self.dir.exists()
        self.dir.mkdir(parents=True, exist_ok=True)
        try:
            self.run(data)
        except UserError:
            shutil.rmtree(self.dir if new else self.dir / ".data.partial")
            raise
        self.open_data(json.loads((self.dir / "data" / "manifest.json").read_text()))
        write_atomic(self.dir / "recipe.yaml", recipes.to_yaml(self.recipe))
        console.show_plan(self.balance())
        for stage in others:
            self.run(stage)

    def run(self, stage: Stage) -> None:
        """Do one stage, or find it done."""
        self.metrics[stage.name] = run_stage(stage, self.dir, self.keys, console.console.print)

    # --- what the arrows share ---

    def index(self) -> dict[str, dict]:
        """The index of samples, every file read once."""
        manifest = index_data(self.recipe.tasks, self.recipe.data, self.recipe.seed)
        self.refuse_too_few(manifest)
        return manifest

    def refuse_too_few(self, manifest: dict[str, dict]) -> None:
        """Raises UserError where a held-out query would have to be among its own examples."""
        pairs = self.recipe.sentences.pairs
        for task, entry in manifest.items():
            held_out = num_samples(entry["validation"])
            if held_out < pairs:
                raise UserError(
                    f"tasks.{task}: {held_out} held-out samples, sentences.pairs asks for {pairs}"
                )

    def open_data(self, manifest: dict[str, dict]) -> None:
        """Take over the index of samples, and plan the balance from it."""
        self.manifest = manifest
        self.refuse_too_few(manifest)
        for entry in manifest.values():
            for message in entry["skipped"]:
                console.console.print(f"skipped: {message}", soft_wrap=True)
        counts = {task: num_samples(entry["train"]) for task, entry in manifest.items()}
        self.plans = balance.plan(counts, self.recipe.balance)
        for task, plan in self.plans.items():
            if plan.wanted > plan.views * plan.repeats and self.recipe.balance.strategy != "none":
                console.console.print(f"tasks.{task}: {plan.wanted} views wanted, cut by balance.max_views")

    def views(self, split: str) -> dict[str, Views]:
        """The pictures of a split by task: training has the planned views, validation the samples alone."""
        recipe = self.recipe
        sources = open_sources(self.manifest, recipe.tasks, split, recipe.seed)
        return {
            task: Views(
                source,
                task,
                recipe.tasks[task],
                size=recipe.data.image_size,
                num_views=self.plans[task].views if split == "train" else 1,
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
    def length(self) -> int:
        """Tokens of one sentence."""
        return sentences.sentence_length(self.recipe.sentences.pairs, self.num_tokens)

    def balance(self) -> dict[str, dict[str, int]]:
        """The plan as numbers, by task."""
        return balance.summary(self.plans, 2 * self.num_tokens)

    def model_config(self, role: str) -> PretrainConfig:
        """The size, steps and batches of a role; the scratch control has the student's."""
        config = self.recipe.teacher if role == "teacher" else self.recipe.student
        assert config is not None
        return config

    def new_model(self, size: str, seed: int) -> Any:
        """An untrained model over the tokenizer's codes, BOS and EOS."""
        codes = self.num_codes
        return llama.build(size, codes + 2, self.length, bos=codes, eos=codes + 1, seed=seed)

    def train_model(
        self, name: str, module: Pretrain, steps: int, batch_size: int, seed: int, folder: Path
    ) -> dict:
        """Train on sentences drawn from `seed`, save as a transformers folder."""
        store = open_store(self.dir / "tokens")
        dataset = sentences.TrainingSentences(
            store, self.plans, self.recipe.sentences, num_sentences=steps * batch_size, seed=seed
        )
        pl.seed_everything(seed, verbose=False)
        self.train(name, module, dataset, steps, batch_size, clip=module.config.clip, folder=folder)
        llama.save(module.model.cpu(), folder)
        discard_checkpoint(folder)
        return {}

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
    ) -> None:
        """Train and keep the curve as `curve.json`."""
        curve = train(
            module, dataset, name=name, steps=steps, batch_size=batch_size, clip=clip,
            config=self.recipe.trainer, folder=folder, tensorboard=self.dir / "tensorboard",
        )  # fmt: skip
        write_atomic(folder / "curve.json", json.dumps(curve))

    def prompt_pictures(self) -> dict[str, list[list[prompting.Picture]]]:
        """The real pictures of the first held-out sentences: example pairs, query and truth, captioned."""
        recipe = self.recipe
        rows: dict[str, list[list[prompting.Picture]]] = {}
        for index, (task, views) in enumerate(self.views("validation").items()):
            picks = sentences.validation_picks(len(views), recipe.sentences, recipe.seed, index)
            rows[task] = []
            for sentence in picks[: recipe.prompting.pictures]:
                pairs = [views[int(sample)].numpy() for sample in sentence]
                row: list[prompting.Picture] = []
                for image, annotation in pairs[:-1]:
                    row += [("example", image), ("annotation", annotation)]
                rows[task].append([*row, ("query", pairs[-1][0]), ("truth", pairs[-1][1])])
        return rows

    def describe_data(self) -> str:
        """One line a task: where its pairs come from and how many there are."""
        lines = []
        for task, config in self.recipe.tasks.items():
            origin = f"scenes '{config.scene}'" if config.scene else "paired folders"
            train, held = (num_samples(self.manifest[task][split]) for split in ("train", "validation"))
            lines.append(f"{task}: {origin}, {train} training and {held} held-out pairs")
        return "\n".join(lines)


def num_samples(entry: int | list) -> int:
    """Samples of a manifest's split: scenes are counted, files listed."""
    return entry if isinstance(entry, int) else len(entry)


def student_frame(recipe: Recipe) -> list:
    """What the scratch control takes from the student's section."""
    student = recipe.student
    return [student.size, student.steps, student.batch_size] if student else []
