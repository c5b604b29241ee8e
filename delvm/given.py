"""A recipe -> what it is given instead of training it, and the sizes that follow."""

import hashlib
from functools import cached_property
from pathlib import Path

from transformers import LlamaConfig

from delvm import llama, ranks
from delvm.distill.cache import weights_hash
from delvm.distill.sliceable import check, check_ends
from delvm.errors import UserError
from delvm.evaluate.choice import Item, Question, length, read_items, read_lvm_examples
from delvm.evaluate.features import Listing
from delvm.evaluate.probe import list_splits
from delvm.evaluate.readers import check_timm
from delvm.finetune import arms
from delvm.finetune.classifier import Form
from delvm.finetune.earlier import check_earlier, classifier_hash, is_classifier
from delvm.finetune.training import FinetuneConfig
from delvm.images.tasks import TOKEN_SOURCES, TaskConfig
from delvm.pretrain import PretrainConfig
from delvm.recipe import Recipe
from delvm.tokenizer import Tokenizer
from delvm.tokenizer import load as load_tokenizer
from delvm.training import check_batch_size

ROLES = ("teacher", "scratch", "student")
SHAPE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "attention_bias", "mlp_bias", "tie_word_embeddings",
)  # fmt: skip
"""What two models must have in common for one to have the other's weights."""


def _read_model(key: str, folder: str, num_codes: int | None) -> tuple[LlamaConfig, str]:
    """A given model's configuration and what tells its weights from others; errors begin with the key.

    num_codes: of the tokenizer whose codes it is to read; None where it reads none.
    """
    try:
        config = llama.load_config(folder, num_codes=num_codes)
        if num_codes is not None:
            llama.check_codes(config, num_codes)
        return config, weights_hash(Path(folder))
    except UserError as error:
        raise UserError(f"{key}: {error}") from error


