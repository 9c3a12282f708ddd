"""Checkpoints of the authors (or of others) into ours and back, with an account of every tensor.

A paper offers a module ``<paper>.checkpoint`` with

- ``convert(state, target=None, **options) -> state``: a flat dictionary of tensors in a foreign layout to ours;
- optionally ``revert(state, **options) -> state``: the way back;
- optionally ``DROPPED = {"*.attn_mask": "recomputed from the window size", ...}``: shell patterns of foreign entries
  that have no place in ours, with the reason. An entry that is neither used nor explained is an error.

`target` is the module that is to be loaded (on the meta device) when an experiment is named, else the text given.
"""

from __future__ import annotations

import fnmatch
import inspect
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.config.command.cli import parse
from core.config.packages import import_part, split_words
from core.errors import ConfigError, VitrineError, nearest, some

if TYPE_CHECKING:
    from torch import Tensor, nn

# Buffers that constructors compute; no converter needs to say so again.
COMPUTED = {
    "*relative_position_index": "index table, computed by the model",
    "*attn_mask": "attention mask, computed by the model",
    "*position_ids": "index table, computed by the model",
    "*num_batches_tracked": "counter that no result depends on",
}


class ConversionError(VitrineError, ValueError):
    """A checkpoint that cannot be converted without losing or inventing something."""


@dataclass
class Options:
    """What to convert; everything else is an option of the paper's converter, or an override of the experiment."""

    paper: str = field(metadata={"help": "package whose checkpoint.py converts"})
    src: str = field(metadata={"help": "file to read: official pickle, .pt, .safetensors, .npz; or a run's folder"})
    dst: str = field(metadata={"help": "file to write: .pt or .safetensors"})
    target: str | None = field(
        default=None, metadata={"help": "handed to the converter (see the paper's checkpoint.py)"}
    )
    experiment: str | None = field(default=None, metadata={"help": "convert for its network, and check that it fits"})
    into: str | None = field(default=None, metadata={"help": "convert for this part of its model, e.g. discriminator"})
    stage: str | None = field(default=None, metadata={"help": "of an experiment with stages, the one; null: the first"})
    reverse: bool = field(default=False, metadata={"help": "from ours to the authors' layout"})
    key: str | None = field(default=None, metadata={"help": "where in the file the weights are, e.g. ema.model"})
    prefix: str = field(default="", metadata={"help": "only entries with this prefix, which is cut off, e.g. module."})
    drop: list[str] = field(default_factory=list, metadata={"help": "patterns of entries that are left out"})
    allow: list[str] = field(default_factory=list, metadata={"help": "further names an official pickle may mention"})
    report: str | None = field(default=None, metadata={"help": "also write the account to this JSON file"})
    config_dir: str | None = field(default=None, metadata={"help": "a folder of configs of your own"})


@dataclass
class Report:
    """What became of every tensor.

    Attributes:
        mapped: entry of the result -> entries of the source that it was made from.
        fresh: entries of the result that no source went into.
        dropped: entries of the source that are not in the result -> why.
        aside: what else the file held (optimizer, epoch, config ...).
    """

    mapped: dict[str, list[str]] = field(default_factory=dict)
    fresh: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    aside: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        same = sum(sources == [name] for name, sources in self.mapped.items())
        renamed = sum(len(sources) == 1 for sources in self.mapped.values()) - same
        used = {source for sources in self.mapped.values() for source in sources}
        joined = len(self.mapped) - same - renamed
        lines = [
            f"{len(used)} of {len(used) + len(self.dropped)} tensors carried over into {len(self.mapped)}: "
            f"{same} under their name, {renamed} renamed or cut, {joined} put together"
        ]
        if self.fresh:
            lines.append(f"{len(self.fresh)} made by the converter: {some(self.fresh)}")
        for reason, count in Counter(self.dropped.values()).items():
            lines.append(f"{count} dropped ({reason}): {some([k for k, r in self.dropped.items() if r == reason])}")
        if self.aside:
            lines.append(f"left aside: {some(self.aside)}")
        return "\n".join(lines)


