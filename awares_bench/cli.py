"""The ``awares-bench`` command. Every subcommand exits non-zero with one clear sentence when it cannot do its work."""

from __future__ import annotations

import argparse
import sys
from importlib.resources import files
from pathlib import Path

from awares_bench.evaluation.doctor import installed


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

    ask = commands.add_parser("ask", help="one question about one picture: the answer, the crops, the tokens and the seconds")
    ask.add_argument("image", metavar="IMAGE", help="path of the picture")
    ask.add_argument("question", metavar="QUESTION")
    ask.add_argument("--method", default="awares", help="name of a method, or FILE.py:Class (default: awares)")
    ask.add_argument("--pretrained", default="nano", help="checkpoint folder, LoRA adapters, hub name, or a name of the package")
    ask.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of the method (retention=0.25, pruner=visionzip, max_new_tokens=64) or of the checkpoint (dtype, device, "
        "attn_implementation, min_pixels, max_pixels, constrained, repetition_penalty); may be repeated",
    )
    ask.add_argument(
        "--compare", metavar="METHODS", help='further methods beside it, with commas between: full,low,"visionzip retention=0.25"'
    )
    ask.add_argument("--html", type=Path, metavar="FILE", help="also write a page with the views, the crops and the turns")

    sweep = commands.add_parser("run", help="a recipe of methods, options and tasks: one command, one folder, resumable")
    sweep.add_argument("recipe", help="a YAML file, or the name of a recipe in the package: nano, paper_table1")
    sweep.add_argument("--out", type=Path, help="output folder (default: awares-runs/RECIPE); a second call resumes there")
    sweep.add_argument("--limit", type=int, help="documents per task, for a trial (default: the recipe's)")
    sweep.add_argument("--pretrained", help="checkpoint of every cell, in place of the recipe's")
    sweep.add_argument("--batch-size", type=int, help="conversations in flight, in place of the recipe's")

    report = commands.add_parser(
        "report", help="tables, figures and index.html of runs, with the paper's numbers beside ours; no model needed"
    )
    report.add_argument(
        "runs", nargs="*", help="folders of demo or run, run folders, lmms-eval outputs, compact records; NAME=PATH renames one"
    )
    report.add_argument("--out", type=Path, default=Path("awares-report"), help="output folder")
    report.add_argument(
        "--allow", action="append", default=[], metavar="NAME", help="let an exception through and print it; a refusal names it"
    )
    report.add_argument(
        "--no-times", action="store_true", help="leave seconds out, so that runs of different machines can stand together"
    )
    report.add_argument(
        "--metric", action="append", default=[], metavar="TASK=METRIC", help="the accuracy of a task that is not known"
    )
    report.add_argument("--gap", type=float, default=1.0, help="points of accuracy whose price in documents is told (default: 1)")
    report.add_argument("--formats", default="pdf,svg,png", help="of figures (default: pdf,svg,png)")
    report.add_argument(
        "--records", type=Path, metavar="FOLDER", help="also write compact records there, which report reads again"
    )
    report.add_argument(
        "--logs", type=Path, nargs="+", default=[], metavar="LOG", help="training logs (log.jsonl), for learning curves"
    )

    show = commands.add_parser("show", help="an HTML gallery of a run's documents: what the model saw, asked for, said and cost")
    show.add_argument("run", help="a run folder, OUT/runs/NAME")
    show.add_argument("--where", metavar="EXPR", help="such as \"task=='nano_doc' and not correct\"")
    show.add_argument(
        "--compare", metavar="RUN2", help="a second run beside it; without --where, the documents on which they differ"
    )
    show.add_argument("--count", type=int, default=60, help="documents at the most, tasks in turn (default: 60)")
    show.add_argument(
        "--images", type=Path, metavar="FOLDER", help="folder with TASK.parquet, when the task's own data is not at hand"
    )
    show.add_argument("--out", type=Path, default=Path("gallery.html"))

    data = commands.add_parser("nano-data", help="render a fresh nano suite that no training seed touches")
    data.add_argument("--seed", type=int, required=True, help="suite number; 0 is the shipped suite")
    data.add_argument("--documents", type=int, default=200, help="documents per task")
    data.add_argument("--out", type=Path, required=True)

    bench = commands.add_parser("bench", help="measure the engine against what it replaces, on this machine")
    kinds = "pruners: time and memory of every pruner's own work; grpo: a training step beside TRL's"
    bench.add_argument("what", choices=["engine", "pruners", "grpo"], help=kinds)
    which = bench.add_mutually_exclusive_group()
    which.add_argument("--pretrained", help="checkpoint folder, hub name, nano or nano-base (default: nano)")
    which.add_argument(
        "--geometry", choices=["nano", "3b", "7b"], help="published sizes with random weights, nothing to download"
    )
    bench.add_argument("--layers", type=int, help="cut decoder and tower to so many layers; printed with the result")
    bench.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    bench.add_argument("--device", default="auto")
    bench.add_argument("--tokens", type=int, default=1200, help="visual tokens of a page")
    bench.add_argument("--batch", type=int, default=1, help="pages at a time")
    bench.add_argument("--call-rate", type=float, default=1.0, help="share of the pages that call for one quadrant")
    bench.add_argument("--answer", type=int, default=8, help="tokens of an answer")
    bench.add_argument("--retention", type=float, default=0.5, help="of the pruners")
    bench.add_argument("--repeats", type=int, default=5)
    bench.add_argument("--documents", type=int, default=48, help="of the nano suite")
    bench.add_argument("--parts", default="vision,turns,stock,suite", help="comma-separated; leave out what takes too long")
    bench.add_argument("--trl-python", metavar="PYTHON", help="grpo: interpreter of an environment that has trl")
    bench.add_argument("--prompts", type=int, default=8, help="grpo: of a step")
    bench.add_argument("--group", type=int, default=8, help="grpo: rollouts of a prompt")
    bench.add_argument("--json", type=Path, help="write the result there")

    train = commands.add_parser("train", help="train an AwaRes checkpoint: sft, then grpo")
    train.add_argument("stage", choices=("sft", "grpo"))
    train.add_argument("recipe", type=Path, help="YAML file, or the name of one that ships, such as nano_sft")
    train.add_argument("set", nargs="*", metavar="KEY=VALUE", help="keys that win over the recipe's")
    train.add_argument("--dry-run", action="store_true", help="render and score one batch, print masks and counts, take no step")

    curate = commands.add_parser("curate", help="questions and images -> labelled trajectories, in stages that resume")
    curate.add_argument("recipe", type=Path, help="YAML file, or the name of one that ships, such as nano_curate")
    curate.add_argument("set", nargs="*", metavar="KEY=VALUE", help="keys that win over the recipe's")

    diagnose = commands.add_parser("diagnose", help="when and where a model asks for crops, against labels and the oracle")
    diagnose.add_argument("run", help="a run folder of an evaluation on a nano suite, or a checkpoint (with --labels)")
    diagnose.add_argument("--labels", help="labels.parquet of a curation: the checkpoint answers its rows, probes included")
    diagnose.add_argument("--suite", type=Path, help="folder of the nano suite the run was on (default: the one in the package)")
    diagnose.add_argument("--limit", type=int, help="rows of the labels (default: all)")
    diagnose.add_argument("--judge", default="anls", choices=("exact", "relaxed", "anls"))
    diagnose.add_argument("--out", type=Path, help="also write the figures there as JSON")

    commands.add_parser("doctor", help="what is installed here, what is known not to work, and the command that mends it")
    commands.add_parser("methods", help="the known methods, what they need and what they cost")
    commands.add_parser("tasks", help="print the task folder, for lmms-eval --include_path")

    args = parser.parse_args(argv)
    if args.version:
        for name, found in installed(("awares-bench", "lmms-eval", "torch", "transformers")).items():
            print(name, found or "not installed")
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
    from awares_bench.evaluation.demo import run

    run(args.out, args.methods.split(","), args.suite, args.limit, args.pretrained, args.batch_size)
    return 0


