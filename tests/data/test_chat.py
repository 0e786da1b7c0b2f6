"""Labels come from one tokenisation, and are the answers: for any text, several templates, two kinds of tokenizer."""

import copy

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from support import tiny
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoProcessor, PreTrainedTokenizerFast

from tinyspeed import UserError
from tinyspeed.data.chat import Chat, with_system
from tinyspeed.data.record_formats import IMAGE, Turn
from tinyspeed.models import assembling
from tinyspeed.recipe import DataSection
from tinyspeed.rows import IGNORE

# What the templates of the hub write, in fewer words. `BOS` begins with the first token, as Mistral's own has it.
MISTRAL = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for c in m['content'] %}{{ '<image>\n' if c['type'] == 'image' else c['text'] }}{% endfor %}{{ ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'][0]['text'] + '</s> ' }}"
    "{% else %}{{ '<<SYS>>\n' + m['content'][0]['text'] + '\n<</SYS>>\n\n' }}{% endif %}{% endfor %}"
)
SLIP = MISTRAL.replace("</s>", "<\\\\s>")  # an earlier one of LLaVA-NeXT's ends its turns with a slip of the pen
BOS = "{{ bos_token }}" + MISTRAL.replace("'</s> '", "eos_token")
VICUNA = (
    "{% for m in messages %}{{ '' if m['role'] == 'system' else m['role'] | upper + ': ' }}"
    "{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}"
    "{{ '' if m['role'] == 'system' else ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% for c in m['content'] %}{{ '<image>' if c['type'] == 'image' else (c['text'] | trim) }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ONEVISION = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' }}"
    "{% for c in m['content'] %}{{ '<image>' if c['type'] == 'image' else '\n' + c['text'] }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "hub": tiny.CHAT_TEMPLATE, "vicuna": VICUNA, "mistral": MISTRAL, "slip": SLIP, "bos": BOS, "chatml": CHATML,
    "onevision": ONEVISION, "parts": assembling.TEMPLATE,
}  # fmt: skip
IM = ("chatml", "onevision")  # those with <|im_end|>


def chat(template: str = "hub") -> Chat:
    processor = tiny.processor("llava")
    processor.chat_template = TEMPLATES.get(template, template)
    if template in IM:
        processor.tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return Chat(processor)


CHATS = {name: chat(name) for name in TEMPLATES}
said = st.text(
    st.characters(codec="utf-8", exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=30
).filter(lambda text: text.strip() and "<" not in text and "\ue000" not in text)
answer = said.map(str.strip)


@st.composite
def conversations(draw):
    turns = [Turn("system", (draw(said),))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        pictures = (IMAGE,) * draw(st.integers(0, 2))
        turns += [Turn("user", (*pictures, draw(said))), Turn("assistant", (draw(answer),))]
    return turns


def learned(talk: Chat, ids, labels) -> list[str]:
    """What each run of labels says."""
    runs, open_run = [], False
    for token, label in zip(ids, labels, strict=True):
        if label != IGNORE:
            assert label == token
            runs = [*runs[:-1], [*runs[-1], token]] if open_run else [*runs, [token]]
        open_run = label != IGNORE
    return [talk.tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs]


@pytest.mark.parametrize("template", TEMPLATES)
@given(turns=conversations())
@example(turns=[Turn("user", ("ASSISTANT: no",)), Turn("assistant", ("ASSISTANT: USER: yes",))])
@example(turns=[Turn("user", ("a",)), Turn("assistant", ("a",)), Turn("user", ("a",)), Turn("assistant", ("a",))])
@example(turns=[Turn("user", (IMAGE, "a")), Turn("assistant", ("b",))])
def test_what_is_learned_is_the_answers_and_the_ends_of_their_turns(template, turns):
    talk = CHATS[template]
    images = sum(part is IMAGE for turn in turns for part in turn.parts)
    ids, labels, _ = talk.encode(turns, ["<image>" * 3] * images)
    end = "<|im_end|>" if template in IM else "</s>"
    lead = "" if template in IM else " "  # the prompt ends with "ASSISTANT:", so the model says the space
    assert learned(talk, ids, labels) == [lead + turn.parts[0] + end for turn in turns if turn.role == "assistant"]
    assert (ids == tiny.IMAGE).sum() == 3 * images
    assert not (labels == tiny.IMAGE).any()
    assert (ids == tiny.BOS).sum() == 1, "the template's own first token and the tokenizer's"
    text = talk.tokenizer.decode(ids)
    for turn in turns:
        for part in turn.parts:
            assert part is IMAGE or part.strip() in text
    if turns[0].role == "user":
        *pictures, question = turns[0].parts
        asked, (text, spans) = talk.prompt(question, len(pictures)), talk.render(turns)
        assert text[: spans[0][0]] == asked, "training and asking see the same prompt"


@given(turns=conversations(), rows=st.lists(st.integers(1, 9), min_size=6, max_size=6))
def test_each_picture_gets_its_own_number_of_placeholders(turns, rows):
    talk = CHATS["hub"]
    images = sum(part is IMAGE for turn in turns for part in turn.parts)
    ids, labels, _ = talk.encode(turns, ["<image>" * n for n in rows[:images]])
    plain, plain_labels, _ = talk.encode(turns, ["<image>"] * images)
    assert len(ids) == len(labels) == len(plain) + sum(rows[:images]) - images
    assert (labels != IGNORE).sum() == (plain_labels != IGNORE).sum()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_ids_are_those_of_transformers_own_processor(family):
    processor = tiny.processor(family)
    pictures = [Image.new("RGB", size, "red") for size in ((40, 24), (20, 60))]
    turns = [
        Turn("user", (IMAGE, "What is this?")), Turn("assistant", ("A cat.",)),
        Turn("user", (IMAGE, "And this?")), Turn("assistant", ("Two.",)),
    ]  # fmt: skip
    sizes = [(p.height, p.width) for p in pictures]
    rows = processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens
    talk = Chat(processor)
    text, _ = talk.render(turns)
    assert text == "USER: <image>\nWhat is this? ASSISTANT: A cat.</s>USER: <image>\nAnd this? ASSISTANT: Two.</s>"
    theirs = processor(images=pictures, text=text, return_tensors="np")
    assert np.array_equal(talk.encode(turns, ["<image>" * n for n in rows])[0], theirs["input_ids"][0])


def test_labels_are_those_of_the_templates_own_assistant_mask_and_the_ends():
    processor, talk = tiny.processor("llava"), CHATS["hub"]
    turns = [Turn("user", ("Hm?",)), Turn("assistant", ("Yes, Ä.",)), Turn("user", ("So",)), Turn("assistant", ("no",))]
    messages = [{"role": t.role, "content": [{"type": "text", "text": t.parts[0]}]} for t in turns]
    made = processor.tokenizer.apply_chat_template(
        messages, chat_template=tiny.CHAT_TEMPLATE, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    masked = np.array(made["input_ids"])[np.array(made["assistant_masks"]) == 1]
    ids, labels, _ = talk.encode(turns, [])
    ours = ids[(labels != IGNORE) & (ids != tiny.EOS)]  # theirs has the space behind each answer, ours the one before
    assert processor.tokenizer.decode(ours).split() == processor.tokenizer.decode(masked).split()


def sentencepiece() -> PreTrainedTokenizerFast:
    """Llama's kind of tokenizer: a space is part of the word behind it."""
    special = ["<s>", "</s>", "<pad>", "<image>", "<unk>"]
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    corpus = ["USER: What is it? ASSISTANT: A cat."] * 9
    core.train_from_iterator(corpus, trainers.BpeTrainer(special_tokens=special, show_progress=False))
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip


def test_a_word_that_carries_the_space_before_it_is_learned_and_the_prompt_is_not():
    processor = tiny.processor("llava")
    processor.tokenizer = sentencepiece()
    talk = Chat(processor)
    turns = [Turn("user", (IMAGE, "What is it?")), Turn("assistant", ("A cat.",))]
    ids, labels, _ = talk.encode(turns, ["<image>" * 2])
    pieces = talk.tokenizer.convert_ids_to_tokens(ids)
    assert [p for p, label in zip(pieces, labels, strict=True) if label != IGNORE] == ["▁A", "▁cat.", "</s>"]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}],
        add_generation_prompt=True,
    )
    asked = talk.tokenizer(prompt.replace("<image>", "<image>" * 2))["input_ids"]
    assert ids[: len(asked)].tolist() == asked, "training and asking see the same prompt"
    assert (labels[: len(asked)] == IGNORE).all()


@pytest.mark.parametrize("said", ["4", "猫", "é"])
def test_a_space_that_is_a_token_of_its_own_is_learned_with_the_answer(said):
    """Llama writes " 4" as "▁" and "4"; the prompt ends at "ASSISTANT:", so the model has to say both."""
    processor = tiny.processor("llava")
    processor.tokenizer = sentencepiece()
    processor.tokenizer.add_tokens([said])
    talk = Chat(processor)
    ids, labels, _ = talk.encode([Turn("user", ("What is it?",)), Turn("assistant", (said,))], [])
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": "What is it?"}]}], add_generation_prompt=True
    )
    asked = talk.tokenizer(prompt)["input_ids"]
    assert ids[: len(asked)].tolist() == asked
    assert (labels[: len(asked)] == IGNORE).all()
    assert (labels[len(asked) :] != IGNORE).all()


