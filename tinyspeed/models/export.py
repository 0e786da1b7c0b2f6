"""Writes trained parameters into the base model, tensor by tensor: whole weights, or adapters as  W + (alpha / r) B A.

The base's files are read, changed where training changed them, and written under their own names. So the result is laid
out like the model it came from and loads wherever that loads. The sum is taken in fp32 and rounded once, to the base's
own precision. It is never written into 4-bit weights, which would round the fine-tuning away.

No model is built, and memory holds one of the base's files at a time, at most 5 GB as the hub has them. Loading a 7B
model to merge it would take 14 GB, and a 13B model 26.
"""

import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..util import UserError, finite, paths
from .families import FAMILIES
from .loading import explaining, load_config, local_folder

if TYPE_CHECKING:
    from peft import LoraConfig

# What transformers needs beside the weights to load them, and nothing that belongs to the base's author.
KEPT = ("config.json", "generation_config.json", paths.INDEX)


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Maps names inside the base model to a checkpoint's names of the trained parameters. The names have no wrapper's
    prefix. Isolator and learned plugin are left out, and of two views the fast one: inference uses the slow one."""
    wrappers = re.compile(r"^model/(model\.)?(base_model\.model\.)?(?=model\.|lm_head\.)")
    mine = (n for n in names if n.startswith("model/") and not only_training(n) and ".fast." not in n)
    return {wrappers.sub("", n): n for n in mine}


def only_training(name: str) -> bool:
    """Whether a checkpoint's tensor is trained but not part of the model (`DualSpeed.only_training`)."""
    return name.startswith(("model/isolator.", "model/chooser."))


def merge(saved: Mapping[str, Tensor], scale: float, base: str, out: Path) -> None:
    """Writes the base with a checkpoint's parameters to the folder `out`. `scale` is alpha / rank."""
    names = plain_names(saved)
    adapters = {f"{name.partition('.lora_A.')[0]}.weight": name for name in names if ".lora_A." in name}
    left = {_bare(name): name for name in (*adapters, *names) if ".lora_" not in name}

    def changed(weight: Tensor, inner: str) -> Tensor:
        if inner not in adapters:
            return saved[names[inner]]
        a, b = (saved[names[adapters[inner].replace(".lora_A.", f".lora_{x}.")]].float() for x in "AB")
        return weight.float() + scale * (b @ a)

    folder = local_folder(base)
    out.mkdir(parents=True)
    for name in KEPT:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    for file in paths.weight_files(folder):
        with explaining(f"cannot read the model {base}"), safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
            metadata = opened.metadata()
        for name, old in tensors.items():
            if (inner := left.pop(_bare(name), None)) is not None:
                new = changed(old, inner)
                if new.shape != old.shape:
                    raise UserError(f"{name} is {tuple(old.shape)} in {base}, and was trained as {tuple(new.shape)}")
                tensors[name] = new.to(old.dtype).contiguous()
            if found := finite.first_bad([(name, tensors[name])]):  # what was trained is finite, or it was not saved
                why = f"what was trained is too large for {old.dtype}, or {base} has it so"
                raise UserError(f"nothing was exported, it would not be finite: {found}; {why}")
        save_file(tensors, out / file.name, metadata=metadata)
    if left:
        raise UserError(f"{base} has no tensor for {min(left.values())}: it is not the model that was trained")


def _bare(name: str) -> str:
    """A tensor's name without what differs between a model and its files. The hub's files have the layout of earlier
    days, `language_model.model.layers.0` or `model.layers.0`, where the model now has `model.language_model.layers.0`.
    """
    return ".".join(part for part in name.split(".") if part not in ("model", "language_model", "base_layer"))


def save_adapter(saved: Mapping[str, Tensor], config: "LoraConfig", base: str, out: Path) -> None:
    """Writes a peft adapter, projector included: PeftModel.from_pretrained(the base, out) is the trained model."""
    learned = {inner: saved[name] for inner, name in plain_names(saved).items()}
    if not any(".lora_" in name for name in learned):
        raise UserError("no adapter has been trained yet: the run is still aligning its projector")
    out.mkdir(parents=True)
    unnamed = re.compile(r"(?<=\.lora_[AB])\.\w+(?=\.)")  # peft names an adapter when it loads it
    tensors = {f"base_model.model.{unnamed.sub('', name)}": t.contiguous() for name, t in learned.items()}
    save_file(tensors, out / "adapter_model.safetensors", {"format": "pt"})
    layers = {name.partition(".lora_")[0] for name in learned if ".lora_" in name}
    inside, leaves = min(layers).partition(".layers.")[0], sorted({layer.rpartition(".")[2] for layer in layers})
    config.target_modules = rf"{re.escape(inside)}\.layers\..*\.({'|'.join(leaves)})"  # not the tower's q_proj
    # peft finds whole trained modules by the ends of their names, and takes those of a list one by one.
    last = 2 + FAMILIES[load_config(base).model_type].projector_name.count(".")
    whole = [name.split(".") for name in learned if ".lora_" not in name]
    config.modules_to_save = sorted({".".join(parts[1 : last + parts[last].isdigit()]) for parts in whole})
    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(out)
