"""The ``awares-bench`` command. Every subcommand exits non-zero with one clear sentence when it cannot do its work.

A command's arguments (``add_arguments``) and its work (``main``) live beside its code, which is imported when the command is chosen.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from .evaluation.doctor import installed
from .openmp import set_short_spin

Main = Callable[[argparse.Namespace], int]


class Parser(argparse.ArgumentParser):
    """load: adds the arguments when the parser is first asked to parse -> what runs with them."""

    def __init__(self, *args, load: Callable[[argparse.ArgumentParser], Main] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.load = load

    def parse_known_args(self, args=None, namespace=None):
        if self.load is not None:
            load, self.load = self.load, None
            self.set_defaults(main=load(self))
        return super().parse_known_args(args, namespace)


def _demo(parser: argparse.ArgumentParser) -> Main:
    from .evaluation import demo

    demo.add_arguments(parser)
    return demo.main


def _ask(parser: argparse.ArgumentParser) -> Main:
    from . import api

    api.add_arguments(parser)
    return api.main


def _app(parser: argparse.ArgumentParser) -> Main:
    from . import app

    app.add_arguments(parser)
    return app.main


def _run(parser: argparse.ArgumentParser) -> Main:
    from .evaluation import sweep

    sweep.add_arguments(parser)
    return sweep.main


def _report(parser: argparse.ArgumentParser) -> Main:
    from awares_bench.reports import command

    command.add_arguments(parser)
    return command.main


def _show(parser: argparse.ArgumentParser) -> Main:
    from awares_bench.reports.gallery import select

    select.add_arguments(parser)
    return select.main


def _nano_data(parser: argparse.ArgumentParser) -> Main:
    from awares_bench.tasks.nano import suite

    suite.add_arguments(parser)
    return suite.main


def _bench_engine(parser: argparse.ArgumentParser) -> Main:
    from .bench import engine_bench

    engine_bench.add_arguments(parser)
    return engine_bench.main


def _bench_pruners(parser: argparse.ArgumentParser) -> Main:
    from .bench import pruner_bench

    pruner_bench.add_arguments(parser)
    return pruner_bench.main


def _bench_grpo(parser: argparse.ArgumentParser) -> Main:
    from .bench import grpo_bench

    grpo_bench.add_arguments(parser)
    return grpo_bench.main


def _bench_gpu_day(parser: argparse.ArgumentParser) -> Main:
    from .bench import gpu_day

    gpu_day.add_arguments(parser)
    return gpu_day.main


def _train_sft(parser: argparse.ArgumentParser) -> Main:
    from awares_bench.training import sft

    sft.add_arguments(parser)
    return sft.main


def _train_grpo(parser: argparse.ArgumentParser) -> Main:
    from awares_bench.training import grpo

    grpo.add_arguments(parser)
    return grpo.main


def _train_scorer(parser: argparse.ArgumentParser) -> Main:
    from awares_bench.training import token_scorer

    token_scorer.add_arguments(parser)
    return token_scorer.main


def _train_gate(parser: argparse.ArgumentParser) -> Main:
    from awares_bench.training.auxiliary import cares_gate

    cares_gate.add_arguments(parser)
    return cares_gate.main


def _nano_tower(parser: argparse.ArgumentParser) -> Main:
    from awares_bench.training.nano import tower

    tower.add_arguments(parser)
    return tower.main


def _nano_language(parser: argparse.ArgumentParser) -> Main:
    from awares_bench.training.nano import language

    language.add_arguments(parser)
    return language.main


def _nano_rival_data(parser: argparse.ArgumentParser) -> Main:
    from awares_bench.training.nano import rival_data

    rival_data.add_arguments(parser)
    return rival_data.main


def _nano_ablations(parser: argparse.ArgumentParser) -> Main:
    from awares_bench.training.nano import ablations

    ablations.add_arguments(parser)
    return ablations.main


def _curate(parser: argparse.ArgumentParser) -> Main:
    from awares_bench.training.curation import pipeline

    pipeline.add_arguments(parser)
    return pipeline.main


def _diagnose(parser: argparse.ArgumentParser) -> Main:
    from awares_bench.training.curation import diagnose

    diagnose.add_arguments(parser)
    return diagnose.main


def _doctor(parser: argparse.ArgumentParser) -> Main:
    from .evaluation import doctor

    return lambda args: doctor.run()


def _methods(parser: argparse.ArgumentParser) -> Main:
    from .methods import registry

    def main(args: argparse.Namespace) -> int:
        for name in registry.names():
            block = registry.describe(name)
            print(f"{name:<14}{block['Title']}")
            print("".join(f"{'':<14}{k:<8} {block[k]}\n" for k in ("Paper", "Needs", "Cost", "Trained", "Differs") if k in block))
        return 0

    return main


def _tasks(parser: argparse.ArgumentParser) -> Main:
    def main(args: argparse.Namespace) -> int:
        print(Path(str(files("awares_bench.tasks") / "paper.yaml")).parent)
        return 0

    return main


COMMANDS = {
    "demo": ("full, low and AwaRes on the nano suite through lmms-eval, then table, figure and gallery", _demo),
    "ask": ("one question about one picture: the answer, the crops, the tokens and the seconds", _ask),
    "app": ("a page on which a picture is asked about, methods side by side; needs the extra app", _app),
    "run": ("a recipe of methods, options and tasks: one command, one folder, resumable", _run),
    "report": ("tables, figures and index.html of runs, with the paper's numbers beside ours; no model needed", _report),
    "show": ("an HTML gallery of a run's documents: what the model saw, asked for, said and cost", _show),
    "nano-data": ("render a fresh nano suite that no training seed touches", _nano_data),
    "bench": (
        "measure the engine against what it replaces, on this machine",
        {
            "engine": ("the engine beside model.generate and lmms-eval's own model", _bench_engine),
            "pruners": ("time and memory of every pruner's own work", _bench_pruners),
            "grpo": ("a training step beside TRL's", _bench_grpo),
            "gpu-day": ("all that only a GPU can tell, in one resumable command without a network", _bench_gpu_day),
        },
    ),
    "train": (
        "train an AwaRes checkpoint: sft, then grpo",
        {
            "sft": ("supervised, on trajectories", _train_sft),
            "grpo": ("by reward, on its own rollouts", _train_grpo),
            "scorer": ("VisionSelector's scorer of visual tokens, the model frozen", _train_scorer),
            "gate": ("CARES' gate, on a proxy's hidden state", _train_gate),
        },
    ),
    "nano": (
        "train the nano checkpoints of the package from nothing",
        {
            "tower": ("the vision tower, from dense targets", _nano_tower),
            "language": ("the language stages: answers, places, calls", _nano_language),
            "rival-data": ("rows for the protocols of VisionThink and CropVLM", _nano_rival_data),
            "ablations": ("the checkpoints of the recipe nano_ablations", _nano_ablations),
        },
    ),
    "curate": ("questions and images -> labelled trajectories, in stages that resume", _curate),
    "diagnose": ("when and where a model asks for crops, against labels and the oracle", _diagnose),
    "doctor": ("what is installed here, what is known not to work, and the command that mends it", _doctor),
    "methods": ("the known methods, what they need and what they cost", _methods),
    "tasks": ("print the task folder, for lmms-eval --include_path", _tasks),
}
"""Command -> its line in the help, and what loads it or the commands below it."""


def _add(parser: argparse.ArgumentParser, commands: dict, **kwargs) -> None:
    """Hang the commands into a parser."""
    choices = parser.add_subparsers(parser_class=Parser, **kwargs)
    for name, (line, command) in commands.items():
        if isinstance(command, dict):
            _add(choices.add_parser(name, help=line, description=line), command, dest="part", metavar="PART", required=True)
        else:
            choices.add_parser(name, help=line, description=line, load=command)


def main(argv: list[str] | None = None) -> int:
    set_short_spin()  # before a command loads PyTorch
    parser = argparse.ArgumentParser(prog="awares-bench", description="How few visual tokens does a vision-language model need?")
    parser.add_argument("--version", action="store_true", help="versions of awares-bench and of what its numbers depend on")
    _add(parser, COMMANDS, dest="command", metavar="COMMAND")
    args = parser.parse_args(argv)
    if args.version:
        for name, found in installed(("awares-bench", "lmms-eval", "torch", "transformers")).items():
            print(name, found or "not installed")
        return 0
    if not args.command:
        parser.print_help()
        return 2
    try:
        return args.main(args)
    except KeyboardInterrupt:
        print("\ninterrupted; what was answered is kept, and the same command goes on from there", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        print(f"awares-bench {args.command}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
