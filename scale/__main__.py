"""The command line of scale: `python -m scale plan RECIPE.toml --gpus 8,64,512 --gpu h100`."""

import sys

if __name__ == "__main__":
    if sys.argv[1:2] != ["plan"]:
        print("usage: python -m scale plan RECIPE.toml [--gpus 8,64,512] [--gpu h100]", file=sys.stderr)
        sys.exit(2)
    from .plan import main

    sys.exit(main(sys.argv[2:]))
