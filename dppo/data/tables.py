"""Rows from local files: parquet, JSON and CSV, the texts also as .gz. Files are named one by one, never found by a
cache's key.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dppo.errors import UserError

FORMATS = (".parquet", ".jsonl", ".csv", ".json")
ENDINGS = (*FORMATS, ".jsonl.gz", ".csv.gz", ".json.gz")
_LONGEST_CELL = 2**30  # characters
Placed = tuple[str, dict[str, object]]  # a row behind its place in a file
_Numbered = tuple[int, dict[str, object]]  # a row behind its number, or that of its (last) line, from 1


class MissingColumn(UserError):
    """A file lacks a column."""


def read_rows(
    files: Sequence[Path], needed: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[dict[str, object]]:
    """The rows of several files, one after another, with the columns ``needed`` and those of ``optional`` there are.

    Values are as the file has them: strings, numbers, lists of mappings, None. Raises UserError that names the file
    (and the line, for text formats) if it is missing, empty, not readable, of an unknown format, or lacks a column.
    """
    for _, row in placed_rows(files, needed, optional):
        yield row


def placed_rows(files: Sequence[Path], needed: Sequence[str], optional: Sequence[str] = ()) -> Iterator[Placed]:
    """The same, each behind its place for messages: ``file:line``, or ``file, row 3`` where rows are not lines."""
    for file in files:
        packed = file.suffix == ".gz"
        ending = file.with_suffix("").suffix if packed else file.suffix
        read = {".parquet": _parquet, ".jsonl": _json_lines, ".csv": _csv, ".json": _json_list}.get(ending)
        if file.is_dir():
            raise UserError(f"{file}: is a folder; give a file ({', '.join(FORMATS)})")
        if not file.is_file():
            raise UserError(f"{file}: there is no such file")
        if read is None or (packed and ending == ".parquet"):
            found = "".join(file.suffixes[-2:]) if packed else file.suffix
            raise UserError(f"{file}: unknown format {found or '(no ending)'}; use {', '.join(FORMATS)}")
        if file.stat().st_size == 0:
            raise UserError(f"{file}: is empty")
        count = 0
        before = ":" if ending in (".jsonl", ".csv") else ", row "
        for number, row in read(file, needed, optional):
            count += 1
            yield f"{file}{before}{number}", row
        if count == 0:
            raise UserError(f"{file}: has no rows")


def _check_columns(where: str, found: Sequence[str], needed: Sequence[str]) -> None:
    missing = [column for column in needed if column not in found]
    if missing:
        raise MissingColumn(
            f"{where}: has no column {', '.join(missing)}; found {', '.join(found) or 'none'}, "
            f"needed {', '.join(needed)}"
        )


def _parquet(file: Path, needed: Sequence[str], optional: Sequence[str]) -> Iterator[_Numbered]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            found = table.schema_arrow.names
            _check_columns(str(file), found, needed)
            columns = [*needed, *(column for column in optional if column in found)]
            before = 0
            for batch in table.iter_batches(batch_size=4096, columns=columns):
                yield from enumerate(batch.to_pylist(), start=before + 1)
                before += batch.num_rows
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: is not a readable parquet file ({str(error).splitlines()[0]})") from None


def _json_lines(file: Path, needed: Sequence[str], optional: Sequence[str]) -> Iterator[_Numbered]:
    first = True
    for number, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{file}:{number}: is not JSON ({error.msg} at column {error.colno})") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}:{number}: {_beyond_json(error)}") from None
        if not isinstance(row, Mapping):
            raise UserError(f"{file}:{number}: is not a JSON object with the columns {', '.join(needed)}")
        if first:  # later rows may leave a column out, which means null
            _check_columns(f"{file}:{number}", list(row), needed)
            first = False
        yield number, {column: row.get(column) for column in (*needed, *optional)}


def _json_list(file: Path, needed: Sequence[str], optional: Sequence[str]) -> Iterator[_Numbered]:
    try:
        rows = json.loads("".join(_lines(file)))
    except json.JSONDecodeError as error:
        place = f"{error.msg} at line {error.lineno}, column {error.colno}"
        raise UserError(f"{file}: is not JSON ({place}); a row on each line is .jsonl") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: {_beyond_json(error)}") from None
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise UserError(f"{file}: is not a list of JSON objects with the columns {', '.join(needed)}")
    if rows:  # a row may leave a column out, which means null
        _check_columns(str(file), list(dict.fromkeys(column for row in rows for column in row)), needed)
    for number, row in enumerate(rows, start=1):
        yield number, {column: row.get(column) for column in (*needed, *optional)}


def _beyond_json(error: Exception) -> str:
    """What Python's parser refuses of valid JSON."""
    what = "lists or objects nested too deeply" if isinstance(error, RecursionError) else "a number of too many digits"
    return f"holds {what}; leave it out"


def _csv(file: Path, needed: Sequence[str], optional: Sequence[str]) -> Iterator[_Numbered]:
    csv.field_size_limit(_LONGEST_CELL)  # Python's own limit of 131,072 characters is less than a long prompt has
    lines = csv.reader(_lines(file), strict=True)
    try:
        header = next(lines, [])
        _check_columns(str(file), header, needed)
        for cells in lines:
            if not cells:
                continue
            if len(cells) != len(header):
                raise UserError(f"{file}:{lines.line_num}: has {len(cells)} cells, the header has {len(header)}")
            row = dict(zip(header, cells, strict=True))
            yield lines.line_num, {column: row.get(column) or None for column in (*needed, *optional)}
    except csv.Error as error:
        raise UserError(f"{file}:{lines.line_num}: is not CSV ({error})") from None


def _lines(file: Path) -> Iterator[str]:
    opened = gzip.open if file.suffix == ".gz" else open
    try:
        with opened(file, "rt", encoding="utf-8-sig", newline="") as stream:
            yield from stream
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is not UTF-8 text (byte {error.start})") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:  # cut off, not packed at all, or altered
        raise UserError(f"{file}: is not a whole gzip file ({error}); fetch or pack it again") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
