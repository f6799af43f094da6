"""Every source gives its clips and captions in a fixed order, and says in one line what is wrong with it."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import webdataset

from reelflow.data.config import DataConfig, HubData, ToyboxData
from reelflow.data.folder import Folder
from reelflow.data.hub import Hub
from reelflow.data.opening import copied, open_sources
from reelflow.data.rendered import Rendered
from reelflow.data.shards import Shards
from reelflow.data.source import Blob, Joined, Member, Sample, Source
from reelflow.data.toybox import captions, edit_pair, sample_scene


def everything(source: Source | Joined) -> list[Sample]:
    return [sample for part in range(len(source.parts())) for sample in source.samples(part)]


def content(sample: Sample) -> bytes | None:
    media = sample.media
    if isinstance(media, Path):
        return media.read_bytes()
    assert media is None or isinstance(media, Blob | Member)
    return media.read() if media else None


@pytest.fixture
def folder(media: Path, tmp_path: Path) -> Path:
    """The clips, three of them with a .txt beside."""
    made = tmp_path / "clips"
    (made / "more").mkdir(parents=True)
    for name, place in (("wide.mp4", "."), ("tall.mp4", "more"), ("still.png", "."), ("short.mp4", ".")):
        shutil.copy(media / name, made / place)
    for name in ("wide", "more/tall", "still"):
        (made / f"{name}.txt").write_text(f" it is {name}\n")
    (made / ".hidden.mp4").write_bytes(b"x")
    return made


# --------------------------------------------------------------------------------------------------------------------- folders


def test_a_folder_with_captions_beside_the_clips(folder: Path) -> None:
    samples = everything(Folder(folder))
    assert [(sample.key, sample.captions) for sample in samples] == [
        ("clips/more/tall.mp4", ("it is more/tall",)),
        ("clips/short.mp4", ()),
        ("clips/still.png", ("it is still",)),
        ("clips/wide.mp4", ("it is wide",)),
    ]
    assert content(samples[0]) == (folder / "more" / "tall.mp4").read_bytes()


@pytest.mark.parametrize("table", ["metadata.jsonl", "metadata.csv"])
def test_a_folder_with_a_table(folder: Path, table: str) -> None:
    rows = [("wide.mp4", "a, \"b\"\nc"), ("more/tall.mp4", "tall"), ("gone.mp4", "gone")]
    if table.endswith("jsonl"):
        text = "\n".join(json.dumps({"file_name": name, "text": words}) for name, words in rows) + "\n\n"
    else:
        text = "file_name,text\n" + "".join(f'{name},"{words.replace(chr(34), chr(34) * 2)}"\n' for name, words in rows)
    (folder / table).write_text("\ufeff" + text, encoding="utf-8")
    found = {Path(sample.key).name: sample.captions for sample in everything(Folder(folder, "text"))}
    assert found == {
        "wide.mp4": ('a, "b"\nc',), "tall.mp4": ("tall",), "gone.mp4": ("gone",), "still.png": ("it is still",), "short.mp4": (),
    }  # fmt: skip


def test_several_phrasings_and_edits(folder: Path) -> None:
    row = {"file_name": "wide.mp4", "source_file_name": "more/tall.mp4", "caption": ["make it wide", " ", "wider"]}
    (folder / "metadata.jsonl").write_text(json.dumps(row))
    samples = {Path(sample.key).name: sample for sample in everything(Folder(folder))}
    assert samples["wide.mp4"].captions == ("make it wide", "wider")
    assert samples["wide.mp4"].source == folder / "more" / "tall.mp4"
    assert "tall.mp4" not in samples, "the clip before an edit is no clip of its own"


def test_parts_of_a_folder_change_with_names_and_captions(folder: Path) -> None:
    before = [part.name for part in Folder(folder).parts()]
    assert before == [part.name for part in Folder(folder).parts()]
    (folder / "wide.txt").write_text("something else")
    changed = [part.name for part in Folder(folder).parts()]
    assert changed != before
    shutil.copy(folder / "wide.mp4", folder / "new.mp4")
    assert [part.name for part in Folder(folder).parts()] != changed


BAD_TABLES = {
    "not json": ("metadata.jsonl", '{"file_name": "a.mp4"', "metadata.jsonl line 1: not JSON"),
    "no row": ("metadata.jsonl", "[1]", "metadata.jsonl line 1: '[1]' is not a row"),
    "no caption column": ("metadata.csv", "file_name,text\nwide.mp4,x\n", "line 2: no column 'caption' (it has file_name, text); name"),
    "no name column": ("metadata.csv", "file,caption\nwide.mp4,x\n", "line 2: no column 'file_name' (it has file, caption)"),
    "not utf-8": ("metadata.csv", b"file_name,caption\nwide.mp4,\xff\n", "metadata.csv: cannot be read"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_tables_that_cannot_be_read(folder: Path, case: str) -> None:
    name, text, words = BAD_TABLES[case]
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"metadata") as error:
        Folder(folder)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_folders_without_clips_or_captions(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        Folder(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no videos or pictures here"):
        Folder(tmp_path / "empty")
    for file in folder.rglob("*.txt"):
        file.unlink()
    with pytest.raises(ValueError, match="4 clips and no caption; put a .txt of the same name beside each"):
        Folder(folder)


# ---------------------------------------------------------------------------------------------------------------------- shards


@pytest.fixture
def shards(media: Path, tmp_path: Path) -> Path:
    """Two shards: captions in .txt and .json; a sample without a clip, one with a clip before it."""
    made = tmp_path / "shards"
    made.mkdir()
    wide, tall = ((media / name).read_bytes() for name in ("wide.mp4", "tall.mp4"))
    with webdataset.TarWriter(str(made / "0.tar")) as tar:
        tar.write({"__key__": "a", "mp4": wide, "txt": "one"})
        tar.write({"__key__": "sub/b", "mp4": tall, "json": {"caption": ["two", "zwei"], "other": 1}})
        tar.write({"__key__": "c", "txt": "no clip"})
    with webdataset.TarWriter(str(made / "1.tar")) as tar:
        tar.write({"__key__": "d", "source.mp4": tall, "mp4": wide, "txt": "edit"})
        tar.write({"__key__": "e", "png": (media / "still.png").read_bytes()})
    return made


WANTED = [("0.tar/a", ("one",)), ("0.tar/sub/b", ("two", "zwei")), ("0.tar/c", ("no clip",)), ("1.tar/d", ("edit",)), ("1.tar/e", ())]


def names(samples: list[Sample]) -> list[tuple[str, tuple[str, ...]]]:
    """Keys without the folder's or server's name, and captions."""
    return [(sample.key.partition("/")[2], sample.captions) for sample in samples]


def test_shards_on_disk_are_read_in_place(shards: Path, media: Path) -> None:
    source = Shards([f"{shards}/{{0..1}}.tar"])
    samples = everything(source)
    assert source.lasting
    assert names(samples) == WANTED
    assert all(isinstance(sample.media, Member) for sample in samples if sample.media)
    assert content(samples[0]) == (media / "wide.mp4").read_bytes()
    assert samples[2].media is None
    assert isinstance(samples[3].source, Member)
    assert samples[3].source.read() == (media / "tall.mp4").read_bytes()
    assert content(samples[3]) == (media / "wide.mp4").read_bytes()
    assert everything(Shards([f"{shards}/*.tar"])) == samples


@pytest.fixture
def served(shards: Path) -> Iterator[str]:
    """The shards behind a web server."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(shards))
    handler.log_message = lambda *_: None  # type: ignore[attr-defined]
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="http shards are streamed by curl")


