"""A study as its YAML file says: what varies, and the learning rates and seeds that every variant gets.

    title: Short convolution, and what else
    base: {hidden_size: 512, layers: 8, steps: 400}    # fields of TrainConfig; `overrides`: arguments of ReGLAConfig
    vary:                                              # axes; the variants are the product of their choices
      conv: {none: {overrides: {linear_conv_kernel_dim: 0}}, 4 taps: {}}
    also:                                              # variants outside of the product
      softmax: {mixer: softmax}
    lr: [1e-3, 2e-3, 4e-3]
    seeds: [0]
    more_seeds: {softmax: [1, 2]}                      # of some variants, by name
    sweep: {steps: 100}                                # choose each variant's rate by runs with these fields
    generate: [512, 8192]                              # behind the training, time the generation of so many tokens
    inspect: 8192                                      # behind it, look at the gates on so many tokens of text

Fields of a choice replace those of the base; `overrides` are merged key by key. With a sweep every variant is first
trained at every rate with the first seed and the fields of `sweep`, as a study NAME-sweep, and then at its best rate
alone.
"""

from __future__ import annotations

import difflib
import importlib.resources
import itertools
import re
import types
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from regla.runtime.reading import check_text, read_utf8
from regla.train.config import TrainConfig

_KEYS = ("title", "base", "vary", "also", "lr", "seeds", "more_seeds", "sweep", "generate", "inspect")
_ELSEWHERE = {  # fields of TrainConfig that a study's settings do not hold, and what gives them instead
    "lr": "the study's own `lr`",
    "seed": "the study's own `seeds`",
    "data": "--data",
    "valid": "--valid",
    "tokenizer": "--tokenizer",
    "device": "--device",
    "out": "--out",
    "init": "the study itself, whose models are new,",
    "dataset": "--data",
    "text_field": "--data",
    "resume": "the study itself",
    "tensorboard": "the study itself",
}
_FIELDS = {name: hint for name, hint in get_type_hints(TrainConfig).items() if name not in _ELSEWHERE}
_IN_WORDS = {int: "a whole number", float: "a number", str: "a word", bool: "true or false", type(None): "null"}
_NUMBERS = tuple[int, ...]
_IN_WORDS |= {_NUMBERS: "a list of whole numbers"}
_SUFFIXES = (".yaml", ".yml")

Settings = Mapping[str, Any]
"""Fields of TrainConfig, of them `overrides` a mapping."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One point of the grid before learning rate and seed."""

    choices: Mapping[str, str]
    """The choice on each axis; {"also": name} outside of the product."""
    settings: Settings
    """Base and choices merged."""

    @property
    def name(self) -> str:
        return variant_name(self.choices)


@dataclass(frozen=True, kw_only=True)
class Study:
    name: str
    source: str
    """What names it on the command line: its name, or the YAML file without its folder."""
    title: str
    variants: tuple[Variant, ...]
    lrs: tuple[float, ...]
    seeds: tuple[int, ...]
    vocab_size: int | None
    """Of the tokenizer to train where none is given."""
    sets: tuple[str, ...]
    """What --set changed."""
    more_seeds: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """By the variant's name, seeds beside those that all have."""
    sweep: Settings | None = None
    """Over a variant's settings, to choose its learning rate; None: all runs get every rate."""
    rates: Mapping[str, float] = field(default_factory=dict)
    """By the variant's name, the rate that a sweep chose; then it gets no other."""
    measured: Mapping[str, Any] = field(default_factory=dict)
    """What is measured behind the training, see `regla.study.measure`: by `generate` the numbers of tokens, by
    `inspect` that of the text."""

    def trials_of(self, variant: Variant) -> list[tuple[float, int]]:
        """(learning rate, seed) of all its runs."""
        rates = (self.rates[variant.name],) if variant.name in self.rates else self.lrs
        seeds = dict.fromkeys((*self.seeds, *self.more_seeds.get(variant.name, ())))
        return [(lr, seed) for lr in rates for seed in seeds]


def variant_name(choices: Mapping[str, str]) -> str:
    return "/".join(choices.values())


def shipped() -> list[str]:
    """Names of the studies that come with the package."""
    folder = importlib.resources.files("regla.study") / "studies"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_study(name_or_file: str, sets: Sequence[str] = (), only: Sequence[str] = ()) -> Study:
    """The study of a YAML file, or the one that is shipped under a name.

    sets: `KEY=VALUE` over the file: a field of the base, `overrides.NAME`, `lr` or `seeds`; VALUE is YAML.
    only: globs; the variants whose names match any, or all where there is none.

    Raises ValueError for a study that does not exist, is no YAML, has a key or value that does not fit, or no variant
    that any of `only` matches.
    """
    if name_or_file.endswith(_SUFFIXES):
        name = Path(name_or_file).stem
        text = read_utf8(name_or_file, "the YAML file of a study")
    elif name_or_file in shipped():
        name = name_or_file
        text = (importlib.resources.files("regla.study") / "studies" / f"{name}.yaml").read_text(encoding="utf-8")
    else:
        raise ValueError(
            f"There is no study {name_or_file!r}; give one of {', '.join(shipped())}, or the path of a .yaml file."
        )
    content = _load(text, f"The study {name}")
    _check_mapping(content, f"The study {name}")
    _check_keys(content, _KEYS, f"the study {name}")
    source = Path(name_or_file).name
    return replace(_build(name, dict(content), sets, only), source=source)


