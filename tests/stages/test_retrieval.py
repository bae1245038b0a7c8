"""Stage 3's merge: parts become one file in the order of the samples."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rellax_ds import schema
from rellax_ds.partitions import process, split_rows
from rellax_ds.stages.retrieval import merge
from rellax_ds.tables import read_parquet, write_parquet


class Copy:
    """Writes its range of a table."""

    def __init__(self, table):
        self.table = table

    def __call__(self, partition, directory):
        start, stop = partition.payload["start"], partition.payload["stop"]
        path = directory / f"{partition.name}.parquet"
        write_parquet(self.table.slice(start, stop - start), path)
        return {}


def test_merge_parts_in_order_give_the_whole_table(tmp_path):
    offsets = np.array([0, 2, 2, 5, 6])
    table = pa.table(
        [
            pa.array(np.arange(4)),
            pa.LargeListArray.from_arrays(offsets, np.arange(6)),
            pa.LargeListArray.from_arrays(offsets, np.linspace(0, 1, 6, dtype=np.float32)),
        ],
        schema=pa.schema(list(schema.RETRIEVED.items())),
    )
    records = [process(Copy(table), part, tmp_path, "key") for part in split_rows(4, 3)]
    merge(records, tmp_path, tmp_path / "whole")
    assert read_parquet(tmp_path / "whole", schema.RETRIEVED).equals(table)
    assert pq.ParquetFile(tmp_path / "whole").num_row_groups == len(records)
