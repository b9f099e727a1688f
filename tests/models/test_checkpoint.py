"""Checkpoints: loaded whole whatever their age, adapters merged into what they were trained as, or refused with a reason and a remedy."""

import copy
import json
import re
import shutil
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from awares_bench.errors import CheckpointError
from awares_bench.inference.local_model import LocalModel
from awares_bench.inference.openai_server import Endpoint
from awares_bench.inference.session import Request, Session
from awares_bench.methods.conversation import Turn
from awares_bench.models.adapters import merge_adapters
from awares_bench.models.packaged import resolve
from awares_bench.training.nano import model as nano

from ..helpers.tiny import picture, tiny_copy, tiny_vlm

LINEAR = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
Q = "model.language_model.layers.{}.self_attn.q_proj"


def as_released(folder: Path) -> None:
    """A folder as transformers 4.41 wrote it: a flat config, a template of its own, a picture processor without a processor."""
    config = json.loads((folder / "config.json").read_text())
    text, vision = config.pop("text_config"), config.pop("vision_config")
    rope = text.pop("rope_parameters")
    keep = (
        "depth",
        "hidden_act",
        "hidden_size",
        "intermediate_size",
        "num_heads",
        "out_hidden_size",
        "patch_size",
        "window_size",
    )
    vision = {
        k: vision[k] for k in (*keep, "spatial_merge_size", "temporal_patch_size", "fullatt_block_indexes", "tokens_per_second")
    }
    flat = {k: v for k, v in text.items() if k not in ("model_type", "layer_types", "dtype")} | config
    flat |= {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}}
    flat |= {"vision_config": vision | {"in_chans": 3}, "torch_dtype": "bfloat16", "transformers_version": "4.41.2"}
    (folder / "config.json").write_text(json.dumps(flat))
    processor = json.loads((folder / "processor_config.json").read_text())
    pictures = processor["image_processor"] | {
        "processor_class": "Qwen2_5_VLProcessor",
        "min_pixels": 3136,
        "max_pixels": 12845056,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    (folder / "processor_config.json").unlink()
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    (folder / "model.safetensors").exists() and save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors")


@pytest.fixture(scope="session")
def masters(tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("masters")
    nano.save(tiny_vlm().host.model, tiny_vlm().host.processor, place / "today")
    shutil.copytree(place / "today", place / "released")
    as_released(place / "released")
    untied = tiny_copy().host.model
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.flip(0).clone())
    untied.config.tie_word_embeddings = untied.config.text_config.tie_word_embeddings = False
    untied.all_tied_weights_keys = {}
    nano.save(untied, tiny_vlm().host.processor, place / "untied")
    return {name: place / name for name in ("today", "released", "untied")}


@pytest.fixture(params=["today", "released"])
def folder(request, masters, tmp_path) -> Path:
    """A sound checkpoint, to be spoilt."""
    return shutil.copytree(masters[request.param], tmp_path / "ckpt")


def weights(folder: Path, change) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def config(path: Path, **more) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


def refused(folder: Path | str, *words: str, **more) -> str:
    with pytest.raises(CheckpointError) as caught:
        LocalModel.load(str(folder), device="cpu", **more)
    said = str(caught.value)
    assert all(word in said for word in words) and "\n" not in said, said
    return said


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 40)[None]).logits


# ---------------------------------------------------------------------- whole checkpoints


def test_both_layouts_hold_the_same_model(masters):
    loaded = [LocalModel.load(str(masters[name]), device="cpu") for name in ("today", "released")]
    one, other = (vlm.host.model.state_dict() for vlm in loaded)
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
    replies = [vlm.reply([Request(Session(), Turn((picture(112, 84),), "what?"), 8)])[0] for vlm in loaded]
    assert replies[0].text == replies[1].text and replies[0].usage.encoded == replies[1].usage.encoded == 12
    source = tiny_vlm().host.model.state_dict()
    assert all(torch.equal(one[n], source[n].bfloat16().float()) for n in one)


def test_a_tied_head_is_not_missing_and_an_untied_one_is(masters, folder):
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model = LocalModel.load(str(folder), device="cpu").host.model
    assert model.lm_head.weight is model.get_input_embeddings().weight
    whole = LocalModel.load(str(masters["untied"]), device="cpu").host.model
    assert torch.equal(whole.lm_head.weight, whole.get_input_embeddings().weight.flip(0))
    shutil.rmtree(folder)
    shutil.copytree(masters["untied"], folder)
    weights(folder, lambda s: s.pop("lm_head.weight"))
    refused(folder, "1 tensors", "are missing", "lm_head.weight", "save the whole model again")


