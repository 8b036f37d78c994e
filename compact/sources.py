"""Files and datasets as numbered rows that can be read again, one at a time: nothing here holds more than one."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import tempfile
import uuid
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet

from compact.errors import UserError
from compact.files import file_digest

_SUFFIXES = ".jsonl, .ndjson or .json (one object a line), .parquet"
_scratch_folders: list[tempfile.TemporaryDirectory[str]] = []


class JsonLines:
    """A file with one JSON object a line. `rows` reads it through and notes where the lines begin."""

    def __init__(self, path: Path):
        self.name, self._path = str(path), path
        self._file: Any = None
        self._offsets, self._lines = array("q"), array("q")

    def rows(self) -> Iterator[Any]:
        """Every row in order; blank lines are skipped.

        Raises:
            UserError: a line that is not JSON, with file, line and column.
        """
        self._offsets, self._lines = array("q"), array("q")
        offset = 0
        with self._path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip(b" \t\r\n\xef\xbb\xbf"):
                    self._offsets.append(offset)
                    self._lines.append(number)
                    yield self._parse(line, number)
                offset += len(line)

    def __getitem__(self, index: int) -> Any:
        if self._file is None:
            self._file = self._path.open("rb")
        self._file.seek(self._offsets[index])
        return self._parse(self._file.readline(), self._lines[index])

    def line(self, index: int) -> int:
        """The number of a row's line, from 1."""
        return self._lines[index]

    def place(self, index: int) -> str:
        return f"{self.name}:{self.line(index)}"

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def digest(self) -> str:
        return file_digest(self._path)

    def _parse(self, line: bytes, number: int) -> Any:
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            if rb"\ud" in line.lower():  # perhaps half a character, of a text that was cut off: "?" then
                row = json.loads(json.dumps(row, ensure_ascii=False).encode(errors="replace"))
            return row
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.name}:{number}: not UTF-8 text ({error.reason} at byte {error.start}); "
                f"convert it, for instance with: iconv -f LATIN1 -t UTF-8 {self.name}"
            ) from None
        except (ValueError, RecursionError) as error:  # ValueError: a number of thousands of digits too
            if number == 1 and line.lstrip().startswith(b"["):
                raise UserError(
                    f"{self.name}:1: this is one JSON array, but one JSON object a line is needed; "
                    f"convert it: jq -c '.[]' {self.name} > {self._path.stem}.jsonl"
                ) from None
            column = (
                f", column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else f": {error}"
            )
            raise UserError(
                f"{self.name}:{number}: broken JSON{column}; one complete JSON object a line is needed "
                "(a broken last line usually means that the file was cut off: fetch it again)"
            ) from None


class Rows:
    """A Hugging Face dataset, memory-mapped where it lies on disk."""

    def __init__(self, dataset: datasets.Dataset, name: str):
        self.name, self.dataset = name, dataset.with_format(None)

    def rows(self) -> Iterator[Any]:
        for batch in self.dataset.with_format("arrow").iter(batch_size=256):
            yield from batch.to_pylist()

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def place(self, index: int) -> str:
        return f"{self.name}:row {index + 1}"

    def close(self) -> None:
        pass

    def digest(self) -> str:
        return dataset_digest(self.dataset)


Source = JsonLines | Rows


def open_source(source: str | os.PathLike[str] | datasets.Dataset, cache_dir: Path) -> Source:
    """A JSON Lines or Parquet file, the folder of a saved dataset, a hub id, or a dataset in memory.

    Raises:
        UserError: nothing is there, or it is none of these.
    """
    if isinstance(source, datasets.Dataset):
        return Rows(source, "dataset")
    if isinstance(source, (datasets.DatasetDict, datasets.IterableDataset, datasets.IterableDatasetDict)):
        raise UserError(f"a datasets.Dataset is needed, not a {type(source).__name__}: choose one split of it")
    path = Path(source)
    if path.is_dir():
        return Rows(_one_split(_saved(path), str(path)), str(path))
    if path.is_file():
        if path.suffix in (".jsonl", ".ndjson", ".json"):
            return JsonLines(path)
        if path.suffix in (".parquet", ".pq"):
            return Rows(_from_parquet(path, cache_dir), str(path))
        raise UserError(f"{path}: a file of questions ends in {_SUFFIXES}; rename or convert it")
    if isinstance(source, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) and not path.suffix[1:].isalpha():
        try:
            return Rows(_one_split(datasets.load_dataset(source), source), source)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{source}: no such file or folder, and it cannot be had as a dataset of the hub "
                f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'})"
            ) from error
    raise UserError(f"{source}: no such file or folder; give a file that ends in {_SUFFIXES}, or a saved dataset")


def _saved(path: Path) -> Any:
    try:
        return datasets.load_from_disk(str(path))
    except FileNotFoundError:
        raise UserError(
            f"{path}: a folder, but not one written by datasets.save_to_disk; give the file inside it"
        ) from None


def _one_split(loaded: Any, name: str) -> datasets.Dataset:
    if isinstance(loaded, datasets.Dataset):
        return loaded
    if "train" in loaded:
        return loaded["train"]
    if len(loaded) == 1:
        return next(iter(loaded.values()))
    raise UserError(f"{name}: it has the splits {', '.join(loaded)} and none is called train; save the one you mean")


def _from_parquet(path: Path, cache_dir: Path) -> datasets.Dataset:
    """The same rows as a memory-mapped Arrow file; row groups are read a thousand rows at a time."""
    target = cache_dir / f"rows-{JsonLines(path).digest()}.arrow"
    try:
        parquet = pyarrow.parquet.ParquetFile(path)
        if not target.exists():
            schema = parquet.schema_arrow.remove_metadata()
            write_arrow(target, schema, (batch for batch in parquet.iter_batches(batch_size=1000)))
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: cannot be read as Parquet ({error}); write the file again") from None
    return datasets.Dataset.from_file(str(target))


def write_arrow(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Write an Arrow stream aside, then rename it: at `path` there is all of it or nothing.

    Raises:
        UserError: the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        with pa.OSFile(str(aside), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            for batch in batches:
                writer.write_batch(pa.RecordBatch.from_arrays(batch.columns, schema=schema))
        os.replace(aside, path)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(f"{path.parent}: the disk is full; free some space or choose another folder") from error
        raise
    finally:
        aside.unlink(missing_ok=True)


def dataset_digest(dataset: datasets.Dataset) -> str:
    """A digest of a dataset's rows: read through, never taken from fingerprints, which may outlive a change."""
    digest = hashlib.blake2b(digest_size=16)
    for table in dataset.with_format("arrow").iter(batch_size=1000):
        for row in table.to_pylist():
            digest.update(json.dumps(row, default=str).encode())
    return digest.hexdigest()


def cache_folder(cache_dir: str | os.PathLike[str] | None) -> Path:
    """`cache_dir`, made if need be; by default a folder that goes when the process ends."""
    if cache_dir is None:
        _scratch_folders.append(tempfile.TemporaryDirectory(prefix="compact-"))
        return Path(_scratch_folders[-1].name)
    path = Path(cache_dir)
    path.mkdir(parents=True, exist_ok=True)
    return path
