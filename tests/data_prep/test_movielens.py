"""MovieLens' formats, on a few made-up rows of each, and the download, from a server on this machine."""

import hashlib
import http.server
import io
import json
import re
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rec.data_prep import movielens
from rec.data_prep.dataset import Dataset, open_dataset
from rec.errors import UserError
from rec.ops import archives

RATINGS = [("1", "10", "5", "100"), ("1", "20", "3", "200"), ("1", "30", "4", "300")]
RATINGS += [("2", "30", "2", "100"), ("2", "20", "1", "200"), ("2", "10", "5", "300")]
FLAGS = {"Action": 6, "Children's": 9, "Western": 23}  # columns of u.item


def flagged(movie: str, title: str, *genres: str) -> str:
    row = [movie, title, "01-Jan-1995", "", "http://x", *["0"] * 19]
    for genre in genres:
        row[FLAGS[genre]] = "1"
    return "|".join(row)


def joined(delimiter: str) -> str:
    return "".join(delimiter.join(row) + "\n" for row in RATINGS)


def csv_files() -> dict[str, bytes]:
    movies = (
        "movieId,title,genres\n"
        '10,"City of Lost Children, The (Cité des enfants perdus, La) (1995)",Adventure|Drama\n'
        '20,"""Great Performances"" Cats (1998)",Musical\n'
        "30,Babylon 5,(no genres listed)\n"
        "40,Fawlty Towers (1975-1979) ,Comedy\n"
    )
    return {
        "ratings.csv": f"userId,movieId,rating,timestamp\n{joined(',')}".encode(),
        "movies.csv": movies.encode(),
    }


def dat_files(encoding: str) -> dict[str, bytes]:
    movies = "10::Misérables, Les (1995)::Drama|Musical\n20::2001: A Space Odyssey (1968)::Sci-Fi\n30::X (1)::Action\n"
    return {"ratings.dat": joined("::").encode(), "movies.dat": movies.encode(encoding)}


def flag_files() -> dict[str, bytes]:
    items = [
        flagged("10", "Misérables, Les (1995)", "Action", "Children's"),
        flagged("20", "Land III (1995) (V)"),
    ]
    items += [flagged("30", 'The "Quote (1996)', "Western")]
    users = "1|24|M|technician|02139\n2|53|F|other|T8H1N\n"
    files = {"u.data": joined("\t"), "u.item": "\n".join([*items, ""]), "u.user": users}
    return {name: text.encode("latin-1") for name, text in files.items()}


def zipped(folder: str, files: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(f"{folder}/{name}", data)
        archive.writestr(f"__MACOSX/{folder}/._{'ratings.csv'}", b"junk")
    return content.getvalue()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Dataset]:
    def run(*args: str) -> Dataset:
        monkeypatch.setattr(
            "sys.argv", ["movielens", "--output-dir", str(tmp_path / "data/out"), *args]
        )
        movielens.main()
        return open_dataset(tmp_path / "data/out")

    return run


Run = Callable[..., Dataset]


def write(folder: Path, files: dict[str, bytes]) -> str:
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return str(folder)


def test_100k_with_genre_flags_latin1_and_users(run: Run, tmp_path: Path) -> None:
    source = write(tmp_path / "ml-100k", flag_files())
    dataset = run("--name", "100k", "--source", source, "--split", "leave_one_out")
    items = dataset.items().set_index("item_id")
    assert items["title"].tolist() == ["Misérables, Les", "Land III", 'The "Quote']
    assert items["year"].tolist() == [1995, 1995, 1996]
    assert [list(genres) for genres in items["genres"]] == [
        ["Action", "Children's"],
        [],
        ["Western"],
    ]
    assert dataset.users().to_dict("list") == {
        "user_id": ["1", "2"],
        "age": [24, 53],
        "gender": ["M", "F"],
        "occupation": ["technician", "other"],
    }
    assert dataset.interactions("test")[["user_id", "item_id"]].to_numpy().tolist() == [
        ["1", "30"],
        ["2", "10"],
    ]
    assert dataset.manifest["name"] == "ml-100k"


def test_1m_with_latin1_titles_and_users(run: Run, tmp_path: Path) -> None:
    files = dat_files("latin-1") | {"users.dat": b"1::F::1::10::48067\n2::M::56::16::70072\n"}
    (tmp_path / "ml-1m.zip").write_bytes(zipped("ml-1m", files))
    dataset = run(
        "--name", "1m", "--source", str(tmp_path / "ml-1m.zip"), "--split", "leave_one_out"
    )
    assert dataset.items()["title"].tolist() == [
        "Misérables, Les",
        "2001: A Space Odyssey",
        "X (1)",
    ]
    assert dataset.manifest["columns"]["users"] == {
        "user_id": "string",
        "gender": "string",
        "age": "int64",
        "occupation": "string",
    }
    assert dataset.users()["occupation"].tolist() == ["10", "16"]


