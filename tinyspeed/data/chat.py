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

`plain` is LLaVA's format for aligning the projector: the picture, then the caption; what the human asks is left out.
"""

import re
from collections.abc import Sequence

import numpy as np

from ..rows import IGNORE
from ..util import UserError, counted, require
from .record_formats import IMAGE, Turn


class Chat:
    """Renders and tokenizes conversations for a processor's model. `system` goes before those that have none."""

    def __init__(self, processor, template: str = "chat", system: str = ""):
        self.processor, self.plain, self.system = processor, template == "plain", system
        self.tokenizer = processor.tokenizer
        fast = self.tokenizer.is_fast
        require(fast, "the processor has no fast tokenizer, and only those tell where in the text a token is from")
        if not self.plain and not processor.chat_template:
            raise UserError('the processor has no chat template; copy the model\'s, or set data.template = "plain"')
        self.image = processor.image_token
        self.image_id = self.tokenizer.convert_tokens_to_ids(self.image)
        # Tokens without a name count too: Llama 3's <|eot_id|> ends every turn, and is neither its bos nor its eos.
        added = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        self.special = sorted({*self.tokenizer.all_special_tokens, *added} - {self.image}, key=len, reverse=True)
        self.turn_ends = re.compile(r"\s*(?:" + "|".join(map(re.escape, self.special)) + ")")

    def encode(self, turns: Sequence[Turn], image_rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Ids, in which each picture's placeholder is repeated once for each of its features, and labels."""
        text, answers = self.render(turns)
        made = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=not self.begun(text))
        ids, characters = np.array(made["input_ids"], dtype=np.int64), np.array(made["offset_mapping"]).reshape(-1, 2)
        labels = np.full_like(ids, IGNORE)
        first, last = characters.T
        for begin, end in answers:
            touched = (last > begin) & (first < end) & (last > first)
            labels[touched] = ids[touched]
        pictures = ids == self.image_id
        found, given = counted(int(pictures.sum()), "placeholder"), counted(len(image_rows), "picture")
        require(pictures.sum() == len(image_rows), f"{found} {self.image} in the text for {given}")
        times = np.ones_like(ids)
        times[pictures] = image_rows
        return ids.repeat(times), labels.repeat(times)

    def begun(self, text: str) -> bool:
        """Whether the template wrote the bos token itself, so that the tokenizer must not add a second one."""
        return bool(self.tokenizer.bos_token) and text.startswith(self.tokenizer.bos_token)

    def prompt(self, question: str, images: int) -> str:
        """The text that asks a question about so many pictures, up to where the answer begins."""
        if self.image in question:
            raise UserError(f"the question contains {self.image}, which stands for a picture: leave it out")
        turns = [Turn("user", (*[IMAGE] * images, question))]
        text = self._template([_message(turn) for turn in turns], add_generation_prompt=True)
        self._check(text, turns)
        return text

    def render(self, turns: Sequence[Turn]) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the span of each answer in it with the end of its turn."""
        if self.system and not self.plain and turns[0].role != "system":
            turns = [Turn("system", (self.system,)), *turns]
        used = [turn for turn in turns if turn.role == "assistant" or not self.plain]
        said = "".join(part for turn in used for part in turn.parts if part is not IMAGE)
        if control := next((token for token in self.special if token in said), None):
            raise UserError(f"the text {control!r} is a control token of this model's tokenizer; write it another way")
        if self.plain:
            return self._caption(turns)
        mark = "\ue000"
        while mark in said:
            mark += "\ue000"
        answers, messages = [], []
        for turn in turns:
            if turn.role == "assistant":
                answers.append("".join(turn.parts))
                turn = Turn(turn.role, (f"{mark}{len(answers) - 1}\ue001",))
            messages.append(_message(turn))
        rest = self._template(messages)
        self._check(rest, turns)
        asked = next(number for number, turn in enumerate(turns) if turn.role == "assistant")
        prompt = self._template(messages[:asked], add_generation_prompt=True)

        text, spans, lead, opener, cue = "", [], "", "", ""
        for number, answer in enumerate(answers):
            before, found, rest = rest.partition(f"{mark}{number}\ue001")
            require(bool(found), "the chat template loses or moves an answer")
            if number == 0 and before.startswith(prompt):
                lead = before[len(prompt) :]  # the model has to say this before each answer
            elif number == 0:  # OneVision's opens an answer with "assistant \n", and asks for one with "assistant\n"
                told = self._template(messages[:asked])
                if before.startswith(told) and prompt.startswith(told):
                    opener, cue = before[len(told) :], prompt[len(told) :]
            text += before.removesuffix(opener) + cue if before.endswith(opener) else before
            begin, end = len(text.removesuffix(lead)), self.turn_ends.match(rest)
            if end:
                text, rest = text + answer + end[0], rest[end.end() :]
            else:
                text, rest = text + answer + self.tokenizer.eos_token, rest.lstrip()
            spans.append((begin, len(text)))
        return text + rest, spans

    def _template(self, messages: list[dict], **how) -> str:
        try:
            return self.processor.apply_chat_template(messages, tokenize=False, **how)
        except Exception as error:  # a template is a program, and may raise anything
            said = str(error) or repr(error)
            raise UserError(f"the chat template cannot write this conversation: {said:.300}") from error

    def _check(self, rendered: str, turns: Sequence[Turn]) -> None:
        for turn in turns:
            for part in turn.parts:
                if part is not IMAGE and turn.role != "assistant" and part.strip() not in rendered:
                    raise UserError(f"the chat template loses the {turn.role}'s text {part[:60]!r}")
        pictures = sum(part is IMAGE for turn in turns for part in turn.parts)
        made = rendered.count(self.image)
        what = f"{counted(made, 'placeholder')} of {counted(pictures, 'picture')}"
        require(made == pictures, f"the chat template makes {what}")

    def _caption(self, turns: Sequence[Turn]) -> tuple[str, list[tuple[int, int]]]:
        spoken = [turn for turn in turns if turn.role != "system"]
        if len(spoken) != 2 or IMAGE not in spoken[0].parts:
            raise UserError('data.template = "plain" takes one question with a picture, and its answer')
        pictures = self.image * spoken[0].parts.count(IMAGE)
        text = pictures + "".join(spoken[1].parts) + "\n"
        return text, [(len(pictures), len(text))]


def _message(turn: Turn) -> dict:
    """A turn as templates expect it. The content is a list, since some templates drop a plain string silently."""
    # The line breaks are for templates that move pictures to the front: the words around one would run together.
    first = next((part for part in turn.parts if part is not IMAGE), None)
    texts = (part if part is first or part is IMAGE else f"\n{part}" for part in turn.parts)
    content = [{"type": "image"} if part is IMAGE else {"type": "text", "text": part} for part in texts]
    return {"role": turn.role, "content": content}
