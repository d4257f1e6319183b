"""Publish an adapter on the Hugging Face Hub with a model card."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import HfApi, ModelCardData
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from ...._version import __version__
from ....methods import MethodConfig
from ..attachment import get_attachment, use_adapter
from ..models.tuners import find_base_model, has_tuner_layers
from ..sharding.tensor_parallel import refuse_sharded
from .peft_format import read_json
from .saving import CONFIG_FILE, refuse_occupied, save_adapter

_CARD = "README.md"


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    name: str | None = None,
    format: Literal["fastprefix", "peft"] = "fastprefix",
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload adapter",
    create_pr: bool = False,
    token: bool | str | None = None,
) -> str:
    """Publish an adapter of a model in a repository on the Hugging Face Hub, which is created if necessary.

    If the repository has no model card, this writes one that describes the adapter and how to load it.
    ``load_adapter(model, repo_id)`` loads the adapter.

    Args:
        model: a model with a method attached.
        repo_id: the name of the repository, such as "organization/name".
        name: the name of the adapter. None selects the adapter in use.
        format: the format of the files, as for ``save_adapter``.
        private: whether a new repository is private. None uses the organization's default.
        revision: the branch, which is created if necessary. None selects the main branch.
        commit_message: the message of the commit.
        create_pr: whether to open a pull request instead of committing to the branch.
        token: the access token for the Hub. None uses the token stored on this machine.

    Returns:
        The URL of the commit.

    Raises:
        ValueError: if the adapter cannot be saved, if the model is sharded, or if the repository contains an adapter of
            another library or a whole model, as for ``save_adapter``. Nothing is published.
    """
    attachment, base = get_attachment(model), find_base_model(model)
    refuse_sharded(base, "publish an adapter. Call save_adapter on all ranks, then upload the folder from one of them")
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as former:
        save_adapter(model, folder, name=name, format=format)
        api = HfApi(token=token, library_name="fastprefix", library_version=__version__)
        repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repository, branch=revision, exist_ok=True)
        names = [CONFIG_FILE, CONFIG_NAME]
        api.snapshot_download(repository, revision=revision, local_dir=former, allow_patterns=names)
        what = f"`repo_id` must be a separate repository, but {repository!r}"
        refuse_occupied(Path(former), read_json(Path(folder, CONFIG_FILE)), what)
        if not api.file_exists(repository, _CARD, revision=revision):
            with use_adapter(base, attachment.active if name is None else name):
                Path(folder, _CARD).write_text(make_card(model, repository, format), encoding="utf-8")
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )
    return str(commit.commit_url)


def make_card(model: nn.Module, repo_id: str, format: str) -> str:
    """Return the model card of the adapter in use, with its method, its options, its base model and how to load it."""
    adapter, base = get_attachment(model).adapter, find_base_model(model)
    config, kind = adapter.config, type(base).__name__
    path = base.name_or_path or ""
    is_public = path != "" and not Path(path).exists()
    source = path if is_public else "BASE"
    modules = [adapter.method, *map(base.get_submodule, adapter.saved_modules)]
    own = sum(p.numel() for p in {p for module in modules for p in module.parameters()})
    total = base.num_parameters()
    data = ModelCardData(
        library_name="peft" if format == "peft" else "fastprefix",
        base_model=source if is_public else None,
        base_model_relation="adapter" if is_public else None,
        tags=["fastprefix", config.method_name().replace("_", "-")],
    )
    lines = [
        f"# {type(config).__name__.removesuffix('Config')} for {source if is_public else kind}",
        "",
        f"An adapter made with fastprefix {__version__}. {_describe(config)}",
        "",
        "| | |",
        "|---|---|",
        f"| base model | {source if is_public else 'not on the Hub'}, `{kind}` |",
        f"| parameters | {own:,} of {total:,} ({own / total:.4%}) |",
        f"| `method` | {config.method_name()} |",
        *(f"| `{option}` | {_format(value)} |" for option, value in config.list_choices()),
        "",
        "## How to load it",
        "",
        "```python",
        *_list_code(base, source, repo_id, format),
        "```",
    ]
    if has_tuner_layers(base):
        lines += ["", f"It was trained together with {_name_tuners(base)} of PEFT. Load that adapter as well."]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n"


def _describe(config: MethodConfig) -> str:
    """Return the first paragraph of the docstring of a method's configuration."""
    text = (type(config).__doc__ or "").strip().partition("\n\n")[0]
    return " ".join(text.replace("``", "`").split())


def _format(value: Any) -> str:
    text = " ".join(str(value).split()).replace("|", "\\|")
    return text if len(text) <= 100 else text[:97] + "..."


def _list_code(base: PreTrainedModel, source: str, repo_id: str, format: str) -> list[str]:
    kind = type(base).__name__
    is_own = type(base).__module__.startswith("transformers.")
    imports = [f"from transformers import {kind}"] if is_own else []
    made = f'base = {kind}.from_pretrained("{source}")'
    if format == "peft":
        loaded = f'model = PeftModel.from_pretrained(base, "{repo_id}")'
        return ["from peft import PeftModel", *imports, "", made, loaded]
    return [*imports, "", "import fastprefix", "", made, f'model = fastprefix.load_adapter(base, "{repo_id}")']


def _name_tuners(base: PreTrainedModel) -> str:
    """Return the types of PEFT's adapters in a model."""
    configs: dict[str, Any] = getattr(base, "peft_config", {})
    kinds = {str(getattr(config.peft_type, "value", config.peft_type)) for config in configs.values()}
    return " and ".join(sorted(kinds)) or "an adapter"
