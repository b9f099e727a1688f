"""Entry point of the lmms-eval plugin. Loaded by every lmms-eval command, so it imports nothing heavy and cannot fail."""


def manifests():
    """lmms-eval's ``ModelManifest`` of every model this package adds."""
    from lmms_eval.models.registry_v2 import ModelManifest

    names = {"awares": "AwaResModel", "awares_full": "FullModel", "awares_low": "LowModel"}
    return [ModelManifest(model_id=name, chat_class_path=f"awares_bench.lmms.{cls}") for name, cls in names.items()]
