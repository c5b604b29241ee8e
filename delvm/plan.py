"""A recipe and the samples found -> what is trained on: sentences, views, rows. Refuses the impossible."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from delvm.errors import UserError
from delvm.images.sources import num_pictures
from delvm.images.tasks import TOKEN_SOURCES
from delvm.llama import find_size
from delvm.recipe import Recipe
from delvm.tokens import balance, lines
from delvm.tokens.balance import TaskPlan
from delvm.tokens.rows import row_length
from delvm.tokens.sentences import ANNOTATION, Form, find_forms

ANNOTATIONS = "annotations"
MOST_SAID = 10  # samples left out, by name


@dataclass(frozen=True)
class Plan:
    """What a run trains on."""

    forms: dict[str, Form]
    """The sentences of each task."""
    length: int
    """Tokens of a row."""
    tasks: dict[str, TaskPlan]
    """What each task contributes to an epoch."""
    summary: dict[str, dict[str, int | float]]
    """The same as numbers, by task."""
    notes: list[str]
    """What a user should know: samples left out, and where the data do not give what was asked for."""

    @property
    def positions(self) -> int:
        """Tokens that a model has to read at once: a row, or a sentence to be scored."""
        return max(self.length, *(form.length for form in self.forms.values()))


def make_plan(recipe: Recipe, manifest: Mapping[str, dict], *, num_tokens: int, num_codes: int) -> Plan:
    """The plan over what `manifest` lists.

    Args:
        manifest: of `images.sources.index_data`: samples by split, pictures of a sample, what was left out.
        num_tokens: of a picture.
        num_codes: of the tokenizer.

    Raises:
        UserError: samples that do not fit the sentences, or too few of them.
    """
    forms, length, plans, tokens = _fit(
        recipe,
        {task: entry["train"] for task, entry in manifest.items()},
        {task: entry["pictures"] for task, entry in manifest.items()},
        num_tokens=num_tokens,
        num_codes=num_codes,
    )
    for task, entry in manifest.items():
        shots = forms[task].shots
        if entry["validation"] < shots:  # a held-out query would have to be among its own examples
            raise UserError(f"tasks.{task}: {entry['validation']} held-out samples, a sentence shows {shots}")
    left_out = [m for entry in manifest.values() for m in [*entry["skipped"], *entry["dropped"]]]
    notes = [f"left out: {message}" for message in left_out[:MOST_SAID]]
    if len(left_out) > MOST_SAID:
        notes.append(f"left out: {len(left_out) - MOST_SAID} more, see data/manifest.json")
    if recipe.student:
        notes += [f"student.{line}" for line in recipe.student.without_effect()]
    stored = {}
    for task, plan in plans.items():
        form, of_tokens = forms[task], recipe.tasks[task].source in TOKEN_SOURCES
        # of tokens there are no views: they are shown again instead
        stored[task] = replace(plan, views=1) if of_tokens else plan
        if of_tokens and plan.views > 1:
            notes.append(f"tasks.{task}: tokens have no views, shown {plan.views} times instead")
        if plan.samples < form.shots:
            notes.append(
                f"tasks.{task}: {plan.samples} training samples, a sentence shows {form.shots}: they repeat"
            )
        if form.length > length:
            notes.append(f"tasks.{task}: sentences of {form.length} tokens, cut into rows of {length}")
    for role, section in (("teacher", recipe.teacher), ("student", recipe.student)):
        reads = section is not None and not section.folder and section.embedding == "codebook"
        if section and reads and find_size(section.size).tie_embeddings:
            notes.append(
                f"{role}.embedding: size '{section.size}' ties its head to the embedding; one that reads the"
                " codebook leaves it a head of its own"
            )
    for task, (target, share) in balance.shortfalls(plans).items():
        notes.append(
            f"tasks.{task}: {plans[task].wanted} views wanted, cut by balance.max_views:"
            f" {share:.1%} of the tokens instead of {target:.1%}"
        )
    return Plan(forms, length, stored, balance.summary(stored, tokens), notes)


def check_plan(recipe: Recipe, *, num_tokens: int, num_codes: int) -> None:
    """Refuse what the first sample of every task shows to be impossible, before all of them are read.

    Raises:
        UserError: as `make_plan`.
    """
    pictures = {
        task: lines.num_pictures(config, num_tokens, recipe.seed)
        if config.source in TOKEN_SOURCES
        else num_pictures(task, config, recipe.seed)
        for task, config in recipe.tasks.items()
    }
    _fit(recipe, dict.fromkeys(pictures, 1), pictures, num_tokens=num_tokens, num_codes=num_codes)


def _fit(
    recipe: Recipe, samples: dict[str, int], pictures: dict[str, int], *, num_tokens: int, num_codes: int
) -> tuple[dict[str, Form], int, dict[str, TaskPlan], dict[str, int]]:
    """(forms, tokens of a row, plans, tokens of a sample); every ValueError becomes a UserError."""
    tokens = {task: number * num_tokens for task, number in pictures.items()}
    try:
        shapes = {task: (c.num_frames(pictures[task]), pictures[task]) for task, c in recipe.tasks.items()}
        forms = find_forms(recipe.sentences, shapes, num_tokens)
        length = row_length(recipe.sentences, forms)
        recipe.sentences.ends(num_codes)
        _check_kinds(recipe, forms, length)
        return forms, length, balance.plan(samples, tokens, recipe.balance), tokens
    except ValueError as error:
        raise UserError(str(error)) from error


def _check_kinds(recipe: Recipe, forms: Mapping[str, Form], length: int) -> None:
    student = recipe.student
    drawn = student is not None and student.on_policy.share > 0
    on_annotations = student is not None and student.learns_from_teacher and student.kd_on == ANNOTATIONS
    for task, form in forms.items():
        source = recipe.tasks[task].source
        if form.kind == "category" and source != "classes":
            raise ValueError(f"sentences.kinds.{task}: 'category' needs source 'classes'")
        if recipe.balance.online and source in TOKEN_SOURCES:
            raise ValueError(f"balance.online: tasks.{task} has no pictures to view anew")
        for key, asked in (("balance.online", recipe.balance.online), ("student.on_policy.share", drawn)):
            if asked and form.length != length:
                raise ValueError(f"{key}: a row must be a whole sentence; leave sentences.length at 0")
        if on_annotations and ANNOTATION not in form.image_roles:
            raise ValueError(
                f"student.kd_on: '{ANNOTATIONS}', but tasks.{task} has none in sentences of kind"
                f" '{form.kind}'"
            )
        if drawn and form.images == 1 and not form.specials:
            raise ValueError(f"student.on_policy.share: tasks.{task} has one picture, nothing before it")