def test_missing_tensors_are_named(folder):
    weights(folder, lambda s: [s.pop(n) for n in list(s) if "layers.1." in n])
    refused(folder, "12 tensors", "would be random numbers", "layers.1", "and 9 more")


def test_a_missing_tensor_of_the_tower_is_named(folder):
    weights(folder, lambda s: s.pop("visual.merger.mlp.0.weight"))
    refused(folder, "1 tensors", "model.visual.merger.mlp.0.weight")


def test_tensors_of_another_shape_are_named(folder):
    weights(folder, lambda s: s.update({"model.norm.weight": torch.ones(32)}))
    refused(folder, "model.language_model.norm.weight", "32 in the file, 64 by config.json")


@pytest.mark.parametrize(
    "extra", ["v_head.weight", "model.layers.7.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.lora_A.weight"]
)
def test_tensors_without_a_place_are_named(folder, extra):
    weights(folder, lambda s: s.update({extra: torch.ones(2, 2)}))
    refused(folder, "would be left out", extra.rsplit(".", 2)[1])


def test_a_model_saved_inside_a_wrapper_is_refused(folder):
    weights(folder, lambda s: s.update({f"module.{n}": s.pop(n) for n in list(s)}))
    refused(folder, "are missing")


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "visual.rotary_pos_emb.inv_freq", "model.position_ids"]
)
def test_buffers_of_old_releases_do_no_harm(folder, name):
    weights(folder, lambda s: s.update({name: torch.ones(16)}))
    assert LocalModel.load(str(folder), device="cpu")


def test_a_tied_config_with_two_different_tables_is_refused(folder):
    weights(folder, lambda s: s.update({"lm_head.weight": s["model.embed_tokens.weight"].clone()}))
    model = LocalModel.load(str(folder), device="cpu").host.model
    assert model.lm_head.weight is model.get_input_embeddings().weight
    weights(folder, lambda s: s.update({"lm_head.weight": s["model.embed_tokens.weight"] + 1}))
    refused(folder, "two different ones", "tie_word_embeddings to false")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "visual.patch_embed.proj.weight", "model.layers.2.self_attn.k_proj.bias"]
)
def test_weights_that_are_no_numbers_are_refused(folder, name, value):
    weights(folder, lambda s: s[name].view(-1)[-1:].fill_(value))
    refused(folder, "1 tensors", "hold NaN or infinity", name.removeprefix("visual.").removeprefix("model."))


def test_weights_beyond_float16_are_refused_in_float16_only(folder):
    weights(folder, lambda s: s["model.norm.weight"][:1].fill_(1e5))
    assert LocalModel.load(str(folder), device="cpu", dtype="bfloat16").host.model.dtype == torch.bfloat16
    refused(folder, "float16 ends at 65504: pass dtype=bfloat16", dtype="float16")


# ---------------------------------------------------------------------- files


def shards(folder: Path) -> dict:
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    parts = {"model-00001-of-00002.safetensors": names[:40], "model-00002-of-00002.safetensors": names[40:]}
    for file, some in parts.items():
        save_file({n: state[n] for n in some}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: file for file, some in parts.items() for n in some}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_shards_load_and_a_lost_one_is_named(folder):
    before = LocalModel.load(str(folder), device="cpu").host.model.state_dict()
    shards(folder)
    after = LocalModel.load(str(folder), device="cpu").host.model.state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before)
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(folder, "lacks 1 of the 2 weight files", "model-00002-of-00002.safetensors", "copy them there")


def test_an_index_that_promises_more_than_its_shards_is_refused(folder):
    shards(folder)
    part = folder / "model-00002-of-00002.safetensors"
    save_file({n: t for n, t in load_file(part).items() if "norm" not in n}, part, metadata={"format": "pt"})
    refused(folder, "are missing", "norm")


def test_two_sets_of_weights_are_refused(folder):
    shutil.copy(folder / "model.safetensors", folder / "old")
    shards(folder)
    (folder / "old").rename(folder / "model.safetensors")
    refused(folder, "two sets of weights", "remove the one that is not meant")


