"""Small processors of the families beyond LLaVA: each family's own classes, tokens and chat template.

The tokenizers write bytes, as `tiny.tokenizer` does. Behind the text stand the image token, then those for videos,
for where a picture begins and ends, and for where a line of it ends; a family that lacks one has a filler. Templates
are the published ones, less what they say about videos and tools.
"""

from pathlib import Path

from support import tiny, zoo
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    Gemma3Processor,
    Idefics3Processor,
    InternVLProcessor,
    LlavaNextVideoProcessor,
    LlavaOnevisionProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
    SmolVLMProcessor,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from tinyspeed.models.without_torchvision import VideoSettings, loading_pictures_alone

BOS, EOS, PAD = range(3)

WORDS = 300  # a vocabulary that holds the tokens of every family
PATCH, MERGE, TILE = 4, 2, 16

QWEN2 = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3 = (
    "{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\\n' }}{%- if messages[0].content is string %}"
    "{{- messages[0].content }}{%- else %}{%- for content in messages[0].content %}{%- if 'text' in content %}"
    "{{- content.text }}{%- endif %}{%- endfor %}{%- endif %}{{- '<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}{%- if message.role == 'user' %}{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string %}{{- message.content }}{%- else %}{%- for content in message.content %}"
    "{%- if content.type == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>{%- elif 'text' in content %}{{- content.text }}{%- endif %}"
    "{%- endfor %}{%- endif %}{{- '<|im_end|>\\n' }}"
    "{%- elif message.role == 'assistant' %}{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string %}{{- message.content }}{%- else %}{%- for content_item in message.content %}"
    "{%- if 'text' in content_item %}{{- content_item.text }}{%- endif %}{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
INTERNVL = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{{'<|im_end|>\n'}}{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (
    "{{- bos_token }}{%- if messages[0]['role'] == 'system' %}"
    "{{- '[SYSTEM_PROMPT]' + messages[0]['content'][0]['text'] + '[/SYSTEM_PROMPT]' }}"
    "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}"
    "{%- for message in loop_messages %}{%- if message['role'] == 'user' %}{{- '[INST]' }}"
    "{%- for block in message['content'] %}{%- if block['type'] == 'text' %}{{- block['text'] }}"
    "{%- elif block['type'] in ['image', 'image_url'] %}{{- '[IMG]' }}{%- else %}"
    "{{- raise_exception('Only text and image blocks are supported in message content!') }}{%- endif %}{%- endfor %}"
    "{{- '[/INST]' }}{%- elif message['role'] == 'assistant' %}{{- message['content'][0]['text'] + eos_token }}"
    "{%- else %}{{- raise_exception('Only user, system and assistant roles are supported!') }}{%- endif %}"
    "{%- endfor %}"
)
SMOLVLM = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}"
    "{%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}"
    "{%- set loop_messages = messages[1:] -%}{%- else -%}{%- set first_user_prefix = '' -%}"
    "{%- set loop_messages = messages -%}{%- endif -%}{%- for message in loop_messages -%}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{%- endif -%}"
    "{%- if (message['role'] == 'assistant') -%}{%- set role = 'model' -%}{%- else -%}"
    "{%- set role = message['role'] -%}{%- endif -%}"
    "{{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else '') }}"
    "{%- for item in message['content'] -%}{%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}"
    "{%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}{%- endfor -%}"
    "{{ '<end_of_turn>\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{'<start_of_turn>model\n'}}{%- endif -%}"
)

CHATML = ("<|im_start|>", "<|endoftext|>")
TILES = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]


