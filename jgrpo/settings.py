"""Configuration classes as flat tables of settings, and YAML files as layers of values over them.

A configuration class is a dataclass whose fields are sections (dataclasses again) or plain settings.
Setting names are unique over all sections, so a layer is simply {name: value}; layers are
merged as `defaults < preset < file < flags` and only then become the frozen dataclasses.

Types are judged by pydantic in strict mode, which `transformers` installs anyway, so a file and a
flag are held to the same rule. YAML is read by PyYAML with deviations that each remove a known trap of YAML
1.1: `1e-4` is a number, `yes`, `on`, `12:30` and dates are strings, and a key given twice is refused.
"""

import ast
import difflib
import inspect
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from jgrpo.errors import UserError

C = TypeVar("C")
Layer = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """One leaf field of a configuration class."""

    name: str
    section: str
    """Field of the configuration class that holds it; "" for a leaf of the class itself."""
    annotation: Any
    default: Any
    """`dataclasses.MISSING` if it has to be given."""
    help: str

    @property
    def alternatives(self) -> tuple[Any, ...]:
        """The annotation's alternatives: `float | None` -> (float, NoneType)."""
        is_union = get_origin(self.annotation) not in (None, tuple, Literal)
        return get_args(self.annotation) if is_union else (self.annotation,)

    @property
    def is_tuple(self) -> bool:
        """Whether it takes several values."""
        return get_origin(self.annotation) is tuple

    @property
    def choices(self) -> tuple[Any, ...]:
        """Values of a `Literal`, also of one that may be null; empty for other types."""
        return tuple(c for part in self.alternatives if get_origin(part) is Literal for c in get_args(part))


def attribute_docstrings(cls: type) -> dict[str, str]:
    """The string under each field of a class, as one line: {field: text}."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    pairs = zip(body.body, body.body[1:], strict=False)
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in pairs
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }


def sections_of(cls: type) -> dict[str, type]:
    """{field: dataclass} for the nested sections of a configuration class, in order."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls) if is_dataclass(hints[field.name])}


@cache
def settings_of(cls: type) -> Mapping[str, Setting]:
    """Every leaf of a configuration class by name. Raises TypeError if two sections share a name."""
    sections = sections_of(cls)
    leaves = [leaf for name, section in sections.items() for leaf in _leaves(section, name)]
    leaves = [leaf for leaf in _leaves(cls, "") if leaf.name not in sections] + leaves
    table = {leaf.name: leaf for leaf in leaves}
    if len(table) != len(leaves):
        raise TypeError(f"{cls.__name__}: a setting's name occurs in two sections")
    return table


def _leaves(cls: type, section: str) -> list[Setting]:
    hints, docs = get_type_hints(cls), attribute_docstrings(cls)
    return [
        Setting(
            field.name,
            section,
            hints[field.name],
            field.default_factory() if field.default_factory is not MISSING else field.default,
            docs.get(field.name, ""),
        )
        for field in fields(cls)
    ]


def build(cls: type[C], values: Mapping[str, Any]) -> C:
    """The configuration object of a merged layer. Raises UserError for a setting that has no value."""
    table = settings_of(cls)
    for name, setting in table.items():
        if name not in values and setting.default is MISSING:
            raise UserError(f"{flag(name)} is missing: {setting.help}")
    leaf = {name: value for name, value in values.items() if not table[name].section}
    nested = {
        section: section_class(**{n: v for n, v in values.items() if table[n].section == section})
        for section, section_class in sections_of(cls).items()
    }
    return cls(**leaf, **nested)


def flatten(config: Any) -> Layer:
    """The inverse of `build`: every setting's value by name."""
    return {
        name: getattr(getattr(config, setting.section) if setting.section else config, name)
        for name, setting in settings_of(type(config)).items()
    }


def flag(name: str) -> str:
    """Command line spelling of a setting."""
    return "--" + name.replace("_", "-")


def nearest(name: str, known: Iterable[str]) -> str:
    """' Did you mean …?', or nothing if no known name is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]}?" if near else ""


def check_value(setting: Setting, value: Any, where: str) -> Any:
    """`value` as the setting's type (list -> tuple, int -> float); UserError names what was expected."""
    if setting.is_tuple and isinstance(value, list):
        value = tuple(value)
    try:
        return _adapter(setting.annotation).validate_python(value)
    except ValidationError:
        hint = nearest(str(value), map(str, setting.choices)) if setting.choices else ""
        raise UserError(f"{where}: {value!r} is not {expectation(setting.annotation)}.{hint}") from None


@cache
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation, config=ConfigDict(strict=True))


def expectation(annotation: Any) -> str:
    """A type in words: 'a number or null', 'one of group, batch, none'."""
    words = {int: "an integer", float: "a number", str: "a string", bool: "true or false", NoneType: "null"}
    if annotation in words:
        return words[annotation]
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(map(str, get_args(annotation)))
    if get_origin(annotation) is tuple:
        return f"a list, each {expectation(get_args(annotation)[0])}"
    return " or ".join(expectation(part) for part in get_args(annotation))


class _Loader(yaml.SafeLoader):
    """SafeLoader with the YAML 1.2 rules for numbers and booleans, and no duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise UserError(f"key {key!r} is given twice{_line(node.start_mark)}. Keep one of them.")
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes exactly the strings `_Loader` would read as something else."""