def test_an_index_without_a_map_is_refused(folder):
    shards(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    refused(folder, "model.safetensors.index.json", "weight_map")


@pytest.mark.parametrize("size", [0, 7, 1000, -1])
def test_truncated_weights_are_refused(folder, size):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:size])
    refused(folder, "model.safetensors of", "cut short or damaged", "download or copy it again")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_git_lfs_pointers_are_named(folder, name):
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3998\n")
    refused(folder, "git-LFS pointers", name, "git lfs pull")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("text", ["{'a': 1}", "", "[]", "\xff"])
def test_json_that_is_none_is_named(folder, name, text):
    (folder / name).write_bytes(text.encode("latin-1"))
    refused(folder, name, "JSON", "copy it anew")


def test_weights_in_bin_files_load_and_damaged_ones_are_refused(folder):
    before = LocalModel.load(str(folder), device="cpu").host.model.state_dict()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    after = LocalModel.load(str(folder), device="cpu").host.model.state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before)
    (folder / "pytorch_model.bin").write_bytes((folder / "pytorch_model.bin").read_bytes()[:5000])
    refused(folder, "cannot load")


@pytest.mark.parametrize("words", [{"hidden_size": "wide"}, {"num_attention_heads": 0}, {"vision_config": 3}])
def test_a_config_that_describes_no_model_is_refused(masters, tmp_path, words):
    folder = shutil.copytree(masters["released"], tmp_path / "ckpt")
    config(folder / "config.json", **words)
    refused(folder, str(folder))


# ---------------------------------------------------------------------- folders that are something else


def test_an_empty_folder_a_file_and_a_name_that_is_nowhere(tmp_path, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "the folder is empty")
    refused(folder / "model.safetensors", "is a file; pass the folder")
    refused("nobody/nothing", "no folder 'nobody/nothing' is here", "could be fetched")
    refused("a/b/c", "no folder 'a/b/c' is here")