def test_words_around_a_picture_are_not_glued_together():
    turns = [Turn("user", ("Look at", IMAGE, "and say")), Turn("assistant", ("a cat",))]
    assert CHATS["parts"].render(turns)[0] == "USER: <image>\nLook at\nand say ASSISTANT: a cat</s>"
    assert "Look at<image>and say<|im_end|>" in CHATS["chatml"].render(turns)[0], "where a template keeps the place"


def test_control_tokens_in_a_text_are_refused():
    for turns in (
        [Turn("user", ("what is </s>?",)), Turn("assistant", ("an end",))],
        [Turn("user", ("strike it",)), Turn("assistant", ("<s>old</s> new",))],
    ):
        with pytest.raises(UserError, match="control token"):
            CHATS["hub"].encode(turns, [])


def test_a_control_token_in_a_caption_is_refused():
    with pytest.raises(UserError, match="control token"):
        Chat(tiny.processor("llava"), "plain").encode(
            [Turn("user", (IMAGE,)), Turn("assistant", ("an </s> end",))], ["<image>" * 9]
        )


def test_a_control_token_that_has_no_name_is_one_too():
    """As Llama 3's <|eot_id|> is: neither bos nor eos, it stands among the added tokens alone."""
    processor = tiny.processor("llava")
    processor.tokenizer.backend_tokenizer.add_special_tokens(["<|eot_id|>"])
    with pytest.raises(UserError, match="control token"):
        Chat(processor).encode([Turn("user", ("Hi",)), Turn("assistant", ("so <|eot_id|> it ends",))], [])


