"""Mutations of a file's bytes, and of the fields that some binary formats have.

Every function takes the pristine bytes and a seeded generator, and gives new bytes and what was done, for a person.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence
from random import Random

#: Lengths, counts and offsets that break readers.
NUMBERS = (
    *(0, 1, 2, 3, 7, 8, 31, 32, 33, 255, 256, 4096, 65535, 65536, 2**20, 2**24, 2**30),
    *(2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1),
    *(-1, -2, -8, -(2**31), -(2**63)),
)
#: Headers lie at the beginning: half of all places are chosen there.
HEAD = 4096
_BLOCKS = (1, 2, 4, 8, 16, 64, 256, 4096)

Mutated = tuple[bytes, str]
Mutator = Callable[[bytes, Random], Mutated]


def place(data: bytes, random: Random) -> int:
    """An offset, as often in the first `HEAD` bytes as anywhere."""
    end = min(len(data), HEAD) if random.random() < 0.5 else len(data)
    return random.randrange(max(end, 1))


def flip_bits(data: bytes, random: Random) -> Mutated:
    """Up to eight bits."""
    changed = bytearray(data or b"\0")
    places = [place(changed, random) for _ in range(random.choice((1, 1, 1, 2, 4, 8)))]
    for at in places:
        changed[at] ^= 1 << random.randrange(8)
    return bytes(changed), f"bits flipped at {places}"


def set_block(data: bytes, random: Random) -> Mutated:
    """Some bytes become zeros, ones or noise."""
    at, n = place(data, random), random.choice(_BLOCKS)
    kind = random.choice(("zero", "ones", "noise"))
    n = min(n, len(data) - at)
    block = {"zero": bytes(n), "ones": b"\xff" * n, "noise": random.randbytes(n)}[kind]
    return data[:at] + block + data[at + n :], f"{n} bytes of {kind} at {at}"


def truncate(data: bytes, random: Random) -> Mutated:
    """The end is missing."""
    at = place(data, random)
    return data[:at], f"cut at {at} of {len(data)}"


def extend(data: bytes, random: Random) -> Mutated:
    """Something stands behind the end."""
    n = random.choice(_BLOCKS)
    more = random.choice((bytes(n), random.randbytes(n), data[:n]))
    return data + more, f"{len(more)} bytes added"


def move_block(data: bytes, random: Random) -> Mutated:
    """A block is taken out, put in again, or doubled."""
    at, to, n = place(data, random), place(data, random), random.choice(_BLOCKS)
    block = data[at : at + n]
    how = random.choice(("removed", "moved", "doubled"))
    rest = data if how == "doubled" else data[:at] + data[at + n :]
    made = rest if how == "removed" else rest[:to] + block + rest[to:]
    return made, f"{n} bytes at {at} {how} (to {to})"


def set_number(data: bytes, random: Random) -> Mutated:
    """A number of 1 to 8 bytes is one of `NUMBERS`, little or big endian."""
    size = random.choice((1, 2, 4, 4, 8, 8))
    at = min(place(data, random), max(len(data) - size, 0))
    at -= at % random.choice((1, size))
    number = random.choice(NUMBERS)
    order = "little" if random.random() < 0.9 else "big"
    field = (number % 2 ** (8 * size)).to_bytes(size, order)  # type: ignore[arg-type]
    return data[:at] + field + data[at + size :], f"{number} ({size} bytes, {order}) at {at}"


def bytes_mutators() -> Sequence[Mutator]:
    """All of them, for any file."""
    return (flip_bits, flip_bits, set_block, truncate, extend, move_block, set_number)


def replace_digits(data: bytes, random: Random) -> Mutated:
    """A decimal number in a text header, such as a .npy file's, becomes another."""
    found = list(re.finditer(rb"\d+", data[:HEAD]))
    if not found:
        return flip_bits(data, random)
    match = random.choice(found)
    number = random.choice((*NUMBERS, 10**30))
    made = data[: match.start()] + str(number).encode() + data[match.end() :]
    return made, f"{match[0].decode()} at {match.start()} became {number}"


def replace_npy_type(data: bytes, random: Random) -> Mutated:
    """The element type of a .npy file becomes another of as many or other bytes."""
    kinds = (
        b"|O",
        b"<f8",
        b"<i4",
        b">i8",
        b"<u8",
        b"|b1",
        b"<c16",
        b"<U9",
        b"|V8",
        b"<M8[s]",
        b"|S0",
        b"<i0",
    )
    kind = random.choice(kinds)
    match = re.search(rb"'descr': '([^']*)'", data[:HEAD])
    if match is None:
        return flip_bits(data, random)
    return data[: match.start(1)] + kind + data[match.end(1) :], f"dtype {kind.decode()}"


# ---- GGUF: llama.cpp's docs/gguf.md ----

