"""Recipes: a YAML file with every number of a training run, checked before anything is loaded."""

from __future__ import annotations

import argparse
import json
import operator
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml

from awares_bench.errors import AwaresError
from awares_bench.methods.options import unknown_option

R = TypeVar("R", bound="Recipe")


class RecipeError(AwaresError, ValueError):
    """A recipe that cannot be run. Its text says what the recipe holds and what is allowed."""


def option(
    default: Any = MISSING,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    one_of: tuple | None = None,
    log_only: bool = False,
) -> Any:
    """A field of a recipe, with the rules that ``check`` applies to its value.

    default: without one the option is required. low, high: closed range; above: open lower bound. one_of: the allowed values.
    log_only: the option may differ between a run and its resumption.
    """
    rules = {"low": low, "high": high, "above": above, "one_of": one_of, "log_only": log_only}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=rules)
    return field(default=default, metadata=rules) if default is not MISSING else field(metadata=rules)


@dataclass(frozen=True)
class Recipe:
    """The options that every recipe has."""

    start: str = option()
    """Checkpoint to start from: a folder, a hub name, or ``nano-base``."""
    data: str = option()
    """Parquet or JSON-lines file of rows (see ``examples``)."""
    out: str = option()
    """Folder of the run. The same command on the same folder continues where it stopped."""
    seed: int = option(0, low=0)
    min_pixels: int | None = option(None, low=28 * 28)
    """Lower limit of the processor; null: that of the released checkpoints of the start's family."""
    max_pixels: int | None = option(None, low=28 * 28)
    """Upper limit of the processor; null: likewise."""
    largest_side: int = option(2000, low=56)
    """Images are first shrunk until no side is longer than this, in pixels (paper supplement 1.2: 2000)."""
    device: str = option("auto", one_of=("auto", "cpu", "cuda"))
    """``auto`` is the GPU of this process where there is one."""

    def __post_init__(self):
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise RecipeError(f"min_pixels ({self.min_pixels}) is above max_pixels ({self.max_pixels})")


@dataclass(frozen=True)
class TrainerRecipe(Recipe):
    """The options that every trainer has. Defaults are the paper's (Sec. 4.3) where it prints a value, otherwise ours."""

    policy: str = option("awares")
    """Method whose exchanges are trained."""
    policy_options: dict = option({})  # noqa: RUF009
    """Options of that method, as on the command line."""
    lr: float = option(1e-4, above=0, high=1)
    schedule: str = option("cosine", one_of=("cosine", "linear", "constant", "constant_with_warmup"))
    warmup: float = option(0.05, low=0, high=1)
    """Share of the steps over which the learning rate rises."""
    weight_decay: float = option(0.0, low=0, high=1)
    clip_norm: float = option(1.0, above=0)
    """Largest norm of the gradient."""
    epochs: float = option(1.0, above=0)
    steps: int = option(-1, low=-1)
    """Optimiser steps; -1 trains for ``epochs``."""
    dtype: str = option("auto", one_of=("auto", "float32", "bfloat16"))
    """Precision of frozen weights. Trained weights stay float32; matrix products use bfloat16 where the device has it."""
    attention: str = option("sdpa", one_of=("sdpa", "eager"))
    checkpointing: bool = option(False)
    """Recompute activations in the backward pass."""
    feature_mb: int = option(1024, low=0, log_only=True)
    """Megabytes for vision features, which a step computes once because the tower is frozen."""
    log_every: int = option(10, low=1, log_only=True)
    save_every: int = option(100, low=1, log_only=True)
    keep: int = option(2, low=1, log_only=True)
    """How many of the newest checkpoints are kept."""
    workers: int = option(0, low=0, log_only=True)
    """Processes that load data."""
    report_to: str = option("none", log_only=True)
    """``none``, ``wandb``, ``tensorboard`` or ``trackio``, as Trainer takes them."""

    def __post_init__(self):
        super().__post_init__()
        if self.steps == 0:
            raise RecipeError("steps is 0; pass a positive number, or -1 to train for epochs")
        if self.save_every % self.log_every:
            raise RecipeError(
                f"save_every ({self.save_every}) is not a multiple of log_every ({self.log_every}); a resumed run could not "
                "log the same means as one that was not cut"
            )


@dataclass(frozen=True)
class TrainingRecipe(TrainerRecipe):
    """The options of the trainers of a model's own weights."""

    role: str = option("")
    """Which model of the method is trained: by default the model under test, else an auxiliary one such as ``cropper``."""
    tuning: str = option("lora", one_of=("lora", "full"))
    """``lora`` adapts every linear layer of the decoder, ``full`` trains the decoder. The vision tower stays frozen."""
    lora_rank: int = option(8, low=1, high=1024)
    """Paper Sec. 4.3, which does not print alpha, dropout or targets."""
    lora_alpha: int = option(16, low=1)
    embeddings: bool = option(False)
    """With ``lora``, also train all of the token embeddings and the head: for words that the start has never written."""