def tokenizer(
    bos: str | None, eos: str, pad: str, tokens: list[str], more: tuple | list = (), names: dict[str, str] | None = None
) -> PreTrainedTokenizerFast:
    """One token a byte. `tokens` are those from `IMAGE` on, `more` others; `names` are how a processor calls some."""
    tokens = [*tokens, *(f"<filler_{n}>" for n in range(len(tokens), 5)), *more]
    words = [bos or "<filler>", eos, pad, "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [token for token in tokens if token not in words]
    core = Tokenizer(models.BPE(vocab={word: n for n, word in enumerate(words)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if bos:
        core.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, BOS)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=bos, eos_token=eos, pad_token=pad, extra_special_tokens=names or {}
    )
    made.add_special_tokens({"additional_special_tokens": tokens}, replace_extra_special_tokens=False)
    assert len(made) == len(words) <= WORDS
    return made


def _qwen(kind: type, template: str, video: str):
    vision = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    sizes = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": 2}
    pictures = Qwen2VLImageProcessorPil(size={"shortest_edge": 4 * 64, "longest_edge": 20 * 64}, **sizes)
    videos = VideoSettings(video_processor_type=video, max_frames=8, **sizes)
    words = tokenizer(None, "<|im_end|>", "<|endoftext|>", vision, CHATML)
    return kind(pictures, words, videos, chat_template=template)


def _internvl():
    names = {
        "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>", "start_image_token": "<img>",
        "end_image_token": "</img>",
    }  # fmt: skip
    pictures = GotOcr2ImageProcessorPil(size={"height": TILE, "width": TILE}, max_patches=6)
    videos = VideoSettings(video_processor_type="InternVLVideoProcessor", size={"height": TILE, "width": TILE})
    words = tokenizer(None, "<|im_end|>", "<|endoftext|>", list(names.values()), CHATML, names)
    return InternVLProcessor(
        pictures, words, videos, image_seq_length=(TILE // PATCH // 2) ** 2, chat_template=INTERNVL
    )


def _mistral():
    from transformers.models.pixtral import PixtralProcessor

    tokens = ["[IMG]", "<filler>", "[IMG_START]", "[IMG_END]", "[IMG_BREAK]"]
    more = ["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
    pictures = PixtralImageProcessorPil(size={"longest_edge": 32}, patch_size={"height": PATCH, "width": PATCH})
    words = tokenizer("<s>", "</s>", "<pad>", tokens, more)
    return PixtralProcessor(pictures, words, patch_size=PATCH, spatial_merge_size=MERGE, chat_template=MISTRAL)


def _tiled(kind: type, pictures: type):
    names = {
        "image_token": "<image>", "fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    }  # fmt: skip
    tokens = ["<image>", "<video>", "<fake_token_around_image>", "<global-img>"]
    words = tokenizer("<|im_start|>", "<end_of_utterance>", "<|im_end|>", tokens, TILES, names)
    made = pictures(size={"longest_edge": 4 * TILE}, max_image_size={"longest_edge": TILE})
    videos = {}
    if kind is SmolVLMProcessor:
        videos["video_processor"] = VideoSettings(video_processor_type="SmolVLMVideoProcessor", num_frames=8, fps=1)
    return kind(made, words, **videos, image_seq_len=4, chat_template=SMOLVLM)


def _gemma():
    names = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tokens = ["<image_soft_token>", "<filler>", "<start_of_image>", "<end_of_image>"]
    words = tokenizer("<bos>", "<eos>", "<pad>", tokens, ["<start_of_turn>", "<end_of_turn>"], names)
    pictures = Gemma3ImageProcessorPil(size={"height": 6 * PATCH, "width": 6 * PATCH})
    return Gemma3Processor(pictures, words, chat_template=GEMMA, image_seq_length=9)


def _with_videos(family: str):
    """LLaVA's own families that also take videos."""
    names = {"image_token": "<image>", "video_token": "<video>"}
    words = tokenizer(None, "<|im_end|>", "<|endoftext|>", list(names.values()), CHATML, names)
    size = {"height": tiny.SIDE, "width": tiny.SIDE}
    how = {"chat_template": INTERNVL.replace("<IMG_CONTEXT>", "<image>")}
    if family == "llava_onevision":
        videos = VideoSettings(video_processor_type="LlavaOnevisionVideoProcessor", size=size)
        pictures = LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=tiny.PINPOINTS)
        how |= {"num_image_tokens": (tiny.SIDE // tiny.PATCH) ** 2, "vision_feature_select_strategy": "full"}
        how["vision_aspect_ratio"] = f"anyres_max_{tiny.MOST_CROPS}"
        return LlavaOnevisionProcessor(pictures, words, videos, **how)
    videos = VideoSettings(video_processor_type="LlavaNextVideoVideoProcessor", size=size)
    edge = {"shortest_edge": tiny.SIDE}
    pictures = LlavaNextImageProcessorPil(size=edge, crop_size=size, image_grid_pinpoints=tiny.PINPOINTS)
    how |= {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1, "patch_size": tiny.PATCH}
    return LlavaNextVideoProcessor(videos, pictures, words, **how)


MAKERS = {
    "llava_next_video": lambda: _with_videos("llava_next_video"),
    "llava_onevision": lambda: _with_videos("llava_onevision"),
    "qwen2_vl": lambda: _qwen(Qwen2VLProcessor, QWEN2, "Qwen2VLVideoProcessor"),
    "qwen2_5_vl": lambda: _qwen(Qwen2_5_VLProcessor, QWEN2, "Qwen2VLVideoProcessor"),
    "qwen3_vl_moe": lambda: _qwen(Qwen3VLProcessor, QWEN3, "Qwen3VLVideoProcessor"),
    "qwen3_vl": lambda: _qwen(Qwen3VLProcessor, QWEN3, "Qwen3VLVideoProcessor"),
    "internvl": _internvl,
    "mistral3": _mistral,
    "smolvlm": lambda: _tiled(SmolVLMProcessor, SmolVLMImageProcessorPil),
    "idefics3": lambda: _tiled(Idefics3Processor, Idefics3ImageProcessorPil),
    "gemma3": _gemma,
}


def processor(family: str):
    """A real processor, for pictures of any size."""
    with loading_pictures_alone():
        return MAKERS[family]()


def checkpoint(family: str, folder: Path | str) -> Path:
    """A model of `zoo.py` and its processor on disk, in the format of the hub."""
    zoo.model(family, vocab_size=WORDS).save_pretrained(folder)
    processor(family).save_pretrained(folder)
    return Path(folder)
