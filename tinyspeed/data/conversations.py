"""Conversations about pictures of your own: a file and a folder to examples, every record looked at before step 0.

Before training each record is read, its pictures' headers too, and tokenised. What is kept is a few numbers a record
(text rows, visual rows of each picture, tokens to learn): 200,000 records take a few MB, and batches are cut and losses
divided without touching a picture. Visual rows come from the processor's own count for a picture of that size.

What is wrong with a record is an error that names file and record; `data.skip_bad` leaves such records out, counts and
lists them. Only a picture that is damaged in the middle, behind a sound header and end, is found when it is decoded;
then `skip_bad` names it and learns nothing of its record.
"""

import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..models import loading
from ..recipe import DataSection, Recipe
from ..rows import IGNORE
from ..util import paths
from ..util.errors import UserError
from . import images
from .chat import Chat
from .examples import Example
from .loader import at_most, explaining_crashes, ignore_signals
from .record_files import RecordFile
from .records import Record

AT_ONCE = 64  # records a worker checks before it reports
WORTH_WORKERS = 2000  # fewer records are checked before a worker has started
ENOUGH = 100  # bad records after which nobody wants to wait for the rest


class Conversations:
    """A `Source`: the good records of a file, as examples."""

    def __init__(
        self,
        data: DataSection,
        processor,
        cache: Path,
        *,
        bar: bool = True,
        mine: slice = slice(None),
        gather: Callable[[list], list] = list,
    ):
        paths.conversations(data.file, data.images)
        self.data, self.processor = data, processor
        self.records = RecordFile(data.file, data.images or None, cache=cache, bar=bar)
        self.chat = Chat(processor, data.template, data.system)
        self.mine = mine  # of the parts, where several processes share the checking
        self.features = None  # a `features.Features` to read instead of decoding pictures
        self._measure_all(gather, bar)

    def __len__(self) -> int:
        return len(self.good)

    def lengths(self, i: int) -> tuple[int, list[int], int]:
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

    def text(self, i: int) -> tuple[Tensor, Tensor]:
        record = self.records[int(self.good[i])]
        with _about(record):
            rows = self.visual[self.starts[i] : self.starts[i + 1]].tolist()
            ids, labels = map(torch.from_numpy, self._tokens(record, rows))
        return ids, labels

    def example(self, i: int) -> Example:
        record = self.records[int(self.good[i])]
        with _about(record):
            paths = self._paths(record)
            sizes = [images.size(path, record.where) for path in paths]
            ids, labels = map(torch.from_numpy, self._tokens(record, [self._rows(*size) for size in sizes]))
            if not paths:
                return Example(ids, labels)
            if self.features:
                looked, image_sizes = zip(*map(self.features.read, paths), strict=True)
                image_sizes = None if image_sizes[0] is None else torch.cat(image_sizes)
                return Example(ids, labels, None, image_sizes, torch.cat(looked))
            try:
                pictures = [images.decode(path, record.where) for path in paths]
            except UserError as error:
                if not self.data.skip_bad:
                    raise
                # Its place in the batch is taken already. Nothing is learned of it.
                print(f"left out: {error}", file=sys.stderr)
                pictures, labels = [Image.new("RGB", size) for size in sizes], torch.full_like(labels, IGNORE)
        batch = self.processor.image_processor(pictures, return_tensors="pt")
        return Example(ids, labels, batch["pixel_values"], batch.get("image_sizes"))

    def pictures(self) -> Iterator[Path]:
        """Every picture of the good records, as often as it is used."""
        for i in self.good:
            yield from self._paths(self.records[int(i)])

    def _paths(self, record: Record) -> list[Path]:
        return [images.inside(self.records.folder, name, record.where) for name in record.images]

    @lru_cache(maxsize=65536)  # noqa: B019 (lives as long as the run)
    def _rows(self, width: int, height: int) -> int:
        try:
            return self.processor._get_num_multimodal_tokens(image_sizes=[(height, width)]).num_image_tokens[0]
        except (ZeroDivisionError, ValueError) as error:
            raise UserError(f"a picture of {width} x {height} pixels is too thin for this model: {error}") from error

    def _tokens(self, record: Record, image_rows: list[int]) -> tuple[np.ndarray, np.ndarray]:
        ids, labels = self.chat.encode(record.turns, image_rows)
        most = self.data.max_rows or len(ids)  # 0: whatever the model takes, which `of` has looked up
        if len(ids) > most:
            if self.data.too_long == "error":
                raise UserError(
                    f"{len(ids):,} rows, and data.max_rows is {most:,}: raise it if the model's context "
                    f'allows, shorten the record, or set data.too_long = "cut"'
                )
            if (ids[most:] == self.chat.image_id).any():
                raise UserError(f"cutting it to data.max_rows = {most:,} would cut through a picture")
            ids, labels = ids[:most], labels[:most]
        if not (labels[1:] != IGNORE).any():
            raise UserError("no token of an answer is left to learn")
        return ids, labels

    def measure(self, i: int) -> tuple[int, list[int], int, int]:
        """What `lengths` will say of record i of the file, and a checksum of its text; a bad record is an error."""
        record = self.records[i]
        with _about(record):
            rows = [self._rows(*images.size(path, record.where)) for path in self._paths(record)]
            ids, labels = self._tokens(record, rows)
        checksum = zlib.crc32(labels.tobytes(), zlib.crc32(ids.tobytes()))
        return len(ids) - sum(rows), rows, int((labels[1:] != IGNORE).sum()), checksum

    def _part(self, numbers: range) -> list[tuple[int, tuple[int, list[int], int, int] | str]]:
        """Measures of these records, or what is wrong with them."""
        found = []
        for i in numbers:
            try:
                found.append((i, self.measure(i)))
            except UserError as error:
                found.append((i, str(error)))
        return found

    def _parts(self) -> Iterator[list]:
        count = len(self.records)
        parts = [range(begin, min(begin + AT_ONCE, count)) for begin in range(0, count, AT_ONCE)][self.mine]
        workers = at_most(self.data.workers)
        if workers == 0 or count < WORTH_WORKERS:
            return map(self._part, parts)
        return iter(
            DataLoader(
                _Parts(self), batch_size=None, sampler=parts, num_workers=workers, worker_init_fn=ignore_signals,
                generator=torch.Generator(),
            )
        )  # fmt: skip

    def _measure_all(self, gather: Callable[[list], list], bar: bool) -> None:
        count = len(self.records)
        good, texts, sizes, visual, starts, bad = [], [], [], [], [0], []
        measures, wrong = [], 0
        with (
            explaining_crashes(),
            tqdm(total=count, desc="check", unit="record", disable=not bar, mininterval=0.5) as line,
        ):
            for part in self._parts():
                measures += part
                wrong += sum(isinstance(found, str) for _, found in part)
                line.update(len(part))
                if wrong > ENOUGH and not self.data.skip_bad:
                    break
        for i, found in sorted(gather(measures), key=lambda measure: measure[0]):
            if isinstance(found, str):
                bad.append(found)
                continue
            text, rows, answers, checksum = found
            good.append(i)
            texts.append(checksum)
            sizes.append((text, answers))
            visual += rows
            starts.append(len(visual))
        if bad and not self.data.skip_bad:
            raise UserError(_listed(bad, self.data.file))
        if not good:
            raise UserError(f"no record of {self.data.file} can be used; the first: {bad[0]}")
        self.bad = bad
        self.good = np.array(good, dtype=np.int64)
        self.texts = np.array(texts, dtype=np.uint32)
        self.sizes = np.array(sizes, dtype=np.int32)
        self.visual = np.array(visual, dtype=np.int32)
        self.starts = np.array(starts, dtype=np.int64)


