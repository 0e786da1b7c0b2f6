"""4 bits, adapters, parts, hub ids: what should change does, what should not does not, and damage on disk is named."""

import gc
import json
import os
import re
import shutil
import socket
import sys
import weakref
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import hostile, tiny
from support.trained import learned, saved, train_a_little
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionModel,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
)

from tinyspeed import DualSpeed, UserError
from tinyspeed.models import assembling, export, families, loading, lora, precision, published, stages
from tinyspeed.scheduler import Plan

KINDS = ("fp32", "bf16", "fp16")


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def base(request, tmp_path_factory):
    return str(tiny.checkpoint(request.param, tmp_path_factory.mktemp("base") / request.param))


def kind(base: str) -> str:
    return json.loads(open(f"{base}/config.json").read())["model_type"]


# 4 bits


@pytest.mark.parametrize("name", KINDS)
def test_only_the_llms_linear_layers_are_in_4_bits(base, name):
    model = loading.load_model(base, name, quantise="nf4")
    quantised = {n for n, m in model.named_modules() if isinstance(m, Linear4bit)}
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert quantised == {n for n in linear if "language_model.layers" in n}
    assert len(quantised) == 7 * 3
    for n, module in model.named_modules():
        if n in quantised:
            state = module.weight.quant_state
            assert (state.quant_type, state.nested) == ("nf4", True)
            assert module.compute_dtype == precision.DTYPES[name]
    others = [p for n, p in model.named_parameters() if n.rpartition(".")[0] not in quantised]
    assert {p.dtype for p in others} == {precision.DTYPES[name]}, "frozen parts are never upcast"


def test_a_skip_list_that_does_nothing_is_noticed(base, monkeypatch):
    wrong = ["vision_tower", "multi_modal_projector", "lm_head"]
    monkeypatch.setattr(families.Family, "unquantised", classmethod(lambda cls: wrong))
    with pytest.raises(UserError, match=r"did the wrong thing to model\.(vision_tower|multi_modal_projector)"):
        loading.load_model(base, quantise="nf4")


def test_4_bit_weights_are_near_the_real_ones_and_no_forward_changes_them(tmp_path):
    shape = tiny.config("llava")  # as wide as a block of 64, which real models are many times over
    shape.text_config.update({"hidden_size": 64, "intermediate_size": 128})
    LlavaForConditionalGeneration(shape).save_pretrained(tmp_path)
    base = str(tmp_path)
    plain, four = loading.load_model(base), loading.load_model(base, quantise="nf4")
    layer = "model.language_model.layers.1.mlp.down_proj"
    packed = four.get_submodule(layer).weight
    before = packed.data.clone()
    x = torch.randn(200, packed.quant_state.shape[1])
    with torch.no_grad():
        near, far = four.get_submodule(layer)(x), plain.get_submodule(layer)(x)
    assert 0.05 < ((near - far).norm() / far.norm()) < 0.12
    # Some CPUs re-pack the weight in eval mode without gradients, which rounds its scales for good.
    with torch.no_grad():
        four.eval()(**{k: v for k, v in tiny.batch("llava").items() if k != "labels"})
    assert torch.equal(packed.data, before)
    assert packed.quant_state.nested


@pytest.mark.parametrize("name", KINDS)
def test_training_in_4_bits_reaches_adapters_projector_and_isolator_and_nothing_else(base, name):
    net = lora.add_lora(loading.load_model(base, name, quantise="nf4"), rank=4, dropout=0.1)
    model = DualSpeed(net, keep=0.3).train()
    stages.set_trainable(net, "train")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for plan in (Plan("fast", keep=0.3), Plan("slow", keep=0.3, distill=1.0)):
        with precision.autocast(name, torch.device("cpu")):
            loss = model(**tiny.batch(kind(base)), plan=plan).loss
        loss.backward()
    gradients = {n for n, p in model.named_parameters() if p.grad is not None}
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p.detach(), before[n])}
    wanted = {n for n in before if re.search(r"language_model.*lora_|multi_modal_projector|isolator", n)}
    assert gradients == wanted
    assert moved <= wanted
    assert moved >= {n for n in wanted if "lora_A" not in n}, "B starts at zero, so A has no gradient yet"
    assert {p.dtype for n, p in model.named_parameters() if n in wanted} == {torch.float32}
    assert not any("lora" in n for n in before if "vision_tower" in n or "projector" in n)