def add_arguments(parser: argparse.ArgumentParser, example: str) -> None:
    """A recipe and what wins over it; ``example`` is one that ships."""
    parser.add_argument("recipe", type=Path, help=f"YAML file, or the name of one that ships, such as {example}")
    parser.add_argument("set", nargs="*", metavar="KEY=VALUE", help="keys that win over the recipe's")


def load(cls: type[R], path: Path | str, overrides: Sequence[str] = ()) -> R:
    """Read a recipe.

    path: a YAML file, or the name of a recipe in the package. overrides: ``option=value`` strings in YAML syntax, which win
    over the file.
    Raises RecipeError: not a mapping, an unknown option (with the nearest known one), a missing option, a wrong type, a
    value out of range. Raises OSError when the file cannot be read.
    """
    shipped = Path(__file__).parent / "recipes" / f"{path}.yaml"
    path = shipped if shipped.exists() else path
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(settings, dict):
        raise RecipeError(f"{path} must hold 'key: value' lines; got {type(settings).__name__}")
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals:
            raise RecipeError(f"{text!r} is not key=value")
        settings[name.strip()] = yaml.safe_load(value)
    return check(cls, settings, str(path))


def check(cls: type[R], settings: dict, where: str = "recipe") -> R:
    """Settings -> a recipe. Raises RecipeError as ``load`` does; ``where`` begins its text."""
    options, hints, values = {f.name: f for f in fields(cls)}, get_type_hints(cls), {}
    for name, value in settings.items():
        if name not in options:
            raise RecipeError(f"{where}: {unknown_option(str(name), list(options))}")
        values[name] = _check_value(options[name], hints[name], value, where)
    missing = [n for n, f in options.items() if n not in settings and f.default is MISSING and f.default_factory is MISSING]
    if missing:
        raise RecipeError(f"{where} does not say {', '.join(missing)}")
    try:
        return cls(**values)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error


def _check_value(f: Field, hint: Any, value: Any, where: str) -> Any:
    """-> the value, a number of a float option as float. Raises RecipeError when it breaks the option's type or rules."""
    if type(None) in get_args(hint):  # an option that may be null
        if value is None:
            return None
        hint = next(kind for kind in get_args(hint) if kind is not type(None))
    kinds: dict[str, Any] = {"int": int, "float": (int, float), "str": str, "bool": bool, "dict": dict, "list": list}
    kind = kinds[getattr(hint, "__name__", str(hint)).split("[")[0]]
    if kind == (int, float) and isinstance(value, str):  # YAML 1.1 reads 1e-4 as a string
        with suppress(ValueError):
            value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        hint_name = getattr(hint, "__name__", hint)
        raise RecipeError(f"{where}: {f.name} is {value!r}; it must be of type {hint_name}")
    rules = f.metadata
    if rules.get("one_of") and value not in rules["one_of"]:
        raise RecipeError(f"{where}: {f.name} is {value!r}; allowed: {', '.join(map(str, rules['one_of']))}")
    bounds = (("low", "at least", operator.ge), ("high", "at most", operator.le), ("above", "above", operator.gt))
    for rule, words, holds in bounds:
        if (bound := rules.get(rule)) is not None and not holds(value, bound):
            raise RecipeError(f"{where}: {f.name} is {value}; it must be {words} {bound}")
    return float(value) if kind == (int, float) else value


def acquire_run_folder(recipe: Recipe, stage: str) -> Path:
    """Create the run's folder and note the recipe in it, or check that the folder already belongs to this recipe.

    stage: ``sft``, ``grpo`` or ``curate``. Raises RecipeError when the folder holds a run of another recipe.
    """
    out = Path(recipe.out).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    excluded = {f.name for f in fields(recipe) if f.metadata.get("log_only")} | {"out"}
    identity = {"stage": stage, **{k: v for k, v in asdict(recipe).items() if k not in excluded}}
    path = out / "recipe.json"
    if path.exists():
        defaults = {f.name: f.default for f in fields(recipe)}  # for options that are newer than the stored recipe
        stored = defaults | json.loads(path.read_text())
        changes = [f"{k} was {stored.get(k)!r}, is {v!r}" for k, v in identity.items() if stored.get(k) != v]
        if changes:
            raise RecipeError(
                f"{out} holds a run of another recipe ({'; '.join(changes)}). Pass another out, or delete the folder"
            )
    if os.environ.get("RANK", "0") == "0":
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps(identity, indent=1))
        os.replace(draft, path)
    return out
