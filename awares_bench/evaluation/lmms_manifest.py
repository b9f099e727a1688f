"""Entry point of the lmms-eval plugin. Loaded by every lmms-eval command, so it imports nothing heavy and cannot fail."""

import sys

COMPOSED = "awares_bench"
"""The model whose method is an option: ``policy=…,pruner=…`` or ``method=FILE.py:Class``."""


def manifests():
    """lmms-eval's ``ModelManifest`` of every method by its own name and as ``awares_NAME``, and of ``awares_bench``.

    A name that lmms-eval itself uses is left to it; such a method goes by ``awares_NAME`` only.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    from awares_bench.methods.registry import names
    from awares_bench.openmp import set_short_spin

    set_short_spin()  # lmms-eval has loaded PyTorch: this is for the processes that it starts
    loading = sys.modules.get("lmms_eval.models")
    taken = {*getattr(loading, "AVAILABLE_SIMPLE_MODELS", ()), *getattr(loading, "AVAILABLE_CHAT_TEMPLATE_MODELS", ())}
    entries = [ModelManifest(model_id=COMPOSED, chat_class_path=f"awares_bench.evaluation.lmms_model.{COMPOSED}")]
    for name in filter(str.isidentifier, names()):
        ids = [i for i in (name, name if name == "awares" else f"awares_{name}") if i not in taken]
        if ids:
            entries.append(
                ModelManifest(
                    model_id=ids[0],
                    chat_class_path=f"awares_bench.evaluation.lmms_model.{name}",
                    aliases=tuple(dict.fromkeys(ids[1:])),
                )
            )
    return entries
