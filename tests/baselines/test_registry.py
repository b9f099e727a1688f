"""What every method keeps to, whoever wrote it: found, documented, composed, counted, the same in any batch."""

import importlib.metadata
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from awares_bench.awares import AwaRes
from awares_bench.bench.synthetic_models import random_scorer
from awares_bench.inference.engine import Engine, Job
from awares_bench.methods import registry
from awares_bench.methods.conversation import Sample, Trajectory
from awares_bench.methods.options import options
from awares_bench.methods.policy import Policy
from awares_bench.methods.pruner import Pruner
from awares_bench.methods.resolution_gate import Gate

from ..helpers.tiny import picture, tiny_vlm

EXAMPLE = f"{Path(__file__).parents[1] / 'helpers' / 'example_method.py'}:Strip"
METHODS = [*registry.names(), EXAMPLE]
PRUNERS = [n for n in METHODS if issubclass(registry.method_class(n), Pruner)]
EVERY = pytest.mark.parametrize("name", METHODS, ids=lambda n: n.rsplit(":", 1)[-1])

OTHERS = {"other_pictures": lambda: [(picture(224, 168, 7),), (picture(112, 84, 8),)]}

SAMPLES = [
    Sample((), "Without a picture: what is two and two?", "t/0"),
    Sample((picture(224, 224),), "What is the value of the red bar?", "t/1", ((100, 100, 130, 120),), False),
    Sample((picture(300, 84, 1),), "Is there a star in a red frame?", "t/2"),
    Sample((picture(112, 112, 2), picture(56, 140, 3)), "Compare the two.", "t/3"),
    Sample((picture(40, 200, 4),), "Which way?", "t/4", ((0, 0, 40, 50),), True),
]
SAMPLES = [replace(sample, **OTHERS) for sample in SAMPLES]


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Options a method needs to run at all here: a gate, and replies that end soon."""
    path = tmp_path_factory.mktemp("gate") / "gate.safetensors"
    rng = np.random.default_rng(3)
    Gate(rng.normal(size=(3, 64)), rng.normal(size=3), (56, 112, 224), 56, 0.5, "tiny").save(path)
    short = {name: {"budget": 5} for name in ("visionthink", "adaptvision", "ergo", "zoom_loop")}
    return {"cares": {"gate": str(path)}, "visionselector": {"scorer": str(random_scorer(64))}, **short}


class Watched:
    """A model that notes, for every turn it answers, the logits of its reply and the tokens entering each decoder layer."""

    def __init__(self, vlm):
        self.vlm, self.logits, self.entering = vlm, {}, {}
        self.visual_tokens, self.check, self.text = vlm.visual_tokens, vlm.check, vlm.text
        self.hidden_states, self.prepare = vlm.hidden_states, vlm.prepare

    def reply(self, requests, pruner=None):
        passes = []
        hooks = [
            layer.register_forward_hook(lambda m, args, out, i=i: passes.append((i, args[0].shape[1])))
            for i, layer in enumerate(self.vlm.host.decoder.layers)
        ]
        keys = [((r.session.turns or [r.turn])[0].text, len(r.session.turns), r.turn.model) for r in requests]
        self.vlm.trace = []
        try:
            replies = self.vlm.reply(requests, pruner)
            for b, (key, reply) in enumerate(zip(keys, replies, strict=True)):
                if requests[b].turn.forced_reply is None:
                    self.logits[key] = torch.stack([step[b] for step in self.vlm.trace[: max(1, len(reply.tokens))]])
        finally:
            self.vlm.trace = None
            for hook in hooks:
                hook.remove()
        if len(requests) == 1:
            layers = len(self.vlm.host.decoder.layers)
            assert [i for i, _ in passes[:layers]] == list(range(layers))
            self.entering[keys[0]] = [n for _, n in passes[:layers]]
        return replies


def run(method, batch_size, samples=SAMPLES):
    watched = Watched(tiny_vlm())
    engine = Engine(watched, method.policy, batch_size, pruner=method.pruner)
    outcomes = dict(engine.run([Job(s, 5) for s in samples]))
    assert sorted(outcomes) == list(range(len(samples)))
    assert all(isinstance(o, Trajectory) for o in outcomes.values()), outcomes
    return [outcomes[i] for i in range(len(samples))], watched


_ALONE: dict[str, tuple] = {}


def run_alone(name, given):
    """``run`` at batch size 1 with the default options, once for all tests."""
    if name not in _ALONE:
        _ALONE[name] = run(registry.build(name, given.get(name, {})), 1)
    return _ALONE[name]


@EVERY
def test_a_method_is_found_by_its_name_and_says_what_it_is(name):
    cls = registry.method_class(name)
    assert issubclass(cls, (Policy, Pruner)) and cls is registry.method_class(name)
    if name == EXAMPLE:
        return
    block = registry.describe(name)
    assert {"Title", "Trained", *registry.BLOCK} <= set(block) and all(block.values())


@EVERY
def test_a_method_constructs_by_its_defaults_and_refuses_options_it_does_not_have(name):
    made = registry.build(name, {})
    assert made.fields == {k: v for part in (made.policy, made.pruner) if part for k, v in options(type(part)).items()}
    with pytest.raises(ValueError, match=r"unknown option 'retentoin'\..*Known: "):
        registry.build(name, {"retentoin": 0.5})
    with pytest.raises(FrozenInstanceError):
        (made.pruner or made.policy).anything = 1


@EVERY
def test_a_method_counts_what_the_decoder_is_fed(name, given):
    outcomes, watched = run_alone(name, given)
    vlm = tiny_vlm()
    for sample, t in zip(SAMPLES, outcomes, strict=True):
        assert t.full_tokens == sum(vlm.visual_tokens(i) for i in sample.images)
        for n, (turn, reply) in enumerate(zip(t.turns, t.replies, strict=True)):
            spent = reply.usage
            assert spent.encoded == sum(vlm.visual_tokens(i) for i in turn.images)
            assert 0 < spent.prefill <= spent.encoded or not turn.images
            if turn.hidden_state_depth is not None:
                continue
            asked = [x for x in t.turns if x.model == turn.model and x.hidden_state_depth is None]
            key = (asked[0].text, asked.index(turn), turn.model)
            fed = np.mean([length - spent.text for length in watched.entering[key]])
            assert spent.prefill == pytest.approx(fed), (name, n)
        assert t.rtr == (None if not sample.images else t.usage.prefill / t.full_tokens)


@EVERY
def test_a_batch_has_the_logits_counts_and_answers_of_each_document_alone(name, given):
    alone, single = run_alone(name, given)
    together, batched = run(registry.build(name, given.get(name, {})), 4)
    for a, b in zip(alone, together, strict=True):
        assert (a.answer, a.crops, a.events) == (b.answer, b.crops, b.events)
        assert [r.tokens for r in a.replies] == [r.tokens for r in b.replies]
        assert counts(a) == counts(b)
    assert single.logits.keys() == batched.logits.keys()
    assert max((single.logits[k] - batched.logits[k]).abs().max() for k in single.logits) < 1e-4


def counts(t):
    return [(r.usage.encoded, round(r.usage.prefill, 9), r.usage.text, r.usage.output) for r in t.replies]


@pytest.mark.parametrize("pruner", PRUNERS)
def test_every_pruner_composes_with_policies_of_two_turns_and_with_a_proxy(pruner, given):
    for policy in ("all_crops", "cares"):
        method = registry.build(policy, {"pruner": pruner, "retention": 0.5, **given.get(policy, {}), **given.get(pruner, {})})
        assert method.parts == (policy, pruner) and method.label.startswith(f"{policy}+{pruner} ")
        pruned, _ = run(method, 3, SAMPLES[:3])
        whole, _ = run_alone(policy, given)
        for sample, a, b in zip(SAMPLES[:3], pruned, whole[:3], strict=True):
            for turn, cut, kept in zip(a.turns, a.replies, b.replies, strict=True):
                assert cut.usage.encoded == kept.usage.encoded
                if turn.hidden_state_depth is not None or not turn.images:  # a probe is not the conversation that is pruned
                    assert cut.usage.prefill == kept.usage.prefill
                else:
                    assert cut.usage.prefill < kept.usage.prefill, sample.key


def test_a_pruner_alone_means_full_and_labels_say_what_differs_from_the_defaults():
    assert registry.build("random_tokens", {"retention": 0.25}).parts == ("full", "random_tokens")
    assert registry.build("random_tokens", {"retention": 0.25}).label == "random_tokens retention=0.25"
    assert registry.build("random_tokens", {"policy": "low"}).label == "low+random_tokens retention=0.5"
    assert (
        registry.build("awares", {"pruner": "pooling", "prompt": "adapter"}).label
        == "awares+pooling prompt=adapter retention=0.5"
    )
    assert registry.build("awares", {}).label == "awares"
    made = registry.build("random_crop", {"pruner": "random_tokens", "draw": 3})  # an option that both have goes to both
    assert made.policy.draw == made.pruner.draw == 3


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("awares", {"pruner": "low"}, "pruner=low: low is not a pruner"),
        ("pooling", {"policy": "fastv"}, "policy=fastv: fastv is not a policy"),
        ("pooling", {"pruner": "fastv"}, "unknown option 'pruner'"),
        ("awares", {"retention": 0.5}, "unknown option 'retention'"),
        ("visionzipp", {}, "Did you mean visionzip?"),
        ("awares", {"pruner": "visionzap"}, "Did you mean visionzip?"),
        ("visionzip", {"retention": 0}, "above 0 and at most 1"),
        ("visionzip", {"retention": 1.5}, "above 0 and at most 1"),
        ("visionzip", {"retention": "70 %"}, "above 0 and at most 1"),
        ("visionzip", {"retention": float("nan")}, "above 0 and at most 1"),
        ("cropvlm", {"view": "half"}, "'full', 'low'"),
        ("cropvlm", {"crop_longest": -1}, "at least 0"),
        ("visionthink", {"budget": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_built_says_what_to_do(name, given, said):
    with pytest.raises(ValueError, match=said.replace("?", r"\?")):
        registry.build(name, given)


# ------------------------------------------------------------------ methods of third parties

POLICY = "from dataclasses import dataclass\nfrom awares_bench import Policy, Pruner\n"


@pytest.mark.parametrize(
    ("code", "wanted", "said"),
    [
        ("class Mine(:\n    pass\n", ":Mine", r"mine\.py, line 1: invalid syntax; the file is not valid Python"),
        ("import nothing_of_that_name\n", ":Mine", r"cannot be imported: ModuleNotFoundError.*mend the file"),
        ("class Mine:\n    pass\n", ":Mine", r"is not a method; derive the class from awares_bench\.Policy or"),
        ("Mine = 3\n", ":Mine", "is not a method"),
        (f"{POLICY}class Mine(Policy):\n    def turns(self, sample): ...\n", ":Mine", r"write @dataclass\(frozen=True\)"),
        (f"{POLICY}@dataclass(frozen=True)\nclass Mine(Policy):\n    pass\n", ":Mine", r"has no turns\(self, sample\)"),
        (f"{POLICY}@dataclass(frozen=True)\nclass Mine(Pruner):\n    pass\n", ":Mine", "has no score, select or reduce"),
        ("class Other: ...\n", ":Mine", "defines no 'Mine'; it defines Other"),
        ("class Other: ...\n", "", r"name the class: method=.*mine\.py:Class; mine\.py defines Other"),
    ],
)
def test_a_strangers_file_that_is_no_method_says_what_to_do(tmp_path, code, wanted, said):
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(ValueError, match=said):
        registry.method_class(f"{tmp_path / 'mine.py'}{wanted}")


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"no file nowhere/mine\.py"):
        registry.method_class("nowhere/mine.py:Mine")


def test_a_method_of_another_package_is_found_listed_and_checked(monkeypatch, tmp_path):
    (tmp_path / "strangers_method.py").write_text(Path(EXAMPLE.rsplit(":", 1)[0]).read_text())
    (tmp_path / "strangers_broken.py").write_text("x = (\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = {
        "strip": importlib.metadata.EntryPoint("strip", "strangers_method:Strip", registry.GROUP),
        "broken": importlib.metadata.EntryPoint("broken", "strangers_broken:Mine", registry.GROUP),
        "wrong": importlib.metadata.EntryPoint("wrong", "strangers_method:Sample", registry.GROUP),
    }
    monkeypatch.setattr(registry, "_external", lambda: found)
    assert {"strip", "broken", "wrong"} <= set(registry.names())
    assert registry.build("strip", {"share": 0.5}).policy.share == 0.5
    assert registry.describe("strip")["Needs"] == "nothing" and "cannot be read" in registry.describe("broken")["Title"]
    with pytest.raises(ValueError, match=r"method 'broken' .* cannot be loaded: SyntaxError.*mend or remove its package"):
        registry.method_class("broken")
    with pytest.raises(ValueError, match="is not a method"):
        registry.method_class("wrong")
    assert "strip" not in registry.table()  # the page of methods lists this package's own


def test_the_docs_show_the_example_whole_and_it_is_short():
    source = Path(EXAMPLE.rsplit(":", 1)[0]).read_text()
    assert len(source.splitlines()) < 40
    assert source.strip() in (Path(__file__).parents[2] / "docs" / "add_a_method.md").read_text()


def test_the_control_policies_are_awares_in_all_but_what_they_replace():
    for name in ("blank_crop", "random_crop", "swapped_crop"):
        cls = registry.method_class(name)
        assert issubclass(cls, AwaRes) and set(options(AwaRes)) <= set(options(cls))


# ------------------------------------------------------------------ as lmms-eval models


def test_every_method_is_an_lmms_eval_model_by_its_own_name():
    from awares_bench.evaluation import lmms_manifest, lmms_model

    found = {name: m.chat_class_path for m in lmms_manifest.manifests() for name in (m.model_id, *m.aliases)}
    assert {*registry.names(), "awares", "awares_full", "awares_low", "awares_bench"} <= set(found)
    for name, path in found.items():
        model = getattr(lmms_model, path.rsplit(".", 1)[1])
        assert issubclass(model, lmms_model.MethodModel) and name in (model.method, f"awares_{model.method}")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lmms_model.nothing


def test_a_name_that_lmms_eval_uses_is_left_to_it(monkeypatch):
    import lmms_eval.models as loaded

    from awares_bench.evaluation import lmms_manifest

    assert not {*loaded.AVAILABLE_SIMPLE_MODELS, *loaded.AVAILABLE_CHAT_TEMPLATE_MODELS} & set(registry.names())
    monkeypatch.setitem(loaded.AVAILABLE_SIMPLE_MODELS, "full", "Full")
    names = [n for m in lmms_manifest.manifests() for n in (m.model_id, *m.aliases)]
    assert "full" not in names and "awares_full" in names


def test_the_adapter_reads_evidence_and_nothing_else_by_that_name():
    from awares_bench.evaluation.lmms_model import _evidence

    assert _evidence([[1, 2, 3, 4], [5, 6, 7, 8.0]]) == ((1, 2, 3, 4), (5, 6, 7, 8))
    for other in (None, "see page 3", ["a", "b"], [[1, 2]], {"x": 1}):
        assert _evidence(other) is None
    assert _evidence([]) == ()