def convert_state(
    state: Mapping[str, Tensor],
    convert: Callable[..., Mapping[str, Tensor]],
    *,
    dropped: Mapping[str, str] | None = None,
    **options: Any,
) -> tuple[dict[str, Tensor], Report]:
    """Calls a converter and accounts for every entry.

    Args:
        state: flat dictionary of tensors.
        convert: a paper's ``convert`` or ``revert``.
        dropped: shell pattern -> reason of entries that may be left out.
        options: handed to the converter.

    Returns:
        The new dictionary and the account.

    Raises:
        ConversionError: the converter refuses the state, or leaves entries out without a reason.
    """
    from torch import Tensor

    from core.engine.commands.tracing import trace

    try:
        result, sources = trace(lambda tensors: convert(tensors, **options), state)
    except VitrineError:
        raise
    except Exception as error:  # a foreign state can be wrong in any way
        reason = f"there is no entry {error}" if isinstance(error, KeyError) else str(error)
        raise ConversionError(f"the converter refuses the state: {reason}") from error
    wrong = [name for name, value in result.items() if not isinstance(value, Tensor)]
    if wrong:
        raise ConversionError(f"the converter returned entries that are no tensors: {some(wrong)}")
    report = Report(
        mapped={name: sorted(origin) for name, origin in sources.items() if origin},
        fresh=[name for name, origin in sources.items() if not origin],
    )
    used = set().union(*sources.values()) if sources else set()
    reasons = {**COMPUTED, **(dropped or {})}
    unexplained = []
    for name in state:
        if name not in used:
            reason = next((r for pattern, r in reasons.items() if fnmatch.fnmatchcase(name, pattern)), None)
            if reason is None:
                unexplained.append(name)
            else:
                report.dropped[name] = reason
    if unexplained:
        shown = "\n".join(f"  {name} {tuple(state[name].shape)}" for name in unexplained[:20])
        more = f"\n  ... and {len(unexplained) - 20} more" if len(unexplained) > 20 else ""
        raise ConversionError(
            f"{len(unexplained)} of {len(state)} entries are neither used nor explained (drop=PATTERN leaves them out "
            f"knowingly):\n{shown}{more}"
        )
    return result, report


def convert_file(
    options: Options, extra: Mapping[str, Any] | None = None, overrides: list[str] | None = None
) -> Report:
    """Reads, converts, checks and writes one file.

    Args:
        options: see `Options`.
        extra: options of the paper's converter.
        overrides: of the experiment's config.

    Returns:
        The account of every tensor.

    Raises:
        ConfigError: unknown paper or option, unsuitable file names.
        ConversionError: the state cannot be converted without losing or inventing something.
        core.checkpoint.StateMismatch: the result does not fit the experiment's model; nothing is written.
        core.checkpoint.CheckpointReadError: the source is missing, damaged or unsafe.
        core.checkpoint.CheckpointWriteError: the result cannot be written.
    """
    from core.checkpoint import StateMismatch, diff_state, save_atomic

    dst = Path(options.dst)
    if dst.suffix not in (".pt", ".pth", ".safetensors"):
        raise ConfigError(f"dst={options.dst}: write a .safetensors or .pt file")
    if dst.exists() and Path(options.src).exists() and dst.samefile(options.src):
        raise ConfigError("src and dst are the same file: give dst another name")
    converter, dropped = find_converter(options.paper, reverse=options.reverse)
    extra = dict(extra or {})
    model, inside = _model(options, overrides or [])
    if not options.reverse:
        target = model if model is not None else options.target
        if target is not None:
            extra["target"] = target
    elif options.target is not None:
        raise ConfigError(
            "target= belongs to the way in: with reverse=true the layout is an option of the paper's revert"
        )
    _check_options(converter, extra, options.paper)
    state, aside = read_state(options.src, key=options.key, allow=options.allow)
    state, left = _under(state, options.prefix or _own_prefix(state, inside, options.reverse))
    asked = [name for name in state if any(fnmatch.fnmatchcase(name, pattern) for pattern in options.drop)]
    # Before the converter, which may refuse what it does not know.
    state = {name: value for name, value in state.items() if name not in asked}
    converted, report = convert_state(state, converter, dropped=dropped, **extra)
    report.dropped |= dict.fromkeys(asked, "left out on request")
    report.aside = [*aside, *left]
    if model is not None and not options.reverse and (diff := diff_state(model, converted)):
        counters = [k for k in diff.missing if k.endswith("num_batches_tracked")]
        if diff.without(counters):
            name = options.experiment + (f" ({options.into})" if options.into else "")
            raise StateMismatch(f"the result does not fit {name}; nothing was written.\n{diff}", diff)
    save_atomic(_own_copies(converted, dst), dst)
    if options.report:
        Path(options.report).write_text(json.dumps(asdict(report), indent=1) + "\n")
    return report


def _own_copies(state: Mapping[str, Tensor], dst: Path) -> dict[str, Tensor]:
    """The tensors without what else their storages hold; names of one tensor keep sharing it.

    Raises:
        ConversionError: written one by one, as safetensors are, they would take many times the memory that they share.
    """
    copies: dict[str, Tensor] = {}
    result = {}
    for name, value in state.items():
        view = repr((value.data_ptr(), value.dtype, value.shape, value.stride())) if value.numel() else name
        if view not in copies:
            copies[view] = value.detach().contiguous().clone()
        result[name] = copies[view]
    shared = sum(value.nbytes for value in copies.values())
    if dst.suffix == ".safetensors" and sum(value.nbytes for value in result.values()) > 8 * shared + (64 << 20):
        raise ConversionError(
            f"{len(result)} names share {len(copies)} tensors of {shared / 1e6:,.1f} MB, and safetensors would hold "
            f"them once for each name: write a .pt file instead of {dst}"
        )
    return result