_GGUF_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def gguf_fields(data: bytes) -> list[tuple[int, int, str]]:
    """Every number of a whole GGUF's header: (offset, bytes, what it is). Of an array only some items are listed."""
    fields = [(4, 4, "version"), (8, 8, "number of tensors"), (16, 8, "number of keys")]
    n_tensors, n_keys = struct.unpack_from("<QQ", data, 8)
    at = 24

    def text(what: str) -> None:
        nonlocal at
        fields.append((at, 8, f"length of {what}"))
        at += 8 + struct.unpack_from("<Q", data, at)[0]

    def value(kind: int, what: str, is_listed: bool = True) -> None:
        nonlocal at
        if at > len(data):
            raise ValueError("not a whole GGUF")
        if kind == 8:
            if is_listed:
                text(what)
            else:
                at += 8 + struct.unpack_from("<Q", data, at)[0]
        elif kind == 9:
            item, length = struct.unpack_from("<IQ", data, at)
            fields.extend(((at, 4, f"item type of {what}"), (at + 4, 8, f"items of {what}")))
            at += 12
            for i in range(length):
                value(item, f"item {i} of {what}", i in (0, length - 1))
        else:
            if is_listed:
                fields.append((at, _GGUF_SIZES[kind], what))
            at += _GGUF_SIZES[kind]

    for _ in range(n_keys):
        start = at
        text("a key")
        key = data[start + 8 : at].decode()
        fields.append((at, 4, f"type of {key}"))
        at += 4
        value(struct.unpack_from("<I", data, at - 4)[0], key)
    for _ in range(n_tensors):
        text("a tensor's name")
        (n_dims,) = struct.unpack_from("<I", data, at)
        if n_dims > 4:
            raise ValueError("not a whole GGUF")
        fields.append((at, 4, "dimensions"))
        fields.extend((at + 4 + 8 * i, 8, f"dimension {i}") for i in range(n_dims))
        fields.extend(((at + 4 + 8 * n_dims, 4, "tensor type"), (at + 8 + 8 * n_dims, 8, "offset")))
        at += 16 + 8 * n_dims
    return fields


def set_gguf_field(data: bytes, random: Random) -> Mutated:
    """A number of the header becomes another; nothing else is changed."""
    at, size, what = random.choice(gguf_fields(data))
    old = int.from_bytes(data[at : at + size], "little")
    new = random.choice(
        (*NUMBERS, old + 1, old - 1, old * 2, old // 2, random.randrange(45), random.randrange(13))
    )
    field = (new % 2 ** (8 * size)).to_bytes(size, "little")
    return data[:at] + field + data[at + size :], f"{what} at {at}: {old} became {new}"


def swap_gguf_key(data: bytes, random: Random) -> Mutated:
    """Some letters of a key or tensor name are changed, so that it is unknown, or another one."""
    names = list(re.finditer(rb"[a-z_]+\.[a-z_.0-9]{3,}", data[: 1 << 20]))
    if not names:
        return flip_bits(data, random)
    match, other = random.choice(names), random.choice(names)
    name = (other[0] + b"x" * len(match[0]))[: len(match[0])]
    return data[: match.start()] + name + data[match.end() :], f"{match[0].decode()} became {name.decode()}"


# ---- protobuf, as wire format: ONNX models and SentencePiece models ----


def _varint(number: int) -> bytes:
    number %= 2**64
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def _fields(data: bytes) -> list[tuple[int, int, bytes]] | None:
    """(number, wire type, payload) of every field of a message; None if it is no message."""
    found, at = [], 0

    def read() -> int:
        nonlocal at
        number = shift = 0
        while True:
            byte = data[at]
            number |= (byte & 127) << shift
            at, shift = at + 1, shift + 7
            if byte < 128:
                return number
            if shift > 63:
                raise IndexError

    try:
        while at < len(data):
            tag = read()
            kind = tag & 7
            if kind == 0:
                payload = _varint(read())
            elif kind in (1, 2, 5):
                n = read() if kind == 2 else 8 if kind == 1 else 4
                payload = data[at : at + n]
                if len(payload) < n:
                    return None
                at += n
            else:
                return None
            if tag >> 3 == 0:
                return None
            found.append((tag >> 3, kind, payload))
    except IndexError:
        return None
    return found


def _encode(fields: Sequence[tuple[int, int, bytes]]) -> bytes:
    parts = []
    for number, kind, payload in fields:
        length = _varint(len(payload)) if kind == 2 else b""
        parts.append(_varint(number << 3 | kind) + length + payload)
    return b"".join(parts)


def change_protobuf(data: bytes, random: Random) -> Mutated:
    """A field somewhere in the tree of messages is dropped, doubled, emptied, or has another number, type or value."""
    fields = _fields(data)
    if not fields:
        return flip_bits(data, random)
    i = random.randrange(len(fields))
    number, kind, payload = fields[i]
    if kind == 2 and random.random() < 0.75 and _fields(payload):
        inner, what = change_protobuf(payload, random)
        fields[i] = (number, kind, inner)
        return _encode(fields), f"{number}/{what}"
    how = random.choice(
        ("drop", "double", "many", "empty", "renumber", "retype", "value", "value", "value", "value")
    )
    new = fields[i]
    if how == "drop":
        del fields[i]
    elif how in ("double", "many"):
        fields[i:i] = [fields[i]] * (1 if how == "double" else random.choice((10, 1000)))
    elif how == "renumber":
        new = (random.choice((number + 1, max(number - 1, 1), random.randrange(1, 30), 2**28)), kind, payload)
    elif how == "retype":
        new = (number, 0, _varint(random.choice(NUMBERS))) if kind == 2 else (number, 2, random.randbytes(3))
    elif how == "empty":
        new = (number, kind, b"" if kind == 2 else bytes(len(payload)))
    elif kind == 0:
        new = (number, 0, _varint(random.choice((*NUMBERS, random.randrange(40)))))
    elif kind == 2:
        texts = (
            b"../x",
            b"/nowhere/letter",
            b"x" * 3000,
            b"\xff\xfe",
            b"\0",
            b"..",
            payload + b"x",
            payload[:-1],
            payload[::-1],
        )
        new = (number, 2, random.choice(texts) if random.random() < 0.7 else flip_bits(payload, random)[0])
    else:
        new = (number, kind, random.choice((b"\xff", b"\0", b"\x7f")) * len(payload))
    if how not in ("drop", "double", "many"):
        fields[i] = new
    return _encode(fields), f"field {number}: {how}"