@needs_curl
def test_shards_by_url_are_streamed(served: str, shards: Path) -> None:
    source = Shards([f"{served}/{{0..1}}.tar"])
    samples = everything(source)
    assert not source.lasting
    assert names(samples) == WANTED
    assert [content(sample) for sample in samples] == [content(sample) for sample in everything(Shards([f"{shards}/*.tar"]))]


def test_a_compressed_shard_is_streamed(shards: Path) -> None:
    with tarfile.open(shards / "0.tar.gz", "w:gz") as packed, tarfile.open(shards / "0.tar") as plain:
        for member in plain:
            packed.addfile(member, plain.extractfile(member))
    assert [(key.replace(".tar.gz", ".tar"), words) for key, words in names(everything(Shards([f"{shards}/0.tar.gz"])))] == WANTED[:3]


@needs_curl
@pytest.mark.parametrize("path", ["/none.tar", ":9/none.tar"])
def test_a_shard_that_cannot_be_reached(served: str, path: str) -> None:
    url = served.rsplit(":", 1)[0] + path if path.startswith(":") else served + path
    with pytest.raises(ValueError, match=r"none\.tar: the shard cannot be read \(the transfer stopped with code \d+\)") as error:
        everything(Shards([url]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_a_shard_that_is_cut_off(shards: Path, suffix: str) -> None:
    with tarfile.open(shards / f"2{suffix}", "w:gz" if suffix.endswith("gz") else "w") as tar:
        tar.add(shards / "0.tar", "a.mp4")
    whole = (shards / f"2{suffix}").read_bytes()
    (shards / f"2{suffix}").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"the shard cannot be read \(.*\); see that it is there and whole"):
        everything(Shards([f"{shards}/2{suffix}"]))


def test_shards_that_are_not_there() -> None:
    for pattern, words in (("none/*.tar", "no such shards"), ("none/0.tar", "no such shard"), ("ftp://x/0.tar", "files or URLs of http")):
        with pytest.raises(ValueError, match=words):
            Shards([pattern])


def test_a_program_for_streams_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=r"s3://bucket/0\.tar: the shard cannot be read \(s3 is streamed by the program aws"):
        everything(Shards(["s3://bucket/0.tar"]))


