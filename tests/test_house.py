"""The house rules that a machine can check: which module may import which, sizes, words that are not used."""

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mlx_mtp"
FILES = sorted(PACKAGE.rglob("*.py"))

# Top to bottom. A module may import from its own layer and from those below it.
LAYERS = (
    ("cli", "server", "__main__"),
    ("compare", "plan", "selftest"),
    ("pair", "chat", "roofline"),
    ("chips", "shapes", "provenance"),
    ("segments", "arguments", "messages", "grammar", "call_grammar", "loops"),
    (
        "engine",
        "model_runner",
        "passes",
        "load",
        "loaded",
        "text",
        "hub",
        "pairs",
        "doctor",
        "few_rows",
        "mlx_setup",
        "prompt_chunks",
        "quantized",
        "tensors",
        "weights",
        "cost_profile",
        "inside",
    ),
    ("passes",),
    ("memory_budget",),
    (
        "scheduler",
        "pace",
        "prefixes",
        "draft_length",
        "drafters",
        "accept",
        "sampling",
        "processors",
        "logprobs",
        "guide",
        "top_k",
    ),
    ("models",),
    ("cache", "views", "states", "buffers", "kernels", "kept"),
    ("rows",),
)
HEIGHT = {name: -depth for depth, layer in enumerate(LAYERS) for name in layer}
# The two exceptions: the package shows what users need, and the nouns stand on nothing of ours.
ONLY = {
    "__init__": {"pair", "rows"},
    "rows": set(),
    "text": {"rows", "messages"},
    "messages": {"rows"},
    "segments": {"text", "arguments"},
    "arguments": set(),
    "grammar": {"call_grammar", "rows", "text"},
    "call_grammar": {"rows"},
    "loops": {"rows"},
}

MAX_FUNCTION_LINES = 80
MAX_FILE_LINES = {"models": 700}
MAX_PARAMETERS = 8
MAX_README_LINES = 200

READS_ENVIRONMENT = {"cli", "mlx_setup"}  # MLX is set up by variables, before its GPU is used; that module owns them
READS_DEVICE = {"engine", "load", "prompt_chunks", "weights", "pair", "inside", "compare"}
CHECKS_DEVICE = {PACKAGE / "kernels" / f"{name}.py" for name in ("self_test", "self_test_cases")}  # while loading

TEXT_SUFFIXES = {".py", ".md", ".toml", ".json", ".jinja", ".sh", ".txt", ".yml", ".yaml", ".cfg", ""}
OTHER_TREES = {"build", "dist", "shared", "__pycache__"}
HIDDEN_TREES = {".ci", ".github"}  # of those that begin with a dot, these are ours
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:work|root|farm|home|Users)/[\w.]")


def module_of(file: Path) -> str:
    """The part of the package a file belongs to: `engine`, or `models` for everything in that folder."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(file: Path) -> Iterator[tuple[int, str]]:
    """(line, module of ours) for every import, lazy ones too. Names of the package itself count as `pair`."""
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}:{node.lineno}: relative import; write mlx_mtp.…"
            plain = node.module != PACKAGE.name
            names = [node.module] if plain else [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            first, _, rest = (name or "").partition(".")
            if first == PACKAGE.name:
                part = rest.split(".")[0]
                is_module = (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").is_file()
                yield node.lineno, part if rest and is_module else "pair"


def calls_of(file: Path) -> Iterator[tuple[int, ast.Call]]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call):
            yield node.lineno, node


def functions_of(file: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def texts_of_the_repository() -> Iterator[Path]:
    for folder, folders, files in os.walk(ROOT):  # of the folders that are left in, lest .clients is gone through
        folders[:] = sorted(name for name in folders if name not in OTHER_TREES and _is_ours(name))
        yield from (file for name in sorted(files) if (file := Path(folder, name)).suffix in TEXT_SUFFIXES)


def _is_ours(folder: str) -> bool:
    return not folder.startswith(".") or folder in HIDDEN_TREES


def test_every_module_has_a_layer():
    unknown = {module_of(file) for file in FILES} - set(HEIGHT) - {"__init__"}
    assert not unknown, f"add {sorted(unknown)} to LAYERS"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_run_downwards(file):
    module, wrong = module_of(file), []
    for line, target in imports_of(file):
        if module in ONLY:
            allowed = target in ONLY[module]
        else:
            allowed = HEIGHT[target] <= HEIGHT[module]
        if not allowed and target != module:
            wrong.append(f"{file.name}:{line}: {module} must not import {target}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_files_functions_and_signatures_are_small(file):
    wrong = []
    lines, most = len(file.read_text().splitlines()), MAX_FILE_LINES.get(module_of(file), 500)
    if lines > most:
        wrong.append(f"{file.name} has {lines} lines, more than {most}")
    for node in functions_of(file):
        size = (node.end_lineno or node.lineno) - node.lineno + 1
        if size > MAX_FUNCTION_LINES:
            wrong.append(f"{file.name}:{node.lineno}: {node.name} has {size} lines, more than {MAX_FUNCTION_LINES}")
        names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        count = len([name for name in names if name not in ("self", "cls")])
        if count > MAX_PARAMETERS:
            wrong.append(f"{file.name}:{node.lineno}: {node.name} has {count} parameters; make a frozen dataclass")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_nothing_is_probed_for_what_it_might_have(file):
    wrong = [
        f"{file.name}:{line}: {call.func.id} probes an object; say what it has in its type"
        for line, call in calls_of(file)
        if isinstance(call.func, ast.Name)
        and (call.func.id == "hasattr" or (call.func.id == "getattr" and len(call.args) + len(call.keywords) > 2))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_the_environment_is_read_at_the_edge_only(file):
    if module_of(file) in READS_ENVIRONMENT:
        return
    wrong = [
        f"{file.name}:{node.lineno}: os.{node.attr}; read it in cli and pass it on"
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv")
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_the_device_is_waited_for_in_few_places(file):
    if module_of(file) in READS_DEVICE or file in CHECKS_DEVICE:
        return
    wrong = []
    for line, call in calls_of(file):
        if isinstance(call.func, ast.Attribute):
            on_mx = isinstance(call.func.value, ast.Name) and call.func.value.id == "mx"
            if call.func.attr in ("item", "tolist") or (on_mx and call.func.attr == "eval"):
                wrong.append(f"{file.name}:{line}: {call.func.attr} makes the host wait for the device")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_module_begins_with_a_sentence_about_itself(file):
    first = (ast.get_docstring(ast.parse(file.read_text())) or "").split("\n")[0]
    assert first.endswith((".", ":")), f"{file.name} begins with {first!r}"


def test_no_file_names_a_folder_of_somebodys_machine():
    wrong = []
    for file in texts_of_the_repository():
        for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            if MACHINE_PATH.search(line):
                wrong.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not wrong, "\n".join(wrong)


def test_the_readme_is_short():
    readme = ROOT / "README.md"
    assert not readme.exists() or len(readme.read_text().splitlines()) <= MAX_README_LINES


def test_the_page_on_clients_tells_the_versions_that_are_tested():
    pins = (ROOT / "tests" / "clients" / "versions.mk").read_text()
    page = (ROOT / "docs" / "clients.md").read_text()
    versions = [*re.findall(r"[\w-]@([\d.]+)", pins), *re.findall(r"==([\d.]+)", pins)]
    versions += [commit[:7] for commit in re.findall(r"COMMIT := (\w+)", pins)]
    assert len(versions) == 7 and not [version for version in versions if f" {version} " not in page]
