"""The hub: model cards, pushing and loading, with huggingface_hub's own client and a hub of our own on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard, constants
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from PIL import Image
from typer.testing import CliRunner

import spigan
from spigan import SPIGAN, ModelConfig, Trainer
from spigan.cli import app
from spigan.models.hub import card, write_folder
from spigan.models.pretrained import weights_sha256
from spigan.runs import read_stats

TINY = {"resolution": 8, "img_channels": 1, "dim_h": 16, "embed_channels": 4, "channel_base": 64, "channel_max": 8}
FILES = {"config.json", "model.safetensors", "README.md", "samples.png"}
TOKEN = "hf_secret"


def make(seed: int = 0) -> SPIGAN:
    torch.manual_seed(seed)
    return SPIGAN(ModelConfig.model_validate(TINY)).eval()


def same(a: SPIGAN, b: SPIGAN) -> bool:
    return weights_sha256(a) == weights_sha256(b)


class Hub(ThreadingHTTPServer):
    """What of the Hugging Face hub's interface models need: repositories, branches, commits, files.

    Attributes:
        repos: {id: {commit: {path: bytes}}}.
        heads: {(id, branch): commit}.
        private: {id: whether it is}.
        log: requests, as "METHOD path".
        cards: model cards whose front matter was to be checked.
        messages: of the commits.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.heads: dict[tuple[str, str], str] = {}
        self.private: dict[str, bool] = {}
        self.log: list[str] = []
        self.cards: list[str] = []
        self.messages: list[str] = []

    def commit(self, repo: str, branch: str, files: dict[str, bytes]) -> str:
        everything = {**self.repos[repo].get(self.heads.get((repo, branch), ""), {}), **files}
        digest = hashlib.sha1(repr(sorted(everything.items())).encode()).hexdigest()
        self.repos[repo][digest] = everything
        self.heads[repo, branch] = digest
        return digest


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *arguments: Any) -> None:
        pass

    def answer(self, value: Any, status: int = 200, **headers: str) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def lacks(self, what: str) -> None:
        self.answer({"error": "not found"}, 404, X_Error_Code=what)

    def find(self, repo: str, revision: str) -> str | None:
        """The commit of a revision; None after the answer that there is none."""
        if repo not in self.server.repos:
            self.lacks("RepoNotFound")
            return None
        sha = self.server.heads.get((repo, revision), revision)
        if sha not in self.server.repos[repo]:
            self.lacks("RevisionNotFound")
            return None
        return sha

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.log.append(f"{self.command} {path}")
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)", path):
            repo, what, revision = found.groups()
            if sha := self.find(repo, revision):
                files = self.server.repos[repo][sha]
                siblings = [{"rfilename": name} for name in files]
                tree = [{"type": "file", "path": n, "size": len(f), "oid": oid(f)} for n, f in files.items()]
                self.answer({"id": repo, "sha": sha, "siblings": siblings} if what == "revision" else tree)
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repo, revision, name = found.groups()
            if sha := self.find(repo, revision):
                if name in (files := self.server.repos[repo][sha]):
                    self.answer(files[name], ETag=f'"{oid(files[name])}"', X_Repo_Commit=sha)
                else:
                    self.lacks("EntryNotFound")
        else:
            self.answer({}, 404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.log.append(f"POST {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/api/validate-yaml":
            self.server.cards.append(json.loads(body)["content"])
            self.answer({"errors": [], "warnings": []})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "log in"}, 401)
        elif path == "/api/repos/create":
            given = json.loads(body)
            repo = f"{given.get('organization') or 'me'}/{given['name']}"
            if repo in self.server.repos:
                self.answer({"error": "exists", "url": f"{self.server.address}/{repo}"}, 409)
                return
            self.server.repos[repo] = {}
            self.server.private[repo] = given.get("private", given.get("visibility") == "private")
            self.server.commit(repo, "main", {})
            self.answer({"url": f"{self.server.address}/{repo}"})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(branch|preupload|commit)/(.+)", path):
            repo, what, branch = found.groups()
            if what == "branch":
                self.server.heads[repo, branch] = self.server.heads[repo, "main"]
                self.answer({})
            elif what == "preupload":
                files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                         for file in json.loads(body)["files"]]  # fmt: skip
                self.answer({"files": files})
            else:
                rows = [json.loads(line) for line in body.splitlines()]
                self.server.messages.append(rows[0]["value"]["summary"])
                files = {row["value"]["path"]: base64.b64decode(row["value"]["content"])
                         for row in rows if row["key"] == "file"}  # fmt: skip
                pull = "create_pr=1" in self.path
                sha = self.server.commit(repo, "refs/pr/1" if pull else branch, files)
                url = f"{self.server.address}/{repo}"
                extra = {"pullRequestUrl": f"{url}/discussions/1"} if pull else {}
                self.answer({"commitUrl": f"{url}/commit/{sha}", "commitOid": sha, **extra})
        else:
            self.answer({}, 404)


