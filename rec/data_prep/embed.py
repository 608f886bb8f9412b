"""Texts of items or users -> a column of vectors, for items that nobody has met yet.

    python -m rec.data_prep.embed --items items.csv --columns title,description --output items.parquet
    python -m rec.data_prep.tabular --interactions clicks.csv --items items.parquet --output-dir data/mine

- The output has the columns of the input and the vectors, `text_vector`. A row without a text has none.
- `hashing` needs no download: words and pairs of words, hashed, weighted by how rare they are (TF-IDF), and reduced to
  --dim numbers by a truncated SVD. The same input gives the same vectors.
- A model must meet items that came later with vectors of the same kind. So name the file that the first vectors were
  made of: --learn-from. Then items that are in both files have the same vectors.
- `sentence-transformers:MODEL` needs `pip install sentence-transformers`; MODEL is a name or a folder.

To add another encoder, add a function to ENCODERS. Vectors of images come in the same way: any Parquet file with a
column of lists of fractions. Not covered: texts in more than one language that should have the same vectors.
"""

import argparse
import importlib
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.sparse
import scipy.sparse.linalg

from rec.data_prep.events import parse_names
from rec.data_prep.raw_files import RawFile, quoted
from rec.data_prep.tabular import load_features
from rec.errors import UserError, command_parser, note, run_command

BUCKETS = 2**18  # of hashed words
COLUMN = "text_vector"
DIM = 64
OVERSAMPLING = 10  # of the randomised SVD, as its authors advise
POWER_STEPS = 4


@dataclass(frozen=True)
class Encoding:
    """How texts become vectors."""

    model: str = ""  # which one of an encoder that has several
    dim: int | None = None  # numbers per vector
    learn_from: Sequence[str] | None = None  # texts; None: those that are encoded


def encode_by_hashing(texts: Sequence[str], encoding: Encoding) -> np.ndarray:
    """[n] texts -> [n, dim] float32, or fewer numbers if the texts are few: TF-IDF of hashed words, truncated SVD.

    Latent semantic analysis: Deerwester et al., 1990. A word in one text alone is left out: it is near no other text.
    """
    if encoding.model:
        raise UserError(f"--encoder hashing has no models: leave out :{encoding.model}")
    known = texts if encoding.learn_from is None else encoding.learn_from
    counts = _count_terms(known)
    texts_per_term = np.bincount(counts.indices, minlength=BUCKETS)
    shared = np.flatnonzero(texts_per_term > 1)
    if not len(shared):
        raise UserError("--encoder hashing: no two texts share a word: name other --columns")
    rarity = np.log((1 + len(known)) / (1 + texts_per_term[shared])) + 1
    axes = _main_axes(_weigh(counts[:, shared], rarity), encoding.dim or DIM)
    return (_weigh(_count_terms(texts)[:, shared], rarity) @ axes.T).astype(np.float32)


def _main_axes(rows: scipy.sparse.csr_array, rank: int) -> np.ndarray:
    """[rank, columns] right singular vectors of a sparse matrix, the largest first; fewer if it has no more.

    Randomised, several times faster than ARPACK: Halko, Martinsson and Tropp, https://arxiv.org/abs/0909.4061
    """
    sample = rows @ np.random.default_rng(0).standard_normal((rows.shape[1], rank + OVERSAMPLING))
    for _ in range(POWER_STEPS):
        basis, _ = np.linalg.qr(sample)
        sample = rows @ (rows.T @ basis)
    basis, _ = np.linalg.qr(sample)
    *_, axes = np.linalg.svd((rows.T @ basis).T, full_matrices=False)
    return axes[:rank]


def _count_terms(texts: Sequence[str]) -> scipy.sparse.csr_array:
    """[n, BUCKETS] how often each word, or pair of words, is in each text."""
    terms: list[int] = []
    ends = [0]
    for text in texts:
        words = re.findall(r"\w+", text.lower())
        pairs = [f"{one} {other}" for one, other in itertools.pairwise(words)]
        terms += [crc32(term.encode()) % BUCKETS for term in [*words, *pairs]]
        ends.append(len(terms))
    shape = (len(texts), BUCKETS)
    counts = scipy.sparse.csr_array((np.ones(len(terms)), terms, ends), shape)
    counts.sum_duplicates()
    return counts


def _weigh(counts: scipy.sparse.csr_array, rarity: np.ndarray) -> scipy.sparse.csr_array:
    """[n, BUCKETS] TF-IDF, each row of length 1."""
    weights = (1 + np.log(counts.data)) * rarity[counts.indices]
    rows = scipy.sparse.csr_array((weights, counts.indices, counts.indptr), counts.shape)
    lengths = scipy.sparse.linalg.norm(rows, axis=1)
    return scipy.sparse.diags_array(1 / np.where(lengths > 0, lengths, 1)) @ rows


