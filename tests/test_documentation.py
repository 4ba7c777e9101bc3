"""The Markdown files and the comments name only files, identifiers, commands and options that exist."""

import re
from functools import cache
from pathlib import Path

import pytest
import typer

from lenet_fast import cli

ROOT = Path(__file__).parent.parent
FOLDERS = ("lenet_fast", "csrc", "tests", "scripts", "benchmarks", "examples", "docs", ".ci")
FILES = [
    path
    for path in (*ROOT.glob("*"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*")))
    if path.is_file() and "__pycache__" not in path.parts
]
MARKDOWN = [path for path in FILES if path.suffix == ".md" and "assets" not in path.parts]
SOURCES = [path for path in FILES if path.suffix in {".py", ".cpp", ".h", ".cu", ".cuh", ".sh", ".toml"}]
SOURCES += [ROOT / "Makefile"]
FILE_NAME = r"[\w./*-]*[\w*]\.(?:py|h|cuh|cu|cpp|md|csv|png|sh|toml|txt)\b"

each_markdown_file = pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: str(path.relative_to(ROOT)))


PLACEHOLDER = r"NAME|RESULT|STAGE|^seen\.png$"


def exists(name, beside):
    """As a path from the file that names it, or by its end: of a folder's name no more than tells the files apart."""
    return bool(list(beside.parent.glob(name))) or any(path.match(name) for path in FILES)


@each_markdown_file
def test_files_that_are_named_exist(path):
    text = path.read_text()
    named = [name for code in re.findall(r"`([^`\n]+)`", text) for name in re.findall(FILE_NAME, code)]
    named += re.findall(r"\]\(([^)#:]+)\)", text)
    named += re.findall(r"\b(?:benchmarks|scripts|tests|examples)/\w+\.(?:py|sh)\b", text)
    assert [name for name in named if not re.search(PLACEHOLDER, name) and not exists(name, path)] == []


def test_files_that_sources_name_exist():
    missing = []
    for path in SOURCES:
        if ROOT / "tests" not in path.parents:  # where names are those of files that a test writes
            text = re.sub(r"^#include <.*", "", path.read_text(), flags=re.MULTILINE)
            named = set(re.findall(r"[\w./-]*\w\.(?:py|h|cuh|cu|cpp|md|sh)\b", text))
            missing += [
                f"{path.name}: {name}" for name in named if not re.search(PLACEHOLDER, name) and not exists(name, path)
            ]
    assert missing == []


@cache
def words_of_sources():
    texts = [path.read_text() for path in SOURCES if path != Path(__file__)]
    return {word for text in texts for word in re.findall(r"\w+", text) + re.findall(r"--[a-z][a-z-]+", text)}


# What only others have: instructions, libraries' environment variables, PyTorch's schedulers, packaging.
FOREIGN = {"vrcp14ps", "vscalefps", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "malloc"}
FOREIGN |= {"cp", "async", "mma", "OneCycleLR", "cycle_momentum", "venv"}


@each_markdown_file
def test_identifiers_that_are_named_exist(path):
    prose = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    code = [re.sub(FILE_NAME, "", each) for each in re.findall(r"`([^`\n]+)`", prose)]
    options = {option for each in code for option in re.findall(r"(?<!\S)--([a-z][a-z-]+)", each)}
    named = {word for each in code for word in re.findall(r"[A-Za-z_]\w*", each)}
    unknown = {option for option in options if {f"--{option}", option.replace("-", "_")}.isdisjoint(words_of_sources())}
    assert sorted(unknown | (named - words_of_sources() - FOREIGN)) == []


def test_the_foreign_names_are_used():
    text = "".join(path.read_text() for path in MARKDOWN)
    assert [name for name in sorted(FOREIGN) if name not in text] == []


def options_of(command):
    return {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}


@pytest.mark.parametrize("path", [*MARKDOWN, ROOT / "Makefile"], ids=lambda path: str(path.relative_to(ROOT)))
def test_options_of_the_command_line_exist(path):
    commands = typer.main.get_command(cli.app).commands
    text = path.read_text().replace("\\\n", " ")
    for name, rest in re.findall(r"lenet-fast ([a-z]\w*)([^`#\n]*)", text):
        assert name in commands
        assert set(re.findall(r"(?<!\S)--[a-z-]+", rest)) <= options_of(commands[name]), name


@each_markdown_file
def test_options_of_the_benchmarks_exist(path):
    text = path.read_text().replace("\\\n", " ")
    for name, rest in re.findall(r"python benchmarks/(\w+\.py)([^`#\n]*)", text):
        script = "".join((ROOT / "benchmarks" / each).read_text() for each in (name, "readme_section.py"))
        for option in re.findall(r"(?<!\S)--([a-z-]+)", rest):
            assert re.search(rf'"--{option}"|^    {option.replace("-", "_")}: ', script, re.MULTILINE), (name, option)


@each_markdown_file
def test_targets_of_make_exist(path):
    targets = re.search(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert set(re.findall(r"(?:^ *|`)(?:\w+=\S+ )?make ([\w-]+)", path.read_text(), re.MULTILINE)) <= set(targets)