def _ask(args) -> int:
    from awares_bench.methods.images import as_rgb

    from . import api
    from .card import page
    from .errors import AnswerError

    given = dict(api.read_option(one) for one in args.option)
    of_checkpoint = {k: given.pop(k) for k in api.LOAD_OPTIONS if k in given}
    others = [] if args.compare is None else [api.read_method(text) for text in args.compare.split(",")]
    asked = [(args.method, given), *others]
    for name, options in asked:  # before a checkpoint is loaded
        api.check(name, options)
    as_rgb(args.image)
    answers = api.each(api.load(args.pretrained, **of_checkpoint), args.image, args.question, asked)
    failed = [a for a in answers if a.error is not None]
    if others or not failed:
        print(answers if others else api.told(answers[0]))
    if args.html:
        args.html.parent.mkdir(parents=True, exist_ok=True)
        shown = answers if others else answers[0]
        args.html.write_text(page(shown._repr_html_(), args.question), encoding="utf-8", errors="backslashreplace")
        print(args.html)
    if failed:
        raise AnswerError(f"{failed[0].method}: {failed[0].error}")
    return 0


def _run(args) -> int:
    from awares_bench.evaluation import sweep

    recipe = sweep.read(args.recipe, args.limit, pretrained=args.pretrained, batch_size=args.batch_size)
    out = args.out or Path("awares-runs") / Path(args.recipe).stem
    ended = sweep.run(recipe, out)
    failed = [c for c in ended if c["status"] == "failed"]
    for cell in failed:
        print(f"failed: {cell['label']}: {cell['error']} (more in {out / 'lmms' / cell['cell'] / 'error.txt'})", file=sys.stderr)
    print(f"{len(ended) - len(failed)} of {len(ended)} cells are done in {out}; awares-bench report {out}", file=sys.stderr)
    return 1 if failed else 0


