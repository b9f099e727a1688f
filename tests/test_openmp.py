"""OpenMP's spin: set before PyTorch is loaded, unless the user has chosen."""

import json
import os
import subprocess
import sys

import pytest

from awares_bench.openmp import OF_THE_USER, SHORT_SPIN

SHOW = f"import json, os; print(json.dumps([done, {{k: os.environ.get(k) for k in {OF_THE_USER!r}}}]))"


def told(code: str, **variables) -> list:
    """What a fresh process has done and set."""
    clean = {k: v for k, v in os.environ.items() if k not in OF_THE_USER}
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; {SHOW}"], env=clean | variables, capture_output=True, text=True, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_command_line_sets_the_spin_before_torch_is_loaded():
    done, variables = told("import sys; from awares_bench import cli; cli.main([]); done = 'torch' in sys.modules")
    assert not done and variables == {**SHORT_SPIN, "OMP_WAIT_POLICY": None}
    assert variables["GOMP_SPINCOUNT"] == "1000"  # measured against others: docs/speed.md


@pytest.mark.parametrize("name", OF_THE_USER)
def test_what_the_user_set_stands(name):
    done, variables = told("from awares_bench.openmp import set_short_spin; done = set_short_spin()", **{name: "7"})
    assert done and variables == dict.fromkeys(OF_THE_USER) | {name: "7"}


def test_after_torch_it_is_set_for_other_processes_only_and_the_plugin_can_tell():
    code = "import sys; sys.modules['torch'] = sys; from awares_bench.openmp import set_short_spin as s; done = [s(), s()]"
    done, variables = told(code)
    assert done == [False, False] and variables["GOMP_SPINCOUNT"] == SHORT_SPIN["GOMP_SPINCOUNT"]
    assert told("from awares_bench.openmp import set_short_spin as s; done = s()", AWARES_BENCH_OPENMP_TOO_LATE="1")[0]


def test_the_tests_themselves_run_under_a_policy():
    assert any(os.environ.get(name) for name in OF_THE_USER)
