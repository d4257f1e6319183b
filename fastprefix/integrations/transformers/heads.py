"""The modules of the base model that stay trainable: by default the freshly initialised head."""

import re

from torch import nn
from transformers import PreTrainedModel

_FRESH_HEAD = re.compile(r"For\w*(Classification|QuestionAnswering|MultipleChoice)$")


def trainable_modules(model: PreTrainedModel, names: list[str] | None) -> dict[str, nn.Module]:
    """The modules that stay trainable, by name.

    Raises:
        ValueError: a name that the model does not have.
    """
    if names is not None:
        modules = dict(model.named_modules())
        if missing := [name for name in names if name not in modules or not name]:
            raise ValueError(f"modules_to_save takes names of modules of {type(model).__name__}, got {missing}")
        return {name: modules[name] for name in names}
    if not _FRESH_HEAD.search(type(model).__name__):
        return {}
    children = model.named_children()
    return {name: child for name, child in children if child is not model.base_model and list(child.parameters())}
