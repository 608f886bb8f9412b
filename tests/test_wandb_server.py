"""The loopback W&B server, told and asked by the real client."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.wandb_server import WandbServer

NAME = "retrieval_bundle"
BINARY = bytes(range(256)) * 4096  # 1 MB


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    directory = tmp_path / "bundle"
    (directory / "variables" / "deep").mkdir(parents=True)
    (directory / "saved_model.pb").write_bytes(b"graph")
    (directory / "variables" / "deep" / "weights, 100 % é.bin").write_bytes(BINARY)
    (directory / "variables" / "empty").touch()
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    """{path: bytes} of all files below a directory."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def log(
    wandb: Any,
    bundle: Path,
    *aliases: str,
    run: str = "abc123",
    metadata: dict[str, Any] | None = None,
) -> Any:
    """Logs the directory as an artifact, in a run of its own; returns it committed."""
    artifact = wandb.Artifact(NAME, type="model", metadata=metadata)
    artifact.add_dir(str(bundle))
    with wandb.init(id=run, resume="allow") as started:
        started.log_artifact(artifact, aliases=["latest", *aliases])
        return artifact.wait()


def find(wandb: Any, alias: str) -> Any:
    return wandb.Api().artifact(f"team/rec/{NAME}:{alias}")


def test_a_run_has_its_config_and_rows_and_goes_on_when_it_is_resumed(
    server: WandbServer, wandb: Any
):
    settings = {"project": "rec", "job_type": "ranking", "id": "abc123", "resume": "allow"}
    run = wandb.init(**settings, config={"seed": 7, "ranking": {"layers": [64, 32]}})
    for step in range(200):
        run.log({"loss": 1 / (step + 1)})
    run.finish()
    run = wandb.init(**settings, config={"seed": 7})
    run.log({"epoch": 1, "val/ndcg@10": 0.2})
    run.finish()

    stored = server.runs["abc123"]
    assert (stored.project, stored.job_type, stored.finished) == ("rec", "ranking", True)
    assert stored.config == {"seed": 7, "ranking": {"layers": [64, 32]}}
    assert [row["loss"] for row in stored.history[:200]] == [1 / (step + 1) for step in range(200)]
    assert [row["_step"] for row in stored.history] == list(range(201))
    assert (stored.history[200]["epoch"], stored.history[200]["val/ndcg@10"]) == (1, 0.2)


def test_a_directory_is_stored_and_only_new_content_is_a_new_version(
    server: WandbServer, wandb: Any, bundle: Path
):
    metadata = {"metrics": {"ndcg@10": 0.25}, "id": "0123abcd"}
    log(wandb, bundle, "id-0123abcd", metadata=metadata)
    [first] = server.collection(NAME)
    assert (first.name, first.type, first.metadata) == (f"{NAME}:v0", "model", metadata)
    assert first.aliases == {"latest", "id-0123abcd"}
    assert first.files == contents(bundle)
    assert first.manifest["contents"].keys() == first.files.keys()

    assert log(wandb, bundle, "again").version == "v0"
    (bundle / "saved_model.pb").write_bytes(b"another graph")
    assert log(wandb, bundle, run="second").version == "v1"
    assert [version.aliases for version in server.collection(NAME)] == [
        {"id-0123abcd", "again"},
        {"latest"},
    ]
    assert [run.logged for run in server.runs.values()] == [[f"{NAME}:v0"], [f"{NAME}:v1"]]


def test_a_run_records_what_it_uses(server: WandbServer, wandb: Any, bundle: Path):
    log(wandb, bundle, "id-0123abcd")
    with wandb.init(id="ranking") as run:
        assert run.use_artifact(f"{NAME}:id-0123abcd").version == "v0"
    assert server.runs["ranking"].used == [f"{NAME}:v0"]


