"""Addresses of other machines are refused with a remedy, and never become a local folder."""

import pathlib

import pytest

from helpers.tiny_runs import change, tiny, write_rows
from jaxrl_reason import compare, train
from jaxrl_reason.config import ConfigError, remote, validate
from jaxrl_reason.config.validate import PATHS


@pytest.mark.parametrize(
    "address, remedy",
    [
        ("gs://bucket/run", "gcsfuse bucket DIR"),
        ("gs://bucket", "gcsfuse bucket DIR"),
        ("gs://bucket", "copy it (gcloud storage rsync --recursive DIR gs://bucket)"),
        ("GS:/bucket/a/b", "copy it (gcloud storage rsync --recursive DIR gs://bucket/a/b)"),
        ("GS://bucket/a/b", "gcsfuse bucket DIR"),
        (str(pathlib.Path("gs://bucket/run")), "gcsfuse bucket DIR"),
        ("s3://bucket/run", "mount-s3 bucket DIR"),
        ("s3a://bucket/run", "mount-s3 bucket DIR"),
        ("az://container/run", "blobfuse2"),
        ("abfss://container/run", "blobfuse2"),
        ("hdfs://host:9000/run", "mount what hdfs:// names"),
        ("memory://run", "mount what memory:// names"),
        ("https://host/rows.jsonl", "download it"),
        ("file:///tmp/run", "leave out file://"),
        ("hf://datasets/a/b", "OWNER/NAME"),
    ],
)
def test_an_address_has_a_remedy(address, remedy):
    assert remedy in remote(address)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "runs/a",
        "/tmp/a",
        "~/a",
        "./gs:/a",
        "C:/runs",
        "Qwen/Qwen3-0.6B@main",
        "gsm8k:1.0.0",
        "my.py:score",
        "a: b",
        "://x",
    ],
)
def test_paths_and_names_have_none(path):
    assert remote(path) == ""


def test_what_is_supported_is_a_path():
    assert remote("hf://datasets/a/b.parquet", ("hf://datasets/",)) == ""
    assert remote("gs://a/b.parquet", ("hf://datasets/",))


@pytest.mark.parametrize("field", PATHS)
def test_every_field_with_a_path_refuses_an_address(field):
    value = ["accuracy", "gs://bucket/x"] if field == "reward.functions" else "gs://bucket/x"
    config = change(tiny("rows.jsonl"), **{field.replace(".", "__"): value})
    with pytest.raises(
        ConfigError, match=rf"^config\.{field} is 'gs://bucket/x'; only paths on this machine .*gcsfuse"
    ):
        validate(config)


@pytest.mark.parametrize("begin", [train.setup, lambda config, workdir: compare.prepare(config, {}, workdir)])
@pytest.mark.parametrize("kind", [str, pathlib.Path])
def test_a_work_directory_elsewhere_is_refused_and_leaves_no_folder(begin, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tiny(write_rows(tmp_path / "rows.jsonl"), eval__every=1)
    with pytest.raises(ConfigError, match="^The work directory is 'gs:/.*gcsfuse bucket DIR"):
        begin(config, kind("gs://bucket/run"))
    change(config, compilation_cache="gs://bucket/cache")
    with pytest.raises(ConfigError, match="^config.compilation_cache is 'gs:/.*gcsfuse bucket DIR"):
        begin(config, kind(tmp_path / "run"))
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
