"""The rooms are what CONTRIBUTING says, and the pictures show what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import grimp

import whitepool
from whitepool._entry import TRANSITIONS, State

PACKAGE = Path(whitepool.__file__).parent
ROOT = Path(__file__).parent.parent
ROOMS = re.findall(r"^\| `((?:postgres/)?\w+\.py)` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.M)


def test_every_room_is_in_the_map() -> None:
    """Once, with its idea, and none that is not there."""
    modules = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")}
    assert sorted(ROOMS) == sorted(room for room in modules if not room.endswith("__init__.py"))


def test_imports_go_up_the_list() -> None:
    """So there are no circles."""
    graph = grimp.build_graph("whitepool", exclude_type_checking_imports=True, cache_dir=None)
    modules = ["whitepool." + room.removesuffix(".py").replace("/", ".") for room in ROOMS]
    for position, module in enumerate(modules):
        imported = graph.find_modules_directly_imported_by(module)
        assert imported.intersection(modules) <= set(modules[:position]), module


def test_only_the_roster_changes_a_state() -> None:
    """No other room assigns to it; a new entry begins in OPENING."""
    writers = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if re.search(r"\.state(: \w+)? = ", path.read_text())
    }
    assert writers == {"_roster.py", "_entry.py"}
    assert (PACKAGE / "_entry.py").read_text().count(".state = ") == 1


def test_the_picture_of_a_life_shows_the_states() -> None:
    """Every state is a box in it, and every transition that the code allows is an arrow."""
    picture = (ROOT / "docs" / "pictures" / "life-of-a-worker.svg").read_text()
    assert set(re.findall(r'data-state="(\w+)"', picture)) == {state.name for state in State}
    arrows = re.findall(r'data-from="(\w+)" data-to="(\w+)"', picture)
    allowed = {(state.name, after.name) for state, then in TRANSITIONS.items() for after in then}
    assert len(arrows) == len(set(arrows))
    assert set(arrows) == allowed


def test_the_oldest_releases_are_those_that_are_tested() -> None:
    """`make test-lowest` runs with what the package says that it allows."""
    tested = re.findall(r"^(\S+)==(\S+)$", (ROOT / "tests" / "lowest.txt").read_text(), re.M)
    assert len(tested) == 3
    for package, version in tested:
        (allowed,) = set(
            re.findall(rf'"{re.escape(package)}>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
        )
        assert version == allowed or version == f"{allowed}.0"