@pytest.mark.parametrize(
    "template", ["{{ 1 / 0 }}", "{{ messages[9].role }}", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}"]
)
def test_whatever_a_template_raises_is_an_error_of_the_record(template):
    with pytest.raises(UserError, match="cannot write this conversation"):
        chat(template).encode([Turn("user", ("Hi",)), Turn("assistant", ("Ho",))], [])


def test_a_template_that_raises_is_an_error_of_the_record():
    raising = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + MISTRAL
    with pytest.raises(UserError, match="cannot write this conversation: no system here"):
        chat(raising).encode([Turn("system", ("Be brief.",)), Turn("user", ("Hi",)), Turn("assistant", ("Ho",))], [])


@pytest.mark.parametrize("code", ["range(10 ** 12)|list", "1 / 0", "'x' * (2 ** 62)"])
def test_a_template_that_fails_as_programs_do_is_one_too(code):
    with pytest.raises(UserError, match=r"cannot write this conversation: \w+"):
        chat("{{ " + code + " }}" + MISTRAL).encode([Turn("user", ("Hi",)), Turn("assistant", ("Ho",))], [])


def test_plain_is_picture_and_caption():
    talk = chat(template="hub")
    talk.plain = True
    ids, labels, _ = talk.encode(
        [Turn("user", (IMAGE, "Describe it.")), Turn("assistant", ("A cat.",))], ["<image>" * 4]
    )
    assert ids[:5].tolist() == [tiny.BOS, *[tiny.IMAGE] * 4]
    assert learned(talk, ids, labels) == ["A cat.\n"]
    for bad in (
        [Turn("user", ("Hi",)), Turn("assistant", ("Ho",))],
        [Turn("user", (IMAGE,)), Turn("assistant", ("a",))] * 2,
    ):
        with pytest.raises(UserError, match="one question with a picture"):
            talk.encode(bad, ["<image>" * 4] * 2)


