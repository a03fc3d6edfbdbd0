"""Tests export --push: the files and the target of an upload, and refusals before any work."""

import pathlib

import huggingface_hub
import pytest

from helpers.tiny_runs import tiny, write_rows
from jaxrl_reason import export, models, train
from jaxrl_reason.runs import checkpoints

pytestmark = pytest.mark.usefixtures("quick_compilation")


class FakeApi:
    """A fake huggingface_hub.HfApi. `refuses` names the request that fails."""

    def __init__(self):
        self.made, self.uploaded, self.refuses = [], [], ""

    def create_repo(self, name, **options):
        if self.refuses == "create_repo":
            raise PermissionError("403 Forbidden.\nmore")
        self.made.append((name, options))

    def upload_folder(self, *, repo_id, folder_path, commit_message, delete_patterns):
        self.deleted = delete_patterns
        if self.refuses == "upload_folder":
            raise ConnectionError("The network is down.")
        self.uploaded.append((repo_id, sorted(p.name for p in pathlib.Path(folder_path).iterdir()), commit_message))
        self.card = (pathlib.Path(folder_path) / "README.md").read_text()
        self.folder = pathlib.Path(folder_path)


@pytest.fixture
def api(monkeypatch):
    fake = FakeApi()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_token")
    return fake


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Writes a run with one checkpoint and returns its work directory."""
    folder = tmp_path_factory.mktemp("push")
    run = train.setup(tiny(write_rows(folder / "rows.jsonl"), steps=1), folder / "run")
    saver = checkpoints.Checkpoints(folder / "run" / "checkpoints", 1)
    saver.save(1, run.programs.init())
    saver.close()
    return folder / "run"


FILES = [
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
]


@pytest.mark.parametrize("switches, private", [([], True), (["--public"], False)])
def test_a_model_is_uploaded_with_its_card(switches, private, api, workdir, capsys):
    assert export.main([f"--workdir={workdir}", "--push=me/sums", *switches]) == 0
    assert api.made == [("me/sums", dict(private=private, exist_ok=True, repo_type="model"))]
    assert api.uploaded == [("me/sums", FILES, "Checkpoint 1, exported by jaxrl_reason")]
    assert {"*.safetensors", "*.index.json", "adapter_config.json", "config.json"} < set(api.deleted)
    assert capsys.readouterr().out == "Checkpoint 1 is at https://huggingface.co/me/sums.\n"
    assert "# sums\n" in api.card and "None were measured." in api.card and str(workdir.parent) not in api.card
    assert not api.folder.exists()


def test_files_of_an_earlier_upload_are_removed(api, workdir):
    """By the hub's own rule: of the files that match, those stay that the new upload has."""
    assert export.main([f"--workdir={workdir}", "--push=me/sums"]) == 0
    stale = ["chat_template.jinja", "added_tokens.json", "special_tokens_map.json", "vocab.json", "adapter_config.json"]
    stale += ["model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    others = ["LICENSE", "figure.png", "data/table.json"]
    matched = huggingface_hub.utils.filter_repo_objects([*FILES, *stale, *others], allow_patterns=api.deleted)
    assert set(matched) - set(FILES) == set(stale)


def test_a_directory_is_kept_if_it_is_named(api, workdir, tmp_path):
    assert export.main([f"--workdir={workdir}", "--push=me/sums", f"--out={tmp_path / 'out'}"]) == 0
    assert api.folder == tmp_path / "out" and sorted(p.name for p in api.folder.iterdir()) == FILES
    assert models.load_pretrained(tmp_path / "out").config.width == 16


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--push="], "--push=: expected a name."),
        (["--push=", "--out=DIR"], "--push=: expected a name."),
        (["--push=sums"], "'sums' is no name for a model on the hub: write owner/name"),
        (["--push=me/a/b"], "'me/a/b' is no name"),
        (["--push=me/sums@main"], "'me/sums@main' is no name"),
        (["--push=me/a--b"], "'me/a--b' is no name"),
        (["--push=../sums"], "'../sums' is no name"),
        (["--out=DIR", "--public"], "--public is for --push=OWNER/NAME; leave it out."),
        ([], "--out=DIR is missing: the directory to write; or give --push=OWNER/NAME."),
        (["--push=me/sums", "--out=."], "is there already and not empty"),
    ],
)
def test_flags_that_cannot_be_are_refused_before_the_model_is_read(flags, said, api, workdir, capsys, monkeypatch):
    monkeypatch.setattr(export, "load_policy", None)
    assert export.main([f"--workdir={workdir}", *flags]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and api.made == []


def test_an_upload_needs_a_token(api, workdir, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(export, "load_policy", None)
    assert export.main([f"--workdir={workdir}", "--push=me/sums"]) == 2
    assert capsys.readouterr().err == (
        "error: An upload to me/sums needs a token of the Hugging Face hub that may write: run hf auth login, or set "
        "HF_TOKEN.\n"
    )
    assert api.made == []


def test_a_run_that_cannot_be_read_makes_no_repository(api, workdir, capsys):
    assert export.main([f"--workdir={workdir}", "--push=me/sums", "--checkpoint=7"]) == 2
    assert "has no checkpoint 7; it has 1." in capsys.readouterr().err and api.made == []


@pytest.mark.parametrize("refuses, code", [("create_repo", 2), ("upload_folder", 1)])
def test_what_the_hub_refuses_is_one_sentence(refuses, code, api, workdir, capsys):
    api.refuses = refuses
    assert export.main([f"--workdir={workdir}", "--push=me/sums"]) == code
    reason = {"create_repo": "PermissionError: 403 Forbidden", "upload_folder": "ConnectionError: The network is down"}
    assert capsys.readouterr().err == (
        f"error: me/sums could not be written on the Hugging Face hub: {reason[refuses]}.\n"
    )