def test_a_hub_name_is_loaded_from_what_was_fetched_before(tmp_path, masters, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    place = tmp_path / "models--some--one"
    shutil.copytree(masters["released"], place / "snapshots" / "c0ffee")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("c0ffee")
    vlm = LocalModel.load("some/one", device="cpu")
    assert vlm.host.model.config.name_or_path == "some/one"
    assert Endpoint("http://localhost:1/v1", "m", "some/one").visual_tokens(picture(112, 84)) == 12


def test_a_training_folder_says_which_subfolder_to_pass(tmp_path, masters):
    out = tmp_path / "out"
    for name in ("checkpoint-50", "checkpoint-500", "adapter", "checkpoint"):
        (out / name).mkdir(parents=True)
        (out / name / ("adapter_config.json" if name == "adapter" else "config.json")).write_text("{}")
    said = refused(out, "its subfolders have a checkpoint: pass")
    assert re.findall(r"out/([\w-]+)", said.split("pass ")[1]) == ["checkpoint", "adapter", "checkpoint-500", "checkpoint-50"]
    for name in ("checkpoint", "checkpoint-50", "checkpoint-500"):
        shutil.rmtree(out / name)
    (out / "trainer_state.json").write_text("{}")
    refused(out, "its subfolder has a checkpoint", "out/adapter")


@pytest.mark.parametrize("shard", ["pytorch_model_fsdp_0", "global_step500", "zero_to_fp32.py"])
@pytest.mark.parametrize("with_config", [True, False])
def test_shards_of_a_training_state_say_how_to_put_them_together(folder, shard, with_config):
    (folder / "model.safetensors").unlink()
    if not with_config:
        (folder / "config.json").unlink()
    (folder / shard).mkdir()
    refused(folder, "training state (FSDP or DeepSpeed)", "accelerate merge-weights", "zero_to_fp32")


def test_a_config_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    refused(folder, "a config.json and no weights", "model.safetensors")


# ---------------------------------------------------------------------- processors


def test_a_tokenizer_that_is_not_there_is_refused_here_and_at_an_endpoint(folder):
    (folder / "tokenizer.json").unlink()
    refused(folder, "has no tokenizer", "copy")
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        Endpoint("http://localhost:1/v1", "m", str(folder))


def test_a_picture_processor_that_is_not_there_is_refused(folder):
    for name in ("preprocessor_config.json", "processor_config.json"):
        (folder / name).unlink(missing_ok=True)
    refused(folder, "no picture processor", "preprocessor_config.json", "copy")
    (folder / "processor_config.json").write_text('{"processor_class": "Qwen2_5_VLProcessor"}')
    refused(folder, "no picture processor", "preprocessor_config.json", "copy")


def test_a_chat_template_is_wanted_that_shows_pictures(folder):
    for name in ("chat_template.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    refused(folder, "no chat template", "copy chat_template")
    for template, words in (
        ("{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}", "cannot show a picture"),
        ("{% for m in messages %}{{ m['role'] }} question{% endfor %}", "writes 0 <|image_pad|> for one picture"),
        ("{% for m in messages %}{% endfor", "cannot show a picture"),
    ):
        (folder / "chat_template.jinja").write_text(template)
        refused(folder, words, "copy chat_template")


def test_a_template_in_the_tokenizer_config_will_do(folder):
    found = next(p for p in (folder / "chat_template.json", folder / "chat_template.jinja") if p.exists())
    text = found.read_text()
    config(folder / "tokenizer_config.json", chat_template=json.loads(text)["chat_template"] if found.suffix == ".json" else text)
    found.unlink()
    assert LocalModel.load(str(folder), device="cpu").reply([Request(Session(), Turn((picture(56, 56),), "?"), 2)])


def test_a_processor_of_another_model_is_refused(folder):
    name = "preprocessor_config.json" if (folder / "preprocessor_config.json").exists() else "processor_config.json"
    was = json.loads((folder / name).read_text())
    for field, value in (("patch_size", 16), ("merge_size", 4)):
        inner = was["image_processor"] | {field: value} if "image_processor" in was else None
        (folder / name).write_text(json.dumps(was | ({"image_processor": inner} if inner else {field: value})))
        refused(folder, f"{field} of", f"is {value} in its picture processor", "copy preprocessor_config.json")


def test_a_vocabulary_larger_than_the_embeddings_is_refused(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = len(load_file(folder / "model.safetensors")["model.embed_tokens.weight"])
    tokenizer.add_tokens([f"<new{i}>" for i in range(rows - len(tokenizer) + 1)])
    tokenizer.save_pretrained(folder)
    refused(folder, f"ids up to {rows}", f"{rows} embeddings", "copy the tokenizer's files")


def test_an_image_mark_that_is_not_the_models_is_refused(folder):
    config(folder / "config.json", image_token_id=5)
    refused(folder, "image_token_id", "is 5", "<|image_pad|> is")


@pytest.mark.parametrize("stop", [99999, ["<|im_end|>"], -1])
def test_an_end_of_reply_that_cannot_be_is_refused(folder, stop):
    config(folder / "generation_config.json", eos_token_id=stop)
    refused(folder, "generation_config.json")


# ---------------------------------------------------------------------- dtypes, devices, quantisation


@pytest.mark.parametrize("dtype", ["float64", "int8", "float8_e4m3fn", "half", "fp16", "4bit"])
def test_dtypes_that_cannot_be_are_refused(folder, dtype):
    with pytest.raises(ValueError, match=f"dtype is '{dtype}'; allowed: auto, float32, bfloat16, float16"):
        LocalModel.load(str(folder), dtype=dtype, device="cpu")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_short_dtypes_answer_on_a_cpu(masters, dtype):
    vlm = LocalModel.load(str(masters["released"]), dtype=dtype, device="cpu")
    assert {p.dtype for p in vlm.host.model.parameters()} == {getattr(torch, dtype)}
    assert vlm.reply([Request(Session(), Turn((picture(112, 84),), "what?"), 4)])[0].usage.output


@pytest.mark.parametrize("device", ["gpu", "cpuu", "cuda:x"])
def test_devices_that_are_none_are_refused(masters, device):
    with pytest.raises(ValueError, match=f"device is '{device}'; allowed"):
        LocalModel.load(str(masters["today"]), device=device)


def test_attention_that_is_not_installed_is_refused(masters):
    refused(masters["today"], "cannot load", "FlashAttention2", "installed", attn_implementation="flash_attention_2")
    refused(masters["today"], "cannot load", "fast", attn_implementation="fast")


QUANTISED = [
    ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes"),
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
    ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}, "gptqmodel"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "optimum"),
    ({"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}, "compressed-tensors"),
    ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
    ({"quant_method": "new-one", "bits": 3}, "new-one"),
]


@pytest.mark.parametrize(("method", "words"), QUANTISED)
def test_quantised_weights_without_their_package_are_refused(folder, method, words):
    config(folder / "config.json", quantization_config=method)
    refused(folder, words, "quantised")


# ---------------------------------------------------------------------- adapters


def old(key: str) -> str:
    return key.replace("model.language_model.", "model.").replace("base_model.model.model.visual.", "base_model.model.visual.")


@cache
def loaded(folder: str):
    """A model that no test changes."""
    return LocalModel.load(folder, device="cpu").host.model


_trained: dict[tuple, tuple] = {}


def trained(base: Path, scale=0.05, **chosen) -> tuple[dict, dict, torch.Tensor]:
    """Random adapters of a base: their tensors, their config, and the logits that the model had with them beside it."""
    key = (str(base), scale, repr(chosen))
    if key not in _trained:
        torch.manual_seed(1)
        model = get_peft_model(
            LocalModel.load(str(base), device="cpu").host.model,
            LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LINEAR} | chosen),
        )
        for p in model.parameters():
            if p.requires_grad:
                torch.nn.init.normal_(p, std=scale) if p.ndim > 1 else p.data.mul_(1.1)
        expected = logits(model)
        with TemporaryDirectory() as out:
            model.save_pretrained(out, save_embedding_layers=False)
            made = load_file(Path(out) / "adapter_model.safetensors"), json.loads((Path(out) / "adapter_config.json").read_text())
        _trained[key] = (*made, expected)
    return _trained[key]


def adapters(base: Path, out: Path, rename=lambda key: key, said: dict | None = None, dtype=None, **how) -> Path:
    """``trained`` adapters, saved under names of another time or wrapper; ``said`` overrides their config as saved.

    The folder also gets ``expected.pt``: the logits that the model had with its adapters beside it, as in training.
    """
    state, as_saved, expected = trained(base, **how)
    out.mkdir(parents=True)
    save_file(
        {rename(n): t.to(dtype or t.dtype).contiguous().clone() for n, t in state.items()}, out / "adapter_model.safetensors"
    )
    (out / "adapter_config.json").write_text(json.dumps(as_saved | {"base_model_name_or_path": str(base)} | (said or {})))
    torch.save(expected, out / "expected.pt")
    return out


def closeness(folder: Path, merged=None) -> float:
    """Largest difference of the merged model's logits from those in training, over what the adapters changed."""
    expected, base = torch.load(folder / "expected.pt"), json.loads((folder / "adapter_config.json").read_text())
    merged = merged or LocalModel.load(str(folder), device="cpu").host.model
    moved = (expected - logits(loaded(base["base_model_name_or_path"]))).abs().max()
    assert moved > 0.1
    return ((logits(merged) - expected).abs().max() / moved).item()


NAMES = {
    "today": lambda key: key,
    "before-4.52": old,
    "ddp": lambda key: "module." + key,
    "compiled": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
    "fsdp": lambda key: old(key).replace(".self_attn", "._fsdp_wrapped_module.self_attn"),
    "adapter-named": lambda key: (
        old(key).replace("lora_A.weight", "lora_A.default.weight").replace("lora_B.weight", "lora_B.default.weight")
    ),
    "wrapped-twice": lambda key: "base_model.model." + old(key),
    "bare": lambda key: old(key).removeprefix("base_model.model."),
}
TODAY_AND_SLOWLY_OLD = ["today", pytest.param("before-4.52", marks=pytest.mark.slow)]
"""Where old names go another way only until they are mapped, which other tests see."""


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("base", ["today", "released"])
def test_adapters_of_any_names_are_merged_by_hand_and_in_logits(masters, tmp_path, names, base):
    out = adapters(masters[base], tmp_path / "lora", NAMES[names])
    model = LocalModel.load(str(out), device="cpu").host.model
    assert closeness(out, model) < 1e-4
    merged, state = model.state_dict(), loaded(str(masters[base])).state_dict()
    lora = {n.removeprefix("base_model.model."): t for n, t in trained(masters[base])[0].items()}
    changed = {n.rsplit(".", 2)[0] for n in lora}
    for name, tensor in state.items():
        module = name.removesuffix(".weight")
        if module in changed:
            tensor = tensor + 2.0 * lora[f"{module}.lora_B.weight"] @ lora[f"{module}.lora_A.weight"]
        assert (merged[name] - tensor).abs().max() < 1e-5, name
    assert len(changed) == 21


OLD_CHOICES = {
    "leaves": ["q_proj", "v_proj"],
    "regex-without-the-tower": r"^(?!.*visual).*(?:q_proj|v_proj)$",
    "regex-from-the-root": r"^model\.(?!.*(lm_head|embed)).*(q_proj|v_proj)$",
    "full-names": [f"model.layers.{i}.self_attn.{p}_proj" for i in range(3) for p in "qv"],
}


@pytest.mark.parametrize("choice", OLD_CHOICES)
def test_an_old_choice_of_modules_means_what_it_meant(masters, tmp_path, choice):
    out = adapters(
        masters["released"],
        tmp_path / "lora",
        old,
        {"target_modules": OLD_CHOICES[choice]},
        target_modules=r".*language_model.*\.(q|v)_proj",
    )
    assert closeness(out) < 1e-4


@pytest.mark.parametrize("root", ["^model", "^visual"])
def test_an_old_root_keeps_to_its_half_of_the_model(masters, tmp_path, root):
    mine = r"model\.language_model.*(gate|up)_proj" if root == "^model" else r"model\.visual.*(gate|up)_proj"
    torch.manual_seed(1)
    base, other = (LocalModel.load(str(masters["released"]), device="cpu").host.model for _ in range(2))
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=mine, init_lora_weights=False))
    model.save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    file = tmp_path / "lora" / "adapter_model.safetensors"
    save_file({old(n): t for n, t in load_file(file).items()}, file)
    config(
        tmp_path / "lora" / "adapter_config.json",
        base_model_name_or_path=str(masters["released"]),
        target_modules=rf"{root}\..*(gate|up)_proj",
    )
    merged, state, want = (
        LocalModel.load(str(tmp_path / "lora"), device="cpu").host.model.state_dict(),
        other.state_dict(),
        model.merge_and_unload().state_dict(),
    )
    assert all(torch.equal(merged[n], want[n]) for n in want)
    assert {n for n in state if not torch.equal(merged[n], state[n])} == {n for n in state if re.fullmatch(mine + r"\.weight", n)}


