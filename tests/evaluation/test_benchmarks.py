"""The official scores of hand-made predictions, official files in miniature, and evaluations that are killed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tinyspeed import UserError
from tinyspeed.evaluation import benchmarks, vqa
from tinyspeed.evaluation.benchmarks import option, run, score, submission, yes_no
from tinyspeed.evaluation.questions import Question, read

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."

# two answers are the same


@pytest.mark.parametrize(
    ("answer", "same"),
    [
        ("The Dog", "dog"),
        ("a an the", ""),
        ("Ten", "10"),
        ("none", "0"),
        ("two of a kind", "2 of kind"),
        ("dont", "don't"),
        ("Dont", "don't"),
        ("Im", "im"),  # its entry has a capital and is never met
        ("somebody'd", "somebodyd"),  # the published map has it the wrong way round
        ("let's", "let's"),
        ("yes.", "yes"),
        ("2.5", "2.5"),
        ("7.", "7"),
        (".5", ".5"),
        ("u.s.", "us"),
        ("1,000", "1000"),
        ("1,000 a-b", "1000 ab"),  # a number with a comma, and every mark goes
        ("a-b", "b"),  # a mark between letters is a space, and then there is an article
        ("x-ray", "x ray"),
        ("x- ray c-d", "x ray cd"),  # next to a space it goes, wherever it stands
        ("x -ray c-d", "x ray cd"),
        ("c-d\n-e", "cd e"),
        ("c-d- ", "c d"),
        ("red,green", "red green"),
        ("what?", "what"),
        ("it's 10:30", "it's 10:30"),  # neither apostrophe nor colon is a mark
        ("new\nyork\t", "new york"),
        ("x" + "." * 40, "x" + "." * 8),  # the official 32
    ],
)
def test_vqa_normalises(answer, same):
    assert vqa.normalise(answer) == same


@pytest.mark.parametrize(
    ("answer", "same"),
    [
        ("1,000", "1000"),
        ("red,green", "redgreen"),
        ("Men's", "men 's"),
        ("hes", "he's"),
        ("The COCA-COLA, inc.", "coca cola inc"),
        ("why?not", "whynot"),
    ],
)
def test_textvqa_normalises_in_its_own_way(answer, same):
    assert vqa.normalise_textvqa(answer) == same


WORDS = st.lists(
    st.sampled_from([*vqa.CONTRACTIONS, *vqa.NUMBERS, *vqa.ARTICLES, *vqa.PUNCTUATION, *" .'\n\t1é", "\u2028", "2,3"]),
    max_size=12,
).map("".join)


@given(WORDS | st.text(max_size=30))
def test_normalising_twice_is_normalising_once(answer):
    once = vqa.normalise(answer)
    assert vqa.normalise(once) == once


def test_but_not_in_textvqas_way():
    assert vqa.normalise_textvqa(vqa.normalise_textvqa("hes")) == "he 's"


def naive(answer, people):
    """Leave each one out in turn, and count."""
    each = []
    for left_out in range(len(people)):
        others = [said for number, said in enumerate(people) if number != left_out]
        each.append(min(1, sum(said == answer for said in others) / 3))
    return sum(each) / len(each)


@pytest.mark.parametrize(("alike", "worth"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (9, 1), (10, 1)])
def test_what_so_many_people_alike_are_worth(alike, worth):
    people = ["x"] * alike + [f"other {i}" for i in range(10 - alike)]
    assert vqa.agreement("x", people) == pytest.approx(worth)
    assert vqa.vqav2("X.", people) == vqa.textvqa("the x", people) == vqa.agreement("x", people)


ANSWERS = st.sampled_from(["yes", "Yes.", "no", "a dog", "dog", "two", "2", "men's", "t-shirt", "1,000", ""])


@given(ANSWERS, st.lists(ANSWERS, min_size=10, max_size=10), st.randoms())
def test_agreement_is_leaving_one_out(answer, people, random):
    assert vqa.agreement(answer, people) == pytest.approx(naive(answer, people), abs=1e-12)
    mixed = random.sample(people, k=10)
    for normalise, formula in ((vqa.normalise_textvqa, vqa.textvqa), (vqa.normalise, vqa.vqav2)):
        assert formula(answer, mixed) == formula(answer, people)
        if len(set(people)) > 1:
            want = naive(normalise(answer), [normalise(said) for said in people])
            assert formula(answer, people) == pytest.approx(want, abs=1e-12)


def test_where_all_people_agree_vqa_takes_their_answer_as_it_stands():
    assert vqa.vqav2("Yes.", ["yes"] * 10) == 1
    assert vqa.vqav2("a dog", ["a dog"] * 10) == 0  # what is handed in is "dog"
    assert vqa.textvqa("a dog", ["a dog"] * 10) == 1
    assert vqa.vqav2("a dog", ["a dog"] * 9 + ["cat"]) == 1


# reading a prediction


@pytest.mark.parametrize(
    ("prediction", "read"),
    [
        ("Yes", "yes"),
        ("yes, it is", "yes"),
        ("No.", "no"),
        ("No, there is a dog", "no"),
        ("there is not", "no"),
        ("There is. No dog", "yes"),  # the first sentence only
        (".No", "yes"),
        ("NO", "yes"),  # three words are looked for, and this is none of them
        ("nothing", "yes"),
        ("Yes\nNo", "yes"),  # words are between spaces
        ("", "yes"),
    ],
)
def test_pope_reads(prediction, read):
    assert yes_no(prediction) == read


@pytest.mark.parametrize(
    ("prediction", "read"),
    [
        ("B", "B"),
        ("B. apostrophe", "B"),
        ("B.", None),
        ("b", None),
        ("F", None),
        ("", None),
        ("AB", None),
        ("The answer is C.", "C"),
        ("I think so. The answer is C!", "C"),
        ("The answer is C", None),  # one character must follow
        ("The answer is A. The answer is B.", None),
        ("A. no. The answer is B.", "A"),
    ],
)
def test_llava_reads_a_letter(prediction, read):
    assert option(prediction) == read


# scores


def ask_all(truths, group=""):
    return [Question(str(i), None, "?", truth, group) for i, truth in enumerate(truths)]


def numbered(predictions):
    return {str(i): prediction for i, prediction in enumerate(predictions)}


def test_pope_by_hand():
    # 3 times yes in truth and 3 times said; 2 of them the same.
    questions = ask_all(["yes", "yes", "yes", "no", "no"], "random")
    got = score("pope", questions, numbered(["Yes", "yes, it is", "No.", "Yes", "there is not"]))
    want = {"accuracy": 60, "precision": 200 / 3, "recall": 200 / 3, "f1": 200 / 3, "yes ratio": 60}
    assert got == pytest.approx(want | {f"random {name}": value for name, value in want.items()})


def test_pope_averages_its_splits_and_not_its_questions():
    questions = [Question("a/1", None, "?", "yes", "a"), *(Question(f"b/{i}", None, "?", "no", "b") for i in range(3))]
    got = score("pope", questions, {"a/1": "yes", "b/0": "yes", "b/1": "yes", "b/2": "no"})
    assert got["a accuracy"] == 100
    assert got["b accuracy"] == pytest.approx(100 / 3)
    assert got["accuracy"] == pytest.approx(200 / 3)
    assert got["b precision"] == got["b recall"] == got["b f1"] == 0


def test_a_model_that_never_says_yes_has_no_precision_and_no_error():
    got = score("pope", ask_all(["yes", "no"]), numbered(["no", "no"]))
    assert (got["accuracy"], got["precision"], got["recall"], got["f1"], got["yes ratio"]) == (50, 0, 0, 0, 0)


def test_scienceqa_by_hand():
    questions = [Question(str(i), "test/1/image.png" if i < 2 else None, "?", "B") for i in range(4)]
    got = score("scienceqa", questions, numbered(["B", "A", "B. word", "The answer is B."]))
    assert got == {"accuracy": 75, "image accuracy": 50}
    assert score("scienceqa", questions[2:], {"2": "B", "3": "nothing"}) == {"accuracy": 50}


def test_gqa_by_hand():
    got = score("gqa", ask_all(["yes", "red", "red", "red"]), numbered(["Yes.", "red..", "dark red", " red"]))
    assert got == {"accuracy": 50}


def test_vqav2_by_hand():
    people = [*["2"] * 3, *["two dogs"] * 3, *["3"] * 3, "many"]
    questions = [
        Question("0", None, "?", tuple(people), "number"),
        Question("1", None, "?", ("yes",) * 10, "yes/no"),
        Question("2", None, "?", ("no",) * 10, "yes/no"),
    ]
    got = score("vqav2", questions, numbered(["Two", "Yes", "yes"]))
    assert got == pytest.approx({"accuracy": (90 + 100 + 0) / 3, "number": 90, "yes/no": 50})
    assert submission(questions, numbered(["Two", "Yes", "A dog."]))[::2] == [
        {"question_id": 0, "answer": "2"},
        {"question_id": 2, "answer": "dog"},
    ]


def test_textvqa_by_hand():
    people = (*["Coca-Cola"] * 2, *["coke"] * 8)
    assert score("textvqa", ask_all([people, people]), numbered(["coca cola", "Coke."])) == {
        "accuracy": pytest.approx(80)
    }


TRUTHS = {
    "pope": st.sampled_from(["yes", "no"]),
    "scienceqa": st.sampled_from("ABCDE"),
    "textvqa": st.lists(ANSWERS, min_size=10, max_size=10).map(tuple),
    "vqav2": st.lists(ANSWERS, min_size=10, max_size=10).map(tuple),
    "gqa": ANSWERS,
}
SAID = ANSWERS | st.sampled_from(["No", "A", "B. x", "The answer is C."]) | st.text(max_size=9)


@pytest.mark.parametrize("task", TRUTHS)
@given(st.data())
def test_scores_are_percentages_and_the_order_does_not_matter(task, data):
    asked = data.draw(st.lists(st.tuples(TRUTHS[task], SAID, st.sampled_from(["", "x", "y"])), min_size=1, max_size=8))
    questions = [Question(str(i), None, "?", truth, group) for i, (truth, _, group) in enumerate(asked)]
    predictions = numbered([said for _, said, _ in asked])
    got = score(task, questions, predictions)
    assert all(0 <= value <= 100 for value in got.values())
    assert score(task, questions, dict(reversed(predictions.items()))) == got
    assert score(task, data.draw(st.permutations(questions)), predictions) == got


def test_a_score_is_over_all_questions_or_there_is_none():
    questions = ask_all(["yes", "no", "no"])
    with pytest.raises(UserError, match="no prediction to 2 of 3 questions, the first of them 1"):
        score("pope", questions, {"0": "yes"})
    with pytest.raises(UserError, match="there are predictions to other questions, such as 7"):
        score("pope", questions, {"0": "yes", "1": "yes", "2": "no", "7": "no"})
    with pytest.raises(UserError, match="no prediction"):
        submission(questions, {})
    with pytest.raises(UserError, match="no questions"):
        score("gqa", [], {})
    with pytest.raises(UserError, match="not known"):
        score("vqav2", [Question("1", None, "?", None)], {"1": "yes"})


# official files


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(entry) + "\n" for entry in content) if isinstance(content, list) else json.dumps(content)
    path.write_text(lines)
    return path


def pope_entry(n, label="yes", **more):
    text = f"Is there a dog in picture {n}?"
    return {"question_id": n, "image": f"COCO_val2014_{n:012d}.jpg", "text": text, "label": label} | more


def test_pope_files(tmp_path):
    for split in ("popular", "random", "adversarial"):
        write(tmp_path / f"coco_pope_{split}.json", [pope_entry(0), pope_entry(1, "no")])
    questions = read("pope", tmp_path)
    assert [q.id for q in questions] == [f"{s}/{n}" for s in ("adversarial", "popular", "random") for n in (0, 1)]
    text = "Is there a dog in picture 1?" + SHORT
    assert questions[1] == Question("adversarial/1", "COCO_val2014_000000000001.jpg", text, "no", "adversarial")
    assert read("pope", tmp_path / "coco_pope_popular.json") == questions[2:4]
    (tmp_path / "coco_pope_random.json").unlink()
    with pytest.raises(UserError, match=r"coco_pope_random\.json: No such file"):
        read("pope", tmp_path)


def problem(**more):
    choices = ["chiasmus", "apostrophe"]
    return {"question": "Which\nfigure?", "choices": choices, "answer": 1, "hint": "", "image": None} | more


def test_scienceqa_files(tmp_path):
    problems = {
        "1": problem(),
        "4": problem(),
        "5": problem(hint="Read this.", image="image.png", choices=["yes", "no "]),
        "6": problem(),
    }
    write(tmp_path / "problems.json", problems)
    write(tmp_path / "pid_splits.json", {"train": ["1"], "test": ["5", "4"]})
    assert read("scienceqa", tmp_path) == [
        Question("5", "test/5/image.png", "Context: Read this.\nWhich\nfigure?\nA. yes\nB. no" + LETTER, "B"),
        Question("4", None, "Which\nfigure?\nA. chiasmus\nB. apostrophe" + LETTER, "B"),
    ]


def test_textvqa_files(tmp_path):
    people = [f"word {i}" for i in range(10)]
    entry = {"question_id": 34602, "image_id": "00ff", "question": "what is Sony's name?", "answers": people}
    path = write(tmp_path / "TextVQA_0.5.1_val.json", {"data": [entry, entry | {"question_id": 2, "question": "who?"}]})
    first = Question("34602", "00ff.jpg", "What is sony's name?" + SHORT, tuple(people))
    assert read("textvqa", path)[0] == first
    text = "What is sony's name?\nReference OCR token: So, \u2028ny" + SHORT
    lines = [
        {"question_id": "00ff", "text": text},
        {"question_id": "00ff", "text": "Who?\nReference OCR token: " + SHORT},
    ]
    ocr = tmp_path / "ocr.jsonl"
    ocr.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    assert [q.text for q in read("textvqa", path, ocr)] == [text, lines[1]["text"]]
    write(ocr, lines[:1])
    with pytest.raises(UserError, match=r"ocr.jsonl has no prompt for 'who\?' about 00ff, of .*entry 1"):
        read("textvqa", path, ocr)


def test_vqav2_files(tmp_path):
    entry = {"question_id": 7001, "image_id": 7, "question": "How many?"}
    path = write(tmp_path / "questions.json", {"data_subtype": "val2014", "questions": [entry]})
    people = [{"answer": str(i), "answer_id": i} for i in range(10)]
    truth = {"question_id": 7001, "answers": people, "answer_type": "number"}
    annotations = write(tmp_path / "annotations.json", {"annotations": [truth]})
    text, image = "How many?" + SHORT, "COCO_val2014_000000000007.jpg"
    assert read("vqav2", path, annotations) == [Question("7001", image, text, tuple("0123456789"), "number")]
    assert read("vqav2", path) == [Question("7001", image, text, None)]
    write(path, {"data_subtype": "test-dev2015", "questions": [entry]})
    assert read("vqav2", path)[0].image == "COCO_test2015_000000000007.jpg"
    write(annotations, {"annotations": []})
    with pytest.raises(UserError, match="has no answers to question 7001"):
        read("vqav2", path, annotations)


def test_gqa_files(tmp_path):
    entry = {"question": "Is it?", "imageId": "n1", "answer": "yes", "isBalanced": True}
    path = write(tmp_path / "questions.json", {"20": entry, "30": entry | {"isBalanced": False}})
    assert read("gqa", path) == [Question("20", "n1.jpg", "Is it?" + SHORT, "yes")]


@pytest.mark.parametrize(
    ("task", "content", "message"),
    [
        ("pope", [pope_entry(0), pope_entry(1, "maybe")], "line 2: the label is 'maybe', neither yes nor no"),
        ("pope", [pope_entry(0), pope_entry(1, text=None)], "line 2: 'text' should be of type str, not None"),
        ("pope", [pope_entry(0), [1]], "line 2: 'label' should be of type str"),
        ("pope", [pope_entry(True)], "'question_id' should be of type int, not True"),
        ("pope", [pope_entry(3), pope_entry(3)], "holds question file/3 twice"),
        ("pope", [], "holds no questions"),
        ("textvqa", {"data": {}}, "'data' should be of type list"),
        ("textvqa", {"data": [{"image_id": "a", "question": "b"}]}, "entry 0: 'question_id' should be of type int"),
        (
            "textvqa",
            {"data": [{"image_id": "a", "question": "b", "question_id": 1, "answers": ["x"] * 9}]},
            "entry 0: 10 people's answers",
        ),
        ("vqav2", {"questions": []}, "'data_subtype' should be of type str"),
        ("gqa", [1], "should be an object"),
        ("gqa", {"1": {"imageId": 5}}, "question 1: 'imageId' should be of type str, not 5"),
    ],
)
def test_a_wrong_entry_is_named(tmp_path, task, content, message):
    with pytest.raises(UserError, match=message) as caught:
        read(task, write(tmp_path / "file.json", content))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("problems", "message"),
    [
        ({}, "problem 4: '4' should be of type dict, not None"),
        ("text", "problem 4: '4' should be of type dict, not None"),
        ({"4": problem(answer=2)}, "problem 4: answer 2 of 2 choices"),
        ({"4": problem(choices=["x"] * 6)}, "problem 4: answer 1 of 6 choices"),
        ({"4": problem(hint=None)}, "problem 4: 'hint' should be of type str"),
    ],
)
def test_a_wrong_problem_is_named(tmp_path, problems, message):
    write(tmp_path / "pid_splits.json", {"test": ["4"]})
    write(tmp_path / "problems.json", problems)
    with pytest.raises(UserError, match=message):
        read("scienceqa", tmp_path)


def test_a_file_that_is_not_json_is_named(tmp_path):
    path = tmp_path / "file.json"
    path.write_text(json.dumps(pope_entry(0)) + "\n{")
    with pytest.raises(UserError, match=r"file\.json is not JSON"):
        read("gqa", path)
    with pytest.raises(UserError, match=r"file\.json, line 2 is not JSON"):
        read("pope", path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is not text"):
        read("gqa", path)
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match="is not JSON"):
        read("gqa", path)


def test_wrong_names_are_errors(tmp_path):
    with pytest.raises(UserError, match="unknown benchmark 'textvqq'; did you mean 'textvqa'"):
        read("textvqq", tmp_path)
    with pytest.raises(UserError, match="unknown benchmark"):
        score("mme", [], {})
    with pytest.raises(UserError, match="unknown benchmark"):
        run("mme", [], tmp_path, lambda *_: "", tmp_path / "out", model="m", prompts=[])
    with pytest.raises(UserError, match="pope has no second file"):
        read("pope", tmp_path, tmp_path / "x")
    with pytest.raises(UserError, match="cannot read"):
        read("scienceqa", tmp_path / "nowhere")


# asking, and being killed

QUESTIONS = [Question(f"q{i}", None, f"How many\u2028is {i}?", "0") for i in range(4)]


def answers(asked):
    """A model that notes what it is asked."""

    def ask(pictures, text):
        asked.append(text)
        return f"it's «{len(asked[-1])}»\n{text[-2]}"

    return ask


def go(out, questions=QUESTIONS, task="gqa", model="m", asked=None, template="USER: {} ASSISTANT:"):
    prompts, ask = [template.format(q.text) for q in questions], answers([] if asked is None else asked)
    return run(task, questions, Path("."), ask, out, model=model, prompts=prompts, bar=False)


def test_a_run_asks_each_question_once_and_keeps_what_was_said(tmp_path):
    asked, out = [], tmp_path / "new" / "out.jsonl"
    predictions = go(out, asked=asked)
    assert asked == [q.text for q in QUESTIONS]
    header, *lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert (header["task"], header["model"], header["questions"]) == ("gqa", "m", 4)
    assert lines == [{"id": q.id, "prompt": q.text, "prediction": predictions[q.id]} for q in QUESTIONS]
    assert list(predictions) == [q.id for q in QUESTIONS]


def test_wherever_the_file_was_cut_off_only_the_rest_is_asked(tmp_path):
    out = tmp_path / "out.jsonl"
    predictions = go(out)
    whole = out.read_bytes()
    for cut in range(len(whole) + 1):
        out.write_bytes(whole[:cut])
        asked = []
        assert go(out, asked=asked) == predictions
        assert out.read_bytes() == whole
        done = max(0, whole[:cut].count(b"\n") - 1)
        assert asked == [q.text for q in QUESTIONS[done:]]


SCRIPT = """
import json, os, signal, sys
from pathlib import Path
from tinyspeed.evaluation.benchmarks import Question, run