def encode_by_sentence_transformers(texts: Sequence[str], encoding: Encoding) -> np.ndarray:
    """[n] texts -> [n, width of the model] float32. Raises UserError if the package is not installed."""
    if not encoding.model or encoding.dim or encoding.learn_from is not None:
        hint = "write --encoder sentence-transformers:MODEL, without --dim and --learn-from"
        raise UserError(f"a model of sentence-transformers is trained already: {hint}")
    try:
        package = importlib.import_module("sentence_transformers")
    except ImportError as error:
        hint = "pip install sentence-transformers, or use --encoder hashing"
        raise UserError(f"sentence-transformers cannot be imported ({error}): {hint}") from None
    model = package.SentenceTransformer(encoding.model)
    return np.asarray(model.encode(list(texts)), np.float32)


ENCODERS: dict[str, Callable[[Sequence[str], Encoding], np.ndarray]] = {
    "hashing": encode_by_hashing,
    "sentence-transformers": encode_by_sentence_transformers,
}


def embed(texts: Sequence[str | None], encoder: str, encoding: Encoding) -> pa.Array:
    """[n] list<float> vectors of texts, null where there is no text.

    Raises UserError for an unknown encoder, and for too few texts.
    """
    if encoder not in ENCODERS:
        raise UserError(f"--encoder {encoder}: there is none; choose one of {', '.join(ENCODERS)}")
    filled = [text for text in texts if text]
    if not filled:
        raise UserError(f"none of {len(texts):,} rows has a text: name other --columns")
    encoded = ENCODERS[encoder](filled, encoding)
    note(f"{COLUMN}: {encoded.shape[1]} numbers for {len(filled):,} of {len(texts):,} rows")
    vectors = iter(encoded.tolist())
    column = [next(vectors) if text else None for text in texts]
    return pa.array(column, pa.list_(pa.float32()))


def read_texts(
    path: Path, id_column: str, columns: Sequence[str]
) -> tuple[pa.Table, list[str | None]]:
    """The rows of a file of items as preparation reads them, and a text per row of some columns, joined by blanks."""
    with duckdb.connect() as con:
        con.execute("set TimeZone = 'UTC'")
        load_features(con, RawFile.of(path), "items", id_column)
        items = con.table("items")
        types = dict(zip(items.columns, map(str, items.types), strict=True))
        if missing := [name for name in columns if name not in types]:
            raise UserError(f"{path} has no column {missing[0]}: it has {', '.join([*types][1:])}")
        parts = [
            f"array_to_string({quoted(name)}, ' ')" if types[name].endswith("[]") else quoted(name)
            for name in columns
        ]
        text = f"trim(concat_ws(' ', {', '.join(parts)}))"
        rows = con.sql(
            f"select *, {text} as text_of_row from items order by item_id"
        ).to_arrow_table()
    texts = rows["text_of_row"].to_pylist()
    names = [id_column, *rows.column_names[1:-1]]
    return rows.drop_columns("text_of_row").rename_columns(names), texts


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("rec.data_prep.embed", __doc__)
    add = parser.add_argument
    add("--items", required=True, type=Path, help="a file of items or users, as of tabular")
    add("--item-col", default="item_id", help="its column of ids")
    add("--columns", required=True, help="title,description: the texts to embed")
    add("--output", required=True, type=Path, help="the Parquet file to write")
    add("--encoder", default="hashing", help="hashing (default) or sentence-transformers:MODEL")
    add("--dim", type=int, help=f"numbers per vector of hashing; default: {DIM}")
    add("--learn-from", type=Path, help="the file that the vectors in use were made of")
    return parser


def main() -> None:
    """The command."""
    args = _parser().parse_args()
    if args.output.suffix != ".parquet":
        raise UserError(f"--output {args.output} must end in .parquet, which holds vectors")
    if args.dim is not None and args.dim < 1:
        raise UserError(f"--dim must be at least 1, not {args.dim}")
    columns = parse_names(args.columns)
    rows, texts = read_texts(args.items, args.item_col, columns)
    known = None
    if args.learn_from:
        _, others = read_texts(args.learn_from, args.item_col, columns)
        known = [text for text in others if text]
    encoder, _, model = args.encoder.partition(":")
    vectors = embed(texts, encoder, Encoding(model, args.dim, known))
    pq.write_table(rows.append_column(COLUMN, vectors), args.output)


if __name__ == "__main__":
    run_command(main)