# Adapters


def test_adapters_sit_on_the_llms_linear_layers_alone(base):
    net = lora.add_lora(loading.load_model(base), rank=4)
    adapted = {n for n, m in net.get_base_model().named_modules() if hasattr(m, "lora_A")}
    assert len(adapted) == 7 * 3
    assert all(n.startswith("model.language_model.layers.") for n in adapted)


def test_new_adapters_change_nothing_and_are_drawn_by_seed(base):
    batch = tiny.batch(kind(base))
    plain = loading.load_model(base).eval()
    state = torch.get_rng_state()
    one, same, other = (lora.add_lora(loading.load_model(base), rank=4, seed=seed).eval() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state), "nobody else's random numbers are shifted"
    assert torch.equal(one(**batch).logits, plain(**batch).logits)
    a, b, c = ({n: p for n, p in net.named_parameters() if "lora_A" in n} for net in (one, same, other))
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not any(torch.equal(a[n], c[n]) for n in a)
    assert one.peft_config["default"].lora_alpha == 8, "twice the rank, where nothing is said"


# Merging


def test_a_model_trained_in_full_is_written_as_its_base_was(base, tmp_path):
    net = train_a_little(loading.load_model(base))
    export.merge(saved(net), 1.0, base, tmp_path / "out")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    ours = merged.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in net.state_dict().items())
    before, after = (load_file(f"{folder}/model.safetensors") for folder in (base, tmp_path / "out"))
    assert {n for n in before if torch.equal(before[n], after[n])} == {n for n in before if "vision_tower" in n}


def test_a_merged_model_is_the_trained_model(base, tmp_path):
    net = train_a_little(lora.add_lora(loading.load_model(base), rank=4))
    export.merge(saved(net), 2.0, base, tmp_path / "out")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    batch = tiny.batch(kind(base))
    assert not tiny.difference(merged(**batch).logits, net(**batch).logits)
    before, after = load_file(f"{base}/model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed == {n for n in before if re.search(r"language_model.*layers.*_proj|multi_modal_projector", n)}
    theirs = net.merge_and_unload().state_dict()  # peft's own arithmetic
    ours = merged.state_dict()
    assert not tiny.difference(ours, {n: theirs[n] for n in ours})


def test_merging_after_4_bits_adds_to_the_weights_that_were_never_rounded(base, tmp_path):
    four = train_a_little(lora.add_lora(loading.load_model(base, quantise="nf4"), rank=4))
    export.merge(saved(four), 2.0, base, tmp_path / "out")
    whole = lora.add_lora(loading.load_model(base), rank=4)
    stages.set_trainable(whole, "train")
    assert learned(four)
    unexpected = whole.load_state_dict(learned(four), strict=False).unexpected_keys
    assert not unexpected
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    batch = tiny.batch(kind(base))
    assert not tiny.difference(merged(**batch).logits, whole.eval()(**batch).logits)


def test_a_base_in_several_files_and_in_half_precision_keeps_its_layout(base, tmp_path, monkeypatch):
    held, original = [], export.save_file

    def watched(tensors, *rest, **how):
        gc.collect()
        assert not any(tensor() is not None for tensor in held), "files before this one are still in memory"
        held.extend(map(weakref.ref, tensors.values()))
        original(tensors, *rest, **how)

    monkeypatch.setattr(export, "save_file", watched)
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base", max_shard_size="40KB")
    files = sorted(p.name for p in (tmp_path / "base").glob("*.safetensors"))
    assert len(files) > 2
    net = train_a_little(lora.add_lora(loading.load_model(str(tmp_path / "base"), "bf16"), rank=4))
    export.merge(saved(net), 2.0, str(tmp_path / "base"), tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").glob("*.safetensors")) == files
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert held
    theirs = net.merge_and_unload()
    for (name, ours), other in zip(merged.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours.float(), other.float(), rtol=0.01, atol=0.01, msg=name)


def test_another_base_than_the_trained_one_is_refused(base, tmp_path):
    net = train_a_little(lora.add_lora(loading.load_model(base), rank=4))
    small = tiny.model(kind(base), layers=2)
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(UserError, match="not the model that was trained"):
        export.merge(saved(net), 2.0, str(tmp_path / "small"), tmp_path / "out")


def test_an_export_that_would_not_be_finite_is_refused(base, tmp_path):
    """Of fp16, what is too large for it; and what the base has so."""
    net = train_a_little(lora.add_lora(loading.load_model(base), rank=4))
    tensors = saved(net)
    name = next(n for n in tensors if "projector" in n and n.endswith("weight"))
    tensors[name] = tensors[name].clone().fill_(1e6)
    AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float16).save_pretrained(tmp_path / "half")
    with pytest.raises(UserError, match=r"nothing was exported.*projector.*\(.*inf\).*too large for torch.float16"):
        export.merge(tensors, 2.0, str(tmp_path / "half"), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))
    export.merge(tensors, 2.0, base, tmp_path / "whole")
    broken = load_file(f"{base}/model.safetensors")
    next(t for n, t in broken.items() if "vision_tower" in n).view(-1)[3] = float("nan")
    shutil.copytree(base, tmp_path / "broken")
    save_file(broken, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"nothing was exported.*vision_tower.*nan.*broken has it so"):
        export.merge(tensors, 2.0, str(tmp_path / "broken"), tmp_path / "other")


