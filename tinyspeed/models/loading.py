"""Loads models from the hub or a folder, as they are or with the LLM in 4 bits.

    load_model("llava-hf/llava-1.5-7b-hf", "bf16", quantise="nf4")    14.1 GB of weights become 4.5

Two things that users of other trainers found out the hard way are taken care of here and checked after loading:

- Only the LLM's layers are quantised. By default transformers also quantises the vision tower and the projector, and a
  skip list whose names do not match (`vision_tower` instead of `model.vision_tower`) does nothing.
- Frozen parts stay in the precision they were loaded in. peft's `prepare_model_for_kbit_training` turns tower,
  embeddings and lm_head into fp32, which takes 1.5 GB for nothing.

Weights are read from safetensors only, because a pickle can run code when it is opened. Code that comes with a model is
never run: transformers must be told so in every call, or it asks the user, and a "y" runs the code.
"""

import json
import multiprocessing
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

import huggingface_hub as hub
import torch
from huggingface_hub import snapshot_download, try_to_load_from_cache
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig
from transformers.utils import cached_file

from ..util import UserError, counted, errors, files, paths, require, require_known
from . import published
from .families import FAMILIES, family
from .pictures import Pictures
from .precision import DTYPES
from .without_torchvision import loading_pictures_alone

TEMPLATE_SECONDS, TEMPLATE_MEMORY, TEMPLATE_TEXT = 5, 1 << 28, 10**5  # what a chat template may take (`_try_template`)
ANSWERS = 5.0  # seconds in which the hub must answer
# The files beside the weights that training depends on: configuration, tokenizer, processor, chat template.
BESIDE = (
    "config.json", paths.INDEX, "*token*.json", "*processor*.json", "*template*", "*.model", "vocab.*", "merges.txt",
)  # fmt: skip