def test_10m_with_utf8_titles(run: Run, tmp_path: Path) -> None:
    source = write(tmp_path / "mine/ml-10M100K", dat_files("utf-8"))
    dataset = run("--name", "10m", "--source", str(Path(source).parent), "--split", "leave_one_out")
    assert dataset.items()["title"].iloc[0] == "Misérables, Les"
    assert list(dataset.users().columns) == ["user_id"]


@pytest.mark.parametrize("name", ["20m", "25m", "32m", "latest-small"])
def test_csv_with_quoted_titles(run: Run, tmp_path: Path, name: str) -> None:
    (tmp_path / "m.zip").write_bytes(zipped(f"ml-{name}", csv_files()))
    items = run(
        "--name", name, "--source", str(tmp_path / "m.zip"), "--split", "leave_one_out"
    ).items()
    assert items["title"].tolist() == [
        "City of Lost Children, The (Cité des enfants perdus, La)",
        '"Great Performances" Cats',
        "Babylon 5",
        "Fawlty Towers",
    ]
    assert items["year"].fillna(0).tolist() == [1995, 1998, 0, 1975]
    assert [list(genres) for genres in items["genres"]] == [
        ["Adventure", "Drama"],
        ["Musical"],
        [],
        ["Comedy"],
    ]


def test_min_rating_keeps_that_rating_and_above(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "m", csv_files())
    dataset = run(
        "--name", "25m", "--source", source, "--split", "leave_one_out", "--min-rating", "2"
    )
    assert dataset.interactions("train")["rating"].tolist() == [5.0, 2.0, 5.0]
    assert json.loads(capsys.readouterr().out)["dropped"]["below_min_rating"] == 1


def test_a_source_of_another_dataset_is_one_sentence(run: Run, tmp_path: Path) -> None:
    source = write(tmp_path / "m", csv_files())
    with pytest.raises(UserError, match="m holds no u.data: is it really ml-100k?"):
        run("--name", "100k", "--source", source)
    with pytest.raises(UserError, match="--source .*none does not exist"):
        run("--name", "100k", "--source", str(tmp_path / "none"))
    (tmp_path / "m.zip").write_bytes(zipped("ml-1m", dat_files("latin-1")))
    with pytest.raises(UserError, match="no u.data of ml-100k: is it .* It holds __MACOSX, ml-1m$"):
        run("--name", "100k", "--source", str(tmp_path / "m.zip"))


def damaged(content: bytes) -> bytes:
    """The same with a bit of the first file's data changed."""
    return content[:60] + bytes([content[60] ^ 255]) + content[61:]


def marked(content: bytes, offset: int, value: int, size: int = 2) -> bytes:
    """A zip with a field of its entries changed, in the headers of the files and in the directory at the end."""
    changed = bytearray(content)
    for signature, shift in ((b"PK\3\4", 0), (b"PK\1\2", 2)):
        at = -1
        while (at := content.find(signature, at + 1)) >= 0:
            place = at + offset + shift
            changed[place : place + size] = value.to_bytes(size, "little")
    return bytes(changed)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (damaged, "is no intact zip file .*delete it"),
        (lambda content: content[:50], "is no intact zip file .*delete it"),
        (lambda content: b"userId,movieId\n1,2\n", "is no zip file, it seems to be text"),
        (lambda content: b"\x1f\x8b" + content, "is no zip file, it seems to be a gzip file"),
        (lambda content: marked(content, 6, value=1), "is an encrypted zip.*unpack it yourself"),
        (lambda content: marked(content, 8, value=9), "is a zip packed by deflate64.*unpack it"),
        (lambda content: marked(content, 8, value=77), "is a zip packed by method 77.*unpack it"),
        (
            lambda content: marked(content, 22, value=2**32 - 2, size=4),
            "ratings.csv would unpack to 4,294,967,294 bytes, more than",
        ),
    ],
)
def test_a_zip_that_cannot_be_unpacked_is_named_by_what_it_is(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[bytes], bytes],
    problem: str,
) -> None:
    monkeypatch.setattr(archives, "UNPACKED_LIMIT", 2**31)
    (tmp_path / "m.zip").write_bytes(spoil(zipped("ml-25m", csv_files())))
    with pytest.raises(UserError, match=f"m.zip.*{problem}"):
        run("--name", "25m", "--source", str(tmp_path / "m.zip"))
    assert not (tmp_path / "data/out").exists()


def test_a_bomb_is_refused_by_what_it_would_unpack_to(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "UNPACKED_LIMIT", 10**6)
    files = csv_files() | {"ratings.csv": b"0" * (10**6 + 1)}
    (tmp_path / "m.zip").write_bytes(zipped("ml-25m", files))
    with pytest.raises(UserError, match="would unpack to 1,000,001 bytes"):
        run("--name", "25m", "--source", str(tmp_path / "m.zip"))


