"""A node of the prefix tree, and what is found by following a prompt from node to node."""

from __future__ import annotations

from typing import Literal, NamedTuple

MissReason = Literal["unseen", "too_short", "no_snapshot", "evicted", "other_salt", "prompt_wanted"]
MISS_REASONS: tuple[MissReason, ...] = (
    "unseen",
    "too_short",
    "no_snapshot",
    "evicted",
    "other_salt",
    "prompt_wanted",
)


class Node:
    """A block of tokens in its place. Steps are numbers of plans: a plan may use what is ready by its own number."""

    __slots__ = (
        "block",
        "children",
        "depth",
        "due",
        "gone",
        "hash",
        "here",
        "host_block",
        "host_snapshot",
        "key",
        "lost",
        "near",
        "parent",
        "pins",
        "ready",
        "refs",
        "reuses",
        "snapshot",
        "stamp",
        "written",
    )

    def __init__(self, parent: Node | None, key: bytes, block: int, ready: int) -> None:
        self.parent, self.key, self.block, self.ready = parent, key, block, ready
        self.depth: int = 0 if parent is None else parent.depth + 1  # blocks of the prefix
        self.hash: int = hash((0 if parent is None else parent.hash, key))  # to remember it by once it is gone
        self.children: dict[bytes, Node] = {}
        self.refs = 0  # running sequences whose prefix goes through this node
        self.stamp = 0  # when it was let go last
        self.gone = False  # no longer in the tree
        self.snapshot = 0  # of the states at its end; 0: none
        self.due = 0  # from which step on its snapshot is there
        self.lost = False  # it had a snapshot
        self.written = 0  # the step that writes its snapshot
        self.pins = 0  # who asked for it to be kept as long as can be
        self.reuses = 0  # sequences that began from its snapshot
        self.here = True  # whether its block, if its model has any, is on the device
        self.near = 0  # children that are
        self.host_block = self.host_snapshot = 0  # places in host memory that have them too; 0: none


class Match(NamedTuple):
    """How much of a prompt is known."""

    node: Node  # where computing may go on
    far: Node | None  # where it could once what host memory has is fetched, if that is further down
    seen: int  # blocks that are in the tree
    soon: bool  # the next plan may continue from further down
    reason: MissReason  # why the rest cannot be used
