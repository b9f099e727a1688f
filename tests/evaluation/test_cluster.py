"""The SLURM scripts: run with stand-ins for what a cluster has; what they would start is read by the parsers of those programs."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from awares_bench import cli
from awares_bench.evaluation import sweep

FOLDER = Path(__file__).parents[2] / "examples" / "cluster"
SCRIPTS = sorted(FOLDER.glob("*.sbatch"))


def started(script: str, tmp_path: Path, *arguments: str) -> list[list[str]]:
    """The commands that a script starts on the first of two nodes."""
    programs, log = tmp_path / "bin", tmp_path / "log"
    programs.mkdir()
    stand_ins = {"scontrol": 'printf "node1\\nnode2\\n"', "srun": '"$@"'}
    for name in ("accelerate", "vllm", "awares-bench"):  # each writes a line at once: they may run beside each other
        stand_ins[name] = f'line=$(printf "%q " {name} "$@"); printf "%s\\n" "$line" >> {log}'
    if script == "vllm_replicas.sbatch":  # the client waits for the server
        stand_ins["awares-bench"] += f"; for _ in $(seq 600); do grep -q ^vllm {log} && break; sleep 0.1; done"
    for name, body in stand_ins.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    slurm = {"SLURM_NNODES": "2", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "node[1-2]"}
    env = os.environ | slurm | {"PATH": f"{programs}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", str(FOLDER / script), *arguments], env=env, cwd=FOLDER.parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in log.read_text().splitlines()]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_a_script_is_bash_and_says_what_it_wants(script):
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True).returncode == 0
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, env=os.environ | {"SLURM_JOB_NODELIST": "x"})
    assert (done.returncode and "recipe" in done.stderr + done.stdout) or "method" in done.stderr or "checkpoint" in done.stderr
    assert script.name in (FOLDER / "README.md").read_text()


@pytest.mark.parametrize(
    ("script", "arguments", "module", "rest"),
    [
        ("sft.sbatch", ["paper_sft_7b", "out=/s/x"], "awares_bench.cli", ["train", "sft", "paper_sft_7b", "out=/s/x"]),
        ("grpo.sbatch", ["paper_grpo_7b", "out=/s/x"], "awares_bench.cli", ["train", "grpo", "paper_grpo_7b", "out=/s/x"]),
        ("lmms_eval.sbatch", ["awares", "C", "docvqa_val", "/s/r"], "lmms_eval", ["--model", "awares"]),
    ],
)
def test_accelerate_starts_a_process_a_gpu_on_every_node(tmp_path, script, arguments, module, rest):
    from accelerate.commands.launch import launch_command_parser

    (command,) = started(script, tmp_path, *arguments)
    assert command[:2] == ["accelerate", "launch"]
    args = launch_command_parser().parse_args(command[2:])
    assert (args.num_machines, args.num_processes, args.machine_rank, args.main_process_ip) == (2, 16, 0, "node1")
    assert args.module and args.training_script == module and args.training_script_args[: len(rest)] == rest
    if args.config_file:
        launch = yaml.safe_load((FOLDER.parents[1] / args.config_file).read_text())
        assert launch["fsdp_config"]["fsdp_version"] == 2
    else:
        given = dict(zip(args.training_script_args[::2], args.training_script_args[1::2], strict=False))
        assert given["--model_args"] == "pretrained=C,output_dir=/s/r" and given["--tasks"] == "docvqa_val"


def test_workers_share_a_recipe(tmp_path, monkeypatch):
    (command,) = started("sweep_workers.sbatch", tmp_path, "paper_table1", "/s/table1", "--limit", "8")
    seen = []
    monkeypatch.setattr(sweep, "main", lambda args: seen.append(args) or 0)
    assert cli.main(command[1:]) == 0
    assert (seen[0].recipe, str(seen[0].out), seen[0].worker, seen[0].limit) == ("paper_table1", "/s/table1", True, 8)


def test_a_served_recipe_names_the_server_that_the_job_started(tmp_path):
    commands = started("vllm_replicas.sbatch", tmp_path, "C", str(FOLDER / "served.yaml"), str(tmp_path / "out"))
    (ours,) = [c for c in commands if c[0] == "awares-bench"]
    cells = sweep.read(ours[2]).cells
    assert {c.options["base_url"] for c in cells} == {"http://127.0.0.1:8000/v1"} and {c.options["replicas"] for c in cells} == {
        8
    }
    server = next(c for c in commands if c[0] == "vllm")
    assert server[1:3] == ["serve", "C"] and server[server.index("--data-parallel-size") + 1] == "8"
    assert server[server.index("--served-model-name") + 1] == cells[0].options["model"]
