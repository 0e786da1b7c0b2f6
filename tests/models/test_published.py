"""The published shapes against published totals, and what they are for: no network."""

import socket

import pytest
import torch
from transformers import AutoModelForImageTextToText

from tinyspeed import UserError, recipe
from tinyspeed.bench.estimate import estimate
from tinyspeed.models import loading
from tinyspeed.models.families import FAMILIES
from tinyspeed.models.published import KNOWN

# Of LLaVA-1.5's first release, which had 32,000 words; 64 more words have a row each in embeddings and head.
SMALL, LARGE = 7_062_902_784 + 2 * 64 * 4096, 13_350_839_296 + 2 * 64 * 5120
TOTALS = {
    "llava-hf/llava-1.5-7b-hf": SMALL,
    "llava-hf/llava-1.5-13b-hf": LARGE,
    "llava-hf/llava-v1.6-vicuna-7b-hf": SMALL + 4096,  # the newline
    "llava-hf/llava-v1.6-vicuna-13b-hf": LARGE + 5120,
    "llava-hf/llava-v1.6-mistral-7b-hf": 7_566_747_648,
}


@pytest.mark.parametrize("path", KNOWN)
def test_parameters_are_those_on_the_hub(path):
    config = KNOWN[path]()
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == TOTALS[path]
    assert config.model_type == ("llava_next" if "v1.6" in path else "llava")
    assert config.model_type in FAMILIES


@pytest.mark.parametrize("path", KNOWN)
def test_what_parameters_do_not_tell(path):
    config = KNOWN[path]()
    text, vision = config.text_config, config.vision_config
    assert (config.image_token_id, text.vocab_size, text.rms_norm_eps) == (32000, 32064, 1e-5)
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-2, "default")
    assert (text.max_position_embeddings, text.rope_parameters["rope_theta"]) == (
        (32768, 1e6) if "mistral" in path else (4096, 1e4)
    )
    assert (vision.image_size, vision.patch_size, vision.num_attention_heads) == (336, 14, 16)
    assert (vision.hidden_act, config.projector_hidden_act) == ("quick_gelu", "gelu")
    assert text.hidden_size // text.num_attention_heads == 128
    if "v1.6" in path:
        assert sorted(config.image_grid_pinpoints) == [[336, 672], [336, 1008], [672, 336], [672, 672], [1008, 336]]
    else:
        assert (config.image_seq_length, config.pad_token_id) == (576, 32001)


def test_every_known_model_is_estimated_without_a_network(monkeypatch, tmp_path):
    asked = []

    def offline(host, *_, **__):
        asked.append(host)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", offline)
    for path in KNOWN:
        made = recipe.read("llava-1.5-7b-qlora-12gb", [f"model.path={path}", f"data.file={tmp_path / 'x.json'}"])
        shape = estimate(made, 24).case.shape
        assert sum(shape.parameters.values()) == TOTALS[path]
    assert not asked


def test_a_model_that_is_here_speaks_for_itself(tmp_path, monkeypatch):
    """Its own configuration counts, whatever this project remembers: downloaded, or in a folder of that name."""
    path, mine = "llava-hf/llava-1.5-7b-hf", KNOWN["llava-hf/llava-1.5-7b-hf"]()
    mine.text_config.num_hidden_layers = 3
    mine.save_pretrained(tmp_path / "downloaded")
    with monkeypatch.context() as patch:
        patch.setattr(loading, "try_to_load_from_cache", lambda *_: str(tmp_path / "downloaded" / "config.json"))
        patch.setattr(loading.hub, "get_hf_file_metadata", lambda *_, **__: None)
        patch.setattr(loading.AutoConfig, "from_pretrained", lambda where, **_: mine)
        assert loading.load_config(path).text_config.num_hidden_layers == 3
    mine.save_pretrained(tmp_path / path)
    monkeypatch.chdir(tmp_path)
    assert loading.load_config(path).text_config.num_hidden_layers == 3


def test_another_model_is_looked_for(monkeypatch):
    def offline(path, **_):
        raise OSError("no network")

    monkeypatch.setattr(loading.hub, "get_hf_file_metadata", lambda *_, **__: None)
    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", offline)
    with pytest.raises(UserError, match="somebody/else: no network"):
        loading.load_config("somebody/else")
