"""The questions of five benchmarks, from the files that their authors publish, in the words that LLaVA-1.5 asks them.

    POPE        Is there a snowboard in the image?
                Answer the question using a single word or phrase.

    ScienceQA   Context: Select the better estimate.
                How long does it take to bake lasagna in the oven?
                A. 33 minutes
                B. 33 hours
                Answer with the option's letter from the given choices directly.

    TextVQA     What is the brand of this camera?
                Reference OCR token: DAKOTA, DIGITAL, Single-Use, Camera, Pire, digitat
                Answer the question using a single word or phrase.

VQAv2 and GQA are asked as POPE is. The wording is part of a result: TextVQA without its OCR line is another benchmark
(58.2 and 45.5 have both been published for one model). A file that is not as its benchmark has it is an error that
names the entry.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..util.errors import UserError, unknown

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
LETTERS = "ABCDE"
PEOPLE = 10


@dataclass(frozen=True)
class Question:
    id: str
    image: str | None  # its name in the image folder
    text: str  # the whole prompt
    truth: str | tuple[str, ...] | None  # yes or no, a letter, ten people's answers, a word; None: not public
    group: str = ""  # what the benchmark also averages by itself: a split, a type of answer


def read(task: str, path: Path, beside: Path | None = None) -> list[Question]:
    """The questions of an official file or folder, in its order. `beside` is a second file, where there is one.

    pope        coco_pope_{adversarial,popular,random}.json, or a folder with the three; images: COCO's val2014
    scienceqa   the folder with problems.json and pid_splits.json; the test split; images: its folder `images`
    textvqa     TextVQA_0.5.1_val.json; beside: LLaVA's llava_textvqa_val_v051_ocr.jsonl, to ask with OCR tokens
    vqav2       v2_OpenEnded_mscoco_*_questions.json; beside: the annotations, to score; images: COCO's of that split
    gqa         testdev_balanced_questions.json
    """
    known(task)
    if beside is not None and task not in ("textvqa", "vqav2"):
        raise UserError(f"{task} has no second file: {beside} would not be used")
    questions = list(READERS[task](path) if beside is None else READERS[task](path, beside))
    if not questions:
        raise UserError(f"{path} holds no questions")
    seen = set()
    for question in questions:
        if question.id in seen:
            raise UserError(f"{path} holds question {question.id} twice")
        seen.add(question.id)
    return questions


def known(task: str) -> None:
    if task not in READERS:
        raise unknown("benchmark", task, READERS)


def _pope(path: Path) -> Iterator[Question]:
    splits = ("adversarial", "popular", "random")
    for file in [path / f"coco_pope_{split}.json" for split in splits] if path.is_dir() else [path]:
        split = file.stem.removeprefix("coco_pope_")
        for where, entry in _lines(file):
            truth = _field(entry, "label", str, where)
            if truth not in ("yes", "no"):
                raise UserError(f"{where}: the label is {truth!r}, neither yes nor no")
            id = f"{split}/{_field(entry, 'question_id', int, where)}"  # each file counts anew
            image, text = _field(entry, "image", str, where), _field(entry, "text", str, where)
            yield Question(id, image, text + SHORT, truth, split)


def _scienceqa(path: Path) -> Iterator[Question]:
    splits, problems = path / "pid_splits.json", path / "problems.json"
    every = _json(problems)
    for id in _field(_json(splits), "test", list, str(splits)):
        where = f"{problems}, problem {id}"
        problem = _field(every, str(id), dict, where)
        choices, answer = _field(problem, "choices", list, where), _field(problem, "answer", int, where)
        if not 0 <= answer < len(choices) <= len(LETTERS):
            raise UserError(f"{where}: answer {answer} of {len(choices)} choices")
        hint, question = _field(problem, "hint", str, where), _field(problem, "question", str, where)
        options = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
        text = "\n".join([f"Context: {hint}"] * bool(hint) + [question] + options).strip()
        image = None if problem.get("image") is None else f"test/{id}/{_field(problem, 'image', str, where)}"
        yield Question(str(id), image, text + LETTER, LETTERS[answer])


def _textvqa(path: Path, beside: Path | None = None) -> Iterator[Question]:
    prompts = _ocr_prompts(beside) if beside else {}
    for n, entry in enumerate(_field(_json(path), "data", list, str(path))):
        where = f"{path}, entry {n}"
        image, question = _field(entry, "image_id", str, where), _field(entry, "question", str, where)
        text = question.capitalize() + SHORT  # the file has no capitals, and LLaVA begins with one
        if beside:
            text = prompts.get((image, question.lower()), "")
            if not text:
                raise UserError(f"{beside} has no prompt for {question!r} about {image}, of {where}")
        id = str(_field(entry, "question_id", int, where))
        yield Question(id, f"{image}.jpg", text, _people(_field(entry, "answers", list, where), where))


def _ocr_prompts(path: Path) -> dict[tuple[str, str], str]:
    """LLaVA's prompts by picture and question: what its file calls question_id is the picture's."""
    prompts = {}
    for where, entry in _lines(path):
        text = _field(entry, "text", str, where)
        prompts[_field(entry, "question_id", str, where), text.split("\n")[0].lower()] = text
    return prompts


def _vqav2(path: Path, beside: Path | None = None) -> Iterator[Question]:
    data = _json(path)
    # The test-dev questions are a part of the test questions, and about the same pictures.
    pictures = _field(data, "data_subtype", str, str(path)).replace("-dev", "")
    truths = _annotations(beside) if beside else {}
    for n, entry in enumerate(_field(data, "questions", list, str(path))):
        where = f"{path}, entry {n}"
        id = str(_field(entry, "question_id", int, where))
        if beside and id not in truths:
            raise UserError(f"{beside} has no answers to question {id}, of {where}")
        image = f"COCO_{pictures}_{_field(entry, 'image_id', int, where):012d}.jpg"
        yield Question(id, image, _field(entry, "question", str, where) + SHORT, *truths.get(id, (None,)))


def _annotations(path: Path) -> dict[str, tuple[tuple[str, ...], str]]:
    """Ten answers to each question, and their type: yes/no, number or other."""
    truths = {}
    for n, entry in enumerate(_field(_json(path), "annotations", list, str(path))):
        where = f"{path}, entry {n}"
        answers = [_field(one, "answer", str, where) for one in _field(entry, "answers", list, where)]
        id, kind = str(_field(entry, "question_id", int, where)), _field(entry, "answer_type", str, where)
        truths[id] = _people(answers, where), kind
    return truths


def _gqa(path: Path) -> Iterator[Question]:
    every = _json(path)
    if not isinstance(every, dict):
        raise UserError(f"{path} should be an object with GQA's questions by their ids")
    for id, entry in every.items():
        where = f"{path}, question {id}"
        image, text = _field(entry, "imageId", str, where), _field(entry, "question", str, where)
        if entry.get("isBalanced", True):  # the official code averages over no others
            yield Question(id, f"{image}.jpg", text + SHORT, _field(entry, "answer", str, where))


READERS: dict[str, Callable[..., Iterator[Question]]] = {
    "pope": _pope,
    "scienceqa": _scienceqa,
    "textvqa": _textvqa,
    "vqav2": _vqav2,
    "gqa": _gqa,
}


def _people(answers: list, where: str) -> tuple[str, ...]:
    if len(answers) != PEOPLE or not all(isinstance(answer, str) for answer in answers):
        raise UserError(f"{where}: {PEOPLE} people's answers should be here, not {answers!r:.100}")
    return tuple(answers)


def _field(entry: Any, key: str, kind: type, where: str) -> Any:
    value = entry.get(key) if isinstance(entry, dict) else None
    if type(value) is not kind:  # not isinstance: true is no number
        raise UserError(f"{where}: {key!r} should be of type {kind.__name__}, not {value!r:.100}")
    return value


def _json(path: Path) -> Any:
    return _parse(_text(path), str(path))


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    """The entries of a file with a JSON object a line, each with its place."""
    for n, line in enumerate(_text(path).split("\n"), 1):  # not splitlines: it also cuts at marks within a text
        if line.strip():
            yield f"{path}, line {n}", _parse(line, f"{path}, line {n}")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text: {error}") from error


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}") from error
