"""metrics/weights.py: finding, checking, downloading from a server of the test's own, and telling files apart."""
import argparse
import hashlib
import http.server
import pickle
import shutil
import socket
import subprocess
import sys
import threading
import zipfile

import numpy as np
import pytest
import torch

from conftest import ROOT
from metrics import clip, inception, pointnet, ulip, weights

CONTENT = bytes(range(256)) * 3000          # of the file that is served: more than one block of a download
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
    """A server on this machine, and RELEASED with a file that it has. dict: what was asked for, and what it answers."""
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
    entry = dict(file="w.pt", url=state["url"], sha256=HASH, megabytes=1, licence="none")
    monkeypatch.setitem(weights.RELEASED, "inception", entry)
    yield state
    httpd.shutdown()
    httpd.server_close()


def put(path, content=CONTENT):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------------------------------------------------
# Facts


def test_sha256_known_answer(tmp_path):
    """If the digest is not SHA-256, or only of the first block."""
    assert weights.sha256(put(tmp_path / "a", b"abc")).startswith("ba7816bf8f01cfea414140de5dae2223b00361a3")
    assert weights.sha256(put(tmp_path / "b", CONTENT * 3)) == hashlib.sha256(CONTENT * 3).hexdigest()


@pytest.mark.parametrize("env, expected", [(dict(ASFT_CACHE="/a", XDG_CACHE_HOME="/x"), "/a"),
                                           (dict(XDG_CACHE_HOME="/x"), "/x/asft"), ({}, "/home/me/.cache/asft")])
def test_cache_directory(env, expected, monkeypatch):
    """If the cache is not where the documentation says."""
    for key in ("ASFT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(key, raising=False)
    for key, value in (env | dict(HOME="/home/me")).items():
        monkeypatch.setenv(key, value)
    assert str(weights.cache_directory()) == expected


# ---------------------------------------------------------------------------------------------------------
# Finding, without a network

def test_a_given_file_is_used_whatever_its_hash(tmp_path, server, no_network):
    """If a file of the user's own is refused, passes for the published one, or is searched for elsewhere."""
    put(tmp_path / "weights" / "w.pt", b"another")
    own, same = put(tmp_path / "own.pt", b"mine"), put(tmp_path / "same.pt")
    assert weights.find("inception", own, tmp_path, True) == (own, hashlib.sha256(b"mine").hexdigest(), False)
    assert weights.find("inception", str(same), tmp_path) == (same, HASH, True)
    assert weights.find("pointnet", own, tmp_path)[2] is None
    with pytest.raises(ValueError, match="nothing.pt: no such file") as error:
        weights.find("inception", tmp_path / "nothing.pt", tmp_path, True)
    one_line(error)


# ---------------------------------------------------------------------------------------------------------
# Downloading

def test_a_download_is_announced_checked_and_kept(tmp_path, server):
    """If a download is silent, not checked, leaves parts, or is repeated."""
    said, target = [], tmp_path / "new" / "weights" / "w.pt"
    for _ in range(2):
        assert weights.find("inception", cache=tmp_path / "new", download=True, log=said.append) == (target, HASH, True)
    assert server["requests"] == ["/w.pt"] and target.read_bytes() == CONTENT
    assert len(said) == 1 and all(part in said[0] for part in (server["url"], "1 MB", str(target)))
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("change", [dict(answer=b"another"), dict(answer=CONTENT[:9999], length=len(CONTENT)),
                                    dict(answer=b"")])
def test_a_wrong_download_leaves_nothing(change, tmp_path, server):
    """If what is not the published file, or only its beginning, stays in the cache."""
    server.update(change)
    with pytest.raises(ValueError) as error:
        weights.find("inception", cache=tmp_path, download=True, log=str)
    assert HASH in one_line(error)
    assert not list((tmp_path / "weights").iterdir())


def test_no_network_is_said_in_one_line(tmp_path, server):
    """If an error of the server, or none there, ends in a traceback, or does not say what to do instead."""
    server["status"] = 404
    target = tmp_path / "weights" / "w.pt"
    for url in (server["url"], "http://127.0.0.1:9/w.pt"):
        weights.RELEASED["inception"]["url"] = url
        with pytest.raises(ValueError, match="the download failed") as error:
            weights.find("inception", cache=tmp_path, download=True, log=str)
        assert all(part in one_line(error) for part in (url, HASH, str(target), "--weights PATH"))
    assert not list(target.parent.iterdir())


def test_an_interrupted_download_leaves_nothing(tmp_path, server, monkeypatch):
    """If Ctrl-C leaves half a file, which would be taken for a whole one."""
    def interrupt(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr(weights.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        weights.find("inception", cache=tmp_path, download=True, log=str)
    assert not list((tmp_path / "weights").iterdir())


# ---------------------------------------------------------------------------------------------------------
# Telling files apart

@pytest.mark.parametrize("name, content", [
    ("inception", {"Mixed_5b.branch1x1.conv.weight": torch.ones(1)}),
    ("clip", {"visual.conv1.weight": torch.ones(2, 3, 32, 32)}),
    ("bigg", {"text_projection": torch.ones(1), "visual.conv1.weight": torch.ones(2, 3, 14, 14)}),
    ("pointnet", {"class_acc": np.float64(0.9), "model_state_dict": {"sa1.mlp_convs.0.weight": torch.ones(1)}}),
    ("ulip", {"args": argparse.Namespace(lr=1.0), "best_acc1": np.float64(50), "state_dict": {
        "module.open_clip_model.visual.conv1.weight": torch.ones(2, 3, 14, 14),
        "module.point_encoder.reduce_dim.weight": torch.ones(1)}})])
@pytest.mark.parametrize("zipped", [True, False])
def test_identify(name, content, zipped, tmp_path, no_network):
    """If weights are taken for another network's, bare, wrapped, or in the format of an older torch."""
    torch.save(content, tmp_path / "w", _use_new_zipfile_serialization=zipped)
    assert weights.identify(tmp_path / "w") == name


def test_the_networks_themselves_are_identified(tmp_path):
    """If the keys that tell files apart are not keys of the networks."""
    with torch.device("meta"):
        networks = dict(inception=inception.InceptionV3(), pointnet=pointnet.PointNet2(), ulip=ulip.PointBERT(depth=1))
    for name, net in networks.items():
        torch.save({k: torch.ones(1) for k in net.state_dict()}, tmp_path / "w.pt")
        assert weights.identify(tmp_path / "w.pt") == name


def test_a_torchscript_archive_is_clip(tmp_path):
    """If CLIP's file, an archive of code that weights_only refuses, is not known or its code is run."""
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        for item in ("w/data.pkl", "w/constants.pkl", "w/code/__torch__.py"):
            archive.writestr(item, "raise SystemExit")
    assert weights.identify(tmp_path / "w.pt") == "clip"


class Hostile:
    def __reduce__(self):
        return print, ("this must not run",)


def test_a_copied_file_works_alone(tmp_path):
    """If the file needs another of this repository, or does anything when it is imported."""
    shutil.copy(ROOT / "metrics" / "weights.py", tmp_path)
    run = subprocess.run([sys.executable, "-c", "import weights; print(len(weights.RELEASED))"], cwd=tmp_path,
                         capture_output=True, text=True, timeout=60)
    assert (run.stdout, run.stderr) == ("5\n", "")
