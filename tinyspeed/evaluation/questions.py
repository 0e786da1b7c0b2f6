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
(58.2 and 45.5 have both been published for one model). A file in another format is an error that names the entry.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..util import UserError, files, require, require_known

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
    """Returns the questions of an official file or folder, in its order. `beside` is a second file, for two of them.

    pope        coco_pope_{adversarial,popular,random}.json, or a folder with the three; images: COCO's val2014
    scienceqa   the folder with problems.json and pid_splits.json; the test split; images: its folder `images`
    textvqa     TextVQA_0.5.1_val.json; beside: LLaVA's llava_textvqa_val_v051_ocr.jsonl, to ask with OCR tokens
    vqav2       v2_OpenEnded_mscoco_*_questions.json; beside: the annotations, to score; images: COCO's of that split
    gqa         testdev_balanced_questions.json
    """
    require_known("benchmark", task, READERS)
    if beside is not None and task not in ("textvqa", "vqav2"):
        raise UserError(f"{task} has no second file: {beside} would not be used")
    questions = list(READERS[task](path) if beside is None else READERS[task](path, beside))
    require(bool(questions), f"{path} holds no questions")
    [(id, count)] = Counter(question.id for question in questions).most_common(1)
    require(count == 1, f"{path} holds question {id} twice")
    return questions


def _pope(path: Path) -> Iterator[Question]:
    splits = ("adversarial", "popular", "random")
    for file in [path / f"coco_pope_{split}.json" for split in splits] if path.is_dir() else [path]:
        split = file.stem.removeprefix("coco_pope_")
        for where, entry in _lines(file):
            truth, number, image, text = _fields(entry, where, label=str, question_id=int, image=str, text=str)
            require(truth in ("yes", "no"), f"{where}: the label is {truth!r}, neither yes nor no")
            yield Question(f"{split}/{number}", image, text + SHORT, truth, split)  # each file numbers from 1


def _scienceqa(path: Path) -> Iterator[Question]:
    splits, problems = path / "pid_splits.json", path / "problems.json"
    every = _json(problems)
    for id in _fields(_json(splits), str(splits), test=list)[0]:
        where = f"{problems}, problem {id}"
        (problem,) = _fields(every, where, **{str(id): dict})
        choices, answer, hint, question = _fields(problem, where, choices=list, answer=int, hint=str, question=str)
        require(0 <= answer < len(choices) <= len(LETTERS), f"{where}: answer {answer} of {len(choices)} choices")
        options = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
        text = "\n".join([f"Context: {hint}"] * bool(hint) + [question] + options).strip()
        image = None if problem.get("image") is None else f"test/{id}/{_fields(problem, where, image=str)[0]}"
        yield Question(str(id), image, text + LETTER, LETTERS[answer])


def _textvqa(path: Path, beside: Path | None = None) -> Iterator[Question]:
    prompts = _ocr_prompts(beside) if beside else {}
    for where, entry in _entries(_json(path), path, "data"):
        fields = {"image_id": str, "question": str, "question_id": int, "answers": list}
        image, question, id, answers = _fields(entry, where, **fields)
        text = question.capitalize() + SHORT  # the file has no capitals, and LLaVA begins with one
        if beside:
            text = prompts.get((image, question.lower()), "")
            require(bool(text), f"{beside} has no prompt for {question!r} about {image}, of {where}")
        yield Question(str(id), f"{image}.jpg", text, _people(answers, where))


def _ocr_prompts(path: Path) -> dict[tuple[str, str], str]:
    """Returns LLaVA's prompts by picture and question. What its file calls question_id is the picture's id."""
    prompts = {}
    for where, entry in _lines(path):
        text, image = _fields(entry, where, text=str, question_id=str)
        prompts[image, text.split("\n")[0].lower()] = text
    return prompts


def _vqav2(path: Path, beside: Path | None = None) -> Iterator[Question]:
    # The test-dev questions are some of the test questions, about the same pictures.
    data = _json(path)
    pictures = _fields(data, str(path), data_subtype=str)[0].replace("-dev", "")
    truths = _annotations(beside) if beside else {}
    for where, entry in _entries(data, path, "questions"):
        number, image, question = _fields(entry, where, question_id=int, image_id=int, question=str)
        id = str(number)
        require(not beside or id in truths, f"{beside} has no answers to question {id}, of {where}")
        yield Question(id, f"COCO_{pictures}_{image:012d}.jpg", question + SHORT, *truths.get(id, (None,)))


def _annotations(path: Path) -> dict[str, tuple[tuple[str, ...], str]]:
    """Returns the ten answers to each question, and their type: yes/no, number or other."""
    truths = {}
    for where, entry in _entries(_json(path), path, "annotations"):
        given, id, kind = _fields(entry, where, answers=list, question_id=int, answer_type=str)
        answers = [_fields(one, where, answer=str)[0] for one in given]
        truths[str(id)] = _people(answers, where), kind
    return truths


def _gqa(path: Path) -> Iterator[Question]:
    every = _json(path)
    require(isinstance(every, dict), f"{path} should be an object with GQA's questions by their ids")
    for id, entry in every.items():
        where = f"{path}, question {id}"
        image, text = _fields(entry, where, imageId=str, question=str)
        if entry.get("isBalanced", True):  # the official code averages over these only
            yield Question(id, f"{image}.jpg", text + SHORT, _fields(entry, where, answer=str)[0])


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


def _fields(entry: Any, where: str, **kinds: type) -> list:
    """Returns the values of these keys, each of which must have the type that is given."""
    values = [entry.get(key) if isinstance(entry, dict) else None for key in kinds]
    for (key, kind), value in zip(kinds.items(), values, strict=True):
        if type(value) is not kind:  # not isinstance: true is no number
            raise UserError(f"{where}: {key!r} should be of type {kind.__name__}, not {value!r:.100}")
    return values


def _entries(data: Any, path: Path, key: str) -> Iterator[tuple[str, Any]]:
    """Yields the entries of a list in the JSON object of a file, each with its place."""
    for n, entry in enumerate(_fields(data, str(path), **{key: list})[0]):
        yield f"{path}, entry {n}", entry


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields the entries of a file with one JSON object per line, each with its place."""
    for n, line in enumerate(_text(path).split("\n"), 1):  # not splitlines, which also cuts at marks within a text
        if line.strip():
            yield f"{path}, line {n}", _parse(line, f"{path}, line {n}")


def _json(path: Path) -> Any:
    return _parse(_text(path), str(path))


def _text(path: Path) -> str:
    try:
        return files.read(path).decode()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text: {error}") from error


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}") from error
