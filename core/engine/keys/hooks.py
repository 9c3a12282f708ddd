"""The hooks that a config adds: a list, as in mmengine, or a mapping of names, to which a command line can add."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from core.errors import ConfigError

_FORMS = "a list of {type: ...}, or a mapping NAME: {type: ...}, to which +custom_hooks.NAME={type: ...} adds"


def hook_configs(value: Any) -> dict[str, dict[str, Any]]:
    """The configs of the hooks that `custom_hooks` holds, by their keys (``custom_hooks.NAME``), in their order.

    Args:
        value: a list of hook configs, a mapping of names to hook configs, or None. A name that holds None adds nothing,
            so that an experiment's hook can be switched off.

    Raises:
        ConfigError: something that is not a hook's config, with its place and the forms that are read.
    """
    if value is None:
        return {}
    if isinstance(value, Mapping):
        if isinstance(value.get("type"), str):
            raise ConfigError(
                f"custom_hooks holds the hook {value['type']} itself: give it a name, "
                f"custom_hooks={{NAME: {{type: {value['type']}, ...}}}}, or write a list"
            )
        named = {f"custom_hooks.{name}": hook for name, hook in value.items() if hook is not None}
    elif isinstance(value, list | tuple):
        named = {f"custom_hooks.{index}": hook for index, hook in enumerate(value)}
    else:
        raise ConfigError(f"custom_hooks={value!r} is neither of what is read: {_FORMS}")
    for place, hook in named.items():
        if not isinstance(hook, Mapping) or not hook.get("type"):
            raise ConfigError(f"{place}={hook!r} is not a hook's config, which has a type: {_FORMS}")
    return {place: dict(hook) for place, hook in named.items()}


def build_hooks(configs: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    """The hooks of configs by their keys, in their order.

    Raises:
        ConfigError: one cannot be built, or what is built is not a hook; names its key.
    """
    from mmengine.hooks import Hook

    from core.config.key import config_key
    from core.config.registry import build

    hooks = []
    for place, config in configs.items():
        with config_key(place):
            given = dict(config)
            priority = given.pop("priority", None)  # of every hook, as in mmengine
            hook = build(given)
            if not isinstance(hook, Hook):
                raise ConfigError(f"{config['type']} builds a {type(hook).__name__}, which is not an mmengine Hook")
            if priority is not None:
                hook.priority = priority
            hooks.append(hook)
    return hooks
