"""The doctor: what it says of given versions, requirements and folders, and that it works where nothing can be imported."""

import subprocess
import sys

import pytest
from datasets.naming import camelcase_to_snakecase

from awares_bench import cli
from awares_bench.evaluation import demo, doctor

GOOD = {
    "lmms-eval": "0.7.3",
    "torch": "2.14.1+cu130",
    "torchvision": "0.29.1",
    "transformers": "5.24.0",
    "filelock": "3.32.7",
}


def test_nothing_is_said_of_what_works():
    assert doctor.known_bad(GOOD) == []
    assert doctor.known_bad({**GOOD, "torch": "2.6.0", "transformers": "5.17.0", "filelock": "3.16.0"}) == []


@pytest.mark.parametrize(
    ("changed", "said", "mend"),
    [
        ({"filelock": "4.3.1"}, "filelock 4.3.1 with lmms-eval 0.7.3", "pip install 'filelock<4'"),
        ({"filelock": "3.15.1"}, "FileLockMeta", "pip install 'filelock>=3.16,<4'"),
        ({"transformers": "5.40.0"}, "transformers 5.40.0", "pip install 'transformers<5.40'"),
        ({"transformers": "6.1"}, "transformers 6.1", "pip install 'transformers<5.40'"),
        ({"transformers": "5.16.3"}, "5.17 and later", "pip install 'transformers>=5.17,<5.40'"),
        ({"torch": "2.5.1"}, "for none", "pip install 'torch>=2.6' 'torchvision>=0.21'"),
        ({"lmms-eval": "0.7.2"}, "lack files of tasks", "pip install 'lmms-eval>=0.7.3,<0.8'"),
        ({"torchvision": None}, "torchvision is not installed", "pip install 'torchvision'"),
    ],
)
def test_a_known_fault_is_a_sentence_with_its_command(changed, said, mend):
    (fault,) = doctor.known_bad(GOOD | changed)
    assert said in fault.sentence and fault.mend == mend


def test_bounds_that_are_not_kept_are_told_with_both_versions():
    needs = ["torch==2.6.0", "numpy", "gone>=1; python_version < '3'", "dev-only; extra == 'dev'", "missing>=2,<3"]
    found = doctor.unmet("torchvision", needs, {"torch": "2.14.1", "numpy": "2.4.6"})
    assert [f.sentence for f in found] == [
        "torch is 2.14.1; torchvision needs torch==2.6.0",
        "missing is not installed; torchvision needs missing<3,>=2",
    ]
    assert found[0].mend == "pip install 'torch==2.6.0'"
    assert doctor.unmet("no-such-package-anywhere")[0].mend == "pip install -e ."


def test_the_tested_set_is_read_for_this_python_and_compared():
    text = "# made by\na==1\nb==2 ; python_version < '3'\nb==3 ; python_version >= '3'\n"
    assert doctor.tested_set(text) == {"a": "1", "b": "3"}
    assert doctor.tested_set("../constraints.txt") == {}  # a link that was checked out as text
    assert doctor.compare({"a": "1.0", "b": "4", "c": "1", "d": None}, {"a": "1", "b": "3", "d": "1"}) == ["b 4 (tested: 3)"]
    assert "lmms-eval" in doctor.tested_set()


def test_a_failed_import_is_told_by_its_last_line():
    assert doctor.tried("import json") is None
    assert doctor.tried("import no_such_module_here") == "ModuleNotFoundError: No module named 'no_such_module_here'"
    assert doctor.tried("raise SystemExit(3)") == "exit status 3"


def test_a_data_set_is_found_in_either_cache_by_the_names_that_the_libraries_give(tmp_path):
    sets, hub = tmp_path / "datasets", tmp_path / "hub"
    for repository in doctor.DATA_SETS.values():
        assert not doctor.cached(repository, sets, hub)
        owner, name = repository.split("/")
        prepared = sets / f"{owner}___{camelcase_to_snakecase(name)}"
        prepared.mkdir(parents=True)
        assert not doctor.cached(repository, sets, hub)  # an empty folder holds nothing
        (prepared / "default").mkdir()
        assert doctor.cached(repository, sets, hub)
    (hub / "datasets--echo840--OCRBench" / "snapshots" / "abc").mkdir(parents=True)
    assert doctor.cached("echo840/OCRBench", tmp_path / "none", hub)


def test_the_caches_are_where_the_environment_says(tmp_path, monkeypatch):
    for name in ("HF_DATASETS_CACHE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert doctor.caches() == [tmp_path / "datasets", tmp_path / "hub"]
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "d"))
    assert doctor.caches()[0] == tmp_path / "d"


def test_the_command_tells_a_fault_and_exits_with_1(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "IMPORTS", {"torch": "import json", "lmms-eval": "import no_such_module_here"})
    monkeypatch.setattr(doctor, "device", lambda: "ImportError: no torch")
    assert cli.main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "fault: lmms-eval does not work: ModuleNotFoundError: No module named 'no_such_module_here'" in said
    assert "device: unknown, PyTorch fails: ImportError: no torch" in said
    assert "mend: pip install" in said


@pytest.mark.slow  # .ci/run gives the command
def test_the_command_exits_with_0_where_all_is_well(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "IMPORTS", {})
    monkeypatch.setattr(doctor, "unmet", lambda name: [])
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "nothing here is known not to work" in said and "attention: sdpa with" in said and "official data sets" in said
    monkeypatch.setattr(doctor, "tested_set", dict)
    assert cli.main(["doctor"]) == 0
    assert "constraints.txt is not in the package" in capsys.readouterr().out


def test_it_imports_nothing_that_may_be_broken():
    heavy = {"torch", "torchvision", "transformers", "lmms_eval", "datasets", "filelock", "numpy"}
    code = f"import sys, awares_bench.cli, awares_bench.evaluation.doctor; sys.exit(bool({heavy!r} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd="/").returncode == 0


def test_the_demo_asks_the_doctor_when_lmms_eval_leaves_no_results(tmp_path, monkeypatch, capsys):
    def failed(command, env, log, *_):
        log.write_text("lmms-eval said this\n")
        return 0

    monkeypatch.setattr(demo, "_watched", failed)
    monkeypatch.setattr(demo.doctor, "run", lambda: print("fault: filelock 4"))
    with pytest.raises(RuntimeError, match=r"left no results(.|\n)*lmms-eval said this"):
        demo.run(tmp_path / "out", ["awares_full"])
    assert "fault: filelock 4" in capsys.readouterr().err


def test_versions_are_printed_where_a_package_is_not_installed(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_version", {"awares-bench": "0.1.0", "torch": "2.14.1"}.get)
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "awares-bench 0.1.0",
        "lmms-eval not installed",
        "torch 2.14.1",
        "transformers not installed",
    ]
