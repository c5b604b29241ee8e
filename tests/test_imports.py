"""Imports point one way: read from the sources, nothing is imported here."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# a file may import the files above it
ORDER = [
    "errors",
    "ranks",
    "stages",
    "console",
    "images.annotate",
    "images.degrade",
    "images.augment",
    "images.duplicates",
    "images.files",
    "images.folders",
    "images.lmdb",
    "images.video",
    "images.coco",
    "images.sa1b",
    "images.scenes",
    "images.tasks",
    "images.listing",
    "images.sources",
    "monitor",
    "callbacks",
    "training",
    "tokenizer.vqgan",
    "tokenizer.published",
    "tokenizer.measures",
    "tokenizer.linear_start",
    "tokenizer.quantizers",
    "tokenizer.perceptual",
    "tokenizer.adversarial",
    "tokenizer.training",
    "tokens.balance",
    "tokens.formats",
    "tokens.lines",
    "tokens.journal",
    "tokens.store",
    "tokens.encoder",
    "tokens.encoding",
    "tokens.sentences",
    "tokens.rows",
    "tokens.online",
    "published",
    "embedding",
    "llama",
    "generation",
    "student",
    "distill.divergences",
    "distill.comparisons",
    "distill.fused",
    "memory",
    "distill.teacher",
    "distill.records",
    "distill.cache",
    "distill.sliceable",
    "distill.moments",
    "distill.layers",
    "distill.refit",
    "distill.slice",
    "distill.agreement",
    "pretrain",
    "distill.on_policy",
    "distill.module",
    "evaluate.likelihood",
    "evaluate.prompting",
    "evaluate.pose",
    "evaluate.scores",
    "evaluate.choice",
    "evaluate.held_out",
    "evaluate.readers",
    "evaluate.features",
    "evaluate.classifiers",
    "evaluate.heads",
    "evaluate.probe",
    "finetune.views",
    "finetune.classifier",
    "finetune.training",
    "finetune.earlier",
    "finetune.arms",
    "evaluate.charts",
    "evaluate.tables",
    "evaluate.gallery",
    "evaluate.board",
    "evaluate.comparison",
    "evaluate.report",
    "evaluate.runs",
    "export.usage",
    "export.graphs",
    "export.onnx",
    "export.quality",
    "export.card",
    "export.folder",
    "recipe",
    "plan",
    "given",
    "material",
    "export.source",
    "export.__main__",
    "teach",
    "chain",
    "summary",
    "fit",
    "evaluate.__main__",
    "prompt",
    "report",
    "demo.examples",
    "demo.prompt",
    "demo.page",
    "demo.__main__",
]
PURE = ["tokens.balance", "distill.divergences", "distill.records", "images.augment", "images.annotate"]
MAY_IMPORT_RECIPE = [
    "plan", "given", "material", "export.source", "teach", "chain", "summary", "fit", "evaluate.__main__",
]  # fmt: skip

FILES = {
    ".".join(path.relative_to(ROOT / "delvm").with_suffix("").parts): path
    for path in sorted((ROOT / "delvm").rglob("*.py"))
}
MODULES = {name: path for name, path in FILES.items() if path.name != "__init__.py"}
# "" is delvm/__init__.py
PACKAGES = {
    name.removesuffix("__init__").rstrip("."): path for name, path in FILES.items() if name not in MODULES
}


def imported(path: Path) -> set[str]:
    """Every module of delvm that a source names in an import, wherever it stands.

    A package stands for what its __init__ imports.
    """
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import hides where it points"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name == "delvm" or name.startswith("delvm."):
                found |= resolve(name.removeprefix("delvm").lstrip("."))
    return found


def resolve(name: str) -> set[str]:
    """tokens.balance or tokens.balance.plan -> tokens.balance; tokenizer.Tokenizer -> tokenizer.vqgan"""
    if name in MODULES:
        return {name}
    if name in PACKAGES:
        return imported(PACKAGES[name])
    assert name, "delvm itself is a package"
    return resolve(name.rpartition(".")[0])


def test_every_module_has_its_place():
    assert set(MODULES) <= set(ORDER), "a module of delvm is missing in ORDER"
    assert set(ORDER) <= set(MODULES), "ORDER names a module that is not there"


@pytest.mark.parametrize("name", MODULES)
def test_a_file_imports_only_files_above_it(name):
    below = imported(MODULES[name]) - set(ORDER[: ORDER.index(name)])
    assert not below, f"{name} imports {sorted(below)}"


@pytest.mark.parametrize("name", [name for name in PACKAGES if name])  # delvm itself offers what is below it
def test_a_package_re_exports_only_its_own(name):
    assert all(module.startswith(f"{name}.") for module in imported(PACKAGES[name]))


@pytest.mark.parametrize("name", PURE)
def test_pure_files_import_nothing_of_delvm(name):
    assert imported(MODULES[name]) == set()


def test_who_imports_recipe_and_fit():
    tools = {f"tools/{path.name}": path for path in (ROOT / "tools").glob("*.py")}
    importers = {name: imported(path) for name, path in {**FILES, **tools}.items()}
    recipe = {name for name, modules in importers.items() if "recipe" in modules}
    assert {name for name in recipe if not name.startswith("tools/")} <= set(MAY_IMPORT_RECIPE)
    fit = {name for name, modules in importers.items() if "fit" in modules}
    assert {name for name in fit if not name.startswith("tools/")} == set()


def test_the_reader_sees_every_form_of_import(tmp_path):
    path = tmp_path / "example.py"
    path.write_text(
        "import torch, delvm.llama\n"
        "from delvm import recipe as recipes, __version__\n"
        "from delvm.tokens import balance\n"
        "from delvm.tokens.store import open_store\n"
        "from delvm.tokenizer import Tokenizer\n"
        "def later():\n    from delvm.training import train\n"
    )
    expected = {
        "llama",
        "recipe",
        "student",  # which delvm.load is of
        "tokens.balance",
        "tokens.store",
        "tokenizer.vqgan",
        "tokenizer.published",
        "training",
    }
    assert imported(path) == expected