def from_recipe(recipe: Recipe, model: str, **how) -> Conversations:
    """The conversations that a recipe names, as this model reads them."""
    data, context = recipe.data, loading.config(model).text_config.max_position_embeddings
    if data.max_rows > context:
        raise UserError(f"data.max_rows = {data.max_rows:,}: the context of {model} ends at {context:,}")
    data = replace(data, max_rows=data.max_rows or context)
    return Conversations(data, loading.load_processor(model), paths.expanded(recipe.run.cache), **how)


class _Parts(Dataset):
    def __init__(self, source: Conversations):
        self.source = source

    def __getitem__(self, numbers: range):
        return self.source._part(numbers)


def _listed(bad: list[str], file: str) -> str:
    if len(bad) == 1:
        return f"{bad[0]} (--skip-bad trains without such records)"
    count = f"the first {ENOUGH}" if len(bad) > ENOUGH else str(len(bad))
    return "\n  ".join([f"{count} bad records in {file} (--skip-bad trains without such records):", *bad[:ENOUGH]])


@contextmanager
def _about(record: Record) -> Iterator[None]:
    """Name the record in every error about it."""
    try:
        yield
    except UserError as error:
        if str(error).startswith(record.where):
            raise
        raise UserError(f"{record.where}: {error}") from error
