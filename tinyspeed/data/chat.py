"""A conversation as ids and labels, tokenized once.

    text    USER: <image>\nWhat is this? ASSISTANT: A cat.</s>
    labels  --------------------------------------AAAAAAAAAAAA

The usual way to find the answers, which tokenizes the turns again and adds up their lengths, is sometimes wrong by a
token; then every label of the sample is dropped with a warning, and the loss is zero. Here the template renders a
placeholder for each answer that occurs nowhere else, so the answer's place in the text is known; the text is tokenized
once, and the tokenizer says which characters each token came from. A token is learned if it touches an answer or the
end of its turn. An answer begins where the prompt for it ends: when a model is asked, the prompt stops at "ASSISTANT:",
so the model has to say the space after it, which for some tokenizers is a token of its own.

The end of a turn must be learned, or the model never stops. The hub's template for LLaVA-1.5 writes none (LLaVA was
trained with `</s>` there), so where a template ends an answer without a special token, the end-of-text token replaces
the space that follows. What a template renders is checked: if it loses a question (templates do, when the content is a
plain string), an answer or a picture, that is an error.

A system message of the recipe (`data.system`) is written into the template itself, so training, `ask`, `eval` and
whoever uses the exported folder write the same prompt.

`plain` is LLaVA's format for aligning the projector: the picture, then the caption; what the human asks is left out.
"""

import copy
import hashlib
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..models.loading import space_behind_picture
from ..models.pictures import image_token, runs
from ..rows import IGNORE
from ..util import UserError, counted, require
from .record_formats import IMAGE, Turn


def with_system(processor, text: str):
    """The processor, with a chat template that puts this text before conversations that have no system message."""
    if not text:
        return processor
    chat = Chat(copy.copy(processor))
    chat._refuse_control_tokens(text)
    # Jinja reads strings as Python writes them in ASCII, and drops this line break instead of the template's own first.
    added = f"[{{'role': 'system', 'content': [{{'type': 'text', 'text': {text!a}}}]}}]"
    lacks = "messages and messages[0]['role'] != 'system'"
    begin = f"{{% if {lacks} %}}{{% set messages = {added} + messages %}}{{% endif %}}\n"
    chat.processor.chat_template = begin + processor.chat_template
    chat._check(chat._template([_message(Turn("user", ("?",)))]), [Turn("system", (text,))])
    return chat.processor


class Encoded(NamedTuple):
    ids: np.ndarray
    labels: np.ndarray
    pictures_end: int  # the number of tokens up to the end of the last picture