def oid(data: bytes) -> str:
    """git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub on this machine that huggingface_hub talks to, with a cache of its own."""
    server = Hub()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    huggingface_hub.close_session()  # a client that was made offline stays so
    yield server
    server.shutdown()
    server.server_close()
    huggingface_hub.close_session()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that measured its averaged weights, which best/ holds as well as model/."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = spigan.preset("digits", model={**TINY, "resolution": 16}, total_kimg=0.064, batch=16, tick_kimg=0.032)
    Trainer(config, folder, progress=False).fit()
    shutil.copytree(folder / "model", folder / "best")
    last = read_stats(folder)[-1]
    values = {"FD-Tiny": 12.5, "recall": 0.25}
    record = {"metric": "FD-Tiny", "value": 12.5, "iteration": last["iteration"], "kimg": last["kimg"], **values}
    (folder / "best" / "metrics.json").write_text(json.dumps(record))
    return folder


# ---- The folder and its card ----


def test_folder_and_card_of_a_run(run: Path, tmp_path: Path) -> None:
    model = SPIGAN.from_pretrained(run / "model")
    folder = write_folder(model, tmp_path / "out", "me/digits", run=run, license="cc-by-4.0")
    assert {path.name for path in folder.iterdir()} == FILES
    assert same(SPIGAN.from_pretrained(folder), model)
    with Image.open(folder / "samples.png") as image:
        assert image.size == (8 * 17 * 4 - 4, 8 * 17 * 4 - 4)
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "spigan" and card.data.license == "cc-by-4.0"
    assert card.data.pipeline_tag == "unconditional-image-generation"
    results = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert results == {"FD-Tiny": 12.5, "recall": 0.25}
    assert card.data.eval_results[0].dataset_name == "digits"
    text = card.text
    last = read_stats(run)[-1]
    for expected in (
        "# digits", "16x16 grey images", "![Samples of seeds 0 to 63](samples.png)", 'model="me/digits"',
        "| source | digits, train |", "| images | 1,797 |", f"| time | {last['seconds'] / 3600:.2f} hours |",
        "| FD-Tiny | 12.5 |", "| recall | 0.25 |", "Measured during training at 0.064 kimg",
        "cc-by-4.0", "## Limitations",
    ):  # fmt: skip
        assert expected in text, expected
    settings = json.loads(re.search(r"```json\n(.*?)```", text, re.DOTALL)[1])  # type: ignore[index]
    assert settings["batch"] == 16 and settings["model"] == model.config.model_dump()
    assert "{{" not in text and "{%" not in text and "None" not in text.replace("None of", "")


@pytest.mark.parametrize(("intervals", "told"), [(1, "trained at t = 1 alone (K = 1)"), (2, "`t=0.5` stops halfway")])
def test_a_card_tells_which_times_were_trained(intervals: int, told: str) -> None:
    config = spigan.preset("digits", intervals=intervals)
    text = card(make(), training={"kimg": 1.0, "hours": 1.0, "config": config.model_dump()}).text
    assert [told] == re.findall(r"trained at t = 1 alone \(K = 1\)|`t=0.5` stops halfway", text)


@pytest.mark.parametrize(
    ("changes", "told"),
    [({}, "from h(1) at every t"), ({"path_latent": "t"}, "from h(t)"), ({"mapping": "mlp"}, "from h(1) at every t")],
)
def test_a_card_tells_the_analytic_path(changes: dict[str, Any], told: str) -> None:
    config = spigan.preset("digits", intervals=1, path="analytic")
    model = SPIGAN(ModelConfig.model_validate(TINY | {"path": "analytic"} | changes))
    text = card(model, training={"kimg": 1.0, "hours": 1.0, "config": config.model_dump()}).text
    assert f"\n| path | analytic: the generator makes clean images G, {told} |\n| generator |" in text
    assert "at time t, the image is t G + (1 - t) z" in text and "meaningless" not in text and "an SPI-GAN" in text
    assert "| path |" not in card(make()).text


