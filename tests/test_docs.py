"""README.md and docs/ say what is so: links, options, files in commands, and the design rules that code cites by number."""

import dataclasses
import re
import shlex

import pytest
from conftest import ROOT

from vllm_quantspec.config import OPTION_NAMES, QuantSpecOptions

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Folders of the repository: what a command names inside one of them has to be there.
FOLDERS = ("benchmarks", "docs", "examples", "kernels", "tests", "tools", "vllm_quantspec")


def prose(text: str) -> str:
    """Markdown without its fenced blocks and `code`."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page; a repeated heading's get -1, -2, ..."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} (.+)$", FENCE.sub("", text), re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        base = re.sub(r"[^\w\- ]", "", words).strip().replace(" ", "-")
        anchor = base
        number = 0
        while anchor in found:
            number += 1
            anchor = f"{base}-{number}"
        found.add(anchor)
    return found


def table_of_options(text: str) -> dict[str, str]:
    """{option: default as printed} of the page's table of options."""
    rows = text.split("| option | default | values | meaning |\n", 1)[1].split("\n\n", 1)[0].splitlines()[1:]
    cells = [[cell.strip().strip("`") for cell in row.strip("|").split("|")] for row in rows]
    return {row[0]: row[1] for row in cells}


def commands(text: str) -> list[str]:
    """Lines of the page's shell blocks without comments, continued lines joined."""
    blocks = [body for language, body in FENCE.findall(text) if language == "sh"]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def test_what_finds_links_and_anchors():
    text = "# A `b`, c (d)\n```sh\n# no heading [x](y.md)\n```\n## A\n## A\n`[no](link)` [link](z.md#q)\n"
    assert anchors(text) == {"a-b-c-d", "a", "a-1"}
    assert re.findall(r"\]\(([^)\s]+)\)", prose(text)) == ["z.md#q"]
    assert commands("```sh\na \\\n  b # c\n# d\n```\n```text\ne\n```\n") == ["a    b # c"]


def test_the_readme_takes_ten_minutes():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_and_anchors_resolve(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)\s]+)\)", prose(text))
    assert links or page.name == "CHANGELOG.md"
    for link in links:
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT) and target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(target.read_text()), f"{page.name}: {link}"


@pytest.mark.parametrize("page", ["README.md", "docs/operating.md"])
def test_every_option_is_in_the_table_with_its_default(page):
    table = table_of_options((ROOT / page).read_text())
    printed = {True: "true", False: "false"}
    assert tuple(table) == OPTION_NAMES
    for field in dataclasses.fields(QuantSpecOptions):
        expected = printed[field.default] if isinstance(field.default, bool) else str(field.default)
        assert table[field.name] == expected, field.name


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_name_files_that_exist(page):
    for line in commands(page.read_text()):
        for word in shlex.split(line, comments=True):
            if word.split("/")[0] in FOLDERS and "/" in word:
                assert (ROOT / word).exists(), f"{page.name}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_files_named_in_the_text_exist(page):
    """`folder/file` in code quotes, also with a function behind it, and `results/file` of the benchmarks."""
    text = FENCE.sub("", page.read_text())
    for name in re.findall(rf"`((?:{'|'.join(FOLDERS)}|results|integration)/[\w./-]+)", text):
        roots = {"results": ROOT / "benchmarks", "integration": ROOT / "vllm_quantspec"}
        path = roots.get(name.split("/")[0], ROOT) / name
        assert path.exists() or path.with_suffix(".py").exists(), f"{page.name}: {name}"


def test_shell_blocks_use_commands_that_are_declared():
    """`make` targets and the benchmarks' and the command's own flags."""
    makefile = (ROOT / "Makefile").read_text()
    seen = set()
    for page in PAGES:
        for line in commands(page.read_text()):
            words = shlex.split(line, comments=True)
            if words[0] == "make":
                seen.add(words[1])
                assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), line
            if words[0] == "python":
                source = (ROOT / words[1]).read_text()
                for flag in (word for word in words if word.startswith("--")):
                    assert f'"{flag}"' in source, line
    assert {"demo", "test"} <= seen


def test_cited_design_rules_exist():
    rules = {int(n) for n in re.findall(r"^### Rule (\d+): ", (ROOT / "docs" / "design.md").read_text(), re.MULTILINE)}
    assert rules == set(range(1, 9))
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    sources = [path for path in files if path.suffix in (".py", ".cu", ".cuh", ".md")]
    cited = {(int(n), path.name) for path in sources for n in re.findall(r"\b[Rr]ule (\d+)", path.read_text())}
    assert len({number for number, _ in cited if number in rules}) > 3
    for number, name in cited:
        assert number in rules, f"{name} cites design rule {number}"
