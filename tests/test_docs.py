"""The documentation: a short README, pages equal to the code, links that lead somewhere, code blocks that run."""

import importlib.util
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from awares_bench.methods import registry
from awares_bench.methods.options import options

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def load(path: Path):
    """A file outside the package as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = load(ROOT / "docs" / "generate.py")


def prose(text: str) -> str:
    """A page without its code, in which brackets are no links and # is no heading."""
    return re.sub(r"`[^`\n]*`", "`code`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def anchors(text: str) -> set[str]:
    """What links may name in a page: its headings, as forges and mkdocs write them."""
    headings = re.findall(r"^#+ (.*)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150
    assert len(README.split()) <= 1500


def test_install_and_the_first_command_stand_within_the_first_40_lines():
    lines = README.splitlines()[:40]
    assert "pip install -e ." in lines and "awares-bench demo" in lines


def test_the_readme_begins_with_its_picture_and_lists_every_method_once():
    assert "![" in "".join(README.splitlines()[:6])
    listed = re.findall(r"\[`(\w+)`\]\((?:baselines|awares_bench)/\w+\.py\)", README)
    assert sorted(listed) == registry.own_names()


@pytest.mark.parametrize("page", sorted({page for page, _ in generate.PARTS}))
def test_generated_parts_are_as_the_code_has_them(page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert generate.filled(page, text) == text, "run: python docs/generate.py"


def test_a_page_without_its_marks_is_refused():
    with pytest.raises(ValueError, match="has no marks '<!-- begin methods -->'"):
        generate.filled("methods.md", "# Methods\n")


def test_every_option_of_every_method_is_described_once():
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| .* \| (.+) \|$", generate.method_options(), re.M)
    wanted = [(name, option) for name in registry.own_names() for option in options(registry.method_class(name))]
    assert [(name, option) for name, option, _ in rows] == wanted
    assert all(len(text) > 10 for *_, text in rows)


def test_the_options_page_lists_every_option_of_a_model_with_its_default():
    from awares_bench.evaluation.run_options import RunOptions

    text = (ROOT / "docs" / "options.md").read_text(encoding="utf-8").partition("Two more options")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", text, re.M))
    assert rows == {field.name: generate.value(field.default) for field in fields(RunOptions)}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file_and_a_heading(page):
    for target, anchor in re.findall(r"\]\(([^)\s#]*)(?:#([^)\s]*))?\)", prose(page.read_text(encoding="utf-8"))):
        if "://" in target or target.startswith("mailto:"):
            continue
        file = (page.parent / target).resolve() if target else page
        assert file.is_file() and ROOT in file.parents, f"{page.name} links to {target}, which is not there"
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{page.name} links to {target}#{anchor}: no such heading"


def test_every_page_is_in_the_navigation_once():
    def listed(entry):
        if isinstance(entry, str):
            return [entry]
        return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in listed(part)]

    nav = listed(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    pages = [p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")]
    assert sorted(nav) == sorted(pages), "list every page of docs/ in mkdocs.yml"


def commands(text: str) -> list[list[str]]:
    """Words of the awares-bench commands in a page's shell blocks, comments and continuations taken out."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.M | re.S)
    lines = [line.partition(" #")[0] for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [words[words.index("awares-bench") + 1 :] for line in lines if "awares-bench" in (words := line.split())]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_shell_blocks_name_commands_and_options_that_exist(page, capsys):
    from awares_bench.cli import main

    for words in commands(page.read_text(encoding="utf-8")):
        command = words[: 2 if words[0] in ("bench", "train", "nano") else 1]
        with pytest.raises(SystemExit) as stopped:
            main([*command, "--help"])
        shown = capsys.readouterr().out
        assert not stopped.value.code, f"{' '.join(words)}: no such command"
        for option in (word for word in words if word.startswith("--")):
            assert option in shown, f"{' '.join(words)}: no option {option}"


def test_python_blocks_that_are_whole_methods_run(tmp_path):
    text = (ROOT / "docs" / "add_a_method.md").read_text(encoding="utf-8") + README
    sources = [s for s in re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S) if "@dataclass" in s]
    names = [re.search(r"^class (\w+)", source, re.M)[1] for source in sources]
    assert names == ["Strip", "Norm", "Half"]
    for name, source in zip(names, sources, strict=True):
        (tmp_path / f"{name}.py").write_text(source)
        made = registry.build(f"{tmp_path / name}.py:{name}", {"retention": 0.25} if name == "Norm" else {})
        assert (made.pruner is None) == (name != "Norm")


def test_the_section_on_one_picture_uses_names_that_the_package_has():
    if not (ROOT / "awares_bench" / "api.py").is_file():
        pytest.skip("this checkout has no awares_bench/api.py yet; the section is dropped if it does not come")
    import awares_bench

    (block,) = [b for b in re.findall(r"^```python\n(.*?)^```", README, flags=re.M | re.S) if "awares_bench.load" in b]
    for name in re.findall(r"awares_bench\.(\w+)", block):
        assert hasattr(awares_bench, name), name


def test_links_out_of_docs_lead_to_copies_in_the_site():
    hooks = load_hooks()
    assert hooks.in_site("baselines/fastv.py") == "files/baselines/fastv.py.txt"
    assert hooks.in_site("docs/speed.md") == "speed.md" and hooks.origin("speed.md") == "docs/speed.md"
    assert hooks.in_site("reports/published/nano/figures/table.md") == "files/reports/published/nano/figures/table.md"


def load_hooks():
    pytest.importorskip("mkdocs")
    return load(ROOT / "docs" / "hooks.py")


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings_handlers.python")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "files" / "baselines" / "fastv.py.txt").is_file()


def test_citation_names_the_paper_and_this_version():
    from awares_bench import __version__

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__ and "2603.16932" in citation["preferred-citation"]["url"]


@pytest.mark.parametrize("form", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda p: p.stem)
def test_issue_forms_hold_what_forges_ask_for(form):
    read = yaml.safe_load(form.read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= set(read)
    for part in read["body"]:
        assert part["type"] in ("textarea", "input", "dropdown") and {"label"} <= set(part["attributes"])
    assert len({part["id"] for part in read["body"]}) == len(read["body"])
