"""Official questions and official formulas: what a trained model is worth, in the numbers that papers print.

    questions = read("pope", Path("coco"))
    predictions = run("pope", questions, Path("val2014"), ask, Path("pope.jsonl"), model="mine")
    score("pope", questions, predictions)               # {"accuracy": 87.0, "precision": ..., "f1": 85.9, ...}, percent

What counts as right is what each benchmark's own code counts as right:

    pope        "no" if the first sentence has the word No, no or not, otherwise "yes"; each split, and the splits' mean
    scienceqa   "B", "B. ..." or a single "The answer is B."; of all questions, and of those with a picture
    textvqa     agreement with ten people, as TextVQA compares words (`vqa.py`)
    vqav2       agreement with ten people, as VQA does (`vqa.py`); of all questions, and of each type of answer
    gqa         the very word; in lower case and without periods at its end, as LLaVA submits it

ScienceQA's own code guesses at random if it finds no letter; here, as in LLaVA's code, that is wrong. Where an official
formula divides by zero (POPE's precision of a model that never says yes) the value is 0. A question without a
prediction is an error, since the mean over some of the questions is another number.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

from PIL import Image
from tqdm import tqdm

from ..data import images
from ..util import UserError, counted, files, located, require, require_known
from . import vqa
from .questions import LETTERS, READERS, Question

Scores = dict[str, float]
Scorer = Callable[[list[Question], dict[str, str]], Scores]


def score(task: str, questions: list[Question], predictions: dict[str, str]) -> Scores:
    """Returns the benchmark's numbers, in percent."""
    require_known("benchmark", task, READERS)
    _require_complete(questions, predictions)
    if any(question.truth is None for question in questions):
        raise UserError(f"the answers to these {task} questions are not known: read the annotations too, or submit")
    return SCORERS[task](questions, predictions)


def submission(questions: list[Question], predictions: dict[str, str]) -> list[dict]:
    """Returns what VQAv2's server takes, to be saved as JSON."""
    _require_complete(questions, predictions)
    return [{"question_id": int(q.id), "answer": vqa.normalise(predictions[q.id])} for q in questions]


def _require_complete(questions: list[Question], predictions: dict[str, str]) -> None:
    require(bool(questions), "there are no questions to score")
    ids = [question.id for question in questions]
    if missing := [id for id in ids if id not in predictions]:
        lacks = f"{len(missing)} of {counted(len(ids), 'question')}"
        raise UserError(f"no prediction to {lacks}, the first of them {missing[0]}")
    if strange := sorted(predictions.keys() - set(ids)):
        raise UserError(f"there are predictions to other questions, such as {strange[0]}")


def _pope(questions: list[Question], predictions: dict[str, str]) -> Scores:
    splits = {}
    for split in sorted({q.group for q in questions}):
        pairs = [(yes_no(predictions[q.id]), q.truth) for q in questions if q.group == split]
        splits[split] = _precision_and_recall(pairs)
    scores = {name: fmean(each[name] for each in splits.values()) for name in splits[split]}
    return scores | {f"{split} {name}": value for split, each in splits.items() for name, value in each.items()}


def _precision_and_recall(pairs: list[tuple[str, str]]) -> Scores:
    """Returns accuracy, and precision, recall and F1 = 2PR / (P + R) = 2 both / (said + true) of the answer "yes"."""
    said, true = ([pair[side] for pair in pairs].count("yes") for side in (0, 1))
    both = pairs.count(("yes", "yes"))
    return {
        "accuracy": 100 * fmean(prediction == truth for prediction, truth in pairs),
        "precision": 100 * both / said if said else 0.0,
        "recall": 100 * both / true if true else 0.0,
        "f1": 200 * both / (said + true) if both else 0.0,
        "yes ratio": 100 * said / len(pairs),
    }


def yes_no(prediction: str) -> str:
    """Returns what POPE reads in a prediction."""
    words = prediction.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def _scienceqa(questions: list[Question], predictions: dict[str, str]) -> Scores:
    right = {q: option(predictions[q.id]) == q.truth for q in questions}
    pictured = [right[q] for q in questions if q.image]
    return {"accuracy": 100 * fmean(right.values())} | ({"image accuracy": 100 * fmean(pictured)} if pictured else {})


def option(prediction: str) -> str | None:
    """Returns the letter that LLaVA reads in a prediction. In "B." it reads none, since no words follow the period."""
    if prediction in list(LETTERS):
        return prediction
    if re.match(rf"[{LETTERS}]\. ", prediction):
        return prediction[0]
    letters = re.findall("The answer is ([A-Z]).", prediction)
    return letters[0] if len(letters) == 1 else None


