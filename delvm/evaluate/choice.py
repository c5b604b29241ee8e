"""Questions in pictures -> the loss of every candidate, and how often the lowest is the answer.

LVM's way of asking a model that only continues sentences (Bai et al., CVPR 2024): of several candidates it
chooses the one that it finds least surprising after the context. Two kinds of JSONL files, one question a
line, their paths relative to the file:

    {"context": ["a.png", "b.png", "c.png"], "candidates": ["d.png", "e.png"], "answer": 0, "group": "colour"}
    {"input": ["a.png", "b.png", "c.png"], "target": ["d.png"]}

The second is LVM's for its perplexity: one candidate, nothing to choose.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm
from transformers import LlamaForCausalLM

from delvm import llama
from delvm.errors import UserError
from delvm.evaluate.likelihood import mean_perplexity, score_tokens
from delvm.images.files import read_picture
from delvm.tokenizer import Tokenizer
from delvm.tokens.encoder import Encoder
from delvm.tokens.formats import read_lvm

TIE = 1e-6  # nats a token: what rounding leaves between candidates of equal codes
WHOLE, REST = "all", "ungrouped"  # what accuracies call the items together, and those of no group
BATCH = 32  # pictures that are read and encoded side by side


@dataclass(frozen=True)
class Item:
    """A question in pictures."""

    place: str
    """Its file and line."""
    context: list[Path]
    candidates: list[list[Path]]
    """Pictures that may follow; of one picture each, but in LVM's files."""
    answer: int = 0
    group: str = ""
    """What it asks for, such as `colour`: accuracy is given by group."""


@dataclass(frozen=True)
class Question:
    """A question in codes."""

    place: str
    context: Tensor
    """(n,) int64."""
    candidates: Tensor
    """(candidates, m) int64."""


# --- files -> questions ---


def read_items(file: Path) -> list[Item]:
    """Multiple-choice questions.

    Raises:
        UserError: with file and line: what is no such question, a picture that is not there.
    """
    items = []
    for place, line in _lines(file):
        context, candidates = (_paths(line, key, file, place) for key in ("context", "candidates"))
        if len(candidates) < 2:
            raise UserError(f"{place}: candidates: {len(candidates)}, must be at least 2")
        answer, group = line.get("answer"), line.get("group", "")
        if type(answer) is not int or not 0 <= answer < len(candidates):
            raise UserError(f"{place}: answer: {answer!r:.40} must be in 0..{len(candidates) - 1}")
        if not isinstance(group, str):
            raise UserError(f"{place}: group: {group!r:.40} is no text")
        if group in (WHOLE, REST):
            raise UserError(f"{place}: group: '{group}' is a name of what is counted; choose another")
        items.append(Item(place, context, [[path] for path in candidates], answer, group))
    return items


def read_lvm_examples(file: Path, num_tokens: int, num_codes: int) -> list[Item] | list[Question]:
    """LVM's examples, of pictures or of tokens; of a line of tokens the last picture is the target.

    num_tokens, num_codes: of a picture, and in all, by the tokenizer.

    Raises:
        UserError: with file and line: what is no such example, a picture that is not there, tokens that are
            not those of two or more pictures of this tokenizer.
    """
    if "tokens" in next(_lines(file))[1]:
        lines = enumerate(read_lvm(file), 1)
        return [_of_tokens(f"{file}, line {number}", codes, num_tokens, num_codes) for number, codes in lines]
    return [
        Item(place, _paths(line, "input", file, place), [_paths(line, "target", file, place)])
        for place, line in _lines(file)
    ]


def read_lvm_questions(file: Path, tokenizer: Tokenizer) -> list[Question]:
    """The same in codes. Raises as it, and as `encode_items`."""
    return encode_items(read_lvm_examples(file, tokenizer.num_tokens, tokenizer.num_codes), tokenizer)


