"""A model and what was measured of it -> README.md of its folder."""

import re
from collections.abc import Mapping
from typing import Any

from transformers import LlamaForCausalLM

from delvm.evaluate.comparison import MODELS
from delvm.evaluate.report import METRICS
from delvm.export.quality import Loss
from delvm.export.usage import Usage
from delvm.tokenizer import Tokenizer

ORIGINS = {
    "student": ", distilled from a larger teacher (cross-entropy and KL divergence to its predictions)",
    None: "",
}
"""How a model was made, by its name in the run; None: nobody knows. Any other learned from labels."""


def model_card(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    card: Mapping[str, Any],
    usage: Usage,
    *,
    losses: Mapping[str, Loss] | None = None,
    num_bytes: int = 0,
) -> str:
    """README.md: what it is, results, usage, data, recipe.

    card: see `folder.export`. losses: of a lossy format by task, whose model takes `num_bytes`.
    """
    config, metrics = model.config, card["metrics"]
    role = card.get("role") or next(reversed(metrics), None)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    rows, columns = tokenizer.grid
    data = "\n".join(f"- {line.strip()}" for line in str(card["data"]).splitlines() if line.strip())
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", card["recipe"])), default=0))
    recipe = f"{fence}yaml\n{card['recipe'].rstrip()}\n{fence}" if card["recipe"] else "unknown"
    lost = f"\n{_what_is_lost(losses, num_bytes, 4 * parameters)}\n" if losses else ""
    return f"""---
library_name: {usage.library}
pipeline_tag: image-to-image
tags: [autoregressive-vision, visual-prompting, vq-tokens]
---

# {_line(card["name"])}

An autoregressive vision model{ORIGINS.get(role, ", trained by next-token prediction")}.
It continues visual sentences, `image annotation image annotation ...`, written in the codes of the VQ
tokenizer beside it: shown example pairs of a task and a query, it draws the query's annotation.

- model: `LlamaForCausalLM`, {parameters / 1e6:,.2f}M parameters, {config.num_hidden_layers} layers of width \
{config.hidden_size}, {config.max_position_embeddings} positions
- tokens: {tokenizer.num_codes} codes; beginning {_special(config.bos_token_id)}, \
end {_special(config.eos_token_id)}
- pictures: {tokenizer.image_size} × {tokenizer.image_size} pixels, {rows} × {columns} = \
{tokenizer.num_tokens} codes each

## Measured

On held-out sentences, given everything before each code; loss in nats, perplexity = exp(loss).\
{f" This folder holds **{_cell(MODELS.get(role, role))}**." if role else ""}

{_table(metrics)}
{lost}
## Use

With `pip install {usage.packages}`, in this folder:

```python
{usage.code}```

{usage.notes}

## Data

{data or "not described"}

## Recipe

{recipe}
"""


def _what_is_lost(losses: Mapping[str, Loss], num_bytes: int, exact_bytes: int) -> str:
    rows = [
        f"| {_cell(task)} | {x.sentences} | {x.exact:.3f} | {x.lossy:.3f} | {x.same_code:.1%}"
        f" | {x.same_drawn:.1%} |"
        for task, x in losses.items()
    ]
    return "\n".join(
        [
            "## What int8 costs",
            "",
            f"The layers' matrices are int8: {num_bytes / 1e6:,.2f} MB instead of {exact_bytes / 1e6:,.2f} MB"
            " in float32. Against the model in float32: loss in nats; how often both find the same code most"
            " likely, given the same codes before it; how many codes of greedily drawn pictures are equal.",
            "",
            "| sentences | number | loss in float32 | loss in int8 | same code | same code drawn |",
            "|---|---:|---:|---:|---:|---:|",
            *rows,
        ]
    )


def _table(metrics: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    models = sorted(metrics, key=lambda model: list(MODELS).index(model) if model in MODELS else len(MODELS))
    lines = ["| task | model | " + " | ".join(key.replace("_", " ") for key in METRICS) + " |"]
    lines.append("|---|---|" + "---:|" * len(METRICS))
    for task in dict.fromkeys(task for model in models for task in metrics[model]):
        for model in models:
            row = metrics[model].get(task)
            if row is not None:
                cells = [f"{row[key]:.3f}" if key in row else "–" for key in METRICS]
                lines.append(f"| {_cell(task)} | {_cell(MODELS.get(model, model))} | {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else "Nothing was measured."


def _special(token: int | None) -> str:
    return "none" if token is None else f"id {token}"


def _line(text: object) -> str:
    return " ".join(str(text).split())


def _cell(text: object) -> str:
    return _line(text).replace("|", "\\|")
