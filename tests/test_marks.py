"""The `parity` marks of the tests, and their table."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from eval.peers import marks

ROOT = Path(__file__).parent.parent
FILES = {path.name: path.read_text() for path in (ROOT / "tests").glob("test_*.py") if path != Path(__file__)}
PEER = re.compile(r"(?:equal|equals|is|are|of|in|than)_(?:diffusers|transformers|open_clip)")


def marked(mark: str) -> ast.Module:
    return ast.parse(f"EXACT = 1e-12\n\n@pytest.mark.parity({mark})\ndef test_a(): ...\n\ndef test_b(): ...\n")


@pytest.mark.parametrize(
    ("error", "shown"), [("EXACT", "1e-12"), ("2e-4", "2e-04"), ("0", "equal"), ("1", "1"), ("'twice theirs'", "twice theirs")]
)  # fmt: skip
def test_a_mark_is_read(error: str, shown: str) -> None:
    assert list(marks.marks(marked(f"'diffusers UNet', {error}"))) == [("test_a", "diffusers UNet", shown)]


@pytest.mark.parametrize("mark", ["", "'diffusers UNet'", "'diffusers UNet', OTHER", "'diffusers UNet', 1e-12, 3"])
def test_a_mark_that_cannot_be_read_is_refused(mark: str) -> None:
    with pytest.raises(ValueError, match=r"test_a: write its mark as parity\(peer, error\)"):
        list(marks.marks(marked(mark)))


def test_a_peer_without_a_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "constraints.txt").write_text("# versions\nopen_clip_torch==3.3.0\n")
    path = tmp_path / "tests" / "test_a.py"
    path.write_text(ast.unparse(marked("'open_clip tokenize', 0")))
    assert "| open_clip tokenize | 3.3.0 | equal |" in marks.table(tmp_path)
    path.write_text(ast.unparse(marked("'diffuser UNet', 0")))
    with pytest.raises(ValueError, match=r"test_a\.py::test_a compares with diffuser, which constraints\.txt does not"):
        marks.table(tmp_path)


def test_every_mark_is_in_the_table() -> None:
    """This includes marks on a class or on a whole module, which `marks` would miss."""
    assert sum(text.count("pytest.mark.parity") for text in FILES.values()) == marks.table(ROOT).count("](../tests/")


@pytest.mark.parametrize("name", FILES)
def test_tests_named_after_a_peer_are_marked(name: str) -> None:
    tests = {node.name for node in ast.parse(FILES[name]).body if isinstance(node, ast.FunctionDef)}
    named = {test for test in tests if test.startswith("test_") and PEER.search(test)}
    assert named <= {test for test, *_ in marks.marks(ast.parse(FILES[name]))}
