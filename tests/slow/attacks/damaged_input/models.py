"""Folders of models with something damaged in them, and folders that contain code.

A folder is refused in words, or loads and answers a question about a picture. Code in it never runs: each piece and
each pickle would leave a folder behind. If nothing essential is damaged, the answer is that of the sound model.
"""

import json
import os
import random
import shutil
import struct
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from slow.attacks.damaged_input import mutations
from slow.attacks.damaged_input.cases import Case
from support import tiny
from support.hostile import Code

from tinyspeed import UserError
from tinyspeed.evaluation import ask
from tinyspeed.models import loading

ODD = (
    *mutations.ODD[:8], 10**9, "llama", "llava", "../../secret", "/etc/passwd", "a\0b", "gelu", "eager", "bfloat16",
    "fp8", [], {}, [1], {"a": 1}, "tiny--model.Evil", 2, 3, 16, 0.5,
)  # fmt: skip
TEXTS = (
    "config.json", "config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json",
    "generation_config.json",
)  # fmt: skip
TEMPLATES = (
    "", "{{", "{% for %}", "{{ messages[9] }}", "{{ messages.pop() }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{% include '/etc/passwd' %}", "{% import 'os' as os %}", "{{ raise_exception('no') }}", "{{ 1 / 0 }}",
    "{{ messages }}", "x", "{{ lipsum() }}", "{% set a = range(10 ** 9) %}{{ a | list }}", "{% generation %}",
    "{{ undefined.x.y }}", "{{ messages[0]['content'][0]['text'] }}",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "{{ 9 ** (9 ** 9) }}", "{{ 'a' * 5000000000 }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
)  # fmt: skip


