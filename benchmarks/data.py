"""Reading at scale on one machine: opening an index of millions of rows, and the orders against webdataset.

    python benchmarks/data.py --rows 10000000
    python benchmarks/data.py --rows 1000000 --samples 20000

The index is synthetic (no shard behind it is read). The throughput is of raw members and of decoded pictures, one
process each, from shards of 1,000 samples that are written first; webdataset runs in the same process.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import PIL.Image

from diptych.data.catalog import read_catalog
from diptych.data.encoded import add_member, written
from diptych.data.index import Scanned, write
from diptych.data.mixture import Mixture
from diptych.data.reading import COUNTS

OPEN = """
import sys, time
from pathlib import Path
from diptych.data.index import load
file, files = Path(sys.argv[1]), [Path(f"{k:06d}.tar") for k in range(int(sys.argv[2]))]
def resident():  # pages of this process alone; mapped ones are shared
    fields = dict(line.split(":") for line in open("/proc/self/status"))
    return int(fields["RssAnon"].split()[0]) * 1024
before, start = resident(), time.perf_counter()
index = load(file, files, {})
opened = time.perf_counter() - start
rows = list(range(0, len(index), max(1, len(index) // 1000)))
for row in rows:
    index.records[int(index.ends[row - 1]) if row else 0 : int(index.ends[row])]
print(opened, (time.perf_counter() - start - opened) / len(rows),
      (resident() - before) / 2**20)
"""


def measure_index(folder: Path, rows: int, shard: int) -> dict[str, float]:
    """Seconds and MiB of opening a synthetic index in a fresh process, and of writing it."""
    files = [folder / f"{k:06d}.tar" for k in range(rows // shard)]
    for file in files:
        file.write_bytes(b"x")
    records = [
        b"sample-%09d\0jpg\0%d\0%d\0txt\0%d\0%d" % (i, 100_000 * i, 90_000, 100_000 * i + 95_000, 120)
        for i in range(shard)
    ]
    start = time.perf_counter()
    write(folder / "all.index", files, lambda file: Scanned(records, [shard]), {})
    seconds = time.perf_counter() - start
    size = (folder / "all.index").stat().st_size
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(folder / "all.index"), str(len(files))],
        capture_output=True,
        text=True,
        check=True,
    )
    opened, row, mib = map(float, done.stdout.split())
    return {
        "rows": rows,
        "shards": len(files),
        "index_mib": size / 2**20,
        "write_s": seconds,
        "open_s": opened,
        "open_mib": mib,
        "us_per_row": row * 1e6,
    }


def measure_orders(folder: Path, samples: int, shard: int, pixels: int) -> list[dict[str, float | str]]:
    """Samples a processor second of both orders and of webdataset, raw and decoded."""
    noise = np.random.default_rng(0)
    pictures = []
    for _ in range(16):
        file = io.BytesIO()
        small = PIL.Image.fromarray(noise.integers(0, 255, (pixels // 8, pixels // 8, 3), np.uint8))
        small.resize((pixels, pixels)).save(file, "JPEG", quality=90)
        pictures.append(file.getvalue())
    for k in range(samples // shard):
        with written(folder / "tars" / f"{k:06d}.tar") as tar:
            for i in range(k * shard, (k + 1) * shard):
                add_member(tar, f"{i:09d}.jpg", pictures[i % 16])
                add_member(tar, f"{i:09d}.txt", b"a caption of some words")
    (folder / "c.yaml").write_text("a: {format: webdataset, path: tars/*.tar, read: draw}\n")
    entry = read_catalog(folder / "c.yaml")["a"]
    entry.write_index()
    source = entry.open()
    rows: list[dict[str, float | str]] = []
    for decode in (False, True):
        for order in ("shards", "global"):
            mixture = Mixture({"a": source}, {"a": 1.0}, 0, order=order)
            before, start = COUNTS.copy(), time.process_time()
            for _ in range(samples):
                index = mixture.draw().index
                source[index] if decode else (source.member(index, "jpg"), source.member(index, "txt"))
            seconds, counts = time.process_time() - start, COUNTS.since(before)
            rows.append(
                {
                    "reader": f"diptych, {order}",
                    "decoded": str(decode),
                    "samples_per_s": samples / seconds,
                    "opens_per_sample": counts.opens / samples,
                    "reads_per_sample": counts.reads / samples,
                }
            )
        import webdataset

        files = sorted(map(str, (folder / "tars").glob("*.tar")))
        pipe = webdataset.WebDataset(files, shardshuffle=len(files), seed=0).shuffle(4096)
        pipe = pipe.decode("pilrgb").to_tuple("jpg", "txt") if decode else pipe.to_tuple("jpg", "txt")
        start = time.process_time()
        count = sum(1 for _ in islice(pipe, samples))
        rows.append(
            {
                "reader": "webdataset, shuffle(4096)",
                "decoded": str(decode),
                "samples_per_s": count / (time.process_time() - start),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000, help="rows of the synthetic index")
    parser.add_argument("--samples", type=int, default=20_000, help="samples that the readers read")
    parser.add_argument("--shard", type=int, default=1000, help="samples of a shard")
    parser.add_argument("--pixels", type=int, default=256, help="side of the pictures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        opened = measure_index(Path(folder), args.rows, args.shard)
        print({name: round(value, 4) for name, value in opened.items()})
    with tempfile.TemporaryDirectory() as folder:
        orders = measure_orders(Path(folder), args.samples, args.shard, args.pixels)
        for row in orders:
            print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{v:<26}" for k, v in row.items()))
    print(json.dumps({"benchmark": "data", "index": opened, "orders": orders}))


if __name__ == "__main__":
    main()
