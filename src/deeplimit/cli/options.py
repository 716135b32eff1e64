"""A verb's options are made from its function: signature and docstring give name, default, help.

Positional parameters are words, keyword-only ones options. A parameter that is a dataclass stands
for its fields. A text in an annotation is what stands for the value in the help, `Doc` explains a
parameter that several functions have. `tell` and `quiet` are the command line's own to give.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import field, fields, is_dataclass, make_dataclass
from typing import Annotated, Any

from tyro.conf import DisallowNone, FlagCreatePairsOff, Positional, arg

from deeplimit.verbs.answer import Within, option

# No --no-json beside --json, and no way to spell out None: leave the option out.
STYLE = (FlagCreatePairsOff, DisallowNone)
HIDDEN = ("tell", "quiet")

Json = Annotated[bool, arg(help="Print the result as JSON on stdout, and nothing else there.")]


def options_of(function: Callable[..., Any]) -> type[Any]:
    """The options of a verb, and --json, as a dataclass that the parser reads."""
    description, explained = documented(function)
    bases: tuple[Any, ...] = ()
    own: list[tuple[str, Any, Any]] = []
    for name, parameter in inspect.signature(function).parameters.items():
        kind, default = parameter.annotation, parameter.default
        if name in HIDDEN:
            continue
        if is_dataclass(kind):
            bases = (kind,)
            own += [(f.name, parsed(f.type), f) for f in fields(kind)]
            continue
        said = explained.get(name)
        if said and default is True:  # the option is --no-NAME
            said = f"Do not {said[0].lower()}{said[1:]}"
        hint = parsed(kind, said, default, positional=parameter.kind is not parameter.KEYWORD_ONLY)
        required = default is inspect.Parameter.empty
        own.append((name, hint, field() if required else field(default=default)))
    own.append(("json", Json, field(default=False)))
    namespace = {"__doc__": description, "__module__": function.__module__}
    return make_dataclass(
        function.__name__, own, bases=bases, namespace=namespace, frozen=True, kw_only=True
    )


def call(function: Callable[..., Any], options: Any, hidden: Mapping[str, Any]) -> Any:
    """Calls a function with what was parsed, and what of `hidden` it takes.

    Raises:
        InputError: a number that is not within what its annotation says.
    """
    given = {}
    for name, parameter in inspect.signature(function).parameters.items():
        kind = parameter.annotation
        if name in HIDDEN:
            given[name] = hidden[name]
        elif is_dataclass(kind):
            values = {f.name: getattr(options, f.name) for f in fields(kind)}
            given[name] = kind(**values)  # type: ignore[operator]
        else:
            value = given[name] = getattr(options, name)
            for note in getattr(kind, "__metadata__", ()):
                if isinstance(note, Within) and value is not None:
                    note.check(option(name), value)
    return function(**given)


def documented(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """Returns what a docstring says of a function, and of each parameter."""
    description, *sections = re.split(
        r"\n(?=(?:Args|Raises|Returns):\n)", inspect.getdoc(function) or ""
    )
    args = next((section for section in sections if section.startswith("Args:")), "")
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", args, re.M)
    return description.strip(), {name: " ".join(text.split()) for name, text in entries}


def parsed(
    hint: Any, explained: str | None = None, default: Any = None, *, positional: bool = False
) -> Any:
    """An annotation that says to the parser what a function's says to people; `Doc` it reads."""
    notes = getattr(hint, "__metadata__", ())
    metavar = next((note for note in reversed(notes) if isinstance(note, str)), None)
    words = "" if default is True else default_hint
    told = arg(metavar=metavar, help=explained, help_behavior_hint=words)
    return Annotated[hint, Positional, told] if positional else Annotated[hint, told]


def default_hint(value: str) -> str:
    """None says nothing: the text of such an option says what is done without it."""
    return "" if value in ("", "None") else f"(default: {value})"