@pytest.mark.parametrize("names", ["today", "before-4.52"])
@pytest.mark.parametrize(
    "chosen",
    [
        {"rank_pattern": {Q.format(1): 2}, "alpha_pattern": {Q.format(0): 32, "down_proj": 3}},
        {"use_rslora": True},
        {"use_dora": True},
        {
            "layers_to_transform": [0, 2],
            "target_modules": ["q_proj", "o_proj"],
            "layers_pattern": "layers",
            "exclude_modules": r".*visual.*",
        },
        {"bias": "lora_only"},
        {"modules_to_save": ["norm"]},
        {"target_modules": r".*(language_model.*q_proj|visual.*(qkv|down_proj))"},
    ],
    ids=lambda chosen: next(iter(chosen)),
)
def test_what_a_lora_config_may_ask_for_is_done(masters, tmp_path, names, chosen):
    said = {}
    if names == "before-4.52":
        said = {f: {old(k): v for k, v in chosen[f].items()} for f in ("rank_pattern", "alpha_pattern") if f in chosen}
        said |= (
            {"target_modules": r"(model.*q_proj|visual.*(qkv|down_proj))"}
            if "visual" in str(chosen.get("target_modules"))
            else {}
        )
        said = said or {"target_modules": chosen.get("target_modules", r"model\..*\.(q|k|v|o|gate|up|down)_proj")}
        if "rank_pattern" in said:
            said["target_modules"] = r"model\..*\.(q|k|v|o|gate|up|down)_proj"
    assert closeness(adapters(masters["released"], tmp_path / "lora", NAMES[names], said, **chosen)) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_adapters_of_another_dtype_are_merged(masters, tmp_path, dtype):
    out = adapters(masters["released"], tmp_path / "lora", old, dtype=dtype)
    assert closeness(out) < (1e-4 if dtype == torch.float32 else 0.05)
    assert {p.dtype for p in LocalModel.load(str(out), device="cpu", dtype="bfloat16").host.model.parameters()} == {
        torch.bfloat16
    }


