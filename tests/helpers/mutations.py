"""Files changed at random: a function of a seed, so that every failure can be had again."""

import json
import random
import tomllib
from typing import Any

import tomli_w

DEEP = "[" * 50_000 + "]" * 50_000
# Put in as they are: what no library would write.
RAW = {"<deep>": DEEP, "<huge>": "1e400", "<nan>": "NaN", "<long>": "9" * 5000, "<64>": str(2**64)}
VALUES: list[Any] = [None, True, 0, -1, 2**40, 1e308, 0.5, "", "x", "inf", "a\0b", [], {}, [[1]]]
VALUES += [{"a": 1}, [1.0, 2.0], *RAW]


def changed_bytes(whole: bytes, other: bytes, draw: random.Random) -> bytes:
    """One to three changes of bytes; `other` is a file to splice from."""
    content = bytearray(whole)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        at = draw.randrange(len(content) + 1)
        if draw.random() < 0.5:  # where most formats have their headers
            at = draw.choice((min(at, draw.randrange(200)), max(0, len(content) - 1 - at % 200)))
        length = draw.choice((1, 4, 8, draw.randrange(1, 300)))
        match draw.randrange(9):
            case 0 | 1 if at < len(content):
                content[at] ^= 1 << draw.randrange(8)
            case 2 if at < len(content):
                content[at] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))
            case 3:
                del content[at:]
            case 4:
                del content[at : at + length]
            case 5:
                content[at:at] = content[at : at + length]
            case 6:
                start = draw.randrange(len(other))
                content[at : at + length] = other[start : start + length]
            case 7:
                extreme = draw.choice((b"\0", b"\xff", b"\x7f\xff", b"\xff\x7f", b"[", b"9"))
                content[at : at + length] = (extreme * length)[:length]
            case _:
                content[at:at] = draw.randbytes(length)
    return bytes(content)


def changed_json(whole: bytes, draw: random.Random) -> bytes:
    """One value of a JSON file replaced, taken away, doubled or renamed."""
    value = _changed(json.loads(whole), draw)
    return _with_raw(json.dumps(value)).encode()


def changed_toml(whole: bytes, draw: random.Random) -> bytes:
    """The same of the tables of a TOML file; it has no null."""
    value = _changed(tomllib.loads(whole.decode()), draw)
    try:
        return _with_raw(tomli_w.dumps(value)).encode()
    except (TypeError, AttributeError):
        return b"recipe = []\nformat = 1\n"


def _changed(value: Any, draw: random.Random) -> Any:
    value = json.loads(json.dumps(value))
    places: list[tuple[Any, Any]] = []

    def walk(part: Any) -> None:
        keys = part.items() if isinstance(part, dict) else enumerate(part)
        for key, inner in list(keys)[:40]:
            places.append((part, key))
            if isinstance(inner, dict | list):
                walk(inner)

    if not isinstance(value, dict | list) or draw.random() < 0.02:
        return draw.choice(VALUES)
    walk(value)
    part, key = draw.choice(places)
    match draw.randrange(6):
        case 0:
            del part[key]
        case 1 if isinstance(part, dict):
            part[draw.choice(("x", "", key + "_", "é\x1b[31m"))] = part.pop(key)
        case 2 if isinstance(part, list):
            part.insert(key, part[key])
        case _:
            part[key] = draw.choice(VALUES)
    return value


def _with_raw(text: str) -> str:
    for name, raw in RAW.items():
        text = text.replace(json.dumps(name), raw)
    return text
