"""Strategies for hostile values, and for damage to bytes and to trees of JSON."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

TEXTS = st.one_of(
    st.sampled_from(
        [
            "",
            " ",
            "\n",
            "\0",
            "\x1b]0;title\x07\x1b[2J",
            "\ud800",
            "\u202eevil",
            "\u2028",
            "../" * 40 + "etc/passwd",
            "/dev/zero",
            "/etc/passwd",
            "http://localhost:1/x.png",
            "data:image/png;base64,AAAA",
            "a" * 5000,
            "<script>",
            "${jndi:x}",
            "{question}",
            "{}",
            "%s%n",
            "NaN",
            "null",
            "none",
            "-1",
            "1e999",
            "<|image_pad|>",
            "os:system",
            "~",
            "~nobody",
            "*",
            "?",
            "con",
            "9" * 5000,
            "'; DROP TABLE",
            "True",
            "Ａ",
            "😀" * 50,
            "x" * 300 + "/y",
        ]
    ),
    st.text(max_size=20),
)
NUMBERS = st.one_of(
    st.sampled_from([0, -1, 1, 2, 3, 7, 10**6, 10**12, 2**63, -(2**64), 10**400, 0.0, -0.5, 1e-308, 1e308]),
    st.sampled_from([float("nan"), float("inf"), float("-inf")]),
    st.integers(-1000, 1000),
)
PLAIN = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)
"""Anything that JSON or YAML can say."""
DEEP = st.sampled_from(["[" * 100_000, '{"a":' * 100_000, "[" * 500 + "]" * 500])
"""Texts that nest deeper than a parser in Python can follow, and one that does not."""


@st.composite
def damage(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes cut off, flipped, zeroed, doubled or replaced."""
    kind = draw(st.sampled_from(["cut", "flip", "zero", "insert", "drop", "noise", "empty"]))
    place = draw(st.integers(0, max(0, len(data) - 1)))
    if kind == "cut":
        return data[:place]
    if kind == "flip":
        flipped = bytearray(data)
        for at in [place, *draw(st.lists(st.integers(0, max(0, len(data) - 1)), max_size=8))]:
            flipped[at] ^= 1 << draw(st.integers(0, 7))
        return bytes(flipped)
    if kind == "zero":
        return data[:place] + bytes(min(64, len(data) - place)) + data[place + 64 :]
    if kind == "insert":
        return data[:place] + draw(st.binary(min_size=1, max_size=16)) + data[place:]
    if kind == "drop":
        return data[:place] + data[place + draw(st.integers(1, 64)) :]
    return draw(st.binary(max_size=200)) if kind == "noise" else b""


@st.composite
def changed(draw: st.DrawFn, tree: Any) -> Any:
    """A tree of JSON with one place in it replaced or left out."""
    tree = copy.deepcopy(tree)
    node: Any = tree
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(min(len(node), 50)))
        if not keys:
            return draw(VALUES)
        key = draw(st.sampled_from(keys))
        if isinstance(node[key], dict | list) and node[key] and draw(st.integers(0, 3)):
            node = node[key]
            continue
        if draw(st.integers(0, 4)) == 0:
            del node[key]
        else:
            node[key] = draw(VALUES)
        return tree


def json_bytes(tree: Any) -> st.SearchStrategy[bytes]:
    """JSON texts that are nearly `tree`."""
    text = json.dumps(tree).encode()
    return st.one_of(
        changed(tree).map(lambda value: json.dumps(value).encode()),
        changed(tree).map(lambda value: json.dumps(value).encode()),
        damage(text),
        VALUES.map(lambda value: json.dumps(value).encode()),
        DEEP.map(str.encode),
    )