class Given:
    """Tokenizer and teacher of a recipe, and the codes, ids and models that everything else is made for."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of `tokenizer.folder`; None where one is trained.

        Raises:
            UserError: it cannot be loaded, or is for pictures of another size.
        """
        folder, size = self.recipe.tokenizer.folder, self.recipe.data.image_size
        if not folder:
            return None
        tokenizer = load_tokenizer(folder)
        if self.recipe.tasks and tokenizer.image_size != size:  # a probe's pictures become what it takes
            raise UserError(
                f"tokenizer.folder: '{folder}' is for {tokenizer.image_size} px, data.image_size is {size}"
            )
        return tokenizer

    @cached_property
    def teacher(self) -> LlamaConfig | None:
        """The configuration of `teacher.folder`; None where a teacher is trained.

        Raises:
            UserError: it cannot be read, or is for another vocabulary or other codes.
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
        if getattr(config, "num_codes", self.num_codes) != self.num_codes:
            raise UserError(
                f"teacher.folder: '{folder}' {llama.what_it_reads(config)}, the tokenizer here has"
                f" {self.num_codes}"
            )
        return config

    @cached_property
    def teacher_hash(self) -> str:
        """What tells the weights of `teacher.folder` from others; "" where a teacher is trained."""
        folder = self.recipe.teacher.folder if self.recipe.teacher else ""
        return weights_hash(Path(folder)) if folder else ""

    @cached_property
    def start_hash(self) -> str:
        """The same of `student.start_folder`."""
        folder = self.recipe.student.start_folder if self.recipe.student else ""
        return weights_hash(Path(folder)) if folder else ""

    @cached_property
    def probe_pictures(self) -> dict[str, Listing]:
        """The pictures of the probe by split; none without a probe. Raises UserError as `list_splits`."""
        return list_splits(self.recipe.probe) if self.recipe.probe else {}

    @cached_property
    def probe_hashes(self) -> dict[str, str]:
        """What tells the weights of each of `probe.models` from others.

        Raises:
            UserError: one that cannot be read, or reads other codes than the tokenizer's; a name that timm
                does not know.
        """
        hashes = {}
        for name in self.recipe.probe.timm if self.recipe.probe else []:
            check_timm(name)
        for name, folder in (self.recipe.probe.models if self.recipe.probe else {}).items():
            config, hashes[name] = _read_model(f"probe.models.{name}", folder, self.num_codes)
            self._check_layers(name, config)
        return hashes

    @cached_property
    def finetune_pictures(self) -> dict[str, Listing]:
        """The pictures of the fine-tuning by split; none without one. Raises as `probe_pictures`."""
        return arms.list_splits(self.recipe.finetune) if self.recipe.finetune else {}

    @cached_property
    def finetune_hashes(self) -> dict[str, str]:
        """What tells the weights of each of `finetune.models` from others.

        Raises:
            UserError: one that cannot be read, or is to read codes and reads others than the tokenizer's.
        """
        config = self.recipe.finetune
        if config is None:
            return {}
        codes = self.num_codes if config.input == "tokens" else None
        return {
            name: classifier_hash(Path(folder))
            if name in self.finetune_forms
            else _read_model(f"finetune.models.{name}", folder, codes)[1]
            for name, folder in config.models.items()
        }

    @cached_property
    def finetune_forms(self) -> dict[str, Form]:
        """What those of `finetune.models` are that are classifiers already, and go on.

        Raises:
            UserError: one in `run_dir`, and as `check_earlier`.
        """
        config = self.recipe.finetune
        if config is None:
            return {}
        models = {name: Path(folder) for name, folder in config.models.items()}
        run_dir = Path(self.recipe.run_dir).resolve()
        for name, folder in models.items():
            if is_classifier(folder) and folder.resolve().is_relative_to(run_dir):
                raise UserError(
                    f"finetune.models.{name}: '{folder}' lies in run_dir, whose stages replace each other;"
                    " choose another run_dir"
                )
        tokenizer = self.tokenizer if config.input == "tokens" else None
        return check_earlier(models, tokenizer, config, self.finetune_pictures["train"].classes)

    @cached_property
    def questions(self) -> tuple[list[Item], list[Item] | list[Question]]:
        """Of `prompting.choices`, and LVM's examples of `prompting.lvm_jsonl`. Raises as their readers."""
        config = self.recipe.prompting
        items = read_items(Path(config.choices)) if config.choices else []
        examples: list[Item] | list[Question] = []
        if config.lvm_jsonl:
            examples = read_lvm_examples(Path(config.lvm_jsonl), self.num_tokens, self.num_codes)
        return items, examples

    @property
    def questions_hash(self) -> str:
        """16 hexadecimal digits that change with their files, and the pictures' size and time; "" of none."""
        config, digest = self.recipe.prompting, hashlib.sha256()
        for file in filter(None, (config.choices, config.lvm_jsonl)):
            digest.update(Path(file).read_bytes())
        for asked in (each for part in self.questions for each in part if isinstance(each, Item)):
            for path in [*asked.context, *(path for paths in asked.candidates for path in paths)]:
                facts = path.stat()
                digest.update(f"{path}|{facts.st_size}|{facts.st_mtime_ns}\n".encode(errors="surrogatepass"))
        return digest.hexdigest()[:16] if any(self.questions) else ""

    @property
    def finetune_roles(self) -> list[str]:
        """The run's own models that become classifiers."""
        config = self.recipe.finetune
        return (config.roles or self.models[-1:]) if config else []

    def _check_layers(self, name: str, config: LlamaConfig) -> None:
        layers, most = self.recipe.probe.layers if self.recipe.probe else [], config.num_hidden_layers
        if max(layers, default=1) > most:
            raise UserError(f"probe.layers: {layers}, but '{name}' has 1 to {most}; [] are all")

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
        if self.tokenizer:
            return self.tokenizer.num_tokens
        return (self.recipe.data.image_size // self.recipe.tokenizer.factor) ** 2

    @property
    def num_codes(self) -> int:
        """Codes of the tokenizer."""
        return self.tokenizer.num_codes if self.tokenizer else self.recipe.tokenizer.num_codes

    @property
    def code_dim(self) -> int:
        """Numbers of a code's vector."""
        return self.tokenizer.codebook.shape[1] if self.tokenizer else self.recipe.tokenizer.code_dim

    @property
    def vocabulary(self) -> int:
        """Ids of the models: the codes, and BOS and EOS where sentences have them."""
        return max(self.num_codes - 1, *(self.recipe.sentences.ends(self.num_codes) or (0,))) + 1

    @property
    def models(self) -> list[str]:
        """The roles that the recipe has a model for, the student last."""
        return [role for role in ROLES if getattr(self.recipe, role) is not None]

    def training_config(self, role: str) -> PretrainConfig:
        """The size, steps and batches of a role; the scratch control has the student's."""
        config = self.recipe.teacher if role == "teacher" else self.recipe.student
        assert config is not None
        return config

    def model_config(self, role: str, positions: int) -> LlamaConfig:
        """The architecture of a role that reads `positions` tokens; the scratch control has the student's."""
        if role == "teacher" and self.teacher:
            return self.teacher
        bos, eos = self.recipe.sentences.ends(self.num_codes) or (None, None)
        training = self.training_config(role)
        config = llama.configuration(training.size, self.vocabulary, positions, bos=bos, eos=eos)
        if training.embedding == "codebook":  # logits that are products with so few numbers would be poor
            config.tie_word_embeddings = False
        return config

    @property
    def teacher_precision(self) -> str:
        """Of a live teacher: `32` or `bf16`."""
        student = self.recipe.student
        assert student is not None
        mixed = "bf16" if self.recipe.trainer.precision == "bf16-mixed" else "32"
        return mixed if student.teacher_precision == "auto" else student.teacher_precision

    def check(self) -> None:
        """Refuse models that cannot be trained so, before anything runs.

        Raises:
            UserError: a teacher of another vocabulary; a student that cannot be cut from it, or is not of the
                size of what it starts from; steps that processes and micro-batches cannot share; a shared
                cache within the run; a cache of more codes or rows than there are; files without questions;
                pictures of a probe or a fine-tuning that are no classes, a model of it that reads other codes
                than the tokenizer's, a classifier that its settings contradict.
        """
        recipe, cache, student = self.recipe, self.recipe.cache, self.recipe.student
        for key, model in (("teacher", recipe.teacher), ("student", student)):
            if model and not model.folder:
                check_batch_size(f"{key}.batch_size", model.batch_size, recipe.trainer.accumulate)
        _ = self.teacher, self.probe_pictures, self.probe_hashes
        _ = self.finetune_pictures, self.finetune_hashes, self.questions
        if recipe.finetune:
            self._check_finetune(recipe.finetune)
        for role in self.models:
            self._check_layers(role, self.model_config(role, 1))
        self._check_start()
        run_dir = Path(recipe.run_dir).resolve()
        if cache and cache.folder and Path(cache.folder).resolve().is_relative_to(run_dir):
            raise UserError(
                f"cache.folder: '{cache.folder}' lies in run_dir, whose stages replace each other; choose a"
                " folder elsewhere, or leave it empty for a cache of this run alone"
            )
        if cache and student:
            if cache.kind == "topk" and cache.codes > self.vocabulary:
                raise UserError(
                    f"cache.count: {cache.codes}, codes and special ids here are {self.vocabulary}"
                )
            if cache.rows > student.steps * student.batch_size:
                raise UserError(
                    f"cache.rows: {cache.rows}, the student sees {student.steps * student.batch_size}"
                )

    def _check_finetune(self, config: FinetuneConfig) -> None:
        accumulate = self.recipe.trainer.accumulate
        check_batch_size("finetune.batch_size", config.batch_size, accumulate)
        shares = ranks.world() * accumulate
        if config.views.mixes and config.batch_size // shares % 2:
            raise UserError(
                f"finetune.batch_size: {config.batch_size} must divide by 2 * processes * trainer.accumulate"
                f" = {2 * shares}: pictures are mixed in pairs; or finetune.views.mixing=0"
            )

    def check_positions(self, positions: int) -> None:
        """Refuse rows that are longer than what a given teacher takes, questions longer than any model does.

        Raises:
            UserError: they are.
        """
        if self.teacher and self.teacher.max_position_embeddings < positions:
            raise UserError(
                f"teacher.folder: '{self.training_config('teacher').folder}' takes"
                f" {self.teacher.max_position_embeddings} tokens, rows and sentences here have up to"
                f" {positions}"
            )
        taken = [self.model_config(role, positions).max_position_embeddings for role in self.models]
        begins = self.recipe.sentences.ends(self.num_codes) is not None
        for asked in (each for part in self.questions for each in part):
            if taken and (tokens := begins + length(asked, self.num_tokens)) > min(taken):
                raise UserError(f"{asked.place}: {tokens} tokens, the models here take {min(taken)}")

    def _check_start(self) -> None:
        student = self.recipe.student
        if student is None or student.start == "random":
            return
        wanted = self.model_config("student", 1)  # how much they read is no matter here
        if student.start == "checkpoint":
            found = llama.load_config(student.start_folder)
            for key in SHAPE:
                if getattr(found, key) != getattr(wanted, key):
                    raise UserError(
                        f"student.start_folder: '{student.start_folder}' has {key} {getattr(found, key)}, the"
                        f" student here {getattr(wanted, key)}"
                    )
            return
        refuse = check if student.start == "slice" else check_ends
        try:
            refuse(self.model_config("teacher", 1), wanted)
        except UserError as error:
            raise UserError(f"student.start: '{student.start}' of this teacher: {error}") from error
