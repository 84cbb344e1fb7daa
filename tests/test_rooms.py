"""The rooms are what CONTRIBUTING says, and the pictures show what the code does."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import whitepool

PACKAGE = Path(whitepool.__file__).parent
ROOT = PACKAGE.parent
ROOMS = re.findall(r"^\| `((?:postgres/)?\w+\.py)` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.M)


def imported_rooms(path: Path) -> set[str]:
    """Return the modules of the package that a module imports when it runs."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = path.parents[node.level - 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {folder / f"{name}.py" for name in names}
    return {str(room.relative_to(PACKAGE)) for room in found if room.exists()}


def test_every_room_is_in_the_map() -> None:
    """With its idea, and none that is not there."""
    modules = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")}
    assert set(ROOMS) == {module for module in modules if not module.endswith("__init__.py")}


def test_imports_go_up_the_list() -> None:
    """So there are no circles."""
    for position, room in enumerate(ROOMS):
        assert imported_rooms(PACKAGE / room) <= set(ROOMS[:position]), room


def test_only_the_roster_changes_a_state() -> None:
    """No other room assigns to it; a new entry begins in OPENING."""
    writers = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if re.search(r"\.state(: \w+)? = ", path.read_text())
    }
    assert writers == {"_roster.py", "_entry.py"}
    assert (PACKAGE / "_entry.py").read_text().count(".state = ") == 1
