"""The ``awares-bench`` command. Every subcommand exits non-zero with one clear sentence when it cannot do its work."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="awares-bench", description="How few visual tokens does a vision-language model need?")
    parser.add_argument("--version", action="store_true", help="versions of awares-bench and of what its numbers depend on")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    demo = commands.add_parser(
        "demo", help="full, low and AwaRes on the nano suite through lmms-eval, then table, figure and gallery"
    )
    demo.add_argument("--suite", type=Path, help="a suite made by nano-data (default: the one in the package)")
    demo.add_argument(
        "--methods", default="awares_full,awares_low,awares", help="comma-separated lmms-eval model names of this package"
    )
    demo.add_argument("--limit", type=int, help="documents per task (default: all)")
    demo.add_argument("--out", type=Path, default=Path("awares-demo"), help="output folder; a second call resumes there")
    demo.add_argument("--pretrained", default="nano", help="checkpoint (default: the nano weights in the package)")
    demo.add_argument("--batch-size", type=int, default=8)

    report = commands.add_parser("report", help="table, figure, gallery and summary.json of the runs in a demo folder")
    report.add_argument("out", type=Path, help="a folder written by demo")

    data = commands.add_parser("nano-data", help="render a fresh nano suite that no training seed touches")
    data.add_argument("--seed", type=int, required=True, help="suite number; 0 is the shipped suite")
    data.add_argument("--documents", type=int, default=200, help="documents per task")
    data.add_argument("--out", type=Path, required=True)

    commands.add_parser("methods", help="the known methods, what they need and what they cost")
    commands.add_parser("tasks", help="print the task folder, for lmms-eval --include_path")

    args = parser.parse_args(argv)
    if args.version:
        for name in ("awares-bench", "lmms-eval", "torch", "transformers"):
            print(name, version(name))
        return 0
    if not args.command:
        parser.print_help()
        return 2
    try:
        return _COMMANDS[args.command](args)
    except KeyboardInterrupt:
        print("\ninterrupted; what was answered is kept, and the same command goes on from there", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        print(f"awares-bench {args.command}: {error}", file=sys.stderr)
        return 1


def _demo(args) -> int:
    from .demo import run

    run(args.out, args.methods.split(","), args.suite, args.limit, args.pretrained, args.batch_size)
    return 0


def _report(args) -> int:
    from .demo import report

    report(args.out)
    return 0


def _nano_data(args) -> int:
    from tqdm import tqdm

    import_module("awares_bench.tasks.nano_suite").write(args.out, args.seed, args.documents, tqdm)
    print(f"{args.documents} documents per task in {args.out}; try: awares-bench demo --suite {args.out}")
    return 0


def _methods(args) -> int:
    from . import registry

    for name in registry.names():
        block = registry.describe(name)
        print(f"{name:<12} {block['Title']}")
        print("".join(f"{'':<13}{k:<8} {block[k]}\n" for k in ("Paper", "Needs", "Cost", "Differs") if k in block), end="")
    return 0


def _tasks(args) -> int:
    print(Path(str(files("awares_bench.tasks") / "awares_nano.yaml")).parent)
    return 0


_COMMANDS = {"demo": _demo, "report": _report, "nano-data": _nano_data, "methods": _methods, "tasks": _tasks}

if __name__ == "__main__":
    sys.exit(main())