_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)$")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$")
_KEPT = {"tag:yaml.org,2002:null", "tag:yaml.org,2002:merge"}
for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {
        first: kept
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
        if (kept := [rule for rule in rules if rule[0] in _KEPT])
    }
    _class.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), "tTfF")
    _class.add_implicit_resolver("tag:yaml.org,2002:int", _INT, "-+0123456789")
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, "-+.0123456789")


def scalar(text: str) -> Any:
    """One YAML value, by the rules of the configuration files: '1e-4' -> 0.0001; the text itself if it is not YAML."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        return text


def _line(mark: Any) -> str:
    return f", line {mark.line + 1}" if mark else ""


def read_layer(path: str | Path, cls: type, also_known: Sequence[type] = ()) -> Layer:
    """Values of a YAML file for a configuration class: `section: {name: value}` or plain `name: value`.

    Settings of the classes `also_known` that `cls` lacks are allowed and left out: a command reads its own
    sections of a training run's file. Raises UserError for an unreadable file, an unknown or
    ambiguous key, or a value of the wrong type.
    """
    try:
        tree = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Give the path of a YAML file.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text. Give the path of a YAML file.") from None
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or "cannot be parsed"
        raise UserError(f"{path}: not valid YAML ({problem}{_line(getattr(error, 'problem_mark', None))}).") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(tree, dict | None):
        raise UserError(f"{path}: expected 'name: value' lines, found {type(tree).__name__}.")
    return _layer_of(tree or {}, cls, also_known, path)


def _layer_of(tree: dict[Any, Any], cls: type, also_known: Sequence[type], path: str | Path) -> Layer:
    known = {name: setting for part in (*also_known, cls) for name, setting in settings_of(part).items()}
    sections = {name: section for part in (*also_known, cls) for name, section in sections_of(part).items()}
    layer: Layer = {}
    for key, value in _entries(_without_shadowed(tree, cls, also_known), known, sections, path):
        if key in layer:
            raise UserError(f"{path}: {key} is given twice, in its section and at the top. Keep one of them.")
        layer[key] = check_value(known[key], value, f"{path}: {key}")
    return {name: value for name, value in layer.items() if name in settings_of(cls)}


def _without_shadowed(tree: dict[Any, Any], cls: type, also_known: Sequence[type]) -> dict[Any, Any]:
    """The tree without the settings of other commands' sections whose names `cls` uses at the top for something else.

    A run's `lora.adapter` is where its training began; the `--adapter` of `jgrpo.generate` is another thing.
    """
    own = {name for name, setting in settings_of(cls).items() if not setting.section}
    theirs = {
        (setting.section, name) for other in also_known for name, setting in settings_of(other).items() if name in own
    }
    return {
        key: {name: inner for name, inner in value.items() if (key, name) not in theirs}
        if isinstance(value, dict)
        else value
        for key, value in tree.items()
    }


def _entries(
    tree: dict[Any, Any], known: Mapping[str, Setting], sections: Mapping[str, type], path: str | Path
) -> Iterable[tuple[str, Any]]:
    """(name, value) of every leaf. A key that names both a section and a setting is the section iff it holds a map."""
    for key, value in tree.items():
        if key in sections and (isinstance(value, dict) or (value is None and key not in known)):
            yield from ((name, inner) for name, inner in _section_entries(key, value or {}, known, path))
        elif key in known:
            yield key, value
        elif key in sections:
            raise UserError(f"{path}: section {key} is {value!r}, expected 'name: value' lines under it.")
        else:
            raise UserError(f"{path}: unknown key {key!r}.{nearest(str(key), [*known, *sections])}")


def _section_entries(
    section: str, tree: dict[Any, Any], known: Mapping[str, Setting], path: str | Path
) -> Iterable[tuple[str, Any]]:
    inside = [name for name, setting in known.items() if setting.section == section]
    for name, value in tree.items():
        if name in inside:
            yield name, value
        elif name in known:
            home = known[name].section
            raise UserError(f"{path}: {section}.{name} belongs to section {home}: write it there, or at the top.")
        else:
            raise UserError(f"{path}: unknown key '{section}.{name}'.{nearest(str(name), inside + list(known))}")


def to_yaml(config: Any) -> str:
    """Every setting as nested sections; `read_layer` of it gives the same configuration."""
    tree: dict[str, Any] = {}
    for name, value in flatten(config).items():
        section = settings_of(type(config))[name].section
        place = tree.setdefault(section, {}) if section else tree
        place[name] = list(value) if isinstance(value, tuple) else value
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def preset_names() -> list[str]:
    """Presets shipped with the package."""
    return sorted(entry.name[:-5] for entry in files("jgrpo.presets").iterdir() if entry.name.endswith(".yaml"))


def preset_path(name: str) -> Path:
    """The YAML file of a preset. Raises UserError naming the presets there are."""
    if name not in preset_names():
        available = ", ".join(preset_names())
        raise UserError(f"unknown preset {name!r}; there are: {available}.{nearest(name, preset_names())}")
    return Path(str(files("jgrpo.presets").joinpath(f"{name}.yaml")))