TIED = {
    "lora-on-the-head": {"target_modules": ["lm_head", "q_proj"], "exclude_modules": r".*visual.*"},
    "lora-on-the-table": {"target_modules": ["embed_tokens", "q_proj"]},
    "lora-on-both": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "dora-on-the-head": {"target_modules": ["lm_head"], "use_dora": True},
    "table-saved": {"modules_to_save": ["embed_tokens"]},
    "head-saved": {"modules_to_save": ["lm_head"]},
    "both-saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "table-saved-for-both": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "lora-on-the-table-for-both": {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    "lora-on-the-head-for-both": {"target_modules": ["lm_head", "q_proj"], "ensure_weight_tying": True},
    "tokens": {"trainable_token_indices": [5, 9]},
}


@pytest.mark.parametrize("chosen", TIED)
@pytest.mark.parametrize("names", TODAY_AND_SLOWLY_OLD)
def test_adapters_on_tied_embeddings_say_what_they_said_in_training(masters, tmp_path, names, chosen):
    out = adapters(masters["released"], tmp_path / "lora", NAMES[names], **TIED[chosen])
    model = LocalModel.load(str(out), device="cpu").host.model
    assert closeness(out, model) < 1e-4
    same = torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)
    assert same == (model.lm_head.weight is model.get_input_embeddings().weight) == model.config.tie_word_embeddings
    assert same == (chosen.endswith("for-both") or chosen == "tokens")
    model.save_pretrained(tmp_path / "again")  # and the copy is the same model, tied or not
    tiny_vlm().host.processor.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(LocalModel.load(str(tmp_path / "again"), device="cpu").host.model), logits(model))


