"""Own pictures, own JSON: every record is looked at before step 0, and what comes out is what the processor makes."""

import errno
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import tracemalloc
import weakref
from io import BytesIO

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support import tiny
from support.album import album
from support.waiting import HANGS

from tinyspeed import UserError
from tinyspeed.data import conversations, images, loader, record_files
from tinyspeed.data.conversations import Conversations
from tinyspeed.data.examples import collate
from tinyspeed.recipe import DataSection
from tinyspeed.rows import IGNORE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("album")
    album(folder)
    return folder


def source(folder, family="llava", shared=None, bar=False, **how) -> Conversations:
    how = {
        "kind": "chat",
        "file": str(folder / "train.json"),
        "images": str(folder / "images"),
        "workers": 0,
        "max_rows": 512,
        **how,
    }
    return Conversations(DataSection(**how), tiny.processor(family), folder / "cache", bar=bar, **(shared or {}))


def rewrite(folder, tmp_path, change):
    """A copy of the album whose records went through `change`."""
    shutil.copytree(folder, tmp_path / "copy")
    file = tmp_path / "copy" / "train.json"
    records = json.loads(file.read_text())
    change(records)
    file.write_text(json.dumps(records))
    return tmp_path / "copy"


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_lengths_known_beforehand_are_those_of_the_example(folder, family):
    made = source(folder, family)
    assert len(made) == 12
    for i in range(len(made)):
        text, visual, answers = made.lengths(i)
        example = made.example(i)
        assert len(example.input_ids) == text + sum(visual)
        assert int((example.input_ids == tiny.IMAGE).sum()) == sum(visual)
        assert int((example.labels[1:] != IGNORE).sum()) == answers > 0
        assert (not example.visual) == (not visual)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_an_example_is_what_transformers_own_processor_makes(folder, family):
    made, processor = source(folder, family), tiny.processor(family)
    for i in range(len(made)):
        example, record = made.example(i), made.records[i]
        pictures = [Image.open(folder / "images" / name).convert("RGB") for name in record.images]
        theirs = processor(images=pictures or None, text=made.chat.render(record.turns)[0], return_tensors="pt")
        assert torch.equal(example.input_ids, theirs["input_ids"][0])
        if pictures:
            assert torch.equal(example.visual["pixel_values"], theirs["pixel_values"])
        if family == "llava_next" and pictures:
            assert torch.equal(example.visual["image_sizes"], theirs["image_sizes"])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_batch_goes_through_the_model_and_gives_transformers_own_loss(folder, family):
    from tinyspeed import DualSpeed
    from tinyspeed.scheduler import Plan

    made = source(folder, family)
    batch = collate([made.example(i) for i in range(len(made))], tiny.PAD)
    net = tiny.model(family)
    theirs = tiny.twin(net)(**batch).loss
    assert not tiny.difference(DualSpeed(net).train()(**batch, plan=Plan("full")).loss, theirs)