def test_an_adapter_alone_carries_the_projector_too(base, tmp_path):
    net = train_a_little(lora.add_lora(loading.load_model(base), rank=4))
    export.save_adapter(saved(net), lora.lora_config(4), base, tmp_path / "adapter")
    again = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), tmp_path / "adapter").eval()
    batch = tiny.batch(kind(base))
    assert torch.equal(again(**batch).logits, net(**batch).logits)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 200_000


# From parts


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return tiny.parts(tmp_path_factory.mktemp("parts"))


def test_parts_become_a_llava_that_transformers_loads_and_that_keeps_every_weight(parts, tmp_path):
    tower, llm = parts
    folder = assembling.assemble(tower, llm, tmp_path / "base", seed=1)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    text = LlamaForCausalLM.from_pretrained(llm)
    vision = CLIPVisionModel.from_pretrained(tower, dtype=torch.bfloat16)
    for ours, theirs in ((model.model.language_model, text.model), (model.model.vision_tower, vision)):
        theirs = theirs.state_dict()
        for name, tensor in ours.state_dict().items():
            wanted = theirs[name]
            assert torch.equal(tensor[: len(wanted)] if "embed_tokens" in name else tensor, wanted), name
    weights = [m.weight for m in model.model.multi_modal_projector.modules() if isinstance(m, nn.Linear)]
    assert all(w.float().std() > 0.01 for w in weights)
    processor = AutoProcessor.from_pretrained(folder)
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_id
    assert model.config.image_token_id < model.get_input_embeddings().num_embeddings
    same, other = (assembling.assemble(tower, llm, tmp_path / f"{seed}", seed=seed) for seed in (1, 2))
    read = lambda path: load_file(path / "model.safetensors")["multi_modal_projector.linear_1.weight"]
    assert torch.equal(read(folder), read(same))
    assert not torch.equal(read(folder), read(other))


def test_a_new_word_starts_as_the_average_word(parts, tmp_path):
    tower, llm = parts
    text = LlamaForCausalLM.from_pretrained(llm, dtype=torch.float32)
    kept = text.model.embed_tokens.weight[:200].clone()
    text.resize_token_embeddings(200)
    text.config.vocab_size = 200
    text.save_pretrained(tmp_path / "few")
    tiny.tokenizer().save_pretrained(tmp_path / "few")
    folder = assembling.assemble(tower, str(tmp_path / "few"), tmp_path / "base", seed=1)
    table = AutoModelForImageTextToText.from_pretrained(folder).get_input_embeddings().weight
    assert len(table) == 320, "260 words, and a round number"
    assert torch.equal(table[:200], kept)
    torch.testing.assert_close(table[200:], kept.mean(0).expand(120, -1))


def test_other_parts_than_the_folder_was_made_of_are_refused(parts, tmp_path):
    folder = assembling.assemble(*parts, tmp_path / "base", seed=1)
    assert assembling.assemble(*parts, folder, seed=1) == folder
    with pytest.raises(UserError, match="was not built with"):
        assembling.assemble(*parts, folder, seed=2)
    with pytest.raises(UserError, match="cannot load"):
        assembling.assemble(str(tmp_path / "absent"), parts[1], tmp_path / "other", seed=1)
    assert not (tmp_path / "other").exists()


