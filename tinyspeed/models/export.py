"""What training changed into the base model, tensor by tensor: whole weights, or adapters as  W + (alpha / r) B A.

The base's files are read, changed where training changed them, and written again under their own names, so the result
is laid out like the model it came from and loads wherever that loads. The sum is taken in fp32 and rounded once to the
base's own precision. Never into 4-bit weights: that would round the fine-tune away.

No model is built. At any moment memory holds one of the base's files, 5 GB at most as the hub has them; loading a 7B
model to merge it takes 14 GB, and a 13B model 26.
"""

import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..util import finite, paths
from ..util.errors import UserError

if TYPE_CHECKING:
    from peft import LoraConfig

# Beside the weights: what transformers needs to load them, and nothing that belongs to whoever made the base.
KEPT = ("config.json", "generation_config.json", paths.INDEX)


def plain(names: Iterable[str]) -> dict[str, str]:
    """Of a checkpoint's names those of trained parameters, by their names inside the base model: no wrapper's prefix,
    no isolator, no learned plugin, and of two views the slow one, which inference uses."""
    wrappers = re.compile(r"^model/(model\.)?(base_model\.model\.)?(?=model\.|lm_head\.)")
    mine = (n for n in names if n.startswith("model/") and not only_training(n) and ".fast." not in n)
    return {wrappers.sub("", n): n for n in mine}


def only_training(name: str) -> bool:
    """Whether a checkpoint's tensor is of what learns but is no part of the model (`DualSpeed.only_training`)."""
    return name.startswith(("model/isolator.", "model/chooser."))


def merge(saved: Mapping[str, Tensor], scale: float, base: str, out: Path) -> None:
    """Write the base with a checkpoint's parameters in it to the folder `out`. `scale` is alpha / rank."""
    names = plain(saved)
    adapted = {f"{name.partition('.lora_A.')[0]}.weight": name for name in names if ".lora_A." in name}
    left = {name for name in names if ".lora_" not in name} | adapted.keys()

    def changed(weight: Tensor, inner: str) -> Tensor:
        if inner not in adapted:
            return saved[names[inner]]
        a, b = (saved[names[adapted[inner].replace(".lora_A.", f".lora_{x}.")]].float() for x in "AB")
        return weight.float() + scale * (b @ a)

    folder = paths.expanded(base)
    if not folder.is_dir():
        folder = Path(snapshot_download(base, allow_patterns=["*.safetensors", "*.json"]))
    out.mkdir(parents=True)
    for name in KEPT:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    for file in paths.weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            metadata = tensors.metadata()
            made = {}
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                made[name] = tensors.get_tensor(name)
                mine = next((inner for inner in left if _same(inner, name)), None)
                if mine is not None:
                    left.remove(mine)
                    new = changed(made[name], mine)
                    if new.shape != made[name].shape:
                        raise UserError(
                            f"{name} is {tuple(made[name].shape)} in {base}, and was trained as {tuple(new.shape)}"
                        )
                    made[name] = new.to(made[name].dtype).contiguous()
                _check(made[name], name, base)
        save_file(made, out / file.name, metadata=metadata)
    if left:
        raise UserError(f"{base} has no tensor for {min(left)}: it is not the model that was trained")


def _check(tensor: Tensor, name: str, base: str) -> None:
    """What was trained is finite, or it would not have been saved; not so the base, nor what is too large for fp16."""
    if found := finite.first_bad([(name, tensor)]):
        why = f"what was trained is too large for {tensor.dtype}, or {base} has it so"
        raise UserError(f"nothing was exported, it would not be finite: {found}; {why}")


def _same(inner: str, stored: str) -> bool:
    """Whether a name inside the model and one in a file mean the same tensor. Files of the hub have the layout of
    earlier days, `language_model.model.layers.0`, where the model now has `model.language_model.layers.0`."""
    return _plain(inner) == _plain(stored)


def _plain(name: str) -> str:
    parts = name.split(".")
    owner = "language_model." if {"language_model", "lm_head"} & {*parts} else ""
    parts = [part for part in parts if part not in ("model", "language_model", "base_layer")]
    return owner + ".".join(parts)


def save_adapter(saved: Mapping[str, Tensor], how: "LoraConfig", base: str, out: Path) -> None:
    """A peft adapter that carries the projector too: PeftModel.from_pretrained(the base, out) is the trained model."""
    learned = {inner: saved[name] for inner, name in plain(saved).items()}
    if not any(".lora_" in name for name in learned):
        raise UserError("no adapter has been trained yet: the run is still aligning its projector")
    out.mkdir(parents=True)
    unnamed = re.compile(r"(?<=\.lora_[AB])\.\w+(?=\.)")  # peft names an adapter when it loads it
    tensors = {f"base_model.model.{unnamed.sub('', name)}": t.contiguous() for name, t in learned.items()}
    save_file(tensors, out / "adapter_model.safetensors", {"format": "pt"})
    layers = {name.partition(".lora_")[0] for name in learned if ".lora_" in name}
    inside, leaves = min(layers).partition(".layers.")[0], sorted({layer.rpartition(".")[2] for layer in layers})
    how.target_modules = rf"{re.escape(inside)}\.layers\..*\.({'|'.join(leaves)})"  # not the tower's q_proj
    # peft finds whole trained modules by these names.
    how.modules_to_save = sorted({name.split(".")[-3] for name in learned if ".lora_" not in name})
    how.base_model_name_or_path, how.inference_mode = base, True
    how.save_pretrained(out)