def test_workers_make_the_same_batches_in_the_same_order(folder):
    made = source(folder)
    parts = [[0, 3], [5], [2, 7, 1], [11], [4, 6]]
    state = torch.get_rng_state()
    alone, helped = list(loader.batches(made, parts, 2)), list(loader.batches(made, parts, 2, workers=2))
    assert torch.equal(torch.get_rng_state(), state), "dropout's random numbers are not the loader's to draw"
    assert len(alone) == len(helped) == len(parts)
    for a, b in zip(alone, helped, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@settings(max_examples=15)
@given(data=st.data())
def test_lengths_are_those_of_the_example_for_pictures_of_any_size(family, data, tmp_path_factory):
    """Also of JPEGs beyond the limit, of which a part of the size is decoded. And the model makes as many features."""
    home = tmp_path_factory.mktemp("sizes")
    sides = st.integers(8, 150)
    sizes = data.draw(st.lists(st.tuples(sides, sides), min_size=1, max_size=3))
    for k, (width, height) in enumerate(sizes):
        exif = Image.Exif()
        exif[0x0112] = data.draw(st.sampled_from([1, 6]))
        Image.effect_noise((width, height), 50).save(home / f"{k}.jpg", exif=exif)
    turns = [{"from": "human", "value": "<image>" * len(sizes)}, {"from": "gpt", "value": "Yes."}]
    record = {"images": [f"{k}.jpg" for k in range(len(sizes))], "conversations": turns}
    (home / "train.json").write_text(json.dumps([record]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "MOST_PIXELS", 75 * 75)
        made = source(home, family, images=str(home))
        (text, visual, answers), example = made.lengths(0), made.example(0)
    assert (example.input_ids == tiny.IMAGE).sum() == sum(visual) == len(example.input_ids) - text
    assert (example.labels[1:] != IGNORE).sum() == answers
    assert len(example.visual["pixel_values"]) == len(sizes)
    shown = [(1, 1)] * len(sizes) if family == "llava" else example.visual["image_sizes"].tolist()
    assert [sum(tiny.image_rows(family, size)) for size in shown] == visual


def test_one_decoded_picture_of_a_record_is_in_memory_at_a_time(folder, family, monkeypatch):
    made, decoded, original = source(folder, family), [], images.decode

    def decode(*arguments):
        assert not any(picture() for picture in decoded)
        picture = original(*arguments)
        decoded.append(weakref.ref(picture))
        return picture

    monkeypatch.setattr(images, "decode", decode)
    assert len(made.example(2).visual["pixel_values"]) == len(decoded) == 2


def damage(file):
    """In the middle, so that header and end are sound."""
    content = bytearray(file.read_bytes())
    if file.suffix == ".jpg":
        del content[len(content) // 2 : len(content) // 2 + 99]
        Image.open(BytesIO(content)).load()  # Pillow finds no fault in it
    else:
        content[len(content) // 2] ^= 0xFF
    file.write_bytes(bytes(content))


@pytest.mark.parametrize(("record", "name"), [(1, "p1-0.png"), (4, "p4-0.jpg"), (2, "p2-1.jpg")])
def test_a_picture_damaged_in_the_middle_is_named_when_it_is_decoded(folder, tmp_path, record, name):
    copy = rewrite(folder, tmp_path, lambda records: None)
    damage(copy / "images" / name)
    made = source(copy)
    for workers in (0, 1):
        with pytest.raises(UserError, match=rf"record {record + 1} \(id r{record}\).*{name}") as caught:
            list(loader.batches(made, [[0], [record]], 2, workers=workers))
        assert "Traceback" not in str(caught.value)
        assert not multiprocessing.active_children(), "nobody waits for workers at exit, whoever keeps the error"


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("record", "name"), [(1, "p1-0.png"), (4, "p4-0.jpg"), (2, "p2-1.jpg")])
def test_with_skip_bad_nothing_is_learned_of_a_picture_damaged_in_the_middle(
    folder, tmp_path, capfd, workers, record, name
):
    copy = rewrite(folder, tmp_path, lambda records: None)
    damage(copy / "images" / name)
    made, whole = source(copy, skip_bad=True), source(folder)
    batch, sound = (next(loader.batches(m, [[record, 5]], tiny.PAD, workers=workers)) for m in (made, whole))
    assert torch.equal(batch["input_ids"], sound["input_ids"])
    assert (batch["labels"][0] == IGNORE).all()
    assert torch.equal(batch["labels"][1], sound["labels"][1])
    assert batch["pixel_values"].shape == sound["pixel_values"].shape
    assert not torch.equal(batch["pixel_values"][0], sound["pixel_values"][0])
    assert f"left out: train.json: record {record + 1} (id r{record})" in capfd.readouterr().err


def test_workers_leave_signals_to_the_main_process(monkeypatch):
    monkeypatch.setattr(loader.Queue, "_on_queue_feeder_error", None)  # restored afterwards
    before = signal.getsignal(signal.SIGINT)
    try:
        loader._begin(0)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_a_worker_that_is_killed_is_an_error_with_advice():
    """torch's own words; killing one for real raises them wherever the test runner happens to be."""
    with pytest.raises(UserError, match=r"was killed, .* data\.workers"), loader.explaining_crashes():
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
    with pytest.raises(RuntimeError, match="size of tensor"), loader.explaining_crashes():
        raise RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")


def stands_still_at_2(part: int) -> int:
    if part == 2:
        os.kill(os.getpid(), signal.SIGSTOP)
    return part


def test_a_worker_that_stands_still_is_named_and_waited_for(monkeypatch):
    said = []

    def wake(text: str, **_) -> None:
        said.append(text)
        for pid in re.findall(r"(\d+) is T \(stopped\)", text):
            os.kill(int(pid), signal.SIGCONT)

    monkeypatch.setattr(loader, "PATIENCE", 0.1)
    monkeypatch.setattr(loader, "print", wake, raising=False)
    assert list(loader.in_workers(stands_still_at_2, range(5), 1)) == [0, 1, 2, 3, 4]
    assert re.match(r"no batch for 0 s, from the processes .*\d+ is T \(stopped\)", said[-1])


def test_a_full_dev_shm_is_named_with_the_way_out(folder, monkeypatch):
    """The semaphores of the workers' queues are files there."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", full)
    with pytest.raises(UserError, match=r"cannot write /dev/shm \(data\.workers = 0 does without it\): No space left"):
        next(loader.batches(source(folder), [[0]], 0, workers=1))


def test_a_picture_too_large_for_the_memory_is_named(folder, monkeypatch):
    made = source(folder)
    monkeypatch.setattr("tinyspeed.data.images.decode", lambda *_: np.empty(1 << 58))
    with pytest.raises(UserError, match=r"^train\.json: record 2 \(id r1\): the memory of this machine is too small"):
        made.example(1)


def test_a_batch_that_a_worker_cannot_hand_over_ends_the_wait_for_it(folder, tmp_path, monkeypatch):
    """As where TMPDIR is a path that is too long for the name of a socket."""

    def late(number, frame):
        raise TimeoutError("waiting for a batch that was dropped")

    deep = tmp_path / ("a" * 90)
    deep.mkdir()
    monkeypatch.setitem(multiprocessing.current_process()._config, "tempdir", str(deep))
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(int(HANGS))
    try:
        with (
            pytest.raises(UserError, match=r"or for the reason that it printed above: set data\.workers"),
            loader.explaining_crashes(),
        ):
            list(loader.batches(source(folder), [[0, 1], [2]], 0, workers=1))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_a_source_survives_pickling(folder):
    made = source(folder)
    again = pickle.loads(pickle.dumps(made))
    assert again.fingerprint == made.fingerprint
    assert torch.equal(again.example(5).input_ids, made.example(5).input_ids)


def test_the_fingerprint_is_of_the_data(folder, tmp_path):
    assert source(folder).fingerprint == source(folder).fingerprint
    copy = rewrite(folder, tmp_path, lambda records: records[5]["conversations"].__delitem__(slice(-2, None)))
    assert source(copy).fingerprint != source(folder).fingerprint


def blank(records):
    records[4]["conversations"][1]["value"] = " "


def gone(records):
    records[4]["image"] = "gone.jpg"


def outside(records):
    records[4]["image"] = "../train.json"


def no_picture(records):
    records[4]["image"] = "notes.jpg"


def one_mark_too_many(records):
    records[4]["conversations"][0]["value"] += "<image>"


def assistant_first(records):
    del records[4]["conversations"][0]


@pytest.mark.parametrize("change", [blank, gone, outside, no_picture, one_mark_too_many, assistant_first])
def test_a_bad_record_is_named_before_step_0_and_left_out_when_asked(folder, tmp_path, change):
    copy = rewrite(folder, tmp_path, change)
    (copy / "images" / "notes.jpg").write_text("not a picture at all")
    with pytest.raises(UserError, match=r"train\.json: record 5 \(id r4\)"):
        source(copy)
    made = source(copy, skip_bad=True)
    assert len(made) == 11
    assert len(made.bad) == 1
    assert 4 not in made.good
    whole = source(folder)
    for i, j in ((3, 3), (4, 5), (10, 11)):
        assert made.lengths(i) == whole.lengths(j)
        assert torch.equal(made.example(i).input_ids, whole.example(j).input_ids)


def test_bad_records_are_counted_and_each_kind_of_mistake_is_a_line(folder, tmp_path):
    def spoil(records):
        for record in records[:7]:
            record["conversations"][1]["value"] = ""
        for record in records[8:10]:
            record["image"] = f"gone-{record['id']}.jpg"
        records[11]["conversations"].pop()

    copy = rewrite(folder, tmp_path, spoil)
    with pytest.raises(UserError, match=r"^10 bad records in .*--skip-bad") as caught:
        source(copy)
    _, *lines = str(caught.value).split("\n  ")
    assert [re.match(r"train\.json: record (\d+) ", line)[1] for line in lines] == ["1", "9", "12"]
    assert lines[0].endswith("is empty; write its text, or delete the record (and 6 more like it: 2, 3, 4, 5, 6, 7)")
    assert "'gone-r8.jpg'" in lines[1]
    assert lines[1].endswith("(and 1 more like it: 10)")
    assert lines[2].endswith("must end with an answer")
    assert len(source(copy, skip_bad=True).bad) == 10, "each is named in skipped.txt"
    many = rewrite(copy, tmp_path / "many", lambda records: records.extend(records[:1] * 300))
    with pytest.raises(UserError, match=r"^the first 100 bad records in .*--skip-bad") as caught:
        source(many)
    assert str(caught.value).count("\n") == 3
    assert "(and 96 more like it: 2, 3, 4, 5, 6, 7, ...)" in str(caught.value)
    copy = rewrite(copy, tmp_path / "all", lambda records: [r["conversations"].clear() for r in records])
    with pytest.raises(UserError, match=r"no record of .* can be used"):
        source(copy, skip_bad=True)


def test_a_record_too_long_is_an_error_or_cut_but_never_through_a_picture(folder, capsys):
    with pytest.raises(UserError, match=r"pictures included, and data\.max_rows is 60"):
        source(folder, max_rows=60)
    whole = source(folder, too_long="cut")
    assert not capsys.readouterr().err
    cut = source(folder, max_rows=60, too_long="cut", skip_bad=True)
    longer = sum(len(whole.example(int(record)).input_ids) > 60 for record in cut.good)
    assert 1 < longer < len(cut)
    assert capsys.readouterr().err == f"cut to data.max_rows = 60: {longer} of {len(cut)} records\n"
    assert len(cut.good)
    for i, record in enumerate(cut.good):
        example, full = cut.example(i), whole.example(int(record))
        n = len(example.input_ids)
        assert n <= 60
        assert torch.equal(example.input_ids, full.input_ids[:n])
        assert torch.equal(example.labels, full.labels[:n])
    with pytest.raises(UserError, match="would cut through a picture"):
        source(folder, max_rows=12, too_long="cut")
    with pytest.raises(UserError, match="no token of an answer is left"):
        source(folder, max_rows=25, too_long="cut")


def test_a_picture_on_its_side_is_counted_and_cut_as_it_is_seen(folder, tmp_path):
    """A phone writes pixels as the sensor lies and a note how to turn them; NeXT's rows depend on the shape."""
    copy = rewrite(folder, tmp_path, lambda records: None)
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 66, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(copy / "images" / "p1-0.png", exif=exif)
    turned = source(copy, "llava_next")
    upright.save(copy / "images" / "p1-0.png")
    plain = source(copy, "llava_next")
    assert turned.lengths(1) == plain.lengths(1)
    assert torch.equal(turned.example(1).visual["pixel_values"], plain.example(1).visual["pixel_values"])


def test_large_files_are_checked_in_worker_processes_with_the_same_outcome(folder, tmp_path, monkeypatch):
    from tinyspeed.data import conversations

    copy = rewrite(folder, tmp_path, blank)
    alone = source(copy, skip_bad=True)
    monkeypatch.setattr(conversations, "MANY", 1)
    monkeypatch.setattr(conversations, "CHECKED_AT_ONCE", 3)
    helped = source(copy, skip_bad=True, workers=2)
    assert helped.fingerprint == alone.fingerprint
    assert helped.bad == alone.bad


def test_memory_is_bounded_and_a_bar_tells_how_far_it_is(tmp_path, monkeypatch, capsys):
    """For 200,000 records: 120 MB while they are checked, and 10 MB that stay."""
    record = {"conversations": [{"from": "human", "value": "x" * 3000}, {"from": "gpt", "value": "Yes."}]}
    (tmp_path / "train.json").write_text("\n".join([json.dumps(record)] * 10_000))
    monkeypatch.setattr(record_files, "LARGEST", 1 << 16)  # of one record; so much is read at once
    monkeypatch.setattr(Conversations, "measure", lambda self, i: (500 + i, [576, 2880 + i], 300 + i, 2**31 + i, False))
    tracemalloc.start()
    made = source(tmp_path, images=str(tmp_path), bar=True)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(made) == 10_000
    assert peak < 10_000 * 600, "the file has 30 MB"
    assert sum(a.nbytes for a in (made.good, made.texts, made.sizes, made.visual, made.starts)) < 10_000 * 50
    assert re.search(r"check: 100%.* 10000/10000 ", capsys.readouterr().err)


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=40)


@settings(max_examples=40)
@given(data=st.data())
def test_whatever_a_record_says_it_trains_right_or_is_refused(data, tmp_path_factory):
    """Wild text, real pictures: the example has the answers as labels, or an error names the record."""
    home = tmp_path_factory.mktemp("wild")
    Image.new("RGB", (30, 40), "green").save(home / "a.png")
    count = data.draw(st.integers(0, 2))
    says = data.draw(st.lists(texts, min_size=2, max_size=4))
    turns = [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(says)]
    if count and data.draw(st.booleans()):
        turns[0]["content"] = [{"type": "image"}] * count + [{"type": "text", "text": says[0]}]
    record = {"messages": turns, "images": ["a.png"] * count}
    sound = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
    (home / "train.json").write_text(json.dumps([record, sound]))
    made = source(home, images=str(home), skip_bad=True)
    assert len(made) + len(made.bad) == 2
    if made.bad:
        assert "record 1" in made.bad[0]
        return
    example = made.example(0)
    learned = made.chat.tokenizer.decode(example.labels[example.labels != IGNORE])
    assert learned == "".join(f" {text.strip()}</s>" for text in says[1::2])
    assert int((example.input_ids == tiny.IMAGE).sum()) == 9 * count


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_several_processes_share_the_checking(folder, monkeypatch, ranks):
    """Each checks its parts, and what all have found is what one finds alone."""
    monkeypatch.setattr(conversations, "CHECKED_AT_ONCE", 3)
    alone, found = source(folder), []
    for rank in range(ranks):
        with pytest.raises(LookupError, match="mine"):
            source(
                folder, shared={"mine": slice(rank, None, ranks), "gather": lambda mine: found.append(mine) or _stop()}
            )
    assert [len(part) > 0 for part in found] == [True] * ranks
    every = [measure for part in found for measure in part]
    assert len(every) == len(alone.records)
    together = source(folder, shared={"mine": slice(0, None, ranks), "gather": lambda mine: every})
    assert together.fingerprint == alone.fingerprint
    assert [together.lengths(i) for i in range(len(alone))] == [alone.lengths(i) for i in range(len(alone))]


def _stop():
    raise LookupError("mine is all that is wanted")


# What processes that train together must agree about


def agreed(folder, family="llava", **how) -> dict:
    """What a process with these files says of them."""
    said = {}
    source(folder, family, shared={"agree": said.update}, **how)
    return said


def a_letter(records, file):
    records[3]["conversations"][0]["value"] = records[3]["conversations"][0]["value"].replace("What", "Whit")


def another_order(records, file):
    records.reverse()


def two_records_swapped(records, file):
    records[2], records[6] = records[6], records[2]


def renamed(records, file):
    file("p1-0.png").rename(file("new.png"))
    records[1]["image"] = "new.png"


def resized(records, file):
    Image.open(file("p1-0.png")).resize((40, 40)).save(file("p1-0.png"))


def longer(records, file):
    file("p1-0.png").write_bytes(file("p1-0.png").read_bytes() + b"\0")


def a_pixel(records, file):
    content = bytearray(file("p9-0.png").read_bytes())
    content[len(content) // 2] ^= 1
    file("p9-0.png").write_bytes(content)


def exchanged(records, file):
    one, other = file("p0-0.jpg").read_bytes(), file("p4-0.jpg").read_bytes()
    file("p0-0.jpg").write_bytes(other)
    file("p4-0.jpg").write_bytes(one)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (a_letter, "data.file"), (another_order, "data.file"), (two_records_swapped, "data.file"),
        (renamed, "data.file"), (resized, "pictures in data.images"), (longer, "pictures in data.images"),
        (a_pixel, "pictures in data.images"), (exchanged, "pictures in data.images"),
    ],
)  # fmt: skip
def test_processes_with_other_data_say_so(folder, tmp_path, change, what):
    copy = rewrite(folder, tmp_path, lambda records: None)
    before = agreed(copy)
    assert agreed(rewrite(copy, tmp_path / "moved", lambda records: None)) == before, "another place is the same data"
    records = json.loads((copy / "train.json").read_text())
    change(records, lambda name: copy / "images" / name)
    (copy / "train.json").write_text(json.dumps(records))
    after = agreed(copy)
    assert before.keys() == after.keys()
    assert before[what] != after[what]


@given(data=st.data())
@settings(max_examples=20)
def test_any_picture_of_another_size_is_noticed_and_few_are_opened(folder, data, tmp_path_factory):
    """Of a large file that is: here every sixth record counts as one of the thousand."""
    copy = rewrite(folder, tmp_path_factory.mktemp("album"), lambda records: None)
    opened = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversations, "READ_WHOLE", 2)
        patch.setattr(conversations, "CHECKED_AT_ONCE", data.draw(st.integers(1, 12)))
        made = source(copy)
        original = conversations.files.hashed
        patch.setattr(conversations.files, "hashed", lambda path: opened.append(path.name) or original(path))
        before = made.pictures_checksum()
        assert 0 < len(opened) < 5
        picture = data.draw(st.sampled_from(sorted((copy / "images").iterdir())))
        picture.write_bytes(picture.read_bytes() + b"\0")
        assert made.pictures_checksum() != before


def test_workers_find_the_same_pictures(folder, monkeypatch):
    alone = source(folder).pictures_checksum()
    monkeypatch.setattr(conversations, "MANY", 1)
    assert source(folder, workers=2).pictures_checksum() == alone


def test_the_pictures_inside_parquet_are_compared_too(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def said(name: str, colour: str) -> dict:
        folder = tmp_path / name
        folder.mkdir()
        Image.new("RGB", (30, 30), colour).save(folder / "a.png")
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]
        rows = [{"image": {"bytes": (folder / "a.png").read_bytes(), "path": "a.png"}, "conversations": turns}]
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "x.parquet")
        return agreed(folder, file=str(folder), images="")

    assert said("one", "red") == said("same", "red") != said("other", "blue")
