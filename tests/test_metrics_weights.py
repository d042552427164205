"""metrics/weights.py: finding, checking, downloading from a server of the test's own; each file alone."""
import hashlib
import http.server
import importlib.util
import socket
import sys
import threading

import pytest
import torch

from conftest import ROOT, Bomb, refused
from metrics import weights

CONTENT = bytes(range(256)) * 3000         # of the file that is served: more than one block of a download
HASH = hashlib.sha256(CONTENT).hexdigest()

@pytest.fixture
def no_network(monkeypatch):
    """Any attempt to reach the network fails the test that makes it."""
    def refuse(*_, **__):
        raise AssertionError("the network was touched")
    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)

@pytest.fixture
def server(monkeypatch):
    """A server on this machine, and RELEASED with a file that it has: what was asked for, what it answers."""
    state = dict(requests=[], answer=CONTENT, status=200, length=None)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            state["requests"].append(self.path)
            self.send_response(state["status"])
            self.send_header("Content-Length", str(state["length"] or len(state["answer"])))
            self.end_headers()
            self.wfile.write(state["answer"])

        def log_message(self, *_):
            pass
    httpd = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True).start()
    state["url"] = f"http://127.0.0.1:{httpd.server_port}/w.pt"
    entry = dict(url=state["url"], sha256=HASH, megabytes=1)
    monkeypatch.setitem(weights.RELEASED, "inception", entry)
    yield state
    httpd.shutdown()
    httpd.server_close()

def put(path, content=CONTENT):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path