def test_a_model_alone(tmp_path: Path) -> None:
    folder = write_folder(make(), tmp_path / "out", "me/tiny")
    text = (folder / "README.md").read_text()
    assert {path.name for path in folder.iterdir()} == FILES
    assert "## Training" not in text and "model-index" not in text and "license:" not in text
    assert "No metrics have been measured for these weights." in text and "has not stated a licence" in text


def test_a_stylegan2_is_called_one(tmp_path: Path) -> None:
    model = SPIGAN(ModelConfig.model_validate(TINY | {"mapping": "mlp"}))
    text = (write_folder(model, tmp_path / "out", "me/x") / "README.md").read_text()
    assert "(NFE = 1): a StyleGAN2, trained with `spigan`.\n" in text and "SPI-GAN" not in text and "t=0.5" not in text


def test_a_run_before_its_first_tick(run: Path, tmp_path: Path) -> None:
    early = tmp_path / "run"
    shutil.copytree(run, early)
    (early / "stats.jsonl").unlink()
    (early / "best" / "metrics.json").unlink()
    text = (write_folder(SPIGAN.from_pretrained(early / "model"), tmp_path / "out", "me/x", run=early)
            / "README.md").read_text()  # fmt: skip
    assert "## Training\n\n| | |\n| --- | --- |\n| intervals K | 2" in text and '"batch": 16' in text
    assert "| time |" not in text


@pytest.mark.parametrize("rows", ["{}", "[1]", '{"iteration": 1, "kimg": null, "seconds": 1}'])
def test_a_run_with_damaged_statistics(rows: str, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "stats.jsonl").write_text(rows)
    with pytest.raises(ValueError, match=r"stats\.jsonl, line 1"):
        write_folder(SPIGAN.from_pretrained(run / "model"), tmp_path / "out", "me/x", run=tmp_path / "run")


def test_metrics_of_other_weights_are_not_told(run: Path, tmp_path: Path) -> None:
    """best/ is not the model that is pushed."""
    other = SPIGAN.from_pretrained(run / "model")
    torch.nn.init.zeros_(next(other.parameters()))
    text = (write_folder(other, tmp_path / "out", "me/x", run=run) / "README.md").read_text()
    assert "No metrics have been measured" in text and "FD-Tiny" not in text


def evaluation(model: SPIGAN, **changes: Any) -> dict[str, Any]:
    """What `spigan evaluate --out` writes, in part."""
    return {
        "metrics": {"FID": 7.25}, "nfe": 1, "samples": {"count": 50_000}, "model": {"sha256": weights_sha256(model)},
        "features": {"name": "Inception"}, "date": "2026-11-25",
        "reference": {"source": "/home/someone/faces.zip", "split": "train", "count": 70_000},
    } | changes  # fmt: skip


def test_metrics_of_an_evaluation(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps(evaluation(make())))
    folder = write_folder(make(), tmp_path / "out", "me/x", metrics=tmp_path / "result.json")
    card = ModelCard.load(folder / "README.md")
    assert {r.metric_name: r.metric_value for r in card.data.eval_results} == {"FID": 7.25, "NFE": 1}
    assert "50,000 samples against 70,000 images of faces.zip, train" in card.text
    assert "someone" not in card.content  # no local path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "must hold a JSON object, got list"),
        ("{", "is not JSON"),
        ("{}", "was not written by `spigan evaluate --out`"),
        (json.dumps(evaluation(make(1))), "metrics of other weights"),
    ],
)
def test_metrics_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        write_folder(make(), tmp_path / "out", "me/x", metrics=tmp_path / "result.json")
    assert not (tmp_path / "out").exists()


def test_a_run_of_another_architecture(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="trained a model with a different architecture"):
        write_folder(make(), tmp_path / "out", "me/x", run=run)


def test_what_is_local_stays_local(run: Path, tmp_path: Path) -> None:
    """Of a folder of images its name is told; device, feature network and the folders above it are not."""
    private = tmp_path / "private" / "run"
    shutil.copytree(run, private)
    for name in ("config.json", "data.json"):
        fields = json.loads((private / name).read_text())
        where = fields["data"] if name == "config.json" else fields
        where["source"] = "/home/someone/secret/faces"
        if name == "config.json":
            fields["metric_features"] = "net=/home/someone/net.pt"
        (private / name).write_text(json.dumps(fields))
    model = SPIGAN.from_pretrained(private / "model")
    content = (write_folder(model, tmp_path / "out", "me/x", run=private) / "README.md").read_text()
    assert "| source | faces, train |" in content
    assert "someone" not in content and "secret" not in content and "device" not in content


