"""Your own conversations about pictures, as examples. Each record takes this way, once before training to be checked,
and once more whenever it is trained on:

    record_files.py    its part of the file is read (parquet.py has unpacked a parquet file before)
    record_formats.py  is parsed into a `Record`
    images.py          its pictures are found, and their sizes read from their headers
    chat.py            its text becomes ids and labels, with one token for each visual feature
    images.py          its pictures are decoded; or feature_cache.py has what the tower makes of them
    examples.py        it is an `Example`, and loader.py makes batches of examples in worker processes

The check stops where pictures would be decoded. It keeps a few numbers of each record (text tokens, visual tokens of
each picture, tokens to learn): 200,000 records take a few MB, and batches are cut and losses divided without opening
a picture. Visual tokens are counted by the processor itself for a picture of that size.

A mistake in a record is an error that names file and record; with `data.skip_bad` such records are left out, counted
and listed. Only a picture that is damaged in the middle, between a sound header and a sound end, is found as late as
when it is decoded; then `skip_bad` names it, and nothing is learned from its record. Not in every format is it found
(`images.py`).
"""

import re
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from reprlib import repr as short

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..models import loading
from ..models.pictures import Pictures
from ..recipe import DataSection, Recipe
from ..rows import IGNORE
from ..util import UserError, counted, files, located, paths, require
from . import images
from .chat import Chat, with_system
from .examples import Example, Sample, of_pictures
from .loader import at_most, explaining_crashes, in_workers
from .record_files import RecordFile
from .record_formats import Record

CHECKED_AT_ONCE = 64  # records that a worker checks before it reports
MANY = 2000  # fewer records are checked before a worker has started
READ_WHOLE = 1000  # records, spread over the file, whose pictures processes compare to the last byte
MOST_BAD = 100  # bad records, after which nobody wants to wait for the rest

Tokens = tuple[np.ndarray, np.ndarray, bool]  # a record's ids, its labels, and whether they were cut
Measure = tuple[int, list[int], int, int, bool]  # its lengths, a checksum of its ids and labels, and whether it was cut


