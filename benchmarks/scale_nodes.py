"""Nodes that read a shard in an epoch, and shards in a batch, simulated over the library's order.

    python benchmarks/scale_nodes.py

Prints a line a training with the order of one node (shared out) and the dealt one.
"""

from __future__ import annotations

import numpy as np

from seed_multimodal.data.stream.order import EpochOrder, Order, even_block

RECORDS = 10_000  # of a shard
WORLD = 1000
RANKS = 8  # of a node


def epoch_reads(
    shards: int, rows: int | None, world: int, ranks: int, dealt: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Shard and node of each position of an epoch, int64 [n].

    rows: of a rank's batch; None: an LLM's data, whose runs follow from blocks.
    """
    total = shards * RECORDS
    n_nodes = world // ranks
    shard_sizes = np.full(shards, RECORDS)
    block = even_block(total) if rows is None else RECORDS
    nodes = n_nodes if dealt else 1
    order = Order([1.0], [total], 0, [None], [block], run=rows, nodes=nodes)
    deal = order.deal(0, world)
    samples = EpochOrder(total, 0, shard_sizes=shard_sizes, block=block, deal=deal)
    run = order.chunks(0, 0, world, 0).run
    node = np.arange(total) // (run * ranks) % n_nodes
    indices = np.empty(total, np.int64)
    if deal is None:
        permutation = samples._permutation(0)
        for start in range(0, total, block):
            stop = min(start + block, total)
            indices[start:stop] = permutation[start:stop]
    else:
        for number in range(n_nodes):
            part = samples._permutation(0, number)
            indices[node == number] = part[0 : deal.before(total, number)]
    return indices // RECORDS, node


def nodes_of_a_shard(
    shards: int, rows: int | None, world: int = WORLD, ranks: int = RANKS, dealt: bool = True
) -> float:
    """Mean number of nodes that read a shard in an epoch."""
    shard, node = epoch_reads(shards, rows, world, ranks, dealt)
    reads = np.zeros((shards, world // ranks), bool)
    reads[shard, node] = True
    return float(reads.sum(1).mean())


def shards_of_a_batch(dealt: bool, shards: int = 2000, rows: int = 64) -> tuple[float, float]:
    """Mean number of shards in a batch of all nodes, and of one node, at `WORLD`."""
    shard, node = epoch_reads(shards, rows, WORLD, RANKS, dealt)
    step = np.arange(len(shard)) // (rows * WORLD)
    steps = len(shard) // (rows * WORLD)
    whole = step < steps
    step, shard, node = step[whole], shard[whole], node[whole]
    reads = np.zeros((steps, WORLD // RANKS, shards), bool)
    reads[step, node, shard] = True
    return float(reads.any(1).sum(1).mean()), float(reads.sum(2).mean())


def perfect_shuffle(shards: int, rows: int) -> float:
    """Expected number of shards among the rows of a perfect shuffle."""
    return shards * (1 - (1 - 1 / shards) ** rows)


def main() -> None:
    """Print the figures."""
    for name, shards, rows in (("LLM", 2000, None), ("stage 2", 2000, 256), ("stage 1", 2000, 64)):
        before = nodes_of_a_shard(shards, rows, dealt=False)
        after = nodes_of_a_shard(shards, rows)
        print(f"{name}: nodes that read a shard {before:.2f} -> {after:.2f}", flush=True)
    for name, dealt in (("shared", False), ("dealt", True)):
        of_all, of_node = shards_of_a_batch(dealt)
        print(f"{name}: shards in a batch {of_all:.0f}, in a node's {of_node:.1f}", flush=True)
    of_all, of_node = perfect_shuffle(2000, 64 * WORLD), perfect_shuffle(2000, 64 * RANKS)
    print(f"perfect shuffle: shards in a batch {of_all:.0f}, in a node's {of_node:.1f}")


if __name__ == "__main__":
    main()
