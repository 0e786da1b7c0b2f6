"""Traps that a stranger may have put into a folder that one downloads: code that waits to be run.

Each trap carries a `Code` that leaves a folder with the trap's name among the canaries, so one sees afterwards which
code ran. The traps are real: `test_foreign_code.py` opens one as it wants to be opened, and finds the canary.
"""

import io
import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Code:
    """Code that leaves a canary, in every form in which it may come."""

    canary: Path

    @property
    def python(self) -> str:
        return f"import os\nos.makedirs({str(self.canary)!r}, exist_ok=True)\n"

    def __reduce__(self):
        return exec, (self.python,)

    @property
    def pickle(self) -> bytes:
        return pickle.dumps(self)

    @property
    def torch_pickle(self) -> bytes:
        """A zip file, as `torch.save` writes it."""
        made = io.BytesIO()
        torch.save({"model.language_model.embed_tokens.weight": self}, made)
        return made.getvalue()

    def jinja(self, how: str) -> str:
        return how.replace("MKDIR", f"mkdir {self.canary}")


def edit(file: Path, **changes) -> None:
    """Change a JSON file; None deletes a key."""
    known = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({k: v for k, v in {**known, **changes}.items() if v is not None}))


# In a model's folder


def pickles_beside(folder: Path, code: Code) -> None:
    """Pickles under every name that some program looks for."""
    names = ("pytorch_model.bin", "model.bin", "optimizer.pt", "training_args.bin", "scheduler.pt", "rng_state.pth",
             "adapter_model.bin", "tf_model.h5", "flax_model.msgpack", "tokenizer.pkl", "vocab.pkl", "model.pt",
             "consolidated.00.pth", "non_lora_trainables.bin", "mm_projector.bin", "model.ckpt")  # fmt: skip
    for number, name in enumerate(names):
        (folder / name).write_bytes(code.torch_pickle if number % 2 else code.pickle)
    edit(folder / "pytorch_model.bin.index.json", weight_map={"lm_head.weight": "pytorch_model.bin"}, metadata={})


def pickle_instead(folder: Path, code: Code) -> None:
    (folder / "pytorch_model.bin").write_bytes(code.torch_pickle)
    (folder / "model.safetensors").unlink()


def index_of_pickles(folder: Path, code: Code) -> None:
    """An index of safetensors that names a pickle."""
    (folder / "model.safetensors").unlink()
    (folder / "weights.bin").write_bytes(code.torch_pickle)
    names = {"weight_map": {"lm_head.weight": "weights.bin"}, "metadata": {"total_size": 1}}
    edit(folder / "model.safetensors.index.json", **names)


def pickle_named_safetensors(folder: Path, code: Code) -> None:
    (folder / "model.safetensors").write_bytes(code.torch_pickle)


def adapter_beside(folder: Path, code: Code) -> None:
    """transformers loads an adapter that lies beside a model, without being asked to."""
    own = {"base_model_class": "E", "parent_library": "evil"}
    how = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "auto_mapping": own}
    edit(folder / "adapter_config.json", base_model_name_or_path=str(folder), **how)
    (folder / "adapter_model.bin").write_bytes(code.torch_pickle)


def _module(folder: Path, code: Code, kinds: tuple[str, ...]) -> dict[str, str]:
    (folder / "evil.py").write_text(code.python + "".join(f"class {kind}: pass\n" for kind in kinds))
    (folder / "__init__.py").write_text(code.python)
    return {kind: f"evil.{kind}" for kind in kinds}


MODELS = ("AutoModel", "AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoModelForVision2Seq")


def auto_map_of_the_model(folder: Path, code: Code) -> None:
    edit(folder / "config.json", auto_map=_module(folder, code, ("AutoConfig", *MODELS)))


def auto_map_of_the_processor(folder: Path, code: Code) -> None:
    found = _module(folder, code, ("AutoProcessor", "AutoImageProcessor", "AutoTokenizer", "AutoFeatureExtractor"))
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        edit(folder / name, auto_map=found)


def unknown_model(folder: Path, code: Code) -> None:
    """A model type that transformers does not have: only the folder's own code could make it."""
    edit(folder / "config.json", model_type="evil", auto_map=_module(folder, code, ("AutoConfig", *MODELS)))


def unknown_llm(folder: Path, code: Code) -> None:
    """A known LLaVA around an LLM that only the folder's own code could make."""
    kinds = _module(folder, code, ("AutoConfig", *MODELS))
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit(folder / "config.json", text_config={**text, "model_type": "evil", "auto_map": kinds})


def unknown_processor(folder: Path, code: Code) -> None:
    edit(folder / "processor_config.json", processor_class="EvilProcessor",
         auto_map=_module(folder, code, ("AutoProcessor",)))  # fmt: skip


