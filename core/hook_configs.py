"""The hooks that a config adds: a list, as in mmengine, or a mapping of names, to which a command line can add."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from core.errors import ConfigError

_FORMS = "a list of {type: ...}, or a mapping NAME: {type: ...}, to which +custom_hooks.NAME={type: ...} adds"


def hook_configs(value: Any) -> list[dict[str, Any]]:
    """The configs of the hooks that `custom_hooks` holds, in their order.

    Args:
        value: a list of hook configs, a mapping of names to hook configs, or None. A name that holds None adds nothing,
            so that an experiment's hook can be switched off.

    Raises:
        ConfigError: something that is not a hook's config, with its place and the forms that are read.
    """
    if value is None:
        return []
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
    return [dict(hook) for hook in named.values()]
