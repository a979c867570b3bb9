"""Questions and answers, equal on every machine: 14 actions with 15 things, in other words in question and answer."""

from __future__ import annotations

import itertools

# (words of the question, words of the answer)
ACTIONS = [
    ("repair", "fixing"),
    ("clean", "washing"),
    ("sell", "finding a buyer for"),
    ("buy", "purchasing"),
    ("paint", "changing the colour of"),
    ("measure", "taking the size of"),
    ("hide", "concealing"),
    ("lose weight with", "slimming by means of"),
    ("insure", "getting insurance for"),
    ("photograph", "taking pictures of"),
    ("describe", "writing about"),
    ("teach children about", "explaining to pupils"),
    ("dream of", "seeing in one's sleep"),
    ("destroy", "getting rid of"),
]
THINGS = [
    ("car", "a vehicle"),
    ("bicycle", "a bike"),
    ("house", "a home"),
    ("boat", "a ship"),
    ("dog", "a puppy"),
    ("horse", "a pony"),
    ("computer", "a laptop"),
    ("sofa", "a couch"),
    ("forest", "woods and trees"),
    ("coat", "a jacket"),
    ("river", "a stream of water"),
    ("clock", "a watch"),
    ("cake", "pastry"),
    ("road", "a street"),
    ("violin", "a fiddle"),
]


def pairs() -> list[tuple[str, str]]:
    """210 different (question, answer), in an order that mixes actions and things."""
    in_order = [
        (f"How do I {action} my {thing}?", f"A guide to {other_action} {other_thing}, step by step.")
        for (action, other_action), (thing, other_thing) in itertools.product(ACTIONS, THINGS)
    ]
    return [in_order[i * 97 % len(in_order)] for i in range(len(in_order))]  # 97 and 210 have no common divisor
