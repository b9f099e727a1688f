"""The house rules: who may import whom, what a bare import costs, what the wheel holds."""

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("baselines", "tasks", "training", "reports")


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module)
    return found


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


ROOFS = ("cli.py", "app.py", "demo.py", "bench")
"""Parts of the core that may import the other rooms, inside functions."""


def test_the_core_imports_no_room_and_no_room_imports_another():
    for folder in ("awares_bench", *ROOMS):
        for path in files(folder):
            rooms = {m.split(".")[1] for m in imported(path) if m.startswith("awares_bench.") and m.split(".")[1] in ROOMS}
            allowed = set(ROOMS) if {path.name, path.parent.name} & set(ROOFS) else {folder}
            allowed |= {"tasks"} if folder == "training" else set()  # nano is trained on the pictures of its suite
            assert rooms <= allowed, f"{path} imports {rooms - allowed}"


def test_lmms_eval_appears_in_the_adapter_its_runner_and_its_entry_point_only():
    users = {
        p.name
        for folder in ("awares_bench", *ROOMS)
        for p in files(folder)
        if any(m.split(".")[0] == "lmms_eval" for m in imported(p))
    }
    assert users == {"lmms_model.py", "lmms_run.py", "lmms_manifest.py"}


def test_reports_never_import_torch():
    code = (
        "import sys; from importlib import import_module; import awares_bench.cli, awares_bench.evaluation.demo;"
        "[import_module(f'awares_bench.reports.{m}') for m in ('report', 'gallery.select')];"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd="/").returncode == 0


def test_the_stair_of_packages_has_no_step_up_and_no_circle():
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


def test_a_bare_import_is_light():
    code = "import sys, awares_bench, awares_bench.methods.crop_grid, awares_bench.evaluation.lmms_manifest; sys.exit(bool({'torch', 'transformers', 'lmms_eval'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd="/").returncode == 0


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_refuses_a_second_import_name(room):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {room}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert f"awares_bench.{room}" in done.stderr and done.returncode == 1


def test_no_file_names_a_machine_path_or_a_registry_host():
    texts = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.*"), *ROOT.glob("*.toml"), *ROOT.glob("*.yml"), *ROOT.glob(".github/*/*.yml")]
    for path in [*texts, *(p for f in ("awares_bench", *ROOMS) for p in files(f))]:
        text = path.read_text()
        for word in ("/work/", "/root/", "/home/", "/opt/", "pypi.org"):
            assert word not in text, f"{path} holds {word!r}"


def test_the_methods_page_holds_the_current_table_and_the_layout_page_names_every_core_file():
    from awares_bench.methods.registry import table

    assert table() in (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    layout = (ROOT / "docs" / "layout.md").read_text(encoding="utf-8")
    assert all(p.name in layout for p in files("awares_bench") if p.name != "__init__.py")


HOST_WORDS = re.compile(r"qwen|smolvlm|internvl|idefics|1176|<\|im_|rotary_emb|model\.visual\b", re.IGNORECASE)


def code_of(path: Path) -> str:
    """A file without its comments and docstrings, and without the strings that a reader sees."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value = ast.Constant(None)
    return ast.unparse(tree)


def test_what_differs_between_model_families_is_in_models_only():
    """The benches' random models and the laboratory that made nano are of one family by their nature."""
    for path in [p for folder in ("awares_bench", "baselines", "training") for p in files(folder)]:
        if path.relative_to(ROOT).parts[:2] in {("awares_bench", "models"), ("awares_bench", "bench"), ("training", "nano")}:
            continue
        found = [line for line in code_of(path).splitlines() if HOST_WORDS.search(line)]
        assert not found, f"{path}: {found}"


def test_every_mutation_names_a_line_that_is_there_once():
    from .mutations import MUTATIONS

    for name, file, before, _, _ in MUTATIONS:
        assert (ROOT / file).read_text().count(before) == 1, name


def test_what_git_tracks_stays_below_40_MiB():
    told = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True).stdout
    size = sum((ROOT / name).stat().st_size for name in told.split("\0") if name and (ROOT / name).exists())
    assert size < 40 * 2**20, f"{size:,} bytes are tracked; at most 41,943,040: store what is large packed, or leave it out"


@pytest.mark.slow
def test_the_wheel_holds_what_git_tracks(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)], check=True, capture_output=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    packed = {n for n in zipfile.ZipFile(wheel).namelist() if n.startswith("awares_bench/")}
    tracked = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=True).stdout.splitlines()
    wanted = {
        f if f.startswith("awares_bench/") else f"awares_bench/{f}"
        for f in tracked
        if f.split("/")[0] in ("awares_bench", *ROOMS)
    }
    wanted = {f for f in wanted if not f.startswith(("awares_bench/training/nano/logs/", "awares_bench/reports/published/"))}
    assert packed == wanted