def _by_agreement(agreement: Callable[[str, tuple[str, ...]], float]) -> Scorer:
    """Returns the scorer of a benchmark with ten people's answers: over all questions, and over each group of them."""

    def scorer(questions: list[Question], predictions: dict[str, str]) -> Scores:
        points: dict[str, list[float]] = {"accuracy": []}
        for question in questions:
            value = 100 * agreement(predictions[question.id], question.truth)
            points["accuracy"].append(value)
            if question.group:
                points.setdefault(question.group, []).append(value)
        return {name: fmean(values) for name, values in points.items()}

    return scorer


def _gqa(questions: list[Question], predictions: dict[str, str]) -> Scores:
    return {"accuracy": 100 * fmean(predictions[q.id].rstrip(".").lower() == q.truth for q in questions)}


SCORERS: dict[str, Scorer] = {
    "pope": _pope,
    "scienceqa": _scienceqa,
    "textvqa": _by_agreement(vqa.textvqa),
    "vqav2": _by_agreement(vqa.vqav2),
    "gqa": _gqa,
}


def run(
    task: str,
    questions: list[Question],
    image_folder: Path,
    ask: Callable[[list[Image.Image], str], str],
    out: Path,
    *,
    model: str,
    prompts: list[str],
    bar: bool = True,
) -> dict[str, str]:
    """Asks a model every question. Each answer is at once written to `out`, a line each, so that a killed run goes on
    from there. The first line says what was asked of which model, in which `prompts` (of which `ask` gets only the
    question), and a file with another first line is refused, as is one that another process writes."""
    require_known("benchmark", task, READERS)
    header = _header(task, questions, prompts, model)
    require(not files.special(out), f"{out} is not a file")
    with files.errors_about(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = files.locked(Path(os.path.realpath(out)), f"another process is writing {out}; choose another name")
    with lock:
        predictions = _resume(out, header, questions)
        rest = questions[len(predictions) :]
        # All pictures are looked for before the first question is asked, so that none is found missing after hours.
        paths = [q.image and images.inside(image_folder, q.image, f"{task} question {q.id}") for q in rest]
        progress = tqdm(total=len(questions), initial=len(predictions), desc=task, unit="question", disable=not bar)
        with files.appending(out) as log, progress:
            if not out.stat().st_size:
                log(header)
            for question, path in zip(rest, paths, strict=True):
                with located(where := f"{task} question {question.id}"):
                    pictures = [images.decode(path, where)] if path else []
                    prediction = ask(pictures, question.text)
                log(_line({"id": question.id, "prompt": question.text, "prediction": prediction}))
                predictions[question.id] = prediction
                progress.update()
    return predictions


def _header(task: str, questions: list[Question], prompts: list[str], model: str) -> bytes:
    asked = json.dumps([(q.id, q.image, prompt) for q, prompt in zip(questions, prompts, strict=True)])
    digest = hashlib.sha256(asked.encode()).hexdigest()
    return _line({"task": task, "model": model, "questions": len(questions), "digest": digest})


def _resume(out: Path, header: bytes, questions: list[Question]) -> dict[str, str]:
    """Returns what was predicted already, and cuts off half a line at the end of `out`."""
    held = files.read(out)
    if header != held and header.startswith(held):  # it is empty, or has half a header
        with files.errors_about(out):
            os.truncate(out, 0)
        return {}
    if not held.startswith(header):
        what = _difference(held.split(b"\n")[0], json.loads(header))
        raise UserError(f"{out} {what}: choose another file (--out)")
    whole = held[: held.rindex(b"\n") + 1]
    try:
        entries = [json.loads(line) for line in whole.split(b"\n")[1:-1]]
        done = [(entry["id"], entry["prediction"]) for entry in entries]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{out} is damaged, delete it to start again: {error!r}") from error
    if [id for id, _ in done] != [question.id for question in questions[: len(done)]]:
        raise UserError(f"{out} is damaged, delete it to start again: its lines are not the questions in their order")
    with files.errors_about(out):
        os.truncate(out, len(whole))
    return dict(done)


def _difference(header: bytes, wanted: dict) -> str:
    """Says how a file with this header differs from the one that is wanted."""
    try:
        held = json.loads(header)
        key = next(key for key in wanted if held[key] != wanted[key])
    except (ValueError, KeyError, TypeError, StopIteration):
        return "does not begin as predictions do"
    if key == "digest":
        return "answers other questions, or the same ones in other words, another chat template or about other pictures"
    return f"was made with {key} = {held[key]}, not {wanted[key]}"


def _line(entry: dict) -> bytes:
    return json.dumps(entry).encode() + b"\n"
