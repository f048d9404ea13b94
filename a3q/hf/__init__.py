"""Reduced models in PyTorch: the folder's layout and configuration, and the model class that transformers runs.

`register` makes transformers' Auto classes know them. It costs nothing until transformers is imported.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

MODEL_TYPE = "a3q"
"""`model_type` of the folder's config.json."""


def register() -> None:
    """Make `AutoConfig` know the folders, now where it is there already, else as soon as it is imported.

    The model classes follow with the first configuration: transformers imports `AutoModel` in the midst of modules that
    those need.
    """
    import wrapt

    wrapt.register_post_import_hook(_configuration, "transformers.models.auto.configuration_auto")


def _configuration(auto: ModuleType) -> None:
    from a3q.hf.configuration_a3q import A3QConfig

    auto.AutoConfig.register(MODEL_TYPE, A3QConfig, exist_ok=True)


@cache
def register_models() -> None:
    """Make `AutoModel` and `AutoModelForCausalLM` know the classes."""
    from transformers import AutoModel, AutoModelForCausalLM

    from a3q.hf.configuration_a3q import A3QConfig
    from a3q.hf.modeling_a3q import A3QForCausalLM, A3QModel

    AutoModel.register(A3QConfig, A3QModel, exist_ok=True)
    AutoModelForCausalLM.register(A3QConfig, A3QForCausalLM, exist_ok=True)
