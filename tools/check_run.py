"""Check that a run folder holds every artifact, whole and consistent: python tools/check_run.py RUN_DIR."""

import json
import math
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM

SCORES = {"loss", "accuracy", "perplexity"}
SCORES |= {f"annotation_{score}" for score in SCORES} | {"pictures"}


def check(run: Path) -> None:
    """Raises AssertionError or OSError at the first thing that is missing or wrong."""
    for name in (
        "recipe.yaml",
        "metrics.json",
        "report.html",
        "tokens/manifest.json",
        "tokenizer/config.json",
    ):
        assert (run / name).stat().st_size > 0, name
    assert list((run / "tensorboard").rglob("events.out.tfevents.*")), "no TensorBoard events"
    for name in ("teacher", "scratch", "student", "export"):
        model = AutoModelForCausalLM.from_pretrained(run / name)
        print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters")
    metrics = json.loads((run / "metrics.json").read_text())
    for task, entry in metrics["balance"].items():
        assert entry["tokens_after"] >= entry["tokens_before"] > 0, (task, entry)
    codes = json.loads((run / "tokens" / "manifest.json").read_text())["num_codes"]
    assert metrics["tokenizer"]["codes_used"] >= 0.9 * codes, metrics["tokenizer"]
    for model in ("teacher", "scratch", "student"):
        for task, scores in metrics["evaluate"][model].items():
            assert set(scores) >= SCORES, (model, task)
            assert scores["pictures"].keys() == {"truth", "reconstruction", "ceiling"}, (model, task)
            assert math.isclose(math.exp(scores["loss"]), scores["perplexity"], rel_tol=1e-6), (model, task)
            assert 0 <= scores["accuracy"] <= 1, (model, task)
    assert not list(run.glob(".*.partial")), "left-overs of a stage"
    seconds = sum(metrics["seconds"].values())
    losses = {m: sum(t["loss"] for t in ts.values()) / len(ts) for m, ts in metrics["evaluate"].items()}
    print(f"all stages: {seconds:.0f} s; mean loss over tasks: {losses}")
    assert losses["student"] < losses["scratch"], "the distilled student is not below scratch"


if __name__ == "__main__":
    check(Path(sys.argv[1]))
