"""From words to an experiment's config: tyro, or argparse with the same options without tyro."""

import argparse
import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal, NoReturn

from experiments.methods import expand
from experiments.runs.experiment import Config, Experiment


def parse[C: Config](experiment: Experiment[C], arguments: Sequence[str]) -> C:
    """Return the preset that the arguments name, with the options that they override.

    Raises:
        ValueError: no such preset, or no such value of a leading option.
        SystemExit: --help, or an option that cannot be read; it has been explained.
    """
    default = experiment.presets[_preset(experiment, arguments)]
    # Protocols do not say that configs are dataclasses.
    plain: Any = default
    leading = {name: _ahead(arguments, name, getattr(plain, name)) for name in experiment.leading}
    default = experiment.complete(dataclasses.replace(plain, **leading))
    try:
        import tyro
    except ImportError:
        config: Any = _parse_plainly(experiment.program, arguments, default)
    else:
        config = tyro.cli(type(default), args=arguments, default=default, prog=experiment.program)
    return dataclasses.replace(config, methods=expand(config.methods))


def _preset(experiment: Experiment, arguments: Sequence[str]) -> str:
    name = _ahead(arguments, "preset", next(iter(experiment.presets)))
    if name not in experiment.presets:
        raise ValueError(f"--preset: expected one of {', '.join(experiment.presets)}, got {name!r}")
    return name


def _ahead(arguments: Sequence[str], name: str, default: str) -> str:
    """Read one option ahead of the others, because it decides their defaults."""
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    reader.add_argument(f"--{name}", default=default, nargs="?")
    return vars(reader.parse_known_args(arguments)[0])[name]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def _parse_plainly[C: Config](program: str, arguments: Sequence[str], default: C) -> C:
    """Parse as tyro would: an option a field, dotted where a field is itself a dataclass."""
    wide = argparse.ArgumentDefaultsHelpFormatter
    parser = _Parser(
        prog=program,
        description=inspect.getdoc(type(default)),
        formatter_class=wide,
        allow_abbrev=False,
    )
    _add_options(parser, default, prefix="")
    given = vars(parser.parse_args(arguments))
    return _replace(default, given, prefix="")


def _add_options(parser: argparse.ArgumentParser, default: Any, prefix: str) -> None:
    hints, helps = typing.get_type_hints(type(default)), _field_docs(type(default))
    for field in dataclasses.fields(default):
        name, value = f"{prefix}{field.name}", getattr(default, field.name)
        if dataclasses.is_dataclass(value):
            _add_options(parser, value, prefix=f"{name}.")
            continue
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            dest=name,
            default=value,
            help=helps.get(field.name, " ").replace("%", "%%"),
            **_reading(hints[field.name]),
        )


def _reading(hint: Any) -> dict[str, Any]:
    """How argparse reads a value of a type: one word, one of a few, or several."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return {"choices": arguments}
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        inner = _reading(next(a for a in arguments if a is not type(None)))
        reader, choices = inner.get("type", str), inner.get("choices")
        reading = {"type": lambda word: None if word == "None" else reader(word)}
        return reading | ({"choices": (*choices, None)} if choices else {})
    if typing.get_origin(hint) is tuple:
        return {"type": arguments[0], "nargs": "*" if arguments[-1] is ... else len(arguments)}
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    return {"type": hint}


def _replace(default: Any, given: dict[str, Any], prefix: str) -> Any:
    changes = {}
    for field in dataclasses.fields(default):
        name, value = f"{prefix}{field.name}", getattr(default, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = _replace(value, given, prefix=f"{name}.")
        else:
            word = given[name]
            changes[field.name] = tuple(word) if isinstance(word, list) else word
    return dataclasses.replace(default, **changes)


def _field_docs(cls: type) -> dict[str, str]:
    """The strings below the fields of a dataclass, where tyro finds its help, too."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    docs, above = {}, ""
    for line in ast.iter_child_nodes(definition):
        match line:
            case ast.AnnAssign(target=ast.Name(id=name)):
                above = name
            case ast.Expr(value=ast.Constant(value=str(text))) if above:
                docs[above], above = " ".join(text.split()), ""
    return docs
