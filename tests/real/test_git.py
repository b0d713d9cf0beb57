"""git clones and pushes through the proxy; git's own server is the upstream."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pytest

from tests.support.process import CHECKOUT, StandaloneProxy

GIT = shutil.which("git")


def has_backend() -> bool:
    if GIT is None:
        return False
    programs = subprocess.run([GIT, "--exec-path"], capture_output=True, text=True, check=True).stdout.strip()
    return Path(programs, "git-http-backend").exists()


pytestmark = [
    pytest.mark.skipif(not has_backend(), reason="git with git-http-backend is not installed"),
    pytest.mark.slow,
]

BIG = 1_500_000  # of bytes that do not compress; far more than http.postBuffer


def git(*arguments: str | Path, cwd: Path) -> str:
    """Run git as if nobody had configured it, and return what it said."""
    assert GIT is not None
    command = [GIT, "-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "commit.gpgsign=false"]
    env = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    env |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    done = subprocess.run(
        [*command, *map(str, arguments)], cwd=cwd, env=env, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, f"git {arguments}:\n{done.stdout}{done.stderr}"
    return done.stdout


@dataclass(frozen=True, slots=True)
class Seen:
    """A request as git's server saw it; ``size`` is that of the body on the wire, ``decoded`` without its coding."""

    method: str
    framing: str
    size: int
    coding: str
    decoded: int
    target: str

    @classmethod
    def read(cls, line: str) -> Self:
        method, framing, size, coding, decoded, target = line.split()
        return cls(method, framing, int(size), coding, int(decoded), target)


class GitUpstream:
    """The server of the repositories in a directory, and what was asked of it."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self._process = process
        self.url = url

    def stop(self) -> list[Seen]:
        """End it and return each request that it saw."""
        self._process.terminate()
        said, _ = self._process.communicate(timeout=10)
        return [Seen.read(line) for line in said.splitlines()]


@pytest.fixture
def repositories(tmp_path: Path) -> Path:
    """A directory with a bare repository, ``r.git``, of one commit."""
    root = tmp_path / "served"
    root.mkdir()
    git("init", "--quiet", "--bare", "--initial-branch=main", "r.git", cwd=root)
    git("config", "http.receivepack", "true", cwd=root / "r.git")
    work = tmp_path / "first"
    git("init", "--quiet", "--initial-branch=main", work, cwd=tmp_path)
    (work / "big").write_bytes(os.urandom(BIG))
    git("add", "big", cwd=work)
    git("commit", "--quiet", "-m", "first", cwd=work)
    git("push", "--quiet", root / "r.git", "main", cwd=work)
    return root


@pytest.fixture
def upstream_git(repositories: Path) -> Iterator[GitUpstream]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.real.git_upstream", str(repositories)],
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    try:
        found = re.search(r"listening on (\S+)", process.stdout.readline())
        assert found
        yield GitUpstream(process, found[1])
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(params=["/", "/code"])
def remote(request: pytest.FixtureRequest, upstream_git: GitUpstream) -> Iterator[str]:
    """The URL of ``r.git`` through a proxy, mounted at the root and under a prefix."""
    prefix = request.param
    with StandaloneProxy("--mount", f"{prefix}={upstream_git.url}") as proxy:
        yield f"http://127.0.0.1:{proxy.port}{prefix.rstrip('/')}/r.git"


class TestGit:
    def test_a_clone_is_the_same_repository(self, tmp_path: Path, repositories: Path, remote: str) -> None:
        git("clone", "--quiet", remote, "copy", cwd=tmp_path)
        assert (tmp_path / "copy/big").read_bytes() == (tmp_path / "first/big").read_bytes()
        git("fsck", "--strict", cwd=tmp_path / "copy")

    def test_a_push_that_git_chunks_arrives_whole(
        self, tmp_path: Path, repositories: Path, upstream_git: GitUpstream, remote: str
    ) -> None:
        git("clone", "--quiet", remote, "copy", cwd=tmp_path)
        copy = tmp_path / "copy"
        (copy / "more").write_bytes(os.urandom(BIG))
        git("add", "more", cwd=copy)
        git("commit", "--quiet", "-m", "more", cwd=copy)
        git("-c", "http.postBuffer=65536", "push", "--quiet", "origin", "main", cwd=copy)
        pushed = git("rev-parse", "main", cwd=repositories / "r.git")
        assert pushed == git("rev-parse", "HEAD", cwd=copy)
        git("fsck", "--strict", cwd=repositories / "r.git")
        packs = [seen for seen in upstream_git.stop() if seen.target.endswith("/git-receive-pack") and seen.size > BIG]
        assert [(seen.method, seen.framing) for seen in packs] == [("POST", "chunked")]

    def test_many_refs_make_a_compressed_request_that_arrives_as_it_is(
        self, tmp_path: Path, repositories: Path, upstream_git: GitUpstream, remote: str
    ) -> None:
        # git compresses what it wants and has once that is longer than 1 KiB.
        git("clone", "--quiet", remote, "copy", cwd=tmp_path)
        server = repositories / "r.git"
        for number in range(40):
            tree = git("write-tree", cwd=server).strip()
            commit = git("commit-tree", "-m", f"n{number}", tree, cwd=server).strip()
            git("update-ref", f"refs/heads/n{number}", commit, cwd=server)
        git("fetch", "--quiet", "origin", cwd=tmp_path / "copy")
        branches = git("branch", "--remotes", cwd=tmp_path / "copy")
        assert len(re.findall(r"origin/n\d+", branches)) == 40
        asked = [seen for seen in upstream_git.stop() if seen.coding == "gzip"]
        assert asked
        for seen in asked:
            assert (seen.method, seen.framing) == ("POST", "length")
            assert seen.target.endswith("/git-upload-pack")
            # Nobody inflated it on the way: 40 names of 40 digits were fewer bytes on the wire.
            assert seen.size < seen.decoded
            assert seen.decoded > 40 * 40