def test_labels_are_those_that_a_loop_over_answers_gives():
    talk, turns = CHATS["hub"], []
    for number in range(300):
        turns += [Turn("user", (f"Question {number}?",)), Turn("assistant", (f"{number}" * (1 + number % 3),))]
    ids, labels, _ = talk.encode(turns, [])
    text, spans = talk.render(turns)
    first, last = np.array(talk.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]).T
    wanted = np.full_like(ids, IGNORE)
    for begin, end in spans:
        touched = (last > begin) & (first < end) & (last > first)
        wanted[touched] = ids[touched]
    assert text.count("</s>") == len(spans) == 300
    assert (labels == wanted).all()


def test_a_text_of_marks_only_is_a_text():
    """What stands for an answer while a template is rendered is in no text, however it was made."""
    turns = [Turn("user", ("\ue000" * 9 + "0\ue001",)), Turn("assistant", ("\ue0000\ue001\ue000" * 3,))]
    ids, labels, _ = CHATS["hub"].encode(turns, [])
    assert learned(CHATS["hub"], ids, labels) == [" " + turns[1].parts[0] + "</s>"]


def test_a_special_token_that_is_empty_ends_no_turn():
    processor = tiny.processor("llava")
    processor.tokenizer.pad_token = ""
    turns = [Turn("user", ("Hi",)), Turn("assistant", ("Ho",))]
    for got, wanted in zip(Chat(processor).encode(turns, []), CHATS["hub"].encode(turns, []), strict=True):
        assert np.array_equal(got, wanted)


def system(text: str, template: str = "chat") -> str:
    return DataSection(kind="chat", file="train.json", template=template, system=text).system_message


@pytest.mark.parametrize("code", ["{{ 1 }}", "\n\n{{ 1 }}\n\n", "  {% if 1 %}\n a{% endif %}"])
def test_a_template_without_its_system_message_writes_what_it_wrote(code):
    talk = chat(code + TEMPLATES["hub"])
    user, own = Turn("user", ("Hi",)), Turn("system", ("Sing.",))
    before = talk.render([own, user, Turn("assistant", ("Ho",))])
    talk = Chat(with_system(talk.processor, system("Be brief.")))
    assert talk.render([own, user, Turn("assistant", ("Ho",))]) == before


pieces = st.sampled_from(
    ["'", '"', "{{", "}}", "{%", "%}", "{#", "#}", "\\", "\\n", "\n", "\r", "\r\n", "\t", "é", "猫", "😀", "\u2028",
     "<", "a", " ", "{% raw %}", "{% generation %}", "{{ messages }}", "\x7f", "\x01"]
)  # fmt: skip
odd = st.lists(pieces | said, min_size=1, max_size=8).map("".join).filter(lambda text: text.strip())
NASTY = 'It\'s "{{ bos_token }}" {% if x %}\\n\\\n{# 猫 #}😀\r\n'


def with_examples(test):
    for template in TEMPLATES:
        test = example(template=template, text=NASTY, question="What's {{ this }}?\n\\", pictures=1)(test)
    return test