def load_model(
    path: str,
    precision: str = "fp32",
    *,
    quantise: str = "none",
    storage: torch.dtype = torch.uint8,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Loads a LLaVA from a hub id ("llava-hf/llava-1.5-7b-hf") or a local folder written by `save_pretrained`.

    `storage` is the type that a tensor of 4-bit weights claims to have. Sharding needs a floating-point type there."""
    require_known("precision", precision, DTYPES)
    require_known("quantisation", quantise, ("none", "nf4"))
    where, how = _resolve(path), {"dtype": DTYPES[precision]}
    if torch.device(device).type == "cuda":  # straight to the GPU, piece by piece
        how["device_map"] = {"": str(device)}
    if quantise == "nf4":
        how["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=DTYPES[precision],
            bnb_4bit_quant_storage=storage,
            llm_int8_skip_modules=FAMILIES[load_config(path).model_type].unquantised(),
        )
    model = load_weights(AutoModelForImageTextToText, where, **how)
    if quantise != "none":
        _check_quantised(model)
    return model


def load_weights(kind: type, path: str | Path, **how) -> nn.Module:
    """Loads a model of one of transformers' classes from safetensors, and refuses one that lacks some of its weights:
    transformers would draw them at random and carry on."""
    require_safetensors(path)
    with explaining(f"cannot load the model {path}"):
        _require_layers(Path(path))
        model, found = kind.from_pretrained(
            path, **how, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    if missing := sorted(found["missing_keys"]):
        raise UserError(f"{path} lacks {len(missing)} of the model's weights ({missing[0]} ...): copy it again")
    return model


def _require_layers(folder: Path) -> None:
    """Refuses a configuration with more layers than there are weights for, since all would be built first."""
    weights = paths.weight_files(folder)
    if all(file.is_file() for file in weights):  # otherwise this is a hub id, or loading will say what is missing
        for file in weights:  # of one that may not be read, safetensors would say that it is not there
            open(file, "rb", opener=files.regular).close()
        said = (folder / "config.json").read_text(encoding="utf-8")
        asked = max(map(int, re.findall(r'"num_hidden_layers": *(\d+)', said)), default=0)
        names = "\n".join(name for file in weights for name in safe_open(file, "pt").keys())  # noqa: SIM118 (not a dict)
        there = 1 + max(map(int, re.findall(r"\.(\d+)\.", names)), default=0)
        what = f"config.json has num_hidden_layers = {asked:,}, and there are weights of {counted(there, 'layer')}"
        require(asked <= there, f"{folder}/{what}: copy it again")


def empty_model(path: str, precision: str) -> nn.Module:
    """Builds the model without its weights, on the meta device."""
    config, dtype = load_config(path), DTYPES[precision]
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, dtype=dtype, trust_remote_code=False)


def require_safetensors(path: str | Path) -> None:
    """Refuses a model whose index of weights names anything but safetensors: transformers would open it as a pickle."""
    paths.require_plain(path)
    quietly = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    try:
        index = cached_file(str(_reach(path)), paths.INDEX, **quietly)
    except OSError:  # there is no such model, and loading it will say so
        return
    if index:
        paths.weight_files(Path(index).parent)


@contextmanager
def explaining(what: str) -> Iterator[None]:
    """Turns any error into a `UserError` of one line: a broken folder makes transformers raise nearly anything."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What transformers says, in one line, and where that does not help, what it should say."""
    said = " ".join(str(error).split()) or repr(error)
    if errors.no_memory(error):
        return f"memory ran out ({said})"
    if "pip install tiktoken" in said:
        return "its tokenizer is a SentencePiece file: pip install '.[parts]'"
    if "custom code" in said:
        return "it needs code that comes with it, and such code is never run here"
    if "no file named model.safetensors" in said:
        return f"{said} Only safetensors are read, since a pickle can run code: save it again with save_pretrained"
    return said


def _resolve(path: str) -> str | Path:
    """Returns the folder, or the hub id as it is. Refuses a folder with a model that tinyspeed does not know."""
    found = paths.model_folder_or_hub_id(path)
    if isinstance(found, Path):
        try:
            kind = json.loads((found / "config.json").read_text(encoding="utf-8"))["model_type"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path}/config.json is not a model's configuration: {error!r}") from error
        if not isinstance(kind, str) or kind not in FAMILIES:
            raise UserError(f"{path} holds a {kind!r} model; tinyspeed knows {', '.join(sorted(FAMILIES))}")
        paths.weight_files(found)
    return found


def load_config(path: str):
    """Returns the configuration alone: a few kilobytes, and enough to know a model's shapes. A published model that has
    not been downloaded needs no network for it."""
    where = _resolve(path)
    if where in published.KNOWN and not _downloaded(path):
        return published.KNOWN[path]()
    with explaining(f"cannot load the configuration of {path}"):
        return AutoConfig.from_pretrained(_reach(where), trust_remote_code=False)


def hub_revision(path: str) -> str | None:
    """The hub's commit that a loaded hub id stands for; None for a folder."""
    found = None if isinstance(_resolve(path), Path) else _downloaded(path)
    return found and found.parent.name


def local_folder(path: str) -> Path:
    """The folder with a model's files. A hub id is downloaded, unless all of it is here."""
    found = paths.model_folder_or_hub_id(path)
    if isinstance(found, Path):
        return found
    here = _downloaded(found)
    if here and all(map(Path.is_file, [here.with_name("tokenizer_config.json"), *paths.weight_files(here.parent)])):
        return here.parent
    with explaining(f"cannot download {path}"):
        return Path(snapshot_download(found, allow_patterns=["*.json", "*.safetensors", *BESIDE]))


def identity(folder: Path, cache: Path) -> dict[str, str]:
    """The names of the files that training with this model depends on, and their hashes."""
    beside = {file for pattern in BESIDE for file in folder.glob(pattern)}
    found = sorted(file for file in {*paths.weight_files(folder), *beside} if file.is_file())
    return dict(zip([file.name for file in found], files.hashes(found, cache), strict=True))


def _downloaded(hub_id: str) -> Path | None:
    found = try_to_load_from_cache(hub_id, "config.json")
    return Path(found) if isinstance(found, str) else None


@lru_cache
def _reach(where: str | Path) -> str | Path:
    """Returns this folder or hub id. The hub is asked for an id once, briefly: transformers asks for each file, and for
    23 seconds. If it does not answer, it is asked no more, and what has been downloaded is used."""
    try:
        if not Path(where).is_dir():
            hub.get_hf_file_metadata(hub.hf_hub_url(str(where), "config.json"), timeout=ANSWERS)
    except Exception as error:
        answered = getattr(getattr(error, "response", None), "status_code", 500) < 500  # if only that there is none
        if not answered and not isinstance(error, ValueError):  # raised for what cannot be an id
            what = f"no folder {where} is here, and the hub cannot be reached ({_reason(error)})"
            require(_downloaded(str(where)) is not None, f"{what}: give the folder of a model")
            hub.constants.HF_HUB_OFFLINE = True
    return where


def load_processor(path: str, min_pixels: int = 0, max_pixels: int = 0):
    """Loads the processor saved beside a model: tokenizer, image processor and chat template. Pictures of any size are
    scaled to `min_pixels` at least and `max_pixels` at most; with 0, as the processor says.

    A processor counts placeholders by settings of its own, and older checkpoints lack some of them (576 features then
    meet 575 placeholders). They are taken from the model's configuration, which has them all.
    """
    config = load_config(path)
    vision = config.vision_config
    settings = {"num_additional_image_tokens": int(vision.model_type == "clip_vision_model")}  # CLS
    for of, name in ((vision, "patch_size"), (config, "vision_feature_select_strategy")):
        settings |= {name: getattr(of, name)} if hasattr(of, name) else {}
    with explaining(f"{path} has no usable processor beside its model"):
        with loading_pictures_alone():
            processor = AutoProcessor.from_pretrained(_reach(_resolve(path)), trust_remote_code=False)
        for name, value in settings.items():
            if (own := getattr(processor, name, value)) != value:
                print(f"the processor's {name} is {own}, the model's {value}: using that", file=sys.stderr)
                setattr(processor, name, value)
        if min_pixels or max_pixels:
            _limit_pixels(path, processor.image_processor, min_pixels, max_pixels)
        _check_processor(path, processor, config)
        if isinstance(processor.chat_template, dict):  # of several
            processor.chat_template = processor.chat_template.get("default")
        _require_quick_template(path, processor)
        image, space = processor.image_token, space_behind_picture(processor)
        for end in ("\n", r"\n") if processor.chat_template else ():  # a line break, and how Jinja may spell it
            processor.chat_template = processor.chat_template.replace(f"{image}{end}", f"{image}{space}{end}")
    return processor


def _limit_pixels(path: str, pictures, least: int, most: int) -> None:
    what = f"data.min_pixels and data.max_pixels: the pictures of {path} have no such limits, leave them out"
    require({"min_pixels", "max_pixels"} <= {*pictures.valid_kwargs.__annotations__}, what)
    size = dict(pictures.size)  # the processor calls areas edges
    least, most = least or size["shortest_edge"], most or size["longest_edge"]
    require(least <= most, f"data.min_pixels = {least:,} is more than data.max_pixels = {most:,}")
    pictures.size = type(pictures.size)(**{**size, "shortest_edge": least, "longest_edge": most})


def space_behind_picture(processor) -> str:
    """The space, or "", that the text behind a picture needs to have LLaVA's tokens. LLaVA tokenizes that text alone,
    and Llama's tokenizer begins it with "▁". Where its "legacy" is not true, only a whole text begins with one."""
    ids = lambda text: processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    image = processor.image_token
    return " " if ids(f"{image}x")[1:] != ids("x") == ids(f"{image} x")[1:] else ""


def _require_quick_template(path: str, processor) -> None:
    """Refuses a chat template that needs long, or much memory, for a short conversation. A template is a stranger's
    program, and nothing in its own process could stop it in the middle of 9**(9**9), so a child process tries it."""
    if not processor.chat_template or "fork" not in multiprocessing.get_all_start_methods():  # as on Windows
        return
    child = multiprocessing.get_context("fork").Process(target=_try_template, args=(processor,))
    child.start()
    child.join(60)
    if child.is_alive():  # it does not compute: it was forked while a thread held a lock, and that says nothing
        child.kill()
        return
    what = "takes too long, or too much memory or text, to write a few words: copy the model again"
    require(child.exitcode not in (1, -signal.SIGKILL), f"{path}: its chat template {what}")


def _try_template(processor) -> None:
    import resource

    with suppress(OSError, ValueError):  # lower limits may hold already, and not every system has /proc
        resource.setrlimit(resource.RLIMIT_CPU, (TEMPLATE_SECONDS, TEMPLATE_SECONDS))
        most = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + TEMPLATE_MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    say = lambda role, *more: {"role": role, "content": [*more, {"type": "text", "text": "Hi"}]}
    user = say("user", {"type": "image"})
    for chat in ([user, say("assistant"), user], [say("system"), user]):
        try:
            good = len(processor.apply_chat_template(chat, add_generation_prompt=True)) <= TEMPLATE_TEXT
        except Exception as error:  # any other is an error of the conversation that the template is used for
            good = not isinstance(error, MemoryError)
        if not good:
            sys.exit(1)


def _check_processor(path: str, processor, config) -> None:
    """Refuses a processor whose tokens or pictures do not fit the model."""
    pictures, largest = Pictures(processor), max(processor.tokenizer.get_vocab().values())
    image, pixels = pictures.token, pictures.tensors(Image.new("RGB", (30, 20)))["pixel_values"]
    image_id = processor.tokenizer.convert_tokens_to_ids(image)
    size = getattr(config.vision_config, "image_size", "any size")
    misfit = f"it makes pictures of {tuple(pixels.shape)}, for a tower of {size}"
    for good, problem in (
        (largest < config.text_config.vocab_size, f"its tokenizer has ids up to {largest}, its model has fewer words"),
        (image_id == config.image_token_id, f"its {image} has id {image_id}, its model's {config.image_token_id}"),
        (processor.tokenizer.eos_token not in (None, "", image), "its tokenizer has no end token (eos_token) to learn"),
        (_fits(pixels, config.vision_config), misfit),
        (bool(pixels.isfinite().all()), "it makes pictures that are not finite"),
    ):
        require(good, f"{path} has the processor of another model, or a damaged one: {problem}")


def _fits(pixels: Tensor, vision) -> bool:
    """Whether a tower can read these pixels. Some towers take pictures of one size, some take any."""
    if pixels.dim() == 2:  # Qwen's: a row for each patch
        return pixels.shape[1] == 3 * vision.temporal_patch_size * vision.patch_size**2
    if vision.model_type == "pixtral":
        return not any(side % vision.patch_size for side in pixels.shape[-2:])
    sides = vision.image_size if isinstance(vision.image_size, list | tuple) else (vision.image_size,) * 2
    return pixels.shape[-3:] == (3, *sides)


def _check_quantised(model: nn.Module) -> None:
    """Checks that the LLM's linear layers are in 4 bits and all other linear layers are not."""
    from bitsandbytes.nn import Linear4bit

    layers = {id(m) for m in family(model).language_model.layers.modules()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and isinstance(module, Linear4bit) != (id(module) in layers):
            why = "this version of transformers reads the skip list in another way; please report it"
            raise UserError(f"quantising did the wrong thing to {name}: {why}")
        if isinstance(module, Linear4bit):
            shape = (module.out_features, module.in_features)
            if tuple(module.weight.quant_state.shape) != shape:
                raise UserError(f"{name} should be {shape}, and is {tuple(module.weight.quant_state.shape)} on disk")
            # On some CPUs a forward in eval mode without gradients would re-pack the weight for good and round its
            # scales: a slow step's teacher would change the model that learns.
            module.support_avx512bf16_for_cpu = False
