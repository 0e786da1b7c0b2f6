"""What other people's training loops ask of a model: transformers.Trainer, TRL, accelerate.

They look for methods and attributes of a `PreTrainedModel`, which a wrapper is not. Each is passed on by name. With a
blanket `__getattr__`, Trainer would see the wrapped model's `is_quantized`, find no PeftModel and refuse a QLoRA run.

Nothing here is part of the method; `dualspeed.py` reads the same without it.
"""

from torch import nn


class DropIn(nn.Module):
    """A wrapper around `self.model` whose LLM is `self.vlm.language_model`."""

    accepts_loss_kwargs = True  # Trainer shall pass num_items_in_batch
    _keys_to_ignore_on_save = None  # Trainer reads it after loading

    config = property(lambda self: self.model.config)
    generation_config = property(lambda self: self.model.generation_config)
    loss_type = property(lambda self: getattr(self.model, "loss_type", None))

    def __init__(self):
        super().__init__()
        self.register_state_dict_post_hook(_drop_aliases)
        self.register_load_state_dict_post_hook(_forgive_aliases)

    def __getattr__(self, name: str):
        if name in ("base_model", "base_model_prefix"):  # what TRL's loss, and peft, ask of the model itself
            mend = "give TRL's trainer `compute_loss = Trainer.compute_loss`; call add_lora before DualSpeed"
            raise AttributeError(f"DualSpeed has no {name}: {mend} (guide, your-own-loop)")
        return super().__getattr__(name)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def add_model_tags(self, tags: list[str]) -> None:
        self.model.add_model_tags(tags)

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict | None = None, **more) -> None:
        """Enables checkpointing on the LLM only: the frozen tower has nothing to recompute."""
        llm = self.vlm.language_model
        enable = getattr(llm, "activation_checkpointing_enable", None) or llm.gradient_checkpointing_enable
        enable(activation_checkpointing_kwargs, **more)

    def activation_checkpointing_disable(self) -> None:
        llm = self.vlm.language_model
        (getattr(llm, "activation_checkpointing_disable", None) or llm.gradient_checkpointing_disable)()

    # The names before transformers 5.23, which other trainers still use.
    gradient_checkpointing_disable = activation_checkpointing_disable

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **more) -> None:
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **more)


# Small LLMs tie lm_head to the embeddings: one parameter with two names, which safetensors refuses to save. Only the
# first name is kept, and loading it fills both.


def _aliases(module: nn.Module) -> set[str]:
    """The names of parameters that have an earlier name already."""
    every, first = ({n for n, _ in module.named_parameters(remove_duplicate=once)} for once in (False, True))
    return every - first


def _drop_aliases(module: nn.Module, state: dict, prefix: str, metadata: dict) -> None:
    for name in _aliases(module):
        state.pop(prefix + name, None)


def _forgive_aliases(module: nn.Module, incompatible) -> None:
    tied = _aliases(module)
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if key not in tied]