@pytest.mark.parametrize("name", ["a/b/c", "with space", "../up", "me/x@v2", ""])
def test_names_that_the_hub_does_not_take(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Repo id must"):
        write_folder(make(), tmp_path / "out", name)
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years")
    with pytest.raises(FileExistsError, match="is not empty"):
        write_folder(make(), tmp_path / "out", "me/x")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


# ---- Pushing ----


def test_pushed_is_what_is_loaded(hub: Hub, run: Path) -> None:
    model = SPIGAN.from_pretrained(run / "model")
    link = model.push_to_hub("me/digits", run=run, private=True, commit_message="first")
    assert re.fullmatch(f"{hub.address}/me/digits/commit/[0-9a-f]{{40}}", link)
    assert hub.private["me/digits"] is True and hub.messages == ["first"]
    files = hub.repos["me/digits"][hub.heads["me/digits", "main"]]
    assert files.keys() == FILES  # no discriminator, optimiser or checkpoint
    assert b"FD-Tiny" in files["README.md"] and b'model="me/digits"' in files["README.md"]
    assert hub.cards == [files["README.md"].decode()]  # the hub has checked the card's front matter
    loaded = SPIGAN.from_pretrained("me/digits")
    assert same(loaded, model) and not loaded.training
    images = spigan.sample(2, model="me/digits")
    assert torch.equal(images, spigan.sample(2, model=model))  # type: ignore[arg-type]


def test_name_without_namespace_branch_and_pull_request(hub: Hub) -> None:
    make(0).push_to_hub("tiny")
    assert b'model="me/tiny"' in hub.repos["me/tiny"][hub.heads["me/tiny", "main"]]["README.md"]
    make(1).push_to_hub("me/tiny", branch="v2")
    link = make(2).push_to_hub("me/tiny", create_pr=True)
    assert link == f"{hub.address}/me/tiny/discussions/1"
    with pytest.raises(ValueError, match="leave out create_pr or the branch 'v2'"):
        make().push_to_hub("me/tiny", branch="v2", create_pr=True)
    assert same(SPIGAN.from_pretrained("me/tiny"), make(0))
    assert same(SPIGAN.from_pretrained("me/tiny", revision="v2"), make(1))
    assert same(SPIGAN.from_pretrained("me/tiny@v2"), make(1))


def test_save_and_push(hub: Hub, tmp_path: Path) -> None:
    link = make().save_pretrained(tmp_path / "tiny", push_to_hub=True, commit_message="saved")
    assert link is not None and "/me/tiny/commit/" in link
    assert {path.name for path in (tmp_path / "tiny").iterdir()} == FILES - {"samples.png"}
    make(1).save_pretrained(tmp_path / "tiny", push_to_hub=True, repo_id="me/other")
    assert same(SPIGAN.from_pretrained("me/other"), make(1))
    assert make().save_pretrained(tmp_path / "alone", repo_id="me/alone") is None
    assert hub.repos.keys() == {"me/tiny", "me/other"}


def test_wrong_token_and_bad_metrics_upload_nothing(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="401"):
        make().save_pretrained(tmp_path / "tiny", push_to_hub=True, token="hf_wrong")
    assert same(SPIGAN.from_pretrained(tmp_path / "tiny"), make())  # what is saved stays whole
    with pytest.raises(FileNotFoundError):
        make().push_to_hub("me/tiny", metrics=tmp_path / "missing.json")
    assert hub.repos == {}


# ---- Loading ----


def test_what_is_kept_is_not_downloaded_again(hub: Hub, tmp_path: Path) -> None:
    make().push_to_hub("me/tiny")
    hub.log.clear()
    SPIGAN.from_pretrained("me/tiny")
    downloads = {line for line in hub.log if line.startswith("GET /me/tiny/resolve/")}
    assert {line.rpartition("/")[2] for line in downloads} == {"config.json", "model.safetensors"}
    hub.log.clear()
    SPIGAN.from_pretrained("me/tiny")
    assert not [line for line in hub.log if "resolve" in line and line.startswith("GET")]
    SPIGAN.from_pretrained("me/tiny", force_download=True)
    assert {line for line in hub.log if line.startswith("GET /me/tiny/resolve/")} == downloads
    SPIGAN.from_pretrained("me/tiny", cache_dir=tmp_path / "other")
    assert (tmp_path / "other" / "models--me--tiny").is_dir()


def test_a_new_commit_is_seen_and_an_old_one_stays(hub: Hub) -> None:
    first = make(0).push_to_hub("me/tiny").rpartition("/")[2]
    assert same(SPIGAN.from_pretrained("me/tiny"), make(0))
    make(1).push_to_hub("me/tiny")
    assert same(SPIGAN.from_pretrained("me/tiny"), make(1))
    assert same(SPIGAN.from_pretrained("me/tiny", revision=first), make(0))


@pytest.mark.parametrize("how", ["argument", "environment", "hub is down"])
def test_offline(hub: Hub, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make().push_to_hub("me/tiny")
    SPIGAN.from_pretrained("me/tiny")
    options = {}
    if how == "argument":
        options = {"local_files_only": True}
    elif how == "environment":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # what HF_HUB_OFFLINE=1 sets at import
    else:
        hub.shutdown()
        hub.server_close()
    huggingface_hub.close_session()
    hub.log.clear()
    assert same(SPIGAN.from_pretrained("me/tiny", **options), make())  # type: ignore[arg-type]
    for missing, revision in (("me/never-seen", None), ("me/tiny", "never-seen")):
        with pytest.raises(FileNotFoundError):
            SPIGAN.from_pretrained(missing, revision=revision, **options)  # type: ignore[arg-type]
    assert hub.log == []


def test_a_hub_that_is_down_or_breaks_off(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An OSError, which every command tells without a traceback; huggingface_hub itself lets httpx's errors through."""
    make().push_to_hub("me/tiny")

    def too_long(handler: _Handler, name: str, text: str) -> None:
        length = name == "Content-Length" and "/resolve/" in handler.path
        BaseHTTPRequestHandler.send_header(handler, name, str(int(text) + 1) if length else text)

    monkeypatch.setattr(_Handler, "send_header", too_long)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)  # between attempts
    with pytest.raises(OSError, match="the hub cannot be reached: peer closed"):
        SPIGAN.from_pretrained("me/tiny", cache_dir=tmp_path / "broken")
    hub.shutdown()
    hub.server_close()
    huggingface_hub.close_session()
    with pytest.raises(OSError, match="the hub cannot be reached: "):
        make().push_to_hub("me/tiny")
    result = CliRunner().invoke(app, ["sample", "--model", "me/never-seen"])
    assert result.exit_code == 1 and result.stderr.startswith("error: ")


def test_what_the_hub_lacks(hub: Hub) -> None:
    make().push_to_hub("me/tiny")
    with pytest.raises(RepositoryNotFoundError):
        SPIGAN.from_pretrained("me/nothing")
    with pytest.raises(RevisionNotFoundError):
        SPIGAN.from_pretrained("me/tiny@nothing")
    hub.repos["me/text"] = {}
    hub.commit("me/text", "main", {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    with pytest.raises(FileNotFoundError, match=r"me/text is not a saved spigan model: it lacks model\.safetensors"):
        SPIGAN.from_pretrained("me/text")
    assert not any("pytorch_model.bin" in line for line in hub.log)
    with pytest.raises(ValueError, match="names the revision 'a', but revision='b' was given"):
        SPIGAN.from_pretrained("me/tiny@a", revision="b")
    result = CliRunner().invoke(app, ["sample", "--model", "me/nothing"])
    assert result.exit_code == 1 and result.stderr.startswith("error: ") and "Traceback" not in result.output


# ---- The command ----


def test_command_pushes_the_best(hub: Hub, run: Path) -> None:
    result = CliRunner().invoke(app, ["push", str(run / "best"), "me/best", "--private", "--license", "mit"])
    assert result.exit_code == 0, result.output
    assert "/me/best/commit/" in result.stdout and hub.private["me/best"]
    card = hub.repos["me/best"][hub.heads["me/best", "main"]]["README.md"].decode()
    assert "license: mit" in card and "FD-Tiny" in card


def test_command_writes_what_it_would_push(hub: Hub, run: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["push", str(run), "me/x", "--local", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "nothing was uploaded" in result.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    assert hub.log == []
    result = CliRunner().invoke(app, ["push", str(run), "me/x", "--local", str(tmp_path / "out")])
    assert result.exit_code == 1 and "is not empty" in result.stderr


def test_command_refuses(hub: Hub, run: Path) -> None:
    result = CliRunner().invoke(app, ["push", "missing", "me/x"])
    assert (
        result.exit_code == 1
        and "error: missing is not a folder; expected a run folder or a saved model" in result.stderr
    )
    result = CliRunner().invoke(app, ["push", str(run), "not a name"])
    assert result.exit_code == 1 and result.stderr.startswith("error: ")
    assert hub.repos == {}