def _of_tokens(place: str, tokens: np.ndarray, picture: int, num_codes: int) -> Question:
    codes = torch.from_numpy(tokens)
    if len(codes) % picture or len(codes) < 2 * picture:
        raise UserError(f"{place}: {len(codes)} tokens, must be pictures of {picture}, two or more")
    if (largest := int(codes.max())) >= num_codes:
        raise UserError(f"{place}: code {largest}, the tokenizer has {num_codes}")
    return Question(place, codes[:-picture], codes[None, -picture:])


def length(asked: Item | Question, num_tokens: int) -> int:
    """Tokens of a question's context and longest candidate; num_tokens: of a picture."""
    if isinstance(asked, Question):
        return len(asked.context) + asked.candidates.shape[1]
    return num_tokens * (len(asked.context) + max(map(len, asked.candidates)))


def _lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and line, what it says) of every line; at least one."""
    number = 0
    try:
        with file.open("rb") as lines:
            for number, text in enumerate(lines, 1):
                place = f"{file}, line {number}"
                try:
                    line = json.loads(text)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{place}: not JSON ({getattr(error, 'msg', error)})") from error
                if not isinstance(line, dict):
                    raise UserError(f"{place}: not a JSON object")
                yield place, line
    except OSError as error:
        raise UserError(f"{file}: unreadable ({error.strerror})") from error
    if not number:
        raise UserError(f"{file}: is empty")


def _paths(line: dict[str, Any], key: str, file: Path, place: str) -> list[Path]:
    names = line.get(key)
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{place}: {key}: {names!r:.40} must be a list of paths")
    paths = [file.parent / name for name in names]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{place}: {key}: no file '{path}'")
    return paths


# --- pictures -> codes ---


def encode_items(asked: Sequence[Item] | Sequence[Question], tokenizer: Tokenizer) -> list[Question]:
    """Every picture in the tokenizer's codes, on the device that it is on; what is in codes stays as it is.

    Pictures are resized to its size, bicubic and whatever their aspect, as LVM does it.

    Raises:
        UserError: a picture that cannot be read.
    """
    items = [each for each in asked if isinstance(each, Item)]
    shown = [path for item in items for paths in (item.context, *item.candidates) for path in paths]
    paths = list(dict.fromkeys(shown))
    codes: dict[Path, Tensor] = {}
    encoder = Encoder(tokenizer)
    for start in tqdm(range(0, len(paths), BATCH), desc="encode", unit="batch", disable=len(paths) <= BATCH):
        batch = paths[start : start + BATCH]
        pictures = torch.from_numpy(np.stack([_square(path, tokenizer.image_size) for path in batch]))
        pictures = pictures.to(tokenizer.codebook.device).unsqueeze(1)
        codes |= zip(batch, encoder(pictures).squeeze(1).cpu(), strict=True)
    return [
        each if isinstance(each, Question) else Question(
            each.place,
            torch.cat([codes[path] for path in each.context]),
            torch.stack([torch.cat([codes[path] for path in paths]) for paths in each.candidates]),
        )
        for each in asked
    ]  # fmt: skip


def _square(path: Path, size: int) -> np.ndarray:
    picture = Image.fromarray(read_picture(path))
    return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC))


# --- a model's answers ---


def candidate_losses(
    model: LlamaForCausalLM,
    questions: Sequence[Question],
    *,
    bos: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> list[Tensor]:
    """(candidates,) float64 of every question: mean nats a token of each candidate after the context.

    bos: the id that a context begins with. progress is called with the number of questions done.

    Raises:
        UserError: a question that is longer than what the model takes; a model whose logits are no numbers.
    """
    positions = model.config.max_position_embeddings
    begin = torch.tensor([] if bos is None else [bos], dtype=torch.int64)
    for question in questions:  # all of them, before the first takes its time
        length = len(begin) + len(question.context) + question.candidates.shape[1]
        if length > positions:
            raise UserError(f"{question.place}: {length} tokens, the model takes {positions}")
    losses = []
    for question in questions:
        context = torch.cat([begin, question.context]).expand(len(question.candidates), -1)
        sentences = torch.cat([context, question.candidates], 1)
        losses.append(score_tokens(model, sentences, first=context.shape[1]).nll.double().mean(1))
        if progress is not None:
            progress(1)
    return losses


def ask(
    models: Mapping[str, Path],
    items: Sequence[Item],
    examples: Sequence[Item] | Sequence[Question],
    tokenizer: Tokenizer,
    *,
    device: torch.device,
) -> dict[str, dict[str, Any]]:
    """Ask every model the same.

    Args:
        models: folders by name; one is in memory at a time.
        items: multiple-choice questions.
        examples: LVM's, as `read_lvm_examples` gives them.
        tokenizer: on `device`.

    Returns:
        "choice" and "lvm", where there are any: by model, `accuracies` of the one, `mean_perplexity` of the
        other.

    Raises:
        UserError: as `encode_items` and `candidate_losses`.
    """
    found: dict[str, dict[str, Any]] = {}
    questions, targets = encode_items(items, tokenizer), encode_items(examples, tokenizer)
    with tqdm(total=len(models) * (len(items) + len(examples)), desc="questions", unit="item") as bar:
        for name, folder in models.items():
            model = llama.load(folder).to(device)
            losses = partial(candidate_losses, model, bos=model.config.bos_token_id, progress=bar.update)
            if questions:
                found.setdefault("choice", {})[name] = accuracies(items, losses(questions))
            if targets:
                perplexity = mean_perplexity([loss.item() for loss in losses(targets)])
                found.setdefault("lvm", {})[name] = perplexity
    return found


def accuracies(items: Sequence[Item], losses: Sequence[Tensor]) -> dict[str, dict[str, float]]:
    """How often the candidate of lowest loss (so of lowest perplexity) is the answer, by group and over all.

    Where several candidates are lowest, such as pictures that the tokenizer cannot tell apart, the answer
    counts as a guess among them.

    Returns:
        group ("ungrouped" of items without one), and "all" where there are several, or none -> {"items",
        "accuracy", "low", "high", "chance"}: `wilson`'s interval, and what guessing would have.
    """
    groups: dict[str, list[tuple[float, float]]] = {}
    for item, of_candidates in zip(items, losses, strict=True):
        lowest = of_candidates <= of_candidates.min() + TIE
        right = float(lowest[item.answer]) / int(lowest.sum())
        groups.setdefault(item.group or REST, []).append((right, 1 / len(of_candidates)))
    if set(groups) == {REST}:
        groups = {WHOLE: groups[REST]}
    elif len(groups) > 1:
        groups[WHOLE] = [pair for pairs in groups.values() for pair in pairs]
    found = {}
    for group, pairs in groups.items():
        right, chance = (sum(part) for part in zip(*pairs, strict=True))
        low, high = wilson(right, len(pairs))
        found[group] = {
            "items": len(pairs), "accuracy": right / len(pairs), "low": low, "high": high,
            "chance": chance / len(pairs),
        }  # fmt: skip
    return found


def wilson(right: float, number: int, z: float = 1.959964) -> tuple[float, float]:
    """The score interval of a proportion (Wilson 1927): lowest and highest that `z` standard errors allow.

    right of number, 0 <= right <= number; z: 1.96 for 95%. Unlike the normal interval it stays within 0..1
    and has a width at 0 and at 1.
    """
    if not 0 <= right <= number or number < 1:
        raise ValueError(f"right: {right} of {number}, must be 0 to at least 1")
    part, square = right / number, z**2 / number
    centre = part + square / 2
    width = z * math.sqrt(part * (1 - part) / number + square / number / 4)
    return max(0.0, (centre - width) / (1 + square)), min(1.0, (centre + width) / (1 + square))