def matches(name: str, only: Sequence[str]) -> bool:
    """Whether any of the globs `only` matches the name of a variant; every name where there are none."""
    return not only or any(fnmatchcase(name, glob) for glob in only)


def in_order(study: Study) -> list[tuple[Variant, float, int]]:
    """All trials, in the order to train them: by seed, then by learning rate from the middle of the sweep outwards.

    So a study that is cut off has every variant at one rate first.
    """
    rates = sorted(study.lrs)
    middle_first = sorted(rates, key=lambda lr: abs(rates.index(lr) - (len(rates) - 1) / 2))
    found = [(variant, lr, seed) for variant in study.variants for lr, seed in study.trials_of(variant)]
    seeds = list(dict.fromkeys((*study.seeds, *(seed for _, _, seed in found))))
    return sorted(found, key=lambda trial: (seeds.index(trial[2]), middle_first.index(trial[1])))


def sweep_of(study: Study) -> Study:
    """The study that chooses the rates of one with a sweep."""
    assert study.sweep is not None
    variants = tuple(replace(variant, settings=_merge(variant.settings, study.sweep)) for variant in study.variants)
    return replace(
        study,
        name=f"{study.name}-sweep",
        title=f"{study.title}: learning rates",
        variants=variants,
        seeds=study.seeds[:1],
        more_seeds={},
        sweep=None,
        measured={},
    )


def _build(name: str, content: dict[str, Any], sets: Sequence[str], only: Sequence[str]) -> Study:
    where = f"the study {name}"
    base = content.get("base") or {}
    _check_settings(base, f"base of {where}")
    rates, seeds, base, own = content.get("lr"), content.get("seeds", [0]), dict(base), set[str]()
    sweep, more = content.get("sweep"), content.get("more_seeds") or {}
    if sweep is not None:
        _check_settings(sweep, f"sweep of {where}")
    for text in sets:
        key, value = _assignment(text)
        if key == "lr":
            rates = value
        elif key == "seeds":
            seeds = value
        else:
            of_sweep = sweep is not None and key.startswith("sweep.")
            field, _, of_model = key.removeprefix("sweep.").partition(".") if of_sweep else key.partition(".")
            one = (
                {field: {of_model: value}} if field == "overrides" and of_model else {field if of_sweep else key: value}
            )
            _check_settings(one, f"--set {text}")
            if sweep is not None and of_sweep:
                sweep = _merge(sweep, one)
                continue
            base = _merge(base, one)
            own.add(key)
    variants = _variants(content, base, where)
    names = [variant.name for variant, _ in variants]
    chosen = [(variant, settings) for variant, settings in variants if matches(variant.name, only)]
    if not chosen:
        raise ValueError(f"No variant matches --only {' '.join(map(repr, only))}; the study has {', '.join(names)}.")
    for variant, settings in chosen:
        for key in own:
            field, _, of_model = key.partition(".")
            if (of_model in settings.get("overrides", {})) if of_model else field in settings:
                raise ValueError(
                    f"--set {key}=... would not reach the variant {variant.name}, which sets {key} itself; "
                    "change it in the YAML file, or choose variants with --only."
                )
    vocab_size = base.get("vocab_size")
    _check_mapping(more, f"`more_seeds` of {where}")
    for name_of_variant in more:
        if name_of_variant not in names:
            near = difflib.get_close_matches(str(name_of_variant), names, n=1, cutoff=0)
            raise ValueError(
                f"`more_seeds` of {where} names {name_of_variant!r}, which is no variant; the nearest is {near[0]!r}."
            )
    for variant, settings in variants:
        if "vocab_size" in settings:
            raise ValueError(f"The variant {variant.name} sets vocab_size; set it in base, all share one tokenizer.")
    return Study(
        name=name,
        source=name,
        title=str(content.get("title") or name),
        variants=tuple(variant for variant, _ in chosen),
        lrs=_numbers(rates, "lr", where, float),
        seeds=_numbers(seeds, "seeds", where, int),
        vocab_size=vocab_size,
        sets=tuple(sets),
        more_seeds={name: _numbers(values, "seeds", f"`more_seeds` of {where}", int) for name, values in more.items()},
        sweep=sweep,
        measured=_measured(content, where),
    )


