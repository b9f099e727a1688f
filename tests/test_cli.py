"""The command line: a light help, commands that load their code when they are chosen, refusals in a sentence."""

import subprocess
import sys

import pytest

from awares_bench import cli


def paths(commands: dict, before: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Words of every command, those below others too."""
    return [
        words
        for name, (_, command) in commands.items()
        for words in (paths(command, (*before, name)) if isinstance(command, dict) else [(*before, name)])
    ]


def test_the_help_names_every_command_and_loads_none():
    code = (
        "import sys, contextlib\nfrom awares_bench import cli\nwith contextlib.suppress(SystemExit):\n    cli.main(['--help'])\n"
        "heavy = {'torch', 'pandas', 'matplotlib', 'lmms_eval', 'PIL'} & set(sys.modules); sys.exit(', '.join(sorted(heavy)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"\n    {name}" in done.stdout for name in cli.COMMANDS)


@pytest.mark.parametrize("words", paths(cli.COMMANDS), ids=" ".join)
def test_every_command_has_a_help_of_its_own(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*words, "--help"])
    assert not stopped.value.code and f"usage: awares-bench {' '.join(words)} " in capsys.readouterr().out


@pytest.mark.parametrize("words", [["bnech"], ["bench"], ["bench", "towers"], ["train", "dpo"]], ids=" ".join)
def test_an_unknown_command_is_refused_with_those_there_are(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "invalid choice" in said or "required: PART" in said


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "awares_bench", "tasks"], cwd="/", capture_output=True, text=True)
    assert (
        done.returncode == 0
        and done.stdout
        == subprocess.run([sys.executable, "-m", "awares_bench.cli", "tasks"], cwd="/", capture_output=True, text=True).stdout
    )


def test_tasks_and_methods_are_printed(capsys):
    assert cli.main(["tasks"]) == 0 and capsys.readouterr().out.strip().endswith("tasks")
    assert cli.main(["methods"]) == 0 and "visionzip" in capsys.readouterr().out
