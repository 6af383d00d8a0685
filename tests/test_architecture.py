"""The shape of the project: which way imports point, what the UNet never mentions, safe loading, live links."""

from __future__ import annotations

import ast
import json
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("model", "checkpoints", "sampling", "train", "eval")
ALLOWED = {
    "model": set(),
    "checkpoints": {"model"},
    "weights_convert": {"checkpoints"},
    "sampling": {"model", "checkpoints"},
    "train": {"model", "checkpoints", "sampling"},
    "eval": {"model", "checkpoints", "sampling", "train"},
}
LONG = {"sampling/pipeline.py::sample"}  # 18 of its lines are its arguments, one a line
LINES = {"weights_convert.py": 250, "model/attention.py": 130}
PICKLES = {".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle", ".npy", ".joblib"}


@cache
def sources() -> dict[str, ast.Module]:
    """Every file of the packages, and weights_convert."""
    paths = [
        ROOT / "weights_convert.py",
        *(path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))),
    ]
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in paths}


def imports(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """(module, whether its bare name is bound) of every import, those inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, alias.asname is None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield str(node.module), False


def package_of(path: str) -> str:
    return path.split("/")[0].removesuffix(".py")


def tracked() -> list[Path]:
    """The files of the repository; in an unpacked copy without git, all that are not hidden or made."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0 and listed.stdout:
        return [path for line in listed.stdout.splitlines() if (path := ROOT / line).is_file()]
    folders = [ROOT / name for name in (*PACKAGES, "tests", "weights", "notebooks", "results")]
    return [
        path for folder in folders for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]


def notebook_code() -> dict[str, ast.Module]:
    by_name = {}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        lines = [
            line
            for cell in cells
            for line in "".join(cell["source"]).splitlines()
            if not line.lstrip().startswith(("%", "!"))
        ]
        by_name[str(path.relative_to(ROOT))] = ast.parse("\n".join(lines))
    return by_name


def test_there_is_something_to_check() -> None:
    assert {package_of(path) for path in sources()} == set(ALLOWED)
    assert {"model/unet.py", "model/attention.py", "sampling/ddim.py", "train/loop.py"} < set(sources())


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_one_way(package: str) -> None:
    for path, tree in sources().items():
        if package_of(path) == package:
            ours = {name.split(".")[0] for name, _ in imports(tree)} & {*ALLOWED, "tests"}
            assert ours <= ALLOWED[package] | {package}, f"{path} imports {ours - ALLOWED[package] - {package}}"


def test_no_imports_go_in_circles() -> None:
    """Not even those inside functions; what only a type checker imports does not count."""
    modules = {path.removesuffix(".py").replace("/", "."): tree for path, tree in sources().items()}
    graph: dict[str, set[str]] = {}
    for module, tree in modules.items():
        unread = [
            node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        ]
        skip = {id(inner) for node in unread for inner in ast.walk(node)}
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and id(node) not in skip]
        named = {f"{node.module}.{alias.name}" for node in nodes for alias in node.names}
        graph[module] = (named | {str(node.module) for node in nodes}) & set(modules)
    assert graph["eval.bench"] >= {"eval.prompts", "model.adapter"}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("package", ALLOWED)
def test_functions_are_short(package: str) -> None:
    long = {
        f"{path}::{node.name}"
        for path, tree in sources().items()
        if package_of(path) == package
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.end_lineno and node.end_lineno - node.lineno >= 40
    }
    assert long == {name for name in LONG if package_of(name) == package}, "longer than 40 lines, or no longer long"


@pytest.mark.parametrize("path", LINES)
def test_pages_that_a_reader_opens_first_are_short(path: str) -> None:
    assert len((ROOT / path).read_text().splitlines()) <= LINES[path]


def test_no_package_is_imported_by_its_bare_name() -> None:
    """`model` is a variable that everybody writes, `eval` a builtin."""
    tests = {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in (ROOT / "tests").glob("*.py")}
    for path, tree in (sources() | notebook_code() | tests).items():
        bare = {name for name, bound in imports(tree) if bound and name.split(".")[0] in ("model", "eval")}
        assert not bare, f"{path} has `import {', '.join(bare)}`"


