"""Name -> method class: a file of ``baselines/`` by its name, ``awares``, the entry-point group ``awares_bench.methods``, or FILE.py:Class."""

from __future__ import annotations

import ast
import difflib
import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.resources import files
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from .composition import ComposedPruner, compose
from .options import options, unknown_option
from .policy import Policy
from .pruner import NEEDS, Pruner

GROUP = "awares_bench.methods"

BLOCK = ("Paper", "Code", "Needs", "Cost", "Differs")
"""What a method's module docstring says beside its first line."""

MOVED = {
    "awares_bench.method": "import Policy, Pruner, TurnGenerator (was Look) and VisualTokens (was Visual) from awares_bench",
    "awares_bench.trajectory": "import Event, Reply, Sample and Turn from awares_bench",
    "awares_bench.crops": "import from awares_bench.methods.crop_grid",
    "awares_bench.images": "import from awares_bench.methods.images",
}
"""Modules of earlier releases that a method may import -> what to write instead."""


RENAMED = {
    Policy: {"look": "turns(self, sample)"},
    Pruner: {"budget": "tokens_to_keep(self, visual, share)", "stages": "cut_layers(self, layers)"},
}
"""What earlier releases called of a method: old name -> new one. Under its old name it would never be called."""


def names() -> list[str]:
    """Every known method, without importing any."""
    return sorted({*_own(), *_external()})


def own_names() -> list[str]:
    """The methods of this package, without those that other packages register."""
    return sorted(_own())


@cache
def _own() -> dict[str, tuple[str, str]]:
    """Methods of this package -> (package, file)."""
    rooms = files("awares_bench.baselines").iterdir()
    found = {p.name.removesuffix(".py"): ("awares_bench.baselines", p.name) for p in rooms if p.name.endswith(".py")}
    return {k: v for k, v in found.items() if not k.startswith("_")} | {"awares": ("awares_bench", "awares.py")}


@cache  # reading what every installed package registers takes 25 ms
def _external() -> dict[str, EntryPoint]:
    """Methods that other packages bring."""
    return {e.name: e for e in entry_points(group=GROUP)}


def method_class(name: str) -> type[Policy] | type[Pruner]:
    """The class behind a name or a ``FILE.py:Class``. Raises ValueError that says what was found and what to do."""
    if ".py:" in name or name.endswith(".py"):
        return _from_file(name)
    if name in _external():
        return _of_entry_point(_external()[name])
    if name not in _own():
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"unknown method {name!r}.{hint} Known: {', '.join(names())}; or FILE.py:Class")
    package, file = _own()[name]
    module = import_module(f"{package}.{file.removesuffix('.py')}")
    classes = [c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, (Policy, Pruner))]
    own = [c for c in classes if c.__module__ == module.__name__]
    if len(own) != 1:
        raise ValueError(f"{module.__name__} must define one method class; it defines {[c.__name__ for c in own]}")
    return own[0]


def pruner_classes() -> list[type[Pruner]]:
    """The pruners of this package, by file name."""
    return [found for found in map(method_class, own_names()) if issubclass(found, Pruner)]


