"""The prefix tree as plain data, to be written down and read again by a later engine of the same model."""

from __future__ import annotations

import msgspec

from thalweg.cache.node import Node
from thalweg.cache.tiers import TieredTree
from thalweg.errors import CheckpointError


class Image(msgspec.Struct, frozen=True, array_like=True):
    """Nodes, each after the one above it, the ones to be missed most first. Node i has block i + 1, if the model has
    blocks; snapshots are numbered in the order of their nodes."""

    salts: list[str]
    parents: list[int]  # index of the node above; -1 - i: the root of salt i
    keys: list[bytes]
    snapshots: list[int]  # 0: none


class Sources(msgspec.Struct, frozen=True, array_like=True):
    """Where the blocks and snapshots of an image are: a place in host memory, or minus the number of one on the
    device."""

    blocks: list[int]
    snapshots: list[int]


encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Image).decode


def take(tree: TieredTree, most_blocks: int, most_snapshots: int) -> tuple[Image, Sources]:
    """What is cached, as far as so many blocks and snapshots hold it. Blocks without a use are left out."""
    ages: dict[Node, int] = {}
    order = [node for root in tree.roots() for node in _below(root)]
    for node in reversed(order):  # from the ends of branches: what is above is as young as anything below
        useful = not tree.needs_snapshots or node.snapshot or node.host_snapshot
        below = [ages[child] for child in node.children.values() if child in ages]
        if useful or below:
            ages[node] = max([tree.rank(node), *below])
    with_blocks = tree.has_blocks
    image, sources = Image([], [], [], []), Sources([], [])
    salts: dict[str, int] = {}
    index: dict[Node, int] = {}
    for node in sorted(ages, key=lambda node: (-ages[node], node.depth)):
        above = node.parent
        assert above is not None
        if with_blocks and len(index) == most_blocks:
            break
        if above.parent is None:
            salt = above.key.decode()
            image.parents.append(-1 - salts.setdefault(salt, len(salts)))
        else:
            image.parents.append(index[above])
        index[node] = len(index)
        image.keys.append(node.key)
        if with_blocks:
            sources.blocks.append(_source(node.host_block, node.block, tree.host.saves[0]))
        saved = _source(node.host_snapshot, node.snapshot, tree.host.saves[1])
        if saved and len(sources.snapshots) < most_snapshots:
            sources.snapshots.append(saved)
            image.snapshots.append(len(sources.snapshots))
        else:
            image.snapshots.append(0)
    image.salts.extend(salts)
    return image, sources


def _source(place: int, number: int, saves: dict[int, int]) -> int:
    """Where something is, as Sources has it. `saves`: copies to places that no plan has made yet."""
    return -saves[place] if place in saves else place or -number


def decode(data: bytes, block_size: int, num_blocks: int | None, num_snapshots: int) -> Image:
    """An image that was written with so many blocks (None: the model has none) and snapshots. Raises CheckpointError if
    it is not whole."""
    try:
        image = _decode(data)
    except msgspec.DecodeError as e:
        raise CheckpointError(f"its index cannot be read: {e}") from None
    count = len(image.parents)
    numbered = [number for number in image.snapshots if number]
    sound = (
        count == len(image.keys) == len(image.snapshots)
        and num_blocks in (None, count)
        and all(-len(image.salts) <= above < i for i, above in enumerate(image.parents))
        and all(len(key) == 4 * block_size for key in image.keys)
        and numbered == list(range(1, num_snapshots + 1))
        and len(set(zip(image.parents, image.keys, strict=True))) == count
    )
    if not sound:
        raise CheckpointError("its index contradicts itself or its tensors")
    return image


def restore(tree: TieredTree, image: Image) -> int:
    """Put an image, whose blocks and snapshots are in the places of their numbers, into an empty tree, as far as there
    are such places: how many nodes."""
    nodes: list[Node] = []
    for i, (above, key, snapshot) in enumerate(zip(image.parents, image.keys, image.snapshots, strict=True)):
        if tree.has_blocks and i == tree.host.blocks.num_blocks:
            break
        parent = nodes[above] if above >= 0 else tree.root(image.salts[-1 - above])
        nodes.append(tree.adopt(parent, key, -i, snapshot))
    for node in reversed(nodes):
        tree.adopted(node)
    return len(nodes)


def _below(root: Node) -> list[Node]:
    """All nodes below `root`, each after the one above it."""
    nodes = [root]
    for node in nodes:  # grows as it goes
        nodes += node.children.values()
    return nodes[1:]
