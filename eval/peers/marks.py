"""Make a table of the tests that compare this code with public code, from their `parity` marks. The tests do not run.

A mark is `@pytest.mark.parity(peer, error)`. The first word of `peer` is a package in constraints.txt or in RESTATED. `error` is the
largest error that the test allows: a number, the name of a constant in the same file, or a text. 0 means equal.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from eval.tables import markdown

RELEASED_AS = {"open_clip": "open_clip_torch"}
RESTATED = {"LDM", "IP-Adapter"}  # not on PyPI: the test reimplements their rule


def versions(constraints: str) -> dict[str, str]:
    """Return the version of each package in a constraints file."""
    lines = (line.split("==") for line in constraints.splitlines() if "==" in line)
    return {name.lower(): version for name, version in lines}


def marks(tree: ast.Module) -> Iterator[tuple[str, str, str]]:
    """Yield (test, peer, error) for every marked test in a file. Raises ValueError if a mark has arguments that are not literals."""
    assignments = (node for node in tree.body if isinstance(node, ast.Assign))
    constants = {ast.unparse(node.targets[0]): node.value for node in assignments}
    for test in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
        for mark in test.decorator_list:
            if not isinstance(mark, ast.Call) or ast.unparse(mark.func) != "pytest.mark.parity":
                continue
            try:
                peer, error = (ast.literal_eval(constants.get(ast.unparse(value), value)) for value in mark.args)
            except ValueError as e:
                raise ValueError(f"{test.name}: write its mark as parity(peer, error), with literals or names of constants") from e
            limit = f"{error:.0e}" if isinstance(error, float) else str(error)
            yield test.name, peer, "equal" if error == 0 else limit


def table(root: Path) -> str:
    """Make the table of docs/parity.md: test, peer, version of the peer, largest error allowed."""
    pinned, rows = versions((root / "constraints.txt").read_text()), []
    for path in sorted((root / "tests").glob("test_*.py")):
        for test, peer, error in marks(ast.parse(path.read_text())):
            package = peer.split()[0]
            if package not in RESTATED and RELEASED_AS.get(package, package) not in pinned:
                raise ValueError(f"{path.name}::{test} compares with {package}, which constraints.txt does not list")
            version = "restated" if package in RESTATED else pinned[RELEASED_AS.get(package, package)]
            rows.append((f"[`tests/{path.name}::{test}`](../tests/{path.name})", peer, version, error))
    return markdown(pd.DataFrame(rows, columns=["what", "peer", "version", "largest error allowed"]))