def test_an_llm_whose_tokenizer_is_a_sentencepiece_file(parts, tmp_path, monkeypatch):
    """As Vicuna's on the hub is."""
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    tower, llm = parts[0], tmp_path / "llm"
    LlamaForCausalLM.from_pretrained(parts[1]).save_pretrained(llm)
    words = iter(f"what is in picture {i} a cat or {i * 7} dogs" for i in range(500))
    how = {"vocab_size": 100, "model_type": "bpe", "unk_id": 0, "bos_id": 1, "eos_id": 2, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=words, model_prefix=str(llm / "tokenizer"), **how)
    named = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    named["add_bos_token"] = True
    (llm / "tokenizer_config.json").write_text(json.dumps(named))

    with monkeypatch.context() as without:
        without.setitem(sys.modules, "sentencepiece", None)
        with pytest.raises(UserError, match="SentencePiece file: pip install"):
            assembling.assemble(tower, str(llm), tmp_path / "base", seed=1)
    folder = assembling.assemble(tower, str(llm), tmp_path / "base", seed=1)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(llm / "tokenizer.model"))
    text = "what is a cat or 7 dogs"
    assert loading.load_processor(str(folder)).tokenizer(text)["input_ids"] == [1, *pieces.encode(text)]


def test_pickled_parts_are_not_opened(parts, tmp_path):
    llm = tmp_path / "llm"
    shutil.copytree(parts[1], llm)
    torch.save(load_file(llm / "model.safetensors"), llm / "pytorch_model.bin")
    (llm / "model.safetensors").unlink()
    with pytest.raises(UserError, match="Only safetensors are read"):
        assembling.assemble(parts[0], str(llm), tmp_path / "base", seed=1)


# What the disk holds


def test_missing_weights_are_not_drawn_at_random_in_silence(base, tmp_path):
    folder = tiny.checkpoint(kind(base), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["language_model.model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 of the model's weights \(.*layers\.1\.mlp\.up_proj"):
        loading.load_model(str(folder))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("patch_size", None), ("num_additional_image_tokens", 0), ("vision_feature_select_strategy", None)],
)
def test_a_processor_that_would_count_placeholders_wrong_is_put_right(base, tmp_path, capsys, name, wrong):
    folder = tiny.checkpoint(kind(base), tmp_path / "model")
    file = folder / "processor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), name: wrong}))
    assert getattr(loading.load_processor(str(folder)), name) == getattr(tiny.processor(kind(base)), name)
    assert f"the processor's {name} is {wrong}" in capsys.readouterr().err


@pytest.mark.parametrize("quantise", ["none", "nf4"])
def test_weights_of_another_shape_are_refused(base, tmp_path, quantise):
    folder = tiny.checkpoint(kind(base), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name][:, :16].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError):
        loading.load_model(str(folder), quantise=quantise)


def broken(base, tmp_path, file, change):
    """A copy of the model in which one JSON file is another."""
    folder = tmp_path / "broken"
    shutil.copytree(base, folder)
    told = json.loads((folder / file).read_text())
    change(told)
    (folder / file).write_text(json.dumps(told))
    return str(folder)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", lambda told: told["text_config"].update(hidden_size=[16])),
        ("config.json", lambda told: told.update(text_config="llava")),
        ("config.json", lambda told: told.update(model_type=["llava"])),
        ("config.json", lambda told: told.update(image_token_index=7, image_token_id=7)),
        ("config.json", lambda told: told["text_config"].update(vocab_size=100)),
        ("tokenizer.json", lambda told: told["model"]["vocab"].update(a="x")),
        ("tokenizer.json", lambda told: told["added_tokens"][0].update(id=[0])),
        ("tokenizer_config.json", lambda told: told.update(pad_token={"a": 1})),
        ("processor_config.json", lambda told: told.update(image_processor=True)),
        ("processor_config.json", lambda told: told["image_processor"]["crop_size"].update(width=3)),
        ("processor_config.json", lambda told: told["image_processor"].update(image_std=[0, 0, 0])),
    ],
)
def test_a_folder_with_anything_wrong_in_it_is_refused_by_its_name(base, tmp_path, file, change):
    folder = broken(base, tmp_path, file, change)
    with pytest.raises(UserError, match=re.escape(folder)):
        loading.load_processor(folder), loading.load_model(folder)


