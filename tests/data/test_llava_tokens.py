"""LLaVA's ids and labels, of Llama's tokenizers of every kind. The oracle is LLaVA's own rules, read naively:

tokenizer_image_token    the prompt is split at <image>, and each chunk is tokenized alone, as a whole text
preprocess_plain         <image>caption\\n, and all behind <image> is learned
preprocess_v1            lengths of rounds and instructions, each tokenized alone, say what is learned
"""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import tiny
from tokenizers import normalizers
from transformers import LlamaTokenizer

from tinyspeed.data.chat import Chat, with_system
from tinyspeed.data.record_formats import IMAGE, Turn
from tinyspeed.models import assembling, loading
from tinyspeed.rows import IGNORE

SYSTEM = "A chat. It is kind."
MERGES = [("▁", "C"), ("a", "r"), ("▁C", "ar"), ("A", "S"), ("▁", "a"), ("i", "s"), ("▁", "▁"), (".", "▁")]
WORDS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127))]
WORDS += [left + right for left, right in MERGES]
IDS = {word: number for number, word in enumerate([*WORDS, "<image>", "<pad>"])}
# What transformers makes of "legacy" in tokenizer_config.json, and the tokenizer.json that its version 4 has written.
KINDS = {"legacy": True, "not legacy": False, "written by version 4": True}


def spell(text: str) -> list[str]:
    """Byte-pair encoding: the first of the best pairs is merged, again and again; unknown letters are bytes."""
    words = list(text)
    while pairs := [(MERGES.index(pair), i) for i, pair in enumerate(pairwise(words)) if pair in MERGES]:
        _, i = min(pairs)
        words[i : i + 2] = [words[i] + words[i + 1]]
    return [piece for word in words for piece in ([word] if word in IDS else [f"<0x{b:02X}>" for b in word.encode()])]


def slow(text: str, legacy: bool) -> list[str]:
    """Llama's own tokenizer: a text begins with "▁". If it is a legacy one, so does what follows a special token."""
    words = ["<s>"]
    for number, part in enumerate(text.split("</s>")):
        words += ["</s>"] * (number > 0)
        words += spell("▁" * (legacy or number == 0) + part.replace(" ", "▁")) if part else []
    return words


def tokenizer_image_token(prompt: str, legacy: bool) -> list[str]:
    words = ["<s>"]
    for number, chunk in enumerate(prompt.split("<image>")):
        words += ["<image>"] * (number > 0) + slow(chunk, legacy)[1:]
    return words


def preprocess_plain(caption: str, legacy: bool) -> tuple[list[str], list[bool]]:
    words = tokenizer_image_token(f"<image>{caption}\n", legacy)
    asked = len(tokenizer_image_token("<image>", legacy))
    return words, [number >= asked for number in range(len(words))]


def preprocess_v1(rounds: list[tuple[str, str]], legacy: bool) -> tuple[list[str], list[bool]]:
    prompt = SYSTEM + " " + "".join(f"USER: {asked} ASSISTANT: {said}</s>" for asked, said in rounds)
    words, at = tokenizer_image_token(prompt, legacy), 1
    learned = [True] * len(words)
    learned[0] = False
    for number, text in enumerate(prompt.split("</s>")[:-1]):
        instruction = text.split(" ASSISTANT: ")[0] + " ASSISTANT: "
        less = number > 0 and not legacy
        length = len(tokenizer_image_token(instruction, legacy)) - 2 - less
        learned[at : at + length] = [False] * length
        at += len(tokenizer_image_token(text, legacy)) - less
    assert at == len(words), "LLaVA's own check"
    return words, learned


@pytest.fixture(params=KINDS)
def legacy(request) -> bool:
    return KINDS[request.param]


@pytest.fixture
def processor(request, legacy, tmp_path):
    """A processor with this kind of tokenizer and this template, as it comes from its folder."""
    vocabulary = {word: IDS[word] for word in WORDS}
    tokenizer = LlamaTokenizer(vocabulary, MERGES, legacy=legacy, add_bos_token=True, pad_token="<pad>")
    if request.node.callspec.params["legacy"] == "written by version 4":
        begin = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(begin)
        tokenizer.backend_tokenizer.pre_tokenizer = None
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    made, config = tiny.processor("llava"), tiny.config("llava")
    made.tokenizer, made.chat_template = tokenizer, getattr(request, "param", assembling.TEMPLATE)
    config.text_config.vocab_size, config.image_token_id = len(tokenizer), tokenizer.convert_tokens_to_ids("<image>")
    config.save_pretrained(tmp_path)
    made.save_pretrained(tmp_path)
    return loading.load_processor(str(tmp_path))


said = st.text(st.sampled_from("Car  is AS.x4?!é猫\n'"), min_size=1, max_size=12).map(str.strip).filter(bool)


def same(talk: Chat, turns: list[Turn], wanted: tuple[list[str], list[bool]]) -> None:
    pictures = sum(part is IMAGE for turn in turns for part in turn.parts)
    ids, labels, _ = talk.encode(turns, ["<image>"] * pictures)
    assert talk.tokenizer.convert_ids_to_tokens(ids) == wanted[0]
    assert [bool(label != IGNORE) for label in labels] == wanted[1]
    assert (labels[labels != IGNORE] == ids[labels != IGNORE]).all()


def test_captions_have_llavas_tokens(processor, legacy):
    assert preprocess_plain("Car", legacy)[0] == ["<s>", "<image>", "▁Car", "<0x0A>"]

    @given(caption=said)
    def law(caption):
        turns = [Turn("user", (IMAGE,)), Turn("assistant", (caption,))]
        same(Chat(processor, "plain"), turns, preprocess_plain(caption, legacy))

    law()


@pytest.mark.parametrize("processor", [assembling.TEMPLATE, tiny.CHAT_TEMPLATE], ids=["parts", "hub"], indirect=True)
def test_conversations_have_llavas_tokens(processor, legacy):
    talk = Chat(with_system(processor, SYSTEM))

    @given(rounds=st.lists(st.tuples(said, said), min_size=1, max_size=3), pictures=st.integers(0, 2))
    def law(rounds, pictures):
        turns = [turn for asked, told in rounds for turn in (Turn("user", (asked,)), Turn("assistant", (told,)))]
        turns[0] = Turn("user", (*[IMAGE] * pictures, rounds[0][0]))
        (asked, told), *others = rounds
        same(talk, turns, preprocess_v1([("<image>\n" * pictures + asked, told), *others], legacy))

    law()


def test_a_processor_that_was_made_ready_and_saved_needs_nothing_more(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    assert loading.load_processor(str(tmp_path)).chat_template == processor.chat_template
