"""Mutations of JSON that keep it JSON, or nearly so: keys dropped, types changed, huge numbers, NaN, deep nesting, …"""

from __future__ import annotations

import json
from random import Random
from typing import Any

from fuzz_bytes import Mutated, flip_bits


class Raw(str):
    """Text that is written as it is, JSON or not."""


class Pairs(list[tuple[str, Any]]):
    """An object that may have a key twice."""


SCALARS: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 16, 255, 65536, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63),
    *(2**64, 10**30, -(2**31), -(2**63), 0.0, 0.5, 1e-300, 1e308, -1.5),
    *(
        Raw("NaN"),
        Raw("Infinity"),
        Raw("-Infinity"),
        Raw("1e999"),
        Raw("-0"),
        Raw("1" * 5000),
        Raw("1.0"),
        Raw("01"),
    ),
    *(
        "",
        "a",
        "1",
        "\0",
        "..",
        "../x",
        "../../outside/x",
        "/nowhere/letter",
        "a/b",
        "C:\\x",
        "x" * 5000,
        "é\u2028😀",
    ),
    *(Raw('"\\ud800"'), Raw('"\\u0000"'), Raw('"\xff'), Raw("nul"), Raw("'a'"), Raw("")),
)
NESTED: tuple[Any, ...] = (
    *([], {}, [[]], [None], {"": None}, {"a": {"b": [1]}}, ["a", 1], [0] * 1000, ["x"] * 1000),
    *(Raw("[" * 100_000), Raw("[" * 900 + "]" * 900), Raw("[" * 20_000 + "]" * 20_000)),
    *(Raw('{"a":' * 900 + "1" + "}" * 900), Raw('{"a":' * 20_000 + "1" + "}" * 20_000)),
)
#: How often a walk from the root stops at each node.
_STOP = 0.25


def change_json(data: bytes, random: Random) -> Mutated:
    """One to three changes of the parsed text; what does not parse has bits flipped instead."""
    try:
        tree = json.loads(data)
    except ValueError:
        return flip_bits(data, random)
    said = []
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        tree, what = _change(tree, random, tree)
        said.append(what)
    if random.random() < 0.02:
        tree, more = random.choice(NESTED), "the whole became something else"
        said.append(more)
    return _write(tree).encode("utf-8", "surrogatepass"), "; ".join(said)


def change_line(data: bytes, random: Random) -> Mutated:
    """`change_json` in one line of a JSONL file."""
    lines = data.split(b"\n")
    i = random.randrange(len(lines))
    lines[i], what = change_json(lines[i], random)
    return b"\n".join(lines), f"line {i + 1}: {what}"


def change_safetensors(data: bytes, random: Random) -> Mutated:
    """The header of a safetensors file; its length field follows, or does not."""
    length = int.from_bytes(data[:8], "little")
    header, what = change_json(data[8 : 8 + length], random)
    if random.random() < 0.9:
        length = len(header)
    else:
        what += "; the length is that of before"
    return length.to_bytes(8, "little") + header + data[8 + int.from_bytes(data[:8], "little") :], what


def _change(node: Any, random: Random, root: Any) -> Mutated | tuple[Any, str]:
    """The node with a change in it, and what it was."""
    is_branch = isinstance(node, dict | list) and not isinstance(node, Pairs) and len(node) > 0
    if is_branch and random.random() > _STOP:
        key = random.choice(list(node)) if isinstance(node, dict) else random.randrange(len(node))
        changed, what = _change(node[key], random, root)
        copy = dict(node) if isinstance(node, dict) else list(node)
        copy[key] = changed
        return copy, f"{key!r:.60}/{what}"
    if isinstance(node, dict) and node:
        return _change_object(dict(node), random, root)
    if isinstance(node, list) and not isinstance(node, Pairs) and node:
        return _change_list(list(node), random, root)
    return _change_leaf(node, random, root)


def _change_object(node: dict[str, Any], random: Random, root: Any) -> tuple[Any, str]:
    key = random.choice(list(node))
    how = random.choice(("drop", "rename", "add", "twice", "value", "value", "swap", "replace"))
    if how == "drop":
        del node[key]
    elif how == "rename":
        name = random.choice((key + "x", key.upper(), "", "../" + key, "__metadata__", "x" * 300, "é\0"))
        node[name] = node.pop(key)
    elif how == "add":
        node[random.choice(("added", "", "../x", "quantization_config", "auto_map"))] = _value(random, root)
    elif how == "twice":
        return Pairs(
            [*node.items(), (key, random.choice((node[key], _value(random, root))))]
        ), f"{key!r} twice"
    elif how == "value":
        node[key] = _value(random, root)
    elif how == "swap":
        other = random.choice(list(node))
        node[key], node[other] = node[other], node[key]
    else:
        return _value(random, root), "object replaced"
    return node, f"{how} {key!r:.60}"


def _change_list(node: list[Any], random: Random, root: Any) -> tuple[Any, str]:
    i = random.randrange(len(node))
    how = random.choice(("drop", "double", "many", "insert", "empty", "reverse", "value", "replace"))
    if how == "drop":
        del node[i]
    elif how == "double":
        node.insert(i, node[i])
    elif how == "many":
        node[i:i] = [node[i]] * 1000
    elif how == "insert":
        node.insert(i, _value(random, root))
    elif how == "empty":
        node = []
    elif how == "reverse":
        node.reverse()
    elif how == "value":
        node[i] = _value(random, root)
    else:
        return _value(random, root), "list replaced"
    return node, f"{how} item {i}"


def _change_leaf(node: Any, random: Random, root: Any) -> tuple[Any, str]:
    if isinstance(node, bool) or node is None or random.random() < 0.4:
        new = _value(random, root)
    elif isinstance(node, int):
        new = random.choice(
            (node + 1, node - 1, -node, node * 2, node // 2, float(node), str(node), [node], node * 2**32)
        )
    elif isinstance(node, float):
        new = random.choice((-node, node * 1e300, 0.0, int(node), str(node)))
    elif isinstance(node, str):
        at = random.randrange(len(node) + 1)
        new = random.choice(
            (
                node + "x",
                "../" + node,
                "/" + node,
                node[:at],
                node[:at] + "\0" + node[at:],
                node * 100,
                [node],
            )
        )
    else:
        new = _value(random, root)
    return new, f"{node!r:.40} became {new!r:.60}"


def _value(random: Random, root: Any) -> Any:
    """Something else, now and then from elsewhere in the same file."""
    kind = random.random()
    if kind < 0.65:
        return random.choice(SCALARS)
    if kind < 0.9:
        return random.choice(NESTED)
    node = root
    while isinstance(node, dict | list) and node and not isinstance(node, Pairs) and random.random() > _STOP:
        node = node[random.choice(list(node))] if isinstance(node, dict) else random.choice(node)
    return node


def _write(node: Any) -> str:
    if isinstance(node, Raw):
        return str(node)
    if isinstance(node, Pairs):
        return "{" + ",".join(f"{_write(k)}:{_write(v)}" for k, v in node) + "}"
    if isinstance(node, dict):
        return "{" + ",".join(f"{_write(k)}:{_write(v)}" for k, v in node.items()) + "}"
    if isinstance(node, list):
        return "[" + ",".join(map(_write, node)) + "]"
    return json.dumps(node, ensure_ascii=False)