class Part:
    def __init__(self, home: Path):
        self.home, self.sound = home, tiny.checkpoint("llava", home / "sound")
        self.ran = home / "ran"
        self.picture = Image.new("RGB", (30, 20), "red")
        self.want = self.answer(self.sound)

    def case(self, draw: random.Random) -> Case:
        folder = self.home / "model"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.sound, folder)
        damages = (
            self.bytes, self.structure, self.structure, self.structure, self.missing, self.weights, self.index,
            self.template, self.code, self.pickle,
        )  # fmt: skip
        damage = draw.choice(damages)
        kind, (note, same) = damage.__name__, damage(draw, folder)

        def act() -> None:
            try:
                got = self.answer(folder)
            except UserError as error:  # a bad template or generation_config.json is found only when it is used
                if not any(word in str(error) for word in (str(folder), "template", "generation_config.json")):
                    raise AssertionError(f"refused without naming the folder: {error}") from error
                raise
            finally:
                assert not self.ran.exists(), "code from the folder ran"
            assert not same or got == self.want, "another answer"

        must = "refuse" if kind == "index" and "secret" in note else ""
        return Case(kind, act, opens=(folder,), note=note, seconds=30, must=must)

    def answer(self, folder: Path) -> str:
        processor = loading.load_processor(str(folder))
        model = loading.load_model(str(folder))
        return ask.answer(model, processor, [self.picture], "What is it?", max_new_tokens=2)

    def bytes(self, draw: random.Random, folder: Path) -> tuple[str, bool]:
        file = draw.choice(sorted(path for path in folder.iterdir()))
        content, what = mutations.mutate_bytes(draw, file.read_bytes())
        file.write_bytes(content)
        return f"{file.name} {what}", False

    def structure(self, draw: random.Random, folder: Path) -> tuple[str, bool]:
        file = folder / draw.choice(TEXTS)
        value, what = mutations.mutate_structure(draw, json.loads(file.read_text()), ODD)
        file.write_bytes(json.dumps(value, ensure_ascii=False).encode(errors="surrogatepass"))
        return f"{file.name}: {what}", False

    def missing(self, draw: random.Random, folder: Path) -> tuple[str, bool]:
        file, what = draw.choice(sorted(folder.iterdir())), draw.choice(("gone", "folder", "empty", "loop", "pipe"))
        file.unlink()
        if what == "folder":
            file.mkdir()
        elif what == "empty":
            file.touch()
        elif what == "loop":
            file.symlink_to(file.name)
        elif what == "pipe":
            os.mkfifo(file)
        return f"{file.name} is {what}", False

    def weights(self, draw: random.Random, folder: Path) -> tuple[str, bool]:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        name = draw.choice(sorted(tensors))
        what = draw.choice(("gone", "shape", "flat", "name", "kind", "huge", "more", "nan"))
        tensor = tensors[name]
        if what == "gone":
            del tensors[name]
        elif what == "shape":
            tensors[name] = torch.cat([tensor, tensor])
        elif what == "flat":
            tensors[name] = tensor.reshape(-1, 1)
        elif what == "name":
            tensors[name + "x"] = tensors.pop(name)
        elif what == "kind":
            tensors[name] = tensor.to(draw.choice((torch.int8, torch.bool, torch.complex64)))
        elif what == "nan":
            tensors[name] = torch.full_like(tensor, float("nan"))
        elif what == "more":
            tensors["more"] = tensor.clone()
        save_file(tensors, file, metadata={"format": draw.choice(("pt", "pt", "tf", "x"))})
        if what == "huge":
            file.write_bytes(struct.pack("<Q", draw.choice((2**63, 2**40, 10**8 + 1))) + file.read_bytes()[8:])
        return f"{name} {what}", False

    def index(self, draw: random.Random, folder: Path) -> tuple[str, bool]:
        """Weights in two files, with an index that is right or leads elsewhere."""
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = sorted(tensors)
        where = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(names)}
        for file in set(where.values()):
            part = {name: tensors[name] for name in names if where[name] == file}
            save_file(part, folder / file, metadata={"format": "pt"})
        secret = self.home / "secret.safetensors"
        save_file(tensors, secret, metadata={"format": "pt"})
        what = draw.choice(("right", f"../{secret.name}", str(secret), "gone.safetensors", "swapped", "shape"))
        index = {"metadata": {"total_size": 1}, "weight_map": where}
        if what == "swapped":
            index["weight_map"] = dict(zip(where, reversed(where.values()), strict=True))
        elif what == "shape":
            index, _ = mutations.mutate_structure(draw, index, ODD)
        elif what != "right":
            index["weight_map"] = {name: draw.choice((what, file)) for name, file in where.items()}
        text = json.dumps(index, ensure_ascii=False)
        (folder / "model.safetensors.index.json").write_bytes(text.encode(errors="surrogatepass"))
        return f"index {what}", what == "right"

    def template(self, draw: random.Random, folder: Path) -> tuple[str, bool]:
        text = draw.choice(TEMPLATES)
        if draw.random() < 0.3:
            text, _ = mutations.mutate_tokens(draw, tiny.CHAT_TEMPLATE)
        (folder / "chat_template.jinja").write_text(text, errors="surrogateescape")
        return f"template {text!r:.80}", False

    def code(self, draw: random.Random, folder: Path) -> tuple[str, bool]:
        """Files that name a class of the folder's own, which the hub allows to those who trust it."""
        (folder / "evil.py").write_text(Code(self.ran).python + "class Evil:\n    pass\n")
        name = draw.choice(TEXTS[1:4])
        told = json.loads((folder / name).read_text())
        kinds = ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor", "AutoImageProcessor")
        told["auto_map"] = dict.fromkeys(kinds, "evil.Evil") | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
        keys = ("tokenizer_class", "processor_class", "image_processor_type", "model_type", "architectures", "none")
        key = draw.choice(keys)
        if key != "none":
            told[key] = ["Evil"] if key == "architectures" else "Evil"
        (folder / name).write_text(json.dumps(told))
        return f"code by {name}, {key}", False

    def pickle(self, draw: random.Random, folder: Path) -> tuple[str, bool]:
        names = (
            "pytorch_model.bin", "training_args.bin", "model.pt", "tokenizer.pkl", "adapter_model.bin",
            "model.safetensors",
        )  # fmt: skip
        name, alone = draw.choice(names), draw.random() < 0.6
        if alone:
            (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(Code(self.ran).pickle)
        return f"pickle {name}, alone {alone}", not alone and name != "model.safetensors"