def test_model_reads_no_files_or_arguments() -> None:
    for path, tree in sources().items():
        if package_of(path) == "model":
            assert not {name.split(".")[0] for name, _ in imports(tree)} & {
                "argparse",
                "pathlib",
                "os",
                "json",
                "safetensors",
                "tqdm",
            }, path


def test_the_unet_knows_of_no_picture_prompt() -> None:
    text = (ROOT / "model" / "unet.py").read_text()
    text = text.replace("T2I-Adapter", "")  # another method, whose residuals the UNet takes
    assert not re.search(r"adapter|image.?prompt|decoupled|\bimage\b|scale", text, re.IGNORECASE)
    tree = sources()["model/unet.py"]
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    assert not {name for name in names if re.search("adapter|image|ip_", name, re.IGNORECASE)}


def calls(tree: ast.AST, module: str, function: str) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == f"{module}.{function}":
            yield node


def test_nothing_is_unpickled() -> None:
    for path, tree in (sources() | notebook_code()).items():
        for call in calls(tree, "torch", "load"):
            given = {word.arg: ast.unparse(word.value) for word in call.keywords}
            assert given.get("weights_only") == "True", f"{path}, line {call.lineno}"
        used = {name.split(".")[0] for name, _ in imports(tree)}
        assert not used & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}, path
        words = {word.arg for node in ast.walk(tree) if isinstance(node, ast.Call) for word in node.keywords}
        assert "allow_pickle" not in words, path


def test_no_pickles_are_tracked() -> None:
    assert not [path for path in tracked() if path.suffix in PICKLES]


def test_weights_have_their_cards() -> None:
    for path in (ROOT / "weights").glob("*.safetensors"):
        assert "licence" in json.loads(path.with_suffix(".json").read_text()), path.name


def readme() -> str:
    path = ROOT / "README.md"
    assert path.exists(), "there is no README.md"
    return path.read_text()


def defined(tree: ast.AST) -> set[str]:
    """What a file defines at its top: `function`, `Class`, `Class.method`, `CONSTANT`."""
    names = set()
    for node in getattr(tree, "body", []):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names |= {node.name} | {f"{node.name}.{inner}" for inner in defined(node)}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


PAGES = [ROOT / "README.md", ROOT / "RESULTS.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_are_alive(page: Path) -> None:
    matches = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    links = [link for link in matches if not re.match(r"https?:|mailto:|#", link)]
    assert not [link for link in links if not (page.parent / link.split("#")[0]).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_named_functions_are_there(page: Path) -> None:
    for path, name in re.findall(r"([\w/]+\.py)::([\w.]+)", page.read_text()):
        assert (ROOT / path).exists(), path
        assert name in defined(ast.parse((ROOT / path).read_text())), f"{path} has no {name}"


def test_the_readme_is_short() -> None:
    assert len(readme().encode()) <= 9000


def test_equation_table_has_a_link_and_a_test_in_every_row() -> None:
    rows = [
        line for line in readme().splitlines() if line.startswith("|") and re.search(r"Eq\.|[Ss]ection|Figure", line)
    ]
    assert len(rows) >= 8
    for row in rows:
        assert "::" in row and "tests/test_" in row, row
    assert all(re.search(rf"\bEq\.[^|]*\b{number}\b", "\n".join(rows)) for number in range(1, 9)), (
        "an equation of the paper is missing"
    )


@pytest.mark.parametrize("preset", ["decoupled", "softmax(Q K^T / sqrt d) V  +  lambda * softmax(Q K'^T / sqrt d) V'"])
def test_readme_shows_the_line(preset: str) -> None:
    assert preset in readme() and preset in (ROOT / "model" / "attention.py").read_text()


def test_readme_code_is_the_codes() -> None:
    """The function that the README shows is the one in the file, docstring aside."""
    shown = next(block for block in re.findall(r"```python\n(.*?)```", readme(), re.DOTALL) if "def decoupled" in block)

    def body(text: str) -> list[str]:
        function = next(
            node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name == "decoupled"
        )
        return [ast.unparse(node) for node in function.body[1:]]

    assert body(shown) == body((ROOT / "model" / "attention.py").read_text())
