"""awares-bench: how few visual tokens does a vision-language model need?

import awares_bench

model = awares_bench.load("nano")
answer = model.ask("chart.png", "What is the value of the red bar?")
print(answer.text, answer.crops, answer.rtr)
"""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "load": "api",
    "compare": "api",
    "methods": "api",
    "Model": "api",
    "Answer": "api",
    "Comparison": "api",
    "AwaresError": "errors",
    "Policy": "methods.policy",
    "TurnGenerator": "methods.policy",
    "Pruner": "methods.pruner",
    "VisualTokens": "methods.pruner",
    "Sample": "methods.conversation",
    "Turn": "methods.conversation",
    "Reply": "methods.conversation",
    "Event": "methods.conversation",
    "EventKind": "methods.conversation",
    "Failure": "methods.conversation",
    "AwaRes": "awares",
}
"""Public name -> the module that holds it, imported when the name is asked for: a bare import loads no torch."""

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