def _variants(content: Mapping[str, Any], base: Settings, where: str) -> list[tuple[Variant, Settings]]:
    """The variants, each with the settings that are its own."""
    axes: list[list[tuple[str, str, Settings]]] = []
    vary = content.get("vary") or {}
    _check_mapping(vary, f"`vary` of {where}")
    for axis, choices in vary.items():
        _check_mapping(choices, f"The axis {axis} of {where}")
        axes.append([(str(axis), *choice) for choice in _choices(choices, f"the axis {axis} of {where}")])
        if not axes[-1]:
            raise ValueError(f"The axis {axis} of {where} has no choices; give it some, or take it out.")
    also = content.get("also") or {}
    _check_mapping(also, f"`also` of {where}")
    points = [tuple(product) for product in itertools.product(*axes)] if axes else []
    points += [(("also", *choice),) for choice in _choices(also, f"`also` of {where}")]
    variants: list[tuple[Variant, Settings]] = []
    for point in points or [(("also", "base", {}),)]:
        own: Settings = {}
        for _, _, settings in point:
            own = _merge(own, settings)
        choices = {axis: choice for axis, choice, _ in point}
        variant = Variant(choices=choices, settings=_merge(base, own))
        if any(variant.name == other.name for other, _ in variants):
            raise ValueError(f"Two variants of {where} are named {variant.name}; rename one.")
        variants.append((variant, own))
    return variants


def _choices(choices: Mapping[Any, Any], where: str) -> list[tuple[str, Settings]]:
    """Choices by name, each with its settings."""
    found = []
    for name, settings in choices.items():
        if not isinstance(name, str | int | float) or isinstance(name, bool):
            raise ValueError(
                f"{name!r} in {where} is no name; put the word into quotes, YAML reads yes and no as bools."
            )
        settings = {} if settings is None else settings
        _check_settings(settings, f"{name} in {where}")
        found.append((str(name), settings))
    return found


def _merge(first: Settings, second: Settings) -> dict[str, Any]:
    overrides = {**first.get("overrides", {}), **second.get("overrides", {})}
    return {**first, **second} | ({"overrides": overrides} if overrides else {})


def _check_settings(settings: Any, where: str) -> None:
    _check_mapping(settings, where)
    for key in settings:
        if key in _ELSEWHERE:
            raise ValueError(f"{key} stands in {where}, but {_ELSEWHERE[key]} gives it; take it out.")
    _check_keys(settings, list(_FIELDS), where)
    for key, value in settings.items():
        if key == "overrides":
            _check_mapping(value, f"overrides in {where}")
            continue
        hint = _FIELDS[key]
        kinds = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if _NUMBERS in kinds and isinstance(value, list) and all(type(number) is int for number in value):
            continue
        if not (type(value) in kinds or (type(value) is int and float in kinds)):
            expected = " or ".join(_IN_WORDS[kind] for kind in kinds)
            raise ValueError(f"{key} in {where} is {value!r}, expected {expected}.")


def _check_mapping(value: Any, where: str) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} is {value!r}, expected a mapping, that is lines of `key: value`.")


def _check_keys(content: Mapping[Any, Any], known: Sequence[str], where: str) -> None:
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0)
            raise ValueError(f"Unknown key {key!r} in {where}; the nearest known one is {near[0]!r}.")


def _numbers(values: Any, key: str, where: str, kind: type) -> tuple[Any, ...]:
    good = isinstance(values, list) and bool(values) and len({*map(str, values)}) == len(values)
    allowed = (int, float) if kind is float else (int,)
    if not good or not all(type(value) in allowed and (value > 0 or (kind is int and value == 0)) for value in values):
        expected = "learning rates above 0, such as [1e-3, 2e-3]" if key == "lr" else "seeds from 0 on, such as [0, 1]"
        raise ValueError(f"`{key}` of {where} is {values!r}, expected a list of different {expected}.")
    return tuple(kind(value) for value in values)


def _measured(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if "generate" in content:
        values = content["generate"]
        good = isinstance(values, list) and all(type(value) is int and value > 0 for value in values)
        if not good or not values or values != sorted(set(values)):
            raise ValueError(
                f"`generate` of {where} is {values!r}, expected ascending numbers of tokens such as [512, 8192]."
            )
        found["generate"] = values
    if "inspect" in content:
        if type(content["inspect"]) is not int or content["inspect"] < 2:
            raise ValueError(
                f"`inspect` of {where} is {content['inspect']!r}, expected a number of tokens of at least 2."
            )
        found["inspect"] = content["inspect"]
    return found


def _assignment(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError(f"--set {text} is no assignment, expected KEY=VALUE such as steps=100.")
    return key, _load(value, f"--set {text}")


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key stands once, 1e-3 is a number, and no word holds what a file cannot hold."""

    def construct_scalar(self, node: yaml.ScalarNode) -> Any:
        return check_text(super().construct_scalar(node), f"Line {node.start_mark.line + 1}")

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):
                if key in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key!r} stands twice", key_node.start_mark)
                seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _load(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except RecursionError as error:
        raise ValueError(f"{where} is nested too deeply to be read; correct it.") from error
    except (yaml.YAMLError, ValueError, TypeError) as error:  # ValueError: a date or a number that there is not
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        place = f"line {mark.line + 1}: " if mark is not None else ""
        raise ValueError(f"{where} is no valid YAML ({place}{problem or error}); correct it.") from error