def unknown_tokenizer(folder: Path, code: Code) -> None:
    auto = {"AutoTokenizer": ["evil.AutoTokenizer", "evil.AutoTokenizer"]}
    _module(folder, code, ("AutoTokenizer",))
    edit(folder / "tokenizer_config.json", tokenizer_class="EvilTokenizer", auto_map=auto)


def unknown_image_processor(folder: Path, code: Code) -> None:
    """In both files that may name the image processor."""
    auto = _module(folder, code, ("AutoImageProcessor",))
    inner = json.loads((folder / "processor_config.json").read_text()).get("image_processor", {})
    changed = {**inner, "image_processor_type": "EvilImageProcessor", "auto_map": auto}
    edit(folder / "processor_config.json", image_processor=changed)
    edit(folder / "preprocessor_config.json", **changed)


def own_generate(folder: Path, code: Code) -> None:
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code.python + "def generate(*a, **k): pass\n")
    edit(folder / "generation_config.json", custom_generate=str(folder), trust_remote_code=True)


def trusting(folder: Path, code: Code) -> None:
    """The settings themselves say that they can be trusted."""
    auto_map_of_the_model(folder, code)
    auto_map_of_the_processor(folder, code)
    for file in folder.glob("*config.json"):
        edit(file, trust_remote_code=True, use_safetensors=False, weights_only=False)


def attention_from_the_hub(folder: Path, code: Code) -> None:
    """Attention in compiled code from the hub. `sandbox.KERNELS` takes the place of the package that would load it."""
    edit(folder / "config.json", attn_implementation="kernels-community/flash-attn2", use_kernels=True)


def kernels_from_the_hub(folder: Path, code: Code) -> None:
    """The same for the vision tower alone, from a stranger's repository."""
    vision = json.loads((folder / "config.json").read_text())["vision_config"]
    edit(folder / "config.json", vision_config={**vision, "attn_implementation": "stranger/kernel"})


def linked_weights(folder: Path, code: Code) -> None:
    """A weights file that is a link to a pickle."""
    (folder / "model.safetensors").unlink()
    (folder / "far.bin").write_bytes(code.pickle)
    (folder / "model.safetensors").symlink_to(folder / "far.bin")


ESCAPES = (  # ways in which a chat template tries to leave its sandbox
    "{{ cycler.__init__.__globals__.os.popen('MKDIR').read() }}",
    "{{ lipsum.__globals__['os'].system('MKDIR') }}",
    "{{ joiner|attr('__init__')|attr('__globals__')|attr('__getitem__')('os')|attr('system')('MKDIR') }}",
    "{% for c in [].__class__.__base__.__subclasses__() if c.__name__ == 'Popen' %}{{ c('MKDIR', shell=True) }}"
    "{% endfor %}",
    "{{ raise_exception.__globals__['__builtins__']['__import__']('os').system('MKDIR') }}",
    "{{ strftime_now.__globals__['os'].system('MKDIR') }}",
    "{{ ('{0.__class__.__mro__}'|attr('format'))(messages) }}{{ messages.__class__.__mro__[-1].__subclasses__() }}",
    "{{ self.__init__.__globals__.__builtins__.__import__('os').system('MKDIR') }}",
    "{% set x = messages.append({'role': 'user'}) %}{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('MKDIR') }}",
    "{{ namespace.__init__.__globals__ }}{{ 1 / 0 }}",
    "{{ messages|map(attribute='__class__')|list }}{{ messages[0]['nowhere']['os'] }}",
    "{% macro f() %}{{ caller.__globals__ }}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ range(10 ** 12)|list }}",
    "{{ 'x' * (2 ** 62) }}",
)


def escape(number: int) -> Callable[[Path, Code], None]:
    def template(folder: Path, code: Code) -> None:
        (folder / "chat_template.jinja").write_text(code.jinja(ESCAPES[number]))

    return template


# In the data, and in a run


def picture(file: Path, code: Code) -> None:
    file.write_bytes(code.pickle)


def extension_types(file: Path, rows: list[dict], code: Code) -> None:
    """Parquet whose columns claim to be of a Python class, which comes along as a pickle."""
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.Table.from_pylist(rows)
    ours = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": code.pickle}
    fields = [field.with_metadata(ours) for field in table.schema]
    parquet.write_table(table.cast(pyarrow.schema(fields, {"pandas": code.pickle, "huggingface": code.pickle})), file)


def checkpoint(folder: Path, code: Code, name: str) -> None:
    """In a checkpoint, with the checksums corrected."""
    from tinyspeed.training.checkpoint import STATE, _crc
    from tinyspeed.util.files import fingerprint

    (folder / name).write_bytes(code.torch_pickle)
    if name != STATE:
        state = json.loads((folder / STATE).read_text())["state"]
        state["files"][name] = [*fingerprint(folder / name)]
        (folder / STATE).write_text(json.dumps({"state": state, "crc32": _crc(state)}))


def copy(source: Path, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copytree(source, target))
