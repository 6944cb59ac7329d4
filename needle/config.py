"""Checks a composed configuration against what it will be given to, builds it, and is the frame of every stage.

Every top-level key of a stage's primary file is a keyword parameter of the stage's function; every node with
`_target_` is bound to its target's signature: unknown and missing keys, types, ranges. All of it happens before
anything is built, and every problem found is told at once. Nodes are built here and not by hydra.utils.instantiate,
which would turn tuples back into lists and wrap a target's own errors.
"""

import dataclasses
import difflib
import functools
import importlib
import inspect
import json
import os
import re
import shlex
import signal
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from needle.errors import ConfigError, UserError

CONF = Path(__file__).resolve().parent.parent / "conf"
# A configuration names code. These packages are what it may name; a user's own come through NEEDLE_TARGETS="pkg,other".
TARGET_PACKAGES = ("needle", "torch", "pytorch_lightning", "transformers")
RESERVED = ("_target_", "_partial_", "_args_", "_recursive_", "_convert_")
INTERRUPTED = 130
# Groups of which a list of options is chosen, and the node that holds the options' nodes under their names.
LISTED = {"auxiliary": "auxiliaries"}


def check(cfg: DictConfig | Mapping[str, Any], stage: Callable[..., Any]) -> None:
    """Binds a stage's configuration to the stage's parameters and every node in it to its target.

    Raises:
        ConfigError: with one line a problem: where, what is there, what would be right.
    """
    problems = list(_interpolation_problems(cfg)) if isinstance(cfg, DictConfig) else []
    if not problems:
        plain = OmegaConf.to_container(cfg, resolve=True) if isinstance(cfg, DictConfig) else dict(cfg)
        problems = list(_call_problems(plain, stage, path="", skip=("cfg",)))
    if problems:
        raise ConfigError("\n".join(problems))


def build(node: Any) -> Any:
    """Instantiates a resolved node: nodes with `_target_` become what they name, from the inside out.

    Values are converted to what the target's annotations ask for (lists to tuples, text to Path).

    Raises:
        ConfigError: a target's own check (`__post_init__`) refuses its values.
    """
    if isinstance(node, DictConfig | ListConfig):
        node = OmegaConf.to_container(node, resolve=True)
    return _build(node, None, "")


def cross_check(rule: Callable[..., None]) -> Callable[[Callable], Callable]:
    """Decorates a stage with a rule over its built settings, e.g. which loss goes with which teacher."""

    def attach(stage_function: Callable) -> Callable:
        stage_function.cross_check = rule  # type: ignore[attr-defined]
        return stage_function

    return attach


def stage(name: str) -> Callable[[Callable[..., None]], Callable[[], None]]:
    """Makes a function the entry point of `python -m needle.NAME`, configured by conf/NAME.yaml.

    The function is called with the resolved configuration as a plain dict, in which `_choices_` maps groups to options
    and `_overrides_` lists the command line's, and with every top-level key, built. A UserError ends the process with
    status 2 and its message, Ctrl-C or SIGTERM with 130; neither shows a traceback.
    """

    def decorate(function: Callable[..., None]) -> Callable[[], None]:
        if function.__module__ == "__main__":
            # A stage's own settings class must be one class, whether python -m or a target's path leads to it.
            sys.modules.setdefault(f"needle.{name}", sys.modules["__main__"])

        @functools.wraps(function)
        def task(cfg: DictConfig) -> None:
            previous = signal.signal(signal.SIGTERM, _terminated)
            try:
                whole, built = prepared(cfg, function, runtime=HydraConfig.get())
                function(whole, **built)
            except UserError as error:
                _leave(f"needle.{name}: {error}", 2)
            except KeyboardInterrupt as stop:
                _leave(f"needle.{name}: {_interruption(stop)}", INTERRUPTED)
            finally:
                signal.signal(signal.SIGTERM, previous)

        # Hydra looks at the wrapped function's file to find the configuration; ours is given as an absolute path.
        del task.__wrapped__
        configured = hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(task)

        def main() -> None:
            try:
                configured()
            except KeyboardInterrupt as stop:  # while a launcher waits for its jobs
                _leave(f"needle.{name}: {_interruption(stop)}", INTERRUPTED)
            except SystemExit as ended:
                words = _of_cells(name, sys.argv[1:]) if ended.code == 1 else []
                if words:  # behind Hydra's own message, which proposes to append them
                    cure = shlex.quote(f"overrides={json.dumps(words)}")
                    print(f"needle.{name}: the cells' settings are one list of this stage: {cure}", file=sys.stderr)
                raise

        main.stage_function = function  # type: ignore[attr-defined]
        return main

    return decorate