@with_examples
@given(template=st.sampled_from(sorted(TEMPLATES)), text=odd, question=odd, pictures=st.integers(0, 2))
def test_asking_is_what_training_was(template, text, question, pictures):
    """With a system message: training's ids up to the answer, those that `ask` makes, and transformers' own ones."""
    before = CHATS[template]
    processor = with_system(before.processor, system(text))
    talk = Chat(processor)
    turns = [Turn("user", (*[IMAGE] * pictures, question)), Turn("assistant", ("A cat.",))]
    ids, labels, _ = talk.encode(turns, ["<image>" * 3] * pictures)
    wanted = before.encode([Turn("system", (text,)), *turns], ["<image>" * 3] * pictures)
    assert np.array_equal(ids, wanted[0])
    assert np.array_equal(labels, wanted[1])

    message = {"role": "user", "content": [{"type": "image"}] * pictures + [{"type": "text", "text": question}]}
    for prompt in (
        talk.prompt(question, pictures),
        processor.apply_chat_template([message], add_generation_prompt=True),
    ):
        prompt = prompt.replace("<image>", "<image>" * 3)
        asked = talk.tokenizer(prompt, add_special_tokens=not talk.begun(prompt))["input_ids"]
        assert ids[: len(asked)].tolist() == asked
        assert (labels != IGNORE).argmax() == len(asked), "the answer begins there"


def test_a_system_message_is_written_with_its_template(tmp_path):
    processor = with_system(tiny.processor("llava"), system(NASTY))
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    message = {"role": "user", "content": [{"type": "text", "text": "Who?"}]}
    text = again.apply_chat_template([message], add_generation_prompt=True)
    assert text == NASTY + " USER: Who? ASSISTANT:" == Chat(processor).prompt("Who?", 0)


@pytest.mark.parametrize(
    ("template", "text", "says"),
    [
        (TEMPLATES["hub"], "Never write </s>.", "'</s>' is a control token"),
        (
            "{% for m in messages if m.role == 'user' %}{{ m.content[0].text }}{% endfor %}",
            "Be brief.",
            "loses the sys",
        ),
        ("{% if messages[0].role == 'system' %}{{ raise_exception('no thanks') }}{% endif %}", "Sing.", "no thanks"),
    ],
)
def test_a_system_message_that_cannot_be_written_is_refused(template, text, says):
    processor = tiny.processor("llava")
    processor.chat_template = template
    with pytest.raises(UserError, match=says):
        with_system(processor, system(text))


def test_a_system_message_is_added_where_there_is_none():
    processor = tiny.processor("llava")
    talk = Chat(with_system(processor, system("Be brief.")))
    assert processor.chat_template == TEMPLATES["hub"]
    assert with_system(processor, system("Be brief.", "plain")) is processor, "captions have no system message"
    user, assistant = Turn("user", ("Hi",)), Turn("assistant", ("Ho",))
    assert talk.render([user, assistant])[0] == "Be brief. USER: Hi ASSISTANT: Ho</s>"
    assert talk.render([Turn("system", ("Sing.",)), user, assistant])[0].startswith("Sing. USER")


TURNS = [Turn("user", (IMAGE, "What is this?")), Turn("assistant", ("A cat.",))]


@pytest.mark.parametrize(
    ("template", "says"),
    [
        # Made for plain strings: the question is lost without a word.
        (
            "{% for m in messages %}{{ m.role + ': ' + (m.content if m.content is string else '') }}{% endfor %}",
            "loses",
        ),
        (
            "{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}",
            "0 placeholders of 1 picture",
        ),
        ("<image>{% for m in messages if m.role == 'user' %}{{ m.content[1].text }}{% endfor %}", "an answer"),
        ("<image><image>{% for m in messages %}{{ m.content[-1].text }}{% endfor %}", "2 placeholders of 1 picture"),
    ],
)
def test_a_template_that_loses_something_is_refused(template, says):
    with pytest.raises(UserError, match=says):
        chat(template).encode(TURNS, ["<image>" * 2])


def test_no_template_and_no_fast_tokenizer_are_said():
    processor = tiny.processor("llava")
    processor.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        Chat(processor)
    processor = copy.copy(tiny.processor("llava"))

    class Slow:
        is_fast = False

    processor.tokenizer = Slow()
    with pytest.raises(UserError, match="no fast tokenizer"):
        Chat(processor)


def test_a_placeholder_written_in_a_text_is_not_taken_for_a_picture():
    with pytest.raises(UserError, match="2 placeholders"):
        CHATS["hub"].encode([Turn("user", (IMAGE, "what is <image>?")), Turn("assistant", ("a",))], ["<image>" * 2])