@cache  # a class is the same class whenever its file is named
def _from_file(place: str) -> type[Policy] | type[Pruner]:
    file, _, wanted = place.partition(".py:")
    path = Path(f"{file.removesuffix('.py')}.py").expanduser()
    if not path.is_file():
        raise ValueError(f"no file {path} (from method={place}); pass method=path/to/file.py:Class")
    spec = spec_from_file_location(f"awares_bench_method_{path.stem}_{abs(hash(path.resolve()))}", path)
    assert spec is not None and spec.loader is not None  # a path that ends in .py has both
    module = sys.modules[spec.name] = module_from_spec(spec)  # where dataclasses and type hints look for its names
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise ValueError(
            f"{path}, line {error.lineno}: {error.msg}; the file is not valid Python, so no method can be read"
        ) from error
    except Exception as error:  # a stranger's code may raise anything when it is imported
        raise ValueError(
            f"{path} cannot be imported: {type(error).__name__}: {error}; {_remedy(error, 'mend the file first')}"
        ) from error
    if not wanted:
        own = [c.__name__ for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
        raise ValueError(f"name the class: method={path}:Class; {path.name} defines {', '.join(own) or 'no class'}")
    if not hasattr(module, wanted):
        own = [k for k, c in vars(module).items() if inspect.isclass(c) and c.__module__ == module.__name__]
        raise ValueError(f"{path} defines no {wanted!r}; it defines {', '.join(own) or 'no class'}")
    return _checked(getattr(module, wanted), f"{path}:{wanted}")


def _of_entry_point(entry: EntryPoint) -> type[Policy] | type[Pruner]:
    try:
        found = entry.load()
    except Exception as error:  # a stranger's package may raise anything when it is imported
        message = f"method {entry.name!r} ({entry.value}) cannot be loaded: {type(error).__name__}: {error}"
        raise ValueError(f"{message}; {_remedy(error, 'mend or remove its package')}") from error
    return _checked(found, entry.value)


def _remedy(error: Exception, otherwise: str) -> str:
    """What to do about a method that cannot be imported: the new place of a module that moved, else ``otherwise``."""
    return MOVED.get(error.name or "", otherwise) if isinstance(error, ModuleNotFoundError) else otherwise


def _checked(found: object, place: str) -> type[Policy] | type[Pruner]:
    """``found`` when it is a method class. Raises ValueError that says what it lacks."""
    if not (inspect.isclass(found) and issubclass(found, (Policy, Pruner))):
        raise ValueError(f"{place} is not a method; derive the class from awares_bench.Policy or awares_bench.Pruner")
    if not ("__dataclass_fields__" in vars(found) and vars(found)["__dataclass_params__"].frozen):
        raise ValueError(f"{place} must be a frozen dataclass; write @dataclass(frozen=True) above the class")
    for old, new in RENAMED[Policy if issubclass(found, Policy) else Pruner].items():
        if inspect.isfunction(getattr(found, old, None)):
            raise ValueError(f"{place} has a method {old}, the name of earlier releases; rename it to {new}")
    if issubclass(found, Policy) and found.turns is Policy.turns:
        raise ValueError(
            f"{place} has no turns(self, sample); a policy yields turns there and returns the reply that is the answer"
        )
    needs = getattr(found, "needs", ())
    unknown = [] if isinstance(needs, property) else [name for name in needs if name not in NEEDS]
    if unknown:
        raise ValueError(f"{place} needs {unknown[0]!r}; a pruner may need {', '.join(NEEDS)}")
    if issubclass(found, Pruner) and all(getattr(found, rung) is getattr(Pruner, rung) for rung in ("score", "select", "reduce")):
        raise ValueError(f"{place} has no score, select or reduce; a pruner writes one of them (see awares_bench.Pruner)")
    return found


@dataclass(frozen=True)
class Method:
    """What is run: a policy, and the pruner it is composed with, if any."""

    policy: Policy
    pruner: Pruner | None
    parts: tuple[str, str | None]
    """Their names, the policy's first; of two pruners ``visionzip+pyramiddrop``."""

    @property
    def members(self) -> dict[str, Policy | Pruner]:
        """The policy, and the pruner or the two it is made of, by name."""
        pruners: dict[str, Any] = {str(self.parts[1]): self.pruner} if self.pruner else {}
        return {self.parts[0]: self.policy} | (self.pruner.members if isinstance(self.pruner, ComposedPruner) else pruners)

    @property
    def fields(self) -> dict[str, object]:
        """Options with their values; of two pruners the retention of both together, and their own as ``visionzip.retention``."""
        if not isinstance(self.pruner, ComposedPruner):
            return {k: getattr(part, k) for part in self.members.values() for k in options(type(part))}
        own = {f"{name}.{k}": getattr(part, k) for name, part in self.pruner.members.items() for k in options(type(part))}
        return {k: getattr(self.policy, k) for k in options(type(self.policy))} | {"retention": self.pruner.retention} | own

    @property
    def label(self) -> str:
        """``awares+visionzip retention=0.5``: the parts, the retention, and every option that is not its default."""
        name = "+".join(part for part in self.parts if part and not (self.pruner and part == "full"))
        defaults = {k: v for part in self.members.values() for k, v in options(type(part)).items()}
        defaults |= {f"{name}.{k}": v for name, part in self.members.items() for k, v in options(type(part)).items()}
        shares = [part.retention for part in self.members.values() if isinstance(part, Pruner)]
        if len(set(shares)) == 1:  # each of two pruners keeps the same share
            defaults |= {f"{name}.retention": shares[0] for name in self.members}
        told = [f"{k}={v}" for k, v in self.fields.items() if k == "retention" or v != defaults[k]]
        return " ".join([name, *told])


def build(name: str, given: Mapping[str, Any], common: tuple[str, ...] = ()) -> Method:
    """A method by its name and options.

    name: of one method, or of several that are composed, as labels have them: ``awares+visionzip``, ``visionzip+pyramiddrop``.
    given: options of the method, and ``pruner=NAME`` or, for a pruner, ``policy=NAME`` (default full) with the options of
    that; ``pruner=visionzip+pyramiddrop`` for two, one that cuts before the decoder and one inside (``compose``). An option that
    several have goes to all. common: options that belong to whoever calls, beside those of the method.
    Raises ValueError for an option that nobody has, with the nearest known one.
    """
    given, named = dict(given), _split(name)
    classes = {part: method_class(part) for part in named}
    other, kind = ("pruner", Pruner) if issubclass(classes[named[0]], Policy) else ("policy", Policy)
    second = None if other == "pruner" and len(named) > 1 else given.pop(other, None) or ("full" if other == "policy" else None)
    for part in _split(str(second)) if second else ():
        classes[part] = method_class(part)
        if not issubclass(classes[part], kind):
            raise ValueError(f"{other}={second}: {part} is not a {other}; {name} is composed with one of the {other} methods")
    policies = {part: cls for part, cls in classes.items() if issubclass(cls, Policy)}
    pruners: dict[str, Any] = {part: cls for part, cls in classes.items() if part not in policies}
    if len(policies) > 1 or len(pruners) > 2:
        raise ValueError(
            f"{'+'.join(classes)}: a method is one policy and at most two pruners, one before the decoder and one inside"
        )

    known = [field for cls in classes.values() for field in options(cls)]
    known += [f"{part}.{field}" for part, cls in pruners.items() for field in options(cls) if len(pruners) > 1]
    for option in given:
        if option not in (*known, *common):
            raise ValueError(f"method {name}: {unknown_option(option, [*known, *common, other])}")
    ((policy, cls),) = policies.items()
    made = cls(**{k: given[k] for k in options(cls) if k in given})
    if len(pruners) > 1:
        composed = compose(pruners, given)
        return Method(made, composed, (policy, "+".join(composed.names)))
    for part, cls in pruners.items():
        return Method(made, cls(**{k: given[k] for k in options(cls) if k in given}), (policy, part))
    return Method(made, None, (policy, None))


def _split(name: str) -> list[str]:
    """The methods that a name is composed of; a file's path may hold a plus."""
    if Path(f"{name.partition('.py')[0]}.py").expanduser().is_file():
        return [name]
    return list(dict.fromkeys(name.split("+")))


def describe(name: str) -> dict[str, str]:
    """Title and block of a method's module docstring, read from its source without importing it.

    Keys: ``Title`` (the first line), those of ``BLOCK`` that it has, and ``Trained``: yes when its ``Needs`` say trained.
    """
    lines = _docstring(name).splitlines()
    block, word = {"Title": lines[0] if lines else ""}, ""
    for line in lines[1:]:
        first, _, rest = line.partition(" ")
        if first in BLOCK:
            word, block[first] = first, rest.strip()
        elif word and line.startswith("  "):  # a value goes on in the next line
            block[word] += f" {line.strip()}"
        else:
            word = ""
    return block | {"Trained": "yes" if "trained" in block.get("Needs", "") else "no"}


def _docstring(name: str) -> str:
    if name in _external():
        try:
            spec = find_spec(_external()[name].module)
            if spec is None or spec.origin is None:
                raise ImportError(f"there is no file of module {_external()[name].module}")
            return ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
        except (ImportError, OSError, SyntaxError, ValueError, AttributeError, TypeError) as error:
            return f"{_external()[name].value} cannot be read: {error}"
    package, file = _own()[name]
    return ast.get_docstring(ast.parse((files(package) / file).read_text(encoding="utf-8"))) or ""


def table() -> str:
    """The methods of this package as the Markdown table of ``docs/methods.md``; links count from there."""
    rows = ["| method | what it is | trained | needs | cost | differs from its source |", "|---|---|---|---|---|---|"]
    for name, (package, file) in sorted(_own().items()):
        b = describe(name)
        link = f"[`{name}`](../{'awares_bench' if package == 'awares_bench' else 'baselines'}/{file})"
        rows.append(f"| {link} | {b['Title']} | {b['Trained']} | {b['Needs']} | {b['Cost']} | {b['Differs']} |")
    return "\n".join(rows)
