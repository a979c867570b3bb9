"""Embed the rows of a table on all GPUs or machines of a Ray cluster, then search them. Made for millions of rows.

Needs c2v-rag[ray]. Without a table, --rows short texts are made first. Killed and started again, it writes what is
missing. On a cluster: --ray HOST:PORT --num-gpus-per-worker 1.
"""

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from c2v_rag import shared_model
from c2v_rag.scale.cluster import Workers
from c2v_rag.scale.embedding import embed_on_ray

CITIES = ["Lisbon", "Oslo", "Kyoto", "Quito", "Nairobi", "Perth", "Montreal", "Hanoi"]
GOODS = ["bread", "bicycles", "violins", "umbrellas", "clocks", "tea", "paper", "glass"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", type=Path, help="parquet file with the columns id and text")
    parser.add_argument("--rows", type=int, default=256, help="rows to make where no table is given")
    parser.add_argument("--output", type=Path, default=Path("embedded-rows"))
    parser.add_argument("--model", default="default")
    parser.add_argument("--ray", default="auto", help="address of the cluster; auto starts one where there is none")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--num-gpus-per-worker", type=float)
    parser.add_argument("--query", default="Where are bicycles sold in Japan?")
    arguments = parser.parse_args()

    table = arguments.table or make_table(arguments.output.with_suffix(".parquet"), arguments.rows)
    embed_on_ray(
        [table],
        arguments.output,
        model=arguments.model,
        precision="float16",
        address=arguments.ray,
        workers=Workers(count=arguments.workers, gpus=arguments.num_gpus_per_worker),
    )

    # A million float16 vectors of 384 columns are 0.8 GB: read one partition at a time, and keep the best.
    query = shared_model(arguments.model).encode_query([arguments.query])[0]
    best: list[tuple[float, str]] = []
    for partition in sorted(arguments.output.glob("part-*.parquet")):
        rows = pq.read_table(partition, columns=["id", "embedding"])
        vectors = rows["embedding"].combine_chunks().flatten().to_numpy().reshape(-1, len(query))
        scores = vectors.astype(np.float32) @ query
        best += [(float(scores[row]), rows["id"][int(row)].as_py()) for row in np.argsort(-scores)[:3]]
        best = sorted(best, reverse=True)[:3]
    found = pq.read_table(table, columns=["id", "text"], filters=[("id", "in", [id for _, id in best])]).to_pylist()
    texts = {row["id"]: row["text"] for row in found}
    for score, id in best:
        print(f"{score:.3f}  {texts[id]}")


def make_table(path: Path, rows: int) -> Path:
    """Write the table, unless it is there: a run is continued only with an unchanged table."""
    if path.is_file() and pq.read_metadata(path).num_rows == rows:
        return path
    texts = [
        f"Shop {row}: {GOODS[row % len(GOODS)]} and {GOODS[row // 7 % len(GOODS)]} in {CITIES[row // 3 % len(CITIES)]}."
        for row in range(rows)
    ]
    pq.write_table(pa.table({"id": [str(row) for row in range(rows)], "text": texts}), path)
    return path


if __name__ == "__main__":
    main()