def find_converter(paper: str, *, reverse: bool = False) -> tuple[Callable[..., Mapping[str, Tensor]], dict[str, str]]:
    """The converter of a paper, and its reasons for entries that it drops.

    Raises:
        ConfigError: no such package, or it converts no checkpoints (that way); near names are in the message.
        ImportError: the module exists but cannot be imported.
    """
    module = import_part(paper, "checkpoint")
    name = "revert" if reverse else "convert"
    converter = getattr(module, name, None)
    if converter is None:
        way = "back to the authors' layout" if reverse else "into ours"
        raise ConfigError(f"{paper}.checkpoint has no {name}(): it does not convert {way}")
    return converter, dict(getattr(module, "DROPPED", {})) if not reverse else {}


def read_state(
    src: str | os.PathLike[str], *, key: str | None = None, allow: list[str] | None = None
) -> tuple[dict[str, Tensor], list[str]]:
    """The weights in a file, as a flat dictionary of tensors, and the names of what else it holds.

    Args:
        src: a checkpoint file, or a run's folder (its newest whole checkpoint, averaged weights where there are).
        key: where the weights are (``ema.model``); None: they are found.
        allow: further names that an official pickle may mention.

    Raises:
        ConversionError: there are no weights at that place.
    """
    from torch import Tensor

    from core.checkpoint.latest import LATEST
    from core.checkpoint.run_folder import find_checkpoint
    from core.checkpoint.weights import read, state_in

    path = find_checkpoint(src) if Path(src).is_dir() or Path(src).name == LATEST else Path(src)
    content = read(path, allow or ())
    try:
        state, aside = state_in(content, path, key=key)
    except ConfigError as error:
        raise ConversionError(str(error)) from None
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return tensors, [*aside, *(name for name in state if name not in tensors)]


def _under(state: dict[str, Tensor], prefix: str) -> tuple[dict[str, Tensor], list[str]]:
    if not prefix:
        return state, []
    inside = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
    if not inside:
        raise ConversionError(f"no entry begins with '{prefix}' (there are {some(sorted(state), 6)})")
    return inside, [name for name in state if not name.startswith(prefix)]


def _own_prefix(state: Mapping[str, Tensor], inside: str | None, reverse: bool) -> str:
    """Our own runs hold the whole trainer; its network is what other layouts know."""
    if not reverse:
        return ""
    names = [f"{inside}."] if inside else ["network."]
    return next((p for p in names if any(name.startswith(p) for name in state)), "")


def _model(options: Options, overrides: list[str]) -> tuple[nn.Module | None, str | None]:
    """The part of the experiment's model that is converted, on the meta device, and its name in the trainer."""
    if options.experiment is None:
        words = [f"{name}={getattr(options, name)}" for name in ("into", "stage") if getattr(options, name)]
        if words or overrides:
            raise ConfigError(f"{[*words, *overrides][0]} belongs to a config: name the experiment, too")
        return None, None
    from core.checkpoint.placement import network_name, submodule
    from core.config.composition import compose
    from core.engine.launch import build_trainer
    from core.engine.run.config import stage_for

    cfg = compose([f"experiment={options.experiment}", *overrides], options.config_dir)
    trainer = build_trainer(cfg if options.stage is None else stage_for(cfg, None, options.stage), device="meta")
    if options.into is not None:
        return submodule(trainer, options.into), options.into
    return trainer.inference_network(), network_name(trainer)


def _check_options(converter: Callable[..., Any], given: Mapping[str, Any], paper: str) -> None:
    from core.config.registry import check_arguments

    first, *known = inspect.signature(converter).parameters.values()
    names = [p.name for p in known]
    if first.name in given:
        raise ConfigError(f"'{first.name}' is the state itself, no option of {paper}.checkpoint.{converter.__name__}")
    check_arguments(converter, given, where=f"{paper}.checkpoint.{converter.__name__}")
    missing = [p.name for p in known if p.default is p.empty and p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    for name in missing:
        if name not in given:
            raise ConfigError(f"{paper}.checkpoint.{converter.__name__} needs {name}=...{nearest(name, names)}")


def main(argv: list[str], doc: str) -> None:
    """The command line of ``tools/convert.py``."""
    options, words = parse(argv, Options, doc=doc, overrides=True)
    extra, overrides = split_words(words)
    report = convert_file(options, extra, overrides)
    print(report)
    print(f"written: {options.dst}")