class Conversations:
    """A `Source`: the good records of a file, as examples."""

    def __init__(self, data: DataSection, processor, cache, *, bar=True, mine=slice(None), gather=list, agree=None):
        """If processes share the check, `mine` is this one's share of its parts, `gather` returns that of all, and
        `agree` refuses processes whose own files are not the same."""
        paths.require_conversations(data.file, data.images)
        self.data, self.processor = data, with_system(processor, data.system_message)
        self.records = RecordFile(data.file, data.images or None, cache=cache, bar=bar)
        self.chat, self.prepared = Chat(self.processor, data.template), Pictures(self.processor)
        self.features = None  # a `feature_cache.FeatureCache` to read from instead of decoding pictures
        if agree:
            agree({"data.file": files.hashed(self.records.path)})
        self._keep(sorted(gather(self._check(mine, bar)), key=lambda found: found[0]))
        if agree:
            agree({"pictures in data.images": self.pictures_checksum()})

    def __len__(self) -> int:
        return len(self.good)

    def lengths(self, i: int) -> Sample:
        text, answers = self.sizes[i].tolist()
        return text, self.visual[self.starts[i] : self.starts[i + 1]].tolist(), answers

    @property
    def fingerprint(self) -> str:
        crc = 0
        for array in (self.good, self.texts, self.visual):
            crc = zlib.crc32(array.tobytes(), crc)
        return f"{len(self)} records, {crc:08x}"

    def where(self, i: int) -> str:
        return self.records[int(self.good[i])].where

    def pictures(self) -> Iterator[Path]:
        """Every picture of the good records, as often as it is used."""
        for i in self.good:
            yield from self._paths(self.records[int(i)])

    def pictures_checksum(self) -> int:
        """A checksum of the pictures as this process finds them: of all their sizes, and of the content of some. Their
        names are in the file of records."""
        workers = 0 if len(self) < MANY else at_most(self.data.workers)
        with explaining_crashes():
            return zlib.crc32(repr([*in_workers(self._checksum, _parts(len(self)), workers)]).encode())

    def _checksum(self, part: range) -> int:
        every = len(self) // READ_WHOLE + 1
        found = [(i, file) for i in part for file in self._paths(self.records[int(self.good[i])])]
        told = [files.hashed(file) if i % every == 0 else file.stat().st_size for i, file in found]
        return zlib.crc32(repr(told).encode())

    def measure(self, number: int) -> Measure | str:
        """Checks record `number` of the file. Returns its measure, or what is wrong with it."""
        try:
            with self._record(number) as record:
                _, _, rows, ids, labels, cut = self._read(record)
        except UserError as error:
            return str(error)
        checksum = zlib.crc32(labels.tobytes(), zlib.crc32(ids.tobytes()))
        return len(ids) - sum(rows), rows, int((labels[1:] != IGNORE).sum()), checksum, cut

    def text(self, i: int) -> tuple[Tensor, Tensor]:
        with self._record(int(self.good[i])) as record:
            *_, ids, labels, _ = self._read(record)
        return torch.from_numpy(ids), torch.from_numpy(labels)

    def example(self, i: int) -> Example:
        with self._record(int(self.good[i])) as record:
            files, sizes, _, *text, _ = self._read(record)
            ids, labels = map(torch.from_numpy, text)
            if not files:
                return Example(ids, labels)
            if self.features:
                return Example(ids, labels, of_pictures([*map(self.features.read, files)]))
            prepare = self.prepared.tensors
            try:  # one after the other, so that no two decoded pictures are in memory
                made = [prepare(images.decode(file, record.where)) for file in files]
            except UserError as error:
                if not self.data.skip_bad:
                    raise
                # It already has its place in the batch, so black pictures stand in, and no label is left.
                print(f"left out: {error}", file=sys.stderr)
                made = [prepare(Image.new("RGB", size)) for size in sizes]
                labels = torch.full_like(labels, IGNORE)
        return Example(ids, labels, of_pictures(made))

    @contextmanager
    def _record(self, number: int) -> Iterator[Record]:
        """Record `number` of the file. Every error about it names it."""
        record = self.records[number]
        with located(record.where):
            yield record

    def _read(self, record: Record) -> tuple[list[Path], list[tuple[int, int]], list[int], *Tokens]:
        """All of a record but its pixels: its picture files, their sizes, their visual tokens, and its tokens."""
        files = self._paths(record)
        sizes = [images.size(file, record.where) for file in files]
        several = "it has several pictures: this model would see each of them as one of many, which is not known here"
        require(len(files) < 2 or not self.prepared.alone, several)
        texts = [self.prepared.text(*size) for size in sizes]
        return files, sizes, [*map(self.prepared.rows, texts)], *self._tokens(record, texts)

    def _paths(self, record: Record) -> list[Path]:
        return [images.inside(self.records.folder, name, record.where) for name in record.images]

    def _tokens(self, record: Record, pictures: list[str]) -> Tokens:
        ids, labels, pictures_end = self.chat.encode(record.turns, pictures)
        most = self.data.max_rows or len(ids)  # `from_recipe` has replaced 0 by the model's context
        if cut := len(ids) > most:
            if self.data.too_long == "error":
                what = f"it has {len(ids):,} tokens, pictures included, and data.max_rows is {most:,}"
                mend = "raise that if the model's context allows it, shorten the record"
                raise UserError(f'{what}: {mend}, or set data.too_long = "cut"')
            if most < pictures_end:
                raise UserError(f"cutting it to data.max_rows = {most:,} would cut through a picture")
            ids, labels = ids[:most], labels[:most]
        require((labels[1:] != IGNORE).any(), "no token of an answer is left to learn")
        return ids, labels, cut

    def _check(self, mine: slice, bar: bool) -> list[tuple[int, Measure | str]]:
        """The numbers of the records in this process's share, with their measures or what is wrong with them."""
        count, found, bad = len(self.records), [], 0
        workers = 0 if count < MANY else at_most(self.data.workers)
        line = tqdm(total=count, desc="check", unit="record", disable=not bar, mininterval=0.5)
        with explaining_crashes(), line:
            for part in in_workers(self._measures, _parts(count)[mine], workers):
                found += part
                bad += sum(isinstance(measure, str) for _, measure in part)
                line.update(len(part))
                if bad > MOST_BAD and not self.data.skip_bad:
                    break
        return found

    def _measures(self, numbers: range) -> list[tuple[int, Measure | str]]:
        return [(number, self.measure(number)) for number in numbers]

    def _keep(self, found: list[tuple[int, Measure | str]]) -> None:
        """Keeps the measures of the good records in arrays, or refuses the file."""
        bad = [(number, measure) for number, measure in found if isinstance(measure, str)]
        self.bad = [what for _, what in bad]
        require(not bad or self.data.skip_bad, _listed(bad, self.data.file))
        good = [(number, *measure) for number, measure in found if not isinstance(measure, str)]
        if not good:
            raise UserError(f"no record of {self.data.file} can be used; the first: {self.bad[0]}")
        numbers, texts, visual, answers, checksums, cut = zip(*good, strict=True)
        if any(cut):
            what = f"cut to data.max_rows = {self.data.max_rows:,}"
            print(f"{what}: {sum(cut):,} of {counted(len(good), 'record')}", file=sys.stderr)
        self.good = np.array(numbers, dtype=np.int64)
        self.texts = np.array(checksums, dtype=np.uint32)
        self.sizes = np.array([texts, answers], dtype=np.int32).T
        self.visual = np.array([rows for each in visual for rows in each], dtype=np.int32)
        self.starts = np.cumsum([0, *map(len, visual)], dtype=np.int64)


def _parts(count: int) -> list[range]:
    return [range(begin, min(begin + CHECKED_AT_ONCE, count)) for begin in range(0, count, CHECKED_AT_ONCE)]


def from_recipe(recipe: Recipe, model: str, **how) -> Conversations:
    """The conversations that a recipe names, as this model reads them."""
    data, context = recipe.data, loading.load_config(model).text_config.max_position_embeddings
    require(data.max_rows <= context, f"data.max_rows = {data.max_rows:,}: the context of {model} ends at {context:,}")
    data = replace(data, max_rows=data.max_rows or context)
    processor = loading.load_processor(model, data.min_pixels, data.max_pixels)
    return Conversations(data, processor, paths.expanded(recipe.run.cache), **how)


def _listed(bad: list[tuple[int, str]], file: str) -> str:
    """A line for each kind of mistake: the first record that has it, and the numbers of others."""
    if len(bad) == 1:
        return f"{bad[0][1]} (--skip-bad trains without such records)"
    count = f"the first {MOST_BAD}" if len(bad) > MOST_BAD else str(len(bad))
    kinds: dict[str, list] = {}
    for number, what in bad[:MOST_BAD]:
        kind = re.sub(r"'.*?'|\d", "", what.split(": ", 2)[-1])  # without its place, names and numbers
        kinds.setdefault(kind, [what]).append(number + 1)
    lines = (what + f" (and {len(n)} more like it: {short(n)[1:-1]})" * bool(n) for what, _, *n in kinds.values())
    return "\n  ".join([f"{count} bad records in {file} (--skip-bad trains without such records):", *lines])
