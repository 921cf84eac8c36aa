"""A corpus on several machines: Ray Data codes a Parquet file of texts, batch by batch, and decodes it again.

python examples/ray_coded.py                                   # a few texts on this machine
python examples/ray_coded.py docs.parquet z.parquet 8          # 8 workers; paths that all machines see, such as s3://

Ray (pip install "ray[data]") starts one `CodedBatches` for each worker, which loads the base model once. Rows are coded
on their own, so that any machine reads any row, and the bits are the same on all of them. Without Ray the batches are
mapped in this process.
"""

import importlib.util
import sys

import numpy as np

from ztok_fast.codec.coded_corpus import CodedBatches

TEXTS = ["It was a dark and stormy night.", "", "The rain fell in torrents, except at occasional intervals. " * 4] * 20


def with_ray(source: str | None, target: str | None, workers: int) -> None:
    """Code a corpus with Ray Data; without a target, decode it again and compare."""
    import ray

    texts = [{"text": text} for text in TEXTS]
    dataset = ray.data.from_items(texts) if source is None else ray.data.read_parquet(source)
    coded = dataset.map_batches(CodedBatches, batch_size=256, concurrency=workers)
    if target is not None:
        coded.write_parquet(target)
        return
    back = coded.map_batches(CodedBatches, fn_constructor_kwargs={"decode": True}, batch_size=256, concurrency=workers)
    wanted = TEXTS if source is None else [row["text"] for row in dataset.take_all()]
    assert sorted(row["text"] for row in back.take_all()) == sorted(wanted)
    print(f"Ray Data: {len(wanted)} texts came back")


def alone() -> None:
    """The same batch by batch in this process."""
    coded = CodedBatches()({"text": np.array(TEXTS, dtype=object)})
    assert CodedBatches(decode=True)(coded)["text"] == TEXTS
    print(f"{sum(coded['bytes']):,} bytes -> {sum(map(len, coded['coded'])):,}; {len(TEXTS)} texts came back")


def main(arguments: list[str] | None = None) -> None:
    source, target, workers = (*(sys.argv[1:] if arguments is None else arguments), None, None, None)[:3]
    if importlib.util.find_spec("ray") is not None:
        with_ray(source, target, int(workers or 1))
    elif source is None:
        alone()
    else:
        raise SystemExit('expected the package ray: pip install "ray[data]"')


if __name__ == "__main__":
    main()