@pytest.mark.parametrize("end", [None, "", "<image>"])
def test_a_tokenizer_without_an_end_token_is_refused(base, tmp_path, end):
    """The empty text is everywhere, so every answer would already have its end, and no model would learn to stop."""
    folder = broken(base, tmp_path, "tokenizer_config.json", lambda told: told.update(eos_token=end))
    with pytest.raises(UserError, match=rf"^{re.escape(folder)} .*: its tokenizer has no end token \(eos_token\)"):
        loading.load_processor(folder)


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
@pytest.mark.parametrize("layers", [4, 10**6, 10**30])
def test_more_layers_than_there_are_weights_for_are_refused_before_they_are_built(
    base, tmp_path, monkeypatch, part, layers
):
    folder = broken(base, tmp_path, "config.json", lambda told: told[part].update(num_hidden_layers=layers))
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", lambda *_, **__: pytest.fail("it was built"))
    said = rf"broken/config\.json has num_hidden_layers = {layers:,}, and there are weights of 3 layers: copy it again"
    with pytest.raises(UserError, match=said):
        loading.load_model(folder)


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/secret.safetensors", "a/b.safetensors", "pytorch_model.bin", 7]
)
def test_an_index_that_leads_elsewhere_is_refused(base, tmp_path, name):
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    shutil.copyfile(folder / "model.safetensors", tmp_path / "secret.safetensors")
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        where = dict.fromkeys(tensors.keys(), name)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    for use in (loading.load_model, lambda path: export.merge({}, 1.0, path, tmp_path / "out")):
        with pytest.raises(UserError, match="index"):
            use(str(folder))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_no_pipe_in_a_models_folder_is_waited_for(base, tmp_path):
    """Whichever file it stands for, also files that transformers would look for and that a model need not have."""
    uses = (
        loading.load_processor, loading.load_model, loading.load_config,
        lambda path: export.merge({}, 1.0, path, tmp_path / "out"),
        lambda path: loading.load_weights(LlamaForCausalLM, path),
    )  # fmt: skip
    more = {
        "generation_config.json",
        "added_tokens.json",
        "model.safetensors.index.json",
        "additional_chat_templates/a",
    }
    for name in sorted({path.name for path in Path(base).iterdir()} | more):
        folder = shutil.copytree(base, tmp_path / "model")
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        for use in uses:
            with pytest.raises(UserError, match=re.escape(str(folder))):
                use(str(folder))
        shutil.rmtree(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize("number", [0, 1])
def test_no_pipe_in_a_part_is_waited_for(parts, tmp_path, number):
    mine = [shutil.copytree(part, tmp_path / Path(part).name) for part in parts]
    pipe = mine[number] / ("preprocessor_config.json", "tokenizer.json")[number]
    pipe.unlink()
    os.mkfifo(pipe)
    with pytest.raises(UserError, match=f"{pipe} is a pipe or a device"):
        assembling.assemble(*map(str, mine), tmp_path / "base", seed=1)


@pytest.mark.parametrize("file", ["config.json", "processor_config.json", "tokenizer_config.json"])
def test_code_that_a_model_brings_is_neither_run_nor_asked_about(base, tmp_path, monkeypatch, file):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    kinds = ("AutoConfig", "AutoProcessor", "AutoTokenizer", "AutoImageProcessor", "AutoModelForImageTextToText")

    def change(told):
        told |= {"auto_map": dict.fromkeys(kinds, "evil.Evil"), "tokenizer_class": "Evil", "processor_class": "Evil"}

    folder = Path(broken(base, tmp_path, file, change))
    (folder / "evil.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    with suppress(UserError):
        loading.load_processor(str(folder))
        loading.load_model(str(folder))
    assert not (tmp_path / "ran").exists()


def test_a_pickle_is_never_opened(base, tmp_path):
    folder = tiny.checkpoint(kind(base), tmp_path / "model")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot load"):
        loading.load_model(str(folder))


def test_an_index_of_weights_that_names_a_pickle_is_refused(base, tmp_path):
    code = hostile.Code(tmp_path / "canary")
    folder = tiny.checkpoint(kind(base), tmp_path / "model")
    hostile.index_of_pickles(folder, code)
    with pytest.raises(UserError, match=r"names 'weights\.bin'. Only safetensors are read"):
        loading.load_model(str(folder))
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(UserError, match="is not an index of weights"):
        loading.load_model(str(folder))


@pytest.fixture
def willing(monkeypatch):
    """Somebody who says yes to whatever transformers asks; and what it asked."""
    asked = []
    monkeypatch.setattr("builtins.input", lambda text="": asked.append(text) or "y")
    return asked


OWN_CODE = (hostile.unknown_processor, hostile.unknown_tokenizer, hostile.unknown_image_processor, hostile.unknown_llm)


@pytest.mark.parametrize("plant", OWN_CODE, ids=lambda plant: plant.__name__)
def test_code_that_comes_with_a_model_is_not_run_and_nobody_is_asked(plant, base, tmp_path, willing):
    code = hostile.Code(tmp_path / "canary")
    folder = tiny.checkpoint(kind(base), tmp_path / "model")
    plant(folder, code)
    with suppress(UserError):
        loading.load_processor(str(folder))
    with suppress(UserError):
        loading.load_model(str(folder))
    assert not willing
    assert not code.canary.exists()


def test_code_that_comes_with_parts_is_not_run_either(parts, tmp_path, willing):
    code = hostile.Code(tmp_path / "canary")
    for plant in (hostile.unknown_model, hostile.unknown_tokenizer):
        llm = hostile.copy(parts[1], tmp_path / plant.__name__)
        plant(llm, code)
        with pytest.raises(UserError, match="code that comes with it, and such code is never run here"):
            assembling.assemble(parts[0], str(llm), tmp_path / "base", seed=1)
    assert not willing
    assert not code.canary.exists()


BOMBS = {
    "arithmetic": "{{ 9 ** (9 ** 9) }}",  # no signal handler and no other thread would get its turn
    "memory": "{{ 'a' * 5000000000 }}",
    "text": "{{ 'a' * 1000000 }}",
    "only with a system message": "{% if messages[0].role == 'system' %}{{ 'a' * 1000000 }}{% endif %}",
    "only with an answer": "{% if messages|length > 2 %}{{ 'a' * 1000000 }}{% endif %}",
}


@pytest.mark.parametrize("what", BOMBS)
def test_a_chat_template_that_would_never_end_is_refused(checkpoint, monkeypatch, what):
    monkeypatch.setattr(loading, "TEMPLATE_SECONDS", 1)
    folder = checkpoint("llava")
    (folder / "chat_template.jinja").write_text(tiny.CHAT_TEMPLATE + BOMBS[what])
    with pytest.raises(UserError, match=f"^{re.escape(str(folder))}: its chat template takes too long"):
        loading.load_processor(str(folder))


@pytest.mark.parametrize("code", ["{{ 1 / 0 }}", "{{ raise_exception('no') }}", "{% for %}"])
def test_a_chat_template_that_fails_is_an_error_of_what_it_is_used_for(checkpoint, code):
    folder = checkpoint("llava")
    (folder / "chat_template.jinja").write_text(code)
    assert loading.load_processor(str(folder)).chat_template == code


def test_of_several_chat_templates_the_default_is_used(checkpoint):
    folder = checkpoint("llava")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("no")
    assert loading.load_processor(str(folder)).chat_template == tiny.CHAT_TEMPLATE


def test_what_transformers_says_in_several_lines_is_said_in_one(checkpoint):
    folder = checkpoint("llava")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError) as caught:
        loading.load_processor(str(folder))
    said = str(caught.value)
    assert "\n" not in said
    assert "from one of: (1) a `tokenizers` library serialization file, (2)" in said
    assert said.endswith("to convert a slow tokenizer to a fast one.")


# Precision


def test_auto_is_fp32_on_a_cpu_and_names_stay_what_they_are():
    cpu = torch.device("cpu")
    assert precision.resolve("auto", cpu) == "fp32"
    assert [precision.resolve(name, cpu) for name in KINDS] == list(KINDS)


@pytest.mark.parametrize(("capability", "wanted"), [((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_auto_is_bf16_where_the_gpu_has_it(monkeypatch, capability, wanted):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    assert precision.resolve("auto", torch.device("cuda")) == wanted
    if wanted == "fp16":
        with pytest.raises(UserError, match="has no bf16"):
            precision.resolve("bf16", torch.device("cuda"))


@given(overflows=st.lists(st.booleans(), max_size=60))
def test_the_loss_scale_is_a_power_of_two_that_only_moves_on_overflow_or_after_long(overflows):
    scale = precision.LossScale.of("fp16")
    halved = 0
    for bad in overflows:
        if bad:
            before = scale.scale
            assert scale.overflowed() == (before > scale.SMALLEST)
            halved += scale.scale < before
        else:
            scale.stepped()
    assert scale.scale == 2.0 ** (16 - halved)
    for _ in range(scale.GROW_AFTER):
        scale.stepped()
    assert scale.scale == 2.0 ** (17 - halved)
    again = precision.LossScale()
    again.load_state_dict(scale.state_dict())
    assert again == scale


def test_other_precisions_do_not_forgive_an_overflow():
    for name in ("fp32", "bf16"):
        scale = precision.LossScale.of(name)
        assert not scale.overflowed()
        for _ in range(2 * scale.GROW_AFTER):
            scale.stepped()
        assert scale.scale == 1.0


# The hub


@pytest.fixture
def hub(monkeypatch):
    """`hub(error)` is what the hub does from now on; it returns a list of what it was asked, and how patiently."""
    monkeypatch.setattr(loading.hub.constants, "HF_HUB_OFFLINE", False)  # and as it was, afterwards
    loading._reach.cache_clear()

    def does(error=None) -> list:
        def answer(url, timeout):
            asked.append((url, timeout))
            if error is not None:
                raise error

        asked = []
        monkeypatch.setattr(loading.hub, "get_hf_file_metadata", answer)
        return asked

    yield does
    loading._reach.cache_clear()


def refusal(status: int) -> Exception:
    error = OSError(f"Client error '{status}'")
    error.response = SimpleNamespace(status_code=status)
    return error


def name_unknown(*_, **__):
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


@pytest.mark.parametrize(
    "use", [loading.load_config, loading.load_processor, loading.load_model], ids=lambda u: u.__name__
)
@pytest.mark.parametrize("path", ["no_such/model", "llava-hf/llava-1.5-7b-hf"])
def test_without_a_network_a_hub_id_is_refused_at_once(use, path, hub, monkeypatch):
    """A published model's configuration is known, and only then its processor is looked for: it is not to blame."""
    if path in published.KNOWN and use is loading.load_config:
        pytest.skip("this needs no network")
    monkeypatch.setattr(socket, "getaddrinfo", name_unknown)
    for error in (ConnectionError("[Errno -2] Name or service not known"), TimeoutError("timed out"), refusal(503)):
        asked = hub(error)
        said = f"no folder {path} is here, and the hub cannot be reached ({error}): give the folder of a model"
        with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
            use(path)
        (url, timeout), *more = asked
        assert url.startswith(f"https://huggingface.co/{path}/")
        assert timeout <= 10
        assert not more


def test_without_a_network_what_was_downloaded_is_used_and_the_hub_is_not_asked_again(hub, tmp_path, monkeypatch):
    tiny.checkpoint("llava", tmp_path / "model")
    monkeypatch.setattr(loading, "try_to_load_from_cache", lambda *_: str(tmp_path / "model" / "config.json"))
    original = loading.AutoConfig.from_pretrained

    def from_cache(path, **how):
        assert loading.hub.is_offline_mode(), "transformers would ask the hub for every file"
        return original(tmp_path / "model", **how)

    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", from_cache)
    asked = hub(ConnectionError("no network"))
    for _ in range(3):
        assert loading.load_config("somebody/model").model_type == "llava"
    assert len(asked) == 1


@pytest.mark.parametrize("answer", [None, refusal(404), refusal(401)], ids=str)
def test_what_the_hub_says_of_an_id_is_said_by_transformers(hub, monkeypatch, answer):
    def refuse(path, **_):
        raise OSError(f"{path} is not a local folder and is not a valid model identifier")

    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", refuse)
    hub(answer)
    with pytest.raises(UserError, match=r"no_such/model: no_such/model is not a local folder"):
        loading.load_config("no_such/model")
    assert not loading.hub.is_offline_mode()