def _report(args) -> int:
    if not args.runs and not args.logs:
        raise ValueError("name at least one folder of runs: awares-bench report RUNS --out DIR")
    from awares_bench.reports import report

    metrics = dict(_pair(m) for m in args.metric)
    formats = tuple(args.formats.split(","))
    if not args.runs:
        report.curves(args.logs, args.out, formats)
    else:
        _, _, said = report.write(
            args.runs,
            args.out,
            allow=tuple(args.allow),
            metrics=metrics,
            times=not args.no_times,
            formats=formats,
            gap=args.gap / 100,
            compact=args.records,
            logs=tuple(args.logs),
        )
        print((args.out / "table.md").read_text(encoding="utf-8"))
        for sentence in said:
            print(f"note: {sentence}", file=sys.stderr)
        print(args.out / "index.html")
    return 0


def _pair(text: str) -> tuple[str, str]:
    task, equals, metric = text.partition("=")
    if not (task and equals and metric):
        raise ValueError(f"--metric {text!r}: expected TASK=METRIC, such as textvqa_val=exact_match")
    return task, metric


def _show(args) -> int:
    from awares_bench.reports.gallery import select

    shown = select.write(args.run, args.out, args.where, args.compare, args.images, args.count)
    print(f"{shown} documents in {args.out}")
    return 0


def _nano_data(args) -> int:
    from tqdm import tqdm

    from awares_bench.tasks.nano import suite

    suite.write(args.out, args.seed, args.documents, tqdm)
    print(f"{args.documents} documents per task in {args.out}; try: awares-bench demo --suite {args.out}")
    return 0


def _bench(args) -> int:
    if args.what == "pruners":
        from awares_bench.bench.pruner_bench import run as bench_pruners

        more = (args.device, args.dtype, args.json)
        bench_pruners(args.geometry or "nano", args.tokens, args.batch, args.retention, args.repeats, *more)
        return 0
    if args.what == "grpo":
        from awares_bench.bench import grpo_bench

        more = (args.trl_python, args.prompts, args.group, args.repeats, args.device, args.json)
        grpo_bench.run(args.pretrained or "nano", *more)
        return 0
    from awares_bench.bench.engine_bench import run

    known, parts = ("vision", "turns", "stock", "suite"), tuple(args.parts.split(","))
    if unknown := [p for p in parts if p not in known]:
        raise ValueError(f"--parts holds {unknown[0]!r}; known: {', '.join(known)}")
    pretrained = args.pretrained or (None if args.geometry else "nano")
    more = (args.tokens, args.batch, args.call_rate, args.answer, args.repeats, parts, args.documents, args.json)
    run(pretrained, args.geometry, args.layers, args.dtype, args.device, *more)
    return 0


def _train(args) -> int:
    from awares_bench.training import grpo, sft
    from awares_bench.training.recipe import load

    stage = {"sft": sft, "grpo": grpo}[args.stage]
    recipe = load(stage.RECIPE, args.recipe, args.set)
    (stage.dry_run if args.dry_run else stage.run)(recipe)
    return 0


def _curate(args) -> int:
    from awares_bench.training.curation import pipeline
    from awares_bench.training.recipe import load

    pipeline.run(load(pipeline.RECIPE, args.recipe, args.set))
    return 0


def _diagnose(args) -> int:
    import json

    from awares_bench.training.curation import diagnose

    if args.labels:
        from awares_bench.inference.local_model import VLM
        from awares_bench.models.packaged import resolve

        found = diagnose.probe(VLM.load(resolve(args.run)), args.labels, args.limit, args.judge)
    else:
        suite = args.suite or Path(str(files("awares_bench.tasks.nano") / "awares_nano.yaml")).parent
        found = diagnose.from_records(Path(args.run), suite)
    print(diagnose.show(found))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1))
    return 0


def _doctor(args) -> int:
    from awares_bench.evaluation.doctor import run

    return run()


def _methods(args) -> int:
    from awares_bench.methods import registry

    for name in registry.names():
        block = registry.describe(name)
        print(f"{name:<14}{block['Title']}")
        print("".join(f"{'':<14}{k:<8} {block[k]}\n" for k in ("Paper", "Needs", "Cost", "Trained", "Differs") if k in block))
    return 0


def _tasks(args) -> int:
    print(Path(str(files("awares_bench.tasks") / "paper.yaml")).parent)
    return 0


_COMMANDS = {
    "demo": _demo,
    "ask": _ask,
    "run": _run,
    "report": _report,
    "show": _show,
    "nano-data": _nano_data,
    "bench": _bench,
    "train": _train,
    "curate": _curate,
    "diagnose": _diagnose,
    "doctor": _doctor,
    "methods": _methods,
    "tasks": _tasks,
}

if __name__ == "__main__":
    sys.exit(main())