@pytest.mark.parametrize("chosen", ["lora-on-the-head", "lora-on-the-table", "head-saved", "both-saved"])
def test_adapters_on_embeddings_that_are_not_tied(masters, tmp_path, chosen):
    assert closeness(adapters(masters["untied"], tmp_path / "lora", **TIED[chosen])) < 1e-4


def spoil(folder: Path, change) -> None:
    state = load_file(folder / "adapter_model.safetensors")
    change(state)
    save_file(state, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("names", TODAY_AND_SLOWLY_OLD)
def test_adapters_with_too_little_too_much_or_another_shape_are_refused(masters, tmp_path, names):
    whole = adapters(masters["released"], tmp_path / "lora", NAMES[names])
    of = lambda: shutil.copytree(whole, tmp_path / "spoilt", dirs_exist_ok=True)  # noqa: E731
    spoil(of(), lambda s: [s.pop(n) for n in list(s) if "layers.1.self_attn.q_proj" in n])
    refused(tmp_path / "spoilt", "2 tensors of the adapters", "are missing", "layers.1.self_attn.q_proj.lora_A")
    spoil(of(), lambda s: s.update({n.replace("layers.0", "layers.9"): t.clone() for n, t in s.items()}))
    refused(tmp_path / "spoilt", "belong to no part of the base", "layers.9", "more")
    spoil(of(), lambda s: s.update({n.replace("layers.", "blocks."): s.pop(n) for n in list(s)}))
    refused(tmp_path / "spoilt", "are missing", "and 39 more")
    spoil(of(), lambda s: s.update({n: t[:, :5].contiguous() for n, t in s.items() if "lora_A" in n}))
    refused(tmp_path / "spoilt", "do not fit their base", "size mismatch")
    spoil(of(), lambda s: next(iter(s.values())).view(-1)[:1].fill_(float("nan")))
    refused(tmp_path / "spoilt", "hold NaN or infinity")
    spoil(of(), lambda s: s.clear() or s.update({"x": torch.ones(1)}))
    refused(tmp_path / "spoilt", "are missing")
    config(of() / "adapter_config.json", target_modules=["q_proj"])
    refused(tmp_path / "spoilt", "belong to no part of the base")
    config(of() / "adapter_config.json", target_modules=["nothing"])
    refused(tmp_path / "spoilt", "do not fit their base")
    config(of() / "adapter_config.json", peft_type="IA3")
    refused(tmp_path / "spoilt", "this release merges LoRA")


def test_adapters_that_overflow_float16_are_refused(masters, tmp_path):
    out = adapters(masters["released"], tmp_path / "lora", scale=300.0)
    assert LocalModel.load(str(out), device="cpu")
    refused(out, "do not fit their base", dtype="float16")


def test_adapter_folders_cut_in_two_are_refused(masters, tmp_path):
    whole = adapters(masters["released"], tmp_path / "lora")
    shutil.copy(masters["released"] / "model.safetensors", whole)
    refused(whole, "holds adapters and the weights of a whole model", "one of the two")
    (whole / "adapter_model.safetensors").unlink()
    refused(whole, "no adapter_model.safetensors", "remove adapter_config.json")
    (whole / "model.safetensors").unlink()
    refused(whole, "no adapter_model.safetensors", "copy it there")
    (whole / "adapter_config.json").write_text("{")
    refused(whole, "adapter_config.json", "cannot be read as JSON")


def test_the_base_of_adapters_is_looked_for_and_its_absence_told(masters, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    shutil.copytree(masters["released"], tmp_path / "base")
    out = adapters(tmp_path / "base", tmp_path / "runs" / "lora")
    expected = torch.load(out / "expected.pt")
    says = lambda base: config(out / "adapter_config.json", base_model_name_or_path=base)  # noqa: E731
    monkeypatch.chdir(tmp_path / "base")  # where nothing else has that name two folders up
    says("../../base")  # from the adapters
    assert (logits(LocalModel.load(str(out), device="cpu").host.model) - expected).abs().max() < 1e-3
    monkeypatch.chdir(tmp_path)
    says("base")  # from here
    assert (logits(LocalModel.load("runs/lora", device="cpu").host.model) - expected).abs().max() < 1e-3
    assert Endpoint("http://localhost:1/v1", "m", "runs/lora").tokenizer
    shutil.copytree(masters["today"], out / "base")
    refused(out, "is found twice", "write the whole path")
    says(str(tmp_path / "gone"))
    refused(out, "name the base", "gone", "set base_model_name_or_path")
    says("nobody/nothing")
    refused(out, "the base of the adapters", "no folder 'nobody/nothing' is here")
    for nothing in (None, ""):
        says(nothing)
        refused(out, "name no base", "set base_model_name_or_path")
    says(str(out))
    refused(out, "are their own base")
    weights(tmp_path / "base", lambda s: s.pop("model.norm.weight"))
    says(str(tmp_path / "base"))
    refused(out, "the base of the adapters", "model.language_model.norm.weight")


def test_adapters_on_adapters_are_merged_one_after_the_other(masters, tmp_path):
    first = adapters(masters["released"], tmp_path / "first", old)
    second = adapters(first, tmp_path / "second", target_modules=["q_proj"])
    assert closeness(second) < 1e-4


def test_adapters_for_a_quantised_base_are_refused(masters, tmp_path):
    out, model = adapters(masters["released"], tmp_path / "lora"), tiny_copy().host.model
    model.config.quantization_config = {"quant_method": "awq", "bits": 4}
    with pytest.raises(CheckpointError, match=r"quantised \(awq\).*name the base that was not quantised"):
        merge_adapters(model, out)


def test_a_processor_that_adapters_bring_is_used_and_a_tokenizer_alone_must_be_the_bases(masters, tmp_path):
    out = adapters(masters["released"], tmp_path / "lora")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(masters["released"] / name, out)
    assert LocalModel.load(str(out), device="cpu")
    processor = copy.deepcopy(tiny_vlm().host.processor)
    processor.tokenizer.add_tokens(["<more>"])
    processor.tokenizer.save_pretrained(out)
    refused(out, "bring a tokenizer or chat template that is not their base's", "copy the base's preprocessor_config.json")
    processor.save_pretrained(out)
    assert "<more>" in LocalModel.load(str(out), device="cpu").tokenizer.get_vocab()
    assert "<more>" in Endpoint("http://localhost:1/v1", "m", str(out)).tokenizer.get_vocab()


@pytest.mark.parametrize("name", ["nano-sft", "nano-cropvlm", "nano-visionthink"])
def test_shipped_adapters_are_merged_as_peft_does(name):
    from peft import PeftModel

    model = LocalModel.load(resolve(name), device="cpu").host.model.state_dict()
    theirs = PeftModel.from_pretrained(
        LocalModel.load(resolve("nano-base"), device="cpu").host.model, resolve(name)
    ).merge_and_unload()
    assert all(torch.equal(model[n], t) for n, t in theirs.state_dict().items())