def test_hashes_and_the_cache_directory(tmp_path, monkeypatch):
    """If a digest were of the first block only, an entry incomplete, or the cache not where the text says."""
    assert weights.sha256(put(tmp_path / "a", b"abc")).startswith("ba7816bf8f01cfea414140de5dae2223b00361a3")
    assert weights.sha256(put(tmp_path / "b", CONTENT * 3)) == hashlib.sha256(CONTENT * 3).hexdigest()
    for entry in weights.RELEASED.values():
        assert entry["url"].startswith("https://") and len(entry["sha256"] or HASH) == 64
    for env, expected in ((dict(ASFT_CACHE="/a", XDG_CACHE_HOME="/x"), "/a"),
                          (dict(XDG_CACHE_HOME="/x"), "/x/asft"), ({}, "/home/me/.cache/asft")):
        for key in ("ASFT_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(key, raising=False)
        for key, value in (env | dict(HOME="/home/me")).items():
            monkeypatch.setenv(key, value)
        assert str(weights.cache_directory()) == expected

def test_a_given_file_is_used_whatever_its_hash(tmp_path, server, no_network):
    """If a file of the user's own were refused, passed for the published one, or another were taken."""
    put(tmp_path / "weights" / "w.pt", b"another")
    own, same = put(tmp_path / "own.pt", b"mine"), put(tmp_path / "same.pt")
    assert weights.find("inception", own, tmp_path, True) == (own, hashlib.sha256(b"mine").hexdigest(), False)
    assert weights.find("inception", str(same), tmp_path) == (same, HASH, True)
    assert weights.find("pointnet", own, tmp_path)[2] is None
    refused("nothing.pt: no such file", call=lambda: weights.find("inception", tmp_path / "nothing.pt"))

def test_the_cache_is_used_without_a_network(tmp_path, server, no_network, monkeypatch):
    """If a file in the cache were fetched again, or a damaged one used."""
    path = put(tmp_path / "weights" / "w.pt")
    assert weights.find("inception", cache=tmp_path, download=True) == (path, HASH, True)
    monkeypatch.setenv("ASFT_CACHE", str(tmp_path))
    assert weights.find("inception") == (path, HASH, True)
    digest = weights.sha256(put(path, CONTENT[:-1]))
    refused("delete", path, HASH, digest, call=lambda: weights.find("inception", download=True))
    assert path.is_file()

@pytest.mark.parametrize("name", weights.RELEASED)
def test_what_is_missing_is_said_in_one_line(name, tmp_path, no_network):
    """If the message left out which file goes where, or the network were touched for one without a hash."""
    entry = weights.RELEASED[name]
    target = tmp_path / "weights" / entry["url"].split("/")[-1]
    words = [entry["sha256"], "--metrics"] if entry["sha256"] else ["no published"]
    for download in (False, True)[:1 if entry["sha256"] else 2]:
        refused(name, entry["url"], target, "--weights PATH", *words,
                call=lambda: weights.find(name, cache=tmp_path, download=download, log=pytest.fail))
    assert not list(tmp_path.iterdir())

def test_a_download_is_announced_checked_and_kept(tmp_path, server):
    """If a download were silent, not checked, left parts, or were repeated."""
    said, target = [], tmp_path / "new" / "weights" / "w.pt"
    for _ in range(2):
        found = weights.find("inception", cache=tmp_path / "new", download=True, log=said.append)
        assert found == (target, HASH, True)
    assert server["requests"] == ["/w.pt"] and target.read_bytes() == CONTENT
    assert len(said) == 1 and all(part in said[0] for part in (server["url"], "1 MB", str(target)))
    assert list(target.parent.iterdir()) == [target]

def test_a_download_that_fails_leaves_nothing(tmp_path, server, monkeypatch):
    """If what is not the whole published file stayed, or an error did not say what to do instead."""
    def find():
        weights.find("inception", cache=tmp_path, download=True, log=str)
    for answer, length in ((b"another", None), (CONTENT[:9999], len(CONTENT)), (b"", None)):
        server.update(answer=answer, length=length)
        refused(HASH, call=find)
        assert not list((tmp_path / "weights").iterdir())
    server.update(status=404)
    for url in (server["url"], "http://127.0.0.1:9/w.pt"):
        weights.RELEASED["inception"]["url"] = url
        refused("the download failed", url, HASH, tmp_path, "--weights PATH", call=find)
    server.update(status=200, answer=CONTENT, length=None)
    weights.RELEASED["inception"]["url"] = server["url"]

    def interrupt(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr(weights.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        find()
    assert not list((tmp_path / "weights").iterdir())

@pytest.mark.usefixtures("nothing_goes_off")
def test_identify_names_what_it_does_not_know(tmp_path):
    """If a file that is missing, broken, foreign or hostile were run, or not refused in one line."""
    path, one = tmp_path / "w.pt", torch.ones(1)
    last = "visual.transformer.resblocks.47.ln_1.weight"
    for zipped in (True, False):           # a ULIP checkpoint may have its CLIP inside
        for content, name in (({"visual.class_embedding": one, last: one}, "bigg"),
                              ({"a": {last: one, "module.point_encoder.reduce_dim.weight": one}}, "ulip"),
                              ({"visual.class_embedding": one, "sa1": Bomb()}, "clip")):
            torch.save(content, path, _use_new_zipfile_serialization=zipped)
            assert weights.identify(path) == name
    for content in (None, b"", b"no weights", b"PK\x03\x04 broken", {}, {"a": one}, {3: 4}, [1, 2], one):
        path.unlink(missing_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
        words = "weights of none of inception, .*, dinov2$" if path.exists() else "not a file of tensors"
        with pytest.raises(ValueError, match=f"^--weights [^\n]*w.pt: {words}"):
            weights.identify(path)

@pytest.mark.parametrize("path", sorted((ROOT / "metrics").glob("*.py")), ids=lambda path: path.stem)
def test_each_file_works_alone(path, tmp_path, monkeypatch, capsys):
    """If a copied file needed another one, or printed when it is imported."""
    spec = importlib.util.spec_from_file_location("alone", put(tmp_path / path.name, path.read_bytes()))
    for name in ("metrics", *(other.stem for other in [*ROOT.glob("*.py"), *ROOT.glob("metrics/*.py")])):
        monkeypatch.setitem(sys.modules, name, None)                   # its import fails
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert capsys.readouterr() == ("", "")