questions = [Question(*fields) for fields in json.loads(sys.argv[2])]
said = []
def ask(pictures, text):
    if len(said) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    said.append(text)
    return f"it's «{len(text)}»\\n{text[-2]}"
prompts = [f"USER: {q.text} ASSISTANT:" for q in questions]
run("gqa", questions, Path("."), ask, Path(sys.argv[1]), model="m", prompts=prompts, bar=False)
"""


def test_a_killed_run_goes_on(tmp_path):
    out = tmp_path / "out.jsonl"
    fields = json.dumps([[q.id, q.image, q.text, q.truth] for q in QUESTIONS])
    environment = os.environ | {"PYTHONPATH": str(Path(benchmarks.__file__).parents[2])}
    killed = subprocess.run([sys.executable, "-c", SCRIPT, out, fields], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    asked = []
    predictions = go(out, asked=asked)
    assert asked == [q.text for q in QUESTIONS[2:]]
    assert predictions == go(tmp_path / "other.jsonl")


def test_another_evaluations_file_is_refused_and_untouched(tmp_path):
    out = tmp_path / "out.jsonl"
    go(out)
    whole = out.read_bytes()
    reworded = [*QUESTIONS[:3], Question("q3", None, "Else?", "0")]
    for other, differs in [
        ({"task": "pope"}, "was made with task = gqa, not pope"),
        ({"model": "n"}, "was made with model = m, not n"),
        ({"questions": QUESTIONS[:3]}, "was made with questions = 4, not 3"),
        ({"questions": reworded}, "other questions, or the same ones in other words"),
        ({"template": "A chat. USER: {} ASSISTANT:"}, "the same ones in other words, another chat template"),
    ]:
        with pytest.raises(UserError, match=rf"{differs}.*: choose another file \(--out\)") as caught:
            go(out, **other)
        assert "{" not in str(caught.value), "a user reads words, not our header"
    assert out.read_bytes() == whole
    go(out, questions=[Question(q.id, q.image, q.text, "another truth") for q in QUESTIONS])  # the same was asked


@pytest.mark.parametrize("content", [b"important\n", b"\x89PNG", b"{}\n", b'{"task": "gqa", "model": "x'])
def test_a_file_of_something_else_is_refused_and_untouched(tmp_path, content):
    out = tmp_path / "out.jsonl"
    out.write_bytes(content)
    with pytest.raises(UserError, match="does not begin as predictions do: choose another file"):
        go(out)
    assert out.read_bytes() == content


def test_a_damaged_file_is_refused(tmp_path):
    out = tmp_path / "out.jsonl"
    go(out)
    header, *lines = out.read_bytes().splitlines(keepends=True)
    for wrong in ([lines[1]], [*lines, lines[0]], [b"\0\0\n"], [b'{"id": "q0"}\n'], [b"3\n"]):
        out.write_bytes(header + b"".join(wrong))
        with pytest.raises(UserError, match="is damaged"):
            go(out)


def test_two_evaluations_do_not_share_a_file(tmp_path):
    out, link = tmp_path / "out.jsonl", tmp_path / "link.jsonl"
    link.symlink_to(out)

    def ask(pictures, text):
        with pytest.raises(UserError, match=r"another process is writing .*; choose another name"):
            go(link)
        return "no"

    run("gqa", QUESTIONS, Path("."), ask, out, model="m", prompts=[""] * 4, bar=False)
    assert out.read_bytes().count(b"\n") == 5


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, colour in (("red.png", (255, 0, 0)), ("grey.png", 90)):
        Image.new("L" if colour == 90 else "RGB", (5, 4), colour).save(folder / name)
    return folder


def test_a_question_comes_with_its_picture(tmp_path, pictures):
    questions = [Question("1", "red.png", "?", ""), Question("2", None, "?", ""), Question("3", "grey.png", "?", "")]
    ask = lambda given, text: str([(image.mode, image.size, image.getpixel((0, 0))) for image in given])
    assert run("gqa", questions, pictures, ask, tmp_path / "out", model="m", prompts=["?"] * 3, bar=False) == {
        "1": "[('RGB', (5, 4), (255, 0, 0))]",
        "2": "[]",
        "3": "[('RGB', (5, 4), (90, 90, 90))]",
    }


@pytest.mark.parametrize("name", ["../secret.png", "nowhere.png", "/etc/passwd"])
def test_every_picture_is_looked_for_before_anything_is_asked(tmp_path, pictures, name):
    Image.new("RGB", (2, 2)).save(tmp_path / "secret.png")
    questions = [Question("1", "red.png", "?", ""), Question("2", name, "?", "")]
    with pytest.raises(UserError, match="gqa question 2"):
        run("gqa", questions, pictures, pytest.fail, tmp_path / "out", model="m", prompts=["?"] * 2, bar=False)