def prepared(
    cfg: DictConfig, stage_function: Callable[..., Any], *, runtime: DictConfig
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A composed configuration as its stage takes it: the plain dict with `_choices_` and `_overrides_`, and the built
    settings. `runtime`: the `hydra` node that was composed with it.

    Raises:
        ConfigError: with every problem of it.
    """
    check(cfg, stage_function)
    plain = typing.cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
    built = build_settings(plain, stage_function)
    choices = {g: o for g, o in runtime.runtime.choices.items() if not g.startswith("hydra")}
    choices |= listed_choices(plain)  # Hydra does not tell them
    return {**plain, "_choices_": choices, "_overrides_": list(runtime.overrides.task)}, built


def compose(stage_name: str, overrides: Sequence[str]) -> tuple[DictConfig, DictConfig]:
    """What `python -m needle.STAGE OVERRIDES` would be given: the stage's configuration and Hydra's own node. For a
    stage that runs others within its process.

    Raises:
        ConfigError: Hydra refuses an override.
    """
    hydra.version.setbase("1.3")
    try:
        cfg = loader().load_configuration(stage_name, list(overrides), run_mode=RunMode.RUN)
    except HydraException as error:
        raise ConfigError(str(error)) from None
    with open_dict(cfg):
        runtime = cfg.pop("hydra")
    return cfg, runtime


def loader() -> ConfigLoader:
    """Of conf/. hydra.initialize would refuse inside a stage, which Hydra has initialised already."""
    return ConfigLoaderImpl(create_config_search_path(str(CONF)))


def build_settings(plain: Mapping[str, Any], stage_function: Callable[..., Any]) -> dict[str, Any]:
    """A stage's keyword arguments from its resolved configuration, after the stage's own cross-check."""
    hints = _hints(stage_function)
    settings = {key: value for key, value in plain.items() if not key.startswith("_")}
    built = {key: _build(value, hints.get(key), key) for key, value in settings.items()}
    rule = getattr(stage_function, "cross_check", None)
    if rule is not None:
        rule(**built)
    return built


def listed_choices(plain: Mapping[str, Any]) -> dict[str, str]:
    """Group -> its options as an override lists them: auxiliary -> "[hidden_states,attention_relations]"."""
    return {group: f"[{','.join(plain[node])}]" for group, node in LISTED.items() if node in plain}


def as_overrides(cfg: Mapping[str, Any], *groups: str) -> str:
    """The command-line words that choose the same options of these groups again, quoted for a shell."""
    chosen = [f"{group}={cfg['_choices_'][group]}" for group in groups if cfg["_choices_"].get(group)]
    nodes = {LISTED.get(group, group) for group in groups}
    keys = {override: override.lstrip("+~").split("=")[0] for override in cfg["_overrides_"]}
    own = [override for override, key in keys.items() if "." in key and key.split(".")[0] in nodes]
    return shlex.join([*chosen, *own])


def path_words(overrides: Sequence[str]) -> list[str]:
    """Those of a command line's overrides that say where things are kept."""
    return [override for override in overrides if override.startswith("paths.")]


def _of_cells(stage_name: str, words: Sequence[str]) -> list[str]:
    """Overrides of training settings among those of a stage that hands such to its cells, or not written as a list."""
    own, train = (OmegaConf.load(CONF / f"{name}.yaml") for name in (stage_name, "train"))
    if "overrides" not in own:
        return []
    groups = [next(iter(one)) for one in train.pop("defaults") if isinstance(one, Mapping | DictConfig)]
    keys = {str(one).split()[-1].strip("/") for one in (*train, *groups)} - {"hydra", "paths", *own}
    found = [word for word in words if re.split(r"[.=@]", word.lstrip("+~"))[0] in keys]
    bare = [word.removeprefix("overrides=") for word in words if re.match(r"overrides=[^\[]", word)]
    return [*bare, *found]


def _leave(message: str, status: int) -> None:
    print(message, file=sys.stderr, flush=True)
    sys.exit(status)


def _interruption(stop: KeyboardInterrupt) -> str:
    """What a stage said of where it was stopped, if it said anything."""
    return ": ".join(["interrupted", *map(str, stop.args)])


def _terminated(*_: Any) -> None:
    raise KeyboardInterrupt


def _interpolation_problems(cfg: DictConfig) -> Iterator[str]:
    """Values that are asked for (???) and interpolations that lead nowhere."""

    def visit(node: Any, path: str) -> Iterator[str]:
        keys = list(node) if isinstance(node, DictConfig) else range(len(node))
        for key in keys:
            here = f"{path}.{key}" if path else str(key)
            try:
                if OmegaConf.is_missing(node, key):
                    yield f"{here} is not set: give {here}=..."
                    continue
                value = node[key]
            except OmegaConfBaseException as error:
                yield f"{here}: {str(error).splitlines()[0]}"
                continue
            if isinstance(value, DictConfig | ListConfig):
                yield from visit(value, here)

    yield from visit(cfg, "")


def _call_problems(
    arguments: Mapping[str, Any], target: Callable[..., Any], *, path: str, skip: tuple = ()
) -> Iterator[str]:
    """What is wrong with calling `target` with these arguments, nested nodes included."""
    partial = bool(arguments.get("_partial_"))
    given = {key: value for key, value in arguments.items() if key not in RESERVED and not key.startswith("_")}
    parameters = {n: p for n, p in inspect.signature(target).parameters.items() if n not in ("self", *skip)}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {n: p for n, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    label = getattr(target, "__qualname__", str(target))
    hints = _hints(target)
    for key, value in given.items():
        here = f"{path}.{key}" if path else key
        if key not in named and not open_ended:
            near = difflib.get_close_matches(key, named, n=1)
            guess = f"did you mean {near[0]}?" if near else f"it has {', '.join(named) or 'none'}"
            yield f"{here}={_shown(value)}: {label} has no parameter {key!r}; {guess}"
            continue
        yield from _value_problems(value, hints.get(key), here)
    if not partial:
        for key, parameter in named.items():
            if key not in given and parameter.default is parameter.empty:
                here = f"{path}.{key}" if path else key
                yield f"{here} is missing: {label} needs it; give {'+' if path else ''}{here}=..."


def _value_problems(value: Any, hint: Any, path: str) -> Iterator[str]:
    if isinstance(value, Mapping) and "_target_" in value:
        try:
            target = _import(value["_target_"])
        except ConfigError as error:
            yield f"{path}._target_: {error}"
            return
        if (
            inspect.isclass(hint)
            and inspect.isclass(target)
            and not _is_protocol(hint)
            and not issubclass(target, hint)
        ):
            yield f"{path}._target_={value['_target_']} is not a {hint.__name__}"
        yield from _call_problems(value, target, path=path)
        return
    if isinstance(value, Mapping):
        for key, child in value.items():
            if isinstance(child, Mapping):
                yield from _value_problems(child, None, f"{path}.{key}")
    try:
        _validated(value, hint)
    except ValueError as error:
        yield f"{path}={_shown(value)}: {error}"


def _validated(value: Any, hint: Any) -> Any:
    """The value as the annotation has it: a list for a tuple becomes one, text for a Path, an int for a float; no more.

    Raises:
        ValueError: it is none of that; annotations that pydantic knows nothing about let everything pass.
    """
    from pydantic import PydanticSchemaGenerationError, ValidationError

    if hint is None or hint is Any:
        return value
    if dataclasses.is_dataclass(hint) or _is_protocol(hint):
        raise ValueError(f"a node with _target_ belongs here ({hint.__name__}): name an option of this group")
    try:
        # As JSON and strict: exactly what YAML can say, no "3" for 3 and no true for 1.
        return _adapter(hint).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(step) for step in first["loc"] if isinstance(step, int))
        raise ValueError((f"item {where}: " if where else "") + first["msg"][0].lower() + first["msg"][1:]) from None
    except PydanticSchemaGenerationError:
        return value


@functools.cache
def _adapter(hint: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(hint)


def _build(value: Any, hint: Any, path: str) -> Any:
    if isinstance(value, Mapping) and "_target_" in value:
        target = _import(value["_target_"])
        hints = _hints(target)
        arguments = {
            key: child if key in RESERVED else _build(child, hints.get(key), f"{path}.{key}")
            for key, child in value.items()
        }
        own = {key: child for key, child in arguments.items() if key not in RESERVED}
        if value.get("_partial_"):
            return functools.partial(target, **own)
        try:
            return target(**own)
        except ValueError as error:
            raise ConfigError(f"{path}: {error}") from None
    if isinstance(value, Mapping):
        return {key: _build(child, None, f"{path}.{key}") for key, child in value.items()}
    return _validated(value, hint)


def _import(name: str) -> Any:
    allowed = (*TARGET_PACKAGES, *filter(None, os.environ.get("NEEDLE_TARGETS", "").split(",")))
    if not isinstance(name, str) or name.split(".")[0] not in allowed:
        raise ConfigError(
            f"{name!r} is not in a package that a configuration may name ({', '.join(allowed)}); "
            "add yours with NEEDLE_TARGETS=package"
        )
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for step in parts[cut:]:
            if not hasattr(found, step):
                near = difflib.get_close_matches(step, dir(found), n=1)
                guess = f"; did you mean {near[0]}?" if near else ""
                raise ConfigError(f"{'.'.join(parts[:cut])} has no {step!r}{guess}")
            found = getattr(found, step)
        return found
    raise ConfigError(f"there is no module {'.'.join(parts[:-1])!r}")


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target, include_extras=True)
    except Exception:  # annotations of other packages may name what they import for type checkers only
        return {}


def _is_protocol(hint: Any) -> bool:
    return getattr(hint, "_is_protocol", False)


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