class Chat:
    """Renders and tokenizes conversations for a processor's model."""

    def __init__(self, processor, template: str = "chat"):
        self.processor, self.plain = processor, template == "plain"
        self.tokenizer = processor.tokenizer
        fast = self.tokenizer.is_fast
        require(fast, "the processor has no fast tokenizer, and only those tell where in the text a token is from")
        if not self.plain and not processor.chat_template:
            raise UserError('the processor has no chat template; copy the model\'s, or set data.template = "plain"')
        self.image = processor.image_token
        self.space = space_behind_picture(processor)
        self.feature = image_token(processor)
        self.image_id = self.tokenizer.convert_tokens_to_ids(self.feature)
        # Tokens without a name count too: Llama 3's <|eot_id|> ends every turn, and is neither its bos nor its eos.
        added = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        self.special = sorted({*self.tokenizer.all_special_tokens, *added} - {self.image, ""}, key=len, reverse=True)
        self.turn_ends = re.compile(r"\s*(?:" + "|".join(map(re.escape, self.special)) + ")")

    def encode(self, turns: Sequence[Turn], pictures: Sequence[str]) -> Encoded:
        """Ids and labels, with these texts in the places of the pictures (`models/pictures.py`)."""
        text, answers = self.render(turns)
        text, answers, pictures_end, lengths = self._with_pictures(text, answers, pictures)
        made = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=not self.begun(text))
        ids, characters = np.array(made["input_ids"], dtype=np.int64), np.array(made["offset_mapping"]).reshape(-1, 2)
        first, last = characters.T
        begins, ends = answers.T
        end = np.append(0, ends)[begins.searchsorted(last)]  # of the last answer that begins before the token's end
        labels = np.where((first < end) & (first < last), ids, IGNORE)
        times = np.ones_like(ids)
        times[ids == self.image_id] = lengths
        before = np.flatnonzero((first < pictures_end) & (first < last))
        return Encoded(ids.repeat(times), labels.repeat(times), int(times[: before[-1] + 1].sum()) if pictures else 0)

    def _with_pictures(
        self, text: str, answers: list[tuple[int, int]], pictures: Sequence[str]
    ) -> tuple[str, np.ndarray, int, list[int]]:
        """The text with the pictures' in it, the answers' places in that, where the last picture ends, and the lengths
        of the runs of image tokens, each of which is a single one in the text: tokenizing all would take long."""
        said = text.split(self.image)
        found, given = counted(len(said) - 1, "placeholder"), counted(len(pictures), "picture")
        require(len(said) - 1 == len(pictures), f"{found} {self.image} in the text for {given}")
        short, lengths = (
            zip(*(runs(picture, self.feature) for picture in pictures), strict=True) if pictures else ((), ())
        )
        ends = np.cumsum([len(part) + len(self.image) for part in said[:-1]])
        longer = np.cumsum([0, *(len(picture) - len(self.image) for picture in short)])
        answers = np.array(answers)
        answers += longer[ends.searchsorted(answers, side="right")]
        text = "".join(part for pair in zip(said, [*short, ""], strict=True) for part in pair)
        return text, answers, int(ends[-1] + longer[-1]) if pictures else 0, [n for of in lengths for n in of]

    def begun(self, text: str) -> bool:
        """Whether the template wrote the bos token itself, so that the tokenizer must not add a second one."""
        return bool(self.tokenizer.bos_token) and text.startswith(self.tokenizer.bos_token)

    def prompt(self, question: str, images: int) -> str:
        """The text that asks a question about so many pictures, up to where the answer begins."""
        if self.image in question:
            raise UserError(f"the question contains {self.image}, which stands for a picture: leave it out")
        require(bool(question.strip()), "the question is empty")
        self._refuse_control_tokens(question)
        turns = [Turn("user", (*[IMAGE] * images, question))]
        text = self._template([_message(turn) for turn in turns], add_generation_prompt=True)
        self._check(text, turns)
        return text

    def render(self, turns: Sequence[Turn]) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the span of each answer in it with the end of its turn."""
        used = [turn for turn in turns if turn.role == "assistant" or not self.plain]
        said = "".join(part for turn in used for part in turn.parts if part is not IMAGE)
        self._refuse_control_tokens(said)
        if self.plain:
            return self._caption(turns)
        digest = hashlib.blake2b(said.encode(errors="surrogatepass"), digest_size=8).digest()
        mark = f"\ue000{int.from_bytes(digest)}\ue000"  # no text can contain its own
        answers, messages = [], []
        for turn in turns:
            if turn.role == "assistant":
                answers.append("".join(turn.parts))
                turn = Turn(turn.role, (f"{mark}{len(answers) - 1}\ue001",))
            messages.append(_message(turn))
        rendered = self._template(messages)
        self._check(rendered, turns)
        first, *rest = re.split(f"{mark}(\\d+)\ue001", rendered)
        require(rest[::2] == [*map(str, range(len(answers)))], "the chat template loses, moves or repeats an answer")
        asked = next(number for number, turn in enumerate(turns) if turn.role == "assistant")
        prompt = self._template(messages[:asked], add_generation_prompt=True)
        lead = opener = cue = ""
        if first.startswith(prompt):
            lead = first[len(prompt) :]  # the model has to say this before each answer
        else:  # OneVision's opens an answer with "assistant \n", and asks for one with "assistant\n"
            told = self._template(messages[:asked])
            if first.startswith(told) and prompt.startswith(told):
                opener, cue = first[len(told) :], prompt[len(told) :]

        text, before, spans = "", first, []
        for answer, behind in zip(answers, rest[1::2], strict=True):
            text += before.removesuffix(opener) + cue if before.endswith(opener) else before
            begin, end = len(text) - len(lead) * text.endswith(lead), self.turn_ends.match(behind)
            text += answer + (end[0] if end else self.tokenizer.eos_token)
            before = behind[end.end() :] if end else behind.lstrip()
            spans.append((begin, len(text)))
        return text + before, spans

    def _refuse_control_tokens(self, text: str) -> None:
        if control := next((token for token in self.special if token in text), None):
            raise UserError(f"the text {control!r} is a control token of this model's tokenizer; write it another way")

    def _template(self, messages: list[dict], **how) -> str:
        try:
            return self.processor.apply_chat_template(messages, tokenize=False, **how)
        except Exception as error:  # a template is a program, and may raise anything
            said = str(error) or repr(error)
            raise UserError(f"the chat template cannot write this conversation: {said:.300}") from error

    def _check(self, rendered: str, turns: Sequence[Turn]) -> None:
        at = 0  # where the part before was found, so that long conversations are searched only once
        said = [(turn.role, part) for turn in turns if turn.role != "assistant" for part in turn.parts]
        for role, part in said:
            if part is not IMAGE and (at := rendered.find(part.strip(), at)) < 0:
                at = rendered.find(part.strip())  # the template may write them in another order
                require(at >= 0, f"the chat template loses the {role}'s text {part[:60]!r}")
        pictures = sum(part is IMAGE for turn in turns for part in turn.parts)
        made = rendered.count(self.image)
        what = f"{counted(made, 'placeholder')} of {counted(pictures, 'picture')}"
        require(made == pictures, f"the chat template makes {what}")

    def _caption(self, turns: Sequence[Turn]) -> tuple[str, list[tuple[int, int]]]:
        spoken = [turn for turn in turns if turn.role != "system"]
        if len(spoken) != 2 or IMAGE not in spoken[0].parts:
            raise UserError('data.template = "plain" takes one question with a picture, and its answer')
        pictures = self.image * spoken[0].parts.count(IMAGE)
        text = pictures + self.space + "".join(spoken[1].parts) + "\n"
        return text, [(len(pictures), len(text))]


def _message(turn: Turn) -> dict:
    """A turn as templates expect it. The content is a list, since some templates drop a plain string silently."""
    # The line breaks are for templates that move pictures to the front: the words around one would run together.
    content: list[dict] = []
    for part in turn.parts:
        again = any(item["type"] == "text" for item in content)
        content.append({"type": "image"} if part is IMAGE else {"type": "text", "text": "\n" * again + part})
    return {"role": turn.role, "content": content}
