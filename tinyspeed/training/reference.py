"""The loss of a text-only language model on every answer token, computed once and kept on disk: l_ref of ReGATE.

    folder = hash( reference's files | data | which samples | both tokenizers | precision )
    folder/00000.safetensors ...   the losses of 1,024 samples each

The reference is frozen and sees no picture, so its losses never change. The folder's name depends on all that they
depend on, so losses of other data or of another model are never read. Each file also has a label and a checksum, and a
damaged one is computed again; an interruption loses one at most. Only the folders that were used last are kept.

The reference must have the student's tokens. Special tokens that it does not know, such as a picture's placeholder,
become its pad (or unknown) token, so that the text keeps its positions. Tokens of an answer, such as its end token, may
not: their loss would be that of a pad.
"""

import hashlib
import os
import shutil
import sys
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..data.examples import Source
from ..distill import answer_loss
from ..models import loading
from ..models.pictures import image_token
from ..models.precision import DTYPES
from ..rows import IGNORE
from ..util import UserError, files, located, require

AT_ONCE = 1024  # samples a file
ROWS = 16384  # tokens of a forward
FOLDERS = 8  # how many are kept
OTHER_LLM = "give the LLM that the model was made of, or one of its family"


class Reference:
    """A reference LLM with the tokens of `base`, and its losses on `samples` of `source`."""

    def __init__(self, path: str, base: str, source: Source, samples: list[int], precision: str, folder: Path):
        self.path, self.source, self.samples, self.precision = path, source, samples, precision
        self.called = f"regate.reference: {path}"
        with located("regate.reference"):
            self.files = str(loading.local_folder(path))
        processor = loading.load_processor(base)
        self.tokens = _tokens(path, self.files, processor)
        self.content = _content(self.files, folder.parent)
        made = (self.content, source.fingerprint, repr(samples), repr(self.tokens.tolist()), precision)
        self.key = hashlib.blake2b("".join(f"{part}\0" for part in made).encode(), digest_size=16).hexdigest()
        self.folder = folder / self.key

    def losses(self, device: torch.device, bar: bool = True) -> np.ndarray:
        """The losses of every answer token, sample after sample. Those that are missing are computed."""
        parts = [self.samples[i : i + AT_ONCE] for i in range(0, len(self.samples), AT_ONCE)]
        found = [self._read(number, part) for number, part in enumerate(parts)]
        missing = [number for number, of in enumerate(found) if of is None]
        if missing:
            self._check_context()
            model = self._load(device)
            files.delete_stale(self.folder.parent.glob("*/.*.tmp"))
            for number in tqdm(missing, desc="reference", unit="file", disable=not bar):
                found[number] = self._make(model, parts[number])
                self._write(number, found[number])
            every = sorted((f for f in self.folder.parent.iterdir() if f.is_dir()), key=lambda f: f.stat().st_mtime)
            for old in every[:-FOLDERS]:
                shutil.rmtree(old, ignore_errors=True)
        else:
            with suppress(OSError):  # the folder may belong to somebody else, or be read-only
                os.utime(self.folder)
        return np.concatenate(found)

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:05d}.safetensors"

    def _read(self, number: int, part: list[int]) -> np.ndarray | None:
        file = self._file(number)
        if not file.is_file():
            return None
        try:
            with safe_open(file, framework="pt") as opened:
                losses, of = opened.get_tensor("losses").numpy(), opened.metadata()
            fits = of == self._label(losses) and len(losses) == sum(self.source.lengths(i)[2] for i in part)
            fits = fits and np.isfinite(losses).all()
        except (OSError, SafetensorError):
            fits = False
        if not fits:
            print(f"{file} is damaged, or of other data or another model: made anew", file=sys.stderr)
            return None
        return losses

    def _write(self, number: int, losses: np.ndarray) -> None:
        content = save({"losses": torch.from_numpy(losses)}, self._label(losses))
        files.write_atomically(self._file(number), content, cached=True)

    def _label(self, losses: np.ndarray) -> dict[str, str]:
        return {"key": self.key, "crc32": f"{zlib.crc32(losses.tobytes()):08x}"}

    def _check_context(self) -> None:
        with loading.explaining(f"regate.reference: cannot load {self.path}"):
            context = AutoConfig.from_pretrained(self.files, trust_remote_code=False).max_position_embeddings
        longest = max(text + sum(visual) for text, visual, _ in map(self.source.lengths, self.samples))
        what = f"reads at most {context:,} tokens, and a sample has {longest:,} rows"
        require(longest <= context, f"{self.called} {what}: set data.max_rows, or give another reference")

    def _load(self, device: torch.device) -> nn.Module:
        with located("regate.reference"):
            model = loading.load_weights(AutoModelForCausalLM, self.files, dtype=DTYPES[self.precision])
        return model.to(device).eval()

    @torch.no_grad()
    def _make(self, model: nn.Module, part: list[int]) -> np.ndarray:
        texts, targets = [self.source.text(i) for i in part], []
        for ids, labels in texts:
            learned = ids[labels != IGNORE]
            if len(other := learned[self.tokens[learned] != learned]):
                what = f"it does not know the token {int(other[0])}, which answers are made of"
                raise UserError(f"{self.called} has another tokenizer than the model: {what}; {OTHER_LLM}")
            targets.append(labels[1:].where(labels[1:] == IGNORE, self.tokens[ids[1:]]))
        order = sorted(range(len(part)), key=lambda i: -len(texts[i][0]))
        losses: list[Tensor] = [None] * len(part)
        while order:
            several = max(1, ROWS // len(texts[order[0]][0]))
            now, order = order[:several], order[several:]
            ids = pad_sequence([self.tokens[texts[i][0]] for i in now], batch_first=True)
            mask = pad_sequence([torch.ones_like(texts[i][0]) for i in now], batch_first=True)
            target = pad_sequence([targets[i] for i in now], batch_first=True, padding_value=IGNORE).to(model.device)
            out = model.base_model(ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False)
            answers = target != IGNORE
            hidden = out.last_hidden_state[:, :-1][answers]
            each = answer_loss(model.get_output_embeddings(), hidden, target[answers])[2]
            for i, of in zip(now, each.cpu().split(answers.sum(1).tolist()), strict=True):
                if not of.isfinite().all():
                    what = f"has a loss that is not finite on {self.source.where(part[i])}"
                    raise UserError(f"{self.called} {what}: try another model.precision, or another reference")
                losses[i] = of
        return torch.cat(losses).numpy()


def _content(folder: str, cache: Path) -> str:
    found = sorted([Path(folder) / "config.json", *Path(folder).glob("*.safetensors")])
    return hashlib.blake2b(bytes.fromhex("".join(files.hashes(found, cache))), digest_size=16).hexdigest()


def _tokens(path: str, files: str, processor) -> Tensor:
    """(V,) the reference's id of each of the student's tokens: its own, or pad."""
    with loading.explaining(f"regate.reference: {path} has no usable tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(files, trust_remote_code=False)
    ours, its = processor.tokenizer.get_vocab(), tokenizer.get_vocab()
    special = {*processor.tokenizer.all_special_tokens, *processor.tokenizer.get_added_vocab()}
    if wrong := [token for token, i in ours.items() if its.get(token) != i and token not in special]:
        what = f"{len(wrong):,} of {len(ours):,} tokens are not the same, {min(wrong)!r} is one"
        raise UserError(f"regate.reference: {path} has another tokenizer than the model: {what}; {OTHER_LLM}")
    blank = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id, 0)
    pad = next(i for i in blank if i is not None)
    tokens = torch.full((max(ours.values()) + 1,), pad)
    same = torch.tensor([i for token, i in ours.items() if its.get(token) == i])
    tokens[same] = same
    tokens[processor.tokenizer.convert_tokens_to_ids(image_token(processor))] = pad
    return tokens