def test_a_damaged_file_of_the_source_is_one_sentence(run: Run, tmp_path: Path) -> None:
    source = write(tmp_path / "m", csv_files() | {"movies.csv": b"movieId,name,genres\n1,x,y\n"})
    with pytest.raises(UserError, match="movies.csv cannot be read: .*title"):
        run("--name", "25m", "--source", source)
    rows = csv_files()["ratings.csv"] + b"3,x,good,100\n"
    (tmp_path / "m/ratings.csv").write_bytes(rows)
    with pytest.raises(
        UserError, match=r"ratings.csv:8: rating 'good' is not a number .*; fix the file\)$"
    ):
        run("--name", "25m", "--source", source)
    files = csv_files() | {"ratings.csv": rows}
    (tmp_path / "m.zip").write_bytes(zipped("ml-25m", files))
    with pytest.raises(UserError, match="/m.zip/ml-25m/ratings.csv:8: rating 'good'"):
        run("--name", "25m", "--source", str(tmp_path / "m.zip"))


# ---------------------------------------------------------------------------------------------------------------------
# Download


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` with byte ranges; sends at most `most` bytes of an answer and then hangs up."""

    files: dict[str, bytes]
    most: int
    ranges: bool
    requests: list[tuple[str, str | None]]


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.requests.append((self.path, wanted))
        content = self.server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        start = (
            int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.server.ranges else 0
        )
        if start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : start + self.server.most])

    def log_message(self, *args: object) -> None:
        """Quiet."""


ZIP = "/ml-latest-small.zip"
PART = "data/ml-latest-small.zip.part"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as server:
        content = zipped("ml-latest-small", csv_files())
        digest = hashlib.sha256(content).hexdigest()
        monkeypatch.setitem(movielens.DIGESTS, "latest-small", digest)
        server.files = {ZIP: content}
        server.most, server.ranges, server.requests = 10**9, True, []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def fetch(run: Run, server: Server) -> Callable[[], Dataset]:
    url = f"http://127.0.0.1:{server.server_port}"
    return lambda: run("--name", "latest-small", "--split", "leave_one_out", "--base-url", url)


def test_download_is_checked_kept_and_not_repeated(
    fetch: Callable[[], Dataset], server: Server, tmp_path: Path
) -> None:
    assert fetch().manifest["counts"]["items"] == 4
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [
        "ml-latest-small.zip",
        "out",
    ]
    fetch()
    assert [path for path, _ in server.requests] == [ZIP]


def test_download_resumes_where_it_broke_off(
    fetch: Callable[[], Dataset], server: Server, tmp_path: Path
) -> None:
    server.most = 300
    with pytest.raises(
        UserError, match="broken off after 300 of .*run the command again to resume.*--source"
    ):
        fetch()
    assert (tmp_path / PART).stat().st_size == 300
    assert not (tmp_path / "data/out").exists()
    server.most = 10**9
    fetch()
    assert server.requests[1] == (ZIP, "bytes=300-")


def test_download_that_only_lacked_its_name_is_not_repeated(
    fetch: Callable[[], Dataset], server: Server, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / PART).write_bytes(server.files[ZIP])
    fetch()
    assert [path for path, _ in server.requests] == [ZIP]


def test_download_from_a_server_without_ranges_begins_again(
    fetch: Callable[[], Dataset], server: Server, tmp_path: Path
) -> None:
    server.ranges = False
    (tmp_path / "data").mkdir()
    (tmp_path / PART).write_bytes(b"half of it")
    assert fetch().manifest["counts"]["users"] == 2


def test_download_with_another_sha256_is_thrown_away(
    fetch: Callable[[], Dataset], server: Server, tmp_path: Path
) -> None:
    server.files[ZIP] = server.files[ZIP][:-1] + b"x"
    with pytest.raises(UserError, match="arrived damaged, or is not the file.*--source"):
        fetch()
    assert list((tmp_path / "data").iterdir()) == []


def test_the_sha256_of_every_archive_is_known() -> None:
    assert movielens.DIGESTS.keys() == movielens.FILES.keys()
    assert len(set(movielens.DIGESTS.values())) == len(movielens.FILES)
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in movielens.DIGESTS.values())


def test_download_that_does_not_exist_or_connect_mentions_source(run: Run, server: Server) -> None:
    url = f"http://127.0.0.1:{server.server_port}"
    with pytest.raises(UserError, match="ml-100k.zip failed .HTTP Error 404.*--source"):
        run("--name", "100k", "--base-url", url)
    with pytest.raises(UserError, match="ml-100k.zip failed .*refused.*--source"):
        run("--name", "100k", "--base-url", "http://127.0.0.1:9")
