"""Who may read and who may act."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from running import make_run
from serving_parts import TOKEN, Serve

BEARER = f"Bearer {TOKEN}"
DATA = ("/api/fleet", "/api/runs/toy", "/metrics")


def test_without_a_token_this_machine_may_read_and_nobody_may_act(serve: Serve, tmp_path: Path) -> None:
    run = make_run(tmp_path)
    server = serve()
    assert server.printed == f"http://127.0.0.1:{server.port}/"
    assert [row["name"] for row in server.data("/api/fleet")["fleet"]["rows"]] == ["toy"]
    assert server.data("/api/runs/toy")["sections"]["status"]["state"] == "PENDING"
    assert "# TYPE" in server.ask("/metrics")[1]
    status, said, _ = server.ask("/api/runs/toy/cancel", "POST")
    assert (status, said) == (403, "this dashboard only reads; start it with --allow-actions")
    assert not run.cancel_path.exists()


def test_with_a_token_all_data_needs_it_and_the_empty_pages_do_not(serve: Serve, tmp_path: Path) -> None:
    run = make_run(tmp_path)
    server = serve("--allow-actions", token=TOKEN)
    assert TOKEN not in server.printed
    for path in DATA:
        for wrong in ({}, {"Authorization": "Bearer no"}, {"Authorization": f"Bearer {TOKEN}x"}, {"Cookie": TOKEN}):
            assert server.ask(path, **wrong)[0] == 401
        assert server.ask(path, Authorization=BEARER)[0] == 200
    assert server.ask(f"/api/fleet?token={TOKEN}")[0] == 401
    for path in ("/", "/runs/toy", "/static/run.js"):
        status, body, _ = server.ask(path)
        assert status == 200
        assert str(tmp_path) not in body
    assert server.ask("/api/runs/toy/cancel", "POST")[0] == 401
    assert not run.cancel_path.exists()
    assert server.ask("/api/runs/toy/cancel", "POST", Authorization=BEARER)[0] == 200
    assert run.cancel_path.exists()


def test_an_action_is_a_post_of_the_page_itself(serve: Serve, tmp_path: Path) -> None:
    run = make_run(tmp_path)
    server = serve("--allow-actions", token=TOKEN)
    path = "/api/runs/toy/cancel"
    assert server.ask(path, Authorization=BEARER)[0] == 405
    foreign = [{"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec_Fetch_Site": "cross-site"}]
    for headers in foreign:
        assert server.ask(path, "POST", Authorization=BEARER, **headers)[0] == 403
    assert server.ask("/api/runs/toy/shutdown", "POST", Authorization=BEARER)[0] == 404
    assert not run.cancel_path.exists()
    own = {"Origin": f"http://127.0.0.1:{server.port}", "Sec_Fetch_Site": "same-origin"}
    assert server.ask(path, "POST", Authorization=BEARER, **own)[0] == 200
    assert run.cancel_path.exists()


def test_what_is_not_running_cannot_be_preempted_and_the_answer_says_why(serve: Serve, tmp_path: Path) -> None:
    make_run(tmp_path)
    server = serve("--allow-actions", token=TOKEN)
    status, said, _ = server.ask("/api/runs/toy/preempt", "POST", Authorization=BEARER)
    assert status == 409
    assert said == "toy is not running, so there is nothing to preempt: it is PENDING (not started yet)"


def test_a_token_for_actions_is_made_and_told_once_in_the_address(serve: Serve, tmp_path: Path) -> None:
    make_run(tmp_path)
    server = serve("--allow-actions")
    _, _, token = server.printed.partition("#token=")
    assert len(token) >= 32
    assert server.ask("/api/fleet")[0] == 401
    assert server.ask("/api/fleet", Authorization=f"Bearer {token}")[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8050", "127.0.0.1.evil.example", "", "[::1].evil"])
def test_a_foreign_name_for_this_machine_gets_nothing(serve: Serve, tmp_path: Path, host: str) -> None:
    server = serve()
    assert server.ask("/api/fleet", Host=host)[0] == 421
    for own in ("localhost:1234", "127.0.0.1", "[::1]:8050"):  # through a tunnel the port is another
        assert server.ask("/api/fleet", Host=own)[0] == 200


@pytest.mark.parametrize(
    ("options", "token", "said"),
    [
        (["--host", "0.0.0.0"], None, "set a token"),
        (["--host", "0.0.0.0", "--allow-actions"], None, "set a token"),
        (["--host", "127.0.0.1"], "short", "has 5 characters"),
        (["--host", "192.0.2.1"], TOKEN, "cannot listen on 192.0.2.1"),
    ],
)
def test_it_refuses_to_be_open_to_all(tmp_path: Path, options: list[str], token: str | None, said: str) -> None:
    command = [sys.executable, "-m", "latentwire", "dashboard", "--port", "0", "--runs-dir", str(tmp_path), *options]
    environ = {**os.environ, "LATENTWIRE_DASHBOARD_TOKEN": token or ""}
    refused = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 1
    assert refused.stderr.startswith("latentwire: ")
    assert said in refused.stderr


def test_no_address_leads_to_a_file_outside(serve: Serve, tmp_path: Path) -> None:
    make_run(tmp_path / "runs")
    (tmp_path / "secret").write_text("secret")
    server = serve()
    for path in (
        "/static/../run_page.py",
        "/static/%2e%2e/run_page.py",
        "/static/..%2frun_page.py",
        "/api/runs/..",
        "/api/runs/..%2fsecret",
        "/api/runs/%2e%2e%2f%2e%2e%2fetc",
        "/api/runs/runs%2fexperiment_toy",
        "/static//etc/passwd",
    ):
        status, body, _ = server.ask(path)
        assert status in (404, 405), path  # a name with a slash in it is that of an action, which is a POST
        assert body in ("Not Found", "Method Not Allowed") or body.startswith("there is no run"), path


def test_every_answer_forbids_the_browser_what_no_page_here_needs(serve: Serve, tmp_path: Path) -> None:
    server = serve()
    for path in ("/", "/runs/no", "/api/runs/no", "/static/run.js", "/static/no.js"):
        headers = server.ask(path)[2]
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self';" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert "set-cookie" not in headers
