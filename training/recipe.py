"""Recipes: a YAML file with every number of a training run, checked before anything is loaded."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml

from awares_bench.methods.options import unknown_option

R = TypeVar("R")


class RecipeError(ValueError):
    """A recipe that cannot be run: what it says, what is allowed."""


def key(
    default: Any = MISSING,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    one_of: tuple | None = None,
    log_only: bool = False,
) -> Any:
    """A recipe key: its default (none: required), its closed range, an open lower end, or its allowed values.

    log_only: may differ between a run and its resumption.
    """
    rules = {"low": low, "high": high, "above": above, "one_of": one_of, "log_only": log_only}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=rules)
    return field(default=default, metadata=rules) if default is not MISSING else field(metadata=rules)


@dataclass(frozen=True)
class Run:
    """What every recipe says.

    start:      checkpoint to start from: a folder, a hub name, or ``nano-base``
    data:       parquet or JSON-lines file of rows (see ``examples``)
    out:        folder of the run; the same command on the same folder goes on where it stopped
    min_pixels, max_pixels: limits of the processor; the released checkpoints' by default
    largest_side: images are shrunk to this many pixels a side first (paper supplement 1.2: 2000)
    """

    start: str = key()
    data: str = key()
    out: str = key()
    seed: int = key(0, low=0)
    min_pixels: int = key(4 * 28 * 28, low=28 * 28)
    max_pixels: int = key(16384 * 28 * 28, low=28 * 28)
    largest_side: int = key(2000, low=56)
    device: str = key("auto", one_of=("auto", "cpu", "cuda"))

    def __post_init__(self):
        if self.min_pixels > self.max_pixels:
            raise RecipeError(f"min_pixels ({self.min_pixels}) is above max_pixels ({self.max_pixels})")


@dataclass(frozen=True)
class Tuning(Run):
    """What both trainers say. Sources of the defaults: paper Sec. 4.3 where it prints a value, else ours.

    role:        which model of the policy trains: the one under test, or one of its auxiliary ones, such as ``cropper``
    tuning:      ``lora`` adapts every linear layer of the decoder, ``full`` trains the decoder; the vision tower stays frozen
    lora_rank:   paper Sec. 4.3; alpha, dropout and targets are not printed there
    embeddings:  with ``lora``, token embeddings and head train too, whole: for words that the start has never written
    dtype:       of frozen weights; trained weights stay float32, and matrix products use bfloat16 where the device has it
    feature_mb:  memory for vision features, which a step computes once while the tower is frozen
    report_to:   ``none``, ``wandb``, ``tensorboard``, ``trackio``, as Trainer takes them
    """

    policy: str = key("awares")
    policy_options: dict = key({})  # noqa: RUF009
    role: str = key("")
    tuning: str = key("lora", one_of=("lora", "full"))
    lora_rank: int = key(8, low=1, high=1024)
    lora_alpha: int = key(16, low=1)
    embeddings: bool = key(False)
    lr: float = key(1e-4, above=0, high=1)
    schedule: str = key("cosine", one_of=("cosine", "linear", "constant", "constant_with_warmup"))
    warmup: float = key(0.05, low=0, high=1)
    weight_decay: float = key(0.0, low=0, high=1)
    clip_norm: float = key(1.0, above=0)
    epochs: float = key(1.0, above=0)
    steps: int = key(-1, low=-1)
    dtype: str = key("auto", one_of=("auto", "float32", "bfloat16"))
    attention: str = key("sdpa", one_of=("sdpa", "eager"))
    checkpointing: bool = key(False)
    feature_mb: int = key(1024, low=0, log_only=True)
    log_every: int = key(10, low=1, log_only=True)
    save_every: int = key(100, low=1, log_only=True)
    keep: int = key(2, low=1, log_only=True)
    workers: int = key(0, low=0, log_only=True)
    report_to: str = key("none", log_only=True)

    def __post_init__(self):
        super().__post_init__()
        if self.steps == 0:
            raise RecipeError("steps is 0; pass a positive number, or -1 to train for epochs")
        if self.save_every % self.log_every:
            raise RecipeError(
                f"save_every ({self.save_every}) is not a multiple of log_every ({self.log_every}); a resumed run could not "
                "log the same means as one that was not cut"
            )


def load(cls: type[R], path: Path | str, overrides: list[str] = ()) -> R:
    """Read a recipe, a file or the name of one that ships; ``overrides`` are ``key=value`` strings in YAML syntax that win over the file.

    Raises RecipeError: not a mapping, an unknown key (with the nearest known one), a missing key, a wrong type, a value out
    of range. Raises OSError when the file cannot be read.
    """
    shipped = Path(__file__).parent / "recipes" / f"{path}.yaml"
    path = shipped if shipped.exists() else path
    try:
        said = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(said, dict):
        raise RecipeError(f"{path} must hold 'key: value' lines; got {type(said).__name__}")
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals:
            raise RecipeError(f"{text!r} is not key=value")
        said[name.strip()] = yaml.safe_load(value)
    return check(cls, said, str(path))


def check(cls: type[R], said: dict, where: str = "recipe") -> R:
    """A mapping -> a recipe, with the checks of ``load``."""
    known, hints, clean = {f.name: f for f in fields(cls)}, get_type_hints(cls), {}
    for name, value in said.items():
        if name not in known:
            raise RecipeError(f"{where}: {unknown_option(str(name), list(known))}")
        clean[name] = _checked(known[name], hints[name], value, where)
    missing = [n for n, f in known.items() if n not in said and f.default is MISSING and f.default_factory is MISSING]
    if missing:
        raise RecipeError(f"{where} does not say {', '.join(missing)}")
    try:
        return cls(**clean)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error


def _checked(f: Field, hint: Any, value: Any, where: str) -> Any:
    if type(None) in get_args(hint):  # a key that may be null
        if value is None:
            return None
        hint = next(kind for kind in get_args(hint) if kind is not type(None))
    kind = {"int": int, "float": (int, float), "str": str, "bool": bool, "dict": dict, "list": list}[
        getattr(hint, "__name__", str(hint)).split("[")[0]
    ]
    if kind == (int, float) and isinstance(value, str):  # YAML 1.1 reads 1e-4 as a string
        with suppress(ValueError):
            value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        hint_name = getattr(hint, "__name__", hint)
        raise RecipeError(f"{where}: {f.name} is {value!r}; it must be of type {hint_name}")
    rules = f.metadata
    if rules.get("one_of") and value not in rules["one_of"]:
        raise RecipeError(f"{where}: {f.name} is {value!r}; allowed: {', '.join(map(str, rules['one_of']))}")
    bounds = [(rules.get("low"), "at least", lambda b: value < b), (rules.get("high"), "at most", lambda b: value > b)]
    bounds.append((rules.get("above"), "above", lambda b: value <= b))
    for bound, words, broken in bounds:
        if bound is not None and broken(bound):
            raise RecipeError(f"{where}: {f.name} is {value}; it must be {words} {bound}")
    return float(value) if kind == (int, float) else value


def claim(recipe: Run, stage: str) -> Path:
    """Make the run's folder this recipe's, or see that it already is. Raises RecipeError when it belongs to another recipe."""
    out = Path(recipe.out).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    loose = {f.name for f in fields(recipe) if f.metadata.get("log_only")} | {"out"}
    mine = {"stage": stage, **{k: v for k, v in asdict(recipe).items() if k not in loose}}
    path = out / "recipe.json"
    if path.exists():
        defaults = {f.name: f.default for f in fields(recipe)}  # of keys that the recipe's own version did not know yet
        before = defaults | json.loads(path.read_text())
        changed = [k for k in mine if before.get(k) != mine[k]]
        if changed:
            said = "; ".join(f"{k} was {before.get(k)!r}, is {mine.get(k)!r}" for k in changed)
            raise RecipeError(f"{out} holds a run of another recipe ({said}). Pass another out, or delete the folder")
    if os.environ.get("RANK", "0") == "0":
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps(mine, indent=1))
        os.replace(draft, path)
    return out
