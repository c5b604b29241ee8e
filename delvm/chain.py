"""Recipe -> its stages, in the order of the data flow: images to a distilled, evaluated student."""

import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytorch_lightning as pl
from torch.utils.data import ConcatDataset, DataLoader

from delvm import console, llama, ranks, teach
from delvm import recipe as recipes
from delvm.distill.cache import MANIFEST
from delvm.errors import UserError
from delvm.evaluate import choice, held_out, probe, prompting, scores
from delvm.export import export
from delvm.finetune import arms
from delvm.given import ROLES, Given
from delvm.images.sources import SPLITS, fingerprint
from delvm.material import Material, list_samples, open_samples
from delvm.pretrain import Pretrain
from delvm.recipe import Recipe
from delvm.stages import Stage, run_stage, write_atomic
from delvm.tokenizer import Tokenizer
from delvm.tokenizer import load as load_tokenizer
from delvm.tokenizer import training as tokenizer_training
from delvm.tokens.encoding import write_store
from delvm.training import Shuffled, discard_checkpoint


class Run:
    """One recipe in one run folder: the chain of stages and what they hand on."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.given = recipe, Given(recipe)
        self.dir = Path(recipe.run_dir)
        self.keys: dict[str, str] = {}
        self.metrics: dict[str, dict] = {}
        self.material: Material

    # --- the arrows, in the order of the data flow; each writes into the folder it is given ---

    def data(self, folder: Path) -> dict:
        """Images -> the list of readable samples."""
        manifest = list_samples(self.given, folder, self.dir).manifest
        return {
            task: {key: len(entry[key]) for key in ("skipped", "dropped")} for task, entry in manifest.items()
        }

    def tokenizer(self, folder: Path) -> dict:
        """The training pictures -> a tokenizer."""
        recipe, config, material = self.recipe, self.recipe.tokenizer, self.material
        tokenizer = self.given.tokenizer
        if tokenizer is None:
            views: ConcatDataset = ConcatDataset(material.views("train").values())
            pl.seed_everything(recipe.seed, verbose=False)
            module = tokenizer_training.TokenizerTraining(config, recipe.data.image_size)
            most = max(entry["pictures"] for entry in material.manifest.values())
            # as many for every process
            samples = max(1, config.batch_size // (most * ranks.world())) * ranks.world()
            teach.train_and_log(
                "tokenizer", module, Shuffled(views, config.steps * samples, recipe.seed),
                # its codes are moving averages over whole batches
                replace(recipe.trainer, accumulate=1, averaging=0.0),
                steps=config.steps, batch_size=samples, clip=1.0, folder=folder, run_dir=self.dir,
            )  # fmt: skip
            tokenizer = module.finish()
        if not ranks.is_first():
            return {}
        metrics: dict = {}
        if views_held_out := material.views("validation"):  # else all tasks come as tokens
            pictures: ConcatDataset = ConcatDataset(views_held_out.values())
            sample = Shuffled(pictures, min(len(pictures), 512), recipe.seed + 1)
            metrics = tokenizer_training.measure(
                tokenizer.to(recipe.trainer.device()),
                DataLoader(sample, batch_size=64, collate_fn=sample.collate),
            )
        tokenizer.cpu().save(folder)
        discard_checkpoint(folder)
        return metrics

    def tokens(self, folder: Path) -> dict:
        """Pairs and views -> token grids."""
        recipe, material = self.recipe, self.material
        views = {split: material.views(split, once=recipe.balance.online) for split in SPLITS}
        write_store(
            folder, material.tokenizer().to(recipe.trainer.device()), recipe.tasks, material.manifest, views,
            seed=recipe.seed, num_workers=recipe.trainer.num_workers, config=recipe.tokens,
        )  # fmt: skip
        return {}

    def teacher(self, folder: Path) -> dict:
        """Visual sentences -> the teacher."""
        config = self.recipe.teacher
        assert config is not None
        if not config.folder:
            return self.from_labels("teacher", folder)
        if ranks.is_first():
            llama.save(llama.load(config.folder), folder, num_codes=self.given.num_codes)
        return {}

    def scratch(self, folder: Path) -> dict:
        """Visual sentences -> the student's control: same sentences and steps, a random start, no teacher."""
        return self.from_labels("scratch", folder)

    def cache(self, folder: Path) -> dict:
        """The teacher and the student's sentences -> what the teacher says of them."""
        config = self.recipe.cache
        assert config is not None
        place = Path(config.folder) if config.folder else folder
        teach.cache_teacher(self.material, teach.live_teacher(self.material), config, place)
        return {}

    def student(self, folder: Path) -> dict:
        """Visual sentences and the teacher -> the student."""
        config = self.recipe.cache
        cache = Path(config.folder or self.dir / "cache") if config else None
        if cache and not ranks.on_first((cache / MANIFEST).is_file):
            self.cache(folder)  # a shared one that has gone since this run's stage found it
        teach.teach_student(self.material, folder, cache)
        return {}

    def evaluate(self, folder: Path) -> dict:
        """Models -> their scores on held-out sentences, and the annotations they generate."""
        recipe, material = self.recipe, self.material
        device = recipe.trainer.device()
        tokenizer = material.tokenizer().to(device)
        found, pictures, by_picture = held_out.evaluate(
            {role: self.dir / role for role in self.given.models}, material.store(tokenizer.hash), tokenizer,
            material.plan.forms, recipe.sentences, recipe.prompting,
            views=material.views("validation"), seed=recipe.seed, device=device,
            scorers=held_out.scorers_of(self.given.image_tasks, recipe.prompting.scores),
        )  # fmt: skip
        prompting.save_pictures(folder / "pictures", pictures)
        scores.save(by_picture, folder / "by_picture.json")
        return found

    def questions(self, folder: Path) -> dict:
        """Questions in pictures -> how often each model chooses the answer, and LVM's perplexity."""
        device = self.recipe.trainer.device()
        models = {role: self.dir / role for role in self.given.models}
        return choice.ask(models, *self.given.questions, self.material.tokenizer().to(device), device=device)

    def probe(self, folder: Path) -> dict:
        """Models and pictures of classes -> how well the classes can be read from the models' features."""
        recipe, config = self.recipe, self.recipe.probe
        assert config is not None
        own = {role: self.dir / role for role in self.given.models}
        return probe.probe(
            {**own, **{name: Path(given) for name, given in config.models.items()}},
            self.material.tokenizer() if recipe.tasks else load_tokenizer(recipe.tokenizer.folder),
            config, folder, features=Path(config.folder or self.dir / "features"), seed=recipe.seed,
            device=recipe.trainer.device(), precision=recipe.trainer.precision,
            num_workers=recipe.trainer.num_workers, tensorboard=self.dir / "tensorboard" / "probe",
        )  # fmt: skip

    def finetune(self, folder: Path) -> dict:
        """Models and pictures of classes -> classifiers of pretrained and of random weights."""
        recipe, config = self.recipe, self.recipe.finetune
        assert config is not None
        own = {role: self.dir / role for role in self.given.finetune_roles}
        tokenizer = None
        if config.input == "tokens":
            given = self.given.tokenizer
            tokenizer = self.material.tokenizer() if recipe.tasks else given
        return arms.finetune(
            {**own, **{name: Path(place) for name, place in config.models.items()}}, tokenizer, config,
            folder, trainer=recipe.trainer, tensorboard=self.dir / "tensorboard", tokens=recipe.tokens,
            seed=recipe.seed,
        )  # fmt: skip

    def export(self, folder: Path) -> dict:
        """The student (the teacher where there is none) -> a folder that transformers loads without delvm."""
        models = self.given.models
        card = {
            "name": self.recipe.name, "metrics": {role: self.metrics["evaluate"][role] for role in models},
            "recipe": recipes.to_yaml(self.recipe), "data": self.material.describe(),
        }  # fmt: skip
        num_codes = Tokenizer.load(self.dir / "tokenizer").num_codes
        export(self.dir / models[-1], self.dir / "tokenizer", folder, num_codes=num_codes, card=card)
        return {}

    def from_labels(self, role: str, folder: Path) -> dict:
        """Visual sentences -> a model that has no teacher."""
        config = getattr(self.recipe, role)
        steps = self.given.training_config(role).steps
        module = Pretrain(teach.new_model(self.material, role), config, steps, self.material.tasks)
        teach.train_model(self.material, role, module, teach.rows_of(self.material, role), folder)
        return {}

    # --- the chain ---

    def stages(self) -> list[Stage]:
        """The stages that the recipe has, in order."""
        recipe, given = self.recipe, self.given
        tasks = [[task, asdict(config)] for task, config in recipe.tasks.items()]  # their order counts
        rows = {key: value for key, value in asdict(recipe.sentences).items() if key != "validation"}
        tokenizer = given.tokenizer.hash if given.tokenizer else ""
        data = [tasks, recipe.data, recipe.seed, fingerprint(recipe.tasks)]
        # what a tokenizer must reach is asked of it when it is trained: its training does not depend on that.
        # Whatever is asked, the key is that of the defaults, and so that of older runs
        default = tokenizer_training.TokenizerConfig
        learnt_tokenizer = replace(
            recipe.tokenizer, min_codes_used=default.min_codes_used, min_psnr=default.min_psnr
        )
        machine = [recipe.seed, recipe.trainer.precision]
        learning = [rows, *machine, recipe.trainer.averaging]
        student = recipe.student
        # what the scratch control, and what a cache, take from the student's section
        start = [
            student.size, student.init, student.embedding, student.steps, student.batch_size
        ] if student else []  # fmt: skip
        said = [student.temperature, student.teacher_precision] if student else []
        if student and recipe.cache and not recipe.cache.rows:
            said.append(student.steps * student.batch_size)
        # where the teacher's layers are changes no value
        learnt = student and {k: v for k, v in asdict(student).items() if k != "teacher_sharded"}
        asked = [
            {k: v for k, v in asdict(recipe.probe).items() if k != "folder"}, given.probe_hashes,
            [listing.hash for listing in given.probe_pictures.values()], "" if recipe.tasks else tokenizer,
        ] if recipe.probe else []  # fmt: skip
        drawn = {
            key: value for key, value in asdict(recipe.prompting).items()
            if key not in {"choices", "lvm_jsonl"} and (key, value) != ("shots", 0)
        }  # fmt: skip
        tuning = recipe.finetune
        tuned = [
            tuning, recipe.tokens, given.finetune_hashes,
            [listing.hash for listing in given.finetune_pictures.values()],
            tokenizer if tuning.input == "tokens" and not recipe.tasks else "",
        ] if tuning else []  # fmt: skip
        chain = [
            Stage("data", [*data, tokenizer if given.token_tasks else ""], [], self.data),
            Stage("tokenizer", [learnt_tokenizer, tokenizer, recipe.balance, *machine], ["data"],
                  self.tokenizer, together=True),
            Stage("tokens", [recipe.tokens], ["tokenizer"], self.tokens, together=True),
            Stage("teacher", [given.teacher_hash] if given.teacher_hash else [recipe.teacher, *learning],
                  ["tokens"], self.teacher, together=True),
            Stage("scratch", [recipe.scratch, *start, *learning], ["tokens"], self.scratch, together=True),
            Stage("cache", [recipe.cache, *said, rows, *machine], ["tokens", "teacher"], self.cache,
                  together=True),
            Stage("student", [learnt, given.start_hash, *learning],
                  ["tokens", "teacher", *(["cache"] if recipe.cache else [])], self.student, together=True),
            Stage("evaluate", [recipe.sentences, drawn], ["tokens", *given.models], self.evaluate),
            Stage("questions", [given.questions_hash], ["tokenizer", *given.models], self.questions),
            Stage("probe", [*asked, *machine], [*(["tokenizer"] if recipe.tasks else []), *given.models],
                  self.probe),
            Stage("finetune", [*tuned, *machine],
                  [*(["tokenizer"] if recipe.tasks else []), *given.finetune_roles], self.finetune,
                  together=True),
            Stage("export", [recipe.name], ["evaluate"], self.export),
        ]  # fmt: skip
        skipped = set(ROLES) - set(given.models) | (
            set() if given.models else {"evaluate", "questions", "export"}
        )
        skipped |= {name for name in ("cache", "probe", "finetune") if not getattr(recipe, name)}
        skipped |= set() if any(given.questions) else {"questions"}
        if not recipe.tasks:
            return [stage for stage in chain if stage.name in {"probe", "finetune"} - skipped]
        return [stage for stage in chain if stage.name not in skipped]

    def fit(self, until: str = "") -> None:
        """Run what is not done yet, to the stage `until` or the last.

        Raises:
            UserError: what is wrong with the input; a run folder that is not there yet is then not made.
        """
        stages = self.stages()
        if self.recipe.tasks:
            self._begin(stages.pop(0))
        else:
            self.given.check()
            ranks.on_first(lambda: self.dir.mkdir(parents=True, exist_ok=True))
        if ranks.is_first():
            write_atomic(self.dir / "recipe.yaml", recipes.to_yaml(self.recipe))
        if self.recipe.tasks:
            show_plan(self.material)
        for stage in stages:
            self.run(stage)
            if stage.name == "tokenizer" and self.given.tokenizer is None:
                # kept even so: with lower demands the same command goes on from it
                tokenizer_training.check(self.metrics["tokenizer"], self.recipe.tokenizer)
            if stage.name == until:
                return

    def _begin(self, data: Stage) -> None:
        """List the samples, and leave no new run folder where that fails."""
        new = not self.dir.exists()
        if ranks.is_first():
            self.dir.mkdir(parents=True, exist_ok=True)
        try:
            self.run(data)
        except UserError:
            shutil.rmtree(self.dir if new else self.dir / ".data.partial")
            raise
        self.material = open_samples(self.given, self.dir / "data", self.dir)

    def run(self, stage: Stage) -> None:
        """Do one stage, or find it done."""
        self.metrics[stage.name] = run_stage(stage, self.dir, self.keys, console.console.print)


def show_plan(material: Material) -> None:
    """Print what the plan has to say."""
    for note in material.plan.notes:
        console.console.print(note, soft_wrap=True)
    console.show_plan(material.plan.summary)