def test_versions_are_found_listed_and_downloaded(
    server: WandbServer, wandb: Any, bundle: Path, tmp_path: Path
):
    first = contents(bundle)
    log(wandb, bundle, "production", metadata={"version": 1})
    (bundle / "saved_model.pb").write_bytes(b"another graph")
    log(wandb, bundle, metadata={"version": 2}, run="second")

    found = find(wandb, "production")
    assert (found.entity, found.project, found.name) == ("team", "rec", f"{NAME}:production")
    assert (found.version, found.aliases, found.metadata) == ("v0", ["production"], {"version": 1})
    assert found.digest == server.versions[0].digest
    assert found.logged_by().id == "abc123"
    assert [find(wandb, alias).version for alias in ("latest", "v1", "v0")] == ["v1", "v1", "v0"]
    listed = wandb.Api().artifacts(type_name="model", name=f"team/rec/{NAME}")
    assert [(each.version, each.aliases) for each in listed] == [
        ("v1", ["latest"]),
        ("v0", ["production"]),
    ]
    with pytest.raises(wandb.errors.CommError, match="not found"):
        find(wandb, "staging")

    with server.client(tmp_path / "another") as wandb:
        found = find(wandb, "production")
        found.download(root=str(tmp_path / "downloaded"))
        found.verify(str(tmp_path / "downloaded"))
    assert contents(tmp_path / "downloaded") == first


def test_an_alias_moves_and_goes_and_metadata_changes(
    server: WandbServer, wandb: Any, bundle: Path
):
    log(wandb, bundle, "production", "old")
    (bundle / "saved_model.pb").write_bytes(b"another graph")
    log(wandb, bundle, metadata={"version": 2})

    artifact = find(wandb, "v1")
    artifact.metadata["promotions"] = [{"alias": "production", "ndcg@10": 0.25}]
    artifact.aliases.append("production")
    artifact.save()
    promoted = find(wandb, "production")
    assert promoted.version == "v1"
    assert promoted.metadata == {
        "version": 2,
        "promotions": [{"alias": "production", "ndcg@10": 0.25}],
    }
    assert find(wandb, "v0").aliases == ["old"]

    promoted.aliases.remove("production")
    promoted.save()
    assert [version.aliases for version in server.versions] == [{"old"}, {"latest"}]


def test_a_server_that_fails_in_mid_run_holds_nobody_up(server: WandbServer, wandb: Any):
    run = wandb.init(id="abc123")
    run.log({"loss": 0.5})
    server.fail = True
    start = time.monotonic()
    run.log({"loss": 0.4})
    run.finish()
    assert time.monotonic() - start < 30
    assert not server.runs["abc123"].finished
    with pytest.raises(wandb.errors.Error, match="HTTP 500"):
        wandb.init()

    server.fail = 1
    wandb.init(id="retried").finish()
    assert server.runs["retried"].finished


@pytest.mark.parametrize("step", ["CreateArtifact", "storage", "CommitArtifact"])
def test_an_upload_that_fails_is_told_by_wait_and_makes_no_version(
    step: str, server: WandbServer, wandb: Any, bundle: Path
):
    server.fail = step
    with pytest.raises(ValueError, match="ArtifactSaver"):
        log(wandb, bundle)
    assert server.collection(NAME) == []


def test_a_promotion_can_fail_between_its_steps(server: WandbServer, wandb: Any, bundle: Path):
    artifact = log(wandb, bundle)
    artifact.aliases.append("production")
    artifact.metadata["promotions"] = [1]
    server.fail = "UpdateArtifact"
    with pytest.raises(wandb.errors.CommError):
        artifact.save()
    assert (server.versions[0].aliases, server.versions[0].metadata) == (
        {"latest", "production"},
        {},
    )


def test_a_damaged_file_is_delivered_and_does_not_verify(
    server: WandbServer, wandb: Any, bundle: Path, tmp_path: Path
):
    log(wandb, bundle)
    server.damage(f"{NAME}:latest", "saved_model.pb")
    target = tmp_path / "downloaded"
    with server.client(tmp_path / "another") as wandb:  # whose cache is empty
        found = find(wandb, "latest")
        found.download(root=str(target))
        assert (target / "saved_model.pb").read_bytes() == b"fraph"
        with pytest.raises(ValueError, match="Digest mismatch"):
            found.verify(str(target))


def test_another_process_is_a_client_by_its_environment(server: WandbServer, tmp_path: Path):
    code = "import wandb; run = wandb.init(id='abc123'); run.log({'loss': 0.5}); run.finish()"
    environment = {**os.environ, **server.environment(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, cwd=tmp_path)
    assert server.runs["abc123"].history[0]["loss"] == 0.5