@pytest.fixture
def bucket(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The shards behind a program `aws`, which writes an object to its output, as far as it has it."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "aws"
    program.write_text(
        '#!/bin/sh\ntest "$1 $2 $5" = "s3 cp -" || exit 2\n'
        f'cat "{shards}/${{4##*/}}" || exit 1\ncase "$4" in *cut*) exit 1;; esac\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    return "s3://bucket"


def test_shards_of_s3_are_streamed_to_their_end(bucket: str, shards: Path) -> None:
    with (shards / "0.tar").open("ab") as file:  # more than a pipe holds: a program that cannot write it has failed
        file.write(bytes(1 << 20))
    assert names(everything(Shards([f"{bucket}/{{0,1}}.tar"]))) == WANTED


def test_a_transfer_that_ends_between_two_files_is_not_taken_for_whole(bucket: str, shards: Path) -> None:
    with tarfile.open(shards / "0.tar") as tar:
        second = tar.getmembers()[2].offset
    (shards / "cut.tar").write_bytes((shards / "0.tar").read_bytes()[:second])
    with pytest.raises(ValueError, match=r"s3://bucket/cut\.tar: the shard cannot be read \(the transfer stopped with code 1\)"):
        everything(Shards([f"{bucket}/cut.tar"]))


@needs_curl
def test_a_stream_is_copied_once_to_be_read_in_any_order(served: str, tmp_path: Path) -> None:
    stream = Shards([f"{served}/0.tar", f"{served}/1.tar"])
    copy = copied(stream, tmp_path / "cache", "caption")
    assert copy.lasting
    wanted = everything(stream)
    found = everything(copy)
    assert [sample.captions for sample in found] == [sample.captions for sample in wanted]
    assert [content(sample) for sample in found] == [content(sample) for sample in wanted]
    assert [sample.source is None for sample in found] == [sample.source is None for sample in wanted]
    stamps = {path: os.stat(path).st_mtime_ns for path in (tmp_path / "cache").rglob("*.tar")}
    copied(stream, tmp_path / "cache", "caption")
    assert {path: os.stat(path).st_mtime_ns for path in (tmp_path / "cache").rglob("*.tar")} == stamps


# ------------------------------------------------------------------------------------------------------------------------- hub


@pytest.fixture
def dataset(media: Path, tmp_path: Path) -> Path:
    """A dataset in two parquet files, videos inside."""
    import datasets

    made = tmp_path / "dataset"
    names = ("wide.mp4", "tall.mp4", "short.mp4")
    rows = [{"video": {"bytes": (media / name).read_bytes(), "path": name}, "caption": name} for name in names]
    features = datasets.Features({"video": datasets.Video(decode=False), "caption": datasets.Value("string")})
    (made / "data").mkdir(parents=True)
    for index, some in enumerate((rows[:2], rows[2:])):
        datasets.Dataset.from_list(some, features=features).to_parquet(str(made / "data" / f"train-{index}-of-2.parquet"))
    return made


def test_a_dataset_is_streamed_part_by_part(dataset: Path, media: Path) -> None:
    source = Hub(HubData(name=str(dataset)))
    assert len(source.parts()) == 2
    assert [sample.captions for sample in source.samples(1)] == [("short.mp4",)]
    samples = everything(source)
    assert [content(sample) for sample in samples] == [(media / name).read_bytes() for name in ("wide.mp4", "tall.mp4", "short.mp4")]
    assert len({sample.key for sample in samples}) == 3


def test_a_folder_of_pictures_through_datasets(folder: Path) -> None:
    for file in [*folder.rglob("*.mp4"), *folder.rglob("*.txt")]:
        file.unlink()
    (folder / "metadata.csv").write_text("file_name,text\nstill.png,a still\n")
    source = Hub(HubData(name=str(folder), media="image"), "text")
    assert [(content(sample), sample.captions) for sample in everything(source)] == [((folder / "still.png").read_bytes(), ("a still",))]


def test_datasets_that_do_not_fit(dataset: Path) -> None:
    with pytest.raises(ValueError, match=r"has the columns video, caption; say which one holds the clips \(data\.hub\.media\)"):
        Hub(HubData(name=str(dataset), media="clip"))
    with pytest.raises(ValueError, match=r"has the columns video, caption; say which one holds the captions \(data\.caption\)"):
        Hub(HubData(name=str(dataset)), "text")
    with pytest.raises(ValueError, match=r"nobody/nothing: the dataset cannot be read \(.*\); check name, split and network"):
        Hub(HubData(name="nobody/nothing"))
    with pytest.raises(ValueError, match="the dataset cannot be read"):
        Hub(HubData(name=str(dataset), split="nowhere"))


# ------------------------------------------------------------------------------------------------------- toybox, all together


def test_toybox_as_a_source() -> None:
    source = Rendered(ToyboxData(count=66, pictures=2, edits=1, seed=3), frames=33, edit_frames=17)
    assert [part.count for part in source.parts()] == [64, 2, 2, 1]
    samples = everything(source)
    scene = sample_scene(3 + 33_000, 65)
    assert (samples[65].media, samples[65].captions, samples[65].frames) == (scene, captions(scene), 33)
    assert samples[66].media == sample_scene(3 + 1000, 0), "pictures show other scenes"
    before, after, words = edit_pair(3, 0)
    assert (samples[68].source, samples[68].media, samples[68].captions, samples[68].frames) == (before, after, (words,), 17)
    with pytest.raises(ValueError, match="all 0"):
        Rendered(ToyboxData(count=0), 33, 17)
    other = Rendered(ToyboxData(count=1, seed=3, pairs=1, motions=("circles",)), 33, 17)
    assert other.parts()[0].name != source.parts()[0].name, "what is prepared of one does not pass for the other"
    (scene,) = (sample.media for sample in other.samples(0))
    assert [thing.motion for thing in scene.things] == ["circles", "circles"]


def test_sources_are_read_one_after_the_other(folder: Path, shards: Path) -> None:
    config = DataConfig(folder=folder, shards=(f"{shards}/0.tar", f"{shards}/1.tar"), toybox=ToyboxData(count=1))
    joined = Joined(open_sources(config, 9, 5))
    assert [len(list(joined.samples(part))) for part in range(4)] == [4, 3, 2, 1]
    keys = [sample.key for sample in everything(joined)]
    assert len(set(keys)) == len(keys) == 10


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "data names no source; give folder, shards, hub or toybox"),
        ({"foldr": "x"}, "foldr = 'x': Extra inputs are not permitted"),
        ({"toybox": {"cuont": 3}}, "toybox.cuont = 3: Extra inputs are not permitted"),
        ({"toybox": {"motions": ["dances"]}}, "motion 'dances' is not in toybox; use some of: moves left, moves right"),
        ({"folder": "x", "min_frames": 9, "frames": 5}, "min_frames = 9 is more than frames = 5"),
        ({"folder": "x", "max_failed_share": 2}, "max_failed_share = 2"),
    ],
)
def test_configurations_that_are_refused(values: dict, words: str) -> None:
    with pytest.raises(ValueError, match="run.yaml: ") as error:
        DataConfig.parse(values, "run.yaml")
    assert words in str(error.value)
