"""The built-in recipes of published runs, and how many samples and steps those had."""

import re

from tinyspeed import recipe

NAMES = sorted(p.stem for p in recipe.BUILT_IN.glob("*-stage?*.toml"))
LORA = [name for name in NAMES if name.endswith("lora")]
ALIGNS = [name for name in NAMES if "stage1" in name]
TUNES = [name for name in NAMES if "stage2" in name]
SAMPLES = {"1.5 stage1": 558_128, "1.5 stage2": 665_298, "next stage2": 779_289}
STEPS = {"1.5 stage1": 2_181, "1.5 stage2": 5_198, "next stage2": 6_089}  # LLaVA's own bars show the first two


def _data(name: str) -> str:
    return " ".join(re.search(r"llava-(1\.5|next)-.*(stage\d)", name).groups())


def samples(name: str) -> int:
    return SAMPLES[_data(name)]


def steps(name: str) -> int:
    return STEPS[_data(name)]


def size(name: str) -> str:
    return re.search(r"-(\d+b)-", name)[1]
