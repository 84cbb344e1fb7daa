"""What a package index gets: it is complete without the repository, and says what is true."""

from __future__ import annotations

import email
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from email.message import Message
from pathlib import Path

import pytest

import whitepool

ROOT = Path(__file__).parent.parent
NEEDED = ("pyproject.toml", "README.md", "LICENSE-MIT", "LICENSE-APACHE", ".ci", "whitepool")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the package is built from."""
    copy = tmp_path_factory.mktemp("source")
    for name in NEEDED:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, copy)
    return copy


def build(source: Path, to: Path) -> list[Path]:
    """Build an sdist, and a wheel from it."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(to), str(source)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return sorted(to.iterdir())


@contextmanager
def at_address(address: str, source: Path) -> Iterator[None]:
    """Make this the address of the repository, or none, whichever is chosen by now."""
    pyproject = source / "pyproject.toml"
    before = pyproject.read_text()
    after, found = re.subn(r'(?m)^repository = ".*"$', f'repository = "{address}"', before)
    assert found == 1
    pyproject.write_text(after)
    try:
        yield
    finally:
        pyproject.write_text(before)


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        return email.message_from_bytes(archive.read(name))


def relative_links(text: str) -> list[str]:
    """Return where links and pictures lead that are of no use outside of the repository."""
    return [to for to in re.findall(r"\]\(([^)]*)\)", text) if not to.startswith("https://")]


def test_what_an_index_shows(source: Path, tmp_path: Path) -> None:
    """The README, without what leads nowhere; where no address is chosen, it names files."""
    with at_address("", source):
        wheel, sdist = build(source, tmp_path)
    checks: list[list[str | Path]] = [
        ["twine", "check", "--strict", wheel, sdist],
        ["check_wheel_contents", wheel],
    ]
    for check in checks:
        result = subprocess.run([sys.executable, "-m", *check], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    package = metadata(wheel)
    text = package.get_payload()
    assert isinstance(text, str)
    assert relative_links((ROOT / "README.md").read_text())
    assert relative_links(text) == []
    assert "The tutorial (`docs/tutorial.md`) takes you" in text
    assert "](https://trio.readthedocs.io)" in text
    assert "<!--" not in text
    assert package["Version"] == whitepool.__version__
    assert package.get_all("Project-URL") is None


def test_one_setting_makes_every_address(source: Path, tmp_path: Path) -> None:
    address = "https://example.com/whitepool"
    with at_address(address, source):
        wheel, _ = build(source, tmp_path)
    package = metadata(wheel)
    text = package.get_payload()
    assert isinstance(text, str)
    assert relative_links(text) == []
    files = f"{address}/blob/v{whitepool.__version__}"
    assert f"[The tutorial]({files}/docs/tutorial.md)" in text
    assert f"({files}/docs/postgres.md#what-a-cancellation-does)" in text
    assert f"]({address}/raw/v{whitepool.__version__}/docs/figures/overload.svg)" in text
    assert f"Source, {address}" in package.get_all("Project-URL", [])
    linked = re.findall(rf"\({address}/(?:blob|raw)/v[^/]+/([^)#]+)", text)
    assert all((ROOT / path).exists() for path in linked)


def test_nothing_internal_is_published(source: Path, tmp_path: Path) -> None:
    """The wheel has the package, with its types, and the extras are those for users."""
    wheel, _ = build(source, tmp_path)
    package = metadata(wheel)
    assert package.get_all("Provides-Extra") == ["live", "otel", "postgres"]
    core = [need for need in package.get_all("Requires-Dist", []) if "extra" not in need]
    assert [re.match(r"\w+", need)[0] for need in core] == ["structlog", "trio"]  # type: ignore[index]
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert "whitepool/py.typed" in names
    assert names == {
        str(path.relative_to(ROOT))
        for path in (ROOT / "whitepool").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ("nothing", "has no tag v"),
        ("a change", "not committed"),
        ("no heading", "has no heading"),
        ("unreleased", "entries under Unreleased"),
        ("misspelt", "usage: "),
    ],
)
def test_a_release_is_refused(wrong: str, complaint: str, tmp_path: Path) -> None:
    """Before anything is built: for a commit without its tag, a change, or a wrong changelog."""
    version = whitepool.__version__

    def git(*command: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
        subprocess.run(["git", *identity, *command], cwd=tmp_path, check=True, capture_output=True)

    for name in (".ci", "whitepool"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    entry = "\n- Something new.\n" if wrong == "unreleased" else ""
    heading = "" if wrong == "no heading" else f"## {version} - 2026-01-31\n"
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n## Unreleased\n{entry}\n{heading}")
    git("init")
    git("add", "--all")
    git("commit", "--message", "a commit")
    if wrong != "nothing":
        git("tag", f"v{version}")
    if wrong == "a change":
        (tmp_path / "news").touch()
    arguments = ["--uplaod"] if wrong == "misspelt" else []
    release = subprocess.run([tmp_path / ".ci/release", *arguments], capture_output=True, text=True)
    assert release.returncode == 1
    assert complaint in release.stderr
    assert not (tmp_path / "dist").exists()
